//! What fuzzing calls: whatever a peer may write into its memory and to the Unix socket, at set-up
//! and on a link that is up. Panics only if this crate is wrong.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Waker};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{PidfdFlags, getpid, pidfd_open};

use super::blob::{Blob, verdict};
use super::cells::{RECORD_MAX, SLOTS, STRIDE};
use super::link::{ARENA_BYTES, Arena, BELL, OwnPage, Parts, PeerPage, ShmLink, SocketBell};
use super::ring::{Page, Ring, Slot};
use super::wire::{ARENA, Kind, flags};
use super::{setup, socket};
use crate::error::{ErrorKind, LinkError};
use crate::fuzz_input::{Input, Seed, mix};
use crate::link::{
    Arrival, Budget, Class, Disposition, How, Killed, Landing, Link, LinkKind, OpId, PayloadId,
    Post, RawView, Segment, SegmentMut, Sink,
};
use crate::memory::{MemoryKind, OwnMapping, PeerMapping, SharedBlock, SharedPool};
use crate::runtime::{Fd, HostLoop, Interest, Reactor, Timers};

/// The longest payload that the link under test accepts.
const PAYLOAD_MAX: u64 = 1 << 16;
/// From so many bytes on both sides copy.
const TOGETHER_MIN: u64 = 64;
/// The sink takes no more than this into memory; the rest it does not want.
const LANDED_MAX_BYTES: u64 = 4 << 20;
/// The most steps of one input.
const STEPS_MAX: usize = 400;

/// A capability blob, judged against itself.
pub(crate) fn blob(bytes: &[u8]) -> u64 {
    let Some(blob) = Blob::from_bytes(bytes) else { return 0 };
    assert_eq!(verdict(&blob, &blob), Ok(()), "a node agrees with itself");
    let again = Blob::from_bytes(&blob.to_bytes());
    assert_eq!(again.as_ref(), Some(&blob));
    1
}

/// The packets of set-up.
pub(crate) fn packets(bytes: &[u8]) -> u64 {
    setup::fuzz(bytes)
}

/// The far side, as wicked as the input says.
struct Villain {
    ring: Ring<OwnPage, PeerPage, SocketBell>,
    /// The page that it writes, also past the ring's own rules.
    page: *mut u8,
    slots_pushed: u32,
    pool: SharedPool,
    block: SharedBlock,
}

/// Memory whose address a record may name.
static KNOWN: [u8; 4096] = [3; 4096];

fn descriptor(made: Result<std::os::fd::OwnedFd, rustix::io::Errno>) -> Fd {
    Fd::new(made.expect("a descriptor"))
}

fn made(mapped: &std::os::fd::OwnedFd) -> PeerPage {
    let mapping = PeerMapping::map(mapped.as_fd(), 64 << 10).expect("its own memory");
    PeerPage::new(mapping).expect("large enough")
}

/// A link and the far side of it.
fn meet(may_pull: bool) -> (ShmLink, Villain) {
    let reactor = Reactor::Host(HostLoop::new().expect("an event loop"));
    let page = || OwnMapping::create(c"thalweg-fuzz", size_of::<Page>()).expect("memory");
    let ((near, near_fd), (far, far_fd)) = (page(), page());
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (here, there) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .expect("a pair of sockets");
    let source = |fd, interest| reactor.source(fd, interest).expect("a source");
    let mut link = ShmLink::new(Parts {
        own: OwnPage::new(near),
        peer: made(&far_fd),
        socket: source(Fd::new(here), Interest::Read),
        process: source(descriptor(pidfd_open(getpid(), PidfdFlags::NONBLOCK)), Interest::Read),
        pid: getpid().as_raw_nonzero().get(),
        timers: Arc::new(Timers::new(&reactor).expect("timers")),
        arena: Arc::new(Arena::new(ARENA_BYTES)),
        segments_limit_bytes: 1 << 30,
        max_payload: PAYLOAD_MAX,
        loans: true,
        may_pull,
        peer_may_pull: may_pull,
        // What the far side gives for its memory is this process's.
        together: false,
        ways: String::new(),
    });
    link.together_min = TOGETHER_MIN;
    let far_page = far.as_ptr();
    let pool = SharedPool::new(1 << 20);
    let block = pool.loan(KNOWN.len()).expect("room").into_block();
    let bell = SocketBell::new(source(Fd::new(there), Interest::Read));
    let villain = Villain {
        ring: Ring::new(OwnPage::new(far), made(&near_fd), bell),
        page: far_page,
        slots_pushed: 0,
        pool,
        block,
    };
    (link, villain)
}

impl Villain {
    /// A number of a record: small ones, such as lead somewhere, and any at all.
    fn number(&self, input: &mut Input<'_>) -> Option<u64> {
        Some(match input.u8()? {
            0xf0 => KNOWN.as_ptr().expose_provenance() as u64 + u64::from(input.u8()?),
            0xf1 => input.u64()?,
            0xf2 => u64::from(self.block.segment()),
            0xf3 => u64::from(self.block.segment() | ARENA),
            0xf4 => self.block.offset() + u64::from(input.u8()?),
            0xf5 => 1 << (input.u8()? % 64),
            0xf6 => (u64::from(input.u8()?) << 32) | u64::from(input.u8()?),
            0xf7 => PAYLOAD_MAX - u64::from(input.u8()?),
            0xf8 => u64::from(input.u16()?),
            small => u64::from(small),
        })
    }

    /// Writes a record, if the ring has room.
    fn record(&mut self, input: &mut Input<'_>) -> Option<()> {
        let (flags, numbers, rest) = (input.u16()?, input.u8()?, input.u8()?);
        let mut bytes = Vec::new();
        for _ in 0..numbers % 32 {
            bytes.extend(self.number(input)?.to_ne_bytes());
        }
        bytes.extend(input.bytes(usize::from(rest)));
        bytes.truncate(RECORD_MAX);
        // What it was told of room may be a lie of its own making.
        let pushed = self.ring.push(flags.into(), bytes.len(), 0, [&bytes[..]].into_iter());
        if pushed == Ok(true) {
            let slots = bytes.len().div_ceil(super::ring::SLOT_DATA).max(1);
            self.slots_pushed = self.slots_pushed.wrapping_add(slots as u32);
        }
        Some(())
    }

    /// Writes a word of its page that the ring's rules would have otherwise.
    fn poke(&mut self, input: &mut Input<'_>) -> Option<()> {
        let slots_at = size_of::<Page>() - SLOTS as usize * size_of::<Slot>();
        let place = |position: u32| {
            slots_at + (position.wrapping_mul(STRIDE) % SLOTS) as usize * size_of::<Slot>()
        };
        let (at, value) = match input.u8()? % 4 {
            0 => (usize::from(input.u16()?) * 4, input.u32()?),
            // The stamp of the next record, and the header behind it.
            1 => {
                let position = self.slots_pushed.wrapping_add(u32::from(input.u8()?) % 4);
                (place(position), position.wrapping_add(1))
            }
            2 => (place(self.slots_pushed) + 4, input.u32()?),
            // Secret, dying word, head, sleep.
            _ => (usize::from(input.u8()? % 64) * 4, input.u8()?.into()),
        };
        let at = (at % (size_of::<Page>() - 3)) & !3;
        // SAFETY: a word of the page, which is mapped as long as the ring has it; it consists of
        // atomic integers.
        let word = unsafe { AtomicU32::from_ptr(self.page.add(at).cast()) };
        word.store(value, Ordering::Release);
        Some(())
    }

    /// Sends a packet, with its segment or with a descriptor that is none; or rings, many times.
    fn packet(&mut self, input: &mut Input<'_>) -> Option<()> {
        let what = input.u8()?;
        let arena = if what & 1 == 0 { 0 } else { ARENA };
        let number = match what & 2 {
            0 => self.block.segment() | arena,
            _ => input.u32()?,
        };
        let bytes = number.to_ne_bytes();
        let (bytes, times) = match what >> 6 {
            3 => (&bytes[..3], 1),
            2 => (BELL, 1 << (what >> 3 & 7)),
            _ => (&bytes[..], 1),
        };
        let socket = self.ring.bell().socket().fd();
        for _ in 0..times {
            // The buffer of a socket that nobody reads fills up.
            let _ = match what >> 2 & 3 {
                0 | 1 => socket::send(socket, bytes, &[self.block.segment_fd()]),
                2 => socket::send(socket, bytes, &[]),
                _ => socket::send(socket, bytes, &[socket]),
            };
        }
        Some(())
    }
}

/// The near side's driver: takes payloads as it is told, and checks that each operation is
/// reported once.
struct Driver {
    policy: u8,
    landing: HashMap<u32, Vec<u8>>,
    open: HashMap<u32, bool>,
    held: Vec<(PayloadId, u64)>,
    wanted_bytes: u64,
    next_op: u32,
    ended_well: u32,
    arrived: u32,
}

/// Bytes around a landing that nobody may touch.
const FENCE: [u8; 16] = [0xd5; 16];

impl Driver {
    fn op(&mut self, landing: bool) -> OpId {
        self.next_op += 1;
        self.open.insert(self.next_op, landing);
        OpId { index: self.next_op, generation: 0 }
    }

    fn landing(&mut self, len: u64) -> (Landing, OpId) {
        let op = self.op(true);
        let len = len as usize;
        let mut memory = vec![0; len + 2 * FENCE.len()];
        memory[..FENCE.len()].copy_from_slice(&FENCE);
        memory[FENCE.len() + len..].copy_from_slice(&FENCE);
        let (front, back) = memory[FENCE.len()..FENCE.len() + len].split_at_mut(len / 3);
        let to = [front, back].map(|piece| SegmentMut {
            ptr: piece.as_mut_ptr(),
            len: piece.len(),
            kind: MemoryKind::Host,
        });
        self.landing.insert(op.index, memory);
        (to.into_iter().collect(), op)
    }

    fn check_fences(&self) {
        for memory in self.landing.values() {
            assert!(memory.starts_with(&FENCE) && memory.ends_with(&FENCE), "a landing overran");
        }
    }
}

impl Sink for Driver {
    fn parcel(&mut self, arrival: Arrival<'_>) -> Disposition {
        self.arrived += 1;
        assert!(arrival.len <= PAYLOAD_MAX);
        assert!(arrival.inline.is_none_or(|bytes| bytes.len() as u64 == arrival.len));
        let sum = |views: &[RawView]| views.iter().map(|view| view.len as u64).sum::<u64>();
        let views = arrival.views.as_ref().map_or(&[][..], |views| views.as_slice());
        assert!(arrival.views.is_none() || sum(views) == arrival.len);
        for view in views {
            if view.len > 0 {
                // SAFETY: within the view, whose mapping `keep` holds; a peer may write it.
                unsafe {
                    view.ptr.read_volatile();
                    view.ptr.add(view.len - 1).read_volatile();
                }
            }
        }
        let fits = self.wanted_bytes + arrival.len <= LANDED_MAX_BYTES;
        match self.policy % 4 {
            0 if fits => {
                self.wanted_bytes += arrival.len;
                let (to, op) = self.landing(arrival.len);
                Disposition::Land { to, op, lasting: true }
            }
            1 if fits => {
                self.wanted_bytes += arrival.len;
                self.held.push((arrival.payload, arrival.len));
                Disposition::Hold
            }
            2 if arrival.views.is_some() => {
                self.held.push((arrival.payload, 0));
                Disposition::View
            }
            _ => Disposition::Discard,
        }
    }

    fn done(&mut self, op: OpId, result: Result<(), LinkError>) {
        assert!(self.open.remove(&op.index).is_some(), "{op:?} is reported and not open");
        self.ended_well += u32::from(result.is_ok());
    }
}

/// A sequence of wicked deeds, and of what the near side does meanwhile.
pub(crate) fn records(bytes: &[u8]) -> u64 {
    let mut input = Input(bytes);
    let Some(first) = input.u8() else { return 0 };
    let (mut link, mut villain) = meet(first & 1 == 0);
    let mut driver = Driver {
        policy: first >> 1,
        landing: HashMap::new(),
        open: HashMap::new(),
        held: Vec::new(),
        wanted_bytes: 0,
        next_op: 0,
        ended_well: 0,
        arrived: 0,
    };
    let mut end = None;
    for _ in 0..STEPS_MAX {
        match step(&mut link, &mut villain, &mut driver, &mut input) {
            Some(Ok(())) => {}
            Some(Err(error)) => {
                end = Some(error);
                break;
            }
            None => break,
        }
    }
    let end = end.or_else(|| (0..4).find_map(|_| turn(&mut link, &mut driver).err()));
    let closed = LinkError::new(ErrorKind::Closed, LinkKind::Shm, "over");
    let error = end.as_ref().unwrap_or(&closed);
    let mut killed = link.kill(error, &mut driver);
    if killed == Killed::Keeps {
        assert_eq!(driver.open.len(), 1, "only what the far side may be writing to is kept");
        villain.ring.own().marks.end(0, 0);
        killed = link.kill(error, &mut driver);
    }
    assert_eq!(killed, Killed::Over);
    assert!(driver.open.is_empty(), "not reported: {:?}", driver.open);
    driver.check_fences();
    drop(link);
    drop(villain.pool);
    let seen = [driver.arrived.min(3) as u8, driver.ended_well.min(3) as u8, first & 7];
    // The number of a process is no way through the code.
    let detail = end.map_or_else(String::new, |error| error.detail.clone());
    let words = detail.bytes().filter(|byte| !byte.is_ascii_digit()).collect::<Vec<_>>();
    mix(mix(1, &words), &seen)
}

fn turn(link: &mut ShmLink, driver: &mut Driver) -> Result<(), LinkError> {
    let mut cx = Context::from_waker(Waker::noop());
    link.poll(&mut cx, true, &mut Budget::TURN.clone(), driver).map(drop)
}

/// One step; `None` at the input's end.
fn step(
    link: &mut ShmLink,
    villain: &mut Villain,
    driver: &mut Driver,
    input: &mut Input<'_>,
) -> Option<Result<(), LinkError>> {
    let what = input.u8()?;
    let result = match what % 10 {
        0..=2 => villain.record(input).map(Ok)?,
        3 => villain.poke(input).map(Ok)?,
        4 => villain.packet(input).map(Ok)?,
        5 => turn(link, driver),
        6 => {
            driver.policy = input.u8()?;
            Ok(())
        }
        7 => post(link, driver, input.u8()?),
        8 => finish_held(link, driver, input.u8()?),
        _ => {
            let mut cx = Context::from_waker(Waker::noop());
            link.arm(&mut cx).map(drop)
        }
    };
    driver.check_fences();
    Some(result)
}

fn post(link: &mut ShmLink, driver: &mut Driver, what: u8) -> Result<(), LinkError> {
    let len = [0, 8, 100, 3000, 4096][usize::from(what % 5)];
    let class = [Class::Control, Class::Message, Class::Tag, Class::OneSided];
    let how = if what & 64 == 0 { How::Eager } else { How::Offer };
    let from = Segment { ptr: KNOWN.as_ptr(), len, kind: MemoryKind::Host, shared: None };
    let op = driver.op(false);
    let posted = link.post(op, class[usize::from(what / 5 % 4)], how, b"head", &[from]);
    if !matches!(posted, Ok(Post::Pending)) {
        driver.open.remove(&op.index);
    }
    posted.map(drop)
}

fn finish_held(link: &mut ShmLink, driver: &mut Driver, what: u8) -> Result<(), LinkError> {
    let Some(at) = usize::from(what / 2).checked_rem(driver.held.len()) else { return Ok(()) };
    let (payload, len) = driver.held.swap_remove(at);
    if what.is_multiple_of(2) || len == 0 {
        link.release(payload);
        return Ok(());
    }
    let (to, op) = driver.landing(len);
    match link.land(payload, to, op) {
        Ok(Post::Pending) => Ok(()),
        landed => {
            driver.open.remove(&op.index);
            landed.map(drop)
        }
    }
}

/// Inputs to start from.
pub(crate) fn seeds() -> Vec<Seed> {
    let mut out = Vec::new();
    let record = |kind, how, head: usize, numbers: &[&[u8]], rest: &[u8]| {
        let flags = (flags(kind, how, head) as u16).to_le_bytes();
        let counts = [numbers.len() as u8, rest.len() as u8];
        [&[0][..], &flags, &counts, &numbers.concat(), rest].concat()
    };
    let mut add = |name: &str, first: u8, steps: &[&[u8]]| {
        out.push(("shm-ring", name.to_owned(), [&[first][..], &steps.concat()].concat()));
    };
    use How::{Eager, Offer};
    let turn: &[u8] = &[5];
    let (land, hold, view, discard) = (0u8, 2u8, 4u8, 6u8);
    let inline = record(Kind::Inline, Eager, 4, &[], b"headpayload");
    let place: [&[u8]; 6] = [&[2], &[100], &[1], &[0xf2], &[0xf4, 0], &[100]];
    let loan = record(Kind::Loan, Eager, 4, &place, b"head");
    for (name, first) in [("land", land), ("hold", hold), ("view", view), ("discard", discard)] {
        let pull = record(Kind::Pull, Eager, 4, &[&[1], &[200], &[1], &[0xf0, 0], &[200]], b"head");
        let push = record(Kind::Push, Offer, 0, &[&[3], &[100], &[0]], &[]);
        let pass: &[u8] = &[4, 0];
        add(&format!("inline-{name}"), first, &[&inline, turn, &inline, turn]);
        add(&format!("pull-{name}"), first, &[&pull, turn, &[8, 1], turn]);
        add(&format!("pull-denied-{name}"), first | 1, &[&pull, turn, &[8, 1], turn]);
        add(&format!("loan-{name}"), first, &[pass, &loan, turn, &[8, 0], turn]);
        let place = [&[0xf3][..], &[0xf4, 0], &[100]];
        let chunk =
            record(Kind::Chunk, Eager, 0, &[&[0], &[100], &[1], place[0], place[1], place[2]], &[]);
        let pass_arena: &[u8] = &[4, 1];
        add(
            &format!("push-{name}"),
            first,
            &[&push, turn, &[8, 1], pass_arena, &chunk, turn, &chunk, turn],
        );
    }
    let list =
        record(Kind::PullList, Eager, 0, &[&[1], &[5], &[101], &[0xf0, 0], &[0xf8, 0x50, 6]], &[]);
    add("list-of-nonsense", land, &[&list, turn, turn]);
    let nowhere = record(Kind::Pull, Eager, 0, &[&[1], &[5], &[1], &[8], &[5]], &[]);
    add("address-of-nothing", land, &[&nowhere, turn, turn]);
    let fixed = |kind, id: &[u8], len: &[u8]| record(kind, Eager, 0, &[id, len, &[0]], &[]);
    let post: &[u8] = &[7, 8];
    add("finished", discard, &[post, &fixed(Kind::Finished, &[0], &[0]), turn, turn]);
    add(
        "finished-twice",
        discard,
        &[post, &fixed(Kind::Finished, &[0], &[0]), turn, &fixed(Kind::Finished, &[0], &[0]), turn],
    );
    add(
        "asked",
        discard | 1,
        &[post, &fixed(Kind::Ask, &[0], &[0]), turn, turn, &fixed(Kind::Taken, &[0], &[0]), turn],
    );
    add(
        "asked-past-end",
        discard,
        &[post, &fixed(Kind::Ask, &[0], &[0xf1, 255, 255, 255, 255, 255, 255, 255, 255]), turn],
    );
    add("taken-of-nothing", discard, &[&fixed(Kind::Taken, &[0], &[0]), turn]);
    add("unknown-kind", discard, &[&[0, 15, 0, 0, 0], turn]);
    let helped = |len: &[u8]| record(Kind::Helped, Eager, 0, &[&[0], len, &[1]], &[]);
    let pull = record(Kind::Pull, Eager, 4, &[&[1], &[200], &[1], &[0xf0, 0], &[200]], b"head");
    // The far side says that it is writing what lies from 0 on, in the first copy.
    let busy: &[u8] = &[3, 0, 51, 0, 0, 0x80, 1, 0];
    add("together", land, &[&pull, turn, &helped(&[100]), turn]);
    add("together-busy", land, &[busy, &pull, turn, &helped(&[100]), turn]);
    add("together-busy-too-long", land, &[busy, &pull, turn, &helped(&[201]), turn]);
    add("together-busy-at-the-end", land, &[busy, &pull, turn]);
    add("helped-with-nothing", discard, &[&helped(&[0]), turn]);
    let pieces = [&[0][..], &[0], &[0xf1, 1, 0, 0, 0, 1, 0, 0, 0], &[0xf0, 0], &[0xf8, 0xb8, 11]];
    add("help", discard, &[post, &record(Kind::Help, Eager, 0, &pieces, &[]), turn, turn]);
    add("help-with-nothing", discard, &[&record(Kind::Help, Eager, 0, &pieces, &[]), turn]);
    add("stamp-ahead", discard, &[&inline, turn, &[3, 1, 0], turn, &[3, 1, 1], turn]);
    add("header-of-garbage", discard, &[&[3, 2, 255, 255, 255, 255], &[3, 1, 0], turn]);
    add("head-runs-away", discard, &[post, &[3, 3, 16, 200], turn, post, turn]);
    add("dying", view, &[&[4, 0], &inline, &[3, 3, 4, 1], turn, &inline, turn]);
    add("segment-twice", discard, &[&[4, 0], &[4, 0], &[9], turn]);
    add("segment-of-garbage", discard, &[&[4, 12], &[9], turn]);
    add("bells", discard, &[&[4, 0xb8], &[9], &[4, 0xb8], &[9], &inline, turn, &[9]]);
    add("bells-before-a-segment", view, &[&[4, 0xb8], &[4, 0], &loan, turn, &[8, 0], turn]);
    add("bell-with-a-segment", discard, &[&[4, 0x80], &[9]]);
    add("asleep", discard, &[&[3, 3, 32, 1], post, &[3, 3, 32, 3], post, turn]);
    add("packet-too-short", discard, &[&[4, 0xc0], &[9], turn]);
    let own = Blob {
        version: super::blob::VERSION,
        uid: 1000,
        boot_id: [7; 16],
        net_namespace: 1,
        pid_namespace: 2,
        name: b"thalweg-0123456789abcdef".to_vec(),
    };
    let whole = own.to_bytes();
    out.push(("shm-blob", "whole".to_owned(), whole.clone()));
    out.push(("shm-blob", "bad-without-name".to_owned(), whole[..40].to_vec()));
    out.push(("shm-blob", "bad-name-too-long".to_owned(), [&whole[..40], &[b'n'; 65]].concat()));
    out.extend(
        setup::seeds().into_iter().map(|(name, bytes)| ("shm-packets", name.to_owned(), bytes)),
    );
    out
}
