//! A lane to one peer through UCX.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use thalweg_ffi::ucx::{self as ffi, ucp_dt_iov_t, ucs_status_t};

use super::bulk::{Incoming, Outgoing, Outgoings, is_bulk};
use super::engine::{Opened, Slot};
use super::inbox::{Body, Entry, Fault, INLINE_MAX, Inbox, Polled, Takes};
use super::request::{Begun, Packed, SendOp};
use super::wire::{Address, Header, Kind, LONG_HEADER_BYTES};
use super::worker::{Ep, Locked, Sent, Worker};
use super::{HELD_UP, UcxOptions, lanes, link_error};
use crate::error::{ErrorKind, LinkError};
use crate::link::arrivals::{self, Offered, end_of_peer, filling, offered_len, sent_len};
use crate::link::lookout::{Look, Lookout};
use crate::link::{
    Armed, Arrival, Budget, COPIED_MAX, Caps, Class, HEAD_MAX, How, Killed, Landing, Link,
    LinkCounters, LinkKind, OpId, PayloadId, Post, Progress, Segment, Sink,
};
use crate::runtime::{Source, is_runtime_gone};

/// Payloads up to this many bytes are copied behind their heads and leave in one piece.
const PACKED_PAYLOAD_MAX: usize = INLINE_MAX;
/// Longer payloads wait at the sender until they are pulled.
const EAGER_BYTES_MAX: usize = 64 << 10;
/// Chunks that UCX may be at work on, in bytes: what other classes wait behind at most.
const CHUNKS_BYTES_MAX: usize = 256 << 10;
/// Requests of a bulk class that may be under way.
const IN_FLIGHT_MAX: usize = 1024;
/// The same for control. Answers to what a peer sends are among them, so a peer that sends and
/// never reads ends here.
const CONTROL_MAX: usize = 65_536;
/// A chunk fits, with its header, into one segment of shared memory (8 KiB) or into what UCX sends
/// at once over sockets (64 KiB), so that UCX does not put it together again.
const CHUNK_BYTES_SHARED_MEMORY: usize = 8192;
const CHUNK_BYTES: usize = 64_000;
/// Payloads that may wait at the peer without having been landed.
const OPEN_MAX: usize = 65_536;
/// Boxes that are kept for the next parcels.
const SPARE_MAX: usize = 64;
/// Steps of progress in one poll that spins, until one of them finds something.
const LOOKS: usize = 16;
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
    lookout: Lookout,
    /// The peer has hung up; told when everything that it sent before has been handed up.
    hung_up: Option<LinkError>,
    /// The endpoint's waker, once it was armed.
    waker: Option<Waker>,
    /// Taken from the inbox, not handed up yet.
    arrived: VecDeque<Entry>,
    /// Taken from the inbox, not reported yet.
    finished: Vec<(Box<SendOp>, ucs_status_t)>,
    /// Payloads that have landed, or left to their last chunk, not reported yet.
    whole: Vec<OpId>,
    /// Payloads that were handed up and wait to be landed: the peer's number, and the length.
    open: HashMap<u64, (u32, usize)>,
    outgoing: Outgoings,
    chunk_bytes: usize,
    chunks_in_flight: usize,
    count: Count,
    next_seq: u32,
    messages_sent: u64,
    /// Handed up, and still counted as held by the inbox.
    freed_bytes: usize,
    /// Of the last look, until something follows of it. Not part of what the look returns, which is
    /// small so: most looks have no news.
    news: News,
    in_flight: [usize; Class::COUNT],
    /// Those among them whose memory is not the link's own.
    reporting: usize,
    packed: Packed,
    #[allow(clippy::vec_box, reason = "UCX is told their addresses, which must not change")]
    spare: Vec<Box<SendOp>>,
    dead: Option<LinkError>,
    /// Killed; counted among the worker's endings for as long as UCX is at work on something.
    killed: bool,
    lingers: bool,
    /// Landings that were ended by that.
    unlanded: Vec<OpId>,
}

impl UcxLink {
    pub(super) fn new(opened: Opened, bootstrap: Source) -> UcxLink {
        let Opened { ep, slot, to, lanes, options } = opened;
        let chunk_bytes = match lanes::shares_memory(&lanes) {
            true => CHUNK_BYTES_SHARED_MEMORY,
            false => CHUNK_BYTES,
        };
        let lanes = lanes::in_words(&lanes);
        let UcxOptions { eager_max, max_payload, .. } = options;
        UcxLink {
            packed: Packed::new(SendOp::new(), ep.mailbox()),
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
            bootstrap,
            lookout: Lookout::new(),
            hung_up: None,
            waker: None,
            arrived: VecDeque::new(),
            finished: Vec::new(),
            whole: Vec::new(),
            open: HashMap::new(),
            outgoing: Outgoings::default(),
            chunk_bytes,
            chunks_in_flight: 0,
            count: Count::default(),
            next_seq: 0,
            messages_sent: 0,
            freed_bytes: 0,
            news: News::default(),
            in_flight: [0; Class::COUNT],
            reporting: 0,
            spare: Vec::new(),
            dead: None,
            killed: false,
            lingers: false,
            unlanded: Vec::new(),
        }
    }

    #[inline]
    fn alive(&self) -> Result<(), LinkError> {
        match &self.dead {
            None => Ok(()),
            Some(error) => Err(error.clone()),
        }
    }

    /// Remembers an error.
    #[inline]
    fn ended<T>(&mut self, result: Result<T, LinkError>) -> Result<T, LinkError> {
        result.map_err(|error| self.die(error))
    }

    #[cold]
    fn die(&mut self, error: LinkError) -> LinkError {
        self.dead.get_or_insert_with(|| error.clone());
        error
    }

    fn status_error(&self, doing: &str, status: ucs_status_t) -> LinkError {
        link_error(self.worker.ucx, doing, status)
    }

    /// Whether the peer's process still holds its end of the bootstrap connection.
    #[inline(never)]
    fn look_at_bootstrap(&mut self, look: Look<'_, '_>) {
        if self.hung_up.is_none() {
            self.hung_up = end_of_peer(LinkKind::Ucx, &self.bootstrap, look, io_error);
        }
    }

    /// Moves the worker on, and takes over what callbacks have left. Does nothing if somebody else
    /// is at it, unless they may have left something.
    fn progress(
        &mut self,
        spinning: bool,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<Looked, LinkError> {
        let mailbox = &self.slot.mailbox;
        let mut worker = match self.worker.try_lock() {
            Some(worker) => worker,
            // Not if the peer has hung up: what it sent before comes first.
            None if spinning && !mailbox.may_have_news() && self.hung_up.is_none() => {
                return Ok(Looked { quiet: true, ..Looked::default() });
            }
            None => self.worker.lock(),
        };
        // What came before an end is fetched at once, whoever polls: a look that ends with something of
        // another link's is not the last one.
        let last = self.hung_up.is_some() || mailbox.inbox(&mut worker.key).fault.is_some();
        let spinning = spinning && !last;
        let before = self.count.next_payload;
        let takes = if self.arrived.is_empty() { Takes::Yes } else { Takes::NotYet };
        let (count, result) = (&mut self.count, Ok(()));
        let mut polled = Polled { budget, sink: &mut *sink, count, takes, result };
        let moved = mailbox.while_polled(&mut worker, &mut polled, |worker| {
            if !spinning {
                return worker.progress_all(if last { LAST_STEPS } else { STEPS });
            }
            // Looks follow each other closely until something is to be done.
            let mut moved = false;
            for _ in 0..LOOKS {
                moved |= worker.progress();
                if moved && !mailbox.inbox(&mut worker.key).only_lands() {
                    break;
                }
            }
            moved
        });
        polled.ended()?;
        let handed_up = self.count.next_payload != before;
        let more = moved && !spinning;
        let quiet = self.freed_bytes == 0
            && mailbox.inbox(&mut worker.key).is_quiet()
            && !worker.has_wakes();
        if quiet {
            return Ok(Looked { handed_up, more, quiet });
        }
        let wakes = worker.take_wakes();
        let inbox = mailbox.look(&mut worker.key);
        inbox.held_bytes = inbox.held_bytes.saturating_sub(std::mem::take(&mut self.freed_bytes));
        if self.arrived.is_empty() && !inbox.queue.is_empty() {
            std::mem::swap(&mut inbox.queue, &mut self.arrived);
        }
        take_endings(inbox, &mut self.finished, &mut self.whole);
        self.news = News {
            waits: !inbox.queue.is_empty(),
            fault: inbox.fault,
            landed_bytes: inbox.incoming.take_landed_bytes(),
            wants: inbox.incoming.wants(),
        };
        drop(worker);
        for waker in wakes {
            sink.wake(waker);
        }
        Ok(Looked { handed_up, more, quiet })
    }

    /// Moves everything on that can be moved.
    #[inline]
    fn turn(
        &mut self,
        spinning: bool,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<Progress, LinkError> {
        let looked = self.progress(spinning, budget, sink);
        let looked = self.ended(looked)?;
        let nothing_else = looked.quiet && !looked.more && self.hung_up.is_none();
        if nothing_else && !self.has_taken() && !self.outgoing.has_work() {
            return Ok(if looked.handed_up { Progress::Some } else { Progress::Idle });
        }
        self.follow(looked, budget, sink)
    }

    /// Does what follows of a look at the worker.
    #[inline(never)]
    fn follow(
        &mut self,
        looked: Looked,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<Progress, LinkError> {
        let Looked { handed_up, more, .. } = looked;
        let News { waits, fault, landed_bytes, wants } = std::mem::take(&mut self.news);
        // Something is left for what is not landed: chunks come without end for a while.
        budget.bytes = budget.bytes.saturating_sub(landed_bytes).max(1);
        self.count.counters.inline_bytes_received += landed_bytes as u64;
        let mut moved = handed_up || landed_bytes > 0;
        moved |= self.report_finished(sink, None);
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
        // Over a connection whose other end is gone UCX may be busy for ever (1.13, `rc`): so many steps
        // that brought nothing are enough then.
        let more = more && (moved || self.hung_up.is_none() && fault.is_none());
        // What comes by other lanes may go on for ever: the worker is to be rid of its links.
        let is_over = matches!(fault, Some(Fault::Worker)) && !spent && !waits;
        if !is_over && (more || spent || unsent == Some(true)) {
            return Ok(Progress::More);
        }
        if !is_over && moved {
            return Ok(Progress::Some);
        }
        let broken = match (fault, &self.hung_up) {
            (Some(Fault::Peer(what)), _) => Some(LinkError::protocol(LinkKind::Ucx, what)),
            (Some(Fault::Worker), None) => Some(error(ErrorKind::ConnectionLost, HELD_UP)),
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

    /// Reports what has ended. `failed`: what to say of requests that were ended by force.
    fn report_finished(&mut self, sink: &mut dyn Sink, failed: Option<&LinkError>) -> bool {
        if self.finished.is_empty() && self.whole.is_empty() {
            return false;
        }
        let mut all = std::mem::take(&mut self.finished);
        for (op, status) in all.drain(..) {
            self.sent(op, status, sink, failed);
        }
        // Its memory serves again.
        self.finished = all;
        for op in self.whole.drain(..).filter(|op| *op != OpId::NONE) {
            sink.done(op, Ok(()));
        }
        true
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

    #[inline]
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

    /// A parcel with its payload.
    fn eager(
        &mut self,
        entry: Entry,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        let len = entry.len;
        let (head, inline) = entry.bytes.split_at(usize::from(entry.header.head_len));
        let inline = matches!(entry.body, Body::Inline).then_some(inline);
        // SAFETY: `len` bytes lie there, UCX's until they are given back below.
        let result = unsafe { self.count.eager(head, inline, entry.payload(), len, budget, sink) };
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
        let len = offered_len(LinkKind::Ucx, header.len, self.max_payload)?;
        if self.open.len() >= OPEN_MAX {
            return Err(LinkError::protocol(LinkKind::Ucx, "too many open payloads"));
        }
        let payload = self.count.parcel();
        let how = if header.kind == Kind::Offer { How::Offer } else { How::Eager };
        let arrival = Arrival { head, len: header.len, payload, inline: None, views: None, how };
        match arrivals::offer(LinkKind::Ucx, arrival, sink)? {
            Offered::Land { to, op } => self.pull(header.id, len, to, op),
            Offered::Hold => {
                self.open.insert(payload.0, (header.id, len));
                Ok(())
            }
            Offered::Refuse => self.answer(Kind::Refuse, header.id, 0),
        }
    }

    /// Lands a payload that waits at the peer.
    fn pull(&mut self, id: u32, len: usize, to: Landing, op: OpId) -> Result<(), LinkError> {
        let incoming = Incoming::new(op, filling(LinkKind::Ucx, to, len)?);
        let mut worker = self.worker.lock();
        let incomings = &mut self.slot.mailbox.inbox(&mut worker.key).incoming;
        let refused = if incomings.len() >= OPEN_MAX {
            Some("too many open payloads")
        } else if !incomings.insert(id, incoming) {
            Some("a payload's number is in use")
        } else {
            None
        };
        drop(worker);
        if let Some(why) = refused {
            // It is reported with the others when the link ends.
            self.unlanded.push(op);
            return Err(LinkError::protocol(LinkKind::Ucx, why));
        }
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
        let header = Header { id, len, ..self.header(kind, Class::Control, &[]) };
        // SAFETY: it has no payload.
        unsafe { self.transmit_packed(&header, &[], &[], 0) }
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

    /// Whether something waits here of what was taken from the inbox.
    fn has_taken(&self) -> bool {
        !self.arrived.is_empty() || !self.finished.is_empty() || !self.whole.is_empty()
    }

    fn may_send_chunks(&self) -> bool {
        self.outgoing.has_work()
            && self.hung_up.is_none()
            && self.chunks_in_flight * self.chunk_bytes < CHUNKS_BYTES_MAX
    }

    /// Sends what was pulled, as far as UCX may be kept at work.
    fn send_chunks(&mut self) -> Result<(), LinkError> {
        let shared = self.worker.clone();
        let mut worker = shared.lock();
        let room = (CHUNKS_BYTES_MAX / self.chunk_bytes).saturating_sub(self.chunks_in_flight);
        for _ in 0..room {
            let mut sending = self.spare.pop().unwrap_or_else(SendOp::new);
            let (to, seq) = (self.to, self.next_seq);
            let made = self.outgoing.next_chunk(self.chunk_bytes, &mut sending, |id, class, at| {
                Header { id, len: at, ..Header::new(Kind::Chunk, class, 0, seq, to) }
            });
            let Some((id, class)) = made else {
                self.spare.push(sending);
                return Ok(());
            };
            self.chunks_in_flight += 1;
            // Not read out of the box, where it was just written in other pieces: that would wait
            // until the chunk before has left the processor.
            let what = Transmitted { class, reports: false, chunk_of: Some(id) };
            // SAFETY: the driver keeps payloads until `Sink::done`; the rest lies in the box.
            let sent = unsafe { worker.send(&self.ep, sending, LONG_HEADER_BYTES) };
            self.transmitted(what, sent)?;
        }
        Ok(())
    }

    fn give_back(&mut self, body: Body) {
        if let Body::Held(desc) = body {
            self.worker.lock().release(desc);
        }
    }

    /// Whether a class takes no more for now.
    #[inline]
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

    #[inline]
    fn header(&self, kind: Kind, class: Class, head: &[u8]) -> Header {
        Header::new(kind, class, head.len() as u16, self.next_seq, self.to)
    }

    #[inline]
    fn send(
        &mut self,
        op: OpId,
        class: Class,
        how: How,
        head: &[u8],
        payload: &[Segment<'_>],
        len: usize,
    ) -> Result<Post, LinkError> {
        self.count.counters.parcels_sent += 1;
        self.count.counters.inline_bytes_sent += len as u64;
        if len <= PACKED_PAYLOAD_MAX && (how == How::Eager || len == 0) {
            let header = self.header(Kind::Eager, class, head);
            // SAFETY: the memory of a post is valid for reads while it is made.
            unsafe { self.transmit_packed(&header, head, payload, len) }?;
            return Ok(Post::Done);
        }
        self.send_long(op, class, how, head, payload, len)
    }

    /// Sends a parcel whose payload leaves on its own: at once, or when it is pulled.
    fn send_long(
        &mut self,
        op: OpId,
        class: Class,
        how: How,
        head: &[u8],
        payload: &[Segment<'_>],
        len: usize,
    ) -> Result<Post, LinkError> {
        if how == How::Offer || len > EAGER_BYTES_MAX {
            let kind = if how == How::Offer { Kind::Offer } else { Kind::Bulk };
            let id = self.outgoing.next_id();
            // SAFETY: the driver keeps the payload until `Sink::done`; a short one is copied.
            let outgoing =
                unsafe { Outgoing::new(op, class, how == How::Offer, payload, len, COPIED_MAX) };
            let header = Header { id, len: len as u64, ..self.header(kind, class, head) };
            self.outgoing.insert(outgoing);
            // SAFETY: it has no payload; that follows when it is pulled.
            unsafe { self.transmit_packed(&header, head, &[], 0) }?;
            return Ok(Post::Pending);
        }
        let mut sending = self.spare.pop().unwrap_or_else(SendOp::new);
        sending.op = op;
        sending.class = class;
        sending.reports = true;
        self.header(Kind::Eager, class, head).append_to(&mut sending.bytes);
        sending.bytes.extend_from_slice(head);
        let pieces = payload.iter().filter(|segment| segment.len > 0);
        sending.iov.extend(
            pieces.map(|piece| ucp_dt_iov_t {
                buffer: piece.ptr.cast_mut().cast(),
                length: piece.len,
            }),
        );
        let header_len = sending.bytes.len();
        let what = Transmitted { class, reports: true, chunk_of: None };
        // SAFETY: the driver keeps payloads until `Sink::done`; the rest lies in the box.
        let sent = unsafe { self.worker.lock().send(&self.ep, sending, header_len) };
        let over = self.transmitted(what, sent)?;
        Ok(if over { Post::Done } else { Post::Pending })
    }

    /// Hands UCX a parcel that leaves in one piece, with `len` bytes of payload.
    ///
    /// # Safety
    ///
    /// The payload is valid for reads, and as long as that.
    #[inline(always)]
    unsafe fn transmit_packed(
        &mut self,
        header: &Header,
        head: &[u8],
        payload: &[Segment<'_>],
        len: usize,
    ) -> Result<(), LinkError> {
        // SAFETY: the caller's promise.
        unsafe { self.packed.pack(header, head, payload, len) };
        let Self { packed, spare, ep, .. } = self;
        let spare = || spare.pop().unwrap_or_else(SendOp::new);
        let sent = self.worker.lock().send_packed(ep, packed, spare);
        self.next_seq = self.next_seq.wrapping_add(1);
        self.messages_sent += 1;
        match sent {
            Ok(false) => Ok(()),
            Ok(true) => {
                self.in_flight[header.class as usize] += 1;
                Ok(())
            }
            Err(status) => Err(self.status_error("sending", status)),
        }
    }

    #[inline]
    fn transmitted(&mut self, what: Transmitted, sent: Sent) -> Result<bool, LinkError> {
        let Transmitted { class, reports, chunk_of } = what;
        self.next_seq = self.next_seq.wrapping_add(1);
        self.messages_sent += 1;
        match sent {
            Ok(None) => {
                self.in_flight[class as usize] += 1;
                self.reporting += usize::from(reports);
                Ok(false)
            }
            Ok(Some(over)) => {
                // The next chunk has the same box, which is in the caches still: 2 % of what 8 MiB
                // take over shared memory.
                self.spare(over);
                if let Some(id) = chunk_of {
                    self.chunks_in_flight -= 1;
                    // Reported with the others, outside of what is at work here.
                    self.whole.extend(self.outgoing.chunk_left(id));
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
    ///
    /// Whom to wake when the gate is open.
    #[must_use = "nobody else may be awake"]
    fn begin_to_end(&mut self, worker: &mut Locked<'_>) -> Option<Waker> {
        let waker = self.slot.close(worker);
        if let Some(waker) = self.waker.take() {
            self.worker.sleeper.forget(&waker);
        }
        for entry in self.arrived.drain(..) {
            if let Body::Held(desc) = entry.body {
                worker.release(desc);
            }
        }
        // From here on nothing is written to what the driver lent for landing.
        self.unlanded.extend(self.slot.mailbox.inbox(&mut worker.key).incoming.clear());
        self.open.clear();
        worker.close(&mut self.ep);
        waker
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

/// What is remembered of a message that UCX is given.
struct Transmitted {
    class: Class,
    reports: bool,
    chunk_of: Option<u32>,
}

/// Numbers what comes, and counts it.
#[derive(Default)]
pub(super) struct Count {
    next_payload: u64,
    counters: LinkCounters,
}

impl Count {
    /// Counts a parcel that came, and numbers its payload.
    #[inline]
    fn parcel(&mut self) -> PayloadId {
        let payload = PayloadId(self.next_payload);
        self.next_payload += 1;
        self.counters.parcels_received += 1;
        payload
    }

    /// Hands up a parcel with its payload, which is also `inline` if that is private memory.
    ///
    /// # Safety
    ///
    /// `len` bytes are readable at `from`.
    #[inline(always)]
    unsafe fn eager(
        &mut self,
        head: &[u8],
        inline: Option<&[u8]>,
        from: *const u8,
        len: usize,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        let payload = self.parcel();
        self.counters.inline_bytes_received += len as u64;
        let how = How::Eager;
        let arrival = Arrival { head, len: len as u64, payload, inline, views: None, how };
        // SAFETY: the caller's promise.
        unsafe { arrivals::eager(LinkKind::Ucx, arrival, from, len, budget, sink) }
    }
}

impl Polled<'_> {
    /// Hands up a parcel whose head, and payload behind it, are in private memory.
    #[inline(always)]
    pub fn hand_up(&mut self, bytes: &[u8], head_len: usize) {
        self.budget.parcels -= 1;
        self.takes = Takes::Torn;
        let (head, inline) = bytes.split_at(head_len);
        let (from, len) = (inline.as_ptr(), inline.len());
        // SAFETY: that is where they lie.
        let taken =
            unsafe { self.count.eager(head, Some(inline), from, len, self.budget, self.sink) };
        match taken {
            Ok(()) => self.takes = Takes::Yes,
            Err(error) => {
                self.takes = Takes::Failed;
                self.result = Err(error);
            }
        }
    }

    /// Why it had to stop, if it had.
    #[inline]
    fn ended(self) -> Result<(), LinkError> {
        match self.takes {
            Takes::Yes | Takes::NotYet => Ok(()),
            Takes::Torn => Err(internal("a parcel was not taken to its end")),
            Takes::Failed => self.result,
        }
    }
}

/// What a look at the worker came to.
#[derive(Default)]
struct Looked {
    /// Something was handed up already.
    handed_up: bool,
    /// There may be more.
    more: bool,
    /// There is no news.
    quiet: bool,
}

/// What a look at the worker has found beside what was handed up already.
#[derive(Default)]
struct News {
    /// Something has come that was not taken over yet.
    waits: bool,
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
        // Before the worker is moved on: what the peer sent before it ended is there by then.
        if self.lookout.is_due() {
            self.look_at_bootstrap(Look::Now);
        }
        if !spinning {
            self.look_at_bootstrap(Look::Told(cx));
        }
        let progress = self.turn(spinning, budget, sink)?;
        self.lookout.polled(progress);
        Ok(progress)
    }

    fn arm(&mut self, cx: &mut Context<'_>) -> Result<Armed, LinkError> {
        if self.killed {
            let mailbox = &self.slot.mailbox;
            let mut worker = self.worker.lock();
            let inbox = mailbox.inbox(&mut worker.key);
            // What it lingers for may have ended since, and nobody was told.
            let over = inbox.in_flight == 0;
            let replaced = mailbox.park(inbox, cx.waker());
            drop(worker);
            drop(replaced);
            return Ok(if over { Armed::Busy } else { Armed::Yes });
        }
        self.alive()?;
        self.look_at_bootstrap(Look::Told(cx));
        if self.hung_up.is_some() || self.has_taken() || self.may_send_chunks() {
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
        let replaced = mailbox.park(inbox, cx.waker());
        let armed = worker.arm(Some(cx.waker()));
        if !matches!(armed, Ok(Armed::Yes)) {
            mailbox.unpark(mailbox.inbox(&mut worker.key));
        }
        drop(worker);
        drop(replaced);
        self.worker.armed();
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
        let len = sent_len(LinkKind::Ucx, payload)?;
        let room = self.room(class);
        if !self.ended(room)? || is_bulk(class, len) && self.outgoing.bulk_is_full() {
            self.count.counters.stalls += 1;
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
        let resident = match std::mem::replace(&mut self.killed, true) {
            false => self.begin_to_end(&mut worker),
            true => None,
        };
        let in_flight = loop {
            worker.progress_all(STEPS);
            let in_flight = self.slot.mailbox.inbox(&mut worker.key).in_flight;
            if in_flight == 0 || Instant::now() >= until {
                break in_flight;
            }
        };
        let inbox = self.slot.mailbox.inbox(&mut worker.key);
        take_endings(inbox, &mut self.finished, &mut self.whole);
        let wakes = worker.take_wakes();
        drop(worker);
        for waker in wakes.into_iter().chain(resident) {
            sink.wake(waker);
        }
        self.report_finished(sink, Some(error));
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
        inbox.flush_ended = false;
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
        self.count.counters
    }
}

impl Drop for UcxLink {
    fn drop(&mut self) {
        if self.worker.forked() {
            return;
        }
        let worker = self.worker.clone();
        if !self.killed {
            let mut locked = worker.lock();
            let resident = self.begin_to_end(&mut locked);
            drop(locked);
            resident.into_iter().for_each(Waker::wake);
        }
        self.set_lingers(false);
        debug_assert!(self.ep.is_closed());
    }
}
