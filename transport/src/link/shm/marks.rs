//! How far two processes have come that copy one payload together: the receiver from its start
//! on, the sender from its end backwards (see `link/together`).
//!
//! Each side's page has one [`Marks`], which only it writes. Two rules keep memory from being
//! written that is no longer the copy's, and each is a pair of "store, `fence(SeqCst)`, load the
//! other's word", of which at least one load sees the other's store:
//! - the sender stores that it is busy, then looks whether the receiver has closed the copy; the
//!   receiver closes it, then looks whether the sender is busy;
//! - the same with the receiver's word that it is dying in place of the closing.
//!
//! The rest is advice: where both take the same bytes on, both copy the same to the same place.
//!
//! Copies are told apart by a number, so that what is left of the last one says nothing of the
//! next.

use super::cells::{AtomicU64, Ordering, fence};

/// Payloads that are copied together are shorter than this.
pub(super) const OFFSET_MAX: u64 = BUSY - 1;

const BUSY: u64 = 1 << 47;
const NUMBER_SHIFT: u32 = 48;

/// The closed end of what the receiver takes on.
const CLOSED: u64 = OFFSET_MAX;

#[repr(C, align(64))]
pub(super) struct Marks {
    /// As receiver: the number of the copy, and the offset below which this side copies.
    taken: AtomicU64,
    /// As sender: the number, whether it is at it now, and the offset from which on it copies.
    given: AtomicU64,
}

/// What the sender says of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Given {
    /// From here on the payload is, or is being, copied by the sender.
    pub from: u64,
    pub busy: bool,
}

fn word(number: u16, offset: u64) -> u64 {
    debug_assert!(offset <= OFFSET_MAX);
    u64::from(number) << NUMBER_SHIFT | offset
}

fn is_about(word: u64, number: u16) -> bool {
    word >> NUMBER_SHIFT == u64::from(number)
}

/// What the receiver writes, and the sender reads.
impl Marks {
    /// This side copies what lies below `end`.
    pub fn take(&self, number: u16, end: u64) {
        self.taken.store(word(number, end), Ordering::Relaxed);
    }

    /// The sender shall begin nothing more of this copy. To be called before the look at its
    /// [`Marks::given`].
    pub fn close(&self, number: u16) {
        self.take(number, CLOSED);
        fence(Ordering::SeqCst);
    }

    /// Up to where the receiver copies, unless it has closed this copy.
    pub fn taken(&self, number: u16) -> Option<u64> {
        let word = self.taken.load(Ordering::Relaxed);
        let offset = word & OFFSET_MAX;
        (is_about(word, number) && word & BUSY == 0 && offset != CLOSED).then_some(offset)
    }
}

/// What the sender writes, and the receiver reads.
impl Marks {
    /// This side is about to copy what lies from `from` on. To be called before the look at the
    /// receiver's [`Marks::taken`] and at whether it is dying.
    pub fn begin(&self, number: u16, from: u64) {
        self.given.store(word(number, from) | BUSY, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// This side is not copying now, and what lies from `from` on is there.
    pub fn end(&self, number: u16, from: u64) {
        self.given.store(word(number, from), Ordering::Release);
    }

    /// What the sender has come to in this copy; `None`: it has not begun.
    pub fn given(&self, number: u16) -> Option<Given> {
        let word = self.given.load(Ordering::Acquire);
        let given = Given { from: word & OFFSET_MAX, busy: word & BUSY != 0 };
        is_about(word, number).then_some(given)
    }

    /// Whether the sender is copying, whichever copy it may be.
    pub fn is_busy(&self) -> bool {
        self.given.load(Ordering::Acquire) & BUSY != 0
    }

    #[cfg(test)]
    pub fn zeroed() -> Self {
        Marks { taken: AtomicU64::new(0), given: AtomicU64::new(0) }
    }
}
