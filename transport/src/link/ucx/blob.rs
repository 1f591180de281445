//! What a node tells its peers about its worker, and the judgement on a pair of such blobs.

use thalweg_ffi::ucx::Version;

use super::wire::Address;

/// The form of the blob and of what follows from it.
const FORM: u8 = 1;
const FIXED_BYTES: usize = 16;
/// Worker addresses grow with devices: a few hundred bytes each.
pub(super) const ADDRESS_MAX: usize = 16 << 10;

/// A peer's worker, and its slot for this connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Blob {
    pub major: u8,
    pub minor: u8,
    /// It lets UCX put and get by itself.
    pub direct: bool,
    pub(super) to: Address,
    pub worker: Vec<u8>,
}

impl Blob {
    pub(super) fn new(version: Version, direct: bool, to: Address, worker: Vec<u8>) -> Blob {
        Blob { major: version.major as u8, minor: version.minor as u8, direct, to, worker }
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![FORM, self.major, self.minor, self.direct.into()];
        bytes.extend_from_slice(&self.to.slot.to_le_bytes());
        bytes.extend_from_slice(&self.to.secret.to_le_bytes());
        bytes.extend_from_slice(&self.worker);
        bytes
    }

    /// `None`: malformed, or of another form.
    pub fn from_bytes(bytes: &[u8]) -> Option<Blob> {
        let (fixed, worker) = bytes.split_at_checked(FIXED_BYTES)?;
        let plausible = !worker.is_empty() && worker.len() <= ADDRESS_MAX;
        if fixed[0] != FORM || fixed[3] > 1 || !plausible {
            return None;
        }
        let slot = fixed[4..8].try_into().map(u32::from_le_bytes).ok()?;
        let secret = fixed[8..16].try_into().map(u64::from_le_bytes).ok()?;
        let to = Address { slot, secret };
        let direct = fixed[3] == 1;
        Some(Blob { major: fixed[1], minor: fixed[2], direct, to, worker: worker.to_vec() })
    }
}

/// Whether two nodes may try. UCX promises no compatibility between what different minor versions
/// send each other, and cannot be asked: a mixture is refused rather than tried. So is one of
/// features: UCX ends the process that finds it (1.13, `endpoint reconfiguration`).
pub(crate) fn verdict(
    own: Version,
    direct: bool,
    theirs: &[u8],
) -> Result<(), (String, Option<String>)> {
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
    if theirs.direct != direct {
        return Err((
            "puts and gets by UCX itself are allowed on one side only".into(),
            Some("set THALWEG_UCX_DIRECT alike on both sides".into()),
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
        Blob::new(OWN, false, Address { slot: 7, secret: 1 << 60 }, vec![1, 2, 3])
    }

    #[test]
    fn decoding_inverts_encoding() {
        assert_eq!(Blob::from_bytes(&blob().to_bytes()), Some(blob()));
    }

    #[test]
    fn the_same_minor_version_is_wanted() {
        assert_eq!(verdict(OWN, false, &blob().to_bytes()), Ok(()));
        let other = Blob { minor: 22, ..blob() };
        let (reason, fix) = verdict(OWN, false, &other.to_bytes()).expect_err("refused");
        assert!(reason.contains("1.22") && reason.contains("1.13") && fix.is_some(), "{reason}");
    }

    #[test]
    fn features_must_be_alike() {
        let other = Blob { direct: true, ..blob() };
        assert_eq!(Blob::from_bytes(&other.to_bytes()), Some(other.clone()));
        assert_eq!(verdict(OWN, true, &other.to_bytes()), Ok(()));
        assert!(verdict(OWN, false, &other.to_bytes()).is_err());
        assert!(verdict(OWN, true, &blob().to_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some(blob) = Blob::from_bytes(&bytes) {
                prop_assert_eq!(blob.to_bytes(), bytes);
            } else {
                prop_assert!(verdict(OWN, false, &bytes).is_err());
            }
        }
    }
}
