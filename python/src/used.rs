//! What this crate calls of Python: functions of asyncio's, and of the package's own that are
//! written in Python.
//!
//! All of it is looked up once, while the module itself is imported. An import later on would take
//! the lock of the module it asks for, and a child forked off while another thread does that finds
//! the lock held for ever.

use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

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
}

impl Used {
    fn look_up(py: Python<'_>) -> PyResult<Self> {
        let asyncio = py.import("asyncio")?;
        Ok(Used {
            get_running_loop: asyncio.getattr("get_running_loop")?.unbind(),
            cancelled_error: asyncio.getattr("CancelledError")?.unbind(),
            copy_context: py.import("contextvars")?.getattr("copy_context")?.unbind(),
            logger: py.import("logging")?.call_method1("getLogger", ("thalweg",))?.unbind(),
            make_error: py.import("thalweg._errors")?.getattr("make")?.unbind(),
            blocks: py.import("thalweg._blocks")?.unbind(),
        })
    }
}

/// While the module is imported.
pub fn look_up(py: Python<'_>) -> PyResult<()> {
    USED.get_or_try_init(py, || Used::look_up(py)).map(drop)
}

/// Fails only where the import of the module failed.
pub fn used(py: Python<'_>) -> PyResult<&Used> {
    USED.get(py).ok_or_else(|| PyImportError::new_err("thalweg was not imported to its end"))
}
