//! Devices: opening them, their ports, protection domains, registered memory.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use thalweg_ffi::ibverbs::{self as ffi, Verbs, ibv_context, ibv_device, ibv_mr, ibv_pd};

use super::blob::{Fabric, Port};
use super::topology;
use crate::runtime::{ForkGuard, Tracked};

/// Why this node cannot use verbs at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unusable {
    /// libibverbs is not here, or not of use.
    Library { reason: String, fix: String },
    /// It was in use when this process was forked off.
    Forked,
    /// The kernel knows no device.
    NoDevice,
    /// None of the devices that were named is here.
    NotNamed { named: Vec<String>, here: Vec<String> },
    /// Some that were named are not here.
    NotHere { named: Vec<String> },
    /// The kernel knows devices, but libibverbs has no driver for them.
    NoProvider { devices: Vec<String> },
    /// This user may not open it.
    NoPermission { device: String, error: String },
    /// No port of any device is up.
    PortDown { ports: String },
    /// This process may not lock the memory that it wants to register.
    MemoryLock { limit_bytes: Option<u64> },
    /// Something else went wrong.
    Failed { what: String },
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unusable::Library { reason, .. } => f.write_str(reason),
            Unusable::Forked => {
                f.write_str("libibverbs was in use when this process was forked off")
            }
            Unusable::NoDevice => f.write_str("the kernel knows no RDMA device"),
            Unusable::NotNamed { named, here } => write!(
                f,
                "none of the devices named by THALWEG_VERBS_DEVICES ({}) is here; there is {}",
                named.join(", "),
                here.join(", ")
            ),
            Unusable::NotHere { named } => {
                write!(f, "{}: named by THALWEG_VERBS_DEVICES, not here", named.join(", "))
            }
            Unusable::NoProvider { devices } => {
                write!(f, "libibverbs has no driver for {}", devices.join(", "))
            }
            Unusable::NoPermission { device, error } => {
                write!(f, "{device} cannot be opened: {error}")
            }
            Unusable::PortDown { ports } => write!(f, "no port is up: {ports}"),
            Unusable::MemoryLock { limit_bytes: Some(limit) } => {
                write!(f, "memory cannot be registered: RLIMIT_MEMLOCK is {limit} bytes")
            }
            Unusable::MemoryLock { limit_bytes: None } => {
                f.write_str("memory cannot be registered: the system lacks memory to lock")
            }
            Unusable::Failed { what } => f.write_str(what),
        }
    }
}

impl Unusable {
    /// What would help, where that is known.
    pub fn fix(&self) -> Option<String> {
        let fix = match self {
            Unusable::Library { fix, .. } => return Some(fix.clone()),
            Unusable::Forked => "start processes by spawn, or use verbs in children only",
            Unusable::NoDevice => {
                "load the driver of the adapter; for tests without one: modprobe rdma_rxe, then \
                 rdma link add rxe0 type rxe netdev NAME"
            }
            Unusable::NotNamed { .. } | Unusable::NotHere { .. } => {
                "correct or unset THALWEG_VERBS_DEVICES"
            }
            Unusable::NoProvider { .. } => {
                "install the drivers (Debian: ibverbs-providers; Fedora: libibverbs)"
            }
            Unusable::NoPermission { .. } => {
                "let this user open /dev/infiniband/uverbs* (in a container: pass these devices)"
            }
            Unusable::PortDown { .. } => {
                "set the interface up and give it an address (ip link, ip address; InfiniBand: a \
                 subnet manager must run)"
            }
            Unusable::MemoryLock { limit_bytes: Some(_) } => {
                "raise the limit of locked memory (ulimit -l unlimited; systemd: LimitMEMLOCK)"
            }
            Unusable::MemoryLock { limit_bytes: None } | Unusable::Failed { .. } => return None,
        };
        Some(fix.to_owned())
    }
}

/// What a call of libibverbs says went wrong. Drivers disagree about the sign.
pub(super) fn os_error(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code.saturating_abs())
}

/// Whether this may be how the kernel says that the device is no more.
pub(super) fn is_removed(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::ENODEV | libc::ENXIO))
}

/// What a device says by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// It is no more, or works no more.
    DeviceGone { why: String },
    /// One of its queue pairs is broken.
    QueuePair { which: u64, why: String },
    /// One of its ports is down. It may come back, and retries find out by then: the first rail of a
    /// link waits for that, further ones do not.
    PortDown { port: u8, why: String },
    /// Nothing that ends anything.
    Other,
}

/// The port that an event is about, as its number lies in the union with queue pairs' addresses.
fn port_of(element: u64) -> u8 {
    let [a, b, c, d, ..] = element.to_ne_bytes();
    u8::try_from(i32::from_ne_bytes([a, b, c, d])).unwrap_or(0)
}

/// An open device.
pub(super) struct Device {
    pub verbs: &'static Verbs,
    raw: *mut ibv_context,
    pub name: String,
    /// Of its file in `/dev/infiniband`.
    pub file_name: String,
    pub limits: Limits,
    fork: ForkGuard,
    /// It was heard to be gone.
    gone: AtomicBool,
    /// `None` while it is being closed.
    tracked: Option<[Tracked; 2]>,
}

// SAFETY: libibverbs may be used from any thread.
unsafe impl Send for Device {}
// SAFETY: as above, by several at a time.
unsafe impl Sync for Device {}

/// What a device can do, as far as it matters here.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub queue_depth: u32,
    pub completions: u32,
    /// Reads that it answers, and reads that it issues, on one queue pair at a time.
    pub reads_answered: u8,
    pub reads_issued: u8,
    pub ports: u8,
}

/// Why a device was not opened. libibverbs looks in several places, and does not say what was wrong
/// with the first.
fn refused(device: String, file_name: &str, error: &io::Error) -> Unusable {
    let file = format!("/dev/infiniband/{file_name}");
    match std::fs::File::options().read(true).write(true).open(&file) {
        Ok(_) => Unusable::Failed { what: format!("opening {device}: {error}") },
        Err(error) => Unusable::NoPermission { device, error: format!("{file}: {error}") },
    }
}

/// Of the devices that were named, those that are not here.
fn missing(wanted: &[String], here: &[String]) -> Option<Unusable> {
    let named: Vec<_> = wanted.iter().filter(|name| !here.contains(name)).cloned().collect();
    (!named.is_empty()).then_some(Unusable::NotHere { named })
}

/// The list of devices, given back when dropped.
struct List {
    verbs: &'static Verbs,
    raw: *mut *mut ibv_device,
    count: usize,
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: made by `ibv_get_device_list`, given back once; open devices stay.
        unsafe { (self.verbs.functions.ibv_free_device_list)(self.raw) };
    }
}

impl Device {
    /// Opens every device that may be used; `wanted` names them, or is empty, and `except` names
    /// those that are left alone. Beside them: what keeps others from being used.
    pub fn open_all(
        verbs: &'static Verbs,
        wanted: &[String],
        except: &[String],
    ) -> Result<(Vec<Arc<Device>>, Vec<Unusable>), Unusable> {
        let mut here = ffi::kernel_devices();
        here.retain(|name| !except.contains(name));
        if here.is_empty() {
            return Err(Unusable::NoDevice);
        }
        let may =
            |name: &String| !except.contains(name) && (wanted.is_empty() || wanted.contains(name));
        if !here.iter().any(may) {
            return Err(Unusable::NotNamed { named: wanted.to_vec(), here });
        }
        let mut count = 0;
        // SAFETY: writes the count, gives a list of that length or null.
        let raw = unsafe { (verbs.functions.ibv_get_device_list)(&raw mut count) };
        if raw.is_null() {
            let what = format!("listing devices: {}", io::Error::last_os_error());
            return Err(Unusable::Failed { what });
        }
        let list = List { verbs, raw, count: usize::try_from(count).unwrap_or(0) };
        let mut open = Vec::new();
        let mut others: Vec<_> = missing(wanted, &here).into_iter().collect();
        for at in 0..list.count {
            // SAFETY: within the list.
            let device = unsafe { *list.raw.add(at) };
            // SAFETY: an entry of a live list; the name is copied.
            let name = unsafe { CStr::from_ptr((verbs.functions.ibv_get_device_name)(device)) };
            let name = name.to_string_lossy().into_owned();
            if !may(&name) {
                continue;
            }
            match Device::open(verbs, device, name) {
                Ok(device) => open.push(Arc::new(device)),
                Err(unusable) => others.push(unusable),
            }
        }
        if !open.is_empty() {
            return Ok((open, others));
        }
        let is_here = |unusable: &Unusable| !matches!(unusable, Unusable::NotHere { .. });
        Err(others.into_iter().rfind(is_here).unwrap_or(Unusable::NoProvider { devices: here }))
    }

    fn open(
        verbs: &'static Verbs,
        device: *mut ibv_device,
        name: String,
    ) -> Result<Device, Unusable> {
        // SAFETY: an entry of a live list.
        let raw = unsafe { (verbs.functions.ibv_open_device)(device) };
        // SAFETY: an entry of a live list; the library ends the name with a zero.
        let file_name = unsafe { CStr::from_ptr((&raw const (*device).dev_name).cast()) };
        let file_name = file_name.to_string_lossy().into_owned();
        if raw.is_null() {
            let error = io::Error::last_os_error();
            return Err(refused(name, &file_name, &error));
        }
        // SAFETY: opened above, and handed on.
        unsafe { Device::of_context(verbs, raw, name, file_name) }
    }

    /// # Safety
    ///
    /// `raw` is an open context, which is given away.
    pub(super) unsafe fn of_context(
        verbs: &'static Verbs,
        raw: *mut ibv_context,
        name: String,
        file_name: String,
    ) -> Result<Device, Unusable> {
        // SAFETY: a live context.
        let (command, events) = unsafe { ((*raw).cmd_fd, (*raw).async_fd) };
        let limits =
            Limits { queue_depth: 0, completions: 0, reads_answered: 1, reads_issued: 1, ports: 0 };
        let tracked = [Tracked::new(command), Tracked::new(events)];
        // From here on it is closed if something fails.
        let mut device = Device {
            verbs,
            raw,
            name,
            file_name,
            limits,
            fork: ForkGuard::get(),
            gone: AtomicBool::new(false),
            tracked: Some(tracked),
        };
        set_nonblocking(device.events())
            .map_err(|error| Unusable::Failed { what: format!("events of a device: {error}") })?;
        // SAFETY: zero is valid for every field, and the call fills them in.
        let mut attributes: ffi::ibv_device_attr = unsafe { std::mem::zeroed() };
        // SAFETY: a live context, and a struct to write.
        let code = unsafe { (verbs.functions.ibv_query_device)(raw, &raw mut attributes) };
        if code != 0 {
            let what = format!("asking {}: {}", device.name, os_error(code));
            return Err(Unusable::Failed { what });
        }
        let count = |number: i32| u32::try_from(number).unwrap_or(0);
        let small = |number: i32| number.clamp(1, 128) as u8;
        device.limits = Limits {
            queue_depth: count(attributes.max_qp_wr),
            completions: count(attributes.max_cqe),
            reads_answered: small(attributes.max_qp_rd_atom),
            reads_issued: small(attributes.max_qp_init_rd_atom),
            ports: attributes.phys_port_cnt,
        };
        Ok(device)
    }

    pub fn raw(&self) -> *mut ibv_context {
        self.raw
    }

    /// The descriptor that becomes readable with an event.
    pub fn events(&self) -> BorrowedFd<'_> {
        // SAFETY: open for as long as the context lives, which `self` owns.
        unsafe { BorrowedFd::borrow_raw((*self.raw).async_fd) }
    }

    /// Takes one event. `WouldBlock`: there is none.
    pub fn take_event(&self) -> io::Result<Event> {
        // SAFETY: zero is valid for every field, and the call fills them in.
        let mut event: ffi::ibv_async_event = unsafe { std::mem::zeroed() };
        let functions = &self.verbs.functions;
        // SAFETY: a live context, and a struct to write.
        if unsafe { (functions.ibv_get_async_event)(self.raw, &raw mut event) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: every bit pattern is a number.
        let which = unsafe { event.element._bindgen_opaque_blob };
        let kind = event.event_type;
        // At once: what an event is about can be destroyed only when it is acknowledged.
        // SAFETY: the event that was taken.
        unsafe { (functions.ibv_ack_async_event)(&raw mut event) };
        let why = || format!("{}: {} (event {kind})", self.name, self.verbs.describe_event(kind));
        Ok(match kind {
            ffi::IBV_EVENT_DEVICE_FATAL => {
                self.set_gone();
                Event::DeviceGone { why: why() }
            }
            ffi::IBV_EVENT_QP_FATAL | ffi::IBV_EVENT_QP_REQ_ERR | ffi::IBV_EVENT_QP_ACCESS_ERR => {
                Event::QueuePair { which, why: why() }
            }
            // A completion queue that is broken tells nobody of anything any more.
            ffi::IBV_EVENT_CQ_ERR => Event::DeviceGone { why: why() },
            ffi::IBV_EVENT_PORT_ERR => Event::PortDown { port: port_of(which), why: why() },
            _ => Event::Other,
        })
    }

    pub fn forked(&self) -> bool {
        self.fork.forked()
    }

    /// It was heard to be gone.
    pub fn set_gone(&self) {
        self.gone.store(true, Ordering::Release);
    }

    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Whether an object that could not be destroyed went with the device. `EIO` says so only of a
    /// device that was heard to be gone: drivers have it for failures of the firmware's too, and
    /// then the object is still there.
    pub fn took_along(&self, error: &io::Error) -> bool {
        self.is_no_more(error) || error.raw_os_error() == Some(libc::EIO) && self.is_gone()
    }

    /// Whether there was no device any more to destroy an object of.
    pub fn is_no_more(&self, error: &io::Error) -> bool {
        let gone = matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO));
        if gone {
            self.set_gone();
        }
        gone
    }

    /// What the kernel says of a port's GID (`type`, `ndev`).
    fn gid_attribute(&self, port: u8, what: &str, index: i32) -> Option<String> {
        let path: PathBuf =
            format!("/sys/class/infiniband/{}/ports/{port}/gid_attrs/{what}/{index}", self.name)
                .into();
        std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
    }

    /// The ports that are up, once for each address of theirs; and what is said of the others.
    pub fn ports(self: &Arc<Self>) -> (Vec<LocalPort>, Vec<String>) {
        let mut up = Vec::new();
        let mut down = Vec::new();
        for number in 1..=self.limits.ports {
            match self.port(number) {
                Ok(attributes) if attributes.state == ffi::IBV_PORT_ACTIVE => {
                    let before = up.len();
                    self.addresses(number, &attributes, &mut up);
                    if up.len() == before {
                        down.push(format!("{} port {number} has no address", self.name));
                    }
                }
                Ok(attributes) => {
                    let state = self.verbs.describe_port(attributes.state);
                    down.push(format!("{} port {number} is {state}", self.name));
                }
                Err(error) => down.push(format!("{} port {number}: {error}", self.name)),
            }
        }
        (up, down)
    }

    fn port(&self, number: u8) -> io::Result<ffi::ibv_port_attr> {
        // SAFETY: zero is valid for every field.
        let mut attributes: ffi::ibv_port_attr = unsafe { std::mem::zeroed() };
        // SAFETY: a live context; the function writes the beginning of the struct, which is what
        // its own type for it covers.
        let code = unsafe {
            let query = self.verbs.functions.ibv_query_port;
            query(self.raw, number, (&raw mut attributes).cast())
        };
        if code == 0 { Ok(attributes) } else { Err(os_error(code)) }
    }

    fn addresses(
        self: &Arc<Self>,
        number: u8,
        attributes: &ffi::ibv_port_attr,
        up: &mut Vec<LocalPort>,
    ) {
        let infiniband = u32::from(attributes.link_layer) != ffi::IBV_LINK_LAYER_ETHERNET;
        let distance = topology::distance(&self.name);
        // An InfiniBand port has one address that matters, its first.
        let count = if infiniband { 1 } else { attributes.gid_tbl_len.min(256) };
        for index in 0..count {
            let mut gid = ffi::ibv_gid { raw: [0; 16] };
            // SAFETY: a live context, and a GID to write.
            let code = unsafe {
                let query = self.verbs.functions.ibv_query_gid;
                query(self.raw, number, index, &raw mut gid)
            };
            // SAFETY: every bit pattern is a GID.
            let gid = unsafe { gid.raw };
            let (Ok(index), 0) = (u8::try_from(index), code) else { continue };
            if gid[8..] == [0; 8] {
                continue;
            }
            let fabric = match self.gid_attribute(number, "types", index.into()).as_deref() {
                _ if infiniband => Fabric::InfiniBand,
                Some("RoCE v2") => Fabric::RoceV2,
                Some(_) => Fabric::RoceV1,
                None => continue,
            };
            let mtu = attributes.active_mtu.clamp(1, 5) as u8;
            let rate = topology::rate(attributes.active_speed, attributes.active_width);
            let lid = attributes.lid;
            // The node numbers its ports.
            let port = Port { fabric, mtu, lid, gid, rate, distance, whose: 0 };
            up.push(LocalPort { device: self.clone(), number, gid_index: index, port });
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // In a forked child the descriptors are closed, and the device is the parent's.
        if !self.forked() {
            // Its numbers may be another's as soon as it is closed.
            self.tracked = None;
            // SAFETY: opened once; everything made of it holds it, and is gone.
            unsafe { (self.verbs.functions.ibv_close_device)(self.raw) };
        }
    }
}

/// One address of one port of this process's.
#[derive(Clone)]
pub(super) struct LocalPort {
    pub device: Arc<Device>,
    pub number: u8,
    pub gid_index: u8,
    pub port: Port,
}

impl fmt::Display for LocalPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LocalPort { device, number, port, .. } = self;
        write!(f, "{}:{number} (", device.name)?;
        match (port.fabric, port.ip()) {
            (Fabric::InfiniBand, _) => write!(f, "InfiniBand, LID {}", port.lid)?,
            (_, Some(ip)) => write!(f, "RoCE v2, {ip}")?,
            (_, None) => write!(f, "RoCE v1")?,
        }
        write!(f, ", MTU {})", 128 << port.mtu)
    }
}

/// A protection domain: what is registered in it can be used by its queue pairs only.
pub(super) struct Domain {
    pub device: Arc<Device>,
    raw: *mut ibv_pd,
}

// SAFETY: libibverbs may be used from any thread.
unsafe impl Send for Domain {}
// SAFETY: as above, by several at a time.
unsafe impl Sync for Domain {}

impl Domain {
    pub fn new(device: &Arc<Device>) -> io::Result<Arc<Domain>> {
        // SAFETY: a live context.
        let raw = unsafe { (device.verbs.functions.ibv_alloc_pd)(device.raw) };
        if raw.is_null() {
            return Err(io::Error::last_os_error());
        }
        Ok(Arc::new(Domain { device: device.clone(), raw }))
    }

    pub fn raw(&self) -> *mut ibv_pd {
        self.raw
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        if !self.device.forked() {
            // SAFETY: made once; everything made of it holds it, and is gone.
            unsafe { (self.device.verbs.functions.ibv_dealloc_pd)(self.raw) };
        }
    }
}

/// What others may do with registered memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// The device writes it, for this process.
    Local,
    /// The peer may read it; the device writes it too, for this process.
    LocalAndRead,
    /// The peer may read it.
    Read,
    /// The device reads it, for this process.
    Source,
    /// The peer reaches it in these directions. The device may write it for this process, too: only
    /// where memory is registered for writing do pages that are not there yet become its own.
    Reachable { read: bool, write: bool },
}

impl Access {
    fn flags(self) -> ffi::ibv_access_flags {
        match self {
            Access::Source => 0,
            Access::Local => ffi::IBV_ACCESS_LOCAL_WRITE,
            Access::LocalAndRead => ffi::IBV_ACCESS_LOCAL_WRITE | ffi::IBV_ACCESS_REMOTE_READ,
            Access::Read => ffi::IBV_ACCESS_REMOTE_READ,
            Access::Reachable { read, write } => {
                let allowed = |is: bool, flag| if is { flag } else { 0 };
                ffi::IBV_ACCESS_LOCAL_WRITE
                    | allowed(read, ffi::IBV_ACCESS_REMOTE_READ)
                    | allowed(write, ffi::IBV_ACCESS_REMOTE_WRITE)
            }
        }
    }
}

/// Memory that the device may touch. Registered until dropped.
pub(super) struct Registered {
    domain: Arc<Domain>,
    raw: *mut ibv_mr,
    pub bytes: usize,
}

// SAFETY: libibverbs may be used from any thread.
unsafe impl Send for Registered {}
// SAFETY: as above; only keys are read.
unsafe impl Sync for Registered {}

impl Registered {
    pub fn is_in(&self, domain: &Arc<Domain>) -> bool {
        Arc::ptr_eq(&self.domain, domain)
    }

    /// Pins the pages. They stay what they are for the device even if the memory is unmapped, so
    /// a registration must not outlive the memory's use for what it was registered for.
    pub fn new(
        domain: &Arc<Domain>,
        ptr: *const u8,
        bytes: usize,
        access: Access,
    ) -> io::Result<Registered> {
        // SAFETY: a live domain. The kernel checks the range; registering changes no byte, and
        // what may be written later is decided by what is posted.
        let raw = unsafe {
            let register = domain.device.verbs.functions.ibv_reg_mr;
            register(domain.raw, ptr.cast_mut().cast(), bytes, access.flags() as i32)
        };
        if raw.is_null() {
            return Err(io::Error::last_os_error());
        }
        Ok(Registered { domain: domain.clone(), raw, bytes })
    }

    /// The key for requests of this process; 0 once it has ended.
    pub fn local_key(&self) -> u32 {
        // SAFETY: live until ended, and null from then on.
        unsafe { self.raw.as_ref() }.map_or(0, |registered| registered.lkey)
    }

    /// The key for the peer's requests; 0 once it has ended.
    pub fn remote_key(&self) -> u32 {
        // SAFETY: as above.
        unsafe { self.raw.as_ref() }.map_or(0, |registered| registered.rkey)
    }
}

impl Registered {
    pub fn device(&self) -> &Device {
        &self.domain.device
    }

    /// Ends the registration. Over already: `Ok`. In a forked child it is the parent's, and none of
    /// this process's memory is touched.
    pub fn end(&mut self) -> io::Result<()> {
        if self.raw.is_null() || self.domain.device.forked() {
            return Ok(());
        }
        // SAFETY: registered, and not ended yet.
        let code = unsafe { (self.domain.device.verbs.functions.ibv_dereg_mr)(self.raw) };
        if code != 0 {
            return Err(os_error(code));
        }
        self.raw = std::ptr::null_mut();
        Ok(())
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::warn!(%error, bytes = self.bytes, "memory stays registered");
        }
    }
}

/// Reading from it gives `WouldBlock` from now on.
pub(super) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)?)
}

/// How much memory this process may lock; `None`: as much as it likes.
pub(super) fn memory_lock_limit() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Memlock).current
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_named_and_not_here_is_said() {
        let here = ["a".to_owned(), "b".to_owned()];
        assert_eq!(missing(&[], &here), None);
        assert_eq!(missing(&here[..1], &here), None);
        let why = missing(&["b".to_owned(), "c".to_owned()], &here).expect("c");
        assert_eq!(why.to_string(), "c: named by THALWEG_VERBS_DEVICES, not here");
        assert!(why.fix().is_some());
    }
}
