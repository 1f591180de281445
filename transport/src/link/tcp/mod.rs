//! Parcels over a TCP connection.
//!
//! Owns the framing, the order in which frames leave, and the reading of payloads straight into
//! the memory they are meant for. Must not know how the connection was made, nor what parcels
//! mean.
//!
//! # Sending
//!
//! A parcel posted while nothing waits is written at once: header, head and payload in one
//! vectored write. What the kernel does not take waits in lanes, one per class for posts and one
//! per class for pulled offers. Control goes first, the others in turn, a chunk each: at most one
//! chunk lies between a class and the socket.
//!
//! # Receiving
//!
//! One vectored read takes the rest of the payload under way, straight into its landing, and what
//! follows it into a buffer of 4 KiB. A count short of that says that the socket is drained, so no
//! second read asks for it.
//!
//! # Limits
//!
//! 1,024 parcels wait per bulk class, then posts are answered [`Post::Full`]; 65,536 offers may be
//! open. An idle link holds one buffer of 4 KiB and no more than a KiB of state.

#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz;
mod pieces;
mod rx;
mod stream;
mod tx;
mod wire;

#[cfg(test)]
mod tests;

use std::io;
use std::mem::MaybeUninit;
use std::task::{Context, Poll};
use std::time::Duration;

use self::pieces::{IoVecs, io_vec};
use self::rx::{Rx, Step};
use self::stream::{Plain, total};
use self::tx::{Out, Tx};
use self::wire::{Frame, FrameKind, HEADER_BYTES};
use super::{
    Armed, Budget, Caps, Check, Class, HEAD_MAX, How, Killed, Landing, Link, LinkCounters,
    LinkKind, OpId, PayloadId, Post, Progress, Segment, Sink, armed_if_pending,
};
use crate::error::{ErrorKind, LinkError};
use crate::runtime::{Source, is_runtime_gone};

pub(crate) use self::stream::{ByteStream, Keepalive, configure_socket};

/// A frame up to this long is copied together and written without vectors.
const FLAT_MAX: usize = 512;
/// More segments than this are queued rather than written directly.
const DIRECT_SEGMENTS: usize = 30;
/// Payloads that nobody wants are read into this much stack.
const SCRATCH_BYTES: usize = 16 * 1024;
/// The least that one read or write asks for, however little of the budget is left.
const STEP_MIN_BYTES: usize = 16 * 1024;

/// Control parcels that may wait to be written. Answers to what a peer sends are among them, so a
/// peer that sends and never reads ends here.
const CONTROL_MAX: usize = 65_536;

/// What a link is told when it is made.
#[derive(Clone, Debug)]
pub(crate) struct TcpOptions {
    /// See [`Caps::eager_max`].
    pub eager_max: usize,
    /// The longest piece of a payload that is sent without looking whether another class waits.
    pub chunk_bytes: usize,
    /// How long a peer's host may owe an acknowledgement.
    pub unacked_timeout: Duration,
    /// The longest payload that the peer may send, in bytes.
    pub max_payload: u64,
}

impl Default for TcpOptions {
    fn default() -> Self {
        TcpOptions {
            eager_max: 64 * 1024,
            chunk_bytes: 512 * 1024,
            unacked_timeout: Duration::from_secs(30),
            max_payload: 1 << 40,
        }
    }
}

/// A lane over one TCP connection, or over another stream of bytes.
pub(crate) struct TcpLink<S: ByteStream = Plain> {
    stream: S,
    caps: Caps,
    unacked_timeout: Duration,
    tx: Tx,
    rx: Rx,
    stalls: u64,
    /// Writing failed. Reported when everything that had arrived is read: the peer's reason for
    /// closing may be among it.
    write_error: Option<LinkError>,
    dead: Option<LinkError>,
}

/// How far a flush came.
#[derive(PartialEq, Eq)]
enum Flushed {
    Empty,
    Blocked,
    Spent,
}

/// How to reach the socket.
enum Access<'a, 'b> {
    Direct,
    Ready(&'a mut Context<'b>),
}

fn internal(detail: &str) -> LinkError {
    LinkError::new(ErrorKind::Io, LinkKind::Tcp, detail)
}

fn io_error(doing: &str, error: &io::Error) -> LinkError {
    if is_runtime_gone(error) {
        LinkError::new(ErrorKind::RuntimeGone, LinkKind::Tcp, error.to_string())
    } else {
        LinkError::io(LinkKind::Tcp, doing, error)
    }
}

fn report(sink: &mut dyn Sink, op: OpId, result: Result<(), LinkError>) {
    if op != OpId::NONE {
        sink.done(op, result);
    }
}

impl TcpLink<Plain> {
    /// A link over a connected, non-blocking socket registered for both directions. `leftover` is
    /// what was read from it beyond the bootstrap.
    pub fn new(source: Source, leftover: Vec<u8>, options: TcpOptions) -> Self {
        TcpLink::with_stream(Plain::new(source), leftover, options)
    }
}

impl<S: ByteStream> TcpLink<S> {
    /// As [`TcpLink::new`], over any stream.
    pub fn with_stream(stream: S, leftover: Vec<u8>, options: TcpOptions) -> Self {
        let chunk_kib = options.chunk_bytes / 1024;
        TcpLink {
            stream,
            caps: Caps {
                eager_max: options.eager_max,
                ways: format!("vectored write, read into place, chunks of {chunk_kib} KiB"),
            },
            unacked_timeout: options.unacked_timeout,
            tx: Tx::new(options.chunk_bytes),
            rx: Rx::new(leftover, options.max_payload),
            stalls: 0,
            write_error: None,
            dead: None,
        }
    }

    fn alive(&self) -> Result<(), LinkError> {
        self.dead.clone().map_or(Ok(()), Err)
    }

    /// Remembers the end of the link.
    fn ended<T>(&mut self, result: Result<T, LinkError>) -> Result<T, LinkError> {
        if let Err(error) = &result
            && self.dead.is_none()
        {
            self.dead = Some(error.clone());
        }
        result
    }

    /// Writes a parcel that fits one frame while nothing waits.
    fn post_direct(
        &mut self,
        op: OpId,
        class: Class,
        head: &[u8],
        payload: &[Segment<'_>],
        len: usize,
    ) -> Post {
        let frame = Frame {
            kind: FrameKind::Parcel,
            class,
            head_len: head.len() as u16,
            id: 0,
            len: len as u64,
        };
        let header = frame.encode();
        let whole = HEADER_BYTES + head.len() + len;
        let mut flat = [MaybeUninit::<u8>::uninit(); FLAT_MAX];
        let mut vectors = IoVecs::new();
        if whole <= FLAT_MAX {
            flatten(&mut flat, &header, head, payload);
            vectors.push(libc::iovec { iov_base: flat.as_mut_ptr().cast(), iov_len: whole });
        } else {
            vectors.push(io_vec(&header));
            vectors.push(io_vec(head));
            vectors.extend(payload.iter().filter(|segment| segment.len > 0).map(|segment| {
                libc::iovec { iov_base: segment.ptr.cast_mut().cast(), iov_len: segment.len }
            }));
        }
        // SAFETY: the first vectors are locals or borrowed; the segments are valid until the
        // operation is done, by the contract of `post`.
        let written = match unsafe { self.stream.try_write(&vectors) } {
            Ok(count) => count,
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    self.write_error = Some(io_error("writing to the connection", &error));
                }
                0
            }
        };
        if written == whole {
            self.tx.parcels_sent += 1;
            self.tx.payload_bytes_sent += len as u64;
            return Post::Done;
        }
        // SAFETY: by the contract of `post`; the caller added up `len`.
        let out = unsafe { Out::new(op, class, How::Eager, head, payload, len) };
        if written == 0 {
            self.tx.enqueue(out);
        } else if self.tx.enqueue_begun(out, written) {
            return Post::Done;
        }
        self.stalls += 1;
        Post::Pending
    }

    /// Writes what waits, as far as socket and budget allow. A failure is kept in `write_error`.
    fn flush(
        &mut self,
        access: &mut Access<'_, '_>,
        budget: &mut Budget,
        moved: &mut bool,
        done: &mut dyn FnMut(OpId),
    ) -> Flushed {
        while self.write_error.is_none() {
            self.tx.fill(done);
            let mut vectors = IoVecs::new();
            self.tx.gather(budget.bytes.max(STEP_MIN_BYTES), &mut vectors);
            if vectors.is_empty() {
                return Flushed::Empty;
            }
            if budget.bytes == 0 {
                return Flushed::Spent;
            }
            let wrote = match access {
                // SAFETY: the vectors name this link's own memory, and payloads that their
                // operations pin until they are done.
                Access::Direct => Poll::Ready(unsafe { self.stream.try_write(&vectors) }),
                // SAFETY: as above.
                Access::Ready(cx) => unsafe { self.stream.poll_write(cx, &vectors) },
            };
            let count = match wrote {
                Poll::Ready(Ok(count)) => count,
                Poll::Pending => return Flushed::Blocked,
                Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Flushed::Blocked;
                }
                Poll::Ready(Err(error)) => {
                    self.write_error = Some(io_error("writing to the connection", &error));
                    break;
                }
            };
            *moved |= count > 0;
            budget.bytes = budget.bytes.saturating_sub(count);
            self.tx.advance(count, done);
            if count < total(&vectors) {
                return Flushed::Blocked;
            }
        }
        Flushed::Blocked
    }

    /// Flushes outside of `poll`, where nothing but `op` can get done. Answers whether it did.
    fn flush_now(&mut self, op: OpId) -> bool {
        let mut finished = false;
        let mut budget = Budget::TURN;
        self.flush(&mut Access::Direct, &mut budget, &mut false, &mut |done| {
            debug_assert!(done == op, "another operation waited");
            finished = true;
        });
        finished
    }

    /// Reads what has come. Answers whether the budget ended first.
    fn receive(
        &mut self,
        access: &mut Access<'_, '_>,
        budget: &mut Budget,
        moved: &mut bool,
        sink: &mut dyn Sink,
    ) -> Result<bool, LinkError> {
        let mut drained = false;
        loop {
            *moved |= self.rx.has_unprocessed();
            match self.rx.process(budget, &mut self.tx, sink)? {
                Step::Spent => return Ok(true),
                Step::NeedData if drained => return Ok(false),
                Step::NeedData if budget.bytes == 0 => return Ok(true),
                Step::NeedData => {}
            }
            match self.read(access, budget.bytes.max(STEP_MIN_BYTES))? {
                None => return Ok(false),
                Some((count, short)) => {
                    *moved = true;
                    budget.bytes = budget.bytes.saturating_sub(count);
                    drained = short;
                }
            }
        }
    }

    /// One read: the bytes that came, and whether there were fewer than asked for.
    fn read(
        &mut self,
        access: &mut Access<'_, '_>,
        limit: usize,
    ) -> Result<Option<(usize, bool)>, LinkError> {
        let mut scratch = [MaybeUninit::<u8>::uninit(); SCRATCH_BYTES];
        let mut vectors = IoVecs::new();
        self.rx.gather(limit, &mut scratch, &mut vectors);
        let read = match access {
            // SAFETY: the vectors name this link's own memory, the scratch, and landings that the
            // driver keeps until they are done.
            Access::Direct => Poll::Ready(unsafe { self.stream.try_read(&vectors) }),
            // SAFETY: as above.
            Access::Ready(cx) => unsafe { self.stream.poll_read(cx, &vectors) },
        };
        match read {
            Poll::Pending => Ok(None),
            Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Poll::Ready(Err(error)) => Err(io_error("reading from the connection", &error)),
            Poll::Ready(Ok(0)) => {
                let detail = if self.rx.is_between_parcels() {
                    "connection closed by peer without goodbye"
                } else {
                    "connection closed by peer without goodbye, within a parcel"
                };
                Err(LinkError::new(ErrorKind::PeerGone, LinkKind::Tcp, detail))
            }
            Poll::Ready(Ok(count)) => {
                self.rx.received(count);
                Ok(Some((count, count < total(&vectors))))
            }
        }
    }

    fn turn(
        &mut self,
        access: &mut Access<'_, '_>,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<Progress, LinkError> {
        let mut moved = false;
        let mut flushed = Flushed::Empty;
        if !self.tx.is_idle() {
            flushed = self.flush(access, budget, &mut moved, &mut |op| report(sink, op, Ok(())));
        }
        let spent = self.receive(access, budget, &mut moved, sink)?;
        if flushed == Flushed::Empty && !self.tx.is_idle() {
            flushed = self.flush(access, budget, &mut moved, &mut |op| report(sink, op, Ok(())));
        }
        if spent || flushed == Flushed::Spent {
            return Ok(Progress::More);
        }
        match self.write_error.take() {
            Some(error) => Err(error),
            None if moved => Ok(Progress::Some),
            None => Ok(Progress::Idle),
        }
    }
}

/// Copies a frame that is known to fit.
fn flatten(
    flat: &mut [MaybeUninit<u8>; FLAT_MAX],
    header: &[u8],
    head: &[u8],
    payload: &[Segment<'_>],
) {
    let mut at = 0;
    let own = [(header.as_ptr(), header.len()), (head.as_ptr(), head.len())];
    let segments = payload.iter().map(|segment| (segment.ptr, segment.len));
    for (ptr, len) in own.into_iter().chain(segments).filter(|(_, len)| *len > 0) {
        let room = &mut flat[at..at + len];
        // SAFETY: `room` has `len` bytes; the source is a slice, or a segment that is valid by the
        // contract of `post`.
        unsafe { std::ptr::copy_nonoverlapping(ptr, room.as_mut_ptr().cast(), len) };
        at += len;
    }
}

impl<S: ByteStream> Link for TcpLink<S> {
    fn kind(&self) -> LinkKind {
        LinkKind::Tcp
    }

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        spinning: bool,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<Progress, LinkError> {
        self.alive()?;
        let mut access = if spinning { Access::Direct } else { Access::Ready(cx) };
        let result = self.turn(&mut access, budget, sink);
        self.ended(result)
    }

    fn arm(&mut self, cx: &mut Context<'_>) -> Result<Armed, LinkError> {
        self.alive()?;
        if self.rx.has_unprocessed() || self.write_error.is_some() {
            return Ok(Armed::Busy);
        }
        let readable = armed(self.stream.poll_readable(cx));
        let readable = self.ended(readable)?;
        if self.tx.is_idle() {
            self.tx.trim();
            self.rx.trim();
            return Ok(readable);
        }
        let writable = armed(self.stream.poll_writable(cx));
        let writable = self.ended(writable)?;
        Ok(if readable == Armed::Yes { writable } else { Armed::Busy })
    }

    fn post(
        &mut self,
        op: OpId,
        class: Class,
        how: How,
        head: &[u8],
        payload: &[Segment<'_>],
    ) -> Result<Post, LinkError> {
        self.alive()?;
        if head.len() > HEAD_MAX {
            return Err(internal("a head longer than HEAD_MAX"));
        }
        let mut len = 0;
        for segment in payload {
            if !segment.kind.cpu_accessible() {
                let detail = format!("{} memory cannot be sent as it is", segment.kind);
                return Err(LinkError::new(ErrorKind::Unsupported, LinkKind::Tcp, detail));
            }
            len += segment.len;
        }
        let idle = self.tx.is_idle() && self.write_error.is_none();
        if idle
            && how == How::Eager
            && len <= self.tx.chunk_bytes()
            && payload.len() <= DIRECT_SEGMENTS
        {
            return Ok(self.post_direct(op, class, head, payload, len));
        }
        if class == Class::Control && self.tx.control_waiting() >= CONTROL_MAX {
            return self.ended(Err(LinkError::new(
                ErrorKind::LimitExceeded,
                LinkKind::Tcp,
                "the peer causes answers and does not read them",
            )));
        }
        if self.tx.is_full(class, how) {
            self.stalls += 1;
            return Ok(Post::Full);
        }
        // SAFETY: by the contract of this function; `len` is the sum of the segments.
        self.tx.enqueue(unsafe { Out::new(op, class, how, head, payload, len) });
        if idle && self.flush_now(op) {
            return Ok(Post::Done);
        }
        self.stalls += u64::from(!self.tx.is_idle());
        Ok(Post::Pending)
    }

    fn land(&mut self, payload: PayloadId, to: Landing, op: OpId) -> Result<Post, LinkError> {
        self.alive()?;
        let Ok(id) = u32::try_from(payload.0) else {
            return Err(internal("landing of a payload that is not held"));
        };
        let idle = self.tx.is_idle();
        let empty = self.rx.land(id, &to, op, &mut self.tx)?;
        if idle {
            self.flush_now(OpId::NONE);
        }
        Ok(if empty { Post::Done } else { Post::Pending })
    }

    fn release(&mut self, payload: PayloadId) {
        let Ok(id) = u32::try_from(payload.0) else {
            return;
        };
        let idle = self.tx.is_idle();
        if self.dead.is_none() && self.rx.release(id, &mut self.tx) && idle {
            self.flush_now(OpId::NONE);
        }
    }

    fn kill(&mut self, error: &LinkError, sink: &mut dyn Sink) -> Killed {
        self.stream.shutdown();
        self.dead.get_or_insert_with(|| error.clone());
        let mut done = |op| report(sink, op, Err(error.clone()));
        self.tx.clear(&mut done);
        self.rx.clear(&mut done);
        Killed::Over
    }

    /// Offers that the peer has not answered do not count: they wait for the peer, not for the
    /// socket.
    fn flushed(&self) -> bool {
        self.tx.is_idle()
    }

    fn check(&mut self) -> Result<Check, LinkError> {
        self.alive()?;
        let Some(silent) = self.stream.unanswered_for() else {
            return Ok(if self.stream.owes() { Check::Owed } else { Check::Quiet });
        };
        if silent < self.unacked_timeout {
            return Ok(Check::Owed);
        }
        let detail = format!("the peer's host has acknowledged nothing for {silent:.1?}");
        self.ended(Err(LinkError::new(ErrorKind::ConnectionLost, LinkKind::Tcp, detail)))
    }

    fn counters(&self) -> LinkCounters {
        LinkCounters {
            parcels_sent: self.tx.parcels_sent,
            parcels_received: self.rx.parcels_received,
            inline_bytes_sent: self.tx.payload_bytes_sent,
            inline_bytes_received: self.rx.payload_bytes_received,
            stalls: self.stalls,
            ..LinkCounters::default()
        }
    }
}

fn armed(polled: Poll<io::Result<()>>) -> Result<Armed, LinkError> {
    match polled {
        Poll::Ready(Err(error)) => Err(io_error("waiting for the connection", &error)),
        other => Ok(armed_if_pending(&other)),
    }
}
