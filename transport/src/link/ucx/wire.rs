//! The header before each parcel.
//!
//! It lies at the start of an active message's data when everything is packed together, else in
//! the active message's own header, followed by the parcel's head.

use crate::link::{Class, HEAD_MAX};

pub(super) const HEADER_BYTES: usize = 24;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A parcel that the receiver places at once.
    Eager,
    /// A parcel whose payload waits at the sender.
    Offer,
    /// Says that this direction works. Sent once, and not numbered.
    Ping,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub kind: Kind,
    pub class: Class,
    pub head_len: u16,
    /// Numbers the parcels of a link, all classes together: lanes of UCX's may reorder.
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
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = match self.kind {
            Kind::Eager => 1,
            Kind::Offer => 2,
            Kind::Ping => 3,
        };
        bytes[1] = class_number(self.class);
        bytes[2..4].copy_from_slice(&self.head_len.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.seq.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.slot.to_le_bytes());
        // Four bytes of zeros.
        bytes[16..24].copy_from_slice(&self.secret.to_le_bytes());
        bytes
    }

    /// `None`: not from this protocol.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Header> {
        let word = |at: usize| bytes[at..at + 4].try_into().map(u32::from_le_bytes).ok();
        let kind = match bytes[0] {
            1 => Kind::Eager,
            2 => Kind::Offer,
            3 => Kind::Ping,
            _ => return None,
        };
        let class = match bytes[1] {
            0 => Class::Control,
            1 => Class::Message,
            2 => Class::Tag,
            3 => Class::OneSided,
            _ => return None,
        };
        let head_len = u16::from_le_bytes([bytes[2], bytes[3]]);
        if usize::from(head_len) > HEAD_MAX || word(12)? != 0 {
            return None;
        }
        let secret = bytes[16..24].try_into().map(u64::from_le_bytes).ok()?;
        Some(Header { kind, class, head_len, seq: word(4)?, slot: word(8)?, secret })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn decoding_inverts_encoding(
            kind in 0usize..3, class in 0usize..4, head_len in 0u16..=1024, seq: u32, slot: u32,
            secret: u64,
        ) {
            let kind = [Kind::Eager, Kind::Offer, Kind::Ping][kind];
            let class = [Class::Control, Class::Message, Class::Tag, Class::OneSided][class];
            let header = Header { kind, class, head_len, seq, slot, secret };
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
