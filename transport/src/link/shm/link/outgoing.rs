//! What this side sends: posting, staging, and what the peer says about what was posted.
//!
//! A payload that does not fit the ring stays in the table until the peer is finished with it, and
//! with it whatever keeps its memory.

use smallvec::SmallVec;

use super::super::cells::{RECORD_MAX, RESERVE};
use super::super::copy::{self, Cursor};
use super::super::ring::{SHORT_MAX, load_word};
use super::super::wire::{
    ARENA, Builder, Fixed, Kind, LOANS_MAX, LoanAt, PIECES_MAX, PULL_LEN, PULLS_MAX, Piece,
    filled_up, flags,
};
use super::{CHUNK_BYTES, CHUNKS_MAX, INCOMING_MAX, OUTGOING_MAX, ShmLink, protocol};
use crate::error::{ErrorKind, LinkError};
use crate::link::{Budget, COPIED_MAX, Class, How, Link, LinkKind, OpId, Post, Segment, Sink};
use crate::memory::SharedBlock;

/// From this size on, messages that the peer copies wait for each other.
pub(in super::super) const BULK_MIN_BYTES: u64 = 1 << 20;
/// How many of them may be open at once. The peer gives each a destination when it is offered, and
/// the more of those it fills by turns, the more often they have left its caches: a bare
/// `process_vm_readv` of 8 MiB makes 10.2 GB/s into one destination, 9.7 into two by turns, 6.7
/// into five. Messages arrive in order, so one that waits here loses nothing: with two open,
/// 16 in flight run at 8.5 GB/s instead of 5.3.
pub(in super::super) const BULK_OPEN_MAX: usize = 2;

/// A payload of ours that the peer is not finished with.
pub(super) struct Outgoing {
    pub(super) op: OpId,
    class: Class,
    pub(super) len: u64,
    /// Where it lies in our memory; for loans by reference, empty.
    pub(super) pieces: SmallVec<[Piece; 4]>,
    /// The payload itself, if it is one that `post` promises to copy, and not in the ring.
    copied: Box<[u8]>,
    push: Option<Push>,
    /// A large message that the peer copies.
    bulk: bool,
    /// This side was asked to copy it as well.
    pub(super) helped: bool,
}

impl Outgoing {
    /// Whether it lies in memory that the peer reads.
    pub(super) fn is_read_by_peer(&self) -> bool {
        !self.pieces.is_empty() && self.push.is_none()
    }
}

/// A payload on its way through the arena.
struct Push {
    /// The receiver's key.
    handle: u64,
    from: Cursor,
    left: u64,
    /// Chunks not yet taken.
    open: u32,
}

impl ShmLink {
    /// Pushes a record of a class that may be told to wait.
    fn push_parcel<'a>(
        &mut self,
        class: Class,
        flags: u32,
        len: usize,
        parts: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Result<bool, LinkError> {
        if class == Class::Control {
            self.push_control(flags, len, parts)?;
        } else {
            if !self.backlog.is_empty() {
                return Ok(false);
            }
            if !self.ring.push_or_want(flags, len, RESERVE, parts)? {
                self.attention = true;
                return Ok(false);
            }
        }
        self.counters.parcels_sent += 1;
        Ok(true)
    }

    fn stalled(&mut self) -> Post {
        self.counters.stalls += 1;
        Post::Full
    }

    /// Pushes a parcel that fits one slot with a head of one word, which most do, if there is nothing
    /// in its way. `None`: there may be.
    #[inline]
    pub(super) fn post_short(
        &mut self,
        class: Class,
        how: How,
        head: &[u8],
        payload: &[Segment<'_>],
    ) -> Option<Result<Post, LinkError>> {
        let [payload] = payload else { return None };
        let fits = payload.len <= SHORT_MAX
            && payload.len as u64 <= self.max_payload
            && filled_up(head.len()) == 8
            && payload.kind.cpu_accessible();
        if !fits || class == Class::Control || self.dead.is_some() || !self.backlog.is_empty() {
            return None;
        }
        let flags = flags(Kind::Inline, how, head.len());
        match self.ring.push_short(flags, load_word(head), bytes_of(payload), RESERVE) {
            Ok(true) => {
                self.counters.parcels_sent += 1;
                self.counters.inline_bytes_sent += payload.len as u64;
                Some(Ok(Post::Done))
            }
            Ok(false) => None,
            Err(corrupt) => Some(Err(corrupt.into())),
        }
    }

    pub(super) fn post_inline(
        &mut self,
        class: Class,
        how: How,
        head: &[u8],
        payload: &[Segment<'_>],
        len: usize,
    ) -> Result<Post, LinkError> {
        let before = filled_up(head.len());
        let heads = [head, &[0; 8][..before - head.len()]];
        let parts = heads.into_iter().chain(payload.iter().map(bytes_of));
        let flags = flags(Kind::Inline, how, head.len());
        if !self.push_parcel(class, flags, before + len, parts)? {
            return Ok(self.stalled());
        }
        self.counters.inline_bytes_sent += len as u64;
        Ok(Post::Done)
    }

    /// Whether every piece is a loan that can go by reference.
    fn by_reference(&mut self, payload: &[Segment<'_>]) -> bool {
        let count = payload.iter().filter(|segment| segment.len > 0).count();
        self.loans
            && count == payload.len()
            && count <= LOANS_MAX
            && payload.iter().all(|segment| match segment.shared {
                // Passing fails when descriptors run out: then the loan is read like any memory.
                Some(block) => self.pass_segment(block, false).is_ok(),
                None => false,
            })
    }

    pub(super) fn post_open(
        &mut self,
        op: OpId,
        class: Class,
        how: How,
        head: &[u8],
        payload: &[Segment<'_>],
        len: u64,
    ) -> Result<Post, LinkError> {
        if class != Class::Control && self.outgoing_by_class[class as usize] >= OUTGOING_MAX {
            return Ok(self.stalled());
        }
        if self.outgoing.len() >= INCOMING_MAX {
            return Err(LinkError::new(
                ErrorKind::LimitExceeded,
                LinkKind::Shm,
                "too many control payloads open",
            ));
        }
        // What can be refused is refused before anything is built: of a message in thousands of
        // pieces that takes a while, and it may be tried often.
        if class != Class::Control && !self.has_room() {
            return Ok(self.stalled());
        }
        // What is copied here may be changed at once: no part of it may go by reference.
        let by_reference = len > COPIED_MAX as u64 && self.by_reference(payload);
        let bulk = class == Class::Message && len >= BULK_MIN_BYTES && !by_reference;
        if bulk && self.bulk_open >= BULK_OPEN_MAX {
            return Ok(self.stalled());
        }
        let mut outgoing = Outgoing {
            op,
            class,
            len,
            pieces: SmallVec::new(),
            copied: Box::default(),
            push: None,
            bulk,
            helped: false,
        };
        let kind = if by_reference {
            Kind::Loan
        } else {
            if len <= COPIED_MAX as u64 {
                outgoing.copied = gather(payload);
                outgoing.pieces.push(piece_of(outgoing.copied.as_ptr(), outgoing.copied.len()));
            } else {
                let pieces = payload.iter().filter(|segment| segment.len > 0);
                outgoing.pieces.extend(pieces.map(|from| piece_of(from.ptr, from.len)));
            }
            match outgoing.pieces.len() {
                0..=PULLS_MAX if self.peer_may_pull => Kind::Pull,
                0..=PIECES_MAX if self.peer_may_pull => Kind::PullList,
                _ => Kind::Push,
            }
        };
        let mut building = self.building.take().unwrap_or_else(|| Box::new([0; RECORD_MAX]));
        let key = self.outgoing.next_key();
        let record = build(&mut building, key, &outgoing, kind, payload, head);
        let flags = flags(kind, how, head.len());
        let pushed = self.push_parcel(class, flags, record.len(), [record].into_iter());
        self.building = Some(building);
        if !pushed? {
            return Ok(self.stalled());
        }
        if kind == Kind::Loan {
            self.counters.loaned_bytes_sent += len;
        }
        self.outgoing_by_class[class as usize] += 1;
        self.bulk_open += usize::from(bulk);
        self.outgoing.insert(outgoing);
        Ok(Post::Pending)
    }

    fn complete(&mut self, key: u64, sink: &mut dyn Sink) {
        if let Some(outgoing) = self.outgoing.remove(key) {
            self.outgoing_by_class[outgoing.class as usize] -= 1;
            self.bulk_open -= usize::from(outgoing.bulk);
            sink.done(outgoing.op, Ok(()));
        }
    }

    pub(super) fn take_finished(&mut self, key: u64, sink: &mut dyn Sink) -> Result<(), LinkError> {
        let Some(outgoing) = self.outgoing.get_mut(key) else {
            return Err(protocol("the end of a payload that is not open"));
        };
        if outgoing.push.is_some() {
            return Err(protocol("the end of a payload that is being staged"));
        }
        self.forget_help(key);
        self.complete(key, sink);
        Ok(())
    }

    pub(super) fn take_ask(&mut self, fixed: Fixed) -> Result<(), LinkError> {
        let Some(outgoing) = self.outgoing.get_mut(fixed.id) else {
            return Err(protocol("a payload asked for that is not open"));
        };
        let from = fixed.len;
        if outgoing.push.is_some() || outgoing.pieces.is_empty() || from >= outgoing.len {
            return Err(protocol("a payload asked for that cannot be staged"));
        }
        let mut cursor = Cursor::default();
        let pieces = &outgoing.pieces;
        let skip = usize::try_from(from).map_err(|_| protocol("an offset over the limit"))?;
        copy::advance(&mut cursor, skip, |at| pieces.get(at).map(|piece| piece.len as usize));
        outgoing.push =
            Some(Push { handle: fixed.count, from: cursor, left: outgoing.len - from, open: 0 });
        self.pushing.push_back(fixed.id);
        self.forget_help(fixed.id);
        self.attention = true;
        Ok(())
    }

    pub(super) fn take_taken(&mut self, sink: &mut dyn Sink) -> Result<(), LinkError> {
        let Some((block, key)) = self.chunks.pop_front() else {
            return Err(protocol("a chunk taken that was not sent"));
        };
        self.arena.give_back(block);
        self.attention = true;
        let Some(push) = self.outgoing.get_mut(key).and_then(|open| open.push.as_mut()) else {
            return Ok(());
        };
        push.open -= 1;
        if push.open == 0 && push.left == 0 {
            self.complete(key, sink);
        }
        Ok(())
    }

    /// Stages chunks of what was asked for, in turns, within the budget.
    pub(super) fn push_turns(&mut self, budget: &mut Budget) -> Result<bool, LinkError> {
        let mut moved = false;
        self.arena_empty = false;
        while budget.bytes > 0 && self.chunks.len() < CHUNKS_MAX {
            let Some(key) = self.pushing.pop_front() else {
                break;
            };
            let Some(push) = self.outgoing.get_mut(key).and_then(|open| open.push.as_mut()) else {
                continue;
            };
            let take = push.left.min(CHUNK_BYTES as u64) as usize;
            let Ok(mut chunk) = self.arena.pool.loan(take) else {
                self.pushing.push_front(key);
                self.arena_empty = true;
                break;
            };
            self.fill_chunk(key, &mut chunk);
            let block = chunk.into_block();
            if let Err(error) = self.pass_segment(&block, true) {
                self.arena.give_back(block);
                let doing = "passing a segment of the staging arena";
                return Err(LinkError::io(LinkKind::Shm, doing, &error));
            }
            self.push_chunk(key, block)?;
            budget.bytes = budget.bytes.saturating_sub(take);
            moved = true;
        }
        Ok(moved)
    }

    /// Gathers the next bytes of a payload.
    fn fill_chunk(&mut self, key: u64, chunk: &mut [u8]) {
        let Some(outgoing) = self.outgoing.get_mut(key) else {
            return;
        };
        let Some(push) = &mut outgoing.push else {
            return;
        };
        let mut filled = 0;
        while filled < chunk.len() {
            let Some(piece) = outgoing.pieces.get(push.from.index()) else {
                break;
            };
            let offset = push.from.offset();
            let take = (piece.len as usize - offset).min(chunk.len() - filled);
            let from = std::ptr::with_exposed_provenance::<u8>(piece.addr as usize + offset);
            // SAFETY: the piece is a segment whose poster keeps it readable until done, which is
            // not before the last chunk was taken; the destination has `take` bytes left.
            unsafe { std::ptr::copy_nonoverlapping(from, chunk[filled..].as_mut_ptr(), take) };
            filled += take;
            let pieces = &outgoing.pieces;
            copy::advance(&mut push.from, take, |at| pieces.get(at).map(|p| p.len as usize));
        }
    }

    fn push_chunk(&mut self, key: u64, block: SharedBlock) -> Result<(), LinkError> {
        let len = block.len() as u64;
        let Some(push) = self.outgoing.get_mut(key).and_then(|open| open.push.as_mut()) else {
            return Ok(());
        };
        push.left -= len;
        push.open += 1;
        let (handle, more) = (push.handle, push.left > 0);
        let at = LoanAt { segment: block.segment() | ARENA, offset: block.offset(), len };
        let mut bytes = [0; RECORD_MAX];
        let mut builder = Builder::new(&mut bytes, handle, len, 1);
        builder.loan(at);
        let record = builder.finish(&[]);
        self.chunks.push_back((block, key));
        if more {
            self.pushing.push_back(key);
        }
        self.counters.arena_bytes_sent += len;
        let flags = flags(Kind::Chunk, How::Eager, 0);
        self.push_control(flags, record.len(), [record].into_iter())
    }
}

/// The bytes of a segment given to `post`, which must not outlive that call.
fn bytes_of<'s>(segment: &'s Segment<'_>) -> &'s [u8] {
    if segment.len == 0 {
        return &[];
    }
    // SAFETY: the caller of `post` keeps the segment readable until done, and nothing writes it
    // meanwhile.
    unsafe { std::slice::from_raw_parts(segment.ptr, segment.len) }
}

fn gather(payload: &[Segment<'_>]) -> Box<[u8]> {
    let mut bytes = Vec::with_capacity(COPIED_MAX);
    payload.iter().for_each(|segment| bytes.extend_from_slice(bytes_of(segment)));
    bytes.into()
}

fn piece_of(ptr: *const u8, len: usize) -> Piece {
    Piece { addr: ptr.expose_provenance() as u64, len: len as u64 }
}

/// Puts a record with a payload together. The list of a long payload stays in `outgoing`, whose
/// heap memory does not move with it.
fn build<'b>(
    building: &'b mut [u8; RECORD_MAX],
    key: u64,
    outgoing: &Outgoing,
    kind: Kind,
    payload: &[Segment<'_>],
    head: &[u8],
) -> &'b [u8] {
    let count = match kind {
        Kind::Loan => payload.len(),
        _ => outgoing.pieces.len(),
    };
    let mut builder = Builder::new(building, key, outgoing.len, count as u64);
    match kind {
        Kind::Loan => {
            for segment in payload {
                let Some(block) = segment.shared else { continue };
                let into = segment.ptr.addr() - block.as_ptr().addr();
                builder.loan(LoanAt {
                    segment: block.segment(),
                    offset: block.offset() + into as u64,
                    len: segment.len as u64,
                });
            }
        }
        Kind::Pull => outgoing.pieces.iter().for_each(|piece| builder.piece(*piece)),
        Kind::PullList => {
            let list = outgoing.pieces.as_ptr();
            let len = (outgoing.pieces.len() * PULL_LEN) as u64;
            builder.piece(Piece { addr: list.expose_provenance() as u64, len });
        }
        _ => {}
    }
    builder.finish(head)
}
