//! Programs a newcomer copies from, and the one option that all of them take.

use thalweg::{Config, LinkKind};

/// The defaults, changed by the environment (`THALWEG_*`) and by `--transport LINK[,LINK]`.
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
    let links = names.split(',').map(|name| {
        LinkKind::from_name(name).unwrap_or_else(|| {
            eprintln!("--transport {names}: there is no link called {name:?}");
            std::process::exit(2)
        })
    });
    Ok(config.transports(links))
}

/// The program in the README compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
