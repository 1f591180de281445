//! Routes, counts and capabilities as dictionaries.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use thalweg::{Capability, LinkCounters, NodeStats, Route, Stats};

/// A dictionary of fields by their names.
macro_rules! fields {
    ($py:expr, $from:expr; $($name:ident),* $(,)?) => {{
        let dict = PyDict::new($py);
        $(dict.set_item(stringify!($name), $from.$name)?;)*
        dict
    }};
}

/// See `Endpoint.route` in Python.
pub fn route(py: Python<'_>, route: &Route) -> PyResult<Py<PyAny>> {
    let dict = PyDict::new(py);
    dict.set_item("link", route.link().name())?;
    dict.set_item("peer", &route.peer)?;
    dict.set_item("text", route.to_string())?;
    let lanes = PyList::empty(py);
    for lane in &route.lanes {
        let item = PyDict::new(py);
        item.set_item("family", lane.family.as_str())?;
        item.set_item("memory", lane.memory.to_string())?;
        item.set_item("link", lane.link.name())?;
        item.set_item("how", &lane.how)?;
        lanes.append(item)?;
    }
    dict.set_item("lanes", lanes)?;
    let candidates = PyList::empty(py);
    for candidate in &route.candidates {
        let item = PyDict::new(py);
        item.set_item("link", candidate.link.name())?;
        item.set_item("verdict", candidate.verdict.as_str())?;
        item.set_item("reason", &candidate.reason)?;
        item.set_item("fix", &candidate.fix)?;
        candidates.append(item)?;
    }
    dict.set_item("candidates", candidates)?;
    Ok(dict.into_any().unbind())
}

/// See `Endpoint.stats` in Python.
pub fn stats(py: Python<'_>, stats: &Stats) -> PyResult<Py<PyAny>> {
    let dict = fields!(py, stats;
        messages_sent, message_bytes_sent, messages_received, message_bytes_received,
        tags_sent, tag_bytes_sent, tags_received, tag_bytes_received,
        puts, put_bytes, gets, get_bytes, direct_puts, direct_gets, granted_keys,
        credit_stalls, room_stalls, credit_grants_sent, message_credit_bytes,
        inbox_bytes, inbox_messages, operations,
    );
    dict.set_item("link", stats.link.map(|link| link.name()))?;
    dict.set_item("link_counters", counters(py, &stats.link_counters)?)?;
    Ok(dict.into_any().unbind())
}

fn counters<'py>(py: Python<'py>, counters: &LinkCounters) -> PyResult<Bound<'py, PyDict>> {
    Ok(fields!(py, counters;
        parcels_sent, parcels_received, inline_bytes_sent, inline_bytes_received,
        loaned_bytes_sent, loaned_bytes_received, single_copy_bytes_received,
        single_copy_bytes_sent,
        arena_bytes_sent, arena_bytes_received, wakes_sent, stalls,
    ))
}

/// See `Node.stats` in Python.
pub fn node_stats(py: Python<'_>, stats: &NodeStats) -> PyResult<Py<PyAny>> {
    let dict = fields!(py, stats;
        endpoints, handshakes, handshakes_failed, messages_sent, messages_received,
        message_bytes_sent, message_bytes_received, shared_bytes, shared_bytes_used, window_bytes,
    );
    let links = PyDict::new(py);
    for (link, count) in &stats.endpoints_by_link {
        links.set_item(link.name(), count)?;
    }
    dict.set_item("endpoints_by_link", links)?;
    Ok(dict.into_any().unbind())
}

/// See `Node.capabilities` in Python.
pub fn capabilities<'py>(py: Python<'py>, all: &[Capability]) -> PyResult<Bound<'py, PyList>> {
    let list = PyList::empty(py);
    for capability in all {
        let item = PyDict::new(py);
        item.set_item("link", capability.link.name())?;
        item.set_item("present", capability.present)?;
        item.set_item("reason", &capability.reason)?;
        item.set_item("fix", &capability.fix)?;
        list.append(item)?;
    }
    Ok(list)
}
