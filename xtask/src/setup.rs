//! The tools that tests use beyond the toolchain, and their installation.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::run::Step;
use crate::summary::{Row, Summary};

/// A folder of libraries.
const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";

struct Tool {
    /// Or a library.
    program: &'static str,
    /// Debian's package.
    package: &'static str,
    /// What is left out without it.
    purpose: &'static str,
}

const fn tool(program: &'static str, package: &'static str, purpose: &'static str) -> Tool {
    Tool { program, package, purpose }
}

const NETWORKS: &str = "tests over network namespaces";
const BASELINE: &str = "tests over ucx, the baseline ucx of pingpong and bandwidth";
const GUEST: &str = "tests of loss and delay, and of RDMA, in a virtual machine";
const LIBRARY: &str = "tests over verbs, and over UCX over RDMA";
const PERFTEST: &str = "the baselines ib-send-lat, ib-write-lat and ib-write-bw";

const BROWSER: &str = "the test that looks at the page for Dask's dashboard";

const TOOLS: [Tool; 14] = [
    tool("ip", "iproute2", NETWORKS),
    tool("tc", "iproute2", NETWORKS),
    tool("ucx_perftest", "ucx-utils", BASELINE),
    tool("busybox", "busybox-static", GUEST),
    tool("modprobe", "kmod", GUEST),
    tool("rdma", "iproute2", GUEST),
    tool("cpio", "cpio", GUEST),
    tool("xz", "xz-utils", GUEST),
    tool("zstd", "zstd", GUEST),
    tool("chromium", "chromium", BROWSER),
    tool("libibverbs.so.1", "libibverbs1", LIBRARY),
    tool("libibverbs/librxe-rdmav34.so", "ibverbs-providers", LIBRARY),
    tool("librdmacm.so.1", "librdmacm1", LIBRARY),
    tool("ib_send_lat", "perftest", PERFTEST),
];

fn missing() -> Vec<&'static Tool> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<_> = std::env::split_paths(&path).collect();
    folders.extend(["/usr/sbin".into(), "/sbin".into(), LIBRARIES.into()]);
    let present = |tool: &&Tool| !folders.iter().any(|folder| folder.join(tool.program).is_file());
    TOOLS.iter().filter(present).collect()
}

/// Installs what is missing where that is allowed, and names what is not there in the end.
pub fn tools(install: bool, summary: &mut Summary) {
    let mut packages: Vec<&str> = missing().iter().map(|tool| tool.package).collect();
    packages.dedup();
    let why = if packages.is_empty() {
        return;
    } else if !install {
        "not installed, as asked"
    } else if !Path::new("/usr/bin/apt-get").exists() {
        "there is no apt-get here to install it"
    } else if !is_root() {
        "only root can install it"
    } else {
        apt(&packages);
        "could not be installed"
    };
    for tool in missing() {
        summary.add(Row::skipped(tool.program, format!("{why}; without it: {}", tool.purpose)));
    }
}

/// Only ever adds packages: what would remove or upgrade one that is there is left out instead.
const INSTALL: [&str; 5] =
    ["install", "-y", "--no-install-recommends", "--no-remove", "--no-upgrade"];

/// A failure shows in what is missing afterwards.
fn apt(packages: &[&str]) {
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").arg("-qq").args(arguments);
        Step::new(&format!("apt-get {}", arguments[0]), Duration::from_secs(240)).run(command)
    };
    apt(&["update"]);
    if apt(&[&INSTALL[..], packages].concat()).failed() {
        // One package that is not to be had must not keep the others away.
        for package in packages {
            apt(&[&INSTALL[..], &[package]].concat());
        }
    }
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|this| this.uid() == 0)
}
