//! What a node's links over verbs have in common: its devices, their ports and pools, and set-up.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use thalweg_ffi::ibverbs as ffi;

use super::VerbsOptions;
use super::alarm::{Alarm, Alarms};
use super::blob::{self, PORTS_MAX, Port, Terms};
use super::device::{Device, Domain, Event, LocalPort, Unusable, memory_lock_limit};
use super::link::VerbsLink;
use super::messenger::{BUFFERS, Messenger};
use super::queues::Side;
use super::registrations::Registrations;
use super::removal::Removals;
use super::slab::Slabs;
use super::wire::{HEADER_BYTES, Header, Kind};
use crate::link::{Budget, Engine, Progress};
use crate::proto::hello::Failure;
use crate::runtime::{Attempt, Fd, Interest, Reactor, Source, Timers};

/// One device, and what its links share.
struct Adapter {
    device: Arc<Device>,
    /// What it says by itself.
    events: Source,
    slabs: Arc<Slabs>,
    registrations: Arc<Registrations>,
}

/// What there is to use.
struct Adapters {
    /// `None`: it was taken away.
    all: Vec<Option<Adapter>>,
    /// Every address of every port that is up, and whose it is.
    ports: Vec<(LocalPort, usize)>,
}

/// A node's devices.
pub(crate) struct VerbsEngine {
    adapters: Mutex<Adapters>,
    removals: Option<Removals>,
    reactor: Reactor,
    timers: Arc<Timers>,
    alarms: Alarms,
    options: VerbsOptions,
}

/// Events of one device taken in a turn.
const EVENTS_MAX: usize = 64;

fn failure(reason: impl Into<String>) -> Failure {
    Failure { reason: reason.into(), fix: String::new() }
}

fn memory_failed(error: &io::Error) -> Unusable {
    match error.raw_os_error() {
        Some(libc::ENOMEM | libc::EPERM | libc::EAGAIN) => {
            Unusable::MemoryLock { limit_bytes: memory_lock_limit() }
        }
        _ => Unusable::Failed { what: format!("registering memory: {error}") },
    }
}

impl VerbsEngine {
    /// Finds libibverbs, opens the devices, and tries whether memory can be registered.
    pub fn new(
        reactor: &Reactor,
        timers: Arc<Timers>,
        options: VerbsOptions,
    ) -> Result<Arc<Self>, Unusable> {
        let verbs = ffi::load().map_err(|absent| Unusable::Library {
            reason: absent.to_string(),
            fix: absent.fix(),
        })?;
        let devices = Device::open_all(verbs, &options.devices)?;
        let mut adapters = Vec::new();
        let mut ports = Vec::new();
        let mut down = Vec::new();
        for device in &devices {
            let (up, others) = device.ports();
            down.extend(others);
            if up.is_empty() {
                continue;
            }
            let domain = Domain::new(device).map_err(|error| Unusable::Failed {
                what: format!("a protection domain of {}: {error}", device.name),
            })?;
            let slabs = Arc::new(Slabs::new(&domain, BUFFERS));
            let slab = slabs.take().map_err(|error| memory_failed(&error))?;
            slabs.give(slab);
            ports.extend(up.into_iter().map(|port| (port, adapters.len())));
            let events = device
                .events()
                .try_clone_to_owned()
                .and_then(|fd| reactor.source(Fd::new(fd), Interest::Read))
                .map_err(|error| Unusable::Failed {
                    what: format!("watching the events of {}: {error}", device.name),
                })?;
            let registrations = Registrations::new(&domain);
            let adapter = Adapter { device: device.clone(), events, slabs, registrations };
            adapters.push(Some(adapter));
        }
        if ports.is_empty() {
            return Err(Unusable::PortDown { ports: down.join(", ") });
        }
        ports.truncate(PORTS_MAX);
        let removals = Removals::new(reactor)
            .inspect_err(|error| tracing::debug!(%error, "removals of devices are not announced"))
            .ok();
        let (reactor, alarms) = (reactor.clone(), Alarms::default());
        let adapters = Mutex::new(Adapters { all: adapters, ports });
        Ok(Arc::new(VerbsEngine { adapters, removals, reactor, timers, alarms, options }))
    }

    fn adapters(&self) -> MutexGuard<'_, Adapters> {
        self.adapters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the links of a device that it is gone, and lets go of it, so that it can go.
    fn let_go(&self, adapters: &mut Adapters, which: usize, why: String) {
        self.alarms.hear(which, &Event::DeviceGone { why });
        adapters.ports.retain(|(_, whose)| *whose != which);
        adapters.all[which] = None;
    }

    fn hear_removals(&self, adapters: &mut Adapters, cx: &mut Context<'_>) -> Progress {
        let Some(removals) = &self.removals else { return Progress::Idle };
        for _ in 0..EVENTS_MAX {
            let file_name = match removals.poll(cx) {
                Poll::Ready(Ok(Some(file_name))) => file_name,
                Poll::Ready(Ok(None)) => continue,
                Poll::Ready(Err(_)) | Poll::Pending => return Progress::Idle,
            };
            let is_it = |adapter: &Adapter| adapter.device.file_name == file_name;
            let which = adapters.all.iter().position(|adapter| adapter.as_ref().is_some_and(is_it));
            if let Some(which) = which {
                let why = format!("the device {file_name} is being removed");
                self.let_go(adapters, which, why);
            }
        }
        Progress::More
    }

    /// What was found, for people.
    pub fn found(&self) -> String {
        let adapters = self.adapters();
        let ports: Vec<String> = adapters.ports.iter().map(|(port, _)| port.to_string()).collect();
        ports.join(", ")
    }

    fn own(&self) -> Vec<Port> {
        self.adapters().ports.iter().map(|(port, _)| port.port).collect()
    }

    /// What the hello says.
    pub fn blob(&self) -> Vec<u8> {
        blob::encode(&self.own())
    }

    /// Whether a pair of ports can be tried.
    pub fn verdict(&self, theirs: &[u8]) -> Result<(), (String, Option<String>)> {
        let own = self.own();
        if own.is_empty() {
            return Err(("every device of this side was taken away".into(), None));
        }
        blob::verdict(&own, theirs)
    }

    /// Chooses a pair of ports, and makes queues at this side's.
    pub fn prepare(&self, theirs: &[u8], connects: bool) -> Result<Prepared, Failure> {
        let theirs =
            blob::decode(theirs).ok_or_else(|| failure("the peer's offer is malformed"))?;
        let own = self.own();
        let chosen = match connects {
            true => blob::choose(&own, &theirs),
            false => blob::choose(&theirs, &own).map(|(theirs, own)| (own, theirs)),
        };
        let (at, to) = chosen.ok_or_else(|| failure("no port reaches one of the peer's"))?;
        let adapters = self.adapters();
        let (port, which) = adapters.ports.get(at).ok_or_else(|| failure("the port is gone"))?;
        let mut random = [0; 4];
        getrandom::fill(&mut random)
            .map_err(|error| failure(format!("random numbers: {error}")))?;
        let first_packet = u32::from_ne_bytes(random) & 0xff_ffff;
        let adapter = adapters.all[*which].as_ref().ok_or_else(|| failure("the device is gone"))?;
        let mut messenger = Messenger::new(&adapter.slabs, port, first_packet)
            .map_err(|error| failure(format!("queues at {port}: {error}")))?;
        let ports = if connects { (at as u8, to as u8) } else { (to as u8, at as u8) };
        let registrations = adapter.registrations.clone();
        let alarm = self.alarms.add(*which, messenger.queues().identities());
        Ok(Prepared { messenger, ports, to: theirs[to], registrations, alarm })
    }

    /// Connects to the peer's queues, and waits until both directions are known to work.
    pub async fn open(&self, prepared: Prepared, terms: &[u8]) -> Result<Opened, Failure> {
        let Prepared { mut messenger, ports, to, registrations, alarm } = prepared;
        let terms =
            Terms::decode(terms).ok_or_else(|| failure("the peer's terms are malformed"))?;
        if terms.ports != ports {
            return Err(failure("the peer chose another pair of ports"));
        }
        let port = messenger.port().to_string();
        let failed = |doing: &str, error: &io::Error| failure(format!("{doing} {port}: {error}"));
        messenger.connect(to, &terms).map_err(|error| failed("connecting from", &error))?;
        let channel = messenger
            .queues()
            .descriptor()
            .try_clone_to_owned()
            .and_then(|fd| self.reactor.source(Fd::new(fd), Interest::Read))
            .map_err(|error| failed("watching the events of", &error))?;
        messenger
            .send(Header::about(Kind::Ping, 0, 0), HEADER_BYTES, |_| {})
            .map_err(|error| failed("sending from", &error))?;
        let limit = self.options.setup_timeout;
        let mut patience = self.timers.sleep_until(Instant::now() + limit);
        let mut seen = Seen::default();
        poll_fn(|cx| {
            match seen.look(&mut messenger, &channel, cx) {
                Ok(true) => return Poll::Ready(Ok(())),
                Ok(false) => {}
                Err(why) => return Poll::Ready(Err(why)),
            }
            Pin::new(&mut patience).poll(cx).map(|()| {
                Err(format!("queue pairs are connected, but nothing came within {limit:?}"))
            })
        })
        .await
        .map_err(failure)?;
        let options = self.options.clone();
        Ok(Opened { messenger, channel, registrations, alarm, received: seen.early, options })
    }
}

impl Engine for VerbsEngine {
    fn poll(&self, cx: &mut Context<'_>, _budget: &mut Budget) -> Progress {
        let mut adapters = self.adapters();
        for which in 0..adapters.all.len() {
            let mut left = EVENTS_MAX;
            while left > 0
                && let Some(Adapter { device, events, .. }) = &adapters.all[which]
            {
                left -= 1;
                match events.poll_read(cx, |_| device.take_event().map(Attempt::More)) {
                    Poll::Ready(Ok(Event::DeviceGone { why })) => {
                        self.let_go(&mut adapters, which, why);
                    }
                    Poll::Ready(Ok(event)) => self.alarms.hear(which, &event),
                    // An error is the runtime's, which others report, or the device's, which has
                    // nothing more to say.
                    Poll::Ready(Err(_)) | Poll::Pending => break,
                }
            }
            if left == 0 {
                return Progress::More;
            }
        }
        self.hear_removals(&mut adapters, cx)
    }
}

/// What was seen of both directions at set-up.
#[derive(Default)]
struct Seen {
    arrived: bool,
    came: bool,
    /// What the peer sent after its ping.
    early: VecDeque<super::queues::Completion>,
    sent: VecDeque<super::queues::Completion>,
}

impl Seen {
    /// Whether both directions work. `Ok(false)`: not yet, and `cx`'s waker is registered.
    fn look(
        &mut self,
        messenger: &mut Messenger,
        channel: &Source,
        cx: &mut Context<'_>,
    ) -> Result<bool, String> {
        let failed = |error: io::Error| format!("trying the connection: {error}");
        loop {
            let queues = messenger.queues();
            for side in [Side::Receive, Side::Send] {
                queues.arm(side).map_err(failed)?;
            }
            self.take(messenger)?;
            if self.arrived && self.came {
                return Ok(true);
            }
            let queues = messenger.queues();
            match channel.poll_read(cx, |_| queues.take_event().map(Attempt::More)) {
                Poll::Pending => return Ok(false),
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Err(failed(error)),
            }
        }
    }

    fn take(&mut self, messenger: &mut Messenger) -> Result<(), String> {
        let failed = |error: io::Error| format!("trying the connection: {error}");
        messenger.take(Side::Receive, &mut self.early).map_err(failed)?;
        messenger.take(Side::Send, &mut self.sent).map_err(failed)?;
        let verbs = messenger.port().device.verbs;
        let bad = |c: &super::queues::Completion| c.status != ffi::IBV_WC_SUCCESS;
        if let Some(bad) = self.early.iter().chain(&self.sent).find(|c| bad(c)) {
            let why = verbs.describe(bad.status);
            return Err(format!(
                "the peer is not reached: {why} (status {}, vendor {})",
                bad.status, bad.vendor
            ));
        }
        for completion in self.sent.drain(..) {
            messenger.ended(&completion);
            self.arrived = true;
        }
        if !self.came
            && let Some(first) = self.early.pop_front()
        {
            let message = messenger.message(&first);
            if message.is_none_or(|(header, ..)| header.kind != Kind::Ping) {
                return Err("the peer's first message is none of this protocol's".into());
            }
            messenger.repost(&first, true).map_err(failed)?;
            self.came = true;
        }
        Ok(())
    }
}

/// Queues that wait to hear of the peer's.
pub(crate) struct Prepared {
    messenger: Messenger,
    ports: (u8, u8),
    to: Port,
    registrations: Arc<Registrations>,
    alarm: Arc<Alarm>,
}

impl Prepared {
    /// What the peer has to know.
    pub fn terms(&self) -> Vec<u8> {
        self.messenger.terms(self.ports).encode()
    }
}

/// A link that works, and lacks the connection that tells of the peer's death.
pub(crate) struct Opened {
    pub(super) messenger: Messenger,
    pub(super) channel: Source,
    pub(super) registrations: Arc<Registrations>,
    pub(super) alarm: Arc<Alarm>,
    pub(super) received: VecDeque<super::queues::Completion>,
    pub(super) options: VerbsOptions,
}

impl Opened {
    /// The link. `bootstrap` stays open, and is silent from now on.
    pub fn into_link(self, bootstrap: Source) -> VerbsLink {
        VerbsLink::new(self, bootstrap)
    }
}
