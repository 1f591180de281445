//! Long payloads, which wait at their sender until the receiver fetches them: by reading the
//! sender's memory, or where one of the two sides has not registered its memory, in chunks that
//! the sender copies into messages. The reads of one payload may go by several rails at a time; it
//! is there when all of them have ended.

use std::collections::VecDeque;

use smallvec::SmallVec;

use super::blob::RAILS_MAX;
use super::queues::Rdma;
use super::registrations::{Held, Registrations};
use super::wire::Piece;
use crate::link::OpId;
use crate::link::chunks::{self, Filling};

/// How much of a payload may be on its way in chunks, in bytes.
const WINDOW_BYTES: usize = 256 << 10;
/// The longest single read, in bytes.
pub(super) const READ_BYTES_MAX: usize = 256 << 10;
/// Payloads of this many bytes or more may be read by all rails. A read takes some microseconds to
/// begin with, and there are at most a few in shorter ones: they would gain little.
pub(super) const STRIPE_BYTES_MIN: usize = 1 << 20;
/// The set of the first rail, by which everything may be read.
pub(super) const FIRST: u8 = 1;

/// A payload that the peer may fetch, with what it may read: registered until it lets go.
pub(super) type Outgoing = chunks::Outgoing<SmallVec<[Held; 1]>>;
/// What the peer may fetch, and what of it can be sent.
pub(super) type Outgoings = chunks::Outgoings<SmallVec<[Held; 1]>>;

/// A read to be posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Read {
    pub rail: usize,
    pub to: *mut u8,
    pub local_key: u32,
    pub from: u64,
    pub remote_key: u32,
    pub bytes: u32,
    /// Which of its payload's slices it lands in.
    pub slice: u64,
    /// Its keys, local and remote, for the first rail.
    pub first_keys: (u32, u32),
}

// SAFETY: the pointer says where the bytes go, in a landing that the driver keeps; it is not tied to
// a thread.
unsafe impl Send for Read {}

impl Read {
    /// The same by the first rail.
    pub fn by_first(self) -> Read {
        let (local_key, remote_key) = self.first_keys;
        Read { rail: 0, local_key, remote_key, ..self }
    }

    pub fn rdma(&self) -> Rdma {
        let Read { to, local_key, from, remote_key, bytes, .. } = *self;
        let (writes, inline, local, remote) = (false, false, to, from);
        Rdma { writes, local, local_key, bytes, remote, remote_key, inline }
    }
}

/// What is to be done next for a payload that is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// This memory is to be registered, or the beginning of it. The first rail has room for a read
    /// of it.
    Register {
        ptr: *const u8,
        bytes: usize,
    },
    Read(Read),
    /// Every rail that it may be read by has enough to do.
    Wait,
    /// Nothing: all is posted, or what was posted has to end first.
    Nothing,
}

/// What the end of a read leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// Everything has come.
    Nothing,
    /// More is to come.
    More,
    /// Memory could not be registered, and no read is under way: all of it is to come in chunks.
    All,
}

/// Registered memory that reads land in.
pub(super) struct Ready {
    /// By rail; none where it is not registered with the device of that one.
    pub keys: [Option<u32>; RAILS_MAX],
    /// What the keys are of.
    pub held: SmallVec<[Held; 1]>,
}

impl Ready {
    /// The rails whose devices know it.
    fn rails(&self) -> u8 {
        let known = |rail: &usize| self.keys[*rail].is_some();
        (0..RAILS_MAX).filter(known).fold(0, |rails, rail| rails | 1 << rail)
    }
}

/// A part of a segment of the landing that is registered.
struct Slice {
    ready: Ready,
    segment: usize,
    /// Within the segment.
    end: usize,
    /// What its reads call it by.
    number: u64,
    /// Its reads, by whatever rails.
    under_way: u32,
}

impl Slice {
    fn is_read(&self) -> bool {
        self.under_way > 0
    }
}

/// A payload that is being landed by reading the peer's memory.
struct Reading {
    pieces: Vec<Piece>,
    /// Those by which the peer's memory may be read.
    rails: u8,
    /// The piece that the next read begins in, and how far into it.
    from: (usize, u64),
    /// Those with reads under way, and the one that the next read goes to.
    slices: VecDeque<Slice>,
    /// The number of the next one.
    next_slice: u64,
    /// No more memory can be registered.
    refused: bool,
}

impl Reading {
    /// Lets go of what has been filled, also behind what a slow rail is still at. The last one stays.
    fn let_go(&mut self) {
        let mut behind = self.slices.len();
        self.slices.retain(|slice| {
            behind -= 1;
            behind == 0 || slice.is_read()
        });
    }
}

/// Sets of further rails that there are.
const SETS: usize = 1 << (RAILS_MAX - 1);

/// Payloads with reads left to post, each in its turn among those for whose next read there is room:
/// those that may use the same rails stand in one queue, so that none is looked at in vain.
#[derive(Default)]
pub(super) struct Turns {
    /// By the set of further rails: numbers of payloads, each with the turn that it came at.
    queues: [VecDeque<(u64, u32)>; SETS],
    next_turn: u64,
}

impl Turns {
    /// `usable`: see [`Incoming::usable`].
    pub fn push(&mut self, id: u32, usable: u8) {
        let at = usize::from(usable >> 1) % SETS;
        self.queues[at].push_back((self.next_turn, id));
        self.next_turn += 1;
    }

    /// Whose turn it is where these rails have room.
    pub fn pop(&mut self, room: u8) -> Option<u32> {
        let fits = |set: usize| (FIRST | (set as u8) << 1) & room != 0;
        let first = |(_, queue): &(usize, &mut VecDeque<(u64, u32)>)| queue.front().copied();
        let queues = self.queues.iter_mut().enumerate().filter(|(set, _)| fits(*set));
        let (_, queue) =
            queues.min_by_key(|queue| first(queue).map_or(u64::MAX, |(turn, _)| turn))?;
        queue.pop_front().map(|(_, id)| id)
    }
}

/// A payload that is being landed.
pub(super) struct Incoming {
    pub op: OpId,
    /// What has come in chunks, or what reads have been posted for.
    filling: Filling,
    reading: Option<Reading>,
}

impl Incoming {
    pub fn new(op: OpId, filling: Filling) -> Incoming {
        Incoming { op, filling, reading: None }
    }

    /// Where it goes.
    pub fn segments(&self) -> SmallVec<[(*const u8, usize); 2]> {
        self.filling.segments()
    }

    /// It is to be read: `pieces` come to its length. `rails`: those that they have keys for.
    pub fn read_from(&mut self, pieces: Vec<Piece>, rails: u8) {
        let (from, slices, next_slice) = ((0, 0), VecDeque::new(), 0);
        let reading = Reading { pieces, rails, from, slices, next_slice, refused: false };
        self.reading = Some(reading);
    }

    /// The rails that its memory at the peer may be read by.
    pub fn rails(&self) -> u8 {
        self.reading.as_ref().map_or(0, |reading| reading.rails)
    }

    /// The rails that its next read may go by. Where memory is to be registered before, that is the
    /// first one: whatever other devices make of it, that one can read what is registered, so that
    /// nothing is registered which would have to wait.
    pub fn usable(&self) -> u8 {
        let (segment, offset) = self.filling.at();
        let Some(reading) = &self.reading else { return FIRST };
        let slice = reading.slices.back();
        match slice.filter(|slice| slice.segment == segment && slice.end > offset) {
            Some(slice) => reading.rails & slice.ready.rails(),
            None => FIRST,
        }
    }

    /// What is to be done next. A read that is named counts as posted. `pick` says which of some
    /// rails it goes by, if any.
    pub fn next_read(&mut self, pick: impl FnOnce(u8) -> Option<usize>) -> Next {
        let picked = pick(self.usable());
        let (segment, offset) = self.filling.at();
        let Some(reading) = self.reading.as_mut().filter(|reading| !reading.refused) else {
            return Next::Nothing;
        };
        let place = self.filling.next_piece();
        let (Some((to, room)), Some(piece)) = (place, reading.pieces.get(reading.from.0)) else {
            return Next::Nothing;
        };
        let goes_on = |slice: &&mut Slice| slice.segment == segment && slice.end > offset;
        let Some(slice) = reading.slices.back_mut().filter(goes_on) else {
            return match picked {
                Some(_) => Next::Register { ptr: to, bytes: room },
                None => Next::Wait,
            };
        };
        let keyed = picked.and_then(|rail| Some((rail, slice.ready.keys[rail]?)));
        let Some((rail, local_key)) = keyed else { return Next::Wait };
        let there = usize::try_from(piece.len - reading.from.1).unwrap_or(usize::MAX);
        let bytes = there.min(slice.end - offset).min(READ_BYTES_MAX);
        let read = Read {
            rail,
            to,
            local_key,
            from: piece.address + reading.from.1,
            remote_key: piece.keys[rail],
            bytes: bytes as u32,
            slice: slice.number,
            first_keys: (slice.ready.keys[0].unwrap_or(local_key), piece.keys[0]),
        };
        slice.under_way += 1;
        self.filling.advance(bytes);
        reading.from.1 += bytes as u64;
        if reading.from.1 == piece.len {
            reading.from = (reading.from.0 + 1, 0);
        }
        Next::Read(read)
    }

    /// What was to be registered is, as far as this.
    pub fn registered(&mut self, ready: Ready, bytes: usize) {
        let (segment, offset) = self.filling.at();
        if let Some(reading) = &mut self.reading {
            let (end, number) = (offset + bytes, reading.next_slice);
            reading.next_slice += 1;
            reading.slices.push_back(Slice { ready, segment, end, number, under_way: 0 });
            reading.let_go();
        }
    }

    /// What was to be registered cannot be.
    pub fn refused(&mut self) -> Left {
        if let Some(reading) = &mut self.reading {
            reading.refused = true;
        }
        self.left()
    }

    /// Lets go of what is registered there, where no read goes any more.
    pub fn let_go(&mut self, there: &Registrations) {
        let slices = self.reading.iter_mut().flat_map(|reading| &mut reading.slices);
        slices.for_each(|slice| slice.ready.held.retain(|held| !held.is_of(there)));
    }

    /// Whether there is more to be read.
    pub fn wants_reads(&self) -> bool {
        self.reading.as_ref().is_some_and(|reading| !reading.refused) && !self.is_over()
    }

    /// One of the reads into this slice has ended.
    pub fn read_ended(&mut self, slice: u64) -> Left {
        if let Some(reading) = &mut self.reading {
            if let Some(its) = reading.slices.iter_mut().find(|known| known.number == slice) {
                its.under_way = its.under_way.saturating_sub(1);
            }
            reading.let_go();
        }
        self.left()
    }

    fn left(&mut self) -> Left {
        let Some(reading) = &self.reading else { return Left::More };
        match reading.slices.iter().any(Slice::is_read) {
            false if self.filling.is_full() => Left::Nothing,
            false if reading.refused => {
                self.reading = None;
                self.filling.start_again();
                Left::All
            }
            _ => Left::More,
        }
    }

    /// Grants the peer more chunks. `None`: that would be too little to be worth it.
    pub fn grant(&mut self) -> Option<u64> {
        if self.reading.is_some() || !self.filling.wants(WINDOW_BYTES) {
            return None;
        }
        self.filling.grant(WINDOW_BYTES, usize::MAX)?;
        Some(self.filling.granted() as u64)
    }

    pub fn is_over(&self) -> bool {
        self.filling.is_full()
    }

    /// Whether a chunk of this length may come now.
    pub fn expects(&self, offset: u64, len: usize) -> bool {
        self.reading.is_none() && self.filling.expects(offset, len)
    }

    /// Takes a chunk.
    ///
    /// # Safety
    ///
    /// It is expected; the landing is alive.
    pub unsafe fn take(&mut self, from: &[u8]) {
        // SAFETY: the caller's promise.
        unsafe { self.filling.take(from.as_ptr(), from.len()) };
    }
}
