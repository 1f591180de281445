//! The node, and its place in the event loop.

use std::cell::Cell;
use std::collections::HashMap;
use std::ops::Deref;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyResourceWarning, PyRuntimeError};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyWeakrefMethods, PyWeakrefReference};
use thalweg::{CloseReason, HostTurn};

use crate::buffer::{self, PyMemory};
use crate::list::List;
use crate::local::{self, Local};
use crate::operation::{Heavy, Operation, Outcome, Resume, Terms, Wakeup, Watch, Wish};
use crate::region::Region;
use crate::used::used;
use crate::{config, error, log, report};

/// A closed node is through with everything in one or two turns.
const WIND_UP_TURNS: u32 = 8;
/// How long operations that need not wait go on one after the other before the loop's other tasks
/// run. To go by way of the loop takes some 0.02 ms.
const AT_ONCE_MICROS: u64 = 1000;

thread_local! {
    /// The node that this thread is inside of: what becomes ready is looked at when it leaves.
    static INSIDE: Cell<*const Shared> = const { Cell::new(std::ptr::null()) };
}

/// What all objects of a node share.
pub struct Shared {
    pub node: Local<thalweg::Node>,
    /// How long an operation polls before its task is suspended.
    pub spin: Duration,
    thread: ThreadId,
    event_loop: Py<PyWeakrefReference>,
    descriptor: RawFd,
    watching: AtomicBool,
    is_closed: AtomicBool,
    /// The loop does not watch it any more: nobody who waits will go on.
    ended: AtomicBool,
    /// How tasks go on that become ready in the reader callback.
    resume: Resume,
    /// Nobody in Python holds anything of it any more.
    abandoned: AtomicBool,
    ready: List<Arc<Wakeup>>,
    wishes: List<Wish>,
    interrupts: List<PyErr>,
    watches: Mutex<HashMap<u64, Watch>>,
    next_watch: AtomicU64,
    heavy: Heavy,
    /// As `heavy`, for what is done at the end of a turn.
    resting: Heavy,
    made: Instant,
    /// Since when, in microseconds after `made`, operations have not had to wait. 0: they had to.
    at_once_since: AtomicU64,
    /// That has been for so long that it is the other tasks' turn.
    others_turn: AtomicBool,
    allocator: Option<Arc<config::PyAllocator>>,
}

/// For as long as it lives, this thread is inside of a node.
pub struct Inside(*const Shared);

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(self.0);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The event loop that runs in this thread.
fn running_loop(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    used(py)?.get_running_loop.bind(py).call0()
}

impl Shared {
    pub fn enter(&self) -> Inside {
        Inside(INSIDE.replace(self))
    }

    fn is_inside(&self) -> bool {
        std::ptr::eq(INSIDE.get(), self)
    }

    /// Something is ready: it is looked at when this thread leaves the node, or, from elsewhere,
    /// by the loop.
    pub fn ready(&self, wakeup: Arc<Wakeup>) {
        self.ready.push(wakeup);
        self.look_soon();
    }

    /// Somebody is to be cancelled when no allocator of the user's runs any more.
    pub fn wish(&self, wish: Wish) {
        self.wishes.push(wish);
        self.look_soon();
    }

    /// An allocator has raised this to end the program: the loop is told when the node is left.
    pub fn interrupt(&self, error: PyErr) {
        self.interrupts.push(error);
        self.look_soon();
    }

    /// Raises this where the loop sees it.
    pub fn raise_soon(&self, py: Python<'_>, error: PyErr) {
        let raise = || {
            let raise = Bound::new(py, Raise(Mutex::new(Some(error.clone_ref(py)))))?;
            self.event_loop(py)?.call_method1("call_soon", (raise,))
        };
        if let Err(other) = raise() {
            error.write_unraisable(py, None);
            other.write_unraisable(py, None);
        }
    }

    /// Sees to it that [`Shared::settle`] is called.
    pub fn look_soon(&self) {
        if !self.is_inside() {
            self.node.wake_host();
        }
    }

    /// Gives buffers back and lets the tasks go on that are ready. With no lock in hand.
    pub fn settle(self: &Arc<Self>, py: Python<'_>, how: Resume) -> PyResult<()> {
        let mut result = Ok(());
        {
            let _inside = self.enter();
            local::drop_postponed(py);
            buffer::give_back(py);
        }
        // One is enough: another would come in the middle of the clearing up.
        if let Some(error) = log::hand_over(py).into_iter().chain(self.interrupts.take()).next() {
            self.raise_soon(py, error);
        }
        // Before what is ready goes on.
        for wish in self.wishes.take() {
            result = result.and(wish.carry_out(py));
        }
        for wakeup in self.ready.take() {
            result = result.and(wakeup.resume(py, self, how));
        }
        result
    }

    /// The end of a turn, after the tasks that are ready have gone on.
    pub fn finish(self: &Arc<Self>, py: Python<'_>, turn: HostTurn<'_>) -> PyResult<()> {
        {
            let _inside = self.enter();
            self.resting.run(py, |_| turn.finish());
        }
        self.settle(py, Resume::Soon)
    }

    pub fn new_watch_id(&self) -> u64 {
        self.next_watch.fetch_add(1, Ordering::Relaxed)
    }

    pub fn keep_watch(&self, id: u64, watch: Watch) {
        if self.has_ended() {
            return local::release(watch);
        }
        lock(&self.watches).insert(id, watch);
    }

    pub fn take_watch(&self, id: u64) -> Option<Watch> {
        lock(&self.watches).remove(&id)
    }

    /// An operation has begun that need not wait. Whether those have gone on for so long that it is
    /// the other tasks' turn.
    pub fn answered_at_once(&self, began: Instant) -> bool {
        let now = began.duration_since(self.made).as_micros().max(1) as u64;
        match self.at_once_since.load(Ordering::Relaxed) {
            0 => self.at_once_since.store(now, Ordering::Relaxed),
            since if now.saturating_sub(since) < AT_ONCE_MICROS => {}
            _ => self.others_turn.store(true, Ordering::Relaxed),
        }
        self.is_others_turn()
    }

    pub fn is_others_turn(&self) -> bool {
        self.others_turn.load(Ordering::Relaxed)
    }

    /// The loop has its turn, or just had it.
    pub fn had_a_turn(&self) {
        self.at_once_since.store(0, Ordering::Relaxed);
        self.others_turn.store(false, Ordering::Relaxed);
    }

    pub fn is_home(&self) -> bool {
        std::thread::current().id() == self.thread
    }

    /// Refuses other threads than the node's own, and what an allocator calls. (That a task of
    /// another loop does not wait here is seen to by the task, which asks the waiter for its loop.)
    pub fn check(&self) -> PyResult<()> {
        if local::is_allocating() {
            return Err(PyRuntimeError::new_err("an allocator must not use thalweg"));
        }
        self.check_thread()
    }

    /// Refuses other threads than the node's own.
    pub fn check_thread(&self) -> PyResult<()> {
        if self.is_home() {
            return Ok(());
        }
        Err(PyRuntimeError::new_err(
            "this node belongs to an event loop in another thread: use it from there \
             (asyncio.run_coroutine_threadsafe)",
        ))
    }

    /// The node's own loop.
    pub fn event_loop<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let event_loop = self.event_loop.bind(py).upgrade();
        event_loop.ok_or_else(|| {
            PyRuntimeError::new_err("the event loop that this node belongs to has ended")
        })
    }

    /// Runs something that may take a lock of thalweg's. On other threads than the loop's, without
    /// the GIL (see the crate's documentation).
    pub fn locking<R: Send>(&self, py: Python<'_>, work: impl FnOnce() -> R + Send) -> PyResult<R> {
        if self.is_home() {
            self.check()?;
            let _inside = self.enter();
            Ok(work())
        } else {
            Ok(py.detach(work))
        }
    }

    /// After something that may have let tasks go on, from whatever thread.
    pub fn settle_here(self: &Arc<Self>, py: Python<'_>) -> PyResult<()> {
        if self.check().is_ok() {
            self.settle(py, Resume::Soon)
        } else {
            self.node.wake_host();
            Ok(())
        }
    }

    /// As [`Shared::settle_here`], and lets the node do what is to be done at once.
    pub fn progress_here(self: &Arc<Self>, py: Python<'_>) -> PyResult<()> {
        if self.check().is_ok() {
            let _inside = self.enter();
            // What it says, the loop's next turn says too.
            let _ = self.node.progress();
        }
        self.settle_here(py)
    }

    /// The node has been closed: what is left to do is done now, as far as it goes.
    pub fn wind_up(self: &Arc<Self>, py: Python<'_>) -> PyResult<()> {
        self.is_closed.store(true, Ordering::Release);
        for _ in 0..WIND_UP_TURNS {
            let progress = {
                let _inside = self.enter();
                self.node.progress()
            };
            if progress.is_err() || self.node.is_wound_up() {
                self.unwatch(py)?;
                break;
            }
        }
        self.settle(py, Resume::Soon)
    }

    /// What the user's allocator holds may hold the node.
    fn end_allocator(&self) {
        if let Some(allocator) = &self.allocator {
            allocator.end();
        }
    }

    /// The loop need not look at it any more.
    fn unwatch(&self, py: Python<'_>) -> PyResult<()> {
        self.is_closed.store(true, Ordering::Release);
        if !self.watching.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        {
            // Whoever still waits is told now: nobody would look at the descriptor later.
            let _inside = self.enter();
            self.node.host_ended();
        }
        self.end_allocator();
        self.event_loop(py)?.call_method1("remove_reader", (self.descriptor,)).map(drop)
    }

    /// The loop goes on in another thread than the node's own: nothing can be done there, and what
    /// waits is told. With the descriptor left to it, the loop would call for nothing for ever.
    fn lose_home(self: &Arc<Self>, py: Python<'_>) -> PyResult<()> {
        if !self.watching.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.is_closed.store(true, Ordering::Release);
        let event_loop = self.event_loop(py)?;
        let mut result = event_loop.call_method1("remove_reader", (self.descriptor,)).map(drop);
        py.detach(|| self.node.host_ended());
        self.end_allocator();
        buffer::give_back(py);
        for wakeup in self.ready.take() {
            result = result.and(wakeup.resume(py, self, Resume::Soon));
        }
        // Nothing is left that could become ready; what does all the same is forgotten.
        self.ended.store(true, Ordering::Release);
        for wakeup in self.ready.take() {
            result = result.and(wakeup.resume(py, self, Resume::Soon));
        }
        result?;
        Err(PyRuntimeError::new_err(
            "the event loop goes on in another thread than that in which it made this node: the \
             node has ended; make one from within the loop, in the thread in which it runs",
        ))
    }

    /// Nobody can use it any more: it closes by itself, and lets what was sent go out.
    fn close_abandoned(self: &Arc<Self>, py: Python<'_>) -> PyResult<()> {
        let node = (*self.node).clone();
        let work = Box::pin(async move {
            node.close(CloseReason::new(0, "")).await;
            Ok(Outcome::NodeClosed)
        });
        Watch::begin(py, self, work, None)
    }

    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    pub fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }
}

/// What keeps a node going: held by every object of Python's that belongs to it, and not by the loop
/// that watches it. When the last one goes, the node closes.
pub struct Keep(Arc<Shared>);

pub type Handle = Arc<Keep>;

impl Deref for Keep {
    type Target = Arc<Shared>;

    fn deref(&self) -> &Arc<Shared> {
        &self.0
    }
}

impl Drop for Keep {
    fn drop(&mut self) {
        let shared = &self.0;
        if shared.is_closed() || !shared.watching.load(Ordering::Acquire) {
            return;
        }
        shared.abandoned.store(true, Ordering::Release);
        // Here, nothing may be done: it may be any thread, and an allocator may be running.
        shared.node.wake_host();
        error::warn::<PyResourceWarning>("thalweg: unclosed node".to_owned());
    }
}

/// Raises, once, what was raised where nobody could be told. It does not keep that: its traceback
/// may hold what holds this.
#[pyclass(module = "thalweg", frozen)]
struct Raise(Mutex<Option<PyErr>>);

#[pymethods]
impl Raise {
    fn __call__(&self) -> PyResult<()> {
        lock(&self.0).take().map_or(Ok(()), Err)
    }
}

/// What the loop calls when the node's descriptor is readable. It keeps the node's memory for as
/// long as the loop watches it.
#[pyclass(module = "thalweg", frozen)]
struct Reader(Arc<Shared>);

/// The loop has let go of the node: it was closed, or the loop was.
impl Drop for Reader {
    fn drop(&mut self) {
        let shared = &self.0;
        if !shared.watching.swap(false, Ordering::AcqRel) {
            return;
        }
        shared.is_closed.store(true, Ordering::Release);
        shared.ended.store(true, Ordering::Release);
        shared.end_allocator();
        // What waits holds objects that hold the node.
        // And what ends then may use thalweg: no lock is held.
        for wakeup in shared.ready.take() {
            wakeup.forget();
        }
        drop(shared.wishes.take());
        let watches = std::mem::take(&mut *lock(&shared.watches));
        local::release(watches);
        local::release(Ending(shared.clone()));
    }
}

/// Ends the node when it is dropped.
struct Ending(Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.node.host_ended();
    }
}

#[pymethods]
impl Reader {
    fn __call__(&self, py: Python<'_>) -> PyResult<()> {
        let shared = &self.0;
        if !shared.is_home() {
            return shared.lose_home(py);
        }
        shared.check()?;
        shared.had_a_turn();
        let turn = shared.node.host_turn();
        let progress = {
            let _inside = shared.enter();
            shared.heavy.run(py, |_| shared.node.progress())
        };
        let unwatched = match progress.is_err() || shared.node.is_wound_up() {
            true => shared.unwatch(py),
            false => Ok(()),
        };
        // A task may have been told to end the program; the turn ends all the same.
        let settled = shared.settle(py, shared.resume);
        let finished = shared.finish(py, turn);
        let closing = match shared.abandoned.swap(false, Ordering::AcqRel) {
            true => shared.close_abandoned(py),
            false => Ok(()),
        };
        settled?;
        finished?;
        closing?;
        unwatched?;
        progress.map_err(|error| error::raise(py, &error))
    }
}

/// A process's context on the running event loop, one a loop.
///
/// It is to be closed. One that nobody holds any more, nor anything of it, closes by itself.
#[pyclass(module = "thalweg", frozen, weakref)]
pub struct Node {
    shared: Handle,
}

impl Node {
    fn operation(
        &self,
        what: &'static str,
        peer: Option<&str>,
        timeout: Option<f64>,
        work: impl Future<Output = Result<Outcome, thalweg::Error>> + Send + 'static,
    ) -> PyResult<Operation> {
        Ok(Operation::new(&self.shared, Terms::new(what, peer, timeout)?, work))
    }
}

#[pymethods]
impl Node {
    #[new]
    #[pyo3(signature = (**settings))]
    fn new(py: Python<'_>, settings: Option<&Bound<'_, pyo3::types::PyDict>>) -> PyResult<Self> {
        let event_loop = running_loop(py)
            .map_err(|_| PyRuntimeError::new_err("a node is made inside a running event loop"))?;
        let config::Settings { config: settings, spin, allocator } = config::read(py, settings)?;
        log::ask(py)?;
        let settings = match &allocator {
            Some(allocator) => settings.allocator(allocator.clone()),
            None => settings,
        };
        let node = thalweg::Node::with_host_loop(settings).map_err(|e| error::raise(py, &e))?;
        let descriptor = node.host_fd().map(|fd| fd.as_raw_fd()).ok_or_else(|| {
            PyRuntimeError::new_err("a node without a descriptor cannot be watched")
        })?;
        // Where the package nest_asyncio lets tasks run the loop that runs them, none of them may go
        // on inside of the reader callback: the loop could not call that again meanwhile.
        let nests = event_loop.hasattr("_nest_patched")?;
        let resume = if nests { Resume::Soon } else { Resume::Now };
        let shared = Arc::new(Shared {
            node: Local::new(node),
            spin,
            thread: std::thread::current().id(),
            event_loop: PyWeakrefReference::new(&event_loop)?.unbind(),
            descriptor,
            watching: AtomicBool::new(true),
            is_closed: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            resume,
            abandoned: AtomicBool::new(false),
            ready: List::new(),
            wishes: List::new(),
            interrupts: List::new(),
            watches: Mutex::default(),
            next_watch: AtomicU64::new(0),
            heavy: Heavy::default(),
            resting: Heavy::default(),
            made: Instant::now(),
            at_once_since: AtomicU64::new(0),
            others_turn: AtomicBool::new(false),
            allocator,
        });
        if let Some(allocator) = &shared.allocator {
            allocator.attach(&shared);
        }
        let reader = Bound::new(py, Reader(shared.clone()))?;
        event_loop.call_method1("add_reader", (descriptor, reader))?;
        let node = Node { shared: Arc::new(Keep(shared)) };
        node.shared.settle(py, Resume::Soon)?;
        Ok(node)
    }

    /// Listens at exactly this address (``thalweg://host:port``; port 0 lets the system choose).
    fn listen(&self, py: Python<'_>, address: String) -> PyResult<Operation> {
        log::ask(py)?;
        let node = (*self.shared.node).clone();
        let work = async move { node.listen(address).await.map(Outcome::Listener) };
        self.operation("listen", None, None, work)
    }

    /// Connects to a listener.
    #[pyo3(signature = (address, *, timeout=None))]
    fn connect(
        &self,
        py: Python<'_>,
        address: String,
        timeout: Option<f64>,
    ) -> PyResult<Operation> {
        log::ask(py)?;
        let node = (*self.shared.node).clone();
        let peer = address.clone();
        let work = async move { node.connect(address).await.map(Outcome::Endpoint) };
        self.operation("connect", Some(&peer), timeout, work)
    }

    /// Registers writable memory, so that peers with its key can put to it and get from it.
    #[pyo3(signature = (buffer, access="readwrite"))]
    fn register(&self, buffer: &Bound<'_, PyAny>, access: &str) -> PyResult<Region> {
        let memory = PyMemory::writing(&self.shared, buffer, None)?;
        Region::register(buffer.py(), &self.shared, memory, access)
    }

    /// What this node has counted, by name.
    fn stats(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let stats = self.shared.locking(py, || self.shared.node.stats())?;
        report::node_stats(py, &stats)
    }

    /// Every link that this build knows: whether it is here, why, and what would fix it.
    fn capabilities<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        report::capabilities(py, &self.shared.node.capabilities())
    }

    /// Closes every endpoint with this reason, and then the node.
    #[pyo3(signature = (code=0, text=String::new()))]
    fn close(&self, code: u32, text: String) -> PyResult<Operation> {
        let node = (*self.shared.node).clone();
        self.operation("close", None, None, async move {
            node.close(CloseReason::new(code, text)).await;
            Ok(Outcome::NodeClosed)
        })
    }

    /// Whether the node was closed.
    #[getter]
    fn is_closed(&self) -> bool {
        self.shared.is_closed()
    }

    fn __aenter__(slf: Bound<'_, Self>) -> PyResult<Bound<'_, PyAny>> {
        with_block(slf.as_any(), "enter")
    }

    fn __aexit__<'py>(
        slf: Bound<'py, Self>,
        _kind: &Bound<'py, PyAny>,
        _value: &Bound<'py, PyAny>,
        _traceback: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        with_block(slf.as_any(), "leave")
    }

    fn __repr__(&self) -> &'static str {
        if self.is_closed() { "<thalweg.Node, closed>" } else { "<thalweg.Node>" }
    }
}

/// The two ends of `async with`, which are coroutines and so written in Python.
pub fn with_block<'py>(
    object: &Bound<'py, PyAny>,
    end: &'static str,
) -> PyResult<Bound<'py, PyAny>> {
    used(object.py())?.blocks.bind(object.py()).getattr(end)?.call1((object,))
}
