//! Memory that this crate has mapped and hands out in pieces, again and again: who knows of such a
//! mapping may keep something for it, and is told before it goes.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};

use crate::runtime::PerProcess;

/// A mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arena {
    pub start: usize,
    pub len: usize,
}

/// Wants to be told.
pub(crate) trait Unmapping: Send + Sync {
    /// The mapping that begins there is about to go. Nobody uses it any more.
    fn unmapping(&self, start: usize);
}

struct Arenas {
    lens: BTreeMap<usize, usize>,
    listeners: Vec<Weak<dyn Unmapping>>,
}

static ARENAS: PerProcess<Mutex<Arenas>> =
    PerProcess::new(|| Mutex::new(Arenas { lens: BTreeMap::new(), listeners: Vec::new() }));

fn arenas() -> MutexGuard<'static, Arenas> {
    ARENAS.get().lock().unwrap_or_else(PoisonError::into_inner)
}

/// A mapping has been made.
pub(super) fn mapped(ptr: NonNull<u8>, len: usize) {
    arenas().lens.insert(ptr.as_ptr() as usize, len);
}

/// A mapping is about to go. Others than those of [`mapped`] are no matter.
pub(super) fn unmapping(ptr: NonNull<u8>) {
    let start = ptr.as_ptr() as usize;
    let mut arenas = arenas();
    if arenas.lens.remove(&start).is_none() {
        return;
    }
    let listeners: Vec<_> = arenas.listeners.iter().filter_map(Weak::upgrade).collect();
    drop(arenas);
    for listener in listeners {
        listener.unmapping(start);
    }
}

/// The mapping that this piece of memory lies in. Whoever asks keeps the piece alive.
pub(crate) fn find(start: usize, len: usize) -> Option<Arena> {
    let arenas = arenas();
    let (&begins, &its_len) = arenas.lens.range(..=start).next_back()?;
    let within = start - begins <= its_len && len <= its_len - (start - begins);
    within.then_some(Arena { start: begins, len: its_len })
}

/// From now on, `listener` is told.
pub(crate) fn listen(listener: Weak<dyn Unmapping>) {
    let mut arenas = arenas();
    arenas.listeners.retain(|known| known.strong_count() > 0);
    arenas.listeners.push(listener);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[derive(Default)]
    struct Heard(Mutex<Vec<usize>>);

    impl Unmapping for Heard {
        fn unmapping(&self, start: usize) {
            self.0.lock().expect("not poisoned").push(start);
        }
    }

    #[test]
    fn pieces_are_found_until_their_mapping_goes() {
        let memory = vec![0u8; 4 * 4096];
        let ptr = NonNull::new(memory.as_ptr().cast_mut()).expect("not null");
        let start = ptr.as_ptr() as usize;
        let heard = Arc::new(Heard::default());
        listen(Arc::downgrade(&heard) as Weak<dyn Unmapping>);
        assert_eq!(find(start, 1), None);
        mapped(ptr, 2 * 4096);
        let arena = Some(Arena { start, len: 2 * 4096 });
        assert_eq!(find(start, 2 * 4096), arena);
        assert_eq!(find(start + 4096, 4096), arena);
        assert_eq!(find(start + 4096, 4097), None);
        assert_eq!(find(start + 3 * 4096, 1), None);
        unmapping(ptr);
        unmapping(ptr);
        assert_eq!(find(start, 1), None);
        assert_eq!(*heard.0.lock().expect("not poisoned"), [start]);
    }
}
