//! Shared memory between two processes of one host.
//!
//! Two rings of descriptors and small payloads, one each way; a Unix socket, over which the other
//! side is woken if it sleeps; and three ways to move a larger payload: a loan by reference, one
//! copy out of the sender's memory, or staging through an arena.
//!
//! | file | owns |
//! | --- | --- |
//! | `ring`, `cells` | the ring, sleep and wake, and what it is made of |
//! | `marks` | how far two processes are that copy one payload together |
//! | `model` | ring and marks under `loom` (tests only) |
//! | `wire` | what a ring record says |
//! | `link` | the link: its life and death, and what both directions share |
//! | `link/incoming` | reading what the peer sends, and landing its payloads |
//! | `link/outgoing` | posting, staging, and what the peer answers |
//! | `link/together` | payloads that both sides copy |
//! | `copy` | copying out of a peer's memory, and into it |
//! | `table` | keys with generations |
//! | `socket` | packets and descriptors over the Unix socket, which never block |
//! | `blob` | what a node tells its peers, and the judgement on it |
//! | `engine` | the node's Unix socket and who waits on it |
//! | `setup` | from a Unix connection to a link: proofs and probes |
//! | `fuzz` | what a peer may write, for fuzzing (its feature only) |
//!
//! What a peer can write is only ever read, once, into private memory, and checked there. What
//! this process writes, a peer can only read: each memfd has one writer, sealed so. (A peer that
//! may read this process's private memory may write it as well, by the same right of the kernel's;
//! what an honest one writes there is told in `link/together`.)

mod blob;
mod cells;
mod copy;
mod engine;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz;
mod link;
#[allow(clippy::duplicate_mod, reason = "the model runs the same file over other cells")]
mod marks;
#[cfg(test)]
mod model;
#[allow(clippy::duplicate_mod, reason = "the model runs the same file over other cells")]
mod ring;
#[cfg(test)]
mod ring_tests;
mod setup;
mod socket;
mod table;
#[cfg(test)]
mod tests;
mod wire;

use std::fmt;
use std::time::Duration;

pub(crate) use blob::{Blob, verdict};
pub(crate) use engine::ShmEngine;

/// What is allowed, and how much.
#[derive(Clone, Debug)]
pub(crate) struct ShmOptions {
    /// Whether payloads may be read out of the peer's memory (`process_vm_readv`), by either side.
    pub single_copy: bool,
    /// Whether long ones that go by single copy may be copied by both sides: a part is written into
    /// the receiver's memory (`process_vm_writev`).
    pub together: bool,
    /// Whether loans go by reference.
    pub loans: bool,
    /// The longest payload, in bytes, in either direction.
    pub max_payload: u64,
    /// Whether any process of this user may read this one's memory, where the kernel's ptrace
    /// policy would forbid it (`PR_SET_PTRACER_ANY`).
    pub ptracer_any: bool,
    /// How much of one peer's shared pool may be mapped, in bytes of address space.
    pub peer_segments_limit_bytes: u64,
    /// How long setting up one link may take.
    pub handshake_timeout: Duration,
}

impl Default for ShmOptions {
    fn default() -> Self {
        ShmOptions {
            single_copy: true,
            together: true,
            loans: true,
            max_payload: 1 << 40,
            ptracer_any: false,
            peer_segments_limit_bytes: 1 << 40,
            handshake_timeout: Duration::from_secs(10),
        }
    }
}

/// Why this node cannot use shared memory at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unavailable {
    pub reason: String,
    pub fix: String,
}

/// Why a link could not be set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SetupError {
    pub reason: String,
    /// What a person might do about it; may be empty.
    pub fix: String,
}

impl SetupError {
    fn new(reason: impl Into<String>) -> Self {
        SetupError { reason: reason.into(), fix: String::new() }
    }

    fn fixed_by(mut self, fix: &str) -> Self {
        self.fix = fix.into();
        self
    }
}

impl fmt::Display for SetupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)?;
        if !self.fix.is_empty() {
            write!(f, "; try: {}", self.fix)?;
        }
        Ok(())
    }
}
