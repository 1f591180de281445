//! Registering the memory of payloads, and remembering it.
//!
//! Memory that this crate has mapped itself (loans, the node's pool of host memory) is registered a
//! whole mapping at a time, and stays registered when the operation is over: the next payload there
//! registers nothing. Such a registration ends before the memory is unmapped, when others need its
//! room, or with the node. All other memory is registered for one operation, since nobody would
//! tell of its end, and another mapping might take its place.
//!
//! What may be registered at a time is limited. Whoever is refused moves the payload another way.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::device::{Access, Domain, Registered};
use crate::memory::arenas::{self, Unmapping};

/// The longest piece that is registered, in bytes: it takes about 50 ns for each 4 KiB, while the
/// endpoint's lock is held.
const PIECE_BYTES_MAX: usize = 256 << 20;
/// What may be registered at a time for one device, in bytes.
const BYTES_MAX: usize = 2 << 30;
/// Of this, what may stay registered without being in use.
const KEPT_BYTES_MAX: usize = 512 << 20;

/// Registered memory that an operation uses.
pub(super) struct Held {
    registered: Arc<Registered>,
    /// For one operation only: counted until dropped.
    single: Option<Arc<Registrations>>,
}

impl Held {
    pub fn local_key(&self) -> u32 {
        self.registered.local_key()
    }

    pub fn remote_key(&self) -> u32 {
        self.registered.remote_key()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(home) = &self.single {
            home.let_go(self.registered.bytes);
        }
    }
}

struct Kept {
    registered: Arc<Registered>,
    last_used: u64,
}

#[derive(Default)]
struct State {
    /// By the address at which the mapping begins.
    kept: BTreeMap<usize, Kept>,
    kept_bytes: usize,
    single_bytes: usize,
    clock: u64,
    /// The shortest piece that the kernel has refused since something was let go of.
    refused_bytes: Option<usize>,
}

/// The registrations in one domain.
pub(super) struct Registrations {
    domain: Arc<Domain>,
    state: Mutex<State>,
}

/// How a piece of memory came to be registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// Just now.
    Fresh,
    /// It was already.
    Known,
}

impl Registrations {
    pub fn new(domain: &Arc<Domain>) -> Arc<Registrations> {
        let made = Arc::new(Registrations { domain: domain.clone(), state: Mutex::default() });
        arenas::listen(Arc::downgrade(&made) as _);
        made
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a piece of memory that is alive for as long as the answer is used. `None`: it
    /// cannot be registered now.
    pub fn get(
        self: &Arc<Self>,
        ptr: *const u8,
        bytes: usize,
        access: Access,
    ) -> Option<(Held, Origin)> {
        if bytes > PIECE_BYTES_MAX {
            return None;
        }
        let mut state = self.state();
        let arena = arenas::find(ptr as usize, bytes).filter(|arena| arena.len <= PIECE_BYTES_MAX);
        if let Some(arena) = arena {
            state.clock += 1;
            let clock = state.clock;
            if let Some(kept) = state.kept.get_mut(&arena.start) {
                kept.last_used = clock;
                let held = Held { registered: kept.registered.clone(), single: None };
                return Some((held, Origin::Known));
            }
            let start = arena.start as *const u8;
            let access = Access::LocalAndRead;
            if state.make_room(arena.len, KEPT_BYTES_MAX)
                && let Some(registered) = self.register(&mut state, start, arena.len, access)
            {
                let registered = Arc::new(registered);
                let kept = Kept { registered: registered.clone(), last_used: clock };
                state.kept.insert(arena.start, kept);
                state.kept_bytes += arena.len;
                return Some((Held { registered, single: None }, Origin::Fresh));
            }
        }
        let registered = self.register(&mut state, ptr, bytes, access)?;
        state.single_bytes += bytes;
        let held = Held { registered: Arc::new(registered), single: Some(self.clone()) };
        Some((held, Origin::Fresh))
    }

    fn register(
        &self,
        state: &mut State,
        ptr: *const u8,
        bytes: usize,
        access: Access,
    ) -> Option<Registered> {
        let hopeless = state.refused_bytes.is_some_and(|refused| bytes >= refused);
        if hopeless || state.single_bytes + state.kept_bytes + bytes > BYTES_MAX {
            return None;
        }
        match Registered::new(&self.domain, ptr, bytes, access) {
            Ok(registered) => Some(registered),
            Err(error) => {
                let for_want_of_room =
                    matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::EAGAIN));
                if for_want_of_room {
                    state.refused_bytes = Some(bytes);
                }
                report(bytes, &error);
                None
            }
        }
    }

    fn let_go(&self, bytes: usize) {
        let mut state = self.state();
        state.single_bytes -= bytes;
        state.refused_bytes = None;
    }
}

fn report(bytes: usize, error: &io::Error) {
    tracing::debug!(target: "thalweg::verbs", bytes, %error, "memory was not registered");
}

impl State {
    /// Ends registrations that nobody uses, the oldest first, until `bytes` more fit.
    fn make_room(&mut self, bytes: usize, max: usize) -> bool {
        while self.kept_bytes + bytes > max {
            let idle = |kept: &Kept| Arc::strong_count(&kept.registered) == 1;
            let oldest = self.kept.iter().filter(|(_, kept)| idle(kept));
            let Some(start) = oldest.min_by_key(|(_, kept)| kept.last_used).map(|(at, _)| *at)
            else {
                return false;
            };
            self.forget(start);
        }
        true
    }

    fn forget(&mut self, start: usize) {
        if let Some(kept) = self.kept.remove(&start) {
            self.kept_bytes -= kept.registered.bytes;
            self.refused_bytes = None;
        }
    }
}

impl Unmapping for Registrations {
    fn unmapping(&self, start: usize) {
        self.state().forget(start);
    }
}
