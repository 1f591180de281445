//! The seam to the surroundings: readiness of a file descriptor, and a wake. (The timer is a
//! `timerfd`, so it is a descriptor too.)
//!
//! Two kinds of surroundings exist: a tokio runtime, or a host with its own event loop, which
//! polls one descriptor ([`HostLoop`]) and calls the node when it is readable. Everything above
//! sees only [`Source`]: a descriptor whose readiness can be awaited by one waker per direction.

mod fd;
mod fork;
mod host;
mod net;
mod timer;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::Interest as TokioInterest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};

pub(crate) use fd::{Fd, Tracked};
pub(crate) use fork::{FirstUse, ForkGuard, FoundOnce, PerProcess};
pub(crate) use host::HostLoop;
pub(crate) use net::{Acceptor, Stream, resolve};
pub(crate) use timer::{Sleep, Ticker, Timers};

/// Which directions of a descriptor matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interest {
    Read,
    ReadWrite,
}

/// What a non-blocking attempt found.
pub(crate) enum Attempt<R> {
    /// There may be more: the source is still considered ready.
    More(R),
    /// The source was drained: wait for the next edge.
    Drained(R),
}

/// Where sources are registered.
#[derive(Clone)]
pub(crate) enum Reactor {
    Tokio(tokio::runtime::Handle),
    Host(Arc<HostLoop>),
}

impl Reactor {
    /// Registers `fd`, edge-triggered. The descriptor must be non-blocking.
    pub fn source(&self, fd: Fd, interest: Interest) -> io::Result<Source> {
        match self {
            Reactor::Tokio(handle) => {
                let _enter = handle.enter();
                let interest = match interest {
                    Interest::Read => TokioInterest::READABLE,
                    Interest::ReadWrite => TokioInterest::READABLE | TokioInterest::WRITABLE,
                };
                // SAFETY: `Fd` owns its descriptor, gives the same number for as long as it lives,
                // and is neither replaced nor reachable mutably inside the `AsyncFd`. (A forked
                // child closes the number, and uses neither from then on.)
                let fd = unsafe { AsyncFd::register_with_interest(fd, interest) };
                Ok(Source(Inner::Tokio(fd.map_err(|error| error.into_parts().1)?)))
            }
            Reactor::Host(host) => Ok(Source(Inner::Host(host.register(fd, interest)?))),
        }
    }
}

/// A registered descriptor, owned. Dropping it deregisters and closes.
pub(crate) struct Source(Inner);

enum Inner {
    Tokio(AsyncFd<Fd>),
    Host(host::HostSource),
}

impl Source {
    /// Runs `attempt` when the descriptor is readable. `WouldBlock` from it waits for the next
    /// edge; `Pending` means that `cx`'s waker is registered (one waker per direction: the last
    /// one given counts). An error of the runtime itself (it has shut down) is `Err` with
    /// [`is_runtime_gone`].
    pub fn poll_read<R>(
        &self,
        cx: &mut Context<'_>,
        mut attempt: impl FnMut(BorrowedFd<'_>) -> io::Result<Attempt<R>>,
    ) -> Poll<io::Result<R>> {
        match &self.0 {
            Inner::Tokio(fd) => loop {
                let mut guard = ready!(fd.poll_read_ready(cx)).map_err(runtime_gone)?;
                if let Some(done) = settle(&mut guard, attempt(fd.get_ref().as_fd())) {
                    return Poll::Ready(done);
                }
            },
            Inner::Host(source) => source.poll(host::Direction::Read, cx, attempt),
        }
    }

    /// As [`Source::poll_read`], for writing.
    pub fn poll_write<R>(
        &self,
        cx: &mut Context<'_>,
        mut attempt: impl FnMut(BorrowedFd<'_>) -> io::Result<Attempt<R>>,
    ) -> Poll<io::Result<R>> {
        match &self.0 {
            Inner::Tokio(fd) => loop {
                let mut guard = ready!(fd.poll_write_ready(cx)).map_err(runtime_gone)?;
                if let Some(done) = settle(&mut guard, attempt(fd.get_ref().as_fd())) {
                    return Poll::Ready(done);
                }
            },
            Inner::Host(source) => source.poll(host::Direction::Write, cx, attempt),
        }
    }

    /// Whether an edge is pending, without consuming it; registers `cx`'s waker when not.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_read(cx, |_| Ok(Attempt::More(())))
    }

    /// The descriptor, for direct non-blocking calls while spinning.
    pub fn fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Inner::Tokio(fd) => fd.get_ref().as_fd(),
            Inner::Host(source) => source.fd(),
        }
    }
}

impl AsRawFd for Source {
    fn as_raw_fd(&self) -> RawFd {
        self.fd().as_raw_fd()
    }
}

/// What an attempt says of a descriptor's readiness. `None`: nothing was there, wait for an edge.
#[inline]
fn settle<R>(
    guard: &mut AsyncFdReadyGuard<'_, Fd>,
    outcome: io::Result<Attempt<R>>,
) -> Option<io::Result<R>> {
    match outcome {
        Ok(Attempt::More(done)) => Some(Ok(done)),
        Ok(Attempt::Drained(done)) => {
            guard.clear_ready();
            Some(Ok(done))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            guard.clear_ready();
            None
        }
        Err(error) => Some(Err(error)),
    }
}

/// The text that marks an error of the runtime rather than of the descriptor.
const RUNTIME_GONE: &str = "the runtime that this node belongs to has ended";

fn runtime_gone(_: io::Error) -> io::Error {
    io::Error::other(RUNTIME_GONE)
}

/// Whether this error says that the runtime has ended.
pub(crate) fn is_runtime_gone(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.to_string() == RUNTIME_GONE)
}
