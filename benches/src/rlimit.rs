//! The limit of open descriptors.

/// Raises this process's soft limit of open descriptors to the hard one; best effort.
pub fn raise() {
    let Some((soft, hard)) = descriptors() else {
        return;
    };
    if soft < hard {
        let wanted = libc::rlimit { rlim_cur: hard, rlim_max: hard };
        // SAFETY: `wanted` is a valid rlimit that outlives the call.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &wanted) };
    }
}

/// The soft and the hard limit of open descriptors.
pub fn descriptors() -> Option<(u64, u64)> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit for the kernel to fill in.
    let answer = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    (answer == 0).then_some((limit.rlim_cur, limit.rlim_max))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_soft_limit_reaches_the_hard_one() {
        super::raise();
        let (soft, hard) = super::descriptors().unwrap();
        assert_eq!(soft, hard);
    }
}
