//! Which cores the two processes run on.

use std::io;
use std::mem;

use anyhow::{Context, Result, ensure};

/// A core for each side, where there are two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pins {
    /// The measuring process's core.
    pub here: usize,
    /// Its peer's core.
    pub peer: usize,
}

impl Pins {
    /// Fails, naming the CPUs that may be used, if one of these may not.
    pub fn check(self) -> Result<()> {
        let allowed = allowed().context("asking which CPUs may be used")?;
        for cpu in [self.here, self.peer] {
            ensure!(
                allowed.contains(&cpu),
                "CPU {cpu} may not be used by this process; these may: {}",
                allowed.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
            );
        }
        Ok(())
    }

    /// Two different cores of those this process may use, avoiding two threads of one core where
    /// possible. `None` if there is only one.
    pub fn default_pair() -> Option<Pins> {
        let allowed = allowed().ok()?;
        let (&here, others) = allowed.split_first()?;
        let siblings = siblings(here);
        let peer = others.iter().find(|cpu| !siblings.contains(cpu)).or(others.first())?;
        Some(Pins { here, peer: *peer })
    }
}

/// The CPUs this process may run on, ascending.
pub fn allowed() -> io::Result<Vec<usize>> {
    // SAFETY: a cpu_set_t is plain bits, for which zero is a value; the kernel fills it in.
    let set = unsafe {
        let mut set: libc::cpu_set_t = mem::zeroed();
        if libc::sched_getaffinity(0, mem::size_of_val(&set), &mut set) != 0 {
            return Err(io::Error::last_os_error());
        }
        set
    };
    // SAFETY: the set was filled in above, and every index is below CPU_SETSIZE.
    Ok((0..libc::CPU_SETSIZE as usize)
        .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
        .collect())
}

/// Binds the calling thread, and the threads it starts later, to one CPU.
pub fn to(cpu: usize) -> io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: the set is initialised by zeroing, `cpu` is below CPU_SETSIZE, and the set outlives
    // the call.
    let answer = unsafe {
        let mut set: libc::cpu_set_t = mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, mem::size_of_val(&set), &set)
    };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The hardware threads that share a core with this one, itself included; empty if unknown.
fn siblings(cpu: usize) -> Vec<usize> {
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
    std::fs::read_to_string(path).map(|text| parse_list(&text)).unwrap_or_default()
}

/// Reads the kernel's `0,4-6` notation; what it cannot read is left out.
fn parse_list(text: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse::<usize>().ok()?..=last.trim().parse::<usize>().ok()?)
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_the_kernel_are_read() {
        assert_eq!(parse_list("0,4-6\n"), [0, 4, 5, 6]);
        assert_eq!(parse_list(""), Vec::<usize>::new());
    }

    #[test]
    fn a_thread_is_bound_to_the_core_asked_for() {
        let cpu = *allowed().unwrap().last().unwrap();
        std::thread::spawn(move || {
            to(cpu).unwrap();
            assert_eq!(allowed().unwrap(), [cpu]);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_core_that_is_not_there_is_an_error() {
        assert!(to(1 << 20).is_err());
    }
}
