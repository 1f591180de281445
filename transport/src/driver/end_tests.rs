//! The end of an endpoint whose lane cannot let go of everything at once.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Waker};
use std::time::Duration;

use crate::error::LinkError;
use crate::link::{
    Armed, Budget, Caps, Class, How, Killed, Landing, Link, LinkCounters, LinkKind, OpId,
    PayloadId, Post, Progress, Segment, Sink,
};
use crate::{CloseReason, Config, Endpoint, ErrorKind, Node};

const PATIENCE: Duration = Duration::from_secs(20);

/// A lane that does nothing, and whose end takes until it is told.
struct Slow {
    caps: Caps,
    until: Killed,
    over: Arc<AtomicBool>,
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

    fn counters(&self) -> LinkCounters {
        LinkCounters::default()
    }
}

/// A node with an endpoint that has such a lane, the endpoint and its peer's; and what ends the lane.
async fn meet(until: Killed) -> (Node, (Endpoint, Endpoint, Node), Arc<AtomicBool>) {
    let config = || Config::new().transports([LinkKind::Tcp]);
    let (node_a, node_b) = (Node::new(config()).expect("a node"), Node::new(config()).expect("b"));
    let listener = node_b.listen("thalweg://127.0.0.1:0").await.expect("listening");
    let (a, b) = tokio::join!(node_a.connect(listener.address()), listener.accept());
    let (a, b) = (a.expect("connecting"), b.expect("accepting"));
    let shared = node_b.shared().all_endpoints().remove(0);
    let over = Arc::new(AtomicBool::new(false));
    let caps = Caps { eager_max: 0, ways: String::new() };
    shared.core().lanes.push(Box::new(Slow { caps, until, over: over.clone() }));
    (node_b, (b, a, node_a), over)
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
