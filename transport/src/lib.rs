//! thalweg: the line of fastest flow between two processes.
//!
//! An async transport for distributed schedulers. A [`Node`] is a process's context; it listens
//! and connects, and each connection is an [`Endpoint`]. Underneath, an endpoint moves its data
//! over the best link that both sides have: shared memory on one host, RDMA or UCX where there is
//! hardware for them, TCP otherwise.
//! [`Endpoint::route`] says which one and why.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> thalweg::Result<()> {
//! use thalweg::{Config, Message, Node};
//! let node = Node::new(Config::new())?;
//! let listener = node.listen("thalweg://127.0.0.1:0").await?;
//! let (there, here) = tokio::join!(node.connect(listener.address()), listener.accept());
//! let (there, here) = (there?, here?);
//! there.send(Message::copy_from_slice(b"hello")).await?;
//! assert_eq!(here.recv().await?.to_vec()?, b"hello");
//! # Ok(())
//! # }
//! ```
//!
//! An endpoint offers three families of operations: *messages* (ordered, of many frames; memory is
//! found by the receiver's allocator), *tags* (64-bit tag and mask, into the receiver's buffer)
//! and *one-sided* put and get on registered regions. Families are not ordered among each other,
//! except by [`Endpoint::fence`].
//!
//! Every operation owns its memory and gives it back with its result; dropping one at any time is
//! sound and loses nothing (see [`Op`]).

#![warn(missing_docs)]

mod address;
mod config;
mod driver;
mod endpoint;
mod error;
#[cfg(feature = "fuzzing")]
mod fuzz_input;
mod link;
mod listener;
mod memory;
mod message;
mod node;
mod peer;
mod proto;
mod region;
mod route;
mod runtime;
mod stats;

pub use address::Address;
pub use config::{Config, Wake};
pub use driver::kinds::{Fence, Get, Put, Recv, Send, TagRecv, TagSend, Tagged};
pub use driver::op::{Cancel, Cancelling, Kind, Op, Timed};
pub use endpoint::{Closed, Endpoint, TrySendError};
pub use error::{CloseReason, Error, ErrorKind, Failed, Phase, Result};
pub use link::{LinkCounters, LinkKind};
pub use listener::Listener;
pub use memory::{Allocator, Buffer, BufferMut, HostPool, Loan, MemoryKind, PoolBuf, Region};
pub use message::{Frame, INLINE_MAX, Message};
pub use node::{HostTurn, Node, RecvAny};
pub use peer::Peer;
pub use region::{Access, NotRevoked, Registered, RemoteKey};
pub use route::{Candidate, Capability, Family, Lane, Route, Verdict};
pub use stats::{NodeStats, Stats};

#[cfg(feature = "mock")]
pub use link::mock::{MockPlan, MockSwitch};

/// Entry points for fuzzing what a peer can send. Not part of the API.
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::fuzz_input::Seed;
    pub use crate::proto::fuzz_entry::*;

    /// A frame header of the tcp link.
    pub fn tcp_frame(bytes: &[u8]) -> u64 {
        crate::link::tcp::fuzz::frame(bytes)
    }

    /// All that comes over a connection of the tcp link.
    pub fn tcp_stream(bytes: &[u8]) -> u64 {
        crate::link::tcp::fuzz::stream(bytes)
    }

    /// A capability blob of the shm link, judged against itself.
    pub fn shm_blob(bytes: &[u8]) -> u64 {
        crate::link::shm::fuzz::blob(bytes)
    }

    /// A packet of the shm link's set-up.
    pub fn shm_packets(bytes: &[u8]) -> u64 {
        crate::link::shm::fuzz::packets(bytes)
    }

    /// What a peer of the shm link writes into its memory, and passes over the Unix socket.
    pub fn shm_ring(bytes: &[u8]) -> u64 {
        crate::link::shm::fuzz::records(bytes)
    }

    /// Parcels to an endpoint that is at work.
    pub fn parcels(bytes: &[u8]) -> u64 {
        crate::driver::fuzz::parcels(bytes)
    }

    /// Inputs to start from, for every target. Names are unique within a target and fit for files.
    pub fn seeds() -> Vec<Seed> {
        let mut all = crate::proto::fuzz_seeds::seeds();
        all.extend(crate::link::tcp::fuzz::seeds());
        all.extend(crate::link::shm::fuzz::seeds());
        all.extend(crate::driver::fuzz::seeds());
        all
    }
}
