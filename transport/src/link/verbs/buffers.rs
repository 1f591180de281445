//! The buffers of one link: which it has, which of them are posted, and how many it wants.
//!
//! A link begins with few, since most links of a cluster are idle, and takes more from the device's
//! pool while they are needed. Buffers to receive into are numbered from 0, those to send from after
//! them, those for puts and gets last; so a number says what a buffer is for. What is posted to
//! receive into cannot be had back before a message fills it. So a link that wants fewer does not
//! post again what messages leave, and a block that is no more in use goes back.

use std::io;
use std::sync::Arc;

use super::pool::{BLOCK, Block, Pool};

/// Buffers for the peer's messages, at most.
pub(super) const RECEIVES: usize = 64;
/// And in the beginning.
pub(super) const RECEIVES_FIRST: usize = 24;
/// Messages of this side's that may be under way.
pub(super) const SENDS: usize = 32;
/// Buffers that short puts and gets go by, and the one that the peer's beacon is read into.
pub(super) const REACH_BUFFERS: usize = BLOCK;
/// All of them.
const ALL: usize = RECEIVES + SENDS + REACH_BUFFERS;
const _: () = assert!(
    RECEIVES == u64::BITS as usize
        && SENDS == u32::BITS as usize
        && RECEIVES_FIRST.is_multiple_of(BLOCK)
);

/// After so many messages before which the peer had not to wait, a link wants a block less to receive
/// into. After so many that were sent, it looks whether it needed the last block.
const CALM: u32 = 256;

/// See the module.
pub(super) struct Buffers {
    pool: Arc<Pool>,
    blocks: [Option<Block>; ALL / BLOCK],
    /// Those that are the device's to receive into, or hold a message that is not dealt with.
    posted: u64,
    /// Those below this number are posted again.
    wanted: usize,
    /// Messages since the last one that had to wait for credit.
    calm: u32,
    wants_more: bool,
    /// Those that can be sent from.
    free: u32,
    /// How many there are to send from, and how many at most were in use since it was last looked.
    sends: usize,
    peak: usize,
    sent: u32,
    /// The pool had none: it is not asked before so many messages have come or were sent.
    refused: u32,
}

impl Buffers {
    /// Takes those that a link begins with.
    pub fn new(pool: &Arc<Pool>) -> io::Result<Buffers> {
        let mut buffers = Buffers {
            pool: pool.clone(),
            blocks: [const { None }; ALL / BLOCK],
            posted: 0,
            wanted: RECEIVES_FIRST,
            calm: 0,
            wants_more: false,
            free: 0,
            sends: 0,
            peak: 0,
            sent: 0,
            refused: 0,
        };
        let held = (0..RECEIVES_FIRST).step_by(BLOCK).try_for_each(|index| buffers.hold(index));
        match held.and_then(|()| buffers.more_sends()) {
            Ok(()) => Ok(buffers),
            Err(error) => {
                // Nothing is posted yet.
                buffers.end();
                Err(error)
            }
        }
    }

    /// Makes sure that the block of this buffer is here. The pool is not asked again soon if it had
    /// none: it would ask the kernel each time.
    fn hold(&mut self, index: usize) -> io::Result<()> {
        let block = &mut self.blocks[index / BLOCK];
        if block.is_some() {
            return Ok(());
        }
        if self.refused > 0 {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let taken = self.pool.take().inspect_err(|_| self.refused = CALM)?;
        *block = Some(taken);
        Ok(())
    }

    /// Nobody uses the block of this buffer any more.
    fn let_go(&mut self, index: usize) {
        if let Some(block) = self.blocks[index / BLOCK].take() {
            put_back(&self.pool, block);
        }
    }

    /// Where a buffer begins, and its key. `None`: it is not here.
    pub fn at(&self, index: usize) -> Option<(*mut u8, u32)> {
        let block = self.blocks.get(index / BLOCK)?.as_ref()?;
        Some((block.buffer(index % BLOCK), block.key()))
    }

    /// Where a message has come. `None`: nothing was posted under this number.
    pub fn received(&self, id: u64) -> Option<*const u8> {
        let index = usize::try_from(id).ok().filter(|index| *index < RECEIVES)?;
        let is_posted = self.posted & 1 << index != 0;
        self.at(index).filter(|_| is_posted).map(|(ptr, _)| ptr.cast_const())
    }

    /// How many are posted to receive into.
    pub fn posted(&self) -> u16 {
        self.posted.count_ones() as u16
    }

    /// One that is wanted and not posted. It is taken for posted from now on. `None`: all are, or the
    /// pool has no more.
    pub fn next_to_post(&mut self) -> Option<usize> {
        let index = self.posted.trailing_ones() as usize;
        if index >= self.wanted || self.hold(index).is_err() {
            return None;
        }
        self.posted |= 1 << index;
        Some(index)
    }

    /// A message has come. `waited`: the peer had to wait for credit before.
    pub fn heard(&mut self, waited: bool) {
        self.refused = self.refused.saturating_sub(1);
        self.wants_more |= waited;
        self.calm = if waited { 0 } else { self.calm + 1 };
        if self.calm >= CALM {
            self.calm = 0;
            self.wanted = (self.wanted - BLOCK).max(RECEIVES_FIRST);
        }
    }

    /// Whether more may have to be posted.
    pub fn wants_more(&mut self) -> bool {
        let more = std::mem::take(&mut self.wants_more);
        if more {
            let twice = 2 * usize::from(self.posted());
            self.wanted = twice.clamp(RECEIVES_FIRST, RECEIVES);
        }
        more
    }

    /// Whether a buffer that a message has left is posted no more.
    pub fn retires(&mut self, index: usize) -> bool {
        if index < self.wanted {
            return false;
        }
        self.posted &= !(1 << index);
        let block = index / BLOCK * BLOCK;
        if self.posted >> block & ((1 << BLOCK) - 1) == 0 {
            self.let_go(index);
        }
        true
    }

    /// Whether there is one to send from, if need be out of the pool.
    pub fn can_send(&mut self) -> bool {
        self.free != 0 || self.sends < SENDS && self.more_sends().is_ok()
    }

    fn more_sends(&mut self) -> io::Result<()> {
        self.hold(RECEIVES + self.sends)?;
        self.free |= ((1 << BLOCK) - 1) << self.sends;
        self.sends += BLOCK;
        Ok(())
    }

    /// Whether at least half of those to send from are in use.
    pub fn half_is_sent(&self) -> bool {
        self.free.count_ones() as usize * 2 <= self.sends
    }

    /// Takes one to send from: its number. `None`: there is none.
    pub fn take_to_send(&mut self) -> Option<usize> {
        let index = self.free.trailing_zeros() as usize;
        if index >= SENDS {
            return None;
        }
        self.free &= !(1 << index);
        self.peak = self.peak.max(self.sends - self.free.count_ones() as usize);
        Some(RECEIVES + index)
    }

    /// It can be sent from again.
    pub fn sent(&mut self, index: usize) {
        self.refused = self.refused.saturating_sub(1);
        self.free |= 1 << (index - RECEIVES);
        self.sent += 1;
        if self.sent < CALM {
            return;
        }
        self.sent = 0;
        let peak = std::mem::take(&mut self.peak);
        let last = self.sends - BLOCK;
        let idle = ((1 << BLOCK) - 1) << last;
        if last > 0 && peak <= last && self.free & idle == idle {
            self.free &= !idle;
            self.sends = last;
            self.let_go(RECEIVES + last);
        }
    }

    /// Makes sure that those for puts and gets are here.
    pub fn hold_reach(&mut self) -> io::Result<()> {
        self.hold(RECEIVES + SENDS)
    }

    /// One of those for puts and gets, and its key. `None`: they are not here.
    pub fn reach(&self, index: usize) -> Option<(*mut u8, u32)> {
        assert!(index < REACH_BUFFERS, "numbered below their count");
        self.at(RECEIVES + SENDS + index)
    }

    /// The device uses none of them any more.
    pub fn end(&mut self) {
        for block in self.blocks.iter_mut().filter_map(Option::take) {
            put_back(&self.pool, block);
        }
    }

    /// The device may use them for as long as it likes.
    pub fn abandon(&mut self) {
        self.blocks.iter_mut().filter_map(Option::take).for_each(Block::abandon);
    }
}

fn put_back(pool: &Pool, block: Block) {
    // No other link uses what a device that is gone may not have let go of.
    if !pool.domain().device.is_gone() {
        pool.give(block);
    }
}
