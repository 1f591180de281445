//! What the peer sends: reading the ring, and landing what it offers.
//!
//! Everything in a record is the peer's claim, and checked here before use. Whatever way a landing
//! goes, its operation is reported once: here when it ends well, by `kill` as long as it is in the
//! table, or by the error that `land` answers.

use std::io;

use smallvec::SmallVec;

use super::super::cells::RECORD_MAX;
use super::super::copy::{self, Cursor};
use super::super::wire::{
    ARENA, Fixed, INLINE_MAX, Kind, LOANS_MAX, LoanAt, OFFER_INLINE_MAX, PIECES_MAX, PULL_LEN,
    PULLS_MAX, Piece, Reader, filled_up, parse_flags,
};
use super::{INCOMING_MAX, ShmLink, protocol};
use crate::error::{ErrorKind, LinkError};
use crate::link::{
    Arrival, Budget, Disposition, HEAD_MAX, How, Landing, LinkKind, OpId, PayloadId, Post, RawView,
    Sink,
};
use crate::memory::PeerSlice;

/// Small payloads that arrived in the ring and wait to be landed.
const HELD_INLINE_MAX: usize = 1 << 17;

/// A payload of the peer's that we are not finished with.
pub(super) struct Incoming {
    /// The sender's key.
    pub(super) remote: u64,
    pub(super) len: u64,
    origin: Origin,
    pub(super) landing: Option<Progressing>,
}

/// Where an incoming payload lies.
enum Origin {
    Inline(Box<[u8]>),
    /// Empty once the driver has taken the views.
    Loan(SmallVec<[RawView; 2]>),
    Pull(SmallVec<[Piece; 4]>),
    List {
        addr: u64,
        count: usize,
    },
    Push,
}

pub(super) struct Progressing {
    pub(super) to: Landing,
    pub(super) op: OpId,
    into: Cursor,
    from: Cursor,
    pub(super) done: u64,
    /// From here on the sender has copied it.
    pub(super) end: u64,
    /// The memory may stay in use after the link's end.
    pub(super) lasting: bool,
    /// The sender has been asked to copy as well.
    pub(super) has_asked: bool,
    /// The rest comes through the peer's arena.
    pub(super) by_chunks: bool,
}

/// What one turn of a landing came to.
enum Turn {
    Finished,
    More,
    /// Asked for: chunks will come.
    Waiting,
}

/// What reading the ring came to.
#[derive(Clone, Copy)]
pub(super) struct Read {
    /// Something was there.
    pub moved: bool,
    /// Nothing was left; otherwise the budget ended.
    pub emptied: bool,
}

impl ShmLink {
    /// Reads records until the ring is empty or the budget ends.
    #[inline]
    pub(super) fn read_ring(
        &mut self,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<Read, LinkError> {
        let mut scratch = self.scratch.take().unwrap_or_else(|| Box::new([0; RECORD_MAX]));
        let read = self.read_records(&mut scratch, budget, sink);
        self.scratch = Some(scratch);
        read
    }

    fn read_records(
        &mut self,
        scratch: &mut [u8; RECORD_MAX],
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<Read, LinkError> {
        let mut moved = false;
        while budget.parcels > 0 && budget.bytes > 0 {
            let Some((flags, len)) = self.ring.pop(scratch)? else {
                return Ok(Read { moved, emptied: true });
            };
            budget.parcels -= 1;
            moved = true;
            self.take_record(flags, &scratch[..len], budget, sink)?;
        }
        Ok(Read { moved, emptied: false })
    }

    #[inline]
    fn take_record(
        &mut self,
        flags: u32,
        record: &[u8],
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        let Some((kind, how, head_len)) = parse_flags(flags) else {
            return Err(protocol("a record of unknown kind"));
        };
        if kind == Kind::Inline {
            return self.take_inline(how, head_len, record, budget, sink);
        }
        self.take_other(kind, how, head_len, record, budget, sink)
    }

    /// A record that is not head and payload.
    #[inline(never)]
    fn take_other(
        &mut self,
        kind: Kind,
        how: How,
        head_len: usize,
        record: &[u8],
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        let mut reader = Reader::new(record);
        let Some(fixed) = reader.fixed() else {
            return Err(protocol("a record that is too short"));
        };
        match kind {
            Kind::Finished => self.take_finished(fixed.id, sink),
            Kind::Ask => self.take_ask(fixed),
            Kind::Chunk => {
                let at = reader.loan().ok_or_else(|| protocol("a chunk without a place"))?;
                self.take_chunk(fixed.id, at, budget, sink)
            }
            Kind::Taken => self.take_taken(sink),
            Kind::Help => self.take_help(fixed, reader),
            Kind::Helped => self.take_helped(fixed),
            _ => self.take_offer(kind, how, head_len, fixed, reader, sink),
        }
    }

    #[inline]
    fn take_inline(
        &mut self,
        how: How,
        head_len: usize,
        record: &[u8],
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        if head_len > HEAD_MAX || filled_up(head_len) > record.len() {
            return Err(protocol("a head longer than its record"));
        }
        let (head, payload) = record.split_at(filled_up(head_len));
        let head = &head[..head_len];
        if payload.len() > INLINE_MAX || payload.len() as u64 > self.max_payload {
            return Err(protocol("an inline payload over the limit"));
        }
        if how == How::Offer && payload.len() > OFFER_INLINE_MAX {
            return Err(protocol("an offer that should not travel inline"));
        }
        budget.bytes = budget.bytes.saturating_sub(payload.len());
        self.counters.parcels_received += 1;
        self.counters.inline_bytes_received += payload.len() as u64;
        let key = PayloadId(self.incoming.next_key());
        let arrival = Arrival {
            head,
            len: payload.len() as u64,
            payload: key,
            inline: Some(payload),
            views: None,
            how,
        };
        match sink.parcel(arrival) {
            Disposition::Taken => Ok(()),
            other => self.dispose_of_inline(other, payload, sink),
        }
    }

    /// Does with a payload from the ring what the driver wants.
    #[inline(never)]
    fn dispose_of_inline(
        &mut self,
        disposition: Disposition,
        payload: &[u8],
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        match disposition {
            Disposition::Taken | Disposition::Discard | Disposition::View => Ok(()),
            Disposition::Land { to, op, .. } => {
                if let Err(error) = check_landing(&to, payload.len() as u64) {
                    sink.done(op, Err(error.clone()));
                    return Err(error);
                }
                // SAFETY: the driver keeps the landing writable until done; the source is private.
                unsafe {
                    copy::copy_in(&to, &mut Cursor::default(), payload.as_ptr(), payload.len());
                }
                sink.done(op, Ok(()));
                Ok(())
            }
            Disposition::Hold => {
                if self.held_inline == HELD_INLINE_MAX {
                    return Err(protocol("too many payloads wait to be landed"));
                }
                self.held_inline += 1;
                self.incoming.insert(Incoming {
                    remote: 0,
                    len: payload.len() as u64,
                    origin: Origin::Inline(payload.into()),
                    landing: None,
                });
                Ok(())
            }
            Disposition::Fatal(error) => Err(error),
        }
    }

    /// A parcel whose payload lies elsewhere.
    fn take_offer(
        &mut self,
        kind: Kind,
        how: How,
        head_len: usize,
        fixed: Fixed,
        mut reader: Reader<'_>,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        if fixed.len == 0 || fixed.len > self.max_payload {
            return Err(protocol(format!(
                "a payload of {} bytes, the limit is {}",
                fixed.len, self.max_payload
            )));
        }
        if self.incoming.len() - self.held_inline >= INCOMING_MAX {
            return Err(protocol("too many payloads open"));
        }
        let mut origin = self.read_origin(kind, fixed, &mut reader)?;
        let Some(head) = reader.head(head_len) else {
            return Err(protocol("a head that does not fill its record"));
        };
        let views = match &mut origin {
            Origin::Loan(views) => {
                self.counters.loaned_bytes_received += fixed.len;
                Some(views)
            }
            _ => None,
        };
        self.counters.parcels_received += 1;
        let key = self.incoming.next_key();
        let arrival =
            Arrival { head, len: fixed.len, payload: PayloadId(key), inline: None, views, how };
        let disposition = sink.parcel(arrival);
        let incoming = Incoming { remote: fixed.id, len: fixed.len, origin, landing: None };
        self.incoming.insert(incoming);
        match disposition {
            Disposition::Land { to, op, lasting } => {
                self.start_landing(key, to, op, lasting).inspect_err(|error| {
                    sink.done(op, Err(error.clone()));
                })
            }
            Disposition::View | Disposition::Hold => Ok(()),
            Disposition::Taken | Disposition::Discard => self.let_go(key),
            Disposition::Fatal(error) => Err(error),
        }
    }

    fn read_origin(
        &mut self,
        kind: Kind,
        fixed: Fixed,
        reader: &mut Reader<'_>,
    ) -> Result<Origin, LinkError> {
        let truncated = || protocol("a record that is too short for its descriptors");
        let count = usize::try_from(fixed.count).unwrap_or(usize::MAX);
        match kind {
            Kind::Loan if self.loans && count <= LOANS_MAX => {
                let mut views = SmallVec::new();
                let mut left = fixed.len;
                for _ in 0..count {
                    let at = reader.loan().ok_or_else(truncated)?;
                    left = left.checked_sub(at.len).ok_or_else(sums_up_wrong)?;
                    let PeerSlice { ptr, len, keep } = self.peer_slice(at)?;
                    views.push(RawView { ptr, len, keep });
                }
                if left != 0 { Err(sums_up_wrong()) } else { Ok(Origin::Loan(views)) }
            }
            Kind::Pull if count <= PULLS_MAX => {
                let mut pieces = SmallVec::new();
                for _ in 0..count {
                    pieces.push(reader.piece().ok_or_else(truncated)?);
                }
                check_pieces(&pieces, fixed.len)?;
                Ok(Origin::Pull(pieces))
            }
            Kind::PullList if count <= PIECES_MAX => {
                let list = reader.piece().ok_or_else(truncated)?;
                Ok(Origin::List { addr: list.addr, count })
            }
            Kind::Push => Ok(Origin::Push),
            _ => Err(protocol("more descriptors than a record may have")),
        }
    }

    /// Finishes with a payload without landing it.
    pub(super) fn let_go(&mut self, key: u64) -> Result<(), LinkError> {
        let Some(incoming) = self.incoming.remove(key) else {
            return Ok(());
        };
        if matches!(incoming.origin, Origin::Inline(_)) {
            self.held_inline -= 1;
            return Ok(());
        }
        self.push_finished(incoming.remote)
    }

    pub(super) fn start_landing(
        &mut self,
        key: u64,
        to: Landing,
        op: OpId,
        lasting: bool,
    ) -> Result<(), LinkError> {
        let Some(incoming) = self.incoming.get_mut(key) else {
            return Err(LinkError::new(
                ErrorKind::InvalidInput,
                LinkKind::Shm,
                "a landing of a payload that is not open",
            ));
        };
        check_landing(&to, incoming.len)?;
        if incoming.landing.is_some() {
            return Err(LinkError::new(
                ErrorKind::InvalidInput,
                LinkKind::Shm,
                "a second landing of one payload",
            ));
        }
        let (into, from) = (Cursor::default(), Cursor::default());
        let end = incoming.len;
        incoming.landing = Some(Progressing {
            to,
            op,
            into,
            from,
            done: 0,
            end,
            lasting,
            has_asked: false,
            by_chunks: false,
        });
        self.landing.push_back(key);
        self.attention = true;
        Ok(())
    }

    /// The first turn of a landing, within the call that asks for it.
    pub(super) fn land_at_once(&mut self, key: u64) -> Result<Post, LinkError> {
        let mut budget = Budget::TURN;
        loop {
            match self.land_turn(key, &mut budget)? {
                Turn::Finished => {
                    self.finish_landing(key)?;
                    return Ok(Post::Done);
                }
                Turn::More if budget.bytes > 0 => {}
                Turn::More => {
                    self.landing.push_back(key);
                    return Ok(Post::Pending);
                }
                Turn::Waiting => return Ok(Post::Pending),
            }
        }
    }

    /// Works on the landings, in turns, within the budget.
    pub(super) fn land_turns(
        &mut self,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<bool, LinkError> {
        let mut moved = false;
        while budget.bytes > 0 {
            let Some(key) = self.landing.pop_front() else {
                break;
            };
            moved = true;
            match self.land_turn(key, budget) {
                Ok(Turn::Finished) => {
                    if let Some(op) = self.finish_landing(key)? {
                        sink.done(op, Ok(()));
                    }
                }
                Ok(Turn::More) => self.landing.push_back(key),
                Ok(Turn::Waiting) => {}
                Err(error) => {
                    // `kill` reports the operation.
                    self.landing.push_front(key);
                    return Err(error);
                }
            }
        }
        Ok(moved)
    }

    /// Ends a landing; whoever gets the operation reports it. On an error the landing stays, so
    /// that `kill` reports it.
    fn finish_landing(&mut self, key: u64) -> Result<Option<OpId>, LinkError> {
        let Some(incoming) = self.incoming.get_mut(key) else {
            return Ok(None);
        };
        let by_chunks = incoming.landing.as_ref().is_some_and(|landing| landing.by_chunks);
        let remote = incoming.remote;
        match incoming.origin {
            Origin::Inline(_) => self.held_inline -= 1,
            // The sender knows by the last chunk taken.
            _ if by_chunks => {}
            _ => self.push_finished(remote)?,
        }
        let landing = self.incoming.remove(key).and_then(|incoming| incoming.landing);
        Ok(landing.map(|landing| landing.op))
    }

    fn land_turn(&mut self, key: u64, budget: &mut Budget) -> Result<Turn, LinkError> {
        let Some(incoming) = self.incoming.get_mut(key) else {
            return Ok(Turn::Waiting);
        };
        let Some(landing) = &mut incoming.landing else {
            return Ok(Turn::Waiting);
        };
        match &incoming.origin {
            Origin::Inline(bytes) => {
                // SAFETY: the driver keeps the landing writable until done; the source is ours.
                unsafe {
                    copy::copy_in(&landing.to, &mut landing.into, bytes.as_ptr(), bytes.len());
                }
                budget.bytes = budget.bytes.saturating_sub(bytes.len());
                Ok(Turn::Finished)
            }
            Origin::Loan(views) => {
                while let Some(slice) = views.get(landing.from.index()).filter(|_| budget.bytes > 0)
                {
                    let offset = landing.from.offset();
                    let len = (slice.len - offset).min(budget.bytes);
                    // SAFETY: the driver keeps the landing writable until done. The source lies in
                    // a mapping that `slice` keeps, and `offset + len <= slice.len`.
                    unsafe {
                        copy::copy_in(&landing.to, &mut landing.into, slice.ptr.add(offset), len);
                    }
                    copy::advance(&mut landing.from, len, |at| views.get(at).map(|s| s.len));
                    landing.done += len as u64;
                    budget.bytes -= len;
                }
                if !self.ring.peer().trusted() {
                    return Err(self.gone("ended the link"));
                }
                Ok(if landing.done == incoming.len { Turn::Finished } else { Turn::More })
            }
            Origin::Push => self.ask(key),
            Origin::Pull(_) | Origin::List { .. } if !self.may_pull => self.ask(key),
            Origin::List { addr, count } => {
                let (addr, count) = (*addr, *count);
                self.read_list(key, addr, count)
            }
            Origin::Pull(_) => self.pull_turn(key, budget),
        }
    }

    /// Reads the list of a payload's pieces out of the sender's memory.
    fn read_list(&mut self, key: u64, addr: u64, count: usize) -> Result<Turn, LinkError> {
        let mut bytes = vec![0; count * PULL_LEN];
        if let Err(error) = copy::read_peer_bytes(self.pid, addr, &mut bytes) {
            return self.pull_failed(key, &error);
        }
        self.look_for_death()?;
        self.check_alive()?;
        let Some(incoming) = self.incoming.get_mut(key) else {
            return Ok(Turn::Waiting);
        };
        let mut reader = Reader::new(&bytes);
        let pieces: SmallVec<[Piece; 4]> = std::iter::from_fn(|| reader.piece()).collect();
        check_pieces(&pieces, incoming.len)?;
        incoming.origin = Origin::Pull(pieces);
        Ok(Turn::More)
    }

    fn pull_turn(&mut self, key: u64, budget: &mut Budget) -> Result<Turn, LinkError> {
        self.seek_help(key)?;
        let mut copied = 0;
        loop {
            let Some((done, end)) = self.reach_of(key) else { return Ok(Turn::Waiting) };
            if budget.bytes == 0 {
                break;
            }
            let Some(take) = self.take_on(key, done, end, budget.bytes as u64) else { break };
            let Some(incoming) = self.incoming.get_mut(key) else {
                return Ok(Turn::Waiting);
            };
            let (Origin::Pull(pieces), Some(landing)) = (&incoming.origin, &mut incoming.landing)
            else {
                return Ok(Turn::Waiting);
            };
            let limit = take as usize;
            #[cfg(test)]
            let limit = self.deny_pull_after.map_or(limit, |after| {
                limit.min(after.saturating_sub(landing.done).max(1) as usize)
            });
            #[cfg(test)]
            let denied = self.deny_pull_after.is_some_and(|after| landing.done >= after);
            #[cfg(not(test))]
            let denied = false;
            let read = if denied {
                Err(io::Error::from_raw_os_error(libc::EPERM))
            } else {
                // SAFETY: the driver keeps the landing writable until done.
                unsafe {
                    copy::read_peer(
                        self.pid,
                        pieces,
                        &mut landing.from,
                        &landing.to,
                        &mut landing.into,
                        limit,
                    )
                }
            };
            match read {
                Ok(read) => {
                    landing.done += read as u64;
                    budget.bytes -= read;
                    copied += read as u64;
                }
                Err(error) => return self.pull_failed(key, &error),
            }
        }
        // A number may be reused by another process: what was read counts only if the peer lives.
        self.check_trusted()?;
        self.look_for_death()?;
        self.check_alive()?;
        self.counters.single_copy_bytes_received += copied;
        let Some((done, end)) = self.reach_of(key) else { return Ok(Turn::Waiting) };
        if budget.bytes == 0 && done < end {
            return Ok(Turn::More);
        }
        let Some(end) = self.close_help(key, end) else { return Ok(Turn::Waiting) };
        let Some(incoming) = self.incoming.get_mut(key) else { return Ok(Turn::Waiting) };
        let Some(landing) = &mut incoming.landing else { return Ok(Turn::Waiting) };
        landing.end = end;
        if done < end {
            return Ok(Turn::More);
        }
        self.counters.single_copy_bytes_received += incoming.len - done;
        Ok(Turn::Finished)
    }

    /// How much of a landing is there, and where what this side copies ends.
    fn reach_of(&mut self, key: u64) -> Option<(u64, u64)> {
        let landing = self.incoming.get_mut(key)?.landing.as_ref()?;
        Some((landing.done, landing.end))
    }

    /// Permission may vanish at any time: then this payload comes through the arena from here on.
    fn pull_failed(&mut self, key: u64, error: &io::Error) -> Result<Turn, LinkError> {
        self.look_for_death()?;
        self.check_alive()?;
        match error.raw_os_error() {
            Some(libc::EPERM | libc::ENOSYS) => self.ask(key),
            Some(libc::ESRCH) => Err(self.gone("has ended")),
            Some(libc::EFAULT) => Err(protocol("an address where the peer has no memory")),
            _ => Err(LinkError::io(LinkKind::Shm, "reading the peer's memory", error)),
        }
    }

    fn ask(&mut self, key: u64) -> Result<Turn, LinkError> {
        // The sender does one or the other.
        if self.close_help(key, 0).is_none() {
            return Ok(Turn::Waiting);
        }
        let Some(incoming) = self.incoming.get_mut(key) else {
            return Ok(Turn::Waiting);
        };
        let Some(landing) = &mut incoming.landing else {
            return Ok(Turn::Waiting);
        };
        landing.by_chunks = true;
        let fixed = Fixed { id: incoming.remote, len: landing.done, count: key };
        self.push_fixed(Kind::Ask, fixed)?;
        Ok(Turn::Waiting)
    }

    fn take_chunk(
        &mut self,
        key: u64,
        at: LoanAt,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        if at.segment & ARENA == 0 {
            return Err(protocol("a chunk outside the arena"));
        }
        let slice = self.peer_slice(at)?;
        let unasked = || protocol("a chunk that nobody asked for");
        let incoming = self.incoming.get_mut(key).ok_or_else(unasked)?;
        let landing =
            incoming.landing.as_mut().filter(|landing| landing.by_chunks).ok_or_else(unasked)?;
        if at.len == 0 || at.len > incoming.len - landing.done {
            return Err(protocol("a chunk that is too long"));
        }
        // SAFETY: the driver keeps the landing writable until done; `slice` keeps the mapping.
        unsafe { copy::copy_in(&landing.to, &mut landing.into, slice.ptr, slice.len) };
        landing.done += at.len;
        budget.bytes = budget.bytes.saturating_sub(slice.len);
        self.counters.arena_bytes_received += at.len;
        let finished = landing.done == incoming.len;
        self.check_trusted()?;
        self.push_fixed(Kind::Taken, Fixed { id: 0, len: 0, count: 0 })?;
        if finished && let Some(op) = self.finish_landing(key)? {
            sink.done(op, Ok(()));
        }
        Ok(())
    }
}

fn sums_up_wrong() -> LinkError {
    protocol("descriptors that do not add up to the payload")
}

pub(super) fn check_pieces(pieces: &[Piece], len: u64) -> Result<(), LinkError> {
    let mut left = len;
    for piece in pieces {
        left = left.checked_sub(piece.len).ok_or_else(sums_up_wrong)?;
    }
    if left == 0 { Ok(()) } else { Err(sums_up_wrong()) }
}

/// The lengths of a landing must add up, or a copy would end early.
fn check_landing(to: &Landing, len: u64) -> Result<(), LinkError> {
    let sum = to.iter().map(|segment| segment.len as u64).sum::<u64>();
    if sum == len && to.iter().all(|segment| segment.kind.cpu_accessible()) {
        return Ok(());
    }
    Err(LinkError::new(
        ErrorKind::InvalidInput,
        LinkKind::Shm,
        format!("a landing of {sum} bytes for a payload of {len}"),
    ))
}
