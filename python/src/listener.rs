//! The passive side, for Python.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use pyo3::prelude::*;
use thalweg::Error;

use crate::local::{self, Local};
use crate::node::{Shared, with_block};
use crate::operation::{Operation, Outcome, Terms};

/// A listener that can be closed while somebody waits for it.
struct Door {
    listener: Option<Arc<thalweg::Listener>>,
    waiting: Vec<Waker>,
}

/// Accepts connections at an address.
#[pyclass(module = "thalweg", frozen, weakref)]
pub struct Listener {
    shared: Arc<Shared>,
    door: Arc<Local<Mutex<Door>>>,
    address: String,
}

fn open(door: &Mutex<Door>) -> MutexGuard<'_, Door> {
    door.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Listener {
    pub fn make(
        py: Python<'_>,
        shared: &Arc<Shared>,
        listener: thalweg::Listener,
    ) -> PyResult<Py<PyAny>> {
        let address = listener.address().to_string();
        let door = Door { listener: Some(Arc::new(listener)), waiting: Vec::new() };
        let door = Arc::new(Local::new(Mutex::new(door)));
        Ok(Py::new(py, Listener { shared: shared.clone(), door, address })?.into_any())
    }
}

/// The next endpoint, or `None` once the listener is closed.
async fn accept(door: Arc<Local<Mutex<Door>>>) -> Result<Option<thalweg::Endpoint>, Error> {
    let Some(listener) = open(&door).listener.clone() else { return Ok(None) };
    let mut next = pin!(listener.accept());
    poll_fn(|cx| {
        {
            let mut door = open(&door);
            if door.listener.is_none() {
                return Poll::Ready(Ok(None));
            }
            if !door.waiting.iter().any(|known| known.will_wake(cx.waker())) {
                door.waiting.push(cx.waker().clone());
            }
        }
        let polled = next.as_mut().poll(cx);
        if polled.is_ready() {
            open(&door).waiting.retain(|known| !known.will_wake(cx.waker()));
        }
        polled.map_ok(Some)
    })
    .await
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
    fn accept(&self, timeout: Option<f64>) -> PyResult<Operation> {
        let door = self.door.clone();
        let terms = Terms::new("accept", Some(&self.address), timeout)?;
        Ok(Operation::new(&self.shared, terms, async move {
            match accept(door).await? {
                Some(endpoint) => Ok(Outcome::Endpoint(endpoint)),
                None => Ok(Outcome::ListenerClosed),
            }
        }))
    }

    /// Stops listening, at once. Endpoints that were accepted live on. From any thread.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let (listener, waiting) = {
            let mut door = open(&self.door);
            (door.listener.take(), std::mem::take(&mut door.waiting))
        };
        waiting.into_iter().for_each(Waker::wake);
        local::release(listener);
        // It is the node's task that closes the socket.
        self.shared.progress_here(py)
    }

    /// Whether it was closed.
    #[getter]
    fn is_closed(&self) -> bool {
        open(&self.door).listener.is_none()
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
