//! A process's context.

use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, TryLockError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use crate::address::Address;
use crate::config::Config;
use crate::driver::bootstrap;
use crate::driver::node::NodeShared;
use crate::driver::resident::Resident;
use crate::driver::waiters::Place;
use crate::driver::{Mutex, lock};
use crate::endpoint::Endpoint;
use crate::error::{CloseReason, Error, ErrorKind, Phase, Result};
use crate::listener::Listener;
use crate::memory::{BufferMut, Loan};
use crate::message::Message;
use crate::region::{Access, Registered};
use crate::route::Capability;
use crate::runtime::{HostLoop, Reactor};
use crate::stats::NodeStats;

/// A process's context: its settings, its memory pools, and the one task that sees to progress.
///
/// Cloning gives another handle. The node lives until the last handle, listener and endpoint is
/// dropped. It belongs to the runtime that made it: when that ends, everything fails with
/// [`ErrorKind::RuntimeGone`]. In a forked child everything fails with [`ErrorKind::Forked`].
#[derive(Clone)]
pub struct Node(Arc<Handle>);

struct Handle {
    shared: Arc<NodeShared>,
    host: Option<HostSide>,
}

/// The node's part that a host with its own event loop polls.
struct HostSide {
    host: Arc<HostLoop>,
    resident: Mutex<Option<Resident>>,
    wakeup: Arc<WakeHost>,
    waker: Waker,
}

/// Wakes the resident task: makes the host's descriptor readable, unless the host is on its way to
/// the task already. (Readiness calls wakers from inside of `progress`: a write for each made a
/// parked message of 8 B take two turns of the host's loop.)
struct WakeHost {
    host: Arc<HostLoop>,
    state: AtomicU8,
}

/// The resident task has to be polled.
const WOKEN: u8 = 1;
/// Somebody is inside of `progress`, and looks at [`WOKEN`] before they leave.
const AT_WORK: u8 = 2;
/// The host is inside of a [`HostTurn`], which looks at [`WOKEN`] when it ends.
const IN_TURN: u8 = 4;

impl WakeHost {
    fn new(host: Arc<HostLoop>) -> Self {
        WakeHost { host, state: AtomicU8::new(0) }
    }

    fn signal(&self) {
        if self.state.fetch_or(WOKEN, Ordering::AcqRel) == 0 {
            self.host.wake();
        }
    }

    /// Collects what is ready, and calls `poll` if the task was woken by that or before. One caller
    /// at a time.
    fn turn(&self, poll: impl FnOnce()) -> io::Result<()> {
        self.state.fetch_or(AT_WORK, Ordering::AcqRel);
        let _leaving = Leaving(self);
        let drained = self.host.drain();
        self.poll_if_woken(poll);
        drained
    }

    fn poll_if_woken(&self, poll: impl FnOnce()) {
        // What the waker of before wrote is seen by the poll: both are read-modify-writes.
        if self.state.fetch_and(!WOKEN, Ordering::AcqRel) & WOKEN != 0 {
            poll();
        }
    }
}

/// The end of a turn. After a panic there is another one, which finds what is left of the task.
struct Leaving<'a>(&'a WakeHost);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        let before = self.0.state.fetch_and(!AT_WORK, Ordering::AcqRel);
        if before & (WOKEN | IN_TURN) == WOKEN || std::thread::panicking() {
            self.0.host.wake();
        }
    }
}

/// A stretch in which a host calls [`Node::progress`], polls operations, and lets its tasks go on;
/// see [`Node::host_turn`].
#[must_use = "it ends when it is dropped"]
pub struct HostTurn<'n> {
    node: &'n Node,
    /// It lies inside of another one, which ends later.
    inner: bool,
    finished: bool,
}

impl HostTurn<'_> {
    /// Ends it: what nobody polls is looked after. Bounded work, as that of [`Node::progress`].
    pub fn finish(mut self) {
        if self.inner {
            return;
        }
        if let Some(side) = &self.node.0.host
            && !self.node.0.shared.fork.forked()
            && let Ok(mut resident) = side.resident.try_lock()
        {
            if resident.as_mut().is_some_and(Resident::rests) {
                side.wakeup.state.fetch_or(WOKEN, Ordering::AcqRel);
            }
            side.wakeup.poll_if_woken(|| poll_resident(&mut resident, &side.waker));
            self.finished = true;
        }
    }
}

impl Drop for HostTurn<'_> {
    fn drop(&mut self) {
        let Some(side) = self.node.0.host.as_ref().filter(|_| !self.inner) else { return };
        if !self.finished {
            // The ticker may have been left to the end: the next turn sees to it.
            side.wakeup.state.fetch_or(WOKEN, Ordering::AcqRel);
        }
        let before = side.wakeup.state.fetch_and(!IN_TURN, Ordering::AcqRel);
        // Somebody inside of `progress` looks themselves.
        if before & (WOKEN | AT_WORK) == WOKEN {
            side.host.wake();
        }
    }
}

fn poll_resident(resident: &mut Option<Resident>, waker: &Waker) {
    if let Some(running) = resident
        && Pin::new(running).poll(&mut Context::from_waker(waker)).is_ready()
    {
        *resident = None;
    }
}

impl Wake for WakeHost {
    fn wake(self: Arc<Self>) {
        self.signal();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.signal();
    }
}

impl Node {
    /// A node on the tokio runtime of the caller, which must have its I/O driver enabled.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`] outside of a runtime or for settings that cannot be;
    /// [`ErrorKind::Resources`] without descriptors.
    ///
    /// **Cost.** Two timers, a Unix socket, one task.
    pub fn new(config: Config) -> Result<Node> {
        let handle = tokio::runtime::Handle::try_current().map_err(|error| {
            Error::new(ErrorKind::InvalidInput, Phase::Setup, error.to_string())
                .with_hint("make the node inside a tokio runtime, or use Node::with_host_loop")
        })?;
        let shared = NodeShared::new(config, Reactor::Tokio(handle.clone()))?;
        let resident = Resident::new(shared.clone())
            .map_err(|error| Error::from_io(Phase::Setup, "making a ticker", &error))?;
        handle.spawn(resident);
        Ok(Node(Arc::new(Handle { shared, host: None })))
    }

    /// A node without a runtime, for a host with its own event loop: watch [`Node::host_fd`] and
    /// call [`Node::progress`] when it is readable. Futures of the node may be polled from
    /// anywhere, and wake as usual. Close the node before its last handle is dropped: nothing
    /// makes progress afterwards, so endpoints end at once then.
    ///
    /// # Errors
    ///
    /// As [`Node::new`].
    pub fn with_host_loop(config: Config) -> Result<Node> {
        let failed = |error: std::io::Error| Error::from_io(Phase::Setup, "making epoll", &error);
        let host = HostLoop::new().map_err(failed)?;
        let shared = NodeShared::new(config, Reactor::Host(host.clone()))?;
        let resident = Resident::new(shared.clone()).map_err(failed)?;
        let wakeup = Arc::new(WakeHost::new(host.clone()));
        let waker = Waker::from(wakeup.clone());
        wakeup.signal();
        let host = Some(HostSide { host, resident: Mutex::new(Some(resident)), wakeup, waker });
        Ok(Node(Arc::new(Handle { shared, host })))
    }

    /// The descriptor that a host watches for readability; `None` on a tokio runtime.
    pub fn host_fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.host.as_ref().map(|side| side.host.fd())
    }

    /// Does what is to be done now. Never blocks; bounded work, and the descriptor stays readable
    /// if there is more. Does nothing on a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the node is closed or forked.
    pub fn progress(&self) -> Result<()> {
        let Some(side) = &self.0.host else { return Ok(()) };
        if self.0.shared.fork.forked() {
            return Err(crate::driver::op::forked());
        }
        let mut resident = match side.resident.try_lock() {
            Ok(resident) => resident,
            // Another thread, or a waker called from here, is at it.
            Err(TryLockError::WouldBlock) => {
                side.host.wake();
                return Ok(());
            }
            // It panicked: nothing will move any more, and everybody is told.
            Err(TryLockError::Poisoned(_)) => {
                self.host_ended();
                let text = "the node's task panicked";
                return Err(Error::new(ErrorKind::RuntimeGone, Phase::Transfer, text));
            }
        };
        let in_turn = side.wakeup.state.load(Ordering::Acquire) & IN_TURN != 0;
        if let Some(running) = &mut *resident {
            running.before_tasks(in_turn);
        }
        let drained = side.wakeup.turn(|| poll_resident(&mut resident, &side.waker));
        drop(resident);
        drained.map_err(|error| Error::from_io(Phase::Transfer, "asking epoll", &error))
    }

    /// Opens a stretch in which a host calls [`Node::progress`], polls operations, or lets its tasks
    /// do so. When it ends, endpoints that no operation waits on are looked after there and then, if
    /// that was not done often just before. Without it they are by a ticker of a millisecond: two or
    /// three further turns of the host's loop for every message that comes alone.
    ///
    /// A turn opened inside of another one is a part of it. Does nothing on a tokio runtime.
    pub fn host_turn(&self) -> HostTurn<'_> {
        let state = self.0.host.as_ref().map(|side| &side.wakeup.state);
        let inner =
            state.is_some_and(|state| state.fetch_or(IN_TURN, Ordering::AcqRel) & IN_TURN != 0);
        HostTurn { node: self, inner, finished: false }
    }

    /// The host's loop has ended and will not call [`Node::progress`] again: everything fails with
    /// [`ErrorKind::RuntimeGone`], as when a tokio runtime ends. Peers see the connections end. Does
    /// nothing on a tokio runtime.
    pub fn host_ended(&self) {
        if let Some(side) = &self.0.host {
            // Dropped without the lock: wakers are called.
            let resident = lock(&side.resident).take();
            drop(resident);
        }
    }

    /// Whether the node has wound up after it was closed: [`Node::progress`] has nothing left to do
    /// and the descriptor need not be watched. Always `false` on a tokio runtime.
    pub fn is_wound_up(&self) -> bool {
        let resident = self.0.host.as_ref().map(|side| side.resident.try_lock());
        match resident {
            Some(Ok(resident)) => resident.is_none(),
            Some(Err(TryLockError::Poisoned(poisoned))) => poisoned.into_inner().is_none(),
            _ => false,
        }
    }

    /// Makes the host's descriptor readable, from any thread, so that the host calls
    /// [`Node::progress`] soon. For wakers of the host's own that something on another thread
    /// called. Does nothing on a tokio runtime.
    pub fn wake_host(&self) {
        if let Some(side) = &self.0.host {
            side.host.wake();
        }
    }

    pub(crate) fn shared(&self) -> &Arc<NodeShared> {
        &self.0.shared
    }

    /// Listens at exactly this address.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> thalweg::Result<()> {
    /// # let node = thalweg::Node::new(thalweg::Config::new())?;
    /// let listener = node.listen("thalweg://[::1]:0").await?;
    /// assert_ne!(listener.address().port(), 0);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AddressInUse`], [`ErrorKind::NameResolution`], [`ErrorKind::InvalidInput`].
    pub async fn listen<A>(&self, address: A) -> Result<Listener>
    where
        A: TryInto<Address>,
        Error: From<A::Error>,
    {
        let address = address.try_into().map_err(Error::from)?;
        Listener::bind(self, address).await
    }

    /// Connects to a listener.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NameResolution`], [`ErrorKind::Refused`], [`ErrorKind::TimedOut`],
    /// [`ErrorKind::NotThalweg`], [`ErrorKind::VersionMismatch`], [`ErrorKind::NoRoute`],
    /// [`ErrorKind::Resources`].
    ///
    /// **Cancel safety.** Dropping the future abandons the connection.
    pub async fn connect<A>(&self, address: A) -> Result<Endpoint>
    where
        A: TryInto<Address>,
        Error: From<A::Error>,
    {
        let address = address.try_into().map_err(Error::from)?;
        let shared = bootstrap::connect(self.0.shared.clone(), address).await?;
        Ok(Endpoint::first(shared, self.clone()))
    }

    /// The next message of any endpoint that nobody is receiving on. Endpoints take turns.
    ///
    /// **Cancel safety.** Dropping the future loses no message.
    pub fn recv_any(&self) -> RecvAny<'_> {
        RecvAny { node: self, place: Place::default() }
    }

    /// Writable memory that a link on the same host can hand over without a copy.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Resources`] when the pool is exhausted, [`ErrorKind::LimitExceeded`] when it
    /// could never hold that much ([`Config::loan_pool_bytes`]).
    ///
    /// **Cost.** A free list's pop when a block of that size was used before; else fresh pages.
    pub fn loan(&self, len_bytes: usize) -> Result<Loan> {
        self.0.shared.usable()?;
        self.0.shared.pool.loan(len_bytes)
    }

    /// Registers memory, so that peers with its key can put to it and get from it.
    ///
    /// # Errors
    ///
    /// When the node is closed or forked.
    pub fn register<B: BufferMut>(&self, buffer: B, access: Access) -> Result<Registered<B>> {
        self.0.shared.usable()?;
        Registered::new(self.0.shared.clone(), buffer, access)
    }

    /// What this node has counted.
    pub fn stats(&self) -> NodeStats {
        self.0.shared.stats()
    }

    /// Every link this build knows, whether it is here, why, and what would fix it. Where the library
    /// chooses the links ([`Config::auto_transports`]), those that it does not look for count as absent,
    /// and the reason says why.
    pub fn capabilities(&self) -> Vec<Capability> {
        self.0.shared.capabilities.clone()
    }

    /// The settings.
    pub fn config(&self) -> &Config {
        &self.0.shared.config
    }

    /// Waits until everything that was handed to this node's endpoints so far has left this
    /// process and taken effect at the peers, as [`Endpoint::drain`]. For a shutdown in good order:
    /// stop sending, drain, close.
    pub async fn drain(&self) -> Result<()> {
        for endpoint in self.0.shared.all_endpoints() {
            Endpoint::new(endpoint, self.clone()).drain().await?;
        }
        Ok(())
    }

    /// Closes every endpoint with this reason, and then the node. Waits for the peers' answers,
    /// at most [`Config::close_timeout`].
    pub async fn close(&self, reason: CloseReason) {
        if self.0.shared.fork.forked() {
            return;
        }
        let endpoints = self.0.shared.all_endpoints();
        for endpoint in &endpoints {
            endpoint.core().close(reason.clone());
            endpoint.pulse.enqueue();
        }
        let deadline = Instant::now() + self.0.shared.config.close_timeout;
        for endpoint in endpoints {
            Endpoint::new(endpoint, self.clone()).ended_by(deadline).await;
        }
        self.0.shared.release();
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !self.shared.fork.forked() {
            self.shared.release();
        }
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("stats", &self.stats()).finish()
    }
}

/// See [`Node::recv_any`].
#[must_use = "nothing happens until it is awaited"]
pub struct RecvAny<'n> {
    node: &'n Node,
    place: Place,
}

impl Drop for RecvAny<'_> {
    fn drop(&mut self) {
        if !self.place.is_none() && !self.node.shared().fork.forked() {
            self.node.shared().leave_announced(&mut self.place);
        }
    }
}

impl Future for RecvAny<'_> {
    type Output = Result<(Endpoint, Message)>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let shared = this.node.shared();
        if let Err(error) = shared.usable() {
            return Poll::Ready(Err(error));
        }
        while let Some(endpoint) = shared.next_announced(&mut this.place, cx.waker()) {
            let mut core = endpoint.core();
            let mut message = None;
            core.take_message(&mut message);
            core.announce_again();
            endpoint.pulse.watch();
            drop(core);
            if let Some(message) = message {
                return Poll::Ready(Ok((Endpoint::new(endpoint, this.node.clone()), message)));
            }
        }
        // The node may have ended before the waker was in place.
        if let Err(error) = shared.usable() {
            return Poll::Ready(Err(error));
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::LinkKind;

    fn readable(host: &HostLoop, timeout_ms: i32) -> bool {
        let mut watched =
            libc::pollfd { fd: host.fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one element, a local.
        unsafe { libc::poll(&mut watched, 1, timeout_ms) > 0 }
    }

    #[test]
    fn a_wake_from_inside_of_a_turn_costs_no_turn_of_its_own() {
        let host = HostLoop::new().expect("epoll");
        let wakeup = WakeHost::new(host.clone());
        assert!(!readable(&host, 0));
        wakeup.signal();
        wakeup.signal();
        assert!(readable(&host, 0));
        let mut polls = 0;
        wakeup.turn(|| polls += 1).expect("a turn");
        assert!(polls == 1 && !readable(&host, 0));
        wakeup.turn(|| polls += 1).expect("a turn");
        assert_eq!(polls, 1, "nobody woke it");
        // A task that wakes itself is polled in the next turn.
        wakeup.signal();
        wakeup.turn(|| wakeup.signal()).expect("a turn");
        assert!(readable(&host, 0));
        wakeup.turn(|| polls += 1).expect("a turn");
        assert!(polls == 2 && !readable(&host, 0));
    }

    #[test]
    fn a_wake_inside_of_a_hosts_turn_is_for_its_end() {
        let node = Node::with_host_loop(Config::new().transports([LinkKind::Tcp])).expect("a node");
        let side = node.0.host.as_ref().expect("a host's");
        let rest = || {
            for _ in 0..3 {
                node.progress().expect("progress");
            }
            assert!(!readable(&side.host, 0));
        };
        rest();
        let turn = node.host_turn();
        side.wakeup.signal();
        assert!(!readable(&side.host, 0), "the turn sees to it");
        // One inside of it ends nothing, and neither does progress.
        node.host_turn().finish();
        assert_ne!(side.wakeup.state.load(Ordering::Acquire) & IN_TURN, 0);
        node.progress().expect("progress");
        side.wakeup.signal();
        assert!(!readable(&side.host, 0), "the turn sees to it");
        turn.finish();
        assert_eq!(side.wakeup.state.load(Ordering::Acquire), 0, "it did");
        // One that is dropped leaves it to the loop, and so does one that another thread is in.
        let turn = node.host_turn();
        side.wakeup.signal();
        drop(turn);
        assert!(readable(&side.host, 0));
        rest();
        drop(node.host_turn());
        assert!(readable(&side.host, 0), "what the turn put off is done by the next one");
        rest();
        let turn = node.host_turn();
        side.wakeup.signal();
        let resident = side.resident.lock().expect("not poisoned");
        turn.finish();
        drop(resident);
        assert!(readable(&side.host, 0));
        rest();
    }

    #[test]
    fn after_a_panic_there_is_another_turn() {
        let host = HostLoop::new().expect("epoll");
        let wakeup = WakeHost::new(host.clone());
        wakeup.signal();
        let turn = std::panic::AssertUnwindSafe(|| wakeup.turn(|| panic!("on purpose")));
        assert!(std::panic::catch_unwind(turn).is_err());
        assert!(readable(&host, 0));
        wakeup.turn(|| {}).expect("a turn");
        wakeup.signal();
        assert!(readable(&host, 0));
    }

    #[test]
    fn no_wake_from_another_thread_is_lost() {
        const ROUNDS: u64 = 20_000;
        let host = HostLoop::new().expect("epoll");
        let (wakeup, work) = (WakeHost::new(host.clone()), AtomicU64::new(0));
        let (wakeup, work) = (&wakeup, &work);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for _ in 0..ROUNDS {
                    work.fetch_add(1, Ordering::Relaxed);
                    wakeup.signal();
                }
            });
            let mut seen = 0;
            while seen < ROUNDS {
                assert!(readable(&host, 10_000), "a wake was lost after {seen}");
                wakeup.turn(|| seen = work.load(Ordering::Relaxed)).expect("a turn");
            }
        });
    }
}
