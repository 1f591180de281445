//! Strangers, bad input and limits, at connect and on an established connection.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use thalweg::{
    Config, Endpoint, ErrorKind, LinkKind, Listener, Message, MockSwitch, Node, Verdict,
};
use thalweg_tests::{Random, Way, connect, pair_with, poll_times, run, run_once, until, within};

fn tcp() -> Config {
    Way::Tcp.config()
}

async fn listening(config: Config) -> (Node, Listener) {
    let node = Node::new(config).expect("a node");
    let listener = node.listen("thalweg://127.0.0.1:0").await.expect("listening");
    (node, listener)
}

fn socket_address(listener: &Listener) -> SocketAddr {
    format!("{}:{}", listener.address().host(), listener.address().port()).parse().expect("one")
}

/// A connection that speaks the protocol by hand.
struct Raw(TcpStream);

impl Raw {
    fn connect(to: SocketAddr) -> Raw {
        Raw::over(TcpStream::connect(to).expect("connecting"))
    }

    fn over(stream: TcpStream) -> Raw {
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        stream.set_write_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        Raw(stream)
    }

    fn preface(major: u16, minor: u16, body_len: usize) -> Vec<u8> {
        let mut bytes = b"thalweg\x1a".to_vec();
        bytes.extend(major.to_le_bytes());
        bytes.extend(minor.to_le_bytes());
        bytes.extend((body_len as u32).to_le_bytes());
        bytes
    }

    /// The fields of a hello: type u16, length u32, value.
    fn hello() -> Vec<u8> {
        Raw::hello_with(b"\x01\x03tcp\x00\x00")
    }

    /// The same, with these links and their blobs.
    fn hello_with(links: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut field = |kind: u16, value: &[u8]| {
            bytes.extend(kind.to_le_bytes());
            bytes.extend((value.len() as u32).to_le_bytes());
            bytes.extend(value);
        };
        field(1, &[3; 16]);
        field(2, &[4; 16]);
        field(3, b"by hand");
        field(4, links);
        field(5, &(1u64 << 20).to_le_bytes());
        field(6, &(1u64 << 20).to_le_bytes());
        field(7, &(1u64 << 30).to_le_bytes());
        field(8, &1000u32.to_le_bytes());
        // A field of a version to come.
        field(999, b"unknown");
        bytes
    }

    fn say(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).expect("writing");
    }

    fn hear(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).expect("reading");
        bytes
    }

    /// The other side's preface and hello: its version.
    fn hear_hello(&mut self) -> (u16, u16) {
        self.hear_whole_hello().0
    }

    /// The same, and the blob that it offers for shared memory.
    fn hear_blob(&mut self) -> Vec<u8> {
        let (_, body) = self.hear_whole_hello();
        let at = body.windows(4).position(|bytes| bytes == b"\x03shm").expect("it offers shm") + 4;
        let len = usize::from(u16::from_le_bytes([body[at], body[at + 1]]));
        body[at + 2..][..len].to_vec()
    }

    fn hear_whole_hello(&mut self) -> ((u16, u16), Vec<u8>) {
        let preface = self.hear(16);
        assert_eq!(&preface[..8], b"thalweg\x1a");
        let number = |at: usize| u16::from_le_bytes([preface[at], preface[at + 1]]);
        let len = u32::from_le_bytes(preface[12..16].try_into().expect("four"));
        ((number(8), number(10)), self.hear(len as usize))
    }

    /// A message of the link set-up.
    fn hear_setup(&mut self) -> Vec<u8> {
        let len = u32::from_le_bytes(self.hear(4).try_into().expect("four"));
        self.hear(len as usize)
    }

    /// The whole handshake of a connecting side, ending in a tcp link.
    fn handshake(&mut self, minor: u16) {
        let hello = Raw::hello();
        self.say(&Raw::preface(1, minor, hello.len()));
        self.say(&hello);
        assert_eq!(self.hear_hello().0, 1);
        // Attempt tcp; both say that it went well; go.
        self.say(b"\x06\x00\x00\x00\x01\x03\x00tcp");
        assert_eq!(self.hear_setup(), [2]);
        self.say(b"\x01\x00\x00\x00\x02");
        self.say(b"\x01\x00\x00\x00\x04");
    }

    /// A frame of the tcp link: a parcel of class `class`.
    fn parcel(class: u8, head: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![1, class];
        bytes.extend((head.len() as u16).to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        bytes.extend((payload.len() as u64).to_le_bytes());
        bytes.extend(head);
        bytes.extend(payload);
        bytes
    }

    /// Reads until the other side closes; gives what came.
    fn into_the_end(mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // A reset is an end too.
        let _ = self.0.read_to_end(&mut bytes);
        bytes
    }
}

/// The listener still does its work.
async fn still_accepts(listener: &Listener) {
    let node = Node::new(tcp()).expect("a node");
    let (a, b) = within(Duration::from_secs(10), "a good connect", connect(&node, listener)).await;
    a.send(Message::copy_from_slice(b"good")).await.expect("sending");
    assert_eq!(b.recv().await.expect("receiving").len_bytes(), 4);
}

#[test]
fn port_in_use() {
    run("port_in_use", || async {
        let (node, listener) = listening(tcp()).await;
        let error = node.listen(listener.address()).await.expect_err("taken");
        assert_eq!(error.kind(), ErrorKind::AddressInUse);
        assert!(error.to_string().contains(&listener.address().port().to_string()), "{error}");
        // Free again when the listener is gone.
        let address = listener.address().clone();
        drop(listener);
        within(Duration::from_secs(20), "the port to be free", async {
            while node.listen(&address).await.is_err() {
                tokio::task::yield_now().await;
            }
        })
        .await;
    });
}

#[test]
fn names_and_addresses() {
    run("names_and_addresses", || async {
        let node = Node::new(tcp().connect_timeout(Duration::from_secs(15))).expect("a node");
        let error = node.connect("thalweg://no-such-host.invalid:1").await.expect_err("no host");
        assert!(matches!(error.kind(), ErrorKind::NameResolution | ErrorKind::TimedOut), "{error}");
        let error = node.connect("http://127.0.0.1:1").await.expect_err("no address");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        // Names work.
        let (_other, listener) = listening(tcp()).await;
        let address = format!("thalweg://localhost:{}", listener.address().port());
        let (a, b) = tokio::join!(node.connect(address), listener.accept());
        a.expect("connecting");
        b.expect("accepting");
    });
}

#[test]
fn refused() {
    run("refused", || async {
        let address = {
            let free = TcpListener::bind("127.0.0.1:0").expect("a port");
            format!("thalweg://{}", free.local_addr().expect("bound"))
        };
        let node = Node::new(tcp()).expect("a node");
        let error = node.connect(address).await.expect_err("nobody listens");
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.is_retryable());
        assert_eq!(node.stats().handshakes, 0);
    });
}

#[test]
fn connecting_to_silence_times_out() {
    run("connecting_to_silence_times_out", || async {
        let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = format!("thalweg://{}", silent.local_addr().expect("bound"));
        let node = Node::new(tcp().connect_timeout(Duration::from_millis(150))).expect("a node");
        let started = Instant::now();
        let error = node.connect(address).await.expect_err("silence");
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        let said = error.to_string();
        assert!(said.contains("connected, but the peer said nothing within 150ms"), "{said}");
        assert!(started.elapsed() < Duration::from_secs(5));
    });
}

#[test]
fn connecting_to_an_echo() {
    run("connecting_to_an_echo", || async {
        let echo = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = format!("thalweg://{}", echo.local_addr().expect("bound"));
        let thread = std::thread::spawn(move || {
            let (stream, _) = echo.accept().expect("accepted");
            let mut back = stream.try_clone().expect("cloned");
            // Ends with the connection, however that ends.
            let _ = std::io::copy(&mut &stream, &mut back);
        });
        let node = Node::new(tcp()).expect("a node");
        let error = node.connect(address).await.expect_err("an echo");
        assert_eq!(error.kind(), ErrorKind::NotThalweg);
        assert!(error.to_string().contains("the peer answers with our own words"), "{error}");
        thread.join().expect("ended");
    });
}

#[test]
fn connecting_to_something_else() {
    run_once("connecting_to_something_else", async {
        for (answer, kind) in [
            (b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), ErrorKind::NotThalweg),
            (b"HTTP".to_vec(), ErrorKind::ConnectionLost),
            (Vec::new(), ErrorKind::ConnectionLost),
            (Raw::preface(9, 2, 0), ErrorKind::VersionMismatch),
            (Raw::preface(1, 0, 1 << 20), ErrorKind::Protocol),
            ([Raw::preface(1, 0, 3), b"\x01\x00\x00".to_vec()].concat(), ErrorKind::Protocol),
        ] {
            let other = TcpListener::bind("127.0.0.1:0").expect("a port");
            let address = format!("thalweg://{}", other.local_addr().expect("bound"));
            let expected = answer.clone();
            let thread = std::thread::spawn(move || {
                let mut raw = Raw::over(other.accept().expect("accepting").0);
                raw.hear_hello();
                raw.say(&answer);
            });
            let node = Node::new(tcp()).expect("a node");
            let error = node.connect(address).await.expect_err("something else");
            assert_eq!(error.kind(), kind, "{error} after {expected:?}");
            if kind == ErrorKind::VersionMismatch {
                let text = error.to_string();
                assert!(text.contains('9') && text.contains("version 1"), "{text}");
                assert!(!error.is_retryable());
            }
            thread.join().expect("no panic");
        }
    });
}

#[test]
fn strangers_at_the_listener() {
    run("strangers_at_the_listener", || async {
        let config = tcp().handshake_timeout(Duration::from_millis(200)).max_handshakes(4);
        let (node, listener) = listening(config).await;
        let to = socket_address(&listener);
        // More silent ones than may be in the handshake at once: they are thrown out in time.
        let silent: Vec<_> = (0..12).map(|_| Raw::connect(to)).collect();
        let mut random = Random::new(1);
        for round in 0..8 {
            let mut raw = Raw::connect(to);
            let bytes: Vec<u8> = match round {
                0 => b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
                1 => b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03aaaaaaaaaaaa".to_vec(),
                2 => Raw::preface(1, 0, 1 << 30),
                3 => [Raw::preface(1, 0, 65_536), vec![0xff; 65_536]].concat(),
                4 => b"thalweg".to_vec(),
                5 => Raw::preface(1, 0, 500),
                _ => (0..300).map(|_| random.next() as u8).collect(),
            };
            // It may have been thrown out already.
            let _ = raw.0.write_all(&bytes);
            if round % 2 == 0 {
                tokio::task::spawn_blocking(move || raw.into_the_end()).await.expect("no panic");
            }
        }
        still_accepts(&listener).await;
        until("all strangers to be gone", || node.stats().handshakes == 0).await;
        assert!(node.stats().handshakes_failed >= 12, "{:?}", node.stats());
        assert_eq!(node.stats().window_bytes % (1 << 16), 0, "windows are given back");
        drop(silent);
    });
}

#[test]
fn another_major_version_is_refused_and_told() {
    run("another_major_version_is_refused_and_told", || async {
        let (node, listener) = listening(tcp()).await;
        let to = socket_address(&listener);
        let told = tokio::task::spawn_blocking(move || {
            let mut raw = Raw::connect(to);
            raw.say(&Raw::preface(2, 0, 0));
            raw.into_the_end()
        })
        .await
        .expect("no panic");
        assert_eq!(told, Raw::preface(1, 1, 0));
        until("the handshake to end", || node.stats().handshakes_failed == 1).await;
        still_accepts(&listener).await;
    });
}

/// An endpoint whose other end is a socket of ours.
async fn by_hand(minor: u16) -> (Node, Listener, Endpoint, Raw) {
    let (node, listener) = listening(tcp().max_message_bytes(1 << 20).max_frames(100)).await;
    let to = socket_address(&listener);
    let handshake = tokio::task::spawn_blocking(move || {
        let mut raw = Raw::connect(to);
        raw.handshake(minor);
        raw
    });
    let (endpoint, raw) = tokio::join!(listener.accept(), handshake);
    (node, listener, endpoint.expect("accepting"), raw.expect("no panic"))
}

#[test]
fn another_minor_version_connects() {
    run("another_minor_version_connects", || async {
        for minor in [0, 1, 77] {
            let (_node, _listener, endpoint, mut raw) = by_hand(minor).await;
            assert_eq!(endpoint.peer().version, (1, minor.min(1)));
            assert_eq!(endpoint.peer().hello, "by hand");
            // A message of one frame.
            raw.say(&Raw::parcel(1, &[1, 0, 0, 0, 0], b"greetings"));
            let got = endpoint.recv().await.expect("receiving");
            assert_eq!(got.to_vec().expect("bytes"), b"greetings");
        }
    });
}

#[test]
fn hostile_bytes_on_an_established_connection() {
    run_once("hostile_bytes_on_an_established_connection", async {
        let message = |seq: u32| [&[1][..], &seq.to_le_bytes()].concat();
        let mut long = Raw::parcel(1, &message(0), b"");
        long[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
        let mut longer_head = Raw::parcel(1, &message(0), b"");
        longer_head[2..4].copy_from_slice(&2000u16.to_le_bytes());
        let attacks: Vec<(&str, Vec<u8>)> = vec![
            ("an unknown frame", vec![99; 16]),
            ("an unknown class", Raw::parcel(9, &message(0), b"")),
            ("a length over the limit", long),
            ("a head that is too long", longer_head),
            ("an empty head", Raw::parcel(1, b"", b"x")),
            ("a cut head", Raw::parcel(1, &[1, 0], b"x")),
            ("an unknown head", Raw::parcel(1, &[77, 0, 0, 0, 0], b"x")),
            ("a message over the limit", Raw::parcel(1, &message(0), &vec![0; (1 << 20) + 1])),
            (
                "a number twice",
                [Raw::parcel(1, &message(0), b"x"), Raw::parcel(1, &message(0), b"x")].concat(),
            ),
            ("a number far ahead", Raw::parcel(1, &message(1 << 31), b"x")),
            ("frame lengths that do not add up", {
                let mut head = vec![3, 0, 0, 0, 0];
                head.extend(5u32.to_le_bytes());
                head.extend(6u32.to_le_bytes());
                Raw::parcel(1, &head, b"ten bytes.")
            }),
            ("too many frames", {
                let mut head = vec![3, 0, 0, 0, 0];
                head.extend([0; 4 * 101]);
                Raw::parcel(1, &head, b"")
            }),
            ("a table over the limit", {
                let mut head = vec![6, 0, 0, 0, 0];
                head.extend(u32::MAX.to_le_bytes());
                head.extend(0u32.to_le_bytes());
                head.extend([1, 0, 0, 0]);
                Raw::parcel(0, &head, b"")
            }),
            ("a message without its table", {
                Raw::parcel(1, &[5, 0, 0, 0, 0, 200, 0, 0, 0], b"")
            }),
            ("credit for nothing", {
                let mut head = vec![15];
                head.extend(1000u64.to_le_bytes());
                head.extend(0u64.to_le_bytes());
                Raw::parcel(0, &head, b"")
            }),
            ("an answer to no put", Raw::parcel(0, &[10, 0, 0, 0, 0, 0], b"")),
            ("an answer to no get", Raw::parcel(3, &[12, 0, 0, 0, 0, 0], b"")),
            ("an answer to no fence", Raw::parcel(0, &[14, 0, 0, 0, 0], b"")),
            ("an answer to no goodbye", Raw::parcel(0, &[18], b"")),
            ("direct access not spoken of", Raw::parcel(0, &[&[19][..], &[7; 8]].concat(), b"")),
            (
                "a key given back, not spoken of",
                Raw::parcel(0, &[&[22][..], &[7; 8]].concat(), b""),
            ),
            ("a landing for no offer", {
                let mut frame = Raw::parcel(0, b"", b"");
                frame[0] = 5;
                frame[4] = 7;
                frame
            }),
        ];
        for (name, bytes) in attacks {
            let (node, listener, endpoint, mut raw) = by_hand(0).await;
            let attack = tokio::task::spawn_blocking(move || {
                // It may hang up in the middle.
                let _ = raw.0.write_all(&bytes);
                raw.into_the_end()
            });
            let mut error = within(Duration::from_secs(10), name, endpoint.recv()).await;
            if error.is_ok() {
                error = within(Duration::from_secs(10), name, endpoint.recv()).await;
            }
            let error = error.expect_err(name);
            assert_eq!(error.kind(), ErrorKind::Protocol, "{name}: {error}");
            assert!(error.peer().is_some(), "{error}");
            attack.await.expect("no panic");
            until("the endpoint to be gone", || node.stats().endpoints == 0).await;
            assert_eq!(node.stats().window_bytes, 0, "{name}");
            still_accepts(&listener).await;
        }
    });
}

/// Over a link that cannot: direct access is refused, and answers that nobody asked for are a
/// breach.
#[test]
fn direct_access_by_hand() {
    run_once("direct_access_by_hand", async {
        let about = |kind: u8, key: u8| Raw::parcel(0, &[&[kind][..], &[key; 8]].concat(), b"");
        let (_node, _listener, _endpoint, mut raw) = by_hand(1).await;
        let said = tokio::task::spawn_blocking(move || {
            // Two wishes, and a revocation of what was never granted.
            raw.say(&[about(22, 1), about(19, 1), about(19, 2)].concat());
            raw.hear(2 * about(21, 1).len())
        });
        let said = said.await.expect("no panic");
        assert_eq!(said, [about(21, 1), about(21, 2)].concat(), "both are refused");
        let granted = [&[20][..], &[1; 8], &[9, 0, 0, 0, 0, 0, 0, 0], &[3], b"opaque"].concat();
        for (name, bytes) in [
            ("a grant that nobody asked for", Raw::parcel(0, &granted, b"")),
            ("a refusal that nobody asked for", about(21, 1)),
            ("a key given back that was not granted", about(23, 1)),
            ("a wish with a payload", Raw::parcel(0, &[&[19][..], &[1; 8]].concat(), b"x")),
        ] {
            let (_node, _listener, endpoint, mut raw) = by_hand(1).await;
            raw.say(&bytes);
            let error = within(Duration::from_secs(10), name, endpoint.recv()).await;
            assert_eq!(error.expect_err(name).kind(), ErrorKind::Protocol, "{name}");
        }
    });
}

#[test]
fn a_connection_cut_anywhere_is_noticed() {
    run_once("a_connection_cut_anywhere_is_noticed", async {
        let whole = Raw::parcel(1, &[1, 0, 0, 0, 0], &[5; 5000]);
        for cut in [0, 1, 15, 16, 18, 21, 22, 3000, 5020] {
            let (_node, _listener, endpoint, mut raw) = by_hand(0).await;
            raw.say(&whole[..cut]);
            drop(raw);
            let error = within(Duration::from_secs(10), "noticing", endpoint.recv()).await;
            let kind = error.expect_err("cut").kind();
            assert!(matches!(kind, ErrorKind::ConnectionLost | ErrorKind::PeerGone), "{kind:?}");
        }
    });
}

fn raise_descriptors() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: reads into, then writes from, a local of the right type.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
    }
}

async fn a_thousand(way: Way) {
    raise_descriptors();
    let node = Node::new(way.config().connect_timeout(Duration::from_secs(50))).expect("a node");
    let config = way.config().handshake_timeout(Duration::from_secs(50));
    let there = Node::new(config).expect("a node");
    let listener = there.listen("thalweg://127.0.0.1:0").await.expect("listening");
    let connecting =
        futures_util::future::join_all((0..1000).map(|_| node.connect(listener.address())));
    let accepting = async {
        let mut accepted = Vec::new();
        for _ in 0..1000 {
            accepted.push(listener.accept().await.expect("accepting"));
        }
        accepted
    };
    let (connected, accepted) = tokio::join!(connecting, accepting);
    let connected: Vec<_> = connected.into_iter().map(|a| a.expect("connecting")).collect();
    assert!(connected.iter().all(|endpoint| endpoint.route().link() == way.link()));
    let sends = connected.iter().map(|a| a.send(Message::copy_from_slice(b"hello")));
    for sent in futures_util::future::join_all(sends).await {
        sent.expect("sending");
    }
    for endpoint in &accepted {
        assert_eq!(endpoint.recv().await.expect("receiving").len_bytes(), 5);
    }
}

#[test]
fn a_thousand_connects_at_once_tcp() {
    run_once("a_thousand_connects_at_once_tcp", a_thousand(Way::Tcp));
}

#[test]
fn a_thousand_connects_at_once_shm() {
    run_once("a_thousand_connects_at_once_shm", a_thousand(Way::ShmAll));
}

#[test]
fn a_link_that_does_not_come_up_is_passed_over() {
    run("a_link_that_does_not_come_up_is_passed_over", || async {
        let switch = MockSwitch::new();
        switch.refuse(true);
        let config = || {
            Config::new()
                .transports([LinkKind::Mock, LinkKind::Tcp])
                .mock(Way::Mock.plan().switch(&switch))
        };
        let node = Node::new(config()).expect("a node");
        let (_there, listener) = listening(config()).await;
        let (a, b) = connect(&node, &listener).await;
        for endpoint in [&a, &b] {
            let route = endpoint.route();
            assert_eq!(route.link(), LinkKind::Tcp);
            let mock = route.candidates.iter().find(|c| c.link == LinkKind::Mock).expect("listed");
            assert_eq!(mock.verdict, Verdict::Rejected);
            assert!(mock.reason.contains("refused on command"), "{route}");
        }
        switch.refuse(false);
        let (a, _b) = connect(&node, &listener).await;
        assert_eq!(a.route().link(), LinkKind::Mock);
        // Nothing in common.
        let picky = Node::new(Config::new().transports([LinkKind::Mock])).expect("a node");
        let (_there, listener) = listening(tcp()).await;
        let error = picky.connect(listener.address()).await.expect_err("nothing in common");
        assert_eq!(error.kind(), ErrorKind::NoRoute);
        assert!(error.to_string().contains("does not offer"), "{error}");
    });
}

const HANDSHAKE: Duration = Duration::from_secs(3);

/// Half of the handshake's time was kept for the next link, which took it.
fn assert_passed_over(endpoint: &Endpoint, began: Instant) {
    assert!(began.elapsed() < HANDSHAKE, "{:?}", began.elapsed());
    let route = endpoint.route();
    assert_eq!(route.link(), LinkKind::Tcp, "{route}");
    let shm = route.candidates.iter().find(|c| c.link == LinkKind::Shm).expect("listed");
    assert!(shm.reason.contains("took longer"), "{route}");
}

/// Link set-up: an attempt at shared memory.
const ATTEMPT_SHM: &[u8] = b"\x06\x00\x00\x00\x01\x03\x00shm";
/// Link set-up: it failed on this side, for no reason.
const FAILED: &[u8] = b"\x05\x00\x00\x00\x03\x00\x00\x00\x00";

/// A peer that wants shared memory and then does nothing about it: TCP still comes up in time.
#[test]
fn a_connecting_peer_that_falls_silent_in_shm_set_up() {
    run_once("a_connecting_peer_that_falls_silent_in_shm_set_up", async {
        let (_node, listener) = listening(Config::new().handshake_timeout(HANDSHAKE)).await;
        let to = socket_address(&listener);
        let raw = tokio::task::spawn_blocking(move || {
            // The first connection only learns what a good offer looks like here.
            let hello = Raw::hello();
            let mut first = Raw::connect(to);
            first.say(&[Raw::preface(1, 0, hello.len()), hello].concat());
            let blob = first.hear_blob();
            drop(first);
            let mut links = b"\x02\x03shm".to_vec();
            links.extend((blob.len() as u16).to_le_bytes());
            links.extend(blob);
            links.extend(b"\x03tcp\x00\x00");
            let hello = Raw::hello_with(&links);
            let mut raw = Raw::connect(to);
            raw.say(&[Raw::preface(1, 0, hello.len()), hello].concat());
            raw.hear_hello();
            raw.say(ATTEMPT_SHM);
            assert_eq!(raw.hear_setup()[0], 3, "it gives up");
            raw.say(FAILED);
            raw.say(b"\x06\x00\x00\x00\x01\x03\x00tcp");
            assert_eq!(raw.hear_setup(), [2]);
            raw.say(b"\x01\x00\x00\x00\x02");
            raw.say(b"\x01\x00\x00\x00\x04");
            raw.say(&Raw::parcel(1, &[1, 0, 0, 0, 0], b"over tcp"));
            raw
        });
        let began = Instant::now();
        let endpoint = within(Duration::from_secs(20), "accepting", listener.accept()).await;
        let endpoint = endpoint.expect("over tcp");
        assert_passed_over(&endpoint, began);
        assert_eq!(endpoint.recv().await.expect("receiving").len_bytes(), 8);
        drop(raw.await.expect("no panic"));
    });
}

/// A listener that takes the connection to its Unix socket and says nothing over it.
#[test]
fn a_listening_peer_that_falls_silent_in_shm_set_up() {
    // A node whose Unix socket nobody attends to: its runtime only runs to say what it offers.
    let asleep = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let asleep = asleep.expect("a runtime");
    let (unattended, blob) = asleep.block_on(async {
        let (node, listener) = listening(Config::new()).await;
        let to = socket_address(&listener);
        let blob = tokio::task::spawn_blocking(move || {
            let hello = Raw::hello();
            let mut raw = Raw::connect(to);
            raw.say(&[Raw::preface(1, 0, hello.len()), hello].concat());
            raw.hear_blob()
        });
        let blob = blob.await.expect("no panic");
        ((node, listener), blob)
    });
    run_once("a_listening_peer_that_falls_silent_in_shm_set_up", async {
        let tcp = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = format!("thalweg://{}", tcp.local_addr().expect("bound"));
        let raw = std::thread::spawn(move || {
            let mut raw = Raw::over(tcp.accept().expect("accepting").0);
            raw.hear_hello();
            let mut links = b"\x02\x03shm".to_vec();
            links.extend((blob.len() as u16).to_le_bytes());
            links.extend(blob);
            links.extend(b"\x03tcp\x00\x00");
            let hello = Raw::hello_with(&links);
            raw.say(&[Raw::preface(1, 0, hello.len()), hello].concat());
            assert_eq!(raw.hear_setup(), b"\x01\x03\x00shm");
            assert_eq!(raw.hear_setup()[0], 3, "it gives up");
            raw.say(FAILED);
            assert_eq!(raw.hear_setup(), b"\x01\x03\x00tcp");
            raw.say(b"\x01\x00\x00\x00\x02");
            assert_eq!((raw.hear_setup(), raw.hear_setup()), (vec![2], vec![4]));
            raw
        });
        let node = Node::new(Config::new().connect_timeout(HANDSHAKE)).expect("a node");
        let began = Instant::now();
        let endpoint = node.connect(address.as_str()).await.expect("over tcp");
        assert_passed_over(&endpoint, began);
        drop(raw.join().expect("no panic"));
    });
    drop(unattended);
}

/// A link that breaks after any number of parcels ends everything that is pending, and nothing
/// that was complete is lost.
#[test]
fn a_link_may_break_anywhere() {
    run("a_link_may_break_anywhere", || async {
        for after in 0..40 {
            let config = |drop_after| {
                Way::MockReordering.config().mock(Way::MockReordering.plan().drop_after(drop_after))
            };
            let pair = thalweg_tests::pair_of(Way::Mock, config(Some(after)), config(None)).await;
            let region =
                pair.node_b.register(vec![0u8; 100_000], thalweg::Access::ReadWrite).expect("one");
            let key = region.key();
            let work = async {
                for round in 0..20u64 {
                    pair.a.send(Message::copy_from_slice(&[1; 300])).await?;
                    pair.a.tag_send(round, vec![2; 9_000]).await?;
                    pair.a.put(vec![3u8; 100_000], &key, 0).await?;
                    pair.a.get(vec![4u8; 100_000], &key, 0).await?;
                    pair.a.fence().await?;
                }
                thalweg::Result::Ok(())
            };
            let receiving = async {
                let error = loop {
                    if let Err(error) = pair.b.recv().await {
                        break error;
                    }
                };
                assert_eq!(error.kind(), ErrorKind::ConnectionLost);
            };
            let tags = async { while pair.b.tag_recv(0, 0, vec![0; 9_000]).await.is_ok() {} };
            let (worked, (), ()): (thalweg::Result<()>, _, _) = tokio::join!(work, receiving, tags);
            assert_eq!(worked.expect_err("it breaks").kind(), ErrorKind::ConnectionLost);
            assert_eq!(region.revoke().await.expect("revoked").len(), 100_000);
            until("all to be gone", || {
                pair.node_a.stats().endpoints == 0 && pair.node_b.stats().endpoints == 0
            })
            .await;
            assert_eq!(pair.a.stats().operations + pair.b.stats().operations, 0);
        }
    });
}

/// A peer that is stopped: every kind of operation ends at its deadline.
#[test]
fn deadlines_hold_when_nothing_moves() {
    run("deadlines_hold_when_nothing_moves", || async {
        let switch = MockSwitch::new();
        let pair = pair_with(Way::Mock, |config| {
            config.mock(Way::Mock.plan().switch(&switch)).close_timeout(Duration::from_millis(100))
        })
        .await;
        let region =
            pair.node_b.register(vec![0u8; 10_000], thalweg::Access::ReadWrite).expect("a region");
        let key = region.key();
        switch.pause(true);
        let short = Duration::from_millis(20);
        let late = |kind: ErrorKind| assert_eq!(kind, ErrorKind::TimedOut);
        late(pair.a.send(vec![1u8; 9_000]).timeout(short).await.expect_err("late").kind());
        late(pair.a.recv().timeout(short).await.expect_err("late").kind());
        late(pair.a.tag_send(1, vec![1u8; 9_000]).timeout(short).await.expect_err("late").kind());
        late(pair.a.tag_recv(1, 0, vec![0; 10]).timeout(short).await.expect_err("late").kind());
        late(pair.a.put(vec![1u8; 9_000], &key, 0).timeout(short).await.expect_err("late").kind());
        late(pair.a.get(vec![1u8; 9_000], &key, 0).timeout(short).await.expect_err("late").kind());
        late(pair.a.fence().timeout(short).await.expect_err("late").kind());
        // It goes on: what was begun takes effect.
        switch.pause(false);
        pair.a.fence().await.expect("a fence");
        assert_eq!(pair.b.recv().await.expect("receiving").len_bytes(), 9_000);
        let mut here = [0; 9_000];
        region.read(0, &mut here).expect("within");
        assert_eq!(here, [1; 9_000]);
        // A goodbye that nobody answers ends all the same.
        switch.pause(true);
        let closed = pair.a.close(thalweg::CloseReason::default()).await;
        assert_eq!(closed.expect_err("no answer").kind(), ErrorKind::TimedOut);
    });
}

#[test]
fn a_link_broken_on_command_fails_what_is_pending() {
    run("a_link_broken_on_command_fails_what_is_pending", || async {
        let switch = MockSwitch::new();
        let pair =
            pair_with(Way::Mock, |config| config.mock(Way::Mock.plan().switch(&switch))).await;
        let mut send = pair.a.tag_send(1, vec![1u8; 1 << 20]);
        assert!(poll_times(&mut send, 3).await.is_none());
        switch.break_links();
        let failed = send.await.expect_err("broken");
        assert_eq!(failed.kind(), ErrorKind::ConnectionLost);
        assert_eq!(failed.buffer.expect("back").len(), 1 << 20);
        assert_eq!(pair.b.closed().await.kind(), ErrorKind::ConnectionLost);
    });
}
