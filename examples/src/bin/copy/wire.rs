//! What sender and receiver say to each other. Pure: bytes in, records out.
//!
//! A tree travels as a walk: directories are entered and left, so that every name is a single
//! component and nothing ever has to be looked up by a path that the peer made.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Told to the peer at connect, both ways.
pub const HELLO: &[u8] = b"thalweg copy 1";
/// The longest piece of a file in one message, in bytes.
pub const PIECE_BYTES: usize = 1 << 20;
/// The largest message that either side accepts, in bytes.
pub const MESSAGE_BYTES_MAX: u64 = 2 << 20;
/// How deep directories may lie in each other: each takes a descriptor of the receiver's.
pub const DEPTH_MAX: usize = 200;
/// What Linux allows for a name.
const NAME_BYTES_MAX: usize = 255;
/// What Linux allows for the target of a symbolic link.
const TARGET_BYTES_MAX: usize = 4095;

/// The first frame of a message. The second frame, where there is one, belongs to [`Record::Piece`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// How much is to come, for the progress bar.
    Begin { files: u64, bytes: u64 },
    /// A directory; what follows lies in it.
    Enter { name: OsString },
    /// The end of the directory, and its permissions.
    Leave { mode: u32 },
    /// A file; its pieces follow.
    File { name: OsString, mode: u32 },
    /// Some of the file.
    Piece,
    /// The end of the file.
    End,
    /// A symbolic link.
    Link { name: OsString, target: OsString },
    /// The end of everything, and the checksum of all that was sent before.
    Finish { checksum: [u8; 32] },
}

impl Record {
    /// The record as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self {
            Record::Begin { files, bytes: total } => {
                bytes.push(0);
                bytes.extend(files.to_le_bytes());
                bytes.extend(total.to_le_bytes());
            }
            Record::Enter { name } => {
                bytes.push(1);
                bytes.extend(name.as_bytes());
            }
            Record::Leave { mode } => {
                bytes.push(2);
                bytes.extend(mode.to_le_bytes());
            }
            Record::File { name, mode } => {
                bytes.push(3);
                bytes.extend(mode.to_le_bytes());
                bytes.extend(name.as_bytes());
            }
            Record::Piece => bytes.push(4),
            Record::End => bytes.push(5),
            Record::Link { name, target } => {
                bytes.push(6);
                bytes.extend(name.as_bytes());
                bytes.push(0);
                bytes.extend(target.as_bytes());
            }
            Record::Finish { checksum } => {
                bytes.push(7);
                bytes.extend(checksum);
            }
        }
        bytes
    }

    /// The record in these bytes, if they are one and harmless.
    pub fn decode(bytes: &[u8]) -> Result<Record, String> {
        let (&kind, rest) = bytes.split_first().ok_or("an empty record")?;
        Ok(match kind {
            0 => {
                let (files, bytes) = take(rest)?;
                Record::Begin {
                    files: u64::from_le_bytes(files),
                    bytes: u64::from_le_bytes(whole(bytes)?),
                }
            }
            1 => Record::Enter { name: name(rest)? },
            2 => Record::Leave { mode: mode(whole(rest)?)? },
            3 => {
                let (bits, rest) = take(rest)?;
                Record::File { mode: mode(bits)?, name: name(rest)? }
            }
            4 => whole::<0>(rest).map(|_| Record::Piece)?,
            5 => whole::<0>(rest).map(|_| Record::End)?,
            6 => {
                let cut = rest.iter().position(|byte| *byte == 0).ok_or("a link without target")?;
                Record::Link { name: name(&rest[..cut])?, target: target(&rest[cut + 1..])? }
            }
            7 => Record::Finish { checksum: whole(rest)? },
            other => return Err(format!("a record of unknown kind {other}")),
        })
    }
}

fn take<const N: usize>(bytes: &[u8]) -> Result<([u8; N], &[u8]), String> {
    let (head, rest) = bytes.split_first_chunk().ok_or("a record that is cut short")?;
    Ok((*head, rest))
}

fn whole<const N: usize>(bytes: &[u8]) -> Result<[u8; N], String> {
    bytes.try_into().map_err(|_| "a record of the wrong length".to_owned())
}

/// Permissions: nothing that changes the user or group of who runs it.
fn mode(bytes: [u8; 4]) -> Result<u32, String> {
    let mode = u32::from_le_bytes(bytes);
    if mode & !0o777 != 0 {
        return Err(format!("permissions {mode:o}"));
    }
    Ok(mode)
}

/// One component: nothing that leads anywhere else.
fn name(bytes: &[u8]) -> Result<OsString, String> {
    let bad = bytes.is_empty()
        || bytes.len() > NAME_BYTES_MAX
        || bytes == b"."
        || bytes == b".."
        || bytes.iter().any(|byte| matches!(byte, 0 | b'/'));
    if bad {
        return Err(format!("the name {:?} is refused", OsStr::from_bytes(bytes)));
    }
    Ok(OsString::from_vec(bytes.to_vec()))
}

/// Anything that a link can hold: it is written, never followed.
fn target(bytes: &[u8]) -> Result<OsString, String> {
    if bytes.is_empty() || bytes.len() > TARGET_BYTES_MAX || bytes.contains(&0) {
        return Err("a link's target is refused".to_owned());
    }
    Ok(OsString::from_vec(bytes.to_vec()))
}

/// The receiver's answer to [`Record::Finish`]: what it has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    pub checksum: [u8; 32],
    pub files: u64,
    pub bytes: u64,
}

impl Receipt {
    pub fn encode(&self) -> Vec<u8> {
        [&self.checksum[..], &self.files.to_le_bytes(), &self.bytes.to_le_bytes()].concat()
    }

    pub fn decode(bytes: &[u8]) -> Result<Receipt, String> {
        let (checksum, rest) = take(bytes)?;
        let (files, rest) = take(rest)?;
        Ok(Receipt {
            checksum,
            files: u64::from_le_bytes(files),
            bytes: u64::from_le_bytes(whole(rest)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_the_journey() {
        for record in [
            Record::Begin { files: 3, bytes: u64::MAX },
            Record::Enter { name: "a b".into() },
            Record::Leave { mode: 0o755 },
            Record::File { name: OsString::from_vec(vec![0xff, b'\n']), mode: 0o600 },
            Record::Piece,
            Record::End,
            Record::Link { name: "l".into(), target: "../../etc/passwd".into() },
            Record::Finish { checksum: [7; 32] },
        ] {
            assert_eq!(Record::decode(&record.encode()), Ok(record));
        }
        let receipt = Receipt { checksum: [9; 32], files: 1, bytes: 2 };
        assert_eq!(Receipt::decode(&receipt.encode()), Ok(receipt));
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["", ".", "..", "/", "a/b", "../a", "/etc/passwd", "a\0b", &"x".repeat(256)] {
            let name = OsString::from(name);
            for record in [
                Record::Enter { name: name.clone() },
                Record::File { name: name.clone(), mode: 0o600 },
            ] {
                assert!(Record::decode(&record.encode()).is_err(), "{record:?}");
            }
            // A link ends its name at the first zero.
            let link = Record::Link { name: name.clone(), target: "t".into() };
            if !name.as_bytes().contains(&0) {
                assert!(Record::decode(&link.encode()).is_err(), "{link:?}");
            }
        }
    }

    #[test]
    fn what_is_no_record_is_refused() {
        for bytes in [&b""[..], b"\x09", b"\x00123", b"\x02", b"\x02\xff\xff\0\0", b"\x04x"] {
            assert!(Record::decode(bytes).is_err(), "{bytes:?}");
        }
        // A program that would run as someone else.
        assert!(Record::decode(&Record::Leave { mode: 0o4755 }.encode()).is_err());
    }
}
