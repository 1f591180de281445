//! What a node tells its peers about its ports, the choice of a pair of ports, and what both sides
//! tell each other about the queue pairs of one link.

use std::net::{IpAddr, Ipv6Addr};

/// The form of the blob and of what follows from it.
const FORM: u8 = 1;
/// Ports that a node offers.
pub(super) const PORTS_MAX: usize = 16;
const PORT_BYTES: usize = 20;
const TERMS_BYTES: usize = 20;

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
}

impl Port {
    /// The IP address that a RoCE v2 GID stands for.
    pub fn ip(&self) -> Option<IpAddr> {
        let v6 = Ipv6Addr::from(self.gid);
        (self.fabric == Fabric::RoceV2)
            .then(|| v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4))
    }

    fn encode(&self, to: &mut Vec<u8>) {
        to.push(self.fabric as u8);
        to.push(self.mtu);
        to.extend_from_slice(&self.lid.to_le_bytes());
        to.extend_from_slice(&self.gid);
    }

    fn decode(bytes: &[u8]) -> Option<Port> {
        let gid = bytes.get(4..PORT_BYTES)?.try_into().ok()?;
        let fabric = *FABRICS.get(usize::from(bytes[0]))?;
        let mtu = Some(bytes[1]).filter(|mtu| (1..=5).contains(mtu))?;
        Some(Port { fabric, mtu, lid: u16::from_le_bytes([bytes[2], bytes[3]]), gid })
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

/// How well two ports suit each other; 0: one does not reach the other.
fn score(one: &Port, other: &Port) -> u32 {
    if one.fabric != other.fabric {
        return 0;
    }
    let same = one.gid.iter().zip(&other.gid).take_while(|(a, b)| a == b).count() as u32;
    let score = match one.fabric {
        // Subnets are told apart by the first half of their GIDs; between them there are routers.
        Fabric::InfiniBand if same >= 8 => 300,
        Fabric::InfiniBand => 0,
        Fabric::RoceV2 => match (one.ip(), other.ip()) {
            (Some(IpAddr::V4(_)), Some(IpAddr::V4(_))) if same >= 15 => 280,
            (Some(IpAddr::V4(_)), Some(IpAddr::V4(_))) => 200,
            (Some(IpAddr::V6(a)), Some(IpAddr::V6(b))) => {
                match (a.is_unicast_link_local(), b.is_unicast_link_local()) {
                    (false, false) if same >= 8 => 270,
                    (false, false) => 190,
                    (true, true) => 90,
                    _ => 0,
                }
            }
            _ => 0,
        },
        Fabric::RoceV1 => 100,
    };
    if score == 0 { 0 } else { score + same.min(16) }
}

/// The pair of ports that suits best: places in the connecting side's list and in the other's. Both
/// sides come to the same answer.
pub(super) fn choose(connector: &[Port], acceptor: &[Port]) -> Option<(usize, usize)> {
    let mut best = None;
    for (i, one) in connector.iter().enumerate() {
        for (j, other) in acceptor.iter().enumerate() {
            let score = score(one, other);
            if score > 0 && best.is_none_or(|(known, _)| score > known) {
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
    /// Its queue pair for messages, and the one that it reads with.
    pub queue_pairs: [u32; 2],
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
        for number in [self.queue_pairs[0], self.queue_pairs[1], self.first_packet] {
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
        let receives = u16::try_from(word(16)?).ok()?;
        if bytes[0] != FORM || receives < 8 || bytes[3] == 0 {
            return None;
        }
        Some(Terms {
            ports: (bytes[1], bytes[2]),
            queue_pairs: [small(4)?, small(8)?],
            first_packet: small(12)?,
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
        Port { fabric: Fabric::RoceV2, mtu: 5, lid: 0, gid }
    }

    fn ib(subnet: u8, lid: u16) -> Port {
        let mut gid = [0; 16];
        (gid[0], gid[7], gid[15]) = (0xfe, subnet, lid as u8);
        Port { fabric: Fabric::InfiniBand, mtu: 5, lid, gid }
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

    proptest! {
        #[test]
        fn ports_survive_the_wire(
            ports in proptest::collection::vec((0usize..3, 1u8..=5, any::<u16>(), any::<[u8; 16]>()), 0..=16),
        ) {
            let ports: Vec<Port> = ports
                .into_iter()
                .map(|(fabric, mtu, lid, gid)| Port { fabric: FABRICS[fabric], mtu, lid, gid })
                .collect();
            prop_assert_eq!(decode(&encode(&ports)), Some(ports.clone()));
            if let Some((i, j)) = choose(&ports, &ports) {
                prop_assert!(score(&ports[i], &ports[j]) > 0);
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
        fn terms_survive_the_wire(
            ports: (u8, u8), queue_pairs in [0u32..1 << 24, 0u32..1 << 24],
            first_packet in 0u32..1 << 24, receives in 8u16.., reads in 1u8..,
        ) {
            let terms = Terms { ports, queue_pairs, first_packet, receives, reads };
            prop_assert_eq!(Terms::decode(&terms.encode()), Some(terms));
        }
    }
}
