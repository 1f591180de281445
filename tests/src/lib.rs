//! What the tests share: the ways of connecting two nodes, connected pairs, bounded waiting, and
//! bytes that can be checked.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::{OnceLock, mpsc};
use std::task::{Context, Poll};
use std::time::Duration;

use thalweg::{
    Config, Endpoint, ErrorKind, Frame, LinkKind, Listener, Message, MockPlan, Node, Wake,
};

/// How long a test may take before it counts as hanging.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The same, where a machine may be emulated.
fn patience() -> Duration {
    if std::env::var_os("THALWEG_TEST_VM").is_some() { PATIENCE * 2 } else { PATIENCE }
}

/// How two nodes are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// TCP.
    Tcp,
    /// Shared memory with all it has.
    ShmAll,
    /// Shared memory without loans and without `process_vm_readv`: in line and through the arena.
    ShmInlineArena,
    /// Shared memory without loans: in line and by `process_vm_readv`.
    ShmSingleCopy,
    /// Shared memory, what is sent being loans.
    ShmLoans,
    /// The mock link, behaving well.
    Mock,
    /// The mock link, out of order in every way that is allowed.
    MockReordering,
    /// The mock link, late with every completion, and with nothing in line.
    MockDelaying,
    /// The mock link with room for two parcels.
    MockTiny,
    /// The mock link with puts and gets of its own, in any order.
    MockDirect,
    /// The same, late with them.
    MockDirectLate,
    /// UCX, over whatever lanes `UCX_TLS` admits.
    Ucx,
    /// RDMA verbs, over whatever devices there are.
    Verbs,
}

impl Way {
    /// Those that are there on every machine.
    pub const ALL: [Way; 11] = [
        Way::Tcp,
        Way::ShmAll,
        Way::ShmInlineArena,
        Way::ShmSingleCopy,
        Way::ShmLoans,
        Way::Mock,
        Way::MockReordering,
        Way::MockDelaying,
        Way::MockTiny,
        Way::MockDirect,
        Way::MockDirectLate,
    ];

    /// The link that it is about.
    pub fn link(self) -> LinkKind {
        match self {
            Way::Tcp => LinkKind::Tcp,
            Way::ShmAll | Way::ShmInlineArena | Way::ShmSingleCopy | Way::ShmLoans => LinkKind::Shm,
            Way::Mock
            | Way::MockReordering
            | Way::MockDelaying
            | Way::MockTiny
            | Way::MockDirect
            | Way::MockDirectLate => LinkKind::Mock,
            Way::Ucx => LinkKind::Ucx,
            Way::Verbs => LinkKind::Verbs,
        }
    }

    /// Whether the link puts and gets by itself.
    pub fn is_direct(self) -> bool {
        matches!(self, Way::MockDirect | Way::MockDirectLate | Way::Verbs)
    }

    /// Why it is not to be had on this machine, if it is not.
    pub fn missing(self) -> Option<String> {
        static UCX: OnceLock<Option<String>> = OnceLock::new();
        static VERBS: OnceLock<Option<String>> = OnceLock::new();
        let known = match self {
            Way::Ucx => &UCX,
            Way::Verbs => &VERBS,
            _ => return None,
        };
        let look = || {
            let runtime = runtime(1);
            let _inside = runtime.enter();
            let node = Node::new(self.config()).expect("a node");
            let capabilities = node.capabilities();
            let link = capabilities.iter().find(|capability| capability.link == self.link());
            link.filter(|link| !link.present).map(|link| link.reason.clone())
        };
        known.get_or_init(look).clone()
    }

    /// Whether it is the mock link.
    pub fn is_mock(self) -> bool {
        self.link() == LinkKind::Mock
    }

    /// How the mock link is to behave.
    pub fn plan(self) -> MockPlan {
        let plan = MockPlan::new();
        match self {
            Way::MockReordering => plan.seed(42).unordered(true).reorder_completions(true),
            Way::MockDelaying => plan.delay_polls(5).inline_max(0).views(false),
            Way::MockTiny => plan.capacity(2).inline_max(64),
            Way::MockDirect => plan.seed(7).direct(true).unordered(true),
            Way::MockDirectLate => plan.direct(true).delay_polls(4).reorder_completions(true),
            _ => plan,
        }
    }

    /// The settings of a node. The ways of waiting are spread over the ways of moving.
    pub fn config(self) -> Config {
        let config = Config::new().transports([self.link()]).close_timeout(Duration::from_secs(20));
        match self {
            Way::Ucx => {
                let is_set = |name: &str| std::env::var_os(name).is_some();
                // The device is emulated, and so is the processor: connecting is slow.
                let config = match is_set("THALWEG_TEST_UCX_SLOW") {
                    true => config.handshake_timeout(PATIENCE),
                    false => config,
                };
                match is_set("THALWEG_TEST_UCX_SPINS") {
                    true => config.wake(Wake::Spin).spin_limit(PATIENCE),
                    false => config,
                }
            }
            Way::Tcp | Way::ShmAll => config,
            Way::Verbs => config.verbs_devices(verbs_devices(0)),
            Way::ShmInlineArena => config.loans(false).single_copy(false).wake(Wake::Park),
            Way::ShmSingleCopy => config.loans(false),
            Way::ShmLoans => config.wake(Wake::Spin).spin_limit(Duration::from_millis(1)),
            Way::Mock => config.mock(self.plan()).wake(Wake::Park),
            Way::MockReordering
            | Way::MockDelaying
            | Way::MockTiny
            | Way::MockDirect
            | Way::MockDirectLate => config.mock(self.plan()),
        }
    }

    /// A frame with these bytes, in the memory that this way is about.
    pub fn frame(self, node: &Node, bytes: &[u8]) -> Frame {
        if matches!(self, Way::ShmLoans | Way::MockReordering) {
            let mut loan = node.loan(bytes.len()).expect("a loan");
            loan.copy_from_slice(bytes);
            loan.into()
        } else {
            bytes.to_vec().into()
        }
    }

    /// A message of one such frame.
    pub fn message(self, node: &Node, bytes: &[u8]) -> Message {
        Message::from(self.frame(node, bytes))
    }
}

/// Two nodes of this process and an endpoint at each.
pub struct Pair {
    /// How they are connected.
    pub way: Way,
    /// The node that connected.
    pub node_a: Node,
    /// The node that listens.
    pub node_b: Node,
    /// Its listener.
    pub listener: Listener,
    /// The end that connected.
    pub a: Endpoint,
    /// The end that was accepted.
    pub b: Endpoint,
}

/// The RDMA devices of one of two nodes: the variable `THALWEG_TEST_VERBS_DEVICES` names them for
/// each, as in `rxa,rxb` or `rxa+rxc,rxb+rxd`. Without it any will do.
fn verbs_devices(node: usize) -> Vec<String> {
    let names = std::env::var("THALWEG_TEST_VERBS_DEVICES").unwrap_or_default();
    let of_node = names.split(',').nth(node).unwrap_or_default();
    of_node.split('+').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// A connected pair.
pub async fn pair(way: Way) -> Pair {
    pair_with(way, |config| config).await
}

/// A connected pair whose nodes have these settings.
pub async fn pair_with(way: Way, change: impl Fn(Config) -> Config) -> Pair {
    let (a, b) = (change(way.config()), change(way.config()));
    let b = if way == Way::Verbs { b.verbs_devices(verbs_devices(1)) } else { b };
    pair_of(way, a, b).await
}

/// A connected pair with settings for each side.
pub async fn pair_of(way: Way, config_a: Config, config_b: Config) -> Pair {
    let node_a = Node::new(config_a).expect("node a");
    let node_b = Node::new(config_b).expect("node b");
    let listener = node_b.listen("thalweg://127.0.0.1:0").await.expect("listening");
    let (a, b) = connect(&node_a, &listener).await;
    assert_eq!(a.route().link(), way.link(), "{}", a.route());
    Pair { way, node_a, node_b, listener, a, b }
}

/// One more pair of endpoints.
pub async fn connect(node: &Node, listener: &Listener) -> (Endpoint, Endpoint) {
    // Each fails at once: the listener waits for ever for one that could not connect.
    tokio::join!(async { node.connect(listener.address()).await.expect("connecting") }, async {
        listener.accept().await.expect("accepting")
    },)
}

impl Pair {
    /// A message of one frame from `a`'s side.
    pub fn message(&self, bytes: &[u8]) -> Message {
        self.way.message(&self.node_a, bytes)
    }
}

/// Runs `work` on a runtime with one thread, then on one with two; fails if it takes longer than
/// [`PATIENCE`], also when it blocks its thread.
pub fn run<F: Future<Output = ()>>(name: &str, work: impl Fn() -> F) {
    let watch = Watch::new(name);
    for threads in [1, 2] {
        let runtime = runtime(threads);
        let result = runtime.block_on(async { tokio::time::timeout(patience(), work()).await });
        assert!(result.is_ok(), "{name} on {threads} thread(s) hangs");
        drop(runtime);
    }
    drop(watch);
}

/// As [`run`], on one thread only.
pub fn run_once(name: &str, work: impl Future<Output = ()>) {
    run_on(1, name, work);
}

/// As [`run`], on this many threads only.
pub fn run_on(threads: usize, name: &str, work: impl Future<Output = ()>) {
    let watch = Watch::over(name, patience());
    let result = runtime(threads).block_on(async { tokio::time::timeout(patience(), work).await });
    assert!(result.is_ok(), "{name} hangs");
    drop(watch);
}

/// A runtime with this many threads.
pub fn runtime(threads: usize) -> tokio::runtime::Runtime {
    let mut builder = match threads {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    if threads > 1 {
        builder.worker_threads(threads);
    }
    builder.enable_all().build().expect("a runtime")
}

/// What a test may take to end in order once its patience is over.
const GRACE: Duration = Duration::from_secs(20);

/// Ends the process, naming the test, if a thread is stuck.
pub struct Watch {
    over: Option<mpsc::Sender<()>>,
}

impl Watch {
    /// Watches from now on until dropped.
    pub fn new(name: &str) -> Watch {
        Watch::over(name, patience() * 2)
    }

    fn over(name: &str, patience: Duration) -> Watch {
        let (over, wait) = mpsc::channel::<()>();
        let name = name.to_owned();
        std::thread::spawn(move || {
            if wait.recv_timeout(patience + GRACE) == Err(mpsc::RecvTimeoutError::Timeout) {
                say(&format!("{name}: a thread is stuck\n"));
                std::process::exit(101);
            }
        });
        Watch { over: Some(over) }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.over.take());
    }
}

/// Waits for `work`, but no longer than `limit`.
pub async fn within<T>(limit: Duration, what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(limit, work).await {
        Ok(output) => output,
        Err(_) => panic!("{what} takes longer than {limit:?}"),
    }
}

/// Waits until `condition` holds, looking again and again while others run.
pub async fn until(what: &str, condition: impl FnMut() -> bool) {
    until_in(Duration::from_secs(20), what, condition).await;
}

/// The same, but no longer than `limit`.
pub async fn until_in(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    within(limit, what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

/// Polls up to `times`, letting other tasks run in between.
pub async fn poll_times<F: Future + Unpin>(future: &mut F, times: usize) -> Option<F::Output> {
    for _ in 0..times {
        let polled =
            poll_fn(|cx: &mut Context<'_>| Poll::Ready(Pin::new(&mut *future).poll(cx))).await;
        if let Poll::Ready(output) = polled {
            return Some(output);
        }
        tokio::task::yield_now().await;
    }
    None
}

/// Whether an operation says this whose peer dies while it is under way.
pub fn tells_of_death(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::PeerGone | ErrorKind::ConnectionLost)
}

/// Says that a test was left out, and why: past the harness's capture, so that it is seen. In the
/// form that `cargo xtask` counts.
pub fn skipped(name: &str, reason: &str) {
    say(&format!("SKIPPED: {name}: {reason}\n"));
}

/// Past the harness's capture, in one piece.
fn say(line: &str) {
    // Nobody is left to tell if this fails.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
}

/// A small random number generator; the same seed gives the same numbers.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Begins with `seed`.
    pub fn new(seed: u64) -> Self {
        Random(seed ^ 0x5851_f42d_4c95_7f2d)
    }

    /// The next number.
    #[expect(clippy::should_implement_trait, reason = "it has no end")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

/// `len` bytes that follow from `seed`, and differ from those of other seeds.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&random.next().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Compares with [`pattern`] without printing megabytes.
pub fn check_pattern(seed: u64, bytes: &[u8]) {
    let expected = pattern(seed, bytes.len());
    if let Some(at) = bytes.iter().zip(&expected).position(|(got, want)| got != want) {
        panic!("of {} bytes of pattern {seed} the one at {at} is wrong", bytes.len());
    }
}
