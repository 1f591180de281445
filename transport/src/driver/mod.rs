//! Progress, wakeups, and the table of operations in flight.
//!
//! This room makes links and protocol into operations that can be awaited. It must not know how a
//! link moves bytes, nor what an application means by them.
//!
//! - [`shard`]: the endpoint's lock; [`board`]: who is woken; [`resident`]: the task that sees to
//!   progress when nobody polls (`shard_model`, `board_model`: the first two under `loom`).
//! - [`core`]: what the lock guards, with one file a family: [`messages`], [`tags`], [`onesided`],
//!   and [`direct`] for what a link does of the last by itself.
//! - [`table`]: operations in flight; [`op`]: the futures, [`kinds`]: what each kind of them does,
//!   `spin`: how long they poll; [`keys`]: regions that peers may reach.
//! - [`bootstrap`]: from a TCP connection to an endpoint.

#[cfg(test)]
mod auto_tests;
#[allow(clippy::duplicate_mod, reason = "the model runs the same file over loom's primitives")]
pub(crate) mod board;
#[cfg(test)]
mod board_model;
#[cfg(test)]
mod board_tests;
pub(crate) mod bootstrap;
pub(crate) mod core;
#[cfg(test)]
mod credit_tests;
pub(crate) mod direct;
#[cfg(test)]
mod direct_tests;
#[cfg(test)]
mod end_tests;
pub(crate) mod endpoint;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz;
pub(crate) mod keys;
pub(crate) mod kinds;
pub(crate) mod messages;
pub(crate) mod node;
mod onesided;
pub(crate) mod op;
#[cfg(test)]
mod op_tests;
pub(crate) mod resident;
#[allow(clippy::duplicate_mod, reason = "the model runs the same file over loom's primitives")]
mod shard;
#[cfg(test)]
mod shard_model;
#[cfg(test)]
mod shard_tests;
mod spin;
mod sync;
#[cfg(test)]
mod sync_model;
pub(crate) mod table;
mod tags;
pub(crate) mod view;
pub(crate) mod waiters;

pub(crate) use sync::{Mutex, lock};
