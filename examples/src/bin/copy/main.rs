//! Copies a directory tree to another process, with a checksum at the end.

mod progress;
mod receive;
mod send;
mod sink;
mod source;
mod wire;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use thalweg::{Endpoint, Node};
use thalweg_examples::{exit, note, say, with_transport};

use crate::wire::{HELLO, MESSAGE_BYTES_MAX};

/// What this program tells its user: one line.
type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// Copies a directory tree, or a file, to another process, and compares checksums at the end.
///
///   copy SRC DEST                 to a second process on this machine, which it starts itself
///   copy --listen ADDR DEST       be the receiver: takes one tree, from whoever connects first
///   copy SRC --connect ADDR       send to a receiver
///
/// DEST is a directory, also for a single file. It must not exist yet, or be empty;
/// nothing outside it is ever written. A directory or file that cannot be read stops the copy.
/// Symbolic links are copied as links. Permissions are kept; set-id and sticky bits, owners and
/// times are not. Devices, sockets and pipes inside SRC are left out, and named. Settings come from
/// the THALWEG_* variables.
#[derive(Parser)]
#[command(name = "copy", version, verbatim_doc_comment)]
struct Options {
    /// What to copy, and where to
    #[arg(value_name = "PATH", num_args = 1..=2, required = true)]
    paths: Vec<PathBuf>,

    /// Receive, listening at exactly this address, for instance thalweg://0.0.0.0:7000
    #[arg(long, value_name = "ADDR", conflicts_with = "connect")]
    listen: Option<String>,

    /// Send to the receiver at this address, for instance thalweg://far-host:7000
    #[arg(long, value_name = "ADDR")]
    connect: Option<String>,

    /// The links that may be used, best first, for instance ucx,tcp; left out: THALWEG_TRANSPORTS,
    /// or the library's own choice
    #[arg(long, value_name = "LINK,…")]
    transport: Option<String>,

    /// End when standard input does: with whoever started this
    #[arg(long, hide = true, requires = "listen")]
    with_parent: bool,
}

fn main() -> ExitCode {
    if std::env::args_os().len() <= 1 {
        say(Options::command().render_long_help());
        return ExitCode::SUCCESS;
    }
    let options = Options::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_io().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit(Err(error)),
    };
    exit(runtime.block_on(run(&options)))
}

async fn run(options: &Options) -> Result<()> {
    let links = options.transport.as_deref();
    match (&options.paths[..], &options.listen, &options.connect) {
        ([dest], Some(address), None) => {
            if options.with_parent {
                end_with_standard_input();
            }
            listen(address, dest, links, options.with_parent).await
        }
        ([source], None, Some(address)) => {
            let survey = source::survey(source)?;
            let node = node(links)?;
            let endpoint = peer_checked(node.connect(address.as_str()).await?)?;
            send::tree(&node, &endpoint, source, survey).await
        }
        ([source, dest], None, None) => both_ends(source, dest, links).await,
        _ => Err("one path with --listen or --connect, two without; see --help".into()),
    }
}

fn node(links: Option<&str>) -> Result<Node> {
    Ok(Node::new(with_transport(links)?.hello(HELLO).max_message_bytes(MESSAGE_BYTES_MAX))?)
}

/// Another program of this library must not be taken for this one.
fn peer_checked(endpoint: Endpoint) -> Result<Endpoint> {
    let peer = endpoint.peer();
    if peer.hello != HELLO {
        return Err(
            format!("the program at {} is not copy, or another version", peer.address).into()
        );
    }
    Ok(endpoint)
}

async fn listen(address: &str, dest: &Path, links: Option<&str>, with_parent: bool) -> Result<()> {
    let sink = sink::Sink::create(dest)?;
    let node = node(links)?;
    let listener = node.listen(address).await?;
    match with_parent {
        // The parent reads it.
        true => say(format_args!("listening at {}", listener.address())),
        false => note(format_args!("listening at {}; end with Ctrl-C", listener.address())),
    }
    let endpoint = peer_checked(listener.accept().await?)?;
    drop(listener);
    receive::tree(&endpoint, sink, !with_parent).await
}

/// Starts the receiver as a child, and sends to it.
async fn both_ends(source: &Path, dest: &Path, links: Option<&str>) -> Result<()> {
    let survey = source::survey(source)?;
    source::refuse_inside(source, dest)?;
    let mut child = send::Receiver::start(dest, links)?;
    let node = node(links)?;
    let endpoint = peer_checked(node.connect(child.address()?.as_str()).await?)?;
    let sent = send::tree(&node, &endpoint, source, survey).await;
    drop(endpoint);
    // What the receiver has to say comes from itself.
    let received = child.wait();
    sent.and(received)
}

fn end_with_standard_input() {
    std::thread::spawn(|| {
        // Whether it ends or fails is the same to us.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(1);
    });
}
