//! Memory: regions, the buffers that operations own, pools and loans.
//!
//! This room knows what memory is, where it lies and who keeps it alive. It must not know who
//! moves it.

pub(crate) mod arenas;
mod buffer;
mod pool;
mod shared;

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};

pub use buffer::{Buffer, BufferMut};
pub use pool::{Allocator, HostPool, PoolBuf};
pub use shared::Loan;
pub(crate) use shared::{
    OwnMapping, PeerMapping, PeerSegment, PeerSegmentError, PeerSegments, PeerSlice, SEGMENTS_MAX,
    SharedBlock, SharedPool,
};

/// Unmaps memory by the C library's `munmap`, and not by a system call of our own: libraries that keep
/// registrations for memory (UCX does) learn by a patched `munmap` that they have to let go of them. One
/// that is kept would go on naming the old pages when something else is mapped there.
///
/// # Safety
///
/// A whole mapping, which nobody uses any more.
pub(crate) unsafe fn unmap(ptr: std::ptr::NonNull<u8>, len: usize) {
    // SAFETY: the caller's. It fails only for what was not mapped.
    let _ = unsafe { libc::munmap(ptr.as_ptr().cast(), len) };
}

/// The kind of a piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryKind {
    /// Ordinary memory of this process.
    Host,
    /// Memory of a shared pool: a link on the same host may hand it over by reference.
    Shared,
    /// Page-locked host memory.
    Pinned,
    /// Memory of a device; the CPU must not touch it.
    Device,
    /// Memory that migrates between host and device.
    Managed,
}

impl MemoryKind {
    /// Whether the CPU may read and write it directly.
    pub const fn cpu_accessible(self) -> bool {
        !matches!(self, MemoryKind::Device)
    }
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MemoryKind::Host => "host",
            MemoryKind::Shared => "shared",
            MemoryKind::Pinned => "pinned",
            MemoryKind::Device => "device",
            MemoryKind::Managed => "managed",
        })
    }
}

/// A typed area of memory: where it starts, how long it is, of which kind. A description only; it
/// keeps nothing alive.
///
/// ```
/// use thalweg::{Buffer, MemoryKind};
/// let region = vec![0u8; 16].region();
/// assert_eq!(region.len_bytes(), 16);
/// assert_eq!(region.kind(), MemoryKind::Host);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Region {
    ptr: *mut u8,
    len: usize,
    kind: MemoryKind,
    device: Option<u32>,
}

// SAFETY: a description; whoever dereferences relies on the owner of the memory.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Describes host memory. Safe, because describing does nothing; see [`Buffer`] for the
    /// promise that makes a description usable.
    pub fn host(ptr: *mut u8, len_bytes: usize) -> Self {
        Region { ptr, len: len_bytes, kind: MemoryKind::Host, device: None }
    }

    pub(crate) fn shared(ptr: *mut u8, len_bytes: usize) -> Self {
        Region { ptr, len: len_bytes, kind: MemoryKind::Shared, device: None }
    }

    /// First byte.
    pub fn as_ptr(&self) -> *const u8 {
        self.ptr
    }

    /// First byte, for writing.
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> usize {
        self.len
    }

    /// The kind of memory.
    pub fn kind(&self) -> MemoryKind {
        self.kind
    }

    /// The device it belongs to, for device memory.
    pub fn device(&self) -> Option<u32> {
        self.device
    }
}

/// Copies into memory that others may be reading and writing at the same time: bytes may mix, and
/// nothing worse happens.
///
/// # Safety
///
/// `to` is valid for writes of `from.len()` bytes, and everybody in this process who touches that
/// memory meanwhile does so through these two functions or through the kernel.
pub(crate) unsafe fn racy_write(to: *mut u8, from: &[u8]) {
    for (index, byte) in from.iter().enumerate() {
        // SAFETY: in range by the caller's promise; a byte has no alignment.
        unsafe { AtomicU8::from_ptr(to.add(index)) }.store(*byte, Ordering::Relaxed);
    }
}

/// Copies out of such memory.
///
/// # Safety
///
/// As [`racy_write`], for reads.
pub(crate) unsafe fn racy_read(from: *mut u8, to: &mut [u8]) {
    for (index, byte) in to.iter_mut().enumerate() {
        // SAFETY: as in `racy_write`.
        *byte = unsafe { AtomicU8::from_ptr(from.add(index)) }.load(Ordering::Relaxed);
    }
}
