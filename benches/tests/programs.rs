//! The programs as their users meet them: processes, standard output, exit status.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use thalweg_bench::case::{Case, Memory, Program, Subject, Transport, Wake};
use thalweg_bench::session;

const PINGPONG: &str = env!("CARGO_BIN_EXE_pingpong");
const BANDWIDTH: &str = env!("CARGO_BIN_EXE_bandwidth");
const INFO: &str = env!("CARGO_BIN_EXE_thalweg-info");
const RATIOS: &str = env!("CARGO_BIN_EXE_thalweg-ratios");

/// No program of these tests may take longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a program to its end; one that hangs is killed, so that its test fails.
fn run(program: &str, words: &str) -> Output {
    run_command(Command::new(program).args(words.split_ascii_whitespace()))
}

/// The same under a limit of the shell's, for instance `-n 16`.
fn run_limited(limit: &str, program: &str, words: &str) -> Output {
    let script = format!("ulimit {limit} && exec \"$0\" \"$@\"");
    let mut shell = Command::new("sh");
    run_command(shell.args(["-c", &script, program]).args(words.split_ascii_whitespace()))
}

fn run_command(command: &mut Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let id = child.id();
    let (ended, end) = mpsc::channel::<()>();
    let watch = thread::spawn(move || {
        if end.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            // SAFETY: only sends a signal; the process is still being waited for, so that its
            // number is its own.
            unsafe { libc::kill(id as libc::pid_t, libc::SIGKILL) };
        }
    });
    let output = child.wait_with_output().unwrap();
    drop(ended);
    watch.join().unwrap();
    output
}

fn rows(output: &Output) -> Vec<Value> {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", output.status);
    let text = std::str::from_utf8(&output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

fn keys(row: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = row.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

#[test]
fn pingpong_prints_the_agreed_rows_and_nothing_else() {
    let words = "--transport shm,tcp --size 8,64KiB --wake adaptive --iters 50 --warmup 5 \
                 --baseline=raw-tcp,memcpy,cma,eventfd --json";
    let rows = rows(&run(PINGPONG, words));
    let expected = [
        "cpu_us_per_message",
        "half_rtt_us",
        "iters",
        "memory",
        "program",
        "row",
        "size_bytes",
        "transport",
        "wake",
    ];
    for row in &rows {
        assert_eq!(keys(row), expected);
        assert_eq!(keys(&row["half_rtt_us"]), ["max", "min", "p50", "p90", "p99"]);
        let at = |key: &str| row["half_rtt_us"][key].as_f64().unwrap();
        assert!(at("min") > 0.0 && at("min") <= at("p50") && at("p99") <= at("max"), "{row}");
    }
    let count = |kind: &str| rows.iter().filter(|row| row["row"] == kind).count();
    assert_eq!(count("thalweg"), 4);
    assert_eq!(count("baseline"), 7);
}

#[test]
fn bandwidth_prints_the_agreed_rows_and_nothing_else() {
    let words = "--transport shm,tcp --memory host,loaned --size 8,1MiB --window 3 --iters 40 \
                 --warmup 4 --baseline=raw-tcp,memcpy --json";
    let rows = rows(&run(BANDWIDTH, words));
    let expected = [
        "gb_per_s",
        "memory",
        "messages",
        "messages_per_s",
        "program",
        "row",
        "seconds",
        "size_bytes",
        "transport",
        "wake",
        "window",
    ];
    assert_eq!(rows.len(), 12);
    for row in &rows {
        assert_eq!(keys(row), expected);
        assert_eq!((&row["window"], &row["messages"]), (&Value::from(3), &Value::from(40)));
        let [size, rate, bytes] =
            ["size_bytes", "messages_per_s", "gb_per_s"].map(|key| row[key].as_f64().unwrap());
        assert!((size * rate / 1e9 - bytes).abs() <= bytes * 1e-9, "{row}");
    }
}

#[test]
fn frames_loans_and_forbidden_single_copies_arrive_whole() {
    for words in [
        "--frames 100,165,620000 --transport tcp,shm",
        "--frames 100,0,70000 --transport shm --memory loaned",
        "--size 0,1,57,4MiB --transport shm --single-copy off",
        "--size 8,8MiB --transport shm --memory loaned --wake spin",
        "--size 8 --transport shm,tcp --wake park",
        "--size 3MiB --transport auto --repeat 2",
    ] {
        let rows = rows(&run(PINGPONG, &format!("{words} --iters 10 --warmup 12 --json")));
        assert!(!rows.is_empty(), "{words}");
    }
}

#[test]
fn auto_reports_the_link_that_was_chosen() {
    let rows = rows(&run(PINGPONG, "--transport auto --size 8 --iters 10 --warmup 1 --json"));
    assert!(["shm", "tcp"].map(Value::from).contains(&rows[0]["transport"]), "{}", rows[0]);
}

#[test]
fn a_plot_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("plot.svg");
    let words = format!(
        "--transport tcp --size 8,1KiB --iters 20 --warmup 2 --baseline=raw-tcp --plot {}",
        file.display()
    );
    let output = run(PINGPONG, &words);
    assert!(output.status.success());
    assert!(String::from_utf8(output.stdout).unwrap().contains("× raw-tcp"));
    let svg = fs::read_to_string(file).unwrap();
    assert!(svg.contains("tcp adaptive") && svg.contains(">raw-tcp<") && svg.contains("1 KiB"));
}

#[test]
fn two_programs_meet_by_listen_and_connect() {
    let (mut listener, mut said, address) = listening(&["--once"]);
    let words = format!(
        "--connect {address} --size 8,64KiB --wake park,spin --iters 30 --warmup 3 \
         --baseline=raw-tcp,cma --json"
    );
    let rows = rows(&run(PINGPONG, &words));
    assert_eq!(rows.len(), 6, "two sizes by two ways of waiting, and raw-tcp at both");
    assert!(listener.ends_within(PATIENCE));
    let mut rest = String::new();
    said.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "", "a listener that served well says nothing more");
}

/// A program with `--listen`, what it goes on to say, and its address.
fn listening(words: &[&str]) -> (Killed, BufReader<ChildStderr>, String) {
    let mut listener = Killed(
        Command::new(PINGPONG)
            .args(["--listen", "thalweg://127.0.0.1:0"])
            .args(words)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut line = String::new();
    let mut said = BufReader::new(listener.0.stderr.take().unwrap());
    said.read_line(&mut line).unwrap();
    let address = line.split_ascii_whitespace().nth(2).unwrap().trim_end_matches(';');
    (listener, said, address.to_owned())
}

#[test]
fn a_listener_never_gives_its_port_up() {
    let (_listener, _said, address) = listening(&[]);
    let port: u16 = address.rsplit(':').next().unwrap().parse().unwrap();
    let (ended, end) = mpsc::channel::<()>();
    let thief = thread::spawn(move || {
        while end.try_recv() == Err(mpsc::TryRecvError::Empty) {
            // Takes whatever nobody listens at.
            assert!(std::net::TcpListener::bind(("127.0.0.1", port)).is_err());
            thread::yield_now();
        }
    });
    let words =
        format!("--connect {address} --size 8 --wake park,spin --iters 5 --warmup 1 --json");
    for _ in 0..2 {
        assert_eq!(rows(&run(PINGPONG, &words)).len(), 2);
    }
    drop(ended);
    thief.join().unwrap();
    let second = run(PINGPONG, &format!("--listen {address}"));
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("address in use"));
}

#[test]
fn a_connector_that_stays_away_does_not_block_the_next_one_for_long() {
    let (_listener, _said, address) = listening(&[]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // It asks for a session and does not come to it.
    runtime.block_on(session::arrange(&case(), &address, false)).unwrap();
    let words = format!("--connect {address} --size 8 --iters 5 --warmup 1 --json");
    assert_eq!(rows(&run(PINGPONG, &words)).len(), 1);
}

fn case() -> Case {
    let (transport, memory, wake) = (Transport::auto(), Memory::Host, Wake::Park);
    Case {
        program: Program::Pingpong,
        subject: Subject::Thalweg { transport, memory, wake, single_copy: true },
        size_bytes: 8,
        frames: vec![8],
        iters: 1,
        warmup: 1,
        window: 1,
    }
}

#[test]
fn the_environment_is_read_on_both_sides() {
    let with = |program: &str, name: &str, value: &str, words: &str| {
        run_command(
            Command::new(program)
                .env("THALWEG_TRANSPORTS", "tcp")
                .env(name, value)
                .args(words.split_ascii_whitespace()),
        )
    };
    let words = "--size 8 --iters 5 --warmup 1 --json";
    let rows = rows(&with(PINGPONG, "THALWEG_WAKE", "park", words));
    assert_eq!(rows.len(), 1);
    assert_eq!((&rows[0]["transport"], &rows[0]["wake"]), (&"tcp".into(), &"park".into()));
    for (program, words) in [(PINGPONG, words), (BANDWIDTH, words), (INFO, "")] {
        let output = with(program, "THALWEG_TYPO", "1", words);
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains("THALWEG_TYPO"));
    }
    let output = with(PINGPONG, "THALWEG_MAX_MESSAGE", "4KiB", "--size 4097");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("4096 bytes"));
}

#[test]
fn a_want_of_descriptors_leaves_out_what_needs_them() {
    let output = run_limited("-n 16", PINGPONG, "--iters 5 --json");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let rows = rows(&output);
    assert!(rows.iter().any(|row| row["transport"] == "tcp"), "{errors}");
    if rows.iter().all(|row| row["transport"] != "shm") {
        assert!(errors.contains("left out: shm"), "{errors}");
    }
    let output = run_limited("-n 8", INFO, "");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("raise the limit of open files"), "{text}");
    assert!(!text.contains("mount /proc"), "{text}");
}

#[test]
fn memory_that_cannot_be_had_is_an_error() {
    let output = run_limited("-v 2000000", PINGPONG, "--transport tcp --size 8GiB --iters 1");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.contains("no memory for a buffer of 8589934592 bytes"), "{errors}");
}

#[test]
fn a_row_of_ratios_that_does_not_exist_is_an_error() {
    let output = run(RATIOS, "--only nosuchrow");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("tcp park 8 B p50 / raw-tcp"));
    assert!(output.stdout.is_empty());
}

/// A child that no test leaves behind.
struct Killed(Child);

impl Killed {
    fn ends_within(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if self.0.try_wait().unwrap().is_some_and(|status| status.success()) {
                return true;
            }
            thread::yield_now();
        }
        false
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_peer_does_not_outlive_its_parent() {
    for words in ["--baseline=cacheline --size 8", "--transport tcp --size 8 --wake park"] {
        let mut parent = Killed(
            Command::new(PINGPONG)
                .args(words.split_ascii_whitespace())
                .args(["--iters", "10000000", "--json"])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap(),
        );
        let peer = child_of(parent.0.id());
        parent.0.kill().unwrap();
        parent.0.wait().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while alive(peer) {
            assert!(Instant::now() < deadline, "peer {peer} lives on");
            thread::yield_now();
        }
    }
}

/// The peer process, as soon as there is one.
fn child_of(pid: u32) -> u32 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let first = children.unwrap_or_default().split_ascii_whitespace().next().map(str::to_owned);
        if let Some(child) = first {
            return child.parse().unwrap();
        }
        assert!(Instant::now() < deadline, "no peer was started");
        thread::yield_now();
    }
}

/// Whether a process exists and is no zombie.
fn alive(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = status.rsplit(')').next().and_then(|rest| rest.split_ascii_whitespace().next());
    state.is_some_and(|state| state != "Z" && state != "X")
}

#[test]
fn what_cannot_be_measured_is_a_clear_error() {
    for (words, expected) in [
        ("--transport warp", "no link called"),
        ("--size lots", "not a size"),
        ("--pin 4000,4001 --size 8", "CPU 4000"),
        ("--pin 0,4000", "these may: "),
        ("--connect thalweg://127.0.0.1:1 --size 8", "127.0.0.1:1"),
    ] {
        let output = run(PINGPONG, words);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{words}");
        assert!(errors.contains(expected), "{words}: {errors}");
        assert!(output.stdout.is_empty(), "{words}");
    }
}

#[test]
fn info_says_the_same_to_people_and_to_scripts() {
    let rows = rows(&run(INFO, "--json"));
    let [info] = rows.as_slice() else { panic!("one object") };
    let links = info["links"].as_array().unwrap();
    let tcp = links.iter().find(|link| link["link"] == "tcp").unwrap();
    assert_eq!(tcp["present"], Value::Bool(true));
    let text = String::from_utf8(run(INFO, "").stdout).unwrap();
    for link in links {
        assert!(text.contains(link["link"].as_str().unwrap()), "{text}");
    }
}

/// The list with this title.
fn part<'a>(text: &'a str, title: &str) -> &'a str {
    let (_, rest) = text.split_once(&format!("\n{title}\n")).unwrap_or_else(|| panic!("{text}"));
    rest.split("\n\n").next().unwrap()
}

#[test]
fn info_says_what_is_chosen_automatically_and_why_not() {
    let rows = rows(&run(INFO, "--json"));
    let [info] = rows.as_slice() else { panic!("one object") };
    let text = String::from_utf8(run(INFO, "").stdout).unwrap();
    let text = part(&text, "Chosen automatically");
    let links = info["auto"].as_array().unwrap();
    for name in ["shm", "tcp", "verbs", "ucx"] {
        let link = links.iter().find(|link| link["link"] == name).unwrap();
        let line = text.lines().find(|line| line.trim_start().starts_with(name)).unwrap();
        assert!(line.contains(link["reason"].as_str().unwrap()), "{line}");
        let fix = link["fix"].as_str().unwrap_or_default();
        assert!(fix.is_empty() || text.contains(&format!("to change: {fix}")), "{text}");
        // Where there is hardware it may be there, or not for reasons of every kind.
        if name == "ucx" && line.contains("there is no hardware") {
            assert!(fix.contains("THALWEG_TRANSPORTS") && link["present"] == false, "{link}");
        }
    }
    // What somebody has named does not change what the library would do by itself.
    let named = Command::new(INFO).env("THALWEG_TRANSPORTS", "ucx").output().unwrap();
    assert_eq!(part(&String::from_utf8_lossy(&named.stdout), "Chosen automatically"), text);
}

#[test]
fn info_says_why_ucx_is_absent() {
    let output = Command::new(INFO).env("THALWEG_UCX_LIBRARY", "/nonexistent/libucp.so.0").output();
    let output = output.unwrap();
    assert!(output.status.success());
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().position(|line| line.trim_start().starts_with("ucx  "));
    let lines: Vec<&str> = text.lines().skip(line.expect("a line about ucx")).take(2).collect();
    assert!(lines[0].contains(" no ") && lines[0].contains("/nonexistent"), "{text}");
    assert!(lines[1].contains("to fix: correct THALWEG_UCX_LIBRARY"), "{text}");
}

#[test]
fn info_lists_what_the_site_sets_for_ucx() {
    let output = Command::new(INFO).env("UCX_TLS", "tcp,self").output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find(|line| line.trim_start().starts_with("ucx  ")).expect("ucx");
    // Without libucp there is nothing that could honour it.
    assert!(line.contains(" no ") || line.contains("UCX_TLS=tcp,self"), "{text}");
    assert!(line.contains(" no ") || line.contains("libucp.so"), "{text}");
}

#[test]
fn both_programs_measure_over_ucx() {
    let words = "--transport ucx --size 8,64KiB --iters 50 --warmup 5 --baseline=ucx-e --json";
    for program in [PINGPONG, BANDWIDTH] {
        let output = run(program, words);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() && errors.contains("libucp") {
            // Past the harness, which keeps the output of tests that pass.
            let _ = std::io::Write::write_all(
                &mut std::io::stderr(),
                format!("SKIPPED: both_programs_measure_over_ucx: {errors}\n").as_bytes(),
            );
            return;
        }
        let rows = rows(&output);
        let over = |name: &str| rows.iter().filter(|row| row["transport"] == name).count();
        assert_eq!(over("ucx"), 2, "{rows:?}");
        assert!(matches!(over("ucx-e"), 0 | 2), "{rows:?}");
    }
}
