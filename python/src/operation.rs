//! Operations as awaitables, and who wakes whom.
//!
//! An [`Operation`] holds one of thalweg's futures and is its own iterator, as a coroutine is:
//! each `send` polls. While the future is pending it yields a [`Waiter`], which behaves towards
//! asyncio's tasks as an `asyncio.Future` does, with one difference: when it is woken inside the
//! reader callback, the task goes on at once, in that callback, instead of one turn of the loop
//! later. What is ready is taken when the task resumes and not before, so a cancelled task has
//! taken nothing.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyRuntimeError, PyRuntimeWarning, PyStopIteration, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use thalweg::{Error, Message};

use crate::buffer::Lent;
use crate::node::{Handle, Shared};
use crate::used::used;
use crate::{buffer, endpoint, error, frame, listener, local};

/// What an operation came to, before it is made a Python object.
pub enum Outcome {
    Nothing,
    Message(Message),
    Tagged { tag: u64, len_bytes: usize },
    Endpoint(thalweg::Endpoint),
    Listener(thalweg::Listener),
    Ended(Error),
    NodeClosed,
}

/// What an operation runs.
pub type Work = Pin<Box<dyn Future<Output = Result<Outcome, Error>> + Send>>;

/// Whether polling may copy much, so that the GIL is let go of meanwhile. Kept from poll to poll,
/// and shared by the operations of an endpoint.
///
/// To let go of the GIL costs little by itself, but where threads of Python's compute, getting it
/// back takes up to their switch interval (5 ms): short messages do not pay that.
#[derive(Default)]
pub struct Heavy {
    is_heavy: AtomicBool,
    /// How many operations have let others go first, and have not begun yet.
    queue: AtomicUsize,
}

/// The place of an operation that has let others go first. Those that come after it line up, so that
/// they begin in the order in which they were awaited.
struct Place(Arc<Heavy>);

impl Place {
    fn new(heavy: &Arc<Heavy>) -> Self {
        heavy.queue.fetch_add(1, Ordering::Relaxed);
        Place(heavy.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.queue.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A poll that takes longer than this is one that copies.
const HEAVY: Duration = Duration::from_micros(30);

/// How long an operation that copies goes on before the loop's other tasks run. A poll copies at
/// most 1 MiB, in 0.1 to 0.2 ms; to go by way of the loop between two of them takes some 0.02 ms.
const COPIES_FOR: Duration = Duration::from_millis(1);

impl Heavy {
    pub fn set(&self, heavy: bool) {
        self.is_heavy.store(heavy, Ordering::Relaxed);
    }

    pub fn is_set(&self) -> bool {
        self.is_heavy.load(Ordering::Relaxed)
    }

    /// Runs something that never waits, with the GIL or without it. It is told when it began.
    pub fn run<R: Send>(&self, py: Python<'_>, work: impl FnOnce(Instant) -> R + Send) -> R {
        let began = Instant::now();
        let result = if self.is_set() { py.detach(|| work(began)) } else { work(began) };
        self.set(began.elapsed() > HEAVY);
        result
    }
}

/// A task's callback, with the context that it runs in.
struct Callback {
    call: Py<PyAny>,
    context: Py<PyAny>,
}

/// How a woken task goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// Now: we are in the reader callback, and no task is running.
    Now,
    /// In the loop's next turn.
    Soon,
}

/// The waker of one operation.
pub struct Wakeup {
    shared: Weak<Shared>,
    woken: AtomicBool,
    /// Its operation is being polled, and looks at `woken` afterwards.
    polling: AtomicBool,
    callbacks: Mutex<Vec<Callback>>,
    /// For that of a watch.
    watch: Option<u64>,
}

impl Wakeup {
    fn new(shared: &Arc<Shared>, watch: Option<u64>) -> Arc<Self> {
        Arc::new(Wakeup {
            shared: Arc::downgrade(shared),
            woken: AtomicBool::new(false),
            polling: AtomicBool::new(false),
            callbacks: Mutex::new(Vec::new()),
            watch,
        })
    }

    fn callbacks(&self) -> MutexGuard<'_, Vec<Callback>> {
        self.callbacks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn wake_up(self: &Arc<Self>) {
        // Sequentially consistent, as in `Operation::poll` and `Waiter::add_done_callback`: whoever
        // is woken during a poll sees it when it asks to be called back.
        if self.woken.swap(true, Ordering::SeqCst) || self.polling.load(Ordering::SeqCst) {
            return;
        }
        match self.shared.upgrade().filter(|shared| !shared.has_ended()) {
            Some(shared) => shared.ready(self.clone()),
            // The loop has ended, and nobody goes on. The tasks that waited hold this operation.
            None => self.forget(),
        }
    }

    /// Nobody goes on.
    pub fn forget(&self) {
        let callbacks = std::mem::take(&mut *self.callbacks());
        drop(callbacks);
    }

    /// Lets whoever waits go on.
    pub fn resume(&self, py: Python<'_>, shared: &Arc<Shared>, how: Resume) -> PyResult<()> {
        if let Some(id) = self.watch
            && let Some(watch) = shared.take_watch(id)
        {
            return watch.look(py, shared, id);
        }
        let callbacks = std::mem::take(&mut *self.callbacks());
        let used = used(py)?;
        let mut result = Ok(());
        for callback in callbacks {
            let called = match how {
                Resume::Now => callback
                    .context
                    .bind(py)
                    .call_method1(&used.run, (callback.call, &used.woken))
                    .map(drop),
                Resume::Soon => call_soon(py, shared, callback),
            };
            // Only what ends the program comes here; the others go on all the same.
            result = result.and(called);
        }
        result
    }
}

impl Wake for Wakeup {
    fn wake(self: Arc<Self>) {
        self.wake_up();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.wake_up();
    }
}

fn call_soon(py: Python<'_>, shared: &Shared, callback: Callback) -> PyResult<()> {
    let Callback { call, context } = callback;
    let used = used(py)?;
    let keywords = PyDict::new(py);
    keywords.set_item(&used.context, context)?;
    shared
        .event_loop(py)?
        .call_method(&used.call_soon, (call, &used.woken), Some(&keywords))
        .map(drop)
}

/// Where an operation is.
enum State {
    /// Not awaited yet.
    New(Work),
    Running(Work),
    /// Over or withdrawn; the caller's memory is still in use. Then it ends like this.
    Settling(Result<Outcome, PyErr>),
    Over,
}

struct Inner {
    state: State,
    expired: bool,
    timer: Option<Py<PyAny>>,
    place: Option<Place>,
}

/// How an operation is described and how long it may take.
pub struct Terms {
    pub what: &'static str,
    pub peer: Option<String>,
    pub timeout: Option<f64>,
    pub heavy: Arc<Heavy>,
    /// It takes what has arrived: once it has begun, it must not wait before it says so, since
    /// whoever is cancelled meanwhile would lose that.
    pub takes: bool,
}

impl Terms {
    pub fn new(what: &'static str, peer: Option<&str>, timeout: Option<f64>) -> PyResult<Self> {
        if timeout.is_some_and(|seconds| seconds.is_nan() || seconds < 0.0) {
            return Err(PyValueError::new_err("timeout: a number of seconds, or None"));
        }
        let peer = peer.map(str::to_owned);
        Ok(Terms { what, peer, timeout, heavy: Arc::default(), takes: false })
    }

    pub fn sharing(mut self, heavy: &Arc<Heavy>) -> Self {
        self.heavy = heavy.clone();
        self
    }

    pub fn taking(mut self) -> Self {
        self.takes = true;
        self
    }
}

/// An operation in flight. Nothing happens before it is awaited; it is awaited once.
///
/// A cancelled one is withdrawn: ``CancelledError`` is raised once nothing can write to memory of
/// the caller's any more. What had arrived for a receive by then is there for the next receive.
#[pyclass(module = "thalweg", frozen)]
pub struct Operation {
    shared: Handle,
    inner: Mutex<Inner>,
    wakeup: Arc<Wakeup>,
    waker: Waker,
    lent: Option<Arc<Lent>>,
    terms: Terms,
}

impl Operation {
    /// An operation that owns nothing of the caller's that is written to.
    pub fn new(
        shared: &Handle,
        terms: Terms,
        work: impl Future<Output = Result<Outcome, Error>> + Send + 'static,
    ) -> Self {
        let wakeup = Wakeup::new(shared, None);
        Operation::with(shared, terms, wakeup, None, Box::pin(work))
    }

    /// An operation that writes to memory of the caller's.
    pub fn lending<B>(
        shared: &Handle,
        terms: Terms,
        lend: impl FnOnce(&Arc<Lent>) -> PyResult<B>,
        work: impl FnOnce(B) -> Work,
    ) -> PyResult<Self> {
        let wakeup = Wakeup::new(shared, None);
        let lent = Lent::new(&wakeup);
        let work = work(lend(&lent)?);
        Ok(Operation::with(shared, terms, wakeup, Some(lent), work))
    }

    fn with(
        shared: &Handle,
        terms: Terms,
        wakeup: Arc<Wakeup>,
        lent: Option<Arc<Lent>>,
        work: Work,
    ) -> Self {
        let waker = Waker::from(wakeup.clone());
        let inner = Inner { state: State::New(work), expired: false, timer: None, place: None };
        let inner = Mutex::new(inner);
        Operation { shared: shared.clone(), inner, wakeup, waker, lent, terms }
    }

    /// Only one thread gets here (`Shared::check`), so it is taken only by somebody who is called
    /// back from inside.
    fn inner(&self) -> PyResult<MutexGuard<'_, Inner>> {
        self.inner
            .try_lock()
            .map_err(|_| PyRuntimeError::new_err("this operation is being used already"))
    }

    fn nothing_lent(&self) -> bool {
        self.lent.as_ref().is_none_or(|lent| lent.is_none())
    }

    /// Polls, and again while there is more to do at once, for this long.
    fn poll_while_woken(
        &self,
        work: &mut Work,
        began: Instant,
        limit: Duration,
    ) -> Poll<Result<Outcome, Error>> {
        loop {
            self.wakeup.woken.store(false, Ordering::SeqCst);
            let polled = work.as_mut().poll(&mut Context::from_waker(&self.waker));
            let woken = self.wakeup.woken.load(Ordering::SeqCst);
            if polled.is_ready() || !woken || began.elapsed() >= limit {
                return polled;
            }
        }
    }

    /// Polls until the future is ready, pending, or has spun for long enough. And when that began.
    fn poll(&self, py: Python<'_>, work: &mut Work) -> (Poll<Result<Outcome, Error>>, Instant) {
        let spin = self.shared.spin;
        let mut first = None;
        self.wakeup.polling.store(true, Ordering::SeqCst);
        let polled = loop {
            let (polled, began) = {
                let _inside = self.shared.enter();
                let copies_for =
                    if self.terms.heavy.is_set() { COPIES_FOR } else { Duration::ZERO };
                self.terms
                    .heavy
                    .run(py, |began| (self.poll_while_woken(work, began, copies_for), began))
            };
            let began = *first.get_or_insert(began);
            if polled.is_ready() || spin.is_zero() || !self.wakeup.woken.load(Ordering::SeqCst) {
                break (polled, began);
            }
            if began.elapsed() >= spin {
                break (polled, began);
            }
        };
        self.wakeup.polling.store(false, Ordering::SeqCst);
        polled
    }

    /// One step: `Some` is how it ended.
    fn step(&self, py: Python<'_>, op: &Bound<'_, Self>) -> PyResult<Option<PyResult<Outcome>>> {
        let mut inner = self.inner()?;
        if let (State::New(_), Some(seconds)) = (&inner.state, self.terms.timeout) {
            let (event_loop, expire) = (self.shared.event_loop(py)?, op.getattr("_expire")?);
            let timer = event_loop.call_method1("call_later", (seconds, expire))?;
            inner.timer = Some(timer.unbind());
        }
        inner.place = None;
        let (mut work, is_new) = match std::mem::replace(&mut inner.state, State::Over) {
            State::Over => {
                return Err(PyRuntimeError::new_err("an operation can be awaited only once"));
            }
            State::Settling(result) => {
                self.shared.had_a_turn();
                return Ok(self.settled(py, inner, result));
            }
            State::New(work) if self.lets_others_go_first() => {
                inner.state = State::Running(work);
                inner.place = Some(Place::new(&self.terms.heavy));
                // It need not wait for anything else.
                self.wakeup.woken.store(true, Ordering::SeqCst);
                return Ok(None);
            }
            State::New(work) => (work, true),
            State::Running(work) => {
                self.shared.had_a_turn();
                (work, false)
            }
        };
        let (polled, began) = self.poll(py, &mut work);
        let mut others_turn = false;
        let result = match polled {
            Poll::Ready(result) => {
                others_turn = is_new && self.shared.answered_at_once(began);
                local::release(work);
                result.map_err(|error| error::raise(py, &error))
            }
            Poll::Pending if inner.expired => {
                let (what, peer) = (self.terms.what, self.terms.peer.as_deref());
                let seconds = self.terms.timeout.unwrap_or_default();
                self.withdraw(work);
                Err(error::timed_out(py, what, peer, seconds))
            }
            Poll::Pending => {
                self.shared.had_a_turn();
                inner.state = State::Running(work);
                return Ok(None);
            }
        };
        // What thalweg has let go of is given back before anything is said.
        {
            let _inside = self.shared.enter();
            buffer::give_back(py);
        }
        // What takes nothing may as well end a turn later.
        if others_turn && matches!(result, Ok(Outcome::Nothing)) {
            inner.state = State::Settling(result);
            self.wakeup.woken.store(true, Ordering::SeqCst);
            return Ok(None);
        }
        Ok(self.settled(py, inner, result))
    }

    /// Whether it begins in the loop's next turn only, since others have gone without for long.
    fn lets_others_go_first(&self) -> bool {
        let queue = &self.terms.heavy.queue;
        self.terms.takes && (self.shared.is_others_turn() || queue.load(Ordering::Relaxed) > 0)
    }

    fn settled(
        &self,
        py: Python<'_>,
        mut inner: MutexGuard<'_, Inner>,
        result: PyResult<Outcome>,
    ) -> Option<PyResult<Outcome>> {
        if !self.nothing_lent() {
            self.wakeup.woken.store(false, Ordering::SeqCst);
            if !self.nothing_lent() {
                inner.state = State::Settling(result);
                return None;
            }
        }
        let timer = inner.timer.take();
        drop(inner);
        if let Some(timer) = timer {
            // Fails for a timer that has run, which does no harm.
            let _ = timer.call_method0(py, "cancel");
        }
        Some(result)
    }

    fn withdraw(&self, work: Work) {
        let _inside = self.shared.enter();
        local::release(work);
    }

    /// Cancels it, as its task has asked for.
    fn cancel(&self, py: Python<'_>, error: PyErr) -> PyResult<()> {
        self.stop(py, error)?;
        if self.nothing_lent() {
            let _inside = self.shared.enter();
            self.wakeup.wake_up();
        }
        self.shared.settle(py, Resume::Soon)
    }

    /// Withdraws it; it ends with `error` once nothing writes to the caller's memory.
    fn stop(&self, py: Python<'_>, error: PyErr) -> PyResult<()> {
        let mut inner = self.inner()?;
        inner.place = None;
        match std::mem::replace(&mut inner.state, State::Over) {
            State::New(work) | State::Running(work) => {
                self.withdraw(work);
                inner.state = State::Settling(Err(error));
            }
            State::Settling(_) => inner.state = State::Settling(Err(error)),
            State::Over => {}
        }
        drop(inner);
        self.shared.settle(py, Resume::Soon)
    }

    fn go_on<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let (py, this) = (slf.py(), slf.get());
        this.shared.check()?;
        let turn = this.shared.node.host_turn();
        let ended = this.step(py, slf);
        let settled = this.shared.settle(py, Resume::Soon);
        if let Err(error) = settled.and(this.shared.finish(py, turn)) {
            // Not this operation's affair, whose outcome must not be lost.
            match error::ends_program(py, &error) {
                true => this.shared.raise_soon(py, error),
                false => error.write_unraisable(py, None),
            }
        }
        match ended? {
            Some(result) => {
                let value = this.to_object(py, result?)?;
                let value = PyTuple::new(py, [value])?;
                Err(PyStopIteration::new_err(value.unbind()))
            }
            None => {
                // A waiter that cannot tell its loop would leave the task waiting for ever.
                let event_loop = this.shared.event_loop(py).inspect_err(|_| this.close(py))?;
                let (event_loop, operation) = (event_loop.unbind(), slf.clone().unbind());
                let waiter = Waiter { operation, event_loop, blocking: true.into() };
                Ok(Bound::new(py, waiter)?.into_any())
            }
        }
    }

    fn to_object(&self, py: Python<'_>, outcome: Outcome) -> PyResult<Py<PyAny>> {
        match outcome {
            Outcome::Nothing => Ok(py.None()),
            Outcome::Message(message) => {
                self.terms.heavy.set(message.len_bytes() >= endpoint::LARGE_BYTES);
                frame::views(py, message)
            }
            Outcome::Tagged { tag, len_bytes } => {
                Ok((tag, len_bytes).into_pyobject(py)?.into_any().unbind())
            }
            Outcome::Endpoint(endpoint) => endpoint::Endpoint::make(py, &self.shared, endpoint),
            Outcome::Listener(listener) => listener::Listener::make(py, &self.shared, listener),
            Outcome::Ended(error) => Ok(error::to_object(py, &error)?.unbind()),
            Outcome::NodeClosed => {
                self.shared.wind_up(py)?;
                Ok(py.None())
            }
        }
    }
}

#[pymethods]
impl Operation {
    fn __await__(slf: Bound<'_, Self>) -> PyResult<Bound<'_, Self>> {
        slf.get().shared.check()?;
        Ok(slf)
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__<'py>(slf: Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        Operation::go_on(&slf)
    }

    #[pyo3(signature = (_value=None))]
    fn send<'py>(
        slf: Bound<'py, Self>,
        _value: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        Operation::go_on(&slf)
    }

    /// What a task does to a coroutine that is to be cancelled.
    #[pyo3(signature = (kind, value=None, _traceback=None))]
    fn throw<'py>(
        slf: Bound<'py, Self>,
        kind: Bound<'py, PyAny>,
        value: Option<Bound<'py, PyAny>>,
        _traceback: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let this = slf.get();
        this.shared.check()?;
        let error = match value {
            Some(value) if !value.is_none() => PyErr::from_value(value),
            _ if kind.is_instance_of::<pyo3::exceptions::PyBaseException>() => {
                PyErr::from_value(kind)
            }
            _ => PyErr::from_value(kind.call0()?),
        };
        if matches!(this.inner()?.state, State::Over) {
            return Err(error);
        }
        this.stop(slf.py(), error)?;
        Operation::go_on(&slf)
    }

    /// The coroutine that awaits it is being destroyed.
    fn close(&self, py: Python<'_>) {
        let Ok(mut inner) = self.inner() else { return };
        let state = std::mem::replace(&mut inner.state, State::Over);
        let timer = inner.timer.take();
        inner.place = None;
        drop(inner);
        if let State::New(work) | State::Running(work) = state {
            self.withdraw(work);
        }
        if let Some(timer) = timer {
            // Fails for a timer that has run, which does no harm.
            let _ = timer.call_method0(py, "cancel");
        }
    }

    /// Its time is over.
    fn _expire(&self, py: Python<'_>) -> PyResult<()> {
        let mut inner = self.inner()?;
        inner.expired = true;
        drop(inner);
        {
            let _inside = self.shared.enter();
            self.wakeup.wake_up();
        }
        self.shared.settle(py, Resume::Soon)
    }

    fn __repr__(&self) -> String {
        let peer = self.terms.peer.as_deref().unwrap_or("nobody yet");
        format!("<thalweg.Operation {} with {peer}>", self.terms.what)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        let state = std::mem::replace(&mut inner.state, State::Over);
        if matches!(state, State::New(_)) {
            let what = self.terms.what;
            let text = format!("thalweg: operation {what:?} was never awaited");
            error::warn::<PyRuntimeWarning>(text);
        }
        if let State::New(work) | State::Running(work) = state {
            local::release(work);
        }
    }
}

/// What a pending operation yields to its task: as much of an `asyncio.Future` as a task needs.
#[pyclass(module = "thalweg", frozen)]
struct Waiter {
    operation: Py<Operation>,
    event_loop: Py<PyAny>,
    blocking: AtomicBool,
}

#[pymethods]
impl Waiter {
    #[getter(_asyncio_future_blocking)]
    fn blocking(&self) -> bool {
        self.blocking.load(Ordering::Relaxed)
    }

    #[setter(_asyncio_future_blocking)]
    fn set_blocking(&self, blocking: bool) {
        self.blocking.store(blocking, Ordering::Relaxed);
    }

    fn get_loop(&self, py: Python<'_>) -> Py<PyAny> {
        self.event_loop.clone_ref(py)
    }

    #[pyo3(signature = (call, *, context=None))]
    fn add_done_callback(
        &self,
        py: Python<'_>,
        call: Py<PyAny>,
        context: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let context = match context {
            Some(context) => context,
            None => used(py)?.copy_context.call0(py)?,
        };
        let operation = self.operation.get();
        let callback = Callback { call, context };
        if operation.wakeup.woken.load(Ordering::SeqCst) {
            return call_soon(py, &operation.shared, callback);
        }
        operation.wakeup.callbacks().push(callback);
        Ok(())
    }

    fn remove_done_callback(&self, call: &Bound<'_, PyAny>) -> PyResult<usize> {
        let mut callbacks = self.operation.get().wakeup.callbacks();
        let is_other = |known: &Callback| !known.call.is(call);
        let (kept, removed) = std::mem::take(&mut *callbacks).into_iter().partition(is_other);
        *callbacks = kept;
        drop(callbacks);
        // Without the lock: their end may be Python code.
        let removed: Vec<Callback> = removed;
        Ok(removed.len())
    }

    fn result(&self) {}

    fn exception(&self) {}

    fn done(&self) -> bool {
        self.operation.get().wakeup.woken.load(Ordering::SeqCst)
    }

    fn cancelled(&self) -> bool {
        false
    }

    /// Called by `Task.cancel`. `False`: it is woken already, and the task is to be told when it
    /// goes on.
    #[pyo3(signature = (msg=None))]
    fn cancel(&self, py: Python<'_>, msg: Option<Py<PyAny>>) -> PyResult<bool> {
        let operation = self.operation.get();
        operation.shared.check_thread()?;
        if operation.wakeup.woken.load(Ordering::SeqCst) {
            operation.wakeup.resume(py, &operation.shared, Resume::Soon)?;
            return Ok(false);
        }
        let class = used(py)?.cancelled_error.bind(py);
        let error = match msg {
            Some(msg) if !msg.is_none(py) => class.call1((msg,))?,
            _ => class.call0()?,
        };
        let error = PyErr::from_value(error);
        if local::is_allocating() {
            // A signal's handler, as likely as not. Nothing of thalweg's may be touched here.
            let operation = self.operation.clone_ref(py);
            self.operation.get().shared.wish(Wish { operation, error });
        } else {
            operation.cancel(py, error)?;
        }
        Ok(true)
    }
}

/// A cancellation that waits until it can be carried out.
pub struct Wish {
    operation: Py<Operation>,
    error: PyErr,
}

impl Wish {
    pub fn carry_out(self, py: Python<'_>) -> PyResult<()> {
        self.operation.get().cancel(py, self.error)
    }
}

/// A future that no task awaits: it runs in the node, and a callback is told what came of it.
pub struct Watch {
    waker: Waker,
    wakeup: Arc<Wakeup>,
    work: Work,
    callback: Option<Py<PyAny>>,
}

impl Watch {
    /// Begins to watch: `callback(outcome)`, if there is one, is called once, in a turn of the loop
    /// of its own.
    pub fn begin(
        py: Python<'_>,
        shared: &Arc<Shared>,
        work: Work,
        callback: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let id = shared.new_watch_id();
        let wakeup = Wakeup::new(shared, Some(id));
        let watch = Watch { waker: Waker::from(wakeup.clone()), wakeup, work, callback };
        watch.look(py, shared, id)?;
        shared.settle(py, Resume::Soon)
    }

    fn look(mut self, py: Python<'_>, shared: &Arc<Shared>, id: u64) -> PyResult<()> {
        self.wakeup.woken.store(false, Ordering::SeqCst);
        let polled = {
            let _inside = shared.enter();
            let mut poll = || self.work.as_mut().poll(&mut Context::from_waker(&self.waker));
            // As everywhere, other threads take no lock with the GIL in hand.
            if shared.is_home() { poll() } else { py.detach(poll) }
        };
        let outcome = match polled {
            Poll::Pending => {
                // Only this thread looks at watches, and it does so after this.
                shared.keep_watch(id, self);
                return Ok(());
            }
            Poll::Ready(outcome) => outcome,
        };
        let Watch { work, callback, .. } = self;
        local::release(work);
        if let Ok(Outcome::NodeClosed) = outcome {
            shared.wind_up(py)?;
        }
        let Some(callback) = callback else { return Ok(()) };
        let object = match outcome {
            Ok(Outcome::Ended(error)) | Err(error) => error::to_object(py, &error)?.unbind(),
            Ok(_) => py.None(),
        };
        shared.event_loop(py)?.call_method1("call_soon", (callback, object)).map(drop)
    }
}
