//! Links that nobody named and that did not come up in their time, so that not every connection waits.
//!
//! Where RDMA hardware is up and does not reach a peer, each attempt takes all the time that it may. What
//! is wrong may be mended, so it is forgotten after a while. A peer that is started anew has another
//! number, and there may be many of them: so a link that fails in a row is left alone for all.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::link::LinkKind;

/// For how long a link is left alone.
pub(crate) const SPARED: Duration = Duration::from_secs(60);
/// Attempts without a success between them, to whatever peers, before it is left alone for all.
const IN_A_ROW: u32 = 3;
/// Peers that are remembered; beyond it the oldest is forgotten.
const PEERS_MAX: usize = 1024;

type Peer = (LinkKind, [u8; 16]);

#[derive(Clone, Copy, Debug)]
struct Late {
    at: Instant,
    took: Duration,
}

impl Late {
    fn holds(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) < SPARED
    }

    fn reason(&self, now: Instant, whom: &str) -> String {
        let Late { at, took } = self;
        let ago = now.saturating_duration_since(*at).as_secs();
        format!(
            "did not come up within {took:.1?} {ago} s ago{whom}; tried again after {} s",
            SPARED.as_secs()
        )
    }
}

/// One node's.
#[derive(Debug, Default)]
pub(crate) struct LateLinks {
    peers: HashMap<Peer, Late>,
    /// Of each link: how often in a row, and the last time.
    all: HashMap<LinkKind, (u32, Late)>,
}

impl LateLinks {
    pub fn failed(&mut self, link: LinkKind, peer: [u8; 16], took: Duration, now: Instant) {
        let late = Late { at: now, took };
        if self.peers.len() >= PEERS_MAX {
            self.peers.retain(|_, late| late.holds(now));
        }
        if self.peers.len() >= PEERS_MAX {
            let oldest = self.peers.iter().min_by_key(|(_, late)| late.at).map(|(peer, _)| *peer);
            oldest.map(|oldest| self.peers.remove(&oldest));
        }
        self.peers.insert((link, peer), late);
        let (count, last) = self.all.entry(link).or_insert((0, late));
        (*count, *last) = (count.saturating_add(1), late);
    }

    pub fn came_up(&mut self, link: LinkKind, peer: [u8; 16]) {
        self.peers.remove(&(link, peer));
        self.all.remove(&link);
    }

    /// Why this link is not tried with this peer now.
    pub fn objection(&self, link: LinkKind, peer: [u8; 16], now: Instant) -> Option<String> {
        if let Some(late) = self.peers.get(&(link, peer)).filter(|late| late.holds(now)) {
            return Some(late.reason(now, ""));
        }
        let (count, last) = self.all.get(&link)?;
        let all = *count >= IN_A_ROW && last.holds(now);
        all.then(|| last.reason(now, &format!(", {count} times in a row with any peer")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: LinkKind = LinkKind::Verbs;
    const TOOK: Duration = Duration::from_secs(2);

    fn peer(number: u16) -> [u8; 16] {
        let mut id = [0; 16];
        id[..2].copy_from_slice(&number.to_le_bytes());
        id
    }

    fn after(start: Instant, secs: u64) -> Instant {
        start + Duration::from_secs(secs)
    }

    #[test]
    fn a_peer_is_spared_for_a_while() {
        let (mut late, start) = (LateLinks::default(), Instant::now());
        assert_eq!(late.objection(LINK, peer(1), start), None);
        late.failed(LINK, peer(1), TOOK, start);
        let reason = late.objection(LINK, peer(1), after(start, 59)).expect("it is remembered");
        assert_eq!(reason, "did not come up within 2.0s 59 s ago; tried again after 60 s");
        assert_eq!(late.objection(LINK, peer(1), after(start, 60)), None);
        assert_eq!(late.objection(LINK, peer(2), start), None, "another peer");
        assert_eq!(late.objection(LinkKind::Ucx, peer(1), start), None, "another link");
        late.came_up(LINK, peer(1));
        assert_eq!(late.objection(LINK, peer(1), start), None);
    }

    #[test]
    fn three_in_a_row_spare_all() {
        let (mut late, start) = (LateLinks::default(), Instant::now());
        late.failed(LINK, peer(1), TOOK, start);
        late.failed(LINK, peer(2), TOOK, start);
        assert_eq!(late.objection(LINK, peer(9), start), None);
        late.came_up(LINK, peer(3));
        late.failed(LINK, peer(2), TOOK, start);
        late.failed(LINK, peer(4), TOOK, start);
        assert_eq!(late.objection(LINK, peer(9), start), None, "one came up between them");
        late.failed(LINK, peer(5), TOOK, after(start, 30));
        let reason = late.objection(LINK, peer(9), after(start, 89)).expect("for all");
        assert!(reason.contains("59 s ago") && reason.contains("3 times in a row"), "{reason}");
        assert_eq!(late.objection(LinkKind::Ucx, peer(9), after(start, 31)), None);
        assert_eq!(late.objection(LINK, peer(9), after(start, 90)), None, "tried again");
        late.failed(LINK, peer(9), TOOK, after(start, 92));
        assert!(late.objection(LINK, peer(8), after(start, 93)).is_some(), "once is enough now");
    }

    #[test]
    fn memory_is_bounded() {
        let (mut late, start) = (LateLinks::default(), Instant::now());
        let many = PEERS_MAX as u16;
        for number in 0..many + 10 {
            late.failed(LINK, peer(number), TOOK, start + Duration::from_millis(number.into()));
            late.all.clear();
            assert!(late.peers.len() <= PEERS_MAX);
        }
        let now = after(start, 2);
        assert_eq!(late.objection(LINK, peer(9), now), None, "the oldest are forgotten");
        assert!(late.objection(LINK, peer(10), now).is_some());
        assert!(late.objection(LINK, peer(many + 9), now).is_some());
        late.failed(LINK, peer(many + 10), TOOK, after(start, 100));
        assert_eq!(late.peers.len(), 1, "what is over goes first");
    }
}
