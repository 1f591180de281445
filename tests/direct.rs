//! Direct access to regions: who holds it, who waits for whom, and peers that do not know of it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use thalweg::{Access, Endpoint, ErrorKind, MockPlan, MockSwitch, Node, RemoteKey};
use thalweg_tests::{
    Watch, Way, check_pattern, pair_of, pair_with, pattern, poll_times, run, runtime, until, within,
};

const LIMIT: Duration = Duration::from_secs(10);

/// Puts until the link does it by itself.
async fn use_until_direct(endpoint: &Endpoint, key: &RemoteKey) {
    let before = endpoint.stats().direct_puts;
    within(LIMIT, "direct access", async {
        while endpoint.stats().direct_puts == before {
            endpoint.put(vec![0u8; 1], key, 0).await.expect("putting");
        }
    })
    .await;
}

/// Puts and gets that are right, and all of them served.
async fn is_served(endpoint: &Endpoint, key: &RemoteKey) {
    for round in 0..20 {
        let bytes = pattern(round, 5_000);
        endpoint.put(bytes, key, 10).await.expect("putting");
        check_pattern(round, &endpoint.get(vec![0u8; 5_000], key, 10).await.expect("getting"));
    }
    let stats = endpoint.stats();
    assert_eq!((stats.direct_puts, stats.direct_gets), (0, 0));
    assert_eq!((stats.puts, stats.gets), (20, 20));
}

#[test]
fn one_side_cannot() {
    run("one_side_cannot", || async {
        let with = |direct: bool| Way::Mock.config().mock(MockPlan::new().direct(direct));
        for (here, there) in [(true, false), (false, true)] {
            let pair = pair_of(Way::Mock, with(here), with(there)).await;
            let region = pair.node_b.register(vec![0u8; 6_000], Access::ReadWrite).expect("region");
            is_served(&pair.a, &region.key()).await;
            assert_eq!(pair.b.stats().granted_keys, 0);
            assert_eq!(region.revoke().await.expect("revoked").len(), 6_000);
        }
    });
}

/// Copies one way, and makes the preface of a hello that of minor version 0.
fn copy_as_older(mut from: TcpStream, mut to: TcpStream) {
    let mut preface = [0; 16];
    if from.read_exact(&mut preface).is_err() {
        return;
    }
    assert_eq!(&preface[..8], b"thalweg\x1a");
    preface[10..12].fill(0);
    // Either side may hang up.
    let _ = to.write_all(&preface);
    let _ = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(std::net::Shutdown::Write);
}

/// Connects two nodes which each take the other for one of minor version 0.
async fn connect_as_older(way: Way) -> (Node, Node, Endpoint, Endpoint) {
    let [node_a, node_b] = [(); 2].map(|()| Node::new(way.config()).expect("a node"));
    let listener = node_b.listen("thalweg://127.0.0.1:0").await.expect("listening");
    let proxy = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("thalweg://{}", proxy.local_addr().expect("bound"));
    let to = format!("{}:{}", listener.address().host(), listener.address().port());
    // They end with the connections.
    std::thread::spawn(move || {
        let (one, _) = proxy.accept().expect("accepting");
        let two = TcpStream::connect(to).expect("connecting");
        let [from_one, from_two] = [&one, &two].map(|end| end.try_clone().expect("cloned"));
        std::thread::spawn(move || copy_as_older(from_one, two));
        copy_as_older(from_two, one);
    });
    let (a, b) = tokio::join!(node_a.connect(address), listener.accept());
    (node_a, node_b, a.expect("connecting"), b.expect("accepting"))
}

fn an_older_minor_version_is_served(way: Way) {
    run("an older minor version", || async {
        let (_node_a, node_b, a, b) = connect_as_older(way).await;
        assert_eq!((a.peer().version, b.peer().version), ((1, 0), (1, 0)));
        assert!(!a.route().to_string().contains("put/get by"), "{}", a.route());
        let region = node_b.register(vec![0u8; 6_000], Access::ReadWrite).expect("region");
        is_served(&a, &region.key()).await;
        assert_eq!(b.stats().granted_keys, 0);
        assert_eq!(region.revoke().await.expect("revoked").len(), 6_000);
    });
}

#[test]
fn an_older_minor_version_is_served_over_mock() {
    an_older_minor_version_is_served(Way::MockDirect);
}

#[test]
fn what_fails_is_told_and_the_target_serves_from_then_on() {
    run("what fails", || async {
        let plan = || MockPlan::new().direct(true).direct_max(3).delay_polls(2);
        let pair = pair_with(Way::Mock, |config| config.mock(plan())).await;
        let region = pair.node_b.register(vec![0u8; 50_000], Access::ReadWrite).expect("region");
        let key = region.key();
        use_until_direct(&pair.a, &key).await;
        let puts = (0..6).map(|i| pair.a.put(pattern(i, 5_000), &key, i * 5_000));
        let ended = within(LIMIT, "the puts", futures_util::future::join_all(puts)).await;
        let errors: Vec<_> = ended.into_iter().filter_map(|put| put.err()).collect();
        assert!((1..=4).contains(&errors.len()), "{errors:?}");
        assert!(errors.iter().all(|failed| failed.kind() == ErrorKind::ConnectionLost));
        let direct = pair.a.stats().direct_puts;
        for i in 0..6 {
            pair.a.put(pattern(i, 5_000), &key, i * 5_000).await.expect("putting");
        }
        // Another key is not asked for either.
        let other = pair.node_b.register(vec![1u8; 10], Access::ReadWrite).expect("region");
        for _ in 0..3 {
            assert_eq!(pair.a.get(vec![0; 10], &other.key(), 0).await.expect("getting"), [1; 10]);
        }
        assert_eq!(pair.a.stats().direct_puts, direct);
        assert_eq!(pair.b.stats().granted_keys, 1);
        pair.a.fence().await.expect("a fence");
        let buffer = within(LIMIT, "the memory", region.revoke()).await.expect("revoked");
        (0..6).for_each(|i| check_pattern(i, &buffer[i as usize * 5_000..][..5_000]));
    });
}

#[test]
fn a_peer_that_is_stopped_holds_a_revocation_up_until_the_endpoint_ends() {
    run("a_peer_that_is_stopped", || async {
        let switch = MockSwitch::new();
        let plan = || MockPlan::new().direct(true).delay_polls(2).switch(&switch);
        let patient = Duration::from_secs(3600);
        let with = |config: thalweg::Config| config.mock(plan()).close_timeout(patient);
        let pair = pair_with(Way::Mock, with).await;
        let region = pair.node_b.register(vec![0u8; 50_000], Access::ReadWrite).expect("region");
        let key = region.key();
        use_until_direct(&pair.a, &key).await;
        switch.pause(true);
        let mut put = pair.a.put(vec![1u8; 50_000], &key, 0);
        assert!(poll_times(&mut put, 3).await.is_none());
        let mut revoked = Box::pin(region.revoke());
        assert!(poll_times(&mut revoked, 200).await.is_none(), "the peer has not said so");
        switch.break_links();
        let buffer = within(LIMIT, "the memory", revoked).await.expect("revoked");
        assert!(buffer.iter().all(|byte| *byte == 0), "nothing has moved since");
        let failed = within(LIMIT, "the put", put).await.expect_err("broken");
        assert_eq!(failed.kind(), ErrorKind::ConnectionLost);
    });
}

/// Nothing is ended for it: the endpoint goes on, and so does the peer when it comes back.
#[test]
fn from_a_peer_that_stays_silent_a_region_is_taken() {
    run("a_peer_that_stays_silent", || async {
        const PATIENCE: Duration = Duration::from_millis(300);
        let switch = MockSwitch::new();
        let plan = || MockPlan::new().direct(true).delay_polls(2).switch(&switch);
        let with = |config: thalweg::Config| config.mock(plan()).close_timeout(PATIENCE);
        let pair = pair_with(Way::Mock, with).await;
        let [region, other] = [5_000, 6_000]
            .map(|len| pair.node_b.register(vec![0u8; len], Access::ReadWrite).expect("region"));
        let key = region.key();
        use_until_direct(&pair.a, &key).await;
        switch.pause(true);
        let mut put = pair.a.put(vec![1u8; 5_000], &key, 0);
        assert!(poll_times(&mut put, 3).await.is_none());
        let since = Instant::now();
        let buffer = within(LIMIT, "the memory", region.revoke()).await.expect("revoked");
        assert!(since.elapsed() >= PATIENCE, "the peer had no time to answer");
        switch.pause(false);
        let failed = within(LIMIT, "the put", put).await.expect_err("it was taken");
        assert_eq!(failed.kind(), ErrorKind::ConnectionLost);
        assert!(buffer.iter().all(|byte| *byte == 0), "written after it was handed back");
        let refused = pair.a.put(vec![1u8; 8], &key, 0).await.expect_err("revoked");
        assert_eq!(refused.kind(), ErrorKind::KeyRevoked);
        let direct = pair.a.stats().direct_puts;
        for round in 0..5 {
            pair.a.put(pattern(round, 5_000), &other.key(), 10).await.expect("putting");
        }
        assert_eq!(pair.a.stats().direct_puts, direct, "the target serves from then on");
        let (sent, got) = tokio::join!(pair.a.send(vec![2u8; 9]), pair.b.recv());
        sent.expect("sending");
        assert_eq!(got.expect("receiving").len_bytes(), 9);
    });
}

/// What this process serves may last for as long as the peer likes: `revoke` does not, and can be
/// asked again. Over TCP, where a get of this size does not fit into what the kernel keeps: over
/// shared memory it may be over in a poll.
#[test]
fn a_peer_stops_in_the_middle_of_a_get() {
    const PATIENCE: Duration = Duration::from_millis(300);
    const BYTES: usize = 64 << 20;
    let watch = Watch::new("a peer that stops in the middle of a get");
    let config = || Way::Tcp.config();
    let (there, here) = (runtime(1), runtime(1));
    let (tell, key) = std::sync::mpsc::channel::<RemoteKey>();
    let (ask, asked) = std::sync::mpsc::channel::<()>();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let (node_b, listener) = here.block_on(async {
        let node = Node::new(config().close_timeout(PATIENCE)).expect("a node");
        let listener = node.listen("thalweg://127.0.0.1:0").await.expect("listening");
        (node, listener)
    });
    let address = listener.address().to_string();
    let peer = std::thread::spawn(move || {
        let (node, a) = there.block_on(async {
            let node = Node::new(config()).expect("a node");
            let a = node.connect(address.as_str()).await.expect("connecting");
            (node, a)
        });
        let key = key.recv().expect("a key");
        let mut get = a.get(vec![0u8; BYTES], &key, 0);
        assert!(there.block_on(poll_times(&mut get, 3)).is_none());
        ask.send(()).expect("somebody waits");
        // Still, until it is told to go on.
        gone.recv().expect("somebody says so");
        let got = there.block_on(within(LIMIT, "the get", get)).expect("getting");
        assert!(got.iter().all(|byte| *byte == 7), "wrong bytes");
        drop(node);
    });
    here.block_on(async {
        let b = within(LIMIT, "accepting", listener.accept()).await.expect("accepting");
        let mut region = node_b.register(vec![7u8; BYTES], Access::Read).expect("region");
        tell.send(region.key()).expect("the peer's thread");
        until("the peer to ask", || asked.try_recv().is_ok()).await;
        until("the get", || b.stats().operations > 0).await;
        for _ in 0..2 {
            let since = Instant::now();
            let failed = within(LIMIT, "an answer", region.revoke()).await.expect_err("in use");
            assert!(since.elapsed() >= PATIENCE, "there was time left");
            assert_eq!(failed.kind(), ErrorKind::InUse);
            assert!(failed.error.is_retryable());
            region = failed.region;
            let mut last = [0];
            region.read(BYTES - 1, &mut last).expect("within");
            assert_eq!(last, [7]);
        }
        go.send(()).expect("the peer's thread");
        let buffer = within(LIMIT, "the memory", async {
            loop {
                match region.revoke().await {
                    Ok(buffer) => return buffer,
                    Err(failed) => region = failed.region,
                }
            }
        });
        assert_eq!(buffer.await.len(), BYTES);
        until("the peer to end", || peer.is_finished()).await;
        peer.join().expect("no panic");
    });
    drop(watch);
}

/// Nobody is left who could tell how long it takes.
#[test]
fn revoking_when_the_runtime_has_ended() {
    let watch = Watch::new("revoking when the runtime has ended");
    for way in [Way::Tcp, Way::MockDirect] {
        let ended = runtime(1);
        let (pair, region) = ended.block_on(async {
            let pair = pair_with(way, |config| config).await;
            let region = pair.node_b.register(vec![3u8; 5_000], Access::Read).expect("region");
            pair.a.get(vec![0u8; 10], &region.key(), 0).await.expect("getting");
            (pair, region)
        });
        drop(ended);
        let memory = runtime(1).block_on(within(LIMIT, "the memory", region.revoke()));
        assert_eq!(memory.expect("revoked").len(), 5_000);
        drop(pair);
    }
    drop(watch);
}

/// The other side's runtime moves only while it is driven: as long as it is not, what it was
/// granted is kept, whatever happens to the endpoint here.
fn memory_waits_for_the_peer(way: Way) {
    let watch = Watch::new("memory waits for the peer");
    let there = runtime(1);
    let here = runtime(1);
    let (ask, orders) = std::sync::mpsc::channel::<(RemoteKey, std::sync::mpsc::Sender<()>)>();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let (node_b, listener) = here.block_on(async {
        let node = Node::new(way.config()).expect("a node");
        let listener = node.listen("thalweg://127.0.0.1:0").await.expect("listening");
        (node, listener)
    });
    let address = listener.address().to_string();
    let peer = std::thread::spawn(move || {
        let (node, a) = there.block_on(async {
            let node = Node::new(way.config()).expect("a node");
            let a = node.connect(address.as_str()).await.expect("connecting");
            (node, a)
        });
        let (key, ready) = orders.recv().expect("a key");
        there.block_on(use_until_direct(&a, &key));
        ready.send(()).expect("somebody waits");
        // Still, until it is told to go on.
        gone.recv().expect("somebody says so");
        there.block_on(async {
            let failed = within(LIMIT, "revocation", async {
                loop {
                    if let Err(failed) = a.put(vec![1; 8], &key, 0).await {
                        return failed;
                    }
                }
            });
            assert_eq!(failed.await.kind(), ErrorKind::KeyRevoked);
        });
        drop((node, a));
    });
    here.block_on(async {
        let b = within(LIMIT, "accepting", listener.accept()).await.expect("accepting");
        let region = node_b.register(vec![0u8; 5_000], Access::ReadWrite).expect("region");
        let (ready, is_ready) = std::sync::mpsc::channel();
        ask.send((region.key(), ready)).expect("the peer's thread");
        until("direct access", || is_ready.try_recv().is_ok()).await;
        assert_eq!(b.stats().granted_keys, 1);
        let mut revoked = Box::pin(region.revoke());
        let early = tokio::time::timeout(Duration::from_millis(100), &mut revoked).await;
        assert!(early.is_err(), "handed back while the peer may still reach it");
        go.send(()).expect("the peer's thread");
        let memory = within(LIMIT, "the memory", revoked).await;
        assert_eq!(memory.expect("revoked").len(), 5_000);
        until("the peer to end", || peer.is_finished()).await;
        peer.join().expect("no panic");
    });
    drop(watch);
}

#[test]
fn memory_waits_for_the_peer_over_mock() {
    memory_waits_for_the_peer(Way::MockDirect);
}
