//! Notices that this process is a forked child.

use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};

const HERE: u32 = 0x7411_a1e6;
const PAGE: usize = 4096;

/// A page that the kernel wipes in a forked child.
#[derive(Clone, Copy)]
pub(crate) struct ForkGuard(Option<NonNull<AtomicU32>>);

// SAFETY: points to a page that is never unmapped and is only accessed atomically.
unsafe impl Send for ForkGuard {}
// SAFETY: as above.
unsafe impl Sync for ForkGuard {}

impl ForkGuard {
    /// The process's one guard.
    pub fn get() -> Self {
        static GUARD: OnceLock<ForkGuard> = OnceLock::new();
        *GUARD.get_or_init(|| {
            // SAFETY: a fresh private anonymous mapping, never unmapped.
            let page = unsafe {
                mmap_anonymous(
                    std::ptr::null_mut(),
                    PAGE,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE,
                )
            };
            let Ok(page) = page else { return ForkGuard(None) };
            // SAFETY: exactly the mapping just made. Kernels before 4.14 lack the advice: the
            // guard then never fires.
            if unsafe { madvise(page, PAGE, Advice::LinuxWipeOnFork) }.is_err() {
                return ForkGuard(None);
            }
            let word = NonNull::new(page.cast::<AtomicU32>());
            if let Some(word) = word {
                // SAFETY: page-aligned, mapped, lives for ever.
                unsafe { word.as_ref() }.store(HERE, Ordering::Relaxed);
            }
            ForkGuard(word)
        })
    }

    /// Whether this process is a forked child of the one that made the guard. One load.
    #[inline]
    pub fn forked(self) -> bool {
        // SAFETY: see `get`.
        self.0.is_some_and(|word| unsafe { word.as_ref() }.load(Ordering::Relaxed) != HERE)
    }
}
