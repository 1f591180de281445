//! Registered buffers: one slab a link, taken from a pool of the node's and given back, so that a
//! new link registers nothing while the pool has one.

use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};

use super::device::{Access, Domain, Registered};
use super::wire::BUFFER_BYTES;

/// Slabs that are kept for the next links.
const KEPT_MAX: usize = 32;

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

    /// Whether a number names a buffer.
    pub fn has(&self, index: u64) -> bool {
        index < self.count as u64
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

/// The slabs of one domain that no link uses.
pub(super) struct Slabs {
    domain: Arc<Domain>,
    count: usize,
    kept: Mutex<Vec<Slab>>,
}

impl Slabs {
    /// Of slabs with `count` buffers each.
    pub fn new(domain: &Arc<Domain>, count: usize) -> Slabs {
        Slabs { domain: domain.clone(), count, kept: Mutex::new(Vec::new()) }
    }

    pub fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    pub fn take(&self) -> io::Result<Slab> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.map_or_else(|| Slab::new(&self.domain, self.count, Access::Local), Ok)
    }

    #[cfg(test)]
    pub fn kept(&self) -> usize {
        self.kept.lock().expect("not poisoned").len()
    }

    /// Takes one back that nobody uses any more: neither this process nor the device.
    pub fn give(&self, slab: Slab) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT_MAX {
            kept.push(slab);
        }
    }
}
