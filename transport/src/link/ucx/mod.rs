//! Parcels through UCX: whatever lanes libucp finds between two processes, behind one worker.
//!
//! A node has one worker, found at run time (`thalweg-ffi`), behind one gate; another takes its place if it is
//! held up, and a further one lives for moments, to find that out (`probe`). Parcels are active
//! messages; matching and order are `proto`'s, so UCX's own tags and streams are not used. The
//! bootstrap connection stays open beside it: its end is the peer's death, seen by the kernel.
//!
//! | file | owns |
//! | --- | --- |
//! | `context` | the library's context and its settings |
//! | `gate` | the worker's lock, and how callbacks get at what it guards |
//! | `worker` | the worker, and its callbacks |
//! | `request` | operations that UCX is at work on, and the callbacks that end them |
//! | `inbox` | what came for one link, in order, until the link is polled |
//! | `wire` | the header before each message |
//! | `bulk` | long payloads, in chunks that the receiver pulls |
//! | `blob` | what a node tells its peers, and the judgement on it |
//! | `lanes` | what UCX says about its transports, and the lanes of an endpoint |
//! | `engine` | progress when nobody polls, sleep and wake, set-up, and another worker in place of one that is held up |
//! | `probe` | whether the worker is held up by a peer that is dead |
//! | `link` | the link |
//!
//! # Ownership
//!
//! What UCX may still touch is owned by the request: a [`request::SendOp`] owns head and short
//! payloads, and the driver's table owns the rest until `Sink::done`. Both end only in the
//! terminal callback, or with the call where there will be none. A link that is killed closes its endpoint by force, which ends requests in a
//! few turns of progress; until then it lingers, and so does the memory.
//!
//! # Locks
//!
//! In this order, none of them across user code: the endpoint's, and the worker's gate. Callbacks
//! run inside of calls into UCX, so with the gate held, which guards all that they touch. The engine's own
//! are held for moments and with no other; contexts are made under one of the library's, with no gate held.
//!
//! # What is trusted
//!
//! UCX itself parses the peer's worker address and its own wire format, and does not authenticate:
//! the link is for networks and users that are trusted, and is used only where it is asked for, or
//! where there is hardware that no other link reaches. In the latter case it does without the transports
//! that reach into this host at the word of a peer's address ([`UNASKED_WITHOUT`]): no file is opened and
//! no socket connected for it. What is left to whoever can connect to a listener: UCX parses an address
//! that he made up, makes queue pairs, and sends packets to where the address says; over the
//! fabric UCX's own protocol is open to him, in which UCX believes what it is told.
//! Everything above UCX is checked as on the other links. An inbox is bounded.

mod blob;
mod bulk;
mod context;
mod engine;
mod gate;
mod inbox;
mod lanes;
mod link;
mod probe;
mod request;
#[cfg(test)]
mod tests;
mod wire;
mod worker;

use std::time::Duration;

use thalweg_ffi::ucx::{self as ffi, Ucx, ucs_status_t};

use super::LinkKind;
use super::hardware::Reach;
use crate::error::{ErrorKind, LinkError};

use context::Tls;

pub(crate) use blob::{transports, verdict};
#[cfg(test)]
pub(crate) use context::library;
pub(crate) use engine::{Opened, Reservation, UcxEngine};

/// What a link is told when it is made.
#[derive(Clone, Debug)]
pub(crate) struct UcxOptions {
    /// See [`super::Caps::eager_max`].
    pub eager_max: usize,
    /// The longest payload, in bytes, in either direction.
    pub max_payload: u64,
    /// What may wait in one link's inbox, in bytes. A peer that keeps to its credit stays below.
    pub inbox_max_bytes: usize,
    /// How long setting up one link may take.
    pub setup_timeout: Duration,
    pub scope: Scope,
}

/// What UCX is for. Beside it: the hardware whose transports peers are told of.
#[derive(Clone, Debug)]
pub(crate) enum Scope {
    /// Whatever it finds: somebody named it.
    Named(Reach),
    /// That hardware, or there is no engine; and whatever else it finds but these transports.
    Hardware { reach: Reach, without: &'static [&'static str] },
}

impl Scope {
    pub fn reach(&self) -> &Reach {
        let (Scope::Named(reach) | Scope::Hardware { reach, .. }) = self;
        reach
    }

    fn tls(&self) -> Tls<'_> {
        match self {
            Scope::Named(_) => Tls::Site,
            Scope::Hardware { without, .. } => Tls::Without(without),
        }
    }
}

/// UCX's transports that act on this host by what the address of a peer says: sockets connect to where it
/// says, and memory of this host is opened, mapped, read and written by the names and process numbers in it.
/// Nobody who has not named UCX is to find out that way what strangers can do with it.
pub(crate) const UNASKED_WITHOUT: &[&str] = &["tcp", "posix", "sysv", "xpmem", "cma", "knem"];

/// Why every link of a worker has ended; see `probe`.
const HELD_UP: &str = "UCX reads nothing any more that comes through shared memory: a process was killed, \
                       or is stopped, while it wrote there. New connections get a new worker";

/// Why this node cannot use UCX at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unavailable {
    pub reason: String,
    pub fix: String,
}

/// A failure of UCX's, in words and with its number.
fn describe(ucx: &Ucx, doing: &str, status: ucs_status_t) -> String {
    format!("{doing}: {} (UCX status {status})", ucx.describe(status))
}

fn link_error(ucx: &Ucx, doing: &str, status: ucs_status_t) -> LinkError {
    let kind = match status {
        ffi::UCS_ERR_NO_MEMORY | ffi::UCS_ERR_NO_RESOURCE | ffi::UCS_ERR_EXCEEDS_LIMIT => {
            ErrorKind::Resources
        }
        // The last two are how a lane finds that the peer's memory or socket is there no more.
        ffi::UCS_ERR_CONNECTION_RESET
        | ffi::UCS_ERR_NOT_CONNECTED
        | ffi::UCS_ERR_UNREACHABLE
        | ffi::UCS_ERR_TIMED_OUT
        | ffi::UCS_ERR_CANCELED
        | ffi::UCS_ERR_ENDPOINT_TIMEOUT
        | ffi::UCS_ERR_REJECTED
        | ffi::UCS_ERR_SHMEM_SEGMENT
        | ffi::UCS_ERR_IO_ERROR => ErrorKind::ConnectionLost,
        ffi::UCS_ERR_UNSUPPORTED | ffi::UCS_ERR_NOT_IMPLEMENTED => ErrorKind::Unsupported,
        _ if (ffi::UCS_ERR_LAST_ENDPOINT_FAILURE..=ffi::UCS_ERR_FIRST_LINK_FAILURE)
            .contains(&status) =>
        {
            ErrorKind::ConnectionLost
        }
        _ => ErrorKind::Io,
    };
    LinkError::new(kind, LinkKind::Ucx, describe(ucx, doing, status))
}
