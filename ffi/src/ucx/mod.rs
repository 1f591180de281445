//! libucp: where it is, whether it can be used, and its functions.
//!
//! The bindings are made from the headers of UCX 1.13 by `bindings/ucx.py`. Later versions extend
//! structs at their end and say by a mask which fields are set, so a table made from 1.13 serves
//! them too: zero a struct, and set only what its mask names.

#[allow(
    non_camel_case_types,
    missing_docs,
    clippy::missing_safety_doc,
    clippy::pub_underscore_fields,
    reason = "named and laid out by UCX, whose documentation it is"
)]
mod bindings;
mod log;

use std::ffi::{CStr, OsStr, c_void};
use std::fmt;
use std::path::{Path, PathBuf};

pub use bindings::*;
pub use log::{LogLevel, Logger};

use crate::dl::{Library, file_of, find};
use crate::elf;
use crate::functions::functions;
pub use crate::signals::SignalHandlers;

/// The setting that names the library.
pub const LIBRARY_VARIABLE: &str = "THALWEG_UCX_LIBRARY";
const NAME: &str = "libucp.so.0";
/// The oldest version that the bindings and the link fit.
pub const VERSION_MIN: (u32, u32) = (1, 13);

/// A version of UCX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Changes when programs have to.
    pub major: u32,
    /// Grows with features.
    pub minor: u32,
    /// Grows with corrections.
    pub release: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.release)
    }
}

/// Why one file is of no use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// There is no such file.
    Missing,
    /// The file is no whole shared object, or the dynamic linker refuses it.
    Broken(String),
    /// A function is not in it.
    Symbol(&'static str),
    /// It is older than [`VERSION_MIN`], or of another major version.
    Version(Version),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Missing => f.write_str("not there"),
            Fault::Broken(why) => f.write_str(why),
            Fault::Symbol(name) => write!(f, "has no function {name}"),
            Fault::Version(found) => {
                let (major, minor) = VERSION_MIN;
                write!(f, "is version {found}; {major}.{minor} or a later {major}.x is needed")
            }
        }
    }
}

/// Why there is no libucp: every place that was tried, and what was wrong there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Absent {
    /// In the order in which they were tried.
    pub tried: Vec<(PathBuf, Fault)>,
    /// Whether only the file that [`LIBRARY_VARIABLE`] names was tried.
    pub named: bool,
}

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = |(_, fault): &&(PathBuf, Fault)| *fault != Fault::Missing;
        match self.tried.iter().find(found).or(self.tried.first()) {
            Some((path, fault)) => write!(f, "{}: {fault}", path.display())?,
            None => write!(f, "{NAME} was not found")?,
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
        let (major, minor) = VERSION_MIN;
        format!(
            "install UCX {major}.{minor} or newer (Debian: libucx0; Python: libucx-cu12), or name \
             the file in {LIBRARY_VARIABLE}"
        )
    }
}

/// A libucp that can be used. Stays loaded until the process ends.
#[derive(Debug)]
pub struct Ucx {
    /// Its functions.
    pub functions: Functions,
    /// Its version.
    pub version: Version,
    /// The file.
    pub path: PathBuf,
    library: Library,
}

impl Ucx {
    /// The text of a status. Unknown numbers have one too.
    pub fn describe(&self, status: ucs_status_t) -> String {
        // SAFETY: takes any number, gives a string that lives for ever.
        let text = unsafe { (self.functions.ucs_status_string)(status) };
        if text.is_null() {
            return format!("status {status}");
        }
        // SAFETY: as above.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    /// Sends UCX's own log to `logger` instead of standard error, unless the site has said where
    /// it wants it (`UCX_LOG_LEVEL`, `UCX_LOG_FILE`). The first logger stays.
    pub fn redirect_log(&self, logger: Logger) {
        let said = |name: &str| std::env::var_os(name).is_some();
        if !said("UCX_LOG_LEVEL") && !said("UCX_LOG_FILE") {
            log::redirect(self.library, logger);
        }
    }
}

/// Looks for libucp in the file that [`LIBRARY_VARIABLE`] names; if it names none, where
/// the dynamic linker looks, then beside the Python package `libucx`. The caller keeps what it gets,
/// and calls this from one thread at a time: another's signal handlers may get lost otherwise. (No
/// lock is kept here that a fork could leave taken for ever.)
///
/// # Errors
///
/// What was tried, and why none of it will do.
pub fn load() -> Result<Ucx, Absent> {
    let named = std::env::var_os(LIBRARY_VARIABLE).filter(|name| !name.is_empty());
    let places = match &named {
        Some(path) => vec![PathBuf::from(path)],
        None => {
            // What only the linker's cache knows is opened by its bare name.
            let mut places = vec![find(NAME).unwrap_or_else(|| PathBuf::from(NAME))];
            places.extend(python_places());
            places
        }
    };
    let mut tried = Vec::new();
    for path in places {
        match open(&path) {
            Ok(ucx) => return Ok(ucx),
            Err(fault) => tried.push((path, fault)),
        }
    }
    Err(Absent { tried, named: named.is_some() })
}

/// Where the Python package `libucx` keeps its libraries: beside the package that this code is in,
/// and in the environment that is active.
fn python_places() -> Vec<PathBuf> {
    let mut packages = Vec::new();
    if let Some(file) = file_of(python_places as *const c_void) {
        // site-packages/thalweg/thalweg.so, or site-packages/thalweg.so
        packages.extend(file.ancestors().skip(1).take(2).map(Path::to_path_buf));
    }
    for variable in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        let Some(root) = std::env::var_os(variable) else { continue };
        let Ok(folders) = std::fs::read_dir(Path::new(&root).join("lib")) else { continue };
        let pythons = folders.flatten().map(|entry| entry.path());
        packages.extend(
            pythons
                .filter(|path| path.file_name().is_some_and(is_python))
                .map(|path| path.join("site-packages")),
        );
    }
    packages
        .into_iter()
        .map(|folder| folder.join("libucx/lib").join(NAME))
        .filter(|path| path.is_file())
        .collect()
}

fn is_python(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with("python3"))
}

fn open(path: &Path) -> Result<Ucx, Fault> {
    let bare = path.components().count() == 1;
    if !bare {
        if !path.is_file() {
            return Err(Fault::Missing);
        }
        check_files(path)?;
    }
    let handlers = SignalHandlers::remember();
    // SAFETY: a libucp, as its name says; the site installed it or named it. Its initialisers
    // install signal handlers, which `handlers` takes back.
    let library = unsafe { Library::open(path.as_os_str()) };
    drop(handlers);
    let library = library.map_err(|why| match bare && why.contains("No such file") {
        true => Fault::Missing,
        false => Fault::Broken(why),
    })?;
    let version = version(library)?;
    let (major, minor) = VERSION_MIN;
    if version.major != major || version.minor < minor {
        return Err(Fault::Version(version));
    }
    let functions = Functions::load(library).map_err(Fault::Symbol)?;
    let path =
        file_of(functions.ucp_init_version as *const c_void).unwrap_or_else(|| path.to_path_buf());
    Ok(Ucx { functions, version, path, library })
}

/// The file itself, and the libraries beside it that it needs.
fn check_files(path: &Path) -> Result<(), Fault> {
    elf::check(path).map_err(Fault::Broken)?;
    for name in ["libuct.so.0", "libucs.so.0", "libucm.so.0"] {
        let beside = path.with_file_name(name);
        if beside.is_file() {
            elf::check(&beside).map_err(|why| Fault::Broken(format!("{name}: {why}")))?;
        }
    }
    Ok(())
}

fn version(library: Library) -> Result<Version, Fault> {
    type GetVersion = unsafe extern "C" fn(*mut libc::c_uint, *mut libc::c_uint, *mut libc::c_uint);
    let address = library.symbol(c"ucp_get_version").ok_or(Fault::Symbol("ucp_get_version"))?;
    // SAFETY: every version of the public headers declares it like this.
    let get = unsafe { std::mem::transmute::<*mut c_void, GetVersion>(address) };
    let (mut major, mut minor, mut release) = (0, 0, 0);
    // SAFETY: writes three numbers.
    unsafe { get(&raw mut major, &raw mut minor, &raw mut release) };
    Ok(Version { major, minor, release })
}

/// The `UCX_*` settings of this process, which UCX honours, sorted by name.
pub fn site_settings() -> Vec<(String, String)> {
    let mut settings: Vec<_> = std::env::vars_os()
        .filter_map(|(name, value)| {
            let name = name.into_string().ok().filter(|name| name.starts_with("UCX_"))?;
            Some((name, value.to_string_lossy().into_owned()))
        })
        .collect();
    settings.sort();
    settings
}

#[cfg(test)]
mod tests;
