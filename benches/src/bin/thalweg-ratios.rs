//! Measures every ratio that the project promises of its speed, and prints them as a Markdown table.
//!
//! Each row is one run of `pingpong` or `bandwidth` (the programs beside this one), so that both
//! figures of a ratio come from the same run, in turn, on the same two cores; medians.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde_json::Value;

/// Measures the ratios that the project promises of its speed, and prints them as a Markdown table.
///
/// Ends with a failure if one of them misses its "must".
#[derive(Parser)]
#[command(name = "thalweg-ratios", version)]
struct Options {
    /// How often each figure is taken, in turn with the one it is compared with
    #[arg(long, value_name = "N", default_value_t = 9)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: u32,

    /// The CPUs for the two processes; left out: two that this process may use
    #[arg(long, value_name = "A,B")]
    pin: Option<String>,

    /// Measure only the rows whose name contains this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,

    /// Also write the JSON rows from which the ratios were made into this file
    #[arg(long, value_name = "FILE")]
    raw: Option<PathBuf>,
}

/// Whether a small ratio is good (times) or a large one (rates).
#[derive(Clone, Copy, PartialEq)]
enum Better {
    Lower,
    Higher,
}

/// One promise.
struct Promise {
    name: &'static str,
    command: &'static str,
    /// The figure that is judged, and the one below the line: which row, and which field of it.
    above: Pick,
    below: Pick,
    better: Better,
    /// The "must" and the "aim"; none: shown for comparison only.
    limits: Option<(f64, f64)>,
}

/// A row of the program's output: by kind or name, and by message size where several were measured.
#[derive(Clone, Copy)]
struct Pick {
    transport: Transport,
    size_bytes: Option<u64>,
    field: &'static str,
}

#[derive(Clone, Copy)]
enum Transport {
    Thalweg,
    Baseline(&'static str),
}

const P50: &str = "/half_rtt_us/p50";
const GB_PER_S: &str = "/gb_per_s";
const MESSAGES_PER_S: &str = "/messages_per_s";

const fn ours(field: &'static str) -> Pick {
    Pick { transport: Transport::Thalweg, size_bytes: None, field }
}

const fn bare(name: &'static str, field: &'static str) -> Pick {
    Pick { transport: Transport::Baseline(name), size_bytes: None, field }
}

const PROMISES: [Promise; 22] = [
    Promise {
        name: "tcp park 8 B p50 / raw-tcp",
        command: "pingpong --transport tcp --wake park --size 8 --iters 10000 --baseline=raw-tcp",
        above: ours(P50),
        below: bare("raw-tcp", P50),
        better: Better::Lower,
        limits: Some((1.15, 1.03)),
    },
    Promise {
        name: "tcp adaptive 8 B p50 / raw-tcp",
        command: "pingpong --transport tcp --wake adaptive --size 8 --iters 10000 --baseline=raw-tcp",
        above: ours(P50),
        below: bare("raw-tcp", P50),
        better: Better::Lower,
        limits: Some((0.7, 0.45)),
    },
    Promise {
        name: "tcp 8 MiB pingpong speed / raw-tcp",
        command: "pingpong --transport tcp --size 8MiB --iters 60 --warmup 5 --baseline=raw-tcp",
        // Speed is the reciprocal of time.
        above: bare("raw-tcp", P50),
        below: ours(P50),
        better: Better::Higher,
        limits: Some((0.95, 1.1)),
    },
    Promise {
        name: "tcp 8 MiB bandwidth / raw-tcp",
        command: "bandwidth --transport tcp --size 8MiB --iters 150 --warmup 5 --baseline=raw-tcp",
        above: ours(GB_PER_S),
        below: bare("raw-tcp", GB_PER_S),
        better: Better::Higher,
        limits: Some((0.95, 1.1)),
    },
    Promise {
        name: "shm spin 8 B p50 / cacheline",
        command: "pingpong --transport shm --wake spin --size 8 --iters 50000 --baseline=cacheline",
        above: ours(P50),
        below: bare("cacheline", P50),
        better: Better::Lower,
        limits: Some((2.0, 1.4)),
    },
    Promise {
        name: "shm spin 8 B p50 / ucx",
        command: "pingpong --transport shm --wake spin --size 8 --iters 50000 --baseline=ucx",
        above: ours(P50),
        below: bare("ucx", P50),
        better: Better::Lower,
        limits: Some((1.0, 0.75)),
    },
    Promise {
        name: "shm park 8 B p50 / eventfd",
        command: "pingpong --transport shm --wake park --size 8 --iters 10000 --baseline=eventfd",
        above: ours(P50),
        below: bare("eventfd", P50),
        better: Better::Lower,
        limits: Some((1.5, 1.2)),
    },
    Promise {
        name: "shm loaned 8 MiB p50, first and last byte touched / shm loaned 8 B p50",
        command: "pingpong --transport shm --wake spin --memory loaned --size 8,8MiB --iters 20000",
        above: Pick { size_bytes: Some(8 << 20), ..ours(P50) },
        below: Pick { size_bytes: Some(8), ..ours(P50) },
        better: Better::Lower,
        limits: Some((2.5, 1.5)),
    },
    Promise {
        name: "shm host 8 MiB bandwidth / cma",
        command: "bandwidth --transport shm --size 8MiB --iters 200 --warmup 5 --baseline=cma",
        above: ours(GB_PER_S),
        below: bare("cma", GB_PER_S),
        better: Better::Higher,
        limits: Some((0.85, 0.95)),
    },
    Promise {
        name: "shm host 8 MiB bandwidth, process_vm_readv forbidden / memcpy",
        command: "bandwidth --transport shm --single-copy off --size 8MiB --iters 200 --warmup 5 \
                  --baseline=memcpy",
        above: ours(GB_PER_S),
        below: bare("memcpy", GB_PER_S),
        better: Better::Higher,
        limits: Some((0.4, 0.5)),
    },
    Promise {
        name: "frames 100 B + 165 B + 620 KB, tcp, time / one raw-tcp write",
        command: "pingpong --transport tcp --frames 100,165,620000 --iters 500 --baseline=raw-tcp",
        above: ours(P50),
        below: bare("raw-tcp", P50),
        better: Better::Lower,
        limits: Some((1.1, 1.0)),
    },
    Promise {
        name: "8 B messages, window 64, shm spin / ring",
        command: "bandwidth --transport shm --wake spin --size 8 --window 64 --iters 1000000 \
                  --baseline=ring",
        above: ours(MESSAGES_PER_S),
        below: bare("ring", MESSAGES_PER_S),
        better: Better::Higher,
        limits: Some((0.1, 0.3)),
    },
    Promise {
        name: "8 B messages, window 64, shm adaptive / ring",
        command: "bandwidth --transport shm --wake adaptive --size 8 --window 64 --iters 1000000 \
                  --baseline=ring",
        above: ours(MESSAGES_PER_S),
        below: bare("ring", MESSAGES_PER_S),
        better: Better::Higher,
        limits: Some((0.1, 0.3)),
    },
    Promise {
        name: "8 B messages, window 64, shm spin / deep-ring",
        command: "bandwidth --transport shm --wake spin --size 8 --window 64 --iters 1000000 \
                  --baseline=deep-ring",
        above: ours(MESSAGES_PER_S),
        below: bare("deep-ring", MESSAGES_PER_S),
        better: Better::Higher,
        limits: None,
    },
    Promise {
        name: "ucx 8 B p50, UCX_TLS=tcp / ucx_perftest -e tag_lat",
        command: "UCX_TLS=tcp pingpong --transport ucx --wake spin --size 8 --iters 20000 \
                  --baseline=ucx-e",
        above: ours(P50),
        below: bare("ucx-e", P50),
        better: Better::Lower,
        limits: Some((1.5, 1.15)),
    },
    Promise {
        name: "ucx 8 MiB bandwidth, UCX_TLS=tcp / ucx_perftest -e tag_bw",
        command: "UCX_TLS=tcp bandwidth --transport ucx --wake spin --size 8MiB --iters 150 --warmup 5 \
                  --baseline=ucx-e",
        above: ours(GB_PER_S),
        below: bare("ucx-e", GB_PER_S),
        better: Better::Higher,
        limits: Some((0.9, 1.0)),
    },
    Promise {
        name: "ucx 8 B p50, UCX_TLS=posix,cma,self / ucx_perftest -e tag_lat",
        command: "UCX_TLS=posix,cma,self pingpong --transport ucx --wake spin --size 8 --iters 20000 \
                  --baseline=ucx-e",
        above: ours(P50),
        below: bare("ucx-e", P50),
        better: Better::Lower,
        limits: Some((1.5, 1.15)),
    },
    Promise {
        name: "ucx 8 MiB bandwidth, UCX_TLS=posix,cma,self / ucx_perftest -e tag_bw",
        command: "UCX_TLS=posix,cma,self bandwidth --transport ucx --wake spin --size 8MiB --iters 150 --warmup 5 \
                  --baseline=ucx-e",
        above: ours(GB_PER_S),
        below: bare("ucx-e", GB_PER_S),
        better: Better::Higher,
        limits: Some((0.9, 1.0)),
    },
    Promise {
        name: "ucx 8 B p50, UCX_TLS not set / ucx_perftest -e tag_lat",
        command: "pingpong --transport ucx --wake spin --size 8 --iters 20000 \
                  --baseline=ucx-e",
        above: ours(P50),
        below: bare("ucx-e", P50),
        better: Better::Lower,
        limits: Some((1.5, 1.15)),
    },
    Promise {
        name: "ucx 8 MiB bandwidth, UCX_TLS not set / ucx_perftest -e tag_bw",
        command: "bandwidth --transport ucx --wake spin --size 8MiB --iters 150 --warmup 5 \
                  --baseline=ucx-e",
        above: ours(GB_PER_S),
        below: bare("ucx-e", GB_PER_S),
        better: Better::Higher,
        limits: Some((0.9, 1.0)),
    },
    Promise {
        name: "verbs spin 8 B p50 / ib_send_lat",
        command: "pingpong --transport verbs --wake spin --size 8 --iters 3000 --baseline=ib-send-lat",
        above: ours(P50),
        below: bare("ib-send-lat", P50),
        better: Better::Lower,
        limits: Some((2.0, 1.3)),
    },
    Promise {
        name: "verbs 1 MiB bandwidth / ib_write_bw",
        command: "bandwidth --transport verbs --wake spin --size 1MiB --iters 100 --warmup 5 \
                  --baseline=ib-write-bw",
        above: ours(GB_PER_S),
        below: bare("ib-write-bw", GB_PER_S),
        better: Better::Higher,
        limits: Some((0.8, 0.95)),
    },
];

/// A command's settings, which stand before it as in a shell; the program; its arguments.
fn parts(command: &str) -> (Vec<(&str, &str)>, Vec<&str>) {
    let words = command.split_ascii_whitespace();
    let is_setting = |word: &&str| !word.starts_with("--") && word.contains('=');
    let settings = words.clone().take_while(is_setting).filter_map(|word| word.split_once('='));
    (settings.collect(), words.skip_while(is_setting).collect())
}

fn main() -> ExitCode {
    let options = Options::parse();
    match measure_all(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints the table; `false` if a promise is broken.
fn measure_all(options: &Options) -> Result<bool> {
    let wanted = options.only.as_deref().unwrap_or("");
    let promises: Vec<_> = PROMISES.iter().filter(|row| row.name.contains(wanted)).collect();
    ensure!(
        !promises.is_empty(),
        "no row has {wanted:?} in its name; these are there:\n{}",
        PROMISES.map(|row| row.name).join("\n")
    );
    let programs = std::env::current_exe().context("finding this program")?;
    let programs = programs.parent().context("this program lies in no folder")?;
    let mut raw = match &options.raw {
        Some(file) => Some(std::fs::File::create(file).context("creating the raw file")?),
        None => None,
    };
    let mut kept = true;
    println!("| row | must | aim | measured | |\n| --- | --- | --- | --- | --- |");
    for promise in promises {
        if std::io::stderr().is_terminal() {
            eprintln!("measuring {} …", promise.name);
        }
        let rows = run(programs, promise, options)?;
        if let Some(raw) = &mut raw {
            for row in &rows {
                writeln!(raw, "{row}").context("writing the raw file")?;
            }
        }
        kept &= judge(promise, &rows);
        std::io::stdout().flush()?;
    }
    Ok(kept)
}

/// Runs the program of a row and returns its output.
fn run(programs: &Path, promise: &Promise, options: &Options) -> Result<Vec<Value>> {
    let (settings, words) = parts(promise.command);
    let (program, words) = words.split_first().context("a row without a command")?;
    let program = programs.join(program);
    let mut command = Command::new(&program);
    command.envs(settings).args(words).args(["--json", "--repeat", &options.repeat.to_string()]);
    if let Some(pin) = &options.pin {
        command.args(["--pin", pin]);
    }
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {}", program.display()))?;
    ensure!(output.status.success(), "{} ended with {}", promise.command, output.status);
    let text = String::from_utf8(output.stdout).context("reading the rows")?;
    text.lines().map(|line| serde_json::from_str(line).context("reading a row")).collect()
}

/// Prints a line of the table; `false` if the promise is broken.
fn judge(promise: &Promise, rows: &[Value]) -> bool {
    let Promise { name, limits, better, .. } = promise;
    let sign = if *better == Better::Lower { '≤' } else { '≥' };
    let limits_shown = match limits {
        Some((must, aim)) => format!("{sign} {must} | {aim}"),
        None => "– | –".to_owned(),
    };
    let (Some(above), Some(below)) = (find(promise.above, rows), find(promise.below, rows)) else {
        println!("| {name} | {limits_shown} | not measured here | – |");
        return true;
    };
    let ratio = above / below;
    let meets = |limit: f64| {
        if *better == Better::Lower { ratio <= limit } else { ratio >= limit }
    };
    let verdict = match limits {
        None => "–",
        Some((_, aim)) if meets(*aim) => "aim",
        Some((must, _)) if meets(*must) => "must",
        Some(_) => "**missed**",
    };
    println!("| {name} | {limits_shown} | {ratio:.2} | {verdict} |");
    limits.is_none_or(|(must, _)| meets(must))
}

fn find(pick: Pick, rows: &[Value]) -> Option<f64> {
    let matches = |row: &&Value| {
        let kind = match pick.transport {
            Transport::Thalweg => row["row"] == "thalweg",
            Transport::Baseline(name) => row["row"] == "baseline" && row["transport"] == name,
        };
        kind && pick.size_bytes.is_none_or(|size| row["size_bytes"] == size)
    };
    rows.iter().find(matches)?.pointer(pick.field)?.as_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_by_row_and_size() {
        let rows: Vec<Value> = [
            r#"{"row":"thalweg","transport":"shm","size_bytes":8,"half_rtt_us":{"p50":0.2}}"#,
            r#"{"row":"thalweg","transport":"shm","size_bytes":8388608,"half_rtt_us":{"p50":0.3}}"#,
            r#"{"row":"baseline","transport":"cma","size_bytes":8,"half_rtt_us":{"p50":null}}"#,
        ]
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
        assert_eq!(find(ours(P50), &rows), Some(0.2));
        assert_eq!(find(Pick { size_bytes: Some(8 << 20), ..ours(P50) }, &rows), Some(0.3));
        assert_eq!(find(bare("cma", P50), &rows), None);
        assert_eq!(find(bare("ring", P50), &rows), None);
    }

    #[test]
    fn every_command_is_one_that_the_programs_understand() {
        for promise in &PROMISES {
            let (_, words) = parts(promise.command);
            let parsed = match words.first() == Some(&"pingpong") {
                true => thalweg_bench::cli::Pingpong::try_parse_from(words).map(|_| ()),
                false => thalweg_bench::cli::Bandwidth::try_parse_from(words).map(|_| ()),
            };
            parsed.unwrap_or_else(|error| panic!("{}: {error}", promise.name));
        }
    }
}
