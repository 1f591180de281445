//! Remote keys as they travel, and the one bounds check that every one-sided access passes.
//! Knows neither regions nor whom a key belongs to.

use super::cursor::{Cursor, WireError};

/// The region may be read from afar (`get`).
pub(crate) const ACCESS_READ: u8 = 1;
/// The region may be written from afar (`put`).
pub(crate) const ACCESS_WRITE: u8 = 2;

/// Length of an encoded key, in bytes.
pub(crate) const REMOTE_KEY_BYTES: usize = 40;

const FORMAT: u8 = 1;

/// What another node must know to access a region: 16 bytes of node id, key u64, length u64,
/// format u8 (1), access u8, six zero bytes; little endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RemoteKeyWire {
    /// The node that owns the region.
    pub node_id: [u8; 16],
    /// The region, within that node.
    pub key: u64,
    /// The region's length in bytes.
    pub len: u64,
    /// [`ACCESS_READ`] | [`ACCESS_WRITE`]; at least one of them.
    pub access: u8,
}

impl RemoteKeyWire {
    pub fn to_bytes(self) -> [u8; REMOTE_KEY_BYTES] {
        let mut out = [0; REMOTE_KEY_BYTES];
        out[..16].copy_from_slice(&self.node_id);
        out[16..24].copy_from_slice(&self.key.to_le_bytes());
        out[24..32].copy_from_slice(&self.len.to_le_bytes());
        out[32] = FORMAT;
        out[33] = self.access;
        out
    }

    /// Accepts exactly what `to_bytes` writes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, WireError> {
        let mut c = Cursor::new(bytes, "remote key too short");
        let (node_id, key, len) = (c.array()?, c.u64()?, c.u64()?);
        if c.u8()? != FORMAT {
            return Err(WireError::new("remote key of an unknown format"));
        }
        let access = c.u8()?;
        if access == 0 || access & !(ACCESS_READ | ACCESS_WRITE) != 0 {
            return Err(WireError::new("remote key with unknown access rights"));
        }
        if c.array::<6>()? != [0; 6] {
            return Err(WireError::new("remote key with reserved bytes in use"));
        }
        c.finish("remote key too long")?;
        Ok(RemoteKeyWire { node_id, key, len, access })
    }
}

/// Whether `offset..offset + len` lies within a region of `region_len` bytes. All in bytes; no
/// overflow for any values.
pub(crate) fn check_bounds(offset: u64, len: u64, region_len: u64) -> bool {
    offset.checked_add(len).is_some_and(|end| end <= region_len)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bounds_at_the_edges() {
        assert!(check_bounds(0, 0, 0));
        assert!(check_bounds(8, 0, 8));
        assert!(check_bounds(0, 8, 8));
        assert!(check_bounds(0, u64::MAX, u64::MAX));
        assert!(!check_bounds(9, 0, 8));
        assert!(!check_bounds(1, 8, 8));
        assert!(!check_bounds(u64::MAX, 1, u64::MAX));
        assert!(!check_bounds(1, u64::MAX, u64::MAX));
    }

    #[test]
    fn hostile_keys_are_refused() {
        let good = RemoteKeyWire { node_id: [9; 16], key: 1, len: 2, access: ACCESS_WRITE };
        for (at, byte) in [(32, 0), (32, 2), (33, 0), (33, 4), (33, 0x81), (34, 1), (39, 1)] {
            let mut bytes = good.to_bytes();
            bytes[at] = byte;
            assert!(RemoteKeyWire::from_bytes(&bytes).is_err(), "{at} {byte}");
        }
        let bytes = good.to_bytes();
        assert!(RemoteKeyWire::from_bytes(&bytes[..39]).is_err());
        assert!(RemoteKeyWire::from_bytes(&[&bytes[..], &[0]].concat()).is_err());
    }

    proptest! {
        #[test]
        fn round_trip(node_id: [u8; 16], key: u64, len: u64, access in 1u8..4) {
            let wire = RemoteKeyWire { node_id, key, len, access };
            prop_assert_eq!(RemoteKeyWire::from_bytes(&wire.to_bytes()), Ok(wire));
        }

        #[test]
        fn only_its_own_bytes_are_accepted(
            mut bytes in prop::collection::vec(any::<u8>(), 36..44),
            plausible: bool,
        ) {
            if plausible {
                bytes[32] = FORMAT;
                bytes[33] &= 3;
                bytes[34..].fill(0);
            }
            if let Ok(wire) = RemoteKeyWire::from_bytes(&bytes) {
                prop_assert_eq!(&wire.to_bytes()[..], &bytes[..]);
            }
        }

        #[test]
        fn bounds_agree_with_wide_arithmetic(offset: u64, len: u64, region: u64, shift in 0u32..64) {
            let (offset, len, region) = (offset >> shift, len >> shift, region >> shift);
            let fits = u128::from(offset) + u128::from(len) <= u128::from(region);
            prop_assert_eq!(check_bounds(offset, len, region), fits);
        }
    }
}
