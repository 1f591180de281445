//! The primitives of this room as `loom` watches them: what `sync` is to the shipped files, this is
//! to their models.

pub use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};
pub use loom::sync::{Mutex, MutexGuard};
/// Whether two hold a lock at once is seen by its value, which `loom` watches.
pub use std::cell::UnsafeCell;
use std::sync::Arc;
use std::task::{Wake, Waker};

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nobody panics")
}

/// What a thread sleeps on: set until it takes it, as a thread's token is.
#[derive(Default)]
pub struct Event {
    set: Mutex<bool>,
    changed: loom::sync::Condvar,
}

impl Event {
    pub fn wait(&self) {
        let mut set = lock(&self.set);
        while !*set {
            set = self.changed.wait(set).expect("nobody panics");
        }
        *set = false;
    }

    pub fn is_set(&self) -> bool {
        *lock(&self.set)
    }
}

impl Wake for Event {
    fn wake(self: Arc<Self>) {
        *lock(&self.set) = true;
        self.changed.notify_one();
    }
}

loom::thread_local! {
    static EVENT: Arc<Event> = Arc::default();
}

pub fn thread_waker() -> Waker {
    EVENT.with(|event| Waker::from(event.clone()))
}

pub fn park() {
    EVENT.with(Arc::clone).wait();
}

/// Where a task that sleeps leaves its waker.
#[derive(Default)]
pub struct AtomicWaker(Mutex<Option<Waker>>);

impl AtomicWaker {
    pub fn register(&self, waker: &Waker) {
        *lock(&self.0) = Some(waker.clone());
    }

    pub fn wake(&self) {
        let waker = lock(&self.0).take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}
