//! Registered buffers: blocks of them, from a pool that all links over a device share.

use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};

use super::device::{Access, Domain, Registered};
use super::wire::BUFFER_BYTES;

/// As many buffers of [`BUFFER_BYTES`] as it was made for.
pub(super) struct Slab {
    ptr: NonNull<u8>,
    count: usize,
    /// Dropped before the memory is unmapped.
    registered: Option<Registered>,
    domain: Arc<Domain>,
}

// SAFETY: owns its memory, which is not tied to a thread.
unsafe impl Send for Slab {}
// SAFETY: as above; only where it lies and its keys are read.
unsafe impl Sync for Slab {}

impl Slab {
    pub fn new(domain: &Arc<Domain>, count: usize, access: Access) -> io::Result<Slab> {
        let len = count * BUFFER_BYTES;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh private mapping.
        let ptr =
            unsafe { mmap_anonymous(std::ptr::null_mut(), len, protection, MapFlags::PRIVATE)? };
        // A child must not make the pages of this process copies of what the device uses.
        // SAFETY: exactly the mapping just made; a refusal leaves that to `ibv_fork_init`.
        let _ = unsafe { madvise(ptr, len, Advice::LinuxDontFork) };
        let ptr = NonNull::new(ptr.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut slab = Slab { ptr, count, registered: None, domain: domain.clone() };
        slab.registered = Some(Registered::new(domain, ptr.as_ptr(), len, access)?);
        Ok(slab)
    }

    /// Where a buffer begins.
    pub fn buffer(&self, index: usize) -> *mut u8 {
        assert!(index < self.count, "buffers are numbered below the slab's count");
        // SAFETY: within the mapping.
        unsafe { self.ptr.as_ptr().add(index * BUFFER_BYTES) }
    }

    pub fn key(&self) -> u32 {
        self.registered.as_ref().map_or(0, Registered::local_key)
    }

    /// The key for the peer's requests.
    pub fn remote_key(&self) -> u32 {
        self.registered.as_ref().map_or(0, Registered::remote_key)
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        if self.domain.device.forked() {
            return;
        }
        self.registered = None;
        // SAFETY: the mapping made in `new`, which no device uses any more.
        unsafe { crate::memory::unmap(self.ptr, self.count * BUFFER_BYTES) };
    }
}

/// Buffers of a [`Block`].
pub(super) const BLOCK: usize = 8;
/// Blocks of a slab of the pool's: 1 MiB.
const BLOCKS_PER_SLAB: usize = 16;
/// Slabs none of which is in use that are kept for what comes.
const UNUSED_MAX: usize = 4;

/// [`BLOCK`] buffers of the pool's. What becomes of it is its owner's to say. It goes back by
/// [`Pool::give`]. One that is dropped is nobody's until the pool is gone, which unmaps it; one that a
/// device may use even then is abandoned.
pub(super) struct Block {
    slab: Arc<Slab>,
    /// The first of its buffers.
    first: usize,
}

impl Block {
    /// Where a buffer begins.
    pub fn buffer(&self, index: usize) -> *mut u8 {
        assert!(index < BLOCK, "buffers are numbered below the block's count");
        self.slab.buffer(self.first + index)
    }

    pub fn key(&self) -> u32 {
        self.slab.key()
    }

    /// The device may use it for as long as it likes.
    pub fn abandon(self) {
        // Its share of the slab is never given up.
        std::mem::forget(self);
    }
}

/// A slab, and which of its blocks nobody uses.
struct Shared {
    slab: Arc<Slab>,
    unused: u16,
}

const ALL_UNUSED: u16 = u16::MAX;
const _: () = assert!(ALL_UNUSED.count_ones() as usize == BLOCKS_PER_SLAB);

/// The buffers of one domain: links take blocks as they need them and give them back, so that a new
/// link registers nothing while there are some that nobody uses.
pub(super) struct Pool {
    domain: Arc<Domain>,
    slabs: Mutex<Vec<Shared>>,
}

impl Pool {
    pub fn new(domain: &Arc<Domain>) -> Pool {
        Pool { domain: domain.clone(), slabs: Mutex::new(Vec::new()) }
    }

    pub fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    fn slabs(&self) -> MutexGuard<'_, Vec<Shared>> {
        self.slabs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one, out of the first slab that has some: others may become unused as a whole.
    pub fn take(&self) -> io::Result<Block> {
        if let Some(shared) = self.slabs().iter_mut().find(|shared| shared.unused != 0) {
            return Ok(shared.take());
        }
        // Registering takes its time: not under the lock.
        let slab = Slab::new(&self.domain, BLOCKS_PER_SLAB * BLOCK, Access::Local)?;
        let mut shared = Shared { slab: Arc::new(slab), unused: ALL_UNUSED };
        let block = shared.take();
        self.slabs().push(shared);
        Ok(block)
    }

    /// Takes one back that nobody uses any more: neither this process nor the device.
    pub fn give(&self, block: Block) {
        let mut slabs = self.slabs();
        let is_its = |shared: &&mut Shared| Arc::ptr_eq(&shared.slab, &block.slab);
        if let Some(shared) = slabs.iter_mut().find(is_its) {
            shared.unused |= 1 << (block.first / BLOCK);
        }
        let is_unused = |shared: &Shared| shared.unused == ALL_UNUSED;
        let over = match slabs.iter().filter(|shared| is_unused(shared)).count() > UNUSED_MAX {
            true => slabs.iter().position(is_unused).map(|at| slabs.remove(at)),
            false => None,
        };
        // The end of its registration takes its time, too.
        drop(slabs);
        drop(over);
    }

    /// How many blocks are in use.
    #[cfg(test)]
    pub fn used(&self) -> usize {
        self.slabs().iter().map(|shared| shared.unused.count_zeros() as usize).sum()
    }

    /// How many bytes are registered.
    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        self.slabs().len() * BLOCKS_PER_SLAB * BLOCK * BUFFER_BYTES
    }
}

impl Shared {
    fn take(&mut self) -> Block {
        let at = self.unused.trailing_zeros() as usize;
        self.unused &= self.unused - 1;
        Block { slab: self.slab.clone(), first: at * BLOCK }
    }
}
