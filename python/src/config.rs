//! Settings from keyword arguments, and allocators written in Python.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::ThreadId;
use std::time::Duration;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMemoryView, PySlice};
use thalweg::{Allocator, Config, HostPool, PoolBuf, Wake};

use crate::buffer::PyMemory;
use crate::error;
use crate::local;
use crate::log;
use crate::node::Shared;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a node is made from.
pub struct Settings {
    pub config: Config,
    pub spin: Duration,
    pub allocator: Option<Arc<PyAllocator>>,
}

/// It holds the loop, and a timeout cannot come meanwhile.
const SPIN_MAX: Duration = Duration::from_millis(10);

fn seconds(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Duration> {
    let seconds: f64 = value.extract()?;
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| PyValueError::new_err(format!("{name}: a number of seconds, not {seconds}")))
}

fn transports(config: Config, value: &Bound<'_, PyAny>) -> PyResult<Config> {
    let names: Vec<String> = match value.extract::<String>() {
        Ok(text) => text.split(',').map(str::to_owned).collect(),
        Err(_) => value.extract()?,
    };
    config.transports_by_name(names).map_err(|error| PyValueError::new_err(error.to_string()))
}

/// The `THALWEG_*` variables, overridden by keyword arguments that are not `None`. Operations sleep
/// at once, unless `spin_us` says otherwise: a spinning operation holds the whole loop.
pub fn read(py: Python<'_>, given: Option<&Bound<'_, PyDict>>) -> PyResult<Settings> {
    let mut config = Config::from_env().map_err(|e| error::raise(py, &e))?.wake(Wake::Park);
    let mut spin = Duration::ZERO;
    let mut allocator = None;
    for (name, value) in given.into_iter().flatten() {
        if value.is_none() {
            continue;
        }
        let name: String = name.extract()?;
        config = match name.as_str() {
            "transports" => transports(config, &value)?,
            "spin_us" => {
                spin = Duration::from_micros(value.extract()?);
                if spin > SPIN_MAX {
                    let most = SPIN_MAX.as_micros();
                    return Err(PyValueError::new_err(format!("spin_us: at most {most}")));
                }
                match spin.is_zero() {
                    true => config,
                    false => config.wake(Wake::Spin).spin_limit(spin),
                }
            }
            "hello" => config.hello(value.extract::<Vec<u8>>()?),
            "connect_timeout" => config.connect_timeout(seconds(&name, &value)?),
            "handshake_timeout" => config.handshake_timeout(seconds(&name, &value)?),
            "close_timeout" => config.close_timeout(seconds(&name, &value)?),
            "keepalive" => config.keepalive(seconds(&name, &value)?),
            "backlog" => config.backlog(value.extract()?),
            "max_handshakes" => config.max_handshakes(value.extract()?),
            "message_window" => config.message_window_bytes(value.extract()?),
            "tag_window" => config.tag_window_bytes(value.extract()?),
            "node_budget" => config.node_budget_bytes(value.extract()?),
            "max_message" => config.max_message_bytes(value.extract()?),
            "max_frames" => config.max_frames(value.extract()?),
            "eager_max" => config.eager_max_bytes(value.extract()?),
            "tcp_buffer" => config.tcp_buffer_bytes(value.extract()?),
            "host_pool" => config.host_pool_bytes(value.extract()?),
            "loan_pool" => config.loan_pool_bytes(value.extract()?),
            "single_copy" => config.single_copy(value.extract()?),
            "peer_write" => config.peer_write(value.extract()?),
            "ptracer_any" => config.ptracer_any(value.extract()?),
            "require_encryption" => config.require_encryption(value.extract()?),
            "allocator" => {
                allocator = Some(PyAllocator::new(value.unbind()));
                config
            }
            _ => return Err(PyTypeError::new_err(format!("no such setting: {name}"))),
        };
    }
    Ok(Settings { config, spin, allocator })
}

/// Memory for received frames, found by a callable: `callable(nbytes)` gives a writable buffer of
/// at least that length.
///
/// It is called with an endpoint's lock in hand, on the loop's thread only: nobody who holds the GIL
/// waits for that lock there. What it calls of this package refuses (`Shared::check`); that a task
/// is cancelled meanwhile (a signal's handler does that), and what Python's garbage collector drops,
/// is carried out later (`Shared::settle`, `local::release`). Elsewhere (Python's garbage collector
/// may drop a receive in any thread, and then what has arrived for it is kept) memory comes from a
/// pool.
pub struct PyAllocator {
    /// Until the node ends: it may hold the node.
    callable: Mutex<Option<Py<PyAny>>>,
    /// What the callable raised last, for the error that ends the endpoint.
    refusal: Mutex<Option<String>>,
    elsewhere: HostPool,
    home: OnceLock<(Weak<Shared>, ThreadId)>,
}

/// What the pool for other threads keeps.
const ELSEWHERE_BYTES: usize = 1 << 20;

impl PyAllocator {
    fn new(callable: Py<PyAny>) -> Arc<Self> {
        let elsewhere = HostPool::new(ELSEWHERE_BYTES);
        let callable = Mutex::new(Some(callable));
        Arc::new(PyAllocator {
            callable,
            refusal: Mutex::default(),
            elsewhere,
            home: OnceLock::new(),
        })
    }

    /// The node, which is made after its allocator.
    pub fn attach(&self, shared: &Arc<Shared>) {
        let home = (Arc::downgrade(shared), std::thread::current().id());
        // Set once: an allocator belongs to one node.
        let _ = self.home.set(home);
    }

    /// The node has ended: nothing is received any more.
    pub fn end(&self) {
        let callable = lock(&self.callable).take();
        // Without the lock: its end may be Python code.
        drop(callable);
    }

    fn ask(&self, py: Python<'_>, shared: &Arc<Shared>, len: usize) -> PyResult<PoolBuf> {
        let callable = lock(&self.callable).as_ref().map(|callable| callable.clone_ref(py));
        let callable = callable.ok_or_else(|| PyValueError::new_err("the node has ended"))?;
        let object = callable.bind(py).call1((len,))?;
        // What `recv` gives is made here: a refusal loses nothing yet.
        let bytes = PyMemoryView::from(&object)?.call_method1("cast", ("B",))?;
        let have = bytes.len()?;
        if have < len {
            return Err(PyValueError::new_err(format!(
                "the allocator was asked for {len} bytes and gave {have}"
            )));
        }
        let bytes = bytes.get_item(PySlice::new(py, 0, len as isize, 1))?;
        Ok(PoolBuf::from_buffer(PyMemory::writing(shared, &bytes, None)?, len))
    }
}

impl Allocator for PyAllocator {
    fn allocate(&self, len_bytes: usize) -> Option<PoolBuf> {
        let home = self.home.get().filter(|home| home.1 == std::thread::current().id());
        let Some(shared) = home.and_then(|home| home.0.upgrade()) else {
            return self.elsewhere.allocate(len_bytes);
        };
        local::allocating(|| {
            Python::attach(|py| match self.ask(py, &shared, len_bytes) {
                Ok(memory) => Some(memory),
                Err(error) => {
                    let text = log::line(&format!("the allocator raised {error}"));
                    *lock(&self.refusal) = Some(text);
                    if error::ends_program(py, &error) {
                        shared.interrupt(error);
                    } else {
                        // The traceback, which no text carries.
                        error.write_unraisable(py, None);
                    }
                    None
                }
            })
        })
    }

    fn refusal(&self) -> Option<String> {
        lock(&self.refusal).take()
    }
}
