//! Messages: ordered, whole, under credit; landed as they come, fetched by receives in order.

use std::collections::BTreeMap;

use smallvec::SmallVec;

use super::core::{Core, Life, State};
use super::table::{Slot, Stage, What};
use crate::error::{Error, ErrorKind, Phase};
use crate::link::{
    Arrival, COPIED_MAX, Class, Disposition, How, Landing, OpId, Post, Segment, SegmentMut,
};
use crate::memory::MemoryKind;
use crate::message::{Frame, INLINE_MAX, Message};
use crate::proto::credit::message_cost;
use crate::proto::wire::{Frames, Head, INLINE_LENS_MAX, Lens, OneFrameHead, TABLE_LENS_MAX};

/// How many messages whose tables have left may themselves still be on their way out. A table
/// overtakes what waits for room, its message does not.
const TABLES_OUT_MAX: usize = 32;

/// What a table that has begun counts for besides its lengths.
const TABLE_COST: usize = 16;

/// A sender has tables of at most `max_frames` lengths on their way out at once. On a lane that
/// reorders, those of messages that have left may still be waited for: as much again, and so many
/// tables.
const TABLES_LATE: usize = 1024;

/// Tables that have begun, by the number of their message.
#[derive(Default)]
pub(super) struct Tables {
    begun: BTreeMap<u32, Vec<u64>>,
    /// Lengths in all of them.
    lens: usize,
}

impl Tables {
    /// Whether the limits are kept.
    #[cfg(feature = "fuzzing")]
    pub fn within(&self, max_frames: u32) -> bool {
        let lens: usize = self.begun.values().map(Vec::len).sum();
        // The last table may have been the first over its share.
        lens == self.lens && self.cost() <= Self::cost_max(max_frames) + TABLE_COST
    }

    /// What the tables that have begun may cost.
    fn cost_max(max_frames: u32) -> usize {
        2 * max_frames as usize + TABLES_LATE * TABLE_COST
    }

    fn cost(&self) -> usize {
        self.lens + self.begun.len() * TABLE_COST
    }

    fn take(&mut self, seq: u32) -> Option<Vec<u64>> {
        let table = self.begun.remove(&seq)?;
        self.lens -= table.len();
        Some(table)
    }
}

/// Empty boxes kept for messages on their way.
const BOXES_MAX: usize = 16;

/// Boxes of messages on their way. Some empty ones are kept, so that a steady flow does not
/// allocate.
#[derive(Default)]
#[allow(clippy::vec_box, reason = "a box, once made, is handed on as it is")]
pub(crate) struct Boxes(Vec<Box<Message>>);

impl Boxes {
    fn wrap(&mut self, message: Message) -> Box<Message> {
        let Some(mut empty) = self.0.pop() else { return Box::new(message) };
        *empty = message;
        empty
    }

    pub fn unwrap(&mut self, mut boxed: Box<Message>) -> Message {
        let message = std::mem::take(&mut *boxed);
        if self.0.len() < BOXES_MAX {
            self.0.push(boxed);
        }
        message
    }
}

/// What became of a `send` that was just started.
pub(crate) enum Sent {
    Done,
    Waits(OpId),
}

impl Core {
    /// Sends if that needs no waiting in the queue: `None` if it does. Takes the message out of
    /// `message` unless it is done at once.
    #[inline]
    pub fn try_send(&mut self, message: &mut Option<Message>) -> Result<Option<Sent>, Error> {
        if let Some(error) = self.state.refusal() {
            return Err(error);
        }
        let Some(held) = message.as_ref() else {
            return Err(Error::new(ErrorKind::InvalidInput, Phase::Transfer, "nothing to send"));
        };
        let (cost, short) = (held.cost(), held.short());
        match short {
            // Every link copies it at once.
            Some(bytes) => {
                const { assert!(INLINE_MAX <= COPIED_MAX) };
                self.check_limits(bytes.len(), 1)?;
            }
            None if self.may_leave_at_once(held)? => {}
            None => return Ok(None),
        }
        if !self.state.send_queue.is_empty() || !self.state.message_credit.try_take(cost) {
            return Ok(None);
        }
        let id = self.state.ops.next_id();
        let post = match short {
            Some(bytes) => self.post_one_frame(id, Segment::host(bytes))?,
            None => self.post_message(id, held, held.len_bytes())?,
        };
        match post {
            Post::Done => Ok(Some(Sent::Done)),
            Post::Pending => {
                let message = message.take().map(|message| self.state.boxes.wrap(message));
                let slot = Slot::new(Stage::Posted, What::Send { message, cost });
                Ok(Some(Sent::Waits(self.state.ops.insert(slot))))
            }
            Post::Full => {
                self.state.message_credit.give_back(cost);
                Ok(None)
            }
        }
    }

    /// Whether a message may leave from elsewhere than the queue. An error: the peer does not take it.
    #[inline(never)]
    fn may_leave_at_once(&self, message: &Message) -> Result<bool, Error> {
        let (len, frames) = (message.len_bytes(), message.frame_count());
        self.check_limits(len, frames)?;
        // Inline frames move with the message: unless the link copies them at once, they need an
        // address that stays, which they get in the queue.
        let stable = len <= COPIED_MAX || !message.frames().iter().any(Frame::is_inline);
        // One with a frame table goes from the queue as well: its table leaves once, whatever
        // becomes of the message.
        Ok(stable && frames <= INLINE_LENS_MAX)
    }

    /// Sends, if need be from the queue.
    pub fn start_send(&mut self, message: &mut Option<Message>) -> Result<Sent, Error> {
        if let Some(sent) = self.try_send(message)? {
            return Ok(sent);
        }
        let cost = message.as_ref().map_or(0, Message::cost);
        let held = message.take().map(|message| self.state.boxes.wrap(message));
        let slot = Slot::new(Stage::Queued, What::Send { message: held, cost });
        let id = self.state.ops.insert(slot);
        self.state.send_queue.push_back(id);
        self.flush();
        Ok(Sent::Waits(id))
    }

    /// Whether a send could start now without waiting for credit or for others.
    pub fn can_send(&self, message: &Message) -> bool {
        self.state.send_queue.is_empty() && self.state.message_credit.admits(message.cost())
    }

    #[inline]
    fn check_limits(&self, len: usize, frames: usize) -> Result<(), Error> {
        let limits = &self.state.limits;
        if len as u64 > limits.peer_max_message || frames > limits.peer_max_frames as usize {
            return Err(self.beyond_limits(len, frames));
        }
        Ok(())
    }

    #[cold]
    fn beyond_limits(&self, len: usize, frames: usize) -> Error {
        let limits = &self.state.limits;
        Error::new(
            ErrorKind::LimitExceeded,
            Phase::Transfer,
            format!(
                "a message of {len} bytes in {frames} frames; the peer takes {} bytes in {} frames",
                limits.peer_max_message, limits.peer_max_frames
            ),
        )
        .with_peer(self.state.peer.clone())
        .with_hint("split it, or raise THALWEG_MAX_MESSAGE or THALWEG_MAX_FRAMES at the peer")
    }

    /// Posts the next message in order.
    fn post_message(&mut self, op: OpId, message: &Message, len: usize) -> Result<Post, Error> {
        match message.frames() {
            [frame] => self.post_one_frame(op, frame.segment()),
            _ => self.post_frames(op, message, len),
        }
    }

    /// Posts the next message in order, which has one frame.
    #[inline(always)]
    fn post_one_frame(&mut self, op: OpId, frame: Segment<'_>) -> Result<Post, Error> {
        let len = frame.len;
        let head = OneFrameHead::new(self.state.message_seq);
        let (class, how) = (Class::Message, How::Eager);
        let post = self.post_encoded(op, class, how, head.bytes(), &[frame], len)?;
        self.message_posted(post, len);
        Ok(post)
    }

    /// Posts the next message in order, which has no frame or several.
    fn post_frames(&mut self, op: OpId, message: &Message, len: usize) -> Result<Post, Error> {
        let seq = self.state.message_seq;
        let frames = message.frames();
        let mut lens: SmallVec<[u64; INLINE_LENS_MAX]> = SmallVec::new();
        let mut table_lens = 0;
        let table = if frames.is_empty() {
            Frames::Zero
        } else if frames.len() <= INLINE_LENS_MAX {
            lens.extend(frames.iter().map(|frame| frame.len() as u64));
            Frames::Inline(Lens::new(&lens))
        } else {
            let lane = self.lane_for(Class::Message, len);
            if !self.post_table(seq, frames)?
                || self.lanes.get(lane).is_some_and(|lane| !lane.has_room())
            {
                return Ok(Post::Full);
            }
            table_lens = frames.len();
            Frames::Table { count: frames.len() as u32 }
        };
        let head = Head::Message { seq, frames: table };
        let segments: SmallVec<[Segment<'_>; 8]> = frames.iter().map(Frame::segment).collect();
        let post = self.post(op, Class::Message, How::Eager, &head, &segments, len)?;
        if post == Post::Pending && table_lens > 0 {
            self.state.tables_out.push((op, table_lens));
        }
        self.message_posted(post, len);
        Ok(post)
    }

    /// The next message has been offered to a lane.
    #[inline]
    fn message_posted(&mut self, post: Post, len: usize) {
        if post != Post::Full {
            self.state.message_seq = self.state.message_seq.wrapping_add(1);
            self.state.table_posted = false;
            self.state.stats.messages_sent += 1;
            self.state.stats.message_bytes_sent += len as u64;
        }
    }

    /// Frame lengths that do not fit the head go before it, as control parcels, which come in order
    /// and before what waits for room. `false`: the receiver may still have as many tables of
    /// earlier messages as it takes.
    fn post_table(&mut self, seq: u32, frames: &[Frame]) -> Result<bool, Error> {
        if self.state.table_posted {
            return Ok(true);
        }
        let State { tables_out, ops, limits, .. } = &mut self.state;
        tables_out.retain(|(op, _)| ops.get(*op).is_some());
        let lens_out: usize = tables_out.iter().map(|(_, lens)| lens).sum();
        let lens_max = limits.peer_max_frames as usize;
        if tables_out.len() >= TABLES_OUT_MAX || lens_out + frames.len() > lens_max {
            return Ok(false);
        }
        self.state.table_posted = true;
        let total = frames.len() as u32;
        for (index, part) in frames.chunks(TABLE_LENS_MAX).enumerate() {
            let first = (index * TABLE_LENS_MAX) as u32;
            let lens: SmallVec<[u64; TABLE_LENS_MAX]> =
                part.iter().map(|frame| frame.len() as u64).collect();
            self.control(&Head::MessageTable { seq, total, first, lens: Lens::new(&lens) })?;
        }
        Ok(true)
    }

    /// Posts queued messages in order, until credit or room ends.
    pub(super) fn post_queued_messages(&mut self) -> Result<(), Error> {
        if self.state.message_stuck {
            return Ok(());
        }
        while let Some(&id) = self.state.send_queue.front() {
            let Some(Slot { what: What::Send { message, cost }, .. }) = self.state.ops.get(id)
            else {
                self.state.send_queue.pop_front();
                continue;
            };
            let (cost, held) = (*cost, message.take());
            let Some(held) = held else {
                self.state.send_queue.pop_front();
                continue;
            };
            if !self.state.message_credit.try_take(cost) {
                self.put_message(id, held);
                if !std::mem::replace(&mut self.state.message_credit_asked, true) {
                    self.state.stats.credit_stalls += 1;
                    self.control(&Head::CreditWanted { messages: true, tags: false })?;
                }
                return Ok(());
            }
            let posted = self.post_message(id, &held, held.len_bytes());
            self.put_message(id, held);
            match posted? {
                Post::Full => {
                    self.state.message_credit.give_back(cost);
                    self.state.stats.room_stalls += 1;
                    self.state.message_stuck = true;
                    return Ok(());
                }
                Post::Pending => {
                    if let Some(slot) = self.state.ops.get(id) {
                        slot.stage = Stage::Posted;
                    }
                }
                Post::Done => self.state.finish(id, Ok(())),
            }
            self.state.send_queue.pop_front();
        }
        Ok(())
    }

    fn put_message(&mut self, id: OpId, held: Box<Message>) {
        match self.state.ops.get(id) {
            Some(Slot { what: What::Send { message, .. }, .. }) => *message = Some(held),
            _ => self.state.after.discard_message(*held),
        }
    }

    /// Moves the next message into `to`, which is empty, if it is here. (Moved once only, to where it
    /// stays: it is as long as two cache lines.)
    #[inline]
    pub fn take_message(&mut self, to: &mut Option<Message>) -> bool {
        debug_assert!(to.is_none(), "there is room for one");
        let State { inbox, message_charge, message_starved, .. } = &mut self.state;
        let Some(cost) = inbox.front().map(Message::cost) else { return false };
        // There is nothing in it that has to be dropped.
        std::mem::forget(std::mem::replace(to, inbox.pop_front()));
        message_charge.consume(cost);
        if message_charge.is_due(*message_starved) {
            self.report_consumed();
        }
        true
    }
}

impl State {
    /// Registers a receive that has to wait.
    pub fn wait_for_message(&mut self) -> OpId {
        let id = self.ops.insert(Slot::new(Stage::Queued, What::Recv));
        self.receivers.push_back(id);
        id
    }

    /// Whether this receive is the first in line.
    pub fn is_first_receiver(&self, id: OpId) -> bool {
        self.receivers.front() == Some(&id)
    }

    /// The receive leaves the line; the next one is woken if something is there for it.
    pub fn leave_line(&mut self, id: OpId) {
        if self.receivers.front() == Some(&id) {
            self.receivers.pop_front();
        } else if let Some(at) = self.receivers.iter().position(|waiting| *waiting == id) {
            self.receivers.remove(at);
        }
        self.free(id);
        if !self.inbox.is_empty() {
            self.message_is_here();
        } else if !matches!(self.life, Life::Open) {
            // The next one learns of the end.
            self.wake_receiver();
        }
    }

    pub fn has_receivers(&self) -> bool {
        !self.receivers.is_empty()
    }

    fn wake_receiver(&mut self) {
        if let Some(&first) = self.receivers.front()
            && let Some(waker) = self.ops.get(first).and_then(|slot| slot.waker.take())
        {
            self.after.wake(waker);
        }
    }

    pub(super) fn on_table(
        &mut self,
        seq: u32,
        total: u32,
        first: u32,
        lens: Lens<'_>,
    ) -> Result<(), Disposition> {
        if total > self.limits.max_frames {
            return Err(State::protocol(format!(
                "a message of {total} frames; the limit is {}",
                self.limits.max_frames
            )));
        }
        if first == 0 {
            // A message that was withdrawn after its table had left gives way to the next one.
            self.tables.take(seq);
        }
        let all = self.tables.lens + lens.len();
        if self.tables.cost() + lens.len() > Tables::cost_max(self.limits.max_frames) {
            return Err(State::protocol("too many frame tables at once"));
        }
        let table = self.tables.begun.entry(seq).or_default();
        if table.len() != first as usize || table.len() + lens.len() > total as usize {
            return Err(State::protocol("frame tables out of order"));
        }
        table.extend(lens);
        self.tables.lens = all;
        Ok(())
    }

    /// Whether a message with this number would go straight to the inbox now.
    #[inline]
    pub(super) fn in_order(&self, seq: u32) -> bool {
        self.arriving.is_empty()
            && self.tables.begun.is_empty()
            && seq == self.arriving.next()
            && !matches!(self.life, Life::ClosedByPeer(_))
    }

    /// A message of one frame that is here, and whose turn it is.
    #[inline]
    pub(super) fn on_short_message(&mut self, bytes: &[u8]) -> Disposition {
        let len = bytes.len() as u64;
        if len > self.limits.max_message {
            return State::protocol("a message over the limit");
        }
        if let Err(error) = self.message_charge.charge(message_cost(len, 1)) {
            return State::protocol(error.to_string());
        }
        self.stats.messages_received += 1;
        self.stats.message_bytes_received += len;
        self.arriving.pass(self.arriving.next());
        self.inbox.push_back(Message::copy_from_slice(bytes));
        self.message_is_here();
        Disposition::Taken
    }

    /// The inbox has something new: whoever waits for it is told.
    #[inline]
    fn message_is_here(&mut self) {
        if self.receivers.is_empty() {
            self.announce |= !std::mem::replace(&mut self.announced, true);
        } else {
            self.wake_receiver();
        }
        if !self.fences.is_empty() {
            self.answer_fences();
        }
    }

    pub(super) fn on_message(
        &mut self,
        lane: u8,
        seq: u32,
        frames: &Frames<'_>,
        arrival: &mut Arrival<'_>,
    ) -> Disposition {
        if arrival.len > self.limits.max_message {
            return State::protocol(format!(
                "a message of {} bytes; the limit is {}",
                arrival.len, self.limits.max_message
            ));
        }
        let mut lens: SmallVec<[u64; 16]> = SmallVec::new();
        if !matches!(frames, Frames::Table { .. }) {
            self.tables.take(seq);
        }
        match frames {
            Frames::Zero => {}
            Frames::One => lens.push(arrival.len),
            Frames::Inline(table) => lens.extend(table.clone()),
            Frames::Table { count } => match self.tables.take(seq) {
                Some(table) if table.len() == *count as usize => lens = table.into(),
                _ => return State::protocol("a message without its frame table"),
            },
        }
        let sum = lens.iter().try_fold(0u64, |sum, len| sum.checked_add(*len));
        if sum != Some(arrival.len) || lens.len() > self.limits.max_frames as usize {
            return State::protocol("frame lengths that do not add up");
        }
        if let Err(error) = self.message_charge.charge(message_cost(arrival.len, lens.len() as u32))
        {
            return State::protocol(error.to_string());
        }
        if let (Some(views), true) = (arrival.views.as_deref_mut(), arrival.inline.is_none())
            && views.len() == lens.len()
            && views.iter().zip(&lens).all(|(view, len)| view.len as u64 == *len)
        {
            let message = self.views.message(lane, arrival.payload, views);
            return self.message_arrived(seq, message).unwrap_or(Disposition::View);
        }
        if let Some(bytes) = arrival.inline.or((arrival.len == 0).then_some(&[][..])) {
            let message = match lens.as_slice() {
                [_] => Message::copy_from_slice(bytes),
                _ => split(bytes, &lens),
            };
            return self.message_arrived(seq, message).unwrap_or(Disposition::Taken);
        }
        self.land_message(seq, &lens, arrival.len)
    }

    fn land_message(&mut self, seq: u32, lens: &[u64], len: u64) -> Disposition {
        // Now, while the link can be told: nothing can be said when the landing is over.
        if let Err(error) = self.arriving.accepts(seq) {
            return State::protocol(error.to_string());
        }
        let mut message = Message::new();
        for len in lens {
            let frame = usize::try_from(*len).ok().and_then(|len| self.allocate(len));
            let Some(frame) = frame else { return self.no_memory(*len) };
            message.push(frame);
        }
        let message = self.boxes.wrap(message);
        let op = self.ops.insert(Slot::new(Stage::Posted, What::LandMessage { seq, message }));
        // Short frames lie inside the message, which moves when it has landed: they get memory of
        // their own for as long as a link writes to them.
        let Some(Slot { what: What::LandMessage { message, .. }, .. }) = self.ops.get(op) else {
            return self.no_memory(len);
        };
        let mut to = Landing::new();
        for frame in message.frames_mut() {
            frame.make_stable();
            if let Some(bytes) = frame.as_mut_slice()
                && !bytes.is_empty()
            {
                let (ptr, len) = (bytes.as_mut_ptr(), bytes.len());
                to.push(SegmentMut { ptr, len, kind: MemoryKind::Host });
            }
        }
        Disposition::Land { to, op, lasting: true }
    }

    pub(super) fn message_landed(&mut self, id: OpId, result: Result<(), Error>) {
        let Some(Slot { what: What::LandMessage { seq, message }, .. }) = self.ops.remove(id)
        else {
            return;
        };
        if result.is_err() {
            // The endpoint is ending; a half message is nobody's.
            self.after.discard_message(*message);
            return;
        }
        let message = self.boxes.unwrap(message);
        // The number was checked when the message began to arrive. A peer that gives one number to
        // two messages while both land loses the one that ends last, and the credit of it.
        let _ = self.message_arrived(seq, message);
    }

    /// `Some`: what to answer the link instead, because the peer broke the order.
    fn message_arrived(&mut self, seq: u32, message: Message) -> Option<Disposition> {
        self.stats.messages_received += 1;
        self.stats.message_bytes_received += message.len_bytes() as u64;
        let mut any = self.arriving.pass(seq);
        if any {
            self.inbox.push_back(message);
        } else if let Err(error) = self.arriving.insert(seq, message) {
            return Some(State::protocol(error.to_string()));
        } else {
            while let Some(message) = self.arriving.pop() {
                self.inbox.push_back(message);
                any = true;
            }
        }
        if any {
            self.message_is_here();
        }
        None
    }
}

fn split(mut bytes: &[u8], lens: &[u64]) -> Message {
    lens.iter()
        .map(|len| {
            let (frame, rest) = bytes.split_at(*len as usize);
            bytes = rest;
            Frame::copy_from_slice(frame)
        })
        .collect()
}
