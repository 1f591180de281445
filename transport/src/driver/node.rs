//! What the endpoints of one node share.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use super::board::{Board, EndpointId, Pulse};
use super::direct::Ward;
use super::endpoint::EndpointShared;
use super::keys::{Keys, Told};
use super::sync::{Mutex, lock};
use super::waiters::{Place, Waiters};
use crate::config::{Config, Transports};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::link::hardware::{Hardware, Reach};
use crate::link::shm::{ShmEngine, ShmOptions};
use crate::link::ucx::{Scope, UcxEngine, UcxOptions};
use crate::link::verbs::{Unusable, VerbsEngine, VerbsOptions};
use crate::link::{Engine, LinkKind};
use crate::memory::{Allocator, HostPool, SharedPool};
use crate::proto::keys::RemoteKeyWire;
use crate::route::Capability;
use crate::route::auto::{self, ByVerbs};
use crate::route::late::LateLinks;
use crate::runtime::{ForkGuard, Reactor, Timers};
use crate::stats::{NodeStats, Stats};

/// A background piece of work of the node: a handshake, an accept loop.
pub(crate) type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Announcements of endpoints that may wait before the first look for such as are gone.
const ANNOUNCED_MIN: usize = 64;

/// The smallest window that an endpoint gets when the node's budget is used up.
const WINDOW_MIN: u64 = 64 << 10;

/// How long the end of a runtime waits for peers that may still reach memory of this process.
const LAST_LOOK: Duration = Duration::from_millis(100);

#[derive(Default)]
struct Any {
    /// Endpoints with messages, each at most once.
    ready: VecDeque<Weak<EndpointShared>>,
    /// The length at which entries of endpoints that are gone are taken out.
    prune_at: usize,
    /// Emptied at every announcement.
    waiters: Waiters,
}

#[derive(Default)]
struct Totals {
    ended: Stats,
    window_bytes: u64,
}

pub(crate) struct NodeShared {
    pub config: Config,
    pub id: [u8; 16],
    pub reactor: Reactor,
    pub timers: Arc<Timers>,
    pub board: Arc<Board>,
    pub keys: Arc<Keys>,
    pub allocator: Arc<dyn Allocator>,
    pub pool: Arc<SharedPool>,
    pub shm: Option<Arc<ShmEngine>>,
    pub ucx: Option<Arc<UcxEngine>>,
    pub verbs: Option<Arc<VerbsEngine>>,
    pub engines: Vec<Arc<dyn Engine>>,
    pub capabilities: Vec<Capability>,
    pub fork: ForkGuard,
    pub handshakes: AtomicU64,
    pub handshakes_failed: AtomicU64,
    /// It has been warned that a link which nobody named does not come up.
    pub warned: AtomicBool,
    /// Links that nobody named and that take all their time.
    pub late: Mutex<LateLinks>,
    endpoints: Mutex<HashMap<EndpointId, Arc<EndpointShared>>>,
    next_endpoint: AtomicU64,
    new_tasks: Mutex<Vec<Task>>,
    new_wards: Mutex<Vec<Ward>>,
    any: Mutex<Any>,
    totals: Mutex<Totals>,
    /// The last handle is gone, or the node was closed: the resident task winds up.
    released: AtomicBool,
    /// The resident task is gone.
    gone: AtomicBool,
    /// And so are the endpoints that it looked after.
    wound_up: AtomicBool,
}

impl NodeShared {
    pub fn new(config: Config, reactor: Reactor) -> Result<Arc<Self>> {
        config.validate()?;
        let io = |doing: &str, error: &std::io::Error| Error::from_io(Phase::Setup, doing, error);
        let timers = Arc::new(Timers::new(&reactor).map_err(|error| io("making a timer", &error))?);
        let mut id = [0; 16];
        getrandom::fill(&mut id)
            .map_err(|error| io("asking for random numbers", &std::io::Error::other(error)))?;
        let pool = Arc::new(SharedPool::new(config.loan_pool_bytes));
        let allocator = config
            .allocator
            .clone()
            .unwrap_or_else(|| Arc::new(HostPool::new(config.host_pool_bytes)));
        let mut capabilities = Vec::new();
        let mut engines: Vec<Arc<dyn Engine>> = Vec::new();
        let options = ShmOptions {
            single_copy: config.single_copy,
            together: config.peer_write,
            loans: config.loans,
            ptracer_any: config.ptracer_any,
            max_payload: config.max_message_bytes,
            handshake_timeout: config.handshake_timeout,
            ..ShmOptions::default()
        };
        let shm = if config.transports.order().contains(&LinkKind::Shm) {
            match ShmEngine::new(reactor.clone(), timers.clone(), options) {
                Ok(engine) => {
                    capabilities.push(present(LinkKind::Shm, "memfd, pidfd and Unix sockets work"));
                    engines.push(engine.clone());
                    Some(engine)
                }
                Err(unavailable) => {
                    let fix = Some(unavailable.fix).filter(|fix| !fix.is_empty());
                    capabilities.push(absent(LinkKind::Shm, unavailable.reason, fix));
                    None
                }
            }
        } else {
            capabilities.push(present(LinkKind::Shm, "not tried: not among the transports"));
            None
        };
        capabilities.push(present(LinkKind::Tcp, "always available"));
        let hardware = hardware(&config);
        let (verbs, by_verbs) =
            verbs_engine(&config, &hardware, &reactor, &timers, &mut capabilities);
        engines.extend(verbs.clone().map(|engine| engine as Arc<dyn Engine>));
        let ucx = ucx_engine(&config, &hardware, &by_verbs, &reactor, &timers, &mut capabilities);
        engines.extend(ucx.clone().map(|engine| engine as Arc<dyn Engine>));
        #[cfg(feature = "mock")]
        capabilities.push(present(LinkKind::Mock, "for tests within one process"));
        Ok(Arc::new(NodeShared {
            config,
            id,
            reactor,
            timers,
            board: Arc::new(Board::default()),
            keys: Arc::new(Keys::default()),
            allocator,
            pool,
            shm,
            ucx,
            verbs,
            engines,
            capabilities,
            fork: ForkGuard::get(),
            handshakes: AtomicU64::new(0),
            handshakes_failed: AtomicU64::new(0),
            warned: AtomicBool::new(false),
            late: Mutex::new(LateLinks::default()),
            endpoints: Mutex::new(HashMap::new()),
            next_endpoint: AtomicU64::new(1),
            new_tasks: Mutex::new(Vec::new()),
            new_wards: Mutex::new(Vec::new()),
            any: Mutex::new(Any::default()),
            totals: Mutex::new(Totals::default()),
            released: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            wound_up: AtomicBool::new(false),
        }))
    }

    /// Fails when the node can do nothing any more.
    pub fn usable(&self) -> Result<()> {
        if self.fork.forked() {
            return Err(super::op::forked());
        }
        if self.gone.load(Ordering::Acquire) {
            return Err(runtime_gone());
        }
        if self.released.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::Closed, Phase::Setup, "the node is closed"));
        }
        Ok(())
    }

    /// Whether the runtime has ended: nothing will progress any more.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Whether the runtime has ended, and with it all endpoints that there were.
    pub fn has_wound_up(&self) -> bool {
        self.wound_up.load(Ordering::Acquire)
    }

    /// Gives work to the resident task.
    pub fn spawn(&self, task: Task) {
        lock(&self.new_tasks).push(task);
        self.board.wake_resident();
    }

    pub fn take_new_tasks(&self) -> Vec<Task> {
        std::mem::take(&mut *lock(&self.new_tasks))
    }

    /// Takes a region back from peers that have not given it back in time. One piece of work for
    /// each region that was revoked in the last of these times and that a peer held.
    pub fn cut_later(&self, told: Told) {
        if told.is_nobody() {
            return;
        }
        let sleep = self.timers.sleep_until(Instant::now() + self.config.close_timeout);
        self.spawn(Box::pin(async move {
            sleep.await;
            told.cut();
        }));
    }

    /// Has the resident task keep memory until no peer can reach it any more.
    pub fn keep(&self, ward: Ward) {
        lock(&self.new_wards).push(ward);
        self.board.wake_resident();
    }

    pub fn take_new_wards(&self) -> Vec<Ward> {
        std::mem::take(&mut *lock(&self.new_wards))
    }

    pub fn new_pulse(&self) -> Arc<Pulse> {
        Pulse::new(self.next_endpoint.fetch_add(1, Ordering::Relaxed), self.board.clone())
    }

    /// The endpoint is up: the resident task looks after it from now on.
    pub fn add_endpoint(&self, endpoint: &Arc<EndpointShared>) {
        lock(&self.endpoints).insert(endpoint.pulse.id, endpoint.clone());
        endpoint.pulse.enqueue();
        if self.gone.load(Ordering::Acquire) {
            endpoint.fail(runtime_gone());
        }
    }

    pub fn endpoint(&self, id: EndpointId) -> Option<Arc<EndpointShared>> {
        lock(&self.endpoints).get(&id).cloned()
    }

    pub fn all_endpoints(&self) -> Vec<Arc<EndpointShared>> {
        lock(&self.endpoints).values().cloned().collect()
    }

    /// Whether somebody may wait for an endpoint. One of which a lane still keeps some memory does
    /// not count.
    pub fn has_endpoints(&self) -> bool {
        lock(&self.endpoints).values().any(|endpoint| !endpoint.has_settled())
    }

    /// Called once per endpoint, when its lanes are gone.
    pub fn endpoint_ended(&self, endpoint: &EndpointShared) {
        let removed = lock(&self.endpoints).remove(&endpoint.pulse.id);
        let stats = endpoint.core().stats(endpoint.link);
        let mut totals = lock(&self.totals);
        totals.window_bytes -= endpoint.window_bytes();
        merge(&mut totals.ended, &stats);
        drop(totals);
        drop(removed);
        // A closing node waits for this.
        self.board.wake_resident();
    }

    /// A part of the node's budget for a new endpoint: half of what is left, within bounds.
    pub fn take_window(&self) -> u64 {
        let mut totals = lock(&self.totals);
        let left = self.config.node_budget_bytes.saturating_sub(totals.window_bytes);
        let wanted = self.config.message_window_bytes;
        let window = (left / 2).min(wanted).max(WINDOW_MIN.min(wanted));
        totals.window_bytes += window;
        window
    }

    /// Returns what an endpoint that did not come to be had taken.
    pub fn return_window(&self, window: u64) {
        lock(&self.totals).window_bytes -= window;
    }

    /// An endpoint has a message that nobody is waiting for.
    pub fn announce(&self, endpoint: Weak<EndpointShared>) {
        let mut any = lock(&self.any);
        if any.ready.len() >= any.prune_at {
            // Nobody may ever ask: entries of endpoints that are gone must not pile up.
            any.ready.retain(|endpoint| endpoint.strong_count() > 0);
            any.prune_at = (2 * any.ready.len()).max(ANNOUNCED_MIN);
        }
        any.ready.push_back(endpoint);
        let waiters = any.waiters.take();
        drop(any);
        for waker in waiters {
            waker.wake();
        }
    }

    /// The next endpoint that announced itself, or a promise to wake `waker`.
    pub fn next_announced(&self, place: &mut Place, waker: &Waker) -> Option<Arc<EndpointShared>> {
        let mut any = lock(&self.any);
        while let Some(endpoint) = any.ready.pop_front() {
            if let Some(endpoint) = endpoint.upgrade() {
                return Some(endpoint);
            }
        }
        let old = any.waiters.wait(place, waker);
        drop(any);
        drop(old);
        None
    }

    /// Winds the node up: no handle is left, or it was closed.
    pub fn release(&self) {
        self.released.store(true, Ordering::Release);
        self.wake_all_waiters();
        self.board.wake_resident();
    }

    pub fn is_released(&self) -> bool {
        self.released.load(Ordering::Acquire)
    }

    fn wake_all_waiters(&self) {
        let waiters = lock(&self.any).waiters.take();
        waiters.for_each(Waker::wake);
        // Those who connect look whether the node is still there.
        self.timers.wake_all();
    }

    /// Nobody waits at this place for a message any more.
    pub fn leave_announced(&self, place: &mut Place) {
        let old = lock(&self.any).waiters.leave(place);
        drop(old);
    }

    /// The resident task has ended: nothing will progress any more.
    pub fn resident_gone(&self) {
        self.gone.store(true, Ordering::Release);
        if self.fork.forked() {
            return;
        }
        for endpoint in self.all_endpoints() {
            endpoint.fail(runtime_gone());
            endpoint.core().wake_end_waiters();
        }
        // Nobody looks after those whose lanes linger any more: their last handle does.
        let left = std::mem::take(&mut *lock(&self.endpoints));
        drop(left);
        drop(self.take_new_tasks());
        self.last_look(self.take_new_wards());
        self.wound_up.store(true, Ordering::Release);
        self.wake_all_waiters();
    }

    /// Nobody polls these any more: gives their peers a moment to see that this side is over.
    fn last_look(&self, mut wards: Vec<Ward>) {
        let until = Instant::now() + LAST_LOOK;
        let mut cx = Context::from_waker(Waker::noop());
        loop {
            wards.retain_mut(|ward| Pin::new(ward).poll(&mut cx).is_pending());
            if wards.is_empty() || Instant::now() >= until {
                return;
            }
            std::thread::sleep(LAST_LOOK / 20);
        }
    }

    pub fn stats(&self) -> NodeStats {
        let endpoints = self.all_endpoints();
        let mut sum = Stats::default();
        let mut by_link: Vec<(LinkKind, u64)> = Vec::new();
        for endpoint in &endpoints {
            merge(&mut sum, &endpoint.core().stats(endpoint.link));
            match by_link.iter_mut().find(|(link, _)| *link == endpoint.link) {
                Some((_, count)) => *count += 1,
                None => by_link.push((endpoint.link, 1)),
            }
        }
        let totals = lock(&self.totals);
        merge(&mut sum, &totals.ended);
        NodeStats {
            endpoints: endpoints.len() as u64,
            endpoints_by_link: by_link,
            handshakes: self.handshakes.load(Ordering::Relaxed),
            handshakes_failed: self.handshakes_failed.load(Ordering::Relaxed),
            messages_sent: sum.messages_sent,
            messages_received: sum.messages_received,
            message_bytes_sent: sum.message_bytes_sent,
            message_bytes_received: sum.message_bytes_received,
            shared_bytes: self.pool.allocated_bytes() as u64,
            shared_bytes_used: self.pool.loaned_bytes() as u64,
            window_bytes: totals.window_bytes,
        }
    }

    pub fn remote_key(&self, key: u64, len: u64, access: u8) -> RemoteKeyWire {
        RemoteKeyWire { node_id: self.id, key, len, access }
    }
}

/// The engine of the link `verbs`, and what it does with RDMA hardware.
fn verbs_engine(
    config: &Config,
    hardware: &Hardware,
    reactor: &Reactor,
    timers: &Arc<Timers>,
    capabilities: &mut Vec<Capability>,
) -> (Option<Arc<VerbsEngine>>, ByVerbs) {
    let link = LinkKind::Verbs;
    // To name a device is to ask for the link, whatever the device is made of.
    let except = match config.transports {
        Transports::Named(_) if !config.transports.names(link) => {
            capabilities.push(present(link, "not tried: not among the transports"));
            return (None, ByVerbs::Nothing);
        }
        Transports::Auto if config.require_encryption => {
            capabilities.push(in_plain_text(link));
            return (None, ByVerbs::Nothing);
        }
        Transports::Auto if config.verbs_devices.is_empty() => match auto::verbs(hardware) {
            Ok(except) => except,
            Err(declined) => {
                capabilities.push(absent(link, declined.reason, declined.fix));
                return (None, ByVerbs::Nothing);
            }
        },
        Transports::Named(_) | Transports::Auto => Vec::new(),
    };
    let options = VerbsOptions {
        eager_max: config.eager_max_bytes,
        max_payload: config.max_message_bytes,
        setup_timeout: config.handshake_timeout / 2,
        devices: config.verbs_devices.clone(),
        except,
        rails: config.verbs_rails,
    };
    match VerbsEngine::new(reactor, timers.clone(), options) {
        Ok(engine) => {
            capabilities.push(present(link, &engine.found()));
            let uses = ByVerbs::Uses(engine.devices());
            (Some(engine), uses)
        }
        Err(unusable) => {
            capabilities.push(absent(link, unusable.to_string(), unusable.fix()));
            let forked = unusable == Unusable::Forked;
            (None, if forked { ByVerbs::Forked } else { ByVerbs::Nothing })
        }
    }
}

/// The engine of the link `ucx`, if that is asked for, or there is hardware for it, and libucp is here.
fn ucx_engine(
    config: &Config,
    hardware: &Hardware,
    by_verbs: &ByVerbs,
    reactor: &Reactor,
    timers: &Arc<Timers>,
    capabilities: &mut Vec<Capability>,
) -> Option<Arc<UcxEngine>> {
    let link = LinkKind::Ucx;
    let scope = match config.transports {
        Transports::Named(_) if !config.transports.names(link) => {
            capabilities.push(present(link, "not tried: not among the transports"));
            return None;
        }
        Transports::Named(_) => Scope::Named(Reach::all(hardware)),
        Transports::Auto if config.require_encryption => {
            capabilities.push(in_plain_text(link));
            return None;
        }
        Transports::Auto => match auto::ucx(hardware, by_verbs, &config.verbs_devices) {
            Ok(reach) => Scope::Hardware { reach, without: config.ucx_without },
            Err(declined) => {
                capabilities.push(absent(link, declined.reason, declined.fix));
                return None;
            }
        },
    };
    let windows = config.message_window_bytes.saturating_add(config.tag_window_bytes);
    let options = UcxOptions {
        eager_max: config.eager_max_bytes,
        max_payload: config.max_message_bytes,
        // Twice what credit allows: heads, control and one-sided traffic count too.
        inbox_max_bytes: usize::try_from(windows.saturating_mul(2)).unwrap_or(usize::MAX / 2),
        setup_timeout: config.handshake_timeout / 2,
        scope,
    };
    match UcxEngine::new(reactor, timers.clone(), options) {
        Ok(engine) => {
            capabilities.push(present(link, &engine.found()));
            Some(engine)
        }
        Err(unavailable) => {
            let fix = Some(unavailable.fix).filter(|fix| !fix.is_empty());
            capabilities.push(absent(link, unavailable.reason, fix));
            None
        }
    }
}

/// What hardware there is, if any link depends on that: those that are looked for, and what UCX tells
/// peers of.
fn hardware(config: &Config) -> Hardware {
    let matters = match config.transports {
        Transports::Auto => !config.require_encryption,
        Transports::Named(_) => config.transports.names(LinkKind::Ucx),
    };
    if matters { (config.hardware)() } else { Hardware::default() }
}

/// Nothing is loaded that may not be used.
fn in_plain_text(link: LinkKind) -> Capability {
    let reason = "not looked for: encryption is required, and this link has none";
    let fix = "allow plain text, or put both processes on one host";
    absent(link, reason.into(), Some(fix.into()))
}

fn absent(link: LinkKind, reason: String, fix: Option<String>) -> Capability {
    Capability { link, present: false, reason, fix }
}

fn present(link: LinkKind, reason: &str) -> Capability {
    Capability { link, present: true, reason: reason.into(), fix: None }
}

fn merge(into: &mut Stats, from: &Stats) {
    into.messages_sent += from.messages_sent;
    into.messages_received += from.messages_received;
    into.message_bytes_sent += from.message_bytes_sent;
    into.message_bytes_received += from.message_bytes_received;
}

pub(crate) fn runtime_gone() -> Error {
    Error::new(ErrorKind::RuntimeGone, Phase::Transfer, "")
        .with_hint("keep the runtime that made the node alive for as long as its endpoints")
}
