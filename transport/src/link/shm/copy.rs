//! The two ways in which this process copies out of a peer's memory, from a read-only mapping and
//! by `process_vm_readv`; and the one in which it copies into it, by `process_vm_writev`.

use std::io;

use crate::link::SegmentMut;

use super::wire::Piece;

/// Vectors given to one call; the kernel's limit is 1024.
const VECTORS: usize = 64;

/// A position in a list of pieces.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cursor {
    index: usize,
    offset: usize,
}

impl Cursor {
    pub fn index(self) -> usize {
        self.index
    }

    pub fn offset(self) -> usize {
        self.offset
    }
}

/// Copies up to `limit` bytes from `from` to where `cursor` points in `to`, and moves the cursor.
/// Answers the bytes copied: less than `len` only if `to` ended.
///
/// # Safety
///
/// `from` must be valid for reads of `len` bytes (which a peer may change meanwhile), and every
/// segment of `to` for writes.
pub(super) unsafe fn copy_in(
    to: &[SegmentMut],
    cursor: &mut Cursor,
    from: *const u8,
    len: usize,
) -> usize {
    let mut copied = 0;
    while copied < len {
        let Some(segment) = to.get(cursor.index) else {
            break;
        };
        let take = (segment.len - cursor.offset).min(len - copied);
        // SAFETY: within `from[..len]` and within the segment, by the two minima; source and
        // destination are different mappings, or different memory of ours.
        unsafe {
            std::ptr::copy_nonoverlapping(from.add(copied), segment.ptr.add(cursor.offset), take);
        }
        copied += take;
        advance(cursor, take, |index| to.get(index).map(|segment| segment.len));
    }
    copied
}

/// Moves a cursor over pieces of the given lengths, past those that end.
pub(super) fn advance(cursor: &mut Cursor, by: usize, len_of: impl Fn(usize) -> Option<usize>) {
    cursor.offset += by;
    while let Some(len) = len_of(cursor.index) {
        if cursor.offset < len {
            break;
        }
        cursor.offset -= len;
        cursor.index += 1;
    }
}

/// Up to 64 vectors of at most `limit` bytes in all, from a cursor on.
fn vectors(
    limit: usize,
    cursor: Cursor,
    piece: impl Fn(usize) -> Option<(*mut libc::c_void, usize)>,
) -> ([libc::iovec; VECTORS], usize, usize) {
    let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
    let mut list = [empty; VECTORS];
    let (mut count, mut total) = (0, 0);
    let mut at = cursor;
    while count < VECTORS && total < limit {
        let Some((base, len)) = piece(at.index) else {
            break;
        };
        let take = (len - at.offset).min(limit - total);
        if take > 0 {
            let iov_base = base.wrapping_byte_add(at.offset);
            list[count] = libc::iovec { iov_base, iov_len: take };
            count += 1;
            total += take;
        }
        at = Cursor { index: at.index + 1, offset: 0 };
    }
    (list, count, total)
}

/// Reads at most `limit` bytes of the peer's pieces into `to`, in one system call, and moves both
/// cursors by what was read. Reads may be short. `Ok(0)` only when a list has ended.
///
/// # Safety
///
/// Every segment of `to` must be valid for writes. (The peer's addresses need not be valid for
/// anything: the kernel checks them.)
pub(super) unsafe fn read_peer(
    pid: i32,
    from: &[Piece],
    from_cursor: &mut Cursor,
    to: &[SegmentMut],
    to_cursor: &mut Cursor,
    limit: usize,
) -> io::Result<usize> {
    let (remote, remote_count, remote_total) = vectors(limit, *from_cursor, |index| {
        let piece = from.get(index)?;
        Some((piece.addr as *mut libc::c_void, piece.len as usize))
    });
    let (local, local_count, local_total) = vectors(limit, *to_cursor, |index| {
        let segment = to.get(index)?;
        Some((segment.ptr.cast(), segment.len))
    });
    if remote_total == 0 || local_total == 0 {
        return Ok(0);
    }
    // SAFETY: the local vectors lie in segments that the caller vouches for; the counts are those
    // of the arrays. With different totals the kernel stops at the shorter.
    let read = unsafe {
        libc::process_vm_readv(
            pid,
            local.as_ptr(),
            local_count as libc::c_ulong,
            remote.as_ptr(),
            remote_count as libc::c_ulong,
            0,
        )
    };
    let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
    if read == 0 {
        return Err(io::Error::from_raw_os_error(libc::EFAULT));
    }
    advance(from_cursor, read, |index| from.get(index).map(|piece| piece.len as usize));
    advance(to_cursor, read, |index| to.get(index).map(|segment| segment.len));
    Ok(read)
}

/// Writes at most `len` bytes (not 0), from `offset` on, of a payload that lies in `from` here to
/// where its pieces are in the peer's memory, in one system call. Writes may be short, but never
/// answer 0.
///
/// # Safety
///
/// Every piece of `from` must be valid for reads. (The peer's addresses need not be valid for
/// anything: the kernel checks them.)
pub(super) unsafe fn write_peer(
    pid: i32,
    from: &[Piece],
    to: &[Piece],
    offset: u64,
    len: u64,
) -> io::Result<u64> {
    let start = |pieces: &[Piece]| {
        let mut cursor = Cursor::default();
        advance(&mut cursor, offset as usize, |at| pieces.get(at).map(|piece| piece.len as usize));
        cursor
    };
    let of = |pieces: &[Piece]| {
        vectors(len as usize, start(pieces), |index| {
            let piece = pieces.get(index)?;
            let start = std::ptr::with_exposed_provenance_mut(piece.addr as usize);
            Some((start, piece.len as usize))
        })
    };
    let (local, local_count, _) = of(from);
    let (remote, remote_count, _) = of(to);
    // SAFETY: the local vectors lie in pieces that the caller vouches for; the counts are those of
    // the arrays. With different totals the kernel stops at the shorter.
    let written = unsafe {
        libc::process_vm_writev(
            pid,
            local.as_ptr(),
            local_count as libc::c_ulong,
            remote.as_ptr(),
            remote_count as libc::c_ulong,
            0,
        )
    };
    match u64::try_from(written) {
        Ok(0) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        Ok(written) => Ok(written),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Reads exactly `into.len()` bytes at `addr` of the peer.
pub(super) fn read_peer_bytes(pid: i32, addr: u64, into: &mut [u8]) -> io::Result<()> {
    let from = [Piece { addr, len: into.len() as u64 }];
    let to = [SegmentMut {
        ptr: into.as_mut_ptr(),
        len: into.len(),
        kind: crate::memory::MemoryKind::Host,
    }];
    let (mut from_cursor, mut to_cursor) = (Cursor::default(), Cursor::default());
    let mut left = into.len();
    while left > 0 {
        // SAFETY: `to` is exactly `into`, borrowed exclusively for this call.
        left -= unsafe { read_peer(pid, &from, &mut from_cursor, &to, &mut to_cursor, left)? };
    }
    Ok(())
}
