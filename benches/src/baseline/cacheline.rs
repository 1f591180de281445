//! `cacheline`: two spinning processes, one cache line each way, 8 bytes a message.
//!
//! The lines lie on two pages of shared memory, so that no prefetcher couples them. A message is
//! one release store; waiting is an acquire load and a pause. Nothing can be faster between two
//! cores.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::spin_until;
use crate::case::Case;
use crate::peer::{Duty, Peer};
use crate::pin::Pins;
use crate::shared::Shared;
use crate::stats::{Lap, Recorder, Sample, Usage};

const PAGE_BYTES: usize = 4096;

/// One line each way.
struct Lines<'a> {
    out: &'a AtomicU64,
    back: &'a AtomicU64,
}

impl<'a> Lines<'a> {
    fn of(shared: &'a Shared) -> Lines<'a> {
        // SAFETY: both words are inside the mapping, aligned to its pages, live as long as
        // `shared`, and are touched as atomics only, by both processes.
        unsafe {
            Lines {
                out: AtomicU64::from_ptr(shared.at(0).cast().as_ptr()),
                back: AtomicU64::from_ptr(shared.at(PAGE_BYTES).cast().as_ptr()),
            }
        }
    }
}

/// Waits for the next value of a line.
#[inline]
fn next(line: &AtomicU64, last: u64) -> Result<u64> {
    let mut value = last;
    spin_until(|| {
        value = line.load(Ordering::Acquire);
        value != last
    })?;
    Ok(value)
}

pub(super) fn measure(case: &Case, pins: Option<Pins>) -> Result<Sample> {
    let shared = Shared::create(2 * PAGE_BYTES).context("making shared memory")?;
    let lines = Lines::of(&shared);
    let mut peer = Peer::spawn(case, pins.map(|pins| pins.peer), &[shared.file()])?;
    for number in 1..=case.warmup as u64 {
        lines.out.store(number, Ordering::Release);
        let back = next(lines.back, number - 1)?;
        ensure!(back == number, "warm-up message {number} came back as {back}");
    }
    let mut recorder = Recorder::new(case.iters, Lap::RoundTrip)?;
    let first = case.warmup as u64 + 1;
    let before = Usage::now();
    let start = Instant::now();
    recorder.start();
    for number in first..first + case.iters as u64 {
        lines.out.store(number, Ordering::Release);
        next(lines.back, number - 1)?;
        recorder.lap();
    }
    let wall = start.elapsed();
    let here = before.since();
    let there: Usage = peer.control().recv()?;
    peer.finish()?;
    Ok(Sample::latency(recorder, case.messages(), &[here, there], wall))
}

pub(super) fn serve(mut duty: Duty) -> Result<()> {
    let file = duty.descriptors.pop().context("no shared memory was handed over")?;
    let shared = Shared::map(file, 2 * PAGE_BYTES).context("mapping shared memory")?;
    let lines = Lines::of(&shared);
    for number in 1..=duty.case.warmup as u64 {
        let got = next(lines.out, number - 1)?;
        ensure!(got == number, "warm-up message {number} arrived as {got}");
        lines.back.store(got, Ordering::Release);
    }
    let before = Usage::now();
    let first = duty.case.warmup as u64 + 1;
    for number in first..first + duty.case.iters as u64 {
        let got = next(lines.out, number - 1)?;
        lines.back.store(got, Ordering::Release);
    }
    duty.control.send(&before.since())
}
