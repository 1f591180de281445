//! What the bare system costs, one file per way of moving bytes.
//!
//! Nothing here uses thalweg. Each file measures from this process and, where two are needed,
//! serves from the other; both ends follow the same [`Case`].

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::case::{Baseline, Case};
use crate::peer::Duty;
use crate::pin::Pins;
use crate::stats::Sample;

mod cacheline;
mod cma;
mod eventfd;
mod memcpy;
pub mod perftest;
pub mod raw_tcp;
mod ring;
mod tool;
pub mod ucx;

/// Why a baseline cannot be measured here; not a fault.
#[derive(Debug)]
pub struct Unavailable(String);

impl Unavailable {
    /// With this reason.
    pub fn new(why: impl Into<String>) -> Self {
        Unavailable(why.into())
    }
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unavailable {}

/// How long a spinning side waits for the other before it gives up.
const STALLED: Duration = Duration::from_secs(10);

/// Measures one baseline, starting its peer.
pub fn measure(baseline: Baseline, case: &Case, pins: Option<Pins>) -> Result<Sample> {
    match baseline {
        Baseline::RawTcp => raw_tcp::measure(case, pins),
        Baseline::Cacheline => cacheline::measure(case, pins),
        Baseline::Eventfd => eventfd::measure(case, pins),
        Baseline::Ring => ring::measure::<{ ring::SLOTS }>(case, pins),
        Baseline::DeepRing => ring::measure::<{ ring::DEEP_SLOTS }>(case, pins),
        Baseline::Memcpy => memcpy::measure(case),
        Baseline::Cma => cma::measure(case, pins),
        Baseline::Ucx => ucx::measure(case, pins, ucx::Settings::SharedMemory),
        Baseline::UcxE => ucx::measure(case, pins, ucx::Settings::OfTheLink),
        Baseline::IbSendLat | Baseline::IbWriteLat | Baseline::IbWriteBw => {
            perftest::measure(baseline, case, pins)
        }
    }
}

/// The peer's side.
pub fn serve(baseline: Baseline, duty: Duty) -> Result<()> {
    match baseline {
        Baseline::RawTcp => raw_tcp::serve_parent(duty),
        Baseline::Cacheline => cacheline::serve(duty),
        Baseline::Eventfd => eventfd::serve(duty),
        Baseline::Ring => ring::serve::<{ ring::SLOTS }>(duty),
        Baseline::DeepRing => ring::serve::<{ ring::DEEP_SLOTS }>(duty),
        Baseline::Cma => cma::serve(duty),
        Baseline::Memcpy
        | Baseline::Ucx
        | Baseline::UcxE
        | Baseline::IbSendLat
        | Baseline::IbWriteLat
        | Baseline::IbWriteBw => {
            bail!("{} has no peer of ours", baseline.name())
        }
    }
}

/// Spins until `ready`, with a pause instruction in between; an error after ten seconds, because
/// the other side must then be gone.
#[inline]
fn spin_until(mut ready: impl FnMut() -> bool) -> Result<()> {
    let mut spins = 0u32;
    let mut deadline = None;
    while !ready() {
        std::hint::spin_loop();
        spins = spins.wrapping_add(1);
        if spins.is_multiple_of(1 << 16) {
            give_up_after(&mut deadline)?;
        }
    }
    Ok(())
}

#[cold]
fn give_up_after(deadline: &mut Option<Instant>) -> Result<()> {
    let now = Instant::now();
    if now > *deadline.get_or_insert(now + STALLED) {
        bail!("the other process has not answered for {} s", STALLED.as_secs());
    }
    Ok(())
}
