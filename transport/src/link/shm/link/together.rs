//! One payload copied by both sides: the receiver reads from the start on, the sender writes from
//! the end backwards, until they meet. With a core on each side that takes half the time.
//!
//! The receiver asks for it when it begins to land a long payload, and goes on by itself whether
//! the sender comes to help or not. What the two tell each other about how far they are stands in
//! their pages (see `marks`). Where they meet, the receiver closes the copy. Only if the sender is
//! in the middle of a piece then does the receiver wait, for the sender to say that it has stopped.
//!
//! A sender that helps writes memory of the receiver's process. The kernel lets it, because it
//! lets it read: both need the same right, and whoever has it could write anything there anyway.
//! What has to be kept is that an honest sender never writes memory which has become something
//! else. While it is at it the receiver does not let go of the memory, also if the link ends: the
//! link then lingers, until the sender is seen to have stopped or its process to have ended. So
//! only memory that the driver can keep for so long is offered (`Disposition::Land`). And a number
//! of a process that has ended may come to name another one: a look at the process's descriptor
//! comes before each write, so that to be wrong the kernel would have to give away all its other
//! numbers between that look and the next instruction but few. (What no look can tell in that moment
//! is that the process has become another program by `exec`.)

use std::task::{Context, Poll};
use std::thread;
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::super::cells::RECORD_MAX;
use super::super::copy;
use super::super::marks::OFFSET_MAX;
use super::super::wire::{Builder, Fixed, Kind, PULLS_MAX, Piece, Reader, flags};
use super::incoming::check_pieces;
use super::{ShmLink, protocol};
use crate::error::LinkError;
use crate::link::linger::Linger;
use crate::link::{Armed, Budget, How, Killed, OpId, Sink};

/// Shorter payloads are as good as copied when a helper is awake. With two cores, both in a window of
/// 4, against the receiver alone: 512 KiB 12.9 against 10.5 GB/s, 1 MiB 16.5 against 9.6, 2 MiB 19.6
/// against 8.4, 8 MiB 18.6 against 8.2.
pub(in super::super) const TOGETHER_MIN_BYTES: u64 = 512 << 10;
/// What either side takes on at a time, at most and at least. Towards the end half of what is left,
/// so that neither waits long for the other.
const PIECE_MAX_BYTES: u64 = 256 << 10;
const PIECE_MIN_BYTES: u64 = 32 << 10;
/// How long the end of a link waits for a piece that is being written. One takes 25 µs at 10 GB/s;
/// longer only if the sender's process does not run.
const KILL_PATIENCE: Duration = Duration::from_millis(2);
/// How often a link that lingers looks again, at first and at last.
const PAUSE_MIN: Duration = Duration::from_millis(2);
const PAUSE_MAX: Duration = Duration::from_millis(256);

/// The receiver's side of a copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    /// The landing.
    pub(super) key: u64,
    number: u16,
    /// The sender was at a piece when this side closed the copy.
    closed: bool,
}

/// The sender's side of a copy.
pub(super) struct Helping {
    /// The payload.
    key: u64,
    /// The receiver's key.
    handle: u64,
    number: u16,
    to: SmallVec<[Piece; 4]>,
    /// From here on it is there.
    from: u64,
}

/// A landing that outlives the link.
pub(super) struct Lingering {
    op: OpId,
    until: Linger,
}

fn piece(left: u64) -> u64 {
    (left / 2).clamp(PIECE_MIN_BYTES, PIECE_MAX_BYTES).min(left)
}

/// The receiver's side.
impl ShmLink {
    /// Asks the sender to copy from the other end, where that is worthwhile.
    pub(super) fn seek_help(&mut self, key: u64) -> Result<(), LinkError> {
        if self.asked.is_some() || !self.peer_may_pull {
            return Ok(());
        }
        let Some(incoming) = self.incoming.get_mut(key) else { return Ok(()) };
        let (remote, len) = (incoming.remote, incoming.len);
        let Some(landing) = &mut incoming.landing else { return Ok(()) };
        let worthwhile = landing.lasting
            && (self.together_min..OFFSET_MAX).contains(&len)
            && len - landing.done >= self.together_min
            && !landing.has_asked
            && landing.to.len() <= PULLS_MAX;
        if !worthwhile {
            return Ok(());
        }
        landing.has_asked = true;
        let mut number = self.last_number.wrapping_add(1);
        if self.ring.peer().marks.given(number).is_some() {
            // The word in the page is that of a copy of long ago, or has never been written.
            number = number.wrapping_add(1);
        }
        self.last_number = number;
        let mut bytes = [0; RECORD_MAX];
        let count = landing.to.len() as u64 | u64::from(number) << 32;
        let (done, mut builder) = (landing.done, Builder::new(&mut bytes, remote, key, count));
        for to in &landing.to {
            let addr = to.ptr.expose_provenance() as u64;
            builder.piece(Piece { addr, len: to.len as u64 });
        }
        let record = builder.finish(&[]);
        self.ring.own().marks.take(number, done);
        self.asked = Some(Asked { key, number, closed: false });
        let flags = flags(Kind::Help, How::Eager, 0);
        self.push_control(flags, record.len(), [record].into_iter())
    }

    /// How much of a landing, of which `done` bytes are there, this side is to copy next: `None` if
    /// the sender has the rest.
    pub(super) fn take_on(&mut self, key: u64, done: u64, end: u64, limit: u64) -> Option<u64> {
        let Some(asked) = self.asked.filter(|asked| asked.key == key) else {
            return Some(end.saturating_sub(done).min(limit)).filter(|take| *take > 0);
        };
        let given = self.ring.peer().marks.given(asked.number);
        let from = given.map_or(end, |given| given.from.min(end));
        if asked.closed || from <= done {
            return None;
        }
        let take = piece(from - done).min(limit);
        self.ring.own().marks.take(asked.number, done + take);
        Some(take)
    }

    /// This side has come to where the sender has got, or can go on no longer. Answers where the
    /// landing ends now, or `None`: the sender will say.
    pub(super) fn close_help(&mut self, key: u64, end: u64) -> Option<u64> {
        let Some(asked) = self.asked.as_mut().filter(|asked| asked.key == key) else {
            return Some(end);
        };
        self.ring.own().marks.close(asked.number);
        let given = self.ring.peer().marks.given(asked.number);
        if given.is_some_and(|given| given.busy) {
            asked.closed = true;
            return None;
        }
        self.asked = None;
        Some(given.map_or(end, |given| given.from.min(end)))
    }

    /// The sender has stopped.
    pub(super) fn take_helped(&mut self, fixed: Fixed) -> Result<(), LinkError> {
        let Some(asked) = self.asked.filter(|asked| u64::from(asked.number) == fixed.count) else {
            // The copy was closed before the sender knew.
            return Ok(());
        };
        let Some(incoming) = self.incoming.get_mut(asked.key) else { return Ok(()) };
        if fixed.id != asked.key || fixed.len > incoming.len {
            return Err(protocol("the end of a common copy that cannot be"));
        }
        let Some(landing) = &mut incoming.landing else { return Ok(()) };
        landing.end = fixed.len;
        self.asked = None;
        if asked.closed {
            self.landing.push_back(asked.key);
            self.attention = true;
        }
        Ok(())
    }

    /// Ends the copy with the link. Called once the page says that this side is dying: the sender
    /// begins nothing more.
    pub(super) fn end_help(&mut self, error: &LinkError, sink: &mut dyn Sink) -> Killed {
        if let Some(asked) = self.asked.take()
            && let Some(landing) = self.incoming.remove(asked.key).and_then(|open| open.landing)
        {
            let until = Linger::new(&self.timers, PAUSE_MIN, PAUSE_MAX);
            self.lingering = Some(Lingering { op: landing.op, until });
            self.wait_for_writer();
        }
        let Some(mut lingering) = self.lingering.take() else { return Killed::Over };
        if self.writer_has_stopped() {
            sink.done(lingering.op, Err(error.clone()));
            return Killed::Over;
        }
        lingering.until.in_vain();
        self.lingering = Some(lingering);
        Killed::Keeps
    }

    fn writer_has_stopped(&self) -> bool {
        // In a forked child it is the parent's memory that is written.
        self.ring.own().forked() || !self.ring.peer().marks.is_busy() || self.process_has_ended()
    }

    /// Waits a little for a piece that is being written.
    fn wait_for_writer(&self) {
        let until = Instant::now() + KILL_PATIENCE;
        while !self.writer_has_stopped() && Instant::now() < until {
            thread::yield_now();
        }
    }

    /// Arms a link that lingers: until its peer's process ends, or it is time to look again.
    pub(super) fn arm_to_end(&mut self, cx: &mut Context<'_>) -> Armed {
        let Some(lingering) = &mut self.lingering else { return Armed::Yes };
        if lingering.until.arm(cx) == Armed::Busy {
            return Armed::Busy;
        }
        match self.process.poll_readable(cx) {
            Poll::Pending => Armed::Yes,
            Poll::Ready(Ok(())) => Armed::Busy,
            // The timer is left.
            Poll::Ready(Err(_)) => Armed::Yes,
        }
    }
}

/// The sender's side.
impl ShmLink {
    /// The receiver asks for help.
    pub(super) fn take_help(
        &mut self,
        fixed: Fixed,
        mut reader: Reader<'_>,
    ) -> Result<(), LinkError> {
        let (count, number) = (fixed.count as u32 as usize, fixed.count >> 32);
        let (Ok(number), true) = (u16::try_from(number), count <= PULLS_MAX) else {
            return Err(protocol("a common copy that cannot be"));
        };
        let mut to = SmallVec::new();
        for _ in 0..count {
            let piece = reader.piece();
            to.push(piece.ok_or_else(|| protocol("a record too short for its descriptors"))?);
        }
        let Some(outgoing) = self.outgoing.get_mut(fixed.id) else {
            return Err(protocol("help asked for with a payload that is not open"));
        };
        let len = outgoing.len;
        check_pieces(&to, len)?;
        if len >= OFFSET_MAX || !outgoing.is_read_by_peer() {
            return Err(protocol("help asked for with a payload that the peer does not read"));
        }
        // An honest receiver asks once for a payload, and lists more pieces than that elsewhere.
        let may = !outgoing.helped && outgoing.pieces.len() <= PULLS_MAX;
        outgoing.helped = true;
        let helping = Helping { key: fixed.id, handle: fixed.len, number, to, from: len };
        // A copy before this one has been closed.
        self.helping = Some(helping);
        if self.may_pull && self.may_help && may {
            self.attention = true;
            Ok(())
        } else {
            self.stop_helping()
        }
    }

    /// The receiver is finished with a payload: it had closed the copy.
    pub(super) fn forget_help(&mut self, key: u64) {
        if self.helping.as_ref().is_some_and(|helping| helping.key == key) {
            self.helping = None;
        }
    }

    fn stop_helping(&mut self) -> Result<(), LinkError> {
        let Some(Helping { handle, from, number, .. }) = self.helping.take() else {
            return Ok(());
        };
        self.push_fixed(Kind::Helped, Fixed { id: handle, len: from, count: number.into() })
    }

    /// Copies at most `limit` bytes to the receiver. Whether anything was done.
    pub(super) fn help_turn(
        &mut self,
        budget: &mut Budget,
        limit: usize,
    ) -> Result<bool, LinkError> {
        let (mut left, mut moved) = (limit.min(budget.bytes), false);
        while let Some(helping) = &self.helping {
            let taken = self.ring.peer().marks.taken(helping.number);
            let open = taken.and_then(|taken| helping.from.checked_sub(taken));
            let Some(open) = open.filter(|open| *open > 0) else {
                moved = true;
                self.stop_helping()?;
                break;
            };
            if left == 0 {
                break;
            }
            let take = piece(open).min(left as u64);
            moved = true;
            let given = self.give(take)?;
            if self.dead.is_some() {
                // What the peer wrote before its end is read first.
                self.helping = None;
                break;
            }
            if !given {
                self.stop_helping()?;
                break;
            }
            left -= take as usize;
            budget.bytes -= take as usize;
        }
        Ok(moved)
    }

    /// Writes the last `take` bytes before those that are there. `false`: it cannot be done.
    fn give(&mut self, take: u64) -> Result<bool, LinkError> {
        let Some(Helping { number, from: before, .. }) = self.helping else { return Ok(false) };
        let from = before - take;
        self.ring.own().marks.begin(number, from);
        // From here to `end` the receiver keeps the memory, if it has not let go of it yet.
        let written = self.write(number, from, take);
        let there = if matches!(written, Ok(true)) { from } else { before };
        self.ring.own().marks.end(number, there);
        if let Some(helping) = &mut self.helping {
            helping.from = there;
        }
        self.counters.single_copy_bytes_sent += before - there;
        written
    }

    fn write(&mut self, number: u16, from: u64, take: u64) -> Result<bool, LinkError> {
        let peer = self.ring.peer();
        if !peer.trusted() || peer.marks.taken(number).is_none_or(|taken| taken > from) {
            return Ok(false);
        }
        let mut at = from;
        while at < from + take {
            // Before each call: the number must still be that of the peer's process.
            self.look_for_death()?;
            let helping = self.helping.as_ref().filter(|_| self.dead.is_none());
            let Some(helping) = helping else { return Ok(false) };
            let Some(outgoing) = self.outgoing.get_mut(helping.key) else { return Ok(false) };
            let (left, to) = (from + take - at, &helping.to);
            // SAFETY: the poster keeps the pieces readable until done, and `outgoing` is open.
            match unsafe { copy::write_peer(self.pid, &outgoing.pieces, to, at, left) } {
                Ok(written) => at += written,
                Err(error) => {
                    // It may be read, and not written: a filter of system calls.
                    tracing::debug!(%error, "copies into the peer's memory fail");
                    self.may_help = false;
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}
