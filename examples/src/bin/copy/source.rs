//! Reads a tree from the file system and makes messages of it. Knows no network.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use blake3::Hasher;
use thalweg::{Frame, Message, Node};
use thalweg_examples::note;

use crate::Result;
use crate::wire::{DEPTH_MAX, PIECE_BYTES, Receipt, Record};

/// How much there is to copy.
#[derive(Clone, Copy, Debug, Default)]
pub struct Survey {
    pub files: u64,
    pub bytes: u64,
}

/// Counts, and finds directories that cannot be read before anything is sent.
pub fn survey(root: &Path) -> Result<Survey> {
    let meta = root_metadata(root)?;
    let mut survey = Survey::default();
    if meta.is_dir() {
        count(root, &mut survey, 0)?
    } else {
        survey.add(&meta)
    };
    Ok(survey)
}

impl Survey {
    fn add(&mut self, meta: &Metadata) {
        self.files += 1;
        self.bytes += meta.len();
    }
}

fn count(folder: &Path, survey: &mut Survey, depth: usize) -> Result<()> {
    if depth > DEPTH_MAX {
        return Err(format!("{} lies too deep: at most {DEPTH_MAX}", folder.display()).into());
    }
    for path in entries(folder)? {
        let meta = link_metadata(&path)?;
        if meta.is_dir() {
            count(&path, survey, depth + 1)?;
        } else if meta.is_file() {
            survey.add(&meta);
        }
    }
    Ok(())
}

/// A tree that is copied into itself would never end.
pub fn refuse_inside(source: &Path, dest: &Path) -> Result<()> {
    let source = source.canonicalize().map_err(|error| named("cannot find", source, &error))?;
    let parent = match dest.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let around = [dest, parent].into_iter().find_map(|path| path.canonicalize().ok());
    if source.is_dir() && around.is_some_and(|around| around.starts_with(&source)) {
        return Err(format!("{} lies inside {}", dest.display(), source.display()).into());
    }
    Ok(())
}

/// By name, so that two runs send the same.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let list = || -> io::Result<Vec<PathBuf>> {
        fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect()
    };
    let mut paths = list().map_err(|error| named("cannot list", folder, &error))?;
    paths.sort();
    Ok(paths)
}

/// Of what is to be copied, behind links. Only a file or a directory has an end.
fn root_metadata(root: &Path) -> Result<Metadata> {
    let meta = fs::metadata(root).map_err(|error| named("cannot read", root, &error))?;
    match meta.is_dir() || meta.is_file() {
        true => Ok(meta),
        false => Err(format!("{}: neither file nor directory", root.display()).into()),
    }
}

fn link_metadata(path: &Path) -> Result<Metadata> {
    path.symlink_metadata().map_err(|error| named("cannot read", path, &error).into())
}

fn named(what: &str, path: &Path, error: &io::Error) -> String {
    format!("{what} {}: {error}", path.display())
}

fn mode(meta: &Metadata) -> u32 {
    meta.permissions().mode() & 0o777
}

/// Walks a tree, and hands each message to `emit`, which may block.
pub struct Source<'a> {
    node: &'a Node,
    emit: &'a mut dyn FnMut(Message) -> Result<()>,
    hasher: Hasher,
    sent: Receipt,
}

impl<'a> Source<'a> {
    /// `node` lends the memory for pieces, which a receiver on this host then reads in place.
    pub fn new(node: &'a Node, emit: &'a mut dyn FnMut(Message) -> Result<()>) -> Self {
        let sent = Receipt { checksum: [0; 32], files: 0, bytes: 0 };
        Source { node, emit, hasher: Hasher::new(), sent }
    }

    /// All of it, from the first message to the last. What the receiver's receipt must say.
    pub fn send(mut self, root: &Path, survey: Survey) -> Result<Receipt> {
        self.record(&Record::Begin { files: survey.files, bytes: survey.bytes })?;
        let meta = root_metadata(root)?;
        if meta.is_dir() {
            self.folder(root)?;
            self.record(&Record::Leave { mode: mode(&meta) })?;
        } else {
            let name = root.file_name().ok_or_else(|| format!("{} has no name", root.display()))?;
            self.file(root, name.to_owned(), &meta)?;
        }
        self.sent.checksum = *self.hasher.finalize().as_bytes();
        let finish = Record::Finish { checksum: self.sent.checksum };
        (self.emit)(Message::from(finish.encode()))?;
        Ok(self.sent)
    }

    fn record(&mut self, record: &Record) -> Result<()> {
        let bytes = record.encode();
        self.hasher.update(&bytes);
        (self.emit)(Message::from(bytes))
    }

    fn folder(&mut self, folder: &Path) -> Result<()> {
        for path in entries(folder)? {
            let meta = link_metadata(&path)?;
            let name = path.file_name().unwrap_or_default().to_owned();
            if meta.is_dir() {
                self.record(&Record::Enter { name })?;
                self.folder(&path)?;
                self.record(&Record::Leave { mode: mode(&meta) })?;
            } else if meta.is_file() {
                self.file(&path, name, &meta)?;
            } else if meta.is_symlink() {
                let target = fs::read_link(&path)
                    .map_err(|error| named("cannot read the link", &path, &error))?;
                self.record(&Record::Link { name, target: target.into_os_string() })?;
            } else {
                let path = path.display();
                note(format_args!("left out {path}: neither file, directory nor link"));
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, name: std::ffi::OsString, meta: &Metadata) -> Result<()> {
        let mut file = File::open(path).map_err(|error| named("cannot open", path, &error))?;
        self.record(&Record::File { name, mode: mode(meta) })?;
        let mut left = meta.len();
        // A file that grows meanwhile is copied as long as it was, one that shrinks as it is.
        while left > 0 {
            let wanted = left.min(PIECE_BYTES as u64) as usize;
            let piece = self
                .piece(&mut file, wanted)
                .map_err(|error| named("cannot read", path, &error))?;
            let Some(piece) = piece else { break };
            left = left.saturating_sub(piece.len() as u64);
            self.sent.bytes += piece.len() as u64;
            let head = Frame::copy_from_slice(&Record::Piece.encode());
            (self.emit)(Message::from_iter([head, piece]))?;
        }
        self.sent.files += 1;
        self.record(&Record::End)
    }

    /// The next bytes of a file. `None`: there are no more.
    fn piece(&mut self, file: &mut File, wanted: usize) -> io::Result<Option<Frame>> {
        let mut hash = |bytes: &[u8]| {
            self.hasher.update(&Record::Piece.encode());
            self.hasher.update(bytes);
        };
        // Short of loans, ordinary memory does as well.
        let Ok(mut loan) = self.node.loan(wanted) else {
            let mut bytes = vec![0; wanted];
            let count = read_full(file, &mut bytes)?;
            bytes.truncate(count);
            hash(&bytes);
            return Ok((count > 0).then(|| Frame::from(bytes)));
        };
        let count = read_full(file, &mut loan)?;
        hash(&loan[..count]);
        Ok(match count {
            0 => None,
            count if count < wanted => Some(Frame::copy_from_slice(&loan[..count])),
            _ => Some(Frame::from(loan)),
        })
    }
}

/// Fills the buffer, unless the file ends before.
fn read_full(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
