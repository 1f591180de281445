//! UCX's own log, which otherwise goes to standard error.
//!
//! `ucs_log_push_handler` is not among the documented functions, so a library without it keeps its
//! log. A handler gets a format and its arguments as a `va_list`, which Rust cannot name: it is
//! handed on to `vsnprintf` as the pointer that it is passed as on this platform's ABI.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::panic::catch_unwind;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::dl::Library;

/// How grave a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// The process is about to end.
    Fatal,
    /// Something failed.
    Error,
    /// Something is not as it should be.
    Warn,
    /// Everything below.
    Info,
}

/// What takes UCX's messages. Called from any thread, also within calls of UCX's functions; must
/// not call them.
pub type Logger = fn(LogLevel, &str);

/// A [`Logger`], or null. Not a `OnceLock`, which a fork can leave taken for ever.
static LOGGER: AtomicPtr<c_void> = AtomicPtr::new(null_mut());

type Handler = unsafe extern "C" fn(
    file: *const c_char,
    line: c_uint,
    function: *const c_char,
    level: c_int,
    config: *const c_void,
    format: *const c_char,
    arguments: *mut c_void,
) -> c_int;
type Push = unsafe extern "C" fn(Handler);

/// The message is dealt with: no further handler gets it.
const STOP: c_int = 0;
/// Older handlers get the message too.
const CONTINUE: c_int = 1;
/// The longest message that is passed on whole, in bytes.
const TEXT_MAX: usize = 1024;

unsafe extern "C" {
    fn vsnprintf(
        to: *mut c_char,
        size: usize,
        format: *const c_char,
        arguments: *mut c_void,
    ) -> c_int;
}

unsafe extern "C" fn handler(
    _file: *const c_char,
    _line: c_uint,
    _function: *const c_char,
    level: c_int,
    _config: *const c_void,
    format: *const c_char,
    arguments: *mut c_void,
) -> c_int {
    let level = match level {
        0 => LogLevel::Fatal,
        1 => LogLevel::Error,
        2 => LogLevel::Warn,
        _ => LogLevel::Info,
    };
    let logger = LOGGER.load(Ordering::Acquire);
    if logger.is_null() {
        return CONTINUE;
    }
    // SAFETY: not null, so `redirect` has put it there, which takes nothing else.
    let logger = unsafe { std::mem::transmute::<*mut c_void, Logger>(logger) };
    let mut text = [0; TEXT_MAX];
    // SAFETY: UCX passes a format and the arguments that fit it, as it would to its own handler.
    if unsafe { vsnprintf(text.as_mut_ptr(), text.len(), format, arguments) } < 0 {
        return CONTINUE;
    }
    // SAFETY: ends in a zero within its length.
    let text = unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy();
    // A panic must not unwind into C.
    let _ = catch_unwind(|| logger(level, text.trim_end()));
    // What ends the process is said where everybody sees it.
    if level == LogLevel::Fatal { CONTINUE } else { STOP }
}

pub(super) fn redirect(library: Library, logger: Logger) {
    let (none, logger) = (null_mut(), logger as *mut c_void);
    if LOGGER.compare_exchange(none, logger, Ordering::AcqRel, Ordering::Acquire).is_err() {
        return;
    }
    if let Some(address) = library.symbol(c"ucs_log_push_handler") {
        // SAFETY: declared like this by `ucs/debug/log_def.h` in every version that is accepted.
        let push = unsafe { std::mem::transmute::<*mut c_void, Push>(address) };
        // SAFETY: the handler lives for ever.
        unsafe { push(handler) };
    }
}
