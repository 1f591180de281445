//! What the hot paths of one process cost: two nodes, one endpoint, no second process and no wait
//! for another core, so that a change of a few nanoseconds shows.

use std::hint::black_box;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use thalweg::{Access, CloseReason, Config, Endpoint, LinkKind, Message, Node, Wake};
use tokio::runtime::Runtime;

/// A connected pair of endpoints and what keeps it alive.
struct Pair {
    nodes: [Node; 2],
    here: Endpoint,
    there: Endpoint,
}

impl Pair {
    async fn over(link: LinkKind) -> thalweg::Result<Pair> {
        let config = || Config::new().transports([link]).wake(Wake::Park);
        let nodes = [Node::new(config())?, Node::new(config())?];
        let listener = nodes[1].listen("thalweg://127.0.0.1:0").await?;
        let address = listener.address().to_string();
        let (here, there) = both(nodes[0].connect(address.as_str()), listener.accept()).await;
        Ok(Pair { here: here?, there: there?, nodes })
    }

    async fn close(self) {
        for node in &self.nodes {
            node.close(CloseReason::default()).await;
        }
    }
}

/// Polls both until both are ready.
async fn both<A: Future, B: Future>(a: A, b: B) -> (A::Output, B::Output) {
    let (mut a, mut b) = (pin!(a), pin!(b));
    let (mut first, mut second) = (None, None);
    std::future::poll_fn(|cx| {
        if first.is_none()
            && let std::task::Poll::Ready(value) = a.as_mut().poll(cx)
        {
            first = Some(value);
        }
        if second.is_none()
            && let std::task::Poll::Ready(value) = b.as_mut().poll(cx)
        {
            second = Some(value);
        }
        match (first.take(), second.take()) {
            (Some(a), Some(b)) => std::task::Poll::Ready((a, b)),
            (a, b) => {
                (first, second) = (a, b);
                std::task::Poll::Pending
            }
        }
    })
    .await
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn messages(criterion: &mut Criterion) {
    for link in [LinkKind::Shm, LinkKind::Tcp] {
        let runtime = runtime();
        let pair = runtime.block_on(Pair::over(link)).expect("two nodes connect");
        let mut group = criterion.benchmark_group(format!("message/{link}"));
        for size in [8usize, 64 << 10] {
            let bytes = Bytes::from(vec![7u8; size]);
            group.throughput(Throughput::Bytes(size as u64));
            group.bench_function(thalweg_bench::units::show_size(size), |bencher| {
                bencher.iter(|| {
                    runtime.block_on(async {
                        let message = match size {
                            8 => Message::copy_from_slice(&bytes),
                            _ => Message::from(bytes.clone()),
                        };
                        let (sent, got) = both(pair.here.send(message), pair.there.recv()).await;
                        black_box((sent.is_ok(), got.expect("a message")));
                    });
                });
            });
        }
        group.finish();
        runtime.block_on(pair.close());
    }
}

fn tags(criterion: &mut Criterion) {
    for link in [LinkKind::Shm, LinkKind::Tcp] {
        let runtime = runtime();
        let pair = runtime.block_on(Pair::over(link)).expect("two nodes connect");
        criterion.bench_function(&format!("tag/{link}/8 B"), |bencher| {
            let mut buffers = Some((vec![7u8; 8], vec![0u8; 8]));
            bencher.iter(|| {
                let (out, into) = buffers.take().expect("buffers come back");
                let (sent, got) = runtime.block_on(both(
                    pair.here.tag_send(5, out),
                    pair.there.tag_recv(5, u64::MAX, into),
                ));
                buffers = Some((sent.expect("sent"), got.expect("received").buffer));
            });
        });
        runtime.block_on(pair.close());
    }
}

fn puts(criterion: &mut Criterion) {
    for link in [LinkKind::Shm, LinkKind::Tcp] {
        let runtime = runtime();
        let pair = runtime.block_on(Pair::over(link)).expect("two nodes connect");
        let region = pair.nodes[1].register(vec![0u8; 4096], Access::Write).expect("a region");
        let key = region.key();
        criterion.bench_function(&format!("put/{link}/4 KiB"), |bencher| {
            let mut buffer = Some(vec![7u8; 4096]);
            bencher.iter(|| {
                let out = buffer.take().expect("the buffer comes back");
                buffer = Some(runtime.block_on(pair.here.put(out, &key, 0)).expect("put"));
            });
        });
        runtime.block_on(pair.close());
    }
}

criterion_group! {
    name = hot_paths;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = messages, tags, puts
}
criterion_main!(hot_paths);
