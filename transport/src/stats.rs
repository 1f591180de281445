//! What an endpoint and a node have counted.

use crate::link::{LinkCounters, LinkKind};

/// Counts of one endpoint since it connected. Bytes are payload bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Messages handed to a link.
    pub messages_sent: u64,
    /// Bytes in them.
    pub message_bytes_sent: u64,
    /// Messages that have arrived whole.
    pub messages_received: u64,
    /// Bytes in them.
    pub message_bytes_received: u64,
    /// Tagged payloads handed to a link.
    pub tags_sent: u64,
    /// Bytes in them.
    pub tag_bytes_sent: u64,
    /// Tagged receives that got their payload.
    pub tags_received: u64,
    /// Bytes in them.
    pub tag_bytes_received: u64,
    /// Puts begun.
    pub puts: u64,
    /// Bytes in them.
    pub put_bytes: u64,
    /// Gets begun.
    pub gets: u64,
    /// Bytes asked for.
    pub get_bytes: u64,
    /// Puts among them that the link itself did ([`crate::Family::OneSided`] in the route).
    pub direct_puts: u64,
    /// Gets that it did.
    pub direct_gets: u64,
    /// Keys for which the peer holds direct access to regions of this node.
    pub granted_keys: u64,
    /// Times something had to wait for the peer's credit.
    pub credit_stalls: u64,
    /// Times something had to wait for room on the link.
    pub room_stalls: u64,
    /// Credit reports sent to the peer.
    pub credit_grants_sent: u64,
    /// Credit for messages that is left, in bytes.
    pub message_credit_bytes: u64,
    /// Bytes of messages (with bookkeeping) that have arrived and were not fetched.
    pub inbox_bytes: u64,
    /// Messages that have arrived and were not fetched.
    pub inbox_messages: u64,
    /// Operations in flight.
    pub operations: u64,
    /// The link that carries the endpoint.
    pub link: Option<LinkKind>,
    /// What the link has moved, by way of moving.
    pub link_counters: LinkCounters,
}

/// Counts of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NodeStats {
    /// Endpoints that are up.
    pub endpoints: u64,
    /// Endpoints by link.
    pub endpoints_by_link: Vec<(LinkKind, u64)>,
    /// Handshakes that have begun and not ended, both ways.
    pub handshakes: u64,
    /// Handshakes that failed, both ways.
    pub handshakes_failed: u64,
    /// Sum of the endpoints' statistics; ended endpoints are included.
    pub messages_sent: u64,
    /// As above.
    pub messages_received: u64,
    /// As above.
    pub message_bytes_sent: u64,
    /// As above.
    pub message_bytes_received: u64,
    /// Bytes of shared memory that loans and staging have taken from the system.
    pub shared_bytes: u64,
    /// Bytes of it that are in use.
    pub shared_bytes_used: u64,
    /// Credit handed to peers, in bytes.
    pub window_bytes: u64,
}
