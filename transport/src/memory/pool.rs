//! Host memory for what is received, reused: fresh pages cost more than the copy into them (a
//! destination allocated per 8 MiB message was measured at 0.37 of the speed of a reused one).

use std::any::Any;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::{NonNull, null_mut};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};

use super::{Buffer, BufferMut, Region, arenas};
use crate::runtime::ForkGuard;

/// Where received frames land. Called by the driver, outside of its locks' fast path but with the
/// endpoint's lock held: it must not block and must not call back into this crate.
pub trait Allocator: Send + Sync + 'static {
    /// Memory of exactly `len_bytes` (never 0), or `None` when there is none: the endpoint then
    /// fails with [`crate::ErrorKind::Resources`].
    fn allocate(&self, len_bytes: usize) -> Option<PoolBuf>;

    /// Why the last [`Allocator::allocate`] on this thread gave nothing, for the error that ends the
    /// endpoint. Asked at once after it, under the same lock.
    fn refusal(&self) -> Option<String> {
        None
    }
}

const CLASS_MIN: usize = 4096;
const CLASSES: usize = 32;
/// From this size on, the kernel is asked to back memory with huge pages.
const HUGE: usize = 2 << 20;
/// From this size on, others may keep something for a mapping, and are told when it goes.
const ARENA_MIN: usize = 32 << 10;

struct Cache {
    free: [Vec<NonNull<u8>>; CLASSES],
    bytes: usize,
}

// SAFETY: the pointers are owned, unaliased allocations.
unsafe impl Send for Cache {}

struct Inner {
    cache: Mutex<Cache>,
    limit_bytes: usize,
    /// In a forked child another thread of the parent's may seem to hold the lock, for ever.
    guard: ForkGuard,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.guard.forked() {
            return;
        }
        let cache = self.cache.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (class, list) in cache.free.iter_mut().enumerate() {
            for ptr in list.drain(..) {
                // SAFETY: owned by the pool, of this class, and used by nobody.
                unsafe { unmap(ptr, class) };
            }
        }
    }
}

/// Classes are powers of two from 4 KiB.
fn class_of(len: usize) -> Option<usize> {
    let class = len.max(CLASS_MIN).checked_next_power_of_two()?.trailing_zeros() as usize
        - CLASS_MIN.trailing_zeros() as usize;
    (class < CLASSES).then_some(class)
}

/// Fresh memory of a class: zeroed, and without pages until they are touched, so that a length
/// claimed by a peer costs nothing before its bytes come.
fn map(class: usize) -> Option<NonNull<u8>> {
    let size = CLASS_MIN << class;
    // SAFETY: a fresh private mapping.
    let ptr = unsafe {
        mmap_anonymous(null_mut(), size, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
    };
    let ptr = ptr.ok()?;
    if size >= HUGE {
        // SAFETY: advice on the mapping just made; a refusal costs speed only.
        let _ = unsafe { madvise(ptr, size, Advice::LinuxHugepage) };
    }
    let ptr = NonNull::new(ptr.cast())?;
    if size >= ARENA_MIN {
        arenas::mapped(ptr, size);
    }
    Some(ptr)
}

/// # Safety
///
/// `ptr` came from [`map`] with this class, and nobody uses the memory any more.
unsafe fn unmap(ptr: NonNull<u8>, class: usize) {
    if CLASS_MIN << class >= ARENA_MIN {
        arenas::unmapping(ptr);
    }
    // SAFETY: the caller's.
    unsafe { super::unmap(ptr, CLASS_MIN << class) };
}

/// The node's pool of host memory. Cloning shares it. It belongs to the process that made it: in a
/// forked child it gives nothing.
#[derive(Clone)]
pub struct HostPool(Arc<Inner>);

impl HostPool {
    /// A pool that keeps at most `limit_bytes` of unused memory for the next taker.
    pub fn new(limit_bytes: usize) -> Self {
        let cache = Cache { free: [const { Vec::new() }; CLASSES], bytes: 0 };
        let guard = ForkGuard::get();
        HostPool(Arc::new(Inner { cache: Mutex::new(cache), limit_bytes, guard }))
    }

    #[cfg(test)]
    pub(crate) fn lock_for_test(&self) -> impl Drop + '_ {
        self.0.cache.lock().expect("not poisoned")
    }

    /// Bytes that lie unused in the pool.
    pub fn cached_bytes(&self) -> usize {
        if self.0.guard.forked() {
            return 0;
        }
        self.0.cache.lock().unwrap_or_else(PoisonError::into_inner).bytes
    }
}

impl Allocator for HostPool {
    fn allocate(&self, len_bytes: usize) -> Option<PoolBuf> {
        let class = class_of(len_bytes).filter(|_| !self.0.guard.forked())?;
        let reused = {
            let mut cache = self.0.cache.lock().unwrap_or_else(PoisonError::into_inner);
            let reused = cache.free[class].pop();
            if reused.is_some() {
                cache.bytes -= CLASS_MIN << class;
            }
            reused
        };
        let ptr = match reused {
            Some(ptr) => ptr,
            None => map(class)?,
        };
        Some(PoolBuf { ptr, len: len_bytes, owner: Owner::Pool { class, pool: self.0.clone() } })
    }

    fn refusal(&self) -> Option<String> {
        self.0.guard.forked().then(|| "the pool belongs to the parent process".to_owned())
    }
}

impl fmt::Debug for HostPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostPool")
            .field("cached_bytes", &self.cached_bytes())
            .field("limit_bytes", &self.0.limit_bytes)
            .finish()
    }
}

/// Bytes from a [`HostPool`], which get them back when this is dropped, or from a buffer of an
/// [`Allocator`]'s own. Always initialised (what they hold is unspecified until written).
pub struct PoolBuf {
    ptr: NonNull<u8>,
    len: usize,
    owner: Owner,
}

enum Owner {
    Pool { class: usize, pool: Arc<Inner> },
    Buffer(Box<dyn Any + Send>),
}

impl PoolBuf {
    /// The first `len_bytes` of a buffer, or all of it if it is shorter (none of a device's). The buffer is dropped with
    /// the result, or given back by [`PoolBuf::into_buffer`].
    pub fn from_buffer<B: BufferMut>(mut buffer: B, len_bytes: usize) -> Self {
        let region = buffer.region_mut();
        let ptr = NonNull::new(region.as_mut_ptr()).unwrap_or(NonNull::dangling());
        let reachable = if region.kind().cpu_accessible() { region.len_bytes() } else { 0 };
        let len = len_bytes.min(reachable);
        PoolBuf { ptr, len, owner: Owner::Buffer(Box::new(buffer)) }
    }

    /// The buffer that this was made of.
    ///
    /// # Errors
    ///
    /// The bytes themselves, if they were made of something else.
    pub fn into_buffer<B: BufferMut>(mut self) -> Result<B, Self> {
        match std::mem::replace(&mut self.owner, Owner::Buffer(Box::new(()))) {
            Owner::Buffer(buffer) => match buffer.downcast::<B>() {
                Ok(buffer) => Ok(*buffer),
                Err(buffer) => {
                    self.owner = Owner::Buffer(buffer);
                    Err(self)
                }
            },
            pool => {
                self.owner = pool;
                Err(self)
            }
        }
    }
}

// SAFETY: owns its memory exclusively, whoever found it: the pool behind it is `Sync`, a buffer is
// `Send` and only moved or dropped.
unsafe impl Send for PoolBuf {}
// SAFETY: shared access only reads.
unsafe impl Sync for PoolBuf {}

impl Deref for PoolBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes within an owned, initialised allocation, or of a buffer that promises
        // the same (`BufferMut`).
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for PoolBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for PoolBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

// SAFETY: heap memory, owned exclusively, stable across moves.
unsafe impl Buffer for PoolBuf {
    fn region(&self) -> Region {
        Region::host(self.ptr.as_ptr(), self.len)
    }
}

// SAFETY: as above.
unsafe impl BufferMut for PoolBuf {
    fn region_mut(&mut self) -> Region {
        self.region()
    }
}

impl Drop for PoolBuf {
    fn drop(&mut self) {
        // A buffer goes with this value.
        let Owner::Pool { class, pool } = &self.owner else { return };
        if pool.guard.forked() {
            return;
        }
        let size = CLASS_MIN << class;
        {
            let mut cache = pool.cache.lock().unwrap_or_else(PoisonError::into_inner);
            if cache.bytes + size <= pool.limit_bytes {
                cache.bytes += size;
                cache.free[*class].push(self.ptr);
                return;
            }
        }
        // SAFETY: mapped with this class, not in the pool, and dropped with this value.
        unsafe { unmap(self.ptr, *class) };
    }
}

impl fmt::Debug for PoolBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PoolBuf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_reused_up_to_the_limit() {
        let pool = HostPool::new(3 * 8192);
        let bufs: Vec<_> = (0..4).map(|_| pool.allocate(5000).expect("memory")).collect();
        let first = bufs[3].as_ptr();
        drop(bufs);
        assert_eq!(pool.cached_bytes(), 3 * 8192, "one of four was over the limit");
        let again = pool.allocate(8192).expect("memory");
        assert_ne!(again.len(), 0);
        assert_eq!(pool.cached_bytes(), 2 * 8192);
        drop((again, first));
    }

    #[test]
    fn a_buffer_of_the_allocators_own_comes_back() {
        let mut bytes = PoolBuf::from_buffer(vec![0u8; 10], 8);
        bytes.copy_from_slice(b"12345678");
        let Err(bytes) = bytes.into_buffer::<Box<[u8]>>() else { panic!("it is no box") };
        assert_eq!(bytes.into_buffer::<Vec<u8>>().expect("the same"), b"12345678\0\0");
        assert_eq!(PoolBuf::from_buffer(vec![1u8], 8).len(), 1, "no more than there is");
        let pool = HostPool::new(1 << 20);
        let pooled = pool.allocate(8192).expect("memory").into_buffer::<Vec<u8>>();
        drop(pooled.expect_err("the pool's own"));
        assert_eq!(pool.cached_bytes(), 8192, "the pool has it back");
    }

    #[test]
    fn absurd_sizes_are_refused() {
        assert!(HostPool::new(0).allocate(usize::MAX).is_none());
        assert!(HostPool::new(0).allocate(1 << 60).is_none());
    }

    #[test]
    fn large_memory_is_usable_to_its_last_byte() {
        let mut buf = HostPool::new(0).allocate((4 << 20) + 1).expect("memory");
        assert_eq!(buf.len(), (4 << 20) + 1);
        *buf.last_mut().expect("not empty") = 7;
        assert_eq!(buf[4 << 20], 7);
    }
}
