//! The resident task: progress for endpoints that nobody polls, deadlines, handshakes.
//!
//! One a node. It sleeps unless something happened, and its work per wake is bounded.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

use super::board::{EndpointId, Pulse};
use super::direct::Ward;
use super::node::{NodeShared, Task};
use crate::error::CloseReason;
use crate::link::{Budget, Progress};
use crate::runtime::{Sleep, Ticker};

/// How often the watch looks. An operation that is woken and never polled delays the endpoint's
/// other traffic by at most two of these.
const WATCH_EVERY: Duration = Duration::from_millis(1);

/// How often a host's turn ends with a look at the watch list, in the long run: for a message that
/// comes alone that saves two ticks, where messages follow each other closely the list is cheaper.
const REST_EVERY: Duration = Duration::from_micros(250);
/// So much of that may have been saved up: a request, its answer and what follows come at once.
const RESTS_SAVED: Duration = Duration::from_millis(1);

/// Handshakes and other tasks polled in one turn.
const TASKS_PER_TURN: usize = 64;

pub(crate) struct Resident {
    node: Arc<NodeShared>,
    tasks: FuturesUnordered<Task>,
    wards: FuturesUnordered<Ward>,
    ready: Vec<Arc<Pulse>>,
    watched: Vec<Watched>,
    newly_watched: Vec<Arc<Pulse>>,
    ticker: Ticker,
    /// A host's tasks have their turn after this one, and after them another one comes.
    before_tasks: bool,
    /// They have had it: the watch need not wait for a tick.
    rests: bool,
    /// From when on the next such look is due.
    rests_from: Instant,
    /// Endpoints whose peers may owe an acknowledgement; looked at every `patrol_every`.
    patrolled: HashMap<EndpointId, Arc<Pulse>>,
    patrol_every: Duration,
    next_patrol: Option<Sleep>,
    /// Set when the node is winding up: when patience ends.
    winding_up: Option<Sleep>,
}

struct Watched {
    pulse: Arc<Pulse>,
    last: Option<u64>,
}

impl Resident {
    pub fn new(node: Arc<NodeShared>) -> io::Result<Self> {
        let ticker = Ticker::new(&node.reactor, WATCH_EVERY)?;
        let patrol_every = (node.config.keepalive / 4).max(Duration::from_millis(250));
        Ok(Resident {
            node,
            tasks: FuturesUnordered::new(),
            wards: FuturesUnordered::new(),
            ready: Vec::new(),
            watched: Vec::new(),
            newly_watched: Vec::new(),
            ticker,
            before_tasks: false,
            rests: false,
            rests_from: Instant::now(),
            patrolled: HashMap::new(),
            patrol_every,
            next_patrol: None,
            winding_up: None,
        })
    }

    /// Whether tasks of a host's have their turn after the next one of these, and then
    /// [`Resident::rests`] is called.
    pub fn before_tasks(&mut self, yes: bool) {
        self.before_tasks = yes;
    }

    /// All tasks of the host's that were woken have polled what they wait for: an endpoint that is on
    /// the watch list in the next turn is taken over at once, if that was not done often just
    /// before. `true`: that turn is needed, even if nobody was woken.
    pub fn rests(&mut self) -> bool {
        self.before_tasks = false;
        let now = Instant::now();
        self.rests = self.rests_from <= now;
        if self.rests {
            let saved = now.checked_sub(RESTS_SAVED).unwrap_or(now);
            self.rests_from = self.rests_from.max(saved) + REST_EVERY;
        }
        !self.watched.is_empty() && (self.rests || !self.ticker.is_running())
    }

    /// One turn. Ready: the node has wound up, or its runtime has ended.
    fn turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.node.board.register_resident(cx.waker());
        if let Err(error) = self.node.timers.poll_expired(cx) {
            tracing::debug!(%error, "the resident task ends");
            return Poll::Ready(());
        }
        self.poll_engines(cx);
        self.poll_tasks(cx);
        self.drive_ready();
        self.watch(cx);
        self.patrol(cx);
        self.poll_wards(cx);
        self.wind_up(cx)
    }

    fn poll_engines(&mut self, cx: &mut Context<'_>) {
        for engine in &self.node.engines {
            let mut budget = Budget::TURN;
            if engine.poll(cx, &mut budget) == Progress::More {
                cx.waker().wake_by_ref();
            }
        }
    }

    fn poll_tasks(&mut self, cx: &mut Context<'_>) {
        self.tasks.extend(self.node.take_new_tasks());
        for _ in 0..TASKS_PER_TURN {
            match self.tasks.poll_next_unpin(cx) {
                Poll::Ready(Some(())) => {}
                Poll::Ready(None) | Poll::Pending => return,
            }
        }
        cx.waker().wake_by_ref();
    }

    /// After driving, which may have ended endpoints.
    fn poll_wards(&mut self, cx: &mut Context<'_>) {
        self.wards.extend(self.node.take_new_wards());
        for _ in 0..TASKS_PER_TURN {
            match self.wards.poll_next_unpin(cx) {
                Poll::Ready(Some(())) => {}
                Poll::Ready(None) | Poll::Pending => return,
            }
        }
        cx.waker().wake_by_ref();
    }

    fn drive_ready(&mut self) {
        let mut ready = std::mem::take(&mut self.ready);
        self.node.board.take_ready(&mut ready);
        for pulse in ready.drain(..) {
            pulse.dequeued();
            if let Some(endpoint) = self.node.endpoint(pulse.id) {
                endpoint.resident_turn();
                self.patrolled.entry(pulse.id).or_insert(pulse);
            }
        }
        self.ready = ready;
    }

    fn watch(&mut self, cx: &mut Context<'_>) {
        self.node.board.take_watched(&mut self.newly_watched);
        for pulse in self.newly_watched.drain(..) {
            self.patrolled.entry(pulse.id).or_insert_with(|| pulse.clone());
            self.watched.push(Watched { pulse, last: None });
        }
        if std::mem::take(&mut self.rests) {
            let node = &self.node;
            self.watched.retain(|watched| {
                node.endpoint(watched.pulse.id).is_some_and(|endpoint| !endpoint.rest())
            });
        }
        if self.watched.is_empty() {
            self.ticker.stop();
            return;
        }
        if self.before_tasks && !self.ticker.is_running() || !self.ticker.poll_tick(cx) {
            return;
        }
        let node = &self.node;
        self.watched.retain_mut(|watched| {
            let Some(endpoint) = node.endpoint(watched.pulse.id) else { return false };
            match endpoint.watch_turn(watched.last) {
                Some(activity) => {
                    watched.last = Some(activity);
                    true
                }
                None => false,
            }
        });
        if self.watched.is_empty() {
            self.ticker.stop();
        }
    }

    /// Looks for peers that have fallen silent with bytes unacknowledged. Only endpoints that were
    /// active lately are looked at: the others owe nothing, and the kernel's keepalive sees to
    /// them. Those on the watch list are polled by others, who may make them owe something after
    /// they were found to owe nothing: they stay.
    fn patrol(&mut self, cx: &mut Context<'_>) {
        if self.patrolled.is_empty() {
            return;
        }
        let every = self.patrol_every;
        let sleep = self
            .next_patrol
            .get_or_insert_with(|| self.node.timers.sleep_until(Instant::now() + every));
        if Pin::new(sleep).poll(cx).is_pending() {
            return;
        }
        self.next_patrol = None;
        let node = &self.node;
        self.patrolled.retain(|id, pulse| {
            node.endpoint(*id).is_some_and(|endpoint| endpoint.check() || pulse.is_watched())
        });
        if !self.patrolled.is_empty() {
            let mut sleep = self.node.timers.sleep_until(Instant::now() + every);
            // Registers the waker; it cannot be over yet, and if it were the next turn sees it.
            if Pin::new(&mut sleep).poll(cx).is_ready() {
                cx.waker().wake_by_ref();
            }
            self.next_patrol = Some(sleep);
        }
    }

    fn wind_up(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.node.is_released() {
            return Poll::Pending;
        }
        if self.winding_up.is_none() {
            for endpoint in self.node.all_endpoints() {
                endpoint.core().close(CloseReason::new(0, "the node was dropped"));
                endpoint.pulse.enqueue();
            }
            // Listeners and handshakes end here.
            self.tasks.clear();
            let patience = Instant::now() + self.node.config.close_timeout;
            self.winding_up = Some(self.node.timers.sleep_until(patience));
        }
        let out_of_patience = match &mut self.winding_up {
            Some(sleep) => Pin::new(sleep).poll(cx).is_ready(),
            None => true,
        };
        let over = !self.node.has_endpoints() && self.wards.is_empty();
        if out_of_patience || over { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Future for Resident {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.turn(cx)
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        if self.node.fork.forked() {
            // The memory is the parent's, and so may the node's locks be.
            return std::mem::forget(std::mem::take(&mut self.wards));
        }
        for ward in std::mem::take(&mut self.wards) {
            self.node.keep(ward);
        }
        self.node.resident_gone();
    }
}
