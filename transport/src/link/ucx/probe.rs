//! Whether UCX's queues in shared memory still move.
//!
//! Whoever sends to a worker over memory of this host puts the message into a place of one ring, the
//! same for all senders: it takes the place, then fills it. One that is killed in between leaves a place
//! that is never filled, and nothing behind it is ever read. UCX does not notice: links to peers that
//! live wait for ever. As the ring is not empty the worker cannot be armed, so that a core polls; if it was
//! armed before, nobody is woken.
//!
//! So a while after a link has ended the node sends itself a message through each ring that its links have
//! used: from a worker of its own for that, which has no other transport. A place is taken after all
//! those that were taken before, so a message that comes says that none of them holds up the ring. One
//! that does not come, however long the worker is polled, says that the worker is of no use any more.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Context;
use std::time::{Duration, Instant};

use smallvec::SmallVec;
use thalweg_ffi::ucx::Ucx;

use super::describe;
use super::engine::{Slot, ping, secret};
use super::worker::{Ep, Worker};
use crate::runtime::{Reactor, Sleep, Timers};

/// From the end of a link to the question. The peer may go on sending until it has noticed that end; and
/// a node that ends as well need not ask any more.
const ASK_AFTER: Duration = Duration::from_secs(1);
/// How long a message of our own may take. A living sender that is not scheduled, or stopped, between
/// taking a place and filling it holds up the ring for as long.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often the worker is polled in that time, at least: a process that was stopped has not looked.
const LOOKS_MIN: u32 = 200;
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// How often in a row a question is put off that could not be asked.
const PUT_OFF_MAX: u32 = 8;
/// Turns of both workers in one look, with [`STEPS`] steps each: while others send, the ring may be full.
const TURNS: usize = 4;
const STEPS: usize = 64;

/// What a node's engine knows about its worker's rings.
#[derive(Default)]
pub(super) struct Probe {
    state: State,
    /// Kept while links end all the time: making one takes some milliseconds.
    askers: Vec<Asker>,
    /// How often the question was put off.
    put_off: u32,
}

#[derive(Default)]
enum State {
    #[default]
    Quiet,
    Waits(Sleep),
    Asks(Question),
}

/// A worker that has one transport, and a connection to the node's worker by it.
struct Asker {
    // In this order: the endpoint is closed before its slot is given up.
    ep: Ep,
    slot: Slot,
    transport: &'static str,
}

impl Asker {
    fn new(
        ucx: &'static Ucx,
        reactor: &Reactor,
        transport: &'static str,
        to: &Worker,
    ) -> Result<Asker, String> {
        let worker = Worker::over(ucx, reactor, transport).map_err(|absent| absent.reason)?;
        let slot = Slot::internal(&worker, secret()?).ok_or("no slot")?;
        let mut locked = worker.lock();
        // Nobody asks what has become of what it sent.
        let left = slot.mailbox.inbox(&mut locked.key).leave();
        let ep = locked.connect(&to.address, &slot.mailbox, &worker);
        drop(locked);
        drop(left);
        let ep = ep.map_err(|status| describe(ucx, "no way to the own worker", status))?;
        Ok(Asker { ep, slot, transport })
    }

    /// Sends a message to that slot.
    fn ask(&self, to: &Slot) -> Result<(), String> {
        let worker = &self.slot.worker;
        ping(&mut worker.lock(), &self.ep, to.mailbox.address)
            .map_err(|status| describe(worker.ucx, "nothing is sent to the own worker", status))
    }

    /// Whether UCX has given up the connection.
    fn has_failed(&self) -> bool {
        let mut worker = self.slot.worker.lock();
        self.slot.mailbox.inbox(&mut worker.key).fault.is_some()
    }
}

/// Messages that are on their way through the rings.
struct Question {
    since: Instant,
    looks: u32,
    next: Option<Sleep>,
    /// Where those arrive that have not come yet, and by which transport.
    open: Vec<(&'static str, Slot)>,
    /// One could not be sent.
    is_partial: bool,
}

impl Probe {
    /// Moves on what there is to be asked about `worker`, and what was asked. The transport whose ring
    /// is held up for good. Otherwise `cx`'s waker is called when there is more to do.
    pub fn poll(
        &mut self,
        worker: &Arc<Worker>,
        reactor: &Reactor,
        timers: &Arc<Timers>,
        cx: &mut Context<'_>,
    ) -> Option<&'static str> {
        loop {
            match &mut self.state {
                State::Quiet => {
                    if !worker.dispatch.suspect.swap(false, Ordering::AcqRel) {
                        self.askers.clear();
                        return None;
                    }
                    self.state = State::Waits(timers.sleep_until(Instant::now() + ASK_AFTER));
                }
                State::Waits(sleep) => {
                    if Pin::new(sleep).poll(cx).is_pending() {
                        return None;
                    }
                    self.state = State::Asks(self.ask(worker, reactor));
                }
                State::Asks(question) => {
                    question.look(worker, &self.askers);
                    if question.open.is_empty() {
                        // What hinders may pass: too many descriptors, or no memory to share.
                        self.put_off = if question.is_partial { self.put_off + 1 } else { 0 };
                        if (1..=PUT_OFF_MAX).contains(&self.put_off) {
                            worker.dispatch.suspect.store(true, Ordering::Release);
                        } else {
                            self.put_off = 0;
                        }
                        self.state = State::Quiet;
                    } else if question.is_stuck() {
                        return question.open.pop().map(|(transport, _)| transport);
                    } else if question.sleeps(timers, cx) {
                        return None;
                    }
                }
            }
        }
    }

    /// Sends a message through each ring that links have used. Where that cannot be done nothing is
    /// known, and nothing is concluded.
    fn ask(&mut self, worker: &Arc<Worker>, reactor: &Reactor) -> Question {
        self.askers.retain(|asker| !asker.has_failed());
        let rings = worker.dispatch.state(&mut worker.lock().key).rings.clone();
        let (mut open, mut is_partial) = (Vec::new(), false);
        for transport in rings {
            match self.ask_through(transport, worker, reactor) {
                Ok(slot) => open.push((transport, slot)),
                Err(why) => {
                    tracing::debug!(target: "thalweg::ucx", transport, why, "not probed");
                    is_partial = true;
                }
            }
        }
        Question { since: Instant::now(), looks: 0, next: None, open, is_partial }
    }

    fn ask_through(
        &mut self,
        transport: &'static str,
        worker: &Arc<Worker>,
        reactor: &Reactor,
    ) -> Result<Slot, String> {
        let answer = Slot::internal(worker, secret()?).ok_or("no slot is free")?;
        let known = self.askers.iter().position(|asker| asker.transport == transport);
        let at = match known {
            Some(at) => at,
            None => {
                self.askers.push(Asker::new(worker.ucx, reactor, transport, worker)?);
                self.askers.len() - 1
            }
        };
        self.askers[at].ask(&answer)?;
        Ok(answer)
    }
}

impl Question {
    /// Polls both ends, and forgets what has come.
    fn look(&mut self, worker: &Arc<Worker>, askers: &[Asker]) {
        self.looks = self.looks.saturating_add(1);
        for _ in 0..TURNS {
            for asker in askers {
                asker.slot.worker.lock().progress_all(STEPS);
            }
            let mut locked = worker.lock();
            locked.progress_all(STEPS);
            let mut come: SmallVec<[Slot; 2]> = SmallVec::new();
            let has_come =
                |(_, slot): &mut (&'static str, Slot)| slot.mailbox.inbox(&mut locked.key).pinged;
            come.extend(self.open.extract_if(.., has_come).map(|(_, slot)| slot));
            let wakes = locked.take_wakes();
            drop(locked);
            drop(come);
            for waker in wakes {
                waker.wake();
            }
            if self.open.is_empty() {
                return;
            }
        }
        // What was not sent says nothing.
        let sent = self.open.len();
        self.open.retain(|(transport, _)| {
            let asker = askers.iter().find(|asker| asker.transport == *transport);
            asker.is_some_and(|asker| !asker.has_failed())
        });
        self.is_partial |= self.open.len() < sent;
    }

    fn is_stuck(&self) -> bool {
        self.looks >= LOOKS_MIN && self.since.elapsed() >= PATIENCE
    }

    /// Waits for the next look. `false`: it is due.
    fn sleeps(&mut self, timers: &Arc<Timers>, cx: &mut Context<'_>) -> bool {
        let next = self.next.get_or_insert_with(|| timers.sleep_until(Instant::now() + LOOK_EVERY));
        let sleeps = Pin::new(next).poll(cx).is_pending();
        if !sleeps {
            self.next = None;
        }
        sleeps
    }
}
