//! The header before each message, and the memory that an offer names.

use super::blob::RAILS_MAX;
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
/// And behind each, for each further rail.
const KEY_BYTES: usize = 4;
/// What a set of further rails may contain.
const RAIL_BITS: u8 = ((1 << RAILS_MAX) - 1) & !1;

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
    /// Says which further pairs of ports work, where both sides have such. The second message.
    Rails,
}

const KINDS: [Kind; 9] = [
    Kind::Eager,
    Kind::Offer,
    Kind::Bulk,
    Kind::Chunk,
    Kind::Pull,
    Kind::Release,
    Kind::Credit,
    Kind::Ping,
    Kind::Rails,
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
    /// By which further rails these may be read, a bit each: the second rail is bit 1. Bit 0 is the
    /// first rail's, by which all may be, and is not said.
    pub rails: u8,
    /// The sender of this had to wait for credit since it said something last.
    pub waited: bool,
    /// The payload that it is about, numbered by its sender; 0 for `Eager`.
    pub id: u32,
    /// Length of the payload; for a chunk its offset, for a pull how far it may go; for `Rails` which
    /// work, a bit each.
    pub len: u64,
}

/// Memory of the sender's that may be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub address: u64,
    pub len: u64,
    /// By rail, as far as it may be read by that one.
    pub keys: [u32; RAILS_MAX],
}

/// The rails of a set, without the first.
fn further(rails: u8) -> impl Iterator<Item = usize> {
    (1..RAILS_MAX).filter(move |rail| rails & 1 << rail != 0)
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
        Header {
            kind,
            class: Class::Control,
            head_len: 0,
            credits: 0,
            pieces: 0,
            rails: 0,
            waited: false,
            id,
            len,
        }
    }

    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.kind as u8;
        bytes[1] = class_number(self.class);
        bytes[2..4].copy_from_slice(&self.head_len.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.credits.to_le_bytes());
        (bytes[6], bytes[7]) = (self.pieces, self.rails);
        bytes[8..12].copy_from_slice(&self.id.to_le_bytes());
        bytes[12] = self.waited.into();
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
        let (pieces, rails) = (bytes[6], bytes[7]);
        let waited = bytes[12] == 1;
        let reserved = rails & !RAIL_BITS == 0 && bytes[12] <= 1 && bytes[13..16] == [0; 3];
        if usize::from(head_len) > HEAD_MAX || usize::from(pieces) > PIECES_MAX || !reserved {
            return None;
        }
        let id = bytes[8..12].try_into().map(u32::from_le_bytes).ok()?;
        let len = bytes[16..24].try_into().map(u64::from_le_bytes).ok()?;
        Some(Header { kind, class, head_len, credits: half(4), pieces, rails, waited, id, len })
    }
}

impl Piece {
    /// With its keys for these rails.
    pub fn append(&self, rails: u8, to: &mut Vec<u8>) {
        to.extend_from_slice(&self.address.to_le_bytes());
        to.extend_from_slice(&self.len.to_le_bytes());
        to.extend_from_slice(&self.keys[0].to_le_bytes());
        further(rails).for_each(|rail| to.extend_from_slice(&self.keys[rail].to_le_bytes()));
    }

    /// Pieces that come to exactly `total` bytes. `None`: these bytes are no such list.
    pub fn decode_all(bytes: &[u8], count: u8, rails: u8, total: u64) -> Option<Vec<Piece>> {
        let each = PIECE_BYTES + further(rails).count() * KEY_BYTES;
        if bytes.len() != usize::from(count) * each {
            return None;
        }
        let mut sum = 0u64;
        let mut pieces = Vec::with_capacity(count.into());
        for bytes in bytes.chunks_exact(each) {
            let long = |at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).ok();
            let key = |at: usize| bytes[at..at + KEY_BYTES].try_into().map(u32::from_le_bytes).ok();
            let mut keys = [0; RAILS_MAX];
            keys[0] = key(16)?;
            for (place, rail) in further(rails).enumerate() {
                keys[rail] = key(PIECE_BYTES + place * KEY_BYTES)?;
            }
            let piece = Piece { address: long(0)?, len: long(8)?, keys };
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
            pieces in 0u8..=16, rails in 0u8..8, waited: bool, id: u32, len: u64,
        ) {
            let kind = KINDS[kind];
            let class = [Class::Control, Class::Message, Class::Tag, Class::OneSided][class];
            let rails = rails << 1;
            let header = Header { kind, class, head_len, credits, pieces, rails, waited, id, len };
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
            rails in 0u8..8, other in 0u8..8,
        ) {
            let (rails, other) = (rails << 1, other << 1);
            let mut bytes = Vec::new();
            let piece = |(key, len): (usize, &u64)| {
                let key_of = |rail: usize| if rail == 0 || rails & 1 << rail != 0 { key + rail } else { 0 };
                let keys = std::array::from_fn(|rail| key_of(rail) as u32);
                Piece { address: 1 << 41, len: *len, keys }
            };
            let pieces: Vec<_> = lens.iter().enumerate().map(piece).collect();
            pieces.iter().for_each(|piece| piece.append(rails, &mut bytes));
            let total = lens.iter().sum::<u64>() + off;
            let decoded = Piece::decode_all(&bytes, lens.len() as u8, rails, total);
            prop_assert_eq!(decoded, Some(pieces).filter(|_| off == 0));
            if rails.count_ones() != other.count_ones() {
                prop_assert_eq!(Piece::decode_all(&bytes, lens.len() as u8, other, total), None);
            }
        }

        #[test]
        fn any_pieces_are_decoded_without_harm(
            bytes in proptest::collection::vec(any::<u8>(), 0..100), count in 0u8..6, total: u64,
            rails: u8,
        ) {
            if let Some(pieces) = Piece::decode_all(&bytes, count, rails, total) {
                prop_assert!(pieces.iter().all(|piece| piece.len > 0));
            }
        }
    }
}
