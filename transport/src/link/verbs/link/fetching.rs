//! Payloads that are landed: read out of the peer's memory by all rails that may, or pulled in
//! chunks.

use super::super::bulk::{Incoming, Left, Next, Read};
use super::super::queues::What;
use super::super::registrations::{Found, Use};
use super::super::wire::{Header, Kind};
use super::{Offered, VerbsLink, protocol, worth_registering};
use crate::error::LinkError;
use crate::link::arrivals::filling;
use crate::link::{Budget, Landing, LinkKind, OpId, Sink};

impl VerbsLink {
    /// A read by this rail has ended well, for this payload.
    pub(super) fn read_ended(
        &mut self,
        id: u32,
        rail: usize,
        sink: &mut dyn Sink,
    ) -> Result<(), LinkError> {
        match self.incoming.get_mut(&id).map(|incoming| incoming.read_ended(rail)) {
            None | Some(Left::More) => return Ok(()),
            Some(Left::All) => return self.pull(id),
            Some(Left::Nothing) => {}
        }
        let Some(incoming) = self.incoming.remove(&id) else { return Ok(()) };
        let op = incoming.op;
        drop(incoming);
        if op != OpId::NONE {
            sink.done(op, Ok(()));
        }
        self.answer(Header::about(Kind::Release, id, 0))
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
            incoming.read_from(pieces, rails | 1);
            self.reading.push_back(id);
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
        let (mut waiting, mut registers) = (0, false);
        while self.broken.is_none()
            && waiting < self.reading.len()
            && (self.first_has_room() || self.rails.has_room())
        {
            let Some(id) = self.reading.pop_front() else { break };
            let first_has_room = self.first_has_room();
            let rails = &self.rails;
            let pick = |usable| rails.pick(usable, first_has_room);
            let incoming = self.incoming.get_mut(&id);
            match incoming.map_or(Next::Nothing, |incoming| incoming.next_read(pick)) {
                Next::Nothing => {}
                Next::Wait => {
                    waiting += 1;
                    self.reading.push_back(id);
                }
                Next::Read(read) => {
                    waiting = 0;
                    self.post_read(id, &read)?;
                }
                Next::Register { ptr, bytes } => match self.register_slice(id, ptr, bytes)? {
                    true => self.reading.push_front(id),
                    false => {
                        (waiting, registers) = (waiting + 1, true);
                        self.reading.push_back(id);
                    }
                },
            }
        }
        self.registers_next = registers;
        Ok(())
    }

    fn first_has_room(&mut self) -> bool {
        self.messenger.queues().room(What::Read) > 0
    }

    fn post_read(&mut self, id: u32, read: &Read) -> Result<(), LinkError> {
        // SAFETY: within the landing, which the driver keeps until it is reported done; that
        // happens when every read has completed or the queue pair is gone. It is registered for
        // writing until then.
        if let Err(error) = unsafe { self.rails.read(&mut self.messenger, id, read) } {
            let port = self.rails.port(read.rail).unwrap_or_else(|| self.messenger.port());
            let doing = format!("posting a read at {port}");
            return Err(self.not_posted(&doing, &error));
        }
        self.counters.rdma_bytes_received += u64::from(read.bytes);
        self.counters.rail_bytes_received[read.rail] += u64::from(read.bytes);
        if self.incoming.get(&id).is_some_and(Incoming::wants_reads) {
            self.reading.push_back(id);
        }
        Ok(())
    }

    /// Registers what the next read of a payload lands in. `false`: not in this turn.
    fn register_slice(&mut self, id: u32, ptr: *const u8, bytes: usize) -> Result<bool, LinkError> {
        let found = self.registrations.get(ptr, bytes, Use::Land, !self.has_registered);
        if matches!(found, Found::NotNow) {
            return Ok(false);
        }
        let made = !matches!(found, Found::Known(..));
        let Some(incoming) = self.incoming.get_mut(&id) else { return Ok(true) };
        let Some((held, covered)) = found.count(&mut self.counters) else {
            self.has_registered = true;
            // What is under way ends first.
            return match incoming.refused() {
                Left::All => self.pull(id).map(|()| true),
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
