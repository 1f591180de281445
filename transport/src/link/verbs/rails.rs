//! Rails: the pairs of ports that a link uses. The first one carries everything (`messenger`); the
//! further ones, each with a queue pair of its own, help to read long payloads.
//!
//! A payload is cut into reads, and each goes to the rail that would be done with it first, by what
//! it has under way and its rate. Nothing is promised between rails: a payload is there when all of
//! its reads have ended, and that is the link's to see (`bulk`).
//!
//! Only rails that both sides have seen working are used (`setup`). From then on one that fails ends
//! the link, as the first one does.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use smallvec::SmallVec;
use thalweg_ffi::ibverbs as ffi;

use super::alarm::Alarm;
use super::blob::{RAILS_MAX, RailTerms};
use super::bulk::{READ_BYTES_MAX, Read, Ready};
use super::device::LocalPort;
use super::messenger::{Messenger, READS};
use super::queues::{Completion, Depths, Lane, Queues, Rdma, Remote, Side, What};
use super::registrations::{Found, Held, Registrations, Use};
use super::wire::Piece;
use crate::link::LinkCounters;
use crate::runtime::{Attempt, Source};

/// What registering memory takes, in picoseconds for each byte: 50 ns for a page.
const REGISTER_PS: u64 = 12;
/// What a port with a rate of 1 takes to read a byte, in picoseconds: that is 100 Mb/s.
const READ_PS: u64 = 80_000;

/// Whether reading by all rails saves more than registering memory takes, on both sides, with so many
/// more devices, if it is for this one payload.
fn gains_from_one_use(first_rate: u64, all_rates: u64, devices: usize) -> bool {
    READ_PS / first_rate - READ_PS / all_rates > 2 * REGISTER_PS * devices as u64
}

/// A further rail: a queue pair by which each side reads what the other has offered.
pub(super) struct Rail {
    queues: Queues,
    channel: Source,
    registrations: Arc<Registrations>,
    alarm: Arc<Alarm>,
}

impl Rail {
    /// The queues of one, at a port.
    pub fn queues(domain: &Arc<super::device::Domain>, port: &LocalPort) -> io::Result<Queues> {
        let depths = Depths { receives: 0, sends: 0, reads: READS as u32, reaches: 0 };
        Queues::new(domain, port, &[Lane::Reads], depths, 0)
    }

    /// `channel` is that of the queues.
    pub fn new(
        queues: Queues,
        channel: Source,
        registrations: Arc<Registrations>,
        alarm: Arc<Alarm>,
    ) -> Rail {
        Rail { queues, channel, registrations, alarm }
    }

    pub fn port(&self) -> &LocalPort {
        self.queues.port()
    }

    /// What the peer has to know.
    pub fn terms(&self, ports: (u8, u8)) -> RailTerms {
        let reads = self.port().device.limits.reads_answered;
        RailTerms { ports, queue_pair: self.queues.number(Lane::Reads), reads }
    }

    /// Connects it to the peer's end.
    pub fn connect(&mut self, first_packet: u32, to: &Remote) -> io::Result<()> {
        self.queues.connect(Lane::Reads, first_packet, to)
    }

    /// Asks for no bytes, which the peer's adapter answers if it is reached.
    pub fn probe(&mut self) -> io::Result<()> {
        let (writes, inline, bytes) = (false, false, 0);
        let (local, local_key, remote, remote_key) = (std::ptr::null_mut(), 0, 0, 0);
        let rdma = Rdma { writes, local, local_key, bytes, remote, remote_key, inline };
        // SAFETY: no bytes, so that no memory is touched.
        unsafe { self.queues.post_rdma(0, Lane::Reads, &rdma) }
    }

    /// Takes what has ended. Pending: nothing has, and `cx`'s waker is registered.
    pub fn poll_ended(
        &mut self,
        cx: &mut Context<'_>,
        into: &mut Vec<Completion>,
    ) -> Poll<io::Result<()>> {
        let Self { queues, channel, .. } = self;
        loop {
            queues.forget_events()?;
            queues.arm(Side::Send)?;
            queues.take(Side::Send, into, |_| What::Read)?;
            if !into.is_empty() {
                return Poll::Ready(Ok(()));
            }
            match channel.poll_read(cx, |_| queues.take_event().map(Attempt::More)) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            }
        }
    }
}

/// What a rail has under way.
struct Load {
    /// In units of 100 Mb/s.
    rate: u64,
    /// The lengths of its reads, in the order in which they end.
    reads: VecDeque<u32>,
    bytes: u64,
}

impl Load {
    fn new(port: &LocalPort) -> Load {
        let reads = VecDeque::with_capacity(READS);
        // Where rates are not known, none is.
        Load { rate: u64::from(port.port.rate).max(1), reads, bytes: 0 }
    }

    fn begin(&mut self, bytes: u32) {
        self.reads.push_back(bytes);
        self.bytes += u64::from(bytes);
    }

    fn end(&mut self) {
        self.bytes -= self.reads.pop_front().map_or(0, u64::from);
    }

    /// When it would be done with one more read, in no particular unit.
    fn time_with_one_more(&self) -> u64 {
        (self.bytes + READ_BYTES_MAX as u64) * 1000 / self.rate
    }
}

/// A further rail in use.
struct Further {
    rail: Rail,
    load: Load,
    /// Which of [`Rails::domains`] its memory is registered in; none: that of the first rail.
    domain: Option<usize>,
}

/// All rails of a link, numbered from the first one, 0. What the first one does is the messenger's.
pub(super) struct Rails {
    first: Load,
    further: Vec<Further>,
    /// Those of further rails that are not the first one's.
    domains: Vec<Arc<Registrations>>,
    /// See [`gains_from_one_use`].
    gains_from_one_use: bool,
    /// What has ended at further rails and has not been dealt with, by rail.
    ended: VecDeque<(usize, Completion)>,
    taken: Vec<Completion>,
}

impl Rails {
    /// `port` and `registrations` are those of the first rail.
    pub fn new(port: &LocalPort, registrations: &Arc<Registrations>, rails: Vec<Rail>) -> Rails {
        let mut domains: Vec<Arc<Registrations>> = Vec::new();
        let mut further: Vec<Further> = Vec::new();
        for rail in rails.into_iter().take(RAILS_MAX - 1) {
            let is_its = |known: &Arc<Registrations>| Arc::ptr_eq(known, &rail.registrations);
            let domain = match domains.iter().position(is_its) {
                None if is_its(registrations) => None,
                None => {
                    domains.push(rail.registrations.clone());
                    Some(domains.len() - 1)
                }
                known => known,
            };
            further.push(Further { load: Load::new(rail.port()), rail, domain });
        }
        let first = Load::new(port);
        let all = first.rate + further.iter().map(|further| further.load.rate).sum::<u64>();
        Rails {
            gains_from_one_use: gains_from_one_use(first.rate, all, domains.len()),
            first,
            further,
            domains,
            ended: VecDeque::new(),
            taken: Vec::new(),
        }
    }

    pub fn has_further(&self) -> bool {
        !self.further.is_empty()
    }

    /// Whether all of these are there.
    pub fn has_all(&self, rails: u8) -> bool {
        u32::from(rails) < 1 << (1 + self.further.len())
    }

    /// Whether memory is worth registering for further rails. `is_kept`: it stays registered.
    pub fn gain(&self, is_kept: bool) -> bool {
        self.has_further() && (is_kept || self.gains_from_one_use)
    }

    /// The ports of further rails, for people.
    pub fn describe(&self) -> String {
        let ports = self.further.iter().map(|further| further.rail.port().to_string());
        ports.collect::<Vec<_>>().join(", ")
    }

    /// The port of a further rail.
    pub fn port(&self, rail: usize) -> Option<&LocalPort> {
        self.further.get(rail.checked_sub(1)?).map(|further| further.rail.port())
    }

    /// Which of these rails would be done with a read first. `None`: each has enough to do.
    pub fn pick(&self, rails: u8, first_has_room: bool) -> Option<usize> {
        let first = Some((0, &self.first)).filter(|_| first_has_room);
        let has_room = |further: &&Further| further.rail.queues.room(What::Read) > 0;
        let numbered = (1..).zip(&self.further).filter(|(_, further)| has_room(further));
        first
            .into_iter()
            .chain(numbered.map(|(rail, further)| (rail, &further.load)))
            .filter(|(rail, _)| rails & 1 << rail != 0)
            .min_by_key(|(_, load)| load.time_with_one_more())
            .map(|(rail, _)| rail)
    }

    /// Whether a further rail could take a read.
    pub fn has_room(&self) -> bool {
        self.further.iter().any(|further| further.rail.queues.room(What::Read) > 0)
    }

    /// Posts a read into memory of this side's. `id` is given back when it has ended.
    ///
    /// # Safety
    ///
    /// As for [`Queues::post_rdma`].
    pub unsafe fn read(
        &mut self,
        messenger: &mut Messenger,
        id: u32,
        read: &Read,
    ) -> io::Result<()> {
        let load = match read.rail.checked_sub(1) {
            None => {
                // SAFETY: the caller's.
                unsafe { messenger.read(id, read)? };
                &mut self.first
            }
            Some(at) => {
                let absent = || io::Error::from(io::ErrorKind::NotConnected);
                let Further { rail, load, .. } = self.further.get_mut(at).ok_or_else(absent)?;
                // SAFETY: the caller's.
                unsafe { rail.queues.post_rdma(id.into(), Lane::Reads, &read.rdma())? };
                load
            }
        };
        load.begin(read.bytes);
        Ok(())
    }

    /// A read of the first rail's has ended.
    pub fn first_ended(&mut self) {
        self.first.end();
    }

    /// Takes what has ended at further rails.
    pub fn take(&mut self) -> io::Result<()> {
        for (rail, Further { rail: Rail { queues, .. }, .. }) in (1..).zip(&mut self.further) {
            if queues.under_way(What::Read) > 0 {
                self.taken.clear();
                queues.take(Side::Send, &mut self.taken, |_| What::Read)?;
                self.ended.extend(self.taken.iter().map(|completion| (rail, *completion)));
            }
        }
        Ok(())
    }

    pub fn has_ended(&self) -> bool {
        !self.ended.is_empty()
    }

    /// Of what has ended at further rails and has not been dealt with, the first that failed.
    pub fn first_failed(&self) -> Option<(usize, Completion)> {
        let failed = |(_, ended): &&(usize, Completion)| ended.status != ffi::IBV_WC_SUCCESS;
        self.ended.iter().find(failed).copied()
    }

    /// The next to be dealt with: rail, and what has ended.
    pub fn next_ended(&mut self) -> Option<(usize, Completion)> {
        let (rail, completion) = self.ended.pop_front()?;
        self.further[rail - 1].load.end();
        Some((rail, completion))
    }

    /// Whether reads are under way at further rails.
    pub fn any_under_way(&self) -> bool {
        self.further.iter().any(|further| further.rail.queues.under_way(What::Read) > 0)
    }

    /// Has `cx`'s waker called when reads end. `true`: some have.
    pub fn watch(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        for (rail, further) in (1..).zip(&mut self.further) {
            if further.rail.queues.under_way(What::Read) > 0 {
                self.taken.clear();
                if let Poll::Ready(ended) = further.rail.poll_ended(cx, &mut self.taken) {
                    ended?;
                    self.ended.extend(self.taken.iter().map(|completion| (rail, *completion)));
                }
            }
        }
        Ok(self.has_ended())
    }

    /// Why one can go on no longer, if somebody has said so.
    pub fn raised(&self) -> Option<String> {
        self.further.iter().find_map(|further| further.rail.alarm.raised())
    }

    /// From now on, this waker is called when somebody says so. `true`: somebody has.
    pub fn watch_alarms(&self, waker: &Waker) -> bool {
        let watch = |further: &Further| further.rail.alarm.watch(waker);
        self.further.iter().fold(false, |raised, further| raised | watch(further))
    }

    /// Registers memory that the peer may read with the devices of further rails, as far as they take
    /// all of it; it is registered for the first one. Those are told.
    pub fn offer(
        &self,
        pieces: &mut [Piece],
        held: &mut SmallVec<[Held; 1]>,
        counters: &mut LinkCounters,
    ) -> u8 {
        let mut registered = |registrations: &Arc<Registrations>| {
            let all = pieces.iter().map(|piece| {
                let (ptr, bytes) = (piece.address as *const u8, piece.len as usize);
                Some(registrations.get(ptr, bytes, Use::Offer, true).count(counters)?.0)
            });
            let all: Vec<Held> = all.collect::<Option<_>>()?;
            let keys: Vec<u32> = all.iter().map(Held::remote_key).collect();
            held.extend(all);
            Some(keys)
        };
        let keys: Vec<_> = self.domains.iter().map(&mut registered).collect();
        let mut rails = 0;
        for (rail, further) in (1..).zip(&self.further) {
            match further.domain.map(|domain| &keys[domain]) {
                None => pieces.iter_mut().for_each(|piece| piece.keys[rail] = piece.keys[0]),
                Some(Some(keys)) => {
                    pieces.iter_mut().zip(keys).for_each(|(piece, key)| piece.keys[rail] = *key);
                }
                Some(None) => continue,
            }
            rails |= 1 << rail;
        }
        rails
    }

    /// Registers memory to be read into by these rails, or its beginning: `first` is it for the first
    /// one, as far as `bytes`. `None`: not in this turn. Else how much of it all of them know.
    pub fn land(
        &self,
        rails: u8,
        first: Held,
        (ptr, bytes): (*const u8, usize),
        may_make: bool,
        counters: &mut LinkCounters,
    ) -> Option<(Ready, usize)> {
        let mut keys = [None; RAILS_MAX];
        keys[0] = Some(first.local_key());
        let mut held = SmallVec::from_buf([first]);
        let mut covered = bytes;
        let mut known: SmallVec<[Option<u32>; RAILS_MAX]> = SmallVec::new();
        for (at, registrations) in self.domains.iter().enumerate() {
            let is_in = |(rail, further): (usize, &Further)| {
                rails & 1 << rail != 0 && further.domain == Some(at)
            };
            if !(1..).zip(&self.further).any(is_in) {
                known.push(None);
                continue;
            }
            let found = registrations.get(ptr, covered, Use::Land, may_make);
            if matches!(found, Found::NotNow) {
                return None;
            }
            known.push(found.count(counters).map(|(more, reaches)| {
                covered = covered.min(reaches);
                let key = more.local_key();
                held.push(more);
                key
            }));
        }
        for (rail, further) in (1..).zip(&self.further) {
            if rails & 1 << rail != 0 {
                keys[rail] = further.domain.map_or(keys[0], |domain| known[domain]);
            }
        }
        Some((Ready { keys, held }, covered))
    }

    /// Ends the queue pairs. After `Ok` none of these rails touches any memory.
    pub fn end(&mut self) -> io::Result<()> {
        let mut all = Ok(());
        for further in &mut self.further {
            // Each is tried, whatever became of those before it.
            all = all.and(further.rail.queues.destroy());
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_one_use_goes_by_rails_that_are_slow_enough() {
        // In units of 100 Mb/s.
        assert!(gains_from_one_use(1000, 2000, 1));
        assert!(!gains_from_one_use(2000, 4000, 1));
        assert!(!gains_from_one_use(1000, 4000, 3));
        assert!(gains_from_one_use(250, 1000, 3));
        assert!(gains_from_one_use(4000, 8000, 0), "two ports of one device");
        assert!(gains_from_one_use(1, 2, 1), "not known");
        assert!(!gains_from_one_use(1000, 1000, 0), "there is but one");
    }
}
