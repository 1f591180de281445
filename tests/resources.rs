//! What an endpoint costs that nobody uses, and what a short message costs: allocations, processor
//! time, memory, descriptors.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use support::{
    Peer, at_rest, descriptors, measured, note, processor_percent, resident_bytes, serially,
    short_or_long,
};
use thalweg::{Endpoint, Message, Node, Wake};
use thalweg_tests::{Way, pair_with, run_once, skipped, within};

/// How long coming to rest may take.
const REST_PATIENCE: Duration = Duration::from_secs(20);
/// Of a core, by a hundred idle endpoints.
const IDLE_CPU_MAX_PERCENT: f64 = 0.5;
const TCP_ENDPOINT_MAX_BYTES: usize = 32 << 10;
const SHM_ENDPOINT_MAX_BYTES: usize = 128 << 10;
const SHM_ENDPOINT_MAX_DESCRIPTORS: f64 = 6.0;

/// Counts what this thread allocates.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // At a thread's end there is nothing left to count for.
    let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: hands everything on to the system's allocator, whose promises these are.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(old, layout, len) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(old, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_short_message_allocates_nothing() {
    let _alone = serially();
    for way in [Way::Tcp, Way::ShmAll, Way::ShmInlineArena] {
        for wake in [Wake::Park, Wake::Spin, Wake::Adaptive] {
            let name = format!("allocations per message {way:?} {}", wake.name());
            run_once(&name, async {
                let pair = pair_with(way, |config| config.wake(wake)).await;
                let echo = tokio::spawn(echo(pair.b.clone()));
                round_trips(&pair.a, 2_000).await;
                const ROUND_TRIPS: u64 = 10_000;
                // What grows once, to its size, is no cost of a message: it does not come again.
                let mut made = u64::MAX;
                for _ in 0..3 {
                    let before = ALLOCATIONS.get();
                    round_trips(&pair.a, ROUND_TRIPS).await;
                    made = made.min(ALLOCATIONS.get() - before);
                    if made == 0 {
                        break;
                    }
                }
                measured(&name, made as f64 / (2 * ROUND_TRIPS) as f64, "allocations");
                assert_eq!(made, 0, "{name}");
                echo.abort();
            });
        }
    }
}

async fn echo(endpoint: Endpoint) {
    while let Ok(message) = endpoint.recv().await {
        if endpoint.send(message).await.is_err() {
            return;
        }
    }
}

async fn round_trips(endpoint: &Endpoint, count: u64) {
    for i in 0..count {
        let bytes = i.to_le_bytes();
        endpoint.send(Message::copy_from_slice(&bytes)).await.expect("sending");
        let back = endpoint.recv().await.expect("receiving");
        assert_eq!(back.frames()[0].as_slice(), Some(&bytes[..]));
    }
}

/// Many endpoints to one peer process, which holds the other ends.
struct Crowd {
    node: Node,
    endpoints: Vec<Endpoint>,
    peer: Peer,
}

impl Crowd {
    async fn gather(way: Way, count: usize, before: impl FnOnce()) -> Crowd {
        let node = Node::new(way.config()).expect("a node");
        let listener = node.listen("thalweg://127.0.0.1:0").await.expect("listening");
        let mut endpoints = Vec::with_capacity(count);
        before();
        let mut peer = Peer::start(&[
            "hold".to_owned(),
            format!("way={way:?}"),
            format!("count={count}"),
            format!("connect={}", listener.address()),
        ]);
        while endpoints.len() < count {
            let endpoint = within(Duration::from_secs(60), "accepting", listener.accept()).await;
            endpoints.push(endpoint.expect("accepting"));
        }
        assert!(endpoints.iter().all(|endpoint| endpoint.route().link() == way.link()));
        tokio::task::block_in_place(|| peer.said("UP"));
        Crowd { node, endpoints, peer }
    }

    async fn disperse(self) {
        let Crowd { node, endpoints, peer } = self;
        let finished = tokio::task::spawn_blocking(move || peer.finish());
        for endpoint in &endpoints {
            within(Duration::from_secs(60), "closing", endpoint.closed()).await;
        }
        drop(endpoints);
        assert!(finished.await.expect("no panic"), "the peer failed");
        node.close(thalweg::CloseReason::default()).await;
    }
}

fn on_two_threads(work: impl Future<Output = ()>) {
    thalweg_tests::runtime(2).block_on(work);
}

#[test]
fn idle_endpoints_take_no_processor_time() {
    let _alone = serially();
    for way in [Way::Tcp, Way::ShmAll, Way::Ucx, Way::Verbs] {
        if let Some(why) = way.missing() {
            let link = way.link();
            skipped(&format!("idle_endpoints_take_no_processor_time over {link}"), &why);
            continue;
        }
        on_two_threads(async {
            let crowd = Crowd::gather(way, 100, || {}).await;
            let waiting: Vec<_> = crowd.endpoints.iter().cloned().map(receives).collect();
            // What connecting has left to do, and the spinning of the receives, is over when the
            // process has been at rest for a while.
            at_rest(REST_PATIENCE, "coming to rest").await;
            let percent = processor_percent(Duration::from_secs(short_or_long(3, 10))).await;
            measured(&format!("cpu of 100 idle endpoints {}", way.link()), percent, "% of a core");
            assert!(percent <= IDLE_CPU_MAX_PERCENT, "{percent} % of a core over {}", way.link());
            crowd.disperse().await;
            for receive in waiting {
                receive.await.expect("no panic");
            }
        });
    }
}

fn receives(endpoint: Endpoint) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let ended = endpoint.recv().await;
        assert!(ended.is_err(), "nobody sends anything");
    })
}

#[test]
fn an_idle_tcp_endpoint_takes_little_memory() {
    let _alone = serially();
    let count = short_or_long(1_000, 4_000).min(descriptor_limit().saturating_sub(200));
    note(format_args!("{count} endpoints"));
    let per_endpoint = cost_of_a_crowd(Way::Tcp, count).0;
    assert!(per_endpoint <= TCP_ENDPOINT_MAX_BYTES, "{per_endpoint} bytes an endpoint");
}

#[test]
fn an_idle_shm_endpoint_takes_few_descriptors_and_little_memory() {
    let _alone = serially();
    for way in [Way::ShmAll, Way::ShmInlineArena] {
        let (per_endpoint, descriptors) = cost_of_a_crowd(way, 100);
        assert!(per_endpoint <= SHM_ENDPOINT_MAX_BYTES, "{per_endpoint} bytes an endpoint");
        assert!(
            descriptors <= SHM_ENDPOINT_MAX_DESCRIPTORS,
            "{descriptors} descriptors an endpoint"
        );
    }
}

/// Resident memory and descriptors of an idle endpoint, on average.
fn cost_of_a_crowd(way: Way, count: usize) -> (usize, f64) {
    // What the allocator and the runtime take once, they have taken after this.
    on_two_threads(async {
        Crowd::gather(way, 8, || {}).await.disperse().await;
    });
    let mut cost = (0, 0.0);
    on_two_threads(async {
        let (mut memory, mut files) = (0, 0);
        let crowd = Crowd::gather(way, count, || {
            (memory, files) = (resident_bytes(), descriptors().len());
        })
        .await;
        at_rest(REST_PATIENCE, "coming to rest").await;
        // Three are the peer's standard streams, less what was closed since.
        let files = (descriptors().len() - files) as f64 / count as f64;
        let memory = resident_bytes().saturating_sub(memory) / count;
        let name = format!("of {count} idle endpoints {way:?}, each");
        measured(&format!("resident memory {name}"), memory as f64 / 1024.0, "KiB");
        measured(&format!("descriptors {name}"), files, "descriptors");
        cost = (memory, files);
        crowd.disperse().await;
    });
    cost
}

/// The limit of open descriptors, raised as far as it goes.
fn descriptor_limit() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is valid for the kernel to read and write during the calls.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
    }
    usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX)
}
