//! Where a device lies in this host, and how fast its port is.

use std::fs::read_to_string;
use std::ops::RangeInclusive;

/// The distance of what is as near as can be, as firmware numbers them.
pub(super) const NEAREST: u8 = 10;

/// How far a device is from the processors that this process may use; [`NEAREST`] where nothing is
/// known of it.
pub(super) fn distance(device: &str) -> u8 {
    distance_of(device).unwrap_or(NEAREST)
}

fn distance_of(device: &str) -> Option<u8> {
    let node = read_to_string(format!("/sys/class/infiniband/{device}/device/numa_node")).ok()?;
    let node: usize = node.trim().parse().ok()?;
    let nodes = "/sys/devices/system/node";
    let status = read_to_string("/proc/self/status").ok()?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let online = read_to_string(format!("{nodes}/online")).ok()?;
    let own = ranges(&online).into_iter().flatten().filter(|node| {
        let list = read_to_string(format!("{nodes}/node{node}/cpulist"));
        list.is_ok_and(|list| overlap(&ranges(&list), &ranges(allowed)))
    });
    let distances = read_to_string(format!("{nodes}/node{node}/distance")).ok()?;
    nearest(&distances, own)
}

/// A list as the kernel writes them: `0-3,8`.
fn ranges(list: &str) -> Vec<RangeInclusive<usize>> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    list.trim().split(',').filter_map(range).collect()
}

fn overlap(one: &[RangeInclusive<usize>], other: &[RangeInclusive<usize>]) -> bool {
    one.iter().any(|a| other.iter().any(|b| a.start() <= b.end() && b.start() <= a.end()))
}

/// Of a node's distances to all nodes, in order, the shortest to one of these.
fn nearest(distances: &str, nodes: impl Iterator<Item = usize>) -> Option<u8> {
    let distances: Vec<u8> = distances.split_whitespace().flat_map(str::parse).collect();
    nodes.filter_map(|node| distances.get(node).copied()).min()
}

/// What a port moves, in units of 100 Mb/s, from what verbs say of it; 0: not known.
pub(super) fn rate(speed: u8, width: u8) -> u16 {
    let lanes = match width {
        1 => 1,
        2 => 4,
        4 => 8,
        8 => 12,
        16 => 2,
        _ => return 0,
    };
    let lane = match speed {
        1 => 25,
        2 => 50,
        4 | 8 => 100,
        16 => 140,
        32 => 250,
        64 => 500,
        128 => 1000,
        _ => return 0,
    };
    lanes * lane
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_the_kernel() {
        assert_eq!(ranges("0-3,8\n"), [0..=3, 8..=8]);
        assert_eq!(ranges("\n"), []);
        assert_eq!(ranges("x,2-y"), []);
        assert!(overlap(&ranges("0-3,8"), &ranges("4-8")));
        assert!(!overlap(&ranges("0-3"), &ranges("4-7,12")));
    }

    #[test]
    fn the_nearest_of_the_nodes_counts() {
        assert_eq!(nearest("10 21 31\n", [1, 2].into_iter()), Some(21));
        assert_eq!(nearest("10 21\n", [7].into_iter()), None);
        assert_eq!(nearest("", [0].into_iter()), None);
        assert_eq!(distance("no such device"), NEAREST);
    }

    #[test]
    fn rates_of_ports() {
        for (speed, width, expected) in [(1, 1, 25), (32, 2, 1000), (128, 2, 4000), (4, 1, 100)] {
            assert_eq!(rate(speed, width), expected);
        }
        assert_eq!((rate(0, 2), rate(3, 2), rate(1, 0)), (0, 0, 0));
    }
}
