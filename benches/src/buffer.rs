//! Memory for measurements: what cannot be had is an error, not the end of the process.

use anyhow::{Context, Result};

const PAGE: usize = 4096;
/// From this size on, in bytes, the system is asked for large pages.
const HUGE: usize = 4 << 20;

/// `len` times `value`, every page of it touched. From 4 MiB on the pages are large ones, where
/// the system has them, as those of numpy's arrays and of `ucx_perftest` are: copies out of small
/// pages are slower by a third on a virtual machine, whoever makes them.
pub fn filled<T: Copy>(len: usize, value: T) -> Result<Vec<T>> {
    let mut buffer: Vec<T> = Vec::new();
    buffer.try_reserve_exact(len).with_context(|| {
        format!("no memory for a buffer of {} bytes", len.saturating_mul(size_of::<T>()))
    })?;
    let room = buffer.spare_capacity_mut();
    let (start, end) = (room.as_ptr().addr(), room.as_ptr_range().end.addr());
    let whole_pages = start.next_multiple_of(PAGE)..end - end % PAGE;
    if size_of_val(room) >= HUGE {
        // SAFETY: whole pages within memory that is ours; the advice changes no contents.
        let _ = unsafe {
            libc::madvise(
                room.as_mut_ptr().cast::<u8>().add(whole_pages.start - start).cast(),
                whole_pages.end - whole_pages.start,
                libc::MADV_HUGEPAGE,
            )
        };
    }
    buffer.resize(len, value);
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    #[test]
    fn memory_that_cannot_be_had_is_an_error() {
        let error = super::filled(isize::MAX as usize, 0u8).unwrap_err();
        assert!(error.to_string().contains("no memory"), "{error}");
        assert_eq!(super::filled(3, 7u8).unwrap(), [7, 7, 7]);
    }
}
