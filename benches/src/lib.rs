//! The programs that measure thalweg beside what the bare system costs.
//!
//! `pingpong` and `bandwidth` share everything but their arithmetic: a [`case::Case`] describes one
//! measurement, [`sweep`] plans the cases, [`measure`] runs each of them between this process and
//! a [`peer`], and [`rows`], [`table`] and [`plot`] show what came of it. [`session`] measures this
//! library; [`baseline`] measures the bare system and knows nothing of it.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;

pub mod baseline;
pub mod buffer;
pub mod case;
pub mod cli;
pub mod environment;
pub mod info;
pub mod listen;
pub mod measure;
pub mod pattern;
pub mod peer;
pub mod pin;
pub mod plot;
pub mod progress;
pub mod rlimit;
pub mod rows;
pub mod session;
pub mod shared;
pub mod stats;
pub mod sweep;
pub mod table;
pub mod units;

pub use case::Program;

use case::{Case, Memory, Subject, Transport, Wake};
use cli::Common;
use environment::Environment;
use measure::{Results, Where};
use pin::Pins;
use rows::Row;
use sweep::{Place, Plan};

/// The whole program: reads the command line, measures, prints.
pub fn run(program: Program) -> ExitCode {
    if let Some(code) = peer::serve_if_peer(measure::serve) {
        return code;
    }
    rlimit::raise();
    let (options, window) = match program {
        Program::Pingpong => (cli::Pingpong::parse().common, None),
        Program::Bandwidth => {
            let bandwidth = cli::Bandwidth::parse();
            (bandwidth.common, bandwidth.window)
        }
    };
    match work(program, &options, window) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn work(program: Program, options: &Common, window: Option<u32>) -> Result<()> {
    let environment = Environment::read()?;
    if let Some(pins) = options.pin {
        pins.check()?;
    }
    let pins = options.pin.or_else(Pins::default_pair);
    if let Some(address) = &options.listen {
        bind(pins.map(|pins| pins.peer))?;
        return listen::run(address, options.once);
    }
    bind(pins.map(|pins| pins.here))?;
    let peer = match &options.connect {
        Some(address) => Where::There(address.clone()),
        None => Where::Here(pins),
    };
    let place = Place {
        links: info::working_links()?,
        two_cores: pins.is_some_and(|pins| pins.here != pins.peer),
        remote: options.connect.is_some(),
        ucx: baseline::ucx::installed(),
        perftest: baseline::perftest::installed(),
        environment,
    };
    check_sizes(options, &place.environment)?;
    let Plan { cases, left_out } = sweep::plan(program, options, window, &place);
    let mut output = std::io::stdout();
    let mut broken = None;
    // Whoever names a link wants that link.
    let lenient = options.transport.is_empty();
    let mut results = measure::run(&cases, options.repeat as usize, &peer, lenient, |row| {
        if options.json {
            broken = writeln!(output, "{}", row.json()).and_then(|()| output.flush()).err();
        }
    })?;
    if let Some(error) = broken {
        return Err(error).context("writing the results");
    }
    if options.is_sweep() && !options.json {
        results.routes = route_of_choice(options, &place, &peer)?;
    }
    for line in left_out.iter().chain(&results.left_out) {
        eprintln!("left out: {line}");
    }
    ensure!(!results.rows.is_empty(), "nothing could be measured");
    show(program, options, pins, &results)
}

/// Messages that every node would refuse need not be made.
fn check_sizes(options: &Common, environment: &Environment) -> Result<()> {
    let frames: usize = options.frames.iter().sum();
    let largest = options.size.iter().copied().fold(frames, usize::max) as u64;
    let limit = environment.max_message_bytes;
    ensure!(
        largest <= limit,
        "a message of {largest} bytes is larger than a node takes, {limit} bytes; raise \
         THALWEG_MAX_MESSAGE on both sides"
    );
    Ok(())
}

fn bind(cpu: Option<usize>) -> Result<()> {
    match cpu {
        Some(cpu) => pin::to(cpu).with_context(|| format!("binding this process to CPU {cpu}")),
        None => Ok(()),
    }
}

fn show(program: Program, options: &Common, pins: Option<Pins>, results: &Results) -> Result<()> {
    if let Some(file) = &options.plot {
        let axis = match program {
            Program::Pingpong => plot::Axis::Microseconds,
            Program::Bandwidth => plot::Axis::Gigabytes,
        };
        std::fs::write(file, plot::render(&results.rows, axis))
            .with_context(|| format!("writing {}", file.display()))?;
    }
    if options.json {
        return Ok(());
    }
    let text = report(program, options, pins, &results.rows, &results.routes);
    std::io::stdout().write_all(text.as_bytes()).context("writing the results")
}

fn report(
    program: Program,
    options: &Common,
    pins: Option<Pins>,
    rows: &[Row],
    routes: &[(String, String)],
) -> String {
    let what = match program {
        Program::Pingpong => "Half a round trip",
        Program::Bandwidth => "One-way stream, acknowledged at its end (1 GB = 10⁹ B)",
    };
    let cores = match (&options.connect, pins) {
        (Some(address), _) => format!("to {address}"),
        (None, Some(Pins { here, peer })) => format!("two processes, CPUs {here} and {peer}"),
        (None, None) => "two processes on one CPU".to_owned(),
    };
    let mut text = format!("{what}; {cores}; (…): the bare system\n\n");
    text.push_str(&table::render(rows, options.single_copy));
    for (allowed, route) in routes {
        let title = match allowed.as_str() {
            "auto" => "Route, every link allowed:".to_owned(),
            link => format!("Route, only {link} allowed:"),
        };
        text.push_str(&format!("\n{title}\n{}\n", route.trim_end()));
    }
    text
}

/// Connects once more with every link allowed, to show what the library would choose and why.
fn route_of_choice(options: &Common, place: &Place, peer: &Where) -> Result<Vec<(String, String)>> {
    let usual = if place.two_cores { Wake::Adaptive } else { Wake::Park };
    let wake = place.environment.wake.unwrap_or(usual);
    let case = Case {
        program: Program::Pingpong,
        subject: Subject::Thalweg {
            transport: Transport::auto(),
            memory: Memory::Host,
            wake,
            single_copy: options.single_copy,
        },
        size_bytes: 8,
        frames: vec![8],
        iters: 1,
        warmup: 1,
        window: 1,
    };
    Ok(measure::run(&[case], 1, peer, true, |_| {})?.routes)
}
