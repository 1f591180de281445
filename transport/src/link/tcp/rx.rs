//! What has been read: a small buffer, the frame under way, payloads under way, offers received.
//!
//! Takes frames apart and asks the sink where payloads go. Does not touch the socket:
//! [`Rx::gather`] says where to read to, [`Rx::received`] hears how much came.

use std::collections::HashMap;
use std::mem::MaybeUninit;

use super::pieces::{IOV_MAX, IoVecs, Pieces, io_vec_mut};
use super::tx::{LANES, OFFERS_MAX, Tx, lane_of};
use super::wire::{Frame, FrameKind, HEADER_BYTES, decode};
use super::{internal, report};
use crate::error::LinkError;
use crate::link::{
    Arrival, Budget, Class, Disposition, HEAD_MAX, How, Landing, LinkKind, OpId, PayloadId, Sink,
};

/// The buffer that headers, heads and small payloads are read into.
pub(super) const BUFFER_BYTES: usize = 4096;
/// Payloads up to this many bytes are always handed up in line.
pub(super) const INLINE_MAX: usize = 2048;
const _: () = assert!(HEADER_BYTES + HEAD_MAX + INLINE_MAX <= BUFFER_BYTES);

/// A payload of which more is to come.
struct Incoming {
    id: u32,
    /// Where it goes; `None`: it is read and dropped.
    to: Option<(Pieces, OpId)>,
    left: u64,
}

/// The frame whose payload is being read.
struct Body {
    lane: usize,
    left: u64,
}

/// An offer of the peer that has not begun to arrive.
struct Offered {
    class: Class,
    len: u64,
    to: Option<(Pieces, OpId)>,
}

/// Why the processing of buffered bytes ended.
pub(super) enum Step {
    NeedData,
    Spent,
}

pub(super) struct Rx {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    body: Option<Body>,
    lanes: [Option<Incoming>; LANES],
    offers: HashMap<u32, Offered>,
    /// The buffer may hold whole frames that the budget left there.
    unprocessed: bool,
    max_payload: u64,
    next_payload: u64,
    pub parcels_received: u64,
    pub payload_bytes_received: u64,
}

fn protocol(detail: &str) -> LinkError {
    LinkError::protocol(LinkKind::Tcp, detail)
}

/// Ids of offers are 32 bits wide; other payloads are numbered above them.
const FIRST_PAYLOAD: u64 = 1 << 32;

impl Rx {
    pub fn new(leftover: Vec<u8>, max_payload: u64) -> Self {
        let end = leftover.len();
        let mut buffer = leftover;
        buffer.resize(end.max(BUFFER_BYTES), 0);
        Rx {
            buffer: buffer.into_boxed_slice(),
            start: 0,
            end,
            body: None,
            lanes: Default::default(),
            offers: HashMap::new(),
            unprocessed: end > 0,
            max_payload,
            next_payload: FIRST_PAYLOAD,
            parcels_received: 0,
            payload_bytes_received: 0,
        }
    }

    /// Whether something can be processed without reading first.
    pub fn has_unprocessed(&self) -> bool {
        self.unprocessed
    }

    /// Whether the stream stands between two parcels.
    pub fn is_between_parcels(&self) -> bool {
        self.start == self.end && self.body.is_none() && self.lanes.iter().all(Option::is_none)
    }

    /// Takes apart what is buffered. After `NeedData` the buffer has room for more.
    pub fn process(
        &mut self,
        budget: &mut Budget,
        tx: &mut Tx,
        sink: &mut dyn Sink,
    ) -> Result<Step, LinkError> {
        self.unprocessed = true;
        loop {
            if self.body.is_some() {
                self.consume_body(budget, sink);
                if self.body.is_some() {
                    break;
                }
                continue;
            }
            if self.start == self.end {
                break;
            }
            if budget.parcels == 0 {
                return Ok(Step::Spent);
            }
            if !self.frame(budget, tx, sink)? {
                break;
            }
        }
        self.unprocessed = false;
        Ok(Step::NeedData)
    }

    /// Moves buffered bytes of the frame under way to where they belong, and ends what is whole.
    fn consume_body(&mut self, budget: &mut Budget, sink: &mut dyn Sink) {
        let Some(body) = &mut self.body else { return };
        let Some(incoming) = &mut self.lanes[body.lane] else {
            return;
        };
        let buffered = &self.buffer[self.start..self.end];
        let take = body.left.min(buffered.len() as u64) as usize;
        if take > 0 {
            if let Some((pieces, _)) = &mut incoming.to {
                // SAFETY: the driver keeps the landing until it is done, and it has as many bytes
                // left as the payload: checked when it was given.
                unsafe { pieces.copy_in(&buffered[..take]) };
            }
            budget.bytes = budget.bytes.saturating_sub(take);
            self.start += take;
            body.left -= take as u64;
            incoming.left -= take as u64;
        }
        if body.left > 0 {
            return;
        }
        let lane = body.lane;
        self.body = None;
        if incoming.left == 0
            && let Some(whole) = self.lanes[lane].take()
            && let Some((_, op)) = whole.to
        {
            report(sink, op, Ok(()));
        }
    }

    /// Processes one frame. `false`: it is not all here.
    fn frame(
        &mut self,
        budget: &mut Budget,
        tx: &mut Tx,
        sink: &mut dyn Sink,
    ) -> Result<bool, LinkError> {
        let buffered = &self.buffer[self.start..self.end];
        let Some(header) = buffered.first_chunk::<HEADER_BYTES>() else {
            return Ok(false);
        };
        let frame = decode(header, self.max_payload).map_err(protocol)?;
        let framing = HEADER_BYTES + usize::from(frame.head_len);
        if buffered.len() < framing {
            return Ok(false);
        }
        let here = buffered.len() - framing;
        match frame.kind {
            FrameKind::Parcel => {
                let whole = frame.len <= here as u64;
                if !whole && frame.len <= INLINE_MAX as u64 {
                    return Ok(false);
                }
                self.eager(&frame, whole, sink)?;
            }
            FrameKind::Start => self.eager(&frame, false, sink)?,
            FrameKind::Offer => self.offer(&frame, tx, sink)?,
            FrameKind::Chunk => {
                self.chunk(&frame)?;
                self.start += framing;
                return Ok(true);
            }
            FrameKind::Pull | FrameKind::Refuse => {
                let mut done = |op| report(sink, op, Ok(()));
                let known = if frame.kind == FrameKind::Pull {
                    tx.pulled(frame.id, &mut done)
                } else {
                    tx.refused(frame.id, &mut done)
                };
                if !known {
                    return Err(protocol("answer to an offer that is not open"));
                }
                self.start += framing;
            }
        }
        budget.parcels -= 1;
        budget.bytes = budget.bytes.saturating_sub(framing);
        Ok(true)
    }

    /// A parcel whose payload follows, now or in chunks.
    fn eager(&mut self, frame: &Frame, whole: bool, sink: &mut dyn Sink) -> Result<(), LinkError> {
        let lane = lane_of(frame.class, false);
        if self.lanes[lane].is_some() {
            return Err(protocol("parcel within another of its class"));
        }
        let head_at = self.start + HEADER_BYTES;
        let payload_at = head_at + usize::from(frame.head_len);
        // Whole payloads are no longer than what is buffered.
        let inline = whole.then(|| &self.buffer[payload_at..payload_at + frame.len as usize]);
        let payload = PayloadId(self.next_payload);
        self.next_payload += 1;
        self.parcels_received += 1;
        self.payload_bytes_received += frame.len;
        let disposition = sink.parcel(Arrival {
            head: &self.buffer[head_at..payload_at],
            len: frame.len,
            payload,
            inline,
            views: None,
            how: How::Eager,
        });
        let to = match disposition {
            Disposition::Taken if whole => None,
            Disposition::Discard => None,
            Disposition::Land { to, op, .. } => Some((landing(&to, frame.len)?, op)),
            Disposition::Fatal(error) => return Err(error),
            Disposition::Taken | Disposition::Hold | Disposition::View => {
                return Err(internal("an eager payload was neither landed nor discarded"));
            }
        };
        self.start = payload_at;
        if let Some(bytes) = inline {
            if let Some((mut pieces, op)) = to {
                // SAFETY: the driver keeps the landing until it is done; it is as long as the
                // payload.
                unsafe { pieces.copy_in(bytes) };
                report(sink, op, Ok(()));
            }
            self.start += bytes.len();
            return Ok(());
        }
        self.lanes[lane] = Some(Incoming { id: 0, to, left: frame.len });
        if frame.kind == FrameKind::Parcel {
            self.body = Some(Body { lane, left: frame.len });
        }
        Ok(())
    }

    fn offer(&mut self, frame: &Frame, tx: &mut Tx, sink: &mut dyn Sink) -> Result<(), LinkError> {
        if self.offers.len() >= OFFERS_MAX || tx.replies_waiting() >= OFFERS_MAX {
            return Err(protocol("too many open offers"));
        }
        let arriving = self.lanes[lane_of(frame.class, true)].as_ref();
        if self.offers.contains_key(&frame.id)
            || arriving.is_some_and(|incoming| incoming.id == frame.id)
        {
            return Err(protocol("an offer's id is in use"));
        }
        let head_at = self.start + HEADER_BYTES;
        let end = head_at + usize::from(frame.head_len);
        self.parcels_received += 1;
        let disposition = sink.parcel(Arrival {
            head: &self.buffer[head_at..end],
            len: frame.len,
            payload: PayloadId(frame.id.into()),
            inline: None,
            views: None,
            how: How::Offer,
        });
        self.start = end;
        match disposition {
            Disposition::Hold => {
                let offered = Offered { class: frame.class, len: frame.len, to: None };
                self.offers.insert(frame.id, offered);
            }
            Disposition::Land { to, op, .. } => {
                let offered = Offered { class: frame.class, len: frame.len, to: None };
                self.offers.insert(frame.id, offered);
                if self.land(frame.id, &to, op, tx)? {
                    report(sink, op, Ok(()));
                }
            }
            Disposition::Discard => tx.reply(FrameKind::Refuse, frame.id),
            Disposition::Taken if frame.len == 0 => tx.reply(FrameKind::Refuse, frame.id),
            Disposition::Fatal(error) => return Err(error),
            Disposition::Taken | Disposition::View => {
                return Err(internal("an offer was neither held, landed nor discarded"));
            }
        }
        Ok(())
    }

    fn chunk(&mut self, frame: &Frame) -> Result<(), LinkError> {
        let lane = lane_of(frame.class, frame.id != 0);
        if self.lanes[lane].is_none() && frame.id != 0 {
            let pulled = self
                .offers
                .get(&frame.id)
                .is_some_and(|offered| offered.to.is_some() && offered.class == frame.class);
            if pulled && let Some(offered) = self.offers.remove(&frame.id) {
                self.payload_bytes_received += offered.len;
                self.lanes[lane] =
                    Some(Incoming { id: frame.id, to: offered.to, left: offered.len });
            }
        }
        match &self.lanes[lane] {
            Some(incoming) if incoming.id == frame.id && frame.len <= incoming.left => {
                self.body = Some(Body { lane, left: frame.len });
                Ok(())
            }
            Some(incoming) if incoming.id == frame.id => {
                Err(protocol("chunk longer than what is left of its payload"))
            }
            _ => Err(protocol("chunk of a payload that is not under way")),
        }
    }

    /// Names where a held offer goes, and pulls it. `true`: it is empty, and thereby landed.
    pub fn land(
        &mut self,
        id: u32,
        to: &Landing,
        op: OpId,
        tx: &mut Tx,
    ) -> Result<bool, LinkError> {
        let Some(offered) = self.offers.get_mut(&id).filter(|offered| offered.to.is_none()) else {
            return Err(internal("landing of a payload that is not held"));
        };
        let pieces = landing(to, offered.len)?;
        tx.reply(FrameKind::Pull, id);
        if offered.len == 0 {
            self.offers.remove(&id);
            return Ok(true);
        }
        offered.to = Some((pieces, op));
        Ok(false)
    }

    /// Refuses a held offer. `false`: there is none with this id.
    pub fn release(&mut self, id: u32, tx: &mut Tx) -> bool {
        let held = self.offers.get(&id).is_some_and(|offered| offered.to.is_none());
        if held {
            self.offers.remove(&id);
            tx.reply(FrameKind::Refuse, id);
        }
        held
    }

    /// Vectors to read into: what is missing of the payload under way, about `limit` bytes at
    /// most, and behind it the buffer. Payloads that nobody wants go to `scratch`.
    pub fn gather(&mut self, limit: usize, scratch: &mut [MaybeUninit<u8>], vectors: &mut IoVecs) {
        self.make_room();
        if let Some(body) = &self.body {
            let want = usize::try_from(body.left).unwrap_or(usize::MAX).min(limit);
            let to = self.lanes[body.lane].as_ref().and_then(|incoming| incoming.to.as_ref());
            let covered = match to {
                Some((pieces, _)) => pieces.gather(want, vectors, IOV_MAX - 1),
                None => {
                    let len = want.min(scratch.len());
                    vectors
                        .push(libc::iovec { iov_base: scratch.as_mut_ptr().cast(), iov_len: len });
                    len
                }
            };
            if (covered as u64) < body.left {
                return;
            }
        }
        vectors.push(io_vec_mut(&mut self.buffer[self.end..]));
    }

    fn make_room(&mut self) {
        let waiting = self.end - self.start;
        if self.buffer.len() > BUFFER_BYTES && waiting < BUFFER_BYTES {
            let mut buffer = vec![0; BUFFER_BYTES].into_boxed_slice();
            buffer[..waiting].copy_from_slice(&self.buffer[self.start..self.end]);
            self.buffer = buffer;
        } else if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
        }
        self.start = 0;
        self.end = waiting;
    }

    /// `bytes` were read into the vectors that `gather` gave.
    pub fn received(&mut self, bytes: usize) {
        let mut rest = bytes;
        if let Some(body) = &mut self.body
            && let Some(incoming) = &mut self.lanes[body.lane]
        {
            let take = body.left.min(bytes as u64);
            if let Some((pieces, _)) = &mut incoming.to {
                pieces.advance(take as usize);
            }
            body.left -= take;
            incoming.left -= take;
            rest -= take as usize;
        }
        self.end += rest;
    }

    /// Gives back what a burst has grown.
    pub fn trim(&mut self) {
        if self.offers.is_empty() && self.offers.capacity() > 0 {
            self.offers = HashMap::new();
        }
    }

    /// Forgets everything; every landing that was not done is named.
    pub fn clear(&mut self, done: &mut dyn FnMut(OpId)) {
        self.body = None;
        self.start = 0;
        self.end = 0;
        self.unprocessed = false;
        let arriving = self.lanes.iter_mut().filter_map(Option::take).map(|incoming| incoming.to);
        let offered = self.offers.drain().map(|(_, offered)| offered.to);
        for (_, op) in arriving.chain(offered).flatten() {
            done(op);
        }
    }
}

fn landing(to: &Landing, len: u64) -> Result<Pieces, LinkError> {
    Pieces::from_landing(to, len)
        .ok_or_else(|| internal("a landing of another length or kind than its payload"))
}
