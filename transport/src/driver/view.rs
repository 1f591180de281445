//! Views of a sender's memory: each ends with a release to its lane.

use std::sync::{Arc, Weak};

use smallvec::SmallVec;

use super::endpoint::EndpointShared;
use crate::link::{PayloadId, RawView};
use crate::message::{Frame, Message};

/// Makes an endpoint's views.
#[derive(Clone)]
pub(crate) struct Views(pub Weak<EndpointShared>);

impl Views {
    /// The message whose frames these are; `raw` is left empty. The payload is released with the
    /// last frame.
    pub fn message(
        &self,
        lane: u8,
        payload: PayloadId,
        raw: &mut SmallVec<[RawView; 2]>,
    ) -> Message {
        let sole = ViewLease { endpoint: self.0.clone(), lane, payload };
        if raw.len() == 1
            && let Some(view) = raw.pop()
        {
            // Without the allocation: half a round trip of a loan is 40 ns shorter.
            return Message::from(Frame::view(view, Lease::Sole(sole)));
        }
        let shared = Arc::new(sole);
        raw.drain(..).map(|view| Frame::view(view, Lease::Shared(shared.clone()))).collect()
    }
}

/// What a frame holds of a payload in the sender's memory.
#[allow(dead_code, reason = "held for their drop")]
pub(crate) enum Lease {
    /// All of it.
    Sole(ViewLease),
    /// A part.
    Shared(Arc<ViewLease>),
}

#[cfg(test)]
impl Lease {
    /// Of no endpoint.
    pub fn detached() -> Self {
        Lease::Sole(ViewLease { endpoint: Weak::new(), lane: 0, payload: PayloadId(0) })
    }
}

/// Tells the sender, when dropped, that the payload is finished with.
pub(crate) struct ViewLease {
    endpoint: Weak<EndpointShared>,
    lane: u8,
    payload: PayloadId,
}

impl Drop for ViewLease {
    fn drop(&mut self) {
        if let Some(endpoint) = self.endpoint.upgrade() {
            endpoint.release_view(self.lane, self.payload);
        }
    }
}
