//! The protocol, as pure code: what travels, in which order it counts, and what a peer may hold.
//!
//! This room owns the wire format (parcel heads, hellos, set-up messages, remote keys), the
//! restoring of order, the matching of tags, byte credit and fences. It must not know sockets,
//! clocks, tasks or links: it turns bytes into values and values into bytes, and keeps small state
//! machines that a test can drive without a runtime. Everything that comes from a peer is checked
//! here before anybody allocates, indexes or waits because of it.

mod cursor;

pub(crate) mod credit;
pub(crate) mod fence;
pub(crate) mod hello;
pub(crate) mod keys;
pub(crate) mod sequence;
pub(crate) mod tags;
pub(crate) mod wire;

#[cfg(feature = "fuzzing")]
pub mod fuzz_entry;
#[cfg(feature = "fuzzing")]
pub mod fuzz_seeds;

/// `a - b` for counters that wrap: negative when `a` lies before `b`. Right as long as the two are
/// less than 2³¹ apart.
pub(crate) fn signed_distance(a: u32, b: u32) -> i32 {
    a.wrapping_sub(b) as i32
}
