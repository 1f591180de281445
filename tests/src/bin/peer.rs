//! The other process of the tests that need one. What it is to do is said by its arguments; what
//! it has come to, it says line by line on its standard output. It ends with the process that
//! started it.
//!
//! `peer MODE [NAME=VALUE]…`; the modes are the arms of [`work`].

use std::collections::HashMap;
use std::fmt::Display;
use std::future::{Future, pending};
use std::io::Read;
use std::str::FromStr;
use std::time::Duration;

use thalweg::{Access, CloseReason, Config, Endpoint, Error, LinkKind, Message, Node, RemoteKey};
use thalweg_tests::{Random, Way};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The longest payload of the stream that is checked.
const STREAM_MAX_BYTES: usize = 256 << 10;
const REGION_BYTES: usize = 1 << 20;

struct Arguments(HashMap<String, String>);

impl Arguments {
    fn find<T: FromStr>(&self, name: &str) -> Option<T> {
        self.0.get(name)?.parse().ok()
    }

    fn or<T: FromStr>(&self, name: &str, default: T) -> T {
        self.find(name).unwrap_or(default)
    }

    fn way(&self) -> Way {
        let name: String = self.or("way", "Tcp".to_owned());
        Way::ALL
            .into_iter()
            .chain([Way::Ucx, Way::Verbs])
            .find(|way| format!("{way:?}") == name)
            .unwrap_or(Way::Tcp)
    }

    fn config(&self) -> Config {
        let mut config = self.way().config();
        if let Some(ms) = self.find("keepalive_ms") {
            config = config.keepalive(Duration::from_millis(ms));
        }
        if let Some(device) = self.find::<String>("device") {
            config = config.verbs_devices(device.split('+'));
        }
        if self.find::<String>("any").is_some() {
            config = config.transports([LinkKind::Shm, LinkKind::Tcp]);
        }
        config
    }
}

fn main() -> Result<(), Failure> {
    // SAFETY: takes no pointers. Nothing of a test may outlive it.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let mut words = std::env::args().skip(1);
    let mode = words.next().unwrap_or_default();
    let named = words.filter_map(|word| {
        word.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()))
    });
    let arguments = Arguments(named.collect());
    raise_descriptor_limit();
    let threads = arguments.or("threads", 1);
    thalweg_tests::runtime(threads).block_on(work(&mode, &arguments))
}

async fn work(mode: &str, arguments: &Arguments) -> Result<(), Failure> {
    match mode {
        "victim" => victim(arguments).await,
        "handshakes" => handshakes(arguments).await,
        "hold" => hold(arguments).await,
        "echo" => echo(arguments).await,
        "watch" => watch(arguments).await,
        "check" => check(arguments).await,
        _ => Err(format!("no such mode: {mode:?}").into()),
    }
}

fn say(what: impl Display) {
    println!("{what}");
}

/// Connects, or listens and accepts, as the arguments say.
async fn endpoint(node: &Node, arguments: &Arguments) -> Result<Endpoint, Failure> {
    if let Some(address) = arguments.find::<String>("connect") {
        return Ok(node.connect(address.as_str()).await?);
    }
    let address: String = arguments.or("listen", "thalweg://127.0.0.1:0".to_owned());
    let listener = node.listen(address.as_str()).await?;
    say(format_args!("LISTENING {}", listener.address()));
    Ok(listener.accept().await?)
}

/// Is killed in the middle of something.
async fn victim(arguments: &Arguments) -> Result<(), Failure> {
    let node = Node::new(arguments.config())?;
    let endpoint = endpoint(&node, arguments).await?;
    say("UP");
    if arguments.or("fork", 0) == 1 {
        say(format_args!("CHILD {}", fork_bystander()));
    }
    let (way, phase) = (arguments.way(), arguments.or("phase", String::new()));
    let random = Random::new(arguments.or("seed", 1));
    match phase.as_str() {
        "stream" | "close" => both_ways(way, &node, &endpoint, random, 128 << 10).await?,
        "large" => both_ways(way, &node, &endpoint, random, 24 << 20).await?,
        "views" => {
            let payload = vec![7u8; 64 << 10];
            say("GOING");
            // Each is over when the other side has let go of it.
            let many = (0..100).map(|_| endpoint.send(Way::ShmLoans.message(&node, &payload)));
            futures_util::future::join_all(many).await;
        }
        "loans" => {
            let mut held = Vec::new();
            say("GOING");
            loop {
                held.push(endpoint.recv().await?);
            }
        }
        "onesided" => one_sided(&node, &endpoint).await?,
        "tags" => {
            let waiting = endpoint.tag_recv(1, u64::MAX, vec![0; 1 << 20]);
            say("GOING");
            waiting.await?;
        }
        "goodbye" => {
            say("GOING");
            endpoint.close(CloseReason::new(1, "going")).await?;
        }
        _ => say("GOING"),
    }
    pending().await
}

async fn both_ways(
    way: Way,
    node: &Node,
    endpoint: &Endpoint,
    mut random: Random,
    len_max: usize,
) -> Result<(), Failure> {
    say("GOING");
    let sending = async {
        loop {
            let bytes = vec![1u8; random.below(len_max)];
            endpoint.send(way.message(node, &bytes)).await?;
        }
    };
    let receiving = async {
        loop {
            endpoint.recv().await?;
        }
    };
    both(sending, receiving).await
}

/// Runs both until one fails.
async fn both(
    one: impl Future<Output = Result<(), Error>>,
    other: impl Future<Output = Result<(), Error>>,
) -> Result<(), Failure> {
    let (one, other) = (std::pin::pin!(one), std::pin::pin!(other));
    match futures_util::future::select(one, other).await {
        futures_util::future::Either::Left((result, _))
        | futures_util::future::Either::Right((result, _)) => Ok(result?),
    }
}

/// Offers a region, and writes to and reads from the other's.
async fn one_sided(node: &Node, endpoint: &Endpoint) -> Result<(), Failure> {
    let region = node.register(vec![3u8; REGION_BYTES], Access::ReadWrite)?;
    endpoint.send(Message::copy_from_slice(&region.key().to_bytes())).await?;
    let key = RemoteKey::from_bytes(&endpoint.recv().await?.to_vec()?)?;
    say("GOING");
    let putting = async {
        let mut buffer = vec![5u8; REGION_BYTES / 2];
        loop {
            buffer = endpoint.put(buffer, &key, 0).await?;
        }
    };
    let getting = async {
        let mut buffer = vec![5u8; REGION_BYTES / 2];
        loop {
            buffer = endpoint.get(buffer, &key, 0).await?;
        }
    };
    let over = both(putting, getting).await;
    // What is left of the endpoint, if anything is.
    if endpoint.send(Message::copy_from_slice(b"still here")).await.is_ok() {
        let _ = endpoint.recv().await;
    }
    over
}

/// Forks a child that does nothing and lives on, for at most a minute. The child's number.
fn fork_bystander() -> i32 {
    // SAFETY: the child calls nothing but async-signal-safe functions.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::alarm(60);
            loop {
                libc::pause();
            }
        }
        child
    }
}

/// Connects again and again, several at a time.
async fn handshakes(arguments: &Arguments) -> Result<(), Failure> {
    let node = Node::new(arguments.config())?;
    let address: String = arguments.or("connect", String::new());
    say("GOING");
    let mut kept = Vec::new();
    loop {
        let four = (0..4).map(|_| node.connect(address.as_str()));
        kept.extend(futures_util::future::join_all(four).await);
        kept.truncate(64);
    }
}

/// Holds many idle endpoints until its standard input ends.
async fn hold(arguments: &Arguments) -> Result<(), Failure> {
    let node = Node::new(arguments.config())?;
    let address: String = arguments.or("connect", String::new());
    let mut held = Vec::new();
    let count: usize = arguments.or("count", 1);
    while held.len() < count {
        let some = (0..50.min(count - held.len())).map(|_| node.connect(address.as_str()));
        held.extend(futures_util::future::try_join_all(some).await?);
    }
    say("UP");
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await??;
    drop(held);
    node.close(CloseReason::new(0, "measured")).await;
    Ok(())
}

/// Listens, and sends back whatever comes, on every endpoint, for ever.
async fn echo(arguments: &Arguments) -> Result<(), Failure> {
    let node = Node::new(arguments.config())?;
    let address: String = arguments.or("listen", "thalweg://127.0.0.1:0".to_owned());
    let listener = node.listen(address.as_str()).await?;
    say(format_args!("LISTENING {}", listener.address()));
    loop {
        let endpoint = listener.accept().await?;
        tokio::spawn(async move {
            let error = loop {
                match endpoint.recv().await {
                    Ok(message) => {
                        if let Err(failed) = endpoint.send(message).await {
                            break failed.error;
                        }
                    }
                    Err(error) => break error,
                }
            };
            say(format_args!("ENDED echo {:?} {error}", error.kind()));
        });
    }
}

/// Has operations pending, streaming or not, and says how each of them ended.
async fn watch(arguments: &Arguments) -> Result<(), Failure> {
    let node = Node::new(arguments.config())?;
    let endpoint = endpoint(&node, arguments).await?;
    let route = endpoint.route();
    say(format_args!("ROUTE {} {}", route.link(), route.to_string().replace('\n', " | ")));
    let streams = arguments.or("stream", 0) == 1;
    let receiving = async {
        loop {
            if let Err(error) = endpoint.recv().await {
                return ended("recv", &error);
            }
        }
    };
    let tagged = async {
        if let Err(failed) = endpoint.tag_recv(9, u64::MAX, vec![0; 64]).await {
            ended("tag_recv", &failed.error);
        }
    };
    let sending = async {
        if !streams {
            return say("GOING");
        }
        for count in 0u64.. {
            if count == 8 {
                say("GOING");
            }
            if let Err(failed) = endpoint.send(vec![1u8; 1 << 20]).await {
                return ended("send", &failed.error);
            }
        }
    };
    tokio::join!(receiving, tagged, sending);
    Ok(())
}

fn ended(what: &str, error: &Error) {
    say(format_args!("ENDED {what} {:?} {error}", error.kind()));
}

/// Sends messages of all sizes to an `echo`, and compares what comes back byte for byte.
async fn check(arguments: &Arguments) -> Result<(), Failure> {
    let node = Node::new(arguments.config())?;
    let endpoint = endpoint(&node, arguments).await?;
    let (count, seed) = (arguments.or("count", 100u64), arguments.or("seed", 1u64));
    let sizes = |i: u64| Random::new(seed ^ i).below(1 << Random::new(i).below(19));
    let sending = async {
        for i in 0..count {
            let len = sizes(i).min(STREAM_MAX_BYTES);
            endpoint.send(thalweg_tests::pattern(seed ^ i, len)).await?;
        }
        Ok::<_, Error>(())
    };
    let receiving = async {
        let mut bytes_total = 0;
        for i in 0..count {
            let bytes = endpoint.recv().await?.to_vec()?;
            assert_eq!(bytes.len(), sizes(i).min(STREAM_MAX_BYTES), "length of message {i}");
            thalweg_tests::check_pattern(seed ^ i, &bytes);
            bytes_total += bytes.len();
        }
        Ok::<_, Error>(bytes_total)
    };
    let (sent, received) = tokio::join!(sending, receiving);
    sent?;
    say(format_args!(
        "CHECKED {count} messages, {} bytes, over {}",
        received?,
        endpoint.route().link()
    ));
    endpoint.close(CloseReason::new(0, "checked")).await?;
    Ok(())
}

fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is valid for the kernel to read and write during the calls.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}
