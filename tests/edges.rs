//! Rare interleavings that once went wrong: withdrawn sends, fences behind them, endpoints that end
//! with messages unread.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Waker};
use std::time::Duration;

use bytes::Bytes;
use thalweg::{
    Access, Cancel, CloseReason, Config, Endpoint, ErrorKind, LinkKind, Message, MockPlan, Node,
};
use thalweg_tests::{Way, connect, pair_of, pair_with, poll_times, run, until, within};

const SOON: Duration = Duration::from_secs(10);

fn frames(count: usize, fill: u8) -> Message {
    (0..count).map(|index| vec![fill; index % 3].into()).collect()
}

/// A mock link with room for one message.
fn narrow() -> Config {
    Config::new().transports([LinkKind::Mock]).mock(MockPlan::new().capacity(1))
}

#[test]
fn a_withdrawn_send_of_many_frames_leaves_no_frame_table_behind() {
    run("withdrawn table", || async {
        let pair = pair_of(Way::Mock, narrow(), narrow()).await;
        let mut really_withdrawn = 0;
        for round in 0..100u8 {
            // Fills the link, so that the table of the next message leaves and the message not.
            pair.a.send(Message::copy_from_slice(b"full")).await.expect("sent");
            let mut withdrawn = pair.a.send(frames(300, round));
            let mut cx = Context::from_waker(Waker::noop());
            if Pin::new(&mut withdrawn).poll(&mut cx).is_ready() {
                // The other node's thread was faster.
                pair.b.recv().await.expect("the message that filled the link");
                pair.b.recv().await.expect("the message that was not withdrawn");
                continue;
            }
            match withdrawn.cancel().await {
                Cancel::Cancelled(_) => {}
                Cancel::Completed(outcome) => {
                    outcome.expect("sent");
                    pair.b.recv().await.expect("the message that filled the link");
                    pair.b.recv().await.expect("the message that was not withdrawn");
                    continue;
                }
            }
            really_withdrawn += 1;
            let next = if round % 2 == 0 { frames(200, 77) } else { frames(2, 77) };
            let shape: Vec<usize> = next.frames().iter().map(|frame| frame.len()).collect();
            let sending = async { pair.a.send(next).await.expect("sent") };
            let receiving = async {
                loop {
                    let message = pair.b.recv().await.expect("received");
                    if message.to_vec().expect("bytes") != b"full" {
                        return message;
                    }
                }
            };
            let (_, got) =
                within(SOON, "the next message", async { tokio::join!(sending, receiving) }).await;
            let got: Vec<usize> = got.frames().iter().map(|frame| frame.len()).collect();
            assert_eq!(got, shape, "frames fall as they were sent");
        }
        assert!(really_withdrawn > 0, "the case came up");
    });
}

#[test]
fn a_fence_does_not_wait_for_a_send_that_was_withdrawn() {
    run("fence behind withdrawn send", || async {
        let tiny = |config: Config| config.message_window_bytes(4096);
        let pair = pair_with(Way::Tcp, tiny).await;
        pair.a.send(vec![1u8; 3000]).await.expect("within the window");
        let mut queued = pair.a.send(vec![2u8; 3000]);
        assert!(poll_times(&mut queued, 2).await.is_none(), "no credit");
        let mut fence = pair.a.fence();
        assert!(poll_times(&mut fence, 2).await.is_none());
        drop(queued);
        within(SOON, "the fence", fence).await.expect("reached");
        within(SOON, "the drain", pair.node_a.drain()).await.expect("drained");
    });
}

#[test]
fn a_fence_waits_for_what_was_queued_before_it() {
    run("fence behind queued send", || async {
        let tiny = |config: Config| config.message_window_bytes(4096);
        let pair = pair_with(Way::ShmAll, tiny).await;
        pair.a.send(vec![1u8; 3000]).await.expect("within the window");
        let mut queued = pair.a.send(vec![2u8; 3000]);
        assert!(poll_times(&mut queued, 2).await.is_none(), "no credit");
        let mut fence = pair.a.fence();
        assert!(poll_times(&mut fence, 50).await.is_none(), "the second message has not arrived");
        pair.b.recv().await.expect("the first");
        within(SOON, "fence and send", async {
            let (sent, fence) = tokio::join!(queued, fence);
            sent.expect("sent");
            fence.expect("reached");
        })
        .await;
    });
}

#[test]
fn recv_any_yields_what_an_ended_endpoint_left() {
    run("recv_any after the end", || async {
        for way in [Way::Tcp, Way::ShmAll] {
            let pair = pair_with(way, |config| config).await;
            for index in 0..20u8 {
                pair.a.send(vec![index; 100]).await.expect("sent");
            }
            pair.a.close(CloseReason::new(1, "done")).await.expect("closed");
            within(SOON, "the end", pair.b.closed()).await;
            for index in 0..20u8 {
                let (from, message) =
                    within(SOON, "recv_any", pair.node_b.recv_any()).await.expect("a message");
                assert_eq!(from.peer().node_id, pair.b.peer().node_id);
                assert_eq!(message.to_vec().expect("bytes"), [index; 100]);
            }
        }
    });
}

#[test]
fn recv_any_is_told_when_a_waiting_receive_is_dropped() {
    run("recv_any after a dropped recv", || async {
        let pair = pair_with(Way::Tcp, |config| config).await;
        let mut any = pair.node_b.recv_any();
        assert!(poll_times(&mut any, 1).await.is_none());
        let mut waiting = pair.b.recv();
        assert!(poll_times(&mut waiting, 2).await.is_none());
        pair.a.send(Bytes::from_static(b"for whom")).await.expect("sent");
        until("the message is here", || pair.b.stats().inbox_messages == 1).await;
        drop(waiting);
        let (_, message) = within(SOON, "recv_any", any).await.expect("a message");
        assert_eq!(message.to_vec().expect("bytes"), b"for whom");
    });
}

#[test]
fn an_endpoint_that_waits_to_be_accepted_survives_others_looking_at_it() {
    run("unaccepted endpoint", || async {
        let node = Node::new(Config::new().transports([LinkKind::Tcp])).expect("node");
        let listener = node.listen("thalweg://127.0.0.1:0").await.expect("listening");
        let client = Node::new(Config::new().transports([LinkKind::Tcp])).expect("node");
        let there = client.connect(listener.address()).await.expect("connected");
        there.send(Bytes::from_static(b"early")).await.expect("sent");
        let (handle, message) = within(SOON, "recv_any", node.recv_any()).await.expect("a message");
        assert_eq!(message.to_vec().expect("bytes"), b"early");
        drop(handle);
        within(SOON, "draining", node.drain()).await.expect("drained");
        let here = listener.accept().await.expect("accepted");
        there.send(Bytes::from_static(b"late")).await.expect("still open");
        let message = within(SOON, "the message", here.recv()).await.expect("still open");
        assert_eq!(message.to_vec().expect("bytes"), b"late");
    });
}

#[test]
fn receives_in_line_all_learn_of_the_end() {
    run("receives in line", || async {
        let pair = pair_with(Way::ShmAll, |config| config).await;
        let (mut first, mut second) = (pair.b.recv(), pair.b.recv());
        assert!(poll_times(&mut first, 2).await.is_none());
        assert!(poll_times(&mut second, 2).await.is_none());
        pair.a.send(Bytes::from_static(b"last")).await.expect("sent");
        pair.a.close(CloseReason::default()).await.expect("closed");
        within(SOON, "the end", pair.b.closed()).await;
        // The second waits for the first, and must not spin meanwhile.
        assert!(poll_times(&mut second, 2).await.is_none());
        assert_eq!(first.await.expect("the last").to_vec().expect("bytes"), b"last");
        let error = within(SOON, "the second", second).await.expect_err("nothing left");
        assert_eq!(error.kind(), ErrorKind::Closed);
    });
}

#[test]
fn a_timeout_beyond_the_clock_is_none() {
    run("endless timeout", || async {
        let pair = pair_with(Way::Tcp, |config| config).await;
        pair.a.send(Bytes::from_static(b"x")).timeout(Duration::MAX).await.expect("sent");
        pair.b.recv().timeout(Duration::MAX).await.expect("received");
    });
}

#[test]
fn a_listener_dropped_in_the_middle_of_handshakes_leaves_no_endpoint_behind() {
    run("listener dropped", || async {
        let node = Node::new(Config::new()).expect("node");
        let client = Node::new(Config::new()).expect("node");
        for _ in 0..20 {
            let listener = node.listen("thalweg://127.0.0.1:0").await.expect("listening");
            let address = listener.address().clone();
            let mut connecting = Box::pin(client.connect(&address));
            let early = poll_times(&mut connecting, 3).await;
            drop(listener);
            let outcome: Option<Endpoint> = match early {
                Some(outcome) => outcome.ok(),
                None => within(SOON, "connecting", connecting).await.ok(),
            };
            drop(outcome);
        }
        until("no endpoint is left", || {
            node.stats().endpoints == 0 && client.stats().endpoints == 0
        })
        .await;
        let listener = node.listen("thalweg://127.0.0.1:0").await.expect("listening");
        drop(connect(&client, &listener).await);
    });
}

/// The peer gets without pause; neither that nor gets of its own keep a side from closing.
#[test]
fn a_peer_that_keeps_getting_does_not_hold_up_a_close() {
    run("close under gets", || async {
        for way in [Way::Tcp, Way::ShmAll, Way::ShmInlineArena, Way::Mock] {
            let pair = pair_with(way, |config| config).await;
            let region = |node: &Node| node.register(vec![7u8; 1 << 20], Access::Read);
            let regions = [region(&pair.node_a), region(&pair.node_b)].map(|r| r.expect("one"));
            let getting: Vec<_> = (0..32)
                .map(|_| {
                    let (endpoint, key) = (pair.b.clone(), regions[0].key());
                    tokio::spawn(async move {
                        let mut buffer = vec![0u8; 1 << 20];
                        for round in 0.. {
                            match endpoint.get(buffer, &key, 0).await {
                                Ok(back) => buffer = back,
                                Err(failed) => return (round, failed.error.kind()),
                            }
                        }
                        unreachable!("it goes on until it fails")
                    })
                })
                .collect();
            until("gets to be under way", || pair.b.stats().gets > 64).await;
            // One of its own is answered before it closes.
            let mut own = pair.a.get(vec![0u8; 1 << 20], &regions[1].key(), 0);
            let early = poll_times(&mut own, 1).await;
            let closing = pair.a.close(CloseReason::new(4, "enough"));
            within(SOON, "closing", closing).await.expect("closed");
            let own = match early {
                Some(own) => own,
                None => own.await,
            };
            assert!(own.expect("answered before the goodbye").iter().all(|byte| *byte == 7));
            for get in getting {
                let (_, kind) = within(SOON, "a get", get).await.expect("no panic");
                assert_eq!(kind, ErrorKind::Closed, "over {way:?}");
            }
            let [region, _] = regions;
            assert_eq!(
                within(SOON, "revoking", region.revoke()).await.expect("revoked").len(),
                1 << 20
            );
        }
    });
}

#[test]
fn both_close_while_both_get() {
    run("both close under gets", || async {
        for way in [Way::Tcp, Way::ShmAll, Way::MockDelaying] {
            let pair = pair_with(way, |config| config).await;
            let region = |node: &Node| node.register(vec![7u8; 1 << 20], Access::Read);
            let [of_a, of_b] =
                [region(&pair.node_a), region(&pair.node_b)].map(|r| r.expect("one"));
            let (key_a, key_b) = (of_a.key(), of_b.key());
            let gets = |endpoint: &Endpoint, key: &thalweg::RemoteKey| {
                let (endpoint, key) = (endpoint.clone(), *key);
                tokio::spawn(async move {
                    let many = (0..40).map(|_| endpoint.get(vec![0u8; 1 << 18], &key, 0));
                    futures_util::future::join_all(many).await
                })
            };
            let getting = [gets(&pair.a, &key_b), gets(&pair.b, &key_a)];
            until("gets to be under way", || pair.a.stats().gets > 8 && pair.b.stats().gets > 8)
                .await;
            within(SOON, "closing", async {
                let (a, b) = tokio::join!(
                    pair.a.close(CloseReason::default()),
                    pair.b.close(CloseReason::default())
                );
                a.expect("closed");
                b.expect("closed");
            })
            .await;
            for gets in getting {
                for got in within(SOON, "the gets", gets).await.expect("no panic") {
                    match got {
                        Ok(bytes) => assert!(bytes.iter().all(|byte| *byte == 7)),
                        Err(failed) => assert_eq!(failed.error.kind(), ErrorKind::Closed),
                    }
                }
            }
        }
    });
}

/// The sender of a view may take its memory back while what was made of the view waits elsewhere.
#[test]
fn a_view_that_is_sent_on_keeps_its_bytes() {
    for onward in [LinkKind::Shm, LinkKind::Tcp] {
        run("view sent on", || async move {
            let first = Node::new(Config::new().transports([LinkKind::Shm])).expect("a node");
            let both = Config::new().transports([LinkKind::Shm, LinkKind::Tcp]);
            let second = Node::new(both).expect("a node");
            let narrow = Config::new().transports([onward]).message_window_bytes(4096);
            let third = Node::new(narrow).expect("a node");
            let at_second = second.listen("thalweg://127.0.0.1:0").await.expect("listening");
            let at_third = third.listen("thalweg://127.0.0.1:0").await.expect("listening");
            let (from_first, source) = connect(&first, &at_second).await;
            let (onwards, target) = connect(&second, &at_third).await;
            assert_eq!(onwards.route().link(), onward);

            let mut loan = first.loan(1 << 20).expect("a loan");
            loan.fill(1);
            let mut lending = from_first.send(loan);
            assert!(poll_times(&mut lending, 1).await.is_none(), "it ends with the view");
            let view = source.recv().await.expect("received");
            assert!(view.frames()[0].is_view());
            // Uses up the credit, so that the view's bytes have to wait.
            onwards.send(vec![0; 8192]).await.expect("sent");
            let mut sending = onwards.send(view);
            assert!(poll_times(&mut sending, 2).await.is_none(), "no credit");

            from_first.abort();
            // Given back by the end, or by the view's end before that.
            let lent = match within(SOON, "the end of the loan", lending).await {
                Ok(message) => Some(message),
                Err(failed) => failed.buffer,
            };
            let frame = lent.and_then(|message| message.into_frames().next());
            let mut loan = frame.and_then(|frame| frame.into_loan().ok()).expect("the loan");
            loan.fill(2);

            assert_eq!(target.recv().await.expect("received").len_bytes(), 8192);
            let both = async { tokio::join!(sending, target.recv()) };
            let (sent, got) = within(SOON, "what was sent on", both).await;
            sent.expect("sent");
            let got = got.expect("received").to_vec().expect("bytes");
            assert!(got.iter().all(|byte| *byte == 1), "bytes of another time");
        });
    }
}

/// Nothing of a view whose memory has been taken back is sent.
#[test]
fn a_view_whose_sender_has_gone_is_not_sent_on() {
    run("lost view sent on", || async {
        let pair = pair_of(Way::ShmLoans, Way::ShmLoans.config(), Way::ShmLoans.config()).await;
        let onwards = pair_of(Way::Tcp, Way::Tcp.config(), Way::Tcp.config()).await;
        let mut lending = pair.a.send(pair.node_a.loan(100_000).expect("a loan"));
        assert!(poll_times(&mut lending, 1).await.is_none(), "it ends with the view");
        let view = pair.b.recv().await.expect("received");
        assert!(view.frames()[0].is_view());
        pair.a.abort();
        within(SOON, "the end of the loan", lending).await.expect_err("aborted");
        let failed = onwards.a.send(view).await.expect_err("its bytes cannot be trusted");
        assert_eq!(failed.error.kind(), ErrorKind::ConnectionLost);
        onwards.a.send(Message::copy_from_slice(b"next")).await.expect("the endpoint lives");
        assert_eq!(onwards.b.recv().await.expect("received").len_bytes(), 4);
    });
}
