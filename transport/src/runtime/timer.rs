//! Deadlines: one ordered table a node, one `timerfd` under it.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::{Attempt, Fd, ForkGuard, Interest, Reactor, Source};

#[derive(Default)]
struct Table {
    waiting: BTreeMap<(Instant, u64), Waker>,
    next_key: u64,
    /// What the timerfd is set to.
    set_to: Option<Instant>,
}

/// The deadlines of a node. Bounded by the operations and sleeps that exist.
pub(crate) struct Timers {
    source: Source,
    table: Mutex<Table>,
    /// In a forked child the lock may seem to be held, for ever.
    fork: ForkGuard,
}

impl Timers {
    pub fn new(reactor: &Reactor) -> io::Result<Self> {
        let fd = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        Ok(Timers {
            source: reactor.source(Fd::new(fd), Interest::Read)?,
            table: Mutex::new(Table::default()),
            fork: ForkGuard::get(),
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fires what is due and registers `cx` for the next expiry. Called by the resident task.
    pub fn poll_expired(&self, cx: &mut Context<'_>) -> io::Result<()> {
        let fired = loop {
            let polled = self.source.poll_read(cx, |fd| {
                let mut count = [0; 8];
                rustix::io::read(fd, &mut count)?;
                Ok(Attempt::Drained(()))
            });
            match polled {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => break self.take_due(Instant::now()),
            }
        };
        for waker in fired {
            waker.wake();
        }
        Ok(())
    }

    fn take_due(&self, now: Instant) -> Vec<Waker> {
        let mut table = self.table();
        let mut due = Vec::new();
        // In most turns nothing is due: no allocation, and no system call, then.
        while let Some(first) = table.waiting.first_entry()
            && first.key().0 <= now
        {
            due.push(first.remove());
        }
        if table.set_to.is_some_and(|set| set <= now) {
            table.set_to = None;
            self.set(&mut table);
        }
        due
    }

    /// Sets the timerfd to the earliest deadline, if it is not set to that or an earlier one.
    fn set(&self, table: &mut Table) {
        let Some((&(first, _), _)) = table.waiting.first_key_value() else { return };
        if table.set_to.is_some_and(|set| set <= first) {
            return;
        }
        table.set_to = Some(first);
        let after = first.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let spec = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec {
                tv_sec: after.as_secs().min(i64::MAX as u64) as i64,
                tv_nsec: after.subsec_nanos().into(),
            },
        };
        // Cannot fail with a valid descriptor and a normalised time.
        let _ = timerfd_settime(self.source.fd(), TimerfdTimerFlags::empty(), &spec);
    }

    /// Wakes all who sleep before their time: something else has happened that they look at.
    pub fn wake_all(&self) {
        // A sleep that is polled again takes its place again.
        let waiting = std::mem::take(&mut self.table().waiting);
        waiting.into_values().for_each(Waker::wake);
    }

    /// A future that ends at `deadline`. Allocates one entry of the table while it waits.
    pub fn sleep_until(self: &Arc<Self>, deadline: Instant) -> Sleep {
        Sleep { timers: self.clone(), deadline, key: None }
    }
}

/// See [`Timers::sleep_until`].
pub(crate) struct Sleep {
    timers: Arc<Timers>,
    deadline: Instant,
    key: Option<u64>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        if Instant::now() >= this.deadline {
            this.forget();
            return Poll::Ready(());
        }
        let waker = cx.waker().clone();
        let mut table = this.timers.table();
        let key = *this.key.get_or_insert_with(|| {
            table.next_key += 1;
            table.next_key
        });
        let replaced = table.waiting.insert((this.deadline, key), waker);
        this.timers.set(&mut table);
        drop(table);
        // Dropping a waker may run user code: never under the lock.
        drop(replaced);
        Poll::Pending
    }
}

impl Sleep {
    fn forget(&mut self) {
        if let Some(key) = self.key.take() {
            let waker = self.timers.table().waiting.remove(&(self.deadline, key));
            drop(waker);
        }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if !self.timers.fork.forked() {
            self.forget();
        }
    }
}

/// A regular tick that costs nothing while it is stopped.
pub(crate) struct Ticker {
    source: Source,
    every: Duration,
    running: bool,
}

impl Ticker {
    pub fn new(reactor: &Reactor, every: Duration) -> io::Result<Self> {
        let fd = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        let source = reactor.source(Fd::new(fd), Interest::Read)?;
        Ok(Ticker { source, every, running: false })
    }

    fn set(&self, every: Duration) {
        let time =
            Timespec { tv_sec: every.as_secs() as i64, tv_nsec: every.subsec_nanos().into() };
        let spec = Itimerspec { it_interval: time, it_value: time };
        // Cannot fail with a valid descriptor and a normalised time.
        let _ = timerfd_settime(self.source.fd(), TimerfdTimerFlags::empty(), &spec);
    }

    /// Whether a tick has passed; if not, `cx`'s waker is called at the next one. Starts the
    /// ticker.
    pub fn poll_tick(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.running {
            self.running = true;
            self.set(self.every);
        }
        let mut ticked = false;
        loop {
            let polled = self.source.poll_read(cx, |fd| {
                let mut count = [0; 8];
                rustix::io::read(fd, &mut count)?;
                Ok(Attempt::Drained(()))
            });
            match polled {
                Poll::Ready(Ok(())) => ticked = true,
                // The runtime has ended; whoever drives us learns that from the timers.
                Poll::Ready(Err(_)) | Poll::Pending => return ticked,
            }
        }
    }

    pub fn is_running(&self) -> bool {
        self.running
    }

    pub fn stop(&mut self) {
        if self.running {
            self.running = false;
            self.set(Duration::ZERO);
        }
    }
}
