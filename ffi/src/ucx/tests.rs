//! Broken libraries of every kind: each is a value that says what is wrong with it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Fault, Version, find, open};

/// Says past the test harness, which swallows the output of tests that pass, what was left out.
fn skipped(test: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {why}");
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("thalweg-ffi-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder of our own");
        Folder(path)
    }

    /// A shared object made from this source; `None` without a compiler.
    fn library(&self, source: &str) -> Option<PathBuf> {
        let from = self.0.join("library.c");
        let to = self.0.join(super::NAME);
        std::fs::write(&from, source).expect("writable");
        let made = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&to).arg(&from).status();
        made.is_ok_and(|status| status.success()).then_some(to)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn fault(path: &Path) -> Fault {
    open(path).expect_err("must be refused")
}

#[test]
fn a_missing_file_and_one_that_is_no_library() {
    assert_eq!(fault(Path::new("/nonexistent/libucp.so.0")), Fault::Missing);
    let folder = Folder::new("text");
    let path = folder.0.join(super::NAME);
    std::fs::write(&path, "#!/bin/sh\nexit 0\n".repeat(20)).expect("writable");
    assert!(matches!(fault(&path), Fault::Broken(_)));
}

#[test]
fn a_library_that_is_too_old_or_of_another_major_version() {
    let folder = Folder::new("old");
    for (major, minor) in [(1, 8), (2, 0)] {
        let source = format!(
            "void ucp_get_version(unsigned *a, unsigned *b, unsigned *c)\n\
             {{ *a = {major}; *b = {minor}; *c = 7; }}\n"
        );
        // Loaded libraries stay, under their path: each needs its own.
        let inner = Folder(folder.0.join(major.to_string()));
        std::fs::create_dir_all(&inner.0).expect("writable");
        let Some(path) = inner.library(&source) else {
            return skipped("too old", "no C compiler");
        };
        assert_eq!(fault(&path), Fault::Version(Version { major, minor, release: 7 }));
    }
}

#[test]
fn a_library_without_a_function() {
    let folder = Folder::new("symbol");
    let source = "void ucp_get_version(unsigned *a, unsigned *b, unsigned *c)\n\
                  { *a = 1; *b = 30; *c = 0; }\n";
    let Some(path) = folder.library(source) else { return skipped("symbols", "no C compiler") };
    let fault = fault(&path);
    assert!(matches!(fault, Fault::Symbol(_)), "{fault}");
    let bare = Folder::new("bare");
    let Some(path) = bare.library("int nothing;\n") else { return };
    assert_eq!(open(&path).expect_err("no version"), Fault::Symbol("ucp_get_version"));
}

#[test]
fn the_real_library_cut_short() {
    let Some(real) = find(super::NAME) else { return skipped("cut short", "no libucp here") };
    let whole = std::fs::read(&real).expect("readable");
    let folder = Folder::new("cut");
    let path = folder.0.join(super::NAME);
    for len in [0, 100, 4096, whole.len() / 2, whole.len() * 9 / 10] {
        std::fs::write(&path, &whole[..len]).expect("writable");
        // A library may end in what is not mapped; nine tenths of it lie within.
        let fault = fault(&path);
        assert!(matches!(&fault, Fault::Broken(why) if why.contains("truncated")), "{fault}");
    }
}

#[test]
fn the_real_library_leaves_signal_handlers_alone() {
    let Some(real) = find(super::NAME) else { return skipped("handlers", "no libucp here") };
    // SAFETY: zeroed is a valid struct for the call to fill in.
    let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: asks only.
    unsafe { libc::sigaction(libc::SIGSEGV, std::ptr::null(), &raw mut before) };
    let ucx = open(&real).expect("the installed library is usable");
    // SAFETY: as above.
    let mut after: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: asks only.
    unsafe { libc::sigaction(libc::SIGSEGV, std::ptr::null(), &raw mut after) };
    assert_eq!(before.sa_sigaction, after.sa_sigaction);
    assert!(ucx.version >= Version { major: 1, minor: 13, release: 0 });
    assert!(ucx.path.is_file(), "{}", ucx.path.display());
    assert!(!ucx.describe(super::UCS_ERR_UNREACHABLE).is_empty());
    assert!(!ucx.describe(-99).is_empty());
}
