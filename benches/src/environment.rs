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
        let wake = env::var("THALWEG_WAKE").ok().map(|name| name.parse()).transpose()?;
        let links = env::var("THALWEG_TRANSPORTS").ok().map(|names| {
            // The library has understood every one of them.
            names.split(',').filter_map(|name| LinkKind::from_name(name.trim())).collect()
        });
        Ok(Environment {
            links,
            wake: wake.and_then(Wake::of_library),
            max_message_bytes: config.message_limit_bytes(),
        })
    }
}

/// `on` or `off`: the default of `--single-copy`.
pub fn single_copy() -> &'static str {
    match env::var("THALWEG_SINGLE_COPY").as_deref() {
        Ok("0" | "false" | "no") => "off",
        _ => "on",
    }
}
