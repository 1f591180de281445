//! The project's chores: `cargo xtask help` lists them.
//!
//! Uses nothing but the standard library, so that it is built in a moment on a fresh machine.

mod deny;
mod licence;
mod python;
mod run;
mod setup;
mod soak;
mod summary;
mod ucx;
mod verbs;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use run::Step;
use summary::Summary;

const HELP: &str = "\
cargo xtask test [--no-install]   every test; installs what they need where it may (Debian, root)
cargo xtask lint                  format, clippy, documentation, licences and sources
cargo xtask deny                  licences and sources of the dependencies alone
cargo xtask python                style, types and tests of the Python package alone
cargo xtask ucx                   the tests over UCX alone: each library, each choice of lanes
cargo xtask verbs                 the tests over verbs alone, in a virtual machine
cargo xtask soak                  the tests in their long forms; writes tests/SOAK.md
";

/// Everything is built with these, so that it is built once.
const FEATURES: [&str; 2] = ["--features", "thalweg/mock,thalweg/fuzzing"];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let summary = match words[..] {
        ["test"] => test(true),
        ["test", "--no-install"] => test(false),
        ["lint"] => lint(),
        ["deny"] => {
            let mut summary = Summary::new();
            summary.add(deny::check(&root()));
            summary
        }
        ["python"] => python::tests(&root(), true),
        ["ucx"] => ucx::tests(&root(), true, false),
        ["verbs"] => verbs::tests(&root(), false),
        ["soak"] => soak::run(&root()),
        [] | ["help" | "--help" | "-h"] => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprint!("{HELP}");
            return ExitCode::from(2);
        }
    };
    summary.print();
    if summary.failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Of the checkout that this was started in: one built folder may serve several.
fn root() -> PathBuf {
    let this = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let this = this.unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    this.parent().map(Path::to_owned).unwrap_or_default()
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root()).env("CARGO_TERM_COLOR", "never");
    command
}

fn minutes(count: u64) -> Duration {
    Duration::from_secs(60 * count)
}

fn test(install: bool) -> Summary {
    let mut summary = Summary::new();
    setup::tools(install, &mut summary);
    let build = cargo(&["build", "--workspace", "--all-targets"]).with(&FEATURES);
    let built = Step::new("build", minutes(25)).run(build);
    let failed = built.failed();
    summary.add(built);
    if failed {
        return summary;
    }
    let tests = cargo(&["test", "--workspace", "--no-fail-fast"]).with(&FEATURES);
    summary.extend(run::tests(tests, minutes(6), minutes(20)));
    summary.extend(ucx::tests(&root(), install, false).into_rows());
    summary.extend(verbs::tests(&root(), false).into_rows());
    summary.extend(python::tests(&root(), install).into_rows());
    for (name, arguments) in PROGRAMS {
        let command = Command::new(built_programs().join(name)).with(arguments);
        summary.add(Step::new(name, minutes(3)).checks_leftovers().run(command));
    }
    summary
}

/// Programs that are run once, briefly, with their arguments.
const PROGRAMS: [(&str, &[&str]); 4] = [
    ("thalweg-info", &[]),
    ("pingpong", &["--size", "8,64KiB", "--iters", "200", "--warmup", "50", "--json"]),
    ("bandwidth", &["--size", "64KiB", "--iters", "200", "--warmup", "50", "--json"]),
    ("hello", &[]),
];

/// Where `cargo build` put the programs: beside the folder that this program was built into.
fn built_programs() -> PathBuf {
    let this = std::env::current_exe().unwrap_or_default();
    let target = this.ancestors().nth(2).map(Path::to_owned).unwrap_or_default();
    target.join("debug")
}

fn lint() -> Summary {
    let mut summary = Summary::new();
    summary.add(Step::new("format", minutes(2)).run(cargo(&["fmt", "--all", "--check"])));
    let clippy = cargo(&["clippy", "--workspace", "--all-targets"])
        .with(&FEATURES)
        .with(&["--", "-D", "warnings"]);
    summary.add(Step::new("clippy", minutes(15)).run(clippy));
    let mut doc = cargo(&["doc", "--workspace", "--no-deps"]).with(&FEATURES);
    doc.env("RUSTDOCFLAGS", "-D warnings");
    summary.add(Step::new("documentation", minutes(15)).run(doc));
    summary.add(deny::check(&root()));
    summary
}

/// `Command::args` that gives the command back.
trait With {
    fn with(self, arguments: &[&str]) -> Self;
}

impl With for Command {
    fn with(mut self, arguments: &[&str]) -> Self {
        self.args(arguments);
        self
    }
}

#[cfg(test)]
mod tests {
    /// The README's table names every variable that the library reads.
    #[test]
    fn every_variable_is_in_the_readme() {
        let config = include_str!("../../transport/src/config.rs");
        let readme = include_str!("../../README.md");
        let arm = |line: &str| {
            let (name, _) = line.trim().strip_prefix('"')?.split_once("\" =>")?;
            name.chars().all(|c| c.is_ascii_uppercase() || c == '_').then(|| name.to_owned())
        };
        let names: Vec<_> = config.lines().filter_map(arm).collect();
        assert!(names.len() > 20, "{names:?}");
        for name in names {
            assert!(readme.contains(&format!("| `THALWEG_{name}` |")), "{name}");
        }
    }
}
