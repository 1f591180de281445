//! The link itself: its parts, its life and death, and what both directions share. What the peer
//! sends is `incoming`'s business, what is sent to it is `outgoing`'s.
//!
//! A payload stays where it is until the receiver decides. Then, by kind of record: it was in the
//! ring already; it lies in a mapped segment; it is read from the sender's memory; or the receiver
//! asks for it and the sender stages it through its arena. The receiver says when it is finished,
//! and that ends the sender's operation.
//!
//! Long payloads are copied by both sides at once (see `together`).
//!
//! After `kill` the peer may still be reading memory of ours that it was told of. That harms
//! nothing here: the kernel checks its addresses. Nor is it deceived: before anything is freed, this
//! side's page says so, and the peer looks there after each copy. (A process that dies frees nothing
//! that others have mapped.) What the peer may still be writing is kept.

mod incoming;
mod outgoing;
mod together;

use std::collections::VecDeque;
use std::io;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smallvec::SmallVec;

use self::incoming::Incoming;
use self::outgoing::Outgoing;
#[cfg(test)]
pub(super) use self::outgoing::{BULK_MIN_BYTES, BULK_OPEN_MAX};
pub(super) use self::together::TOGETHER_MIN_BYTES;
use self::together::{Asked, Helping, Lingering};
use super::cells::RECORD_MAX;
use super::ring::{Bell, Corrupt, Page, Ring};
use super::socket;
use super::table::Table;
use super::wire::{
    ARENA, Fixed, INLINE_MAX, Kind, LOAN_INLINE_MAX, LoanAt, OFFER_INLINE_MAX, flags,
};
use crate::error::{ErrorKind, LinkError};
use crate::link::{
    Armed, Budget, COPIED_MAX, Caps, Check, Class, HEAD_MAX, How, Killed, Landing, Link,
    LinkCounters, LinkKind, Mapping, OpId, PayloadId, Post, Progress, Segment, Sink,
};
use crate::memory::{
    OwnMapping, PeerMapping, PeerSegment, PeerSegmentError, PeerSegments, PeerSlice, SEGMENTS_MAX,
    SharedBlock, SharedPool,
};
use crate::runtime::{Attempt, Source, Timers};

/// Open payloads that one class may have on its way; further posts of it are answered `Full`.
const OUTGOING_MAX: usize = 1024;
/// Open payloads that the peer may have on their way to us; control has as many again.
const INCOMING_MAX: usize = OUTGOING_MAX * (Class::COUNT + 1);
/// Control records that wait for room in the ring. Each answers an open payload, or is a control
/// parcel of the driver's; a peer that lets so many pile up does not read at all.
const BACKLOG_MAX: usize = 1 << 16;
/// Staging: small enough to overlap the two copies, large enough to hide the hand-over.
const CHUNK_BYTES: usize = 256 << 10;
const CHUNKS_MAX: usize = 4;
/// What a node stages at most, over all its links.
pub(super) const ARENA_BYTES: usize = 8 << 20;
/// Empty polls between two looks at whether the peer lives, when the caller spins.
const LIFE_EVERY: u32 = 4096;
/// Packets taken in one call of `arm` before it gives way.
const PACKETS_MAX: usize = 8;
/// Packets that may lie before the one that passes a segment: the other segments, and two bells,
/// for the last sleep and (rung late) for the one before.
const PACKETS_BEFORE_MAX: usize = 2 * SEGMENTS_MAX + 2;
/// The packet that wakes.
pub(super) const BELL: &[u8] = b"W";

// What `post` promises to copy is copied into the ring, whatever it is made of; but see
// `Outgoing::copied`.
const _: () = assert!(COPIED_MAX <= LOAN_INLINE_MAX && COPIED_MAX <= INLINE_MAX);

/// The page this side writes.
pub(super) struct OwnPage(OwnMapping);

impl OwnPage {
    /// The mapping must be large enough, which whoever makes it sees to.
    pub fn new(mapping: OwnMapping) -> Self {
        assert!(mapping.len() >= size_of::<Page>());
        OwnPage(mapping)
    }

    /// Whether this is a forked child, which has no page and must leave the link alone.
    fn forked(&self) -> bool {
        self.0.forked()
    }
}

impl Deref for OwnPage {
    type Target = Page;

    fn deref(&self) -> &Page {
        // SAFETY: page-aligned, zeroed at first, large enough (checked in `new`), and mapped for
        // as long as `self`; it consists of atomic integers only.
        unsafe { &*self.0.as_ptr().cast() }
    }
}

/// The page the peer writes. Shared with whoever reads the peer's memory.
#[derive(Clone)]
pub(super) struct PeerPage {
    page: *const Page,
    _keep: Arc<PeerMapping>,
}

// SAFETY: the page is a mapping that `_keep` holds, of atomic integers; no thread owns it.
unsafe impl Send for PeerPage {}
// SAFETY: as above; this side only loads.
unsafe impl Sync for PeerPage {}

impl PeerPage {
    pub fn new(mapping: PeerMapping) -> Option<Self> {
        let page = mapping.as_ptr().cast();
        (mapping.len() >= size_of::<Page>()).then(|| PeerPage { page, _keep: Arc::new(mapping) })
    }
}

impl Deref for PeerPage {
    type Target = Page;

    fn deref(&self) -> &Page {
        // SAFETY: page-aligned, large enough (checked in `new`), and mapped for as long as `self`.
        // It consists of atomic integers, for which every value is valid; this side only loads.
        unsafe { &*self.page }
    }
}

impl Mapping for PeerSegment<PeerPage> {
    fn trusted(&self) -> bool {
        self.peer.trusted()
    }
}

/// Rings the peer by a packet over the Unix socket. Each side made its own end of it, so that
/// nothing the peer does to the other end can make a call on this one block.
pub(super) struct SocketBell {
    socket: Source,
    rung: u64,
    /// Why the peer may not have heard.
    failed: Option<io::Error>,
}

impl SocketBell {
    pub fn new(socket: Source) -> Self {
        SocketBell { socket, rung: 0, failed: None }
    }

    pub fn socket(&self) -> &Source {
        &self.socket
    }

    pub fn failure(&self) -> Option<&io::Error> {
        self.failed.as_ref()
    }
}

impl Bell for SocketBell {
    fn ring(&mut self) {
        self.rung += 1;
        let Err(error) = socket::send(self.socket.fd(), BELL, &[]) else { return };
        match error.kind() {
            // A sleeper had read all there was when its waker was in place. So what fills the
            // buffer has come since and has woken it, and it will look at the ring.
            io::ErrorKind::WouldBlock => {}
            // It is gone, as this side will hear from the socket.
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {}
            _ => self.failed = Some(error),
        }
    }
}

/// The node's staging memory, and who waits for some of it. Apart from the pool of loans, so that
/// loans held by the application cannot stop it.
pub(super) struct Arena {
    pool: SharedPool,
    /// At most one a link.
    waiting: Mutex<Vec<Waker>>,
}

impl Arena {
    pub fn new(limit_bytes: usize) -> Self {
        Arena { pool: SharedPool::new(limit_bytes), waiting: Mutex::new(Vec::new()) }
    }

    fn wait(&self, waker: &Waker) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if !waiting.iter().any(|other| other.will_wake(waker)) {
            waiting.push(waker.clone());
        }
    }

    fn give_back(&self, block: SharedBlock) {
        drop(block);
        let waiting = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *waiting)
        };
        for waker in waiting {
            waker.wake();
        }
    }
}

/// What set-up hands over.
pub(super) struct Parts {
    pub own: OwnPage,
    pub peer: PeerPage,
    pub socket: Source,
    pub process: Source,
    pub pid: i32,
    pub timers: Arc<Timers>,
    pub arena: Arc<Arena>,
    pub segments_limit_bytes: u64,
    pub max_payload: u64,
    pub loans: bool,
    /// Whether this side may read the peer's memory.
    pub may_pull: bool,
    /// Whether the peer may read this side's.
    pub peer_may_pull: bool,
    /// Whether both sides allow that long payloads are copied by both.
    pub together: bool,
    pub ways: String,
}

struct Waiting {
    flags: u32,
    bytes: SmallVec<[u8; 56]>,
}

/// A lane over shared memory. See the module's docs.
pub(crate) struct ShmLink {
    /// With the Unix socket, which is its bell.
    ring: Ring<OwnPage, PeerPage, SocketBell>,
    /// Where records are copied to before anything in them is looked at.
    scratch: Option<Box<[u8; RECORD_MAX]>>,
    /// Where records are put together.
    building: Option<Box<[u8; RECORD_MAX]>>,
    process: Source,
    pid: i32,
    timers: Arc<Timers>,
    arena: Arc<Arena>,
    /// The peer's loans, and its arena.
    peer_loans: PeerSegments<PeerPage>,
    peer_arena: PeerSegments<PeerPage>,
    /// Segments passed to the peer: a bit each, of loans and of the arena.
    passed: [u64; 2],
    outgoing: Table<Outgoing>,
    outgoing_by_class: [usize; Class::COUNT],
    /// Large messages among them that the peer copies.
    bulk_open: usize,
    incoming: Table<Incoming>,
    held_inline: usize,
    /// Landings to be worked on, and payloads to be staged; in turns.
    landing: VecDeque<u64>,
    pushing: VecDeque<u64>,
    /// The one landing that the peer copies as well, and the number of the last such copy.
    asked: Option<Asked>,
    pub(super) last_number: u16,
    /// The one payload that this side copies as well.
    helping: Option<Helping>,
    /// Whether that has always worked.
    pub(super) may_help: bool,
    /// Payloads of so many bytes are copied by both.
    pub(super) together_min: u64,
    lingering: Option<Lingering>,
    /// Chunks that the peer has not taken, oldest first.
    chunks: VecDeque<(SharedBlock, u64)>,
    arena_empty: bool,
    backlog: VecDeque<Waiting>,
    /// Something besides an empty ring needs a poll.
    attention: bool,
    dead: Option<LinkError>,
    idle_polls: u32,
    max_payload: u64,
    loans: bool,
    may_pull: bool,
    peer_may_pull: bool,
    caps: Caps,
    counters: LinkCounters,
    #[cfg(test)]
    pub(super) deny_pull_after: Option<u64>,
}

fn protocol(detail: impl Into<String>) -> LinkError {
    LinkError::protocol(LinkKind::Shm, detail)
}

fn socket_failed(error: &io::Error) -> LinkError {
    LinkError::io(LinkKind::Shm, "reading the peer's socket", error)
}

impl From<Corrupt> for LinkError {
    fn from(corrupt: Corrupt) -> Self {
        protocol(corrupt.to_string())
    }
}

impl ShmLink {
    pub(super) fn new(parts: Parts) -> Self {
        let bell = SocketBell::new(parts.socket);
        let page = parts.peer.clone();
        ShmLink {
            ring: Ring::new(parts.own, parts.peer, bell),
            scratch: Some(Box::new([0; RECORD_MAX])),
            building: Some(Box::new([0; RECORD_MAX])),
            process: parts.process,
            pid: parts.pid,
            timers: parts.timers,
            arena: parts.arena,
            peer_loans: PeerSegments::new(parts.segments_limit_bytes, page.clone()),
            peer_arena: PeerSegments::new(4 * ARENA_BYTES as u64, page),
            passed: [0; 2],
            outgoing: Table::new(),
            outgoing_by_class: [0; Class::COUNT],
            incoming: Table::new(),
            held_inline: 0,
            landing: VecDeque::new(),
            bulk_open: 0,
            pushing: VecDeque::new(),
            asked: None,
            last_number: 0,
            helping: None,
            may_help: parts.together,
            together_min: if parts.together { TOGETHER_MIN_BYTES } else { u64::MAX },
            lingering: None,
            chunks: VecDeque::new(),
            arena_empty: false,
            backlog: VecDeque::new(),
            attention: false,
            dead: None,
            idle_polls: 0,
            max_payload: parts.max_payload,
            loans: parts.loans,
            may_pull: parts.may_pull,
            peer_may_pull: parts.peer_may_pull,
            caps: Caps {
                eager_max: usize::try_from(parts.max_payload).unwrap_or(usize::MAX),
                ways: parts.ways,
            },
            counters: LinkCounters::default(),
            #[cfg(test)]
            deny_pull_after: None,
        }
    }

    fn gone(&self, how: &str) -> LinkError {
        LinkError::new(ErrorKind::PeerGone, LinkKind::Shm, format!("process {} {how}", self.pid))
    }

    /// The first cause counts.
    fn die(&mut self, error: LinkError) {
        self.attention = true;
        self.dead.get_or_insert(error);
    }

    fn check_alive(&self) -> Result<(), LinkError> {
        match &self.dead {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// What was copied out of the peer's memory counts only if the peer kept it until now.
    fn check_trusted(&self) -> Result<(), LinkError> {
        if self.ring.peer().trusted() { Ok(()) } else { Err(self.gone("ended the link")) }
    }

    pub(super) fn socket(&self) -> &Source {
        self.ring.bell().socket()
    }

    /// Whether the peer's process has ended, and with it every thread of it.
    fn process_has_ended(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.process.fd(), PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok() && !fds[0].revents().is_empty()
    }

    /// Looks directly whether the peer lives: one system call. Reads no packet: a bell among them
    /// belongs to whoever sleeps, and an edge that finds nothing to read any more wakes nobody.
    fn look_for_death(&mut self) -> Result<(), LinkError> {
        let mut fds = [
            PollFd::from_borrowed_fd(self.process.fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.socket().fd(), PollFlags::RDHUP),
        ];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now))
            .map_err(|e| LinkError::io(LinkKind::Shm, "looking at the peer", &e.into()))?;
        let (ended, closed) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
        if ended {
            self.die(self.gone("has ended"));
        }
        if closed {
            self.die(self.gone("closed the connection"));
        }
        Ok(())
    }

    /// Takes what the peer has sent over the socket, until it has passed the segment. Only where
    /// the ring is looked at afterwards: this takes bells, too.
    fn fetch_segment(&mut self, number: u32) -> Result<(), LinkError> {
        for _ in 0..=PACKETS_BEFORE_MAX {
            if self.peer_segments(number).contains(number & !ARENA) {
                return Ok(());
            }
            match socket::receive(self.socket().fd()) {
                Ok(Some(packet)) => self.take_packet(packet)?,
                Ok(None) => {
                    self.die(self.gone("closed the connection"));
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(socket_failed(&error)),
            }
        }
        Ok(())
    }

    fn take_packet(&mut self, packet: socket::Packet) -> Result<(), LinkError> {
        if packet.bytes() == BELL && packet.fds.is_empty() {
            return Ok(());
        }
        let number: Result<[u8; 4], _> = packet.bytes().try_into();
        let (Ok(number), [fd]) = (number, &packet.fds[..]) else {
            return Err(protocol("a packet that passes no segment"));
        };
        let number = u32::from_ne_bytes(number);
        self.peer_segments(number).insert(number & !ARENA, fd.as_fd()).map_err(protocol)
    }

    fn peer_segments(&mut self, number: u32) -> &mut PeerSegments<PeerPage> {
        if number & ARENA == 0 { &mut self.peer_loans } else { &mut self.peer_arena }
    }

    /// The memory that a descriptor of the peer's names.
    fn peer_slice(&mut self, at: LoanAt) -> Result<PeerSlice<PeerPage>, LinkError> {
        // It was passed before the record was written, so it is there.
        self.fetch_segment(at.segment)?;
        self.peer_segments(at.segment).slice(at.segment & !ARENA, at.offset, at.len).map_err(
            |error| match error {
                PeerSegmentError::Unknown => protocol("a loan in a segment that was not passed"),
                PeerSegmentError::OutOfBounds => protocol("a loan outside its segment"),
            },
        )
    }

    /// Makes sure that the peer has the segment of this block.
    fn pass_segment(&mut self, block: &SharedBlock, arena: bool) -> io::Result<()> {
        let (word, bit) = (usize::from(arena), 1u64 << (block.segment() % 64));
        if self.passed[word] & bit != 0 {
            return Ok(());
        }
        let number = block.segment() | if arena { ARENA } else { 0 };
        socket::send(self.socket().fd(), &number.to_ne_bytes(), &[block.segment_fd()])?;
        self.passed[word] |= bit;
        Ok(())
    }

    /// Sends a record that must not be refused; it waits in line if there is no room.
    fn push_control<'a>(
        &mut self,
        flags: u32,
        len: usize,
        parts: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Result<(), LinkError> {
        // What waits already has asked for room.
        if self.backlog.is_empty() && self.ring.push_or_want(flags, len, 0, parts.clone())? {
            return Ok(());
        }
        if self.backlog.len() == BACKLOG_MAX {
            return Err(LinkError::new(
                ErrorKind::LimitExceeded,
                LinkKind::Shm,
                format!("process {} does not read: {BACKLOG_MAX} records wait", self.pid),
            ));
        }
        let mut bytes = SmallVec::with_capacity(len);
        for part in parts {
            bytes.extend_from_slice(part);
        }
        self.backlog.push_back(Waiting { flags, bytes });
        self.attention = true;
        Ok(())
    }

    fn push_fixed(&mut self, kind: Kind, fixed: Fixed) -> Result<(), LinkError> {
        let mut bytes = [0; 24];
        for (into, value) in bytes.chunks_exact_mut(8).zip([fixed.id, fixed.len, fixed.count]) {
            into.copy_from_slice(&value.to_ne_bytes());
        }
        self.push_control(flags(kind, How::Eager, 0), bytes.len(), [&bytes[..]].into_iter())
    }

    fn push_finished(&mut self, remote: u64) -> Result<(), LinkError> {
        self.push_fixed(Kind::Finished, Fixed { id: remote, len: 0, count: 0 })
    }

    fn flush_backlog(&mut self) -> Result<bool, LinkError> {
        let mut moved = false;
        while let Some(waiting) = self.backlog.front() {
            let parts = [&waiting.bytes[..]].into_iter();
            if !self.ring.push_or_want(waiting.flags, waiting.bytes.len(), 0, parts)? {
                break;
            }
            self.backlog.pop_front();
            moved = true;
        }
        Ok(moved)
    }

    /// Whether another poll would move something without any event from outside.
    fn has_work(&self) -> bool {
        !self.landing.is_empty()
            || self.helping.is_some()
            || (!self.pushing.is_empty() && self.chunks.len() < CHUNKS_MAX && !self.arena_empty)
    }
}

impl Link for ShmLink {
    fn kind(&self) -> LinkKind {
        LinkKind::Shm
    }

    fn caps(&self) -> &Caps {
        &self.caps
    }

    #[inline]
    fn poll(
        &mut self,
        _cx: &mut Context<'_>,
        spinning: bool,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<Progress, LinkError> {
        if self.ring.is_empty() && !self.attention {
            if spinning {
                self.idle_polls = self.idle_polls.wrapping_add(1);
                if self.idle_polls.is_multiple_of(LIFE_EVERY) {
                    self.look_for_death()?;
                }
            }
            return Ok(Progress::Idle);
        }
        self.poll_busy(budget, sink)
    }

    fn arm(&mut self, cx: &mut Context<'_>) -> Result<Armed, LinkError> {
        if self.lingering.is_some() {
            return Ok(self.arm_to_end(cx));
        }
        if !self.ring.is_empty() || self.dead.is_some() || self.has_work() {
            return Ok(Armed::Busy);
        }
        if self.arena_empty {
            self.arena.wait(cx.waker());
            // What was given back before the waker was there has woken nobody.
            if self.arena.pool.loan(CHUNK_BYTES).is_ok() {
                self.arena_empty = false;
                return Ok(Armed::Busy);
            }
        }
        if let Some(error) = self.ring.bell().failure() {
            return Err(LinkError::io(LinkKind::Shm, "waking the peer", error));
        }
        if self.register(cx)? == Armed::Busy {
            return Ok(Armed::Busy);
        }
        if self.ring.fall_asleep()? {
            return Ok(Armed::Yes);
        }
        // There is something to read, or room for what waits.
        self.attention = true;
        Ok(Armed::Busy)
    }

    fn post(
        &mut self,
        op: OpId,
        class: Class,
        how: How,
        head: &[u8],
        payload: &[Segment<'_>],
    ) -> Result<Post, LinkError> {
        if let Some(posted) = self.post_short(class, how, head, payload) {
            return posted;
        }
        self.check_alive()?;
        let len = payload.iter().map(|segment| segment.len as u64).sum::<u64>();
        let reachable = payload.iter().all(|segment| segment.kind.cpu_accessible());
        if head.len() > HEAD_MAX || len > self.max_payload || !reachable {
            return Err(LinkError::new(
                ErrorKind::LimitExceeded,
                LinkKind::Shm,
                format!("a head of {} bytes, a payload of {len} bytes", head.len()),
            ));
        }
        let loaned = self.loans && payload.iter().all(|segment| segment.shared.is_some());
        let inline_max = match how {
            How::Offer => OFFER_INLINE_MAX,
            How::Eager if loaned => LOAN_INLINE_MAX,
            How::Eager => INLINE_MAX,
        };
        if len <= inline_max as u64 {
            self.post_inline(class, how, head, payload, len as usize)
        } else {
            self.post_open(op, class, how, head, payload, len)
        }
    }

    fn land(&mut self, payload: PayloadId, to: Landing, op: OpId) -> Result<Post, LinkError> {
        // The operation's own memory: it may not be kept for longer than the link.
        self.start_landing(payload.0, to, op, false)?;
        self.landing.pop_back();
        self.land_at_once(payload.0).inspect_err(|error| {
            // Not accepted, so `kill` must not report it.
            if let Some(incoming) = self.incoming.get_mut(payload.0) {
                incoming.landing = None;
            }
            self.die(error.clone());
        })
    }

    fn release(&mut self, payload: PayloadId) {
        if self.dead.is_some() {
            self.incoming.remove(payload.0);
        } else if let Err(error) = self.let_go(payload.0) {
            self.die(error);
        }
    }

    fn kill(&mut self, error: &LinkError, sink: &mut dyn Sink) -> Killed {
        self.die(error.clone());
        self.tell_the_end();
        self.helping = None;
        let killed = self.end_help(error, sink);
        for queue in [&mut self.landing, &mut self.pushing] {
            queue.clear();
        }
        self.backlog.clear();
        self.outgoing_by_class = [0; Class::COUNT];
        self.bulk_open = 0;
        self.held_inline = 0;
        for incoming in self.incoming.drain() {
            if let Some(landing) = incoming.landing {
                sink.done(landing.op, Err(error.clone()));
            }
        }
        for outgoing in self.outgoing.drain() {
            sink.done(outgoing.op, Err(error.clone()));
        }
        for (block, _) in self.chunks.drain(..) {
            self.arena.give_back(block);
        }
        killed
    }

    fn flushed(&self) -> bool {
        self.backlog.is_empty() && self.outgoing.is_empty()
    }

    fn has_room(&self) -> bool {
        self.backlog.is_empty()
    }

    fn check(&mut self) -> Result<Check, LinkError> {
        // A death found here is reported by `poll`, after what the peer wrote before it.
        self.look_for_death()?;
        Ok(Check::Quiet)
    }

    fn counters(&self) -> LinkCounters {
        LinkCounters { wakes_sent: self.ring.bell().rung, ..self.counters }
    }
}

impl Drop for ShmLink {
    fn drop(&mut self) {
        self.tell_the_end();
    }
}

impl ShmLink {
    /// Tells the peer that the link ends, before anything is freed that it may be reading.
    fn tell_the_end(&mut self) {
        if self.ring.own().forked() {
            return;
        }
        self.ring.own().begin_dying();
        // The peer sees the end at once, although the descriptor stays open until the drop.
        let _ = rustix::net::shutdown(self.socket().fd(), rustix::net::Shutdown::Both);
    }

    #[inline(never)]
    fn poll_busy(
        &mut self,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<Progress, LinkError> {
        if self.lingering.is_some() {
            return Ok(Progress::Idle);
        }
        self.ring.wake_up();
        // What wants attention is out of the way of short parcels, most of which find nothing that does.
        let mut moved = self.attention && self.move_backlog()?;
        let read = self.read_ring(budget, sink)?;
        moved |= read.moved;
        if self.attention {
            moved |= self.move_payloads(budget, sink)?;
        }
        self.ring.publish_if_wanted();
        // What came since is for the next poll; but nothing may come after the end.
        let late = self.dead.is_some() && !self.ring.is_empty();
        let more = !read.emptied || late || self.has_work();
        self.attention = !self.backlog.is_empty()
            || self.ring.is_wanting()
            || self.dead.is_some()
            || !self.landing.is_empty()
            || self.helping.is_some()
            || !self.pushing.is_empty();
        match &self.dead {
            // What the peer wrote before its end is read first.
            Some(error) if !more => Err(error.clone()),
            _ if more => Ok(Progress::More),
            _ if moved => Ok(Progress::Some),
            _ => Ok(Progress::Idle),
        }
    }

    /// Sends what has waited for room. Whether anything moved.
    #[inline(never)]
    fn move_backlog(&mut self) -> Result<bool, LinkError> {
        Ok(self.ring.room_appeared()? | self.flush_backlog()?)
    }

    /// Goes on with payloads that do not lie in the ring. Whether anything moved.
    #[inline(never)]
    fn move_payloads(
        &mut self,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<bool, LinkError> {
        // Neither direction waits for the other's end.
        let mut moved = self.help_turn(budget, budget.bytes / 2)?;
        moved |= self.land_turns(budget, sink)?;
        moved |= self.push_turns(budget)?;
        moved |= self.help_turn(budget, budget.bytes)?;
        Ok(moved)
    }

    /// Asks to be woken by the peer's bell, by a segment that it passes, or by its death. `Yes`:
    /// the socket was read empty, so that a bell rung from here on makes an edge.
    fn register(&mut self, cx: &mut Context<'_>) -> Result<Armed, LinkError> {
        match self.process.poll_readable(cx) {
            Poll::Pending => {}
            Poll::Ready(Ok(())) => {
                self.die(self.gone("has ended"));
                return Ok(Armed::Busy);
            }
            Poll::Ready(Err(error)) => {
                return Err(LinkError::io(LinkKind::Shm, "watching the peer's process", &error));
            }
        }
        for _ in 0..PACKETS_MAX {
            match self.socket().poll_read(cx, |fd| socket::receive(fd).map(Attempt::More)) {
                Poll::Pending => return Ok(Armed::Yes),
                Poll::Ready(Ok(Some(packet))) => self.take_packet(packet)?,
                Poll::Ready(Ok(None)) => {
                    self.die(self.gone("closed the connection"));
                    return Ok(Armed::Busy);
                }
                Poll::Ready(Err(error)) => return Err(socket_failed(&error)),
            }
        }
        Ok(Armed::Busy)
    }
}

/// What a hostile peer would do.
#[cfg(test)]
impl ShmLink {
    /// Writes a record as it is given.
    pub(super) fn forge(&mut self, flags: u32, bytes: &[u8]) {
        assert!(self.ring.push(flags, bytes.len(), 0, [bytes].into_iter()).expect("sound"));
    }

    /// The page that this side writes.
    pub(super) fn page(&self) -> &Page {
        self.ring.own()
    }

    /// The landing for which the peer's help was asked.
    pub(super) fn asked_key(&self) -> Option<u64> {
        self.asked.map(|asked| asked.key)
    }

    /// Whether a payload is to come through the arena.
    pub(super) fn asks_for_chunks(&mut self) -> bool {
        self.asked_key().is_some_and(|key| {
            let incoming = self.incoming.get_mut(key);
            incoming.and_then(|open| open.landing.as_ref()).is_some_and(|landing| landing.by_chunks)
        })
    }

    /// Sends a packet over the Unix socket.
    pub(super) fn forge_packet(&mut self, bytes: &[u8], fds: &[std::os::fd::BorrowedFd<'_>]) {
        socket::send(self.socket().fd(), bytes, fds).expect("sent");
    }

    /// Announces a new sleep, without a look at the socket.
    pub(super) fn doze(&mut self) {
        assert!(self.ring.fall_asleep().expect("sound"), "there is something to read");
    }

    /// Makes calls on its end of the Unix socket block, unless they ask not to.
    pub(super) fn let_socket_block(&self) {
        let flags = rustix::fs::fcntl_getfl(self.socket().fd()).expect("flags");
        let blocking = flags - rustix::fs::OFlags::NONBLOCK;
        rustix::fs::fcntl_setfl(self.socket().fd(), blocking).expect("set");
    }

    pub(super) fn passed(&mut self, block: &SharedBlock, arena: bool) {
        self.pass_segment(block, arena).expect("passed");
    }
}
