//! Who is woken when something happens: the wakeups of a node.
//!
//! Each endpoint has a [`Pulse`], which is the waker that its links register. When it beats and an
//! operation of the endpoint waits (the *leader*), that operation's task is woken directly and
//! moves the data itself, so that a message hops no task. When none waits, the endpoint is queued
//! for the node's resident task.
//!
//! A leader might never be polled again. So an endpoint that relies on somebody polling it is put
//! on the *watch list*: while the list is not empty, the resident task looks at it every
//! millisecond and takes over each endpoint that nobody drove since the last look. An idle
//! endpoint is armed and on no list, and costs nothing.
//!
//! What it is made of comes from `sync` beside it, so that `loom` runs this very code (see
//! `board_model`).

use std::sync::Arc;
use std::task::{Wake, Waker};

use super::sync::{AtomicBool, AtomicWaker, Mutex, Ordering, lock};
use crate::link::OpId;

/// Identifies an endpoint within its node; never reused.
pub(crate) type EndpointId = u64;

#[derive(Default)]
pub(crate) struct Board {
    /// Endpoints that the resident task shall drive. Bounded: each is in it at most once.
    ready: Mutex<Vec<Arc<Pulse>>>,
    /// New entries of the watch list, likewise.
    watch: Mutex<Vec<Arc<Pulse>>>,
    resident: AtomicWaker,
}

impl Board {
    /// Sets the resident task's waker.
    pub fn register_resident(&self, waker: &Waker) {
        self.resident.register(waker);
    }

    pub fn wake_resident(&self) {
        self.resident.wake();
    }

    pub fn take_ready(&self, into: &mut Vec<Arc<Pulse>>) {
        std::mem::swap(&mut *lock(&self.ready), into);
    }

    pub fn take_watched(&self, into: &mut Vec<Arc<Pulse>>) {
        into.append(&mut lock(&self.watch));
    }
}

/// An endpoint's heartbeat; see the module.
pub(crate) struct Pulse {
    pub id: EndpointId,
    board: Arc<Board>,
    leader: Mutex<Option<(OpId, Waker)>>,
    queued: AtomicBool,
    watched: AtomicBool,
    /// An operation has let others run, and is polled again at once.
    polled_soon: AtomicBool,
}

impl Pulse {
    pub fn new(id: EndpointId, board: Arc<Board>) -> Arc<Self> {
        Arc::new(Pulse {
            id,
            board,
            leader: Mutex::new(None),
            queued: AtomicBool::new(false),
            watched: AtomicBool::new(false),
            polled_soon: AtomicBool::new(false),
        })
    }

    /// Makes this operation the one that is woken. Set before arming.
    /// Gives the waker that it replaces, to be dropped outside of any lock.
    #[must_use]
    pub fn lead(&self, op: OpId, waker: &Waker) -> Option<Waker> {
        let mut leader = lock(&self.leader);
        match &mut *leader {
            Some((id, known)) if known.will_wake(waker) => {
                *id = op;
                None
            }
            slot => slot.replace((op, waker.clone())).map(|(_, old)| old),
        }
    }

    /// The operation has ended: it must not be woken any more in place of others.
    pub fn unlead(&self, op: OpId) {
        let mut leader = lock(&self.leader);
        if leader.as_ref().is_some_and(|(id, _)| *id == op) {
            let old = leader.take();
            drop(leader);
            drop(old);
        }
    }

    /// The operation was dropped or withdrawn, and may have been the one that was woken or about to
    /// be polled: the resident task takes over.
    pub fn ended_early(self: &Arc<Self>, op: OpId) {
        self.unlead(op);
        self.polled();
        self.enqueue();
    }

    /// Puts the endpoint before the resident task.
    pub fn enqueue(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            lock(&self.board.ready).push(self.clone());
            self.board.wake_resident();
        }
    }

    /// The resident task has taken it off the queue; called before driving.
    pub fn dequeued(&self) {
        // An exchange, so that whoever found it queued is seen by the drive that follows.
        self.queued.swap(false, Ordering::AcqRel);
    }

    /// Puts the endpoint on the watch list. One relaxed load when it is there already.
    #[inline]
    pub fn watch(self: &Arc<Self>) {
        if !self.watched.load(Ordering::Relaxed) {
            self.watch_new();
        }
    }

    #[cold]
    fn watch_new(self: &Arc<Self>) {
        if !self.watched.swap(true, Ordering::AcqRel) {
            lock(&self.board.watch).push(self.clone());
            self.board.wake_resident();
        }
    }

    /// An operation lets others run, and is polled again at once: until then a beat is for it, and
    /// not for the resident task, which would arm the endpoint that is being polled, and so cause
    /// the next beat. The watch sees to it that the operation is indeed polled.
    pub fn yielding(self: &Arc<Self>) {
        self.polled_soon.store(true, Ordering::Release);
        self.watch();
    }

    /// An operation is being polled, or will not be: beats are for whoever waits again.
    #[inline]
    pub fn polled(&self) {
        if self.polled_soon.load(Ordering::Relaxed) {
            self.polled_soon.store(false, Ordering::Relaxed);
        }
    }

    /// Whether a beat is left to an operation that is polled again at once.
    pub fn is_polled_soon(&self) -> bool {
        self.polled_soon.load(Ordering::Acquire)
    }

    /// The watch takes the endpoint off its list. Before arming, so that whatever happens after
    /// puts it on again.
    pub fn unwatched(&self) {
        self.polled();
        // An exchange, as in `dequeued`: in one line with those that found it on the list.
        self.watched.swap(false, Ordering::AcqRel);
    }

    /// The watch keeps the endpoint after all. `false`: somebody has put it on the list already.
    pub fn watched_again(&self) -> bool {
        !self.watched.swap(true, Ordering::AcqRel)
    }

    /// Whether it is on the watch list.
    pub fn is_watched(&self) -> bool {
        self.watched.load(Ordering::Acquire)
    }
}

impl Wake for Pulse {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let leader = lock(&self.leader).take();
        match leader {
            Some((_, waker)) => {
                self.watch();
                waker.wake();
            }
            None if self.polled_soon.load(Ordering::Acquire) => self.watch(),
            None => self.enqueue(),
        }
    }
}

#[cfg(test)]
impl Pulse {
    /// Whether it is before the resident task.
    pub fn is_queued(&self) -> bool {
        self.queued.load(Ordering::Acquire)
    }
}
