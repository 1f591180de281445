//! The other process: this program executed once more, told by its parent what to do.
//!
//! Parent and child share one Unix socket (the child's standard input) on which they exchange
//! lines of JSON, and descriptors that the child inherits. A child never outlives its parent, and
//! every wait for it is bounded.

use std::env;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::case::Case;
use crate::{pin, rlimit};

/// The argument that makes this program a peer.
const ROLE: &str = "--as-peer";

/// How long either side waits for the other to be ready or to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// The longest line either side accepts.
const LINE_MAX_BYTES: u64 = 64 * 1024;

/// What a peer is told first.
#[derive(Debug, Serialize, Deserialize)]
struct Job {
    case: Case,
    cpu: Option<usize>,
    descriptors: Vec<RawFd>,
}

/// A running peer. Dropping it kills it and waits for its end.
pub struct Peer {
    child: Child,
    control: Control,
}

impl Peer {
    /// Starts a peer for `case`, bound to `cpu`, which inherits `descriptors`.
    pub fn spawn(case: &Case, cpu: Option<usize>, descriptors: &[BorrowedFd<'_>]) -> Result<Peer> {
        let (ours, theirs) = UnixStream::pair().context("making a socket pair")?;
        let program = env::current_exe().context("finding this program")?;
        let numbers: Vec<RawFd> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
        let mut command = Command::new(program);
        command.arg(ROLE).stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
        inherit(&mut command, numbers.clone());
        die_with_parent(&mut command);
        let child = command.spawn().context("starting the peer process")?;
        let mut peer = Peer { child, control: Control::new(ours)? };
        peer.control.send(&Job { case: case.clone(), cpu, descriptors: numbers })?;
        Ok(peer)
    }

    /// The socket to the peer.
    pub fn control(&mut self) -> &mut Control {
        &mut self.control
    }

    /// Its process number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for it to end by itself; anything but success is an error.
    pub fn finish(mut self) -> Result<()> {
        wait_until(&mut self.child, Instant::now() + PATIENCE, "the peer process")
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Both fail only if it has ended and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for a child to end by itself before the deadline; anything but success is an error.
pub fn wait_until(child: &mut Child, deadline: Instant, who: &str) -> Result<()> {
    let mut pause = Duration::from_micros(200);
    loop {
        if let Some(status) = child.try_wait().with_context(|| format!("waiting for {who}"))? {
            if !status.success() {
                bail!("{who} ended with {status}");
            }
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!("{who} has not ended in time");
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Makes the kernel kill the child when the thread that starts it ends.
pub fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    // SAFETY: the closure runs in the forked child and calls only async-signal-safe functions.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before the call above.
            if libc::getppid() as u32 != parent {
                libc::_exit(1);
            }
            Ok(())
        });
    }
}

/// Lets the child keep these descriptors under the same numbers.
fn inherit(command: &mut Command, descriptors: Vec<RawFd>) {
    // SAFETY: the closure runs in the forked child and calls only async-signal-safe functions; the
    // caller of `Peer::spawn` keeps the descriptors open until the child has started.
    unsafe {
        command.pre_exec(move || {
            for &fd in &descriptors {
                if libc::fcntl(fd, libc::F_SETFD, 0) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
}

/// One end of the socket between parent and child.
pub struct Control {
    reader: BufReader<UnixStream>,
}

impl Control {
    fn new(stream: UnixStream) -> Result<Control> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Control { reader: BufReader::new(stream) })
    }

    /// Sends one line.
    pub fn send<T: Serialize>(&mut self, value: &T) -> Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        self.reader.get_mut().write_all(&line).context("writing to the other process")
    }

    /// Receives one line, within twenty seconds.
    pub fn recv<T: DeserializeOwned>(&mut self) -> Result<T> {
        self.recv_within(PATIENCE)
    }

    /// Receives one line, within `patience`.
    pub fn recv_within<T: DeserializeOwned>(&mut self, patience: Duration) -> Result<T> {
        self.reader.get_ref().set_read_timeout(Some(patience))?;
        let mut line = String::new();
        let count = (&mut self.reader)
            .take(LINE_MAX_BYTES)
            .read_line(&mut line)
            .context("waiting for the other process")?;
        if count == 0 {
            bail!("the other process has ended early; its own message says why");
        }
        serde_json::from_str(&line).context("reading what the other process says")
    }
}

/// What a peer has been given.
pub struct Duty {
    /// What is measured.
    pub case: Case,
    /// The socket to the parent.
    pub control: Control,
    /// What it inherited, in the parent's order.
    pub descriptors: Vec<OwnedFd>,
}

/// If this process was started as a peer: does what it is told, and returns its exit status.
pub fn serve_if_peer(serve: impl FnOnce(Duty) -> Result<()>) -> Option<ExitCode> {
    if env::args_os().nth(1)? != ROLE {
        return None;
    }
    rlimit::raise();
    match duty().and_then(serve) {
        Ok(()) => Some(ExitCode::SUCCESS),
        Err(error) => {
            eprintln!("error in the peer process: {error:#}");
            Some(ExitCode::FAILURE)
        }
    }
}

fn duty() -> Result<Duty> {
    let stdin = io::stdin().as_fd().try_clone_to_owned().context("taking the control socket")?;
    let mut control = Control::new(UnixStream::from(stdin))?;
    let job: Job = control.recv()?;
    if let Some(cpu) = job.cpu {
        pin::to(cpu).with_context(|| format!("binding the peer to CPU {cpu}"))?;
    }
    let adopt = |fd| {
        // SAFETY: the parent left exactly these descriptors open for this process, and nothing else
        // in it knows of them.
        unsafe { OwnedFd::from_raw_fd(fd) }
    };
    let descriptors = job.descriptors.into_iter().map(adopt).collect();
    Ok(Duty { case: job.case, control, descriptors })
}
