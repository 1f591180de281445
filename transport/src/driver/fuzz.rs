//! What fuzzing calls: whatever parcels a peer may send, to an endpoint on which this side is at
//! work too. Panics only if this crate is wrong.
//!
//! The lane is a list of what is to arrive and of what was posted; the input says what comes next
//! and what the lane gets done. Messages must come in order and with the bytes that were sent
//! under their number, limits must hold, and when the endpoint has failed nothing may be left.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Waker};

use smallvec::{SmallVec, smallvec};

use super::core::{Core, Limits, ONE_SIDED_MAX, State};
use super::direct::GRANTS_MAX;
use super::keys::{Entry, Keys};
use super::messages::Sent;
use super::onesided::OneSided;
use super::sync::lock;
use super::table::{RawSegment, Slot, Stage};
use super::view::Views;
use crate::error::{CloseReason, Error, ErrorKind, LinkError, Phase};
use crate::fuzz_input::{Input, Seed, mix};
use crate::link::{
    Armed, Arrival, Budget, Caps, Class, Disposition, How, Killed, Landing, Link, LinkCounters,
    LinkKind, Mapping, OpId, PayloadId, Post, Progress, RawView, Registration, RemoteId, Segment,
    SegmentMut, Sink,
};
use crate::memory::{HostPool, MemoryKind};
use crate::message::{Frame, Message};
use crate::proto::keys::{ACCESS_READ, ACCESS_WRITE};
use crate::proto::wire::{Frames, Head, HeadBuf, Lens, Status};

const STEPS_MAX: usize = 1000;
/// What the endpoint gives and gets.
const WINDOW_BYTES: u64 = 20_000;
const MESSAGE_MAX: u64 = 10_000;
const FRAMES_MAX: u32 = 300;
const REGION_BYTES: usize = 4096;
/// Lengths of payloads, by number.
const LENS: [usize; 8] = [0, 1, 8, 64, 100, 200, 3000, 5000];
/// A payload that arrives comes in one of these many ways.
const INLINE: u8 = 1;
const OFFERED: u8 = 2;
const VIEWED: u8 = 4;

/// What is to arrive.
struct Parcel {
    head: Vec<u8>,
    len: u64,
    way: u8,
    fill: u8,
}

/// The lane, as the input sees it.
#[derive(Default)]
struct Wire {
    arriving: VecDeque<Parcel>,
    landing: Vec<(OpId, Landing, u8)>,
    held: Vec<(PayloadId, u64, u8)>,
    finished: VecDeque<(OpId, Result<(), LinkError>)>,
    posted: Vec<OpId>,
    /// Regions of the peer's that are open, with what is under way on them.
    open: BTreeMap<u32, Vec<OpId>>,
    next_remote: u32,
    next_payload: u64,
    /// How posts are answered: 0 done, 1 pending, 2 no room.
    answer: u8,
}

struct Lane {
    wire: Arc<Mutex<Wire>>,
    caps: Caps,
}

/// Bytes of a mapping, all of one value.
struct Mapped;

impl Mapping for Mapped {
    fn trusted(&self) -> bool {
        true
    }
}

static BYTES: [[u8; 5000]; 4] = [[0; 5000], [1; 5000], [2; 5000], [3; 5000]];

fn broken() -> LinkError {
    LinkError::new(ErrorKind::ConnectionLost, LinkKind::Tcp, "broken on command")
}

fn fill(to: &Landing, value: u8) {
    for segment in to {
        // SAFETY: the driver keeps a landing writable until it is told of its end.
        unsafe { std::ptr::write_bytes(segment.ptr, value, segment.len) };
    }
}

impl Wire {
    /// Nothing is under way any more for this operation.
    fn ended(&mut self, op: OpId) {
        self.open.values_mut().for_each(|under_way| under_way.retain(|known| *known != op));
    }

    fn arrive(&mut self, parcel: &Parcel, sink: &mut dyn Sink) -> Result<(), LinkError> {
        let payload = PayloadId(self.next_payload);
        self.next_payload += 1;
        let len = parcel.len as usize;
        let offered = parcel.way & OFFERED != 0;
        let bytes = &BYTES[usize::from(parcel.fill % 4)];
        let inline = (parcel.way & INLINE != 0 && len <= bytes.len()).then(|| &bytes[..len]);
        let view = RawView { ptr: bytes.as_ptr(), len, keep: Arc::new(Mapped) };
        let mut views: Option<SmallVec<[RawView; 2]>> =
            (parcel.way & VIEWED != 0 && len <= bytes.len()).then(|| smallvec![view]);
        let viewed = views.is_some();
        let disposition = sink.parcel(Arrival {
            head: &parcel.head,
            len: parcel.len,
            payload,
            inline,
            views: views.as_mut(),
            how: if offered { How::Offer } else { How::Eager },
        });
        match disposition {
            Disposition::Taken => assert!(inline.is_some() || len == 0, "taken without being here"),
            Disposition::Discard => {}
            Disposition::View => assert!(viewed, "a view of what has none"),
            Disposition::Hold => {
                assert!(offered, "only offers can wait");
                self.held.push((payload, parcel.len, parcel.fill));
            }
            Disposition::Land { to, op, .. } => {
                check(&to, parcel.len);
                self.landing.push((op, to, parcel.fill % 4));
            }
            Disposition::Fatal(error) => return Err(error),
        }
        Ok(())
    }
}

fn check(to: &Landing, len: u64) {
    assert_eq!(to.iter().map(|segment| segment.len as u64).sum::<u64>(), len);
}

impl Link for Lane {
    fn kind(&self) -> LinkKind {
        LinkKind::Tcp
    }

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn poll(
        &mut self,
        _cx: &mut Context<'_>,
        _spinning: bool,
        _budget: &mut Budget,
        sink: &mut dyn Sink,
    ) -> Result<Progress, LinkError> {
        let wire = &mut *lock(&self.wire);
        while let Some((op, result)) = wire.finished.pop_front() {
            wire.ended(op);
            sink.done(op, result);
        }
        while let Some(parcel) = wire.arriving.pop_front() {
            wire.arrive(&parcel, sink)?;
        }
        Ok(Progress::Some)
    }

    fn arm(&mut self, _cx: &mut Context<'_>) -> Result<Armed, LinkError> {
        Ok(Armed::Yes)
    }

    fn post(
        &mut self,
        op: OpId,
        class: Class,
        _how: How,
        head: &[u8],
        payload: &[Segment<'_>],
    ) -> Result<Post, LinkError> {
        assert!(Head::decode(head).is_ok(), "this side sends what it would accept");
        let len: usize = payload.iter().map(|segment| segment.len).sum();
        let wire = &mut *lock(&self.wire);
        match wire.answer % 3 {
            2 if class != Class::Control => Ok(Post::Full),
            1 if op != OpId::NONE && len > crate::link::COPIED_MAX => {
                wire.posted.push(op);
                Ok(Post::Pending)
            }
            _ => Ok(Post::Done),
        }
    }

    fn land(&mut self, payload: PayloadId, to: Landing, op: OpId) -> Result<Post, LinkError> {
        let wire = &mut *lock(&self.wire);
        let at = wire.held.iter().position(|(held, ..)| *held == payload).expect("it is held");
        let (_, len, value) = wire.held.swap_remove(at);
        check(&to, len);
        if wire.answer.is_multiple_of(2) {
            fill(&to, value % 4);
            return Ok(Post::Done);
        }
        wire.landing.push((op, to, value % 4));
        Ok(Post::Pending)
    }

    fn release(&mut self, payload: PayloadId) {
        lock(&self.wire).held.retain(|(held, ..)| *held != payload);
    }

    fn kill(&mut self, error: &LinkError, sink: &mut dyn Sink) -> Killed {
        let wire = &mut *lock(&self.wire);
        wire.open.clear();
        for (op, result) in wire.finished.drain(..) {
            sink.done(op, result);
        }
        let landing = wire.landing.drain(..).map(|(op, ..)| op);
        for op in landing.chain(wire.posted.drain(..)) {
            sink.done(op, Err(error.clone()));
        }
        Killed::Over
    }

    fn flushed(&self) -> bool {
        lock(&self.wire).posted.is_empty()
    }

    fn counters(&self) -> LinkCounters {
        LinkCounters::default()
    }

    fn one_sided(&mut self) -> Option<&mut dyn crate::link::OneSided> {
        Some(self)
    }
}

/// Registered memory, of which nobody knows.
struct Registered;

impl Registration for Registered {
    fn grant(&self) -> &[u8] {
        b"a grant"
    }
}

impl Lane {
    fn reach(&self, op: OpId, remote: RemoteId, to: Option<Landing>) -> Post {
        let wire = &mut *lock(&self.wire);
        let under_way = wire.open.get_mut(&remote.0).expect("it is open");
        match wire.answer % 3 {
            2 => Post::Full,
            1 => {
                under_way.push(op);
                match to {
                    Some(to) => wire.landing.push((op, to, 1)),
                    None => wire.posted.push(op),
                }
                Post::Pending
            }
            _ => {
                to.iter().for_each(|to| fill(to, 1));
                Post::Done
            }
        }
    }
}

impl crate::link::OneSided for Lane {
    fn way(&self) -> &'static str {
        "the list"
    }

    fn domain(&self) -> usize {
        0
    }

    fn register(
        &mut self,
        memory: SegmentMut,
        read: bool,
        write: bool,
    ) -> Result<Arc<dyn Registration>, LinkError> {
        assert!(memory.len == REGION_BYTES && read && write);
        match lock(&self.wire).answer {
            7 => Err(broken()),
            _ => Ok(Arc::new(Registered)),
        }
    }

    fn open(&mut self, grant: &[u8]) -> Result<RemoteId, LinkError> {
        if grant.first() == Some(&0xff) {
            return Err(broken());
        }
        let wire = &mut *lock(&self.wire);
        wire.next_remote += 1;
        wire.open.insert(wire.next_remote, Vec::new());
        Ok(RemoteId(wire.next_remote))
    }

    fn close(&mut self, remote: RemoteId) {
        let under_way = lock(&self.wire).open.remove(&remote.0).expect("closed once");
        assert!(under_way.is_empty(), "closed while it is in use");
    }

    fn put(
        &mut self,
        op: OpId,
        from: Segment<'_>,
        to: RemoteId,
        _offset: u64,
    ) -> Result<Post, LinkError> {
        assert!(from.len > 0);
        Ok(self.reach(op, to, None))
    }

    fn get(
        &mut self,
        op: OpId,
        to: SegmentMut,
        from: RemoteId,
        _offset: u64,
    ) -> Result<Post, LinkError> {
        assert!(to.len > 0);
        Ok(self.reach(op, from, Some(smallvec![to])))
    }
}

/// An operation of this side's.
enum Local {
    Send(OpId),
    Recv(OpId),
    TagSend(OpId),
    TagRecv(OpId),
    OneSided(OpId),
    Fence(OpId),
}

struct Session {
    core: Core,
    wire: Arc<Mutex<Wire>>,
    locals: Vec<Local>,
    /// What operations read and write; kept until nothing can.
    memory: Vec<Box<[u8]>>,
    key: u64,
    region: Arc<Entry>,
    /// What messages were sent under each number: more than one if the peer broke the rules.
    sent: BTreeMap<u32, Vec<(usize, u8)>>,
    received: u32,
    next_fill: u8,
    way: u64,
}

/// Parcels, and what this side does meanwhile.
pub(crate) fn parcels(bytes: &[u8]) -> u64 {
    let mut session = Session::new();
    let mut input = Input(bytes);
    for _ in 0..STEPS_MAX {
        if session.step(&mut input).is_none() {
            break;
        }
        session.check();
    }
    session.finish()
}

impl Session {
    fn new() -> Self {
        let limits = Limits {
            peer_message_window: WINDOW_BYTES,
            peer_tag_window: WINDOW_BYTES,
            peer_max_message: MESSAGE_MAX,
            peer_max_frames: FRAMES_MAX,
            message_window: WINDOW_BYTES,
            tag_window: WINDOW_BYTES,
            max_message: MESSAGE_MAX,
            max_frames: FRAMES_MAX,
            eager_max: 150,
            direct: true,
        };
        let keys = Arc::new(Keys::default());
        let mut buffer = vec![9u8; REGION_BYTES].into_boxed_slice();
        let memory =
            RawSegment { ptr: buffer.as_mut_ptr(), len: REGION_BYTES, kind: MemoryKind::Host };
        let (key, region) = keys
            .register(memory, ACCESS_READ | ACCESS_WRITE, Box::new(buffer))
            .expect("random numbers");
        let wire = Arc::new(Mutex::new(Wire::default()));
        let caps = Caps { eager_max: 1 << 20, ways: String::new() };
        let lane = Box::new(Lane { wire: wire.clone(), caps }) as Box<dyn Link>;
        let allocator = Arc::new(HostPool::new(1 << 20));
        let state = State::new(limits, "somebody".into(), keys, allocator, Views(Weak::new()));
        let mut core = Core::new(smallvec![lane], state);
        core.enable_direct(Waker::noop().clone());
        Session {
            core,
            wire,
            locals: Vec::new(),
            memory: Vec::new(),
            key,
            region,
            sent: BTreeMap::new(),
            received: 0,
            next_fill: 0,
            way: 0,
        }
    }

    /// One step; `None` at the input's end.
    fn step(&mut self, input: &mut Input<'_>) -> Option<()> {
        let what = input.u8()?;
        match what % 40 {
            kind @ (0..=17 | 32..=36) => self.arrive(kind, input)?,
            18 => self.land(input.u8()?),
            19 => self.finish_post(input.u8()?),
            20 => lock(&self.wire).answer = input.u8()?,
            21 | 22 => self.send(input.u8()?, input.u8()?),
            23 => self.receive(),
            24 => self.tag_send(input.u8()?, input.u8()?),
            25 => self.tag_receive(input.u8()?, input.u8()?),
            26 | 27 => self.one_sided(what % 40 == 26, input.u8()?, input.u8()?),
            28 => {
                let id = self.core.start_fence().ok();
                self.locals.extend(id.map(Local::Fence));
            }
            29 => self.give_up(input.u8()?),
            30 => match input.u8()? {
                0 => self.core.close(CloseReason::new(3, "enough")),
                1 => drop(self.region.revoke(None)),
                _ => {}
            },
            _ => self.drive(),
        }
        std::mem::take(&mut self.core.state.after).run();
        Some(())
    }

    fn drive(&mut self) {
        let mut cx = Context::from_waker(Waker::noop());
        self.core.drive(&mut cx, true, &mut Budget::TURN.clone());
    }

    /// Something comes from the peer. Small numbers are such as lead somewhere.
    fn arrive(&mut self, kind: u8, input: &mut Input<'_>) -> Option<()> {
        let (number, choice, way) = (input.u8()?, input.u8()?, input.u8()?);
        let (ahead, id) = (u32::from(number) % 4, u32::from(number) % 16);
        // A number ahead, one that was, or one far away.
        let near = |next: u32| match number {
            0xf0..=0xf7 => next.wrapping_sub(u32::from(number & 7) + 1),
            0xf8..=0xff => next.wrapping_add(1 << (23 + (number & 7))),
            _ => next.wrapping_add(ahead),
        };
        let (seq, tag_seq) =
            (near(self.core.state.arriving.next()), near(self.core.state.early_tags.next()));
        let len = LENS[usize::from(choice % 8)];
        let status = match choice / 8 % 8 {
            0..=3 => Status::Ok,
            4 => Status::KeyUnknown,
            5 => Status::OutOfBounds,
            6 => Status::Denied,
            _ => Status::Closing,
        };
        let key = if number & 0x80 == 0 { self.key } else { number.into() };
        // One that this side uses.
        let asked = 1 + u64::from(number) % 4;
        let two = [len as u64, u64::from(choice / 8)];
        let many = vec![u64::from(choice % 3); usize::from(input.u8()?)];
        let many_sum = usize::from(choice % 3) * many.len();
        let total = u32::from(choice) + many.len() as u32;
        let bytes = [many.len() as u8; 9];
        let (head, len) = match kind {
            0 | 1 => (Head::Message { seq, frames: Frames::One }, len),
            2 => (Head::Message { seq, frames: Frames::Zero }, usize::from(choice == 255)),
            3 => {
                let sum = two.iter().sum::<u64>() as usize + usize::from(number == 0x40);
                (Head::Message { seq, frames: Frames::Inline(Lens::new(&two)) }, sum)
            }
            4 => {
                let frames = Frames::Table { count: total };
                (Head::Message { seq, frames }, many_sum + usize::from(choice))
            }
            5 if many.is_empty() => (Head::CloseDone, 0),
            5 => {
                let first = if way & 64 == 0 { 0 } else { u32::from(choice) };
                let lens = Lens::new(&many[..many.len().min(100)]);
                (Head::MessageTable { seq, total, first, lens }, 0)
            }
            6 | 7 => (Head::Tag { seq: tag_seq, tag: u64::from(choice / 8) % 4 }, len),
            8 => (Head::Put { id, key, offset: u64::from(choice / 8) * 100 }, len),
            9 => (Head::PutDone { id, status }, 0),
            10 => {
                let len = LENS[usize::from(choice % 8)] as u64;
                (Head::Get { id, key, offset: u64::from(choice / 8) * 100, len }, 0)
            }
            11 => (Head::GetReply { id, status }, if status == Status::Ok { len } else { 0 }),
            12 => (Head::Fence { id, messages: seq, tags: tag_seq }, 0),
            13 => (Head::FenceDone { id }, 0),
            14 => {
                let messages = u64::from(number) << (choice % 16);
                (Head::Credit { messages, tags: u64::from(choice) << (number % 16) }, 0)
            }
            15 => (Head::CreditWanted { messages: number & 1 == 0, tags: choice & 1 == 0 }, 0),
            16 if choice & 7 == 0 => (Head::Close { code: id, text: "bye" }, 0),
            16 => (Head::CloseDone, 0),
            17 => return self.arrive_raw(len, way, input),
            32 => (Head::Wanted { key }, 0),
            33 => {
                let access = 1 + choice % 3;
                let len = if number & 2 == 0 { REGION_BYTES as u64 } else { 8 };
                (Head::Granted { key: asked, len, access, bytes: &bytes }, 0)
            }
            34 => (Head::Refused { key: asked }, 0),
            35 => (Head::Revoke { key: asked }, 0),
            _ => (Head::Revoked { key }, 0),
        };
        let payload = len as u64 + u64::from(way == 0xff);
        let fill = self.next_fill;
        self.next_fill = fill.wrapping_add(1);
        if let Head::Message { seq, .. } = &head {
            self.sent.entry(*seq).or_default().push((payload as usize, fill % 4));
        }
        let mut encoded = HeadBuf::new();
        head.encode(&mut encoded);
        self.push(encoded.to_vec(), payload, way, fill);
        Some(())
    }

    /// A head of any bytes.
    fn arrive_raw(&mut self, len: usize, way: u8, input: &mut Input<'_>) -> Option<()> {
        let count = input.u8()?;
        let head = input.bytes(count.into()).to_vec();
        if let Ok(Head::Message { seq, .. }) = Head::decode(&head) {
            self.sent.entry(seq).or_default().push((len, 0));
        }
        self.push(head, len as u64, way, 0);
        Some(())
    }

    fn push(&mut self, head: Vec<u8>, len: u64, way: u8, fill: u8) {
        lock(&self.wire).arriving.push_back(Parcel { head, len, way, fill });
        self.drive();
    }

    fn land(&mut self, what: u8) {
        let mut wire = lock(&self.wire);
        let Some(at) = usize::from(what / 2).checked_rem(wire.landing.len()) else { return };
        let (op, to, value) = wire.landing.swap_remove(at);
        fill(&to, value);
        wire.finished.push_back((op, Ok(())));
        drop(wire);
        self.drive();
    }

    fn finish_post(&mut self, what: u8) {
        let mut wire = lock(&self.wire);
        let Some(at) = usize::from(what / 2).checked_rem(wire.posted.len()) else { return };
        let op = wire.posted.swap_remove(at);
        wire.finished.push_back((op, Ok(())));
        drop(wire);
        self.drive();
    }

    /// Memory of an operation.
    fn memory(&mut self, len: usize) -> RawSegment {
        let mut memory = vec![0; len].into_boxed_slice();
        let segment = RawSegment { ptr: memory.as_mut_ptr(), len, kind: MemoryKind::Host };
        self.memory.push(memory);
        segment
    }

    fn send(&mut self, choice: u8, frames: u8) {
        let len = LENS[usize::from(choice % 8)];
        let frames = usize::from(frames) % 200;
        let mut message: Message = (0..frames).map(|_| Frame::from(vec![7; 1])).collect();
        message.push(vec![7; len]);
        let sent = self.core.start_send(&mut Some(message));
        if let Ok(Sent::Waits(id)) = sent {
            self.locals.push(Local::Send(id));
        }
    }

    fn receive(&mut self) {
        if self.core.state.has_receivers() || !self.core.has_message() {
            let id = self.core.state.wait_for_message();
            return self.locals.push(Local::Recv(id));
        }
        self.take_message();
    }

    fn take_message(&mut self) {
        let mut message = None;
        self.core.take_message(&mut message);
        let Some(message) = message else { return };
        let sent = self.sent.get(&self.received).expect("a message that nobody sent");
        let len = message.len_bytes();
        // A view ends with its endpoint, which this one never had.
        let bytes = message.to_vec().ok();
        let same = |value: u8| bytes.as_ref().is_none_or(|b| b.iter().all(|byte| *byte == value));
        let found = sent.iter().any(|(sent_len, value)| *sent_len == len && same(*value));
        assert!(found, "message {} of {len} bytes is not what was sent", self.received);
        self.received = self.received.wrapping_add(1);
    }

    fn tag_send(&mut self, choice: u8, tag: u8) {
        let from = self.memory(LENS[usize::from(choice % 8)]);
        if let Ok(Some(id)) = self.core.start_tag_send(u64::from(tag) % 4, from) {
            self.locals.push(Local::TagSend(id));
        }
    }

    fn tag_receive(&mut self, choice: u8, tag: u8) {
        let to = self.memory(LENS[usize::from(choice % 8)]);
        let mask = if tag & 0x80 == 0 { u64::MAX } else { 1 };
        if let Ok(id) = self.core.start_tag_recv(u64::from(tag) % 4, mask, to) {
            self.locals.push(Local::TagRecv(id));
        }
    }

    fn one_sided(&mut self, put: bool, choice: u8, offset: u8) {
        let memory = self.memory(LENS[usize::from(choice % 8)]);
        let (key, offset) = (1 + u64::from(choice / 64), offset.into());
        let what = match put {
            true => OneSided::Put { from: memory, key, offset },
            false => OneSided::Get { to: memory, key, offset },
        };
        let id = self.core.start_one_sided(what).ok();
        self.locals.extend(id.map(Local::OneSided));
    }

    /// The future of an operation is dropped, whether or not it is over.
    fn give_up(&mut self, which: u8) {
        let Some(at) = usize::from(which).checked_rem(self.locals.len()) else { return };
        let local = self.locals.swap_remove(at);
        self.abandon(&local);
        self.core.flush();
    }

    fn abandon(&mut self, local: &Local) {
        let state = &mut self.core.state;
        match *local {
            Local::Send(id) => {
                if let Some(Slot { stage: Stage::Queued, .. }) = state.ops.get(id) {
                    state.unqueue_send(id);
                    state.free(id);
                } else {
                    state.abandon_slot(id, None);
                }
            }
            Local::Recv(id) => {
                let first = state.is_first_receiver(id);
                if first && self.core.has_message() {
                    self.take_message();
                }
                self.core.state.leave_line(id);
            }
            Local::TagSend(id) => {
                if !state.withdraw_tag_send(id) {
                    state.abandon_slot(id, None);
                }
            }
            Local::TagRecv(id) => state.abandon_tag_recv(id, Box::new(())),
            Local::OneSided(id) => {
                if !state.withdraw_one_sided(id) {
                    state.abandon_slot(id, None);
                }
            }
            Local::Fence(id) => state.abandon_slot(id, None),
        }
    }

    fn check(&mut self) {
        let state = &mut self.core.state;
        let alone = state.inbox.len() <= 1;
        assert!(state.message_charge.resident() <= WINDOW_BYTES || alone);
        assert!(state.serving <= ONE_SIDED_MAX);
        assert!(state.one_sided_posted <= ONE_SIDED_MAX);
        assert!(state.tables.within(FRAMES_MAX));
        for op in lock(&self.wire).open.values().flatten() {
            let stage = state.ops.get(*op).map(|slot| &slot.stage);
            assert!(matches!(stage, Some(Stage::Posted)), "over, and its memory is still in use");
        }
        let direct = state.direct.as_ref().expect("the lane can");
        assert!(direct.held() <= GRANTS_MAX && direct.remembered() <= GRANTS_MAX);
    }

    /// Ends the endpoint, unless the peer did; then nothing may be left of anything.
    fn finish(mut self) -> u64 {
        while self.core.has_message() && !self.core.state.has_receivers() {
            self.take_message();
        }
        let why = self.core.state.refusal().map(|error| error.to_string()).unwrap_or_default();
        let error = Error::from_link(&broken(), Phase::Transfer);
        self.core.fail(error);
        assert!(self.core.ended());
        for local in std::mem::take(&mut self.locals) {
            let id = match &local {
                Local::Recv(_) => None,
                Local::Send(id)
                | Local::TagSend(id)
                | Local::TagRecv(id)
                | Local::OneSided(id)
                | Local::Fence(id) => Some(*id),
            };
            let slot = id.and_then(|id| self.core.state.ops.get(id));
            let over = slot.is_none_or(|slot| matches!(slot.stage, Stage::Done(_)));
            assert!(over, "an operation waits for ever");
            self.abandon(&local);
        }
        std::mem::take(&mut self.core.state.after).run();
        assert_eq!(self.core.state.ops.len(), 0, "a slot is left");
        // `None` if it was handed out before.
        drop(self.region.revoke(None));
        assert_eq!(Arc::strong_count(&self.region), 2, "a use of the region is left");
        self.way = mix(self.way, why.as_bytes());
        let stats = &self.core.state.stats;
        let counts = [
            stats.messages_received,
            stats.tags_received,
            stats.messages_sent,
            stats.tags_sent,
            stats.puts,
            stats.gets,
            stats.direct_puts,
            stats.direct_gets,
        ];
        mix(self.way, &counts.map(|count| count.min(3) as u8))
    }
}

/// Inputs to start from: one of everything, the hostile cases, and this side at work.
pub(crate) fn seeds() -> Vec<Seed> {
    let mut out = Vec::new();
    let mut add = |name: &str, steps: &[&[u8]]| {
        out.push(("parcels", name.to_owned(), steps.concat()));
    };
    // Kind, number, choice, way, count.
    let message: &[u8] = &[0, 0, 3, INLINE, 0];
    let long: &[u8] = &[0, 0, 6, 0, 0];
    let land: &[u8] = &[18, 0];
    let recv: &[u8] = &[23];
    add("messages", &[message, long, land, &[0, 0, 4, VIEWED, 0], &[2, 0, 0, 0, 0], recv, recv]);
    add("messages-out-of-order", &[&[0, 2, 3, 1, 0], &[0, 1, 6, 0, 0], message, land, recv, recv]);
    add("message-twice", &[&[0, 1, 3, 1, 0], &[0, 1, 3, 1, 0]]);
    add("message-twice-in-landing", &[long, long, land, land, recv]);
    add("message-far-ahead", &[&[0, 0xff, 6, 0, 0], land, recv]);
    add("message-of-the-past", &[message, &[0, 0xf0, 3, 1, 0], recv]);
    add("messages-over-the-window", &[&[0, 0, 7, 0, 0][..]; 5]);
    add("frames", &[&[3, 0, 19, INLINE, 0], &[3, 0, 20, 0, 0], land, recv, recv]);
    add("frames-that-do-not-add-up", &[&[3, 0x40, 19, INLINE, 0]]);
    add("table", &[&[5, 0, 0, 0, 50], &[4, 0, 0, 0, 50], recv]);
    add("table-missing", &[&[4, 0, 0, 0, 50]]);
    add("table-out-of-order", &[&[5, 0, 9, 64, 50]]);
    add(
        "tables-of-four",
        &[&[5, 0, 0, 0, 100], &[5, 1, 0, 0, 100], &[5, 2, 0, 0, 100], &[5, 3, 0, 0, 100]],
    );
    add("tags", &[&[25, 6, 0], &[6, 0, 3, 1, 0], &[6, 0, 6, OFFERED, 0], &[25, 6, 0], land]);
    add("tag-too-long", &[&[25, 1, 0], &[6, 0, 6, 0, 0], land, &[25, 6, 0]]);
    add("tags-given-up", &[&[25, 6, 0], &[6, 0, 6, 0, 0], &[29, 0], &[25, 6, 0], land, &[29, 0]]);
    add("tags-out-of-order", &[&[6, 2, 6, 0, 0], &[6, 1, 3, 1, 0], &[6, 0, 3, 1, 0], land]);
    add("tag-twice", &[&[6, 1, 6, 0, 0], &[6, 1, 6, 0, 0], land]);
    add("tags-over-the-window", &[&[6, 0, 7, 0, 0][..]; 5]);
    add("put", &[&[8, 0, 5, 0, 0], land, &[8, 1, 3, INLINE, 0], &[8, 2, 0, 0, 0]]);
    add("put-out-of-bounds", &[&[8, 0, 0xf7, 0, 0], &[8, 0x80, 3, 1, 0]]);
    add("put-revoked", &[&[8, 0, 5, 0, 0], &[30, 1], land, &[8, 0, 5, 0, 0]]);
    add(
        "get",
        &[&[10, 0, 5, 0, 0], &[20, 1], &[10, 0, 5, 0, 0], &[19, 0], &[20, 2], &[10, 0, 5, 0, 0]],
    );
    add(
        "own-put",
        &[&[26, 5, 0], &[9, 0, 0, 0, 0], &[20, 1], &[26, 5, 0], &[9, 0, 0x20, 0, 0], &[19, 0]],
    );
    add("own-put-answered-twice", &[&[26, 5, 0], &[9, 0, 0, 0, 0], &[9, 0, 0, 0, 0]]);
    add("own-get", &[&[27, 5, 0], &[11, 0, 5, 0, 0], land, &[27, 3, 0], &[11, 0, 3, 1, 0]]);
    add("own-get-answered-twice", &[&[27, 5, 0], &[11, 0, 5, 0, 0], &[11, 0, 5, 0, 0]]);
    add("own-get-answered-wrong", &[&[27, 5, 0], &[11, 0, 6, 0, 0]]);
    add("fences", &[&[28], &[13, 0, 0, 0, 0], &[12, 0, 0, 0, 0], &[12, 1, 0, 0, 0], message]);
    add("fence-given-up", &[&[28], &[29, 0], &[13, 0, 0, 0, 0], &[28]]);
    add("fence-answered-twice", &[&[28], &[13, 0, 0, 0, 0], &[13, 0, 0, 0, 0]]);
    add("fences-too-many", &[&[12, 3, 0, 0, 0][..]; 190]);
    let send: &[u8] = &[21, 7, 0];
    add("credit", &[send, send, send, send, &[14, 100, 6, 0, 0], &[15, 0, 0, 0, 0], &[31]]);
    add("credit-for-nothing", &[&[14, 255, 255, 0, 0]]);
    add("sends-given-up", &[&[20, 2], send, &[21, 3, 150], &[29, 0], &[20, 0], &[31], &[29, 0]]);
    add(
        "tag-sends",
        &[&[20, 1], &[24, 7, 0], &[24, 3, 0], &[19, 0], &[20, 2], &[24, 6, 0], &[29, 1]],
    );
    add("close", &[message, send, &[16, 0, 0, 0, 0], &[31], recv, recv]);
    add(
        "gets-at-close",
        &[&[20, 2], &[10, 0, 5, 0, 0], &[30, 0], &[10, 1, 5, 0, 0], &[20, 0], &[31]],
    );
    add("own-close", &[send, &[23], &[30, 0], &[31], &[16, 0, 1, 0, 0]]);
    add("close-not-said", &[&[16, 0, 1, 0, 0]]);
    add("both-close", &[&[30, 0], &[16, 0, 0, 0, 0], &[31], &[16, 0, 1, 0, 0]]);
    // This side asks, is granted access to a region, and uses it.
    let (put, granted, revoke): (&[u8], &[u8], &[u8]) =
        (&[26, 5, 0], &[33, 0, 2, 0, 0], &[35, 0, 0, 0, 0]);
    let answered: &[u8] = &[9, 0, 0, 0, 0];
    add("direct-put", &[put, answered, granted, put, &[26, 0, 0], &[20, 1], put, &[28], &[19, 0]]);
    add(
        "direct-get",
        &[&[27, 5, 0], &[11, 0, 5, 0, 0], granted, &[27, 6, 0], &[20, 1], &[27, 6, 0], land],
    );
    add("direct-put-answered", &[put, answered, granted, &[20, 1], put, answered]);
    add(
        "direct-get-answered",
        &[&[27, 5, 0], &[11, 0, 5, 0, 0], granted, &[20, 1], &[27, 6, 0], &[11, 0, 6, 0, 0]],
    );
    add("direct-no-room", &[put, granted, &[20, 2], put, put, &[20, 0], &[31]]);
    add("direct-out-of-bounds", &[put, &[33, 2, 2, 0, 0], put, &[27, 6, 0]]);
    add("direct-given-up", &[put, granted, &[20, 1], put, &[29, 1], &[19, 0], &[31]]);
    add(
        "direct-revoked",
        &[put, granted, &[20, 1], put, &[27, 5, 0], revoke, put, &[19, 0], &[31], land, &[31]],
    );
    add("direct-revoked-at-once", &[put, &[20, 1], granted, revoke, revoke, put]);
    add("direct-granted-badly", &[put, &[33, 0, 2, 0, 255], revoke, put]);
    add("direct-granted-twice", &[put, granted, granted]);
    add("direct-granted-unasked", &[granted]);
    add("direct-refused", &[put, &[34, 0, 0, 0, 0], put, &[34, 0, 0, 0, 0]]);
    add("direct-revoke-unknown", &[revoke, put, revoke]);
    add(
        "direct-goodbye",
        &[put, granted, &[20, 1], put, &[16, 0, 0, 0, 0], &[31], &[19, 0], &[31]],
    );
    // The peer asks.
    let wanted: &[u8] = &[32, 0, 0, 0, 0];
    let revoked: &[u8] = &[36, 0, 0, 0, 0];
    add("granted", &[wanted, &[30, 1], &[31], revoked, wanted]);
    add("granted-and-given-back", &[wanted, revoked, wanted, &[16, 0, 0, 0, 0]]);
    add("granted-twice", &[wanted, wanted]);
    add("granted-unknown", &[&[32, 0x80, 0, 0, 0], &[20, 7], wanted]);
    add("given-back-twice", &[wanted, revoked, revoked]);
    add("given-back-unknown", &[&[36, 0x80, 0, 0, 0]]);
    add("granted-at-close", &[wanted, &[30, 0], &[32, 0x81, 0, 0, 0], &[16, 0, 0, 0, 0], revoked]);
    add("payload-where-none-belongs", &[&[13, 0, 0, 0xff, 0]]);
    add("raw-head", &[&[17, 0, 3, 1, 0, 5, 1, 0, 0, 0, 0], recv]);
    out
}
