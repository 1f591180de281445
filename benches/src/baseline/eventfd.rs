//! `eventfd`: two sleeping processes wake each other, one eventfd each way.
//!
//! A message is one blocking write of the counter, waiting is one blocking read: the least that a
//! process which sleeps can pay.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::case::Case;
use crate::peer::{Duty, Peer};
use crate::pin::Pins;
use crate::stats::{Lap, Recorder, Sample, Usage};

fn eventfd() -> io::Result<File> {
    // SAFETY: a plain call; the returned descriptor is checked and owned by nobody else.
    unsafe {
        let fd = libc::eventfd(0, libc::EFD_CLOEXEC);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(File::from_raw_fd(fd)) }
    }
}

/// Sends a number.
fn post(mut event: &File, number: u64) -> io::Result<()> {
    event.write_all(&number.to_ne_bytes())
}

/// Waits for a number.
fn take(mut event: &File) -> io::Result<u64> {
    let mut bytes = [0; 8];
    event.read_exact(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

pub(super) fn measure(case: &Case, pins: Option<Pins>) -> Result<Sample> {
    let (out, back) = (eventfd()?, eventfd()?);
    let mut peer = Peer::spawn(case, pins.map(|pins| pins.peer), &[out.as_fd(), back.as_fd()])?;
    let watch = Watch::start(&peer, &back)?;
    for number in 1..=case.warmup as u64 {
        watch.check()?;
        post(&out, number)?;
        let got = take(&back)?;
        ensure!(got == number, "warm-up message {number} came back as {got}");
    }
    let mut recorder = Recorder::new(case.iters, Lap::RoundTrip)?;
    let before = Usage::now();
    let start = Instant::now();
    recorder.start();
    for _ in 0..case.iters {
        watch.check()?;
        post(&out, 1)?;
        take(&back)?;
        recorder.lap();
    }
    let wall = start.elapsed();
    let here = before.since();
    let there: Usage = peer.control().recv()?;
    drop(watch);
    peer.finish()?;
    Ok(Sample::latency(recorder, case.messages(), &[here, there], wall))
}

pub(super) fn serve(mut duty: Duty) -> Result<()> {
    let (Some(back), Some(out)) = (duty.descriptors.pop(), duty.descriptors.pop()) else {
        bail!("no eventfds were handed over");
    };
    let (out, back) = (File::from(out), File::from(back));
    for number in 1..=duty.case.warmup as u64 {
        let got = take(&out)?;
        ensure!(got == number, "warm-up message {number} arrived as {got}");
        post(&back, got)?;
    }
    let before = Usage::now();
    for _ in 0..duty.case.iters {
        take(&out)?;
        post(&back, 1)?;
    }
    duty.control.send(&before.since())
}

/// Ends the blocking reads of this process if the peer dies: an eventfd knows nothing of its
/// writers.
struct Watch {
    died: Arc<AtomicBool>,
    stop: File,
    thread: Option<thread::JoinHandle<()>>,
}

impl Watch {
    fn start(peer: &Peer, wake: &File) -> Result<Watch> {
        // SAFETY: pidfd_open takes a process number and flags; the returned descriptor is checked
        // and owned by nobody else.
        let process = unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, peer.id(), 0);
            if fd < 0 {
                return Err(io::Error::last_os_error()).context("watching the peer");
            }
            OwnedFd::from_raw_fd(fd as i32)
        };
        let stop = eventfd()?;
        let (stopped, wake) = (stop.try_clone()?, wake.try_clone()?);
        let died = Arc::new(AtomicBool::new(false));
        let flag = died.clone();
        let thread =
            thread::spawn(move || {
                let mut polled = [process.as_raw_fd(), stopped.as_raw_fd()]
                    .map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
                // SAFETY: the array outlives the call, and its length is given.
                unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) };
                if polled[1].revents == 0 {
                    flag.store(true, Ordering::SeqCst);
                    let _ = post(&wake, 1);
                }
            });
        Ok(Watch { died, stop, thread: Some(thread) })
    }

    /// To be called before each message: the peer lives until it has answered the last one.
    #[inline]
    fn check(&self) -> Result<()> {
        if self.died.load(Ordering::Relaxed) {
            bail!("the peer process has ended early");
        }
        Ok(())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = post(&self.stop, 1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
