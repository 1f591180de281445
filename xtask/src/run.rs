//! Running commands: bounded in time, with their output passed on and read, and nothing left behind.

use std::io::{BufRead, BufReader, PipeReader, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::summary::{Counts, Row};

/// Every process that a step starts has this in its environment, and can be found by it.
const MARK: &str = "THALWEG_TEST_STEP";
/// How often a limit is looked at.
const TICK: Duration = Duration::from_millis(200);
/// How long what was started may take to vanish after the step's command has ended.
const LINGER: Duration = Duration::from_secs(2);
/// A test that could not do its work says so in a line that contains this, a name and a reason. It
/// must write it past its harness, which swallows what `println!` of a test that passes prints.
const SKIPPED: &str = "SKIPPED: ";
/// A long test puts a line that contains this, and what it counted, into the record of the run.
const COUNTED: &str = "SOAK: ";

/// UCX's own log looks like `[…] [host:pid:0] file.c:123 UCX  WARN  …`. The library is to keep it
/// away from people.
const UCX_LOG: [&str; 2] = [".c:", " UCX  "];

/// One command with one verdict.
pub struct Step {
    name: String,
    limit: Duration,
    leftovers: bool,
}

impl Step {
    pub fn new(name: &str, limit: Duration) -> Step {
        Step { name: name.to_owned(), limit, leftovers: false }
    }

    /// Processes that outlive the command are a failure.
    pub fn checks_leftovers(mut self) -> Step {
        self.leftovers = true;
        self
    }

    pub fn run(self, command: Command) -> Row {
        self.listen(command, |_| {})
    }

    /// Hands on what the command says, line by line.
    pub fn listen(self, command: Command, mut hear: impl FnMut(&str)) -> Row {
        println!("\n== {}", self.name);
        let start = Instant::now();
        let mut notes = Vec::new();
        match Running::start(command) {
            Err(error) => notes.push(format!("cannot be started: {error}")),
            Ok(mut running) => {
                while let Some(event) = running.next() {
                    match event {
                        Event::Line(line) => hear(&line),
                        Event::Tick if start.elapsed() > self.limit && notes.is_empty() => {
                            notes.push(format!("stopped after {} s", self.limit.as_secs()));
                            running.kill_all();
                        }
                        Event::Tick => {}
                    }
                }
                let status = running.finish();
                if notes.is_empty() && !status.as_ref().is_ok_and(ExitStatus::success) {
                    notes.push(describe(&status));
                }
                notes.extend(running.leftovers().filter(|_| self.leftovers));
            }
        }
        let counts = if notes.is_empty() { Counts::PASSED } else { Counts::FAILED };
        Row { name: self.name, counts, notes, took: start.elapsed() }
    }
}

fn describe(status: &std::io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => status.to_string(),
        Err(error) => format!("its end is not known: {error}"),
    }
}

/// Runs pytest and gives one row.
pub fn pytest(name: &str, limit: Duration, command: Command) -> Row {
    println!("\n== {name}");
    let start = Instant::now();
    let mut row = Row {
        name: name.to_owned(),
        counts: Counts::default(),
        notes: Vec::new(),
        took: start.elapsed(),
    };
    match Running::start(command) {
        Err(error) => row.notes.push(format!("cannot be started: {error}")),
        Ok(mut running) => {
            let mut late = false;
            while let Some(event) = running.next() {
                match event {
                    Event::Line(line) => pytest_line(&line, &mut row),
                    Event::Tick if start.elapsed() > limit && !late => {
                        late = true;
                        row.notes.push(format!("stopped after {} s", limit.as_secs()));
                        running.kill_all();
                    }
                    Event::Tick => {}
                }
            }
            let status = running.finish();
            if !status.as_ref().is_ok_and(ExitStatus::success) && row.counts.failed == 0 {
                row.notes.push(describe(&status));
                row.counts.failed += 1;
            }
            if let Some(left) = running.leftovers() {
                row.notes.push(left);
                row.counts.failed += 1;
            }
        }
    }
    if row.counts == Counts::default() {
        row.counts = Counts::FAILED;
    }
    row.took = start.elapsed();
    row
}

/// The summary that pytest ends with (`1 failed, 2 passed, 1 skipped in 3.21s`), what failed, and
/// what was left out and why.
fn pytest_line(line: &str, row: &mut Row) {
    if let Some(what) = line.strip_prefix("FAILED ").or_else(|| line.strip_prefix("ERROR ")) {
        row.notes.push(format!("FAILED {what}"));
    } else if let Some(why) = line.strip_prefix("SKIPPED ") {
        row.notes.push(format!("skipped {why}"));
    } else if let Some(counts) = pytest_counts(line) {
        row.counts = counts;
    }
}

fn pytest_counts(line: &str) -> Option<Counts> {
    let (list, took) = line.trim_matches(['=', ' ']).rsplit_once(" in ")?;
    took.split_once('s')?.0.parse::<f64>().ok()?;
    let count = |words: &[&str]| -> u64 {
        let parts = list.split(", ").filter_map(|part| part.split_once(' '));
        parts
            .filter(|(_, word)| words.contains(word))
            .filter_map(|(n, _)| n.parse::<u64>().ok())
            .sum()
    };
    Some(Counts {
        passed: count(&["passed", "xfailed"]),
        failed: count(&["failed", "error", "errors", "xpassed"]),
        skipped: count(&["skipped"]),
    })
}

/// Runs `cargo test` and gives a row for each test program. One that takes longer than `each` is
/// ended, and the next one follows; all together may take `all`.
pub fn tests(command: Command, each: Duration, all: Duration) -> Vec<Row> {
    println!("\n== tests");
    let start = Instant::now();
    let mut report = Report::default();
    let mut running = match Running::start(command) {
        Ok(running) => running,
        Err(error) => {
            report.begin("tests".to_owned());
            report.fail(format!("cannot be started: {error}"));
            return report.rows();
        }
    };
    let mut stopped = false;
    while let Some(event) = running.next() {
        match event {
            Event::Line(line) => report.line(&line),
            Event::Tick if stopped => {}
            Event::Tick if start.elapsed() > all => {
                report.fail(format!("all tests stopped after {} s", all.as_secs()));
                running.kill_all();
                stopped = true;
            }
            Event::Tick => {
                if report.current_took().is_some_and(|took| took > each) {
                    report.fail(format!("stopped after {} s", each.as_secs()));
                    running.kill_started();
                }
            }
        }
    }
    let status = running.finish();
    if !status.as_ref().is_ok_and(ExitStatus::success) && !report.failed() {
        report.fail(describe(&status));
    }
    if let Some(left) = running.leftovers() {
        report.begin("left behind".to_owned());
        report.fail(left);
    }
    report.rows()
}

/// Reads what `cargo test` prints.
#[derive(Default)]
struct Report {
    rows: Vec<Row>,
    begun: Option<Instant>,
}

impl Report {
    fn line(&mut self, line: &str) {
        if let Some(name) = program_of(line) {
            self.begin(name);
        } else if let Some(counts) = counts_of(line) {
            if let Some(row) = self.current() {
                row.counts.add(counts);
            }
            self.end();
        } else if let Some(at) = line.find(SKIPPED)
            && let Some(row) = self.current()
        {
            // It passed as far as its harness knows.
            let note = format!("skipped {}", line[at + SKIPPED.len()..].trim());
            if !row.notes.contains(&note) {
                row.counts.skipped += 1;
                row.notes.push(note);
            }
        } else if UCX_LOG.iter().all(|part| line.contains(part)) {
            if let Some(row) = self.current() {
                row.counts.failed += 1;
                row.notes.push(format!("UCX's own log: {line}"));
            }
        } else if let Some(note) = failure_of(line).or_else(|| counted(line)) {
            if let Some(row) = self.current() {
                row.notes.push(note);
            }
        } else if line.starts_with("error: test failed")
            || line.starts_with("error: doctest failed")
        {
            // Without a result the program itself came to grief: a signal, an abort.
            if self.begun.is_some() {
                self.fail("ended without a result".to_owned());
            }
        }
    }

    fn current(&mut self) -> Option<&mut Row> {
        self.rows.last_mut()
    }

    fn current_took(&self) -> Option<Duration> {
        self.begun.map(|begun| begun.elapsed())
    }

    fn begin(&mut self, name: String) {
        self.end();
        self.begun = Some(Instant::now());
        let counts = Counts::default();
        self.rows.push(Row { name, counts, notes: Vec::new(), took: Duration::ZERO });
    }

    fn end(&mut self) {
        if let (Some(begun), Some(row)) = (self.begun.take(), self.rows.last_mut()) {
            row.took = begun.elapsed();
        }
    }

    fn fail(&mut self, why: String) {
        if self.rows.is_empty() {
            self.begin("tests".to_owned());
        }
        self.end();
        if let Some(row) = self.current() {
            row.counts.failed += 1;
            row.notes.push(why);
        }
    }

    fn failed(&self) -> bool {
        self.rows.iter().any(Row::failed)
    }

    /// Without the programs that have no tests.
    fn rows(mut self) -> Vec<Row> {
        self.end();
        for row in &mut self.rows {
            row.counts.passed -= own_skips(row).min(row.counts.passed);
        }
        self.rows.retain(|row| row.counts != Counts::default());
        self.rows
    }
}

/// How many of the tests of a row said themselves that they did nothing.
fn own_skips(row: &Row) -> u64 {
    row.notes.iter().filter(|note| note.starts_with("skipped ")).count() as u64
}

/// `Running unittests src/lib.rs (target/debug/deps/thalweg-0123456789abcdef)` and the like; of
/// `Running tests/conformance.rs [over verbs] (target/…)`, which is not cargo's, `conformance (over
/// verbs)`.
fn program_of(line: &str) -> Option<String> {
    let line = line.trim_start();
    if let Some(name) = line.strip_prefix("Doc-tests ") {
        return Some(format!("{name}: examples in the documentation"));
    }
    let (source, program) = line.strip_prefix("Running ")?.strip_suffix(')')?.split_once(" (")?;
    let file = Path::new(program).file_name()?.to_str()?;
    let name = file.rsplit_once('-').map_or(file, |(name, _)| name);
    if let Some((_, what)) = source.strip_suffix(']').and_then(|source| source.split_once(" [")) {
        return Some(format!("{name} ({what})"));
    }
    Some(match source.strip_prefix("unittests ") {
        Some(_) => format!("{name}: unit tests"),
        None => name.to_owned(),
    })
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; …`
fn counts_of(line: &str) -> Option<Counts> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |word: &str| {
        counts
            .split("; ")
            .find_map(|part| part.strip_suffix(word)?.trim().parse().ok())
            .unwrap_or_default()
    };
    Some(Counts { passed: count("passed"), failed: count("failed"), skipped: count("ignored") })
}

/// `test a::b ... FAILED`
fn failure_of(line: &str) -> Option<String> {
    let name = line.strip_prefix("test ")?.strip_suffix(" ... FAILED")?;
    Some(format!("FAILED {name}"))
}

fn counted(line: &str) -> Option<String> {
    let at = line.find(COUNTED)?;
    Some(line[at + COUNTED.len()..].trim().to_owned())
}

enum Event {
    Line(String),
    Tick,
}

/// A command that runs, and everything that it started.
struct Running {
    child: Child,
    mark: String,
    lines: mpsc::Receiver<String>,
    ended: Option<Instant>,
}

impl Running {
    fn start(mut command: Command) -> std::io::Result<Running> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let mark = format!("{}-{count}", std::process::id());
        let (reader, writer) = std::io::pipe()?;
        command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer).env(MARK, &mark);
        let child = command.spawn()?;
        // Its copies of the pipe's end must not outlive the child's.
        drop(command);
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || pass_on(reader, &sender));
        Ok(Running { child, mark, lines, ended: None })
    }

    /// `None`: the command has ended, and its output.
    fn next(&mut self) -> Option<Event> {
        match self.lines.recv_timeout(TICK) {
            Ok(line) => return Some(Event::Line(line)),
            Err(RecvTimeoutError::Disconnected) => return None,
            Err(RecvTimeoutError::Timeout) => {}
        }
        if matches!(self.child.try_wait(), Ok(None)) {
            return Some(Event::Tick);
        }
        // What it left behind may hold the pipe open for ever.
        let ended = *self.ended.get_or_insert_with(Instant::now);
        (ended.elapsed() < LINGER).then_some(Event::Tick)
    }

    fn finish(&mut self) -> std::io::Result<ExitStatus> {
        self.child.wait()
    }

    /// Ends what the command has started, not the command itself.
    fn kill_started(&self) {
        let own = self.child.id();
        kill(marked(&self.mark).into_iter().filter(|pid| *pid != own));
    }

    fn kill_all(&self) {
        kill(marked(&self.mark).into_iter());
    }

    /// Ends what is still there after a while, and says so.
    fn leftovers(&self) -> Option<String> {
        let deadline = Instant::now() + LINGER;
        loop {
            let left = marked(&self.mark);
            if left.is_empty() {
                return None;
            }
            if Instant::now() > deadline {
                let names: Vec<_> = left.iter().map(|pid| command_line(*pid)).collect();
                kill(left.into_iter());
                return Some(format!("processes left behind: {}", names.join(", ")));
            }
            std::thread::sleep(TICK / 4);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill_all();
        // Nothing can be done if it is gone already.
        let _ = self.child.wait();
    }
}

fn pass_on(reader: PipeReader, to: &mpsc::Sender<String>) {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
        // This crate's own tests must not print what looks like the output of others. A closed
        // standard output must not end anything.
        if !cfg!(test) {
            let _ = std::io::stdout().write_all(&line);
        }
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        if to.send(text).is_err() {
            return;
        }
        line.clear();
    }
}

/// The processes that carry this mark.
fn marked(mark: &str) -> Vec<u32> {
    let wanted = format!("{MARK}={mark}");
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|entry| entry == wanted.as_bytes())
        })
        .collect()
}

fn command_line(pid: u32) -> String {
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&words).replace('\0', " ").trim().to_owned()
}

fn kill(pids: impl Iterator<Item = u32>) {
    let pids: Vec<_> = pids.map(|pid| pid.to_string()).collect();
    if !pids.is_empty() {
        // The standard library cannot signal a process that is not its child. Some may have ended
        // meanwhile, which is as good.
        let script = format!("kill -KILL {} 2>/dev/null", pids.join(" "));
        let _ = Command::new("sh").args(["-c", &script]).status();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn step(limit_ms: u64, script: &str) -> Row {
        Step::new("step", Duration::from_millis(limit_ms)).checks_leftovers().run(shell(script))
    }

    #[test]
    fn what_pytest_prints() {
        let all = |failed, passed, skipped| Some(Counts { passed, failed, skipped });
        assert_eq!(pytest_counts("59 passed in 12.04s"), all(0, 59, 0));
        let line = "==== 1 failed, 2 passed, 3 skipped, 4 errors in 61.20s (0:01:01) ====";
        assert_eq!(pytest_counts(line), all(5, 2, 3));
        assert_eq!(pytest_counts("no tests ran in 0.01s"), all(0, 0, 0));
        assert_eq!(pytest_counts("tests passed in a row"), None);
        let row =
            pytest("x", Duration::from_secs(9), shell("echo FAILED a::b; echo 1 passed in 1s"));
        assert_eq!((row.counts.failed, row.notes.len()), (0, 1));
        let row = pytest("x", Duration::from_secs(9), shell("echo 1 passed in 1s; exit 1"));
        assert_eq!(row.counts.failed, 1);
        let row = pytest("x", Duration::from_secs(9), shell("echo no tests ran in 1s"));
        assert_eq!(row.counts.failed, 1);
    }

    #[test]
    fn a_step_passes_or_fails_as_its_command_does() {
        assert_eq!(step(9000, "true").counts, Counts::PASSED);
        let failed = step(9000, "exit 3");
        assert_eq!(failed.counts, Counts::FAILED);
        assert_eq!(failed.notes, ["exit status: 3"]);
        let absent = Step::new("x", Duration::ZERO).run(Command::new("/nowhere/at/all"));
        assert!(absent.notes[0].starts_with("cannot be started"));
    }

    #[test]
    fn a_step_that_takes_too_long_is_ended_with_what_it_started() {
        let start = Instant::now();
        let row = step(300, "sleep 60 & sleep 60");
        assert!(start.elapsed() < Duration::from_secs(20));
        assert_eq!(row.counts, Counts::FAILED);
        assert_eq!(row.notes, ["stopped after 0 s"]);
    }

    #[test]
    fn what_outlives_its_command_is_found_and_ended() {
        let row = step(9000, "sleep 60 >/dev/null 2>&1 &");
        assert_eq!(row.notes, ["processes left behind: sleep 60"]);
        // Holding the output open as well must not hold us up.
        let row = step(9000, "sleep 60 &");
        assert_eq!(row.notes, ["processes left behind: sleep 60"]);
    }

    const OUTPUT: &str = "\
     Running unittests src/lib.rs (target/debug/deps/thalweg-0011223344556677)
running 3 tests
test a ... ok
test b::c ... FAILED
test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.0s
     Running tests/crash.rs (/x/debug/deps/crash-0011223344556677)
test a ... SKIPPED: netns: only root may make one
SKIPPED: netns: only root may make one
SOAK: kill: 20 rounds, nothing left
test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 1.0s
     Running tests/aborts.rs (/x/debug/deps/aborts-0011223344556677)
error: test failed, to rerun pass `--test aborts`
     Running tests/loud.rs (/x/debug/deps/loud-0011223344556677)
[1795273948.296818] [host:20931:0]          parser.c:1908 UCX  WARN  unused env variable
test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.0s
     Running tests/crash.rs [over it, once more] (/x/debug/deps/crash-0011223344556677)
test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.0s
   Doc-tests thalweg
test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.0s
   Doc-tests thalweg_ffi
test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.0s
";

    #[test]
    fn the_output_of_cargo_test_is_understood() {
        let mut report = Report::default();
        OUTPUT.lines().for_each(|line| report.line(line));
        let rows = report.rows();
        let found: Vec<_> =
            rows.iter().map(|row| (row.name.as_str(), row.counts.to_string())).collect();
        let expected = [
            ("thalweg: unit tests", "2 passed, 1 failed, 0 skipped"),
            ("crash", "1 passed, 0 failed, 2 skipped"),
            ("aborts", "0 passed, 1 failed, 0 skipped"),
            ("loud", "1 passed, 1 failed, 0 skipped"),
            ("crash (over it, once more)", "1 passed, 0 failed, 0 skipped"),
            ("thalweg: examples in the documentation", "5 passed, 0 failed, 0 skipped"),
        ];
        assert_eq!(found, expected.map(|(name, counts)| (name, counts.to_owned())));
        assert_eq!(rows[0].notes, ["FAILED b::c"]);
        let notes = ["skipped netns: only root may make one", "kill: 20 rounds, nothing left"];
        assert_eq!(rows[1].notes, notes);
    }

    /// What the tests say is what is looked for here.
    #[test]
    fn the_tests_say_it_in_these_words() {
        assert!(include_str!("../../tests/src/lib.rs").contains(SKIPPED));
        for long in [include_str!("../../tests/crash.rs"), include_str!("../../tests/soak.rs")] {
            assert!(long.contains(COUNTED));
        }
    }

    #[test]
    fn a_test_program_that_hangs_fails_and_the_next_one_follows() {
        let script = "echo '     Running tests/hangs.rs (x/hangs-00)'; sleep 60
            echo '     Running tests/next.rs (x/next-00)'
            echo 'test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out'
            exit 1";
        let rows = tests(shell(script), Duration::from_millis(300), Duration::from_secs(30));
        let found: Vec<_> = rows.iter().map(|row| (row.name.as_str(), row.verdict())).collect();
        assert_eq!(found, [("hangs", "FAILED"), ("next", "passed")]);
    }

    #[test]
    fn a_build_that_fails_is_a_failure() {
        let rows = tests(shell("exit 101"), Duration::from_secs(9), Duration::from_secs(9));
        assert_eq!(rows.len(), 1);
        assert!(rows[0].failed());
    }
}
