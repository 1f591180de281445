//! The frame header: sixteen bytes, little endian.
//!
//! | bytes | field | meaning |
//! | --- | --- | --- |
//! | 0 | kind | [`FrameKind`] |
//! | 1 | class | the parcel's [`Class`]; 0 for `Pull` and `Refuse` |
//! | 2–3 | head length | bytes of head that follow the header |
//! | 4–7 | id | the offer's number, never 0; 0 where no offer is concerned |
//! | 8–15 | length | of the payload, see below |
//!
//! - `Parcel`: the head and the whole payload (`length` bytes) follow.
//! - `Start`: the head follows, nothing else; `length` bytes of payload come in `Chunk`s with id 0
//!   and the same class.
//! - `Offer`: the head follows, nothing else; `length` bytes of payload come in `Chunk`s with this
//!   id once the receiver has pulled it.
//! - `Chunk`: `length` bytes of payload follow, never 0.
//! - `Pull`, `Refuse`: the receiver's answer to an offer; nothing follows, `length` is 0.
//!
//! A class carries two streams of chunks, one of `Start`s and one of pulled offers. Each has at
//! most one payload under way; the streams of all classes may alternate, chunk by chunk.
//!
//! Pure: no socket, no state.

use crate::link::{Class, HEAD_MAX};

/// Length of a frame header in bytes.
pub(crate) const HEADER_BYTES: usize = 16;

/// What a frame is. The numbers travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum FrameKind {
    Parcel = 1,
    Start = 2,
    Chunk = 3,
    Offer = 4,
    Pull = 5,
    Refuse = 6,
}

/// A frame header that makes sense on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub kind: FrameKind,
    pub class: Class,
    pub head_len: u16,
    pub id: u32,
    pub len: u64,
}

const CLASSES: [Class; Class::COUNT] =
    [Class::Control, Class::Message, Class::Tag, Class::OneSided];

pub(super) const fn class_index(class: Class) -> usize {
    match class {
        Class::Control => 0,
        Class::Message => 1,
        Class::Tag => 2,
        Class::OneSided => 3,
    }
}

impl Frame {
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.kind as u8;
        bytes[1] = class_index(self.class) as u8;
        bytes[2..4].copy_from_slice(&self.head_len.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.id.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }
}

/// Reads a header and checks all that can be checked without knowing what came before. The error
/// says what is wrong with it.
pub(crate) fn decode(bytes: &[u8; HEADER_BYTES], max_payload: u64) -> Result<Frame, &'static str> {
    let [kind, class, h0, h1, i0, i1, i2, i3, len @ ..] = *bytes;
    let kind = match kind {
        1 => FrameKind::Parcel,
        2 => FrameKind::Start,
        3 => FrameKind::Chunk,
        4 => FrameKind::Offer,
        5 => FrameKind::Pull,
        6 => FrameKind::Refuse,
        _ => return Err("unknown frame kind"),
    };
    let class = *CLASSES.get(usize::from(class)).ok_or("unknown class")?;
    let frame = Frame {
        kind,
        class,
        head_len: u16::from_le_bytes([h0, h1]),
        id: u32::from_le_bytes([i0, i1, i2, i3]),
        len: u64::from_le_bytes(len),
    };
    check(&frame, max_payload)?;
    Ok(frame)
}

fn check(frame: &Frame, max_payload: u64) -> Result<(), &'static str> {
    if usize::from(frame.head_len) > HEAD_MAX {
        return Err("head too long");
    }
    if frame.len > max_payload {
        return Err("payload over the limit");
    }
    match frame.kind {
        FrameKind::Parcel | FrameKind::Start if frame.id != 0 => Err("parcel with an offer's id"),
        FrameKind::Start | FrameKind::Chunk if frame.len == 0 => Err("empty stream"),
        FrameKind::Offer | FrameKind::Pull | FrameKind::Refuse if frame.id == 0 => {
            Err("offer without id")
        }
        FrameKind::Chunk | FrameKind::Pull | FrameKind::Refuse if frame.head_len != 0 => {
            Err("head where none belongs")
        }
        FrameKind::Pull | FrameKind::Refuse if frame.len != 0 => Err("answer with a payload"),
        FrameKind::Pull | FrameKind::Refuse if frame.class != Class::Control => {
            Err("answer outside control")
        }
        _ => Ok(()),
    }
}
