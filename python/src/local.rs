//! Values that belong to thalweg and may be touched from several threads.

use std::mem::ManuallyDrop;
use std::ops::Deref;

use pyo3::marker::Ungil;
use pyo3::prelude::*;

/// A value whose drop may take a lock of thalweg's: the GIL is let go of meanwhile, because
/// Python's garbage collector runs in whatever thread it likes.
pub struct Local<T: Ungil + Send>(ManuallyDrop<T>);

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

/// Drops a value without the GIL.
pub fn release<T: Ungil + Send>(value: T) {
    let mut value = Some(value);
    // Without an interpreter (it is ending) nobody waits for the GIL either.
    let done = Python::try_attach(|py| {
        let value = value.take();
        py.detach(|| drop(value));
    });
    if done.is_none() {
        drop(value);
    }
}
