//! Heads of parcels: what they say, and how they look on the wire.
//!
//! A head is one kind byte and little-endian fields without padding. The head of a message with
//! one frame, the commonest, has [`ONE_FRAME_HEAD_BYTES`] bytes. Decoding is strict (exact length,
//! no trailing bytes, no unknown values), borrows from the bytes given and never allocates. This
//! module knows nothing of what a head makes its receiver do.
//!
//! | kind | head | fields after the kind byte |
//! | --- | --- | --- |
//! | 1 | message of one frame | seq u32 |
//! | 2 | message without frames | seq u32 |
//! | 3, 4 | message, lengths here | seq u32, two or more lengths (u32 in 3, u64 in 4) |
//! | 5 | message, lengths in tables | seq u32, count u32 |
//! | 6, 7 | table of lengths | seq u32, total u32, first u32, lengths (u32 in 6, u64 in 7) |
//! | 8 | tag | seq u32, tag u64 |
//! | 9 | put | id u32, key u64, offset u64 |
//! | 10 | put done | id u32, status u8 |
//! | 11 | get | id u32, key u64, offset u64, len u64 |
//! | 12 | get reply | id u32, status u8 |
//! | 13 | fence | id u32, messages u32, tags u32 |
//! | 14 | fence done | id u32 |
//! | 15 | credit | messages u64, tags u64 |
//! | 16 | credit wanted | bits u8: 1 messages, 2 tags |
//! | 17 | close | code u32, text (UTF-8, at most [`CLOSE_TEXT_MAX`] bytes) |
//! | 18 | close done | |
//! | 19 | direct access wanted | key u64 |
//! | 20 | direct access granted | key u64, length u64, access u8, the link's bytes (at most [`GRANT_BYTES_MAX`]) |
//! | 21 | direct access refused | key u64 |
//! | 22 | revoke | key u64 |
//! | 23 | revoked | key u64 |
//!
//! Those from 19 on are said where both sides have minor version 1 ([`super::hello::MINOR_DIRECT`]).

use std::fmt;
use std::ops::Deref;

use smallvec::SmallVec;

pub(crate) use super::cursor::WireError;
use super::cursor::{Cursor, clip, text};
use super::keys::{ACCESS_READ, ACCESS_WRITE};

/// The longest head, in bytes; links carry heads of up to this size.
pub(crate) const HEAD_MAX: usize = 1024;

/// Bytes in the head of a message with one frame.
pub(crate) const ONE_FRAME_HEAD_BYTES: usize = 5;

/// The most frame lengths that are sure to fit into one [`Frames::Inline`].
pub(crate) const INLINE_LENS_MAX: usize = (HEAD_MAX - 5) / 8;

/// The most frame lengths that are sure to fit into one [`Head::MessageTable`].
pub(crate) const TABLE_LENS_MAX: usize = (HEAD_MAX - 13) / 8;

/// The longest text in a [`Head::Close`], in bytes; encoding cuts off what is longer.
pub(crate) const CLOSE_TEXT_MAX: usize = 512;

/// The most bytes of a link's own in a [`Head::Granted`].
pub(crate) const GRANT_BYTES_MAX: usize = HEAD_MAX - 18;

mod kind {
    pub const MESSAGE_ONE: u8 = 1;
    pub const MESSAGE_ZERO: u8 = 2;
    pub const MESSAGE_INLINE_NARROW: u8 = 3;
    pub const MESSAGE_INLINE_WIDE: u8 = 4;
    pub const MESSAGE_TABLED: u8 = 5;
    pub const TABLE_NARROW: u8 = 6;
    pub const TABLE_WIDE: u8 = 7;
    pub const TAG: u8 = 8;
    pub const PUT: u8 = 9;
    pub const PUT_DONE: u8 = 10;
    pub const GET: u8 = 11;
    pub const GET_REPLY: u8 = 12;
    pub const FENCE: u8 = 13;
    pub const FENCE_DONE: u8 = 14;
    pub const CREDIT: u8 = 15;
    pub const CREDIT_WANTED: u8 = 16;
    pub const CLOSE: u8 = 17;
    pub const CLOSE_DONE: u8 = 18;
    pub const WANTED: u8 = 19;
    pub const GRANTED: u8 = 20;
    pub const REFUSED: u8 = 21;
    pub const REVOKE: u8 = 22;
    pub const REVOKED: u8 = 23;
}

const WANTED_MESSAGES: u8 = 1;
const WANTED_TAGS: u8 = 2;

/// The head of a parcel.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Head<'a> {
    /// A message; the payload is the frames' bytes in order.
    Message { seq: u32, frames: Frames<'a> },
    /// Lengths of the frames `first..` of message `seq`, which has `total` frames. Sent before its
    /// `Message`, when the lengths do not fit one head. No payload.
    MessageTable { seq: u32, total: u32, first: u32, lens: Lens<'a> },
    /// A tagged buffer; the payload is its bytes.
    Tag { seq: u32, tag: u64 },
    /// Write the payload into the region at this offset.
    Put { id: u32, key: u64, offset: u64 },
    /// How a put ended. No payload.
    PutDone { id: u32, status: Status },
    /// Read `len` bytes of the region at this offset. No payload.
    Get { id: u32, key: u64, offset: u64, len: u64 },
    /// How a get ended; the payload is the bytes read.
    GetReply { id: u32, status: Status },
    /// Answer once all messages and tags numbered below these have been placed, and all puts
    /// before. No payload.
    Fence { id: u32, messages: u32, tags: u32 },
    /// A fence has been reached. No payload.
    FenceDone { id: u32 },
    /// Cumulative bytes consumed by the receiver. No payload.
    Credit { messages: u64, tags: u64 },
    /// The sender waits for credit: send what there is, however little. No payload.
    CreditWanted { messages: bool, tags: bool },
    /// The peer closes, and why. No payload.
    Close { code: u32, text: &'a str },
    /// The answer to a close: nothing more will come. No payload.
    CloseDone,
    /// The sender would reach this region through the link itself. No payload.
    Wanted { key: u64 },
    /// It may: the region has `len` bytes, and these are what the link needs. No payload.
    Granted { key: u64, len: u64, access: u8, bytes: &'a [u8] },
    /// It may not. No payload.
    Refused { key: u64 },
    /// Stop reaching this region through the link, and say when that has ended. No payload.
    Revoke { key: u64 },
    /// What was granted for this region is used no more. No payload.
    Revoked { key: u64 },
}

/// How a message's payload falls into frames.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Frames<'a> {
    /// No frames, no payload.
    Zero,
    /// One frame: it is the payload.
    One,
    /// Two or more frames with these lengths.
    Inline(Lens<'a>),
    /// This many frames, whose lengths came in tables before.
    Table { count: u32 },
}

/// Frame lengths in bytes, either the sender's or still in the bytes of a checked head.
#[derive(Clone)]
pub(crate) struct Lens<'a>(Repr<'a>);

#[derive(Clone)]
enum Repr<'a> {
    Values(&'a [u64]),
    Narrow(&'a [[u8; 4]]),
    Wide(&'a [[u8; 8]]),
}

impl<'a> Lens<'a> {
    /// The lengths to send: at most [`INLINE_LENS_MAX`] or [`TABLE_LENS_MAX`], by where they go.
    pub fn new(values: &'a [u64]) -> Self {
        Lens(Repr::Values(values))
    }

    /// Their sum, unless it is beyond `u64`.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn checked_sum(&self) -> Option<u64> {
        self.clone().try_fold(0u64, u64::checked_add)
    }

    fn is_wide(&self) -> bool {
        match self.0 {
            Repr::Values(values) => values.iter().any(|&len| len > u64::from(u32::MAX)),
            Repr::Narrow(_) => false,
            Repr::Wide(_) => true,
        }
    }

    fn decode_narrow(bytes: &'a [u8]) -> Result<Self, WireError> {
        whole(bytes).map(|lens| Lens(Repr::Narrow(lens)))
    }

    fn decode_wide(bytes: &'a [u8]) -> Result<Self, WireError> {
        whole(bytes).map(|lens| Lens(Repr::Wide(lens)))
    }
}

fn whole<const N: usize>(bytes: &[u8]) -> Result<&[[u8; N]], WireError> {
    match bytes.as_chunks() {
        (lens, []) => Ok(lens),
        _ => Err(WireError::new("frame lengths end in the middle of one")),
    }
}

impl Iterator for Lens<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        match &mut self.0 {
            Repr::Values(values) => values.split_off_first().copied(),
            Repr::Narrow(lens) => lens.split_off_first().map(|&b| u32::from_le_bytes(b).into()),
            Repr::Wide(lens) => lens.split_off_first().map(|&b| u64::from_le_bytes(b)),
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let len = match self.0 {
            Repr::Values(values) => values.len(),
            Repr::Narrow(lens) => lens.len(),
            Repr::Wide(lens) => lens.len(),
        };
        (len, Some(len))
    }
}

impl ExactSizeIterator for Lens<'_> {}

impl PartialEq for Lens<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.clone().eq(other.clone())
    }
}

impl fmt::Debug for Lens<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.clone()).finish()
    }
}

/// How a one-sided operation ended at its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Ok = 0,
    /// No such key, or it was revoked.
    KeyUnknown = 1,
    /// The range does not lie within the region.
    OutOfBounds = 2,
    /// The region may not be used in this way.
    Denied = 3,
    /// The target lacks memory or some other resource.
    Resources = 4,
    Other = 5,
    /// The target is closing.
    Closing = 6,
}

impl Status {
    fn decode(byte: u8) -> Result<Self, WireError> {
        Ok(match byte {
            0 => Status::Ok,
            1 => Status::KeyUnknown,
            2 => Status::OutOfBounds,
            3 => Status::Denied,
            4 => Status::Resources,
            5 => Status::Other,
            6 => Status::Closing,
            _ => return Err(WireError::new("unknown status")),
        })
    }
}

/// An encoded head. Heads of up to 64 bytes need no allocation.
#[derive(Clone, Debug, Default)]
pub(crate) struct HeadBuf(SmallVec<[u8; 64]>);

impl HeadBuf {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    fn kind(&mut self, kind: u8) -> &mut Self {
        self.0.push(kind);
        self
    }

    fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn lens(&mut self, lens: &Lens<'_>) -> &mut Self {
        if lens.is_wide() {
            for len in lens.clone() {
                self.u64(len);
            }
        } else {
            for len in lens.clone() {
                self.u32(len as u32);
            }
        }
        self
    }
}

impl Deref for HeadBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// The head of a message of one frame: the common case. Written as one word, so that whoever
/// copies it need not wait until a processor has put it together of several.
pub(crate) struct OneFrameHead([u8; 8]);

impl OneFrameHead {
    #[inline]
    pub fn new(seq: u32) -> Self {
        OneFrameHead((u64::from(kind::MESSAGE_ONE) | u64::from(seq) << 8).to_le_bytes())
    }

    #[inline]
    pub fn bytes(&self) -> &[u8] {
        &self.0[..ONE_FRAME_HEAD_BYTES]
    }
}

/// The number of a message of one frame, if this is the head of one.
#[inline]
pub(crate) fn one_frame_seq(head: &[u8]) -> Option<u32> {
    match *head {
        [kind::MESSAGE_ONE, a, b, c, d] => Some(u32::from_le_bytes([a, b, c, d])),
        _ => None,
    }
}

impl<'a> Head<'a> {
    /// Writes this head into `out`, in place of what was there.
    ///
    /// Lengths must be within [`INLINE_LENS_MAX`] and [`TABLE_LENS_MAX`], a grant's bytes within
    /// [`GRANT_BYTES_MAX`]. A close's text is cut to [`CLOSE_TEXT_MAX`] bytes.
    pub fn encode(&self, out: &mut HeadBuf) {
        out.0.clear();
        match self {
            Head::Message { seq, frames } => encode_message(out, *seq, frames),
            Head::MessageTable { seq, total, first, lens } => {
                let kind = if lens.is_wide() { kind::TABLE_WIDE } else { kind::TABLE_NARROW };
                out.kind(kind).u32(*seq).u32(*total).u32(*first).lens(lens);
            }
            Head::Tag { seq, tag } => {
                out.kind(kind::TAG).u32(*seq).u64(*tag);
            }
            Head::Put { id, key, offset } => {
                out.kind(kind::PUT).u32(*id).u64(*key).u64(*offset);
            }
            Head::PutDone { id, status } => {
                out.kind(kind::PUT_DONE).u32(*id).u8(*status as u8);
            }
            Head::Get { id, key, offset, len } => {
                out.kind(kind::GET).u32(*id).u64(*key).u64(*offset).u64(*len);
            }
            Head::GetReply { id, status } => {
                out.kind(kind::GET_REPLY).u32(*id).u8(*status as u8);
            }
            Head::Fence { id, messages, tags } => {
                out.kind(kind::FENCE).u32(*id).u32(*messages).u32(*tags);
            }
            Head::FenceDone { id } => {
                out.kind(kind::FENCE_DONE).u32(*id);
            }
            Head::Credit { messages, tags } => {
                out.kind(kind::CREDIT).u64(*messages).u64(*tags);
            }
            Head::CreditWanted { messages, tags } => {
                let messages = if *messages { WANTED_MESSAGES } else { 0 };
                let tags = if *tags { WANTED_TAGS } else { 0 };
                out.kind(kind::CREDIT_WANTED).u8(messages | tags);
            }
            Head::Close { code, text } => {
                out.kind(kind::CLOSE).u32(*code);
                out.0.extend_from_slice(clip(text, CLOSE_TEXT_MAX).as_bytes());
            }
            Head::CloseDone => {
                out.kind(kind::CLOSE_DONE);
            }
            Head::Wanted { key } => {
                out.kind(kind::WANTED).u64(*key);
            }
            Head::Granted { key, len, access, bytes } => {
                out.kind(kind::GRANTED).u64(*key).u64(*len).u8(*access);
                out.0.extend_from_slice(bytes);
            }
            Head::Refused { key } => {
                out.kind(kind::REFUSED).u64(*key);
            }
            Head::Revoke { key } => {
                out.kind(kind::REVOKE).u64(*key);
            }
            Head::Revoked { key } => {
                out.kind(kind::REVOKED).u64(*key);
            }
        }
        debug_assert!(out.len() <= HEAD_MAX, "the caller keeps to the limits on lengths");
    }

    /// Reads a head that a peer wrote. Costs the same for every head: lengths are read when asked
    /// for.
    pub fn decode(bytes: &'a [u8]) -> Result<Head<'a>, WireError> {
        if bytes.len() > HEAD_MAX {
            return Err(WireError::new("head too long"));
        }
        let mut cursor = Cursor::new(bytes, "head too short");
        let head = decode_fields(&mut cursor)?;
        cursor.finish("bytes after the head's last field")?;
        Ok(head)
    }
}

fn encode_message(out: &mut HeadBuf, seq: u32, frames: &Frames<'_>) {
    match frames {
        Frames::Zero => out.kind(kind::MESSAGE_ZERO).u32(seq),
        Frames::One => out.kind(kind::MESSAGE_ONE).u32(seq),
        Frames::Inline(lens) if lens.is_wide() => {
            out.kind(kind::MESSAGE_INLINE_WIDE).u32(seq).lens(lens)
        }
        Frames::Inline(lens) => out.kind(kind::MESSAGE_INLINE_NARROW).u32(seq).lens(lens),
        Frames::Table { count } => out.kind(kind::MESSAGE_TABLED).u32(seq).u32(*count),
    };
}

fn decode_fields<'a>(c: &mut Cursor<'a>) -> Result<Head<'a>, WireError> {
    Ok(match c.u8()? {
        kind::MESSAGE_ONE => Head::Message { seq: c.u32()?, frames: Frames::One },
        kind::MESSAGE_ZERO => Head::Message { seq: c.u32()?, frames: Frames::Zero },
        kind::MESSAGE_INLINE_NARROW => {
            Head::Message { seq: c.u32()?, frames: inline(Lens::decode_narrow(c.rest())?)? }
        }
        kind::MESSAGE_INLINE_WIDE => {
            Head::Message { seq: c.u32()?, frames: inline(Lens::decode_wide(c.rest())?)? }
        }
        kind::MESSAGE_TABLED => Head::Message {
            seq: c.u32()?,
            frames: Frames::Table { count: at_least_two(c.u32()?)? },
        },
        kind::TABLE_NARROW => {
            let (seq, total, first) = (c.u32()?, c.u32()?, c.u32()?);
            table(seq, total, first, Lens::decode_narrow(c.rest())?)?
        }
        kind::TABLE_WIDE => {
            let (seq, total, first) = (c.u32()?, c.u32()?, c.u32()?);
            table(seq, total, first, Lens::decode_wide(c.rest())?)?
        }
        kind::TAG => Head::Tag { seq: c.u32()?, tag: c.u64()? },
        kind::PUT => Head::Put { id: c.u32()?, key: c.u64()?, offset: c.u64()? },
        kind::PUT_DONE => Head::PutDone { id: c.u32()?, status: Status::decode(c.u8()?)? },
        kind::GET => Head::Get { id: c.u32()?, key: c.u64()?, offset: c.u64()?, len: c.u64()? },
        kind::GET_REPLY => Head::GetReply { id: c.u32()?, status: Status::decode(c.u8()?)? },
        kind::FENCE => Head::Fence { id: c.u32()?, messages: c.u32()?, tags: c.u32()? },
        kind::FENCE_DONE => Head::FenceDone { id: c.u32()? },
        kind::CREDIT => Head::Credit { messages: c.u64()?, tags: c.u64()? },
        kind::CREDIT_WANTED => credit_wanted(c.u8()?)?,
        kind::CLOSE => close(c.u32()?, c.rest())?,
        kind::CLOSE_DONE => Head::CloseDone,
        kind::WANTED => Head::Wanted { key: c.u64()? },
        kind::GRANTED => {
            let (key, len, access) = (c.u64()?, c.u64()?, c.u8()?);
            granted(key, len, access, c.rest())?
        }
        kind::REFUSED => Head::Refused { key: c.u64()? },
        kind::REVOKE => Head::Revoke { key: c.u64()? },
        kind::REVOKED => Head::Revoked { key: c.u64()? },
        _ => return Err(WireError::new("unknown kind of head")),
    })
}

fn at_least_two(count: u32) -> Result<u32, WireError> {
    if count < 2 {
        Err(WireError::new("a list of lengths for fewer than two frames"))
    } else {
        Ok(count)
    }
}

fn inline(lens: Lens<'_>) -> Result<Frames<'_>, WireError> {
    at_least_two(lens.len() as u32)?;
    Ok(Frames::Inline(lens))
}

fn table(seq: u32, total: u32, first: u32, lens: Lens<'_>) -> Result<Head<'_>, WireError> {
    at_least_two(total)?;
    if lens.len() == 0 {
        return Err(WireError::new("a table without lengths"));
    }
    let end = u64::from(first) + lens.len() as u64;
    if end > u64::from(total) {
        return Err(WireError::new("a table with more lengths than its message has frames"));
    }
    Ok(Head::MessageTable { seq, total, first, lens })
}

fn credit_wanted(bits: u8) -> Result<Head<'static>, WireError> {
    if bits & !(WANTED_MESSAGES | WANTED_TAGS) != 0 {
        return Err(WireError::new("unknown bits in a wish for credit"));
    }
    let (messages, tags) = (bits & WANTED_MESSAGES != 0, bits & WANTED_TAGS != 0);
    Ok(Head::CreditWanted { messages, tags })
}

fn granted(key: u64, len: u64, access: u8, bytes: &[u8]) -> Result<Head<'_>, WireError> {
    if access == 0 || access & !(ACCESS_READ | ACCESS_WRITE) != 0 {
        return Err(WireError::new("a grant with unknown access rights"));
    }
    // No longer than GRANT_BYTES_MAX: the head as a whole was measured.
    Ok(Head::Granted { key, len, access, bytes })
}

fn close(code: u32, bytes: &[u8]) -> Result<Head<'_>, WireError> {
    if bytes.len() > CLOSE_TEXT_MAX {
        return Err(WireError::new("a close's text is too long"));
    }
    Ok(Head::Close { code, text: text(bytes, "a close's text is not UTF-8")? })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(head: &Head<'_>) -> Vec<u8> {
        let mut out = HeadBuf::new();
        head.encode(&mut out);
        out.to_vec()
    }

    fn round_trip(head: &Head<'_>) {
        let bytes = encoded(head);
        assert!(bytes.len() <= HEAD_MAX);
        assert_eq!(&Head::decode(&bytes).unwrap(), head);
        // Every shorter prefix is either refused or means something else, never the same.
        for cut in 0..bytes.len() {
            assert_ne!(Head::decode(&bytes[..cut]).as_ref(), Ok(head), "cut at {cut}");
        }
    }

    #[test]
    fn one_frame_head_is_small() {
        let bytes = encoded(&Head::Message { seq: 7, frames: Frames::One });
        assert_eq!(bytes, [1, 7, 0, 0, 0]);
        assert_eq!(bytes.len(), ONE_FRAME_HEAD_BYTES);
        assert_eq!(OneFrameHead::new(7).bytes(), bytes);
        assert_eq!(one_frame_seq(OneFrameHead::new(u32::MAX).bytes()), Some(u32::MAX));
    }

    #[test]
    fn fullest_heads_fit() {
        let lens = vec![u64::MAX; INLINE_LENS_MAX];
        round_trip(&Head::Message { seq: 1, frames: Frames::Inline(Lens::new(&lens)) });
        let lens = vec![u64::MAX; TABLE_LENS_MAX];
        let total = u32::MAX;
        let first = total - TABLE_LENS_MAX as u32;
        round_trip(&Head::MessageTable { seq: 1, total, first, lens: Lens::new(&lens) });
        round_trip(&Head::Close { code: 1, text: &"x".repeat(CLOSE_TEXT_MAX) });
        let bytes = &[7; GRANT_BYTES_MAX];
        round_trip(&Head::Granted { key: 1, len: u64::MAX, access: ACCESS_WRITE, bytes });
    }

    #[test]
    fn long_close_text_is_cut_between_characters() {
        let text = "é".repeat(CLOSE_TEXT_MAX);
        let bytes = encoded(&Head::Close { code: 0, text: &format!("x{text}") });
        let Ok(Head::Close { text, .. }) = Head::decode(&bytes) else { panic!("not a close") };
        assert_eq!(text.len(), CLOSE_TEXT_MAX - 1);
    }

    #[test]
    fn hostile_heads_are_refused() {
        let table = |words: &[u32]| {
            let fields = words.iter().flat_map(|word| word.to_le_bytes());
            std::iter::once(kind::TABLE_NARROW).chain(fields).collect::<Vec<_>>()
        };
        assert!(Head::decode(&table(&[0, 3, 2, 9])).is_ok());
        for bytes in [
            &[][..],
            &[0],
            &[255, 1, 2, 3, 4],
            &[1, 0, 0, 0],
            &[1, 0, 0, 0, 0, 0],
            &[3, 0, 0, 0, 0],
            &[3, 0, 0, 0, 0, 9, 9, 9, 9],
            &[3, 0, 0, 0, 0, 9, 9, 9, 9, 9],
            &[5, 0, 0, 0, 0, 1, 0, 0, 0],
            &[10, 0, 0, 0, 0, 7],
            &[16, 4],
            &[17, 0, 0, 0, 0, 0xff],
            &[&[17, 0, 0, 0, 0][..], &[b'x'; CLOSE_TEXT_MAX + 1]].concat(),
            &[18, 0],
            &[19, 0, 0, 0, 0, 0, 0, 0],
            &[20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0],
            &[20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 4, 9],
            &[&[20][..], &[1; HEAD_MAX]].concat(),
            &[22, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[24, 0, 0, 0, 0, 0, 0, 0, 0],
            &table(&[0, 3, 3, 9]),
            &table(&[0, 3, u32::MAX, 9, 9]),
            &table(&[0, 3, 2]),
            &table(&[0, 1, 0, 9]),
            &[3; HEAD_MAX + 1],
        ] {
            assert!(Head::decode(bytes).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn lengths_take_four_bytes_where_they_can() {
        let most = u64::from(u32::MAX);
        for (lens, bytes) in [([0, most], 5 + 2 * 4), ([0, most + 1], 5 + 2 * 8)] {
            let head = Head::Message { seq: 0, frames: Frames::Inline(Lens::new(&lens)) };
            assert_eq!(encoded(&head).len(), bytes);
            round_trip(&head);
        }
    }

    #[test]
    fn sums_of_lengths_do_not_wrap() {
        assert_eq!(Lens::new(&[u64::MAX, 1]).checked_sum(), None);
        assert_eq!(Lens::new(&[u64::MAX, 0]).checked_sum(), Some(u64::MAX));
    }

    fn status() -> impl Strategy<Value = Status> {
        (0u8..7).prop_map(|byte| Status::decode(byte).unwrap())
    }

    proptest! {
        #[test]
        fn fixed_heads_round_trip(
            a: u32, b: u32, c: u32, x: u64, y: u64, z: u64, p: bool, q: bool, status in status(),
            text in "\\PC{0,100}",
        ) {
            round_trip(&Head::Message { seq: a, frames: Frames::Zero });
            round_trip(&Head::Message { seq: a, frames: Frames::One });
            round_trip(&Head::Message { seq: a, frames: Frames::Table { count: b.max(2) } });
            round_trip(&Head::Tag { seq: a, tag: x });
            round_trip(&Head::Put { id: a, key: x, offset: y });
            round_trip(&Head::PutDone { id: a, status });
            round_trip(&Head::Get { id: a, key: x, offset: y, len: z });
            round_trip(&Head::GetReply { id: a, status });
            round_trip(&Head::Fence { id: a, messages: b, tags: c });
            round_trip(&Head::FenceDone { id: a });
            round_trip(&Head::Credit { messages: x, tags: y });
            round_trip(&Head::CreditWanted { messages: p, tags: q });
            round_trip(&Head::Close { code: a, text: &text });
            round_trip(&Head::CloseDone);
            round_trip(&Head::Wanted { key: x });
            round_trip(&Head::Refused { key: x });
            round_trip(&Head::Revoke { key: x });
            round_trip(&Head::Revoked { key: x });
            let access = if p { ACCESS_READ } else { ACCESS_READ | ACCESS_WRITE };
            round_trip(&Head::Granted { key: x, len: y, access, bytes: text.as_bytes() });
        }

        #[test]
        fn lengths_round_trip(
            seq: u32,
            first in 0u32..1000,
            more in 0u32..1000,
            mut lens in prop::collection::vec(any::<u64>(), 2..TABLE_LENS_MAX),
            shift in 0u32..64,
        ) {
            for len in &mut lens {
                *len >>= shift;
            }
            round_trip(&Head::Message { seq, frames: Frames::Inline(Lens::new(&lens)) });
            let total = first + lens.len() as u32 + more;
            round_trip(&Head::MessageTable { seq, total, first, lens: Lens::new(&lens) });
        }

        #[test]
        fn arbitrary_bytes_mean_one_thing_or_nothing(
            kind in 0u8..26,
            rest in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut bytes = vec![kind];
            bytes.extend(rest);
            if let Ok(head) = Head::decode(&bytes) {
                let again = encoded(&head);
                prop_assert_eq!(Head::decode(&again), Ok(head));
            }
        }
    }
}
