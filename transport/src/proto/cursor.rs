//! Reading little-endian fields from bytes that a peer wrote. Knows no message.

use std::fmt;

/// Bytes from a peer that are not what they must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WireError {
    /// What was being read, and what was wrong with it.
    pub what: &'static str,
}

impl WireError {
    pub(crate) const fn new(what: &'static str) -> Self {
        WireError { what }
    }
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.what)
    }
}

impl std::error::Error for WireError {}

/// The unread rest of a byte string, and what it is, for errors.
pub(super) struct Cursor<'a> {
    rest: &'a [u8],
    short: WireError,
}

impl<'a> Cursor<'a> {
    /// Reads from `bytes`; `short` says what is too short when they end early.
    pub fn new(bytes: &'a [u8], short: &'static str) -> Self {
        Cursor { rest: bytes, short: WireError::new(short) }
    }

    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// The next `len` bytes.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (head, rest) = self.rest.split_at_checked(len).ok_or(self.short)?;
        self.rest = rest;
        Ok(head)
    }

    /// The next `N` bytes, by value.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or(self.short)?;
        self.rest = rest;
        Ok(*head)
    }

    pub fn u8(&mut self) -> Result<u8, WireError> {
        self.array().map(u8::from_le_bytes)
    }

    pub fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Everything that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// Refuses trailing bytes.
    pub fn finish(self, trailing: &'static str) -> Result<(), WireError> {
        if self.is_empty() { Ok(()) } else { Err(WireError::new(trailing)) }
    }
}

/// UTF-8 from a peer.
pub(super) fn text<'a>(bytes: &'a [u8], what: &'static str) -> Result<&'a str, WireError> {
    std::str::from_utf8(bytes).map_err(|_| WireError::new(what))
}

/// The longest prefix of `text` that has at most `max_bytes` bytes and ends between characters.
pub(super) fn clip(text: &str, max_bytes: usize) -> &str {
    &text[..text.floor_char_boundary(max_bytes)]
}
