//! From a TCP connection to an endpoint: hellos both ways, then links, best first.
//!
//! Both sides send a preface and a hello at once (limits, windows, the application's own hello,
//! one capability blob a link). Then the connecting side names one link after the other, in its
//! order of preference, and both try to bring it up and tell each other how it went; the first
//! that comes up on both sides carries the endpoint. TCP is the last candidate and cannot fail:
//! the bootstrap connection itself becomes the link. When another link is chosen the bootstrap
//! connection is closed.
//!
//! What a stranger can cost: one descriptor, one hello of at most 64 KiB, and the handshake
//! timeout; how many may be at it at once is limited by the listener.

use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use smallvec::smallvec;
use tracing::Instrument;

use super::core::Limits;
use super::endpoint::EndpointShared;
use super::node::NodeShared;
use super::{Mutex, lock};
use crate::address::Address;
use crate::config::Transports;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::link::shm::{Blob, verdict};
use crate::link::tcp::{Keepalive, TcpLink, TcpOptions, configure_socket};
use crate::link::ucx::{self, Reservation};
use crate::link::verbs;
use crate::link::{Link, LinkKind, insist};
use crate::peer::Peer;
use crate::proto::hello::{
    Failure, Hello, MINOR_DIRECT, PREFACE_BYTES, PrefaceError, SETUP_PREFIX_BYTES, Setup,
    VERSION_MAJOR, preface_decode, preface_encode,
};
use crate::route::{Candidate, Objection, Policy, Side, Verdict, Ways, explain, plan};
use crate::runtime::{Stream, is_runtime_gone, resolve};

/// What all attempts of a connection at links that nobody named may take together, while there is another
/// to try. Working hardware should need milliseconds; for one that is up and does not reach the peer (a
/// wrong VLAN) connections wait, and who would be content with TCP does not know why. A further rail that
/// is dead has half a second of it.
const UNASKED_MAX: Duration = Duration::from_secs(2);
/// With less of it left the next such link is not begun with.
const UNASKED_MIN: Duration = Duration::from_millis(100);
/// An attempt that failed after this time is one to remember.
const LATE_FROM: Duration = Duration::from_secs(1);

/// Which end of the bootstrap this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Connector,
    Acceptor,
}

/// The error for `what`, seen on the bootstrap connection.
fn lost(peer: &str, what: &str, error: &io::Error) -> Error {
    if is_runtime_gone(error) {
        return super::node::runtime_gone();
    }
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return Error::new(
            ErrorKind::ConnectionLost,
            Phase::Connect,
            format!("{what}: the other side closed the connection"),
        )
        .with_peer(peer);
    }
    Error::from_io(Phase::Connect, what, error).with_peer(peer)
}

fn bad(peer: &str, what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Protocol, Phase::Connect, what).with_peer(peer)
}

/// `work`, or a timeout error.
pub(crate) async fn within<T>(
    node: &NodeShared,
    limit: Duration,
    peer: &str,
    doing: &str,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let mut work = pin!(work);
    let mut timer = pin!(node.timers.sleep_until(Instant::now() + limit));
    poll_fn(|cx| {
        if let Poll::Ready(done) = work.as_mut().poll(cx) {
            return Poll::Ready(done);
        }
        if let Err(error) = node.usable() {
            return Poll::Ready(Err(error));
        }
        timer.as_mut().poll(cx).map(|()| {
            Err(Error::new(
                ErrorKind::TimedOut,
                Phase::Connect,
                format!("{doing} took longer than {limit:?}"),
            )
            .with_peer(peer))
        })
    })
    .await
}

/// Connects to a listener.
pub(crate) async fn connect(
    node: Arc<NodeShared>,
    address: Address,
) -> Result<Arc<EndpointShared>> {
    node.usable()?;
    let shown = address.to_string();
    let limit = node.config.connect_timeout;
    let deadline = Instant::now() + limit;
    let counted = Counted::new(&node);
    let made = within(&node, limit, &shown, "connecting", async {
        let stream = dial(&node, &address, &shown).await?;
        establish(&node, stream, shown.clone(), Role::Connector, deadline).await
    })
    .instrument(tracing::info_span!("connect", peer = %shown))
    .await;
    counted.done(&made);
    made
}

async fn dial(node: &NodeShared, address: &Address, shown: &str) -> Result<Stream> {
    let unresolved =
        |why: String| Error::new(ErrorKind::NameResolution, Phase::Connect, why).with_peer(shown);
    let addresses = resolve(address.host(), address.port())
        .await
        .map_err(|error| unresolved(format!("{}: {error}", address.host())))?;
    let mut last = unresolved(format!("{} has no address", address.host()));
    for candidate in addresses {
        match Stream::connect(&node.reactor, candidate, node.config.tcp_buffer()).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = lost(shown, &format!("connecting to {candidate}"), &error),
        }
    }
    Err(last)
}

/// Turns an accepted connection into an endpoint.
pub(crate) async fn accept(node: Arc<NodeShared>, stream: Stream) -> Result<Arc<EndpointShared>> {
    let shown = show(stream.peer_address());
    let limit = node.config.handshake_timeout;
    let deadline = Instant::now() + limit;
    let counted = Counted::new(&node);
    let made = within(&node, limit, &shown, "the handshake", async {
        establish(&node, stream, shown.clone(), Role::Acceptor, deadline).await
    })
    .instrument(tracing::info_span!("accept", peer = %shown))
    .await;
    counted.done(&made);
    made
}

fn show(address: Option<SocketAddr>) -> String {
    address.map_or_else(|| "an unknown address".to_owned(), |at| Address::from(at).to_string())
}

/// Counts a handshake for as long as it lasts, also when it is dropped.
struct Counted<'a>(&'a NodeShared);

impl<'a> Counted<'a> {
    fn new(node: &'a NodeShared) -> Self {
        node.handshakes.fetch_add(1, Ordering::Relaxed);
        Counted(node)
    }

    fn done<T>(self, made: &Result<T>) {
        if made.is_err() {
            self.0.handshakes_failed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.handshakes.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A window that goes back to the node's budget unless an endpoint takes it.
struct Window<'a> {
    node: &'a NodeShared,
    bytes: u64,
}

impl Window<'_> {
    fn keep(mut self) -> u64 {
        std::mem::take(&mut self.bytes)
    }
}

impl Drop for Window<'_> {
    fn drop(&mut self) {
        self.node.return_window(self.bytes);
    }
}

async fn establish(
    node: &Arc<NodeShared>,
    stream: Stream,
    shown: String,
    role: Role,
    deadline: Instant,
) -> Result<Arc<EndpointShared>> {
    let config = &node.config;
    let local_address = show(stream.local_address());
    let keepalive = Keepalive::within(config.keepalive);
    configure_socket(&stream, keepalive, None)
        .map_err(|error| lost(&shown, "setting the socket up", &error))?;
    let window = Window { node, bytes: node.take_window() };
    let mut token = [0; 16];
    if role == Role::Connector {
        getrandom::fill(&mut token)
            .map_err(|error| lost(&shown, "random numbers", &io::Error::other(error)))?;
    }
    let reservation = reserve(node);
    let own = own_hello(node, token, window.bytes, reservation.as_ref());
    let left = deadline.saturating_duration_since(Instant::now());
    let (theirs, minor) =
        within(node, left, &shown, "the hello", exchange(&stream, &own, &shown, role))
            .await
            .map_err(|error| match error.kind() {
                ErrorKind::TimedOut => silent(role, config.connect_timeout, error),
                _ => error,
            })?;
    if role == Role::Acceptor {
        token = theirs.token;
    }
    let candidates = Vec::new();
    let reservation = Mutex::new(reservation);
    let terms = Mutex::new(None);
    let mut setup = SetUp {
        node,
        stream,
        shown,
        theirs,
        token,
        deadline,
        candidates,
        unasked_left: UNASKED_MAX,
        reservation,
        terms,
    };
    let (prepared, kind, attempts, rejected) = match role {
        Role::Connector => setup.lead().await?,
        Role::Acceptor => setup.follow().await?,
    };
    let SetUp { stream, shown, theirs, candidates, .. } = setup;
    let mut link = match prepared {
        Prepared::Link(link) => link,
        Prepared::Bootstrap => {
            let options = TcpOptions {
                eager_max: config.eager_max_bytes,
                unacked_timeout: config.keepalive,
                max_payload: config.max_message_bytes,
                ..TcpOptions::default()
            };
            Box::new(TcpLink::new(stream.into_source(), Vec::new(), options)) as Box<dyn Link>
        }
        Prepared::Ucx(opened) => Box::new(opened.into_link(stream.into_source())),
        Prepared::Verbs(opened) => Box::new(opened.into_link(stream.into_source())),
    };
    let direct = minor >= MINOR_DIRECT;
    let ways = Ways {
        all: &link.caps().ways.clone(),
        one_sided: link.one_sided().filter(|_| direct).map(|link| link.way()),
    };
    let route =
        explain(&shown, kind, ways, config.transports.order(), &attempts, candidates, rejected);
    let limits = Limits {
        peer_message_window: theirs.message_window,
        peer_tag_window: theirs.tag_window,
        peer_max_message: theirs.max_message,
        peer_max_frames: theirs.max_frames,
        message_window: window.bytes,
        tag_window: config.tag_window_bytes,
        max_message: config.max_message_bytes,
        max_frames: config.max_frames,
        eager_max: config.eager_max_bytes,
        direct,
    };
    let peer = Peer {
        address: shown,
        local_address,
        node_id: theirs.node_id,
        hello: Bytes::from(theirs.app),
        version: (VERSION_MAJOR, minor),
    };
    tracing::info!(peer = %peer.address, link = %kind, "endpoint up");
    let endpoint = EndpointShared::new(
        node.clone(),
        peer,
        route,
        node.new_pulse(),
        smallvec![link],
        limits,
        window.keep(),
    );
    node.add_endpoint(&endpoint);
    Ok(endpoint)
}

/// The same, said so that a connecting side knows how far it came.
fn silent(role: Role, limit: Duration, error: Error) -> Error {
    let (Role::Connector, Some(peer)) = (role, error.peer()) else { return error };
    let what = format!("connected, but the peer said nothing within {limit:?}");
    Error::new(ErrorKind::TimedOut, Phase::Connect, what)
        .with_peer(peer)
        .with_hint("check the port: something else may listen there")
}

/// A place for this connection at the node's UCX worker, if it has one. Without it `ucx` is not offered.
fn reserve(node: &NodeShared) -> Option<Reservation> {
    let reserved = node.ucx.as_ref()?.reserve();
    reserved.inspect_err(|why| tracing::warn!(why, "ucx is not offered to a peer")).ok()
}

fn own_hello(
    node: &NodeShared,
    token: [u8; 16],
    window: u64,
    reservation: Option<&Reservation>,
) -> Hello {
    let config = &node.config;
    let mut links = Vec::new();
    for kind in config.transports.order() {
        match kind {
            LinkKind::Shm => {
                if let Some(shm) = &node.shm {
                    links.push((kind.name().to_owned(), shm.blob()));
                }
            }
            LinkKind::Tcp => links.push((kind.name().to_owned(), Vec::new())),
            LinkKind::Verbs => {
                if let Some(verbs) = &node.verbs {
                    links.push((kind.name().to_owned(), verbs.blob()));
                }
            }
            LinkKind::Ucx => {
                if let Some(reservation) = reservation {
                    links.push((kind.name().to_owned(), reservation.blob()));
                }
            }
            #[cfg(feature = "mock")]
            LinkKind::Mock => {
                links.push((kind.name().to_owned(), crate::link::mock::blob()));
            }
            #[cfg(not(feature = "mock"))]
            LinkKind::Mock => {}
        }
    }
    Hello {
        node_id: node.id,
        token,
        app: config.hello.to_vec(),
        links,
        message_window: window,
        tag_window: config.tag_window_bytes,
        max_message: config.max_message_bytes,
        max_frames: config.max_frames,
        features: 0,
    }
}

/// Both hellos. The connector speaks first; the acceptor answers a stranger only once it knows
/// that it is none.
async fn exchange(stream: &Stream, own: &Hello, shown: &str, role: Role) -> Result<(Hello, u16)> {
    let body = own.encode().map_err(|error| bad(shown, error.to_string()))?;
    let mut message = preface_encode(body.len()).to_vec();
    message.extend_from_slice(&body);
    let sending = "sending the hello";
    if role == Role::Connector {
        stream.write_all(&message).await.map_err(|error| lost(shown, sending, &error))?;
    }
    let mut preface = [0; PREFACE_BYTES];
    stream
        .read_exact(&mut preface)
        .await
        .map_err(|error| lost(shown, "reading the peer's hello", &error))?;
    let preface = match preface_decode(&preface) {
        Ok(preface) => preface,
        Err(error) => {
            if role == Role::Acceptor && matches!(error, PrefaceError::Major { .. }) {
                // So that it can name both versions too. It may be gone already.
                let _ = stream.write_all(&preface_encode(0)).await;
            }
            return Err(preface_error(&error, shown));
        }
    };
    let mut body = vec![0; preface.body_len];
    stream
        .read_exact(&mut body)
        .await
        .map_err(|error| lost(shown, "reading the peer's hello", &error))?;
    if role == Role::Connector && message[PREFACE_BYTES..] == body {
        // It holds a random token: nobody says the same by chance.
        let what = "the peer answers with our own words";
        return Err(Error::new(ErrorKind::NotThalweg, Phase::Connect, what)
            .with_peer(shown)
            .with_hint("check the port: an echo server listens there"));
    }
    let theirs =
        Hello::decode(&body).map_err(|error| bad(shown, format!("the peer's hello: {error}")))?;
    if role == Role::Acceptor {
        stream.write_all(&message).await.map_err(|error| lost(shown, sending, &error))?;
    }
    Ok((theirs, preface.minor_in_common()))
}

fn preface_error(error: &PrefaceError, shown: &str) -> Error {
    let (kind, hint) = match error {
        PrefaceError::NotThalweg { .. } => {
            (ErrorKind::NotThalweg, "check the port: something else listens or calls there")
        }
        PrefaceError::Major { .. } => {
            (ErrorKind::VersionMismatch, "install the same major version on both sides")
        }
        PrefaceError::TooLong { .. } => (ErrorKind::Protocol, "check what is at that address"),
    };
    Error::new(kind, Phase::Connect, error.to_string()).with_peer(shown).with_hint(hint)
}

type Chosen = (Prepared, LinkKind, Vec<LinkKind>, Vec<Candidate>);

struct SetUp<'a> {
    node: &'a Arc<NodeShared>,
    stream: Stream,
    shown: String,
    theirs: Hello,
    token: [u8; 16],
    /// When the whole handshake must be over.
    deadline: Instant,
    /// Links that were tried and did not come up.
    candidates: Vec<Candidate>,
    /// What is left of [`UNASKED_MAX`].
    unasked_left: Duration,
    /// Until the attempt at UCX takes it.
    reservation: Mutex<Option<Reservation>>,
    /// What the peer said for the link that is being tried.
    terms: Mutex<Option<Vec<u8>>>,
}

impl SetUp<'_> {
    fn blob(&self, kind: LinkKind) -> Option<&[u8]> {
        self.theirs
            .links
            .iter()
            .find(|(name, _)| name == kind.name())
            .map(|(_, blob)| blob.as_slice())
    }

    /// Whether this link is tried only because the library thought so. The connecting side decides
    /// about that for both: whoever follows is content with what it has offered.
    fn is_unasked(&self, kind: LinkKind, role: Role) -> bool {
        let config = &self.node.config;
        let looked_for = match kind {
            LinkKind::Verbs => config.verbs_devices.is_empty(),
            LinkKind::Ucx => true,
            LinkKind::Shm | LinkKind::Tcp | LinkKind::Mock => false,
        };
        looked_for && config.transports == Transports::Auto && role == Role::Connector
    }

    fn plan(&self, role: Role) -> (Vec<LinkKind>, Vec<Candidate>) {
        let config = &self.node.config;
        let ucx_here = || self.node.ucx.as_ref().map_or(&[][..], |ucx| ucx.transports()).to_vec();
        let policy = Policy {
            order: config.transports.order().to_vec(),
            require_encryption: config.require_encryption,
            ucx_only_by: self.is_unasked(LinkKind::Ucx, role).then(ucx_here),
        };
        let offers = self.theirs.links.iter().filter_map(|(name, _)| LinkKind::from_name(name));
        let mut objections = Vec::new();
        if let (Some(shm), Some(blob)) = (&self.node.shm, self.blob(LinkKind::Shm)) {
            let objection = match Blob::from_bytes(blob) {
                Some(theirs) => verdict(shm.own(), &theirs).err(),
                None => Some("the peer's offer is malformed".into()),
            };
            objections.extend(objection.map(|reason| Objection {
                link: LinkKind::Shm,
                reason,
                fix: None,
                yields: false,
            }));
        }
        if let (Some(verbs), Some(blob)) = (&self.node.verbs, self.blob(LinkKind::Verbs))
            && let Err((reason, fix)) = verbs.verdict(blob)
        {
            objections.push(Objection { link: LinkKind::Verbs, reason, fix, yields: false });
        }
        if let (Some(ucx), Some(blob)) = (&self.node.ucx, self.blob(LinkKind::Ucx))
            && let Err((reason, fix)) = crate::link::ucx::verdict(ucx.version(), blob)
        {
            objections.push(Objection { link: LinkKind::Ucx, reason, fix, yields: false });
        }
        let (late, now) = (lock(&self.node.late), Instant::now());
        for link in [LinkKind::Verbs, LinkKind::Ucx] {
            let objection = late.objection(link, self.theirs.node_id, now);
            let objection = objection.filter(|_| self.is_unasked(link, role));
            objections.extend(objection.map(|reason| Objection {
                link,
                reason,
                fix: Some(insist(link)),
                yields: true,
            }));
        }
        drop(late);
        let transports = self.blob(LinkKind::Ucx).map(ucx::transports).unwrap_or_default();
        let peer = Side { offers: offers.collect(), transports };
        plan(&policy, &self.node.capabilities, &peer, &objections)
    }

    /// Names links, best first, until one comes up.
    async fn lead(&mut self) -> Result<Chosen> {
        let (attempts, rejected) = self.plan(Role::Connector);
        for &kind in &attempts {
            let last = attempts.last() == Some(&kind);
            let unasked = self.is_unasked(kind, Role::Connector) && !last;
            if unasked && self.unasked_left < UNASKED_MIN {
                self.candidates.push(Candidate {
                    link: kind,
                    verdict: Verdict::Rejected,
                    reason: format!(
                        "not tried: others that nobody named took the {UNASKED_MAX:?} for all of them"
                    ),
                    fix: Some(insist(kind)),
                });
                continue;
            }
            self.say(&Setup::Attempt { link: kind.name().into() }).await?;
            if let Some(link) = self.attempt(kind, Role::Connector, last).await? {
                self.say(&Setup::Go).await?;
                return Ok((link, kind, attempts, rejected));
            }
        }
        let error = self.no_route(&rejected);
        self.say(&Setup::Refuse { code: 1, text: error.to_string() }).await?;
        Err(error)
    }

    /// Tries the links that the connector names.
    async fn follow(&mut self) -> Result<Chosen> {
        let (attempts, rejected) = self.plan(Role::Acceptor);
        // Bounded: a kind is tried once.
        let mut tried = Vec::new();
        loop {
            match self.hear().await? {
                Setup::Attempt { link } => {
                    let kind = LinkKind::from_name(&link).filter(|kind| !tried.contains(kind));
                    let Some(kind) = kind else {
                        return Err(bad(&self.shown, format!("an attempt at {link:?}")));
                    };
                    tried.push(kind);
                    let up = if attempts.contains(&kind) {
                        let last = attempts.iter().all(|kind| tried.contains(kind));
                        self.attempt(kind, Role::Acceptor, last).await?
                    } else {
                        let why = rejected.iter().find(|candidate| candidate.link == kind);
                        let failure = Failure {
                            reason: why.map_or("not offered".into(), |c| c.reason.clone()),
                            fix: why.and_then(|c| c.fix.clone()).unwrap_or_default(),
                        };
                        self.say(&Setup::Result(Err(failure))).await?;
                        *lock(&self.terms) = None;
                        self.hear_past_terms().await?;
                        None
                    };
                    if let Some(link) = up {
                        return match self.hear().await? {
                            Setup::Go => Ok((link, kind, attempts, rejected)),
                            other => Err(self.unexpected(&other)),
                        };
                    }
                }
                Setup::Refuse { text, .. } => {
                    return Err(Error::new(ErrorKind::NoRoute, Phase::LinkSetup, text)
                        .with_peer(self.shown.clone()));
                }
                other => return Err(self.unexpected(&other)),
            }
        }
    }

    fn unexpected(&self, setup: &Setup) -> Error {
        bad(&self.shown, format!("unexpected in link set-up: {setup:?}"))
    }

    fn no_route(&self, rejected: &[Candidate]) -> Error {
        let reasons: Vec<String> = rejected
            .iter()
            .chain(&self.candidates)
            .map(|candidate| format!("{}: {}", candidate.link, candidate.reason))
            .collect();
        Error::new(ErrorKind::NoRoute, Phase::LinkSetup, reasons.join("; "))
            .with_peer(self.shown.clone())
    }

    /// Brings one link up on this side, and compares notes. `None`: one side failed, and it is
    /// recorded why. With `last` no other is left to be tried.
    async fn attempt(
        &mut self,
        kind: LinkKind,
        role: Role,
        last: bool,
    ) -> Result<Option<Prepared>> {
        *lock(&self.terms) = None;
        let unasked = self.is_unasked(kind, role) && !last;
        let began = Instant::now();
        let (own, said) = self.compare_notes(kind, role, last, unasked).await?;
        let took = began.elapsed();
        let theirs = match said {
            Setup::Result(result) => result,
            other => return Err(self.unexpected(&other)),
        };
        let failure = match (own, theirs) {
            (Ok(prepared), Ok(())) => {
                lock(&self.node.late).came_up(kind, self.theirs.node_id);
                return Ok(Some(prepared));
            }
            (Err(failure), _) => failure,
            (Ok(_), Err(failure)) => at_the_peer(failure),
        };
        if unasked {
            self.unasked_left = self.unasked_left.saturating_sub(took);
            if took >= LATE_FROM {
                let mut late = lock(&self.node.late);
                late.failed(kind, self.theirs.node_id, took, Instant::now());
            }
        }
        let reason = &failure.reason;
        if self.is_unasked(kind, role) && !self.node.warned.swap(true, Ordering::Relaxed) {
            let fix = "name what is to be used in THALWEG_TRANSPORTS";
            let what = "a link that this machine has does not come up; this is told once";
            tracing::warn!(peer = %self.shown, link = %kind, %reason, fix, "{what}");
        } else {
            tracing::info!(peer = %self.shown, link = %kind, %reason, "link not up");
        }
        self.candidates.push(Candidate {
            link: kind,
            verdict: Verdict::Rejected,
            reason: failure.reason,
            fix: Some(failure.fix).filter(|fix| !fix.is_empty()),
        });
        Ok(None)
    }

    /// What became of the attempt on this side, and what the peer says of its own.
    async fn compare_notes(
        &self,
        kind: LinkKind,
        role: Role,
        last: bool,
        unasked: bool,
    ) -> Result<(Result<Prepared, Failure>, Setup)> {
        // A peer that stalls in the set-up of one link must leave time for the next.
        let left = self.deadline.saturating_duration_since(Instant::now());
        let share = if last { left } else { left / 2 };
        let (share, at_most) = match unasked {
            true => (share.min(self.unasked_left), self.unasked_left),
            false => (share, Duration::MAX),
        };
        let mut timer = pin!(self.node.timers.sleep_until(Instant::now() + share));
        let begun = self.begin(kind, role, at_most);
        // Written whole, before there is anything that could cut it short.
        if let Ok(Some(prepared)) = &begun {
            self.say(&Setup::Terms(prepared.terms())).await?;
        }
        let mut hearing = pin!(self.hear_past_terms());
        let mut heard = None;
        let own = {
            let mut bringing = pin!(self.bring_up(kind, role, begun, at_most, unasked));
            poll_fn(|cx| {
                if heard.is_none()
                    && let Poll::Ready(said) = hearing.as_mut().poll(cx)
                {
                    heard = Some(said);
                }
                // A peer that has failed will not come any more: to wait for it here would use up
                // the time that the next link needs.
                match &heard {
                    None | Some(Ok(Setup::Result(Ok(())))) => {
                        if let Poll::Ready(own) = bringing.as_mut().poll(cx) {
                            return Poll::Ready(own);
                        }
                        timer.as_mut().poll(cx).map(|()| Err(stalled(share, unasked)))
                    }
                    Some(Ok(Setup::Result(Err(failure)))) => {
                        Poll::Ready(Err(at_the_peer(failure.clone())))
                    }
                    Some(_) => Poll::Ready(Err(Failure::default())),
                }
            })
            .await
        };
        let report = match &own {
            Ok(_) => Ok(()),
            Err(failure) => Err(failure.clone()),
        };
        self.say(&Setup::Result(report)).await?;
        let said = match heard {
            Some(said) => said,
            None => hearing.await,
        };
        Ok((own, said?))
    }

    /// What a link needs before the peer is told of its terms.
    fn begin(
        &self,
        kind: LinkKind,
        role: Role,
        at_most: Duration,
    ) -> Result<Option<verbs::Prepared>, Failure> {
        if kind != LinkKind::Verbs {
            return Ok(None);
        }
        let absent = || Failure { reason: "not offered".into(), fix: String::new() };
        let engine = self.node.verbs.as_ref().ok_or_else(absent)?;
        let blob = self.blob(kind).ok_or_else(absent)?;
        engine.prepare(blob, role == Role::Connector, at_most).map(Some)
    }

    async fn bring_up(
        &self,
        kind: LinkKind,
        role: Role,
        begun: Result<Option<verbs::Prepared>, Failure>,
        at_most: Duration,
        unasked: bool,
    ) -> Result<Prepared, Failure> {
        let begun = begun?;
        match kind {
            LinkKind::Tcp => Ok(Prepared::Bootstrap),
            LinkKind::Shm => {
                let absent = || Failure { reason: "not offered".into(), fix: String::new() };
                let engine = self.node.shm.as_ref().ok_or_else(absent)?;
                let blob = self.blob(kind).ok_or_else(absent)?;
                let link = match role {
                    Role::Connector => engine.connect(blob, self.token).await,
                    Role::Acceptor => engine.accept(blob, self.token).await,
                };
                link.map(|link| Prepared::Link(Box::new(link)))
                    .map_err(|error| Failure { reason: error.reason, fix: error.fix })
            }
            LinkKind::Ucx => {
                let absent = || Failure { reason: "not offered".into(), fix: String::new() };
                let engine = self.node.ucx.as_ref().ok_or_else(absent)?;
                let blob = self.blob(kind).ok_or_else(absent)?;
                let slot = lock(&self.reservation).as_mut().and_then(Reservation::take);
                let opened = engine.open(slot.ok_or_else(absent)?, blob, at_most).await?;
                if unasked {
                    engine.confirm(&opened)?;
                }
                Ok(Prepared::Ucx(Box::new(opened)))
            }
            LinkKind::Verbs => {
                let absent = || Failure { reason: "not offered".into(), fix: String::new() };
                let engine = self.node.verbs.as_ref().ok_or_else(absent)?;
                let prepared = begun.ok_or_else(absent)?;
                let theirs = self.their_terms().await;
                let opened = engine.open(prepared, &theirs).await?;
                Ok(Prepared::Verbs(Box::new(opened)))
            }
            #[cfg(feature = "mock")]
            LinkKind::Mock => {
                crate::link::mock::pair(self.token, &self.node.config.mock, self.blob(kind))
                    .map(|link| Prepared::Link(Box::new(link)))
                    .map_err(|reason| Failure { reason, fix: String::new() })
            }
            #[cfg(not(feature = "mock"))]
            LinkKind::Mock => {
                Err(Failure { reason: "not in this build".into(), fix: String::new() })
            }
        }
    }

    /// The next message that does not say the peer's terms; those are put aside.
    async fn hear_past_terms(&self) -> Result<Setup> {
        loop {
            match self.hear().await? {
                Setup::Terms(terms) => {
                    // Twice for one link says nothing that anybody waits for.
                    if lock(&self.terms).replace(terms).is_some() {
                        return Err(bad(&self.shown, "terms that were said already"));
                    }
                }
                other => return Ok(other),
            }
        }
    }

    /// The peer's terms. Whoever polls this hears what the peer says first, in the same turn.
    async fn their_terms(&self) -> Vec<u8> {
        poll_fn(|_| match lock(&self.terms).take() {
            Some(terms) => Poll::Ready(terms),
            None => Poll::Pending,
        })
        .await
    }

    async fn say(&self, setup: &Setup) -> Result<()> {
        let bytes = setup.encode();
        self.stream
            .write_all(&bytes)
            .await
            .map_err(|error| lost(&self.shown, "setting links up", &error))
    }

    async fn hear(&self) -> Result<Setup> {
        let lost = |error: io::Error| lost(&self.shown, "setting links up", &error);
        let mut prefix = [0; SETUP_PREFIX_BYTES];
        self.stream.read_exact(&mut prefix).await.map_err(lost)?;
        let len = Setup::body_len(prefix).map_err(|error| bad(&self.shown, error.to_string()))?;
        let mut body = vec![0; len];
        self.stream.read_exact(&mut body).await.map_err(lost)?;
        Setup::decode(&body).map_err(|error| bad(&self.shown, error.to_string()))
    }
}

fn stalled(share: Duration, unasked: bool) -> Failure {
    let why = match unasked {
        true => "which is what links that nobody named may take",
        false => "half of what time was left",
    };
    let reason = format!("setting it up took longer than {share:.1?}, {why}");
    Failure { reason, fix: String::new() }
}

fn at_the_peer(failure: Failure) -> Failure {
    Failure { reason: format!("at the peer: {}", failure.reason), fix: failure.fix }
}

/// A link that is up on this side.
enum Prepared {
    Link(Box<dyn Link>),
    /// The connection that the bootstrap runs on.
    Bootstrap,
    /// Links that keep the bootstrap connection beside them, as the sign that the peer lives.
    Ucx(Box<ucx::Opened>),
    Verbs(Box<verbs::Opened>),
}
