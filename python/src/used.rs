//! What this crate calls of Python: functions of asyncio's, and of the package's own that are
//! written in Python; and what it hands to them each time.
//!
//! All of it is looked up or made once, while the module itself is imported. An import later on would
//! take the lock of the module it asks for, and what is made at its first use (`PyOnceLock`,
//! `intern!`) lets go of the GIL with a lock in hand: a child forked off while another thread is
//! there finds the lock held for ever. `clippy.toml` sees to it that this crate has no other; those
//! that PyO3 has within itself are used once here, as far as this crate comes to them.

use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;
#[expect(clippy::disallowed_types, reason = "filled while the module is imported")]
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyString, PyTuple, PyType};

#[expect(clippy::disallowed_types, reason = "filled while the module is imported")]
static USED: PyOnceLock<Used> = PyOnceLock::new();

pub struct Used {
    pub get_running_loop: Py<PyAny>,
    pub cancelled_error: Py<PyAny>,
    pub copy_context: Py<PyAny>,
    /// The logger `thalweg`.
    pub logger: Py<PyAny>,
    /// `thalweg._errors.make`.
    pub make_error: Py<PyAny>,
    /// The module `thalweg._blocks`.
    pub blocks: Py<PyModule>,
    /// What every task's callback is given.
    pub woken: Py<Woken>,
    /// The name `run`.
    pub run: Py<PyString>,
    /// The name `context`.
    pub context: Py<PyString>,
    /// The name `call_soon`.
    pub call_soon: Py<PyString>,
}

/// What a task's callback is given as the future that is done: all it asks of it is whether that
/// failed, and no operation tells before it is polled.
#[pyclass(module = "thalweg", frozen)]
pub struct Woken;

#[pymethods]
impl Woken {
    fn result(&self) {}
}

impl Used {
    fn look_up(py: Python<'_>) -> PyResult<Self> {
        let asyncio = py.import("asyncio")?;
        let name = |name| PyString::intern(py, name).unbind();
        Ok(Used {
            get_running_loop: asyncio.getattr("get_running_loop")?.unbind(),
            cancelled_error: asyncio.getattr("CancelledError")?.unbind(),
            copy_context: py.import("contextvars")?.getattr("copy_context")?.unbind(),
            logger: py.import("logging")?.call_method1("getLogger", ("thalweg",))?.unbind(),
            make_error: py.import("thalweg._errors")?.getattr("make")?.unbind(),
            blocks: py.import("thalweg._blocks")?.unbind(),
            woken: Py::new(py, Woken)?,
            run: name("run"),
            context: name("context"),
            call_soon: name("call_soon"),
        })
    }
}

/// While the module is imported.
pub fn look_up(py: Python<'_>) -> PyResult<()> {
    USED.get_or_try_init(py, || Used::look_up(py))?;
    use_pyo3(py)
}

#[pyfunction]
fn takes_a_number(_number: f64) {}

/// Uses once what PyO3 makes at its first use: for arguments of a wrong type, for lists of texts, for
/// truth values that are numpy's (taken by their names), and for threads that come back to Python.
fn use_pyo3(py: Python<'_>) -> PyResult<()> {
    let refused = wrap_pyfunction!(takes_a_number, py)?.call1(("no number",));
    let zero = 0_u8.into_pyobject(py)?;
    let text = |error: PyErr| error.to_string();
    let _texts = [
        refused.map_err(text).err(),
        zero.extract::<Vec<String>>().map_err(text).err(),
        zero.extract::<bool>().map_err(text).err(),
    ];
    let attributes = PyDict::new(py);
    attributes.set_item("__module__", "numpy")?;
    let other = py.get_type::<PyType>().call1(("bool", PyTuple::empty(py), attributes))?;
    let _ = other.call0()?.extract::<bool>();
    py.detach(|| Python::attach(|_| ()));
    Ok(())
}

/// Fails only where the import of the module failed.
pub fn used(py: Python<'_>) -> PyResult<&Used> {
    USED.get(py).ok_or_else(|| PyImportError::new_err("thalweg was not imported to its end"))
}
