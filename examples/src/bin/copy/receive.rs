//! The receiving side: this task receives, a thread writes.

use std::time::Instant;

use indicatif::ProgressBar;
use thalweg::{CloseReason, Endpoint, Frame, Message};
use thalweg_examples::say;
use tokio::sync::{mpsc, oneshot};

use crate::sink::{Next, Sink};
use crate::wire::{PIECE_BYTES, Receipt};
use crate::{Result, progress};

/// Messages that were received and not yet written.
const QUEUE: usize = 4;

/// Receives a tree and answers with a receipt.
pub async fn tree(from: &Endpoint, sink: Sink, show_progress: bool) -> Result<()> {
    let start = Instant::now();
    let (queue, messages) = mpsc::channel(QUEUE);
    let (done, written) = oneshot::channel();
    let writer = std::thread::spawn(move || {
        // Nobody waits any more if the sender is gone.
        let _ = done.send(write_all(messages, sink, show_progress));
    });
    let outcome = receive_all(from, queue, written).await;
    let joined = writer.join().map_err(|_| "the writer panicked".into());
    match joined.and(outcome) {
        Ok(receipt) => {
            from.send(receipt.encode()).await?;
            let Receipt { files, bytes, checksum } = receipt;
            let seconds = start.elapsed().as_secs_f64();
            let checksum = blake3::Hash::from_bytes(checksum);
            say(format_args!(
                "{files} files, {bytes} bytes in {seconds:.3} s; checksum {checksum}"
            ));
            // The goodbye is the sender's, once it has read the receipt.
            from.closed().await;
            Ok(())
        }
        Err(error) => {
            // The sender may be gone; then it needs no explanation.
            let _ = from.close(CloseReason::new(1, error.to_string())).await;
            Err(error)
        }
    }
}

async fn receive_all(
    from: &Endpoint,
    queue: mpsc::Sender<Message>,
    mut written: oneshot::Receiver<Result<Receipt>>,
) -> Result<Receipt> {
    loop {
        tokio::select! {
            biased;
            receipt = &mut written => {
                return receipt.unwrap_or_else(|_| Err("the writer panicked".into()));
            }
            message = from.recv() => match message {
                // Refused when the writer has ended; what it has to say follows.
                Ok(message) => drop(queue.send(message).await),
                Err(error) => return Err(explained(&error).into()),
            },
        }
    }
}

/// A sender that gives up says why.
fn explained(error: &thalweg::Error) -> String {
    let why = match error.close_reason() {
        Some(reason) if reason.by_peer => format!("the sender gave up: {}", reason.text),
        _ => format!("nothing more can be received: {error}"),
    };
    format!("{why}; what is there is not all")
}

fn write_all(
    mut messages: mpsc::Receiver<Message>,
    mut sink: Sink,
    show_progress: bool,
) -> Result<Receipt> {
    let mut bar = ProgressBar::hidden();
    let mut copy = Vec::new();
    while let Some(message) = messages.blocking_recv() {
        let (head, piece) = match message.frames() {
            [head] => (head.to_vec()?, &[][..]),
            [head, piece] => (head.to_vec()?, bytes_of(piece, &mut copy)?),
            frames => return Err(format!("a message of {} frames", frames.len()).into()),
        };
        match sink.take(&head, piece)? {
            Next::Begin(bytes) if show_progress => bar = progress::bar(bytes),
            Next::Begin(_) => {}
            Next::Go => bar.inc(piece.len() as u64),
            Next::Done(receipt) => {
                bar.finish_and_clear();
                return Ok(receipt);
            }
        }
    }
    Err("the tree has no end".into())
}

/// The bytes of a frame. Those that lie in the sender's memory are copied first: it could change
/// them between the checksum and the file.
fn bytes_of<'a>(frame: &'a Frame, copy: &'a mut Vec<u8>) -> Result<&'a [u8]> {
    if frame.len() > PIECE_BYTES {
        return Err(format!("a piece of {} bytes", frame.len()).into());
    }
    if let Some(bytes) = frame.as_slice() {
        return Ok(bytes);
    }
    copy.resize(frame.len(), 0);
    frame.copy_to_slice(copy)?;
    Ok(copy)
}
