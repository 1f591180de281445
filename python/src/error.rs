//! thalweg's errors as Python's exceptions. The classes are written in Python
//! (`thalweg/_errors.py`): they have several bases, which only Python can say.

use pyo3::PyTypeInfo;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use thalweg::{Error, ErrorKind};

use crate::used::used;

/// The name of a kind, as `Error.kind` in Python has it.
fn kind(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::InvalidInput => "invalid-input",
        ErrorKind::NameResolution => "name-resolution",
        ErrorKind::AddressInUse => "address-in-use",
        ErrorKind::Refused => "refused",
        ErrorKind::TimedOut => "timed-out",
        ErrorKind::NotThalweg => "not-thalweg",
        ErrorKind::VersionMismatch => "version-mismatch",
        ErrorKind::Protocol => "protocol",
        ErrorKind::LimitExceeded => "limit-exceeded",
        ErrorKind::Closed => "closed",
        ErrorKind::PeerGone => "peer-gone",
        ErrorKind::ConnectionLost => "connection-lost",
        ErrorKind::BufferTooSmall => "buffer-too-small",
        ErrorKind::OutOfBounds => "out-of-bounds",
        ErrorKind::KeyRevoked => "key-revoked",
        ErrorKind::NoRoute => "no-route",
        ErrorKind::Resources => "resources",
        ErrorKind::Cancelled => "cancelled",
        ErrorKind::RuntimeGone => "runtime-gone",
        ErrorKind::Forked => "forked",
        ErrorKind::Unsupported => "unsupported",
        _ => "io",
    }
}

fn make(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
    used(py).map(|used| used.make_error.bind(py))
}

/// The exception, as an object.
pub fn to_object<'py>(py: Python<'py>, error: &Error) -> PyResult<Bound<'py, PyAny>> {
    let fields = PyDict::new(py);
    fields.set_item("kind", kind(error.kind()))?;
    fields.set_item("phase", error.phase().as_str())?;
    fields.set_item("peer", error.peer())?;
    fields.set_item("link", error.link().map(|link| link.name()))?;
    fields.set_item("errno", error.os_code())?;
    fields.set_item("hint", error.hint())?;
    fields.set_item("retryable", error.is_retryable())?;
    let close = error.close_reason();
    fields.set_item("close_code", close.map(|reason| reason.code))?;
    fields.set_item("close_text", close.map(|reason| reason.text.as_str()))?;
    fields.set_item("closed_by_peer", close.map(|reason| reason.by_peer))?;
    make(py)?.call((error.to_string(),), Some(&fields))
}

/// The exception, to be raised.
pub fn raise(py: Python<'_>, error: &Error) -> PyErr {
    match to_object(py, error) {
        Ok(object) => PyErr::from_value(object),
        Err(other) => other,
    }
}

/// An error of this crate's own making.
fn own(
    py: Python<'_>,
    text: String,
    (kind, phase): (&str, &str),
    peer: Option<&str>,
    retryable: bool,
) -> PyErr {
    let made = (|| {
        let fields = PyDict::new(py);
        fields.set_item("kind", kind)?;
        fields.set_item("phase", phase)?;
        fields.set_item("peer", peer)?;
        fields.set_item("retryable", retryable)?;
        make(py)?.call((text,), Some(&fields))
    })();
    made.map_or_else(|other| other, PyErr::from_value)
}

/// An operation took longer than it was given.
pub fn timed_out(py: Python<'_>, what: &str, peer: Option<&str>, seconds: f64) -> PyErr {
    let with = peer.map(|peer| format!(" (peer {peer})")).unwrap_or_default();
    let text = format!("{what} took longer than {seconds} s{with}");
    own(py, text, ("timed-out", "transfer"), peer, true)
}

/// Whether this is raised to end the program, or at least the loop's run, rather than to tell of a
/// failure: `KeyboardInterrupt`, `SystemExit` and the like.
pub fn ends_program(py: Python<'_>, error: &PyErr) -> bool {
    !error.is_instance_of::<PyException>(py)
}

/// A warning from where nothing can be raised.
pub fn warn<K: PyTypeInfo>(text: String) {
    Python::try_attach(|py| {
        // Something may be dropped while an exception is on its way.
        let raised = PyErr::take(py);
        let text = std::ffi::CString::new(text).unwrap_or_default();
        if let Err(error) = PyErr::warn(py, &py.get_type::<K>(), &text, 1) {
            error.write_unraisable(py, None);
        }
        if let Some(raised) = raised {
            raised.restore(py);
        }
    });
}
