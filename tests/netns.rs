//! Two hosts: network namespaces with a cable between them, which is pulled; shared memory that is
//! out of reach. And, in a virtual machine, a wire that loses and delays.

mod support;

use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use support::{Peer, measured, note, serially, short_or_long, skipped};

const KEEPALIVE: Duration = Duration::from_secs(3);
/// The keepalive, and what a busy machine may add to it.
const LOST_MAX: Duration = Duration::from_secs(10);

/// Two network namespaces, each with an end of a cable. Removed when dropped.
struct Hosts {
    names: [String; 2],
}

const ADDRESSES: [&str; 2] = ["10.213.7.1", "10.213.7.2"];

impl Hosts {
    /// `Err`: why they cannot be made here.
    fn new() -> Result<Hosts, String> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = |end: &str| format!("thalweg-{}-{count}{end}", std::process::id());
        // Dropped, and with it what was made, if one of the steps fails.
        let hosts = Hosts { names: [name("a"), name("b")] };
        let [a, b] = &hosts.names;
        ip(&["netns", "add", a])?;
        ip(&["netns", "add", b])?;
        let cable = ["-n", a, "link", "add", "cable", "type", "veth", "peer", "cable", "netns", b];
        ip(&cable)?;
        for (host, address) in hosts.names.iter().zip(ADDRESSES) {
            ip(&["-n", host, "address", "add", &format!("{address}/24"), "dev", "cable"])?;
            ip(&["-n", host, "link", "set", "lo", "up"])?;
            ip(&["-n", host, "link", "set", "cable", "up"])?;
        }
        Ok(hosts)
    }

    /// Both, or `None` after saying why the test is left out.
    fn or_skip(test: &str) -> Option<Hosts> {
        Hosts::new().map_err(|why| skipped(test, why)).ok()
    }

    /// A peer on one of them.
    fn peer(&self, host: usize, words: &[&str]) -> Peer {
        let mut command = ip_command();
        command.args(["netns", "exec", &self.names[host], Peer::PROGRAM]).args(words);
        Peer::of(command)
    }

    /// Pulls the cable out at the first host.
    fn pull_cable(&self) {
        let answer = ip(&["-n", &self.names[0], "link", "set", "cable", "down"]);
        answer.expect("pulling the cable");
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            // Those that were not made cannot be removed.
            let _ = ip(&["netns", "delete", name]);
        }
    }
}

fn ip_command() -> Command {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new("ip");
    command.env("PATH", path);
    command
}

fn ip(words: &[&str]) -> Result<(), String> {
    let ran = ip_command().args(words).output();
    let Output { status, stderr, .. } = ran.map_err(|error| format!("cannot run ip: {error}"))?;
    if status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&stderr);
    Err(format!("ip {}: {}", words.join(" "), why.trim()))
}

/// Two peers on two hosts, connected.
fn connected(hosts: &Hosts, both: &[&str]) -> [Peer; 2] {
    let listen = format!("listen=thalweg://{}:0", ADDRESSES[0]);
    let mut listening = hosts.peer(0, &[both, &[listen.as_str()]].concat());
    let connect = format!("connect={}", listening.said("LISTENING"));
    let connecting = hosts.peer(1, &[both, &[connect.as_str()]].concat());
    [listening, connecting]
}

fn cable_pulled(test: &str, stream: &str, operations: &[&str]) {
    let _alone = serially();
    let Some(hosts) = Hosts::or_skip(test) else { return };
    let keepalive = format!("keepalive_ms={}", KEEPALIVE.as_millis());
    let mut peers = connected(&hosts, &["watch", "way=Tcp", stream, &keepalive]);
    for peer in &mut peers {
        assert!(peer.said("ROUTE").starts_with("tcp"));
        peer.said("GOING");
    }
    let pulled = Instant::now();
    hosts.pull_cable();
    for (host, peer) in peers.iter_mut().enumerate() {
        let mut left: Vec<_> = operations.to_vec();
        while !left.is_empty() {
            let ended = peer.said_by("ENDED", pulled + LOST_MAX);
            let ended = ended.unwrap_or_else(|| panic!("host {host}: {left:?} still wait"));
            let mut words = ended.split(' ');
            let (what, kind) = (words.next().unwrap_or_default(), words.next());
            assert!(matches!(kind, Some("ConnectionLost" | "PeerGone" | "TimedOut")), "{ended}");
            left.retain(|operation| *operation != what);
        }
        let took = pulled.elapsed();
        measured(&format!("{test}, host {host}"), took.as_secs_f64(), "s");
        assert!(took <= LOST_MAX);
    }
    for peer in peers {
        assert!(peer.finish(), "a peer failed");
    }
}

#[test]
fn a_cable_pulled_mid_transfer() {
    cable_pulled("cable pulled mid-transfer", "stream=1", &["recv", "tag_recv", "send"]);
}

#[test]
fn a_cable_pulled_while_idle() {
    cable_pulled("cable pulled while idle", "stream=0", &["recv", "tag_recv"]);
}

#[test]
fn between_network_namespaces_it_falls_back_to_tcp() {
    let _alone = serially();
    let Some(hosts) = Hosts::or_skip("falling back between namespaces") else { return };
    let mut peers = connected(&hosts, &["watch", "any=1"]);
    for peer in &mut peers {
        let route = peer.said("ROUTE");
        note(&route);
        assert!(route.starts_with("tcp"), "{route}");
        let line = route.split(" | ").map(str::trim).find(|line| line.starts_with("shm"));
        let line = line.unwrap_or_else(|| panic!("nothing is said of shm: {route}"));
        assert!(line.contains("rejected"), "{line}");
        assert!(line.contains("network namespace"), "the reason is not said: {line}");
    }
    // The data goes through as well.
    drop(peers);
    let listen = format!("listen=thalweg://{}:0", ADDRESSES[0]);
    let mut echo = hosts.peer(0, &["echo", "any=1", &listen]);
    let connect = format!("connect={}", echo.said("LISTENING"));
    let mut check = hosts.peer(1, &["check", "any=1", "count=200", &connect]);
    let checked = check.said("CHECKED");
    assert!(checked.ends_with("over tcp"), "{checked}");
}

/// The kernels of containers have no `netem`; that of a virtual machine has.
#[test]
fn a_wire_that_loses_and_delays() {
    let _alone = serially();
    let test = "loss and delay in a virtual machine";
    if !cfg!(target_arch = "x86_64") {
        return skipped(test, "the machine is made for x86_64");
    }
    let here = env!("CARGO_MANIFEST_DIR");
    let limit = Duration::from_secs(short_or_long(180, 240));
    let mut command = Command::new(format!("{here}/vm/run-in-vm.sh"));
    command.args(["-t", &limit.as_secs().to_string(), "--"]);
    command.arg(format!("{here}/vm/bad-wire.sh")).arg(Peer::PROGRAM);
    command.arg(short_or_long(400, 2000).to_string());
    let began = Instant::now();
    let Output { status, stdout, stderr } = command.output().expect("running the script");
    let said = String::from_utf8_lossy(&stdout);
    let complaints = String::from_utf8_lossy(&stderr);
    if status.code() == Some(CANNOT) {
        return skipped(test, complaints.lines().last().unwrap_or("it did not say why"));
    }
    said.lines().for_each(note);
    measured(test, began.elapsed().as_secs_f64(), "s");
    assert!(status.success(), "{status}\n{said}\n{complaints}");
    let wires = said.lines().filter(|line| line.starts_with("WIRE")).count();
    let checked = said.lines().filter(|line| line.starts_with("CHECKED")).count();
    assert!(wires > 0 && wires == checked, "{said}");
}

/// The script's status when the machine cannot be made here.
const CANNOT: i32 = 77;
