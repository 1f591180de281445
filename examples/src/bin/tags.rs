//! Tags: the receiver says what it wants next, and where it shall land.
//!
//! Two kinds of traffic share one endpoint: results, in any order, each under its own number, and
//! urgent notes. The upper half of a tag says which kind it is, the lower half which one of them.

use std::process::ExitCode;
use std::time::Duration;

use thalweg::{CloseReason, Endpoint, ErrorKind, Node, Result};
use thalweg_examples::{config, exit, say};

const RESULT: u64 = 1 << 32;
const NOTE: u64 = 2 << 32;
/// Looks at the kind alone.
const ANY_OF_KIND: u64 = 0xffff_ffff << 32;
/// Looks at every bit.
const EXACTLY: u64 = u64::MAX;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    exit(run().await)
}

async fn run() -> Result<()> {
    let node = Node::new(config()?)?;
    let listener = node.listen("thalweg://127.0.0.1:0").await?;
    let (worker, client) = tokio::try_join!(node.connect(listener.address()), listener.accept())?;
    tokio::try_join!(work(&worker), receive(&client))?;
    let (closed, _) = tokio::join!(client.close(CloseReason::default()), worker.closed());
    closed
}

async fn work(to: &Endpoint) -> Result<()> {
    for number in [3, 1, 2] {
        to.tag_send(RESULT | number, format!("result {number}").into_bytes()).await?;
    }
    to.tag_send(NOTE, b"running hot".to_vec()).await?;
    Ok(())
}

async fn receive(from: &Endpoint) -> Result<()> {
    // A note first, although it was sent last.
    let note = from.tag_recv(NOTE, ANY_OF_KIND, vec![0; 64]).await?;
    say(format_args!("note: {}", text(&note.buffer[..note.len_bytes])));

    // Then result 2, and then whatever there is, in the order of sending.
    let two = from.tag_recv(RESULT | 2, EXACTLY, vec![0; 64]).await?;
    say(format_args!("asked for: {}", text(&two.buffer[..two.len_bytes])));
    let mut buffer = two.buffer;
    for _ in 0..2 {
        let got = from.tag_recv(RESULT, ANY_OF_KIND, buffer).await?;
        say(format_args!("number {}: {}", got.tag & 0xffff, text(&got.buffer[..got.len_bytes])));
        buffer = got.buffer;
    }

    // Nobody sends result 9. The buffer comes back with the error.
    let wait = Duration::from_millis(50);
    match from.tag_recv(RESULT | 9, EXACTLY, buffer).timeout(wait).await {
        Err(failed) if failed.kind() == ErrorKind::TimedOut => {
            let bytes = failed.buffer.map_or(0, |buffer| buffer.len());
            say(format_args!(
                "no result 9 within {wait:?}; the buffer of {bytes} bytes is ours again"
            ));
            Ok(())
        }
        Err(failed) => Err(failed.into()),
        Ok(_) => unreachable!("nobody sends it"),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
