//! Runs the cases of a plan, in turn, as often as was asked.

use anyhow::{Context, Result};
use thalweg::ErrorKind;

use crate::baseline::{self, Unavailable, raw_tcp};
use crate::case::{Baseline, Case, Subject};
use crate::peer::{Duty, Peer};
use crate::pin::Pins;
use crate::progress::Progress;
use crate::rows::Row;
use crate::session::{self, Outcome, Setup};
use crate::stats::Sample;

/// A repeated sample whose process waited longer than this share of the time for a core that
/// others held is taken again.
const DISTURBED: f64 = 0.05;
/// How often at most.
const RETAKES: usize = 2;

/// Where the peer is.
#[derive(Clone, Debug)]
pub enum Where {
    /// Started by this process, for each case anew.
    Here(Option<Pins>),
    /// A listener at this address.
    There(String),
}

/// What a run gave.
#[derive(Debug, Default)]
pub struct Results {
    /// One row for each case that could be measured.
    pub rows: Vec<Row>,
    /// The routes that endpoints chose: which links were allowed, and the route in words.
    pub routes: Vec<(String, String)>,
    /// What could not be measured, and why.
    pub left_out: Vec<String>,
}

/// Measures all cases `repeat` times, A B A B, and reports medians. Each row is handed to `report`
/// as soon as it is known. What cannot be measured here is left out; if `lenient`, so is a link that
/// cannot be set up.
pub fn run(
    cases: &[Case],
    repeat: usize,
    peer: &Where,
    lenient: bool,
    mut report: impl FnMut(&Row),
) -> Result<Results> {
    let mut results = Results::default();
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); cases.len()];
    let mut links: Vec<Option<String>> = vec![None; cases.len()];
    let progress = Progress::new(cases.len() * repeat);
    for turn in 1..=repeat {
        for (index, case) in cases.iter().enumerate() {
            progress.step(case.describe());
            let last = turn == repeat && index + 1 == cases.len();
            match undisturbed(case, peer, last, repeat > 1) {
                Ok(outcome) => {
                    samples[index].push(outcome.sample);
                    if let Some(route) = outcome.route {
                        links[index] = outcome.link;
                        note_route(&mut results.routes, case, route);
                    }
                }
                Err(error) if unavailable(&error) || lenient && wanting(&error) => {
                    let line = format!("{}: {error:#}", case.describe());
                    if !results.left_out.contains(&line) {
                        results.left_out.push(line);
                    }
                }
                Err(error) => return Err(error).with_context(|| case.describe()),
            }
            if turn == repeat
                && let Some(row) = Row::of(case, links[index].as_deref(), &samples[index])
            {
                report(&row);
                results.rows.push(row);
            }
            progress.done();
        }
    }
    Ok(results)
}

fn unavailable(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Unavailable>().is_some()
}

/// Whether a link or the means for it are missing, so that others may do.
fn wanting(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let link = cause.downcast_ref::<thalweg::Error>();
        let system = cause.downcast_ref::<std::io::Error>();
        link.is_some_and(|error| matches!(error.kind(), ErrorKind::NoRoute | ErrorKind::Resources))
            || system.is_some_and(|error| {
                matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
            })
    })
}

fn note_route(routes: &mut Vec<(String, String)>, case: &Case, route: String) {
    if let Subject::Thalweg { transport, .. } = &case.subject
        && routes.iter().all(|(name, _)| name != transport.name())
    {
        routes.push((transport.name().to_owned(), route));
    }
}

/// Takes a sample, again if something else held the core meanwhile.
fn undisturbed(case: &Case, peer: &Where, last: bool, retake: bool) -> Result<Outcome> {
    let mut outcome = once(case, peer, last)?;
    let retakes = if retake && !last { RETAKES } else { 0 };
    for _ in 0..retakes {
        if outcome.sample.disturbed <= DISTURBED {
            break;
        }
        outcome = once(case, peer, last)?;
    }
    Ok(outcome)
}

fn once(case: &Case, peer: &Where, last: bool) -> Result<Outcome> {
    match (&case.subject, peer) {
        (Subject::Thalweg { .. }, Where::Here(pins)) => here(case, *pins),
        (Subject::Thalweg { .. }, Where::There(address)) => raw_tcp::runtime()?.block_on(async {
            let (host, port) = session::arrange(case, address, last).await?;
            session::measure(case, &session::spell(&host, port)).await
        }),
        (Subject::Baseline(Baseline::RawTcp), Where::There(address)) => raw_tcp::runtime()?
            .block_on(async {
                let (host, port) = session::arrange(case, address, last).await?;
                session::measure_raw_tcp(case, &host, port).await
            }),
        (Subject::Baseline(baseline), Where::Here(pins)) => Ok(Outcome {
            sample: baseline::measure(*baseline, case, *pins)?,
            route: None,
            link: None,
        }),
        (Subject::Baseline(baseline), Where::There(_)) => {
            Err(Unavailable::new(format!("{} works on one machine only", baseline.name())).into())
        }
    }
}

fn here(case: &Case, pins: Option<Pins>) -> Result<Outcome> {
    let mut peer = Peer::spawn(case, pins.map(|pins| pins.peer), &[])?;
    let address: String = peer.control().recv()?;
    let outcome = raw_tcp::runtime()?.block_on(session::measure(case, &address))?;
    peer.finish()?;
    Ok(outcome)
}

/// The peer's side of any case.
pub fn serve(mut duty: Duty) -> Result<()> {
    if let Subject::Baseline(baseline) = duty.case.subject {
        return baseline::serve(baseline, duty);
    }
    let setup = Setup::of(&duty.case).context("nothing to serve")?;
    raw_tcp::runtime()?.block_on(async {
        let node = setup.node()?;
        let listener = node.listen("thalweg://127.0.0.1:0").await.context("listening")?;
        duty.control.send(&listener.address().to_string())?;
        let endpoint = listener.accept().await.context("accepting")?;
        drop(listener);
        session::serve(&node, endpoint, &duty.case).await?;
        node.close(thalweg::CloseReason::default()).await;
        Ok(())
    })
}
