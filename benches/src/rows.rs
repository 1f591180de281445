//! The results as scripts read them: one JSON object a line, with exactly these fields.

use serde::Serialize;

use crate::case::{Case, Subject};
use crate::stats::{Figures, Percentiles, Sample, median};

/// One result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// `pingpong` or `bandwidth`.
    pub program: &'static str,
    /// `thalweg` or `baseline`.
    pub row: &'static str,
    /// The link, or the baseline's name.
    pub transport: String,
    /// `host` or `loaned`.
    pub memory: &'static str,
    /// `spin`, `park`, `adaptive`; `none` for a baseline that never waits.
    pub wake: &'static str,
    /// Bytes in a message.
    pub size_bytes: usize,
    /// The rest depends on the program.
    #[serde(flatten)]
    pub figures: RowFigures,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum RowFigures {
    /// Of `pingpong`.
    Latency {
        /// Round trips measured.
        iters: usize,
        /// Half a round trip.
        half_rtt_us: Percentiles,
        /// Of both processes together; `null` if unknown.
        cpu_us_per_message: Option<f64>,
    },
    /// Of `bandwidth`.
    Stream {
        /// Messages in flight.
        window: usize,
        /// Messages measured.
        messages: usize,
        /// From the first message to the final acknowledgement.
        seconds: Option<f64>,
        /// In 10⁹ bytes.
        gb_per_s: Option<f64>,
        /// Messages a second.
        messages_per_s: Option<f64>,
    },
}

impl Row {
    /// The median of the samples of one case; `None` if there are none.
    pub fn of(case: &Case, chosen_link: Option<&str>, samples: &[Sample]) -> Option<Row> {
        let first = samples.first()?;
        let (row, transport, memory, wake) = match &case.subject {
            Subject::Thalweg { transport, memory, wake, .. } => {
                ("thalweg", chosen_link.unwrap_or(transport.name()), memory.name(), wake.name())
            }
            Subject::Baseline(baseline) => ("baseline", baseline.name(), "host", baseline.wake()),
        };
        let figures = match &first.figures {
            Figures::Latency { .. } => latency(case, samples),
            Figures::Stream { .. } => stream(case, samples),
        };
        Some(Row {
            program: case.program.name(),
            row,
            transport: transport.to_owned(),
            memory,
            wake,
            size_bytes: case.size_bytes,
            figures,
        })
    }

    /// The figure that a plot shows and a ratio is made of: microseconds of half a round trip, or
    /// GB/s.
    pub fn headline(&self) -> Option<f64> {
        match &self.figures {
            RowFigures::Latency { half_rtt_us, .. } => half_rtt_us.p50,
            RowFigures::Stream { gb_per_s, .. } => *gb_per_s,
        }
    }

    /// The line of JSON.
    pub fn json(&self) -> String {
        serde_json::to_string(self).expect("plain data serialises")
    }
}

fn latency(case: &Case, samples: &[Sample]) -> RowFigures {
    let (mut halves, mut cpu) = (Vec::new(), Vec::new());
    for sample in samples {
        if let Figures::Latency { half_rtt_us, cpu_us_per_message } = sample.figures {
            halves.push(half_rtt_us);
            cpu.extend(cpu_us_per_message);
        }
    }
    RowFigures::Latency {
        iters: case.iters,
        half_rtt_us: Percentiles::medians(&halves),
        cpu_us_per_message: median(cpu),
    }
}

fn stream(case: &Case, samples: &[Sample]) -> RowFigures {
    let seconds = median(samples.iter().filter_map(|sample| match sample.figures {
        Figures::Stream { seconds } => Some(seconds),
        Figures::Latency { .. } => None,
    }))
    .filter(|seconds| *seconds > 0.0);
    let per_second = seconds.map(|seconds| case.iters as f64 / seconds);
    RowFigures::Stream {
        window: case.window,
        messages: case.iters,
        seconds,
        gb_per_s: per_second.map(|rate| rate * case.size_bytes as f64 / 1e9),
        messages_per_s: per_second,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::{Baseline, Memory, Program, Transport, Wake};

    fn case(program: Program, subject: Subject) -> Case {
        let frames = vec![8];
        Case { program, subject, size_bytes: 8, frames, iters: 20_000, warmup: 1, window: 64 }
    }

    fn keys(json: &str) -> Vec<String> {
        let value: serde_json::Value = serde_json::from_str(json).unwrap();
        value.as_object().unwrap().keys().cloned().collect()
    }

    #[test]
    fn a_latency_row_has_the_agreed_fields() {
        let subject = Subject::Thalweg {
            transport: Transport::auto(),
            memory: Memory::Host,
            wake: Wake::Spin,
            single_copy: true,
        };
        let half_rtt_us = Percentiles { p50: Some(0.17), ..Percentiles::default() };
        let figures = Figures::Latency { half_rtt_us, cpu_us_per_message: Some(0.2) };
        let sample = Sample { figures, disturbed: 0.0 };
        let row = Row::of(&case(Program::Pingpong, subject), Some("shm"), &[sample]).unwrap();
        let json = row.json();
        assert!(json.starts_with(
            r#"{"program":"pingpong","row":"thalweg","transport":"shm","memory":"host","wake":"spin","size_bytes":8,"iters":20000,"half_rtt_us":{"min":null,"p50":0.17,"#
        ), "{json}");
        let mut expected = ["program", "row", "transport", "memory", "wake", "size_bytes", "iters"]
            .map(String::from)
            .to_vec();
        expected.extend(["half_rtt_us", "cpu_us_per_message"].map(String::from));
        expected.sort();
        let mut keys = keys(&json);
        keys.sort();
        assert_eq!(keys, expected);
    }

    #[test]
    fn a_stream_row_has_the_agreed_fields_and_medians() {
        let subject = Subject::Baseline(Baseline::Ring);
        let samples = [0.5, 9.0, 1.0]
            .map(|seconds| Sample { figures: Figures::Stream { seconds }, disturbed: 0.0 });
        let row = Row::of(&case(Program::Bandwidth, subject), None, &samples).unwrap();
        assert_eq!(
            row.json(),
            r#"{"program":"bandwidth","row":"baseline","transport":"ring","memory":"host","wake":"spin","size_bytes":8,"window":64,"messages":20000,"seconds":1.0,"gb_per_s":0.00016,"messages_per_s":20000.0}"#
        );
    }
}
