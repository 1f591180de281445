//! Memory for measurements: what cannot be had is an error, not the end of the process.

use anyhow::{Context, Result};

/// `len` times `value`, every page of it touched.
pub fn filled<T: Copy>(len: usize, value: T) -> Result<Vec<T>> {
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(len).with_context(|| {
        format!("no memory for a buffer of {} bytes", len.saturating_mul(size_of::<T>()))
    })?;
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
