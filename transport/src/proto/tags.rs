//! Matching of tagged arrivals with posted receives. Knows neither payloads nor who waits.
//!
//! Two rules. An arrival goes to the receive posted first among those it matches. A receive takes
//! the arrival with the lowest number among those it matches. So at any time no posted receive
//! matches a stored arrival: whoever comes second finds the first.
//!
//! Posted receives are found by hash, in a table per mask: programs use a handful of masks, mostly
//! all ones. Stored arrivals are kept in trees by number and by tag, because a peer chooses both.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, Hash, Hasher, RandomState};

/// A mask under which only equal tags match.
const EXACT: u64 = u64::MAX;

/// Empty tables of masks once used are kept up to this number, so that posting one receive at a
/// time does not allocate.
const IDLE_MASKS_MAX: usize = 8;

/// An arrival that found no receive, given out again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unexpected<U> {
    /// Its number, as given to [`TagMatcher::store`].
    pub seq: u32,
    /// Its tag.
    pub tag: u64,
    /// What was stored.
    pub value: U,
}

/// Posted receives and unexpected arrivals of one endpoint.
///
/// `R` names a receive; each posted one must be named differently. Numbers of arrivals may wrap:
/// they are compared by distance from the latest that [`arrive`](Self::arrive) was told of, which
/// is right for what came up to 2³¹ numbers earlier. Numbers must be unique among the stored.
///
/// With `m` different masks posted and `n` arrivals stored: `arrive` and `withdraw` cost O(m),
/// `store` O(log n), `post` O(log n) with a full mask and O(n) with another.
pub(crate) struct TagMatcher<R, U> {
    posted: Posted<R>,
    stored: Stored<U>,
}

impl<R: Copy + Eq + Hash, U> Default for TagMatcher<R, U> {
    fn default() -> Self {
        Self::new()
    }
}

impl<R: Copy + Eq + Hash, U> TagMatcher<R, U> {
    pub fn new() -> Self {
        TagMatcher { posted: Posted::new(), stored: Stored::new() }
    }

    /// A receive for tags that equal `tag` in the bits of `mask`. Either the earliest arrival that
    /// matches, which is forgotten here, or `None`, and the receive is kept.
    pub fn post(&mut self, tag: u64, mask: u64, recv: R) -> Option<Unexpected<U>> {
        let found = self.stored.take_match(tag, mask);
        if found.is_none() {
            self.posted.push(tag, mask, recv);
        }
        found
    }

    /// An arrival: the receive it goes to, which is forgotten here. With `None` it is either
    /// stored or refused.
    pub fn arrive(&mut self, seq: u32, tag: u64) -> Option<R> {
        self.stored.note(seq);
        self.posted.take_match(tag)
    }

    /// Keeps an arrival for which [`arrive`](Self::arrive) found nothing.
    pub fn store(&mut self, seq: u32, tag: u64, value: U) {
        self.stored.insert(seq, tag, value);
    }

    /// An arrival that had been matched, and whose receive was cancelled, comes back at its place.
    /// If a posted receive matches, that one gets it; otherwise it is stored.
    pub fn put_back(&mut self, seq: u32, tag: u64, value: U) -> Option<(R, U)> {
        match self.posted.take_match(tag) {
            Some(recv) => Some((recv, value)),
            None => {
                self.store(seq, tag, value);
                None
            }
        }
    }

    /// Forgets a posted receive; `false` if it is not posted (any more).
    pub fn withdraw(&mut self, recv: R) -> bool {
        self.posted.withdraw(recv)
    }

    /// How many receives are posted.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn posted_len(&self) -> usize {
        self.posted.index.len()
    }

    /// How many arrivals are stored.
    pub fn unexpected_len(&self) -> usize {
        self.stored.by_seq.len()
    }

    /// Forgets all posted receives and gives them out in posting order.
    pub fn drain_posted(&mut self) -> impl Iterator<Item = R> + use<R, U> {
        self.posted.drain()
    }

    /// Forgets all stored arrivals and gives them out by number.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn drain_unexpected(&mut self) -> impl Iterator<Item = Unexpected<U>> + use<R, U> {
        self.stored.drain()
    }

    /// The stored arrival with this number.
    pub fn unexpected_mut(&mut self, seq: u32) -> Option<&mut U> {
        let place = self.stored.place(seq);
        self.stored.by_seq.get_mut(&place).map(|(_, value)| value)
    }

    /// The first stored arrival whose value is so. Looks at all of them.
    #[cfg(test)]
    pub fn find_unexpected_mut(&mut self, so: impl Fn(&U) -> bool) -> Option<&mut U> {
        self.stored.by_seq.values_mut().map(|(_, value)| value).find(|value| so(value))
    }
}

/// An index into [`Posted::nodes`].
type NodeIndex = u32;

/// The end of a list.
const NIL: NodeIndex = NodeIndex::MAX;

/// A posted receive, in the list of those with the same mask and tag.
struct Node<R> {
    recv: R,
    /// Counts postings: the order among lists.
    order: u64,
    mask: u64,
    tag: u64,
    prev: NodeIndex,
    next: NodeIndex,
}

/// The posted receives with one mask: first and last of the list for each masked tag.
struct Group {
    mask: u64,
    lists: HashMap<u64, (NodeIndex, NodeIndex), Mixer>,
}

struct Posted<R> {
    nodes: Vec<Node<R>>,
    /// Places in `nodes` that are not in use.
    free: Vec<NodeIndex>,
    groups: Vec<Group>,
    index: HashMap<R, NodeIndex, Mixer>,
    next_order: u64,
    mixer: Mixer,
}

impl<R: Copy + Eq + Hash> Posted<R> {
    fn new() -> Self {
        let mixer = Mixer::seeded();
        Posted {
            nodes: Vec::new(),
            free: Vec::new(),
            groups: Vec::new(),
            index: HashMap::with_hasher(mixer),
            next_order: 0,
            mixer,
        }
    }

    fn push(&mut self, tag: u64, mask: u64, recv: R) {
        let tag = tag & mask;
        let order = self.next_order;
        self.next_order += 1;
        let at = self.allocate(Node { recv, order, mask, tag, prev: NIL, next: NIL });
        let lists = &mut self.group(mask).lists;
        let (_, last) = lists.entry(tag).or_insert((at, NIL));
        let before = std::mem::replace(last, at);
        self.nodes[at as usize].prev = before;
        if before != NIL {
            self.nodes[before as usize].next = at;
        }
        let twice = self.index.insert(recv, at);
        debug_assert!(twice.is_none(), "each posted receive has a name of its own");
    }

    fn allocate(&mut self, node: Node<R>) -> NodeIndex {
        match self.free.pop() {
            Some(at) => {
                self.nodes[at as usize] = node;
                at
            }
            None => {
                self.nodes.push(node);
                (self.nodes.len() - 1) as NodeIndex
            }
        }
    }

    fn group(&mut self, mask: u64) -> &mut Group {
        let at = match self.groups.iter().position(|group| group.mask == mask) {
            Some(at) => at,
            None => {
                if self.groups.len() >= IDLE_MASKS_MAX {
                    self.groups.retain(|group| !group.lists.is_empty());
                }
                self.groups.push(Group { mask, lists: HashMap::with_hasher(self.mixer) });
                self.groups.len() - 1
            }
        };
        &mut self.groups[at]
    }

    fn take_match(&mut self, tag: u64) -> Option<R> {
        let firsts = self.groups.iter().filter_map(|group| {
            if group.lists.is_empty() {
                return None;
            }
            group.lists.get(&(tag & group.mask)).map(|&(first, _)| first)
        });
        let at = firsts.min_by_key(|&at| self.nodes[at as usize].order)?;
        let recv = self.nodes[at as usize].recv;
        self.index.remove(&recv);
        self.unlink(at);
        Some(recv)
    }

    fn withdraw(&mut self, recv: R) -> bool {
        let Some(at) = self.index.remove(&recv) else {
            return false;
        };
        self.unlink(at);
        true
    }

    /// Takes a node out of its list and frees it.
    fn unlink(&mut self, at: NodeIndex) {
        let Node { mask, tag, prev, next, .. } = self.nodes[at as usize];
        if prev != NIL {
            self.nodes[prev as usize].next = next;
        }
        if next != NIL {
            self.nodes[next as usize].prev = prev;
        }
        let lists = &mut self.group(mask).lists;
        if prev == NIL && next == NIL {
            lists.remove(&tag);
        } else if let Some((first, last)) = lists.get_mut(&tag) {
            if prev == NIL {
                *first = next;
            }
            if next == NIL {
                *last = prev;
            }
        }
        self.free.push(at);
    }

    fn drain(&mut self) -> impl Iterator<Item = R> + use<R> {
        let mut order: Vec<(u64, R)> = Vec::with_capacity(self.index.len());
        order.extend(self.index.drain().map(|(recv, at)| (self.nodes[at as usize].order, recv)));
        order.sort_unstable_by_key(|&(order, _)| order);
        self.nodes.clear();
        self.free.clear();
        self.groups.clear();
        order.into_iter().map(|(_, recv)| recv)
    }
}

/// A number without wrapping, so that it sorts.
type Place = u64;

struct Stored<U> {
    by_seq: BTreeMap<Place, (u64, U)>,
    by_tag: BTreeSet<(u64, Place)>,
    /// The latest place noted. Numbers are placed by their signed distance from it.
    latest: Place,
}

impl<U> Stored<U> {
    fn new() -> Self {
        // Far from zero: numbers up to 2^31 before the first are placed without underflow.
        Stored { by_seq: BTreeMap::new(), by_tag: BTreeSet::new(), latest: 1 << 32 }
    }

    fn place(&self, seq: u32) -> Place {
        let distance = super::signed_distance(seq, self.latest as u32);
        self.latest.wrapping_add_signed(distance.into())
    }

    /// Whether it is stored or not: one that is put back must find its place before it.
    fn note(&mut self, seq: u32) {
        self.latest = self.latest.max(self.place(seq));
    }

    fn insert(&mut self, seq: u32, tag: u64, value: U) {
        let place = self.place(seq);
        self.by_tag.insert((tag, place));
        let twice = self.by_seq.insert(place, (tag, value));
        debug_assert!(twice.is_none(), "numbers of stored arrivals are unique");
    }

    fn take_match(&mut self, tag: u64, mask: u64) -> Option<Unexpected<U>> {
        if self.by_seq.is_empty() {
            return None;
        }
        let place = if mask == EXACT {
            let (found, place) = *self.by_tag.range((tag, 0)..).next()?;
            (found == tag).then_some(place)?
        } else {
            let wanted = tag & mask;
            *self.by_seq.iter().find(|(_, (tag, _))| tag & mask == wanted)?.0
        };
        let (tag, value) = self.by_seq.remove(&place)?;
        self.by_tag.remove(&(tag, place));
        Some(Unexpected { seq: place as u32, tag, value })
    }

    #[cfg(any(test, feature = "fuzzing"))]
    fn drain(&mut self) -> impl Iterator<Item = Unexpected<U>> + use<U> {
        self.by_tag.clear();
        std::mem::take(&mut self.by_seq).into_iter().map(|(place, (tag, value))| Unexpected {
            seq: place as u32,
            tag,
            value,
        })
    }
}

/// Hashes one or two integers by a keyed folded multiplication. Keys differ between endpoints, so
/// that nobody can prepare tags that collide.
#[derive(Clone, Copy)]
struct Mixer {
    key: u64,
    factor: u64,
}

impl Mixer {
    fn seeded() -> Self {
        let random = RandomState::new();
        Mixer { key: random.hash_one(0u8), factor: random.hash_one(1u8) | 1 }
    }
}

impl BuildHasher for Mixer {
    type Hasher = Mixed;

    fn build_hasher(&self) -> Mixed {
        Mixed { state: self.key, factor: self.factor }
    }
}

struct Mixed {
    state: u64,
    factor: u64,
}

impl Hasher for Mixed {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(byte.into());
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(value.into());
    }

    fn write_u64(&mut self, value: u64) {
        let product = u128::from(self.state ^ value) * u128::from(self.factor);
        self.state = (product as u64) ^ (product >> 64) as u64;
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    fn finish(&self) -> u64 {
        self.state.rotate_left(32) ^ self.state
    }
}

/// What the matcher must do, written as plainly as possible. Tests and fuzzing compare the two.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod model {
    /// Receives as (tag, mask, name) in posting order, arrivals as (number, tag) in any order.
    /// Numbers do not wrap here.
    #[derive(Default)]
    pub struct Model {
        pub posted: Vec<(u64, u64, u32)>,
        pub stored: Vec<(u32, u64)>,
    }

    impl Model {
        pub fn post(&mut self, tag: u64, mask: u64, recv: u32) -> Option<(u32, u64)> {
            let matching = |&(_, (_, t)): &(usize, &(u32, u64))| t & mask == tag & mask;
            let stored = self.stored.iter().enumerate().filter(matching);
            match stored.min_by_key(|(_, (seq, _))| *seq).map(|(i, _)| i) {
                Some(i) => Some(self.stored.remove(i)),
                None => {
                    self.posted.push((tag, mask, recv));
                    None
                }
            }
        }

        pub fn arrive(&mut self, tag: u64) -> Option<u32> {
            let i = self.posted.iter().position(|&(t, m, _)| t & m == tag & m)?;
            Some(self.posted.remove(i).2)
        }

        pub fn withdraw(&mut self, recv: u32) -> bool {
            let before = self.posted.len();
            self.posted.retain(|&(_, _, r)| r != recv);
            self.posted.len() < before
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::model::Model;
    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Post {
            tag: u64,
            mask: u64,
        },
        Arrive {
            tag: u64,
        },
        /// An arrival that was matched before comes back.
        PutBack {
            which: usize,
        },
        Withdraw {
            recv: u32,
        },
    }

    fn step() -> impl Strategy<Value = Step> {
        let tag = || 0u64..6;
        let mask = prop_oneof![3 => Just(EXACT), 1 => Just(0u64), 1 => Just(1u64), 1 => 0u64..32];
        prop_oneof![
            4 => (tag(), mask).prop_map(|(tag, mask)| Step::Post { tag, mask }),
            4 => tag().prop_map(|tag| Step::Arrive { tag }),
            1 => (0usize..8).prop_map(|which| Step::PutBack { which }),
            1 => (0u32..60).prop_map(|recv| Step::Withdraw { recv }),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_the_model(
            // Also where a distance from 0 turns negative.
            start in prop_oneof![any::<u32>(), (1u32 << 31) - 100..(1 << 31) + 100],
            steps in prop::collection::vec(step(), 0..300), drain_at in 0usize..300,
        ) {
            let mut matcher = TagMatcher::new();
            let mut model = Model::default();
            let mut matched: Vec<(u32, u64)> = Vec::new();
            let (mut next_recv, mut next_seq) = (0, 0u32);
            // The matcher sees numbers that start anywhere and wrap; the model counts from 0.
            let wire = |seq: u32| seq.wrapping_add(start);
            for (turn, step) in steps.into_iter().enumerate() {
                if turn == drain_at {
                    let posted: Vec<u32> = matcher.drain_posted().collect();
                    let model = std::mem::take(&mut model.posted);
                    prop_assert_eq!(posted, model.iter().map(|p| p.2).collect::<Vec<_>>());
                }
                match step {
                    Step::Post { tag, mask } => {
                        let recv = next_recv;
                        next_recv += 1;
                        let found = matcher.post(tag, mask, recv);
                        let expected = model.post(tag, mask, recv);
                        matched.extend(expected);
                        let expected =
                            expected.map(|(s, tag)| Unexpected { seq: wire(s), tag, value: s });
                        prop_assert_eq!(found, expected);
                    }
                    Step::Arrive { tag } => {
                        let seq = next_seq;
                        next_seq += 1;
                        let found = matcher.arrive(wire(seq), tag);
                        prop_assert_eq!(found, model.arrive(tag));
                        if found.is_some() {
                            matched.push((seq, tag));
                        } else {
                            matcher.store(wire(seq), tag, seq);
                            model.stored.push((seq, tag));
                        }
                    }
                    Step::PutBack { which } if which < matched.len() => {
                        let (seq, tag) = matched.swap_remove(which);
                        let given = matcher.put_back(wire(seq), tag, seq);
                        let expected = model.arrive(tag);
                        prop_assert_eq!(given, expected.map(|recv| (recv, seq)));
                        match expected {
                            Some(_) => matched.push((seq, tag)),
                            None => model.stored.push((seq, tag)),
                        }
                    }
                    Step::PutBack { .. } => {}
                    Step::Withdraw { recv } => {
                        prop_assert_eq!(matcher.withdraw(recv), model.withdraw(recv));
                    }
                }
                prop_assert_eq!(matcher.posted_len(), model.posted.len());
                prop_assert_eq!(matcher.unexpected_len(), model.stored.len());
            }
            model.stored.sort_unstable();
            for &(seq, _) in &model.stored {
                prop_assert_eq!(matcher.unexpected_mut(wire(seq)).copied(), Some(seq));
                prop_assert!(matcher.find_unexpected_mut(|&value| value == seq).is_some());
            }
            let rest: Vec<_> = matcher.drain_unexpected().map(|u| (u.value, u.tag)).collect();
            prop_assert_eq!(rest, model.stored);
        }
    }

    #[test]
    fn wildcard_and_exact_go_by_posting_order() {
        let mut m: TagMatcher<u32, ()> = TagMatcher::new();
        m.post(5, EXACT, 1);
        m.post(0, 0, 2);
        m.post(5, EXACT, 3);
        assert_eq!([0, 1, 2, 3].map(|seq| m.arrive(seq, 5)), [Some(1), Some(2), Some(3), None]);
    }

    #[test]
    fn what_comes_back_keeps_its_place() {
        for first in [u32::MAX - 1, u32::MAX, i32::MAX as u32, 5] {
            let mut m: TagMatcher<u32, char> = TagMatcher::new();
            let [second, third] = [1, 2].map(|after| first.wrapping_add(after));
            assert_eq!(m.post(1, EXACT, 1), None);
            assert_eq!(m.arrive(first, 1), Some(1));
            for (seq, value) in [(second, 'b'), (third, 'c')] {
                assert_eq!(m.arrive(seq, 1), None);
                m.store(seq, 1, value);
            }
            assert_eq!(m.put_back(first, 1, 'a'), None);
            let order = [(); 3].map(|()| m.post(0, 0, 9).map(|u| u.value));
            assert_eq!(order, [Some('a'), Some('b'), Some('c')]);
        }
    }

    #[test]
    fn numbers_keep_their_order_all_the_way_round() {
        let mut m: TagMatcher<u32, u32> = TagMatcher::new();
        for quarter in 0..6u32 {
            let seq = quarter.wrapping_mul(1 << 30);
            for (seq, value) in [(seq.wrapping_sub(1), u32::MAX), (seq, quarter)] {
                assert_eq!(m.arrive(seq, 1), None);
                m.store(seq, 1, value);
            }
            assert_eq!(m.post(0, 0, 0).map(|u| u.value), Some(u32::MAX));
            assert_eq!(m.post(1, EXACT, 0).map(|u| (u.seq, u.value)), Some((seq, quarter)));
        }
    }

    #[test]
    fn what_comes_back_goes_to_a_waiting_receive() {
        let mut m: TagMatcher<u32, char> = TagMatcher::new();
        m.post(1, EXACT, 1);
        assert_eq!(m.arrive(0, 1), Some(1));
        m.post(0, 0, 2);
        assert_eq!(m.put_back(0, 1, 'a'), Some((2, 'a')));
        assert_eq!((m.posted_len(), m.unexpected_len()), (0, 0));
    }

    #[test]
    fn many_masks_leave_nothing_behind() {
        let mut m: TagMatcher<u32, ()> = TagMatcher::new();
        for recv in 0..1000 {
            m.post(0, u64::from(recv) << 8, recv);
            assert!(m.withdraw(recv));
            assert!(!m.withdraw(recv));
        }
        assert!(m.posted.groups.len() <= IDLE_MASKS_MAX);
        assert_eq!(m.posted.nodes.len(), 1);
    }
}
