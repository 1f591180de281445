//! Regions that peers may reach by key.

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;
use std::task::Waker;

use super::sync::{Mutex, lock};
use super::table::RawSegment;
use crate::proto::keys::{ACCESS_READ, ACCESS_WRITE, check_bounds};
use crate::proto::wire::Status;

struct Users {
    count: usize,
    revoked: bool,
    /// The registered buffer, until revocation hands it back.
    buffer: Option<Box<dyn Any + Send>>,
    waiting: Option<Waker>,
}

/// One registered region.
pub(crate) struct Entry {
    memory: RawSegment,
    access: u8,
    users: Mutex<Users>,
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

    /// Refuses new users. `Some`: no user is left, here is the buffer (once). Otherwise `waker` is
    /// called when the last user is gone.
    pub fn revoke(&self, waker: Option<&Waker>) -> Option<Box<dyn Any + Send>> {
        let mut users = lock(&self.users);
        users.revoked = true;
        if users.count == 0 {
            return users.buffer.take();
        }
        let old = std::mem::replace(&mut users.waiting, waker.cloned());
        drop(users);
        drop(old);
        None
    }

    /// The owner does not want the buffer back: it is dropped with the last user.
    pub fn forget(&self) {
        drop(self.revoke(None));
    }
}

/// A use of a region by a transfer: keeps the buffer alive.
pub(crate) struct RegionUse(Arc<Entry>);

impl RegionUse {
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
        let users = Users { count: 0, revoked: false, buffer: Some(buffer), waiting: None };
        let entry = Arc::new(Entry { memory, access, users: Mutex::new(users) });
        let mut keys = lock(&self.0);
        loop {
            let key = random_u64()?;
            if let std::collections::hash_map::Entry::Vacant(vacant) = keys.entry(key) {
                vacant.insert(entry.clone());
                return Ok((key, entry));
            }
        }
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
}

pub(crate) fn random_u64() -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(std::io::Error::other)?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
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
        assert!(entry.revoke(Some(Waker::noop())).is_none(), "still in use");
        assert_eq!(keys.begin(key, 0, 8, true).err(), Some(Status::KeyUnknown));
        drop(used);
        assert!(entry.revoke(None).is_some());
    }
}
