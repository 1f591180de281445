//! What an operation may own.

use bytes::{Bytes, BytesMut};

use super::Region;

/// Memory that an operation can own and read.
///
/// # Safety
///
/// From the first call of [`Buffer::region`] until the value is dropped or handed back by the
/// operation:
/// - the region's memory stays valid for reads of its whole length, at the same address, also
///   when the value is moved;
/// - it is initialised, and nothing writes to it (for [`BufferMut`]: nothing else reads or writes
///   it), except through the value itself;
/// - `region` keeps giving the same answer.
///
/// A type that keeps its bytes inside itself (an array) cannot promise this; one that keeps them
/// on the heap can.
pub unsafe trait Buffer: Send + 'static {
    /// Where the bytes are. Cost: a few loads.
    fn region(&self) -> Region;
}

/// Memory that an operation can own and write.
///
/// # Safety
///
/// As [`Buffer`], and the region is valid for writes through the pointer that
/// [`BufferMut::region_mut`] returns. Any bytes may be written: every bit pattern must be valid.
pub unsafe trait BufferMut: Buffer {
    /// Where to write. The same memory as [`Buffer::region`].
    fn region_mut(&mut self) -> Region;
}

fn read_only(bytes: &[u8]) -> Region {
    Region::host(bytes.as_ptr().cast_mut(), bytes.len())
}

fn writable(bytes: &mut [u8]) -> Region {
    Region::host(bytes.as_mut_ptr(), bytes.len())
}

macro_rules! buffer {
    ($($type:ty),*; $($mutable:ty),*) => {
        $(
            // SAFETY: the bytes live on the heap, or for ever: moving the owner does not move
            // them, and owning it excludes writers.
            unsafe impl Buffer for $type {
                fn region(&self) -> Region {
                    read_only(self)
                }
            }
        )*
        $(
            // SAFETY: as above; owned exclusively, so writable.
            unsafe impl BufferMut for $mutable {
                fn region_mut(&mut self) -> Region {
                    writable(self)
                }
            }
        )*
    };
}

buffer!(Vec<u8>, Box<[u8]>, Bytes, BytesMut, &'static [u8], &'static mut [u8], std::sync::Arc<[u8]>;
        Vec<u8>, Box<[u8]>, BytesMut, &'static mut [u8]);

// SAFETY: the string's bytes live on the heap; owning it excludes writers.
unsafe impl Buffer for String {
    fn region(&self) -> Region {
        read_only(self.as_bytes())
    }
}
