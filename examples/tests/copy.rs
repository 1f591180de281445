//! `copy` as its user meets it: two processes, real trees.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use thalweg::{CloseReason, Config, Endpoint, LinkKind, Message, Node};

const COPY: &str = env!("CARGO_BIN_EXE_copy");
const HELLO: &[u8] = b"thalweg copy 1";
/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// A user who owns nothing.
const NOBODY: u32 = 65534;

fn copy() -> Command {
    let mut command = Command::new(COPY);
    command.stdin(Stdio::null());
    command
}

fn run(command: &mut Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started");
    wait(child)
}

/// Its end, which must come.
fn wait(mut child: Child) -> Output {
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().expect("a child").is_none() {
        if Instant::now() > deadline {
            child.kill().expect("killed");
            panic!("copy did not end: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().expect("output")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn assert_success(output: &Output) {
    assert!(output.status.success(), "{}: {}", output.status, stderr(output));
}

fn assert_failure(output: &Output, says: &str) {
    assert_eq!(output.status.code(), Some(1), "{}", stderr(output));
    let said = stderr(output);
    assert!(said.contains(says), "{says:?} expected, not: {said}");
    assert!(!said.contains("panicked"), "{said}");
}

/// A receiver on a port of the system's choice.
struct Receiver {
    child: Option<Child>,
    stderr: BufReader<ChildStderr>,
    address: String,
}

impl Receiver {
    fn start(dest: &Path) -> Receiver {
        let mut child = copy()
            .args(["--listen", "thalweg://127.0.0.1:0"])
            .arg(dest)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        let mut stderr = BufReader::new(child.stderr.take().expect("piped"));
        let mut line = String::new();
        stderr.read_line(&mut line).expect("a line");
        let address = line.strip_prefix("listening at ").and_then(|rest| rest.split(';').next());
        let address = address.expect("an address").to_owned();
        Receiver { child: Some(child), stderr, address }
    }

    fn end(mut self) -> Output {
        let mut output = wait(self.child.take().expect("once"));
        self.stderr.read_to_end(&mut output.stderr).expect("its output");
        output
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Bytes that differ from place to place.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8).collect()
}

fn write(path: PathBuf, bytes: &[u8], mode: u32) {
    fs::write(&path, bytes).expect("written");
    fs::set_permissions(&path, Permissions::from_mode(mode)).expect("permissions");
}

/// Everything that is awkward about trees.
fn make_tree(root: &Path) {
    fs::create_dir(root).expect("made");
    write(root.join("plain"), b"some text\n", 0o644);
    write(root.join("empty"), b"", 0o600);
    write(root.join("program"), b"#!/bin/sh\n", 0o755);
    write(root.join("read only"), b"x", 0o444);
    write(root.join(OsStr::from_bytes(b"not \xff UTF-8\n\t\"'*")), b"odd", 0o644);
    write(root.join("-rf"), b"not an option", 0o644);
    write(root.join("..."), b"three dots", 0o644);
    write(root.join("x".repeat(255)), b"long name", 0o644);
    for len in [1, 61, 62, 63, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 9_000_001] {
        write(root.join(format!("of {len} bytes")), &pattern(len), 0o640);
    }
    fs::create_dir_all(root.join("a/b/c/d")).expect("made");
    write(root.join("a/b/c/d/deep"), b"down here", 0o644);
    fs::create_dir(root.join("empty directory")).expect("made");
    symlink("plain", root.join("link")).expect("linked");
    symlink("/nowhere/at all", root.join("dangling link")).expect("linked");
    symlink("..", root.join("a/up")).expect("linked");
    fs::create_dir(root.join("closed")).expect("made");
    write(root.join("closed/inside"), b"y", 0o644);
    fs::set_permissions(root.join("closed"), Permissions::from_mode(0o500)).expect("set");
    fs::set_permissions(root, Permissions::from_mode(0o750)).expect("set");
}

/// A tree as a list: path, permissions, and what is there.
fn list(root: &Path) -> Vec<(PathBuf, u32, String)> {
    fn walk(folder: &Path, root: &Path, into: &mut Vec<(PathBuf, u32, String)>) {
        for entry in fs::read_dir(folder).expect("a directory") {
            let path = entry.expect("an entry").path();
            let meta = path.symlink_metadata().expect("there");
            let (mode, what) = if meta.is_symlink() {
                (0, format!("link to {:?}", fs::read_link(&path).expect("a link")))
            } else if meta.is_dir() {
                walk(&path, root, into);
                (meta.permissions().mode(), "directory".to_owned())
            } else {
                let bytes = fs::read(&path).expect("a file");
                (meta.permissions().mode(), blake3::hash(&bytes).to_string())
            };
            into.push((path.strip_prefix(root).expect("inside").to_owned(), mode, what));
        }
    }
    let mode = root.metadata().expect("there").permissions().mode();
    let mut entries = vec![(PathBuf::new(), mode, "root".to_owned())];
    walk(root, root, &mut entries);
    entries.sort();
    entries
}

fn folders() -> (TempDir, PathBuf, PathBuf) {
    let around = tempfile::tempdir().expect("a directory");
    let (source, dest) = (around.path().join("source"), around.path().join("dest"));
    (around, source, dest)
}

#[test]
fn a_tree_arrives_as_it_was() {
    for transports in ["shm,tcp", "shm", "tcp"] {
        let (_around, source, dest) = folders();
        make_tree(&source);
        let output = run(copy().arg(&source).arg(&dest).env("THALWEG_TRANSPORTS", transports));
        assert_success(&output);
        assert_eq!(list(&dest), list(&source), "{transports}");
        assert!(stdout(&output).contains("the same on both sides"), "{}", stdout(&output));
        // No bar, nothing left out, no complaint.
        assert_eq!(stderr(&output), "", "{transports}");
    }
}

#[test]
fn without_loans_it_arrives_as_well() {
    let (_around, source, dest) = folders();
    make_tree(&source);
    let output = run(copy()
        .arg(&source)
        .arg(&dest)
        .env("THALWEG_LOAN_POOL", "0")
        .env("THALWEG_SINGLE_COPY", "0"));
    assert_success(&output);
    assert_eq!(list(&dest), list(&source));
}

#[test]
fn two_programs_meet_at_an_address_and_agree_on_the_checksum() {
    let (_around, source, dest) = folders();
    make_tree(&source);
    let receiver = Receiver::start(&dest);
    let sent = run(copy().arg(&source).args(["--connect", &receiver.address]));
    let received = receiver.end();
    assert_success(&sent);
    assert_success(&received);
    assert_eq!(list(&dest), list(&source));
    let checksum = |text: String| {
        text.split_whitespace()
            .find(|word| word.trim_end_matches(',').len() == 64)
            .map(|word| word.trim_end_matches(',').to_owned())
    };
    assert!(checksum(stdout(&sent)).is_some());
    assert_eq!(checksum(stdout(&sent)), checksum(stdout(&received)));
}

#[test]
fn a_single_file_and_an_empty_tree_arrive() {
    let (around, source, dest) = folders();
    write(source.clone(), &pattern(70_000), 0o640);
    assert_success(&run(copy().arg(&source).arg(&dest)));
    assert_eq!(fs::read(dest.join("source")).expect("copied"), pattern(70_000));

    let (nothing, there) = (around.path().join("nothing"), around.path().join("there"));
    fs::create_dir(&nothing).expect("made");
    fs::create_dir(&there).expect("an empty destination that is there already");
    assert_success(&run(copy().arg(&nothing).arg(&there)));
    assert_eq!(list(&there), list(&nothing));
}

#[test]
fn it_explains_itself() {
    for output in [run(&mut copy()), run(copy().arg("--help"))] {
        assert_success(&output);
        for word in ["copy SRC DEST", "--listen", "--connect", "nothing outside it is ever written"]
        {
            assert!(stdout(&output).contains(word), "{}", stdout(&output));
        }
    }
    assert_failure(&run(copy().arg("alone")), "see --help");
}

#[test]
fn nobody_who_listens_is_no_failure() {
    let (_around, source, dest) = folders();
    make_tree(&source);
    let mut child = copy()
        .arg(&source)
        .arg(&dest)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    drop(child.stdout.take());
    let output = wait(child);
    assert_success(&output);
    assert_eq!((list(&dest), stderr(&output)), (list(&source), String::new()));
}

#[test]
fn a_source_without_an_end_is_refused() {
    let (around, _source, dest) = folders();
    let socket = around.path().join("socket");
    let _listener = UnixListener::bind(&socket).expect("bound");
    let pipe = around.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("started").success());
    for source in [&socket, &pipe, Path::new("/dev/zero")] {
        assert_failure(&run(copy().arg(source).arg(&dest)), "neither file nor directory");
        assert_failure(
            &run(copy().arg(source).args(["--connect", "thalweg://127.0.0.1:1"])),
            "neither file nor directory",
        );
        assert!(!dest.exists());
    }
}

#[test]
fn what_cannot_be_read_is_named() {
    let (around, source, dest) = folders();
    assert_failure(&run(copy().arg(&source).arg(&dest)), "cannot read");

    fs::create_dir(&source).expect("made");
    write(source.join("fine"), b"x", 0o644);
    write(source.join("secret"), b"x", 0o000);
    fs::set_permissions(around.path(), Permissions::from_mode(0o777)).expect("set");
    let mut command = copy();
    command.arg(&source).arg(&dest);
    if fs::read(source.join("secret")).is_ok() {
        // Root may read everything.
        command.uid(NOBODY).gid(NOBODY);
    }
    assert_failure(&run(&mut command), "cannot open");
    fs::remove_file(source.join("secret")).expect("removed");
    fs::create_dir(source.join("closed")).expect("made");
    fs::set_permissions(source.join("closed"), Permissions::from_mode(0o000)).expect("set");
    assert_failure(&run(&mut command), "cannot list");

    let socket = around.path().join("with a socket");
    fs::create_dir(&socket).expect("made");
    let _listener = UnixListener::bind(socket.join("socket")).expect("bound");
    let output = run(copy().arg(&socket).arg(around.path().join("other")));
    assert_success(&output);
    assert!(stderr(&output).contains("left out"), "{}", stderr(&output));
}

#[test]
fn a_destination_that_will_not_do_is_refused() {
    let (around, source, dest) = folders();
    make_tree(&source);
    fs::create_dir(&dest).expect("made");
    fs::write(dest.join("precious"), "mine").expect("written");
    assert_failure(&run(copy().arg(&source).arg(&dest)), "not empty");
    assert_eq!(fs::read(dest.join("precious")).expect("untouched"), b"mine");
    assert_failure(&run(copy().arg(&source).arg(source.join("inside"))), "lies inside");
    let far = around.path().join("no/such/parent");
    assert_failure(&run(copy().arg(&source).arg(far)), "cannot make");
}

#[test]
fn nobody_there_is_a_clear_error() {
    let (_around, source, _dest) = folders();
    make_tree(&source);
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = format!("thalweg://{}", free.local_addr().expect("an address"));
    drop(free);
    let output = run(copy().arg(&source).args(["--connect", &address]));
    assert_failure(&output, "refused");
}

/// Says something that the receiver cannot take, and gives the reason for which it was refused.
fn refused(dest: &Path, records: &[&[&[u8]]]) -> (String, Output) {
    let receiver = Receiver::start(dest);
    let reason = hostile(&receiver.address, records);
    (reason, receiver.end())
}

#[tokio::main(flavor = "current_thread")]
async fn hostile(address: &str, records: &[&[&[u8]]]) -> String {
    let node = Node::new(Config::new().hello(HELLO)).expect("a node");
    let endpoint = node.connect(address).await.expect("connected");
    for record in records {
        let frames = record.iter().map(|bytes| thalweg::Frame::copy_from_slice(bytes));
        // It may have hung up already.
        let _ = endpoint.send(Message::from_iter(frames)).await;
    }
    match endpoint.recv().timeout(PATIENCE).await {
        Ok(answer) => format!("an answer: {answer:?}"),
        Err(failed) => failed.to_string(),
    }
}

#[test]
fn a_peer_that_wants_out_of_the_destination_is_refused() {
    let begin: &[&[u8]] = &[&[0; 17]];
    let names: [&[u8]; 6] = [b"..", b"../x", b"/tmp/x", b"a/../../x", b".", b""];
    for name in names {
        let (around, _source, dest) = folders();
        let enter = [&[1][..], name].concat();
        let file = [&[3, 0xa4, 1, 0, 0][..], name].concat();
        for record in [&enter, &file] {
            let dest = dest.with_extension(record[0].to_string());
            let (reason, output) = refused(&dest, &[begin, &[record]]);
            assert!(reason.contains("is refused"), "{name:?}: {reason}");
            assert_failure(&output, "is refused");
            assert_eq!(fs::read_dir(&dest).expect("there").count(), 0);
        }
        // Both destinations, and nothing beside them.
        assert_eq!(fs::read_dir(around.path()).expect("there").count(), 2);
    }
}

#[test]
fn a_peer_that_writes_through_its_own_link_is_refused() {
    let (around, _source, dest) = folders();
    let outside = around.path().join("outside");
    fs::create_dir(&outside).expect("made");
    let link = [b"\x06way\0", outside.as_os_str().as_bytes()].concat();
    let (reason, output) =
        refused(&dest, &[&[&link], &[b"\x01way"], &[b"\x03\xa4\x01\0\0x"], &[b"\x05"]]);
    assert!(reason.contains("cannot make"), "{reason}");
    assert_failure(&output, "cannot make");
    assert_eq!(fs::read_dir(&outside).expect("there").count(), 0);
}

#[test]
fn a_peer_that_talks_nonsense_is_refused() {
    let long = vec![0; (1 << 20) + 1];
    let checksum = [&[7][..], &[0; 32]].concat();
    let cases: [(&[&[&[u8]]], &str); 8] = [
        (&[&[b"\x09"]], "unknown kind"),
        (&[&[]], "0 frames"),
        (&[&[b"\x04", b"bytes"]], "piece of no file"),
        (&[&[b"\x05"]], "piece of no file"),
        (&[&[b"\x03\xa4\x01\0\0x"], &[b"\x01y"]], "inside a file"),
        (&[&[b"\x03\xff\x0f\0\0x"]], "permissions"),
        (&[&[b"\x03\xa4\x01\0\0x"], &[b"\x04", &long]], "1048577 bytes"),
        (&[&[&checksum]], "checksums differ"),
    ];
    for (records, says) in cases {
        let (_around, _source, dest) = folders();
        let (reason, output) = refused(&dest, records);
        assert!(reason.contains(says), "{says}: {reason}");
        assert_failure(&output, says);
    }
}

#[test]
fn a_stranger_is_told_apart() {
    let (_around, source, dest) = folders();
    make_tree(&source);
    let receiver = Receiver::start(&dest);
    let mut stranger = std::net::TcpStream::connect(
        receiver.address.strip_prefix("thalweg://").expect("an address"),
    )
    .expect("connected");
    stranger.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("sent");
    // It costs nothing, and the real sender is served.
    let sent = run(copy().arg(&source).args(["--connect", &receiver.address]));
    assert_success(&sent);
    assert_success(&receiver.end());
    assert_eq!(list(&dest), list(&source));
}

/// A receiver that takes the connection and then nothing.
struct Mute {
    address: String,
    runtime: tokio::runtime::Runtime,
    listener: thalweg::Listener,
}

impl Mute {
    fn new(link: LinkKind) -> Mute {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime");
        let config = Config::new().hello(HELLO).transports([link]).message_window_bytes(1 << 20);
        let listener =
            runtime.block_on(async { Node::new(config)?.listen("thalweg://127.0.0.1:0").await });
        let listener = listener.expect("listening");
        Mute { address: listener.address().to_string(), runtime, listener }
    }

    fn accept(&self) -> Endpoint {
        self.runtime.block_on(self.listener.accept()).expect("accepted")
    }
}

#[test]
fn a_receiver_that_hangs_up_is_a_clear_error() {
    for (link, name) in [(LinkKind::Shm, "shm"), (LinkKind::Tcp, "tcp")] {
        let (_around, source, _dest) = folders();
        make_tree(&source);
        let mute = Mute::new(link);
        let sender = copy()
            .arg(&source)
            .args(["--connect", &mute.address])
            .env("THALWEG_TRANSPORTS", name)
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        let endpoint = mute.accept();
        // Its window is full by now or soon; what matters is that it is in the middle.
        let first = mute.runtime.block_on(endpoint.recv());
        assert!(first.is_ok());
        endpoint.abort();
        drop(endpoint);
        assert_failure(&wait(sender), "nothing more can be sent");
    }
}

#[test]
fn a_killed_receiver_and_a_killed_sender_end_the_other_one() {
    for transports in ["shm", "tcp"] {
        let (_around, source, dest) = folders();
        fs::create_dir(&source).expect("made");
        // A pipe's worth of data cannot hide in buffers.
        let big = fs::File::create(source.join("big")).expect("made");
        big.set_len(4 << 30).expect("sparse");
        for victim in ["receiver", "sender"] {
            let dest = dest.with_extension(victim);
            let mut receiver = Receiver::start(&dest);
            let mut sender = copy()
                .arg(&source)
                .args(["--connect", &receiver.address])
                .env("THALWEG_TRANSPORTS", transports)
                .stderr(Stdio::piped())
                .spawn()
                .expect("started");
            wait_until_written(&dest.join("big"));
            if victim == "receiver" {
                receiver.child.as_mut().expect("running").kill().expect("killed");
                assert_failure(&wait(sender), "nothing more can be sent");
            } else {
                sender.kill().expect("killed");
                let _ = sender.wait();
                assert_failure(&receiver.end(), "nothing more can be received");
            }
            fs::remove_dir_all(&dest).expect("removed");
        }
    }
}

fn wait_until_written(path: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while !path.metadata().is_ok_and(|meta| meta.len() > 0) {
        assert!(Instant::now() < deadline, "nothing was written");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_sender_that_gives_up_says_why() {
    let (_around, _source, dest) = folders();
    let receiver = Receiver::start(&dest);
    let address = receiver.address.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let node = Node::new(Config::new().hello(HELLO)).expect("a node");
        let endpoint = node.connect(address.as_str()).await.expect("connected");
        let _ = endpoint.close(CloseReason::new(1, "the disk is on fire")).await;
    });
    assert_failure(&receiver.end(), "the disk is on fire");
}

#[test]
fn another_program_is_told_apart() {
    let (_around, _source, dest) = folders();
    let receiver = Receiver::start(&dest);
    let address = receiver.address.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let node = Node::new(Config::new().hello("something else")).expect("a node");
        let endpoint = node.connect(address.as_str()).await.expect("connected");
        endpoint.closed().await;
    });
    assert_failure(&receiver.end(), "is not copy");
}
