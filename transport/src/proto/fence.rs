//! Fences at their target: which of the peer's fences still wait for messages and tags to be
//! placed. Knows nothing of how placing is done.

use std::collections::VecDeque;
use std::fmt;

use super::signed_distance;

/// The most fences of one peer that may wait at a time.
pub(crate) const FENCES_MAX: usize = 1024;

/// The peer has more than [`FENCES_MAX`] fences waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FenceError;

impl fmt::Display for FenceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "more than {FENCES_MAX} fences wait at a time")
    }
}

impl std::error::Error for FenceError {}

#[derive(Clone, Copy)]
struct Waiting {
    id: u32,
    messages: u32,
    tags: u32,
}

/// The fences that a peer asked for and that have not been answered.
///
/// They are answered in the order in which they were asked for. That delays none: what an earlier
/// fence waits for was sent before it, whatever happens to the later ones.
#[derive(Default)]
pub(crate) struct FenceLedger {
    waiting: VecDeque<Waiting>,
}

impl FenceLedger {
    pub fn new() -> Self {
        Self::default()
    }

    /// The peer wants to know when all messages and tags numbered below these have been placed.
    pub fn request(&mut self, id: u32, messages: u32, tags: u32) -> Result<(), FenceError> {
        if self.waiting.len() >= FENCES_MAX {
            return Err(FenceError);
        }
        self.waiting.push_back(Waiting { id, messages, tags });
        Ok(())
    }

    /// The next fence that is reached when all messages and tags numbered below these have been
    /// placed; it is forgotten. Call until `None`. Numbers wrap. Costs O(1).
    pub fn progress(&mut self, messages_done: u32, tags_done: u32) -> Option<u32> {
        let front = self.waiting.front()?;
        let reached = signed_distance(messages_done, front.messages) >= 0
            && signed_distance(tags_done, front.tags) >= 0;
        if reached { self.waiting.pop_front().map(|fence| fence.id) } else { None }
    }

    /// How many wait.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_for_both_families() {
        let mut ledger = FenceLedger::new();
        ledger.request(7, 2, 1).unwrap();
        assert_eq!(ledger.progress(2, 0), None);
        assert_eq!(ledger.progress(1, 1), None);
        assert_eq!(ledger.progress(2, 1), Some(7));
        assert_eq!(ledger.progress(2, 1), None);
        assert!(ledger.is_empty());
    }

    #[test]
    fn several_are_reached_at_once() {
        let mut ledger = FenceLedger::new();
        ledger.request(1, 0, 0).unwrap();
        ledger.request(2, 5, 0).unwrap();
        ledger.request(3, 9, 0).unwrap();
        assert_eq!(ledger.progress(5, 0), Some(1));
        assert_eq!(ledger.progress(5, 0), Some(2));
        assert_eq!(ledger.progress(5, 0), None);
        assert_eq!(ledger.len(), 1);
    }

    #[test]
    fn numbers_wrap() {
        let mut ledger = FenceLedger::new();
        ledger.request(1, 3, u32::MAX).unwrap();
        assert_eq!(ledger.progress(u32::MAX - 5, u32::MAX), None);
        assert_eq!(ledger.progress(2, 0), None);
        assert_eq!(ledger.progress(3, 0), Some(1));
    }

    #[test]
    fn count_is_bounded() {
        let mut ledger = FenceLedger::new();
        for id in 0..FENCES_MAX as u32 {
            ledger.request(id, 1, 0).unwrap();
        }
        assert_eq!(ledger.request(0, 1, 0), Err(FenceError));
        assert_eq!(ledger.progress(1, 0), Some(0));
        assert_eq!(ledger.request(0, 1, 0), Ok(()));
    }
}
