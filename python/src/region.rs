//! Registered memory and its keys, for Python.

use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use thalweg::{Access, Registered, RemoteKey as Key};

use crate::buffer::{PyMemory, with_bytes};
use crate::error;
use crate::local::Local;
use crate::node::Handle;
use crate::operation::{Operation, Outcome, Terms};

/// What a peer needs to reach a region. ``bytes(key)`` travels in a message.
#[pyclass(module = "thalweg", frozen, eq)]
#[derive(PartialEq)]
pub struct RemoteKey(Key);

impl RemoteKey {
    /// From a key, or from its bytes.
    pub fn of(object: &Bound<'_, PyAny>) -> PyResult<Key> {
        if let Ok(key) = object.cast::<RemoteKey>() {
            return Ok(key.get().0);
        }
        with_bytes(object, Key::from_bytes)
            .map_err(|_| PyTypeError::new_err("key: a RemoteKey or its bytes"))?
            .map_err(|error| error::raise(object.py(), &error))
    }
}

#[pymethods]
impl RemoteKey {
    /// The key from its bytes.
    #[staticmethod]
    fn from_bytes(data: &Bound<'_, PyAny>) -> PyResult<Self> {
        RemoteKey::of(data).map(RemoteKey)
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.to_bytes())
    }

    /// Length of the region, in bytes.
    fn __len__(&self) -> usize {
        usize::try_from(self.0.len_bytes()).unwrap_or(usize::MAX)
    }

    fn __repr__(&self) -> String {
        format!("<thalweg.RemoteKey of {} bytes>", self.0.len_bytes())
    }
}

/// Memory that peers can reach by its key, until it is revoked. The buffer stays exported for as
/// long. Peers may write at any time: know by a message or a fence that a put has landed.
#[pyclass(module = "thalweg", frozen, weakref)]
pub struct Region {
    shared: Handle,
    registered: Local<Mutex<Option<Registered<PyMemory>>>>,
    key: Key,
}

impl Region {
    pub fn register(
        py: Python<'_>,
        shared: &Handle,
        memory: PyMemory,
        access: &str,
    ) -> PyResult<Self> {
        let access = match access {
            "read" => Access::Read,
            "write" => Access::Write,
            "readwrite" => Access::ReadWrite,
            _ => return Err(PyValueError::new_err("access: 'read', 'write' or 'readwrite'")),
        };
        let registered = shared
            .locking(py, || shared.node.register(memory, access))?
            .map_err(|error| error::raise(py, &error))?;
        let key = registered.key();
        let registered = Local::new(Mutex::new(Some(registered)));
        Ok(Region { shared: shared.clone(), registered, key })
    }
}

#[pymethods]
impl Region {
    /// What a peer needs.
    #[getter]
    fn key(&self) -> RemoteKey {
        RemoteKey(self.key)
    }

    fn __len__(&self) -> usize {
        RemoteKey(self.key).__len__()
    }

    /// Revokes the key, and waits until no transfer uses the memory.
    fn revoke(&self) -> PyResult<Operation> {
        let mut slot = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        let registered =
            slot.take().ok_or_else(|| PyRuntimeError::new_err("this region was revoked before"))?;
        let terms = Terms::new("revoke", None, None)?;
        Ok(Operation::new(&self.shared, terms, async move {
            drop(registered.revoke().await);
            Ok(Outcome::Nothing)
        }))
    }

    fn __repr__(&self) -> String {
        format!("<thalweg.Region of {} bytes>", self.key.len_bytes())
    }
}
