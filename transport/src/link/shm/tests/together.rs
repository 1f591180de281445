//! Payloads that both sides copy.

use super::super::link::TOGETHER_MIN_BYTES;
use super::super::ring::Page;
use super::super::wire::{Kind, PULLS_MAX, flags};
use super::*;
use crate::link::Killed;

const LONG: usize = 8 << 20;

fn op(index: u32) -> OpId {
    OpId { index, generation: 0 }
}

fn numbers(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

fn error() -> LinkError {
    LinkError::new(ErrorKind::Closed, LinkKind::Shm, "the test ends it")
}

impl Pair {
    fn copied_by_sender(&self) -> u64 {
        self.left.counters().single_copy_bytes_sent
    }

    fn received(&self) -> u64 {
        self.right.counters().single_copy_bytes_received
    }

    /// Lets the receiver ask for help and copy a little, and the sender not begin.
    fn ask(&mut self, bytes: &[u8]) -> u32 {
        let index = self.at_right.next;
        assert_eq!(self.post(999, &[segment(bytes)]), Post::Pending);
        turn(&mut self.right, &mut self.at_right).expect("right");
        assert!(!self.at_right.done.contains_key(&index), "a turn is not enough");
        index
    }

    /// As if the sender were in the middle of a piece that starts at `from`.
    fn be_busy(&self, from: u64) {
        self.left.page().marks.begin(1, from);
    }
}

#[tokio::test]
async fn both_sides_copy() {
    let mut pair = pair().await;
    let bytes = pattern(LONG + 12_345);
    for _ in 0..3 {
        let before = (pair.copied_by_sender(), pair.received());
        pair.transfer(&bytes, &[segment(&bytes)]);
        let sent = pair.copied_by_sender() - before.0;
        assert!(sent > 1 << 20 && sent < bytes.len() as u64, "{sent}");
        assert_eq!(pair.received() - before.1, bytes.len() as u64);
    }
}

#[tokio::test]
async fn a_payload_in_pieces_is_copied_by_both() {
    let mut pair = pair().await;
    let bytes = pattern(LONG + 77);
    for count in [2, 3, 50, PULLS_MAX] {
        let before = pair.copied_by_sender();
        let segments: Vec<_> = bytes.chunks(bytes.len().div_ceil(count)).map(segment).collect();
        pair.transfer(&bytes, &segments);
        assert!(pair.copied_by_sender() > before, "{count} pieces");
    }
    // So many that looking for the place would take long.
    let before = pair.copied_by_sender();
    let segments: Vec<_> = bytes.chunks(bytes.len() / PULLS_MAX - 1).map(segment).collect();
    assert!(segments.len() > PULLS_MAX);
    pair.transfer(&bytes, &segments);
    assert_eq!(pair.copied_by_sender(), before);
}

#[tokio::test]
async fn a_short_payload_is_copied_by_the_receiver() {
    let mut pair = pair().await;
    for (len, by_both) in [(TOGETHER_MIN_BYTES as usize - 1, false), (LONG, true)] {
        let bytes = pattern(len);
        pair.transfer(&bytes, &[segment(&bytes)]);
        assert_eq!(pair.copied_by_sender() > 0, by_both, "{len} bytes");
    }
}

#[tokio::test]
async fn either_side_may_refuse() {
    let refuses = || ShmOptions { together: false, ..ShmOptions::default() };
    let bytes = pattern(LONG);
    for (left, right) in [(refuses(), ShmOptions::default()), (ShmOptions::default(), refuses())] {
        let mut pair = pair_with(left, right).await;
        for link in [&pair.left, &pair.right] {
            assert!(link.caps().ways.contains("single copy (process_vm_readv)"));
            assert!(!link.caps().ways.contains("writev"), "{}", link.caps().ways);
        }
        assert_eq!(pair.post(999, &[segment(&bytes)]), Post::Pending);
        turn(&mut pair.right, &mut pair.at_right).expect("right");
        assert_eq!(pair.right.asked_key(), None, "nobody is asked");
        pair.pump(|pair| pair.at_left.done.contains_key(&999));
        assert_eq!(pair.copied_by_sender(), 0);
        assert_eq!(pair.received(), LONG as u64);
    }
    // Nor does one help that is asked all the same.
    let mut pair = pair_with(refuses(), ShmOptions::default()).await;
    pair.right.together_min = TOGETHER_MIN_BYTES;
    let index = pair.ask(&bytes);
    assert!(pair.right.asked_key().is_some());
    pair.pump(|pair| pair.at_right.done.contains_key(&index));
    assert_eq!(pair.copied_by_sender(), 0);
    assert!(pair.at_right.landed[&index] == bytes);
}

#[tokio::test]
async fn a_sender_that_does_not_come_is_not_waited_for() {
    let mut pair = pair().await;
    let bytes = pattern(LONG);
    let index = pair.ask(&bytes);
    let deadline = Instant::now() + PATIENCE;
    while !pair.at_right.done.contains_key(&index) {
        turn(&mut pair.right, &mut pair.at_right).expect("right");
        assert!(Instant::now() < deadline, "the receiver waits");
    }
    assert!(pair.at_right.landed[&index] == bytes);
    // It comes too late, and finds the copy closed.
    pair.pump(|pair| pair.at_left.done.contains_key(&999));
    assert_eq!(pair.copied_by_sender(), 0);
    pair.transfer(&bytes, &[segment(&bytes)]);
    assert!(pair.copied_by_sender() > 0, "the next one is copied by both");
}

#[tokio::test]
async fn a_sender_in_the_middle_of_a_piece_is_waited_for() {
    let mut pair = pair().await;
    let bytes = pattern(LONG);
    let from = LONG as u64 - 4096;
    let index = pair.ask(&bytes);
    pair.be_busy(from);
    for _ in 0..100 {
        turn(&mut pair.right, &mut pair.at_right).expect("right");
    }
    assert!(!pair.at_right.done.contains_key(&index), "the sender is still writing");
    let landed = &mut pair.at_right.landed.get_mut(&index).expect("landing");
    assert!(landed[..from as usize] == bytes[..from as usize], "the rest is there");
    landed[from as usize..].copy_from_slice(&bytes[from as usize..]);
    pair.left.page().marks.end(1, from);
    let key = pair.right.asked_key().expect("asked");
    pair.left.forge(flags(Kind::Helped, How::Eager, 0), &numbers(&[key, from, 1]));
    turn(&mut pair.right, &mut pair.at_right).expect("right");
    assert!(pair.at_right.done[&index].is_ok());
    assert_eq!(pair.received(), LONG as u64);
}

#[tokio::test]
async fn a_sender_that_may_not_write_lets_the_receiver_copy() {
    let mut pair = pair().await;
    pair.left.may_help = false;
    let bytes = pattern(LONG);
    pair.transfer(&bytes, &[segment(&bytes)]);
    assert_eq!((pair.copied_by_sender(), pair.received()), (0, LONG as u64));
}

#[tokio::test]
async fn permission_to_read_may_vanish_while_both_copy() {
    for deny_after in [0, 1, 1 << 20, 5 << 20] {
        let mut pair = pair().await;
        pair.right.deny_pull_after = Some(deny_after);
        let bytes = pattern(LONG);
        pair.transfer(&bytes, &[segment(&bytes)]);
    }
}

/// A sender in the middle of a piece when the permission to read vanishes: the rest is asked for
/// when it has stopped.
#[tokio::test]
async fn the_arena_takes_over_only_when_the_sender_has_stopped() {
    let mut pair = pair().await;
    let bytes = pattern(LONG);
    let index = pair.ask(&bytes);
    pair.be_busy(LONG as u64 - 4096);
    pair.right.deny_pull_after = Some(0);
    for _ in 0..10 {
        turn(&mut pair.right, &mut pair.at_right).expect("right");
    }
    assert!(!pair.right.asks_for_chunks(), "the sender is still writing");
    // It stops, having written nothing.
    pair.left.page().marks.end(1, LONG as u64);
    pair.pump(|pair| pair.at_right.done.contains_key(&index));
    assert!(pair.at_right.landed[&index] == bytes);
    assert!(pair.right.counters().arena_bytes_received > 0);
}

#[tokio::test]
async fn both_directions_at_once() {
    let mut pair = pair().await;
    pair.at_left = Recorder::with(Policy::Land);
    let bytes = pattern(LONG);
    let mut posted = 0;
    let deadline = Instant::now() + PATIENCE;
    while pair.at_left.landed_done() < 6 || pair.at_right.landed_done() < 6 {
        if posted < 6 {
            let there = pair.post(posted, &[segment(&bytes)]);
            if there == Post::Pending {
                let payload = [segment(&bytes)];
                let back =
                    pair.right.post(op(posted), Class::Message, How::Eager, b"back", &payload);
                assert_eq!(back.expect("posted"), Post::Pending);
                posted += 1;
            }
        }
        turn(&mut pair.left, &mut pair.at_left).expect("left");
        turn(&mut pair.right, &mut pair.at_right).expect("right");
        assert!(Instant::now() < deadline, "nothing happens");
    }
    for recorder in [&pair.at_left, &pair.at_right] {
        assert!(recorder.landed.values().all(|landed| *landed == bytes));
    }
    let by_senders = [&pair.left, &pair.right].map(|link| link.counters().single_copy_bytes_sent);
    assert!(by_senders.iter().all(|bytes| *bytes > 0), "{by_senders:?}");
}

/// What is landed for an operation is not offered: it could not be given back in time.
#[tokio::test]
async fn memory_of_an_operation_is_not_offered() {
    let mut pair = pair().await;
    pair.at_right = Recorder::with(Policy::Hold);
    let bytes = pattern(LONG);
    let offered = pair.left.post(op(1), Class::Tag, How::Offer, b"tag", &[segment(&bytes)]);
    assert_eq!(offered.expect("posted"), Post::Pending);
    pair.pump(|pair| !pair.at_right.held.is_empty());
    let (payload, len) = pair.at_right.held.remove(0);
    let (to, landing) = pair.at_right.landing(len);
    assert_eq!(pair.right.land(payload, to, landing).expect("landing"), Post::Pending);
    pair.pump(|pair| pair.at_right.done.contains_key(&landing.index));
    assert!(pair.at_right.landed[&landing.index] == bytes);
    assert_eq!(pair.copied_by_sender(), 0);
}

#[tokio::test]
async fn a_link_ends_at_once_when_the_sender_is_not_writing() {
    let mut pair = pair().await;
    let bytes = pattern(LONG);
    let index = pair.ask(&bytes);
    assert_eq!(pair.right.kill(&error(), &mut pair.at_right), Killed::Over);
    assert!(pair.at_right.done[&index].is_err());
    // The memory is somebody else's now.
    pair.at_right.landed.get_mut(&index).expect("landing").fill(0xee);
    for _ in 0..100 {
        if turn(&mut pair.left, &mut pair.at_left).is_err() {
            break;
        }
    }
    assert!(pair.at_right.landed[&index].iter().all(|byte| *byte == 0xee), "written after the end");
    assert_eq!(pair.copied_by_sender(), 0);
}

/// The word in the page alone, before anything else tells of the end.
/// The numbers of copies are used again, and a page that was never written says 0.
#[tokio::test]
async fn what_is_left_of_another_copy_is_not_believed() {
    let mut pair = pair().await;
    let bytes = pattern(LONG);
    for (last, next) in [(u16::MAX, 1), (1, 3)] {
        pair.right.last_number = last;
        if last == u16::MAX {
            pair.left.page().marks.end(0, 0);
        } else {
            pair.left.page().marks.end(2, 4096);
        }
        let index = pair.ask(&bytes);
        assert_eq!(pair.right.last_number, next);
        while !pair.at_right.done.contains_key(&index) {
            turn(&mut pair.right, &mut pair.at_right).expect("right");
        }
        assert!(pair.at_right.landed[&index] == bytes);
        pair.pump(|pair| pair.at_left.done.contains_key(&999));
        pair.at_left.done.clear();
    }
}

#[tokio::test]
async fn a_payload_is_copied_once_by_the_sender() {
    let mut pair = pair().await;
    let bytes = pattern(LONG);
    let mut memory = vec![0; LONG];
    assert_eq!(pair.post(1, &[segment(&bytes)]), Post::Pending);
    let addr = memory.as_mut_ptr().expose_provenance() as u64;
    for number in [5, 6] {
        pair.right.page().marks.take(number, 0);
        let count = (u64::from(number) << 32) | 1;
        let record = numbers(&[0, 0, count, addr, LONG as u64]);
        pair.right.forge(flags(Kind::Help, How::Eager, 0), &record);
        for _ in 0..20 {
            turn(&mut pair.left, &mut pair.at_left).expect("left");
        }
    }
    assert!(memory == bytes);
    assert_eq!(pair.copied_by_sender(), LONG as u64);
}

#[tokio::test]
async fn a_receiver_that_is_dying_is_not_written_to() {
    let mut pair = pair().await;
    let bytes = pattern(LONG);
    pair.ask(&bytes);
    pair.right.page().begin_dying();
    for _ in 0..10 {
        turn(&mut pair.left, &mut pair.at_left).expect("it lives");
    }
    assert_eq!(pair.copied_by_sender(), 0);
}

#[tokio::test]
async fn a_link_lingers_while_the_sender_writes() {
    let mut pair = pair().await;
    let bytes = pattern(LONG);
    let index = pair.ask(&bytes);
    let other = pair.right.post(op(7), Class::Message, How::Eager, b"", &[segment(&bytes)]);
    assert_eq!(other.expect("posted"), Post::Pending);
    pair.be_busy(4096);
    for _ in 0..3 {
        assert_eq!(pair.right.kill(&error(), &mut pair.at_right), Killed::Keeps);
    }
    assert!(pair.at_right.done[&7].is_err(), "what nobody touches is reported");
    assert!(!pair.at_right.done.contains_key(&index), "the sender may still write there");
    let mut cx = Context::from_waker(Waker::noop());
    assert_eq!(pair.right.arm(&mut cx).expect("armed"), Armed::Yes, "it turns in circles");
    assert_eq!(turn(&mut pair.right, &mut pair.at_right).expect("idle"), Progress::Idle);
    pair.left.page().marks.end(1, 4096);
    assert_eq!(pair.right.kill(&error(), &mut pair.at_right), Killed::Over);
    assert!(pair.at_right.done[&index].is_err());
}

/// What a hostile peer says of a copy.
#[tokio::test]
async fn claims_that_cannot_be_end_the_link() {
    let list = |values: &[u64]| numbers(values);
    let len = LONG as u64;
    let one = |number: u64| (number << 32) | 1;
    // Of the sender's memory: payload 0 is open, of `len` bytes.
    let to_sender: Vec<(&str, Vec<u8>)> = vec![
        ("a payload that is not open", list(&[99, 0, one(1), 4096, len])),
        ("pieces too few", list(&[0, 0, one(1), 4096, len - 1])),
        ("pieces too many", list(&[0, 0, one(1), 4096, len + 1])),
        ("a sum that overflows", list(&[0, 0, 2 | (1 << 32), 4096, u64::MAX, 4096, len + 1])),
        ("a record that ends early", list(&[0, 0, 2 | (1 << 32), 4096, len])),
        ("a number too large", list(&[0, 0, 1 | (1 << 48), 4096, len])),
        ("a count too large", list(&[0, 0, (PULLS_MAX as u64 + 1) | (1 << 32), 4096, len])),
    ];
    for (what, record) in to_sender {
        let mut pair = pair().await;
        let bytes = pattern(LONG);
        assert_eq!(pair.post(1, &[segment(&bytes)]), Post::Pending);
        pair.right.forge(flags(Kind::Help, How::Eager, 0), &record);
        let told = turn(&mut pair.left, &mut pair.at_left);
        assert_eq!(told.map_err(|error| error.kind), Err(ErrorKind::Protocol), "{what}");
    }
    for (what, from_key, from_end) in [("another landing", 1, 0), ("more than there is", 0, 1)] {
        let mut pair = pair().await;
        let bytes = pattern(LONG);
        pair.ask(&bytes);
        let key = pair.right.asked_key().expect("asked") + from_key;
        pair.left.forge(flags(Kind::Helped, How::Eager, 0), &numbers(&[key, len + from_end, 1]));
        let told = turn(&mut pair.right, &mut pair.at_right);
        assert_eq!(told.map_err(|error| error.kind), Err(ErrorKind::Protocol), "{what}");
    }
}

/// Addresses at which the receiver has no memory hurt nobody: the sender stops helping.
#[tokio::test]
async fn a_receiver_without_memory_gets_no_help() {
    let mut pair = pair().await;
    let bytes = pattern(LONG);
    assert_eq!(pair.post(1, &[segment(&bytes)]), Post::Pending);
    pair.right.page().marks.take(5, 0);
    let record = numbers(&[0, 0, (5 << 32) | 1, 4096, LONG as u64]);
    pair.right.forge(flags(Kind::Help, How::Eager, 0), &record);
    turn(&mut pair.left, &mut pair.at_left).expect("no harm done");
    assert!(!pair.left.may_help);
    assert_eq!(pair.copied_by_sender(), 0);
    let given = pair.left.page().marks.given(5).expect("it has tried");
    assert!(!given.busy && given.from == LONG as u64, "nothing is there: {given:?}");
}

#[test]
fn marks_say_nothing_of_another_copy() {
    let page = Page::zeroed();
    page.marks.take(3, 100);
    assert_eq!((page.marks.taken(3), page.marks.taken(4)), (Some(100), None));
    page.marks.close(3);
    assert_eq!(page.marks.taken(3), None);
    page.marks.begin(3, 50);
    assert!(page.marks.is_busy());
    assert!(page.marks.given(3).is_some_and(|given| given.busy && given.from == 50));
    assert_eq!(page.marks.given(2), None);
    page.marks.end(3, 50);
    assert!(page.marks.given(3).is_some_and(|given| !given.busy && given.from == 50));
    assert!(!page.marks.is_busy());
}
