//! A connection, for Python.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple, PyWeakrefReference};
use thalweg::{CloseReason, Error, Failed, Frame, Message, RemoteKey as Key};

use crate::buffer::{self, PyMemory};
use crate::error;
use crate::local::Local;
use crate::node::{Handle, with_block};
use crate::operation::{Heavy, Operation, Outcome, Terms, Watch};
use crate::region::RemoteKey;
use crate::report;

/// A message of this size is worth the letting go of the GIL.
pub const LARGE_BYTES: usize = 64 << 10;

/// Frames up to this size are copied when the send is made: cheaper than to hold on to an object.
const COPIED_MAX: usize = 4096;

/// A connection between two nodes.
#[pyclass(module = "thalweg", frozen, weakref)]
pub struct Endpoint {
    shared: Handle,
    endpoint: Local<thalweg::Endpoint>,
    sends: Arc<Heavy>,
    receives: Arc<Heavy>,
}

impl Endpoint {
    pub fn make(
        py: Python<'_>,
        shared: &Handle,
        endpoint: thalweg::Endpoint,
    ) -> PyResult<Py<PyAny>> {
        let this = Endpoint {
            shared: shared.clone(),
            endpoint: Local::new(endpoint),
            sends: Arc::default(),
            receives: Arc::default(),
        };
        Ok(Py::new(py, this)?.into_any())
    }

    fn terms(&self, what: &'static str, timeout: Option<f64>) -> PyResult<Terms> {
        Terms::new(what, Some(&self.endpoint.peer().address), timeout)
    }

    /// An operation with no memory of the caller's.
    fn simple<R>(
        &self,
        what: &'static str,
        timeout: Option<f64>,
        work: impl FnOnce(thalweg::Endpoint) -> R,
    ) -> PyResult<Operation>
    where
        R: Future<Output = Result<Outcome, Error>> + Send + 'static,
    {
        let terms = self.terms(what, timeout)?;
        Ok(Operation::new(&self.shared, terms, work((*self.endpoint).clone())))
    }

    /// A frame of what has the buffer protocol.
    fn frame(&self, object: &Bound<'_, PyAny>) -> PyResult<Frame> {
        if let Ok(bytes) = object.cast::<PyBytes>() {
            let bytes = bytes.as_bytes();
            if bytes.len() <= COPIED_MAX {
                return Ok(Frame::copy_from_slice(bytes));
            }
        }
        buffer::frame(&self.shared, object, COPIED_MAX)
    }

    fn message(&self, frames: &Bound<'_, PyAny>) -> PyResult<Message> {
        if let Ok(list) = frames.cast::<PyList>() {
            return list.iter().map(|frame| self.frame(&frame)).collect();
        }
        if let Ok(tuple) = frames.cast::<PyTuple>() {
            return tuple.iter().map(|frame| self.frame(&frame)).collect();
        }
        if buffer::is_buffer(frames) {
            return Ok(Message::from(self.frame(frames)?));
        }
        // Its length is not asked for: PyO3 looks up how at the first use (see `used`).
        let mut frames = frames.try_iter()?;
        std::iter::from_fn(|| frames.next()).map(|frame| self.frame(&frame?)).collect()
    }
}

#[pymethods]
impl Endpoint {
    /// Sends a message: one buffer, or an iterable of them. Over when the memory may be changed
    /// again, which is not yet when the peer has it; it must not be changed before. Cancelled or
    /// late, a send that has begun goes on, and its buffers stay exported until it has ended.
    #[pyo3(signature = (frames, *, timeout=None))]
    fn send(&self, frames: &Bound<'_, PyAny>, timeout: Option<f64>) -> PyResult<Operation> {
        let message = self.message(frames)?;
        self.sends.set(message.len_bytes() >= LARGE_BYTES);
        let terms = self.terms("send", timeout)?.sharing(&self.sends);
        let endpoint = (*self.endpoint).clone();
        Ok(Operation::new(&self.shared, terms, async move {
            endpoint.send(message).await.map(|_| Outcome::Nothing).map_err(|failed| failed.error)
        }))
    }

    /// The next message: its frames, as writable memoryviews of memory of this process.
    #[pyo3(signature = (*, timeout=None))]
    fn recv(&self, timeout: Option<f64>) -> PyResult<Operation> {
        let terms = self.terms("recv", timeout)?.sharing(&self.receives).taking();
        let endpoint = (*self.endpoint).clone();
        Ok(Operation::new(&self.shared, terms, async move {
            endpoint.recv().await.map(Outcome::Message)
        }))
    }

    /// Sends a buffer under a tag of 64 bits.
    #[pyo3(signature = (tag, buffer, *, timeout=None))]
    fn tag_send(
        &self,
        tag: u64,
        buffer: &Bound<'_, PyAny>,
        timeout: Option<f64>,
    ) -> PyResult<Operation> {
        let memory = PyMemory::reading(&self.shared, buffer)?;
        let terms = self.terms("tag_send", timeout)?.sharing(&self.sends);
        let endpoint = (*self.endpoint).clone();
        Ok(Operation::new(&self.shared, terms, async move {
            ended(endpoint.tag_send(tag, memory).await)
        }))
    }

    /// Receives into a writable buffer the first payload whose tag agrees in the bits of `mask`.
    /// Gives its tag and its length in bytes.
    #[pyo3(signature = (tag, mask, buffer, *, timeout=None))]
    fn tag_recv(
        &self,
        tag: u64,
        mask: u64,
        buffer: &Bound<'_, PyAny>,
        timeout: Option<f64>,
    ) -> PyResult<Operation> {
        let terms = self.terms("tag_recv", timeout)?.sharing(&self.receives).taking();
        let endpoint = (*self.endpoint).clone();
        let lend = |lent: &_| PyMemory::writing(&self.shared, buffer, Some(lent));
        Operation::lending(&self.shared, terms, lend, |memory| {
            Box::pin(async move {
                let got = endpoint.tag_recv(tag, mask, memory).await;
                got.map(|got| Outcome::Tagged { tag: got.tag, len_bytes: got.len_bytes })
                    .map_err(|failed| failed.error)
            })
        })
    }

    /// Writes a buffer into a region of the peer's, at `offset` bytes. Over when it is there.
    #[pyo3(signature = (buffer, key, offset=0, *, timeout=None))]
    fn put(
        &self,
        buffer: &Bound<'_, PyAny>,
        key: &Bound<'_, PyAny>,
        offset: u64,
        timeout: Option<f64>,
    ) -> PyResult<Operation> {
        let key: Key = RemoteKey::of(key)?;
        let memory = PyMemory::reading(&self.shared, buffer)?;
        let terms = self.terms("put", timeout)?.sharing(&self.sends);
        let endpoint = (*self.endpoint).clone();
        Ok(Operation::new(&self.shared, terms, async move {
            ended(endpoint.put(memory, &key, offset).await)
        }))
    }

    /// Fills a writable buffer from a region of the peer's, from `offset` bytes on.
    #[pyo3(signature = (buffer, key, offset=0, *, timeout=None))]
    fn get(
        &self,
        buffer: &Bound<'_, PyAny>,
        key: &Bound<'_, PyAny>,
        offset: u64,
        timeout: Option<f64>,
    ) -> PyResult<Operation> {
        let key: Key = RemoteKey::of(key)?;
        let terms = self.terms("get", timeout)?.sharing(&self.receives);
        let endpoint = (*self.endpoint).clone();
        let lend = |lent: &_| PyMemory::writing(&self.shared, buffer, Some(lent));
        Operation::lending(&self.shared, terms, lend, |memory| {
            Box::pin(async move { ended(endpoint.get(memory, &key, offset).await) })
        })
    }

    /// Orders the families: over when everything started before has taken effect at the peer.
    #[pyo3(signature = (*, timeout=None))]
    fn fence(&self, timeout: Option<f64>) -> PyResult<Operation> {
        self.simple("fence", timeout, |endpoint| async move {
            endpoint.fence().await.map(|()| Outcome::Nothing)
        })
    }

    /// Waits until everything that was handed over so far has taken effect at the peer.
    #[pyo3(signature = (*, timeout=None))]
    fn drain(&self, timeout: Option<f64>) -> PyResult<Operation> {
        self.simple("drain", timeout, |endpoint| async move {
            endpoint.drain().await.map(|()| Outcome::Nothing)
        })
    }

    /// Closes: lets what was sent go out, tells the peer why, and waits for its answer.
    #[pyo3(signature = (code=0, text=String::new()))]
    fn close(&self, code: u32, text: String) -> PyResult<Operation> {
        let reason = CloseReason::new(code, text);
        self.simple("close", None, move |endpoint| async move {
            endpoint.close(reason).await.map(|()| Outcome::Nothing)
        })
    }

    /// Ends the endpoint at once, without flushing or telling the peer. From any thread.
    fn abort(&self, py: Python<'_>) -> PyResult<()> {
        self.shared.locking(py, || self.endpoint.abort())?;
        self.shared.settle_here(py)
    }

    /// Waits for the end, and gives the error that says why.
    fn closed(&self) -> PyResult<Operation> {
        self.simple("closed", None, |endpoint| async move {
            Ok(Outcome::Ended(endpoint.closed().await))
        })
    }

    /// `callback(endpoint, error)` is called once, from the loop, when the endpoint has ended. It
    /// does not keep the endpoint open: where nobody else holds it any more, `endpoint` is `None`.
    fn add_close_callback(slf: &Bound<'_, Self>, callback: Py<PyAny>) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        this.shared.check()?;
        // Neither holds the endpoint: it closes when nobody else does.
        let closed = this.endpoint.closed();
        let work = Box::pin(async move { Ok(Outcome::Ended(closed.await)) });
        let slf = PyWeakrefReference::new(slf)?;
        let call = with_block(slf.as_any(), "close_callback")?.call1((callback,))?;
        Watch::begin(py, &this.shared, work, Some(call.unbind()))
    }

    /// Which way this endpoint's traffic goes, and why.
    fn route(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        report::route(py, &self.endpoint.route())
    }

    /// What this endpoint has counted, by name. From any thread.
    fn stats(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let stats = self.shared.locking(py, || self.endpoint.stats())?;
        report::stats(py, &stats)
    }

    /// The link that carries the messages.
    #[getter]
    fn link(&self) -> &'static str {
        self.endpoint.route().link().name()
    }

    #[getter]
    fn peer_address(&self) -> &str {
        &self.endpoint.peer().address
    }

    /// Under which of its addresses, and from which port, this host reached the peer at first.
    #[getter]
    fn local_address(&self) -> &str {
        &self.endpoint.peer().local_address
    }

    /// What the peer's application said of itself.
    #[getter]
    fn peer_hello<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.endpoint.peer().hello)
    }

    /// Whether the endpoint has ended. From any thread.
    #[getter]
    fn is_closed(&self, py: Python<'_>) -> PyResult<bool> {
        self.shared.locking(py, || self.endpoint.ended().is_some())
    }

    /// Why the endpoint has ended; `None` while it is up. From any thread.
    #[getter]
    fn close_error(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let ended = self.shared.locking(py, || self.endpoint.ended())?;
        ended.map(|why| error::to_object(py, &why).map(Bound::unbind)).transpose()
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
        with_block(slf.as_any(), "leave")
    }

    fn __repr__(&self) -> String {
        let peer = &self.endpoint.peer().address;
        format!("<thalweg.Endpoint to {peer} over {}>", self.endpoint.route().link())
    }
}

fn ended<B>(result: Result<B, Failed<B>>) -> Result<Outcome, Error> {
    result.map(|_| Outcome::Nothing).map_err(|failed| failed.error)
}
