//! What every link must do, written once against `Endpoint` and run for each way of connecting.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use thalweg::{
    Access, Cancel, CloseReason, Endpoint, ErrorKind, Family, Frame, Message, Node, RemoteKey,
    Verdict, Wake,
};
use thalweg_tests::{
    PATIENCE, Pair, Random, Way, check_pattern, connect, pair, pair_of, pair_with, pattern,
    poll_times, run, runtime, skipped, tells_of_death, until, within,
};

/// One test for each case and way.
macro_rules! cases {
    ($($case:ident)*) => {
        $(
            mod $case {
                use super::*;

                cases!(@ways $case: tcp Tcp, shm_all ShmAll, shm_inline_arena ShmInlineArena,
                    shm_single_copy ShmSingleCopy, shm_loans ShmLoans, mock Mock,
                    mock_reordering MockReordering, mock_delaying MockDelaying,
                    mock_tiny MockTiny, mock_direct MockDirect,
                    mock_direct_late MockDirectLate, ucx Ucx, verbs Verbs);
            }
        )*
    };
    (@ways $case:ident: $($name:ident $way:ident),*) => {
        $(
            #[test]
            fn $name() {
                if let Some(why) = Way::$way.missing() {
                    return skipped(concat!(stringify!($case), "::", stringify!($name)), &why);
                }
                run(
                    concat!(stringify!($case), "::", stringify!($name)),
                    || super::$case(Way::$way),
                );
            }
        )*
    };
}

cases! {
    order_of_messages
    order_of_pipelined_messages
    sizes_of_messages
    sizes_of_tags
    large_tags_at_once
    sizes_of_one_sided
    message_without_frames
    frames_without_bytes
    frames_5000
    frames_100000
    frame_tables_behind_bulk
    one_buffer_to_many
    tags_interleaved
    tags_unexpected
    tags_masked
    tag_buffer_too_small
    tag_receive_dropped_unmatched
    tag_receive_dropped_while_landing
    tag_receive_dropped_when_done
    tag_receives_dropped_at_random
    receives_dropped_at_random
    sends_dropped_at_random
    cancel_before_it_begins
    cancel_after_it_has_begun
    one_sided_bounds
    one_sided_access
    one_sided_revoked
    one_sided_revoked_midway
    one_sided_dropped
    direct_is_used
    direct_bounds_and_access
    direct_revoked_midway
    direct_revoked_by_dropping
    direct_revoked_at_two_peers
    direct_dropped
    direct_on_many_keys
    direct_and_the_end
    direct_and_goodbye
    fence_orders_families
    credit_is_respected
    credit_admits_the_oversized
    credit_blocks_and_resumes
    tag_credit_blocks_and_resumes
    try_send_until_full
    recv_any_takes_turns
    close_flushes_and_says_why
    close_both_at_once
    close_while_receiving
    close_with_much_in_flight
    close_while_the_peer_asks
    dropping_the_last_handle_flushes
    abort_ends_at_once
    abort_ends_what_spins
    drain_waits_for_the_peer
    timeouts_give_back_what_is_free
    many_threads_and_runtimes
    hello_both_ways
    route_says_why
    stats_count
    runtime_gone
    limits_are_refused
    both_directions_at_once
    families_do_not_wait_for_bulk
}

/// Lengths around every place where something changes.
const SIZES: [usize; 31] = [
    0, 1, 7, 8, 55, 56, 57, 61, 62, 63, 127, 128, 129, 2047, 2048, 2049, 4095, 4096, 4097, 8191,
    8193, 65535, 65536, 65537, 262_143, 262_145, 1_048_575, 1_048_576, 1_048_577, 3_000_001,
    8_388_611,
];

/// Message `number`, of a length that depends on it.
fn numbered(way: Way, node: &Node, number: u64) -> Message {
    let len = match number % 50 {
        13 => 70_000,
        7 | 31 => 3_000,
        other => 8 + (other as usize * 7) % 140,
    };
    let mut bytes = pattern(number, len);
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    // Loans are for large things.
    if len > 1000 { way.message(node, &bytes) } else { Message::copy_from_slice(&bytes) }
}

fn number_of(bytes: &[u8]) -> u64 {
    let number = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    let mut expected = pattern(number, bytes.len());
    expected[..8].copy_from_slice(&number.to_le_bytes());
    assert!(expected == bytes, "message {number} of {} bytes is damaged", bytes.len());
    number
}

async fn receive_number(endpoint: &Endpoint) -> u64 {
    number_of(&endpoint.recv().await.expect("a message").to_vec().expect("its bytes"))
}

async fn order_of_messages(way: Way) {
    let pair = pair(way).await;
    let count = 10_000;
    let sending = async {
        for number in 0..count {
            pair.a.send(numbered(way, &pair.node_a, number)).await.expect("sending");
        }
    };
    let receiving = async {
        for number in 0..count {
            assert_eq!(receive_number(&pair.b).await, number);
        }
    };
    tokio::join!(sending, receiving);
}

async fn order_of_pipelined_messages(way: Way) {
    let pair = pair(way).await;
    let count = 2_000;
    let sending = async {
        let mut window = futures_util::stream::FuturesOrdered::new();
        for number in 0..count {
            if window.len() == 64 {
                let sent: Option<Result<Message, _>> = window.next().await;
                sent.expect("one").expect("sending");
            }
            let mut op = pair.a.send(numbered(way, &pair.node_a, number));
            match poll_times(&mut op, 1).await {
                Some(sent) => drop(sent.expect("sending")),
                None => window.push_back(op),
            }
        }
        while let Some(sent) = window.next().await {
            sent.expect("sending");
        }
    };
    let receiving = async {
        for number in 0..count {
            assert_eq!(receive_number(&pair.b).await, number);
        }
    };
    tokio::join!(sending, receiving);
}

async fn both_directions_at_once(way: Way) {
    let pair = pair(way).await;
    let count = 500;
    let talk = async |endpoint: &Endpoint, node: &Node| {
        let sending = async {
            for number in 0..count {
                endpoint.send(numbered(way, node, number)).await.expect("sending");
            }
        };
        let receiving = async {
            for number in 0..count {
                assert_eq!(receive_number(endpoint).await, number);
            }
        };
        tokio::join!(sending, receiving);
    };
    tokio::join!(talk(&pair.a, &pair.node_a), talk(&pair.b, &pair.node_b));
}

async fn sizes_of_messages(way: Way) {
    let pair = pair(way).await;
    for len in SIZES {
        let bytes = pattern(len as u64, len);
        let (sent, got) = tokio::join!(pair.a.send(pair.message(&bytes)), async {
            let got = pair.b.recv().await.expect("receiving");
            assert_eq!((got.frame_count(), got.len_bytes()), (1, len));
            got.to_vec().expect("bytes")
        });
        sent.unwrap_or_else(|error| panic!("{len}: {error}"));
        check_pattern(len as u64, &got);
        // Two frames of that length, with a short one between them.
        let message = Message::from(vec![
            way.frame(&pair.node_a, &bytes),
            Frame::copy_from_slice(b"between"),
            way.frame(&pair.node_a, &bytes),
        ]);
        let (sent, got) = tokio::join!(pair.a.send(message), pair.b.recv());
        let got = got.expect("receiving");
        let lens: Vec<_> = got.frames().iter().map(Frame::len).collect();
        assert_eq!(lens, [len, 7, len]);
        for at in [0, 2] {
            check_pattern(len as u64, &got.frames()[at].to_vec().expect("bytes"));
        }
        drop(got);
        sent.unwrap_or_else(|error| panic!("three frames of {len}: {error}"));
    }
}

async fn sizes_of_tags(way: Way) {
    let pair = pair(way).await;
    for len in SIZES {
        let bytes = pattern(len as u64, len);
        // Received before it is sent.
        let mut receive = pair.b.tag_recv(5, u64::MAX, vec![0; len + 3]);
        assert!(poll_times(&mut receive, 2).await.is_none());
        let (sent, got) = tokio::join!(pair.a.tag_send(5, bytes.clone()), receive);
        assert_eq!(sent.expect("sending").len(), len);
        let got = got.expect("receiving");
        assert_eq!((got.tag, got.len_bytes, got.buffer.len()), (5, len, len + 3));
        check_pattern(len as u64, &got.buffer[..len]);
        // Sent before it is received.
        let mut send = pair.a.tag_send(6, bytes);
        let sent = poll_times(&mut send, 2).await;
        let finish = async {
            match sent {
                Some(sent) => sent,
                None => send.await,
            }
        };
        let (sent, got) = tokio::join!(finish, pair.b.tag_recv(6, u64::MAX, vec![0; len]));
        sent.expect("sending");
        check_pattern(len as u64, &got.expect("receiving").buffer);
    }
}

/// More than a link may have on its way at once, in lengths that share it out unevenly.
async fn large_tags_at_once(way: Way) {
    const KIB: usize = 1024;
    let pair = pair(way).await;
    for lens_kib in [&[1024, 1024, 1024, 512, 1024][..], &[2048; 6]] {
        let lens = || lens_kib.iter().map(|len| len * KIB).enumerate();
        let sends = lens().map(|(tag, len)| pair.a.tag_send(tag as u64, pattern(tag as u64, len)));
        let receives = lens().map(|(tag, len)| pair.b.tag_recv(tag as u64, u64::MAX, vec![0; len]));
        let (sent, got) = tokio::join!(join_all(sends), join_all(receives));
        for (tag, (sent, got)) in sent.into_iter().zip(got).enumerate() {
            sent.expect("sending");
            check_pattern(tag as u64, &got.expect("receiving").buffer);
        }
    }
}

async fn sizes_of_one_sided(way: Way) {
    let pair = pair(way).await;
    let largest = SIZES[SIZES.len() - 1];
    let region = pair.node_b.register(vec![0u8; largest + 10], Access::ReadWrite).expect("region");
    let key = RemoteKey::from_bytes(&region.key().to_bytes()).expect("a key");
    assert_eq!(key.len_bytes(), largest as u64 + 10);
    for len in SIZES {
        let bytes = pattern(len as u64, len);
        let back = pair.a.put(bytes, &key, 10).await.expect("putting");
        assert_eq!(back.len(), len);
        let mut here = vec![0; len];
        region.read(10, &mut here).expect("within");
        check_pattern(len as u64, &here);
        let got = pair.a.get(vec![0u8; len], &key, 10).await.expect("getting");
        check_pattern(len as u64, &got);
    }
    let stats = pair.a.stats();
    assert_eq!(stats.direct_puts > 20 && stats.direct_gets > 20, way.is_direct(), "{stats:?}");
    assert_eq!(region.revoke().await.expect("revoked").len(), largest + 10);
}

async fn message_without_frames(way: Way) {
    let pair = pair(way).await;
    pair.a.send(Message::new()).await.expect("sending");
    pair.a.send(Message::copy_from_slice(b"next")).await.expect("sending");
    assert_eq!(pair.b.recv().await.expect("receiving").frame_count(), 0);
    assert_eq!(pair.b.recv().await.expect("receiving").to_vec().expect("bytes"), b"next");
}

async fn frames_without_bytes(way: Way) {
    let pair = pair(way).await;
    for shape in [
        vec![0],
        vec![0, 0],
        vec![0, 5, 0],
        vec![5, 0, 0, 70_000, 0],
        vec![0; 300],
        vec![0, 100_000],
    ] {
        let frames: Vec<Frame> =
            shape.iter().map(|len| way.frame(&pair.node_a, &pattern(1, *len))).collect();
        // Loans come back when what was received is dropped.
        let receiving = async {
            let got = pair.b.recv().await.expect("receiving");
            let lens: Vec<_> = got.frames().iter().map(Frame::len).collect();
            assert_eq!(lens, shape);
            for frame in got.frames() {
                check_pattern(1, &frame.to_vec().expect("bytes"));
            }
        };
        let (sent, ()) = tokio::join!(pair.a.send(frames), receiving);
        sent.expect("sending");
    }
}

async fn many_frames(way: Way, count: usize) {
    let pair = pair(way).await;
    let frames: Message =
        (0..count).map(|number| Frame::copy_from_slice(&(number as u32).to_le_bytes())).collect();
    let (sent, got) = tokio::join!(pair.a.send(frames), pair.b.recv());
    sent.expect("sending");
    let got = got.expect("receiving");
    assert_eq!(got.frame_count(), count);
    for (number, frame) in got.into_frames().enumerate() {
        assert_eq!(frame.to_vec().expect("bytes"), (number as u32).to_le_bytes());
    }
    // Long frames, and one message after the other.
    let long: Vec<Frame> = (0..300).map(|number| pattern(number, 5000).into()).collect();
    let short = Message::copy_from_slice(b"after");
    let (sent, next, got) = tokio::join!(pair.a.send(long), pair.a.send(short), pair.b.recv());
    sent.expect("sending");
    next.expect("sending");
    for (number, frame) in got.expect("receiving").frames().iter().enumerate() {
        check_pattern(number as u64, &frame.to_vec().expect("bytes"));
    }
    assert_eq!(pair.b.recv().await.expect("receiving").len_bytes(), 5);
}

/// Many messages whose frame lengths go ahead of them, while a long one is still being written.
async fn frame_tables_behind_bulk(way: Way) {
    let pair = pair(way).await;
    let sent = async {
        let long = pair.a.send(vec![7; 16 << 20]);
        let many = (0..100u8).map(|number| {
            let frames: Message = (0..200).map(|_| Frame::copy_from_slice(&[number])).collect();
            pair.a.send(frames)
        });
        let (long, many) = tokio::join!(long, futures_util::future::join_all(many));
        long.expect("sending");
        many.into_iter().for_each(|sent| drop(sent.expect("sending")));
    };
    let received = async {
        assert_eq!(pair.b.recv().await.expect("receiving").len_bytes(), 16 << 20);
        for number in 0..100 {
            let got = pair.b.recv().await.expect("receiving");
            assert_eq!(got.frame_count(), 200);
            assert_eq!(got.to_vec().expect("bytes"), [number; 200]);
        }
    };
    tokio::join!(sent, received);
}

async fn frames_5000(way: Way) {
    many_frames(way, 5_000).await;
}

async fn frames_100000(way: Way) {
    many_frames(way, 100_000).await;
}

async fn one_buffer_to_many(way: Way) {
    let pair = pair(way).await;
    let mut ends = vec![(pair.a.clone(), pair.b.clone())];
    for _ in 1..10 {
        ends.push(connect(&pair.node_a, &pair.listener).await);
    }
    let shared = Bytes::from(pattern(3, 300_000));
    let sending = join_all(ends.iter().map(|(a, _)| a.send(shared.clone())));
    let receiving = join_all(ends.iter().map(|(_, b)| b.recv()));
    let (sent, got) = tokio::join!(sending, receiving);
    assert!(sent.into_iter().all(|sent| sent.is_ok()));
    for got in got {
        check_pattern(3, &got.expect("receiving").to_vec().expect("bytes"));
    }
}

async fn tags_interleaved(way: Way) {
    let pair = pair(way).await;
    let count = 300usize;
    let sending = async {
        for number in 0..count {
            let len = [8, 100, 5_000, 70_000][number % 4];
            let mut bytes = pattern(number as u64, len);
            bytes[..8].copy_from_slice(&(number as u64).to_le_bytes());
            pair.a.tag_send((number % 3) as u64, bytes).await.expect("sending");
        }
    };
    let receiver = async |tag: u64| {
        for turn in 0..count / 3 {
            let got = pair.b.tag_recv(tag, u64::MAX, vec![0; 70_000]).await.expect("receiving");
            assert_eq!(number_of(&got.buffer[..got.len_bytes]), turn as u64 * 3 + tag);
        }
    };
    tokio::join!(sending, receiver(0), receiver(1), receiver(2));
}

async fn tags_unexpected(way: Way) {
    let pair = pair(way).await;
    // Small ones travel at once, large ones wait at the sender; taken in another order by tag.
    let sends: FuturesUnordered<_> = (0..20u64)
        .map(|number| {
            let len = if number % 2 == 0 { 100 } else { 200_000 };
            pair.a.tag_send(number, pattern(number, len))
        })
        .collect();
    let sending = sends.for_each(|sent| async move { drop(sent.expect("sending")) });
    let receiving = async {
        for number in (0..20u64).rev() {
            let got = pair.b.tag_recv(number, u64::MAX, vec![0; 200_000]).await.expect("receiving");
            assert_eq!(got.tag, number);
            check_pattern(number, &got.buffer[..got.len_bytes]);
        }
    };
    tokio::join!(sending, receiving);
}

async fn tags_masked(way: Way) {
    let pair = pair(way).await;
    for tag in [0x1_0001, 0x2_0001, 0x1_0002, 0x2_0002] {
        pair.a.tag_send(tag, vec![1; 10]).await.expect("sending");
    }
    let take =
        async |tag, mask| pair.b.tag_recv(tag, mask, vec![0; 10]).await.expect("receiving").tag;
    assert_eq!(take(2, 0xffff).await, 0x1_0002);
    assert_eq!(take(0x2_0000, 0xf_0000).await, 0x2_0001);
    assert_eq!(take(0, 0).await, 0x1_0001);
    assert_eq!(take(0, 0).await, 0x2_0002);
}

async fn tag_buffer_too_small(way: Way) {
    let pair = pair(way).await;
    for len in [100, 200_000] {
        let mut send = pair.a.tag_send(1, pattern(9, len));
        let sent = poll_times(&mut send, 3).await;
        let receiving = async {
            for _ in 0..2 {
                let failed = pair.b.tag_recv(1, u64::MAX, vec![0; 99]).await.expect_err("small");
                assert_eq!(failed.kind(), ErrorKind::BufferTooSmall);
                assert_eq!(failed.buffer.expect("back").len(), 99);
            }
            let got = pair.b.tag_recv(1, u64::MAX, vec![0; len]).await.expect("large enough");
            check_pattern(9, &got.buffer);
        };
        let finish = async {
            match sent {
                Some(sent) => sent,
                None => send.await,
            }
        };
        let (sent, ()) = tokio::join!(finish, receiving);
        sent.expect("sending");
    }
    // Posted before it comes.
    let mut small = pair.b.tag_recv(2, u64::MAX, vec![0; 5]);
    assert!(poll_times(&mut small, 2).await.is_none());
    pair.a.tag_send(2, vec![7; 6]).await.expect("sending");
    assert_eq!(small.await.expect_err("too small").kind(), ErrorKind::BufferTooSmall);
    let got = pair.b.tag_recv(2, u64::MAX, vec![0; 6]).await.expect("large enough");
    assert_eq!(got.buffer, [7; 6]);
}

async fn tag_receive_dropped_unmatched(way: Way) {
    let pair = pair(way).await;
    let mut receive = pair.b.tag_recv(1, u64::MAX, vec![0; 10]);
    assert!(poll_times(&mut receive, 3).await.is_none());
    drop(receive);
    pair.a.tag_send(1, vec![4; 10]).await.expect("sending");
    let got = pair.b.tag_recv(1, u64::MAX, vec![0; 10]).await.expect("receiving");
    assert_eq!(got.buffer, [4; 10]);
    assert_eq!(pair.b.stats().operations, 0);
}

/// Sends two payloads under one tag; drops a receive of the first after each number of polls; the
/// next receives must get both, in order.
async fn tag_receive_dropped_while_landing(way: Way) {
    let pair = pair(way).await;
    for len in [50, 5_000, 60_000, 500_000, 3_000_000] {
        for polls in 0..10 {
            let sending = async {
                let first = pair.a.tag_send(1, pattern(1, len));
                let second = pair.a.tag_send(1, pattern(2, len));
                let (first, second) = tokio::join!(first, second);
                first.expect("sending");
                second.expect("sending");
            };
            let receiving = async {
                let mut dropped = pair.b.tag_recv(1, u64::MAX, vec![0; len]);
                let early = poll_times(&mut dropped, polls).await;
                drop(dropped);
                let first = match early {
                    Some(got) => got,
                    None => pair.b.tag_recv(1, u64::MAX, vec![0; len]).await,
                };
                check_pattern(1, &first.expect("receiving").buffer);
                let second = pair.b.tag_recv(1, u64::MAX, vec![0; len]).await;
                check_pattern(2, &second.expect("receiving").buffer);
            };
            tokio::join!(sending, receiving);
        }
    }
}

async fn tag_receive_dropped_when_done(way: Way) {
    let pair = pair(way).await;
    for len in [20, 300_000] {
        let mut receive = pair.b.tag_recv(1, u64::MAX, vec![0; len]);
        assert!(poll_times(&mut receive, 2).await.is_none());
        let (one, two) = (pattern(1, len), pattern(2, len));
        let before = pair.b.stats().tags_received;
        let sends = async {
            let (one, two) = tokio::join!(pair.a.tag_send(1, one), pair.a.tag_send(1, two));
            one.and(two).expect("sending");
        };
        let receiving = async {
            // The resident task lands it; the receive is over but has not been polled again.
            until("the payload to land", || pair.b.stats().tags_received > before).await;
            drop(receive);
            for number in [1, 2] {
                let got = pair.b.tag_recv(1, u64::MAX, vec![0; len]).await.expect("receiving");
                check_pattern(number, &got.buffer);
            }
        };
        tokio::join!(sends, receiving);
    }
}

async fn tag_receives_dropped_at_random(way: Way) {
    let pair = pair(way).await;
    let count = 200u64;
    let len_of = |number: u64| match number % 5 {
        0 => 8,
        1 => 150,
        2 => 3_000,
        3 => 66_000,
        _ => 250_000,
    };
    let sending = async {
        let mut window = FuturesUnordered::new();
        for number in 0..count {
            if window.len() >= 8 {
                let sent: Option<Result<Vec<u8>, _>> = window.next().await;
                sent.expect("one").expect("sending");
            }
            let mut bytes = pattern(number, len_of(number));
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            let mut op = pair.a.tag_send(number % 7, bytes);
            match poll_times(&mut op, 1).await {
                Some(sent) => drop(sent.expect("sending")),
                None => window.push(op),
            }
        }
        while let Some(sent) = window.next().await {
            sent.expect("sending");
        }
    };
    let receiving = async {
        let mut random = Random::new(way as u64);
        for number in 0..count {
            let got = loop {
                let mut receive = pair.b.tag_recv(0, 0, vec![0; 250_000]);
                let polls = random.below(8);
                if let Some(got) = poll_times(&mut receive, polls).await {
                    break got.expect("receiving");
                }
            };
            assert_eq!(number_of(&got.buffer[..got.len_bytes]), number);
        }
    };
    tokio::join!(sending, receiving);
}

async fn receives_dropped_at_random(way: Way) {
    let pair = pair(way).await;
    let count = 500;
    let sending = async {
        for number in 0..count {
            pair.a.send(numbered(way, &pair.node_a, number)).await.expect("sending");
        }
    };
    let receiving = async {
        let mut random = Random::new(way as u64);
        for number in 0..count {
            let got = loop {
                let mut receive = pair.b.recv();
                let polls = random.below(6);
                if let Some(got) = poll_times(&mut receive, polls).await {
                    break got.expect("receiving");
                }
            };
            assert_eq!(number_of(&got.to_vec().expect("bytes")), number);
        }
    };
    tokio::join!(sending, receiving);
}

async fn sends_dropped_at_random(way: Way) {
    let pair = pair_with(way, |config| config.message_window_bytes(100_000)).await;
    let count = 500;
    let sending = async {
        let mut random = Random::new(way as u64);
        let mut complete = HashSet::new();
        for number in 0..count {
            let mut send = pair.a.send(numbered(way, &pair.node_a, number));
            let polls = random.below(6);
            if let Some(sent) = poll_times(&mut send, polls).await {
                sent.expect("sending");
                complete.insert(number);
            }
        }
        pair.a.send(numbered(way, &pair.node_a, count)).await.expect("sending");
        complete
    };
    let receiving = async {
        let mut got = Vec::new();
        loop {
            let number = receive_number(&pair.b).await;
            if number == count {
                return got;
            }
            got.push(number);
        }
    };
    let (complete, got) = tokio::join!(sending, receiving);
    assert!(got.is_sorted_by(|a, b| a < b), "in order and once: {got:?}");
    let got: HashSet<_> = got.into_iter().collect();
    assert!(complete.is_subset(&got), "{:?} are lost", complete.difference(&got));
}

/// Fills the peer's window, so that whatever is sent next has to wait.
async fn exhaust_credit(pair: &Pair) -> usize {
    let mut sent = 0;
    while pair.a.try_send(Message::copy_from_slice(&[1; 1000])).is_ok() {
        sent += 1;
        tokio::task::yield_now().await;
    }
    sent
}

async fn cancel_before_it_begins(way: Way) {
    let small = |config: thalweg::Config| {
        config.message_window_bytes(8192).tag_window_bytes(8192).eager_max_bytes(1024)
    };
    let pair = pair_with(way, small).await;
    let mut receive = pair.b.tag_recv(1, u64::MAX, vec![9; 10]);
    assert!(poll_times(&mut receive, 2).await.is_none());
    match receive.cancel().await {
        Cancel::Cancelled(buffer) => assert_eq!(buffer, [9; 10]),
        Cancel::Completed(_) => panic!("nothing was sent"),
    }
    assert!(matches!(pair.b.recv().cancel().await, Cancel::Cancelled(())));
    let sent = exhaust_credit(&pair).await;
    let mut send = pair.a.send(Message::copy_from_slice(&[2; 5000]));
    assert!(poll_times(&mut send, 3).await.is_none());
    match send.cancel().await {
        Cancel::Cancelled(message) => assert_eq!(message.to_vec().expect("bytes"), [2; 5000]),
        Cancel::Completed(_) => panic!("there was no credit"),
    }
    for _ in 0..sent {
        assert_eq!(pair.b.recv().await.expect("receiving").len_bytes(), 1000);
    }
    pair.a.send(Message::copy_from_slice(b"last")).await.expect("sending");
    assert_eq!(pair.b.recv().await.expect("receiving").len_bytes(), 4);
}

async fn cancel_after_it_has_begun(way: Way) {
    let pair = pair(way).await;
    let mut send = pair.a.tag_send(1, pattern(5, 400_000));
    let early = poll_times(&mut send, 3).await;
    assert!(early.is_none(), "it waits for its receive");
    let receiving = async {
        let got = pair.b.tag_recv(1, u64::MAX, vec![0; 400_000]).await.expect("receiving");
        check_pattern(5, &got.buffer);
    };
    let (cancelled, ()) = tokio::join!(send.cancel(), receiving);
    match cancelled {
        Cancel::Completed(Ok(buffer)) => check_pattern(5, &buffer),
        Cancel::Completed(Err(error)) => panic!("{error}"),
        Cancel::Cancelled(_) => panic!("it had begun"),
    }
    // A receive that is landing ends with its payload.
    let mut receive = pair.b.tag_recv(1, u64::MAX, vec![0; 10]);
    assert!(poll_times(&mut receive, 2).await.is_none());
    let before = pair.b.stats().tags_received;
    pair.a.tag_send(1, vec![3; 10]).await.expect("sending");
    until("the payload to land", || pair.b.stats().tags_received > before).await;
    match receive.cancel().await {
        Cancel::Completed(Ok(got)) => assert_eq!(got.buffer, [3; 10]),
        other => panic!("{other:?}"),
    }
}

async fn one_sided_bounds(way: Way) {
    let pair = pair(way).await;
    let region = pair.node_b.register(vec![5u8; 100], Access::ReadWrite).expect("region");
    let key = region.key();
    for (offset, len) in [(0, 101), (100, 1), (u64::MAX, 2), (u64::MAX - 50, 100), (51, 50)] {
        let failed = pair.a.put(vec![1u8; len], &key, offset).await.expect_err("outside");
        assert_eq!(failed.kind(), ErrorKind::OutOfBounds);
        assert_eq!(failed.buffer.expect("back").len(), len);
        let failed = pair.a.get(vec![1u8; len], &key, offset).await.expect_err("outside");
        assert_eq!(failed.kind(), ErrorKind::OutOfBounds);
    }
    // A key that promises more than the region has: the target checks too.
    let mut forged = key.to_bytes();
    let len_at = forged
        .windows(8)
        .position(|bytes| bytes == 100u64.to_le_bytes())
        .expect("the length is in the key");
    forged[len_at..len_at + 8].copy_from_slice(&1_000_000u64.to_le_bytes());
    let forged = RemoteKey::from_bytes(&forged).expect("a key");
    for len in [8, 5_000, 200_000] {
        let failed = pair.a.put(vec![1u8; len], &forged, 99).await.expect_err("outside");
        assert_eq!(failed.kind(), ErrorKind::OutOfBounds, "put of {len}");
        let failed = pair.a.get(vec![1u8; len], &forged, 99).await.expect_err("outside");
        assert_eq!(failed.kind(), ErrorKind::OutOfBounds, "get of {len}");
    }
    assert_eq!(region.revoke().await.expect("revoked"), vec![5u8; 100]);
    // Neither messages nor the endpoint have suffered.
    pair.a.send(Message::copy_from_slice(b"alive")).await.expect("sending");
    assert_eq!(pair.b.recv().await.expect("receiving").len_bytes(), 5);
}

async fn one_sided_access(way: Way) {
    let pair = pair(way).await;
    let readable = pair.node_b.register(vec![1u8; 10], Access::Read).expect("region");
    let writable = pair.node_b.register(vec![2u8; 10], Access::Write).expect("region");
    let failed = pair.a.put(vec![9u8; 10], &readable.key(), 0).await.expect_err("read only");
    assert_eq!(failed.kind(), ErrorKind::Unsupported);
    let failed = pair.a.get(vec![9u8; 10], &writable.key(), 0).await.expect_err("write only");
    assert_eq!(failed.kind(), ErrorKind::Unsupported);
    assert_eq!(pair.a.get(vec![9u8; 10], &readable.key(), 0).await.expect("getting"), [1; 10]);
    pair.a.put(vec![9u8; 10], &writable.key(), 0).await.expect("putting");
    assert_eq!(readable.revoke().await.expect("revoked"), [1; 10]);
    assert_eq!(writable.revoke().await.expect("revoked"), [9; 10]);
    // A key of another node.
    let own = pair.node_a.register(vec![0u8; 10], Access::ReadWrite).expect("region");
    let failed = pair.a.put(vec![1u8; 1], &own.key(), 0).await.expect_err("not the peer's");
    assert_eq!(failed.kind(), ErrorKind::InvalidInput);
}

async fn one_sided_revoked(way: Way) {
    let pair = pair(way).await;
    let region = pair.node_b.register(vec![0u8; 300_000], Access::ReadWrite).expect("region");
    let key = region.key();
    drop(region);
    for len in [0, 10, 300_000] {
        let failed = pair.a.put(vec![1u8; len], &key, 0).await.expect_err("revoked");
        assert_eq!(failed.kind(), ErrorKind::KeyRevoked, "put of {len}");
        assert_eq!(failed.buffer.expect("back").len(), len);
        let failed = pair.a.get(vec![1u8; len], &key, 0).await.expect_err("revoked");
        assert_eq!(failed.kind(), ErrorKind::KeyRevoked, "get of {len}");
    }
    pair.a.send(Message::copy_from_slice(b"alive")).await.expect("sending");
    pair.b.recv().await.expect("receiving");
}

async fn one_sided_revoked_midway(way: Way) {
    let pair = pair(way).await;
    for polls in 0..6 {
        let len = 4 << 20;
        let region = pair.node_b.register(vec![0u8; len], Access::ReadWrite).expect("region");
        let key = region.key();
        let mut put = pair.a.put(vec![1u8; len], &key, 0);
        let mut get = pair.a.get(vec![2u8; len], &key, 0);
        let put_early = poll_times(&mut put, polls).await;
        let get_early = poll_times(&mut get, polls).await;
        let finish_put = async {
            match put_early {
                Some(put) => put,
                None => put.await,
            }
        };
        let finish_get = async {
            match get_early {
                Some(get) => get,
                None => get.await,
            }
        };
        let (buffer, put, get) = tokio::join!(region.revoke(), finish_put, finish_get);
        let buffer = buffer.expect("revoked");
        assert_eq!(buffer.len(), len);
        for kind in [put.err().map(|e| e.kind()), get.err().map(|e| e.kind())] {
            assert!(matches!(kind, None | Some(ErrorKind::KeyRevoked)), "{kind:?}");
        }
    }
}

async fn one_sided_dropped(way: Way) {
    let pair = pair(way).await;
    let region = pair.node_b.register(vec![0u8; 300_000], Access::ReadWrite).expect("region");
    let key = region.key();
    for polls in 0..8 {
        for len in [10, 300_000] {
            let mut put = pair.a.put(vec![1u8; len], &key, 0);
            let _ = poll_times(&mut put, polls).await;
            drop(put);
            let mut get = pair.a.get(vec![1u8; len], &key, 0);
            let _ = poll_times(&mut get, polls).await;
            drop(get);
            let mut fence = pair.a.fence();
            let _ = poll_times(&mut fence, polls).await;
            drop(fence);
        }
    }
    pair.a.fence().await.expect("a fence");
    pair.a.put(pattern(8, 300_000), &key, 0).await.expect("putting");
    check_pattern(8, &region.revoke().await.expect("revoked"));
    until("everything to end", || pair.a.stats().operations == 0).await;
}

/// Puts until the link does it by itself, if this way's ever does.
async fn use_until_direct(endpoint: &Endpoint, way: Way, key: &RemoteKey) {
    let before = endpoint.stats().direct_puts;
    let uses = async {
        for _ in 0.. {
            endpoint.put(vec![0u8; 1], key, 0).await.expect("putting");
            if !way.is_direct() || endpoint.stats().direct_puts > before {
                return;
            }
        }
    };
    within(Duration::from_secs(10), "direct access", uses).await;
}

async fn direct_is_used(way: Way) {
    let pair = pair(way).await;
    let how = pair.a.route().lanes.into_iter().find(|lane| lane.family == Family::OneSided);
    let how = how.expect("a lane").how;
    assert_eq!(how.starts_with("put/get by "), way.is_direct(), "{how}");
    assert!(how.contains("emulated by the target's process"), "{how}");
    let region = pair.node_b.register(vec![0u8; 2_000_000], Access::ReadWrite).expect("region");
    use_until_direct(&pair.a, way, &region.key()).await;
    let before = pair.a.stats();
    assert_eq!(pair.b.stats().granted_keys, u64::from(way.is_direct()));
    let served = pair.b.stats().link_counters.parcels_received;
    // Many at once, so that something has to wait.
    let puts = (0..50).map(|i| pair.a.put(pattern(i, 40_000), &region.key(), i * 40_000));
    for put in join_all(puts).await {
        put.expect("putting");
    }
    let mut here = vec![0; 40_000];
    for i in 0..50 {
        region.read(i * 40_000, &mut here).expect("within");
        check_pattern(i as u64, &here);
    }
    let gets = (0..50).map(|i| pair.a.get(vec![0u8; 40_000], &region.key(), i * 40_000));
    for (i, get) in join_all(gets).await.into_iter().enumerate() {
        check_pattern(i as u64, &get.expect("getting"));
    }
    let after = pair.a.stats();
    let direct = if way.is_direct() { 50 } else { 0 };
    assert_eq!(after.direct_puts - before.direct_puts, direct);
    assert_eq!(after.direct_gets - before.direct_gets, direct);
    assert_eq!((after.puts - before.puts, after.gets - before.gets), (50, 50));
    if way.is_direct() {
        assert!(pair.b.stats().link_counters.parcels_received < served + 20, "nothing was served");
    }
    // The other direction has grants of its own.
    let other = pair.node_a.register(vec![3u8; 10], Access::Read).expect("region");
    for _ in 0..3 {
        assert_eq!(pair.b.get(vec![0; 10], &other.key(), 0).await.expect("getting"), [3; 10]);
    }
    assert_eq!(other.revoke().await.expect("revoked"), [3; 10]);
    assert_eq!(region.revoke().await.expect("revoked").len(), 2_000_000);
    assert_eq!(pair.b.stats().granted_keys, 0);
    assert_eq!((pair.a.stats().operations, pair.b.stats().operations), (0, 0));
}

async fn direct_bounds_and_access(way: Way) {
    let pair = pair(way).await;
    let region = pair.node_b.register(vec![5u8; 100], Access::Write).expect("region");
    let readable = pair.node_b.register(vec![6u8; 100], Access::Read).expect("region");
    use_until_direct(&pair.a, way, &region.key()).await;
    let mut forged = region.key().to_bytes();
    let len_at = forged.windows(8).position(|bytes| bytes == 100u64.to_le_bytes()).expect("in it");
    forged[len_at..len_at + 8].copy_from_slice(&1_000_000u64.to_le_bytes());
    let forged = RemoteKey::from_bytes(&forged).expect("a key");
    for (offset, len) in [(0, 101), (100, 1), (99, 5_000), (200, 0), (u64::MAX, 0)] {
        let failed = pair.a.put(vec![1u8; len], &forged, offset).await.expect_err("outside");
        assert_eq!(failed.kind(), ErrorKind::OutOfBounds);
        assert_eq!(failed.buffer.expect("back").len(), len);
    }
    for len in [0, 1, 100] {
        let failed = pair.a.get(vec![1u8; len], &region.key(), 0).await.expect_err("write only");
        assert_eq!(failed.kind(), ErrorKind::Unsupported);
        for _ in 0..3 {
            pair.a.get(vec![1u8; len], &readable.key(), 0).await.expect("getting");
        }
        let failed = pair.a.put(vec![1u8; len], &readable.key(), 0).await.expect_err("read only");
        assert_eq!(failed.kind(), ErrorKind::Unsupported);
        pair.a.put(vec![1u8; len], &region.key(), 100 - len as u64).await.expect("putting");
    }
    assert_eq!(pair.a.stats().direct_gets > 0, way.is_direct());
    assert_eq!(region.revoke().await.expect("revoked"), [1; 100]);
    assert_eq!(readable.revoke().await.expect("revoked"), [6; 100]);
}

/// What is handed back is nobody else's: no byte of it changes any more.
async fn direct_revoked_midway(way: Way) {
    let pair = pair(way).await;
    for round in 0..24u8 {
        let len = if round % 2 == 0 { 2 << 20 } else { 20_000 };
        let region = pair.node_b.register(vec![0u8; len], Access::ReadWrite).expect("region");
        let key = region.key();
        use_until_direct(&pair.a, way, &key).await;
        let mut puts: Vec<_> = (0..4u8).map(|i| pair.a.put(vec![i + 1; len], &key, 0)).collect();
        let mut get = pair.a.get(vec![0u8; len], &key, 0);
        let early = poll_times(&mut get, 1).await;
        let mut put_early = Vec::new();
        for put in &mut puts {
            put_early.push(poll_times(put, usize::from(round / 8)).await);
        }
        let others = async {
            let mut kinds = Vec::new();
            for (put, early) in puts.into_iter().zip(put_early) {
                let put = match early {
                    Some(put) => put,
                    None => put.await,
                };
                kinds.push(put.err().map(|failed| failed.kind()));
            }
            let get = match early {
                Some(get) => get,
                None => get.await,
            };
            kinds.push(get.err().map(|failed| failed.kind()));
            for kind in kinds {
                assert!(matches!(kind, None | Some(ErrorKind::KeyRevoked)), "{kind:?}");
            }
        };
        let revoked = async {
            let buffer = region.revoke().await.expect("revoked");
            let copy = buffer.clone();
            (buffer, copy)
        };
        let ((buffer, copy), ()) = tokio::join!(revoked, others);
        pair.a.fence().await.expect("a fence");
        assert!(buffer == copy, "written after it was handed back");
        let failed = pair.a.put(vec![9; 8], &key, 0).await.expect_err("revoked");
        assert_eq!(failed.kind(), ErrorKind::KeyRevoked);
        assert!(buffer == copy, "written after it was handed back");
        assert_eq!(pair.b.stats().granted_keys, 0);
    }
    assert_eq!(pair.a.stats().direct_puts > 24, way.is_direct());
}

async fn direct_revoked_by_dropping(way: Way) {
    let pair = pair(way).await;
    for _ in 0..10 {
        let region = pair.node_b.register(vec![0u8; 300_000], Access::ReadWrite).expect("region");
        let key = region.key();
        use_until_direct(&pair.a, way, &key).await;
        let mut put = pair.a.put(vec![1u8; 300_000], &key, 0);
        let early = poll_times(&mut put, 1).await;
        drop(region);
        let ended = match early {
            Some(put) => put,
            None => put.await,
        };
        let kind = ended.err().map(|failed| failed.kind());
        assert!(matches!(kind, None | Some(ErrorKind::KeyRevoked)), "{kind:?}");
        until("the key to be given back", || pair.b.stats().granted_keys == 0).await;
        let failed = pair.a.get(vec![1u8; 8], &key, 0).await.expect_err("revoked");
        assert_eq!(failed.kind(), ErrorKind::KeyRevoked);
    }
}

async fn direct_revoked_at_two_peers(way: Way) {
    let pair = pair(way).await;
    let node_c = Node::new(way.config()).expect("a node");
    let (c, d) = connect(&node_c, &pair.listener).await;
    let region = pair.node_b.register(vec![0u8; 500_000], Access::ReadWrite).expect("region");
    let key = region.key();
    use_until_direct(&pair.a, way, &key).await;
    use_until_direct(&c, way, &key).await;
    let held = u64::from(way.is_direct());
    assert_eq!((pair.b.stats().granted_keys, d.stats().granted_keys), (held, held));
    let (one, two, buffer) = tokio::join!(
        pair.a.put(vec![1u8; 500_000], &key, 0),
        c.put(vec![2u8; 500_000], &key, 0),
        region.revoke()
    );
    for kind in [one.err().map(|f| f.kind()), two.err().map(|f| f.kind())] {
        assert!(matches!(kind, None | Some(ErrorKind::KeyRevoked)), "{kind:?}");
    }
    assert_eq!(buffer.expect("revoked").len(), 500_000);
    assert_eq!((pair.b.stats().granted_keys, d.stats().granted_keys), (0, 0));
}

async fn direct_dropped(way: Way) {
    let pair = pair(way).await;
    let region = pair.node_b.register(vec![0u8; 600_000], Access::ReadWrite).expect("region");
    let key = region.key();
    use_until_direct(&pair.a, way, &key).await;
    for polls in 1..8 {
        for len in [10, 300_000] {
            let mut put = pair.a.put(vec![1u8; len], &key, 0);
            let _ = poll_times(&mut put, polls).await;
            drop(put);
            let mut get = pair.a.get(vec![1u8; len], &key, 300_000);
            if let Some(got) = poll_times(&mut get, polls).await {
                assert_eq!(got.expect("getting").len(), len);
                continue;
            }
            // What it had begun is waited for.
            match get.cancel().await {
                Cancel::Cancelled(buffer) | Cancel::Completed(Ok(buffer)) => {
                    assert_eq!(buffer.len(), len);
                }
                Cancel::Completed(Err(failed)) => panic!("{failed:?}"),
            }
        }
    }
    pair.a.fence().await.expect("a fence");
    pair.a.put(pattern(8, 600_000), &key, 0).await.expect("putting");
    check_pattern(8, &region.revoke().await.expect("revoked"));
    until("everything to end", || pair.a.stats().operations == 0).await;
}

/// More keys than may be granted: those beyond are served.
async fn direct_on_many_keys(way: Way) {
    const LIMIT: u64 = 1024;
    let count = LIMIT as usize + 60;
    let pair = pair(way).await;
    let regions: Vec<_> = (0..count)
        .map(|_| pair.node_b.register(vec![0u8; 4], Access::ReadWrite).expect("region"))
        .collect();
    for round in 1..3u8 {
        for region in &regions {
            pair.a.put(vec![round; 4], &region.key(), 0).await.expect("putting");
        }
        let granted = pair.b.stats().granted_keys;
        assert_eq!(granted, if way.is_direct() { LIMIT } else { 0 });
    }
    let direct = pair.a.stats().direct_puts;
    assert!(!way.is_direct() || direct >= LIMIT, "{direct}");
    for region in regions {
        assert_eq!(region.revoke().await.expect("revoked"), [2; 4]);
    }
    assert_eq!(pair.b.stats().granted_keys, 0);
    // There is room again.
    let region = pair.node_b.register(vec![0u8; 4], Access::ReadWrite).expect("region");
    use_until_direct(&pair.a, way, &region.key()).await;
    assert_eq!(pair.b.stats().granted_keys, u64::from(way.is_direct()));
}

/// An endpoint that ends takes its grants with it, whichever side ends it: memory is handed back,
/// and not written any more.
async fn direct_and_the_end(way: Way) {
    for round in 0..12 {
        let pair = pair(way).await;
        let len = 1 << 20;
        let region = pair.node_b.register(vec![0u8; len], Access::ReadWrite).expect("region");
        let key = region.key();
        use_until_direct(&pair.a, way, &key).await;
        let mut puts = Vec::new();
        for _ in 0..6 {
            let mut put = pair.a.put(vec![7u8; len], &key, 0);
            if poll_times(&mut put, 1).await.is_none() {
                puts.push(put);
            }
        }
        match round % 4 {
            0 => pair.a.abort(),
            1 => pair.b.abort(),
            2 => tokio::join!(async { pair.a.abort() }, async { pair.b.abort() }).0,
            _ => puts.truncate(2),
        }
        if round % 4 == 3 {
            pair.b.abort();
        }
        let revoked = async {
            let buffer = region.revoke().await.expect("revoked");
            let copy = buffer.clone();
            (buffer, copy)
        };
        let limit = Duration::from_secs(10);
        let (buffer, copy) = within(limit, "revoking after the end", revoked).await;
        for put in puts {
            let _ = within(limit, "a put after the end", put).await;
        }
        pair.a.closed().await;
        assert!(buffer == copy, "written after it was handed back");
        assert_eq!(pair.b.stats().granted_keys, 0);
    }
}

/// An orderly goodbye waits for what is under way, and gives everything back.
async fn direct_and_goodbye(way: Way) {
    for round in 0..8 {
        let pair = pair(way).await;
        let len = 1 << 20;
        let region = pair.node_b.register(vec![0u8; len], Access::ReadWrite).expect("region");
        let other = pair.node_a.register(vec![0u8; len], Access::ReadWrite).expect("region");
        let (key, other_key) = (region.key(), other.key());
        use_until_direct(&pair.a, way, &key).await;
        use_until_direct(&pair.b, way, &other_key).await;
        let mut puts: Vec<_> = (0..3).map(|_| pair.a.put(vec![7u8; len], &key, 0)).collect();
        let mut others: Vec<_> =
            (0..3).map(|_| pair.b.put(vec![8u8; len], &other_key, 0)).collect();
        for put in puts.iter_mut().chain(&mut others) {
            let _ = poll_times(put, 1).await;
        }
        drop(others);
        if round % 2 == 0 {
            drop(puts);
        }
        let reason = || CloseReason::new(1, "enough");
        let closing = async {
            match round % 3 {
                0 => pair.a.close(reason()).await.expect("closing"),
                1 => pair.b.close(reason()).await.expect("closing"),
                _ => {
                    let (a, b) = tokio::join!(pair.a.close(reason()), pair.b.close(reason()));
                    a.and(b).expect("closing");
                }
            }
            tokio::join!(pair.a.closed(), pair.b.closed());
        };
        within(Duration::from_secs(10), "closing", closing).await;
        let limit = Duration::from_secs(10);
        let both = async { tokio::join!(region.revoke(), other.revoke()) };
        let (buffer, other) = within(limit, "revoking after the end", both).await;
        let lens = (buffer.expect("revoked").len(), other.expect("revoked").len());
        assert_eq!(lens, (len, len));
        assert_eq!((pair.a.stats().granted_keys, pair.b.stats().granted_keys), (0, 0));
    }
}

async fn fence_orders_families(way: Way) {
    let pair = pair(way).await;
    let region = pair.node_b.register(vec![0u8; 500_000], Access::ReadWrite).expect("region");
    let key = region.key();
    for round in 1..6u64 {
        let mut put = pair.a.put(pattern(round, 500_000), &key, 0);
        let put_early = poll_times(&mut put, 1).await;
        let mut tag = pair.a.tag_send(round, pattern(round, 20_000));
        let tag_early = poll_times(&mut tag, 1).await;
        let mut send = pair.a.send(Message::copy_from_slice(&pattern(round, 150_000)));
        let send_early = poll_times(&mut send, 1).await;
        let before = pair.b.stats();
        pair.a.fence().await.expect("a fence");
        // All of it is there now.
        let mut here = vec![0; 500_000];
        region.read(0, &mut here).expect("within");
        check_pattern(round, &here);
        let after = pair.b.stats();
        assert_eq!(after.messages_received, round, "before: {before:?}");
        let message = within(Duration::from_secs(5), "a message that is there", pair.b.recv());
        check_pattern(round, &message.await.expect("receiving").to_vec().expect("bytes"));
        let got = pair.b.tag_recv(round, u64::MAX, vec![0; 20_000]).await.expect("receiving");
        check_pattern(round, &got.buffer);
        if put_early.is_none() {
            put.await.expect("putting");
        }
        if tag_early.is_none() {
            tag.await.expect("sending");
        }
        if send_early.is_none() {
            send.await.expect("sending");
        }
    }
    assert_eq!(pair.a.stats().direct_puts > 0, way.is_direct());
    // Several at once.
    let fences: Vec<_> = (0..5).map(|_| pair.a.fence()).collect();
    for fence in join_all(fences).await {
        fence.expect("a fence");
    }
}

async fn credit_is_respected(way: Way) {
    let window = 20_000;
    let pair = pair_with(way, |config| config.message_window_bytes(window)).await;
    let count = 300u64;
    let sending = async {
        for number in 0..count {
            pair.a.send(Message::copy_from_slice(&pattern(number, 1500))).await.expect("sending");
        }
    };
    let receiving = async {
        for number in 0..count {
            if number % 10 == 0 {
                // Let it fill up.
                for _ in 0..20 {
                    tokio::task::yield_now().await;
                }
                let stats = pair.b.stats();
                assert!(stats.inbox_bytes <= window, "{stats:?}");
            }
            let got = pair.b.recv().await.expect("receiving");
            check_pattern(number, &got.to_vec().expect("bytes"));
        }
    };
    tokio::join!(sending, receiving);
}

async fn credit_admits_the_oversized(way: Way) {
    let pair = pair_with(way, |config| config.message_window_bytes(8192)).await;
    let sending = async {
        for number in 0..12u64 {
            let len = if number % 3 == 0 { 1_500_000 } else { 500 };
            pair.a.send(pair.message(&pattern(number, len))).await.expect("sending");
        }
    };
    let receiving = async {
        for number in 0..12u64 {
            let got = pair.b.recv().await.expect("receiving");
            assert!(pair.b.stats().inbox_messages < 20);
            check_pattern(number, &got.to_vec().expect("bytes"));
        }
    };
    tokio::join!(sending, receiving);
}

async fn credit_blocks_and_resumes(way: Way) {
    let window = 16_384;
    let pair = pair_with(way, |config| config.message_window_bytes(window)).await;
    let sent = exhaust_credit(&pair).await;
    if way != Way::MockTiny {
        assert!((10..=16).contains(&sent), "{sent} of 1000 bytes in a window of {window}");
    }
    let mut blocked = pair.a.send(Message::copy_from_slice(&[2; 16_000]));
    assert!(poll_times(&mut blocked, 20).await.is_none(), "no credit");
    // With room for two parcels, it may be room that is waited for.
    if way != Way::MockTiny {
        until("the wait for credit to be counted", || pair.a.stats().credit_stalls > 0).await;
    }
    assert!(pair.b.stats().inbox_bytes <= window);
    let receiving = async {
        for _ in 0..sent {
            assert_eq!(pair.b.recv().await.expect("receiving").len_bytes(), 1000);
        }
        assert_eq!(pair.b.recv().await.expect("receiving").len_bytes(), 16_000);
    };
    let (done, ()) = tokio::join!(blocked, receiving);
    done.expect("sending");
}

async fn tag_credit_blocks_and_resumes(way: Way) {
    let pair = pair_with(way, |config| config.tag_window_bytes(8192).eager_max_bytes(4096)).await;
    let count = 400u64;
    let sends: Vec<_> =
        (0..count).map(|number| pair.a.tag_send(number, pattern(number, 1000))).collect();
    let sending = join_all(sends);
    let receiving = async {
        // The peer's memory for strays is bounded: most are still here.
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
        for number in 0..count {
            let got = pair.b.tag_recv(number, u64::MAX, vec![0; 1000]).await.expect("receiving");
            check_pattern(number, &got.buffer);
        }
    };
    let (sent, ()) = tokio::join!(sending, receiving);
    assert!(sent.into_iter().all(|sent| sent.is_ok()));
}

async fn try_send_until_full(way: Way) {
    let pair = pair_with(way, |config| config.message_window_bytes(8192)).await;
    for round in 0..5u64 {
        let mut sent = 0u64;
        let refused = loop {
            match pair.a.try_send(Message::copy_from_slice(&pattern(sent + round, 700))) {
                Ok(()) => sent += 1,
                Err(refused) => break refused,
            }
        };
        assert!(refused.error.is_none(), "{refused}");
        assert_eq!(refused.message.len_bytes(), 700);
        assert!(sent > 0, "round {round}");
        for number in 0..sent {
            let got = pair.b.recv().await.expect("receiving");
            check_pattern(number + round, &got.to_vec().expect("bytes"));
        }
        // The credit comes back by itself.
        until("credit", || {
            let credit = pair.a.stats().message_credit_bytes;
            credit >= 2_000 && pair.a.stats().operations == 0
        })
        .await;
    }
}

async fn recv_any_takes_turns(way: Way) {
    let pair = pair(way).await;
    let mut ends = vec![(pair.a.clone(), pair.b.clone())];
    for _ in 1..12 {
        ends.push(connect(&pair.node_a, &pair.listener).await);
    }
    let each = 30u64;
    for (index, (a, _)) in ends.iter().enumerate() {
        for number in 0..each {
            let bytes = [index as u64, number].map(u64::to_le_bytes).concat();
            a.send(Message::copy_from_slice(&bytes)).await.expect("sending");
        }
    }
    for (a, _) in &ends {
        a.fence().await.expect("a fence");
    }
    let mut next = vec![0u64; ends.len()];
    for turn in 0..each as usize * ends.len() {
        let (endpoint, message) = pair.node_b.recv_any().await.expect("receiving");
        let bytes = message.to_vec().expect("bytes");
        let index = u64::from_le_bytes(bytes[..8].try_into().expect("8")) as usize;
        let number = u64::from_le_bytes(bytes[8..].try_into().expect("8"));
        assert_eq!(number, next[index], "in order");
        assert_eq!(endpoint.peer().address, ends[index].1.peer().address);
        next[index] += 1;
        let (least, most) = (next.iter().min().expect("some"), next.iter().max().expect("some"));
        assert!(most - least <= 2, "turn {turn}: {next:?}");
    }
    // One that waits is woken; one that is dropped loses nothing.
    let mut any = pair.node_b.recv_any();
    assert!(poll_times(&mut any, 2).await.is_none());
    let (sent, got) = tokio::join!(ends[3].0.send(Message::copy_from_slice(b"x")), any);
    sent.expect("sending");
    got.expect("receiving");
    let mut any = pair.node_b.recv_any();
    assert!(poll_times(&mut any, 2).await.is_none());
    drop(any);
    ends[4].0.send(Message::copy_from_slice(b"y")).await.expect("sending");
    let (_, message) = pair.node_b.recv_any().await.expect("receiving");
    assert_eq!(message.to_vec().expect("bytes"), b"y");
}

async fn close_flushes_and_says_why(way: Way) {
    let pair = pair(way).await;
    let sends: Vec<_> =
        (0..20).map(|number| pair.a.send(numbered(way, &pair.node_a, number))).collect();
    let closing = async {
        for sent in join_all(sends).await {
            sent.expect("sending");
        }
        pair.a.close(CloseReason::new(7, "the shop is shut")).await.expect("closing");
    };
    let receiving = async {
        for number in 0..20 {
            assert_eq!(receive_number(&pair.b).await, number);
        }
        let error = pair.b.recv().await.expect_err("closed");
        assert_eq!(error.kind(), ErrorKind::Closed);
        let reason = error.close_reason().expect("a reason");
        assert_eq!((reason.code, reason.text.as_str()), (7, "the shop is shut"));
        assert!(reason.by_peer);
    };
    tokio::join!(closing, receiving);
    let failed = pair.a.send(Message::copy_from_slice(b"late")).await.expect_err("closed");
    assert_eq!(failed.kind(), ErrorKind::Closed);
    assert_eq!(failed.buffer.expect("back").to_vec().expect("bytes"), b"late");
    let failed = pair.b.tag_recv(1, 0, vec![0; 4]).await.expect_err("closed");
    assert_eq!((failed.kind(), failed.buffer.expect("back").len()), (ErrorKind::Closed, 4));
    assert_eq!(pair.b.closed().await.kind(), ErrorKind::Closed);
    assert_eq!(pair.a.closed().await.kind(), ErrorKind::Closed);
    until("both to be gone", || {
        pair.node_a.stats().endpoints == 0 && pair.node_b.stats().endpoints == 0
    })
    .await;
}

async fn close_both_at_once(way: Way) {
    for polls in 0..6 {
        let pair = pair(way).await;
        let one = async { pair.a.close(CloseReason::new(1, "a")).await };
        let two = async {
            for _ in 0..polls {
                tokio::task::yield_now().await;
            }
            pair.b.close(CloseReason::new(2, "b")).await
        };
        let (one, two) = tokio::join!(one, two);
        one.expect("closing");
        two.expect("closing");
    }
}

async fn close_while_receiving(way: Way) {
    let pair = pair(way).await;
    let region = pair.node_a.register(vec![0u8; 10], Access::Read).expect("region");
    let key = region.key();
    let waiting = async {
        let receive = pair.b.recv();
        let tagged = pair.b.tag_recv(1, u64::MAX, vec![0; 10]);
        let (receive, tagged) = tokio::join!(receive, tagged);
        assert_eq!(receive.expect_err("closed").kind(), ErrorKind::Closed);
        let tagged = tagged.expect_err("closed");
        assert_eq!(tagged.kind(), ErrorKind::Closed);
        assert_eq!(tagged.buffer.expect("back").len(), 10);
        let got = pair.b.get(vec![0; 10], &key, 0).await.expect_err("closed");
        assert_eq!(got.kind(), ErrorKind::Closed);
        assert_eq!(pair.b.fence().await.expect_err("closed").kind(), ErrorKind::Closed);
    };
    let own = async {
        let (receive, tagged) =
            tokio::join!(pair.a.recv(), pair.a.tag_recv(1, u64::MAX, vec![0; 10]));
        assert_eq!(receive.expect_err("closed").kind(), ErrorKind::Closed);
        assert_eq!(tagged.expect_err("closed").kind(), ErrorKind::Closed);
    };
    let closing = async {
        tokio::task::yield_now().await;
        pair.a.close(CloseReason::new(3, "")).await.expect("closing");
    };
    tokio::join!(waiting, own, closing);
}

/// Answers may still be on their way to a side that has heard the goodbye.
async fn close_while_the_peer_asks(way: Way) {
    for polls in 0..8 {
        let pair = pair(way).await;
        let region = pair.node_a.register(vec![0u8; 100], Access::ReadWrite).expect("region");
        let key = region.key();
        let asking = async {
            loop {
                let (fence, put, get) = tokio::join!(
                    pair.b.fence(),
                    pair.b.put(vec![1u8; 50], &key, 0),
                    pair.b.get(vec![1u8; 50], &key, 0)
                );
                if let Err(error) = fence {
                    return [Some(error), put.err().map(|f| f.error), get.err().map(|f| f.error)];
                }
            }
        };
        let closing = async {
            for _ in 0..polls {
                tokio::task::yield_now().await;
            }
            pair.a.close(CloseReason::new(4, "enough")).await
        };
        let (errors, closed) = tokio::join!(asking, closing);
        closed.expect("closing");
        for error in errors.into_iter().flatten() {
            assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
        }
        assert_eq!(pair.b.closed().await.kind(), ErrorKind::Closed);
    }
}

/// What was handed over before the close arrives, however large, and although nobody receives it
/// yet.
async fn close_with_much_in_flight(way: Way) {
    let pair = pair(way).await;
    let sizes = [10, 5_000, 3_000_000, 100, 9_000_000, 70_000];
    let mut sends = Vec::new();
    for (number, len) in sizes.into_iter().enumerate() {
        let mut send = pair.a.send(pair.message(&pattern(number as u64, len)));
        match poll_times(&mut send, 1).await {
            Some(sent) => drop(sent.expect("sending")),
            None => sends.push(send),
        }
    }
    let closing = async { pair.a.close(CloseReason::default()).await };
    let receiving = async {
        for (number, len) in sizes.into_iter().enumerate() {
            let got = pair.b.recv().await.unwrap_or_else(|error| panic!("{number}: {error}"));
            assert_eq!(got.len_bytes(), len);
            check_pattern(number as u64, &got.to_vec().expect("bytes"));
        }
        assert_eq!(pair.b.recv().await.expect_err("closed").kind(), ErrorKind::Closed);
    };
    let (closed, sent, ()) = tokio::join!(closing, join_all(sends), receiving);
    closed.expect("closing");
    for sent in sent {
        sent.expect("sending");
    }
}

async fn dropping_the_last_handle_flushes(way: Way) {
    let Pair { node_a, node_b, a, b, listener, .. } = pair(way).await;
    let other = a.clone();
    drop(a);
    for number in 0..30 {
        // Begun, or queued for good: not withdrawn when its future is dropped.
        until("room", || other.try_send(numbered(way, &node_a, number)).is_ok()).await;
    }
    drop((other, node_a, listener));
    for number in 0..30 {
        assert_eq!(receive_number(&b).await, number);
    }
    assert_eq!(b.recv().await.expect_err("closed").kind(), ErrorKind::Closed);
    until("the endpoint to be gone", || node_b.stats().endpoints == 0).await;
}

async fn abort_ends_at_once(way: Way) {
    let pair = pair(way).await;
    let mut send = pair.a.tag_send(1, pattern(1, 1 << 20));
    assert!(poll_times(&mut send, 3).await.is_none());
    let mut receive = pair.a.recv();
    assert!(poll_times(&mut receive, 3).await.is_none());
    pair.a.abort();
    let failed = send.await.expect_err("aborted");
    assert_eq!(failed.kind(), ErrorKind::Closed);
    check_pattern(1, &failed.buffer.expect("back"));
    assert_eq!(receive.await.expect_err("aborted").kind(), ErrorKind::Closed);
    let there = within(Duration::from_secs(5), "noticing an abort", pair.b.recv()).await;
    let kind = there.expect_err("gone").kind();
    assert!(
        matches!(kind, ErrorKind::PeerGone | ErrorKind::ConnectionLost | ErrorKind::Closed),
        "{kind:?}"
    );
    until("both to be gone", || {
        pair.node_a.stats().endpoints == 0 && pair.node_b.stats().endpoints == 0
    })
    .await;
}

/// Also where it is left to the bootstrap connection to tell, and nobody sleeps.
async fn abort_ends_what_spins(way: Way) {
    let pair = pair_with(way, |config| config.wake(Wake::Spin).spin_limit(PATIENCE)).await;
    let mut receive = pair.b.recv();
    assert!(poll_times(&mut receive, 3).await.is_none());
    pair.a.abort();
    let there = within(Duration::from_secs(5), "noticing an abort", receive).await;
    assert!(there.is_err());
}

async fn drain_waits_for_the_peer(way: Way) {
    let pair = pair(way).await;
    let mut sends = Vec::new();
    for number in 0..50 {
        let mut send = pair.a.send(numbered(way, &pair.node_a, number));
        if poll_times(&mut send, 1).await.is_none() {
            sends.push(send);
        }
    }
    pair.node_a.drain().await.expect("draining");
    let stats = pair.b.stats();
    assert_eq!((stats.messages_received, stats.inbox_messages), (50, 50));
    let receiving = async {
        for number in 0..50 {
            assert_eq!(receive_number(&pair.b).await, number);
        }
    };
    // Loans come back when they have been received and dropped.
    let (sent, ()) = tokio::join!(join_all(sends), receiving);
    assert!(sent.into_iter().all(|sent| sent.is_ok()));
}

async fn timeouts_give_back_what_is_free(way: Way) {
    let short = Duration::from_millis(30);
    let small = |config: thalweg::Config| {
        config.message_window_bytes(8192).tag_window_bytes(4096).eager_max_bytes(1024)
    };
    let pair = pair_with(way, small).await;
    let started = Instant::now();
    let error = pair.b.recv().timeout(short).await.expect_err("nothing comes");
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(started.elapsed() >= short);
    let failed =
        pair.b.tag_recv(1, u64::MAX, vec![0; 7]).timeout(short).await.expect_err("nothing");
    assert_eq!(failed.kind(), ErrorKind::TimedOut);
    assert_eq!(failed.buffer.expect("back").len(), 7);
    // Offered, and nobody takes it: the peer may read it at any time, so it stays.
    let large = pair.a.tag_send(1, pattern(1, 100_000)).timeout(short).await;
    let failed = large.expect_err("nobody receives");
    assert_eq!(failed.kind(), ErrorKind::TimedOut);
    // It is still sent.
    let got = pair.b.tag_recv(1, u64::MAX, vec![0; 100_000]).await.expect("receiving");
    check_pattern(1, &got.buffer);
    // No credit.
    let sent = exhaust_credit(&pair).await;
    let failed = pair
        .a
        .send(Message::copy_from_slice(&[2; 7000]))
        .timeout(short)
        .await
        .expect_err("no credit");
    assert_eq!(failed.kind(), ErrorKind::TimedOut);
    assert_eq!(failed.buffer.expect("back").len_bytes(), 7000);
    let mut waiting = pair.a.send(Message::copy_from_slice(&[3; 6000]));
    assert!(poll_times(&mut waiting, 3).await.is_none());
    let error = pair.a.fence().timeout(short).await.expect_err("a message waits");
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    for _ in 0..sent {
        assert_eq!(pair.b.recv().await.expect("receiving").len_bytes(), 1000);
    }
    let (done, got) = tokio::join!(waiting, pair.b.recv());
    done.expect("sending");
    assert_eq!(got.expect("receiving").len_bytes(), 6000);
    // One that is over in time.
    pair.a.fence().timeout(Duration::from_secs(10)).await.expect("a fence");
    until("everything to end", || pair.a.stats().operations == 0).await;
}

async fn many_threads_and_runtimes(way: Way) {
    let pair = pair(way).await;
    let rounds = 100u64;
    let finished = Arc::new(AtomicUsize::new(0));
    let threads: Vec<_> = (0..6u64)
        .map(|thread| {
            let (a, b) = (pair.a.clone(), pair.b.clone());
            let finished = finished.clone();
            std::thread::spawn(move || {
                let work = async {
                    for round in 0..rounds {
                        let len = [8, 300, 70_000][(round % 3) as usize];
                        let seed = thread * 1000 + round;
                        let (sent, got) = tokio::join!(
                            a.tag_send(thread, pattern(seed, len)),
                            b.tag_recv(thread, u64::MAX, vec![0; len]),
                        );
                        sent.expect("sending");
                        check_pattern(seed, &got.expect("receiving").buffer);
                    }
                };
                // Half of them on runtimes of their own, half on none.
                if thread % 2 == 0 {
                    runtime(1).block_on(work);
                } else {
                    block_on(work);
                }
                finished.fetch_add(1, Ordering::SeqCst);
            })
        })
        .collect();
    until("the threads to finish", || {
        finished.load(Ordering::SeqCst) == 6 || threads.iter().any(|thread| thread.is_finished())
    })
    .await;
    until("the threads to finish", || threads.iter().all(|thread| thread.is_finished())).await;
    for thread in threads {
        thread.join().expect("no panic");
    }
}

/// Runs a future on this thread, without any runtime.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = std::task::Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = std::pin::pin!(future);
    loop {
        let mut cx = std::task::Context::from_waker(&waker);
        if let std::task::Poll::Ready(output) = future.as_mut().poll(&mut cx) {
            return output;
        }
        std::thread::park();
    }
}

async fn hello_both_ways(way: Way) {
    let pair = pair_of(
        way,
        way.config().hello("scheduler 3"),
        way.config().hello(Bytes::from(vec![7; 16 * 1024])),
    )
    .await;
    assert_eq!(pair.b.peer().hello, "scheduler 3");
    assert_eq!(pair.a.peer().hello, vec![7; 16 * 1024]);
    assert_eq!(pair.a.peer().version.0, 1);
    assert_eq!(pair.a.peer().address, pair.listener.address().to_string());
    assert_eq!(pair.b.peer().local_address, pair.a.peer().address);
    assert_eq!(pair.a.peer().local_address, pair.b.peer().address);
    assert_ne!(pair.a.peer().node_id, pair.b.peer().node_id);
    let long = way.config().hello(vec![0; 16 * 1024 + 1]);
    assert_eq!(Node::new(long).expect_err("too long").kind(), ErrorKind::InvalidInput);
}

async fn route_says_why(way: Way) {
    let pair = pair(way).await;
    for endpoint in [&pair.a, &pair.b] {
        let route = endpoint.route();
        assert_eq!(route.link(), way.link());
        for family in [Family::Messages, Family::Tags, Family::OneSided] {
            assert!(route.lanes.iter().any(|lane| lane.family == family && !lane.how.is_empty()));
        }
        let chosen: Vec<_> =
            route.candidates.iter().filter(|c| c.verdict == Verdict::Chosen).collect();
        assert_eq!(chosen.len(), 1);
        assert_eq!(chosen[0].link, way.link());
        for candidate in &route.candidates {
            assert!(!candidate.reason.is_empty());
            assert!(candidate.verdict != Verdict::Rejected || candidate.link != way.link());
        }
        assert!(route.to_string().contains(way.link().name()), "{route}");
    }
}

async fn stats_count(way: Way) {
    let pair = pair(way).await;
    let region = pair.node_b.register(vec![0u8; 1000], Access::ReadWrite).expect("region");
    for len in [10, 5_000, 200_000] {
        let (sent, got) =
            tokio::join!(pair.a.send(Message::copy_from_slice(&pattern(1, len))), pair.b.recv());
        sent.expect("sending");
        got.expect("receiving");
    }
    for len in [20, 100_000] {
        let (sent, got) = tokio::join!(
            pair.a.tag_send(1, pattern(1, len)),
            pair.b.tag_recv(1, u64::MAX, vec![0; len])
        );
        sent.expect("sending");
        got.expect("receiving");
    }
    pair.a.put(vec![0u8; 300], &region.key(), 0).await.expect("putting");
    pair.a.get(vec![0u8; 400], &region.key(), 0).await.expect("getting");
    // The answer to the get is let go of a moment after it has arrived.
    until("everything to end", || pair.b.stats().operations == 0).await;
    let (a, b) = (pair.a.stats(), pair.b.stats());
    assert_eq!((a.messages_sent, a.message_bytes_sent), (3, 205_010));
    assert_eq!((b.messages_received, b.message_bytes_received), (3, 205_010));
    assert_eq!((a.tags_sent, a.tag_bytes_sent), (2, 100_020));
    assert_eq!((b.tags_received, b.tag_bytes_received), (2, 100_020));
    assert_eq!((a.puts, a.put_bytes, a.gets, a.get_bytes), (1, 300, 1, 400));
    assert_eq!(a.link, Some(way.link()));
    assert_eq!((b.inbox_messages, b.inbox_bytes, b.operations), (0, 0, 0));
    assert!(a.link_counters.parcels_sent >= 7, "{a:?}");
    assert_eq!(pair.node_a.stats().messages_sent, 3);
    assert_eq!(pair.node_b.stats().message_bytes_received, 205_010);
    assert_eq!(pair.node_a.stats().endpoints_by_link, [(way.link(), 1)]);
    let moved = b.link_counters;
    match way {
        Way::ShmSingleCopy => assert!(moved.single_copy_bytes_received > 0, "{moved:?}"),
        Way::ShmInlineArena => {
            assert!(moved.arena_bytes_received > 0, "{moved:?}");
            assert_eq!(moved.single_copy_bytes_received, 0);
        }
        Way::ShmLoans => {
            let bytes = pattern(1, 100_000);
            let (sent, got) = tokio::join!(pair.a.send(pair.message(&bytes)), async {
                let got = pair.b.recv().await.expect("receiving");
                assert!(got.frames()[0].is_view());
            });
            sent.expect("sending");
            let () = got;
            assert!(pair.b.stats().link_counters.loaned_bytes_received >= 100_000);
        }
        _ => {}
    }
    // What an endpoint counted stays in the node's sum.
    pair.a.close(CloseReason::default()).await.expect("closing");
    until("the end", || pair.node_a.stats().endpoints == 0).await;
    assert!(pair.node_a.stats().messages_sent >= 3);
}

async fn runtime_gone(way: Way) {
    let node_b = Node::new(way.config()).expect("a node");
    let listener = node_b.listen("thalweg://127.0.0.1:0").await.expect("listening");
    let (give, take) = tokio::sync::oneshot::channel();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let address = listener.address().clone();
    // A node on a runtime of its own, which ends.
    let other = std::thread::spawn(move || {
        let runtime = runtime(2);
        let made = runtime.block_on(async {
            let node = Node::new(way.config()).expect("a node");
            let own = node.listen("thalweg://127.0.0.1:0").await.expect("listening");
            let endpoint = node.connect(address).await.expect("connecting");
            (node, own, endpoint)
        });
        assert!(give.send(made).is_ok(), "somebody waits");
        stopped.recv().expect("a word");
        drop(runtime);
    });
    let (made, b) = tokio::join!(take, listener.accept());
    let ((node_a, own, a), b) = (made.expect("made"), b.expect("accepting"));
    let mut receive = a.recv();
    assert!(poll_times(&mut receive, 2).await.is_none());
    stop.send(()).expect("somebody waits");
    let error = within(Duration::from_secs(5), "noticing", receive).await.expect_err("gone");
    assert_eq!(error.kind(), ErrorKind::RuntimeGone);
    other.join().expect("no panic");
    let failed = a.send(Message::copy_from_slice(b"x")).await.expect_err("gone");
    assert_eq!(failed.kind(), ErrorKind::RuntimeGone);
    let failed = a.tag_recv(0, 0, vec![0; 3]).await.expect_err("gone");
    assert_eq!((failed.kind(), failed.buffer.expect("back").len()), (ErrorKind::RuntimeGone, 3));
    let connect = node_a.connect(listener.address()).await.expect_err("gone");
    assert_eq!(connect.kind(), ErrorKind::RuntimeGone);
    assert_eq!(own.accept().await.expect_err("gone").kind(), ErrorKind::RuntimeGone);
    assert_eq!(node_a.recv_any().await.expect_err("gone").kind(), ErrorKind::RuntimeGone);
    // The other side sees that the peer has gone.
    let there = within(Duration::from_secs(5), "noticing", b.recv()).await.expect_err("gone");
    assert!(tells_of_death(there.kind()), "{there}");
}

async fn limits_are_refused(way: Way) {
    let pair = pair_with(way, |config| config.max_message_bytes(100_000).max_frames(10)).await;
    let failed = pair.a.send(vec![0u8; 100_001]).await.expect_err("too long");
    assert_eq!(failed.kind(), ErrorKind::LimitExceeded);
    assert_eq!(failed.buffer.expect("back").len_bytes(), 100_001);
    let many: Vec<Frame> = (0..11).map(|_| Frame::copy_from_slice(b"x")).collect();
    let failed = pair.a.send(many).await.expect_err("too many");
    assert_eq!(failed.kind(), ErrorKind::LimitExceeded);
    let failed = pair.a.tag_send(1, vec![0u8; 100_001]).await.expect_err("too long");
    assert_eq!(failed.kind(), ErrorKind::LimitExceeded);
    let (sent, got) = tokio::join!(pair.a.send(vec![1u8; 100_000]), pair.b.recv());
    sent.expect("at the limit");
    assert_eq!(got.expect("at the limit").len_bytes(), 100_000);
}

async fn families_do_not_wait_for_bulk(way: Way) {
    // Messages that wait for credit hold up neither tags nor one-sided operations.
    let pair = pair_with(way, |config| config.message_window_bytes(8192)).await;
    let region = pair.node_b.register(vec![0u8; 100], Access::ReadWrite).expect("region");
    let sent = exhaust_credit(&pair).await;
    let mut blocked = pair.a.send(Message::copy_from_slice(&[2; 8000]));
    assert!(poll_times(&mut blocked, 3).await.is_none());
    let others = async {
        for round in 0..20u64 {
            pair.a.put(vec![1u8; 100], &region.key(), 0).await.expect("putting");
            pair.a.get(vec![1u8; 100], &region.key(), 0).await.expect("getting");
            let (sent, got) = tokio::join!(
                pair.a.tag_send(round, vec![1; 200]),
                pair.b.tag_recv(round, u64::MAX, vec![0; 200])
            );
            sent.expect("sending");
            got.expect("receiving");
        }
    };
    within(Duration::from_secs(10), "tags and puts beside stopped messages", others).await;
    let receiving = async {
        for _ in 0..=sent {
            pair.b.recv().await.expect("receiving");
        }
    };
    let (done, ()) = tokio::join!(blocked, receiving);
    done.expect("sending");
}
