//! What this crate calls of Python: functions of asyncio's, and of the package's own that are
//! written in Python; and what it hands to them each time.
//!
//! All of it is looked up or made once, while the module itself is imported. An import later on would
//! take the lock of the module it asks for, and what is made at its first use (`PyOnceLock`,
//! `intern!`) lets go of the GIL with a lock in hand: a child forked off while another thread is
//! there finds the lock held for ever. `clippy.toml` sees to it that there is no other.

use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;
#[expect(clippy::disallowed_types, reason = "filled while the module is imported")]
use pyo3::sync::PyOnceLock;
use pyo3::types::PyString;

use crate::operation::Woken;

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
    USED.get_or_try_init(py, || Used::look_up(py)).map(drop)
}

/// Fails only where the import of the module failed.
pub fn used(py: Python<'_>) -> PyResult<&Used> {
    USED.get(py).ok_or_else(|| PyImportError::new_err("thalweg was not imported to its end"))
}
