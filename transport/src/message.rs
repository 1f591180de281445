//! Messages and their frames.

use std::fmt;

use bytes::{Bytes, BytesMut};
use smallvec::SmallVec;

use crate::driver::view::Lease;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::link::{RawView, Segment};
use crate::memory::{Loan, MemoryKind, PoolBuf, SharedBlock};
use crate::proto::credit::message_cost;

/// The longest frame that is kept inside the [`Frame`] itself, in bytes: it needs no allocation.
pub const INLINE_MAX: usize = 48;

/// One frame of a [`Message`]: a run of bytes and the memory that holds it.
///
/// To send, make one from what holds the bytes already (`Bytes`, `Vec<u8>`, a [`Loan`], …): nothing
/// is copied. A received frame lies in memory of this process and is writable, except for a *view*
/// ([`Frame::is_view`]): that is the sender's own memory, mapped here. A view pins the sender's
/// memory until it is dropped, so read it soon or copy it.
pub struct Frame(Repr);

#[repr(align(16))]
struct InlineBytes([u8; INLINE_MAX]);

impl InlineBytes {
    /// Of at most [`INLINE_MAX`] bytes. One word to two are copied as such, without a call.
    #[inline]
    fn copied(bytes: &[u8]) -> Self {
        let mut data = InlineBytes([0; INLINE_MAX]);
        let to = &mut data.0[..bytes.len()];
        match (bytes.first_chunk::<8>(), bytes.last_chunk::<8>()) {
            (Some(first), Some(last)) if bytes.len() <= 16 => {
                to[bytes.len() - 8..].copy_from_slice(last);
                to[..8].copy_from_slice(first);
            }
            _ => to.copy_from_slice(bytes),
        }
        data
    }
}

enum Repr {
    Inline { len: u8, data: InlineBytes },
    Heap(Vec<u8>),
    Pool(PoolBuf),
    Bytes(Bytes),
    Block(SharedBlock),
    View(View),
}

/// The sender's memory, and what tells the sender that we are done with it.
pub(crate) struct View {
    raw: RawView,
    #[allow(dead_code, reason = "held for its drop")]
    lease: Lease,
}

impl Frame {
    /// Copies the bytes: up to [`INLINE_MAX`] into the frame itself, else into fresh memory.
    #[inline]
    pub fn copy_from_slice(bytes: &[u8]) -> Self {
        if bytes.len() <= INLINE_MAX {
            Frame(Repr::Inline { len: bytes.len() as u8, data: InlineBytes::copied(bytes) })
        } else {
            Frame(Repr::Heap(bytes.to_vec()))
        }
    }

    pub(crate) fn heap(len_bytes: usize) -> Self {
        if len_bytes <= INLINE_MAX {
            Frame(Repr::Inline { len: len_bytes as u8, data: InlineBytes([0; INLINE_MAX]) })
        } else {
            Frame(Repr::Heap(vec![0; len_bytes]))
        }
    }

    /// Gives an inline frame memory of its own, with an address that survives moves.
    pub(crate) fn make_stable(&mut self) {
        if let Repr::Inline { len, data } = &self.0 {
            self.0 = Repr::Heap(data.0[..usize::from(*len)].to_vec());
        }
    }

    pub(crate) fn view(raw: RawView, lease: Lease) -> Self {
        Frame(Repr::View(View { raw, lease }))
    }

    #[inline]
    pub(crate) fn is_inline(&self) -> bool {
        matches!(self.0, Repr::Inline { .. })
    }

    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        match &self.0 {
            Repr::Inline { len, .. } => usize::from(*len),
            _ => self.len_outside(),
        }
    }

    /// The same, wherever the bytes are. Out of line: of all cases the first is the one that counts.
    #[inline(never)]
    fn len_outside(&self) -> usize {
        match &self.0 {
            Repr::Inline { len, .. } => usize::from(*len),
            Repr::Heap(bytes) => bytes.len(),
            Repr::Pool(bytes) => bytes.len(),
            Repr::Bytes(bytes) => bytes.len(),
            Repr::Block(block) => block.len(),
            Repr::View(view) => view.raw.len,
        }
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes, unless this is a view of the sender's memory ([`Frame::is_view`]).
    #[inline]
    pub fn as_slice(&self) -> Option<&[u8]> {
        match &self.0 {
            Repr::Inline { len, data } => Some(&data.0[..usize::from(*len)]),
            Repr::Heap(bytes) => Some(bytes),
            Repr::Pool(bytes) => Some(bytes),
            Repr::Bytes(bytes) => Some(bytes),
            Repr::Block(block) => Some(block.as_slice()),
            Repr::View(_) => None,
        }
    }

    /// The bytes, to change in place: for frames received into memory of this process, and those
    /// made by copying. `None` for shared bytes and views.
    pub fn as_mut_slice(&mut self) -> Option<&mut [u8]> {
        match &mut self.0 {
            Repr::Inline { len, data } => Some(&mut data.0[..usize::from(*len)]),
            Repr::Heap(bytes) => Some(bytes),
            Repr::Pool(bytes) => Some(bytes),
            Repr::Bytes(_) | Repr::Block(_) | Repr::View(_) => None,
        }
    }

    /// Whether the bytes lie in the sender's memory.
    #[inline]
    pub fn is_view(&self) -> bool {
        matches!(self.0, Repr::View(_))
    }

    /// The bytes of a view, or of any other frame.
    ///
    /// # Safety
    ///
    /// For a view: for as long as the slice is used, the sending process must not write to the
    /// loan (a thalweg sender does not, while the endpoint lives), and the endpoint must not have
    /// failed. For other frames there is no condition.
    pub unsafe fn view_slice(&self) -> &[u8] {
        match &self.0 {
            Repr::View(view) => {
                // SAFETY: mapped for as long as `raw.keep` lives, `len` was checked against the
                // mapping by the link; that nobody writes is the caller's promise.
                unsafe { std::slice::from_raw_parts(view.raw.ptr, view.raw.len) }
            }
            _ => self.as_slice().unwrap_or_default(),
        }
    }

    /// Copies all bytes out. Works for every frame.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`] if the lengths differ; [`ErrorKind::ConnectionLost`] if this is
    /// a view and its endpoint ended before the copy did, so that the bytes cannot be trusted.
    pub fn copy_to_slice(&self, to: &mut [u8]) -> Result<()> {
        if to.len() != self.len() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                Phase::Transfer,
                format!("a frame of {} bytes copied to a slice of {}", self.len(), to.len()),
            ));
        }
        self.copy_range(0, to)
    }

    /// Copies `to.len()` bytes out, from `offset_bytes` on.
    ///
    /// # Errors
    ///
    /// As [`Frame::copy_to_slice`].
    pub fn copy_range(&self, offset_bytes: usize, to: &mut [u8]) -> Result<()> {
        let end = offset_bytes.checked_add(to.len()).filter(|end| *end <= self.len());
        let Some(end) = end else {
            return Err(Error::new(
                ErrorKind::OutOfBounds,
                Phase::Transfer,
                format!(
                    "{} bytes from {offset_bytes} of a frame of {} bytes",
                    to.len(),
                    self.len()
                ),
            ));
        };
        match &self.0 {
            Repr::View(view) => {
                // SAFETY: in bounds (checked above) of a live mapping. The peer may write to it,
                // so it is copied as raw memory, never as a reference; what came is trusted only
                // if afterwards the peer still keeps the memory.
                unsafe {
                    std::ptr::copy(view.raw.ptr.add(offset_bytes), to.as_mut_ptr(), to.len());
                }
                if !view.raw.keep.trusted() {
                    return Err(Error::new(
                        ErrorKind::ConnectionLost,
                        Phase::Transfer,
                        "the endpoint had ended before a view of the sender's memory was read",
                    ));
                }
            }
            _ => to.copy_from_slice(&self.as_slice().unwrap_or_default()[offset_bytes..end]),
        }
        Ok(())
    }

    /// A copy of the bytes.
    ///
    /// # Errors
    ///
    /// As [`Frame::copy_to_slice`].
    pub fn to_vec(&self) -> Result<Vec<u8>> {
        let mut copy = vec![0; self.len()];
        self.copy_to_slice(&mut copy)?;
        Ok(copy)
    }

    /// The bytes as [`Bytes`]: without copying, except for short frames and views.
    ///
    /// # Errors
    ///
    /// As [`Frame::copy_to_slice`].
    pub fn into_bytes(self) -> Result<Bytes> {
        Ok(match self.0 {
            Repr::Bytes(bytes) => bytes,
            Repr::Heap(bytes) => Bytes::from(bytes),
            Repr::Pool(bytes) => Bytes::from_owner(bytes),
            Repr::Inline { .. } => Bytes::copy_from_slice(self.as_slice().unwrap_or_default()),
            Repr::Block(_) | Repr::View(_) => Bytes::from(self.to_vec()?),
        })
    }

    /// The loan back, once nobody else holds it; otherwise the frame.
    ///
    /// # Errors
    ///
    /// The frame itself, if it is not a loan or is still shared.
    pub fn into_loan(self) -> Result<Loan, Frame> {
        match self.0 {
            Repr::Block(block) => block.try_into_loan().map_err(|block| Frame(Repr::Block(block))),
            other => Err(Frame(other)),
        }
    }

    /// The memory that an [`Allocator`](crate::Allocator) gave for it; otherwise the frame.
    ///
    /// # Errors
    ///
    /// The frame itself, if it lies elsewhere (it is short, a view, or was not received).
    pub fn into_pool_buf(self) -> Result<PoolBuf, Frame> {
        match self.0 {
            Repr::Pool(bytes) => Ok(bytes),
            other => Err(Frame(other)),
        }
    }

    /// Another handle to the same bytes, where that costs no copy; a copy for the others.
    ///
    /// # Errors
    ///
    /// As [`Frame::copy_to_slice`].
    pub fn try_clone(&self) -> Result<Frame> {
        Ok(match &self.0 {
            Repr::Bytes(bytes) => Frame(Repr::Bytes(bytes.clone())),
            Repr::Block(block) => Frame(Repr::Block(block.clone())),
            Repr::View(_) => Frame::from(self.to_vec()?),
            _ => Frame::copy_from_slice(self.as_slice().unwrap_or_default()),
        })
    }

    /// What a link needs to know. For an inline frame the pointer is into `self`.
    pub(crate) fn segment(&self) -> Segment<'_> {
        if let Repr::Block(block) = &self.0 {
            let (ptr, len) = (block.as_slice().as_ptr(), block.len());
            return Segment { ptr, len, kind: MemoryKind::Shared, shared: Some(block) };
        }
        debug_assert!(!self.is_view(), "views are copied before they are sent");
        Segment::host(self.as_slice().unwrap_or_default())
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.0 {
            Repr::Inline { .. } => "inline",
            Repr::Heap(_) => "heap",
            Repr::Pool(_) => "pool",
            Repr::Bytes(_) => "bytes",
            Repr::Block(_) => "loan",
            Repr::View(_) => "view",
        };
        write!(f, "Frame({} bytes, {kind})", self.len())
    }
}

impl From<Bytes> for Frame {
    fn from(bytes: Bytes) -> Self {
        Frame(Repr::Bytes(bytes))
    }
}

impl From<BytesMut> for Frame {
    fn from(bytes: BytesMut) -> Self {
        Frame(Repr::Bytes(bytes.freeze()))
    }
}

impl From<Vec<u8>> for Frame {
    fn from(bytes: Vec<u8>) -> Self {
        Frame(Repr::Bytes(bytes.into()))
    }
}

impl From<String> for Frame {
    fn from(text: String) -> Self {
        Frame(Repr::Bytes(text.into()))
    }
}

impl From<&'static [u8]> for Frame {
    fn from(bytes: &'static [u8]) -> Self {
        Frame(Repr::Bytes(Bytes::from_static(bytes)))
    }
}

impl<const N: usize> From<&'static [u8; N]> for Frame {
    fn from(bytes: &'static [u8; N]) -> Self {
        Frame::from(bytes.as_slice())
    }
}

impl From<&'static str> for Frame {
    fn from(text: &'static str) -> Self {
        Frame::from(text.as_bytes())
    }
}

impl From<PoolBuf> for Frame {
    fn from(bytes: PoolBuf) -> Self {
        Frame(Repr::Pool(bytes))
    }
}

impl From<Loan> for Frame {
    fn from(loan: Loan) -> Self {
        Frame(Repr::Block(loan.into_block()))
    }
}

/// What one `send` carries and one `recv` yields: an ordered list of [`Frame`]s, possibly none.
///
/// ```
/// use thalweg::Message;
/// let mut message = Message::copy_from_slice(b"header");
/// message.push(vec![0u8; 1000]);
/// assert_eq!((message.frame_count(), message.len_bytes()), (2, 1006));
/// ```
#[derive(Debug, Default)]
pub struct Message {
    frames: SmallVec<[Frame; 1]>,
}

impl Message {
    /// A message without frames.
    pub fn new() -> Self {
        Message::default()
    }

    /// One frame, copied; without allocation up to [`INLINE_MAX`] bytes.
    #[inline]
    pub fn copy_from_slice(bytes: &[u8]) -> Self {
        Message::from(Frame::copy_from_slice(bytes))
    }

    /// Adds a frame at the end.
    pub fn push(&mut self, frame: impl Into<Frame>) {
        self.frames.push(frame.into());
    }

    /// The frames.
    #[inline]
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// The frames, to change.
    pub fn frames_mut(&mut self) -> &mut [Frame] {
        &mut self.frames
    }

    /// Copies the frames that lie in a peer's memory, which may take it back at any time, into
    /// memory of this process.
    pub(crate) fn own_views(&mut self, allocate: impl Fn(usize) -> Option<Frame>) -> Result<()> {
        for frame in self.frames.iter_mut().filter(|frame| frame.is_view()) {
            let mut own = allocate(frame.len()).ok_or_else(|| {
                let detail = format!("no memory for a copy of {} bytes", frame.len());
                Error::new(ErrorKind::Resources, Phase::Transfer, detail)
            })?;
            if let Some(bytes) = own.as_mut_slice() {
                frame.copy_to_slice(bytes)?;
            }
            *frame = own;
        }
        Ok(())
    }

    /// The frames, owned.
    pub fn into_frames(self) -> impl ExactSizeIterator<Item = Frame> {
        self.frames.into_iter()
    }

    /// How many frames.
    #[inline]
    pub fn frame_count(&self) -> usize {
        self.frames.len()
    }

    /// The sum of the frames' lengths, in bytes.
    #[inline]
    pub fn len_bytes(&self) -> usize {
        match self.frames() {
            [one] => one.len(),
            all => all.iter().map(Frame::len).sum(),
        }
    }

    /// The bytes of a message of one inline frame: most of small traffic.
    #[inline(always)]
    pub(crate) fn short(&self) -> Option<&[u8]> {
        match self.frames() {
            [Frame(Repr::Inline { len, data })] => Some(&data.0[..usize::from(*len)]),
            _ => None,
        }
    }

    /// What it is charged under credit.
    #[inline]
    pub(crate) fn cost(&self) -> u64 {
        match self.short() {
            Some(bytes) => message_cost(bytes.len() as u64, 1),
            None => message_cost(self.len_bytes() as u64, self.frame_count() as u32),
        }
    }

    /// Whether some of it lies in a peer's memory.
    #[inline]
    pub(crate) fn has_views(&self) -> bool {
        match self.frames() {
            [one] => one.is_view(),
            all => all.iter().any(Frame::is_view),
        }
    }

    /// All bytes, one frame after the other, in fresh memory.
    ///
    /// # Errors
    ///
    /// As [`Frame::copy_to_slice`].
    pub fn to_vec(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.len_bytes()];
        let mut at = 0;
        for frame in &self.frames {
            frame.copy_to_slice(&mut bytes[at..at + frame.len()])?;
            at += frame.len();
        }
        Ok(bytes)
    }

    /// Another message with the same bytes; shared frames (`Bytes`, loans) are not copied, so one
    /// buffer can be sent to many endpoints.
    ///
    /// # Errors
    ///
    /// As [`Frame::copy_to_slice`].
    pub fn try_clone(&self) -> Result<Message> {
        self.frames.iter().map(Frame::try_clone).collect()
    }
}

impl<F: Into<Frame>> From<F> for Message {
    #[inline]
    fn from(frame: F) -> Self {
        let mut frames = SmallVec::new();
        frames.push(frame.into());
        Message { frames }
    }
}

impl From<Vec<Bytes>> for Message {
    fn from(frames: Vec<Bytes>) -> Self {
        frames.into_iter().map(Frame::from).collect()
    }
}

impl From<Vec<Frame>> for Message {
    fn from(frames: Vec<Frame>) -> Self {
        frames.into_iter().collect()
    }
}

impl FromIterator<Frame> for Message {
    fn from_iter<I: IntoIterator<Item = Frame>>(frames: I) -> Self {
        Message { frames: frames.into_iter().collect() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_frame_is_one_cache_line() {
        assert_eq!(std::mem::size_of::<Frame>(), 64);
    }

    #[test]
    fn short_frames_are_inline_and_long_ones_are_not() {
        assert!(Frame::copy_from_slice(&[1; INLINE_MAX]).is_inline());
        assert!(!Frame::copy_from_slice(&[1; INLINE_MAX + 1]).is_inline());
    }

    struct Peer {
        keeps: bool,
    }

    impl crate::link::Mapping for Peer {
        fn trusted(&self) -> bool {
            self.keeps
        }
    }

    #[test]
    fn a_view_is_copied_only_while_the_sender_keeps_it() {
        static BYTES: [u8; 100] = [7; 100];
        for keeps in [true, false] {
            let keep = Arc::new(Peer { keeps });
            let raw = RawView { ptr: BYTES.as_ptr(), len: BYTES.len(), keep };
            let frame = Frame::view(raw, Lease::detached());
            match frame.to_vec() {
                Ok(bytes) => assert!(keeps && bytes == BYTES),
                Err(error) => {
                    assert!(!keeps);
                    assert_eq!(error.kind(), ErrorKind::ConnectionLost);
                }
            }
        }
    }

    #[test]
    fn ranges_are_checked() {
        let frame = Frame::copy_from_slice(b"abcdef");
        let mut two = [0; 2];
        frame.copy_range(4, &mut two).expect("in range");
        assert_eq!(&two, b"ef");
        for offset in [5, 6, usize::MAX] {
            let error = frame.copy_range(offset, &mut two).expect_err("out of range");
            assert_eq!(error.kind(), ErrorKind::OutOfBounds);
        }
    }
}
