//! What a fake cannot show: what a kernel's driver does with keys that are not the peer's. Runs in
//! the virtual machine: `tests/vm/run-in-vm.sh -r -- PROGRAM real_device`.

use std::time::Instant;

use super::super::device::{Device, Domain, LocalPort};
use super::super::engine::library;
use super::super::messenger::Messenger;
use super::super::pool::Pool;
use super::*;
use crate::link::{OneSided, Registration};

/// One side of a link over a device that there is.
struct End {
    link: VerbsLink,
    driver: Driver,
    _kept: (Arc<Timers>, Arc<HostLoop>, UnixStream),
}

fn port() -> Option<LocalPort> {
    if std::env::var_os("THALWEG_TEST_RDMA").is_none() {
        println!("SKIPPED: a real device: there is none outside of the virtual machine");
        return None;
    }
    let verbs = library().unwrap_or_else(|absent| panic!("{absent}"));
    let (devices, _) = Device::open_all(verbs, &["rxe0".to_owned()], &[]).expect("a device");
    let (ports, _) = devices[0].ports();
    let v4 = |port: &LocalPort| port.port.ip().is_some_and(|ip| ip.is_ipv4());
    Some(ports.into_iter().find(v4).expect("an address"))
}

/// Two sides that are connected.
fn connected(port: &LocalPort, domain: &Arc<Domain>) -> [End; 2] {
    let pool = Arc::new(Pool::new(domain));
    let mut messengers = [1, 2].map(|first| Messenger::new(&pool, port, first).expect("queues"));
    let terms = messengers.each_ref().map(|messenger| messenger.terms((0, 0)));
    for (messenger, to) in messengers.iter_mut().zip([&terms[1], &terms[0]]) {
        messenger.connect(port.port, to).expect("connected");
    }
    let registrations = Registrations::new(domain);
    messengers.map(|messenger| {
        let Made { link, timers, host, bootstrap } = link_of(messenger, &registrations);
        End { link, driver: Driver::default(), _kept: (timers, host, bootstrap) }
    })
}

impl End {
    fn poll(&mut self) {
        let mut budget = Budget { ..Budget::TURN };
        let mut cx = Context::from_waker(Waker::noop());
        self.link.poll(&mut cx, true, &mut budget, &mut self.driver).expect("the link works");
    }
}

/// Polls both until something holds of them.
fn until(ends: &mut [End; 2], what: &str, holds: impl Fn(&[End; 2]) -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds(ends) {
        assert!(Instant::now() < end, "{what} takes longer than {PATIENCE:?}");
        ends.iter_mut().for_each(End::poll);
    }
}

fn put(ends: &mut [End; 2], grant: &[u8], bytes: &[u8]) -> Result<(), LinkError> {
    let remote = ends[0].link.open(grant)?;
    assert_eq!(ends[0].link.put(OP, segment(bytes), remote, 0)?, Post::Pending);
    until(ends, "a put", |ends| !ends[0].driver.done.is_empty());
    let (op, result) = ends[0].driver.done.pop().expect("one");
    assert_eq!(op, OP);
    result
}

fn get(ends: &mut [End; 2], grant: &[u8], bytes: &mut [u8]) -> Result<(), LinkError> {
    let remote = ends[0].link.open(grant)?;
    assert_eq!(ends[0].link.get(OP, place(bytes)[0], remote, 0)?, Post::Pending);
    until(ends, "a get", |ends| !ends[0].driver.done.is_empty());
    ends[0].driver.done.pop().expect("one").1
}

/// Messages go both ways.
fn assert_alive(ends: &mut [End; 2]) {
    let before = ends.each_ref().map(|end| end.driver.parcels);
    for end in ends.iter_mut() {
        let posted =
            end.link.post(OpId::NONE, Class::Message, How::Eager, b"head", &[segment(b"alive")]);
        assert_eq!(posted.expect("posted"), Post::Done);
    }
    until(ends, "a message", |ends| {
        ends.iter().zip(before).all(|(end, before)| end.driver.parcels == before + 1)
    });
}

fn region(
    end: &mut End,
    memory: &mut [u8],
    read: bool,
    write: bool,
) -> (Arc<dyn Registration>, Vec<u8>) {
    let registration = end.link.register(place(memory)[0], read, write).expect("registered");
    let grant = registration.grant().to_vec();
    (registration, grant)
}

#[test]
fn real_device_refuses_what_was_not_granted() {
    let Some(port) = port() else { return };
    let domain = Domain::new(&port.device).expect("a domain");
    for bytes in [&pattern(10)[..], &pattern(300 << 10)] {
        let mut there = vec![0; 300 << 10];
        let other = &mut connected(&port, &domain);
        for case in ["key", "revoked", "read-only", "write-only", "another peer's"] {
            let ends = &mut connected(&port, &domain);
            there.fill(0);
            let (read, write) = (case != "write-only", case != "read-only");
            let (registration, mut grant) = region(&mut ends[1], &mut there, read, write);
            let mut kept = Some(registration);
            match case {
                "key" => grant[24] ^= 1,
                "revoked" => drop(kept.take()),
                "another peer's" => {
                    let (registration, others) = region(&mut other[1], &mut there, true, true);
                    kept = Some(registration);
                    grant = others;
                }
                _ => {}
            }
            let mut to = vec![9; bytes.len()];
            let refused = match case {
                "write-only" => get(ends, &grant, &mut to),
                _ => put(ends, &grant, bytes),
            };
            let error = refused.expect_err(case);
            println!("{case}, {} B: {}", bytes.len(), error.detail);
            assert_eq!(error.kind, ErrorKind::ConnectionLost, "{case}");
            assert!(there.iter().all(|byte| *byte == 0), "{case}: written");
            assert!(to.iter().all(|byte| *byte == 9), "{case}: read");
            assert!(ends[0].link.open(&grant).is_err(), "{case}: it is over");
            assert_alive(ends);
            for end in ends.iter_mut() {
                assert_eq!(end.link.kill(&died(), &mut end.driver), Killed::Over);
            }
            drop(kept);
        }
        // What was granted is not.
        let (registration, grant) = region(&mut other[1], &mut there, true, true);
        put(other, &grant, bytes).expect("granted");
        assert!(there[..bytes.len()] == *bytes, "wrong bytes");
        let mut to = vec![0; bytes.len()];
        get(other, &grant, &mut to).expect("granted");
        assert!(to == bytes, "wrong bytes");
        assert_alive(other);
        assert!(registration.withdraw());
    }
}
