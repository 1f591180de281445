//! Long payloads that travel in chunks: how far the receiver lets one come, where the next chunk
//! begins at either end, and whose turn it is. How a chunk travels is not known here.

use std::collections::VecDeque;

use smallvec::SmallVec;

use super::by_id::ById;
use super::{Class, Landing, OpId, Segment};

/// A payload that waits at its sender until the peer asks for it. `T`: what the link knows of it
/// besides.
pub(super) struct Outgoing<T> {
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
    pub besides: T,
}

// SAFETY: the segments are descriptions of memory that the driver's table owns until the operation
// is done; none is tied to a thread.
unsafe impl<T: Send> Send for Outgoing<T> {}

impl<T: Default> Outgoing<T> {
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
    ) -> Self {
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
        let (at, sent, granted, besides) = ((0, 0), 0, 0, T::default());
        Outgoing { op, class, offer, segments, copied, len, at, sent, granted, besides }
    }
}

impl<T> Outgoing<T> {
    /// The pieces of memory that it lies in. They are its own copy if it is short.
    pub fn segments(&self) -> &[(*const u8, usize)] {
        &self.segments
    }

    /// The peer lets it come, up to here. `false`: it may not ask for that.
    fn grant(&mut self, upto: u64) -> bool {
        let Ok(upto) = usize::try_from(upto) else { return false };
        let forwards = upto > self.granted && upto <= self.len;
        if forwards {
            self.granted = upto;
        }
        forwards
    }

    fn may_send(&self) -> bool {
        self.sent < self.granted
    }

    /// Whether it has to leave before the link may end.
    fn is_owed(&self) -> bool {
        !self.offer || self.granted > 0
    }

    /// Whether all of it has been sent.
    pub fn is_sent(&self) -> bool {
        self.sent == self.len
    }

    /// Where the next chunk begins.
    pub fn offset(&self) -> usize {
        self.sent
    }

    /// How long the next chunk is, if it may have `max` bytes.
    pub fn next_len(&self, max: usize) -> usize {
        max.min(self.granted - self.sent)
    }

    /// What lies in one piece at the beginning of the next chunk, of at most `max` bytes: valid for
    /// reads until the operation is done.
    pub fn next_piece(&self, max: usize) -> Option<(*const u8, usize)> {
        debug_assert!(self.copied.is_empty() || self.copied.len() == self.len);
        let &(ptr, len) = self.segments.get(self.at.0)?;
        let len = (len - self.at.1).min(self.next_len(max));
        // SAFETY: within the segment.
        Some((unsafe { ptr.add(self.at.1) }, len)).filter(|(_, len)| *len > 0)
    }

    /// So much of the next piece is sent.
    pub fn advance(&mut self, bytes: usize) {
        self.sent += bytes;
        self.at.1 += bytes;
        if self.segments.get(self.at.0).is_some_and(|(_, len)| *len == self.at.1) {
            self.at = (self.at.0 + 1, 0);
        }
    }

    /// Copies the next chunk, of at most `max` bytes.
    ///
    /// # Safety
    ///
    /// `to` has room for [`Outgoing::next_len`] of it.
    pub unsafe fn next_chunk(&mut self, max: usize, to: *mut u8) {
        let len = self.next_len(max);
        let mut done = 0;
        while let Some((from, take)) = self.next_piece(len - done) {
            // SAFETY: the piece is valid until the operation is done; the room is the caller's.
            unsafe { std::ptr::copy_nonoverlapping(from, to.add(done), take) };
            self.advance(take);
            done += take;
        }
    }
}

/// What the peer may ask for, and what of it can be sent.
pub(super) struct Outgoings<T> {
    by_id: ById<Outgoing<T>>,
    /// Those with a grant that is not used up. Classes take turns; within one the first comes
    /// first, so that the peer fills one destination after the other.
    active: [VecDeque<u32>; Class::COUNT],
    /// The class whose turn is next.
    turn: usize,
    next_id: u32,
    by_class: [usize; Class::COUNT],
}

impl<T> Default for Outgoings<T> {
    fn default() -> Self {
        let active = Default::default();
        Outgoings { by_id: ById::default(), active, turn: 0, next_id: 0, by_class: [0; _] }
    }
}

impl<T> Outgoings<T> {
    pub fn count(&self, class: Class) -> usize {
        self.by_class[class as usize]
    }

    /// The number that the next one gets.
    pub fn next_id(&self) -> u32 {
        self.next_id
    }

    pub fn insert(&mut self, outgoing: Outgoing<T>) {
        self.by_class[outgoing.class as usize] += 1;
        self.by_id.insert(self.next_id, outgoing);
        // Four thousand million payloads later the first has long been asked for or refused; until
        // then no number is used twice.
        self.next_id = self.next_id.wrapping_add(1);
        while self.by_id.contains(self.next_id) {
            self.next_id = self.next_id.wrapping_add(1);
        }
    }

    pub fn get_mut(&mut self, id: u32) -> Option<&mut Outgoing<T>> {
        self.by_id.get_mut(id)
    }

    pub fn remove(&mut self, id: u32) -> Option<Outgoing<T>> {
        let outgoing = self.by_id.remove(id)?;
        self.by_class[outgoing.class as usize] -= 1;
        Some(outgoing)
    }

    /// All of them, in no order.
    pub fn for_each(&mut self, change: impl FnMut(&mut Outgoing<T>)) {
        self.by_id.values_mut().for_each(change);
    }

    /// The peer wants it in chunks, up to here. `false`: it may not ask for that.
    pub fn pulled(&mut self, id: u32, upto: u64) -> bool {
        let Some(outgoing) = self.by_id.get_mut(id) else { return false };
        let waits = outgoing.may_send();
        let granted = outgoing.grant(upto);
        if granted && !waits {
            self.active[outgoing.class as usize].push_back(id);
        }
        granted
    }

    /// The peer has it, or does not want it. `None`: it may not say that.
    pub fn released(&mut self, id: u32) -> Option<Outgoing<T>> {
        self.by_id.get_mut(id).filter(|outgoing| outgoing.granted == 0)?;
        self.remove(id)
    }

    pub fn has_work(&self) -> bool {
        self.active.iter().any(|active| !active.is_empty())
    }

    /// Lets `send` make a chunk of the payload whose turn it is, and move that on. `None`: there is
    /// none.
    pub fn take_turn<R>(
        &mut self,
        send: impl FnOnce(u32, &mut Outgoing<T>) -> R,
    ) -> Option<(u32, R)> {
        let waits = |class: &usize| !self.active[*class].is_empty();
        let turns = self.turn..self.turn + Class::COUNT;
        let class = turns.map(|turn| turn % Class::COUNT).find(waits)?;
        self.turn = class + 1;
        let id = *self.active[class].front()?;
        let outgoing = self.by_id.get_mut(id)?;
        let sent = send(id, outgoing);
        if !outgoing.may_send() {
            self.active[class].pop_front();
        }
        Some((id, sent))
    }

    /// Whether something has to leave before the link may end.
    pub fn any_owed(&self) -> bool {
        self.by_id.iter().any(|(_, outgoing)| outgoing.is_owed())
    }

    /// Nothing more is sent. Forgets those that may go, and names them.
    pub fn clear(&mut self, may_go: impl Fn(&Outgoing<T>) -> bool) -> Vec<OpId> {
        self.active.iter_mut().for_each(VecDeque::clear);
        let gone = self.by_id.iter().filter(|(_, outgoing)| may_go(outgoing));
        let gone: Vec<u32> = gone.map(|(id, _)| id).collect();
        gone.into_iter().filter_map(|id| self.remove(id)).map(|outgoing| outgoing.op).collect()
    }
}

/// The place of a payload that is being landed, and how much of it has come.
pub(super) struct Filling {
    to: Landing,
    /// Where the next bytes go: the segment, and how far into it.
    at: (usize, usize),
    len: usize,
    got: usize,
    granted: usize,
}

impl Filling {
    /// For a payload of this length. `None`: this is no place for it.
    pub fn new(mut to: Landing, len: usize) -> Option<Filling> {
        let room: usize = to.iter().map(|segment| segment.len).sum();
        if room != len || !to.iter().all(|segment| segment.kind.cpu_accessible()) {
            return None;
        }
        to.retain(|segment| segment.len > 0);
        Some(Filling { to, at: (0, 0), len, got: 0, granted: 0 })
    }

    /// Where it goes.
    pub fn segments(&self) -> SmallVec<[(*const u8, usize); 2]> {
        self.to.iter().map(|segment| (segment.ptr.cast_const(), segment.len)).collect()
    }

    /// Where the next bytes go: the segment, and how far into it.
    pub fn at(&self) -> (usize, usize) {
        self.at
    }

    /// The memory for the next bytes that lies in one piece. `None`: it is full.
    pub fn next_piece(&self) -> Option<(*mut u8, usize)> {
        let segment = self.to.get(self.at.0)?;
        // SAFETY: within the segment.
        Some((unsafe { segment.ptr.add(self.at.1) }, segment.len - self.at.1))
    }

    /// So much of the next piece is filled, or will be.
    pub fn advance(&mut self, bytes: usize) {
        self.got += bytes;
        self.at.1 += bytes;
        if self.to.get(self.at.0).is_some_and(|segment| segment.len == self.at.1) {
            self.at = (self.at.0 + 1, 0);
        }
    }

    /// All of it is to come again, from its beginning.
    pub fn start_again(&mut self) {
        (self.at, self.got) = ((0, 0), 0);
    }

    /// How far the sender may go.
    pub fn granted(&self) -> usize {
        self.granted
    }

    /// Whether it is worth telling the sender that it may go on: so that at most `window` bytes are
    /// on their way, and at least half as many more, or the rest.
    pub fn wants(&self, window: usize) -> bool {
        self.granted < self.len && self.granted - self.got <= window / 2
    }

    /// Lets the sender go on, within the window and by at most `room` bytes: by how many. `None`:
    /// there is too little room for it to be worth it.
    pub fn grant(&mut self, window: usize, room: usize) -> Option<usize> {
        let on_its_way = self.granted - self.got;
        let wanted = (self.len - self.granted).min(window.saturating_sub(on_its_way));
        if room < wanted.min(window / 2) {
            return None;
        }
        let more = wanted.min(room);
        self.granted += more;
        Some(more)
    }

    pub fn is_full(&self) -> bool {
        self.got == self.len
    }

    /// Whether a chunk of this length may come now.
    pub fn expects(&self, offset: u64, len: usize) -> bool {
        offset == self.got as u64 && len > 0 && len <= self.granted - self.got
    }

    /// Takes a chunk, or a payload that came whole.
    ///
    /// # Safety
    ///
    /// `len` bytes are readable at `from`; the landing is alive.
    pub unsafe fn take(&mut self, mut from: *const u8, len: usize) {
        let mut left = len;
        while left > 0 {
            let Some((to, room)) = self.next_piece() else { return };
            let take = room.min(left);
            // SAFETY: within the piece, which the driver keeps; the source is the caller's. It may
            // be shared with the peer, and is only copied.
            unsafe {
                std::ptr::copy_nonoverlapping(from, to, take);
                from = from.add(take);
            }
            self.advance(take);
            left -= take;
        }
    }

    /// Has the processor fetch the memory that the next `len` bytes go to, as far as it lies in one
    /// piece, so that the copy need not wait for it.
    #[inline]
    pub fn fetch_place(&self, len: usize) {
        #[cfg(target_arch = "x86_64")]
        if let Some((to, room)) = self.next_piece() {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            for line in (0..room.min(len)).step_by(64) {
                // SAFETY: within the piece; nothing is read or written, and nothing can fault.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(to.add(line).cast_const().cast()) };
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::link::SegmentMut;
    use crate::memory::MemoryKind;
    use proptest::prelude::*;

    const WINDOW_BYTES: usize = 4096;

    pub fn segment(bytes: &[u8]) -> Segment<'_> {
        Segment { ptr: bytes.as_ptr(), len: bytes.len(), kind: MemoryKind::Host, shared: None }
    }

    pub fn segment_mut(bytes: &mut [u8]) -> SegmentMut {
        SegmentMut { ptr: bytes.as_mut_ptr(), len: bytes.len(), kind: MemoryKind::Host }
    }

    /// Pieces of these lengths, no two alike.
    pub fn pieces(lens: &[usize]) -> Vec<Vec<u8>> {
        let piece =
            |(index, len): (usize, &usize)| (0..*len).map(|at| (at * 7 + index) as u8).collect();
        lens.iter().enumerate().map(piece).collect()
    }

    proptest! {
        #[test]
        fn what_is_sent_in_chunks_lands_whole(
            lens in proptest::collection::vec(0usize..3000, 1..12),
            split in 1usize..4000,
            max in 1usize..5000,
            room in WINDOW_BYTES / 2..2 * WINDOW_BYTES,
        ) {
            let pieces = pieces(&lens);
            let whole = pieces.concat();
            prop_assume!(!whole.is_empty());
            let segments: Vec<_> = pieces.iter().map(|piece| segment(piece)).collect();
            // SAFETY: the pieces live to the end of the test.
            let outgoing = unsafe {
                Outgoing::new(OpId::NONE, Class::Message, false, &segments, whole.len(), 128)
            };
            let mut outgoings = Outgoings::<()>::default();
            outgoings.insert(outgoing);
            let mut landed = vec![0u8; whole.len()];
            let to = landed.chunks_mut(split).map(segment_mut).collect();
            let mut filling = Filling::new(to, whole.len()).expect("as long as the payload");
            let mut chunk = vec![0u8; max];
            while !filling.is_full() {
                prop_assert!(!filling.expects(filling.got as u64, WINDOW_BYTES + 1));
                if filling.wants(WINDOW_BYTES) {
                    prop_assert!(filling.grant(WINDOW_BYTES, room).is_some());
                    prop_assert!(filling.granted() - filling.got <= WINDOW_BYTES);
                    prop_assert!(outgoings.pulled(0, filling.granted() as u64));
                }
                let sent = outgoings.take_turn(|id, outgoing| {
                    assert_eq!(id, 0);
                    let sent = (outgoing.offset(), outgoing.next_len(max));
                    // SAFETY: `chunk` has room for `max` bytes.
                    unsafe { outgoing.next_chunk(max, chunk.as_mut_ptr()) };
                    sent
                });
                let (_, (offset, len)) = sent.expect("something was granted");
                prop_assert!(len > 0 && len <= max);
                prop_assert!(filling.expects(offset as u64, len));
                prop_assert!(!filling.expects(offset as u64 + 1, len));
                // SAFETY: it was expected, and `landed` is alive.
                unsafe { filling.take(chunk.as_ptr(), len) };
                let outgoing = outgoings.get_mut(0).expect("nobody has removed it");
                prop_assert_eq!(outgoing.is_sent(), filling.is_full());
            }
            prop_assert!(!outgoings.has_work());
            prop_assert!(outgoings.any_owed());
            prop_assert!(outgoings.remove(0).is_some() && !outgoings.any_owed());
            prop_assert_eq!(landed, whole);
        }
    }

    #[test]
    fn a_peer_pulls_only_what_is_there_and_forwards() {
        let mut outgoings = Outgoings::<()>::default();
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
        assert!(outgoings.released(id).is_none(), "too late to let go");
        assert_eq!(outgoings.count(Class::Tag), 1);
        assert!(outgoings.clear(|_| false).is_empty() && !outgoings.has_work());
        assert_eq!(outgoings.clear(|_| true), [OpId::NONE]);
        assert_eq!(outgoings.count(Class::Tag), 0);
    }

    #[test]
    fn a_place_of_another_length_is_refused() {
        let mut bytes = [0u8; 10];
        let mut to = || [segment_mut(&mut bytes)].into_iter().collect();
        assert!(Filling::new(to(), 9).is_none() && Filling::new(to(), 11).is_none());
        assert!(Filling::new(to(), 10).is_some());
    }
}
