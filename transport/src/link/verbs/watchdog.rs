//! Requests that the device never ends.
//!
//! A queue pair sends again for some seconds at most, and then says that it failed (`queues::TIMEOUT`).
//! Soft-RoCE sometimes does not (Linux 6.1): of 150 wires cut in the midst of transfers one left all
//! queue pairs ready, a packet unacknowledged and nothing that would send it again, so that operations
//! waited for ever. So while requests are under way somebody looks every few seconds whether any has
//! ended.
//!
//! A tick counts only from the time at which the one before it was looked at: a process that was
//! stopped for long has missed one, not all.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::time::{Duration, Instant};

use crate::runtime::{Sleep, Timers};

/// A queue pair gives up after 1.9 s, by some adapters' timers after 7.5 s, if nothing gets through,
/// and no request is longer than 256 KiB: less than 22 KB/s of it is taken for none.
const TICK: Duration = if cfg!(test) { Duration::from_millis(200) } else { Duration::from_secs(4) };
/// So many in a row without an end are too many.
pub(super) const TICKS_MAX: u32 = 3;

/// After so long a link is given up, if not a moment later.
pub(super) const SILENCE_MAX: Duration = TICK.saturating_mul(TICKS_MAX);

pub(super) struct Watchdog {
    timers: Arc<Timers>,
    tick: Option<Tick>,
    /// How many requests had ended when that began.
    ends: u64,
    /// Ticks in a row without an end.
    silent: u32,
}

struct Tick {
    until: Instant,
    over: Sleep,
}

impl Watchdog {
    pub fn new(timers: &Arc<Timers>) -> Watchdog {
        Watchdog { timers: timers.clone(), tick: None, ends: 0, silent: 0 }
    }

    /// Whether a tick is over, so that it is time to look what has ended, and to [`judge`].
    /// One begins where requests are under way; `ends`: how many have ended so far.
    ///
    /// [`judge`]: Watchdog::judge
    pub fn is_due(&mut self, under_way: bool, ends: u64) -> bool {
        match &self.tick {
            Some(tick) => Instant::now() >= tick.until,
            None if under_way => {
                (self.ends, self.silent) = (ends, 0);
                self.begin();
                false
            }
            None => false,
        }
    }

    /// A tick is over, and what has ended is counted. Whether requests have been under way for too long
    /// while none ended.
    pub fn judge(&mut self, under_way: bool, ends: u64) -> bool {
        self.silent = if ends == self.ends { self.silent + 1 } else { 0 };
        self.ends = ends;
        self.tick = None;
        if under_way {
            self.begin();
        }
        under_way && self.silent >= TICKS_MAX
    }

    fn begin(&mut self) {
        let until = Instant::now() + TICK;
        self.tick = Some(Tick { until, over: self.timers.sleep_until(until) });
    }

    /// Has `cx`'s waker called when a tick is over, if one has begun. `true`: it is over.
    pub fn watch(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(tick) = &mut self.tick else { return false };
        Pin::new(&mut tick.over).poll(cx).is_ready()
    }
}
