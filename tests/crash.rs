//! A peer that is killed, at random, in the middle of everything: every operation that was pending
//! fails soon with the right error, and nothing is left of it.
//!
//! `THALWEG_TEST_LONG=1` makes 200 rounds of the 20 that each way gets; `THALWEG_TEST_SEED`
//! repeats a run.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use support::{
    Leftovers, Peer, assert_held_up, at_rest, measured, note, seed, serially, short_or_long,
    slowness,
};
use thalweg::{
    Access, CloseReason, Endpoint, Error, ErrorKind, Listener, Message, Node, RemoteKey,
};
use thalweg_tests::{Random, Watch, Way, run_on, runtime, tells_of_death};
use tokio::sync::watch;

/// Half of the operations must have failed by then…
const MEDIAN_MAX: Duration = Duration::from_millis(100);
/// …and each of them by then: what is above the median's limit is the machine's, when its cores
/// are all busy.
const EACH_MAX: Duration = Duration::from_secs(1);
/// How long everything may take to be gone afterwards.
const GONE_MAX: Duration = Duration::from_secs(5);

const PHASES: [&str; 11] = [
    "connect",
    "handshake",
    "idle",
    "stream",
    "large",
    "views",
    "loans",
    "onesided",
    "tags",
    "close",
    "goodbye",
];

#[test]
fn tcp_peers_killed() {
    rounds(Way::Tcp);
}

#[test]
fn shm_peers_killed() {
    rounds(Way::ShmAll);
}

#[test]
fn shm_peers_killed_with_single_copy_only() {
    rounds(Way::ShmSingleCopy);
}

#[test]
fn shm_peers_killed_with_the_arena_only() {
    rounds(Way::ShmInlineArena);
}

#[test]
fn ucx_peers_killed() {
    where_it_is("ucx_peers_killed", Way::Ucx, |way| {
        if kills_in_set_up_are_fatal(way) {
            // What comes after it is tested.
            thalweg_tests::skipped(
                "ucx_peers_killed while they connect",
                "UCX may end the process then if it has sockets only (see ARCHITECTURE.md)",
            );
        }
        rounds(way);
    });
}

#[test]
fn verbs_peers_killed() {
    where_it_is("verbs_peers_killed", Way::Verbs, rounds);
}

#[test]
fn tcp_peer_killed_beside_another() {
    beside_another(Way::Tcp);
}

#[test]
fn shm_peer_killed_beside_another() {
    beside_another(Way::ShmAll);
}

#[test]
fn ucx_peer_killed_beside_another() {
    where_it_is("ucx_peer_killed_beside_another", Way::Ucx, beside_another);
}

#[test]
fn verbs_peer_killed_beside_another() {
    where_it_is("verbs_peer_killed_beside_another", Way::Verbs, beside_another);
}

#[test]
fn tcp_peer_stopped_costs_no_processor() {
    stopped(Way::Tcp);
}

#[test]
fn shm_peer_stopped_costs_no_processor() {
    stopped(Way::ShmAll);
}

#[test]
fn ucx_peer_stopped_costs_no_processor() {
    where_it_is("ucx_peer_stopped_costs_no_processor", Way::Ucx, stopped);
}

#[test]
fn verbs_peer_stopped_costs_no_processor() {
    where_it_is("verbs_peer_stopped_costs_no_processor", Way::Verbs, stopped);
}

/// Runs a test where there is this link; says that it is left out otherwise.
fn where_it_is(name: &str, way: Way, test: fn(Way)) {
    match way.missing() {
        Some(why) => thalweg_tests::skipped(name, &why),
        None => test(way),
    }
}

/// UCX itself ends the process then; see ARCHITECTURE.md.
fn kills_in_set_up_are_fatal(way: Way) -> bool {
    way == Way::Ucx && std::env::var("UCX_TLS").is_ok_and(|lanes| lanes == "tcp")
}

/// What one round does, all of it following from the seed.
#[derive(Clone, Debug)]
struct Round {
    way: Way,
    phase: &'static str,
    seed: u64,
    /// The peer has a child that lives on.
    forks: bool,
    /// The peer is stopped for a while before it dies, so that things are in flight for certain.
    freezes: bool,
    /// The peer listens rather than the survivor.
    peer_listens: bool,
    delay: Duration,
    threads: usize,
}

impl Round {
    fn new(way: Way, index: usize, seed: u64) -> Round {
        let mut random = Random::new(seed ^ index as u64);
        // The first two are kills in set-up.
        let phases = &PHASES[if kills_in_set_up_are_fatal(way) { 2 } else { 0 }..];
        let phase = phases[index % phases.len()];
        Round {
            way,
            phase,
            seed: random.next(),
            forks: index % 3 == 2 && !matches!(phase, "connect" | "handshake"),
            freezes: random.below(2) == 1,
            peer_listens: phase == "connect" || phase != "handshake" && random.below(2) == 1,
            delay: Duration::from_micros(random.below(30_000) as u64),
            threads: 1 + random.below(2),
        }
    }
}

/// How an operation ended.
struct Ended {
    what: &'static str,
    error: Option<Error>,
    at: Instant,
}

fn rounds(way: Way) {
    let _alone = serially();
    let (count, seed) = (short_or_long(20, 200), seed());
    note(format_args!("crash {way:?}: {count} rounds, THALWEG_TEST_SEED={seed}"));
    // What a process keeps for good exists after this.
    round(&Round::new(way, 2, seed));
    let leftovers = Leftovers::now();
    let mut took = Vec::new();
    for index in 0..count {
        let this = Round::new(way, index, seed);
        let watch = Watch::new(&format!("{this:?}"));
        took.extend(round(&this));
        leftovers.none_within(GONE_MAX * slowness(), &format!("round {index}: {this:?}"));
        drop(watch);
    }
    took.sort();
    let (median, worst) = (took[took.len() / 2], took[took.len() - 1]);
    let late = took.iter().filter(|t| **t > MEDIAN_MAX).count();
    support::measured(&format!("kill_to_error_p50 {way:?}"), median.as_secs_f64() * 1e3, "ms");
    support::measured(&format!("kill_to_error_max {way:?}"), worst.as_secs_f64() * 1e3, "ms");
    note(format_args!(
        "SOAK: crash {way:?}: {count} rounds, {} operations failed, median {median:.1?}, \
         worst {worst:.1?}, {late} later than {MEDIAN_MAX:?}; nothing left",
        took.len()
    ));
    assert!(median <= MEDIAN_MAX * slowness(), "half of the operations took {median:?} to fail");
}

/// One round: how long each operation took to fail.
fn round(this: &Round) -> Vec<Duration> {
    let runtime = runtime(this.threads);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let handle = runtime.handle().clone();
    let running = std::thread::spawn(move || {
        // An error: the round has panicked, which is an end as well.
        let _ = runtime.block_on(stopped);
    });
    let (ended, endings) = mpsc::channel();
    let held = Arc::new(Mutex::new(Vec::new()));
    let reports = Reports { held: held.clone(), ended };
    let survivor = Survivor { round: this.clone(), handle, reports };
    let (node, killed) = survivor.survive();
    let mut took = Vec::new();
    while let Ok(Ended { what, error, at }) = endings.recv_timeout(Duration::from_secs(20)) {
        let late = at.saturating_duration_since(killed);
        if let Some(error) = error {
            assert!(expected(this, error.kind()), "{what}: {error} in {this:?}");
        }
        assert!(late <= EACH_MAX * slowness(), "{what} failed after {late:?} in {this:?}");
        took.push(late);
    }
    assert!(Arc::strong_count(&held) == 1, "an operation still waits in {this:?}");
    views_end_well(&held.lock().expect("no panic"), this);
    drop(held);
    drop(node);
    drop(stop);
    running.join().expect("the runtime's thread");
    took
}

fn expected(round: &Round, kind: ErrorKind) -> bool {
    match kind {
        _ if tells_of_death(kind) => true,
        ErrorKind::Closed => matches!(round.phase, "connect" | "handshake" | "close" | "goodbye"),
        ErrorKind::Refused => round.phase == "connect",
        _ => false,
    }
}

/// Views of memory whose owner is dead can be looked at without harm.
fn views_end_well(held: &[Message], round: &Round) {
    for message in held {
        match message.to_vec() {
            Ok(bytes) => assert!(bytes.iter().all(|byte| *byte == 7), "wrong bytes in {round:?}"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionLost, "{round:?}"),
        }
    }
}

struct Survivor {
    round: Round,
    handle: tokio::runtime::Handle,
    reports: Reports,
}

/// Where an operation says how it ended. Everybody who holds one may still have to.
#[derive(Clone)]
struct Reports {
    /// Messages that are held. Dropped before `ended`: when that is closed, nobody holds it.
    held: Arc<Mutex<Vec<Message>>>,
    ended: mpsc::Sender<Ended>,
}

impl Reports {
    fn ended(&self, what: &'static str, error: Option<Error>) {
        // A receiver that is gone: the round has failed already.
        let _ = self.ended.send(Ended { what, error, at: Instant::now() });
    }
}

impl Survivor {
    /// Lives through the round; every operation holds a clone of `reports`.
    fn survive(self) -> (Node, Instant) {
        let round = &self.round;
        let node = self.handle.block_on(async { Node::new(round.way.config()) }).expect("a node");
        let (mut peer, listener) = self.meet(&node);
        let mut bystander = None;
        if round.phase == "connect" {
            let address = peer.said("LISTENING");
            for _ in 0..4 {
                self.keep_connecting(&node, &address);
            }
        } else if round.phase == "handshake" {
            let listener = listener.expect("the survivor listens");
            peer.said("GOING");
            self.keep_accepting(listener);
        } else {
            let endpoint = self.connect(&node, listener, &mut peer);
            if round.forks {
                bystander = peer.said("CHILD").parse().ok().map(support::Bystander);
            }
            self.begin(&node, &endpoint);
            if round.phase != "onesided" {
                peer.said("GOING");
            }
        }
        std::thread::sleep(round.delay);
        if round.freezes {
            peer.signal(libc::SIGSTOP);
            std::thread::sleep(round.delay);
        }
        let killed = Instant::now();
        peer.kill();
        drop(peer);
        // The child must outlive all errors: it ends when all is known.
        if let Some(bystander) = bystander {
            let reports = self.reports.clone();
            std::thread::spawn(move || {
                let patience = Instant::now() + EACH_MAX * 2 * slowness();
                // The round's own, and this thread's.
                while Arc::strong_count(&reports.held) > 2 && Instant::now() < patience {
                    std::thread::sleep(Duration::from_millis(1));
                }
                assert!(bystander.lives(), "the peer's child is gone too early");
                drop(bystander);
                drop(reports);
            });
        }
        (node, killed)
    }

    fn meet(&self, node: &Node) -> (Peer, Option<Listener>) {
        let Round { way, phase, seed, .. } = &self.round;
        let mode = match *phase {
            "connect" => "echo",
            "handshake" => "handshakes",
            _ => "victim",
        };
        let mut words = vec![
            mode.to_owned(),
            format!("way={way:?}"),
            format!("phase={phase}"),
            format!("seed={seed}"),
            format!("fork={}", u8::from(self.round.forks)),
        ];
        if self.round.peer_listens {
            return (Peer::start(&words), None);
        }
        let listener =
            self.handle.block_on(node.listen("thalweg://127.0.0.1:0")).expect("listening");
        words.push(format!("connect={}", listener.address()));
        (Peer::start(&words), Some(listener))
    }

    fn connect(&self, node: &Node, listener: Option<Listener>, peer: &mut Peer) -> Endpoint {
        let endpoint = match listener {
            Some(listener) => self.handle.block_on(listener.accept()),
            None => {
                let address = peer.said("LISTENING");
                self.handle.block_on(node.connect(address.as_str()))
            }
        };
        let endpoint = endpoint.expect("an endpoint");
        assert_eq!(endpoint.route().link(), self.round.way.link());
        peer.said("UP");
        endpoint
    }

    /// Spawns an operation that goes on until it fails.
    fn until_it_fails<F>(&self, what: &'static str, work: F)
    where
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let reports = self.reports.clone();
        self.handle.spawn(async move {
            let error = work.await.err();
            reports.ended(what, error);
        });
    }

    fn keep_connecting(&self, node: &Node, address: &str) {
        let (node, address) = (node.clone(), address.to_owned());
        self.until_it_fails("connect", async move {
            loop {
                let endpoint = node.connect(address.as_str()).await?;
                tokio::task::yield_now().await;
                drop(endpoint);
            }
        });
    }

    fn keep_accepting(&self, listener: Listener) {
        let reports = self.reports.clone();
        self.handle.spawn(async move {
            // Nobody is told of strangers who die on the way; it is enough that no more come.
            while let Ok(Ok(endpoint)) =
                tokio::time::timeout(Duration::from_millis(500), listener.accept()).await
            {
                let reports = reports.clone();
                tokio::spawn(async move {
                    let error = endpoint.recv().await.err();
                    reports.ended("accepted", error);
                });
            }
        });
    }

    fn begin(&self, node: &Node, endpoint: &Endpoint) {
        let way = self.round.way;
        self.watch_end(endpoint);
        match self.round.phase {
            "stream" => {
                self.send_on(node, endpoint, way, 128 << 10);
                self.receive_on(endpoint);
            }
            "large" => {
                self.send_on(node, endpoint, way, 24 << 20);
                self.receive_on(endpoint);
            }
            "views" => self.hold_views(endpoint),
            "loans" => {
                for _ in 0..8 {
                    self.send_on(node, endpoint, Way::ShmLoans, 64 << 10);
                }
                self.receive_on(endpoint);
            }
            "onesided" => self.one_sided(node, endpoint),
            "tags" => self.tags(endpoint),
            "close" => {
                self.receive_on(endpoint);
                let endpoint = endpoint.clone();
                self.until_it_fails("close", async move {
                    endpoint.close(CloseReason::new(2, "closing")).await
                });
            }
            _ => self.receive_on(endpoint),
        }
    }

    fn watch_end(&self, endpoint: &Endpoint) {
        let endpoint = endpoint.clone();
        self.until_it_fails("closed", async move { Err(endpoint.closed().await) });
    }

    fn receive_on(&self, endpoint: &Endpoint) {
        let endpoint = endpoint.clone();
        self.until_it_fails("recv", async move {
            loop {
                endpoint.recv().await?;
            }
        });
    }

    fn send_on(&self, node: &Node, endpoint: &Endpoint, way: Way, len_max: usize) {
        let (node, endpoint) = (node.clone(), endpoint.clone());
        let mut random = Random::new(self.round.seed);
        self.until_it_fails("send", async move {
            loop {
                let bytes = vec![1u8; random.below(len_max)];
                endpoint.send(way.message(&node, &bytes)).await?;
                // A send that needs no waiting does not let the others run.
                tokio::task::yield_now().await;
            }
        });
    }

    fn hold_views(&self, endpoint: &Endpoint) {
        let (endpoint, held) = (endpoint.clone(), self.reports.held.clone());
        self.until_it_fails("recv", async move {
            loop {
                let message = endpoint.recv().await?;
                held.lock().expect("no panic").push(message);
            }
        });
    }

    fn one_sided(&self, node: &Node, endpoint: &Endpoint) {
        let (node, endpoint) = (node.clone(), endpoint.clone());
        let region = node.register(vec![0u8; 1 << 20], Access::ReadWrite).expect("a region");
        let key = self.handle.block_on(async {
            endpoint.send(Message::copy_from_slice(&region.key().to_bytes())).await?;
            endpoint.recv().await?.to_vec()
        });
        let key = RemoteKey::from_bytes(&key.expect("a key")).expect("a key");
        let getter = endpoint.clone();
        self.until_it_fails("put", async move {
            let _region = region;
            let mut buffer = vec![9u8; 1 << 19];
            loop {
                buffer = endpoint.put(buffer, &key, 0).await?;
            }
        });
        self.until_it_fails("get", async move {
            let mut buffer = vec![9u8; 1 << 19];
            loop {
                buffer = getter.get(buffer, &key, 1 << 19).await?;
            }
        });
    }

    fn tags(&self, endpoint: &Endpoint) {
        for tag in 10..14 {
            let one = endpoint.clone();
            self.until_it_fails("tag_recv", async move {
                one.tag_recv(tag, u64::MAX, vec![0; 1 << 16]).await?;
                Ok(())
            });
            let one = endpoint.clone();
            // Too large to travel without a receive, and nobody receives it.
            self.until_it_fails("tag_send", async move {
                one.tag_send(100 + tag, vec![0u8; 8 << 20]).await?;
                Ok(())
            });
        }
    }
}

/// Endpoints to two peers in one node. One peer is killed while all of them are busy: each endpoint to
/// it fails, and those to the other go on.
fn beside_another(way: Way) {
    const TO_THE_KILLED: usize = 4;
    const TO_THE_OTHER: usize = 2;
    let _alone = serially();
    let work = || async move {
        let node = Node::new(way.config()).expect("a node");
        let words = ["echo".to_owned(), format!("way={way:?}")];
        let mut peers = [(); 2].map(|()| Peer::start(&words));
        let [killed, other] = peers.each_mut().map(|peer| peer.said("LISTENING"));
        // One after the other: those of both peers come to lie beside each other.
        let mut busy = [killed, other].map(|address| (address, Vec::new()));
        for index in 0..TO_THE_KILLED + TO_THE_OTHER {
            let (address, busy) = &mut busy[usize::from(index % 3 == 2)];
            let endpoint = node.connect(address.as_str()).await.expect("connecting");
            assert_eq!(endpoint.route().link(), way.link());
            busy.push(Busy::new(endpoint, index));
        }
        let [(_, failing), (address, going)] = busy;
        assert_eq!((failing.len(), going.len()), (TO_THE_KILLED, TO_THE_OTHER));
        for busy in failing.iter().chain(&going) {
            assert!(busy.goes_on(3).await);
        }
        let [victim, other] = peers;
        let killed = Instant::now();
        victim.kill();
        for busy in failing {
            let error = busy.task.await.expect("no panic").expect_err("its peer is dead");
            let late = killed.elapsed();
            assert!(tells_of_death(error.kind()), "{error}");
            assert!(late <= EACH_MAX * slowness(), "it failed after {late:?}");
        }
        for busy in going {
            let went_on = busy.goes_on(10).await;
            let busy = if went_on { busy } else { again(busy, way, &node, &address).await };
            busy.stop.store(true, Ordering::Relaxed);
            let endpoint = busy.task.await.expect("no panic").expect("its peer lives");
            endpoint.close(CloseReason::new(0, "done")).await.expect("closing");
        }
        drop(victim);
        drop(other);
    };
    let name = format!("{way:?}: a peer killed beside another");
    // What a process keeps for good exists after this.
    run_on(1, &name, work());
    let leftovers = Leftovers::now();
    run_on(2, &name, work());
    leftovers.none_within(GONE_MAX * slowness(), &name);
}

/// A peer is stopped, and then killed, while more is on its way to it than the link takes; and nobody spins
/// for that, while another endpoint waits.
fn stopped(way: Way) {
    const MESSAGES: usize = 5_000;
    let _alone = serially();
    let rests = async |when: &str| {
        let percent = at_rest(Duration::from_secs(5) * slowness(), when).await;
        measured(&format!("cpu while {when}"), percent, "% of a core");
    };
    run_on(2, &format!("{way:?}: a peer that is stopped"), async move {
        let node = Node::new(way.config()).expect("a node");
        let words = ["echo".to_owned(), format!("way={way:?}")];
        let mut peers = [(); 2].map(|()| Peer::start(&words));
        let [stopped, other] = peers.each_mut().map(|peer| peer.said("LISTENING"));
        let stopped = Arc::new(node.connect(stopped.as_str()).await.expect("connecting"));
        let other = Arc::new(node.connect(other.as_str()).await.expect("connecting"));
        let echo = async |endpoint: &Endpoint| {
            endpoint.send(Message::copy_from_slice(b"once")).await.expect("sending");
            assert_eq!(endpoint.recv().await.expect("an echo").len_bytes(), 4);
        };
        echo(&stopped).await;
        echo(&other).await;
        peers[0].signal(libc::SIGSTOP);
        let sender = stopped.clone();
        let sending = tokio::spawn(async move {
            for _ in 0..MESSAGES {
                if sender.send(Message::copy_from_slice(&[7; 8])).await.is_err() {
                    return;
                }
            }
            while sender.recv().await.is_ok() {}
        });
        let receiver = other.clone();
        let receiving = tokio::spawn(async move { receiver.recv().await });
        rests("the peer is stopped").await;
        peers[0].kill();
        sending.await.expect("no panic");
        rests("the peer is dead").await;
        other.send(Message::copy_from_slice(b"still")).await.expect("sending");
        let back = receiving.await.expect("no panic").expect("its peer lives");
        assert_eq!(back.len_bytes(), 5);
        echo(&other).await;
    });
}

/// In place of an endpoint that has ended, though its peer lives. UCX's worker alone may be held up by a
/// process that is killed while it writes to the worker's memory: its links end then, and say so, and what
/// is connected afterwards works.
async fn again(busy: Busy, way: Way, node: &Node, address: &str) -> Busy {
    let error = busy.task.await.expect("no panic").expect_err("it has ended");
    assert_eq!(way, Way::Ucx, "{error}");
    assert_held_up(&error);
    note(format_args!("{way:?}: the worker was held up"));
    let busy = Busy::new(node.connect(address).await.expect("connecting again"), 0);
    assert!(busy.goes_on(10).await);
    busy
}

/// A task that has messages sent back, of all lengths, until it is told to stop.
struct Busy {
    task: tokio::task::JoinHandle<Result<Endpoint, Error>>,
    rounds: watch::Receiver<usize>,
    stop: Arc<AtomicBool>,
}

impl Busy {
    fn new(endpoint: Endpoint, seed: usize) -> Busy {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let (done, rounds) = watch::channel(0);
        let task = tokio::spawn(async move {
            while !stopped.load(Ordering::Relaxed) {
                let round = *done.borrow() + seed;
                let len = [8, 700, 20_000, 100_000, 1 << 20][round % 5];
                let bytes: Vec<u8> = (0..len).map(|at| (at / 256 + at + round) as u8).collect();
                endpoint.send(bytes.clone()).await.map_err(|failed| failed.error)?;
                let back = endpoint.recv().await?;
                assert!(back.to_vec()? == bytes, "wrong bytes");
                done.send_modify(|rounds| *rounds += 1);
            }
            Ok(endpoint)
        });
        Busy { task, rounds, stop }
    }

    /// So many more rounds. `false`: it has ended.
    async fn goes_on(&self, rounds: usize) -> bool {
        let mut done = self.rounds.clone();
        let goal = *done.borrow() + rounds;
        done.wait_for(|done| *done >= goal).await.is_ok()
    }
}
