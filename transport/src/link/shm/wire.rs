//! What a ring record says: its kinds, and their layout.
//!
//! A record's flags are `kind | how << 4 | head length << 5`, above the ring's own length field.
//! Kinds with a payload carry fixed fields, then descriptors, then the head; `Inline` carries head
//! and payload only, so that a small parcel fits one slot, with the head filled up to whole words,
//! so that a short payload is read as it was written. Numbers are in native byte order: both
//! processes run on one host.

use super::cells::RECORD_MAX;
use super::ring::LEN_BITS;
use crate::link::{HEAD_MAX, How};

/// Payloads up to this size travel in the ring.
pub(super) const INLINE_MAX: usize = 2048;
/// Offers up to this size travel in the ring; whoever holds one has it in memory of its own, which
/// the driver does not charge by length.
pub(super) const OFFER_INLINE_MAX: usize = 64;
/// Loans up to this size travel in the ring as well: handing over a reference costs more.
pub(super) const LOAN_INLINE_MAX: usize = 256;
/// Most loans handed over by reference in one parcel; more are copied once.
pub(super) const LOANS_MAX: usize = 64;
/// Most descriptors of a single copy that fit the record itself; longer lists are read from the
/// sender's memory.
pub(super) const PULLS_MAX: usize = 100;
/// Most pieces that a payload may consist of (16 B of list each).
pub(super) const PIECES_MAX: usize = 1 << 16;
/// Marks a segment number that counts in the staging arena, not in the pool of loans.
pub(super) const ARENA: u32 = 1 << 31;

const FIXED: usize = 24;
const LOAN_LEN: usize = 24;
pub(super) const PULL_LEN: usize = size_of::<Piece>();

const _: () = {
    assert!(filled_up(HEAD_MAX) + INLINE_MAX <= RECORD_MAX);
    assert!(FIXED + LOANS_MAX * LOAN_LEN + HEAD_MAX <= RECORD_MAX);
    assert!(FIXED + PULLS_MAX * PULL_LEN + HEAD_MAX <= RECORD_MAX);
    assert!(5 + usize::BITS - HEAD_MAX.leading_zeros() <= 32 - LEN_BITS);
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// Head and payload.
    Inline = 0,
    /// Payload by reference: `count` loans.
    Loan = 1,
    /// Payload to be read from the sender's memory: `count` pieces, listed here.
    Pull = 2,
    /// The same, with the list in the sender's memory, at the address in the one descriptor.
    PullList = 3,
    /// Payload to be asked for: it comes through the arena.
    Push = 4,
    /// The receiver is finished with a payload.
    Finished = 5,
    /// The receiver asks for a payload, from an offset on, through the arena.
    Ask = 6,
    /// A piece of an asked-for payload lies in the arena.
    Chunk = 7,
    /// The oldest such piece was copied out.
    Taken = 8,
    /// The receiver asks the sender to copy a payload from its end on: `count` is that of the
    /// pieces of its memory, which are listed here, and, above 32 bits, the number of the copy.
    Help = 9,
    /// The sender has stopped; from `len` on the payload is there.
    Helped = 10,
}

impl Kind {
    fn from_bits(bits: u32) -> Option<Kind> {
        Some(match bits & 15 {
            0 => Kind::Inline,
            1 => Kind::Loan,
            2 => Kind::Pull,
            3 => Kind::PullList,
            4 => Kind::Push,
            5 => Kind::Finished,
            6 => Kind::Ask,
            7 => Kind::Chunk,
            8 => Kind::Taken,
            9 => Kind::Help,
            10 => Kind::Helped,
            _ => return None,
        })
    }
}

/// A loan by reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LoanAt {
    pub segment: u32,
    pub offset: u64,
    pub len: u64,
}

/// A piece of the sender's memory. A list of these is itself read from the sender's memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub addr: u64,
    pub len: u64,
}

pub(super) fn flags(kind: Kind, how: How, head_len: usize) -> u32 {
    kind as u32 | u32::from(how == How::Offer) << 4 | (head_len as u32) << 5
}

/// Bytes that a head takes up before a payload in line.
pub(super) const fn filled_up(head_len: usize) -> usize {
    head_len.next_multiple_of(8)
}

/// What the flags say, not yet checked against the record's length.
pub(super) fn parse_flags(flags: u32) -> Option<(Kind, How, usize)> {
    let how = if flags & 16 == 0 { How::Eager } else { How::Offer };
    Some((Kind::from_bits(flags)?, how, (flags >> 5) as usize))
}

/// Builds a record that is not inline, in a buffer that is reused.
pub(super) struct Builder<'b> {
    bytes: &'b mut [u8; RECORD_MAX],
    len: usize,
}

impl<'b> Builder<'b> {
    /// `id`, `len` and `count` are the fixed fields of every record that is not inline.
    pub fn new(bytes: &'b mut [u8; RECORD_MAX], id: u64, len: u64, count: u64) -> Self {
        let mut builder = Builder { bytes, len: 0 };
        builder.number(id);
        builder.number(len);
        builder.number(count);
        builder
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    fn number(&mut self, value: u64) {
        self.put(&value.to_ne_bytes());
    }

    pub fn loan(&mut self, loan: LoanAt) {
        self.number(loan.segment.into());
        self.number(loan.offset);
        self.number(loan.len);
    }

    pub fn piece(&mut self, piece: Piece) {
        self.number(piece.addr);
        self.number(piece.len);
    }

    pub fn finish(mut self, head: &[u8]) -> &'b [u8] {
        self.put(head);
        &self.bytes[..self.len]
    }
}

/// Reads a record that is not inline.
#[derive(Clone, Copy)]
pub(super) struct Reader<'r> {
    rest: &'r [u8],
}

/// The fixed fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fixed {
    pub id: u64,
    pub len: u64,
    pub count: u64,
}

impl<'r> Reader<'r> {
    pub fn new(record: &'r [u8]) -> Self {
        Reader { rest: record }
    }

    fn number(&mut self) -> Option<u64> {
        let (bytes, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(u64::from_ne_bytes(*bytes))
    }

    pub fn fixed(&mut self) -> Option<Fixed> {
        Some(Fixed { id: self.number()?, len: self.number()?, count: self.number()? })
    }

    pub fn loan(&mut self) -> Option<LoanAt> {
        let segment = u32::try_from(self.number()?).ok()?;
        Some(LoanAt { segment, offset: self.number()?, len: self.number()? })
    }

    pub fn piece(&mut self) -> Option<Piece> {
        Some(Piece { addr: self.number()?, len: self.number()? })
    }

    /// The rest, which must have exactly this length.
    pub fn head(self, len: usize) -> Option<&'r [u8]> {
        (len <= HEAD_MAX && self.rest.len() == len).then_some(self.rest)
    }
}
