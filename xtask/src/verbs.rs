//! The tests over verbs, in a virtual machine whose kernel makes RDMA devices of network interfaces.
//! Each test program runs in a machine of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::run;
use crate::summary::{Row, Summary};
use crate::{FEATURES, With, cargo};

const NAME: &str = "tests over verbs";
/// Its status when the machine cannot be made here.
const CANNOT: i32 = 77;
/// What one test program may take in its machine, in seconds; and what it takes beyond that to make
/// the machine, and to show what the program has said if it is ended.
const PROGRAM_SECONDS: u64 = 240;
const PROGRAM_SECONDS_LONG: u64 = 1200;
const AROUND_SECONDS: u64 = 30;
/// More than the machine has processors, since tests wait for much: with four the conformance tests took
/// 54 s, with two 73, with six 70.
const TEST_THREADS: &str = "4";
/// Over UCX, where it sleeps and where it polls all the time: four of those find no end on two
/// processors.
const TEST_THREADS_OVER_UCX: &str = "3";
const TEST_THREADS_POLLING: &str = "2";
/// The machine is slow: after 5 s its pools still fill (93 to 143 MiB), after 15 s they do not.
const SOAK_SECONDS: &str = "20";
const SOAK_SECONDS_LONG: &str = "60";
/// For each of two nodes: within one device.
const WITHIN: &str = "rxe0,rxe0";
/// The same, across two wires: long payloads go by both.
const WIRES: &str = "rxa+rxc,rxb+rxd";
/// Those of the conformance tests that are run across the wires as well.
const ACROSS: [&str; 6] = [
    "order_of_pipelined_messages::verbs",
    "sizes_of_messages::verbs",
    "sizes_of_tags::verbs",
    "sizes_of_one_sided::verbs",
    "both_directions_at_once::verbs",
    "close_with_much_in_flight::verbs",
];

/// Those that are run over UCX, with InfiniBand's reliable connections as its lanes. In the long form
/// all are, asleep and polling: that takes two and six minutes.
const OVER_UCX: [&str; 12] = [
    "order_of_pipelined_messages::ucx",
    "both_directions_at_once::ucx",
    "cancel_before_it_begins::ucx",
    "credit_is_respected::ucx",
    "one_sided_bounds::ucx",
    "sizes_of_messages::ucx",
    "tag_credit_blocks_and_resumes::ucx",
    "abort_ends_at_once::ucx",
    "abort_ends_what_spins::ucx",
    "drain_waits_for_the_peer::ucx",
    "close_flushes_and_says_why::ucx",
    "tags_interleaved::ucx",
];
const OVER_UCX_LONG: [&str; 1] = ["::ucx"];
/// What UCX uses there; the first address of the device is the one that its packets go by. Of the
/// 4,095 buffers that a side would post to receive into, registering takes most of what connecting
/// takes: on a busy machine more than the handshake has.
const UCX_SETTINGS: [(&str, &str); 5] = [
    ("UCX_TLS", "rc,self"),
    ("UCX_IB_GID_INDEX", "0"),
    ("UCX_NET_DEVICES", "rxe0:1"),
    ("UCX_RC_VERBS_RX_QUEUE_LEN", "256"),
    ("THALWEG_TEST_UCX_SLOW", "1"),
];
const POLLING: &str = "THALWEG_TEST_UCX_SPINS";
/// The folder of the system's libraries.
const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";
/// Of UCX, what it loads itself.
const UCX_FILES: [&str; 4] =
    ["libucp.so.0", "ucx/libuct_ib.so.0", "ucx/libuct_rdmacm.so.0", "ucx/libuct_cma.so.0"];

/// `long`: in their long forms.
pub fn tests(root: &Path, long: bool) -> Summary {
    let mut summary = Summary::new();
    let runner = root.join("tests/vm/run-in-vm.sh");
    if let Err(why) = machine(&runner) {
        summary.add(Row::skipped(NAME, why));
        return summary;
    }
    let programs =
        ["--test", "conformance", "--test", "crash", "--test", "soak", "--test", "verbs"];
    let seconds = if long { SOAK_SECONDS_LONG } else { SOAK_SECONDS };
    let mut within = tests_in(root, &runner, long, &[]).with(&programs).with(&["--", "verbs"]);
    within.env("THALWEG_TEST_SOAK_SECONDS", seconds);
    within.env("THALWEG_TEST_VERBS_DEVICES", WITHIN);
    let conformance = ["--test", "conformance", "--"];
    let mut across = tests_in(root, &runner, long, &[]).with(&conformance);
    across.args(ACROSS).env("THALWEG_TEST_VERBS_DEVICES", WIRES);
    let mut variants =
        vec![("verbs, rxe0", within, TEST_THREADS), ("verbs, two wires", across, TEST_THREADS)];
    let files: Vec<_> = UCX_FILES.iter().map(|file| Path::new(LIBRARIES).join(file)).collect();
    match files.iter().find(|file| !file.exists()) {
        Some(file) => {
            let why = format!("there is no {} (Debian: libucx0)", file.display());
            summary.add(Row::skipped("tests over UCX over rc", why));
        }
        None => {
            let names = if long { &OVER_UCX_LONG[..] } else { &OVER_UCX };
            let over_ucx = || {
                let mut tests = tests_in(root, &runner, long, &files).with(&conformance);
                tests.args(names).envs(UCX_SETTINGS);
                tests
            };
            variants.push(("ucx, rc on rxe0", over_ucx(), TEST_THREADS_OVER_UCX));
            if long {
                let mut polling = over_ucx();
                polling.env(POLLING, "1");
                variants.push(("ucx, rc on rxe0, polling", polling, TEST_THREADS_POLLING));
            }
        }
    }
    for (what, mut command, threads) in variants {
        println!("\n== {what}");
        command.args(["--test-threads", threads]);
        if long {
            command.arg("--show-output").env("THALWEG_TEST_LONG", "1");
        }
        let each = Duration::from_secs(program_seconds(long) + AROUND_SECONDS);
        let mut rows = run::tests(command, each, 3 * each);
        rows.iter_mut().for_each(|row| row.name = format!("{} ({what})", row.name));
        summary.extend(rows);
    }
    summary
}

fn program_seconds(long: bool) -> u64 {
    if long { PROGRAM_SECONDS_LONG } else { PROGRAM_SECONDS }
}

/// `cargo test` with the machine between it and the test programs, which has these files too.
fn tests_in(root: &Path, runner: &Path, long: bool, files: &[PathBuf]) -> Command {
    let mut command = match long {
        true => cargo(&["test", "--release", "--package", "thalweg-tests", "--no-fail-fast"]),
        false => cargo(&["test", "--workspace", "--no-fail-fast"]).with(&FEATURES),
    };
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(root.join("target"), Into::into);
    let peer = target.join(if long { "release" } else { "debug" }).join("thalweg-test-peer");
    let limit = program_seconds(long);
    let mut runner = format!("{} -t {limit} -r", runner.display());
    for file in std::iter::once(&peer).chain(files) {
        runner = format!("{runner} -a {}", file.display());
    }
    runner.push_str(" --");
    command.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER", runner);
    command
}

/// Whether the machine can be made; `Err`: what is missing.
fn machine(runner: &Path) -> Result<(), String> {
    let tried = Command::new(runner).args(["-t", "120", "-r", "--", "/bin/true"]).output();
    let output = tried.map_err(|error| format!("{}: {error}", runner.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().last().unwrap_or("it did not say why").to_owned();
    match output.status.code() {
        Some(0) => Ok(()),
        Some(CANNOT) => Err(last),
        _ => Err(format!("the virtual machine does not start: {last}")),
    }
}
