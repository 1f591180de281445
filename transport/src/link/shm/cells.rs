//! What a ring is made of. Under test `loom` puts its own in place of these (see `model`).

pub(super) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Slots in a ring.
pub(super) const SLOTS: u32 = 256;
/// How many slots are read before the producer is shown, unless it waits.
pub(super) const PUBLISH_EVERY: u32 = SLOTS / 4;
/// Words of 8 B in a slot, beside stamp and header: 64 B in all.
pub(super) const DATA_WORDS: usize = 7;
/// The longest record, in bytes.
pub(super) const RECORD_MAX: usize = 3072;
/// Slots kept free for control records: others are refused earlier.
pub(super) const RESERVE: u32 = 16;
