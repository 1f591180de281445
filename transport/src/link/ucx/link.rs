//! A lane to one peer through UCX.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use thalweg_ffi::ucx::{self as ffi, ucp_dt_iov_t, ucs_status_t};

use super::bulk::{Incoming, Outgoing, Outgoings, append};
use super::engine::{Opened, Slot};
use super::inbox::{Body, Entry, Fault, INLINE_MAX, Inbox};
use super::onesided::Transfers;
use super::request::{Begun, SendOp};
use super::wire::{Address, Header, Kind};
use super::worker::{Ep, Locked, Worker};
use super::{UcxOptions, lanes, link_error};
use crate::error::{ErrorKind, LinkError};
use crate::link::{
    Armed, Arrival, Budget, COPIED_MAX, Caps, Class, Disposition, HEAD_MAX, How, Killed, Landing,
    Link, LinkCounters, LinkKind, OneSided, OpId, PayloadId, Post, Progress, Segment, Sink,
};
use crate::runtime::{Attempt, Source, is_runtime_gone};

/// Payloads up to this many bytes are copied behind their heads and leave in one piece.
const PACKED_PAYLOAD_MAX: usize = INLINE_MAX;
/// Longer payloads wait at the sender until they are pulled.
const EAGER_BYTES_MAX: usize = 64 << 10;
/// Chunks that UCX may be at work on, in bytes: what other classes wait behind at most.
const CHUNKS_BYTES_MAX: usize = 256 << 10;
/// Requests of a bulk class that may be under way.
pub(super) const IN_FLIGHT_MAX: usize = 1024;
/// The same for control. Answers to what a peer sends are among them, so a peer that sends and
/// never reads ends here.
const CONTROL_MAX: usize = 65_536;
/// A chunk fits, with its header, into one segment of shared memory (8 KiB) or into what UCX sends
/// at once over sockets (64 KiB), so that UCX does not put it together again.
const CHUNK_BYTES_SHARED_MEMORY: usize = 8000;
const CHUNK_BYTES: usize = 64_000;
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

pub(super) fn error(kind: ErrorKind, detail: impl Into<String>) -> LinkError {
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
    pub(super) ep: Ep,
    slot: Slot,
    pub(super) worker: Arc<Worker>,
    to: Address,
    caps: Caps,
    max_payload: u64,
    /// UCX may put and get by itself.
    direct: bool,
    /// Where the peer's process shows that it lives. Nothing more is said on it.
    bootstrap: Source,
    /// The peer has hung up; told when everything that it sent before has been handed up.
    pub(super) hung_up: Option<LinkError>,
    /// The endpoint's waker, once it was armed.
    waker: Option<Waker>,
    /// Taken from the inbox, not handed up yet.
    arrived: VecDeque<Entry>,
    /// Taken from the inbox, not reported yet.
    finished: Vec<(Box<SendOp>, ucs_status_t)>,
    landed: Vec<OpId>,
    /// Payloads that were handed up and wait to be landed: the peer's number, and the length.
    open: HashMap<u64, (u32, usize)>,
    outgoing: Outgoings,
    chunk_bytes: usize,
    chunks_in_flight: usize,
    next_payload: u64,
    next_seq: u32,
    messages_sent: u64,
    /// Handed up, and still counted as held by the inbox.
    freed_bytes: usize,
    in_flight: [usize; Class::COUNT],
    /// Those among them whose memory is not the link's own.
    reporting: usize,
    #[allow(clippy::vec_box, reason = "UCX is told their addresses, which must not change")]
    spare: Vec<Box<SendOp>>,
    dead: Option<LinkError>,
    /// Killed; counted among the worker's endings for as long as UCX is at work on something.
    killed: bool,
    lingers: bool,
    /// The peer was told of the end over the bootstrap connection.
    said_over: bool,
    /// Landings that were ended by that.
    unlanded: Vec<OpId>,
    /// Puts and gets by UCX itself.
    pub(super) transfers: Transfers,
    pub(super) counters: LinkCounters,
}

impl UcxLink {
    pub(super) fn new(opened: Opened, bootstrap: Source) -> UcxLink {
        let Opened { ep, slot, to, lanes, options } = opened;
        let chunk_bytes = match lanes::shares_memory(&lanes) {
            true => CHUNK_BYTES_SHARED_MEMORY,
            false => CHUNK_BYTES,
        };
        let lanes = lanes::in_words(&lanes);
        let UcxOptions { eager_max, max_payload, direct, .. } = options;
        UcxLink {
            worker: slot.worker.clone(),
            ep,
            slot,
            to,
            caps: Caps {
                eager_max: eager_max.min(EAGER_BYTES_MAX),
                ways: format!(
                    "UCX active messages over {lanes}; packed ≤ {} KiB, pulled in chunks > {} KiB",
                    PACKED_PAYLOAD_MAX / 1024,
                    EAGER_BYTES_MAX / 1024
                ),
            },
            max_payload,
            direct,
            bootstrap,
            hung_up: None,
            waker: None,
            arrived: VecDeque::new(),
            finished: Vec::new(),
            landed: Vec::new(),
            open: HashMap::new(),
            outgoing: Outgoings::default(),
            chunk_bytes,
            chunks_in_flight: 0,
            next_payload: 0,
            next_seq: 0,
            messages_sent: 0,
            freed_bytes: 0,
            in_flight: [0; Class::COUNT],
            reporting: 0,
            spare: Vec::new(),
            dead: None,
            killed: false,
            lingers: false,
            said_over: false,
            unlanded: Vec::new(),
            transfers: Transfers::default(),
            counters: LinkCounters::default(),
        }
    }

    pub(super) fn alive(&self) -> Result<(), LinkError> {
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

    /// Moves the worker on, and takes over what callbacks have left. Does nothing if somebody else
    /// is at it, unless they may have left something.
    fn progress(&mut self, spinning: bool, sink: &mut dyn Sink) -> News {
        let shared = &self.worker;
        let mut worker = match shared.try_lock() {
            Some(worker) => worker,
            None if spinning && !self.slot.mailbox.may_have_news() => return News::default(),
            None => shared.lock(),
        };
        let steps = match spinning {
            true => 1,
            false if self.hung_up.is_some() => LAST_STEPS,
            false => STEPS,
        };
        let more = worker.progress_all(steps) && !spinning;
        let wakes = worker.take_wakes();
        let inbox = self.slot.mailbox.look(&mut worker.key);
        inbox.held_bytes = inbox.held_bytes.saturating_sub(std::mem::take(&mut self.freed_bytes));
        if self.arrived.is_empty() && !inbox.queue.is_empty() {
            std::mem::swap(&mut inbox.queue, &mut self.arrived);
        }
        take_endings(inbox, &mut self.finished, &mut self.landed);
        self.transfers.ended.append(&mut inbox.transfers);
        let news = News {
            more,
            fault: inbox.fault,
            landed_bytes: inbox.incoming.take_landed_bytes(),
            wants: inbox.incoming.wants(),
        };
        drop(worker);
        for waker in wakes {
            sink.wake(waker);
        }
        news
    }

    /// Reports what has ended. `failed`: what to say of requests that were ended by force.
    fn report_finished(&mut self, sink: &mut dyn Sink, failed: Option<&LinkError>) -> bool {
        let any = !self.finished.is_empty() || !self.landed.is_empty();
        let mut all = std::mem::take(&mut self.finished);
        for (op, status) in all.drain(..) {
            self.sent(op, status, sink, failed);
        }
        // Its memory serves again.
        self.finished = all;
        for op in self.landed.drain(..).filter(|op| *op != OpId::NONE) {
            sink.done(op, Ok(()));
        }
        any
    }

    fn sent(
        &mut self,
        op: Box<SendOp>,
        status: ucs_status_t,
        sink: &mut dyn Sink,
        failed: Option<&LinkError>,
    ) {
        let count = &mut self.in_flight[op.class as usize];
        *count = count.saturating_sub(1);
        self.reporting -= usize::from(op.reports);
        let result = self.result("sending", status, failed);
        let over = match op.chunk_of {
            Some(id) => {
                self.chunks_in_flight -= 1;
                // One that failed leaves the rest to the end of the link.
                self.outgoing.chunk_left(id)
            }
            None => Some(op.op).filter(|_| op.reports),
        };
        if let Some(op) = over.filter(|op| *op != OpId::NONE) {
            sink.done(op, result);
        }
        self.spare(op);
    }

    pub(super) fn result(
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
        self.freed_bytes += freed;
        result
    }

    fn parcel(
        &mut self,
        entry: Entry,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        let (header, len) = (entry.header, entry.len);
        let bad = |what: &str| Err(LinkError::protocol(LinkKind::Ucx, what));
        match header.kind {
            Kind::Eager => return self.eager(entry, budget, sink),
            Kind::Offer | Kind::Bulk if len == 0 => {
                return self.offer(&header, &entry.bytes, sink);
            }
            Kind::Pull if len == 0 => {
                if !self.outgoing.pulled(header.id, header.len) {
                    return bad("a payload is pulled that is not there");
                }
                return self.send_chunks();
            }
            Kind::Refuse if len == 0 => {
                let Some(op) = self.outgoing.refused(header.id) else {
                    return bad("a payload is refused that is not there");
                };
                if op != OpId::NONE {
                    sink.done(op, Ok(()));
                }
                return Ok(());
            }
            // Chunks and pings are the callback's.
            Kind::Offer | Kind::Bulk | Kind::Pull | Kind::Refuse | Kind::Chunk | Kind::Ping => {}
        }
        self.give_back(entry.body);
        bad("a message with more behind it than there may be")
    }

    /// Counts a parcel that came, and numbers its payload.
    fn arrived(&mut self) -> PayloadId {
        let payload = PayloadId(self.next_payload);
        self.next_payload += 1;
        self.counters.parcels_received += 1;
        payload
    }

    /// A parcel with its payload.
    fn eager(
        &mut self,
        entry: Entry,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        let payload = self.arrived();
        let len = entry.len;
        self.counters.inline_bytes_received += len as u64;
        let (head, inline) = entry.bytes.split_at(usize::from(entry.header.head_len));
        let inline = matches!(entry.body, Body::Inline).then_some(inline);
        let how = How::Eager;
        let arrival = Arrival { head, len: len as u64, payload, inline, views: None, how };
        let result = match sink.parcel(arrival) {
            Disposition::Taken if inline.is_some() => Ok(()),
            Disposition::Discard => Ok(()),
            Disposition::Land { to, op } => {
                budget.bytes = budget.bytes.saturating_sub(len);
                landing(to, op, len).map(|mut landing| {
                    // SAFETY: `len` bytes lie there, UCX's until they are given back below; the
                    // driver keeps the landing, which has room for as many.
                    unsafe { landing.take(entry.payload(), len) };
                    if op != OpId::NONE {
                        sink.done(op, Ok(()));
                    }
                })
            }
            Disposition::Fatal(error) => Err(error),
            Disposition::Taken | Disposition::Hold | Disposition::View => {
                Err(internal("an eager payload was neither landed nor discarded"))
            }
        };
        self.give_back(entry.body);
        result
    }

    /// A parcel whose payload waits at the peer.
    fn offer(
        &mut self,
        header: &Header,
        head: &[u8],
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        let bad = |what: &str| Err(LinkError::protocol(LinkKind::Ucx, what));
        if header.len == 0 || header.len > self.max_payload {
            return bad("a payload of a length that may not be");
        }
        let Ok(len) = usize::try_from(header.len) else { return bad("a payload over the limit") };
        if self.open.len() >= OPEN_MAX {
            return bad("too many open payloads");
        }
        let payload = self.arrived();
        let how = if header.kind == Kind::Offer { How::Offer } else { How::Eager };
        let arrival = Arrival { head, len: header.len, payload, inline: None, views: None, how };
        match sink.parcel(arrival) {
            Disposition::Land { to, op } => self.pull(header.id, len, to, op),
            Disposition::Hold if how == How::Offer => {
                self.open.insert(payload.0, (header.id, len));
                Ok(())
            }
            Disposition::Discard => self.answer(Kind::Refuse, header.id, 0),
            Disposition::Fatal(error) => Err(error),
            Disposition::Taken | Disposition::Hold | Disposition::View => {
                Err(internal("an offer was neither landed, held nor discarded"))
            }
        }
    }

    /// Lands a payload that waits at the peer.
    fn pull(&mut self, id: u32, len: usize, to: Landing, op: OpId) -> Result<(), LinkError> {
        let incoming = landing(to, op, len)?;
        let mut worker = self.worker.lock();
        let inbox = self.slot.mailbox.inbox(&mut worker.key);
        if inbox.incoming.len() >= OPEN_MAX {
            return Err(LinkError::protocol(LinkKind::Ucx, "too many open payloads"));
        }
        if !inbox.incoming.insert(id, incoming) {
            return Err(LinkError::protocol(LinkKind::Ucx, "a payload's number is in use"));
        }
        drop(worker);
        self.grant()
    }

    /// Lets the peer send more, as far as there is room for it here.
    fn grant(&mut self) -> Result<(), LinkError> {
        loop {
            let mut worker = self.worker.lock();
            let granted = self.slot.mailbox.inbox(&mut worker.key).incoming.grant();
            drop(worker);
            let Some((id, upto)) = granted else { return Ok(()) };
            self.answer(Kind::Pull, id, upto)?;
        }
    }

    /// Says something about a payload of the peer's.
    fn answer(&mut self, kind: Kind, id: u32, len: u64) -> Result<(), LinkError> {
        self.room(Class::Control)?;
        let mut sending = self.spare.pop().unwrap_or_else(SendOp::new);
        sending.class = Class::Control;
        let header = Header { id, len, ..self.header(kind, Class::Control, &[]) };
        sending.bytes.extend_from_slice(&header.encode());
        self.transmit(sending, 0).map(drop)
    }

    /// Sends what was pulled, as far as UCX takes it. `Some`: something was sent, and whether the
    /// budget ended first.
    fn send_pulled(
        &mut self,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<Option<bool>, LinkError> {
        let mut any = None;
        while self.may_send_chunks() {
            if budget.bytes == 0 {
                return Ok(Some(true));
            }
            any = Some(false);
            self.send_chunks()?;
            budget.bytes = budget.bytes.saturating_sub(CHUNKS_BYTES_MAX);
            self.report_finished(sink, None);
        }
        Ok(any)
    }

    fn may_send_chunks(&self) -> bool {
        self.outgoing.has_work() && self.chunks_in_flight * self.chunk_bytes < CHUNKS_BYTES_MAX
    }

    /// Sends what was pulled, as far as UCX may be kept at work.
    fn send_chunks(&mut self) -> Result<(), LinkError> {
        while self.chunks_in_flight * self.chunk_bytes < CHUNKS_BYTES_MAX {
            let mut header = self.header(Kind::Chunk, Class::Message, &[]);
            let chunk_bytes = self.chunk_bytes;
            let mut sending = self.spare.pop().unwrap_or_else(SendOp::new);
            let Some((id, outgoing)) = self.outgoing.next() else {
                self.spare.push(sending);
                return Ok(());
            };
            header = Header { id, class: outgoing.class, len: outgoing.sent as u64, ..header };
            sending.class = outgoing.class;
            sending.chunk_of = Some(id);
            sending.bytes.extend_from_slice(&header.encode());
            let header_len = sending.bytes.len();
            outgoing.in_flight += 1;
            outgoing.next_chunk(chunk_bytes, &mut sending);
            if outgoing.may_send() {
                self.outgoing.again(id);
            }
            self.chunks_in_flight += 1;
            self.transmit(sending, header_len)?;
        }
        Ok(())
    }

    fn give_back(&mut self, body: Body) {
        if let Body::Held(desc) = body {
            self.worker.lock().release(desc);
        }
    }

    /// Whether a class takes no more for now.
    fn room(&mut self, class: Class) -> Result<bool, LinkError> {
        let waiting = self.in_flight[class as usize] + self.outgoing.count(class);
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
            id: 0,
            len: 0,
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
        self.counters.parcels_sent += 1;
        self.counters.inline_bytes_sent += len as u64;
        let mut sending = self.spare.pop().unwrap_or_else(SendOp::new);
        sending.op = op;
        sending.class = class;
        if len > 0 && (how == How::Offer || len > EAGER_BYTES_MAX) {
            let kind = if how == How::Offer { Kind::Offer } else { Kind::Bulk };
            let id = self.outgoing.next_id();
            // SAFETY: the driver keeps the payload until `Sink::done`; a short one is copied.
            let outgoing =
                unsafe { Outgoing::new(op, class, how == How::Offer, payload, len, COPIED_MAX) };
            let header = Header { id, len: len as u64, ..self.header(kind, class, head) };
            sending.bytes.extend_from_slice(&header.encode());
            sending.bytes.extend_from_slice(head);
            self.outgoing.insert(outgoing);
            self.transmit(sending, 0)?;
            return Ok(Post::Pending);
        }
        let packed = len <= PACKED_PAYLOAD_MAX;
        sending.reports = !packed;
        sending.bytes.extend_from_slice(&self.header(Kind::Eager, class, head).encode());
        sending.bytes.extend_from_slice(head);
        let pieces = payload.iter().filter(|segment| segment.len > 0);
        if packed {
            sending.bytes.reserve(len);
            for piece in pieces {
                // SAFETY: the memory of a post is valid for reads while it is made.
                unsafe { append(&mut sending.bytes, piece.ptr, piece.len) };
            }
        } else {
            sending.iov.extend(pieces.map(|piece| ucp_dt_iov_t {
                buffer: piece.ptr.cast_mut().cast(),
                length: piece.len,
            }));
        }
        let header_len = if packed { 0 } else { sending.bytes.len() };
        let over = self.transmit(sending, header_len)?;
        Ok(if over || packed { Post::Done } else { Post::Pending })
    }

    /// Hands a message to UCX. `true`: it has left.
    fn transmit(&mut self, sending: Box<SendOp>, header_len: usize) -> Result<bool, LinkError> {
        let (class, reports, chunk_of) = (sending.class, sending.reports, sending.chunk_of);
        // SAFETY: the driver keeps payloads until `Sink::done`; what is copied lies in the box.
        let sent = unsafe { self.worker.lock().send(&self.ep, sending, header_len) };
        self.next_seq = self.next_seq.wrapping_add(1);
        self.messages_sent += 1;
        match sent {
            Ok(None) => {
                self.in_flight[class as usize] += 1;
                self.reporting += usize::from(reports);
                Ok(false)
            }
            Ok(Some(over)) => {
                if chunk_of.is_some() {
                    // Reported with the others, outside of what is at work here.
                    self.in_flight[class as usize] += 1;
                    self.finished.push((over, ffi::UCS_OK));
                } else {
                    self.spare(over);
                }
                Ok(true)
            }
            Err((failed, status)) => {
                if chunk_of.is_some() {
                    self.in_flight[class as usize] += 1;
                    self.finished.push((failed, status));
                }
                Err(self.status_error("sending", status))
            }
        }
    }

    /// What is left to do before the link can be killed for good: gives back what the peer sent,
    /// and closes the endpoint.
    fn begin_to_end(&mut self, worker: &mut Locked<'_>) {
        self.slot.close(worker);
        if let Some(waker) = self.waker.take() {
            self.worker.sleeper.forget(&waker);
        }
        for entry in self.arrived.drain(..) {
            if let Body::Held(desc) = entry.body {
                worker.release(desc);
            }
        }
        // From here on nothing is written to what the driver lent for landing.
        self.unlanded = self.slot.mailbox.inbox(&mut worker.key).incoming.clear();
        self.open.clear();
        self.transfers.close_all(worker);
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

/// What a look at the worker has found.
#[derive(Default)]
struct News {
    /// There may be more.
    more: bool,
    fault: Option<Fault>,
    /// Bytes of payloads that have come to their place since the last look.
    landed_bytes: usize,
    /// The peer may be granted more.
    wants: bool,
}

/// Takes over what has ended.
fn take_endings(
    inbox: &mut Inbox,
    finished: &mut Vec<(Box<SendOp>, ucs_status_t)>,
    landed: &mut Vec<OpId>,
) {
    finished.append(&mut inbox.finished);
    landed.append(inbox.incoming.landed());
}

/// A landing for a payload of this length.
fn landing(to: Landing, op: OpId, len: usize) -> Result<Incoming, LinkError> {
    let room: usize = to.iter().map(|segment| segment.len).sum();
    if room != len || !to.iter().all(|segment| segment.kind.cpu_accessible()) {
        return Err(internal("a landing of another length or kind than its payload"));
    }
    Ok(Incoming::new(op, to, len))
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
        let News { more, fault, landed_bytes, wants } = self.progress(spinning, sink);
        budget.bytes = budget.bytes.saturating_sub(landed_bytes);
        self.counters.inline_bytes_received += landed_bytes as u64;
        let mut moved = landed_bytes > 0;
        moved |= self.report_finished(sink, None);
        moved |= self.report_transfers(sink, None);
        if wants {
            let granted = self.grant();
            self.ended(granted)?;
        }
        moved |= !self.arrived.is_empty();
        let spent = self.hand_up(budget, sink);
        let spent = self.ended(spent)?;
        let unsent = self.send_pulled(budget, sink);
        let unsent = self.ended(unsent)?;
        moved |= unsent.is_some();
        if more || spent || unsent == Some(true) {
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
            let mailbox = &self.slot.mailbox;
            mailbox.park(mailbox.inbox(&mut self.worker.lock().key), cx.waker());
            return Ok(Armed::Yes);
        }
        self.alive()?;
        self.look_at_bootstrap(cx);
        let waits = !self.arrived.is_empty()
            || !self.finished.is_empty()
            || !self.landed.is_empty()
            || self.transfers.has_news();
        if self.hung_up.is_some() || waits || self.may_send_chunks() {
            return Ok(Armed::Busy);
        }
        match &self.waker {
            Some(known) if known.will_wake(cx.waker()) => {}
            _ => self.waker = Some(cx.waker().clone()),
        }
        let mut worker = self.worker.lock();
        let mailbox = &self.slot.mailbox;
        let inbox = mailbox.inbox(&mut worker.key);
        if inbox.has_news() {
            return Ok(Armed::Busy);
        }
        mailbox.park(inbox, cx.waker());
        let armed = worker.arm(Some(cx.waker()));
        if !matches!(armed, Ok(Armed::Yes)) {
            mailbox.unpark(mailbox.inbox(&mut worker.key));
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
        let Some((id, len)) = self.open.remove(&payload.0) else {
            return Err(internal("landing of a payload that is not held"));
        };
        let pulled = self.pull(id, len, to, op);
        self.ended(pulled)?;
        Ok(Post::Pending)
    }

    fn release(&mut self, payload: PayloadId) {
        if self.dead.is_none()
            && let Some((id, _)) = self.open.remove(&payload.0)
        {
            let refused = self.answer(Kind::Refuse, id, 0);
            // An error is told by the next poll.
            let _ = self.ended(refused);
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
            let in_flight = self.slot.mailbox.inbox(&mut worker.key).in_flight;
            if in_flight == 0 || Instant::now() >= until {
                break in_flight;
            }
        };
        let inbox = self.slot.mailbox.inbox(&mut worker.key);
        take_endings(inbox, &mut self.finished, &mut self.landed);
        self.transfers.ended.append(&mut inbox.transfers);
        let wakes = worker.take_wakes();
        drop(worker);
        for waker in wakes {
            sink.wake(waker);
        }
        self.report_finished(sink, Some(error));
        self.end_transfers(sink, error);
        self.transfers.close_all(&mut shared.lock());
        self.set_lingers(in_flight > 0);
        // What no chunk of is under way is not read any more, and `begin_to_end` saw to the rest.
        let unlanded = std::mem::take(&mut self.unlanded);
        for op in unlanded.into_iter().chain(self.outgoing.clear_idle()) {
            if op != OpId::NONE {
                sink.done(op, Err(error.clone()));
            }
        }
        if in_flight > 0 { Killed::Lingers } else { Killed::Over }
    }

    /// A payload that waits for the peer to land it counts as not flushed. What was posted after
    /// this was first asked does not count: a peer that goes on asking cannot hold it off.
    fn flushed(&self) -> bool {
        if self.killed {
            return true;
        }
        let mailbox = &self.slot.mailbox;
        let mut worker = self.worker.lock();
        let sent = self.messages_sent;
        let inbox = mailbox.inbox(&mut worker.key);
        let goal = *inbox.flush_goal.get_or_insert(sent);
        if inbox.flushed < goal && !inbox.flushing {
            inbox.flushing = true;
            let begun = worker.flush(&self.ep, sent);
            // A flush that fails is followed by the error handler's call.
            if !matches!(begun, Begun::Pending) {
                let inbox = mailbox.inbox(&mut worker.key);
                inbox.flushing = false;
                inbox.flushed = sent;
            }
        }
        let inbox = mailbox.inbox(&mut worker.key);
        let flushed = inbox.flushed >= goal && self.reporting == 0 && !self.outgoing.any_owed();
        if flushed {
            inbox.flush_goal = None;
        }
        flushed
    }

    fn counters(&self) -> LinkCounters {
        self.counters
    }

    fn one_sided(&mut self) -> Option<&mut dyn OneSided> {
        if self.direct { Some(self) } else { None }
    }

    /// The peer's end of the bootstrap connection goes with its link, after everything that it had
    /// UCX do has ended; so does a dead process's.
    fn poll_unreachable(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !std::mem::replace(&mut self.said_over, true) {
            // So that it ends. It may have: then there is nothing to tell.
            let _ = rustix::net::shutdown(self.bootstrap.fd(), rustix::net::Shutdown::Write);
        }
        let mut bytes = [0; 64];
        let mut read = |fd: BorrowedFd<'_>| {
            rustix::io::read(fd, &mut bytes).map(Attempt::More).map_err(io::Error::from)
        };
        // Directly: the runtime may be gone.
        match read(self.bootstrap.fd()) {
            Ok(Attempt::More(0) | Attempt::Drained(0)) => return Poll::Ready(()),
            Ok(_) => {}
            Err(error) if would_come(&error) => {}
            Err(_) => return Poll::Ready(()),
        }
        match self.bootstrap.poll_read(cx, read) {
            Poll::Ready(Ok(0)) => Poll::Ready(()),
            Poll::Ready(Ok(_)) => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Poll::Ready(Err(error)) if would_come(&error) || is_runtime_gone(&error) => {
                Poll::Pending
            }
            Poll::Ready(Err(_)) => Poll::Ready(()),
            Poll::Pending => Poll::Pending,
        }
    }
}

/// Whether a read that failed in this way may do better later.
fn would_come(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
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
