//! Programs a newcomer copies from, and how they speak: results on standard output, errors in words
//! on standard error.

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

/// Prints a line. Nobody may be listening (`hello | true`): that is no reason to end.
pub fn say(line: impl fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Prints a line on standard error, with the same indifference.
pub fn note(line: impl fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// The end of a program: says what went wrong, if anything did.
pub fn exit<E: fmt::Display>(result: Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            note(format_args!("error: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// The program in the README compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
