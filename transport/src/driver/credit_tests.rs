//! Credit for tagged payloads whose receives are posted: nothing but their arrival makes this side
//! report what it has let go of.

use super::direct_tests::Meeting;
use super::table::RawSegment;
use crate::link::{Arrival, Disposition, How, PayloadId};
use crate::memory::BufferMut;
use crate::proto::wire::{Head, HeadBuf};

/// What comes from the peer.
fn comes(meeting: &mut Meeting, head: &Head<'_>, inline: &[u8]) {
    let mut encoded = HeadBuf::new();
    head.encode(&mut encoded);
    let arrival = Arrival {
        head: &encoded,
        len: inline.len() as u64,
        payload: PayloadId(0),
        inline: Some(inline),
        views: None,
        how: How::Eager,
    };
    let disposition = meeting.core.state.parcel(0, arrival);
    assert!(matches!(disposition, Disposition::Taken), "refused");
}

/// A receive is posted, and its payload comes.
fn receives(meeting: &mut Meeting, seq: u32, len: usize) {
    let mut here = vec![0u8; len];
    let to = RawSegment::from(here.region_mut());
    let id = meeting.core.start_tag_recv(7, u64::MAX, to).expect("open");
    comes(meeting, &Head::Tag { seq, tag: 7 }, &vec![9; len]);
    assert_eq!(here, vec![9; len]);
    meeting.drive();
    meeting.core.state.ops.remove(id);
}

#[test]
fn a_sender_that_asked_too_early_is_told_when_something_is_consumed() {
    let mut meeting = Meeting::new();
    // It overtook everything that was sent before: nothing can be granted yet.
    comes(&mut meeting, &Head::CreditWanted { messages: false, tags: true }, &[]);
    meeting.drive();
    assert_eq!(meeting.said(), 0);
    receives(&mut meeting, 0, 8);
    assert_eq!(meeting.said(), 1);
    assert!(meeting.says(|head| matches!(head, Head::Credit { tags: 1.., .. })));
}

#[test]
fn a_sender_is_told_before_its_window_is_used_up() {
    let mut meeting = Meeting::new();
    // Three of 200 bytes and what they count for beside them, of a window of 1,000.
    for seq in 0..3 {
        receives(&mut meeting, seq, 200);
    }
    assert!(meeting.said() > 0);
    assert!(meeting.says(|head| matches!(head, Head::Credit { tags: 200.., .. })));
}
