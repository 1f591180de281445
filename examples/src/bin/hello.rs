//! Two nodes, one connection, a message each way.

use std::process::ExitCode;

use thalweg::{CloseReason, Message, Node, Result};
use thalweg_examples::{config, exit, say};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    exit(run().await)
}

async fn run() -> Result<()> {
    // Usually these are two processes; `copy` shows that.
    let server = Node::new(config()?.hello("a server"))?;
    let client = Node::new(config()?.hello("a client"))?;

    let listener = server.listen("thalweg://127.0.0.1:0").await?;
    let (there, here) = tokio::try_join!(client.connect(listener.address()), listener.accept())?;

    there.send(Message::copy_from_slice(b"hello")).await?;
    let heard = String::from_utf8_lossy(&here.recv().await?.to_vec()?).into_owned();
    let from = String::from_utf8_lossy(&here.peer().hello).into_owned();
    say(format_args!("{from} says {heard:?}"));

    // A message may have many frames. Nothing of this is copied on this side.
    here.send(Message::from_iter([b"well met, ".into(), heard.into()])).await?;
    say(format_args!("and hears {:?}", String::from_utf8_lossy(&there.recv().await?.to_vec()?)));

    say(format_args!("\n{}", there.route()));
    // Both sides take part in a goodbye.
    let (closed, _) = tokio::join!(there.close(CloseReason::new(0, "done")), here.closed());
    closed
}
