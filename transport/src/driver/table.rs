//! The operations in flight.
//!
//! An operation gets a slot when it cannot finish at once. While its `Op` lives, the `Op` owns the
//! buffer and the slot only remembers where it is; when the `Op` is dropped early, the buffer
//! moves into the slot (the one allocation) and stays until the terminal completion. Ids carry a
//! generation, so a late completion of a past operation finds nothing.

use std::any::Any;
use std::task::Waker;

use crate::error::Error;
use crate::link::{OpId, Segment, SegmentMut};
use crate::memory::{MemoryKind, Region};
use crate::message::{Frame, Message};

use super::keys::RegionUse;

/// Where an operation stands.
#[derive(Debug)]
pub(crate) enum Stage {
    /// Waits in a queue of this endpoint: for credit, for room, for a match. No link knows of it.
    Queued,
    /// A link, or the peer, is at work on it and may touch its memory.
    Posted,
    /// Over; the result has not been fetched.
    Done(Result<(), Error>),
}

/// Memory of an operation, as remembered by its slot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawSegment {
    pub ptr: *mut u8,
    pub len: usize,
    pub kind: MemoryKind,
}

// SAFETY: a description. The operation (or its slot) owns the memory; links dereference it only
// between post and done.
unsafe impl Send for RawSegment {}

impl From<Region> for RawSegment {
    fn from(region: Region) -> Self {
        RawSegment { ptr: region.as_mut_ptr(), len: region.len_bytes(), kind: region.kind() }
    }
}

impl RawSegment {
    pub fn read(&self) -> Segment<'static> {
        Segment { ptr: self.ptr, len: self.len, kind: self.kind, shared: None }
    }

    /// The first `len` bytes, for writing.
    pub fn write(&self, len: usize) -> SegmentMut {
        debug_assert!(len <= self.len);
        SegmentMut { ptr: self.ptr, len, kind: self.kind }
    }

    /// Copies `from` to the start of this memory.
    ///
    /// # Safety
    ///
    /// The operation that owns the memory is alive in its `Op` or slot, nothing else uses the
    /// memory, and `from` is not longer.
    pub unsafe fn fill(&self, from: &[u8]) {
        debug_assert!(from.len() <= self.len);
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.ptr, from.len()) };
    }

    /// The first `len` bytes, copied into driver memory.
    ///
    /// # Safety
    ///
    /// As [`RawSegment::fill`]; `len` bytes are initialised and within the memory.
    pub unsafe fn copy_out(&self, to: &mut [u8]) {
        debug_assert!(to.len() <= self.len);
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(self.ptr, to.as_mut_ptr(), to.len()) };
    }
}

/// A tagged payload that has met its receive.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matched {
    pub seq: u32,
    pub tag: u64,
    pub len: usize,
}

/// What an operation is.
pub(crate) enum What {
    /// A message on its way out; boxed, so that its inline frames have an address.
    Send { message: Option<Box<Message>>, cost: u64 },
    /// A receive that waits for a message.
    Recv,
    /// A message that a link is landing.
    LandMessage { seq: u32, message: Box<Message> },
    /// A tagged send.
    TagSend { from: RawSegment, tag: u64 },
    /// A tagged receive, posted or landing.
    TagRecv {
        to: RawSegment,
        matched: Option<Matched>,
        /// The slot whose landing this receive waits for, if it is not landing itself.
        behind: Option<OpId>,
        /// The receive that gets the bytes when they have landed here and this one is abandoned.
        heir: Option<OpId>,
    },
    /// An unexpected eager payload that a link is landing in driver memory.
    LandTag { seq: u32, buffer: Box<Frame>, heir: Option<OpId> },
    /// A put: over when the link has let go and the target has answered; a direct one when the
    /// link says so.
    Put {
        from: RawSegment,
        key: u64,
        offset: u64,
        number: u64,
        local: bool,
        remote: bool,
        direct: bool,
    },
    /// The peer's put that a link is landing in a region.
    PutIn { id: u32, used: RegionUse },
    /// A get that waits for, or is landing, the answer; a direct one is the link's. One that was
    /// withdrawn since it was asked for has no memory any more, and the answer goes nowhere.
    Get {
        to: Option<RawSegment>,
        len: usize,
        key: u64,
        offset: u64,
        number: u64,
        answered: bool,
        direct: bool,
    },
    /// The answer to the peer's get on its way out of a region.
    GetOut { _used: RegionUse },
    /// A fence: over when earlier one-sided operations are, and the peer has answered.
    Fence { before: u64, remote: bool },
}

pub(crate) struct Slot {
    pub stage: Stage,
    pub what: What,
    pub waker: Option<Waker>,
    /// The `Op` is gone: free the slot when the operation is over.
    pub abandoned: bool,
    /// The buffer of an abandoned operation.
    pub orphan: Option<Box<dyn Any + Send>>,
}

impl Slot {
    pub fn new(stage: Stage, what: What) -> Self {
        Slot { stage, what, waker: None, abandoned: false, orphan: None }
    }
}

#[derive(Default)]
pub(crate) struct Table {
    slots: slab::Slab<(u32, Slot)>,
    generation: u32,
}

impl Table {
    /// The id that the next insert will give.
    pub fn next_id(&self) -> OpId {
        OpId { index: self.slots.vacant_key() as u32, generation: self.generation.wrapping_add(1) }
    }

    pub fn insert(&mut self, slot: Slot) -> OpId {
        self.generation = self.generation.wrapping_add(1);
        let index = self.slots.insert((self.generation, slot)) as u32;
        OpId { index, generation: self.generation }
    }

    #[inline]
    pub fn get(&mut self, id: OpId) -> Option<&mut Slot> {
        match self.slots.get_mut(id.index as usize) {
            Some((generation, slot)) if *generation == id.generation => Some(slot),
            _ => None,
        }
    }

    /// The operation at this index now, for ids that travelled to the peer and back.
    pub fn at_index(&mut self, index: u32) -> Option<OpId> {
        let (generation, _) = self.slots.get(index as usize)?;
        Some(OpId { index, generation: *generation })
    }

    pub fn remove(&mut self, id: OpId) -> Option<Slot> {
        self.get(id)?;
        Some(self.slots.remove(id.index as usize).1)
    }

    /// The result of an operation that is over, and its slot, which is free then.
    pub fn take_result(&mut self, id: OpId) -> Option<(Result<(), Error>, Slot)> {
        match self.get(id) {
            Some(Slot { stage: Stage::Done(_), .. }) => {}
            _ => return None,
        }
        let mut slot = self.remove(id)?;
        let stage = std::mem::replace(&mut slot.stage, Stage::Queued);
        let Stage::Done(result) = stage else { return None };
        Some((result, slot))
    }

    pub fn ids(&self) -> Vec<OpId> {
        self.slots
            .iter()
            .map(|(index, (generation, _))| OpId { index: index as u32, generation: *generation })
            .collect()
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether a link or the peer is at work on something that this side sends of its own accord.
    pub fn any_posted_send(&self) -> bool {
        self.slots.iter().any(|(_, (_, slot))| {
            matches!(slot.stage, Stage::Posted)
                && matches!(slot.what, What::Send { .. } | What::TagSend { .. })
        })
    }
}
