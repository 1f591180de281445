//! What has come over a link whose messages lie in this process's memory when it hears of them:
//! told to the driver, and brought where that wants it. And the connection that a link keeps only
//! to hear of the peer's end.

use std::io;
use std::task::Poll;

use super::chunks::Filling;
use super::lookout::Look;
use super::{Arrival, Budget, Disposition, How, Landing, LinkKind, OpId, Segment, Sink};
use crate::error::{ErrorKind, LinkError};
use crate::runtime::Source;

fn internal(kind: LinkKind, detail: &str) -> LinkError {
    LinkError::new(ErrorKind::Io, kind, detail)
}

/// A payload's way to the place that the driver gave for it.
pub(super) fn filling(kind: LinkKind, to: Landing, len: usize) -> Result<Filling, LinkError> {
    let filling = Filling::new(to, len);
    filling.ok_or_else(|| internal(kind, "a landing of another length or kind than its payload"))
}

/// Hands up a parcel whose payload is here: `len` bytes at `from`, and in `arrival.inline` if that
/// is private memory.
///
/// # Safety
///
/// `len` bytes are readable at `from`.
#[inline(always)]
pub(super) unsafe fn eager(
    kind: LinkKind,
    arrival: Arrival<'_>,
    from: *const u8,
    len: usize,
    budget: &mut Budget,
    sink: &mut dyn Sink,
) -> Result<(), LinkError> {
    let private = arrival.inline.is_some();
    let answer = sink.parcel(arrival);
    if private && matches!(answer, Disposition::Taken) {
        // Nothing is in it that has to be dropped.
        std::mem::forget(answer);
        return Ok(());
    }
    // SAFETY: the caller's promise.
    unsafe { answered(kind, answer, from, len, budget, sink) }
}

/// Does with a payload that is here what the driver wants, which did not take it at once.
///
/// # Safety
///
/// As of [`eager`].
#[inline(never)]
unsafe fn answered(
    kind: LinkKind,
    answer: Disposition,
    from: *const u8,
    len: usize,
    budget: &mut Budget,
    sink: &mut dyn Sink,
) -> Result<(), LinkError> {
    match answer {
        Disposition::Discard => Ok(()),
        Disposition::Land { to, op, .. } => {
            budget.bytes = budget.bytes.saturating_sub(len);
            let mut filling = filling(kind, to, len)?;
            // SAFETY: the caller's promise; the driver keeps the landing, which has room for as
            // many.
            unsafe { filling.take(from, len) };
            if op != OpId::NONE {
                sink.done(op, Ok(()));
            }
            Ok(())
        }
        Disposition::Fatal(error) => Err(error),
        Disposition::Taken | Disposition::Hold | Disposition::View => {
            Err(internal(kind, "an eager payload was neither landed nor discarded"))
        }
    }
}

/// What is to become of a payload that waits at the peer.
pub(super) enum Offered {
    Land { to: Landing, op: OpId },
    Hold,
    Refuse,
}

/// Hands up a parcel whose payload waits at the peer.
pub(super) fn offer(
    kind: LinkKind,
    arrival: Arrival<'_>,
    sink: &mut dyn Sink,
) -> Result<Offered, LinkError> {
    let how = arrival.how;
    match sink.parcel(arrival) {
        Disposition::Land { to, op, .. } => Ok(Offered::Land { to, op }),
        Disposition::Hold if how == How::Offer => Ok(Offered::Hold),
        Disposition::Discard => Ok(Offered::Refuse),
        Disposition::Fatal(error) => Err(error),
        Disposition::Taken | Disposition::Hold | Disposition::View => {
            Err(internal(kind, "an offer was neither landed, held nor discarded"))
        }
    }
}

/// The length of a payload that waits at the peer, if it may be as long as that.
pub(super) fn offered_len(kind: LinkKind, len: u64, max: u64) -> Result<usize, LinkError> {
    let len = Some(len).filter(|len| (1..=max).contains(len));
    let len = len.and_then(|len| usize::try_from(len).ok());
    len.ok_or_else(|| LinkError::protocol(kind, "a payload of a length that may not be"))
}

/// The length of a payload that is to be sent, if the processor can read it.
#[inline]
pub(super) fn sent_len(kind: LinkKind, payload: &[Segment<'_>]) -> Result<usize, LinkError> {
    let mut len = 0;
    for segment in payload {
        if !segment.kind.cpu_accessible() {
            let detail = format!("{} memory cannot be sent as it is", segment.kind);
            return Err(LinkError::new(ErrorKind::Unsupported, kind, detail));
        }
        len += segment.len;
    }
    Ok(len)
}

/// Whether the peer's process still holds its end of the bootstrap connection, on which nothing
/// more is said. What ends the link, if it does not; `io_error` says it where the system does.
pub(super) fn end_of_peer(
    kind: LinkKind,
    bootstrap: &Source,
    mut look: Look<'_, '_>,
    io_error: impl FnOnce(&str, &io::Error) -> LinkError,
) -> Option<LinkError> {
    let looked = look.read(bootstrap, |fd| {
        let mut byte = [0];
        Ok(rustix::io::read(fd, &mut byte)?)
    });
    match looked {
        Poll::Pending => None,
        Poll::Ready(Ok(0)) => Some(LinkError::new(
            ErrorKind::PeerGone,
            kind,
            "the peer's end of the bootstrap connection was closed without goodbye",
        )),
        Poll::Ready(Ok(_)) => Some(LinkError::protocol(kind, "bytes on a bootstrap that is over")),
        Poll::Ready(Err(error)) => Some(io_error("watching the bootstrap connection", &error)),
    }
}
