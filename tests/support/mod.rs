//! What the tests with processes of their own share: a peer process, what a process holds, and
//! ways to say what was found.

#![allow(dead_code, reason = "no test uses all of it")]

use std::fmt::Display;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use thalweg::{Config, Error, ErrorKind, LinkKind, Message, Node};
use thalweg_tests::{connect, run_once};

/// What is shown of a peer's complaints, in bytes.
const COMPLAINTS_MAX: usize = 64 << 10;
/// How long a peer may take to say what is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// These tests look at their whole process: one at a time.
pub fn serially() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The count of a short run, or that of a long one.
pub fn short_or_long<T>(short: T, long: T) -> T {
    if std::env::var("THALWEG_TEST_LONG").is_ok_and(|value| value == "1") { long } else { short }
}

/// By how much limits of time are to be stretched: a machine that is emulated is slow.
pub fn slowness() -> u32 {
    if std::env::var_os("THALWEG_TEST_VM").is_some() { 8 } else { 1 }
}

/// Where random choices begin.
pub fn seed() -> u64 {
    let given = std::env::var("THALWEG_TEST_SEED").ok().and_then(|text| text.parse().ok());
    given.unwrap_or(20_261_121)
}

/// Prints a line also when the harness keeps the output of tests that pass to itself.
pub fn note(line: impl Display) {
    // In one piece, because others write there as well. If it is closed, nobody wants to know.
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// Prints a measured value.
pub fn measured(name: &str, value: f64, unit: &str) {
    note(format_args!("MEASURED: {name} {value:.3} {unit}"));
}

/// Says that a test was left out, and why.
pub fn skipped(name: &str, reason: impl Display) {
    thalweg_tests::skipped(name, &reason.to_string());
}

/// Says to a program that it is to do a test's work itself.
const INSIDE: &str = "THALWEG_TEST_INSIDE";

/// Whether this program was started to do one test's work.
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs one test of this program in a process of its own, and gives what it says.
pub fn outside(test: &str, settings: &[(&str, &Path)]) -> Output {
    outside_as(test, settings, |_| {})
}

/// As `outside`, with something more about the process.
pub fn outside_as(
    test: &str,
    settings: &[(&str, &Path)],
    more: impl FnOnce(&mut Command),
) -> Output {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", test, "--nocapture", "--test-threads", "1"]).env(INSIDE, "1");
    command.envs(settings.iter().copied());
    more(&mut command);
    let output = command.output().expect("starting this program");
    assert!(output.status.success(), "{test}: {output:#?}");
    output
}

/// Prints why a link is absent, and shows that the rest works. [`reason_and_fix`] reads it.
pub fn without(link: LinkKind) {
    let any = || Config::from_env().expect("settings").transports([link, LinkKind::Tcp]);
    run_once("without a link", async {
        let nodes = [(); 2].map(|()| Node::new(any()).expect("a node"));
        let capabilities = nodes[0].capabilities();
        let absent = capabilities.iter().find(|capability| capability.link == link);
        let absent = absent.expect("it is told of");
        assert!(!absent.present, "{}", absent.reason);
        let fix = absent.fix.as_deref().unwrap_or_default();
        println!("@reason {} @fix {fix}", absent.reason);
        let listener = nodes[1].listen("thalweg://127.0.0.1:0").await.expect("listening");
        let (a, b) = connect(&nodes[0], &listener).await;
        assert_eq!(a.route().link(), LinkKind::Tcp);
        let told = a.route().to_string();
        assert!(told.contains(link.name()) && told.contains(&absent.reason), "{told}");
        let (sent, got) = tokio::join!(a.send(Message::copy_from_slice(&[7; 70_000])), b.recv());
        sent.expect("sending");
        assert_eq!(got.expect("receiving").len_bytes(), 70_000);
    });
}

/// Whether a link ended because its worker of UCX's was held up, and says so.
#[track_caller]
pub fn assert_held_up(error: &Error) {
    assert_eq!(error.kind(), ErrorKind::ConnectionLost, "{error}");
    assert!(error.to_string().contains("while it wrote there"), "{error}");
}

/// What [`without`] printed in another process.
pub fn reason_and_fix(output: &Output) -> (String, String) {
    let said = String::from_utf8_lossy(&output.stdout);
    let line = said.split_once("@reason ").and_then(|(_, rest)| rest.lines().next());
    let (reason, fix) = line.and_then(|line| line.split_once(" @fix ")).expect("a reason");
    (reason.to_owned(), fix.to_owned())
}

/// A folder that goes when dropped.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("thalweg-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a folder of our own");
        Folder(path)
    }

    /// A shared object made from this source; `None` without a compiler.
    pub fn library(&self, name: &str, source: &str) -> Option<PathBuf> {
        let (from, to) = (self.0.join("library.c"), self.0.join(name));
        fs::write(&from, source).expect("writable");
        let made = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&to).arg(&from).status();
        made.is_ok_and(|status| status.success()).then_some(to)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left is in the temporary folder.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A peer process. Dropping it kills it.
pub struct Peer {
    child: Child,
    lines: Option<BufReader<ChildStdout>>,
    stdin: Option<ChildStdin>,
    /// What it complains of, unless that is shown as it comes.
    complaints: Option<fs::File>,
}

impl Peer {
    /// The program.
    pub const PROGRAM: &'static str = env!("CARGO_BIN_EXE_thalweg-test-peer");

    /// A peer with these arguments.
    pub fn start(words: &[String]) -> Peer {
        let mut command = Command::new(Self::PROGRAM);
        command.args(words);
        Self::of(command)
    }

    /// A peer that this command starts.
    pub fn of(mut command: Command) -> Peer {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        // A victim complains on its way out, which is shown if something else is missed of it.
        let mut complaints = None;
        if std::env::var_os("THALWEG_TEST_VERBOSE").is_none() {
            let file = nameless_file();
            command.stderr(file.try_clone().expect("another number for a file"));
            complaints = Some(file);
        }
        let mut child = command.spawn().expect("starting a peer");
        let lines = child.stdout.take().map(BufReader::new);
        let stdin = child.stdin.take();
        Peer { child, lines, stdin, complaints }
    }

    /// The next line that the peer says.
    pub fn line(&mut self, until: Instant) -> Option<String> {
        let lines = self.lines.as_mut().expect("its output");
        if lines.buffer().contains(&b'\n') || readable(lines.get_ref(), until) {
            let mut line = String::new();
            let count = lines.read_line(&mut line).expect("what a peer says");
            return (count > 0).then(|| line.trim_end().to_owned());
        }
        None
    }

    /// Waits until the peer says a line that begins with this word: the rest of it.
    pub fn said(&mut self, word: &str) -> String {
        self.find(word, Instant::now() + PATIENCE).unwrap_or_else(|others| {
            let (status, complaints) = (self.child.try_wait(), self.complaints());
            panic!("the peer did not say {word} ({status:?}), but {others:#?}: {complaints}")
        })
    }

    /// What it has complained of so far.
    pub fn complaints(&self) -> String {
        let mut said = vec![0; COMPLAINTS_MAX];
        let read = self.complaints.as_ref().map(|file| file.read_at(&mut said, 0));
        said.truncate(read.and_then(Result::ok).unwrap_or(0));
        String::from_utf8_lossy(&said).into_owned()
    }

    /// As `said`, until a point in time.
    pub fn said_by(&mut self, word: &str, until: Instant) -> Option<String> {
        self.find(word, until).ok()
    }

    /// The rest of the next line that begins with this word. `Err`: what was said instead.
    fn find(&mut self, word: &str, until: Instant) -> Result<String, Vec<String>> {
        let mut others = Vec::new();
        while let Some(line) = self.line(until) {
            if let Some(rest) = line.strip_prefix(word) {
                return Ok(rest.trim().to_owned());
            }
            others.push(line);
        }
        Err(others)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: takes no pointers; the child is not reaped yet, so the number is its own.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    /// Kills it, and does not wait.
    pub fn kill(&self) {
        self.signal(libc::SIGKILL);
    }

    /// Whether it has ended well, once it has. For those on whose thread it is waited for.
    pub fn ended(&mut self) -> Option<bool> {
        drop(self.stdin.take());
        self.child.try_wait().expect("waiting for a peer").map(|status| status.success())
    }

    /// Ends its standard input and waits for its end: whether it ended well.
    pub fn finish(mut self) -> bool {
        drop(self.stdin.take());
        self.child.wait().expect("waiting for a peer").success()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Nothing is left to do if it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A file of this process and of who is given it.
fn nameless_file() -> fs::File {
    // SAFETY: the name ends with a zero.
    let fd = unsafe { libc::memfd_create(c"complaints".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "no file: {}", std::io::Error::last_os_error());
    // SAFETY: made above, and owned by nobody else.
    unsafe { fs::File::from_raw_fd(fd) }
}

fn readable(from: &ChildStdout, until: Instant) -> bool {
    use std::os::fd::AsRawFd;
    let mut entry = libc::pollfd { fd: from.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let left = until.saturating_duration_since(Instant::now()).as_millis();
    // SAFETY: one valid entry, for the time of the call.
    unsafe { libc::poll(&mut entry, 1, i32::try_from(left).unwrap_or(i32::MAX)) > 0 }
}

/// A process that somebody else's child left behind. Dropping it kills it.
pub struct Bystander(pub i32);

impl Bystander {
    /// Whether it is there.
    pub fn lives(&self) -> bool {
        // SAFETY: takes no pointers; signal 0 only asks.
        unsafe { libc::kill(self.0, 0) == 0 }
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        // SAFETY: takes no pointers. It waits for ever until this.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
    }
}

/// What could be left of something, as it was before.
pub struct Leftovers {
    descriptors: Vec<String>,
    mappings: usize,
    shared_files: Vec<String>,
    socket_names: usize,
}

impl Leftovers {
    /// What there is now.
    pub fn now() -> Leftovers {
        Leftovers {
            descriptors: descriptors(),
            mappings: mappings(),
            shared_files: shared_files(),
            socket_names: socket_names(),
        }
    }

    /// Waits until there is no more than there was; fails after `limit`.
    pub fn none_within(&self, limit: Duration, what: &str) {
        let until = Instant::now() + limit;
        while let Some(more) = self.more() {
            assert!(Instant::now() < until, "left after {what}: {more}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What there is more than there was.
    pub fn more(&self) -> Option<String> {
        let now = Leftovers::now();
        if now.descriptors.len() > self.descriptors.len() {
            return Some(format!("descriptors {:?}, were {:?}", now.descriptors, self.descriptors));
        }
        if now.mappings > self.mappings {
            return Some(format!("{} shared mappings, were {}", now.mappings, self.mappings));
        }
        if let Some(file) = now.shared_files.iter().find(|file| !self.shared_files.contains(file)) {
            return Some(format!("/dev/shm/{file}"));
        }
        if now.socket_names > self.socket_names {
            return Some(format!("{} named sockets", now.socket_names));
        }
        children().first().map(|child| format!("process {child}"))
    }
}

/// What this process uses of a processor for so long, in percent of a core.
pub async fn processor_percent(time: Duration) -> f64 {
    processor_use(time).await.1
}

/// The same, with the time that it used.
async fn processor_use(time: Duration) -> (Duration, f64) {
    let (began, used) = (Instant::now(), processor_time());
    // What happens meanwhile is what is measured.
    tokio::time::sleep(time).await;
    let used = processor_time() - used;
    (used, 100.0 * used.as_secs_f64() / began.elapsed().as_secs_f64())
}

/// Waits until this process uses next to nothing for a while: what it uses then, in percent of a core.
pub async fn at_rest(patience: Duration, when: &str) -> f64 {
    const WHILE: Duration = Duration::from_millis(300);
    const USED_MAX: Duration = Duration::from_millis(10);
    let until = Instant::now() + patience;
    loop {
        let (used, percent) = processor_use(WHILE).await;
        if used < USED_MAX {
            return percent;
        }
        assert!(Instant::now() < until, "{percent} % of a core while {when}");
    }
}

/// What this process has used of processors.
fn processor_time() -> Duration {
    // SAFETY: all zero is a valid `rusage`, and it outlives the call that fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let of = |time: libc::timeval| {
        Duration::from_secs(time.tv_sec as u64) + Duration::from_micros(time.tv_usec as u64)
    };
    of(usage.ru_utime) + of(usage.ru_stime)
}

/// What this process's descriptors are.
pub fn descriptors() -> Vec<String> {
    let folder = fs::read_dir("/proc/self/fd").expect("descriptors");
    let mut all: Vec<String> = folder
        .flatten()
        // The folder's own is gone by now.
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|link| link.to_string_lossy().into_owned())
        .collect();
    all.sort();
    all
}

fn mappings() -> usize {
    let maps = fs::read_to_string("/proc/self/maps").expect("mappings");
    maps.lines().filter(|line| line.contains("memfd:")).count()
}

/// Files of this name: those of other programs come and go.
fn shared_files() -> Vec<String> {
    let names = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.contains("thalweg"))
        .collect()
}

/// Named Unix sockets that this process's nodes would be reached by.
fn socket_names() -> usize {
    let own: Vec<String> = descriptors()
        .iter()
        .filter_map(|link| Some(link.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|words| words.len() > 7 && words[7].contains("thalweg"))
        .filter(|words| own.iter().any(|inode| inode == words[6]))
        .count()
}

/// The children of this process.
fn children() -> Vec<String> {
    let own = std::process::id();
    let tasks = fs::read_dir(format!("/proc/{own}/task")).into_iter().flatten().flatten();
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|line| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .collect()
}

/// Resident memory of this process, in bytes.
pub fn resident_bytes() -> usize {
    let text = fs::read_to_string("/proc/self/statm").expect("memory");
    let pages: usize = text.split(' ').nth(1).and_then(|n| n.parse().ok()).expect("pages");
    pages * 4096
}
