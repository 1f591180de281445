//! Programs a newcomer copies from, how they speak (results on standard output, errors in words on
//! standard error), and the one option that all of them take.

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use thalweg::Config;

/// The defaults, changed by the environment (`THALWEG_*`) and by `--transport LINK[,LINK]` or
/// `--transport auto`.
///
/// # Errors
///
/// Those of [`Config::from_env`]. A link that does not exist ends the program.
pub fn config() -> thalweg::Result<Config> {
    let names = std::env::args().skip_while(|word| word != "--transport").nth(1);
    with_transport(names.as_deref())
}

/// The same, where the option has been read already.
///
/// # Errors
///
/// As [`config`].
pub fn with_transport(names: Option<&str>) -> thalweg::Result<Config> {
    let config = Config::from_env()?;
    let Some(names) = names else { return Ok(config) };
    Ok(config.transports_by_name(names.split(',')).unwrap_or_else(|error| {
        note(format_args!("--transport {names}: {error}"));
        std::process::exit(2)
    }))
}

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
