//! An in-process link for tests, which misbehaves as it is told.
//!
//! Two halves in one process share a [`Pair`] behind a mutex: queues of parcels, one a class and
//! direction, and lists of completions. Payloads are read straight out of the sender's memory
//! while the mutex is held, so that a half that is killed takes its memory back for good. Within
//! the contract of [`Link`], a [`MockPlan`] makes it late, disorderly, cramped or broken; and the
//! link checks what the contract asks of its user, answering a breach with a protocol error.
//!
//! It must not know what a parcel means. Its choices follow from the plan's seed and from the
//! order of the calls.

use std::cell::Cell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::task::{Context, Waker};

use smallvec::SmallVec;

use super::{
    Armed, Arrival, Budget, COPIED_MAX, Caps, Class, Disposition, HEAD_MAX, How, Killed, Landing,
    Link, LinkCounters, LinkKind, Mapping, OneSided, OpId, PayloadId, Post, Progress, RawView,
    Registration, RemoteId, Segment, SegmentMut, Sink,
};
use crate::error::{ErrorKind, LinkError};
use crate::memory::{SharedBlock, racy_read, racy_write};

/// How far ahead an unordered link looks for the parcel to deliver next.
const REORDER_WINDOW: usize = 16;

/// How a mock link misbehaves. The default behaves well.
///
/// ```
/// use thalweg::{Config, LinkKind, MockPlan};
/// let plan = MockPlan::new().seed(7).unordered(true).delay_polls(3);
/// let config = Config::new().transports([LinkKind::Mock]).mock(plan);
/// # let _ = config;
/// ```
#[derive(Clone, Debug)]
pub struct MockPlan {
    seed: u64,
    drop_after: Option<u64>,
    delay_polls: u32,
    reorder_completions: bool,
    unordered: bool,
    capacity: usize,
    views: bool,
    inline_max: usize,
    eager_max: usize,
    direct: bool,
    direct_max: usize,
    switch: Option<MockSwitch>,
}

impl Default for MockPlan {
    fn default() -> Self {
        MockPlan {
            seed: 1,
            drop_after: None,
            delay_polls: 0,
            reorder_completions: false,
            unordered: false,
            capacity: 1024,
            views: true,
            inline_max: 2048,
            eager_max: 64 << 10,
            direct: false,
            direct_max: 0,
            switch: None,
        }
    }
}

macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $type:ty;)*) => {
        $(
            $(#[$doc])*
            pub fn $name(mut self, $name: $type) -> Self {
                self.$name = $name;
                self
            }
        )*
    };
}

impl MockPlan {
    /// A plan that behaves well.
    pub fn new() -> Self {
        MockPlan::default()
    }

    setters! {
        /// What random choices begin with. The same seed and calls give the same choices.
        seed: u64;
        /// The link breaks when this side has posted so many parcels. Default: never.
        drop_after: Option<u64>;
        /// Completions are reported this many polls late. Default: 0.
        delay_polls: u32;
        /// Completions that are due together are reported in random order. Default: no.
        reorder_completions: bool;
        /// Parcels of one class, `Control` excepted, are delivered in random order. Default: no.
        unordered: bool;
        /// A class takes no more parcels than this before the peer takes some; at least 1.
        /// Default: 1024.
        capacity: usize;
        /// Loans arrive as views. Default: yes.
        views: bool;
        /// Payloads up to this many bytes are copied when posted and arrive in line with their
        /// head; 0: none is, and every payload has to be landed. Default: 2 KiB.
        inline_max: usize;
        /// Payloads up to this many bytes may be posted eagerly although nobody waits for them.
        /// Default: 64 KiB.
        eager_max: usize;
        /// The link puts and gets by itself. Default: no.
        direct: bool;
        /// So many of these it does, and fails with the next one; 0: it does not fail. Default: 0.
        direct_max: usize;
    }

    /// Lets `switch` break or pause the links made with this plan.
    pub fn switch(mut self, switch: &MockSwitch) -> Self {
        self.switch = Some(switch.clone());
        self
    }
}

/// Commands mock links while they run. Clones command the same links.
#[derive(Clone, Debug, Default)]
pub struct MockSwitch(Arc<Mutex<Commanded>>);

#[derive(Debug, Default)]
struct Commanded {
    pairs: Vec<Weak<Pair>>,
    paused: bool,
    refused: bool,
}

impl MockSwitch {
    /// A switch that commands no link yet.
    pub fn new() -> Self {
        MockSwitch::default()
    }

    /// Breaks every link that is up: both sides get an error.
    pub fn break_links(&self) {
        for pair in self.pairs() {
            let mut shared = pair.lock();
            shared.broken.get_or_insert("broken on command");
            wake(shared);
        }
    }

    /// From now on links cannot be set up, or can again.
    pub fn refuse(&self, refused: bool) {
        lock(&self.0).refused = refused;
    }

    /// Nothing moves any more, or again. Neither side is told: it is like a peer that is stopped.
    pub fn pause(&self, paused: bool) {
        lock(&self.0).paused = paused;
        for pair in self.pairs() {
            let mut shared = pair.lock();
            shared.paused = paused;
            wake(shared);
        }
    }

    /// Links that end linger, or do no longer: they are not through with their memory.
    pub fn linger(&self, lingers: bool) {
        for pair in self.pairs() {
            let mut shared = pair.lock();
            shared.lingers = lingers;
            wake(shared);
        }
    }

    fn pairs(&self) -> Vec<Arc<Pair>> {
        lock(&self.0).pairs.iter().filter_map(Weak::upgrade).collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sixteen bytes that are the same for all nodes of this process, and for no others.
pub(crate) fn blob() -> Vec<u8> {
    static PROCESS: OnceLock<(u32, [u8; 16])> = OnceLock::new();
    let (pid, bytes) = PROCESS.get_or_init(|| {
        let mut bytes = [0; 16];
        // Without random numbers no node can be made; this is never the first to notice.
        let _ = getrandom::fill(&mut bytes);
        (std::process::id(), bytes)
    });
    let mut bytes = bytes.to_vec();
    // A forked child is another process.
    for (byte, other) in bytes.iter_mut().zip((pid ^ std::process::id()).to_le_bytes()) {
        *byte ^= other;
    }
    bytes
}

/// Halves that wait for the other one, by the session's token.
static WAITING: Mutex<Option<HashMap<[u8; 16], Arc<Pair>>>> = Mutex::new(None);

/// One half of a link. The first to call with a token makes the link, the second one completes it.
pub(crate) fn pair(
    token: [u8; 16],
    plan: &MockPlan,
    peer_blob: Option<&[u8]>,
) -> Result<MockLink, String> {
    if peer_blob != Some(blob().as_slice()) {
        return Err("the peer is another process".into());
    }
    if let Some(switch) = &plan.switch
        && lock(&switch.0).refused
    {
        return Err("refused on command".into());
    }
    let mut waiting = lock(&WAITING);
    let waiting = waiting.get_or_insert_default();
    let (pair, side) = match waiting.remove(&token) {
        Some(pair) => (pair, 1),
        None => {
            let pair = Arc::new(Pair(Mutex::default()));
            waiting.insert(token, pair.clone());
            (pair, 0)
        }
    };
    if let Some(switch) = &plan.switch {
        let mut commanded = lock(&switch.0);
        commanded.pairs.retain(|known| known.strong_count() > 0);
        commanded.pairs.push(Arc::downgrade(&pair));
        pair.lock().paused |= commanded.paused;
    }
    Ok(MockLink::new(token, plan, pair, side))
}

#[derive(Debug)]
struct Pair(Mutex<Shared>);

impl Pair {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        lock(&self.0)
    }
}

#[derive(Debug, Default)]
struct Shared {
    /// What side 0 sent to side 1, and what side 1 sent to side 0.
    ways: [Way; 2],
    wakers: [Option<Waker>; 2],
    /// Memory that each side has registered for the other, by number.
    regions: [HashMap<u32, Region>; 2],
    next_region: u32,
    broken: Option<&'static str>,
    paused: bool,
    lingers: bool,
}

/// Wakes both sides, outside of the lock.
fn wake(mut shared: MutexGuard<'_, Shared>) {
    let wakers = [shared.wakers[0].take(), shared.wakers[1].take()];
    drop(shared);
    wakers.into_iter().flatten().for_each(Waker::wake);
}

#[derive(Debug, Default)]
struct Way {
    queues: [VecDeque<Parcel>; Class::COUNT],
    /// Payloads of taken parcels that the receiver is not finished with.
    open: HashMap<u64, Payload>,
    /// Landings under way: bytes that have not left the sender yet.
    landings: usize,
    /// Posts of the sender that are over.
    over: VecDeque<OpId>,
    /// The sender was refused for lack of room.
    starved: bool,
}

impl Way {
    /// Whether the receiver has taken everything that a later control parcel must not overtake,
    /// and the bytes of what it is landing.
    fn flushed(&self) -> bool {
        let waits = |class: Class| !self.queues[class as usize].is_empty();
        self.landings == 0 && !waits(Class::Message) && !waits(Class::Tag)
    }
}

/// A view is the sender's own block, which the view keeps.
impl Mapping for SharedBlock {
    fn trusted(&self) -> bool {
        true
    }
}

#[derive(Debug)]
struct Parcel {
    head: SmallVec<[u8; 64]>,
    id: u64,
    how: How,
    payload: Payload,
}

#[derive(Debug)]
struct Payload {
    /// The sender's operation, if it was answered `Pending`.
    op: Option<OpId>,
    bytes: Bytes,
    len: u64,
    blocks: Option<Vec<SharedBlock>>,
}

#[derive(Debug)]
enum Bytes {
    Copied(Vec<u8>),
    /// The sender's memory, which stays until its operation is reported over.
    Lent(Vec<(*const u8, usize)>),
}

// SAFETY: the pointers are followed only while the pair's mutex is held and the sender's post is
// not over: until then its memory stays valid, by the contract of `Link::post`. `kill` removes
// them under the same mutex.
unsafe impl Send for Bytes {}

impl Payload {
    /// Copies bytes from `offset` on.
    ///
    /// # Safety
    ///
    /// `to` is valid for writing `len` bytes, which lie within the payload, and the pair's mutex
    /// has been held since the payload was found in the pair.
    unsafe fn copy(&self, offset: usize, to: *mut u8, len: usize) {
        let one;
        let pieces: &[(*const u8, usize)] = match &self.bytes {
            Bytes::Copied(bytes) => {
                one = [(bytes.as_ptr(), bytes.len())];
                &one
            }
            Bytes::Lent(pieces) => pieces,
        };
        let (mut skip, mut done) = (offset, 0);
        for &(from, piece) in pieces {
            if skip >= piece {
                skip -= piece;
                continue;
            }
            let part = (piece - skip).min(len - done);
            // SAFETY: `part` bytes from `skip` lie within the piece, which is valid (see `Bytes`);
            // `to` is the caller's promise. The two may be the same only if a test sends a buffer
            // to itself, so `copy` and not `copy_nonoverlapping`.
            unsafe { std::ptr::copy(from.add(skip), to.add(done), part) };
            skip = 0;
            done += part;
            if done == len {
                break;
            }
        }
    }
}

/// A landing under way on this side.
struct Job {
    payload: u64,
    to: Landing,
    op: OpId,
    moved: usize,
}

/// Registered memory.
#[derive(Debug)]
struct Region {
    ptr: *mut u8,
    len: usize,
    read: bool,
    write: bool,
}

// SAFETY: followed only while the pair's mutex is held and the region is in its table, which its
// registration takes it out of under that mutex; until then the driver keeps the memory.
unsafe impl Send for Region {}

/// See [`OneSided::register`].
struct Registered {
    pair: Arc<Pair>,
    side: usize,
    number: u32,
    grant: [u8; 4],
}

impl Registration for Registered {
    fn grant(&self) -> &[u8] {
        &self.grant
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.pair.lock().regions[self.side].remove(&self.number);
    }
}

/// A put or get that the link does by itself.
struct Direct {
    due: u64,
    op: OpId,
    /// Memory of the operation's, and whether it is written.
    ptr: *mut u8,
    len: usize,
    put: bool,
    region: u32,
    offset: u64,
}

/// Something to report, and in which poll.
struct Late {
    due: u64,
    op: OpId,
}

/// One half; see the module.
pub(crate) struct MockLink {
    token: [u8; 16],
    plan: MockPlan,
    caps: Caps,
    pair: Arc<Pair>,
    side: usize,
    random: u64,
    polls: u64,
    posted: u64,
    /// Own posts that are not over, by payload.
    pending: HashMap<u64, OpId>,
    jobs: VecDeque<Job>,
    late: Vec<Late>,
    /// What this side puts and gets by itself and has not done yet.
    direct: Vec<Direct>,
    /// How many it has begun.
    directs: usize,
    /// Those that are to fail.
    failing: Vec<OpId>,
    /// One has failed: nothing more may be begun.
    direct_over: bool,
    /// The peer's regions that are open here.
    opened: HashSet<u32>,
    counters: LinkCounters,
    /// Somebody was told that not everything is flushed: when it is, that is worth a poll.
    flush_awaited: Cell<bool>,
    dead: bool,
}

// SAFETY: the pointers of landings and of direct operations are the driver's, valid from any
// thread until reported done.
unsafe impl Send for MockLink {}

impl MockLink {
    fn new(token: [u8; 16], plan: &MockPlan, pair: Arc<Pair>, side: usize) -> Self {
        let caps = Caps {
            eager_max: plan.eager_max,
            ways: format!(
                "within one process, as planned by a test: in line ≤ {} bytes, else one copy",
                plan.inline_max
            ),
        };
        MockLink {
            token,
            caps,
            pair,
            side,
            random: plan.seed,
            plan: plan.clone(),
            polls: 0,
            posted: 0,
            pending: HashMap::new(),
            jobs: VecDeque::new(),
            late: Vec::new(),
            direct: Vec::new(),
            directs: 0,
            failing: Vec::new(),
            direct_over: false,
            opened: HashSet::new(),
            counters: LinkCounters::default(),
            flush_awaited: Cell::new(false),
            dead: false,
        }
    }

    /// SplitMix64.
    fn below(&mut self, bound: usize) -> usize {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound.max(1) as u64) as usize
    }

    fn check_alive(&self, shared: &Shared) -> Result<(), LinkError> {
        match shared.broken {
            Some(why) => Err(LinkError::new(ErrorKind::ConnectionLost, LinkKind::Mock, why)),
            None if self.dead => Err(breach("used after its end")),
            None => Ok(()),
        }
    }

    /// The poll in which what begins now is due.
    fn due(&self) -> u64 {
        self.polls + u64::from(self.plan.delay_polls)
    }

    fn later(&mut self, op: OpId) {
        if op != OpId::NONE {
            self.late.push(Late { due: self.due(), op });
        }
    }

    /// Reports what is due.
    fn report(&mut self, sink: &mut dyn Sink) -> bool {
        let polls = self.polls;
        let mut due: Vec<OpId> = Vec::new();
        self.late.retain(|late| {
            let is_due = late.due <= polls;
            if is_due {
                due.push(late.op);
            }
            !is_due
        });
        if self.plan.reorder_completions {
            for left in (1..due.len()).rev() {
                let other = self.below(left + 1);
                due.swap(left, other);
            }
        }
        for op in &due {
            sink.done(*op, Ok(()));
        }
        !due.is_empty()
    }

    /// Does the puts and gets that are due, in any order if that is planned.
    fn reach(&mut self) -> Result<bool, LinkError> {
        let mut any = false;
        while let Some(at) = self.next_direct() {
            // One that fails is reported by the end of the link.
            self.do_direct(&self.direct[at])?;
            let direct = self.direct.remove(at);
            self.later(direct.op);
            any = true;
        }
        Ok(any)
    }

    /// Ends the puts and gets that are to fail.
    fn fail_some(&mut self, sink: &mut dyn Sink) -> bool {
        self.direct_over |= !self.failing.is_empty();
        let any = !self.failing.is_empty();
        for op in self.failing.drain(..) {
            let detail = "a put or get that is to fail";
            sink.done(op, Err(LinkError::new(ErrorKind::ConnectionLost, LinkKind::Mock, detail)));
        }
        any
    }

    fn next_direct(&mut self) -> Option<usize> {
        let polls = self.polls;
        let due = self.direct.iter().filter(|direct| direct.due <= polls).count();
        // Those that are due come first: they were put in in the order of their polls.
        let at = if self.plan.unordered { self.below(due) } else { 0 };
        (due > 0).then_some(at)
    }

    fn do_direct(&self, direct: &Direct) -> Result<(), LinkError> {
        let shared = self.pair.lock();
        self.check_alive(&shared)?;
        let Some(region) = shared.regions[1 - self.side].get(&direct.region) else {
            return Err(breach("a region is reached that its owner has taken back"));
        };
        if !self.opened.contains(&direct.region) {
            return Err(breach("a region was closed while it was in use"));
        }
        let end = direct.offset.checked_add(direct.len as u64);
        let allowed = if direct.put { region.write } else { region.read };
        if !allowed || end.is_none_or(|end| end > region.len as u64) {
            return Err(breach("a region is reached in a way that was not granted"));
        }
        // SAFETY: in bounds, by the check above.
        let remote = unsafe { region.ptr.add(direct.offset as usize) };
        if direct.put {
            // SAFETY: valid until reported done, by the contract of `OneSided::put`.
            let from = unsafe { std::slice::from_raw_parts(direct.ptr, direct.len) };
            // SAFETY: see `Region`; raw, because the region's owner and others may race.
            unsafe { racy_write(remote, from) };
        } else {
            // SAFETY: valid and nobody else's until reported done, by that of `OneSided::get`.
            let to = unsafe { std::slice::from_raw_parts_mut(direct.ptr, direct.len) };
            // SAFETY: as above.
            unsafe { racy_read(remote, to) };
        }
        Ok(())
    }

    /// Does a put or get now, or later.
    fn begin_direct(&mut self, direct: Direct) -> Result<Post, LinkError> {
        self.check_alive(&self.pair.lock())?;
        if !self.opened.contains(&direct.region) || direct.len == 0 {
            return Err(breach("a region is reached that is not open, or for nothing"));
        }
        if self.direct.len() >= self.plan.capacity.max(1) {
            self.counters.stalls += 1;
            return Ok(Post::Full);
        }
        if self.direct_over {
            return Err(breach("a region is reached after that has failed"));
        }
        self.posted += 1;
        self.directs += 1;
        if self.plan.direct_max > 0 && self.directs > self.plan.direct_max {
            self.failing.push(direct.op);
            return Ok(Post::Pending);
        }
        let paused = self.pair.lock().paused;
        if self.plan.delay_polls == 0 && self.posted.is_multiple_of(2) && !paused {
            self.do_direct(&direct)?;
            return Ok(Post::Done);
        }
        self.direct.push(direct);
        Ok(Post::Pending)
    }

    /// The next parcel: control first, then the classes in turn.
    fn next_parcel(&mut self, shared: &mut Shared) -> Option<Parcel> {
        let queues = &mut shared.ways[1 - self.side].queues;
        if let Some(parcel) = queues[Class::Control as usize].pop_front() {
            return Some(parcel);
        }
        let first =
            if self.plan.unordered { self.below(Class::COUNT) } else { self.polls as usize };
        let class = (0..Class::COUNT)
            .map(|turn| (first + turn) % Class::COUNT)
            .find(|class| !queues[*class].is_empty())?;
        let ahead = queues[class].len().min(REORDER_WINDOW);
        let at = if self.plan.unordered { self.below(ahead) } else { 0 };
        shared.ways[1 - self.side].queues[class].remove(at)
    }

    /// Hands one parcel up.
    fn deliver(&mut self, parcel: Parcel, sink: &mut dyn Sink) -> Result<(), LinkError> {
        let Parcel { head, id, how, payload } = parcel;
        let len = payload.len;
        let mut views: Option<SmallVec<[RawView; 2]>> = payload.blocks.as_ref().map(|blocks| {
            let view = |block: &SharedBlock| RawView {
                ptr: block.as_slice().as_ptr(),
                len: block.len(),
                keep: Arc::new(block.clone()),
            };
            blocks.iter().map(view).collect()
        });
        let inline = match &payload.bytes {
            Bytes::Copied(bytes) if how == How::Eager && self.plan.inline_max > 0 => {
                Some(bytes.clone())
            }
            _ => None,
        };
        let op = payload.op;
        self.counters.parcels_received += 1;
        self.pair.lock().ways[1 - self.side].open.insert(id, payload);
        let arrival = Arrival {
            head: &head,
            len,
            payload: PayloadId(id),
            inline: inline.as_deref(),
            views: views.as_mut(),
            how,
        };
        match sink.parcel(arrival) {
            Disposition::Taken if len == 0 || inline.is_some() => {
                self.counters.inline_bytes_received += len;
                self.close_payload(id, op);
            }
            Disposition::Land { to, op, .. } => self.begin(id, to, op)?,
            Disposition::View if views.is_some() => {
                self.counters.loaned_bytes_received += len;
            }
            Disposition::Hold if how == How::Offer => {}
            Disposition::Discard => self.close_payload(id, op),
            Disposition::Fatal(error) => return Err(error),
            Disposition::Taken => return Err(breach("taken, but it was not here")),
            Disposition::View => return Err(breach("viewed, but there are no views")),
            Disposition::Hold => return Err(breach("held, but it was no offer")),
        }
        Ok(())
    }

    fn close_payload(&mut self, id: u64, op: Option<OpId>) {
        let mut shared = self.pair.lock();
        let way = &mut shared.ways[1 - self.side];
        if way.open.remove(&id).is_some() {
            way.over.extend(op);
        }
        let waker = shared.wakers[1 - self.side].take();
        drop(shared);
        waker.into_iter().for_each(Waker::wake);
    }

    fn begin(&mut self, payload: u64, to: Landing, op: OpId) -> Result<(), LinkError> {
        let len = to.iter().map(|piece| piece.len as u64).sum::<u64>();
        // Known before anything can fail: the operation ends with the link at the latest.
        self.jobs.push_back(Job { payload, to, op, moved: 0 });
        let mut shared = self.pair.lock();
        self.check_alive(&shared)?;
        let way = &mut shared.ways[1 - self.side];
        let Some(open) = way.open.get(&payload) else {
            return Err(breach("landed, but it is not open"));
        };
        if len != open.len {
            return Err(breach("landed in memory of another length"));
        }
        way.landings += 1;
        Ok(())
    }

    /// Moves landings on, within the budget.
    fn land_some(&mut self, budget: &mut Budget) -> Result<bool, LinkError> {
        let mut any = false;
        while let Some(mut job) = self.jobs.pop_front() {
            let mut shared = self.pair.lock();
            let alive = self.check_alive(&shared);
            let way = &mut shared.ways[1 - self.side];
            let payload = match (alive, way.open.get(&job.payload)) {
                (Ok(()), Some(payload)) => payload,
                (alive, _) => {
                    // It ends with the link.
                    self.jobs.push_front(job);
                    return Err(alive
                        .err()
                        .unwrap_or_else(|| breach("released while it was landing")));
                }
            };
            let from = job.moved;
            let part = (payload.len as usize - from).min(budget.bytes);
            let (mut skip, mut done) = (from, 0);
            for piece in &job.to {
                if skip >= piece.len {
                    skip -= piece.len;
                    continue;
                }
                let bytes = (piece.len - skip).min(part - done);
                // SAFETY: within the destination, which the driver keeps valid until reported
                // done; within the payload, whose length was compared with the destinations' in
                // `begin`; the mutex is held since the payload was found.
                unsafe { payload.copy(from + done, piece.ptr.add(skip), bytes) };
                skip = 0;
                done += bytes;
            }
            job.moved += part;
            budget.bytes -= part;
            self.counters.single_copy_bytes_received += part as u64;
            any = true;
            if job.moved < payload.len as usize {
                drop(shared);
                self.jobs.push_front(job);
                break;
            }
            let over = payload.op;
            way.landings -= 1;
            drop(shared);
            self.close_payload(job.payload, over);
            self.later(job.op);
        }
        Ok(any)
    }

    /// Takes over what the peer has finished with.
    fn take_over(&mut self) -> Result<(bool, bool), LinkError> {
        let pair = self.pair.clone();
        let mut shared = pair.lock();
        self.check_alive(&shared)?;
        if shared.paused {
            return Ok((false, true));
        }
        let room = self.has_room(&shared);
        let way = &mut shared.ways[self.side];
        let mut any = std::mem::take(&mut way.starved) && room;
        way.starved |= !any && !room;
        for op in way.over.drain(..) {
            any = true;
            self.pending.retain(|_, known| *known != op);
            self.late.push(Late { due: self.due(), op });
        }
        Ok((any, false))
    }

    fn has_room(&self, shared: &Shared) -> bool {
        let queues = &shared.ways[self.side].queues;
        queues.iter().skip(1).all(|queue| queue.len() < self.plan.capacity.max(1))
    }

    fn has_work(&self, shared: &Shared) -> bool {
        let coming = &shared.ways[1 - self.side];
        let going = &shared.ways[self.side];
        !self.late.is_empty()
            || !self.jobs.is_empty()
            || !self.direct.is_empty()
            || !self.failing.is_empty()
            || coming.queues.iter().any(|queue| !queue.is_empty())
            || !going.over.is_empty()
            || going.starved && self.has_room(shared)
            || self.flush_awaited.get() && going.flushed()
    }

    fn copies(&self, len: usize) -> bool {
        len <= COPIED_MAX.max(self.plan.inline_max)
    }
}

fn breach(what: &str) -> LinkError {
    LinkError::protocol(LinkKind::Mock, format!("the link's user broke its contract: {what}"))
}

fn copy_out(payload: &[Segment<'_>], len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    for segment in payload.iter().filter(|segment| segment.len > 0) {
        // SAFETY: the caller of `post` promises readable segments during the call.
        bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(segment.ptr, segment.len) });
    }
    bytes
}

impl Link for MockLink {
    fn kind(&self) -> LinkKind {
        LinkKind::Mock
    }

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn poll(
        &mut self,
        _: &mut Context<'_>,
        _: bool,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<Progress, LinkError> {
        self.polls += 1;
        self.flush_awaited.set(false);
        let (mut any, paused) = self.take_over()?;
        if paused {
            return Ok(Progress::Idle);
        }
        any |= self.land_some(budget)?;
        any |= self.reach()?;
        any |= self.fail_some(sink);
        while budget.parcels > 0 {
            let pair = self.pair.clone();
            let mut shared = pair.lock();
            self.check_alive(&shared)?;
            let Some(parcel) = self.next_parcel(&mut shared) else { break };
            drop(shared);
            budget.parcels -= 1;
            any = true;
            self.deliver(parcel, sink)?;
        }
        any |= self.land_some(budget)?;
        if any {
            wake(self.pair.lock());
        }
        any |= self.report(sink);
        Ok(match any {
            _ if budget.parcels == 0 || budget.bytes == 0 => Progress::More,
            true => Progress::Some,
            false => Progress::Idle,
        })
    }

    fn arm(&mut self, cx: &mut Context<'_>) -> Result<Armed, LinkError> {
        let mut shared = self.pair.lock();
        let old = shared.wakers[self.side].replace(cx.waker().clone());
        let alive = self.check_alive(&shared);
        let busy = !shared.paused && self.has_work(&shared);
        drop(shared);
        drop(old);
        alive?;
        Ok(if busy { Armed::Busy } else { Armed::Yes })
    }

    fn post(
        &mut self,
        op: OpId,
        class: Class,
        how: How,
        head: &[u8],
        payload: &[Segment<'_>],
    ) -> Result<Post, LinkError> {
        let len: usize = payload.iter().map(|segment| segment.len).sum();
        if head.len() > HEAD_MAX {
            return Err(breach("a head that is too long"));
        }
        if how == How::Eager && class == Class::Tag && len > self.caps.eager_max {
            return Err(breach("more than may be eager"));
        }
        let mut shared = self.pair.lock();
        self.check_alive(&shared)?;
        let queued = shared.ways[self.side].queues[class as usize].len();
        if class != Class::Control && queued >= self.plan.capacity.max(1) {
            shared.ways[self.side].starved = true;
            self.counters.stalls += 1;
            return Ok(Post::Full);
        }
        self.posted += 1;
        self.counters.parcels_sent += 1;
        if self.plan.drop_after.is_some_and(|after| self.posted > after) {
            shared.broken = Some("broken as planned");
            wake(shared);
            return Err(LinkError::new(
                ErrorKind::ConnectionLost,
                LinkKind::Mock,
                "broken as planned",
            ));
        }
        let loans: Option<Vec<SharedBlock>> =
            payload.iter().map(|segment| segment.shared.cloned()).collect();
        let blocks = loans.filter(|loans| self.plan.views && !loans.is_empty() && len > 0);
        let copied = self.copies(len) && blocks.is_none();
        // Both answers are allowed for what was copied; a link that is late gives both.
        let done = copied
            && (op == OpId::NONE || self.plan.delay_polls == 0 || self.posted.is_multiple_of(2));
        let bytes = if copied {
            self.counters.inline_bytes_sent += len as u64;
            Bytes::Copied(copy_out(payload, len))
        } else {
            if blocks.is_some() {
                self.counters.loaned_bytes_sent += len as u64;
            }
            Bytes::Lent(payload.iter().map(|segment| (segment.ptr, segment.len)).collect())
        };
        let id = self.posted;
        if !done {
            self.pending.insert(id, op);
        }
        let payload = Payload { op: (!done).then_some(op), bytes, len: len as u64, blocks };
        let parcel = Parcel { head: SmallVec::from_slice(head), id, how, payload };
        shared.ways[self.side].queues[class as usize].push_back(parcel);
        let waker = shared.wakers[1 - self.side].take();
        drop(shared);
        waker.into_iter().for_each(Waker::wake);
        Ok(if done { Post::Done } else { Post::Pending })
    }

    fn land(&mut self, payload: PayloadId, to: Landing, op: OpId) -> Result<Post, LinkError> {
        self.begin(payload.0, to, op)?;
        Ok(Post::Pending)
    }

    fn release(&mut self, payload: PayloadId) {
        let op = self.pair.lock().ways[1 - self.side].open.get(&payload.0).and_then(|open| open.op);
        self.close_payload(payload.0, op);
    }

    fn kill(&mut self, error: &LinkError, sink: &mut dyn Sink) -> Killed {
        let mut shared = self.pair.lock();
        shared.broken.get_or_insert("the other side has ended");
        if shared.lingers {
            wake(shared);
            self.dead = true;
            return Killed::Lingers;
        }
        // From here on the peer does not look at our memory, nor we at its.
        let way = &mut shared.ways[self.side];
        way.queues.iter_mut().for_each(VecDeque::clear);
        way.open.clear();
        let over = std::mem::take(&mut way.over);
        shared.ways[1 - self.side].landings = 0;
        shared.regions[self.side].clear();
        wake(shared);
        self.dead = true;
        for op in over {
            self.pending.retain(|_, known| *known != op);
            sink.done(op, Ok(()));
        }
        for late in self.late.drain(..) {
            sink.done(late.op, Ok(()));
        }
        for job in self.jobs.drain(..) {
            sink.done(job.op, Err(error.clone()));
        }
        self.opened.clear();
        for op in self.direct.drain(..).map(|direct| direct.op).chain(self.failing.drain(..)) {
            sink.done(op, Err(error.clone()));
        }
        for (_, op) in self.pending.drain() {
            sink.done(op, Err(error.clone()));
        }
        Killed::Over
    }

    fn flushed(&self) -> bool {
        let flushed = self.pair.lock().ways[self.side].flushed();
        self.flush_awaited.set(!flushed);
        flushed
    }

    fn counters(&self) -> LinkCounters {
        self.counters
    }

    fn one_sided(&mut self) -> Option<&mut dyn OneSided> {
        self.plan.direct.then_some(self)
    }
}

impl OneSided for MockLink {
    fn way(&self) -> &'static str {
        "the link itself"
    }

    fn domain(&self) -> usize {
        // Two nodes of one pair are two domains.
        Arc::as_ptr(&self.pair).addr() + self.side
    }

    fn register(
        &mut self,
        memory: SegmentMut,
        read: bool,
        write: bool,
    ) -> Result<Arc<dyn Registration>, LinkError> {
        let mut shared = self.pair.lock();
        self.check_alive(&shared)?;
        let number = shared.next_region;
        shared.next_region += 1;
        let region = Region { ptr: memory.ptr, len: memory.len, read, write };
        shared.regions[self.side].insert(number, region);
        let (pair, side, grant) = (self.pair.clone(), self.side, number.to_le_bytes());
        Ok(Arc::new(Registered { pair, side, number, grant }))
    }

    fn open(&mut self, grant: &[u8]) -> Result<RemoteId, LinkError> {
        let number = grant.try_into().map(u32::from_le_bytes);
        let number = number.map_err(|_| breach("a grant of another length"))?;
        match self.opened.insert(number) {
            true => Ok(RemoteId(number)),
            false => Err(breach("a region is opened twice")),
        }
    }

    fn close(&mut self, remote: RemoteId) {
        // Whoever closes too early is told when it is due.
        self.opened.remove(&remote.0);
    }

    fn put(
        &mut self,
        op: OpId,
        from: Segment<'_>,
        to: RemoteId,
        offset: u64,
    ) -> Result<Post, LinkError> {
        let (ptr, len, due) = (from.ptr.cast_mut(), from.len, self.due());
        self.begin_direct(Direct { due, op, ptr, len, put: true, region: to.0, offset })
    }

    fn get(
        &mut self,
        op: OpId,
        to: SegmentMut,
        from: RemoteId,
        offset: u64,
    ) -> Result<Post, LinkError> {
        let SegmentMut { ptr, len, .. } = to;
        let due = self.due();
        self.begin_direct(Direct { due, op, ptr, len, put: false, region: from.0, offset })
    }
}

impl Drop for MockLink {
    fn drop(&mut self) {
        let waiting = lock(&WAITING).as_mut().and_then(|waiting| {
            let ours = waiting.get(&self.token).is_some_and(|pair| Arc::ptr_eq(pair, &self.pair));
            if ours { waiting.remove(&self.token) } else { None }
        });
        drop(waiting);
        let mut shared = self.pair.lock();
        shared.broken.get_or_insert("the other side has ended");
        shared.ways[self.side].queues.iter_mut().for_each(VecDeque::clear);
        shared.ways[self.side].open.clear();
        shared.regions[self.side].clear();
        wake(shared);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryKind;

    /// Takes what is in line, lands the rest in memory of its own, and remembers.
    #[derive(Default)]
    struct Remember {
        heads: Vec<Vec<u8>>,
        done: Vec<(OpId, bool)>,
        landed: Vec<Box<[u8]>>,
    }

    impl Sink for Remember {
        fn parcel(&mut self, arrival: Arrival<'_>) -> Disposition {
            self.heads.push(arrival.head.to_vec());
            if arrival.inline.is_some() || arrival.len == 0 {
                return Disposition::Taken;
            }
            let mut memory = vec![0; arrival.len as usize].into_boxed_slice();
            let (ptr, len) = (memory.as_mut_ptr(), memory.len());
            self.landed.push(memory);
            let to =
                smallvec::smallvec![super::super::SegmentMut { ptr, len, kind: MemoryKind::Host }];
            Disposition::Land { to, op: op(1000 + self.landed.len() as u32), lasting: true }
        }

        fn done(&mut self, op: OpId, result: Result<(), LinkError>) {
            self.done.push((op, result.is_ok()));
        }
    }

    fn op(index: u32) -> OpId {
        OpId { index, generation: 1 }
    }

    fn linked(token: u8, plan: &MockPlan) -> (MockLink, MockLink) {
        let half = || pair([token; 16], plan, Some(&blob())).expect("one process");
        (half(), half())
    }

    fn segment(bytes: &[u8]) -> Segment<'_> {
        Segment { ptr: bytes.as_ptr(), len: bytes.len(), kind: MemoryKind::Host, shared: None }
    }

    fn turn(link: &mut MockLink, sink: &mut Remember) -> Result<Progress, LinkError> {
        let mut cx = Context::from_waker(Waker::noop());
        link.poll(&mut cx, false, &mut Budget::TURN.clone(), sink)
    }

    fn post(link: &mut MockLink, index: u32, bytes: &[u8]) -> Result<Post, LinkError> {
        link.post(op(index), Class::Message, How::Eager, &[index as u8], &[segment(bytes)])
    }

    #[test]
    fn only_this_process_can_pair() {
        assert!(pair([1; 16], &MockPlan::new(), Some(&[0; 16])).is_err());
        assert!(pair([1; 16], &MockPlan::new(), None).is_err());
    }

    #[test]
    fn completions_come_once_and_late() {
        let plan = MockPlan::new().delay_polls(3).inline_max(0);
        let (mut one, mut two) = linked(2, &plan);
        let bytes = vec![7; 5000];
        assert_eq!(post(&mut one, 1, &bytes).expect("up"), Post::Pending);
        assert!(!one.flushed());
        let (mut here, mut there) = (Remember::default(), Remember::default());
        for _ in 0..3 {
            turn(&mut two, &mut there).expect("up");
            assert!(there.done.is_empty(), "too early");
            turn(&mut one, &mut here).expect("up");
            assert!(here.done.is_empty(), "too early");
        }
        for _ in 0..5 {
            turn(&mut two, &mut there).expect("up");
            turn(&mut one, &mut here).expect("up");
        }
        assert_eq!((here.done, there.done), (vec![(op(1), true)], vec![(op(1001), true)]));
        assert_eq!(there.landed[0][..], bytes[..]);
        assert!(one.flushed());
    }

    #[test]
    fn order_is_lost_only_when_planned() {
        for (token, unordered) in [(3, false), (4, true)] {
            let (mut one, mut two) = linked(token, &MockPlan::new().unordered(unordered));
            for index in 0..100 {
                assert_eq!(post(&mut one, index, b"x").expect("up"), Post::Done);
            }
            let mut there = Remember::default();
            turn(&mut two, &mut there).expect("up");
            assert_eq!(there.heads.len(), 100);
            assert_eq!(there.heads.is_sorted(), !unordered);
        }
    }

    #[test]
    fn room_ends_for_all_but_control() {
        let (mut one, mut two) = linked(5, &MockPlan::new().capacity(2));
        assert_eq!(post(&mut one, 1, b"x").expect("up"), Post::Done);
        assert_eq!(post(&mut one, 2, b"x").expect("up"), Post::Done);
        assert_eq!(post(&mut one, 3, b"x").expect("up"), Post::Full);
        let control = one.post(OpId::NONE, Class::Control, How::Eager, b"c", &[]);
        assert_eq!(control.expect("up"), Post::Done);
        let mut cx = Context::from_waker(Waker::noop());
        assert_eq!(one.arm(&mut cx).expect("up"), Armed::Yes);
        turn(&mut two, &mut Remember::default()).expect("up");
        assert_eq!(one.arm(&mut cx).expect("up"), Armed::Busy, "there is room again");
        assert_eq!(post(&mut one, 3, b"x").expect("up"), Post::Done);
    }

    #[test]
    fn an_end_reports_everything_and_reaches_the_other_side() {
        let (mut one, mut two) = linked(6, &MockPlan::new());
        let bytes = vec![1; 5000];
        assert_eq!(post(&mut one, 1, &bytes).expect("up"), Post::Pending);
        let mut here = Remember::default();
        one.kill(&breach("enough"), &mut here);
        drop(bytes);
        assert_eq!(here.done, [(op(1), false)]);
        let mut there = Remember::default();
        assert_eq!(turn(&mut two, &mut there).expect_err("over").kind, ErrorKind::ConnectionLost);
        assert!(there.heads.is_empty());
    }

    #[test]
    fn it_breaks_as_planned_and_on_command() {
        let switch = MockSwitch::new();
        let (mut one, mut two) = linked(7, &MockPlan::new().drop_after(Some(1)).switch(&switch));
        assert_eq!(post(&mut one, 1, b"x").expect("up"), Post::Done);
        assert!(post(&mut one, 2, b"x").is_err());
        assert!(turn(&mut two, &mut Remember::default()).is_err());
        let (mut one, mut two) = linked(8, &MockPlan::new().switch(&switch));
        switch.break_links();
        assert!(turn(&mut one, &mut Remember::default()).is_err());
        assert!(turn(&mut two, &mut Remember::default()).is_err());
    }
}
