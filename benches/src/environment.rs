//! What the `THALWEG_*` variables say of how to measure, where no option says otherwise. The library
//! itself reads the rest of them.

use std::env;

use anyhow::Result;
use thalweg::{Config, LinkKind};

use crate::case::Wake;

/// The part that a plan depends on.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// The links that may be used; none if nothing is said.
    pub links: Option<Vec<LinkKind>>,
    /// How to wait; none if nothing is said.
    pub wake: Option<Wake>,
    /// The largest message that a node of this process takes.
    pub max_message_bytes: u64,
}

impl Environment {
    /// Reads it. A name or value that the library does not understand is an error.
    pub fn read() -> Result<Environment> {
        let config = Config::from_env()?;
        let said = |name| env::var_os(name).is_some();
        Ok(Environment {
            links: said("THALWEG_TRANSPORTS").then(|| config.allowed_transports().to_vec()),
            wake: said("THALWEG_WAKE").then(|| config.wake_mode()).and_then(Wake::of_library),
            max_message_bytes: config.message_limit_bytes(),
        })
    }
}

/// `on` or `off`: the default of `--single-copy`. What cannot be understood is refused by
/// [`Environment::read`].
pub fn single_copy() -> &'static str {
    if Config::from_env().is_ok_and(|config| !config.single_copy_allowed()) { "off" } else { "on" }
}
