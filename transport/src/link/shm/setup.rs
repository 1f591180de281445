//! From a Unix connection to a link.
//!
//! Both sides say hello (with their ring's memory), read a secret out of the other's ring and
//! another out of its private memory, send both back as proof, and say that they are ready. So each
//! knows that they share a host, that the kernel lets the receiver of a payload read the sender's
//! memory (this may differ by direction), and that the other got as far.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use rustix::process::{PidfdFlags, pidfd_open};

use super::copy::read_peer_bytes;
use super::engine::{ShmEngine, no_source, random};
use super::link::{Parts, PeerPage, ShmLink, TOGETHER_MIN_BYTES};
use super::ring::Page;
use super::socket::{self, PACKET_MAX, Packet};
use super::wire::INLINE_MAX;
use super::{SetupError, ShmOptions};
use crate::memory::PeerMapping;
use crate::runtime::{Attempt, Fd, Interest, Source, Timers};

/// What the bootstrap gave both sides to recognise each other by.
pub(super) type Token = [u8; 16];
type Secret = [u8; 16];

const MAGIC: [u8; 8] = *b"thalwegM";
/// Answer to the probe of single copy: it was not tried, because the configuration forbids it.
const NOT_TRIED: i32 = -1;
const PAGE_MAX: u64 = 64 << 10;

const _: () = assert!(size_of::<Page>() as u64 <= PAGE_MAX && HELLO_LEN <= PACKET_MAX);

const HELLO_LEN: usize = 8 + 16 + 8 + 1;
const PROOF_LEN: usize = 1 + 16 + 4 + 16;

/// The token that a first packet presents, if it is a hello.
pub(super) fn token_of(packet: &Packet) -> Option<Token> {
    Hello::read(packet.bytes()).map(|hello| hello.token)
}

struct Hello {
    token: Token,
    /// Where a secret lies in the sender's private memory.
    probe_addr: u64,
    single_copy: bool,
    /// Whether long payloads may be copied by both sides.
    together: bool,
}

/// In the last byte of a hello.
const SINGLE_COPY: u8 = 1;
const TOGETHER: u8 = 2;

impl Hello {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.token);
        bytes.extend(self.probe_addr.to_ne_bytes());
        let flag = |set: bool, flag| if set { flag } else { 0 };
        bytes.push(flag(self.single_copy, SINGLE_COPY) | flag(self.together, TOGETHER));
        bytes
    }

    fn read(bytes: &[u8]) -> Option<Hello> {
        let rest = bytes.strip_prefix(&MAGIC)?;
        let (token, rest) = rest.split_first_chunk()?;
        let (addr, rest) = rest.split_first_chunk()?;
        let [flags] = rest else { return None };
        Some(Hello {
            token: *token,
            probe_addr: u64::from_ne_bytes(*addr),
            single_copy: flags & SINGLE_COPY != 0,
            together: flags & TOGETHER != 0,
        })
    }
}

/// What was read from the other side.
struct Proof {
    page_secret: Secret,
    /// 0, an error number, or [`NOT_TRIED`].
    pull_code: i32,
    pull_secret: Secret,
}

impl Proof {
    fn bytes(&self) -> [u8; PROOF_LEN] {
        let mut bytes = [b'P'; PROOF_LEN];
        bytes[1..17].copy_from_slice(&self.page_secret);
        bytes[17..21].copy_from_slice(&self.pull_code.to_ne_bytes());
        bytes[21..].copy_from_slice(&self.pull_secret);
        bytes
    }

    fn read(bytes: &[u8]) -> Option<Proof> {
        let rest = bytes.strip_prefix(b"P")?;
        let (page_secret, rest) = rest.split_first_chunk()?;
        let (code, rest) = rest.split_first_chunk()?;
        Some(Proof {
            page_secret: *page_secret,
            pull_code: i32::from_ne_bytes(*code),
            pull_secret: rest.try_into().ok()?,
        })
    }
}

/// The connection during set-up.
struct Conversation<'e> {
    source: Source,
    timers: &'e Arc<Timers>,
    deadline: Instant,
}

impl Conversation<'_> {
    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), SetupError> {
        // A fresh socket's buffer has room for the few packets of set-up.
        socket::send(self.source.fd(), bytes, fds).map_err(|error| lost("sending", &error))
    }

    async fn receive(&self) -> Result<Packet, SetupError> {
        let mut timer = self.timers.sleep_until(self.deadline);
        std::future::poll_fn(|cx| {
            match self.source.poll_read(cx, |fd| socket::receive(fd).map(Attempt::More)) {
                Poll::Ready(Ok(Some(packet))) => return Poll::Ready(Ok(packet)),
                Poll::Ready(Ok(None)) => {
                    return Poll::Ready(Err(SetupError::new("the peer gave up during set-up")));
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(lost("receiving", &error))),
                Poll::Pending => {}
            }
            std::pin::Pin::new(&mut timer)
                .poll(cx)
                .map(|()| Err(SetupError::new("the peer fell silent during set-up")))
        })
        .await
    }
}

fn lost(doing: &str, error: &io::Error) -> SetupError {
    let made = SetupError::new(format!("{doing} over the Unix socket: {error}"));
    match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE | libc::ETOOMANYREFS) => {
            made.fixed_by("raise the limit of open files (ulimit -n)")
        }
        _ => made,
    }
}

/// Who is at the other end, and a descriptor that tells when it ends.
fn identify(socket: BorrowedFd<'_>) -> Result<(rustix::process::Pid, Fd), SetupError> {
    let failed = |what: &str, error: io::Error| SetupError::new(format!("{what}: {error}"));
    // `UCred` cannot hold the 0 that the kernel gives for a process of another namespace.
    // SAFETY: an all-zero `ucred` is valid.
    let mut credentials: libc::ucred = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: both pointers are to locals, and `len` is the first one's size.
    let got = unsafe {
        libc::getsockopt(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    if got != 0 {
        return Err(failed("asking who the peer is", io::Error::last_os_error()));
    }
    if credentials.uid != rustix::process::geteuid().as_raw() {
        return Err(SetupError::new(format!("the peer is another user (uid {})", credentials.uid))
            .fixed_by("run both processes as one user"));
    }
    let Some(pid) = rustix::process::Pid::from_raw(credentials.pid) else {
        return Err(SetupError::new("the peer is in another process namespace")
            .fixed_by("share the process namespace (for containers: --pid)"));
    };
    let watch = pidfd_open(pid, PidfdFlags::NONBLOCK)
        .map_err(|error| failed("watching the peer's process", error.into()))?;
    Ok((pid, Fd::new(watch)))
}

/// What the peer's hello brought.
struct Introduced {
    hello: Hello,
    page: PeerPage,
}

fn introduce(packet: Packet, token: Token) -> Result<Introduced, SetupError> {
    let Some(hello) = Hello::read(packet.bytes()).filter(|hello| hello.token == token) else {
        return Err(SetupError::new("the peer's greeting over the Unix socket is malformed"));
    };
    let Ok([page]) = packet.fds.into_inner() else {
        return Err(SetupError::new("the peer's greeting comes without its ring"));
    };
    let mapping = PeerMapping::map(page.as_fd(), PAGE_MAX)
        .map_err(|reason| SetupError::new(format!("the peer's ring: {reason}")))?;
    let page = PeerPage::new(mapping).ok_or_else(|| SetupError::new("the peer's ring is short"))?;
    Ok(Introduced { hello, page })
}

/// Tries to read the peer's secret out of its private memory.
fn probe(options: &ShmOptions, pid: i32, hello: &Hello) -> (i32, Secret) {
    let mut secret = [0; 16];
    if !options.single_copy || !hello.single_copy {
        return (NOT_TRIED, secret);
    }
    match read_peer_bytes(pid, hello.probe_addr, &mut secret) {
        Ok(()) => (0, secret),
        Err(error) => (error.raw_os_error().unwrap_or(libc::EIO), secret),
    }
}

/// What became of one direction of single copy, in words. `Ok`: it works.
fn pull_verdict(code: i32, proved: bool) -> Result<(), String> {
    match code {
        0 if proved => Ok(()),
        0 => Err("the memory read was not the peer's".into()),
        NOT_TRIED => Err("switched off by configuration".into()),
        code => {
            let hint = if code == libc::EPERM {
                " (ptrace policy, or a process not dumpable)"
            } else {
                ""
            };
            Err(format!("{}{hint}", io::Error::from_raw_os_error(code)))
        }
    }
}

fn ways(
    options: &ShmOptions,
    ours: &Result<(), String>,
    theirs: &Result<(), String>,
    together: bool,
) -> String {
    let mut text = format!("inline ≤ {} KiB", INLINE_MAX >> 10);
    text.push_str(if options.loans {
        ", loans by reference"
    } else {
        ", loans copied (configuration)"
    });
    match (ours, theirs) {
        (Ok(()), Ok(())) => {
            text.push_str(", single copy (process_vm_readv)");
            if together {
                let from_kib = TOGETHER_MIN_BYTES >> 10;
                let by =
                    format!(", messages from {from_kib} KiB on by both sides (process_vm_writev)");
                text.push_str(&by);
            }
        }
        (Err(ours), Err(theirs)) if ours == theirs => {
            text.push_str(&format!(", staging arena; single copy: {ours}"));
        }
        (ours, theirs) => {
            for (direction, verdict) in [("receiving", ours), ("sending", theirs)] {
                match verdict {
                    Ok(()) => text.push_str(&format!(", {direction}: single copy")),
                    Err(why) => {
                        text.push_str(&format!(
                            ", {direction}: staging arena (single copy: {why})"
                        ));
                    }
                }
            }
        }
    }
    text
}

/// Sets a link up over a connected socket. `first` is the peer's hello, if it came already.
pub(super) async fn establish(
    engine: &ShmEngine,
    source: Source,
    token: Token,
    first: Option<Packet>,
    deadline: Instant,
) -> Result<ShmLink, SetupError> {
    let options = &engine.options;
    let (pid, process) = identify(source.fd())?;
    let talk = Conversation { source, timers: &engine.timers, deadline };
    let (own, page_fd, page_secret) = engine.make_page()?;
    let private: Box<Secret> = Box::new(random()?);
    let hello = Hello {
        token,
        probe_addr: private.as_ptr().expose_provenance() as u64,
        single_copy: options.single_copy,
        together: options.together,
    };
    talk.send(&hello.bytes(), &[page_fd.as_fd()])?;
    // From here on the mapping is enough.
    drop(page_fd);
    let packet = match first {
        Some(packet) => packet,
        None => talk.receive().await?,
    };
    let peer = introduce(packet, token)?;
    let (pull_code, pull_secret) = probe(options, pid.as_raw_nonzero().get(), &peer.hello);
    let proof = Proof { page_secret: peer.page.secret(), pull_code, pull_secret };
    talk.send(&proof.bytes(), &[])?;
    let malformed = || SetupError::new("the peer's proof is malformed");
    let proof = Proof::read(talk.receive().await?.bytes()).ok_or_else(malformed)?;
    if proof.page_secret != page_secret {
        return Err(SetupError::new("the peer does not see this process's memory"));
    }
    let peer_pulls = pull_verdict(proof.pull_code, proof.pull_secret == *private);
    talk.send(&[b'R', peer_pulls.is_ok().into()], &[])?;
    let ready = talk.receive().await?;
    let [b'R', proved] = ready.bytes() else {
        return Err(malformed());
    };
    let pulls = pull_verdict(pull_code, *proved == 1);
    let together = options.together && peer.hello.together;
    let process = engine.reactor.source(process, Interest::Read).map_err(no_source)?;
    Ok(ShmLink::new(Parts {
        own,
        peer: peer.page,
        socket: talk.source,
        process,
        pid: pid.as_raw_nonzero().get(),
        timers: engine.timers.clone(),
        arena: engine.arena.clone(),
        segments_limit_bytes: options.peer_segments_limit_bytes,
        max_payload: options.max_payload,
        loans: options.loans,
        may_pull: pulls.is_ok(),
        peer_may_pull: peer_pulls.is_ok(),
        together,
        ways: ways(options, &pulls, &peer_pulls, together),
    }))
}

/// The packets that a peer sends at set-up, as fuzzing gives them: what can be read has one form
/// (but for flags that this version does not know).
#[cfg(feature = "fuzzing")]
pub(super) fn fuzz(bytes: &[u8]) -> u64 {
    if let Some(hello) = Hello::read(bytes) {
        let again = hello.bytes();
        assert_eq!(again[..HELLO_LEN - 1], bytes[..HELLO_LEN - 1]);
        assert_eq!(again[HELLO_LEN - 1], bytes[HELLO_LEN - 1] & (SINGLE_COPY | TOGETHER));
        return 1 + u64::from(hello.single_copy);
    }
    if let Some(proof) = Proof::read(bytes) {
        assert_eq!(proof.bytes()[..], *bytes);
        let verdicts = [false, true].map(|proved| pull_verdict(proof.pull_code, proved));
        assert!(verdicts[0].is_err(), "what is not proved is not allowed");
        return 3 + u64::from(verdicts[1].is_ok());
    }
    0
}

/// Packets to start from.
#[cfg(feature = "fuzzing")]
pub(super) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let hello =
        Hello { token: [1; 16], probe_addr: 4096, single_copy: true, together: true }.bytes();
    let proof = |pull_code| {
        Proof { page_secret: [2; 16], pull_code, pull_secret: [3; 16] }.bytes().to_vec()
    };
    vec![
        ("hello", hello.clone()),
        ("bad-hello-cut", hello[..HELLO_LEN - 1].to_vec()),
        ("bad-hello-longer", [&hello[..], &[0]].concat()),
        ("proof", proof(0)),
        ("proof-denied", proof(libc::EPERM)),
        ("proof-not-tried", proof(NOT_TRIED)),
        ("bad-proof-cut", proof(0)[..PROOF_LEN - 1].to_vec()),
        ("bad-other", b"GET / HTTP/1.1".to_vec()),
    ]
}
