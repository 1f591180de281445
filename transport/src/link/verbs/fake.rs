//! A libibverbs for tests, in this process: devices that do what a test says. Reads are carried out
//! when they are posted; sends and receives end when the test says so, and how.

use std::collections::{HashMap, VecDeque};
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use thalweg_ffi::ibverbs::{
    self as ffi, _compat_ibv_port_attr, Functions, Verbs, ibv_async_event, ibv_comp_channel,
    ibv_context, ibv_cq, ibv_device, ibv_device_attr, ibv_event_type, ibv_gid, ibv_mr, ibv_pd,
    ibv_qp, ibv_qp_attr, ibv_qp_init_attr, ibv_recv_wr, ibv_send_wr, ibv_wc, ibv_wc_status,
};

use super::blob::{Fabric, Port, Terms};
use super::buffers::RECEIVES;
use super::device::{Device, Domain, LocalPort};
use super::messenger::Messenger;
use super::pool::Pool;
use super::queues::{Lane, Queues, Remote};
use super::rails::Rail;
use super::wire::{HEADER_BYTES, Header};

/// What a request may carry.
pub(super) const INLINE_BYTES: u32 = 64;
/// The vendor's code of every completion that a test makes.
pub(super) const VENDOR: u32 = 77;

/// Devices call nothing by the same key.
static DEVICES: AtomicU32 = AtomicU32::new(1);
/// Keys of one device.
const KEYS: u32 = 1 << 16;

/// What a peer calls memory by that is registered under this key.
pub(super) fn remote_key(local_key: u32) -> u32 {
    local_key | 1
}

/// What a device has been told, and what it is to answer.
#[derive(Default)]
pub(super) struct State {
    /// What the destruction of a queue pair answers.
    pub destroying: c_int,
    /// What posting answers.
    pub posting: c_int,
    /// Longer pieces are not registered.
    pub registers_max: Option<usize>,
    /// How often that was said.
    pub unregistered: usize,
    /// What of all devices may still be registered, in bytes.
    pub lockable: Option<Arc<Mutex<usize>>>,
    /// What is registered: its key, beginning, length and access.
    pub registered: Vec<(u32, usize, usize, c_int)>,
    /// In which domain, by key.
    domains: HashMap<u32, usize>,
    /// What the end of a registration answers.
    pub deregistering: c_int,
    /// How often that was asked for.
    pub deregistrations: usize,
    /// The queue pairs of the one link that there is.
    pairs: Vec<usize>,
    /// Requests of puts and gets that have not ended.
    pub reaching: VecDeque<Reaching>,
    /// They end when the test says so, and not at once.
    pub holds_reaching: bool,
    /// One was refused: those behind it are flushed.
    refused: bool,
    /// Reads for messages that have not ended.
    pub reads: VecDeque<Reading>,
    /// They end when the test says so, and not at once.
    pub holds_reads: bool,
    /// Nobody answers a request for more bytes.
    pub answers_max: Option<usize>,
    /// What is read is something else.
    pub garbles: bool,
    /// The only key that the peer's memory is read by.
    pub reads_by: Option<u32>,
    /// Requests of puts and gets that were posted.
    pub requests: usize,
    /// The queues that somebody wants to be told of.
    pub notified: Vec<usize>,
    /// How often something was.
    pub registrations: usize,
    /// What each queue pair may be used for.
    pub access: Vec<c_uint>,
    /// Sends that have not ended: request, message.
    pub sent: VecDeque<(u64, Vec<u8>)>,
    /// Markers that have not arrived: requests.
    pub markers: VecDeque<u64>,
    /// They arrive when the test says so, and not at once.
    pub holds_markers: bool,
    /// Room for the peer's markers.
    marked: VecDeque<u64>,
    /// Buffers for messages: request, address.
    pub receives: VecDeque<(u64, u64)>,
    queues: Vec<usize>,
    completions: HashMap<usize, VecDeque<ibv_wc>>,
    events: VecDeque<(ibv_event_type, u64)>,
    keys: u32,
    /// Below all of its keys.
    first_key: u32,
}

/// A request of the queue pair that puts and gets. The peer's end is this device's own: the fourth
/// queue pair of the same link.
#[derive(Clone)]
pub(super) struct Reaching {
    id: u64,
    pub writes: bool,
    pub inline: bool,
    local: usize,
    local_key: u32,
    pub bytes: usize,
    pub remote: u64,
    pub remote_key: u32,
    /// What is carried within it.
    carried: Vec<u8>,
}

impl State {
    /// One of the two completion queues.
    pub fn queue(&self, which: usize) -> usize {
        self.queues[which]
    }

    /// Whether a local key of a pair's domain covers this memory with all of these rights.
    fn allows(&self, pair: usize, key: u32, at: usize, bytes: usize, rights: c_uint) -> bool {
        let pair = self.pairs[pair] as *const ibv_qp;
        // SAFETY: a pair of ours; the tests end no link before its requests.
        let domain = unsafe { (*pair).pd } as usize;
        self.registered.iter().any(|(known, start, len, access)| {
            *known == key
                && self.domains[known] == domain
                && *start <= at
                && at + bytes <= start + len
                && *access as c_uint & rights == rights
        })
    }

    /// The request that was posted before all others ends.
    fn end_reaching(&mut self, status: ibv_wc_status) {
        let posted = self.reaching.pop_front().expect("something is put or got");
        let Reaching { id, writes, inline, local, local_key, bytes, .. } = posted;
        let Reaching { remote, remote_key, carried, .. } = posted;
        let kept = inline || self.allows(2, local_key, local, bytes, 0);
        assert!(kept, "memory of a request is registered no more");
        let right = if writes { ffi::IBV_ACCESS_REMOTE_WRITE } else { ffi::IBV_ACCESS_REMOTE_READ };
        let mut status = status;
        if self.refused {
            status = ffi::IBV_WC_WR_FLUSH_ERR;
        } else if remote_key & 1 == 0
            || !self.allows(3, remote_key & !1, remote as usize, bytes, right)
        {
            status = ffi::IBV_WC_REM_ACCESS_ERR;
        }
        self.refused |= status != ffi::IBV_WC_SUCCESS;
        if status == ffi::IBV_WC_SUCCESS {
            let carried = (!carried.is_empty()).then_some(carried.as_ptr());
            let here = carried.unwrap_or(local as *const u8);
            let there = remote as *mut u8;
            let (from, to) = if writes { (here, there) } else { (there.cast_const(), local as _) };
            // SAFETY: registered on both sides, or carried within the request.
            unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
        }
        let queue = self.queues[1];
        self.completions.entry(queue).or_default().push_back(completion(id, status, bytes));
    }
}

/// A read for a message.
#[derive(Clone, Copy)]
pub(super) struct Reading {
    id: u64,
    pair: usize,
    queue: usize,
    key: u32,
    from: u64,
    to: usize,
    pub bytes: usize,
}

impl State {
    fn is_writable(&self, key: u32, at: usize, bytes: usize) -> bool {
        self.registered.iter().any(|(known, start, len, access)| {
            *known == key
                && *start <= at
                && at + bytes <= start + len
                && *access as u32 & ffi::IBV_ACCESS_LOCAL_WRITE != 0
        })
    }

    /// A marker that was held ends.
    fn end_marker(&mut self, status: ibv_wc_status) {
        let id = self.markers.pop_front().expect("a marker was posted");
        let queue = self.queues[1];
        self.completions.entry(queue).or_default().push_back(completion(id, status, 0));
    }

    /// A read that was held ends.
    fn end_read(&mut self, read: &Reading, status: ibv_wc_status) {
        let Reading { id, queue, key, from, to, bytes, .. } = *read;
        if bytes > 0 {
            assert!(self.is_writable(key, to, bytes), "memory of a read is registered no more");
            if status == ffi::IBV_WC_SUCCESS {
                // SAFETY: the test's peer is the test; what is read into is the reader's.
                unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
                if self.garbles {
                    let last = (to + bytes - 1) as *mut u8;
                    // SAFETY: the last byte of what was read into.
                    unsafe { last.write(last.read() ^ 1) };
                }
            }
        }
        self.completions.entry(queue).or_default().push_back(completion(id, status, bytes));
    }
}

#[repr(C)]
struct Context {
    raw: ibv_context,
    state: Mutex<State>,
}

/// A device.
pub(super) struct Fake {
    context: &'static Context,
    pub device: Arc<Device>,
    pub pool: Arc<Pool>,
    /// Of its port, in units of 100 Mb/s.
    pub rate: u16,
}

// SAFETY: the pointers within are to what is never freed and guarded by the mutex.
unsafe impl Sync for Context {}

/// # Safety
///
/// `raw` is a context of [`Fake::new`]'s.
unsafe fn state(raw: *mut ibv_context) -> MutexGuard<'static, State> {
    // SAFETY: the caller's; it is the first field of what is never freed.
    let context = unsafe { &*raw.cast::<Context>() };
    context.state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn boxed<T>(change: impl FnOnce(&mut T)) -> *mut T {
    // SAFETY: zero is valid for all of libibverbs's structs.
    let mut made = Box::new(unsafe { std::mem::zeroed() });
    change(&mut made);
    Box::into_raw(made)
}

fn refuse<T>(code: c_int) -> *mut T {
    set_errno(code);
    std::ptr::null_mut()
}

fn set_errno(code: c_int) {
    // SAFETY: this thread's own.
    unsafe { *libc::__errno_location() = code };
}

fn nonblocking_event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("an eventfd")
}

extern "C" fn text(_: u32) -> *const c_char {
    c"as the test says".as_ptr()
}

extern "C" fn no_list(_: *mut c_int) -> *mut *mut ibv_device {
    refuse(libc::ENOSYS)
}

extern "C" fn free_list(_: *mut *mut ibv_device) {}

extern "C" fn no_name(_: *mut ibv_device) -> *const c_char {
    std::ptr::null()
}

extern "C" fn no_device(_: *mut ibv_device) -> *mut ibv_context {
    refuse(libc::ENOSYS)
}

extern "C" fn close_device(_: *mut ibv_context) -> c_int {
    0
}

unsafe extern "C" fn get_async_event(raw: *mut ibv_context, to: *mut ibv_async_event) -> c_int {
    // SAFETY: a context of ours, and a struct to write.
    unsafe {
        match state(raw).events.pop_front() {
            Some((kind, element)) => {
                (*to).event_type = kind;
                (*to).element._bindgen_opaque_blob = element;
                0
            }
            None => {
                set_errno(libc::EAGAIN);
                -1
            }
        }
    }
}

extern "C" fn ack_async_event(_: *mut ibv_async_event) {}

unsafe extern "C" fn query_device(_: *mut ibv_context, to: *mut ibv_device_attr) -> c_int {
    // SAFETY: a struct to write.
    let to = unsafe { &mut *to };
    (to.max_qp_wr, to.max_cqe, to.phys_port_cnt) = (1024, 4096, 1);
    (to.max_qp_rd_atom, to.max_qp_init_rd_atom) = (16, 16);
    0
}

extern "C" fn no_port(_: *mut ibv_context, _: u8, _: *mut _compat_ibv_port_attr) -> c_int {
    libc::ENOSYS
}

extern "C" fn no_gid(_: *mut ibv_context, _: u8, _: c_int, _: *mut ibv_gid) -> c_int {
    -1
}

extern "C" fn alloc_pd(raw: *mut ibv_context) -> *mut ibv_pd {
    boxed(|pd: &mut ibv_pd| pd.context = raw)
}

unsafe extern "C" fn dealloc_pd(pd: *mut ibv_pd) -> c_int {
    // SAFETY: made above, and given back once.
    drop(unsafe { Box::from_raw(pd) });
    0
}

unsafe extern "C" fn reg_mr(
    pd: *mut ibv_pd,
    ptr: *mut c_void,
    bytes: usize,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: a domain of ours.
    let context = unsafe { (*pd).context };
    // SAFETY: a context of ours.
    let mut state = unsafe { state(context) };
    if state.registers_max.is_some_and(|max| bytes > max) {
        state.unregistered += 1;
        return refuse(libc::ENOMEM);
    }
    if let Some(lockable) = &state.lockable {
        let mut lockable = lockable.lock().unwrap_or_else(PoisonError::into_inner);
        match lockable.checked_sub(bytes) {
            Some(rest) => *lockable = rest,
            None => return refuse(libc::ENOMEM),
        }
    }
    state.keys += 1;
    state.registrations += 1;
    assert!(state.keys < KEYS / 2, "another device's keys");
    let key = state.first_key + 2 * state.keys;
    state.registered.push((key, ptr as usize, bytes, access));
    state.domains.insert(key, pd as usize);
    boxed(|mr: &mut ibv_mr| (mr.context, mr.lkey, mr.rkey) = (context, key, remote_key(key)))
}

unsafe extern "C" fn dereg_mr(mr: *mut ibv_mr) -> c_int {
    // SAFETY: made above.
    let (context, key) = unsafe { ((*mr).context, (*mr).lkey) };
    // SAFETY: a context of ours.
    let mut state = unsafe { state(context) };
    state.deregistrations += 1;
    if state.deregistering == 0 {
        // SAFETY: made above, and given back once.
        drop(unsafe { Box::from_raw(mr) });
        let at = state.registered.iter().position(|(known, ..)| *known == key);
        let (.., bytes, _) = state.registered.remove(at.expect("registered"));
        if let Some(lockable) = &state.lockable {
            *lockable.lock().unwrap_or_else(PoisonError::into_inner) += bytes;
        }
    }
    state.deregistering
}

extern "C" fn create_channel(raw: *mut ibv_context) -> *mut ibv_comp_channel {
    let fd = nonblocking_event().into_raw_fd();
    boxed(|channel: &mut ibv_comp_channel| (channel.context, channel.fd) = (raw, fd))
}

unsafe extern "C" fn destroy_channel(channel: *mut ibv_comp_channel) -> c_int {
    // SAFETY: made above, and given back once.
    let channel = unsafe { Box::from_raw(channel) };
    // SAFETY: the channel's own.
    drop(unsafe { OwnedFd::from_raw_fd(channel.fd) });
    0
}

unsafe extern "C" fn create_cq(
    raw: *mut ibv_context,
    _: c_int,
    _: *mut c_void,
    channel: *mut ibv_comp_channel,
    _: c_int,
) -> *mut ibv_cq {
    let queue = boxed(|queue: &mut ibv_cq| (queue.context, queue.channel) = (raw, channel));
    // SAFETY: a context of ours.
    unsafe { state(raw) }.queues.push(queue as usize);
    queue
}

unsafe extern "C" fn destroy_cq(queue: *mut ibv_cq) -> c_int {
    // SAFETY: made above, and given back once.
    drop(unsafe { Box::from_raw(queue) });
    0
}

extern "C" fn no_event(
    _: *mut ibv_comp_channel,
    _: *mut *mut ibv_cq,
    _: *mut *mut c_void,
) -> c_int {
    set_errno(libc::EAGAIN);
    -1
}

extern "C" fn ack_events(_: *mut ibv_cq, _: c_uint) {}

unsafe extern "C" fn create_qp(pd: *mut ibv_pd, wanted: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    // SAFETY: a domain of ours, and a struct to read and write.
    let (context, wanted) = unsafe { ((*pd).context, &mut *wanted) };
    wanted.cap.max_inline_data = INLINE_BYTES;
    let pair = boxed(|pair: &mut ibv_qp| {
        (pair.context, pair.pd, pair.qp_num) = (context, pd, 1);
        (pair.send_cq, pair.recv_cq) = (wanted.send_cq, wanted.recv_cq);
    });
    // SAFETY: a context of ours.
    unsafe { state(context) }.pairs.push(pair as usize);
    pair
}

unsafe extern "C" fn modify_qp(pair: *mut ibv_qp, to: *mut ibv_qp_attr, mask: c_int) -> c_int {
    // SAFETY: a pair of ours, and a struct to read.
    unsafe {
        if mask as u32 & ffi::IBV_QP_ACCESS_FLAGS != 0 {
            state((*pair).context).access.push((*to).qp_access_flags);
        }
    }
    0
}

unsafe extern "C" fn destroy_qp(pair: *mut ibv_qp) -> c_int {
    // SAFETY: a pair of ours.
    let mut state = unsafe { state((*pair).context) };
    let code = state.destroying;
    if code == 0 {
        // Nothing that it was at ends any more, or touches memory.
        state.reads.retain(|read| read.pair != pair as usize);
        // SAFETY: made above, and given back once.
        drop(unsafe { Box::from_raw(pair) });
    }
    code
}

extern "C" fn fork_init() -> c_int {
    0
}

fn completion(id: u64, status: ibv_wc_status, bytes: usize) -> ibv_wc {
    // SAFETY: zero is valid for every field.
    let mut completion: ibv_wc = unsafe { std::mem::zeroed() };
    (completion.wr_id, completion.status) = (id, status);
    (completion.vendor_err, completion.byte_len) = (VENDOR, bytes as u32);
    completion
}

unsafe extern "C" fn poll_cq(queue: *mut ibv_cq, count: c_int, into: *mut ibv_wc) -> c_int {
    // SAFETY: a queue of ours.
    let mut state = unsafe { state((*queue).context) };
    let completions = state.completions.entry(queue as usize).or_default();
    let count = completions.len().min(count as usize);
    for (at, completion) in completions.drain(..count).enumerate() {
        // SAFETY: room for as many.
        unsafe { into.add(at).write(completion) };
    }
    count as c_int
}

unsafe extern "C" fn notify(queue: *mut ibv_cq, _: c_int) -> c_int {
    // SAFETY: a queue of ours.
    unsafe { state((*queue).context) }.notified.push(queue as usize);
    0
}

unsafe extern "C" fn post_recv(
    pair: *mut ibv_qp,
    request: *mut ibv_recv_wr,
    _: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: a pair of ours, and a request to read.
    let (mut state, request) = unsafe { (state((*pair).context), &*request) };
    if request.num_sge == 0 {
        state.marked.push_back(request.wr_id);
        return 0;
    }
    // SAFETY: a request with one piece.
    let piece = unsafe { &*request.sg_list };
    state.receives.push_back((request.wr_id, piece.addr));
    0
}

unsafe extern "C" fn post_send(
    pair: *mut ibv_qp,
    request: *mut ibv_send_wr,
    _: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: a pair of ours, and a request to read.
    let (which, pair, request) = unsafe { (pair as usize, &*pair, &*request) };
    // SAFETY: a context of ours.
    let mut state = unsafe { state(pair.context) };
    if state.posting != 0 {
        return state.posting;
    }
    if request.opcode == ffi::IBV_WR_SEND && request.num_sge == 0 {
        assert_eq!(state.pairs[1], which, "a marker has to follow the reads");
        state.markers.push_back(request.wr_id);
        if !state.holds_markers {
            state.end_marker(ffi::IBV_WC_SUCCESS);
        }
        return 0;
    }
    // SAFETY: any other request has one piece.
    let piece = unsafe { &*request.sg_list };
    let (at, bytes) = (piece.addr as usize, piece.length as usize);
    if state.pairs.iter().position(|known| *known == which) == Some(2) {
        let writes = request.opcode == ffi::IBV_WR_RDMA_WRITE;
        let inline = request.send_flags & ffi::IBV_SEND_INLINE != 0;
        let right = if writes { 0 } else { ffi::IBV_ACCESS_LOCAL_WRITE };
        assert!(inline || state.allows(2, piece.lkey, at, bytes, right), "not registered for it");
        let mut carried = Vec::new();
        if inline {
            assert!(writes && bytes <= INLINE_BYTES as usize, "not to be carried");
            // SAFETY: what is carried is valid for reads now.
            carried
                .extend_from_slice(unsafe { std::slice::from_raw_parts(at as *const u8, bytes) });
        }
        // SAFETY: a write or read: its part of the union is set.
        let (remote, remote_key) = unsafe { (request.wr.rdma.remote_addr, request.wr.rdma.rkey) };
        let (id, local) = (request.wr_id, at);
        let local_key = piece.lkey;
        let posted =
            Reaching { id, writes, inline, local, local_key, bytes, remote, remote_key, carried };
        state.reaching.push_back(posted);
        state.requests += 1;
        if !state.holds_reaching {
            state.end_reaching(ffi::IBV_WC_SUCCESS);
        }
        return 0;
    }
    if request.opcode == ffi::IBV_WR_SEND {
        // SAFETY: what is sent is valid for reads.
        let message = unsafe { std::slice::from_raw_parts(at as *const u8, bytes) }.to_vec();
        state.sent.push_back((request.wr_id, message));
        return 0;
    }
    let key = piece.lkey;
    assert!(bytes == 0 || state.is_writable(key, at, bytes), "not registered to be read into");
    assert_eq!(request.num_sge, c_int::from(bytes > 0));
    // SAFETY: a read: its part of the union is set.
    let (from, by) = unsafe { (request.wr.rdma.remote_addr, request.wr.rdma.rkey) };
    assert!(state.reads_by.is_none_or(|key| key == by), "read by another device's key");
    let (id, queue) = (request.wr_id, pair.send_cq as usize);
    let read = Reading { id, pair: which, queue, key, from, to: at, bytes };
    if state.holds_reads || state.answers_max.is_some_and(|max| bytes > max) {
        state.reads.push_back(read);
    } else {
        state.end_read(&read, ffi::IBV_WC_SUCCESS);
    }
    0
}

fn library() -> &'static Verbs {
    Box::leak(Box::new(Verbs {
        functions: Functions {
            ibv_wc_status_str: text,
            ibv_get_device_list: no_list,
            ibv_free_device_list: free_list,
            ibv_get_device_name: no_name,
            ibv_open_device: no_device,
            ibv_close_device: close_device,
            ibv_get_async_event: get_async_event,
            ibv_ack_async_event: ack_async_event,
            ibv_query_device: query_device,
            ibv_query_port: no_port,
            ibv_query_gid: no_gid,
            ibv_alloc_pd: alloc_pd,
            ibv_dealloc_pd: dealloc_pd,
            ibv_reg_mr: reg_mr,
            ibv_dereg_mr: dereg_mr,
            ibv_create_comp_channel: create_channel,
            ibv_destroy_comp_channel: destroy_channel,
            ibv_create_cq: create_cq,
            ibv_destroy_cq: destroy_cq,
            ibv_get_cq_event: no_event,
            ibv_ack_cq_events: ack_events,
            ibv_create_qp: create_qp,
            ibv_modify_qp: modify_qp,
            ibv_destroy_qp: destroy_qp,
            ibv_fork_init: fork_init,
            ibv_port_state_str: text,
            ibv_event_type_str: text,
        },
        reg_dmabuf_mr: None,
        path: "in this process".into(),
    }))
}

impl Fake {
    /// A device with one port.
    pub fn new() -> Fake {
        Fake::named("fake0")
    }

    pub fn named(name: &str) -> Fake {
        // SAFETY: zero is valid for every field.
        let mut raw: ibv_context = unsafe { std::mem::zeroed() };
        raw.cmd_fd = nonblocking_event().into_raw_fd();
        raw.async_fd = nonblocking_event().into_raw_fd();
        raw.ops.poll_cq = Some(poll_cq);
        raw.ops.req_notify_cq = Some(notify);
        raw.ops.post_send = Some(post_send);
        raw.ops.post_recv = Some(post_recv);
        let first_key = DEVICES.fetch_add(1, Ordering::Relaxed).wrapping_mul(KEYS);
        let state = State { first_key, ..State::default() };
        let context = &*Box::leak(Box::new(Context { raw, state: Mutex::new(state) }));
        let raw = (&raw const *context).cast_mut().cast();
        let (name, file_name) = (name.to_owned(), "uverbs9".to_owned());
        // SAFETY: a context that is never freed.
        let device = unsafe { Device::of_context(library(), raw, name, file_name) };
        let device = Arc::new(device.expect("a device"));
        let domain = Domain::new(&device).expect("a domain");
        let pool = Arc::new(Pool::new(&domain));
        Fake { context, device, pool, rate: 1000 }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.context.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn port(&self) -> LocalPort {
        let gid = std::net::Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets();
        let (rate, distance) = (self.rate, 10);
        let port = Port { fabric: Fabric::RoceV2, mtu: 5, lid: 0, gid, rate, distance, whose: 0 };
        LocalPort { device: self.device.clone(), number: 1, gid_index: 0, port }
    }

    /// Queues that are connected to what the test plays.
    pub fn messenger(&self) -> Messenger {
        let port = self.port();
        let mut messenger = Messenger::new(&self.pool, &port, 1).expect("queues");
        let (ports, queue_pairs, receives) = ((0, 0), [5, 6, 7, 8], RECEIVES as u16);
        let (first_packet, rails, trial_ms) = (1, Vec::new(), 0);
        let reads = 8;
        let terms = Terms { ports, queue_pairs, first_packet, receives, reads, trial_ms, rails };
        messenger.connect(port.port, &terms).expect("connected");
        messenger
    }

    /// The queues of a further rail at a port of this device, connected to what the test plays: a
    /// port with this rate.
    pub fn rail_queues(&self, port: &LocalPort, rate: u16) -> Queues {
        let mut queues = Rail::queues(self.pool.domain(), port).expect("queues");
        let to = Port { rate, ..port.port };
        let remote = Remote { port: to, queue_pair: 9, first_packet: 1, reads: 8 };
        queues.connect(Lane::Reads, 1, &remote).expect("connected");
        queues
    }

    /// Of the reads that have not ended, the one that was posted before all others ends. How long it
    /// was.
    pub fn end_read(&self, status: ibv_wc_status) -> usize {
        let mut state = self.state();
        let read = state.reads.pop_front().expect("something is read");
        state.end_read(&read, status);
        read.bytes
    }

    /// A message of the peer's comes. It has to have a buffer.
    pub fn deliver(&self, header: Header, body: &[u8]) {
        let mut state = self.state();
        let (id, at) = state.receives.pop_front().expect("the receiver was ready");
        let message = [&header.encode()[..], body].concat();
        // SAFETY: a buffer that was posted for it.
        unsafe { std::ptr::copy_nonoverlapping(message.as_ptr(), at as *mut u8, message.len()) };
        let done = completion(id, ffi::IBV_WC_SUCCESS, message.len());
        let queue = state.queues[0];
        state.completions.entry(queue).or_default().push_back(done);
    }

    /// The marker that is under way ends.
    pub fn end_marker(&self, status: ibv_wc_status) {
        self.state().end_marker(status);
    }

    /// A marker of the peer's comes. There has to be room for it.
    pub fn deliver_marker(&self) {
        let mut state = self.state();
        let id = state.marked.pop_front().expect("there is room");
        let queue = state.queues[0];
        let done = completion(id, ffi::IBV_WC_SUCCESS, 0);
        state.completions.entry(queue).or_default().push_back(done);
    }

    /// The send that was posted before all others ends. What it was.
    pub fn end_send(&self, status: ibv_wc_status) -> (Header, Vec<u8>) {
        let mut state = self.state();
        let (id, message) = state.sent.pop_front().expect("something was sent");
        let queue = state.queues[1];
        state.completions.entry(queue).or_default().push_back(completion(id, status, 0));
        let header = Header::decode(&message).expect("a header");
        (header, message[HEADER_BYTES..].to_vec())
    }

    /// The request of a put or get that was posted before all others ends, if it is within what is
    /// registered.
    pub fn end_reaching(&self, status: ibv_wc_status) {
        self.state().end_reaching(status);
    }

    /// It says something by itself.
    pub fn say(&self, event: ibv_event_type) {
        self.say_of(event, 0);
    }

    /// The same, about one of its ports or queue pairs.
    pub fn say_of(&self, event: ibv_event_type, element: u64) {
        self.state().events.push_back((event, element));
        rustix::io::write(self.device.events(), &1u64.to_ne_bytes()).expect("an edge");
    }

    /// The descriptor of its events.
    pub fn events(&self) -> OwnedFd {
        self.device.events().as_fd().try_clone_to_owned().expect("another number for it")
    }
}
