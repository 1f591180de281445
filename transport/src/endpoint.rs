//! A connection between two nodes.

use std::fmt;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use crate::driver::core::Life;
use crate::driver::endpoint::EndpointShared;
use crate::driver::kinds::{Fence, Get, Put, Recv, Send, TagRecv, TagSend, own_views};
use crate::driver::messages::Sent;
use crate::driver::op::{self, Op};
use crate::driver::waiters::Place;
use crate::error::{CloseReason, Error, ErrorKind, Phase, Result};
use crate::memory::{Buffer, BufferMut};
use crate::message::Message;
use crate::node::Node;
use crate::peer::Peer;
use crate::region::RemoteKey;
use crate::route::Route;
use crate::stats::Stats;

/// A connection between two nodes. Cloning gives another handle; all may be used at once, from any
/// task, thread and runtime.
///
/// When the last handle is dropped, the endpoint closes in the background: what was handed to
/// `send` still goes out, for at most [`crate::Config::close_timeout`]. To know that it did, await
/// [`Endpoint::close`].
#[derive(Clone)]
pub struct Endpoint(Arc<Handle>);

struct Handle {
    shared: Arc<EndpointShared>,
    _node: Node,
}

/// Why [`Endpoint::try_send`] did not send.
#[derive(Debug)]
pub struct TrySendError {
    /// `None`: it would have had to wait, for credit, for room, or behind others.
    pub error: Option<Error>,
    /// The message.
    pub message: Message,
}

impl fmt::Display for TrySendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.error {
            Some(error) => error.fmt(f),
            None => f.write_str("sending would have to wait"),
        }
    }
}

impl std::error::Error for TrySendError {}

impl Endpoint {
    pub(crate) fn new(shared: Arc<EndpointShared>, node: Node) -> Self {
        shared.add_handle();
        Endpoint(Arc::new(Handle { shared, _node: node }))
    }

    /// The handle that is owed to whoever connected or accepts.
    pub(crate) fn first(shared: Arc<EndpointShared>, node: Node) -> Self {
        Endpoint(Arc::new(Handle { shared, _node: node }))
    }

    fn shared(&self) -> &Arc<EndpointShared> {
        &self.0.shared
    }

    /// Sends a message: whole, in order, exactly once. Completes when the message's memory may be
    /// reused (a loan: when the receiver has let go of it), and gives the message back. That is
    /// not yet when the peer's application has it.
    ///
    /// Waits for the receiver's credit ([`crate::Config::message_window_bytes`]).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::LimitExceeded`], [`ErrorKind::Closed`], [`ErrorKind::PeerGone`],
    /// [`ErrorKind::ConnectionLost`]; the message comes back with the error.
    ///
    /// **Cancel safety.** A send that has not begun is withdrawn; one that has begun goes on.
    ///
    /// **Cost.** Up to [`crate::INLINE_MAX`] bytes in one frame: no allocation, no copy but the
    /// one into the link. A view ([`crate::Frame::is_view`]) is copied when the send is first
    /// polled, and it is the copy that comes back: its memory belongs to another peer, who may
    /// take it back at any time ([`ErrorKind::ConnectionLost`] if that has happened).
    ///
    /// ```no_run
    /// # async fn example(endpoint: thalweg::Endpoint) -> thalweg::Result<()> {
    /// use bytes::Bytes;
    /// let shared = Bytes::from(vec![0; 1 << 20]);
    /// endpoint.send(shared.clone()).await?;
    /// endpoint.send(vec![Bytes::from_static(b"head"), shared]).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn send(&self, message: impl Into<Message>) -> Op<'_, Send> {
        Op::new(self.shared(), Send { message: Some(message.into()) })
    }

    /// Sends if that needs no waiting for credit or behind other messages.
    ///
    /// # Errors
    ///
    /// The message comes back; [`TrySendError::error`] is `None` if it would have had to wait.
    pub fn try_send(&self, message: impl Into<Message>) -> Result<(), TrySendError> {
        let mut message = Some(message.into());
        let failed = |message: &mut Option<Message>, error| {
            Err(TrySendError { error, message: message.take().unwrap_or_default() })
        };
        if self.shared().forked() {
            return failed(&mut message, Some(op::forked()));
        }
        if let Err(error) = own_views(&mut message, &self.shared().node) {
            return failed(&mut message, Some(error));
        }
        let mut core = self.shared().core();
        if core.state.refusal().is_none() && message.as_ref().is_some_and(|m| !core.can_send(m)) {
            return failed(&mut message, None);
        }
        let sent = core.start_send(&mut message);
        let outcome = match sent {
            Ok(Sent::Done) => Ok(()),
            Ok(Sent::Waits(id)) => {
                core.detach(id);
                Ok(())
            }
            Err(error) => failed(&mut message, Some(error)),
        };
        self.shared().pulse.watch();
        drop(core);
        outcome
    }

    /// Receives the next message. Receives that wait at the same time are served in the order in
    /// which they were first polled.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Closed`] with the peer's reason, [`ErrorKind::PeerGone`],
    /// [`ErrorKind::ConnectionLost`]; but first every message that arrived before.
    ///
    /// **Cancel safety.** Dropping it loses no message.
    pub fn recv(&self) -> Op<'_, Recv> {
        Op::new(self.shared(), Recv::default())
    }

    /// Sends a buffer under a tag. Tagged payloads are matched in the order of sending. Large ones
    /// wait at the sender until a receive matches; small ones travel at once
    /// ([`crate::Config::eager_max_bytes`]).
    ///
    /// # Errors
    ///
    /// As [`Endpoint::send`].
    ///
    /// **Cancel safety.** As [`Endpoint::send`].
    pub fn tag_send<B: Buffer>(&self, tag: u64, buffer: B) -> Op<'_, TagSend<B>> {
        Op::new(self.shared(), TagSend { tag, buffer: Some(buffer) })
    }

    /// Receives into `buffer` the first payload whose tag agrees with `tag` in the bits of `mask`.
    /// It may be shorter than the buffer.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::BufferTooSmall`]: the payload stays, for a larger buffer. Otherwise as
    /// [`Endpoint::recv`].
    ///
    /// **Cancel safety.** An unmatched receive is withdrawn. A matched one finishes in the
    /// background, and the payload goes to the next receive that matches.
    ///
    /// ```no_run
    /// # async fn example(endpoint: thalweg::Endpoint) -> thalweg::Result<()> {
    /// let got = endpoint.tag_recv(7, u64::MAX, vec![0u8; 4096]).await?;
    /// println!("{} bytes under tag {}", got.len_bytes, got.tag);
    /// # Ok(())
    /// # }
    /// ```
    pub fn tag_recv<B: BufferMut>(&self, tag: u64, mask: u64, buffer: B) -> Op<'_, TagRecv<B>> {
        Op::new(self.shared(), TagRecv { tag, mask, buffer: Some(buffer), came: (0, 0) })
    }

    /// Writes `buffer` into a region of the peer's, at `offset_bytes`. Complete when it is there.
    /// Puts and gets that are under way at the same time take effect in any order: await one, or a
    /// [`fence`](Endpoint::fence), before the next.
    ///
    /// The peer's process does it, without its application; or the link by itself, where it can
    /// and once the peer has granted that ([`Endpoint::route`] says which, [`crate::Stats`] counts).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfBounds`], [`ErrorKind::KeyRevoked`], [`ErrorKind::Unsupported`] (no write
    /// access), and as [`Endpoint::send`].
    ///
    /// **Cancel safety.** A put that has not begun is withdrawn; one that has begun goes on, and its
    /// buffer is dropped when it ends.
    pub fn put<B: Buffer>(&self, buffer: B, to: &RemoteKey, offset_bytes: u64) -> Op<'_, Put<B>> {
        let refused = self.check_key(to, offset_bytes, buffer.region().len_bytes());
        Op::new(
            self.shared(),
            Put { key: to.0.key, offset: offset_bytes, refused, buffer: Some(buffer) },
        )
    }

    /// Fills `buffer` from a region of the peer's, from `offset_bytes` on. In the way, and in the
    /// order, of [`Endpoint::put`].
    ///
    /// # Errors
    ///
    /// As [`Endpoint::put`].
    ///
    /// **Cancel safety.** A get that has not begun is withdrawn; one that has begun goes on, and
    /// its buffer is dropped when it ends.
    pub fn get<B: BufferMut>(
        &self,
        buffer: B,
        from: &RemoteKey,
        offset_bytes: u64,
    ) -> Op<'_, Get<B>> {
        let refused = self.check_key(from, offset_bytes, buffer.region().len_bytes());
        Op::new(
            self.shared(),
            Get { key: from.0.key, offset: offset_bytes, refused, buffer: Some(buffer) },
        )
    }

    fn check_key(&self, key: &RemoteKey, offset: u64, len: usize) -> Option<Error> {
        let peer = self.peer();
        let error = if key.0.node_id != peer.node_id {
            Error::new(ErrorKind::InvalidInput, Phase::Transfer, "the key is another node's")
        } else if !crate::proto::keys::check_bounds(offset, len as u64, key.0.len) {
            Error::new(
                ErrorKind::OutOfBounds,
                Phase::Transfer,
                format!("{len} bytes at {offset} of a region of {}", key.0.len),
            )
        } else {
            return None;
        };
        Some(error.with_peer(peer.address.clone()))
    }

    /// Orders the families: completes when every operation of this endpoint that was started
    /// before has taken effect at the peer (messages and tagged payloads have arrived; puts have
    /// landed; gets are complete), so that whatever is started afterwards comes after them. A
    /// tagged payload that waits at the sender for its receive counts as arrived when the peer
    /// knows of it.
    ///
    /// # Errors
    ///
    /// As [`Endpoint::send`].
    pub fn fence(&self) -> Op<'_, Fence> {
        Op::new(self.shared(), Fence)
    }

    /// Which way this endpoint's traffic goes, and why.
    pub fn route(&self) -> Route {
        self.shared().route.clone()
    }

    /// What this endpoint has counted. Takes the endpoint's lock for a moment.
    pub fn stats(&self) -> Stats {
        if self.shared().forked() {
            return Stats::default();
        }
        self.shared().core().stats(self.shared().link)
    }

    /// The other end.
    pub fn peer(&self) -> &Peer {
        &self.shared().peer
    }

    /// Waits until everything that was handed over so far has left this process and taken effect at
    /// the peer: a [`fence`](Endpoint::fence). The peer may still keep what it was sent, loans among
    /// it; that a loan is let go of, its own [`send`](Endpoint::send) says.
    ///
    /// # Errors
    ///
    /// As [`Endpoint::send`].
    pub async fn drain(&self) -> Result<()> {
        let fence = self.fence();
        fence.await
    }

    /// Closes: lets what was sent go out, tells the peer why, and waits for its answer, at most
    /// [`crate::Config::close_timeout`]. Messages that the peer sent and that were not received
    /// here are lost; the peer's receives get the reason after what was sent to them. Gets of the
    /// peer's that have not begun to be answered are refused with [`ErrorKind::Closed`].
    ///
    /// # Errors
    ///
    /// [`ErrorKind::TimedOut`] if the peer did not answer in time (the endpoint is closed all the
    /// same); the error of an endpoint that had failed before.
    ///
    /// **Cancel safety.** Once polled, the endpoint closes; dropping the future only stops the
    /// waiting.
    pub async fn close(&self, reason: CloseReason) -> Result<()> {
        if self.shared().forked() {
            return Err(op::forked());
        }
        self.shared().core().close(reason);
        self.shared().pulse.enqueue();
        let deadline = Instant::now() + self.shared().node.config.close_timeout;
        if !self.ended_by(deadline).await {
            return Err(Error::new(
                ErrorKind::TimedOut,
                Phase::Close,
                "the peer did not answer the goodbye",
            )
            .with_peer(self.peer().address.clone()));
        }
        match self.closed().await {
            error if error.kind() == ErrorKind::Closed => Ok(()),
            error => Err(error),
        }
    }

    /// Waits for the end until `deadline`; then makes one. `true`: it ended by itself.
    pub(crate) async fn ended_by(&self, deadline: Instant) -> bool {
        let mut closed = pin!(self.closed());
        let mut timer = pin!(self.shared().node.timers.sleep_until(deadline));
        let in_time = std::future::poll_fn(|cx| {
            if closed.as_mut().poll(cx).is_ready() {
                return Poll::Ready(true);
            }
            timer.as_mut().poll(cx).map(|()| false)
        })
        .await;
        if !in_time {
            self.abort();
        }
        in_time
    }

    /// Ends the endpoint at once, without flushing or telling the peer. Operations in flight fail
    /// with [`ErrorKind::Closed`].
    pub fn abort(&self) {
        if self.shared().forked() {
            return;
        }
        let error = Error::new(ErrorKind::Closed, Phase::Close, "aborted")
            .with_peer(self.peer().address.clone());
        self.shared().fail(error);
    }

    /// Why the endpoint has ended; `None` while it is up. Messages may still be there to receive.
    /// Takes the endpoint's lock for a moment.
    pub fn ended(&self) -> Option<Error> {
        if self.shared().forked() {
            return Some(op::forked());
        }
        match &self.shared().core().state.life {
            Life::Dead(error) => Some(error.clone()),
            _ => None,
        }
    }

    /// Waits until the endpoint has ended, and says why. Messages may still be there to receive.
    /// The future is no handle: the endpoint closes when the last handle is dropped all the same.
    ///
    /// **Cancel safety.** Has no effect but waiting.
    pub fn closed(&self) -> Closed {
        Closed { shared: self.shared().clone(), place: Place::default() }
    }
}

/// See [`Endpoint::closed`].
#[must_use = "nothing happens until it is awaited"]
pub struct Closed {
    shared: Arc<EndpointShared>,
    place: Place,
}

impl Future for Closed {
    type Output = Error;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Error> {
        let this = &mut *self;
        if this.shared.forked() {
            return Poll::Ready(op::forked());
        }
        let mut core = this.shared.core();
        // A link that lingers is not waited for where nobody drives it any more.
        if (core.settled() || this.shared.node.is_gone())
            && let Life::Dead(error) = &core.state.life
        {
            return Poll::Ready(error.clone());
        }
        if let Some(old) = core.state.end_waiters.wait(&mut this.place, cx.waker()) {
            core.state.after.discard_waker(old);
        }
        Poll::Pending
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        if self.place.is_none() || self.shared.forked() {
            return;
        }
        let mut core = self.shared.core();
        if let Some(old) = core.state.end_waiters.leave(&mut self.place) {
            core.state.after.discard_waker(old);
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.shared.drop_handle() && !self.shared.forked() {
            self.shared.close_in_background();
        }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("peer", &self.peer().address)
            .field("link", &self.shared().link)
            .finish_non_exhaustive()
    }
}
