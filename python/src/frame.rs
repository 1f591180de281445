//! A received frame as an object with the buffer protocol.

use std::ffi::c_int;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyMemoryView};
use thalweg::{INLINE_MAX, Message, PoolBuf};

use crate::buffer::{self, PyMemory};

/// What the pointer points into, held for its drop.
#[allow(dead_code, reason = "held for its drop")]
enum Memory {
    Received(thalweg::Frame),
    Copy(Vec<u8>),
}

/// The memory of one received frame: this process's own, and writable. Given out as a
/// :class:`memoryview`, whose ``obj`` it is.
#[pyclass(module = "thalweg", frozen)]
pub struct Frame {
    /// Into the heap memory that `memory` owns.
    ptr: *mut u8,
    len: usize,
    memory: Memory,
}

// SAFETY: owns its memory; the pointer is handed to Python only, whose lock guards its use.
unsafe impl Send for Frame {}
// SAFETY: as above.
unsafe impl Sync for Frame {}

#[pymethods]
impl Frame {
    fn __len__(&self) -> usize {
        self.len
    }

    fn __repr__(&self) -> String {
        let how = match &self.memory {
            Memory::Received(_) => "as received",
            Memory::Copy(_) => "copied",
        };
        format!("<thalweg.Frame of {} bytes, {how}>", self.len)
    }

    // SAFETY: called by Python as the protocol says.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let this = slf.get();
        let (ptr, len) = (this.ptr, this.len);
        // SAFETY: the memory lives inside the object or on the heap behind it, as long as it does.
        unsafe { buffer::fill(slf.as_any(), view, ptr, len, flags) }
    }
}

/// The frames of a message as writable memoryviews.
pub fn views(py: Python<'_>, message: Message) -> PyResult<Py<PyAny>> {
    let list = PyList::empty(py);
    for frame in message.into_frames() {
        list.append(view(py, frame)?)?;
    }
    Ok(list.into_any().unbind())
}

fn view<'py>(py: Python<'py>, frame: thalweg::Frame) -> PyResult<Bound<'py, PyAny>> {
    let mut frame = match frame.into_pool_buf().map(PoolBuf::into_buffer::<PyMemory>) {
        // The memoryview that was made of what the user's allocator gave.
        Ok(Ok(memory)) => return Ok(memory.object(py)),
        Ok(Err(bytes)) => thalweg::Frame::from(bytes),
        Err(frame) => frame,
    };
    // Short frames lie inside the frame itself, and would move with it; views of the sender's
    // memory and shared bytes are not this process's own.
    let copied = frame.len() <= INLINE_MAX || frame.as_mut_slice().is_none();
    let (ptr, len, memory) = if copied {
        let mut copy = frame.to_vec().map_err(|error| crate::error::raise(py, &error))?;
        (copy.as_mut_ptr(), copy.len(), Memory::Copy(copy))
    } else {
        let bytes = frame.as_mut_slice().unwrap_or_default();
        (bytes.as_mut_ptr(), bytes.len(), Memory::Received(frame))
    };
    let frame = Bound::new(py, Frame { ptr, len, memory })?;
    Ok(PyMemoryView::from(frame.as_any())?.into_any())
}
