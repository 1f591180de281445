//! The endpoint's lock: a task that finds it taken leaves its waker with the holder instead of
//! blocking its thread.
//!
//! One atomic word holds both "taken" and "somebody waits", so that unlocking is one exchange and
//! needs no further fence.
//!
//! What it is made of comes from `sync` beside it, so that `loom` runs this very code (see
//! `shard_model`).

use std::ops::{Deref, DerefMut};
use std::task::Waker;

use super::sync::{AtomicU32, Mutex, Ordering, UnsafeCell, lock};

const FREE: u32 = 0;
const TAKEN: u32 = 1;
/// Taken, and the list of waiters is not empty.
const WANTED: u32 = 2;

pub(crate) struct Shard<T> {
    state: AtomicU32,
    /// Bounded by the tasks and threads that use the endpoint at once.
    waiters: Mutex<Vec<Waker>>,
    value: UnsafeCell<T>,
}

// SAFETY: the value is only reached through a guard, and `state` admits one guard at a time.
unsafe impl<T: Send> Sync for Shard<T> {}
// SAFETY: owns the value.
unsafe impl<T: Send> Send for Shard<T> {}

impl<T> Shard<T> {
    pub fn new(value: T) -> Self {
        Shard {
            state: AtomicU32::new(FREE),
            waiters: Mutex::new(Vec::new()),
            value: UnsafeCell::new(value),
        }
    }

    #[inline]
    pub fn try_lock(&self) -> Option<ShardGuard<'_, T>> {
        self.state
            .compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
            .then(|| ShardGuard { shard: self })
    }

    /// The lock, or a promise that `waker` is woken after the holder lets go.
    #[inline]
    pub fn lock_or_queue(&self, waker: &Waker) -> Option<ShardGuard<'_, T>> {
        self.try_lock().or_else(|| self.queue(waker))
    }

    #[cold]
    fn queue(&self, waker: &Waker) -> Option<ShardGuard<'_, T>> {
        {
            let mut waiters = lock(&self.waiters);
            if !waiters.iter().any(|known| known.will_wake(waker)) {
                waiters.push(waker.clone());
            }
        }
        loop {
            if let Some(guard) = self.try_lock() {
                // Our waker stays in the list: one spurious wake.
                return Some(guard);
            }
            match self.state.compare_exchange(TAKEN, WANTED, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) | Err(WANTED) => return None,
                Err(_) => {}
            }
        }
    }

    /// Blocks the thread. For drops and for looks from outside of any task: holders keep the lock
    /// for one bounded turn.
    #[inline]
    pub fn lock_blocking(&self) -> ShardGuard<'_, T> {
        self.try_lock().unwrap_or_else(|| self.block())
    }

    #[cold]
    fn block(&self) -> ShardGuard<'_, T> {
        let waker = super::sync::thread_waker();
        loop {
            if let Some(guard) = self.queue(&waker) {
                // The wake that ended a sleep may have been meant for an executor that parks this
                // thread: it gets it back.
                waker.wake();
                return guard;
            }
            super::sync::park();
        }
    }

    #[cold]
    fn wake_waiters(&self) {
        let waiters = std::mem::take(&mut *lock(&self.waiters));
        for waker in waiters {
            waker.wake();
        }
    }
}

pub(crate) struct ShardGuard<'a, T> {
    shard: &'a Shard<T>,
}

impl<T> ShardGuard<'_, T> {
    /// Whether somebody waits for the lock.
    #[inline]
    pub fn is_wanted(&self) -> bool {
        self.shard.state.load(Ordering::Relaxed) == WANTED
    }
}

impl<T> Deref for ShardGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: the guard is the only one.
        unsafe { &*self.shard.value.get() }
    }
}

impl<T> DerefMut for ShardGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the guard is the only one, and borrowed mutably.
        unsafe { &mut *self.shard.value.get() }
    }
}

impl<T> Drop for ShardGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        if self.shard.state.swap(FREE, Ordering::AcqRel) == WANTED {
            self.shard.wake_waiters();
        }
    }
}
