//! What is measured by default, and how much of it.

use thalweg::LinkKind;

use crate::case::{Baseline, Case, Memory, Program, Subject, Transport, Wake};
use crate::cli::Common;
use crate::environment::Environment;

/// Sizes of a sweep of `pingpong`.
const LATENCY_SIZES: [usize; 5] = [8, 4 << 10, 64 << 10, 1 << 20, 8 << 20];
/// Sizes of a sweep of `bandwidth`.
const STREAM_SIZES: [usize; 4] = [8, 64 << 10, 1 << 20, 8 << 20];

/// Up to this size a message is small: how a process waits shows, and the ways of waiting are
/// compared.
const SMALL_BYTES: usize = 64;

/// What is known of where the measurement runs.
#[derive(Clone, Debug)]
pub struct Place {
    /// The links that work here, best first.
    pub links: Vec<LinkKind>,
    /// Whether each side has a core of its own.
    pub two_cores: bool,
    /// Whether the peer is on another machine, or at least started by someone else.
    pub remote: bool,
    /// Whether `ucx_perftest` can be started.
    pub ucx: bool,
    /// Whether the programs of perftest can be started.
    pub perftest: bool,
    /// What the environment says.
    pub environment: Environment,
}

/// The cases, and what was left out, in words.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// In the order in which they are measured and shown: by size, then thalweg before baselines.
    pub cases: Vec<Case>,
    /// Reasons for people.
    pub left_out: Vec<String>,
}

/// Makes a plan of the options. `window` as given on the command line.
pub fn plan(program: Program, options: &Common, window: Option<u32>, place: &Place) -> Plan {
    let mut plan = Plan::default();
    let sized =
        |subject: Subject, frames: Vec<usize>| sized(program, options, window, subject, frames);
    let baselines = baselines(program, options, place, &mut plan.left_out);
    for frames in shapes(program, options) {
        let size_bytes = frames.iter().sum();
        for subject in subjects(options, place, size_bytes) {
            plan.cases.push(sized(subject, frames.clone()));
        }
        for &baseline in &baselines {
            if size_bytes <= baseline.max_bytes() {
                plan.cases.push(sized(Subject::Baseline(baseline), vec![size_bytes]));
            }
        }
    }
    // The baselines of waiting carry a few bytes only. They are shown beside larger messages too.
    for baseline in baselines {
        let subject = Subject::Baseline(baseline);
        if plan.cases.iter().all(|case| case.subject != subject) {
            plan.cases.push(sized(subject, vec![8]));
        }
    }
    plan
}

/// The lists of frames to measure.
fn shapes(program: Program, options: &Common) -> Vec<Vec<usize>> {
    if !options.frames.is_empty() {
        return vec![options.frames.clone()];
    }
    let default: &[usize] = match program {
        Program::Pingpong => &LATENCY_SIZES,
        Program::Bandwidth => &STREAM_SIZES,
    };
    let sizes = if options.size.is_empty() { default } else { &options.size };
    sizes.iter().map(|&size| vec![size]).collect()
}

/// What of this library is measured with messages of this size.
fn subjects(options: &Common, place: &Place, size_bytes: usize) -> Vec<Subject> {
    let transports = if !options.transport.is_empty() {
        options.transport.clone()
    } else if place.remote {
        vec![Transport::auto()]
    } else {
        let allowed = place.environment.links.as_ref();
        let allowed = |link: &&LinkKind| allowed.is_none_or(|links| links.contains(link));
        place.links.iter().filter(allowed).map(|&link| Transport::from(link)).collect()
    };
    let mut subjects = Vec::new();
    for transport in &transports {
        for memory in memories(options, transport) {
            for wake in wakes(options, place, transport, memory, size_bytes) {
                let (transport, single_copy) = (transport.clone(), options.single_copy);
                subjects.push(Subject::Thalweg { transport, memory, wake, single_copy });
            }
        }
    }
    subjects
}

fn memories(options: &Common, transport: &Transport) -> Vec<Memory> {
    if !options.memory.is_empty() {
        options.memory.clone()
    } else if options.is_sweep() && transport.link() == Some(LinkKind::Shm) {
        vec![Memory::Host, Memory::Loaned]
    } else {
        vec![Memory::Host]
    }
}

/// In a sweep each link waits in the way that shows its speed, and small messages in host memory
/// are also measured asleep; otherwise one way is enough.
fn wakes(
    options: &Common,
    place: &Place,
    transport: &Transport,
    memory: Memory,
    size_bytes: usize,
) -> Vec<Wake> {
    if !options.wake.is_empty() {
        return options.wake.clone();
    }
    if let Some(wake) = place.environment.wake {
        return vec![wake];
    }
    if !place.two_cores {
        return vec![Wake::Park];
    }
    if !options.is_sweep() {
        return vec![Wake::Adaptive];
    }
    let shm = transport.link() == Some(LinkKind::Shm);
    let mut wakes = vec![if shm { Wake::Spin } else { Wake::Adaptive }];
    if size_bytes <= SMALL_BYTES && memory == Memory::Host {
        wakes.push(Wake::Park);
    }
    wakes
}

/// The baselines that were asked for and make sense here.
fn baselines(
    program: Program,
    options: &Common,
    place: &Place,
    left_out: &mut Vec<String>,
) -> Vec<Baseline> {
    let asked = match &options.baseline {
        Some(names) if !names.is_empty() => names.clone(),
        Some(_) => Baseline::ALL.to_vec(),
        None if options.is_sweep() => Baseline::ALL.to_vec(),
        None => Vec::new(),
    };
    let named = options.baseline.as_ref().is_some_and(|names| !names.is_empty());
    let over = |kind| options.transport.iter().any(|link| link.link() == Some(kind));
    let compared = |baseline: Baseline| match baseline {
        Baseline::UcxE => over(LinkKind::Ucx),
        _ if baseline.is_perftest() => over(LinkKind::Verbs),
        _ => true,
    };
    let mut kept = Vec::new();
    for baseline in asked {
        let name = baseline.name();
        if !named && !compared(baseline) {
            // It has nothing to be compared with.
        } else if !baseline.suits(program) {
            if named {
                left_out.push(match program {
                    Program::Pingpong => format!("{name}: only says something about a stream"),
                    Program::Bandwidth => {
                        format!("{name}: says nothing about a stream; see pingpong")
                    }
                });
            }
        } else if place.remote && baseline != Baseline::RawTcp {
            left_out.push(format!("{name}: works on one machine only"));
        } else if !place.two_cores && baseline.needs_two_cores() {
            left_out.push(format!("{name}: needs two cores"));
        } else if matches!(baseline, Baseline::Ucx | Baseline::UcxE) && !place.ucx {
            left_out.push(format!("{name}: ucx_perftest is not installed (Debian: ucx-utils)"));
        } else if baseline.is_perftest() && !place.perftest {
            left_out.push(format!("{name}: perftest is not installed (Debian: perftest)"));
        } else if !kept.contains(&baseline) {
            kept.push(baseline);
        }
    }
    kept
}

/// Completes a case with counts.
fn sized(
    program: Program,
    options: &Common,
    window: Option<u32>,
    subject: Subject,
    frames: Vec<usize>,
) -> Case {
    let size_bytes: usize = frames.iter().sum();
    let default_window = if size_bytes <= 64 << 10 { 64 } else { 4 };
    Case {
        program,
        size_bytes,
        frames,
        iters: options.iters.map_or_else(|| iters(program, &subject, size_bytes), to_usize),
        warmup: options.warmup.map_or_else(|| warmup(size_bytes), to_usize),
        window: window.map_or(default_window, to_usize),
        subject,
    }
}

fn to_usize(count: u32) -> usize {
    count as usize
}

/// As many as take about a third of a second, at rates that today's machines reach.
fn iters(program: Program, subject: &Subject, size_bytes: usize) -> usize {
    let loaned = matches!(subject, Subject::Thalweg { memory: Memory::Loaned, .. });
    let by_bytes = if loaned { 20_000 } else { (2usize << 30) / size_bytes.max(1) };
    match program {
        Program::Pingpong => (by_bytes / 2).clamp(100, 20_000),
        Program::Bandwidth if size_bytes <= SMALL_BYTES && !loaned => 1_000_000,
        Program::Bandwidth => by_bytes.clamp(100, 100_000),
    }
}

/// Enough to fault in memory and fill caches; at most about 100 MB to verify.
fn warmup(size_bytes: usize) -> usize {
    ((100 << 20) / size_bytes.max(1)).clamp(10, 1_000)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Pingpong;

    fn place() -> Place {
        let links = vec![LinkKind::Shm, LinkKind::Tcp];
        Place {
            links,
            two_cores: true,
            remote: false,
            ucx: true,
            perftest: true,
            environment: Environment::default(),
        }
    }

    fn planned(words: &[&str], place: &Place) -> Plan {
        let words = ["pingpong"].iter().chain(words);
        let options = Pingpong::try_parse_from(words).unwrap().common;
        plan(Program::Pingpong, &options, None, place)
    }

    fn count(plan: &Plan, wanted: impl Fn(&Subject) -> bool) -> usize {
        plan.cases.iter().filter(|case| wanted(&case.subject)).count()
    }

    #[test]
    fn without_options_every_link_and_baseline_is_measured() {
        let plan = planned(&[], &place());
        for link in [LinkKind::Shm, LinkKind::Tcp] {
            let links = count(
                &plan,
                |s| matches!(s, Subject::Thalweg { transport, .. } if transport.link() == Some(link)),
            );
            assert!(links >= LATENCY_SIZES.len(), "{link}: {links}");
        }
        let compared = |all: &Baseline| {
            all.suits(Program::Pingpong) && *all != Baseline::UcxE && !all.is_perftest()
        };
        for baseline in Baseline::ALL.into_iter().filter(compared) {
            assert!(count(&plan, |s| *s == Subject::Baseline(baseline)) > 0, "{baseline:?}");
        }
        assert!(plan.left_out.is_empty());
        // What one link alone is compared with, is measured beside it alone.
        let over = |link| planned(&["--transport", link, "--size", "8", "--baseline"], &place());
        let of_ucx = |plan: &Plan| count(plan, |s| *s == Subject::Baseline(Baseline::UcxE));
        assert_eq!((of_ucx(&plan), of_ucx(&over("tcp")), of_ucx(&over("ucx"))), (0, 0, 1));
        let of_perftest = |plan: &Plan| {
            count(plan, |s| matches!(s, Subject::Baseline(baseline) if baseline.is_perftest()))
        };
        let counts = [&plan, &over("ucx"), &over("verbs")].map(of_perftest);
        assert_eq!(counts, [0, 0, 2]);
    }

    #[test]
    fn options_narrow_it_down_to_exactly_what_they_say() {
        let words = ["--transport", "shm", "--size", "8", "--wake", "spin", "--iters", "7"];
        let plan = planned(&words, &place());
        assert_eq!(plan.cases.len(), 1);
        assert_eq!(plan.cases[0].iters, 7);
        let plan = planned(&[&words[..], &["--baseline=cacheline"]].concat(), &place());
        assert_eq!(plan.cases.len(), 2);
    }

    #[test]
    fn a_baseline_that_cannot_run_is_left_out_with_its_reason() {
        let poor = Place { ucx: false, two_cores: false, ..place() };
        let plan = planned(&["--size", "8", "--baseline"], &poor);
        assert_eq!(count(&plan, |s| *s == Subject::Baseline(Baseline::Ucx)), 0);
        assert!(plan.left_out.iter().any(|line| line.contains("ucx")));
        assert!(plan.left_out.iter().any(|line| line.contains("cacheline")));
    }

    #[test]
    fn the_environment_counts_where_no_option_says_otherwise() {
        let environment = Environment {
            links: Some(vec![LinkKind::Tcp]),
            wake: Some(Wake::Park),
            ..Environment::default()
        };
        let place = Place { environment, ..place() };
        let plan = planned(&[], &place);
        let ours = |s: &Subject| matches!(s, Subject::Thalweg { .. });
        let tcp_park = |s: &Subject| match s {
            Subject::Thalweg { transport, wake, .. } => {
                transport.link() == Some(LinkKind::Tcp) && *wake == Wake::Park
            }
            Subject::Baseline(_) => false,
        };
        assert_eq!(count(&plan, ours), count(&plan, tcp_park));
        let plan = planned(&["--transport", "shm", "--wake", "spin", "--size", "8"], &place);
        assert_eq!((count(&plan, ours), count(&plan, tcp_park)), (1, 0));
    }

    #[test]
    fn frames_are_one_message_and_one_raw_write() {
        let words = ["--frames", "100,165,620000", "--transport", "tcp", "--baseline=raw-tcp"];
        let plan = planned(&words, &place());
        assert_eq!(plan.cases[0].frames, [100, 165, 620_000]);
        assert_eq!(plan.cases[1].frames, [620_265]);
        assert!(plan.cases.iter().all(|case| case.size_bytes == 620_265));
    }

    #[test]
    fn the_small_baselines_stand_beside_large_messages_too() {
        let plan = planned(
            &["--transport", "shm", "--size", "1MiB", "--baseline=cacheline,eventfd"],
            &place(),
        );
        let sizes: Vec<usize> = plan.cases.iter().map(|case| case.size_bytes).collect();
        assert_eq!(sizes, [1 << 20, 8, 8]);
    }
}
