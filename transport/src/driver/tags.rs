//! Tags: 64-bit tag and mask, matched in sending order, landed in the receiver's own buffer.

use std::any::Any;

use smallvec::smallvec;

use super::core::{Core, State};
use super::table::{Matched, RawSegment, Slot, Stage, What};
use crate::error::{Error, ErrorKind, Phase};
use crate::link::{Arrival, Class, Disposition, How, Landing, OpId, PayloadId, Post, SegmentMut};
use crate::memory::MemoryKind;
use crate::message::Frame;
use crate::proto::credit::tag_cost;
use crate::proto::tags::Unexpected;
use crate::proto::wire::Head;

/// A tagged payload that no receive has taken.
pub(super) enum Stray {
    /// Still at the sender; the lane holds the offer.
    Held { lane: u8, payload: PayloadId, len: u64 },
    /// Here, in driver memory.
    Here { bytes: Frame, cost: u64 },
    /// On its way into the memory of this slot.
    Landing { slot: OpId, len: usize, cost: u64 },
}

impl Stray {
    fn len(&self) -> u64 {
        match self {
            Stray::Held { len, .. } => *len,
            Stray::Here { bytes, .. } => bytes.len() as u64,
            Stray::Landing { len, .. } => *len as u64,
        }
    }

    /// What was charged for it.
    fn cost(&self) -> u64 {
        match self {
            Stray::Held { .. } => tag_cost(0),
            Stray::Here { cost, .. } | Stray::Landing { cost, .. } => *cost,
        }
    }
}

impl Core {
    /// Starts a tagged send. `None`: it is done.
    pub fn start_tag_send(&mut self, tag: u64, from: RawSegment) -> Result<Option<OpId>, Error> {
        if let Some(error) = self.state.refusal() {
            return Err(error);
        }
        if from.len as u64 > self.state.limits.peer_max_message {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                Phase::Transfer,
                format!(
                    "{} bytes; the peer takes {}",
                    from.len, self.state.limits.peer_max_message
                ),
            )
            .with_peer(self.state.peer.clone())
            .with_hint("split it, or raise THALWEG_MAX_MESSAGE at the peer"));
        }
        let slot = |stage| Slot::new(stage, What::TagSend { from, tag });
        if self.state.tag_queue.is_empty() {
            let id = self.state.ops.next_id();
            match self.post_tag(id, tag, from)? {
                Some(Post::Done) => return Ok(None),
                Some(Post::Pending) => {
                    return Ok(Some(self.state.ops.insert(slot(Stage::Posted))));
                }
                Some(Post::Full) | None => {}
            }
        }
        let id = self.state.ops.insert(slot(Stage::Queued));
        self.state.tag_queue.push_back(id);
        self.flush();
        Ok(Some(id))
    }

    /// `None`: no credit.
    fn post_tag(&mut self, op: OpId, tag: u64, from: RawSegment) -> Result<Option<Post>, Error> {
        let eager_max = self
            .state
            .limits
            .eager_max
            .min(self.lanes.first().map_or(0, |lane| lane.caps().eager_max));
        let len = from.len as u64;
        let (how, cost) = if from.len <= eager_max && self.state.tag_credit.try_take(tag_cost(len))
        {
            (How::Eager, tag_cost(len))
        } else if self.state.tag_credit.try_take(tag_cost(0)) {
            (How::Offer, tag_cost(0))
        } else {
            return Ok(None);
        };
        let seq = self.state.tag_seq;
        let head = Head::Tag { seq, tag };
        let post = self.post(op, Class::Tag, how, &head, &[from.read()], from.len)?;
        if post == Post::Full {
            self.state.tag_credit.give_back(cost);
            self.state.stats.room_stalls += 1;
        } else {
            self.state.tag_seq = seq.wrapping_add(1);
            self.state.stats.tags_sent += 1;
            self.state.stats.tag_bytes_sent += len;
        }
        Ok(Some(post))
    }

    pub(super) fn post_queued_tags(&mut self) -> Result<(), Error> {
        while let Some(&id) = self.state.tag_queue.front() {
            let Some(Slot { what: What::TagSend { from, tag }, .. }) = self.state.ops.get(id)
            else {
                self.state.tag_queue.pop_front();
                continue;
            };
            let (from, tag) = (*from, *tag);
            match self.post_tag(id, tag, from)? {
                Some(Post::Full) => return Ok(()),
                None => {
                    if !std::mem::replace(&mut self.state.tag_credit_asked, true) {
                        self.state.stats.credit_stalls += 1;
                        self.control(&Head::CreditWanted { messages: false, tags: true })?;
                    }
                    return Ok(());
                }
                Some(Post::Done) => self.state.finish(id, Ok(())),
                Some(Post::Pending) => {
                    if let Some(slot) = self.state.ops.get(id) {
                        slot.stage = Stage::Posted;
                    }
                }
            }
            self.state.tag_queue.pop_front();
        }
        Ok(())
    }

    /// Posts a tagged receive; what has come already is taken up by the flush.
    pub fn start_tag_recv(&mut self, tag: u64, mask: u64, to: RawSegment) -> Result<OpId, Error> {
        // A peer that has closed may have sent what is asked for before.
        if let Some(error) = self.state.refusal()
            && self.state.matcher.unexpected_len() == 0
        {
            return Err(error);
        }
        let what = What::TagRecv { to, matched: None, behind: None, heir: None };
        let id = self.state.ops.insert(Slot::new(Stage::Queued, what));
        match self.state.matcher.post(tag, mask, id) {
            Some(stray) => {
                self.state.deliveries.push((id, stray));
                // A failure has ended the endpoint, and with it this receive.
                let _ = self.deliver_tags();
            }
            None => {
                if let Some(error) = self.state.refusal() {
                    self.state.matcher.withdraw(id);
                    self.state.finish(id, Err(error));
                }
            }
        }
        Ok(id)
    }

    /// Hands strays to the receives that they were matched with.
    pub(super) fn deliver_tags(&mut self) -> Result<(), Error> {
        while let Some((recv, stray)) = self.state.deliveries.pop() {
            self.deliver(recv, stray)?;
        }
        self.grant_credit();
        Ok(())
    }

    fn deliver(&mut self, recv: OpId, stray: Unexpected<Stray>) -> Result<(), Error> {
        let state = &mut self.state;
        let Unexpected { seq, tag, value } = stray;
        let Some(Slot { what: What::TagRecv { to, matched, behind, .. }, stage, .. }) =
            state.ops.get(recv)
        else {
            // Withdrawn in the meantime: back to its place.
            state.put_stray_back(seq, tag, value);
            return Ok(());
        };
        let to = *to;
        if value.len() > to.len as u64 {
            let error = state.too_small(value.len(), to.len);
            state.put_stray_back(seq, tag, value);
            state.finish(recv, Err(error));
            return Ok(());
        }
        let len = value.len() as usize;
        *matched = Some(Matched { seq, tag, len });
        *stage = Stage::Posted;
        let cost = value.cost();
        match value {
            Stray::Here { bytes, .. } => {
                // SAFETY: the receive's `Op` or slot owns its memory, no link has been given it,
                // and the length was checked above.
                unsafe { to.fill(bytes.as_slice().unwrap_or_default()) };
                state.after.discard_frame(bytes);
                state.tag_received(recv, len);
            }
            Stray::Landing { slot, .. } => {
                *behind = Some(slot);
                match state.ops.get(slot).map(|slot| &mut slot.what) {
                    Some(What::LandTag { heir, .. } | What::TagRecv { heir, .. }) => {
                        *heir = Some(recv);
                    }
                    _ => {
                        let error = Error::new(ErrorKind::Cancelled, Phase::Transfer, "lost");
                        state.finish(recv, Err(error));
                    }
                }
            }
            Stray::Held { lane, payload, .. } => {
                let landing: Landing =
                    if len == 0 { Landing::new() } else { smallvec![to.write(len)] };
                let Some(link) = self.lanes.get_mut(usize::from(lane)) else {
                    let error = state.refusal();
                    state.finish(recv, error.map_or(Ok(()), Err));
                    return Ok(());
                };
                match link.land(payload, landing, recv) {
                    Ok(Post::Done) => state.tag_received(recv, len),
                    Ok(_) => {}
                    Err(error) => {
                        let error = state.link_error(&error);
                        self.fail(error.clone());
                        return Err(error);
                    }
                }
            }
        }
        self.state.tag_charge.consume(cost);
        Ok(())
    }
}

impl State {
    fn too_small(&self, needed: u64, has: usize) -> Error {
        Error::new(
            ErrorKind::BufferTooSmall,
            Phase::Transfer,
            format!("{needed} bytes came for a buffer of {has}; they wait for a larger one"),
        )
        .with_peer(self.peer.clone())
    }

    fn tag_received(&mut self, recv: OpId, len: usize) {
        self.stats.tags_received += 1;
        self.stats.tag_bytes_received += len as u64;
        self.finish(recv, Ok(()));
    }

    /// Returns a stray to its original place; a receive that matches it now gets it.
    fn put_stray_back(&mut self, seq: u32, tag: u64, value: Stray) {
        if let Some((recv, value)) = self.matcher.put_back(seq, tag, value) {
            self.deliveries.push((recv, Unexpected { seq, tag, value }));
        }
    }

    pub(super) fn on_tag(
        &mut self,
        lane: u8,
        seq: u32,
        tag: u64,
        arrival: &Arrival<'_>,
    ) -> Disposition {
        if arrival.len > self.limits.max_message {
            return State::protocol(format!(
                "a tagged payload of {} bytes; the limit is {}",
                arrival.len, self.limits.max_message
            ));
        }
        let cost = match arrival.how {
            How::Eager => tag_cost(arrival.len),
            How::Offer => tag_cost(0),
        };
        if let Err(error) = self.tag_charge.charge(cost) {
            return State::protocol(error.to_string());
        }
        let in_order = seq == self.early_tags.next();
        if in_order && let Some(disposition) = self.match_directly(seq, tag, cost, arrival) {
            self.tag_placed(seq, None);
            return disposition;
        }
        // Before anything is kept for it: a landing that the lane never hears of would stay.
        if let Err(error) = self.early_tags.accepts(seq) {
            return State::protocol(error.to_string());
        }
        let (stray, disposition) = match self.keep(lane, seq, cost, arrival) {
            Ok(kept) => kept,
            Err(fatal) => return fatal,
        };
        if in_order {
            self.matcher.store(seq, tag, stray);
            self.tag_placed(seq, None);
        } else if let Err(error) = self.early_tags.insert(seq, (tag, stray)) {
            return State::protocol(error.to_string());
        }
        disposition
    }

    /// The common case: a receive is posted and the payload goes straight to it.
    fn match_directly(
        &mut self,
        seq: u32,
        tag: u64,
        cost: u64,
        arrival: &Arrival<'_>,
    ) -> Option<Disposition> {
        loop {
            let recv = self.matcher.arrive(seq, tag)?;
            let Some(Slot { what: What::TagRecv { to, matched, .. }, stage, .. }) =
                self.ops.get(recv)
            else {
                continue;
            };
            let to = *to;
            if arrival.len > to.len as u64 {
                let error = self.too_small(arrival.len, to.len);
                self.finish(recv, Err(error));
                continue;
            }
            let len = arrival.len as usize;
            *matched = Some(Matched { seq, tag, len });
            *stage = Stage::Posted;
            self.tag_charge.consume(cost);
            // Nothing else has to happen here for the sender to go on.
            self.credit_due |= self.tag_charge.is_due(self.tag_starved);
            if let Some(bytes) = arrival.inline.or((len == 0).then_some(&[][..])) {
                // SAFETY: the receive's `Op` or slot owns its memory, no link has been given it,
                // and the length was checked above.
                unsafe { to.fill(bytes) };
                self.tag_received(recv, len);
                return Some(Disposition::Taken);
            }
            return Some(Disposition::Land {
                to: smallvec![to.write(len)],
                op: recv,
                lasting: false,
            });
        }
    }

    /// Keeps a payload for which no receive is posted.
    fn keep(
        &mut self,
        lane: u8,
        seq: u32,
        cost: u64,
        arrival: &Arrival<'_>,
    ) -> Result<(Stray, Disposition), Disposition> {
        if let Some(bytes) = arrival.inline.or((arrival.len == 0).then_some(&[][..])) {
            let bytes = Frame::copy_from_slice(bytes);
            return Ok((Stray::Here { bytes, cost }, Disposition::Taken));
        }
        if arrival.how == How::Offer {
            let stray = Stray::Held { lane, payload: arrival.payload, len: arrival.len };
            return Ok((stray, Disposition::Hold));
        }
        let buffer = usize::try_from(arrival.len).ok().and_then(|len| self.allocate(len));
        let Some(mut buffer) = buffer else { return Err(self.no_memory(arrival.len)) };
        buffer.make_stable();
        let Some((ptr, len)) = buffer.as_mut_slice().map(|b| (b.as_mut_ptr(), b.len())) else {
            return Err(self.no_memory(arrival.len));
        };
        let what = What::LandTag { seq, buffer: Box::new(buffer), heir: None };
        let slot = self.ops.insert(Slot::new(Stage::Posted, what));
        let to = smallvec![SegmentMut { ptr, len, kind: MemoryKind::Host }];
        Ok((Stray::Landing { slot, len, cost }, Disposition::Land { to, op: slot, lasting: false }))
    }

    /// The tag with this number has been placed; those that came early follow in order.
    fn tag_placed(&mut self, seq: u32, value: Option<(u64, Stray)>) {
        // `next` moves only when its own number is inserted and popped.
        let placeholder = value.unwrap_or((0, Stray::Here { bytes: Frame::heap(0), cost: 0 }));
        if self.early_tags.insert(seq, placeholder).is_err() {
            return;
        }
        drop(self.early_tags.pop());
        loop {
            let seq = self.early_tags.next();
            let Some((tag, stray)) = self.early_tags.pop() else { break };
            match self.matcher.arrive(seq, tag) {
                Some(recv) => self.deliveries.push((recv, Unexpected { seq, tag, value: stray })),
                None => self.matcher.store(seq, tag, stray),
            }
        }
        if !self.fences.is_empty() {
            self.answer_fences();
        }
    }

    /// A tagged payload has landed: in its receive, in the memory of an abandoned receive, or in
    /// driver memory.
    pub(super) fn tag_landed(&mut self, id: OpId, result: Result<(), Error>) {
        let Some(slot) = self.ops.get(id) else { return };
        match &mut slot.what {
            What::TagRecv { matched, .. } if !slot.abandoned => {
                let len = matched.map_or(0, |matched| matched.len);
                match result {
                    Ok(()) => self.tag_received(id, len),
                    Err(error) => self.finish(id, Err(error)),
                }
            }
            What::TagRecv { to, matched, heir, .. } => {
                let (to, matched, heir) = (*to, *matched, heir.take());
                if let (Ok(()), Some(matched)) = (&result, matched) {
                    let mut bytes = Frame::heap(matched.len);
                    if let Some(copy) = bytes.as_mut_slice() {
                        // SAFETY: the slot owns the orphaned buffer, the link has just finished
                        // writing its first `len` bytes, and nobody else uses it.
                        unsafe { to.copy_out(copy) };
                    }
                    self.stray_is_here(id, matched.seq, heir, bytes);
                } else if let (Err(error), Some(heir)) = (result, heir) {
                    self.finish(heir, Err(error));
                }
                self.free(id);
            }
            What::LandTag { seq, buffer, heir } => {
                let seq = *seq;
                let bytes = std::mem::replace(&mut **buffer, Frame::heap(0));
                let heir = heir.take();
                match (result, heir) {
                    (Ok(()), heir) => self.stray_is_here(id, seq, heir, bytes),
                    (Err(error), Some(heir)) => self.finish(heir, Err(error)),
                    (Err(_), None) => {}
                }
                self.free(id);
            }
            _ => {}
        }
    }

    /// The bytes that `slot` was landing are in driver memory now: they go to the receive that
    /// waits for them, or to their place among the strays.
    fn stray_is_here(&mut self, slot: OpId, seq: u32, heir: Option<OpId>, bytes: Frame) {
        if let Some(heir) = heir {
            if let Some(Slot { what: What::TagRecv { to, behind, .. }, .. }) = self.ops.get(heir) {
                *behind = None;
                let (to, len) = (*to, bytes.len());
                // SAFETY: the heir's `Op` owns its memory (an heir that is dropped is taken out of
                // the inheritance first), no link has it, and its length was checked when it was
                // matched.
                unsafe { to.fill(bytes.as_slice().unwrap_or_default()) };
                self.tag_received(heir, len);
            }
            self.after.discard_frame(bytes);
            return;
        }
        let is_it = |stray: &Stray| matches!(stray, Stray::Landing { slot: s, .. } if *s == slot);
        let stray = match self.matcher.unexpected_mut(seq) {
            Some(stray) if is_it(stray) => Some(stray),
            _ => match self.early_tags.find_mut(|(_, stray)| is_it(stray)) {
                Some((_, stray)) => Some(stray),
                None => self
                    .deliveries
                    .iter_mut()
                    .map(|(_, delivery)| &mut delivery.value)
                    .find(|stray| is_it(stray)),
            },
        };
        match stray {
            Some(stray) => *stray = Stray::Here { bytes, cost: stray.cost() },
            None => self.after.discard_frame(bytes),
        }
    }

    /// Withdraws a tagged receive that nothing is landing in. `true`: the slot is gone and the
    /// memory is free.
    pub fn withdraw_tag_recv(&mut self, id: OpId) -> bool {
        let Some(Slot { what: What::TagRecv { matched, behind, .. }, stage, .. }) =
            self.ops.get(id)
        else {
            return true;
        };
        match (&stage, *behind, *matched) {
            (Stage::Queued, ..) => {
                self.matcher.withdraw(id);
                self.free(id);
                true
            }
            // Another slot lands the bytes; give the claim back.
            (Stage::Posted, Some(slot), Some(Matched { seq, tag, len })) => {
                if let Some(What::LandTag { heir, .. } | What::TagRecv { heir, .. }) =
                    self.ops.get(slot).map(|slot| &mut slot.what)
                {
                    *heir = None;
                }
                self.free(id);
                self.put_stray_back(seq, tag, Stray::Landing { slot, len, cost: 0 });
                true
            }
            _ => false,
        }
    }

    /// The `Op` of a tagged receive is gone. `buffer` is what it owned: it stays until nothing
    /// writes to it, and what has come for it goes back to its place in the order.
    pub fn abandon_tag_recv(&mut self, id: OpId, buffer: Box<dyn Any + Send>) {
        if self.withdraw_tag_recv(id) {
            self.after.discard_any(buffer);
            return;
        }
        let Some(slot) = self.ops.get(id) else { return };
        let What::TagRecv { to, matched, .. } = &slot.what else { return };
        let (to, matched) = (*to, *matched);
        match (&slot.stage, matched) {
            (Stage::Done(Ok(())), Some(Matched { seq, tag, len })) => {
                let mut bytes = Frame::heap(len);
                if let Some(copy) = bytes.as_mut_slice() {
                    // SAFETY: the operation is over, `buffer` owns the memory and is alive, and
                    // its first `len` bytes were written.
                    unsafe { to.copy_out(copy) };
                }
                self.free(id);
                self.after.discard_any(buffer);
                self.put_stray_back(seq, tag, Stray::Here { bytes, cost: 0 });
            }
            (Stage::Posted, Some(Matched { seq, tag, len })) => {
                slot.abandoned = true;
                slot.orphan = Some(buffer);
                if let Some(waker) = slot.waker.take() {
                    self.after.discard_waker(waker);
                }
                self.put_stray_back(seq, tag, Stray::Landing { slot: id, len, cost: 0 });
            }
            _ => {
                self.free(id);
                self.after.discard_any(buffer);
            }
        }
    }
}
