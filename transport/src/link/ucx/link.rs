//! A lane to one peer through UCX.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use thalweg_ffi::ucx::{self as ffi, ucp_dt_iov_t, ucs_status_t};

use super::engine::{Opened, Slot};
use super::inbox::{Body, Desc, Entry, Fault, INLINE_MAX};
use super::request::{Begun, Finished, RecvOp, SendOp};
use super::wire::{Address, Header, Kind};
use super::worker::{Ep, Locked, Worker};
use super::{UcxOptions, link_error};
use crate::error::{ErrorKind, LinkError};
use crate::link::{
    Armed, Arrival, Budget, COPIED_MAX, Caps, Class, Disposition, HEAD_MAX, How, Killed, Landing,
    Link, LinkCounters, LinkKind, OpId, PayloadId, Post, Progress, Segment, Sink,
};
use crate::runtime::{Attempt, Source, is_runtime_gone};

/// Payloads up to this many bytes are copied behind their heads and leave in one piece.
const PACKED_PAYLOAD_MAX: usize = INLINE_MAX;
/// Up to this many bytes UCX may choose its way by the site's settings; longer payloads wait at
/// the sender until they are landed, whatever it would choose.
const EAGER_BYTES_MAX: usize = 64 << 10;
/// Requests of a bulk class that may be under way.
const IN_FLIGHT_MAX: usize = 1024;
/// The same for control. Answers to what a peer sends are among them, so a peer that sends and
/// never reads ends here.
const CONTROL_MAX: usize = 65_536;
/// Payloads that may wait at the peer without having been landed.
const OPEN_MAX: usize = 65_536;
/// Boxes that are kept for the next parcels.
const SPARE_MAX: usize = 64;
/// Steps of progress in one poll that does not spin.
const STEPS: usize = 8;
/// How long `kill` waits for requests to end before it comes back to that later.
const KILL_PATIENCE: Duration = Duration::from_millis(20);
/// When the peer has hung up, what it sent before is fetched with at most so many steps.
const LAST_STEPS: usize = 1024;

fn error(kind: ErrorKind, detail: impl Into<String>) -> LinkError {
    LinkError::new(kind, LinkKind::Ucx, detail)
}

fn internal(detail: &str) -> LinkError {
    error(ErrorKind::Io, detail)
}

pub(super) fn io_error(doing: &str, error: &io::Error) -> LinkError {
    if is_runtime_gone(error) {
        LinkError::new(ErrorKind::RuntimeGone, LinkKind::Ucx, error.to_string())
    } else {
        LinkError::io(LinkKind::Ucx, doing, error)
    }
}

/// A lane; see the module.
pub(crate) struct UcxLink {
    // In this order: the endpoint is closed before its slot is given up.
    ep: Ep,
    slot: Slot,
    worker: Arc<Worker>,
    to: Address,
    caps: Caps,
    max_payload: u64,
    /// Where the peer's process shows that it lives. Nothing more is said on it.
    bootstrap: Source,
    /// The peer has hung up; told when everything that it sent before has been handed up.
    hung_up: Option<LinkError>,
    /// The endpoint's waker, once it was armed.
    waker: Option<Waker>,
    /// Taken from the inbox, not handed up yet.
    arrived: VecDeque<Entry>,
    /// Taken from the inbox, not reported yet.
    finished: Vec<Finished>,
    /// Payloads that were handed up and wait to be landed.
    open: HashMap<u64, (Body, usize)>,
    next_payload: u64,
    next_seq: u32,
    in_flight: [usize; Class::COUNT],
    #[allow(clippy::vec_box, reason = "UCX is told their addresses, which must not change")]
    spare: Vec<Box<SendOp>>,
    dead: Option<LinkError>,
    /// Killed; counted among the worker's endings for as long as UCX is at work on something.
    killed: bool,
    lingers: bool,
    counters: LinkCounters,
}

impl UcxLink {
    pub(super) fn new(opened: Opened, bootstrap: Source) -> UcxLink {
        let Opened { ep, slot, to, lanes, options } = opened;
        let UcxOptions { eager_max, max_payload, .. } = options;
        UcxLink {
            worker: slot.worker.clone(),
            ep,
            slot,
            to,
            caps: Caps {
                eager_max: eager_max.min(EAGER_BYTES_MAX),
                ways: format!(
                    "UCX active messages over {lanes}; packed ≤ {} KiB, rendezvous > {} KiB",
                    PACKED_PAYLOAD_MAX / 1024,
                    EAGER_BYTES_MAX / 1024
                ),
            },
            max_payload,
            bootstrap,
            hung_up: None,
            waker: None,
            arrived: VecDeque::new(),
            finished: Vec::new(),
            open: HashMap::new(),
            next_payload: 0,
            next_seq: 0,
            in_flight: [0; Class::COUNT],
            spare: Vec::new(),
            dead: None,
            killed: false,
            lingers: false,
            counters: LinkCounters::default(),
        }
    }

    fn alive(&self) -> Result<(), LinkError> {
        self.dead.clone().map_or(Ok(()), Err)
    }

    fn ended<T>(&mut self, result: Result<T, LinkError>) -> Result<T, LinkError> {
        if let Err(error) = &result {
            self.dead.get_or_insert_with(|| error.clone());
        }
        result
    }

    fn status_error(&self, doing: &str, status: ucs_status_t) -> LinkError {
        link_error(self.worker.ucx, doing, status)
    }

    /// Whether the peer's process still holds its end of the bootstrap connection.
    fn look_at_bootstrap(&mut self, cx: &mut Context<'_>) {
        if self.hung_up.is_some() {
            return;
        }
        let looked = self.bootstrap.poll_read(cx, |fd| {
            let mut byte = [0];
            rustix::io::read(fd, &mut byte).map(Attempt::More).map_err(Into::into)
        });
        self.hung_up = match looked {
            Poll::Pending => None,
            Poll::Ready(Ok(0)) => Some(error(
                ErrorKind::PeerGone,
                "the peer's end of the bootstrap connection was closed without goodbye",
            )),
            Poll::Ready(Ok(_)) => {
                Some(LinkError::protocol(LinkKind::Ucx, "bytes on a bootstrap that is over"))
            }
            Poll::Ready(Err(error)) => Some(io_error("watching the bootstrap connection", &error)),
        };
    }

    /// Moves the worker on, if nobody else does at this moment.
    fn progress(&mut self, spinning: bool, sink: &mut dyn Sink) -> bool {
        let Some(mut worker) = self.worker.try_lock() else { return false };
        let steps = match spinning {
            true => 1,
            false if self.hung_up.is_some() => LAST_STEPS,
            false => STEPS,
        };
        let more = worker.progress_all(steps);
        let wakes = worker.take_wakes();
        drop(worker);
        for waker in wakes {
            sink.wake(waker);
        }
        more && !spinning
    }

    /// Takes over what callbacks have left.
    fn empty_inbox(&mut self) -> Option<Fault> {
        let mut inbox = self.slot.mailbox.inbox();
        self.slot.mailbox.unpark(&mut inbox);
        if self.arrived.is_empty() {
            std::mem::swap(&mut inbox.queue, &mut self.arrived);
        }
        if self.finished.is_empty() {
            std::mem::swap(&mut inbox.finished, &mut self.finished);
        }
        inbox.fault
    }

    /// Reports what has ended. `failed`: what to say of requests that were ended by force.
    fn report_finished(&mut self, sink: &mut dyn Sink, failed: Option<&LinkError>) -> bool {
        let any = !self.finished.is_empty();
        for finished in std::mem::take(&mut self.finished) {
            match finished {
                Finished::Send(op, status) => {
                    let count = &mut self.in_flight[op.class as usize];
                    *count = count.saturating_sub(1);
                    let result = self.result("sending", status, failed);
                    if op.reports && op.op != OpId::NONE {
                        sink.done(op.op, result);
                    }
                    self.spare(op);
                }
                Finished::Recv { op, status } => {
                    let result = self.result("receiving", status, failed);
                    if op != OpId::NONE {
                        sink.done(op, result);
                    }
                }
                Finished::Flush { .. } => {}
            }
        }
        any
    }

    fn result(
        &mut self,
        doing: &str,
        status: ucs_status_t,
        failed: Option<&LinkError>,
    ) -> Result<(), LinkError> {
        if status == ffi::UCS_OK {
            return Ok(());
        }
        let error = failed.cloned().unwrap_or_else(|| self.status_error(doing, status));
        // A parcel that was lost leaves a gap that nothing can fill.
        self.hung_up.get_or_insert_with(|| error.clone());
        Err(error)
    }

    fn spare(&mut self, mut op: Box<SendOp>) {
        if self.spare.len() < SPARE_MAX {
            op.reset();
            self.spare.push(op);
        }
    }

    /// Hands up what has come. `true`: the budget ended first.
    fn hand_up(&mut self, budget: &mut Budget, sink: &mut dyn Sink) -> Result<bool, LinkError> {
        let mut freed = 0;
        let mut result = Ok(false);
        while let Some(entry) = self.arrived.pop_front() {
            if budget.parcels == 0 || budget.bytes == 0 {
                self.arrived.push_front(entry);
                result = Ok(true);
                break;
            }
            budget.parcels -= 1;
            freed += entry.cost();
            if let Err(error) = self.parcel(entry, budget, sink) {
                result = Err(error);
                break;
            }
        }
        if freed > 0 {
            let mut inbox = self.slot.mailbox.inbox();
            inbox.held_bytes = inbox.held_bytes.saturating_sub(freed);
        }
        result
    }

    fn parcel(
        &mut self,
        entry: Entry,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        let Entry { kind, head_len, bytes, len, body, .. } = entry;
        if len as u64 > self.max_payload || self.open.len() >= OPEN_MAX {
            self.give_back(body);
            let what = "a payload over the limit, or too many open ones";
            return Err(LinkError::protocol(LinkKind::Ucx, what));
        }
        let (head, inline) = bytes.split_at(head_len);
        let inline = matches!(body, Body::Inline).then_some(inline);
        let payload = PayloadId(self.next_payload);
        self.next_payload += 1;
        self.counters.parcels_received += 1;
        let how = if kind == Kind::Offer { How::Offer } else { How::Eager };
        let arrival = Arrival { head, len: len as u64, payload, inline, views: None, how };
        match sink.parcel(arrival) {
            Disposition::Taken if inline.is_some() => {
                self.counters.inline_bytes_received += len as u64;
                Ok(())
            }
            Disposition::Discard => {
                self.give_back(body);
                Ok(())
            }
            Disposition::Land { to, op } => {
                let body = match inline {
                    Some(bytes) => Body::Owned(bytes.to_vec()),
                    None => body,
                };
                budget.bytes = budget.bytes.saturating_sub(len);
                if self.place(body, len, to, op)? == Post::Done && op != OpId::NONE {
                    sink.done(op, Ok(()));
                }
                Ok(())
            }
            Disposition::Hold if how == How::Offer => {
                let body = match inline {
                    Some(bytes) => Body::Owned(bytes.to_vec()),
                    None => body,
                };
                self.open.insert(payload.0, (body, len));
                Ok(())
            }
            Disposition::Fatal(error) => {
                self.give_back(body);
                Err(error)
            }
            Disposition::Taken | Disposition::Hold | Disposition::View => {
                self.give_back(body);
                Err(internal("a payload was neither landed, held nor discarded"))
            }
        }
    }

    fn give_back(&mut self, body: Body) {
        if let Body::Held(desc) | Body::Waiting(desc) = body {
            self.worker.lock().release(desc);
        }
    }

    /// Puts a payload where it belongs.
    fn place(&mut self, body: Body, len: usize, to: Landing, op: OpId) -> Result<Post, LinkError> {
        let fits = to.iter().map(|segment| segment.len).sum::<usize>() == len
            && to.iter().all(|segment| segment.kind.cpu_accessible());
        if !fits {
            self.give_back(body);
            return Err(internal("a landing of another length or kind than its payload"));
        }
        self.counters.inline_bytes_received += len as u64;
        match body {
            Body::Inline => Ok(Post::Done),
            Body::Owned(bytes) => {
                // SAFETY: as many bytes as the landing has room for, which the driver keeps.
                unsafe { scatter(bytes.as_ptr(), &to) };
                Ok(Post::Done)
            }
            Body::Held(desc) => {
                // SAFETY: UCX keeps `len` bytes there until they are released; the rest as above.
                unsafe { scatter(desc.0.as_ptr().cast(), &to) };
                self.worker.lock().release(desc);
                Ok(Post::Done)
            }
            Body::Waiting(desc) => self.fetch(desc, &to, op),
        }
    }

    /// Fetches a payload that waits at the peer.
    fn fetch(&mut self, desc: Desc, to: &Landing, op: OpId) -> Result<Post, LinkError> {
        let segments = to.iter().filter(|segment| segment.len > 0);
        let iov = segments
            .map(|segment| ucp_dt_iov_t { buffer: segment.ptr.cast(), length: segment.len })
            .collect();
        let recv = RecvOp { op, iov, to: self.slot.mailbox.clone() };
        // SAFETY: the driver keeps the landing until `Sink::done`, which follows the callback.
        match unsafe { self.worker.lock().receive(desc, recv) } {
            Begun::Done => Ok(Post::Done),
            Begun::Pending => Ok(Post::Pending),
            Begun::Failed(status) => Err(self.status_error("receiving", status)),
        }
    }

    /// Whether a class takes no more for now.
    fn room(&mut self, class: Class) -> Result<bool, LinkError> {
        let waiting = self.in_flight[class as usize];
        if class != Class::Control {
            return Ok(waiting < IN_FLIGHT_MAX);
        }
        if waiting < CONTROL_MAX {
            return Ok(true);
        }
        Err(error(ErrorKind::LimitExceeded, "the peer causes answers and does not read them"))
    }

    fn header(&self, kind: Kind, class: Class, head: &[u8]) -> Header {
        Header {
            kind,
            class,
            head_len: head.len() as u16,
            seq: self.next_seq,
            slot: self.to.slot,
            secret: self.to.secret,
        }
    }

    fn send(
        &mut self,
        op: OpId,
        class: Class,
        how: How,
        head: &[u8],
        payload: &[Segment<'_>],
        len: usize,
    ) -> Result<Post, LinkError> {
        let kind = if how == How::Offer { Kind::Offer } else { Kind::Eager };
        let packed = len == 0 || (how == How::Eager && len <= PACKED_PAYLOAD_MAX);
        let mut sending = self.spare.pop().unwrap_or_else(SendOp::new);
        sending.op = op;
        sending.class = class;
        sending.reports = !packed;
        sending.bytes.extend_from_slice(&self.header(kind, class, head).encode());
        sending.bytes.extend_from_slice(head);
        let header_len = sending.bytes.len();
        let pieces = payload.iter().filter(|segment| segment.len > 0);
        if packed || len <= COPIED_MAX {
            sending.bytes.reserve(len);
            for piece in pieces {
                // SAFETY: the memory of a post is valid for reads while it is made.
                unsafe { append(&mut sending.bytes, piece.ptr, piece.len) };
            }
            if !packed {
                let buffer = sending.bytes[header_len..].as_mut_ptr().cast();
                sending.iov.push(ucp_dt_iov_t { buffer, length: len });
            }
        } else {
            sending.iov.extend(pieces.map(|piece| ucp_dt_iov_t {
                buffer: piece.ptr.cast_mut().cast(),
                length: piece.len,
            }));
        }
        let rendezvous = !packed && (how == How::Offer || len > EAGER_BYTES_MAX);
        let header_len = if packed { 0 } else { header_len };
        // SAFETY: the driver keeps the payload until `Sink::done`; a copied one lies in the box.
        let sent = unsafe { self.worker.lock().send(&self.ep, sending, header_len, rendezvous) };
        let post = match sent {
            Ok(Some(over)) => {
                self.spare(over);
                Post::Done
            }
            Ok(None) => {
                self.in_flight[class as usize] += 1;
                if packed { Post::Done } else { Post::Pending }
            }
            Err((_, status)) => return Err(self.status_error("sending", status)),
        };
        self.next_seq = self.next_seq.wrapping_add(1);
        self.counters.parcels_sent += 1;
        self.counters.inline_bytes_sent += len as u64;
        self.slot.mailbox.inbox().sent += 1;
        Ok(post)
    }

    /// What is left to do before the link can be killed for good: gives back what the peer sent,
    /// and closes the endpoint.
    fn begin_to_end(&mut self, worker: &mut Locked<'_>) {
        self.slot.close(worker);
        if let Some(waker) = self.waker.take() {
            self.worker.sleeper.forget(&waker);
        }
        let arrived = self.arrived.drain(..).map(|entry| entry.body);
        let open = self.open.drain().map(|(_, (body, _))| body);
        for body in arrived.chain(open) {
            if let Body::Held(desc) | Body::Waiting(desc) = body {
                worker.release(desc);
            }
        }
        worker.close(&mut self.ep);
    }

    fn set_lingers(&mut self, lingers: bool) {
        if lingers != std::mem::replace(&mut self.lingers, lingers) {
            let ending = &self.worker.dispatch.ending;
            if lingers {
                ending.fetch_add(1, Ordering::AcqRel);
            } else {
                ending.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }
}

/// Copies to the end of `bytes`.
///
/// # Safety
///
/// `len` bytes are readable at `from`.
unsafe fn append(bytes: &mut Vec<u8>, from: *const u8, len: usize) {
    bytes.reserve(len);
    // SAFETY: room was made; the source is the caller's.
    unsafe {
        std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr().add(bytes.len()), len);
        bytes.set_len(bytes.len() + len);
    }
}

/// Copies a payload to its landing.
///
/// # Safety
///
/// `from` has as many readable bytes as the landing has room for, and the landing is writable.
unsafe fn scatter(mut from: *const u8, to: &Landing) {
    for segment in to {
        // SAFETY: the caller's; the source may be shared with the peer, and is only copied.
        unsafe {
            std::ptr::copy_nonoverlapping(from, segment.ptr, segment.len);
            from = from.add(segment.len);
        }
    }
}

impl Link for UcxLink {
    fn kind(&self) -> LinkKind {
        LinkKind::Ucx
    }

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        spinning: bool,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<Progress, LinkError> {
        if self.killed {
            return Ok(Progress::Idle);
        }
        self.alive()?;
        if !spinning {
            self.look_at_bootstrap(cx);
        }
        let more = self.progress(spinning, sink);
        let fault = self.empty_inbox();
        let mut moved = self.report_finished(sink, None);
        moved |= !self.arrived.is_empty();
        let spent = self.hand_up(budget, sink);
        let spent = self.ended(spent)?;
        if more || spent {
            return Ok(Progress::More);
        }
        if moved {
            return Ok(Progress::Some);
        }
        let broken = match (fault, &self.hung_up) {
            (Some(Fault::Peer(what)), _) => Some(LinkError::protocol(LinkKind::Ucx, what)),
            (_, Some(hung_up)) => Some(hung_up.clone()),
            (Some(Fault::Endpoint(status)), None) => {
                Some(self.status_error("the connection to the peer", status))
            }
            (None, None) => None,
        };
        match broken {
            Some(error) => self.ended(Err(error)),
            None => Ok(Progress::Idle),
        }
    }

    fn arm(&mut self, cx: &mut Context<'_>) -> Result<Armed, LinkError> {
        if self.killed {
            let mut inbox = self.slot.mailbox.inbox();
            self.slot.mailbox.park(&mut inbox, cx.waker());
            return Ok(Armed::Yes);
        }
        self.alive()?;
        self.look_at_bootstrap(cx);
        if self.hung_up.is_some() || !self.arrived.is_empty() || !self.finished.is_empty() {
            return Ok(Armed::Busy);
        }
        match &self.waker {
            Some(known) if known.will_wake(cx.waker()) => {}
            _ => self.waker = Some(cx.waker().clone()),
        }
        let mut worker = self.worker.lock();
        let mailbox = &self.slot.mailbox;
        let mut inbox = mailbox.inbox();
        if inbox.has_news() {
            return Ok(Armed::Busy);
        }
        mailbox.park(&mut inbox, cx.waker());
        drop(inbox);
        let armed = worker.arm(Some(cx.waker()));
        if !matches!(armed, Ok(Armed::Yes)) {
            mailbox.unpark(&mut mailbox.inbox());
        }
        drop(worker);
        self.ended(armed)
    }

    fn post(
        &mut self,
        op: OpId,
        class: Class,
        how: How,
        head: &[u8],
        payload: &[Segment<'_>],
    ) -> Result<Post, LinkError> {
        self.alive()?;
        if head.len() > HEAD_MAX {
            return Err(internal("a head longer than HEAD_MAX"));
        }
        let mut len = 0;
        for segment in payload {
            if !segment.kind.cpu_accessible() {
                let detail = format!("{} memory cannot be sent as it is", segment.kind);
                return Err(error(ErrorKind::Unsupported, detail));
            }
            len += segment.len;
        }
        let room = self.room(class);
        if !self.ended(room)? {
            self.counters.stalls += 1;
            return Ok(Post::Full);
        }
        let sent = self.send(op, class, how, head, payload, len);
        self.ended(sent)
    }

    fn land(&mut self, payload: PayloadId, to: Landing, op: OpId) -> Result<Post, LinkError> {
        self.alive()?;
        let Some((body, len)) = self.open.remove(&payload.0) else {
            return Err(internal("landing of a payload that is not held"));
        };
        let placed = self.place(body, len, to, op);
        self.ended(placed)
    }

    fn release(&mut self, payload: PayloadId) {
        if let Some((body, _)) = self.open.remove(&payload.0) {
            self.give_back(body);
        }
    }

    fn kill(&mut self, error: &LinkError, sink: &mut dyn Sink) -> Killed {
        self.dead.get_or_insert_with(|| error.clone());
        let until = Instant::now() + KILL_PATIENCE;
        let shared = self.worker.clone();
        let mut worker = shared.lock();
        if !std::mem::replace(&mut self.killed, true) {
            self.begin_to_end(&mut worker);
        }
        let in_flight = loop {
            worker.progress_all(STEPS);
            let in_flight = self.slot.mailbox.inbox().in_flight;
            if in_flight == 0 || Instant::now() >= until {
                break in_flight;
            }
        };
        let wakes = worker.take_wakes();
        drop(worker);
        for waker in wakes {
            sink.wake(waker);
        }
        // What was taken before and not reported comes first.
        self.report_finished(sink, Some(error));
        self.empty_inbox();
        self.report_finished(sink, Some(error));
        self.set_lingers(in_flight > 0);
        if in_flight > 0 { Killed::Lingers } else { Killed::Over }
    }

    /// A payload that waits for the peer to land it counts as not flushed.
    fn flushed(&self) -> bool {
        let mut worker = self.worker.lock();
        let mut inbox = self.slot.mailbox.inbox();
        if inbox.in_flight > 0 || self.killed {
            return self.killed;
        }
        if inbox.flushed == inbox.sent {
            return true;
        }
        let sent = inbox.sent;
        inbox.flushing = true;
        drop(inbox);
        match worker.flush(&self.ep, sent) {
            Begun::Pending => false,
            // A flush that fails is followed by the error handler's call.
            Begun::Done | Begun::Failed(_) => {
                let mut inbox = self.slot.mailbox.inbox();
                inbox.flushing = false;
                inbox.flushed = sent;
                true
            }
        }
    }

    fn counters(&self) -> LinkCounters {
        self.counters
    }
}

impl Drop for UcxLink {
    fn drop(&mut self) {
        if self.worker.forked() {
            return;
        }
        let worker = self.worker.clone();
        if !self.killed {
            self.begin_to_end(&mut worker.lock());
        }
        self.set_lingers(false);
        debug_assert!(self.ep.is_closed());
    }
}
