//! What a node tells its peers about its ports, the choice of pairs of ports, and what both sides
//! tell each other about the queue pairs of one link.

use std::cmp::Reverse;
use std::net::{IpAddr, Ipv6Addr};
use std::ops::Range;

use super::buffers::{RECEIVES, RECEIVES_FIRST};
use super::queues::Lane;

/// The form of the blob and of what follows from it.
const FORM: u8 = 6;
/// Addresses of ports that a node offers.
pub(super) const PORTS_MAX: usize = 32;
/// Pairs of ports that one link may use.
pub(crate) const RAILS_MAX: usize = 4;
const PORT_BYTES: usize = 24;
/// Those of the first pair of ports; what is said of each further one follows.
const TERMS_BYTES: usize = 28;
const RAIL_BYTES: usize = 20;
/// Buffers for receiving that a link begins with, and as many as it has at most.
const RECEIVES_ALLOWED: Range<u16> = RECEIVES_FIRST as u16..RECEIVES as u16 + 1;

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
    /// Which of its node's ports it is an address of.
    pub whose: u8,
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
        to.extend_from_slice(&[self.distance, self.whose]);
    }

    fn decode(bytes: &[u8]) -> Option<Port> {
        let bytes: &[u8; PORT_BYTES] = bytes.try_into().ok()?;
        let gid = bytes[4..20].try_into().ok()?;
        let rate = u16::from_le_bytes([bytes[20], bytes[21]]);
        let fabric = *FABRICS.get(usize::from(bytes[0]))?;
        let mtu = Some(bytes[1]).filter(|mtu| (1..=5).contains(mtu))?;
        let lid = u16::from_le_bytes([bytes[2], bytes[3]]);
        let (distance, whose) = (bytes[22], bytes[23]);
        Some(Port { fabric, mtu, lid, gid, rate, distance, whose })
    }
}

/// What a node offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    /// How many pairs of ports a link may use.
    pub rails: u8,
    pub ports: Vec<Port>,
}

impl Offer {
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![FORM, self.rails];
        self.ports.iter().take(PORTS_MAX).for_each(|port| port.encode(&mut bytes));
        bytes
    }

    /// `None`: malformed, or of another form.
    pub fn decode(bytes: &[u8]) -> Option<Offer> {
        let (&[form, rails], ports) = bytes.split_first_chunk()?;
        let count = ports.len() / PORT_BYTES;
        if form != FORM || rails == 0 || ports.len() % PORT_BYTES != 0 || count > PORTS_MAX {
            return None;
        }
        let ports = ports.chunks_exact(PORT_BYTES).map(Port::decode).collect::<Option<_>>()?;
        Some(Offer { rails, ports })
    }
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

impl Score {
    /// Whether such a pair can help one with this score: it is reached as surely, or lies in one
    /// network, and is not so slow that others would wait for it.
    fn helps(&self, first: &Score) -> bool {
        let surely = self.reach >= first.reach.min(Reach::NetworkV6);
        surely && u32::from(self.rate) * 2 >= u32::from(first.rate)
    }
}

/// The pairs of ports that a link uses, the one that suits best first: places in the connecting
/// side's list and in the other's. No port is in two of them. Both sides come to the same answer.
pub(super) fn choose(connector: &Offer, acceptor: &Offer) -> Vec<(usize, usize)> {
    let mut chosen: Vec<(usize, usize)> = Vec::new();
    let mut first: Option<Score> = None;
    let limit = RAILS_MAX.min(connector.rails.min(acceptor.rails).into());
    while chosen.len() < limit {
        let mut best: Option<(Score, (usize, usize))> = None;
        for (i, one) in connector.ports.iter().enumerate() {
            for (j, other) in acceptor.ports.iter().enumerate() {
                let taken = |&(a, b): &(usize, usize)| {
                    connector.ports[a].whose == one.whose || acceptor.ports[b].whose == other.whose
                };
                let Some(score) = score(one, other) else { continue };
                let helps = first.is_none_or(|first| score.helps(&first));
                if helps && best.is_none_or(|(known, _)| score > known) && !chosen.iter().any(taken)
                {
                    best = Some((score, (i, j)));
                }
            }
        }
        let Some((score, pair)) = best else { break };
        first.get_or_insert(score);
        chosen.push(pair);
    }
    chosen
}

/// Whether two nodes may try.
pub(super) fn verdict(own: &Offer, theirs: &[u8]) -> Result<(), (String, Option<String>)> {
    let Some(theirs) = Offer::decode(theirs) else {
        return Err(("the peer's offer is malformed".into(), None));
    };
    match choose(own, &theirs).first() {
        Some(_) => Ok(()),
        None => Err((
            "no port of this side reaches one of the peer's (other kinds of fabric or subnets)"
                .into(),
            Some("thalweg-info lists the ports on each side".into()),
        )),
    }
}

/// What one side tells the other about a further pair of ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RailTerms {
    pub ports: (u8, u8),
    /// Its queue pair.
    pub queue_pair: u32,
    /// Reads of the peer's that it answers at once.
    pub reads: u8,
    /// What the peer may read to try it: where it lies, and its key.
    pub sample: (u64, u32),
}

impl RailTerms {
    fn encode(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(&[self.ports.0, self.ports.1, self.reads, 0]);
        to.extend_from_slice(&self.queue_pair.to_le_bytes());
        to.extend_from_slice(&self.sample.0.to_le_bytes());
        to.extend_from_slice(&self.sample.1.to_le_bytes());
    }

    fn decode(bytes: &[u8]) -> Option<RailTerms> {
        let (&[connector, acceptor, reads, zero], rest) = bytes.split_first_chunk()?;
        let (queue_pair, rest) = rest.split_first_chunk()?;
        let (address, key) = rest.split_first_chunk()?;
        let sample = (u64::from_le_bytes(*address), u32::from_le_bytes(key.try_into().ok()?));
        let queue_pair = u32::from_le_bytes(*queue_pair);
        (reads > 0 && zero == 0 && queue_pair < 1 << 24).then_some(RailTerms {
            ports: (connector, acceptor),
            queue_pair,
            reads,
            sample,
        })
    }
}

/// What one side tells the other about the queue pairs of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Terms {
    /// Which pair of ports it believes in, the first of the link's.
    pub ports: (u8, u8),
    /// Its queue pairs, in the order of [`Lane`].
    pub queue_pairs: [u32; Lane::COUNT],
    /// The number of the first packet of each.
    pub first_packet: u32,
    /// Messages that it has receive buffers for, to begin with.
    pub receives: u16,
    /// Reads of the peer's that it answers at once.
    pub reads: u8,
    /// How long further pairs of ports may be tried, in milliseconds. What is less on both sides
    /// counts.
    pub trial_ms: u16,
    /// Further pairs of ports.
    pub rails: Vec<RailTerms>,
}

impl Terms {
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![FORM, self.ports.0, self.ports.1, self.reads];
        for number in self.queue_pairs.into_iter().chain([self.first_packet]) {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&self.receives.to_le_bytes());
        bytes.extend_from_slice(&self.trial_ms.to_le_bytes());
        self.rails.iter().for_each(|rail| rail.encode(&mut bytes));
        bytes
    }

    /// `None`: malformed.
    pub fn decode(bytes: &[u8]) -> Option<Terms> {
        let (bytes, rails) = bytes.split_first_chunk::<TERMS_BYTES>()?;
        let word = |at: usize| bytes[at..at + 4].try_into().map(u32::from_le_bytes).ok();
        let small = |at: usize| word(at).filter(|number| *number < 1 << 24);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let (receives, trial_ms) = (half(24), half(26));
        let count = rails.len() / RAIL_BYTES;
        if bytes[0] != FORM || !RECEIVES_ALLOWED.contains(&receives) || bytes[3] == 0 {
            return None;
        }
        if rails.len() % RAIL_BYTES != 0 || count >= RAILS_MAX {
            return None;
        }
        let ports = (bytes[1], bytes[2]);
        let rails =
            rails.chunks_exact(RAIL_BYTES).map(RailTerms::decode).collect::<Option<Vec<_>>>()?;
        let pairs: Vec<_> =
            std::iter::once(ports).chain(rails.iter().map(|rail| rail.ports)).collect();
        let twice = |(at, pair): (usize, &(u8, u8))| {
            pairs[..at].iter().any(|known| known.0 == pair.0 || known.1 == pair.1)
        };
        if pairs.iter().enumerate().any(twice) {
            return None;
        }
        Some(Terms {
            ports,
            queue_pairs: [small(4)?, small(8)?, small(12)?, small(16)?],
            first_packet: small(20)?,
            receives,
            reads: bytes[3],
            trial_ms,
            rails,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v4(last: [u8; 4]) -> Port {
        let gid = std::net::Ipv4Addr::from(last).to_ipv6_mapped().octets();
        Port {
            fabric: Fabric::RoceV2,
            mtu: 5,
            lid: 0,
            gid,
            rate: 1000,
            distance: 10,
            whose: last[2],
        }
    }

    fn ib(subnet: u8, lid: u16) -> Port {
        let mut gid = [0; 16];
        (gid[0], gid[7], gid[15]) = (0xfe, subnet, lid as u8);
        Port {
            fabric: Fabric::InfiniBand,
            mtu: 5,
            lid,
            gid,
            rate: 2000,
            distance: 10,
            whose: lid as u8,
        }
    }

    fn offer(ports: &[Port]) -> Offer {
        Offer { rails: RAILS_MAX as u8, ports: ports.to_vec() }
    }

    fn first(connector: &[Port], acceptor: &[Port]) -> Option<(usize, usize)> {
        choose(&offer(connector), &offer(acceptor)).first().copied()
    }

    #[test]
    fn the_same_network_is_preferred() {
        let own = [v4([10, 0, 0, 1]), v4([10, 78, 0, 1])];
        let theirs = [v4([10, 78, 0, 2]), v4([172, 16, 0, 1])];
        assert_eq!(first(&own, &theirs), Some((1, 0)));
        assert_eq!(first(&theirs, &own), Some((0, 1)), "both sides agree");
    }

    #[test]
    fn subnets_of_infiniband_are_apart() {
        assert_eq!(first(&[ib(1, 3)], &[ib(1, 4)]), Some((0, 0)));
        assert_eq!(first(&[ib(1, 3)], &[ib(2, 4)]), None);
        assert_eq!(first(&[ib(1, 3)], &[v4([10, 0, 0, 1])]), None);
        assert!(verdict(&offer(&[ib(1, 3)]), &offer(&[ib(2, 4)]).encode()).is_err());
        assert_eq!(verdict(&offer(&[ib(1, 3)]), &offer(&[ib(1, 4)]).encode()), Ok(()));
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
                assert_eq!(first(&own, &theirs), Some((best, 0)), "{what}");
                assert_eq!(first(&theirs, &own), Some((0, best)), "{what}, seen from the peer");
            }
        }
        assert_eq!(first(&[plain, plain], &theirs), Some((0, 0)), "the first of equals");
        let said = reason(&far, &theirs[0]);
        assert_eq!(said, "in one network, 100 Gb/s, packets of 4096 B, NUMA distance 21");
    }

    #[test]
    fn a_port_that_is_gone_keeps_its_place_and_is_not_chosen() {
        let theirs = [v4([10, 0, 0, 9])];
        let mut own = [v4([10, 0, 0, 1]), v4([10, 78, 0, 1])];
        assert_eq!(first(&own, &theirs), Some((0, 0)));
        own[0] = own[0].gone();
        assert_eq!(first(&own, &theirs), Some((1, 0)));
        let told = Offer::decode(&offer(&own).encode()).expect("well-formed").ports;
        assert_eq!(first(&theirs, &told), Some((0, 1)), "the peer sees it too");
        own[1] = ib(1, 3).gone();
        assert_eq!(first(&own, &[own[1]]), None);
    }

    proptest! {
        #[test]
        fn ports_survive_the_wire(
            ports in proptest::collection::vec(
                (0usize..3, 1u8..=5, any::<u16>(), any::<[u8; 16]>(), any::<(u16, u8, u8)>()),
                0..=PORTS_MAX,
            ),
            rails in 1u8..,
        ) {
            let ports: Vec<Port> = ports
                .into_iter()
                .map(|(fabric, mtu, lid, gid, (rate, distance, whose))| {
                    Port { fabric: FABRICS[fabric], mtu, lid, gid, rate, distance, whose }
                })
                .collect();
            let offer = Offer { rails, ports };
            prop_assert_eq!(Offer::decode(&offer.encode()), Some(offer.clone()));
            let chosen = choose(&offer, &offer);
            prop_assert!(chosen.len() <= RAILS_MAX.min(rails.into()));
            let ports = &offer.ports;
            for (at, &(i, j)) in chosen.iter().enumerate() {
                prop_assert!(score(&ports[i], &ports[j]).is_some());
                prop_assert!(!reason(&ports[i], &ports[j]).is_empty());
                for &(a, b) in &chosen[..at] {
                    prop_assert_ne!(ports[a].whose, ports[i].whose);
                    prop_assert_ne!(ports[b].whose, ports[j].whose);
                }
            }
        }

        #[test]
        fn any_bytes_are_judged_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some(offer) = Offer::decode(&bytes) {
                prop_assert_eq!(offer.encode(), bytes.clone());
            }
            let _ = verdict(&offer(&[v4([10, 0, 0, 1])]), &bytes);
            if let Some(terms) = Terms::decode(&bytes) {
                prop_assert_eq!(terms.encode(), bytes);
            }
        }

        #[test]
        fn too_few_buffers_or_too_many_are_refused(receives: u16) {
            let decoded = Terms::decode(&Terms { receives, ..terms(0) }.encode());
            prop_assert_eq!(decoded.is_some(), RECEIVES_ALLOWED.contains(&receives));
        }

        #[test]
        fn terms_survive_the_wire(
            queue_pairs in prop::array::uniform4(0u32..1 << 24), first_packet in 0u32..1 << 24,
            receives in RECEIVES_ALLOWED, reads in 1u8.., rails in 0..RAILS_MAX, trial_ms: u16,
        ) {
            let terms =
                Terms { queue_pairs, first_packet, receives, reads, trial_ms, ..terms(rails) };
            prop_assert_eq!(Terms::decode(&terms.encode()), Some(terms));
        }
    }

    fn terms(rails: usize) -> Terms {
        let rail = |at: u8| RailTerms {
            ports: (at, 100 - at),
            queue_pair: (1 << 24) - 1 - u32::from(at),
            reads: at,
            sample: (u64::MAX - u64::from(at), u32::from(at)),
        };
        let (ports, queue_pairs, receives) = ((0, 100), [1, 2, 3, 4], RECEIVES_ALLOWED.start);
        let rails = (1..=rails as u8).map(rail).collect();
        Terms { ports, queue_pairs, first_packet: 0, receives, reads: 1, trial_ms: 7, rails }
    }

    #[test]
    fn terms_that_name_a_port_twice_or_too_many_are_refused() {
        let most = terms(RAILS_MAX - 1);
        assert_eq!(Terms::decode(&most.encode()), Some(most.clone()));
        assert_eq!(Terms::decode(&terms(RAILS_MAX).encode()), None, "too many");
        let change = |at: usize, change: &dyn Fn(&mut RailTerms)| {
            let mut terms = most.clone();
            change(&mut terms.rails[at]);
            Terms::decode(&terms.encode())
        };
        assert_eq!(change(1, &|rail| rail.ports.0 = 1), None, "the first one's again");
        assert_eq!(change(0, &|rail| rail.ports.1 = 100), None, "the link's first again");
        assert_eq!(change(2, &|rail| rail.queue_pair = 1 << 24), None, "no queue pair");
        assert_eq!(change(2, &|rail| rail.reads = 0), None, "answers nothing");
        let whole = most.encode();
        for len in 0..whole.len() {
            let known = Terms::decode(&whole[..len]).map(|terms| terms.rails.len());
            let expected = len.checked_sub(TERMS_BYTES).filter(|more| more % RAIL_BYTES == 0);
            assert_eq!(known, expected.map(|more| more / RAIL_BYTES), "{len} bytes");
        }
        let reserved = (0..RAILS_MAX - 1).map(|at| TERMS_BYTES + at * RAIL_BYTES + 3);
        for at in reserved {
            let mut bytes = whole.clone();
            bytes[at] = 1;
            assert_eq!(Terms::decode(&bytes), None);
        }
    }

    #[test]
    fn further_rails_are_ports_that_nothing_else_uses() {
        let port = |host: u8, net: u8| Port { whose: net, ..v4([10, 0, net, host]) };
        let own = [port(1, 1), port(1, 2), port(1, 3)];
        let theirs = [port(2, 3), port(2, 2), port(2, 9)];
        // The third pair lies in no common network.
        assert_eq!(choose(&offer(&own), &offer(&theirs)), [(1, 1), (2, 0)]);
        assert_eq!(choose(&offer(&theirs), &offer(&own)), [(0, 2), (1, 1)]);
        let one = Offer { rails: 1, ..offer(&own) };
        assert_eq!(choose(&one, &offer(&theirs)).len(), 1);
        assert_eq!(choose(&offer(&theirs), &one).len(), 1, "the lower limit counts");
        // Addresses of one port.
        let again = [own[0], Port { gid: port(9, 1).gid, ..own[0] }, own[1]];
        assert_eq!(choose(&offer(&again), &offer(&again)), [(0, 0), (2, 2)]);
        // On InfiniBand all reach all.
        let hosts = [3, 8].map(|lid| [ib(1, lid), ib(1, lid + 1), ib(2, lid + 2)]);
        let chosen = choose(&offer(&hosts[0]), &offer(&hosts[1]));
        assert_eq!(chosen.len(), 3, "two in one subnet, one in the other: {chosen:?}");
    }

    #[test]
    fn further_rails_are_about_as_fast_and_as_sure() {
        let rails = |change: &dyn Fn(&mut Port)| {
            let mut own = [v4([10, 0, 1, 1]), v4([10, 0, 2, 1])];
            change(&mut own[1]);
            choose(&offer(&own), &offer(&[v4([10, 0, 1, 2]), v4([10, 0, 2, 2])])).len()
        };
        assert_eq!(rails(&|_| {}), 2);
        assert_eq!(rails(&|port| port.rate = 500), 2);
        assert_eq!(rails(&|port| port.rate = 499), 1, "others would wait for it");
        assert_eq!(rails(&|port| port.rate = 0), 1, "not known");
        assert_eq!(rails(&|port| port.gid[14] = 9), 1, "across networks, where another is not");
        let unknown = |net| Port { rate: 0, ..v4([10, 0, net, 1]) };
        let all = offer(&[unknown(1), unknown(2)]);
        assert_eq!(choose(&all, &all).len(), 2, "none is known");
        // Where the first pair is no surer, a routed one will do.
        let far = |net| offer(&[v4([10, net, 1, 1]), v4([10, net, 2, 1])]);
        assert_eq!(choose(&far(1), &far(2)).len(), 2);
    }
}
