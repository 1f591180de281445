//! The lock with real threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering as O};
use std::task::{Wake, Waker};

use super::shard::Shard;

struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, O::SeqCst);
    }
}

#[test]
fn a_contender_is_woken_when_the_holder_lets_go() {
    let shard = Shard::new(0);
    let count = Arc::new(Count(AtomicUsize::new(0)));
    let waker = Waker::from(count.clone());
    let guard = shard.try_lock().expect("free");
    assert!(!guard.is_wanted());
    assert!(shard.lock_or_queue(&waker).is_none());
    assert!(guard.is_wanted());
    assert!(shard.lock_or_queue(&waker).is_none());
    assert_eq!(count.0.load(O::SeqCst), 0);
    drop(guard);
    assert_eq!(count.0.load(O::SeqCst), 1);
    assert!(shard.lock_or_queue(&waker).is_some_and(|guard| !guard.is_wanted()));
}

#[test]
fn threads_exclude_each_other_and_none_is_forgotten() {
    let shard = Arc::new(Shard::new(0u64));
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let shard = shard.clone();
            std::thread::spawn(move || {
                for _ in 0..20_000 {
                    *shard.lock_blocking() += 1;
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("no panic");
    }
    assert_eq!(*shard.lock_blocking(), 80_000);
}
