//! The link itself: what is sent, what has come, what is still open.
//!
//! A payload stays where it is until the receiver decides. Then, by kind of record: it was in the
//! ring already; it lies in a mapped segment; it is read from the sender's memory; or the receiver
//! asks for it and the sender stages it through its arena. The receiver says when it is finished,
//! and that ends the sender's operation.
//!
//! After `kill` the peer may still be reading memory of ours that it was told of. That harms
//! nothing here: the kernel checks its addresses, and it cannot write.

use std::collections::VecDeque;
use std::io;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smallvec::SmallVec;

use super::cells::{RECORD_MAX, RESERVE};
use super::copy::{self, Cursor};
use super::ring::{Bell, Corrupt, Page, Ring};
use super::socket;
use super::table::Table;
use super::wire::{
    ARENA, Builder, Fixed, INLINE_MAX, Kind, LOAN_INLINE_MAX, LOANS_MAX, LoanAt, PIECES_MAX,
    PULL_LEN, PULLS_MAX, Piece, Reader, flags, parse_flags,
};
use crate::error::{ErrorKind, LinkError};
use crate::link::{
    Armed, Arrival, Budget, COPIED_MAX, Caps, Class, Disposition, HEAD_MAX, How, Landing, Link,
    LinkCounters, LinkKind, OpId, PayloadId, Post, Progress, RawView, Segment, Sink,
};
use crate::memory::{
    OwnMapping, PeerMapping, PeerSegmentError, PeerSegments, PeerSlice, SharedBlock, SharedPool,
};
use crate::runtime::{Attempt, Fd, Source};

/// Open payloads that one class may have on its way; further posts of it are answered `Full`.
const OUTGOING_MAX: usize = 1024;
/// Open payloads that the peer may have on their way to us; control has as many again.
const INCOMING_MAX: usize = OUTGOING_MAX * (Class::COUNT + 1);
/// Small payloads that arrived in the ring and wait to be landed.
const HELD_INLINE_MAX: usize = 1 << 17;
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
/// Wakes taken in one call of `arm` before it gives way.
const EVENTS_MAX: usize = 8;

// What `post` promises to copy is copied into the ring, whatever it is made of.
const _: () = assert!(COPIED_MAX <= LOAN_INLINE_MAX && COPIED_MAX <= INLINE_MAX);

/// The page this side writes.
pub(super) struct OwnPage(OwnMapping);

impl OwnPage {
    /// The mapping must be large enough, which whoever makes it sees to.
    pub fn new(mapping: OwnMapping) -> Self {
        assert!(mapping.len() >= size_of::<Page>());
        OwnPage(mapping)
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

/// The page the peer writes.
pub(super) struct PeerPage(PeerMapping);

impl PeerPage {
    pub fn new(mapping: PeerMapping) -> Option<Self> {
        (mapping.len() >= size_of::<Page>()).then_some(PeerPage(mapping))
    }
}

impl Deref for PeerPage {
    type Target = Page;

    fn deref(&self) -> &Page {
        // SAFETY: page-aligned, large enough (checked in `new`), and mapped for as long as `self`.
        // It consists of atomic integers, for which every value is valid; this side only loads.
        unsafe { &*self.0.as_ptr().cast() }
    }
}

/// Rings the peer's eventfd, which only the peer waits on.
pub(super) struct EventBell {
    fd: Fd,
    rung: u64,
}

impl Bell for EventBell {
    fn ring(&mut self) {
        self.rung += 1;
        // It cannot fail but by a full counter, and then the peer has wakes in plenty.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
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
    pub event: Source,
    pub peer_event: Fd,
    pub socket: Source,
    pub process: Source,
    pub pid: i32,
    pub arena: Arc<Arena>,
    pub segments_limit_bytes: u64,
    pub max_payload: u64,
    pub loans: bool,
    /// Whether this side may read the peer's memory.
    pub may_pull: bool,
    /// Whether the peer may read this side's.
    pub peer_may_pull: bool,
    pub ways: String,
}

/// A payload of ours that the peer is not finished with.
struct Outgoing {
    op: OpId,
    class: Class,
    len: u64,
    /// Where it lies in our memory; for a loan by reference, empty.
    pieces: SmallVec<[Piece; 4]>,
    /// Keeps loans from being reused.
    blocks: SmallVec<[SharedBlock; 2]>,
    push: Option<Push>,
}

/// A payload on its way through the arena.
struct Push {
    /// The receiver's key.
    handle: u64,
    from: Cursor,
    left: u64,
    /// Chunks not yet taken.
    open: u32,
}

/// A payload of the peer's that we are not finished with.
struct Incoming {
    /// The sender's key.
    remote: u64,
    len: u64,
    origin: Origin,
    landing: Option<Progressing>,
}

/// Where an incoming payload lies.
enum Origin {
    Inline(Box<[u8]>),
    Loan(SmallVec<[PeerSlice; 2]>),
    Pull(SmallVec<[Piece; 4]>),
    List { addr: u64, count: usize },
    Push,
}

struct Progressing {
    to: Landing,
    op: OpId,
    into: Cursor,
    from: Cursor,
    done: u64,
    /// The rest comes through the peer's arena.
    asked: bool,
}

/// What one turn of a landing came to.
enum Turn {
    Finished,
    More,
    /// Asked for: chunks will come.
    Waiting,
}

struct Waiting {
    flags: u32,
    bytes: SmallVec<[u8; 56]>,
}

/// A lane over shared memory. See the module's docs.
pub(crate) struct ShmLink {
    ring: Ring<OwnPage, PeerPage, EventBell>,
    /// Where records are copied to before anything in them is looked at.
    scratch: Option<Box<[u8; RECORD_MAX]>>,
    /// Where records are put together.
    building: Option<Box<[u8; RECORD_MAX]>>,
    event: Source,
    socket: Source,
    process: Source,
    pid: i32,
    arena: Arc<Arena>,
    /// The peer's loans, and its arena.
    peer_loans: PeerSegments,
    peer_arena: PeerSegments,
    /// Segments passed to the peer: a bit each, of loans and of the arena.
    passed: [u64; 2],
    outgoing: Table<Outgoing>,
    outgoing_by_class: [usize; Class::COUNT],
    incoming: Table<Incoming>,
    held_inline: usize,
    /// Landings to be worked on, and payloads to be staged; in turns.
    landing: VecDeque<u64>,
    pushing: VecDeque<u64>,
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

impl From<Corrupt> for LinkError {
    fn from(corrupt: Corrupt) -> Self {
        protocol(corrupt.to_string())
    }
}

impl ShmLink {
    pub(super) fn new(parts: Parts) -> Self {
        let bell = EventBell { fd: parts.peer_event, rung: 0 };
        ShmLink {
            ring: Ring::new(parts.own, parts.peer, bell),
            scratch: Some(Box::new([0; RECORD_MAX])),
            building: Some(Box::new([0; RECORD_MAX])),
            event: parts.event,
            socket: parts.socket,
            process: parts.process,
            pid: parts.pid,
            arena: parts.arena,
            peer_loans: PeerSegments::new(parts.segments_limit_bytes),
            peer_arena: PeerSegments::new(4 * ARENA_BYTES as u64),
            passed: [0; 2],
            outgoing: Table::new(),
            outgoing_by_class: [0; Class::COUNT],
            incoming: Table::new(),
            held_inline: 0,
            landing: VecDeque::new(),
            pushing: VecDeque::new(),
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

    /// Looks directly whether the peer lives: one system call.
    fn look_for_death(&mut self) -> Result<(), LinkError> {
        let mut fds = [
            PollFd::from_borrowed_fd(self.process.fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.socket.fd(), PollFlags::IN),
        ];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now))
            .map_err(|e| LinkError::io(LinkKind::Shm, "looking at the peer", &e.into()))?;
        let (ended, packets) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
        if ended {
            self.die(self.gone("has ended"));
        }
        if packets {
            self.read_socket()?;
        }
        Ok(())
    }

    /// Takes the segments that the peer has passed. Bounded: each number is taken once.
    fn read_socket(&mut self) -> Result<(), LinkError> {
        loop {
            match socket::receive(self.socket.fd()) {
                Ok(Some(packet)) => self.take_segment(packet)?,
                Ok(None) => {
                    self.die(self.gone("closed the connection"));
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return self.socket_failed(&error),
            }
        }
    }

    fn socket_failed(&mut self, error: &io::Error) -> Result<(), LinkError> {
        if error.kind() == io::ErrorKind::ConnectionReset {
            self.die(self.gone("closed the connection"));
            return Ok(());
        }
        Err(LinkError::io(LinkKind::Shm, "reading the peer's socket", error))
    }

    fn take_segment(&mut self, packet: socket::Packet) -> Result<(), LinkError> {
        let number: Result<[u8; 4], _> = packet.bytes().try_into();
        let (Ok(number), [fd]) = (number, &packet.fds[..]) else {
            return Err(protocol("a packet that passes no segment"));
        };
        let number = u32::from_ne_bytes(number);
        self.peer_segments(number).insert(number & !ARENA, fd.as_fd()).map_err(protocol)
    }

    fn peer_segments(&mut self, number: u32) -> &mut PeerSegments {
        if number & ARENA == 0 { &mut self.peer_loans } else { &mut self.peer_arena }
    }

    /// The memory that a descriptor of the peer's names.
    fn peer_slice(&mut self, at: LoanAt) -> Result<PeerSlice, LinkError> {
        if !self.peer_segments(at.segment).contains(at.segment & !ARENA) {
            // It was passed before the record was written, so it is there.
            self.read_socket()?;
        }
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
        socket::send(self.socket.fd(), &number.to_ne_bytes(), &[block.segment_fd()])?;
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
        if self.backlog.is_empty() && self.ring.push(flags, len, 0, parts.clone())? {
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
        self.ring.want_room()?;
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
            if !self.ring.push(waiting.flags, waiting.bytes.len(), 0, parts)? {
                if self.ring.want_room()? {
                    continue;
                }
                break;
            }
            self.backlog.pop_front();
            moved = true;
        }
        Ok(moved)
    }

    /// Pushes a record of a class that may be told to wait.
    fn push_parcel<'a>(
        &mut self,
        class: Class,
        flags: u32,
        len: usize,
        parts: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Result<bool, LinkError> {
        if class == Class::Control {
            self.push_control(flags, len, parts)?;
        } else {
            if !self.backlog.is_empty() {
                return Ok(false);
            }
            while !self.ring.push(flags, len, RESERVE, parts.clone())? {
                self.attention = true;
                if !self.ring.want_room()? {
                    return Ok(false);
                }
            }
        }
        self.counters.parcels_sent += 1;
        Ok(true)
    }

    fn stalled(&mut self) -> Post {
        self.counters.stalls += 1;
        Post::Full
    }

    fn post_inline(
        &mut self,
        class: Class,
        how: How,
        head: &[u8],
        payload: &[Segment<'_>],
        len: usize,
    ) -> Result<Post, LinkError> {
        let parts = std::iter::once(head).chain(payload.iter().map(|segment| {
            if segment.len == 0 {
                return &[][..];
            }
            // SAFETY: the caller of `post` keeps the segment readable until done, and nothing
            // writes it meanwhile.
            unsafe { std::slice::from_raw_parts(segment.ptr, segment.len) }
        }));
        let flags = flags(Kind::Inline, how, head.len());
        if !self.push_parcel(class, flags, head.len() + len, parts)? {
            return Ok(self.stalled());
        }
        self.counters.inline_bytes_sent += len as u64;
        Ok(Post::Done)
    }

    /// Whether every piece is a loan that can go by reference.
    fn by_reference(&mut self, payload: &[Segment<'_>]) -> bool {
        let count = payload.iter().filter(|segment| segment.len > 0).count();
        self.loans
            && count == payload.len()
            && count <= LOANS_MAX
            && payload.iter().all(|segment| match segment.shared {
                // Passing fails when descriptors run out: then the loan is read like any memory.
                Some(block) => self.pass_segment(block, false).is_ok(),
                None => false,
            })
    }

    fn post_open(
        &mut self,
        op: OpId,
        class: Class,
        how: How,
        head: &[u8],
        payload: &[Segment<'_>],
        len: u64,
    ) -> Result<Post, LinkError> {
        if class != Class::Control && self.outgoing_by_class[class as usize] >= OUTGOING_MAX {
            return Ok(self.stalled());
        }
        if self.outgoing.len() >= INCOMING_MAX {
            return Err(LinkError::new(
                ErrorKind::LimitExceeded,
                LinkKind::Shm,
                "too many control payloads open",
            ));
        }
        let mut outgoing = Outgoing {
            op,
            class,
            len,
            pieces: SmallVec::new(),
            blocks: SmallVec::new(),
            push: None,
        };
        let kind = if self.by_reference(payload) {
            outgoing.blocks.extend(payload.iter().filter_map(|segment| segment.shared.cloned()));
            Kind::Loan
        } else {
            let pieces = payload.iter().filter(|segment| segment.len > 0);
            outgoing.pieces.extend(pieces.map(|from| Piece {
                addr: from.ptr.expose_provenance() as u64,
                len: from.len as u64,
            }));
            match outgoing.pieces.len() {
                0..=PULLS_MAX if self.peer_may_pull => Kind::Pull,
                0..=PIECES_MAX if self.peer_may_pull => Kind::PullList,
                _ => Kind::Push,
            }
        };
        let mut building = self.building.take().unwrap_or_else(|| Box::new([0; RECORD_MAX]));
        let key = self.outgoing.next_key();
        let record = build(&mut building, key, &outgoing, kind, payload, head);
        let flags = flags(kind, how, head.len());
        let pushed = self.push_parcel(class, flags, record.len(), [record].into_iter());
        self.building = Some(building);
        if !pushed? {
            return Ok(self.stalled());
        }
        if kind == Kind::Loan {
            self.counters.loaned_bytes_sent += len;
        }
        self.outgoing_by_class[class as usize] += 1;
        self.outgoing.insert(outgoing);
        Ok(Post::Pending)
    }
}

/// Incoming.
impl ShmLink {
    /// Reads records until the ring is empty or the budget ends. Whether anything moved.
    fn read_ring(&mut self, budget: &mut Budget, sink: &mut dyn Sink) -> Result<bool, LinkError> {
        let mut scratch = self.scratch.take().unwrap_or_else(|| Box::new([0; RECORD_MAX]));
        let read = self.read_records(&mut scratch, budget, sink);
        self.scratch = Some(scratch);
        read
    }

    fn read_records(
        &mut self,
        scratch: &mut [u8; RECORD_MAX],
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<bool, LinkError> {
        let mut moved = false;
        while budget.parcels > 0 && budget.bytes > 0 {
            let Some((flags, len)) = self.ring.pop(scratch)? else {
                break;
            };
            budget.parcels -= 1;
            moved = true;
            self.take_record(flags, &scratch[..len], budget, sink)?;
        }
        Ok(moved)
    }

    fn take_record(
        &mut self,
        flags: u32,
        record: &[u8],
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        let Some((kind, how, head_len)) = parse_flags(flags) else {
            return Err(protocol("a record of unknown kind"));
        };
        if kind == Kind::Inline {
            return self.take_inline(how, head_len, record, budget, sink);
        }
        let mut reader = Reader::new(record);
        let Some(fixed) = reader.fixed() else {
            return Err(protocol("a record that is too short"));
        };
        match kind {
            Kind::Finished => self.take_finished(fixed.id, sink),
            Kind::Ask => self.take_ask(fixed),
            Kind::Chunk => {
                let at = reader.loan().ok_or_else(|| protocol("a chunk without a place"))?;
                self.take_chunk(fixed.id, at, budget, sink)
            }
            Kind::Taken => self.take_taken(sink),
            _ => self.take_offer(kind, how, head_len, fixed, reader, sink),
        }
    }

    fn take_inline(
        &mut self,
        how: How,
        head_len: usize,
        record: &[u8],
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        if head_len > HEAD_MAX || head_len > record.len() {
            return Err(protocol("a head longer than its record"));
        }
        let (head, payload) = record.split_at(head_len);
        if payload.len() > INLINE_MAX || payload.len() as u64 > self.max_payload {
            return Err(protocol("an inline payload over the limit"));
        }
        budget.bytes = budget.bytes.saturating_sub(payload.len());
        self.counters.parcels_received += 1;
        self.counters.inline_bytes_received += payload.len() as u64;
        let key = PayloadId(self.incoming.next_key());
        let arrival = Arrival {
            head,
            len: payload.len() as u64,
            payload: key,
            inline: Some(payload),
            views: None,
            how,
        };
        match sink.parcel(arrival) {
            Disposition::Taken | Disposition::Discard | Disposition::View => Ok(()),
            Disposition::Land { to, op } => {
                check_landing(&to, payload.len() as u64)?;
                // SAFETY: the driver keeps the landing writable until done; the source is private.
                unsafe {
                    copy::copy_in(&to, &mut Cursor::default(), payload.as_ptr(), payload.len());
                }
                sink.done(op, Ok(()));
                Ok(())
            }
            Disposition::Hold => {
                if self.held_inline == HELD_INLINE_MAX {
                    return Err(protocol("too many payloads wait to be landed"));
                }
                self.held_inline += 1;
                self.incoming.insert(Incoming {
                    remote: 0,
                    len: payload.len() as u64,
                    origin: Origin::Inline(payload.into()),
                    landing: None,
                });
                Ok(())
            }
            Disposition::Fatal(error) => Err(error),
        }
    }

    /// A parcel whose payload lies elsewhere.
    fn take_offer(
        &mut self,
        kind: Kind,
        how: How,
        head_len: usize,
        fixed: Fixed,
        mut reader: Reader<'_>,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        if fixed.len == 0 || fixed.len > self.max_payload {
            return Err(protocol(format!(
                "a payload of {} bytes, the limit is {}",
                fixed.len, self.max_payload
            )));
        }
        if self.incoming.len() - self.held_inline >= INCOMING_MAX {
            return Err(protocol("too many payloads open"));
        }
        let origin = self.read_origin(kind, fixed, &mut reader)?;
        let Some(head) = reader.head(head_len) else {
            return Err(protocol("a head that does not fill its record"));
        };
        let views: Option<SmallVec<[RawView; 2]>> = match &origin {
            Origin::Loan(slices) => {
                self.counters.loaned_bytes_received += fixed.len;
                Some(slices.iter().map(view_of).collect())
            }
            _ => None,
        };
        self.counters.parcels_received += 1;
        let incoming = Incoming { remote: fixed.id, len: fixed.len, origin, landing: None };
        let key = self.incoming.insert(incoming);
        let arrival = Arrival {
            head,
            len: fixed.len,
            payload: PayloadId(key),
            inline: None,
            views: views.as_deref(),
            how,
        };
        match sink.parcel(arrival) {
            Disposition::Land { to, op } => self.start_landing(key, to, op),
            Disposition::View | Disposition::Hold => Ok(()),
            Disposition::Taken | Disposition::Discard => self.let_go(key),
            Disposition::Fatal(error) => Err(error),
        }
    }

    fn read_origin(
        &mut self,
        kind: Kind,
        fixed: Fixed,
        reader: &mut Reader<'_>,
    ) -> Result<Origin, LinkError> {
        let truncated = || protocol("a record that is too short for its descriptors");
        let count = usize::try_from(fixed.count).unwrap_or(usize::MAX);
        match kind {
            Kind::Loan if self.loans && count <= LOANS_MAX => {
                let mut slices = SmallVec::new();
                let mut left = fixed.len;
                for _ in 0..count {
                    let at = reader.loan().ok_or_else(truncated)?;
                    left = left.checked_sub(at.len).ok_or_else(sums_up_wrong)?;
                    slices.push(self.peer_slice(at)?);
                }
                if left != 0 { Err(sums_up_wrong()) } else { Ok(Origin::Loan(slices)) }
            }
            Kind::Pull if count <= PULLS_MAX => {
                let mut pieces = SmallVec::new();
                for _ in 0..count {
                    pieces.push(reader.piece().ok_or_else(truncated)?);
                }
                check_pieces(&pieces, fixed.len)?;
                Ok(Origin::Pull(pieces))
            }
            Kind::PullList if count <= PIECES_MAX => {
                let list = reader.piece().ok_or_else(truncated)?;
                Ok(Origin::List { addr: list.addr, count })
            }
            Kind::Push => Ok(Origin::Push),
            _ => Err(protocol("more descriptors than a record may have")),
        }
    }

    /// Finishes with a payload without landing it.
    fn let_go(&mut self, key: u64) -> Result<(), LinkError> {
        let Some(incoming) = self.incoming.remove(key) else {
            return Ok(());
        };
        if matches!(incoming.origin, Origin::Inline(_)) {
            self.held_inline -= 1;
            return Ok(());
        }
        self.push_finished(incoming.remote)
    }

    fn start_landing(&mut self, key: u64, to: Landing, op: OpId) -> Result<(), LinkError> {
        let Some(incoming) = self.incoming.get_mut(key) else {
            return Err(LinkError::new(
                ErrorKind::InvalidInput,
                LinkKind::Shm,
                "a landing of a payload that is not open",
            ));
        };
        check_landing(&to, incoming.len)?;
        let (into, from) = (Cursor::default(), Cursor::default());
        incoming.landing = Some(Progressing { to, op, into, from, done: 0, asked: false });
        self.landing.push_back(key);
        self.attention = true;
        Ok(())
    }

    /// Works on the landings, in turns, within the budget.
    fn land_turns(&mut self, budget: &mut Budget, sink: &mut dyn Sink) -> Result<bool, LinkError> {
        let mut moved = false;
        while budget.bytes > 0 {
            let Some(key) = self.landing.pop_front() else {
                break;
            };
            moved = true;
            match self.land_turn(key, budget) {
                Ok(Turn::Finished) => {
                    if let Some(op) = self.finish_landing(key)? {
                        sink.done(op, Ok(()));
                    }
                }
                Ok(Turn::More) => self.landing.push_back(key),
                Ok(Turn::Waiting) => {}
                Err(error) => {
                    // `kill` reports the operation.
                    self.landing.push_front(key);
                    return Err(error);
                }
            }
        }
        Ok(moved)
    }

    fn finish_landing(&mut self, key: u64) -> Result<Option<OpId>, LinkError> {
        let Some(incoming) = self.incoming.remove(key) else {
            return Ok(None);
        };
        let asked = incoming.landing.as_ref().is_some_and(|landing| landing.asked);
        match incoming.origin {
            Origin::Inline(_) => self.held_inline -= 1,
            // The sender knows by the last chunk taken.
            _ if asked => {}
            _ => self.push_finished(incoming.remote)?,
        }
        Ok(incoming.landing.map(|landing| landing.op))
    }

    fn land_turn(&mut self, key: u64, budget: &mut Budget) -> Result<Turn, LinkError> {
        let Some(incoming) = self.incoming.get_mut(key) else {
            return Ok(Turn::Waiting);
        };
        let Some(landing) = &mut incoming.landing else {
            return Ok(Turn::Waiting);
        };
        match &incoming.origin {
            Origin::Inline(bytes) => {
                // SAFETY: the driver keeps the landing writable until done; the source is ours.
                unsafe {
                    copy::copy_in(&landing.to, &mut landing.into, bytes.as_ptr(), bytes.len());
                }
                budget.bytes = budget.bytes.saturating_sub(bytes.len());
                Ok(Turn::Finished)
            }
            Origin::Loan(slices) => {
                while let Some(slice) =
                    slices.get(landing.from.index()).filter(|_| budget.bytes > 0)
                {
                    let offset = landing.from.offset();
                    let len = (slice.len - offset).min(budget.bytes);
                    // SAFETY: the driver keeps the landing writable until done. The source lies in
                    // a mapping that `slice` keeps, and `offset + len <= slice.len`.
                    unsafe {
                        copy::copy_in(&landing.to, &mut landing.into, slice.ptr.add(offset), len);
                    }
                    copy::advance(&mut landing.from, len, |at| slices.get(at).map(|s| s.len));
                    landing.done += len as u64;
                    budget.bytes -= len;
                }
                Ok(if landing.done == incoming.len { Turn::Finished } else { Turn::More })
            }
            Origin::Push => self.ask(key),
            Origin::Pull(_) | Origin::List { .. } if !self.may_pull => self.ask(key),
            Origin::List { addr, count } => {
                let (addr, count) = (*addr, *count);
                self.read_list(key, addr, count)
            }
            Origin::Pull(_) => self.pull_turn(key, budget),
        }
    }

    /// Reads the list of a payload's pieces out of the sender's memory.
    fn read_list(&mut self, key: u64, addr: u64, count: usize) -> Result<Turn, LinkError> {
        let mut bytes = vec![0; count * PULL_LEN];
        if let Err(error) = copy::read_peer_bytes(self.pid, addr, &mut bytes) {
            return self.pull_failed(key, &error);
        }
        self.look_for_death()?;
        self.check_alive()?;
        let Some(incoming) = self.incoming.get_mut(key) else {
            return Ok(Turn::Waiting);
        };
        let mut reader = Reader::new(&bytes);
        let pieces: SmallVec<[Piece; 4]> = std::iter::from_fn(|| reader.piece()).collect();
        check_pieces(&pieces, incoming.len)?;
        incoming.origin = Origin::Pull(pieces);
        Ok(Turn::More)
    }

    fn pull_turn(&mut self, key: u64, budget: &mut Budget) -> Result<Turn, LinkError> {
        let mut copied = 0;
        loop {
            let Some(incoming) = self.incoming.get_mut(key) else {
                return Ok(Turn::Waiting);
            };
            let (Origin::Pull(pieces), Some(landing)) = (&incoming.origin, &mut incoming.landing)
            else {
                return Ok(Turn::Waiting);
            };
            let left = incoming.len - landing.done;
            if left == 0 || budget.bytes == 0 {
                break;
            }
            let limit = usize::try_from(left).unwrap_or(usize::MAX).min(budget.bytes);
            #[cfg(test)]
            let limit = self.deny_pull_after.map_or(limit, |after| {
                limit.min(after.saturating_sub(landing.done).max(1) as usize)
            });
            #[cfg(test)]
            let denied = self.deny_pull_after.is_some_and(|after| landing.done >= after);
            #[cfg(not(test))]
            let denied = false;
            let read = if denied {
                Err(io::Error::from_raw_os_error(libc::EPERM))
            } else {
                // SAFETY: the driver keeps the landing writable until done.
                unsafe {
                    copy::read_peer(
                        self.pid,
                        pieces,
                        &mut landing.from,
                        &landing.to,
                        &mut landing.into,
                        limit,
                    )
                }
            };
            match read {
                Ok(read) => {
                    landing.done += read as u64;
                    budget.bytes -= read;
                    copied += read as u64;
                }
                Err(error) => return self.pull_failed(key, &error),
            }
        }
        // A number may be reused by another process: what was read counts only if the peer lives.
        self.look_for_death()?;
        self.check_alive()?;
        self.counters.single_copy_bytes_received += copied;
        let Some(incoming) = self.incoming.get_mut(key) else {
            return Ok(Turn::Waiting);
        };
        let finished = incoming.landing.as_ref().is_some_and(|at| at.done == incoming.len);
        Ok(if finished { Turn::Finished } else { Turn::More })
    }

    /// Permission may vanish at any time: then this payload comes through the arena from here on.
    fn pull_failed(&mut self, key: u64, error: &io::Error) -> Result<Turn, LinkError> {
        self.look_for_death()?;
        self.check_alive()?;
        match error.raw_os_error() {
            Some(libc::EPERM | libc::ENOSYS) => self.ask(key),
            Some(libc::ESRCH) => Err(self.gone("has ended")),
            Some(libc::EFAULT) => Err(protocol("an address where the peer has no memory")),
            _ => Err(LinkError::io(LinkKind::Shm, "reading the peer's memory", error)),
        }
    }

    fn ask(&mut self, key: u64) -> Result<Turn, LinkError> {
        let Some(incoming) = self.incoming.get_mut(key) else {
            return Ok(Turn::Waiting);
        };
        let Some(landing) = &mut incoming.landing else {
            return Ok(Turn::Waiting);
        };
        landing.asked = true;
        let fixed = Fixed { id: incoming.remote, len: landing.done, count: key };
        self.push_fixed(Kind::Ask, fixed)?;
        Ok(Turn::Waiting)
    }

    fn take_chunk(
        &mut self,
        key: u64,
        at: LoanAt,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        if at.segment & ARENA == 0 {
            return Err(protocol("a chunk outside the arena"));
        }
        let slice = self.peer_slice(at)?;
        let unasked = || protocol("a chunk that nobody asked for");
        let incoming = self.incoming.get_mut(key).ok_or_else(unasked)?;
        let landing =
            incoming.landing.as_mut().filter(|landing| landing.asked).ok_or_else(unasked)?;
        if at.len == 0 || at.len > incoming.len - landing.done {
            return Err(protocol("a chunk that is too long"));
        }
        // SAFETY: the driver keeps the landing writable until done; `slice` keeps the mapping.
        unsafe { copy::copy_in(&landing.to, &mut landing.into, slice.ptr, slice.len) };
        landing.done += at.len;
        budget.bytes = budget.bytes.saturating_sub(slice.len);
        self.counters.arena_bytes_received += at.len;
        let finished = landing.done == incoming.len;
        self.push_fixed(Kind::Taken, Fixed { id: 0, len: 0, count: 0 })?;
        if finished && let Some(op) = self.finish_landing(key)? {
            sink.done(op, Ok(()));
        }
        Ok(())
    }
}

/// What the peer says about our payloads.
impl ShmLink {
    fn complete(&mut self, key: u64, sink: &mut dyn Sink) {
        if let Some(outgoing) = self.outgoing.remove(key) {
            self.outgoing_by_class[outgoing.class as usize] -= 1;
            sink.done(outgoing.op, Ok(()));
        }
    }

    fn take_finished(&mut self, key: u64, sink: &mut dyn Sink) -> Result<(), LinkError> {
        let Some(outgoing) = self.outgoing.get_mut(key) else {
            return Err(protocol("the end of a payload that is not open"));
        };
        if outgoing.push.is_some() {
            return Err(protocol("the end of a payload that is being staged"));
        }
        self.complete(key, sink);
        Ok(())
    }

    fn take_ask(&mut self, fixed: Fixed) -> Result<(), LinkError> {
        let Some(outgoing) = self.outgoing.get_mut(fixed.id) else {
            return Err(protocol("a payload asked for that is not open"));
        };
        let from = fixed.len;
        if outgoing.push.is_some() || !outgoing.blocks.is_empty() || from >= outgoing.len {
            return Err(protocol("a payload asked for that cannot be staged"));
        }
        let mut cursor = Cursor::default();
        let pieces = &outgoing.pieces;
        let skip = usize::try_from(from).map_err(|_| protocol("an offset over the limit"))?;
        copy::advance(&mut cursor, skip, |at| pieces.get(at).map(|piece| piece.len as usize));
        outgoing.push =
            Some(Push { handle: fixed.count, from: cursor, left: outgoing.len - from, open: 0 });
        self.pushing.push_back(fixed.id);
        self.attention = true;
        Ok(())
    }

    fn take_taken(&mut self, sink: &mut dyn Sink) -> Result<(), LinkError> {
        let Some((block, key)) = self.chunks.pop_front() else {
            return Err(protocol("a chunk taken that was not sent"));
        };
        self.arena.give_back(block);
        self.attention = true;
        let Some(push) = self.outgoing.get_mut(key).and_then(|open| open.push.as_mut()) else {
            return Ok(());
        };
        push.open -= 1;
        if push.open == 0 && push.left == 0 {
            self.complete(key, sink);
        }
        Ok(())
    }

    /// Stages chunks of what was asked for, in turns, within the budget.
    fn push_turns(&mut self, budget: &mut Budget) -> Result<bool, LinkError> {
        let mut moved = false;
        self.arena_empty = false;
        while budget.bytes > 0 && self.chunks.len() < CHUNKS_MAX {
            let Some(key) = self.pushing.pop_front() else {
                break;
            };
            let Some(push) = self.outgoing.get_mut(key).and_then(|open| open.push.as_mut()) else {
                continue;
            };
            let take = push.left.min(CHUNK_BYTES as u64) as usize;
            let Ok(mut chunk) = self.arena.pool.loan(take) else {
                self.pushing.push_front(key);
                self.arena_empty = true;
                break;
            };
            self.fill_chunk(key, &mut chunk);
            let block = chunk.into_block();
            self.pass_segment(&block, true).map_err(|error| {
                LinkError::io(LinkKind::Shm, "passing a segment of the staging arena", &error)
            })?;
            self.push_chunk(key, block)?;
            budget.bytes = budget.bytes.saturating_sub(take);
            moved = true;
        }
        Ok(moved)
    }

    /// Gathers the next bytes of a payload.
    fn fill_chunk(&mut self, key: u64, chunk: &mut [u8]) {
        let Some(outgoing) = self.outgoing.get_mut(key) else {
            return;
        };
        let Some(push) = &mut outgoing.push else {
            return;
        };
        let mut filled = 0;
        while filled < chunk.len() {
            let Some(piece) = outgoing.pieces.get(push.from.index()) else {
                break;
            };
            let offset = push.from.offset();
            let take = (piece.len as usize - offset).min(chunk.len() - filled);
            let from = std::ptr::with_exposed_provenance::<u8>(piece.addr as usize + offset);
            // SAFETY: the piece is a segment whose poster keeps it readable until done, which is
            // not before the last chunk was taken; the destination has `take` bytes left.
            unsafe { std::ptr::copy_nonoverlapping(from, chunk[filled..].as_mut_ptr(), take) };
            filled += take;
            let pieces = &outgoing.pieces;
            copy::advance(&mut push.from, take, |at| pieces.get(at).map(|p| p.len as usize));
        }
    }

    fn push_chunk(&mut self, key: u64, block: SharedBlock) -> Result<(), LinkError> {
        let len = block.len() as u64;
        let Some(push) = self.outgoing.get_mut(key).and_then(|open| open.push.as_mut()) else {
            return Ok(());
        };
        push.left -= len;
        push.open += 1;
        let (handle, more) = (push.handle, push.left > 0);
        let at = LoanAt { segment: block.segment() | ARENA, offset: block.offset(), len };
        let mut bytes = [0; RECORD_MAX];
        let mut builder = Builder::new(&mut bytes, handle, len, 1);
        builder.loan(at);
        let record = builder.finish(&[]);
        self.chunks.push_back((block, key));
        if more {
            self.pushing.push_back(key);
        }
        self.counters.arena_bytes_sent += len;
        let flags = flags(Kind::Chunk, How::Eager, 0);
        self.push_control(flags, record.len(), [record].into_iter())
    }

    /// Whether another poll would move something without any event from outside.
    fn has_work(&self) -> bool {
        !self.landing.is_empty()
            || (!self.pushing.is_empty() && self.chunks.len() < CHUNKS_MAX && !self.arena_empty)
    }
}

fn sums_up_wrong() -> LinkError {
    protocol("descriptors that do not add up to the payload")
}

fn check_pieces(pieces: &[Piece], len: u64) -> Result<(), LinkError> {
    let mut left = len;
    for piece in pieces {
        left = left.checked_sub(piece.len).ok_or_else(sums_up_wrong)?;
    }
    if left == 0 { Ok(()) } else { Err(sums_up_wrong()) }
}

/// The lengths of a landing must add up, or a copy would end early.
fn check_landing(to: &Landing, len: u64) -> Result<(), LinkError> {
    let sum = to.iter().map(|segment| segment.len as u64).sum::<u64>();
    if sum == len && to.iter().all(|segment| segment.kind.cpu_accessible()) {
        return Ok(());
    }
    Err(LinkError::new(
        ErrorKind::InvalidInput,
        LinkKind::Shm,
        format!("a landing of {sum} bytes for a payload of {len}"),
    ))
}

fn view_of(slice: &PeerSlice) -> RawView {
    RawView { ptr: slice.ptr, len: slice.len, keep: slice.keep.clone() }
}

/// Puts a record with a payload together. The list of a long payload stays in `outgoing`, whose
/// heap memory does not move with it.
fn build<'b>(
    building: &'b mut [u8; RECORD_MAX],
    key: u64,
    outgoing: &Outgoing,
    kind: Kind,
    payload: &[Segment<'_>],
    head: &[u8],
) -> &'b [u8] {
    let count = match kind {
        Kind::Loan => outgoing.blocks.len(),
        _ => outgoing.pieces.len(),
    };
    let mut builder = Builder::new(building, key, outgoing.len, count as u64);
    match kind {
        Kind::Loan => {
            for (segment, block) in payload.iter().zip(&outgoing.blocks) {
                let into = segment.ptr.addr() - block.as_ptr().addr();
                builder.loan(LoanAt {
                    segment: block.segment(),
                    offset: block.offset() + into as u64,
                    len: segment.len as u64,
                });
            }
        }
        Kind::Pull => outgoing.pieces.iter().for_each(|piece| builder.piece(*piece)),
        Kind::PullList => {
            let list = outgoing.pieces.as_ptr();
            let len = (outgoing.pieces.len() * PULL_LEN) as u64;
            builder.piece(Piece { addr: list.expose_provenance() as u64, len });
        }
        _ => {}
    }
    builder.finish(head)
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
                self.idle_polls += 1;
                if self.idle_polls.is_multiple_of(LIFE_EVERY) {
                    self.look_for_death()?;
                }
            }
            return Ok(Progress::Idle);
        }
        self.poll_busy(budget, sink)
    }

    fn arm(&mut self, cx: &mut Context<'_>) -> Result<Armed, LinkError> {
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
        if self.register_event(cx)? == Armed::Busy || self.register_death(cx)? == Armed::Busy {
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
        let inline_max = if loaned { LOAN_INLINE_MAX } else { INLINE_MAX };
        if len <= inline_max as u64 {
            self.post_inline(class, how, head, payload, len as usize)
        } else {
            self.post_open(op, class, how, head, payload, len)
        }
    }

    fn land(&mut self, payload: PayloadId, to: Landing, op: OpId) -> Result<Post, LinkError> {
        self.start_landing(payload.0, to, op)?;
        self.landing.pop_back();
        let mut budget = Budget::TURN;
        loop {
            match self.land_turn(payload.0, &mut budget) {
                Ok(Turn::Finished) => {
                    self.finish_landing(payload.0)?;
                    return Ok(Post::Done);
                }
                Ok(Turn::More) if budget.bytes > 0 => {}
                Ok(Turn::More) => {
                    self.landing.push_back(payload.0);
                    return Ok(Post::Pending);
                }
                Ok(Turn::Waiting) => return Ok(Post::Pending),
                Err(error) => {
                    // Not accepted, so `kill` must not report it.
                    if let Some(incoming) = self.incoming.get_mut(payload.0) {
                        incoming.landing = None;
                    }
                    self.die(error.clone());
                    return Err(error);
                }
            }
        }
    }

    fn release(&mut self, payload: PayloadId) {
        if self.dead.is_some() {
            self.incoming.remove(payload.0);
        } else if let Err(error) = self.let_go(payload.0) {
            self.die(error);
        }
    }

    fn kill(&mut self, error: &LinkError, sink: &mut dyn Sink) {
        self.die(error.clone());
        // The peer sees the end at once, although the descriptor stays open until the drop.
        let _ = rustix::net::shutdown(self.socket.fd(), rustix::net::Shutdown::Both);
        for queue in [&mut self.landing, &mut self.pushing] {
            queue.clear();
        }
        self.backlog.clear();
        self.outgoing_by_class = [0; Class::COUNT];
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
    }

    fn flushed(&self) -> bool {
        self.backlog.is_empty() && self.outgoing.is_empty()
    }

    fn check(&mut self) -> Result<bool, LinkError> {
        // A death found here is reported by `poll`, after what the peer wrote before it.
        self.look_for_death()?;
        Ok(false)
    }

    fn counters(&self) -> LinkCounters {
        LinkCounters { wakes_sent: self.ring.bell().rung, ..self.counters }
    }
}

impl ShmLink {
    #[inline(never)]
    fn poll_busy(
        &mut self,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<Progress, LinkError> {
        self.ring.wake_up();
        let mut moved = self.ring.room_appeared()?;
        moved |= self.flush_backlog()?;
        moved |= self.read_ring(budget, sink)?;
        if self.attention {
            moved |= self.land_turns(budget, sink)?;
            moved |= self.push_turns(budget)?;
        }
        self.ring.publish_if_wanted();
        let more = !self.ring.is_empty() || self.has_work();
        self.attention = !self.backlog.is_empty()
            || self.ring.is_wanting()
            || self.dead.is_some()
            || !self.landing.is_empty()
            || !self.pushing.is_empty();
        match &self.dead {
            // What the peer wrote before its end is read first.
            Some(error) if !more => Err(error.clone()),
            _ if more => Ok(Progress::More),
            _ if moved => Ok(Progress::Some),
            _ => Ok(Progress::Idle),
        }
    }

    /// Asks to be woken by the peer's wake.
    fn register_event(&mut self, cx: &mut Context<'_>) -> Result<Armed, LinkError> {
        for _ in 0..EVENTS_MAX {
            // Edge-triggered: the counter need not be read.
            match self.event.poll_read(cx, |_| Ok(Attempt::Drained(()))) {
                Poll::Pending => return Ok(Armed::Yes),
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => {
                    return Err(LinkError::io(LinkKind::Shm, "waiting for the peer", &error));
                }
            }
        }
        Ok(Armed::Busy)
    }

    /// Asks to be woken by the peer's death, or by a segment that it passes.
    fn register_death(&mut self, cx: &mut Context<'_>) -> Result<Armed, LinkError> {
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
        loop {
            match self.socket.poll_read(cx, |fd| socket::receive(fd).map(Attempt::More)) {
                Poll::Pending => return Ok(Armed::Yes),
                Poll::Ready(Ok(Some(packet))) => self.take_segment(packet)?,
                Poll::Ready(Ok(None)) => {
                    self.die(self.gone("closed the connection"));
                    return Ok(Armed::Busy);
                }
                Poll::Ready(Err(error)) => {
                    self.socket_failed(&error)?;
                    return Ok(Armed::Busy);
                }
            }
        }
    }
}

/// What a hostile peer would do.
#[cfg(test)]
impl ShmLink {
    /// Writes a record as it is given.
    pub(super) fn forge(&mut self, flags: u32, bytes: &[u8]) {
        assert!(self.ring.push(flags, bytes.len(), 0, [bytes].into_iter()).expect("sound"));
    }

    /// Sends a packet over the Unix socket.
    pub(super) fn forge_packet(&mut self, bytes: &[u8], fds: &[std::os::fd::BorrowedFd<'_>]) {
        socket::send(self.socket.fd(), bytes, fds).expect("sent");
    }

    pub(super) fn passed(&mut self, block: &SharedBlock, arena: bool) {
        self.pass_segment(block, arena).expect("passed");
    }
}
