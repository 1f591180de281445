//! Writes a tree into the file system, record by record. Knows no network, and trusts no record.
//!
//! Everything is made relative to an open directory, as a new entry, and no link is followed: what
//! lies outside the destination cannot be reached.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use blake3::Hasher;
use rustix::fs::{Mode, OFlags};

use crate::Result;
use crate::wire::{DEPTH_MAX, Receipt, Record};

/// A tree that is being written.
pub struct Sink {
    /// The directories that are open, the destination first. Empty when it has been left.
    folders: Vec<OwnedFd>,
    /// The same, for messages to people.
    path: PathBuf,
    file: Option<(File, OsString, u32)>,
    hasher: Hasher,
    written: Receipt,
}

/// What a record led to.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// How much is to come, in bytes.
    Begin(u64),
    /// More.
    Go,
    /// That was all, and it is as it was sent.
    Done(Receipt),
}

impl Sink {
    /// The destination, which is made, or is there and empty.
    pub fn create(dest: &Path) -> Result<Sink> {
        let named = |what: &str, error: &dyn std::fmt::Display| {
            format!("{what} {}: {error}", dest.display())
        };
        match fs::create_dir(dest) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                let mut entries =
                    fs::read_dir(dest).map_err(|error| named("cannot copy to", &error))?;
                if entries.next().is_some() {
                    return Err(named("cannot copy to", &"it is not empty").into());
                }
            }
            Err(error) => return Err(named("cannot make", &error).into()),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(dest, flags, Mode::empty())
            .map_err(|error| named("cannot open", &error))?;
        Ok(Sink {
            folders: vec![folder],
            path: dest.to_owned(),
            file: None,
            hasher: Hasher::new(),
            written: Receipt { checksum: [0; 32], files: 0, bytes: 0 },
        })
    }

    /// Does what a record says. `piece` is empty but for [`Record::Piece`].
    pub fn take(&mut self, head: &[u8], piece: &[u8]) -> Result<Next> {
        let record = Record::decode(head)?;
        if record != Record::Piece && !piece.is_empty() {
            return Err("the peer sent bytes that belong to nothing".into());
        }
        if let Record::Finish { checksum } = record {
            return self.finish(checksum);
        }
        self.hasher.update(head);
        self.hasher.update(piece);
        let inside = self.file.is_some();
        match record {
            Record::Piece if inside => self.piece(piece)?,
            Record::End if inside => self.end()?,
            _ if inside => return Err("the peer sent something else inside a file".into()),
            Record::Begin { bytes, .. } => return Ok(Next::Begin(bytes)),
            Record::Enter { name } => self.enter(name)?,
            Record::Leave { mode } => self.leave(mode)?,
            Record::File { name, mode } => self.begin(name, mode)?,
            Record::Link { name, target } => {
                rustix::fs::symlinkat(&target, self.folder()?, &name)
                    .map_err(|error| self.named("cannot make the link", &name, &error))?;
            }
            Record::Piece | Record::End | Record::Finish { .. } => {
                return Err("the peer sent a piece of no file".into());
            }
        }
        Ok(Next::Go)
    }

    fn folder(&self) -> Result<&OwnedFd> {
        self.folders.last().ok_or_else(|| "the peer sent more than its tree".into())
    }

    fn named(&self, what: &str, name: &OsStr, error: &dyn std::fmt::Display) -> String {
        format!("{what} {}: {error}", self.path.join(name).display())
    }

    fn enter(&mut self, name: OsString) -> Result<()> {
        if self.folders.len() > DEPTH_MAX {
            return Err(self.named("cannot make", &name, &"too deep").into());
        }
        let folder = self.folder()?.as_fd();
        // Ours to write to until it is left; then it gets its own permissions.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = rustix::fs::mkdirat(folder, &name, Mode::RWXU)
            .and_then(|()| rustix::fs::openat(folder, &name, flags, Mode::empty()))
            .map_err(|error| self.named("cannot make", &name, &error))?;
        self.folders.push(made);
        self.path.push(name);
        Ok(())
    }

    fn leave(&mut self, mode: u32) -> Result<()> {
        let folder = self.folder()?;
        rustix::fs::fchmod(folder, Mode::from_bits_truncate(mode))
            .map_err(|error| self.named("cannot set permissions of", OsStr::new(""), &error))?;
        self.folders.pop();
        if !self.folders.is_empty() {
            self.path.pop();
        }
        Ok(())
    }

    fn begin(&mut self, name: OsString, mode: u32) -> Result<()> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(self.folder()?, &name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|error| self.named("cannot make", &name, &error))?;
        self.file = Some((File::from(file), name, mode));
        Ok(())
    }

    fn piece(&mut self, piece: &[u8]) -> Result<()> {
        if let Some((file, name, _)) = &mut self.file
            && let Err(error) = file.write_all(piece)
        {
            let name = name.clone();
            return Err(self.named("cannot write", &name, &error).into());
        }
        self.written.bytes += piece.len() as u64;
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        if let Some((file, name, mode)) = self.file.take() {
            rustix::fs::fchmod(&file, Mode::from_bits_truncate(mode))
                .map_err(|error| self.named("cannot set permissions of", &name, &error))?;
        }
        self.written.files += 1;
        Ok(())
    }

    fn finish(&mut self, expected: [u8; 32]) -> Result<Next> {
        if self.file.is_some() || self.folders.len() > 1 {
            return Err("the peer ended in the middle of its tree".into());
        }
        self.written.checksum = *self.hasher.finalize().as_bytes();
        if self.written.checksum != expected {
            return Err("the checksums differ: what was written is not what was sent".into());
        }
        Ok(Next::Done(self.written))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sink() -> (tempfile::TempDir, Sink) {
        let around = tempfile::tempdir().expect("a directory");
        let sink = Sink::create(&around.path().join("dest")).expect("a destination");
        (around, sink)
    }

    fn take(sink: &mut Sink, record: Record) -> Result<Next> {
        sink.take(&record.encode(), b"")
    }

    #[test]
    fn nothing_is_written_through_a_link_of_the_peer() {
        let (around, mut sink) = sink();
        fs::create_dir(around.path().join("outside")).expect("a directory");
        let link = Record::Link { name: "way".into(), target: "../outside".into() };
        take(&mut sink, link).expect("a link is only written");
        assert!(take(&mut sink, Record::Enter { name: "way".into() }).is_err());
        let file = Record::File { name: "way".into(), mode: 0o644 };
        assert!(take(&mut sink, file).is_err());
        // The same for a link to a file that would be made, or changed.
        fs::write(around.path().join("precious"), "mine").expect("written");
        for (name, target) in [("new", "../outside/new"), ("old", "../precious")] {
            let link = Record::Link { name: name.into(), target: target.into() };
            take(&mut sink, link).expect("a link is only written");
            assert!(take(&mut sink, Record::File { name: name.into(), mode: 0o644 }).is_err());
        }
        assert_eq!(fs::read(around.path().join("precious")).expect("untouched"), b"mine");
        let inside = fs::read_dir(around.path().join("outside")).expect("still there");
        assert_eq!(inside.count(), 0);
    }

    #[test]
    fn nobody_leaves_the_destination() {
        let (around, mut sink) = sink();
        take(&mut sink, Record::Leave { mode: 0o755 }).expect("the tree itself");
        assert!(take(&mut sink, Record::Leave { mode: 0o755 }).is_err());
        assert!(take(&mut sink, Record::File { name: "x".into(), mode: 0o644 }).is_err());
        assert_eq!(fs::read_dir(around.path()).expect("there").count(), 1);
    }

    #[test]
    fn another_checksum_is_an_error() {
        let (_around, mut sink) = sink();
        take(&mut sink, Record::File { name: "x".into(), mode: 0o644 }).expect("made");
        sink.take(&Record::Piece.encode(), b"abc").expect("written");
        take(&mut sink, Record::End).expect("ended");
        let error = take(&mut sink, Record::Finish { checksum: [0; 32] }).expect_err("differs");
        assert!(error.to_string().contains("checksums differ"), "{error}");
    }

    #[test]
    fn an_end_in_the_middle_is_an_error() {
        let (_around, mut sink) = sink();
        take(&mut sink, Record::Enter { name: "x".into() }).expect("made");
        assert!(take(&mut sink, Record::Finish { checksum: [0; 32] }).is_err());
    }

    #[test]
    fn what_is_there_already_is_not_touched() {
        let (around, _sink) = sink();
        let dest = around.path().join("dest");
        fs::write(dest.join("precious"), "x").expect("written");
        let error = Sink::create(&dest).err().expect("not empty");
        assert!(error.to_string().contains("not empty"), "{error}");
    }
}
