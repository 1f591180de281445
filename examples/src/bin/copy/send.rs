//! The sending side: a thread reads, this task sends, several messages at a time.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::pin::Pin;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::task::Poll;
use std::time::Instant;

use thalweg::{CloseReason, Endpoint, Message, Node};
use thalweg_examples::say;
use tokio::sync::mpsc;

use crate::source::{Source, Survey};
use crate::wire::Receipt;
use crate::{Result, progress};

/// Messages that were read and not yet sent.
const QUEUE: usize = 4;
/// Messages on their way.
const WINDOW: usize = 8;

/// Sends a tree, and believes that it has arrived when the receiver says so with its checksum.
pub async fn tree(node: &Node, to: &Endpoint, root: &Path, survey: Survey) -> Result<()> {
    let start = Instant::now();
    let (queue, messages) = mpsc::channel(QUEUE);
    let (root, lender) = (root.to_owned(), node.clone());
    let reader = std::thread::spawn(move || {
        let mut emit = |message| queue.blocking_send(message).map_err(|_| "not wanted".into());
        Source::new(&lender, &mut emit).send(&root, survey)
    });
    let sent = send_all(to, messages, survey).await;
    // The queue is gone by now, so the reader ends soon if it has not.
    let read = reader.join().unwrap_or_else(|_| Err("the reader panicked".into()));
    let outcome = match (sent, read) {
        (Err(error), _) => Err(explained(&error).into()),
        (Ok(()), Ok(expected)) => confirmed(to, expected).await.map(|()| expected),
        (Ok(()), Err(error)) => Err(error),
    };
    match outcome {
        Ok(Receipt { checksum, files, bytes }) => {
            let seconds = start.elapsed().as_secs_f64();
            let checksum = blake3::Hash::from_bytes(checksum);
            say(format_args!("{files} files, {bytes} bytes in {seconds:.3} s"));
            say(format_args!("checksum {checksum}, the same on both sides"));
            // The receiver has everything already; whether it hears the goodbye is its affair.
            let _ = to.close(CloseReason::new(0, "all there")).await;
            Ok(())
        }
        Err(error) => {
            // It may be gone; then it needs no explanation.
            let _ = to.close(CloseReason::new(1, error.to_string())).await;
            Err(error)
        }
    }
}

async fn send_all(
    to: &Endpoint,
    mut messages: mpsc::Receiver<Message>,
    survey: Survey,
) -> thalweg::Result<()> {
    let bar = progress::bar(survey.bytes);
    let mut window = VecDeque::with_capacity(WINDOW);
    while let Some(message) = messages.recv().await {
        let bytes = message.len_bytes() as u64;
        if window.len() == WINDOW
            && let Some(oldest) = window.pop_front()
        {
            oldest.await?;
        }
        // Polled once it is on its way, in its place; the next one need not wait for it.
        let mut send = to.send(message);
        match poll_fn(|cx| Poll::Ready(Pin::new(&mut send).poll(cx))).await {
            Poll::Ready(done) => drop(done?),
            Poll::Pending => window.push_back(send),
        }
        bar.inc(bytes);
    }
    for send in window {
        send.await?;
    }
    bar.finish_and_clear();
    Ok(())
}

/// Waits for the receipt.
async fn confirmed(to: &Endpoint, expected: Receipt) -> Result<()> {
    let answer = to.recv().await.map_err(|error| explained(&error))?.to_vec()?;
    let receipt = Receipt::decode(&answer)?;
    if receipt != expected {
        return Err(format!("the receiver has written something else: {receipt:?}").into());
    }
    Ok(())
}

/// A receiver that gives up says why.
fn explained(error: &thalweg::Error) -> String {
    match error.close_reason() {
        Some(reason) if reason.by_peer => format!("the receiver gave up: {}", reason.text),
        _ => format!("nothing more can be sent: {error}"),
    }
}

/// A receiver that this process has started. It cannot outlive it: it ends with its standard input.
pub struct Receiver {
    child: Child,
    _stdin: Option<ChildStdin>,
    /// Kept open, or what it prints in the end would fail.
    stdout: Option<BufReader<ChildStdout>>,
}

impl Receiver {
    pub fn start(dest: &Path, links: Option<&str>) -> Result<Receiver> {
        let links = links.map(|links| ["--transport", links]);
        let mut child = Command::new(std::env::current_exe()?)
            .args(links.into_iter().flatten())
            .args(["--listen", "thalweg://127.0.0.1:0", "--with-parent", "--"])
            .arg(dest)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot start the receiver: {error}"))?;
        let stdout = child.stdout.take().map(BufReader::new);
        Ok(Receiver { _stdin: child.stdin.take(), child, stdout })
    }

    /// Where it listens. Waits until it does.
    pub fn address(&mut self) -> Result<String> {
        let mut line = String::new();
        if let Some(stdout) = &mut self.stdout {
            stdout.read_line(&mut line)?;
        }
        let address = line.trim().strip_prefix("listening at ");
        Ok(address.ok_or("the receiver did not come up")?.to_owned())
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<()> {
        let status = self.child.wait()?;
        if status.success() { Ok(()) } else { Err(format!("the receiver: {status}").into()) }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // Fails if it has ended, as it should.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
