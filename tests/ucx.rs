//! What is particular to the link `ucx`: it is silent, it leaves nothing behind, and where libucp is
//! absent or broken everything else goes on and says why.

mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Output;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use support::{Folder, Leftovers, assert_held_up, inside, note, outside, resident_bytes, serially};
use thalweg::{CloseReason, Endpoint, LinkKind, Listener, Message, Node};
use thalweg_tests::{Way, connect, run_once, runtime, skipped, tells_of_death, within};

const LIBRARY: &str = "THALWEG_UCX_LIBRARY";
const ROUNDS: usize = 500;
/// What resident memory may grow by from the hundredth round to the last.
const GROWTH_MAX_BYTES: usize = 8 << 20;

/// Fails if UCX itself has said something.
fn assert_silent(output: &Output) {
    for stream in [&output.stdout, &output.stderr] {
        let text = String::from_utf8_lossy(stream);
        let said = text.lines().find(|line| line.contains(" UCX "));
        assert_eq!(said, None);
    }
}

#[test]
fn ucx_rounds_of_connecting_and_closing() {
    if let Some(why) = Way::Ucx.missing() {
        return skipped("ucx_rounds_of_connecting_and_closing", &why);
    }
    let _alone = serially();
    if !inside() {
        let output = outside("ucx_rounds_of_connecting_and_closing", &[]);
        assert_silent(&output);
        let said = String::from_utf8_lossy(&output.stderr);
        return said.lines().filter(|line| line.starts_with("SOAK")).for_each(note);
    }
    let before = Leftovers::now();
    run_once("rounds over ucx", async {
        let nodes = [(); 2].map(|()| Node::new(Way::Ucx.config()).expect("a node"));
        let listener = nodes[1].listen("thalweg://127.0.0.1:0").await.expect("listening");
        round(&nodes[0], &listener, 0).await;
        let leftovers = Leftovers::now();
        let mut early = 0;
        for index in 0..ROUNDS {
            if index == 100 {
                early = resident_bytes();
            }
            round(&nodes[0], &listener, index).await;
        }
        // Endpoints are ended by UCX in its own time.
        tokio::task::yield_now().await;
        thalweg_tests::until("descriptors to go", || leftovers.more().is_none()).await;
        let late = resident_bytes();
        note(format_args!(
            "SOAK: {ROUNDS} rounds over ucx: resident {} MiB early, {} MiB late",
            early >> 20,
            late >> 20
        ));
        assert!(late <= early + GROWTH_MAX_BYTES, "{early} bytes early, {late} late");
        for node in nodes {
            node.close(CloseReason::default()).await;
        }
    });
    before.none_within(Duration::from_secs(5), "both nodes");
}

/// Connects, sends something each way, of a length that depends on the round, and closes, or drops
/// both ends without a goodbye.
async fn round(node: &Node, listener: &Listener, index: usize) {
    let (a, b) = connect(node, listener).await;
    let bytes = vec![index as u8; [8, 3_000, 100_000][index % 3]];
    let (sent, got) = tokio::join!(a.send(Message::copy_from_slice(&bytes)), b.recv());
    sent.expect("sending");
    assert_eq!(got.expect("receiving").to_vec().expect("its bytes"), bytes);
    match index % 4 {
        0 => drop((a, b)),
        1 => b.abort(),
        _ => {
            let ends = async {
                let (closed, _) =
                    tokio::join!(a.close(CloseReason::new(1, "round over")), b.closed());
                closed.expect("closing");
            };
            within(Duration::from_secs(20), "closing", ends).await;
        }
    }
}

#[test]
fn ucx_workers_come_and_go() {
    if let Some(why) = Way::Ucx.missing() {
        return skipped("ucx_workers_come_and_go", &why);
    }
    let _alone = serially();
    if !inside() {
        return assert_silent(&outside("ucx_workers_come_and_go", &[]));
    }
    let pair = async || {
        let nodes = [(); 2].map(|()| Node::new(Way::Ucx.config()).expect("a node"));
        let listener = nodes[1].listen("thalweg://127.0.0.1:0").await.expect("listening");
        round(&nodes[0], &listener, 2).await;
    };
    runtime(1).block_on(pair());
    let leftovers = Leftovers::now();
    for _ in 0..8 {
        runtime(1).block_on(pair());
        leftovers.none_within(Duration::from_secs(5), "two nodes");
    }
}

/// Many endpoints between two nodes, made at once and in both directions: each is the other end of
/// its own, so that the end of one is nothing to the others.
#[test]
fn ucx_endpoints_are_no_business_of_each_other() {
    if let Some(why) = Way::Ucx.missing() {
        return skipped("ucx_endpoints_are_no_business_of_each_other", &why);
    }
    let _alone = serially();
    if !inside() {
        return assert_silent(&outside("ucx_endpoints_are_no_business_of_each_other", &[]));
    }
    const EACH_WAY: u64 = 24;
    thalweg_tests::run("endpoints between two nodes", || async {
        let nodes = [(); 2].map(|()| Node::new(Way::Ucx.config()).expect("a node"));
        let mut listeners = Vec::new();
        for node in &nodes {
            let listener = node.listen("thalweg://127.0.0.1:0").await.expect("listening");
            listeners
                .push((listener.address().to_string(), tokio::spawn(echo_everybody(listener))));
        }
        let connecting = (0..2 * EACH_WAY).map(|index| {
            let (own, other) = ((index % 2) as usize, (1 - index % 2) as usize);
            nodes[own].connect(listeners[other].0.as_str())
        });
        let endpoints = join_all(connecting).await;
        let mut left = Vec::new();
        for (index, endpoint) in endpoints.into_iter().enumerate() {
            let endpoint = endpoint.expect("connecting");
            talk(&endpoint, index as u64).await;
            left.push(endpoint);
        }
        while !left.is_empty() {
            // Those that stay do not notice.
            let mut stay = Vec::new();
            for (index, endpoint) in left.into_iter().enumerate() {
                match index % 3 {
                    0 => endpoint.abort(),
                    1 => drop(endpoint),
                    _ => stay.push(endpoint),
                }
            }
            for round in 0..50 {
                join_all(stay.iter().map(|endpoint| talk(endpoint, round))).await;
            }
            left = stay;
        }
        listeners.into_iter().for_each(|(_, task)| task.abort());
    });
}

/// A process that is killed while it sends over UCX's shared memory leaves a place in the receiver's ring
/// that is never filled, and nothing behind it is read. Here the test takes that place.
#[test]
fn ucx_worker_that_is_held_up_is_replaced() {
    const NAME: &str = "ucx_worker_that_is_held_up_is_replaced";
    if let Some(why) = Way::Ucx.missing() {
        return skipped(NAME, &why);
    }
    let _alone = serially();
    if !inside() {
        let output = outside(NAME, &[]);
        assert_silent(&output);
        let said = String::from_utf8_lossy(&output.stderr);
        return said.lines().filter(|line| line.starts_with("SKIPPED")).for_each(note);
    }
    run_once("a ring that is held up", async {
        let nodes = [(); 3].map(|()| Node::new(Way::Ucx.config()).expect("a node"));
        let listener = nodes[0].listen("thalweg://127.0.0.1:0").await.expect("listening");
        let (going, going_here) = connect(&nodes[1], &listener).await;
        let (stays, stays_here) = connect(&nodes[2], &listener).await;
        let before = all_mapped();
        for _ in 0..MESSAGES {
            stays.send(Message::copy_from_slice(&[1])).await.expect("sending");
            stays_here.recv().await.expect("receiving");
        }
        let Some(ring) = Ring::of_whoever_received(&before) else {
            return skipped(NAME, "no ring of libucp's in shared memory was found");
        };

        // One peer has gone and holds up nothing: the node asks itself, and has its answer.
        let (known, place) = (all_mapped(), ring.places_taken());
        let is_new = |now: &Mapped| !known.iter().any(|then| then.file == now.file);
        going.abort();
        drop(going_here);
        thalweg_tests::until("the question", || ring.places_taken() > place).await;
        thalweg_tests::until("its end", || !all_mapped().iter().any(is_new)).await;
        stays.send(Message::copy_from_slice(&[2])).await.expect("sending");
        assert_eq!(stays_here.recv().await.expect("receiving").to_vec().expect("its bytes"), [2]);

        let (going, going_here) = connect(&nodes[1], &listener).await;
        ring.take_place();
        going.abort();
        drop(going_here);
        let ended = within(Duration::from_secs(20), "the end", stays_here.recv()).await;
        let error = ended.expect_err("the ring is held up");
        assert_held_up(&error);
        let ended = within(Duration::from_secs(20), "its peer's", stays.recv()).await;
        let error = ended.expect_err("its peer's end");
        assert!(tells_of_death(error.kind()), "{error}");

        let (new, new_here) = connect(&nodes[2], &listener).await;
        for index in 0..MESSAGES {
            new.send(Message::copy_from_slice(&[index as u8])).await.expect("sending");
            let bytes = new_here.recv().await.expect("receiving").to_vec().expect("its bytes");
            assert_eq!(bytes, [index as u8]);
        }
        // Nothing is left of the worker that was held up.
        drop((stays, stays_here));
        thalweg_tests::until("its ring to go", || ring.mapped().is_none()).await;
    });
}

/// Enough to tell who received them.
const MESSAGES: u64 = 64;

/// The ring of one of UCX's workers: shared memory that begins with the number of places that were taken,
/// and a bit that says whether its owner sleeps.
struct Ring {
    /// Device and number of its file.
    file: String,
}

/// Shared memory that is mapped into this process.
struct Mapped {
    at: usize,
    file: String,
    /// Its first word, as of a ring.
    places_taken: u64,
}

const SLEEPS: u64 = 1 << 63;

fn all_mapped() -> Vec<Mapped> {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("mappings");
    let memory = std::fs::File::open("/proc/self/mem").expect("this process's memory");
    let mapped = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let [range, "rw-s", _, device, number, ..] = words[..] else { return None };
        let at = usize::from_str_radix(range.split_once('-')?.0, 16).ok()?;
        let mut word = [0; 8];
        memory.read_exact_at(&mut word, at as u64).ok()?;
        let places_taken = u64::from_ne_bytes(word) & !SLEEPS;
        Some(Mapped { at, file: format!("{device} {number}"), places_taken })
    };
    maps.lines().filter_map(mapped).collect()
}

impl Ring {
    /// The one whose places were taken by [`MESSAGES`] since `before`.
    fn of_whoever_received(before: &[Mapped]) -> Option<Ring> {
        let received = |now: &Mapped| {
            let then = before.iter().find(|then| then.file == now.file);
            let taken = then.map(|then| now.places_taken.wrapping_sub(then.places_taken));
            taken.is_some_and(|taken| (MESSAGES..2 * MESSAGES).contains(&taken))
        };
        let ring = all_mapped().into_iter().find(received)?;
        Some(Ring { file: ring.file })
    }

    fn mapped(&self) -> Option<Mapped> {
        all_mapped().into_iter().find(|mapped| mapped.file == self.file)
    }

    fn places_taken(&self) -> u64 {
        self.mapped().expect("it is mapped").places_taken
    }

    fn take_place(&self) {
        let at = std::ptr::with_exposed_provenance_mut(self.mapped().expect("it is mapped").at);
        // SAFETY: mapped, aligned to a page, and changed by atomic instructions only. What unmaps it runs
        // on this thread.
        unsafe { AtomicU64::from_ptr(at) }.fetch_add(1, Ordering::SeqCst);
    }
}

async fn talk(endpoint: &Endpoint, number: u64) {
    endpoint.send(Message::copy_from_slice(&number.to_le_bytes())).await.expect("sending");
    let back = endpoint.recv().await.expect("an answer").to_vec().expect("its bytes");
    assert_eq!(back, number.to_le_bytes());
}

async fn echo_everybody(listener: Listener) {
    while let Ok(endpoint) = listener.accept().await {
        tokio::spawn(async move {
            while let Ok(message) = endpoint.recv().await {
                if endpoint.send(message).await.is_err() {
                    return;
                }
            }
        });
    }
}

/// Not by itself.
#[test]
fn ucx_is_absent_and_the_rest_works() {
    if inside() {
        support::without(LinkKind::Ucx);
    }
}

/// Whether a process that is given this library does without, and says so.
#[track_caller]
fn assert_absent(library: &Path, because: &str) {
    let output = outside("ucx_is_absent_and_the_rest_works", &[(LIBRARY, library)]);
    let (reason, _) = support::reason_and_fix(&output);
    assert!(reason.contains(because), "{reason:?} does not say {because:?}");
    assert!(reason.contains(LIBRARY), "{reason:?} does not say what to correct");
}

#[test]
fn without_libucp_the_rest_works() {
    assert_absent(Path::new("/nonexistent/libucp.so.0"), "not there");
}

#[test]
fn with_something_else_in_place_of_libucp_the_rest_works() {
    let folder = Folder::new("text");
    let path = folder.0.join("libucp.so.0");
    std::fs::write(&path, "INPUT(-lucp)\n".repeat(20)).expect("writable");
    assert_absent(&path, "not a 64-bit shared object");
}

#[test]
fn with_an_old_or_a_lacking_libucp_the_rest_works() {
    for (name, minor, because) in [("old", 8, "is version 1.8"), ("lacking", 30, "has no function")]
    {
        let folder = Folder::new(name);
        let source = format!(
            "void ucp_get_version(unsigned *a, unsigned *b, unsigned *c)\n\
             {{ *a = 1; *b = {minor}; *c = 0; }}\n"
        );
        let Some(path) = folder.library("libucp.so.0", &source) else {
            return skipped("with_an_old_or_a_lacking_libucp_the_rest_works", "no C compiler");
        };
        assert_absent(&path, because);
    }
}

#[test]
fn with_a_truncated_libucp_the_rest_works() {
    let name = "with_a_truncated_libucp_the_rest_works";
    if let Some(why) = Way::Ucx.missing() {
        return skipped(name, &why);
    }
    // `UCX 1.13.1 from /usr/lib/x86_64-linux-gnu/libucp.so.0, with …`
    let found = runtime(1).block_on(async {
        let node = Node::new(Way::Ucx.config()).expect("a node");
        let capabilities = node.capabilities();
        let ucx = capabilities.iter().find(|capability| capability.link == LinkKind::Ucx);
        ucx.expect("ucx is told of").reason.clone()
    });
    let path = found.split_once(" from ").map(|(_, rest)| rest.split(", ").next());
    let whole = std::fs::read(path.flatten().expect("its path")).expect("readable");
    let folder = Folder::new("cut");
    let path = folder.0.join("libucp.so.0");
    std::fs::write(&path, &whole[..whole.len() / 2]).expect("writable");
    assert_absent(&path, "truncated");
}
