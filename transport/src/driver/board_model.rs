//! The shipped board and lock under `loom`, around an endpoint in miniature: whatever becomes of an
//! operation that said that it is polled again at once, what arrives is landed. A wake that is
//! lost leaves everybody asleep, which `loom` reports.

#[allow(dead_code, clippy::duplicate_mod, reason = "the shipped file, of which not all is used")]
#[path = "board.rs"]
mod board;

use std::sync::Arc;
use std::task::Waker;

use loom::thread;

use super::shard_model::model;
use super::shard_model::shard::Shard;
use super::sync_model as sync;
use crate::link::OpId;
use board::{Board, Pulse};
use sync::{AtomicU32, Event, Mutex, Ordering, lock};

/// How many messages cross.
const MESSAGES: u32 = 2;

const fn op(index: u32) -> OpId {
    OpId { index, generation: 0 }
}

/// What has come and was not looked at, and whom to wake for what comes.
#[derive(Default)]
struct Link {
    arrived: u32,
    armed: Option<Waker>,
}

/// What the endpoint's lock guards.
#[derive(Default)]
struct Core {
    activity: u64,
    /// Of the operations, which wait for the last message.
    waiting: [Option<Waker>; 2],
}

struct Endpoint {
    board: Arc<Board>,
    pulse: Arc<Pulse>,
    waker: Waker,
    core: Shard<Core>,
    link: Mutex<Link>,
    landed: AtomicU32,
}

impl Endpoint {
    /// At rest: armed, and on no list.
    fn new() -> Arc<Endpoint> {
        let board = Arc::<Board>::default();
        let pulse = Pulse::new(1, board.clone());
        let endpoint = Endpoint {
            board,
            waker: Waker::from(pulse.clone()),
            pulse,
            core: Shard::new(Core::default()),
            link: Mutex::default(),
            landed: AtomicU32::new(0),
        };
        assert!(endpoint.arm());
        Arc::new(endpoint)
    }

    /// A message comes over the link.
    fn deliver(&self) {
        let beat = {
            let mut link = lock(&self.link);
            link.arrived += 1;
            link.armed.take()
        };
        if let Some(waker) = beat {
            waker.wake();
        }
    }

    /// Looks at the link, which need not be armed after it.
    fn drive(&self, core: &mut Core) {
        core.activity += 1;
        let arrived = {
            let mut link = lock(&self.link);
            link.armed = None;
            std::mem::take(&mut link.arrived)
        };
        if arrived > 0 && self.landed.fetch_add(arrived, Ordering::Relaxed) + arrived == MESSAGES {
            core.waiting.iter_mut().filter_map(Option::take).for_each(Waker::wake);
            // For the end of the model.
            self.board.wake_resident();
        }
    }

    fn arm(&self) -> bool {
        let mut link = lock(&self.link);
        if link.arrived == 0 {
            link.armed = Some(self.waker.clone());
        }
        link.arrived == 0
    }

    fn all_landed(&self) -> bool {
        self.landed.load(Ordering::Relaxed) == MESSAGES
    }

    /// As `Op::poll`, looking once. `true`: over.
    fn poll(&self, id: OpId, waker: &Waker, spinning: bool) -> bool {
        let Some(mut core) = self.core.lock_or_queue(waker) else { return false };
        self.pulse.polled();
        loop {
            self.drive(&mut core);
            if self.all_landed() {
                drop(core);
                self.pulse.unlead(id);
                self.pulse.watch();
                return true;
            }
            core.waiting[id.index as usize] = Some(waker.clone());
            if spinning {
                self.pulse.yielding();
                drop(core);
                waker.wake_by_ref();
                return false;
            }
            drop(self.pulse.lead(id, waker));
            if self.arm() {
                return false;
            }
        }
    }

    /// As `EndpointShared::resident_turn`.
    fn resident_turn(&self) -> bool {
        let Some(mut core) = self.core.lock_or_queue(&self.waker) else { return false };
        self.drive(&mut core);
        if self.arm() {
            return true;
        }
        drop(core);
        self.pulse.enqueue();
        false
    }

    /// As `EndpointShared::watch_turn`.
    fn watch_turn(&self, last: Option<u64>) -> Option<u64> {
        let activity = match self.core.try_lock() {
            Some(core) => core.activity,
            None => {
                // The holder has to have its turn before another look makes sense.
                thread::yield_now();
                return Some(last.map_or(0, |last| last.wrapping_sub(1)));
            }
        };
        if last != Some(activity) {
            return Some(activity);
        }
        self.pulse.unwatched();
        if self.resident_turn() || !self.pulse.watched_again() {
            return None;
        }
        Some(activity)
    }

    /// The resident task, with a tick in every turn, until all messages have landed.
    fn resident(&self) {
        let event = Arc::new(Event::default());
        let waker = Waker::from(event.clone());
        let (mut ready, mut new, mut watched) = (Vec::new(), Vec::new(), Vec::new());
        while !self.all_landed() {
            self.board.register_resident(&waker);
            self.board.take_ready(&mut ready);
            for pulse in ready.drain(..) {
                pulse.dequeued();
                self.resident_turn();
            }
            self.board.take_watched(&mut new);
            watched.extend(new.drain(..).map(|_| None));
            watched.retain_mut(|last| {
                let next = self.watch_turn(*last);
                *last = next;
                next.is_some()
            });
            if watched.is_empty() && !self.all_landed() {
                event.wait();
            }
        }
    }

    /// An operation that sleeps until all messages have landed.
    fn park(&self, id: OpId) {
        let event = Arc::new(Event::default());
        let waker = Waker::from(event.clone());
        while !self.poll(id, &waker, false) {
            event.wait();
        }
    }
}

/// A sender, the operations and the resident task, each in every place between the others.
fn around(preemptions: usize, operations: impl Fn(&Endpoint) + Copy + Send + Sync + 'static) {
    model(preemptions, move || {
        let endpoint = Endpoint::new();
        let (sender, receiver) = (endpoint.clone(), endpoint.clone());
        let sending = thread::spawn(move || (0..MESSAGES).for_each(|_| sender.deliver()));
        let receiving = thread::spawn(move || operations(&receiver));
        endpoint.resident();
        sending.join().expect("the sender");
        receiving.join().expect("the operations");
        // What is left on the lists holds the board that holds the lists.
        endpoint.board.take_ready(&mut Vec::new());
        endpoint.board.take_watched(&mut Vec::new());
    });
}

/// A waker that nothing comes of, as of a task that has other things to do.
fn forgetful() -> Waker {
    Waker::from(Arc::new(Event::default()))
}

#[test]
fn an_operation_that_is_never_polled_again_holds_up_nothing() {
    around(3, |endpoint| {
        endpoint.poll(op(1), &forgetful(), true);
        endpoint.poll(op(1), &forgetful(), true);
    });
}

#[test]
fn an_operation_that_is_dropped_holds_up_nothing() {
    around(3, |endpoint| {
        if !endpoint.poll(op(1), &forgetful(), true) {
            endpoint.pulse.ended_early(op(1));
        }
    });
}

#[test]
fn an_operation_that_is_moved_to_another_task_is_woken_there() {
    around(2, |endpoint| {
        if !endpoint.poll(op(1), &forgetful(), true) {
            endpoint.park(op(1));
        }
    });
}

#[test]
fn an_operation_that_sleeps_is_woken_beside_one_that_is_never_polled_again() {
    around(2, |endpoint| {
        let waker = forgetful();
        // The sleeper's first look, then the other one's, of which nothing more is heard.
        let event = Arc::new(Event::default());
        let sleeper = Waker::from(event.clone());
        let mut over = endpoint.poll(op(1), &sleeper, false);
        endpoint.poll(op(0), &waker, true);
        while !over {
            event.wait();
            over = endpoint.poll(op(1), &sleeper, false);
        }
    });
}
