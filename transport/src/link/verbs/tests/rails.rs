//! Long payloads over several rails: further devices, or further ports of one.

use super::super::blob::Terms;
use super::super::bulk::STRIPE_BYTES_MIN;
use super::super::device::{Event, LocalPort};
use super::super::setup::{Candidate, Setup};
use super::*;
use crate::runtime::Source;

/// The set of the second rail.
const SECOND: u8 = 2;

/// A link over several rails, of which the first one is the setting's.
struct Railed {
    setting: Setting,
    others: Vec<Fake>,
}

fn source(reactor: &Reactor, queues: &super::super::queues::Queues) -> Source {
    let fd = queues.descriptor().try_clone_to_owned().expect("a number");
    reactor.source(Fd::new(fd), Interest::Read).expect("a source")
}

/// Further rails at these ports, to ports of the peer's with these rates. `alarms` hears of their devices, numbered from 1.
fn rails_at(
    reactor: &Reactor,
    alarms: &Alarms,
    ports: &[(&Fake, LocalPort, u16, Arc<Registrations>)],
) -> Vec<Rail> {
    let rail = |(which, (fake, port, to, registrations)): (usize, &(&Fake, LocalPort, _, _))| {
        let queues = fake.rail_queues(port, *to);
        let (channel, identities) = (source(reactor, &queues), queues.identities());
        let registrations: &Arc<Registrations> = registrations;
        let alarm = alarms.add(which + 1, identities, Some(port.number));
        Rail::new(queues, channel, registrations.clone(), alarm)
    };
    ports.iter().enumerate().map(rail).collect()
}

/// A device for each rail, with these rates.
fn over_with(alarms: &Alarms, rates: &[u16]) -> Railed {
    let alike: Vec<_> = rates.iter().map(|rate| (*rate, *rate)).collect();
    over_to(alarms, &alike)
}

/// The same, with the rates of this side's ports and of the peer's.
fn over_to(alarms: &Alarms, rates: &[(u16, u16)]) -> Railed {
    let named = |(at, (rate, _)): (usize, &(u16, u16))| {
        let mut fake = Fake::named(&format!("fake{at}"));
        fake.rate = *rate;
        fake.state().reads_by = Some(OFFERED_BY[at]);
        fake
    };
    let mut others: Vec<Fake> = rates.iter().enumerate().map(named).collect();
    let fake = others.remove(0);
    let registrations = Registrations::new(fake.pool.domain());
    let ports: Vec<_> = others
        .iter()
        .zip(&rates[1..])
        .map(|(fake, (_, to))| (fake, fake.port(), *to, Registrations::new(fake.pool.domain())))
        .collect();
    let made = link_with_rails(fake.messenger(), &registrations, |reactor| {
        rails_at(reactor, alarms, &ports)
    });
    drop(ports);
    Railed { setting: setting_of(fake, registrations, made), others }
}

fn over(rates: &[u16]) -> Railed {
    over_with(&Alarms::default(), rates)
}

/// How many bytes are registered with a device whose slab no link has taken.
fn registered(fake: &Fake) -> usize {
    fake.state().registered.iter().map(|(_, _, len, _)| len).sum()
}

impl Railed {
    fn fakes(&self) -> impl Iterator<Item = &Fake> {
        std::iter::once(&self.setting.fake).chain(&self.others)
    }

    fn hold(&self) {
        self.fakes().for_each(|fake| fake.state().holds_reads = true);
    }

    /// Bytes that are being read, by rail.
    fn reading(&self) -> Vec<usize> {
        let bytes = |fake: &Fake| fake.state().reads.iter().map(|read| read.bytes).sum();
        self.fakes().map(bytes).collect()
    }
}

#[test]
fn a_long_payload_is_there_when_every_rail_has_read_its_part() {
    for last in [0, 1] {
        let mut rails = over(&[1000; 2]);
        rails.hold();
        let bytes = pattern(STRIPE_BYTES_MIN + 300_000);
        let mut to = vec![0; bytes.len()];
        rails.setting.driver.landings.push_back(place(&mut to));
        rails.setting.offer_by(SECOND, 1, &bytes);
        rails.setting.settle();
        assert_eq!(rails.reading().iter().sum::<usize>(), bytes.len());
        assert!(rails.reading().iter().all(|bytes| *bytes >= 512 << 10), "{:?}", rails.reading());
        // One after the other ends, and the last one's own reads in their order.
        let fakes: Vec<&Fake> = rails.fakes().collect();
        let order = [fakes[1 - last], fakes[last]].map(|fake| fake.state().reads.len());
        for (rail, reads) in [1 - last, last].into_iter().zip(order) {
            for _ in 0..reads {
                assert!(rails.setting.driver.done.is_empty(), "a part of it is still to come");
                let fake = if rail == 0 { &rails.setting.fake } else { &rails.others[0] };
                fake.end_read(ffi::IBV_WC_SUCCESS);
                rails.setting.settle();
            }
        }
        let (op, result) = rails.setting.driver.done.pop().expect("all is there");
        assert!(op == OP && result.is_ok() && rails.setting.driver.done.is_empty());
        assert!(to == bytes, "wrong bytes");
        assert_eq!((rails.setting.registered(), registered(&rails.others[0])), (0, 0));
        let counters = rails.setting.link.counters();
        let by_rail = counters.rail_bytes_received;
        assert_eq!(by_rail.iter().sum::<u64>(), bytes.len() as u64);
        assert!(by_rail[0] > 0 && by_rail[1] > 0 && by_rail[2..] == [0; 2]);
        assert_eq!(counters.rdma_bytes_received, bytes.len() as u64);
        let (header, _) = rails.setting.fake.end_send(ffi::IBV_WC_SUCCESS);
        assert_eq!(header.kind, Kind::Release, "the peer may have its memory back");
    }
}

#[test]
fn a_rail_that_stalls_keeps_no_more_registered_than_it_is_at() {
    let mut rails = over(&[1000; 2]);
    rails.others[0].state().holds_reads = true;
    let bytes = pattern(6 * SLICE_BYTES);
    let mut to = vec![0; bytes.len()];
    rails.setting.driver.landings.push_back(place(&mut to));
    rails.setting.offer_by(SECOND, 1, &bytes);
    let mut most = 0;
    while rails.setting.poll().expect("alive") != Progress::Idle {
        most = most.max(registered(&rails.others[0]));
    }
    assert!(most <= 4 * SLICE_BYTES, "what is filled stays registered: {most}");
    assert!(rails.setting.driver.done.is_empty());
    while !rails.others[0].state().reads.is_empty() {
        rails.others[0].end_read(ffi::IBV_WC_SUCCESS);
    }
    rails.setting.settle();
    assert!(rails.setting.driver.done.len() == 1 && to == bytes);
    assert_eq!((rails.setting.registered(), registered(&rails.others[0])), (0, 0));
}

#[test]
fn rails_read_in_proportion_to_their_rates() {
    let mut rails = over(&[1000, 2000, 1000]);
    rails.hold();
    let bytes = pattern(4 << 20);
    let mut to = vec![0; bytes.len()];
    rails.setting.driver.landings.push_back(place(&mut to));
    rails.setting.offer_by(SECOND | 4, 1, &bytes);
    rails.setting.settle();
    assert_eq!(rails.reading(), [1 << 20, 2 << 20, 1 << 20]);
    // One that is quicker than it says reads more.
    rails.others[1].state().holds_reads = false;
    while !rails.others[1].state().reads.is_empty() {
        rails.others[1].end_read(ffi::IBV_WC_SUCCESS);
    }
    let more = pattern(4 << 20);
    let mut there = vec![0; more.len()];
    rails.setting.driver.landings.push_back(place(&mut there));
    rails.setting.offer_by(SECOND | 4, 2, &more);
    rails.setting.settle();
    let by_rail = rails.setting.link.counters().rail_bytes_received;
    assert!(by_rail[2] > by_rail[0] + (512 << 10), "{by_rail:?}");
    for fake in rails.fakes() {
        while !fake.state().reads.is_empty() {
            fake.end_read(ffi::IBV_WC_SUCCESS);
        }
    }
    rails.setting.settle();
    assert!(rails.setting.driver.done.len() == 2 && to == bytes && there == more);
}

#[test]
fn what_is_not_offered_for_further_rails_goes_by_the_first() {
    let mut rails = over(&[1000; 2]);
    let bytes = pattern(3 << 20);
    let mut to = vec![0; bytes.len()];
    rails.setting.driver.landings.push_back(place(&mut to));
    rails.setting.offer(1, &bytes);
    rails.setting.settle();
    assert!(rails.setting.driver.done.len() == 1 && to == bytes);
    assert_eq!(rails.setting.link.counters().rail_bytes_received, [3 << 20, 0, 0, 0]);
    assert_eq!(rails.others[0].state().registrations, 0);
}

#[test]
fn a_further_device_that_registers_nothing_does_not_help() {
    let mut rails = over(&[1000; 2]);
    rails.others[0].state().registers_max = Some(1);
    let bytes = pattern(3 << 20);
    let mut to = vec![0; bytes.len()];
    rails.setting.driver.landings.push_back(place(&mut to));
    rails.setting.offer_by(SECOND, 1, &bytes);
    rails.setting.settle();
    assert!(rails.setting.driver.done.len() == 1 && to == bytes);
    let counters = rails.setting.link.counters();
    assert_eq!(counters.rail_bytes_received, [3 << 20, 0, 0, 0]);
    assert_eq!((counters.registrations, counters.registrations_refused), (1, 1));
    // Nor is what this side sends offered for it.
    assert_eq!(rails.setting.post(&bytes).expect("posted"), Post::Pending);
    let sent = rails.setting.fake.state().sent.len();
    let (_, message) = rails.setting.fake.state().sent[sent - 1].clone();
    let header = Header::decode(&message).expect("a header");
    assert_eq!((header.kind, header.pieces, header.rails), (Kind::Bulk, 1, 0));
}

#[test]
fn chunks_come_when_every_rail_has_ended_its_reads() {
    let mut rails = over(&[1000; 2]);
    rails.hold();
    let bytes = pattern(SLICE_BYTES + (1 << 20));
    let mut to = vec![0; bytes.len()];
    rails.setting.driver.landings.push_back(place(&mut to));
    rails.setting.offer_by(SECOND, 1, &bytes);
    rails.setting.poll().expect("alive");
    // The next slice is refused.
    rails.setting.fake.state().registers_max = Some(1);
    rails.others[0].state().registers_max = Some(1);
    while !rails.setting.fake.state().reads.is_empty() {
        rails.setting.fake.end_read(ffi::IBV_WC_SUCCESS);
        rails.setting.settle();
    }
    while !rails.others[0].state().reads.is_empty() {
        assert!(rails.setting.fake.state().sent.is_empty(), "what is read into is written twice");
        rails.others[0].end_read(ffi::IBV_WC_SUCCESS);
        rails.setting.settle();
        while !rails.setting.fake.state().reads.is_empty() {
            rails.setting.fake.end_read(ffi::IBV_WC_SUCCESS);
            rails.setting.settle();
        }
    }
    let (header, _) = rails.setting.fake.end_send(ffi::IBV_WC_SUCCESS);
    assert_eq!(header.kind, Kind::Pull);
    assert!(rails.setting.driver.done.is_empty());
    assert_eq!((rails.setting.registered(), registered(&rails.others[0])), (0, 0));
}

/// A payload that both rails of two are reading, of several slices.
fn being_read(rails: &mut Railed, to: &mut [u8], bytes: &[u8]) {
    rails.hold();
    rails.setting.driver.landings.push_back(place(to));
    rails.setting.offer_by(SECOND, 1, bytes);
    rails.setting.settle();
    assert!(rails.reading().iter().all(|bytes| *bytes > 0), "{:?}", rails.reading());
}

/// Everything that is read ends well, until nothing is.
fn all_end_well(rails: &mut Railed) {
    while rails.reading() != vec![0; 1 + rails.others.len()] {
        for fake in rails.fakes() {
            if !fake.state().reads.is_empty() {
                fake.end_read(ffi::IBV_WC_SUCCESS);
            }
        }
        rails.setting.settle();
    }
}

/// The next payloads, both ways, do without the second rail.
fn goes_on_without(rails: &mut Railed) {
    rails.fakes().for_each(|fake| fake.state().holds_reads = false);
    let bytes = pattern(STRIPE_BYTES_MIN);
    let mut to = vec![0; bytes.len()];
    rails.setting.driver.landings.push_back(place(&mut to));
    let before = rails.setting.link.counters().rail_bytes_received;
    // The peer may not know yet.
    rails.setting.offer_by(SECOND, 9, &bytes);
    rails.setting.settle();
    assert!(rails.setting.driver.done.pop().is_some() && to == bytes);
    let after = rails.setting.link.counters().rail_bytes_received;
    assert_eq!(after[0] - before[0], bytes.len() as u64);
    assert_eq!(after[1], before[1]);
    assert_eq!(rails.setting.post(&bytes).expect("posted"), Post::Pending);
    let sent = rails.setting.fake.state().sent.pop_back().expect("sent");
    assert_eq!(Header::decode(&sent.1).expect("a header").rails, 0);
    assert_eq!(registered(&rails.others[0]), 0);
}

#[test]
fn what_a_rail_was_at_that_fails_is_read_again_by_the_first() {
    // It fails when it has read so many of its parts.
    for done in [0, 1, 5] {
        let mut rails = over(&[1000; 2]);
        let bytes = pattern(SLICE_BYTES + (1 << 20));
        let mut to = vec![0; bytes.len()];
        being_read(&mut rails, &mut to, &bytes);
        // The first one has read its own, and waits for nothing.
        while !rails.setting.fake.state().reads.is_empty() {
            rails.setting.fake.end_read(ffi::IBV_WC_SUCCESS);
        }
        for _ in 0..done {
            rails.others[0].end_read(ffi::IBV_WC_SUCCESS);
        }
        rails.others[0].end_read(ffi::IBV_WC_RETRY_EXC_ERR);
        // The others are flushed. Some of that is seen after the rail was given up, or never.
        for _ in 0..3 {
            rails.others[0].end_read(ffi::IBV_WC_WR_FLUSH_ERR);
        }
        rails.setting.eager();
        rails.setting.settle();
        assert_eq!(rails.setting.driver.parcels, 2);
        assert_eq!(rails.reading()[1], 0, "it is at something though it is given up");
        assert!(rails.reading()[0] > 0, "nobody reads what is left");
        assert!(rails.setting.driver.done.is_empty(), "told of a payload that is not whole");
        let slices: Vec<usize> = vec![SLICE_BYTES, 1 << 20];
        assert!(slices.contains(&rails.setting.registered()) || rails.setting.registered() > 0);
        all_end_well(&mut rails);
        let (op, result) = rails.setting.driver.done.pop().expect("all is there");
        assert!(op == OP && result.is_ok() && rails.setting.driver.done.is_empty());
        assert!(to == bytes, "wrong bytes after {done} reads");
        assert_eq!((rails.setting.registered(), registered(&rails.others[0])), (0, 0));
        let by_rail = rails.setting.link.counters().rail_bytes_received;
        assert_eq!(by_rail.iter().sum::<u64>(), bytes.len() as u64, "counted twice");
        let (header, _) = rails.setting.fake.end_send(ffi::IBV_WC_SUCCESS);
        assert_eq!(header.kind, Kind::Release);
        goes_on_without(&mut rails);
        assert_eq!(rails.setting.kill(), Killed::Over);
    }
}

#[test]
fn what_is_read_again_waits_for_room_at_the_first() {
    let mut rails = over(&[1000; 2]);
    let bytes = pattern(12 << 20);
    let mut to = vec![0; bytes.len()];
    being_read(&mut rails, &mut to, &bytes);
    let full = rails.setting.fake.state().reads.len();
    assert_eq!((full, rails.others[0].state().reads.len()), (16, 16));
    rails.others[0].end_read(ffi::IBV_WC_RETRY_EXC_ERR);
    rails.setting.settle();
    assert_eq!(rails.setting.fake.state().reads.len(), full);
    assert!(rails.others[0].state().reads.is_empty());
    all_end_well(&mut rails);
    assert!(rails.setting.driver.done.len() == 1 && to == bytes);
    assert_eq!((rails.setting.registered(), registered(&rails.others[0])), (0, 0));
}

#[test]
fn a_rail_that_takes_no_reads_is_given_up() {
    let mut rails = over(&[1000; 2]);
    rails.others[0].state().posting = libc::EINVAL;
    let bytes = pattern(3 << 20);
    let mut to = vec![0; bytes.len()];
    rails.setting.driver.landings.push_back(place(&mut to));
    rails.setting.offer_by(SECOND, 1, &bytes);
    rails.setting.settle();
    assert!(rails.setting.driver.done.pop().is_some() && to == bytes);
    assert_eq!(rails.setting.link.counters().rail_bytes_received.iter().sum::<u64>(), 3 << 20);
    rails.setting.fake.end_send(ffi::IBV_WC_SUCCESS);
    rails.others[0].state().posting = 0;
    goes_on_without(&mut rails);
}

/// After it has read well, and while the first one goes on.
#[test]
fn a_rail_that_never_ends_its_reads_is_given_up() {
    for asleep in [true, false] {
        let mut rails = over(&[1000; 2]);
        rails.setting.looks_often();
        let (bytes, short) = (pattern(STRIPE_BYTES_MIN), pattern(64 << 10));
        let (mut to, mut besides) = (vec![0; bytes.len()], vec![0; short.len()]);
        rails.setting.driver.landings.push_back(place(&mut to));
        rails.setting.offer_by(SECOND, 1, &bytes);
        rails.setting.settle();
        assert!(rails.setting.link.counters().rail_bytes_received[1] > 0);
        to.fill(0);
        rails.setting.driver.done.clear();
        rails.others[0].state().holds_reads = true;
        let began = Instant::now();
        rails.setting.driver.landings.push_back(place(&mut to));
        rails.setting.offer_by(SECOND, 2, &bytes);
        rails.setting.settle();
        let (mut more, mut last) = (0, Instant::now());
        let ends = |setting: &mut Setting| {
            setting.end_sends();
            if setting.driver.done.len() > more {
                return true;
            }
            if last.elapsed() > Duration::from_millis(10) {
                (more, last) = (more + 1, Instant::now());
                setting.driver.landings.push_back(place(&mut besides));
                setting.offer(2 + more as u32, &short);
                setting.woken.0.fetch_add(1, Ordering::SeqCst);
            }
            false
        };
        let ended =
            if asleep { rails.setting.asleep_until(ends) } else { rails.setting.busy_until(ends) };
        assert!(ended.is_none(), "the link goes on: {ended:?}");
        assert!(began.elapsed() >= rails.setting.link.watchdog().silence_max());
        assert!(to == bytes, "wrong bytes");
        assert!(more > 2, "the first one read nothing meanwhile");
        assert!(rails.setting.driver.done.drain(..).all(|(_, result)| result.is_ok()));
        rails.setting.settle();
        goes_on_without(&mut rails);
    }
}

#[test]
fn a_rail_whose_queue_pair_will_not_go_ends_the_link_and_is_named() {
    let mut rails = over(&[1000; 2]);
    let bytes = pattern(2 << 20);
    let mut to = vec![0; bytes.len()];
    being_read(&mut rails, &mut to, &bytes);
    rails.others[0].state().destroying = libc::EBUSY;
    rails.others[0].end_read(ffi::IBV_WC_RETRY_EXC_ERR);
    rails.setting.eager();
    let error = loop {
        if let Err(error) = rails.setting.poll() {
            break error;
        }
    };
    assert_eq!(error.kind, ErrorKind::ConnectionLost);
    for part in ["fake1:1", &format!("vendor error {VENDOR}"), "status 12"] {
        assert!(error.detail.contains(part), "{:?} does not say {part:?}", error.detail);
    }
    assert_eq!(rails.setting.driver.parcels, 2, "what the peer sent before is handed up");
    assert!(rails.setting.driver.done.is_empty(), "told while a device may write it");
    assert_eq!(rails.setting.kill(), Killed::Lingers);
    assert!(rails.setting.driver.done.is_empty(), "told while a device may write it");
    rails.others[0].state().destroying = 0;
    assert_eq!(rails.setting.kill(), Killed::Over);
    let (op, result) = rails.setting.driver.done.pop().expect("its end");
    assert!(op == OP && result.is_err() && rails.setting.driver.done.is_empty());
}

#[test]
fn a_failure_that_nobody_polls_for_is_found() {
    let mut rails = over(&[1000; 2]);
    let bytes = pattern(2 << 20);
    let mut to = vec![0; bytes.len()];
    being_read(&mut rails, &mut to, &bytes);
    assert_eq!(rails.setting.link.check().expect("alive"), Check::Quiet);
    rails.others[0].end_read(ffi::IBV_WC_LOC_QP_OP_ERR);
    assert_eq!(rails.setting.link.check().expect("a poll sees to it"), Check::Drive);
    rails.setting.settle();
    assert_eq!(rails.setting.link.check().expect("alive"), Check::Quiet);
    all_end_well(&mut rails);
    assert!(rails.setting.driver.done.len() == 1 && to == bytes);
}

#[test]
fn nothing_is_told_before_the_queue_pairs_of_every_rail_are_gone() {
    for stays in [0, 1] {
        let mut rails = over(&[1000; 2]);
        rails.hold();
        let bytes = pattern(2 << 20);
        let mut to = vec![0; bytes.len()];
        rails.setting.driver.landings.push_back(place(&mut to));
        rails.setting.offer_by(SECOND, 1, &bytes);
        rails.setting.settle();
        assert!(rails.reading().iter().all(|bytes| *bytes > 0));
        let all: Vec<_> = rails.fakes().map(registered).collect();
        let staying = rails.fakes().nth(stays).expect("there are two");
        staying.state().destroying = libc::EBUSY;
        for _ in 0..2 {
            assert_eq!(rails.setting.kill(), Killed::Lingers);
            assert!(rails.setting.driver.done.is_empty(), "told while a device may write it");
            assert_eq!(rails.fakes().map(registered).collect::<Vec<_>>(), all, "let go of");
        }
        rails.fakes().for_each(|fake| fake.state().destroying = 0);
        assert_eq!(rails.setting.kill(), Killed::Over);
        let (op, result) = rails.setting.driver.done.pop().expect("its end");
        assert!(op == OP && result.is_err() && rails.setting.driver.done.is_empty());
        assert_eq!(registered(&rails.others[0]), 0);
    }
}

#[test]
fn a_further_port_that_is_down_or_a_device_that_is_gone_is_done_without() {
    let cases = [
        (Event::PortDown { port: 1, why: "fake1 is down".to_owned() }, true),
        (Event::PortDown { port: 2, why: "another port is down".to_owned() }, false),
        (Event::DeviceGone { why: "fake1 is gone".to_owned() }, true),
    ];
    for (event, concerns) in cases {
        let alarms = Alarms::default();
        let mut rails = over_with(&alarms, &[1000; 2]);
        let bytes = pattern(2 << 20);
        let mut to = vec![0; bytes.len()];
        being_read(&mut rails, &mut to, &bytes);
        assert_eq!(rails.setting.arm(), Armed::Yes);
        let wakers = alarms.hear(1, &event);
        assert_eq!(wakers.len(), usize::from(concerns), "{event:?}");
        assert_eq!(rails.setting.arm(), if concerns { Armed::Busy } else { Armed::Yes });
        if let Event::DeviceGone { .. } = event {
            // Its queue pairs go with it. (The fake's reads do not.)
            rails.others[0].state().destroying = libc::ENODEV;
            rails.others[0].state().reads.clear();
        }
        rails.setting.settle();
        assert_eq!(rails.reading()[1] == 0, concerns, "{event:?}");
        assert_eq!(rails.setting.arm(), Armed::Yes);
        all_end_well(&mut rails);
        assert!(rails.setting.driver.done.pop().is_some() && to == bytes);
        if concerns {
            rails.setting.fake.end_send(ffi::IBV_WC_SUCCESS);
            goes_on_without(&mut rails);
        }
    }
}

#[test]
fn a_port_that_is_down_is_heard_of() {
    let fake = Fake::new();
    fake.say_of(ffi::IBV_EVENT_PORT_ERR, 2);
    let heard = fake.device.take_event().expect("an event");
    assert!(matches!(heard, Event::PortDown { port: 2, .. }), "{heard:?}");
    fake.say_of(ffi::IBV_EVENT_PORT_ACTIVE, 2);
    assert_eq!(fake.device.take_event().expect("an event"), Event::Other);
}

#[test]
fn nothing_is_registered_for_what_has_to_wait() {
    const WAITING: u32 = 20;
    let mut rails = over(&[1000; 2]);
    rails.hold();
    let bytes = pattern(64 << 10);
    let mut places: Vec<Vec<u8>> = (0..5 * WAITING).map(|_| vec![0; bytes.len()]).collect();
    for (id, to) in (0..).zip(&mut places) {
        rails.setting.driver.landings.push_back(place(to));
        rails.setting.offer(id, &bytes);
        if id % WAITING == WAITING - 1 {
            rails.setting.settle();
            // Their messages have buffers again.
            while !rails.setting.fake.state().sent.is_empty() {
                rails.setting.fake.end_send(ffi::IBV_WC_SUCCESS);
            }
        }
    }
    let reading = rails.setting.fake.state().reads.len();
    assert_eq!(reading, 16);
    let counters = rails.setting.link.counters();
    assert_eq!((counters.registrations, counters.registrations_refused), (16, 0));
    assert_eq!(rails.setting.registered(), reading * bytes.len());
    // One that the other rail may read is let by, as soon as it is registered.
    all_end_well(&mut rails);
    assert_eq!(rails.setting.driver.done.len(), places.len());
    assert!(places.iter().all(|to| *to == bytes));
    assert_eq!(rails.setting.registered(), 0);
}

#[test]
fn what_further_rails_may_read_does_not_wait_for_the_first() {
    let mut rails = over(&[1000; 2]);
    rails.setting.fake.state().holds_reads = true;
    let long = pattern(STRIPE_BYTES_MIN * 4);
    let mut to = vec![0; long.len()];
    rails.setting.driver.landings.push_back(place(&mut to));
    rails.setting.offer_by(SECOND, 1, &long);
    rails.setting.poll().expect("alive");
    // Others fill the first one, and there are more of them.
    let bytes = pattern(64 << 10);
    let mut places: Vec<Vec<u8>> = (0..20).map(|_| vec![0; bytes.len()]).collect();
    for (id, to) in (2..).zip(&mut places) {
        rails.setting.driver.landings.push_back(place(to));
        rails.setting.offer(id, &bytes);
    }
    rails.setting.settle();
    let read = rails.setting.link.counters().rail_bytes_received[1];
    assert!(read >= long.len() as u64 / 2, "the second one is idle: {read}");
    all_end_well(&mut rails);
    assert!(rails.setting.driver.done.len() == 21 && to == long);
    assert!(places.iter().all(|to| *to == bytes));
}

#[test]
fn the_slower_end_of_a_rail_counts() {
    let mut rails = over_to(&Alarms::default(), &[(1000, 1000), (4000, 1000)]);
    rails.hold();
    let bytes = pattern(2 << 20);
    let mut to = vec![0; bytes.len()];
    rails.setting.driver.landings.push_back(place(&mut to));
    rails.setting.offer_by(SECOND, 1, &bytes);
    rails.setting.settle();
    assert_eq!(rails.reading(), [1 << 20, 1 << 20]);
    // Where one is not known, none is.
    let mut rails = over_to(&Alarms::default(), &[(1000, 1000), (1000, 0)]);
    rails.hold();
    rails.setting.driver.landings.push_back(place(&mut to));
    rails.setting.offer_by(SECOND, 1, &bytes);
    rails.setting.settle();
    assert_eq!(rails.reading(), [1 << 20, 1 << 20]);
}

#[test]
fn memory_that_may_be_locked_is_left_to_the_first_device() {
    let mut rails = over(&[1000; 2]);
    let pool = HostPool::new(64 << 20);
    let mut kept = pool.allocate(2 << 20).expect("memory");
    let bytes = pattern(2 << 20);
    // For this one there is enough.
    rails.setting.driver.landings.push_back(place(&mut kept));
    rails.setting.offer_by(SECOND, 1, &bytes);
    rails.setting.settle();
    assert!(rails.setting.driver.done.pop().is_some() && kept[..] == bytes[..]);
    assert!(registered(&rails.others[0]) > 0, "it stays registered");
    // What is left is not enough for the next one, unless the other device lets go of its.
    let lockable = Arc::new(std::sync::Mutex::new(1 << 20));
    rails.fakes().for_each(|fake| fake.state().lockable = Some(lockable.clone()));
    let mut to = vec![0; bytes.len()];
    rails.setting.driver.landings.push_back(place(&mut to));
    rails.setting.offer_by(SECOND, 2, &bytes);
    rails.setting.settle();
    assert!(rails.setting.driver.done.pop().is_some() && to == bytes);
    assert_eq!(registered(&rails.others[0]), 0);
    let counters = rails.setting.link.counters();
    assert_eq!(counters.inline_bytes_received, 0, "chunks, because another device has the memory");
    assert_eq!(counters.rail_bytes_received, [3 << 20, 1 << 20, 0, 0]);
    // Nor is what this side sends.
    let made = rails.others[0].state().registrations;
    let sent = |rails: &mut Railed| {
        assert_eq!(rails.setting.post(&bytes).expect("posted"), Post::Pending);
        let (_, message) = rails.setting.fake.state().sent.pop_back().expect("sent");
        Header::decode(&message).expect("a header")
    };
    let header = sent(&mut rails);
    assert_eq!((header.pieces, header.rails), (1, 0));
    assert_eq!(rails.others[0].state().registrations, made);
    // Where there is none at all, it goes in chunks, and nobody is told of an error.
    let header = sent(&mut rails);
    assert_eq!((header.pieces, header.rails), (0, 0));
}

#[test]
fn a_sleeping_link_hears_of_every_rail() {
    let mut rails = over(&[1000; 2]);
    rails.hold();
    let bytes = pattern(2 << 20);
    let mut to = vec![0; bytes.len()];
    rails.setting.driver.landings.push_back(place(&mut to));
    assert_eq!(rails.setting.arm(), Armed::Yes);
    assert!(rails.others[0].state().notified.is_empty(), "there is nothing to hear");
    rails.setting.offer_by(SECOND, 1, &bytes);
    rails.setting.settle();
    assert_eq!(rails.setting.arm(), Armed::Yes);
    let posted = rails.others[0].state().queue(1);
    assert_eq!(rails.others[0].state().notified, [posted]);
    rails.others[0].end_read(ffi::IBV_WC_SUCCESS);
    assert_eq!(rails.setting.arm(), Armed::Busy, "something has ended");
}

#[test]
fn what_is_sent_is_offered_to_all_rails_from_a_length_on() {
    let mut rails = over(&[1000; 2]);
    for (len, by) in [(STRIPE_BYTES_MIN - 1, 0), (STRIPE_BYTES_MIN, SECOND)] {
        let bytes = pattern(len);
        assert_eq!(rails.setting.post(&bytes).expect("posted"), Post::Pending);
        let (header, body) = rails.setting.fake.end_send(ffi::IBV_WC_SUCCESS);
        assert_eq!((header.pieces, header.rails), (1, by));
        let pieces = Piece::decode_all(&body[4..], 1, by, len as u64).expect("a list");
        let of = |fake: &Fake, key: u32| {
            let read = ffi::IBV_ACCESS_REMOTE_READ as i32;
            let here = (bytes.as_ptr() as usize, len, read);
            let is_it = |&(known, at, len, access): &(u32, usize, usize, i32)| {
                super::super::fake::remote_key(known) == key && (at, len, access) == here
            };
            fake.state().registered.iter().any(is_it)
        };
        assert!(of(&rails.setting.fake, pieces[0].keys[0]));
        assert_eq!(of(&rails.others[0], pieces[0].keys[1]), by != 0);
        let release = Header::about(Kind::Release, header.id, 0);
        rails.setting.fake.deliver(release, &[]);
        rails.setting.settle();
        assert_eq!((rails.setting.registered(), registered(&rails.others[0])), (0, 0));
    }
}

#[test]
fn memory_of_one_use_is_not_registered_for_fast_rails() {
    let mut rails = over(&[4000; 2]);
    let pool = HostPool::new(1 << 20);
    let mut kept = pool.allocate(2 << 20).expect("memory");
    let (bytes, mut single) = (pattern(2 << 20), vec![0; 2 << 20]);
    for (id, to, is_kept) in [(1, &mut single[..], false), (2, &mut kept[..], true)] {
        rails.setting.driver.landings.push_back(place(to));
        rails.setting.offer_by(SECOND, id, &bytes);
        rails.setting.settle();
        assert!(rails.setting.driver.done.pop().is_some() && to == bytes);
        let by_second = rails.setting.link.counters().rail_bytes_received[1];
        assert_eq!(by_second > 0, is_kept);
        rails.setting.fake.end_send(ffi::IBV_WC_SUCCESS);
    }
    for (memory, by) in [(&single[..], 0), (&kept[..], SECOND)] {
        assert_eq!(rails.setting.post(memory).expect("posted"), Post::Pending);
        let (header, _) = rails.setting.fake.end_send(ffi::IBV_WC_SUCCESS);
        assert_eq!(header.rails, by);
    }
}

#[test]
fn ports_of_one_device_share_registrations() {
    let fake = Fake::new();
    let registrations = Registrations::new(fake.pool.domain());
    let second = LocalPort { number: 2, ..fake.port() };
    let ports = [(&fake, second, 1000, registrations.clone())];
    let made = link_with_rails(fake.messenger(), &registrations, |reactor| {
        rails_at(reactor, &Alarms::default(), &ports)
    });
    drop(ports);
    let mut setting = setting_of(fake, registrations, made);
    let bytes = pattern(2 << 20);
    let mut to = vec![0; bytes.len()];
    setting.driver.landings.push_back(place(&mut to));
    setting.offer_by(SECOND, 1, &bytes);
    setting.settle();
    assert!(setting.driver.done.len() == 1 && to == bytes);
    let counters = setting.link.counters();
    assert_eq!((counters.registrations, counters.registrations_refused), (1, 0));
    assert_eq!(counters.rail_bytes_received, [1 << 20, 1 << 20, 0, 0]);
    setting.fake.end_send(ffi::IBV_WC_SUCCESS);
    assert_eq!(setting.post(&bytes).expect("posted"), Post::Pending);
    let (header, body) = setting.fake.end_send(ffi::IBV_WC_SUCCESS);
    let pieces = Piece::decode_all(&body[4..], 1, SECOND, bytes.len() as u64).expect("a list");
    assert_eq!((header.rails, pieces[0].keys[0]), (SECOND, pieces[0].keys[1]));
    assert_eq!(setting.link.counters().registrations, 2);
    assert!(setting.link.caps().ways.contains("also at fake0:2"), "{}", setting.link.caps().ways);
}

#[test]
fn offers_for_rails_that_were_not_agreed_are_refused() {
    let bytes = pattern(2 << 20);
    for (further, by, pieces) in [(0, SECOND, 1), (1, 4, 1), (1, SECOND | 8, 1), (1, SECOND, 0)] {
        let mut rails = over(&vec![1000; 1 + further]);
        let mut body = b"head".to_vec();
        let address = bytes.as_ptr() as u64;
        for _ in 0..pieces {
            let (len, keys) = (bytes.len() as u64, [9; RAILS_MAX]);
            Piece { address, len, keys }.append(by, &mut body);
        }
        let about = Header::about(Kind::Bulk, 1, bytes.len() as u64);
        let header = Header { head_len: 4, pieces, rails: by, ..about };
        rails.setting.fake.deliver(header, &body);
        let error = rails.setting.poll().expect_err("rails that are not there");
        assert_eq!(error.kind, ErrorKind::Protocol, "{error:?}");
        assert_eq!(rails.setting.driver.parcels, 0);
    }
    for kind in [Kind::Eager, Kind::Chunk, Kind::Pull, Kind::Release, Kind::Credit] {
        let mut rails = over(&[1000; 2]);
        let header = Header { rails: SECOND, ..Header::about(kind, 0, 0) };
        rails.setting.fake.deliver(header, &[]);
        let error = rails.setting.poll().expect_err("only memory is for rails");
        assert_eq!(error.kind, ErrorKind::Protocol, "{kind:?}: {error:?}");
    }
    let mut rails = over(&[1000; 2]);
    rails.setting.fake.deliver(Header::about(Kind::Rails, 0, 2), &[]);
    assert_eq!(rails.setting.poll().expect_err("too late").kind, ErrorKind::Protocol);
}

/// Setting a link up, with further rails to try.
struct Trying {
    fake: Fake,
    others: Vec<Fake>,
    setup: Setup,
    host: Arc<HostLoop>,
    timers: Arc<Timers>,
}

/// One for each of these: whether the peer names it, too.
fn trying(named: &[bool]) -> Trying {
    trying_within(named, Duration::from_secs(60), 1000)
}

/// The same, where set-up may take so long, and the peer tries for so long.
fn trying_within(named: &[bool], limit: Duration, trial_ms: u16) -> Trying {
    let fake = Fake::new();
    let host = HostLoop::new().expect("an event loop");
    let reactor = Reactor::Host(host.clone());
    let timers = Arc::new(Timers::new(&reactor).expect("timers"));
    let mut messenger = fake.messenger();
    let channel = source(&reactor, messenger.queues());
    let others: Vec<Fake> = (1..=named.len()).map(|at| Fake::named(&format!("fake{at}"))).collect();
    let mut terms = Terms { rails: Vec::new(), trial_ms, ..messenger.terms((0, 0)) };
    let mut candidates = Vec::new();
    // In an order of this side's own.
    for (at, (fake, is_named)) in others.iter().zip(named).enumerate().rev() {
        let port = fake.port();
        let queues = Rail::queues(fake.pool.domain(), &port).expect("queues");
        let (channel, identities) = (source(&reactor, &queues), queues.identities());
        let alarm = Alarms::default().add(at, identities, Some(port.number));
        let registrations = Registrations::new(fake.pool.domain());
        let rail = Rail::new(queues, channel, registrations, alarm);
        let rail = rail.with_samples(fake.pool.domain()).expect("memory");
        let (ports, to) = ((at as u8 + 1, at as u8 + 1), port.port);
        if *is_named {
            terms.rails.push(rail.terms(ports));
        }
        candidates.push(Candidate { rail, ports, to });
    }
    let mut setup = Setup::new(messenger, channel, candidates, &terms, timers.clone(), limit);
    setup.begin().expect("sent");
    Trying { fake, others, setup, host, timers }
}

impl Trying {
    fn poll(&mut self) -> std::task::Poll<Result<(), String>> {
        self.setup.poll(&mut Context::from_waker(Waker::noop()))
    }

    /// The first messages go through.
    fn greet(&mut self) {
        assert!(self.poll().is_pending());
        assert_eq!(self.fake.end_send(ffi::IBV_WC_SUCCESS).0.kind, Kind::Ping);
        assert!(self.poll().is_pending());
        for other in &self.others {
            assert!(other.state().reads.is_empty(), "tried before the peer is known to listen");
        }
        self.fake.deliver(Header::about(Kind::Ping, 0, 0), &[]);
    }

    /// Polls until this side has said something of its rails, because their answers are late.
    fn until_said(&mut self) {
        while self.fake.state().sent.is_empty() {
            self.host.drain().expect("events");
            let cx = &mut Context::from_waker(Waker::noop());
            self.timers.poll_expired(cx).expect("timers");
            assert!(self.poll().is_pending());
        }
    }

    /// What this side says of its rails.
    fn said(&self) -> u64 {
        let (header, _) = self.fake.end_send(ffi::IBV_WC_SUCCESS);
        assert_eq!(header.kind, Kind::Rails);
        header.len
    }

    fn hear(&mut self, rails: u64) -> std::task::Poll<Result<(), String>> {
        self.fake.deliver(Header::about(Kind::Rails, 0, rails), &[]);
        self.poll()
    }

    fn ports(self) -> Vec<String> {
        let (_, _, rails, _) = self.setup.into_parts();
        rails.iter().map(|rail| rail.port().device.name.clone()).collect()
    }
}

fn ready(polled: &std::task::Poll<Result<(), String>>) -> bool {
    matches!(polled, std::task::Poll::Ready(Ok(())))
}

#[test]
fn rails_are_used_that_both_sides_have_seen_working() {
    let mut trying = trying(&[true, false, true, true]);
    trying.others[2].state().holds_reads = true;
    trying.greet();
    assert!(trying.poll().is_pending());
    assert!(trying.fake.state().sent.is_empty(), "one of them has not answered");
    trying.others[2].end_read(ffi::IBV_WC_RETRY_EXC_ERR);
    assert!(trying.poll().is_pending());
    // Of the first, third and fourth one, in this order.
    assert_eq!(trying.said(), 0b101);
    assert!(ready(&trying.hear(0b011)));
    assert_eq!(trying.ports(), ["fake1"]);
}

#[test]
fn a_link_comes_up_without_further_rails() {
    let mut none = trying(&[false]);
    none.greet();
    assert!(ready(&none.poll()), "the peer names none");
    assert!(none.ports().is_empty());
    let mut silent = trying(&[true]);
    silent.others[0].state().answers_max = Some(0);
    silent.greet();
    assert!(silent.poll().is_pending());
    silent.until_said();
    assert_eq!(silent.said(), 0);
    // A message that comes right behind is the link's.
    silent.fake.deliver(Header::about(Kind::Rails, 0, 1), &[]);
    silent.fake.deliver(Header { class: Class::Message, ..Header::about(Kind::Eager, 0, 0) }, &[]);
    assert!(ready(&silent.poll()));
    let (_, _, rails, early) = silent.setup.into_parts();
    assert_eq!((rails.len(), early.len()), (0, 1));
}

#[test]
fn a_silent_rail_takes_a_part_of_the_time_for_set_up() {
    // Set-up may take so long, and the peer tries for so long.
    for (limit, trial_ms) in [(1000, u16::MAX), (60_000, 20), (60_000, 0)] {
        let began = std::time::Instant::now();
        let mut silent = trying_within(&[true], Duration::from_millis(limit), trial_ms);
        silent.others[0].state().answers_max = Some(0);
        silent.greet();
        assert!(silent.poll().is_pending());
        silent.until_said();
        assert!(began.elapsed() < Duration::from_millis(900), "{limit} {trial_ms}");
        assert_eq!(silent.said(), 0);
        assert!(ready(&silent.hear(1)));
        assert!(silent.ports().is_empty());
    }
}

#[test]
fn a_rail_that_swallows_long_packets_or_changes_bytes_is_not_used() {
    for garbles in [false, true] {
        let mut trying = trying_within(&[true, true], Duration::from_secs(60), 50);
        // No more than what fits a packet of Ethernet's usual size.
        trying.others[0].state().answers_max = (!garbles).then_some(1500);
        trying.others[0].state().garbles = garbles;
        trying.greet();
        assert!(trying.poll().is_pending());
        trying.until_said();
        assert_eq!(trying.said(), 0b10, "garbles: {garbles}");
        let samples = registered(&trying.others[0]);
        assert!(samples > 0);
        assert!(ready(&trying.hear(0b11)));
        assert_eq!(registered(&trying.others[0]) + registered(&trying.others[1]), 0);
        assert_eq!(trying.ports(), ["fake2"]);
    }
}

#[test]
fn a_sample_stays_for_as_long_as_a_device_may_write_it() {
    let mut trying = trying_within(&[true], Duration::from_secs(60), 20);
    trying.others[0].state().answers_max = Some(0);
    trying.greet();
    assert!(trying.poll().is_pending());
    trying.until_said();
    let samples = registered(&trying.others[0]);
    trying.others[0].state().destroying = libc::EBUSY;
    assert!(ready(&trying.hear(0)));
    assert_eq!(registered(&trying.others[0]), samples, "let go of");
    // It can: what is read into is still there.
    trying.others[0].end_read(ffi::IBV_WC_SUCCESS);
}

#[test]
fn what_a_peer_says_of_rails_is_checked() {
    for (kind, rails) in [(Kind::Rails, 0b10), (Kind::Rails, u64::MAX), (Kind::Eager, 0)] {
        let mut trying = trying(&[true]);
        trying.greet();
        assert!(trying.poll().is_pending());
        assert_eq!(trying.said(), 1);
        trying.fake.deliver(Header::about(kind, 0, rails), &[]);
        assert!(matches!(trying.poll(), std::task::Poll::Ready(Err(_))), "{kind:?} {rails}");
    }
}

#[test]
fn a_removed_device_is_let_go_of_though_an_offer_waits() {
    let alarms = Alarms::default();
    let mut rails = over_with(&alarms, &[100; 2]);
    let bytes = pattern(2 << 20);
    let posted = rails.setting.link.post(OP, Class::Tag, How::Offer, b"head", &[segment(&bytes)]);
    assert_eq!(posted.expect("posted"), Post::Pending);
    assert_eq!(registered(&rails.others[0]), 2 << 20, "offered by both");
    let _ = alarms.hear(1, &Event::DeviceGone { why: "gone".into() });
    rails.setting.settle();
    assert_eq!(registered(&rails.others[0]), 0, "the device cannot go");
}

#[test]
fn a_rail_of_which_nobody_knows_whether_it_is_at_rest_ends_the_link() {
    let alarms = Alarms::default();
    let mut rails = over_with(&alarms, &[1000; 2]);
    let bytes = pattern(2 << 20);
    let mut to = vec![0; bytes.len()];
    being_read(&mut rails, &mut to, &bytes);
    // Its device is being removed, and the kernel may not have come to this queue pair yet.
    rails.others[0].device.set_gone();
    rails.others[0].state().destroying = libc::EIO;
    let _ = alarms.hear(1, &Event::DeviceGone { why: "fake1 is being removed".into() });
    let ended = loop {
        match rails.setting.poll() {
            Ok(Progress::Idle) => panic!("the link goes on"),
            Ok(_) => {}
            Err(ended) => break ended,
        }
    };
    assert_eq!(ended.kind, ErrorKind::ConnectionLost, "{ended:?}");
    assert!(rails.setting.driver.done.is_empty(), "what may still be written is handed up");
}
