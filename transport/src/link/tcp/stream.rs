//! The byte stream under the frames, and the options of the socket.
//!
//! [`ByteStream`] is the seam at which another layer (encryption) fits: it knows bytes and
//! readiness, and nothing of frames.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};

use crate::runtime::{Attempt, Source};

/// A connected, ordered, reliable stream of bytes that never blocks.
///
/// A count smaller than what was asked for means that the stream is drained (read) or full
/// (written) for now. Reading 0 bytes is its end.
pub(crate) trait ByteStream: Send {
    /// Reads at once, whatever the surroundings know of readiness.
    ///
    /// # Safety
    /// Every vector describes memory that is valid for writes during the call; they do not
    /// overlap.
    unsafe fn try_read(&mut self, into: &[libc::iovec]) -> io::Result<usize>;

    /// Writes at once, whatever the surroundings know of readiness.
    ///
    /// # Safety
    /// Every vector describes memory that is valid for reads during the call.
    unsafe fn try_write(&mut self, from: &[libc::iovec]) -> io::Result<usize>;

    /// Reads if the surroundings say that there is something; otherwise registers the waker.
    ///
    /// # Safety
    /// As [`ByteStream::try_read`].
    unsafe fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        into: &[libc::iovec],
    ) -> Poll<io::Result<usize>>;

    /// Writes if the surroundings say that there is room; otherwise registers the waker.
    ///
    /// # Safety
    /// As [`ByteStream::try_write`].
    unsafe fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        from: &[libc::iovec],
    ) -> Poll<io::Result<usize>>;

    /// Whether reading would find something. Exact: what direct reads have drained in the meantime
    /// is not reported again.
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Whether there is room to write. Exact, as above.
    fn poll_writable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Whether bytes are unsent or unacknowledged: the kernel's keepalive does not watch then.
    fn owes(&mut self) -> bool;

    /// For how long the peer's host has been silent although it owes an acknowledgement, if it
    /// does. Exact only to the interval between calls.
    fn unanswered_for(&mut self) -> Option<Duration>;

    /// Ends both directions at once.
    fn shutdown(&mut self);
}

/// A TCP socket, unencrypted.
pub(crate) struct Plain {
    source: Source,
    /// Since when an acknowledgement has been seen to be owed.
    owed_since: Option<Instant>,
}

impl Plain {
    /// `source` is a non-blocking stream socket, registered for both directions.
    pub fn new(source: Source) -> Self {
        Plain { source, owed_since: None }
    }
}

/// Turns a system call's answer into a count, and calls again when a signal interrupted it.
fn retried(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(count) = usize::try_from(call()) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// # Safety
/// As [`ByteStream::try_read`].
unsafe fn read(fd: BorrowedFd<'_>, into: &[libc::iovec]) -> io::Result<usize> {
    let raw = fd.as_raw_fd();
    retried(|| match into {
        // SAFETY: the caller vouches for the vector; the descriptor is borrowed.
        [one] => unsafe { libc::recv(raw, one.iov_base, one.iov_len, libc::MSG_DONTWAIT) },
        // SAFETY: as above, for all vectors; the socket is non-blocking.
        many => unsafe { libc::readv(raw, many.as_ptr(), many.len() as libc::c_int) },
    })
}

/// # Safety
/// As [`ByteStream::try_write`].
unsafe fn write(fd: BorrowedFd<'_>, from: &[libc::iovec]) -> io::Result<usize> {
    // A host may not ignore SIGPIPE, so `writev` will not do.
    const FLAGS: libc::c_int = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    let raw = fd.as_raw_fd();
    retried(|| match from {
        // SAFETY: the caller vouches for the vector; the descriptor is borrowed.
        [one] => unsafe { libc::send(raw, one.iov_base, one.iov_len, FLAGS) },
        many => {
            // SAFETY: all zero is a valid `msghdr`.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = many.as_ptr().cast_mut();
            message.msg_iovlen = many.len() as _;
            // SAFETY: as above, for all vectors; the kernel only reads them.
            unsafe { libc::sendmsg(raw, &message, FLAGS) }
        }
    })
}

pub(super) fn total(vectors: &[libc::iovec]) -> usize {
    vectors.iter().map(|vector| vector.iov_len).sum()
}

fn attempted(count: usize, wanted: usize) -> Attempt<usize> {
    if count < wanted { Attempt::Drained(count) } else { Attempt::More(count) }
}

/// `WouldBlock` unless the descriptor has one of `events` now.
fn look(fd: BorrowedFd<'_>, events: libc::c_short) -> io::Result<Attempt<()>> {
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: one valid entry; a timeout of 0 never blocks.
    let ready = retried(|| unsafe { libc::poll(&mut entry, 1, 0) } as isize)?;
    if ready == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(Attempt::More(())) }
}

impl ByteStream for Plain {
    unsafe fn try_read(&mut self, into: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the same contract.
        unsafe { read(self.source.fd(), into) }
    }

    unsafe fn try_write(&mut self, from: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the same contract.
        unsafe { write(self.source.fd(), from) }
    }

    unsafe fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        into: &[libc::iovec],
    ) -> Poll<io::Result<usize>> {
        self.source.poll_read(cx, |fd| {
            // SAFETY: the same contract.
            let count = unsafe { read(fd, into) }?;
            // The end stays readable: there may be no further edge for it.
            Ok(if count == 0 { Attempt::More(0) } else { attempted(count, total(into)) })
        })
    }

    unsafe fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        from: &[libc::iovec],
    ) -> Poll<io::Result<usize>> {
        self.source.poll_write(cx, |fd| {
            // SAFETY: the same contract.
            let count = unsafe { write(fd, from) }?;
            Ok(attempted(count, total(from)))
        })
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.source.poll_read(cx, |fd| look(fd, libc::POLLIN | libc::POLLRDHUP))
    }

    fn poll_writable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.source.poll_write(cx, |fd| look(fd, libc::POLLOUT))
    }

    fn owes(&mut self) -> bool {
        tcp_info(self.source.fd()).is_some_and(|info| {
            info.tcpi_unacked > 0 || info.tcpi_probes > 0 || info.tcpi_notsent_bytes > 0
        })
    }

    /// An acknowledgement is owed when the last segment in flight was sent (or sent again) after
    /// the last acknowledgement, or when a probe of a closed window is unanswered. A peer that
    /// does not read is never silent: its host answers probes, and segments that it has no room
    /// for, however far apart the kernel spaces them. The time counts from the first look that
    /// found something owed, because the last acknowledgement may be as old as the last message.
    fn unanswered_for(&mut self) -> Option<Duration> {
        let info = tcp_info(self.source.fd())?;
        if info.tcpi_probes == 0 && info.tcpi_unacked == 0 {
            self.owed_since = None;
            return None;
        }
        let now = Instant::now();
        let since = *self.owed_since.get_or_insert(now);
        let quiet = Duration::from_millis(info.tcpi_last_ack_recv.into());
        let owed = now - since;
        if quiet < owed {
            self.owed_since = now.checked_sub(quiet);
        }
        Some(if is_answered(&info) { Duration::ZERO } else { owed.min(quiet) })
    }

    fn shutdown(&mut self) {
        // Fails only when the connection is gone already.
        let _ = SockRef::from(&self.source.fd()).shutdown(std::net::Shutdown::Both);
    }
}

/// Whether the peer has answered what was sent last, though it has not taken all of it: one that
/// does not read may drop what is sent again, and says so each time, as seldom as that may be. What
/// is due to be sent again and cannot leave this host, its cable pulled, is never answered.
fn is_answered(info: &libc::tcp_info) -> bool {
    let sent_since = info.tcpi_last_data_sent < info.tcpi_last_ack_recv;
    let again_ms = info.tcpi_rto / 1000;
    let overdue = info.tcpi_last_data_sent > again_ms + again_ms / 4 + 100;
    info.tcpi_probes == 0 && !sent_since && !overdue
}

/// The kernel's view of the connection; `None` for sockets of another family.
fn tcp_info(fd: BorrowedFd<'_>) -> Option<libc::tcp_info> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: `info` has `len` writable bytes; the kernel writes no more than that.
    let answer = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &mut len,
        )
    };
    // SAFETY: plain integers, zeroed where the kernel wrote none.
    (answer == 0).then(|| unsafe { info.assume_init() })
}

/// When a connection on which nothing moves is given up, by the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Keepalive {
    /// Silence before the first probe.
    pub idle: Duration,
    /// Between probes.
    pub interval: Duration,
    /// Unanswered probes after which the connection fails.
    pub retries: u32,
}

impl Keepalive {
    /// Gives a silent connection up after about `total`, which is at least three seconds.
    pub fn within(total: Duration) -> Self {
        let idle = (total / 2).max(Duration::from_secs(1));
        let interval = (total / 6).max(Duration::from_secs(1));
        Keepalive { idle, interval, retries: 3 }
    }
}

/// Sets what every socket of this link needs: no delay of small writes, keepalive by the kernel,
/// and the size of both socket buffers where one is asked for. No user timeout: it resets a live
/// peer that is slow to read.
pub(crate) fn configure_socket(
    socket: &impl AsFd,
    keepalive: Keepalive,
    buffer_bytes: Option<usize>,
) -> io::Result<()> {
    let fd = socket.as_fd();
    let socket = SockRef::from(&fd);
    socket.set_tcp_nodelay(true)?;
    let second = Duration::from_secs(1);
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(keepalive.idle.max(second))
            .with_interval(keepalive.interval.max(second))
            .with_retries(keepalive.retries.clamp(1, 127)),
    )?;
    if let Some(bytes) = buffer_bytes {
        socket.set_send_buffer_size(bytes)?;
        socket.set_recv_buffer_size(bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Milliseconds since the last data was sent, and since an acknowledgement came; until data is
    /// sent again.
    fn info(sent: u32, acknowledged: u32, again: u32) -> libc::tcp_info {
        // SAFETY: zero is valid for every field.
        let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
        info.tcpi_unacked = 40;
        (info.tcpi_last_data_sent, info.tcpi_last_ack_recv) = (sent, acknowledged);
        info.tcpi_rto = again * 1000;
        info
    }

    #[test]
    fn a_peer_that_drops_what_it_is_sent_is_told_from_a_cable_that_is_pulled() {
        assert!(is_answered(&info(109, 109, 200)), "answered at once, and not due again");
        assert!(is_answered(&info(40_000, 40_000, 51_200)), "the same, much later");
        assert!(!is_answered(&info(10, 3_000, 200)), "sent, and not answered");
        // As seen of a cable pulled in the millisecond of the last acknowledgement.
        assert!(!is_answered(&info(9_100, 9_100, 6_528)), "it was due long ago");
    }
}
