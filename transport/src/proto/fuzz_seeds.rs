//! Inputs from which fuzzing starts: one of everything that can be said, and the hostile cases
//! that somebody thought of. The kept corpus holds them as files; a test compares the two, so that
//! a change of the wire format cannot leave the corpus behind.

use super::hello::{Failure, HELLO_BYTES_MAX, Hello, Setup, preface_encode};
use super::keys::{ACCESS_READ, RemoteKeyWire};
use super::wire::{Frames, HEAD_MAX, Head, HeadBuf, Lens, Status};
use crate::fuzz_input::Seed;

/// All of them. Names are unique within a target and fit for files.
pub fn seeds() -> Vec<Seed> {
    let mut out = Vec::new();
    let mut add = |target, name: &str, bytes: Vec<u8>| out.push((target, name.to_owned(), bytes));
    heads(|name, bytes| add("head", name, bytes));
    hellos(|name, bytes| add("hello", name, bytes));
    setups(|name, bytes| add("setup", name, bytes));
    sessions(|name, bytes| add("session", name, bytes));
    out
}

fn heads(mut add: impl FnMut(&str, Vec<u8>)) {
    let narrow = Lens::new(&[100, 165, 620_000]);
    let wide = Lens::new(&[1 << 40, 0, u64::MAX]);
    let inline = |lens: &Lens<'static>| Frames::Inline(lens.clone());
    let (seq, id, key) = (u32::MAX, 7, 0x0123_4567_89ab_cdef);
    for (name, head) in [
        ("message-one", Head::Message { seq, frames: Frames::One }),
        ("message-zero", Head::Message { seq, frames: Frames::Zero }),
        ("message-narrow", Head::Message { seq, frames: inline(&narrow) }),
        ("message-wide", Head::Message { seq, frames: inline(&wide) }),
        ("message-tabled", Head::Message { seq, frames: Frames::Table { count: 4096 } }),
        ("table-narrow", Head::MessageTable { seq, total: 9, first: 6, lens: narrow }),
        ("table-wide", Head::MessageTable { seq, total: u32::MAX, first: 0, lens: wide }),
        ("tag", Head::Tag { seq, tag: key }),
        ("put", Head::Put { id, key, offset: u64::MAX }),
        ("put-done", Head::PutDone { id, status: Status::KeyUnknown }),
        ("get", Head::Get { id, key, offset: 1, len: u64::MAX }),
        ("get-reply", Head::GetReply { id, status: Status::OutOfBounds }),
        ("get-refused", Head::GetReply { id, status: Status::Closing }),
        ("fence", Head::Fence { id, messages: 1, tags: u32::MAX }),
        ("fence-done", Head::FenceDone { id }),
        ("credit", Head::Credit { messages: u64::MAX, tags: 0 }),
        ("credit-wanted", Head::CreditWanted { messages: true, tags: true }),
        ("close", Head::Close { code: 1, text: "größer" }),
        ("close-done", Head::CloseDone),
        ("wanted", Head::Wanted { key }),
        ("granted", Head::Granted { key, len: 4096, access: ACCESS_READ, bytes: b"opaque" }),
        ("refused", Head::Refused { key }),
        ("revoke", Head::Revoke { key }),
        ("revoked", Head::Revoked { key }),
    ] {
        let mut bytes = HeadBuf::new();
        head.encode(&mut bytes);
        add(name, bytes.to_vec());
        // A close's text and a grant's bytes end where the head ends.
        if !matches!(head, Head::Close { .. } | Head::Granted { .. }) {
            add(&format!("bad-{name}-cut"), bytes[..bytes.len() - 1].to_vec());
            add(&format!("bad-{name}-longer"), [&bytes[..], &[0]].concat());
        }
    }
    add("bad-empty", vec![]);
    add("bad-kind-zero", vec![0; 8]);
    add("bad-kind-unknown", vec![0xff; 8]);
    add("bad-one-length", [&[3, 1, 0, 0, 0][..], &[9; 4]].concat());
    add("bad-count-one", vec![5, 0, 0, 0, 0, 1, 0, 0, 0]);
    let past_total = [3u32, 2, 3, 1, 1].map(u32::to_le_bytes).concat();
    add("bad-table-past-total", [&[6][..], &past_total].concat());
    let wrapping = [3, u32::MAX, u32::MAX, 1, 1].map(u32::to_le_bytes).concat();
    add("bad-table-wrapping", [&[6][..], &wrapping].concat());
    add("bad-status", vec![10, 1, 0, 0, 0, 7]);
    add("bad-wanted-bits", vec![16, 0x84]);
    add("bad-close-not-text", vec![17, 0, 0, 0, 0, 0xc3, 0x28]);
    add("bad-granted-cut", [&[20][..], &[1; 16]].concat());
    add("bad-granted-access", [&[20][..], &[0; 20]].concat());
    add("bad-close-too-long", [&[17, 0, 0, 0, 0][..], &[b'x'; 513]].concat());
    add("longest-lengths", [&[3, 0, 0, 0, 0][..], &[0xff; 1016]].concat());
    add("bad-too-long", vec![3; HEAD_MAX + 1]);
    let remote = RemoteKeyWire { node_id: [1; 16], key, len: 4096, access: ACCESS_READ }.to_bytes();
    add("remote-key", remote.to_vec());
    for (name, at) in [("format", 32), ("access", 33), ("reserved", 39)] {
        let mut bytes = remote.to_vec();
        bytes[at] = 0x55;
        add(&format!("bad-remote-key-{name}"), bytes);
    }
}

fn hellos(mut add: impl FnMut(&str, Vec<u8>)) {
    let hello = Hello {
        node_id: [1; 16],
        token: [2; 16],
        app: b"scheduler 1.0".to_vec(),
        links: vec![("shm".into(), vec![3; 24]), ("tcp".into(), vec![])],
        message_window: 64 << 20,
        tag_window: 16 << 20,
        max_message: 1 << 40,
        max_frames: 65_536,
        features: 1,
    };
    let body = hello.encode().expect("within the limits");
    let with_preface = |body: &[u8]| [&preface_encode(body.len())[..], body].concat();
    let whole = with_preface(&body);
    add("whole", whole.clone());
    add("bad-empty-body", with_preface(&[]));
    add("bad-cut", whole[..whole.len() / 2].to_vec());
    add("bad-field-twice", with_preface(&[&body[..], &body[..22]].concat()));
    add("unknown-field", with_preface(&[&[0xe7, 3, 2, 0, 0, 0, 9, 9][..], &body].concat()));
    add("bad-field-past-end", with_preface(&[1, 0, 0xff, 0xff, 0xff, 0xff]));
    add("bad-field-short", with_preface(&[1, 0, 15, 0, 0, 0]));
    add("bad-links-count", with_preface(&[4, 0, 1, 0, 0, 0, 0xff]));
    add("bad-links-name", with_preface(&[4, 0, 5, 0, 0, 0, 1, 1, b'/', 0, 0]));
    let twice = [4, 0, 9, 0, 0, 0, 2, 1, b'x', 0, 0, 1, b'x', 0, 0];
    add("bad-links-twice", with_preface(&twice));
    for (name, at, byte) in [
        ("bad-magic", 0, b'T'),
        ("bad-major", 8, 0xff),
        ("newer-minor", 10, 0xff),
        ("bad-length", 15, 0xff),
    ] {
        let mut bytes = whole.clone();
        bytes[at] = byte;
        add(name, bytes);
    }
    add("bad-http", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec());
    add("bad-tls", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\0\0\0\0\0\0".to_vec());
    add("bad-longest-unknown", {
        let mut body = vec![0xff, 0xff, 0xfa, 0xff, 0, 0];
        body.resize(HELLO_BYTES_MAX, 0);
        with_preface(&body)
    });
}

fn setups(mut add: impl FnMut(&str, Vec<u8>)) {
    let failure = Failure { reason: "another network namespace".into(), fix: "share it".into() };
    let messages = [
        ("attempt", Setup::Attempt { link: "shm".into() }),
        ("ok", Setup::Result(Ok(()))),
        ("failed", Setup::Result(Err(failure))),
        ("terms", Setup::Terms(vec![1, 2, 3])),
        ("go", Setup::Go),
        ("refuse", Setup::Refuse { code: 9, text: "full".into() }),
    ];
    for (name, message) in &messages {
        add(name, message.encode());
    }
    add("stream", messages.iter().flat_map(|(_, message)| message.encode()).collect());
    add("bad-empty", vec![0; 4]);
    add("bad-length", vec![0xff; 8]);
    add("bad-length-past-end", vec![9, 0, 0, 0, 4]);
    add("bad-kind", vec![1, 0, 0, 0, 0]);
    add("bad-trailing", vec![2, 0, 0, 0, 4, 4]);
    add("bad-text-length", vec![3, 0, 0, 0, 1, 0xff, 0xff]);
    add("bad-text", vec![8, 0, 0, 0, 5, 0, 0, 0, 0, 1, 0, 0xff]);
    add("bad-link", vec![5, 0, 0, 0, 1, 2, 0, b'a', b'/']);
}

/// Begins with window u16 and first number u32; then operations as `fuzz_entry::session` reads
/// them.
fn sessions(mut add: impl FnMut(&str, Vec<u8>)) {
    let with_start = |start: u32, ops: &[&[u8]]| {
        [&1000u16.to_le_bytes()[..], &start.to_le_bytes(), &ops.concat()].concat()
    };
    let ping = [0, 8, 0, 1, 1, 0, 2, 3, 1];
    add("credit", with_start(0, &[&ping[..]; 20]));
    let greedy = [0, 0xff, 0xff, 0xff];
    add("credit-alone", with_start(0, &[&greedy, &greedy, &[1, 0, 2, 3, 0], &greedy]));
    add("credit-forged", with_start(0, &[&ping, &[4, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]]));
    add("credit-forged-most", with_start(0, &[&greedy, &[4], &[0xff; 8]]));
    add("order-reversed", with_start(u32::MAX - 1, &[&[5, 2, 5, 1, 7, 5, 0, 7, 7, 7, 7]]));
    let far = [6, 0xff, 0xff, 0, 0, 6, 0, 4, 0, 0, 6, 0xff, 3, 0, 0];
    add("order-far", with_start(u32::MAX, &[&far, &[6, 0, 0, 1, 0], &[5, 0, 7], &far]));
    add("order-twice", with_start(0, &[&[5, 3, 5, 3, 5, 0xff]]));
    add("tags-posted-first", with_start(0, &[&[8, 1, 9, 0, 0, 8, 1, 10, 1, 10, 1, 10, 1]]));
    add("tags-unexpected", with_start(u32::MAX, &[&[10, 1, 10, 2, 10, 1, 8, 1, 9, 0, 0, 8, 1]]));
    add("tags-put-back", with_start(u32::MAX, &[&[8, 1, 10, 1, 10, 1, 12, 0, 8, 1, 12, 0, 8, 1]]));
    add("tags-withdrawn", with_start(0, &[&[8, 1, 8, 1, 8, 1, 13, 1, 13, 1, 10, 1, 10, 1, 10, 1]]));
    add("fences", with_start(0, &[&[14, 0, 14, 2, 14, 1, 15, 0, 15, 1, 15, 1, 15, 255]]));
    add("fences-too-many", with_start(0, &[&[14, 200][..]; 1100]));
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::fuzz_entry;
    use super::super::hello::preface_decode;
    use super::*;

    fn is_accepted(target: &str, bytes: &[u8]) -> bool {
        match target {
            "head" => Head::decode(bytes).is_ok() || RemoteKeyWire::from_bytes(bytes).is_ok(),
            "hello" => {
                let (preface, body) = bytes.split_first_chunk().unwrap();
                preface_decode(preface).is_ok_and(|preface| preface.body_len == body.len())
                    && Hello::decode(body).is_ok()
            }
            "setup" => {
                let (prefix, body) = bytes.split_first_chunk().unwrap();
                Setup::body_len(*prefix).is_ok_and(|len| len <= body.len())
                    && Setup::decode(&body[..Setup::body_len(*prefix).unwrap()]).is_ok()
            }
            _ => true,
        }
    }

    #[test]
    fn seeds_are_what_their_names_say() {
        for (target, name, bytes) in seeds() {
            let accepted = is_accepted(target, &bytes);
            assert_eq!(accepted, !name.starts_with("bad-"), "{target}/{name}");
        }
    }

    #[test]
    fn seeds_are_survived() {
        for (target, _, bytes) in seeds() {
            match target {
                "head" => fuzz_entry::head(&bytes),
                "hello" => fuzz_entry::hello(&bytes),
                "setup" => fuzz_entry::setup(&bytes),
                _ => fuzz_entry::session(&bytes),
            };
        }
    }

    #[test]
    fn names_are_unique_and_fit_for_files() {
        let mut seen = HashSet::new();
        for (target, name, _) in seeds() {
            assert!(name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'), "{name}");
            assert!(seen.insert((target, name.clone())), "{target}/{name}");
        }
    }
}
