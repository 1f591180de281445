//! Restoring order: values arrive with their numbers in any order and leave in order. Knows
//! nothing of the values.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

/// How far ahead of the next expected number a value may be.
pub(crate) const SEQUENCE_WINDOW: u32 = 1 << 30;

/// Values this close to the next one wait in slots that are reused, so that lanes running at
/// slightly different speeds cost no allocation. Those further ahead wait in a tree, so that a
/// single number far ahead does not cost memory for all the numbers before it.
const NEAR: usize = 1024;

/// A number that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SequenceError {
    /// This number is waiting already.
    Duplicate { seq: u32 },
    /// This number has passed, or lies beyond the window.
    OutsideWindow { seq: u32, next: u32 },
}

impl fmt::Display for SequenceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SequenceError::Duplicate { seq } => write!(f, "number {seq} came twice"),
            SequenceError::OutsideWindow { seq, next } => {
                write!(f, "number {seq} came when {next} was next")
            }
        }
    }
}

impl std::error::Error for SequenceError {}

/// Values that wait for their turn. Numbers start at 0 and wrap.
///
/// In order, inserting and popping cost O(1) and do not allocate. `Sequencer<()>` serves to find
/// the number below which everything is finished: insert each number as it finishes, pop all,
/// then ask for [`next`](Sequencer::next).
pub(crate) struct Sequencer<T> {
    /// How many have left; the low 32 bits are the next number.
    popped: u64,
    /// Slot `i` is for number `popped + i`. The last slot, if any, is full.
    near: VecDeque<Option<T>>,
    /// Values that were further ahead than [`NEAR`] when they came, by unwrapped number.
    far: BTreeMap<u64, T>,
    len: usize,
}

impl<T> Default for Sequencer<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Sequencer<T> {
    pub fn new() -> Self {
        Self::starting_at(0)
    }

    /// Expects `next` first.
    pub fn starting_at(next: u32) -> Self {
        let near = VecDeque::new();
        Sequencer { popped: u64::from(next), near, far: BTreeMap::new(), len: 0 }
    }

    /// The number that leaves next.
    pub fn next(&self) -> u32 {
        self.popped as u32
    }

    /// How many values wait.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether a value with this number could be inserted now.
    pub fn accepts(&self, seq: u32) -> Result<(), SequenceError> {
        self.place(seq).map(drop)
    }

    /// How far ahead this number is, and the number unwrapped.
    fn place(&self, seq: u32) -> Result<(usize, u64), SequenceError> {
        let ahead = seq.wrapping_sub(self.next());
        if ahead >= SEQUENCE_WINDOW {
            return Err(SequenceError::OutsideWindow { seq, next: self.next() });
        }
        let number = self.popped + u64::from(ahead);
        let slot = ahead as usize;
        let in_slot = self.near.get(slot).is_some_and(Option::is_some);
        if in_slot || (!self.far.is_empty() && self.far.contains_key(&number)) {
            return Err(SequenceError::Duplicate { seq });
        }
        Ok((slot, number))
    }

    /// Keeps `value` until all numbers before `seq` have left.
    pub fn insert(&mut self, seq: u32, value: T) -> Result<(), SequenceError> {
        let (slot, number) = self.place(seq)?;
        if slot < self.near.len() {
            self.near[slot] = Some(value);
        } else if slot < NEAR {
            self.near.resize_with(slot, || None);
            self.near.push_back(Some(value));
        } else {
            self.far.insert(number, value);
        }
        self.len += 1;
        Ok(())
    }

    /// Lets the next number pass without keeping it, if it is this one and nothing waits: what
    /// `insert` and `pop` would do, for the common case.
    #[inline]
    pub fn pass(&mut self, seq: u32) -> bool {
        let passes = self.len == 0 && seq == self.next();
        if passes {
            // Nothing waits, so there is no slot for this number or any later one.
            if !self.near.is_empty() {
                self.near.clear();
            }
            self.popped += 1;
        }
        passes
    }

    /// The next value in order, if it is here.
    pub fn pop(&mut self) -> Option<T> {
        let value = match self.near.front_mut() {
            Some(slot) if slot.is_some() => slot.take(),
            _ => self.far.first_entry().filter(|e| *e.key() == self.popped).map(|e| e.remove()),
        }?;
        self.near.pop_front();
        self.popped += 1;
        self.len -= 1;
        Some(value)
    }

    /// The value that `pop` would return.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn peek_mut(&mut self) -> Option<&mut T> {
        let popped = self.popped;
        match self.near.front_mut() {
            Some(Some(value)) => Some(value),
            _ => self.far.get_mut(&popped),
        }
    }

    /// The first waiting value of which `so` is true. Costs O(n).
    pub fn find_mut(&mut self, so: impl Fn(&T) -> bool) -> Option<&mut T> {
        self.near.iter_mut().flatten().chain(self.far.values_mut()).find(|value| so(value))
    }

    /// All values that wait, whether or not their turn has come, by number; for the end.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn drain(&mut self) -> impl Iterator<Item = T> + use<T> {
        self.len = 0;
        let near = std::mem::take(&mut self.near).into_iter().zip(self.popped..);
        // Values that were far when they came may by now lie between near ones.
        let mut all = std::mem::take(&mut self.far);
        all.extend(near.filter_map(|(slot, number)| Some((number, slot?))));
        all.into_values()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn refuses_what_cannot_be() {
        let mut s = Sequencer::starting_at(u32::MAX);
        s.insert(0, 'b').unwrap();
        assert_eq!(s.insert(0, 'x'), Err(SequenceError::Duplicate { seq: 0 }));
        assert_eq!(s.pop(), None);
        s.insert(u32::MAX, 'a').unwrap();
        assert_eq!(s.peek_mut(), Some(&mut 'a'));
        assert_eq!((s.pop(), s.pop(), s.pop()), (Some('a'), Some('b'), None));
        assert_eq!(s.next(), 1);
        assert_eq!(s.insert(0, 'x'), Err(SequenceError::OutsideWindow { seq: 0, next: 1 }));
        let beyond = 1 + SEQUENCE_WINDOW;
        assert!(matches!(s.insert(beyond, 'x'), Err(SequenceError::OutsideWindow { .. })));
        s.insert(beyond - 1, 'y').unwrap();
        assert_eq!(s.insert(beyond - 1, 'x'), Err(SequenceError::Duplicate { seq: beyond - 1 }));
        assert_eq!(s.len(), 1);
    }

    #[test]
    fn far_value_comes_near_and_is_still_known() {
        let mut s = Sequencer::new();
        let far = NEAR as u32 + 1;
        s.insert(far, far).unwrap();
        for seq in 0..10 {
            s.insert(seq, seq).unwrap();
            assert_eq!(s.pop(), Some(seq));
        }
        assert_eq!(s.insert(far, 0), Err(SequenceError::Duplicate { seq: far }));
        for seq in 10..far {
            s.insert(seq, seq).unwrap();
        }
        for seq in 10..=far {
            assert_eq!(s.peek_mut().copied(), Some(seq));
            assert_eq!(s.pop(), Some(seq));
        }
        assert!(s.is_empty());
        assert_eq!(s.pop(), None);
    }

    #[test]
    fn one_number_far_ahead_costs_little() {
        let mut s = Sequencer::new();
        s.insert(SEQUENCE_WINDOW - 1, [0u8; 256]).unwrap();
        assert_eq!(s.near.capacity(), 0);
    }

    #[test]
    fn drain_gives_all() {
        let mut s = Sequencer::new();
        let far = NEAR as u32 + 1;
        for seq in [2, far, 3, 0, 1] {
            s.insert(seq, seq).unwrap();
        }
        assert_eq!((s.pop(), s.pop(), s.pop()), (Some(0), Some(1), Some(2)));
        s.insert(far + 1, far + 1).unwrap();
        assert_eq!(s.drain().collect::<Vec<_>>(), [3, far, far + 1]);
        assert!(s.is_empty());
        assert_eq!(s.next(), 3);
    }

    proptest! {
        #[test]
        fn any_permutation_within_the_window_is_restored(
            start: u32,
            keys in prop::collection::vec(any::<u64>(), 1..3000),
            pops in 1usize..50,
        ) {
            let mut order: Vec<u32> = (0..keys.len() as u32).collect();
            order.sort_by_key(|&i| keys[i as usize]);
            let mut s = Sequencer::starting_at(start);
            let mut out = Vec::new();
            for (turn, &i) in order.iter().enumerate() {
                s.insert(start.wrapping_add(i), i).unwrap();
                if turn % pops == 0 {
                    out.extend(std::iter::from_fn(|| s.pop()));
                }
            }
            out.extend(std::iter::from_fn(|| s.pop()));
            prop_assert_eq!(out, (0..keys.len() as u32).collect::<Vec<_>>());
            prop_assert!(s.is_empty());
        }

        #[test]
        fn arbitrary_numbers_behave_like_a_map(
            numbers in prop::collection::vec((0u32..4000, any::<bool>()), 0..400),
        ) {
            let mut s = Sequencer::new();
            let mut model = std::collections::BTreeMap::new();
            let mut next = 0;
            for (seq, pop) in numbers {
                if pop {
                    let expected = model.remove(&next);
                    next += u32::from(expected.is_some());
                    prop_assert_eq!(s.pop(), expected);
                } else {
                    let fresh = seq >= next && !model.contains_key(&seq);
                    prop_assert_eq!(s.insert(seq, seq).is_ok(), fresh);
                    if fresh {
                        model.insert(seq, seq);
                    }
                }
                prop_assert_eq!(s.len(), model.len());
                prop_assert_eq!(s.next(), next);
            }
        }
    }
}
