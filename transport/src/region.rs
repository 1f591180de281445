//! Registered memory and the keys by which peers reach it.

use std::any::Any;
use std::fmt;
use std::future::{Future, poll_fn};
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use crate::driver::keys::Entry;
use crate::driver::node::NodeShared;
use crate::driver::op::forked;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::memory::{BufferMut, racy_read, racy_write};
use crate::proto::keys::{
    ACCESS_READ, ACCESS_WRITE, REMOTE_KEY_BYTES, RemoteKeyWire, check_bounds,
};

/// What peers may do with a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Get.
    Read,
    /// Put.
    Write,
    /// Both.
    ReadWrite,
}

impl Access {
    pub(crate) fn bits(self) -> u8 {
        match self {
            Access::Read => ACCESS_READ,
            Access::Write => ACCESS_WRITE,
            Access::ReadWrite => ACCESS_READ | ACCESS_WRITE,
        }
    }
}

/// What a peer needs to reach a region. Plain data: send it in a message.
///
/// ```
/// use thalweg::RemoteKey;
/// assert!(RemoteKey::from_bytes(b"too short").is_err());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteKey(pub(crate) RemoteKeyWire);

impl RemoteKey {
    /// Length of the encoded key.
    pub const BYTES: usize = REMOTE_KEY_BYTES;

    /// The key as bytes.
    pub fn to_bytes(&self) -> [u8; RemoteKey::BYTES] {
        self.0.to_bytes()
    }

    /// The key from bytes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`] if these bytes are none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        RemoteKeyWire::from_bytes(bytes).map(RemoteKey).map_err(|error| {
            Error::new(ErrorKind::InvalidInput, Phase::Setup, format!("a remote key: {error}"))
        })
    }

    /// Length of the region, in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.0.len
    }
}

/// Memory that peers can reach by its key, until it is revoked or dropped.
///
/// Peers may write at any time, so the bytes are never handed out as a slice while registered:
/// [`Registered::read`] and [`Registered::write`] copy, and a copy may mix bytes from before and
/// after a put that is landing. Use a message or [`crate::Endpoint::fence`] to know that one has
/// landed.
///
/// Dropping it revokes the key too; the memory is then freed when the last transfer that uses it
/// has ended.
pub struct Registered<B> {
    node: Arc<NodeShared>,
    entry: Option<Arc<Entry>>,
    key: u64,
    buffer: PhantomData<fn() -> B>,
}

impl<B: BufferMut> Registered<B> {
    pub(crate) fn new(node: Arc<NodeShared>, mut buffer: B, access: Access) -> Result<Self> {
        let memory = buffer.region_mut().into();
        let (key, entry) = node
            .keys
            .register(memory, access.bits(), Box::new(buffer))
            .map_err(|error| Error::from_io(Phase::Setup, "making a remote key", &error))?;
        Ok(Registered { node, entry: Some(entry), key, buffer: PhantomData })
    }

    fn entry(&self) -> &Entry {
        self.entry.as_ref().expect("present until revoked")
    }

    /// The key to give to peers.
    pub fn key(&self) -> RemoteKey {
        let entry = self.entry();
        RemoteKey(self.node.remote_key(self.key, entry.len() as u64, entry.access()))
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> usize {
        self.entry().len()
    }

    fn check(&self, offset_bytes: usize, len: usize) -> Result<()> {
        if check_bounds(offset_bytes as u64, len as u64, self.entry().len() as u64) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::OutOfBounds,
            Phase::Transfer,
            format!("{len} bytes at {offset_bytes} of {}", self.entry().len()),
        ))
    }

    /// Copies bytes out.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfBounds`].
    pub fn read(&self, offset_bytes: usize, to: &mut [u8]) -> Result<()> {
        self.check(offset_bytes, to.len())?;
        let memory = self.entry().memory();
        // SAFETY: in bounds of memory that the entry keeps; raw, because peers may be writing.
        unsafe { racy_read(memory.ptr.add(offset_bytes), to) };
        Ok(())
    }

    /// Copies bytes in.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfBounds`].
    pub fn write(&mut self, offset_bytes: usize, from: &[u8]) -> Result<()> {
        self.check(offset_bytes, from.len())?;
        let memory = self.entry().memory();
        // SAFETY: in bounds of memory that the entry keeps, and writable by `BufferMut`'s promise;
        // raw, because peers may be reading and writing.
        unsafe { racy_write(memory.ptr.add(offset_bytes), from) };
        Ok(())
    }

    /// Revokes the key, waits until no transfer uses the memory, and gives it back. From the call
    /// on, new puts and gets are refused with [`ErrorKind::KeyRevoked`]; such as peers' links carry
    /// out themselves may begin until the peer has heard of it.
    ///
    /// Waits for transfers that this process carries out, and for every peer that was granted such
    /// access to say that it has ended. From one that does not say so within
    /// [`crate::Config::close_timeout`] it is taken: what its link had under way there ends with an
    /// error, and its later puts and gets are carried out by this process.
    ///
    /// # Errors
    ///
    /// The region, to be asked again whenever it suits, with the reason:
    ///
    /// - [`ErrorKind::InUse`] if after that time, or twice that time where a peer had to be waited
    ///   for, the memory is still in use: this process serves a transfer to a peer that does not
    ///   go on, or a device refuses to end a registration, which every call tries again to end. The
    ///   memory is kept: also if the region is dropped, for as long as anything may reach it.
    /// - [`ErrorKind::RuntimeGone`] if the node's runtime has ended, and the memory is in use still.
    /// - [`ErrorKind::Forked`] in a forked child, whose parent has the region.
    ///
    /// **Cancel safety.** Once polled the key is revoked; if the future is dropped, the memory is
    /// freed when the last transfer has ended.
    pub async fn revoke(mut self) -> Result<B, NotRevoked<B>> {
        if self.node.fork.forked() {
            return Err(NotRevoked { error: forked(), region: self });
        }
        self.node.keys.remove(self.key);
        self.entry().end_stubborn();
        match self.unused().await {
            Ok(buffer) => {
                self.entry = None;
                Ok(*buffer.downcast::<B>().expect("registered with this type"))
            }
            Err(error) => Err(NotRevoked { error, region: self }),
        }
    }

    /// The buffer, once nothing uses it any more.
    async fn unused(&self) -> Result<Box<dyn Any + Send>> {
        let (node, mut patience) = (&self.node, None);
        poll_fn(|cx| {
            let (buffer, told) = self.entry().revoke(Some(cx.waker()));
            if let Some(buffer) = buffer {
                return Poll::Ready(Ok(buffer));
            }
            // Peers have that time to give it back, and then it is taken.
            let times = if told.is_nobody() { 1 } else { 2 };
            node.cut_later(told);
            let limit = node.config.close_timeout * times;
            let sleep = || node.timers.sleep_until(Instant::now() + limit);
            let patience = patience.get_or_insert_with(sleep);
            // In this order: whoever sleeps is woken when the node's runtime has ended.
            if Pin::new(patience).poll(cx).is_pending() && !node.has_wound_up() {
                return Poll::Pending;
            }
            self.entry().end_stubborn();
            let (buffer, _) = self.entry().revoke(Some(cx.waker()));
            Poll::Ready(buffer.ok_or_else(|| self.still_in_use()))
        })
        .await
    }

    fn still_in_use(&self) -> Error {
        let (kind, detail) = match self.node.is_gone() {
            true => (ErrorKind::RuntimeGone, "a region is still in use, or a device reaches it"),
            false => (ErrorKind::InUse, "a transfer or a device still uses the region"),
        };
        let error = Error::new(kind, Phase::Close, detail);
        error.with_hint("end the endpoints of peers that do not go on, and revoke it again")
    }
}

/// A region whose memory cannot be given back yet. Its key is revoked.
///
/// `?` turns it into a plain [`Error`] and drops the region; its memory is then freed when nothing
/// uses it any more.
pub struct NotRevoked<B> {
    /// Why.
    pub error: Error,
    /// To be asked again.
    pub region: Registered<B>,
}

impl<B> NotRevoked<B> {
    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.error.kind()
    }
}

impl<B> fmt::Debug for NotRevoked<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NotRevoked({})", self.error)
    }
}

impl<B> fmt::Display for NotRevoked<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<B> std::error::Error for NotRevoked<B> {}

impl<B> From<NotRevoked<B>> for Error {
    fn from(failed: NotRevoked<B>) -> Error {
        failed.error
    }
}

impl<B> Drop for Registered<B> {
    fn drop(&mut self) {
        let Some(entry) = self.entry.take() else { return };
        if self.node.fork.forked() {
            // The memory is the parent's, and so may a lock of the region's be.
            return std::mem::forget(entry);
        }
        self.node.keys.remove(self.key);
        entry.end_stubborn();
        // The buffer is not wanted back: it is dropped now, or with the last user.
        let (buffer, told) = entry.revoke(None);
        drop(buffer);
        self.node.cut_later(told);
    }
}

impl<B> fmt::Debug for Registered<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let len = self.entry.as_ref().map_or(0, |entry| entry.len());
        write!(f, "Registered({len} bytes)")
    }
}
