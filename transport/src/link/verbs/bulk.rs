//! Long payloads, which wait at their sender until the receiver fetches them: by reading the
//! sender's memory, or where one of the two sides has not registered its memory, in chunks that
//! the sender copies into messages.

use std::collections::{HashMap, VecDeque};

use smallvec::SmallVec;

use super::registrations::Held;
use super::wire::Piece;
use crate::link::{Class, Landing, OpId, Segment};

/// How much of a payload may be on its way in chunks, in bytes.
const WINDOW_BYTES: usize = 256 << 10;
/// The longest single read, in bytes.
const READ_BYTES_MAX: usize = 256 << 10;

/// A payload that the peer may fetch.
pub(super) struct Outgoing {
    pub op: OpId,
    pub class: Class,
    /// Whether it may wait for as long as the peer likes.
    offer: bool,
    segments: Vec<(*const u8, usize)>,
    /// A payload so short that it was copied.
    copied: Vec<u8>,
    pub len: usize,
    /// Where the next chunk begins: the segment, and how far into it.
    at: (usize, usize),
    sent: usize,
    granted: usize,
    /// What the peer may read: registered until it lets go.
    held: SmallVec<[Held; 1]>,
}

// SAFETY: the segments are descriptions of memory that the driver's table owns until the operation
// is done; none is tied to a thread.
unsafe impl Send for Outgoing {}

impl Outgoing {
    /// # Safety
    ///
    /// The memory stays valid for reads until the operation is reported done; one of at most
    /// `copied_max` bytes only for this call.
    pub unsafe fn new(
        op: OpId,
        class: Class,
        offer: bool,
        payload: &[Segment<'_>],
        len: usize,
        copied_max: usize,
    ) -> Outgoing {
        let pieces = payload.iter().filter(|piece| piece.len > 0);
        let mut segments: Vec<_> = pieces.map(|piece| (piece.ptr, piece.len)).collect();
        let mut copied = Vec::new();
        if len <= copied_max {
            for (ptr, len) in segments.drain(..) {
                // SAFETY: valid for reads, by the caller's promise.
                copied.extend_from_slice(unsafe { std::slice::from_raw_parts(ptr, len) });
            }
            segments.push((copied.as_ptr(), len));
        }
        let held = SmallVec::new();
        Outgoing { op, class, offer, segments, copied, len, at: (0, 0), sent: 0, granted: 0, held }
    }

    /// The pieces of memory that it lies in. They are its own copy if it is short.
    pub fn segments(&self) -> &[(*const u8, usize)] {
        &self.segments
    }

    /// Keeps what the peer may read registered.
    pub fn hold(&mut self, held: SmallVec<[Held; 1]>) {
        self.held = held;
    }

    fn may_send(&self) -> bool {
        self.sent < self.granted
    }

    /// Where the next chunk begins.
    pub fn offset(&self) -> usize {
        self.sent
    }

    /// How long the next chunk is, if it may have `max` bytes.
    pub fn next_len(&self, max: usize) -> usize {
        max.min(self.granted - self.sent)
    }

    /// Copies the next chunk, of at most `max` bytes.
    ///
    /// # Safety
    ///
    /// `to` has room for [`Outgoing::next_len`] of it.
    pub unsafe fn next_chunk(&mut self, max: usize, to: *mut u8) {
        debug_assert!(self.copied.is_empty() || self.copied.len() == self.len);
        let max = self.next_len(max);
        let mut len = 0;
        while len < max {
            let Some(&(ptr, segment)) = self.segments.get(self.at.0) else { break };
            let left = segment - self.at.1;
            let take = left.min(max - len);
            // SAFETY: within the segment, which is valid until the operation is done; the room is
            // the caller's.
            unsafe { std::ptr::copy_nonoverlapping(ptr.add(self.at.1), to.add(len), take) };
            self.at = if take == left { (self.at.0 + 1, 0) } else { (self.at.0, self.at.1 + take) };
            len += take;
        }
        self.sent += len;
    }
}

/// What the peer may fetch, and what of it can be sent.
#[derive(Default)]
pub(super) struct Outgoings {
    by_id: HashMap<u32, Outgoing>,
    /// Those with a grant that is not used up, in turns.
    active: VecDeque<u32>,
    next_id: u32,
    by_class: [usize; Class::COUNT],
}

impl Outgoings {
    pub fn count(&self, class: Class) -> usize {
        self.by_class[class as usize]
    }

    /// The number that the next one gets.
    pub fn next_id(&self) -> u32 {
        self.next_id
    }

    pub fn insert(&mut self, outgoing: Outgoing) {
        self.by_class[outgoing.class as usize] += 1;
        self.by_id.insert(self.next_id, outgoing);
        // No number is used twice while the first one waits.
        self.next_id = self.next_id.wrapping_add(1);
        while self.by_id.contains_key(&self.next_id) {
            self.next_id = self.next_id.wrapping_add(1);
        }
    }

    fn remove(&mut self, id: u32) -> Option<OpId> {
        let outgoing = self.by_id.remove(&id)?;
        self.by_class[outgoing.class as usize] -= 1;
        Some(outgoing.op)
    }

    /// The peer wants it in chunks, up to here. `false`: it may not ask for that.
    pub fn pulled(&mut self, id: u32, granted: u64) -> bool {
        let Some(outgoing) = self.by_id.get_mut(&id) else { return false };
        let Ok(granted) = usize::try_from(granted) else { return false };
        if granted <= outgoing.granted || granted > outgoing.len {
            return false;
        }
        if !outgoing.may_send() {
            self.active.push_back(id);
        }
        outgoing.granted = granted;
        true
    }

    /// The peer has read it, or does not want it. `None`: it may not say that.
    pub fn released(&mut self, id: u32) -> Option<OpId> {
        self.by_id.get(&id).filter(|outgoing| outgoing.granted == 0)?;
        self.remove(id)
    }

    pub fn has_work(&self) -> bool {
        !self.active.is_empty()
    }

    /// Lets `send` send a chunk of the next one in turn: it is given the payload's number and the
    /// payload. `Some`: that was the last chunk of an operation.
    pub fn send_next<E>(
        &mut self,
        send: impl FnOnce(u32, &mut Outgoing) -> Result<(), E>,
    ) -> Result<Option<OpId>, E> {
        let Some(id) = self.active.pop_front() else { return Ok(None) };
        let Some(outgoing) = self.by_id.get_mut(&id) else { return Ok(None) };
        send(id, outgoing)?;
        if outgoing.may_send() {
            self.active.push_back(id);
        }
        Ok(if outgoing.sent == outgoing.len { self.remove(id) } else { None })
    }

    /// Whether something has to leave before the link may end.
    pub fn any_owed(&self) -> bool {
        self.by_id.values().any(|outgoing| !outgoing.offer || outgoing.granted > 0)
    }

    /// Forgets all, and names them.
    pub fn clear(&mut self) -> Vec<OpId> {
        self.active.clear();
        self.by_class = [0; Class::COUNT];
        self.by_id.drain().map(|(_, outgoing)| outgoing.op).collect()
    }
}

/// A read to be posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Read {
    pub to: *mut u8,
    pub local_key: u32,
    pub from: u64,
    pub remote_key: u32,
    pub bytes: u32,
}

/// What is to be done next for a payload that is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// This memory is to be registered, or the beginning of it.
    Register {
        ptr: *const u8,
        bytes: usize,
    },
    Read(Read),
    /// Nothing: all is posted, or what was posted has to end first.
    Nothing,
}

/// What the end of a read leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// Everything has come.
    Nothing,
    /// More is to come.
    More,
    /// Memory could not be registered, and no read is under way: all of it is to come in chunks.
    All,
}

/// A part of a segment of the landing that is registered.
struct Slice {
    held: Held,
    segment: usize,
    /// Within the segment.
    end: usize,
    under_way: u32,
}

/// A payload that is being landed by reading the peer's memory.
struct Reading {
    pieces: Vec<Piece>,
    /// The piece that the next read begins in, and how far into it.
    from: (usize, u64),
    /// Those with reads under way, and the one that the next read goes to.
    slices: VecDeque<Slice>,
    /// No more memory can be registered.
    refused: bool,
}

impl Reading {
    /// Lets go of what has been filled.
    fn let_go(&mut self) {
        while self.slices.len() > 1 && self.slices[0].under_way == 0 {
            self.slices.pop_front();
        }
    }
}

/// A payload that is being landed.
pub(super) struct Incoming {
    pub op: OpId,
    to: Landing,
    /// Where the next bytes go: the segment, and how far into it.
    at: (usize, usize),
    len: usize,
    /// What has come in chunks, or what reads have been posted for.
    got: usize,
    granted: usize,
    reading: Option<Reading>,
}

impl Incoming {
    /// `to` has room for exactly `len` bytes.
    pub fn new(op: OpId, mut to: Landing, len: usize) -> Incoming {
        to.retain(|segment| segment.len > 0);
        Incoming { op, to, at: (0, 0), len, got: 0, granted: 0, reading: None }
    }

    /// Where it goes.
    pub fn segments(&self) -> SmallVec<[(*const u8, usize); 2]> {
        self.to.iter().map(|segment| (segment.ptr.cast_const(), segment.len)).collect()
    }

    /// It is to be read: `pieces` come to its length.
    pub fn read_from(&mut self, pieces: Vec<Piece>) {
        let (from, slices) = ((0, 0), VecDeque::new());
        self.reading = Some(Reading { pieces, from, slices, refused: false });
    }

    /// What is to be done next. A read that is named counts as posted.
    pub fn next_read(&mut self) -> Next {
        let (segment_at, offset) = self.at;
        let Some(reading) = self.reading.as_mut().filter(|reading| !reading.refused) else {
            return Next::Nothing;
        };
        let segment = self.to.get(segment_at);
        let (Some(segment), Some(piece)) = (segment, reading.pieces.get(reading.from.0)) else {
            return Next::Nothing;
        };
        // SAFETY: within the segment.
        let to = unsafe { segment.ptr.add(offset) };
        let goes_on = |slice: &&mut Slice| slice.segment == segment_at && slice.end > offset;
        let Some(slice) = reading.slices.back_mut().filter(goes_on) else {
            return Next::Register { ptr: to, bytes: segment.len - offset };
        };
        let there = usize::try_from(piece.len - reading.from.1).unwrap_or(usize::MAX);
        let bytes = there.min(slice.end - offset).min(READ_BYTES_MAX);
        let read = Read {
            to,
            local_key: slice.held.local_key(),
            from: piece.address + reading.from.1,
            remote_key: piece.key,
            bytes: bytes as u32,
        };
        slice.under_way += 1;
        self.at.1 += bytes;
        if self.at.1 == segment.len {
            self.at = (self.at.0 + 1, 0);
        }
        reading.from.1 += bytes as u64;
        if reading.from.1 == piece.len {
            reading.from = (reading.from.0 + 1, 0);
        }
        self.got += bytes;
        Next::Read(read)
    }

    /// What was to be registered is, as far as this.
    pub fn registered(&mut self, held: Held, bytes: usize) {
        let (segment, offset) = self.at;
        if let Some(reading) = &mut self.reading {
            let slice = Slice { held, segment, end: offset + bytes, under_way: 0 };
            reading.slices.push_back(slice);
            reading.let_go();
        }
    }

    /// What was to be registered cannot be.
    pub fn refused(&mut self) -> Left {
        if let Some(reading) = &mut self.reading {
            reading.refused = true;
        }
        self.left()
    }

    /// Whether there is more to be read.
    pub fn wants_reads(&self) -> bool {
        self.reading.as_ref().is_some_and(|reading| !reading.refused) && self.got < self.len
    }

    /// One of the reads has ended, the first that was posted.
    pub fn read_ended(&mut self) -> Left {
        if let Some(reading) = &mut self.reading {
            if let Some(first) = reading.slices.iter_mut().find(|slice| slice.under_way > 0) {
                first.under_way -= 1;
            }
            reading.let_go();
        }
        self.left()
    }

    fn left(&mut self) -> Left {
        let Some(reading) = &self.reading else { return Left::More };
        match reading.slices.iter().any(|slice| slice.under_way > 0) {
            false if self.got == self.len => Left::Nothing,
            false if reading.refused => {
                (self.reading, self.at, self.got) = (None, (0, 0), 0);
                Left::All
            }
            _ => Left::More,
        }
    }

    /// Grants the peer more chunks. `None`: that would be too little to be worth it.
    pub fn grant(&mut self) -> Option<u64> {
        let waits = self.granted - self.got;
        if self.reading.is_some() || self.granted == self.len || waits > WINDOW_BYTES / 2 {
            return None;
        }
        self.granted += (self.len - self.granted).min(WINDOW_BYTES - waits);
        Some(self.granted as u64)
    }

    pub fn is_over(&self) -> bool {
        self.got == self.len
    }

    /// Whether a chunk of this length may come now.
    pub fn expects(&self, offset: u64, len: usize) -> bool {
        let fits = offset == self.got as u64 && len > 0 && len <= self.granted - self.got;
        self.reading.is_none() && fits
    }

    /// Takes a chunk, or a payload that came whole.
    ///
    /// # Safety
    ///
    /// There is room for it; the landing is alive.
    pub unsafe fn take(&mut self, mut from: &[u8]) {
        self.got += from.len();
        while !from.is_empty() {
            let Some(segment) = self.to.get(self.at.0) else { return };
            let room = segment.len - self.at.1;
            let take = room.min(from.len());
            // SAFETY: within the segment, which the driver keeps.
            unsafe {
                std::ptr::copy_nonoverlapping(from.as_ptr(), segment.ptr.add(self.at.1), take);
            }
            from = &from[take..];
            self.at = if take == room { (self.at.0 + 1, 0) } else { (self.at.0, self.at.1 + take) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::SegmentMut;
    use crate::memory::MemoryKind;
    use proptest::prelude::*;

    fn segment(bytes: &[u8]) -> Segment<'_> {
        Segment { ptr: bytes.as_ptr(), len: bytes.len(), kind: MemoryKind::Host, shared: None }
    }

    proptest! {
        #[test]
        fn what_is_sent_in_chunks_lands_whole(
            from in proptest::collection::vec(0usize..3000, 1..12),
            split in 1usize..4000,
            max in 1usize..5000,
        ) {
            let pieces: Vec<Vec<u8>> = from
                .iter()
                .enumerate()
                .map(|(index, len)| (0..*len).map(|at| (at * 7 + index) as u8).collect())
                .collect();
            let whole = pieces.concat();
            prop_assume!(!whole.is_empty());
            let segments: Vec<_> = pieces.iter().map(|piece| segment(piece)).collect();
            // SAFETY: the pieces live to the end of the test.
            let outgoing = unsafe {
                Outgoing::new(OpId::NONE, Class::Message, false, &segments, whole.len(), 128)
            };
            let mut outgoings = Outgoings::default();
            outgoings.insert(outgoing);
            let mut landed = vec![0u8; whole.len()];
            let to = landed
                .chunks_mut(split)
                .map(|part| SegmentMut {
                    ptr: part.as_mut_ptr(), len: part.len(), kind: MemoryKind::Host,
                })
                .collect();
            let mut incoming = Incoming::new(OpId::NONE, to, whole.len());
            let mut chunk = vec![0u8; max];
            while !incoming.is_over() {
                if let Some(granted) = incoming.grant() {
                    prop_assert!(outgoings.pulled(0, granted));
                }
                let mut sent = None;
                let over = outgoings.send_next(|id, outgoing| {
                    assert_eq!(id, 0);
                    sent = Some((outgoing.offset(), outgoing.next_len(max)));
                    // SAFETY: `chunk` has room for `max` bytes.
                    unsafe { outgoing.next_chunk(max, chunk.as_mut_ptr()) };
                    Ok::<(), ()>(())
                });
                let (offset, len) = sent.expect("something was granted");
                prop_assert!(len > 0 && len <= max);
                prop_assert!(incoming.expects(offset as u64, len));
                prop_assert!(!incoming.expects(offset as u64 + 1, len));
                // SAFETY: it was expected, and `landed` is alive.
                unsafe { incoming.take(&chunk[..len]) };
                prop_assert_eq!(over.expect("no error").is_some(), incoming.is_over());
            }
            prop_assert!(!outgoings.any_owed());
            prop_assert_eq!(landed, whole);
        }
    }

    #[test]
    fn a_peer_pulls_only_what_is_there_and_forwards() {
        let mut outgoings = Outgoings::default();
        let bytes = [0u8; 1000];
        // SAFETY: `bytes` lives to the end of the test.
        let outgoing =
            unsafe { Outgoing::new(OpId::NONE, Class::Tag, true, &[segment(&bytes)], 1000, 128) };
        let id = outgoings.next_id();
        outgoings.insert(outgoing);
        assert!(!outgoings.any_owed());
        assert!(!outgoings.pulled(id, 0) && !outgoings.pulled(id, 1001));
        assert!(!outgoings.pulled(id + 1, 10));
        assert!(outgoings.pulled(id, 10));
        assert!(!outgoings.pulled(id, 10), "not twice the same");
        assert!(outgoings.any_owed());
        assert_eq!(outgoings.released(id), None, "too late to let go");
        assert_eq!(outgoings.count(Class::Tag), 1);
        assert_eq!(outgoings.clear(), [OpId::NONE]);
        assert_eq!(outgoings.count(Class::Tag), 0);
    }
}
