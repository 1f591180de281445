//! What this machine offers: each link, present or not, why, and what would fix it; what is used where
//! nobody names links; and the facts about the kernel and the process on which that rests.

use std::fmt::Write;
use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;
use thalweg::{Capability, CloseReason, Config, LinkKind, Node};

use crate::baseline::raw_tcp;
use crate::{pin, rlimit};

/// Everything that `thalweg-info` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Info {
    /// Of this library.
    pub version: &'static str,
    /// The links, whether or not they would be used.
    pub links: Vec<LinkInfo>,
    /// What the library uses by itself where nobody names links, best first, and why it does not use
    /// the others.
    pub auto: Vec<LinkInfo>,
    /// The system.
    pub system: System,
}

/// One link.
#[derive(Clone, Debug, Serialize)]
pub struct LinkInfo {
    /// `shm`, `tcp`, `ucx`, `verbs`.
    pub link: &'static str,
    /// Whether it can be used here.
    pub present: bool,
    /// Why, or why not.
    pub reason: String,
    /// What would make it work, or work better.
    pub fix: Option<String>,
}

/// Facts about the kernel and this process. `null`: cannot be read here.
#[derive(Clone, Debug, Serialize)]
pub struct System {
    /// `uname -r`.
    pub kernel: Option<String>,
    /// `/proc/sys/kernel/yama/ptrace_scope`; `null` where Yama is absent, which restricts nothing.
    pub ptrace_scope: Option<u32>,
    /// Soft limit of open descriptors, as this process found it.
    pub descriptors_soft: Option<u64>,
    /// Hard limit of open descriptors.
    pub descriptors_hard: Option<u64>,
    /// Whether `memfd_create` works.
    pub memfd: bool,
    /// Whether `pidfd_open` works.
    pub pidfd: bool,
    /// `/proc/sys/net/core/somaxconn`: longest queue of connects that a listener can have.
    pub somaxconn: Option<u32>,
    /// Effective user.
    pub uid: u32,
    /// CPUs that this process may use.
    pub cpus: Vec<usize>,
    /// Whether `ucx_perftest` is here, for the baseline `ucx`.
    pub ucx_perftest: bool,
}

/// Collects all of it.
pub fn collect() -> Result<Info> {
    let config = Config::from_env()?;
    // The last two are looked for everywhere only where they are named.
    let all = [LinkKind::Shm, LinkKind::Tcp, LinkKind::Verbs, LinkKind::Ucx];
    let links = with_node(config.clone().transports(all), links_of)?;
    let auto = with_node(config.auto_transports(), |node| {
        let allowed = node.config().allowed_transports();
        let place = |info: &LinkInfo| allowed.iter().position(|link| link.name() == info.link);
        let mut links = links_of(node);
        links.retain(|info| place(info).is_some());
        links.sort_by_key(place);
        links
    })?;
    Ok(Info { version: env!("CARGO_PKG_VERSION"), links, auto, system: System::read() })
}

fn links_of(node: &Node) -> Vec<LinkInfo> {
    let info = |capability: Capability| LinkInfo {
        link: capability.link.name(),
        present: capability.present,
        reason: capability.reason,
        fix: capability.fix,
    };
    node.capabilities().into_iter().map(info).collect()
}

/// The links of the library's own that work here and connect processes, best first.
pub fn working_links() -> Result<Vec<LinkKind>> {
    with_node(Config::from_env()?, |node| {
        let tried = |link: &LinkKind| matches!(link, LinkKind::Shm | LinkKind::Tcp);
        let present = node.capabilities().into_iter().filter(|capability| capability.present);
        present.map(|capability| capability.link).filter(tried).collect()
    })
}

fn with_node<T>(config: Config, ask: impl FnOnce(&Node) -> T) -> Result<T> {
    raw_tcp::runtime()?.block_on(async {
        let node = Node::new(config).context("making a node")?;
        let answer = ask(&node);
        node.close(CloseReason::default()).await;
        Ok(answer)
    })
}

impl System {
    fn read() -> System {
        let descriptors = rlimit::descriptors();
        System {
            kernel: read_text("/proc/sys/kernel/osrelease"),
            ptrace_scope: read_number("/proc/sys/kernel/yama/ptrace_scope"),
            descriptors_soft: descriptors.map(|(soft, _)| soft),
            descriptors_hard: descriptors.map(|(_, hard)| hard),
            memfd: crate::shared::Shared::create(4096).is_ok(),
            pidfd: pidfd_works(),
            somaxconn: read_number("/proc/sys/net/core/somaxconn"),
            // SAFETY: takes nothing and cannot fail.
            uid: unsafe { libc::geteuid() },
            cpus: pin::allowed().unwrap_or_default(),
            ucx_perftest: crate::baseline::ucx::installed(),
        }
    }
}

fn read_text(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn read_number(path: &str) -> Option<u32> {
    read_text(path)?.parse().ok()
}

fn pidfd_works() -> bool {
    // SAFETY: plain calls; a descriptor that was made here is closed here.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0);
        fd >= 0 && libc::close(fd as i32) == 0
    }
}

/// For people.
pub fn render(info: &Info) -> String {
    let mut text = format!("thalweg {}\n", info.version);
    let lists =
        [("Links", "to fix", &info.links), ("Chosen automatically", "to change", &info.auto)];
    for (title, change, links) in lists {
        let _ = writeln!(text, "\n{title}");
        for link in links {
            let verdict = if link.present { "yes" } else { "no" };
            let _ = writeln!(text, "  {:<5} {verdict:<4} {}", link.link, link.reason);
            if let Some(fix) = &link.fix {
                let _ = writeln!(text, "             {change}: {fix}");
            }
        }
    }
    text.push_str("\nSystem\n");
    for (name, value) in facts(&info.system) {
        let _ = writeln!(text, "  {name:<22} {value}");
    }
    text
}

fn facts(system: &System) -> Vec<(&'static str, String)> {
    let unknown = || "unknown".to_owned();
    let works = |yes: bool| if yes { "works" } else { "does not work" }.to_owned();
    let number = |value: Option<u64>| value.map_or_else(unknown, |value| value.to_string());
    let soft = number(system.descriptors_soft);
    let scope = match system.ptrace_scope {
        None => "no Yama: same user is enough".to_owned(),
        Some(0) => "0: same user is enough".to_owned(),
        Some(1) => "1: only a parent, or whom the process names".to_owned(),
        Some(2) => "2: only an administrator".to_owned(),
        Some(other) => format!("{other}: nobody"),
    };
    vec![
        ("kernel", system.kernel.clone().unwrap_or_else(unknown)),
        ("ptrace scope", scope),
        ("open descriptors", format!("{soft}, at most {}", number(system.descriptors_hard))),
        ("memfd_create", works(system.memfd)),
        ("pidfd_open", works(system.pidfd)),
        ("net.core.somaxconn", number(system.somaxconn.map(u64::from))),
        ("effective user", system.uid.to_string()),
        ("CPUs", format!("{}", system.cpus.len())),
        (
            "ucx_perftest",
            if system.ucx_perftest { "installed" } else { "not installed" }.to_owned(),
        ),
    ]
}
