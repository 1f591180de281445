//! `ib-send-lat`, `ib-write-lat`, `ib-write-bw`: what these programs of perftest measure, where they
//! are installed, over the RDMA device that the link `verbs` would take.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};

use super::{Unavailable, tool};
use crate::case::{Baseline, Case, Program};
use crate::pin::Pins;
use crate::stats::Sample;

/// The fewest iterations that perftest takes.
const ITERS_MIN: usize = 5;

/// Whether all of perftest can be started.
pub fn installed() -> bool {
    ["ib_send_lat", "ib_write_lat", "ib_write_bw"].into_iter().all(tool::installed)
}

fn program(baseline: Baseline) -> &'static str {
    match baseline {
        Baseline::IbWriteLat => "ib_write_lat",
        Baseline::IbWriteBw => "ib_write_bw",
        _ => "ib_send_lat",
    }
}

pub(super) fn measure(baseline: Baseline, case: &Case, pins: Option<Pins>) -> Result<Sample> {
    let name = program(baseline);
    let device = device().ok_or_else(|| Unavailable::new("there is no RDMA device"))?;
    let command = |port| command(name, case, &device, port);
    tool::measure(name, pins, command, |output| figures(case, output))
}

/// The first device that the link may use.
fn device() -> Option<String> {
    let named = std::env::var("THALWEG_VERBS_DEVICES").unwrap_or_default();
    let mut here: Vec<String> = fs::read_dir("/sys/class/infiniband")
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    here.sort();
    let named = named.split(',').map(str::trim).find(|name| here.iter().any(|own| own == name));
    named.map(str::to_owned).or(here.into_iter().next())
}

/// The place of the first address of the device's first port that is an IPv4 address of RoCE v2;
/// none for InfiniBand, which needs none.
fn gid_index(device: &str) -> Option<usize> {
    let port = format!("/sys/class/infiniband/{device}/ports/1");
    (0..256).find(|index| {
        let read = |path: String| fs::read_to_string(path).unwrap_or_default();
        read(format!("{port}/gid_attrs/types/{index}")).trim() == "RoCE v2"
            && read(format!("{port}/gids/{index}")).starts_with("0000:0000:0000:0000:0000:ffff:")
    })
}

fn command(name: &str, case: &Case, device: &str, port: u16) -> Command {
    let mut command = Command::new(name);
    command.args(["-F", "-d", device]);
    if let Some(index) = gid_index(device) {
        command.arg("-x").arg(index.to_string());
    }
    let iters = case.iters.max(ITERS_MIN);
    for (option, value) in [("-p", port.into()), ("-s", case.size_bytes), ("-n", iters)] {
        command.arg(option).arg(value.to_string());
    }
    if case.program == Program::Bandwidth {
        // Without the search for the best moment, which takes a time for each message.
        command.arg("-N");
    }
    command
}

/// Reads the line below the heading: bytes, iterations, then of latencies in µs the least, the
/// largest, the median and others; of bandwidth the peak and the average in MiB/s, and millions of
/// messages a second.
fn figures(case: &Case, output: &str) -> Result<Sample> {
    let mut lines = output.lines().skip_while(|line| !line.trim_start().starts_with("#bytes"));
    let line = lines.nth(1).context("no line of figures")?;
    let column = |index| tool::column(line.split_whitespace(), index);
    match case.program {
        Program::Pingpong => Ok(tool::latency(column(4)?)),
        Program::Bandwidth => tool::stream(case, tool::per_second(case, column(3)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::Subject;
    use crate::stats::Figures;

    fn case(program: Program, size_bytes: usize) -> Case {
        Case {
            program,
            subject: Subject::Baseline(Baseline::IbSendLat),
            size_bytes,
            frames: vec![size_bytes],
            iters: 200,
            warmup: 10,
            window: 4,
        }
    }

    #[test]
    fn its_output_is_read() {
        let latency = " #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]\n \
                       8       1000          12.10          812.44       14.25       15.01\n";
        let sample = figures(&case(Program::Pingpong, 8), latency);
        let Figures::Latency { half_rtt_us, .. } = sample.unwrap().figures else { panic!() };
        assert_eq!(half_rtt_us.p50, Some(14.25));
        let bandwidth = " #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   \
                         MsgRate[Mpps]\n 1048576    200              0.00               100.00\n";
        let sample = figures(&case(Program::Bandwidth, 1 << 20), bandwidth);
        let Figures::Stream { seconds } = sample.unwrap().figures else { panic!() };
        assert!((seconds - 2.0).abs() < 1e-9, "{seconds}");
        assert!(figures(&case(Program::Pingpong, 8), "").is_err());
        assert!(figures(&case(Program::Pingpong, 8), " #bytes\n 8 many\n").is_err());
    }
}
