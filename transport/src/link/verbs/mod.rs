//! RDMA through libibverbs: reliable connected queue pairs, set up over the bootstrap.
//!
//! libibverbs is found at run time (`thalweg-ffi`). Short parcels are sends into buffers that the
//! peer has posted; long payloads are read by the receiver straight out of the sender's registered
//! memory into its own, or where memory cannot be registered, pulled in chunks. Nothing of this
//! process's memory can be written by a peer except the buffers for its messages, and regions for
//! which it was granted that.
//!
//! | file | owns |
//! | --- | --- |
//! | `device` | devices, ports, protection domains, registered memory |
//! | `queues` | the queue pairs, completion queues and channel of one link |
//! | `pool` | registered buffers, which the links over a device share |
//! | `buffers` | those of one link |
//! | `messenger` | messages over the queues, with credit |
//! | `registrations` | the memory of payloads: registered, remembered, limited |
//! | `wire` | the header before each message |
//! | `bulk` | long payloads |
//! | `rails` | the pairs of ports that long payloads are read by |
//! | `onesided` | puts and gets by the adapter, regions that the peer's may reach |
//! | `blob` | what sides tell each other, and the choice of ports |
//! | `topology` | where a device lies in the host, and how fast its ports are |
//! | `alarm` | what devices say by themselves |
//! | `removal` | what the kernel says of devices that are taken away |
//! | `engine` | devices of a node |
//! | `watchdog` | requests that the device never ends |
//! | `setup` | trying a link's queues, and which rails work |
//! | `link` | the link |
//!
//! # Ownership
//!
//! What a device may still touch belongs to a request that has not completed. Buffers are its
//! link's; landings are the driver's until `Sink::done`. A link that is
//! killed destroys its queue pairs first; from then on the device touches nothing of its, and only
//! then is anything reported or given back.
//!
//! # What is trusted
//!
//! As RDMA has it, whoever can make packets on the fabric can pretend to be a peer. All links over a
//! device share one protection domain for messages, and keys are small numbers that can be guessed.
//! So any peer of this node may read what this node has offered to any of them, for as long as it
//! stays registered: while the operation runs; and for loans and the node's pool of host memory, of
//! which the whole mapping is registered (up to 64 MiB of it, else the payload), until the
//! registration is given up. What was only landed into was registered for this process alone, and
//! nobody else can read it. Regions are different: what a peer was granted is registered in a domain
//! that only its own queue pair belongs to, so no other peer can reach it, whatever it guesses. The
//! link is for networks and users that are trusted. It is used where it is asked for, and by itself
//! where there is RDMA hardware that it speaks (`route::auto`). What arrives is checked as on the other
//! links.

mod alarm;
mod blob;
mod buffers;
mod bulk;
mod device;
mod engine;
#[cfg(test)]
mod fake;
mod link;
mod markers;
mod messenger;
mod onesided;
mod pool;
mod queues;
mod rails;
mod registrations;
mod removal;
mod setup;
#[cfg(test)]
mod tests;
mod topology;
mod watchdog;
mod wire;

use std::time::Duration;

pub(crate) use blob::RAILS_MAX;
pub(crate) use device::Unusable;
pub(crate) use engine::{Opened, Prepared, VerbsEngine};

/// What a link is told when it is made.
#[derive(Clone, Debug)]
pub(crate) struct VerbsOptions {
    /// See [`super::Caps::eager_max`].
    pub eager_max: usize,
    /// The longest payload, in bytes, in either direction.
    pub max_payload: u64,
    /// How long setting up one link may take.
    pub setup_timeout: Duration,
    /// The devices that may be used; none: all.
    pub devices: Vec<String>,
    /// Devices that are left alone.
    pub except: Vec<String>,
    /// How many pairs of ports a link may use, at most [`RAILS_MAX`].
    pub rails: usize,
}
