//! The choice of path, as a pure function, and its explanation.
//!
//! This room owns what makes one link better than another, and which are looked for where nobody named
//! them (`auto`), and for how long one that did not come up is left alone (`late`). It must not know how links are set up or moved: it sees what the kernel shows,
//! capability sets, the configuration and what became of each attempt.

pub(crate) mod auto;
pub(crate) mod late;

use std::fmt;

use crate::link::{LinkKind, insist};
use crate::memory::MemoryKind;

/// What one side offers of one link.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capability {
    /// Which link.
    pub link: LinkKind,
    /// Whether this process can use it at all.
    pub present: bool,
    /// Why it is present or not, in plain words.
    pub reason: String,
    /// What would make it available, if it is not.
    pub fix: Option<String>,
}

/// What became of a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Verdict {
    /// It carries this endpoint's traffic.
    Chosen,
    /// It would work; a better one was chosen.
    Usable,
    /// It cannot be used; the reason says why.
    Rejected,
}

impl Verdict {
    /// `chosen`, `usable` or `rejected`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Verdict::Chosen => "chosen",
            Verdict::Usable => "usable",
            Verdict::Rejected => "rejected",
        }
    }
}

/// A link that was considered for an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Candidate {
    /// Which link.
    pub link: LinkKind,
    /// What became of it.
    pub verdict: Verdict,
    /// Why.
    pub reason: String,
    /// What would change a rejection, where known.
    pub fix: Option<String>,
}

/// The three families of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// Ordered messages of frames.
    Messages,
    /// Tagged transfers.
    Tags,
    /// Put and get.
    OneSided,
}

impl Family {
    /// All of them.
    pub const ALL: [Family; 3] = [Family::Messages, Family::Tags, Family::OneSided];

    /// `messages`, `tags` or `one-sided`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Family::Messages => "messages",
            Family::Tags => "tags",
            Family::OneSided => "one-sided",
        }
    }
}

/// One line of a route: which link carries a family in a memory kind, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lane {
    /// The family.
    pub family: Family,
    /// The kind of memory.
    pub memory: MemoryKind,
    /// The link.
    pub link: LinkKind,
    /// How payloads move on it, by size.
    pub how: String,
}

/// Which way an endpoint's traffic goes, and why. `Display` prints it for people.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Route {
    /// The peer's address.
    pub peer: String,
    /// Which link carries what.
    pub lanes: Vec<Lane>,
    /// Every link that was considered, in the order of preference.
    pub candidates: Vec<Candidate>,
}

impl Route {
    /// The link that carries messages.
    pub fn link(&self) -> LinkKind {
        self.lanes.first().map_or(LinkKind::Tcp, |lane| lane.link)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "route to {}", self.peer)?;
        for lane in &self.lanes {
            let Lane { family, memory, link, how } = lane;
            let (family, memory) = (family.as_str(), memory.to_string());
            writeln!(f, "  {family:<9}  {memory:<6}  over {link}: {how}")?;
        }
        for candidate in &self.candidates {
            let Candidate { link, verdict, reason, fix } = candidate;
            let (link, verdict) = (link.to_string(), verdict.as_str());
            write!(f, "  {link:<5}  {verdict:<8}  {reason}")?;
            if let Some(fix) = fix {
                write!(f, " (to change that: {fix})")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

/// One side's part in the choice.
#[derive(Clone, Debug, Default)]
pub(crate) struct Side {
    /// What this side offers, each with the link's own verdict on the pair of capability blobs
    /// (`None`: no objection).
    pub offers: Vec<LinkKind>,
    /// UCX's transports over hardware there, as that side says.
    pub transports: Vec<String>,
}

/// What the configuration says.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    /// Allowed links, best first.
    pub order: Vec<LinkKind>,
    pub require_encryption: bool,
    /// Where this side chooses, and nobody named links: UCX's transports over hardware here. UCX is
    /// tried only if the peer has one of them, too.
    pub ucx_only_by: Option<Vec<String>>,
}

/// A link's own objection to a pair of capability blobs.
pub(crate) struct Objection {
    pub link: LinkKind,
    pub reason: String,
    pub fix: Option<String>,
    /// It holds only while there is another link to try.
    pub yields: bool,
}

/// Which links to try, best first, and which are out, with reasons. Pure: the same inputs give the
/// same plan.
pub(crate) fn plan(
    policy: &Policy,
    own: &[Capability],
    peer: &Side,
    objections: &[Objection],
) -> (Vec<LinkKind>, Vec<Candidate>) {
    let mut attempts = Vec::new();
    let mut rejected = Vec::new();
    // Rejected for as long as there is another.
    let mut spared = Vec::new();
    let mut reject = |link, reason: String, fix: Option<String>| {
        rejected.push(Candidate { link, verdict: Verdict::Rejected, reason, fix });
    };
    let unlisted = own.iter().map(|c| c.link).filter(|link| !policy.order.contains(link));
    let considered: Vec<LinkKind> = policy.order.iter().copied().chain(unlisted).collect();
    for link in considered {
        let here = own.iter().find(|c| c.link == link);
        if !policy.order.contains(&link) {
            reject(
                link,
                "not among the allowed transports".into(),
                Some(format!("add {link} to THALWEG_TRANSPORTS or Config::transports")),
            );
        } else if let Some(missing) = here.filter(|c| !c.present) {
            reject(link, missing.reason.clone(), missing.fix.clone());
        } else if here.is_none() {
            reject(link, "not in this build".into(), None);
        } else if !peer.offers.contains(&link) {
            reject(
                link,
                "the peer does not offer it".into(),
                Some("thalweg-info on the peer's machine says why".into()),
            );
        } else if policy.require_encryption && !private(link) {
            reject(
                link,
                "encryption is required, and this link has none".into(),
                Some("allow plain text, or put both processes on one host".into()),
            );
        } else if let Some(objection) = objections.iter().find(|o| o.link == link) {
            spared.extend(objection.yields.then_some(link));
            reject(link, objection.reason.clone(), objection.fix.clone());
        } else if let Some(ours) = foreign(policy, peer).filter(|_| link == LinkKind::Ucx) {
            let list = |names: &[String]| match names {
                [] => "none".to_owned(),
                names => names.join(", "),
            };
            let (ours, theirs) = (list(ours), list(&peer.transports));
            let reason = format!(
                "UCX has no transport over hardware that both sides have (here: {ours}; at the peer: \
                 {theirs})"
            );
            spared.push(link);
            reject(link, reason, Some(insist(link)));
        } else {
            attempts.push(link);
        }
    }
    if attempts.is_empty() {
        rejected.retain(|candidate| !spared.contains(&candidate.link));
        attempts = spared;
    }
    (attempts, rejected)
}

/// UCX's transports over hardware here, if one in common is needed and there is none.
fn foreign<'a>(policy: &'a Policy, peer: &Side) -> Option<&'a [String]> {
    let ours = policy.ucx_only_by.as_deref()?;
    (!ours.iter().any(|name| peer.transports.contains(name))).then_some(ours)
}

/// Whether nobody but the two processes (and the host's root) can read along.
fn private(link: LinkKind) -> bool {
    !matches!(link, LinkKind::Tcp | LinkKind::Ucx | LinkKind::Verbs)
}

/// How payloads move over a link, in plain words.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ways<'a> {
    pub all: &'a str,
    /// What puts and gets by itself, if the link has something that does.
    pub one_sided: Option<&'a str>,
}

impl Ways<'_> {
    fn of(self, family: Family) -> String {
        let Ways { all, one_sided } = self;
        match (family, one_sided) {
            (Family::Messages | Family::Tags, _) => all.to_owned(),
            (Family::OneSided, None) => format!("emulated by the target's process; {all}"),
            (Family::OneSided, Some(way)) => format!(
                "put/get by {way} for keys that the target has granted, for others emulated by the \
                 target's process; {all}"
            ),
        }
    }
}

/// The finished route: `chosen` came up; `failed` were tried before it; the rest would have been
/// tried after it.
pub(crate) fn explain(
    peer: &str,
    chosen: LinkKind,
    ways: Ways<'_>,
    order: &[LinkKind],
    attempts: &[LinkKind],
    failed: Vec<Candidate>,
    rejected: Vec<Candidate>,
) -> Route {
    let mut candidates = Vec::new();
    for link in attempts {
        if *link == chosen {
            candidates.push(Candidate {
                link: *link,
                verdict: Verdict::Chosen,
                reason: why(*link).into(),
                fix: None,
            });
        } else if !failed.iter().any(|c| c.link == *link) {
            candidates.push(Candidate {
                link: *link,
                verdict: Verdict::Usable,
                reason: format!("not needed: {chosen} is preferred"),
                fix: None,
            });
        }
    }
    candidates.extend(failed);
    candidates.extend(rejected);
    let place = |link: LinkKind| order.iter().position(|k| *k == link).unwrap_or(usize::MAX);
    candidates.sort_by_key(|candidate| place(candidate.link));
    let lanes = Family::ALL
        .into_iter()
        .map(|family| Lane { family, memory: MemoryKind::Host, link: chosen, how: ways.of(family) })
        .collect();
    Route { peer: peer.to_owned(), lanes, candidates }
}

fn why(link: LinkKind) -> &'static str {
    match link {
        LinkKind::Shm => "both processes are on this host (proved by reading a secret)",
        LinkKind::Tcp => "always available",
        LinkKind::Verbs => "queue pairs of RDMA devices connect both sides",
        LinkKind::Ucx => "UCX connects both sides",
        LinkKind::Mock => "asked for by a test",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn capability(link: LinkKind, present: bool) -> Capability {
        Capability {
            link,
            present,
            reason: if present { "works".into() } else { "absent".into() },
            fix: (!present).then(|| "install it".into()),
        }
    }

    fn policy(order: &[LinkKind], require_encryption: bool) -> Policy {
        Policy { order: order.to_vec(), require_encryption, ucx_only_by: None }
    }

    fn side(offers: Vec<LinkKind>) -> Side {
        Side { offers, transports: Vec::new() }
    }

    const BOTH: [LinkKind; 2] = [LinkKind::Shm, LinkKind::Tcp];

    #[test]
    fn every_combination_of_two_links() {
        for bits in 0..32u32 {
            let on = |bit: u32| bits & (1 << bit) != 0;
            let own = [capability(LinkKind::Shm, on(0)), capability(LinkKind::Tcp, true)];
            let offers: Vec<_> =
                BOTH.into_iter().filter(|k| *k == LinkKind::Tcp || on(1)).collect();
            let order: &[LinkKind] = if on(2) { &BOTH } else { &BOTH[1..] };
            let objections: Vec<_> = on(3)
                .then(|| Objection {
                    link: LinkKind::Shm,
                    reason: "other host".into(),
                    fix: None,
                    yields: false,
                })
                .into_iter()
                .collect();
            let (attempts, rejected) =
                plan(&policy(order, on(4)), &own, &side(offers), &objections);
            let shm = on(0) && on(1) && on(2) && !on(3);
            assert_eq!(attempts.contains(&LinkKind::Shm), shm, "{bits:05b}");
            assert_eq!(attempts.contains(&LinkKind::Tcp), !on(4), "{bits:05b}");
            assert_eq!(attempts.len() + rejected.len(), 2, "every link has a verdict");
            assert!(rejected.iter().all(|c| !c.reason.is_empty()));
        }
    }

    #[test]
    fn the_route_lists_chosen_usable_and_rejected() {
        let failed = vec![Candidate {
            link: LinkKind::Shm,
            verdict: Verdict::Rejected,
            reason: "memfd: not permitted".into(),
            fix: None,
        }];
        let ways = Ways { all: "streamed", one_sided: None };
        let route = explain("a:1", LinkKind::Tcp, ways, &BOTH, &BOTH, failed, vec![]);
        assert_eq!(route.link(), LinkKind::Tcp);
        let verdicts: Vec<_> = route.candidates.iter().map(|c| (c.link, c.verdict)).collect();
        assert_eq!(
            verdicts,
            [(LinkKind::Shm, Verdict::Rejected), (LinkKind::Tcp, Verdict::Chosen)]
        );
        let ways = Ways { all: "rings", one_sided: Some("the rings") };
        let route = explain("a:1", LinkKind::Shm, ways, &BOTH, &BOTH, vec![], vec![]);
        assert_eq!(route.candidates[1].verdict, Verdict::Usable);
        let text = route.to_string();
        assert!(text.contains("chosen") && text.contains("usable"), "{text}");
    }

    fn kinds() -> impl Strategy<Value = Vec<LinkKind>> {
        proptest::sample::subsequence(vec![LinkKind::Shm, LinkKind::Tcp, LinkKind::Mock], 0..=3)
    }

    proptest! {
        #[test]
        fn attempts_follow_the_order_and_nothing_is_both_tried_and_rejected(
            order in kinds().prop_shuffle(),
            present in kinds(),
            offers in kinds(),
            objected in kinds(),
            require_encryption: bool,
        ) {
            let own: Vec<_> = [LinkKind::Shm, LinkKind::Tcp, LinkKind::Mock]
                .into_iter()
                .map(|k| capability(k, present.contains(&k)))
                .collect();
            let objections: Vec<_> = objected
                .iter()
                .map(|k| Objection { link: *k, reason: "no".into(), fix: None, yields: false })
                .collect();
            let side = side(offers.clone());
            let (attempts, rejected) =
                plan(&policy(&order, require_encryption), &own, &side, &objections);
            let places: Vec<_> =
                attempts.iter().map(|k| order.iter().position(|o| o == k)).collect();
            prop_assert!(places.iter().all(Option::is_some));
            prop_assert!(places.is_sorted());
            for kind in [LinkKind::Shm, LinkKind::Tcp, LinkKind::Mock] {
                let tried = attempts.contains(&kind);
                prop_assert_ne!(tried, rejected.iter().any(|c| c.kind_is(kind)));
                let eligible = order.contains(&kind)
                    && present.contains(&kind)
                    && offers.contains(&kind)
                    && !objected.contains(&kind)
                    && !(require_encryption && kind == LinkKind::Tcp);
                prop_assert_eq!(tried, eligible);
            }
        }
    }

    #[test]
    fn what_yields_is_tried_where_nothing_else_is_left() {
        let own = auto::ORDER.map(|link| capability(link, true));
        let late = |link| Objection { link, reason: "late".into(), fix: None, yields: true };
        let chosen = Policy { ucx_only_by: Some(Vec::new()), ..policy(&auto::ORDER, false) };
        let links = |offers: &[LinkKind], policy: &Policy| {
            let (attempts, rejected) =
                plan(policy, &own, &side(offers.to_vec()), &[late(LinkKind::Verbs)]);
            assert_eq!(attempts.len() + rejected.len(), 4, "every link has a verdict");
            assert!(rejected.iter().all(|c| !attempts.contains(&c.link)));
            attempts
        };
        let (verbs, ucx, tcp) = (LinkKind::Verbs, LinkKind::Ucx, LinkKind::Tcp);
        assert_eq!(links(&[verbs, ucx, tcp], &chosen), [tcp]);
        assert_eq!(links(&[verbs, ucx], &chosen), [verbs, ucx]);
        assert_eq!(links(&[ucx], &chosen), [ucx]);
        assert_eq!(links(&[], &chosen), []);
        let encrypted = Policy { require_encryption: true, ..chosen };
        assert_eq!(links(&[verbs, ucx], &encrypted), []);
    }

    fn names() -> impl Strategy<Value = Vec<String>> {
        let all = ["dc_mlx5", "rc_mlx5", "rc_verbs", "ud_verbs"].map(str::to_owned).to_vec();
        proptest::sample::subsequence(all, 0..=4)
    }

    proptest! {
        /// Where nobody named links, UCX is tried only over hardware that both sides have, unless
        /// nothing else is left, and all else is as it were with the same list of names.
        #[test]
        fn ucx_needs_hardware_in_common_unless_it_is_named(
            present in proptest::sample::subsequence(auto::ORDER.to_vec(), 0..=4),
            offers in proptest::sample::subsequence(auto::ORDER.to_vec(), 0..=4),
            require_encryption: bool,
            ours in names(),
            theirs in names(),
        ) {
            let own: Vec<_> =
                auto::ORDER.into_iter().map(|k| capability(k, present.contains(&k))).collect();
            let peer = Side { offers, transports: theirs.clone() };
            let named = policy(&auto::ORDER, require_encryption);
            let chosen = Policy { ucx_only_by: Some(ours.clone()), ..named.clone() };
            let (by_name, _) = plan(&named, &own, &peer, &[]);
            let (by_itself, rejected) = plan(&chosen, &own, &peer, &[]);
            let common = ours.iter().any(|name| theirs.contains(name));
            let alone = by_name == [LinkKind::Ucx];
            let expected: Vec<_> =
                by_name.iter().copied().filter(|k| *k != LinkKind::Ucx || common || alone).collect();
            prop_assert_eq!(&by_itself, &expected);
            prop_assert_eq!(by_itself.len() + rejected.len(), 4);
            if by_name != by_itself {
                let ucx = rejected.iter().find(|c| c.link == LinkKind::Ucx).expect("a verdict");
                prop_assert!(ucx.reason.contains("hardware") && ucx.fix.is_some());
            }
        }

        /// An order that somebody named is tried as it is, whatever hardware there is.
        #[test]
        fn a_named_order_is_untouched(
            order in proptest::sample::subsequence(auto::ORDER.to_vec(), 1..=4).prop_shuffle(),
            theirs in names(),
        ) {
            let own = auto::ORDER.map(|k| capability(k, true));
            let peer = Side { offers: auto::ORDER.to_vec(), transports: theirs };
            prop_assert_eq!(plan(&policy(&order, false), &own, &peer, &[]).0, order);
        }
    }

    impl Candidate {
        fn kind_is(&self, kind: LinkKind) -> bool {
            self.link == kind
        }
    }
}
