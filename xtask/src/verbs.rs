//! The tests over verbs, in a virtual machine whose kernel makes RDMA devices of network interfaces.
//! Two machines are made, since each takes some 8 s: for all tests over verbs on one device, which
//! kill processes and remove devices, and for what runs besides.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::run::{self, Step};
use crate::summary::{Row, Summary};
use crate::{FEATURES, With, cargo, minutes};

const NAME: &str = "tests over verbs";
/// Its status when the machine cannot be made here.
const CANNOT: i32 = 77;
/// The status of `timeout`.
const TIME_UP: i32 = 124;
const CONFORMANCE: &str = "conformance";
/// What runs on one device.
const TESTS: [&str; 4] = [CONFORMANCE, "crash", "soak", "verbs"];
/// What one test program may take in its machine, in seconds; and what it takes beyond that to make
/// the machine.
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
/// The devices of each of two nodes.
const DEVICES: &str = "THALWEG_TEST_VERBS_DEVICES";
/// Within one device.
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

/// The machine that they run in, and what it needs to run.
struct Machine {
    runner: PathBuf,
    built: Built,
    long: bool,
}

/// What was built.
struct Built {
    /// The test programs.
    tests: Vec<PathBuf>,
    /// The program that plays their peer.
    peer: PathBuf,
}

/// One run of a test program.
struct Job {
    /// What it is that is tested.
    what: &'static str,
    program: &'static str,
    filters: Vec<&'static str>,
    threads: &'static str,
    settings: Vec<(&'static str, &'static str)>,
}

impl Job {
    fn within(program: &'static str, long: bool) -> Job {
        let seconds = if long { SOAK_SECONDS_LONG } else { SOAK_SECONDS };
        Job {
            what: "verbs, rxe0",
            program,
            filters: vec!["verbs"],
            threads: TEST_THREADS,
            settings: vec![(DEVICES, WITHIN), ("THALWEG_TEST_SOAK_SECONDS", seconds)],
        }
    }

    fn across() -> Job {
        Job {
            what: "verbs, two wires",
            program: CONFORMANCE,
            filters: ACROSS.to_vec(),
            threads: TEST_THREADS,
            settings: vec![(DEVICES, WIRES)],
        }
    }

    fn over_ucx(long: bool) -> Job {
        Job {
            what: "ucx, rc on rxe0",
            program: CONFORMANCE,
            filters: if long { OVER_UCX_LONG.to_vec() } else { OVER_UCX.to_vec() },
            threads: TEST_THREADS_OVER_UCX,
            settings: UCX_SETTINGS.to_vec(),
        }
    }

    fn polling(self) -> Job {
        let settings = [self.settings, vec![(POLLING, "1")]].concat();
        Job { what: "ucx, rc on rxe0, polling", threads: TEST_THREADS_POLLING, settings, ..self }
    }

    /// What its results are called.
    fn name(&self) -> String {
        format!("{} ({})", self.program, self.what)
    }

    /// A line of the machine's shell, whose `number`-th argument is the program. Says what `cargo test`
    /// says, for whoever reads the results.
    fn line(&self, number: usize, long: bool) -> String {
        let Job { what, program, threads, .. } = self;
        let settings = self.settings.iter().map(|(name, value)| format!("{name}={value} "));
        let settings: String = settings.collect();
        let (long_too, show) =
            if long { ("THALWEG_TEST_LONG=1 ", " --show-output") } else { ("", "") };
        let (seconds, filters) = (program_seconds(long), self.filters.join(" "));
        format!(
            "echo \"     Running tests/{program}.rs [{what}] (${number})\"\n\
             env {settings}{long_too}timeout -s KILL {seconds} \"${number}\" {filters} \
             --test-threads {threads}{show} || {{ echo \"error: test failed\"; failed=1; }}\n"
        )
    }
}

/// What the machine's shell does: each job in turn, in the face of failures, which the status tells of.
fn script(jobs: &[Job], long: bool) -> String {
    let lines = jobs.iter().enumerate().map(|(index, job)| job.line(index + 1, long));
    format!("failed=0\n{}exit $failed", lines.collect::<String>())
}

/// `long`: in their long forms.
pub fn tests(root: &Path, long: bool) -> Summary {
    let mut summary = Summary::new();
    let built = match Built::new(root, long) {
        Ok(built) => built,
        Err(row) => {
            summary.add(row);
            return summary;
        }
    };
    let machine = Machine { runner: root.join("tests/vm/run-in-vm.sh"), built, long };
    if let Err(why) = machine.starts() {
        summary.add(Row::skipped(NAME, why));
        return summary;
    }
    // What may leave the kernel's devices in disorder has a machine of its own.
    let within = TESTS.map(|program| Job::within(program, long));
    summary.extend(machine.run(&within, &[]));
    let mut others = vec![Job::across()];
    let files: Vec<_> = UCX_FILES.iter().map(|file| Path::new(LIBRARIES).join(file)).collect();
    let missing = files.iter().find(|file| !file.exists());
    if missing.is_none() {
        others.push(Job::over_ucx(long));
        others.extend(long.then(|| Job::over_ucx(long).polling()));
    }
    summary.extend(machine.run(&others, if missing.is_none() { &files } else { &[] }));
    if let Some(file) = missing {
        let why = format!("there is no {} (Debian: libucx0)", file.display());
        summary.add(Row::skipped("tests over UCX over rc", why));
    }
    summary
}

fn program_seconds(long: bool) -> u64 {
    if long { PROGRAM_SECONDS_LONG } else { PROGRAM_SECONDS }
}

impl Built {
    /// `Err`: why nothing was.
    fn new(root: &Path, long: bool) -> Result<Built, Row> {
        let mut build = match long {
            true => cargo(&["test", "--release", "--package", "thalweg-tests", "--no-run"]),
            false => cargo(&["test", "--workspace", "--no-run"]).with(&FEATURES),
        };
        for test in TESTS {
            build.args(["--test", test]);
        }
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or(root.join("target"), Into::into);
        let peer = target.join(if long { "release" } else { "debug" }).join("thalweg-test-peer");
        let mut tests = Vec::new();
        let row = Step::new(NAME, minutes(20))
            .listen(build, |line| tests.extend(executable(line).map(|path| root.join(path))));
        if row.failed() { Err(row) } else { Ok(Built { tests, peer }) }
    }

    /// The program of a test; one that is not there is said by the machine.
    fn test(&self, name: &str) -> PathBuf {
        let is_it = |path: &&PathBuf| {
            let file = path.file_name().and_then(|file| file.to_str());
            file.and_then(|file| file.rsplit_once('-')).is_some_and(|(of, _)| of == name)
        };
        self.tests.iter().find(is_it).cloned().unwrap_or_else(|| name.into())
    }
}

/// `Executable tests/crash.rs (target/debug/deps/crash-0123456789abcdef)`
fn executable(line: &str) -> Option<&str> {
    let (_, path) = line.trim_start().strip_prefix("Executable ")?.split_once(" (")?;
    path.strip_suffix(')')
}

impl Machine {
    /// Whether it can be made; `Err`: what is missing.
    fn starts(&self) -> Result<(), String> {
        // It may have to fetch things, or to wait for another that does.
        let mut timeout = Command::new("timeout").with(&["-k", "5", "600"]);
        let tried = timeout.arg(&self.runner).args(["-r", "-n"]).output();
        let output = tried.map_err(|error| format!("{}: {error}", self.runner.display()))?;
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().last().unwrap_or("it did not say why").to_owned();
        match output.status.code() {
            Some(0) => Ok(()),
            Some(CANNOT) => Err(last),
            Some(TIME_UP) => Err(format!("nothing to make the machine of within 600 s: {last}")),
            _ => Err(format!("the virtual machine cannot be made: {last}")),
        }
    }

    /// The jobs, one after the other in one machine, which has these files too: a row for each.
    fn run(&self, jobs: &[Job], files: &[PathBuf]) -> Vec<Row> {
        let each = program_seconds(self.long) + AROUND_SECONDS;
        let all = each * jobs.len() as u64;
        let mut command = Command::new(&self.runner);
        command.args(["-r", "-t", &all.to_string()]);
        std::iter::once(&self.built.peer).chain(files).for_each(|file| {
            command.arg("-a").arg(file);
        });
        command.args(["--", "sh", "-c", &script(jobs, self.long), "sh"]);
        command.args(jobs.iter().map(|job| self.built.test(job.program)));
        let seconds = Duration::from_secs;
        let mut rows = run::tests(command, seconds(each), seconds(all + AROUND_SECONDS));
        // Those without a single test are not there.
        for name in jobs.iter().map(Job::name) {
            if rows.iter().all(|row| row.name != name) {
                rows.push(Row::failure(name, "the machine told no result".to_owned()));
            }
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cargo_built_is_found() {
        let line = "  Executable tests/crash.rs (target/debug/deps/crash-00aa)";
        assert_eq!(executable(line), Some("target/debug/deps/crash-00aa"));
        assert_eq!(executable("   Compiling thalweg v0.1.0 (/x)"), None);
    }

    /// What the machine's shell gets runs every job, with its settings, and fails if one does.
    #[test]
    fn every_job_is_run() {
        let job = |program, value| Job {
            what: "x",
            program,
            filters: vec!["a::b"],
            threads: "1",
            settings: vec![("OF", value)],
        };
        let jobs = [job("one", "1"), job("two", "2")];
        let mut shell = Command::new("sh");
        let fails = "#!/bin/sh\necho $0 $OF $*; [ $OF = 2 ]\n";
        let file = std::env::temp_dir().join(format!("thalweg-job-{}", std::process::id()));
        std::fs::write(&file, fails).expect("written");
        let mut mode = std::fs::metadata(&file).expect("there").permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o755);
        std::fs::set_permissions(&file, mode).expect("its own file");
        shell.args(["-c", &script(&jobs, false), "sh"]);
        let output = shell.arg(&file).arg(&file).output().expect("a shell");
        std::fs::remove_file(&file).expect("there");
        let path = file.display();
        let expected = format!(
            "     Running tests/one.rs [x] ({path})\n{path} 1 a::b --test-threads 1\nerror: test failed\n     \
             Running tests/two.rs [x] ({path})\n{path} 2 a::b --test-threads 1\n"
        );
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
        assert_eq!(output.status.code(), Some(1));
    }
}
