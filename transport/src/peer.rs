//! Who is at the other end.

use bytes::Bytes;

/// The other end of an endpoint, as it introduced itself.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Peer {
    /// The peer's address, for messages to people: where we connected to, or where it came from.
    pub address: String,
    /// This side's own address on the connection that the endpoint began with: under which of its
    /// addresses this host reaches the peer. The endpoint may not use that connection any more.
    pub local_address: String,
    /// The peer's node, random per node.
    pub node_id: [u8; 16],
    /// What the peer's application said in its hello ([`crate::Config::hello`]).
    pub hello: Bytes,
    /// The protocol version spoken on this connection: major, minor.
    pub version: (u16, u16),
}
