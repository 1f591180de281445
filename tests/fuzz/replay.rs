//! Puts every kept input, and for a bounded time mutations of them, through all code that reads
//! what a peer wrote. Needs no nightly toolchain and no instrumentation.
//!
//! - `THALWEG_FUZZ_SECONDS`: how long to mutate, for each target; default 5.
//! - `THALWEG_FUZZ_SEED`: a number; other numbers give other mutations, the same one the same.
//! - `THALWEG_FUZZ_WRITE_SEEDS=1`: writes those of the library's seeds that the corpus lacks.
//!
//! An input on which a target panics or does not come to an end is written into the target's
//! folder of the corpus, so that every later run begins with it.

use std::collections::HashSet;
use std::fs;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use thalweg::fuzzing;

/// Takes any bytes, panics on a fault of the library, returns a number that tells ways through the
/// code apart.
type Target = fn(&[u8]) -> u64;

/// How long a single input may take: some take 50 ms on a loaded machine without optimisation.
const INPUT_TIME_MAX: Duration = Duration::from_secs(20);
/// The most inputs that mutation starts from.
const POOL_MAX: usize = 4096;
/// The longest input that mutation makes, in bytes: a little more than the longest hello.
const INPUT_BYTES_MAX: usize = 66 * 1024;

#[test]
fn head() {
    campaign("head", fuzzing::head);
}

#[test]
fn hello() {
    campaign("hello", fuzzing::hello);
}

#[test]
fn setup() {
    campaign("setup", fuzzing::setup);
}

#[test]
fn session() {
    campaign("session", fuzzing::session);
}

#[test]
fn tcp_frame() {
    campaign("tcp-frame", fuzzing::tcp_frame);
}

#[test]
fn tcp_stream() {
    campaign("tcp-stream", fuzzing::tcp_stream);
}

#[test]
fn shm_blob() {
    campaign("shm-blob", fuzzing::shm_blob);
}

#[test]
fn shm_packets() {
    campaign("shm-packets", fuzzing::shm_packets);
}

#[test]
fn shm_ring() {
    campaign("shm-ring", fuzzing::shm_ring);
}

#[test]
fn parcels() {
    campaign("parcels", fuzzing::parcels);
}

#[test]
fn corpus_holds_the_seeds() {
    let write = std::env::var_os("THALWEG_FUZZ_WRITE_SEEDS").is_some();
    for (target, name, bytes) in fuzzing::seeds() {
        let path = folder(target).join(&name);
        if write {
            fs::create_dir_all(folder(target)).expect("make the folder");
            fs::write(&path, &bytes).expect("write the seed");
        }
        let kept = fs::read(&path).unwrap_or_default();
        assert!(
            path.exists() && kept == bytes,
            "{target}/{name} is not what the library says now: set THALWEG_FUZZ_WRITE_SEEDS=1 once"
        );
    }
}

fn folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

/// Runs a target over its corpus, then over mutations, on a thread that is watched.
fn campaign(name: &'static str, target: Target) {
    let kept = corpus(name);
    assert!(!kept.is_empty(), "no corpus in {}", folder(name).display());
    let time = Duration::from_secs(setting("THALWEG_FUZZ_SECONDS", 5));
    let current = Arc::new(Mutex::new(Vec::new()));
    let (beat, beats) = mpsc::sync_channel(0);
    let runner = {
        let current = Arc::clone(&current);
        thread::spawn(move || {
            Run { name, target, current, beat, seen: HashSet::new(), inputs: 0 }.all(kept, time)
        })
    };
    loop {
        match beats.recv_timeout(INPUT_TIME_MAX) {
            Ok(()) => {}
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                let input = current.lock().unwrap_or_else(|poison| poison.into_inner()).clone();
                panic!("{name} did not come to an end: input kept in {}", keep(name, &input));
            }
        }
    }
    if let Err(panic) = runner.join() {
        std::panic::resume_unwind(panic);
    }
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let Ok(entries) = fs::read_dir(folder(name)) else {
        return Vec::new();
    };
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("read the corpus").path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).expect("read an input")).collect()
}

fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")),
        Err(_) => default,
    }
}

/// Writes an input that showed a fault into the corpus; says where.
fn keep(name: &str, input: &[u8]) -> String {
    let path = folder(name).join(format!("crash-{:016x}", hash(input)));
    match fs::write(&path, input) {
        Ok(()) => path.display().to_string(),
        Err(error) => format!("nothing ({error}); it was {}", input.escape_ascii()),
    }
}

/// FNV-1a.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

struct Run {
    name: &'static str,
    target: Target,
    /// The input being run, for whoever finds that it does not end.
    current: Arc<Mutex<Vec<u8>>>,
    beat: mpsc::SyncSender<()>,
    /// What the target has returned so far.
    seen: HashSet<u64>,
    inputs: u64,
}

impl Run {
    fn all(mut self, kept: Vec<Vec<u8>>, time: Duration) {
        for input in &kept {
            self.one(input);
        }
        let (replayed, begun) = (self.inputs, Instant::now());
        let mut mutator =
            Mutator::new(setting("THALWEG_FUZZ_SEED", 1) ^ hash(self.name.as_bytes()));
        let mut pool = kept;
        while begun.elapsed() < time {
            let input = mutator.next_from(&pool);
            if self.one(&input) && pool.len() < POOL_MAX {
                pool.push(input);
            }
        }
        // Past the test harness's capture: the count is worth seeing when all is well.
        let _ = writeln!(
            std::io::stderr(),
            "fuzz {}: {replayed} kept inputs and {} mutations, {} ways",
            self.name,
            self.inputs - replayed,
            self.seen.len()
        );
    }

    /// Whether the input did something new.
    fn one(&mut self, input: &[u8]) -> bool {
        if let Ok(mut current) = self.current.lock() {
            current.clear();
            current.extend_from_slice(input);
        }
        self.inputs += 1;
        let way = catch_unwind(AssertUnwindSafe(|| (self.target)(input)));
        // Nobody listens only when the test has failed already.
        let _ = self.beat.try_send(());
        match way {
            Ok(way) => self.seen.insert(way),
            Err(_) => panic!("{} panicked: input kept in {}", self.name, keep(self.name, input)),
        }
    }
}

/// Makes inputs from inputs: xorshift64*, so that a seed gives the same stream everywhere.
struct Mutator {
    state: u64,
}

impl Mutator {
    fn new(seed: u64) -> Self {
        Mutator { state: seed.max(1) }
    }

    fn random(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Less than `limit`, or 0.
    fn below(&mut self, limit: usize) -> usize {
        ((self.random() >> 32) as usize) % limit.max(1)
    }

    fn next_from(&mut self, pool: &[Vec<u8>]) -> Vec<u8> {
        let mut input = pool[self.below(pool.len())].clone();
        for _ in 0..=self.below(5) {
            self.mutate(&mut input, pool);
        }
        input.truncate(INPUT_BYTES_MAX);
        input
    }

    fn mutate(&mut self, input: &mut Vec<u8>, pool: &[Vec<u8>]) {
        let at = self.below(input.len() + 1);
        let span = at..input.len().min(at + 1 + self.below(16));
        match self.below(8) {
            0 => self.overwrite(input, at, 1),
            1 => {
                let width = 1 << self.below(4);
                self.overwrite(input, at, width);
            }
            2 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte ^= 1 << self.below(8);
                }
            }
            3 => {
                input.drain(span);
            }
            4 => {
                let copy = input[span].to_vec();
                let to = self.below(input.len() + 1);
                input.splice(to..to, copy);
            }
            5 => {
                let new: Vec<u8> = (0..=self.below(8)).map(|_| self.random() as u8).collect();
                input.splice(at..at, new);
            }
            6 => input.truncate(at),
            _ => {
                let other = &pool[self.below(pool.len())];
                let from = self.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
    }

    /// Puts a number of `width` bytes there: any, or one from the edges of what numbers can be.
    fn overwrite(&mut self, input: &mut [u8], at: usize, width: usize) {
        let value = match self.below(4) {
            0 => self.random(),
            1 => 1 << self.below(64),
            2 => (1u64 << self.below(64)).wrapping_sub(1),
            _ => (self.below(33) as u64).wrapping_sub(16),
        };
        let bytes = &value.to_le_bytes()[..width];
        for (to, from) in input.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }
}
