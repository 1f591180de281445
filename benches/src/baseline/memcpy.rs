//! `memcpy`: one core copies from one buffer to another, both touched before.

use std::hint::black_box;
use std::time::Instant;

use anyhow::Result;

use crate::buffer;
use crate::case::{Case, Program};
use crate::pattern::{self, Way};
use crate::stats::{Lap, Recorder, Sample, Usage};

pub(super) fn measure(case: &Case) -> Result<Sample> {
    let mut from = buffer::filled(case.size_bytes, 0u8)?;
    let mut to = buffer::filled(case.size_bytes, 1u8)?;
    for index in 0..case.warmup as u64 {
        pattern::fill(&mut from, 0, index, Way::Out);
        black_box(to.as_mut_slice()).copy_from_slice(black_box(&from));
        pattern::verify(&to, 0, index, Way::Out)?;
    }
    let mut recorder = match case.program {
        Program::Pingpong => Some(Recorder::new(case.iters, Lap::OneWay)?),
        Program::Bandwidth => None,
    };
    let before = Usage::now();
    let start = Instant::now();
    recorder.iter_mut().for_each(Recorder::start);
    for _ in 0..case.iters {
        black_box(to.as_mut_slice()).copy_from_slice(black_box(&from));
        if let Some(recorder) = &mut recorder {
            recorder.lap();
        }
    }
    let wall = start.elapsed();
    let here = before.since();
    Ok(match recorder {
        Some(recorder) => Sample::latency(recorder, case.iters, &[here], wall),
        None => Sample::stream(&[here], wall),
    })
}
