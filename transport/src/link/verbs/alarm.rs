//! What a device says by itself: that it is gone, that a queue pair is broken. The node's engine
//! hears it, and tells the links that it is about.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Waker;

use super::device::Event;

#[derive(Default)]
struct State {
    why: Option<String>,
    waker: Option<Waker>,
}

/// Where one link hears of it.
pub(super) struct Alarm {
    device: usize,
    queue_pairs: [u64; 2],
    /// The port that is to stay up.
    port: Option<u8>,
    raised: AtomicBool,
    state: Mutex<State>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Alarm {
    /// Why the link can go on no longer, if somebody has said so.
    pub fn raised(&self) -> Option<String> {
        if !self.raised.load(Ordering::Acquire) {
            return None;
        }
        lock(&self.state).why.clone()
    }

    /// From now on, this waker is called. `true`: it has been raised already.
    pub fn watch(&self, waker: &Waker) -> bool {
        let mut state = lock(&self.state);
        let replaced = match &state.waker {
            Some(known) if known.will_wake(waker) => None,
            _ => state.waker.replace(waker.clone()),
        };
        let raised = state.why.is_some();
        drop(state);
        // Its end may run somebody's code: not under the lock.
        drop(replaced);
        raised
    }

    /// Who is to be called.
    fn raise(&self, why: &str) -> Option<Waker> {
        let mut state = lock(&self.state);
        state.why.get_or_insert_with(|| why.to_owned());
        self.raised.store(true, Ordering::Release);
        state.waker.clone()
    }
}

/// The alarms of a node's links.
#[derive(Default)]
pub(super) struct Alarms(Mutex<Vec<Weak<Alarm>>>);

impl Alarms {
    /// One for a link whose queue pairs, at the device with this number, are these. `port`: a port of
    /// it that is to stay up, if one is.
    pub fn add(&self, device: usize, queue_pairs: [u64; 2], port: Option<u8>) -> Arc<Alarm> {
        let (raised, state) = (AtomicBool::new(false), Mutex::default());
        let alarm = Arc::new(Alarm { device, queue_pairs, port, raised, state });
        let mut all = lock(&self.0);
        // Links come and go: those that are gone must not pile up.
        if all.len() == all.capacity() {
            all.retain(|known| known.strong_count() > 0);
        }
        all.push(Arc::downgrade(&alarm));
        alarm
    }

    /// Tells those that an event is about. Their wakers are to be called once the caller's locks
    /// are released.
    #[must_use]
    pub fn hear(&self, device: usize, event: &Event) -> Vec<Waker> {
        let concerned: Vec<Arc<Alarm>> = lock(&self.0)
            .iter()
            .filter_map(Weak::upgrade)
            .filter(|alarm| alarm.device == device)
            .filter(|alarm| match event {
                Event::DeviceGone { .. } => true,
                Event::QueuePair { which, .. } => alarm.queue_pairs.contains(which),
                Event::PortDown { port, .. } => alarm.port == Some(*port),
                Event::Other => false,
            })
            .collect();
        match event {
            Event::DeviceGone { why }
            | Event::QueuePair { why, .. }
            | Event::PortDown { why, .. } => {
                concerned.iter().filter_map(|alarm| alarm.raise(why)).collect()
            }
            Event::Other => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_reaches_those_that_it_is_about() {
        let alarms = Alarms::default();
        let links = [(0, [1, 2], None), (0, [3, 4], Some(2)), (1, [1, 2], Some(1))]
            .map(|(device, pairs, port)| alarms.add(device, pairs, port));
        let raised = || links.each_ref().map(|alarm| alarm.raised().is_some());
        assert!(!links[0].watch(Waker::noop()));
        let hear = |event| alarms.hear(0, &event).len();
        assert_eq!(hear(Event::Other), 0);
        assert_eq!(hear(Event::PortDown { port: 1, why: "down".into() }), 0);
        assert_eq!(raised(), [false; 3]);
        assert_eq!(hear(Event::QueuePair { which: 4, why: "broken".into() }), 0);
        assert_eq!(raised(), [false, true, false]);
        assert_eq!(hear(Event::DeviceGone { why: "gone".into() }), 1, "who watches is called");
        assert_eq!(raised(), [true, true, false]);
        assert_eq!(links[1].raised().as_deref(), Some("broken"), "the first reason stays");
        assert!(links[0].watch(Waker::noop()));
        assert_eq!(alarms.hear(1, &Event::PortDown { port: 2, why: "down".into() }).len(), 0);
        assert_eq!(raised(), [true, true, false], "another port");
        let _ = alarms.hear(1, &Event::PortDown { port: 1, why: "down".into() });
        assert_eq!(links[2].raised().as_deref(), Some("down"));
    }
}
