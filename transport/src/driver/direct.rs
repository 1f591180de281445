//! Direct access: puts and gets that a link carries out itself, on regions for which the target
//! has granted it.
//!
//! Whoever uses a key for the first time asks for it ([`Head::Wanted`]) and does not wait: until
//! the answer is here the target's process serves, and it goes on serving if it refuses. A grant
//! keeps the region's memory, and the link's registration of it, in the target's endpoint. It ends
//! when the key is revoked: the target says so, the other side uses it no more, waits for what is
//! under way, and says that ([`Head::Revoked`]). From a peer that does not say so in time the key is
//! taken: its registration ends, whatever it has under way. If the endpoint ends first, an orderly goodbye
//! says the same for all keys; after any other end a [`Ward`] keeps the memory until the link
//! knows that the peer cannot reach it any more.
//!
//! How the bytes get there is the link's affair ([`crate::link::OneSided`]).

use std::collections::{HashMap, HashSet, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use smallvec::SmallVec;

use super::core::{Control, Core, Life, State};
use super::keys::{Granted, NotGranted, Notices};
use super::table::{Slot, What};
use crate::error::{Error, ErrorKind, LinkError};
use crate::link::{Class, Disposition, Link, OneSided, OpId, RemoteId};
use crate::proto::keys::check_bounds;
use crate::proto::wire::{GRANT_BYTES_MAX, Head};

/// Keys that are granted to one peer at a time, and keys of a peer's that are remembered. What
/// goes beyond is served by the target.
pub(super) const GRANTS_MAX: usize = 1024;

/// Registrations for a peer that come to nothing (it gives them back unasked, or the link tries and
/// fails): after so many nothing more is registered for it. One that is honest gives back what it
/// cannot open, and loses nothing: the target serves. What a limit of this side's refuses has cost
/// nothing, and may be due to others: it does not count.
pub(super) const VAIN_MAX: usize = 64;

/// What this side knows of a key of the peer's.
#[derive(Debug)]
enum Remote {
    /// The answer has not come.
    Asked,
    /// Granted; the link is told at the next flush.
    Arrived,
    Open(Open),
    /// Refused, revoked, or unknown to the link: not asked for again.
    Refused,
}

#[derive(Debug)]
struct Open {
    remote: RemoteId,
    len: u64,
    access: u8,
    in_flight: usize,
    revoking: bool,
}

/// What a grant says.
struct Terms {
    key: u64,
    len: u64,
    access: u8,
    bytes: SmallVec<[u8; 128]>,
}

/// Direct access between an endpoint and its peer, both ways. There is none for a link that cannot,
/// or a peer that does not know of it.
pub(crate) struct Direct {
    /// Something is to be done at the next flush.
    busy: bool,

    // As the side that reaches.
    remotes: HashMap<u64, Remote>,
    /// Those among them that are [`Remote::Refused`], oldest first: they give way to others.
    refused: VecDeque<u64>,
    arrived: Vec<Terms>,
    /// The peer wants them back.
    closing: Vec<u64>,
    in_flight: usize,
    /// The link has failed to: the target serves from now on.
    broken: bool,
    /// The peer has said goodbye, and is answered when nothing is in flight.
    goodbye_due: bool,

    // As the side that is reached.
    notices: Arc<Notices>,
    /// The peer asks for them.
    wanted: VecDeque<u64>,
    granted: HashMap<u64, Granted>,
    /// Those among them that were asked back.
    asked_back: HashSet<u64>,
    /// Keys that were taken from the peer, which may still say that it gives them back.
    cut: HashSet<u64>,
    /// See [`VAIN_MAX`].
    vain: usize,
    /// The peer has ended: nothing is granted any more, and all it had is given back.
    over: bool,
}

impl Direct {
    fn new(endpoint: Waker) -> Self {
        Direct {
            busy: false,
            remotes: HashMap::new(),
            refused: VecDeque::new(),
            arrived: Vec::new(),
            closing: Vec::new(),
            in_flight: 0,
            broken: false,
            goodbye_due: false,
            notices: Notices::new(endpoint),
            wanted: VecDeque::new(),
            granted: HashMap::new(),
            asked_back: HashSet::new(),
            cut: HashSet::new(),
            vain: 0,
            over: false,
        }
    }

    /// Whether a flush has anything to do here.
    #[inline]
    pub fn is_idle(&self) -> bool {
        !self.busy && !self.notices.any()
    }

    /// Keys that the peer holds.
    pub fn granted(&self) -> usize {
        self.granted.len()
    }

    /// Keys that the peer holds, asks for, or has yet to give back.
    pub fn held(&self) -> usize {
        self.granted.len() + self.wanted.len() + self.cut.len()
    }

    /// Keys of the peer's that are remembered.
    #[cfg(feature = "fuzzing")]
    pub fn remembered(&self) -> usize {
        self.remotes.len().max(self.refused.len())
    }

    /// Makes room for one more key, if there is any to be made.
    fn make_room(&mut self) -> bool {
        if self.remotes.len() < GRANTS_MAX {
            return true;
        }
        self.refused.pop_front().is_some_and(|oldest| self.remotes.remove(&oldest).is_some())
    }

    fn refuse(&mut self, key: u64) {
        self.remotes.insert(key, Remote::Refused);
        self.refused.push_back(key);
    }

    /// Where an operation that is within the grant goes.
    fn way_to(&self, key: u64, offset: u64, len: u64, access: u8) -> Option<RemoteId> {
        match self.remotes.get(&key)? {
            Remote::Open(open)
                if !self.broken
                    && !open.revoking
                    && open.access & access != 0
                    && check_bounds(offset, len, open.len) =>
            {
                Some(open.remote)
            }
            _ => None,
        }
    }

    fn begun(&mut self, key: u64) {
        if let Some(Remote::Open(open)) = self.remotes.get_mut(&key) {
            open.in_flight += 1;
            self.in_flight += 1;
        }
    }

    fn ended(&mut self, key: u64) {
        if let Some(Remote::Open(open)) = self.remotes.get_mut(&key) {
            open.in_flight -= 1;
            self.in_flight -= 1;
            self.busy |= open.revoking && open.in_flight == 0;
        }
    }
}

impl State {
    pub(super) fn on_wanted(&mut self, key: u64) -> Result<(), Disposition> {
        self.check_direct()?;
        let open = matches!(self.life, Life::Open);
        let Some(direct) = &mut self.direct else {
            self.outbox.push_back(Control::Refused { key });
            return Ok(());
        };
        if direct.granted.contains_key(&key) || direct.wanted.contains(&key) {
            return Err(State::protocol("direct access is asked for twice"));
        }
        if !open || direct.over || direct.vain >= VAIN_MAX || direct.held() >= GRANTS_MAX {
            self.outbox.push_back(Control::Refused { key });
        } else {
            direct.wanted.push_back(key);
            direct.busy = true;
        }
        Ok(())
    }

    pub(super) fn on_granted(
        &mut self,
        key: u64,
        len: u64,
        access: u8,
        bytes: &[u8],
    ) -> Result<(), Disposition> {
        let (direct, remote) = self.asked(key)?;
        *remote = Remote::Arrived;
        direct.push(Terms { key, len, access, bytes: SmallVec::from_slice(bytes) });
        Ok(())
    }

    pub(super) fn on_refused(&mut self, key: u64) -> Result<(), Disposition> {
        self.asked(key)?;
        if let Some(direct) = &mut self.direct {
            direct.refuse(key);
        }
        Ok(())
    }

    /// A key that this side has asked for.
    fn asked(&mut self, key: u64) -> Result<(&mut Vec<Terms>, &mut Remote), Disposition> {
        if let Some(direct) = &mut self.direct
            && let Some(remote @ Remote::Asked) = direct.remotes.get_mut(&key)
        {
            direct.busy = true;
            return Ok((&mut direct.arrived, remote));
        }
        Err(State::protocol("an answer about direct access that was not asked for"))
    }

    /// Keys that this side does not have, or has given back, are none of its business.
    pub(super) fn on_revoke(&mut self, key: u64) -> Result<(), Disposition> {
        self.check_direct()?;
        let Some(direct) = &mut self.direct else { return Ok(()) };
        match direct.remotes.get_mut(&key) {
            Some(Remote::Open(open)) if !open.revoking => open.revoking = true,
            Some(Remote::Arrived) if !direct.closing.contains(&key) => {}
            _ => return Ok(()),
        }
        direct.closing.push(key);
        direct.busy = true;
        Ok(())
    }

    pub(super) fn on_revoked(&mut self, key: u64) -> Result<(), Disposition> {
        self.check_direct()?;
        let direct = self.direct.as_mut();
        let direct = direct.ok_or_else(|| State::protocol("a key is given back that is none"))?;
        match direct.granted.remove(&key) {
            Some(granted) => {
                if !direct.asked_back.remove(&key) {
                    direct.vain += 1;
                }
                self.after.discard_any(Box::new(granted));
            }
            // What it says for one key its goodbye has said for all.
            None if direct.cut.remove(&key) || direct.over => {}
            None => return Err(State::protocol("a key is given back that was not granted")),
        }
        Ok(())
    }

    fn check_direct(&self) -> Result<(), Disposition> {
        match self.limits.direct {
            true => Ok(()),
            false => Err(State::protocol("direct access in a version without it")),
        }
    }

    /// The peer uses nothing that was granted any more, and will not again: it says so at its end.
    pub(super) fn release_grants(&mut self) {
        let grants = self.take_grants();
        if !grants.is_empty() {
            self.after.discard_any(Box::new(grants));
        }
    }

    fn take_grants(&mut self) -> Vec<Granted> {
        let Some(direct) = &mut self.direct else { return Vec::new() };
        direct.over = true;
        direct.wanted.clear();
        direct.asked_back.clear();
        direct.cut.clear();
        direct.granted.drain().map(|(_, granted)| granted).collect()
    }

    /// The peer has said goodbye. It is answered when this side reaches nothing of its any more.
    pub(super) fn answer_goodbye(&mut self) {
        match &mut self.direct {
            Some(direct) if direct.in_flight > 0 => direct.goodbye_due = true,
            _ => self.outbox.push_back(Control::CloseDone),
        }
    }

    /// Whether the next turn has to register a region for the peer.
    pub(super) fn has_wanted(&self) -> bool {
        let wanted = self.direct.as_ref().is_some_and(|direct| !direct.wanted.is_empty());
        wanted && !matches!(self.life, Life::Dead(_))
    }

    /// Whether the peer's goodbye is still to be answered.
    pub(super) fn owes_goodbye(&self) -> bool {
        self.direct.as_ref().is_some_and(|direct| direct.goodbye_due)
    }

    /// Whether a put or get of this slot is the link's.
    pub(super) fn is_direct(slot: &Slot) -> bool {
        matches!(slot.what, What::Put { direct: true, .. } | What::Get { direct: true, .. })
    }

    /// A direct put or get has ended.
    pub(super) fn direct_over(&mut self, id: OpId, result: Result<(), Error>) {
        let slot = self.ops.get(id).map(|slot| &slot.what);
        if let (Some(What::Put { key, .. } | What::Get { key, .. }), Some(direct)) =
            (slot, &mut self.direct)
        {
            direct.ended(*key);
            direct.broken |= result.is_err();
        }
        self.one_sided_over(id, result);
    }
}

impl Core {
    /// Allows direct access, if the lane can. `endpoint` is woken when a key has been revoked.
    pub fn enable_direct(&mut self, endpoint: Waker) {
        if self.state.limits.direct && self.one_sided().is_some() {
            self.state.direct = Some(Box::new(Direct::new(endpoint)));
        }
    }

    /// The lane's own puts and gets.
    pub(super) fn one_sided(&mut self) -> Option<&mut dyn OneSided> {
        let lane = self.lane_for(Class::OneSided, 0);
        self.lanes.get_mut(lane)?.one_sided()
    }

    /// The way to a region, if the link may go it. Costs one look into a table.
    pub(super) fn direct_way(
        &self,
        key: u64,
        offset: u64,
        len: usize,
        access: u8,
    ) -> Option<RemoteId> {
        self.state.direct.as_ref()?.way_to(key, offset, len as u64, access)
    }

    /// A direct operation is the link's from now on.
    pub(super) fn direct_begun(&mut self, key: u64) {
        if let Some(direct) = &mut self.state.direct {
            direct.begun(key);
        }
    }

    /// Asks for direct access to a region that is used for the first time.
    pub(super) fn want_direct(&mut self, key: u64) -> Result<(), Error> {
        let Some(direct) = &mut self.state.direct else { return Ok(()) };
        if !matches!(self.state.life, Life::Open)
            || direct.broken
            || direct.remotes.contains_key(&key)
            || !direct.make_room()
        {
            return Ok(());
        }
        direct.remotes.insert(key, Remote::Asked);
        self.control(&Head::Wanted { key })
    }

    /// Does what the peer has said about direct access, and says what it has to know.
    pub(super) fn serve_direct(&mut self) -> Result<(), Error> {
        let Some(direct) = &mut self.state.direct else { return Ok(()) };
        if direct.is_idle() && !direct.goodbye_due {
            return Ok(());
        }
        direct.busy = false;
        self.tell_revoked()?;
        self.grant_wanted()?;
        self.open_arrived()?;
        self.close_revoked()?;
        if let Some(direct) = &mut self.state.direct
            && direct.goodbye_due
            && direct.in_flight == 0
        {
            direct.goodbye_due = false;
            self.control(&Head::CloseDone)?;
        }
        Ok(())
    }

    /// Keys of this side that were revoked.
    fn tell_revoked(&mut self) -> Result<(), Error> {
        let Some(direct) = &mut self.state.direct else { return Ok(()) };
        if !direct.notices.any() {
            return Ok(());
        }
        let (mut revoked, overdue) = direct.notices.take();
        revoked.retain(|key| direct.granted.contains_key(key));
        direct.asked_back.extend(&revoked);
        // First: it is not said again what is overdue, and to say what is revoked may fail.
        for key in overdue {
            self.cut(key);
        }
        for key in revoked {
            self.control(&Head::Revoke { key })?;
        }
        Ok(())
    }

    /// As [`Core::serve_direct`], of an endpoint that is dead and of which a lane is still there,
    /// so that its peer may still reach what it was granted.
    pub(super) fn cut_overdue(&mut self) {
        let Some(direct) = &mut self.state.direct else { return };
        if direct.notices.any() {
            let (_, overdue) = direct.notices.take();
            overdue.into_iter().for_each(|key| self.cut(key));
        }
    }

    /// Takes from the peer what it has not given back in time.
    fn cut(&mut self, key: u64) {
        let Some(direct) = &mut self.state.direct else { return };
        let Some(granted) = direct.granted.remove(&key) else { return };
        direct.asked_back.remove(&key);
        direct.cut.insert(key);
        granted.cut();
        tracing::warn!(peer = %self.state.peer, "a region is taken from a peer that keeps it");
        self.state.after.discard_any(Box::new(granted));
    }

    /// What the peer has asked for: one region a turn, since registering takes its time.
    fn grant_wanted(&mut self) -> Result<(), Error> {
        let Some(direct) = &mut self.state.direct else { return Ok(()) };
        let Some(key) = direct.wanted.pop_front() else { return Ok(()) };
        direct.busy |= !direct.wanted.is_empty();
        match self.grant(key) {
            Some(Terms { key, len, access, bytes }) => {
                self.control(&Head::Granted { key, len, access, bytes: &bytes })
            }
            None => self.control(&Head::Refused { key }),
        }
    }

    /// Registers a region for the peer. `None`: that cannot be.
    fn grant(&mut self, key: u64) -> Option<Terms> {
        let keys = self.state.keys.clone();
        let notices = self.state.direct.as_ref()?.notices.clone();
        let refusal = match keys.grant(key, self.one_sided()?, &notices) {
            Ok(granted) if granted.bytes().len() <= GRANT_BYTES_MAX => {
                let (len, access) = granted.extent();
                let bytes = SmallVec::from_slice(granted.bytes());
                self.state.direct.as_mut()?.granted.insert(key, granted);
                return Some(Terms { key, len, access, bytes });
            }
            Ok(too_long) => Some(Box::new(too_long) as Box<_>),
            Err((NotGranted::Key, garbage)) => garbage,
            Err((NotGranted::Link(error), garbage)) => {
                self.tell_why("a region cannot be registered for direct access", &error);
                if let Some(direct) = &mut self.state.direct
                    && error.kind != ErrorKind::LimitExceeded
                {
                    direct.vain += 1;
                }
                garbage
            }
        };
        if let Some(garbage) = refusal {
            self.state.after.discard_any(garbage);
        }
        None
    }

    /// What the peer has granted.
    fn open_arrived(&mut self) -> Result<(), Error> {
        let Some(direct) = &mut self.state.direct else { return Ok(()) };
        for Terms { key, len, access, bytes } in std::mem::take(&mut direct.arrived) {
            let opened = match self.one_sided() {
                Some(link) => link.open(&bytes),
                None => return Ok(()),
            };
            let Some(direct) = &mut self.state.direct else { return Ok(()) };
            match opened {
                Ok(remote) => {
                    let revoking = direct.closing.contains(&key);
                    let open = Open { remote, len, access, in_flight: 0, revoking };
                    direct.remotes.insert(key, Remote::Open(open));
                }
                Err(error) => {
                    direct.refuse(key);
                    self.tell_why("a region that the peer has granted cannot be reached", &error);
                    self.control(&Head::Revoked { key })?;
                }
            }
        }
        Ok(())
    }

    /// What the peer wants back and nothing is under way on.
    fn close_revoked(&mut self) -> Result<(), Error> {
        let Some(direct) = &mut self.state.direct else { return Ok(()) };
        if direct.closing.is_empty() {
            return Ok(());
        }
        let mut over: SmallVec<[(u64, RemoteId); 4]> = SmallVec::new();
        let remotes = &direct.remotes;
        direct.closing.retain(|&key| match remotes.get(&key) {
            Some(Remote::Open(open)) if open.in_flight > 0 => true,
            Some(Remote::Open(open)) => {
                over.push((key, open.remote));
                false
            }
            // The link could not open it: given back already.
            _ => false,
        });
        for &(key, _) in &over {
            direct.refuse(key);
        }
        for (key, remote) in over {
            if let Some(link) = self.one_sided() {
                link.close(remote);
            }
            self.control(&Head::Revoked { key })?;
        }
        Ok(())
    }

    fn tell_why(&self, what: &str, error: &LinkError) {
        tracing::debug!(peer = %self.state.peer, reason = %error.detail, "{what}");
    }

    /// A lane is over. What it was granted for stays until the peer cannot reach it any more.
    pub(super) fn part_with(&mut self, link: Box<dyn Link>) {
        let grants = self.state.take_grants();
        if grants.is_empty() {
            return self.state.after.discard_any(Box::new(link));
        }
        let mut ward = Ward { link, grants };
        match ward.poll_over(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(grants) => {
                self.state.after.discard_any(Box::new(grants));
                self.state.after.discard_any(Box::new(ward));
            }
            Poll::Pending => self.state.after.keep(ward),
        }
    }
}

/// Memory that a peer may still reach over a link that has been killed. To be polled until it is
/// over; dropped before that, it leaves the memory allocated for good.
pub(crate) struct Ward {
    link: Box<dyn Link>,
    grants: Vec<Granted>,
}

impl Ward {
    /// Ready: nothing can be reached any more, and here is what was.
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<Vec<Granted>> {
        self.link.poll_unreachable(cx).map(|()| std::mem::take(&mut self.grants))
    }
}

impl Future for Ward {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.poll_over(cx).map(drop)
    }
}

impl Drop for Ward {
    fn drop(&mut self) {
        if !self.grants.is_empty() {
            tracing::error!("registered memory that a peer may still reach is left");
            std::mem::forget(std::mem::take(&mut self.grants));
        }
    }
}
