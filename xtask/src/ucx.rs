//! The tests over UCX, for each library that is here and each choice of lanes. The environment
//! decides about both, so each combination is a run of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::run::{self, Step};
use crate::summary::{Row, Summary};
use crate::{FEATURES, With, cargo, minutes};

/// The newest one that the tests have seen; the oldest is Debian's.
const PACKAGE: &str = "libucx-cu12==1.22.0";
/// Where the package keeps the library, and what it needs.
const WITHIN_PACKAGE: &str = "libucx/lib/libucp.so.0";
/// `UCX_TLS`; `None` leaves the choice to UCX.
const LANES: [Option<&str>; 3] = [Some("tcp"), Some("posix,cma,self"), None];
const PROGRAMS: [&str; 4] = ["conformance", "crash", "soak", "ucx"];
const SOAK_SECONDS: &str = "5";
const SOAK_SECONDS_LONG: &str = "60";

/// A libucp; `file` is `None` for the one that the dynamic linker finds.
struct Library {
    name: &'static str,
    file: Option<PathBuf>,
}

/// Runs them all. With the dynamic linker's library and UCX's own choice of lanes the ordinary
/// tests have run already.
pub fn tests(root: &Path, install: bool, long: bool) -> Summary {
    let mut summary = Summary::new();
    for library in libraries(root, install, &mut summary) {
        for lanes in LANES.into_iter().filter(|lanes| lanes.is_some() || library.file.is_some()) {
            summary.extend(variant(&library, lanes, long));
        }
    }
    summary
}

fn variant(library: &Library, lanes: Option<&str>, long: bool) -> Vec<Row> {
    let what = format!("{}, UCX_TLS={}", library.name, lanes.unwrap_or("(not set)"));
    println!("\n== {what}");
    let mut command = match long {
        true => cargo(&["test", "--release", "--package", "thalweg-tests", "--no-fail-fast"]),
        false => cargo(&["test", "--workspace", "--no-fail-fast"]).with(&FEATURES),
    };
    for program in PROGRAMS {
        command.args(["--test", program]);
    }
    command.args(["--", "ucx"]);
    let seconds = if long { SOAK_SECONDS_LONG } else { SOAK_SECONDS };
    command.env("THALWEG_TEST_SOAK_SECONDS", seconds);
    if long {
        command.arg("--show-output").env("THALWEG_TEST_LONG", "1");
    }
    if let Some(lanes) = lanes {
        command.env("UCX_TLS", lanes);
    }
    if let Some(file) = &library.file {
        command.env("THALWEG_UCX_LIBRARY", file);
    }
    let each = minutes(if long { 10 } else { 2 });
    let mut rows = run::tests(command, each, 2 * each);
    rows.iter_mut().for_each(|row| row.name = format!("{} ({what})", row.name));
    rows
}

fn libraries(root: &Path, install: bool, summary: &mut Summary) -> Vec<Library> {
    let mut found = Vec::new();
    match system_has_it() {
        true => found.push(Library { name: "the system's libucp", file: None }),
        false => {
            let why = "not installed; Debian's package is libucx0";
            summary.add(Row::skipped("tests over the system's libucp", why));
        }
    }
    match from_python(root, install) {
        Ok(file) => found.push(Library { name: PACKAGE, file: Some(file) }),
        Err(why) => summary.add(Row::skipped(format!("tests over {PACKAGE}"), why)),
    }
    found
}

fn system_has_it() -> bool {
    let known = Command::new("/sbin/ldconfig").arg("-p").output();
    known.is_ok_and(|known| String::from_utf8_lossy(&known.stdout).contains("libucp.so.0 "))
}

/// The library of the Python package, in a folder of the build's own.
fn from_python(root: &Path, install: bool) -> Result<PathBuf, String> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(root.join("target"), PathBuf::from);
    let folder = target.join("python").join(PACKAGE);
    let file = folder.join(WITHIN_PACKAGE);
    if !file.is_file() {
        if !install {
            return Err("not installed, as asked".to_owned());
        }
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]);
        pip.args(["--only-binary", ":all:", "--target"]).arg(&folder).arg(PACKAGE);
        let installed = Step::new(&format!("pip install {PACKAGE}"), Duration::from_secs(180));
        let notes = installed.run(pip).notes.join("; ");
        if !file.is_file() {
            return Err(format!("pip could not install it: {notes}"));
        }
    }
    Ok(file)
}
