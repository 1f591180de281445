//! What is particular to the link `verbs`: memory is registered once, a wire that is cut or bad
//! harms nothing, and nothing is left in the kernel of a process that was killed.
//!
//! Most of it needs RDMA devices: those of the virtual machine (`vm/run-in-vm.sh -r`).

mod support;

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use support::{Peer, measured, note, serially, short_or_long};
use thalweg::{Config, LinkKind, Message, Node};
use thalweg_tests::{Way, check_pattern, pair, pattern, run_once, skipped};

/// How long the adapter tries before it gives a connection up, and what a slow machine adds.
const LOST_MAX: Duration = Duration::from_secs(30);
const LONG_BYTES: usize = 1 << 20;

/// Whether this is the machine with a wire between `rxa` and `rxb`; says what is left out if not.
fn in_the_machine(test: &str) -> bool {
    let here = std::env::var_os("THALWEG_TEST_RDMA").is_some();
    if !here {
        skipped(test, "the wire between two RDMA devices is in the virtual machine");
    }
    here
}

fn tool(variable: &str, words: &[&str]) -> String {
    let program = std::env::var(variable).expect("the machine says where its tools are");
    let Output { status, stdout, stderr } =
        Command::new(program).args(words).output().expect("running a tool");
    assert!(status.success(), "{words:?}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8_lossy(&stdout).into_owned()
}

#[test]
fn verbs_absence_has_a_reason_and_a_fix() {
    let Some(why) = Way::Verbs.missing() else { return };
    run_once("verbs is absent", async {
        let config = Config::new().transports([LinkKind::Verbs, LinkKind::Tcp]);
        let node = Node::new(config.clone()).expect("a node");
        let capability = node.capabilities().into_iter().find(|c| c.link == LinkKind::Verbs);
        let capability = capability.expect("verbs is told of");
        note(format_args!("verbs is absent: {} (fix: {:?})", capability.reason, capability.fix));
        assert_eq!(capability.reason, why);
        assert!(capability.fix.is_some_and(|fix| !fix.is_empty()));
        // What is left carries the connection, and says so.
        let other = Node::new(config).expect("a node");
        let listener = other.listen("thalweg://127.0.0.1:0").await.expect("listening");
        let (a, _b) = thalweg_tests::connect(&node, &listener).await;
        assert_eq!(a.route().link(), LinkKind::Tcp);
        assert!(a.route().to_string().contains(&why), "{}", a.route());
    });
}

#[test]
fn verbs_registers_memory_once() {
    if let Some(why) = Way::Verbs.missing() {
        return skipped("verbs_registers_memory_once", &why);
    }
    let _alone = serially();
    run_once("registrations", async {
        let pair = pair(Way::Verbs).await;
        let mut before = None;
        for round in 0..8u64 {
            let bytes = pattern(round, LONG_BYTES);
            let mut loan = pair.node_a.loan(bytes.len()).expect("a loan");
            loan.copy_from_slice(&bytes);
            let (sent, got) = tokio::join!(pair.a.send(Message::from(loan)), pair.b.recv());
            sent.expect("sending");
            check_pattern(round, &got.expect("receiving").to_vec().expect("its bytes"));
            let made = [&pair.a, &pair.b].map(|end| {
                let counters = end.stats().link_counters;
                assert_eq!(counters.registrations_refused, 0);
                (counters.registrations, counters.registrations_reused)
            });
            if let Some(before) = before.filter(|_| round > 2) {
                let registered = |ends: [(u64, u64); 2]| ends.map(|(made, _)| made);
                assert_eq!(registered(before), registered(made), "something was registered again");
                assert!(made[0].1 > before[0].1 && made[1].1 > before[1].1, "{made:?}");
            }
            before = Some(made);
        }
        let counters = pair.b.stats().link_counters;
        assert!(counters.rdma_bytes_received >= 8 * LONG_BYTES as u64, "{counters:?}");
        note(format_args!("SOAK: 8 messages of 1 MiB: {before:?} registrations (made, reused)"));
    });
}

fn across_the_wire(mode: [&str; 2], words: [&[&str]; 2]) -> [Peer; 2] {
    let start = |mode: &str, device: &str, words: &[&str], address: String| {
        let mut all = vec![mode.to_owned(), "way=Verbs".to_owned(), format!("device={device}")];
        all.extend(words.iter().map(|word| (*word).to_owned()));
        all.push(address);
        Peer::start(&all)
    };
    let mut a = start(mode[0], "rxa", words[0], "listen=thalweg://127.0.0.1:0".to_owned());
    let address = format!("connect={}", a.said("LISTENING"));
    let b = start(mode[1], "rxb", words[1], address);
    [a, b]
}

/// Every operation of both peers ends, with an error that says that the connection is lost.
fn all_end(peers: &mut [Peer; 2], since: Instant) {
    for peer in peers {
        for _ in ["recv", "tag_recv", "send"] {
            let ended = peer.said_by("ENDED", since + LOST_MAX).expect("an operation still waits");
            let kind = ended.split(' ').nth(1);
            assert!(matches!(kind, Some("ConnectionLost" | "PeerGone" | "TimedOut")), "{ended}");
        }
    }
}

#[test]
fn verbs_wire_cut_mid_transfer() {
    if !in_the_machine("verbs_wire_cut_mid_transfer") {
        return;
    }
    let _alone = serially();
    let mut peers = across_the_wire(["watch", "watch"], [&["stream=1"], &["stream=1"]]);
    for peer in &mut peers {
        assert!(peer.said("ROUTE").starts_with("verbs"));
        peer.said("GOING");
    }
    let cut = Instant::now();
    tool("IP", &["link", "set", "va", "down"]);
    all_end(&mut peers, cut);
    measured("wire cut to the last error", cut.elapsed().as_secs_f64(), "s");
    tool("IP", &["link", "set", "va", "up"]);
    tool("IP", &["route", "replace", "10.78.0.2", "dev", "va", "table", "200"]);
    for peer in peers {
        assert!(peer.finish(), "a peer failed");
    }
}

#[test]
fn verbs_bad_wires() {
    if !in_the_machine("verbs_bad_wires") {
        return;
    }
    let _alone = serially();
    let count = format!("count={}", short_or_long(100, 1000));
    let wires: [&[&str]; 4] = [
        &["delay", "1ms"],
        &["loss", "1%"],
        &["duplicate", "3%"],
        &["delay", "1ms", "reorder", "20%", "50%"],
    ];
    for wire in wires {
        for end in ["va", "vb"] {
            let words = ["qdisc", "replace", "dev", end, "root", "netem", "limit", "10000"];
            tool("TC", &[&words[..], wire].concat());
        }
        let began = Instant::now();
        let [echo, mut check] = across_the_wire(["echo", "check"], [&[], &[&count, "seed=5"]]);
        let checked = check.said("CHECKED");
        assert!(checked.ends_with("over verbs"), "{checked}");
        note(format_args!("SOAK: wire with {wire:?}: {checked}, {:.1?}", began.elapsed()));
        assert!(check.finish(), "over {wire:?}");
        drop(echo);
    }
    for end in ["va", "vb"] {
        tool("TC", &["qdisc", "delete", "dev", end, "root"]);
    }
}

/// What the kernel keeps for processes: everything but its own completion queue and queue pair.
fn kept_in_the_kernel() -> Option<String> {
    let shown = tool("RDMA", &["resource", "show"]);
    let own = ["pd 1", "cq 1", "qp 1", "cm_id 0", "mr 0", "ctx 0"];
    let kept: Vec<_> =
        shown.lines().filter(|line| !own.iter().all(|part| line.contains(part))).collect();
    (!kept.is_empty()).then(|| kept.join("\n"))
}

#[test]
fn verbs_leaves_nothing_in_the_kernel() {
    if !in_the_machine("verbs_leaves_nothing_in_the_kernel") {
        return;
    }
    let _alone = serially();
    let rounds = short_or_long(5, 40);
    for round in 0..rounds {
        let mut peers = across_the_wire(["watch", "watch"], [&["stream=1"], &["stream=1"]]);
        peers.iter_mut().for_each(|peer| drop(peer.said("GOING")));
        drop(peers);
        let until = Instant::now() + Duration::from_secs(20);
        while let Some(kept) = kept_in_the_kernel() {
            assert!(Instant::now() < until, "after round {round} the kernel keeps {kept}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    note(format_args!("SOAK: {rounds} rounds of kill -9 on both sides: the kernel keeps nothing"));
}
