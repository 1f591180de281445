//! What a node's links over verbs have in common: its devices, their ports and pools, and set-up.

use std::collections::{HashSet, VecDeque};
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use thalweg_ffi::ibverbs::{self as ffi, Absent, Verbs};

use super::VerbsOptions;
use super::alarm::{Alarm, Alarms};
use super::blob::{self, Offer, PORTS_MAX, Port, Terms};
use super::device::{Device, Domain, Event, LocalPort, Unusable, memory_lock_limit};
use super::link::VerbsLink;
use super::messenger::Messenger;
use super::pool::Pool;
use super::rails::Rail;
use super::registrations::Registrations;
use super::removal::Removals;
use super::setup::{Candidate, Setup, trial_max};
use crate::link::lookout::Look;
use crate::link::{Budget, Engine, Progress};
use crate::proto::hello::Failure;
use crate::runtime::{Fd, FirstUse, FoundOnce, Interest, Reactor, Source, Timers};

/// One device, and what its links share.
struct Adapter {
    device: Arc<Device>,
    /// What it says by itself.
    events: Source,
    pool: Arc<Pool>,
    registrations: Arc<Registrations>,
}

/// What there is to use.
struct Adapters {
    /// `None`: it was taken away.
    all: Vec<Option<Adapter>>,
    /// Every address of every port that was up, as peers are told of them. A place in this list is
    /// what both sides call a port by, so it stays when its device is taken away.
    ports: Vec<Announced>,
}

impl Adapters {
    /// The port in this place, and its device: the number of it, and what links share. `None`: it was
    /// taken away.
    fn at(&self, place: usize) -> Option<(&LocalPort, usize, &Adapter)> {
        let (port, which) = self.ports.get(place)?.here.as_ref()?;
        Some((port, *which, self.all[*which].as_ref()?))
    }
}

/// A port that peers are told of.
struct Announced {
    port: Port,
    /// Where it is, and whose: `None`: its device was taken away.
    here: Option<(LocalPort, usize)>,
}

/// Numbers the ports: addresses of one have the same.
fn number(all: &mut [Announced]) {
    let mut known: Vec<(usize, u8)> = Vec::new();
    for Announced { port, here } in all {
        let Some(place) = here.as_ref().map(|(local, which)| (*which, local.number)) else {
            continue;
        };
        let at = known.iter().position(|known| *known == place).unwrap_or_else(|| {
            known.push(place);
            known.len() - 1
        });
        port.whose = at as u8;
    }
}

/// What is to be done once the lock is released.
#[derive(Default)]
struct After {
    wakers: Vec<Waker>,
    gone: Vec<Adapter>,
}

/// Adapters that go where they are woken, which nobody does with a lock held: to let go of their
/// memory takes its time.
struct Going(#[expect(dead_code, reason = "held until dropped")] Mutex<Vec<Adapter>>);

impl Wake for Going {
    fn wake(self: Arc<Self>) {}
}

impl After {
    fn run(self) {
        drop(self.gone);
        self.wakers.into_iter().for_each(Waker::wake);
    }
}

static FIRST: FirstUse = FirstUse::new();
static FOUND: FoundOnce<Result<Verbs, Absent>> = FoundOnce::new();

/// libibverbs, looked for once in this process.
pub(super) fn library() -> Result<&'static Verbs, Unusable> {
    let found = FOUND.get(ffi::load).ok_or(Unusable::Forked)?;
    found
        .as_ref()
        .map_err(|absent| Unusable::Library { reason: absent.to_string(), fix: absent.fix() })
}

/// A node's devices.
pub(crate) struct VerbsEngine {
    adapters: Mutex<Adapters>,
    removals: Option<Removals>,
    reactor: Reactor,
    timers: Arc<Timers>,
    alarms: Alarms,
    options: VerbsOptions,
    /// Why some devices are not used.
    left_out: Vec<Unusable>,
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

/// Of devices none of which has a port that is up.
fn down_only(left_out: &[Unusable]) -> Unusable {
    let ports: Vec<_> = left_out
        .iter()
        .filter_map(|why| match why {
            Unusable::PortDown { ports } => Some(ports.as_str()),
            _ => None,
        })
        .collect();
    Unusable::PortDown { ports: ports.join(", ") }
}

impl Adapter {
    /// Tries whether memory can be registered, too.
    fn new(reactor: &Reactor, device: &Arc<Device>) -> Result<Adapter, Unusable> {
        let failed = |what: &str, error: io::Error| Unusable::Failed {
            what: format!("{what} {}: {error}", device.name),
        };
        let domain =
            Domain::new(device).map_err(|error| failed("a protection domain of", error))?;
        let pool = Arc::new(Pool::new(&domain));
        pool.give(pool.take().map_err(|error| memory_failed(&error))?);
        let events = device
            .events()
            .try_clone_to_owned()
            .and_then(|fd| reactor.source(Fd::new(fd), Interest::Read))
            .map_err(|error| failed("watching the events of", error))?;
        let registrations = Registrations::new(&domain);
        Ok(Adapter { device: device.clone(), events, pool, registrations })
    }
}

impl VerbsEngine {
    /// Finds libibverbs, opens the devices, and tries whether memory can be registered.
    pub fn new(
        reactor: &Reactor,
        timers: Arc<Timers>,
        options: VerbsOptions,
    ) -> Result<Arc<Self>, Unusable> {
        let verbs = library()?;
        // A library that is not there is not in use.
        if FIRST.inherited() {
            return Err(Unusable::Forked);
        }
        let (devices, mut left_out) = Device::open_all(verbs, &options.devices, &options.except)?;
        let mut adapters = Vec::new();
        let mut ports = Vec::new();
        let mut failed = None;
        for device in &devices {
            let (up, down) = device.ports();
            if !down.is_empty() {
                left_out.push(Unusable::PortDown { ports: down.join(", ") });
            }
            if up.is_empty() {
                continue;
            }
            match Adapter::new(reactor, device) {
                Ok(adapter) => {
                    let here = |local| Some((local, adapters.len()));
                    let announced =
                        |local: LocalPort| Announced { port: local.port, here: here(local) };
                    ports.extend(up.into_iter().map(announced));
                    adapters.push(Some(adapter));
                }
                Err(why) => {
                    failed.get_or_insert_with(|| why.clone());
                    left_out.push(why);
                }
            }
        }
        if ports.is_empty() {
            return Err(failed.unwrap_or_else(|| down_only(&left_out)));
        }
        for why in &left_out {
            // Of ports that are down and that nobody named nobody wants to hear.
            if options.devices.is_empty() && matches!(why, Unusable::PortDown { .. }) {
                tracing::debug!(%why, "an RDMA device is not used");
            } else {
                tracing::warn!(%why, "an RDMA device is not used");
            }
        }
        ports.truncate(PORTS_MAX);
        number(&mut ports);
        let removals = Removals::new(reactor)
            .inspect_err(|error| tracing::debug!(%error, "removals of devices are not announced"))
            .ok();
        let (reactor, alarms) = (reactor.clone(), Alarms::default());
        let adapters = Mutex::new(Adapters { all: adapters, ports });
        let engine = VerbsEngine { adapters, removals, reactor, timers, alarms, options, left_out };
        Ok(Arc::new(engine))
    }

    fn adapters(&self) -> MutexGuard<'_, Adapters> {
        self.adapters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the links of a device that it is gone, and lets go of it, so that it can go.
    fn let_go(&self, adapters: &mut Adapters, which: usize, why: String, after: &mut After) {
        after.wakers.extend(self.alarms.hear(which, &Event::DeviceGone { why }));
        for announced in &mut adapters.ports {
            announced.here.take_if(|(_, whose)| *whose == which);
        }
        after.gone.extend(adapters.all[which].take());
    }

    fn hear_removals(
        &self,
        adapters: &mut Adapters,
        look: &mut Look<'_, '_>,
        after: &mut After,
    ) -> Progress {
        let Some(removals) = &self.removals else { return Progress::Idle };
        for _ in 0..EVENTS_MAX {
            let file_name = match removals.poll(look) {
                Poll::Ready(Ok(Some(file_name))) => file_name,
                Poll::Ready(Ok(None)) => continue,
                Poll::Ready(Err(_)) | Poll::Pending => return Progress::Idle,
            };
            let is_it = |adapter: &Adapter| adapter.device.file_name == file_name;
            let which = adapters.all.iter().position(|adapter| adapter.as_ref().is_some_and(is_it));
            if let Some(which) = which {
                if let Some(adapter) = &adapters.all[which] {
                    adapter.device.set_gone();
                }
                let why = format!("the device {file_name} is being removed");
                self.let_go(adapters, which, why, after);
            }
        }
        Progress::More
    }

    /// The devices in use, by name.
    pub fn devices(&self) -> Vec<String> {
        let adapters = self.adapters();
        adapters.all.iter().flatten().map(|adapter| adapter.device.name.clone()).collect()
    }

    /// What was found, for people.
    pub fn found(&self) -> String {
        let adapters = self.adapters();
        let here = adapters.ports.iter().filter_map(|announced| announced.here.as_ref());
        let mut found = here.map(|(port, _)| port.to_string()).collect::<Vec<_>>().join(", ");
        let ports: HashSet<_> =
            adapters.ports.iter().map(|announced| announced.port.whose).collect();
        if ports.len() > 1 {
            let rails = self.options.rails.min(ports.len());
            found.push_str(&format!("; long payloads by up to {rails} of {} ports", ports.len()));
        }
        for why in &self.left_out {
            found.push_str(&format!("; not used: {why}"));
        }
        found
    }

    /// The ports in the order in which they are announced. Those that are gone reach nobody.
    fn own(&self) -> Offer {
        let adapters = self.adapters();
        let port = |announced: &Announced| match announced.here {
            Some(_) => announced.port,
            None => announced.port.gone(),
        };
        let ports = adapters.ports.iter().map(port).collect();
        Offer { rails: self.options.rails as u8, ports }
    }

    /// What the hello says.
    pub fn blob(&self) -> Vec<u8> {
        self.own().encode()
    }

    /// Whether a pair of ports can be tried.
    pub fn verdict(&self, theirs: &[u8]) -> Result<(), (String, Option<String>)> {
        let own = self.own();
        if own.ports.iter().all(Port::is_gone) {
            return Err(("every device of this side was taken away".into(), None));
        }
        blob::verdict(&own, theirs)
    }

    /// Chooses pairs of ports, and makes queues at this side's.
    /// Setting up takes no longer than `at_most`.
    pub fn prepare(
        &self,
        theirs: &[u8],
        connects: bool,
        at_most: Duration,
    ) -> Result<Prepared, Failure> {
        let theirs =
            Offer::decode(theirs).ok_or_else(|| failure("the peer's offer is malformed"))?;
        let own = self.own();
        let chosen: Vec<(usize, usize)> = match connects {
            true => blob::choose(&own, &theirs),
            false => blob::choose(&theirs, &own).into_iter().map(|(a, b)| (b, a)).collect(),
        };
        let mut chosen = chosen.into_iter();
        let (at, to) = chosen.next().ok_or_else(|| failure("no port reaches one of the peer's"))?;
        let adapters = self.adapters();
        let (port, which, adapter) = adapters.at(at).ok_or_else(|| failure("the port is gone"))?;
        let mut random = [0; 4];
        getrandom::fill(&mut random)
            .map_err(|error| failure(format!("random numbers: {error}")))?;
        let first_packet = u32::from_ne_bytes(random) & 0xff_ffff;
        let mut messenger = Messenger::new(&adapter.pool, port, first_packet)
            .map_err(|error| failure(format!("queues at {port}: {error}")))?;
        let named = |at: usize, to: usize| match connects {
            true => (at as u8, to as u8),
            false => (to as u8, at as u8),
        };
        let registrations = adapter.registrations.clone();
        let alarm = self.alarms.add(which, messenger.queues().identities(), None);
        let mut rails = Vec::new();
        for (at, to) in chosen {
            match self.rail(&adapters, at) {
                Ok(rail) => {
                    let (ports, to) = (named(at, to), theirs.ports[to]);
                    rails.push(Candidate { rail, ports, to });
                }
                Err(why) => tracing::warn!(%why, "a port does not help with long payloads"),
            }
        }
        let (ports, to) = (named(at, to), theirs.ports[to]);
        let why = blob::reason(&own.ports[at], &to);
        let limit = self.options.setup_timeout.min(at_most);
        Ok(Prepared { messenger, ports, to, registrations, alarm, why, rails, limit })
    }

    /// A further rail, at the port in this place.
    fn rail(&self, adapters: &Adapters, at: usize) -> io::Result<Rail> {
        let (port, which, adapter) = adapters.at(at).ok_or(io::ErrorKind::NotConnected)?;
        let queues = Rail::queues(adapter.pool.domain(), port)?;
        let fd = queues.descriptor().try_clone_to_owned()?;
        let channel = self.reactor.source(Fd::new(fd), Interest::Read)?;
        let alarm = self.alarms.add(which, queues.identities(), Some(port.number));
        let rail = Rail::new(queues, channel, adapter.registrations.clone(), alarm);
        rail.with_samples(adapter.pool.domain())
    }

    /// Connects to the peer's queues, and waits until both directions are known to work.
    pub async fn open(
        self: &Arc<Self>,
        prepared: Prepared,
        terms: &[u8],
    ) -> Result<Opened, Failure> {
        let Prepared { mut messenger, ports, to, registrations, alarm, why, rails, limit } =
            prepared;
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
        let mut patience = self.timers.sleep_until(Instant::now() + limit);
        let mut setup = Setup::new(messenger, channel, rails, &terms, self.timers.clone(), limit);
        setup.begin().map_err(|error| failed("sending from", &error))?;
        poll_fn(|cx| {
            if let Poll::Ready(ended) = setup.poll(cx) {
                return Poll::Ready(ended);
            }
            Pin::new(&mut patience).poll(cx).map(|()| {
                Err(format!("queue pairs are connected, but nothing came within {limit:?}"))
            })
        })
        .await
        .map_err(failure)?;
        let options = self.options.clone();
        let timers = self.timers.clone();
        let engine = Arc::downgrade(self);
        let (messenger, channel, rails, received) = setup.into_parts();
        Ok(Opened {
            messenger,
            channel,
            rails,
            registrations,
            alarm,
            engine,
            received,
            options,
            timers,
            why,
        })
    }
}

impl Engine for VerbsEngine {
    fn poll(&self, cx: &mut Context<'_>, _budget: &mut Budget) -> Progress {
        let mut after = After::default();
        let progress = self.hear(&mut self.adapters(), &mut Look::Told(cx), &mut after);
        after.run();
        progress
    }
}

impl VerbsEngine {
    /// Hears what devices and the kernel say, whether or not the runtime has come to see it. What
    /// is to be woken once no lock is held.
    pub(super) fn hear_now(&self) -> Vec<Waker> {
        // Whoever has it sets up a link, or hears by itself.
        let mut adapters = match self.adapters.try_lock() {
            Ok(adapters) => adapters,
            Err(TryLockError::Poisoned(adapters)) => adapters.into_inner(),
            Err(TryLockError::WouldBlock) => return Vec::new(),
        };
        let mut after = After::default();
        // What is left is heard the next time.
        self.hear(&mut adapters, &mut Look::Now, &mut after);
        drop(adapters);
        if !after.gone.is_empty() {
            after.wakers.push(Waker::from(Arc::new(Going(Mutex::new(after.gone)))));
        }
        after.wakers
    }

    /// Hears what devices and the kernel say.
    fn hear(
        &self,
        adapters: &mut Adapters,
        look: &mut Look<'_, '_>,
        after: &mut After,
    ) -> Progress {
        for which in 0..adapters.all.len() {
            let mut left = EVENTS_MAX;
            while left > 0
                && let Some(Adapter { device, events, .. }) = &adapters.all[which]
            {
                left -= 1;
                match look.read(events, |_| device.take_event()) {
                    Poll::Ready(Ok(Event::DeviceGone { why })) => {
                        self.let_go(adapters, which, why, after);
                    }
                    Poll::Ready(Ok(event)) => after.wakers.extend(self.alarms.hear(which, &event)),
                    // An error is the runtime's, which others report, or the device's, which has
                    // nothing more to say.
                    Poll::Ready(Err(_)) | Poll::Pending => break,
                }
            }
            if left == 0 {
                return Progress::More;
            }
        }
        self.hear_removals(adapters, look, after)
    }
}

/// Queues that wait to hear of the peer's.
pub(crate) struct Prepared {
    messenger: Messenger,
    ports: (u8, u8),
    to: Port,
    registrations: Arc<Registrations>,
    alarm: Arc<Alarm>,
    /// Why this pair of ports.
    why: String,
    /// Further ones.
    rails: Vec<Candidate>,
    /// How long setting up may take.
    limit: Duration,
}

impl Prepared {
    /// What the peer has to know.
    pub fn terms(&self) -> Vec<u8> {
        let rails = self.rails.iter().map(|candidate| candidate.rail.terms(candidate.ports));
        let trial_ms = trial_max(self.limit).as_millis() as u16;
        let rails = rails.collect();
        Terms { rails, trial_ms, ..self.messenger.terms(self.ports) }.encode()
    }
}

/// A link that works, and lacks the connection that tells of the peer's death.
pub(crate) struct Opened {
    pub(super) messenger: Messenger,
    pub(super) channel: Source,
    pub(super) rails: Vec<Rail>,
    pub(super) registrations: Arc<Registrations>,
    pub(super) alarm: Arc<Alarm>,
    pub(super) engine: Weak<VerbsEngine>,
    pub(super) received: VecDeque<super::queues::Completion>,
    pub(super) options: VerbsOptions,
    pub(super) timers: Arc<Timers>,
    pub(super) why: String,
}

impl Opened {
    /// The link. `bootstrap` stays open, and is silent from now on.
    pub fn into_link(self, bootstrap: Source) -> VerbsLink {
        VerbsLink::new(self, bootstrap)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::task::Wake;

    use super::super::fake::Fake;
    use super::*;
    use crate::runtime::HostLoop;

    pub(in super::super) fn engine(fakes: &[Fake]) -> Arc<VerbsEngine> {
        let reactor = Reactor::Host(HostLoop::new().expect("an event loop"));
        let adapter = |fake: &Fake| Adapter {
            device: fake.device.clone(),
            events: reactor.source(Fd::new(fake.events()), Interest::Read).expect("a source"),
            pool: fake.pool.clone(),
            registrations: Registrations::new(fake.pool.domain()),
        };
        let all = fakes.iter().map(|fake| Some(adapter(fake))).collect();
        let ports = fakes.iter().enumerate().map(|(which, fake)| {
            let local = fake.port();
            Announced { port: local.port, here: Some((local, which)) }
        });
        let adapters = Mutex::new(Adapters { all, ports: ports.collect() });
        let timers = Arc::new(Timers::new(&reactor).expect("timers"));
        let options = VerbsOptions {
            eager_max: 0,
            max_payload: 0,
            setup_timeout: Duration::ZERO,
            devices: Vec::new(),
            except: Vec::new(),
            rails: 1,
        };
        let (removals, alarms, left_out) = (None, Alarms::default(), Vec::new());
        let made = VerbsEngine { adapters, removals, reactor, timers, alarms, options, left_out };
        Arc::new(made)
    }

    /// The alarm of a link over the first of its devices.
    pub(in super::super) fn alarm(engine: &VerbsEngine) -> Arc<Alarm> {
        engine.alarms.add(0, [0; 2], None)
    }

    /// Asks the engine for something when it is woken.
    struct Asks(Arc<VerbsEngine>, Mutex<Option<String>>);

    impl Wake for Asks {
        fn wake(self: Arc<Self>) {
            *self.1.lock().expect("not poisoned") = Some(self.0.found());
        }
    }

    fn poll(engine: &VerbsEngine) {
        let Reactor::Host(host) = &engine.reactor else { panic!("another reactor") };
        host.drain().expect("events");
        let waker = std::task::Waker::noop();
        while engine.poll(&mut Context::from_waker(waker), &mut Budget { ..Budget::TURN })
            == Progress::More
        {}
    }

    #[test]
    fn a_device_that_goes_keeps_its_place_and_wakes_without_a_lock() {
        let fakes = [Fake::new(), Fake::new()];
        let engine = engine(&fakes);
        let alarm = alarm(&engine);
        let asks = Arc::new(Asks(engine.clone(), Mutex::new(None)));
        assert!(!alarm.watch(&std::task::Waker::from(asks.clone())));
        let before = engine.own();
        fakes[0].say(ffi::IBV_EVENT_DEVICE_FATAL);
        poll(&engine);
        assert!(asks.1.lock().expect("not poisoned").is_some(), "whoever watches is called");
        assert!(alarm.raised().is_some() && fakes[0].device.is_gone());
        let after = engine.own();
        assert!(after.ports[0].is_gone());
        assert_eq!(after.ports[1], before.ports[1], "the others stay what they were called");
        assert!(engine.adapters().all[0].is_none());
        let prepared =
            engine.prepare(&engine.blob(), true, Duration::MAX).map(|prepared| prepared.ports);
        assert_eq!(prepared.ok(), Some((1, 1)));
        fakes[1].say(ffi::IBV_EVENT_DEVICE_FATAL);
        poll(&engine);
        assert!(engine.verdict(&before.encode()).is_err());
    }
}
