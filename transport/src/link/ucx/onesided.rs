//! Put and get by UCX itself: registered memory, keys, and requests on their way.
//!
//! A put has ended when its request has and a flush of the endpoint that began after it, too: only
//! then do the bytes lie at the target. At most one such flush is under way; puts that begin
//! meanwhile wait for the next.
//!
//! A key belongs to one endpoint. It is destroyed before that is closed, unless requests that use
//! it are under way: UCX wants it after those, and closing by force is what ends them.
//!
//! UCX checks little of a packed key and nothing of what a peer does with memory that it was given
//! access to (over CMA the kernel lets processes of one user write to each other's memory as they
//! like): see the module's notes on trust.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::Arc;

use slab::Slab;
use thalweg_ffi::ucx::{self as ffi, ucp_mem_h, ucp_rkey_h, ucs_status_t};

use super::inbox::Mailbox;
use super::link::{IN_FLIGHT_MAX, UcxLink, error};
use super::request::{Begun, begun, host_memory, params, shielded};
use super::worker::{Ep, Locked, Worker};
use super::{describe, link_error};
use crate::error::{ErrorKind, LinkError};
use crate::link::{
    LinkKind, OneSided, OpId, Post, Registration, RemoteId, Segment, SegmentMut, Sink,
};

/// Of a grant: the region's address in its process. The packed key follows.
const ADDRESS_BYTES: usize = 8;
/// UCX reads a packed key without being told its length: it is followed by zeros.
const PADDING_BYTES: usize = 256;

/// What a request of ours does.
#[derive(Clone, Copy, Debug)]
pub(super) enum Doing {
    /// The put of this number.
    Put(u64),
    Get(OpId),
    /// A flush of the puts below this number.
    Flush(u64),
}

/// A request that UCX is at work on.
struct Request {
    doing: Doing,
    to: Arc<Mailbox>,
}

/// Registered memory.
struct Registered {
    worker: Arc<Worker>,
    handle: ucp_mem_h,
    grant: Vec<u8>,
}

// SAFETY: the handle is used with the worker's gate held only.
unsafe impl Send for Registered {}
// SAFETY: as above.
unsafe impl Sync for Registered {}

impl Registration for Registered {
    fn grant(&self) -> &[u8] {
        &self.grant
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if self.worker.forked() {
            return;
        }
        let ucx = self.worker.ucx;
        let worker = self.worker.lock();
        // SAFETY: mapped in this context, which lives as long as the worker, and unmapped once;
        // the gate is held.
        let status =
            unsafe { (ucx.functions.ucp_mem_unmap)(worker.worker.context.raw(), self.handle) };
        drop(worker);
        if status != ffi::UCS_OK {
            tracing::warn!("{}", describe(ucx, "UCX does not forget registered memory", status));
        }
    }
}

/// A region of the peer's.
struct Remote {
    address: u64,
    key: ucp_rkey_h,
}

// SAFETY: the key is used with the worker's gate held only.
unsafe impl Send for Remote {}

/// A put that has not been reported.
struct Put {
    op: OpId,
    /// How its request ended.
    ended: Option<ucs_status_t>,
}

/// One link's puts and gets.
#[derive(Default)]
pub(super) struct Transfers {
    remotes: Slab<Remote>,
    /// In the order of their numbers, which begin with `first`.
    puts: VecDeque<Put>,
    first: u64,
    /// Puts below this number are at the target.
    flushed: u64,
    flushing: bool,
    gets: usize,
    /// Requests that use a key.
    in_flight: usize,
    /// What callbacks have left.
    pub ended: Vec<(Doing, ucs_status_t)>,
    /// Puts that are over and not reported.
    over: VecDeque<(OpId, ucs_status_t)>,
}

impl Transfers {
    /// Whether a poll has something to report.
    pub fn has_news(&self) -> bool {
        !self.ended.is_empty() || !self.over.is_empty()
    }

    fn next_put(&self) -> u64 {
        self.first + self.puts.len() as u64
    }

    /// Moves what is over to its end.
    fn settle(&mut self) {
        while self.first < self.flushed
            && let Some(Put { ended: Some(_), .. }) = self.puts.front()
            && let Some(Put { op, ended: Some(status) }) = self.puts.pop_front()
        {
            self.first += 1;
            self.over.push_back((op, status));
        }
    }

    fn put_ended(&mut self, number: u64, status: ucs_status_t) {
        let at = number.checked_sub(self.first).and_then(|at| usize::try_from(at).ok());
        if let Some(put) = at.and_then(|at| self.puts.get_mut(at)) {
            put.ended = Some(status);
            self.in_flight -= 1;
        }
    }

    /// Forgets the keys, if no request uses one.
    pub fn close_all(&mut self, worker: &mut Locked<'_>) {
        if self.in_flight > 0 {
            return;
        }
        for remote in self.remotes.drain() {
            worker.destroy_key(&remote);
        }
    }
}

impl Locked<'_> {
    fn destroy_key(&mut self, remote: &Remote) {
        // SAFETY: unpacked on an endpoint of this worker, destroyed once, and not in use; the gate
        // is held.
        unsafe { (self.worker.ucx.functions.ucp_rkey_destroy)(remote.key) };
    }

    /// Has UCX begin something. The callback comes if this answers `Pending`.
    ///
    /// # Safety
    ///
    /// `call` makes one request on `ep` with the parameters it is given, of which the callback is
    /// the end, and names no memory that could go before that.
    unsafe fn begin(
        &mut self,
        ep: &Ep,
        doing: Doing,
        call: impl FnOnce(&ffi::Functions, &ffi::ucp_request_param_t) -> *mut c_void,
    ) -> Begun {
        let raw = Box::into_raw(Box::new(Request { doing, to: ep.mailbox.clone() }));
        let mut params = params(raw.cast());
        params.cb.send = Some(ended);
        host_memory(&mut params);
        let begun = begun(call(&self.worker.ucx.functions, &params));
        match begun {
            Begun::Pending => ep.mailbox.begin(&mut self.key),
            // SAFETY: UCX is finished with it, and there will be no callback.
            Begun::Done | Begun::Failed(_) => drop(unsafe { Box::from_raw(raw) }),
        }
        begun
    }
}

/// Ends a request.
///
/// # Safety
///
/// For UCX to call, with a [`Request`] in flight as `user_data`.
unsafe extern "C" fn ended(request: *mut c_void, status: ucs_status_t, user_data: *mut c_void) {
    shielded(|| {
        // SAFETY: made by `Box::into_raw` when the request began; this is its one end.
        let Request { doing, to } = *unsafe { Box::from_raw(user_data.cast::<Request>()) };
        // SAFETY: the request is over, and nobody else frees it.
        unsafe { (to.ucx.functions.ucp_request_free)(request) };
        // SAFETY: called back, with no other reference to what the gate guards.
        unsafe { to.finish(|inbox| inbox.transfers.push((doing, status))) };
    });
}

impl UcxLink {
    /// Flushes the puts that no flush has covered, unless one is under way.
    fn flush_puts(&mut self) {
        let upto = self.transfers.next_put();
        if self.transfers.flushing || self.transfers.flushed >= upto {
            return;
        }
        let mut worker = self.worker.lock();
        // SAFETY: a flush names no memory.
        let begun = unsafe {
            worker.begin(&self.ep, Doing::Flush(upto), |functions, params| {
                // The kind of memory means nothing to a flush.
                (functions.ucp_ep_flush_nbx)(self.ep.raw, params)
            })
        };
        drop(worker);
        match begun {
            Begun::Done => self.transfers.flushed = upto,
            Begun::Pending => self.transfers.flushing = true,
            Begun::Failed(status) => self.flush_failed(status),
        }
    }

    /// Whether the puts are at the target is not known: the link ends.
    fn flush_failed(&mut self, status: ucs_status_t) {
        let error = link_error(self.worker.ucx, "flushing puts", status);
        self.hung_up.get_or_insert(error);
    }

    /// Takes over what has ended, and reports it. `failed`: what to say of requests that were
    /// ended by force.
    pub(super) fn report_transfers(
        &mut self,
        sink: &mut dyn Sink,
        failed: Option<&LinkError>,
    ) -> bool {
        if !self.transfers.has_news() {
            return false;
        }
        let mut all = std::mem::take(&mut self.transfers.ended);
        for (doing, status) in all.drain(..) {
            match doing {
                Doing::Put(number) => self.transfers.put_ended(number, status),
                Doing::Get(op) => {
                    self.transfers.gets -= 1;
                    self.transfers.in_flight -= 1;
                    let result = self.result("getting", status, failed);
                    sink.done(op, result);
                }
                Doing::Flush(upto) => {
                    self.transfers.flushing = false;
                    match status {
                        ffi::UCS_OK => self.transfers.flushed = upto,
                        _ => self.flush_failed(status),
                    }
                }
            }
        }
        // Its memory serves again.
        self.transfers.ended = all;
        self.transfers.settle();
        while let Some((op, status)) = self.transfers.over.pop_front() {
            let result = self.result("putting", status, failed);
            sink.done(op, result);
        }
        if failed.is_none() && self.hung_up.is_none() {
            self.flush_puts();
            self.transfers.settle();
        }
        true
    }

    /// The link is killed: reports the puts that UCX is finished with. Where they have come to is
    /// not known of those that were not flushed.
    pub(super) fn end_transfers(&mut self, sink: &mut dyn Sink, failed: &LinkError) {
        self.report_transfers(sink, Some(failed));
        for put in &mut self.transfers.puts {
            if put.ended.is_some() && put.op != OpId::NONE {
                sink.done(std::mem::replace(&mut put.op, OpId::NONE), Err(failed.clone()));
            }
        }
    }

    fn transfer_room(&mut self) -> bool {
        let room = self.transfers.puts.len() + self.transfers.gets < IN_FLIGHT_MAX;
        self.counters.stalls += u64::from(!room);
        room
    }

    fn remote(&self, remote: RemoteId, offset: u64) -> Result<(u64, ucp_rkey_h), LinkError> {
        let open = self.transfers.remotes.get(remote.0 as usize);
        open.map(|open| (open.address.wrapping_add(offset), open.key))
            .ok_or_else(|| error(ErrorKind::Io, "a region is reached that is not open"))
    }
}

impl OneSided for UcxLink {
    fn way(&self) -> &'static str {
        "UCX"
    }

    fn domain(&self) -> usize {
        Arc::as_ptr(&self.worker).addr()
    }

    fn register(
        &mut self,
        memory: SegmentMut,
        read: bool,
        write: bool,
    ) -> Result<Arc<dyn Registration>, LinkError> {
        if !memory.kind.cpu_accessible() {
            let detail = format!("{} memory is not registered with UCX", memory.kind);
            return Err(error(ErrorKind::Unsupported, detail));
        }
        let ucx = self.worker.ucx;
        // SAFETY: zero is a valid value of every field; the mask says which are read.
        let mut params: ffi::ucp_mem_map_params_t = unsafe { std::mem::zeroed() };
        params.field_mask = u64::from(
            ffi::UCP_MEM_MAP_PARAM_FIELD_ADDRESS
                | ffi::UCP_MEM_MAP_PARAM_FIELD_LENGTH
                | ffi::UCP_MEM_MAP_PARAM_FIELD_PROT
                | ffi::UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE,
        );
        params.address = memory.ptr.cast();
        params.length = memory.len;
        params.memory_type = ffi::UCS_MEMORY_TYPE_HOST;
        params.prot = ffi::UCP_MEM_MAP_PROT_LOCAL_READ | ffi::UCP_MEM_MAP_PROT_LOCAL_WRITE;
        if read {
            params.prot |= ffi::UCP_MEM_MAP_PROT_REMOTE_READ;
        }
        if write {
            params.prot |= ffi::UCP_MEM_MAP_PROT_REMOTE_WRITE;
        }
        let worker = self.worker.lock();
        let context = worker.worker.context.raw();
        let mut handle = std::ptr::null_mut();
        // SAFETY: the driver keeps the memory for as long as the registration; `handle` is written
        // on success; the gate is held.
        let status =
            unsafe { (ucx.functions.ucp_mem_map)(context, &raw const params, &raw mut handle) };
        if status != ffi::UCS_OK {
            return Err(link_error(ucx, "registering memory", status));
        }
        // From here on it is given back.
        let mut registered = Registered { worker: self.worker.clone(), handle, grant: Vec::new() };
        let (mut packed, mut len) = (std::ptr::null_mut(), 0);
        // SAFETY: mapped above; both are written on success.
        let status = unsafe {
            (ucx.functions.ucp_rkey_pack)(context, handle, &raw mut packed, &raw mut len)
        };
        if status == ffi::UCS_OK && !packed.is_null() {
            registered.grant.extend_from_slice(&(memory.ptr.addr() as u64).to_le_bytes());
            // SAFETY: UCX gave `len` bytes there; they are released once, after the copy.
            let bytes = unsafe { std::slice::from_raw_parts(packed.cast::<u8>(), len) };
            registered.grant.extend_from_slice(bytes);
            // SAFETY: as above.
            unsafe { (ucx.functions.ucp_rkey_buffer_release)(packed) };
        }
        // Its drop takes the gate.
        drop(worker);
        match status {
            ffi::UCS_OK => Ok(Arc::new(registered)),
            status => Err(link_error(ucx, "packing a key", status)),
        }
    }

    fn open(&mut self, grant: &[u8]) -> Result<RemoteId, LinkError> {
        let bad = || LinkError::protocol(LinkKind::Ucx, "a grant that is too short");
        let (address, packed) = grant.split_first_chunk::<ADDRESS_BYTES>().ok_or_else(bad)?;
        if packed.is_empty() {
            return Err(bad());
        }
        let mut padded = packed.to_vec();
        padded.resize(packed.len() + PADDING_BYTES, 0);
        let mut key = std::ptr::null_mut();
        let worker = self.worker.lock();
        // SAFETY: the endpoint is live, its worker locked; `key` is written on success. What the
        // peer packed UCX believes: see the module.
        let status = unsafe {
            let unpack = self.worker.ucx.functions.ucp_ep_rkey_unpack;
            unpack(self.ep.raw, padded.as_ptr().cast(), &raw mut key)
        };
        drop(worker);
        if status != ffi::UCS_OK {
            return Err(link_error(self.worker.ucx, "unpacking a key", status));
        }
        let remote = Remote { address: u64::from_le_bytes(*address), key };
        Ok(RemoteId(self.transfers.remotes.insert(remote) as u32))
    }

    fn close(&mut self, remote: RemoteId) {
        if let Some(remote) = self.transfers.remotes.try_remove(remote.0 as usize) {
            self.worker.lock().destroy_key(&remote);
        }
    }

    fn put(
        &mut self,
        op: OpId,
        from: Segment<'_>,
        to: RemoteId,
        offset: u64,
    ) -> Result<Post, LinkError> {
        self.alive()?;
        if !self.transfer_room() {
            return Ok(Post::Full);
        }
        let (address, key) = self.remote(to, offset)?;
        let number = self.transfers.next_put();
        let mut worker = self.worker.lock();
        // SAFETY: the endpoint and its key are live, the worker locked; the driver keeps the
        // memory until the put is reported.
        let begun = unsafe {
            worker.begin(&self.ep, Doing::Put(number), |functions, params| {
                (functions.ucp_put_nbx)(
                    self.ep.raw,
                    from.ptr.cast(),
                    from.len,
                    address,
                    key,
                    params,
                )
            })
        };
        drop(worker);
        let ended = match begun {
            Begun::Done => Some(ffi::UCS_OK),
            Begun::Pending => {
                self.transfers.in_flight += 1;
                None
            }
            Begun::Failed(status) => return Err(link_error(self.worker.ucx, "putting", status)),
        };
        self.transfers.puts.push_back(Put { op, ended });
        self.flush_puts();
        self.transfers.settle();
        // Those before it are reported by the next poll.
        match self.transfers.over.back() {
            Some((last, ffi::UCS_OK)) if *last == op => {
                self.transfers.over.pop_back();
                Ok(Post::Done)
            }
            _ => Ok(Post::Pending),
        }
    }

    fn get(
        &mut self,
        op: OpId,
        to: SegmentMut,
        from: RemoteId,
        offset: u64,
    ) -> Result<Post, LinkError> {
        self.alive()?;
        if !self.transfer_room() {
            return Ok(Post::Full);
        }
        let (address, key) = self.remote(from, offset)?;
        let mut worker = self.worker.lock();
        // SAFETY: as in `put`.
        let begun = unsafe {
            worker.begin(&self.ep, Doing::Get(op), |functions, params| {
                (functions.ucp_get_nbx)(self.ep.raw, to.ptr.cast(), to.len, address, key, params)
            })
        };
        drop(worker);
        match begun {
            Begun::Done => Ok(Post::Done),
            Begun::Pending => {
                self.transfers.gets += 1;
                self.transfers.in_flight += 1;
                Ok(Post::Pending)
            }
            Begun::Failed(status) => Err(link_error(self.worker.ucx, "getting", status)),
        }
    }
}
