//! Long payloads: pulled by the receiver, in chunks, each an active message of its own.
//!
//! UCX has a rendezvous of its own. It is not used, because a receive that it fetches from a peer
//! is not ended when that peer dies (1.13: neither by the error handler nor by closing by force),
//! and then its memory could never be given back. Here only sends are in UCX's hands, and those
//! end; what is landed is copied by this process.

use std::collections::VecDeque;

use thalweg_ffi::ucx::ucp_dt_iov_t;

use super::request::SendOp;
use super::wire::Header;
use crate::link::by_id::ById;
use crate::link::chunks::{self, Filling};
use crate::link::few::copy_few;
use crate::link::{Class, OpId};

/// How much of a payload may be on its way at once, in bytes.
const WINDOW_BYTES: usize = 1 << 20;
/// What the peer may have on its way of all payloads that are being landed, in bytes: what waits
/// here at most, where lanes reorder, until its turn.
const PULLED_BYTES_MAX: usize = 4 * WINDOW_BYTES;
/// What that may come to in an inbox: where pieces of a message are short, so are chunks.
pub(super) const PULLED_INBOX_BYTES: usize = 2 * PULLED_BYTES_MAX;
/// What may land in one look of a link that spins.
const LANDED_TURN_BYTES: usize = 256 << 10;
/// From this size on, messages wait for each other.
const BULK_MIN_BYTES: usize = 1 << 20;
/// How many of those may be open at once. The next is offered when the last chunk of this one has
/// left, not when it has landed, so nothing stands still between them (8 MiB over posix, four in
/// flight: 8.1 GB/s, with two open 6.4).
const BULK_MAX: usize = 1;
/// Of the place of the next chunk so much is fetched into the caches: a chunk of shared memory. 8 MiB over
/// posix, in turn: 6.73 GB/s with it, 6.23 without (medians of seven).
const FETCHED_BYTES: usize = 8192;
/// Pieces of memory shorter than this are copied together.
const GATHERED_BELOW: usize = 1024;

/// A payload that the peer may pull, with the number of its chunks that UCX is at work on.
pub(super) type Outgoing = chunks::Outgoing<usize>;

/// Puts the next chunk of a payload, of at most `max` bytes, behind the header in `into`: named
/// where it lies, or copied together.
fn make_chunk(of: &mut Outgoing, max: usize, into: &mut SendOp) {
    let max = of.next_len(max);
    let header_len = into.bytes.len();
    let mut len = 0;
    while let Some((from, take)) = of.next_piece(max - len) {
        if take >= GATHERED_BELOW || take == max {
            if len == 0 {
                into.iov.push(ucp_dt_iov_t { buffer: from.cast_mut().cast(), length: take });
                of.advance(take);
            }
            break;
        }
        // SAFETY: valid for reads until the operation is done.
        unsafe { append(&mut into.bytes, from, take) };
        of.advance(take);
        len += take;
    }
    if into.iov.is_empty() {
        let buffer = into.bytes[header_len..].as_mut_ptr().cast();
        into.iov.push(ucp_dt_iov_t { buffer, length: len });
    }
}

/// Whether a payload counts for [`Outgoings::bulk_is_full`].
pub(super) fn is_bulk(class: Class, len: usize) -> bool {
    class == Class::Message && len >= BULK_MIN_BYTES
}

/// Copies to the end of `bytes`.
///
/// # Safety
///
/// `len` bytes are readable at `from`.
#[inline]
pub(super) unsafe fn append(bytes: &mut Vec<u8>, from: *const u8, len: usize) {
    bytes.reserve(len);
    // SAFETY: room was made; the source is the caller's.
    unsafe {
        copy_few(from, bytes.as_mut_ptr().add(bytes.len()), len);
        bytes.set_len(bytes.len() + len);
    }
}

/// What the peer may pull, and what of it can be sent.
#[derive(Default)]
pub(super) struct Outgoings {
    all: chunks::Outgoings<usize>,
    /// Large messages among them.
    bulk: usize,
}

impl Outgoings {
    pub fn count(&self, class: Class) -> usize {
        self.all.count(class)
    }

    /// The number that the next one gets.
    pub fn next_id(&self) -> u32 {
        self.all.next_id()
    }

    /// Whether one more large message would be too many: the peer gives each a destination when it
    /// hears of it, and the more of those it fills by turns, the more often they have left its
    /// caches. Messages arrive in order, so one that waits here loses nothing.
    pub fn bulk_is_full(&self) -> bool {
        self.bulk >= BULK_MAX
    }

    pub fn insert(&mut self, outgoing: Outgoing) {
        self.bulk += usize::from(is_bulk(outgoing.class, outgoing.len));
        self.all.insert(outgoing);
    }

    fn gone(&mut self, outgoing: &Outgoing) -> OpId {
        self.bulk -= usize::from(is_bulk(outgoing.class, outgoing.len));
        outgoing.op
    }

    /// The peer wants it, up to here. `false`: it may not ask for that.
    pub fn pulled(&mut self, id: u32, upto: u64) -> bool {
        self.all.pulled(id, upto)
    }

    /// The peer does not want it. `None`: it may not say that.
    pub fn refused(&mut self, id: u32) -> Option<OpId> {
        self.all.released(id).map(|outgoing| self.gone(&outgoing))
    }

    /// Makes the next chunk, of at most `max` bytes: puts it behind the header that `header` makes
    /// of number, class and offset. `None`: there is none.
    pub fn next_chunk(
        &mut self,
        max: usize,
        into: &mut SendOp,
        header: impl FnOnce(u32, Class, u64) -> Header,
    ) -> Option<(u32, Class)> {
        self.all.take_turn(|id, outgoing| {
            let class = outgoing.class;
            into.class = class;
            into.chunk_of = Some(id);
            header(id, class, outgoing.offset() as u64).append_to(&mut into.bytes);
            outgoing.besides += 1;
            make_chunk(outgoing, max, into);
            class
        })
    }

    pub fn has_work(&self) -> bool {
        self.all.has_work()
    }

    /// A chunk has left. `Some`: it was the last.
    pub fn chunk_left(&mut self, id: u32) -> Option<OpId> {
        let outgoing = self.all.get_mut(id)?;
        let in_flight = &mut outgoing.besides;
        *in_flight = in_flight.saturating_sub(1);
        if *in_flight > 0 || !outgoing.is_sent() {
            return None;
        }
        self.all.remove(id).map(|outgoing| self.gone(&outgoing))
    }

    pub fn any_owed(&self) -> bool {
        self.all.any_owed()
    }

    /// Nothing more is sent. Forgets those that UCX is not at work on, and names them; the others
    /// stay until their chunks have left.
    pub fn clear_idle(&mut self) -> Vec<OpId> {
        self.all.clear(|outgoing| outgoing.besides == 0)
    }
}

/// Payloads that are being landed, by the peer's number.
#[derive(Default)]
pub(super) struct Incomings {
    by_id: ById<Incoming>,
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

    /// Whether chunks have landed, not too many, and nothing has to be done about it.
    #[inline]
    pub fn only_lands(&self) -> bool {
        (1..LANDED_TURN_BYTES).contains(&self.landed_bytes) && !self.has_news()
    }

    /// Whether nothing came, and nothing is to be granted.
    #[inline]
    pub fn is_quiet(&self) -> bool {
        self.landed_bytes == 0 && self.wanting.is_empty()
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
        if self.by_id.contains(id) {
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
            let Some(incoming) = self.by_id.get_mut(id) else {
                self.wanting.pop_front();
                continue;
            };
            let more = incoming.filling.grant(WINDOW_BYTES, room)?;
            let upto = incoming.filling.granted() as u64;
            incoming.waits = false;
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
        let expected = |incoming: &&mut Incoming| incoming.filling.expects(offset, len);
        let Some(incoming) = self.by_id.get_mut(id).filter(expected) else { return false };
        // SAFETY: the driver keeps landings until they are reported, or have been taken from here
        // by `clear`; the rest is the caller's promise.
        unsafe { incoming.filling.take(from, len) };
        incoming.filling.fetch_place(len.min(FETCHED_BYTES));
        let over = incoming.filling.is_full().then_some(incoming.op);
        if !incoming.waits && incoming.filling.wants(WINDOW_BYTES) {
            incoming.waits = true;
            self.wanting.push_back(id);
        }
        self.pulled_bytes -= len;
        self.landed_bytes += len;
        if let Some(op) = over {
            self.landed.push(op);
            self.by_id.remove(id);
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
    op: OpId,
    filling: Filling,
    /// It is among those that could be granted more.
    waits: bool,
}

impl Incoming {
    pub fn new(op: OpId, filling: Filling) -> Incoming {
        Incoming { op, filling, waits: true }
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::{Address, Kind};
    use super::*;
    use crate::link::chunks::tests::{pieces, segment, segment_mut};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_chunk_is_one_piece_with_the_next_bytes(
            lens in proptest::collection::vec(0usize..3000, 1..12),
            max in 1usize..5000,
        ) {
            let pieces = pieces(&lens);
            let whole = pieces.concat();
            prop_assume!(!whole.is_empty());
            let segments: Vec<_> = pieces.iter().map(|piece| segment(piece)).collect();
            // SAFETY: the pieces live to the end of the test.
            let outgoing = unsafe {
                Outgoing::new(OpId::NONE, Class::Message, false, &segments, whole.len(), 128)
            };
            let mut outgoings = Outgoings::default();
            outgoings.insert(outgoing);
            prop_assert!(outgoings.pulled(0, whole.len() as u64));
            let (mut sent, mut chunks) = (Vec::new(), 0);
            while outgoings.has_work() {
                let mut op = SendOp::new();
                let made = outgoings.next_chunk(max, &mut op, |id, class, at| {
                    assert_eq!(at, sent.len() as u64);
                    let to = Address { slot: 0, secret: 0 };
                    Header { id, len: at, ..Header::new(Kind::Chunk, class, 0, 0, to) }
                });
                prop_assert_eq!(made, Some((0, Class::Message)));
                prop_assert_eq!(op.iov.len(), 1);
                let (ptr, len) = (op.iov[0].buffer.cast::<u8>(), op.iov[0].length);
                prop_assert!(len > 0 && len <= max);
                // SAFETY: it lies in the box or in the pieces, which are alive.
                sent.extend_from_slice(unsafe { std::slice::from_raw_parts(ptr, len) });
                chunks += 1;
            }
            prop_assert_eq!(sent, whole);
            for left in (0..chunks).rev() {
                prop_assert_eq!(outgoings.chunk_left(0).is_some(), left == 0);
            }
            prop_assert_eq!(outgoings.count(Class::Message), 0);
        }
    }

    #[test]
    fn what_ucx_is_at_work_on_stays() {
        let bytes = [0u8; 1000];
        let mut outgoings = Outgoings::default();
        for _ in 0..2 {
            // SAFETY: `bytes` lives to the end of the test.
            let outgoing = unsafe {
                Outgoing::new(OpId::NONE, Class::Tag, true, &[segment(&bytes)], 1000, 128)
            };
            outgoings.insert(outgoing);
        }
        assert!(outgoings.pulled(1, 10));
        let mut op = SendOp::new();
        let to = Address { slot: 0, secret: 0 };
        let header = |_, class, _| Header::new(Kind::Chunk, class, 0, 0, to);
        assert_eq!(outgoings.next_chunk(10, &mut op, header), Some((1, Class::Tag)));
        assert_eq!(outgoings.clear_idle(), [OpId::NONE]);
        assert_eq!(outgoings.count(Class::Tag), 1);
        assert_eq!(outgoings.chunk_left(1), None, "it was not sent to its end");
        assert_eq!(outgoings.clear_idle(), [OpId::NONE]);
    }

    /// Sends to the end what is granted, of one payload after the other or by turns.
    fn pull_all(lens: &[usize], chunk_bytes: usize, by_turns: bool) {
        let mut memory: Vec<Vec<u8>> = lens.iter().map(|len| vec![0; *len]).collect();
        let mut incomings = Incomings::default();
        for (id, bytes) in memory.iter_mut().enumerate() {
            let to = [segment_mut(bytes)].into_iter().collect();
            let filling = Filling::new(to, bytes.len()).expect("as long as the payload");
            assert!(incomings.insert(id as u32, Incoming::new(OpId::NONE, filling)));
        }
        let chunk = vec![7u8; chunk_bytes];
        let (mut granted, mut sent) = (vec![0usize; lens.len()], vec![0usize; lens.len()]);
        let mut turn = 0;
        loop {
            while let Some((id, upto)) = incomings.grant() {
                granted[id as usize] = upto as usize;
            }
            let mut ids = (turn..turn + lens.len()).map(|id| id % lens.len());
            let Some(id) = ids.find(|id| sent[*id] < granted[*id]) else { break };
            let len = chunk_bytes.min(granted[id] - sent[id]);
            // SAFETY: `chunk` has as many bytes, and `memory` lives to the end.
            assert!(unsafe { incomings.land(id as u32, sent[id] as u64, chunk.as_ptr(), len) });
            sent[id] += len;
            turn = if by_turns { id + 1 } else { 0 };
        }
        assert_eq!(sent, lens, "chunks of {chunk_bytes}, by turns: {by_turns}");
        assert_eq!(incomings.len(), 0);
        assert_eq!(incomings.landed().len(), lens.len());
        assert!(memory.iter().flatten().all(|byte| *byte == 7));
    }

    #[test]
    fn every_payload_is_pulled_to_its_end() {
        const MIB: usize = 1 << 20;
        let cases: [&[usize]; 5] = [
            &[MIB, MIB, MIB, MIB / 2, MIB],
            &[MIB; 5],
            &[4 * MIB; 6],
            &[MIB / 2; 9],
            &[3 * MIB + 1, 1, MIB / 2 + 1, MIB / 2 - 1, 2 * MIB, MIB, 5],
        ];
        for lens in cases {
            for chunk_bytes in [8192, 64_000, 1 << 19] {
                for by_turns in [false, true] {
                    pull_all(lens, chunk_bytes, by_turns);
                }
            }
        }
    }
}
