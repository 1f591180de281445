//! Payloads that are landed: read out of the peer's memory by all rails that may, or pulled in
//! chunks.

use thalweg_ffi::ibverbs as ffi;

use super::super::bulk::{FIRST, Incoming, Left, Next, Read};
use super::super::markers::Then;
use super::super::queues::What;
use super::super::registrations::{Found, Use};
use super::super::wire::{Header, Kind};
use super::{Offered, VerbsLink, error, protocol, worth_registering};
use crate::error::{ErrorKind, LinkError};
use crate::link::arrivals::filling;
use crate::link::{Budget, Landing, LinkKind, OpId, Sink};

/// Payloads whose memory cannot be registered in this turn that are looked at: what others land in may
/// be registered already.
const LOOKS: usize = 16;

impl VerbsLink {
    /// Deals with what has ended at further rails, and gives up those that have failed. `true`: it
    /// did.
    pub(super) fn settle_rails(&mut self, sink: &mut dyn Sink) -> Result<bool, LinkError> {
        while let Some((rail, completion)) = self.rails.next_ended() {
            if completion.status != ffi::IBV_WC_SUCCESS {
                self.rails.fails(rail, &completion);
            } else if let Some((id, read)) = self.rails.further_ended(rail) {
                self.read_ended(id, &read, sink)?;
            }
        }
        Ok(self.give_up_rails())
    }

    /// If the queue pair of one that failed will not go, the link ends.
    fn give_up_rails(&mut self) -> bool {
        if self.broken.is_some() || !self.rails.has_failed() {
            return false;
        }
        let mut left = Vec::new();
        if let Err(why) = self.rails.give_up_failed(&mut left) {
            self.broken = Some(error(ErrorKind::ConnectionLost, why));
        }
        for registrations in left {
            // This link's queue pairs at that device are gone, and nobody else was told the keys.
            self.outgoing
                .for_each(|payload| payload.besides.retain(|held| !held.is_of(&registrations)));
            self.incoming.values_mut().for_each(|payload| payload.let_go(&registrations));
        }
        true
    }

    /// A read has ended well, for this payload.
    pub(super) fn read_ended(
        &mut self,
        id: u32,
        read: &Read,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        match self.incoming.get_mut(&id).map(|incoming| incoming.read_ended(read.slice)) {
            None | Some(Left::More) => return Ok(()),
            Some(Left::All) => return self.behind_reads(id, Then::Pull),
            Some(Left::Nothing) => {}
        }
        let Some(incoming) = self.incoming.remove(&id) else { return Ok(()) };
        let op = incoming.op;
        drop(incoming);
        if op != OpId::NONE {
            sink.done(op, Ok(()));
        }
        self.behind_reads(id, Then::Release)
    }

    /// Nothing more is read of a payload: says what there is to be said then, once that cannot be
    /// overtaken by what an adapter asks for again.
    fn behind_reads(&mut self, id: u32, then: Then) -> Result<(), LinkError> {
        self.markers.push(id, then);
        self.post_marker()
    }

    /// Posts a marker, if one is wanted. What was to be said behind the last one goes first.
    pub(super) fn post_marker(&mut self) -> Result<(), LinkError> {
        if self.broken.is_some() || !self.waiting.is_empty() || !self.markers.begin() {
            return Ok(());
        }
        let posted = self.messenger.mark();
        posted.map_err(|error| {
            let doing = format!("posting a marker at {}", self.messenger.port());
            self.not_posted(&doing, &error)
        })
    }

    /// The marker has arrived.
    pub(super) fn marker_arrived(&mut self) -> Result<(), LinkError> {
        for (id, then) in self.markers.arrived() {
            match then {
                Then::Release => self.answer(Header::about(Kind::Release, id, 0))?,
                Then::Pull => self.pull(id)?,
            }
        }
        self.post_marker()
    }

    /// Lands a payload that waits at the peer.
    pub(super) fn fetch(
        &mut self,
        offered: Offered,
        to: Landing,
        op: OpId,
    ) -> Result<(), LinkError> {
        let Offered { id, len, pieces, rails } = offered;
        if self.incoming.contains_key(&id) {
            return Err(protocol("a payload's number is in use"));
        }
        let mut incoming = Incoming::new(op, filling(LinkKind::Verbs, to, len)?);
        let reads = !pieces.is_empty() && worth_registering(&incoming.segments(), len);
        if reads {
            // All may be read by the first rail.
            incoming.read_from(pieces, rails | FIRST);
            self.reading.push(id, incoming.usable());
        }
        self.incoming.insert(id, incoming);
        if reads { self.post_reads() } else { self.pull(id) }
    }

    /// Asks for the next chunks of a payload, if it is time.
    pub(super) fn pull(&mut self, id: u32) -> Result<(), LinkError> {
        match self.incoming.get_mut(&id).and_then(Incoming::grant) {
            Some(upto) => self.answer(Header::about(Kind::Pull, id, upto)),
            None => Ok(()),
        }
    }

    /// Posts reads, as far as there is room for them: one of each payload in turn. What they land in
    /// is registered before them, one slice a turn.
    pub(super) fn post_reads(&mut self) -> Result<(), LinkError> {
        let mut not_now = Vec::new();
        while self.broken.is_none() && not_now.len() < LOOKS {
            let first_has_room = self.first_has_room();
            if first_has_room && let Some((id, read)) = self.rails.next_again() {
                self.post_read(id, &read)?;
                continue;
            }
            let room = self.rails.with_room(first_has_room);
            let Some(id) = self.reading.pop(room) else { break };
            let Some(incoming) = self.incoming.get_mut(&id) else { continue };
            let rails = &self.rails;
            match incoming.next_read(|usable| rails.pick(usable, first_has_room)) {
                Next::Nothing => {}
                Next::Wait => {
                    self.reading.push(id, incoming.usable());
                    break;
                }
                Next::Read(read) => {
                    self.count(&read);
                    self.post_read(id, &read)?;
                    self.read_on(id);
                }
                Next::Register { ptr, bytes } => match self.register_slice(id, ptr, bytes)? {
                    true => self.read_at_once(id)?,
                    false => not_now.push(id),
                },
            }
        }
        self.registers_next = !not_now.is_empty();
        not_now.into_iter().for_each(|id| self.read_on(id));
        Ok(())
    }

    /// Memory was registered for a payload's next read: it is posted before anybody else's.
    fn read_at_once(&mut self, id: u32) -> Result<(), LinkError> {
        let first_has_room = self.first_has_room();
        let rails = &self.rails;
        let Some(incoming) = self.incoming.get_mut(&id) else { return Ok(()) };
        if let Next::Read(read) = incoming.next_read(|usable| rails.pick(usable, first_has_room)) {
            self.count(&read);
            self.post_read(id, &read)?;
        }
        self.read_on(id);
        Ok(())
    }

    /// A payload waits for its turn, if there is more to be read of it.
    fn read_on(&mut self, id: u32) {
        if let Some(incoming) = self.incoming.get(&id).filter(|incoming| incoming.wants_reads()) {
            self.reading.push(id, incoming.usable());
        }
    }

    fn first_has_room(&mut self) -> bool {
        self.messenger.queues().room(What::Read) > 0
    }

    /// Counts a read by the rail that it is first asked for by.
    fn count(&mut self, read: &Read) {
        self.counters.rdma_bytes_received += u64::from(read.bytes);
        self.counters.rail_bytes_received[read.rail] += u64::from(read.bytes);
    }

    fn post_read(&mut self, id: u32, read: &Read) -> Result<(), LinkError> {
        // SAFETY: within the landing, which the driver keeps until it is reported done; that
        // happens when every read has completed or the queue pair is gone. It is registered for
        // writing until then.
        let posted = unsafe { self.rails.read(&mut self.messenger, id, read) };
        match posted {
            Err(error) if read.rail > 0 => {
                self.rails.read_again(id, read);
                self.rails.fails_because(read.rail, format!("posting a read: {error}"));
                self.give_up_rails();
                Ok(())
            }
            Err(error) => {
                let doing = format!("posting a read at {}", self.messenger.port());
                Err(self.not_posted(&doing, &error))
            }
            Ok(()) => Ok(()),
        }
    }

    /// Registers a piece of memory with the first device. Where that lacks memory, further ones are
    /// done without.
    pub(super) fn registered(
        &mut self,
        (ptr, bytes): (*const u8, usize),
        what: Use,
        may_make: bool,
    ) -> Found {
        let found = self.registrations.get(ptr, bytes, what, may_make);
        let refused = matches!(found, Found::Refused) && self.registrations.lacks_memory();
        if refused && self.rails.leave_memory() {
            self.registrations.try_again();
            return self.registrations.get(ptr, bytes, what, may_make);
        }
        found
    }

    /// Registers what the next read of a payload lands in. `false`: not in this turn.
    fn register_slice(&mut self, id: u32, ptr: *const u8, bytes: usize) -> Result<bool, LinkError> {
        let found = self.registered((ptr, bytes), Use::Land, !self.has_registered);
        if matches!(found, Found::NotNow) {
            return Ok(false);
        }
        let made = !matches!(found, Found::Known(..));
        let Some(incoming) = self.incoming.get_mut(&id) else { return Ok(true) };
        let Some((held, covered)) = found.count(&mut self.counters) else {
            self.has_registered = true;
            // What is under way ends first.
            return match incoming.refused() {
                Left::All => self.behind_reads(id, Then::Pull).map(|()| true),
                _ => Ok(true),
            };
        };
        // With all devices in one turn: it is the first that makes the pages.
        let may_make = made || !self.has_registered;
        let rails = if self.rails.gain(held.is_kept()) { incoming.rails() } else { 0 };
        let memory = (ptr, covered);
        let landing = self.rails.land(rails, held, memory, may_make, &mut self.counters);
        let Some((ready, covered)) = landing else { return Ok(false) };
        self.has_registered |= made || ready.held.len() > 1;
        incoming.registered(ready, covered);
        Ok(true)
    }

    /// A piece of a payload that was pulled.
    pub(super) fn chunk(
        &mut self,
        header: &Header,
        bytes: &[u8],
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        let id = header.id;
        let expected = |incoming: &&mut Incoming| incoming.expects(header.len, bytes.len());
        let Some(incoming) = self.incoming.get_mut(&id).filter(expected) else {
            return Err(protocol("a chunk that was not asked for"));
        };
        // SAFETY: it was asked for, and the driver keeps the landing.
        unsafe { incoming.take(bytes) };
        budget.bytes = budget.bytes.saturating_sub(bytes.len());
        // Chunks are no parcels: their bytes limit a turn.
        budget.parcels += 1;
        self.counters.inline_bytes_received += bytes.len() as u64;
        if incoming.is_over() {
            let op = incoming.op;
            self.incoming.remove(&id);
            if op != OpId::NONE {
                sink.done(op, Ok(()));
            }
            return Ok(());
        }
        self.pull(id)
    }
}
