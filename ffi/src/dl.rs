//! The dynamic linker: opening a library, asking it for a symbol, and where it looks.

use std::ffi::{CStr, CString, OsStr, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A library that stays open for as long as the process lives.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Library(*mut c_void);

// SAFETY: a handle that is never closed; `dlsym` may be called from any thread.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

fn last_error() -> String {
    // SAFETY: gives a string that lives until this thread's next call into the linker, or null.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "the dynamic linker does not say why".into();
    }
    // SAFETY: not null: a string, copied before the next call.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

impl Library {
    /// Opens a library for good. Every symbol that it needs must be there.
    ///
    /// # Safety
    ///
    /// The library's initialisers run: it must be one that is sound to have in this process.
    pub unsafe fn open(path: &OsStr) -> Result<Library, String> {
        let path = CString::new(path.as_bytes()).map_err(|_| "a path with a zero byte")?;
        let flags = libc::RTLD_NOW | libc::RTLD_LOCAL | libc::RTLD_NODELETE;
        // SAFETY: the path is a C string; for the initialisers answers the caller.
        let handle = unsafe { libc::dlopen(path.as_ptr(), flags) };
        if handle.is_null() { Err(last_error()) } else { Ok(Library(handle)) }
    }

    /// A symbol of the library, or of one that it needs.
    pub fn symbol(self, name: &CStr) -> Option<*mut c_void> {
        // SAFETY: the handle is open, the name a C string.
        let address = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        (!address.is_null()).then_some(address)
    }
}

/// The file that the object at `address` was loaded from.
pub(crate) fn file_of(address: *const c_void) -> Option<PathBuf> {
    // SAFETY: zeroed is a valid `Dl_info`.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: any address may be asked for.
    let known = unsafe { libc::dladdr(address, &raw mut info) } != 0;
    if !known || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: a string of the linker's, which lives as long as the object.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    Some(PathBuf::from(OsStr::from_bytes(name.to_bytes())))
}

#[repr(C)]
struct SearchPath {
    name: *const libc::c_char,
    flags: libc::c_uint,
}

#[repr(C)]
struct SearchPaths {
    size: usize,
    count: libc::c_uint,
    // As many as `count` says follow.
    paths: [SearchPath; 1],
}

unsafe extern "C" {
    fn dlinfo(handle: *mut c_void, request: libc::c_int, to: *mut c_void) -> libc::c_int;
}

const RTLD_DI_SERINFO: libc::c_int = 4;
const RTLD_DI_SERINFOSIZE: libc::c_int = 5;

/// The folders in which the linker looks for this program's libraries. Its cache
/// (`/etc/ld.so.cache`) may name others.
pub(crate) fn search_path() -> Vec<PathBuf> {
    // SAFETY: opens the program itself.
    let program = unsafe { libc::dlopen(std::ptr::null(), libc::RTLD_NOW) };
    if program.is_null() {
        return Vec::new();
    }
    let mut size = SearchPaths { size: 0, count: 0, paths: [const { EMPTY }; 1] };
    // SAFETY: this request fills in `size` and `count`.
    if unsafe { dlinfo(program, RTLD_DI_SERINFOSIZE, (&raw mut size).cast()) } != 0
        || size.size < size_of::<SearchPaths>()
    {
        return Vec::new();
    }
    // Eight bytes a word: aligned as the struct wants it.
    let mut memory = vec![0u64; size.size.div_ceil(8)];
    let all: *mut SearchPaths = memory.as_mut_ptr().cast();
    // SAFETY: `memory` has the size that was asked for, and begins with what the first request
    // gave, as the second one wants it.
    let filled = unsafe {
        (*all).size = size.size;
        (*all).count = size.count;
        dlinfo(program, RTLD_DI_SERINFO, all.cast())
    };
    if filled != 0 {
        return Vec::new();
    }
    let mut folders = Vec::new();
    for index in 0..size.count as usize {
        // SAFETY: the linker has filled in `count` entries behind the header, within `memory`;
        // their names lie in it as well.
        let name = unsafe {
            let first: *const SearchPath = (&raw const (*all).paths).cast();
            CStr::from_ptr((*first.add(index)).name)
        };
        folders.push(PathBuf::from(OsStr::from_bytes(name.to_bytes())));
    }
    folders
}

const EMPTY: SearchPath = SearchPath { name: std::ptr::null(), flags: 0 };

/// Where the linker would find a library of this name, its cache left aside.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    search_path().into_iter().map(|folder| folder.join(name)).find(|path: &PathBuf| is_file(path))
}

fn is_file(path: &Path) -> bool {
    path.is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_c_library_is_on_the_path() {
        let found = find("libc.so.6").expect("every program has it");
        assert_eq!(crate::elf::check(&found), Ok(()));
        // SAFETY: the C library is in this process already.
        let library = unsafe { Library::open(found.as_os_str()) }.expect("opens");
        let symbol = library.symbol(c"getpid").expect("there");
        assert!(library.symbol(c"thalweg_no_such_symbol").is_none());
        assert!(file_of(symbol).is_some());
    }

    #[test]
    fn a_missing_library_is_an_error_with_its_name() {
        let name = OsStr::new("libthalweg-no-such-library.so");
        // SAFETY: there is nothing to run.
        let error = unsafe { Library::open(name) }.expect_err("missing");
        assert!(error.contains("libthalweg-no-such"), "{error}");
    }
}
