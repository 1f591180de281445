//! What came for one link, in order, until the link is polled; and what ended meanwhile.
//!
//! All of it is guarded by the worker's gate.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::Waker;
use std::time::Instant;

use slab::Slab;
use smallvec::SmallVec;
use thalweg_ffi::ucx::{Ucx, ucs_status_t};

use crate::error::LinkError;
use crate::link::{Budget, Sink};

use super::bulk::Incomings;
use super::gate::{Gate, Guarded, Key};
use super::link::Count;
use super::request::SendOp;
use super::wire::{Address, Header, Kind, SLOTS_MAX};
use super::worker::Locked;

/// Payloads up to this many bytes are copied out of UCX's memory, behind the head.
pub(super) const INLINE_MAX: usize = 2048;
/// Messages up to this many bytes may be handed up by the callback itself.
pub(super) const AT_ONCE_MAX: usize = 256;
/// What an entry counts beside its bytes.
const ENTRY_BYTES: usize = 256;

/// Memory of UCX's that a message lies in, to be released exactly once.
#[derive(Debug)]
#[must_use = "a descriptor that is dropped is lost to UCX"]
pub(super) struct Desc(pub NonNull<c_void>);

// SAFETY: UCX ties descriptors to a worker, not to a thread; they are used with its gate held.
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

    /// Where the payload lies: `len` bytes, which are readable for as long as this is not given
    /// back.
    pub fn payload(&self) -> *const u8 {
        match &self.body {
            Body::Inline => self.bytes[usize::from(self.header.head_len)..].as_ptr(),
            Body::Owned(bytes) => bytes.as_ptr(),
            Body::Held(desc) => desc.0.as_ptr().cast_const().cast(),
        }
    }
}

/// Why a link can go on no longer, as far as the callbacks know.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// UCX says that the endpoint has failed.
    Endpoint(ucs_status_t),
    /// The peer does what it must not.
    Peer(&'static str),
    /// The worker is held up for good: nothing comes any more, whoever sends it.
    Worker,
}

const BEYOND_CREDIT: Fault = Fault::Peer("parcels beyond the credit");
const UNASKED: Fault = Fault::Peer("a chunk that was not asked for");

#[derive(Default)]
pub(super) struct Inbox {
    /// In order, ready to be handed up.
    pub queue: VecDeque<Entry>,
    /// Came before its turn.
    early: BTreeMap<u32, Entry>,
    next_seq: u32,
    /// What queue and `early` hold, and what the link has taken and not handed up.
    pub held_bytes: usize,
    /// Payloads that chunks are landed into as they come.
    pub incoming: Incomings,
    /// Sends that have ended, and how.
    pub finished: Vec<(Box<SendOp>, ucs_status_t)>,
    /// Requests that UCX is at work on.
    pub in_flight: usize,
    pub fault: Option<Fault>,
    /// The peer's ping has come.
    pub pinged: bool,
    /// Nothing more is wanted.
    pub closed: bool,
    /// Nobody asks any more what has ended: boxes that were kept here would keep this alive.
    left: bool,
    /// Whom to wake, if `parked`.
    waker: Option<Waker>,
    parked: bool,

    /// For flushing: parcels known to have left, those that somebody waits for, and whether UCX is
    /// at it.
    pub flushed: u64,
    pub flush_goal: Option<u64>,
    pub flushing: bool,
    /// One has ended, and nobody has looked since.
    pub flush_ended: bool,
}

impl Inbox {
    /// Whether the peer's ping has come, and our own has left.
    pub fn works_both_ways(&self) -> bool {
        self.pinged && self.in_flight == 0
    }

    /// Whether no parcel, no end of a send and no fault waits for the link.
    #[inline]
    fn nothing_waits(&self) -> bool {
        self.queue.is_empty() && self.finished.is_empty() && self.fault.is_none()
    }

    /// Whether a poll of the link would find something.
    pub fn has_news(&self) -> bool {
        !self.nothing_waits() || self.incoming.has_news() || self.flush_ended
    }

    /// Whether nothing has come since the link last looked, but what was handed up already.
    #[inline]
    pub fn is_quiet(&self) -> bool {
        self.nothing_waits() && self.incoming.is_quiet() && !self.parked
    }

    /// Whether nothing has come since the link last looked but chunks of payloads, not too many.
    #[inline]
    pub fn only_lands(&self) -> bool {
        self.incoming.only_lands() && self.nothing_waits()
    }

    /// Whether the message of this number is the next.
    pub fn is_next(&self, seq: u32) -> bool {
        seq == self.next_seq
    }

    /// Lands a chunk, whose turn it is.
    ///
    /// # Safety
    ///
    /// `len` bytes are readable at `from`.
    unsafe fn land_next(&mut self, header: &Header, from: *const u8, len: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.land(header, from, len) };
        self.passed();
    }

    /// # Safety
    ///
    /// `len` bytes are readable at `from`.
    unsafe fn land(&mut self, header: &Header, from: *const u8, len: usize) {
        // SAFETY: the caller's promise.
        if !unsafe { self.incoming.land(header.id, header.len, from, len) } {
            self.fault.get_or_insert(UNASKED);
        }
    }

    /// The next message is through: what came before its turn may follow.
    #[inline]
    fn passed(&mut self) {
        self.next_seq = self.next_seq.wrapping_add(1);
        if !self.early.is_empty() {
            self.take_early();
        }
    }

    #[cold]
    fn take_early(&mut self) {
        while let Some(entry) = self.early.remove(&self.next_seq) {
            self.next_seq = self.next_seq.wrapping_add(1);
            if entry.header.kind != Kind::Chunk {
                self.queue.push_back(entry);
                continue;
            }
            self.held_bytes = self.held_bytes.saturating_sub(entry.cost());
            // SAFETY: the entry is here, and chunks in entries own their bytes (`Message::entry`).
            unsafe { self.land(&entry.header, entry.payload(), entry.len) };
        }
    }

    /// Puts a parcel in its place. `Some`: the peer went too far, and here is the parcel.
    fn place(&mut self, entry: Entry, max_bytes: usize) -> Option<Entry> {
        let seq = entry.header.seq;
        let ahead = seq.wrapping_sub(self.next_seq);
        // Numbers are used once, and half of them lie behind.
        if self.held_bytes + entry.cost() > max_bytes || ahead >= 1 << 31 {
            return Some(entry);
        }
        if ahead > 0 && self.early.contains_key(&seq) {
            return Some(entry);
        }
        self.held_bytes += entry.cost();
        if ahead > 0 {
            self.early.insert(seq, entry);
        } else {
            self.queue.push_back(entry);
            self.passed();
        }
        None
    }

    /// A send has ended. `Some`: nobody wants to know.
    pub fn sent(&mut self, op: Box<SendOp>, status: ucs_status_t) -> Option<Box<SendOp>> {
        if self.left {
            return Some(op);
        }
        self.finished.push((op, status));
        None
    }

    /// Nobody will ask again what has ended, nor is to be woken.
    #[must_use = "to be dropped without the gate: dropping a waker runs code of others"]
    pub fn leave(&mut self) -> Left {
        self.left = true;
        Left { _finished: std::mem::take(&mut self.finished), _waker: self.waker.take() }
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

/// What an inbox held of others when its link was gone.
pub(super) struct Left {
    _finished: Vec<(Box<SendOp>, ucs_status_t)>,
    _waker: Option<Waker>,
}

/// One link's side of the worker: what callbacks may touch.
pub(super) struct Mailbox {
    pub ucx: &'static Ucx,
    pub address: Address,
    pub dispatch: Arc<Dispatch>,
    max_bytes: usize,
    inbox: Guarded<Inbox>,
    /// Something was put into the inbox since the link last looked. For whoever finds the gate
    /// held by another.
    news: AtomicBool,
}

impl Mailbox {
    #[inline]
    pub fn inbox<'a>(&'a self, key: &'a mut Key<'_>) -> &'a mut Inbox {
        self.inbox.get(&self.dispatch.gate, key)
    }

    /// Whether there may be something new. Asked without the gate: what is missed is seen next
    /// time.
    pub fn may_have_news(&self) -> bool {
        self.news.load(Ordering::Relaxed)
    }

    /// The link is looked at: what came until now is no news any more.
    #[inline]
    pub fn look<'a>(&'a self, key: &'a mut Key<'_>) -> &'a mut Inbox {
        if self.news.load(Ordering::Relaxed) {
            self.news.store(false, Ordering::Relaxed);
        }
        let inbox = self.inbox(key);
        self.unpark(inbox);
        inbox
    }

    /// Makes `call`, which calls into UCX; what comes for this link meanwhile may be taken by
    /// `polled`.
    #[inline]
    pub fn while_polled<'a, T>(
        &self,
        worker: &mut Locked<'_>,
        polled: &mut Polled<'a>,
        call: impl FnOnce(&mut Locked<'_>) -> T,
    ) -> T {
        let polled = NonNull::from(polled).cast::<Polled<'static>>();
        self.dispatch.state(&mut worker.key).polled = Some((NonNull::from(self), polled));
        let result = call(worker);
        self.dispatch.state(&mut worker.key).polled = None;
        result
    }

    /// The link's endpoint sleeps from now on, and is to be woken. Whom it replaces.
    #[must_use = "to be dropped without the gate: dropping a waker runs code of others"]
    pub fn park(&self, inbox: &mut Inbox, waker: &Waker) -> Option<Waker> {
        let old = match &inbox.waker {
            Some(known) if known.will_wake(waker) => None,
            _ => inbox.waker.replace(waker.clone()),
        };
        if !std::mem::replace(&mut inbox.parked, true) {
            self.dispatch.parked.fetch_add(1, Ordering::AcqRel);
        }
        old
    }

    /// Nobody sleeps any more who was to be woken.
    #[must_use = "to be dropped without the gate: dropping a waker runs code of others"]
    pub fn forget_waker(&self, inbox: &mut Inbox) -> Option<Waker> {
        self.unpark(inbox);
        inbox.waker.take()
    }

    pub fn unpark(&self, inbox: &mut Inbox) {
        if std::mem::take(&mut inbox.parked) {
            self.dispatch.parked.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// A request has begun.
    pub fn begin(&self, key: &mut Key<'_>) {
        self.inbox(key).in_flight += 1;
        self.dispatch.state(key).in_flight += 1;
    }

    /// A request has ended; `note` says so in the inbox.
    ///
    /// # Safety
    ///
    /// As of [`Guarded::get_called_back`].
    pub unsafe fn finish<T>(&self, note: impl FnOnce(&mut Inbox) -> T) -> T {
        // SAFETY: the caller's promise; the state is another thing than the inbox.
        let (inbox, state) = unsafe { self.called_back() };
        inbox.in_flight = inbox.in_flight.saturating_sub(1);
        state.in_flight = state.in_flight.saturating_sub(1);
        let result = note(inbox);
        self.rouse(inbox, &mut state.wakes);
        result
    }

    /// The endpoint has failed.
    ///
    /// # Safety
    ///
    /// As of [`Guarded::get_called_back`].
    pub unsafe fn fail(&self, fault: Fault) {
        // SAFETY: as in `finish`.
        let (inbox, state) = unsafe { self.called_back() };
        inbox.fault.get_or_insert(fault);
        self.rouse(inbox, &mut state.wakes);
    }

    /// The worker is held up for good.
    fn give_up(&self, key: &mut Key<'_>) {
        let mut wakes = Vec::new();
        let inbox = self.inbox(key);
        inbox.fault.get_or_insert(Fault::Worker);
        self.rouse(inbox, &mut wakes);
        self.dispatch.state(key).wakes.append(&mut wakes);
    }

    /// # Safety
    ///
    /// As of [`Guarded::get_called_back`].
    #[allow(clippy::mut_from_ref, reason = "as `Guarded::get_called_back`")]
    unsafe fn called_back(&self) -> (&mut Inbox, &mut State) {
        let gate = &self.dispatch.gate;
        // SAFETY: the caller's promise, and the second after the first.
        unsafe { (self.inbox.get_called_back(gate), self.dispatch.state.get_called_back_too()) }
    }

    /// Something is here for the link: its endpoint is woken once the gate is open again, if it
    /// sleeps.
    #[inline]
    fn rouse(&self, inbox: &mut Inbox, wakes: &mut Vec<Waker>) {
        if !self.news.load(Ordering::Relaxed) {
            self.news.store(true, Ordering::Relaxed);
        }
        if std::mem::take(&mut inbox.parked) {
            self.dispatch.parked.fetch_sub(1, Ordering::AcqRel);
            wakes.extend(inbox.waker.clone());
        }
    }
}

/// A link that is being polled at this moment: what comes for it next, and is short, is handed up
/// by the callback itself.
pub(super) struct Polled<'a> {
    pub budget: &'a mut Budget,
    pub sink: &'a mut dyn Sink,
    pub count: &'a mut Count,
    pub takes: Takes,
    /// Why that had to stop.
    pub result: Result<(), LinkError>,
}

/// Whether a link that is being polled takes what comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takes {
    Yes,
    /// Something that came before is still to be handed up.
    NotYet,
    /// A parcel is being handed up. So it stays after a panic.
    Torn,
    /// One could not be handed up.
    Failed,
}

/// What a callback does with a message.
pub(super) struct Delivery<'a> {
    mailbox: &'a Mailbox,
    inbox: &'a mut Inbox,
    wakes: &'a mut Vec<Waker>,
    polled: Option<&'a mut Polled<'static>>,
}

impl Delivery<'_> {
    /// The peer did what it must not.
    pub fn fail(self, what: &'static str) {
        self.inbox.fault.get_or_insert(Fault::Peer(what));
        self.mailbox.rouse(self.inbox, self.wakes);
    }

    /// Whether the message of this number is the next.
    pub fn is_next(&self, seq: u32) -> bool {
        self.inbox.is_next(seq)
    }

    /// See [`Inbox::land_next`].
    ///
    /// # Safety
    ///
    /// The same.
    pub unsafe fn land_next(self, header: &Header, from: *const u8, len: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.inbox.land_next(header, from, len) };
        if self.inbox.has_news() {
            self.mailbox.rouse(self.inbox, self.wakes);
        }
    }

    /// Whoever takes the message of this number at once, if all before it have been handed up.
    #[inline]
    pub fn polled(&mut self, seq: u32) -> Option<&mut Polled<'static>> {
        if !self.inbox.is_next(seq) || !self.inbox.queue.is_empty() {
            return None;
        }
        self.polled
            .as_deref_mut()
            .filter(|polled| polled.takes == Takes::Yes && polled.budget.parcels > 0)
    }

    /// The message was taken at once.
    #[inline]
    pub fn was_taken(self) {
        self.inbox.passed();
    }

    /// Puts a parcel into the inbox. `Some`: it is not wanted.
    #[inline]
    pub fn deliver(self, entry: Entry) -> Option<Entry> {
        let Delivery { mailbox, inbox, wakes, .. } = self;
        let refused = if entry.header.kind == Kind::Ping {
            inbox.pinged = true;
            Some(entry)
        } else {
            let refused = inbox.place(entry, mailbox.max_bytes);
            if refused.is_some() {
                inbox.fault.get_or_insert(BEYOND_CREDIT);
            }
            refused
        };
        mailbox.rouse(inbox, wakes);
        refused
    }
}

/// What the gate guards beside the inboxes.
#[derive(Default)]
pub(super) struct State {
    slots: Slab<Arc<Mailbox>>,
    /// Whom callbacks wanted woken. To be woken when the gate is open.
    pub wakes: Vec<Waker>,
    /// Requests that UCX is at work on, of all links.
    pub in_flight: usize,
    /// Nothing comes any more, for whomever.
    pub held_up: bool,
    /// Since when UCX refuses to be armed without anything having moved.
    pub refused_since: Option<Instant>,
    /// Transports that links have used and in which a sender that is killed can hold up all others.
    pub rings: Vec<&'static str>,
    /// The mailbox of the link that is being polled.
    polled: Option<(NonNull<Mailbox>, NonNull<Polled<'static>>)>,
}

// SAFETY: `polled` is set only within a call, on the thread that has the gate.
unsafe impl Send for State {}

/// What the worker's callbacks may touch.
#[derive(Default)]
pub(super) struct Dispatch {
    pub gate: Gate,
    state: Guarded<State>,
    /// Links whose endpoints sleep.
    pub parked: AtomicUsize,
    /// Endpoints that are being closed, and killed links that linger: somebody has to progress.
    pub ending: AtomicUsize,
    /// UCX refuses to be armed: whoever sleeps is woken by what the resident task finds, which looks by time.
    pub refuses: AtomicBool,
    /// A peer is gone that may hold up the others: see [`super::probe`].
    pub suspect: AtomicBool,
}

impl Dispatch {
    #[inline]
    pub fn state<'a>(&'a self, key: &'a mut Key<'_>) -> &'a mut State {
        self.state.get(&self.gate, key)
    }

    /// A new mailbox, with a slot of its own. `None`: there are too many.
    pub fn register(
        self: &Arc<Self>,
        ucx: &'static Ucx,
        secret: u64,
        max_bytes: usize,
    ) -> Option<Arc<Mailbox>> {
        let mut key = self.gate.lock();
        let State { slots, held_up, .. } = self.state(&mut key);
        let inbox = Inbox { fault: held_up.then_some(Fault::Worker), ..Inbox::default() };
        let entry = slots.vacant_entry();
        if entry.key() >= SLOTS_MAX as usize {
            return None;
        }
        let mailbox = Arc::new(Mailbox {
            ucx,
            address: Address { slot: entry.key() as u32, secret },
            dispatch: self.clone(),
            max_bytes,
            inbox: Guarded::new(inbox),
            news: AtomicBool::new(false),
        });
        entry.insert(mailbox.clone());
        Some(mailbox)
    }

    pub fn unregister(&self, key: &mut Key<'_>, mailbox: &Mailbox) {
        let slots = &mut self.state(key).slots;
        let slot = mailbox.address.slot as usize;
        // The slot may have a new owner by now.
        if slots.get(slot).is_some_and(|known| std::ptr::eq(&raw const **known, mailbox)) {
            slots.remove(slot);
        }
    }

    /// Ends every link, and what would become one: the worker is held up for good.
    pub fn give_up(&self, key: &mut Key<'_>) {
        let state = self.state(key);
        state.held_up = true;
        let all: Vec<_> = state.slots.iter().map(|(_, known)| known.clone()).collect();
        for mailbox in all {
            mailbox.give_up(key);
        }
    }

    /// The mailbox of a slot, if whoever asks knows its secret and something is still wanted.
    ///
    /// # Safety
    ///
    /// As of [`Guarded::get_called_back`], for this and for the inbox.
    #[inline]
    pub unsafe fn find(&self, slot: u32, secret: u64) -> Option<Delivery<'_>> {
        // SAFETY: the caller's promise.
        let State { slots, wakes, polled, .. } = unsafe { self.state.get_called_back(&self.gate) };
        let mailbox =
            slots.get(slot as usize).filter(|mailbox| mailbox.address.secret == secret)?;
        // SAFETY: the caller's promise; a mailbox in a slot of ours has the gate that the slots have.
        let inbox = unsafe { mailbox.inbox.get_called_back_too() };
        let own = polled.filter(|(of, _)| std::ptr::eq(of.as_ptr(), &raw const **mailbox));
        // SAFETY: `Mailbox::while_polled` lends it for the time of the call that UCX calls back in,
        // and it is reached from here only.
        let polled = own.map(|(_, mut polled)| unsafe { polled.as_mut() });
        (!inbox.closed).then_some(Delivery { mailbox, inbox, wakes, polled })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::ucx::library;
    use crate::link::{Arrival, Class, Disposition, OpId};

    #[test]
    fn a_ping_that_has_not_left_holds_the_set_up_open() {
        let mut inbox = Inbox { in_flight: 1, ..Inbox::default() };
        assert!(!inbox.works_both_ways());
        inbox.pinged = true;
        assert!(!inbox.works_both_ways(), "the peer has not heard of us yet");
        inbox.in_flight = 0;
        assert!(inbox.works_both_ways());
        inbox.pinged = false;
        assert!(!inbox.works_both_ways());
    }

    struct Panics;

    impl Sink for Panics {
        fn parcel(&mut self, _: Arrival<'_>) -> Disposition {
            panic!("a parcel that is not taken to its end");
        }

        fn done(&mut self, _: OpId, _: Result<(), LinkError>) {}

        fn wake(&mut self, _: Waker) {}
    }

    /// As a link that is being polled lends it; for as long as the test runs.
    fn polled(takes: Takes, parcels: u32) -> Polled<'static> {
        let budget = Box::leak(Box::new(Budget { parcels, ..Budget::TURN }));
        let (sink, count) = (Box::leak(Box::new(Panics)), Box::leak(Box::default()));
        Polled { budget, sink, count, takes, result: Ok(()) }
    }

    #[test]
    fn only_what_is_next_is_taken_at_once_and_only_by_whom_nothing_holds_up() {
        let Ok(ucx) = library() else {
            eprintln!("SKIPPED: only_what_is_next_is_taken_at_once: there is no libucp");
            return;
        };
        let mailbox = Arc::<Dispatch>::default().register(ucx, 1, 1 << 20).expect("a slot");
        let mut inbox = Inbox { next_seq: 3, ..Inbox::default() };
        let mut takes = |takes, parcels, seq, queued| {
            let (mut polled, mut wakes) = (polled(takes, parcels), Vec::new());
            inbox.queue.clear();
            if queued {
                let to = Address { slot: 0, secret: 1 };
                let header = Header::new(Kind::Eager, Class::Message, 0, 2, to);
                let (bytes, len, body) = (SmallVec::new(), 0, Body::Inline);
                inbox.queue.push_back(Entry { header, bytes, len, body });
            }
            let (mailbox, inbox, wakes) = (&*mailbox, &mut inbox, &mut wakes);
            let mut delivery = Delivery { mailbox, inbox, wakes, polled: Some(&mut polled) };
            delivery.polled(seq).is_some()
        };
        assert!(takes(Takes::Yes, 1, 3, false));
        assert!(!takes(Takes::Yes, 1, 4, false), "it came before its turn");
        assert!(!takes(Takes::Yes, 1, 3, true), "another waits before it");
        assert!(!takes(Takes::Yes, 0, 3, false), "the budget is spent");
        for held_up in [Takes::NotYet, Takes::Torn, Takes::Failed] {
            assert!(!takes(held_up, 1, 3, false), "{held_up:?}");
        }
    }

    #[test]
    fn a_panic_of_whoever_takes_it_leaves_the_link_torn() {
        let mut polled = polled(Takes::Yes, 1);
        let hand_up = std::panic::AssertUnwindSafe(|| polled.hand_up(&[1, 2, 3], 1));
        assert!(std::panic::catch_unwind(hand_up).is_err());
        assert_eq!(polled.takes, Takes::Torn);
    }
}
