//! Looking at descriptors that a busy runtime does not get to look at.
//!
//! A runtime asks the system what has become readable when nothing else is to be done, or after so
//! many polls (tokio: 61). Where each of these moves long payloads that takes a while, and in a
//! slow machine many seconds; and one that is polled by an operation that spins is not told of its
//! descriptors at all. So a link that is kept busy, and that the system does not tell of its peer's
//! end otherwise, looks by itself now and then: at its bootstrap connection, and at devices.

use std::io;
use std::os::fd::BorrowedFd;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::Progress;
use crate::runtime::{Attempt, Source};

/// How often it looks: a few system calls each time.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// So much has to have been done before the clock is read, which is not free either.
const WORK_PER_LOOK: u32 = 64;

/// How to find out what there is to read.
pub(super) enum Look<'a, 'b> {
    /// Where the runtime says that there is something; else the context's waker is registered.
    Told(&'a mut Context<'b>),
    /// At the descriptor itself.
    Now,
}

impl Look<'_, '_> {
    /// Pending: there is nothing.
    pub fn read<R>(
        &mut self,
        source: &Source,
        mut attempt: impl FnMut(BorrowedFd<'_>) -> io::Result<R>,
    ) -> Poll<io::Result<R>> {
        match self {
            Look::Told(cx) => source.poll_read(cx, |fd| attempt(fd).map(Attempt::More)),
            Look::Now => match attempt(source.fd()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
                read => Poll::Ready(read),
            },
        }
    }
}

/// When a link looks by itself.
pub(super) struct Lookout {
    work: u32,
    looked: Instant,
}

impl Lookout {
    pub fn new() -> Lookout {
        Lookout { work: 0, looked: Instant::now() }
    }

    /// The link was polled, with this result.
    #[inline]
    pub fn polled(&mut self, progress: Progress) {
        self.work += match progress {
            Progress::Idle => 1,
            Progress::Some => WORK_PER_LOOK / 8,
            Progress::More => WORK_PER_LOOK,
        };
    }

    /// Whether it is time to look.
    #[inline]
    pub fn is_due(&mut self) -> bool {
        if self.work < WORK_PER_LOOK {
            return false;
        }
        self.work = 0;
        let now = Instant::now();
        let due = now.duration_since(self.looked) >= LOOK_EVERY;
        if due {
            self.looked = now;
        }
        due
    }
}
