//! Registering the memory of payloads, and remembering it.
//!
//! Memory that this crate has mapped itself (loans, the node's pool of host memory) stays registered
//! when the operation is over: the next payload there registers nothing. Such a registration ends
//! before the memory is unmapped, when others need its room, or with the node. All other memory is
//! registered for one operation, since nobody would tell of its end, and another mapping might take
//! its place.
//!
//! What is landed into is registered a slice at a time, as it is needed: how long a payload is, a
//! peer can claim, and registering pins pages, and makes them where there are none. It is registered
//! for this process alone. What is offered to the peer is registered whole, since the offer names
//! it; the payload is in it by then.
//!
//! Regions that a peer may reach are counted here, too; their registrations are the peer's grants.
//!
//! What may be registered at a time is limited. Whoever is refused moves the payload another way.
//! The kernel is asked without the lock that all links of a device share.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::device::{Access, Domain, Registered};
use crate::link::LinkCounters;
use crate::memory::arenas::{self, Arena, Unmapping};

/// The longest piece that is offered, in bytes: registering takes about 50 ns for each 4 KiB, while
/// the endpoint's lock is held.
const PIECE_BYTES_MAX: usize = 256 << 20;
/// What is landed into is registered in slices of this many bytes.
pub(super) const SLICE_BYTES: usize = 8 << 20;
/// Of a mapping that is longer, what is offered is registered, and not all.
const WHOLE_BYTES_MAX: usize = 64 << 20;
/// What may be registered at a time for one device, in bytes.
const BYTES_MAX: usize = 2 << 30;
/// Of this, what may stay registered without being in use.
const KEPT_BYTES_MAX: usize = 512 << 20;
/// The longest region that a peer may reach by itself, in bytes: see [`PIECE_BYTES_MAX`], and pages
/// that are not there yet are made.
const REGION_BYTES_MAX: usize = 1 << 30;
/// Regions that peers may reach by themselves, over one device, in bytes. A region counts once for
/// each peer.
const REGIONS_BYTES_MAX: usize = 4 << 30;
/// Registrations of one mapping that are looked at for one that covers a piece.
const LOOKS: usize = 8;
const PAGE: usize = 4096;

/// Registered memory that an operation uses.
pub(super) struct Held {
    registered: Arc<Registered>,
    /// For one operation only: counted until dropped.
    single: Option<Arc<Registrations>>,
}

impl Held {
    /// Whether the memory stays registered when this operation is over.
    pub fn is_kept(&self) -> bool {
        self.single.is_none()
    }

    /// Whether it is registered there.
    pub fn is_of(&self, there: &Registrations) -> bool {
        self.registered.is_in(&there.domain)
    }

    pub fn local_key(&self) -> u32 {
        self.registered.local_key()
    }

    pub fn remote_key(&self) -> u32 {
        self.registered.remote_key()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // In a forked child the lock may seem to be held, for ever.
        if let Some(home) = self.single.as_ref().filter(|home| !home.domain.device.forked()) {
            home.let_go(Room::Single, self.registered.bytes);
        }
    }
}

/// What memory is to be registered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Use {
    /// This process reads the peer's memory into it.
    Land,
    /// The peer may read it.
    Offer,
    /// It is written into the peer's memory.
    Source,
}

impl Use {
    /// What this crate's own memory is registered for: it can be written, and registering it for
    /// that does for both.
    fn of_own_memory(self) -> Use {
        if self == Use::Source { Use::Land } else { self }
    }
}

/// Room for a region that a peer may reach: counted until dropped.
pub(super) struct RegionRoom {
    home: Arc<Registrations>,
    bytes: usize,
}

impl RegionRoom {
    /// Whether the registration of a region that was to end last over this device has ended.
    pub fn last_has_ended(&self) -> bool {
        !self.home.stubborn.load(Ordering::Relaxed)
    }

    /// One was to end.
    pub fn has_ended(&self, ended: bool) {
        self.home.stubborn.store(!ended, Ordering::Relaxed);
    }
}

impl Drop for RegionRoom {
    fn drop(&mut self) {
        // As for [`Held`].
        if !self.home.domain.device.forked() {
            self.home.state().region_bytes -= self.bytes;
        }
    }
}

/// Where the mapping begins, what the registration is for, where that begins.
type Place = (usize, Use, usize);

struct Kept {
    registered: Arc<Registered>,
    last_used: u64,
}

#[derive(Default)]
struct State {
    kept: BTreeMap<Place, Kept>,
    kept_bytes: usize,
    single_bytes: usize,
    region_bytes: usize,
    clock: u64,
    /// The shortest piece that the kernel has refused since something was let go of.
    refused_bytes: Option<usize>,
}

/// The registrations in one domain.
pub(super) struct Registrations {
    domain: Arc<Domain>,
    state: Mutex<State>,
    /// The last registration of a region's that was to end has not.
    stubborn: AtomicBool,
}

/// What came of asking for a registration.
pub(super) enum Found {
    /// It was there already. It covers this many bytes of the piece, from its beginning.
    Known(Held, usize),
    /// It was made.
    Made(Held, usize),
    /// It would have to be made, which was not wanted.
    NotNow,
    /// It cannot be made now.
    Refused,
}

impl Found {
    /// Counts what came of asking. `None`: there is no registration.
    pub fn count(self, counters: &mut LinkCounters) -> Option<(Held, usize)> {
        match self {
            Found::Known(held, covered) => {
                counters.registrations_reused += 1;
                Some((held, covered))
            }
            Found::Made(held, covered) => {
                counters.registrations += 1;
                Some((held, covered))
            }
            Found::NotNow | Found::Refused => {
                counters.registrations_refused += 1;
                None
            }
        }
    }
}

/// What a registration is counted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    Kept,
    Single,
}

/// What of a mapping is registered for a piece of it: where it begins, and how long it is.
fn span(arena: Arena, at: usize, bytes: usize, what: Use) -> (usize, usize) {
    let (begin, end) = match what {
        Use::Land | Use::Source => {
            let begin = at - (at - arena.start) % SLICE_BYTES;
            (begin, begin + SLICE_BYTES)
        }
        Use::Offer if arena.len <= WHOLE_BYTES_MAX => (arena.start, arena.start + arena.len),
        Use::Offer => (at - at % PAGE, (at + bytes).next_multiple_of(PAGE)),
    };
    let (begin, end) = (begin.max(arena.start), end.min(arena.start + arena.len));
    (begin, end - begin)
}

impl Registrations {
    pub fn new(domain: &Arc<Domain>) -> Arc<Registrations> {
        let made = Arc::new(Registrations {
            domain: domain.clone(),
            state: Mutex::default(),
            stubborn: AtomicBool::new(false),
        });
        arenas::listen(Arc::downgrade(&made) as _);
        made
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub fn lock_for_test(&self) -> impl Drop + '_ {
        self.state()
    }

    /// Registers a piece of memory that is alive for as long as the answer is used: all of it if it
    /// is to be offered, else its beginning. `may_make`: else only what is there already will do.
    pub fn get(self: &Arc<Self>, ptr: *const u8, bytes: usize, what: Use, may_make: bool) -> Found {
        if what == Use::Offer && bytes > PIECE_BYTES_MAX {
            return Found::Refused;
        }
        let at = ptr as usize;
        let arena = arenas::find(at, bytes);
        let own = what.of_own_memory();
        if let Some(arena) = arena
            && let Some((held, covered)) = self.state().find(arena, at, bytes, own)
        {
            return Found::Known(held, covered);
        }
        if !may_make {
            return Found::NotNow;
        }
        if let Some(arena) = arena
            && let (begin, len) = span(arena, at, bytes, own)
            && let Some(registered) = self.register(Room::Kept, begin, len, own)
        {
            let held = self.keep((arena.start, own, begin), registered);
            return Found::Made(held, bytes.min(begin + len - at));
        }
        let len = if what == Use::Offer { bytes } else { bytes.min(SLICE_BYTES) };
        match self.register(Room::Single, at, len, what) {
            Some(registered) => {
                let held = Held { registered: Arc::new(registered), single: Some(self.clone()) };
                Found::Made(held, len)
            }
            None => Found::Refused,
        }
    }

    /// Counts first, and asks the kernel then: others may go on meanwhile.
    fn register(&self, room: Room, start: usize, bytes: usize, what: Use) -> Option<Registered> {
        let access = match (what, room) {
            (Use::Land, _) => Access::Local,
            (Use::Source, _) => Access::Source,
            // Memory of this crate's own can be written, and pages that are not there yet become
            // the mapping's own only where they are registered for writing.
            (Use::Offer, Room::Kept) => Access::LocalAndRead,
            (Use::Offer, Room::Single) => Access::Read,
        };
        let mut ended = Vec::new();
        let reserved = self.state().reserve(room, bytes, &mut ended);
        drop(ended);
        if !reserved {
            return None;
        }
        match Registered::new(&self.domain, start as *const u8, bytes, access) {
            Ok(registered) => Some(registered),
            Err(error) => {
                let mut state = self.state();
                *state.counted(room) -= bytes;
                if matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::EAGAIN)) {
                    state.refused_bytes = Some(bytes);
                }
                drop(state);
                report(bytes, &error);
                None
            }
        }
    }

    /// Remembers what has been counted.
    fn keep(&self, place: Place, registered: Registered) -> Held {
        let registered = Arc::new(registered);
        let mut state = self.state();
        state.clock += 1;
        let kept = Kept { registered: registered.clone(), last_used: state.clock };
        // Another may have come between; whoever uses that goes on with it.
        let replaced = state.kept.insert(place, kept);
        if let Some(replaced) = &replaced {
            state.kept_bytes -= replaced.registered.bytes;
        }
        drop(state);
        drop(replaced);
        Held { registered, single: None }
    }

    /// Whether the kernel has refused something since something was let go of.
    pub fn lacks_memory(&self) -> bool {
        self.state().refused_bytes.is_some()
    }

    /// Others have let go of memory: the kernel may be asked again.
    pub fn try_again(&self) {
        self.state().refused_bytes = None;
    }

    /// Ends the registrations that are kept and that nobody uses. `false`: there are none.
    pub fn let_go_of_idle(&self) -> bool {
        let mut ended = Vec::new();
        let mut state = self.state();
        while let Some(kept) = state.forget_oldest_idle() {
            ended.push(kept);
        }
        drop(state);
        !ended.is_empty()
    }

    /// Room for a region that a peer may reach by itself. `None`: there is none left.
    pub fn region_room(self: &Arc<Self>, bytes: usize) -> Option<RegionRoom> {
        let mut state = self.state();
        if bytes > REGION_BYTES_MAX || state.region_bytes + bytes > REGIONS_BYTES_MAX {
            return None;
        }
        state.region_bytes += bytes;
        drop(state);
        Some(RegionRoom { home: self.clone(), bytes })
    }

    fn let_go(&self, room: Room, bytes: usize) {
        let mut state = self.state();
        *state.counted(room) -= bytes;
        state.refused_bytes = None;
    }
}

fn report(bytes: usize, error: &io::Error) {
    tracing::debug!(target: "thalweg::verbs", bytes, %error, "memory was not registered");
}

impl State {
    fn counted(&mut self, room: Room) -> &mut usize {
        match room {
            Room::Kept => &mut self.kept_bytes,
            Room::Single => &mut self.single_bytes,
        }
    }

    /// A registration that covers the piece, or its beginning if that will do.
    fn find(&mut self, arena: Arena, at: usize, bytes: usize, what: Use) -> Option<(Held, usize)> {
        let covers = |kept: &Kept, begin: usize| (begin + kept.registered.bytes).saturating_sub(at);
        let wanted = if what == Use::Offer { bytes } else { 1 };
        // What may be read by the peer as it is may be landed into as well.
        let (place, covered) = [what, Use::Offer].into_iter().find_map(|what| {
            let places = self.kept.range((arena.start, what, 0)..=(arena.start, what, at));
            let mut near =
                places.rev().take(LOOKS).map(|(place, kept)| (*place, covers(kept, place.2)));
            near.find(|(_, covered)| *covered >= wanted)
        })?;
        self.clock += 1;
        let clock = self.clock;
        let kept = self.kept.get_mut(&place)?;
        kept.last_used = clock;
        let held = Held { registered: kept.registered.clone(), single: None };
        Some((held, covered.min(bytes)))
    }

    /// Counts what is about to be registered, if it may be. `ended` is to be dropped once the lock
    /// is released.
    fn reserve(&mut self, room: Room, bytes: usize, ended: &mut Vec<Kept>) -> bool {
        if self.refused_bytes.is_some_and(|refused| bytes >= refused)
            || room == Room::Kept && !self.make_room(bytes, ended)
            || self.single_bytes + self.kept_bytes + bytes > BYTES_MAX
        {
            return false;
        }
        *self.counted(room) += bytes;
        true
    }

    /// Ends registrations that nobody uses, the oldest first, until `bytes` more can be kept.
    fn make_room(&mut self, bytes: usize, ended: &mut Vec<Kept>) -> bool {
        while self.kept_bytes + bytes > KEPT_BYTES_MAX {
            let Some(oldest) = self.forget_oldest_idle() else { return false };
            ended.push(oldest);
        }
        true
    }

    /// The registration that nobody has used for longest. To be dropped without the lock.
    fn forget_oldest_idle(&mut self) -> Option<Kept> {
        let idle = |kept: &Kept| Arc::strong_count(&kept.registered) == 1;
        let oldest = self.kept.iter().filter(|(_, kept)| idle(kept));
        let place = oldest.min_by_key(|(_, kept)| kept.last_used).map(|(at, _)| *at)?;
        self.forget(place)
    }

    fn forget(&mut self, place: Place) -> Option<Kept> {
        let kept = self.kept.remove(&place)?;
        self.kept_bytes -= kept.registered.bytes;
        self.refused_bytes = None;
        Some(kept)
    }

    /// Those of the mapping that begins there.
    fn forget_all(&mut self, start: usize) -> Vec<Kept> {
        let places = self.kept.range((start, Use::Land, 0)..=(start, Use::Offer, usize::MAX));
        let places: Vec<_> = places.map(|(place, _)| *place).collect();
        places.into_iter().filter_map(|place| self.forget(place)).collect()
    }
}

impl Unmapping for Registrations {
    fn unmapping(&self, start: usize) {
        let ended = self.state().forget_all(start);
        drop(ended);
    }
}
