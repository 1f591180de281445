//! The node's Unix socket, on which same-host peers present themselves, and who waits for whom.
//!
//! A stranger has to present the token of an expected connection within a time limit; how many
//! may stand at the door is limited, and those beyond wait in the kernel's backlog.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};

use super::blob::{Blob, VERSION, verdict};
use super::link::{ARENA_BYTES, Arena, OwnPage, ShmLink};
use super::ring::Page;
use super::setup::{self, Token};
use super::socket::{self, Packet};
use super::{SetupError, ShmOptions, Unavailable};
use crate::link::{Budget, Engine, Progress};
use crate::memory::OwnMapping;
use crate::runtime::{Attempt, Fd, Interest, Reactor, Sleep, Source, Timers};

/// Strangers at the door, at most.
const STRANGERS_MAX: usize = 1024;
/// How long a stranger has to present a token, and to be expected.
const STRANGER_PATIENCE: Duration = Duration::from_secs(10);
/// Connections that the kernel keeps for us.
const BACKLOG: i32 = 4096;
/// Between two tries to connect to a socket whose backlog is full.
const RETRY_AFTER: Duration = Duration::from_millis(2);

/// Between two tries to accept when descriptors have run out.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(50);

/// A connection that nobody has claimed yet.
struct Stranger {
    source: Source,
    deadline: Instant,
    /// Its first packet, once it came.
    hello: Option<Packet>,
}

/// A connection whose first packet presented an expected token.
pub(super) struct Claimed {
    pub source: Source,
    pub hello: Packet,
}

#[derive(Default)]
struct Expected {
    claimed: Option<Claimed>,
    waker: Option<Waker>,
}

#[derive(Default)]
struct Door {
    strangers: Vec<Stranger>,
    expected: HashMap<Token, Expected>,
    timer: Option<Sleep>,
    /// When to try again to accept, after descriptors ran out.
    retry_at: Option<Instant>,
}

/// What a node's links over shared memory have in common.
pub(crate) struct ShmEngine {
    pub(super) reactor: Reactor,
    pub(super) timers: Arc<Timers>,
    pub(super) arena: Arc<Arena>,
    pub(super) options: ShmOptions,
    blob: Blob,
    listener: Source,
    door: Mutex<Door>,
}

fn unavailable(reason: String, fix: &str) -> Unavailable {
    Unavailable { reason, fix: fix.into() }
}

/// A step that the system refused. Whatever it was, a want of descriptors has one remedy.
fn refused(what: &str, error: &io::Error, fix: &str) -> Unavailable {
    let fix = match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => "raise the limit of open files (ulimit -n)",
        _ => fix,
    };
    unavailable(format!("{what}: {error}"), fix)
}

/// Tries what every link needs, so that its absence is known at once.
fn probe_memory() -> Result<(), Unavailable> {
    let refused_memory = |error: io::Error| {
        refused(
            "sealed shared memory (memfd) cannot be made",
            &error,
            "allow memfd_create, fallocate and F_SEAL_FUTURE_WRITE (Linux 5.1) in this sandbox",
        )
    };
    OwnMapping::create(c"thalweg-probe", size_of::<Page>()).map(drop).map_err(refused_memory)?;
    let pid = rustix::process::getpid();
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).map(drop).map_err(
        |error| {
            refused(
                "processes cannot be watched (pidfd_open)",
                &error.into(),
                "allow pidfd_open (Linux 5.3) in this sandbox",
            )
        },
    )
}

fn read_boot_id() -> Result<[u8; 16], Unavailable> {
    let unknown =
        |error: io::Error| refused("this host's boot id is unknown", &error, "mount /proc");
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(unknown)?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16)
        .map(u128::to_be_bytes)
        .map_err(|error| unknown(io::Error::other(error)))
}

fn namespace(name: &str) -> Result<u64, Unavailable> {
    rustix::fs::stat(format!("/proc/self/ns/{name}")).map(|stat| stat.st_ino).map_err(|error| {
        refused(&format!("the {name} namespace is unknown"), &error.into(), "mount /proc")
    })
}

pub(super) fn random<const N: usize>() -> Result<[u8; N], SetupError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|error| SetupError::new(format!("no random numbers: {error}")))?;
    Ok(bytes)
}

fn unix_socket() -> io::Result<Fd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(Fd::new(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?))
}

impl ShmEngine {
    pub fn new(
        reactor: Reactor,
        timers: Arc<Timers>,
        options: ShmOptions,
    ) -> Result<Arc<Self>, Unavailable> {
        probe_memory()?;
        let secret: [u8; 16] =
            random().map_err(|error| unavailable(error.reason, "allow getrandom"))?;
        let name = format!("thalweg-{:032x}", u128::from_ne_bytes(secret)).into_bytes();
        let refused = |error: io::Error| {
            refused(
                "no Unix socket with an abstract name",
                &error,
                "allow Unix sockets in this sandbox",
            )
        };
        let listener = (|| {
            let socket = unix_socket()?;
            bind(&socket, &SocketAddrUnix::new_abstract_name(&name)?)?;
            listen(&socket, BACKLOG)?;
            reactor.source(socket, Interest::Read)
        })()
        .map_err(refused)?;
        if options.ptracer_any {
            // Only has an effect, and only exists, where the Yama policy does.
            // SAFETY: a plain request about this process; no memory is involved.
            unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0) };
        }
        let blob = Blob {
            version: VERSION,
            uid: rustix::process::geteuid().as_raw(),
            boot_id: read_boot_id()?,
            net_namespace: namespace("net")?,
            pid_namespace: namespace("pid")?,
            name,
        };
        Ok(Arc::new(ShmEngine {
            reactor,
            timers,
            arena: Arc::new(Arena::new(ARENA_BYTES)),
            options,
            blob,
            listener,
            door: Mutex::new(Door::default()),
        }))
    }

    /// The capability blob, for the bootstrap.
    pub fn blob(&self) -> Vec<u8> {
        self.blob.to_bytes()
    }

    pub fn own(&self) -> &Blob {
        &self.blob
    }

    fn door(&self) -> MutexGuard<'_, Door> {
        self.door.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn judge(&self, peer_blob: &[u8]) -> Result<Blob, SetupError> {
        let peer = Blob::from_bytes(peer_blob)
            .ok_or_else(|| SetupError::new("the peer's offer of shared memory is malformed"))?;
        verdict(&self.blob, &peer).map_err(SetupError::new)?;
        Ok(peer)
    }

    /// Connects to the peer's Unix socket and sets a link up. Bounded by the handshake timeout;
    /// dropping the future leaves nothing behind.
    pub async fn connect(&self, peer_blob: &[u8], token: Token) -> Result<ShmLink, SetupError> {
        let peer = self.judge(peer_blob)?;
        let deadline = Instant::now() + self.options.handshake_timeout;
        let socket = self.connect_socket(&peer.name, deadline).await?;
        let source = self.reactor.source(socket, Interest::Read).map_err(no_source)?;
        setup::establish(self, source, token, None, deadline).await
    }

    /// Waits for the peer to connect and to present `token`, then sets a link up. Bounded by the
    /// handshake timeout; dropping the future leaves nothing behind. The peer may come first.
    pub async fn accept(&self, peer_blob: &[u8], token: Token) -> Result<ShmLink, SetupError> {
        self.judge(peer_blob)?;
        let deadline = Instant::now() + self.options.handshake_timeout;
        let claimed = self.expect(token)?.wait(deadline).await?;
        setup::establish(self, claimed.source, token, Some(claimed.hello), deadline).await
    }

    async fn connect_socket(&self, name: &[u8], deadline: Instant) -> Result<Fd, SetupError> {
        let refused = |error: rustix::io::Errno| {
            SetupError::new(format!("connecting to the peer's Unix socket: {error}"))
        };
        let address = SocketAddrUnix::new_abstract_name(name).map_err(refused)?;
        let socket = unix_socket().map_err(no_source)?;
        loop {
            match connect(&socket, &address) {
                Ok(()) => return Ok(socket),
                // The peer's backlog is full.
                Err(rustix::io::Errno::AGAIN) if Instant::now() < deadline => {
                    self.timers.sleep_until(Instant::now() + RETRY_AFTER).await;
                }
                Err(error) => return Err(refused(error)),
            }
        }
    }

    /// Registers a token that a stranger will present.
    fn expect(&self, token: Token) -> Result<Expectation<'_>, SetupError> {
        let mut door = self.door();
        let already = door.strangers.iter().position(|stranger| {
            stranger.hello.as_ref().is_some_and(|hello| setup::token_of(hello) == Some(token))
        });
        let mut expected = Expected::default();
        if let Some(at) = already {
            let stranger = door.strangers.swap_remove(at);
            expected.claimed =
                stranger.hello.map(|hello| Claimed { source: stranger.source, hello });
        }
        if door.expected.contains_key(&token) {
            return Err(SetupError::new("two links with one token"));
        }
        door.expected.insert(token, expected);
        Ok(Expectation { engine: self, token })
    }
}

pub(super) fn no_source(error: io::Error) -> SetupError {
    SetupError::new(format!("making a Unix socket: {error}"))
        .fixed_by("raise the limit of open files (ulimit -n)")
}

/// Waits for a stranger with this token; dropped, nobody waits any more.
struct Expectation<'e> {
    engine: &'e ShmEngine,
    token: Token,
}

impl Expectation<'_> {
    async fn wait(self, deadline: Instant) -> Result<Claimed, SetupError> {
        let mut timer = self.engine.timers.sleep_until(deadline);
        std::future::poll_fn(|cx| {
            let mut door = self.engine.door();
            if let Some(expected) = door.expected.get_mut(&self.token) {
                if let Some(claimed) = expected.claimed.take() {
                    return Poll::Ready(Ok(claimed));
                }
                expected.waker = Some(cx.waker().clone());
            }
            drop(door);
            std::pin::Pin::new(&mut timer)
                .poll(cx)
                .map(|()| Err(SetupError::new("the peer did not connect to the Unix socket")))
        })
        .await
    }
}

impl Drop for Expectation<'_> {
    fn drop(&mut self) {
        let removed = self.engine.door().expected.remove(&self.token);
        drop(removed);
    }
}

impl Door {
    /// Lets one newcomer stand at the door, if it belongs to the same user.
    fn admit(&mut self, reactor: &Reactor, uid: u32, fd: Fd) {
        let same = rustix::net::sockopt::socket_peercred(&fd)
            .is_ok_and(|credentials| credentials.uid.as_raw() == uid);
        if !same {
            return;
        }
        // Descriptors have run out: the newcomer is turned away, and will take another link.
        if let Ok(source) = reactor.source(fd, Interest::Read) {
            let deadline = Instant::now() + STRANGER_PATIENCE;
            self.strangers.push(Stranger { source, deadline, hello: None });
        }
    }

    /// Hears the strangers; hands those that are expected over. Whether any was.
    fn hear(&mut self, cx: &mut Context<'_>, now: Instant, wake: &mut Vec<Waker>) {
        let mut at = 0;
        while at < self.strangers.len() {
            let stranger = &mut self.strangers[at];
            let mut keep = stranger.deadline > now;
            if keep && stranger.hello.is_none() {
                match stranger.source.poll_read(cx, |fd| socket::receive(fd).map(Attempt::More)) {
                    Poll::Ready(Ok(Some(hello))) => stranger.hello = Some(hello),
                    Poll::Ready(_) => keep = false,
                    Poll::Pending => {}
                }
            }
            if !keep {
                self.strangers.swap_remove(at);
                continue;
            }
            let Some(hello) = &self.strangers[at].hello else {
                at += 1;
                continue;
            };
            match setup::token_of(hello) {
                None => drop(self.strangers.swap_remove(at)),
                Some(token) => match self.expected.get_mut(&token) {
                    Some(expected) if expected.claimed.is_none() => {
                        let stranger = self.strangers.swap_remove(at);
                        expected.claimed =
                            stranger.hello.map(|hello| Claimed { source: stranger.source, hello });
                        wake.extend(expected.waker.take());
                    }
                    _ => at += 1,
                },
            }
        }
    }
}

impl Engine for ShmEngine {
    fn poll(&self, cx: &mut Context<'_>, budget: &mut Budget) -> Progress {
        let mut wake = Vec::new();
        let mut door = self.door();
        let now = Instant::now();
        let mut progress = Progress::Idle;
        door.retry_at = None;
        while door.strangers.len() < STRANGERS_MAX {
            if budget.parcels == 0 {
                progress = Progress::More;
                break;
            }
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let accepted = self
                .listener
                .poll_read(cx, |fd| Ok(Attempt::More(Fd::new(accept_with(fd.as_fd(), flags)?))));
            match accepted {
                Poll::Ready(Ok(fd)) => {
                    budget.parcels -= 1;
                    progress = Progress::Some;
                    door.admit(&self.reactor, self.blob.uid, fd);
                }
                Poll::Ready(Err(_)) => {
                    door.retry_at = Some(now + ACCEPT_AGAIN_AFTER);
                    break;
                }
                Poll::Pending => break,
            }
        }
        door.hear(cx, now, &mut wake);
        self.set_timer(&mut door, cx);
        drop(door);
        for waker in wake {
            waker.wake();
        }
        progress
    }
}

impl ShmEngine {
    /// Comes back when the patience with the first stranger ends, or to accept again.
    fn set_timer(&self, door: &mut Door, cx: &mut Context<'_>) {
        let patience = door.strangers.iter().map(|stranger| stranger.deadline);
        door.timer =
            patience.chain(door.retry_at).min().map(|deadline| self.timers.sleep_until(deadline));
        if let Some(timer) = &mut door.timer
            && std::pin::Pin::new(timer).poll(cx).is_ready()
        {
            cx.waker().wake_by_ref();
        }
    }

    /// Makes the page this side will write, with a secret in it, and its descriptor.
    pub(super) fn make_page(
        &self,
    ) -> Result<(OwnPage, std::os::fd::OwnedFd, [u8; 16]), SetupError> {
        let (mapping, fd) = OwnMapping::create(c"thalweg-ring", size_of::<Page>())
            .map_err(|error| SetupError::new(format!("making a ring: {error}")))?;
        let page = OwnPage::new(mapping);
        let secret = random()?;
        page.set_secret(secret);
        Ok((page, fd, secret))
    }
}
