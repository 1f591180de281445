//! A scattered piece of memory that is read or written front to back.
//!
//! Knows pointers and lengths only. Whoever makes a [`Pieces`] answers for the memory: it belongs
//! to an operation that the driver keeps until the link has reported it done.

use smallvec::SmallVec;

use crate::link::{Landing, Segment};

/// What one vectored system call takes at most (`IOV_MAX` of Linux).
pub(super) const IOV_MAX: usize = 1024;

/// Vectors for one system call. Typical parcels fit without an allocation.
pub(super) type IoVecs = SmallVec<[libc::iovec; 32]>;

#[derive(Clone, Copy)]
struct Piece {
    ptr: *mut u8,
    len: usize,
}

/// Memory that is not finished with: a cursor moves forward through it.
#[derive(Default)]
pub(super) struct Pieces {
    list: SmallVec<[Piece; 2]>,
    index: usize,
    offset: usize,
}

// SAFETY: a description of memory that the operation pins; it is not tied to a thread.
unsafe impl Send for Pieces {}

pub(super) fn io_vec(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

pub(super) fn io_vec_mut(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}

impl Pieces {
    pub fn from_segments(segments: &[Segment<'_>]) -> Self {
        let list = segments
            .iter()
            .filter(|segment| segment.len > 0)
            .map(|segment| Piece { ptr: segment.ptr.cast_mut(), len: segment.len })
            .collect();
        Pieces { list, index: 0, offset: 0 }
    }

    /// `None` when the landing is not exactly `len` bytes long, or not all of it can be written by
    /// the CPU.
    pub fn from_landing(landing: &Landing, len: u64) -> Option<Self> {
        let mut total = 0u64;
        let mut list = SmallVec::new();
        for segment in landing {
            total = total.checked_add(segment.len as u64)?;
            if !segment.kind.cpu_accessible() {
                return None;
            }
            if segment.len > 0 {
                list.push(Piece { ptr: segment.ptr, len: segment.len });
            }
        }
        (total == len).then_some(Pieces { list, index: 0, offset: 0 })
    }

    /// Appends vectors for the next `limit` bytes, or fewer if that many vectors do not fit.
    /// Returns the bytes covered.
    pub fn gather(&self, limit: usize, vectors: &mut IoVecs, vectors_max: usize) -> usize {
        let mut covered = 0;
        let mut offset = self.offset;
        for piece in &self.list[self.index..] {
            if covered == limit || vectors.len() >= vectors_max {
                break;
            }
            let len = (piece.len - offset).min(limit - covered);
            vectors.push(libc::iovec {
                iov_base: piece.ptr.wrapping_add(offset).cast(),
                iov_len: len,
            });
            covered += len;
            offset = 0;
        }
        covered
    }

    /// Moves the cursor on by `bytes`, which must not be more than is left.
    pub fn advance(&mut self, bytes: usize) {
        self.step(bytes, |_, _| {});
    }

    fn step(&mut self, mut bytes: usize, mut each: impl FnMut(*mut u8, usize)) {
        while bytes > 0 {
            let Some(piece) = self.list.get(self.index) else {
                debug_assert!(false, "moved past the end");
                return;
            };
            let len = (piece.len - self.offset).min(bytes);
            each(piece.ptr.wrapping_add(self.offset), len);
            bytes -= len;
            self.offset += len;
            if self.offset == piece.len {
                self.index += 1;
                self.offset = 0;
            }
        }
    }

    /// Copies `bytes` from the cursor to the end of `out`.
    ///
    /// # Safety
    /// The memory must be valid for reads, and `bytes` no more than is left.
    pub unsafe fn copy_out(&mut self, bytes: usize, out: &mut Vec<u8>) {
        self.step(bytes, |ptr, len| {
            // SAFETY: within a piece, valid by this function's contract.
            out.extend_from_slice(unsafe { std::slice::from_raw_parts(ptr, len) });
        });
    }

    /// Copies `bytes` to the cursor.
    ///
    /// # Safety
    /// The memory must be valid for writes, and not less than `bytes` may be left.
    pub unsafe fn copy_in(&mut self, bytes: &[u8]) {
        let mut from = bytes.as_ptr();
        self.step(bytes.len(), |ptr, len| {
            // SAFETY: `ptr` lies within a piece, valid by this function's contract and owned by a
            // landing, hence apart from `bytes`; `step` visits `bytes.len()` bytes in all.
            unsafe {
                std::ptr::copy_nonoverlapping(from, ptr, len);
                from = from.add(len);
            }
        });
    }
}
