//! What an endpoint's lock guards: its lanes, and the state of everything in flight on them.
//!
//! [`Core`] is driven by whoever polls an operation of the endpoint, and by the resident task when
//! nobody does. Links report into [`State`] through the [`Sink`] trait; what follows from a report
//! and needs a lane (answers, landings, queued sends) is done in [`Core::flush`] after the poll.

use std::any::Any;
use std::collections::{BTreeSet, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::task::{Context, Waker};

use smallvec::SmallVec;

use super::direct::{Direct, Ward};
use super::keys::{Keys, RegionUse};
use super::messages::{Boxes, Tables};
use super::spin::SpinTracker;
use super::table::{Slot, Stage, Table, What};
use super::tags::Stray;
use super::view::Views;
use super::waiters::Waiters;
use crate::error::{CloseReason, Error, ErrorKind, LinkError, Phase};
use crate::link::{
    Armed, Arrival, Budget, Check, Class, Disposition, HEAD_MAX, How, Killed, Link, LinkCounters,
    OpId, PayloadId, Post, Progress, Segment, Sink,
};
use crate::memory::Allocator;
use crate::message::{Frame, Message};
use crate::proto;
use crate::proto::credit::{RecvCredit, SendCredit};
use crate::proto::fence::FenceLedger;
use crate::proto::sequence::Sequencer;
use crate::proto::tags::{TagMatcher, Unexpected};
use crate::proto::wire::{Head, HeadBuf, one_frame_seq};
use crate::stats::Stats;

const _: () = assert!(HEAD_MAX == proto::wire::HEAD_MAX);

/// One-sided operations of one endpoint that may be on their way at once; more wait here. The
/// target refuses a peer that exceeds it.
pub(super) const ONE_SIDED_MAX: usize = 1024;

/// Frames of at least this many bytes come from the node's allocator; shorter ones from the heap.
const POOLED_MIN: usize = 4096;

/// What both sides may expect of each other, from the hellos and the configuration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Credit that the peer gives us.
    pub peer_message_window: u64,
    pub peer_tag_window: u64,
    /// What the peer accepts.
    pub peer_max_message: u64,
    pub peer_max_frames: u32,
    /// What we give and accept.
    pub message_window: u64,
    pub tag_window: u64,
    pub max_message: u64,
    pub max_frames: u32,
    pub eager_max: usize,
    /// The peer's version knows of direct access to regions.
    pub direct: bool,
}

/// Things to do once the lock is released: user code may hide in them.
#[derive(Default)]
pub(crate) struct After {
    wakers: SmallVec<[Waker; 2]>,
    /// Wakers that others have taken the place of: with every poll, where a runtime's wakers do
    /// not know each other again, so without allocation.
    stale: SmallVec<[Waker; 2]>,
    garbage: SmallVec<[Garbage; 1]>,
    wards: Vec<Ward>,
    /// Whether any of these has something in it: one look instead of four for each operation.
    any: bool,
}

#[allow(dead_code, reason = "held for their drop")]
enum Garbage {
    Slot(Slot),
    Any(Box<dyn Any + Send>),
    Use(RegionUse),
    Message(Message),
    Frame(Frame),
}

impl After {
    pub fn wake(&mut self, waker: Waker) {
        self.any = true;
        self.wakers.push(waker);
    }

    pub fn discard_waker(&mut self, waker: Waker) {
        self.any = true;
        self.stale.push(waker);
    }

    pub fn discard_slot(&mut self, slot: Slot) {
        self.any = true;
        self.garbage.push(Garbage::Slot(slot));
    }

    pub fn discard_any(&mut self, any: Box<dyn Any + Send>) {
        self.any = true;
        self.garbage.push(Garbage::Any(any));
    }

    pub fn discard_use(&mut self, used: RegionUse) {
        self.any = true;
        self.garbage.push(Garbage::Use(used));
    }

    pub fn discard_message(&mut self, message: Message) {
        self.any = true;
        self.garbage.push(Garbage::Message(message));
    }

    pub fn discard_frame(&mut self, frame: Frame) {
        self.any = true;
        self.garbage.push(Garbage::Frame(frame));
    }

    pub fn keep(&mut self, ward: Ward) {
        self.any = true;
        self.wards.push(ward);
    }

    /// What the resident task is to poll until it is over.
    pub fn take_wards(&mut self) -> Vec<Ward> {
        std::mem::take(&mut self.wards)
    }

    #[inline]
    pub fn is_empty(&self) -> bool {
        !self.any
    }

    /// Runs it. Never under a lock.
    pub fn run(self) {
        for waker in self.wakers {
            waker.wake();
        }
        drop(self.stale);
        drop(self.garbage);
    }
}

/// How far the end of the endpoint has come.
#[derive(Debug)]
pub(crate) enum Life {
    Open,
    /// This side wants to close: what is queued still goes out.
    Closing(CloseReason),
    /// The goodbye has been posted; the peer's answer is awaited.
    CloseSent(CloseReason),
    /// The peer has said goodbye and our answer has been posted; lanes end when it is out.
    ClosedByPeer(CloseReason),
    /// Over. Every operation gets this error.
    Dead(Error),
}

/// A control parcel that waits for the next flush.
pub(super) enum Control {
    PutDone { id: u32, status: proto::wire::Status },
    GetFailed { id: u32, status: proto::wire::Status },
    FenceDone { id: u32 },
    CloseDone,
    Refused { key: u64 },
}

/// The peer's get, validated, that waits for room on the lane.
pub(super) struct Reply {
    pub id: u32,
    pub used: RegionUse,
    pub offset: u64,
    pub len: usize,
}

pub(crate) struct State {
    pub limits: Limits,
    pub peer: String,
    pub ops: Table,
    pub after: After,
    pub life: Life,
    pub stats: Stats,
    pub(super) keys: Arc<Keys>,
    allocator: Arc<dyn Allocator>,
    /// Counts drives, so that the watch can tell whether anybody drives.
    pub activity: u64,

    // Messages out.
    pub(super) send_queue: VecDeque<OpId>,
    pub(super) boxes: Boxes,
    pub(super) message_credit: SendCredit,
    pub(super) message_seq: u32,
    /// The frame table of the message at the head of the queue has left.
    pub(super) table_posted: bool,
    /// Messages on their way out that have a frame table, and how many lengths are in it.
    pub(super) tables_out: Vec<(OpId, usize)>,
    /// The message at the head of the queue found no room, and nothing has moved since: trying
    /// again is in vain, and not cheap for thousands of frames.
    pub(super) message_stuck: bool,
    // Messages in.
    pub(super) arriving: Sequencer<Message>,
    pub(super) inbox: VecDeque<Message>,
    pub(super) receivers: VecDeque<OpId>,
    pub(super) message_charge: RecvCredit,
    pub(super) message_starved: bool,
    pub(super) tables: Tables,
    /// Asked again for message credit since the last grant.
    pub(super) message_credit_asked: bool,
    /// The node's `recv_any` is to be told when the lock is released.
    pub announce: bool,
    /// It has been told, and has not looked since.
    pub announced: bool,
    /// Makes messages of views.
    pub(super) views: Views,

    // Tags out.
    pub(super) tag_queue: VecDeque<OpId>,
    pub(super) tag_credit: SendCredit,
    pub(super) tag_seq: u32,
    // Tags in.
    pub(super) matcher: TagMatcher<OpId, Stray>,
    pub(super) early_tags: Sequencer<(u64, Stray)>,
    pub(super) deliveries: Vec<(OpId, Unexpected<Stray>)>,
    pub(super) tag_charge: RecvCredit,
    pub(super) tag_starved: bool,
    pub(super) tag_credit_asked: bool,

    // One-sided.
    pub(super) one_sided_queue: VecDeque<OpId>,
    pub(super) one_sided_posted: usize,
    pub(super) one_sided_number: u64,
    /// Numbers of the one-sided operations that are not over, for fences.
    pub(super) one_sided_open: BTreeSet<u64>,
    pub(super) replies: VecDeque<Reply>,
    /// The peer's one-sided operations in progress here.
    pub(super) serving: usize,
    pub(super) fences: FenceLedger,
    /// Fences that wait until what was queued before them has been posted or withdrawn.
    pub(super) fence_queue: VecDeque<OpId>,
    /// Fences whose answer is awaited.
    pub(super) local_fences: Vec<OpId>,
    /// Refusals of puts whose memory a link still holds.
    pub(super) put_errors: Vec<(OpId, Error)>,
    /// What the link does of them by itself.
    pub(super) direct: Option<Box<Direct>>,

    pub(super) outbox: VecDeque<Control>,
    /// The peer asked for credit, or enough of it is used up: report what there is at the next flush.
    pub(super) credit_due: bool,
    pub end_waiters: Waiters,
    pub spin: SpinTracker,
    /// Open for as long as the endpoint lives. Entered when it ends, never for a message.
    pub span: tracing::Span,
}

pub(crate) type Lanes = SmallVec<[Box<dyn Link>; 1]>;

pub(crate) struct Core {
    pub lanes: Lanes,
    pub state: State,
    /// What the lanes had counted when they were killed.
    final_counters: Option<LinkCounters>,
    settled: bool,
}

/// A sink that knows which lane speaks.
struct LaneSink<'a> {
    state: &'a mut State,
    lane: u8,
}

impl Sink for LaneSink<'_> {
    fn parcel(&mut self, arrival: Arrival<'_>) -> Disposition {
        self.state.parcel(self.lane, arrival)
    }

    fn done(&mut self, op: OpId, result: Result<(), LinkError>) {
        self.state.done(op, result);
    }

    fn wake(&mut self, waker: Waker) {
        self.state.after.wake(waker);
    }
}

impl State {
    pub fn new(
        limits: Limits,
        peer: String,
        keys: Arc<Keys>,
        allocator: Arc<dyn Allocator>,
        views: Views,
    ) -> Self {
        State {
            limits,
            peer,
            ops: Table::default(),
            after: After::default(),
            life: Life::Open,
            stats: Stats::default(),
            keys,
            allocator,
            activity: 0,
            send_queue: VecDeque::new(),
            boxes: Boxes::default(),
            message_credit: SendCredit::new(limits.peer_message_window),
            message_seq: 0,
            table_posted: false,
            tables_out: Vec::new(),
            message_stuck: false,
            arriving: Sequencer::new(),
            inbox: VecDeque::new(),
            receivers: VecDeque::new(),
            message_charge: RecvCredit::new(limits.message_window),
            message_starved: false,
            tables: Tables::default(),
            message_credit_asked: false,
            announce: false,
            announced: false,
            views,
            tag_queue: VecDeque::new(),
            tag_credit: SendCredit::new(limits.peer_tag_window),
            tag_seq: 0,
            matcher: TagMatcher::new(),
            early_tags: Sequencer::new(),
            deliveries: Vec::new(),
            tag_charge: RecvCredit::new(limits.tag_window),
            tag_starved: false,
            tag_credit_asked: false,
            one_sided_queue: VecDeque::new(),
            one_sided_posted: 0,
            one_sided_number: 0,
            one_sided_open: BTreeSet::new(),
            replies: VecDeque::new(),
            serving: 0,
            fences: FenceLedger::new(),
            fence_queue: VecDeque::new(),
            local_fences: Vec::new(),
            put_errors: Vec::new(),
            direct: None,
            outbox: VecDeque::new(),
            credit_due: false,
            end_waiters: Waiters::default(),
            spin: SpinTracker::default(),
            span: tracing::Span::none(),
        }
    }

    /// Memory for a received frame.
    pub(super) fn allocate(&self, len: usize) -> Option<Frame> {
        allocate_frame(&*self.allocator, len)
    }

    pub(super) fn protocol(what: impl Into<String>) -> Disposition {
        Disposition::Fatal(LinkError::new(ErrorKind::Protocol, None, what))
    }

    /// The allocator has no memory for a received frame.
    pub(super) fn no_memory(&self, len: u64) -> Disposition {
        // As where it is asked for memory: a panic must not unwind through a link.
        let refusal = AssertUnwindSafe(|| self.allocator.refusal());
        let why = std::panic::catch_unwind(refusal).ok().flatten();
        let why = why.map(|why| format!(": {why}")).unwrap_or_default();
        let detail = format!("no memory for {len} received bytes{why}");
        Disposition::Fatal(LinkError::new(ErrorKind::Resources, None, detail))
    }

    /// Ends an operation: its result waits for the `Op`, or the slot is freed if that is gone.
    pub(super) fn finish(&mut self, id: OpId, result: Result<(), Error>) {
        let Some(slot) = self.ops.get(id) else { return };
        if slot.abandoned {
            if let Some(slot) = self.ops.remove(id) {
                self.after.discard_slot(slot);
            }
            return;
        }
        slot.stage = Stage::Done(result);
        if let Some(waker) = slot.waker.take() {
            self.after.wake(waker);
        }
    }

    /// Frees a slot; what it held is dropped outside of the lock.
    pub(super) fn free(&mut self, id: OpId) {
        if let Some(slot) = self.ops.remove(id) {
            self.after.discard_slot(slot);
        }
    }

    pub(super) fn link_error(&self, error: &LinkError) -> Error {
        match &self.life {
            Life::Dead(error) => error.clone(),
            _ => Error::from_link(error, Phase::Transfer).with_peer(self.peer.clone()),
        }
    }

    /// The error that operations get from now on, if any.
    #[inline]
    pub fn refusal(&self) -> Option<Error> {
        match &self.life {
            Life::Open => None,
            _ => self.refusal_at_end(),
        }
    }

    #[cold]
    fn refusal_at_end(&self) -> Option<Error> {
        match &self.life {
            Life::Open => None,
            Life::Closing(reason) | Life::CloseSent(reason) | Life::ClosedByPeer(reason) => {
                Some(self.closed_error(reason))
            }
            Life::Dead(error) => Some(error.clone()),
        }
    }

    pub(super) fn closed_error(&self, reason: &CloseReason) -> Error {
        Error::new(ErrorKind::Closed, Phase::Transfer, "")
            .with_peer(self.peer.clone())
            .with_close(reason.clone())
    }

    #[inline]
    pub(super) fn parcel(&mut self, lane: u8, arrival: Arrival<'_>) -> Disposition {
        // Short messages of one frame make up most of small traffic; the general way is the same
        // with more steps.
        if let (Some(seq), Some(bytes)) = (one_frame_seq(arrival.head), arrival.inline)
            && self.in_order(seq)
        {
            return self.on_short_message(bytes);
        }
        self.any_parcel(lane, arrival)
    }

    fn any_parcel(&mut self, lane: u8, mut arrival: Arrival<'_>) -> Disposition {
        let head = match Head::decode(arrival.head) {
            Ok(head) => head,
            Err(error) => return State::protocol(format!("bad head: {error}")),
        };
        if matches!(self.life, Life::ClosedByPeer(_)) {
            // Answers to what this side sent before it heard the goodbye: nobody waits for them.
            return match arrival.len == 0 || arrival.inline.is_some() {
                true => Disposition::Taken,
                false => Disposition::Discard,
            };
        }
        match head {
            Head::Message { seq, frames } => self.on_message(lane, seq, &frames, &mut arrival),
            Head::MessageTable { seq, total, first, lens } => {
                without_payload(&arrival, || self.on_table(seq, total, first, lens))
            }
            Head::Tag { seq, tag } => self.on_tag(lane, seq, tag, &arrival),
            Head::Put { id, key, offset } => self.on_put(id, key, offset, &arrival),
            Head::PutDone { id, status } => {
                without_payload(&arrival, || self.on_put_done(id, status))
            }
            Head::Get { id, key, offset, len } => {
                without_payload(&arrival, || self.on_get(id, key, offset, len))
            }
            Head::GetReply { id, status } => self.on_get_reply(id, status, &arrival),
            Head::Fence { id, messages, tags } => without_payload(&arrival, || {
                self.fences
                    .request(id, messages, tags)
                    .map_err(|error| State::protocol(error.to_string()))?;
                self.answer_fences();
                Ok(())
            }),
            Head::FenceDone { id } => without_payload(&arrival, || self.on_fence_done(id)),
            Head::Credit { messages, tags } => without_payload(&arrival, || {
                self.message_credit_asked = false;
                self.tag_credit_asked = false;
                self.message_credit
                    .grant(messages)
                    .and_then(|()| self.tag_credit.grant(tags))
                    .map_err(|error| State::protocol(error.to_string()))
            }),
            Head::CreditWanted { messages, tags } => without_payload(&arrival, || {
                self.message_starved |= messages;
                self.tag_starved |= tags;
                self.credit_due = true;
                Ok(())
            }),
            Head::Close { code, text } => {
                let reason = CloseReason { code, text: text.to_owned(), by_peer: true };
                without_payload(&arrival, || {
                    self.on_close(reason);
                    Ok(())
                })
            }
            Head::CloseDone => without_payload(&arrival, || self.on_close_done()),
            Head::Wanted { key } => without_payload(&arrival, || self.on_wanted(key)),
            Head::Granted { key, len, access, bytes } => {
                without_payload(&arrival, || self.on_granted(key, len, access, bytes))
            }
            Head::Refused { key } => without_payload(&arrival, || self.on_refused(key)),
            Head::Revoke { key } => without_payload(&arrival, || self.on_revoke(key)),
            Head::Revoked { key } => without_payload(&arrival, || self.on_revoked(key)),
        }
    }

    fn on_close(&mut self, reason: CloseReason) {
        // Both sides closing at once: each answers the other, and each is done with the answer.
        self.answer_goodbye();
        // Whoever says goodbye has finished what it had begun.
        self.release_grants();
        if let Life::Open | Life::Closing(_) = self.life {
            self.life = Life::ClosedByPeer(reason);
            self.fail_queued();
        }
    }

    fn on_close_done(&mut self) -> Result<(), Disposition> {
        let Life::CloseSent(reason) = &self.life else {
            return Err(State::protocol("an answer to a goodbye that was not said"));
        };
        let error = self.closed_error(&reason.clone());
        self.release_grants();
        self.tell_the_end(&error);
        self.life = Life::Dead(error);
        Ok(())
    }

    /// Into the log, inside the endpoint's span.
    fn tell_the_end(&self, error: &Error) {
        let _inside = self.span.enter();
        if error.kind() == ErrorKind::Closed {
            tracing::debug!(peer = %self.peer, %error, "endpoint closed");
        } else {
            // Not a warning: whoever uses the endpoint gets it as an error.
            tracing::info!(peer = %self.peer, %error, "endpoint failed");
        }
    }

    /// Ends every operation that no link is at work on, and wakes the receivers (which still get
    /// what has arrived before they get the error).
    fn fail_queued(&mut self) {
        let Some(error) = self.refusal() else { return };
        self.send_queue.clear();
        self.tag_queue.clear();
        self.one_sided_queue.clear();
        self.local_fences.clear();
        self.fence_queue.clear();
        self.matcher.drain_posted().for_each(drop);
        for id in self.ops.ids() {
            let Some(slot) = self.ops.get(id) else { continue };
            match (&slot.stage, &slot.what) {
                (_, What::Recv) => {
                    if let Some(waker) = slot.waker.take() {
                        self.after.wake(waker);
                    }
                }
                (Stage::Queued, _) => self.finish(id, Err(error.clone())),
                _ => {}
            }
        }
    }

    /// The far side has answered nothing and never will: ends what waits for an answer only.
    fn fail_unanswered(&mut self, error: &Error) {
        for id in self.ops.ids() {
            let Some(slot) = self.ops.get(id) else { continue };
            let over = match &slot.what {
                What::Put { local, .. } => *local,
                What::Get { .. } | What::Fence { .. } | What::TagRecv { .. } => true,
                _ => false,
            };
            if over && !matches!(slot.stage, Stage::Done(_)) {
                self.finish(id, Err(error.clone()));
            }
        }
        self.one_sided_open.clear();
        self.one_sided_posted = 0;
    }

    fn done(&mut self, id: OpId, result: Result<(), LinkError>) {
        let result = result.map_err(|error| self.link_error(&error));
        let Some(slot) = self.ops.get(id) else { return };
        if State::is_direct(slot) {
            return self.direct_over(id, result);
        }
        match &mut slot.what {
            What::Send { .. } | What::TagSend { .. } => self.finish(id, result),
            What::LandMessage { .. } => self.message_landed(id, result),
            What::TagRecv { .. } | What::LandTag { .. } => self.tag_landed(id, result),
            What::Put { .. } => self.put_posted(id, result),
            What::Get { .. } => self.one_sided_over(id, result),
            What::PutIn { .. } => self.put_landed(id, result),
            What::GetOut { .. } => {
                self.serving -= 1;
                self.free(id);
            }
            What::Recv | What::Fence { .. } => {}
        }
    }

    pub(super) fn answer_fences(&mut self) {
        while let Some(id) = self.fences.progress(self.arriving.next(), self.early_tags.next()) {
            self.outbox.push_back(Control::FenceDone { id });
        }
    }

    /// Whether [`Core::flush`] has anything to do.
    #[inline]
    fn needs_flush(&self) -> bool {
        !(self.outbox.is_empty()
            && !self.credit_due
            && self.send_queue.is_empty()
            && self.tag_queue.is_empty()
            && self.one_sided_queue.is_empty()
            && self.replies.is_empty()
            && self.deliveries.is_empty()
            && self.fence_queue.is_empty()
            && self.direct.as_ref().is_none_or(|direct| direct.is_idle())
            && matches!(self.life, Life::Open))
    }
}

/// Memory for a frame; `None` if the allocator has none.
pub(super) fn allocate_frame(allocator: &dyn Allocator, len: usize) -> Option<Frame> {
    if len < POOLED_MIN {
        return Some(Frame::heap(len));
    }
    // A panic must not unwind through a link in the middle of a parcel.
    let allocate = AssertUnwindSafe(|| allocator.allocate(len));
    let memory = std::panic::catch_unwind(allocate).ok().flatten();
    memory.filter(|memory| memory.len() == len).map(Frame::from)
}

/// Heads without payload that come with one are refused.
fn without_payload(
    arrival: &Arrival<'_>,
    act: impl FnOnce() -> Result<(), Disposition>,
) -> Disposition {
    if arrival.len != 0 {
        return State::protocol("a payload where there is none");
    }
    match act() {
        Ok(()) => Disposition::Taken,
        Err(fatal) => fatal,
    }
}

impl Core {
    pub fn new(lanes: Lanes, state: State) -> Self {
        Core { lanes, state, final_counters: None, settled: false }
    }

    /// Polls every lane once and does what follows. Errors end the endpoint and are found in its
    /// state.
    pub fn drive(&mut self, cx: &mut Context<'_>, spinning: bool, budget: &mut Budget) -> Progress {
        self.state.activity = self.state.activity.wrapping_add(1);
        let mut progress = Progress::Idle;
        let Core { lanes, state, .. } = self;
        for (number, lane) in lanes.iter_mut().enumerate() {
            let mut sink = LaneSink { state, lane: number as u8 };
            match lane.poll(cx, spinning, budget, &mut sink) {
                Ok(moved) => progress = progress.max(moved),
                Err(error) => {
                    self.fail_link(&error);
                    return Progress::Some;
                }
            }
        }
        // Not every look of a spinning caller: the last one before it sleeps moved nothing either,
        // and what moved before that was followed by an attempt.
        if progress != Progress::Idle || !spinning {
            self.state.message_stuck = false;
        }
        self.flush();
        if self.state.has_wanted() { Progress::More } else { progress }
    }

    /// Registers the waker with every lane. `Busy`: drive again.
    pub fn arm(&mut self, cx: &mut Context<'_>) -> Armed {
        for lane in 0..self.lanes.len() {
            match self.lanes[lane].arm(cx) {
                Ok(Armed::Yes) => {}
                Ok(Armed::Busy) => return Armed::Busy,
                Err(error) => {
                    self.fail_link(&error);
                    // A lane that lingers has a waker of its own to arm.
                    return if self.lanes.is_empty() { Armed::Yes } else { Armed::Busy };
                }
            }
        }
        Armed::Yes
    }

    fn fail_link(&mut self, error: &LinkError) {
        let gone = matches!(error.kind, ErrorKind::PeerGone | ErrorKind::ConnectionLost);
        let error = match &self.state.life {
            // A peer that has said goodbye, or was told, may hang up first.
            Life::ClosedByPeer(reason) | Life::CloseSent(reason) if gone => {
                self.state.closed_error(reason)
            }
            Life::Dead(_) => return self.end(),
            _ => self.state.link_error(error),
        };
        self.fail(error);
    }

    /// Ends the endpoint: every operation gets `error` (receivers first what has arrived).
    pub fn fail(&mut self, error: Error) {
        if !matches!(self.state.life, Life::Dead(_)) {
            self.state.tell_the_end(&error);
            self.state.life = Life::Dead(error);
        }
        self.end();
    }

    /// Kills the lanes of a dead endpoint and settles all operations.
    fn end(&mut self) {
        let Life::Dead(error) = &self.state.life else { return };
        let error = error.clone();
        if self.final_counters.is_none() {
            self.final_counters = Some(self.counters());
        }
        let mut link_error = LinkError::new(error.kind(), error.link(), "");
        link_error.os = error.os_code();
        // A lane that lingers stays, and with it what it may still touch.
        let mut is_waited_for = false;
        for (lane, mut link) in std::mem::take(&mut self.lanes).into_iter().enumerate() {
            let mut sink = LaneSink { state: &mut self.state, lane: lane as u8 };
            match link.kill(&link_error, &mut sink) {
                Killed::Over => self.part_with(link),
                Killed::Lingers => {
                    is_waited_for = true;
                    self.lanes.push(link);
                }
                Killed::Keeps => self.lanes.push(link),
            }
        }
        self.cut_overdue();
        self.state.deliveries.clear();
        self.state.outbox.clear();
        for reply in self.state.replies.drain(..) {
            self.state.after.discard_use(reply.used);
        }
        self.state.fail_queued();
        if is_waited_for {
            // What is left ends when no lane touches it any more; the next drive looks again.
            return;
        }
        self.settled = true;
        self.state.fail_unanswered(&error);
        self.wake_end_waiters();
        if !self.lanes.is_empty() {
            return;
        }
        // A subscriber's code runs when it closes: not under the lock.
        let span = std::mem::replace(&mut self.state.span, tracing::Span::none());
        self.state.after.discard_any(Box::new(span));
    }

    /// Wakes those who wait for the end.
    pub fn wake_end_waiters(&mut self) {
        for waker in self.state.end_waiters.take() {
            self.state.after.wake(waker);
        }
    }

    /// Whether the lanes are gone.
    pub fn ended(&self) -> bool {
        self.lanes.is_empty()
    }

    /// Whether it is dead and all its operations are over. A lane may still be there, for the sake
    /// of memory that is the driver's own.
    pub fn settled(&self) -> bool {
        self.settled
    }

    pub fn counters(&self) -> LinkCounters {
        self.final_counters.unwrap_or_else(|| {
            self.lanes.iter().map(|lane| lane.counters()).fold(LinkCounters::default(), add)
        })
    }

    /// The lane of a family, kind and size. One lane carries everything so far.
    #[inline]
    pub(super) fn lane_for(&self, _class: Class, _len: usize) -> usize {
        0
    }

    /// Posts a parcel; a link's error ends the endpoint and is returned.
    pub(super) fn post(
        &mut self,
        op: OpId,
        class: Class,
        how: How,
        head: &Head<'_>,
        payload: &[Segment<'_>],
        len: usize,
    ) -> Result<Post, Error> {
        let mut encoded = HeadBuf::new();
        head.encode(&mut encoded);
        self.post_encoded(op, class, how, &encoded, payload, len)
    }

    #[inline]
    pub(super) fn post_encoded(
        &mut self,
        op: OpId,
        class: Class,
        how: How,
        head: &[u8],
        payload: &[Segment<'_>],
        len: usize,
    ) -> Result<Post, Error> {
        let lane = self.lane_for(class, len);
        let Some(link) = self.lanes.get_mut(lane) else {
            return Err(self.no_lane());
        };
        let posted = link.post(op, class, how, head, payload);
        self.posted(posted)
    }

    /// What a lane has answered; its error ends the endpoint.
    #[inline]
    pub(super) fn posted(&mut self, posted: Result<Post, LinkError>) -> Result<Post, Error> {
        posted.map_err(|error| self.lane_failed(&error))
    }

    #[cold]
    fn lane_failed(&mut self, error: &LinkError) -> Error {
        self.fail_link(error);
        self.no_lane()
    }

    /// What operations get that find no lane.
    #[cold]
    fn no_lane(&self) -> Error {
        self.state.refusal().unwrap_or_else(|| {
            let error = Error::new(ErrorKind::Closed, Phase::Transfer, "no lane is up");
            error.with_peer(&*self.state.peer)
        })
    }

    #[cold]
    pub(super) fn control(&mut self, head: &Head<'_>) -> Result<(), Error> {
        let post = self.post(OpId::NONE, Class::Control, How::Eager, head, &[], 0)?;
        debug_assert_ne!(post, Post::Full, "control always has room");
        Ok(())
    }

    /// Does what waits for a lane. Stops at the first thing that finds no room.
    #[inline]
    pub fn flush(&mut self) {
        if self.state.needs_flush() {
            self.flush_slow();
        }
    }

    fn flush_slow(&mut self) {
        if self.lanes.is_empty() || matches!(self.state.life, Life::Dead(_)) {
            return self.end();
        }
        // Each step ends the endpoint itself when a lane fails; nothing is left to do then.
        let _ = self.flush_steps();
    }

    fn flush_steps(&mut self) -> Result<(), Error> {
        self.deliver_tags()?;
        if std::mem::take(&mut self.state.credit_due) {
            self.grant_credit();
        }
        while let Some(control) = self.state.outbox.pop_front() {
            self.control(&match control {
                Control::PutDone { id, status } => Head::PutDone { id, status },
                Control::GetFailed { id, status } => Head::GetReply { id, status },
                Control::FenceDone { id } => Head::FenceDone { id },
                Control::CloseDone => Head::CloseDone,
                Control::Refused { key } => Head::Refused { key },
            })?;
        }
        self.serve_direct()?;
        self.post_replies()?;
        self.post_queued_tags()?;
        self.post_queued_one_sided()?;
        self.post_queued_messages()?;
        self.post_fences()?;
        self.advance_close()
    }

    /// Reports consumed bytes to the peer, if it is time.
    #[inline]
    pub(super) fn grant_credit(&mut self) {
        let State { message_charge, message_starved, tag_charge, tag_starved, .. } = &self.state;
        if message_charge.is_due(*message_starved) || tag_charge.is_due(*tag_starved) {
            self.report_consumed();
        }
    }

    #[cold]
    pub(super) fn report_consumed(&mut self) {
        let state = &mut self.state;
        let messages = state.message_charge.take_due(state.message_starved);
        let tags = state.tag_charge.take_due(state.tag_starved);
        // A peer that still lacks credit asks again.
        state.message_starved &= messages.is_none();
        state.tag_starved &= tags.is_none();
        let head = Head::Credit {
            messages: state.message_charge.reported(),
            tags: state.tag_charge.reported(),
        };
        state.stats.credit_grants_sent += 1;
        // A failure has ended the endpoint already.
        let _ = self.control(&head);
    }

    /// Begins to close. What was queued before still goes out.
    pub fn close(&mut self, reason: CloseReason) {
        if matches!(self.state.life, Life::Open) {
            self.state.life = Life::Closing(reason);
            self.state.refuse_replies();
            // Receives and fences cannot end well any more; sends can.
            let error = self.state.refusal();
            for id in self.state.ops.ids() {
                let Some(slot) = self.state.ops.get(id) else { continue };
                match (&slot.stage, &slot.what) {
                    (_, What::Recv) => {
                        if let Some(waker) = slot.waker.take() {
                            self.state.after.wake(waker);
                        }
                    }
                    (Stage::Queued, What::TagRecv { .. }) => {
                        self.state.matcher.withdraw(id);
                        if let Some(error) = &error {
                            self.state.finish(id, Err(error.clone()));
                        }
                    }
                    _ => {}
                }
            }
            self.flush();
        }
    }

    /// Whether everything that was handed over so far has left and been let go of. What the peer
    /// gets does not count: it could go on for ever.
    pub fn drained(&self) -> bool {
        let state = &self.state;
        state.send_queue.is_empty()
            && state.tag_queue.is_empty()
            && state.one_sided_queue.is_empty()
            && state.one_sided_open.is_empty()
            && !state.ops.any_posted_send()
            && self.lanes.iter().all(|lane| lane.flushed())
    }

    fn advance_close(&mut self) -> Result<(), Error> {
        match &self.state.life {
            Life::Closing(reason) if self.drained() => {
                let reason = reason.clone();
                self.control(&Head::Close { code: reason.code, text: &reason.text })?;
                self.state.life = Life::CloseSent(reason);
            }
            Life::ClosedByPeer(reason)
                if self.state.outbox.is_empty()
                    && !self.state.owes_goodbye()
                    && self.lanes.iter().all(|l| l.flushed()) =>
            {
                let error = self.state.closed_error(&reason.clone());
                self.fail(error);
            }
            Life::Dead(_) => self.end(),
            _ => {}
        }
        Ok(())
    }

    pub fn release(&mut self, lane: u8, payload: PayloadId) {
        if let Some(link) = self.lanes.get_mut(usize::from(lane)) {
            link.release(payload);
        }
    }
}

/// How often the end of an endpoint that nobody drives looks whether its lanes are over.
const LAST_LOOKS: usize = 100;

impl Drop for Core {
    fn drop(&mut self) {
        if self.lanes.is_empty() {
            return;
        }
        let error = self.no_lane();
        // Each look waits a little itself while a lane lingers.
        for _ in 0..LAST_LOOKS {
            self.fail(error.clone());
            if self.lanes.is_empty() {
                return;
            }
        }
        tracing::error!(peer = %self.state.peer, "memory that a lane may still touch is left");
        std::mem::forget(std::mem::take(&mut self.state.ops));
        std::mem::forget(self.state.direct.take());
    }
}

fn add(a: LinkCounters, b: LinkCounters) -> LinkCounters {
    LinkCounters {
        parcels_sent: a.parcels_sent + b.parcels_sent,
        parcels_received: a.parcels_received + b.parcels_received,
        inline_bytes_sent: a.inline_bytes_sent + b.inline_bytes_sent,
        inline_bytes_received: a.inline_bytes_received + b.inline_bytes_received,
        loaned_bytes_sent: a.loaned_bytes_sent + b.loaned_bytes_sent,
        loaned_bytes_received: a.loaned_bytes_received + b.loaned_bytes_received,
        single_copy_bytes_received: a.single_copy_bytes_received + b.single_copy_bytes_received,
        single_copy_bytes_sent: a.single_copy_bytes_sent + b.single_copy_bytes_sent,
        arena_bytes_sent: a.arena_bytes_sent + b.arena_bytes_sent,
        arena_bytes_received: a.arena_bytes_received + b.arena_bytes_received,
        rdma_bytes_sent: a.rdma_bytes_sent + b.rdma_bytes_sent,
        rdma_bytes_received: a.rdma_bytes_received + b.rdma_bytes_received,
        rail_bytes_received: std::array::from_fn(|rail| {
            a.rail_bytes_received[rail] + b.rail_bytes_received[rail]
        }),
        registrations: a.registrations + b.registrations,
        registrations_reused: a.registrations_reused + b.registrations_reused,
        registrations_refused: a.registrations_refused + b.registrations_refused,
        wakes_sent: a.wakes_sent + b.wakes_sent,
        stalls: a.stalls + b.stalls,
    }
}

impl State {
    /// Takes a send out of the queue.
    pub(super) fn unqueue_send(&mut self, id: OpId) {
        if let Some(at) = self.send_queue.iter().position(|queued| *queued == id) {
            self.send_queue.remove(at);
            if at == 0 {
                // Its frame table may have left; whoever takes its number sends its own.
                self.table_posted = false;
                self.message_stuck = false;
            }
        }
    }

    /// Withdraws a tagged send that has not been posted. `true`: the slot is gone.
    pub(super) fn withdraw_tag_send(&mut self, id: OpId) -> bool {
        match self.ops.get(id) {
            Some(Slot { stage: Stage::Queued, .. }) => {
                if let Some(at) = self.tag_queue.iter().position(|queued| *queued == id) {
                    self.tag_queue.remove(at);
                }
                self.free(id);
                true
            }
            Some(_) => false,
            None => true,
        }
    }

    /// The `Op` is gone: its slot keeps what it owned until the operation is over.
    pub(super) fn abandon_slot(&mut self, id: OpId, orphan: Option<Box<dyn Any + Send>>) {
        let Some(slot) = self.ops.get(id) else {
            if let Some(orphan) = orphan {
                self.after.discard_any(orphan);
            }
            return;
        };
        slot.orphan = orphan;
        slot.abandoned = true;
        if let Some(waker) = slot.waker.take() {
            self.after.discard_waker(waker);
        }
        if matches!(self.ops.get(id), Some(Slot { stage: Stage::Done(_), .. })) {
            self.free(id);
        }
    }

    /// Whether no message is here or landing: an ended endpoint will not have another.
    pub(super) fn nothing_left_to_receive(&self) -> bool {
        self.inbox.is_empty()
    }
}

impl Core {
    /// Asks the lanes whether the peer has fallen silent.
    pub fn check(&mut self) -> Check {
        let mut all = Check::Quiet;
        for lane in 0..self.lanes.len() {
            match (all, self.lanes[lane].check()) {
                (_, Ok(Check::Drive)) => all = Check::Drive,
                (Check::Quiet, Ok(Check::Owed)) => all = Check::Owed,
                (_, Ok(_)) => {}
                (_, Err(error)) => {
                    self.fail_link(&error);
                    return Check::Quiet;
                }
            }
        }
        all
    }

    /// Whether somebody is to be woken, or told of a message, when the lock is released.
    #[inline]
    pub fn owes_others(&self) -> bool {
        !self.state.after.wakers.is_empty() || self.state.announce
    }

    /// Whether a message is here.
    pub fn has_message(&self) -> bool {
        !self.state.inbox.is_empty()
    }

    /// Tells `recv_any` of what is here, if anything is, whether or not it was told before.
    pub fn announce_again(&mut self) {
        self.state.announced = self.has_message();
        self.state.announce = self.state.announced;
    }

    /// Lets an operation go on without anybody waiting for it.
    pub fn detach(&mut self, id: OpId) {
        self.state.abandon_slot(id, None);
    }

    pub fn stats(&self, link: crate::link::LinkKind) -> Stats {
        Stats {
            message_credit_bytes: self.state.message_credit.available(),
            inbox_bytes: self.state.message_charge.resident(),
            inbox_messages: self.state.inbox.len() as u64,
            operations: self.state.ops.len() as u64,
            granted_keys: self.state.direct.as_ref().map_or(0, |d| d.granted() as u64),
            link: Some(link),
            link_counters: self.counters(),
            ..self.state.stats.clone()
        }
    }
}
