//! Notices that this process is a forked child, and keeps what each process has for itself.
//!
//! A child inherits memory, and with it locks that a thread of its parent held, which nobody will
//! release any more. So what the whole process shares is made anew in a child
//! ([`PerProcess`]), and what belongs to the parent is told by its [`ForkGuard`].

use std::ptr::{NonNull, null_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

const PAGE: usize = 4096;

/// On a page that the kernel wipes in a forked child: the number of this process, or 0 as long as
/// it has none.
static NUMBER: AtomicPtr<AtomicU32> = AtomicPtr::new(null_mut());
/// The last number given to a process of this line. A child goes on counting where its parent was,
/// so that it is never taken for one that it descends from.
static LAST: AtomicU32 = AtomicU32::new(0);

/// Who made something: this process, or one that it was forked off from.
#[derive(Clone, Copy)]
pub(crate) struct ForkGuard {
    /// `None`: the system cannot tell.
    number: Option<NonNull<AtomicU32>>,
    maker: u32,
}

// SAFETY: points to a page that is never unmapped and is only accessed atomically.
unsafe impl Send for ForkGuard {}
// SAFETY: as above.
unsafe impl Sync for ForkGuard {}

impl ForkGuard {
    /// For what this process makes now.
    pub fn get() -> Self {
        let Some(number) = number() else { return ForkGuard { number: None, maker: 0 } };
        // SAFETY: see `number`.
        let word = unsafe { number.as_ref() };
        let mut maker = word.load(Ordering::Relaxed);
        if maker == 0 {
            let next = LAST.fetch_add(1, Ordering::Relaxed) + 1;
            let set = word.compare_exchange(0, next, Ordering::Relaxed, Ordering::Relaxed);
            maker = set.map_or_else(|other| other, |_| next);
        }
        ForkGuard { number: Some(number), maker }
    }

    /// Whether this process is a forked child of the one that made the guard. One load.
    #[inline]
    pub fn forked(self) -> bool {
        // SAFETY: see `number`.
        let now = self.number.map(|word| unsafe { word.as_ref() }.load(Ordering::Relaxed));
        now.is_some_and(|now| now != self.maker)
    }
}

/// The word on the page, which is mapped, aligned and lives for ever.
fn number() -> Option<NonNull<AtomicU32>> {
    if let Some(known) = NonNull::new(NUMBER.load(Ordering::Acquire)) {
        return Some(known);
    }
    // SAFETY: a fresh private anonymous mapping.
    let page = unsafe {
        mmap_anonymous(null_mut(), PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
    };
    let page = page.ok()?;
    // SAFETY: exactly the mapping just made. Kernels before 4.14 lack the advice: the guard then
    // never fires.
    let wiped = unsafe { madvise(page, PAGE, Advice::LinuxWipeOnFork) }.is_ok();
    let (made, none) = (page.cast::<AtomicU32>(), null_mut());
    if wiped && NUMBER.compare_exchange(none, made, Ordering::AcqRel, Ordering::Acquire).is_ok() {
        return NonNull::new(made);
    }
    // SAFETY: the mapping just made, of which nobody knows.
    let _ = unsafe { munmap(page, PAGE) };
    NonNull::new(NUMBER.load(Ordering::Acquire))
}

/// One value for the whole process. A forked child gets a new one; what it inherits it leaves
/// alone, never to be freed.
pub(crate) struct PerProcess<T> {
    value: AtomicPtr<(ForkGuard, T)>,
    make: fn() -> T,
}

impl<T: Send + Sync> PerProcess<T> {
    pub const fn new(make: fn() -> T) -> Self {
        PerProcess { value: AtomicPtr::new(null_mut()), make }
    }

    pub fn get(&'static self) -> &'static T {
        let known = self.value.load(Ordering::Acquire);
        // SAFETY: null, or from `Box::leak` below and so valid for ever; published by the release
        // that this load has acquired (or, in a child, before it was forked off).
        if let Some((guard, value)) = unsafe { known.as_ref() }
            && !guard.forked()
        {
            return value;
        }
        let made = Box::into_raw(Box::new((ForkGuard::get(), (self.make)())));
        match self.value.compare_exchange(known, made, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: made a moment ago, and never freed from here on.
            Ok(_) => unsafe { &(*made).1 },
            Err(other) => {
                // SAFETY: made a moment ago, and nobody else knows of it.
                drop(unsafe { Box::from_raw(made) });
                // SAFETY: as for `known`; whoever put it there is a thread of this process.
                unsafe { &(*other).1 }
            }
        }
    }
}

/// Notes the first use of a library that has state of its own, of which nobody knows what a forked
/// child inherits (locks, threads that are not there).
///
/// One word, so that no fork comes in the middle: the number of the process that used it first, or 0.
pub(crate) struct FirstUse(AtomicU32);

impl FirstUse {
    pub const fn new() -> Self {
        FirstUse(AtomicU32::new(0))
    }

    /// Whether the library was in use already when this process was forked off. If not, it is now.
    pub fn inherited(&self) -> bool {
        let ForkGuard { number, maker } = ForkGuard::get();
        // Without such numbers the system's must do, though they come again.
        let us = if number.is_some() { maker } else { std::process::id() };
        match self.0.compare_exchange(0, us, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => false,
            Err(first) => first != us,
        }
    }
}

/// What is found once, by whoever asks first, and inherited by children; only a child that is forked
/// off while another thread is looking never gets it.
///
/// That child could not look for itself: the C library's loader is left in the middle of its work
/// and fails or waits for ever (glibc 2.36: in 4 of 18 children).
pub(crate) struct FoundOnce<T> {
    begun: FirstUse,
    found: OnceLock<T>,
}

impl<T> FoundOnce<T> {
    pub const fn new() -> Self {
        FoundOnce { begun: FirstUse::new(), found: OnceLock::new() }
    }

    /// `None`: this process was forked off while another thread was looking. Blocks while one of
    /// this process's threads looks.
    pub fn get(&self, look: impl FnOnce() -> T) -> Option<&T> {
        if let Some(found) = self.found.get() {
            return Some(found);
        }
        (!self.begun.inherited()).then(|| self.found.get_or_init(look))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Barrier, Mutex};
    use std::thread;

    static LOCKED: PerProcess<Mutex<u32>> = PerProcess::new(|| Mutex::new(7));

    /// Runs `body` in a forked child, which must not unwind.
    fn in_child(body: impl FnOnce() -> bool) -> bool {
        // SAFETY: the child does nothing but what the tests pass, and leaves without unwinding.
        match unsafe { libc::fork() } {
            // SAFETY: ends this process, at the latest by the alarm.
            0 => unsafe {
                // One that waits for ever is ended, and has failed.
                libc::alarm(20);
                libc::_exit(i32::from(!body()))
            },
            child => {
                let mut status = 0;
                // SAFETY: the child made above; `status` is a local.
                let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
                waited == child && status == 0
            }
        }
    }

    #[test]
    fn each_generation_knows_its_own() {
        let mine = ForkGuard::get();
        assert!(!mine.forked() && !ForkGuard::get().forked());
        assert!(in_child(|| {
            let childs = ForkGuard::get();
            let inherited = mine.forked();
            let grandchild = in_child(|| {
                // Not even a grandchild is taken for its grandparent.
                mine.forked() && childs.forked() && !ForkGuard::get().forked()
            });
            inherited && !childs.forked() && mine.forked() && grandchild
        }));
        assert!(!mine.forked());
    }

    #[test]
    fn what_a_parent_uses_is_told_from_what_a_child_does() {
        let (parents, childs) = (FirstUse::new(), FirstUse::new());
        assert!(!parents.inherited());
        assert!(in_child(|| parents.inherited() && !childs.inherited() && !childs.inherited()));
        assert!(!parents.inherited());
    }

    #[test]
    fn what_is_being_looked_for_during_a_fork_is_not_waited_for() {
        static SLOW: FoundOnce<u32> = FoundOnce::new();
        static LATER: FoundOnce<u32> = FoundOnce::new();
        let (begun, wait) = (Barrier::new(2), Barrier::new(2));
        thread::scope(|scope| {
            scope.spawn(|| {
                SLOW.get(|| {
                    begun.wait();
                    wait.wait();
                    7
                })
            });
            begun.wait();
            let alone = in_child(|| SLOW.get(|| 8).is_none() && LATER.get(|| 9) == Some(&9));
            wait.wait();
            assert!(alone);
        });
        assert_eq!(SLOW.get(|| 8), Some(&7));
        assert!(in_child(|| SLOW.get(|| 8) == Some(&7)));
    }

    #[test]
    fn a_child_has_values_of_its_own() {
        // Held while the child is forked off: there it stays locked.
        let held = LOCKED.get().lock().expect("not poisoned");
        assert!(in_child(|| {
            let Ok(mut own) = LOCKED.get().try_lock() else { return false };
            *own += 1;
            drop(own);
            LOCKED.get().try_lock().is_ok_and(|own| *own == 8)
        }));
        assert_eq!(*held, 7);
    }
}
