//! Trying a link whose queues are connected: messages both ways, then its further rails.
//!
//! Each side sends a message first. When the peer's has come, its rails are connected, too: each side
//! reads a sample of known bytes by each of them, longer than a packet, and says in a second message by
//! which it came. Those of which both say so are used. The others go, and the link does without.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use thalweg_ffi::ibverbs as ffi;

use super::blob::{Port, Terms};
use super::messenger::Messenger;
use super::queues::{Completion, Remote, Side};
use super::rails::Rail;
use super::wire::{HEADER_BYTES, Header, Kind};
use crate::runtime::{Attempt, Sleep, Source, Timers};

/// How long a further rail may take to answer: many times what it takes where it is reached, so that
/// one which is not holds up little. Where little time is left for all, it is less: [`trial_max`].
const TRIAL_MAX: Duration = Duration::from_secs(1);

/// How long this side gives further rails, when set-up may take that long. Both sides take the shorter
/// one of theirs, so that neither waits in vain for what the other says of them.
pub(super) fn trial_max(limit: Duration) -> Duration {
    TRIAL_MAX.min(limit / 4)
}

/// A further rail that this side has queues for.
pub(super) struct Candidate {
    pub rail: Rail,
    pub ports: (u8, u8),
    /// The port at the peer.
    pub to: Port,
}

/// A rail that is tried.
struct Trial {
    rail: Rail,
    ports: (u8, u8),
    /// What to read at the peer.
    sample: (u64, u32),
    /// Whether an answer came; none yet.
    works: Option<bool>,
}

impl Trial {
    fn new(candidate: Candidate, first_packet: u32, terms: &Terms) -> Option<Trial> {
        let Candidate { mut rail, ports, to } = candidate;
        let theirs = terms.rails.iter().find(|theirs| theirs.ports == ports)?;
        let remote = Remote {
            port: to,
            queue_pair: theirs.queue_pair,
            first_packet: terms.first_packet,
            reads: theirs.reads,
        };
        let connected = rail.connect(first_packet, &remote);
        let mut trial = Trial { rail, ports, sample: theirs.sample, works: None };
        if let Err(error) = connected {
            trial.fails(&format!("it cannot be connected: {error}"));
        }
        Some(trial)
    }

    fn fails(&mut self, why: &str) {
        tracing::warn!(port = %self.rail.port(), why, "a port does not help with long payloads");
        self.works = Some(false);
    }

    fn begin(&mut self) {
        if self.works.is_none()
            && let Err(error) = self.rail.probe(self.sample)
        {
            self.fails(&format!("it cannot be tried: {error}"));
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) {
        if self.works.is_some() {
            return;
        }
        if let Some(why) = self.rail.raised() {
            return self.fails(&why);
        }
        let mut ended = Vec::new();
        match self.rail.poll_ended(cx, &mut ended) {
            Poll::Pending => {}
            Poll::Ready(Err(error)) => self.fails(&format!("it cannot be tried: {error}")),
            Poll::Ready(Ok(())) => match ended.iter().find(|end| is_bad(end)) {
                None if self.rail.has_sample() => self.works = Some(true),
                None => self.fails("what comes is not what the peer has"),
                Some(bad) => self.fails(&describe(&self.rail.port().device, bad)),
            },
        }
    }
}

fn is_bad(completion: &Completion) -> bool {
    completion.status != ffi::IBV_WC_SUCCESS
}

fn describe(device: &super::device::Device, bad: &Completion) -> String {
    let why = device.verbs.describe(bad.status);
    format!("the peer is not reached: {why} (status {}, vendor {})", bad.status, bad.vendor)
}

/// How far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Messages are tried.
    Messages,
    /// Further rails are tried.
    Rails,
    /// The peer is to say which of them work.
    Agreement,
}

/// A link that is being tried.
pub(super) struct Setup {
    messenger: Messenger,
    channel: Source,
    stage: Stage,
    /// This side's first message has arrived, and the peer's has come.
    arrived: bool,
    came: bool,
    /// What the peer sent behind what has been dealt with.
    early: VecDeque<Completion>,
    sent: VecDeque<Completion>,
    trials: Vec<Trial>,
    timers: Arc<Timers>,
    /// How long further rails may take to answer, and until when at the latest.
    trial: Duration,
    latest: Instant,
    /// Until when they may; none yet.
    patience: Option<Sleep>,
}

fn failed(error: &io::Error) -> String {
    format!("trying the connection: {error}")
}

impl Setup {
    /// The messenger is connected; the candidates are by this. `limit`: what set-up may take.
    pub fn new(
        messenger: Messenger,
        channel: Source,
        candidates: Vec<Candidate>,
        terms: &Terms,
        timers: Arc<Timers>,
        limit: Duration,
    ) -> Setup {
        let first_packet = messenger.first_packet();
        let tried = |candidate| Trial::new(candidate, first_packet, terms);
        let mut trials: Vec<Trial> = candidates.into_iter().filter_map(tried).collect();
        // Both sides number them alike.
        trials.sort_by_key(|trial| trial.ports);
        Setup {
            messenger,
            channel,
            stage: Stage::Messages,
            arrived: false,
            came: false,
            early: VecDeque::new(),
            sent: VecDeque::new(),
            trials,
            timers,
            trial: trial_max(limit).min(Duration::from_millis(terms.trial_ms.into())),
            latest: Instant::now() + limit / 2,
            patience: None,
        }
    }

    /// Sends the first message. All queues of this side are connected by now.
    pub fn begin(&mut self) -> io::Result<()> {
        self.messenger.send(Header::about(Kind::Ping, 0, 0), HEADER_BYTES, |_| {})
    }

    /// What has come of it: queues, rails that work, and what the peer has sent since.
    pub fn into_parts(self) -> (Messenger, Source, Vec<Rail>, VecDeque<Completion>) {
        let rails = self.trials.into_iter().map(|trial| trial.rail).collect();
        (self.messenger, self.channel, rails, self.early)
    }

    /// Whether the link works. Pending: not yet, and `cx`'s waker is registered.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), String>> {
        loop {
            let ready = match self.stage {
                Stage::Messages => self.poll_messages(cx, |setup| setup.arrived && setup.came)?,
                Stage::Rails => self.poll_rails(cx),
                Stage::Agreement => return self.poll_agreement(cx),
            };
            if ready.is_pending() {
                return Poll::Pending;
            }
            match self.stage {
                _ if self.trials.is_empty() => return Poll::Ready(Ok(())),
                Stage::Messages => {
                    self.trials.iter_mut().for_each(Trial::begin);
                    self.stage = Stage::Rails;
                }
                Stage::Rails | Stage::Agreement => {
                    let rails = Header::about(Kind::Rails, 0, self.working());
                    let said = self.messenger.send(rails, HEADER_BYTES, |_| {});
                    said.map_err(|error| failed(&error))?;
                    self.stage = Stage::Agreement;
                }
            }
        }
    }

    /// Those that have answered, a bit each.
    fn working(&self) -> u64 {
        let working = (0..).zip(&self.trials).filter(|(_, trial)| trial.works == Some(true));
        working.fold(0, |all, (at, _)| all | 1u64 << at)
    }

    fn poll_rails(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.trials.iter_mut().for_each(|trial| trial.poll(cx));
        if self.trials.iter().all(|trial| trial.works.is_some()) {
            return Poll::Ready(());
        }
        let until = || self.timers.sleep_until(self.latest.min(Instant::now() + self.trial));
        let patience = self.patience.get_or_insert_with(until);
        if Pin::new(patience).poll(cx).is_pending() {
            return Poll::Pending;
        }
        let late = self.trials.iter_mut().filter(|trial| trial.works.is_none());
        late.for_each(|trial| trial.fails("no answer comes"));
        Poll::Ready(())
    }

    fn poll_agreement(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), String>> {
        if self.poll_messages(cx, |setup| !setup.early.is_empty())?.is_pending() {
            return Poll::Pending;
        }
        let header = self.next_message(Kind::Rails)?;
        if header.len >> self.trials.len() != 0 {
            return Poll::Ready(Err("the peer speaks of ports that were not named".into()));
        }
        let agreed = self.working() & header.len;
        let mut at = 0..;
        self.trials.retain(|_| at.next().is_some_and(|at: u32| agreed & 1 << at != 0));
        // The peer has said what it has seen: it reads no sample any more.
        self.trials.iter_mut().for_each(|trial| trial.rail.is_tried());
        Poll::Ready(Ok(()))
    }

    /// Takes what comes until `holds`.
    fn poll_messages(
        &mut self,
        cx: &mut Context<'_>,
        holds: impl Fn(&Setup) -> bool,
    ) -> Result<Poll<()>, String> {
        loop {
            for side in [Side::Receive, Side::Send] {
                self.messenger.queues().arm(side).map_err(|error| failed(&error))?;
            }
            self.take()?;
            if holds(self) {
                return Ok(Poll::Ready(()));
            }
            let Self { messenger, channel, .. } = self;
            let queues = messenger.queues();
            match channel.poll_read(cx, |_| queues.take_event().map(Attempt::More)) {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Err(failed(&error)),
            }
        }
    }

    fn take(&mut self) -> Result<(), String> {
        let Self { messenger, early, sent, .. } = self;
        messenger.take(Side::Receive, early).map_err(|error| failed(&error))?;
        messenger.take(Side::Send, sent).map_err(|error| failed(&error))?;
        if let Some(bad) = early.iter().chain(&*sent).find(|end| is_bad(end)) {
            return Err(describe(&messenger.port().device, bad));
        }
        for completion in sent.drain(..) {
            messenger.ended(&completion);
            self.arrived = true;
        }
        if !self.came && !self.early.is_empty() {
            self.next_message(Kind::Ping)?;
            self.came = true;
        }
        Ok(())
    }

    /// The next message of the peer's, which has come and has to be one of this kind.
    fn next_message(&mut self, kind: Kind) -> Result<Header, String> {
        let strange = || "the peer's first messages are none of this protocol's".to_owned();
        let first = self.early.pop_front().ok_or_else(strange)?;
        let (header, ..) = self.messenger.message(&first).ok_or_else(strange)?;
        if header.kind != kind {
            return Err(strange());
        }
        self.messenger.repost(&first, true).map_err(|error| failed(&error))?;
        Ok(header)
    }
}
