//! Memory of Python objects, lent to thalweg by the buffer protocol.
//!
//! thalweg may drop such memory anywhere: with the GIL or without it, on any thread, under a lock.
//! To give a buffer back to Python is only allowed with the GIL and runs Python code. So dropping
//! puts it on a list (`RETURNS`), and the loop's thread gives it back when it is next in Python
//! with no lock in hand.

use std::ffi::{c_int, c_void};
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::ffi;
use pyo3::prelude::*;
use thalweg::{Buffer, BufferMut, Frame, Region};

use crate::list::List;
use crate::node::Shared;
use crate::operation::Wakeup;

/// A filled `Py_buffer`, in memory that does not move.
struct View(Box<ffi::Py_buffer>);

// SAFETY: a filled view is plain data; the exporter keeps the memory where it is until release,
// which is done with the GIL held.
unsafe impl Send for View {}
// SAFETY: as above; it is only read.
unsafe impl Sync for View {}

impl View {
    fn get(object: &Bound<'_, PyAny>, flags: c_int) -> PyResult<Self> {
        // SAFETY: `Py_buffer` is a C struct for which all zeroes is "empty".
        let mut view: Box<ffi::Py_buffer> = Box::new(unsafe { std::mem::zeroed() });
        // SAFETY: with the GIL, on an object that lives; the view is released exactly once.
        let failed = unsafe { ffi::PyObject_GetBuffer(object.as_ptr(), &mut *view, flags) } != 0;
        if failed {
            return Err(refused(object, flags));
        }
        Ok(View(view))
    }

    fn len(&self) -> usize {
        usize::try_from(self.0.len).unwrap_or(0)
    }

    fn ptr(&self) -> *mut u8 {
        // An empty exporter may give null.
        NonNull::new(self.0.buf.cast()).unwrap_or(NonNull::dangling()).as_ptr()
    }

    fn release(mut self, _py: Python<'_>) {
        // SAFETY: filled by `PyObject_GetBuffer`, released once, with the GIL.
        unsafe { ffi::PyBuffer_Release(&mut *self.0) };
    }
}

/// A refusal that says which object and why, with Python's own exception as its cause.
fn refused(object: &Bound<'_, PyAny>, flags: c_int) -> PyErr {
    let py = object.py();
    let cause = PyErr::take(py);
    let name = object.get_type().name().map(|name| name.to_string()).unwrap_or_default();
    // SAFETY: with the GIL, on an object that lives.
    let exports = unsafe { ffi::PyObject_CheckBuffer(object.as_ptr()) } != 0;
    let error = if !exports {
        PyTypeError::new_err(format!("{name} does not have the buffer protocol"))
    } else {
        let must =
            if flags & ffi::PyBUF_WRITABLE != 0 { "writable and contiguous" } else { "contiguous" };
        let why = cause.as_ref().map(|cause| cause.value(py).to_string()).unwrap_or_default();
        PyBufferError::new_err(format!("the memory of this {name} must be {must}: {why}"))
    };
    error.set_cause(py, cause);
    error
}

/// Whether something has the buffer protocol.
pub fn is_buffer(object: &Bound<'_, PyAny>) -> bool {
    // SAFETY: with the GIL, on an object that lives.
    unsafe { ffi::PyObject_CheckBuffer(object.as_ptr()) != 0 }
}

/// Calls `use_bytes` with the bytes of a buffer, which is given back before this returns.
pub fn with_bytes<R>(object: &Bound<'_, PyAny>, use_bytes: impl FnOnce(&[u8]) -> R) -> PyResult<R> {
    let view = View::get(object, ffi::PyBUF_SIMPLE)?;
    // SAFETY: filled, `len` readable bytes; the GIL is held throughout, so no Python code writes.
    let result = use_bytes(unsafe { std::slice::from_raw_parts(view.ptr(), view.len()) });
    view.release(object.py());
    Ok(result)
}

/// A frame of a buffer: a copy, if it has at most `copied_max` bytes, or the memory itself.
pub fn frame(
    shared: &Arc<Shared>,
    object: &Bound<'_, PyAny>,
    copied_max: usize,
) -> PyResult<Frame> {
    let view = View::get(object, ffi::PyBUF_SIMPLE)?;
    if view.len() > copied_max {
        return Ok(Frame::from(Bytes::from_owner(PyMemory::new(shared, view, None))));
    }
    // SAFETY: filled, `len` readable bytes; the GIL is held, so no Python code writes.
    let bytes = unsafe { std::slice::from_raw_parts(view.ptr(), view.len()) };
    let frame = Frame::copy_from_slice(bytes);
    view.release(object.py());
    Ok(frame)
}

/// What an operation has lent of its caller's memory and may still be written to.
pub struct Lent {
    count: AtomicUsize,
    wakeup: Weak<Wakeup>,
}

impl Lent {
    pub fn new(wakeup: &Arc<Wakeup>) -> Arc<Self> {
        Arc::new(Lent { count: AtomicUsize::new(0), wakeup: Arc::downgrade(wakeup) })
    }

    /// Whether everything has been given back to Python.
    pub fn is_none(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    fn returned(&self) {
        if self.count.fetch_sub(1, Ordering::AcqRel) == 1
            && let Some(wakeup) = self.wakeup.upgrade()
        {
            wakeup.wake_up();
        }
    }
}

/// Buffers that thalweg has let go of, to be given back to Python. Of all nodes: whoever is in
/// Python, with no lock in hand, gives them all back.
static RETURNS: List<(View, Option<Arc<Lent>>)> = List::new();

/// Gives back what there is. With no lock in hand: releasing runs Python code.
pub fn give_back(py: Python<'_>) {
    while !RETURNS.is_empty() {
        for (view, lent) in RETURNS.take() {
            view.release(py);
            if let Some(lent) = lent {
                lent.returned();
            }
        }
    }
}

/// A Python object's memory as a buffer of thalweg's.
pub struct PyMemory {
    view: ManuallyDrop<View>,
    lent: Option<Arc<Lent>>,
    shared: Weak<Shared>,
}

impl PyMemory {
    /// Memory that is only read.
    pub fn reading(shared: &Arc<Shared>, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let view = View::get(object, ffi::PyBUF_SIMPLE)?;
        Ok(PyMemory::new(shared, view, None))
    }

    /// Memory that is written to; `lent` tells when no longer.
    pub fn writing(
        shared: &Arc<Shared>,
        object: &Bound<'_, PyAny>,
        lent: Option<&Arc<Lent>>,
    ) -> PyResult<Self> {
        let view = View::get(object, ffi::PyBUF_WRITABLE)?;
        if let Some(lent) = lent {
            lent.count.fetch_add(1, Ordering::AcqRel);
        }
        Ok(PyMemory::new(shared, view, lent.cloned()))
    }

    fn new(shared: &Arc<Shared>, view: View, lent: Option<Arc<Lent>>) -> Self {
        PyMemory { view: ManuallyDrop::new(view), lent, shared: Arc::downgrade(shared) }
    }

    pub fn len(&self) -> usize {
        self.view.len()
    }

    /// The exporting object.
    pub fn object<'py>(&self, py: Python<'py>) -> Bound<'py, PyAny> {
        // SAFETY: a filled view keeps its exporter alive; without one it is null, which is `None`.
        let object = unsafe { Bound::from_borrowed_ptr_or_opt(py, self.view.0.obj) };
        object.unwrap_or_else(|| py.None().into_bound(py))
    }
}

impl AsRef<[u8]> for PyMemory {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: filled, `len` readable bytes until release. That nobody changes them while they
        // are sent is what the documentation asks of the caller, as with every Python call that
        // works without the GIL on a buffer.
        unsafe { std::slice::from_raw_parts(self.view.ptr(), self.view.len()) }
    }
}

// SAFETY: the exporter keeps the memory in place until the view is released, which happens after
// this value has been dropped.
unsafe impl Buffer for PyMemory {
    fn region(&self) -> Region {
        Region::host(self.view.ptr(), self.view.len())
    }
}

// SAFETY: as above; only made from views that were asked to be writable where this is used
// (`PyMemory::writing`).
unsafe impl BufferMut for PyMemory {
    fn region_mut(&mut self) -> Region {
        self.region()
    }
}

impl Drop for PyMemory {
    fn drop(&mut self) {
        // SAFETY: taken once, here.
        let view = unsafe { ManuallyDrop::take(&mut self.view) };
        RETURNS.push((view, self.lent.take()));
        if let Some(shared) = self.shared.upgrade() {
            shared.look_soon();
        }
    }
}

/// Fills a Python buffer request with memory that `owner` keeps alive and in place.
///
/// # Safety
///
/// As `__getbuffer__`; `ptr` is valid for reads and writes of `len` bytes for as long as `owner`
/// lives.
pub unsafe fn fill(
    owner: &Bound<'_, PyAny>,
    view: *mut ffi::Py_buffer,
    ptr: *mut u8,
    len: usize,
    flags: c_int,
) -> PyResult<()> {
    let len = isize::try_from(len).map_err(|_| PyBufferError::new_err("too long"))?;
    // SAFETY: the caller's promise.
    let failed = unsafe {
        ffi::PyBuffer_FillInfo(view, owner.as_ptr(), ptr.cast::<c_void>(), len, 0, flags)
    };
    if failed != 0 { Err(PyErr::fetch(owner.py())) } else { Ok(()) }
}
