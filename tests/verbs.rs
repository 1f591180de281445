//! What is particular to the link `verbs`: memory is registered once, a wire that is cut or bad
//! harms nothing, and nothing is left in the kernel of a process that was killed.
//!
//! Most of it needs RDMA devices: those of the virtual machine (`vm/run-in-vm.sh -r`).

mod support;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use support::{Folder, Peer, inside, measured, note, outside, serially, short_or_long};
use thalweg::{Access, Config, Endpoint, ErrorKind, LinkKind, Message, Node, RemoteKey};
use thalweg_tests::{Way, check_pattern, connect, pair, pattern, run_once, skipped, until, within};

/// How long the adapter tries before it gives a connection up, and what a slow machine adds.
const LOST_MAX: Duration = Duration::from_secs(20);
const LONG_BYTES: usize = 1 << 20;
const LIBRARY: &str = "THALWEG_VERBS_LIBRARY";
/// A user who may do nothing in particular.
const NOBODY: u32 = 65_534;
/// Those of the virtual machine, and of which interfaces they are made.
const DEVICES: [(&str, &str); 5] =
    [("rxe0", "dummy0"), ("rxa", "va"), ("rxb", "vb"), ("rxc", "vc"), ("rxd", "vd")];

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

/// Puts until the adapter does it by itself.
async fn put_until_direct(endpoint: &Endpoint, key: &RemoteKey) {
    let putting = async {
        while endpoint.stats().direct_puts == 0 {
            endpoint.put(vec![0u8; 1], key, 0).await.expect("putting");
        }
    };
    within(LOST_MAX, "direct access", putting).await;
}

#[test]
fn verbs_puts_and_gets_register_memory_once() {
    if let Some(why) = Way::Verbs.missing() {
        return skipped("verbs_puts_and_gets_register_memory_once", &why);
    }
    let _alone = serially();
    run_once("registrations of puts", async {
        let pair = pair(Way::Verbs).await;
        let region = pair.node_b.register(vec![0u8; LONG_BYTES], Access::ReadWrite);
        let region = region.expect("region");
        put_until_direct(&pair.a, &region.key()).await;
        let mut memory = pair.node_a.loan(LONG_BYTES).expect("a loan");
        let counters = || pair.a.stats().link_counters;
        let mut made = Vec::new();
        for round in 0..4u64 {
            memory.copy_from_slice(&pattern(round, LONG_BYTES));
            let before = counters();
            memory = pair.a.put(memory, &region.key(), 0).await.expect("putting");
            let put = counters();
            assert_eq!(put.rdma_bytes_sent - before.rdma_bytes_sent, LONG_BYTES as u64);
            assert_eq!(put.inline_bytes_sent, before.inline_bytes_sent, "bytes went by messages");
            let mut there = vec![0; LONG_BYTES];
            region.read(0, &mut there).expect("within");
            check_pattern(round, &there);
            memory.fill(0);
            memory = pair.a.get(memory, &region.key(), 0).await.expect("getting");
            check_pattern(round, &memory);
            let got = counters();
            assert_eq!(got.rdma_bytes_received - put.rdma_bytes_received, LONG_BYTES as u64);
            made.push(got.registrations - before.registrations);
        }
        assert!(made[0] >= 1 && made[1..] == [0; 3], "registered again: {made:?}");
        let stats = pair.a.stats();
        assert_eq!((stats.direct_gets, stats.link_counters.registrations_refused), (4, 0));
        note(format_args!("SOAK: 4 puts and gets of 1 MiB: {made:?} registrations"));
        assert_eq!(region.revoke().await.expect("revoked").len(), LONG_BYTES);
    });
}

/// In KiB, what of this process's memory devices have pinned.
fn pinned_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).expect("a line");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn verbs_idle_endpoints_pin_little() {
    const PAIRS: u64 = 20;
    // 32 buffers of 8 KiB, and what is left of the pool's last mebibyte.
    const KIB_MAX: u64 = 256 + 1024 / (2 * PAIRS);
    if let Some(why) = Way::Verbs.missing() {
        return skipped("verbs_idle_endpoints_pin_little", &why);
    }
    let _alone = serially();
    run_once("idle endpoints", async {
        let pair = pair(Way::Verbs).await;
        // What the first ones cause, whatever the others need.
        let before = pinned_kib();
        let mut ends = Vec::new();
        for _ in 0..PAIRS {
            ends.push(connect(&pair.node_a, &pair.listener).await);
        }
        let each = (pinned_kib() - before) / (2 * PAIRS);
        measured("pinned by an idle endpoint over verbs", each as f64, "KiB");
        assert!((1..=KIB_MAX).contains(&each), "{each} KiB are pinned for each");
    });
}

/// The end of this side's queue pairs is enough: the peer need not hear of it.
#[test]
fn verbs_memory_comes_back_though_the_peer_is_stopped() {
    memory_comes_back("verbs_memory_comes_back_though_the_peer_is_stopped", true);
}

/// Nor need the endpoint end: the end of the registration is enough, in time, and no more ends.
#[test]
fn verbs_memory_is_taken_from_a_peer_that_is_stopped() {
    memory_comes_back("verbs_memory_is_taken_from_a_peer_that_is_stopped", false);
}

/// What the peer asked this process for is over: the adapters do everything by themselves.
async fn nothing_arrives(endpoint: &Endpoint) {
    let quiet = async {
        let arrived = || endpoint.stats().link_counters.parcels_received;
        let mut before = None;
        while before.replace(arrived()) != Some(arrived()) {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    within(LOST_MAX, "direct access alone", quiet).await;
}

/// `aborts`: the endpoint is ended first.
fn memory_comes_back(name: &'static str, aborts: bool) {
    if let Some(why) = Way::Verbs.missing() {
        return skipped(name, &why);
    }
    let _alone = serially();
    run_once(name, async {
        let config = Way::Verbs.config().close_timeout(Duration::from_secs(1));
        let node = Node::new(config).expect("a node");
        let listener = node.listen("thalweg://127.0.0.1:0").await.expect("listening");
        let words = ["victim", "way=Verbs", "phase=onesided"].map(str::to_owned);
        let address = format!("connect={}", listener.address());
        let mut peer = Peer::start(&[&words[..], &[address]].concat());
        let b = within(LOST_MAX, "accepting", listener.accept()).await.expect("accepting");
        let region = node.register(vec![0u8; LONG_BYTES], Access::ReadWrite).expect("region");
        let key = Message::copy_from_slice(&region.key().to_bytes());
        let its_key = b.recv().await.expect("its key").to_vec().expect("bytes");
        let its_key = RemoteKey::from_bytes(&its_key).expect("a key");
        b.send(key).await.expect("sending");
        peer.said("GOING");
        until("direct access", || b.stats().granted_keys == 1).await;
        let mut byte = [0];
        until("a put", || region.read(0, &mut byte).is_ok() && byte == [5]).await;
        nothing_arrives(&b).await;
        peer.signal(libc::SIGSTOP);
        if aborts {
            b.abort();
        }
        let buffer = within(LOST_MAX, "the memory", region.revoke()).await.expect("revoked");
        let copy = buffer.clone();
        peer.signal(libc::SIGCONT);
        if !aborts {
            // The peer, its endpoint and its own region are as they were.
            let said = within(LOST_MAX, "its message", b.recv()).await.expect("receiving");
            assert_eq!(said.to_vec().expect("bytes"), b"still here");
            let put = within(LOST_MAX, "a put", b.put(vec![9u8; LONG_BYTES], &its_key, 0)).await;
            let get = b.get(put.expect("putting"), &its_key, 0);
            assert!(within(LOST_MAX, "a get", get).await.expect("getting") == [9u8; LONG_BYTES]);
            assert_eq!(b.stats().granted_keys, 0);
            b.send(Message::copy_from_slice(b"go")).await.expect("sending");
        }
        // What it has begun since it goes on is this process's to refuse.
        let mut ended = None;
        until("the end of the peer", || {
            ended = peer.ended();
            ended.is_some()
        })
        .await;
        assert_eq!(ended, Some(false), "its puts and gets have ended well");
        assert!(buffer == copy, "written after it was handed back");
    });
}

/// Not by itself.
#[test]
fn verbs_is_absent_and_the_rest_works() {
    if inside() {
        support::without(LinkKind::Verbs);
    }
}

/// Whether a process in these circumstances does without, says why, and what would help.
#[track_caller]
fn assert_absent(
    settings: &[(&str, &Path)],
    more: impl FnOnce(&mut Command),
    because: &str,
    fix: &str,
) {
    let output = support::outside_as("verbs_is_absent_and_the_rest_works", settings, more);
    let (reason, advice) = support::reason_and_fix(&output);
    assert!(reason.contains(because), "{reason:?} does not say {because:?}");
    assert!(advice.contains(fix), "{advice:?} does not say {fix:?}");
}

/// As `assert_absent`, of a library.
#[track_caller]
fn assert_no_library(file: &Path, because: &str) {
    assert_absent(&[(LIBRARY, file)], |_| {}, because, LIBRARY);
}

#[test]
fn verbs_without_a_library() {
    assert_no_library(Path::new("/nonexistent/libibverbs.so.1"), "not there");
    let folder = Folder::new("verbs");
    let path = folder.0.join("libibverbs.so.1");
    std::fs::write(&path, "INPUT(-libverbs)\n".repeat(20)).expect("writable");
    assert_no_library(&path, "not a 64-bit shared object");
    let old = "int ibv_fork_init(void) { return 0; }\n";
    match folder.library("libibverbs.so.1", old) {
        Some(path) => assert_no_library(&path, "too old: has no function ibv_"),
        None => skipped("verbs_without_a_library: an old one", "no C compiler"),
    }
}

/// A device is there, but not for this process.
#[test]
fn verbs_without_permission_or_memory() {
    if !in_the_machine("verbs_without_permission_or_memory") {
        return;
    }
    let _alone = serially();
    let nobody = |command: &mut Command, bytes: u64| {
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
        command.uid(NOBODY);
        // SAFETY: the closure runs in the forked child, and makes one system call.
        unsafe {
            command.pre_exec(move || {
                match libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            });
        }
    };
    let device = [("THALWEG_VERBS_DEVICES", Path::new("rxe0"))];
    let little = |command: &mut Command| nobody(command, 64 << 10);
    assert_absent(&device, little, "RLIMIT_MEMLOCK is 65536 bytes", "ulimit -l");
    let files: Vec<_> = std::fs::read_dir("/dev/infiniband")
        .expect("devices")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    let permit = |mode| {
        for file in &files {
            let permissions = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(file, permissions).expect("changing permissions");
        }
    };
    permit(0o600);
    let much = |command: &mut Command| nobody(command, 1 << 30);
    assert_absent(&device, much, "cannot be opened", "/dev/infiniband/uverbs");
    permit(0o666);
}

/// Makes a device anew, and waits until it has an address.
fn make_device(device: &str, interface: &str) {
    tool("RDMA", &["link", "add", device, "type", "rxe", "netdev", interface]);
    wait_for_address(device);
}

fn wait_for_address(device: &str) {
    let until = Instant::now() + LOST_MAX;
    let file = format!("/sys/class/infiniband/{device}/ports/1/gids");
    let has_address = || {
        (0..8).any(|index| {
            let gid = std::fs::read_to_string(format!("{file}/{index}"));
            gid.is_ok_and(|gid| gid.contains(":ffff:"))
        })
    };
    while !has_address() {
        assert!(Instant::now() < until, "{device} has no address");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn verbs_without_a_device_or_a_port() {
    if !in_the_machine("verbs_without_a_device_or_a_port") {
        return;
    }
    let _alone = serially();
    let of = |names: &'static str| [("THALWEG_VERBS_DEVICES", Path::new(names))];
    assert_absent(&of("nobody's"), |_| {}, "none of the devices named", "THALWEG_VERBS_DEVICES");
    tool("IP", &["link", "set", "dummy0", "down"]);
    assert_absent(&of("rxe0"), |_| {}, "no port is up: rxe0 port 1 is", "ip link");
    tool("IP", &["link", "set", "dummy0", "up"]);
    wait_for_address("rxe0");
    for (device, _) in DEVICES {
        tool("RDMA", &["link", "delete", device]);
    }
    assert_absent(&[], |_| {}, "the kernel knows no RDMA device", "rdma link add");
    for (device, interface) in DEVICES {
        make_device(device, interface);
    }
}

/// The machine's devices are made of software: the library leaves them alone, and does not even load
/// libibverbs, unless one of them is named.
#[test]
fn verbs_over_software_is_used_only_by_name() {
    const NAME: &str = "verbs_over_software_is_used_only_by_name";
    if !in_the_machine(NAME) {
        return;
    }
    let _alone = serially();
    if !inside() {
        let output = outside(NAME, &[]);
        let said = String::from_utf8_lossy(&output.stdout);
        return said.lines().filter(|line| line.starts_with("AUTO")).for_each(note);
    }
    run_once("devices of software", async {
        let of = |config: Config| {
            let node = Node::new(config).expect("a node");
            let link = |kind| {
                let all = node.capabilities();
                all.into_iter().find(|c| c.link == kind).expect("it is told of")
            };
            let (verbs, ucx) = (link(LinkKind::Verbs), link(LinkKind::Ucx));
            (node, verbs, ucx)
        };
        let loaded = || {
            let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
            ["libibverbs", "libucp"].map(|library| maps.contains(library))
        };
        let (node, verbs, ucx) = of(Config::new());
        println!("\nAUTO verbs: {} (fix: {:?})", verbs.reason, verbs.fix);
        println!("AUTO ucx: {} (fix: {:?})", ucx.reason, ucx.fix);
        assert!(!verbs.present && verbs.reason.contains("rxe0 is soft-RoCE"), "{}", verbs.reason);
        assert!(verbs.fix.is_some_and(|fix| fix.contains("name verbs in THALWEG_TRANSPORTS")));
        assert!(!ucx.present && ucx.reason.contains("no hardware"), "{}", ucx.reason);
        assert_eq!(loaded(), [false; 2], "nothing is loaded to find that out");
        let rxe0 = |config: Config| config.verbs_devices(["rxe0"]);
        let listens = rxe0(Config::new().transports([LinkKind::Verbs, LinkKind::Tcp]));
        let other = Node::new(listens).expect("a node");
        let listener = other.listen("thalweg://127.0.0.1:0").await.expect("listening");
        let (a, _b) = thalweg_tests::connect(&node, &listener).await;
        assert_eq!(a.route().link(), LinkKind::Tcp, "{}", a.route());
        assert!(a.route().to_string().contains("rxe0 is soft-RoCE"), "{}", a.route());
        let (node, verbs, _) = of(rxe0(Config::new()));
        assert!(verbs.present && verbs.reason.contains("rxe0"), "{}", verbs.reason);
        assert!(!verbs.reason.contains("rxa"), "{}", verbs.reason);
        let (a, _b) = thalweg_tests::connect(&node, &listener).await;
        assert_eq!(a.route().link(), LinkKind::Verbs, "to name a device is to ask: {}", a.route());
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
    let (began, cut) = (Instant::now(), Cut::first());
    all_end(&mut peers, began);
    measured("wire cut to the last error", began.elapsed().as_secs_f64(), "s");
    drop(cut);
    for peer in peers {
        assert!(peer.finish(), "a peer failed");
    }
}

/// Of a message that goes by all rails.
const STRIPED_BYTES: usize = 2 << 20;
/// This side's devices for two rails, and the peer's.
const RAILS: [[&str; 2]; 2] = [["rxb", "rxd"], ["rxa", "rxc"]];

/// Another process that sends back what comes, and a node that may use so many rails to it.
fn to_be_railed(rails: usize) -> (Peer, String, Node) {
    let device = format!("device={}", RAILS[1].join("+"));
    let mut peer = Peer::start(&["echo", "way=Verbs", &device].map(str::to_owned));
    let config = Config::new().transports([LinkKind::Verbs]).verbs_devices(RAILS[0]);
    let node = Node::new(config.verbs_rails(rails)).expect("a node");
    let address = peer.said("LISTENING");
    (peer, address, node)
}

async fn railed(rails: usize) -> (Peer, String, Node, Endpoint) {
    let (peer, address, node) = to_be_railed(rails);
    let endpoint = node.connect(address.as_str()).await.expect("connected");
    (peer, address, node, endpoint)
}

/// Packets that have come to a device.
fn packets_at(device: &str) -> u64 {
    let file = format!("/sys/class/infiniband/{device}/ports/1/hw_counters/rcvd_pkts");
    std::fs::read_to_string(file).expect("counters").trim().parse().expect("a number")
}

/// Sends a message there and back, and compares it.
async fn there_and_back(endpoint: &Endpoint, seed: u64) -> Result<(), thalweg::Error> {
    let bytes = pattern(seed, STRIPED_BYTES);
    let (sent, got) = tokio::join!(endpoint.send(bytes), endpoint.recv());
    let got = got?.to_vec().expect("its bytes");
    sent?;
    check_pattern(seed, &got);
    Ok(())
}

#[test]
fn verbs_rails_share_long_messages() {
    if !in_the_machine("verbs_rails_share_long_messages") {
        return;
    }
    let _alone = serially();
    run_once("two rails", async {
        let rounds = short_or_long(3, 40);
        let mut rates = Vec::new();
        for rails in [1, 2] {
            let (_peer, _, _node, endpoint) = railed(rails).await;
            let route = endpoint.route().to_string();
            assert_eq!(route.contains("also at rxd:1"), rails == 2, "{route}");
            there_and_back(&endpoint, 0).await.expect("the first");
            let packets = || RAILS[0].map(packets_at);
            let counters = || endpoint.stats().link_counters;
            let (before, already, began) = (packets(), counters(), Instant::now());
            for _ in 0..rounds {
                let (sent, got) =
                    tokio::join!(endpoint.send(vec![1; STRIPED_BYTES]), endpoint.recv());
                sent.expect("sent");
                assert_eq!(got.expect("received").len_bytes(), STRIPED_BYTES);
            }
            let bytes = rounds * STRIPED_BYTES as u64;
            let rate = 2.0 * bytes as f64 / began.elapsed().as_secs_f64();
            measured("there and back, both ways", rate / 1e6, "MB/s");
            rates.push(rate);
            let came: Vec<u64> =
                packets().iter().zip(before).map(|(now, then)| now - then).collect();
            let counters = counters();
            let read = |rail: usize| {
                counters.rail_bytes_received[rail] - already.rail_bytes_received[rail]
            };
            assert_eq!((read(0) + read(1), read(2)), (bytes, 0));
            // Of data there are at least as many as it has packets of the largest size.
            let data = bytes / 4096;
            if rails == 1 {
                assert_eq!((read(1), came[1]), (0, 0));
            } else {
                assert!(read(0).min(read(1)) >= bytes / 4, "{counters:?}");
                assert!(came[0].min(came[1]) >= data / 4, "{came:?} packets");
            }
            note(format_args!("SOAK: {rails} rails: {came:?} packets, {counters:?}"));
        }
        measured("bandwidth of two rails, of one", rates[1] / rates[0], "");
    });
}

/// Something done to a wire, which commands of these tools undo when this is dropped.
struct Cut {
    /// What is to have an address then.
    device: &'static str,
    undo: Vec<(&'static str, Vec<&'static str>)>,
}

impl Cut {
    fn new(device: &'static str, words: &[&str], undo: &[(&'static str, &[&'static str])]) -> Cut {
        let undo = undo.iter().map(|(tool, words)| (*tool, words.to_vec())).collect();
        let (program, words) = words.split_first().expect("a command");
        let cut = Cut { device, undo };
        tool(program, words);
        cut
    }

    /// Between `rxa` and `rxb`.
    fn first() -> Cut {
        let route = ["route", "replace", "10.78.0.2", "dev", "va", "table", "200"];
        let undo: [(_, &[_]); 2] = [("IP", &["link", "set", "va", "up"]), ("IP", &route)];
        Cut::new("rxa", &["IP", "link", "set", "va", "down"], &undo)
    }

    /// Between `rxc` and `rxd`: the port is down.
    fn second() -> Cut {
        let route = ["route", "replace", "10.79.0.2", "dev", "vc", "table", "201"];
        let undo: [(_, &[_]); 2] = [("IP", &["link", "set", "vc", "up"]), ("IP", &route)];
        Cut::new("rxc", &["IP", "link", "set", "vc", "down"], &undo)
    }

    /// There, too: packets are lost, and the ports know nothing of it.
    fn second_unseen() -> Cut {
        let lose = ["TC", "qdisc", "replace", "dev", "vc", "root", "netem", "loss", "100%"];
        Cut::new("rxc", &lose, &[("TC", &["qdisc", "delete", "dev", "vc", "root"])])
    }

    /// There, too: only short packets arrive at one end.
    fn second_narrowed() -> Cut {
        let narrow = ["IP", "link", "set", "vd", "mtu", "1500"];
        Cut::new("rxd", &narrow, &[("IP", &["link", "set", "vd", "mtu", "9000"])])
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        for (variable, words) in &self.undo {
            if failed {
                // The tests after this one want the wire.
                let program = std::env::var(variable).unwrap_or_default();
                let _ = Command::new(program).args(words).status();
            } else {
                tool(variable, words);
            }
        }
        if !failed {
            wait_for_address(self.device);
        }
    }
}

/// Messages go on though the second of two wires is cut while they move.
fn cut_mid_transfer(test: &'static str, cut: fn() -> Cut) {
    if !in_the_machine(test) {
        return;
    }
    let _alone = serially();
    run_once(test, async {
        let (_peer, address, node, endpoint) = railed(2).await;
        assert!(endpoint.route().to_string().contains("also at rxd:1"), "{}", endpoint.route());
        let moved = Arc::new(AtomicU64::new(0));
        let moving = {
            let (endpoint, moved) = (endpoint.clone(), moved.clone());
            tokio::spawn(async move {
                loop {
                    let seed = moved.load(Ordering::SeqCst);
                    there_and_back(&endpoint, seed).await.expect("the other wire carries it");
                    moved.store(seed + 1, Ordering::SeqCst);
                }
            })
        };
        let by_second = || endpoint.stats().link_counters.rail_bytes_received[1];
        until("some messages", || moved.load(Ordering::SeqCst) > 1 && by_second() > 0).await;
        let (began, cut) = (Instant::now(), cut());
        // What was under way by that one is there as well.
        let then = moved.load(Ordering::SeqCst);
        let going_on = async {
            while moved.load(Ordering::SeqCst) < then + 4 {
                assert!(!moving.is_finished(), "the cut ends the connection");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        within(LOST_MAX, "the next messages", going_on).await;
        measured(test, began.elapsed().as_secs_f64(), "s to the fourth message");
        let (before, at) = (by_second(), moved.load(Ordering::SeqCst));
        until("one more", || moved.load(Ordering::SeqCst) > at).await;
        assert_eq!(by_second(), before, "the port that is down is still used");
        moving.abort();
        assert!(moving.await.is_err_and(|why| why.is_cancelled()), "a message was lost");
        drop(endpoint);
        // What is left carries the next connection.
        let began = Instant::now();
        let again = node.connect(address.as_str()).await.expect("connected");
        measured("connecting where a rail is cut", began.elapsed().as_secs_f64(), "s");
        let route = again.route().to_string();
        assert!(route.contains("rxb:1") && !route.contains("also at"), "{route}");
        there_and_back(&again, 99).await.expect("moved");
        drop(cut);
    });
}

#[test]
fn verbs_rail_port_goes_down_mid_transfer() {
    cut_mid_transfer("verbs_rail_port_goes_down_mid_transfer", Cut::second);
}

#[test]
fn verbs_rail_cut_mid_transfer() {
    cut_mid_transfer("verbs_rail_cut_mid_transfer", Cut::second_unseen);
}

#[test]
fn verbs_rail_that_swallows_long_packets_is_left_out() {
    if !in_the_machine("verbs_rail_that_swallows_long_packets_is_left_out") {
        return;
    }
    let _alone = serially();
    run_once("a rail swallows long packets", async {
        // Both say what they can before that changes.
        let (_peer, address, node) = to_be_railed(2);
        let narrowed = Cut::second_narrowed();
        let endpoint = node.connect(address.as_str()).await.expect("connected");
        let route = endpoint.route().to_string();
        assert!(route.contains("rxb:1") && !route.contains("also at"), "{route}");
        for seed in 0..3 {
            there_and_back(&endpoint, seed).await.expect("moved");
        }
        drop(narrowed);
        let again = node.connect(address.as_str()).await.expect("connected");
        assert!(again.route().to_string().contains("also at rxd:1"), "{}", again.route());
        there_and_back(&again, 9).await.expect("moved");
    });
}

/// What happens to the device of one of two nodes while both use it.
fn lose_a_device(name: &str, lose: impl Fn() -> Option<Child>, restore: impl Fn()) {
    if !in_the_machine(name) {
        return;
    }
    let _alone = serially();
    run_once(name, async {
        let config = |device: &str| {
            Config::new().transports([LinkKind::Verbs, LinkKind::Tcp]).verbs_devices([device])
        };
        let nodes = ["rxa", "rxb"].map(|device| Node::new(config(device)).expect("a node"));
        let listener = nodes[1].listen("thalweg://127.0.0.1:0").await.expect("listening");
        let (a, b) = thalweg_tests::connect(&nodes[0], &listener).await;
        assert_eq!(a.route().link(), LinkKind::Verbs, "{}", a.route());
        let region = nodes[1].register(vec![0u8; LONG_BYTES], Access::ReadWrite).expect("region");
        put_until_direct(&a, &region.key()).await;
        let mut errors = Vec::new();
        let lost = {
            let putting = {
                let (from, key) = (a.clone(), region.key());
                async move {
                    let mut buffer = vec![7u8; LONG_BYTES];
                    loop {
                        match from.put(buffer, &key, 0).await {
                            Ok(again) => buffer = again,
                            Err(failed) => return failed.error,
                        }
                    }
                }
            };
            let streaming = |from: &Endpoint| {
                let from = from.clone();
                async move {
                    loop {
                        if let Err(failed) = from.send(vec![7u8; LONG_BYTES]).await {
                            return failed.error;
                        }
                    }
                }
            };
            let reading = |at: &Endpoint| {
                let at = at.clone();
                async move {
                    loop {
                        if let Err(error) = at.recv().await {
                            return error;
                        }
                    }
                }
            };
            let ends = tokio::spawn(futures_util::future::join5(
                putting,
                streaming(&a),
                reading(&a),
                streaming(&b),
                reading(&b),
            ));
            let waiting = a.tag_recv(1, u64::MAX, vec![0; 64]);
            // The device's driver is the kernel's own, on emulated processors, and is kept busy by
            // the puts: five messages of 1 MiB have taken eight seconds.
            let some = || a.stats().messages_received > 1;
            thalweg_tests::until_in(3 * LOST_MAX, "some messages", some).await;
            let (began, lost) = (Instant::now(), lose());
            let (ends, waiting) = tokio::time::timeout(LOST_MAX, async {
                (ends.await.expect("its end"), waiting.await)
            })
            .await
            .expect("an operation still waits");
            measured(name, began.elapsed().as_secs_f64(), "s to the last error");
            errors.extend([ends.0, ends.1, ends.2, ends.3, ends.4]);
            errors.push(waiting.expect_err("nobody sent it").error);
            lost
        };
        for error in &errors {
            note(format_args!("{name}: {error}"));
            let kind = error.kind();
            assert!(matches!(kind, ErrorKind::ConnectionLost | ErrorKind::PeerGone), "{error}");
        }
        let revoked =
            within(LOST_MAX, "the region's memory", region.revoke()).await.expect("revoked");
        assert_eq!(revoked.len(), LONG_BYTES);
        drop((a, b));
        // The nodes go on, without the device.
        let (a, b) = thalweg_tests::connect(&nodes[0], &listener).await;
        assert_eq!(a.route().link(), LinkKind::Tcp, "{}", a.route());
        let (sent, got) = tokio::join!(a.send(vec![1u8; 70_000]), b.recv());
        sent.expect("sending");
        assert_eq!(got.expect("receiving").len_bytes(), 70_000);
        if let Some(mut lost) = lost {
            // Nothing holds it any more, though the node is there.
            thalweg_tests::until("the device to go", || {
                lost.try_wait().expect("its status").is_some_and(|status| status.success())
            })
            .await;
        }
    });
    restore();
}

#[test]
fn verbs_device_is_removed() {
    let remove = || {
        let program = std::env::var("RDMA").expect("the machine says where its tools are");
        // It waits until nobody uses the device.
        Some(Command::new(program).args(["link", "delete", "rxb"]).spawn().expect("rdma"))
    };
    lose_a_device("verbs_device_is_removed", remove, || make_device("rxb", "vb"));
}

#[test]
fn verbs_port_goes_down() {
    let cut = std::cell::Cell::new(None);
    let down = || {
        cut.set(Some(Cut::first()));
        None
    };
    lose_a_device("verbs_port_goes_down", down, || drop(cut.take()));
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
