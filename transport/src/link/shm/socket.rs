//! Small messages with descriptors over a Unix socket of packets.
//!
//! Every packet holds one message; a descriptor that comes uninvited is closed. No call blocks,
//! whatever the flags of the descriptor say.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use smallvec::SmallVec;

/// The longest message.
pub(super) const PACKET_MAX: usize = 256;
/// Most descriptors in one message.
pub(super) const FDS_MAX: usize = 1;

/// A received message.
pub(super) struct Packet {
    bytes: [u8; PACKET_MAX],
    len: usize,
    pub fds: SmallVec<[OwnedFd; FDS_MAX]>,
}

impl Packet {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Sends one message, whole or not at all; never blocks, never raises a signal.
pub(super) fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let sent = sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, flags)?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives one message, or `None` at the end. Never blocks.
pub(super) fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<Packet>> {
    let mut packet = Packet { bytes: [0; PACKET_MAX], len: 0, fds: SmallVec::new() };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let mut slices = [IoSliceMut::new(&mut packet.bytes)];
    let got = match recvmsg(socket, &mut slices, &mut ancillary, flags) {
        // Told once, when the peer has gone and left something unread; what it sent comes after.
        Err(Errno::CONNRESET) => recvmsg(socket, &mut slices, &mut ancillary, flags)?,
        got => got?,
    };
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            packet.fds.extend(fds);
        }
    }
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a packet too long"));
    }
    if got.bytes == 0 {
        return Ok(None);
    }
    packet.len = got.bytes;
    Ok(Some(packet))
}
