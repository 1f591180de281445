//! `ring`: a bare single-producer ring of 64-byte slots between two spinning processes.
//!
//! A slot is one cache line: a sequence word and up to 56 bytes. The producer fills the payload and
//! then publishes the sequence; the consumer publishes how far it has read once every quarter of
//! the ring. There is one ring each way.
//!
//! `ring` has as many slots as the rings of the shm link, so that as much is on its way at once.
//! `deep-ring` has so many that the two sides drift apart, and lines travel many at a time: five to
//! ten times the rate, at half a megabyte each way.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::spin_until;
use crate::case::{Baseline, Case, Program};
use crate::pattern::{self, Way};
use crate::peer::{Duty, Peer};
use crate::pin::Pins;
use crate::shared::Shared;
use crate::stats::{Lap, Recorder, Sample, Usage};

const SLOT_BYTES: usize = 64;
const PAYLOAD_MAX_BYTES: usize = Baseline::Ring.max_bytes();
/// The consumer's position, alone on its page.
const HEADER_BYTES: usize = 4096;
/// As many as in the shm link.
pub(super) const SLOTS: usize = 256;
pub(super) const DEEP_SLOTS: usize = 8192;

/// One ring in memory that both processes have mapped.
#[derive(Clone, Copy)]
struct Ring<'a, const SLOTS: usize> {
    consumed: &'a AtomicU64,
    slots: NonNull<u8>,
}

impl<'a, const SLOTS: usize> Ring<'a, SLOTS> {
    const MASK: u64 = SLOTS as u64 - 1;
    const BYTES: usize = HEADER_BYTES + SLOTS * SLOT_BYTES;

    /// The ring number `which` of those in `shared`.
    fn of(shared: &'a Shared, which: usize) -> Self {
        let base = which * Self::BYTES;
        // SAFETY: inside the mapping, 64-byte aligned, lives as long as `shared`, and is touched
        // as an atomic only, by both processes.
        let consumed = unsafe { AtomicU64::from_ptr(shared.at(base).cast().as_ptr()) };
        Ring { consumed, slots: shared.at(base + HEADER_BYTES) }
    }

    #[inline]
    fn slot(&self, position: u64) -> (&'a AtomicU64, NonNull<u8>) {
        // SAFETY: the mask keeps the slot inside the ring, which lies inside the mapping; the
        // first word of a slot is touched as an atomic only.
        unsafe {
            let slot = self.slots.add((position & Self::MASK) as usize * SLOT_BYTES);
            (AtomicU64::from_ptr(slot.cast().as_ptr()), slot.add(8))
        }
    }
}

struct Producer<'a, const SLOTS: usize> {
    ring: Ring<'a, SLOTS>,
    next: u64,
    /// What the consumer was last seen to have read.
    consumed: u64,
}

impl<'a, const SLOTS: usize> Producer<'a, SLOTS> {
    fn new(ring: Ring<'a, SLOTS>) -> Self {
        Producer { ring, next: 0, consumed: 0 }
    }

    /// Sends at most 56 bytes, waiting for room.
    #[inline]
    fn push(&mut self, payload: &[u8]) -> Result<()> {
        if self.next - self.consumed > Ring::<SLOTS>::MASK {
            spin_until(|| {
                self.consumed = self.ring.consumed.load(Ordering::Acquire);
                self.next - self.consumed <= Ring::<SLOTS>::MASK
            })?;
        }
        let len = payload.len().min(PAYLOAD_MAX_BYTES);
        let (sequence, into) = self.ring.slot(self.next);
        // SAFETY: a slot's payload has 56 bytes, and the consumer does not read it until the
        // sequence below is published, having read what was there before.
        unsafe { into.copy_from_nonoverlapping(NonNull::from(payload).cast(), len) };
        self.next += 1;
        sequence.store(self.next, Ordering::Release);
        Ok(())
    }
}

struct Consumer<'a, const SLOTS: usize> {
    ring: Ring<'a, SLOTS>,
    next: u64,
    published: u64,
}

impl<'a, const SLOTS: usize> Consumer<'a, SLOTS> {
    fn new(ring: Ring<'a, SLOTS>) -> Self {
        Consumer { ring, next: 0, published: 0 }
    }

    /// Receives at most 56 bytes, waiting for them.
    #[inline]
    fn pop(&mut self, into: &mut [u8]) -> Result<()> {
        let len = into.len().min(PAYLOAD_MAX_BYTES);
        let (sequence, payload) = self.ring.slot(self.next);
        spin_until(|| sequence.load(Ordering::Acquire) == self.next + 1)?;
        // SAFETY: a slot's payload has 56 bytes, and the producer does not write it again before
        // this side publishes that it has read it.
        unsafe { payload.copy_to_nonoverlapping(NonNull::from(into).cast(), len) };
        self.next += 1;
        if self.next - self.published > Ring::<SLOTS>::MASK / 4 {
            self.published = self.next;
            self.ring.consumed.store(self.next, Ordering::Release);
        }
        Ok(())
    }
}

pub(super) fn measure<const SLOTS: usize>(case: &Case, pins: Option<Pins>) -> Result<Sample> {
    ensure!(case.size_bytes <= PAYLOAD_MAX_BYTES, "a slot carries at most {PAYLOAD_MAX_BYTES} B");
    let shared = Shared::create(2 * Ring::<SLOTS>::BYTES).context("making shared memory")?;
    let mut peer = Peer::spawn(case, pins.map(|pins| pins.peer), &[shared.file()])?;
    let mut out = Producer::new(Ring::<SLOTS>::of(&shared, 0));
    let mut back = Consumer::new(Ring::<SLOTS>::of(&shared, 1));
    let mut payload = vec![0u8; case.size_bytes];
    for index in 0..case.warmup as u64 {
        pattern::fill(&mut payload, 0, index, Way::Out);
        out.push(&payload)?;
        if case.program == Program::Pingpong {
            back.pop(&mut payload)?;
            pattern::verify(&payload, 0, index, Way::Back)?;
        }
    }
    if case.program == Program::Bandwidth {
        back.pop(&mut payload)?;
    }
    let mut recorder = match case.program {
        Program::Pingpong => Some(Recorder::new(case.iters, Lap::RoundTrip)?),
        Program::Bandwidth => None,
    };
    let before = Usage::now();
    let start = Instant::now();
    match &mut recorder {
        Some(recorder) => {
            recorder.start();
            for _ in 0..case.iters {
                out.push(&payload)?;
                back.pop(&mut payload)?;
                recorder.lap();
            }
        }
        None => {
            for _ in 0..case.iters {
                out.push(&payload)?;
            }
            back.pop(&mut payload)?;
        }
    }
    let wall = start.elapsed();
    let here = before.since();
    let there: Usage = peer.control().recv()?;
    peer.finish()?;
    Ok(match recorder {
        Some(recorder) => Sample::latency(recorder, case.messages(), &[here, there], wall),
        None => Sample::stream(&[here, there], wall),
    })
}

pub(super) fn serve<const SLOTS: usize>(mut duty: Duty) -> Result<()> {
    let case = &duty.case;
    let file = duty.descriptors.pop().context("no shared memory was handed over")?;
    let shared = Shared::map(file, 2 * Ring::<SLOTS>::BYTES).context("mapping shared memory")?;
    let mut out = Consumer::new(Ring::<SLOTS>::of(&shared, 0));
    let mut back = Producer::new(Ring::<SLOTS>::of(&shared, 1));
    let mut payload = vec![0u8; case.size_bytes];
    for index in 0..case.warmup as u64 {
        out.pop(&mut payload)?;
        pattern::verify(&payload, 0, index, Way::Out)?;
        if case.program == Program::Pingpong {
            pattern::fill(&mut payload, 0, index, Way::Back);
            back.push(&payload)?;
        }
    }
    if case.program == Program::Bandwidth {
        back.push(&payload)?;
    }
    let before = Usage::now();
    for _ in 0..case.iters {
        out.pop(&mut payload)?;
        std::hint::black_box(payload.as_mut_slice());
        if case.program == Program::Pingpong {
            back.push(&payload)?;
        }
    }
    if case.program == Program::Bandwidth {
        back.push(&payload)?;
    }
    duty.control.send(&before.since())
}
