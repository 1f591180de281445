//! The passive side.

use std::collections::VecDeque;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};

use crate::address::Address;
use crate::driver::bootstrap;
use crate::driver::endpoint::EndpointShared;
use crate::driver::node::NodeShared;
use crate::driver::waiters::{Place, Waiters};
use crate::driver::{Mutex, lock};
use crate::endpoint::Endpoint;
use crate::error::{Error, Phase, Result};
use crate::node::Node;
use crate::runtime::{Acceptor, Stream, is_runtime_gone, resolve};

/// How long the listener waits before it accepts again when descriptors have run out.
const AFTER_EXHAUSTION: Duration = Duration::from_millis(50);

/// Endpoints that are up and wait to be accepted. Beyond that the listener pauses.
const ACCEPTED_MAX: usize = 4096;

#[derive(Default)]
struct Queue {
    accepted: VecDeque<Arc<EndpointShared>>,
    waiters: Waiters,
    /// The listener is gone: what still comes up is closed.
    closed: bool,
    /// Why there will be no more.
    ended: Option<Error>,
    /// The accept loop, when it waits for room.
    looper: Option<Waker>,
}

struct Shared {
    queue: Mutex<Queue>,
    closed: AtomicBool,
    looper: futures_util::task::AtomicWaker,
}

/// Accepts connections at an address. Handshakes go on in the background, so that `accept` yields
/// finished endpoints and a slow stranger delays nobody. Dropping it closes the socket, as soon as
/// the node's task runs.
pub struct Listener {
    node: Node,
    address: Address,
    shared: Arc<Shared>,
}

impl Listener {
    pub(crate) async fn bind(node: &Node, address: Address) -> Result<Listener> {
        let shared_node = node.shared();
        shared_node.usable()?;
        let config = &shared_node.config;
        let named = |doing: &str, error: &std::io::Error| {
            Error::from_io(Phase::Listen, format!("{doing} {address}"), error)
        };
        let resolving = async {
            resolve(address.host(), address.port()).await.map_err(|error| {
                let what = format!("{}: {error}", address.host());
                Error::new(crate::ErrorKind::NameResolution, Phase::Listen, what)
            })
        };
        let (limit, shown) = (config.connect_timeout, address.to_string());
        let addresses =
            bootstrap::within(shared_node, limit, &shown, "resolving", resolving).await?;
        let Some(&first) = addresses.first() else {
            return Err(Error::new(
                crate::ErrorKind::NameResolution,
                Phase::Listen,
                format!("{} has no address", address.host()),
            ));
        };
        let backlog = i32::try_from(config.backlog).unwrap_or(i32::MAX);
        let acceptor = Acceptor::bind(&shared_node.reactor, first, backlog, config.tcp_buffer())
            .map_err(|error| named("binding", &error))?;
        let bound = acceptor.local_address().map_err(|error| named("binding", &error))?;
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue::default()),
            closed: AtomicBool::new(false),
            looper: futures_util::task::AtomicWaker::new(),
        });
        let work = accept_loop(shared_node.clone(), acceptor, shared.clone());
        let ender = Ender(shared.clone());
        shared_node.spawn(Box::pin(async move {
            let _ender = ender;
            work.await;
        }));
        tracing::info!(address = %bound, "listening");
        Ok(Listener { node: node.clone(), address: Address::from(bound), shared })
    }

    /// The address that was bound, with the port that the system chose if 0 was asked for.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The next endpoint.
    ///
    /// # Errors
    ///
    /// When the node is closed or its runtime has ended. A stranger that fails the handshake is
    /// not an error here; see [`crate::NodeStats::handshakes_failed`] and the log.
    ///
    /// **Cancel safety.** Dropping the future loses no endpoint.
    pub async fn accept(&self) -> Result<Endpoint> {
        let mut waiting = Waiting { shared: &self.shared, place: Place::default() };
        let shared = poll_fn(|cx| {
            if let Err(error) = self.node.shared().usable() {
                return Poll::Ready(Err(error));
            }
            let mut queue = lock(&self.shared.queue);
            if let Some(endpoint) = queue.accepted.pop_front() {
                let looper = queue.looper.take();
                // Others may wait for what is left.
                let waiters = queue.waiters.take();
                drop(queue);
                looper.into_iter().chain(waiters).for_each(Waker::wake);
                return Poll::Ready(Ok(endpoint));
            }
            if let Some(error) = &queue.ended {
                return Poll::Ready(Err(error.clone()));
            }
            let old = queue.waiters.wait(&mut waiting.place, cx.waker());
            drop(queue);
            drop(old);
            Poll::Pending
        })
        .await?;
        Ok(Endpoint::first(shared, self.node.clone()))
    }
}

/// Somebody who waits to accept.
struct Waiting<'a> {
    shared: &'a Shared,
    place: Place,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.place.is_none() {
            let old = lock(&self.shared.queue).waiters.leave(&mut self.place);
            drop(old);
        }
    }
}

impl Listener {
    /// Stops listening. Whoever waits in [`Listener::accept`] gets [`crate::ErrorKind::Closed`];
    /// the socket is closed as soon as the node's task runs. As when the listener is dropped.
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        if self.node.shared().fork.forked() {
            return;
        }
        self.shared.looper.wake();
        let mut queue = lock(&self.shared.queue);
        queue.closed = true;
        queue.ended.get_or_insert_with(|| {
            Error::new(crate::ErrorKind::Closed, Phase::Listen, "the listener is closed")
        });
        let accepted = std::mem::take(&mut queue.accepted);
        let waiters = queue.waiters.take();
        drop(queue);
        waiters.for_each(Waker::wake);
        for endpoint in accepted {
            drop(Endpoint::first(endpoint, self.node.clone()));
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Listener({})", self.address)
    }
}

/// Tells the waiters when the accept loop is gone, for whatever reason.
struct Ender(Arc<Shared>);

impl Drop for Ender {
    fn drop(&mut self) {
        let mut queue = lock(&self.0.queue);
        queue.ended.get_or_insert_with(|| {
            Error::new(crate::ErrorKind::Closed, Phase::Listen, "the listener's node is closed")
        });
        let waiters = queue.waiters.take();
        drop(queue);
        waiters.for_each(Waker::wake);
    }
}

type Handshake = Pin<Box<dyn Future<Output = Result<Arc<EndpointShared>>> + Send>>;

/// Accepts, runs handshakes side by side, queues what comes of them; until the listener is
/// dropped.
async fn accept_loop(node: Arc<NodeShared>, acceptor: Acceptor, shared: Arc<Shared>) {
    let mut handshakes: FuturesUnordered<Handshake> = FuturesUnordered::new();
    let mut next: Pin<Box<dyn Future<Output = std::io::Result<Stream>> + Send + '_>> =
        Box::pin(acceptor.accept());
    let mut pause: Option<crate::runtime::Sleep> = None;
    poll_fn(|cx| {
        shared.looper.register(cx.waker());
        if shared.closed.load(Ordering::Acquire) {
            return Poll::Ready(());
        }
        while let Poll::Ready(Some(done)) = handshakes.poll_next_unpin(cx) {
            match done {
                Ok(endpoint) => deliver(&shared, endpoint),
                Err(error) => tell(&error),
            }
        }
        loop {
            if let Some(sleep) = &mut pause {
                match Pin::new(sleep).poll(cx) {
                    Poll::Ready(()) => pause = None,
                    Poll::Pending => return Poll::Pending,
                }
            }
            // A handshake that ends, or an accept, wakes us.
            if handshakes.len() >= node.config.max_handshakes || full(&shared, cx.waker()) {
                return Poll::Pending;
            }
            match next.poll_unpin(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(stream)) => {
                    handshakes.push(Box::pin(bootstrap::accept(node.clone(), stream)));
                    next = Box::pin(acceptor.accept());
                    // Its first poll registers it.
                    if let Poll::Ready(Some(done)) = handshakes.poll_next_unpin(cx) {
                        match done {
                            Ok(endpoint) => deliver(&shared, endpoint),
                            Err(error) => tell(&error),
                        }
                    }
                }
                Poll::Ready(Err(error)) => {
                    if is_runtime_gone(&error) {
                        return Poll::Ready(());
                    }
                    if error.kind() != std::io::ErrorKind::Interrupted {
                        tracing::warn!(%error, "accepting; trying again shortly");
                        pause = Some(node.timers.sleep_until(Instant::now() + AFTER_EXHAUSTION));
                    }
                    next = Box::pin(acceptor.accept());
                }
            }
        }
    })
    .await;
}

/// Who goes away is nothing to look into; who speaks something else, or is too slow, may be.
fn tell(error: &Error) {
    use crate::ErrorKind::{Closed, ConnectionLost, PeerGone, RuntimeGone};
    match error.kind() {
        Closed | ConnectionLost | PeerGone | RuntimeGone => {
            tracing::info!(%error, "handshake failed");
        }
        _ => tracing::warn!(%error, "handshake failed"),
    }
}

fn full(shared: &Shared, waker: &Waker) -> bool {
    let mut queue = lock(&shared.queue);
    let full = queue.accepted.len() >= ACCEPTED_MAX;
    if full {
        queue.looper = Some(waker.clone());
    }
    full
}

fn deliver(shared: &Shared, endpoint: Arc<EndpointShared>) {
    let mut queue = lock(&shared.queue);
    if queue.closed {
        drop(queue);
        if endpoint.drop_handle() {
            endpoint.close_in_background();
        }
        return;
    }
    queue.accepted.push_back(endpoint);
    let waiters = queue.waiters.take();
    drop(queue);
    waiters.for_each(Waker::wake);
}
