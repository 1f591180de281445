//! Copies of few bytes.

/// Copies `len` bytes. Heads and short payloads are mostly so short that two words are all of them;
/// `memcpy` takes 12 to 14 instructions for them, and the call.
///
/// # Safety
///
/// `len` bytes are readable at `from` and writable at `to`, and the two do not overlap.
#[inline(always)]
pub(super) unsafe fn copy_few(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller's promise. What is longer than one word and not longer than two is copied as
    // two words that may overlap; so the source is read before anything is written.
    unsafe {
        match len {
            8..=16 => copy_as::<u64>(from, to, len),
            4..8 => copy_as::<u32>(from, to, len),
            _ => std::ptr::copy_nonoverlapping(from, to, len),
        }
    }
}

/// Copies the first and the last word of `len` bytes.
///
/// # Safety
///
/// As [`copy_few`], and `len` is at least one word.
#[inline(always)]
unsafe fn copy_as<Word: Copy>(from: *const u8, to: *mut u8, len: usize) {
    let last = len - size_of::<Word>();
    // SAFETY: both words lie within the `len` bytes.
    unsafe {
        let first = from.cast::<Word>().read_unaligned();
        let second = from.add(last).cast::<Word>().read_unaligned();
        to.cast::<Word>().write_unaligned(first);
        to.add(last).cast::<Word>().write_unaligned(second);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_copied_and_nothing_beside_it() {
        let from: Vec<u8> = (1..=40).collect();
        for len in 0..from.len() {
            let mut to = vec![0; len + 2];
            // SAFETY: there is room for as many behind the first.
            unsafe { copy_few(from.as_ptr(), to.as_mut_ptr().add(1), len) };
            assert_eq!(to[1..=len], from[..len], "{len} bytes");
            assert_eq!((to[0], to[len + 1]), (0, 0), "{len} bytes");
        }
    }
}
