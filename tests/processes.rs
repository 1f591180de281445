//! What needs processes of its own: fork, other users and namespaces, exhausted descriptors, a
//! peer whose memory may not be read; and a host with its own event loop.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use support::processor_percent;
use thalweg::{
    Access, Cancel, CloseReason, Config, Endpoint, ErrorKind, LinkKind, Message, MockPlan,
    MockSwitch, Node, RemoteKey, Verdict,
};
use thalweg_tests::{
    Way, check_pattern, connect, pair, pattern, poll_times, run_once, skipped, until, within,
};

const NOBODY: u32 = 65534;
const BULK: usize = 3_000_000;
const LIMIT: Duration = Duration::from_secs(20);

fn am_root() -> bool {
    // SAFETY: has no preconditions.
    unsafe { libc::geteuid() == 0 }
}

/// A child process that plays `role`; see `role`.
fn play(role: &str, settings: &[(&str, &str)]) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command
        .args(["--exact", "role", "--ignored", "--nocapture", "--test-threads", "1"])
        .env("THALWEG_TEST_ROLE", role)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    for (name, value) in settings {
        command.env(format!("THALWEG_TEST_{name}"), value);
    }
    command
}

fn setting(name: &str) -> Option<String> {
    std::env::var(format!("THALWEG_TEST_{name}")).ok()
}

/// A child that is killed when the test ends, however it ends.
struct Played {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Played {
    fn start(mut command: Command) -> std::io::Result<Played> {
        let mut child = command.spawn()?;
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        Ok(Played { child, lines })
    }

    /// Lets the child go on from where it waits to be told.
    fn tell(&mut self) {
        let mut stdin = self.child.stdin.as_ref().expect("piped");
        stdin.write_all(b"\n").expect("the child listens");
    }

    /// What the child says after `key`; ends with the child.
    fn hear(&mut self, key: &str) -> Option<String> {
        for line in self.lines.by_ref() {
            let line = line.ok()?;
            // The test program's own words may stand before.
            if let Some(at) = line.find(&format!("@{key} ")) {
                return Some(line[at + key.len() + 2..].to_owned());
            }
        }
        None
    }
}

impl Drop for Played {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test: what child processes do. `listen` prints its address; `connect` connects to
/// ADDRESS; then both send the other a large message and print how what they got was moved.
#[test]
#[ignore = "played by child processes"]
fn role() {
    let Some(role) = setting("ROLE") else { return };
    if setting("DUMPABLE").as_deref() == Some("0") {
        forbid_reading();
    }
    if let Some(call) = setting("FORBIDDEN") {
        let forbidden = forbid_call(call.parse().expect("a number"));
        println!("@FORBIDDEN {}", forbidden.is_ok());
    }
    match role.as_str() {
        "listen" | "connect" => run_once("role", talk()),
        "few" => run_once("role", few_descriptors()),
        "few_listen" => run_once("role", listens_with_few_descriptors()),
        "landing" => run_once("role", lands_midway()),
        "withdrawing" => run_once("role", withdraws_midway()),
        "scribble" => run_once("role", scribbles()),
        "flood" => run_once("role", floods()),
        "offer" => run_once("role", offers()),
        other => panic!("no role {other}"),
    }
}

/// Nobody but root may read this process's memory from here on.
fn forbid_reading() {
    // SAFETY: takes plain numbers.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) }, 0);
}

/// A system call is refused from here on, to this thread and those that it starts, as the sandbox of
/// a container does.
fn forbid_call(number: u32) -> std::io::Result<()> {
    let statement =
        |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    // The call's number is the first word of what the filter is shown.
    let mut program = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, number),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: takes plain numbers, then a program that lives until the call has copied it.
    let set = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
    };
    if set { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Blocks the thread until the test says so.
fn wait_to_be_told() {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("the test talks");
    assert!(!line.is_empty(), "the test is gone");
}

/// Listens at ADDRESS if it has no port, and otherwise connects to it.
async fn endpoint_at(node: &Node) -> Endpoint {
    let address = setting("ADDRESS").expect("set");
    if address.ends_with(":0") {
        let listener = node.listen(address).await.expect("listening");
        println!("@ADDRESS {}", listener.address());
        listener.accept().await.expect("accepting")
    } else {
        node.connect(address).await.expect("connecting")
    }
}

async fn talk() {
    let node = Node::new(Config::new().loans(false)).expect("a node");
    let endpoint = endpoint_at(&node).await;
    println!("@ROUTE {}", endpoint.route().to_string().replace('\n', " | "));
    exchange(&endpoint).await;
    let counters = endpoint.stats().link_counters;
    println!(
        "@MOVED {} {} {}",
        endpoint.route().link(),
        counters.single_copy_bytes_received,
        counters.arena_bytes_received
    );
    // The other side may have closed already.
    let _ = endpoint.close(thalweg::CloseReason::default()).await;
}

async fn exchange(endpoint: &Endpoint) {
    let (sent, got) = tokio::join!(endpoint.send(pattern(1, BULK)), endpoint.recv());
    sent.expect("sending");
    check_pattern(1, &got.expect("receiving").to_vec().expect("bytes"));
    let (sent, got) = tokio::join!(
        endpoint.tag_send(1, pattern(2, BULK)),
        endpoint.tag_recv(1, u64::MAX, vec![0; BULK])
    );
    sent.expect("sending");
    check_pattern(2, &got.expect("receiving").buffer);
    endpoint.fence().await.expect("a fence");
    // Whoever closes now does not do so before the other's fence is answered.
    let (sent, got) = tokio::join!(endpoint.send(b"end"), endpoint.recv());
    sent.expect("sending");
    assert_eq!(got.expect("receiving").len_bytes(), 3);
}

fn moved(played: &mut Played) -> (String, u64, u64) {
    let line = played.hear("MOVED").expect("the child talks to its end");
    let mut words = line.split(' ');
    let link = words.next().expect("a link").to_owned();
    let mut number = || words.next().and_then(|word| word.parse().ok()).expect("a number");
    (link, number(), number())
}

/// Both sides run as nobody; one, the other or both may not be read.
#[test]
fn memory_that_may_not_be_read() {
    let name = "memory_that_may_not_be_read";
    if !am_root() {
        return skipped(name, "must be root to become nobody");
    }
    for (listen, connect) in [("1", "1"), ("0", "1"), ("1", "0"), ("0", "0")] {
        let mut command =
            play("listen", &[("ADDRESS", "thalweg://127.0.0.1:0"), ("DUMPABLE", listen)]);
        command.uid(NOBODY).gid(NOBODY);
        let Ok(mut listener) = Played::start(command) else {
            return skipped(name, "this program cannot be run by nobody");
        };
        let address = listener.hear("ADDRESS").expect("it listens");
        let mut command = play("connect", &[("ADDRESS", &address), ("DUMPABLE", connect)]);
        command.uid(NOBODY).gid(NOBODY);
        let mut connector = Played::start(command).expect("as before");
        let route = connector.hear("ROUTE").expect("a route");
        let (link, single, arena) = moved(&mut connector);
        assert_eq!(link, "shm", "{route}");
        // exec made them dumpable again, and so readable, unless they said otherwise.
        let readable = |dumpable: &str| dumpable == "1";
        assert_eq!(single > 0, readable(listen), "connector {listen}{connect}: {route}");
        assert_eq!(arena > 0, !readable(listen), "connector {listen}{connect}: {route}");
        let (_, single, arena) = moved(&mut listener);
        assert_eq!(single > 0, readable(connect), "listener {listen}{connect}: {route}");
        assert_eq!(arena > 0, !readable(connect), "listener {listen}{connect}: {route}");
    }
}

/// A sandbox that forbids what shared memory needs. Without `memfd_create` it is TCP, with the
/// reason; without `process_vm_readv` only what would have been read goes through the arena.
#[test]
fn calls_forbidden_by_a_sandbox() {
    let name = "calls_forbidden_by_a_sandbox";
    for (call, link) in [(libc::SYS_memfd_create, "tcp"), (libc::SYS_process_vm_readv, "shm")] {
        let call = call.to_string();
        for [of_listener, of_connector] in [["", &call], [&call, ""]] {
            let start = |role: &str, address: &str, forbidden: &str| {
                let mut settings = vec![("ADDRESS", address)];
                settings.extend((!forbidden.is_empty()).then_some(("FORBIDDEN", forbidden)));
                let mut played = Played::start(play(role, &settings)).expect("it runs");
                let may = forbidden.is_empty() || played.hear("FORBIDDEN")? == "true";
                may.then_some(played)
            };
            let Some(mut listener) = start("listen", "thalweg://127.0.0.1:0", of_listener) else {
                return skipped(name, "no filter of system calls can be set here");
            };
            let address = listener.hear("ADDRESS").expect("it listens");
            let Some(mut connector) = start("connect", &address, of_connector) else {
                return skipped(name, "no filter of system calls can be set here");
            };
            for (played, forbidden) in
                [(&mut listener, of_listener), (&mut connector, of_connector)]
            {
                let route = played.hear("ROUTE").expect("a route");
                let (moved, single, arena) = moved(played);
                assert_eq!(moved, link, "{route}");
                if link == "tcp" {
                    let reason = ["memfd", "does not offer"][usize::from(forbidden.is_empty())];
                    assert!(route.contains(reason), "{reason}: {route}");
                } else {
                    // Who may not read asks the other side to stage; that one reads on.
                    assert_eq!(single > 0, forbidden.is_empty(), "{route}");
                    assert_eq!(arena > 0, !forbidden.is_empty(), "{route}");
                }
            }
        }
    }
}

/// Sends long messages until the other side ends.
async fn floods() {
    let node = Node::new(Config::new().transports([LinkKind::Shm])).expect("a node");
    let endpoint = endpoint_at(&node).await;
    while endpoint.send(pattern(1, 8 << 20)).await.is_ok() {}
}

fn signal(played: &Played, signal: libc::c_int) {
    let process = played.child.id() as libc::pid_t;
    // SAFETY: takes plain numbers; the child has not been waited for, so the number is its own.
    assert_eq!(unsafe { libc::kill(process, signal) }, 0);
}

/// Stops the child, and returns when it has.
fn stop(played: &Played) {
    signal(played, libc::SIGSTOP);
    let mut status = 0;
    // SAFETY: the child is this process's; `status` is a local.
    let waited = unsafe {
        libc::waitpid(played.child.id() as libc::pid_t, &raw mut status, libc::WUNTRACED)
    };
    assert!(waited > 0 && libc::WIFSTOPPED(status), "it has ended: {status}");
}

/// Registers memory, and tells the other side about it; then lives until that ends.
async fn offers() {
    let node = Node::new(Config::new().transports([way_of_child()])).expect("a node");
    let endpoint = endpoint_at(&node).await;
    let region = node.register(pattern(9, BULK), Access::Read).expect("a region");
    endpoint.send(region.key().to_bytes().to_vec()).await.expect("sending");
    let _ = endpoint.recv().await;
}

fn way_of_child() -> LinkKind {
    LinkKind::from_name(&setting("TRANSPORT").expect("set")).expect("a link")
}

/// A get from a process that is stopped can be given up, and its memory is free at once; the answer
/// comes in the end, and goes nowhere.
#[test]
fn a_get_from_a_process_that_is_stopped() {
    run_once("a_get_from_a_process_that_is_stopped", async {
        for link in [LinkKind::Tcp, LinkKind::Shm] {
            let node = Node::new(Config::new().transports([link])).expect("a node");
            let listener = node.listen("thalweg://127.0.0.1:0").await.expect("listening");
            let address = listener.address().to_string();
            let settings = [("ADDRESS", address.as_str()), ("TRANSPORT", link.name())];
            let offers = Played::start(play("offer", &settings)).expect("it runs");
            let endpoint = listener.accept().await.expect("accepting");
            let key = endpoint.recv().await.expect("receiving").to_vec().expect("bytes");
            let key = RemoteKey::from_bytes(&key).expect("a key");
            stop(&offers);
            for (len, withdraws) in [(BULK, true), (8, true), (BULK, false)] {
                let get = endpoint.get(vec![7; len], &key, 0);
                let buffer = if withdraws {
                    let mut get = get;
                    poll_times(&mut get, 2).await;
                    let cancelled = within(LIMIT, "cancelling a get", get.cancel()).await;
                    let Cancel::Cancelled(buffer) = cancelled else { panic!("it had begun") };
                    buffer
                } else {
                    let timed = get.timeout(Duration::from_millis(50));
                    let failed = within(LIMIT, "a late get", timed).await.expect_err("stopped");
                    assert_eq!(failed.error.kind(), ErrorKind::TimedOut);
                    failed.buffer.expect("given back")
                };
                assert!(buffer == vec![7; len], "nothing had come");
            }
            signal(&offers, libc::SIGCONT);
            // The answers to the others come before this one's.
            let got = endpoint.get(vec![0; BULK], &key, 0).await.expect("a get");
            check_pattern(9, &got);
            endpoint.fence().await.expect("a fence");
            assert_eq!(endpoint.stats().operations, 0);
        }
    });
}

/// A sender that is stopped where it writes the receiver's memory: nobody waits for it, and what it
/// may still write is kept until it has gone on.
#[test]
fn a_sender_that_is_stopped_while_both_copy() {
    run_once("a_sender_that_is_stopped_while_both_copy", async {
        let mut kept = 0;
        for round in 0..10 {
            let node = Node::new(Config::new().transports([LinkKind::Shm])).expect("a node");
            let listener = node.listen("thalweg://127.0.0.1:0").await.expect("listening");
            let address = listener.address().to_string();
            let flood = Played::start(play("flood", &[("ADDRESS", &address)])).expect("it runs");
            let endpoint = listener.accept().await.expect("accepting");
            for _ in 0..=round % 4 {
                let message = endpoint.recv().await.expect("receiving");
                check_pattern(1, &message.to_vec().expect("bytes"));
            }
            // In the middle of the next one.
            poll_times(&mut endpoint.recv(), 1).await;
            stop(&flood);
            endpoint.abort();
            within(Duration::from_secs(5), "the end", async {
                while endpoint.recv().await.is_ok() {}
                endpoint.closed().await;
            })
            .await;
            kept += node.stats().endpoints;
            match round % 2 {
                0 => signal(&flood, libc::SIGCONT),
                _ => signal(&flood, libc::SIGKILL),
            }
            until("what was kept is let go of", || node.stats().endpoints == 0).await;
        }
        println!("MEASURED: landings kept for a stopped sender, of 10: {kept}");
    });
}

/// Overwrites the ring that it writes, and tries to shrink memory that it shares.
async fn scribbles() {
    let node = Node::new(Config::new()).expect("a node");
    let endpoint = endpoint_at(&node).await;
    let mut loan = node.loan(100_000).expect("a loan");
    loan.copy_from_slice(&pattern(4, 100_000));
    endpoint.send(loan).await.expect("sending");
    let mut sealed = 0;
    for entry in std::fs::read_dir("/proc/self/fd").expect("descriptors").flatten() {
        let link = std::fs::read_link(entry.path()).unwrap_or_default();
        if link.to_string_lossy().contains("memfd:thalweg") {
            let fd: i32 = entry.file_name().to_string_lossy().parse().expect("a number");
            // SAFETY: takes plain numbers; the memory stays as long as it is, as is found here.
            assert_eq!(unsafe { libc::ftruncate(fd, 0) }, -1, "it can be shrunk");
            sealed += 1;
        }
    }
    assert!(sealed > 0, "the loan lies in memory of the kind");
    let maps = std::fs::read_to_string("/proc/self/maps").expect("mappings");
    let ring = |line: &&str| line.contains("memfd:thalweg-ring") && line.contains("rw-s");
    let ring = maps.lines().find(ring).expect("the ring that it writes");
    let range = ring.split(' ').next().and_then(|range| range.split_once('-'));
    let (start, end) = range.expect("a range");
    let [start, end] = [start, end].map(|hex| usize::from_str_radix(hex, 16).expect("hex"));
    // All but the line that says that it lets go of its memory: that would be an honest end.
    let scribbled = std::ptr::with_exposed_provenance_mut::<u8>(start + 64);
    // SAFETY: the mapping as the kernel lists it, which this process may write; the link that it
    // belongs to consists of atomic integers there, and is not used any more.
    unsafe { std::ptr::write_bytes(scribbled, 0xa5, end - start - 64) };
    println!("@SCRIBBLED ");
    // Not even the node's task runs.
    wait_to_be_told();
    std::process::exit(0);
}

/// A peer that writes nonsense all over its ring costs its own endpoint, and nothing else.
#[test]
fn a_peer_that_scribbles_over_its_ring() {
    run_once("a_peer_that_scribbles_over_its_ring", async {
        let config = || Config::new().transports([LinkKind::Shm]);
        let node = Node::new(config()).expect("a node");
        let listener = node.listen("thalweg://127.0.0.1:0").await.expect("listening");
        let address = listener.address().to_string();
        let mut wicked = Played::start(play("scribble", &[("ADDRESS", &address)])).expect("runs");
        let endpoint = listener.accept().await.expect("accepting");
        check_pattern(4, &endpoint.recv().await.expect("received").to_vec().expect("bytes"));
        let (mut waiting, mut tagged) = (endpoint.recv(), endpoint.tag_recv(1, 0, vec![0; 8]));
        assert!(poll_times(&mut waiting, 2).await.is_none());
        assert!(poll_times(&mut tagged, 2).await.is_none());
        let wicked = tokio::task::spawn_blocking(move || {
            wicked.hear("SCRIBBLED").expect("it scribbles");
            wicked
        });
        let wicked = wicked.await.expect("no panic");
        // It is found out at the latest when the ring is full.
        let sending = async {
            loop {
                if let Err(failed) = endpoint.send(Message::copy_from_slice(b"x")).await {
                    return failed.error;
                }
            }
        };
        let error = within(Duration::from_secs(20), "finding out", sending).await;
        assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
        assert_eq!(waiting.await.expect_err("it is over").kind(), ErrorKind::Protocol);
        assert_eq!(tagged.await.expect_err("it is over").kind(), ErrorKind::Protocol);
        until("the endpoint to be gone", || node.stats().endpoints == 0).await;
        drop(wicked);
        // The node goes on.
        let other = Node::new(config()).expect("a node");
        let (a, b) = thalweg_tests::connect(&other, &listener).await;
        a.send(pattern(5, BULK)).await.expect("sending");
        check_pattern(5, &b.recv().await.expect("receiving").to_vec().expect("bytes"));
    });
}

/// More than is read in one turn, many times over.
const LONG: usize = 64 << 20;

fn midway() -> Config {
    Config::new().loans(false).wake(thalweg::Wake::Park).transports([LinkKind::Shm])
}

/// Receives a long message, and stops when a part of it has been read; goes on when told.
async fn lands_midway() {
    let node = Node::new(midway()).expect("a node");
    let endpoint = endpoint_at(&node).await;
    let mut receiving = endpoint.recv();
    let single = || endpoint.stats().link_counters.single_copy_bytes_received;
    while single() == 0 {
        assert!(poll_times(&mut receiving, 1).await.is_none(), "all at once");
    }
    println!("@PARTLY {}", single());
    wait_to_be_told();
    check_pattern(3, &receiving.await.expect("receiving").to_vec().expect("bytes"));
    let counters = endpoint.stats().link_counters;
    println!("@LANDED {} {}", counters.single_copy_bytes_received, counters.arena_bytes_received);
    // The next one comes through the arena from its beginning, and the way back is as it was.
    exchange(&endpoint).await;
    let last = endpoint.stats().link_counters;
    println!("@AFTER {}", last.single_copy_bytes_received - counters.single_copy_bytes_received);
    // The other side may have closed already.
    let _ = endpoint.close(thalweg::CloseReason::default()).await;
}

/// Sends it, and forbids its memory to be read when told.
async fn withdraws_midway() {
    let node = Node::new(midway()).expect("a node");
    let endpoint = endpoint_at(&node).await;
    let told = tokio::task::spawn_blocking(|| {
        wait_to_be_told();
        forbid_reading();
        println!("@WITHDRAWN ");
    });
    endpoint.send(pattern(3, LONG)).await.expect("sending");
    told.await.expect("no panic");
    exchange(&endpoint).await;
    println!("@AFTER {}", endpoint.stats().link_counters.single_copy_bytes_received);
    let _ = endpoint.close(thalweg::CloseReason::default()).await;
}

/// The permission to read a peer's memory is withdrawn in the middle of a message: the rest of it,
/// and all that follows in that direction, comes through the arena; not a byte is wrong.
#[test]
fn reading_forbidden_midway() {
    let name = "reading_forbidden_midway";
    if !am_root() {
        return skipped(name, "must be root to become nobody");
    }
    for [first, second] in [["landing", "withdrawing"], ["withdrawing", "landing"]] {
        let start = |role: &str, address: &str| {
            let mut command = play(role, &[("ADDRESS", address)]);
            command.uid(NOBODY).gid(NOBODY);
            Played::start(command)
        };
        let Ok(mut listening) = start(first, "thalweg://127.0.0.1:0") else {
            return skipped(name, "this program cannot be run by nobody");
        };
        let address = listening.hear("ADDRESS").expect("it listens");
        let mut connecting = start(second, &address).expect("as before");
        let (landing, withdrawing) = match first {
            "landing" => (&mut listening, &mut connecting),
            _ => (&mut connecting, &mut listening),
        };
        let number = |word: &str| word.parse::<u64>().expect("a number");
        let partly = number(&landing.hear("PARTLY").expect("it begins"));
        assert!((1..LONG as u64).contains(&partly), "{partly} bytes at once");
        withdrawing.tell();
        withdrawing.hear("WITHDRAWN").expect("it forbids");
        landing.tell();
        let landed = landing.hear("LANDED").expect("it arrives");
        let (single, arena) = landed.split_once(' ').expect("two numbers");
        assert_eq!((number(single), number(arena)), (partly, LONG as u64 - partly));
        assert_eq!(number(&landing.hear("AFTER").expect("it goes on")), 0);
        let back = number(&withdrawing.hear("AFTER").expect("it goes on"));
        assert_eq!(back, 2 * BULK as u64, "the way back is as it was");
    }
}

/// A different user on the same host: TCP, and the route says why.
#[test]
fn another_user() {
    let name = "another_user";
    if !am_root() {
        return skipped(name, "must be root to become another user");
    }
    run_once(name, async {
        let node = Node::new(Config::new()).expect("a node");
        let listener = node.listen("thalweg://127.0.0.1:0").await.expect("listening");
        let address = listener.address().to_string();
        let mut command = play("connect", &[("ADDRESS", &address)]);
        command.uid(NOBODY).gid(NOBODY);
        let Ok(mut other) = Played::start(command) else {
            return skipped(name, "this program cannot be run by nobody");
        };
        let endpoint = listener.accept().await.expect("accepting");
        let route = endpoint.route();
        assert_eq!(route.link(), LinkKind::Tcp, "{route}");
        let shm = route.candidates.iter().find(|c| c.link == LinkKind::Shm).expect("listed");
        assert_eq!(shm.verdict, Verdict::Rejected);
        assert!(shm.reason.contains("user"), "{route}");
        exchange(&endpoint).await;
        let moved = tokio::task::spawn_blocking(move || moved(&mut other)).await.expect("moved");
        assert_eq!(moved.0, "tcp");
    });
}

fn ip(words: &str) -> Result<(), String> {
    let output = Command::new("ip").args(words.split(' ')).output().map_err(|e| e.to_string())?;
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if output.status.success() { Ok(()) } else { Err(format!("ip {words}: {text}")) }
}

/// A network namespace with a cable to this one; both are removed when dropped.
struct Namespace(String);

impl Namespace {
    fn new() -> Result<Namespace, String> {
        let name = format!("thw{}", std::process::id());
        ip(&format!("netns add {name}"))?;
        let made = Namespace(name.clone());
        ip(&format!("link add {name}a type veth peer name {name}b netns {name}"))?;
        ip(&format!("addr add 10.213.77.1/30 dev {name}a"))?;
        ip(&format!("link set {name}a up"))?;
        ip(&format!("-n {name} addr add 10.213.77.2/30 dev {name}b"))?;
        ip(&format!("-n {name} link set {name}b up"))?;
        ip(&format!("-n {name} link set lo up"))?;
        Ok(made)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The cable may not have come to be.
        let _ = ip(&format!("link del {}a", self.0));
        let _ = ip(&format!("netns del {}", self.0));
    }
}

#[test]
fn another_network_namespace() {
    let name = "another_network_namespace";
    let namespace = match Namespace::new() {
        Ok(namespace) => namespace,
        Err(reason) => return skipped(name, &reason),
    };
    run_once(name, async {
        let node = Node::new(Config::new()).expect("a node");
        let listener = node.listen("thalweg://10.213.77.1:0").await.expect("listening");
        let address = listener.address().to_string();
        let inner = play("connect", &[("ADDRESS", &address)]);
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &namespace.0]).arg(inner.get_program());
        command.args(inner.get_args()).stdin(Stdio::piped()).stdout(Stdio::piped());
        for (key, value) in inner.get_envs() {
            command.env(key, value.expect("set"));
        }
        let mut other = Played::start(command).expect("ip works");
        let accepting = within(Duration::from_secs(20), "accepting", listener.accept());
        let endpoint = accepting.await.expect("accepting");
        let route = endpoint.route();
        assert_eq!(route.link(), LinkKind::Tcp, "{route}");
        let shm = route.candidates.iter().find(|c| c.link == LinkKind::Shm).expect("listed");
        assert_eq!(shm.verdict, Verdict::Rejected);
        assert!(shm.reason.contains("namespace"), "{route}");
        exchange(&endpoint).await;
        let moved = tokio::task::spawn_blocking(move || moved(&mut other)).await.expect("moved");
        assert_eq!(moved.0, "tcp");
    });
}

/// Another process namespace of the same host and network: TCP, and the route says why.
#[test]
fn another_process_namespace() {
    let name = "another_process_namespace";
    let unshare = |words: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child"]).args(words);
        command
    };
    for ways in [&[][..], &["--mount-proc"]] {
        match unshare(ways).arg("true").output() {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                return skipped(name, &format!("no process namespace can be made: {why}"));
            }
            Err(error) => return skipped(name, &format!("cannot run unshare: {error}")),
        }
        run_once(name, async {
            let node = Node::new(Config::new()).expect("a node");
            let listener = node.listen("thalweg://127.0.0.1:0").await.expect("listening");
            let address = listener.address().to_string();
            let inner = play("connect", &[("ADDRESS", &address)]);
            let mut command = unshare(ways);
            command.arg(inner.get_program()).args(inner.get_args());
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
            for (key, value) in inner.get_envs() {
                command.env(key, value.expect("set"));
            }
            let mut other = Played::start(command).expect("unshare works");
            let accepting = within(Duration::from_secs(20), "accepting", listener.accept());
            let endpoint = accepting.await.expect("accepting");
            let route = endpoint.route();
            assert_eq!(route.link(), LinkKind::Tcp, "{route}");
            let shm = route.candidates.iter().find(|c| c.link == LinkKind::Shm).expect("listed");
            assert_eq!(shm.verdict, Verdict::Rejected);
            assert!(shm.reason.contains("process namespace"), "{route}");
            exchange(&endpoint).await;
            let moved = tokio::task::spawn_blocking(move || {
                let said = other.hear("ROUTE").expect("a route");
                assert!(said.contains("process namespace"), "{said}");
                moved(&mut other)
            });
            assert_eq!(moved.await.expect("moved").0, "tcp");
        });
    }
}

/// In a child with few descriptors: connecting fails with the right error, what is up goes on, and
/// all is well once descriptors are free again.
async fn few_descriptors() {
    let node = Node::new(Config::new()).expect("a node");
    let address = setting("ADDRESS").expect("set");
    let limit = libc::rlimit { rlim_cur: 64, rlim_max: 64 };
    // SAFETY: reads a local of the right type.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
    let mut ends = Vec::new();
    let error = loop {
        match node.connect(address.as_str()).await {
            Ok(end) => ends.push(end),
            Err(error) => break error,
        }
        assert!(ends.len() < 64, "each takes a descriptor");
    };
    println!("@FULL {:?} {error}", error.kind());
    for end in &ends {
        end.send(Message::copy_from_slice(b"x")).await.expect("sending");
        end.fence().await.expect("a fence");
    }
    drop(ends);
    until("the endpoints to end", || node.stats().endpoints == 0).await;
    let again = node.connect(address.as_str()).await;
    println!("@AGAIN {}", again.is_ok());
}

#[test]
fn descriptors_exhausted() {
    run_once("descriptors_exhausted", async {
        let node = Node::new(Config::new()).expect("a node");
        let listener = node.listen("thalweg://127.0.0.1:0").await.expect("listening");
        let address = listener.address().to_string();
        let child = tokio::task::spawn_blocking(move || {
            let mut child = Played::start(play("few", &[("ADDRESS", &address)])).expect("it runs");
            let full = child.hear("FULL").expect("it runs out of descriptors");
            assert!(full.starts_with("Resources"), "{full}");
            assert!(full.contains("ulimit"), "{full}");
            assert_eq!(child.hear("AGAIN").as_deref(), Some("true"));
        });
        let accepting = async {
            let mut ends = Vec::new();
            loop {
                ends.push(listener.accept().await.expect("accepting"));
            }
        };
        tokio::select! {
            child = child => child.expect("no panic"),
            () = accepting => {}
        }
    });
}

/// How many descriptors this process has open, as far as it may have any.
fn open_descriptors() -> usize {
    let open = |fd: &i32| {
        // SAFETY: only asks about a number.
        unsafe { libc::fcntl(*fd, libc::F_GETFD) >= 0 }
    };
    (0..FEW).filter(open).count()
}

/// The limit of those who have few.
const FEW: i32 = 64;

/// Listens with few descriptors, runs out of them, and recovers.
async fn listens_with_few_descriptors() {
    let node = Node::new(Config::new()).expect("a node");
    let listener = node.listen("thalweg://127.0.0.1:0").await.expect("listening");
    let limit = libc::rlimit { rlim_cur: FEW as u64, rlim_max: FEW as u64 };
    // SAFETY: reads a local of the right type.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
    let before = open_descriptors();
    println!("@ADDRESS {}", listener.address());
    until("the descriptors to run out", || open_descriptors() == FEW as usize).await;
    let percent = processor_percent(Duration::from_secs(1)).await;
    println!("@BUSY {percent:.1}");
    let endpoint = listener.accept().await.expect("accepting");
    exchange(&endpoint).await;
    // The other side may have closed already.
    let _ = endpoint.close(thalweg::CloseReason::default()).await;
    drop(endpoint);
    until("nothing to be left", || open_descriptors() == before).await;
    println!("@CLEAN {}", node.stats().handshakes);
}

/// More strangers than a listener has descriptors for: it waits without a busy loop, and accepts
/// again when they are gone. Those who come meanwhile are served then.
#[test]
fn a_listener_out_of_descriptors() {
    let mut listening = Played::start(play("few_listen", &[])).expect("it runs");
    let address = listening.hear("ADDRESS").expect("it listens");
    let to = address.strip_prefix("thalweg://").expect("an address");
    let strangers: Vec<_> =
        (0..100).map(|_| std::net::TcpStream::connect(to).expect("the kernel takes it")).collect();
    let busy: f64 = listening.hear("BUSY").and_then(|text| text.parse().ok()).expect("a number");
    assert!(busy < 20.0, "{busy} % of a core while descriptors are short");
    run_once("a_listener_out_of_descriptors", async {
        let node = Node::new(Config::new()).expect("a node");
        let mut waiting = Box::pin(node.connect(address.as_str()));
        assert!(poll_times(&mut waiting, 5).await.is_none(), "it cannot be accepted yet");
        drop(strangers);
        let endpoint = waiting.await.expect("connecting");
        exchange(&endpoint).await;
        let clean =
            tokio::task::spawn_blocking(move || listening.hear("CLEAN").expect("nothing is left"));
        let _ = endpoint.close(thalweg::CloseReason::default()).await;
        assert_eq!(clean.await.expect("no panic"), "0");
    });
}

/// Waits for a child of `fork` and gives its exit status.
fn reap(pid: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: writes to a local; the child is ours.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -1 }
}

/// What a forked child can do with a node of its own, on a thread and a runtime of its own.
/// Libraries that its parent used stay unused, and the route says so.
fn own_node_works(way: Way) -> bool {
    let talk = async move {
        let order = [way.link(), LinkKind::Tcp];
        let node = || Node::new(way.config().transports(order)).expect("a node");
        let (ours, theirs) = (node(), node());
        let listener = theirs.listen("thalweg://127.0.0.1:0").await.expect("listening");
        let (a, b) = connect(&ours, &listener).await;
        let bytes = pattern(7, BULK);
        let (sent, got) = tokio::join!(a.send(Message::copy_from_slice(&bytes)), b.recv());
        sent.expect("sending");
        check_pattern(7, &got.expect("receiving").to_vec().expect("bytes"));
        let route = a.route();
        let expected = if matches!(way.link(), LinkKind::Ucx | LinkKind::Verbs) {
            let said = route.candidates.iter().any(|c| c.reason.contains("forked off"));
            assert!(said, "{route}");
            LinkKind::Tcp
        } else {
            way.link()
        };
        assert_eq!(route.link(), expected, "{route}");
        drop((a, b, listener));
        ours.close(CloseReason::default()).await;
        theirs.close(CloseReason::default()).await;
    };
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(within(LIMIT, "what the child does", talk));
    };
    std::thread::spawn(run).join().is_ok()
}

fn forking(name: &str, way: Way) {
    run_once(name, async {
        let pair = pair(way).await;
        pair.a.send(Message::copy_from_slice(b"before")).await.expect("sending");
        assert_eq!(pair.b.recv().await.expect("receiving").len_bytes(), 6);
        // SAFETY: the C library's locks are whole in the child, and it leaves by `_exit`.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let refused = pair.a.try_send(Message::copy_from_slice(b"child")).err();
            let forked = refused.and_then(|refused| refused.error).map(|error| error.kind());
            let mut op = pair.a.recv();
            let received = futures_util::FutureExt::now_or_never(&mut op);
            let other = received.map(|result| result.err().map(|error| error.kind()));
            let good = forked == Some(ErrorKind::Forked)
                && other == Some(Some(ErrorKind::Forked))
                && pair.node_a.progress().is_ok()
                && own_node_works(way);
            // SAFETY: ends the child without running destructors.
            unsafe { libc::_exit(if good { 0 } else { 1 }) };
        }
        assert!(pid > 0);
        assert_eq!(reap(pid), 0, "the child gets errors");
        // The parent goes on.
        for number in 0..20u64 {
            let bytes = pattern(number, 100_000);
            let (sent, got) =
                tokio::join!(pair.a.send(Message::copy_from_slice(&bytes)), pair.b.recv());
            sent.expect("sending");
            check_pattern(number, &got.expect("receiving").to_vec().expect("bytes"));
        }
    });
}

#[test]
fn fork_tcp() {
    forking("fork_tcp", Way::Tcp);
}

#[test]
fn fork_ucx() {
    if let Some(why) = Way::Ucx.missing() {
        return skipped("fork_ucx", &why);
    }
    forking("fork_ucx", Way::Ucx);
}

#[test]
fn fork_verbs() {
    if let Some(why) = Way::Verbs.missing() {
        return skipped("fork_verbs", &why);
    }
    forking("fork_verbs", Way::Verbs);
}

#[test]
fn fork_shm() {
    forking("fork_shm", Way::ShmAll);
}

/// A host that watches one descriptor with poll(2).
struct Host {
    node: Node,
    stop: Arc<AtomicBool>,
    wakes: Arc<AtomicUsize>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Host {
    fn start(config: Config) -> Host {
        let node = Node::with_host_loop(config).expect("a node");
        let (stop, wakes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let thread = std::thread::spawn({
            let (node, stop, wakes) = (node.clone(), stop.clone(), wakes.clone());
            move || {
                let fd = node.host_fd().expect("a descriptor").as_raw_fd();
                while !stop.load(Ordering::SeqCst) {
                    let mut watched = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
                    // SAFETY: one element, a local.
                    if unsafe { libc::poll(&mut watched, 1, 50) } > 0 {
                        wakes.fetch_add(1, Ordering::SeqCst);
                        node.progress().expect("progress");
                    }
                }
            }
        });
        Host { node, stop, wakes, thread: Some(thread) }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("no panic");
        }
    }
}

fn host_loop(name: &str, way: Way) {
    let (one, two) = (Host::start(way.config()), Host::start(way.config()));
    run_once(name, async {
        let listener = two.node.listen("thalweg://127.0.0.1:0").await.expect("listening");
        let (a, b) = thalweg_tests::connect(&one.node, &listener).await;
        for number in 0..200u64 {
            let len = [8, 3_000, 200_000][(number % 3) as usize];
            let message = Message::copy_from_slice(&pattern(number, len));
            let (sent, got) = tokio::join!(a.send(message), b.recv());
            sent.expect("sending");
            check_pattern(number, &got.expect("receiving").to_vec().expect("bytes"));
        }
        assert!(a.recv().timeout(Duration::from_millis(20)).await.is_err());
        let mut waiting = b.recv();
        assert!(poll_times(&mut waiting, 3).await.is_none());
        // Idle, once the last activity has been looked after: no wake for a whole second.
        let mut quiet = (one.wakes.load(Ordering::SeqCst), two.wakes.load(Ordering::SeqCst));
        let mut since = Instant::now();
        until("a quiet second", || {
            let now = (one.wakes.load(Ordering::SeqCst), two.wakes.load(Ordering::SeqCst));
            if now != quiet {
                (quiet, since) = (now, Instant::now());
            }
            since.elapsed() > Duration::from_secs(1)
        })
        .await;
        // It still wakes.
        a.send(Message::copy_from_slice(b"wake up")).await.expect("sending");
        assert_eq!(waiting.await.expect("receiving").len_bytes(), 7);
        a.close(thalweg::CloseReason::new(1, "done")).await.expect("closing");
        assert_eq!(b.closed().await.kind(), ErrorKind::Closed);
        assert_eq!(b.ended().map(|why| why.kind()), Some(ErrorKind::Closed));
        // A closed node has nothing left to do; one whose loop has ended fails what waits.
        let (c, d) = thalweg_tests::connect(&one.node, &listener).await;
        assert!(c.ended().is_none() && !one.node.is_wound_up());
        one.node.host_ended();
        assert!(one.node.is_wound_up());
        assert_eq!(c.ended().map(|why| why.kind()), Some(ErrorKind::RuntimeGone));
        let refused = one.node.connect("thalweg://127.0.0.1:1").await;
        assert_eq!(refused.map(drop).map_err(|why| why.kind()), Err(ErrorKind::RuntimeGone));
        d.closed().await;
        two.node.close(thalweg::CloseReason::new(2, "done")).await;
        until("wound up", || two.node.is_wound_up()).await;
    });
}

/// Whoever waits for the end of an endpoint is told when the loop has ended, although the link is
/// not through and nobody will drive it.
#[test]
fn host_loop_that_ends_while_a_link_lingers() {
    let switch = MockSwitch::new();
    let config = || Way::Mock.config().mock(MockPlan::new().switch(&switch));
    let (one, two) = (Host::start(config()), Host::start(config()));
    run_once("host_loop_that_ends_while_a_link_lingers", async {
        let listener = two.node.listen("thalweg://127.0.0.1:0").await.expect("listening");
        let (a, b) = thalweg_tests::connect(&one.node, &listener).await;
        let mut closed = a.closed();
        assert!(poll_times(&mut closed, 3).await.is_none());
        switch.linger(true);
        one.node.host_ended();
        let why = within(Duration::from_secs(10), "the end", closed).await;
        assert_eq!(why.kind(), ErrorKind::RuntimeGone);
        let again = within(Duration::from_secs(10), "the end", a.closed()).await;
        assert_eq!(again.kind(), ErrorKind::RuntimeGone);
        // What the link still had is let go of with the endpoint.
        switch.linger(false);
        drop((a, b));
    });
}

#[test]
fn host_loop_tcp() {
    host_loop("host_loop_tcp", Way::Tcp);
}

#[test]
fn host_loop_verbs() {
    if let Some(why) = Way::Verbs.missing() {
        return skipped("host_loop_verbs", &why);
    }
    host_loop("host_loop_verbs", Way::Verbs);
}

#[test]
fn host_loop_ucx() {
    if let Some(why) = Way::Ucx.missing() {
        return skipped("host_loop_ucx", &why);
    }
    host_loop("host_loop_ucx", Way::Ucx);
}

#[test]
fn host_loop_shm() {
    host_loop("host_loop_shm", Way::ShmAll);
}
