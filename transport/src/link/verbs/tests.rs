//! The link over a device that does what a test says.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

use thalweg_ffi::ibverbs as ffi;

use super::VerbsOptions;
use super::alarm::{Alarm, Alarms};
use super::blob::RAILS_MAX;
use super::buffers::{RECEIVES, RECEIVES_FIRST, SENDS};
use super::engine::{self, Opened, VerbsEngine};
use super::fake::{Fake, VENDOR};
use super::link::VerbsLink;
use super::messenger::{Messenger, RESERVE};
use super::rails::Rail;
use super::registrations::{Found, Registrations, SLICE_BYTES, Use};
use super::wire::{BODY_MAX, Header, Kind, Piece};
use crate::error::{ErrorKind, LinkError};
use crate::link::{
    Armed, Arrival, Budget, Check, Class, Disposition, How, Killed, Landing, Link, LinkKind, OpId,
    Post, Progress, Segment, SegmentMut, Sink,
};
use crate::memory::{Allocator, HostPool, MemoryKind};
use crate::runtime::{Fd, HostLoop, Interest, Reactor, Timers};

mod buffers;
mod marked;
mod onesided;
mod rails;
mod real;
mod watchdog;

/// The keys of what the peer offers, by rail.
const OFFERED_BY: [u32; RAILS_MAX] = [101, 103, 105, 107];
const OP: OpId = OpId { index: 3, generation: 1 };
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Driver {
    parcels: usize,
    done: Vec<(OpId, Result<(), LinkError>)>,
    /// Where the next payloads that are not here yet go.
    landings: VecDeque<Landing>,
}

impl Sink for Driver {
    fn parcel(&mut self, arrival: Arrival<'_>) -> Disposition {
        self.parcels += 1;
        match (arrival.inline, self.landings.pop_front()) {
            (None, Some(to)) => Disposition::Land { to, op: OP, lasting: true },
            _ => Disposition::Discard,
        }
    }

    fn done(&mut self, op: OpId, result: Result<(), LinkError>) {
        self.done.push((op, result));
    }
}

struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

struct Setting {
    fake: Fake,
    link: VerbsLink,
    registrations: Arc<Registrations>,
    timers: Arc<Timers>,
    driver: Driver,
    woken: Arc<Count>,
    host: Arc<HostLoop>,
    /// What the peer holds.
    bootstrap: Option<UnixStream>,
}

/// A link, what drives it, and what the peer holds.
struct Made {
    link: VerbsLink,
    timers: Arc<Timers>,
    host: Arc<HostLoop>,
    bootstrap: UnixStream,
}

fn link_of(messenger: Messenger, registrations: &Arc<Registrations>) -> Made {
    link_with_rails(messenger, registrations, |_| Vec::new())
}

fn link_with_rails(
    mut messenger: Messenger,
    registrations: &Arc<Registrations>,
    rails: impl FnOnce(&Reactor) -> Vec<Rail>,
) -> Made {
    let alarm = Alarms::default().add(0, messenger.queues().identities(), None);
    link_with(messenger, registrations, rails, alarm, Weak::new())
}

fn link_with(
    mut messenger: Messenger,
    registrations: &Arc<Registrations>,
    rails: impl FnOnce(&Reactor) -> Vec<Rail>,
    alarm: Arc<Alarm>,
    engine: Weak<VerbsEngine>,
) -> Made {
    let host = HostLoop::new().expect("an event loop");
    let reactor = Reactor::Host(host.clone());
    let timers = Arc::new(Timers::new(&reactor).expect("timers"));
    let source = |fd| reactor.source(Fd::new(fd), Interest::Read).expect("a source");
    let channel = source(messenger.queues().descriptor().try_clone_to_owned().expect("a number"));
    let (ours, bootstrap) = UnixStream::pair().expect("sockets");
    ours.set_nonblocking(true).expect("a setting");
    let options = VerbsOptions {
        eager_max: 64 << 10,
        max_payload: 1 << 30,
        setup_timeout: Duration::from_secs(1),
        devices: Vec::new(),
        except: Vec::new(),
        rails: RAILS_MAX,
    };
    let opened = Opened {
        alarm,
        engine,
        messenger,
        channel,
        rails: rails(&reactor),
        registrations: registrations.clone(),
        received: VecDeque::new(),
        options,
        timers: timers.clone(),
        why: String::new(),
    };
    Made { link: opened.into_link(source(ours.into())), timers, host, bootstrap }
}

fn setting() -> Setting {
    let fake = Fake::new();
    let registrations = Registrations::new(fake.pool.domain());
    let made = link_of(fake.messenger(), &registrations);
    setting_of(fake, registrations, made)
}

fn setting_of(fake: Fake, registrations: Arc<Registrations>, made: Made) -> Setting {
    let Made { link, timers, host, bootstrap } = made;
    let (driver, woken) = (Driver::default(), Arc::new(Count(AtomicUsize::new(0))));
    let bootstrap = Some(bootstrap);
    Setting { fake, link, registrations, timers, driver, woken, host, bootstrap }
}

fn segment(bytes: &[u8]) -> Segment<'_> {
    Segment { ptr: bytes.as_ptr(), len: bytes.len(), kind: MemoryKind::Host, shared: None }
}

fn place(bytes: &mut [u8]) -> Landing {
    let part = SegmentMut { ptr: bytes.as_mut_ptr(), len: bytes.len(), kind: MemoryKind::Host };
    std::iter::once(part).collect()
}

fn died() -> LinkError {
    LinkError::new(ErrorKind::ConnectionLost, LinkKind::Verbs, "the test ends it")
}

impl Setting {
    fn poll(&mut self) -> Result<Progress, LinkError> {
        let waker = Waker::from(self.woken.clone());
        let mut budget = Budget::TURN;
        self.link.poll(&mut Context::from_waker(&waker), true, &mut budget, &mut self.driver)
    }

    fn arm(&mut self) -> Armed {
        let waker = Waker::from(self.woken.clone());
        self.link.arm(&mut Context::from_waker(&waker)).expect("armed")
    }

    fn post(&mut self, bytes: &[u8]) -> Result<Post, LinkError> {
        self.link.post(OpId::NONE, Class::Message, How::Eager, b"head", &[segment(bytes)])
    }

    fn kill(&mut self) -> Killed {
        self.link.kill(&died(), &mut self.driver)
    }

    /// Polls until nothing moves any more.
    fn settle(&mut self) {
        while self.poll().expect("the link works") != Progress::Idle {}
    }

    /// As the resident task drives a link that sleeps: it is polled when it is woken. Its error, if it
    /// ends before this holds.
    fn asleep_until(&mut self, mut holds: impl FnMut(&mut Setting) -> bool) -> Option<LinkError> {
        let until = Instant::now() + PATIENCE;
        let waker = Waker::from(self.woken.clone());
        let mut cx = Context::from_waker(&waker);
        loop {
            loop {
                match self.poll() {
                    Ok(Progress::Idle) => break,
                    Ok(_) => {}
                    Err(error) => return Some(error),
                }
            }
            let armed = self.link.arm(&mut cx);
            let woken = self.woken.0.load(Ordering::SeqCst);
            loop {
                if holds(self) {
                    return None;
                }
                assert!(Instant::now() < until, "it goes on for {PATIENCE:?}");
                let is_woken = self.woken.0.load(Ordering::SeqCst) != woken;
                if is_woken || !matches!(armed, Ok(Armed::Yes)) {
                    break;
                }
                self.host.drain().expect("events");
                self.timers.poll_expired(&mut cx).expect("timers");
            }
        }
    }

    /// As an operation drives it that never rests. Nobody asks the system meanwhile which descriptors are
    /// readable.
    fn busy_until(&mut self, mut holds: impl FnMut(&mut Setting) -> bool) -> Option<LinkError> {
        let until = Instant::now() + PATIENCE;
        while !holds(self) {
            assert!(Instant::now() < until, "it goes on for {PATIENCE:?}");
            if let Err(error) = self.poll() {
                return Some(error);
            }
        }
        None
    }

    /// The peer offers these bytes, of memory that it says it has registered.
    fn offer(&self, id: u32, bytes: &[u8]) {
        self.offer_by(0, id, bytes);
    }

    /// The same, for these further rails as well.
    fn offer_by(&self, rails: u8, id: u32, bytes: &[u8]) {
        let mut body = b"head".to_vec();
        let address = bytes.as_ptr() as u64;
        Piece { address, len: bytes.len() as u64, keys: OFFERED_BY }.append(rails, &mut body);
        let header = Header {
            rails,
            class: Class::Message,
            head_len: 4,
            pieces: 1,
            ..Header::about(Kind::Bulk, id, bytes.len() as u64)
        };
        self.fake.deliver(header, &body);
    }

    fn eager(&self) {
        let header = Header { class: Class::Message, ..Header::about(Kind::Eager, 0, 0) };
        self.fake.deliver(header, &[]);
    }

    /// How many bytes are registered, buffers for messages apart.
    fn registered(&self) -> usize {
        let all: usize = self.fake.state().registered.iter().map(|(_, _, len, _)| len).sum();
        all - self.fake.pool.bytes()
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 4096 * 7 + at) as u8).collect()
}

#[test]
fn queue_pairs_that_will_not_go_are_tried_again() {
    for code in [libc::EBUSY, libc::ETIMEDOUT] {
        let mut setting = setting();
        let bytes = pattern(100 << 10);
        assert_eq!(setting.post(&bytes).expect("posted"), Post::Pending);
        setting.fake.state().destroying = code;
        for _ in 0..3 {
            assert_eq!(setting.kill(), Killed::Lingers);
            assert!(setting.driver.done.is_empty(), "told while the device may use its memory");
            let before = setting.woken.0.load(Ordering::SeqCst);
            assert_eq!(setting.arm(), Armed::Yes);
            let woken = || setting.woken.0.load(Ordering::SeqCst) > before;
            // As the resident task does.
            while !woken() {
                setting.host.drain().expect("events");
                let waker = Waker::from(setting.woken.clone());
                let timers = &setting.timers;
                timers.poll_expired(&mut Context::from_waker(&waker)).expect("timers");
            }
            while setting.arm() != Armed::Busy {}
        }
        setting.fake.state().destroying = 0;
        assert_eq!(setting.kill(), Killed::Over);
        assert_eq!(setting.arm(), Armed::Yes);
        assert_eq!(setting.fake.pool.used(), 0, "the buffers are given back");
    }
}

#[test]
fn an_input_output_error_is_no_end_unless_the_device_is_gone() {
    let mut setting = setting();
    setting.fake.state().destroying = libc::EIO;
    assert_eq!(setting.kill(), Killed::Lingers);
    assert_ne!(setting.fake.pool.used(), 0);
    setting.fake.device.set_gone();
    assert_eq!(setting.kill(), Killed::Over);
    assert_ne!(setting.fake.pool.used(), 0, "no other link uses these buffers");
}

#[test]
fn a_device_that_is_no_more_takes_its_queue_pairs_along() {
    let mut setting = setting();
    setting.fake.state().destroying = libc::ENODEV;
    assert_eq!(setting.kill(), Killed::Over);
    assert!(setting.fake.device.is_gone());
    assert_ne!(setting.fake.pool.used(), 0);
}

#[test]
fn a_link_that_is_kept_busy_sees_its_peers_end() {
    let mut setting = setting();
    assert_eq!(setting.poll().expect("alive"), Progress::Idle);
    setting.bootstrap = None;
    assert_eq!(setting.busy_until(|_| false).map(|error| error.kind), Some(ErrorKind::PeerGone));
}

#[test]
fn a_link_that_is_kept_busy_hears_that_its_device_goes() {
    let fakes = [Fake::new()];
    let engine = engine::tests::engine(&fakes);
    let [fake] = fakes;
    let registrations = Registrations::new(fake.pool.domain());
    let (alarm, weak) = (engine::tests::alarm(&engine), Arc::downgrade(&engine));
    let made = link_with(fake.messenger(), &registrations, |_| Vec::new(), alarm, weak);
    let mut setting = setting_of(fake, registrations, made);
    assert_eq!(setting.poll().expect("alive"), Progress::Idle);
    setting.fake.say(ffi::IBV_EVENT_DEVICE_FATAL);
    assert_eq!(
        setting.busy_until(|_| false).map(|error| error.kind),
        Some(ErrorKind::ConnectionLost)
    );
}

#[test]
fn what_failed_has_not_been_flushed() {
    let mut setting = setting();
    assert_eq!(setting.post(b"lost").expect("posted"), Post::Done);
    assert!(!setting.link.flushed(), "it is on its way");
    setting.fake.end_send(ffi::IBV_WC_RETRY_EXC_ERR);
    let error = loop {
        match setting.poll() {
            Ok(_) => assert!(!setting.link.flushed(), "it will never arrive"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind, ErrorKind::ConnectionLost);
    assert!(error.detail.contains(&format!("vendor error {VENDOR}")), "{}", error.detail);
    assert!(!setting.link.flushed());
}

#[test]
fn credit_that_is_returned_flushes_nothing() {
    let mut setting = setting();
    assert_eq!(setting.post(b"slow").expect("posted"), Post::Done);
    assert!(!setting.link.flushed());
    let (slow, due) =
        (setting.fake.state().sent.pop_front(), (RECEIVES_FIRST as u16 - RESERVE).div_ceil(2));
    for _ in 0..due {
        setting.eager();
    }
    setting.settle();
    let (header, _) = setting.fake.end_send(ffi::IBV_WC_SUCCESS);
    assert_eq!(header.kind, Kind::Credit);
    setting.settle();
    assert!(!setting.link.flushed(), "credit has arrived, and the message has not");
    setting.fake.state().sent.extend(slow);
    setting.fake.end_send(ffi::IBV_WC_SUCCESS);
    setting.settle();
    assert!(setting.link.flushed());
    // Nor is it waited for.
    assert_eq!(setting.post(b"next").expect("posted"), Post::Done);
    assert!(!setting.link.flushed());
    setting.fake.end_send(ffi::IBV_WC_SUCCESS);
    setting.settle();
    assert!(setting.link.flushed());
}

#[test]
fn a_peer_cannot_send_more_than_its_credit() {
    let mut setting = setting();
    // Nothing is left to return credit with.
    for _ in 0..SENDS {
        assert_eq!(setting.post(b"8 bytes.").expect("posted"), Post::Done);
    }
    let allowed = RECEIVES_FIRST - usize::from(RESERVE);
    for _ in 0..allowed {
        setting.eager();
    }
    setting.settle();
    assert_eq!(setting.driver.parcels, allowed);
    setting.eager();
    let error = setting.poll().expect_err("one too many");
    assert_eq!(error.kind, ErrorKind::Protocol);
}

#[test]
fn silence_that_was_broken_is_told_after_what_had_come() {
    let mut setting = setting();
    assert_eq!(setting.link.check().expect("alive"), Check::Quiet);
    assert_eq!(setting.post(b"a").expect("posted"), Post::Done);
    assert_eq!(setting.link.check().expect("alive"), Check::Owed);
    setting.fake.end_send(ffi::IBV_WC_SUCCESS);
    assert_eq!(setting.link.check().expect("alive"), Check::Quiet);
    assert_eq!(setting.post(b"b").expect("posted"), Post::Done);
    setting.eager();
    setting.fake.end_send(ffi::IBV_WC_RETRY_EXC_ERR);
    assert_eq!(setting.link.check().expect("the end is told by a poll"), Check::Drive);
    while setting.poll().is_ok() {}
    assert_eq!(setting.driver.parcels, 1);
}

#[test]
fn a_post_to_a_broken_link_says_what_broke_it() {
    let mut setting = setting();
    assert_eq!(setting.post(b"a").expect("posted"), Post::Done);
    setting.fake.end_send(ffi::IBV_WC_RETRY_EXC_ERR);
    setting.fake.state().posting = libc::EINVAL;
    let error = setting.post(b"b").expect_err("a broken queue pair takes nothing");
    assert_eq!(error.kind, ErrorKind::ConnectionLost);
    assert!(error.detail.contains(&format!("vendor error {VENDOR}")), "{}", error.detail);
}

#[test]
fn what_is_landed_into_is_registered_in_slices_as_it_is_needed() {
    let mut setting = setting();
    let bytes = pattern(3 * SLICE_BYTES + 12_345);
    let mut to = vec![0; bytes.len()];
    setting.driver.landings.push_back(place(&mut to));
    setting.offer(1, &bytes);
    assert_ne!(setting.poll().expect("alive"), Progress::Idle);
    assert!(setting.registered() <= SLICE_BYTES, "registered before it was needed");
    let mut most = 0;
    while setting.driver.done.is_empty() {
        setting.poll().expect("alive");
        most = most.max(setting.registered());
    }
    assert!(most <= 3 * SLICE_BYTES, "what is filled stays registered: {most}");
    assert_eq!(
        setting.driver.done.pop().map(|(op, result)| (op, result.is_ok())),
        Some((OP, true))
    );
    assert!(to == bytes, "wrong bytes");
    assert_eq!(setting.registered(), 0);
    let counters = setting.link.counters();
    assert_eq!((counters.registrations, counters.registrations_refused), (4, 0));
}

#[test]
fn one_slice_is_registered_a_turn() {
    let mut setting = setting();
    let bytes = pattern(64 << 10);
    let mut places = [(); 3].map(|()| vec![0; bytes.len()]);
    for (id, to) in places.iter_mut().enumerate() {
        setting.driver.landings.push_back(place(to));
        setting.offer(id as u32, &bytes);
    }
    for _ in 0..3 {
        let before = setting.fake.state().registrations;
        setting.poll().expect("alive");
        assert_eq!(setting.fake.state().registrations - before, 1);
    }
    setting.settle();
    assert_eq!(setting.driver.done.len(), 3);
    assert!(places.iter().all(|to| *to == bytes));
}

#[test]
fn a_payload_that_cannot_be_registered_to_its_end_comes_in_chunks() {
    let mut setting = setting();
    // The last slice is longer than what can be registered, or the first one is.
    for (first, last) in [(SLICE_BYTES, SLICE_BYTES / 2), (SLICE_BYTES / 2, 0)] {
        setting.driver.done.clear();
        let bytes = pattern(first + last);
        let mut to = vec![0; bytes.len()];
        setting.driver.landings.push_back(place(&mut to));
        setting.offer(1, &bytes);
        if last > 0 {
            setting.poll().expect("alive");
        }
        setting.fake.state().registers_max = Some(1);
        let (mut sent, mut credits) = (0, 0);
        while setting.driver.done.is_empty() {
            setting.poll().expect("alive");
            while !setting.fake.state().sent.is_empty() {
                let (header, _) = setting.fake.end_send(ffi::IBV_WC_SUCCESS);
                assert!(matches!(header.kind, Kind::Pull | Kind::Credit), "{header:?}");
                if header.kind == Kind::Credit {
                    continue;
                }
                credits += 1;
                while sent < header.len as usize {
                    let chunk = &bytes[sent..header.len as usize];
                    let chunk = &chunk[..chunk.len().min(BODY_MAX)];
                    let about = Header::about(Kind::Chunk, 1, sent as u64);
                    let credits = std::mem::take(&mut credits);
                    let header = Header { class: Class::Message, credits, ..about };
                    setting.fake.deliver(header, chunk);
                    sent += chunk.len();
                    setting.poll().expect("alive");
                }
            }
        }
        assert!(to == bytes, "wrong bytes");
        setting.fake.state().registers_max = None;
    }
}

#[test]
fn memory_is_readable_by_the_peer_only_where_it_was_offered() {
    let mut setting = setting();
    let read = ffi::IBV_ACCESS_REMOTE_READ;
    let reached = read | ffi::IBV_ACCESS_REMOTE_WRITE;
    assert_eq!(setting.fake.state().access, [0, read, 0, reached]);
    let pool = HostPool::new(1 << 20);
    let mut memory = pool.allocate(64 << 10).expect("memory");
    let bytes = pattern(64 << 10);
    setting.driver.landings.push_back(place(&mut memory));
    setting.offer(1, &bytes);
    setting.settle();
    assert_eq!(setting.driver.done.len(), 1);
    let readable = |setting: &Setting| {
        let state = setting.fake.state();
        let readable = ffi::IBV_ACCESS_REMOTE_READ as i32;
        state.registered.iter().filter(|(.., access)| access & readable != 0).count()
    };
    assert_eq!(readable(&setting), 0);
    assert_eq!(setting.registered(), 64 << 10, "it stays registered");
    assert_eq!(setting.post(&memory).expect("posted"), Post::Pending);
    assert_eq!(readable(&setting), 1);
    drop(setting.link);
    drop((memory, pool));
    assert_eq!(setting.fake.state().registered.len(), 1, "the slab alone is registered");
}

#[test]
fn memory_of_other_devices_is_refused_before_anything_is_posted() {
    let mut setting = setting();
    let bytes = pattern(100 << 10);
    let device = Segment { kind: MemoryKind::Device, ..segment(&bytes) };
    let posted = setting.link.post(OP, Class::Message, How::Eager, b"head", &[device]);
    let error = posted.expect_err("no way to read it");
    assert_eq!(error.kind, ErrorKind::Unsupported);
    assert!(error.detail.contains("device memory"), "{}", error.detail);
    assert!(setting.fake.state().sent.is_empty());
    let mut to = vec![0; bytes.len()];
    let mut landing = place(&mut to);
    landing[0].kind = MemoryKind::Device;
    setting.driver.landings.push_back(landing);
    setting.offer(1, &bytes);
    assert!(setting.poll().is_err(), "no way to write it");
    assert_eq!(setting.registered(), 0);
}

#[test]
fn long_mappings_are_not_registered_whole() {
    let setting = setting();
    let pool = HostPool::new(0);
    // Its mapping is 256 MiB long.
    let memory = pool.allocate(130 << 20).expect("memory");
    let get = |offset: usize, bytes, what| {
        // SAFETY: within the memory.
        let ptr = unsafe { memory.as_ptr().add(offset) };
        match setting.registrations.get(ptr, bytes, what, true) {
            Found::Known(_, covered) => (covered, true),
            Found::Made(_, covered) => (covered, false),
            Found::NotNow | Found::Refused => panic!("refused"),
        }
    };
    let len = memory.len();
    assert_eq!(get(0, len, Use::Land), (SLICE_BYTES, false));
    assert_eq!(get(4096, len - 4096, Use::Land), (SLICE_BYTES - 4096, true));
    assert_eq!(get(128 << 20, 2 << 20, Use::Land), (2 << 20, false));
    assert_eq!(setting.registered(), 2 * SLICE_BYTES);
    assert_eq!(get(0, len, Use::Offer), (len, false));
    assert_eq!(get(1 << 20, 1 << 20, Use::Offer), (1 << 20, true));
    assert_eq!(get(64 << 20, len - (64 << 20), Use::Land), (len - (64 << 20), true));
    assert_eq!(setting.registered(), 2 * SLICE_BYTES + len);
    drop(memory);
    assert_eq!(setting.registered(), 0, "registered longer than it is there");
}

#[test]
fn a_forked_child_ends_its_copy_at_once() {
    let mut setting = setting();
    let bytes = pattern(100 << 10);
    assert_eq!(setting.post(&bytes).expect("posted"), Post::Pending);
    let pool = HostPool::new(1 << 20);
    let memory = pool.allocate(64 << 10).expect("memory");
    let registrations = setting.registrations.clone();
    // As if other threads held them.
    let _locks = (registrations.lock_for_test(), pool.lock_for_test());
    // SAFETY: the child calls what a child may come to call, and ends without unwinding.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: takes no pointers. A child that hangs is ended.
        unsafe { libc::alarm(20) };
        let over = setting.kill() == Killed::Over;
        drop(memory);
        // SAFETY: as above.
        unsafe { libc::_exit(i32::from(!over)) };
    }
    assert!(child > 0, "no child");
    let mut status = -1;
    // SAFETY: a child of ours, and a number to write.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "the child hangs, or its copy lingers");
}
