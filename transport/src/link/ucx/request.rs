//! Operations that UCX is at work on.
//!
//! Each is a box that UCX gets as a raw pointer with the request and that comes back in the
//! terminal callback, or with the call if that says there will be none. So heads, lists of segments and
//! short payloads live exactly as long as UCX may look at them. What they point to belongs to the
//! driver's table until the operation is reported done.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use thalweg_ffi::ucx::{self as ffi, Ucx, ucp_dt_iov_t, ucp_request_param_t, ucs_status_t};

use super::inbox::{Dispatch, Mailbox};
use super::wire::{HEADER_BYTES, Header, LAST_WORD, LONG_HEADER_BYTES};
use super::worker::PACKED_MAX;
use crate::link::few::copy_few;
use crate::link::{Class, OpId, Segment};

/// A message on its way out.
pub(super) struct SendOp {
    pub op: OpId,
    pub class: Class,
    /// Whether the driver waits to hear that it is done.
    pub reports: bool,
    /// The payload that it is a chunk of.
    pub chunk_of: Option<u32>,
    /// Header and head; of a parcel that leaves in one piece the payload, too.
    pub bytes: Vec<u8>,
    pub iov: Vec<ucp_dt_iov_t>,
    pub to: Option<Arc<Mailbox>>,
}

// SAFETY: the segments are descriptions of memory that the driver's table owns until the operation
// is done; none is tied to a thread.
unsafe impl Send for SendOp {}

impl SendOp {
    /// What a box keeps for the next parcel, in bytes.
    const KEPT_BYTES: usize = 4096;
    const KEPT_SEGMENTS: usize = 64;

    pub fn new() -> Box<SendOp> {
        Box::new(SendOp {
            op: OpId::NONE,
            class: Class::Control,
            reports: false,
            chunk_of: None,
            bytes: Vec::with_capacity(256),
            iov: Vec::new(),
            to: None,
        })
    }

    /// Makes it ready for the next parcel.
    #[inline]
    pub fn reset(&mut self) {
        self.bytes.clear();
        self.iov.clear();
        if self.bytes.capacity() > Self::KEPT_BYTES || self.iov.capacity() > Self::KEPT_SEGMENTS {
            self.bytes.shrink_to(Self::KEPT_BYTES);
            self.iov.shrink_to(Self::KEPT_SEGMENTS);
        }
        self.reports = false;
        self.chunk_of = None;
        self.op = OpId::NONE;
    }
}

/// A box for the next parcel that leaves in one piece, and what UCX is told with it. Most of these are
/// over at once: then it stays where it is and as it is.
pub(super) struct Packed {
    /// Made of a box, and ours. A pointer, because UCX is told of it while it is used here.
    op: NonNull<SendOp>,
    params: ucp_request_param_t,
}

// SAFETY: as of the box.
unsafe impl Send for Packed {}

impl Packed {
    /// In this box; what fails later is told to `to`.
    pub fn new(mut op: Box<SendOp>, to: &Arc<Mailbox>) -> Packed {
        op.to.get_or_insert_with(|| to.clone());
        let op = NonNull::from(Box::leak(op));
        Packed { params: send_params(op.as_ptr()), op }
    }

    /// Puts the parcel together: header, head and payload, which is `len` bytes in all its pieces.
    ///
    /// # Safety
    ///
    /// The payload is valid for reads, and as long as that.
    #[inline(always)]
    pub unsafe fn pack(
        &mut self,
        header: &Header,
        head: &[u8],
        payload: &[Segment<'_>],
        len: usize,
    ) {
        // SAFETY: the box is ours.
        let op = unsafe { self.op.as_mut() };
        op.class = header.class;
        let bytes = &mut op.bytes;
        bytes.clear();
        let short = !header.kind.is_long();
        let header_len = if short { HEADER_BYTES } else { LONG_HEADER_BYTES };
        let whole = header_len + head.len() + len;
        if whole > bytes.capacity() {
            grow(bytes, whole);
        }
        if short {
            let (first, last) = header.words();
            let to = bytes.as_mut_ptr();
            // SAFETY: there is room for `whole`.
            unsafe {
                to.cast::<u64>().write_unaligned(first.to_le());
                to.add(LAST_WORD).cast::<u64>().write_unaligned(last.to_le());
            }
        } else {
            header.append_to(bytes);
        }
        // SAFETY: there is room for `whole`; a slice is readable, and so is the payload.
        unsafe {
            let mut to = bytes.as_mut_ptr().add(header_len);
            copy_few(head.as_ptr(), to, head.len());
            to = to.add(head.len());
            for piece in payload {
                copy_few(piece.ptr, to, piece.len);
                to = to.add(piece.len);
            }
            debug_assert_eq!(to, bytes.as_mut_ptr().add(whole), "as long as it was said to be");
            bytes.set_len(whole);
        }
    }

    /// What UCX is given: the parcel, and how to send it.
    #[inline(always)]
    pub fn parts(&self) -> (*mut c_void, usize, &ucp_request_param_t) {
        // SAFETY: the box is ours.
        let bytes = unsafe { &self.op.as_ref().bytes };
        (bytes.as_ptr().cast_mut().cast(), bytes.len(), &self.params)
    }

    /// UCX has the box from now on, and the callback will free it: this one is for the next parcel.
    #[cold]
    pub fn renew(&mut self, op: Box<SendOp>, to: &Arc<Mailbox>) {
        std::mem::forget(std::mem::replace(self, Packed::new(op, to)));
    }
}

impl Drop for Packed {
    fn drop(&mut self) {
        // SAFETY: made of a box, and ours.
        drop(unsafe { Box::from_raw(self.op.as_ptr()) });
    }
}

#[cold]
fn grow(bytes: &mut Vec<u8>, whole: usize) {
    debug_assert!(whole <= PACKED_MAX, "the peer takes no longer ones");
    bytes.reserve(whole);
}

/// A flush of what was sent until it began.
pub(super) struct FlushOp {
    pub sent: u64,
    pub to: Arc<Mailbox>,
}

/// An endpoint that is being closed; keeps what its error handler may be called with.
pub(super) struct CloseOp {
    pub ucx: &'static Ucx,
    pub dispatch: Arc<Dispatch>,
    pub mailbox: Arc<Mailbox>,
}

/// What a call that may make a request came to.
pub(super) enum Begun {
    /// Over, without a request.
    Done,
    /// The callback follows.
    Pending,
    Failed(ucs_status_t),
}

/// What the pointer says that such calls return.
#[inline]
pub(super) fn begun(pointer: *mut c_void) -> Begun {
    let value = pointer as usize;
    if value == 0 {
        Begun::Done
    } else if value >= ffi::UCS_ERR_LAST as isize as usize {
        Begun::Failed(value as ucs_status_t)
    } else {
        Begun::Pending
    }
}

/// Parameters of a request with a callback and its box. Everything else is zero.
#[inline]
pub(super) fn params(user_data: *mut c_void) -> ucp_request_param_t {
    // SAFETY: zero is a valid value of every field; the mask says which are read.
    let mut params: ucp_request_param_t = unsafe { MaybeUninit::zeroed().assume_init() };
    params.op_attr_mask = ffi::UCP_OP_ATTR_FIELD_CALLBACK | ffi::UCP_OP_ATTR_FIELD_USER_DATA;
    params.user_data = user_data;
    params
}

/// Says of which kind the memory of a request is: UCX's own detection is not relied upon.
#[inline]
fn host_memory(params: &mut ucp_request_param_t) {
    params.op_attr_mask |= ffi::UCP_OP_ATTR_FIELD_MEMORY_TYPE;
    params.memory_type = ffi::UCS_MEMORY_TYPE_HOST;
}

/// Parameters of a message in this box.
#[inline]
pub(super) fn send_params(op: *mut SendOp) -> ucp_request_param_t {
    let mut params = params(op.cast());
    params.cb.send = Some(sent);
    host_memory(&mut params);
    // A receive that UCX fetches from a peer is not ended by force when that peer dies (1.13); so
    // nothing is left to be fetched by it.
    params.op_attr_mask |= ffi::UCP_OP_ATTR_FIELD_FLAGS;
    params.flags = ffi::UCP_AM_SEND_FLAG_EAGER;
    params
}

/// Sets buffer and count: one segment plainly, several as a list.
#[inline]
pub(super) fn segments(
    iov: &[ucp_dt_iov_t],
    params: &mut ucp_request_param_t,
) -> (*mut c_void, usize) {
    match iov {
        [] => (std::ptr::null_mut(), 0),
        [one] => (one.buffer, one.length),
        list => {
            params.op_attr_mask |= ffi::UCP_OP_ATTR_FIELD_DATATYPE;
            params.datatype = ffi::UCP_DATATYPE_IOV.into();
            (list.as_ptr().cast_mut().cast(), list.len())
        }
    }
}

/// Nothing unwinds into C. What a callback does cannot panic but for a bug; the process goes on.
fn shielded(body: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(body)).is_err() {
        tracing::error!("a panic in a callback of UCX's was stopped");
    }
}

/// Ends a send.
///
/// # Safety
///
/// For UCX to call, with a [`SendOp`] in flight as `user_data`.
unsafe extern "C" fn sent(request: *mut c_void, status: ucs_status_t, user_data: *mut c_void) {
    shielded(|| {
        // SAFETY: made by `Box::into_raw` when the request began; this is its one end.
        let op = unsafe { Box::from_raw(user_data.cast::<SendOp>()) };
        let Some(to) = op.to.as_deref().map(NonNull::from) else { return };
        // SAFETY: the box keeps it alive until it is dropped, which is last. (To count one more
        // reference would cost a locked instruction for each chunk, which waits for the copy of
        // the chunk to leave the processor.)
        let to = unsafe { to.as_ref() };
        // SAFETY: the request is over, and nobody else frees it.
        unsafe { (to.ucx.functions.ucp_request_free)(request) };
        // SAFETY: called back, with no other reference to what the gate guards.
        let unwanted = unsafe { to.finish(|inbox| inbox.sent(op, status)) };
        drop(unwanted);
    });
}

/// Ends a flush.
///
/// # Safety
///
/// For UCX to call, with a [`FlushOp`] in flight as `user_data`.
pub(super) unsafe extern "C" fn flushed(
    request: *mut c_void,
    _status: ucs_status_t,
    user_data: *mut c_void,
) {
    shielded(|| {
        // SAFETY: as in `sent`.
        let op = unsafe { Box::from_raw(user_data.cast::<FlushOp>()) };
        // SAFETY: as in `sent`.
        unsafe { (op.to.ucx.functions.ucp_request_free)(request) };
        // A flush that fails is followed by the error handler's call.
        // SAFETY: as in `sent`.
        unsafe {
            op.to.finish(|inbox| {
                inbox.flushing = false;
                inbox.flush_ended = true;
                inbox.flushed = op.sent;
            });
        }
    });
}

/// Ends the closing of an endpoint.
///
/// # Safety
///
/// For UCX to call, with a [`CloseOp`] in flight as `user_data`.
pub(super) unsafe extern "C" fn closed(
    request: *mut c_void,
    _status: ucs_status_t,
    user_data: *mut c_void,
) {
    shielded(|| {
        // SAFETY: as in `sent`.
        let op = unsafe { Box::from_raw(user_data.cast::<CloseOp>()) };
        // SAFETY: as in `sent`.
        unsafe { (op.ucx.functions.ucp_request_free)(request) };
        op.dispatch.ending.fetch_sub(1, Ordering::AcqRel);
        drop(op.mailbox);
    });
}

#[cfg(test)]
mod tests {
    use super::super::wire::{Address, Kind};
    use super::*;
    use crate::link::ucx::library;

    /// Packed in one go, it is what its parts are one after the other.
    #[test]
    fn a_packed_parcel_is_its_parts() {
        let ucx = match library() {
            Ok(ucx) => ucx,
            Err(absent) => {
                eprintln!("SKIPPED: a_packed_parcel_is_its_parts: {}", absent.reason);
                return;
            }
        };
        let to = Address { slot: 0x00A1_B2C3, secret: 0x12_3456_789A };
        let mailbox = Arc::<Dispatch>::default().register(ucx, to.secret, 1 << 20).expect("a slot");
        let mut packed = Packed::new(SendOp::new(), &mailbox);
        let bytes: Vec<u8> = (0..4096u32).map(|n| n as u8).collect();
        for kind in [Kind::Eager, Kind::Bulk, Kind::Ping, Kind::Pull] {
            for (head, lens) in [
                (0, &[][..]),
                (5, &[8]),
                (1, &[0]),
                (4, &[3, 4]),
                (17, &[7, 0, 16]),
                (1024, &[2000, 48]),
                (7, &[1]),
            ] {
                let header = Header {
                    id: 0x0102_0304,
                    len: 0x1122_3344_5566_7788,
                    ..Header::new(kind, Class::Tag, head as u16, 0xFEDC_BA98, to)
                };
                let (head, mut at) = (&bytes[100..100 + head], 0);
                let pieces = lens.iter().map(|len| {
                    at += len;
                    Segment::host(&bytes[at - len..at])
                });
                let pieces: Vec<_> = pieces.collect();
                // SAFETY: the pieces are parts of `bytes`.
                unsafe { packed.pack(&header, head, &pieces, at) };
                let (start, len, _) = packed.parts();
                // SAFETY: they lie in the box.
                let whole = unsafe { std::slice::from_raw_parts(start.cast::<u8>(), len) };
                let mut expected = Vec::new();
                header.append_to(&mut expected);
                expected.extend_from_slice(head);
                expected.extend_from_slice(&bytes[..at]);
                assert_eq!(whole, expected, "{kind:?}, {lens:?}");
            }
        }
    }
}
