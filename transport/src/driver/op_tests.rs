//! What an operation that spins says of itself between its polls, and that nothing waits for it.
//!
//! Each runs on one thread, so that nobody else does anything between two polls made by hand.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use super::board::Pulse;
use super::endpoint::EndpointShared;
use super::spin::SPINS_PER_LOOK_AT_CLOCK;
use crate::config::Wake as Waiting;
use crate::link::LinkKind;
use crate::{Access, Config, Endpoint, Node, RemoteKey};

const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

struct Pair {
    a: Endpoint,
    b: Endpoint,
    /// Of `b`.
    pulse: Arc<Pulse>,
    shared: Arc<EndpointShared>,
    node_b: Node,
    _node_a: Node,
}

/// Two ends that have talked already. `b` spins.
async fn pair(link: LinkKind) -> Pair {
    let config = || Config::new().transports([link]);
    let node_a = Node::new(config()).expect("a node");
    let spinning = config().wake(Waiting::Spin).spin_limit(PATIENCE);
    let node_b = Node::new(spinning).expect("a node");
    let listener = node_b.listen("thalweg://127.0.0.1:0").await.expect("listening");
    let (a, b) = tokio::join!(node_a.connect(listener.address()), listener.accept());
    let (a, b) = (a.expect("connecting"), b.expect("accepting"));
    let (sent, got) = tokio::join!(a.send(vec![1u8; 8]), b.recv());
    sent.expect("sending");
    got.expect("receiving");
    let shared = node_b.shared().all_endpoints().first().expect("one").clone();
    Pair { a, b, pulse: shared.pulse.clone(), shared, node_b, _node_a: node_a }
}

/// Runs it over each link that is always there, on one thread.
fn over_links<F: Future<Output = ()>>(test: impl Fn(LinkKind) -> F) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    for link in [LinkKind::Tcp, LinkKind::Shm] {
        runtime.block_on(async {
            let ended = tokio::time::timeout(PATIENCE, test(link)).await;
            ended.unwrap_or_else(|_| panic!("over {link}: something was not woken"));
        });
    }
}

/// Polls by hand, for a task that may have other things to do.
fn poll<F: Future + Unpin>(future: &mut F, task: &Arc<Count>) -> Poll<F::Output> {
    let waker = Waker::from(task.clone());
    Pin::new(future).poll(&mut Context::from_waker(&waker))
}

/// Until the endpoint is at rest: armed, on no list.
async fn rest(pulse: &Pulse) {
    while pulse.is_watched() || pulse.is_queued() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Whether the target serves `a`, with nobody polling.
async fn is_served(pair: &Pair) {
    let region = pair.node_b.register(vec![0u8; 8], Access::ReadWrite).expect("a region");
    let key = RemoteKey::from_bytes(&region.key().to_bytes()).expect("a key");
    pair.a.put(vec![5u8; 8], &key, 0).await.expect("putting");
    let mut here = [0; 8];
    region.read(0, &mut here).expect("within");
    assert_eq!(here, [5; 8]);
}

#[test]
fn a_beat_between_two_polls_of_a_spinning_operation_is_its_own() {
    over_links(|link| async move {
        let pair = pair(link).await;
        rest(&pair.pulse).await;
        let (task, mut receive) = (Arc::<Count>::default(), pair.b.recv());
        assert!(poll(&mut receive, &task).is_pending());
        assert_eq!(task.0.load(Ordering::SeqCst), 1, "it is polled again at once");
        assert!(pair.pulse.is_polled_soon() && pair.pulse.is_watched());
        pair.pulse.wake_by_ref();
        assert!(!pair.pulse.is_queued());
        assert!(poll(&mut receive, &task).is_pending());
        assert_eq!(task.0.load(Ordering::SeqCst), 2);
        pair.pulse.wake_by_ref();
        assert!(!pair.pulse.is_queued());
    });
}

#[test]
fn when_it_is_over_beats_are_for_the_resident_task() {
    over_links(|link| async move {
        let pair = pair(link).await;
        let (task, mut receive) = (Arc::<Count>::default(), pair.b.recv());
        assert!(poll(&mut receive, &task).is_pending());
        pair.a.send(vec![2u8; 8]).await.expect("sending");
        while poll(&mut receive, &task).is_pending() {}
        assert!(!pair.pulse.is_polled_soon());
        pair.pulse.wake_by_ref();
        assert!(pair.pulse.is_queued());
    });
}

#[test]
fn one_that_is_dropped_leaves_the_endpoint_to_the_resident_task() {
    over_links(|link| async move {
        let pair = pair(link).await;
        rest(&pair.pulse).await;
        let (task, mut receive) = (Arc::<Count>::default(), pair.b.recv());
        assert!(poll(&mut receive, &task).is_pending());
        drop(receive);
        assert!(pair.pulse.is_queued() && !pair.pulse.is_polled_soon());
        is_served(&pair).await;
        rest(&pair.pulse).await;
        is_served(&pair).await;
        // Its waker was called when it yielded, and is not held any more.
        assert_eq!(Arc::strong_count(&task), 1);
    });
}

#[test]
fn one_that_is_never_polled_again_holds_up_nothing() {
    over_links(|link| async move {
        let pair = pair(link).await;
        rest(&pair.pulse).await;
        let (task, mut receive) = (Arc::<Count>::default(), pair.b.recv());
        assert!(poll(&mut receive, &task).is_pending());
        // Once while the watch has not looked, once when it has taken over.
        is_served(&pair).await;
        rest(&pair.pulse).await;
        assert!(!pair.pulse.is_polled_soon());
        is_served(&pair).await;
        // What is for it is still for it.
        pair.a.send(vec![3u8; 8]).await.expect("sending");
        while task.0.load(Ordering::SeqCst) < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let Poll::Ready(got) = poll(&mut receive, &task) else { panic!("woken for nothing") };
        assert_eq!(got.expect("receiving").len_bytes(), 8);
    });
}

#[test]
fn one_that_is_moved_to_another_task_is_woken_there() {
    over_links(|link| async move {
        let pair = pair(link).await;
        rest(&pair.pulse).await;
        let tasks = [(); 2].map(|()| Arc::<Count>::default());
        let mut receive = pair.b.recv();
        for task in &tasks {
            assert!(poll(&mut receive, task).is_pending());
            assert_eq!(task.0.load(Ordering::SeqCst), 1);
        }
        assert_eq!(Arc::strong_count(&tasks[0]), 1, "the first waker is still held");
        pair.a.send(vec![4u8; 8]).await.expect("sending");
        while tasks[1].0.load(Ordering::SeqCst) < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(tasks[0].0.load(Ordering::SeqCst), 1);
        assert!(poll(&mut receive, &tasks[1]).is_ready());
    });
}

/// How often a poll looks at the lanes.
fn looks<F: Future + Unpin>(pair: &Pair, future: &mut F) -> u64 {
    let before = pair.shared.core().state.activity;
    assert!(poll(future, &Arc::default()).is_pending());
    pair.shared.core().state.activity - before
}

#[test]
fn of_several_that_spin_each_soon_lets_the_others_run() {
    over_links(|link| async move {
        let pair = pair(link).await;
        let (mut one, mut other) = (pair.b.recv(), pair.b.recv());
        assert!(looks(&pair, &mut one) >= SPINS_PER_LOOK_AT_CLOCK.into());
        for _ in 0..10 {
            assert_eq!(looks(&pair, &mut other), SPINS_PER_LOOK_AT_CLOCK.into());
            assert_eq!(looks(&pair, &mut one), SPINS_PER_LOOK_AT_CLOCK.into());
        }
    });
}

#[test]
fn one_that_spins_gives_way_to_whoever_wants_the_lock() {
    over_links(|link| async move {
        let pair = pair(link).await;
        let (done, shared) = (Arc::new(AtomicUsize::new(0)), pair.shared.clone());
        let contender = {
            let done = done.clone();
            std::thread::spawn(move || {
                while done.load(Ordering::SeqCst) == 0 {
                    drop(shared.core_or_queue(Waker::noop()));
                }
            })
        };
        let (until, mut receive) = (Instant::now() + PATIENCE, pair.b.recv());
        let mut least = u64::MAX;
        while least >= SPINS_PER_LOOK_AT_CLOCK.into() && Instant::now() < until {
            // One that finds the lock taken does not look at all.
            least = Some(looks(&pair, &mut receive)).filter(|looks| *looks > 0).unwrap_or(least);
        }
        done.store(1, Ordering::SeqCst);
        contender.join().expect("no panic");
        assert!(least < SPINS_PER_LOOK_AT_CLOCK.into(), "it looked {least} times or more");
    });
}

/// Where no other test spins meanwhile, this one fails if it does not.
#[test]
fn one_that_spins_lets_those_run_whom_it_has_woken() {
    over_links(|link| async move {
        let pair = pair(link).await;
        for _ in 0..100 {
            let (task, any) = (Arc::<Count>::default(), pair.node_b.recv_any());
            let mut any = Box::pin(any);
            assert!(poll(&mut any, &task).is_pending());
            let mut tag = pair.b.tag_recv(1, u64::MAX, vec![0u8; 8]);
            pair.a.send(vec![2u8; 8]).await.expect("sending");
            while task.0.load(Ordering::SeqCst) == 0 {
                let looks = looks(&pair, &mut tag);
                let has_woken = task.0.load(Ordering::SeqCst) > 0;
                assert!(!has_woken || looks < SPINS_PER_LOOK_AT_CLOCK.into(), "{looks} looks");
            }
            let Poll::Ready(got) = poll(&mut any, &task) else { panic!("woken for nothing") };
            assert_eq!(got.expect("receiving").1.len_bytes(), 8);
        }
    });
}
