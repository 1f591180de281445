//! Puts and gets by the adapter. The device's other end is its own: what a link registers for its
//! peer, the same link reaches.

use super::*;
use crate::link::verbs::buffers::REACH_BUFFERS;
use crate::link::verbs::fake::INLINE_BYTES;
use crate::link::verbs::messenger::REACHES;
use crate::link::verbs::onesided::OPERATIONS_MAX;
use crate::link::verbs::wire::BUFFER_BYTES;
use crate::link::{OneSided, Registration, RemoteId};

const READ: i32 = ffi::IBV_ACCESS_REMOTE_READ as i32;
const WRITE: i32 = ffi::IBV_ACCESS_REMOTE_WRITE as i32;
const LOCAL: i32 = ffi::IBV_ACCESS_LOCAL_WRITE as i32;

/// A region, registered and opened.
struct Target {
    memory: Vec<u8>,
    registration: Option<Arc<dyn Registration>>,
    remote: RemoteId,
}

fn op(index: u32) -> OpId {
    OpId { index, generation: 1 }
}

impl Setting {
    fn region(&mut self, len: usize, read: bool, write: bool) -> Target {
        let mut memory = vec![0u8; len];
        let registered = self.link.register(place(&mut memory)[0], read, write);
        let registration = registered.expect("registered");
        let remote = self.link.open(registration.grant()).expect("opened");
        Target { memory, registration: Some(registration), remote }
    }

    fn put(&mut self, index: u32, from: &[u8], to: &Target, offset: u64) -> Post {
        self.link.put(op(index), segment(from), to.remote, offset).expect("the link works")
    }

    fn get(&mut self, index: u32, to: &mut [u8], from: &Target, offset: u64) -> Post {
        self.link.get(op(index), place(to)[0], from.remote, offset).expect("the link works")
    }

    /// What has been reported since this was last asked, without what went wrong.
    fn over(&mut self) -> Vec<(u32, bool)> {
        let done = std::mem::take(&mut self.driver.done);
        done.into_iter().map(|(op, result)| (op.index, result.is_ok())).collect()
    }

    /// The rights of what covers this address.
    fn rights(&self, memory: &[u8]) -> Vec<i32> {
        let at = memory.as_ptr() as usize;
        let state = self.fake.state();
        let covers = |start: usize, len: usize| (start..start + len).contains(&at);
        let covering = state.registered.iter().filter(|(_, start, len, _)| covers(*start, *len));
        covering.map(|(.., access)| *access).collect()
    }
}

/// Around everything at which another way of moving begins.
fn sizes() -> Vec<usize> {
    let around = |size: usize| [size - 1, size, size + 1];
    let edges = [INLINE_BYTES as usize, BUFFER_BYTES, 32 << 10, 256 << 10, SLICE_BYTES];
    std::iter::once(1).chain(edges.into_iter().flat_map(around)).chain([3 * SLICE_BYTES]).collect()
}

#[test]
fn every_size_is_put_and_got() {
    let mut setting = setting();
    let mut target = setting.region(3 * SLICE_BYTES + 10, true, true);
    let before = setting.registered();
    let mut moved = 0;
    for len in sizes() {
        let bytes = pattern(len);
        assert_eq!(setting.put(1, &bytes, &target, 7), Post::Pending);
        setting.settle();
        assert_eq!(setting.over(), [(1, true)], "{len}");
        assert!(target.memory[7..7 + len] == bytes, "{len}: wrong bytes");
        assert_eq!((target.memory[6], target.memory[7 + len]), (0, 0), "{len}: beyond its ends");
        let mut to = vec![0; len + 1];
        assert_eq!(setting.get(2, &mut to[..len], &target, 7), Post::Pending);
        setting.settle();
        assert_eq!(setting.over(), [(2, true)], "{len}");
        assert!(to[..len] == bytes && to[len] == 0, "{len}: wrong bytes");
        target.memory[..len + 8].fill(0);
        moved += len as u64;
    }
    assert_eq!(setting.registered(), before, "something of the operations stays registered");
    let counters = setting.link.counters();
    assert_eq!((counters.rdma_bytes_sent, counters.rdma_bytes_received), (moved, moved));
    assert_eq!(counters.registrations_refused, 0);
}

#[test]
fn memory_of_this_crate_is_registered_once() {
    let mut setting = setting();
    let target = setting.region(1 << 20, true, true);
    let pool = HostPool::new(1 << 20);
    let mut memory = pool.allocate(1 << 20).expect("memory");
    memory.copy_from_slice(&pattern(1 << 20));
    let mut made = Vec::new();
    for round in 0..4 {
        let before = setting.fake.state().registrations;
        if round % 2 == 0 {
            setting.put(1, &memory, &target, 0);
        } else {
            setting.get(1, &mut memory, &target, 0);
        }
        setting.settle();
        assert_eq!(setting.over(), [(1, true)]);
        made.push(setting.fake.state().registrations - before);
    }
    assert_eq!(made, [1, 0, 0, 0]);
    assert!(target.memory == pattern(1 << 20));
    let counters = setting.link.counters();
    assert_eq!((counters.registrations, counters.registrations_reused), (1, 3));
}

#[test]
fn regions_get_the_rights_that_they_have_and_no_others() {
    let mut setting = setting();
    for (read, write, rights) in
        [(true, false, READ), (false, true, WRITE), (true, true, READ | WRITE)]
    {
        let target = setting.region(100, read, write);
        assert_eq!(setting.rights(&target.memory), [LOCAL | rights]);
        drop(target.registration);
        assert_eq!(setting.rights(&target.memory), [0; 0]);
    }
    // What is put is only read, what is got into only written, and that by this side.
    let target = setting.region(100 << 10, true, true);
    let (from, mut to) = (pattern(100 << 10), vec![0; 100 << 10]);
    setting.fake.state().holds_reaching = true;
    setting.put(1, &from, &target, 0);
    setting.get(2, &mut to, &target, 0);
    setting.poll().expect("alive");
    setting.poll().expect("alive");
    assert_eq!((setting.rights(&from), setting.rights(&to)), (vec![0], vec![LOCAL]));
}

#[test]
fn links_do_not_share_what_their_peers_may_reach() {
    let [mut one, other] = [setting(), setting()];
    assert_ne!(OneSided::domain(&one.link), OneSided::domain(&other.link));
    // What was offered for messages is not to be reached by puts and gets either.
    let bytes = pattern(100 << 10);
    assert_eq!(one.post(&bytes).expect("posted"), Post::Pending);
    let offered = *one.fake.state().registered.last().expect("it was registered");
    let (key, start, len, access) = offered;
    assert_eq!((start, len, access), (bytes.as_ptr() as usize, bytes.len(), READ));
    let target = one.region(10, true, true);
    let mut forged = target.registration.as_ref().expect("registered").grant().to_vec();
    forged[..8].copy_from_slice(&(start as u64).to_le_bytes());
    forged[8..16].copy_from_slice(&(len as u64).to_le_bytes());
    forged[24..28].copy_from_slice(&key.to_le_bytes());
    let remote = one.link.open(&forged).expect("it looks like a grant");
    let mut to = vec![0; 10];
    one.link.get(op(1), place(&mut to)[0], remote, 0).expect("posted");
    one.settle();
    assert_eq!(one.over(), [(1, false)]);
    assert_eq!(to, [0; 10]);
}

#[test]
fn a_put_is_over_when_the_beacon_was_read_behind_it() {
    let mut setting = setting();
    let target = setting.region(1 << 20, false, true);
    setting.fake.state().holds_reaching = true;
    let bytes = pattern(1 << 20);
    for len in [8, 1000, 1 << 20] {
        setting.put(1, &bytes[..len], &target, 0);
        setting.settle();
        assert_eq!(setting.fake.state().reaching[0].inline, len <= INLINE_BYTES as usize);
        let mut writes = 0;
        while setting.fake.state().reaching[0].writes {
            setting.fake.end_reaching(ffi::IBV_WC_SUCCESS);
            setting.settle();
            assert_eq!(setting.over(), [], "{len}: told before its bytes are in memory");
            writes += 1;
        }
        assert_eq!(writes, len.div_ceil(256 << 10));
        assert!(target.memory[..len] == bytes[..len]);
        let region = setting.fake.state().reaching[0].remote;
        assert!(!(0..1 << 20).contains(&region.wrapping_sub(target.memory.as_ptr() as u64)));
        setting.fake.end_reaching(ffi::IBV_WC_SUCCESS);
        setting.settle();
        assert_eq!(setting.over(), [(1, true)], "{len}");
        assert!(setting.fake.state().reaching.is_empty());
    }
}

#[test]
fn memory_stays_registered_until_its_requests_have_ended() {
    let mut setting = setting();
    let len = 2 * SLICE_BYTES + (1 << 20);
    let target = setting.region(len, true, true);
    setting.fake.state().holds_reaching = true;
    let bytes = pattern(len);
    let mut to = vec![0; len];
    for gets in [false, true] {
        match gets {
            false => setting.put(1, &bytes, &target, 0),
            true => setting.get(1, &mut to, &target, 0),
        };
        setting.settle();
        let mut most = 0;
        while setting.driver.done.is_empty() {
            let before = setting.registered();
            setting.fake.end_reaching(ffi::IBV_WC_SUCCESS);
            setting.settle();
            most = most.max(before);
        }
        assert_eq!(setting.over(), [(1, true)]);
        // The region, and its beacon's page.
        assert!(most - len <= 2 * SLICE_BYTES + BUFFER_BYTES, "what is over stays registered");
    }
    assert!(to == bytes, "wrong bytes");
}

#[test]
fn a_put_whose_beacon_finds_no_room_is_not_over() {
    let mut setting = setting();
    let target = setting.region(100, true, true);
    setting.fake.state().holds_reaching = true;
    let count = REACH_BUFFERS - 1;
    let mut places = vec![0u8; count];
    for place in places.chunks_mut(1) {
        setting.get(1, place, &target, 0);
    }
    // Requests that carry their bytes need no buffers.
    for _ in 0..(REACHES - count) / 2 {
        setting.put(1, b"x", &target, 0);
    }
    setting.settle();
    setting.put(2, b"y", &target, 0);
    setting.settle();
    assert_eq!(setting.fake.state().reaching.len(), REACHES);
    let last = setting.fake.state().reaching.back().is_some_and(|posted| posted.writes);
    assert!(last, "there is no room for its beacon");
    for _ in 0..REACHES {
        setting.fake.end_reaching(ffi::IBV_WC_SUCCESS);
    }
    setting.settle();
    assert!(setting.over().iter().all(|over| *over == (1, true)), "told too early");
    setting.fake.end_reaching(ffi::IBV_WC_SUCCESS);
    setting.settle();
    assert_eq!(setting.over(), [(2, true)]);
}

#[test]
fn what_cannot_be_registered_goes_by_buffers() {
    let mut setting = setting();
    let target = setting.region(1 << 20, true, true);
    setting.fake.state().registers_max = Some(1);
    let bytes = pattern(1 << 20);
    setting.put(1, &bytes, &target, 0);
    setting.settle();
    let mut to = vec![0; 1 << 20];
    setting.get(2, &mut to, &target, 0);
    setting.settle();
    assert_eq!(setting.over(), [(1, true), (2, true)]);
    assert!(to == bytes && target.memory == bytes, "wrong bytes");
    let counters = setting.link.counters();
    assert_eq!((counters.registrations, counters.registrations_refused), (0, 2));
    // Nothing can be registered for the peer either.
    let mut memory = vec![0; 100];
    let refused = setting.link.register(place(&mut memory)[0], true, true).err();
    assert_eq!(refused.map(|error| error.kind), Some(ErrorKind::Resources));
    // What is beyond this side's own limits is not even tried.
    let beyond = SegmentMut { len: (1 << 30) + 1, ..place(&mut memory)[0] };
    let refused = setting.link.register(beyond, true, true).err();
    assert_eq!(refused.map(|error| error.kind), Some(ErrorKind::LimitExceeded));
    assert_eq!(setting.post(b"the link works").expect("posted"), Post::Done);
}

#[test]
fn buffers_are_used_by_one_request_at_a_time() {
    let mut setting = setting();
    let target = setting.region(64 << 10, true, true);
    setting.fake.state().holds_reaching = true;
    let parts: Vec<Vec<u8>> = (0..24u8).map(|part| vec![part + 1; 1000]).collect();
    for (index, part) in parts.iter().enumerate() {
        setting.put(index as u32, part, &target, index as u64 * 1000);
    }
    setting.settle();
    let mut most = 0;
    let mut ended = Vec::new();
    loop {
        let writes = setting.fake.state().reaching.iter().filter(|posted| posted.writes).count();
        most = most.max(writes);
        if setting.fake.state().reaching.is_empty() {
            break;
        }
        setting.fake.end_reaching(ffi::IBV_WC_SUCCESS);
        setting.settle();
        ended.extend(setting.over());
    }
    assert_eq!(ended.len(), 24);
    assert!(most < REACH_BUFFERS, "{most}");
    for (part, bytes) in target.memory.chunks(1000).take(24).enumerate() {
        assert!(bytes == parts[part], "wrong bytes in part {part}");
    }
}

#[test]
fn no_more_is_posted_than_there_is_room_for_and_short_ones_take_turns() {
    let mut setting = setting();
    let target = setting.region(8 << 20, true, true);
    setting.fake.state().holds_reaching = true;
    let mut long = vec![0; 8 << 20];
    setting.get(1, &mut long, &target, 0);
    setting.settle();
    assert_eq!(setting.fake.state().reaching.len(), REACHES, "as many as there is room for");
    let mut short = [0; 8];
    setting.get(2, &mut short, &target, 0);
    let mut ended = 0;
    while setting.over().is_empty() {
        setting.fake.end_reaching(ffi::IBV_WC_SUCCESS);
        setting.settle();
        assert!(setting.fake.state().reaching.len() <= REACHES);
        ended += 1;
    }
    assert!(ended <= REACHES + 2, "the short one has waited for the long one: {ended}");
    let mut places = vec![0u8; OPERATIONS_MAX + 1];
    let mut posted = Vec::new();
    for place in places.chunks_mut(1) {
        posted.push(setting.get(3, place, &target, 0));
    }
    let full = posted.iter().filter(|post| **post == Post::Full).count();
    // The long one is still under way.
    assert_eq!(full, 2);
    assert_eq!(posted.last(), Some(&Post::Full));
}

#[test]
fn ranges_are_checked_before_anything_is_posted() {
    for (offset, len) in [(100u64, 1usize), (99, 2), (0, 101), (u64::MAX, 2), (u64::MAX - 1, 1)] {
        let mut setting = setting();
        let target = setting.region(100, true, true);
        let bytes = pattern(len);
        let error = setting.link.put(op(1), segment(&bytes), target.remote, offset);
        assert_eq!(error.expect_err("outside").kind, ErrorKind::Protocol);
        assert!(setting.poll().is_err(), "the peer has contradicted itself");
        assert_eq!(setting.fake.state().requests, 0);
    }
    let mut setting = setting();
    let target = setting.region(100, true, true);
    setting.put(1, &pattern(100), &target, 0);
    setting.settle();
    assert_eq!(setting.over(), [(1, true)]);
    setting.link.close(target.remote);
    let error = setting.link.put(op(2), segment(b"late"), target.remote, 0);
    assert_eq!(error.expect_err("closed").kind, ErrorKind::Protocol);
}

#[test]
fn a_grant_is_well_formed_or_refused() {
    let mut setting = setting();
    let target = setting.region(100, true, true);
    let grant = target.registration.as_ref().expect("registered").grant().to_vec();
    for len in 0..grant.len() {
        assert!(setting.link.open(&grant[..len]).is_err(), "{len}");
    }
    assert!(setting.link.open(&[&grant[..], &[0]].concat()).is_err());
    let mut beyond = grant.clone();
    beyond[..8].copy_from_slice(&(u64::MAX - 98).to_le_bytes());
    assert!(setting.link.open(&beyond).is_err(), "it ends beyond all addresses");
    assert_ne!(setting.link.open(&grant).expect("opened"), target.remote);
    assert_eq!(setting.post(b"the link works").expect("posted"), Post::Done);
}

#[test]
fn a_bad_key_ends_puts_and_gets_and_nothing_else() {
    let mut setting = setting();
    let mut target = setting.region(1 << 20, true, true);
    let other = setting.region(1 << 20, true, true);
    setting.fake.state().holds_reaching = true;
    let bytes = pattern(1 << 20);
    let mut to = vec![0; 1 << 20];
    setting.put(1, &bytes, &target, 0);
    setting.get(2, &mut to, &other, 0);
    setting.put(3, &bytes, &other, 0);
    setting.settle();
    drop(target.registration.take());
    let mut over = Vec::new();
    while !setting.fake.state().reaching.is_empty() {
        let mine = setting.fake.state().reaching.len();
        setting.fake.end_reaching(ffi::IBV_WC_SUCCESS);
        setting.settle();
        over.extend(setting.over());
        assert!(over.len() < 3 || mine == 1, "told while the device may use the memory");
        assert_eq!(setting.fake.state().reaching.len(), mine - 1, "posted to a broken queue pair");
    }
    over.sort_unstable();
    assert_eq!(over, [(1, false), (2, false), (3, false)]);
    // Nothing of them stays.
    assert_eq!((setting.rights(&bytes), setting.rights(&to)), (vec![], vec![]));
    assert!(setting.link.open(other.registration.as_ref().expect("it").grant()).is_err());
    // The link goes on.
    assert_eq!(setting.post(b"message").expect("posted"), Post::Done);
    assert!(!setting.link.flushed());
    setting.fake.end_send(ffi::IBV_WC_SUCCESS);
    setting.eager();
    setting.settle();
    assert_eq!(setting.driver.parcels, 1);
    assert!(setting.link.flushed());
    assert_eq!(setting.kill(), Killed::Over);
    assert_eq!(setting.over(), []);
}

#[test]
fn a_refused_request_says_what_was_refused() {
    let mut setting = setting();
    let mut target = setting.region(100, true, true);
    drop(target.registration.take());
    setting.put(1, b"x", &target, 0);
    setting.settle();
    let (_, result) = setting.driver.done.pop().expect("it has ended");
    let error = result.expect_err("refused");
    assert_eq!(error.kind, ErrorKind::ConnectionLost);
    assert!(error.detail.contains(&format!("vendor error {VENDOR}")), "{}", error.detail);
    assert!(error.detail.contains("putting or getting"), "{}", error.detail);
}

#[test]
fn a_connection_that_is_lost_ends_the_link() {
    let mut setting = setting();
    let target = setting.region(100, true, true);
    setting.fake.state().holds_reaching = true;
    setting.put(1, b"x", &target, 0);
    assert_eq!(setting.post(b"message").expect("posted"), Post::Done);
    assert!(!setting.link.flushed());
    setting.fake.end_send(ffi::IBV_WC_SUCCESS);
    setting.settle();
    assert!(setting.link.flushed());
    setting.eager();
    setting.fake.end_reaching(ffi::IBV_WC_RETRY_EXC_ERR);
    assert_eq!(setting.link.check().expect("alive"), Check::Drive);
    let error = loop {
        match setting.poll() {
            Ok(_) => assert!(!setting.link.flushed(), "nothing more will leave"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind, ErrorKind::ConnectionLost);
    assert_eq!(setting.driver.parcels, 1, "what had come is handed up first");
    assert_eq!(setting.over(), []);
    assert_eq!(setting.kill(), Killed::Over);
    assert_eq!(setting.over(), [(1, false)]);
}

#[test]
fn a_request_that_is_not_taken_is_told_by_what_broke_the_queue_pair() {
    let mut setting = setting();
    let mut target = setting.region(100, true, true);
    setting.fake.state().holds_reaching = true;
    setting.put(1, b"x", &target, 0);
    drop(target.registration.take());
    setting.fake.end_reaching(ffi::IBV_WC_SUCCESS);
    setting.fake.state().posting = libc::EINVAL;
    setting.put(2, b"y", &target, 0);
    setting.fake.end_reaching(ffi::IBV_WC_SUCCESS);
    setting.settle();
    let mut over = setting.over();
    over.sort_unstable();
    assert_eq!(over, [(1, false), (2, false)]);
    setting.fake.state().posting = 0;
    assert_eq!(setting.post(b"the link works").expect("posted"), Post::Done);
    // For no reason that is known, it is the link's end.
    let mut setting = super::setting();
    let target = setting.region(100, true, true);
    setting.fake.state().posting = libc::EINVAL;
    assert_eq!(setting.put(1, b"x", &target, 0), Post::Pending, "a part might be under way");
    assert!(setting.poll().is_err());
    assert_eq!(setting.over(), [], "nothing is told before the queue pair has gone");
    assert_eq!(setting.kill(), Killed::Over);
    assert_eq!(setting.over(), [(1, false)]);
}

#[test]
fn operations_are_told_when_the_device_is_finished_with_their_memory() {
    let mut setting = setting();
    let target = setting.region(1 << 20, true, true);
    setting.fake.state().holds_reaching = true;
    let bytes = pattern(1 << 20);
    setting.put(1, &bytes, &target, 0);
    setting.settle();
    setting.fake.state().destroying = libc::EBUSY;
    assert_eq!(setting.kill(), Killed::Lingers);
    assert_eq!(setting.over(), [], "told while the device may use its memory");
    assert_eq!(setting.rights(&bytes), [0], "unregistered while the device may use it");
    setting.fake.state().destroying = 0;
    assert_eq!(setting.kill(), Killed::Over);
    assert_eq!(setting.over(), [(1, false)]);
    let ready = setting.link.poll_unreachable(&mut Context::from_waker(Waker::noop()));
    assert!(ready.is_ready(), "the queue pair by which the peer came is gone");
    assert_eq!(setting.rights(&bytes), [0; 0]);
    assert_eq!(setting.rights(&target.memory), [LOCAL | READ | WRITE]);
    drop(target.registration);
    assert_eq!(setting.rights(&target.memory), [0; 0]);
    assert!(setting.link.put(op(2), segment(&bytes), target.remote, 0).is_err());
}

#[test]
fn a_region_is_withdrawn_or_it_is_said_that_it_is_not() {
    let mut setting = setting();
    let target = setting.region(100, true, true);
    let registration = target.registration.expect("registered");
    setting.fake.state().deregistering = libc::EIO;
    assert!(!registration.withdraw(), "the peer may still write it");
    setting.fake.state().deregistering = 0;
    assert!(registration.withdraw());
    assert_eq!(setting.rights(&target.memory), [0; 0]);
    assert!(registration.withdraw(), "once is enough");
    let target = setting.region(100, true, true);
    let registration = target.registration.expect("registered");
    setting.fake.state().deregistering = libc::EIO;
    setting.fake.device.set_gone();
    assert!(registration.withdraw(), "a device that is gone writes nothing");
}

#[test]
fn many_registrations_that_will_not_end_hold_nobody_up() {
    let mut setting = setting();
    let targets: Vec<_> = (0..100).map(|_| setting.region(100, true, true)).collect();
    let withdraw = |target: &Target| target.registration.as_ref().expect("made").withdraw();
    setting.fake.state().deregistering = libc::EBUSY;
    let tries = |setting: &Setting| std::mem::take(&mut setting.fake.state().deregistrations);
    assert!(!withdraw(&targets[0]));
    assert!(tries(&setting) > 1, "it may end in a moment");
    for target in &targets[1..] {
        assert!(!withdraw(target));
        assert_eq!(tries(&setting), 1, "waited for again");
    }
    setting.fake.state().deregistering = 0;
    assert!(withdraw(&targets[1]));
    tries(&setting);
    setting.fake.state().deregistering = libc::EBUSY;
    assert!(!withdraw(&targets[2]));
    assert!(tries(&setting) > 1, "one has ended since");
    setting.fake.state().deregistering = 0;
}

#[test]
fn regions_are_limited_by_their_bytes() {
    let setting = setting();
    let rooms: Vec<_> = (0..4).map(|_| setting.registrations.region_room(1 << 30)).collect();
    assert!(rooms.iter().all(Option::is_some));
    assert!(setting.registrations.region_room(1).is_none());
    drop(rooms);
    assert!(setting.registrations.region_room((1 << 30) + 1).is_none(), "too long by itself");
    assert!(setting.registrations.region_room(1 << 30).is_some());
}

#[test]
fn device_memory_is_refused_before_anything_is_posted() {
    let mut setting = setting();
    let target = setting.region(100, true, true);
    let bytes = [1; 10];
    let device = Segment { kind: MemoryKind::Device, ..segment(&bytes) };
    let error = setting.link.put(op(1), device, target.remote, 0).expect_err("no way to read it");
    assert_eq!(error.kind, ErrorKind::Unsupported);
    let mut memory = vec![0; 10];
    let device = SegmentMut { kind: MemoryKind::Device, ..place(&mut memory)[0] };
    assert!(setting.link.register(device, true, true).is_err());
    assert_eq!(setting.fake.state().requests, 0);
    assert_eq!(setting.post(b"the link works").expect("posted"), Post::Done);
}

#[test]
fn a_sleeper_is_armed_for_the_end_of_its_requests() {
    let mut setting = setting();
    let target = setting.region(100, true, true);
    setting.fake.state().holds_reaching = true;
    assert_eq!(setting.arm(), Armed::Yes);
    setting.fake.state().notified.clear();
    setting.put(1, b"x", &target, 0);
    assert_eq!(setting.arm(), Armed::Yes);
    let sends = setting.fake.state().queue(1);
    assert!(setting.fake.state().notified.contains(&sends), "nobody would be woken");
    setting.fake.end_reaching(ffi::IBV_WC_SUCCESS);
    assert_eq!(setting.arm(), Armed::Busy);
}

#[test]
fn memory_is_registered_one_slice_a_turn() {
    let mut setting = setting();
    let target = setting.region(1 << 20, true, true);
    let before = setting.fake.state().registrations;
    let parts = [(); 3].map(|()| pattern(64 << 10));
    for (index, part) in parts.iter().enumerate() {
        setting.put(index as u32, part, &target, 0);
    }
    assert_eq!(setting.fake.state().registrations - before, 1);
    assert_eq!(setting.arm(), Armed::Busy, "the others wait for their turns");
    setting.poll().expect("alive");
    assert_eq!(setting.fake.state().registrations - before, 2);
    setting.settle();
    assert_eq!(setting.over().len(), 3);
}
