//! The link between two engines of one process: the kernel makes no difference between its own
//! process and another for anything used here.

mod together;

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::link::{BELL, BULK_MIN_BYTES, BULK_OPEN_MAX, ShmLink};
use super::*;
use crate::error::{ErrorKind, LinkError};
use crate::link::{
    Armed, Arrival, Budget, COPIED_MAX, Class, Disposition, Engine, How, Landing, Link, LinkKind,
    OpId, PayloadId, Post, Progress, RawView, Segment, SegmentMut, Sink,
};
use crate::memory::{MemoryKind, SharedBlock, SharedPool};
use crate::runtime::{Reactor, Timers};

const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, PartialEq)]
enum Policy {
    Land,
    /// Lands in memory that is too short.
    Short,
    Hold,
    View,
    Discard,
}

#[derive(Default)]
struct Recorder {
    policy: Option<Policy>,
    heads: Vec<Vec<u8>>,
    landed: HashMap<u32, Vec<u8>>,
    held: Vec<(PayloadId, usize)>,
    views: Vec<(PayloadId, Vec<RawView>)>,
    done: HashMap<u32, Result<(), LinkError>>,
    next: u32,
}

impl Recorder {
    fn with(policy: Policy) -> Self {
        Recorder { policy: Some(policy), next: 1 << 20, ..Recorder::default() }
    }

    fn landing(&mut self, len: usize) -> (Landing, OpId) {
        let op = OpId { index: self.next, generation: 0 };
        self.next += 1;
        let mut memory = vec![0u8; len];
        let (front, back) = memory.split_at_mut(len / 3);
        let to = [front, back]
            .into_iter()
            .map(|piece| SegmentMut {
                ptr: piece.as_mut_ptr(),
                len: piece.len(),
                kind: MemoryKind::Host,
            })
            .collect();
        self.landed.insert(op.index, memory);
        (to, op)
    }

    fn landed_done(&self) -> usize {
        self.done.keys().filter(|index| **index >= 1 << 20).count()
    }
}

impl Sink for Recorder {
    fn parcel(&mut self, arrival: Arrival<'_>) -> Disposition {
        self.heads.push(arrival.head.to_vec());
        match self.policy {
            Some(Policy::Land) => {
                let (to, op) = self.landing(arrival.len as usize);
                Disposition::Land { to, op, lasting: true }
            }
            Some(Policy::Short) => {
                let (to, op) = self.landing(arrival.len as usize - 1);
                Disposition::Land { to, op, lasting: true }
            }
            Some(Policy::Hold) => {
                self.held.push((arrival.payload, arrival.len as usize));
                Disposition::Hold
            }
            Some(Policy::View) => {
                let views = arrival.views.map(|views| views.to_vec()).unwrap_or_default();
                self.views.push((arrival.payload, views));
                Disposition::View
            }
            _ => Disposition::Discard,
        }
    }

    fn done(&mut self, op: OpId, result: Result<(), LinkError>) {
        assert!(self.done.insert(op.index, result).is_none(), "done twice: {op:?}");
    }
}

struct Pair {
    left: ShmLink,
    right: ShmLink,
    at_left: Recorder,
    at_right: Recorder,
    pool: Arc<SharedPool>,
}

fn engine(options: ShmOptions) -> (Arc<ShmEngine>, Arc<SharedPool>, Arc<Timers>) {
    let reactor = Reactor::Tokio(tokio::runtime::Handle::current());
    let timers = Arc::new(Timers::new(&reactor).expect("timers"));
    let pool = Arc::new(SharedPool::new(64 << 20));
    let made = ShmEngine::new(reactor, timers.clone(), options).expect("engine");
    (made, pool, timers)
}

/// What the node's resident task does.
fn attend(engine: Arc<ShmEngine>, timers: Arc<Timers>) -> tokio::task::JoinHandle<()> {
    tokio::spawn(poll_fn(move |cx: &mut Context<'_>| {
        timers.poll_expired(cx).expect("timers");
        while engine.poll(cx, &mut Budget::TURN.clone()) == Progress::More {}
        Poll::Pending
    }))
}

async fn pair_with(left: ShmOptions, right: ShmOptions) -> Pair {
    let (left, pool, left_timers) = engine(left);
    let (right, _, right_timers) = engine(right);
    let tasks = [attend(left.clone(), left_timers), attend(right.clone(), right_timers)];
    let token = [9; 16];
    let (left_blob, right_blob) = (left.blob(), right.blob());
    let (made, taken) =
        tokio::join!(left.connect(&right_blob, token), right.accept(&left_blob, token));
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
    Pair {
        left: made.expect("connect"),
        right: taken.expect("accept"),
        at_left: Recorder::with(Policy::Discard),
        at_right: Recorder::with(Policy::Land),
        pool,
    }
}

async fn pair() -> Pair {
    pair_with(ShmOptions::default(), ShmOptions::default()).await
}

fn no_single_copy() -> ShmOptions {
    ShmOptions { single_copy: false, ..ShmOptions::default() }
}

fn turn(link: &mut ShmLink, sink: &mut Recorder) -> Result<Progress, LinkError> {
    let mut cx = Context::from_waker(Waker::noop());
    link.poll(&mut cx, false, &mut Budget::TURN.clone(), sink)
}

/// As one who calls again at once: looks at the peer's life now and then.
fn spin(link: &mut ShmLink, sink: &mut Recorder) -> Result<Progress, LinkError> {
    let mut cx = Context::from_waker(Waker::noop());
    link.poll(&mut cx, true, &mut Budget::TURN.clone(), sink)
}

impl Pair {
    fn pump(&mut self, mut until: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !until(self) {
            turn(&mut self.left, &mut self.at_left).expect("left");
            turn(&mut self.right, &mut self.at_right).expect("right");
            assert!(Instant::now() < deadline, "nothing happens");
        }
    }

    fn post(&mut self, op: u32, payload: &[Segment<'_>]) -> Post {
        let op = OpId { index: op, generation: 0 };
        self.left.post(op, Class::Message, How::Eager, b"head", payload).expect("post")
    }

    /// Sends and receives, and checks both completions and the bytes.
    fn transfer(&mut self, bytes: &[u8], payload: &[Segment<'_>]) {
        let index = self.at_right.next;
        let posted = self.post(index - (1 << 20), payload);
        assert_ne!(posted, Post::Full);
        self.pump(|pair| {
            pair.at_right.done.contains_key(&index)
                && (posted == Post::Done || pair.at_left.done.contains_key(&(index - (1 << 20))))
        });
        assert!(self.at_right.done[&index].is_ok());
        assert!(self.at_right.landed[&index] == bytes, "{} bytes differ", bytes.len());
        assert_eq!(self.at_right.heads.last().expect("a head"), b"head");
        self.at_right.landed.remove(&index);
        assert!(self.left.flushed());
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at.wrapping_mul(31) >> 3) as u8 ^ at as u8).collect()
}

fn segment(bytes: &[u8]) -> Segment<'_> {
    Segment { ptr: bytes.as_ptr(), len: bytes.len(), kind: MemoryKind::Host, shared: None }
}

fn loaned(block: &SharedBlock) -> Segment<'_> {
    Segment { ptr: block.as_ptr(), len: block.len(), kind: MemoryKind::Shared, shared: Some(block) }
}

fn block(pool: &SharedPool, bytes: &[u8]) -> SharedBlock {
    let mut loan = pool.loan(bytes.len()).expect("room");
    loan.copy_from_slice(bytes);
    loan.into_block()
}

const SIZES: [usize; 16] =
    [0, 1, 51, 52, 53, 55, 56, 57, 256, 257, 2047, 2048, 2049, 64 << 10, (1 << 20) + 1, 8 << 20];

#[tokio::test]
async fn host_memory_arrives_by_single_copy() {
    let mut pair = pair().await;
    assert!(pair.left.caps().ways.contains("single copy (process_vm_readv)"));
    for len in SIZES {
        let bytes = pattern(len);
        pair.transfer(&bytes, &[segment(&bytes)]);
    }
    let counters = pair.right.counters();
    assert_eq!(counters.single_copy_bytes_received, 2049 + (64 << 10) + (9 << 20) + 1);
    assert_eq!(counters.arena_bytes_received, 0);
}

#[tokio::test]
async fn large_messages_that_are_copied_wait_for_each_other() {
    let mut pair = pair().await;
    let large = pattern(BULK_MIN_BYTES as usize);
    let small = &large[..64 << 10];
    let loan = block(&pair.pool, &large);
    let open = u32::try_from(BULK_OPEN_MAX).expect("few");
    for op in 0..open {
        assert_eq!(pair.post(op, &[segment(&large)]), Post::Pending);
    }
    assert_eq!(pair.post(open, &[segment(&large)]), Post::Full);
    // Nobody else does.
    assert_eq!(pair.post(open + 1, &[segment(small)]), Post::Pending);
    assert_eq!(pair.post(open + 2, &[loaned(&loan)]), Post::Pending);
    let op = OpId { index: open + 3, generation: 0 };
    let put = pair.left.post(op, Class::OneSided, How::Eager, b"head", &[segment(&large)]);
    assert_eq!(put.expect("post"), Post::Pending);
    pair.pump(|pair| pair.at_left.done.contains_key(&0));
    assert_eq!(pair.post(open, &[segment(&large)]), Post::Pending);
    pair.pump(|pair| pair.at_left.done.len() as u32 == open + 4);
    assert!(pair.at_left.done.values().all(Result::is_ok));
    assert!(pair.left.flushed());
}

#[tokio::test]
async fn host_memory_arrives_through_the_arena_when_single_copy_is_off() {
    for (left, right) in
        [(no_single_copy(), ShmOptions::default()), (ShmOptions::default(), no_single_copy())]
    {
        let mut pair = pair_with(left, right).await;
        assert!(pair.left.caps().ways.contains("configuration"), "{}", pair.left.caps().ways);
        for len in SIZES {
            let bytes = pattern(len);
            pair.transfer(&bytes, &[segment(&bytes)]);
        }
        let counters = pair.right.counters();
        assert_eq!(counters.arena_bytes_received, 2049 + (64 << 10) + (9 << 20) + 1);
        assert_eq!(counters.single_copy_bytes_received, 0);
        assert_eq!(pair.left.counters().arena_bytes_sent, counters.arena_bytes_received);
    }
}

#[tokio::test]
async fn loans_arrive_by_reference() {
    let mut pair = pair().await;
    for len in SIZES {
        let bytes = pattern(len);
        let block = block(&pair.pool, &bytes);
        pair.transfer(&bytes, &[loaned(&block)]);
        assert!(block.try_into_loan().is_ok(), "the link let go");
    }
    assert_eq!(pair.right.counters().single_copy_bytes_received, 0);
    assert!(pair.right.counters().loaned_bytes_received > 9 << 20);
}

#[tokio::test]
async fn a_view_pins_the_loan_until_released() {
    let mut pair = pair().await;
    pair.at_right.policy = Some(Policy::View);
    let bytes = pattern(10_000);
    let blocks = [block(&pair.pool, &bytes), block(&pair.pool, b"short")];
    assert_eq!(pair.post(1, &[loaned(&blocks[0]), loaned(&blocks[1])]), Post::Pending);
    pair.pump(|pair| !pair.at_right.views.is_empty());
    let (payload, views) = pair.at_right.views.pop().expect("a view");
    assert_eq!(views.len(), 2);
    // SAFETY: a mapping kept by the view; this test owns the loan and does not write it now.
    let seen = unsafe { std::slice::from_raw_parts(views[0].ptr, views[0].len) };
    assert!(seen == bytes);
    for _ in 0..10 {
        turn(&mut pair.left, &mut pair.at_left).expect("left");
        assert!(pair.at_left.done.is_empty(), "whoever posted keeps the loan until then");
    }
    pair.right.release(payload);
    pair.pump(|pair| pair.at_left.done.contains_key(&1));
    for block in blocks {
        assert!(block.try_into_loan().is_ok(), "the link keeps none");
    }
}

#[tokio::test]
async fn a_held_offer_is_landed_or_refused_later() {
    let mut pair = pair().await;
    pair.at_right.policy = Some(Policy::Hold);
    let payloads = [pattern(100), pattern(100_000), pattern(3 << 20), pattern(5000)];
    let loan = block(&pair.pool, &payloads[1]);
    let segments =
        [segment(&payloads[0]), loaned(&loan), segment(&payloads[2]), segment(&payloads[3])];
    for (at, segment) in segments.iter().enumerate() {
        let op = OpId { index: at as u32, generation: 0 };
        let posted = pair.left.post(op, Class::Tag, How::Offer, b"", &[*segment]).expect("post");
        assert_ne!(posted, Post::Full);
    }
    pair.pump(|pair| pair.at_right.held.len() == 4);
    let held = std::mem::take(&mut pair.at_right.held);
    pair.right.release(held[3].0);
    for (at, (payload, len)) in held[..3].iter().enumerate().rev() {
        let (to, op) = pair.at_right.landing(*len);
        if pair.right.land(*payload, to, op).expect("land") == Post::Pending {
            pair.pump(|pair| pair.at_right.done.contains_key(&op.index));
        }
        assert!(pair.at_right.landed[&op.index] == payloads[at]);
    }
    pair.pump(|pair| pair.at_left.done.len() == 4 && pair.left.flushed());
    assert!(pair.right.land(held[0].0, Landing::new(), OpId::NONE).is_err(), "not open any more");
}

#[tokio::test]
async fn thousands_of_segments_arrive_by_every_way() {
    let bytes = pattern(5_000 * 37);
    let mut segments: Vec<_> = bytes.chunks(37).map(segment).collect();
    segments.insert(100, segment(&[]));
    for options in [ShmOptions::default(), no_single_copy()] {
        let mut pair = pair_with(options.clone(), options).await;
        for count in [1, 60, 100, 101, 1024, 5_001] {
            let some = &segments[..count];
            let len = some.iter().map(|segment| segment.len).sum();
            pair.transfer(&bytes[..len], some);
        }
        let blocks: Vec<_> =
            bytes[..70 * 37].chunks(37).map(|chunk| block(&pair.pool, chunk)).collect();
        for count in [10, 64, 65, 70] {
            let some: Vec<_> = blocks[..count].iter().map(loaned).collect();
            pair.transfer(&bytes[..count * 37], &some);
        }
    }
}

#[tokio::test]
async fn permission_withdrawn_midway_moves_only_that_payload_to_the_arena() {
    let mut pair = pair().await;
    let bytes = pattern(5 << 20);
    for after in [0, 1, 1000, (2 << 20) + 7] {
        pair.right.deny_pull_after = Some(after);
        pair.transfer(&bytes, &[segment(&bytes[..1 << 20]), segment(&bytes[1 << 20..])]);
    }
    pair.right.deny_pull_after = None;
    let before = pair.right.counters();
    pair.transfer(&bytes, &[segment(&bytes)]);
    let after = pair.right.counters();
    assert_eq!(after.arena_bytes_received, before.arena_bytes_received);
    assert!(before.arena_bytes_received > 15 << 20);
}

#[tokio::test]
async fn a_full_ring_answers_full_and_control_never_does() {
    let mut pair = pair().await;
    pair.at_right.policy = Some(Policy::Discard);
    let bytes = pattern(2048);
    let mut sent = 0;
    while pair.post(sent, &[segment(&bytes)]) == Post::Done {
        sent += 1;
    }
    assert!((4..20).contains(&sent), "{sent}");
    for at in 0..1000u32 {
        let op = OpId::NONE;
        let head = at.to_ne_bytes();
        let posted = pair.left.post(op, Class::Control, How::Eager, &head, &[]).expect("control");
        assert_eq!(posted, Post::Done);
    }
    assert!(!pair.left.flushed());
    assert_eq!(pair.post(sent, &[segment(&bytes)]), Post::Full);
    assert_eq!(pair.left.counters().stalls, 2);
    pair.pump(|pair| pair.at_right.heads.len() == sent as usize + 1000);
    for (at, head) in pair.at_right.heads[sent as usize..].iter().enumerate() {
        assert_eq!(head[..], (at as u32).to_ne_bytes());
    }
    assert!(pair.left.flushed());
    assert_eq!(pair.post(sent, &[segment(&bytes)]), Post::Done);
}

#[tokio::test]
async fn open_payloads_are_bounded_by_class() {
    let mut pair = pair().await;
    pair.at_right.policy = Some(Policy::Hold);
    let bytes = pattern(3000);
    let mut open = 0;
    loop {
        match pair.post(open, &[segment(&bytes)]) {
            Post::Pending => open += 1,
            _ if pair.at_right.held.len() == open as usize => break,
            _ => pair.pump(|pair| pair.at_right.held.len() == open as usize),
        }
    }
    assert_eq!(open, 1024);
    let op = OpId { index: 5000, generation: 0 };
    let other = pair.left.post(op, Class::Tag, How::Offer, b"", &[segment(&bytes)]);
    assert_eq!(other.expect("another class"), Post::Pending);
    pair.pump(|pair| pair.at_right.held.len() == 1025);
    for (payload, _) in std::mem::take(&mut pair.at_right.held) {
        pair.right.release(payload);
    }
    pair.pump(|pair| pair.at_left.done.len() == 1025);
}

#[tokio::test]
async fn a_sleeper_is_woken_by_a_post_and_by_room() {
    let mut pair = pair().await;
    pair.at_right.policy = Some(Policy::Discard);
    for round in 0..100 {
        let link = &mut pair.right;
        poll_fn(|cx| match link.arm(cx).expect("arm") {
            Armed::Yes => Poll::Ready(()),
            Armed::Busy => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        })
        .await;
        assert_eq!(pair.post(round, &[segment(b"8 bytes.")]), Post::Done);
        let (link, sink) = (&mut pair.right, &mut pair.at_right);
        let woken = poll_fn(|cx| {
            while link.poll(cx, false, &mut Budget::TURN.clone(), sink).expect("poll")
                != Progress::Idle
            {}
            if sink.heads.len() == round as usize + 1 {
                return Poll::Ready(());
            }
            if link.arm(cx).expect("arm") == Armed::Busy {
                cx.waker().wake_by_ref();
            }
            Poll::Pending
        });
        tokio::time::timeout(PATIENCE, woken).await.expect("a lost wake");
    }
    assert_eq!(pair.left.counters().wakes_sent, 100);

    // Now the left sleeps for room, and the right makes it.
    let bytes = pattern(2048);
    while pair.post(0, &[segment(&bytes)]) == Post::Done {}
    let (left, right) = (&mut pair.left, &mut pair.right);
    let (at_left, at_right) = (&mut pair.at_left, &mut pair.at_right);
    let mut armed = false;
    let woken = poll_fn(|cx| {
        if left.poll(cx, false, &mut Budget::TURN.clone(), at_left).expect("poll") != Progress::Idle
        {
            return Poll::Ready(());
        }
        assert_eq!(left.arm(cx).expect("arm"), Armed::Yes);
        if !armed {
            armed = true;
            turn(right, at_right).expect("right");
        }
        Poll::Pending
    });
    tokio::time::timeout(PATIENCE, woken).await.expect("a lost wake");
    assert_eq!(pair.post(0, &[segment(&bytes)]), Post::Done);
}

#[tokio::test]
async fn kill_ends_everything_once_and_the_peer_learns() {
    let mut pair = pair_with(no_single_copy(), no_single_copy()).await;
    let bytes = pattern(8 << 20);
    let loan = block(&pair.pool, &bytes[..5000]);
    assert_eq!(pair.post(1, &[segment(&bytes)]), Post::Pending);
    pair.pump(|pair| pair.right.counters().arena_bytes_received > 0);
    pair.at_right.policy = Some(Policy::View);
    assert_eq!(pair.post(2, &[loaned(&loan)]), Post::Pending);
    pair.pump(|pair| !pair.at_right.views.is_empty());
    let error = LinkError::new(ErrorKind::Closed, LinkKind::Shm, "enough");
    pair.left.kill(&error, &mut pair.at_left);
    assert_eq!(pair.at_left.done.len(), 2);
    assert!(pair.at_left.done.values().all(Result::is_err));
    assert!(turn(&mut pair.left, &mut pair.at_left).is_err());
    assert!(loan.try_into_loan().is_ok());
    let died = loop {
        pair.right.check().expect("check");
        if let Err(error) = turn(&mut pair.right, &mut pair.at_right) {
            break error;
        }
    };
    assert_eq!(died.kind, ErrorKind::PeerGone);
    assert!(died.detail.contains(&std::process::id().to_string()), "{}", died.detail);
    pair.right.kill(&died, &mut pair.at_right);
    assert_eq!(pair.at_right.landed_done(), 1, "the half-landed one");
}

fn closed() -> LinkError {
    LinkError::new(ErrorKind::Closed, LinkKind::Shm, "enough")
}

/// What the memory of a sender looks like soon after it was let go of.
fn reuse(block: SharedBlock) {
    block.try_into_loan().expect("let go of").fill(0xee);
}

impl Pair {
    /// The right reads what there is, until its link fails; no landing may have ended well.
    fn assert_nothing_lands(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        let error = loop {
            if let Err(error) = turn(&mut self.right, &mut self.at_right) {
                break error;
            }
            assert!(self.at_right.done.values().all(Result::is_err), "bytes of freed memory");
            assert!(Instant::now() < deadline, "nothing happens");
        };
        assert_eq!(error.kind, ErrorKind::PeerGone);
        self.right.kill(&error, &mut self.at_right);
        assert_eq!(self.at_right.landed_done(), self.at_right.landed.len());
        assert!(self.at_right.done.values().all(Result::is_err));
    }
}

#[tokio::test]
async fn a_view_is_not_trusted_once_the_sender_lets_go() {
    for by_drop in [false, true] {
        let mut pair = pair().await;
        pair.at_right.policy = Some(Policy::View);
        let block = block(&pair.pool, &pattern(10_000));
        assert_eq!(pair.post(1, &[loaned(&block)]), Post::Pending);
        pair.pump(|pair| !pair.at_right.views.is_empty());
        let view = pair.at_right.views[0].1[0].clone();
        assert!(view.keep.trusted());
        if by_drop {
            drop(pair);
        } else {
            pair.left.kill(&closed(), &mut pair.at_left);
        }
        reuse(block);
        assert!(!view.keep.trusted());
    }
}

#[tokio::test]
async fn a_loan_let_go_of_while_it_is_landed_does_not_land() {
    for begun in [false, true] {
        let mut pair = pair().await;
        let block = block(&pair.pool, &pattern(5 << 20));
        assert_eq!(pair.post(1, &[loaned(&block)]), Post::Pending);
        if begun {
            turn(&mut pair.right, &mut pair.at_right).expect("right");
            assert_eq!(pair.at_right.landed.len(), 1);
        }
        pair.left.kill(&closed(), &mut pair.at_left);
        reuse(block);
        pair.assert_nothing_lands();
    }
}

#[tokio::test]
async fn a_chunk_let_go_of_before_it_is_copied_does_not_land() {
    let mut pair = pair_with(no_single_copy(), no_single_copy()).await;
    let bytes = pattern(100_000);
    assert_eq!(pair.post(1, &[segment(&bytes)]), Post::Pending);
    turn(&mut pair.right, &mut pair.at_right).expect("asks");
    turn(&mut pair.left, &mut pair.at_left).expect("stages");
    assert_eq!(pair.left.counters().arena_bytes_sent, 100_000);
    pair.left.kill(&closed(), &mut pair.at_left);
    pair.assert_nothing_lands();
}

#[tokio::test]
async fn a_held_loan_let_go_of_cannot_be_landed() {
    let mut pair = pair().await;
    pair.at_right.policy = Some(Policy::Hold);
    let block = block(&pair.pool, &pattern(5000));
    assert_eq!(pair.post(1, &[loaned(&block)]), Post::Pending);
    pair.pump(|pair| !pair.at_right.held.is_empty());
    let (payload, len) = pair.at_right.held[0];
    pair.left.kill(&closed(), &mut pair.at_left);
    reuse(block);
    let (to, op) = pair.at_right.landing(len);
    let refused = pair.right.land(payload, to, op).expect_err("freed memory");
    assert_eq!(refused.kind, ErrorKind::PeerGone);
    pair.right.kill(&refused, &mut pair.at_right);
    assert!(pair.at_right.done.is_empty(), "it was not accepted");
}

#[tokio::test]
async fn short_offers_not_in_the_ring_are_copied() {
    for options in [ShmOptions::default(), no_single_copy()] {
        let mut pair = pair_with(options.clone(), options).await;
        pair.at_right.policy = Some(Policy::Hold);
        for len in [64, 65, COPIED_MAX, COPIED_MAX + 1] {
            let mut bytes = pattern(len);
            let (front, back) = bytes.split_at(len / 2);
            let op = OpId { index: len as u32, generation: 0 };
            let payload = [segment(front), segment(&[]), segment(back)];
            let posted = pair.left.post(op, Class::Tag, How::Offer, b"", &payload).expect("post");
            assert_eq!(posted, if len <= 64 { Post::Done } else { Post::Pending });
            if len <= COPIED_MAX {
                bytes.fill(0xee);
            }
            pair.pump(|pair| !pair.at_right.held.is_empty());
            let (held, _) = pair.at_right.held.pop().expect("held");
            let (to, landing) = pair.at_right.landing(len);
            if pair.right.land(held, to, landing).expect("land") == Post::Pending {
                pair.pump(|pair| pair.at_right.done.contains_key(&landing.index));
            }
            assert!(pair.at_right.landed[&landing.index] == pattern(len), "{len}");
            pair.pump(|pair| pair.left.flushed());
        }
    }
}

/// Fills the way from the right to the left, control's backlog too.
fn block_answers(pair: &mut Pair) {
    let mut sent = 0u32;
    while pair.right.post(OpId::NONE, Class::Control, How::Eager, b"noise", &[]).is_ok() {
        sent += 1;
        assert!(sent < 1 << 20);
    }
}

#[tokio::test]
async fn a_landing_whose_end_cannot_be_told_is_reported_once() {
    let bytes = pattern(10_000);
    // In `poll`, by single copy, and by the arena.
    for options in [ShmOptions::default(), no_single_copy()] {
        let staged = !options.single_copy;
        let mut pair = pair_with(options.clone(), options).await;
        assert_eq!(pair.post(1, &[segment(&bytes)]), Post::Pending);
        if staged {
            turn(&mut pair.right, &mut pair.at_right).expect("asks");
            turn(&mut pair.left, &mut pair.at_left).expect("stages");
        }
        block_answers(&mut pair);
        let error = turn(&mut pair.right, &mut pair.at_right).expect_err("no room for the end");
        assert_eq!(error.kind, ErrorKind::LimitExceeded);
        pair.right.kill(&error, &mut pair.at_right);
        assert_eq!(pair.at_right.landed_done(), 1);
    }
    // In `land`, which says so itself.
    let mut pair = pair().await;
    pair.at_right.policy = Some(Policy::Hold);
    assert_eq!(pair.post(1, &[segment(&bytes)]), Post::Pending);
    pair.pump(|pair| !pair.at_right.held.is_empty());
    block_answers(&mut pair);
    let (to, op) = pair.at_right.landing(bytes.len());
    let error = pair.right.land(pair.at_right.held[0].0, to, op).expect_err("no room for the end");
    pair.right.kill(&error, &mut pair.at_right);
    assert!(pair.at_right.done.is_empty());
}

#[tokio::test]
async fn a_landing_that_does_not_fit_is_reported_once() {
    for len in [100, 10_000] {
        let mut pair = pair().await;
        pair.at_right.policy = Some(Policy::Short);
        let bytes = pattern(len);
        assert_ne!(pair.post(1, &[segment(&bytes)]), Post::Full);
        let error = turn(&mut pair.right, &mut pair.at_right).expect_err("does not fit");
        assert_eq!(error.kind, ErrorKind::InvalidInput);
        pair.right.kill(&error, &mut pair.at_right);
        assert_eq!(pair.at_right.landed_done(), 1);
    }
}

#[tokio::test]
async fn what_was_sent_before_the_end_is_read_before_the_end() {
    let mut pair = pair().await;
    for at in 0..5 {
        assert_eq!(pair.post(at, &[segment(b"last words")]), Post::Done);
    }
    let Pair { left, mut right, mut at_right, .. } = pair;
    drop(left);
    let died = tokio::time::timeout(
        PATIENCE,
        poll_fn(|cx| {
            loop {
                match right.poll(cx, false, &mut Budget::TURN.clone(), &mut at_right) {
                    Err(error) => return Poll::Ready(error),
                    Ok(Progress::Idle) => {}
                    Ok(_) => continue,
                }
                match right.arm(cx) {
                    Err(error) => return Poll::Ready(error),
                    Ok(Armed::Yes) => return Poll::Pending,
                    Ok(Armed::Busy) => {}
                }
            }
        }),
    )
    .await
    .expect("notices");
    assert_eq!(at_right.heads.len(), 5);
    assert_eq!(died.kind, ErrorKind::PeerGone);
}

#[tokio::test]
async fn small_parcels_do_not_allocate_or_wake_a_spinning_peer() {
    let mut pair = pair().await;
    pair.at_right.policy = Some(Policy::Discard);
    for at in 0..10_000 {
        assert_eq!(pair.post(at, &[segment(b"8 bytes.")]), Post::Done);
        spin(&mut pair.right, &mut pair.at_right).expect("right");
    }
    let begun = Instant::now();
    while pair.at_right.heads.len() < 10_000 {
        spin(&mut pair.right, &mut pair.at_right).expect("right");
        assert!(begun.elapsed() < PATIENCE, "a look is spared for good");
    }
    assert_eq!(pair.left.counters().wakes_sent, 0);
}

mod hostile {
    use std::os::fd::AsFd;

    use super::super::wire::{ARENA, Kind, flags};
    use super::*;

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    /// Reads until the link dies, at most a few turns.
    fn fate(pair: &mut Pair) -> Result<(), LinkError> {
        for _ in 0..10 {
            turn(&mut pair.right, &mut pair.at_right)?;
        }
        Ok(())
    }

    async fn assert_refused(what: &str, forge: impl FnOnce(&mut Pair)) {
        let mut pair = pair().await;
        forge(&mut pair);
        let error = fate(&mut pair).expect_err(what);
        assert_eq!(error.kind, ErrorKind::Protocol, "{what}: {error:?}");
        pair.right.kill(&error, &mut pair.at_right);
        let started = pair.at_right.landed.len();
        assert_eq!(pair.at_right.landed_done(), started, "{what}: every landing ended");
    }

    #[tokio::test]
    async fn malformed_records_end_the_link() {
        let max = ShmOptions::default().max_payload;
        let record =
            |kind, head_len, numbers: &[u64]| (flags(kind, How::Eager, head_len), words(numbers));
        let cases = [
            ("an unknown kind", (9, vec![])),
            ("a head longer than its record", record(Kind::Inline, 9, &[1])),
            ("a head over the limit", record(Kind::Inline, 1032, &[0; 140])),
            ("an inline payload over the limit", record(Kind::Inline, 0, &[0; 300])),
            ("an offer that is inline", (flags(Kind::Inline, How::Offer, 0), vec![0; 65])),
            ("no fixed fields", record(Kind::Pull, 0, &[1, 2])),
            ("an empty payload", record(Kind::Push, 0, &[1, 0, 0])),
            ("a payload over the limit", record(Kind::Push, 0, &[1, max + 1, 0])),
            ("a head that is short", record(Kind::Push, 9, &[1, 5, 0, 7])),
            ("a head that is long", record(Kind::Push, 7, &[1, 5, 0, 7])),
            ("a loan in an unknown segment", record(Kind::Loan, 0, &[1, 5, 1, 3, 0, 5])),
            ("a segment over 32 bits", record(Kind::Loan, 0, &[1, 5, 1, 1 << 40, 0, 5])),
            ("an absurd segment", record(Kind::Loan, 0, &[1, 5, 1, 0xffff, 0, 5])),
            ("loans missing", record(Kind::Loan, 0, &[1, 5, 1])),
            ("too many loans", record(Kind::Loan, 0, &[1, 5, 65])),
            ("pieces missing", record(Kind::Pull, 0, &[1, 5, 2, 4096, 5])),
            ("pieces that sum up wrong", record(Kind::Pull, 0, &[1, 5, 1, 4096, 4])),
            ("pieces that overflow", record(Kind::Pull, 0, &[1, 5, 2, 0, 6, 0, u64::MAX])),
            ("too many pieces", record(Kind::Pull, 0, &[1, 5, 101])),
            ("an address of nothing", record(Kind::Pull, 0, &[1, 5, 1, 8, 5])),
            ("an address over the top", record(Kind::Pull, 0, &[1, 5, 1, u64::MAX - 2, 5])),
            ("a list of nothing", record(Kind::PullList, 0, &[1, 5, 101, 8, 1616])),
            ("a list too long", record(Kind::PullList, 0, &[1, 5, 1 << 40, 8, 16])),
            ("an unknown end", record(Kind::Finished, 0, &[7, 0, 0])),
            ("an unknown ask", record(Kind::Ask, 0, &[7, 0, 0])),
            ("a chunk without a place", record(Kind::Chunk, 0, &[7, 5, 1])),
            ("a chunk outside the arena", record(Kind::Chunk, 0, &[7, 5, 1, 0, 0, 5])),
            ("an unknown chunk", record(Kind::Chunk, 0, &[7, 5, 1, ARENA.into(), 0, 5])),
            ("a chunk taken that was none", record(Kind::Taken, 0, &[0, 0, 0])),
        ];
        for (what, (flags, bytes)) in cases {
            assert_refused(what, |pair| {
                // Held, nothing is read from any address: the record itself must be refused.
                if !what.contains("nothing") && !what.contains("top") {
                    pair.at_right.policy = Some(Policy::Hold);
                }
                pair.left.forge(flags, &bytes);
            })
            .await;
        }
    }

    #[tokio::test]
    async fn loans_outside_their_segment_end_the_link() {
        for (offset, len, total) in
            [(0, (4 << 20) + 1, (4 << 20) + 1), (u64::MAX, 5, 5), (4 << 20, 1, 1), (0, 5, 6)]
        {
            assert_refused("a loan out of bounds", |pair| {
                let block = block(&pair.pool, b"segment");
                pair.left.passed(&block, false);
                let numbers = [1, total, 1, block.segment().into(), offset, len];
                pair.left.forge(flags(Kind::Loan, How::Eager, 0), &words(&numbers));
            })
            .await;
        }
    }

    #[tokio::test]
    async fn chunks_that_do_not_fit_end_the_link() {
        for len in [0, 6] {
            assert_refused("a chunk of the wrong length", |pair| {
                let block = block(&pair.pool, &[1; 100]);
                pair.left.passed(&block, true);
                pair.left.forge(flags(Kind::Push, How::Eager, 0), &words(&[3, 5, 0]));
                // The first payload of a fresh link has key 0.
                let place = u64::from(block.segment() | ARENA);
                let numbers = [0, len, 1, place, block.offset(), len];
                pair.left.forge(flags(Kind::Chunk, How::Eager, 0), &words(&numbers));
                turn(&mut pair.right, &mut pair.at_right).ok();
                pair.left.forge(flags(Kind::Chunk, How::Eager, 0), &words(&numbers));
            })
            .await;
        }
    }

    #[tokio::test]
    async fn answers_that_cannot_be_end_the_link() {
        let bytes = pattern(10_000);
        let ask = |id, from| (flags(Kind::Ask, How::Eager, 0), words(&[id, from, 0]));
        let end = |id| (flags(Kind::Finished, How::Eager, 0), words(&[id, 0, 0]));
        for answers in [
            vec![ask(0, 10_000)],
            vec![ask(0, u64::MAX)],
            vec![ask(0, 0), ask(0, 0)],
            vec![ask(0, 0), end(0)],
            vec![end(0), end(0)],
            vec![end(1 << 32)],
        ] {
            let mut pair = pair().await;
            let op = OpId { index: 1, generation: 0 };
            let message = Class::Message;
            let posted = pair.right.post(op, message, How::Eager, b"", &[segment(&bytes)]);
            assert_eq!(posted.expect("post"), Post::Pending);
            for (flags, bytes) in answers {
                pair.left.forge(flags, &bytes);
            }
            let error = fate(&mut pair).expect_err("refused");
            assert_eq!(error.kind, ErrorKind::Protocol);
            pair.right.kill(&error, &mut pair.at_right);
            assert_eq!(pair.at_right.done.len(), 1);
        }
    }

    #[tokio::test]
    async fn a_list_that_sums_up_wrong_ends_the_link() {
        let list = words(&[4096; 404]);
        assert_refused("a list", |pair| {
            let numbers = [1, 5, 202, list.as_ptr().expose_provenance() as u64, 3232];
            pair.left.forge(flags(Kind::PullList, How::Eager, 0), &words(&numbers));
        })
        .await;
    }

    #[tokio::test]
    async fn a_flood_of_open_payloads_ends_the_link() {
        let mut pair = pair().await;
        pair.at_right.policy = Some(Policy::Hold);
        let record = words(&[1, 5, 0]);
        let died = (0..10_000).find_map(|_| {
            pair.left.forge(flags(Kind::Push, How::Offer, 0), &record);
            turn(&mut pair.right, &mut pair.at_right).err()
        });
        assert_eq!(died.expect("a limit").kind, ErrorKind::Protocol);
        assert_eq!(pair.at_right.held.len(), 5 * 1024);
    }

    #[tokio::test]
    async fn bad_packets_end_the_link() {
        let null = std::fs::File::open("/dev/null").expect("null");
        let pool = SharedPool::new(4 << 20);
        let good = block(&pool, b"x");
        let number = 0u32.to_ne_bytes();
        let cases: [(&[u8], usize, std::os::fd::BorrowedFd<'_>); 6] = [
            (BELL, 1, null.as_fd()),
            (b"hello", 1, null.as_fd()),
            (&number, 0, null.as_fd()),
            (&number, 1, null.as_fd()),
            (&[64, 0, 0, 0], 1, good.segment_fd()),
            (&number, 2, good.segment_fd()),
        ];
        for (bytes, times, fd) in cases {
            let mut pair = pair().await;
            match times {
                0 => pair.left.forge_packet(bytes, &[]),
                times => (0..times).for_each(|_| pair.left.forge_packet(bytes, &[fd])),
            }
            let mut cx = Context::from_waker(Waker::noop());
            let refused = poll_fn(|_| match pair.right.arm(&mut cx) {
                Err(error) => Poll::Ready(error),
                Ok(_) => Poll::Pending,
            });
            let error = tokio::time::timeout(PATIENCE, refused).await.expect("refused");
            assert_eq!(error.kind, ErrorKind::Protocol);
        }
    }

    #[tokio::test]
    async fn random_records_never_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let (mut died, mut survived) = (0, 0);
        for _ in 0..300 {
            let mut pair = pair().await;
            let block = block(&pair.pool, &[7; 5000]);
            pair.left.passed(&block, random() % 2 == 0);
            pair.at_right.policy =
                Some([Policy::Land, Policy::Hold, Policy::View][random() as usize % 3]);
            let mut dead = None;
            for _ in 0..20 {
                let small = |value: u64| if value.is_multiple_of(4) { value } else { value % 9 };
                let numbers: Vec<u64> = (0..random() % 12)
                    .map(|at| if at == 1 { random() % 9000 } else { small(random()) })
                    .collect();
                pair.left.forge(random() as u32 % (1 << 9), &words(&numbers));
                dead = turn(&mut pair.right, &mut pair.at_right).err();
                if dead.is_some() {
                    break;
                }
            }
            match dead {
                Some(error) => {
                    died += 1;
                    pair.right.kill(&error, &mut pair.at_right);
                    assert_eq!(pair.at_right.landed_done(), pair.at_right.landed.len());
                }
                None => survived += 1,
            }
        }
        assert!(died > 100, "{died} died, {survived} survived");
    }
}

mod set_up {
    use std::os::fd::AsFd;

    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

    use super::super::socket;
    use super::*;

    fn quick() -> ShmOptions {
        ShmOptions { handshake_timeout: Duration::from_millis(300), ..ShmOptions::default() }
    }

    fn stranger(engine: &ShmEngine) -> std::os::fd::OwnedFd {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("socket");
        let name = engine.own().name.clone();
        let address = SocketAddrUnix::new_abstract_name(&name).expect("name");
        rustix::net::connect(&socket, &address).expect("connect");
        socket
    }

    #[tokio::test]
    async fn strangers_and_liars_are_turned_away() {
        let (engine, _pool, timers) = engine(quick());
        let task = attend(engine.clone(), timers);
        let token = [3; 16];
        let mut hello = b"thalwegM".to_vec();
        hello.extend(token);
        hello.extend([0; 9]);
        let pool = SharedPool::new(1 << 20);
        let (own, page) = crate::memory::OwnMapping::create(c"page", 20 << 10).expect("memory");
        let (_small, short) = crate::memory::OwnMapping::create(c"page", 4096).expect("memory");
        let huge = block(&pool, b"x");
        let null = std::fs::File::open("/dev/null").expect("null");
        let cases: [(&str, Vec<std::os::fd::BorrowedFd<'_>>); 4] = [
            ("without its ring", vec![]),
            ("the peer's ring", vec![null.as_fd()]),
            ("is short", vec![short.as_fd()]),
            ("expected", vec![huge.segment_fd()]),
        ];
        for (expected, fds) in cases {
            let liar = stranger(&engine);
            socket::send(liar.as_fd(), &hello, &fds).expect("sent");
            let blob = engine.blob();
            let refused = engine.accept(&blob, token).await.err().expect("refused");
            assert!(refused.reason.contains(expected), "{refused}, expected {expected}");
        }
        // Does not prove anything; then says nothing at all.
        let liar = stranger(&engine);
        socket::send(liar.as_fd(), &hello, &[page.as_fd()]).expect("sent");
        socket::send(liar.as_fd(), &[b'P'; 37], &[]).expect("sent");
        let refused = engine.accept(&engine.blob(), token).await.err().expect("refused");
        assert!(refused.reason.contains("does not see"), "{refused}");
        let silent = stranger(&engine);
        socket::send(silent.as_fd(), &hello, &[page.as_fd()]).expect("sent");
        let refused = engine.accept(&engine.blob(), token).await.err().expect("refused");
        assert!(refused.reason.contains("silent"), "{refused}");
        // Rubbish, and nobody.
        let rubbish = stranger(&engine);
        socket::send(rubbish.as_fd(), b"GET / HTTP/1.1", &[]).expect("sent");
        let refused = engine.accept(&engine.blob(), token).await.err().expect("refused");
        assert!(refused.reason.contains("did not connect"), "{refused}");
        assert!(engine.connect(b"rubbish", token).await.is_err());
        task.abort();
        drop(own);
    }

    #[tokio::test]
    async fn many_links_at_once_come_up_whoever_is_first() {
        let (left, _, left_timers) = engine(ShmOptions::default());
        let (right, _, right_timers) = engine(ShmOptions::default());
        let tasks = [attend(left.clone(), left_timers), attend(right.clone(), right_timers)];
        let mut links = Vec::new();
        for at in 0..100u8 {
            let (left, right) = (left.clone(), right.clone());
            links.push(tokio::spawn(async move {
                let (left_blob, right_blob) = (left.blob(), right.blob());
                let made = left.connect(&right_blob, [at; 16]);
                let taken = async {
                    if at % 2 == 0 {
                        tokio::task::yield_now().await;
                    }
                    right.accept(&left_blob, [at; 16]).await
                };
                let (made, taken) = tokio::join!(made, taken);
                (made.expect("connect"), taken.expect("accept"))
            }));
        }
        for link in links {
            link.await.expect("both");
        }
        tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

/// Waking a peer that sleeps, over a socket that it need not read.
mod bell {
    use std::os::fd::AsFd;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc;
    use std::task::Wake;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::super::link::SocketBell;
    use super::super::ring::Bell;
    use super::super::socket;
    use super::*;
    use crate::runtime::{Fd, HostLoop, Interest};

    #[derive(Default)]
    struct Count(AtomicU32);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Runs `what` in a thread of its own and gives back what it gives; panics if that takes long.
    fn in_time<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || tell.send(what()));
        told.recv_timeout(PATIENCE).expect("a call blocks")
    }

    /// Each round: the right announces a sleep and does not look at its socket, the left posts.
    fn ring_unheard(pair: &mut Pair, rounds: u32) {
        for _ in 0..rounds {
            pair.right.doze();
            assert_eq!(pair.post(0, &[segment(b"8 bytes.")]), Post::Done);
            turn(&mut pair.right, &mut pair.at_right).expect("right");
        }
    }

    /// Arms as often as it takes: how often it was.
    async fn asleep(link: &mut ShmLink) -> u32 {
        let mut tries = 0;
        let armed = poll_fn(|cx| {
            tries += 1;
            if link.arm(cx).expect("arm") == Armed::Yes {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        });
        tokio::time::timeout(PATIENCE, armed).await.expect("it falls asleep");
        tries
    }

    /// Waits for one more parcel than there are, asleep meanwhile.
    async fn woken_by_a_parcel(pair: &mut Pair) {
        asleep(&mut pair.right).await;
        let heads = pair.at_right.heads.len();
        let rung = pair.left.counters().wakes_sent;
        assert_eq!(pair.post(0, &[segment(b"8 bytes.")]), Post::Done);
        assert_eq!(pair.left.counters().wakes_sent, rung + 1);
        let (link, sink) = (&mut pair.right, &mut pair.at_right);
        let mut first = true;
        let woken = poll_fn(|cx| {
            // Only what the socket tells counts: the first look is no wake.
            if std::mem::take(&mut first) {
                match link.socket().poll_readable(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(told) => told.expect("up"),
                }
            }
            link.poll(cx, false, &mut Budget::TURN.clone(), sink).expect("poll");
            Poll::Ready(())
        });
        tokio::time::timeout(PATIENCE, woken).await.expect("a lost wake");
        assert_eq!(sink.heads.len(), heads + 1);
    }

    #[tokio::test]
    async fn rung_unheard_a_hundred_thousand_times_it_loses_no_wake() {
        let mut pair = pair().await;
        pair.at_right.policy = Some(Policy::Discard);
        let mut pair = in_time(move || {
            ring_unheard(&mut pair, 100_000);
            pair
        });
        assert_eq!(pair.at_right.heads.len(), 100_000);
        assert_eq!(pair.left.counters().wakes_sent, 100_000);
        let tries = asleep(&mut pair.right).await;
        assert!((2..1000).contains(&tries), "{tries} turns to hear what a socket holds");
        for _ in 0..10 {
            woken_by_a_parcel(&mut pair).await;
        }
        // Nor does a segment get lost behind bells that nobody has heard.
        (0..100).for_each(|_| pair.left.forge_packet(BELL, &[]));
        pair.at_right.policy = Some(Policy::Land);
        let bytes = pattern(9000);
        let loan = block(&pair.pool, &bytes);
        pair.transfer(&bytes, &[loaned(&loan)]);
        assert_eq!(pair.left.counters().loaned_bytes_sent, 9000);
    }

    #[tokio::test]
    async fn a_peer_that_lets_its_socket_fill_blocks_nobody() {
        let mut pair = pair().await;
        pair.at_right.policy = Some(Policy::Discard);
        // Of the flags of its own end it is master; that the calls do not depend on either's is
        // shown by changing both.
        pair.left.let_socket_block();
        pair.right.let_socket_block();
        let mut pair = in_time(move || {
            ring_unheard(&mut pair, 2000);
            // A loan needs a segment passed, for which there is no room: it is read or staged.
            pair.right.doze();
            pair
        });
        let bytes = pattern(9000);
        let loan = block(&pair.pool, &bytes);
        assert_eq!(pair.post(1, &[loaned(&loan)]), Post::Pending);
        assert_eq!(pair.left.counters().loaned_bytes_sent, 0);
        let closed = LinkError::new(ErrorKind::Closed, LinkKind::Shm, "enough");
        in_time(move || {
            // The sleeper, too, reads until there is nothing and does not wait for more.
            let mut cx = Context::from_waker(Waker::noop());
            while pair.right.arm(&mut cx).is_ok_and(|armed| armed == Armed::Busy)
                && turn(&mut pair.right, &mut pair.at_right).is_ok()
            {}
            pair.left.kill(&closed, &mut pair.at_left);
        });
    }

    #[tokio::test]
    async fn many_bells_are_heard_a_few_at_a_time() {
        let Pair { left, mut right, .. } = pair().await;
        for _ in 0..20 {
            socket::send(left.socket().fd(), BELL, &[]).expect("sent");
        }
        let readable = poll_fn(|cx| right.socket().poll_readable(cx));
        tokio::time::timeout(PATIENCE, readable).await.expect("an edge").expect("up");
        assert_eq!(asleep(&mut right).await, 3);
    }

    #[tokio::test]
    async fn looking_whether_the_peer_lives_takes_no_wake_away() {
        let mut pair = pair().await;
        pair.at_right.policy = Some(Policy::Discard);
        let count = Arc::new(Count::default());
        let waker = Waker::from(count.clone());
        let mut cx = Context::from_waker(&waker);
        for round in 1..=20 {
            let deadline = Instant::now() + PATIENCE;
            while pair.right.arm(&mut cx).expect("arm") == Armed::Busy {
                assert!(Instant::now() < deadline, "no sleep");
            }
            let before = count.0.load(Ordering::SeqCst);
            assert_eq!(pair.post(round, &[segment(b"8 bytes.")]), Post::Done);
            pair.right.check().expect("alive");
            while count.0.load(Ordering::SeqCst) == before {
                assert!(Instant::now() < deadline, "a lost wake");
                tokio::task::yield_now().await;
            }
            turn(&mut pair.right, &mut pair.at_right).expect("right");
            assert_eq!(pair.at_right.heads.len(), round as usize);
        }
    }

    #[test]
    fn what_a_peer_sent_is_read_although_it_left_bells_unread() {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (here, there) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .expect("a pair of sockets");
        socket::send(here.as_fd(), BELL, &[]).expect("sent");
        for word in [b"last", b"word"] {
            socket::send(there.as_fd(), word, &[]).expect("sent");
        }
        drop(there);
        let read = || socket::receive(here.as_fd()).expect("no error");
        assert_eq!(read().expect("a packet").bytes(), b"last");
        assert_eq!(read().expect("a packet").bytes(), b"word");
        assert!(read().is_none() && read().is_none());
    }

    #[tokio::test]
    async fn a_bell_that_cannot_be_rung_is_no_secret() {
        let reactor = Reactor::Host(HostLoop::new().expect("an event loop"));
        let bell = |fd| SocketBell::new(reactor.source(Fd::new(fd), Interest::Read).expect("up"));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (here, there) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .expect("a pair of sockets");
        let mut gone = bell(here);
        drop(there);
        gone.ring();
        assert!(gone.failure().is_none(), "the socket tells of its end anyway");
        let file = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("file");
        let mut broken = bell(file);
        broken.ring();
        assert!(broken.failure().is_some());
    }
}

/// A real second process, which dies.
mod process {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Child, Command, Stdio};

    use super::*;

    const ROLE: &str = "THALWEG_TEST_SHM_PEER";
    const TOKEN: [u8; 16] = [5; 16];

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn unhex(text: &str) -> Vec<u8> {
        let byte = |at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex");
        (0..text.len()).step_by(2).map(byte).collect()
    }

    /// The child: accepts a link, lands whatever comes, and never answers what it holds.
    #[tokio::test]
    async fn peer() {
        let Ok(parent) = std::env::var(ROLE) else {
            return;
        };
        let (engine, _pool, timers) = engine(ShmOptions::default());
        let task = attend(engine.clone(), timers);
        println!("\nblob {}", hex(&engine.blob()));
        std::io::stdout().flush().expect("stdout");
        let mut link = engine.accept(&unhex(&parent), TOKEN).await.expect("accept");
        task.abort();
        let mut sink = Recorder::with(Policy::Land);
        loop {
            if spin(&mut link, &mut sink).is_err() {
                return;
            }
            if sink.heads.last().is_some_and(|head| head == b"hold") {
                sink.policy = Some(Policy::Hold);
            }
            std::thread::yield_now();
        }
    }

    async fn spawn() -> (Child, ShmLink, Recorder) {
        let (engine, _pool, timers) = engine(ShmOptions::default());
        let task = attend(engine.clone(), timers);
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "link::shm::tests::process::peer", "--nocapture"])
            .env(ROLE, hex(&engine.blob()))
            .stdout(Stdio::piped())
            .spawn()
            .expect("a child");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let blob = output
            .lines()
            .map_while(Result::ok)
            .find_map(|line| line.strip_prefix("blob ").map(unhex))
            .expect("the child's blob");
        let link = engine.connect(&blob, TOKEN).await.expect("connect");
        task.abort();
        (child, link, Recorder::with(Policy::Discard))
    }

    #[tokio::test]
    async fn a_killed_peer_is_noticed_at_once() {
        let (mut child, mut link, mut sink) = spawn().await;
        let bytes = pattern(8 << 20);
        let op = |index| OpId { index, generation: 0 };
        let message = Class::Message;
        let posted = link.post(op(1), message, How::Eager, b"", &[segment(&bytes)]);
        assert_eq!(posted.expect("post"), Post::Pending);
        let deadline = Instant::now() + PATIENCE;
        while !sink.done.contains_key(&1) {
            turn(&mut link, &mut sink).expect("alive");
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        link.post(OpId::NONE, message, How::Eager, b"hold", &[]).expect("post");
        let posted = link.post(op(2), message, How::Offer, b"", &[segment(&bytes)]);
        assert_eq!(posted.expect("post"), Post::Pending);
        let mut killed = None;
        let died = poll_fn(|cx| {
            loop {
                match link.poll(cx, false, &mut Budget::TURN.clone(), &mut sink) {
                    Err(error) => return Poll::Ready(error),
                    Ok(Progress::Idle) => {}
                    Ok(_) => continue,
                }
                match link.arm(cx) {
                    Err(error) => return Poll::Ready(error),
                    Ok(Armed::Yes) => break,
                    Ok(Armed::Busy) => {}
                }
            }
            if killed.is_none() {
                killed = Some(Instant::now());
                child.kill().expect("kill");
            }
            Poll::Pending
        });
        let error = tokio::time::timeout(PATIENCE, died).await.expect("notices");
        let took = killed.expect("killed").elapsed();
        assert!(took < Duration::from_millis(100), "{took:?}");
        assert_eq!(error.kind, ErrorKind::PeerGone);
        assert!(error.detail.contains(&child.id().to_string()), "{}", error.detail);
        link.kill(&error, &mut sink);
        assert!(sink.done[&2].is_err());
        child.wait().expect("reaped");
    }
}
