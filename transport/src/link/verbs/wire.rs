//! The header before each message, and the memory that an offer names.

use crate::link::{Class, HEAD_MAX};

pub(super) const HEADER_BYTES: usize = 24;
/// A message fits one receive buffer of this many bytes.
pub(super) const BUFFER_BYTES: usize = 8192;
/// What fits behind the header.
pub(super) const BODY_MAX: usize = BUFFER_BYTES - HEADER_BYTES;
/// Credit that chunks leave to others.
pub(super) const CHUNKS_LEAVE: u16 = 8;
/// Pieces of memory that an offer may name.
pub(super) const PIECES_MAX: usize = 16;
const PIECE_BYTES: usize = 20;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A parcel with its payload.
    Eager,
    /// A parcel whose payload waits at the sender until it is fetched, and may wait long.
    Offer,
    /// The same, to be fetched at once.
    Bulk,
    /// A piece of a payload that was pulled.
    Chunk,
    /// The receiver wants a payload, up to a number of bytes from its start.
    Pull,
    /// The receiver has read a payload, or does not want it.
    Release,
    /// Returns credit, and says nothing else.
    Credit,
    /// Says that this direction works. The first message.
    Ping,
}

const KINDS: [Kind; 8] = [
    Kind::Eager,
    Kind::Offer,
    Kind::Bulk,
    Kind::Chunk,
    Kind::Pull,
    Kind::Release,
    Kind::Credit,
    Kind::Ping,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub kind: Kind,
    pub class: Class,
    pub head_len: u16,
    /// Buffers that the sender of this has taken messages out of and posted again.
    pub credits: u16,
    /// How many pieces of memory are named behind the head.
    pub pieces: u8,
    /// The payload that it is about, numbered by its sender; 0 for `Eager`.
    pub id: u32,
    /// Length of the payload; for a chunk its offset, for a pull how far it may go.
    pub len: u64,
}

/// Memory of the sender's that may be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub address: u64,
    pub len: u64,
    pub key: u32,
}

fn class_number(class: Class) -> u8 {
    match class {
        Class::Control => 0,
        Class::Message => 1,
        Class::Tag => 2,
        Class::OneSided => 3,
    }
}

impl Header {
    /// One that is only about a payload.
    pub fn about(kind: Kind, id: u32, len: u64) -> Header {
        Header { kind, class: Class::Control, head_len: 0, credits: 0, pieces: 0, id, len }
    }

    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.kind as u8;
        bytes[1] = class_number(self.class);
        bytes[2..4].copy_from_slice(&self.head_len.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.credits.to_le_bytes());
        bytes[6] = self.pieces;
        bytes[8..12].copy_from_slice(&self.id.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    /// `None`: not from this protocol.
    pub fn decode(bytes: &[u8]) -> Option<Header> {
        let bytes: &[u8; HEADER_BYTES] = bytes.first_chunk()?;
        let kind = *KINDS.get(usize::from(bytes[0]))?;
        let class = match bytes[1] {
            0 => Class::Control,
            1 => Class::Message,
            2 => Class::Tag,
            3 => Class::OneSided,
            _ => return None,
        };
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let head_len = half(2);
        let reserved = bytes[7] == 0 && bytes[12..16] == [0; 4];
        if usize::from(head_len) > HEAD_MAX || usize::from(bytes[6]) > PIECES_MAX || !reserved {
            return None;
        }
        let id = bytes[8..12].try_into().map(u32::from_le_bytes).ok()?;
        let len = bytes[16..24].try_into().map(u64::from_le_bytes).ok()?;
        Some(Header { kind, class, head_len, credits: half(4), pieces: bytes[6], id, len })
    }
}

impl Piece {
    pub fn append(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(&self.address.to_le_bytes());
        to.extend_from_slice(&self.len.to_le_bytes());
        to.extend_from_slice(&self.key.to_le_bytes());
    }

    /// Pieces that come to exactly `total` bytes. `None`: these bytes are no such list.
    pub fn decode_all(bytes: &[u8], count: u8, total: u64) -> Option<Vec<Piece>> {
        if bytes.len() != usize::from(count) * PIECE_BYTES {
            return None;
        }
        let mut sum = 0u64;
        let mut pieces = Vec::with_capacity(count.into());
        for bytes in bytes.chunks_exact(PIECE_BYTES) {
            let long = |at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).ok();
            let key = bytes[16..20].try_into().map(u32::from_le_bytes).ok()?;
            let piece = Piece { address: long(0)?, len: long(8)?, key };
            piece.address.checked_add(piece.len)?;
            sum = sum.checked_add(piece.len)?;
            if piece.len == 0 {
                return None;
            }
            pieces.push(piece);
        }
        (pieces.is_empty() || sum == total).then_some(pieces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn decoding_inverts_encoding(
            kind in 0..KINDS.len(), class in 0usize..4, head_len in 0u16..=1024, credits: u16,
            pieces in 0u8..=16, id: u32, len: u64,
        ) {
            let kind = KINDS[kind];
            let class = [Class::Control, Class::Message, Class::Tag, Class::OneSided][class];
            let header = Header { kind, class, head_len, credits, pieces, id, len };
            prop_assert_eq!(Header::decode(&header.encode()), Some(header));
        }

        #[test]
        fn any_bytes_are_decoded_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Some(header) = Header::decode(&bytes) {
                prop_assert_eq!(&header.encode()[..], &bytes[..HEADER_BYTES]);
            }
        }

        #[test]
        fn pieces_come_to_what_the_header_says(
            lens in proptest::collection::vec(1u64..1 << 40, 1..=16), off in 0u64..2,
        ) {
            let mut bytes = Vec::new();
            for (key, len) in lens.iter().enumerate() {
                Piece { address: 1 << 41, len: *len, key: key as u32 }.append(&mut bytes);
            }
            let total = lens.iter().sum::<u64>() + off;
            let decoded = Piece::decode_all(&bytes, lens.len() as u8, total);
            prop_assert_eq!(decoded.is_some(), off == 0);
        }

        #[test]
        fn any_pieces_are_decoded_without_harm(
            bytes in proptest::collection::vec(any::<u8>(), 0..100), count in 0u8..6, total: u64,
        ) {
            if let Some(pieces) = Piece::decode_all(&bytes, count, total) {
                prop_assert!(pieces.iter().all(|piece| piece.len > 0));
            }
        }
    }
}
