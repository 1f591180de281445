//! Views of a sender's memory: each ends with a release to its lane.

use std::sync::{Arc, Weak};

use super::endpoint::EndpointShared;
use crate::link::PayloadId;
use crate::message::Lease;

/// Makes leases for an endpoint's views.
#[derive(Clone)]
pub(crate) struct Views(pub Weak<EndpointShared>);

impl Views {
    /// The lease of one payload; all frames of it share it.
    pub fn lease(&self, lane: u8, payload: PayloadId) -> Arc<dyn Lease> {
        Arc::new(ViewLease { endpoint: self.0.clone(), lane, payload })
    }
}

struct ViewLease {
    endpoint: Weak<EndpointShared>,
    lane: u8,
    payload: PayloadId,
}

impl Lease for ViewLease {
    fn alive(&self) -> bool {
        self.endpoint.upgrade().is_some_and(|endpoint| !endpoint.has_ended())
    }
}

impl Drop for ViewLease {
    fn drop(&mut self) {
        if let Some(endpoint) = self.endpoint.upgrade() {
            endpoint.release_view(self.lane, self.payload);
        }
    }
}
