//! Wakers of those who wait for one event, each of whom may give up.

use std::collections::BTreeMap;
use std::task::Waker;

/// Bounded by the futures that wait: each has one entry, and takes it along when it is dropped.
#[derive(Default)]
pub(crate) struct Waiters {
    next: u64,
    wakers: BTreeMap<u64, Waker>,
}

/// A future's place among the waiters, if it has one.
#[derive(Debug, Default)]
pub(crate) struct Place(Option<u64>);

impl Waiters {
    /// Puts the waker at the future's place. What was there is to be dropped without a lock.
    #[must_use]
    pub fn wait(&mut self, place: &mut Place, waker: &Waker) -> Option<Waker> {
        let key = *place.0.get_or_insert_with(|| {
            self.next += 1;
            self.next
        });
        match self.wakers.get(&key) {
            Some(known) if known.will_wake(waker) => None,
            _ => self.wakers.insert(key, waker.clone()),
        }
    }

    /// The future waits no more. Its waker is to be dropped without a lock.
    #[must_use]
    pub fn leave(&mut self, place: &mut Place) -> Option<Waker> {
        self.wakers.remove(&place.0.take()?)
    }

    /// All of them, to be woken without a lock.
    pub fn take(&mut self) -> impl Iterator<Item = Waker> + use<> {
        std::mem::take(&mut self.wakers).into_values()
    }
}

impl Place {
    pub fn is_none(&self) -> bool {
        self.0.is_none()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    struct Nothing;

    impl std::task::Wake for Nothing {
        fn wake(self: Arc<Self>) {}
    }

    #[test]
    fn each_has_one_place_and_takes_it_along() {
        let (one, two) = (Waker::from(Arc::new(Nothing)), Waker::from(Arc::new(Nothing)));
        let (mut a, mut b, mut all) = (Place::default(), Place::default(), Waiters::default());
        assert!(all.wait(&mut a, &one).is_none());
        assert!(all.wait(&mut a, &one).is_none(), "nothing was replaced");
        assert!(all.wait(&mut b, &one).is_none(), "the same task may wait twice");
        assert!(all.wait(&mut a, &two).is_some());
        assert!(all.leave(&mut a).is_some_and(|waker| waker.will_wake(&two)));
        assert!(all.leave(&mut a).is_none() && a.is_none());
        assert_eq!(all.take().count(), 1);
        assert!(all.wait(&mut a, &one).is_none());
        assert!(all.leave(&mut b).is_none(), "places are not given out again");
        assert_eq!(all.take().count(), 1);
    }
}
