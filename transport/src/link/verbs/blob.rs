//! What a node tells its peers about its ports, the choice of a pair of ports, and what both sides
//! tell each other about the queue pairs of one link.

use std::cmp::Reverse;
use std::net::{IpAddr, Ipv6Addr};

use super::messenger::RESERVE;
use super::queues::Lane;
use super::wire::CHUNKS_LEAVE;

/// The form of the blob and of what follows from it.
const FORM: u8 = 3;
/// Ports that a node offers.
pub(super) const PORTS_MAX: usize = 16;
const PORT_BYTES: usize = 24;
const TERMS_BYTES: usize = 28;
/// Buffers without which a link could send no chunks.
pub(super) const RECEIVES_MIN: u16 = CHUNKS_LEAVE + RESERVE + 1;

/// How packets find a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fabric {
    /// InfiniBand: by LID within a subnet.
    InfiniBand,
    /// RoCE v1: by GID, within an Ethernet segment.
    RoceV1,
    /// RoCE v2: by the IP address that the GID stands for.
    RoceV2,
}

const FABRICS: [Fabric; 3] = [Fabric::InfiniBand, Fabric::RoceV1, Fabric::RoceV2];

/// One way to one port: a port with several GIDs is listed as often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Port {
    pub fabric: Fabric,
    /// The largest packet, as verbs number them (1: 256 bytes … 5: 4096 bytes).
    pub mtu: u8,
    pub lid: u16,
    pub gid: [u8; 16],
    /// In units of 100 Mb/s; 0: not known.
    pub rate: u16,
    /// How far its device is from this process, as firmware numbers distances (10: at hand).
    pub distance: u8,
}

impl Port {
    /// The IP address that a RoCE v2 GID stands for.
    pub fn ip(&self) -> Option<IpAddr> {
        let v6 = Ipv6Addr::from(self.gid);
        (self.fabric == Fabric::RoceV2)
            .then(|| v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4))
    }

    /// What takes the place of one whose device was taken away: it reaches nobody.
    pub fn gone(&self) -> Port {
        Port { gid: [0; 16], ..*self }
    }

    pub fn is_gone(&self) -> bool {
        self.gid == [0; 16]
    }

    fn encode(&self, to: &mut Vec<u8>) {
        to.push(self.fabric as u8);
        to.push(self.mtu);
        to.extend_from_slice(&self.lid.to_le_bytes());
        to.extend_from_slice(&self.gid);
        to.extend_from_slice(&self.rate.to_le_bytes());
        to.extend_from_slice(&[self.distance, 0]);
    }

    fn decode(bytes: &[u8]) -> Option<Port> {
        let bytes: &[u8; PORT_BYTES] = bytes.try_into().ok()?;
        let gid = bytes[4..20].try_into().ok()?;
        let rate = u16::from_le_bytes([bytes[20], bytes[21]]);
        let fabric = *FABRICS.get(usize::from(bytes[0]))?;
        let mtu = Some(bytes[1]).filter(|mtu| (1..=5).contains(mtu))?;
        let lid = u16::from_le_bytes([bytes[2], bytes[3]]);
        (bytes[23] == 0).then_some(Port { fabric, mtu, lid, gid, rate, distance: bytes[22] })
    }
}

pub(super) fn encode(ports: &[Port]) -> Vec<u8> {
    let mut bytes = vec![FORM];
    ports.iter().take(PORTS_MAX).for_each(|port| port.encode(&mut bytes));
    bytes
}

/// `None`: malformed, or of another form.
pub(super) fn decode(bytes: &[u8]) -> Option<Vec<Port>> {
    let (&form, ports) = bytes.split_first()?;
    let count = ports.len() / PORT_BYTES;
    if form != FORM || ports.len() % PORT_BYTES != 0 || count > PORTS_MAX {
        return None;
    }
    ports.chunks_exact(PORT_BYTES).map(Port::decode).collect()
}

/// How well two ports suit each other: what comes first decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Score {
    /// How sure it is that one reaches the other.
    reach: Reach,
    /// The lower one of two rates, in units of 100 Mb/s.
    rate: u16,
    mtu: u8,
    /// Of both devices from their processes.
    distance: Reverse<u16>,
    /// Bytes that the addresses begin with in common.
    same: u32,
}

/// How one port reaches another, the surest way last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reach {
    LinkLocal,
    Segment,
    RoutedV6,
    RoutedV4,
    NetworkV6,
    NetworkV4,
    Subnet,
}

impl Reach {
    fn describe(self) -> &'static str {
        match self {
            Reach::LinkLocal => "link-local addresses",
            Reach::Segment => "perhaps one Ethernet segment",
            Reach::RoutedV6 | Reach::RoutedV4 => "across networks",
            Reach::NetworkV6 | Reach::NetworkV4 => "in one network",
            Reach::Subnet => "in one subnet",
        }
    }
}

/// `None`: one does not reach the other.
fn reach(one: &Port, other: &Port, same: u32) -> Option<Reach> {
    if one.fabric != other.fabric || one.is_gone() || other.is_gone() {
        return None;
    }
    match one.fabric {
        // Subnets are told apart by the first half of their GIDs; between them there are routers.
        Fabric::InfiniBand => (same >= 8).then_some(Reach::Subnet),
        Fabric::RoceV1 => Some(Reach::Segment),
        Fabric::RoceV2 => match (one.ip()?, other.ip()?) {
            (IpAddr::V4(_), IpAddr::V4(_)) if same >= 15 => Some(Reach::NetworkV4),
            (IpAddr::V4(_), IpAddr::V4(_)) => Some(Reach::RoutedV4),
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                match (a.is_unicast_link_local(), b.is_unicast_link_local()) {
                    (false, false) if same >= 8 => Some(Reach::NetworkV6),
                    (false, false) => Some(Reach::RoutedV6),
                    (true, true) => Some(Reach::LinkLocal),
                    _ => None,
                }
            }
            _ => None,
        },
    }
}

fn score(one: &Port, other: &Port) -> Option<Score> {
    let same = one.gid.iter().zip(&other.gid).take_while(|(a, b)| a == b).count() as u32;
    Some(Score {
        reach: reach(one, other, same)?,
        rate: one.rate.min(other.rate),
        mtu: one.mtu.min(other.mtu),
        distance: Reverse(u16::from(one.distance) + u16::from(other.distance)),
        same,
    })
}

/// In words, what spoke for a pair of ports.
pub(super) fn reason(own: &Port, other: &Port) -> String {
    let Some(Score { reach, rate, mtu, .. }) = score(own, other) else { return String::new() };
    let mut text = reach.describe().to_owned();
    if rate > 0 {
        text.push_str(&format!(", {} Gb/s", f32::from(rate) / 10.0));
    }
    let Port { distance, .. } = own;
    text.push_str(&format!(", packets of {} B, NUMA distance {distance}", 128u32 << mtu));
    text
}

/// The pair of ports that suits best: places in the connecting side's list and in the other's. Both
/// sides come to the same answer.
pub(super) fn choose(connector: &[Port], acceptor: &[Port]) -> Option<(usize, usize)> {
    let mut best = None;
    for (i, one) in connector.iter().enumerate() {
        for (j, other) in acceptor.iter().enumerate() {
            let score = score(one, other);
            if score.is_some() && best.is_none_or(|(known, _)| score > known) {
                best = Some((score, (i, j)));
            }
        }
    }
    best.map(|(_, pair)| pair)
}

/// Whether two nodes may try.
pub(super) fn verdict(own: &[Port], theirs: &[u8]) -> Result<(), (String, Option<String>)> {
    let Some(theirs) = decode(theirs) else {
        return Err(("the peer's offer is malformed".into(), None));
    };
    match choose(own, &theirs) {
        Some(_) => Ok(()),
        None => Err((
            "no port of this side reaches one of the peer's (other kinds of fabric or subnets)"
                .into(),
            Some("thalweg-info lists the ports on each side".into()),
        )),
    }
}

/// What one side tells the other about the queue pairs of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Terms {
    /// Which pair of ports it believes in.
    pub ports: (u8, u8),
    /// Its queue pairs, in the order of [`Lane`].
    pub queue_pairs: [u32; Lane::COUNT],
    /// The number of the first packet of each.
    pub first_packet: u32,
    /// Messages that it has receive buffers for.
    pub receives: u16,
    /// Reads of the peer's that it answers at once.
    pub reads: u8,
}

impl Terms {
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![FORM, self.ports.0, self.ports.1, self.reads];
        for number in self.queue_pairs.into_iter().chain([self.first_packet]) {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&u32::from(self.receives).to_le_bytes());
        bytes
    }

    /// `None`: malformed.
    pub fn decode(bytes: &[u8]) -> Option<Terms> {
        let bytes: &[u8; TERMS_BYTES] = bytes.try_into().ok()?;
        let word = |at: usize| bytes[at..at + 4].try_into().map(u32::from_le_bytes).ok();
        let small = |at: usize| word(at).filter(|number| *number < 1 << 24);
        let receives = u16::try_from(word(24)?).ok()?;
        if bytes[0] != FORM || receives < RECEIVES_MIN || bytes[3] == 0 {
            return None;
        }
        Some(Terms {
            ports: (bytes[1], bytes[2]),
            queue_pairs: [small(4)?, small(8)?, small(12)?, small(16)?],
            first_packet: small(20)?,
            receives,
            reads: bytes[3],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v4(last: [u8; 4]) -> Port {
        let gid = std::net::Ipv4Addr::from(last).to_ipv6_mapped().octets();
        Port { fabric: Fabric::RoceV2, mtu: 5, lid: 0, gid, rate: 1000, distance: 10 }
    }

    fn ib(subnet: u8, lid: u16) -> Port {
        let mut gid = [0; 16];
        (gid[0], gid[7], gid[15]) = (0xfe, subnet, lid as u8);
        Port { fabric: Fabric::InfiniBand, mtu: 5, lid, gid, rate: 2000, distance: 10 }
    }

    #[test]
    fn the_same_network_is_preferred() {
        let own = [v4([10, 0, 0, 1]), v4([10, 78, 0, 1])];
        let theirs = [v4([10, 78, 0, 2]), v4([172, 16, 0, 1])];
        assert_eq!(choose(&own, &theirs), Some((1, 0)));
        assert_eq!(choose(&theirs, &own), Some((0, 1)), "both sides agree");
    }

    #[test]
    fn subnets_of_infiniband_are_apart() {
        assert_eq!(choose(&[ib(1, 3)], &[ib(1, 4)]), Some((0, 0)));
        assert_eq!(choose(&[ib(1, 3)], &[ib(2, 4)]), None);
        assert_eq!(choose(&[ib(1, 3)], &[v4([10, 0, 0, 1])]), None);
        assert!(verdict(&[ib(1, 3)], &encode(&[ib(2, 4)])).is_err());
        assert_eq!(verdict(&[ib(1, 3)], &encode(&[ib(1, 4)])), Ok(()));
    }

    #[test]
    fn what_decides_between_ports_comes_in_its_order() {
        let theirs = [v4([10, 0, 0, 9])];
        let plain = v4([10, 0, 0, 1]);
        let (slow, small) = (Port { rate: 100, ..plain }, Port { mtu: 3, ..plain });
        let (far, elsewhere) = (Port { distance: 21, ..plain }, v4([10, 0, 1, 1]));
        // The second one of each pair is better.
        let table: [(&str, Port, Port); 7] = [
            ("reach before rate", Port { rate: 4000, ..elsewhere }, slow),
            ("rate before the size of packets", Port { mtu: 5, ..slow }, small),
            ("the size of packets before distance", small, far),
            ("rate", slow, plain),
            ("the size of packets", small, plain),
            ("distance", far, plain),
            ("reach", elsewhere, plain),
        ];
        for (what, worse, better) in table {
            for (own, best) in [([worse, better], 1), ([better, worse], 0)] {
                assert_eq!(choose(&own, &theirs), Some((best, 0)), "{what}");
                assert_eq!(choose(&theirs, &own), Some((0, best)), "{what}, seen from the peer");
            }
        }
        assert_eq!(choose(&[plain, plain], &theirs), Some((0, 0)), "the first of equals");
        let said = reason(&far, &theirs[0]);
        assert_eq!(said, "in one network, 100 Gb/s, packets of 4096 B, NUMA distance 21");
    }

    #[test]
    fn a_port_that_is_gone_keeps_its_place_and_is_not_chosen() {
        let theirs = [v4([10, 0, 0, 9])];
        let mut own = [v4([10, 0, 0, 1]), v4([10, 78, 0, 1])];
        assert_eq!(choose(&own, &theirs), Some((0, 0)));
        own[0] = own[0].gone();
        assert_eq!(choose(&own, &theirs), Some((1, 0)));
        let told = decode(&encode(&own)).expect("well-formed");
        assert_eq!(choose(&theirs, &told), Some((0, 1)), "the peer sees it too");
        own[1] = ib(1, 3).gone();
        assert_eq!(choose(&own, &[own[1]]), None);
    }

    proptest! {
        #[test]
        fn ports_survive_the_wire(
            ports in proptest::collection::vec(
                (0usize..3, 1u8..=5, any::<u16>(), any::<[u8; 16]>(), any::<(u16, u8)>()), 0..=16,
            ),
        ) {
            let ports: Vec<Port> = ports
                .into_iter()
                .map(|(fabric, mtu, lid, gid, (rate, distance))| {
                    Port { fabric: FABRICS[fabric], mtu, lid, gid, rate, distance }
                })
                .collect();
            prop_assert_eq!(decode(&encode(&ports)), Some(ports.clone()));
            if let Some((i, j)) = choose(&ports, &ports) {
                prop_assert!(score(&ports[i], &ports[j]).is_some());
                prop_assert!(!reason(&ports[i], &ports[j]).is_empty());
            }
        }

        #[test]
        fn any_bytes_are_judged_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some(ports) = decode(&bytes) {
                prop_assert_eq!(encode(&ports), bytes.clone());
            }
            let _ = verdict(&[v4([10, 0, 0, 1])], &bytes);
            if let Some(terms) = Terms::decode(&bytes) {
                prop_assert_eq!(terms.encode(), bytes);
            }
        }

        #[test]
        fn too_few_buffers_are_refused(receives in 0..RECEIVES_MIN) {
            let (ports, queue_pairs) = ((0, 0), [1, 2, 3, 4]);
            let terms = Terms { ports, queue_pairs, first_packet: 0, receives, reads: 1 };
            prop_assert_eq!(Terms::decode(&terms.encode()), None);
        }

        #[test]
        fn terms_survive_the_wire(
            ports: (u8, u8), queue_pairs in prop::array::uniform4(0u32..1 << 24),
            first_packet in 0u32..1 << 24, receives in RECEIVES_MIN.., reads in 1u8..,
        ) {
            let terms = Terms { ports, queue_pairs, first_packet, receives, reads };
            prop_assert_eq!(Terms::decode(&terms.encode()), Some(terms));
        }
    }
}
