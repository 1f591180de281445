//! What a node's links over UCX have in common: progress when nobody polls, and set-up.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use smallvec::SmallVec;
use thalweg_ffi::ucx::{self as ffi, LogLevel, Ucx, Version};

use super::blob::Blob;
use super::bulk::PULLED_INBOX_BYTES;
use super::context::library;
use super::inbox::{Fault, Mailbox};
use super::lanes::{self, Lane};
use super::link::UcxLink;
use super::probe::Probe;
use super::request::{Packed, SendOp};
use super::wire::{Address, Header, Kind, SECRET_BITS, SLOTS_MAX};
use super::worker::{Ep, Worker, lock};
use super::{HELD_UP, Scope, UcxOptions, Unavailable, describe};
use crate::link::{Armed, Budget, Class, Engine, LinkKind, Progress, insist};
use crate::proto::hello::Failure;
use crate::runtime::{Reactor, Sleep, Source, Timers};

/// Steps of progress in one turn.
const STEPS: usize = 64;
/// How often endpoints that are ending are looked after, and a worker that cannot be armed, at first.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// How often one that cannot be armed when nothing has come for a while: every millisecond 3 to 4 % of a core,
/// and UCX may refuse for as long as the worker lives (see `worker::REFUSED_MAX`).
const REFUSED_EVERY_MAX: Duration = Duration::from_millis(8);
/// How often workers that were held up, and whose links others still have.
const RETIRED_EVERY: Duration = Duration::from_secs(1);

/// A node's worker, and what drives it.
pub(crate) struct UcxEngine {
    ucx: &'static Ucx,
    /// The worker's transports over hardware, by name.
    transports: Vec<String>,
    /// Those that we have set for it.
    tls: Option<String>,
    workers: Mutex<Workers>,
    probe: Mutex<Probe>,
    reactor: Reactor,
    timers: Arc<Timers>,
    options: UcxOptions,
    rounds: Mutex<Rounds>,
}

/// When the resident task looks at workers again whose descriptors may tell nothing.
struct Rounds {
    refused_every: Duration,
    /// After how long, and the wait for that.
    next: Option<(Duration, Sleep)>,
}

/// Why it does.
#[derive(Clone, Copy)]
enum Reason {
    /// Endpoints are ending.
    Ends,
    /// UCX refuses to be armed.
    Refuses,
    /// Others still have links of a worker that was held up.
    Retired,
}

#[derive(Default)]
struct Workers {
    /// None after one that was held up, until there is a connection to be made.
    current: Option<Arc<Worker>>,
    /// Those that were held up, for as long as anything of theirs is left.
    retired: Vec<Arc<Worker>>,
    resident: Option<Waker>,
}

/// Workers that were held up: there are hardly ever more.
type Retired = SmallVec<[Arc<Worker>; 1]>;

/// What only one peer can know.
pub(super) fn secret() -> Result<u64, String> {
    let mut secret = [0; 8];
    getrandom::fill(&mut secret).map_err(|error| format!("random numbers: {error}"))?;
    Ok(u64::from_ne_bytes(secret) >> (u64::BITS - SECRET_BITS))
}

fn log(level: LogLevel, text: &str) {
    match level {
        LogLevel::Fatal | LogLevel::Error | LogLevel::Warn => {
            tracing::debug!(target: "thalweg::ucx", ?level, "{text}");
        }
        LogLevel::Info => tracing::trace!(target: "thalweg::ucx", "{text}"),
    }
}

impl UcxEngine {
    /// Finds libucp and makes the node's worker.
    pub fn new(
        reactor: &Reactor,
        timers: Arc<Timers>,
        options: UcxOptions,
    ) -> Result<Arc<Self>, Unavailable> {
        let ucx = library()?;
        ucx.redirect_log(log);
        let worker = Worker::new(ucx, reactor, &options.scope)?;
        Ok(Arc::new(UcxEngine {
            ucx,
            transports: worker.transports.clone(),
            tls: worker.tls().map(str::to_owned),
            workers: Mutex::new(Workers { current: Some(worker), ..Workers::default() }),
            probe: Mutex::default(),
            reactor: reactor.clone(),
            timers,
            options,
            rounds: Mutex::new(Rounds { refused_every: LOOK_EVERY, next: None }),
        }))
    }

    /// What was found, for people.
    pub fn found(&self) -> String {
        let ucx = self.ucx;
        let mut found = format!("UCX {} from {}", ucx.version, ucx.path.display());
        let settings = ffi::site_settings();
        if !settings.is_empty() {
            let list: Vec<String> =
                settings.iter().map(|(name, value)| format!("{name}={value}")).collect();
            found = format!("{found}, with {}", list.join(" "));
        }
        if let Some(tls) = &self.tls {
            found = format!("{found}, for which we set UCX_TLS={tls}");
        }
        if let Scope::Hardware { reach, .. } = &self.options.scope {
            let transports = self.transports.join(", ");
            found = format!("{found}, for {transports} over {}", reach.names());
        }
        found
    }

    pub fn version(&self) -> Version {
        self.ucx.version
    }

    /// Its transports over hardware.
    pub fn transports(&self) -> &[String] {
        &self.transports
    }

    /// Whether UCX took hardware for messages: it chooses by itself, and tells only afterwards.
    pub fn confirm(&self, opened: &Opened) -> Result<(), Failure> {
        if lanes::reach(&opened.lanes, self.options.scope.reach()) {
            return Ok(());
        }
        let took = lanes::in_words(&opened.lanes);
        Err(Failure {
            reason: format!("UCX took no hardware for messages: {took}"),
            fix: insist(LinkKind::Ucx),
        })
    }

    /// A slot for a connection that is being made.
    pub fn reserve(&self) -> Result<Reservation, String> {
        let worker = self.worker()?;
        let limit = self.options.inbox_max_bytes.saturating_add(PULLED_INBOX_BYTES);
        let slot = Slot::for_peer(&worker, secret()?, limit)
            .ok_or_else(|| format!("a node has at most {SLOTS_MAX} links over UCX"))?;
        Ok(Reservation { slot: Some(slot) })
    }

    /// The worker of new links: another one, if the last was held up.
    fn worker(&self) -> Result<Arc<Worker>, String> {
        if let Some(worker) = &lock(&self.workers).current {
            return Ok(worker.clone());
        }
        let made = Worker::new(self.ucx, &self.reactor, &self.options.scope)
            .map_err(|absent| format!("no new worker of UCX's: {}", absent.reason))?;
        let mut workers = lock(&self.workers);
        // Another connection may have been as quick.
        let worker = workers.current.get_or_insert_with(|| made.clone()).clone();
        let resident = workers.resident.clone();
        drop(workers);
        // From now on it has this worker to move.
        if let Some(resident) = resident {
            resident.wake();
        }
        Ok(worker)
    }

    /// Connects to the peer's worker, and waits until both directions are known to work: the peer's
    /// ping has come, and ours has left. From then until the link is polled nobody progresses the
    /// worker on its behalf, so a ping that UCX still had would stay there, and the peer would wait
    /// for it in vain. This takes no longer than `at_most`.
    pub async fn open(
        &self,
        slot: Slot,
        blob: &[u8],
        at_most: Duration,
    ) -> Result<Opened, Failure> {
        let failure = |reason: String| Failure { reason, fix: String::new() };
        let blob = Blob::from_bytes(blob)
            .ok_or_else(|| failure("the peer's offer is malformed".into()))?;
        let ep = self.connect(&slot, &blob).map_err(failure)?;
        let limit = self.options.setup_timeout.min(at_most);
        let mut patience = self.timers.sleep_until(Instant::now() + limit);
        poll_fn(|cx| {
            if let Some(result) = look(&slot, cx) {
                return Poll::Ready(result);
            }
            Pin::new(&mut patience).poll(cx).map(|()| {
                let pinged = slot.mailbox.inbox(&mut slot.worker.lock().key).pinged;
                let missing = match pinged {
                    true => "sent nothing to",
                    false => "brought nothing from",
                };
                Err(format!("UCX connected, but {missing} the peer within {limit:?}"))
            })
        })
        .await
        .map_err(failure)?;
        let mut worker = slot.worker.lock();
        let lanes = worker.lanes(&ep);
        let waker = slot.mailbox.forget_waker(slot.mailbox.inbox(&mut worker.key));
        drop(worker);
        drop(waker);
        Ok(Opened { slot, ep, to: blob.to, lanes, options: self.options.clone() })
    }

    /// An endpoint to the peer's worker, with a ping on its way.
    fn connect(&self, slot: &Slot, blob: &Blob) -> Result<Ep, String> {
        let ucx = self.ucx;
        let mut worker = slot.worker.lock();
        let ep = worker
            .connect(&blob.worker, &slot.mailbox, &slot.worker)
            .map_err(|status| describe(ucx, "UCX finds no way to the peer", status))?;
        // The rest may take long, and never come to its end.
        let _ = worker.lanes(&ep);
        match ping(&mut worker, &ep, blob.to) {
            Ok(()) => Ok(ep),
            Err(status) => {
                // An endpoint that is dropped takes this lock to close itself.
                drop(worker);
                Err(describe(ucx, "UCX sends nothing to the peer", status))
            }
        }
    }

    /// Those that are to be moved: the current one, if it is there, and those that were held up.
    fn all_workers(&self, cx: &Context<'_>) -> (Option<Arc<Worker>>, Retired) {
        let mut workers = lock(&self.workers);
        let Workers { current, retired, resident } = &mut *workers;
        let replaced = match resident {
            Some(known) if known.will_wake(cx.waker()) => None,
            _ => resident.replace(cx.waker().clone()),
        };
        // Nobody else has it, so nobody begins anything; and what has begun is over.
        let is_over = |worker: &mut Arc<Worker>| {
            Arc::strong_count(worker) == 1 && worker.dispatch.ending.load(Ordering::Acquire) == 0
        };
        let over: Retired = retired.extract_if(.., is_over).collect();
        let all = (current.clone(), retired.iter().cloned().collect());
        drop(workers);
        drop(over);
        drop(replaced);
        all
    }

    /// Ends all links of a worker that is held up. The next connection gets another one.
    fn retire(&self, held_up: &Arc<Worker>, transport: &str) {
        {
            let mut workers = lock(&self.workers);
            workers.current = None;
            workers.retired.push(held_up.clone());
        }
        let mut worker = held_up.lock();
        held_up.dispatch.give_up(&mut worker.key);
        let wakes = worker.take_wakes();
        drop(worker);
        tracing::warn!(transport, "{HELD_UP}");
        for waker in wakes {
            waker.wake();
        }
    }

    /// Comes back for what UCX may not tell of. `moved`: this turn has found something.
    fn come_back(&self, reason: Option<Reason>, moved: bool, cx: &mut Context<'_>) {
        let mut rounds = lock(&self.rounds);
        let Rounds { refused_every, next } = &mut *rounds;
        if moved {
            *refused_every = LOOK_EVERY;
        }
        let mut every = match reason {
            None => return *next = None,
            Some(Reason::Ends) => LOOK_EVERY,
            Some(Reason::Refuses) => *refused_every,
            Some(Reason::Retired) => RETIRED_EVERY,
        };
        if let Some((begun, sleep)) = next
            && *begun <= every
        {
            if Pin::new(sleep).poll(cx).is_pending() {
                return;
            }
            // It was for this turn, which found nothing.
            if matches!(reason, Some(Reason::Refuses)) {
                *refused_every = (*refused_every * 2).min(REFUSED_EVERY_MAX);
                every = *refused_every;
            }
        }
        let (_, sleep) = next.insert((every, self.timers.sleep_until(Instant::now() + every)));
        if Pin::new(sleep).poll(cx).is_ready() {
            cx.waker().wake_by_ref();
        }
    }
}

/// Whether both pings are where they belong. `None`: not yet, and `cx`'s waker is called when
/// there is something new. The slot stays parked, so that the resident task goes on progressing.
fn look(slot: &Slot, cx: &mut Context<'_>) -> Option<Result<(), String>> {
    let Slot { worker, mailbox, .. } = slot;
    let ucx = worker.ucx;
    let mut worker = worker.lock();
    let mut more = worker.progress_all(STEPS);
    let inbox = mailbox.inbox(&mut worker.key);
    let replaced = mailbox.park(inbox, cx.waker());
    let found = match inbox.fault {
        _ if inbox.works_both_ways() => Some(Ok(())),
        Some(Fault::Endpoint(status)) => {
            Some(Err(describe(ucx, "UCX could not connect to the peer", status)))
        }
        Some(Fault::Peer(what)) => Some(Err(format!("the peer: {what}"))),
        Some(Fault::Worker) => Some(Err(HELD_UP.into())),
        None => None,
    };
    let armed = worker.arm(None);
    let wakes = worker.take_wakes();
    drop(worker);
    drop(replaced);
    slot.worker.armed();
    for waker in wakes {
        waker.wake();
    }
    match armed {
        Ok(armed) => more |= armed == Armed::Busy,
        Err(error) => return Some(Err(error.detail.clone())),
    }
    if more && found.is_none() {
        cx.waker().wake_by_ref();
    }
    found
}

/// Says that this way works.
pub(super) fn ping(
    worker: &mut super::worker::Locked<'_>,
    ep: &Ep,
    to: Address,
) -> Result<(), thalweg_ffi::ucx::ucs_status_t> {
    let header = Header::new(Kind::Ping, Class::Control, 0, 0, to);
    let mut packed = Packed::new(SendOp::new(), ep.mailbox());
    // SAFETY: it has no payload.
    unsafe { packed.pack(&header, &[], &[], 0) };
    worker.send_packed(ep, &mut packed, SendOp::new).map(drop)
}

/// One turn of a worker, which is armed then. `true`: there is more to do.
fn turn(worker: &Worker, cx: &Context<'_>) -> bool {
    worker.sleeper.set_resident(cx.waker());
    let mut locked = worker.lock();
    let mut more = locked.progress_all(STEPS);
    // One that is held up cannot be armed, and what it has left to do is looked after by time.
    let is_held_up = worker.dispatch.state(&mut locked.key).held_up;
    if !more && !is_held_up && worker.dispatch.parked.load(Ordering::Acquire) > 0 {
        // An error is that of the runtime, which others report.
        more = matches!(locked.arm(None), Ok(Armed::Busy));
    }
    let wakes = locked.take_wakes();
    drop(locked);
    for waker in wakes {
        waker.wake();
    }
    more
}

impl Engine for UcxEngine {
    fn poll(&self, cx: &mut Context<'_>, _budget: &mut Budget) -> Progress {
        let (current, retired) = self.all_workers(cx);
        let (mut more, mut is_ending, mut refuses) = (false, false, false);
        for worker in current.iter().chain(&retired) {
            more |= turn(worker, cx);
            is_ending |= worker.dispatch.ending.load(Ordering::Acquire) > 0;
            refuses |= worker.is_looked_at();
        }
        let reason = if is_ending {
            Some(Reason::Ends)
        } else if refuses {
            Some(Reason::Refuses)
        } else {
            (!retired.is_empty()).then_some(Reason::Retired)
        };
        self.come_back(reason, more, cx);
        if let Some(current) = &current {
            // Nobody but the resident task has it, and others are woken meanwhile.
            let mut probe = std::mem::take(&mut *lock(&self.probe));
            match probe.poll(current, &self.reactor, &self.timers, cx) {
                None => *lock(&self.probe) = probe,
                Some(transport) => {
                    self.retire(current, transport);
                    more = true;
                }
            }
        }
        if more { Progress::More } else { Progress::Idle }
    }
}

/// A registered mailbox. Given back when dropped, with all that came.
pub(crate) struct Slot {
    pub(super) worker: Arc<Worker>,
    pub(super) mailbox: Arc<Mailbox>,
    /// A peer is told of it.
    for_peer: bool,
}

impl Slot {
    fn for_peer(worker: &Arc<Worker>, secret: u64, max_bytes: usize) -> Option<Slot> {
        let mailbox = worker.dispatch.register(worker.ucx, secret, max_bytes)?;
        Some(Slot { worker: worker.clone(), mailbox, for_peer: true })
    }

    /// One that no peer is told of, for pings.
    pub(super) fn internal(worker: &Arc<Worker>, secret: u64) -> Option<Slot> {
        let mailbox = worker.dispatch.register(worker.ucx, secret, 0)?;
        Some(Slot { worker: worker.clone(), mailbox, for_peer: false })
    }

    /// Takes no more, and forgets what came.
    ///
    /// Whom to wake when the gate is open.
    #[must_use = "nobody else may be awake"]
    pub(super) fn close(&self, worker: &mut super::worker::Locked<'_>) -> Option<Waker> {
        self.worker.dispatch.unregister(&mut worker.key, &self.mailbox);
        let inbox = self.mailbox.inbox(&mut worker.key);
        self.mailbox.unpark(inbox);
        let was_closed = inbox.closed;
        let forgotten = inbox.close();
        for desc in forgotten {
            worker.release(desc);
        }
        if self.for_peer && !was_closed { worker.suspect() } else { None }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.worker.forked() {
            return;
        }
        let mut worker = self.worker.lock();
        let resident = self.close(&mut worker);
        let left = self.mailbox.inbox(&mut worker.key).leave();
        drop(worker);
        drop(left);
        resident.into_iter().for_each(Waker::wake);
    }
}

/// A slot that a hello offers to a peer.
pub(crate) struct Reservation {
    slot: Option<Slot>,
}

impl Reservation {
    /// What the hello says.
    pub fn blob(&self) -> Vec<u8> {
        let Some(slot) = &self.slot else { return Vec::new() };
        let worker = &slot.worker;
        let (version, to) = (worker.ucx.version, slot.mailbox.address);
        Blob::new(version, to, worker.transports.clone(), worker.address.clone()).to_bytes()
    }

    pub fn take(&mut self) -> Option<Slot> {
        self.slot.take()
    }
}

/// A link that works, and lacks the connection that tells of the peer's death.
pub(crate) struct Opened {
    // In this order: the endpoint is closed before its slot is given up.
    pub(super) ep: Ep,
    pub(super) slot: Slot,
    pub(super) to: Address,
    pub(super) lanes: Vec<Lane>,
    pub(super) options: UcxOptions,
}

impl Opened {
    /// The link. `bootstrap` stays open, and is silent from now on.
    pub fn into_link(self, bootstrap: Source) -> UcxLink {
        UcxLink::new(self, bootstrap)
    }
}
