//! The command line of both programs.

use std::path::PathBuf;

use clap::{Args, Parser};

use crate::case::{Baseline, Memory, Transport, Wake};
use crate::environment;
use crate::pin::Pins;
use crate::units::parse_size;

/// What the listening side hears from the connecting one, or has no use for.
const SAID_BY_THE_CONNECTOR: [&str; 13] = [
    "connect",
    "transport",
    "memory",
    "size",
    "frames",
    "iters",
    "warmup",
    "wake",
    "single_copy",
    "baseline",
    "repeat",
    "json",
    "plot",
];

/// What both programs say of their environment.
const SETTINGS: &str = "The THALWEG_* variables are honoured, by each side on its own machine: links, \
    wake and single copy where no option says otherwise, and all else. A name or value that cannot \
    be understood is an error.";

/// What both programs are asked.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Which links may be used: auto (the library chooses), shm, tcp, ucx, verbs; several with
    /// commas.
    /// Left out: every link of the library's own that works here, one after the other
    #[arg(long, value_name = "LINK", value_delimiter = ',', value_parser = Transport::parse)]
    pub transport: Vec<Transport>,

    /// Where messages lie: host (ordinary memory) or loaned (the node's own, which links of one
    /// host hand over by reference; both ways; first and last byte are written and read); several
    /// with commas
    #[arg(long, value_enum, value_name = "KIND", value_delimiter = ',')]
    pub memory: Vec<Memory>,

    /// Bytes in a message, several with commas: 8,64KiB,1MiB,10MB (KiB = 1024, kB = 1000)
    #[arg(long, value_name = "BYTES", value_delimiter = ',', value_parser = parse_size)]
    pub size: Vec<usize>,

    /// The frames of a message in bytes, for instance 100,165,620000, instead of --size; the raw-tcp
    /// baseline then sends the same bytes in one write
    #[arg(long, value_name = "BYTES", value_delimiter = ',', value_parser = parse_size)]
    #[arg(conflicts_with = "size")]
    pub frames: Vec<usize>,

    /// Round trips, or messages of a stream, to measure; left out: as many as a second or less takes
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub iters: Option<u32>,

    /// Messages sent before measuring; every byte of them is verified
    #[arg(long, value_name = "N")]
    pub warmup: Option<u32>,

    /// How both sides wait: spin (poll without pause), park (sleep at once), adaptive (poll briefly,
    /// then sleep); several with commas
    #[arg(long, value_enum, value_name = "HOW", value_delimiter = ',')]
    pub wake: Vec<Wake>,

    /// Whether a link may read the peer's memory (process_vm_readv); off: it copies through a
    /// staging arena
    #[arg(long, value_name = "on|off", default_value = environment::single_copy())]
    #[arg(action = clap::ArgAction::Set)]
    #[arg(value_parser = parse_switch)]
    pub single_copy: bool,

    /// The CPUs for the measuring process and for its peer; left out: two that this process may
    /// use. With --connect the first counts, with --listen the second
    #[arg(long, value_name = "A,B", value_parser = parse_pins)]
    pub pin: Option<Pins>,

    /// Also measure what the bare system does, in the same run and with the same pinning:
    /// --baseline for all, --baseline=raw-tcp,cma for some
    #[arg(long, value_enum, value_name = "NAME", value_delimiter = ',')]
    #[arg(num_args = 0.., require_equals = true)]
    pub baseline: Option<Vec<Baseline>>,

    /// Measure everything this many times, in turn (A B A B), and report medians
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repeat: u32,

    /// Print one JSON object a line and nothing else on standard output
    #[arg(long)]
    pub json: bool,

    /// Draw the result over the message size into this SVG file
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,

    /// Be the far side on this machine, at exactly this address, until interrupted. The connecting
    /// side says what is measured: no other option is needed here
    #[arg(long, value_name = "ADDR", conflicts_with_all = SAID_BY_THE_CONNECTOR)]
    pub listen: Option<String>,

    /// With --listen: end with success after the first connecting program has finished
    #[arg(long, requires = "listen", conflicts_with = "connect")]
    pub once: bool,

    /// Measure against a program started with --listen, for instance thalweg://10.0.0.2:7000
    #[arg(long, value_name = "ADDR")]
    pub connect: Option<String>,
}

impl Common {
    /// Whether nothing was said about what to measure, so that the whole sweep runs.
    pub fn is_sweep(&self) -> bool {
        self.transport.is_empty()
            && self.memory.is_empty()
            && self.size.is_empty()
            && self.frames.is_empty()
            && self.wake.is_empty()
            && self.iters.is_none()
            && self.connect.is_none()
    }
}

/// Measures the latency of messages between two processes.
///
/// Without --listen and --connect it starts its own peer on this machine. Without any option it
/// measures every link that works here beside what the bare system does, and prints a table and the
/// route with its reasons. Figures are half a round trip, each round trip timed on its own.
#[derive(Parser, Clone, Debug)]
#[command(name = "pingpong", version, after_help = SETTINGS)]
pub struct Pingpong {
    /// What to measure.
    #[command(flatten)]
    pub common: Common,
}

/// Measures bandwidth and message rate between two processes.
///
/// Without --listen and --connect it starts its own peer on this machine. Without any option it
/// measures every link that works here beside what the bare system does, and prints a table and the
/// route with its reasons. Messages flow one way; the time ends with the receiver's acknowledgement
/// of the last. 1 GB is 10⁹ bytes.
#[derive(Parser, Clone, Debug)]
#[command(name = "bandwidth", version, after_help = SETTINGS)]
pub struct Bandwidth {
    /// What to measure.
    #[command(flatten)]
    pub common: Common,

    /// Messages in flight: sends begun and not finished; left out: 64 up to 64 KiB, 4 above
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    #[arg(conflicts_with = "listen")]
    pub window: Option<u32>,
}

fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("write on or off".to_owned()),
    }
}

fn parse_pins(text: &str) -> Result<Pins, String> {
    let wrong = || format!("{text:?} is not two CPU numbers; write 0,1");
    let (here, peer) = text.split_once(',').ok_or_else(wrong)?;
    let number = |text: &str| text.trim().parse::<usize>().map_err(|_| wrong());
    Ok(Pins { here: number(here)?, peer: number(peer)? })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_option_is_explained() {
        Bandwidth::command().debug_assert();
        for argument in Bandwidth::command().get_arguments() {
            assert!(argument.get_help().is_some(), "{}", argument.get_id());
        }
    }

    #[test]
    fn lists_are_read() {
        let line = "x --transport shm,tcp --size 8,64KiB,1MiB --wake spin,park --memory loaned \
                    --pin 1,0 --baseline --single-copy off --window 7";
        let Bandwidth { common, window } =
            Bandwidth::try_parse_from(line.split(' ').filter(|word| !word.is_empty())).unwrap();
        assert_eq!(common.size, [8, 65536, 1 << 20]);
        assert_eq!(common.transport.len(), 2);
        assert_eq!(common.wake, [Wake::Spin, Wake::Park]);
        assert_eq!(common.memory, [Memory::Loaned]);
        assert_eq!(common.pin, Some(Pins { here: 1, peer: 0 }));
        assert_eq!(common.baseline, Some(vec![]));
        assert!(!common.single_copy);
        assert_eq!(window, Some(7));
    }

    #[test]
    fn a_list_of_baselines_needs_an_equals_sign() {
        let parsed = Pingpong::try_parse_from(["x", "--baseline=raw-tcp,cma", "--json"]).unwrap();
        assert_eq!(parsed.common.baseline, Some(vec![Baseline::RawTcp, Baseline::Cma]));
        assert!(parsed.common.json && parsed.common.is_sweep());
    }

    #[test]
    fn nonsense_is_refused() {
        for words in [
            vec!["x", "--transport", "carrier-pigeon"],
            vec!["x", "--size", "many"],
            vec!["x", "--iters", "0"],
            vec!["x", "--pin", "1"],
            vec!["x", "--size", "8", "--frames", "1,2"],
            vec!["x", "--listen", "a:1", "--connect", "b:1"],
            vec!["x", "--listen", "a:1", "--size", "8"],
            vec!["x", "--listen", "a:1", "--json"],
            vec!["x", "--connect", "a:1", "--once"],
            vec!["x", "--once"],
        ] {
            assert!(Pingpong::try_parse_from(&words).is_err(), "{words:?}");
        }
        let windowed = ["x", "--listen", "a:1", "--window", "3"];
        assert!(Bandwidth::try_parse_from(windowed).is_err());
        assert!(Pingpong::try_parse_from(["x", "--listen", "a:1", "--pin", "0,1"]).is_ok());
    }
}
