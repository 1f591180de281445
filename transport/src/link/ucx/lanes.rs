//! What UCX says about the lanes of an endpoint, in plain words.
//!
//! There is no structured way in 1.13: `ucp_ep_print_info` prints for people, and the lines that
//! name lanes are read from that. What cannot be read is left out.

/// One lane: the transport over a device, and what UCX uses it for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lane {
    transport: String,
    uses: Vec<String>,
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

/// Whether every lane that carries messages is memory of this host.
pub(super) fn shares_memory(lanes: &[Lane]) -> bool {
    let mut carriers =
        lanes.iter().filter(|lane| lane.uses.iter().any(|used| used.ends_with("messages")));
    let first = carriers.next();
    let shares = |lane: &Lane| {
        ["posix/", "sysv/", "xpmem/", "self/"].iter().any(|name| lane.transport.starts_with(name))
    };
    first.is_some_and(shares) && carriers.all(shares)
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
    fn lanes_of_one_host_are_told_from_others() {
        let lane = "lane[2]: 1:tcp/lo.0 md[1] -> md[1]/tcp/sysdev[255]";
        assert!(shares_memory(&parse(PRINTED)));
        assert!(shares_memory(&parse(&format!("{PRINTED}{lane} keepalive\n"))));
        assert!(!shares_memory(&parse(&format!("{PRINTED}{lane} am_bw#1\n"))));
        assert!(!shares_memory(&parse("")));
    }

    #[test]
    fn anything_else_is_left_out() {
        assert!(
            parse("lane[]: \nlane[x\nlane[0]:\nlane[1]: word more\n\u{fffd}lane[2]:  ").is_empty()
        );
        assert_eq!(in_words(&[]), "lanes unknown");
    }
}
