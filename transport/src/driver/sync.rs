//! The few primitives of this room.

use std::cell::Cell;
use std::sync::Arc;
use std::task::{Wake, Waker};
use std::thread::Thread;

pub(super) use futures_util::task::AtomicWaker;
pub(super) use std::cell::UnsafeCell;
pub(super) use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
pub(crate) use std::sync::{Mutex, MutexGuard};

/// Locks, whether or not another thread panicked while it held the lock: what these mutexes guard
/// is consistent between any two statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// A waker that unparks the calling thread. Made once a thread.
pub(super) fn thread_waker() -> Waker {
    thread_local! {
        static WAKER: Cell<Option<Waker>> = const { Cell::new(None) };
    }
    let made = || Waker::from(Arc::new(Unpark(std::thread::current())));
    WAKER
        .try_with(|cell| {
            let waker = cell.take().unwrap_or_else(made);
            cell.set(Some(waker.clone()));
            waker
        })
        .unwrap_or_else(|_| made())
}

pub(super) fn park() {
    std::thread::park();
}
