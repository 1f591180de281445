//! What can go wrong, said so that a person can act on it.
//!
//! Every error names the kind of failure, and where known the peer, the link, the phase, the
//! system's own error and what to try. Errors are cheap to clone: a dead endpoint hands the same
//! one to every operation that was pending.

use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use crate::link::LinkKind;

/// The result of most calls in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure it was. Match on this, not on the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An address or a setting cannot be understood.
    InvalidInput,
    /// A host name has no address.
    NameResolution,
    /// The address to listen on is taken.
    AddressInUse,
    /// Nobody listens at the address.
    Refused,
    /// A deadline passed. The operation had no effect, unless its docs say otherwise.
    TimedOut,
    /// The other side does not speak thalweg's protocol.
    NotThalweg,
    /// The other side speaks an incompatible major version.
    VersionMismatch,
    /// The peer broke the protocol: a length, count, key or state that cannot be.
    Protocol,
    /// A limit of this node's or of the peer's configuration was exceeded.
    LimitExceeded,
    /// The endpoint was closed, by this side or by the peer; see [`Error::close_reason`].
    Closed,
    /// The peer is gone without saying goodbye: killed, crashed, or its host is down.
    PeerGone,
    /// The connection failed although the peer may live: reset, cable cut, keepalive expired.
    ConnectionLost,
    /// The receive buffer is smaller than the message with the matching tag.
    BufferTooSmall,
    /// A put or get outside its region.
    OutOfBounds,
    /// The remote key is unknown or was revoked.
    KeyRevoked,
    /// Memory cannot be given back: a transfer uses it, or a device may still reach it. It is kept.
    InUse,
    /// No link that both sides have satisfies the configuration.
    NoRoute,
    /// Descriptors, memory or another resource of this process ran out.
    Resources,
    /// The operation was cancelled before it had any effect.
    Cancelled,
    /// The runtime that the node belongs to has ended.
    RuntimeGone,
    /// This process was forked from the one that made the node.
    Forked,
    /// Something is not supported by this link or this build.
    Unsupported,
    /// Another failure of the operating system.
    Io,
}

impl ErrorKind {
    /// A short lower-case description.
    pub const fn as_str(self) -> &'static str {
        match self {
            ErrorKind::InvalidInput => "invalid input",
            ErrorKind::NameResolution => "name does not resolve",
            ErrorKind::AddressInUse => "address in use",
            ErrorKind::Refused => "connection refused",
            ErrorKind::TimedOut => "timed out",
            ErrorKind::NotThalweg => "peer is not thalweg",
            ErrorKind::VersionMismatch => "incompatible protocol version",
            ErrorKind::Protocol => "protocol violation",
            ErrorKind::LimitExceeded => "limit exceeded",
            ErrorKind::Closed => "endpoint closed",
            ErrorKind::PeerGone => "peer is gone",
            ErrorKind::ConnectionLost => "connection lost",
            ErrorKind::BufferTooSmall => "receive buffer too small",
            ErrorKind::OutOfBounds => "access outside the region",
            ErrorKind::KeyRevoked => "remote key unknown or revoked",
            ErrorKind::InUse => "memory in use",
            ErrorKind::NoRoute => "no usable link",
            ErrorKind::Resources => "out of resources",
            ErrorKind::Cancelled => "cancelled",
            ErrorKind::RuntimeGone => "the node's runtime has ended",
            ErrorKind::Forked => "used in a forked child",
            ErrorKind::Unsupported => "not supported",
            ErrorKind::Io => "system error",
        }
    }
}

/// What was being done when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Reading configuration, making the node.
    Setup,
    /// Binding a listener or accepting on it.
    Listen,
    /// Resolving, connecting, and the exchange of hellos.
    Connect,
    /// Bringing up a link after the hellos.
    LinkSetup,
    /// Moving data.
    Transfer,
    /// Closing.
    Close,
}

impl Phase {
    /// A short lower-case description.
    pub const fn as_str(self) -> &'static str {
        match self {
            Phase::Setup => "setup",
            Phase::Listen => "listen",
            Phase::Connect => "connect",
            Phase::LinkSetup => "link set-up",
            Phase::Transfer => "transfer",
            Phase::Close => "close",
        }
    }
}

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    phase: Phase,
    peer: Option<String>,
    link: Option<LinkKind>,
    detail: String,
    hint: Option<&'static str>,
    os: Option<i32>,
    close: Option<CloseReason>,
}

/// Why an operation failed. Cloning costs one reference count.
///
/// ```
/// use thalweg::{Address, ErrorKind};
/// let error = "thalweg://".parse::<Address>().unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::InvalidInput);
/// assert!(!error.is_retryable());
/// ```
#[derive(Clone)]
pub struct Error(Arc<Inner>);

impl Error {
    pub(crate) fn new(kind: ErrorKind, phase: Phase, detail: impl Into<String>) -> Self {
        Error(Arc::new(Inner {
            kind,
            phase,
            peer: None,
            link: None,
            detail: detail.into(),
            hint: None,
            os: None,
            close: None,
        }))
    }

    pub(crate) fn from_io(phase: Phase, doing: impl fmt::Display, error: &io::Error) -> Self {
        let code = error.raw_os_error();
        let mut made =
            Error::new(kind_of_io(error), phase, format!("{doing}: {error}")).with_os(code);
        if matches!(code, Some(libc::EMFILE | libc::ENFILE)) {
            made = made.with_hint("raise the limit of open files (ulimit -n)");
        }
        made
    }

    pub(crate) fn from_link(error: &LinkError, phase: Phase) -> Self {
        let mut made = Error::new(error.kind, phase, error.detail.clone())
            .with_os(error.os)
            .with_link(error.link);
        if let Some(reason) = &error.close {
            made.inner_mut().close = Some(reason.clone());
        }
        made
    }

    fn inner_mut(&mut self) -> &mut Inner {
        Arc::get_mut(&mut self.0).expect("only fresh errors are amended")
    }

    pub(crate) fn with_peer(mut self, peer: impl Into<String>) -> Self {
        self.inner_mut().peer = Some(peer.into());
        self
    }

    pub(crate) fn with_link(mut self, link: Option<LinkKind>) -> Self {
        self.inner_mut().link = link;
        self
    }

    pub(crate) fn with_os(mut self, os: Option<i32>) -> Self {
        self.inner_mut().os = os;
        self
    }

    pub(crate) fn with_hint(mut self, hint: &'static str) -> Self {
        self.inner_mut().hint = Some(hint);
        self
    }

    pub(crate) fn with_close(mut self, reason: CloseReason) -> Self {
        self.inner_mut().close = Some(reason);
        self
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What was being done.
    pub fn phase(&self) -> Phase {
        self.0.phase
    }

    /// The peer's address, as text, where one was known.
    pub fn peer(&self) -> Option<&str> {
        self.0.peer.as_deref()
    }

    /// The link that failed, where one was up or being set up.
    pub fn link(&self) -> Option<LinkKind> {
        self.0.link
    }

    /// The operating system's error number (`errno`), where there was one.
    pub fn os_code(&self) -> Option<i32> {
        self.0.os
    }

    /// The reason given at close, when the kind is [`ErrorKind::Closed`] and one was given.
    pub fn close_reason(&self) -> Option<&CloseReason> {
        self.0.close.as_ref()
    }

    /// What a person might do about it, where this is known.
    pub fn hint(&self) -> Option<&'static str> {
        self.0.hint
    }

    /// Whether doing the same again, perhaps after a new connect, may succeed without a change to
    /// configuration or program.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self.0.kind,
            ErrorKind::Refused
                | ErrorKind::TimedOut
                | ErrorKind::NameResolution
                | ErrorKind::PeerGone
                | ErrorKind::ConnectionLost
                | ErrorKind::InUse
                | ErrorKind::Resources
                | ErrorKind::Cancelled
        )
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { kind, phase, peer, link, detail, hint, close, .. } = &*self.0;
        write!(f, "{}", kind.as_str())?;
        if !detail.is_empty() {
            write!(f, ": {detail}")?;
        }
        if let Some(close) = close {
            write!(f, ": {close}")?;
        }
        write!(f, " (during {}", phase.as_str())?;
        if let Some(peer) = peer {
            write!(f, ", peer {peer}")?;
        }
        if let Some(link) = link {
            write!(f, ", over {link}")?;
        }
        write!(f, ")")?;
        if let Some(hint) = hint {
            write!(f, "; try: {hint}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({self})")
    }
}

impl std::error::Error for Error {}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        let kind = match error.kind() {
            ErrorKind::InvalidInput => io::ErrorKind::InvalidInput,
            ErrorKind::NameResolution => io::ErrorKind::NotFound,
            ErrorKind::AddressInUse => io::ErrorKind::AddrInUse,
            ErrorKind::Refused => io::ErrorKind::ConnectionRefused,
            ErrorKind::TimedOut => io::ErrorKind::TimedOut,
            ErrorKind::NotThalweg | ErrorKind::VersionMismatch | ErrorKind::Protocol => {
                io::ErrorKind::InvalidData
            }
            ErrorKind::PeerGone | ErrorKind::ConnectionLost => io::ErrorKind::ConnectionReset,
            ErrorKind::InUse => io::ErrorKind::ResourceBusy,
            ErrorKind::Closed => io::ErrorKind::NotConnected,
            ErrorKind::Unsupported => io::ErrorKind::Unsupported,
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

/// Why an endpoint was closed: a number and a text of the closing application's choosing.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct CloseReason {
    /// Application-defined; 0 means "done".
    pub code: u32,
    /// At most [`CloseReason::TEXT_MAX`] bytes of it travel.
    pub text: String,
    /// Whether the peer closed (`true`) or this side did.
    pub by_peer: bool,
}

impl CloseReason {
    /// The longest text that travels, in bytes of UTF-8.
    pub const TEXT_MAX: usize = 512;

    /// A reason with this code and text.
    pub fn new(code: u32, text: impl Into<String>) -> Self {
        CloseReason { code, text: text.into(), by_peer: false }
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let who = if self.by_peer { "by the peer" } else { "by this side" };
        write!(f, "{who}, code {}", self.code)?;
        if !self.text.is_empty() {
            write!(f, ", {:?}", self.text)?;
        }
        Ok(())
    }
}

/// An operation that failed, with the buffer it owned.
///
/// `?` turns it into a plain [`Error`] and drops the buffer.
pub struct Failed<B> {
    /// Why.
    pub error: Error,
    /// What was to be sent, or received into; for a receive its contents are unspecified. `None`
    /// only after a deadline, when the peer may still be reading or writing the memory: it is kept
    /// until that has ended, and dropped then.
    pub buffer: Option<B>,
}

impl<B> Failed<B> {
    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.error.kind()
    }
}

impl<B> fmt::Debug for Failed<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Failed({})", self.error)
    }
}

impl<B> fmt::Display for Failed<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<B> std::error::Error for Failed<B> {}

impl<B> From<Failed<B>> for Error {
    fn from(failed: Failed<B>) -> Error {
        failed.error
    }
}

/// What a link reports. The driver adds peer and phase and makes an [`Error`] of it. One word, so
/// that results which carry it stay in registers: every message passes through a dozen of them.
#[derive(Clone, Debug)]
pub(crate) struct LinkError(Box<Cause>);

/// What a [`LinkError`] says.
#[derive(Clone, Debug)]
pub(crate) struct Cause {
    pub kind: ErrorKind,
    pub link: Option<LinkKind>,
    pub detail: String,
    pub os: Option<i32>,
    pub close: Option<CloseReason>,
}

impl Deref for LinkError {
    type Target = Cause;

    fn deref(&self) -> &Cause {
        &self.0
    }
}

impl DerefMut for LinkError {
    fn deref_mut(&mut self) -> &mut Cause {
        &mut self.0
    }
}

impl From<Cause> for LinkError {
    #[cold]
    fn from(cause: Cause) -> Self {
        LinkError(Box::new(cause))
    }
}

impl LinkError {
    #[cold]
    pub fn new(
        kind: ErrorKind,
        link: impl Into<Option<LinkKind>>,
        detail: impl Into<String>,
    ) -> Self {
        Cause { kind, link: link.into(), detail: detail.into(), os: None, close: None }.into()
    }

    pub fn protocol(link: LinkKind, detail: impl Into<String>) -> Self {
        LinkError::new(ErrorKind::Protocol, link, detail)
    }

    pub fn io(link: LinkKind, doing: impl fmt::Display, error: &io::Error) -> Self {
        Cause {
            kind: kind_of_io(error),
            link: Some(link),
            detail: format!("{doing}: {error}"),
            os: error.raw_os_error(),
            close: None,
        }
        .into()
    }
}

fn kind_of_io(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::AddrInUse => ErrorKind::AddressInUse,
        io::ErrorKind::ConnectionRefused => ErrorKind::Refused,
        io::ErrorKind::TimedOut => ErrorKind::TimedOut,
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::NotConnected
        | io::ErrorKind::UnexpectedEof => ErrorKind::ConnectionLost,
        io::ErrorKind::OutOfMemory => ErrorKind::Resources,
        io::ErrorKind::InvalidInput => ErrorKind::InvalidInput,
        _ => match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS | libc::ENOSPC) => {
                ErrorKind::Resources
            }
            Some(libc::EHOSTUNREACH | libc::ENETUNREACH | libc::ENETDOWN) => {
                ErrorKind::ConnectionLost
            }
            _ => ErrorKind::Io,
        },
    }
}
