//! How long an operation polls before it sleeps, and before it lets others run.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Looks at the lanes that a spinning operation takes between two looks at the clock.
pub(super) const SPINS_PER_LOOK_AT_CLOCK: u32 = 16;
/// How long an operation that is the only one in this process to spin goes on after its first looks,
/// before it lets other tasks run. To yield is not free: tokio asks the kernel for events each time,
/// and after every 16 looks, about a microsecond, 0.26 to 0.44 such calls were made for each message
/// of 8 B over shm (0.52 µs half a round trip, and 0.40 with 64 or 256 looks). Others that spin may
/// wait for what comes on this very thread: where there are several, each yields after its 16 looks.
pub(super) const SPIN_TURN: Duration = Duration::from_micros(10);

/// Counts those that spin in this process. Too many of them, as in the child of a fork, or where one is
/// kept and not polled, only make turns shorter.
pub(super) struct Spinner(());

static SPINNERS: AtomicUsize = AtomicUsize::new(0);

impl Spinner {
    pub fn new() -> Self {
        SPINNERS.fetch_add(1, Ordering::Relaxed);
        Spinner(())
    }

    #[inline]
    pub fn is_alone(&self) -> bool {
        SPINNERS.load(Ordering::Relaxed) == 1
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        SPINNERS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether polling before sleeping has paid lately.
#[derive(Default)]
pub(crate) struct SpinTracker {
    score: i8,
    skipped: u8,
}

impl SpinTracker {
    /// A poll found something before the limit.
    pub fn paid(&mut self) {
        self.score = (self.score + 2).min(8);
    }

    /// The limit passed in vain.
    pub fn failed(&mut self) {
        self.score = (self.score - 1).max(-4);
    }

    /// Whether to try. After a row of failures only every 16th time, to notice when it pays again.
    pub fn worthwhile(&mut self) -> bool {
        if self.score > -4 {
            return true;
        }
        self.skipped = (self.skipped + 1) % 16;
        self.skipped == 0
    }
}
