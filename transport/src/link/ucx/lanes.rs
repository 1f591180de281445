//! What UCX says about its transports and the lanes of an endpoint, in plain words.
//!
//! There is no structured way in 1.13: `ucp_context_print_info` and `ucp_ep_print_info` print for
//! people, and the lines that name transports and lanes are read from that. What cannot be read is
//! left out.

use std::ffi::CStr;

use libc::FILE;

use crate::link::hardware::Reach;

/// What a function of UCX's prints.
pub(super) fn printed(print: impl FnOnce(*mut FILE)) -> String {
    let mut text = std::ptr::null_mut();
    let mut len = 0;
    // SAFETY: both are written when the stream is flushed and closed.
    let stream = unsafe { libc::open_memstream(&raw mut text, &raw mut len) };
    if stream.is_null() {
        return String::new();
    }
    print(stream);
    // SAFETY: open, and nobody else has it.
    unsafe { libc::fclose(stream) };
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the closed stream left a string there, which is freed once, after the copy.
    let printed = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    // SAFETY: as above.
    unsafe { libc::free(text.cast()) };
    printed
}

/// A transport over a device, which a context could use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Resource {
    pub transport: String,
    pub device: String,
}

/// The transports that a print of a context names.
pub(super) fn resources(text: &str) -> Vec<Resource> {
    text.lines().filter_map(resource).collect()
}

/// `#      resource 2  :  md 1  dev 2  flags -- tcp/eth0`
fn resource(line: &str) -> Option<Resource> {
    let rest = line.trim_start_matches(['#', ' ']).strip_prefix("resource ")?;
    let (transport, device) = rest.split_whitespace().last()?.split_once('/')?;
    Some(Resource { transport: transport.to_owned(), device: device.to_owned() })
}

/// One lane: the transport over a device, and what UCX uses it for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lane {
    transport: String,
    uses: Vec<String>,
}

impl Lane {
    /// The transport's name, without the device.
    fn name(&self) -> &str {
        self.transport.split_once('/').map_or(&self.transport, |(name, _)| name)
    }
}

/// The lanes that a print of an endpoint names.
pub(super) fn parse(text: &str) -> Vec<Lane> {
    text.lines().filter_map(lane).collect()
}

/// `#   lane[0]:  4:posix/memory.0 md[1]  -> md[1]/posix/sysdev[255]  am am_bw#0`
fn lane(line: &str) -> Option<Lane> {
    let (_, rest) = line.split_once("lane[")?.1.split_once("]:")?;
    let mut words = rest.split_whitespace();
    let transport = words.next()?;
    let transport = transport.split_once(':').map_or(transport, |(_, name)| name).to_owned();
    if !transport.contains('/') {
        return None;
    }
    let uses = words.filter_map(use_of).map(str::to_owned).collect();
    Some(Lane { transport, uses })
}

fn use_of(word: &str) -> Option<&'static str> {
    let name = word.split_once('#').map_or(word, |(name, _)| name);
    Some(match name {
        "am" => "messages",
        "am_bw" => "bulk messages",
        "rma" => "put and get",
        "rma_bw" => "bulk data",
        "rkey_ptr" => "mapped memory",
        "amo" => "atomics",
        "keepalive" => "liveness",
        _ => return None,
    })
}

/// The lanes that carry messages.
fn carriers(lanes: &[Lane]) -> impl Iterator<Item = &Lane> {
    lanes.iter().filter(|lane| lane.uses.iter().any(|used| used.ends_with("messages")))
}

/// UCX's transports through memory of this host in which senders write into one ring of the receiver's.
const RINGS: [&str; 3] = ["posix", "sysv", "xpmem"];

/// Whether every lane that carries messages is memory of this host.
pub(super) fn shares_memory(lanes: &[Lane]) -> bool {
    let mut carriers = carriers(lanes);
    let first = carriers.next();
    let shares = |lane: &Lane| RINGS.contains(&lane.name()) || lane.name() == "self";
    first.is_some_and(shares) && carriers.all(shares)
}

/// Those of the lanes' transports in which senders write into one ring of the receiver's.
pub(super) fn rings(lanes: &[Lane]) -> impl Iterator<Item = &'static str> {
    RINGS.into_iter().filter(|name| lanes.iter().any(|lane| lane.name() == *name))
}

/// Whether a lane that carries messages lies on this hardware.
pub(super) fn reach(lanes: &[Lane], hardware: &Reach) -> bool {
    let over = |lane: &Lane| {
        let (transport, device) = lane.transport.split_once('/')?;
        Some(hardware.has(transport, device))
    };
    carriers(lanes).any(|lane| over(lane) == Some(true))
}

/// `posix/memory (messages), cma/memory (bulk data)`.
pub(super) fn in_words(lanes: &[Lane]) -> String {
    if lanes.is_empty() {
        return "lanes unknown".into();
    }
    let one = |lane: &Lane| match lane.uses.is_empty() {
        true => lane.transport.clone(),
        false => format!("{} ({})", lane.transport, lane.uses.join(", ")),
    };
    lanes.iter().map(one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRINTED: &str = "\
#
# UCP endpoint 
#
#               peer: <no debug data>
#                 lane[0]:  4:posix/memory.0 md[1]   -> md[1]/posix/sysdev[255]  am am_bw#0
#                 lane[1]:  6:cma/memory.0 md[4]     -> md[4]/cma/sysdev[255]    rma_bw#0
#
#                tag_send: 0..<egr/short>..92..<egr/bcopy>..8318..<rndv>..(inf)
";

    #[test]
    fn lanes_are_read() {
        let lanes = parse(PRINTED);
        assert_eq!(
            in_words(&lanes),
            "posix/memory.0 (messages, bulk messages), cma/memory.0 (bulk data)"
        );
    }

    #[test]
    fn transports_of_a_context_are_read() {
        // As 1.13 and 1.22 print them.
        let printed = "\
# UCP context
#     component 1  :  tcp
#            md 1  :  component 1  tcp 
#      resource 0  :  md 0  dev 0  flags -- self/memory0
#      resource 1  :  md 1  dev 1  flags -- tcp/eth0
#      resource 5  :  md 4  dev 4  flags -- rc_mlx5/mlx5_0:1
#      resource 6  :  
#      resource
# memory: 1.47MB, file descriptors: 5
";
        let found = resources(printed);
        let names: Vec<_> =
            found.iter().map(|one| (one.transport.as_str(), one.device.as_str())).collect();
        assert_eq!(names, [("self", "memory0"), ("tcp", "eth0"), ("rc_mlx5", "mlx5_0:1")]);
    }

    #[test]
    fn a_lane_over_hardware_carries_messages_or_does_not_count() {
        use crate::link::hardware::{Hardware, Nature, RdmaDevice};
        let device = RdmaDevice { name: "mlx5_0".into(), nature: Nature::Adapter, up: true };
        let hardware = Reach::all(&Hardware { rdma: vec![device], ..Hardware::default() });
        let line = |device: &str, uses: &str| {
            parse(&format!(
                "# lane[0]:  5:rc_mlx5/{device}:1.0 md[4] -> md[4]/ib/sysdev[0] {uses}\n"
            ))
        };
        assert!(reach(&line("mlx5_0", "am am_bw#0"), &hardware));
        assert!(reach(&[parse(PRINTED), line("mlx5_0", "am_bw#1")].concat(), &hardware));
        assert!(!reach(&line("mlx5_0", "rma_bw#0 keepalive"), &hardware));
        assert!(!reach(&line("rxe0", "am am_bw#0"), &hardware));
        assert!(!reach(&parse(PRINTED), &hardware));
        assert!(!reach(&[], &hardware));
    }

    #[test]
    fn lanes_of_one_host_are_told_from_others() {
        let lane = "lane[2]: 1:tcp/lo.0 md[1] -> md[1]/tcp/sysdev[255]";
        assert!(shares_memory(&parse(PRINTED)));
        assert!(shares_memory(&parse(&format!("{PRINTED}{lane} keepalive\n"))));
        assert!(!shares_memory(&parse(&format!("{PRINTED}{lane} am_bw#1\n"))));
        assert!(!shares_memory(&parse("")));
        assert_eq!(rings(&parse(PRINTED)).collect::<Vec<_>>(), ["posix"]);
        assert_eq!(rings(&parse(&format!("# {lane} am\n"))).count(), 0);
    }

    #[test]
    fn anything_else_is_left_out() {
        assert!(
            parse("lane[]: \nlane[x\nlane[0]:\nlane[1]: word more\n\u{fffd}lane[2]:  ").is_empty()
        );
        assert_eq!(in_words(&[]), "lanes unknown");
    }
}
