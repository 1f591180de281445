//! Memory shared by two processes, for the baselines.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};

/// A shared mapping of an anonymous file. Both sides write to it, so it is only ever touched
/// through atomics and raw copies, never as a slice.
pub struct Shared {
    at: NonNull<u8>,
    len_bytes: usize,
    file: OwnedFd,
}

impl Shared {
    /// Fresh memory, its pages allocated.
    pub fn create(len_bytes: usize) -> io::Result<Shared> {
        // SAFETY: the name is a NUL-terminated literal; the returned descriptor is checked and
        // owned by nobody else.
        let file = unsafe {
            let fd = libc::memfd_create(c"thalweg-bench".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        let len = libc::off_t::try_from(len_bytes).map_err(io::Error::other)?;
        // SAFETY: plain calls on a descriptor that this function owns.
        let answer = unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, len) };
        if answer != 0 {
            return Err(io::Error::last_os_error());
        }
        Shared::map(file, len_bytes)
    }

    /// Maps memory that the other side created with the same length.
    pub fn map(file: OwnedFd, len_bytes: usize) -> io::Result<Shared> {
        // SAFETY: a new mapping at an address of the kernel's choosing; nothing else is affected.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                file.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let at = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Shared { at, len_bytes, file })
    }

    /// The address of the byte at `offset`.
    ///
    /// # Panics
    /// If that is not inside the memory.
    pub fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.len_bytes, "offset {offset} of {}", self.len_bytes);
        // SAFETY: inside the mapping, by the check above.
        unsafe { self.at.add(offset) }
    }

    /// The descriptor, to hand to the other side.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `map`; whoever took addresses from `at` borrows self.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len_bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_see_the_same_bytes() {
        let one = Shared::create(8192).unwrap();
        let two = Shared::map(one.file().try_clone_to_owned().unwrap(), 8192).unwrap();
        // SAFETY: both addresses are inside mappings that live to the end of the test, and no
        // other thread touches them.
        unsafe {
            one.at(5000).write_volatile(42);
            assert_eq!(two.at(5000).read_volatile(), 42);
        }
    }
}
