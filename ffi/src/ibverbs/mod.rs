//! libibverbs: where it is, whether it can be used, and its functions.
//!
//! The bindings are made from the headers of rdma-core 44 by `bindings/ibverbs.py`. The library's
//! interface has been stable since its symbols got the version `IBVERBS_1.1`: structs that are
//! passed to it have not changed since, and functions that came later are not in the table.
//!
//! What posts and polls is inline in the headers: it goes through a context's table of operations,
//! here as there.

#[allow(
    non_camel_case_types,
    missing_docs,
    clippy::missing_safety_doc,
    clippy::pub_underscore_fields,
    reason = "named and laid out by libibverbs, whose documentation it is"
)]
mod bindings;

use std::ffi::{CStr, OsStr, c_int, c_void};
use std::fmt;
use std::path::{Path, PathBuf};

pub use bindings::*;

use crate::dl::{Library, file_of, find};
use crate::elf;
use crate::functions::functions;

/// The setting that names the library.
pub const LIBRARY_VARIABLE: &str = "THALWEG_VERBS_LIBRARY";
const NAME: &str = "libibverbs.so.1";

/// Why the library is of no use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// There is no such file.
    Missing,
    /// The file is no whole shared object, or the dynamic linker refuses it.
    Broken(String),
    /// A function is not in it: it is too old, or something else.
    Symbol(&'static str),
}

/// Why there is no libibverbs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Absent {
    /// The file that was tried.
    pub path: PathBuf,
    /// What was wrong with it.
    pub fault: Fault,
    /// Whether [`LIBRARY_VARIABLE`] named it.
    pub named: bool,
}

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.path.display())?;
        match &self.fault {
            Fault::Missing => f.write_str("not there")?,
            Fault::Broken(why) => f.write_str(why)?,
            Fault::Symbol(name) => write!(f, "too old: has no function {name}")?,
        }
        if self.named { write!(f, " (named by {LIBRARY_VARIABLE})") } else { Ok(()) }
    }
}

impl std::error::Error for Absent {}

impl Absent {
    /// What would help.
    pub fn fix(&self) -> String {
        if self.named {
            return format!("correct {LIBRARY_VARIABLE}, or unset it to look in the usual places");
        }
        match &self.fault {
            Fault::Missing => "install libibverbs (Debian: libibverbs1 and ibverbs-providers; \
                               Fedora: libibverbs)"
                .to_owned(),
            Fault::Broken(_) | Fault::Symbol(_) => {
                "install libibverbs again, from rdma-core 22 or newer".to_owned()
            }
        }
    }
}

/// A libibverbs that can be used. Stays loaded until the process ends.
#[derive(Debug)]
pub struct Verbs {
    /// Its functions.
    pub functions: Functions,
    /// `ibv_reg_dmabuf_mr`, which registers memory of other devices: rdma-core has it since 34.
    pub reg_dmabuf_mr: Option<RegDmabufMr>,
    /// The file.
    pub path: PathBuf,
}

/// Domain, offset into the buffer, bytes, address in requests, descriptor of the buffer, access.
/// Null: refused, and `errno` says why.
pub type RegDmabufMr =
    unsafe extern "C" fn(*mut ibv_pd, u64, usize, u64, c_int, c_int) -> *mut ibv_mr;

/// Looks for libibverbs in the file that [`LIBRARY_VARIABLE`] names; if it names none,
/// where the dynamic linker looks. The caller keeps what it gets: no lock is kept here that a fork
/// could leave taken for ever.
///
/// # Errors
///
/// What was tried, and why it will not do.
pub fn load() -> Result<Verbs, Absent> {
    let named = std::env::var_os(LIBRARY_VARIABLE).filter(|name| !name.is_empty());
    let path = match &named {
        Some(path) => PathBuf::from(path),
        // What only the linker's cache knows is opened by its bare name.
        None => find(NAME).unwrap_or_else(|| PathBuf::from(NAME)),
    };
    open(&path).map_err(|fault| Absent { path, fault, named: named.is_some() })
}

fn open(path: &Path) -> Result<Verbs, Fault> {
    let bare = path.components().count() == 1;
    if !bare {
        if !path.exists() {
            return Err(Fault::Missing);
        }
        elf::check(path).map_err(Fault::Broken)?;
    }
    let broken = |why: String| {
        if bare && why.contains("No such file") { Fault::Missing } else { Fault::Broken(why) }
    };
    // SAFETY: the file is a whole shared object of a name that is libibverbs's, or one that the
    // person who set the variable vouches for.
    let library = unsafe { Library::open(OsStr::new(path)) }.map_err(broken)?;
    let functions = Functions::load(library).map_err(Fault::Symbol)?;
    let reg_dmabuf_mr = library.symbol(c"ibv_reg_dmabuf_mr").map(|address| {
        // SAFETY: the public headers declare a function of this name and type.
        unsafe { std::mem::transmute::<*mut c_void, RegDmabufMr>(address) }
    });
    let path =
        file_of(functions.ibv_fork_init as *const c_void).unwrap_or_else(|| path.to_path_buf());
    // A child that is forked off shares pinned pages with its parent, and whoever writes first
    // gets a copy: without this it may be the parent, whose devices keep using the old page. New
    // kernels copy for the child at once, and then this does nothing. It fails where memory has
    // been registered before, by somebody who has then made that choice.
    // SAFETY: takes nothing.
    unsafe { (functions.ibv_fork_init)() };
    Ok(Verbs { functions, reg_dmabuf_mr, path })
}

impl Verbs {
    /// The text of a completion's status. Unknown numbers have one too.
    pub fn describe(&self, status: ibv_wc_status) -> String {
        // SAFETY: takes any number, gives a string that lives for ever.
        text(unsafe { (self.functions.ibv_wc_status_str)(status) })
    }

    /// The text of an asynchronous event.
    pub fn describe_event(&self, event: ibv_event_type) -> String {
        // SAFETY: as above.
        text(unsafe { (self.functions.ibv_event_type_str)(event) })
    }

    /// The text of a port's state.
    pub fn describe_port(&self, state: ibv_port_state) -> String {
        // SAFETY: as above.
        text(unsafe { (self.functions.ibv_port_state_str)(state) })
    }
}

fn text(from: *const libc::c_char) -> String {
    if from.is_null() {
        return "unknown".to_owned();
    }
    // SAFETY: not null: a string of the library's that lives for ever.
    unsafe { CStr::from_ptr(from) }.to_string_lossy().into_owned()
}

/// `ibv_poll_cq`: takes up to `into.len()` completions.
///
/// # Safety
///
/// `cq` is live, and `into` writable.
#[inline]
pub unsafe fn poll_cq(cq: *mut ibv_cq, count: usize, into: *mut ibv_wc) -> c_int {
    // SAFETY: the caller's; a live queue points to its context.
    let poll = unsafe { (*(*cq).context).ops.poll_cq };
    // SAFETY: as above.
    poll.map_or(-libc::ENOSYS, |poll| unsafe { poll(cq, count as c_int, into) })
}

/// `ibv_req_notify_cq`: asks for an event when the next completion comes.
///
/// # Safety
///
/// `cq` is live, and has a channel.
#[inline]
pub unsafe fn req_notify_cq(cq: *mut ibv_cq) -> c_int {
    // SAFETY: the caller's; a live queue points to its context.
    let notify = unsafe { (*(*cq).context).ops.req_notify_cq };
    // SAFETY: as above.
    notify.map_or(-libc::ENOSYS, |notify| unsafe { notify(cq, 0) })
}

/// `ibv_post_send`.
///
/// # Safety
///
/// `qp` is live; the request and what it names are valid for this call, and the memory that it
/// names until its completion.
#[inline]
pub unsafe fn post_send(qp: *mut ibv_qp, request: *mut ibv_send_wr) -> c_int {
    let mut bad = std::ptr::null_mut();
    // SAFETY: the caller's; a live queue pair points to its context.
    let post = unsafe { (*(*qp).context).ops.post_send };
    // SAFETY: as above.
    post.map_or(-libc::ENOSYS, |post| unsafe { post(qp, request, &raw mut bad) })
}

/// `ibv_post_recv`.
///
/// # Safety
///
/// As for [`post_send`].
#[inline]
pub unsafe fn post_recv(qp: *mut ibv_qp, request: *mut ibv_recv_wr) -> c_int {
    let mut bad = std::ptr::null_mut();
    // SAFETY: the caller's; a live queue pair points to its context.
    let post = unsafe { (*(*qp).context).ops.post_recv };
    // SAFETY: as above.
    post.map_or(-libc::ENOSYS, |post| unsafe { post(qp, request, &raw mut bad) })
}

/// The names of the devices that the kernel shows to user programs.
pub fn kernel_devices() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/sys/class/infiniband_verbs") else { return Vec::new() };
    let mut names: Vec<String> = entries
        .filter_map(|entry| std::fs::read_to_string(entry.ok()?.path().join("ibdev")).ok())
        .map(|name| name.trim().to_owned())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_are_laid_out_as_in_the_headers() {
        let sizes = [
            (size_of::<ibv_wc>(), 48),
            (size_of::<ibv_send_wr>(), 128),
            (size_of::<ibv_recv_wr>(), 32),
            (size_of::<ibv_sge>(), 16),
            (size_of::<ibv_qp_attr>(), 144),
            (size_of::<ibv_qp_init_attr>(), 64),
            (size_of::<ibv_device_attr>(), 232),
            (size_of::<ibv_port_attr>(), 52),
            (size_of::<ibv_mr>(), 48),
            (size_of::<ibv_async_event>(), 16),
        ];
        for (at, (ours, theirs)) in sizes.into_iter().enumerate() {
            assert_eq!(ours, theirs, "struct {at}");
        }
        assert_eq!(std::mem::offset_of!(ibv_context, ops), 8);
        assert_eq!(std::mem::offset_of!(ibv_context, cmd_fd), 264);
        assert_eq!(std::mem::offset_of!(ibv_qp, qp_num), 52);
        assert_eq!(std::mem::offset_of!(ibv_mr, lkey), 36);
    }

    #[test]
    fn a_missing_library_and_one_that_is_another() {
        let fault = open(Path::new("/nonexistent/libibverbs.so.1")).expect_err("missing");
        assert_eq!(fault, Fault::Missing);
        let bare = open(Path::new("libthalweg-no-such-library.so")).expect_err("missing");
        assert_eq!(bare, Fault::Missing);
        let other = find("libc.so.6").expect("every program has it");
        assert!(matches!(open(&other), Err(Fault::Symbol(_))));
    }

    #[test]
    fn the_installed_library_has_every_function() {
        match load() {
            Ok(verbs) => {
                assert!(verbs.path.is_file());
                // SAFETY: a handle that is looked at only.
                let library = unsafe { Library::open(verbs.path.as_os_str()) }.expect("loaded");
                let registers = library.symbol(c"ibv_reg_dmabuf_mr");
                assert_eq!(verbs.reg_dmabuf_mr.map(|bound| bound as *mut c_void), registers);
                assert!(!verbs.describe(IBV_WC_RETRY_EXC_ERR).is_empty());
                assert!(!verbs.describe(9999).is_empty());
            }
            Err(absent) => assert!(!absent.fix().is_empty()),
        }
    }
}
