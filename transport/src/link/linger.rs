//! When a link that was killed, and still has memory of others' in its hands, looks again whether it
//! may let go of it: ever more seldom.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::time::{Duration, Instant};

use super::Armed;
use crate::runtime::{Sleep, Timers};

/// The pauses between looks.
pub(super) struct Linger {
    timers: Arc<Timers>,
    pause: Duration,
    longest: Duration,
    next: Instant,
    over: Sleep,
}

impl Linger {
    /// The first look was in vain.
    pub fn new(timers: &Arc<Timers>, first: Duration, longest: Duration) -> Linger {
        let next = Instant::now() + first;
        let over = timers.sleep_until(next);
        Linger { timers: timers.clone(), pause: first, longest, next, over }
    }

    /// One more look was in vain. The next pause is twice as long; but looks that came before their
    /// time, however many, count for nothing.
    pub fn in_vain(&mut self) {
        let now = Instant::now();
        if now >= self.next {
            self.pause = (self.pause * 2).min(self.longest);
            self.next = now + self.pause;
            self.over = self.timers.sleep_until(self.next);
        }
    }

    /// `Busy`: it is time to look again.
    pub fn arm(&mut self, cx: &mut Context<'_>) -> Armed {
        match Pin::new(&mut self.over).poll(cx).is_ready() {
            true => Armed::Busy,
            false => Armed::Yes,
        }
    }
}
