//! The ways of moving bytes between two nodes.
//!
//! This room owns the [`Link`] and [`Engine`] traits, and one module per transport. A link knows
//! how to carry *parcels*: a short head, and a payload that the far side may land where it likes.
//! It must not know what a parcel means (messages, tags, credit are `proto`'s and `driver`'s
//! business), who waits for it, nor which link was chosen and why.
//!
//! Adding a transport is one new module here and a few lines where a node makes its engines
//! (`driver::node`).

mod arrivals;
mod by_id;
mod chunks;
mod few;
pub(crate) mod hardware;
mod linger;
mod lookout;
#[cfg(feature = "mock")]
pub(crate) mod mock;
pub(crate) mod shm;
pub(crate) mod tcp;
pub(crate) mod ucx;
pub(crate) mod verbs;

use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use smallvec::SmallVec;

use crate::error::LinkError;
use crate::memory::{MemoryKind, SharedBlock};

/// The longest head a parcel may have, in bytes. Every link must carry a head of this size.
pub(crate) const HEAD_MAX: usize = 1024;

/// A payload of at most this many bytes in all is copied before `post` returns, also when it
/// answers `Pending`: its memory may move at once.
pub(crate) const COPIED_MAX: usize = 128;

/// The kinds of link there are, in the order in which they are listed to people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum LinkKind {
    /// Memory shared between two processes of one host.
    Shm,
    /// A TCP connection; always available.
    Tcp,
    /// RDMA verbs, where there is RDMA hardware, or where it is asked for; needs libibverbs.
    Verbs,
    /// UCX, where there is hardware that no other link reaches, or where it is asked for; needs
    /// libucp.
    Ucx,
    /// In-process link for tests (feature `mock`).
    Mock,
}

impl LinkKind {
    /// The name used in configuration, in JSON output and on the wire: `shm`, `tcp`,
    /// `verbs`, `ucx`, `mock`.
    pub const fn name(self) -> &'static str {
        match self {
            LinkKind::Shm => "shm",
            LinkKind::Tcp => "tcp",
            LinkKind::Verbs => "verbs",
            LinkKind::Ucx => "ucx",
            LinkKind::Mock => "mock",
        }
    }

    /// The kind with this name, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        [LinkKind::Shm, LinkKind::Tcp, LinkKind::Verbs, LinkKind::Ucx, LinkKind::Mock]
            .into_iter()
            .find(|kind| kind.name() == name)
    }
}

/// What has a link used where the library does not use it by itself.
pub(crate) fn insist(link: LinkKind) -> String {
    format!("name {link} in THALWEG_TRANSPORTS to use it all the same")
}

impl fmt::Display for LinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An operation in the driver's table: an index, and a generation that makes a stale id harmless.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct OpId {
    pub index: u32,
    pub generation: u32,
}

impl OpId {
    /// Marks a post whose completion nobody waits for (control parcels).
    pub const NONE: OpId = OpId { index: u32::MAX, generation: 0 };
}

/// A payload that has arrived or was offered and is not finished with. Chosen by the link, unique
/// within it for as long as the payload is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct PayloadId(pub u64);

/// Which traffic a parcel belongs to. A link keeps the order within a class, and never lets one
/// class wait behind the bulk of another; `Control` never waits at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Control,
    Message,
    Tag,
    OneSided,
}

impl Class {
    pub const COUNT: usize = 4;
}

/// How the receiver will treat the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// The receiver decides at once where the payload goes, whatever its size: it may be streamed
    /// behind the head.
    Eager,
    /// The receiver may have to wait (for a matching receive): only the head travels, and the
    /// payload follows when the receiver lands it.
    Offer,
}

/// What became of a post or a landing when the call returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Post {
    /// Finished: the memory may be reused. No `Sink::done` follows.
    Done,
    /// Accepted: exactly one `Sink::done` with the same id follows. The memory must stay valid
    /// until then.
    Pending,
    /// No room now and nothing was accepted; try again after the next progress. Never answered to
    /// `Class::Control` posts, nor to landings.
    Full,
}

/// A piece of memory that a link may read until the operation is done.
#[derive(Clone, Copy)]
pub(crate) struct Segment<'a> {
    pub ptr: *const u8,
    pub len: usize,
    pub kind: MemoryKind,
    /// Where this memory lies in a shared pool, if it is a loan: a link that can hand over
    /// references does so.
    pub shared: Option<&'a SharedBlock>,
}

impl<'a> Segment<'a> {
    /// Of ordinary memory.
    #[inline(always)]
    pub fn host(bytes: &'a [u8]) -> Self {
        Segment { ptr: bytes.as_ptr(), len: bytes.len(), kind: MemoryKind::Host, shared: None }
    }
}

/// A piece of memory that a link may write until the operation is done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SegmentMut {
    pub ptr: *mut u8,
    pub len: usize,
    pub kind: MemoryKind,
}

// SAFETY: a segment is a plain description. Whoever dereferences it relies on the operation that
// pins the memory (driver::table), not on the thread it does so on.
unsafe impl Send for Segment<'_> {}
// SAFETY: as above.
unsafe impl Send for SegmentMut {}

/// Destinations of a landing, in payload order; their lengths add up to the payload's.
pub(crate) type Landing = SmallVec<[SegmentMut; 2]>;

/// Memory of the peer, mapped for as long as this is held.
pub(crate) trait Mapping: Send + Sync {
    /// Whether what was read until now can be trusted: the peer had not begun to let go of it.
    /// Once `false`, always `false`.
    fn trusted(&self) -> bool;
}

/// A payload, or a piece of one, that lies in memory of the peer which this process has mapped
/// read-only. The mapping lives as long as `keep`.
#[derive(Clone)]
pub(crate) struct RawView {
    pub ptr: *const u8,
    pub len: usize,
    pub keep: Arc<dyn Mapping>,
}

// SAFETY: the memory is a read-only mapping kept alive by `keep`; it is not tied to a thread.
unsafe impl Send for RawView {}
// SAFETY: as above; no interior mutability on this side.
unsafe impl Sync for RawView {}

/// A parcel as the link hands it up. `head` has at most [`HEAD_MAX`] bytes and lies in this
/// process's private memory: it cannot change under the reader.
pub(crate) struct Arrival<'a> {
    pub head: &'a [u8],
    /// Length of the payload in bytes, as claimed by the peer: check it before use.
    pub len: u64,
    pub payload: PayloadId,
    /// The whole payload, when it is already here, in private memory.
    pub inline: Option<&'a [u8]>,
    /// One view per segment that the sender posted, when every one of them is a loan. The payload
    /// may then be kept as it is ([`Disposition::View`]), and the views be taken out.
    pub views: Option<&'a mut SmallVec<[RawView; 2]>>,
    pub how: How,
}

/// What the receiver decided about an arrival.
pub(crate) enum Disposition {
    /// The payload is empty, or was copied out of `inline`: the link forgets it.
    Taken,
    /// Put the payload there. `Sink::done(op, _)` follows exactly once, perhaps before the current
    /// `poll` returns. Where the memory is `lasting`, nobody waits for it when the link has been
    /// killed: it may then be in use for as long as the peer likes.
    Land { to: Landing, op: OpId, lasting: bool },
    /// The views stay open until `Link::release`.
    View,
    /// Only for `How::Offer`: stays open until `Link::land` or `Link::release`.
    Hold,
    /// The payload is not wanted (over a limit, revoked key): the link drains or refuses it, and
    /// the sender's operation ends well.
    Discard,
    /// The peer broke the protocol: the link dies with this error.
    Fatal(LinkError),
}

/// Where a link reports what happened. Called with the endpoint's lock held: implementations only
/// record, and never call back into user code.
pub(crate) trait Sink {
    fn parcel(&mut self, arrival: Arrival<'_>) -> Disposition;
    /// A posted parcel's memory may be reused, or a landing has finished. Exactly once per
    /// `Post::Pending` and per landing that was not answered `Post::Done`.
    fn done(&mut self, op: OpId, result: Result<(), LinkError>);
    /// Another endpoint has something to do, found on the way: its waker is called once the lock
    /// is released.
    fn wake(&mut self, waker: Waker) {
        waker.wake();
    }
}

/// What one call may spend, so that no endpoint starves another and no copy holds a lock for long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    pub parcels: u32,
    /// Bytes copied by this process's own cores.
    pub bytes: usize,
}

impl Budget {
    /// At most 1 MiB copied in a turn: about 100 µs at 10 GB/s.
    pub const TURN: Budget = Budget { parcels: 256, bytes: 1 << 20 };
}

/// The result of a `poll`; of several, the greatest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Progress {
    /// Nothing moved.
    Idle,
    /// Something moved and nothing more is known to wait.
    Some,
    /// The budget ended before the work did: poll again without arming.
    More,
}

/// The result of arming.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Armed {
    /// The waker given will be called when there is something to do.
    Yes,
    /// There is something to do already: poll again.
    Busy,
}

/// The result of killing a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Killed {
    /// Everything has been reported, and nothing is touched any more.
    Over,
    /// Something that this process does not control may still touch the memory of what has not
    /// been reported: call again, soon. The link does nothing else any more.
    Lingers,
    /// As `Lingers`, but what has not been reported are landings in `lasting` memory: nobody waits
    /// for them.
    Keeps,
}

/// What a link knows of a peer that says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Check {
    /// Nothing is owed: whoever watches an idle link (the kernel's keepalive, a pidfd) sees to it.
    Quiet,
    /// Something is owed: look again later.
    Owed,
    /// Something was found out that a poll will tell.
    Drive,
}

/// What a link can do; fixed once it is up.
#[derive(Clone, Debug)]
pub(crate) struct Caps {
    /// Payloads up to this many bytes may be posted `Eager` although the receiver might not be
    /// able to place them at once (it then lands them in its own memory).
    pub eager_max: usize,
    /// The ways in which this link moves payloads, in plain words, for the route: for instance
    /// "inline ≤ 2 KiB, loan by reference, single copy (process_vm_readv)".
    pub ways: String,
}

/// One lane to one peer.
///
/// Not `Sync`: the driver holds the endpoint's lock around every call. Nothing here blocks, but for
/// the few milliseconds that `kill` may wait for something to let go.
pub(crate) trait Link: Send {
    fn kind(&self) -> LinkKind;
    fn caps(&self) -> &Caps;

    /// Sends what waits and reads what has come, within the budget. `cx` carries the endpoint's
    /// waker; a link that finds its source empty may register it, but need not. With `spinning`
    /// the caller will call again at once: look directly (for a socket: a non-blocking read), do
    /// not ask the runtime for readiness.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        spinning: bool,
        budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<Progress, LinkError>;

    /// Asks to be woken: registers `cx`'s waker with every source that matters now (readable;
    /// writable if something waits to be sent; the peer's death), then looks once more.
    fn arm(&mut self, cx: &mut Context<'_>) -> Result<Armed, LinkError>;

    /// Sends a parcel. `head` is copied before this returns, and so is a payload of at most
    /// [`COPIED_MAX`] bytes. A longer payload's memory must stay valid until done. The total length may be 0.
    fn post(
        &mut self,
        op: OpId,
        class: Class,
        how: How,
        head: &[u8],
        payload: &[Segment<'_>],
    ) -> Result<Post, LinkError>;

    /// Brings a held payload into `to`, whose lengths add up to the payload's. Never `Full`.
    fn land(&mut self, payload: PayloadId, to: Landing, op: OpId) -> Result<Post, LinkError>;

    /// Lets go of a view, or refuses a held offer; the sender's operation then ends well.
    fn release(&mut self, payload: PayloadId);

    /// Ends the link now. Every pending post and landing is reported through `sink.done`, those
    /// that had not ended with `error`, before this answers [`Killed::Over`]; no memory of theirs
    /// is touched after it was reported.
    fn kill(&mut self, error: &LinkError, sink: &mut dyn Sink) -> Killed;

    /// Whether everything posted has left this process (for close: flush before the end). Where
    /// the peer reads this process's memory, a payload leaves it only when the peer is finished
    /// with it. Such a link cannot tell an offer that is being read from one without a receive,
    /// so that the latter, or a view that is kept, holds this `false` for as long as the peer
    /// likes; a link that sends an offer only when asked for it does not count it before. Whoever
    /// waits for this therefore sets a limit.
    fn flushed(&self) -> bool;

    /// `false`: [`post`](Self::post) would answer `Full` to anything but control. Saves whoever
    /// asks from putting together a payload of many segments in vain.
    fn has_room(&self) -> bool {
        true
    }

    /// Asks the system whether the peer's host still answers. Costs a system call: called now and
    /// then, not per parcel. An error ends the link.
    fn check(&mut self) -> Result<Check, LinkError> {
        Ok(Check::Quiet)
    }

    /// Payload bytes and counts by way of moving, since the link came up.
    fn counters(&self) -> LinkCounters;

    /// Puts and gets that the link carries out itself, if it can.
    fn one_sided(&mut self) -> Option<&mut dyn OneSided> {
        None
    }

    /// Called once [`kill`](Self::kill) has answered [`Killed::Over`]: `Ready` as soon as the peer
    /// can reach nothing any more that was registered for it. Never blocks.
    fn poll_unreachable(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let _ = cx;
        Poll::Ready(())
    }
}

/// A region of the peer's that was opened, as the link numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RemoteId(pub u32);

/// Memory that a link has made reachable from afar, until this is dropped. Dropping it may take
/// locks of the link's, so none of them is held then.
pub(crate) trait Registration: Send + Sync {
    /// What the peer's end of the link needs to reach it: a few bytes, for [`OneSided::open`].
    fn grant(&self) -> &[u8];

    /// Ends it. `false`: the peer may still reach the memory, which then has to stay allocated.
    fn withdraw(&self) -> bool {
        true
    }

    /// As [`withdraw`](Self::withdraw), though the peer has not said that it is finished with the
    /// memory: what it has under way there, or begins, ends with an error at its side, which may
    /// be the end of its direct access to anything ([`OneSided`]). The link lives on.
    fn cut(&self) -> bool {
        self.withdraw()
    }
}

/// Direct put and get: an optional part of a [`Link`].
///
/// The user checks keys, bounds and access; it keeps registered memory alive until the peer has
/// said that it is finished with it, or [`Link::poll_unreachable`] is ready, or the registration is
/// [`cut`](Registration::cut); and it closes a remote
/// region only when no operation on it is under way. [`Link::kill`] closes them all.
///
/// An operation that ends with an error while the link lives says that nothing can be reached by
/// the link any more: nothing is begun from then on, and what had begun ends in the same way.
pub(crate) trait OneSided {
    /// What carries them out, in plain words, for the route.
    fn way(&self) -> &'static str;

    /// Links that answer the same share registrations.
    fn domain(&self) -> usize;

    /// Makes memory reachable, in these directions. It stays valid for as long as what is given
    /// back. An error is no end of the link.
    fn register(
        &mut self,
        memory: SegmentMut,
        read: bool,
        write: bool,
    ) -> Result<Arc<dyn Registration>, LinkError>;

    /// Takes up what the peer's [`Registration::grant`] said. Its bytes may be anything. An error
    /// is no end of the link.
    fn open(&mut self, grant: &[u8]) -> Result<RemoteId, LinkError>;

    /// Forgets a region.
    fn close(&mut self, remote: RemoteId);

    /// Writes into a region. Over (`Done`, or `Sink::done`) when the bytes are there for whoever
    /// looks, and `from`, which stays valid until then, is not read any more. Not empty.
    fn put(
        &mut self,
        op: OpId,
        from: Segment<'_>,
        to: RemoteId,
        offset: u64,
    ) -> Result<Post, LinkError>;

    /// Reads out of a region, into memory that stays valid until this is over. Not empty.
    fn get(
        &mut self,
        op: OpId,
        to: SegmentMut,
        from: RemoteId,
        offset: u64,
    ) -> Result<Post, LinkError>;
}

/// What a link counted. Bytes are payload bytes; ways that a link lacks stay zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LinkCounters {
    /// Parcels sent, control included.
    pub parcels_sent: u64,
    /// Parcels received, control included.
    pub parcels_received: u64,
    /// Payload bytes sent in line with the head, or streamed behind it.
    pub inline_bytes_sent: u64,
    /// Payload bytes received in line with the head, or streamed behind it.
    pub inline_bytes_received: u64,
    /// Bytes of loans handed over by reference.
    pub loaned_bytes_sent: u64,
    /// Bytes of loans received by reference.
    pub loaned_bytes_received: u64,
    /// Bytes received by a single copy, out of the sender's memory into the receiver's: by this
    /// side (`process_vm_readv`) or, of long payloads, in part by the sender.
    pub single_copy_bytes_received: u64,
    /// Bytes sent that this side copied into the receiver's memory itself (`process_vm_writev`);
    /// the receiver copied the others.
    pub single_copy_bytes_sent: u64,
    /// Bytes this side copied into the staging arena.
    pub arena_bytes_sent: u64,
    /// Bytes this side copied out of the peer's staging arena.
    pub arena_bytes_received: u64,
    /// Bytes that the adapter wrote straight into the peer's memory (RDMA).
    pub rdma_bytes_sent: u64,
    /// Bytes that the adapter read straight out of the peer's memory (RDMA).
    pub rdma_bytes_received: u64,
    /// Of these, payload bytes of messages and tags, by the pair of ports that they were first asked
    /// for by: the first pair, which carries all else as well and what others fail to bring, then
    /// further ones. There are at most four.
    pub rail_bytes_received: [u64; 4],
    /// Times memory of a payload was registered with the adapter.
    pub registrations: u64,
    /// Times memory of a payload was found registered.
    pub registrations_reused: u64,
    /// Times memory could not be registered, and its payload was moved another way.
    pub registrations_refused: u64,
    /// Wakes written to a sleeping peer.
    pub wakes_sent: u64,
    /// Times a parcel found no room and had to wait.
    pub stalls: u64,
}

/// What a node shares among its links of one kind: a UCX worker, a completion queue, the socket on
/// which same-host peers present themselves. A kind that shares nothing (tcp) has no engine.
///
/// Setting up a link is part of the bootstrap, so each transport has functions of its own for it,
/// called from `driver::bootstrap`.
pub(crate) trait Engine: Send + Sync {
    /// Moves what is shared, within the budget, then arms: unless it answers
    /// [`Progress::More`], `cx`'s waker has been registered for the next event. What arrived for a
    /// link is left in that link's own queue, and the link's endpoint is woken.
    fn poll(&self, cx: &mut Context<'_>, budget: &mut Budget) -> Progress;
}

/// Convenience for links: `Poll` to `Armed`.
pub(crate) fn armed_if_pending<T>(poll: &Poll<T>) -> Armed {
    if poll.is_pending() { Armed::Yes } else { Armed::Busy }
}
