//! What a ring is made of. Under test `loom` puts its own in place of these (see `model`).

pub(super) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Slots in a ring.
pub(super) const SLOTS: u32 = 256;
/// How many slots are read before the producer is shown, unless it waits.
pub(super) const PUBLISH_EVERY: u32 = SLOTS / 4;
/// How far apart, in slots, consecutive positions lie. Odd, so that every slot has one position a
/// lap; and far enough for the processor not to fetch ahead of the reader what the writer is about
/// to write (a stream of 8 B messages: 7.4 against 5.3 million a second).
pub(super) const STRIDE: u32 = 37;
/// How many positions ahead of a stream lines are fetched for writing.
pub(super) const FETCH_AHEAD: u32 = 4;
/// Words of 8 B in a slot, beside stamp and header: 64 B in all.
pub(super) const DATA_WORDS: usize = 7;
/// The longest record, in bytes.
pub(super) const RECORD_MAX: usize = 3072;
/// Slots kept free for control records: others are refused earlier.
pub(super) const RESERVE: u32 = 16;

/// Asks for the cache line of `place`, to be written soon.
#[inline]
pub(super) fn fetch_for_writing<T>(place: &T) {
    // The intrinsic becomes a fetch for reading unless the whole program is built for newer
    // processors; those that lack the instruction take it for a no-op.
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; it reads and writes nothing, and any address will do.
    unsafe {
        std::arch::asm!(
            "prefetchw [{}]",
            in(reg) std::ptr::from_ref(place),
            options(nostack, preserves_flags, readonly)
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// Asks for the cache line of `place`, to be read soon.
#[inline]
pub(super) fn fetch_for_reading<T>(place: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; it reads nothing that the program sees, and any address will do.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(place).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}
