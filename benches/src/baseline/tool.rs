//! Programs of others that measure between a server and a client of theirs: starting both, and
//! reading what the client says.

use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Unavailable;
use crate::peer::{die_with_parent, wait_until};

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

/// A port of the loopback interface that nobody listens on at this moment.
pub(super) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// Runs both, and returns what the client says. The client is started again and again until the
/// server listens: a probe of the port would be taken for the client.
pub(super) fn run(program: &str, server: Command, client: impl Fn() -> Command) -> Result<String> {
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
