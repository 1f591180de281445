//! Endpoints with a lane that cannot let go of everything at once, and that says how often it was
//! asked whether the peer has fallen silent.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Context, Waker};
use std::time::Duration;

use crate::error::LinkError;
use crate::link::{
    Armed, Budget, Caps, Check, Class, How, Killed, Landing, Link, LinkCounters, LinkKind, OpId,
    PayloadId, Post, Progress, Segment, Sink,
};
use crate::{CloseReason, Config, Endpoint, ErrorKind, Node, Wake};

const PATIENCE: Duration = Duration::from_secs(20);

/// A lane that does nothing, and whose end takes until it is told.
struct Slow {
    caps: Caps,
    until: Killed,
    over: Arc<AtomicBool>,
    checks: Arc<AtomicU32>,
}

impl Link for Slow {
    fn kind(&self) -> LinkKind {
        LinkKind::Shm
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

    fn arm(&mut self, cx: &mut Context<'_>) -> Result<Armed, LinkError> {
        // As a timer would.
        let (waker, over) = (cx.waker().clone(), self.over.clone());
        tokio::spawn(async move {
            while !over.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            waker.wake();
        });
        Ok(Armed::Yes)
    }

    fn post(
        &mut self,
        _: OpId,
        _: Class,
        _: How,
        _: &[u8],
        _: &[Segment<'_>],
    ) -> Result<Post, LinkError> {
        Ok(Post::Done)
    }

    fn land(&mut self, _: PayloadId, _: Landing, _: OpId) -> Result<Post, LinkError> {
        Ok(Post::Done)
    }

    fn release(&mut self, _: PayloadId) {}

    fn kill(&mut self, _: &LinkError, _: &mut dyn Sink) -> Killed {
        if self.over.load(Ordering::SeqCst) { Killed::Over } else { self.until }
    }

    fn flushed(&self) -> bool {
        true
    }

    fn check(&mut self) -> Result<Check, LinkError> {
        self.checks.fetch_add(1, Ordering::SeqCst);
        Ok(Check::Quiet)
    }

    fn counters(&self) -> LinkCounters {
        LinkCounters::default()
    }
}

/// A node with an endpoint that has such a lane, the endpoint and its peer's; and what ends the lane.
async fn meet(until: Killed) -> (Node, (Endpoint, Endpoint, Node), Arc<AtomicBool>) {
    let (node, ends, over, _) = meet_with(Config::new(), until).await;
    (node, ends, over)
}

/// With the number of times that the lane was asked about its peer.
async fn meet_with(
    config: Config,
    until: Killed,
) -> (Node, (Endpoint, Endpoint, Node), Arc<AtomicBool>, Arc<AtomicU32>) {
    let config = || config.clone().transports([LinkKind::Tcp]);
    let (node_a, node_b) = (Node::new(config()).expect("a node"), Node::new(config()).expect("b"));
    let listener = node_b.listen("thalweg://127.0.0.1:0").await.expect("listening");
    let (a, b) = tokio::join!(node_a.connect(listener.address()), listener.accept());
    let (a, b) = (a.expect("connecting"), b.expect("accepting"));
    let shared = node_b.shared().all_endpoints().remove(0);
    let over = Arc::new(AtomicBool::new(false));
    let checks = Arc::new(AtomicU32::new(0));
    let caps = Caps { eager_max: 0, ways: String::new() };
    let slow = Slow { caps, until, over: over.clone(), checks: checks.clone() };
    shared.core().lanes.push(Box::new(slow));
    (node_b, (b, a, node_a), over, checks)
}

async fn end_with(until: Killed) {
    let (node_b, (b, _a, _node_a), over) = meet(until).await;
    let mut closed = b.closed();
    let mut receive = b.recv();
    let mut cx = Context::from_waker(Waker::noop());
    assert!(Pin::new(&mut closed).poll(&mut cx).is_pending());
    assert!(Pin::new(&mut receive).poll(&mut cx).is_pending());
    b.abort();
    let received = receive.await.expect_err("the endpoint has ended");
    assert_eq!(received.kind(), ErrorKind::Closed);
    if until == Killed::Lingers {
        let early = tokio::time::timeout(Duration::from_millis(50), &mut closed).await;
        assert!(early.is_err(), "something is still reported later");
    } else {
        closed.await;
    }
    assert_eq!(node_b.shared().all_endpoints().len(), 1, "the lane still has memory of its");
    over.store(true, Ordering::SeqCst);
    b.closed().await;
    while !node_b.shared().all_endpoints().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Within less than the patience that a node has with endpoints that do not end.
#[tokio::test]
async fn a_node_does_not_wait_for_what_is_kept() {
    let (node, _ends, _over) = meet(Killed::Keeps).await;
    let closed =
        tokio::time::timeout(Duration::from_secs(3), node.close(CloseReason::default())).await;
    closed.expect("the node waits for a lane that nobody waits for");
}

#[tokio::test]
async fn a_lane_that_only_keeps_memory_holds_nobody_up() {
    let ended = tokio::time::timeout(PATIENCE, end_with(Killed::Keeps)).await;
    ended.expect("it ends");
}

#[tokio::test]
async fn a_lane_that_lingers_is_waited_for() {
    let ended = tokio::time::timeout(PATIENCE, end_with(Killed::Lingers)).await;
    ended.expect("it ends");
}

/// Whoever polls it may make it owe something at any time.
#[tokio::test]
async fn an_endpoint_that_is_being_polled_is_asked_about_its_peer_again_and_again() {
    let often = Duration::from_secs(3);
    let config = Config::new().keepalive(often).wake(Wake::Spin).spin_limit(10 * PATIENCE);
    let (_node_b, (b, _a, _node_a), over, checks) = meet_with(config, Killed::Over).await;
    over.store(true, Ordering::SeqCst);
    let asked = async {
        while checks.load(Ordering::SeqCst) < 4 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        asked = tokio::time::timeout(PATIENCE, asked) => asked.expect("it is asked again"),
        received = b.recv() => panic!("nothing was sent: {received:?}"),
    }
}
