//! Markers: when a peer is told that it may have its memory back.

use super::super::messenger::RESERVE;
use super::*;

/// A link that lands this from a peer whose markers the test ends.
fn landing(bytes: &[u8], to: &mut [u8]) -> Setting {
    let mut setting = setting();
    setting.fake.state().holds_markers = true;
    setting.driver.landings.push_back(place(to));
    setting.offer(1, bytes);
    setting.settle();
    setting
}

/// What this side has said since it was last asked.
fn said(setting: &Setting) -> Vec<(Kind, u32)> {
    let mut said = Vec::new();
    while !setting.fake.state().sent.is_empty() {
        let (header, _) = setting.fake.end_send(ffi::IBV_WC_SUCCESS);
        said.push((header.kind, header.id));
    }
    said
}

#[test]
fn memory_is_given_back_behind_a_marker() {
    let bytes = pattern(64 << 10);
    let mut to = vec![0; bytes.len()];
    let mut setting = landing(&bytes, &mut to);
    assert_eq!(setting.driver.done.len(), 1, "what has come is told at once");
    assert_eq!(said(&setting), [], "a read that is asked for again may still be under way");
    assert!(!setting.link.flushed(), "the peer is still to be told");
    // Its completion is waited for, by a link that sleeps as well.
    let queue = setting.fake.state().queue(1);
    setting.fake.state().notified.clear();
    assert_eq!(setting.arm(), Armed::Yes);
    assert!(setting.fake.state().notified.contains(&queue));
    // Whatever else is said meanwhile.
    assert_eq!(setting.post(b"x").expect("alive"), Post::Done);
    assert_eq!(said(&setting), [(Kind::Eager, 0)]);
    setting.settle();
    assert!(!setting.link.flushed());
    setting.fake.end_marker(ffi::IBV_WC_SUCCESS);
    setting.settle();
    assert_eq!(said(&setting), [(Kind::Release, 1)]);
    setting.settle();
    assert!(setting.link.flushed());
    assert!(to == bytes);
}

#[test]
fn one_marker_at_a_time_stands_for_all_payloads_before_it() {
    let bytes = pattern(64 << 10);
    let mut places = [(); 4].map(|()| vec![0; bytes.len()]);
    let [first, others @ ..] = &mut places;
    let mut setting = landing(&bytes, first);
    for (at, to) in others.iter_mut().enumerate() {
        setting.driver.landings.push_back(place(to));
        setting.offer(2 + at as u32, &bytes);
        setting.settle();
    }
    assert_eq!(setting.driver.done.len(), 4);
    assert_eq!(setting.fake.state().markers.len(), 1);
    setting.fake.end_marker(ffi::IBV_WC_SUCCESS);
    setting.settle();
    assert_eq!(said(&setting), [(Kind::Release, 1)]);
    assert_eq!(setting.fake.state().markers.len(), 1);
    setting.fake.end_marker(ffi::IBV_WC_SUCCESS);
    setting.settle();
    assert_eq!(said(&setting), [2, 3, 4].map(|id| (Kind::Release, id)));
    assert_eq!(setting.fake.state().markers.len(), 0);
}

#[test]
fn a_marker_waits_for_what_is_said_behind_the_one_before() {
    let bytes = pattern(64 << 10);
    let mut to = vec![0; bytes.len()];
    let mut again = vec![0; bytes.len()];
    let mut setting = landing(&bytes, &mut to);
    // All credit is used up, and all buffers are free again.
    let mut used = 0;
    loop {
        while setting.post(b"x").expect("alive") == Post::Done {}
        let arrived = said(&setting).len();
        used += arrived;
        setting.settle();
        if arrived == 0 {
            break;
        }
    }
    assert_eq!(used, RECEIVES - usize::from(RESERVE));
    setting.driver.landings.push_back(place(&mut again));
    setting.offer(2, &bytes);
    setting.fake.end_marker(ffi::IBV_WC_SUCCESS);
    setting.settle();
    assert_eq!(setting.driver.done.len(), 2);
    assert_eq!(said(&setting), []);
    assert!(setting.fake.state().markers.is_empty(), "the peer may have no room for it");
    assert_eq!(setting.arm(), Armed::Yes);
    let header = Header { credits: 1, ..Header::about(Kind::Credit, 0, 0) };
    setting.fake.deliver(header, &[]);
    assert_eq!(setting.arm(), Armed::Busy);
    setting.settle();
    assert_eq!(said(&setting), [(Kind::Release, 1)]);
    assert_eq!(setting.fake.state().markers.len(), 1);
}

#[test]
fn a_marker_that_fails_ends_the_link() {
    let bytes = pattern(64 << 10);
    let mut to = vec![0; bytes.len()];
    let mut setting = landing(&bytes, &mut to);
    setting.fake.end_marker(ffi::IBV_WC_RETRY_EXC_ERR);
    let error = setting.busy_until(|_| false).expect("its end");
    assert_eq!(error.kind, ErrorKind::ConnectionLost);
    assert_eq!(setting.kill(), Killed::Over);
    assert_eq!(setting.driver.done.len(), 1, "the payload was told of before");
}

#[test]
fn there_is_room_for_the_peers_markers_again_and_again() {
    let mut setting = setting();
    for _ in 0..3 * RECEIVES {
        setting.fake.deliver_marker();
        setting.eager();
        setting.settle();
    }
    assert_eq!(setting.driver.parcels, 3 * RECEIVES);
    // However many there are, what comes behind them is not slept over.
    for _ in 0..RECEIVES / 2 {
        setting.fake.deliver_marker();
    }
    setting.eager();
    assert_eq!(setting.arm(), Armed::Busy);
    setting.settle();
    assert_eq!(setting.driver.parcels, 3 * RECEIVES + 1);
}

#[test]
fn markers_with_nothing_behind_them_end_the_link() {
    let mut setting = setting();
    let ended = (0..=RECEIVES).find_map(|_| {
        setting.fake.deliver_marker();
        setting.poll().err()
    });
    assert_eq!(ended.expect("a peer may keep this side busy for ever").kind, ErrorKind::Protocol);
}

#[test]
fn what_comes_in_chunks_after_all_is_pulled_behind_a_marker() {
    let mut setting = setting();
    setting.fake.state().holds_markers = true;
    let bytes = pattern(SLICE_BYTES + SLICE_BYTES / 2);
    let mut to = vec![0; bytes.len()];
    setting.driver.landings.push_back(place(&mut to));
    setting.offer(1, &bytes);
    setting.poll().expect("alive");
    // The first slice is being read; the second one is refused.
    setting.fake.state().registers_max = Some(1);
    setting.settle();
    assert_eq!(said(&setting), []);
    assert_eq!(setting.fake.state().markers.len(), 1);
    setting.fake.end_marker(ffi::IBV_WC_SUCCESS);
    setting.settle();
    assert!(matches!(said(&setting)[..], [(Kind::Pull, 1)]));
}
