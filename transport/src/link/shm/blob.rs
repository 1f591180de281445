//! What a node tells its peers so that they can judge whether shared memory is worth a try, and
//! that judgement. Pure: whether two processes really share a host is proved at set-up.

/// Layout version of the blob and of everything said over the Unix socket and the ring.
pub(super) const VERSION: u16 = 3;
const NAME_MAX: usize = 64;
const FIXED: usize = 2 + 2 + 4 + 16 + 8 + 8;

/// A node's capability for this link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Blob {
    pub(super) version: u16,
    pub(super) uid: u32,
    pub(super) boot_id: [u8; 16],
    pub(super) net_namespace: u64,
    pub(super) pid_namespace: u64,
    /// Name of the abstract Unix socket, without the leading zero.
    pub(super) name: Vec<u8>,
}

impl Blob {
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(FIXED + self.name.len());
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(0u16.to_le_bytes());
        bytes.extend(self.uid.to_le_bytes());
        bytes.extend(self.boot_id);
        bytes.extend(self.net_namespace.to_le_bytes());
        bytes.extend(self.pid_namespace.to_le_bytes());
        bytes.extend(&self.name);
        bytes
    }

    /// `None` if these bytes are no blob.
    pub fn from_bytes(bytes: &[u8]) -> Option<Blob> {
        let (version, rest) = bytes.split_first_chunk::<2>()?;
        let (_, rest) = rest.split_first_chunk::<2>()?;
        let (uid, rest) = rest.split_first_chunk::<4>()?;
        let (boot_id, rest) = rest.split_first_chunk::<16>()?;
        let (net, rest) = rest.split_first_chunk::<8>()?;
        let (pid, name) = rest.split_first_chunk::<8>()?;
        (1..=NAME_MAX).contains(&name.len()).then(|| Blob {
            version: u16::from_le_bytes(*version),
            uid: u32::from_le_bytes(*uid),
            boot_id: *boot_id,
            net_namespace: u64::from_le_bytes(*net),
            pid_namespace: u64::from_le_bytes(*pid),
            name: name.to_vec(),
        })
    }
}

/// Whether a link over shared memory is worth a try, or why not. Both sides come to the same
/// answer.
pub(crate) fn verdict(own: &Blob, peer: &Blob) -> Result<(), String> {
    let reason = if own.version != peer.version {
        format!("different versions of the shared-memory link ({}, {})", own.version, peer.version)
    } else if own.boot_id != peer.boot_id {
        "different host (boot id)".to_string()
    } else if own.net_namespace != peer.net_namespace {
        "different network namespace: abstract sockets do not cross it".to_string()
    } else if own.uid != peer.uid {
        format!("different users (uid {}, {})", own.uid, peer.uid)
    } else if own.pid_namespace != peer.pid_namespace {
        "different process namespace: neither could watch the other".to_string()
    } else {
        return Ok(());
    };
    Err(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob() -> Blob {
        Blob {
            version: VERSION,
            uid: 1000,
            boot_id: [7; 16],
            net_namespace: 1,
            pid_namespace: 2,
            name: b"thalweg-x".to_vec(),
        }
    }

    #[test]
    fn blobs_survive_the_wire() {
        assert_eq!(Blob::from_bytes(&blob().to_bytes()), Some(blob()));
        let bytes = blob().to_bytes();
        for len in 0..=FIXED {
            assert_eq!(Blob::from_bytes(&bytes[..len]), None);
        }
        assert_eq!(Blob::from_bytes(&[0; FIXED + NAME_MAX + 1]), None);
    }

    #[test]
    fn every_difference_has_its_reason() {
        assert_eq!(verdict(&blob(), &blob()), Ok(()));
        type Change = fn(&mut Blob);
        let cases: [(Change, &str); 5] = [
            (|b| b.version -= 1, "versions"),
            (|b| b.boot_id[0] = 0, "different host"),
            (|b| b.net_namespace = 9, "network namespace"),
            (|b| b.uid = 0, "different users"),
            (|b| b.pid_namespace = 9, "process namespace"),
        ];
        for (change, expected) in cases {
            let mut other = blob();
            change(&mut other);
            let reason = verdict(&blob(), &other).expect_err("differs");
            assert!(reason.contains(expected), "{reason}");
            assert!(verdict(&other, &blob()).is_err());
        }
    }
}
