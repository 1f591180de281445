//! Keeps what a library does to this process's signal handlers from staying.

use std::mem::MaybeUninit;

/// Linux numbers its signals from 1 to 64.
const SIGNALS: usize = 64;

/// The handlers of all signals, put back when this is dropped.
pub struct SignalHandlers {
    before: [Option<libc::sigaction>; SIGNALS],
}

fn current(signal: i32) -> Option<libc::sigaction> {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: asks only; `action` is a struct of the C library's own layout.
    let answer = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: zeroed is a valid value, and the call filled it in.
    (answer == 0).then(|| unsafe { action.assume_init() })
}

impl SignalHandlers {
    /// Remembers the handlers as they are now.
    #[must_use]
    pub fn remember() -> Self {
        let mut before = [None; SIGNALS];
        for (index, slot) in before.iter_mut().enumerate() {
            *slot = current(index as i32 + 1);
        }
        SignalHandlers { before }
    }
}

impl Drop for SignalHandlers {
    fn drop(&mut self) {
        for (index, before) in self.before.iter().enumerate() {
            let signal = index as i32 + 1;
            let Some(before) = before else { continue };
            let changed = current(signal).is_some_and(|now| {
                now.sa_sigaction != before.sa_sigaction || now.sa_flags != before.sa_flags
            });
            if changed {
                // SAFETY: installs what was installed before; whoever did so answers for it.
                unsafe { libc::sigaction(signal, before, std::ptr::null_mut()) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    extern "C" fn nothing(_: i32) {}

    #[test]
    fn a_handler_that_was_installed_meanwhile_is_gone() {
        let before = current(libc::SIGUSR2).expect("known").sa_sigaction;
        let remembered = SignalHandlers::remember();
        // SAFETY: the handler does nothing.
        unsafe { libc::signal(libc::SIGUSR2, nothing as *const () as usize) };
        assert_ne!(current(libc::SIGUSR2).expect("known").sa_sigaction, before);
        drop(remembered);
        assert_eq!(current(libc::SIGUSR2).expect("known").sa_sigaction, before);
    }
}
