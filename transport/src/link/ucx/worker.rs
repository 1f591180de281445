//! The worker: every call into UCX is made with its gate held.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context as TaskContext, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smallvec::SmallVec;
use thalweg_ffi::ucx::{
    self as ffi, Ucx, ucp_address_t, ucp_am_recv_param_t, ucp_ep_h, ucp_worker_h, ucs_status_t,
};

use super::blob::{NAMES_MAX, fits, is_name};
use super::bulk;
use super::context::{Context, Tls};
use super::gate::Key;
use super::inbox::{AT_ONCE_MAX, Body, Desc, Dispatch, Entry, Fault, INLINE_MAX, Mailbox};
use super::lanes::{self, Lane, Resource};
use super::request::{
    Begun, CloseOp, FlushOp, Packed, SendOp, begun, closed, flushed, params, segments, send_params,
};
use super::wire::{HEADER_BYTES, Header, Kind, LAST_WORD, LONG_HEADER_BYTES};
use super::{Scope, Unavailable, describe, link_error};
use crate::error::LinkError;
use crate::link::few::copy_few;
use crate::link::{Armed, HEAD_MAX, LinkKind, insist};
use crate::runtime::{Attempt, Fd, ForkGuard, Interest, Reactor, Source};

/// Our one active message.
const AM_ID: u32 = 1;
/// How long the end of a worker waits for UCX to let go of memory before it leaves the worker
/// standing.
const PATIENCE: Duration = Duration::from_secs(2);
/// UCX refuses to be armed while a send waits for room in the peer's memory, which nothing tells of; for
/// ever, if the peer was killed meanwhile (1.13: the endpoint is closed, and what it did not flush stays). For
/// so long it is polled; then the resident task looks at it from time to time. A peer that was merely stopped
/// cost more than a core before.
const REFUSED_MAX: Duration = Duration::from_micros(200);
/// Packed messages are at most this long.
pub(super) const PACKED_MAX: usize = LONG_HEADER_BYTES + HEAD_MAX + INLINE_MAX;

/// Whom the worker's descriptor wakes.
pub(super) struct Sleeper {
    /// The descriptor will fire for what comes next, and UCX is at nothing that it would have to be
    /// polled for. See [`Sleeper::disarm`].
    armed: AtomicBool,
    /// The endpoint that armed last: it moves the data itself.
    last: Mutex<Option<Waker>>,
    /// The resident task, which sees to the others.
    resident: Mutex<Option<Waker>>,
    dispatch: Arc<Dispatch>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sleeper {
    pub fn set_resident(&self, waker: &Waker) {
        let mut resident = lock(&self.resident);
        match &*resident {
            Some(known) if known.will_wake(waker) => {}
            _ => *resident = Some(waker.clone()),
        }
    }

    /// UCX may be at something from here on that nothing will tell of: a send, or an answer of its own,
    /// that waits for room in the peer's memory is moved on only by polling. So whoever sleeps next has
    /// to ask UCX again, which refuses then.
    fn disarm(&self) {
        if self.armed.load(Ordering::Relaxed) {
            self.armed.store(false, Ordering::Release);
        }
    }

    /// The resident task, if it has been here.
    pub fn resident(&self) -> Option<Waker> {
        lock(&self.resident).clone()
    }

    /// An endpoint is gone: it must not be woken in place of others.
    pub fn forget(&self, waker: &Waker) {
        let mut last = lock(&self.last);
        if last.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *last = None;
        }
    }
}

impl Wake for Sleeper {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.armed.store(false, Ordering::Release);
        let last = lock(&self.last).take();
        let alone = last.is_some() && self.dispatch.parked.load(Ordering::Acquire) <= 1;
        if let Some(last) = last {
            last.wake();
        }
        if !alone && let Some(resident) = self.resident() {
            resident.wake();
        }
    }
}

/// The node's worker. Ends with its last user, once UCX has let go of everything.
pub(super) struct Worker {
    pub ucx: &'static Ucx,
    context: Context,
    raw: ucp_worker_h,
    pub dispatch: Arc<Dispatch>,
    /// What peers connect to.
    pub address: Vec<u8>,
    /// Its transports over hardware, by name.
    pub transports: Vec<String>,
    source: Source,
    pub sleeper: Arc<Sleeper>,
    sleeper_waker: Waker,
    fork: ForkGuard,
}

// SAFETY: the handle is used with the gate held only, and UCX was told so (serialised thread mode).
unsafe impl Send for Worker {}
// SAFETY: as above.
unsafe impl Sync for Worker {}

/// A worker that is being made: destroyed again if that fails.
struct Raw<'a> {
    context: &'a Context,
    raw: ucp_worker_h,
}

impl Drop for Raw<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `ucp_worker_create`, and nothing uses it.
        unsafe { (self.context.ucx.functions.ucp_worker_destroy)(self.raw) };
    }
}

/// A context that is ended again if no worker comes of it.
struct Ends(Option<Context>);

impl Ends {
    fn new(ucx: &'static Ucx, tls: Tls<'_>) -> Result<Ends, Unavailable> {
        Context::new(ucx, tls).map(|context| Ends(Some(context)))
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        if let Some(context) = self.0.take() {
            // SAFETY: no worker is in it.
            unsafe { context.end() };
        }
    }
}

impl Worker {
    /// A node's.
    pub fn new(
        ucx: &'static Ucx,
        reactor: &Reactor,
        scope: &Scope,
    ) -> Result<Arc<Worker>, Unavailable> {
        let ends = Ends::new(ucx, scope.tls())?;
        let resources = ends.0.as_ref().map(Context::resources).unwrap_or_default();
        let transports = transports(resources, scope)?;
        Worker::within(ucx, reactor, ends, transports)
    }

    /// One that has a single transport.
    pub fn over(
        ucx: &'static Ucx,
        reactor: &Reactor,
        transport: &str,
    ) -> Result<Arc<Worker>, Unavailable> {
        Worker::within(ucx, reactor, Ends::new(ucx, Tls::Only(transport))?, Vec::new())
    }

    fn within(
        ucx: &'static Ucx,
        reactor: &Reactor,
        mut ends: Ends,
        transports: Vec<String>,
    ) -> Result<Arc<Worker>, Unavailable> {
        let Some(context) = &ends.0 else { return Err(failed(ucx, "", 0)) };
        let made = Worker::make(context)?;
        let dispatch = Arc::new(Dispatch::default());
        set_handler(ucx, made.raw, &dispatch)?;
        check_header(ucx, made.raw)?;
        let address = address(ucx, made.raw)?;
        let source = descriptor(ucx, made.raw, reactor)?;
        let sleeper = Arc::new(Sleeper {
            armed: AtomicBool::new(false),
            last: Mutex::new(None),
            resident: Mutex::new(None),
            dispatch: dispatch.clone(),
        });
        let raw = made.raw;
        std::mem::forget(made);
        let Some(context) = ends.0.take() else { return Err(failed(ucx, "", 0)) };
        Ok(Arc::new(Worker {
            ucx,
            context,
            raw,
            dispatch,
            address,
            transports,
            source,
            sleeper_waker: Waker::from(sleeper.clone()),
            sleeper,
            fork: ForkGuard::get(),
        }))
    }

    /// The transports that we have set for it, as `UCX_TLS` would say it.
    pub fn tls(&self) -> Option<&str> {
        self.context.tls.as_deref()
    }

    fn make(context: &Context) -> Result<Raw<'_>, Unavailable> {
        let ucx = context.ucx;
        // SAFETY: zero is a valid value of every field; the mask says which are read.
        let mut params: ffi::ucp_worker_params_t = unsafe { std::mem::zeroed() };
        params.field_mask = ffi::UCP_WORKER_PARAM_FIELD_THREAD_MODE.into();
        params.thread_mode = ffi::UCS_THREAD_MODE_SERIALIZED;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context is live; `raw` is written on success.
        let status = unsafe {
            (ucx.functions.ucp_worker_create)(context.raw(), &raw const params, &raw mut raw)
        };
        match status {
            ffi::UCS_OK => Ok(Raw { context, raw }),
            _ => Err(failed(ucx, "UCX cannot make a worker", status)),
        }
    }

    /// Takes the gate. Blocks for at most the turns of others.
    #[inline]
    pub fn lock(&self) -> Locked<'_> {
        Locked { worker: self, key: self.dispatch.gate.lock() }
    }

    #[inline]
    pub fn try_lock(&self) -> Option<Locked<'_>> {
        Some(Locked { worker: self, key: self.dispatch.gate.try_lock()? })
    }

    /// Whether it is to be polled by time: somebody sleeps, and UCX tells of nothing.
    pub fn is_looked_at(&self) -> bool {
        let Dispatch { refuses, parked, .. } = &*self.dispatch;
        refuses.load(Ordering::Acquire) && parked.load(Ordering::Acquire) > 0
    }

    /// Whoever sleeps from now on is woken by UCX, or else by the resident task, which is told here. Called
    /// with the gate open.
    pub fn armed(&self) {
        if self.dispatch.refuses.load(Ordering::Acquire)
            && let Some(resident) = self.sleeper.resident()
        {
            resident.wake();
        }
    }

    pub fn forked(&self) -> bool {
        self.fork.forked()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.forked() {
            // A child shares descriptors and memory with its parent, whose worker this is.
            return;
        }
        let until = Instant::now() + PATIENCE;
        let mut worker = self.lock();
        while worker.is_busy() && Instant::now() < until {
            worker.progress();
        }
        let busy = worker.is_busy();
        drop(worker);
        if busy {
            tracing::error!("UCX does not let go of memory: its worker is left standing");
            std::mem::forget(self.dispatch.clone());
            return;
        }
        // SAFETY: no request is in flight, every endpoint is closed (each holds the worker), and
        // nobody else has the worker any more.
        unsafe {
            (self.ucx.functions.ucp_worker_destroy)(self.raw);
            self.context.end();
        }
    }
}

/// Those of the context's transports that lie on hardware, as peers are told of them.
fn transports(all: Vec<Resource>, scope: &Scope) -> Result<Vec<String>, Unavailable> {
    let reach = scope.reach();
    if let Scope::Hardware { without, .. } = scope {
        let mut unwanted: Vec<_> = all.iter().map(|one| one.transport.as_str()).collect();
        unwanted.retain(|name| without.contains(name));
        unwanted.dedup();
        if !unwanted.is_empty() {
            return Err(Unavailable {
                reason: format!(
                    "UCX_TLS of this site lets UCX use {}, by which whoever connects reaches into this \
                     host: that is for whoever names ucx",
                    unwanted.join(", ")
                ),
                fix: insist(LinkKind::Ucx),
            });
        }
    }
    let over = all.iter().filter(|one| reach.has(&one.transport, &one.device));
    let mut names: Vec<_> =
        over.map(|one| one.transport.clone()).filter(|name| is_name(name)).collect();
    names.sort();
    names.dedup();
    names.truncate(NAMES_MAX);
    if names.is_empty() && matches!(scope, Scope::Hardware { .. }) {
        let mut has: Vec<_> = all.into_iter().map(|one| one.transport).collect();
        has.dedup();
        return Err(Unavailable {
            reason: format!("UCX has no transport over {}: {}", reach.names(), has.join(", ")),
            fix: insist(LinkKind::Ucx),
        });
    }
    Ok(names)
}

fn failed(ucx: &Ucx, doing: &str, status: ucs_status_t) -> Unavailable {
    Unavailable { reason: describe(ucx, doing, status), fix: String::new() }
}

fn set_handler(ucx: &Ucx, raw: ucp_worker_h, dispatch: &Arc<Dispatch>) -> Result<(), Unavailable> {
    // SAFETY: zero is a valid value of every field; the mask says which are read.
    let mut handler: ffi::ucp_am_handler_param_t = unsafe { std::mem::zeroed() };
    handler.field_mask = u64::from(
        ffi::UCP_AM_HANDLER_PARAM_FIELD_ID
            | ffi::UCP_AM_HANDLER_PARAM_FIELD_CB
            | ffi::UCP_AM_HANDLER_PARAM_FIELD_ARG,
    );
    handler.id = AM_ID;
    handler.cb = Some(arrived);
    handler.arg = Arc::as_ptr(dispatch).cast_mut().cast();
    // SAFETY: the worker is live; `dispatch` outlives it, as a field beside it.
    let set = unsafe { (ucx.functions.ucp_worker_set_am_recv_handler)(raw, &raw const handler) };
    match set {
        ffi::UCS_OK => Ok(()),
        status => Err(failed(ucx, "UCX has no active messages here", status)),
    }
}

/// Whether header and head of a parcel fit every lane.
fn check_header(ucx: &Ucx, raw: ucp_worker_h) -> Result<(), Unavailable> {
    // SAFETY: zero is a valid value of every field; the mask says which are written.
    let mut attributes: ffi::ucp_worker_attr_t = unsafe { std::mem::zeroed() };
    attributes.field_mask = ffi::UCP_WORKER_ATTR_FIELD_MAX_AM_HEADER.into();
    // SAFETY: the worker is live.
    let status = unsafe { (ucx.functions.ucp_worker_query)(raw, &raw mut attributes) };
    if status != ffi::UCS_OK {
        return Err(failed(ucx, "UCX does not tell the limits of its worker", status));
    }
    if attributes.max_am_header < LONG_HEADER_BYTES + HEAD_MAX {
        return Err(Unavailable {
            reason: format!(
                "UCX's transports here take headers of {} bytes; {} are needed",
                attributes.max_am_header,
                LONG_HEADER_BYTES + HEAD_MAX
            ),
            fix: "allow other transports in UCX_TLS".into(),
        });
    }
    Ok(())
}

fn address(ucx: &Ucx, raw: ucp_worker_h) -> Result<Vec<u8>, Unavailable> {
    let mut address: *mut ucp_address_t = std::ptr::null_mut();
    let mut len = 0;
    // SAFETY: the worker is live; both are written on success.
    let status =
        unsafe { (ucx.functions.ucp_worker_get_address)(raw, &raw mut address, &raw mut len) };
    if status != ffi::UCS_OK || address.is_null() {
        return Err(failed(ucx, "UCX's worker has no address", status));
    }
    // SAFETY: UCX gave `len` bytes there; they are released once, after the copy.
    let bytes = unsafe { std::slice::from_raw_parts(address.cast::<u8>(), len) }.to_vec();
    // SAFETY: as above.
    unsafe { (ucx.functions.ucp_worker_release_address)(raw, address) };
    fits(bytes.len())?;
    Ok(bytes)
}

fn descriptor(ucx: &Ucx, raw: ucp_worker_h, reactor: &Reactor) -> Result<Source, Unavailable> {
    let mut fd = -1;
    // SAFETY: the worker is live; `fd` is written on success.
    let status = unsafe { (ucx.functions.ucp_worker_get_efd)(raw, &raw mut fd) };
    if status != ffi::UCS_OK {
        return Err(Unavailable {
            reason: describe(ucx, "UCX's transports here cannot be waited for", status),
            fix: "allow other transports in UCX_TLS".into(),
        });
    }
    let unwatched = |error: std::io::Error| Unavailable {
        reason: format!("UCX's descriptor cannot be watched: {error}"),
        fix: String::new(),
    };
    // SAFETY: UCX keeps it open for as long as the worker lives.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let own = borrowed.try_clone_to_owned().map_err(unwatched)?;
    reactor.source(Fd::new(own), Interest::Read).map_err(unwatched)
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
    // An error is looked at by progressing.
    poll(&mut fds, Some(&now)).map_or(true, |ready| ready > 0)
}

/// What became of a send: the box, unless the callback gives it back.
pub(super) type Sent = Result<Option<Box<SendOp>>, (Box<SendOp>, ucs_status_t)>;

/// The worker, with its gate held. Calls into UCX borrow it as a whole, and with it the key: while
/// one is made, nobody but callbacks gets at what the gate guards.
pub(super) struct Locked<'a> {
    pub worker: &'a Worker,
    pub key: Key<'a>,
}

impl Locked<'_> {
    /// One step. `true`: something moved.
    #[inline]
    pub fn progress(&mut self) -> bool {
        // SAFETY: the worker is live, and locked.
        let moved =
            unsafe { (self.worker.ucx.functions.ucp_worker_progress)(self.worker.raw) != 0 };
        if moved {
            self.worker.sleeper.disarm();
            self.worker.dispatch.state(&mut self.key).refused_since = None;
        }
        moved
    }

    /// As many steps as there is something to do, at most `limit`. `true`: there may be more.
    pub fn progress_all(&mut self, limit: usize) -> bool {
        (0..limit).all(|_| self.progress())
    }

    /// Whom callbacks wanted woken, to be woken when the gate is open.
    pub fn take_wakes(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.worker.dispatch.state(&mut self.key).wakes)
    }

    /// Whether callbacks wanted somebody woken.
    #[inline]
    pub fn has_wakes(&mut self) -> bool {
        !self.worker.dispatch.state(&mut self.key).wakes.is_empty()
    }

    /// A peer is gone, or was never there, that may hold up the others: whoever sees to that is to be
    /// woken when the gate is open.
    #[must_use = "nobody else may be awake"]
    pub fn suspect(&mut self) -> Option<Waker> {
        let dispatch = &self.worker.dispatch;
        if dispatch.state(&mut self.key).rings.is_empty() {
            return None;
        }
        dispatch.suspect.store(true, Ordering::Release);
        self.worker.sleeper.resident()
    }

    /// Whether UCX is at work on something.
    fn is_busy(&mut self) -> bool {
        let dispatch = &self.worker.dispatch;
        dispatch.ending.load(Ordering::Acquire) > 0 || dispatch.state(&mut self.key).in_flight > 0
    }

    /// Makes the descriptor fire for what comes next; `last` is woken first then. After `Yes`
    /// whoever parked in the worker's lock before is woken by what comes. Followed by
    /// [`Worker::armed`].
    pub fn arm(&mut self, last: Option<&Waker>) -> Result<Armed, LinkError> {
        let worker = self.worker;
        let sleeper = &worker.sleeper;
        if let Some(waker) = last {
            let mut last = lock(&sleeper.last);
            match &*last {
                Some(known) if known.will_wake(waker) => {}
                _ => *last = Some(waker.clone()),
            }
        }
        if sleeper.armed.load(Ordering::Acquire) {
            return Ok(Armed::Yes);
        }
        // SAFETY: the worker is live, and locked.
        match unsafe { (worker.ucx.functions.ucp_worker_arm)(worker.raw) } {
            ffi::UCS_OK => {
                worker.dispatch.state(&mut self.key).refused_since = None;
                worker.dispatch.refuses.store(false, Ordering::Release);
            }
            ffi::UCS_ERR_BUSY => return Ok(self.refused()),
            status => return Err(link_error(worker.ucx, "arming UCX's worker", status)),
        }
        // What has come since the last look, and before the worker was armed, some devices (soft-RoCE)
        // never tell of: UCX relies on those that do.
        if self.progress() || self.has_wakes() {
            return Ok(Armed::Busy);
        }
        sleeper.armed.store(true, Ordering::Release);
        let mut cx = TaskContext::from_waker(&worker.sleeper_waker);
        let ready = worker.source.poll_read(&mut cx, |fd| match is_readable(fd) {
            true => Ok(Attempt::More(())),
            false => Err(std::io::ErrorKind::WouldBlock.into()),
        });
        match ready {
            Poll::Pending => Ok(Armed::Yes),
            Poll::Ready(Ok(())) => {
                sleeper.armed.store(false, Ordering::Release);
                Ok(Armed::Busy)
            }
            Poll::Ready(Err(error)) => {
                sleeper.armed.store(false, Ordering::Release);
                Err(super::link::io_error("waiting for UCX's worker", &error))
            }
        }
    }

    /// UCX is not to be armed: polled for a while, and then looked at by time.
    fn refused(&mut self) -> Armed {
        let dispatch = &self.worker.dispatch;
        let since = *dispatch.state(&mut self.key).refused_since.get_or_insert_with(Instant::now);
        let refuses = since.elapsed() > REFUSED_MAX;
        dispatch.refuses.store(refuses, Ordering::Release);
        if refuses { Armed::Yes } else { Armed::Busy }
    }

    /// Connects to a peer's worker. What fails later is told to `mailbox`.
    pub fn connect(
        &mut self,
        to: &[u8],
        mailbox: &Arc<Mailbox>,
        worker: &Arc<Worker>,
    ) -> Result<Ep, ucs_status_t> {
        // SAFETY: zero is a valid value of every field; the mask says which are read.
        let mut params: ffi::ucp_ep_params_t = unsafe { std::mem::zeroed() };
        params.field_mask = u64::from(
            ffi::UCP_EP_PARAM_FIELD_REMOTE_ADDRESS
                | ffi::UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE
                | ffi::UCP_EP_PARAM_FIELD_ERR_HANDLER
                | ffi::UCP_EP_PARAM_FIELD_FLAGS,
        );
        // UCX reads an address without being told its length: it is followed by zeros, which end
        // every list in it.
        let mut padded = to.to_vec();
        padded.resize(to.len() + 256, 0);
        params.address = padded.as_ptr().cast();
        params.err_mode = ffi::UCP_ERR_HANDLING_MODE_PEER;
        params.err_handler.cb = Some(endpoint_failed);
        params.err_handler.arg = Arc::as_ptr(mailbox).cast_mut().cast();
        // Two endpoints of one node are two ends, not one that talks to itself.
        params.flags = ffi::UCP_EP_PARAMS_FLAGS_NO_LOOPBACK;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the worker is live and locked; the address is live for the call; the mailbox is
        // kept by the endpoint until its close has ended.
        let status = unsafe {
            let create = self.worker.ucx.functions.ucp_ep_create;
            create(self.worker.raw, &raw const params, &raw mut raw)
        };
        match status {
            ffi::UCS_OK => {
                Ok(Ep { worker: worker.clone(), raw, mailbox: mailbox.clone(), closed: false })
            }
            status => Err(status),
        }
    }

    /// Sends a parcel that leaves in one piece. `true`: UCX keeps the box until the callback, and
    /// `packed` has another, of `spare`.
    #[inline(always)]
    pub fn send_packed(
        &mut self,
        ep: &Ep,
        packed: &mut Packed,
        spare: impl FnOnce() -> Box<SendOp>,
    ) -> Result<bool, ucs_status_t> {
        let (bytes, len, params) = packed.parts();
        // SAFETY: the endpoint is live and its worker locked; the parcel lies in the box, which lives
        // until the callback if there is one.
        let pointer = unsafe {
            let send = self.worker.ucx.functions.ucp_am_send_nbx;
            send(ep.raw, AM_ID, std::ptr::null(), 0, bytes, len, params)
        };
        match begun(pointer) {
            Begun::Done => Ok(false),
            Begun::Pending => {
                packed.renew(spare(), &ep.mailbox);
                self.begins(ep);
                Ok(true)
            }
            Begun::Failed(status) => Err(status),
        }
    }

    /// Sends a parcel whose payload `op.iov` names; header and head are in `op.bytes`. Gives the box
    /// back unless the callback will.
    ///
    /// # Safety
    ///
    /// What `op.iov` names is valid for reads until the send has ended.
    #[inline]
    pub unsafe fn send(&mut self, ep: &Ep, mut op: Box<SendOp>, header_len: usize) -> Sent {
        op.to.get_or_insert_with(|| ep.mailbox.clone());
        let raw = Box::into_raw(op);
        let mut params = send_params(raw);
        // SAFETY: nobody else has the box until the callback, which runs with the gate held.
        let op = unsafe { &*raw };
        let header = op.bytes.as_ptr().cast();
        let (buffer, count) = segments(&op.iov, &mut params);
        // SAFETY: the endpoint is live and its worker locked; header, list and short payloads lie
        // in the box until the callback; for the rest answers the caller.
        let pointer = unsafe {
            let send = self.worker.ucx.functions.ucp_am_send_nbx;
            send(ep.raw, AM_ID, header, header_len, buffer, count, &raw const params)
        };
        let status = match begun(pointer) {
            Begun::Pending => {
                self.begins(ep);
                return Ok(None);
            }
            Begun::Done => ffi::UCS_OK,
            Begun::Failed(status) => status,
        };
        // SAFETY: UCX is finished with it, and there will be no callback.
        let op = unsafe { Box::from_raw(raw) };
        if status == ffi::UCS_OK { Ok(Some(op)) } else { Err((op, status)) }
    }

    /// UCX is at a request of this endpoint's.
    fn begins(&mut self, ep: &Ep) {
        ep.mailbox.begin(&mut self.key);
        self.worker.sleeper.disarm();
    }

    /// Gives a descriptor back.
    pub fn release(&mut self, desc: Desc) {
        // SAFETY: given by this worker's callback, and released once.
        unsafe {
            (self.worker.ucx.functions.ucp_am_data_release)(self.worker.raw, desc.0.as_ptr());
        }
    }

    /// Begins to flush what was sent. `Done`: it has left.
    pub fn flush(&mut self, ep: &Ep, sent: u64) -> Begun {
        let raw = Box::into_raw(Box::new(FlushOp { sent, to: ep.mailbox.clone() }));
        let mut params = params(raw.cast());
        params.cb.send = Some(flushed);
        // SAFETY: the endpoint is live, its worker locked.
        let pointer =
            unsafe { (self.worker.ucx.functions.ucp_ep_flush_nbx)(ep.raw, &raw const params) };
        let begun = begun(pointer);
        match begun {
            Begun::Pending => self.begins(ep),
            // SAFETY: UCX is finished with it, and there will be no callback.
            Begun::Done | Begun::Failed(_) => drop(unsafe { Box::from_raw(raw) }),
        }
        begun
    }

    /// Closes an endpoint by force: every request of its ends in a few steps of progress.
    pub fn close(&mut self, ep: &mut Ep) {
        if std::mem::replace(&mut ep.closed, true) {
            return;
        }
        let dispatch = self.worker.dispatch.clone();
        let op = CloseOp { ucx: self.worker.ucx, dispatch, mailbox: ep.mailbox.clone() };
        let raw = Box::into_raw(Box::new(op));
        let mut params = params(raw.cast());
        params.cb.send = Some(closed);
        params.op_attr_mask |= ffi::UCP_OP_ATTR_FIELD_FLAGS;
        params.flags = ffi::UCP_EP_CLOSE_FLAG_FORCE;
        self.worker.dispatch.ending.fetch_add(1, Ordering::AcqRel);
        // SAFETY: the endpoint is live, its worker locked; it is not used after this.
        let pointer =
            unsafe { (self.worker.ucx.functions.ucp_ep_close_nbx)(ep.raw, &raw const params) };
        match begun(pointer) {
            Begun::Pending => {}
            Begun::Done => {
                self.worker.dispatch.ending.fetch_sub(1, Ordering::AcqRel);
                // SAFETY: the endpoint is gone, and there will be no callback.
                drop(unsafe { Box::from_raw(raw) });
            }
            Begun::Failed(status) => {
                self.worker.dispatch.ending.fetch_sub(1, Ordering::AcqRel);
                // The endpoint may still call its error handler: the box, and with it the mailbox,
                // stays for good.
                let why = describe(self.worker.ucx, "closing an endpoint", status);
                tracing::warn!("{why}");
            }
        }
    }

    /// The lanes of an endpoint of a link's, as far as UCX tells. Remembers which rings they use.
    pub fn lanes(&mut self, ep: &Ep) -> Vec<Lane> {
        let print = self.worker.ucx.functions.ucp_ep_print_info;
        // SAFETY: the endpoint is live, its worker locked, the stream open.
        let lanes = lanes::parse(&lanes::printed(|stream| unsafe { print(ep.raw, stream) }));
        let rings = &mut self.worker.dispatch.state(&mut self.key).rings;
        for ring in lanes::rings(&lanes) {
            if !rings.contains(&ring) {
                rings.push(ring);
            }
        }
        lanes
    }
}

/// An endpoint of UCX's. Closed by force when dropped, if not before.
pub(super) struct Ep {
    worker: Arc<Worker>,
    raw: ucp_ep_h,
    mailbox: Arc<Mailbox>,
    closed: bool,
}

// SAFETY: used under the worker's lock only.
unsafe impl Send for Ep {}

impl Ep {
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// What is told of what fails later.
    pub fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }
}

impl Drop for Ep {
    fn drop(&mut self) {
        if !self.closed && !self.worker.forked() {
            let worker = self.worker.clone();
            worker.lock().close(self);
        }
    }
}

/// Takes a message in.
///
/// # Safety
///
/// For UCX to call: `arg` is the worker's [`Dispatch`], the rest as its documentation says.
unsafe extern "C" fn arrived(
    arg: *mut c_void,
    header: *const c_void,
    header_len: usize,
    data: *mut c_void,
    len: usize,
    param: *const ucp_am_recv_param_t,
) -> ucs_status_t {
    let take = || {
        // SAFETY: the worker's own, which outlives it.
        let dispatch = unsafe { &*arg.cast::<Dispatch>() };
        // SAFETY: UCX passes a live struct.
        let attributes = unsafe { (*param).recv_attr };
        // SAFETY: as this function's.
        unsafe {
            let packed = header_len == 0 && attributes & WAITS == 0;
            if packed && take_at_once(dispatch, data.cast_const().cast(), len) {
                return false;
            }
            take(dispatch, header.cast(), header_len, data, len, attributes)
        }
    };
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(take)) {
        Ok(true) => ffi::UCS_INPROGRESS,
        Ok(false) | Err(_) => ffi::UCS_OK,
    }
}

/// Set where a message waits at its sender.
const WAITS: u64 = ffi::UCP_AM_RECV_ATTR_FLAG_RNDV as u64;

/// Hands a short parcel up at once, if its link is being polled and it is its turn. `false`: nothing
/// was done with it.
///
/// # Safety
///
/// Called back by UCX; `len` bytes are readable at `data`.
#[inline(always)]
unsafe fn take_at_once(dispatch: &Dispatch, data: *const u8, len: usize) -> bool {
    if !(HEADER_BYTES..=HEADER_BYTES + AT_ONCE_MAX).contains(&len) {
        return false;
    }
    // SAFETY: as in `take`, for which see why they are copied first.
    let word = |at| unsafe { u64::from_le(data.add(at).cast::<u64>().read_unaligned()) };
    let (first, last) = (word(0), word(LAST_WORD));
    // Control may end the endpoint, which is told to a subscriber of `tracing`: code of others.
    if !Header::begins_eager(first) {
        return false;
    }
    let Some(header) = Header::decode(first, last) else { return false };
    let (head_len, rest) = (usize::from(header.head_len), len - HEADER_BYTES);
    // SAFETY: called back, with no other reference to what the gate guards.
    let found = unsafe { dispatch.find(header.slot, header.secret) };
    let Some(mut delivery) = found.filter(|_| head_len <= rest) else { return false };
    let Some(polled) = delivery.polled(header.seq) else { return false };
    let mut bytes = [MaybeUninit::<u8>::uninit(); AT_ONCE_MAX];
    // SAFETY: `rest` bytes are readable there, and there is room for them.
    let bytes = unsafe {
        copy_few(data.add(HEADER_BYTES), bytes.as_mut_ptr().cast(), rest);
        std::slice::from_raw_parts(bytes.as_ptr().cast::<u8>(), rest)
    };
    polled.hand_up(bytes, head_len);
    delivery.was_taken();
    true
}

/// `true`: the message's memory is kept, and will be received or released.
///
/// # Safety
///
/// `header` is valid for reads of its length, and so is `data` unless UCX says that it waits at
/// its sender.
#[inline(never)]
unsafe fn take(
    dispatch: &Dispatch,
    header: *const u8,
    header_len: usize,
    data: *mut c_void,
    len: usize,
    attributes: u64,
) -> bool {
    let packed = header_len == 0;
    let (first, first_len) =
        if packed { (data.cast::<u8>().cast_const(), len) } else { (header, header_len) };
    if attributes & WAITS != 0 || !(HEADER_BYTES..=PACKED_MAX).contains(&first_len) {
        // Not from this protocol: UCX tells a sender that waits that it may go on.
        return false;
    }
    // A lane may have its memory shared with the peer: nothing is looked at before it is copied,
    // here into two words.
    // SAFETY: `first_len` bytes are readable there.
    let word = |at| unsafe { u64::from_le(first.add(at).cast::<u64>().read_unaligned()) };
    let Some(mut header) = Header::decode(word(0), word(LAST_WORD)) else { return false };
    let mut header_len = HEADER_BYTES;
    if header.kind.is_long() {
        if first_len < LONG_HEADER_BYTES {
            return false;
        }
        let mut rest = [0; LONG_HEADER_BYTES - HEADER_BYTES];
        // SAFETY: as above.
        unsafe {
            std::ptr::copy_nonoverlapping(first.add(HEADER_BYTES), rest.as_mut_ptr(), rest.len());
        }
        header.decode_rest(rest);
        header_len = LONG_HEADER_BYTES;
    }
    // SAFETY: called back, with no other reference to what the gate guards.
    let found = unsafe { dispatch.find(header.slot, header.secret) };
    let Some(delivery) = found else { return false };
    let head_len = usize::from(header.head_len);
    let rest = first_len - header_len;
    if rest < head_len || (!packed && rest != head_len) {
        delivery.fail("a message with a bad head");
        return false;
    }
    // SAFETY: `rest` bytes follow the header.
    let behind = unsafe { first.add(header_len) };
    let keepable = attributes & u64::from(ffi::UCP_AM_RECV_ATTR_FLAG_DATA) != 0;
    let (payload, len, keep) = match packed {
        true => (behind.wrapping_add(head_len), rest - head_len, None),
        false => (data.cast::<u8>().cast_const(), len, NonNull::new(data).filter(|_| keepable)),
    };
    let message = Message { head: behind, payload, len, keep };
    if header.kind == Kind::Chunk {
        if delivery.is_next(header.seq) {
            // SAFETY: the payload is here.
            unsafe { delivery.land_next(&header, message.payload, len) };
        } else {
            // SAFETY: head and payload are here.
            let _ = delivery.deliver(unsafe { Message { keep: None, ..message }.entry(header) });
        }
        return false;
    }
    // SAFETY: head and payload are here.
    let entry = unsafe { message.entry(header) };
    let kept = matches!(entry.body, Body::Held(_));
    // What is refused was never kept: UCX takes its memory back when this returns.
    let refused = delivery.deliver(entry).is_some();
    kept && !refused
}

/// Where the parts of a message lie. A lane may have that memory shared with the peer: it is copied
/// before anything in it is looked at.
struct Message {
    head: *const u8,
    payload: *const u8,
    /// Of the payload, in bytes.
    len: usize,
    /// UCX's memory with the payload, if it may be kept.
    keep: Option<NonNull<c_void>>,
}

impl Message {
    /// The entry that it becomes.
    ///
    /// # Safety
    ///
    /// Head and payload are valid for reads of their lengths.
    unsafe fn entry(self, header: Header) -> Entry {
        let len = self.len;
        let mut bytes = SmallVec::new();
        // SAFETY: the caller's promise.
        unsafe { append(&mut bytes, self.head, header.head_len.into()) };
        let body = if len <= INLINE_MAX {
            // SAFETY: the caller's promise.
            unsafe { append(&mut bytes, self.payload, len) };
            Body::Inline
        } else if let Some(data) = self.keep {
            Body::Held(Desc(data))
        } else {
            let mut own = Vec::new();
            // SAFETY: the caller's promise.
            unsafe { bulk::append(&mut own, self.payload, len) };
            Body::Owned(own)
        };
        Entry { header, bytes, len, body }
    }
}

/// Copies into the end of `bytes`.
///
/// # Safety
///
/// `len` bytes are readable at `from`.
unsafe fn append(bytes: &mut SmallVec<[u8; 160]>, from: *const u8, len: usize) {
    bytes.reserve(len);
    // SAFETY: room was made; the source is the caller's.
    unsafe {
        std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr().add(bytes.len()), len);
        bytes.set_len(bytes.len() + len);
    }
}

/// Hears of the end of an endpoint.
///
/// # Safety
///
/// For UCX to call: `arg` is the endpoint's [`Mailbox`], which lives until the close has ended.
unsafe extern "C" fn endpoint_failed(arg: *mut c_void, _ep: ucp_ep_h, status: ucs_status_t) {
    let tell = || {
        // SAFETY: as this function's.
        let mailbox = unsafe { &*arg.cast::<Mailbox>() };
        // SAFETY: called back, with no other reference to what the gate guards.
        unsafe { mailbox.fail(Fault::Endpoint(status)) };
    };
    // Nothing unwinds into C.
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(tell));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::hardware::{Hardware, Nature, RdmaDevice, Reach};
    use crate::link::ucx::{UNASKED_WITHOUT, library};

    fn resources(names: &[&str]) -> Vec<Resource> {
        let one = |name: &&str| {
            let (transport, device) = name.split_once('/').expect("transport/device");
            Resource { transport: transport.to_owned(), device: device.to_owned() }
        };
        names.iter().map(one).collect()
    }

    fn reach() -> Reach {
        let device = RdmaDevice { name: "card".into(), nature: Nature::Adapter, up: true };
        Reach::all(&Hardware { rdma: vec![device], ..Hardware::default() })
    }

    #[test]
    fn what_reaches_into_the_host_is_for_those_who_name_ucx() {
        let unasked = Scope::Hardware { reach: reach(), without: UNASKED_WITHOUT };
        let clean = resources(&["self/memory0", "rc_verbs/card:1", "ud_verbs/card:1"]);
        let told = ["rc_verbs", "ud_verbs"].map(str::to_owned).to_vec();
        assert_eq!(transports(clean.clone(), &unasked), Ok(told.clone()));
        for (unwanted, name) in
            [("tcp/eth0", "tcp"), ("posix/memory", "posix"), ("cma/memory", "cma")]
        {
            let all = [resources(&[unwanted]), clean.clone()].concat();
            let declined = transports(all.clone(), &unasked).expect_err(name);
            assert!(declined.reason.contains("UCX_TLS"), "{}", declined.reason);
            assert!(declined.reason.contains(&format!("use {name},")), "{}", declined.reason);
            assert_eq!(declined.fix, insist(LinkKind::Ucx));
            assert_eq!(transports(all, &Scope::Named(reach())), Ok(told.clone()));
        }
    }

    /// The libucp that is here knows what we set, though it may not have all that is named there.
    #[test]
    fn libucp_leaves_out_what_it_is_told_to() {
        let why = match library() {
            Err(absent) => absent.reason,
            Ok(_) if std::env::var_os("UCX_TLS").is_some() => "UCX_TLS is set".into(),
            Ok(ucx) => {
                let scope = Scope::Hardware { reach: reach(), without: UNASKED_WITHOUT };
                let context = Context::new(ucx, scope.tls()).expect("a context");
                let all = context.resources();
                // SAFETY: no worker is in it.
                unsafe { context.end() };
                assert_eq!(context.tls.as_deref(), Some("^tcp,posix,sysv,xpmem,cma,knem"));
                let left: Vec<_> = all.iter().map(|one| one.transport.as_str()).collect();
                assert!(left.contains(&"self"), "{left:?}");
                assert!(left.iter().all(|name| !UNASKED_WITHOUT.contains(name)), "{left:?}");
                return;
            }
        };
        eprintln!("SKIPPED: libucp_leaves_out_what_it_is_told_to: {why}");
    }
}
