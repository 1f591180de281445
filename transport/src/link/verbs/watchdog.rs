//! Requests that the device never ends.
//!
//! A queue pair sends again for some seconds at most, and then says that it failed (`queues::TIMEOUT`).
//! Soft-RoCE sometimes does not (Linux 6.1): of 150 wires cut in the midst of transfers one left all
//! queue pairs ready, a packet unacknowledged and nothing that would send it again, so that operations
//! waited for ever. So while requests are under way somebody looks every few seconds whether any has
//! ended, at each queue pair for itself: others of the link may go on.
//!
//! The time from one look to the next begins when somebody looked: a process that was stopped for long
//! has missed one look, not all.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::time::{Duration, Instant};

use crate::runtime::{Sleep, Timers};

/// From one look to the next. A queue pair gives up after 1.9 s, by some adapters' timers after 7.5 s,
/// if nothing gets through, and no request is longer than 256 KiB: less than 22 KB/s of it is taken for
/// none.
const TICK: Duration = Duration::from_secs(4);
/// So many of these in a row without an end are too many.
const TICKS_MAX: u32 = 3;

/// What looks find. Of several the greatest counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Finding {
    /// No requests are under way.
    Nothing,
    UnderWay,
    /// They have been for too long, and none has ended.
    Silence,
}

/// What the looks at one queue pair have found.
#[derive(Default)]
pub(super) struct Looks {
    /// Requests were under way at the last one.
    under_way: bool,
    /// Some have ended since.
    ended: bool,
    /// Times from look to look, in a row, in which none ended.
    silent: u32,
}

impl Looks {
    pub fn ended(&mut self) {
        self.ended = true;
    }

    pub fn look(&mut self, under_way: bool) -> Finding {
        let silent = self.under_way && !self.ended;
        self.silent = if silent { self.silent + 1 } else { 0 };
        (self.under_way, self.ended) = (under_way, false);
        match under_way {
            false => Finding::Nothing,
            true if self.silent >= TICKS_MAX => Finding::Silence,
            true => Finding::UnderWay,
        }
    }
}

/// When a link looks.
pub(super) struct Watchdog {
    timers: Arc<Timers>,
    tick: Duration,
    /// Of the look that is to come, if requests were under way at the last one.
    next: Option<(Instant, Sleep)>,
}

impl Watchdog {
    pub fn new(timers: &Arc<Timers>) -> Watchdog {
        Watchdog { timers: timers.clone(), tick: TICK, next: None }
    }

    #[cfg(test)]
    pub fn set_tick(&mut self, tick: Duration) {
        self.tick = tick;
    }

    /// After so long without an end a queue pair is given up, if not a moment later.
    pub fn silence_max(&self) -> Duration {
        self.tick * TICKS_MAX
    }

    /// Whether requests were under way at the last look.
    pub fn knows_of_requests(&self) -> bool {
        self.next.is_some()
    }

    /// Whether it is time to look. Where no requests were under way, it always is.
    pub fn is_due(&self) -> bool {
        self.next.as_ref().is_none_or(|(at, _)| Instant::now() >= *at)
    }

    /// Somebody has looked at all queue pairs.
    pub fn looked(&mut self, found: Finding) {
        self.next = (found > Finding::Nothing).then(|| {
            let at = Instant::now() + self.tick;
            (at, self.timers.sleep_until(at))
        });
    }

    /// Has `cx`'s waker called when it is time to look, if requests were under way. `true`: it is.
    pub fn watch(&mut self, cx: &mut Context<'_>) -> bool {
        let Some((_, sleep)) = &mut self.next else { return false };
        Pin::new(sleep).poll(cx).is_ready()
    }
}
