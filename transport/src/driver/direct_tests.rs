//! What a peer can make of being granted direct access.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Waker};

use smallvec::smallvec;

use super::core::{Core, Limits, State};
use super::direct::{GRANTS_MAX, VAIN_MAX};
use super::keys::{Entry, Keys, Told};
use super::view::Views;
use crate::error::{Error, ErrorKind, LinkError, Phase};
use crate::link::{
    Armed, Budget, Caps, Class, How, Killed, Landing, Link, LinkCounters, LinkKind, OneSided, OpId,
    PayloadId, Post, Progress, Registration, RemoteId, Segment, SegmentMut, Sink,
};
use crate::memory::{Buffer, HostPool};
use crate::proto::keys::{ACCESS_READ, ACCESS_WRITE};
use crate::proto::wire::Head;

/// What a lane was asked to do.
#[derive(Default)]
struct Seen {
    heads: Vec<Vec<u8>>,
    registrations: usize,
    withdrawn: usize,
    cut: usize,
    /// Nothing is registered, for this reason.
    refuses: Option<ErrorKind>,
    /// Once killed it does not end.
    lingers: bool,
}

type Shared = Arc<Mutex<Seen>>;

fn lock(seen: &Shared) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Made(Shared);

impl Registration for Made {
    fn grant(&self) -> &[u8] {
        b"grant"
    }

    fn withdraw(&self) -> bool {
        lock(&self.0).withdrawn += 1;
        true
    }

    fn cut(&self) -> bool {
        lock(&self.0).cut += 1;
        true
    }
}

/// A lane on which nothing arrives.
struct Lane {
    caps: Caps,
    seen: Shared,
}

impl Link for Lane {
    fn kind(&self) -> LinkKind {
        LinkKind::Verbs
    }

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn poll(
        &mut self,
        _: &mut Context<'_>,
        _: bool,
        _: &mut Budget,
        _: &mut dyn Sink,
    ) -> Result<Progress, LinkError> {
        Ok(Progress::Idle)
    }

    fn arm(&mut self, _: &mut Context<'_>) -> Result<Armed, LinkError> {
        Ok(Armed::Yes)
    }

    fn post(
        &mut self,
        _: OpId,
        _: Class,
        _: How,
        head: &[u8],
        _: &[Segment<'_>],
    ) -> Result<Post, LinkError> {
        lock(&self.seen).heads.push(head.to_vec());
        Ok(Post::Done)
    }

    fn land(&mut self, _: PayloadId, _: Landing, _: OpId) -> Result<Post, LinkError> {
        Ok(Post::Done)
    }

    fn release(&mut self, _: PayloadId) {}

    fn kill(&mut self, _: &LinkError, _: &mut dyn Sink) -> Killed {
        if lock(&self.seen).lingers { Killed::Lingers } else { Killed::Over }
    }

    fn flushed(&self) -> bool {
        true
    }

    fn counters(&self) -> LinkCounters {
        LinkCounters::default()
    }

    fn one_sided(&mut self) -> Option<&mut dyn OneSided> {
        Some(self)
    }
}

impl OneSided for Lane {
    fn way(&self) -> &'static str {
        "a test"
    }

    fn domain(&self) -> usize {
        1
    }

    fn register(
        &mut self,
        _: SegmentMut,
        _: bool,
        _: bool,
    ) -> Result<Arc<dyn Registration>, LinkError> {
        let mut seen = lock(&self.seen);
        seen.registrations += 1;
        if let Some(kind) = seen.refuses {
            return Err(LinkError::new(kind, LinkKind::Verbs, "refused"));
        }
        Ok(Arc::new(Made(self.seen.clone())))
    }

    fn open(&mut self, _: &[u8]) -> Result<RemoteId, LinkError> {
        Ok(RemoteId(0))
    }

    fn close(&mut self, _: RemoteId) {}

    fn put(&mut self, _: OpId, _: Segment<'_>, _: RemoteId, _: u64) -> Result<Post, LinkError> {
        Ok(Post::Done)
    }

    fn get(&mut self, _: OpId, _: SegmentMut, _: RemoteId, _: u64) -> Result<Post, LinkError> {
        Ok(Post::Done)
    }
}

/// An endpoint without a node.
pub(super) struct Meeting {
    pub core: Core,
    keys: Arc<Keys>,
    seen: Shared,
}

impl Meeting {
    pub fn new() -> Meeting {
        let limits = Limits {
            peer_message_window: 1000,
            peer_tag_window: 1000,
            peer_max_message: 1000,
            peer_max_frames: 10,
            message_window: 1000,
            tag_window: 1000,
            max_message: 1000,
            max_frames: 10,
            eager_max: 100,
            direct: true,
        };
        let (keys, seen) = (Arc::new(Keys::default()), Shared::default());
        let caps = Caps { eager_max: 100, ways: String::new() };
        let lane = Box::new(Lane { caps, seen: seen.clone() }) as Box<dyn Link>;
        let allocator = Arc::new(HostPool::new(0));
        let views = Views(Weak::new());
        let state = State::new(limits, "somebody".into(), keys.clone(), allocator, views);
        let mut core = Core::new(smallvec![lane], state);
        core.enable_direct(Waker::noop().clone());
        Meeting { core, keys, seen }
    }

    fn region(&self) -> (u64, Arc<Entry>) {
        let buffer = vec![0u8; 10];
        let memory = buffer.region().into();
        self.keys.register(memory, ACCESS_READ | ACCESS_WRITE, Box::new(buffer)).expect("random")
    }

    /// One that the peer has asked for, and was granted.
    fn granted_region(&mut self) -> (u64, Arc<Entry>) {
        let (key, entry) = self.region();
        self.wanted(key);
        self.drive();
        (key, entry)
    }

    fn wanted(&mut self, key: u64) {
        assert!(self.core.state.on_wanted(key).is_ok(), "asking is allowed");
    }

    fn given_back(&mut self, key: u64) -> bool {
        let is_due = self.core.state.on_revoked(key).is_ok();
        std::mem::take(&mut self.core.state.after).run();
        is_due
    }

    /// One turn. `true`: another one is needed.
    pub fn drive(&mut self) -> bool {
        let mut budget = Budget::TURN;
        let mut cx = Context::from_waker(Waker::noop());
        let progress = self.core.drive(&mut cx, false, &mut budget);
        std::mem::take(&mut self.core.state.after).run();
        progress == Progress::More
    }

    fn registrations(&self) -> usize {
        lock(&self.seen).registrations
    }

    /// How many registrations were cut, and how many withdrawn.
    fn ended(&self) -> (usize, usize) {
        let seen = lock(&self.seen);
        (seen.cut, seen.withdrawn)
    }

    /// How much the peer was told.
    pub fn said(&self) -> usize {
        lock(&self.seen).heads.len()
    }

    /// What the peer was told last.
    pub fn says(&self, is_it: impl FnOnce(&Head<'_>) -> bool) -> bool {
        let seen = lock(&self.seen);
        let last = seen.heads.last().expect("something was said");
        is_it(&Head::decode(last).expect("a head"))
    }

    fn granted(&self) -> usize {
        self.core.state.direct.as_ref().map_or(0, |direct| direct.granted())
    }
}

/// The owner wants it back.
fn revoke(entry: &Entry) -> Told {
    let (buffer, told) = entry.revoke(Some(Waker::noop()));
    assert!(buffer.is_none() && !told.is_nobody(), "the peer holds it");
    told
}

#[test]
fn one_region_is_registered_a_turn() {
    let mut meeting = Meeting::new();
    let keys: Vec<u64> = (0..5).map(|_| meeting.region().0).collect();
    keys.iter().for_each(|key| meeting.wanted(*key));
    for turn in 1..=5 {
        assert_eq!(meeting.drive(), turn < 5, "whoever drives has to come back for the others");
        assert_eq!(meeting.registrations(), turn);
        assert!(
            meeting
                .says(|head| matches!(head, Head::Granted { key, .. } if *key == keys[turn - 1]))
        );
    }
    assert!(!meeting.drive());
    assert_eq!((meeting.registrations(), meeting.granted()), (5, 5));
}

#[test]
fn keys_that_are_given_back_unasked_are_not_registered_for_ever() {
    let mut meeting = Meeting::new();
    let (key, entry) = meeting.region();
    for _ in 0..3 * VAIN_MAX {
        meeting.wanted(key);
        while meeting.drive() {}
        if meeting.granted() == 1 {
            assert!(meeting.given_back(key));
        }
    }
    assert_eq!(meeting.registrations(), VAIN_MAX);
    assert!(meeting.says(|head| matches!(head, Head::Refused { .. })));
    assert!(entry.revoke(None).0.is_some(), "nobody holds it");
}

#[test]
fn what_cannot_be_registered_is_not_tried_for_ever() {
    // Nor is anybody made to pay for a limit of this side's, which others may have reached.
    for (kind, tried) in
        [(ErrorKind::Resources, VAIN_MAX), (ErrorKind::LimitExceeded, 3 * VAIN_MAX)]
    {
        let mut meeting = Meeting::new();
        lock(&meeting.seen).refuses = Some(kind);
        let (key, _entry) = meeting.region();
        for _ in 0..3 * VAIN_MAX {
            meeting.wanted(key);
            while meeting.drive() {}
            assert!(meeting.says(|head| matches!(head, Head::Refused { .. })));
        }
        assert_eq!(meeting.registrations(), tried, "{kind:?}");
    }
}

#[test]
fn keys_that_were_asked_back_count_for_nothing() {
    let mut meeting = Meeting::new();
    for round in 1..=3 * VAIN_MAX {
        let (key, entry) = meeting.granted_region();
        let _told = revoke(&entry);
        meeting.drive();
        assert!(meeting.says(|head| matches!(head, Head::Revoke { .. })));
        assert!(meeting.given_back(key));
        meeting.drive();
        assert!(entry.revoke(None).0.is_some(), "given back");
        assert_eq!(meeting.registrations(), round);
    }
}

#[test]
fn a_region_that_is_not_given_back_in_time_is_taken() {
    let mut meeting = Meeting::new();
    let (key, entry) = meeting.granted_region();
    let told = revoke(&entry);
    meeting.drive();
    assert!(entry.revoke(Some(Waker::noop())).0.is_none(), "the peer may still reach it");
    told.cut();
    meeting.drive();
    assert_eq!(meeting.ended(), (1, 0));
    assert!(entry.revoke(Some(Waker::noop())).0.is_some(), "nothing reaches it any more");
    // It may be about to say so.
    assert!(meeting.given_back(key));
    assert!(!meeting.given_back(key), "twice");
}

/// What a lane of it still is may let the peer in.
#[test]
fn a_region_is_taken_of_an_endpoint_that_is_dead_and_lingers() {
    let mut meeting = Meeting::new();
    let (_, entry) = meeting.granted_region();
    lock(&meeting.seen).lingers = true;
    meeting.core.fail(Error::new(ErrorKind::Closed, Phase::Close, "aborted"));
    let told = revoke(&entry);
    meeting.drive();
    assert_eq!((meeting.granted(), meeting.ended()), (1, (0, 0)), "there is time yet");
    told.cut();
    meeting.drive();
    assert!(!meeting.core.ended());
    assert_eq!((meeting.granted(), meeting.ended()), (0, (1, 0)));
    assert!(entry.revoke(Some(Waker::noop())).0.is_some(), "nothing reaches it any more");
    lock(&meeting.seen).lingers = false;
    meeting.drive();
    assert!(meeting.core.ended());
}

#[test]
fn what_comes_in_time_is_not_taken() {
    let mut meeting = Meeting::new();
    let (key, entry) = meeting.granted_region();
    let told = revoke(&entry);
    meeting.drive();
    assert!(meeting.given_back(key));
    meeting.drive();
    told.cut();
    meeting.drive();
    assert_eq!(meeting.ended(), (0, 1));
    assert!(!meeting.given_back(key));
}

#[test]
fn keys_that_were_taken_are_among_those_that_are_counted() {
    let mut meeting = Meeting::new();
    for _ in 0..GRANTS_MAX {
        let (_, entry) = meeting.granted_region();
        let told = revoke(&entry);
        meeting.drive();
        told.cut();
        meeting.drive();
    }
    let (_, _entry) = meeting.granted_region();
    assert_eq!(meeting.registrations(), GRANTS_MAX);
    assert!(meeting.says(|head| matches!(head, Head::Refused { .. })));
}
