//! Rails: the pairs of ports that a link uses. The first one carries everything (`messenger`); the
//! further ones, each with a queue pair of its own, help to read long payloads.
//!
//! A payload is cut into reads, and each goes to the rail that would be done with it first, by what
//! it has under way and its rate. Nothing is promised between rails: a payload is there when all of
//! its reads have ended, and that is the link's to see (`bulk`).
//!
//! Only rails that both sides have seen working are used (`setup`). One that fails is given up for the
//! rest of the link's life: its queue pair is destroyed, from when on nothing writes by it, and what it
//! was reading is read again by the first rail. Only if its queue pair will not go does the link end.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use smallvec::SmallVec;

use super::alarm::Alarm;
use super::blob::{RAILS_MAX, RailTerms};
use super::bulk::{FIRST, READ_BYTES_MAX, Read, Ready};
use super::device::{Access, Domain, LocalPort};
use super::messenger::{Messenger, READS};
use super::pool::Slab;
use super::queues::{Completion, Depths, Lane, Queues, Rdma, Remote, Side, What};
use super::registrations::{Found, Held, Registrations, Use};
use super::watchdog::Finding;
use super::wire::{BUFFER_BYTES, Piece};
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

/// What a rail is tried with: a buffer that the peer reads, and one to read the peer's into. Twice the
/// largest packet, so that a path which swallows long packets is found out.
struct Samples(Slab);

/// Of the two buffers.
const OWN: usize = 0;
const THEIRS: usize = 1;

impl Samples {
    fn new(domain: &Arc<Domain>) -> io::Result<Samples> {
        let slab = Slab::new(domain, 2, Access::LocalAndRead)?;
        for at in 0..BUFFER_BYTES {
            // SAFETY: within a buffer that nobody knows of yet.
            unsafe { slab.buffer(OWN).add(at).write(Samples::byte(at)) };
        }
        Ok(Samples(slab))
    }

    /// What everybody's sample has there: nothing that memory happens to contain.
    fn byte(at: usize) -> u8 {
        (at as u32).wrapping_add(1).wrapping_mul(0x9e37_79b1).to_be_bytes()[0]
    }

    /// What the peer is told of its sample, or of this side's.
    fn place(&self) -> (u64, u32) {
        (self.0.buffer(OWN) as u64, self.0.remote_key())
    }

    /// Whether the peer's has come. It is this side's again.
    fn has_come(&self) -> bool {
        let theirs = self.0.buffer(THEIRS);
        // SAFETY: within the buffer, which the device is finished with. It was made with zeros.
        (0..BUFFER_BYTES).all(|at| unsafe { theirs.add(at).read() } == Samples::byte(at))
    }
}

/// A further rail: a queue pair by which each side reads what the other has offered.
pub(super) struct Rail {
    queues: Queues,
    channel: Source,
    registrations: Arc<Registrations>,
    alarm: Arc<Alarm>,
    /// While it is tried.
    samples: Option<Samples>,
}

impl Rail {
    /// The queues of one, at a port.
    pub fn queues(domain: &Arc<Domain>, port: &LocalPort) -> io::Result<Queues> {
        let depths = Depths { receives: 0, sends: 0, reads: READS as u32, reaches: 0, markers: 0 };
        Queues::new(domain, port, &[Lane::Reads], depths, 0)
    }

    /// `channel` is that of the queues.
    pub fn new(
        queues: Queues,
        channel: Source,
        registrations: Arc<Registrations>,
        alarm: Arc<Alarm>,
    ) -> Rail {
        Rail { queues, channel, registrations, alarm, samples: None }
    }

    /// Makes what it is to be tried with.
    pub fn with_samples(mut self, domain: &Arc<Domain>) -> io::Result<Rail> {
        self.samples = Some(Samples::new(domain)?);
        Ok(self)
    }

    /// The peer has tried it, too.
    pub fn is_tried(&mut self) {
        self.samples = None;
    }

    /// Why it can be used no longer, if somebody has said so.
    pub fn raised(&self) -> Option<String> {
        self.alarm.raised()
    }

    pub fn port(&self) -> &LocalPort {
        self.queues.port()
    }

    /// What the peer has to know.
    pub fn terms(&self, ports: (u8, u8)) -> RailTerms {
        let reads = self.port().device.limits.reads_answered;
        let sample = self.samples.as_ref().map_or((0, 0), Samples::place);
        RailTerms { ports, queue_pair: self.queues.number(Lane::Reads), reads, sample }
    }

    /// Connects it to the peer's end.
    pub fn connect(&mut self, first_packet: u32, to: &Remote) -> io::Result<()> {
        self.queues.connect(Lane::Reads, first_packet, to)
    }

    /// Asks for the peer's sample.
    pub fn probe(&mut self, (remote, remote_key): (u64, u32)) -> io::Result<()> {
        let absent = || io::Error::from(io::ErrorKind::NotFound);
        let Samples(slab) = self.samples.as_ref().ok_or_else(absent)?;
        let (local, local_key, bytes) = (slab.buffer(THEIRS), slab.key(), BUFFER_BYTES as u32);
        let (writes, inline) = (false, false);
        let rdma = Rdma { writes, local, local_key, bytes, remote, remote_key, inline };
        // SAFETY: a registered buffer of this rail's, which is looked at only when the completion was
        // taken, and outlives the queue pair or that completion: see `is_tried` and `drop`.
        unsafe { self.queues.post_rdma(0, Lane::Reads, &rdma) }
    }

    /// Whether what was asked for is the peer's sample. Its completion was taken.
    pub fn has_sample(&self) -> bool {
        self.samples.as_ref().is_some_and(Samples::has_come)
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

impl Drop for Rail {
    fn drop(&mut self) {
        if self.samples.is_some() && self.queues.destroy().is_err() {
            // The device may still write it.
            std::mem::forget(self.samples.take());
        }
    }
}

/// What a rail has under way.
struct Load {
    /// In units of 100 Mb/s.
    rate: u64,
    /// Its reads and whose they are, in the order in which they end.
    reads: VecDeque<(u32, Read)>,
    bytes: u64,
}

impl Load {
    fn new(rate: u16) -> Load {
        Load { rate: rate.into(), reads: VecDeque::with_capacity(READS), bytes: 0 }
    }

    fn begin(&mut self, id: u32, read: &Read) {
        self.reads.push_back((id, *read));
        self.bytes += u64::from(read.bytes);
    }

    fn end(&mut self) -> Option<(u32, Read)> {
        let ended = self.reads.pop_front()?;
        self.bytes -= u64::from(ended.1.bytes);
        Some(ended)
    }

    /// When it would be done with one more read, in no particular unit.
    fn time_with_one_more(&self) -> u64 {
        (self.bytes + READ_BYTES_MAX as u64) * 1000 / self.rate
    }
}

/// A further rail of a link.
struct Further {
    /// None once it was given up.
    rail: Option<Rail>,
    load: Load,
    /// Which of [`Rails::domains`] its memory is registered in; none: that of the first rail.
    domain: Option<usize>,
    port: String,
    /// Why it cannot be used any longer; it is to be given up.
    failed: Option<String>,
}

impl Further {
    fn queues(&self) -> Option<&Queues> {
        self.rail.as_ref().map(|rail| &rail.queues)
    }

    fn has_room(&self) -> bool {
        self.queues().is_some_and(|queues| queues.room(What::Read) > 0)
    }

    fn is_reading(&self) -> bool {
        self.queues().is_some_and(|queues| queues.under_way(What::Read) > 0)
    }
}

/// All rails of a link, numbered from the first one, 0. What the first one does is the messenger's.
pub(super) struct Rails {
    first: Load,
    further: Vec<Further>,
    /// Those of further rails that are not the first one's; none once no rail uses them.
    domains: Vec<Option<Arc<Registrations>>>,
    /// See [`gains_from_one_use`].
    gains_from_one_use: bool,
    /// The process may not lock enough memory for several devices: it is left to the first one.
    lacks_memory: bool,
    /// What has ended at further rails and has not been dealt with, by rail.
    ended: VecDeque<(usize, Completion)>,
    /// Reads that rails were at which were given up, for the first one to do. At most [`READS`] of
    /// each.
    again: VecDeque<(u32, Read)>,
    taken: Vec<Completion>,
}

impl Rails {
    /// `rate` and `registrations` are those of the first rail.
    pub fn new(rate: u16, registrations: &Arc<Registrations>, rails: Vec<Rail>) -> Rails {
        let mut domains: Vec<Option<Arc<Registrations>>> = Vec::new();
        let mut further: Vec<Further> = Vec::new();
        for rail in rails.into_iter().take(RAILS_MAX - 1) {
            let is_its = |known: &Arc<Registrations>| Arc::ptr_eq(known, &rail.registrations);
            let domain = match domains.iter().flatten().position(is_its) {
                None if is_its(registrations) => None,
                None => {
                    domains.push(Some(rail.registrations.clone()));
                    Some(domains.len() - 1)
                }
                known => known,
            };
            let (load, port) = (Load::new(rail.queues.rate()), rail.port().to_string());
            further.push(Further { load, rail: Some(rail), domain, port, failed: None });
        }
        let mut rails = Rails {
            first: Load::new(rate),
            further,
            domains,
            gains_from_one_use: false,
            lacks_memory: false,
            ended: VecDeque::new(),
            again: VecDeque::new(),
            taken: Vec::new(),
        };
        // Where one is not known, none is.
        let loads =
            || std::iter::once(rate).chain(rails.further.iter().map(|rail| rail.load.rate as u16));
        if loads().any(|rate| rate == 0) {
            rails.first.rate = 1;
            rails.further.iter_mut().for_each(|further| further.load.rate = 1);
        }
        rails.weigh();
        rails
    }

    /// Looks at what there is.
    fn weigh(&mut self) {
        let live = self.further.iter().filter(|further| further.rail.is_some());
        let all = self.first.rate + live.map(|further| further.load.rate).sum::<u64>();
        let devices = self.domains.iter().flatten().count();
        self.gains_from_one_use = gains_from_one_use(self.first.rate, all, devices);
    }

    pub fn has_further(&self) -> bool {
        self.further.iter().any(|further| further.rail.is_some())
    }

    /// Whether all of these have been agreed upon.
    pub fn has_all(&self, rails: u8) -> bool {
        u32::from(rails) < 1 << (1 + self.further.len())
    }

    /// Whether memory is worth registering for further rails. `is_kept`: it stays registered.
    pub fn gain(&self, is_kept: bool) -> bool {
        self.has_further() && !self.lacks_memory && (is_kept || self.gains_from_one_use)
    }

    /// The first device could not register memory, because the process may lock no more: further
    /// devices let go of what they keep, and get no more of it. `false`: there was nothing to be had.
    pub fn leave_memory(&mut self) -> bool {
        if self.lacks_memory {
            return false;
        }
        self.lacks_memory = true;
        self.domains.iter().flatten().fold(false, |any, domain| any | domain.let_go_of_idle())
    }

    /// The ports of further rails, for people.
    pub fn describe(&self) -> String {
        let ports = self.further.iter().map(|further| &*further.port);
        ports.collect::<Vec<_>>().join(", ")
    }

    /// Which of these rails would be done with a read first. `None`: each has enough to do.
    pub fn pick(&self, rails: u8, first_has_room: bool) -> Option<usize> {
        let first = Some((0, &self.first)).filter(|_| first_has_room);
        let numbered = (1..).zip(&self.further).filter(|(_, further)| further.has_room());
        first
            .into_iter()
            .chain(numbered.map(|(rail, further)| (rail, &further.load)))
            .filter(|(rail, _)| rails & 1 << rail != 0)
            .min_by_key(|(_, load)| load.time_with_one_more())
            .map(|(rail, _)| rail)
    }

    /// The rails that could take a read.
    pub fn with_room(&self, first_has_room: bool) -> u8 {
        let first = if first_has_room { FIRST } else { 0 };
        let numbered = (1..).zip(&self.further).filter(|(_, further)| further.has_room());
        numbered.fold(first, |room, (rail, _)| room | 1 << rail)
    }

    /// The next read that is to be done by the first rail because another one did not. It counts as
    /// posted.
    pub fn next_again(&mut self) -> Option<(u32, Read)> {
        self.again.pop_front()
    }

    /// This read by a further rail was not even posted.
    pub fn read_again(&mut self, id: u32, read: &Read) {
        self.again.push_back((id, read.by_first()));
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
                let rail = rail.as_mut().ok_or_else(absent)?;
                // SAFETY: the caller's.
                unsafe { rail.queues.post_rdma(id.into(), Lane::Reads, &read.rdma())? };
                load
            }
        };
        load.begin(id, read);
        Ok(())
    }

    /// A read of the first rail's has ended: whose it was.
    pub fn first_ended(&mut self) -> Option<(u32, Read)> {
        self.first.end()
    }

    /// Takes what has ended at further rails.
    pub fn take(&mut self) {
        for (number, further) in (1..).zip(&mut self.further) {
            if !further.is_reading() {
                continue;
            }
            let Some(rail) = &mut further.rail else { continue };
            self.taken.clear();
            if let Err(error) = rail.queues.take(Side::Send, &mut self.taken, |_| What::Read) {
                further.failed.get_or_insert_with(|| format!("taking completions: {error}"));
            }
            self.ended.extend(self.taken.iter().map(|completion| (number, *completion)));
        }
    }

    pub fn has_ended(&self) -> bool {
        !self.ended.is_empty()
    }

    /// The next to be dealt with: rail, and what has ended.
    pub fn next_ended(&mut self) -> Option<(usize, Completion)> {
        self.ended.pop_front()
    }

    /// The read that was posted before all others of this rail has ended well: whose it was.
    pub fn further_ended(&mut self, rail: usize) -> Option<(u32, Read)> {
        self.further.get_mut(rail.checked_sub(1)?)?.load.end()
    }

    /// A request of a further rail's has failed, in these words.
    pub fn fails(&mut self, rail: usize, completion: &Completion) {
        let at = rail.checked_sub(1).and_then(|at| self.further.get_mut(at));
        if let Some(Further { rail: Some(rail), failed, .. }) = at {
            let what = rail.port().device.verbs.describe(completion.status);
            let Completion { status, vendor, .. } = completion;
            failed
                .get_or_insert(format!("reading: {what} (status {status}, vendor error {vendor})"));
        }
    }

    /// As [`Rails::fails`].
    pub fn fails_because(&mut self, rail: usize, why: String) {
        if let Some(further) = rail.checked_sub(1).and_then(|at| self.further.get_mut(at)) {
            further.failed.get_or_insert(why);
        }
    }

    /// Gives up the rails that have failed, or of which somebody says that they do. What they were at
    /// is to be read by the first rail. What of others' memory was registered with a device that no
    /// rail is left of is added to `left`: it is to be let go of, so that the device can go.
    /// `Err`: a queue pair will not go, so that it may still write; beside it, what had failed.
    pub fn give_up_failed(&mut self, left: &mut Vec<Arc<Registrations>>) -> Result<(), String> {
        for at in 0..self.further.len() {
            let further = &mut self.further[at];
            let Some(rail) = &mut further.rail else { continue };
            let Some(why) = further.failed.clone().or_else(|| rail.raised()) else { continue };
            let port = &further.port;
            if let Err(error) = rail.queues.destroy_for_sure() {
                return Err(format!(
                    "{port}: {why}; and its queue pair cannot be destroyed: {error}"
                ));
            }
            tracing::warn!(port, why, "a port helps with long payloads no longer");
            // From here on nothing is written by it. What it has ended and nobody has looked at is
            // read once more.
            further.rail = None;
            self.ended.retain(|(rail, _)| *rail != at + 1);
            self.again.extend(further.load.reads.drain(..).map(|(id, read)| (id, read.by_first())));
            further.load.bytes = 0;
            for domain in 0..self.domains.len() {
                let uses = |other: &Further| other.rail.is_some() && other.domain == Some(domain);
                if !self.further.iter().any(uses) {
                    left.extend(self.domains[domain].take());
                }
            }
            self.weigh();
        }
        Ok(())
    }

    /// Whether a rail is to be given up.
    pub fn has_failed(&self) -> bool {
        let raised = |rail: &Rail| rail.raised().is_some();
        self.further.iter().any(|further| {
            further.rail.as_ref().is_some_and(|rail| further.failed.is_some() || raised(rail))
        })
    }

    /// Whether reads are under way at further rails.
    pub fn any_under_way(&self) -> bool {
        self.further.iter().any(Further::is_reading)
    }

    /// Looks at each further rail whether any of its reads have ended since the last look. One at which
    /// none has for too long counts as failed, and not as silent; `silence` is how long that is.
    pub fn look(&mut self, silence: Duration) -> Finding {
        let look = |further: &mut Further| {
            let found = further.rail.as_mut().map_or(Finding::Nothing, |rail| rail.queues.look());
            if found == Finding::Silence {
                further.failed.get_or_insert_with(|| format!("no read has ended for {silence:?}"));
            }
            found.min(Finding::UnderWay)
        };
        self.further.iter_mut().map(look).max().unwrap_or(Finding::Nothing)
    }

    /// Has `cx`'s waker called when reads end, or a rail is said to fail. `true`: some have.
    pub fn watch(&mut self, cx: &mut Context<'_>) -> bool {
        for (number, further) in (1..).zip(&mut self.further) {
            let is_reading = further.is_reading();
            let Some(rail) = &mut further.rail else { continue };
            rail.alarm.watch(cx.waker());
            if !is_reading {
                continue;
            }
            self.taken.clear();
            if let Poll::Ready(Err(error)) = rail.poll_ended(cx, &mut self.taken) {
                further.failed.get_or_insert_with(|| format!("waiting for completions: {error}"));
            }
            self.ended.extend(self.taken.iter().map(|completion| (number, *completion)));
        }
        self.has_ended() || self.has_failed()
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
        let of = |domain: &Option<Arc<Registrations>>| domain.as_ref().and_then(&mut registered);
        let keys: Vec<_> = self.domains.iter().map(of).collect();
        let mut rails = 0;
        let live = (1..).zip(&self.further).filter(|(_, further)| further.rail.is_some());
        for (rail, further) in live {
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
                rails & 1 << rail != 0 && further.rail.is_some() && further.domain == Some(at)
            };
            let is_in = (1..).zip(&self.further).any(is_in);
            let Some(registrations) = registrations.as_ref().filter(|_| is_in) else {
                known.push(None);
                continue;
            };
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
        for rail in self.further.iter_mut().filter_map(|further| further.rail.as_mut()) {
            // Each is tried, whatever became of those before it.
            all = all.and(rail.queues.destroy());
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
