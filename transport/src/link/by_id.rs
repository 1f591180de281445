//! A map by number, of which the one that was asked for last is at hand.

use std::collections::HashMap;

/// Most chunks follow one of the same payload: looking their payload up by a hash, twice a chunk,
/// took 3 % of the time of a transfer.
pub(super) struct ById<T> {
    last: Option<(u32, T)>,
    others: HashMap<u32, T>,
}

impl<T> Default for ById<T> {
    fn default() -> Self {
        ById { last: None, others: HashMap::new() }
    }
}

impl<T> ById<T> {
    pub fn len(&self) -> usize {
        self.others.len() + usize::from(self.last.is_some())
    }

    pub fn contains(&self, id: u32) -> bool {
        self.last.as_ref().is_some_and(|(last, _)| *last == id) || self.others.contains_key(&id)
    }

    #[inline]
    pub fn get_mut(&mut self, id: u32) -> Option<&mut T> {
        if self.last.as_ref().is_none_or(|(last, _)| *last != id) {
            let found = self.others.remove(&id)?;
            if let Some((id, before)) = self.last.replace((id, found)) {
                self.others.insert(id, before);
            }
        }
        self.last.as_mut().map(|(_, value)| value)
    }

    /// Adds what is not there.
    pub fn insert(&mut self, id: u32, value: T) {
        debug_assert!(!self.contains(id), "a number is used once at a time");
        self.others.insert(id, value);
    }

    pub fn remove(&mut self, id: u32) -> Option<T> {
        match self.last.take_if(|(last, _)| *last == id) {
            Some((_, value)) => Some(value),
            None => self.others.remove(&id),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        let last = self.last.as_ref().map(|(id, value)| (*id, value));
        self.others.iter().map(|(id, value)| (*id, value)).chain(last)
    }

    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.others.values_mut().chain(self.last.as_mut().map(|(_, value)| value))
    }

    pub fn drain(&mut self) -> impl Iterator<Item = (u32, T)> {
        self.others.drain().chain(self.last.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_lost_whichever_was_asked_for_last() {
        let mut map = ById::default();
        for id in 0..5u32 {
            assert!(!map.contains(id));
            map.insert(id, id * 10);
        }
        for id in [3, 3, 1, 4, 1, 0, 2] {
            assert_eq!(map.get_mut(id).copied(), Some(id * 10));
            assert!((0..5).all(|id| map.contains(id)));
            assert_eq!(map.len(), 5);
        }
        assert_eq!(map.get_mut(9), None);
        assert_eq!(map.remove(2), Some(20), "the one at hand");
        assert_eq!(map.remove(4), Some(40), "another");
        assert_eq!(map.remove(4), None);
        map.get_mut(1);
        let sorted = |mut all: Vec<u32>| {
            all.sort_unstable();
            all
        };
        assert_eq!(sorted(map.iter().map(|(id, _)| id).collect()), [0, 1, 3]);
        assert_eq!(sorted(map.drain().map(|(_, value)| value).collect()), [0, 10, 30]);
        assert_eq!(map.len(), 0);
    }
}
