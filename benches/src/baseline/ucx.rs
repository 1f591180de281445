//! `ucx` and `ucx-e`: what `ucx_perftest` measures for tagged messages (`tag_lat`, `tag_bw`), where
//! it is installed, with the same size and pinning: over shared memory (`UCX_TLS=posix,cma,self`),
//! or with the settings and the handling of errors that the link `ucx` has.

use std::process::Command;

use anyhow::{Context, Result};

use super::tool;
use crate::case::{Case, Program};
use crate::pin::Pins;
use crate::stats::Sample;

const PROGRAM: &str = "ucx_perftest";

/// What UCX may use.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Settings {
    /// Memory of this host, whatever the environment says.
    SharedMemory,
    /// What the environment says, with endpoints that learn of the peer's death, and shared memory
    /// for those too.
    OfTheLink,
}

/// Whether the program can be started.
pub fn installed() -> bool {
    tool::installed(PROGRAM)
}

pub(super) fn measure(case: &Case, pins: Option<Pins>, settings: Settings) -> Result<Sample> {
    let command = |port| command(case, settings, port);
    tool::measure(PROGRAM, pins, command, |output| figures(case, output))
}

fn command(case: &Case, settings: Settings, port: u16) -> Command {
    let mut command = Command::new(PROGRAM);
    let test = match case.program {
        Program::Pingpong => "tag_lat",
        Program::Bandwidth => "tag_bw",
    };
    command.env("UCX_LOG_LEVEL", "fatal").args(["-t", test, "-f", "-v"]);
    match settings {
        Settings::SharedMemory => {
            command.env("UCX_TLS", "posix,cma,self");
        }
        Settings::OfTheLink => {
            let set = std::env::var_os("UCX_MM_ERROR_HANDLING").unwrap_or_else(|| "y".into());
            command.arg("-e").env("UCX_MM_ERROR_HANDLING", set);
        }
    }
    for (option, value) in
        [("-p", port.into()), ("-s", case.size_bytes), ("-n", case.iters), ("-w", case.warmup)]
    {
        command.arg(option).arg(value.to_string());
    }
    if case.program == Program::Bandwidth {
        command.arg("-O").arg(case.window.to_string());
    }
    command
}

/// Reads the last line: iterations, percentile, average and overall latency in µs, average and
/// overall bandwidth in MiB/s, average and overall rate.
fn figures(case: &Case, output: &str) -> Result<Sample> {
    let line =
        output.lines().rev().find(|line| line.contains(',')).context("no line of figures")?;
    let column = |index| tool::column(line.split(','), index);
    match case.program {
        Program::Pingpong => Ok(tool::latency(column(1)?)),
        Program::Bandwidth => {
            // The rate is printed as a whole number, the bandwidth with two decimals.
            let by_rate = column(7)?;
            let by_bytes = tool::per_second(case, column(5)?);
            tool::stream(case, if by_rate > 10_000.0 { by_rate } else { by_bytes })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::{Baseline, Subject};
    use crate::stats::Figures;

    fn case(program: Program, size_bytes: usize) -> Case {
        Case {
            program,
            subject: Subject::Baseline(Baseline::Ucx),
            size_bytes,
            frames: vec![size_bytes],
            iters: 200,
            warmup: 10,
            window: 4,
        }
    }

    #[test]
    fn its_output_is_read() {
        let sample = figures(
            &case(Program::Pingpong, 8),
            " 20000,0.344,0.346,0.347,22.08,22.08,2894170,2894170\n",
        );
        let Figures::Latency { half_rtt_us, .. } = sample.unwrap().figures else { panic!() };
        assert_eq!(half_rtt_us.p50, Some(0.344));
        let sample = figures(
            &case(Program::Bandwidth, 8 << 20),
            " 200,767.904,776.935,776.935,10296.88,10296.88,1287,1287\n",
        );
        let Figures::Stream { seconds } = sample.unwrap().figures else { panic!() };
        assert!((seconds - 0.15538).abs() < 1e-4, "{seconds}");
        assert!(figures(&case(Program::Pingpong, 8), "").is_err());
        assert!(figures(&case(Program::Pingpong, 8), "1,two,3").is_err());
    }
}
