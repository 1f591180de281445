//! The ring, with both sides in one thread. Their interleavings are `model`'s business.

use std::sync::Arc;

use super::cells::{RECORD_MAX, SLOTS};
use super::ring::{Bell, Corrupt, LEN_BITS, Page, Ring, SHORT_MAX, load_word};

#[derive(Default)]
struct Count(u32);

impl Bell for Count {
    fn ring(&mut self) {
        self.0 += 1;
    }
}

type Pair = Ring<Arc<Page>, Arc<Page>, Count>;

fn pair() -> (Pair, Pair, Arc<Page>) {
    let [left, right] = [(); 2].map(|()| Arc::new(Page::zeroed()));
    (
        Ring::new(left.clone(), right.clone(), Count(0)),
        Ring::new(right, left.clone(), Count(0)),
        left,
    )
}

fn send(ring: &mut Pair, flags: u32, bytes: &[u8]) -> bool {
    let (front, back) = bytes.split_at(bytes.len() / 3);
    ring.push(flags, bytes.len(), 0, [front, back].into_iter()).expect("sound")
}

#[test]
fn records_of_every_length_arrive_whole_around_the_lap() {
    let (mut left, mut right, _) = pair();
    // Start close to the wrap of positions.
    let start = u32::MAX - 300;
    left.start_at(start);
    right.start_at(start);
    let mut into = [0; RECORD_MAX];
    for len in 0..=RECORD_MAX {
        let bytes: Vec<u8> = (0..len).map(|at| (at * 7 + len) as u8).collect();
        assert!(send(&mut left, len as u32 & 0xff, &bytes));
        let (flags, got) = right.pop(&mut into).expect("sound").expect("a record");
        assert_eq!((flags, got), (len as u32 & 0xff, len));
        assert_eq!(into[..len], bytes[..]);
        assert_eq!(right.pop(&mut into), Ok(None));
    }
}

/// Written at once, they are the records that they would be if written in parts.
#[test]
fn short_records_arrive_whole_around_the_lap() {
    let (mut left, mut right, _) = pair();
    let start = u32::MAX - 300;
    left.start_at(start);
    right.start_at(start);
    let mut into = [0; RECORD_MAX];
    for lap in 0..20u8 {
        for len in 0..=SHORT_MAX {
            let bytes: Vec<u8> = (0..8 + len).map(|at| (at * 11 + len) as u8 ^ lap).collect();
            let (first, rest) = bytes.split_at(8);
            for head_len in [1, 5, 8] {
                let mut head = first.to_vec();
                head[head_len..].fill(0);
                let word = load_word(&head[..head_len]);
                assert_eq!(word.to_le_bytes(), head[..]);
                assert!(left.push_short(head_len as u32, word, rest, 0).expect("sound"));
                let (flags, got) = right.pop(&mut into).expect("sound").expect("a record");
                assert_eq!((flags, got), (head_len as u32, 8 + len));
                assert_eq!((&into[..8], &into[8..got]), (&head[..], rest));
                assert_eq!(right.pop(&mut into), Ok(None));
            }
        }
    }
}

#[test]
fn short_records_leave_the_reserve_and_wake_a_sleeper() {
    let (mut left, mut right, _) = pair();
    assert!(right.fall_asleep().expect("sound"));
    let mut sent = 0;
    while left.push_short(0, 1, b"x", 16).expect("sound") {
        sent += 1;
    }
    assert_eq!((sent, left.bell().0), (SLOTS - 16, 1));
    assert!(left.push_short(0, 1, b"x", 15).expect("sound"));
}

#[test]
fn a_full_ring_refuses_until_read() {
    let (mut left, mut right, _) = pair();
    let mut sent = 0;
    while send(&mut left, 0, b"x") {
        sent += 1;
    }
    assert_eq!(sent, SLOTS);
    assert!(!left.push_or_want(0, 1, 0, [&b"x"[..]].into_iter()).expect("sound"));
    assert!(left.is_wanting());
    let mut into = [0; RECORD_MAX];
    right.pop(&mut into).expect("sound").expect("a record");
    right.publish_if_wanted();
    assert!(left.room_appeared().expect("sound"));
    assert!(!left.room_appeared().expect("sound"), "no longer wanted");
    assert!(send(&mut left, 0, b"x"));
}

#[test]
fn a_sleeper_is_woken_once_for_each_sleep() {
    let (mut left, mut right, _) = pair();
    send(&mut left, 0, b"a");
    assert_eq!(left.bell().0, 0, "nobody sleeps");
    assert!(!right.fall_asleep().expect("sound"), "there is something");
    let mut into = [0; RECORD_MAX];
    right.pop(&mut into).expect("sound").expect("a record");
    assert!(right.fall_asleep().expect("sound"));
    send(&mut left, 0, b"b");
    send(&mut left, 0, b"c");
    assert_eq!(left.bell().0, 1);
    right.pop(&mut into).expect("sound");
    right.pop(&mut into).expect("sound");
    assert!(right.fall_asleep().expect("sound"));
    send(&mut left, 0, b"d");
    assert_eq!(left.bell().0, 2);
}

#[test]
fn a_lying_page_is_reported() {
    let mut into = [0; RECORD_MAX];
    let (_left, mut right, page) = pair();
    page.set_slot(0, 77, 0);
    assert_eq!(right.pop(&mut into), Err(Corrupt::Stamp));

    let (_left, mut right, page) = pair();
    page.set_slot(0, 1, (1 << LEN_BITS) - 1);
    assert_eq!(right.pop(&mut into), Err(Corrupt::Length));

    let (_left, mut right, page) = pair();
    page.set_slot(0, 1, 100);
    assert_eq!(right.pop(&mut into), Err(Corrupt::Stamp), "the second slot is missing");

    let (left, mut right, page) = pair();
    while send(&mut right, 0, b"x") {}
    page.set_head(SLOTS + 1);
    let parts = || [&b"x"[..]].into_iter();
    let refused = right.push(0, 1, 0, parts());
    assert_eq!(refused, Err(Corrupt::Head), "read more than was written");
    page.set_head(10);
    assert!(send(&mut right, 0, b"x"));
    page.set_head(9);
    assert_eq!(right.push(0, RECORD_MAX, SLOTS, parts()), Err(Corrupt::Head), "ran backwards");
    drop(left);
}

#[test]
fn a_page_is_trusted_until_its_owner_lets_go() {
    let (left, right, _) = pair();
    assert!(right.peer().trusted());
    left.own().begin_dying();
    assert!(!right.peer().trusted());
    assert!(left.peer().trusted());
}
