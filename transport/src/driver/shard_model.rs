//! The shipped lock under `loom`: every interleaving of a holder and those who come meanwhile.

#[allow(dead_code, clippy::duplicate_mod, reason = "the shipped file, of which not all is used")]
#[path = "shard.rs"]
pub(super) mod shard;

use std::sync::Arc;
use std::task::Waker;

use loom::cell::Cell;
use loom::thread;

use super::sync_model as sync;
use shard::Shard;
use sync::Event;

/// The value: `loom` fails the model if two threads reach it without an order between them.
type Counted = Shard<Watched>;

struct Watched(Cell<u32>);

// SAFETY: only reached through the lock under test; `loom` finds out if that lets two in.
unsafe impl Send for Watched {}

fn counted() -> Arc<Counted> {
    Arc::new(Shard::new(Watched(Cell::new(0))))
}

fn add(value: &Watched) {
    value.0.set(value.0.get() + 1);
}

pub(super) fn model(preemptions: usize, check: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(check);
}

/// A task: takes the lock, or sleeps until it is woken and tries again.
fn task(shard: &Counted) {
    let event = Arc::new(Event::default());
    let waker = Waker::from(event.clone());
    loop {
        if let Some(guard) = shard.lock_or_queue(&waker) {
            add(&guard);
            return;
        }
        event.wait();
    }
}

/// The count in the end, when all others are gone.
fn total(shard: &Counted) -> u32 {
    shard.try_lock().expect("everybody has let go").0.get()
}

#[test]
fn of_two_tasks_none_is_forgotten_and_both_are_alone() {
    model(4, || {
        let shard = counted();
        let other = shard.clone();
        let thread = thread::spawn(move || task(&other));
        task(&shard);
        thread.join().expect("the other");
        assert_eq!(total(&shard), 2);
    });
}

#[test]
fn of_three_tasks_none_is_forgotten() {
    model(2, || {
        let shard = counted();
        let threads = [(); 2].map(|()| {
            let shard = shard.clone();
            thread::spawn(move || task(&shard))
        });
        task(&shard);
        for thread in threads {
            thread.join().expect("the others");
        }
        assert_eq!(total(&shard), 3);
    });
}

#[test]
fn a_thread_that_blocks_is_woken() {
    model(3, || {
        let shard = counted();
        let other = shard.clone();
        let thread = thread::spawn(move || {
            add(&other.lock_blocking());
            add(&other.lock_blocking());
        });
        task(&shard);
        thread.join().expect("the other");
        assert_eq!(total(&shard), 3);
    });
}

/// A holder that only tries, as the watch does, wakes those who came meanwhile as well.
#[test]
fn who_comes_while_another_looks_is_woken() {
    model(4, || {
        let shard = counted();
        let other = shard.clone();
        let thread = thread::spawn(move || {
            if let Some(guard) = other.try_lock() {
                add(&guard);
            }
        });
        task(&shard);
        thread.join().expect("the other");
        assert!((1..=2).contains(&total(&shard)));
    });
}

/// A task that asks again with another waker is woken by the one it gave last, and whoever was in
/// the list before is woken as well: a waker is never dropped unused.
#[test]
fn every_waker_in_the_list_is_called() {
    model(3, || {
        let shard = counted();
        let guard = shard.try_lock().expect("free");
        let events = [(); 2].map(|()| Arc::new(Event::default()));
        let wakers = [0, 1].map(|at: usize| Waker::from(events[at].clone()));
        let other = shard.clone();
        let thread = thread::spawn(move || {
            wakers.iter().map(|waker| other.lock_or_queue(waker).is_some()).collect::<Vec<_>>()
        });
        drop(guard);
        let taken = thread.join().expect("the other");
        for (event, taken) in events.iter().zip(taken) {
            // Who got the lock may be woken besides, once.
            assert!(taken || event.is_set(), "a waker was lost");
        }
    });
}
