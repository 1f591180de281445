//! What a node tells its peers about its worker, and the judgement on a pair of such blobs.

use thalweg_ffi::ucx::Version;

use super::Unavailable;
use super::wire::{Address, SECRET_BITS, SLOTS_MAX};
use crate::proto::hello::LINK_BLOB_BYTES_MAX;

/// The form of the blob and of what follows from it.
const FORM: u8 = 3;
const FIXED_BYTES: usize = 16;
/// Transports that are named, and the length of a name. UCX has some twenty, with names of up to ten
/// letters.
pub(super) const NAMES_MAX: usize = 16;
const NAME_BYTES_MAX: usize = 24;

/// Worker addresses grow with devices: a few hundred bytes each. What a blob has room for beside as many
/// names as there can be, each behind its length.
pub(super) const ADDRESS_MAX: usize =
    LINK_BLOB_BYTES_MAX - FIXED_BYTES - NAMES_MAX * (1 + NAME_BYTES_MAX);

/// Whether this may be the name of a transport.
pub(super) fn is_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(fits)
}

/// A peer's worker, and its slot for this connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Blob {
    pub major: u8,
    pub minor: u8,
    pub(super) to: Address,
    /// UCX's transports over hardware there, in alphabetical order.
    pub transports: Vec<String>,
    pub worker: Vec<u8>,
}

impl Blob {
    pub(super) fn new(
        version: Version,
        to: Address,
        transports: Vec<String>,
        worker: Vec<u8>,
    ) -> Blob {
        Blob { major: version.major as u8, minor: version.minor as u8, to, transports, worker }
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![FORM, self.major, self.minor, self.transports.len() as u8];
        bytes.extend_from_slice(&self.to.slot.to_le_bytes());
        bytes.extend_from_slice(&self.to.secret.to_le_bytes());
        for name in &self.transports {
            bytes.push(name.len() as u8);
            bytes.extend_from_slice(name.as_bytes());
        }
        bytes.extend_from_slice(&self.worker);
        bytes
    }

    /// `None`: malformed, or of another form.
    pub fn from_bytes(bytes: &[u8]) -> Option<Blob> {
        let (fixed, rest) = bytes.split_at_checked(FIXED_BYTES)?;
        let count = usize::from(fixed[3]);
        if fixed[0] != FORM || count > NAMES_MAX {
            return None;
        }
        let (transports, worker) = names(rest, count)?;
        if worker.is_empty() || worker.len() > ADDRESS_MAX {
            return None;
        }
        let slot = fixed[4..8].try_into().map(u32::from_le_bytes).ok()?;
        let secret = fixed[8..16].try_into().map(u64::from_le_bytes).ok()?;
        if slot >= SLOTS_MAX || secret >> SECRET_BITS != 0 {
            return None;
        }
        let to = Address { slot, secret };
        Some(Blob { major: fixed[1], minor: fixed[2], to, transports, worker: worker.to_vec() })
    }
}

/// So many names, each behind its length and after the one before, and what follows.
fn names(mut bytes: &[u8], count: usize) -> Option<(Vec<String>, &[u8])> {
    let mut names: Vec<String> = Vec::with_capacity(count);
    for _ in 0..count {
        let (len, rest) = bytes.split_first()?;
        let (name, rest) = rest.split_at_checked(usize::from(*len))?;
        let name = std::str::from_utf8(name).ok()?.to_owned();
        if !is_name(&name) || names.last().is_some_and(|last| *last >= name) {
            return None;
        }
        names.push(name);
        bytes = rest;
    }
    Some((names, bytes))
}

/// UCX's transports over hardware at the peer; none, if its offer cannot be read.
pub(crate) fn transports(theirs: &[u8]) -> Vec<String> {
    Blob::from_bytes(theirs).map(|blob| blob.transports).unwrap_or_default()
}

/// Whether peers can be told of an address of this length. One that is too long would fail every
/// connection of the node, over whatever link.
pub(super) fn fits(address_len: usize) -> Result<(), Unavailable> {
    if address_len <= ADDRESS_MAX {
        return Ok(());
    }
    Err(Unavailable {
        reason: format!(
            "the address of UCX's worker has {address_len} bytes, of which a hello takes {ADDRESS_MAX}"
        ),
        fix: "name fewer devices in UCX_NET_DEVICES, or fewer transports in UCX_TLS".into(),
    })
}

/// Whether two nodes may try. UCX promises no compatibility between what different minor versions
/// send each other, and cannot be asked: a mixture is refused rather than tried.
pub(crate) fn verdict(own: Version, theirs: &[u8]) -> Result<(), (String, Option<String>)> {
    let Some(theirs) = Blob::from_bytes(theirs) else {
        return Err(("the peer's offer is malformed".into(), None));
    };
    if (u32::from(theirs.major), u32::from(theirs.minor)) != (own.major, own.minor) {
        return Err((
            format!(
                "the peer has UCX {}.{}, this process {}.{}",
                theirs.major, theirs.minor, own.major, own.minor
            ),
            Some("install the same version of UCX on both sides".into()),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OWN: Version = Version { major: 1, minor: 13, release: 1 };

    fn blob() -> Blob {
        let transports = ["rc_mlx5", "ud_verbs"].map(str::to_owned).to_vec();
        Blob::new(OWN, Address { slot: 7, secret: 1 << 39 }, transports, vec![1, 2, 3])
    }

    #[test]
    fn decoding_inverts_encoding() {
        assert_eq!(Blob::from_bytes(&blob().to_bytes()), Some(blob()));
    }

    /// The one limit follows from the other, and both sides keep to it.
    #[test]
    fn the_longest_blob_fits_a_hello() {
        use crate::proto::hello::Hello;
        let name = |at| format!("{at:0>width$}", width = NAME_BYTES_MAX);
        let longest = |address| Blob {
            transports: (0..NAMES_MAX).map(name).collect(),
            worker: vec![7; address],
            ..blob()
        };
        let bytes = longest(ADDRESS_MAX).to_bytes();
        assert_eq!(Blob::from_bytes(&bytes), Some(longest(ADDRESS_MAX)));
        assert_eq!(Blob::from_bytes(&longest(ADDRESS_MAX + 1).to_bytes()), None);
        let hello = |blob| Hello { links: vec![("ucx".into(), blob)], ..Hello::default() };
        let body = hello(bytes.clone()).encode().expect("it fits");
        assert_eq!(Hello::decode(&body).expect("a hello").links[0].1, bytes);
        assert!(hello(longest(ADDRESS_MAX + 1).to_bytes()).encode().is_err());
    }

    #[test]
    fn addresses_that_no_hello_takes_are_told_of() {
        assert_eq!(fits(ADDRESS_MAX), Ok(()));
        let told = fits(ADDRESS_MAX + 1).expect_err("too long");
        assert!(told.reason.contains(&(ADDRESS_MAX + 1).to_string()), "{}", told.reason);
        assert!(["UCX_NET_DEVICES", "UCX_TLS"].iter().all(|name| told.fix.contains(name)));
    }

    #[test]
    fn the_same_minor_version_is_wanted() {
        assert_eq!(verdict(OWN, &blob().to_bytes()), Ok(()));
        let other = Blob { minor: 22, ..blob() };
        let (reason, fix) = verdict(OWN, &other.to_bytes()).expect_err("refused");
        assert!(reason.contains("1.22") && reason.contains("1.13") && fix.is_some(), "{reason}");
    }

    #[test]
    fn names_that_are_none_are_refused() {
        let with = |names: &[&str]| {
            let transports = names.iter().map(|name| (*name).to_owned()).collect();
            Blob { transports, ..blob() }.to_bytes()
        };
        let many: Vec<String> = (0..=NAMES_MAX).map(|at| format!("t{at:02}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let long = "x".repeat(NAME_BYTES_MAX + 1);
        for good in [&[][..], &["a"], &many[1..], &[&long[1..]]] {
            let bytes = with(good);
            assert_eq!(transports(&bytes), good, "{good:?}");
        }
        for bad in
            [&["b", "a"][..], &["a", "a"], &[""], &["A"], &["a b"], &["\u{e9}"], &many, &[&long]]
        {
            assert_eq!(Blob::from_bytes(&with(bad)), None, "{bad:?}");
        }
        let bytes = blob().to_bytes();
        for len in 0..bytes.len() - 2 {
            assert_eq!(Blob::from_bytes(&bytes[..len]), None, "{len}");
        }
        let older = [&[2][..], &bytes[1..]].concat();
        assert!(verdict(OWN, &older).is_err(), "of another form");
    }

    proptest! {
        #[test]
        fn bytes_after_a_true_beginning_are_judged_without_harm(
            count in 0u8..20,
            rest in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            let mut bytes = blob().to_bytes()[..FIXED_BYTES].to_vec();
            bytes[3] = count;
            bytes.extend(rest);
            if let Some(blob) = Blob::from_bytes(&bytes) {
                prop_assert_eq!(blob.to_bytes(), bytes);
            }
        }

        #[test]
        fn any_bytes_are_judged_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some(blob) = Blob::from_bytes(&bytes) {
                prop_assert_eq!(blob.to_bytes(), bytes);
            } else {
                prop_assert!(verdict(OWN, &bytes).is_err());
            }
        }
    }
}
