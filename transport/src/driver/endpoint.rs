//! An endpoint as the driver sees it: the locked core, its pulse, and how both are woken.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use super::board::Pulse;
use super::core::{Core, Lanes, Life, Limits, State};
use super::node::NodeShared;
use super::shard::{Shard, ShardGuard};
use super::sync::{Mutex, lock};
use super::view::Views;
use crate::config::Wake;
use crate::error::{CloseReason, Error, ErrorKind, Phase};
use crate::link::{Armed, Budget, Check, LinkKind, PayloadId, Progress};
use crate::peer::Peer;
use crate::route::Route;

/// How many turns the resident task gives one endpoint before the next one has its turn.
const RESIDENT_TURNS: usize = 4;

pub(crate) struct EndpointShared {
    pub node: Arc<NodeShared>,
    pub peer: Peer,
    pub route: Route,
    pub link: LinkKind,
    pub pulse: Arc<Pulse>,
    waker: Waker,
    core: Shard<Core>,
    /// Views that were dropped while somebody else held the lock.
    released: Mutex<Vec<(u8, PayloadId)>>,
    any_released: AtomicBool,
    settled: AtomicBool,
    ended: AtomicBool,
    /// The window that was taken from the node's budget.
    window_bytes: u64,
    /// Public handles; the endpoint closes with the last. Begins with the one that is owed to
    /// whoever connected or accepts.
    handles: AtomicUsize,
    this: Weak<EndpointShared>,
}

/// The lock, and what is to be done when it is released.
pub(crate) struct CoreGuard<'a> {
    endpoint: &'a EndpointShared,
    guard: Option<ShardGuard<'a, Core>>,
}

impl Deref for CoreGuard<'_> {
    type Target = Core;

    #[inline]
    fn deref(&self) -> &Core {
        self.guard.as_ref().expect("present until dropped")
    }
}

impl DerefMut for CoreGuard<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut Core {
        self.guard.as_mut().expect("present until dropped")
    }
}

impl Drop for CoreGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        let Some(core) = &self.guard else { return };
        let state = &core.state;
        if !state.after.is_empty() || state.announce || matches!(state.life, Life::Dead(_)) {
            self.let_go();
        }
    }
}

impl CoreGuard<'_> {
    /// Whether somebody waits for the lock.
    #[inline]
    pub fn is_wanted(&self) -> bool {
        self.guard.as_ref().is_some_and(ShardGuard::is_wanted)
    }

    /// Lets go of the lock, and does what is to be done then.
    #[cold]
    fn let_go(&mut self) {
        let Some(mut core) = self.guard.take() else { return };
        let state = &mut core.state;
        let mut after = std::mem::take(&mut state.after);
        let announce = std::mem::take(&mut state.announce);
        let (settled, ended) = (core.settled(), core.ended());
        drop(core);
        if settled && !self.endpoint.settled.swap(true, Ordering::AcqRel) {
            // A closing node waits for this.
            self.endpoint.node.board.wake_resident();
        }
        for ward in after.take_wards() {
            self.endpoint.node.keep(ward);
        }
        if ended && !self.endpoint.ended.swap(true, Ordering::AcqRel) {
            self.endpoint.node.endpoint_ended(self.endpoint);
        }
        if announce {
            self.endpoint.node.announce(self.endpoint.this.clone());
        }
        after.run();
    }
}

impl EndpointShared {
    pub fn new(
        node: Arc<NodeShared>,
        peer: Peer,
        route: Route,
        pulse: Arc<Pulse>,
        lanes: Lanes,
        limits: Limits,
        window_bytes: u64,
    ) -> Arc<Self> {
        let link = lanes.first().map_or(LinkKind::Tcp, |lane| lane.kind());
        let (keys, allocator) = (node.keys.clone(), node.allocator.clone());
        Arc::new_cyclic(|weak| {
            let views = Views(weak.clone());
            let mut state = State::new(limits, peer.address.clone(), keys, allocator, views);
            state.span =
                tracing::debug_span!(parent: None, "endpoint", peer = %peer.address, %link);
            let waker = Waker::from(pulse.clone());
            let mut core = Core::new(lanes, state);
            core.enable_direct(waker.clone());
            EndpointShared {
                node,
                peer,
                route,
                link,
                waker,
                pulse,
                core: Shard::new(core),
                released: Mutex::new(Vec::new()),
                any_released: AtomicBool::new(false),
                settled: AtomicBool::new(false),
                ended: AtomicBool::new(false),
                window_bytes,
                handles: AtomicUsize::new(1),
                this: weak.clone(),
            }
        })
    }

    pub fn window_bytes(&self) -> u64 {
        self.window_bytes
    }

    /// Whether the lanes are gone.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Whether it has ended but for memory that a lane still keeps.
    pub fn has_settled(&self) -> bool {
        self.settled.load(Ordering::Acquire)
    }

    /// The waker that lanes register.
    pub fn waker(&self) -> &Waker {
        &self.waker
    }

    #[inline]
    fn guard<'a>(&'a self, guard: ShardGuard<'a, Core>) -> CoreGuard<'a> {
        let mut guard = CoreGuard { endpoint: self, guard: Some(guard) };
        if self.any_released.load(Ordering::Acquire) {
            self.take_released(&mut guard);
        }
        guard
    }

    /// The core, or a promise to wake `waker`.
    #[inline]
    pub fn core_or_queue(&self, waker: &Waker) -> Option<CoreGuard<'_>> {
        self.core.lock_or_queue(waker).map(|guard| self.guard(guard))
    }

    /// The core; blocks the thread for at most the turns of those before.
    #[inline]
    pub fn core(&self) -> CoreGuard<'_> {
        self.guard(self.core.lock_blocking())
    }

    #[cold]
    fn take_released(&self, core: &mut Core) {
        self.any_released.store(false, Ordering::Release);
        let released = std::mem::take(&mut *lock(&self.released));
        for (lane, payload) in released {
            core.release(lane, payload);
        }
    }

    /// A view is no longer used. Tells the sender at once, unless somebody is at work here: then
    /// they, or the resident task, do.
    pub fn release_view(self: &Arc<Self>, lane: u8, payload: PayloadId) {
        if self.forked() {
            return;
        }
        if let Some(guard) = self.core.try_lock() {
            let mut guard = self.guard(guard);
            guard.release(lane, payload);
            // The lane may not have had room for it: somebody has to look again.
            self.pulse.watch();
            return;
        }
        lock(&self.released).push((lane, payload));
        self.any_released.store(true, Ordering::Release);
        self.pulse.enqueue();
    }

    /// The resident task's turn: moves what there is to move, and arms. `true`: it is armed (or
    /// over); otherwise it has been queued for another turn.
    pub fn resident_turn(&self) -> bool {
        let Some(mut core) = self.core_or_queue(&self.waker) else { return false };
        let mut cx = Context::from_waker(&self.waker);
        for _ in 0..RESIDENT_TURNS {
            let mut budget = Budget::TURN;
            let progress = core.drive(&mut cx, false, &mut budget);
            if core.ended() {
                return true;
            }
            if progress == Progress::More {
                continue;
            }
            if core.arm(&mut cx) == Armed::Yes {
                return true;
            }
        }
        drop(core);
        self.pulse.enqueue();
        false
    }

    /// One look of the watch: takes over if nobody drove since the look that saw `last`. Gives the
    /// count to compare with next time, or `None` if the endpoint is off the list.
    pub fn watch_turn(&self, last: Option<u64>) -> Option<u64> {
        let activity = match self.core.try_lock() {
            Some(guard) => self.guard(guard).state.activity,
            None => return Some(last.map_or(0, |last| last.wrapping_sub(1))),
        };
        if last == Some(activity) && self.take_over() { None } else { Some(activity) }
    }

    /// A look of the watch after everybody has had the opportunity to drive. `true`: the endpoint is
    /// off the list.
    pub fn rest(&self) -> bool {
        !self.pulse.is_polled_soon() && self.take_over()
    }

    /// Drives and arms it in place of whoever does not. `true`: it is off the watch list.
    fn take_over(&self) -> bool {
        // Off the list before arming: an event that comes between puts it on again.
        self.pulse.unwatched();
        self.resident_turn() || !self.pulse.watched_again()
    }

    /// Looks whether the peer has fallen silent. `true`: look again.
    pub fn check(&self) -> bool {
        let checked = self.core().check();
        if checked == Check::Drive {
            self.pulse.enqueue();
        }
        checked != Check::Quiet
    }

    /// Ends it now.
    pub fn fail(&self, error: Error) {
        self.core().fail(error);
        if !self.has_ended() {
            // A link lingers: whoever is called when it has let go has to be asked for.
            self.pulse.enqueue();
        }
    }

    pub fn add_handle(&self) {
        self.handles.fetch_add(1, Ordering::Relaxed);
    }

    /// `true`: it was the last.
    pub fn drop_handle(&self) -> bool {
        self.handles.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Nobody holds the endpoint any more: lets what was sent go out, within the close timeout.
    pub fn close_in_background(self: &Arc<Self>) {
        if self.has_ended() {
            return;
        }
        self.core().close(CloseReason::new(0, "the endpoint was dropped"));
        self.pulse.enqueue();
        let endpoint = Arc::downgrade(self);
        let sleep = self.node.timers.sleep_until(Instant::now() + self.node.config.close_timeout);
        self.node.spawn(Box::pin(async move {
            sleep.await;
            if let Some(endpoint) = endpoint.upgrade() {
                endpoint.fail(Error::new(
                    ErrorKind::TimedOut,
                    Phase::Close,
                    "the peer did not answer the goodbye",
                ));
            }
        }));
    }

    pub fn forked(&self) -> bool {
        self.node.fork.forked()
    }

    /// How long an operation may poll before it sleeps; zero: not at all.
    pub fn spin_limit(&self) -> Duration {
        match self.node.config.wake {
            Wake::Spin => self.node.config.spin_limit,
            Wake::Adaptive => self.node.config.adaptive_spin,
            Wake::Park => Duration::ZERO,
        }
    }
}
