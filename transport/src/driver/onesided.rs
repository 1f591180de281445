//! Put, get and fence. The target's process serves them: it lands a put in the region, and answers
//! a get out of it, after checking key, bounds and access itself. Where the link can reach the
//! region by itself and the target has granted that, it does instead ([`super::direct`]).

use std::collections::VecDeque;

use smallvec::{SmallVec, smallvec};

use super::core::{Control, Core, Life, ONE_SIDED_MAX, Reply, State};
use super::keys::RegionUse;
use super::table::{RawSegment, Slot, Stage, What};
use crate::error::{Error, ErrorKind, Phase};
use crate::link::{Arrival, Class, Disposition, How, Landing, OpId, Post, RemoteId, Segment};
use crate::proto::keys::{ACCESS_READ, ACCESS_WRITE};
use crate::proto::wire::{Head, Status};

impl Core {
    /// Starts a put or a get, or queues it behind the others.
    pub fn start_one_sided(&mut self, what: OneSided) -> Result<OpId, Error> {
        if let Some(error) = self.state.refusal() {
            return Err(error);
        }
        let number = self.state.one_sided_number;
        self.state.one_sided_number += 1;
        self.state.one_sided_open.insert(number);
        let what = match what {
            OneSided::Put { from, key, offset } => {
                What::Put { from, key, offset, number, local: false, remote: false, direct: false }
            }
            OneSided::Get { to, key, offset } => {
                let (to, len) = (Some(to), to.len);
                What::Get { to, len, key, offset, number, answered: false, direct: false }
            }
        };
        let id = self.state.ops.insert(Slot::new(Stage::Queued, what));
        self.state.one_sided_queue.push_back(id);
        self.flush();
        Ok(id)
    }

    pub(super) fn post_queued_one_sided(&mut self) -> Result<(), Error> {
        while let Some(&id) = self.state.one_sided_queue.front() {
            if self.state.one_sided_posted >= ONE_SIDED_MAX {
                return Ok(());
            }
            let Some(queued) = self.state.ops.get(id).and_then(|slot| Queued::of(&slot.what))
            else {
                self.state.one_sided_queue.pop_front();
                continue;
            };
            let Queued { key, offset, memory, access } = queued;
            let way = self.direct_way(key, offset, memory.len, access);
            let post = match way {
                Some(remote) => self.post_direct(id, queued, remote)?,
                None => self.post_served(id, queued)?,
            };
            if post == Post::Full {
                self.state.stats.room_stalls += 1;
                return Ok(());
            }
            self.state.one_sided_queue.pop_front();
            self.one_sided_began(id, post, way.is_some());
            match way {
                Some(_) => {
                    self.direct_begun(key);
                    if post == Post::Done {
                        self.state.direct_over(id, Ok(()));
                    }
                }
                None => self.want_direct(key)?,
            }
        }
        Ok(())
    }

    /// Has the link reach the region.
    fn post_direct(&mut self, id: OpId, queued: Queued, remote: RemoteId) -> Result<Post, Error> {
        let Queued { memory, offset, access, .. } = queued;
        let link = match self.one_sided() {
            // Nothing is to be moved.
            None => return Ok(Post::Done),
            Some(_) if memory.len == 0 => return Ok(Post::Done),
            Some(link) => link,
        };
        let post = match access {
            ACCESS_WRITE => link.put(id, memory.read(), remote, offset),
            _ => link.get(id, memory.write(memory.len), remote, offset),
        };
        self.posted(post)
    }

    /// Has the target's process do it.
    fn post_served(&mut self, id: OpId, queued: Queued) -> Result<Post, Error> {
        let Queued { key, offset, memory, access } = queued;
        if access == ACCESS_READ {
            let head = Head::Get { id: id.index, key, offset, len: memory.len as u64 };
            // Nothing of the get's own memory is posted: the link has nothing to report.
            return self.post(OpId::NONE, Class::OneSided, How::Eager, &head, &[], 0);
        }
        let head = Head::Put { id: id.index, key, offset };
        let payload: SmallVec<[Segment<'_>; 1]> = match memory.len {
            0 => SmallVec::new(),
            _ => smallvec![memory.read()],
        };
        self.post(id, Class::OneSided, How::Eager, &head, &payload, memory.len)
    }

    /// A put or get has left the queue.
    fn one_sided_began(&mut self, id: OpId, post: Post, by_link: bool) {
        self.state.one_sided_posted += 1;
        let stats = &mut self.state.stats;
        let Some(slot) = self.state.ops.get(id) else { return };
        slot.stage = Stage::Posted;
        match &mut slot.what {
            What::Put { local, direct, from, .. } => {
                *local = post == Post::Done;
                *direct = by_link;
                stats.puts += 1;
                stats.put_bytes += from.len as u64;
                stats.direct_puts += u64::from(by_link);
            }
            What::Get { len, direct, .. } => {
                *direct = by_link;
                stats.gets += 1;
                stats.get_bytes += *len as u64;
                stats.direct_gets += u64::from(by_link);
            }
            _ => {}
        }
    }

    /// Answers the peer's gets.
    pub(super) fn post_replies(&mut self) -> Result<(), Error> {
        while let Some(reply) = self.state.replies.pop_front() {
            let op = self.state.ops.next_id();
            let head = Head::GetReply { id: reply.id, status: Status::Ok };
            let memory = reply.used.range(reply.offset, reply.len);
            let payload: SmallVec<[Segment<'_>; 1]> = match reply.len {
                0 => SmallVec::new(),
                _ => smallvec![memory.read()],
            };
            let post = self.post(op, Class::OneSided, How::Eager, &head, &payload, reply.len);
            match post {
                Ok(Post::Done) => {
                    self.state.serving -= 1;
                    self.state.after.discard_use(reply.used);
                }
                Ok(Post::Pending) => {
                    let what = What::GetOut { _used: reply.used };
                    self.state.ops.insert(Slot::new(Stage::Posted, what));
                }
                Ok(Post::Full) => {
                    self.state.replies.push_front(reply);
                    return Ok(());
                }
                Err(error) => {
                    self.state.after.discard_use(reply.used);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Starts a fence.
    pub fn start_fence(&mut self) -> Result<OpId, Error> {
        if let Some(error) = self.state.refusal() {
            return Err(error);
        }
        let before = self.state.one_sided_number;
        let what = What::Fence { before, remote: false };
        let id = self.state.ops.insert(Slot::new(Stage::Posted, what));
        self.state.fence_queue.push_back(id);
        self.flush();
        Ok(id)
    }

    pub(super) fn post_fences(&mut self) -> Result<(), Error> {
        while let Some(&id) = self.state.fence_queue.front() {
            // Slots are numbered in the order in which they are taken: what was queued before the
            // fence has a lower number. It has left when it was posted, or withdrawn.
            let behind = |queue: &VecDeque<OpId>| {
                queue
                    .front()
                    .is_some_and(|first| (first.generation.wrapping_sub(id.generation) as i32) < 0)
            };
            let state = &self.state;
            if behind(&state.send_queue)
                || behind(&state.tag_queue)
                || state.local_fences.len() >= crate::proto::fence::FENCES_MAX
            {
                return Ok(());
            }
            let (messages, tags) = (state.message_seq, state.tag_seq);
            self.state.fence_queue.pop_front();
            self.control(&Head::Fence { id: id.index, messages, tags })?;
            self.state.local_fences.push(id);
        }
        Ok(())
    }
}

/// A put or get that has not been posted.
#[derive(Clone, Copy)]
struct Queued {
    memory: RawSegment,
    key: u64,
    offset: u64,
    /// What it needs of the region.
    access: u8,
}

impl Queued {
    fn of(what: &What) -> Option<Queued> {
        Some(match *what {
            What::Put { from, key, offset, .. } => {
                Queued { memory: from, key, offset, access: ACCESS_WRITE }
            }
            What::Get { to: Some(to), key, offset, .. } => {
                Queued { memory: to, key, offset, access: ACCESS_READ }
            }
            _ => return None,
        })
    }
}

/// What to start.
pub(crate) enum OneSided {
    Put { from: RawSegment, key: u64, offset: u64 },
    Get { to: RawSegment, key: u64, offset: u64 },
}

impl State {
    pub(super) fn on_put(
        &mut self,
        id: u32,
        key: u64,
        offset: u64,
        arrival: &Arrival<'_>,
    ) -> Disposition {
        let used = match self.serve(key, offset, arrival.len, true) {
            Ok(Ok(used)) => used,
            Ok(Err(status)) => {
                self.outbox.push_back(Control::PutDone { id, status });
                return if arrival.len == 0 { Disposition::Taken } else { Disposition::Discard };
            }
            Err(fatal) => return fatal,
        };
        let len = arrival.len as usize;
        let memory = used.range(offset, len);
        if let Some(bytes) = arrival.inline.or((len == 0).then_some(&[][..])) {
            // SAFETY: `used` keeps the region's memory alive and was checked for bounds and write
            // access. Other writers may race with this one, as with any remote memory: the
            // region's owner was told to expect it, and copies out raw bytes only.
            unsafe { crate::memory::racy_write(memory.ptr, bytes) };
            self.serving -= 1;
            self.after.discard_use(used);
            self.outbox.push_back(Control::PutDone { id, status: Status::Ok });
            return Disposition::Taken;
        }
        let to: Landing = smallvec![memory.write(len)];
        let op = self.ops.insert(Slot::new(Stage::Posted, What::PutIn { id, used }));
        Disposition::Land { to, op, lasting: false }
    }

    /// Admits a one-sided operation of the peer's. The outer error is the peer's breach, the inner
    /// one an answer.
    fn serve(
        &mut self,
        key: u64,
        offset: u64,
        len: u64,
        write: bool,
    ) -> Result<Result<RegionUse, Status>, Disposition> {
        if self.serving >= ONE_SIDED_MAX {
            return Err(State::protocol("too many one-sided operations at once"));
        }
        let used = self.keys.begin(key, offset, len, write);
        self.serving += usize::from(used.is_ok());
        Ok(used)
    }

    pub(super) fn put_landed(&mut self, id: OpId, result: Result<(), Error>) {
        let Some(Slot { what: What::PutIn { id, used }, .. }) = self.ops.remove(id) else { return };
        self.serving -= 1;
        self.after.discard_use(used);
        if result.is_ok() {
            self.outbox.push_back(Control::PutDone { id, status: Status::Ok });
        }
    }

    pub(super) fn on_put_done(&mut self, index: u32, status: Status) -> Result<(), Disposition> {
        let id = self.ops.at_index(index);
        let slot = id.and_then(|id| self.ops.get(id));
        let (
            Some(id),
            Some(Slot { what: What::Put { remote, local, direct: false, .. }, stage, .. }),
        ) = (id, slot)
        else {
            return Err(State::protocol("an answer to a put that was not made"));
        };
        if *remote || !matches!(stage, Stage::Posted) {
            return Err(State::protocol("a second answer to a put"));
        }
        *remote = true;
        if status != Status::Ok {
            // The link may still be about to let go of the memory: that must come first.
            let error = self.refused(status);
            return self.put_refused(id, error);
        }
        if *local {
            self.one_sided_over(id, Ok(()));
        }
        Ok(())
    }

    fn put_refused(&mut self, id: OpId, error: Error) -> Result<(), Disposition> {
        let Some(slot) = self.ops.get(id) else { return Ok(()) };
        let What::Put { local, .. } = &slot.what else { return Ok(()) };
        if *local {
            self.one_sided_over(id, Err(error));
        } else {
            self.put_errors.push((id, error));
        }
        Ok(())
    }

    /// The link has let go of a put's memory.
    pub(super) fn put_posted(&mut self, id: OpId, result: Result<(), Error>) {
        let Some(Slot { what: What::Put { local, remote, .. }, .. }) = self.ops.get(id) else {
            return;
        };
        *local = true;
        let remote = *remote;
        if let Some(at) = self.put_errors.iter().position(|(put, _)| *put == id) {
            let (_, error) = self.put_errors.swap_remove(at);
            self.one_sided_over(id, Err(error));
        } else if remote || result.is_err() {
            self.one_sided_over(id, result);
        }
    }

    pub(super) fn on_get(
        &mut self,
        id: u32,
        key: u64,
        offset: u64,
        len: u64,
    ) -> Result<(), Disposition> {
        // Whoever closes answers no more, or a peer that keeps getting would keep it from closing.
        if !matches!(self.life, Life::Open) {
            self.outbox.push_back(Control::GetFailed { id, status: Status::Closing });
            return Ok(());
        }
        match self.serve(key, offset, len, false)? {
            Ok(used) => self.replies.push_back(Reply { id, used, offset, len: len as usize }),
            Err(status) => self.outbox.push_back(Control::GetFailed { id, status }),
        }
        Ok(())
    }

    /// Gets of the peer's whose answer has not begun are refused.
    pub(super) fn refuse_replies(&mut self) {
        for Reply { id, used, .. } in self.replies.drain(..) {
            self.serving -= 1;
            self.after.discard_use(used);
            self.outbox.push_back(Control::GetFailed { id, status: Status::Closing });
        }
    }

    pub(super) fn on_get_reply(
        &mut self,
        index: u32,
        status: Status,
        arrival: &Arrival<'_>,
    ) -> Disposition {
        let id = self.ops.at_index(index);
        let slot = id.and_then(|id| self.ops.get(id));
        let (
            Some(id),
            Some(Slot { what: What::Get { to, len, answered, direct: false, .. }, stage, .. }),
        ) = (id, slot)
        else {
            return State::protocol("an answer to a get that was not made");
        };
        if !matches!(stage, Stage::Posted) || std::mem::replace(answered, true) {
            return State::protocol("a second answer to a get");
        }
        let (to, len) = (*to, *len);
        if status != Status::Ok {
            if arrival.len != 0 {
                return State::protocol("a refused get with a payload");
            }
            let error = self.refused(status);
            self.one_sided_over(id, Err(error));
            return Disposition::Taken;
        }
        if arrival.len != len as u64 {
            return State::protocol("an answer to a get of another length");
        }
        let Some(to) = to else {
            self.one_sided_over(id, Ok(()));
            let here = arrival.inline.is_some() || len == 0;
            return if here { Disposition::Taken } else { Disposition::Discard };
        };
        if let Some(bytes) = arrival.inline.or((to.len == 0).then_some(&[][..])) {
            // SAFETY: the get's `Op` or slot owns its memory, and no link has been given it.
            unsafe { to.fill(bytes) };
            self.one_sided_over(id, Ok(()));
            return Disposition::Taken;
        }
        Disposition::Land { to: smallvec![to.write(to.len)], op: id, lasting: false }
    }

    fn refused(&self, status: Status) -> Error {
        let (kind, text) = match status {
            Status::KeyUnknown => (ErrorKind::KeyRevoked, "the target does not know this key"),
            Status::OutOfBounds => (ErrorKind::OutOfBounds, "refused by the target"),
            Status::Denied => (ErrorKind::Unsupported, "the region does not grant this access"),
            Status::Resources => (ErrorKind::Resources, "at the target"),
            Status::Closing => (ErrorKind::Closed, "the target is closing"),
            Status::Ok | Status::Other => (ErrorKind::Io, "at the target"),
        };
        Error::new(kind, Phase::Transfer, text).with_peer(self.peer.clone())
    }

    /// A put or get has ended; its number no longer holds up fences.
    pub(super) fn one_sided_over(&mut self, id: OpId, result: Result<(), Error>) {
        let Some(slot) = self.ops.get(id) else { return };
        let (What::Put { number, .. } | What::Get { number, .. }) = &slot.what else { return };
        let number = *number;
        self.one_sided_open.remove(&number);
        self.one_sided_posted = self.one_sided_posted.saturating_sub(1);
        self.finish(id, result);
        self.settle_fences();
    }

    pub(super) fn on_fence_done(&mut self, index: u32) -> Result<(), Disposition> {
        let at = self.local_fences.iter().position(|id| id.index == index);
        let Some(at) = at else {
            return Err(State::protocol("an answer to a fence that was not made"));
        };
        let id = self.local_fences[at];
        if let Some(Slot { what: What::Fence { remote, .. }, .. }) = self.ops.get(id) {
            *remote = true;
        } else {
            self.local_fences.remove(at);
        }
        self.settle_fences();
        Ok(())
    }

    /// Ends the fences whose two conditions hold.
    fn settle_fences(&mut self) {
        let oldest = self.one_sided_open.first().copied().unwrap_or(u64::MAX);
        let mut at = 0;
        while let Some(&id) = self.local_fences.get(at) {
            let over = match self.ops.get(id).map(|slot| &slot.what) {
                Some(What::Fence { before, remote }) => *remote && oldest >= *before,
                // Dropped: the answer is still awaited, so that it is known when it comes.
                _ => false,
            };
            if over {
                self.local_fences.remove(at);
                self.finish(id, Ok(()));
            } else {
                at += 1;
            }
        }
    }

    /// Withdraws a put or get that has not been posted, or a get of which nothing has come: the
    /// target may be stopped, and until it answers nobody has been given the memory. `true`: that
    /// is not used any more.
    pub fn withdraw_one_sided(&mut self, id: OpId) -> bool {
        let Some(slot) = self.ops.get(id) else { return true };
        match (&slot.stage, &mut slot.what) {
            (Stage::Queued, _) => {}
            (Stage::Posted, What::Get { to, answered: false, direct: false, .. }) => {
                *to = None;
                self.abandon_slot(id, None);
                return true;
            }
            _ => return false,
        }
        if let Some(at) = self.one_sided_queue.iter().position(|queued| *queued == id) {
            self.one_sided_queue.remove(at);
        }
        if let What::Put { number, .. } | What::Get { number, .. } = &slot.what {
            let number = *number;
            self.one_sided_open.remove(&number);
        }
        self.free(id);
        self.settle_fences();
        true
    }
}
