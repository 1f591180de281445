//! Operations as futures. What each kind of them does is in `kinds`.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::core::Core;
use super::endpoint::EndpointShared;
use super::node::NodeShared;
use super::spin::{SPIN_TURN, SPINS_PER_LOOK_AT_CLOCK, Spinner};
use crate::config::Wake;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::link::{Armed, Budget, OpId, Progress};
use crate::runtime::Sleep;

/// Rounds of drive and arm in one poll of a parking operation.
const ROUNDS_PER_POLL: u32 = 8;

/// What starting an operation came to.
pub enum Started {
    /// Over.
    Over(Result<()>),
    /// In the table.
    Waits(Ticket),
}

/// An operation's place in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(pub(crate) OpId);

/// The kinds of operations. Sealed: implemented here only.
pub trait Kind: Unpin {
    /// What the future yields.
    type Output;
    /// What comes back when it is cancelled.
    type Withdrawn;

    /// Whether the operation can be looked at without a place in the table: it takes its place
    /// only when it has to wait.
    #[doc(hidden)]
    const LAZY: bool = false;

    /// Whether the peer owes something while the operation waits.
    #[doc(hidden)]
    const ANSWERED: bool = true;

    /// For lazy operations: what comes of it without waiting in a line, if anything does.
    #[doc(hidden)]
    #[inline]
    fn try_now(&mut self, core: &mut CoreRef<'_>) -> Option<Started> {
        let _ = core;
        None
    }

    /// What has to be done, once, before it starts, and without the endpoint's lock.
    #[doc(hidden)]
    #[inline]
    fn prepare(&mut self, node: NodeRef<'_>) -> Result<()> {
        let _ = node;
        Ok(())
    }

    #[doc(hidden)]
    fn start(&mut self, core: &mut CoreRef<'_>) -> Started;
    /// `Some`: it is over, and out of the table. What it owns or has received is in `self`.
    #[doc(hidden)]
    fn resume(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) -> Option<Result<()>> {
        core.0.state.ops.take_result(ticket.0).map(|(result, _)| result)
    }
    /// `true`: the operation is out of the table and what it owned is in `self` again.
    #[doc(hidden)]
    fn withdraw(&mut self, core: &mut CoreRef<'_>, ticket: Ticket) -> bool;
    /// The operation goes on without its `Op`; what it owned moves into the table.
    #[doc(hidden)]
    fn abandon(&mut self, core: &mut CoreRef<'_>, ticket: Ticket);
    /// What an operation yields that has ended like this. Made once, where it is returned: what
    /// is moved through several hands is written and read again in other pieces each time.
    #[doc(hidden)]
    fn output(&mut self, result: Result<()>) -> Self::Output;
    #[doc(hidden)]
    fn take_back(&mut self) -> Self::Withdrawn;
}

/// The locked core, as an operation sees it.
pub struct CoreRef<'a>(pub(crate) &'a mut Core);

/// The node, as an operation sees it.
#[derive(Clone, Copy)]
pub struct NodeRef<'a>(pub(crate) &'a NodeShared);

/// An operation in flight: a future that owns what it moves.
///
/// Nothing happens until it is first polled; messages, and tagged payloads among themselves, take
/// effect in the order of their first polls. It may be polled from any task, thread or runtime.
///
/// **Cancel safety.** Dropping it at any point is sound and loses nothing: an operation that has
/// not begun is withdrawn, and so is a get of which nothing has come; a receive that has begun
/// finishes, and what came is there for the next matching receive; a send that has begun goes on to
/// its end. What it owned is then kept by the
/// endpoint until nothing uses it, and dropped. To get it back instead, await [`Op::cancel`].
///
/// **Cost.** An operation that can finish at once takes one uncontended lock and no allocation.
#[must_use = "nothing happens until it is awaited"]
pub struct Op<'e, K: Kind> {
    endpoint: &'e Arc<EndpointShared>,
    kind: K,
    ticket: Option<OpId>,
    spinning_since: Option<Instant>,
    /// There once it has spun for a while.
    spinner: Option<Spinner>,
    /// Its waker may be the endpoint's leader.
    led: bool,
    finished: bool,
}

impl<'e, K: Kind> Op<'e, K> {
    pub(crate) fn new(endpoint: &'e Arc<EndpointShared>, kind: K) -> Self {
        Op {
            endpoint,
            kind,
            ticket: None,
            spinning_since: None,
            spinner: None,
            led: false,
            finished: false,
        }
    }

    /// Fails with [`ErrorKind::TimedOut`] if it is not over after this time. An operation that has
    /// not begun, or a get of which nothing has come, is withdrawn then and gives its buffer back;
    /// one whose memory may still be read or written goes on in the background, and the buffer is
    /// dropped when it ends.
    pub fn timeout(self, timeout: Duration) -> Timed<'e, K> {
        let now = Instant::now();
        // A time beyond the clock is as good as none.
        let never = || now + Duration::from_secs(u32::MAX.into());
        self.deadline(now.checked_add(timeout).unwrap_or_else(never))
    }

    /// As [`Op::timeout`], at a point in time.
    pub fn deadline(self, deadline: Instant) -> Timed<'e, K> {
        let sleep = self.endpoint.node.timers.sleep_until(deadline);
        Timed { op: self, sleep, deadline }
    }

    /// Withdraws the operation if it has not begun; otherwise waits until it is over.
    pub fn cancel(self) -> Cancelling<'e, K> {
        Cancelling { op: self }
    }

    /// Looks whether it is over. A lazy operation does not take a place in the table here.
    #[inline]
    fn step(&mut self, core: &mut Core) -> Option<Result<()>> {
        if K::LAZY && self.ticket.is_none() {
            match self.kind.try_now(&mut CoreRef(core))? {
                Started::Over(result) => return Some(result),
                Started::Waits(Ticket(id)) => self.ticket = Some(id),
            }
        }
        self.step_in_place(core)
    }

    /// As `step`, and takes a place if it has none.
    fn step_in_place(&mut self, core: &mut Core) -> Option<Result<()>> {
        match self.ticket {
            Some(id) => self.kind.resume(&mut CoreRef(core), Ticket(id)),
            None => match self.kind.start(&mut CoreRef(core)) {
                Started::Over(result) => Some(result),
                Started::Waits(Ticket(id)) => {
                    self.ticket = Some(id);
                    self.kind.resume(&mut CoreRef(core), Ticket(id))
                }
            },
        }
    }

    /// It is over: what it was to the others ends.
    #[inline]
    fn ends(&mut self) {
        self.finished = true;
        self.spinner = None;
        if let Some(id) = self.ticket.take()
            && self.led
        {
            self.endpoint.pulse.unlead(id);
        }
        // Nobody may be armed now; see `board`.
        self.endpoint.pulse.watch();
    }

    /// Remembers whom to wake.
    fn store_waker(&self, core: &mut Core, cx: &Context<'_>) {
        let Some(slot) = self.ticket.and_then(|id| core.state.ops.get(id)) else { return };
        match &slot.waker {
            Some(known) if known.will_wake(cx.waker()) => {}
            _ => {
                if let Some(old) = slot.waker.replace(cx.waker().clone()) {
                    core.state.after.discard_waker(old);
                }
            }
        }
    }

    #[inline]
    fn poll_op(&mut self, cx: &mut Context<'_>) -> Poll<K::Output> {
        match self.look(cx) {
            Some(result) => Poll::Ready(self.kind.output(result)),
            None => Poll::Pending,
        }
    }

    /// `Some`: it is over. `None`: its waker is called when there is something to look at.
    fn look(&mut self, cx: &mut Context<'_>) -> Option<Result<()>> {
        let endpoint = self.endpoint;
        assert!(!self.finished, "polled after it was ready");
        if endpoint.forked() {
            self.finished = true;
            return Some(Err(forked()));
        }
        if self.ticket.is_none()
            && let Err(error) = self.kind.prepare(NodeRef(&endpoint.node))
        {
            self.finished = true;
            return Some(Err(error));
        }
        let mut core = match self.ticket {
            // Its place in the order is that of its first poll: it must not leave without one.
            None => endpoint.core(),
            Some(_) => endpoint.core_or_queue(cx.waker())?,
        };
        endpoint.pulse.polled();
        if let Some(result) = self.step(&mut core) {
            drop(core);
            self.ends();
            return Some(result);
        }
        let mut lane_cx = Context::from_waker(endpoint.waker());
        let mut spinning = self.may_spin(&mut core);
        let mut rounds = 0;
        let mut turn_began = None;
        loop {
            let mut budget = Budget::TURN;
            let progress = core.drive(&mut lane_cx, spinning, &mut budget);
            if let Some(result) = self.step(&mut core) {
                if spinning && self.spinning_since.is_some() {
                    core.state.spin.paid();
                }
                drop(core);
                self.ends();
                return Some(result);
            }
            rounds += 1;
            if progress == Progress::More || rounds >= ROUNDS_PER_POLL && !spinning {
                return self.yield_now(core, cx);
            }
            if spinning {
                if progress == Progress::Idle {
                    std::hint::spin_loop();
                }
                // Others wait for what this one has found, or for the lock.
                let owing = core.owes_others() || core.is_wanted();
                if !owing && rounds % SPINS_PER_LOOK_AT_CLOCK != 0 {
                    continue;
                }
                let now = Instant::now();
                let since = *self.spinning_since.get_or_insert(now);
                if now.duration_since(since) < endpoint.spin_limit() {
                    let alone = self.spinner.get_or_insert_with(Spinner::new).is_alone();
                    let turn_began = *turn_began.get_or_insert(now);
                    if alone && !owing && now.duration_since(turn_began) < SPIN_TURN {
                        continue;
                    }
                    return self.yield_now(core, cx);
                }
                core.state.spin.failed();
                self.spinning_since = None;
                self.spinner = None;
                spinning = false;
                rounds = 0;
            }
            if let Some(result) = self.step_in_place(&mut core) {
                drop(core);
                self.ends();
                return Some(result);
            }
            self.store_waker(&mut core, cx);
            if let Some(id) = self.ticket {
                self.led = true;
                if let Some(old) = endpoint.pulse.lead(id, cx.waker()) {
                    core.state.after.discard_waker(old);
                }
            }
            if K::ANSWERED {
                // An answer is awaited: the watch, and after it the patrol, see to it that a peer
                // which has fallen silent is noticed.
                endpoint.pulse.watch();
            }
            if core.ended() {
                // Somebody before it in the line has what is left; it is woken after them.
                return None;
            }
            if core.arm(&mut lane_cx) == Armed::Yes && !core.ended() {
                return None;
            }
        }
    }

    /// Lets other tasks run; this one is polled again at once.
    fn yield_now(
        &mut self,
        mut core: super::endpoint::CoreGuard<'_>,
        cx: &Context<'_>,
    ) -> Option<Result<()>> {
        if let Some(result) = self.step_in_place(&mut core) {
            drop(core);
            self.ends();
            return Some(result);
        }
        self.store_waker(&mut core, cx);
        self.endpoint.pulse.yielding();
        drop(core);
        cx.waker().wake_by_ref();
        None
    }

    fn may_spin(&self, core: &mut Core) -> bool {
        match self.endpoint.node.config.wake {
            Wake::Spin => true,
            Wake::Park => false,
            Wake::Adaptive => self.spinning_since.is_some() || core.state.spin.worthwhile(),
        }
    }

    /// Takes the operation out of the table if it has not begun.
    fn try_withdraw(&mut self) -> bool {
        let Some(id) = self.ticket else { return true };
        let mut core = self.endpoint.core();
        let withdrawn = self.kind.withdraw(&mut CoreRef(&mut core), Ticket(id));
        drop(core);
        if withdrawn {
            self.ended_early(id);
        }
        withdrawn
    }

    #[cold]
    fn dropped_early(&mut self) {
        if !self.endpoint.forked() {
            self.abandon();
        }
    }

    fn abandon(&mut self) {
        if let Some(id) = self.ticket {
            let mut core = self.endpoint.core();
            self.kind.abandon(&mut CoreRef(&mut core), Ticket(id));
            core.flush();
            drop(core);
            self.ended_early(id);
        }
    }

    fn ended_early(&mut self, id: OpId) {
        self.ticket = None;
        self.finished = true;
        self.spinner = None;
        self.endpoint.pulse.ended_early(id);
    }
}

pub(crate) fn forked() -> Error {
    Error::new(ErrorKind::Forked, Phase::Transfer, "the node belongs to the parent process")
        .with_hint("make a node in the child")
}

impl<K: Kind> Future for Op<'_, K> {
    type Output = K::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<K::Output> {
        self.poll_op(cx)
    }
}

impl<K: Kind> Unpin for Op<'_, K> {}

impl<K: Kind> Drop for Op<'_, K> {
    #[inline]
    fn drop(&mut self) {
        if self.ticket.is_some() {
            self.dropped_early();
        }
    }
}

/// An operation with a deadline; see [`Op::timeout`].
#[must_use = "nothing happens until it is awaited"]
pub struct Timed<'e, K: Kind> {
    op: Op<'e, K>,
    sleep: Sleep,
    deadline: Instant,
}

impl<K: Kind> Future for Timed<'_, K> {
    type Output = K::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<K::Output> {
        let this = &mut *self;
        if let Poll::Ready(output) = this.op.poll_op(cx) {
            return Poll::Ready(output);
        }
        if Pin::new(&mut this.sleep).poll(cx).is_pending() {
            return Poll::Pending;
        }
        if !this.op.try_withdraw() {
            // It may have ended since the poll above.
            if let Poll::Ready(output) = this.op.poll_op(cx) {
                return Poll::Ready(output);
            }
            this.op.abandon();
        }
        this.op.finished = true;
        let late = this.deadline.elapsed();
        let error = Error::new(
            ErrorKind::TimedOut,
            Phase::Transfer,
            format!("the deadline passed {} µs ago", late.as_micros()),
        )
        .with_link(Some(this.op.endpoint.link))
        .with_peer(this.op.endpoint.peer.address.clone());
        Poll::Ready(this.op.kind.output(Err(error)))
    }
}

impl<K: Kind> Unpin for Timed<'_, K> {}

/// What [`Op::cancel`] came to.
#[derive(Debug)]
pub enum Cancel<B, T> {
    /// It had not begun: it has no effect, and here is what it owned.
    Cancelled(B),
    /// It had begun, and this is how it ended.
    Completed(T),
}

/// See [`Op::cancel`].
#[must_use = "nothing happens until it is awaited"]
pub struct Cancelling<'e, K: Kind> {
    op: Op<'e, K>,
}

impl<K: Kind> Future for Cancelling<'_, K> {
    type Output = Cancel<K::Withdrawn, K::Output>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let op = &mut self.op;
        if op.ticket.is_some() && op.endpoint.forked() {
            return op.poll_op(cx).map(Cancel::Completed);
        }
        if op.try_withdraw() {
            op.finished = true;
            return Poll::Ready(Cancel::Cancelled(op.kind.take_back()));
        }
        op.poll_op(cx).map(Cancel::Completed)
    }
}

impl<K: Kind> Unpin for Cancelling<'_, K> {}
