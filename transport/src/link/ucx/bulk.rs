//! Long payloads: pulled by the receiver, in chunks, each an active message of its own.
//!
//! UCX has a rendezvous of its own. It is not used, because a receive that it fetches from a peer
//! is not ended when that peer dies (1.13: neither by the error handler nor by closing by force),
//! and then its memory could never be given back. Here only sends are in UCX's hands, and those
//! end; what is landed is copied by this process.

use std::collections::{HashMap, VecDeque};

use thalweg_ffi::ucx::ucp_dt_iov_t;

use super::request::SendOp;
use crate::link::{Class, Landing, OpId, Segment};

/// How much of a payload may be on its way at once, in bytes.
const WINDOW_BYTES: usize = 1 << 20;
/// What the peer may have on its way of all payloads that are being landed, in bytes: what waits
/// here at most, where lanes reorder, until its turn.
const PULLED_BYTES_MAX: usize = 4 * WINDOW_BYTES;
/// What that may come to in an inbox: where pieces of a message are short, so are chunks.
pub(super) const PULLED_INBOX_BYTES: usize = 2 * PULLED_BYTES_MAX;
/// Pieces of memory shorter than this are copied together.
const GATHERED_BELOW: usize = 1024;

/// A payload that the peer may pull.
pub(super) struct Outgoing {
    pub op: OpId,
    pub class: Class,
    /// Whether it may wait for as long as the peer likes.
    pub offer: bool,
    segments: Vec<ucp_dt_iov_t>,
    /// A payload so short that it was copied.
    copied: Vec<u8>,
    pub len: usize,
    /// Where the next chunk begins: the segment, and how far into it.
    at: (usize, usize),
    pub sent: usize,
    pub granted: usize,
    /// Chunks that UCX is at work on.
    pub in_flight: usize,
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
        let mut segments: Vec<_> = pieces
            .map(|piece| ucp_dt_iov_t { buffer: piece.ptr.cast_mut().cast(), length: piece.len })
            .collect();
        let mut copied = Vec::new();
        if len <= copied_max {
            for piece in segments.drain(..) {
                // SAFETY: valid for reads, by the caller's promise.
                unsafe { append(&mut copied, piece.buffer.cast(), piece.length) };
            }
            segments.push(ucp_dt_iov_t { buffer: copied.as_mut_ptr().cast(), length: len });
        }
        Outgoing {
            op,
            class,
            offer,
            segments,
            copied,
            len,
            at: (0, 0),
            sent: 0,
            granted: 0,
            in_flight: 0,
        }
    }

    /// Whether a chunk could be sent.
    pub fn may_send(&self) -> bool {
        self.sent < self.granted
    }

    pub fn is_over(&self) -> bool {
        self.sent == self.len && self.in_flight == 0
    }

    /// Whether it has to leave before the link may end.
    pub fn is_owed(&self) -> bool {
        !self.offer || self.granted > 0
    }

    /// Puts the next chunk behind the header in `into`: named where it lies, or copied together.
    /// Gives its length.
    pub fn next_chunk(&mut self, max: usize, into: &mut SendOp) -> usize {
        debug_assert!(self.copied.is_empty() || self.copied.len() == self.len);
        let max = max.min(self.granted - self.sent);
        let header_len = into.bytes.len();
        let mut len = 0;
        while len < max {
            let Some(segment) = self.segments.get(self.at.0) else { break };
            let left = segment.length - self.at.1;
            let take = left.min(max - len);
            // SAFETY: within the segment.
            let from = unsafe { segment.buffer.cast::<u8>().add(self.at.1) };
            if take >= GATHERED_BELOW || take == max {
                if len > 0 {
                    break;
                }
                into.iov.push(ucp_dt_iov_t { buffer: from.cast(), length: take });
                self.advance(take, left);
                len = take;
                break;
            }
            // SAFETY: valid for reads until the operation is done.
            unsafe { append(&mut into.bytes, from, take) };
            self.advance(take, left);
            len += take;
        }
        if into.iov.is_empty() {
            let buffer = into.bytes[header_len..].as_mut_ptr().cast();
            into.iov.push(ucp_dt_iov_t { buffer, length: len });
        }
        self.sent += len;
        len
    }

    fn advance(&mut self, take: usize, left: usize) {
        if take == left {
            self.at = (self.at.0 + 1, 0);
        } else {
            self.at.1 += take;
        }
    }
}

/// Copies to the end of `bytes`.
///
/// # Safety
///
/// `len` bytes are readable at `from`.
pub(super) unsafe fn append(bytes: &mut Vec<u8>, from: *const u8, len: usize) {
    bytes.reserve(len);
    // SAFETY: room was made; the source is the caller's.
    unsafe {
        std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr().add(bytes.len()), len);
        bytes.set_len(bytes.len() + len);
    }
}

/// What the peer may pull, and what of it can be sent.
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
        // Four thousand million payloads later the first has long been pulled or refused; until
        // then no number is used twice.
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

    /// The peer wants it, up to here. `false`: it may not ask for that.
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

    /// The peer does not want it. `None`: it may not say that.
    pub fn refused(&mut self, id: u32) -> Option<OpId> {
        self.by_id.get(&id).filter(|outgoing| outgoing.granted == 0)?;
        self.remove(id)
    }

    /// The next that a chunk can be sent of.
    pub fn next(&mut self) -> Option<(u32, &mut Outgoing)> {
        let id = self.active.pop_front()?;
        self.by_id.get_mut(&id).map(|outgoing| (id, outgoing))
    }

    /// It has more to send.
    pub fn again(&mut self, id: u32) {
        self.active.push_back(id);
    }

    pub fn has_work(&self) -> bool {
        !self.active.is_empty()
    }

    /// A chunk has left. `Some`: it was the last.
    pub fn chunk_left(&mut self, id: u32) -> Option<OpId> {
        let outgoing = self.by_id.get_mut(&id)?;
        outgoing.in_flight = outgoing.in_flight.saturating_sub(1);
        if outgoing.is_over() { self.remove(id) } else { None }
    }

    pub fn any_owed(&self) -> bool {
        self.by_id.values().any(Outgoing::is_owed)
    }

    /// Forgets those that UCX is not at work on, and names them. `keep`: the others stay.
    pub fn clear_idle(&mut self) -> Vec<OpId> {
        self.active.clear();
        let idle: Vec<u32> = self
            .by_id
            .iter()
            .filter(|(_, outgoing)| outgoing.in_flight == 0)
            .map(|(id, _)| *id)
            .collect();
        idle.into_iter().filter_map(|id| self.remove(id)).collect()
    }
}

/// Payloads that are being landed, by the peer's number.
#[derive(Default)]
pub(super) struct Incomings {
    by_id: HashMap<u32, Incoming>,
    /// Those that could be granted more, in turns.
    wanting: VecDeque<u32>,
    /// Granted to the peer, not here yet.
    pulled_bytes: usize,
    /// Those that have landed, until that is reported.
    landed: Vec<OpId>,
    /// Bytes that have landed since this was last asked for.
    landed_bytes: usize,
}

impl Incomings {
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether the link has something to do.
    pub fn has_news(&self) -> bool {
        !self.landed.is_empty() || self.wants()
    }

    /// Whether the peer may be granted more.
    pub fn wants(&self) -> bool {
        !self.wanting.is_empty() && self.room() >= WINDOW_BYTES / 2
    }

    fn room(&self) -> usize {
        PULLED_BYTES_MAX - self.pulled_bytes
    }

    /// One more. `false`: its number is in use.
    pub fn insert(&mut self, id: u32, incoming: Incoming) -> bool {
        if self.by_id.contains_key(&id) {
            return false;
        }
        self.by_id.insert(id, incoming);
        self.wanting.push_back(id);
        true
    }

    /// Grants the peer more of one of them, as far as there is room for it here: the number, and
    /// how far the peer may send.
    pub fn grant(&mut self) -> Option<(u32, u64)> {
        loop {
            let room = self.room();
            let id = *self.wanting.front()?;
            let Some(incoming) = self.by_id.get_mut(&id) else {
                self.wanting.pop_front();
                continue;
            };
            let more = incoming.grant(room)?;
            let upto = incoming.granted as u64;
            self.pulled_bytes += more;
            self.wanting.pop_front();
            return Some((id, upto));
        }
    }

    /// Takes a chunk to its place. `false`: it was not asked for.
    ///
    /// # Safety
    ///
    /// `len` bytes are readable at `from`.
    pub unsafe fn land(&mut self, id: u32, offset: u64, from: *const u8, len: usize) -> bool {
        let expected = |incoming: &&mut Incoming| incoming.expects(offset, len);
        let Some(incoming) = self.by_id.get_mut(&id).filter(expected) else { return false };
        // SAFETY: the driver keeps landings until they are reported, or have been taken from here
        // by `clear`; the rest is the caller's promise.
        unsafe { incoming.take(from, len) };
        self.pulled_bytes -= len;
        self.landed_bytes += len;
        if incoming.begins_to_want(len) {
            self.wanting.push_back(id);
        }
        if incoming.is_over() {
            self.landed.push(incoming.op);
            self.by_id.remove(&id);
        }
        true
    }

    /// What has landed, and is to be reported.
    pub fn landed(&mut self) -> &mut Vec<OpId> {
        &mut self.landed
    }

    /// How many bytes have landed since this was last asked.
    pub fn take_landed_bytes(&mut self) -> usize {
        std::mem::take(&mut self.landed_bytes)
    }

    /// Ends all of them: nothing is written to a landing after this. What has not landed.
    pub fn clear(&mut self) -> Vec<OpId> {
        self.wanting.clear();
        self.pulled_bytes = 0;
        self.by_id.drain().map(|(_, incoming)| incoming.op).collect()
    }
}

/// A payload that is being landed.
pub(super) struct Incoming {
    pub op: OpId,
    to: Landing,
    at: (usize, usize),
    len: usize,
    got: usize,
    granted: usize,
}

impl Incoming {
    /// `to` has room for exactly `len` bytes.
    pub fn new(op: OpId, to: Landing, len: usize) -> Incoming {
        Incoming { op, to, at: (0, 0), len, got: 0, granted: 0 }
    }

    /// Grants the peer more, of at most `room` bytes. `None`: that is too little to be worth it.
    fn grant(&mut self, room: usize) -> Option<usize> {
        let wanted = (self.len - self.granted).min(WINDOW_BYTES - (self.granted - self.got));
        if room < wanted.min(WINDOW_BYTES / 2) {
            return None;
        }
        let more = wanted.min(room);
        self.granted += more;
        Some(more)
    }

    /// Whether it is the chunk just taken, of this length, after which more should be granted.
    fn begins_to_want(&self, len: usize) -> bool {
        let waits = self.granted - self.got;
        let enough = WINDOW_BYTES / 2;
        self.granted < self.len && waits <= enough && waits + len > enough
    }

    fn is_over(&self) -> bool {
        self.got == self.len
    }

    /// Whether a chunk of this length may come now.
    fn expects(&self, offset: u64, len: usize) -> bool {
        offset == self.got as u64 && len > 0 && len <= self.granted - self.got
    }

    /// Takes a chunk.
    ///
    /// # Safety
    ///
    /// It is expected; `len` bytes are readable at `from`; the landing is alive.
    pub unsafe fn take(&mut self, mut from: *const u8, len: usize) {
        self.got += len;
        let mut left = len;
        while left > 0 {
            let Some(segment) = self.to.get(self.at.0) else { return };
            let room = segment.len - self.at.1;
            let take = room.min(left);
            // SAFETY: within the segment, which the driver keeps; the source is the caller's. It
            // may be shared with the peer, and is only copied.
            unsafe {
                std::ptr::copy_nonoverlapping(from, segment.ptr.add(self.at.1), take);
                from = from.add(take);
            }
            self.at = if take == room { (self.at.0 + 1, 0) } else { (self.at.0, self.at.1 + take) };
            left -= take;
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
            let mut outgoing = unsafe {
                Outgoing::new(OpId::NONE, Class::Message, false, &segments, whole.len(), 128)
            };
            let mut landed = vec![0u8; whole.len()];
            let to = landed
                .chunks_mut(split)
                .map(|part| SegmentMut {
                    ptr: part.as_mut_ptr(), len: part.len(), kind: MemoryKind::Host,
                })
                .collect();
            let mut incoming = Incoming::new(OpId::NONE, to, whole.len());
            while !incoming.is_over() {
                if incoming.granted == incoming.got {
                    prop_assert!(incoming.grant(1 << 20).is_some());
                    outgoing.granted = incoming.granted;
                }
                let mut op = SendOp::new();
                op.bytes.extend_from_slice(b"header");
                let offset = outgoing.sent as u64;
                let len = outgoing.next_chunk(max, &mut op);
                prop_assert!(len > 0 && len <= max);
                prop_assert_eq!(op.iov.len(), 1);
                prop_assert_eq!(op.iov[0].length, len);
                prop_assert!(incoming.expects(offset, len));
                prop_assert!(!incoming.expects(offset + 1, len));
                // SAFETY: `op` and the pieces are alive, and so is `landed`.
                unsafe { incoming.take(op.iov[0].buffer.cast(), len) };
            }
            prop_assert_eq!(outgoing.sent, whole.len());
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
        assert_eq!(outgoings.refused(id), None, "too late to refuse");
        assert_eq!(outgoings.count(Class::Tag), 1);
        assert_eq!(outgoings.clear_idle(), [OpId::NONE]);
        assert_eq!(outgoings.count(Class::Tag), 0);
    }
}
