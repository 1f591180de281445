//! The library's own choice of links, from end to end: with hardware that is only claimed, over the
//! libucp that is here.
//!
//! What UCX calls memory of this host plays the part of a fabric. Two nodes of one process always share
//! memory, so where UCX is to be reached the accepting side names its links, and leaves `shm` out.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::link::hardware::{Fabric, Hardware, Nature, RdmaDevice};
use crate::link::ucx::Reservation;
use crate::link::{LinkKind, insist};
use crate::proto::hello::{
    Failure, Hello, PREFACE_BYTES, SETUP_PREFIX_BYTES, Setup, preface_decode, preface_encode,
};
use crate::route::{Candidate, Capability, Verdict};
use crate::{Config, Endpoint, Node};

const PATIENCE: Duration = Duration::from_secs(20);

/// Whether there is a libucp that uses what it likes; says what is left out if not.
fn ucx_is_here(test: &str) -> bool {
    let why = match crate::link::ucx::library() {
        Err(absent) => absent.reason,
        Ok(_) if std::env::var_os("UCX_TLS").is_some() => "UCX_TLS is set".into(),
        Ok(_) => return true,
    };
    // Past the harness, which keeps the output of tests that pass.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {why}");
    false
}

fn fabrics(transports: &[&'static str]) -> Hardware {
    let fabric = |transports: &&'static str| Fabric { file: "nowhere", transports };
    Hardware { fabrics: transports.iter().map(fabric).collect(), ..Hardware::default() }
}

/// UCX has it, and takes something else for messages.
fn not_taken() -> Hardware {
    fabrics(&["cma"])
}

/// UCX takes one of them for messages.
fn taken() -> Hardware {
    fabrics(&["posix", "sysv"])
}

/// The kernel takes no such name for a device.
const CARD: &str = "no/card";

fn rdma(nature: Nature, up: bool) -> Hardware {
    let device = RdmaDevice { name: CARD.into(), nature, up };
    Hardware { rdma: vec![device], ..Hardware::default() }
}

fn with(config: Config, hardware: fn() -> Hardware) -> Config {
    // Part of it is claimed to be hardware.
    Config { hardware, ucx_without: &["tcp"], ..config }
}

fn by_itself(hardware: fn() -> Hardware) -> Config {
    with(Config::new(), hardware)
}

fn named(hardware: fn() -> Hardware) -> Config {
    with(Config::new().transports([LinkKind::Ucx, LinkKind::Tcp]), hardware)
}

struct Pair {
    a: Endpoint,
    b: Endpoint,
    nodes: [Node; 2],
}

/// Two nodes; the first one connects. A message has come through.
async fn pair(a: Config, b: Config) -> Pair {
    let nodes = [a, b].map(|config| Node::new(config).expect("a node"));
    let listener = nodes[1].listen("thalweg://127.0.0.1:0").await.expect("listening");
    let meeting = async { tokio::join!(nodes[0].connect(listener.address()), listener.accept()) };
    let (a, b) = tokio::time::timeout(PATIENCE, meeting).await.expect("in time");
    let (a, b) = (a.expect("connecting"), b.expect("accepting"));
    let (sent, got) = tokio::join!(a.send(vec![7u8; 100_000]), b.recv());
    sent.expect("sending");
    assert_eq!(got.expect("receiving").len_bytes(), 100_000);
    Pair { a, b, nodes }
}

#[track_caller]
fn candidate(endpoint: &Endpoint, link: LinkKind) -> Candidate {
    let candidates = &endpoint.route().candidates;
    candidates.iter().find(|candidate| candidate.link == link).expect("a verdict").clone()
}

fn capability(config: Config, link: LinkKind) -> Capability {
    let node = Node::new(config).expect("a node");
    let all = node.capabilities();
    all.into_iter().find(|capability| capability.link == link).expect("it is told of")
}

#[tokio::test]
async fn ucx_that_takes_no_hardware_gives_way() {
    if !ucx_is_here("ucx_that_takes_no_hardware_gives_way") {
        return;
    }
    let Pair { a, b, nodes } = pair(by_itself(not_taken), named(not_taken)).await;
    let found = nodes[0].capabilities().into_iter().find(|c| c.link == LinkKind::Ucx);
    let found = found.expect("ucx");
    assert!(found.present && found.reason.contains("for cma over /nowhere"), "{}", found.reason);
    for end in [&a, &b] {
        assert_eq!(end.route().link(), LinkKind::Tcp, "{}", end.route());
        let ucx = candidate(end, LinkKind::Ucx);
        assert_eq!((ucx.verdict, ucx.fix), (Verdict::Rejected, Some(insist(LinkKind::Ucx))));
        let (_, lanes) = ucx.reason.split_once("UCX took no hardware for messages: ").expect("why");
        assert!(lanes.contains("/memory") && lanes.contains("(messages"), "{lanes}");
    }
    assert!(candidate(&b, LinkKind::Ucx).reason.starts_with("at the peer: "));
    let warned = nodes.map(|node| node.shared().warned.load(Ordering::Relaxed));
    assert_eq!(warned, [true, false], "who chose is warned");
}

#[tokio::test]
async fn ucx_that_takes_hardware_is_used() {
    if !ucx_is_here("ucx_that_takes_hardware_is_used") {
        return;
    }
    let Pair { a, b, nodes } = pair(by_itself(taken), named(taken)).await;
    for end in [&a, &b] {
        assert_eq!(end.route().link(), LinkKind::Ucx, "{}", end.route());
    }
    let order: Vec<_> = a.route().candidates.iter().map(|candidate| candidate.link).collect();
    assert_eq!(order[..4], [LinkKind::Shm, LinkKind::Verbs, LinkKind::Ucx, LinkKind::Tcp]);
    assert!(!nodes[0].shared().warned.load(Ordering::Relaxed));
}

#[tokio::test]
async fn ucx_is_not_tried_without_hardware_in_common() {
    if !ucx_is_here("ucx_is_not_tried_without_hardware_in_common") {
        return;
    }
    for (theirs, said) in [(Hardware::default as fn() -> _, "none"), (taken, "posix, sysv")] {
        let Pair { a, b, .. } = pair(by_itself(not_taken), named(theirs)).await;
        assert_eq!(a.route().link(), LinkKind::Tcp, "{}", a.route());
        let ucx = candidate(&a, LinkKind::Ucx);
        let why = format!("both sides have (here: cma; at the peer: {said})");
        assert!(ucx.verdict == Verdict::Rejected && ucx.reason.contains(&why), "{}", ucx.reason);
        assert_eq!(candidate(&b, LinkKind::Ucx).verdict, Verdict::Usable, "nobody tried it");
    }
}

/// Who connects decides: it named UCX, so nothing is asked for but that the other side has it.
#[tokio::test]
async fn who_chooses_by_itself_follows_who_named() {
    if !ucx_is_here("who_chooses_by_itself_follows_who_named") {
        return;
    }
    let Pair { a, b, .. } = pair(named(Hardware::default), by_itself(not_taken)).await;
    assert_eq!([&a, &b].map(|end| end.route().link()), [LinkKind::Ucx; 2], "{}", a.route());
    let Pair { a, b, .. } = pair(named(taken), by_itself(Hardware::default)).await;
    assert_eq!([&a, &b].map(|end| end.route().link()), [LinkKind::Tcp; 2], "{}", a.route());
    let ucx = candidate(&a, LinkKind::Ucx);
    assert!(ucx.reason.contains("the peer does not offer it"), "{}", ucx.reason);
}

#[tokio::test]
async fn both_choose_by_themselves() {
    let here = ucx_is_here("both_choose_by_themselves: with hardware");
    let hardware = if here { taken } else { Hardware::default };
    let Pair { a, b, .. } = pair(by_itself(hardware), by_itself(hardware)).await;
    for end in [&a, &b] {
        assert_eq!(end.route().link(), LinkKind::Shm, "{}", end.route());
        let expected = if here { Verdict::Usable } else { Verdict::Rejected };
        assert_eq!(candidate(end, LinkKind::Ucx).verdict, expected, "{}", end.route());
    }
    let (one, none) = (by_itself(hardware), by_itself(Hardware::default));
    for (a, b) in [(one.clone(), none.clone()), (none, one)] {
        let Pair { a, b, .. } = pair(a, b).await;
        assert_eq!([&a, &b].map(|end| end.route().link()), [LinkKind::Shm; 2]);
        assert_eq!(candidate(&a, LinkKind::Ucx).verdict, Verdict::Rejected, "{}", a.route());
    }
}

/// What is looked for, and what is said of the rest. No device of this name is here: where there is
/// hardware by what is claimed, it is looked for and not found.
#[tokio::test]
async fn reasons_say_what_was_looked_for() {
    let soft = || rdma(Nature::Software("soft-RoCE"), true);
    let down = || rdma(Nature::Adapter, false);
    let up = || rdma(Nature::Adapter, true);
    let verbs = |config| capability(config, LinkKind::Verbs);
    let by_software = verbs(by_itself(soft));
    assert!(by_software.reason.contains("no/card is soft-RoCE"), "{}", by_software.reason);
    assert_eq!((by_software.present, by_software.fix), (false, Some(insist(LinkKind::Verbs))));
    let is_down = verbs(by_itself(down));
    assert!(is_down.reason.contains("no/card is down"), "{}", is_down.reason);
    assert!(verbs(by_itself(Hardware::default)).reason.contains("knows no RDMA device"));
    for looked_for in [by_itself(up), by_itself(soft).verbs_devices(["nobody's"])] {
        let reason = verbs(looked_for).reason;
        assert!(!reason.contains(CARD) && !reason.contains("soft-RoCE"), "{reason}");
    }
    let encrypted = by_itself(up).require_encryption(true);
    for link in [LinkKind::Verbs, LinkKind::Ucx] {
        let reason = capability(encrypted.clone(), link).reason;
        assert!(reason.contains("encryption is required"), "{reason}");
    }
    for hardware in [Hardware::default as fn() -> _, soft, down] {
        let ucx = capability(by_itself(hardware), LinkKind::Ucx);
        assert!(!ucx.present && ucx.reason.starts_with("not looked for"), "{}", ucx.reason);
        assert_eq!(ucx.fix, Some(insist(LinkKind::Ucx)));
    }
    if ucx_is_here("reasons_say_what_was_looked_for: UCX") {
        let ucx = capability(by_itself(up), LinkKind::Ucx);
        assert!(!ucx.present && ucx.reason.contains("no transport over no/card"), "{}", ucx.reason);
        assert!(!ucx.reason.contains("tcp"), "its sockets are left alone: {}", ucx.reason);
        // By name all that it has is as it was.
        let ucx = capability(named(up), LinkKind::Ucx);
        assert!(ucx.present && ucx.reason.starts_with("UCX "), "{}", ucx.reason);
    }
}

/// A peer that offers UCX and TCP, and says nothing in the attempt at UCX until that is given up.
fn stalls(listener: &TcpListener, blob: Vec<u8>) -> TcpStream {
    let (mut stream, _) = listener.accept().expect("accepting");
    let mut preface = [0; PREFACE_BYTES];
    stream.read_exact(&mut preface).expect("a preface");
    let mut body = vec![0; preface_decode(&preface).expect("a preface").body_len];
    stream.read_exact(&mut body).expect("a hello");
    let theirs = Hello::decode(&body).expect("a hello");
    let links = vec![("ucx".to_owned(), blob), ("tcp".to_owned(), Vec::new())];
    let body = Hello { node_id: [9; 16], links, ..theirs }.encode().expect("a hello");
    stream.write_all(&preface_encode(body.len())).expect("writing");
    stream.write_all(&body).expect("writing");
    let mut trying = String::new();
    loop {
        let mut prefix = [0; SETUP_PREFIX_BYTES];
        stream.read_exact(&mut prefix).expect("a prefix");
        let mut body = vec![0; Setup::body_len(prefix).expect("a length")];
        stream.read_exact(&mut body).expect("a message");
        let answer = match Setup::decode(&body).expect("a message") {
            Setup::Attempt { link } => {
                trying = link;
                continue;
            }
            Setup::Go => return stream,
            Setup::Result(Ok(())) if trying == "tcp" => Ok(()),
            Setup::Result(Err(_)) if trying == "ucx" => Err(Failure::default()),
            other => panic!("in the attempt at {trying}: {other:?}"),
        };
        stream.write_all(&Setup::Result(answer).encode()).expect("writing");
    }
}

/// What a peer offers, where one listens that stalls in UCX, and that peer.
struct Stalling {
    listener: TcpListener,
    address: String,
    blob: Vec<u8>,
    // Whose slot the blob names.
    _theirs: (Node, Reservation),
}

impl Stalling {
    fn new() -> Stalling {
        let theirs = Node::new(named(taken)).expect("a node");
        let reservation = theirs.shared().ucx.as_ref().expect("ucx").reserve().expect("a slot");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let address = format!("thalweg://{}", listener.local_addr().expect("an address"));
        let blob = reservation.blob();
        Stalling { listener, address, blob, _theirs: (theirs, reservation) }
    }

    /// Connects once, and says how long that took.
    async fn connect(&self, node: &Node) -> (Endpoint, Duration) {
        let (listener, blob) = (self.listener.try_clone().expect("a listener"), self.blob.clone());
        let peer = tokio::task::spawn_blocking(move || stalls(&listener, blob));
        let began = Instant::now();
        let connecting = tokio::time::timeout(PATIENCE, node.connect(self.address.as_str()));
        let endpoint = connecting.await.expect("in time").expect("connecting");
        let took = began.elapsed();
        drop(peer.await.expect("the peer"));
        (endpoint, took)
    }
}

/// Half of the time for connecting is what a link that somebody named would have.
const LONG: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_link_that_nobody_named_costs_two_seconds_at_most_and_once() {
    if !ucx_is_here("a_link_that_nobody_named_costs_two_seconds_at_most_and_once") {
        return;
    }
    let stalling = Stalling::new();
    let config = by_itself(taken).connect_timeout(LONG).handshake_timeout(LONG);
    let node = Node::new(config).expect("a node");
    let (endpoint, took) = stalling.connect(&node).await;
    assert_eq!(endpoint.route().link(), LinkKind::Tcp, "{}", endpoint.route());
    let ucx = candidate(&endpoint, LinkKind::Ucx);
    assert_eq!(ucx.verdict, Verdict::Rejected);
    // Whichever clock was looked at first: that of the attempt, or that of the link.
    let told = ["longer than 2.0s", "within 2s"].iter().any(|limit| ucx.reason.contains(limit));
    assert!(told, "{}", ucx.reason);
    assert!(took >= Duration::from_secs(2) && took < Duration::from_secs(10), "{took:?}");
    assert!(node.shared().warned.load(Ordering::Relaxed));
    // The peer would wait for the end of an attempt: there is none.
    let (endpoint, _) = stalling.connect(&node).await;
    let ucx = candidate(&endpoint, LinkKind::Ucx);
    assert_eq!((ucx.verdict, ucx.fix), (Verdict::Rejected, Some(insist(LinkKind::Ucx))));
    assert!(ucx.reason.contains("tried again after 60 s"), "{}", ucx.reason);
}

/// Neither confirmation nor hardware in common is asked for where UCX is the only link left.
#[tokio::test]
async fn the_last_link_is_taken_as_it_is() {
    if !ucx_is_here("the_last_link_is_taken_as_it_is") {
        return;
    }
    let only = |hardware| with(Config::new().transports([LinkKind::Ucx]), hardware);
    for theirs in [not_taken, Hardware::default as fn() -> _] {
        let Pair { a, b, .. } = pair(by_itself(not_taken), only(theirs)).await;
        assert_eq!([&a, &b].map(|end| end.route().link()), [LinkKind::Ucx; 2], "{}", a.route());
    }
}
