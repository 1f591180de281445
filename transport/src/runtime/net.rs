//! Sockets for the bootstrap: connect, accept, exact reads and writes, name resolution.

use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

use super::{Attempt, Fd, Interest, Reactor, Source};

/// A connected TCP socket.
pub(crate) struct Stream {
    source: Source,
}

fn tcp_socket(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn set_buffers(socket: SockRef<'_>, buffer_bytes: Option<usize>) -> io::Result<()> {
    if let Some(bytes) = buffer_bytes {
        socket.set_send_buffer_size(bytes)?;
        socket.set_recv_buffer_size(bytes)?;
    }
    Ok(())
}

impl Stream {
    /// Connects. Buffer sizes are set before, because the window scale is fixed at the handshake.
    pub async fn connect(
        reactor: &Reactor,
        address: SocketAddr,
        buffer_bytes: Option<usize>,
    ) -> io::Result<Stream> {
        let socket = tcp_socket(address)?;
        set_buffers(SockRef::from(&socket), buffer_bytes)?;
        match socket.connect(&SockAddr::from(address)) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(error) => return Err(error),
        }
        let source = reactor.source(Fd::new(socket.into()), Interest::ReadWrite)?;
        poll_fn(|cx| {
            source.poll_write(cx, |fd| {
                let socket = SockRef::from(&fd);
                if let Some(error) = socket.take_error()? {
                    return Err(error);
                }
                match socket.peer_addr() {
                    Ok(_) => Ok(Attempt::More(())),
                    Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {
                        Err(io::ErrorKind::WouldBlock.into())
                    }
                    Err(error) => Err(error),
                }
            })
        })
        .await?;
        Ok(Stream { source })
    }

    /// Reads what is there, at least one byte; 0 is the end of the stream.
    pub async fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        poll_fn(|cx| {
            self.source.poll_read(cx, |fd| {
                let read = rustix::io::read(fd, &mut *into)?;
                Ok(Attempt::More(read))
            })
        })
        .await
    }

    /// Reads exactly this many bytes.
    pub async fn read_exact(&self, into: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < into.len() {
            match self.read(&mut into[filled..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => filled += read,
            }
        }
        Ok(())
    }

    /// Writes all of it.
    pub async fn write_all(&self, mut from: &[u8]) -> io::Result<()> {
        while !from.is_empty() {
            let wrote = poll_fn(|cx| {
                self.source.poll_write(cx, |fd| {
                    let wrote = rustix::net::send(fd, from, rustix::net::SendFlags::NOSIGNAL)?;
                    Ok(Attempt::More(wrote))
                })
            })
            .await?;
            from = &from[wrote..];
        }
        Ok(())
    }

    pub fn peer_address(&self) -> Option<SocketAddr> {
        SockRef::from(&self.source.fd()).peer_addr().ok()?.as_socket()
    }

    pub fn local_address(&self) -> Option<SocketAddr> {
        SockRef::from(&self.source.fd()).local_addr().ok()?.as_socket()
    }

    pub fn into_source(self) -> Source {
        self.source
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.source.fd()
    }
}

/// A listening TCP socket.
pub(crate) struct Acceptor {
    source: Source,
    buffer_bytes: Option<usize>,
    reactor: Reactor,
}

impl Acceptor {
    /// Binds exactly this address.
    pub fn bind(
        reactor: &Reactor,
        address: SocketAddr,
        backlog: i32,
        buffer_bytes: Option<usize>,
    ) -> io::Result<Self> {
        let socket = tcp_socket(address)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        set_buffers(SockRef::from(&socket), buffer_bytes)?;
        socket.bind(&SockAddr::from(address))?;
        socket.listen(backlog)?;
        let source = reactor.source(Fd::new(socket.into()), Interest::Read)?;
        Ok(Acceptor { source, buffer_bytes, reactor: reactor.clone() })
    }

    pub fn local_address(&self) -> io::Result<SocketAddr> {
        SockRef::from(&self.source.fd())
            .local_addr()?
            .as_socket()
            .ok_or_else(|| io::Error::other("not an internet socket"))
    }

    /// The next connection.
    pub async fn accept(&self) -> io::Result<Stream> {
        let fd = poll_fn(|cx| {
            self.source.poll_read(cx, |fd| {
                let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
                let (none, zero) = (std::ptr::null_mut(), std::ptr::null_mut());
                // SAFETY: no address is asked for; the descriptor is open.
                let raw = unsafe { libc::accept4(fd.as_raw_fd(), none, zero, flags) };
                if raw < 0 {
                    let error = io::Error::last_os_error();
                    // A connection that ended in the queue is the peer's affair.
                    return match error.raw_os_error() {
                        Some(libc::ECONNABORTED | libc::EINTR | libc::EPROTO) => {
                            Ok(Attempt::More(None))
                        }
                        _ => Err(error),
                    };
                }
                // SAFETY: a fresh descriptor that nobody else owns.
                Ok(Attempt::More(Some(unsafe { OwnedFd::from_raw_fd(raw) })))
            })
        })
        .await?;
        match fd {
            Some(fd) => {
                set_buffers(SockRef::from(&fd.as_fd()), self.buffer_bytes)?;
                Ok(Stream { source: self.reactor.source(Fd::new(fd), Interest::ReadWrite)? })
            }
            None => Err(io::ErrorKind::Interrupted.into()),
        }
    }
}

struct Resolving {
    answer: Option<io::Result<Vec<SocketAddr>>>,
    waker: Option<Waker>,
}

struct Resolve(Arc<Mutex<Resolving>>);

impl Future for Resolve {
    type Output = io::Result<Vec<SocketAddr>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match state.answer.take() {
            Some(answer) => Poll::Ready(answer),
            None => {
                state.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// The addresses of a host. A literal costs nothing; a name asks the system's resolver, which can
/// only block, on a thread that ends with the answer.
pub(crate) async fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let shared = Arc::new(Mutex::new(Resolving { answer: None, waker: None }));
    let (answer_to, host) = (shared.clone(), host.to_owned());
    std::thread::Builder::new().name("thalweg-resolve".into()).spawn(move || {
        let answer = (host.as_str(), port).to_socket_addrs().map(Iterator::collect);
        let waker = {
            let mut state = answer_to.lock().unwrap_or_else(PoisonError::into_inner);
            state.answer = Some(answer);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    })?;
    Resolve(shared).await
}
