//! What is particular to the link `ucx`: it is silent, it leaves nothing behind, and where libucp is
//! absent or broken everything else goes on and says why.

mod support;

use std::path::Path;
use std::process::Output;
use std::time::Duration;

use futures_util::future::join_all;
use support::{Folder, Leftovers, inside, note, outside, resident_bytes, serially};
use thalweg::{CloseReason, Endpoint, LinkKind, Listener, Message, Node};
use thalweg_tests::{Way, connect, run_once, runtime, skipped, within};

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
        let late = resident_bytes();
        // Endpoints are ended by UCX in its own time.
        tokio::task::yield_now().await;
        thalweg_tests::until("descriptors to go", || leftovers.more().is_none()).await;
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
