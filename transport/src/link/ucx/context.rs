//! UCX's context: devices, memory domains, and the site's settings.

use std::ffi::{CStr, CString};
use std::sync::{Mutex, PoisonError};

use thalweg_ffi::ucx::{self as ffi, Absent, SignalHandlers, Ucx, ucp_config_t, ucp_context_h};

use super::lanes::{self, Resource};
use super::{Unavailable, describe};
use crate::runtime::{FirstUse, FoundOnce};

/// Making and ending contexts touches state of the library's that is not guarded.
static LIBRARY: Mutex<Library> = Mutex::new(Library { has_had_context: false });
static FIRST: FirstUse = FirstUse::new();
static FOUND: FoundOnce<Result<Ucx, Absent>> = FoundOnce::new();

struct Library {
    has_had_context: bool,
}

const MODIFY_FIX: &str = "thalweg-info lists the UCX_* settings that are in force";

/// libucp, looked for once in this process.
pub(crate) fn library() -> Result<&'static Ucx, Unavailable> {
    let found = FOUND.get(ffi::load).ok_or_else(forked)?;
    found.as_ref().map_err(|absent| Unavailable { reason: absent.to_string(), fix: absent.fix() })
}

fn forked() -> Unavailable {
    Unavailable {
        reason: "UCX was in use when this process was forked off".into(),
        fix: "start processes by spawn, or use UCX in children only".into(),
    }
}

/// Which transports a context may use.
#[derive(Clone, Copy, Debug)]
pub(super) enum Tls<'a> {
    /// What the site says, or else all.
    Site,
    /// What the site says, or else all but these.
    Without(&'a [&'a str]),
    /// This one, whatever the site says.
    Only(&'a str),
}

/// A context. Its worker is the only one in it, so UCX needs no locks of its own.
pub(super) struct Context {
    pub ucx: &'static Ucx,
    raw: ucp_context_h,
    /// The transports that we have set, as `UCX_TLS` would say it.
    pub tls: Option<String>,
}

// SAFETY: the worker's lock is held around every use of the context once it is made.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// Whether the environment sets this.
fn is_said(name: &CStr) -> bool {
    std::env::var_os(format!("UCX_{}", name.to_string_lossy())).is_some()
}

/// From this version on they are set. 1.13 would warn of what it does not know; between the two nothing
/// was tried.
const PIECES_SINCE: (u32, u32) = (1, 21);

/// Settings, given back when dropped.
struct Settings {
    ucx: &'static Ucx,
    raw: *mut ucp_config_t,
}

impl Settings {
    /// What the environment says (`UCX_*`).
    fn read(ucx: &'static Ucx) -> Result<Settings, Unavailable> {
        let mut raw = std::ptr::null_mut();
        let null = std::ptr::null();
        // SAFETY: no prefix and no file: UCX's own; `raw` is written on success.
        let status = unsafe { (ucx.functions.ucp_config_read)(null, null, &raw mut raw) };
        if status != ffi::UCS_OK {
            return Err(Unavailable {
                reason: describe(ucx, "UCX cannot read its settings", status),
                fix: MODIFY_FIX.into(),
            });
        }
        Ok(Settings { ucx, raw })
    }

    /// Sets one setting, unless the environment has; whether it did. A `ucx.conf` is not asked.
    fn prefer(&mut self, name: &CStr, value: &CStr) -> Result<bool, Unavailable> {
        if is_said(name) {
            return Ok(false);
        }
        self.set(name, value).map(|()| true)
    }

    /// Chunks (of `link::CHUNK_BYTES`) leave in one piece over UCX's sockets, unless the environment says
    /// how long its pieces are. 1.22 copies them in pieces of 8 KiB otherwise, and 8 MiB move at 1.4 GB/s
    /// instead of 4.1; 1.13 moves them as they are, and knows no setting of this name. It is a wish: a UCX
    /// that refuses goes without.
    fn prefer_whole_chunks(&mut self) {
        // As much has to fit in as goes out.
        let names = [c"TCP_RX_SEG_SIZE", c"TCP_TX_SEG_SIZE"];
        if (self.ucx.version.major, self.ucx.version.minor) < PIECES_SINCE
            || names.iter().any(|name| is_said(name))
        {
            return;
        }
        for name in names {
            let _ = self.set(name, c"64k");
        }
    }

    fn set(&mut self, name: &CStr, value: &CStr) -> Result<(), Unavailable> {
        // SAFETY: `raw` is a live configuration; both strings are copied.
        let status = unsafe {
            (self.ucx.functions.ucp_config_modify)(self.raw, name.as_ptr(), value.as_ptr())
        };
        if status == ffi::UCS_OK {
            return Ok(());
        }
        let setting = format!("UCX refuses UCX_{}", name.to_string_lossy());
        Err(Unavailable { reason: describe(self.ucx, &setting, status), fix: String::new() })
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        // SAFETY: made by `ucp_config_read`, released once.
        unsafe { (self.ucx.functions.ucp_config_release)(self.raw) };
    }
}

impl Context {
    pub fn new(ucx: &'static Ucx, tls: Tls<'_>) -> Result<Context, Unavailable> {
        if FIRST.inherited() {
            return Err(forked());
        }
        let mut library = LIBRARY.lock().unwrap_or_else(PoisonError::into_inner);
        let mut settings = Settings::read(ucx)?;
        // Without it UCX gives up shared memory on endpoints that report the death of a peer.
        settings.prefer(c"MM_ERROR_HANDLING", c"y")?;
        settings.prefer_whole_chunks();
        let tls = match tls {
            Tls::Site => None,
            Tls::Without(names) => {
                let list = format!("^{}", names.join(","));
                let value = CString::new(list.as_str()).unwrap_or_default();
                settings.prefer(c"TLS", &value)?.then_some(list)
            }
            Tls::Only(name) => {
                settings.set(c"TLS", &CString::new(name).unwrap_or_default())?;
                Some(name.to_owned())
            }
        };
        // SAFETY: zero is a valid value of every field; the mask says which are read.
        let mut params: ffi::ucp_params_t = unsafe { std::mem::zeroed() };
        params.field_mask = ffi::UCP_PARAM_FIELD_FEATURES.into();
        params.features = u64::from(ffi::UCP_FEATURE_AM | ffi::UCP_FEATURE_WAKEUP);
        let mut raw = std::ptr::null_mut();
        let (major, minor) = ffi::VERSION_MIN;
        // The first one loads UCX's modules, and libraries of devices with them, that install handlers.
        // Later ones are made while the program runs, which may install its own meanwhile.
        let is_first = !std::mem::replace(&mut library.has_had_context, true);
        let handlers = is_first.then(SignalHandlers::remember);
        // SAFETY: parameters and settings are live for the call; `raw` is written on success.
        let status = unsafe {
            let init = ucx.functions.ucp_init_version;
            init(major, minor, &raw const params, settings.raw, &raw mut raw)
        };
        drop(handlers);
        if status != ffi::UCS_OK {
            return Err(Unavailable {
                reason: describe(ucx, "UCX finds nothing to work with", status),
                fix: MODIFY_FIX.into(),
            });
        }
        Ok(Context { ucx, raw, tls })
    }

    /// What it could use.
    pub fn resources(&self) -> Vec<Resource> {
        let print = self.ucx.functions.ucp_context_print_info;
        // SAFETY: the context is live, and nobody else uses it before it has a worker; the stream is
        // open.
        lanes::resources(&lanes::printed(|stream| unsafe { print(self.raw, stream) }))
    }

    pub fn raw(&self) -> ucp_context_h {
        self.raw
    }

    /// Ends the context.
    ///
    /// # Safety
    ///
    /// Nothing of it is in use: its worker is destroyed.
    pub unsafe fn end(&self) {
        let _one = LIBRARY.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: made by `ucp_init_version`; the caller calls this once, last.
        unsafe { (self.ucx.functions.ucp_cleanup)(self.raw) };
    }
}
