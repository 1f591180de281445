//! What the fuzz entries of all rooms share: operands out of any bytes, and a fingerprint of what
//! was seen.

/// An input: the target it is for, its name within it, and the bytes.
pub type Seed = (&'static str, String, Vec<u8>);

/// Operands, until they end.
pub(crate) struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    pub fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// The next bytes, as many as there are up to `len`.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        head
    }
}

/// Adds bytes to a fingerprint (FNV-1a).
pub(crate) fn mix(way: u64, bytes: &[u8]) -> u64 {
    let step = |way: u64, byte: &u8| (way ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    bytes.iter().chain([&u8::MAX]).fold(way, step)
}
