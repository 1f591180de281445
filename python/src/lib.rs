//! The compiled part of the Python package `thalweg`: a node on asyncio's own event loop.
//!
//! A node is driven by the loop's selector: `add_reader` on the node's one descriptor. There is no
//! thread of ours, and a message crosses none. This crate owns the meeting of the two worlds:
//! awaitables, buffers, and who holds Python's lock (the GIL) when. What moves bytes is the crate
//! `thalweg`.
//!
//! Who may wait for whom: a thread that holds the GIL may take a lock of thalweg's only on the
//! loop's own thread. Every other thread lets go of the GIL first (`local::Local`).
//! So the loop's thread can ask for the GIL with such a lock in hand (an allocator of the user's
//! does), and nobody waits in a circle.

mod buffer;
mod config;
mod endpoint;
mod error;
mod frame;
mod list;
mod listener;
mod local;
mod log;
mod node;
mod operation;
mod region;
mod report;
mod used;

use pyo3::prelude::*;

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::endpoint::Endpoint;
    #[pymodule_export]
    use super::frame::Frame;
    #[pymodule_export]
    use super::listener::Listener;
    #[pymodule_export]
    use super::node::Node;
    #[pymodule_export]
    use super::operation::Operation;
    #[pymodule_export]
    use super::region::{Region, RemoteKey};

    use pyo3::prelude::*;

    /// The version of the package.
    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::used::look_up(module.py())?;
        super::log::install();
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
