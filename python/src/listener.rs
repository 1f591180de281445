//! The passive side, for Python.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::prelude::*;

use crate::local::Local;
use crate::log;
use crate::node::{Handle, with_block};
use crate::operation::{Operation, Outcome, Terms};

/// Accepts connections at an address.
#[pyclass(module = "thalweg", frozen, weakref)]
pub struct Listener {
    shared: Handle,
    listener: Arc<Local<thalweg::Listener>>,
    is_closed: AtomicBool,
    address: String,
}

impl Listener {
    pub fn make(
        py: Python<'_>,
        shared: &Handle,
        listener: thalweg::Listener,
    ) -> PyResult<Py<PyAny>> {
        let this = Listener {
            shared: shared.clone(),
            address: listener.address().to_string(),
            listener: Arc::new(Local::new(listener)),
            is_closed: AtomicBool::new(false),
        };
        Ok(Py::new(py, this)?.into_any())
    }
}

#[pymethods]
impl Listener {
    /// Where it listens, with the port that was bound.
    #[getter]
    fn address(&self) -> &str {
        &self.address
    }

    /// The next endpoint. Fails with `ClosedError` once the listener is closed.
    #[pyo3(signature = (*, timeout=None))]
    fn accept(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Operation> {
        log::ask(py)?;
        let listener = self.listener.clone();
        let terms = Terms::new("accept", Some(&self.address), timeout)?;
        Ok(Operation::new(&self.shared, terms, async move {
            listener.accept().await.map(Outcome::Endpoint)
        }))
    }

    /// Stops listening, at once. Endpoints that were accepted live on. From any thread.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.is_closed.store(true, Ordering::Release);
        self.shared.locking(py, || self.listener.close())?;
        // It is the node's task that closes the socket.
        self.shared.progress_here(py)
    }

    /// Whether it was closed.
    #[getter]
    fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    fn __aenter__(slf: Bound<'_, Self>) -> PyResult<Bound<'_, PyAny>> {
        with_block(slf.as_any(), "enter")
    }

    fn __aexit__<'py>(
        slf: Bound<'py, Self>,
        _kind: &Bound<'py, PyAny>,
        _value: &Bound<'py, PyAny>,
        _traceback: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        with_block(slf.as_any(), "leave_listener")
    }

    fn __aiter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __anext__(slf: Bound<'_, Self>) -> PyResult<Bound<'_, PyAny>> {
        with_block(slf.as_any(), "next_endpoint")
    }

    fn __repr__(&self) -> String {
        format!("<thalweg.Listener at {}>", self.address)
    }
}
