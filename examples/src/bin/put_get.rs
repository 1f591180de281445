//! One-sided access: memory is offered once, and peers with its key write and read it without a
//! receive on this side.

use std::process::ExitCode;

use thalweg::{Access, CloseReason, Endpoint, ErrorKind, Message, Node, RemoteKey, Result};
use thalweg_examples::{config, exit, say};

const REGION_BYTES: usize = 1 << 20;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    exit(run().await)
}

async fn run() -> Result<()> {
    let node = Node::new(config()?)?;
    let listener = node.listen("thalweg://127.0.0.1:0").await?;
    let (user, owner) = tokio::try_join!(node.connect(listener.address()), listener.accept())?;
    tokio::try_join!(offer(&node, &owner), use_region(&user))?;
    let (closed, _) = tokio::join!(owner.close(CloseReason::default()), user.closed());
    closed
}

/// The side that owns the memory.
async fn offer(node: &Node, to: &Endpoint) -> Result<()> {
    let region = node.register(vec![0u8; REGION_BYTES], Access::ReadWrite)?;
    // A key is plain data; it travels like everything else.
    to.send(Message::copy_from_slice(&region.key().to_bytes())).await?;

    // Puts and messages are not ordered among each other. The peer fenced before it sent this.
    let told = to.recv().await?.to_vec()?;
    let mut start = [0; 13];
    region.read(4096, &mut start)?;
    say(format_args!("told {:?}, found {:?}", text(&told), text(&start)));

    // From here on the key is worthless, and the memory is ours alone again.
    let memory = region.revoke().await?;
    say(format_args!("{} bytes back", memory.len()));
    to.send(Message::copy_from_slice(b"revoked")).await?;
    Ok(())
}

/// The side that has the key.
async fn use_region(from: &Endpoint) -> Result<()> {
    let key = RemoteKey::from_bytes(&from.recv().await?.to_vec()?)?;
    say(format_args!("a region of {} bytes", key.len_bytes()));

    from.put(b"written there".to_vec(), &key, 4096).await?;
    let got = from.get(vec![0u8; 7], &key, 4096).await?;
    say(format_args!("read back {:?}", text(&got)));

    from.fence().await?;
    from.send(Message::copy_from_slice(b"at 4096")).await?;

    let _revoked = from.recv().await?;
    match from.get(got, &key, 0).await {
        Err(failed) if failed.kind() == ErrorKind::KeyRevoked => {
            say(format_args!("then: {failed}"))
        }
        Err(failed) => return Err(failed.into()),
        Ok(_) => unreachable!("the key was revoked before this"),
    }
    match from.put(vec![0u8; 2], &key, REGION_BYTES as u64 - 1).await {
        Err(failed) => say(format_args!("and: {failed}")),
        Ok(_) => unreachable!("one byte too many"),
    }
    Ok(())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
