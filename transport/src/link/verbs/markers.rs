//! What is said of payloads once nothing that was read of them can be asked for again.
//!
//! An adapter that waits too long for the answer to a read asks again, and the first answer may come
//! all the same. Then the read is over while it is still asked for: the repetition is on its way to
//! the peer. Where it arrives, the memory has to be registered still, or that end of the queue pair
//! breaks, and with it the link. So the peer is told that it may have its memory back only behind
//! such repetitions: by a *marker*, a send of no bytes on the queue pair of the reads, whose packets
//! arrive in the order in which they were sent. When it has arrived, so has everything before it; what
//! is said then goes by the queue pair of the messages. (Soft-RoCE across a wire that loses packets,
//! 1 MiB both ways: of 70 connections 22 were lost within 1.5 s without this.)
//!
//! One marker is under way at a time, and stands for all payloads that were finished before it was
//! posted. There is always room for it at the peer: the next one is posted only when all that was to
//! be said behind the one before has been posted, which took credit; so there are no more markers
//! that the peer has not looked at than messages.

/// What is said behind a marker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// The payload is here.
    Release,
    /// The rest of it is to come in chunks.
    Pull,
}

/// Markers, and the payloads that wait for one.
#[derive(Default)]
pub(super) struct Markers {
    /// Finished since the last one was posted.
    waiting: Vec<(u32, Then)>,
    /// Those that the one under way stands for; none if there is none.
    behind: Vec<(u32, Then)>,
}

impl Markers {
    pub fn push(&mut self, id: u32, then: Then) {
        self.waiting.push((id, then));
    }

    /// Whether one is to be posted now. If so it counts as posted.
    pub fn begin(&mut self) -> bool {
        let begins = !self.is_under_way() && !self.waiting.is_empty();
        if begins {
            std::mem::swap(&mut self.behind, &mut self.waiting);
        }
        begins
    }

    /// The one under way has arrived: what it stands for.
    pub fn arrived(&mut self) -> Vec<(u32, Then)> {
        std::mem::take(&mut self.behind)
    }

    pub fn is_under_way(&self) -> bool {
        !self.behind.is_empty()
    }

    /// Payloads of which something is still to be said.
    pub fn len(&self) -> usize {
        self.waiting.len() + self.behind.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn clear(&mut self) {
        *self = Markers::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_stands_for_all_before_it() {
        let mut markers = Markers::default();
        assert!(!markers.begin(), "nothing waits");
        markers.push(1, Then::Release);
        markers.push(2, Then::Pull);
        assert!(markers.begin() && markers.is_under_way());
        markers.push(3, Then::Release);
        assert!(!markers.begin(), "one at a time");
        assert_eq!(markers.len(), 3);
        assert_eq!(markers.arrived(), [(1, Then::Release), (2, Then::Pull)]);
        assert!(markers.begin());
        assert_eq!(markers.arrived(), [(3, Then::Release)]);
        assert!(!markers.begin() && markers.is_empty());
    }
}
