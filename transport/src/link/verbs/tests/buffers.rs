//! How many buffers a link has, and that there is always one for what the peer may send.

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::pool::{BLOCK, Pool};
use super::*;

/// Blocks that a link begins with.
const FIRST: usize = RECEIVES_FIRST / BLOCK + 1;

impl Setting {
    /// Messages that the peer could send at the moment, if the adapter alone were asked.
    fn posted(&self) -> usize {
        self.fake.state().receives.len()
    }

    /// Everything that was sent arrives; the credit that it returned, and how much of it did nothing
    /// else.
    fn arrive(&mut self) -> (usize, usize) {
        let (mut credit, mut bare) = (0, 0);
        while !self.fake.state().sent.is_empty() {
            let (header, _) = self.fake.end_send(ffi::IBV_WC_SUCCESS);
            credit += usize::from(header.credits);
            bare += usize::from(header.kind == Kind::Credit);
        }
        (credit, bare)
    }

    /// A message comes. `waited`: the peer had to wait for credit before.
    fn hear(&mut self, waited: bool) {
        let about = Header::about(Kind::Eager, 0, 0);
        self.fake.deliver(Header { class: Class::Message, waited, ..about }, &[]);
    }

    /// So many messages come at a time, and the peer had to wait before the first of them.
    fn crowd(&mut self, messages: usize) {
        (0..messages).for_each(|at| self.hear(at == 0));
        self.settle();
    }
}

#[test]
fn a_link_takes_more_buffers_where_its_peer_waits_and_gives_them_back() {
    let mut setting = setting();
    assert_eq!((setting.posted(), setting.fake.pool.used()), (RECEIVES_FIRST, FIRST));
    let mut credit = RECEIVES_FIRST - usize::from(RESERVE);
    for (messages, posted) in [(1, 48), (16, RECEIVES)] {
        setting.crowd(messages);
        setting.post(b"and the credit").expect("alive");
        credit = credit - messages + setting.arrive().0;
        setting.settle();
        assert_eq!((setting.posted(), credit), (posted, posted - usize::from(RESERVE)));
    }
    setting.crowd(16);
    assert_eq!(setting.posted(), RECEIVES, "more than there may be");
    // For long enough without waiting: those that messages leave are not posted again.
    for _ in 0..2000 {
        setting.hear(false);
        setting.settle();
        setting.arrive();
    }
    setting.settle();
    assert_eq!((setting.posted(), setting.fake.pool.used()), (RECEIVES_FIRST, FIRST));
    setting.crowd(9);
    assert_eq!(setting.posted(), 48, "they are wanted again");
    assert_eq!(setting.kill(), Killed::Over);
    assert_eq!(setting.fake.pool.used(), 0);
}

#[test]
fn a_link_sends_from_more_buffers_while_it_has_to() {
    let mut setting = setting();
    for _ in 0..SENDS {
        assert_eq!(setting.post(b"8 bytes.").expect("alive"), Post::Done);
    }
    assert_eq!(setting.post(b"no room").expect("alive"), Post::Full);
    assert_eq!(setting.fake.pool.used(), FIRST - 1 + SENDS / BLOCK);
    let mut credit = 0;
    for _ in 0..2000 {
        let arrived = setting.arrive();
        credit += arrived.0;
        setting.settle();
        let header = Header { credits: 1, ..Header::about(Kind::Credit, 0, 0) };
        setting.fake.deliver(header, &[]);
        setting.settle();
        assert_eq!(setting.post(b"8 bytes.").expect("alive"), Post::Done);
    }
    assert_eq!((setting.fake.pool.used(), credit), (FIRST, 0));
}

#[test]
fn a_peer_is_told_that_its_credit_is_waited_for() {
    let mut setting = setting();
    let mut sent = 0;
    while setting.arrive().0 == 0 && setting.post(b"8 bytes.").expect("alive") == Post::Done {
        setting.settle();
        let (header, _) = setting.fake.end_send(ffi::IBV_WC_SUCCESS);
        assert!(!header.waited, "it has not waited");
        sent += 1;
        setting.settle();
    }
    assert_eq!(sent, RECEIVES - usize::from(RESERVE));
    let header = Header { credits: 2, ..Header::about(Kind::Credit, 0, 0) };
    setting.fake.deliver(header, &[]);
    setting.settle();
    for waited in [true, false] {
        assert_eq!(setting.post(b"8 bytes.").expect("alive"), Post::Done);
        assert_eq!(setting.fake.end_send(ffi::IBV_WC_SUCCESS).0.waited, waited);
    }
}

#[test]
fn what_is_being_sent_from_stays() {
    let mut setting = setting();
    let post = |setting: &mut Setting| {
        assert_eq!(setting.post(b"8 bytes.").expect("alive"), Post::Done);
    };
    (0..20).for_each(|_| post(&mut setting));
    let used = setting.fake.pool.used();
    // The one that has waited longest arrives, and one more is sent.
    for _ in 0..1000 {
        setting.fake.end_send(ffi::IBV_WC_SUCCESS);
        setting.settle();
        let header = Header { credits: 1, ..Header::about(Kind::Credit, 0, 0) };
        setting.fake.deliver(header, &[]);
        setting.settle();
        post(&mut setting);
        assert_eq!(setting.fake.pool.used(), used);
    }
}

#[test]
fn a_link_does_without_more_buffers_where_there_are_none() {
    let fake = Fake::new();
    let registrations = Registrations::new(fake.pool.domain());
    let made = link_of(fake.messenger(), &registrations);
    let mut setting = setting_of(fake, registrations, made);
    // Nobody else leaves any.
    let taken: Vec<_> = (FIRST..16).map(|_| setting.fake.pool.take().expect("a block")).collect();
    setting.fake.state().registers_max = Some(0);
    setting.crowd(20);
    setting.hear(true);
    setting.settle();
    assert_eq!(setting.driver.parcels, 21);
    assert_eq!(setting.posted(), RECEIVES_FIRST);
    // One of them returns credit.
    for _ in 1..BLOCK {
        assert_eq!(setting.post(b"8 bytes.").expect("alive"), Post::Done);
    }
    assert_eq!(setting.post(b"no room").expect("alive"), Post::Full);
    let refused = setting.fake.state().unregistered;
    taken.into_iter().for_each(|block| setting.fake.pool.give(block));
    // It is asked for again, but not with each message.
    for _ in 0..300 {
        setting.arrive();
        setting.hear(true);
        setting.settle();
    }
    setting.arrive();
    setting.settle();
    assert_eq!(refused, 1);
    for _ in 0..2 * BLOCK {
        assert_eq!(setting.post(b"8 bytes.").expect("alive"), Post::Done);
    }
    assert!(setting.posted() > RECEIVES_FIRST);
}

#[test]
fn a_link_that_cannot_have_enough_gives_back_what_it_has_taken() {
    let fake = Fake::new();
    let taken: Vec<_> = (0..14).map(|_| fake.pool.take().expect("a block")).collect();
    fake.state().registers_max = Some(0);
    assert!(Messenger::new(&fake.pool, &fake.port(), 1).is_err());
    assert_eq!(fake.pool.used(), 14);
    taken.into_iter().for_each(|block| fake.pool.give(block));
}

#[test]
fn what_a_device_may_still_use_is_not_used_again() {
    let mut setting = setting();
    setting.fake.state().destroying = libc::EBUSY;
    assert_eq!(setting.kill(), Killed::Lingers);
    let Setting { link, mut fake, .. } = setting;
    drop(link);
    assert_eq!(fake.pool.used(), FIRST);
    let fresh: Vec<_> = (FIRST..16).map(|_| fake.pool.take().expect("a block")).collect();
    assert_eq!(fake.state().registered.len(), 1);
    fresh.into_iter().for_each(|block| fake.pool.give(block));
    // Nor is it unmapped when there is no pool any more.
    fake.pool = Arc::new(Pool::new(fake.pool.domain()));
    assert_eq!(fake.state().registered.len(), 1);
}

#[test]
fn slabs_that_nobody_uses_are_let_go_of() {
    let fake = Fake::new();
    let blocks: Vec<_> = (0..160).map(|_| fake.pool.take().expect("a block")).collect();
    assert_eq!(fake.state().registered.len(), 10);
    let places: std::collections::HashSet<_> =
        blocks.iter().flat_map(|block| (0..BLOCK).map(|at| block.buffer(at))).collect();
    assert_eq!(places.len(), 160 * BLOCK, "no buffer is two links'");
    blocks.into_iter().for_each(|block| fake.pool.give(block));
    assert_eq!((fake.state().registered.len(), fake.pool.used()), (4, 0));
}

/// A peer that keeps to its credit.
#[derive(Default)]
struct Peer {
    credit: usize,
    owed: u16,
    waited: bool,
    /// Messages of the link's that it has not looked at: the credit of each, and whether it does
    /// nothing else.
    queue: VecDeque<(usize, bool)>,
}

impl Peer {
    /// What was sent comes into its queue.
    fn hear(&mut self, fake: &Fake) {
        while !fake.state().sent.is_empty() {
            let (header, _) = fake.end_send(ffi::IBV_WC_SUCCESS);
            self.queue.push_back((header.credits.into(), header.kind == Kind::Credit));
        }
        let bare = self.queue.iter().filter(|(_, bare)| *bare).count();
        assert!(bare <= usize::from(RESERVE), "{bare} messages that it keeps no buffers for");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whoever keeps to his credit finds the receiver ready, however messages crowd; and credit is
    /// neither lost nor made of nothing.
    #[test]
    fn a_receiver_is_always_ready(
        turns in vec((0usize..70, 0usize..70, 0usize..3, any::<bool>()), 1..200),
    ) {
        let mut setting = setting();
        let mut peer = Peer { credit: RECEIVES_FIRST - usize::from(RESERVE), ..Peer::default() };
        for (sends, looks, posts, calm) in turns {
            // Long times without a crowd as well.
            for _ in 0..if calm { 150 } else { 1 } {
                let sends = if calm { 1 } else { sends };
                for _ in 0..sends.min(peer.credit) {
                    peer.credit -= 1;
                    setting.hear(std::mem::take(&mut peer.waited));
                }
                peer.waited |= peer.credit == 0 && !calm;
                setting.settle();
                for _ in 0..posts {
                    let _ = setting.post(b"8 bytes.").expect("alive");
                }
                peer.hear(&setting.fake);
                for (credit, bare) in peer.queue.drain(..looks.min(peer.queue.len())) {
                    peer.credit += credit;
                    peer.owed += u16::from(!bare);
                }
                if peer.owed > (RECEIVES as u16 - RESERVE) / 2 {
                    let credits = std::mem::take(&mut peer.owed);
                    let header = Header { credits, ..Header::about(Kind::Credit, 0, 0) };
                    setting.fake.deliver(header, &[]);
                }
                setting.settle();
                peer.hear(&setting.fake);
            }
        }
        setting.crowd(0);
        peer.hear(&setting.fake);
        let under_way: usize = peer.queue.iter().map(|(credit, _)| credit).sum();
        let owed = usize::from(setting.link.owed());
        prop_assert_eq!(peer.credit + under_way + owed + usize::from(RESERVE), setting.posted());
    }
}
