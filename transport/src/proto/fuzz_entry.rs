//! What fuzzing calls: each function takes any bytes, and panics only if this crate is wrong.
//!
//! What decodes must encode to something that decodes to the same; what the state machines hold
//! must agree with plain models and stay within its limits.
//!
//! Each function for a target returns a number that tells ways through the code apart, as far as it cheaply can. A fuzzer
//! without instrumentation keeps the inputs that gave a number not seen before.

use std::collections::{BTreeMap, VecDeque};

use super::credit::{RecvCredit, SendCredit, message_cost, tag_cost};
use super::cursor::WireError;
use super::fence::{FENCES_MAX, FenceLedger};
use super::hello::{
    APP_BYTES_MAX, HELLO_BYTES_MAX, Hello, LINKS_MAX, PrefaceError, SETUP_BYTES_MAX, Setup,
    preface_decode, preface_encode,
};
use super::keys::{RemoteKeyWire, check_bounds};
use super::sequence::{SEQUENCE_WINDOW, Sequencer};
use super::tags::model::Model;
use super::tags::{TagMatcher, Unexpected};
use super::wire::{Frames, HEAD_MAX, Head, HeadBuf, Lens};
use crate::fuzz_input::{Input, mix};

/// The most bytes of an input that [`session`] looks at: the models take quadratic time.
const SESSION_BYTES_MAX: usize = 8192;

/// The head of a parcel; also a remote key.
pub fn head(bytes: &[u8]) -> u64 {
    let head = Head::decode(bytes);
    let key = RemoteKeyWire::from_bytes(bytes);
    let kind = bytes.first().copied().unwrap_or_default();
    let way = trace(kind.into(), head.as_ref().err());
    let way = trace(way, key.as_ref().err());
    if let Ok(head) = head {
        match &head {
            Head::Message { frames: Frames::Inline(lens), .. } => check_lens(lens),
            Head::MessageTable { total, first, lens, .. } => {
                check_lens(lens);
                assert!(u64::from(*first) + lens.len() as u64 <= u64::from(*total));
            }
            _ => {}
        }
        let mut out = HeadBuf::new();
        head.encode(&mut out);
        assert!(out.len() <= bytes.len(), "encoding is never longer than what was accepted");
        assert_eq!(Head::decode(&out), Ok(head));
    }
    if let Ok(key) = key {
        assert_eq!(&key.to_bytes()[..], bytes);
        let fits = u128::from(key.key) + u128::from(key.len) <= u128::from(u64::MAX);
        assert_eq!(check_bounds(key.key, key.len, u64::MAX), fits);
    }
    way
}

/// Adds an outcome to what [`head`] and the others return.
fn trace(way: u64, error: Option<&WireError>) -> u64 {
    mix(way, error.map_or("", |error| error.what).as_bytes())
}

fn check_lens(lens: &Lens<'_>) {
    assert!(lens.len() <= HEAD_MAX / 4);
    assert_eq!(lens.clone().count(), lens.len());
    let sum: u128 = lens.clone().map(u128::from).sum();
    assert_eq!(lens.checked_sum(), u64::try_from(sum).ok());
}

/// A preface, and what follows it as a hello.
pub fn hello(bytes: &[u8]) -> u64 {
    let Some((preface, body)) = bytes.split_first_chunk() else {
        return 0;
    };
    let preface = preface_decode(preface);
    let way = match preface {
        Ok(_) => 1,
        Err(PrefaceError::NotThalweg { .. }) => 2,
        Err(PrefaceError::Major { .. }) => 3,
        Err(PrefaceError::TooLong { .. }) => 4,
    };
    match preface {
        Ok(preface) => {
            assert!(preface.body_len <= HELLO_BYTES_MAX);
            assert!(preface.minor_in_common() <= preface.minor);
            let again = preface_decode(&preface_encode(preface.body_len));
            assert_eq!(again.map(|p| p.body_len), Ok(preface.body_len));
        }
        Err(error) => assert!(!error.to_string().contains(char::is_control)),
    }
    let hello = Hello::decode(body);
    let way = trace(way, hello.as_ref().err());
    if let Ok(hello) = hello {
        assert!(hello.app.len() <= APP_BYTES_MAX && hello.links.len() <= LINKS_MAX);
        let again = hello.encode().expect("what was accepted keeps the limits");
        assert_eq!(Hello::decode(&again), Ok(hello));
    }
    way
}

/// A stream of set-up messages.
pub fn setup(mut bytes: &[u8]) -> u64 {
    let mut way = 0;
    while let Some((prefix, rest)) = bytes.split_first_chunk() {
        let len = Setup::body_len(*prefix);
        way = trace(way, len.as_ref().err());
        let Ok(len) = len else { break };
        assert!(len <= SETUP_BYTES_MAX);
        let Some((body, rest)) = rest.split_at_checked(len) else {
            break;
        };
        let message = Setup::decode(body);
        way = trace(way ^ u64::from(body[0]), message.as_ref().err());
        if let Ok(message) = message {
            let again = message.encode();
            assert_eq!(&again[prefix.len()..], body, "a set-up message has one form only");
        }
        bytes = rest;
    }
    way
}

/// A sequence of operations on credit, sequencer, tag matcher and fences.
pub fn session(bytes: &[u8]) -> u64 {
    let bytes = &bytes[..bytes.len().min(SESSION_BYTES_MAX)];
    let mut input = Input(bytes);
    let (Some(window), Some(start)) = (input.u16(), input.u32()) else {
        return 0;
    };
    let mut credit = Credit::new(window.into());
    let mut order = Order::new(start);
    let mut tags = Tags::new(start);
    let mut fences = Fences::default();
    // One bit for each pair of operation and outcome seen.
    let mut way = 1;
    while let Some(op) = input.u8() {
        let op = op % 16;
        let outcome = match op {
            0..=4 => credit.step(op, &mut input),
            5..=7 => order.step(op, &mut input),
            8..=13 => tags.step(op, &mut input),
            _ => fences.step(op, &mut input),
        };
        let Some(outcome) = outcome else { break };
        way |= 1 << (op * 2 + u8::from(outcome));
    }
    credit.finish();
    order.finish();
    tags.finish();
    way
}

/// Two sides of a window that keep the rules, and what each would answer to one that does not.
struct Credit {
    window: u64,
    send: SendCredit,
    recv: RecvCredit,
    flying: VecDeque<u64>,
    held: VecDeque<u64>,
}

impl Credit {
    fn new(window: u64) -> Self {
        let (send, recv) = (SendCredit::new(window), RecvCredit::new(window));
        Credit { window, send, recv, flying: VecDeque::new(), held: VecDeque::new() }
    }

    /// Does one operation; says whether it did something, or `None` at the input's end.
    fn step(&mut self, op: u8, input: &mut Input<'_>) -> Option<bool> {
        let outcome = match op {
            0 => self.take(message_cost(input.u16()?.into(), input.u8()?.into())),
            1 => self.deliver(input.u8()?.into()),
            2 => self.consume(),
            3 => self.report(input.u8()? & 1 == 1),
            _ => self.forge(input.u64()?),
        };
        let held: u64 = self.held.iter().sum();
        assert_eq!(self.recv.resident(), held);
        assert!(held <= self.window || self.held.len() == 1);
        assert!(self.send.outstanding() >= held + self.flying.iter().sum::<u64>());
        Some(outcome)
    }

    fn take(&mut self, cost: u64) -> bool {
        let fits = cost <= self.send.available() || self.send.outstanding() == 0;
        let taken = self.send.try_take(cost);
        assert_eq!(taken, fits);
        if taken {
            self.flying.push_back(cost);
        }
        taken
    }

    fn deliver(&mut self, which: usize) -> bool {
        let cost = self.flying.remove(which % self.flying.len().max(1));
        if let Some(cost) = cost {
            self.recv.charge(cost).expect("the sender kept to its credit");
            self.held.push_back(cost);
        }
        cost.is_some()
    }

    fn consume(&mut self) -> bool {
        let cost = self.held.pop_front();
        if let Some(cost) = cost {
            self.recv.consume(cost);
        }
        cost.is_some()
    }

    fn report(&mut self, starved: bool) -> bool {
        let report = self.recv.take_due(starved);
        if let Some(report) = report {
            self.send.grant(report).expect("a true report");
        }
        report.is_some()
    }

    /// What a dishonest other side might say; answered by copies.
    fn forge(&self, value: u64) -> bool {
        let mut send = self.send.clone();
        let granted = send.grant(value).is_ok();
        if granted {
            assert!(send.outstanding() <= self.send.outstanding());
        }
        for cost in [value, tag_cost(value), message_cost(value, value as u32)] {
            let mut recv = self.recv.clone();
            if recv.charge(cost).is_ok() {
                let alone = recv.resident() == cost;
                assert!(recv.resident() <= self.window || alone);
            }
        }
        granted
    }

    fn finish(mut self) {
        while !self.flying.is_empty() {
            self.deliver(0);
        }
        while !self.held.is_empty() {
            self.consume();
        }
        self.report(true);
        assert_eq!(self.send.outstanding(), 0, "a starved sender gets everything back");
    }
}

/// A sequencer beside a map of unwrapped numbers.
struct Order {
    start: u32,
    next: u64,
    sequencer: Sequencer<u64>,
    model: BTreeMap<u64, u64>,
}

impl Order {
    fn new(start: u32) -> Self {
        Order { start, next: 0, sequencer: Sequencer::starting_at(start), model: BTreeMap::new() }
    }

    /// Does one operation; says whether it did something, or `None` at the input's end.
    fn step(&mut self, op: u8, input: &mut Input<'_>) -> Option<bool> {
        let outcome = match op {
            5 => self.insert(i64::from(input.u8()? as i8)),
            6 => self.insert(i64::from(input.u32()? as i32)),
            _ => self.pop(),
        };
        assert_eq!(self.sequencer.len(), self.model.len());
        assert_eq!(self.sequencer.next(), self.start.wrapping_add(self.next as u32));
        Some(outcome)
    }

    fn insert(&mut self, ahead: i64) -> bool {
        let seq = self.sequencer.next().wrapping_add(ahead as u32);
        let number = self.next.wrapping_add_signed(ahead);
        let in_window = (0..i64::from(SEQUENCE_WINDOW)).contains(&ahead);
        let fresh = in_window && !self.model.contains_key(&number);
        assert_eq!(self.sequencer.insert(seq, number).is_ok(), fresh);
        if fresh {
            self.model.insert(number, number);
        }
        fresh
    }

    fn pop(&mut self) -> bool {
        let expected = self.model.remove(&self.next);
        assert_eq!(self.sequencer.peek_mut().copied(), expected);
        assert_eq!(self.sequencer.pop(), expected);
        self.next += u64::from(expected.is_some());
        expected.is_some()
    }

    fn finish(mut self) {
        while self.pop() {}
        assert!(self.sequencer.drain().eq(self.model.into_values()));
    }
}

/// A tag matcher beside its model.
struct Tags {
    start: u32,
    matcher: TagMatcher<u32, u32>,
    model: Model,
    matched: Vec<(u32, u64)>,
    next_recv: u32,
    next_seq: u32,
}

impl Tags {
    fn new(start: u32) -> Self {
        let (matcher, model) = (TagMatcher::new(), Model::default());
        Tags { start, matcher, model, matched: Vec::new(), next_recv: 0, next_seq: 0 }
    }

    /// Does one operation; says whether it did something, or `None` at the input's end.
    fn step(&mut self, op: u8, input: &mut Input<'_>) -> Option<bool> {
        let outcome = match op {
            8 => self.post(input.u8()?.into(), u64::MAX),
            9 => self.post(input.u8()?.into(), input.u8()?.into()),
            10 | 11 => self.arrive(input.u8()?.into()),
            12 => self.put_back(input.u8()?.into()),
            _ => {
                let recv = input.u8()?.into();
                let withdrawn = self.matcher.withdraw(recv);
                assert_eq!(withdrawn, self.model.withdraw(recv));
                withdrawn
            }
        };
        assert_eq!(self.matcher.posted_len(), self.model.posted.len());
        assert_eq!(self.matcher.unexpected_len(), self.model.stored.len());
        Some(outcome)
    }

    fn wire(&self, seq: u32) -> u32 {
        self.start.wrapping_add(seq)
    }

    fn post(&mut self, tag: u64, mask: u64) -> bool {
        let recv = self.next_recv;
        self.next_recv += 1;
        let expected = self.model.post(tag, mask, recv);
        self.matched.extend(expected);
        let expected =
            expected.map(|(value, tag)| Unexpected { seq: self.wire(value), tag, value });
        assert_eq!(self.matcher.post(tag, mask, recv), expected);
        expected.is_some()
    }

    fn arrive(&mut self, tag: u64) -> bool {
        let seq = self.next_seq;
        self.next_seq += 1;
        let found = self.matcher.arrive(self.wire(seq), tag);
        assert_eq!(found, self.model.arrive(tag));
        if found.is_some() {
            self.matched.push((seq, tag));
        } else {
            self.matcher.store(self.wire(seq), tag, seq);
            self.model.stored.push((seq, tag));
        }
        found.is_some()
    }

    fn put_back(&mut self, which: usize) -> bool {
        if which >= self.matched.len() {
            return false;
        }
        let (seq, tag) = self.matched.swap_remove(which);
        let expected = self.model.arrive(tag).map(|recv| (recv, seq));
        assert_eq!(self.matcher.put_back(self.wire(seq), tag, seq), expected);
        if expected.is_some() {
            self.matched.push((seq, tag));
        } else {
            self.model.stored.push((seq, tag));
        }
        expected.is_some()
    }

    fn finish(mut self) {
        self.model.stored.sort_unstable();
        let stored: Vec<_> = self.matcher.drain_unexpected().map(|u| (u.value, u.tag)).collect();
        assert_eq!(stored, self.model.stored);
        let posted = self.model.posted.into_iter().map(|(_, _, recv)| recv);
        assert!(self.matcher.drain_posted().eq(posted));
    }
}

/// Fences beside a list. An input is too short for the counts to wrap.
#[derive(Default)]
struct Fences {
    ledger: FenceLedger,
    model: VecDeque<(u32, u32)>,
    asked: u32,
    done: u32,
}

impl Fences {
    /// Does one operation; says whether it did something, or `None` at the input's end.
    fn step(&mut self, op: u8, input: &mut Input<'_>) -> Option<bool> {
        let outcome = if op == 14 {
            self.request(input.u8()?.into())
        } else {
            self.progress(input.u8()?.into())
        };
        assert_eq!(self.ledger.len(), self.model.len());
        Some(outcome)
    }

    fn request(&mut self, ahead: u32) -> bool {
        let target = self.done.wrapping_add(ahead);
        let room = self.model.len() < FENCES_MAX;
        assert_eq!(self.ledger.request(self.asked, target, self.done).is_ok(), room);
        if room {
            self.model.push_back((self.asked, target));
        }
        self.asked += 1;
        room
    }

    fn progress(&mut self, by: u32) -> bool {
        self.done = self.done.wrapping_add(by);
        let before = self.model.len();
        while let Some(id) = self.ledger.progress(self.done, self.done) {
            let (expected, target) = self.model.pop_front().expect("no more than were asked");
            assert_eq!(id, expected);
            assert!(target <= self.done);
        }
        let waits = self.model.front().is_none_or(|&(_, target)| target > self.done);
        assert!(waits, "what is reached is answered");
        self.model.len() < before
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn sessions_hold(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            super::session(&bytes);
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            super::head(&bytes);
            super::hello(&bytes);
            super::setup(&bytes);
        }
    }
}
