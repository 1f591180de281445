//! A host with its own event loop: one `epoll` descriptor that it watches, drained by the node.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

use super::{Attempt, Fd, Interest};

#[derive(Clone, Copy)]
pub(super) enum Direction {
    Read = 0,
    Write = 1,
}

struct State {
    /// Bit per direction. Once the peer has hung up, both stay set: no further edge would come.
    ready: AtomicU8,
    closed: AtomicBool,
    wakers: [Mutex<Option<Waker>>; 2],
}

impl State {
    fn set_ready(&self, direction: Direction) {
        self.ready.fetch_or(1 << direction as u8, Ordering::AcqRel);
        let waker = lock(&self.wakers[direction as usize]).take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The host's descriptor and the sources behind it.
pub(crate) struct HostLoop {
    epoll: Fd,
    wake: Fd,
    next: AtomicU64,
    sources: Mutex<HashMap<u64, Arc<State>>>,
}

const WAKE_TOKEN: u64 = 0;

impl HostLoop {
    pub fn new() -> io::Result<Arc<Self>> {
        let inner = Fd::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        let wake = Fd::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        epoll::add(
            &inner,
            &wake,
            epoll::EventData::new_u64(WAKE_TOKEN),
            epoll::EventFlags::IN | epoll::EventFlags::ET,
        )?;
        Ok(Arc::new(HostLoop {
            epoll: inner,
            wake,
            next: AtomicU64::new(WAKE_TOKEN + 1),
            sources: Mutex::new(HashMap::new()),
        }))
    }

    /// What the host watches for readability.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Makes the descriptor readable, from any thread. Nothing in a forked child, where wakers may
    /// still be dropped and called.
    pub fn wake(&self) {
        if !self.wake.is_ours() {
            return;
        }
        // A full counter is readable already; nothing else can fail here.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Collects what is ready and calls the wakers. Never blocks. Bounded by the sources there are.
    pub fn drain(&self) -> io::Result<()> {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(256);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&now))?;
        for event in &events {
            let (data, flags) = (event.data, event.flags);
            let token = data.u64();
            if token == WAKE_TOKEN {
                continue;
            }
            let state = lock(&self.sources).get(&token).cloned();
            if let Some(state) = state {
                let broken = epoll::EventFlags::HUP | epoll::EventFlags::ERR;
                if flags.intersects(epoll::EventFlags::RDHUP | broken) {
                    state.closed.store(true, Ordering::Release);
                }
                if flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::RDHUP | broken) {
                    state.set_ready(Direction::Read);
                }
                if flags.intersects(epoll::EventFlags::OUT | broken) {
                    state.set_ready(Direction::Write);
                }
            }
        }
        if events.len() == 256 {
            self.wake();
        }
        Ok(())
    }

    pub(super) fn register(self: &Arc<Self>, fd: Fd, interest: Interest) -> io::Result<HostSource> {
        let token = self.next.fetch_add(1, Ordering::Relaxed);
        let state = Arc::new(State {
            ready: AtomicU8::new(0),
            closed: AtomicBool::new(false),
            wakers: [Mutex::new(None), Mutex::new(None)],
        });
        lock(&self.sources).insert(token, state.clone());
        let mut flags = epoll::EventFlags::ET | epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
        if interest == Interest::ReadWrite {
            flags |= epoll::EventFlags::OUT;
        }
        if let Err(error) = epoll::add(&self.epoll, &fd, epoll::EventData::new_u64(token), flags) {
            lock(&self.sources).remove(&token);
            return Err(error.into());
        }
        Ok(HostSource { fd, token, state, host: self.clone() })
    }
}

pub(super) struct HostSource {
    fd: Fd,
    token: u64,
    state: Arc<State>,
    host: Arc<HostLoop>,
}

impl HostSource {
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub fn poll<R>(
        &self,
        direction: Direction,
        cx: &mut Context<'_>,
        mut attempt: impl FnMut(BorrowedFd<'_>) -> io::Result<Attempt<R>>,
    ) -> Poll<io::Result<R>> {
        let bit = 1 << direction as u8;
        loop {
            if self.state.ready.load(Ordering::Acquire) & bit == 0 {
                let mut slot = lock(&self.state.wakers[direction as usize]);
                match &mut *slot {
                    Some(waker) if waker.will_wake(cx.waker()) => {}
                    slot => *slot = Some(cx.waker().clone()),
                }
                drop(slot);
                // An edge between the look and the registration found no waker.
                if self.state.ready.load(Ordering::Acquire) & bit == 0 {
                    return Poll::Pending;
                }
            }
            // Cleared before the attempt: an edge during it sets the bit again.
            self.state.ready.fetch_and(!bit, Ordering::AcqRel);
            match attempt(self.fd.as_fd()) {
                Ok(Attempt::More(done)) => {
                    self.state.ready.fetch_or(bit, Ordering::AcqRel);
                    return Poll::Ready(Ok(done));
                }
                Ok(Attempt::Drained(done)) => {
                    if self.state.closed.load(Ordering::Acquire) {
                        self.state.ready.fetch_or(bit, Ordering::AcqRel);
                    }
                    return Poll::Ready(Ok(done));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    self.state.ready.fetch_or(bit, Ordering::AcqRel);
                    return Poll::Ready(Err(error));
                }
            }
        }
    }
}

impl Drop for HostSource {
    fn drop(&mut self) {
        if !self.fd.is_ours() {
            return;
        }
        lock(&self.host.sources).remove(&self.token);
        // Fails only when the descriptor is gone already.
        let _ = epoll::delete(&self.host.epoll, &self.fd);
    }
}
