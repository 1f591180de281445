//! The shipped ring, sleep/wake and marks under `loom`: every interleaving, with few and small
//! slots.

/// What the ring is made of here: `loom`'s atomics, and sizes that keep the model small.
mod cells {
    pub use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

    pub const SLOTS: u32 = 4;
    pub const PUBLISH_EVERY: u32 = 2;
    pub const DATA_WORDS: usize = 1;
    pub const RECORD_MAX: usize = 16;
    pub const RESERVE: u32 = 0;
    pub const STRIDE: u32 = 3;
    pub const FETCH_AHEAD: u32 = 1;

    pub fn fetch_for_reading<T>(_: &T) {}
    pub fn fetch_for_writing<T>(_: &T) {}
}

#[allow(dead_code, clippy::duplicate_mod, reason = "the shipped file, of which not all is used")]
#[path = "marks.rs"]
mod marks;
#[allow(dead_code, clippy::duplicate_mod, reason = "the shipped file, of which not all is used")]
#[path = "ring.rs"]
mod ring;

use std::ops::Deref;

use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

use cells::{RECORD_MAX, SLOTS};
use ring::{Bell, Page, Ring};

/// An edge-triggered event: set until the sleeper takes it.
#[derive(Clone)]
struct Event(Arc<(Mutex<bool>, Condvar)>);

impl Event {
    fn new() -> Self {
        Event(Arc::new((Mutex::new(false), Condvar::new())))
    }

    fn wait(&self) {
        let mut set = self.0.0.lock().expect("lock");
        while !*set {
            set = self.0.1.wait(set).expect("lock");
        }
        *set = false;
    }
}

impl Bell for Event {
    fn ring(&mut self) {
        *self.0.0.lock().expect("lock") = true;
        self.0.1.notify_one();
    }
}

struct Shared(Arc<Page>);

impl Deref for Shared {
    type Target = Page;

    fn deref(&self) -> &Page {
        &self.0
    }
}

type Side = (Ring<Shared, Shared, Event>, Event);

fn pair() -> (Side, Side) {
    let [left, right] = [(); 2].map(|()| Arc::new(Page::zeroed()));
    let (left_event, right_event) = (Event::new(), Event::new());
    let make = |own: &Arc<Page>, peer: &Arc<Page>, bell: &Event| {
        Ring::new(Shared(own.clone()), Shared(peer.clone()), bell.clone())
    };
    (
        (make(&left, &right, &right_event), left_event.clone()),
        (make(&right, &left, &left_event), right_event),
    )
}

fn model(check: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(check);
}

fn receive(side: &mut Side, count: u64) {
    let mut into = [0; RECORD_MAX];
    for expected in 0..count {
        loop {
            if let Some((_, len)) = side.0.pop(&mut into).expect("sound") {
                assert_eq!(into[..len], expected.to_ne_bytes());
                side.0.publish_if_wanted();
                break;
            }
            if side.0.fall_asleep().expect("sound") {
                side.1.wait();
                side.0.wake_up();
            }
        }
    }
}

fn send(side: &mut Side, count: u64) {
    for value in 0..count {
        let bytes = value.to_ne_bytes();
        // Each way of writing a record in turn, as a link does it.
        if value % 2 == 1 && side.0.push_short(0, u64::from_le_bytes(bytes), &[], 0).expect("sound")
        {
            continue;
        }
        while !side.0.push_or_want(0, 8, 0, [&bytes[..]].into_iter()).expect("sound") {
            if side.0.fall_asleep().expect("sound") {
                side.1.wait();
                side.0.wake_up();
            }
        }
    }
}

#[test]
fn no_wake_is_lost_and_no_record_torn() {
    model(|| {
        let (mut left, mut right) = pair();
        let sender = thread::spawn(move || send(&mut left, 2));
        receive(&mut right, 2);
        sender.join().expect("sender");
    });
}

#[test]
fn a_full_ring_wakes_its_producer() {
    model(|| {
        let (mut left, mut right) = pair();
        // Full before the consumer starts: the model then explores only what matters.
        send(&mut left, u64::from(SLOTS));
        let sender = thread::spawn(move || {
            let bytes = u64::from(SLOTS).to_ne_bytes();
            while !left.0.push_or_want(0, 8, 0, [&bytes[..]].into_iter()).expect("sound") {
                if left.0.fall_asleep().expect("sound") {
                    left.1.wait();
                    left.0.wake_up();
                }
            }
        });
        receive(&mut right, u64::from(SLOTS) + 1);
        sender.join().expect("sender");
    });
}

#[test]
fn a_full_ring_wakes_a_producer_that_slept_before() {
    model(|| {
        let (mut left, mut right) = pair();
        send(&mut left, u64::from(SLOTS));
        assert!(left.0.fall_asleep().expect("sound"));
        let sender = thread::spawn(move || {
            let bytes = u64::from(SLOTS).to_ne_bytes();
            while !left.0.push_or_want(0, 8, 0, [&bytes[..]].into_iter()).expect("sound") {
                left.1.wait();
            }
        });
        receive(&mut right, u64::from(SLOTS) + 1);
        sender.join().expect("sender");
    });
}

#[test]
fn what_is_read_of_memory_let_go_of_is_not_trusted() {
    model(|| {
        let page = Arc::new(Page::zeroed());
        let lent = Arc::new(cells::AtomicU32::new(1));
        let (peer, borrowed) = (page.clone(), lent.clone());
        let owner = thread::spawn(move || {
            page.begin_dying();
            lent.store(2, cells::Ordering::Relaxed);
        });
        let read = borrowed.load(cells::Ordering::Relaxed);
        assert!(read == 1 || !peer.trusted());
        owner.join().expect("owner");
    });
}

#[test]
fn a_record_of_two_slots_is_seen_whole() {
    model(|| {
        let (mut left, mut right) = pair();
        let sender = thread::spawn(move || {
            let bytes = [1u8; 16];
            assert!(left.0.push(0, 16, 0, [&bytes[..]].into_iter()).expect("sound"));
        });
        let mut into = [0; RECORD_MAX];
        loop {
            if let Some((_, len)) = right.0.pop(&mut into).expect("sound") {
                assert_eq!((len, into), (16, [1; 16]));
                break;
            }
            if right.0.fall_asleep().expect("sound") {
                right.1.wait();
                right.0.wake_up();
            }
        }
        sender.join().expect("sender");
    });
}

/// A sender that writes to what the receiver lets go of, once it sees the sender not busy.
fn never_written_once_let_go_of(let_go: fn(&Page), may_begin: fn(&Page) -> bool) {
    model(move || {
        let [receiver, sender] = [(); 2].map(|()| Arc::new(Page::zeroed()));
        let lent = Arc::new(cells::AtomicU32::new(0));
        receiver.marks.take(1, 0);
        let (peer, own, memory) = (receiver.clone(), sender.clone(), lent.clone());
        let writer = thread::spawn(move || {
            own.marks.begin(1, 10);
            if may_begin(&peer) {
                // `loom` checks that nobody else owns it now.
                assert_eq!(memory.swap(1, cells::Ordering::Relaxed), 0, "written after the end");
            }
            own.marks.end(1, 10);
        });
        let_go(&receiver);
        if !sender.marks.is_busy() {
            lent.store(2, cells::Ordering::Relaxed);
        }
        writer.join().expect("writer");
    });
}

#[test]
fn a_copy_that_is_closed_is_written_no_more() {
    never_written_once_let_go_of(|page| page.marks.close(1), |page| page.marks.taken(1).is_some());
}

#[test]
fn a_copy_that_dies_is_written_no_more() {
    never_written_once_let_go_of(Page::begin_dying, Page::trusted);
}
