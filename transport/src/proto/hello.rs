//! What two nodes say to each other before an endpoint exists: the preface, the hello, and the
//! short exchange that sets up links. Bytes only: who sends what when is the driver's business.
//!
//! A preface has 16 bytes: the magic `thalweg` and 0x1a, major u16, minor u16, length of the body
//! u32. The body is the hello: fields of type u16, length u32 and that many bytes, in any order.
//! Unknown types are skipped, so that minor versions can add fields; everything else is strict.
//! All numbers are little endian.

use std::fmt;

use super::cursor::{Cursor, WireError, clip, text};

/// The version of the protocol that must be equal on both sides.
pub(crate) const VERSION_MAJOR: u16 = 1;
/// The version of the protocol of which the lower one holds.
pub(crate) const VERSION_MINOR: u16 = 1;
/// The minor version from which on the two sides may grant each other regions through the link
/// itself (`wire`, heads 19 to 23).
pub(crate) const MINOR_DIRECT: u16 = 1;

/// Length of a preface, in bytes.
pub(crate) const PREFACE_BYTES: usize = 16;
/// The longest hello, in bytes.
pub(crate) const HELLO_BYTES_MAX: usize = 64 * 1024;
/// The longest application hello, in bytes.
pub(crate) const APP_BYTES_MAX: usize = 16 * 1024;
/// The most links in a hello.
pub(crate) const LINKS_MAX: usize = 16;
/// The longest name of a link, in bytes.
pub(crate) const LINK_NAME_BYTES_MAX: usize = 32;
/// The longest capability blob of a link, in bytes.
pub(crate) const LINK_BLOB_BYTES_MAX: usize = 8 * 1024;
/// The longest list of links with their blobs, in bytes: not all of them can be that long.
pub(crate) const LINKS_BYTES_MAX: usize = 40 * 1024;
/// The longest set-up message without its length, in bytes.
pub(crate) const SETUP_BYTES_MAX: usize = 4096;
/// The longest text in a set-up message, in bytes; encoding cuts off what is longer.
pub(crate) const SETUP_TEXT_BYTES_MAX: usize = 1024;

/// What a hello has beside the application's part and the list of links, in bytes: nine fields and the
/// rest of their values.
const REST_BYTES: usize = 9 * 6 + 2 * 16 + 4 * 8 + 4;
const _: () = assert!(REST_BYTES + APP_BYTES_MAX + LINKS_BYTES_MAX <= HELLO_BYTES_MAX);

const MAGIC: [u8; 8] = *b"thalweg\x1a";

/// The first bytes on a connection, read and understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Preface {
    /// The sender's major version.
    pub major: u16,
    /// The sender's minor version.
    pub minor: u16,
    /// Length of the hello that follows, in bytes; at most [`HELLO_BYTES_MAX`].
    pub body_len: usize,
}

/// Why a preface was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PrefaceError {
    /// The other side speaks something else; these are the first bytes of it.
    NotThalweg { first: [u8; 8] },
    /// The other side speaks an incompatible version.
    Major { theirs: u16, ours: u16 },
    /// The hello announced is longer than [`HELLO_BYTES_MAX`].
    TooLong { body_len: u32 },
}

impl fmt::Display for PrefaceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PrefaceError::NotThalweg { first } => {
                write!(f, "it began with \"{}\"", first.escape_ascii())
            }
            PrefaceError::Major { theirs, ours } => {
                write!(f, "it speaks version {theirs} of the protocol, this side version {ours}")
            }
            PrefaceError::TooLong { body_len } => {
                write!(f, "its hello has {body_len} bytes, {HELLO_BYTES_MAX} are allowed")
            }
        }
    }
}

impl std::error::Error for PrefaceError {}

impl Preface {
    /// The minor version in which both sides can talk.
    pub fn minor_in_common(&self) -> u16 {
        self.minor.min(VERSION_MINOR)
    }
}

/// The preface of this version, before a hello of this length.
pub(crate) fn preface_encode(body_len: usize) -> [u8; PREFACE_BYTES] {
    debug_assert!(body_len <= HELLO_BYTES_MAX, "Hello::encode keeps to the limit");
    preface_bytes(VERSION_MAJOR, VERSION_MINOR, body_len as u32)
}

fn preface_bytes(major: u16, minor: u16, body_len: u32) -> [u8; PREFACE_BYTES] {
    let mut out = [0; PREFACE_BYTES];
    out[..8].copy_from_slice(&MAGIC);
    out[8..10].copy_from_slice(&major.to_le_bytes());
    out[10..12].copy_from_slice(&minor.to_le_bytes());
    out[12..].copy_from_slice(&body_len.to_le_bytes());
    out
}

/// Reads a preface. The version is judged before the length, whose meaning another major version
/// may have changed.
pub(crate) fn preface_decode(bytes: &[u8; PREFACE_BYTES]) -> Result<Preface, PrefaceError> {
    let [m0, m1, m2, m3, m4, m5, m6, m7, j0, j1, n0, n1, l0, l1, l2, l3] = *bytes;
    let first = [m0, m1, m2, m3, m4, m5, m6, m7];
    if first != MAGIC {
        return Err(PrefaceError::NotThalweg { first });
    }
    let major = u16::from_le_bytes([j0, j1]);
    if major != VERSION_MAJOR {
        return Err(PrefaceError::Major { theirs: major, ours: VERSION_MAJOR });
    }
    let minor = u16::from_le_bytes([n0, n1]);
    let body_len = u32::from_le_bytes([l0, l1, l2, l3]);
    if body_len as usize > HELLO_BYTES_MAX {
        return Err(PrefaceError::TooLong { body_len });
    }
    Ok(Preface { major, minor, body_len: body_len as usize })
}

mod field {
    pub const NODE_ID: u16 = 1;
    pub const TOKEN: u16 = 2;
    pub const APP: u16 = 3;
    pub const LINKS: u16 = 4;
    pub const MESSAGE_WINDOW: u16 = 5;
    pub const TAG_WINDOW: u16 = 6;
    pub const MAX_MESSAGE: u16 = 7;
    pub const MAX_FRAMES: u16 = 8;
    pub const FEATURES: u16 = 9;
}

/// What a node says of itself when it connects or accepts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hello {
    /// Random, chosen by the node when it was made.
    pub node_id: [u8; 16],
    /// The session's random token; zero from the acceptor.
    pub token: [u8; 16],
    /// The application's own hello; at most [`APP_BYTES_MAX`] bytes.
    pub app: Vec<u8>,
    /// Name and capability blob of each link this side has; at most [`LINKS_MAX`], names unique.
    pub links: Vec<(String, Vec<u8>)>,
    /// Credit that this side grants for messages, in bytes.
    pub message_window: u64,
    /// Credit that this side grants for unmatched tags, in bytes.
    pub tag_window: u64,
    /// The longest message that this side takes, in bytes.
    pub max_message: u64,
    /// The most frames of a message that this side takes.
    pub max_frames: u32,
    /// One bit per optional feature; unknown bits are ignored.
    pub features: u64,
}

impl Hello {
    /// The body that goes after a preface. An error says which limit this side's own hello breaks.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        if self.app.len() > APP_BYTES_MAX {
            return Err(WireError::new("the application's hello is too long"));
        }
        let links = encode_links(&self.links)?;
        let mut out = Vec::with_capacity(256 + self.app.len() + links.len());
        put_field(&mut out, field::NODE_ID, &self.node_id);
        put_field(&mut out, field::TOKEN, &self.token);
        put_field(&mut out, field::APP, &self.app);
        put_field(&mut out, field::LINKS, &links);
        put_field(&mut out, field::MESSAGE_WINDOW, &self.message_window.to_le_bytes());
        put_field(&mut out, field::TAG_WINDOW, &self.tag_window.to_le_bytes());
        put_field(&mut out, field::MAX_MESSAGE, &self.max_message.to_le_bytes());
        put_field(&mut out, field::MAX_FRAMES, &self.max_frames.to_le_bytes());
        put_field(&mut out, field::FEATURES, &self.features.to_le_bytes());
        debug_assert!(out.len() <= HELLO_BYTES_MAX, "the limits on fields add up to less");
        Ok(out)
    }

    /// Reads the body that came after a preface. Allocates no more than the body has bytes, plus
    /// [`LINKS_MAX`] entries.
    pub fn decode(body: &[u8]) -> Result<Hello, WireError> {
        if body.len() > HELLO_BYTES_MAX {
            return Err(WireError::new("hello too long"));
        }
        let mut hello = Hello::default();
        let mut seen = 0u32;
        let mut c = Cursor::new(body, "hello ends in the middle of a field");
        while !c.is_empty() {
            let kind = c.u16()?;
            let len = c.u32()? as usize;
            let value = c.take(len)?;
            if !hello.set(kind, value)? {
                continue;
            }
            let bit = 1 << kind;
            if seen & bit != 0 {
                return Err(WireError::new("hello with a field given twice"));
            }
            seen |= bit;
        }
        const REQUIRED: u32 = 1 << field::NODE_ID
            | 1 << field::TOKEN
            | 1 << field::MESSAGE_WINDOW
            | 1 << field::TAG_WINDOW
            | 1 << field::MAX_MESSAGE
            | 1 << field::MAX_FRAMES;
        if seen & REQUIRED != REQUIRED {
            return Err(WireError::new("hello without a required field"));
        }
        Ok(hello)
    }

    /// Takes over one field; `false` if its type is unknown.
    fn set(&mut self, kind: u16, value: &[u8]) -> Result<bool, WireError> {
        match kind {
            field::NODE_ID => self.node_id = sized(value)?,
            field::TOKEN => self.token = sized(value)?,
            field::APP if value.len() > APP_BYTES_MAX => {
                return Err(WireError::new("the application's hello is too long"));
            }
            field::APP => self.app = value.to_vec(),
            field::LINKS => self.links = decode_links(value)?,
            field::MESSAGE_WINDOW => self.message_window = u64::from_le_bytes(sized(value)?),
            field::TAG_WINDOW => self.tag_window = u64::from_le_bytes(sized(value)?),
            field::MAX_MESSAGE => self.max_message = u64::from_le_bytes(sized(value)?),
            field::MAX_FRAMES => self.max_frames = u32::from_le_bytes(sized(value)?),
            field::FEATURES => self.features = u64::from_le_bytes(sized(value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }
}

fn put_field(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&(value.len() as u32).to_le_bytes());
    out.extend_from_slice(value);
}

fn sized<const N: usize>(value: &[u8]) -> Result<[u8; N], WireError> {
    value.try_into().map_err(|_| WireError::new("hello with a field of the wrong length"))
}

/// Count u8; for each link: length of the name u8, name, length of the blob u16, blob.
fn encode_links(links: &[(String, Vec<u8>)]) -> Result<Vec<u8>, WireError> {
    if links.len() > LINKS_MAX {
        return Err(WireError::new("too many links in a hello"));
    }
    let mut out = vec![links.len() as u8];
    for (i, (name, blob)) in links.iter().enumerate() {
        check_link(&links[..i], name.as_bytes(), blob)?;
        out.push(name.len() as u8);
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(&(blob.len() as u16).to_le_bytes());
        out.extend_from_slice(blob);
    }
    check_links_len(&out)?;
    Ok(out)
}

fn check_links_len(links: &[u8]) -> Result<(), WireError> {
    match links.len() > LINKS_BYTES_MAX {
        true => Err(WireError::new("a hello's list of links is too long")),
        false => Ok(()),
    }
}

fn decode_links(value: &[u8]) -> Result<Vec<(String, Vec<u8>)>, WireError> {
    check_links_len(value)?;
    let mut c = Cursor::new(value, "list of links too short");
    let count = usize::from(c.u8()?);
    if count > LINKS_MAX {
        return Err(WireError::new("too many links in a hello"));
    }
    let mut links = Vec::with_capacity(count);
    for _ in 0..count {
        let name_len = usize::from(c.u8()?);
        let name = c.take(name_len)?;
        let blob_len = usize::from(c.u16()?);
        let blob = c.take(blob_len)?;
        check_link(&links, name, blob)?;
        links.push((text(name, "link name is not UTF-8")?.to_owned(), blob.to_vec()));
    }
    c.finish("bytes after the last link")?;
    Ok(links)
}

fn check_link(before: &[(String, Vec<u8>)], name: &[u8], blob: &[u8]) -> Result<(), WireError> {
    check_link_name(name)?;
    if blob.len() > LINK_BLOB_BYTES_MAX {
        return Err(WireError::new("a link's capabilities are too long"));
    }
    if before.iter().any(|(other, _)| other.as_bytes() == name) {
        return Err(WireError::new("a link is named twice"));
    }
    Ok(())
}

/// Names are shown to people and compared: lower-case letters, digits, `-` and `_` only.
fn check_link_name(name: &[u8]) -> Result<(), WireError> {
    let good = |b: &u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_');
    if name.is_empty() || name.len() > LINK_NAME_BYTES_MAX || !name.iter().all(good) {
        return Err(WireError::new("not a link's name"));
    }
    Ok(())
}

/// What is said while links are set up, after the hellos.
///
/// On the wire: length u32 (of what follows, at most [`SETUP_BYTES_MAX`]), kind u8, fields. Texts
/// have a length u16.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Setup {
    /// Let us try this link.
    Attempt { link: String },
    /// How the attempt went on this side: if badly, why, and what would fix it (may be empty).
    Result(Result<(), Failure>),
    /// What the other side has to know for this link, if the hello could not say it.
    Terms(Vec<u8>),
    /// The links that came up are enough: the endpoint begins.
    Go,
    /// There will be no endpoint.
    Refuse { code: u32, text: String },
}

/// Why a link did not come up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Failure {
    pub reason: String,
    pub fix: String,
}

mod setup_kind {
    pub const ATTEMPT: u8 = 1;
    pub const OK: u8 = 2;
    pub const FAILED: u8 = 3;
    pub const GO: u8 = 4;
    pub const REFUSE: u8 = 5;
    pub const TERMS: u8 = 6;
}

/// Length of what comes before a set-up message's own bytes.
pub(crate) const SETUP_PREFIX_BYTES: usize = 4;

impl Setup {
    /// The message with its length before it. Texts are cut to [`SETUP_TEXT_BYTES_MAX`] bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; SETUP_PREFIX_BYTES];
        match self {
            Setup::Attempt { link } => {
                out.push(setup_kind::ATTEMPT);
                put_text(&mut out, link);
            }
            Setup::Result(Ok(())) => out.push(setup_kind::OK),
            Setup::Result(Err(failure)) => {
                out.push(setup_kind::FAILED);
                put_text(&mut out, &failure.reason);
                put_text(&mut out, &failure.fix);
            }
            Setup::Terms(terms) => {
                out.push(setup_kind::TERMS);
                let terms = &terms[..terms.len().min(SETUP_TEXT_BYTES_MAX)];
                out.extend_from_slice(&(terms.len() as u16).to_le_bytes());
                out.extend_from_slice(terms);
            }
            Setup::Go => out.push(setup_kind::GO),
            Setup::Refuse { code, text } => {
                out.push(setup_kind::REFUSE);
                out.extend_from_slice(&code.to_le_bytes());
                put_text(&mut out, text);
            }
        }
        let len = (out.len() - SETUP_PREFIX_BYTES) as u32;
        out[..SETUP_PREFIX_BYTES].copy_from_slice(&len.to_le_bytes());
        out
    }

    /// How many bytes follow this prefix.
    pub fn body_len(prefix: [u8; SETUP_PREFIX_BYTES]) -> Result<usize, WireError> {
        match u32::from_le_bytes(prefix) as usize {
            0 => Err(WireError::new("empty set-up message")),
            len if len > SETUP_BYTES_MAX => Err(WireError::new("set-up message too long")),
            len => Ok(len),
        }
    }

    /// Reads a message without its prefix.
    pub fn decode(body: &[u8]) -> Result<Setup, WireError> {
        if body.len() > SETUP_BYTES_MAX {
            return Err(WireError::new("set-up message too long"));
        }
        let mut c = Cursor::new(body, "set-up message too short");
        let message = match c.u8()? {
            setup_kind::ATTEMPT => {
                let link = get_text(&mut c)?;
                check_link_name(link.as_bytes())?;
                Setup::Attempt { link }
            }
            setup_kind::OK => Setup::Result(Ok(())),
            setup_kind::FAILED => {
                Setup::Result(Err(Failure { reason: get_text(&mut c)?, fix: get_text(&mut c)? }))
            }
            setup_kind::TERMS => {
                let len = usize::from(c.u16()?);
                if len > SETUP_TEXT_BYTES_MAX {
                    return Err(WireError::new("terms in a set-up message too long"));
                }
                Setup::Terms(c.take(len)?.to_vec())
            }
            setup_kind::GO => Setup::Go,
            setup_kind::REFUSE => Setup::Refuse { code: c.u32()?, text: get_text(&mut c)? },
            _ => return Err(WireError::new("unknown set-up message")),
        };
        c.finish("bytes after a set-up message")?;
        Ok(message)
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    let text = clip(text, SETUP_TEXT_BYTES_MAX);
    out.extend_from_slice(&(text.len() as u16).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn get_text(c: &mut Cursor<'_>) -> Result<String, WireError> {
    let len = usize::from(c.u16()?);
    if len > SETUP_TEXT_BYTES_MAX {
        return Err(WireError::new("text in a set-up message too long"));
    }
    Ok(text(c.take(len)?, "text in a set-up message is not UTF-8")?.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Hello {
        Hello {
            node_id: [1; 16],
            token: [2; 16],
            app: b"app".to_vec(),
            links: vec![("shm".into(), vec![1, 2, 3]), ("tcp".into(), vec![])],
            message_window: 1,
            tag_window: 2,
            max_message: 3,
            max_frames: 4,
            features: 5,
        }
    }

    #[test]
    fn preface_round_trip() {
        let preface = preface_decode(&preface_encode(HELLO_BYTES_MAX)).unwrap();
        assert_eq!((preface.major, preface.minor), (VERSION_MAJOR, VERSION_MINOR));
        assert_eq!(preface.body_len, HELLO_BYTES_MAX);
    }

    #[test]
    fn preface_names_what_is_wrong() {
        let error = preface_decode(b"GET / HTTP/1.1\r\n").unwrap_err();
        assert_eq!(error.to_string(), "it began with \"GET / HT\"");
        let error = preface_decode(b"\x16\x03\x01\0\xffhello world").unwrap_err();
        assert_eq!(error.to_string(), "it began with \"\\x16\\x03\\x01\\x00\\xffhel\"");
        // Even when the length makes no sense in this version.
        let error = preface_decode(&preface_bytes(7, 0, u32::MAX)).unwrap_err();
        assert_eq!(error, PrefaceError::Major { theirs: 7, ours: VERSION_MAJOR });
        assert!(error.to_string().contains('7') && error.to_string().contains('1'));
        let error = preface_decode(&preface_bytes(VERSION_MAJOR, 0, 65537)).unwrap_err();
        assert_eq!(error, PrefaceError::TooLong { body_len: 65537 });
    }

    #[test]
    fn other_minor_versions_are_welcome() {
        let newer = preface_decode(&preface_bytes(VERSION_MAJOR, VERSION_MINOR + 3, 0)).unwrap();
        assert_eq!(newer.minor_in_common(), VERSION_MINOR);
        let older = Preface { major: VERSION_MAJOR, minor: 0, body_len: 0 };
        assert_eq!(older.minor_in_common(), 0);
    }

    #[test]
    fn fullest_hello_fits() {
        let name = |i| format!("{i:0>width$}", width = LINK_NAME_BYTES_MAX);
        // As many links as there can be, and all the bytes that they may have in common.
        let mut left = LINKS_BYTES_MAX - 1;
        let mut blob = |others: usize| {
            let len = (left - others * (3 + LINK_NAME_BYTES_MAX)).min(LINK_BLOB_BYTES_MAX);
            left -= 3 + LINK_NAME_BYTES_MAX + len;
            vec![9; len]
        };
        let links: Vec<_> = (0..LINKS_MAX).map(|i| (name(i), blob(LINKS_MAX - i))).collect();
        assert_eq!(links[0].1.len(), LINK_BLOB_BYTES_MAX);
        let hello = Hello { app: vec![7; APP_BYTES_MAX], links, ..sample() };
        let body = hello.encode().unwrap();
        assert_eq!(body.len(), REST_BYTES + APP_BYTES_MAX + LINKS_BYTES_MAX);
        assert!(body.len() <= HELLO_BYTES_MAX);
        assert_eq!(Hello::decode(&body).as_ref(), Ok(&hello));
        let mut over = hello;
        over.links[LINKS_MAX - 1].1.push(9);
        assert!(over.encode().is_err());
        let mut body = Vec::new();
        put_field(&mut body, field::LINKS, &vec![0; LINKS_BYTES_MAX + 1]);
        assert_eq!(Hello::decode(&body).unwrap_err().what, "a hello's list of links is too long");
    }

    #[test]
    fn own_hello_over_a_limit_is_refused() {
        for hello in [
            Hello { app: vec![0; APP_BYTES_MAX + 1], ..sample() },
            Hello { links: vec![("x".into(), vec![0; LINK_BLOB_BYTES_MAX + 1])], ..sample() },
            Hello { links: vec![("X".into(), vec![])], ..sample() },
            Hello { links: vec![("x".into(), vec![]), ("x".into(), vec![])], ..sample() },
            Hello { links: vec![("x".into(), vec![]); LINKS_MAX + 1], ..sample() },
        ] {
            assert!(hello.encode().is_err());
        }
    }

    #[test]
    fn unknown_fields_are_skipped() {
        let mut body = Vec::new();
        put_field(&mut body, 999, b"from the future");
        body.extend(sample().encode().unwrap());
        put_field(&mut body, 999, b"");
        put_field(&mut body, 32, b"");
        put_field(&mut body, 0, b"");
        assert_eq!(Hello::decode(&body), Ok(sample()));
    }

    #[test]
    fn hostile_hellos_are_refused() {
        let body = sample().encode().unwrap();
        for cut in 0..body.len() {
            // Only at the end of the last required field may it end early.
            if let Ok(hello) = Hello::decode(&body[..cut]) {
                assert_eq!(hello, Hello { features: 0, ..sample() });
            }
        }
        for (kind, value) in
            [(field::NODE_ID, vec![0; 16]), (field::LINKS, vec![0]), (field::FEATURES, vec![0; 8])]
        {
            let mut twice = body.clone();
            put_field(&mut twice, kind, &value);
            let error = Hello::decode(&twice).unwrap_err();
            assert_eq!(error.what, "hello with a field given twice");
        }
        for (kind, value) in [
            (field::NODE_ID, vec![0; 15]),
            (field::MAX_FRAMES, vec![0; 8]),
            (field::APP, vec![0; APP_BYTES_MAX + 1]),
            (field::LINKS, vec![]),
            (field::LINKS, vec![17]),
            (field::LINKS, vec![1, 0, 0, 0]),
            (field::LINKS, vec![1, 1, b'x', 1, 0]),
            (field::LINKS, vec![1, 1, b'x', 0, 0, 0]),
            (field::LINKS, vec![1, 1, 0xff, 0, 0]),
            (field::LINKS, vec![2, 1, b'x', 0, 0, 1, b'x', 0, 0]),
        ] {
            let mut bad = Vec::new();
            put_field(&mut bad, kind, &value);
            let error = Hello::decode(&bad).unwrap_err();
            assert_ne!(error.what, "hello without a required field", "{kind} {value:?}");
        }
        assert!(Hello::decode(&vec![0; HELLO_BYTES_MAX + 1]).is_err());
        assert!(Hello::decode(&[1, 0, 255, 255, 255, 255]).is_err());
    }

    fn setup_round_trip(message: &Setup) {
        let bytes = message.encode();
        let (prefix, body) = bytes.split_first_chunk().unwrap();
        assert_eq!(Setup::body_len(*prefix), Ok(body.len()));
        assert_eq!(Setup::decode(body).as_ref(), Ok(message));
        for cut in 0..body.len() {
            assert!(Setup::decode(&body[..cut]).is_err());
        }
        assert!(Setup::decode(&[body, &[0]].concat()).is_err());
    }

    #[test]
    fn long_setup_texts_are_cut() {
        let failure = Failure { reason: "ä".repeat(5000), fix: "x".repeat(5000) };
        let bytes = Setup::Result(Err(failure)).encode();
        let Ok(Setup::Result(Err(failure))) = Setup::decode(&bytes[SETUP_PREFIX_BYTES..]) else {
            panic!("not a failure")
        };
        assert_eq!(failure.reason.len(), SETUP_TEXT_BYTES_MAX);
        assert_eq!(failure.fix.len(), SETUP_TEXT_BYTES_MAX);
    }

    #[test]
    fn hostile_setup_messages_are_refused() {
        assert!(Setup::body_len([0; 4]).is_err());
        assert!(Setup::body_len(4097u32.to_le_bytes()).is_err());
        assert!(Setup::body_len([255; 4]).is_err());
        for body in [&[][..], &[0], &[9], &[1, 0, 0], &[1, 1, 0, b'X'], &[1, 1, 0, 255], &[2, 0]] {
            assert!(Setup::decode(body).is_err(), "{body:?}");
        }
        let text = |len: u16| [&len.to_le_bytes()[..], &vec![b'x'; len.into()]].concat();
        let failed = |len| [&[3][..], &text(len), &text(0)].concat();
        assert!(Setup::decode(&failed(SETUP_TEXT_BYTES_MAX as u16)).is_ok());
        assert!(Setup::decode(&failed(SETUP_TEXT_BYTES_MAX as u16 + 1)).is_err());
        let mut long = vec![1, 0xff, 0xff];
        long.resize(SETUP_BYTES_MAX, b'x');
        assert!(Setup::decode(&long).is_err());
        long.push(0);
        assert!(Setup::decode(&long).is_err());
    }

    proptest! {
        #[test]
        fn hello_round_trip(
            node_id: [u8; 16], token: [u8; 16], app in prop::collection::vec(any::<u8>(), 0..200),
            links in prop::collection::btree_map(
                "[a-z0-9_-]{1,32}", prop::collection::vec(any::<u8>(), 0..100), 0..LINKS_MAX),
            message_window: u64, tag_window: u64, max_message: u64, max_frames: u32, features: u64,
        ) {
            let links = links.into_iter().collect();
            let hello = Hello {
                node_id, token, app, links, message_window, tag_window, max_message, max_frames,
                features,
            };
            prop_assert_eq!(Hello::decode(&hello.encode().unwrap()), Ok(hello));
        }

        #[test]
        fn setup_messages_round_trip(
            link in "[a-z0-9_-]{1,32}", reason in "\\PC{0,100}", fix in "\\PC{0,100}", code: u32,
        ) {
            setup_round_trip(&Setup::Attempt { link });
            setup_round_trip(&Setup::Result(Ok(())));
            setup_round_trip(&Setup::Refuse { code, text: fix.clone() });
            setup_round_trip(&Setup::Result(Err(Failure { reason, fix })));
            setup_round_trip(&Setup::Go);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Hello::decode(&bytes);
            let _ = Setup::decode(&bytes);
            if let Some(preface) = bytes.first_chunk() {
                let _ = preface_decode(preface);
            }
        }

        #[test]
        fn damaged_hellos_never_panic(at in any::<prop::sample::Index>(), byte: u8) {
            let mut body = sample().encode().unwrap();
            let at = at.index(body.len());
            body[at] = byte;
            let _ = Hello::decode(&body);
        }
    }
}
