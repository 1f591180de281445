//! Values that belong to thalweg and may be dropped anywhere in Python.
//!
//! To drop one may take an endpoint's lock. Python's garbage collector runs in whatever thread it
//! likes, so the GIL is let go of meanwhile; and it may run inside of an allocator of the user's,
//! which is called with such a lock in hand: then the drop waits until the allocator has returned.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::mem::ManuallyDrop;
use std::ops::Deref;

use pyo3::marker::Ungil;
use pyo3::prelude::*;

use crate::buffer;

thread_local! {
    static ALLOCATING: Cell<bool> = const { Cell::new(false) };
    static POSTPONED: RefCell<Vec<Box<dyn Any + Send>>> = const { RefCell::new(Vec::new()) };
}

/// Whether this thread is inside of an allocator of the user's: no lock of thalweg's may be taken.
pub fn is_allocating() -> bool {
    ALLOCATING.get()
}

/// Runs an allocator of the user's.
pub fn allocating<R>(work: impl FnOnce() -> R) -> R {
    struct Leave(bool);
    impl Drop for Leave {
        fn drop(&mut self) {
            ALLOCATING.set(self.0);
        }
    }
    let _leave = Leave(ALLOCATING.replace(true));
    work()
}

/// A value that is dropped by [`release`].
pub struct Local<T: Ungil + Send + 'static>(ManuallyDrop<T>);

impl<T: Ungil + Send> Local<T> {
    pub fn new(value: T) -> Self {
        Local(ManuallyDrop::new(value))
    }
}

impl<T: Ungil + Send> Deref for Local<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Ungil + Send> Drop for Local<T> {
    fn drop(&mut self) {
        // SAFETY: taken once, here, and not used afterwards.
        let value = unsafe { ManuallyDrop::take(&mut self.0) };
        release(value);
    }
}

/// Drops a value without the GIL, and gives back the buffers that it held.
pub fn release<T: Ungil + Send + 'static>(value: T) {
    if is_allocating() {
        POSTPONED.with_borrow_mut(|postponed| postponed.push(Box::new(value)));
        return;
    }
    let mut value = Some(value);
    // Without an interpreter (it is ending) nobody waits for the GIL either.
    let done = Python::try_attach(|py| {
        let value = value.take();
        py.detach(|| drop(value));
        buffer::give_back(py);
    });
    if done.is_none() {
        drop(value);
    }
}

/// Drops what could not be dropped inside of an allocator.
pub fn drop_postponed(py: Python<'_>) {
    while !is_allocating()
        && let Some(value) = POSTPONED.with_borrow_mut(Vec::pop)
    {
        py.detach(|| drop(value));
    }
}
