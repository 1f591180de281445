//! The queues of one link at one port: reliable connected queue pairs, the completion queues that
//! they share, the channel that tells of completions.
//!
//! At its first port a link has four pairs; at others, which help with long payloads, it has only the
//! one that reads. One pair carries messages both ways. Another one reads the peer's memory for messages: a long
//! read does not hold up messages there. The third one puts and gets, and its other end is the
//! peer's fourth, in a protection domain of its own; so a key that is refused takes neither of the
//! others down, and what one peer was granted no other one can reach.
//!
//! A completion queue has room for everything that can be posted to it, which is counted here: it
//! cannot overflow.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use thalweg_ffi::ibverbs::{
    self as ffi, ibv_comp_channel, ibv_cq, ibv_qp, ibv_recv_wr, ibv_send_wr, ibv_sge, ibv_wc,
};

use super::blob::{Fabric, Port};
use super::device::{Device, Domain, Limits, LocalPort, os_error, set_nonblocking};
use super::watchdog::{Finding, Looks};
use crate::runtime::Tracked;

/// Completions taken at a time.
pub(super) const BATCH: usize = 16;

/// How long an unacknowledged packet waits before it is sent again: 4.096 µs · 2^16 = 268 ms.
const TIMEOUT: u8 = 16;
/// How often, before the connection counts as lost. The largest number, 7, is seven times for
/// adapters, and for ever for the kernel's soft-RoCE.
const RETRIES: u8 = 6;
/// A receiver that is not ready is waited for as long as it takes. It does not happen: there is a
/// buffer for every message that may be sent.
const RECEIVER_RETRIES: u8 = 7;
/// 0.64 ms.
const RECEIVER_TIMER: u8 = 12;
const HOPS_MAX: u8 = 64;

/// Which of the two completion queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Messages that have come.
    Receive = 0,
    /// Sends and reads of this side's that have ended.
    Send = 1,
}

/// Which of the queue pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    Messages = 0,
    /// Reads what the peer has offered, and is read by it.
    Reads = 1,
    /// Puts and gets of this side's.
    Reach = 2,
    /// Those of the peer's: this side posts nothing.
    Reached = 3,
}

impl Lane {
    pub const COUNT: usize = 4;
    pub const ALL: [Lane; Lane::COUNT] = [Lane::Messages, Lane::Reads, Lane::Reach, Lane::Reached];

    /// The peer's end of it.
    pub fn other_end(self) -> Lane {
        match self {
            Lane::Messages | Lane::Reads => self,
            Lane::Reach => Lane::Reached,
            Lane::Reached => Lane::Reach,
        }
    }

    /// What the peer may do by it.
    fn access(self) -> ffi::ibv_access_flags {
        match self {
            Lane::Messages | Lane::Reach => 0,
            Lane::Reads => ffi::IBV_ACCESS_REMOTE_READ,
            Lane::Reached => ffi::IBV_ACCESS_REMOTE_READ | ffi::IBV_ACCESS_REMOTE_WRITE,
        }
    }
}

/// What requests are counted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Receive = 0,
    Send = 1,
    Read = 2,
    Reach = 3,
    /// A send of no bytes behind reads; see `markers`.
    Marker = 4,
    /// Room for one of the peer's.
    Marked = 5,
}

impl What {
    /// Those that this side waits for the end of; room for the peer's is not among them.
    const REQUESTS: [What; 4] = [What::Send, What::Read, What::Reach, What::Marker];

    /// Where they are posted.
    fn lane(self) -> Lane {
        match self {
            What::Receive | What::Send => Lane::Messages,
            What::Read | What::Marker | What::Marked => Lane::Reads,
            What::Reach => Lane::Reach,
        }
    }
}

/// A request to write or read memory of the peer's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rdma {
    pub writes: bool,
    /// Memory of this side's.
    pub local: *mut u8,
    pub local_key: u32,
    pub bytes: u32,
    pub remote: u64,
    pub remote_key: u32,
    /// What is written is copied into the request.
    pub inline: bool,
}

/// How a queue pair is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Receives can be posted.
    Initial,
    /// Both directions work.
    Connected,
    /// It is gone.
    Destroyed,
}

/// A completion, as far as it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Completion {
    pub id: u64,
    pub status: ffi::ibv_wc_status,
    pub vendor: u32,
    pub bytes: usize,
}

/// Numbers of requests that may be under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Depths {
    pub receives: u32,
    pub sends: u32,
    pub reads: u32,
    /// Requests for puts and gets.
    pub reaches: u32,
    /// Markers of the peer's. Where there may be some, this side posts them as well, one at a time.
    pub markers: u32,
}

impl Depths {
    fn own_markers(&self) -> u32 {
        self.markers.min(1)
    }

    /// Requests that end in the completion queue for what comes.
    fn received(&self) -> u32 {
        self.receives + self.markers
    }

    /// Requests that end in the completion queue for what this side posts.
    fn posted(&self) -> u32 {
        self.sends + self.reads + self.reaches + self.own_markers()
    }
}

/// What the peer says of its end of a queue pair.
#[derive(Clone, Copy, Debug)]
pub(super) struct Remote {
    pub port: Port,
    pub queue_pair: u32,
    pub first_packet: u32,
    /// Reads that it answers at a time.
    pub reads: u8,
}

struct Pair {
    raw: *mut ibv_qp,
    state: State,
    looks: Looks,
}

impl Pair {
    fn new(raw: *mut ibv_qp, state: State) -> Pair {
        Pair { raw, state, looks: Looks::default() }
    }
}

/// The queues of one link.
pub(super) struct Queues {
    domain: Arc<Domain>,
    /// What the peer may reach lies in this one; without the lane for that, it is the other again.
    reached: Arc<Domain>,
    port: LocalPort,
    channel: *mut ibv_comp_channel,
    completions: [*mut ibv_cq; 2],
    pairs: [Pair; Lane::COUNT],
    depths: Depths,
    /// Requests whose completions have not been taken, by [`What`].
    under_way: [u32; 6],
    /// The queue will tell the channel of its next completion.
    armed: [bool; 2],
    /// Events of the queue that have been taken and not acknowledged.
    unacknowledged: [u32; 2],
    /// What a message, and what a put may carry within the request.
    max_inline_bytes: [u32; 2],
    /// The rate of the slower one of the two ports, in units of 100 Mb/s; 0: not known.
    rate: u16,
    tracked: Option<Tracked>,
}

// SAFETY: libibverbs may be used from any thread, and each call here has `self` to itself or only
// asks.
unsafe impl Send for Queues {}

fn null_error<T>(raw: *mut T) -> io::Result<*mut T> {
    if raw.is_null() { Err(io::Error::last_os_error()) } else { Ok(raw) }
}

fn check(code: i32) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(os_error(code)) }
}

impl Queues {
    /// Makes them at a port, a pair for each of these lanes; receives can be posted afterwards.
    /// `inline_bytes`: what a send should be able to carry within the request.
    pub fn new(
        domain: &Arc<Domain>,
        port: &LocalPort,
        lanes: &[Lane],
        depths: Depths,
        inline_bytes: u32,
    ) -> io::Result<Queues> {
        let Limits { queue_depth, completions, .. } = domain.device.limits;
        let Depths { receives, sends, reads, reaches, markers } = depths;
        let deepest = [receives, sends, reads + depths.own_markers(), reaches, markers];
        let too_deep = deepest.into_iter().any(|depth| depth > queue_depth);
        if too_deep || depths.received().max(depths.posted()) > completions {
            return Err(io::Error::other("the device has queues that are too short"));
        }
        let reached = match lanes.contains(&Lane::Reached) {
            true => Domain::new(&domain.device)?,
            false => domain.clone(),
        };
        let destroyed = || Pair::new(std::ptr::null_mut(), State::Destroyed);
        // From here on, what has been made is ended if the next step fails.
        let mut queues = Queues {
            domain: domain.clone(),
            reached,
            port: port.clone(),
            channel: std::ptr::null_mut(),
            completions: [std::ptr::null_mut(); 2],
            pairs: [(); Lane::COUNT].map(|()| destroyed()),
            depths,
            under_way: [0; 6],
            armed: [false; 2],
            unacknowledged: [0; 2],
            max_inline_bytes: [0; 2],
            rate: port.port.rate,
            tracked: None,
        };
        let device = domain.device.clone();
        let functions = &device.verbs.functions;
        // SAFETY: a live context.
        queues.channel = null_error(unsafe { (functions.ibv_create_comp_channel)(device.raw()) })?;
        queues.tracked = Some(Tracked::new(queues.channel_fd()));
        set_nonblocking(queues.descriptor())?;
        for (side, room) in [depths.received(), depths.posted()].into_iter().enumerate() {
            // SAFETY: a live context and channel; `null` is the context that events carry.
            let made = unsafe {
                let create = functions.ibv_create_cq;
                create(device.raw(), room.max(1) as i32, std::ptr::null_mut(), queues.channel, 0)
            };
            queues.completions[side] = null_error(made)?;
        }
        for lane in lanes.iter().copied() {
            queues.pairs[lane as usize] = queues.make(lane, inline_bytes)?;
        }
        Ok(queues)
    }

    /// A queue pair that takes receives.
    fn make(&mut self, lane: Lane, inline: u32) -> io::Result<Pair> {
        let Depths { receives, sends, reads, reaches, markers } = self.depths;
        let (sends, receives, inline) = match lane {
            Lane::Messages => (sends, receives, inline),
            Lane::Reads => (reads + self.depths.own_markers(), markers, 0),
            Lane::Reach => (reaches, 0, inline),
            // One that could post nothing at all is not everybody's.
            Lane::Reached => (1, 0, 0),
        };
        let domain = if lane == Lane::Reached { &self.reached } else { &self.domain };
        let domain = domain.raw();
        // SAFETY: zero is valid for every field.
        let mut wanted: ffi::ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        wanted.send_cq = self.completions[Side::Send as usize];
        wanted.recv_cq = self.completions[Side::Receive as usize];
        wanted.qp_type = ffi::IBV_QPT_RC;
        wanted.cap.max_send_wr = sends;
        wanted.cap.max_recv_wr = receives;
        wanted.cap.max_send_sge = 1;
        wanted.cap.max_recv_sge = u32::from(receives > 0);
        wanted.cap.max_inline_data = inline;
        let create = self.device().verbs.functions.ibv_create_qp;
        // SAFETY: a live domain and queues; the struct is read, and what is granted written to it.
        let mut raw = unsafe { create(domain, &raw mut wanted) };
        if raw.is_null() && inline > 0 {
            wanted.cap.max_inline_data = 0;
            // SAFETY: as above.
            raw = unsafe { create(domain, &raw mut wanted) };
        }
        let raw = null_error(raw)?;
        match lane {
            Lane::Messages => self.max_inline_bytes[0] = wanted.cap.max_inline_data,
            Lane::Reach => self.max_inline_bytes[1] = wanted.cap.max_inline_data,
            Lane::Reads | Lane::Reached => {}
        }
        let pair = Pair::new(raw, State::Initial);
        // SAFETY: zero is valid for every field; the mask says which are read.
        let mut attributes: ffi::ibv_qp_attr = unsafe { std::mem::zeroed() };
        attributes.qp_state = ffi::IBV_QPS_INIT;
        attributes.port_num = self.port.number;
        attributes.qp_access_flags = lane.access();
        let mask = ffi::IBV_QP_STATE
            | ffi::IBV_QP_PKEY_INDEX
            | ffi::IBV_QP_PORT
            | ffi::IBV_QP_ACCESS_FLAGS;
        if let Err(error) = self.modify(raw, &mut attributes, mask) {
            // SAFETY: made above, and used by nobody.
            unsafe { (self.device().verbs.functions.ibv_destroy_qp)(raw) };
            return Err(error);
        }
        Ok(pair)
    }

    fn modify(
        &self,
        raw: *mut ibv_qp,
        attributes: &mut ffi::ibv_qp_attr,
        mask: ffi::ibv_qp_attr_mask,
    ) -> io::Result<()> {
        // SAFETY: a live queue pair, and a struct whose masked fields are set.
        check(unsafe {
            (self.device().verbs.functions.ibv_modify_qp)(raw, &raw mut *attributes, mask as i32)
        })
    }

    pub fn device(&self) -> &Arc<Device> {
        &self.domain.device
    }

    pub fn port(&self) -> &LocalPort {
        &self.port
    }

    fn channel_fd(&self) -> i32 {
        // SAFETY: live until dropped.
        unsafe { (*self.channel).fd }
    }

    /// The descriptor that becomes readable with an event.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: open for as long as the channel lives, which `self` owns.
        unsafe { BorrowedFd::borrow_raw(self.channel_fd()) }
    }

    /// Bytes that a send may carry within the request.
    pub fn max_inline_bytes(&self) -> usize {
        self.max_inline_bytes[0] as usize
    }

    /// The same of a put.
    pub fn max_inline_put_bytes(&self) -> usize {
        self.max_inline_bytes[1] as usize
    }

    /// The domain in which what is registered can be reached by the peer, and by nobody else.
    pub fn reached(&self) -> &Arc<Domain> {
        &self.reached
    }

    /// What events call the queue pairs without which there is no link. What is said of the one by
    /// which the peer reaches this side may be of its doing, and of the one that reaches the peer
    /// its requests tell.
    pub fn identities(&self) -> [u64; 2] {
        [Lane::Messages, Lane::Reads].map(|lane| self.pairs[lane as usize].raw as u64)
    }

    pub fn number(&self, lane: Lane) -> u32 {
        let pair = &self.pairs[lane as usize];
        if pair.state == State::Destroyed {
            return 0;
        }
        // SAFETY: live until destroyed.
        unsafe { (*pair.raw).qp_num }
    }

    /// The rate of the slower one of the two ports, in units of 100 Mb/s; 0: not known.
    pub fn rate(&self) -> u16 {
        self.rate
    }

    /// Connects one of the pairs to the peer's end of it.
    pub fn connect(&mut self, lane: Lane, first_packet: u32, to: &Remote) -> io::Result<()> {
        let pair = &self.pairs[lane as usize];
        if pair.state != State::Initial {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let raw = pair.raw;
        self.to_receive(raw, to)?;
        self.to_send(raw, first_packet, to)?;
        self.pairs[lane as usize].state = State::Connected;
        self.rate = self.port.port.rate.min(to.port.rate);
        Ok(())
    }

    fn to_receive(&self, raw: *mut ibv_qp, to: &Remote) -> io::Result<()> {
        // SAFETY: zero is valid for every field; the mask says which are read.
        let mut attributes: ffi::ibv_qp_attr = unsafe { std::mem::zeroed() };
        attributes.qp_state = ffi::IBV_QPS_RTR;
        attributes.path_mtu = self.port.port.mtu.min(to.port.mtu).into();
        attributes.dest_qp_num = to.queue_pair;
        attributes.rq_psn = to.first_packet;
        attributes.max_dest_rd_atomic = self.device().limits.reads_answered;
        attributes.min_rnr_timer = RECEIVER_TIMER;
        attributes.ah_attr.port_num = self.port.number;
        attributes.ah_attr.dlid = to.port.lid;
        if self.port.port.fabric != Fabric::InfiniBand {
            attributes.ah_attr.is_global = 1;
            attributes.ah_attr.grh.dgid = ffi::ibv_gid { raw: to.port.gid };
            attributes.ah_attr.grh.sgid_index = self.port.gid_index;
            attributes.ah_attr.grh.hop_limit = HOPS_MAX;
        }
        let mask = ffi::IBV_QP_STATE
            | ffi::IBV_QP_AV
            | ffi::IBV_QP_PATH_MTU
            | ffi::IBV_QP_DEST_QPN
            | ffi::IBV_QP_RQ_PSN
            | ffi::IBV_QP_MAX_DEST_RD_ATOMIC
            | ffi::IBV_QP_MIN_RNR_TIMER;
        self.modify(raw, &mut attributes, mask)
    }

    fn to_send(&self, raw: *mut ibv_qp, first_packet: u32, to: &Remote) -> io::Result<()> {
        // SAFETY: as above.
        let mut attributes: ffi::ibv_qp_attr = unsafe { std::mem::zeroed() };
        attributes.qp_state = ffi::IBV_QPS_RTS;
        attributes.sq_psn = first_packet;
        attributes.timeout = TIMEOUT;
        attributes.retry_cnt = RETRIES;
        attributes.rnr_retry = RECEIVER_RETRIES;
        attributes.max_rd_atomic = self.device().limits.reads_issued.min(to.reads);
        let mask = ffi::IBV_QP_STATE
            | ffi::IBV_QP_SQ_PSN
            | ffi::IBV_QP_TIMEOUT
            | ffi::IBV_QP_RETRY_CNT
            | ffi::IBV_QP_RNR_RETRY
            | ffi::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify(raw, &mut attributes, mask)
    }

    /// Requests of a kind that can be posted now.
    pub fn room(&self, what: What) -> u32 {
        let Depths { receives, sends, reads, reaches, markers } = self.depths;
        let max = match what {
            What::Receive => receives,
            What::Send => sends,
            What::Read => reads,
            What::Reach => reaches,
            What::Marker => self.depths.own_markers(),
            What::Marked => markers,
        };
        max - self.under_way[what as usize]
    }

    pub fn under_way(&self, what: What) -> u32 {
        self.under_way[what as usize]
    }

    /// Looks at each pair whether any of this side's requests have ended since the last look.
    pub fn look(&mut self) -> Finding {
        let mut under_way = [false; Lane::COUNT];
        for what in What::REQUESTS {
            under_way[what.lane() as usize] |= self.under_way(what) > 0;
        }
        let pairs = self.pairs.iter_mut().zip(under_way);
        pairs.map(|(pair, under_way)| pair.looks.look(under_way)).max().unwrap_or(Finding::Nothing)
    }

    /// Posts one more, if there is room.
    fn counted(&mut self, what: What, post: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        if self.room(what) == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        post()?;
        self.under_way[what as usize] += 1;
        Ok(())
    }

    /// Posts a buffer for a message of the peer's.
    ///
    /// # Safety
    ///
    /// `key` registers the memory for writing by the device. It is the device's alone until the
    /// completion has been taken or the pair destroyed.
    pub unsafe fn post_receive(
        &mut self,
        id: u64,
        ptr: *mut u8,
        bytes: usize,
        key: u32,
    ) -> io::Result<()> {
        let mut piece = ibv_sge { addr: ptr as u64, length: bytes as u32, lkey: key };
        let (next, sg_list) = (std::ptr::null_mut(), &raw mut piece);
        let request = ibv_recv_wr { wr_id: id, next, sg_list, num_sge: 1 };
        // SAFETY: the list is live for the call; for the memory answers the caller.
        unsafe { self.receive(What::Receive, request) }
    }

    /// Posts room for one of the peer's markers. No memory belongs to it.
    pub fn post_marked(&mut self, id: u64) -> io::Result<()> {
        let (next, sg_list) = (std::ptr::null_mut(), std::ptr::null_mut());
        let request = ibv_recv_wr { wr_id: id, next, sg_list, num_sge: 0 };
        // SAFETY: it names no memory.
        unsafe { self.receive(What::Marked, request) }
    }

    /// Posts a marker, behind all reads that were posted.
    pub fn post_marker(&mut self, id: u64) -> io::Result<()> {
        // SAFETY: zero is valid for every field.
        let mut request: ibv_send_wr = unsafe { std::mem::zeroed() };
        request.wr_id = id;
        request.opcode = ffi::IBV_WR_SEND;
        // SAFETY: as in `post_marked`.
        unsafe { self.send(What::Marker, request) }
    }

    /// Posts a send. With `inline` its bytes are copied into the request.
    ///
    /// # Safety
    ///
    /// The memory is valid for reads for this call, and unless `inline` registered under `key` and
    /// unchanged until the completion has been taken or the pair destroyed.
    pub unsafe fn post_send(
        &mut self,
        id: u64,
        ptr: *const u8,
        bytes: usize,
        key: u32,
        inline: bool,
    ) -> io::Result<()> {
        let mut piece = ibv_sge { addr: ptr as u64, length: bytes as u32, lkey: key };
        // SAFETY: zero is valid for every field.
        let mut request: ibv_send_wr = unsafe { std::mem::zeroed() };
        request.wr_id = id;
        request.sg_list = &raw mut piece;
        request.num_sge = 1;
        request.opcode = ffi::IBV_WR_SEND;
        if inline {
            request.send_flags = ffi::IBV_SEND_INLINE;
        }
        // SAFETY: as in `post_receive`.
        unsafe { self.send(What::Send, request) }
    }

    /// Posts a request of one of the pairs that read and write the peer's memory. One of no bytes
    /// touches none, and shows that the peer answers.
    ///
    /// # Safety
    ///
    /// The memory here is registered under the key, for writing by the device if it is read into,
    /// and is the device's (to read or alone) until the completion has been taken or the pair
    /// destroyed. What is carried within the request has to be valid for this call only.
    pub unsafe fn post_rdma(&mut self, id: u64, lane: Lane, rdma: &Rdma) -> io::Result<()> {
        let what = match lane {
            Lane::Reads => What::Read,
            Lane::Reach => What::Reach,
            Lane::Messages | Lane::Reached => return Err(io::ErrorKind::InvalidInput.into()),
        };
        let (addr, length, lkey) = (rdma.local as u64, rdma.bytes, rdma.local_key);
        let mut piece = ibv_sge { addr, length, lkey };
        // SAFETY: zero is valid for every field.
        let mut request: ibv_send_wr = unsafe { std::mem::zeroed() };
        request.wr_id = id;
        request.sg_list = &raw mut piece;
        // One of no bytes names no memory.
        request.num_sge = i32::from(rdma.bytes > 0);
        request.opcode = if rdma.writes { ffi::IBV_WR_RDMA_WRITE } else { ffi::IBV_WR_RDMA_READ };
        if rdma.inline {
            request.send_flags = ffi::IBV_SEND_INLINE;
        }
        request.wr.rdma.remote_addr = rdma.remote;
        request.wr.rdma.rkey = rdma.remote_key;
        // SAFETY: as in `post_receive`.
        unsafe { self.send(what, request) }
    }

    /// # Safety
    ///
    /// As for `post_receive`, of what the request's list names; the list is live for the call.
    unsafe fn receive(&mut self, what: What, mut request: ibv_recv_wr) -> io::Result<()> {
        let Pair { raw, state, .. } = self.pairs[what.lane() as usize];
        if state == State::Destroyed {
            return Err(io::ErrorKind::NotConnected.into());
        }
        self.counted(what, || {
            // SAFETY: a live pair; for the request answers the caller.
            check(unsafe { ffi::post_recv(raw, &raw mut request) })
        })
    }

    /// # Safety
    ///
    /// As for `post_send` and `post_rdma`, of what the request names; its list is live for the call.
    unsafe fn send(&mut self, what: What, mut request: ibv_send_wr) -> io::Result<()> {
        let raw = self.connected(what.lane())?;
        request.send_flags |= ffi::IBV_SEND_SIGNALED;
        self.counted(what, || {
            // SAFETY: as in `receive`.
            check(unsafe { ffi::post_send(raw, &raw mut request) })
        })
    }

    fn connected(&self, lane: Lane) -> io::Result<*mut ibv_qp> {
        match self.pairs[lane as usize] {
            Pair { raw, state: State::Connected, .. } => Ok(raw),
            _ => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Takes completions, up to [`BATCH`]. `what` tells what a request of this side's was from its
    /// number: of what comes, whether it is a marker.
    pub fn take(
        &mut self,
        side: Side,
        into: &mut Vec<Completion>,
        what: impl Fn(u64) -> What,
    ) -> io::Result<()> {
        let mut batch = [const { std::mem::MaybeUninit::<ibv_wc>::uninit() }; BATCH];
        // SAFETY: a live queue, and room for as many.
        let count = unsafe {
            ffi::poll_cq(self.completions[side as usize], BATCH, batch.as_mut_ptr().cast())
        };
        let count = usize::try_from(count).map_err(|_| os_error(count))?;
        for entry in batch.iter().take(count) {
            // SAFETY: the call has filled in the first `count`.
            let entry = unsafe { entry.assume_init_ref() };
            let what = match side {
                Side::Receive if what(entry.wr_id) == What::Marker => What::Marked,
                Side::Receive => What::Receive,
                Side::Send => what(entry.wr_id),
            };
            let under_way = &mut self.under_way[what as usize];
            *under_way = under_way.saturating_sub(1);
            if side == Side::Send {
                self.pairs[what.lane() as usize].looks.ended();
            }
            into.push(Completion {
                id: entry.wr_id,
                status: entry.status,
                vendor: entry.vendor_err,
                bytes: entry.byte_len as usize,
            });
        }
        Ok(())
    }

    /// Asks for an event at the next completion. What has come before does not count: look again.
    pub fn arm(&mut self, side: Side) -> io::Result<()> {
        if !self.armed[side as usize] {
            // SAFETY: a live queue with a channel.
            check(unsafe { ffi::req_notify_cq(self.completions[side as usize]) })?;
            self.armed[side as usize] = true;
        }
        Ok(())
    }

    /// Whether an event may have come.
    fn is_armed(&self) -> bool {
        self.armed[0] || self.armed[1]
    }

    /// Takes one event. `WouldBlock`: there is none.
    pub fn take_event(&mut self) -> io::Result<()> {
        let (mut queue, mut context) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: a live channel that does not block, and two pointers to write.
        let code = unsafe {
            let get = self.device().verbs.functions.ibv_get_cq_event;
            get(self.channel, &raw mut queue, &raw mut context)
        };
        if code != 0 {
            return Err(io::Error::last_os_error());
        }
        let Some(side) = self.completions.iter().position(|known| *known == queue) else {
            return Err(io::Error::other("an event of a queue that is none of these"));
        };
        self.armed[side] = false;
        self.unacknowledged[side] += 1;
        // Acknowledging takes a lock: in numbers.
        if self.unacknowledged[side] >= 64 {
            self.acknowledge(side);
        }
        Ok(())
    }

    /// Takes what the channel has told before: that is old news.
    pub fn forget_events(&mut self) -> io::Result<()> {
        // Each queue tells once until it is armed again.
        while self.is_armed() {
            match self.take_event() {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn acknowledge(&mut self, side: usize) {
        let count = std::mem::take(&mut self.unacknowledged[side]);
        if count > 0 {
            // SAFETY: a live queue, and as many events of it have been taken.
            unsafe {
                (self.device().verbs.functions.ibv_ack_cq_events)(self.completions[side], count);
            }
        }
    }

    /// Destroys the queue pairs. After `Ok` the device touches none of the memory that was posted,
    /// and the peer reads and writes nothing through them.
    pub fn destroy(&mut self) -> io::Result<()> {
        // The kernel ends everything of a device that is taken away.
        self.destroy_unless(Device::took_along)
    }

    /// The same while the link goes on, and hands out at once the memory that was posted. From a
    /// device that is being taken away `EIO` may come before everything of it has ended: that does
    /// not do.
    pub fn destroy_for_sure(&mut self) -> io::Result<()> {
        self.destroy_unless(Device::is_no_more)
    }

    fn destroy_unless(&mut self, went: impl Fn(&Device, &io::Error) -> bool) -> io::Result<()> {
        if self.device().forked() {
            return Err(io::Error::other("they are another process's"));
        }
        for lane in 0..self.pairs.len() {
            let Pair { raw, state, .. } = &mut self.pairs[lane];
            if *state == State::Destroyed {
                continue;
            }
            // SAFETY: a live pair, which is used no more if this succeeds.
            let destroyed =
                check(unsafe { (self.domain.device.verbs.functions.ibv_destroy_qp)(*raw) });
            match destroyed {
                Ok(()) => *state = State::Destroyed,
                Err(error) if went(&self.domain.device, &error) => *state = State::Destroyed,
                Err(error) => return Err(error),
            }
        }
        self.under_way = [0; 6];
        Ok(())
    }
}

impl Drop for Queues {
    fn drop(&mut self) {
        if self.device().forked() {
            return;
        }
        if let Err(error) = self.destroy() {
            // Then the completion queues are in use and stay as well.
            tracing::error!(%error, "a queue pair cannot be destroyed, and is left standing");
            // The channel stays open: a forked child has to close it.
            std::mem::forget(self.tracked.take());
            return;
        }
        let device = self.device().clone();
        let functions = &device.verbs.functions;
        for side in 0..self.completions.len() {
            self.acknowledge(side);
            if !self.completions[side].is_null() {
                // SAFETY: made once; its queue pairs are gone and its events acknowledged.
                unsafe { (functions.ibv_destroy_cq)(self.completions[side]) };
            }
        }
        self.tracked = None;
        if !self.channel.is_null() {
            // SAFETY: made once; its queues are gone.
            unsafe { (functions.ibv_destroy_comp_channel)(self.channel) };
        }
    }
}
