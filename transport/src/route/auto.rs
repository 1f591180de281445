//! What is looked for where nobody named links, as pure functions of what the kernel shows.
//!
//! The links of a host (`shm`) and of every machine (`tcp`) are always there. `verbs` is worth looking
//! for where there is RDMA hardware that it speaks, and `ucx` where there is hardware that no other link
//! reaches. Memory of GPUs is not moved by any link yet, so that they are there is no reason.

use crate::link::hardware::{Hardware, Nature, RdmaDevice, Reach};
use crate::link::{LinkKind, insist};

/// All links that the library chooses from by itself, best first.
pub(crate) const ORDER: [LinkKind; 4] =
    [LinkKind::Shm, LinkKind::Verbs, LinkKind::Ucx, LinkKind::Tcp];

/// Why a link is not looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Declined {
    pub reason: String,
    pub fix: Option<String>,
}

/// What the link `verbs` does with RDMA hardware.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ByVerbs {
    /// It uses these devices.
    Uses(Vec<String>),
    /// It cannot.
    Nothing,
    /// Only the process that this one was forked off can.
    Forked,
}

/// Whether to look for the link `verbs`. `Ok`: the devices to leave alone.
pub(crate) fn verbs(hardware: &Hardware) -> Result<Vec<String>, Declined> {
    if let Some(reason) = unlisted(hardware) {
        return Err(Declined { reason, fix: Some(insist(LinkKind::Verbs)) });
    }
    let adapter = |device: &RdmaDevice| device.nature == Nature::Adapter;
    // Nor is a port that is down, which nobody misses, worth a warning.
    let (serve, others): (Vec<_>, Vec<_>) =
        hardware.rdma.iter().partition(|device| adapter(device) && device.up);
    if !serve.is_empty() {
        return Ok(others.into_iter().map(|device| device.name.clone()).collect());
    }
    if hardware.rdma.is_empty() {
        return Err(Declined {
            reason: "the kernel knows no RDMA device".into(),
            fix: Some("load the driver of the adapter".into()),
        });
    }
    let list: Vec<_> = hardware.rdma.iter().map(describe).collect();
    let reason = format!("no RDMA hardware for it with a port that is up: {}", list.join(", "));
    let fix = match hardware.rdma.iter().any(adapter) {
        true => "set the interface up and give it an address (ip link, ip address; InfiniBand: a \
                 subnet manager must run)"
            .into(),
        false => insist(LinkKind::Verbs),
    };
    Err(Declined { reason, fix: Some(fix) })
}

fn unlisted(hardware: &Hardware) -> Option<String> {
    let why = hardware.unseen.as_ref()?;
    Some(format!("the kernel's RDMA devices cannot be listed: {why}"))
}

fn describe(device: &RdmaDevice) -> String {
    let RdmaDevice { name, nature, up } = device;
    match nature {
        Nature::Software(what) => format!("{name} is {what} (slower than TCP)"),
        Nature::Other(what) => format!("{name} is {what}"),
        Nature::Adapter if *up => format!("{name} is up"),
        Nature::Adapter => format!("{name} is down"),
    }
}

/// Whether to look for UCX, and for which hardware. `named`: the only devices that `verbs` may use, if
/// somebody said so; others of its kind are then no reason.
pub(crate) fn ucx(
    hardware: &Hardware,
    verbs: &ByVerbs,
    named: &[String],
) -> Result<Reach, Declined> {
    let is_reason = |device: &&RdmaDevice| match (device.nature, verbs) {
        _ if !device.up => false,
        (Nature::Software(_), _) => false,
        (Nature::Adapter, _) if !named.is_empty() && !named.contains(&device.name) => false,
        (Nature::Adapter, ByVerbs::Uses(used)) => !used.contains(&device.name),
        (Nature::Adapter | Nature::Other(_), _) => true,
    };
    let devices: Vec<_> = hardware.rdma.iter().filter(is_reason).collect();
    let devices: Vec<String> = devices.into_iter().map(|device| device.name.clone()).collect();
    let declined = |reason: String| Declined { reason, fix: Some(insist(LinkKind::Ucx)) };
    if *verbs == ByVerbs::Forked && !devices.is_empty() {
        return Err(Declined {
            reason: "RDMA devices were in use when this process was forked off".into(),
            fix: Some("start processes by spawn".into()),
        });
    }
    if devices.is_empty() && hardware.fabrics.is_empty() {
        return Err(declined(match verbs {
            ByVerbs::Uses(used) => {
                format!(
                    "not looked for: the RDMA hardware here is used by verbs ({})",
                    used.join(", ")
                )
            }
            _ => match unlisted(hardware) {
                Some(why) => format!("not looked for: {why}"),
                None => "not looked for: there is no hardware here that only UCX may reach".into(),
            },
        }));
    }
    Ok(Reach { devices, fabrics: hardware.fabrics.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::hardware::Fabric;
    use proptest::prelude::*;

    const SOFT: Nature = Nature::Software("soft-RoCE");
    const OTHER: Nature = Nature::Other("iWARP");
    const ARIES: Fabric = Fabric { file: "dev/kgni0", transports: "ugni" };

    /// Name and nature of a device, and whether it is up.
    type Claim = (&'static str, Nature, bool);

    fn hardware(devices: &[Claim]) -> Hardware {
        let device = |(name, nature, up): &Claim| RdmaDevice {
            name: (*name).to_owned(),
            nature: *nature,
            up: *up,
        };
        Hardware { rdma: devices.iter().map(device).collect(), ..Hardware::default() }
    }

    fn uses(names: &[&str]) -> ByVerbs {
        ByVerbs::Uses(names.iter().map(|name| (*name).to_owned()).collect())
    }

    #[test]
    fn verbs_is_looked_for_where_hardware_is_up() {
        /// The devices to leave alone, or what the reason says.
        type Expected = Result<&'static [&'static str], &'static str>;
        let table: [(&[Claim], Expected); 7] = [
            (&[("m", Nature::Adapter, true)], Ok(&[])),
            (&[("m", Nature::Adapter, true), ("d", Nature::Adapter, false)], Ok(&["d"])),
            (
                &[("m", Nature::Adapter, true), ("r", SOFT, true), ("i", OTHER, true)],
                Ok(&["r", "i"]),
            ),
            (&[], Err("knows no RDMA device")),
            (&[("r", SOFT, true)], Err("r is soft-RoCE (slower than TCP)")),
            (&[("r", SOFT, true), ("m", Nature::Adapter, false)], Err("m is down")),
            (&[("i", OTHER, true)], Err("i is iWARP")),
        ];
        for (devices, expected) in table {
            match (verbs(&hardware(devices)), expected) {
                (Ok(left), Ok(expected)) => assert_eq!(left, expected, "{devices:?}"),
                (Err(Declined { reason, fix }), Err(expected)) => {
                    assert!(reason.contains(expected), "{reason}");
                    assert!(fix.is_some(), "{reason}");
                }
                (got, _) => panic!("{devices:?}: {got:?}"),
            }
        }
        let soft = verbs(&hardware(&[("r", SOFT, true)])).expect_err("software");
        assert_eq!(soft.fix, Some(insist(LinkKind::Verbs)));
        let unseen = Hardware { unseen: Some("no /sys".into()), ..Hardware::default() };
        assert!(verbs(&unseen).expect_err("unseen").reason.contains("no /sys"));
        let declined = ucx(&unseen, &ByVerbs::Nothing, &[]).expect_err("unseen");
        assert!(declined.reason.starts_with("not looked for: "), "{}", declined.reason);
        assert!(declined.reason.contains("no /sys"), "{}", declined.reason);
    }

    #[test]
    fn ucx_is_looked_for_where_nothing_else_reaches() {
        let card = &[("m", Nature::Adapter, true)];
        let two = &[("m", Nature::Adapter, true), ("n", Nature::Adapter, true)];
        let reach = |names: &[&str]| Reach {
            devices: names.iter().map(|name| (*name).to_owned()).collect(),
            fabrics: Vec::new(),
        };
        assert_eq!(ucx(&hardware(card), &ByVerbs::Nothing, &[]), Ok(reach(&["m"])));
        assert_eq!(ucx(&hardware(two), &uses(&["m"]), &[]), Ok(reach(&["n"])));
        assert_eq!(
            ucx(&hardware(&[("i", OTHER, true)]), &ByVerbs::Nothing, &[]),
            Ok(reach(&["i"]))
        );
        let used = ucx(&hardware(card), &uses(&["m"]), &[]).expect_err("used");
        assert!(used.reason.contains("used by verbs (m)"), "{}", used.reason);
        for none in [&[][..], &[("r", SOFT, true)], &[("m", Nature::Adapter, false)]] {
            let none = ucx(&hardware(none), &ByVerbs::Nothing, &[]).expect_err("nothing");
            assert!(none.reason.contains("no hardware"), "{}", none.reason);
            assert_eq!(none.fix, Some(insist(LinkKind::Ucx)));
        }
        assert!(ucx(&hardware(two), &uses(&["m"]), &["m".to_owned()]).is_err(), "left out by name");
        let forked = ucx(&hardware(card), &ByVerbs::Forked, &[]).expect_err("forked");
        assert!(forked.reason.contains("forked"), "{}", forked.reason);
        let aries = Hardware { fabrics: vec![ARIES], ..hardware(card) };
        let found = ucx(&aries, &uses(&["m"]), &[]).expect("a fabric of its own");
        assert_eq!(found.names(), "/dev/kgni0");
    }

    #[test]
    fn transports_over_hardware_are_told_from_others() {
        let found = Hardware { fabrics: vec![ARIES], ..hardware(&[("mlx5_0", OTHER, true)]) };
        let reach = ucx(&found, &ByVerbs::Nothing, &[]).expect("hardware");
        for (transport, device) in
            [("rc_mlx5", "mlx5_0:1"), ("ud_verbs", "mlx5_0:2"), ("ugni_rdma", "nic")]
        {
            assert!(reach.has(transport, device), "{transport}/{device}");
        }
        for (transport, device) in [
            ("rc_mlx5", "mlx5_01:1"),
            ("rc_verbs", "rxe0:1"),
            ("tcp", "mlx5_0.eth"),
            ("self", "memory0"),
            ("posix", "memory"),
            ("cuda_copy", "cuda"),
            ("", ""),
        ] {
            assert!(!reach.has(transport, device), "{transport}/{device}");
        }
    }

    fn devices() -> impl Strategy<Value = Vec<(Nature, bool)>> {
        let nature = prop_oneof![Just(Nature::Adapter), Just(OTHER), Just(SOFT)];
        proptest::collection::vec((nature, any::<bool>()), 0..5)
    }

    proptest! {
        /// Nothing of software is ever a reason, nor what `verbs` uses; and where nothing is, nothing
        /// is looked for.
        #[test]
        fn only_hardware_is_a_reason(devices in devices(), used: u8) {
            let names = ["a", "b", "c", "d", "e"];
            let all: Vec<_> =
                devices.iter().zip(names).map(|((nature, up), name)| (name, *nature, *up)).collect();
            let found = hardware(&all);
            let used: Vec<_> = names
                .into_iter()
                .enumerate()
                .filter(|(at, _)| used & (1 << at) != 0)
                .map(|(_, name)| name)
                .collect();
            let by_verbs = uses(&used);
            let reasons: Vec<_> = all
                .iter()
                .filter(|(name, nature, up)| {
                    *up && match nature {
                        Nature::Adapter => !used.contains(name),
                        Nature::Other(_) => true,
                        Nature::Software(_) => false,
                    }
                })
                .map(|(name, ..)| *name)
                .collect();
            match ucx(&found, &by_verbs, &[]) {
                Ok(reach) => prop_assert_eq!(reach.devices, reasons),
                Err(_) => prop_assert!(reasons.is_empty()),
            }
            let speaks = all.iter().any(|(_, nature, up)| *up && *nature == Nature::Adapter);
            prop_assert_eq!(verbs(&found).is_ok(), speaks);
        }
    }
}
