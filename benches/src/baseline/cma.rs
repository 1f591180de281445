//! `cma`: this process reads a buffer of the other's with `process_vm_readv`, again and again, into
//! one buffer of its own.

use std::io;
use std::time::Instant;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::Unavailable;
use crate::buffer;
use crate::case::{Case, Program};
use crate::pattern::{self, Way};
use crate::peer::{Duty, Peer};
use crate::pin::Pins;
use crate::stats::{Lap, Recorder, Sample, Usage};

/// Where the peer's buffer lies.
#[derive(Serialize, Deserialize)]
struct Offer {
    address: usize,
}

/// Reads `into.len()` bytes at `address` of process `pid`.
fn read(pid: libc::pid_t, address: usize, into: &mut [u8]) -> Result<()> {
    let mut done = 0;
    while done < into.len() {
        let rest = &mut into[done..];
        let local = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
        let remote =
            libc::iovec { iov_base: (address + done) as *mut libc::c_void, iov_len: rest.len() };
        // SAFETY: `local` describes exactly `rest`, which is borrowed for the call; the remote
        // address is only used in the other process, where the kernel checks it.
        let count = unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) };
        match count {
            1.. => done += count as usize,
            0 => bail!("process_vm_readv read nothing"),
            _ => {
                let error = io::Error::last_os_error();
                return Err(match error.raw_os_error() {
                    Some(libc::EPERM | libc::ENOSYS | libc::EACCES) => {
                        Unavailable::new(format!("process_vm_readv is forbidden here: {error}"))
                            .into()
                    }
                    _ => anyhow::Error::from(error).context("process_vm_readv"),
                });
            }
        }
    }
    Ok(())
}

pub(super) fn measure(case: &Case, pins: Option<Pins>) -> Result<Sample> {
    let mut peer = Peer::spawn(case, pins.map(|pins| pins.peer), &[])?;
    let Offer { address } = peer.control().recv()?;
    let pid = libc::pid_t::try_from(peer.id())?;
    let mut into = buffer::filled(case.size_bytes, 1u8)?;
    for _ in 0..case.warmup {
        into.fill(0);
        read(pid, address, &mut into)?;
        pattern::verify(&into, 0, 0, Way::Out)?;
    }
    let mut recorder = match case.program {
        Program::Pingpong => Some(Recorder::new(case.iters, Lap::OneWay)?),
        Program::Bandwidth => None,
    };
    let before = Usage::now();
    let start = Instant::now();
    recorder.iter_mut().for_each(Recorder::start);
    for _ in 0..case.iters {
        read(pid, address, &mut into)?;
        if let Some(recorder) = &mut recorder {
            recorder.lap();
        }
    }
    let wall = start.elapsed();
    let here = before.since();
    peer.control().send(&())?;
    peer.finish()?;
    Ok(match recorder {
        Some(recorder) => Sample::latency(recorder, case.iters, &[here], wall),
        None => Sample::stream(&[here], wall),
    })
}

pub(super) fn serve(mut duty: Duty) -> Result<()> {
    let mut buffer = buffer::filled(duty.case.size_bytes, 0u8)?;
    pattern::fill(&mut buffer, 0, 0, Way::Out);
    duty.control.send(&Offer { address: std::hint::black_box(buffer.as_ptr()) as usize })?;
    // However long the parent measures, its death ends this process.
    let () = duty.control.recv_within(std::time::Duration::from_secs(3600))?;
    drop(buffer);
    Ok(())
}
