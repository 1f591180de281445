//! The small programs do what they say they do.

use std::process::{Command, Stdio};

fn output(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output().expect("started");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn assert_says(program: &str, lines: &[&str]) {
    assert_says_with(program, &[], lines);
}

fn assert_says_with(program: &str, words: &[&str], lines: &[&str]) {
    let said = output(program, words);
    for line in lines {
        assert!(said.contains(line), "{line:?} expected in:\n{said}");
    }
}

const PROGRAMS: [&str; 3] =
    [env!("CARGO_BIN_EXE_hello"), env!("CARGO_BIN_EXE_tags"), env!("CARGO_BIN_EXE_put_get")];

/// Nobody is accepted then, and the program must end all the same.
#[test]
fn a_connect_that_fails_is_an_error_in_words() {
    for program in PROGRAMS {
        let output = Command::new(program)
            .env("THALWEG_TRANSPORTS", "tcp")
            .env("THALWEG_REQUIRE_ENCRYPTION", "1")
            .output()
            .expect("started");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{errors}");
        assert!(errors.starts_with("error: no usable link"), "{errors}");
    }
}

#[test]
fn nobody_who_listens_is_no_failure() {
    for program in PROGRAMS {
        let child = Command::new(program).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.expect("started");
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("ended");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && errors.is_empty(), "{errors}");
    }
}

#[test]
fn hello() {
    let lines = ["a client says \"hello\"", "and hears \"well met, hello\"", "tcp"];
    assert_says(env!("CARGO_BIN_EXE_hello"), &lines);
}

#[test]
fn tags() {
    let lines = [
        "note: running hot\nasked for: result 2\nnumber 3: result 3\nnumber 1: result 1\n",
        "no result 9 within 50ms; the buffer of 64 bytes is ours again",
    ];
    assert_says(env!("CARGO_BIN_EXE_tags"), &lines);
}

#[test]
fn put_get() {
    let lines = [
        "a region of 1048576 bytes",
        "read back \"written\"",
        "told \"at 4096\", found \"written there\"",
        "1048576 bytes back",
        "then: remote key unknown or revoked",
        "and: access outside the region",
    ];
    assert_says(env!("CARGO_BIN_EXE_put_get"), &lines);
}

/// Over `ucx` where libucp is here, else over tcp, which then says why.
#[test]
fn links_are_chosen_by_option() {
    let program = env!("CARGO_BIN_EXE_hello");
    assert_says_with(program, &["--transport", "ucx,tcp"], &["a client says", "ucx"]);
    let refused = Command::new(program).args(["--transport", "pigeon"]).output().expect("started");
    assert_eq!(refused.status.code(), Some(2));
}
