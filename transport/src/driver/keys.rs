//! Regions that peers may reach by key.

use std::any::Any;
use std::collections::HashMap;
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::Waker;

use super::sync::{Mutex, lock};
use super::table::RawSegment;
use crate::error::LinkError;
use crate::link::{OneSided, Registration};
use crate::proto::keys::{ACCESS_READ, ACCESS_WRITE, check_bounds};
use crate::proto::wire::Status;
use crate::runtime::ForkGuard;

struct Users {
    count: usize,
    revoked: bool,
    /// The registered buffer, until revocation hands it back.
    buffer: Option<Box<dyn Any + Send>>,
    waiting: Option<Waker>,
    /// Endpoints whose peers were granted direct access, once for each.
    holders: Vec<Arc<Notices>>,
}

/// What a region is registered as, by the domain of links that did so.
type Registrations = Vec<(usize, Weak<Shared>)>;

/// One registered region.
pub(crate) struct Entry {
    key: u64,
    memory: RawSegment,
    access: u8,
    users: Mutex<Users>,
    registrations: Mutex<Registrations>,
    /// Registrations that would not end, and for each the use that keeps the memory. As many as
    /// there were domains of links at most, each of which may have got a new one since.
    stubborn: Mutex<Vec<Stubborn>>,
    /// In a forked child a lock of the parent's may seem to be held, for ever. There the region and
    /// its uses are left as they are.
    fork: ForkGuard,
}

/// A registration that a device would not end. It keeps the memory: dropped by nobody but
/// [`Entry::end_stubborn`], since the region would keep itself otherwise.
type Stubborn = (Arc<dyn Registration>, RegionUse);

/// Whose peers were told that a key is revoked.
#[must_use]
pub(crate) struct Told {
    key: u64,
    holders: Vec<Weak<Notices>>,
}

impl Told {
    pub fn is_nobody(&self) -> bool {
        self.holders.is_empty()
    }

    /// They have had time enough: what has not been given back is taken.
    pub fn cut(&self) {
        for notices in self.holders.iter().filter_map(Weak::upgrade) {
            notices.tell(&notices.overdue, self.key);
        }
    }
}

// SAFETY: `memory` describes the buffer in `users`, which is freed only when no user is left.
unsafe impl Sync for Entry {}

impl Entry {
    pub fn len(&self) -> usize {
        self.memory.len
    }

    pub fn memory(&self) -> RawSegment {
        self.memory
    }

    pub fn access(&self) -> u8 {
        self.access
    }

    /// Refuses new users, and has those told that were granted direct access. `Some`: no user is
    /// left, here is the buffer (once). Otherwise `waker` is called when the last user is gone.
    /// Beside it: who was told, which happens once.
    ///
    /// Called without an endpoint's lock: endpoints are woken.
    pub fn revoke(&self, waker: Option<&Waker>) -> (Option<Box<dyn Any + Send>>, Told) {
        let mut users = lock(&self.users);
        users.revoked = true;
        let mut told = Told { key: self.key, holders: Vec::new() };
        if users.count == 0 {
            return (users.buffer.take(), told);
        }
        let old = std::mem::replace(&mut users.waiting, waker.cloned());
        let holders = std::mem::take(&mut users.holders);
        drop(users);
        drop(old);
        for notices in &holders {
            told.holders.push(Arc::downgrade(notices));
            notices.tell(&notices.revoked, self.key);
        }
        (None, told)
    }

    /// Tries once more to end the registrations that would not end. Called without a lock; takes
    /// its time if the device still will not.
    pub fn end_stubborn(&self) {
        let mut tried = std::mem::take(&mut *lock(&self.stubborn));
        let ended: Vec<_> =
            tried.extract_if(.., |(registration, _)| registration.withdraw()).collect();
        if !tried.is_empty() {
            lock(&self.stubborn).append(&mut tried);
        }
        drop(ended);
    }
}

/// A use of a region by a transfer: keeps the buffer alive.
pub(crate) struct RegionUse(Arc<Entry>);

impl RegionUse {
    fn again(&self) -> RegionUse {
        lock(&self.0.users).count += 1;
        RegionUse(self.0.clone())
    }

    /// The region's registration in the domain of this link; made if there is none.
    fn registration(&self, link: &mut dyn OneSided) -> Result<Arc<Shared>, LinkError> {
        let entry = &self.0;
        let domain = link.domain();
        let mut known = lock(&entry.registrations);
        let found = known.iter().find(|(of, _)| *of == domain);
        if let Some(shared) = found.and_then(|(_, shared)| shared.upgrade()) {
            return Ok(shared);
        }
        let memory = entry.memory.write(entry.memory.len);
        let (read, write) = (entry.access & ACCESS_READ != 0, entry.access & ACCESS_WRITE != 0);
        let registration = link.register(memory, read, write)?;
        let used = ManuallyDrop::new(self.again());
        let shared = Arc::new(Shared { registration, is_cut: AtomicBool::new(false), used });
        known.retain(|(_, shared)| shared.strong_count() > 0);
        known.push((domain, Arc::downgrade(&shared)));
        Ok(shared)
    }

    /// `len` bytes from `offset`; bounds were checked when the use began.
    pub fn range(&self, offset: u64, len: usize) -> RawSegment {
        let memory = self.0.memory;
        debug_assert!(check_bounds(offset, len as u64, memory.len as u64));
        // SAFETY: within the region: `Keys::begin` checked offset and length.
        RawSegment { ptr: unsafe { memory.ptr.add(offset as usize) }, len, kind: memory.kind }
    }
}

impl Drop for RegionUse {
    fn drop(&mut self) {
        if self.0.fork.forked() {
            return;
        }
        let mut users = lock(&self.0.users);
        users.count -= 1;
        if users.count > 0 || !users.revoked {
            return;
        }
        let waker = users.waiting.take();
        // Without a waiter the owner has gone: the buffer goes too.
        let buffer = if waker.is_none() { users.buffer.take() } else { None };
        drop(users);
        drop(buffer);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Keys that were revoked and that an endpoint's peer has to be told of. At most as many as were
/// granted to it.
pub(crate) struct Notices {
    revoked: Mutex<Vec<u64>>,
    /// Those among them that the peer has had time enough to give back.
    overdue: Mutex<Vec<u64>>,
    any: AtomicBool,
    endpoint: Waker,
}

impl Notices {
    /// `endpoint` is woken when there is something to tell.
    pub fn new(endpoint: Waker) -> Arc<Self> {
        let (revoked, overdue, any) = (Mutex::default(), Mutex::default(), AtomicBool::new(false));
        Arc::new(Notices { revoked, overdue, any, endpoint })
    }

    fn tell(&self, list: &Mutex<Vec<u64>>, key: u64) {
        lock(list).push(key);
        self.any.store(true, Ordering::Release);
        self.endpoint.wake_by_ref();
    }

    pub fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// What was revoked, and what is overdue.
    pub fn take(&self) -> (Vec<u64>, Vec<u64>) {
        self.any.store(false, Ordering::Release);
        let [revoked, overdue] =
            [&self.revoked, &self.overdue].map(|list| std::mem::take(&mut *lock(list)));
        (revoked, overdue)
    }
}

/// A use of a region whose end is asked for when its key is revoked.
struct Hold {
    used: RegionUse,
    notices: Arc<Notices>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.used.0.fork.forked() {
            return;
        }
        let mut users = lock(&self.used.0.users);
        if let Some(at) = users.holders.iter().position(|held| Arc::ptr_eq(held, &self.notices)) {
            users.holders.swap_remove(at);
        }
    }
}

/// A region's registration in one domain, shared by those to whom it is granted there.
struct Shared {
    registration: Arc<dyn Registration>,
    /// A peer has not given it back.
    is_cut: AtomicBool,
    used: ManuallyDrop<RegionUse>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.used.0.fork.forked() {
            return;
        }
        let ended = match self.is_cut.load(Ordering::Acquire) {
            true => self.registration.cut(),
            false => self.registration.withdraw(),
        };
        // SAFETY: here and nowhere else.
        let used = unsafe { ManuallyDrop::take(&mut self.used) };
        if !ended {
            tracing::error!("memory that a device goes on reaching is kept");
            let entry = used.0.clone();
            lock(&entry.stubborn).push((self.registration.clone(), used));
        }
    }
}

/// Direct access to a region, granted to one peer: keeps buffer and registration. Dropped without
/// any lock held.
pub(crate) struct Granted {
    // In this order: the memory stays for as long as it can be reached.
    shared: Arc<Shared>,
    hold: Hold,
}

impl Granted {
    /// What the peer's end of the link is told.
    pub fn bytes(&self) -> &[u8] {
        self.shared.registration.grant()
    }

    /// Length and access of the region.
    pub fn extent(&self) -> (u64, u8) {
        let entry = &self.hold.used.0;
        (entry.memory.len as u64, entry.access)
    }

    /// It is taken from a peer that has not given it back: when this is dropped, and all others
    /// that share the registration, which are overdue as well.
    pub fn cut(&self) {
        self.shared.is_cut.store(true, Ordering::Release);
    }
}

/// Why direct access is not granted.
pub(crate) enum NotGranted {
    /// There is no such key, or it was revoked, or there is nothing to reach.
    Key,
    /// The link cannot.
    Link(LinkError),
}

/// The node's regions. Keys are random, so that they cannot be guessed by a peer that was not
/// given them.
#[derive(Default)]
pub(crate) struct Keys(Mutex<HashMap<u64, Arc<Entry>>>);

impl Keys {
    pub fn register(
        &self,
        memory: RawSegment,
        access: u8,
        buffer: Box<dyn Any + Send>,
    ) -> std::io::Result<(u64, Arc<Entry>)> {
        let users = Users {
            count: 0,
            revoked: false,
            buffer: Some(buffer),
            waiting: None,
            holders: Vec::new(),
        };
        let mut keys = lock(&self.0);
        let key = loop {
            let key = random_u64()?;
            if !keys.contains_key(&key) {
                break key;
            }
        };
        let users = Mutex::new(users);
        let registrations = Mutex::new(Registrations::new());
        let stubborn = Mutex::default();
        let fork = ForkGuard::get();
        let entry = Arc::new(Entry { key, memory, access, users, registrations, stubborn, fork });
        keys.insert(key, entry.clone());
        Ok((key, entry))
    }

    pub fn remove(&self, key: u64) {
        let removed = lock(&self.0).remove(&key);
        drop(removed);
    }

    /// Begins a use of `len` bytes at `offset`.
    pub fn begin(&self, key: u64, offset: u64, len: u64, write: bool) -> Result<RegionUse, Status> {
        let entry = lock(&self.0).get(&key).cloned().ok_or(Status::KeyUnknown)?;
        let needed = if write { ACCESS_WRITE } else { ACCESS_READ };
        if entry.access & needed == 0 {
            return Err(Status::Denied);
        }
        if !check_bounds(offset, len, entry.memory.len as u64) {
            return Err(Status::OutOfBounds);
        }
        let mut users = lock(&entry.users);
        if users.revoked {
            return Err(Status::KeyUnknown);
        }
        users.count += 1;
        drop(users);
        Ok(RegionUse(entry))
    }

    /// Grants an endpoint's peer direct access to a region over this link. `notices` is told when
    /// the key is revoked.
    pub fn grant(
        &self,
        key: u64,
        link: &mut dyn OneSided,
        notices: &Arc<Notices>,
    ) -> Result<Granted, (NotGranted, Option<Box<dyn Any + Send>>)> {
        let entry = lock(&self.0).get(&key).cloned().ok_or((NotGranted::Key, None))?;
        let mut users = lock(&entry.users);
        if users.revoked || entry.memory.len == 0 {
            return Err((NotGranted::Key, None));
        }
        users.count += 1;
        users.holders.push(notices.clone());
        drop(users);
        let hold = Hold { used: RegionUse(entry), notices: notices.clone() };
        match hold.used.registration(link) {
            Ok(shared) => Ok(Granted { shared, hold }),
            // Its drop may run the owner's code.
            Err(error) => Err((NotGranted::Link(error), Some(Box::new(hold)))),
        }
    }
}

pub(crate) fn random_u64() -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(std::io::Error::other)?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::{OpId, Post, RemoteId, Segment, SegmentMut};
    use crate::memory::Buffer;

    fn region(keys: &Keys, len: usize, access: u8) -> (u64, Arc<Entry>) {
        let buffer = vec![0u8; len];
        let memory = buffer.region().into();
        keys.register(memory, access, Box::new(buffer)).expect("random")
    }

    #[test]
    fn uses_are_checked() {
        let keys = Keys::default();
        let (key, entry) = region(&keys, 100, ACCESS_READ);
        assert_eq!(entry.len(), 100);
        assert!(keys.begin(key, 0, 100, false).is_ok());
        assert_eq!(keys.begin(key, 1, 100, false).err(), Some(Status::OutOfBounds));
        assert_eq!(keys.begin(key, u64::MAX, 2, false).err(), Some(Status::OutOfBounds));
        assert_eq!(keys.begin(key, 0, 1, true).err(), Some(Status::Denied));
        assert_eq!(keys.begin(key ^ 1, 0, 1, false).err(), Some(Status::KeyUnknown));
    }

    #[test]
    fn a_buffer_outlives_its_last_use() {
        let keys = Keys::default();
        let (key, entry) = region(&keys, 8, ACCESS_WRITE);
        let used = keys.begin(key, 0, 8, true).expect("valid");
        let (buffer, told) = entry.revoke(Some(Waker::noop()));
        assert!(buffer.is_none() && told.is_nobody(), "still in use");
        assert_eq!(keys.begin(key, 0, 8, true).err(), Some(Status::KeyUnknown));
        drop(used);
        assert!(entry.revoke(None).0.is_some());
    }

    /// A link whose registrations end, or do not.
    struct Registrar {
        ends: Arc<AtomicBool>,
    }

    struct Made {
        ends: Arc<AtomicBool>,
    }

    impl Registration for Made {
        fn grant(&self) -> &[u8] {
            b"grant"
        }

        fn withdraw(&self) -> bool {
            self.ends.load(Ordering::Relaxed)
        }
    }

    impl OneSided for Registrar {
        fn way(&self) -> &'static str {
            "a test"
        }

        fn domain(&self) -> usize {
            1
        }

        fn register(
            &mut self,
            _: SegmentMut,
            _: bool,
            _: bool,
        ) -> Result<Arc<dyn Registration>, LinkError> {
            Ok(Arc::new(Made { ends: self.ends.clone() }))
        }

        fn open(&mut self, _: &[u8]) -> Result<RemoteId, LinkError> {
            Ok(RemoteId(0))
        }

        fn close(&mut self, _: RemoteId) {}

        fn put(&mut self, _: OpId, _: Segment<'_>, _: RemoteId, _: u64) -> Result<Post, LinkError> {
            Ok(Post::Done)
        }

        fn get(&mut self, _: OpId, _: SegmentMut, _: RemoteId, _: u64) -> Result<Post, LinkError> {
            Ok(Post::Done)
        }
    }

    #[test]
    fn memory_that_stays_registered_is_handed_back_when_that_ends() {
        for at_once in [true, false] {
            let ends = Arc::new(AtomicBool::new(at_once));
            let keys = Keys::default();
            let (key, entry) = region(&keys, 10, ACCESS_READ | ACCESS_WRITE);
            let notices = Notices::new(Waker::noop().clone());
            let granted = keys.grant(key, &mut Registrar { ends: ends.clone() }, &notices);
            let granted = granted.unwrap_or_else(|_| panic!("it can be granted"));
            let (buffer, told) = entry.revoke(Some(Waker::noop()));
            assert!(buffer.is_none() && !told.is_nobody(), "the peer may reach it");
            assert_eq!(notices.take(), (vec![key], vec![]));
            let again = entry.revoke(Some(Waker::noop()));
            assert!(again.1.is_nobody(), "once is enough");
            told.cut();
            assert_eq!(notices.take(), (vec![], vec![key]));
            drop(granted);
            if !at_once {
                entry.end_stubborn();
                let waker = Some(Waker::noop());
                assert!(entry.revoke(waker).0.is_none(), "the device may still reach it");
                ends.store(true, Ordering::Relaxed);
                entry.end_stubborn();
            }
            assert!(entry.revoke(None).0.is_some());
        }
    }

    #[test]
    fn a_forked_child_waits_for_no_lock_of_a_regions() {
        let keys = Keys::default();
        let (key, entry) = region(&keys, 10, ACCESS_READ);
        let notices = Notices::new(Waker::noop().clone());
        let granted =
            keys.grant(key, &mut Registrar { ends: Arc::new(AtomicBool::new(true)) }, &notices);
        let granted = granted.unwrap_or_else(|_| panic!("it can be granted"));
        let used = keys.begin(key, 0, 10, false).expect("valid");
        // As if another thread held it.
        let locked = lock(&entry.users);
        // SAFETY: the child calls what a child may come to call, and ends without unwinding.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: takes no pointers. A child that hangs is ended.
            unsafe { libc::alarm(20) };
            drop((used, granted));
            // SAFETY: as above.
            unsafe { libc::_exit(0) };
        }
        drop(locked);
        assert!(child > 0, "no child");
        let mut status = -1;
        // SAFETY: a child of ours, and a number to write.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0, "the child hangs");
    }
}
