//! Recording round trips and reading the process's own costs.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::buffer;

/// How much of the time is counted as one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lap {
    /// A message there and one back: a half is one way.
    RoundTrip,
    /// One movement (a copy): all of it.
    OneWay,
}

/// Collects the duration of every lap. One look at the counter a lap: the end of one is the start of
/// the next. Its memory is made and touched beforehand.
pub struct Recorder {
    counts: Vec<u64>,
    counter: Counter,
    began: (Instant, u64),
    last: u64,
    lap: Lap,
}

impl Recorder {
    /// Room for `laps` laps, 8 bytes each.
    ///
    /// # Errors
    ///
    /// When that memory cannot be had.
    pub fn new(laps: usize, lap: Lap) -> Result<Self> {
        Recorder::with(Counter::best(), laps, lap)
    }

    fn with(counter: Counter, laps: usize, lap: Lap) -> Result<Self> {
        let mut counts = buffer::filled(laps, 1u64)?;
        std::hint::black_box(counts.as_mut_slice());
        counts.clear();
        Ok(Recorder { counts, counter, began: counter.moment(), last: counter.now(), lap })
    }

    /// Starts the first lap now.
    #[inline]
    pub fn start(&mut self) {
        self.began = self.counter.moment();
        self.last = self.counter.now();
    }

    /// Ends a lap and starts the next.
    #[inline]
    pub fn lap(&mut self) {
        let now = self.counter.now();
        self.counts.push(now.saturating_sub(self.last));
        self.last = now;
    }

    /// The percentiles, one way, in microseconds.
    pub fn finish(mut self) -> Percentiles {
        self.counts.sort_unstable();
        let laps = match self.lap {
            Lap::RoundTrip => 2.0,
            Lap::OneWay => 1.0,
        };
        let scale = self.counter.microseconds(self.began) / laps;
        let at = |fraction: f64| {
            let rank = (fraction * self.counts.len() as f64).ceil() as usize;
            let index = rank.saturating_sub(1).min(self.counts.len().saturating_sub(1));
            self.counts.get(index).map(|&count| count as f64 * scale)
        };
        Percentiles { min: at(0.0), p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) }
    }
}

/// A distribution in microseconds; what was not measured is `None` (`null` in JSON).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    /// The smallest.
    pub min: Option<f64>,
    /// The median.
    pub p50: Option<f64>,
    /// Nine in ten are at most this.
    pub p90: Option<f64>,
    /// 99 in a hundred are at most this.
    pub p99: Option<f64>,
    /// The largest.
    pub max: Option<f64>,
}

impl Percentiles {
    /// The median of each figure over several repetitions.
    pub fn medians(of: &[Percentiles]) -> Percentiles {
        let each = |pick: fn(&Percentiles) -> Option<f64>| median(of.iter().filter_map(pick));
        Percentiles {
            min: each(|p| p.min),
            p50: each(|p| p.p50),
            p90: each(|p| p.p90),
            p99: each(|p| p.p99),
            max: each(|p| p.max),
        }
    }
}

/// The median; `None` of nothing.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// What a process has consumed up to a moment; differences are what counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// User and system time of all threads, in microseconds.
    pub cpu_us: f64,
    /// How long this thread was runnable but had to wait for a core, in microseconds.
    pub waited_us: f64,
}

impl Usage {
    /// Up to now.
    pub fn now() -> Usage {
        // SAFETY: rusage is plain integers, for which zero is a value; getrusage fills it in.
        let usage = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            libc::getrusage(libc::RUSAGE_SELF, &mut usage);
            usage
        };
        let microseconds = |t: libc::timeval| t.tv_sec as f64 * 1e6 + t.tv_usec as f64;
        Usage {
            cpu_us: microseconds(usage.ru_utime) + microseconds(usage.ru_stime),
            waited_us: run_queue_wait_us().unwrap_or(0.0),
        }
    }

    /// What was consumed since.
    pub fn since(self) -> Usage {
        let now = Usage::now();
        Usage { cpu_us: now.cpu_us - self.cpu_us, waited_us: now.waited_us - self.waited_us }
    }
}

fn run_queue_wait_us() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let nanoseconds: f64 = text.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(nanoseconds / 1e3)
}

/// What one measurement gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The figures.
    pub figures: Figures,
    /// Share of the time in which the busier-disturbed side waited for a core that others held,
    /// 0 to 1.
    pub disturbed: f64,
}

/// Latency or throughput.
#[derive(Clone, Debug, PartialEq)]
pub enum Figures {
    /// One way, in microseconds.
    Latency {
        /// Distribution over the round trips.
        half_rtt_us: Percentiles,
        /// CPU of both processes per message; a round trip is two messages.
        cpu_us_per_message: Option<f64>,
    },
    /// A one-way stream.
    Stream {
        /// From the first message until the final acknowledgement.
        seconds: f64,
    },
}

impl Sample {
    /// A latency, from the laps and from what both sides consumed during `messages` messages.
    pub fn latency(recorder: Recorder, messages: usize, sides: &[Usage], wall: Duration) -> Sample {
        let cpu: f64 = sides.iter().map(|side| side.cpu_us).sum();
        Sample {
            figures: Figures::Latency {
                half_rtt_us: recorder.finish(),
                cpu_us_per_message: Some(cpu / messages.max(1) as f64),
            },
            disturbed: disturbed(sides, wall),
        }
    }

    /// A stream that took `wall`.
    pub fn stream(sides: &[Usage], wall: Duration) -> Sample {
        Sample {
            figures: Figures::Stream { seconds: wall.as_secs_f64() },
            disturbed: disturbed(sides, wall),
        }
    }
}

fn disturbed(sides: &[Usage], wall: Duration) -> f64 {
    let worst = sides.iter().map(|side| side.waited_us).fold(0.0, f64::max);
    worst / (wall.as_secs_f64() * 1e6).max(1.0)
}

/// What laps are timed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counter {
    /// The processor's own, which `ucx_perftest` reads as well: 9 ns a look, where the system's clock
    /// takes 22, and a round trip of 8 B is 470. It may be read some cycles before what comes ahead of it
    /// in the program is done, so a lap can be that much too short and the next too long.
    #[cfg(target_arch = "x86_64")]
    Processor,
    /// The system's clock, in nanoseconds since then.
    System(Instant),
}

impl Counter {
    /// The processor's, if the kernel keeps its time by it: then it counts evenly, and alike on all
    /// cores.
    fn best() -> Counter {
        #[cfg(target_arch = "x86_64")]
        {
            let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
            if std::fs::read_to_string(source).is_ok_and(|name| name.trim() == "tsc") {
                return Counter::Processor;
            }
        }
        Counter::System(Instant::now())
    }

    #[inline]
    fn now(self) -> u64 {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: every processor of this kind has the instruction.
            Counter::Processor => unsafe { core::arch::x86_64::_rdtsc() },
            // 2⁶⁴ ns are five centuries.
            Counter::System(since) => since.elapsed().as_nanos() as u64,
        }
    }

    /// What both clocks say at one moment: of several looks the one during which the least passed.
    fn moment(self) -> (Instant, u64) {
        let look = || {
            let (before, instant, after) = (self.now(), Instant::now(), self.now());
            (after.saturating_sub(before), (instant, before.midpoint(after)))
        };
        let mut best = look();
        for _ in 0..4 {
            let next = look();
            if next.0 < best.0 {
                best = next;
            }
        }
        best.1
    }

    /// How long a count is: the processor's by what has passed since then.
    fn microseconds(self, (began, count): (Instant, u64)) -> f64 {
        match self {
            #[cfg(target_arch = "x86_64")]
            Counter::Processor => {
                let (now, counts) = self.moment();
                let passed = now.duration_since(began).as_secs_f64() * 1e6;
                passed / counts.saturating_sub(count).max(1) as f64
            }
            Counter::System(_) => {
                let _ = (began, count);
                1e-3
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_rank() {
        let system = Counter::System(Instant::now());
        let mut recorder = Recorder::with(system, 100, Lap::RoundTrip).unwrap();
        recorder.counts = (1..=100).rev().map(|n| n * 2_000).collect();
        let p = recorder.finish();
        assert_eq!(p.min, Some(1.0));
        assert_eq!(p.p50, Some(50.0));
        assert_eq!(p.p90, Some(90.0));
        assert_eq!(p.p99, Some(99.0));
        assert_eq!(p.max, Some(100.0));
    }

    #[test]
    fn a_lap_of_many_seconds_is_what_it_was() {
        let since = Instant::now().checked_sub(Duration::from_secs(10)).unwrap();
        let mut recorder = Recorder::with(Counter::System(since), 1, Lap::OneWay).unwrap();
        recorder.last = 0;
        recorder.lap();
        assert!(recorder.finish().max.unwrap() >= 10e6);
    }

    #[test]
    fn both_counters_measure_the_same_time() {
        for counter in [Counter::best(), Counter::System(Instant::now())] {
            let mut recorder = Recorder::with(counter, 1, Lap::OneWay).unwrap();
            let outer = Instant::now();
            recorder.start();
            let inner = Instant::now();
            std::thread::sleep(Duration::from_millis(50));
            let inner = inner.elapsed().as_secs_f64() * 1e6;
            recorder.lap();
            let outer = outer.elapsed().as_secs_f64() * 1e6;
            let lap = recorder.finish().max.unwrap();
            assert!(lap > inner * 0.99 && lap < outer * 1.01, "{counter:?}: {lap} µs of {outer}");
        }
    }

    #[test]
    fn nothing_recorded_gives_nothing() {
        assert_eq!(Recorder::new(0, Lap::OneWay).unwrap().finish(), Percentiles::default());
    }

    #[test]
    fn medians_ignore_an_outlier() {
        assert_eq!(median([3.0, 1.0, 900.0]), Some(3.0));
        assert_eq!(median([1.0, 3.0]), Some(2.0));
        assert_eq!(median([]), None);
    }

    #[test]
    fn usage_grows_with_work() {
        let before = Usage::now();
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(30) {
            std::hint::spin_loop();
        }
        assert!(before.since().cpu_us > 1_000.0);
    }
}
