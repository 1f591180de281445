//! Messages both ways over one link's queues, with credit.
//!
//! # Credit
//!
//! A side posts a buffer for each message that the other may send. All but [`RESERVE`] of them are
//! credit; whoever takes a message out posts its buffer again and owes that credit, which every
//! message of its own carries along. Credit grows when the peer says that it had to wait for some, and
//! shrinks when it has not said so for long (`buffers`): more buffers are posted, and owed, or
//! those that messages have left are not. A message that does nothing but return credit is sent when
//! half of all there is is owed; it needs no credit itself, and its buffer is not owed.
//!
//! Such messages use the reserve, and three buffers are enough. What those that lie in the peer's
//! queue return was spent before, or is new, and is at most all credit that there is by then. The
//! last one of them returns at least half of that, so that those before it return at most as much as
//! it does: with each one more they return at least twice as much in all. The first returns at least
//! 11, half of the least credit that there is, so four would return 88: more than there can be.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use thalweg_ffi::ibverbs as ffi;

use super::blob::Terms;
use super::buffers::{Buffers, RECEIVES, RECEIVES_FIRST, SENDS};
use super::device::LocalPort;
use super::pool::Pool;
use super::queues::{Completion, Depths, Lane, Queues, Rdma, Remote, Side, What};
use super::wire::{BUFFER_BYTES, Header, Kind};

/// Reads of this side's that may be under way.
pub(super) const READS: usize = 16;
/// Requests for puts and gets that may be under way.
pub(super) const REACHES: usize = 16;
/// Markers of the peer's that there is room for: see `markers`.
const MARKERS: usize = RECEIVES;
/// Buffers for messages that only return credit.
pub(super) const RESERVE: u16 = 3;
/// What a send should be able to carry within its request, in bytes.
const INLINE_BYTES: u32 = 192;
/// Tells the requests of reads from those of sends.
const READ_BIT: u64 = 1 << 63;
/// Tells messages that only return credit: nobody waits for one to arrive.
const CREDIT_BIT: u64 = 1 << 62;
/// Tells the requests of puts and gets.
const REACH_BIT: u64 = 1 << 61;
/// Tells markers, of either side.
const MARKER_BIT: u64 = 1 << 60;

/// The queues and buffers of one link.
pub(super) struct Messenger {
    queues: Queues,
    buffers: Buffers,
    first_packet: u32,
    /// Messages that the peer has buffers for.
    credits: u16,
    /// Something had to wait for credit since the last message.
    waited: bool,
    /// Credit that is to be returned.
    owed: u16,
    /// Messages posted, and those that have arrived at the peer, without those that only return
    /// credit.
    posted: u64,
    arrived: u64,
    /// Markers that have come since the last message.
    markers: usize,
    taken: Vec<Completion>,
}

/// What ended on this side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// A message has arrived at the peer, or will not.
    Send,
    /// A read has.
    Read(u32),
    /// A part of a put or get has: the request with this number.
    Reach(u32),
    /// A marker has arrived, or will not.
    Marker,
}

/// What the request with this number was.
fn what(id: u64) -> What {
    match id {
        id if id & READ_BIT != 0 => What::Read,
        id if id & REACH_BIT != 0 => What::Reach,
        id if id & MARKER_BIT != 0 => What::Marker,
        _ => What::Send,
    }
}

fn impossible(what: &str) -> io::Error {
    io::Error::other(what.to_owned())
}

impl Messenger {
    /// Makes queues at a port and posts the buffers for receiving that a link begins with.
    pub fn new(pool: &Arc<Pool>, port: &LocalPort, first_packet: u32) -> io::Result<Messenger> {
        let (receives, sends) = (RECEIVES as u32, SENDS as u32);
        let (reads, reaches, markers) = (READS as u32, REACHES as u32, MARKERS as u32);
        let depths = Depths { receives, sends, reads, reaches, markers };
        let queues = Queues::new(pool.domain(), port, &Lane::ALL, depths, INLINE_BYTES)?;
        let buffers = Buffers::new(pool)?;
        let mut messenger = Messenger {
            queues,
            buffers,
            first_packet,
            credits: 0,
            waited: false,
            owed: 0,
            posted: 0,
            arrived: 0,
            markers: 0,
            taken: Vec::with_capacity(super::queues::BATCH),
        };
        while let Some(index) = messenger.buffers.next_to_post() {
            messenger.post_receive(index)?;
        }
        for _ in 0..MARKERS {
            messenger.queues.post_marked(MARKER_BIT)?;
        }
        Ok(messenger)
    }

    /// Credit that the peer has, that is on its way, or owed: what it may ever have sent that has not
    /// been dealt with.
    fn peers_credit(&self) -> u16 {
        self.buffers.posted().saturating_sub(RESERVE)
    }

    /// What the peer has to know.
    pub fn terms(&self, ports: (u8, u8)) -> Terms {
        Terms {
            ports,
            queue_pairs: Lane::ALL.map(|lane| self.queues.number(lane)),
            first_packet: self.first_packet,
            receives: RECEIVES_FIRST as u16,
            reads: self.queues.port().device.limits.reads_answered,
            trial_ms: 0,
            rails: Vec::new(),
        }
    }

    pub fn connect(&mut self, port: super::blob::Port, terms: &Terms) -> io::Result<()> {
        let &Terms { queue_pairs, first_packet, reads, receives, .. } = terms;
        for lane in Lane::ALL {
            let queue_pair = queue_pairs[lane.other_end() as usize];
            let remote = Remote { port, queue_pair, first_packet, reads };
            self.queues.connect(lane, self.first_packet, &remote)?;
        }
        self.credits = receives - RESERVE;
        Ok(())
    }

    /// See [`Queues::rate`].
    pub fn rate(&self) -> u16 {
        self.queues.rate()
    }

    /// The number of the first packet of each of this side's queue pairs.
    pub fn first_packet(&self) -> u32 {
        self.first_packet
    }

    pub fn port(&self) -> &LocalPort {
        self.queues.port()
    }

    pub fn queues(&mut self) -> &mut Queues {
        &mut self.queues
    }

    fn post_receive(&mut self, index: usize) -> io::Result<()> {
        let absent = || impossible("a buffer that is not here is posted");
        let (ptr, key) = self.buffers.at(index).ok_or_else(absent)?;
        // SAFETY: a buffer of this link's, which is registered, and stays until the queue pair is
        // destroyed or its completion was taken. It is looked at only after that.
        unsafe { self.queues.post_receive(index as u64, ptr, BUFFER_BYTES, key) }
    }

    /// Whether a message that is there can be sent now.
    pub fn can_send(&mut self) -> bool {
        self.has_credit(0) && self.has_room()
    }

    /// Whether there is credit for a message that is there and leaves so much to others. The peer is
    /// told if there is not.
    pub fn has_credit(&mut self, leaving: u16) -> bool {
        let has = self.credits > leaving;
        self.waited |= !has;
        has
    }

    /// Whether there is a buffer to send from.
    pub fn has_room(&mut self) -> bool {
        self.queues.room(What::Send) > 0 && self.buffers.can_send()
    }

    /// Whether there are buffers enough for a while.
    pub fn has_spare_room(&self) -> bool {
        !self.buffers.half_is_sent()
    }

    /// Sends a message of `bytes` in all: `fill` writes what comes behind the header. There must be
    /// room, and unless it only returns credit, credit.
    pub fn send(
        &mut self,
        mut header: Header,
        bytes: usize,
        fill: impl FnOnce(*mut u8),
    ) -> io::Result<()> {
        let spends = u16::from(header.kind != Kind::Credit);
        if bytes > BUFFER_BYTES || self.credits < spends {
            return Err(impossible("a message without credit, or too long"));
        }
        let taken = self.buffers.take_to_send();
        let here = taken.and_then(|index| Some((index, self.buffers.at(index)?)));
        let Some((index, (to, key))) = here else {
            return Err(impossible("a message without a buffer"));
        };
        header.credits = std::mem::take(&mut self.owed);
        header.waited = std::mem::take(&mut self.waited);
        let encoded = header.encode();
        // SAFETY: a free buffer, longer than the header; `fill` has what is left of it.
        let body = unsafe {
            std::ptr::copy_nonoverlapping(encoded.as_ptr(), to, encoded.len());
            to.add(encoded.len())
        };
        fill(body);
        let inline = bytes <= self.queues.max_inline_bytes();
        let id = if spends == 0 { CREDIT_BIT } else { 0 } | index as u64;
        // SAFETY: a registered buffer that is left alone until its completion was taken.
        unsafe { self.queues.post_send(id, to, bytes, key, inline)? };
        self.credits -= spends;
        self.posted += u64::from(spends);
        Ok(())
    }

    /// Returns credit that has piled up. `false`: it should, and there is no buffer to do it with.
    pub fn return_credit(&mut self) -> io::Result<bool> {
        if self.owed < self.peers_credit().div_ceil(2) {
            return Ok(true);
        }
        if !self.has_room() {
            return Ok(false);
        }
        let header = Header::about(Kind::Credit, 0, 0);
        self.send(header, super::wire::HEADER_BYTES, |_| {}).map(|()| true)
    }

    /// Posts a read into memory of this side's.
    ///
    /// # Safety
    ///
    /// As for [`Queues::post_rdma`].
    pub unsafe fn read(&mut self, id: u32, read: &super::bulk::Read) -> io::Result<()> {
        // SAFETY: the caller's.
        unsafe { self.queues.post_rdma(READ_BIT | u64::from(id), Lane::Reads, &read.rdma()) }
    }

    /// Posts a marker behind the reads.
    pub fn mark(&mut self) -> io::Result<()> {
        self.queues.post_marker(MARKER_BIT)
    }

    /// Posts a part of a put or get.
    ///
    /// # Safety
    ///
    /// As for [`Queues::post_rdma`].
    pub unsafe fn reach(&mut self, id: u32, rdma: &Rdma) -> io::Result<()> {
        // SAFETY: the caller's.
        unsafe { self.queues.post_rdma(REACH_BIT | u64::from(id), Lane::Reach, rdma) }
    }

    /// Makes sure that there are buffers for puts and gets.
    pub fn hold_reach_buffers(&mut self) -> io::Result<()> {
        self.buffers.hold_reach()
    }

    /// One of the buffers for puts and gets, and its key. `None`: they are not here.
    pub fn reach_buffer(&self, index: usize) -> Option<(*mut u8, u32)> {
        self.buffers.reach(index)
    }

    /// Takes completions of one side, at the end of `into`: all that there are, or some. The peer's
    /// markers are dealt with.
    pub fn take(&mut self, side: Side, into: &mut VecDeque<Completion>) -> io::Result<()> {
        loop {
            self.taken.clear();
            self.queues.take(side, &mut self.taken, what)?;
            let mut markers = 0;
            for completion in &self.taken {
                let good = completion.status == ffi::IBV_WC_SUCCESS;
                match side {
                    Side::Receive if good && completion.id == MARKER_BIT => markers += 1,
                    Side::Receive | Side::Send => into.push_back(*completion),
                }
            }
            for _ in 0..markers {
                self.marked()?;
            }
            if !into.is_empty() || self.taken.is_empty() {
                return Ok(());
            }
        }
    }

    /// One of the peer's markers has come. `InvalidData`: it may not send so many.
    fn marked(&mut self) -> io::Result<()> {
        // Behind each something is said, for which there has to be credit.
        self.markers += 1;
        if self.markers > MARKERS {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.queues.post_marked(MARKER_BIT)
    }

    /// Takes completions of what this side posted: those of puts and gets apart from all others.
    pub fn take_posted(
        &mut self,
        into: &mut VecDeque<Completion>,
        reaches: &mut VecDeque<Completion>,
    ) -> io::Result<()> {
        self.taken.clear();
        self.queues.take(Side::Send, &mut self.taken, what)?;
        for completion in &self.taken {
            match what(completion.id) {
                What::Reach => reaches.push_back(*completion),
                What::Receive | What::Send | What::Read | What::Marker | What::Marked => {
                    into.push_back(*completion);
                }
            }
        }
        Ok(())
    }

    /// See [`Queues::reached`].
    pub fn reached(&self) -> &Arc<super::device::Domain> {
        self.queues.reached()
    }

    /// What a completion on the sending side is about.
    pub fn what(&self, completion: &Completion) -> Ended {
        match what(completion.id) {
            What::Receive | What::Send => Ended::Send,
            What::Read => Ended::Read(completion.id as u32),
            What::Reach => Ended::Reach(completion.id as u32),
            What::Marker | What::Marked => Ended::Marker,
        }
    }

    /// Deals with a completion on the sending side: a message's buffer is free.
    pub fn ended(&mut self, completion: &Completion) -> Ended {
        let ended = self.what(completion);
        if ended == Ended::Send {
            self.buffers.sent((completion.id & !CREDIT_BIT) as usize);
            self.arrived += u64::from(self.has_arrived(completion));
        }
        ended
    }

    /// Whether a completion on the sending side is that of a message which has arrived.
    pub fn has_arrived(&self, completion: &Completion) -> bool {
        completion.id & (READ_BIT | CREDIT_BIT | REACH_BIT | MARKER_BIT) == 0
            && completion.status == ffi::IBV_WC_SUCCESS
    }

    /// A message that has come, and its header, whose credit has been booked. `None`: not from
    /// this protocol. The bytes stay until [`Messenger::repost`].
    pub fn message(&mut self, completion: &Completion) -> Option<(Header, *const u8, usize)> {
        let ptr = self.buffers.received(completion.id)?;
        let bytes = completion.bytes.min(BUFFER_BYTES);
        // SAFETY: the device has written it, and is finished with it.
        let header = Header::decode(unsafe { std::slice::from_raw_parts(ptr, bytes) })?;
        self.markers = 0;
        self.buffers.heard(header.waited);
        self.credits = self.credits.checked_add(header.credits)?;
        (self.credits <= RECEIVES as u16 - RESERVE).then_some((header, ptr, bytes))
    }

    /// Whether the peer had credit for one more message.
    pub fn peer_had_credit(&self) -> bool {
        self.owed < self.peers_credit()
    }

    /// Posts a message's buffer again, or others besides, or lets go of it. `owes`: the message was
    /// sent with credit, of which there was some.
    pub fn repost(&mut self, completion: &Completion, owes: bool) -> io::Result<()> {
        let index = completion.id as usize;
        // Of a message that took no credit the buffer is a part of the reserve.
        if !(owes && self.buffers.retires(index)) {
            self.post_receive(index)?;
            self.owed += u16::from(owes);
        }
        if self.buffers.wants_more() {
            while let Some(index) = self.buffers.next_to_post() {
                self.post_receive(index)?;
                self.owed += 1;
            }
        }
        Ok(())
    }

    /// Credit that is to be returned.
    #[cfg(test)]
    pub fn owed(&self) -> u16 {
        self.owed
    }

    /// Messages posted since the beginning, and those among them that have arrived.
    pub fn counts(&self) -> (u64, u64) {
        (self.posted, self.arrived)
    }

    pub fn has_reads_under_way(&self) -> bool {
        self.queues.under_way(What::Read) > 0
    }

    /// Whether this is a forked child, whose parent the queues belong to.
    pub fn forked(&self) -> bool {
        self.queues.device().forked()
    }

    /// Ends the queue pairs, after which no memory is touched any more, and gives the buffers back.
    pub fn end(&mut self) -> io::Result<()> {
        self.queues.destroy()?;
        self.buffers.end();
        Ok(())
    }
}

impl Drop for Messenger {
    fn drop(&mut self) {
        if self.end().is_err() {
            self.buffers.abandon();
        }
    }
}
