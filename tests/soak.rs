//! Everything at once for a while: eight endpoints, all families, all sizes, operations given up at
//! random, every byte compared; and afterwards the memory is what it was.
//!
//! 20 s a link, 5 minutes with `THALWEG_TEST_LONG=1`, or `THALWEG_TEST_SOAK_SECONDS`.

mod support;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use support::{descriptors, measured, note, resident_bytes, seed, serially, short_or_long};
use thalweg::{
    Access, Cancel, CloseReason, Config, Endpoint, Error, ErrorKind, Failed, Kind, Message, Node,
    Op, RemoteKey, Tagged,
};
use thalweg_tests::{Random, Way, connect, poll_times, runtime};

const ENDPOINTS: usize = 8;
/// What is compared is cut out of a block of this length.
const BLOCK_BYTES: usize = 8 << 20;
const LEN_MAX: usize = 4 << 20;
const TAG_LEN_MAX: usize = 512 << 10;
const REGION_BYTES: usize = 1 << 20;
/// What precedes a payload: number, seed, length.
const HEADER_BYTES: usize = 24;
/// What resident memory may grow by, beside a tenth: what the allocator keeps varies.
const SLACK_BYTES: usize = 24 << 20;

#[test]
fn soak_tcp() {
    soak(Way::Tcp);
}

#[test]
fn soak_shm() {
    soak(Way::ShmAll);
}

#[test]
fn soak_ucx() {
    if let Some(why) = Way::Ucx.missing() {
        return thalweg_tests::skipped("soak_ucx", &why);
    }
    soak(Way::Ucx);
}

#[test]
fn soak_verbs() {
    if let Some(why) = Way::Verbs.missing() {
        return thalweg_tests::skipped("soak_verbs", &why);
    }
    soak(Way::Verbs);
}

#[test]
fn soak_mock() {
    soak(Way::MockReordering);
}

#[derive(Default)]
struct Counts {
    messages: AtomicU64,
    tags: AtomicU64,
    one_sided: AtomicU64,
    bytes: AtomicU64,
    given_up: AtomicU64,
}

/// What all workers share.
struct Shared {
    way: Way,
    stop: AtomicBool,
    counts: Counts,
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn add(&self, counter: &AtomicU64, bytes: usize) {
        counter.fetch_add(1, Ordering::Relaxed);
        self.counts.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

fn soak(way: Way) {
    let _alone = serially();
    let given = std::env::var("THALWEG_TEST_SOAK_SECONDS").ok().and_then(|text| text.parse().ok());
    let length = Duration::from_secs(given.unwrap_or(short_or_long(20, 300)));
    let seed = seed();
    note(format_args!("soak {way:?}: {length:?}, THALWEG_TEST_SEED={seed}"));
    block();
    let before = descriptors().len();
    fix_allocator();
    let shared = Arc::new(Shared { way, stop: AtomicBool::new(false), counts: Counts::default() });
    let runtime = runtime(2);
    let samples = runtime.block_on(async {
        let all = run(shared.clone(), length, seed);
        let patience = length + Duration::from_secs(60);
        tokio::time::timeout(patience, all).await.expect("something hangs")
    });
    drop(runtime);
    let Counts { messages, tags, one_sided, bytes, given_up } = &shared.counts;
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (early, late) = (samples.early(), samples.late());
    measured(&format!("soak {way:?} resident early"), early as f64 / 1048576.0, "MiB");
    measured(&format!("soak {way:?} resident late"), late as f64 / 1048576.0, "MiB");
    note(format_args!(
        "SOAK: soak {way:?}: {length:?}, {} messages, {} tagged, {} puts and gets, {} MiB, \
         {} given up; resident {} MiB early, {} MiB late; descriptors {} early, {} late",
        count(messages),
        count(tags),
        count(one_sided),
        count(bytes) >> 20,
        count(given_up),
        early >> 20,
        late >> 20,
        samples.files.0,
        samples.files.1,
    ));
    for counter in [messages, tags, one_sided, given_up] {
        assert!(count(counter) > 100, "hardly anything was done");
    }
    let mib: Vec<_> = samples.resident.iter().step_by(5).map(|bytes| bytes >> 20).collect();
    assert!(late <= early + early / 10 + SLACK_BYTES, "memory grows, in MiB: {mib:?}");
    // Segments of the loan pools come when they are needed.
    let segments = ENDPOINTS;
    assert!(samples.files.1 <= samples.files.0 + segments, "descriptors grow: {:?}", samples.files);
    assert!(descriptors().len() <= before, "descriptors are left: {:?}", descriptors());
}

/// Windows and pools that fill up early on: what grows then grows for ever.
fn config(way: Way) -> Config {
    way.config()
        .message_window_bytes(2 << 20)
        .tag_window_bytes(1 << 20)
        .host_pool_bytes(32 << 20)
        .loan_pool_bytes(256 << 20)
}

/// Has the allocator give memory back that was freed, so that what is resident is what is used.
fn fix_allocator() {
    // SAFETY: takes no pointers.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Resident memory over time, and descriptors once warm and in the end.
struct Samples {
    resident: Vec<usize>,
    files: (usize, usize),
}

impl Samples {
    fn median(part: &[usize]) -> usize {
        let mut part = part.to_vec();
        part.sort_unstable();
        part[part.len() / 2]
    }

    fn early(&self) -> usize {
        let n = self.resident.len();
        Self::median(&self.resident[n / 3..n / 2])
    }

    fn late(&self) -> usize {
        let n = self.resident.len();
        Self::median(&self.resident[n - n / 6 - 1..])
    }
}

async fn run(shared: Arc<Shared>, length: Duration, seed: u64) -> Samples {
    let way = shared.way;
    let node_a = Node::new(config(way)).expect("a node");
    let node_b = Node::new(config(way)).expect("a node");
    let listener = node_b.listen("thalweg://127.0.0.1:0").await.expect("listening");
    let mut workers = tokio::task::JoinSet::new();
    let mut ends = Vec::new();
    for index in 0..ENDPOINTS as u64 {
        let (a, b) = connect(&node_a, &listener).await;
        for (node, here, there, direction) in [(&node_a, &a, &b, 0), (&node_b, &b, &a, 1)] {
            let random = Random::new(seed ^ (index << 8) ^ (direction << 4));
            let pair = Worker::new(&shared, node, here, there, random);
            workers.spawn(pair.clone().send_messages());
            workers.spawn(pair.clone().receive_messages());
            workers.spawn(pair.clone().send_tags());
            workers.spawn(pair.clone().receive_tags());
            let region = if direction == 0 { &node_b } else { &node_a };
            let region = region.register(vec![0u8; REGION_BYTES], Access::ReadWrite);
            workers.spawn(pair.one_sided(region.expect("a region")));
        }
        ends.extend([a, b]);
    }
    let samples = sample(length, &mut workers).await;
    shared.stop.store(true, Ordering::Relaxed);
    while let Some(worker) = workers.join_next().await {
        worker.expect("a worker fails");
    }
    for end in ends.iter().step_by(2) {
        end.close(CloseReason::new(0, "soaked")).await.expect("closing");
    }
    node_a.close(CloseReason::default()).await;
    node_b.close(CloseReason::default()).await;
    samples
}

async fn sample(length: Duration, workers: &mut tokio::task::JoinSet<()>) -> Samples {
    let begun = Instant::now();
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    let (mut resident, mut early) = (Vec::new(), None);
    while begun.elapsed() < length {
        tokio::select! {
            _ = tick.tick() => resident.push(resident_bytes()),
            Some(worker) = workers.join_next() => worker.expect("a worker fails"),
        }
        if begun.elapsed() > length / 3 {
            early.get_or_insert_with(|| descriptors().len());
        }
    }
    let late = descriptors().len();
    Samples { resident, files: (early.unwrap_or(late), late) }
}

/// What became of a numbered payload, as far as its sender knows.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Sent,
    Unknown,
    Withdrawn,
}

/// What became of a receive.
enum Received<K: Kind> {
    Came(K::Output),
    Dropped,
    /// Its deadline passed.
    Late(K::Output),
    Withdrawn(K::Withdrawn),
}

/// Checks that numbers arrive in order, once, and neither too many nor too few of them.
#[derive(Default)]
struct Ledger {
    fates: VecDeque<(u64, Fate)>,
    last: Option<u64>,
}

impl Ledger {
    fn arrived(&mut self, number: u64) {
        assert!(self.last.is_none_or(|last| last < number), "{number} after {:?}", self.last);
        while let Some((earlier, fate)) = self.fates.front().copied()
            && earlier < number
        {
            let came = self.last == Some(earlier);
            assert!(came || fate != Fate::Sent, "{earlier} was sent and is lost");
            assert!(!came || fate != Fate::Withdrawn, "{earlier} was withdrawn and came");
            self.fates.pop_front();
        }
        self.last = Some(number);
    }
}

/// One direction of one pair of endpoints.
#[derive(Clone)]
struct Worker {
    shared: Arc<Shared>,
    node: Node,
    /// Sends, puts and gets.
    here: Endpoint,
    /// Receives.
    there: Endpoint,
    random: Random,
    messages: Arc<Mutex<Ledger>>,
    tags: Arc<Mutex<Ledger>>,
}

/// The number of what ends a stream.
const END: u64 = u64::MAX;
const TAG: u64 = 0x5a00;
const TAG_MASK: u64 = 0xff00;

impl Worker {
    fn new(
        shared: &Arc<Shared>,
        node: &Node,
        here: &Endpoint,
        there: &Endpoint,
        random: Random,
    ) -> Worker {
        Worker {
            shared: shared.clone(),
            node: node.clone(),
            here: here.clone(),
            there: there.clone(),
            random,
            messages: Arc::default(),
            tags: Arc::default(),
        }
    }

    fn len(&mut self, max: usize) -> usize {
        let scale = match self.random.below(20) {
            0 => max,
            1..=4 => 128 << 10,
            5..=10 => 8 << 10,
            _ => 80,
        };
        self.random.below(scale)
    }

    /// A payload in one to four frames behind its header, some of them loans.
    fn message(&mut self, number: u64, len: usize) -> Message {
        let seed = self.random.next();
        let mut message = Message::copy_from_slice(&header(number, seed, len));
        let bytes = payload(seed, len);
        let mut at = 0;
        while at < len {
            let part = match self.random.below(2) {
                0 => len - at,
                _ => 1 + self.random.below(len - at),
            };
            let part = &bytes[at..at + part];
            at += part.len();
            if self.random.below(3) == 0
                && let Ok(mut loan) = self.node.loan(part.len())
            {
                loan.copy_from_slice(part);
                message.push(loan);
            } else {
                message.push(part.to_vec());
            }
        }
        message
    }

    async fn send_messages(mut self) {
        let ledger = self.messages.clone();
        for number in 0.. {
            if self.shared.stopped() {
                break;
            }
            let len = self.len(LEN_MAX);
            let message = self.message(number, len);
            let endpoint = self.here.clone();
            let fate = self.fate_of_send(endpoint.send(message)).await;
            self.note_fate(&ledger, number, fate);
            self.let_others().await;
        }
        let end = Message::copy_from_slice(&header(END, 0, 0));
        self.here.send(end).await.expect("the last one");
    }

    /// Sends to the end, or gives up in one of the ways there are.
    async fn fate_of_send<K, B>(&mut self, mut op: Op<'_, K>) -> Fate
    where
        K: Kind<Output = Result<B, Failed<B>>>,
    {
        match self.random.below(8) {
            0 => {
                let times = self.random.below(4);
                match poll_times(&mut op, times).await {
                    Some(sent) => fate_of(sent),
                    None if times == 0 => Fate::Withdrawn,
                    None => Fate::Unknown,
                }
            }
            1 => {
                let limit = Duration::from_micros(self.random.below(300) as u64);
                fate_of(op.timeout(limit).await)
            }
            2 => {
                let times = self.random.below(3);
                match poll_times(&mut op, times).await {
                    Some(sent) => fate_of(sent),
                    None => match op.cancel().await {
                        Cancel::Cancelled(_) => Fate::Withdrawn,
                        Cancel::Completed(sent) => fate_of(sent),
                    },
                }
            }
            _ => fate_of(op.await),
        }
    }

    /// Receives to the end, or gives up in one of the ways there are. `late` knows a deadline that
    /// has passed.
    async fn receive<K: Kind>(
        &mut self,
        mut op: Op<'_, K>,
        late: impl Fn(&K::Output) -> bool,
    ) -> Received<K> {
        match self.random.below(6) {
            0 => {
                let times = self.random.below(4);
                poll_times(&mut op, times).await.map_or(Received::Dropped, Received::Came)
            }
            1 => {
                let limit = Duration::from_micros(self.random.below(300) as u64);
                let received = op.timeout(limit).await;
                if late(&received) { Received::Late(received) } else { Received::Came(received) }
            }
            2 => {
                let times = self.random.below(3);
                match poll_times(&mut op, times).await {
                    Some(received) => Received::Came(received),
                    None => match op.cancel().await {
                        Cancel::Cancelled(back) => Received::Withdrawn(back),
                        Cancel::Completed(received) => Received::Came(received),
                    },
                }
            }
            _ => Received::Came(op.await),
        }
    }

    fn note_fate(&self, ledger: &Mutex<Ledger>, number: u64, fate: Fate) {
        if fate != Fate::Sent {
            self.shared.counts.given_up.fetch_add(1, Ordering::Relaxed);
        }
        ledger.lock().expect("no panic").fates.push_back((number, fate));
    }

    /// Work that never waits must not keep its thread to itself.
    async fn let_others(&mut self) {
        if self.random.below(4) == 0 {
            tokio::task::yield_now().await;
        }
    }

    async fn receive_messages(mut self) {
        let (ledger, endpoint) = (self.messages.clone(), self.there.clone());
        // Some are held for a while: views keep the sender's memory.
        let mut held: VecDeque<Message> = VecDeque::new();
        loop {
            let late = |message: &Result<Message, Error>| {
                message.as_ref().is_err_and(|error| error.kind() == ErrorKind::TimedOut)
            };
            let Received::Came(message) = self.receive(endpoint.recv(), late).await else {
                self.shared.counts.given_up.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            let message = message.expect("receiving");
            let number = check(&message);
            if number == END {
                break;
            }
            ledger.lock().expect("no panic").arrived(number);
            self.shared.add(&self.shared.counts.messages, message.len_bytes());
            if self.random.below(4) == 0 {
                held.push_back(message);
            }
            if held.len() > self.random.below(6) {
                check(&held.pop_front().expect("not empty"));
            }
            self.let_others().await;
        }
        held.iter().for_each(|message| _ = check(message));
    }

    async fn send_tags(mut self) {
        let ledger = self.tags.clone();
        for number in 0.. {
            if self.shared.stopped() {
                break;
            }
            let (len, seed) = (self.len(TAG_LEN_MAX), self.random.next());
            let mut bytes = header(number, seed, len).to_vec();
            bytes.extend_from_slice(payload(seed, len));
            let tag = TAG | (number & !TAG_MASK);
            let endpoint = self.here.clone();
            let fate = self.fate_of_send(endpoint.tag_send(tag, bytes)).await;
            self.note_fate(&ledger, number, fate);
            self.let_others().await;
        }
        self.here.tag_send(TAG, header(END, 0, 0).to_vec()).await.expect("the last one");
    }

    async fn receive_tags(mut self) {
        let (ledger, endpoint) = (self.tags.clone(), self.there.clone());
        let mut spare: Option<Vec<u8>> = None;
        loop {
            let buffer = spare.take().unwrap_or_else(|| vec![0; TAG_LEN_MAX + HEADER_BYTES]);
            let op = endpoint.tag_recv(TAG, TAG_MASK, buffer);
            let late = |received: &Result<Tagged<Vec<u8>>, Failed<Vec<u8>>>| {
                received.as_ref().is_err_and(|failed| failed.kind() == ErrorKind::TimedOut)
            };
            let received = match self.receive(op, late).await {
                Received::Came(received) => received,
                other => {
                    spare = match other {
                        Received::Withdrawn(buffer) => Some(buffer),
                        Received::Late(late) => late.err().and_then(|failed| failed.buffer),
                        _ => None,
                    };
                    self.shared.counts.given_up.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
            };
            let received = received.expect("receiving");
            let number = check_bytes(&received.buffer[..received.len_bytes]);
            if number == END {
                return;
            }
            assert_eq!(received.tag, TAG | (number & !TAG_MASK));
            ledger.lock().expect("no panic").arrived(number);
            self.shared.add(&self.shared.counts.tags, received.len_bytes);
            spare = Some(received.buffer);
            self.let_others().await;
        }
    }

    /// Puts, and gets back what it put.
    async fn one_sided(mut self, region: thalweg::Registered<Vec<u8>>) {
        let key = RemoteKey::from_bytes(&region.key().to_bytes()).expect("a key");
        let endpoint = self.here.clone();
        while !self.shared.stopped() {
            let len = 1 + self.len(REGION_BYTES / 2);
            let offset = self.random.below(REGION_BYTES - len) as u64;
            if self.random.below(6) == 0 {
                let mut op = endpoint.put(vec![0xee; len], &key, offset);
                let times = 1 + self.random.below(3);
                if poll_times(&mut op, times).await.is_none() {
                    self.shared.counts.given_up.fetch_add(1, Ordering::Relaxed);
                }
                drop(op);
                // It may still land, and must not land later.
                endpoint.fence().await.expect("a fence");
            }
            let seed = self.random.next();
            endpoint.put(payload(seed, len).to_vec(), &key, offset).await.expect("a put");
            if self.random.below(6) == 0 {
                let mut op = endpoint.get(vec![0u8; len], &key, offset);
                poll_times(&mut op, self.random.below(3)).await;
                self.shared.counts.given_up.fetch_add(1, Ordering::Relaxed);
            }
            let back = endpoint.get(vec![0u8; len], &key, offset).await.expect("a get");
            assert!(back == payload(seed, len), "{len} bytes at {offset} are wrong");
            self.shared.add(&self.shared.counts.one_sided, 2 * len);
            self.let_others().await;
        }
        assert_eq!(region.revoke().await.expect("revoked").len(), REGION_BYTES);
    }
}

fn fate_of<B>(sent: Result<B, Failed<B>>) -> Fate {
    match sent {
        Ok(_) => Fate::Sent,
        Err(Failed { error, buffer }) => {
            assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
            if buffer.is_some() { Fate::Withdrawn } else { Fate::Unknown }
        }
    }
}

fn block() -> &'static [u8] {
    static BLOCK: OnceLock<Vec<u8>> = OnceLock::new();
    BLOCK.get_or_init(|| thalweg_tests::pattern(99, BLOCK_BYTES))
}

/// The bytes that follow from a seed.
fn payload(seed: u64, len: usize) -> &'static [u8] {
    let at = Random::new(seed).below(BLOCK_BYTES - len);
    &block()[at..at + len]
}

fn header(number: u64, seed: u64, len: usize) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    for (place, word) in bytes.chunks_exact_mut(8).zip([number, seed, len as u64]) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Compares a message with what it should be: its number.
fn check(message: &Message) -> u64 {
    check_bytes(&message.to_vec().expect("its bytes"))
}

fn check_bytes(bytes: &[u8]) -> u64 {
    let (header, rest) = bytes.split_at(HEADER_BYTES);
    let word = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
    let (number, seed, len) = (word(0), word(8), word(16) as usize);
    assert_eq!(rest.len(), len, "length of {number}");
    assert!(rest == payload(seed, len), "{number}: wrong bytes among {len}");
    number
}
