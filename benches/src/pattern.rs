//! What warm-up messages contain, so that a byte lost, doubled or misplaced is noticed.

use std::fmt;

use anyhow::Result;

/// What arrived is not what was sent.
#[derive(Debug)]
pub struct Mismatch(String);

impl Mismatch {
    /// With this explanation.
    pub fn new(what: impl Into<String>) -> Self {
        Mismatch(what.into())
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Mismatch {}

/// Which way a message went: the two directions never carry the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the measuring side.
    Out,
    /// Back to it.
    Back,
}

/// Fills `into` with the content of message number `index` going `way`, starting at `offset` bytes
/// into the message. Every byte depends on its own position and on the index.
pub fn fill(into: &mut [u8], offset: usize, index: u64, way: Way) {
    let mut at = offset;
    let mut rest = into;
    while !rest.is_empty() {
        let word = word(at / 8, index, way).to_le_bytes();
        let from = at % 8;
        let len = (8 - from).min(rest.len());
        let (head, tail) = rest.split_at_mut(len);
        head.copy_from_slice(&word[from..from + len]);
        rest = tail;
        at += len;
    }
}

/// Compares what came with what was sent, byte for byte.
pub fn verify(got: &[u8], offset: usize, index: u64, way: Way) -> Result<()> {
    let mut expected = [0u8; 4096];
    for (piece, chunk) in got.chunks(expected.len()).enumerate() {
        let at = offset + piece * expected.len();
        let expected = &mut expected[..chunk.len()];
        fill(expected, at, index, way);
        if chunk != expected {
            let first = chunk.iter().zip(expected.iter()).take_while(|(a, b)| a == b).count();
            return Err(Mismatch::new(format!(
                "warm-up message {index} differs from what was sent at byte {}: got {:#04x}, \
                 expected {:#04x}",
                at + first,
                chunk[first],
                expected[first],
            ))
            .into());
        }
    }
    Ok(())
}

/// The finaliser of SplitMix64 over position, index and direction.
fn word(position: usize, index: u64, way: Way) -> u64 {
    let seed = index.rotate_left(32) ^ (way as u64) << 63;
    let mut z = seed.wrapping_add((position as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_make_the_same_bytes_as_the_whole() {
        let mut whole = vec![0u8; 1000];
        fill(&mut whole, 0, 7, Way::Out);
        let mut pieces = vec![0u8; 1000];
        let (a, rest) = pieces.split_at_mut(13);
        let (b, c) = rest.split_at_mut(500);
        fill(a, 0, 7, Way::Out);
        fill(b, 13, 7, Way::Out);
        fill(c, 513, 7, Way::Out);
        assert_eq!(whole, pieces);
    }

    #[test]
    fn a_wrong_byte_index_or_direction_is_found() {
        let mut message = vec![0u8; 10_000];
        fill(&mut message, 0, 3, Way::Out);
        verify(&message, 0, 3, Way::Out).unwrap();
        assert!(verify(&message, 0, 4, Way::Out).is_err());
        assert!(verify(&message, 0, 3, Way::Back).is_err());
        message[9_999] ^= 1;
        let error = verify(&message, 0, 3, Way::Out).unwrap_err().to_string();
        assert!(error.contains("byte 9999"), "{error}");
    }
}
