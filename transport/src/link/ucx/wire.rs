//! The header before each parcel.
//!
//! It lies at the start of an active message's data when everything is packed together, else in
//! the active message's own header, followed by the parcel's head.

use crate::link::{Class, HEAD_MAX};

/// The header of a parcel that comes with its payload, and of a ping. With it, the head of a
/// message of one frame and 8 B make 28 B, which is what fits beside UCX's own words in one cache
/// line of its queues in shared memory: bare messages of 28 B take 0.30 µs there, of 32 B 0.37, of
/// 36 B 0.42.
pub(super) const HEADER_BYTES: usize = 15;
/// Where the last eight of them begin.
pub(super) const LAST_WORD: usize = HEADER_BYTES - 8;
/// The header of every other kind.
pub(super) const LONG_HEADER_BYTES: usize = HEADER_BYTES + 12;
/// Slots have three bytes in the header.
pub(super) const SLOTS_MAX: u32 = 1 << 24;
/// Secrets have five.
pub(super) const SECRET_BITS: u32 = 40;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A parcel with its payload.
    Eager,
    /// A parcel whose payload waits at the sender until it is pulled, and may wait long.
    Offer,
    /// The same, to be pulled at once.
    Bulk,
    /// A piece of a payload that was pulled.
    Chunk,
    /// The receiver wants a payload, up to a number of bytes from its start.
    Pull,
    /// The receiver does not want a payload.
    Refuse,
    /// Says that this direction works. Sent once, and not numbered.
    Ping,
}

const KINDS: [Kind; 7] =
    [Kind::Eager, Kind::Offer, Kind::Bulk, Kind::Chunk, Kind::Pull, Kind::Refuse, Kind::Ping];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub kind: Kind,
    pub class: Class,
    pub head_len: u16,
    /// The payload that it is about, numbered by its sender; 0 in a short header.
    pub id: u32,
    /// Length of the payload; for a chunk its offset, for a pull how far it may go; 0 in a short
    /// header.
    pub len: u64,
    /// Numbers the messages of a link, all classes together: lanes of UCX's may reorder.
    pub seq: u32,
    /// The receiver's slot, and the secret that it told this peer only.
    pub slot: u32,
    pub secret: u64,
}

/// Whom a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub slot: u32,
    pub secret: u64,
}

const CLASSES: [Class; Class::COUNT] =
    [Class::Control, Class::Message, Class::Tag, Class::OneSided];

const fn class_number(class: Class) -> u8 {
    match class {
        Class::Control => 0,
        Class::Message => 1,
        Class::Tag => 2,
        Class::OneSided => 3,
    }
}

impl Kind {
    /// Whether number and length of a payload are in the header.
    #[inline]
    pub fn is_long(self) -> bool {
        !matches!(self, Kind::Eager | Kind::Ping)
    }
}

impl Header {
    pub fn new(kind: Kind, class: Class, head_len: u16, seq: u32, to: Address) -> Header {
        let Address { slot, secret } = to;
        Header { kind, class, head_len, id: 0, len: 0, seq, slot, secret }
    }

    /// The first eight bytes, and the last eight of those that every header has: two words that
    /// overlap in one byte.
    #[inline(always)]
    pub fn words(&self) -> (u64, u64) {
        let kind = self.kind as u64 | u64::from(class_number(self.class)) << 4;
        let first = kind | u64::from(self.head_len) << 8 | u64::from(self.seq) << 24;
        (first | u64::from(self.slot) << 56, u64::from(self.slot) | self.secret << 24)
    }

    /// Writes it to the end of `bytes`.
    pub fn append_to(&self, bytes: &mut Vec<u8>) {
        let (first, last) = self.words();
        bytes.extend_from_slice(&first.to_le_bytes()[..LAST_WORD]);
        bytes.extend_from_slice(&last.to_le_bytes());
        if self.kind.is_long() {
            bytes.extend_from_slice(&self.id.to_le_bytes());
            bytes.extend_from_slice(&self.len.to_le_bytes());
        }
    }

    /// Whether this is the first word of a parcel that comes with its payload, and is not control.
    #[inline]
    pub fn begins_eager(first: u64) -> bool {
        first & 15 == Kind::Eager as u64 && first >> 4 & 15 != class_number(Class::Control).into()
    }

    /// The header without what only a long one has, of its first eight bytes and its last eight
    /// (two words that overlap). `None`: not from this protocol.
    #[inline]
    pub fn decode(first: u64, last: u64) -> Option<Header> {
        let kind = *KINDS.get((first & 15) as usize)?;
        let class = *CLASSES.get((first >> 4 & 15) as usize)?;
        let head_len = (first >> 8) as u16;
        if usize::from(head_len) > HEAD_MAX {
            return None;
        }
        let to = Address { slot: last as u32 & (SLOTS_MAX - 1), secret: last >> 24 };
        Some(Header::new(kind, class, head_len, (first >> 24) as u32, to))
    }

    /// Adds what a long one has.
    pub fn decode_rest(&mut self, rest: [u8; LONG_HEADER_BYTES - HEADER_BYTES]) {
        let [a, b, c, d, len @ ..] = rest;
        self.id = u32::from_le_bytes([a, b, c, d]);
        self.len = u64::from_le_bytes(len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode(bytes: &[u8]) -> Option<Header> {
        let (fixed, rest) = bytes.split_at(HEADER_BYTES);
        let word = |at: usize| u64::from_le_bytes(fixed[at..at + 8].try_into().expect("a word"));
        let mut header = Header::decode(word(0), word(LAST_WORD))?;
        if header.kind.is_long() {
            header.decode_rest(rest[..12].try_into().expect("a long header"));
        }
        Some(header)
    }

    proptest! {
        #[test]
        fn decoding_inverts_encoding(
            kind in 0..KINDS.len(), class in 0..CLASSES.len(), head_len in 0u16..=1024, seq: u32,
            slot in 0..SLOTS_MAX, secret in 0..1u64 << SECRET_BITS, id: u32, len: u64,
        ) {
            let (kind, class) = (KINDS[kind], CLASSES[class]);
            let (id, len) = if kind.is_long() { (id, len) } else { (0, 0) };
            let header = Header { kind, class, head_len, id, len, seq, slot, secret };
            let mut bytes = Vec::new();
            header.append_to(&mut bytes);
            let length = if kind.is_long() { LONG_HEADER_BYTES } else { HEADER_BYTES };
            prop_assert_eq!(bytes.len(), length);
            prop_assert_eq!(decode(&bytes), Some(header));
        }

        #[test]
        fn any_bytes_are_decoded_without_harm(bytes: [u8; LONG_HEADER_BYTES]) {
            if let Some(header) = decode(&bytes) {
                let mut again = Vec::new();
                header.append_to(&mut again);
                prop_assert_eq!(&bytes[..again.len()], &again);
            }
        }
    }
}
