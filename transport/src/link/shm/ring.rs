//! The ring between two processes, and how each side sleeps and is woken.
//!
//! Each side has one page set ([`Page`]) that only it writes: the slots of the ring that it
//! produces, and, for the ring that it consumes, how far it has read. The peer maps it read-only.
//! A record is one or more slots; each slot carries a stamp, its position plus one, written last.
//! The first slot's stamp is written after all others, so whoever sees it sees the whole record.
//!
//! Whatever is read from the peer's page is read once, checked, then used: a hostile peer can make
//! this side report [`Corrupt`], and nothing worse.
//!
//! Two waits must never be lost, and each is a pair of "store, `fence(SeqCst)`, load the other's
//! word", of which at least one load sees the other's store:
//! - *no data*: the consumer stores an odd sleep epoch, then looks at the ring once more; the
//!   producer publishes, then looks at the epoch. It wakes each odd epoch once.
//! - *no room*: the producer stores `want`, then looks at the consumer's head once more; the
//!   consumer publishes its head, then looks at `want` and the epoch. So it is whether the producer
//!   falls asleep afterwards, as above, or slept before.
//!
//! The head is published lazily: every quarter of the ring, before sleeping, and whenever the
//! producer is seen to want room. A drained ring thus shows at least three quarters free, which is
//! more than the longest record and the reserve for control together.
//!
//! This file must not know what a record means. Its atomics and sizes come from the `cells` beside
//! it, so that `loom` runs this very code (see `model`).

use std::fmt;
use std::ops::Deref;

use super::cells::{
    AtomicU32, AtomicU64, DATA_WORDS, FETCH_AHEAD, Ordering, PUBLISH_EVERY, RECORD_MAX, RESERVE,
    SLOTS, STRIDE, fence, fetch_for_reading, fetch_for_writing,
};
use super::marks::Marks;

/// So many records one after the other, none the other way, are a stream. Its writer fetches lines
/// ahead (a stream of 8 B messages: 7.2 against 5.0 million a second; but 0.30 against 0.29 µs,
/// half a round trip, in an exchange of single records), and its reader does not (5.7 against 7.2
/// million; but 0.267 against 0.272 µs).
const STREAM_MIN: u32 = 4;
/// Bytes of a record that fit one slot.
pub(super) const SLOT_DATA: usize = DATA_WORDS * 8;
/// Bytes that fit one slot behind a first word.
pub(super) const SHORT_MAX: usize = SLOT_DATA - 8;
/// The bits of a header that hold the record's length in bytes; the others are the caller's.
pub(super) const LEN_BITS: u32 = 12;
const LEN_MASK: u32 = (1 << LEN_BITS) - 1;

const _: () = {
    assert!(SLOTS.is_power_of_two() && STRIDE % 2 == 1);
    assert!(RECORD_MAX <= LEN_MASK as usize);
    assert!(RECORD_MAX.div_ceil(SLOT_DATA) as u32 + RESERVE <= SLOTS - PUBLISH_EVERY + 1);
};

#[repr(C, align(64))]
pub(super) struct Slot {
    stamp: AtomicU32,
    header: AtomicU32,
    data: [AtomicU64; DATA_WORDS],
}

#[repr(C, align(64))]
struct HeadLine {
    head: AtomicU32,
}

/// Written only when falling asleep and when the ring is full: on the fast path both sides hold
/// this line shared.
#[repr(C, align(64))]
struct SleepLine {
    sleep: AtomicU32,
    want: AtomicU32,
}

/// What one side writes and the other reads. All zero at first.
#[repr(C)]
pub(super) struct Page {
    /// Random bytes that prove that both sides see the same memory.
    secret: [AtomicU64; 2],
    /// Not 0: the owner lets go of memory that it told the other side of. The line is written
    /// at set-up and then only for this.
    dying: AtomicU32,
    head: HeadLine,
    sleep: SleepLine,
    pub(super) marks: Marks,
    slots: [Slot; SLOTS as usize],
}

impl Page {
    pub fn set_secret(&self, secret: [u8; 16]) {
        let words = u128::from_ne_bytes(secret);
        self.secret[0].store(words as u64, Ordering::Release);
        self.secret[1].store((words >> 64) as u64, Ordering::Release);
    }

    pub fn secret(&self) -> [u8; 16] {
        let [low, high] = [0, 1].map(|at: usize| self.secret[at].load(Ordering::Acquire));
        (u128::from(low) | u128::from(high) << 64).to_ne_bytes()
    }

    /// Says that from now on memory which the peer may be reading is let go of.
    pub fn begin_dying(&self) {
        self.dying.store(1, Ordering::Relaxed);
        // Whoever reads something written after this fence sees the word after a fence of its own.
        fence(Ordering::SeqCst);
    }

    /// Whether what was read of the owner's memory until now was not yet let go of.
    pub fn trusted(&self) -> bool {
        fence(Ordering::Acquire);
        self.dying.load(Ordering::Relaxed) == 0
    }
}

/// The peer wrote something into its page that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Corrupt {
    Stamp,
    Length,
    Head,
}

impl fmt::Display for Corrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Corrupt::Stamp => "a ring slot with an impossible stamp",
            Corrupt::Length => "a ring record with an impossible length",
            Corrupt::Head => "a ring index that ran backwards or ahead",
        })
    }
}

/// Wakes the peer.
pub(super) trait Bell {
    fn ring(&mut self);
}

/// One side's end of both rings.
pub(super) struct Ring<O, P, B> {
    own: O,
    peer: P,
    bell: B,
    /// Next position to write.
    tail: u32,
    /// The consumer's head, as last seen.
    seen_head: u32,
    /// Next position to read.
    head: u32,
    /// Our head, as last published.
    published: u32,
    /// Our sleep epoch; odd while asleep.
    epoch: u32,
    /// The peer's epoch that was last answered with a wake.
    woken: u32,
    wanting: bool,
    /// Records written since one was read, up to [`STREAM_MIN`], and the other way round.
    written_in_a_row: u32,
    read_in_a_row: u32,
}

impl<O: Deref<Target = Page>, P: Deref<Target = Page>, B: Bell> Ring<O, P, B> {
    pub fn new(own: O, peer: P, bell: B) -> Self {
        Ring {
            own,
            peer,
            bell,
            tail: 0,
            seen_head: 0,
            head: 0,
            published: 0,
            epoch: 0,
            woken: 0,
            wanting: false,
            written_in_a_row: 0,
            read_in_a_row: 0,
        }
    }

    pub fn bell(&self) -> &B {
        &self.bell
    }

    pub fn own(&self) -> &O {
        &self.own
    }

    pub fn peer(&self) -> &P {
        &self.peer
    }

    #[inline]
    fn own_slot(&self, position: u32) -> &Slot {
        &self.own.slots[place_of(position)]
    }

    #[inline]
    fn peer_slot(&self, position: u32) -> &Slot {
        &self.peer.slots[place_of(position)]
    }

    /// Whether `slots` slots are free, looking at the consumer's head only when needed.
    #[inline]
    fn has_room(&mut self, slots: u32) -> Result<bool, Corrupt> {
        if SLOTS - self.tail.wrapping_sub(self.seen_head) >= slots {
            return Ok(true);
        }
        self.refresh_head()?;
        Ok(SLOTS - self.tail.wrapping_sub(self.seen_head) >= slots)
    }

    /// Whether the consumer's head has moved.
    fn refresh_head(&mut self) -> Result<bool, Corrupt> {
        let head = self.peer.head.head.load(Ordering::Acquire);
        let moved = head.wrapping_sub(self.seen_head);
        if moved > self.tail.wrapping_sub(self.seen_head) {
            return Err(Corrupt::Head);
        }
        self.seen_head = head;
        Ok(moved != 0)
    }

    /// Writes a record of `len` bytes, the concatenation of `parts`, unless fewer than `reserve`
    /// slots would remain free. `flags` are the header's bits above [`LEN_BITS`]. Wakes the peer
    /// if it sleeps.
    pub fn push<'a>(
        &mut self,
        flags: u32,
        len: usize,
        reserve: u32,
        parts: impl Iterator<Item = &'a [u8]>,
    ) -> Result<bool, Corrupt> {
        debug_assert!(len <= RECORD_MAX);
        let slots = slots_for(len);
        if !self.has_room(slots + reserve)? {
            return Ok(false);
        }
        let mut writer = Writer::new(self);
        for part in parts {
            writer.write(part);
        }
        writer.finish(slots, flags << LEN_BITS | len as u32);
        self.written(slots);
        Ok(true)
    }

    /// As [`Ring::push`], for a record of one slot: `first`, and up to [`SHORT_MAX`] bytes. Most of
    /// small traffic: a link's `post` of 8 B takes 150 instructions with it, and took 480.
    #[inline]
    pub fn push_short(
        &mut self,
        flags: u32,
        first: u64,
        rest: &[u8],
        reserve: u32,
    ) -> Result<bool, Corrupt> {
        debug_assert!(8 + rest.len() <= SLOT_DATA, "more than one slot");
        if !self.has_room(1 + reserve)? {
            return Ok(false);
        }
        let slot = self.own_slot(self.tail);
        let (whole, last) = rest.as_chunks::<8>();
        slot.data[0].store(first, Ordering::Relaxed);
        for (place, bytes) in slot.data[1..].iter().zip(whole) {
            place.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
        }
        if !last.is_empty() {
            slot.data[1 + whole.len()].store(load_short(last), Ordering::Relaxed);
        }
        self.stamp(flags << LEN_BITS | (8 + rest.len()) as u32);
        self.written(1);
        Ok(true)
    }

    /// Shows the record at the tail, of which all but this is written.
    #[inline]
    fn stamp(&self, header: u32) {
        let first = self.own_slot(self.tail);
        first.header.store(header, Ordering::Relaxed);
        first.stamp.store(self.tail.wrapping_add(1), Ordering::Release);
    }

    /// A record of so many slots is in the ring.
    #[inline]
    fn written(&mut self, slots: u32) {
        self.tail = self.tail.wrapping_add(slots);
        self.read_in_a_row = 0;
        if self.written_in_a_row < STREAM_MIN {
            self.written_in_a_row += 1;
        } else {
            fetch_for_writing(self.own_slot(self.tail.wrapping_add(FETCH_AHEAD)));
        }
        fence(Ordering::SeqCst);
        self.wake_sleeper();
    }

    /// Wakes the peer if it sleeps and was not woken from this sleep yet. A `SeqCst` fence lies
    /// between what it should see and this.
    fn wake_sleeper(&mut self) {
        let epoch = self.peer.sleep.sleep.load(Ordering::Relaxed);
        if epoch & 1 == 1 && epoch != self.woken {
            self.woken = epoch;
            self.bell.ring();
        }
    }

    /// Pushes a record, or else tells the consumer that room is wanted: it then rings when there
    /// is some, also if this side sleeps.
    pub fn push_or_want<'a>(
        &mut self,
        flags: u32,
        len: usize,
        reserve: u32,
        parts: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Result<bool, Corrupt> {
        while !self.push(flags, len, reserve, parts.clone())? {
            if !self.want_room()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Tells the consumer that there is no room. `true`: room has appeared meanwhile.
    fn want_room(&mut self) -> Result<bool, Corrupt> {
        if !self.wanting {
            self.wanting = true;
            self.own.sleep.want.store(1, Ordering::Relaxed);
            // This side may be asleep already: no later look at the head can be counted on.
            fence(Ordering::SeqCst);
        }
        self.room_appeared()
    }

    /// Whether room was wanted and some has appeared; it is then no longer wanted.
    pub fn room_appeared(&mut self) -> Result<bool, Corrupt> {
        if !self.wanting || !self.refresh_head()? {
            return Ok(false);
        }
        self.wanting = false;
        self.own.sleep.want.store(0, Ordering::Relaxed);
        Ok(true)
    }

    pub fn is_wanting(&self) -> bool {
        self.wanting
    }

    /// Whether there is nothing to read: one load.
    #[inline]
    pub fn is_empty(&self) -> bool {
        let slot = self.peer_slot(self.head);
        slot.stamp.load(Ordering::Acquire) != self.head.wrapping_add(1)
    }

    /// Copies the next record into the beginning of `into`: its flags and length.
    #[inline]
    pub fn pop(&mut self, into: &mut [u8; RECORD_MAX]) -> Result<Option<(u32, usize)>, Corrupt> {
        let expected = self.head.wrapping_add(1);
        let first = self.peer_slot(self.head);
        let stamp = first.stamp.load(Ordering::Acquire);
        if stamp != expected {
            // What lies here is the record of one lap ago, or nothing yet.
            let stale = stamp == 0 || stamp == expected.wrapping_sub(SLOTS);
            return if stale { Ok(None) } else { Err(Corrupt::Stamp) };
        }
        let header = first.header.load(Ordering::Relaxed);
        let len = (header & LEN_MASK) as usize;
        if len > RECORD_MAX {
            return Err(Corrupt::Length);
        }
        // Most have one; the others are divided for.
        let slots = if len <= SLOT_DATA { 1 } else { slots_for(len) };
        self.read_in_a_row = self.read_in_a_row.saturating_add(1);
        if self.read_in_a_row < STREAM_MIN {
            fetch_for_reading(self.peer_slot(self.head.wrapping_add(slots)));
        }
        if slots == 1 {
            // All of the slot, whatever of it is the record: it is one cache line.
            let slot = self.peer_slot(self.head);
            for (word, bytes) in slot.data.iter().zip(into.as_chunks_mut::<8>().0) {
                *bytes = word.load(Ordering::Relaxed).to_le_bytes();
            }
            self.advance(1);
            return Ok(Some((header >> LEN_BITS, len)));
        }
        let mut chunks = into[..len].chunks_mut(SLOT_DATA);
        for at in 0..slots {
            let slot = self.peer_slot(self.head.wrapping_add(at));
            if at > 0 && slot.stamp.load(Ordering::Acquire) != expected.wrapping_add(at) {
                return Err(Corrupt::Stamp);
            }
            let Some(chunk) = chunks.next() else { break };
            read_slot(slot, chunk);
        }
        self.advance(slots);
        Ok(Some((header >> LEN_BITS, len)))
    }

    #[inline]
    fn advance(&mut self, slots: u32) {
        self.written_in_a_row = 0;
        self.head = self.head.wrapping_add(slots);
        if self.head.wrapping_sub(self.published) >= PUBLISH_EVERY {
            self.publish();
        }
    }

    #[cold]
    fn publish(&mut self) {
        self.published = self.head;
        self.own.head.head.store(self.head, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.peer.sleep.want.load(Ordering::Relaxed) != 0 {
            self.wake_sleeper();
        }
    }

    /// Shows the producer what was read, if it waits for room. Called after a turn of reading.
    pub fn publish_if_wanted(&mut self) {
        if self.published != self.head && self.peer.sleep.want.load(Ordering::Relaxed) != 0 {
            self.publish();
        }
    }

    /// Falls asleep: from now on the peer rings when there is something. `false`: there is
    /// something already, and this side is awake.
    pub fn fall_asleep(&mut self) -> Result<bool, Corrupt> {
        if self.published != self.head {
            self.publish();
        }
        // Always a fresh odd epoch: the last one may have had its wake already.
        self.epoch = self.epoch.wrapping_add(1) | 1;
        self.own.sleep.sleep.store(self.epoch, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !self.is_empty() || self.room_appeared()? {
            self.wake_up();
            return Ok(false);
        }
        Ok(true)
    }

    /// Says that this side is awake: it need not be rung for.
    pub fn wake_up(&mut self) {
        if self.epoch & 1 == 1 {
            self.epoch = self.epoch.wrapping_add(1);
            self.own.sleep.sleep.store(self.epoch, Ordering::Relaxed);
        }
    }
}

#[inline]
fn place_of(position: u32) -> usize {
    (position.wrapping_mul(STRIDE) % SLOTS) as usize
}

#[inline]
fn slots_for(len: usize) -> u32 {
    len.div_ceil(SLOT_DATA).max(1) as u32
}

/// Copies the first bytes of a slot. Whole words apart from the rest: a copy of fixed length is one
/// instruction.
fn read_slot(slot: &Slot, into: &mut [u8]) {
    let mut words = slot.data.iter().map(|word| word.load(Ordering::Relaxed).to_le_bytes());
    let (whole, rest) = into.as_chunks_mut::<8>();
    for (bytes, word) in whole.iter_mut().zip(&mut words) {
        *bytes = word;
    }
    if let (false, Some(word)) = (rest.is_empty(), words.next()) {
        rest.copy_from_slice(&word[..rest.len()]);
    }
}

/// Cuts bytes into words, and those into slots. The first slot's stamp stays back until all others
/// are stamped. Bytes go through a register and not through memory, which a processor cannot read
/// as a word right after it was written in pieces.
struct Writer<'r, O, P, B> {
    ring: &'r Ring<O, P, B>,
    slot: &'r Slot,
    /// Words stored in this slot.
    words: usize,
    /// Slots before this one.
    at: u32,
    /// The word at hand, and how many of its bytes are there.
    word: u64,
    bytes: u32,
}

impl<'r, O: Deref<Target = Page>, P: Deref<Target = Page>, B: Bell> Writer<'r, O, P, B> {
    #[inline]
    fn new(ring: &'r Ring<O, P, B>) -> Self {
        Writer { ring, slot: ring.own_slot(ring.tail), words: 0, at: 0, word: 0, bytes: 0 }
    }

    #[inline]
    fn write(&mut self, part: &[u8]) {
        let (whole, rest) = part.as_chunks::<8>();
        if self.bytes == 0 {
            whole.iter().for_each(|bytes| self.store(u64::from_le_bytes(*bytes)));
        } else {
            whole.iter().for_each(|bytes| self.append(u64::from_le_bytes(*bytes), 8));
        }
        if !rest.is_empty() {
            self.append(load_short(rest), rest.len() as u32);
        }
    }

    /// Appends the lowest `count` bytes of `value`, of which the others are 0.
    #[inline]
    fn append(&mut self, value: u64, count: u32) {
        let have = self.bytes;
        self.word |= value << (8 * have);
        self.bytes += count;
        if self.bytes >= 8 {
            let full = self.word;
            self.store(full);
            self.bytes -= 8;
            self.word = if have == 0 { 0 } else { value >> (64 - 8 * have) };
        }
    }

    #[inline]
    fn store(&mut self, word: u64) {
        if self.words == DATA_WORDS {
            self.next_slot();
        }
        self.slot.data[self.words].store(word, Ordering::Relaxed);
        self.words += 1;
    }

    fn position(&self) -> u32 {
        self.ring.tail.wrapping_add(self.at)
    }

    fn stamp_later_slot(&self) {
        if self.at > 0 {
            self.slot.stamp.store(self.position().wrapping_add(1), Ordering::Release);
        }
    }

    fn next_slot(&mut self) {
        self.stamp_later_slot();
        self.at += 1;
        self.slot = self.ring.own_slot(self.position());
        self.words = 0;
    }

    #[inline]
    fn finish(mut self, slots: u32, header: u32) {
        if self.bytes > 0 {
            let last = self.word;
            self.store(last);
        }
        self.stamp_later_slot();
        debug_assert_eq!(self.at + 1, slots);
        self.ring.stamp(header);
    }
}

/// Up to 8 bytes, as the low bytes of a word.
#[inline]
pub(super) fn load_word(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or_else(|_| load_short(bytes), u64::from_le_bytes)
}

/// Fewer than 8 bytes, as the low bytes of a word.
#[inline]
fn load_short(bytes: &[u8]) -> u64 {
    let (mut rest, mut word, mut shift) = (bytes, 0u64, 0);
    if let Some((four, after)) = rest.split_first_chunk() {
        word = u64::from(u32::from_le_bytes(*four));
        (rest, shift) = (after, 32);
    }
    if let Some((two, after)) = rest.split_first_chunk() {
        word |= u64::from(u16::from_le_bytes(*two)) << shift;
        (rest, shift) = (after, shift + 16);
    }
    if let [one] = rest {
        word |= u64::from(*one) << shift;
    }
    word
}

/// What tests need to see or to forge.
#[cfg(test)]
mod forge {
    use super::*;

    impl Page {
        /// A page in ordinary memory.
        pub fn zeroed() -> Self {
            let word = || AtomicU32::new(0);
            let long = |_| AtomicU64::new(0);
            Page {
                secret: [0, 1].map(long),
                dying: word(),
                head: HeadLine { head: word() },
                sleep: SleepLine { sleep: word(), want: word() },
                marks: Marks::zeroed(),
                slots: std::array::from_fn(|_| Slot {
                    stamp: word(),
                    header: word(),
                    data: std::array::from_fn(long),
                }),
            }
        }

        pub fn set_slot(&self, position: u32, stamp: u32, header: u32) {
            let slot = &self.slots[place_of(position)];
            slot.header.store(header, Ordering::Relaxed);
            slot.stamp.store(stamp, Ordering::Release);
        }

        pub fn set_head(&self, head: u32) {
            self.head.head.store(head, Ordering::Release);
        }
    }

    impl<O: Deref<Target = Page>, P: Deref<Target = Page>, B: Bell> Ring<O, P, B> {
        /// As if this many slots had gone each way.
        pub fn start_at(&mut self, position: u32) {
            (self.tail, self.seen_head) = (position, position);
            (self.head, self.published) = (position, position);
            self.own.set_head(position);
            for at in 1..=SLOTS {
                let last_lap = position.wrapping_sub(at);
                self.own.set_slot(last_lap, last_lap.wrapping_add(1), 0);
            }
        }
    }
}
