//! What came for one link, in order, until the link is polled; and what ended meanwhile.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use slab::Slab;
use smallvec::SmallVec;
use thalweg_ffi::ucx::{Ucx, ucs_status_t};

use super::request::Finished;
use super::wire::{Address, Header, Kind};

/// Payloads up to this many bytes are copied out of UCX's memory, behind the head.
pub(super) const INLINE_MAX: usize = 2048;
/// What an entry counts beside its bytes.
const ENTRY_BYTES: usize = 256;

/// Memory of UCX's that a message lies in, to be released exactly once.
#[derive(Debug)]
#[must_use = "a descriptor that is dropped is lost to UCX"]
pub(super) struct Desc(pub NonNull<c_void>);

// SAFETY: UCX ties descriptors to a worker, not to a thread; they are used under its lock.
unsafe impl Send for Desc {}

/// Where a payload is.
#[derive(Debug)]
pub(super) enum Body {
    /// Behind the head, in [`Entry::bytes`].
    Inline,
    /// In memory of our own.
    Owned(Vec<u8>),
    /// In UCX's memory.
    Held(Desc),
}

/// A parcel that came.
#[derive(Debug)]
pub(super) struct Entry {
    pub header: Header,
    /// The head, and what comes with it if that is in line.
    pub bytes: SmallVec<[u8; 160]>,
    /// How much came with it.
    pub len: usize,
    pub body: Body,
}

impl Entry {
    /// What it holds in memory, about.
    pub fn cost(&self) -> usize {
        let payload = match self.body {
            Body::Inline => 0,
            Body::Owned(_) | Body::Held(_) => self.len,
        };
        ENTRY_BYTES + self.bytes.len() + payload
    }
}

/// Why a link can go on no longer, as far as the callbacks know.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// UCX says that the endpoint has failed.
    Endpoint(ucs_status_t),
    /// The peer does what it must not.
    Peer(&'static str),
}

#[derive(Default)]
pub(super) struct Inbox {
    /// In order, ready to be handed up.
    pub queue: VecDeque<Entry>,
    /// Came before its turn.
    early: BTreeMap<u32, Entry>,
    next_seq: u32,
    /// What queue and `early` hold, and what the link has taken and not handed up.
    pub held_bytes: usize,
    /// Requests that have ended.
    pub finished: Vec<Finished>,
    /// Requests that UCX is at work on.
    pub in_flight: usize,
    pub fault: Option<Fault>,
    /// The peer's ping has come.
    pub pinged: bool,
    /// Nothing more is wanted.
    pub closed: bool,
    /// Whom to wake, if `parked`.
    waker: Option<Waker>,
    parked: bool,

    /// For flushing: parcels known to have left, those that somebody waits for, and whether UCX is
    /// at it.
    pub flushed: u64,
    pub flush_goal: Option<u64>,
    pub flushing: bool,
}

impl Inbox {
    /// Whether a poll of the link would find something.
    pub fn has_news(&self) -> bool {
        !self.queue.is_empty() || !self.finished.is_empty() || self.fault.is_some()
    }

    /// Puts a parcel in its place. `Err`: the peer went too far, and here is the parcel.
    #[allow(clippy::result_large_err, reason = "it is handed back, not reported")]
    fn place(&mut self, seq: u32, entry: Entry, max_bytes: usize) -> Result<(), Entry> {
        let ahead = seq.wrapping_sub(self.next_seq);
        // Numbers are used once, and half of them lie behind.
        if self.held_bytes + entry.cost() > max_bytes || ahead >= 1 << 31 {
            return Err(entry);
        }
        if ahead > 0 {
            if self.early.contains_key(&seq) {
                return Err(entry);
            }
            self.held_bytes += entry.cost();
            self.early.insert(seq, entry);
            return Ok(());
        }
        self.held_bytes += entry.cost();
        self.queue.push_back(entry);
        self.next_seq = seq.wrapping_add(1);
        while let Some(entry) = self.early.remove(&self.next_seq) {
            self.queue.push_back(entry);
            self.next_seq = self.next_seq.wrapping_add(1);
        }
        Ok(())
    }

    /// Forgets everything that came, and gives UCX's memory back to whoever can release it.
    pub fn close(&mut self) -> Vec<Desc> {
        self.closed = true;
        self.held_bytes = 0;
        let early = std::mem::take(&mut self.early).into_values();
        self.queue
            .drain(..)
            .chain(early)
            .filter_map(|entry| match entry.body {
                Body::Held(desc) => Some(desc),
                Body::Inline | Body::Owned(_) => None,
            })
            .collect()
    }
}

/// One link's side of the worker: what callbacks may touch.
pub(super) struct Mailbox {
    pub ucx: &'static Ucx,
    pub address: Address,
    pub dispatch: Arc<Dispatch>,
    max_bytes: usize,
    inbox: Mutex<Inbox>,
    /// Something was put into the inbox since the link last looked.
    news: AtomicBool,
}

impl Mailbox {
    pub fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is something new. Asked without the lock: what is missed is seen next time.
    pub fn take_news(&self) -> bool {
        self.news.load(Ordering::Acquire) && self.news.swap(false, Ordering::AcqRel)
    }

    /// Something is here for the link: its endpoint is woken when the worker's lock is released,
    /// if it sleeps.
    fn rouse(&self, inbox: &mut Inbox) {
        self.news.store(true, Ordering::Release);
        if std::mem::take(&mut inbox.parked) {
            self.dispatch.parked.fetch_sub(1, Ordering::AcqRel);
            if let Some(waker) = &inbox.waker {
                self.dispatch.wake_later(waker.clone());
            }
        }
    }

    /// The link's endpoint sleeps from now on, and is to be woken.
    pub fn park(&self, inbox: &mut Inbox, waker: &Waker) {
        match &inbox.waker {
            Some(known) if known.will_wake(waker) => {}
            _ => inbox.waker = Some(waker.clone()),
        }
        if !std::mem::replace(&mut inbox.parked, true) {
            self.dispatch.parked.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// The link is looked at.
    pub fn unpark(&self, inbox: &mut Inbox) {
        if std::mem::take(&mut inbox.parked) {
            self.dispatch.parked.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// A request has ended.
    pub fn finish(&self, finished: Finished) {
        let mut inbox = self.inbox();
        inbox.in_flight = inbox.in_flight.saturating_sub(1);
        self.dispatch.in_flight.fetch_sub(1, Ordering::AcqRel);
        if let Finished::Flush { sent } = finished {
            inbox.flushing = false;
            inbox.flushed = sent;
        } else {
            inbox.finished.push(finished);
        }
        self.rouse(&mut inbox);
    }

    /// A request has begun.
    pub fn begin(&self) {
        self.inbox().in_flight += 1;
        self.dispatch.in_flight.fetch_add(1, Ordering::AcqRel);
    }

    /// The endpoint has failed.
    pub fn fail(&self, fault: Fault) {
        let mut inbox = self.inbox();
        inbox.fault.get_or_insert(fault);
        self.rouse(&mut inbox);
    }

    /// A message has come. `Some`: it is not wanted.
    pub fn deliver(&self, entry: Entry) -> Option<Entry> {
        let header = entry.header;
        let mut inbox = self.inbox();
        if inbox.closed {
            return Some(entry);
        }
        let refused = if header.kind == Kind::Ping {
            inbox.pinged = true;
            Some(entry)
        } else {
            let placed = inbox.place(header.seq, entry, self.max_bytes);
            placed
                .inspect_err(|_| {
                    inbox.fault.get_or_insert(Fault::Peer("parcels beyond the credit"));
                })
                .err()
        };
        self.rouse(&mut inbox);
        refused
    }
}

/// What the worker's callbacks may touch.
#[derive(Default)]
pub(super) struct Dispatch {
    slots: Mutex<Slab<Arc<Mailbox>>>,
    wakes: Mutex<Vec<Waker>>,
    any_wakes: AtomicBool,
    /// Links whose endpoints sleep.
    pub parked: AtomicUsize,
    /// Requests that UCX is at work on, of all links.
    pub in_flight: AtomicUsize,
    /// Endpoints that are being closed, and killed links that linger: somebody has to progress.
    pub ending: AtomicUsize,
}

impl Dispatch {
    fn slots(&self) -> MutexGuard<'_, Slab<Arc<Mailbox>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new mailbox, with a slot of its own.
    pub fn register(
        self: &Arc<Self>,
        ucx: &'static Ucx,
        secret: u64,
        max_bytes: usize,
    ) -> Arc<Mailbox> {
        let mut slots = self.slots();
        let entry = slots.vacant_entry();
        let mailbox = Arc::new(Mailbox {
            ucx,
            address: Address { slot: entry.key() as u32, secret },
            dispatch: self.clone(),
            max_bytes,
            inbox: Mutex::new(Inbox::default()),
            news: AtomicBool::new(false),
        });
        entry.insert(mailbox.clone());
        mailbox
    }

    pub fn unregister(&self, mailbox: &Mailbox) {
        let mut slots = self.slots();
        let slot = mailbox.address.slot as usize;
        // The slot may have a new owner by now.
        if slots.get(slot).is_some_and(|known| std::ptr::eq(&raw const **known, mailbox)) {
            slots.remove(slot);
        }
    }

    /// The mailbox of a slot, if whoever asks knows its secret.
    pub fn find(&self, slot: u32, secret: u64) -> Option<Arc<Mailbox>> {
        let slots = self.slots();
        slots.get(slot as usize).filter(|mailbox| mailbox.address.secret == secret).cloned()
    }

    fn wake_later(&self, waker: Waker) {
        self.wakes.lock().unwrap_or_else(PoisonError::into_inner).push(waker);
        self.any_wakes.store(true, Ordering::Release);
    }

    /// Whom callbacks wanted woken. To be woken outside of the worker's lock.
    pub fn take_wakes(&self) -> Vec<Waker> {
        let any = self.any_wakes.load(Ordering::Acquire);
        if !any || !self.any_wakes.swap(false, Ordering::AcqRel) {
            return Vec::new();
        }
        std::mem::take(&mut *self.wakes.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
