//! A table whose keys carry a generation: a peer that names a stale key is found out.

/// Bounded only by its users, who state their limits where they insert.
pub(super) struct Table<T> {
    slots: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
    len: usize,
}

impl<T> Table<T> {
    pub fn new() -> Self {
        Table { slots: Vec::new(), free: Vec::new(), len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The key that the next `insert` will give.
    pub fn next_key(&self) -> u64 {
        match self.free.last() {
            Some(&index) => key(self.slots[index as usize].0, index),
            None => key(0, self.slots.len() as u32),
        }
    }

    pub fn insert(&mut self, value: T) -> u64 {
        let made = self.next_key();
        match self.free.pop() {
            Some(index) => self.slots[index as usize].1 = Some(value),
            None => self.slots.push((0, Some(value))),
        }
        self.len += 1;
        made
    }

    fn index(&self, wanted: u64) -> Option<usize> {
        let index = wanted as u32 as usize;
        let (generation, _) = self.slots.get(index)?;
        (key(*generation, index as u32) == wanted).then_some(index)
    }

    pub fn get_mut(&mut self, wanted: u64) -> Option<&mut T> {
        let index = self.index(wanted)?;
        self.slots[index].1.as_mut()
    }

    pub fn remove(&mut self, wanted: u64) -> Option<T> {
        let index = self.index(wanted)?;
        let slot = &mut self.slots[index];
        let value = slot.1.take()?;
        slot.0 = slot.0.wrapping_add(1);
        self.free.push(index as u32);
        self.len -= 1;
        Some(value)
    }

    /// Empties the table.
    pub fn drain(&mut self) -> impl Iterator<Item = T> {
        self.free.clear();
        self.len = 0;
        std::mem::take(&mut self.slots).into_iter().filter_map(|(_, value)| value)
    }
}

fn key(generation: u32, index: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_keys_find_nothing() {
        let mut table = Table::new();
        let expected = table.next_key();
        let first = table.insert('a');
        assert_eq!(first, expected);
        assert_eq!(table.remove(first), Some('a'));
        let second = table.insert('b');
        assert_eq!(first as u32, second as u32, "the slot is reused");
        assert!(table.get_mut(first).is_none());
        assert_eq!(table.remove(first), None);
        assert_eq!(table.get_mut(second), Some(&mut 'b'));
        assert!(table.get_mut(u64::MAX).is_none());
        assert_eq!(table.drain().collect::<Vec<_>>(), ['b']);
        assert!(table.is_empty());
    }
}
