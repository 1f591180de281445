//! Programs of others that measure between a server and a client of theirs: starting both, each
//! where it belongs, and reading what the client says. What they are told, and which of their
//! figures mean what, is known to each program's own file.

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::Unavailable;
use crate::case::Case;
use crate::peer::{die_with_parent, wait_until};
use crate::pin::{self, Pins};
use crate::stats::{Figures, Percentiles, Sample};

/// How long the server may take to listen.
const START: Duration = Duration::from_secs(5);
/// How long one run may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// Whether a program can be started.
pub(super) fn installed(program: &str) -> bool {
    let found =
        Command::new(program).arg("-h").stdout(Stdio::null()).stderr(Stdio::null()).status();
    found.is_ok()
}

/// Runs a server and a client of a program: `command` makes either, for this port, and `read` makes
/// of what the client says a sample.
pub(super) fn measure(
    program: &str,
    pins: Option<Pins>,
    command: impl Fn(u16) -> Command,
    read: impl FnOnce(&str) -> Result<Sample>,
) -> Result<Sample> {
    let port = free_port()?;
    let mut server = pinned(command(port), pins.map(|pins| pins.peer));
    server.stdout(Stdio::null());
    let client = || {
        let mut client = pinned(command(port), pins.map(|pins| pins.here));
        client.arg("127.0.0.1");
        client
    };
    let output = run(program, server, client)?;
    read(&output).with_context(|| format!("reading what {program} says: {output:?}"))
}

/// The figure in one of the columns of a line.
pub(super) fn column<'a>(mut columns: impl Iterator<Item = &'a str>, index: usize) -> Result<f64> {
    let text = columns.nth(index).context("too few figures")?.trim();
    text.parse().with_context(|| format!("{text:?} is no figure"))
}

/// A sample of which the median of the latencies is known.
pub(super) fn latency(p50_us: f64) -> Sample {
    let half_rtt_us = Percentiles { p50: Some(p50_us), ..Percentiles::default() };
    sample(Figures::Latency { half_rtt_us, cpu_us_per_message: None })
}

/// A sample of which the rate of messages is known.
pub(super) fn stream(case: &Case, per_second: f64) -> Result<Sample> {
    ensure!(per_second > 0.0, "a rate of nothing");
    Ok(sample(Figures::Stream { seconds: case.iters as f64 / per_second }))
}

fn sample(figures: Figures) -> Sample {
    Sample { figures, disturbed: 0.0 }
}

/// How many messages of this size a second make this bandwidth.
pub(super) fn per_second(case: &Case, mib_per_second: f64) -> f64 {
    mib_per_second * 1_048_576.0 / (case.size_bytes.max(1) as f64)
}

/// A port of the loopback interface that nobody listens on at this moment.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

fn pinned(mut command: Command, cpu: Option<usize>) -> Command {
    if let Some(cpu) = cpu {
        // SAFETY: the closure runs in the forked child, and calls nothing but `sched_setaffinity`.
        unsafe { command.pre_exec(move || pin::to(cpu)) };
    }
    command
}

/// Runs both, and returns what the client says. The client is started again and again until the
/// server listens: a probe of the port would be taken for the client.
fn run(program: &str, server: Command, client: impl Fn() -> Command) -> Result<String> {
    let mut server = start(server)?;
    let output = run_client(program, client, &mut server)
        .map_err(|error| Unavailable::new(format!("{program} fails here: {error:#}")))?;
    wait_until(&mut server.0, Instant::now() + START, "the server")?;
    Ok(output)
}

/// A child that is killed and waited for when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended and been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(mut command: Command) -> Result<Running> {
    command.stdin(Stdio::null()).stderr(Stdio::null());
    die_with_parent(&mut command);
    Ok(Running(command.spawn()?))
}

fn run_client(program: &str, client: impl Fn() -> Command, server: &mut Running) -> Result<String> {
    let begun = Instant::now();
    loop {
        let mut command = client();
        command.stdout(Stdio::piped());
        let mut client = start(command)?;
        let ended = wait_until(&mut client.0, Instant::now() + PATIENCE, program);
        match ended {
            Ok(()) => return output(&mut client.0),
            Err(error) if begun.elapsed() > START => return Err(error),
            Err(_) if server.0.try_wait()?.is_some() => bail!("the {program} server has ended"),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn output(client: &mut Child) -> Result<String> {
    let pipe = client.stdout.take().context("its output was not captured")?;
    std::io::read_to_string(pipe).context("reading its output")
}
