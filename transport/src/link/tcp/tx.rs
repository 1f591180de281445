//! What waits to be sent: eight lanes, the frame under way, answers to offers, offers made.
//!
//! Decides which frame goes next and remembers how far it has gone. Does not touch the socket:
//! [`Tx::gather`] says what to write, [`Tx::advance`] hears how much was taken.

use std::collections::VecDeque;

use slab::Slab;
use smallvec::SmallVec;

use super::pieces::{IOV_MAX, IoVecs, Pieces, io_vec};
use super::wire::{Frame, FrameKind, HEADER_BYTES, class_index};
use crate::link::{COPIED_MAX, Class, How, OpId, Segment};

/// A stream of chunks each for what is posted and for pulled offers, per class.
pub(super) const LANES: usize = 2 * Class::COUNT;
/// Parcels that may wait in a lane of a bulk class.
pub(super) const QUEUE_MAX: usize = 1024;
/// Open offers that a receiver must bear; more are a breach of protocol.
pub(super) const OFFERS_MAX: usize = 1 << 16;
/// Open offers that a sender makes. Less by what may wait in the lanes: those are not counted.
const OFFERS_SENT_MAX: usize = OFFERS_MAX - Class::COUNT * QUEUE_MAX;
/// Payloads up to this many bytes are copied behind their head: cheaper than a vector each, and
/// several frames then share a system call.
const COPY_MAX: usize = 1024;
const _: () = assert!(COPIED_MAX <= COPY_MAX);
/// When this many bytes of framing wait, no further frame is begun.
const WIRE_FULL: usize = 4096;
/// What an idle link may keep allocated for the next time.
const KEEP_QUEUE: usize = 4;

/// The lane of a class's posts; its pulled offers go in the lane `Class::COUNT` further on.
pub(super) fn lane_of(class: Class, pulled: bool) -> usize {
    class_index(class) + if pulled { Class::COUNT } else { 0 }
}

enum Kind {
    Eager,
    Offer,
    /// A pulled offer.
    Body(u32),
}

/// A parcel, or the payload of a pulled offer.
pub(super) struct Out {
    op: OpId,
    class: Class,
    kind: Kind,
    /// The head, and behind it the payload if that is no longer than [`COPIED_MAX`].
    bytes: SmallVec<[u8; 64]>,
    head_len: usize,
    pieces: Pieces,
    len: u64,
    /// Payload bytes that no frame has been begun for.
    left: u64,
    started: bool,
}

impl Out {
    /// # Safety
    /// The payload is `len` bytes long and valid for reads: now, and if it is longer than
    /// [`COPIED_MAX`] until the operation is done.
    pub unsafe fn new(
        op: OpId,
        class: Class,
        how: How,
        head: &[u8],
        payload: &[Segment<'_>],
        len: usize,
    ) -> Self {
        let kind = match how {
            How::Eager => Kind::Eager,
            How::Offer => Kind::Offer,
        };
        let mut bytes = SmallVec::from_slice(head);
        let mut pieces = Pieces::default();
        if len <= COPIED_MAX {
            for segment in payload.iter().filter(|segment| segment.len > 0) {
                // SAFETY: valid now, by this function's contract.
                let slice = unsafe { std::slice::from_raw_parts(segment.ptr, segment.len) };
                bytes.extend_from_slice(slice);
            }
        } else {
            pieces = Pieces::from_segments(payload);
        }
        let len = len as u64;
        Out { op, class, kind, bytes, head_len: head.len(), pieces, len, left: len, started: false }
    }

    fn head(&self) -> &[u8] {
        &self.bytes[..self.head_len]
    }

    /// Appends the next `bytes` of the payload to `wire`, no more than are left.
    fn copy_out(&mut self, bytes: usize, wire: &mut Vec<u8>) {
        let copied = &self.bytes[self.head_len..];
        if copied.is_empty() {
            // SAFETY: the operation pins the memory until it is done, by the contract of `new`.
            unsafe { self.pieces.copy_out(bytes, wire) };
        } else {
            // A chunk is never shorter than what is copied, so this is all of it.
            wire.extend_from_slice(copied);
        }
    }
}

/// The frame whose payload is being written straight from the owner's memory.
struct Current {
    lane: usize,
    left: usize,
}

pub(super) struct Tx {
    lanes: [VecDeque<Out>; LANES],
    /// Framing and small payloads of the frames begun, and how much of it is written.
    wire: Vec<u8>,
    wire_sent: usize,
    current: Option<Current>,
    /// Where the search for the next bulk frame begins.
    turn: usize,
    /// Answers to the peer's offers: at most as many as the peer may have open.
    replies: VecDeque<(FrameKind, u32)>,
    /// Offers whose head has gone out, by id − 1. `None`: pulled, its payload is in a lane.
    offers: Slab<Option<Out>>,
    chunk_bytes: usize,
    pub parcels_sent: u64,
    pub payload_bytes_sent: u64,
}

impl Tx {
    pub fn new(chunk_bytes: usize) -> Self {
        Tx {
            lanes: Default::default(),
            wire: Vec::new(),
            wire_sent: 0,
            current: None,
            turn: 1,
            replies: VecDeque::new(),
            offers: Slab::new(),
            chunk_bytes: chunk_bytes.max(COPY_MAX),
            parcels_sent: 0,
            payload_bytes_sent: 0,
        }
    }

    pub fn chunk_bytes(&self) -> usize {
        self.chunk_bytes
    }

    /// Nothing waits to be written.
    pub fn is_idle(&self) -> bool {
        self.wire.is_empty()
            && self.replies.is_empty()
            && self.lanes.iter().all(|lane| lane.is_empty())
    }

    pub fn is_full(&self, class: Class, how: How) -> bool {
        class != Class::Control
            && (self.lanes[lane_of(class, false)].len() >= QUEUE_MAX
                || (how == How::Offer && self.offers.len() >= OFFERS_SENT_MAX))
    }

    /// Control parcels that wait.
    pub fn control_waiting(&self) -> usize {
        self.lanes[lane_of(Class::Control, false)].len()
    }

    pub fn enqueue(&mut self, out: Out) {
        self.lanes[lane_of(out.class, false)].push_back(out);
    }

    /// Takes over a parcel that fits one frame, of which a direct write took `written` bytes, at
    /// least one but not all. Nothing else waits. `true`: its memory is needed no more.
    pub fn enqueue_begun(&mut self, mut out: Out, written: usize) -> bool {
        let lane = lane_of(out.class, false);
        self.wire.extend_from_slice(&eager_header(&out));
        self.wire.extend_from_slice(out.head());
        self.parcels_sent += 1;
        self.payload_bytes_sent += out.len;
        let left = out.left as usize;
        let copied = left <= COPY_MAX;
        if copied {
            out.copy_out(left, &mut self.wire);
        } else {
            out.left = 0;
            out.started = true;
            self.lanes[lane].push_front(out);
            self.current = Some(Current { lane, left });
        }
        // The frame was not taken whole, so it cannot end here.
        self.advance(written, &mut |_| {});
        copied
    }

    /// Queues the answer to an offer of the peer.
    pub fn reply(&mut self, kind: FrameKind, id: u32) {
        self.replies.push_back((kind, id));
    }

    pub fn replies_waiting(&self) -> usize {
        self.replies.len()
    }

    /// The peer wants an offer's payload. `false`: there is no such offer, or it was pulled before.
    pub fn pulled(&mut self, id: u32, done: &mut dyn FnMut(OpId)) -> bool {
        let key = (id - 1) as usize;
        let Some(mut out) = self.offers.get_mut(key).and_then(Option::take) else {
            return false;
        };
        if out.len == 0 {
            self.offers.remove(key);
            done(out.op);
            return true;
        }
        out.kind = Kind::Body(id);
        self.lanes[lane_of(out.class, true)].push_back(out);
        true
    }

    /// The peer does not want an offer's payload. `false` as above.
    pub fn refused(&mut self, id: u32, done: &mut dyn FnMut(OpId)) -> bool {
        let key = (id - 1) as usize;
        let Some(out) = self.offers.get_mut(key).and_then(Option::take) else {
            return false;
        };
        self.offers.remove(key);
        done(out.op);
        true
    }

    /// Begins frames until one is under way whose payload is not copied, or enough waits.
    pub fn fill(&mut self, done: &mut dyn FnMut(OpId)) {
        while self.current.is_none() && self.wire.len() < WIRE_FULL {
            if let Some((kind, id)) = self.replies.pop_front() {
                let frame = Frame { kind, class: Class::Control, head_len: 0, id, len: 0 };
                self.wire.extend_from_slice(&frame.encode());
            } else if let Some(lane) = self.next_lane() {
                self.begin(lane, done);
            } else {
                return;
            }
        }
    }

    /// Control first; then the others in turn, one frame each.
    fn next_lane(&mut self) -> Option<usize> {
        if !self.lanes[0].is_empty() {
            return Some(0);
        }
        let lane = (self.turn..self.turn + LANES)
            .map(|lane| lane % LANES)
            .find(|&lane| !self.lanes[lane].is_empty())?;
        self.turn = (lane + 1) % LANES;
        Some(lane)
    }

    fn begin(&mut self, lane: usize, done: &mut dyn FnMut(OpId)) {
        let Some(out) = self.lanes[lane].front_mut() else {
            return;
        };
        let first = !out.started;
        out.started = true;
        let chunk_len = out.left.min(self.chunk_bytes as u64);
        let chunk_id = match out.kind {
            Kind::Offer => return self.begin_offer(lane),
            Kind::Eager => 0,
            Kind::Body(id) => id,
        };
        let is_parcel = first && matches!(out.kind, Kind::Eager);
        if is_parcel {
            self.wire.extend_from_slice(&if out.left <= self.chunk_bytes as u64 {
                eager_header(out)
            } else {
                header(FrameKind::Start, out, 0, out.len)
            });
            self.wire.extend_from_slice(out.head());
            self.parcels_sent += 1;
        }
        if !is_parcel || out.left > self.chunk_bytes as u64 {
            let frame = Frame {
                kind: FrameKind::Chunk,
                class: out.class,
                head_len: 0,
                id: chunk_id,
                len: chunk_len,
            };
            self.wire.extend_from_slice(&frame.encode());
        }
        out.left -= chunk_len;
        self.payload_bytes_sent += chunk_len;
        let chunk_len = chunk_len as usize;
        if chunk_len <= COPY_MAX {
            out.copy_out(chunk_len, &mut self.wire);
            self.end_frame(lane, done);
        } else {
            self.current = Some(Current { lane, left: chunk_len });
        }
    }

    fn begin_offer(&mut self, lane: usize) {
        let Some(out) = self.lanes[lane].pop_front() else {
            return;
        };
        let entry = self.offers.vacant_entry();
        // Bounded by `is_full`, far below 2^32.
        let id = entry.key() as u32 + 1;
        self.wire.extend_from_slice(&header(FrameKind::Offer, &out, id, out.len));
        self.wire.extend_from_slice(out.head());
        self.parcels_sent += 1;
        entry.insert(Some(out));
    }

    /// The frame at the front of `lane` needs its owner's memory no more.
    fn end_frame(&mut self, lane: usize, done: &mut dyn FnMut(OpId)) {
        self.current = None;
        if self.lanes[lane].front().is_some_and(|out| out.left > 0) {
            return;
        }
        let Some(out) = self.lanes[lane].pop_front() else {
            return;
        };
        if let Kind::Body(id) = out.kind {
            self.offers.try_remove((id - 1) as usize);
        }
        done(out.op);
    }

    /// Vectors for what is to be written next, about `limit` bytes at most.
    pub fn gather(&self, limit: usize, vectors: &mut IoVecs) {
        if self.wire_sent < self.wire.len() {
            vectors.push(io_vec(&self.wire[self.wire_sent..]));
        }
        if let Some(current) = &self.current
            && let Some(out) = self.lanes[current.lane].front()
        {
            out.pieces.gather(current.left.min(limit), vectors, IOV_MAX);
        }
    }

    /// The socket took `bytes` of what `gather` gave.
    pub fn advance(&mut self, bytes: usize, done: &mut dyn FnMut(OpId)) {
        let framing = bytes.min(self.wire.len() - self.wire_sent);
        self.wire_sent += framing;
        if self.wire_sent == self.wire.len() {
            self.wire.clear();
            self.wire_sent = 0;
        }
        let payload = bytes - framing;
        let Some(current) = &mut self.current else {
            return;
        };
        let lane = current.lane;
        current.left -= payload;
        let finished = current.left == 0;
        if let Some(out) = self.lanes[lane].front_mut() {
            out.pieces.advance(payload);
        }
        if finished {
            self.end_frame(lane, done);
        }
    }

    /// Gives back what a burst has grown. Only of use while nothing waits.
    pub fn trim(&mut self) {
        if self.wire.capacity() > 0 {
            self.wire = Vec::new();
        }
        for lane in &mut self.lanes {
            if lane.capacity() > KEEP_QUEUE {
                *lane = VecDeque::new();
            }
        }
        if self.replies.capacity() > KEEP_QUEUE {
            self.replies = VecDeque::new();
        }
        if self.offers.is_empty() && self.offers.capacity() > KEEP_QUEUE {
            self.offers = Slab::new();
        }
    }

    /// Forgets everything; every operation that was not done is named.
    pub fn clear(&mut self, done: &mut dyn FnMut(OpId)) {
        self.current = None;
        self.wire = Vec::new();
        self.wire_sent = 0;
        self.replies.clear();
        for lane in &mut self.lanes {
            for out in lane.drain(..) {
                done(out.op);
            }
        }
        for out in self.offers.drain().flatten() {
            done(out.op);
        }
    }
}

fn header(kind: FrameKind, out: &Out, id: u32, len: u64) -> [u8; HEADER_BYTES] {
    // A head has at most `HEAD_MAX` bytes: checked when it was posted.
    Frame { kind, class: out.class, head_len: out.head_len as u16, id, len }.encode()
}

fn eager_header(out: &Out) -> [u8; HEADER_BYTES] {
    header(FrameKind::Parcel, out, 0, out.len)
}
