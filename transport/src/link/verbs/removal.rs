//! What the kernel says of devices that are taken away.
//!
//! Most drivers tell every user of a device of its end. Others, soft-RoCE among them, wait until
//! nobody uses it any more, and say nothing: it goes on working, and whoever removes it hangs. The
//! kernel's announcements of changes to devices (uevents) tell of both.

use std::io;
use std::mem::MaybeUninit;
use std::task::Poll;

use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

use crate::link::lookout::Look;
use crate::runtime::{Fd, Interest, Reactor, Source};

/// The kernel's own announcements, as opposed to those of a device manager.
const KERNEL_GROUP: u32 = 1;
/// The longest that the kernel makes: 2 KiB of variables behind a path.
const ANNOUNCEMENT_BYTES_MAX: usize = 8 << 10;

/// Where the kernel announces changes to devices.
pub(super) struct Removals(Source);

impl Removals {
    /// Fails where this is not permitted; then only drivers tell.
    pub fn new(reactor: &Reactor) -> io::Result<Removals> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            Some(netlink::KOBJECT_UEVENT),
        )?;
        bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
        reactor.source(Fd::new(socket), Interest::Read).map(Removals)
    }

    /// The next announcement: the file name of a device that is being removed, or `None` if it is
    /// about something else. Pending: there are no more.
    pub fn poll(&self, look: &mut Look<'_, '_>) -> Poll<io::Result<Option<String>>> {
        look.read(&self.0, |fd| {
            let mut buffer = [const { MaybeUninit::<u8>::uninit() }; ANNOUNCEMENT_BYTES_MAX];
            let received = recv(fd, &mut buffer[..], RecvFlags::empty());
            match received {
                Ok(((bytes, _), _)) => Ok(removed(bytes).map(str::to_owned)),
                // Some were lost, which is no end of it.
                Err(rustix::io::Errno::NOBUFS) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
    }
}

/// Of an announcement that a device of libibverbs's is being removed, the device's file name.
fn removed(announcement: &[u8]) -> Option<&str> {
    let mut parts = announcement.split(|byte| *byte == 0);
    let is_removal = parts.next()?.starts_with(b"remove@");
    let find = |name: &[u8]| {
        let mut parts = announcement.split(|byte| *byte == 0);
        parts.find_map(|part| part.strip_prefix(name))
    };
    if !is_removal || find(b"SUBSYSTEM=")? != b"infiniband_verbs" {
        return None;
    }
    std::str::from_utf8(find(b"DEVNAME=")?.strip_prefix(b"infiniband/")?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removals_of_devices_are_found() {
        let text = |action: &str, subsystem: &str| {
            format!(
                "{action}@/devices/virtual/infiniband_verbs/uverbs2\0ACTION={action}\0\
                 SUBSYSTEM={subsystem}\0MAJOR=231\0DEVNAME=infiniband/uverbs2\0SEQNUM=1\0"
            )
        };
        assert_eq!(removed(text("remove", "infiniband_verbs").as_bytes()), Some("uverbs2"));
        assert_eq!(removed(text("add", "infiniband_verbs").as_bytes()), None);
        assert_eq!(removed(text("remove", "net").as_bytes()), None);
        assert_eq!(removed(b""), None);
        assert_eq!(removed(b"remove@/x\0SUBSYSTEM=infiniband_verbs\0DEVNAME=\xff\0"), None);
    }
}
