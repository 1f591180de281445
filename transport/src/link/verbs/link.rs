//! A lane to one peer over verbs.

mod fetching;

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use smallvec::SmallVec;
use thalweg_ffi::ibverbs as ffi;

use super::alarm::Alarm;
use super::blob::RAILS_MAX;
use super::bulk::{Incoming, Outgoing, Outgoings, STRIPE_BYTES_MIN, Turns};
use super::device::{Access, LocalPort, is_removed};
use super::engine::{Opened, VerbsEngine};
use super::markers::Markers;
use super::messenger::{Ended, Messenger};
use super::onesided::{Means, Outcome, Reachable, Reaches};
use super::queues::{Completion, Side};
use super::rails::Rails;
use super::registrations::{Held, Registrations, Use};
use super::watchdog::{Finding, Watchdog};
use super::wire::{BODY_MAX, CHUNKS_LEAVE, HEADER_BYTES, Header, Kind, PIECES_MAX, Piece};
use crate::error::{ErrorKind, LinkError};
use crate::link::arrivals::{self, end_of_peer, offered_len, sent_len};
use crate::link::linger::Linger;
use crate::link::lookout::{Look, Lookout};
use crate::link::{
    Armed, Arrival, Budget, COPIED_MAX, Caps, Check, Class, HEAD_MAX, How, Killed, Landing, Link,
    LinkCounters, LinkKind, OneSided, OpId, PayloadId, Post, Progress, Registration, RemoteId,
    Segment, SegmentMut, Sink,
};
use crate::memory::MemoryKind;
use crate::runtime::{Attempt, Source, Timers, is_runtime_gone};

/// Payloads of this many bytes or more are read, if that can be: below, registering and a round
/// trip take longer than copying.
const READ_BYTES_MIN: usize = 32 << 10;
/// Pieces of memory shorter than this are not worth a registration each.
const PIECE_BYTES_MIN: usize = 4 << 10;
/// Longer payloads wait at the sender until they are fetched, also if the receiver could place
/// them at once.
const EAGER_BYTES_MAX: usize = 64 << 10;
/// Payloads of a bulk class that may wait to be fetched.
const OUTGOING_MAX: usize = 1024;
/// Control messages that may wait for room. Answers to what a peer sends are among them, so a peer
/// that sends and never reads ends here.
const WAITING_MAX: usize = 65_536;
/// Payloads that may wait at the peer without having been landed.
const OPEN_MAX: usize = 65_536;
/// How long `kill` tries to destroy queue pairs that will not go before it comes back to that later.
const KILL_PATIENCE: Duration = Duration::from_millis(20);
/// What it waits in between.
const KILL_STEP: Duration = Duration::from_millis(1);
/// When it comes back to it: after the shorter time first, then after twice the last one.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(1);

fn error(kind: ErrorKind, detail: impl Into<String>) -> LinkError {
    LinkError::new(kind, LinkKind::Verbs, detail)
}

fn internal(detail: &str) -> LinkError {
    error(ErrorKind::Io, detail)
}

fn protocol(detail: &str) -> LinkError {
    LinkError::protocol(LinkKind::Verbs, detail)
}

fn io_error(doing: &str, error: &io::Error) -> LinkError {
    if is_runtime_gone(error) {
        return LinkError::new(ErrorKind::RuntimeGone, LinkKind::Verbs, error.to_string());
    }
    let mut made = LinkError::io(LinkKind::Verbs, doing, error);
    if is_removed(error) {
        made.kind = ErrorKind::ConnectionLost;
    }
    made
}

/// In words, how payloads go.
fn ways(port: &LocalPort, why: &str, rails: &Rails) -> String {
    let (sends, reads, stripes) = (BODY_MAX >> 10, READ_BYTES_MIN >> 10, STRIPE_BYTES_MIN >> 10);
    let mut ways = format!(
        "verbs at {port}, {why}; sends ≤ {sends} KiB, RDMA read ≥ {reads} KiB, chunks between"
    );
    if rails.has_further() {
        ways.push_str(&format!("; reads ≥ {stripes} KiB also at {}", rails.describe()));
    }
    ways
}

/// Why a request at a port failed.
fn failed(doing: &str, port: &LocalPort, completion: &Completion) -> LinkError {
    let kind = match completion.status {
        ffi::IBV_WC_RETRY_EXC_ERR
        | ffi::IBV_WC_RNR_RETRY_EXC_ERR
        | ffi::IBV_WC_WR_FLUSH_ERR
        // Soft-RoCE's word for a packet that it cannot get rid of: the interface is down.
        | ffi::IBV_WC_LOC_QP_OP_ERR
        | ffi::IBV_WC_REM_OP_ERR
        | ffi::IBV_WC_REM_ABORT_ERR
        // The peer's memory is registered no more: its link is at an end.
        | ffi::IBV_WC_REM_ACCESS_ERR
        | ffi::IBV_WC_REM_INV_REQ_ERR
        | ffi::IBV_WC_RESP_TIMEOUT_ERR
        | ffi::IBV_WC_FATAL_ERR => ErrorKind::ConnectionLost,
        _ => ErrorKind::Io,
    };
    let what = port.device.verbs.describe(completion.status);
    let Completion { status, vendor, .. } = completion;
    let detail = format!("{doing} at {port}: {what} (status {status}, vendor error {vendor})");
    error(kind, detail)
}

/// In words, what a completion on the sending side was about.
fn doing(ended: &Ended) -> &'static str {
    match ended {
        Ended::Send => "sending",
        Ended::Read(_) | Ended::Marker => "reading",
        Ended::Reach(_) => "putting or getting",
    }
}

/// A payload at the peer that nobody has asked for yet.
struct Offered {
    id: u32,
    len: usize,
    pieces: Vec<Piece>,
    /// The rails that these have keys for.
    rails: u8,
}

/// Memory that is offered: registered, and what the peer is told of it.
#[derive(Default)]
struct Named {
    held: SmallVec<[Held; 1]>,
    pieces: SmallVec<[Piece; 1]>,
    /// The further rails that the pieces have keys for.
    rails: u8,
}

/// A control message that waits for room: its header, and what comes behind it.
struct Waiting {
    header: Header,
    body: Vec<u8>,
}

/// A lane; see the module.
pub(crate) struct VerbsLink {
    messenger: Messenger,
    rails: Rails,
    timers: Arc<Timers>,
    channel: Source,
    registrations: Arc<Registrations>,
    alarm: Arc<Alarm>,
    engine: Weak<VerbsEngine>,
    lookout: Lookout,
    watchdog: Watchdog,
    caps: Caps,
    max_payload: u64,
    /// Where the peer's process shows that it lives. Nothing more is said on it.
    bootstrap: Source,
    /// What ends the link once everything that came before has been handed up.
    broken: Option<LinkError>,
    /// Completions that have been taken and not dealt with: messages, and what was sent or read.
    received: VecDeque<Completion>,
    ended: VecDeque<Completion>,
    waiting: VecDeque<Waiting>,
    /// Payloads that were handed up and wait to be landed.
    open: HashMap<u64, Offered>,
    /// Payloads that are being landed, by the peer's number.
    incoming: HashMap<u32, Incoming>,
    /// Those among them with reads left to post, in turns.
    reading: Turns,
    /// Memory has been registered to be landed into: once a turn is enough.
    has_registered: bool,
    /// One of those waits for its turn to do that.
    registers_next: bool,
    outgoing: Outgoings,
    /// Puts and gets that the adapter carries out, and what the peer's may reach.
    reaches: Reaches,
    reachable: Reachable,
    next_payload: u64,
    /// Something could not be sent for want of a buffer.
    starved: bool,
    /// Somebody waits until everything up to this message has arrived.
    flush_goal: Cell<Option<u64>>,
    dead: Option<LinkError>,
    killed: bool,
    /// What is said behind the reads.
    markers: Markers,
    /// The queue pairs of a link that was killed will not go, and are left alone for a while.
    lingers: Option<Linger>,
    counters: LinkCounters,
}

impl VerbsLink {
    pub(super) fn new(opened: Opened, bootstrap: Source) -> VerbsLink {
        let Opened { messenger, channel, rails, registrations, alarm, engine, .. } = opened;
        let Opened { received, options, timers, why, .. } = opened;
        let rails = Rails::new(messenger.rate(), &registrations, rails);
        let ways = ways(messenger.port(), &why, &rails);
        let watchdog = Watchdog::new(&timers);
        VerbsLink {
            messenger,
            rails,
            timers,
            channel,
            registrations,
            alarm,
            engine,
            lookout: Lookout::new(),
            watchdog,
            caps: Caps { eager_max: options.eager_max.min(EAGER_BYTES_MAX), ways },
            max_payload: options.max_payload,
            bootstrap,
            broken: None,
            received,
            ended: VecDeque::new(),
            waiting: VecDeque::new(),
            open: HashMap::new(),
            incoming: HashMap::new(),
            reading: Turns::default(),
            has_registered: false,
            registers_next: false,
            outgoing: Outgoings::default(),
            reaches: Reaches::default(),
            reachable: Reachable::default(),
            next_payload: 0,
            starved: false,
            flush_goal: Cell::new(None),
            dead: None,
            killed: false,
            markers: Markers::default(),
            lingers: None,
            counters: LinkCounters::default(),
        }
    }

    #[cfg(test)]
    pub(super) fn owed(&self) -> u16 {
        self.messenger.owed()
    }

    #[cfg(test)]
    pub(super) fn watchdog(&mut self) -> &mut Watchdog {
        &mut self.watchdog
    }

    fn alive(&self) -> Result<(), LinkError> {
        self.dead.clone().map_or(Ok(()), Err)
    }

    fn settle<T>(&mut self, result: Result<T, LinkError>) -> Result<T, LinkError> {
        if let Err(error) = &result {
            self.dead.get_or_insert_with(|| error.clone());
        }
        result
    }

    /// Whether something that the system tells of ends this link: an alarm, or that the peer's process
    /// does not hold its end of the bootstrap connection any more.
    fn look_for_ends(&mut self, look: Look<'_, '_>) {
        self.hear_alarm();
        if self.broken.is_none() {
            self.broken = end_of_peer(LinkKind::Verbs, &self.bootstrap, look, io_error);
        }
    }

    /// The same at the descriptors themselves, after hearing what devices and the kernel say: links are
    /// told by their alarms.
    fn look_now(&mut self, sink: &mut dyn Sink) {
        if let Some(engine) = self.engine.upgrade() {
            engine.hear_now().into_iter().for_each(|waker| sink.wake(waker));
        }
        self.look_for_ends(Look::Now);
    }

    /// Whether the device has stopped to end what was posted.
    fn look_for_silence(&mut self) -> Result<(), LinkError> {
        if !self.watchdog.is_due() {
            return Ok(());
        }
        if self.watchdog.knows_of_requests() {
            // What ends is not looked at where nobody waits for it.
            let taken = self.take(Side::Send);
            self.settle(taken)?;
        }
        let silence = self.watchdog.silence_max();
        let found = self.messenger.queues().look();
        self.watchdog.looked(found.max(self.rails.look(silence)));
        if found == Finding::Silence && self.broken.is_none() {
            let port = self.messenger.port();
            let why = format!("a queue pair at {port} has ended nothing for {silence:?}");
            self.broken = Some(error(ErrorKind::ConnectionLost, why));
        }
        Ok(())
    }

    fn hear_alarm(&mut self) {
        if self.broken.is_none()
            && let Some(why) = self.alarm.raised()
        {
            self.broken = Some(error(ErrorKind::ConnectionLost, why));
        }
    }

    /// Why a request at the first rail failed.
    fn failed(&self, doing: &str, completion: &Completion) -> LinkError {
        failed(doing, self.messenger.port(), completion)
    }

    /// A request has failed: the link ends once everything that came before has been handed up. One
    /// that was flushed says only that another failed, which may be known by now.
    fn breaks(&mut self, how: &str, completion: &Completion) {
        if self.broken.is_some() {
            return;
        }
        let cause = |known: &&Completion| {
            !matches!(known.status, ffi::IBV_WC_SUCCESS | ffi::IBV_WC_WR_FLUSH_ERR)
        };
        let flushed = completion.status == ffi::IBV_WC_WR_FLUSH_ERR;
        let cause = self.ended.iter().find(cause).filter(|_| flushed);
        self.broken = Some(match cause {
            Some(cause) => self.failed(doing(&self.messenger.what(cause)), cause),
            None => self.failed(how, completion),
        });
    }

    /// Why a request could not be posted. A queue pair that is broken takes none; what broke it is
    /// known, or lies in the queues.
    fn not_posted(&mut self, doing: &str, error: &io::Error) -> LinkError {
        // An error of this would say less than the one there is.
        let _ = self.take(Side::Send);
        self.look_for_failures();
        self.broken.clone().unwrap_or_else(|| io_error(doing, error))
    }

    /// Whether a request of this side's is known to have failed.
    fn look_for_failures(&mut self) {
        let bad = |completion: &&Completion| completion.status != ffi::IBV_WC_SUCCESS;
        if let Some(bad) = self.ended.iter().find(bad).copied() {
            self.breaks(doing(&self.messenger.what(&bad)), &bad);
        }
    }

    fn take(&mut self, side: Side) -> Result<(), LinkError> {
        let taken = match side {
            Side::Receive => {
                let taken = self.messenger.take(side, &mut self.received);
                if let Err(error) = taken {
                    // What came before is handed up first.
                    let why = match error.kind() {
                        io::ErrorKind::InvalidData => protocol("markers with nothing behind them"),
                        _ => io_error("taking what has come", &error),
                    };
                    self.broken.get_or_insert(why);
                }
                Ok(())
            }
            Side::Send => self.messenger.take_posted(&mut self.ended, &mut self.reaches.ended),
        };
        if side == Side::Send {
            self.rails.take();
        }
        taken.map_err(|error| io_error("taking completions", &error))
    }

    /// Deals with sends and reads that have ended. `true`: there were some.
    fn settle_ended(&mut self, sink: &mut dyn Sink) -> Result<bool, LinkError> {
        self.take(Side::Send)?;
        let mut any = self.has_posted_ended();
        while let Some(completion) = self.ended.pop_front() {
            let ended = self.messenger.ended(&completion);
            let read = match ended {
                Ended::Read(_) => self.rails.first_ended(),
                Ended::Send | Ended::Reach(_) | Ended::Marker => None,
            };
            if completion.status != ffi::IBV_WC_SUCCESS {
                // What the peer sent before is handed up first.
                self.breaks(doing(&ended), &completion);
                continue;
            }
            if let Some((id, read)) = read {
                self.read_ended(id, &read, sink)?;
            }
            if ended == Ended::Marker {
                self.marker_arrived()?;
            }
        }
        any |= self.settle_rails(sink)?;
        self.settle_reaches(sink)?;
        self.starved &= !any;
        Ok(any)
    }

    /// Deals with requests of puts and gets that have ended.
    fn settle_reaches(&mut self, sink: &mut dyn Sink) -> Result<(), LinkError> {
        while let Some(completion) = self.reaches.ended.pop_front() {
            let over = match self.reaches.settle(&completion, &self.messenger) {
                Outcome::More if self.reaches.has_failed() => self.reaches.failed_ones(),
                Outcome::More => continue,
                Outcome::Over(op) => {
                    sink.done(op, Ok(()));
                    continue;
                }
                Outcome::Refused => {
                    let why = self.failed("putting or getting", &completion);
                    tracing::warn!(reason = %why.detail, "the target serves from now on");
                    self.reaches.fail(why)
                }
                Outcome::Lost => {
                    self.breaks("putting or getting", &completion);
                    continue;
                }
                Outcome::Unknown => return Err(internal("a request has ended out of turn")),
            };
            for (op, why) in over {
                sink.done(op, Err(why));
            }
        }
        Ok(())
    }

    /// Posts requests of puts and gets.
    fn post_reaches(&mut self) -> Result<(), LinkError> {
        if self.broken.is_some() {
            return Ok(());
        }
        let Self { messenger, registrations, counters, reaches, .. } = self;
        let mut means = Means { messenger, registrations, counters };
        if let Err(error) = reaches.post(&mut means) {
            // What broke the queue pair may be known, or lie in the queues: then that tells.
            self.take(Side::Send)?;
            let bad = |completion: &Completion| completion.status != ffi::IBV_WC_SUCCESS;
            if !self.reaches.ended.iter().any(bad) {
                return Err(self.not_posted("posting a put or get", &error));
            }
        }
        Ok(())
    }

    /// Begins a put or get.
    ///
    /// # Safety
    ///
    /// As for [`Reaches::begin`].
    unsafe fn reach(
        &mut self,
        op: OpId,
        puts: bool,
        memory: SegmentMut,
        region: RemoteId,
        offset: u64,
    ) -> Result<Post, LinkError> {
        self.alive()?;
        let SegmentMut { ptr, len, kind } = memory;
        if !kind.cpu_accessible() {
            let detail = format!("{kind} memory cannot be put or got as it is");
            return Err(error(ErrorKind::Unsupported, detail));
        }
        if !self.reaches.has_room() {
            self.counters.stalls += 1;
            return Ok(Post::Full);
        }
        // SAFETY: the caller's.
        let begun = unsafe { self.reaches.begin(op, puts, (ptr, len), region, offset) };
        self.settle(begun.map_err(protocol))?;
        // Accepted: a part may be under way, so that from here on only the end of the link ends it.
        if let Err(error) = self.post_reaches() {
            self.broken.get_or_insert(error);
        }
        Ok(Post::Pending)
    }

    /// Hands up what has come. `Some`: something had, and whether the budget ended first.
    fn receive(
        &mut self,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<Option<bool>, LinkError> {
        let mut any = None;
        loop {
            if self.received.is_empty() {
                self.take(Side::Receive)?;
            }
            let Some(completion) = self.received.pop_front() else { return Ok(any) };
            any = Some(false);
            if budget.parcels == 0 || budget.bytes == 0 {
                self.received.push_front(completion);
                return Ok(Some(true));
            }
            budget.parcels -= 1;
            if completion.status != ffi::IBV_WC_SUCCESS {
                self.take(Side::Send)?;
                self.breaks("receiving", &completion);
                continue;
            }
            self.message(&completion, budget, sink)?;
            self.return_credit()?;
        }
    }

    fn return_credit(&mut self) -> Result<(), LinkError> {
        if self.broken.is_some() {
            return Ok(());
        }
        match self.messenger.return_credit() {
            Ok(returned) => self.starved |= !returned,
            Err(error) => return Err(self.not_posted("returning credit", &error)),
        }
        Ok(())
    }

    fn message(
        &mut self,
        completion: &Completion,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        let Some((header, ptr, bytes)) = self.messenger.message(completion) else {
            return Err(protocol("a message with a bad header, or credit that was never spent"));
        };
        // SAFETY: `bytes` of a buffer that is this side's until it is posted again, below, and that
        // nobody writes meanwhile.
        let body = unsafe { std::slice::from_raw_parts(ptr, bytes) };
        let body = body.get(HEADER_BYTES..).unwrap_or_default();
        let Some((head, rest)) = body.split_at_checked(header.head_len.into()) else {
            return Err(protocol("a message shorter than its head"));
        };
        let bare = body.is_empty() && header.pieces == 0 && header.rails == 0;
        let spent = header.kind != Kind::Credit;
        if spent && !self.messenger.peer_had_credit() {
            return Err(protocol("a message without credit"));
        }
        match header.kind {
            Kind::Eager if header.pieces == 0 && header.rails == 0 => {
                self.eager(head, rest, budget, sink)?
            }
            Kind::Offer | Kind::Bulk => self.offer(&header, head, rest, sink)?,
            Kind::Chunk if head.is_empty() && header.pieces == 0 && header.rails == 0 => {
                self.chunk(&header, rest, budget, sink)?;
            }
            Kind::Pull if bare => {
                if !self.outgoing.pulled(header.id, header.len) {
                    return Err(protocol("a payload is pulled that is not there"));
                }
            }
            Kind::Release if bare => {
                let Some(Outgoing { op, .. }) = self.outgoing.released(header.id) else {
                    return Err(protocol("a payload is let go of that is not there"));
                };
                if op != OpId::NONE {
                    sink.done(op, Ok(()));
                }
            }
            Kind::Credit if bare => {}
            Kind::Eager
            | Kind::Chunk
            | Kind::Pull
            | Kind::Release
            | Kind::Credit
            | Kind::Ping
            | Kind::Rails => {
                return Err(protocol("a message of a form that may not be"));
            }
        }
        if let Err(error) = self.messenger.repost(completion, spent) {
            // What has come is dealt with; the end is told in its turn.
            let why = self.not_posted("posting a buffer", &error);
            self.broken.get_or_insert(why);
        }
        Ok(())
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
        head: &[u8],
        bytes: &[u8],
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        let payload = self.arrived();
        let len = bytes.len();
        self.counters.inline_bytes_received += len as u64;
        let (inline, how) = (Some(bytes), How::Eager);
        let arrival = Arrival { head, len: len as u64, payload, inline, views: None, how };
        // SAFETY: that is where they lie.
        unsafe { arrivals::eager(LinkKind::Verbs, arrival, bytes.as_ptr(), len, budget, sink) }
    }

    /// A parcel whose payload waits at the peer.
    fn offer(
        &mut self,
        header: &Header,
        head: &[u8],
        pieces: &[u8],
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        let len = offered_len(LinkKind::Verbs, header.len, self.max_payload)?;
        let rails = header.rails;
        let Some(pieces) = Piece::decode_all(pieces, header.pieces, rails, header.len) else {
            return Err(protocol("an offer of memory that does not come to its length"));
        };
        if !self.rails.has_all(rails) || rails != 0 && pieces.is_empty() {
            return Err(protocol("an offer for ports that were not agreed upon"));
        }
        // Before the driver is asked: what it wants landed is kept from then on.
        if self.incoming.contains_key(&header.id) {
            return Err(protocol("a payload's number is in use"));
        }
        if self.open.len() + self.incoming.len() + self.markers.len() >= OPEN_MAX {
            return Err(protocol("too many open payloads"));
        }
        let payload = self.arrived();
        let how = if header.kind == Kind::Offer { How::Offer } else { How::Eager };
        let arrival = Arrival { head, len: header.len, payload, inline: None, views: None, how };
        let offered = Offered { id: header.id, len, pieces, rails };
        match arrivals::offer(LinkKind::Verbs, arrival, sink)? {
            arrivals::Offered::Land { to, op } => self.fetch(offered, to, op),
            arrivals::Offered::Hold => {
                self.open.insert(payload.0, offered);
                Ok(())
            }
            arrivals::Offered::Refuse => self.answer(Header::about(Kind::Release, header.id, 0)),
        }
    }

    /// Registers the pieces of a payload that is offered, if that is worth it and can be: with the
    /// first device, and with those of further rails as far as that can be. Those rails are named.
    fn register(&mut self, memory: &[(*const u8, usize)], len: usize) -> Option<Named> {
        if !worth_registering(memory, len) {
            return None;
        }
        let mut named = Named::default();
        for (ptr, len) in memory {
            let found = self.registered((*ptr, *len), Use::Offer, true);
            let held = found.count(&mut self.counters)?.0;
            let mut keys = [0; RAILS_MAX];
            keys[0] = held.remote_key();
            named.pieces.push(Piece { address: *ptr as u64, len: *len as u64, keys });
            named.held.push(held);
        }
        let are_kept = named.held.iter().all(Held::is_kept);
        if len >= STRIPE_BYTES_MIN && self.rails.gain(are_kept) {
            let Named { pieces, held, .. } = &mut named;
            named.rails = self.rails.offer(pieces, held, &mut self.counters);
        }
        Some(named)
    }

    /// Says something about a payload of the peer's.
    fn answer(&mut self, header: Header) -> Result<(), LinkError> {
        self.send_or_queue(header, Vec::new)
    }

    /// Sends a control message, or puts it in the queue for when there is room.
    fn send_or_queue(
        &mut self,
        header: Header,
        body: impl FnOnce() -> Vec<u8>,
    ) -> Result<(), LinkError> {
        if self.waiting.len() >= WAITING_MAX {
            let detail = "the peer causes answers and does not read them";
            return Err(error(ErrorKind::LimitExceeded, detail));
        }
        self.waiting.push_back(Waiting { header, body: body() });
        self.send_waiting()
    }

    fn send_waiting(&mut self) -> Result<(), LinkError> {
        while !self.waiting.is_empty() && self.can_send() {
            let Some(Waiting { header, body }) = self.waiting.pop_front() else { break };
            self.send(header, body.len(), |to| {
                // SAFETY: room for as many bytes was asked for.
                unsafe { std::ptr::copy_nonoverlapping(body.as_ptr(), to, body.len()) }
            })?;
        }
        self.starved |= !self.waiting.is_empty();
        Ok(())
    }

    fn send(
        &mut self,
        header: Header,
        body: usize,
        fill: impl FnOnce(*mut u8),
    ) -> Result<(), LinkError> {
        let sent = self.messenger.send(header, HEADER_BYTES + body, fill);
        sent.map_err(|error| self.not_posted("posting a send", &error))
    }

    /// Whether a message that is there can go now. Over a link that is broken none can: it ends once
    /// what has come is handed up.
    fn can_send(&mut self) -> bool {
        self.broken.is_none() && self.messenger.can_send()
    }

    /// Whether a message that may not wait in a queue can go.
    fn has_room(&mut self) -> bool {
        let room = self.waiting.is_empty() && self.can_send();
        self.starved |= !room;
        room
    }

    /// Sends what was pulled, as far as there is credit. `Some`: something was sent, and whether
    /// the budget ended first.
    fn send_chunks(
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
            let Self { messenger, outgoing, .. } = self;
            let sent = outgoing.take_turn(|id, outgoing| {
                let len = outgoing.next_len(BODY_MAX);
                let offset = outgoing.offset() as u64;
                let mut header = Header::about(Kind::Chunk, id, offset);
                header.class = outgoing.class;
                let sent = messenger.send(header, HEADER_BYTES + len, |to| {
                    // SAFETY: room for as many bytes was asked for.
                    unsafe { outgoing.next_chunk(BODY_MAX, to) };
                });
                sent.map(|()| (len, outgoing.is_sent()))
            });
            let Some((id, sent)) = sent else { break };
            let sent = sent.map_err(|error| self.not_posted("posting a send", &error));
            let (len, over) = sent?;
            budget.bytes = budget.bytes.saturating_sub(len);
            // What is sent was copied.
            let over = if over { self.outgoing.remove(id) } else { None };
            if let Some(Outgoing { op, .. }) = over.filter(|over| over.op != OpId::NONE) {
                sink.done(op, Ok(()));
            }
        }
        self.starved |= self.outgoing.has_work();
        Ok(any)
    }

    fn may_send_chunks(&mut self) -> bool {
        self.outgoing.has_work()
            && self.broken.is_none()
            && self.waiting.is_empty()
            && self.messenger.has_credit(CHUNKS_LEAVE)
            && self.messenger.has_room()
    }

    /// A payload that the peer is to fetch.
    fn post_outgoing(
        &mut self,
        op: OpId,
        class: Class,
        how: How,
        head: &[u8],
        payload: &[Segment<'_>],
        len: usize,
    ) -> Result<Post, LinkError> {
        let offer = how == How::Offer;
        let kind = if offer { Kind::Offer } else { Kind::Bulk };
        // SAFETY: the driver keeps the payload until `Sink::done`; a short one is copied.
        let mut outgoing = unsafe { Outgoing::new(op, class, offer, payload, len, COPIED_MAX) };
        let mut body = head.to_vec();
        let (mut pieces, mut rails) = (0, 0);
        if let Some(named) = self.register(outgoing.segments(), len) {
            named.pieces.iter().for_each(|piece| piece.append(named.rails, &mut body));
            (pieces, rails) = (named.pieces.len() as u8, named.rails);
            outgoing.besides = named.held;
        }
        let id = self.outgoing.next_id();
        let head_len = head.len() as u16;
        let about = Header::about(kind, id, len as u64);
        let header = Header { class, head_len, pieces, rails, ..about };
        self.outgoing.insert(outgoing);
        self.send_or_queue(header, || body)?;
        Ok(Post::Pending)
    }

    fn post_parcel(
        &mut self,
        op: OpId,
        class: Class,
        how: How,
        head: &[u8],
        payload: &[Segment<'_>],
        len: usize,
    ) -> Result<Post, LinkError> {
        let waits = len > 0 && (how == How::Offer || head.len() + len > BODY_MAX);
        let may = self.has_room() && (!waits || self.outgoing.count(class) < OUTGOING_MAX);
        if class != Class::Control && !may {
            self.counters.stalls += 1;
            return Ok(Post::Full);
        }
        self.counters.parcels_sent += 1;
        if waits {
            return self.post_outgoing(op, class, how, head, payload, len);
        }
        self.counters.inline_bytes_sent += len as u64;
        let head_len = head.len() as u16;
        let header = Header { class, head_len, ..Header::about(Kind::Eager, 0, 0) };
        let fill = |mut to: *mut u8| {
            // SAFETY: room for head and payload was asked for; the memory of a post is valid for
            // reads while it is made.
            unsafe {
                std::ptr::copy_nonoverlapping(head.as_ptr(), to, head.len());
                to = to.add(head.len());
                for piece in payload {
                    std::ptr::copy_nonoverlapping(piece.ptr, to, piece.len);
                    to = to.add(piece.len);
                }
            }
        };
        if self.waiting.is_empty() && self.can_send() {
            self.send(header, head.len() + len, fill)?;
        } else {
            self.send_or_queue(header, || {
                let mut body = vec![0; head.len() + len];
                fill(body.as_mut_ptr());
                body
            })?;
        }
        Ok(Post::Done)
    }

    /// Whether the end of what is under way on this side matters to somebody.
    fn waits_for_sends(&self) -> bool {
        self.starved
            || self.messenger.has_reads_under_way()
            || self.rails.any_under_way()
            || self.markers.is_under_way()
            || self.reaches.any_under_way()
            || self.flush_goal.get().is_some()
    }

    fn turn(
        &mut self,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<(bool, bool), LinkError> {
        let mut moved = false;
        self.has_registered = false;
        self.reaches.begin_turn();
        let news = self.has_posted_ended() || self.rails.has_failed();
        if news || self.waits_for_sends() || !self.messenger.has_spare_room() {
            moved |= self.settle_ended(sink)?;
        }
        let received = self.receive(budget, sink)?;
        self.send_waiting()?;
        self.post_reads()?;
        self.post_marker()?;
        self.post_reaches()?;
        let sent = self.send_chunks(budget, sink)?;
        self.return_credit()?;
        moved |= received.is_some() || sent.is_some();
        // A link that is broken registers nothing more, and its end must not wait for that.
        let registers =
            self.broken.is_none() && (self.registers_next || self.reaches.registers_next());
        let more = received == Some(true) || sent == Some(true) || registers;
        Ok((moved, more))
    }

    /// Destroys the queue pairs. In a forked child they are the parent's, and none of this process's
    /// memory is touched.
    fn end_queues(&mut self) -> io::Result<()> {
        if self.messenger.forked() {
            return Ok(());
        }
        let until = Instant::now() + KILL_PATIENCE;
        loop {
            // Each is tried, whatever became of the other.
            let (first, further) = (self.messenger.end(), self.rails.end());
            match first.and(further) {
                Err(_) if Instant::now() < until => std::thread::sleep(KILL_STEP),
                ended => return ended,
            }
        }
    }

    /// The queue pairs are left alone for a while.
    fn linger(&mut self, why: &io::Error) {
        if let Some(lingers) = &mut self.lingers {
            return lingers.in_vain();
        }
        tracing::warn!(error = %why, "a queue pair cannot be destroyed yet");
        self.lingers = Some(Linger::new(&self.timers, PAUSE_MIN, PAUSE_MAX));
    }

    /// Arms a link that was killed: until it is time to try to destroy its queue pairs again.
    fn arm_to_end(&mut self, cx: &mut Context<'_>) -> Armed {
        self.lingers.as_mut().map_or(Armed::Yes, |lingers| lingers.arm(cx))
    }

    /// Whether completions have been taken that are not dealt with.
    fn has_taken(&self) -> bool {
        !self.received.is_empty() || self.has_posted_ended()
    }

    /// The same of what this side posted.
    fn has_posted_ended(&self) -> bool {
        !self.ended.is_empty() || !self.reaches.ended.is_empty() || self.rails.has_ended()
    }

    /// Registers with everything that may have news, unless there is some already.
    fn watch(&mut self, cx: &mut Context<'_>) -> Result<Armed, LinkError> {
        let failed = |error: io::Error| io_error("waiting for completions", &error);
        let sends = self.waits_for_sends();
        let queues = self.messenger.queues();
        queues.forget_events().map_err(failed)?;
        queues.arm(Side::Receive).map_err(failed)?;
        if sends {
            queues.arm(Side::Send).map_err(failed)?;
        }
        self.take(Side::Receive)?;
        if sends {
            self.take(Side::Send)?;
        }
        if self.rails.watch(cx) || self.has_taken() || self.broken.is_some() {
            return Ok(Armed::Busy);
        }
        let Self { messenger, channel, .. } = self;
        let queues = messenger.queues();
        match channel.poll_read(cx, |_| queues.take_event().map(Attempt::More)) {
            Poll::Pending => Ok(Armed::Yes),
            Poll::Ready(Ok(())) => Ok(Armed::Busy),
            Poll::Ready(Err(error)) => Err(failed(error)),
        }
    }
}

/// Whether these pieces of memory are better registered than copied.
fn worth_registering(memory: &[(*const u8, usize)], len: usize) -> bool {
    len >= READ_BYTES_MIN
        && memory.len() <= PIECES_MAX
        && memory.iter().all(|(_, len)| *len >= PIECE_BYTES_MIN)
}

impl Link for VerbsLink {
    fn kind(&self) -> LinkKind {
        LinkKind::Verbs
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
        // Before the queues are looked at: what the peer sent before it ended is there by then.
        if self.lookout.is_due() {
            self.look_now(sink);
            self.look_for_silence()?;
        }
        if !spinning {
            self.look_for_ends(Look::Told(cx));
        }
        let turn = self.turn(budget, sink);
        let progress = match self.settle(turn)? {
            (_, true) => Progress::More,
            (true, false) => Progress::Some,
            (false, false) => Progress::Idle,
        };
        self.lookout.polled(progress);
        match self.broken.clone() {
            Some(error) if progress == Progress::Idle => self.settle(Err(error)),
            _ => Ok(progress),
        }
    }

    fn arm(&mut self, cx: &mut Context<'_>) -> Result<Armed, LinkError> {
        if self.killed {
            return Ok(self.arm_to_end(cx));
        }
        self.alive()?;
        self.look_for_ends(Look::Told(cx));
        self.look_for_silence()?;
        let waits = self.watchdog.watch(cx) || self.has_taken() || self.alarm.watch(cx.waker());
        let registers = self.registers_next || self.reaches.registers_next();
        if self.broken.is_some() || waits || registers || self.may_send_chunks() {
            return Ok(Armed::Busy);
        }
        let armed = self.watch(cx);
        self.settle(armed)
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
        let len = sent_len(LinkKind::Verbs, payload)?;
        let posted = self.post_parcel(op, class, how, head, payload, len);
        self.settle(posted)
    }

    fn land(&mut self, payload: PayloadId, to: Landing, op: OpId) -> Result<Post, LinkError> {
        self.alive()?;
        let Some(offered) = self.open.remove(&payload.0) else {
            return Err(internal("landing of a payload that is not held"));
        };
        let fetched = self.fetch(offered, to, op);
        self.settle(fetched)?;
        Ok(Post::Pending)
    }

    fn release(&mut self, payload: PayloadId) {
        if self.dead.is_none()
            && let Some(offered) = self.open.remove(&payload.0)
        {
            let refused = self.answer(Header::about(Kind::Release, offered.id, 0));
            // An error is told by the next poll.
            let _ = self.settle(refused);
        }
    }

    fn kill(&mut self, error: &LinkError, sink: &mut dyn Sink) -> Killed {
        self.dead.get_or_insert_with(|| error.clone());
        self.killed = true;
        if let Err(why) = self.end_queues() {
            self.linger(&why);
            return Killed::Lingers;
        }
        self.lingers = None;
        self.open.clear();
        self.waiting.clear();
        self.markers.clear();
        let landings: Vec<_> = self.incoming.drain().map(|(_, incoming)| incoming.op).collect();
        let reaches = self.reaches.clear();
        for op in landings.into_iter().chain(self.outgoing.clear(|_| true)).chain(reaches) {
            if op != OpId::NONE {
                sink.done(op, Err(error.clone()));
            }
        }
        Killed::Over
    }

    /// A payload that waits for the peer to fetch it counts as not flushed. What was posted after
    /// this was first asked does not count: a peer that goes on asking cannot hold it off.
    fn flushed(&self) -> bool {
        if self.killed {
            return true;
        }
        if self.broken.is_some() {
            return false;
        }
        let (posted, arrived) = self.messenger.counts();
        let everything = posted + self.waiting.len() as u64;
        let goal = self.flush_goal.get().unwrap_or(everything);
        // What is said behind a marker is said before whatever is posted after this, then.
        let said = self.markers.is_empty();
        let flushed = arrived >= goal && said && !self.outgoing.any_owed();
        self.flush_goal.set(Some(goal).filter(|_| !flushed));
        flushed
    }

    /// A send that ends well matters to nobody, so nobody is woken by its end; one that does not
    /// arrive is found here.
    fn check(&mut self) -> Result<Check, LinkError> {
        if self.killed || self.dead.is_some() {
            return Ok(Check::Quiet);
        }
        self.take(Side::Send)?;
        self.look_for_failures();
        let rails_have_news = self.rails.has_ended() || self.rails.has_failed();
        if self.broken.is_some() || !self.reaches.ended.is_empty() || rails_have_news {
            return Ok(Check::Drive);
        }
        let (posted, mut arrived) = self.messenger.counts();
        arrived +=
            self.ended.iter().filter(|ended| self.messenger.has_arrived(ended)).count() as u64;
        Ok(if posted > arrived { Check::Owed } else { Check::Quiet })
    }

    fn counters(&self) -> LinkCounters {
        self.counters
    }
    fn one_sided(&mut self) -> Option<&mut dyn OneSided> {
        Some(self)
    }
}

/// Once the link is killed its queue pairs are gone, and with them the peer's ways to what was
/// registered for it: [`Link::poll_unreachable`] need not wait.
impl OneSided for VerbsLink {
    fn way(&self) -> &'static str {
        "RDMA write and read"
    }

    fn domain(&self) -> usize {
        // What one peer was granted no other one can reach.
        Arc::as_ptr(self.messenger.reached()).addr()
    }

    fn register(
        &mut self,
        memory: SegmentMut,
        read: bool,
        write: bool,
    ) -> Result<Arc<dyn Registration>, LinkError> {
        self.alive()?;
        // Managed memory moves between processors, and a registration does not follow it.
        if !memory.kind.cpu_accessible() || memory.kind == MemoryKind::Managed {
            let detail = format!("{} memory cannot be registered as it is", memory.kind);
            return Err(error(ErrorKind::Unsupported, detail));
        }
        let Self { reachable, messenger, registrations, .. } = self;
        let access = Access::Reachable { read, write };
        let registered = reachable.register(messenger.reached(), registrations, memory, access);
        let registered = registered.map_err(|error| io_error("registering a region", &error))?;
        registered.ok_or_else(|| {
            let detail = "peers may reach as much memory as they can already";
            error(ErrorKind::LimitExceeded, detail)
        })
    }

    fn open(&mut self, grant: &[u8]) -> Result<RemoteId, LinkError> {
        let held = self.messenger.hold_reach_buffers();
        held.map_err(|error| io_error("buffers for puts and gets", &error))?;
        self.reaches.open(grant).ok_or_else(|| protocol("a grant that is none"))
    }

    fn close(&mut self, remote: RemoteId) {
        self.reaches.close(remote);
    }

    fn put(
        &mut self,
        op: OpId,
        from: Segment<'_>,
        to: RemoteId,
        offset: u64,
    ) -> Result<Post, LinkError> {
        // A put only reads it.
        let memory = SegmentMut { ptr: from.ptr.cast_mut(), len: from.len, kind: from.kind };
        // SAFETY: the driver keeps the memory until `Sink::done`, by the contract of the trait;
        // `kill` destroys the queue pairs before it reports.
        unsafe { self.reach(op, true, memory, to, offset) }
    }

    fn get(
        &mut self,
        op: OpId,
        to: SegmentMut,
        from: RemoteId,
        offset: u64,
    ) -> Result<Post, LinkError> {
        // SAFETY: as in `put`, and the memory is this operation's alone.
        unsafe { self.reach(op, false, to, from, offset) }
    }
}
