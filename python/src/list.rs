//! A list that any thread may add to, and that nobody ever waits for: not a thread without the GIL,
//! not one that was called back in the middle of it, not a forked child whose parent was at it.
//!
//! Owns what was pushed until it is taken, all of it at a time. Knows nothing of Python.

use std::marker::PhantomData;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

struct Link<T> {
    value: T,
    /// What was pushed before; in what was taken, what was pushed after.
    next: *mut Link<T>,
}

pub struct List<T: Send> {
    last: AtomicPtr<Link<T>>,
    owns: PhantomData<T>,
}

impl<T: Send> List<T> {
    pub const fn new() -> Self {
        List { last: AtomicPtr::new(ptr::null_mut()), owns: PhantomData }
    }

    pub fn push(&self, value: T) {
        let link = Box::into_raw(Box::new(Link { value, next: ptr::null_mut() }));
        let mut last = self.last.load(Ordering::Relaxed);
        loop {
            // SAFETY: made above, and nobody else knows of it yet.
            unsafe { (*link).next = last };
            // Whoever takes it sees what was written. That `last` may meanwhile have been taken,
            // freed and pushed anew does no harm: it is not looked into.
            match self.last.compare_exchange_weak(last, link, Ordering::Release, Ordering::Relaxed)
            {
                Ok(_) => return,
                Err(now) => last = now,
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.last.load(Ordering::Relaxed).is_null()
    }

    /// All that is there, in the order in which it was pushed.
    pub fn take(&self) -> Taken<T> {
        if self.is_empty() {
            return Taken { first: ptr::null_mut(), owns: PhantomData };
        }
        let mut link = self.last.swap(ptr::null_mut(), Ordering::Acquire);
        let mut first = ptr::null_mut();
        while !link.is_null() {
            // SAFETY: a chain of links that `push` made; the swap has made it ours alone.
            let before = unsafe { std::mem::replace(&mut (*link).next, first) };
            first = link;
            link = before;
        }
        Taken { first, owns: PhantomData }
    }
}

impl<T: Send> Drop for List<T> {
    fn drop(&mut self) {
        drop(self.take());
    }
}

/// What was taken from a list.
pub struct Taken<T: Send> {
    first: *mut Link<T>,
    owns: PhantomData<T>,
}

impl<T: Send> Iterator for Taken<T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        if self.first.is_null() {
            return None;
        }
        // SAFETY: `push` made it with `Box`, and `take` has given it to this value alone.
        let link = unsafe { Box::from_raw(self.first) };
        self.first = link.next;
        Some(link.value)
    }
}

impl<T: Send> Drop for Taken<T> {
    fn drop(&mut self) {
        self.for_each(drop);
    }
}
