//! The worker's lock, and what it guards.
//!
//! Callbacks run inside of calls into UCX, and those are made with the lock held: so callbacks may
//! touch what it guards, without locks of their own (each costs two locked instructions, of which
//! a message of 8 B cannot afford many).

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// The lock.
#[derive(Default)]
pub(super) struct Gate {
    mutex: Mutex<()>,
    /// The thread that holds it, 0 if none.
    holder: AtomicUsize,
}

/// The lock, held.
pub(super) struct Key<'a> {
    gate: &'a Gate,
    _guard: MutexGuard<'a, ()>,
}

/// What tells this thread from every other that runs.
#[inline]
fn this_thread() -> usize {
    thread_local! {
        static HERE: u8 = const { 0 };
    }
    HERE.with(|here| std::ptr::from_ref(here).addr())
}

impl Gate {
    /// Blocks for at most the turns of others.
    #[inline]
    pub fn lock(&self) -> Key<'_> {
        self.key(self.mutex.lock().unwrap_or_else(PoisonError::into_inner))
    }

    #[inline]
    pub fn try_lock(&self) -> Option<Key<'_>> {
        match self.mutex.try_lock() {
            Ok(guard) => Some(self.key(guard)),
            Err(TryLockError::Poisoned(guard)) => Some(self.key(guard.into_inner())),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    #[inline]
    fn key<'a>(&'a self, guard: MutexGuard<'a, ()>) -> Key<'a> {
        self.holder.store(this_thread(), Ordering::Relaxed);
        Key { gate: self, _guard: guard }
    }
}

impl Drop for Key<'_> {
    #[inline]
    fn drop(&mut self) {
        self.gate.holder.store(0, Ordering::Relaxed);
    }
}

/// Something that a gate guards.
#[derive(Default)]
pub(super) struct Guarded<T>(UnsafeCell<T>);

// SAFETY: only whoever holds the gate gets at it, one at a time.
unsafe impl<T: Send> Sync for Guarded<T> {}

impl<T> Guarded<T> {
    pub fn new(value: T) -> Self {
        Guarded(UnsafeCell::new(value))
    }

    /// For whoever holds the gate; `gate` is the one that guards this.
    #[inline]
    pub fn get<'a>(&'a self, gate: &Gate, key: &'a mut Key<'_>) -> &'a mut T {
        assert!(std::ptr::eq(gate, key.gate), "the key of another worker's gate");
        // SAFETY: the gate is held for as long as the key lives, and the key is borrowed for as
        // long as this reference: nothing else gets at it, callbacks included, because every call
        // into UCX borrows the key, too.
        unsafe { &mut *self.0.get() }
    }

    /// For callbacks.
    ///
    /// # Safety
    ///
    /// The caller is called back by UCX, within a call that was made with `gate`, which guards
    /// this, held; and it has no other reference to this.
    #[inline]
    #[allow(clippy::mut_from_ref, reason = "as with a lock; the caller answers for the rest")]
    pub unsafe fn get_called_back(&self, gate: &Gate) -> &mut T {
        if gate.holder.load(Ordering::Relaxed) != this_thread() {
            wrong_thread();
        }
        // SAFETY: this thread holds the gate, and the rest is the caller's promise.
        unsafe { &mut *self.0.get() }
    }

    /// For callbacks that have already got at something which the same gate guards.
    ///
    /// # Safety
    ///
    /// As of [`Guarded::get_called_back`], which was called before in the same callback for
    /// something that the same gate guards.
    #[inline]
    #[allow(clippy::mut_from_ref, reason = "as with a lock; the caller answers for the rest")]
    pub unsafe fn get_called_back_too(&self) -> &mut T {
        // SAFETY: the caller's promise.
        unsafe { &mut *self.0.get() }
    }
}

/// UCX was told that it is used by one thread at a time, and calls back from that one. Should a
/// version of it ever do otherwise, then nothing that the callbacks touch is sound any more.
#[cold]
fn wrong_thread() -> ! {
    tracing::error!("UCX called back from a thread that does not hold the worker's lock");
    std::process::abort()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_holds_the_gate_gets_at_it() {
        let gate = Gate::default();
        let guarded = Guarded::new(0u64);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        let mut key = gate.lock();
                        *guarded.get(&gate, &mut key) += 1;
                        assert!(gate.try_lock().is_none());
                        // SAFETY: the key is held, and the reference above is gone.
                        *unsafe { guarded.get_called_back(&gate) } += 1;
                    }
                });
            }
        });
        assert_eq!(*guarded.get(&gate, &mut gate.try_lock().expect("free")), 40_000);
    }

    #[test]
    #[should_panic(expected = "another worker")]
    fn a_key_fits_one_gate() {
        let gates = [Gate::default(), Gate::default()];
        let guarded = Guarded::new(());
        guarded.get(&gates[0], &mut gates[1].lock());
    }
}
