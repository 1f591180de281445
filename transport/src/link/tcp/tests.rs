use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use smallvec::smallvec;

use super::rx::{BUFFER_BYTES, INLINE_MAX};
use super::tx::{OFFERS_MAX, QUEUE_MAX};
use super::wire::{Frame, FrameKind, HEADER_BYTES, decode};
use super::*;
use crate::link::{Arrival, COPIED_MAX, Disposition, SegmentMut};
use crate::memory::MemoryKind;
use crate::runtime::{Fd, Interest, Reactor};

const MAX_PAYLOAD: u64 = 1 << 26;

fn op(index: u32) -> OpId {
    OpId { index, generation: 1 }
}

fn options() -> TcpOptions {
    TcpOptions { chunk_bytes: 8192, max_payload: MAX_PAYLOAD, ..TcpOptions::default() }
}

fn link_over(socket: impl Into<OwnedFd>, options: TcpOptions) -> TcpLink {
    let reactor = Reactor::Tokio(tokio::runtime::Handle::current());
    let source = reactor.source(Fd::new(socket.into()), Interest::ReadWrite).unwrap();
    TcpLink::new(source, Vec::new(), options)
}

/// A link and the bare other end of its stream.
fn link_and_peer(options: TcpOptions) -> (TcpLink, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_nonblocking(true).unwrap();
    (link_over(near, options), far)
}

fn tcp_pair(buffer_bytes: Option<usize>) -> (std::net::TcpStream, std::net::TcpStream) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let near = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    let second = Duration::from_secs(1);
    let keepalive = Keepalive { idle: second, interval: second, retries: 5 };
    for socket in [&near, &far] {
        socket.set_nonblocking(true).unwrap();
        configure_socket(socket, keepalive, buffer_bytes).unwrap();
    }
    (near, far)
}

/// Two links over TCP, or over a stream that takes no more than about `buffer_bytes` at a time.
/// (TCP with small buffers waits for timers of the kernel.)
fn links(buffer_bytes: Option<usize>, options: TcpOptions) -> (TcpLink, TcpLink) {
    let Some(buffer_bytes) = buffer_bytes else {
        let (near, far) = tcp_pair(None);
        return (link_over(near, options.clone()), link_over(far, options));
    };
    let (near, far) = UnixStream::pair().unwrap();
    for socket in [&near, &far] {
        socket.set_nonblocking(true).unwrap();
        socket2::SockRef::from(socket).set_send_buffer_size(buffer_bytes).unwrap();
    }
    (link_over(near, options.clone()), link_over(far, options))
}

fn bytes(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|index| (index as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3] ^ seed)
        .collect()
}

fn segment(bytes: &[u8]) -> Segment<'static> {
    Segment { ptr: bytes.as_ptr(), len: bytes.len(), kind: MemoryKind::Host, shared: None }
}

/// What a test does with arrivals.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Plan {
    Land,
    Take,
    Hold,
    Discard,
}

struct Received {
    head: Vec<u8>,
    len: u64,
    payload: PayloadId,
    inline: bool,
    how: How,
    bytes: Vec<u8>,
    op: OpId,
}

/// Lands every payload in memory of its own, in two pieces, unless told otherwise.
struct Recorder {
    plan: Plan,
    received: Vec<Received>,
    done: Vec<(OpId, Result<(), LinkError>)>,
}

const LANDING: u32 = 1 << 20;

impl Recorder {
    fn new(plan: Plan) -> Self {
        Recorder { plan, received: Vec::new(), done: Vec::new() }
    }

    fn is_done(&self, op: OpId) -> bool {
        self.done.iter().any(|(done, _)| *done == op)
    }

    fn landed(&self, index: usize) -> bool {
        self.received.get(index).is_some_and(|one| one.len == 0 || self.is_done(one.op))
    }
}

fn in_two(bytes: &mut [u8]) -> Landing {
    let (front, back) = bytes.split_at_mut(bytes.len() / 3);
    [front, back]
        .into_iter()
        .map(|part| SegmentMut { ptr: part.as_mut_ptr(), len: part.len(), kind: MemoryKind::Host })
        .collect()
}

impl Sink for Recorder {
    fn parcel(&mut self, arrival: Arrival<'_>) -> Disposition {
        let op = op(LANDING + self.received.len() as u32);
        let inline = arrival.inline.is_some();
        let mut bytes = vec![0; arrival.len as usize];
        let disposition = match self.plan {
            Plan::Land => Disposition::Land { to: in_two(&mut bytes), op, lasting: true },
            Plan::Take => {
                if let Some(inline) = arrival.inline {
                    bytes.copy_from_slice(inline);
                    Disposition::Taken
                } else {
                    Disposition::Land { to: in_two(&mut bytes), op, lasting: true }
                }
            }
            Plan::Hold if arrival.how == How::Offer => Disposition::Hold,
            Plan::Hold | Plan::Discard => Disposition::Discard,
        };
        self.received.push(Received {
            head: arrival.head.to_vec(),
            len: arrival.len,
            payload: arrival.payload,
            inline,
            how: arrival.how,
            bytes,
            op,
        });
        disposition
    }

    fn done(&mut self, op: OpId, result: Result<(), LinkError>) {
        assert!(!self.is_done(op), "{op:?} was reported twice");
        self.done.push((op, result));
    }
}

fn nobody() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

fn turn(link: &mut TcpLink, sink: &mut Recorder) -> Result<Progress, LinkError> {
    link.poll(&mut nobody(), true, &mut Budget::TURN.clone(), sink)
}

/// Turns both ends until `until` says so.
fn run(
    near: (&mut TcpLink, &mut Recorder),
    far: (&mut TcpLink, &mut Recorder),
    mut until: impl FnMut(&Recorder, &Recorder) -> bool,
) {
    let start = Instant::now();
    while !until(near.1, far.1) {
        turn(near.0, near.1).unwrap();
        turn(far.0, far.1).unwrap();
        assert!(start.elapsed() < Duration::from_secs(20), "nothing happens any more");
    }
}

/// Turns a link until it fails.
fn failure(link: &mut TcpLink, sink: &mut Recorder) -> LinkError {
    let start = Instant::now();
    loop {
        if let Err(error) = turn(link, sink) {
            return error;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "the link does not fail");
    }
}

fn frame(kind: FrameKind, class: Class, id: u32, head: &[u8], len: u64) -> Vec<u8> {
    let header = Frame { kind, class, head_len: head.len() as u16, id, len }.encode();
    [&header, head].concat()
}

#[test]
fn headers_survive_and_nonsense_is_refused() {
    let good =
        Frame { kind: FrameKind::Offer, class: Class::Tag, head_len: 9, id: 7, len: 1 << 20 };
    assert_eq!(decode(&good.encode(), MAX_PAYLOAD), Ok(good));
    let refused = |kind, class, id, head_len: usize, len| {
        let bytes = frame(kind, class, id, &vec![0; head_len], len);
        decode(bytes.first_chunk().unwrap(), MAX_PAYLOAD).unwrap_err()
    };
    use Class::{Control, Message};
    use FrameKind::{Chunk, Offer, Parcel, Pull, Refuse, Start};
    assert_eq!(refused(Parcel, Message, 0, HEAD_MAX + 1, 0), "head too long");
    assert_eq!(refused(Parcel, Message, 0, 0, MAX_PAYLOAD + 1), "payload over the limit");
    assert_eq!(refused(Parcel, Message, 1, 0, 0), "parcel with an offer's id");
    assert_eq!(refused(Start, Message, 0, 0, 0), "empty stream");
    assert_eq!(refused(Chunk, Message, 0, 0, 0), "empty stream");
    assert_eq!(refused(Chunk, Message, 0, 1, 1), "head where none belongs");
    assert_eq!(refused(Offer, Message, 0, 0, 1), "offer without id");
    assert_eq!(refused(Pull, Control, 0, 0, 0), "offer without id");
    assert_eq!(refused(Pull, Control, 1, 0, 1), "answer with a payload");
    assert_eq!(refused(Refuse, Message, 1, 0, 0), "answer outside control");
    let mut bytes = good.encode();
    bytes[0] = 7;
    assert_eq!(decode(&bytes, MAX_PAYLOAD), Err("unknown frame kind"));
    bytes[0] = 1;
    bytes[1] = 4;
    assert_eq!(decode(&bytes, MAX_PAYLOAD), Err("unknown class"));
}

#[test]
fn decoding_never_panics() {
    let mut state = 1u64;
    for _ in 0..200_000 {
        let mut bytes = [0; HEADER_BYTES];
        for byte in &mut bytes {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (state >> 61) as u8;
        }
        if let Ok(frame) = decode(&bytes, u64::MAX) {
            assert_eq!(frame.encode(), bytes);
        }
    }
}

#[tokio::test]
async fn payloads_of_every_size_arrive() {
    for plan in [Plan::Land, Plan::Take] {
        let (mut near, mut far) = links(None, options());
        let (mut near_sink, mut far_sink) = (Recorder::new(plan), Recorder::new(plan));
        let edges = [0, INLINE_MAX, BUFFER_BYTES, 8192, 16384, FLAT_MAX, 1024, 1 << 20];
        let sizes: Vec<usize> = edges
            .iter()
            .flat_map(|edge| [edge.saturating_sub(41), edge.saturating_sub(1), *edge, edge + 1])
            .collect();
        for (index, size) in sizes.iter().enumerate() {
            let payload = bytes(*size, index as u8);
            let head = bytes(index % 50, 3);
            let id = op(index as u32);
            let segments = [segment(&payload[..size / 2]), segment(&payload[size / 2..])];
            let post = near.post(id, Class::Message, How::Eager, &head, &segments).unwrap();
            run((&mut near, &mut near_sink), (&mut far, &mut far_sink), |near, far| {
                (post == Post::Done || near.is_done(id)) && far.received.len() > index && {
                    let one = &far.received[index];
                    (plan == Plan::Take && one.inline) || far.is_done(one.op)
                }
            });
            let one = &far_sink.received[index];
            assert_eq!((&one.head, one.len), (&head, *size as u64));
            assert!(one.bytes == payload, "{size} bytes differ");
            assert!(one.inline || *size > INLINE_MAX);
        }
        assert!(near.flushed());
        assert_eq!(near.counters().parcels_sent, sizes.len() as u64);
        assert_eq!(near.counters().inline_bytes_sent, far.counters().inline_bytes_received);
    }
}

#[tokio::test]
async fn the_longest_head_arrives() {
    let (mut near, mut far) = links(None, options());
    let mut sink = Recorder::new(Plan::Take);
    let head = bytes(HEAD_MAX, 9);
    let payload = bytes(INLINE_MAX, 4);
    near.post(op(1), Class::Control, How::Eager, &head, &[segment(&payload)]).unwrap();
    run((&mut near, &mut Recorder::new(Plan::Take)), (&mut far, &mut sink), |_, far| {
        !far.received.is_empty()
    });
    assert_eq!((&sink.received[0].head, &sink.received[0].bytes), (&head, &payload));
    assert!(near.post(op(2), Class::Control, How::Eager, &[0; HEAD_MAX + 1], &[]).is_err());
}

#[tokio::test]
async fn thousands_of_segments_arrive() {
    for (count, len) in [(5000, 7), (5000, 300), (1023, 2000), (1025, 1), (200, 20)] {
        let (mut near, mut far) = links(None, TcpOptions { chunk_bytes: 1 << 19, ..options() });
        let (mut near_sink, mut far_sink) = (Recorder::new(Plan::Land), Recorder::new(Plan::Land));
        let payload = bytes(count * len, 1);
        let segments: Vec<_> = payload.chunks(len).map(segment).collect();
        let post = near.post(op(1), Class::Message, How::Eager, b"head", &segments).unwrap();
        run((&mut near, &mut near_sink), (&mut far, &mut far_sink), |near, far| {
            (post == Post::Done || near.is_done(op(1))) && far.landed(0)
        });
        assert!(far_sink.received[0].bytes == payload);
    }
}

#[tokio::test]
async fn partial_writes_lose_nothing() {
    let (mut near, mut far) = links(Some(4096), options());
    let (mut near_sink, mut far_sink) = (Recorder::new(Plan::Take), Recorder::new(Plan::Take));
    let payloads: Vec<_> = (0..300).map(|i| bytes((i * 977) % 30_000, i as u8)).collect();
    let mut pending = Vec::new();
    for (index, payload) in payloads.iter().enumerate() {
        let head = (index as u32).to_le_bytes();
        let segments = [segment(payload)];
        let id = op(index as u32);
        if near.post(id, Class::Message, How::Eager, &head, &segments).unwrap() == Post::Pending {
            pending.push(id);
        }
    }
    assert!(pending.len() > 100, "the socket's buffer was meant to be too small");
    run((&mut near, &mut near_sink), (&mut far, &mut far_sink), |near, far| {
        near.done.len() == pending.len()
            && (0..300).all(|index| {
                far.received.get(index).is_some_and(|one| one.inline || far.is_done(one.op))
            })
    });
    let order: Vec<_> = near_sink.done.iter().map(|(op, _)| *op).collect();
    assert_eq!(order, pending);
    for (index, payload) in payloads.iter().enumerate() {
        assert_eq!(far_sink.received[index].head, (index as u32).to_le_bytes());
        assert!(far_sink.received[index].bytes == *payload);
    }
}

#[tokio::test]
async fn single_bytes_are_put_together() {
    let (mut link, mut peer) = link_and_peer(options());
    let mut sink = Recorder::new(Plan::Take);
    let (small, large) = (bytes(100, 1), bytes(5000, 2));
    let stream = [
        frame(FrameKind::Parcel, Class::Message, 0, b"one", 100),
        small.clone(),
        frame(FrameKind::Start, Class::Message, 0, b"two", 5000),
        frame(FrameKind::Chunk, Class::Message, 0, b"", 3000),
        large[..3000].to_vec(),
        frame(FrameKind::Parcel, Class::Tag, 0, b"three", 0),
        frame(FrameKind::Chunk, Class::Message, 0, b"", 2000),
        large[3000..].to_vec(),
        frame(FrameKind::Parcel, Class::Message, 0, b"four", 5000),
        large.clone(),
    ]
    .concat();
    for byte in stream {
        peer.write_all(&[byte]).unwrap();
        turn(&mut link, &mut sink).unwrap();
    }
    let heads: Vec<_> = sink.received.iter().map(|one| one.head.as_slice()).collect();
    assert_eq!(heads, [&b"one"[..], b"two", b"three", b"four"]);
    assert!(sink.received[0].bytes == small);
    assert!(sink.received[1].bytes == large && sink.landed(1));
    assert!(sink.received[3].bytes == large && sink.landed(3));
}

#[tokio::test]
async fn what_was_read_before_is_processed_first() {
    let (near, mut peer) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let reactor = Reactor::Tokio(tokio::runtime::Handle::current());
    let source = reactor.source(Fd::new(near.into()), Interest::ReadWrite).unwrap();
    let payload = bytes(20_000, 5);
    let parcel = [frame(FrameKind::Parcel, Class::Message, 0, b"x", 20_000), payload.clone()];
    let stream = parcel.concat().repeat(3);
    let (early, late) = stream.split_at(30_000);
    let mut link = TcpLink::new(source, early.to_vec(), options());
    let mut sink = Recorder::new(Plan::Take);
    assert_eq!(link.arm(&mut nobody()).unwrap(), Armed::Busy);
    turn(&mut link, &mut sink).unwrap();
    assert_eq!(sink.received.len(), 2);
    peer.write_all(late).unwrap();
    turn(&mut link, &mut sink).unwrap();
    assert!((0..3).all(|index| sink.received[index].bytes == payload));
}

#[tokio::test]
async fn control_and_other_classes_overtake_bulk() {
    let (mut near, mut far) = links(Some(4096), options());
    let (mut near_sink, mut far_sink) = (Recorder::new(Plan::Land), Recorder::new(Plan::Land));
    let bulk = bytes(4 << 20, 1);
    let post = |link: &mut TcpLink, index, class, head: &[u8], payload: &[u8]| {
        link.post(op(index), class, How::Eager, head, &[segment(payload)]).unwrap()
    };
    assert_eq!(post(&mut near, 0, Class::Message, b"bulk", &bulk), Post::Pending);
    assert_eq!(post(&mut near, 1, Class::Message, b"after", &[]), Post::Pending);
    post(&mut near, 2, Class::Tag, b"tag", &bulk[..100]);
    post(&mut near, 3, Class::OneSided, b"put", &bulk[..100_000]);
    post(&mut near, 4, Class::Control, b"control", &[]);
    run((&mut near, &mut near_sink), (&mut far, &mut far_sink), |_, far| {
        far.received.len() == 5 && far.landed(4)
    });
    let heads: Vec<_> = far_sink.received.iter().map(|one| one.head.as_slice()).collect();
    assert_eq!(heads, [&b"bulk"[..], b"control", b"tag", b"put", b"after"]);
    let finished: Vec<_> = far_sink.done.iter().map(|(op, _)| op.index - LANDING).collect();
    assert_eq!(finished, [1, 2, 3, 0, 4], "all but `after` end before the bulk");
    assert!(far_sink.received[0].bytes == bulk && far_sink.received[3].bytes == bulk[..100_000]);
}

#[tokio::test]
async fn offers_are_landed_refused_and_held() {
    let (mut near, mut far) = links(None, options());
    let (mut near_sink, mut far_sink) = (Recorder::new(Plan::Hold), Recorder::new(Plan::Hold));
    let payload = bytes(100_000, 6);
    let offer = |near: &mut TcpLink, index, len| {
        let posted =
            near.post(op(index), Class::Tag, How::Offer, b"o", &[segment(&payload[..len])]);
        assert_eq!(posted.unwrap(), Post::Pending);
    };
    for (index, len) in [(0, 100_000), (1, 5), (2, 0), (3, 50_000)] {
        offer(&mut near, index, len);
    }
    run((&mut near, &mut near_sink), (&mut far, &mut far_sink), |_, far| far.received.len() == 4);
    assert!(near_sink.done.is_empty() && near.flushed());
    // Landed out of order, two at once.
    let mut landings = [vec![0; 100_000], vec![0; 5], vec![], vec![0; 50_000]];
    for index in [3, 0, 2] {
        let id = far_sink.received[index].payload;
        let posted = far.land(id, in_two(&mut landings[index]), op(100 + index as u32)).unwrap();
        assert_eq!(posted, if index == 2 { Post::Done } else { Post::Pending });
        assert!(far.land(id, in_two(&mut landings[index]), op(9)).is_err(), "landed twice");
    }
    far.release(far_sink.received[1].payload);
    run((&mut near, &mut near_sink), (&mut far, &mut far_sink), |near, far| {
        near.done.len() == 4 && far.done.len() == 2
    });
    assert!(landings[0] == payload && landings[3] == payload[..50_000]);
    assert!(near_sink.done.iter().chain(&far_sink.done).all(|(_, result)| result.is_ok()));
    // Ids are used again; an offer may also be landed or refused at once.
    far_sink.plan = Plan::Land;
    offer(&mut near, 10, 100_000);
    run((&mut near, &mut near_sink), (&mut far, &mut far_sink), |near, far| {
        near.is_done(op(10)) && far.landed(4)
    });
    assert!(far_sink.received[4].bytes == payload);
    far_sink.plan = Plan::Discard;
    offer(&mut near, 11, 100_000);
    run((&mut near, &mut near_sink), (&mut far, &mut far_sink), |near, _| near.is_done(op(11)));
}

#[tokio::test]
async fn unwanted_payloads_are_drained() {
    let (mut near, mut far) = links(None, options());
    let (mut near_sink, mut far_sink) = (Recorder::new(Plan::Take), Recorder::new(Plan::Discard));
    let payload = bytes(300_000, 6);
    for (index, len) in [10, 6_000, 300_000].into_iter().enumerate() {
        near.post(op(index as u32), Class::Message, How::Eager, b"", &[segment(&payload[..len])])
            .unwrap();
    }
    run((&mut near, &mut near_sink), (&mut far, &mut far_sink), |_, far| far.received.len() == 3);
    far_sink.plan = Plan::Take;
    near.post(op(9), Class::Message, How::Eager, b"next", &[segment(b"payload")]).unwrap();
    run((&mut near, &mut near_sink), (&mut far, &mut far_sink), |_, far| far.received.len() == 4);
    assert_eq!(far_sink.received[3].bytes, b"payload");
    assert!(far_sink.done.is_empty());
}

#[tokio::test]
async fn bulk_fills_and_control_does_not() {
    let (mut near, mut far) = links(Some(4096), options());
    let (mut near_sink, mut far_sink) = (Recorder::new(Plan::Take), Recorder::new(Plan::Take));
    let bulk = bytes(1 << 20, 1);
    let post = |near: &mut TcpLink, id, class, how, payload: &[u8]| {
        near.post(id, class, how, b"h", &[segment(payload)]).unwrap()
    };
    assert_eq!(post(&mut near, op(0), Class::Message, How::Eager, &bulk), Post::Pending);
    let mut accepted = 0;
    while post(&mut near, op(1 + accepted), Class::Tag, How::Eager, b"tiny") == Post::Pending {
        accepted += 1;
    }
    assert_eq!(accepted as usize, QUEUE_MAX);
    assert_eq!(post(&mut near, op(5000), Class::Control, How::Eager, b"c"), Post::Pending);
    run((&mut near, &mut near_sink), (&mut far, &mut far_sink), |near, far| {
        near.done.len() == QUEUE_MAX + 2 && far.received.len() == QUEUE_MAX + 2 && far.landed(0)
    });
    assert!(far_sink.received[0].bytes == bulk);
    assert!(near.counters().stalls > 0);
}

#[tokio::test]
async fn kill_reports_everything_once() {
    let (mut near, mut far) = links(Some(4096), options());
    let (mut near_sink, mut far_sink) = (Recorder::new(Plan::Hold), Recorder::new(Plan::Hold));
    let bulk = bytes(1 << 20, 1);
    let whole = [segment(&bulk)];
    near.post(op(0), Class::Tag, How::Offer, b"held", &whole).unwrap();
    near.post(op(1), Class::Tag, How::Offer, b"pulled", &whole).unwrap();
    run((&mut near, &mut near_sink), (&mut far, &mut far_sink), |_, far| far.received.len() == 2);
    let mut landing = vec![0; 1 << 20];
    far.land(far_sink.received[1].payload, in_two(&mut landing), op(50)).unwrap();
    far_sink.plan = Plan::Land;
    near.post(op(2), Class::Message, How::Eager, b"bulk", &whole).unwrap();
    near.post(op(3), Class::OneSided, How::Eager, b"waits", &whole).unwrap();
    near.post(OpId::NONE, Class::Control, How::Eager, b"control", &[]).unwrap();
    run((&mut near, &mut near_sink), (&mut far, &mut far_sink), |_, far| far.received.len() >= 4);
    let error = LinkError::new(ErrorKind::Closed, LinkKind::Tcp, "over");
    near.kill(&error, &mut near_sink);
    let mut ended: Vec<_> = near_sink.done.iter().map(|(op, _)| op.index).collect();
    ended.sort_unstable();
    assert_eq!(ended, [0, 1, 2, 3]);
    assert!(near_sink.done.iter().all(|(_, result)| result.is_err()));
    assert!(near.post(op(9), Class::Message, How::Eager, b"", &[]).is_err());
    assert!(turn(&mut near, &mut near_sink).is_err() && near.arm(&mut nobody()).is_err());
    let lost = failure(&mut far, &mut far_sink);
    assert!(matches!(lost.kind, ErrorKind::PeerGone | ErrorKind::ConnectionLost), "{lost:?}");
    far.kill(&lost, &mut far_sink);
    let mut ended: Vec<_> = far_sink.done.iter().map(|(op, _)| op.index).collect();
    ended.sort_unstable();
    let landings = far_sink.received[2..].iter().filter(|one| one.how == How::Eager && one.len > 0);
    let mut expected: Vec<_> = landings.map(|one| one.op.index).collect();
    expected
        .extend(far_sink.received[2..].iter().filter(|one| one.len == 0).map(|one| one.op.index));
    expected.push(50);
    expected.sort_unstable();
    assert_eq!(ended, expected);
}

#[tokio::test]
async fn hostile_frames_end_the_link() {
    use Class::{Control, Message, Tag};
    use FrameKind::{Chunk, Offer, Parcel, Pull, Refuse, Start};
    let start = || frame(Start, Message, 0, b"", 10_000);
    let cases = [
        (vec![frame(Pull, Control, 1, b"", 0)], "not open"),
        (vec![frame(Refuse, Control, u32::MAX, b"", 0)], "not open"),
        (vec![frame(Chunk, Message, 0, b"", 1)], "not under way"),
        (vec![frame(Chunk, Message, 3, b"", 1)], "not under way"),
        (vec![frame(Offer, Tag, 3, b"", 9), frame(Chunk, Tag, 3, b"", 1)], "not under way"),
        (vec![frame(Offer, Tag, 3, b"", 9), frame(Offer, Tag, 3, b"", 9)], "in use"),
        (vec![start(), start()], "within another"),
        (vec![start(), frame(Parcel, Message, 0, b"", 0)], "within another"),
        (vec![start(), frame(Chunk, Message, 0, b"", 10_001)], "longer than"),
        (vec![start(), frame(Chunk, Tag, 0, b"", 1)], "not under way"),
        (vec![frame(Parcel, Message, 0, b"", MAX_PAYLOAD + 1)], "over the limit"),
        (vec![frame(Offer, Message, 1, b"", u64::MAX)], "over the limit"),
        (vec![frame(Parcel, Message, 0, &[0; HEAD_MAX + 1], 0)], "head too long"),
        (vec![vec![0xff; 64]], "unknown frame kind"),
    ];
    for (stream, says) in cases {
        let (mut link, mut peer) = link_and_peer(options());
        let mut sink = Recorder::new(Plan::Hold);
        peer.write_all(&stream.concat()).unwrap();
        let error = failure(&mut link, &mut sink);
        assert_eq!(error.kind, ErrorKind::Protocol);
        assert!(error.detail.contains(says), "{} instead of {says}", error.detail);
        assert!(turn(&mut link, &mut sink).is_err(), "the link stays dead");
    }
}

#[tokio::test]
async fn a_pulled_offer_is_not_pulled_again_nor_overrun() {
    let (mut link, mut peer) = link_and_peer(options());
    let mut sink = Recorder::new(Plan::Hold);
    let payload = bytes(1 << 20, 1);
    link.post(op(1), Class::Tag, How::Offer, b"", &[segment(&payload)]).unwrap();
    let pull = frame(FrameKind::Pull, Class::Control, 1, b"", 0);
    peer.write_all(&pull.repeat(2)).unwrap();
    assert_eq!(failure(&mut link, &mut sink).kind, ErrorKind::Protocol);

    let (mut link, mut peer) = link_and_peer(options());
    let mut sink = Recorder::new(Plan::Land);
    peer.write_all(&frame(FrameKind::Offer, Class::Tag, 5, b"", 10)).unwrap();
    turn(&mut link, &mut sink).unwrap();
    peer.write_all(&frame(FrameKind::Chunk, Class::Tag, 5, b"", 11)).unwrap();
    assert!(failure(&mut link, &mut sink).detail.contains("longer than"));
}

#[tokio::test]
async fn a_flood_of_offers_is_bounded() {
    let (mut link, mut peer) = link_and_peer(options());
    let mut sink = Recorder::new(Plan::Hold);
    let error = 'flood: {
        for id in 1..=OFFERS_MAX as u32 + 1 {
            peer.write_all(&frame(FrameKind::Offer, Class::Message, id, b"", 1)).unwrap();
            if let Err(error) = turn(&mut link, &mut sink) {
                break 'flood error;
            }
        }
        panic!("no bound");
    };
    assert!(error.detail.contains("too many open offers"));
    assert_eq!(sink.received.len(), OFFERS_MAX);
}

#[tokio::test]
async fn the_end_of_the_stream_is_told() {
    let (mut link, peer) = link_and_peer(options());
    drop(peer);
    let error = failure(&mut link, &mut Recorder::new(Plan::Land));
    assert_eq!((error.kind, error.link), (ErrorKind::PeerGone, Some(LinkKind::Tcp)));
    assert!(!error.detail.contains("within"));

    let (mut link, mut peer) = link_and_peer(options());
    let mut sink = Recorder::new(Plan::Land);
    peer.write_all(&frame(FrameKind::Parcel, Class::Message, 0, b"", 5000)).unwrap();
    peer.write_all(&[1; 4000]).unwrap();
    drop(peer);
    let error = failure(&mut link, &mut sink);
    assert_eq!(error.kind, ErrorKind::PeerGone);
    assert!(error.detail.contains("within a parcel"));
    link.kill(&error, &mut sink);
    assert_eq!(sink.done.len(), 1);
    assert!(sink.done[0].1.is_err());
}

#[tokio::test]
async fn a_last_word_is_read_although_writing_fails() {
    let (mut link, mut peer) = link_and_peer(options());
    let mut sink = Recorder::new(Plan::Take);
    peer.write_all(&frame(FrameKind::Parcel, Class::Control, 0, b"goodbye", 0)).unwrap();
    drop(peer);
    let post = link.post(op(1), Class::Message, How::Eager, b"", &[]).unwrap();
    assert_eq!(post, Post::Pending);
    assert_eq!(link.arm(&mut nobody()).unwrap(), Armed::Busy);
    let error = failure(&mut link, &mut sink);
    assert_eq!(sink.received[0].head, b"goodbye");
    link.kill(&error, &mut sink);
    assert!(sink.is_done(op(1)));
}

#[tokio::test]
async fn a_budget_is_kept() {
    let (mut link, mut peer) = link_and_peer(options());
    let mut sink = Recorder::new(Plan::Take);
    peer.write_all(&frame(FrameKind::Parcel, Class::Message, 0, b"", 0).repeat(100)).unwrap();
    let mut budget = Budget { parcels: 30, bytes: 1 << 20 };
    assert_eq!(link.poll(&mut nobody(), true, &mut budget, &mut sink).unwrap(), Progress::More);
    assert_eq!(sink.received.len(), 30);
    assert_eq!(link.arm(&mut nobody()).unwrap(), Armed::Busy);
    assert_eq!(turn(&mut link, &mut sink).unwrap(), Progress::Some);
    assert_eq!(sink.received.len(), 100);
    assert_eq!(turn(&mut link, &mut sink).unwrap(), Progress::Idle);
}

/// Polls, arms and sleeps as a driver does.
async fn wait_until(
    link: &mut TcpLink,
    sink: &mut Recorder,
    mut until: impl FnMut(&Recorder) -> bool,
) {
    poll_fn(|cx| {
        loop {
            let progress = link.poll(cx, false, &mut Budget::TURN.clone(), sink).unwrap();
            if until(sink) {
                return Poll::Ready(());
            }
            if progress != Progress::More && link.arm(cx).unwrap() == Armed::Yes {
                return Poll::Pending;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn sleeping_links_are_woken() {
    sleep_and_wake(links(None, options())).await;
    sleep_and_wake(links(Some(4096), options())).await;
}

async fn sleep_and_wake((mut near, mut far): (TcpLink, TcpLink)) {
    let (mut near_sink, mut far_sink) = (Recorder::new(Plan::Land), Recorder::new(Plan::Land));
    let payload = bytes(3 << 20, 1);
    let talk = async {
        for round in 0..3usize {
            let ids = [op(round as u32), op(100 + round as u32)];
            let whole = [segment(&payload)];
            near.post(ids[0], Class::Message, How::Eager, b"m", &whole).unwrap();
            near.post(ids[1], Class::Tag, How::Offer, b"t", &whole).unwrap();
            let sending = wait_until(&mut near, &mut near_sink, |sink| {
                ids.iter().all(|id| sink.is_done(*id))
            });
            let receiving = wait_until(&mut far, &mut far_sink, |sink| {
                sink.landed(2 * round) && sink.landed(2 * round + 1)
            });
            tokio::join!(sending, receiving);
        }
    };
    tokio::time::timeout(Duration::from_secs(20), talk).await.expect("a wake was lost");
    assert!(far_sink.received.iter().all(|one| one.bytes == payload));
}

#[tokio::test]
async fn arming_after_direct_reads_sleeps() {
    let (mut link, mut peer) = link_and_peer(options());
    let mut sink = Recorder::new(Plan::Take);
    let parcel = frame(FrameKind::Parcel, Class::Message, 0, b"", 0);
    peer.write_all(&parcel).unwrap();
    // The runtime sees the edge, the link reads past it.
    wait_until(&mut link, &mut sink, |sink| sink.received.len() == 1).await;
    peer.write_all(&parcel).unwrap();
    tokio::task::yield_now().await;
    turn(&mut link, &mut sink).unwrap();
    assert_eq!(sink.received.len(), 2);
    assert_eq!(link.arm(&mut nobody()).unwrap(), Armed::Yes);
}

#[tokio::test]
async fn a_peer_that_does_not_read_is_alive() {
    let (near, _far) = tcp_pair(Some(4096));
    let options = TcpOptions { unacked_timeout: Duration::from_millis(100), ..options() };
    let mut link = link_over(near, options);
    let payload = bytes(1 << 20, 1);
    link.post(op(1), Class::Message, How::Eager, b"", &[segment(&payload)]).unwrap();
    let mut sink = Recorder::new(Plan::Land);
    let until = Instant::now() + Duration::from_millis(600);
    while Instant::now() < until {
        turn(&mut link, &mut sink).unwrap();
        link.check().unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A stream that only says how long its peer has been silent.
struct Silent(Option<Duration>, VecDeque<u8>);

impl ByteStream for Silent {
    unsafe fn try_read(&mut self, _: &[libc::iovec]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }
    unsafe fn try_write(&mut self, from: &[libc::iovec]) -> io::Result<usize> {
        self.1.resize(self.1.len() + total(from), 0);
        Ok(total(from))
    }
    unsafe fn poll_read(
        &mut self,
        _: &mut Context<'_>,
        _: &[libc::iovec],
    ) -> Poll<io::Result<usize>> {
        Poll::Pending
    }
    unsafe fn poll_write(
        &mut self,
        _: &mut Context<'_>,
        from: &[libc::iovec],
    ) -> Poll<io::Result<usize>> {
        // SAFETY: does not read.
        Poll::Ready(unsafe { self.try_write(from) })
    }
    fn poll_readable(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }
    fn poll_writable(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }
    fn owes(&mut self) -> bool {
        true
    }

    fn unanswered_for(&mut self) -> Option<Duration> {
        self.0
    }
    fn shutdown(&mut self) {}
}

#[test]
fn silence_that_owes_an_answer_ends_the_link() {
    let stream = Silent(Some(Duration::from_secs(29)), VecDeque::new());
    let mut link = TcpLink::with_stream(stream, Vec::new(), TcpOptions::default());
    link.check().unwrap();
    link.stream.0 = Some(Duration::from_secs(31));
    assert_eq!(link.check().unwrap_err().kind, ErrorKind::ConnectionLost);
    assert!(link.post(op(1), Class::Message, How::Eager, b"", &[]).is_err());
}

#[tokio::test]
async fn device_memory_and_wrong_landings_are_refused() {
    let (mut link, mut peer) = link_and_peer(options());
    let device = Segment { kind: MemoryKind::Device, ..segment(b"x") };
    let error = link.post(op(1), Class::Message, How::Eager, b"", &[device]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unsupported);
    let mut sink = Recorder::new(Plan::Hold);
    peer.write_all(&frame(FrameKind::Offer, Class::Tag, 1, b"", 10)).unwrap();
    turn(&mut link, &mut sink).unwrap();
    let mut short = [0; 9];
    let to = smallvec![SegmentMut { ptr: short.as_mut_ptr(), len: 9, kind: MemoryKind::Host }];
    assert!(link.land(sink.received[0].payload, to, op(2)).is_err());
    let mut nothing = [0; 1];
    assert!(peer.read(&mut nothing).is_err(), "nothing was pulled");
}

#[tokio::test]
async fn short_payloads_are_copied_when_posted() {
    let (mut near, mut far) = links(Some(4096), options());
    let (mut near_sink, mut far_sink) = (Recorder::new(Plan::Land), Recorder::new(Plan::Land));
    let bulk = bytes(1 << 20, 1);
    near.post(op(0), Class::Message, How::Eager, b"bulk", &[segment(&bulk)]).unwrap();
    let mut short = bytes(COPIED_MAX, 2);
    let halves = |short: &[u8]| [segment(&short[..50]), segment(&short[50..])];
    for (index, how) in [(1, How::Eager), (2, How::Offer)] {
        let posted = near.post(op(index), Class::Tag, how, b"short", &halves(&short));
        assert_eq!(posted.unwrap(), Post::Pending);
    }
    short.fill(0);
    run((&mut near, &mut near_sink), (&mut far, &mut far_sink), |near, far| {
        near.done.len() == 3 && (0..3).all(|index| far.landed(index))
    });
    assert!(far_sink.received[1..].iter().all(|one| one.bytes == bytes(COPIED_MAX, 2)));
}
