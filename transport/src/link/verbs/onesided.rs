//! Puts and gets that the adapter carries out, and the regions that a peer's adapter may reach.
//!
//! Whoever puts or gets posts RDMA writes and reads on a queue pair for nothing else. Its other end
//! lies in a protection domain of its own, where only what was granted to this one peer is
//! registered, with the rights of the region. Memory on this side is registered a slice at a time
//! (`registrations`); what is short, and what cannot be registered, goes by buffers of the link's.
//!
//! An adapter may acknowledge a write before its bytes are in memory. So behind the writes of a put
//! goes a read of the peer's *beacon*: adapters answer one request of a queue pair after the other,
//! and reading pushes what was written before it into memory. The put is over when that is.
//!
//! A request that the peer's adapter refuses leaves the queue pair in error. Either one of the two
//! sides is wrong about a key, or the peer is about to end: the kernel takes a process's
//! registrations away before its queue pairs. The operations here end with that error, and the link
//! goes on without them.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use thalweg_ffi::ibverbs as ffi;

use super::buffers::REACH_BUFFERS;
use super::device::{Access, Domain, Registered};
use super::messenger::Messenger;
use super::pool::Slab;
use super::queues::{Completion, Rdma, What};
use super::registrations::{Found, Held, RegionRoom, Registrations, Use};
use super::wire::BUFFER_BYTES;
use crate::error::LinkError;
use crate::link::{LinkCounters, OpId, Registration, RemoteId, SegmentMut};

/// The longest single request, in bytes: short operations take turns with long ones.
const REQUEST_BYTES_MAX: usize = 256 << 10;
/// Shorter memory goes by buffers: copying takes less time than registering.
const DIRECT_BYTES_MIN: usize = 32 << 10;
/// Operations that may be under way.
pub(super) const OPERATIONS_MAX: usize = 1024;
/// Buffers for payloads; one more takes what is read of the beacon, which nobody looks at.
const BUFFERS: usize = REACH_BUFFERS - 1;
const BEACON_BYTES: u32 = 8;
/// How long a registration that will not end is tried to; those after it only once each, until one
/// does end: whoever drops a thousand of them is held up for no longer than that.
const END_PATIENCE: Duration = Duration::from_millis(20);
const END_STEP: Duration = Duration::from_millis(1);
const GRANT_BYTES: usize = 32;

/// What the peer has to know of a region to reach it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Grant {
    address: u64,
    len: u64,
    key: u32,
    beacon: u64,
    beacon_key: u32,
}

impl Grant {
    fn encode(&self) -> [u8; GRANT_BYTES] {
        let mut bytes = [0; GRANT_BYTES];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.len.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.beacon.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.key.to_le_bytes());
        bytes[28..].copy_from_slice(&self.beacon_key.to_le_bytes());
        bytes
    }

    /// `None`: this is no region.
    fn decode(bytes: &[u8]) -> Option<Grant> {
        let bytes: &[u8; GRANT_BYTES] = bytes.try_into().ok()?;
        let long = |at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        let word = |at: usize| bytes[at..at + 4].try_into().map(u32::from_le_bytes).ok();
        let (address, len, beacon) = (long(0)?, long(8)?, long(16)?);
        address.checked_add(len)?;
        Some(Grant { address, len, beacon, key: word(24)?, beacon_key: word(28)? })
    }

    /// Where a range of it lies. `None`: outside.
    fn at(&self, offset: u64, len: usize) -> Option<u64> {
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= self.len).then(|| self.address + offset)
    }
}

/// Memory of this process that one peer may reach.
struct Region {
    registered: Mutex<Option<Registered>>,
    grant: [u8; GRANT_BYTES],
    room: RegionRoom,
}

impl Region {
    fn end(&self, registered: &mut Registered) -> io::Result<()> {
        let (patient, began) = (self.room.last_has_ended(), Instant::now());
        let mut again = patient;
        let ended = loop {
            match registered.end() {
                Err(error) if registered.device().took_along(&error) => break Ok(()),
                Err(_) if again => std::thread::sleep(END_STEP),
                ended => break ended,
            }
            // Once more, however late it has become.
            again = patient && began.elapsed() < END_PATIENCE;
        };
        self.room.has_ended(ended.is_ok());
        ended
    }
}

impl Registration for Region {
    fn grant(&self) -> &[u8] {
        &self.grant
    }

    fn withdraw(&self) -> bool {
        let mut registered = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut ending) = registered.take() else { return true };
        match self.end(&mut ending) {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(%error, "the registration of a region cannot be ended");
                *registered = Some(ending);
                false
            }
        }
    }
}

/// What of this process one peer may reach.
#[derive(Default)]
pub(super) struct Reachable {
    /// Made with the first grant.
    beacon: Option<Slab>,
}

impl Reachable {
    /// Registers a region in the domain that is the peer's. `None`: there is no room for it.
    pub fn register(
        &mut self,
        domain: &Arc<Domain>,
        registrations: &Arc<Registrations>,
        memory: SegmentMut,
        access: Access,
    ) -> io::Result<Option<Arc<dyn Registration>>> {
        let Some(room) = registrations.region_room(memory.len) else { return Ok(None) };
        let beacon = match &mut self.beacon {
            Some(beacon) => beacon,
            none => {
                let readable = Access::Reachable { read: true, write: false };
                none.insert(Slab::new(domain, 1, readable)?)
            }
        };
        let registered = Registered::new(domain, memory.ptr, memory.len, access)?;
        let grant = Grant {
            address: memory.ptr as u64,
            len: memory.len as u64,
            key: registered.remote_key(),
            beacon: beacon.buffer(0) as u64,
            beacon_key: beacon.remote_key(),
        };
        let (registered, grant) = (Mutex::new(Some(registered)), grant.encode());
        Ok(Some(Arc::new(Region { registered, grant, room })))
    }
}

/// A part of the memory on this side that is registered.
struct Slice {
    held: Held,
    /// Within the operation.
    end: usize,
    under_way: u32,
}

/// A put or get.
struct Operation {
    op: OpId,
    puts: bool,
    ptr: *mut u8,
    len: usize,
    /// Where it begins at the peer.
    remote: u64,
    to: Grant,
    /// How far requests have been posted.
    posted: usize,
    /// Requests that have not ended.
    under_way: u32,
    /// Those with requests under way, and the one that the next one goes by.
    slices: VecDeque<Slice>,
    /// Memory could not be registered: the rest goes by buffers.
    refused: bool,
    /// The beacon is being read, or need not be.
    beckoned: bool,
}

// SAFETY: the memory is the driver's until the operation is reported done; it is not tied to a
// thread.
unsafe impl Send for Operation {}

/// What is to be done next for an operation.
enum Next {
    /// This memory is to be registered, or the beginning of it.
    Register { ptr: *const u8, bytes: usize },
    /// So many bytes by a slice.
    Direct { key: u32, bytes: usize },
    /// Within the request.
    Inline,
    /// So many by a buffer.
    Buffer { bytes: usize },
    /// All of a put is posted: the beacon.
    Beckon,
    /// All is posted.
    Nothing,
}

impl Operation {
    fn next(&self, inline_bytes: usize) -> Next {
        let left = self.len - self.posted;
        if left == 0 {
            return if self.beckoned { Next::Nothing } else { Next::Beckon };
        }
        if self.puts && self.len <= inline_bytes {
            return Next::Inline;
        }
        if self.len < DIRECT_BYTES_MIN || self.refused {
            return Next::Buffer { bytes: left.min(BUFFER_BYTES) };
        }
        match self.slices.back().filter(|slice| slice.end > self.posted) {
            Some(slice) => {
                let bytes = (slice.end - self.posted).min(REQUEST_BYTES_MAX);
                Next::Direct { key: slice.held.local_key(), bytes }
            }
            None => Next::Register { ptr: self.here().cast_const(), bytes: left },
        }
    }

    /// The memory that the next request is about.
    fn here(&self) -> *mut u8 {
        // SAFETY: within the operation's memory.
        unsafe { self.ptr.add(self.posted) }
    }

    fn is_over(&self) -> bool {
        self.posted == self.len && self.beckoned && self.under_way == 0
    }

    /// Its first slice with a request under way has one less.
    fn slice_ended(&mut self) {
        if let Some(first) = self.slices.iter_mut().find(|slice| slice.under_way > 0) {
            first.under_way -= 1;
        }
        while self.slices.len() > 1 && self.slices[0].under_way == 0 {
            self.slices.pop_front();
        }
    }
}

/// How the bytes of a request go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Slice,
    Inline,
    /// By this buffer; a get's are then copied to this place in its memory.
    Buffer {
        index: usize,
        at: usize,
        bytes: usize,
    },
    Beacon,
}

/// A request under way.
struct Request {
    number: u32,
    operation: u32,
    way: Way,
}

/// What the operations need of the link.
pub(super) struct Means<'a> {
    pub messenger: &'a mut Messenger,
    pub registrations: &'a Arc<Registrations>,
    pub counters: &'a mut LinkCounters,
}

/// What an ended request means.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    /// An operation has more to do.
    More,
    Over(OpId),
    /// The peer's adapter refused it.
    Refused,
    /// The connection is at an end.
    Lost,
    /// No such request was posted.
    Unknown,
}

/// Puts and gets of one link's.
pub(super) struct Reaches {
    regions: HashMap<u32, Grant>,
    next_region: u32,
    operations: HashMap<u32, Operation>,
    next_operation: u32,
    /// Those with something left to post, in turns.
    active: VecDeque<u32>,
    /// In the order in which they were posted, in which they end.
    requests: VecDeque<Request>,
    next_request: u32,
    /// Buffers that are free.
    free: Vec<usize>,
    /// Requests that have ended and have not been dealt with.
    pub ended: VecDeque<Completion>,
    /// What the peer's adapter said no to.
    failed: Option<LinkError>,
    /// Memory has been registered: once a turn is enough.
    has_registered: bool,
    /// One of the operations waits for its turn to do that.
    registers_next: bool,
}

impl Default for Reaches {
    fn default() -> Self {
        Reaches {
            regions: HashMap::new(),
            next_region: 0,
            operations: HashMap::new(),
            next_operation: 0,
            active: VecDeque::new(),
            requests: VecDeque::new(),
            next_request: 0,
            free: (0..BUFFERS).collect(),
            ended: VecDeque::new(),
            failed: None,
            has_registered: false,
            registers_next: false,
        }
    }
}

impl Reaches {
    /// Takes up what the peer granted. `None`: it is no grant, or nothing can be reached any more.
    pub fn open(&mut self, grant: &[u8]) -> Option<RemoteId> {
        let grant = Grant::decode(grant).filter(|_| self.failed.is_none())?;
        while self.regions.contains_key(&self.next_region) {
            self.next_region = self.next_region.wrapping_add(1);
        }
        let number = self.next_region;
        self.regions.insert(number, grant);
        self.next_region = number.wrapping_add(1);
        Some(RemoteId(number))
    }

    pub fn close(&mut self, remote: RemoteId) {
        self.regions.remove(&remote.0);
    }

    /// Memory may be registered again.
    pub fn begin_turn(&mut self) {
        self.has_registered = false;
    }

    /// Whether one more operation may begin.
    pub fn has_room(&self) -> bool {
        self.operations.len() < OPERATIONS_MAX
    }

    /// Whether one of them waits for its turn to register memory.
    pub fn registers_next(&self) -> bool {
        self.registers_next
    }

    pub fn any_under_way(&self) -> bool {
        !self.requests.is_empty()
    }

    /// Begins a put or a get. `Err`: that is not within what was granted.
    ///
    /// # Safety
    ///
    /// The memory stays valid, for a get this operation's alone, until it is reported over, or the
    /// queue pairs are destroyed.
    pub unsafe fn begin(
        &mut self,
        op: OpId,
        puts: bool,
        (ptr, len): (*mut u8, usize),
        region: RemoteId,
        offset: u64,
    ) -> Result<(), &'static str> {
        let to = *self.regions.get(&region.0).ok_or("a region that is not open")?;
        let remote = to.at(offset, len).ok_or("a region that is shorter than was granted")?;
        let operation = Operation {
            op,
            puts,
            ptr,
            len,
            remote,
            to,
            posted: 0,
            under_way: 0,
            slices: VecDeque::new(),
            refused: false,
            beckoned: !puts,
        };
        while self.operations.contains_key(&self.next_operation) {
            self.next_operation = self.next_operation.wrapping_add(1);
        }
        let number = self.next_operation;
        self.operations.insert(number, operation);
        self.next_operation = number.wrapping_add(1);
        self.active.push_back(number);
        Ok(())
    }

    /// Posts requests, as far as there is room for them: one of each operation in turn.
    pub fn post(&mut self, means: &mut Means<'_>) -> io::Result<()> {
        let (mut waiting, mut registers) = (0, false);
        while self.failed.is_none()
            && waiting < self.active.len()
            && means.messenger.queues().room(What::Reach) > 0
        {
            let Some(number) = self.active.pop_front() else { break };
            let Some(operation) = self.operations.get_mut(&number) else { continue };
            match operation.next(means.messenger.queues().max_inline_put_bytes()) {
                Next::Nothing => {}
                Next::Register { ptr, bytes } => {
                    if register(operation, means, ptr, bytes, &mut self.has_registered) {
                        self.active.push_front(number);
                    } else {
                        registers = true;
                        waiting += 1;
                        self.active.push_back(number);
                    }
                }
                Next::Buffer { .. } if self.free.is_empty() => {
                    waiting += 1;
                    self.active.push_back(number);
                }
                next => {
                    waiting = 0;
                    self.active.push_back(number);
                    self.post_one(number, &next, means)?;
                }
            }
        }
        self.registers_next = registers;
        Ok(())
    }

    fn post_one(&mut self, number: u32, next: &Next, means: &mut Means<'_>) -> io::Result<()> {
        let Some(operation) = self.operations.get_mut(&number) else { return Ok(()) };
        let (remote, remote_key) = (operation.remote + operation.posted as u64, operation.to.key);
        let rdma = Rdma {
            writes: operation.puts,
            local: operation.here(),
            local_key: 0,
            bytes: 0,
            remote,
            remote_key,
            inline: false,
        };
        let buffer = |index| {
            let gone = || io::Error::from(io::ErrorKind::NotConnected);
            means.messenger.reach_buffer(index).ok_or_else(gone)
        };
        let (way, rdma) = match *next {
            Next::Direct { key, bytes } => {
                (Way::Slice, Rdma { local_key: key, bytes: bytes as u32, ..rdma })
            }
            Next::Inline => {
                (Way::Inline, Rdma { bytes: operation.len as u32, inline: true, ..rdma })
            }
            Next::Buffer { bytes } => {
                let Some(index) = self.free.last().copied() else { return Ok(()) };
                let (local, local_key) = buffer(index)?;
                if operation.puts {
                    // SAFETY: a free buffer, long enough; the memory is valid for reads.
                    unsafe { std::ptr::copy_nonoverlapping(operation.here(), local, bytes) };
                }
                let way = Way::Buffer { index, at: operation.posted, bytes };
                (way, Rdma { local, local_key, bytes: bytes as u32, ..rdma })
            }
            Next::Beckon => {
                let (local, local_key) = buffer(BUFFERS)?;
                let (remote, remote_key) = (operation.to.beacon, operation.to.beacon_key);
                let (writes, bytes) = (false, BEACON_BYTES);
                (Way::Beacon, Rdma { writes, local, local_key, bytes, remote, remote_key, ..rdma })
            }
            Next::Register { .. } | Next::Nothing => return Ok(()),
        };
        let request = self.next_request;
        // SAFETY: within the memory of the operation, which the driver keeps until it is reported
        // over, when every request has ended or the queue pair is gone; its slice is registered for
        // as long. Or a buffer, which is used again when this request has ended.
        unsafe { means.messenger.reach(request, &rdma)? };
        self.next_request = request.wrapping_add(1);
        self.requests.push_back(Request { number: request, operation: number, way });
        operation.under_way += 1;
        match way {
            Way::Beacon => operation.beckoned = true,
            Way::Slice => {
                if let Some(slice) = operation.slices.back_mut() {
                    slice.under_way += 1;
                }
            }
            Way::Buffer { .. } => drop(self.free.pop()),
            Way::Inline => {}
        }
        if way != Way::Beacon {
            operation.posted += rdma.bytes as usize;
            let LinkCounters { rdma_bytes_sent, rdma_bytes_received, .. } = means.counters;
            let bytes = if rdma.writes { rdma_bytes_sent } else { rdma_bytes_received };
            *bytes += u64::from(rdma.bytes);
        }
        Ok(())
    }

    /// Deals with the request that ended before all others.
    pub fn settle(&mut self, completion: &Completion, messenger: &Messenger) -> Outcome {
        let Some(request) = self.requests.pop_front() else { return Outcome::Unknown };
        if request.number != completion.id as u32 {
            return Outcome::Unknown;
        }
        match completion.status {
            ffi::IBV_WC_SUCCESS => {}
            ffi::IBV_WC_REM_ACCESS_ERR | ffi::IBV_WC_REM_INV_REQ_ERR | ffi::IBV_WC_REM_OP_ERR => {
                return Outcome::Refused;
            }
            _ if self.failed.is_some() => return Outcome::More,
            _ => return Outcome::Lost,
        }
        // An operation that has failed is gone.
        let Some(operation) = self.operations.get_mut(&request.operation) else {
            return Outcome::More;
        };
        operation.under_way -= 1;
        match request.way {
            Way::Slice => operation.slice_ended(),
            Way::Buffer { index, at, bytes } => {
                if !operation.puts
                    && let Some((from, _)) = messenger.reach_buffer(index)
                {
                    // SAFETY: the device has filled the buffer; the place is within the operation's
                    // memory, which is its alone.
                    unsafe { std::ptr::copy_nonoverlapping(from, operation.ptr.add(at), bytes) };
                }
                self.free.push(index);
            }
            Way::Inline | Way::Beacon => {}
        }
        if !operation.is_over() {
            return Outcome::More;
        }
        let op = operation.op;
        self.operations.remove(&request.operation);
        Outcome::Over(op)
    }

    /// Nothing can be reached any more. The device is finished with the memory of operations that
    /// have no requests under way: here are those.
    pub fn fail(&mut self, error: LinkError) -> Vec<(OpId, LinkError)> {
        self.failed.get_or_insert(error);
        self.active.clear();
        self.registers_next = false;
        self.failed_ones()
    }

    /// After a failure: operations whose requests have all ended.
    pub fn failed_ones(&mut self) -> Vec<(OpId, LinkError)> {
        let Some(error) = &self.failed else { return Vec::new() };
        let pending: Vec<u32> = self.requests.iter().map(|request| request.operation).collect();
        let over = self.operations.extract_if(|number, _| !pending.contains(number));
        over.map(|(_, operation)| (operation.op, error.clone())).collect()
    }

    pub fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    /// Forgets all, and names the operations. The queue pairs are gone.
    pub fn clear(&mut self) -> Vec<OpId> {
        self.requests.clear();
        self.active.clear();
        self.regions.clear();
        self.ended.clear();
        self.operations.drain().map(|(_, operation)| operation.op).collect()
    }
}

/// Registers what the next request of an operation is about. `false`: not in this turn.
fn register(
    operation: &mut Operation,
    means: &mut Means<'_>,
    ptr: *const u8,
    bytes: usize,
    has_registered: &mut bool,
) -> bool {
    let what = if operation.puts { Use::Source } else { Use::Land };
    let found = means.registrations.get(ptr, bytes, what, !*has_registered);
    if matches!(found, Found::NotNow) {
        return false;
    }
    *has_registered |= !matches!(found, Found::Known(..));
    match found.count(means.counters) {
        Some((held, covered)) => {
            let slice = Slice { held, end: operation.posted + covered, under_way: 0 };
            operation.slices.push_back(slice);
        }
        None => operation.refused = true,
    }
    true
}
