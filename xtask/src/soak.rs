//! The tests in their long forms, and the record of their last run in `tests/SOAK.md`.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use crate::run::{self, Step};
use crate::summary::Summary;
use crate::{With, cargo, minutes, ucx, verbs};

/// How long each fuzz target is fed, in seconds: five minutes in all on two cores.
const FUZZ_SECONDS: &str = "60";

/// Runs them and writes the record.
pub fn run(root: &Path) -> Summary {
    let mut summary = Summary::new();
    let build = cargo(&["test", "--release", "--package", "thalweg-tests", "--no-run"]);
    let built = Step::new("build", minutes(20)).run(build);
    let failed = built.failed();
    summary.add(built);
    if failed {
        return summary;
    }
    let mut tests = cargo(&["test", "--release", "--package", "thalweg-tests", "--no-fail-fast"])
        .with(&["--", "--show-output"]);
    tests.env("THALWEG_TEST_LONG", "1").env("THALWEG_FUZZ_SECONDS", FUZZ_SECONDS);
    summary.extend(run::tests(tests, minutes(40), minutes(120)));
    summary.extend(ucx::tests(root, true, true).into_rows());
    summary.extend(verbs::tests(root, true).into_rows());
    let path = root.join("tests/SOAK.md");
    match std::fs::write(&path, record(&summary)) {
        Ok(()) => println!("wrote {}", path.display()),
        Err(error) => eprintln!("cannot write {}: {error}", path.display()),
    }
    summary
}

fn record(summary: &Summary) -> String {
    let mut text = String::from("# The last run of `cargo xtask soak`\n\n");
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let commit = said_by(&mut Command::new("git").with(&["rev-parse", "--short", "HEAD"]));
    let date = said_by(&mut Command::new("date").with(&["-u", "+%Y-%m-%d %H:%M UTC"]));
    let facts = [
        ("ended", date),
        ("commit (with what had changed since)", commit),
        ("kernel", kernel.trim().to_owned()),
        ("CPUs", cpus.to_string()),
        ("fuzzing of each target, seconds", FUZZ_SECONDS.to_owned()),
    ];
    let mut line = |line: String| writeln!(text, "{line}").expect("a string takes everything");
    facts.into_iter().for_each(|(name, fact)| line(format!("- {name}: {fact}")));
    line(String::new());
    line("| tests | verdict | passed | failed | skipped | seconds |".to_owned());
    line("| --- | --- | --- | --- | --- | --- |".to_owned());
    for row in summary.rows() {
        let (name, counts) = (&row.name, row.counts);
        line(format!(
            "| {name} | {} | {} | {} | {} | {:.0} |",
            row.verdict(),
            counts.passed,
            counts.failed,
            counts.skipped,
            row.took.as_secs_f64()
        ));
    }
    line(String::new());
    summary.rows().iter().flat_map(|row| &row.notes).for_each(|note| line(format!("- {note}")));
    line(format!("\n{}", summary.counts()));
    text
}

fn said_by(command: &mut Command) -> String {
    let out = command.output().map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned());
    out.ok().filter(|text| !text.is_empty()).unwrap_or_else(|| "not known".to_owned())
}
