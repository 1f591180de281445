//! Memory that this process writes and peers on the same host may map: the pool of loans, and the
//! checked mappings of what peers share.
//!
//! A pool is made of `memfd` segments. Their pages are allocated when the segment is made, and
//! the segments are sealed against shrinking, growing and any further writable mapping, so that a
//! peer that maps one can neither lose it from under its feet (`SIGBUS`) nor write to it. All
//! bookkeeping (reference counts, free ranges) is private memory of this process: no peer can see
//! or disturb it, and a forked child that drops a loan only touches its own copy.
//!
//! A segment is not inherited by a forked child (`MADV_DONTFORK`): a child that touches its
//! parent's loan faults, where it would otherwise change what peers are reading.
//!
//! This room must not know how a reference to a block travels, nor who asks for one.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap};

use super::{Buffer, BufferMut, Region, arenas};
use crate::error::{Error, ErrorKind, Phase};
use crate::runtime::{Fd, ForkGuard};

/// Blocks are handed out in multiples of this: a page, so that no two blocks share one.
const GRANULE: usize = 4096;
/// Segments in a pool, and segments that one peer may show us. Sizes grow so that any pool fits.
pub(crate) const SEGMENTS_MAX: usize = 64;
const SEGMENT_MIN: usize = 4 << 20;
const SEGMENT_TYPICAL_MAX: usize = 64 << 20;
/// Blocks up to this size are rounded up to a power of two and kept on quick lists when freed.
const QUICK_MAX: usize = 64 << 20;
const QUICK_ORDERS: usize = (QUICK_MAX / GRANULE).trailing_zeros() as usize + 1;
/// Free blocks kept per quick list before they go back to the free ranges.
const QUICK_DEPTH: usize = 16;
/// Larger blocks than this are not rounded up: rounding would waste too much.
const ROUND_MAX: usize = 1 << 20;

/// The seals that make a mapping safe to read for a peer: it stays as large as it is, keeps its
/// pages, and nobody else gains a writable mapping.
fn seals() -> SealFlags {
    SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL
}

/// A sealed memfd that this process has mapped writable; the only writer it will ever have.
pub(crate) struct OwnMapping {
    ptr: NonNull<u8>,
    len: usize,
    guard: ForkGuard,
}

// SAFETY: a mapping belongs to the process, not to a thread; users order their own accesses.
unsafe impl Send for OwnMapping {}
// SAFETY: as above: it hands out a pointer, never a reference.
unsafe impl Sync for OwnMapping {}

impl OwnMapping {
    /// Makes zeroed, fully allocated, mapped and sealed memory of `len` bytes (rounded up to
    /// pages), and the descriptor to pass to peers.
    pub fn create(name: &CStr, len: usize) -> io::Result<(Self, OwnedFd)> {
        let len = len.max(1).next_multiple_of(GRANULE);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Hosts may demand non-executable memfds (vm.memfd_noexec); kernels before 6.3 do not
        // know the flag.
        let fd = match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
            Err(rustix::io::Errno::INVAL) => memfd_create(name, flags)?,
            other => other?,
        };
        fallocate(&fd, FallocateFlags::empty(), 0, len as u64)?;
        // SAFETY: a fresh mapping at an address of the kernel's choosing.
        let ptr = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )?
        };
        let Some(ptr) = NonNull::new(ptr.cast()) else {
            return Err(io::Error::other("mmap answered the null address"));
        };
        let mapping = OwnMapping { ptr, len, guard: ForkGuard::get() };
        // SAFETY: exactly the mapping just made; only affects children forked from here on.
        unsafe { madvise(ptr.as_ptr().cast(), len, Advice::LinuxDontFork)? };
        fcntl_add_seals(&fd, seals())?;
        Ok((mapping, fd))
    }

    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether this is a forked child, which has no such mapping.
    pub fn forked(&self) -> bool {
        self.guard.forked()
    }
}

impl Drop for OwnMapping {
    fn drop(&mut self) {
        // In a forked child the range is not mapped, and may since belong to somebody else.
        if !self.guard.forked() {
            arenas::unmapping(self.ptr);
            // SAFETY: the mapping made in `create`; whoever got the pointer keeps `self` alive.
            unsafe { super::unmap(self.ptr, self.len) };
        }
    }
}

/// A peer's sealed memory, mapped read-only. The peer may change the bytes at any time, but can
/// neither unmap, shrink nor punch holes into them.
pub(crate) struct PeerMapping {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread.
unsafe impl Send for PeerMapping {}
// SAFETY: as above: it hands out a pointer, never a reference.
unsafe impl Sync for PeerMapping {}

impl PeerMapping {
    /// Checks the descriptor and maps the whole of it, if it is at most `max_len` bytes. The
    /// error is a plain sentence about what is wrong with the peer's memory.
    pub fn map(fd: BorrowedFd<'_>, max_len: u64) -> Result<Self, String> {
        let fs = rustix::fs::fstatfs(fd).map_err(|e| format!("fstatfs: {e}"))?;
        // Huge-page memfds live elsewhere and may fault when pages run out.
        if fs.f_type as u64 != libc::TMPFS_MAGIC as u64 {
            return Err("shared memory is not an ordinary memfd".into());
        }
        let have = rustix::fs::fcntl_get_seals(fd).map_err(|e| format!("reading seals: {e}"))?;
        if !have.contains(seals()) {
            return Err(format!("shared memory lacks seals: has {have:?}"));
        }
        let stat = rustix::fs::fstat(fd).map_err(|e| format!("fstat: {e}"))?;
        let len = u64::try_from(stat.st_size).unwrap_or(0);
        if len == 0 || len > max_len {
            return Err(format!("shared memory of {len} bytes, expected 1..={max_len}"));
        }
        if (stat.st_blocks as u64).saturating_mul(512) < len {
            return Err("shared memory has pages that are not allocated".into());
        }
        let len = usize::try_from(len).map_err(|_| "shared memory too large".to_string())?;
        // SAFETY: a fresh read-only mapping at an address of the kernel's choosing; its seals
        // keep every page of it valid.
        let ptr = unsafe {
            mmap(std::ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, fd, 0)
                .map_err(|e| format!("mmap: {e}"))?
        };
        let ptr = NonNull::new(ptr.cast()).ok_or("mmap answered the null address")?;
        Ok(PeerMapping { ptr, len })
    }

    pub fn as_ptr(&self) -> *const u8 {
        self.ptr.as_ptr()
    }

    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for PeerMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`; whoever got the pointer keeps `self` alive.
        unsafe { super::unmap(self.ptr, self.len) };
    }
}

/// A range of granules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    start: u32,
    len: u32,
}

/// The free ranges of one segment, in order of address, neighbours merged.
#[derive(Default)]
struct FreeRanges(Vec<Range>);

impl FreeRanges {
    /// First fit.
    fn take(&mut self, len: u32) -> Option<u32> {
        let at = self.0.iter().position(|range| range.len >= len)?;
        let range = &mut self.0[at];
        let start = range.start;
        range.start += len;
        range.len -= len;
        if range.len == 0 {
            self.0.remove(at);
        }
        Some(start)
    }

    fn give(&mut self, freed: Range) {
        let at = self.0.partition_point(|range| range.start < freed.start);
        let joins_next = self.0.get(at).is_some_and(|next| freed.start + freed.len == next.start);
        let joins_last =
            at > 0 && self.0.get(at - 1).is_some_and(|last| last.start + last.len == freed.start);
        match (joins_last, joins_next) {
            (true, true) => {
                self.0[at - 1].len += freed.len + self.0[at].len;
                self.0.remove(at);
            }
            (true, false) => self.0[at - 1].len += freed.len,
            (false, true) => {
                self.0[at].start = freed.start;
                self.0[at].len += freed.len;
            }
            (false, false) => self.0.insert(at, freed),
        }
    }
}

/// Where a block is.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    segment: u32,
    start: u32,
}

/// Recently freed blocks of one power of two, ready to be handed out again.
#[derive(Clone, Copy)]
struct Quick {
    places: [Place; QUICK_DEPTH],
    count: usize,
}

struct State {
    free: Vec<FreeRanges>,
    quick: [Quick; QUICK_ORDERS],
    allocated_bytes: usize,
    loaned_bytes: usize,
}

struct Segment {
    mapping: OwnMapping,
    fd: Fd,
    /// Reference counts, one per granule; a block uses that of its first.
    refs: Box<[AtomicU32]>,
}

struct PoolInner {
    segments: [OnceLock<Segment>; SEGMENTS_MAX],
    state: Mutex<State>,
    limit_bytes: usize,
}

impl PoolInner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn segment(&self, index: u32) -> &Segment {
        self.segments[index as usize].get().expect("blocks only name segments that were made")
    }

    fn take(&self, state: &mut State, granules: u32) -> Result<Place, Error> {
        let order = quick_order(granules);
        if let Some(order) = order {
            let quick = &mut state.quick[order];
            if quick.count > 0 {
                quick.count -= 1;
                return Ok(quick.places[quick.count]);
            }
        }
        if let Some(place) = take_free(state, granules) {
            return Ok(place);
        }
        flush_quick(state);
        if let Some(place) = take_free(state, granules) {
            return Ok(place);
        }
        self.grow(state, granules)?;
        take_free(state, granules).ok_or_else(|| exhausted(self.limit_bytes))
    }

    /// Adds a segment with room for `granules`.
    fn grow(&self, state: &mut State, granules: u32) -> Result<(), Error> {
        let need = granules as usize * GRANULE;
        let left = self.limit_bytes.saturating_sub(state.allocated_bytes) / GRANULE * GRANULE;
        let index = state.free.len();
        if need > left || index == SEGMENTS_MAX {
            return Err(exhausted(self.limit_bytes));
        }
        // Each segment doubles the pool up to a typical size. Pools too large for that many
        // segments of typical size get larger ones.
        let typical_max = SEGMENT_TYPICAL_MAX.max(self.limit_bytes / (SEGMENTS_MAX / 2));
        let wish = state.allocated_bytes.clamp(SEGMENT_MIN, typical_max).next_multiple_of(GRANULE);
        let len = need.max(wish.min(left));
        let (mapping, fd) = OwnMapping::create(c"thalweg-pool", len).map_err(|error| {
            Error::from_io(Phase::Transfer, "making a segment of shared memory", &error)
        })?;
        arenas::mapped(mapping.ptr, len);
        let granules = len / GRANULE;
        let refs = (0..granules).map(|_| AtomicU32::new(0)).collect();
        let segment = Segment { mapping, fd: Fd::new(fd), refs };
        if self.segments[index].set(segment).is_err() {
            unreachable!("segments are made under the lock, in order");
        }
        state.allocated_bytes += len;
        // Enough for ordinary use without growing later.
        let mut free = FreeRanges(Vec::with_capacity(64));
        free.give(Range { start: 0, len: granules as u32 });
        state.free.push(free);
        Ok(())
    }

    fn give(&self, place: Place, granules: u32) {
        let mut state = self.state();
        state.loaned_bytes -= granules as usize * GRANULE;
        if let Some(order) = quick_order(granules) {
            let quick = &mut state.quick[order];
            if quick.count < QUICK_DEPTH {
                quick.places[quick.count] = place;
                quick.count += 1;
                return;
            }
        }
        state.free[place.segment as usize].give(Range { start: place.start, len: granules });
    }
}

fn quick_order(granules: u32) -> Option<usize> {
    let order = granules.trailing_zeros() as usize;
    (granules.is_power_of_two() && order < QUICK_ORDERS).then_some(order)
}

fn take_free(state: &mut State, granules: u32) -> Option<Place> {
    state.free.iter_mut().enumerate().find_map(|(index, free)| {
        free.take(granules).map(|start| Place { segment: index as u32, start })
    })
}

fn flush_quick(state: &mut State) {
    for order in 0..QUICK_ORDERS {
        let quick = &mut state.quick[order];
        let count = std::mem::take(&mut quick.count);
        let places = quick.places;
        for place in &places[..count] {
            let range = Range { start: place.start, len: 1 << order };
            state.free[place.segment as usize].give(range);
        }
    }
}

fn exhausted(limit_bytes: usize) -> Error {
    Error::new(
        ErrorKind::Resources,
        Phase::Transfer,
        format!("the pool of shared memory ({limit_bytes} bytes) is exhausted"),
    )
    .with_hint("release loans and received views sooner, or raise the limit of the shared pool")
}

/// Granules that a block of `len` bytes takes.
fn granules_for(len: usize) -> Option<u32> {
    let bytes = if len <= ROUND_MAX {
        len.max(GRANULE).next_power_of_two()
    } else {
        len.checked_next_multiple_of(GRANULE)?
    };
    u32::try_from(bytes / GRANULE).ok()
}

/// A node's pool of memory that links on the same host hand over by reference.
///
/// Takes no memory before the first loan. Segments, once made, stay until the pool and all its
/// loans are gone; their sizes add up to `limit_bytes` at most.
pub(crate) struct SharedPool(Arc<PoolInner>);

impl SharedPool {
    pub fn new(limit_bytes: usize) -> Self {
        SharedPool(Arc::new(PoolInner {
            segments: [const { OnceLock::new() }; SEGMENTS_MAX],
            state: Mutex::new(State {
                free: Vec::with_capacity(SEGMENTS_MAX),
                quick: [Quick { places: [Place::default(); QUICK_DEPTH], count: 0 }; QUICK_ORDERS],
                allocated_bytes: 0,
                loaned_bytes: 0,
            }),
            limit_bytes,
        }))
    }

    /// A writable block of `len` bytes; what it holds is unspecified. Cost: an uncontended lock
    /// and a few loads, or the making of a segment (a system call and a page fault per page).
    pub fn loan(&self, len: usize) -> Result<Loan, Error> {
        let granules = granules_for(len)
            .filter(|granules| *granules as usize * GRANULE <= self.0.limit_bytes)
            // A rounded size may be over the limit where the size itself is not.
            .or_else(|| u32::try_from(len.max(1).div_ceil(GRANULE)).ok())
            .filter(|granules| *granules as usize * GRANULE <= self.0.limit_bytes)
            .ok_or_else(|| self.too_large(len))?;
        let mut state = self.0.state();
        let place = self.0.take(&mut state, granules)?;
        state.loaned_bytes += granules as usize * GRANULE;
        drop(state);
        let segment = self.0.segment(place.segment);
        segment.refs[place.start as usize].store(1, Ordering::Relaxed);
        // SAFETY: the range was taken from this segment's free ranges, so it lies inside.
        let ptr = unsafe { segment.mapping.ptr.add(place.start as usize * GRANULE) };
        Ok(Loan(Block { pool: self.0.clone(), place, granules, len, ptr }))
    }

    fn too_large(&self, len: usize) -> Error {
        Error::new(
            ErrorKind::LimitExceeded,
            Phase::Transfer,
            format!("a loan of {len} bytes, the shared pool's limit is {}", self.0.limit_bytes),
        )
        .with_hint("raise the limit of the shared pool")
    }

    /// Bytes of shared memory that exist, used or not.
    pub fn allocated_bytes(&self) -> usize {
        self.0.state().allocated_bytes
    }

    /// Bytes out on loan, rounded up as the pool does.
    pub fn loaned_bytes(&self) -> usize {
        self.0.state().loaned_bytes
    }
}

impl fmt::Debug for SharedPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedPool")
            .field("allocated_bytes", &self.allocated_bytes())
            .field("loaned_bytes", &self.loaned_bytes())
            .field("limit_bytes", &self.0.limit_bytes)
            .finish()
    }
}

/// One reference to a block.
struct Block {
    pool: Arc<PoolInner>,
    place: Place,
    granules: u32,
    len: usize,
    ptr: NonNull<u8>,
}

// SAFETY: the memory belongs to the pool, which is `Sync`, and is kept by the reference count.
unsafe impl Send for Block {}
// SAFETY: shared access only reads.
unsafe impl Sync for Block {}

impl Block {
    fn refs(&self) -> &AtomicU32 {
        &self.pool.segment(self.place.segment).refs[self.place.start as usize]
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.refs().fetch_sub(1, Ordering::Release) == 1 {
            fence(Ordering::Acquire);
            self.pool.give(self.place, self.granules);
        }
    }
}

/// Memory from a node's shared pool, exclusively owned and writable. A link between processes of
/// one host hands it over by reference, without a copy; any other link sends it like ordinary
/// memory.
///
/// What it holds is unspecified (but initialised) until written. Dropping it gives the memory
/// back. A loan must not be touched in a forked child: the memory is not there.
///
/// ```no_run
/// # async fn example(node: thalweg::Node, endpoint: thalweg::Endpoint) -> thalweg::Result<()> {
/// let mut loan = node.loan(8 << 20)?;
/// loan.fill(7);
/// endpoint.send(loan).await?;
/// # Ok(())
/// # }
/// ```
pub struct Loan(Block);

impl Loan {
    /// Freezes the bytes, so that they can be read by several holders and by peers.
    pub(crate) fn into_block(self) -> SharedBlock {
        SharedBlock(self.0)
    }
}

impl Deref for Loan {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes of an initialised mapping that the reference keeps; only this
        // exclusive owner writes (peers cannot, by the seals).
        unsafe { std::slice::from_raw_parts(self.0.ptr.as_ptr(), self.0.len) }
    }
}

impl DerefMut for Loan {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and exclusive: the count is one for as long as this is a `Loan`.
        unsafe { std::slice::from_raw_parts_mut(self.0.ptr.as_ptr(), self.0.len) }
    }
}

impl AsRef<[u8]> for Loan {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for Loan {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

// SAFETY: the memory is a mapping of the pool's, stable across moves, exclusively owned.
unsafe impl Buffer for Loan {
    fn region(&self) -> Region {
        Region::shared(self.0.ptr.as_ptr(), self.0.len)
    }
}

// SAFETY: as above; writable, and any bytes are valid.
unsafe impl BufferMut for Loan {
    fn region_mut(&mut self) -> Region {
        self.region()
    }
}

impl fmt::Debug for Loan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Loan({} bytes)", self.0.len)
    }
}

/// A loan that was frozen: readable by its holders in this process and by the peers that it was
/// handed to. Cloning costs one reference count.
pub(crate) struct SharedBlock(Block);

impl SharedBlock {
    /// Writable again, if this is the only reference.
    pub fn try_into_loan(self) -> Result<Loan, SharedBlock> {
        // Acquire: whoever let go of the other references has finished reading.
        if self.0.refs().load(Ordering::Acquire) == 1 { Ok(Loan(self.0)) } else { Err(self) }
    }

    /// The segment's number within the pool, below [`SEGMENTS_MAX`].
    pub fn segment(&self) -> u32 {
        self.0.place.segment
    }

    /// Where the block begins in its segment, in bytes.
    pub fn offset(&self) -> u64 {
        u64::from(self.0.place.start) * GRANULE as u64
    }

    pub fn len(&self) -> usize {
        self.0.len
    }

    pub fn as_ptr(&self) -> *const u8 {
        self.0.ptr.as_ptr()
    }

    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes that the reference keeps, and that nobody writes while
        // the block is frozen.
        unsafe { std::slice::from_raw_parts(self.0.ptr.as_ptr(), self.0.len) }
    }

    /// The segment's descriptor, to be passed to a peer.
    pub fn segment_fd(&self) -> BorrowedFd<'_> {
        self.0.pool.segment(self.0.place.segment).fd.as_fd()
    }
}

impl Clone for SharedBlock {
    fn clone(&self) -> Self {
        let Block { pool, place, granules, len, ptr } = &self.0;
        // References are bounded by the operations in flight, far below the counter's range.
        self.0.refs().fetch_add(1, Ordering::Relaxed);
        SharedBlock(Block {
            pool: pool.clone(),
            place: *place,
            granules: *granules,
            len: *len,
            ptr: *ptr,
        })
    }
}

impl fmt::Debug for SharedBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedBlock({}:{}+{})", self.segment(), self.offset(), self.len())
    }
}

/// A peer's segment, and what the user of this room knows about that peer.
pub(crate) struct PeerSegment<T> {
    mapping: PeerMapping,
    pub peer: T,
}

/// A piece of a peer's segment. The peer may change the bytes at any time.
pub(crate) struct PeerSlice<T> {
    pub ptr: *const u8,
    pub len: usize,
    pub keep: Arc<PeerSegment<T>>,
}

// SAFETY: points into a mapping that `keep` holds; it is not tied to a thread.
unsafe impl<T: Send + Sync> Send for PeerSlice<T> {}
// SAFETY: as above; this side only reads.
unsafe impl<T: Send + Sync> Sync for PeerSlice<T> {}

/// Why a descriptor of a peer's does not name readable memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PeerSegmentError {
    /// No segment with this number was received.
    Unknown,
    /// The range reaches beyond the segment.
    OutOfBounds,
}

/// What one peer has shown of its pool: read-only mappings by segment number.
pub(crate) struct PeerSegments<T> {
    mapped: Vec<Option<Arc<PeerSegment<T>>>>,
    bytes: u64,
    limit_bytes: u64,
    peer: T,
}

impl<T: Clone> PeerSegments<T> {
    /// Maps `limit_bytes` (address space, not memory of ours) at most. Each segment goes with a
    /// clone of `peer`.
    pub fn new(limit_bytes: u64, peer: T) -> Self {
        PeerSegments { mapped: Vec::new(), bytes: 0, limit_bytes, peer }
    }

    pub fn contains(&self, segment: u32) -> bool {
        self.mapped.get(segment as usize).is_some_and(Option::is_some)
    }

    /// Checks and maps a segment that the peer passed. A number is taken once.
    pub fn insert(&mut self, segment: u32, fd: BorrowedFd<'_>) -> Result<(), String> {
        let index = segment as usize;
        if index >= SEGMENTS_MAX {
            return Err(format!("segment number {segment}, the limit is {SEGMENTS_MAX}"));
        }
        if self.contains(segment) {
            return Err(format!("segment {segment} passed twice"));
        }
        let mapping = PeerMapping::map(fd, self.limit_bytes - self.bytes)?;
        self.bytes += mapping.len() as u64;
        if self.mapped.len() <= index {
            self.mapped.resize_with(index + 1, || None);
        }
        self.mapped[index] = Some(Arc::new(PeerSegment { mapping, peer: self.peer.clone() }));
        Ok(())
    }

    pub fn slice(
        &self,
        segment: u32,
        offset: u64,
        len: u64,
    ) -> Result<PeerSlice<T>, PeerSegmentError> {
        let segment = self
            .mapped
            .get(segment as usize)
            .and_then(Option::as_ref)
            .ok_or(PeerSegmentError::Unknown)?;
        let end = offset.checked_add(len).ok_or(PeerSegmentError::OutOfBounds)?;
        if end > segment.mapping.len() as u64 {
            return Err(PeerSegmentError::OutOfBounds);
        }
        // SAFETY: `offset <= end <= segment.mapping.len()`, so the pointer stays in or one past the
        // mapping, and both numbers fit `usize`.
        let ptr = unsafe { segment.mapping.as_ptr().add(offset as usize) };
        Ok(PeerSlice { ptr, len: len as usize, keep: segment.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loans_are_reused_and_bounded() {
        let pool = SharedPool::new(1 << 20);
        let loans: Vec<_> = (0..256).map(|_| pool.loan(100).expect("room")).collect();
        assert_eq!(pool.loan(1).expect_err("full").kind(), ErrorKind::Resources);
        let address = loans[255].as_ptr();
        drop(loans);
        assert_eq!(pool.loaned_bytes(), 0);
        let whole = pool.loan(1 << 20).expect("quick lists are flushed and merged");
        assert_eq!(whole.len(), 1 << 20);
        drop(whole);
        let _ = address;
        assert_eq!(pool.allocated_bytes(), 1 << 20);
        let too_large = pool.loan((1 << 20) + 1).expect_err("over the limit");
        assert_eq!(too_large.kind(), ErrorKind::LimitExceeded);
        assert_eq!(pool.loan(usize::MAX).expect_err("absurd").kind(), ErrorKind::LimitExceeded);
    }

    #[test]
    fn a_rounded_size_over_the_limit_is_not_a_size_over_the_limit() {
        let pool = SharedPool::new(3 * GRANULE);
        assert_eq!(pool.loan(3 * GRANULE).expect("fits exactly").len(), 3 * GRANULE);
    }

    #[test]
    fn pools_grow_by_segments() {
        let pool = SharedPool::new(64 << 20);
        let first = pool.loan(3 << 20).expect("room").into_block();
        let second = pool.loan(9 << 20).expect("room").into_block();
        assert_eq!((first.segment(), second.segment()), (0, 1));
        assert_eq!(pool.allocated_bytes(), (4 << 20) + (9 << 20));
        let zero = pool.loan(0).expect("room");
        assert!(zero.is_empty());
    }

    #[test]
    fn free_ranges_merge_with_both_neighbours() {
        let mut free = FreeRanges::default();
        free.give(Range { start: 0, len: 10 });
        assert_eq!(free.take(3), Some(0));
        assert_eq!(free.take(3), Some(3));
        assert_eq!(free.take(4), Some(6));
        assert!(free.0.is_empty());
        free.give(Range { start: 0, len: 3 });
        free.give(Range { start: 6, len: 4 });
        assert_eq!(free.0.len(), 2);
        free.give(Range { start: 3, len: 3 });
        assert_eq!(free.0, [Range { start: 0, len: 10 }]);
    }

    #[test]
    fn a_block_becomes_a_loan_again_only_when_unique() {
        let pool = SharedPool::new(1 << 20);
        let mut loan = pool.loan(5).expect("room");
        loan.copy_from_slice(b"hello");
        let block = loan.into_block();
        let other = block.clone();
        let block = block.try_into_loan().expect_err("two references");
        assert_eq!(block.as_slice(), b"hello");
        drop(other);
        let loan = block.try_into_loan().expect("unique");
        assert_eq!(&*loan, b"hello");
        drop(loan);
        assert_eq!(pool.loaned_bytes(), 0);
    }

    #[test]
    fn a_peer_reads_what_was_written_within_bounds() {
        let pool = SharedPool::new(8 << 20);
        let mut loan = pool.loan(4096).expect("room");
        loan[4095] = 9;
        let block = loan.into_block();
        let mut peer = PeerSegments::new(64 << 20, ());
        assert_eq!(peer.slice(0, 0, 1).err(), Some(PeerSegmentError::Unknown));
        peer.insert(block.segment(), block.segment_fd()).expect("good segment");
        let slice = peer.slice(block.segment(), block.offset(), 4096).expect("in bounds");
        // SAFETY: a mapping of our own memory, kept by `slice`; nobody writes it now.
        assert_eq!(unsafe { *slice.ptr.add(4095) }, 9);
        for (offset, len) in [(0, u64::MAX), (u64::MAX, 1), (4 << 20, 1), (0, (4 << 20) + 1)] {
            assert_eq!(peer.slice(0, offset, len).err(), Some(PeerSegmentError::OutOfBounds));
        }
        assert!(peer.insert(0, block.segment_fd()).is_err(), "the same number twice");
        assert!(peer.insert(SEGMENTS_MAX as u32, block.segment_fd()).is_err());
    }

    #[test]
    fn memory_without_seals_or_pages_is_refused() {
        let fd =
            memfd_create(c"bare", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("memfd");
        rustix::fs::ftruncate(&fd, 8192).expect("truncate");
        let refused = PeerMapping::map(fd.as_fd(), 1 << 20).err().expect("no seals");
        assert!(refused.contains("seals"), "{refused}");
        fcntl_add_seals(&fd, seals()).expect("seal");
        let refused = PeerMapping::map(fd.as_fd(), 1 << 20).err().expect("no pages");
        assert!(refused.contains("not allocated"), "{refused}");
        let null = std::fs::File::open("/dev/null").expect("null");
        assert!(PeerMapping::map(null.as_fd(), 1 << 20).is_err());
        let (own, fd) = OwnMapping::create(c"own", 8192).expect("memory");
        assert!(PeerMapping::map(fd.as_fd(), 4096).is_err(), "over the limit");
        assert!(rustix::fs::ftruncate(&fd, 4096).is_err(), "sealed");
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert!(fallocate(&fd, punch, 0, 4096).is_err(), "no holes either");
        assert_eq!(own.len(), 8192);
    }
}
