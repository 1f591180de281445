//! The header before each parcel.
//!
//! It lies at the start of an active message's data when everything is packed together, else in
//! the active message's own header, followed by the parcel's head.

use crate::link::{Class, HEAD_MAX};

pub(super) const HEADER_BYTES: usize = 32;

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
    /// The payload that it is about, numbered by its sender; 0 for `Eager`.
    pub id: u32,
    /// Length of the payload; for a chunk its offset, for a pull how far it may go.
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

fn class_number(class: Class) -> u8 {
    match class {
        Class::Control => 0,
        Class::Message => 1,
        Class::Tag => 2,
        Class::OneSided => 3,
    }
}

impl Header {
    pub fn new(kind: Kind, class: Class, head_len: u16, seq: u32, to: Address) -> Header {
        let Address { slot, secret } = to;
        Header { kind, class, head_len, id: 0, len: 0, seq, slot, secret }
    }

    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.kind as u8;
        bytes[1] = class_number(self.class);
        bytes[2..4].copy_from_slice(&self.head_len.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.seq.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.slot.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.id.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.secret.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    /// `None`: not from this protocol.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Header> {
        let word = |at: usize| bytes[at..at + 4].try_into().map(u32::from_le_bytes).ok();
        let long = |at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        let kind = *KINDS.get(usize::from(bytes[0]))?;
        let class = match bytes[1] {
            0 => Class::Control,
            1 => Class::Message,
            2 => Class::Tag,
            3 => Class::OneSided,
            _ => return None,
        };
        let head_len = u16::from_le_bytes([bytes[2], bytes[3]]);
        if usize::from(head_len) > HEAD_MAX {
            return None;
        }
        let (seq, slot, id) = (word(4)?, word(8)?, word(12)?);
        Some(Header { kind, class, head_len, id, len: long(24)?, seq, slot, secret: long(16)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn decoding_inverts_encoding(
            kind in 0..KINDS.len(), class in 0usize..4, head_len in 0u16..=1024, seq: u32,
            slot: u32, secret: u64, id: u32, len: u64,
        ) {
            let kind = KINDS[kind];
            let class = [Class::Control, Class::Message, Class::Tag, Class::OneSided][class];
            let header = Header { kind, class, head_len, id, len, seq, slot, secret };
            prop_assert_eq!(Header::decode(&header.encode()), Some(header));
        }

        #[test]
        fn any_bytes_are_decoded_without_harm(bytes: [u8; HEADER_BYTES]) {
            if let Some(header) = Header::decode(&bytes) {
                prop_assert_eq!(header.encode(), bytes);
            }
        }
    }
}
