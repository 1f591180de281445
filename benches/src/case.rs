//! One thing to measure, described so that both processes can be told of it.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use thalweg::LinkKind;

/// Which of the two programs is running.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Program {
    /// Messages there and back.
    Pingpong,
    /// Messages one way.
    Bandwidth,
}

impl Program {
    /// As in the JSON output.
    pub const fn name(self) -> &'static str {
        match self {
            Program::Pingpong => "pingpong",
            Program::Bandwidth => "bandwidth",
        }
    }
}

/// Which links the node may use: the name of one, or `auto` for the library's own choice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transport(String);

impl Transport {
    /// Leave the choice to the library.
    pub fn auto() -> Self {
        Transport("auto".to_owned())
    }

    /// Reads a name as given on the command line.
    pub fn parse(name: &str) -> Result<Self, String> {
        match LinkKind::from_name(name) {
            Some(LinkKind::Mock) => Err("the mock link connects nothing across processes".into()),
            None if name != "auto" => Err(format!("there is no link called {name:?}")),
            _ => Ok(Transport(name.to_owned())),
        }
    }

    /// The only link allowed; `None` for `auto`.
    pub fn link(&self) -> Option<LinkKind> {
        LinkKind::from_name(&self.0)
    }

    /// As given.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl From<LinkKind> for Transport {
    fn from(link: LinkKind) -> Self {
        Transport(link.name().to_owned())
    }
}

/// Where the messages lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Memory {
    /// Ordinary memory of the process.
    Host,
    /// Memory lent by the node (`Node::loan`), which links on one host hand over by reference.
    Loaned,
}

impl Memory {
    /// As in the JSON output.
    pub const fn name(self) -> &'static str {
        match self {
            Memory::Host => "host",
            Memory::Loaned => "loaned",
        }
    }
}

/// How a process waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Wake {
    /// Polls without pause; holds its core.
    Spin,
    /// Sleeps at once.
    Park,
    /// Polls for a short, bounded time and then sleeps.
    Adaptive,
}

impl Wake {
    /// The library's own word for it; `None` if this program does not know it.
    pub fn of_library(wake: thalweg::Wake) -> Option<Self> {
        [Wake::Spin, Wake::Park, Wake::Adaptive].into_iter().find(|own| own.name() == wake.name())
    }

    /// As in the JSON output.
    pub const fn name(self) -> &'static str {
        match self {
            Wake::Spin => "spin",
            Wake::Park => "park",
            Wake::Adaptive => "adaptive",
        }
    }
}

/// What the bare system is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Baseline {
    /// Two tokio sockets without framing.
    RawTcp,
    /// One cache line each way between two spinning processes.
    Cacheline,
    /// One eventfd each way between two sleeping processes.
    Eventfd,
    /// A ring of 64-byte slots between two spinning processes, as long as the shm link's.
    Ring,
    /// The same with 8,192 slots.
    DeepRing,
    /// One core copying.
    Memcpy,
    /// One process reading the other's memory (`process_vm_readv`).
    Cma,
    /// `ucx_perftest`, where installed, over shared memory.
    Ucx,
    /// `ucx_perftest -e`, where installed, with the site's own `UCX_*` settings: what the link `ucx`
    /// has to itself.
    UcxE,
    /// `ib_send_lat` of perftest, where installed.
    IbSendLat,
    /// `ib_write_lat` of perftest, where installed.
    IbWriteLat,
    /// `ib_write_bw` of perftest, where installed.
    IbWriteBw,
}

impl Baseline {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Baseline; 12] = [
        Baseline::RawTcp,
        Baseline::Cacheline,
        Baseline::Eventfd,
        Baseline::Ring,
        Baseline::DeepRing,
        Baseline::Memcpy,
        Baseline::Cma,
        Baseline::Ucx,
        Baseline::UcxE,
        Baseline::IbSendLat,
        Baseline::IbWriteLat,
        Baseline::IbWriteBw,
    ];

    /// As in the JSON output.
    pub const fn name(self) -> &'static str {
        match self {
            Baseline::RawTcp => "raw-tcp",
            Baseline::Cacheline => "cacheline",
            Baseline::Eventfd => "eventfd",
            Baseline::Ring => "ring",
            Baseline::DeepRing => "deep-ring",
            Baseline::Memcpy => "memcpy",
            Baseline::Cma => "cma",
            Baseline::Ucx => "ucx",
            Baseline::UcxE => "ucx-e",
            Baseline::IbSendLat => "ib-send-lat",
            Baseline::IbWriteLat => "ib-write-lat",
            Baseline::IbWriteBw => "ib-write-bw",
        }
    }

    /// How its processes wait, as in the JSON output; `none` where nobody waits for anybody.
    pub const fn wake(self) -> &'static str {
        match self {
            Baseline::RawTcp | Baseline::Eventfd => "park",
            Baseline::Cacheline
            | Baseline::Ring
            | Baseline::DeepRing
            | Baseline::Ucx
            | Baseline::UcxE
            | Baseline::IbSendLat
            | Baseline::IbWriteLat
            | Baseline::IbWriteBw => "spin",
            Baseline::Memcpy | Baseline::Cma => "none",
        }
    }

    /// The most bytes one of its messages carries.
    pub const fn max_bytes(self) -> usize {
        match self {
            Baseline::Cacheline | Baseline::Eventfd => 8,
            Baseline::Ring | Baseline::DeepRing => 56,
            _ => usize::MAX,
        }
    }

    /// Whether it says anything about what the program measures.
    pub const fn suits(self, program: Program) -> bool {
        match program {
            // With one message on its way a ring's length is nothing.
            Program::Pingpong => !matches!(self, Baseline::DeepRing | Baseline::IbWriteBw),
            // A line or an eventfd holds one message: there is no stream of them.
            Program::Bandwidth => !matches!(
                self,
                Baseline::Cacheline
                    | Baseline::Eventfd
                    | Baseline::IbSendLat
                    | Baseline::IbWriteLat
            ),
        }
    }

    /// Whether two processes spin against each other, which needs two cores.
    pub const fn needs_two_cores(self) -> bool {
        matches!(
            self,
            Baseline::Cacheline
                | Baseline::Ring
                | Baseline::DeepRing
                | Baseline::Ucx
                | Baseline::UcxE
        ) || self.is_perftest()
    }

    /// Whether it is one of perftest's programs: what the link `verbs` is compared with.
    pub const fn is_perftest(self) -> bool {
        matches!(self, Baseline::IbSendLat | Baseline::IbWriteLat | Baseline::IbWriteBw)
    }
}

/// Whose figures these are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Subject {
    /// This library's.
    Thalweg {
        /// Which links.
        transport: Transport,
        /// Which memory, both ways.
        memory: Memory,
        /// How both sides wait.
        wake: Wake,
        /// Whether `process_vm_readv` may be used.
        single_copy: bool,
    },
    /// The bare system's.
    Baseline(Baseline),
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// Latency or bandwidth.
    pub program: Program,
    /// Of what.
    pub subject: Subject,
    /// Bytes in a message.
    pub size_bytes: usize,
    /// The frames of a message, whose lengths add up to `size_bytes`.
    pub frames: Vec<usize>,
    /// Round trips, or messages of a stream.
    pub iters: usize,
    /// The same before measuring, every byte verified.
    pub warmup: usize,
    /// Messages in flight; only in a stream.
    pub window: usize,
}

impl Case {
    /// Messages measured.
    pub fn messages(&self) -> usize {
        match self.program {
            Program::Pingpong => self.iters * 2,
            Program::Bandwidth => self.iters,
        }
    }

    /// In words, for progress and errors.
    pub fn describe(&self) -> String {
        let size = crate::units::show_size(self.size_bytes);
        match &self.subject {
            Subject::Thalweg { transport, memory, wake, .. } => {
                format!("{} {} {} {size}", transport.name(), memory.name(), wake.name())
            }
            Subject::Baseline(baseline) => format!("{} {size}", baseline.name()),
        }
    }
}
