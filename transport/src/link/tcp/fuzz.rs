//! What fuzzing calls: whatever a peer may write to the connection, frame by frame and as a whole
//! stream. Panics only if this crate is wrong.

use std::collections::{HashMap, HashSet};
use std::io;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::wire::{Frame, FrameKind, HEADER_BYTES, decode};
use super::{ByteStream, TcpLink, TcpOptions, total};
use crate::error::LinkError;
use crate::fuzz_input::{Seed, mix};
use crate::link::{
    Arrival, Budget, Class, Disposition, How, Landing, Link, OpId, PayloadId, Post, Segment,
    SegmentMut, Sink,
};
use crate::memory::MemoryKind;

/// The longest payload that the link under test accepts.
const PAYLOAD_MAX: u64 = 1 << 16;
/// The sink takes no more than this into memory; the rest it does not want.
const LANDED_MAX_BYTES: u64 = 4 << 20;
/// Bit of an input's first byte: held offers are answered between polls, so that what happens
/// depends on how the stream is cut.
const LATE: u8 = 0x80;
/// Offers that the link under test has made: a peer may pull or refuse numbers 1 to this.
const OFFERED: u32 = 3;

/// A frame's header.
pub(crate) fn frame(bytes: &[u8]) -> u64 {
    let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else { return 0 };
    match decode(header, PAYLOAD_MAX) {
        Ok(frame) => {
            assert_eq!(&frame.encode(), header, "a header has one form only");
            mix(1, &[header[0], header[1]])
        }
        Err(what) => mix(2, what.as_bytes()),
    }
}

/// A policy, how to cut, and a stream. However it is cut, the same must come of it.
pub(crate) fn stream(bytes: &[u8]) -> u64 {
    let [policy, cut, bytes @ ..] = bytes else { return 0 };
    let (whole, well) = Session::run(*policy, usize::MAX, bytes);
    if policy & LATE == 0 {
        let (pieces, _) = Session::run(*policy, usize::from(*cut) + 1, bytes);
        assert_eq!(whole, pieces, "the cuts of a stream have no meaning");
    }
    mix(whole.way(), &[well])
}

/// A stream that gives at most `cut` bytes at a time and takes everything.
struct Cut<'a> {
    left: &'a [u8],
    cut: usize,
}

impl ByteStream for Cut<'_> {
    unsafe fn try_read(&mut self, into: &[libc::iovec]) -> io::Result<usize> {
        let mut budget = self.cut.min(self.left.len());
        let mut count = 0;
        for vector in into {
            let take = vector.iov_len.min(budget);
            let (now, later) = self.left.split_at(take);
            // SAFETY: the vector is valid for writes, by this function's contract, and has room
            // for `take` bytes.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), vector.iov_base.cast(), take) };
            self.left = later;
            budget -= take;
            count += take;
        }
        Ok(count)
    }

    unsafe fn try_write(&mut self, from: &[libc::iovec]) -> io::Result<usize> {
        Ok(total(from))
    }

    unsafe fn poll_read(
        &mut self,
        _cx: &mut Context<'_>,
        into: &[libc::iovec],
    ) -> Poll<io::Result<usize>> {
        // SAFETY: the same contract.
        Poll::Ready(unsafe { self.try_read(into) })
    }

    unsafe fn poll_write(
        &mut self,
        _cx: &mut Context<'_>,
        from: &[libc::iovec],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(total(from)))
    }

    fn poll_readable(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_writable(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn owes(&mut self) -> bool {
        false
    }

    fn unanswered_for(&mut self) -> Option<Duration> {
        None
    }

    fn shutdown(&mut self) {}
}

/// What became of one parcel.
#[derive(Debug, PartialEq)]
struct Seen {
    head: Vec<u8>,
    len: u64,
    offered: bool,
    /// The payload, if it was wanted and came whole.
    bytes: Option<Vec<u8>>,
}

/// All that came of a stream.
#[derive(Debug, PartialEq)]
struct Outcome {
    seen: Vec<Seen>,
    counted: (u64, u64),
    end: String,
}

impl Outcome {
    fn way(&self) -> u64 {
        let shape = |seen: &Seen| [seen.offered.into(), seen.bytes.is_some().into()];
        let shapes: HashSet<[u8; 2]> = self.seen.iter().map(shape).collect();
        let mut shapes: Vec<_> = shapes.into_iter().collect();
        shapes.sort_unstable();
        mix(mix(0, shapes.as_flattened()), self.end.as_bytes())
    }
}

/// Where landings go: freed only when the link is gone.
struct Session {
    policy: u8,
    seen: Vec<Seen>,
    landing: HashMap<u32, (usize, Vec<u8>)>,
    held: Vec<(PayloadId, u64, usize)>,
    wanted_bytes: u64,
    next_op: u32,
    open: HashSet<u32>,
    /// Own offers that ended well: those that were pulled and written before the end.
    answered_well: u8,
}

/// Operations of the session's own are numbered from here on; offers of its own below.
const FIRST_LANDING: u32 = 1000;

impl Session {
    fn run(policy: u8, cut: usize, bytes: &[u8]) -> (Outcome, u8) {
        let mut session = Session {
            policy,
            seen: Vec::new(),
            landing: HashMap::new(),
            held: Vec::new(),
            wanted_bytes: 0,
            next_op: FIRST_LANDING,
            open: HashSet::new(),
            answered_well: 0,
        };
        let options = TcpOptions { max_payload: PAYLOAD_MAX, ..TcpOptions::default() };
        let mut link = TcpLink::with_stream(Cut { left: bytes, cut }, Vec::new(), options);
        let payload = [7u8; 3000];
        for index in 1..=OFFERED {
            let from = Segment {
                ptr: payload.as_ptr(),
                len: payload.len(),
                kind: MemoryKind::Host,
                shared: None,
            };
            let op = OpId { index, generation: 0 };
            let posted = link.post(op, Class::Tag, How::Offer, b"offer", &[from]);
            assert!(matches!(posted, Ok(Post::Pending)), "nobody has pulled it yet");
            session.open.insert(index);
        }
        let error = session.turns(&mut link, bytes.len());
        link.kill(&error, &mut session);
        assert!(session.open.is_empty(), "not reported: {:?}", session.open);
        let counters = link.counters();
        let outcome = Outcome {
            seen: session.seen,
            counted: (counters.parcels_received, counters.inline_bytes_received),
            end: error.detail.clone(),
        };
        (outcome, session.answered_well)
    }

    /// Polls until the link ends, which it does at the latest with the stream.
    fn turns(&mut self, link: &mut TcpLink<Cut<'_>>, len: usize) -> LinkError {
        // Each either takes a byte or works off what the budget left.
        for _ in 0..2 * len + 100 {
            let mut cx = Context::from_waker(Waker::noop());
            if let Err(error) = link.poll(&mut cx, true, &mut Budget::TURN.clone(), self) {
                return error;
            }
            if self.policy & LATE != 0 {
                self.answer_held(link);
            }
        }
        panic!("the end of the stream is not noticed");
    }

    fn answer_held(&mut self, link: &mut TcpLink<Cut<'_>>) {
        for (payload, len, at) in std::mem::take(&mut self.held) {
            if at % 2 == 0 {
                link.release(payload);
                continue;
            }
            let (to, op) = self.landing(len, at);
            match link.land(payload, to, op).expect("it is held") {
                Post::Done => self.done(op, Ok(())),
                Post::Pending => {}
                Post::Full => panic!("landings always have room"),
            }
        }
    }

    fn landing(&mut self, len: u64, at: usize) -> (Landing, OpId) {
        let op = OpId { index: self.next_op, generation: 0 };
        self.next_op += 1;
        self.open.insert(op.index);
        let mut memory = vec![0; len as usize];
        let (front, back) = memory.split_at_mut(len as usize / 3);
        let to = [front, back].map(|piece| SegmentMut {
            ptr: piece.as_mut_ptr(),
            len: piece.len(),
            kind: MemoryKind::Host,
        });
        self.landing.insert(op.index, (at, memory));
        (to.into_iter().collect(), op)
    }
}

impl Sink for Session {
    fn parcel(&mut self, arrival: Arrival<'_>) -> Disposition {
        let at = self.seen.len();
        let offered = arrival.how == How::Offer;
        let mut seen = Seen { head: arrival.head.to_vec(), len: arrival.len, offered, bytes: None };
        assert!(arrival.len <= PAYLOAD_MAX);
        let choice = self.policy.rotate_left(at as u32 % 7) & 3;
        let wanted = choice != 0 && self.wanted_bytes + arrival.len <= LANDED_MAX_BYTES;
        if wanted {
            self.wanted_bytes += arrival.len;
        }
        let disposition = match arrival.inline {
            Some(bytes) => {
                assert_eq!(bytes.len() as u64, arrival.len);
                seen.bytes = wanted.then(|| bytes.to_vec());
                Disposition::Taken
            }
            None if offered && choice == 1 => {
                if wanted {
                    self.held.push((arrival.payload, arrival.len, at));
                }
                Disposition::Hold
            }
            None if wanted => {
                let (to, op) = self.landing(arrival.len, at);
                Disposition::Land { to, op, lasting: true }
            }
            None => Disposition::Discard,
        };
        self.seen.push(seen);
        disposition
    }

    fn done(&mut self, op: OpId, result: Result<(), LinkError>) {
        assert!(self.open.remove(&op.index), "{op:?} is reported and not open");
        if op.index < FIRST_LANDING {
            self.answered_well += u8::from(result.is_ok());
        } else if result.is_ok()
            && let Some((at, memory)) = self.landing.get_mut(&op.index)
        {
            self.seen[*at].bytes = Some(std::mem::take(memory));
        }
    }
}

/// Inputs to start from.
pub(crate) fn seeds() -> Vec<Seed> {
    let mut out = Vec::new();
    let frame = |kind, class, id, head: &[u8], len: u64, body: &[u8]| {
        let head_len = head.len() as u16;
        [&Frame { kind, class, head_len, id, len }.encode()[..], head, body].concat()
    };
    use Class::{Control, Message, OneSided, Tag};
    use FrameKind::{Chunk, Offer, Parcel, Pull, Refuse, Start};
    let short = frame(Parcel, Message, 0, b"head", 5, b"hello");
    let long = frame(Parcel, Message, 0, b"head", 5000, &[5; 5000]);
    let start = frame(Start, OneSided, 0, b"h", 6000, &[]);
    let chunk = frame(Chunk, OneSided, 0, &[], 3000, &[6; 3000]);
    let offer = frame(Offer, Tag, 9, b"tag", 4000, &[]);
    let pulled = frame(Chunk, Tag, 9, &[], 4000, &[7; 4000]);
    let answers: Vec<u8> = [Pull, Refuse, Pull, Pull]
        .iter()
        .zip([1, 2, 3, 3])
        .flat_map(|(kind, id)| frame(*kind, Control, id, &[], 0, &[]))
        .collect();
    let mut add = |name: &str, policy: u8, cut: u8, frames: &[&[u8]]| {
        let bytes = [&[policy, cut][..], &frames.concat()].concat();
        out.push(("tcp-stream", name.to_owned(), bytes));
    };
    let empty = frame(Parcel, Control, 0, b"c", 0, &[]);
    add("parcels", 0xff, 6, &[&short, &empty, &long, &short]);
    add("parcels-unwanted", 0, 16, &[&short, &empty, &long, &short]);
    add("chunks-between-parcels", 0xff, 40, &[&start, &chunk, &short, &chunk, &short]);
    add("chunk-too-long", 0xff, 1, &[&start, &chunk, &chunk, &chunk]);
    add("chunk-of-nothing", 0xff, 1, &[&chunk]);
    add("start-within-start", 0xff, 3, &[&start, &start]);
    add("offer-landed", 0xff, 200, &[&offer, &pulled, &short]);
    add("offer-held", 0x55, 200, &[&offer, &short, &offer]);
    add("offer-held-late", 0xd5, 15, &[&offer, &short, &pulled, &short]);
    add("offer-unwanted", 0, 15, &[&offer, &pulled]);
    add("answers", 0xff, 7, &[&answers[..3 * HEADER_BYTES]]);
    add("answers-twice", 0xff, 7, &[&answers]);
    add("cut-in-a-head", 0xff, 2, &[&long[..18]]);
    add("cut-in-a-payload", 0xff, 2, &[&long[..3000]]);
    let http = b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n";
    add("http", 0xff, 2, &[http]);
    for (name, bytes) in [
        ("parcel", &short),
        ("start", &start),
        ("chunk", &chunk),
        ("offer", &offer),
        ("pull", &answers),
        ("bad-http", &http.to_vec()),
        ("bad-kind", &vec![0; HEADER_BYTES]),
        ("bad-class", &[&[1, 4][..], &[0; 14]].concat()),
        ("bad-short", &short[..HEADER_BYTES - 1].to_vec()),
    ] {
        let bytes = bytes[..bytes.len().min(HEADER_BYTES)].to_vec();
        out.push(("tcp-frame", name.to_owned(), bytes));
    }
    out
}
