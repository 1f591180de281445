//! Owned descriptors that a forked child closes, so that it cannot hide this process's death from
//! a peer.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// Descriptors up to this number are tracked. The kernel's default ceiling (`fs.nr_open`) is the
/// same. The table's pages are untouched, and so cost nothing, until a descriptor uses them.
const TRACKED: usize = 1 << 20;

static OPEN: [AtomicU64; TRACKED / 64] = [const { AtomicU64::new(0) }; TRACKED / 64];
/// One more than the highest word of `OPEN` ever used.
static WORDS: AtomicU32 = AtomicU32::new(0);
/// How often this process has been forked off: a descriptor made under another count is not ours.
static FORKS: AtomicU32 = AtomicU32::new(0);
/// Whether `in_child` is registered. Not a `Once`: a child forked off in its middle would wait for
/// ever for a thread that it does not have.
static HOOKED: AtomicBool = AtomicBool::new(false);

/// Runs in a forked child before `fork` returns there, perhaps more than once. Async-signal-safe:
/// atomics and `close`.
extern "C" fn in_child() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    let words = WORDS.load(Ordering::Relaxed) as usize;
    for (index, word) in OPEN.iter().enumerate().take(words) {
        let mut bits = word.swap(0, Ordering::Relaxed);
        while bits != 0 {
            let fd = (index * 64) as i32 + bits.trailing_zeros() as i32;
            bits &= bits - 1;
            // SAFETY: closing a number is always defined; the table says that it was ours, and
            // the drop of the `Fd` in this child is disarmed by `FORKS`.
            unsafe { libc::close(fd) };
        }
    }
}

fn track(raw: RawFd) {
    if !HOOKED.load(Ordering::Acquire) {
        // Two threads at a time register it twice, which does no harm.
        // SAFETY: registers a handler that is async-signal-safe and lives as long as the program.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        HOOKED.store(true, Ordering::Release);
    }
    if let Some(word) = OPEN.get(raw as usize / 64) {
        WORDS.fetch_max(raw as u32 / 64 + 1, Ordering::Relaxed);
        word.fetch_or(1 << (raw % 64), Ordering::Relaxed);
    }
}

fn untrack(raw: RawFd) {
    if let Some(word) = OPEN.get(raw as usize / 64) {
        word.fetch_and(!(1 << (raw % 64)), Ordering::Relaxed);
    }
}

/// A descriptor that a library owns, closed in a forked child like our own. Dropped before the
/// library closes it.
#[derive(Debug)]
pub(crate) struct Tracked {
    raw: RawFd,
    forks: u32,
}

impl Tracked {
    pub fn new(raw: RawFd) -> Self {
        track(raw);
        Tracked { raw, forks: FORKS.load(Ordering::Relaxed) }
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        if self.forks == FORKS.load(Ordering::Relaxed) {
            untrack(self.raw);
        }
    }
}

/// An owned descriptor, tracked. Close-on-exec is the maker's duty (all of ours are).
#[derive(Debug)]
pub(crate) struct Fd {
    raw: RawFd,
    forks: u32,
}

impl Fd {
    pub fn new(owned: OwnedFd) -> Self {
        let raw = owned.into_raw_fd();
        track(raw);
        Fd { raw, forks: FORKS.load(Ordering::Relaxed) }
    }
}

impl Fd {
    /// Whether the number is this process's: in a forked child it was closed, and may be somebody
    /// else's by now.
    pub fn is_ours(&self) -> bool {
        self.forks == FORKS.load(Ordering::Relaxed)
    }
}

impl From<OwnedFd> for Fd {
    fn from(owned: OwnedFd) -> Self {
        Fd::new(owned)
    }
}

impl AsFd for Fd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: open for as long as `self` lives; in a forked child the number is closed, and
        // every use there is refused by the fork guard before it comes here.
        unsafe { BorrowedFd::borrow_raw(self.raw) }
    }
}

impl AsRawFd for Fd {
    fn as_raw_fd(&self) -> RawFd {
        self.raw
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        if !self.is_ours() {
            return;
        }
        untrack(self.raw);
        // SAFETY: made from an `OwnedFd` in this very process, and not closed since.
        drop(unsafe { OwnedFd::from_raw_fd(self.raw) });
    }
}
