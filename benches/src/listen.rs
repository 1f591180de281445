//! The far side of a measurement between two machines: `--listen`.
//!
//! A desk holds the address from the first moment to the last, on a thread and a node of its own.
//! It hears what connectors want and lets one program in at a time. Each session then has a node
//! configured for it, at a port of the system's choice, which the desk tells the connector.

use std::net::SocketAddr;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use thalweg::{Address, CloseReason, Endpoint};

use crate::baseline::raw_tcp;
use crate::case::{Baseline, Subject};
use crate::pattern::Mismatch;
use crate::session::{self, Ask, Reply, Setup};

/// How long a connector has to say what it wants, and to come to the session that it asked for.
const SILENCE: Duration = Duration::from_secs(10);

/// How long a program that has not finished may stay away between two of its sessions.
const RETURN: Duration = Duration::from_secs(5);

/// How long a connector is kept waiting for the one before it: longer than one that stays away is
/// waited for.
const QUEUE: Duration = Duration::from_secs(15);

/// How often a waiting connector's turn is looked for.
const LOOK: Duration = Duration::from_millis(20);

/// Connectors that are heard at once; more are turned away.
const HEARD_MAX: usize = 64;

/// Sessions that one program may have asked for and not begun.
const ASKED_MAX: usize = 4;

/// Serves one connecting program after the other at `address`; with `once`, the first only.
pub fn run(address: &str, once: bool) -> Result<()> {
    let mut desk = Desk::open(address)?;
    eprintln!("listening at {}; end with Ctrl-C", desk.address);
    loop {
        let job = desk.next()?;
        let (run, last) = (job.ask.run, job.ask.last);
        let served = raw_tcp::runtime()?.block_on(serve(desk.address.host(), job));
        // Whose session has failed does not come back.
        desk.turn.session_ended(run, last || served.is_err());
        match served {
            Ok(()) if once && last => return Ok(()),
            Ok(()) => {}
            Err(error) if once || error.downcast_ref::<Mismatch>().is_some() => return Err(error),
            Err(error) => eprintln!("a session failed: {error:#}"),
        }
    }
}

/// A session that was asked for, and the connection to answer on.
struct Job {
    ask: Ask,
    asker: Endpoint,
}

async fn serve(host: &str, job: Job) -> Result<()> {
    let Job { ask, asker } = job;
    let served = match &ask.case.subject {
        Subject::Thalweg { .. } => serve_thalweg(host, &ask, &asker).await,
        Subject::Baseline(Baseline::RawTcp) => serve_raw_tcp(host, &ask, &asker).await,
        Subject::Baseline(other) => Err(anyhow!("{} works on one machine only", other.name())),
    };
    if let Err(error) = &served {
        // It hears this only if it has not been sent to a session, and may be gone.
        let _ = session::say(&asker, &Reply::Refused(format!("{error:#}"))).await;
    }
    served
}

async fn serve_thalweg(host: &str, ask: &Ask, asker: &Endpoint) -> Result<()> {
    let node = Setup::of(&ask.case).context("nothing to serve")?.node()?;
    let listener = node.listen(session::spell(host, 0).as_str()).await?;
    session::say(asker, &Reply::At(listener.address().port())).await?;
    let endpoint = tokio::time::timeout(SILENCE, listener.accept())
        .await
        .context("the connector did not come to its session")??;
    drop(listener);
    session::serve(&node, endpoint, &ask.case).await?;
    node.close(CloseReason::default()).await;
    Ok(())
}

async fn serve_raw_tcp(host: &str, ask: &Ask, asker: &Endpoint) -> Result<()> {
    let at: SocketAddr = session::resolve(host, 0).await?;
    let socket = raw_tcp::listen(at)?;
    session::say(asker, &Reply::At(socket.local_addr()?.port())).await?;
    tokio::time::timeout(session::time_limit(&ask.case), raw_tcp::serve_one(&ask.case, socket))
        .await
        .context("no end of it")?
}

/// What hears connectors, for as long as the program runs.
struct Desk {
    address: Address,
    turn: Arc<Turn>,
    jobs: Receiver<Job>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Desk {
    /// Takes the address; fails if somebody has it.
    fn open(address: &str) -> Result<Desk> {
        let wanted = address.to_owned();
        let (bound, binding) = mpsc::sync_channel(1);
        let (queue, jobs) = mpsc::sync_channel(ASKED_MAX);
        let turn = Arc::new(Turn::default());
        let turns = turn.clone();
        let thread = thread::spawn(move || {
            raw_tcp::runtime()?.block_on(attend(&wanted, &bound, &turns, &queue))
        });
        let mut thread = Some(thread);
        match binding.recv() {
            Ok(address) => Ok(Desk { address, turn, jobs, thread }),
            Err(_) => Err(end_of(&mut thread)),
        }
    }

    /// The next session.
    fn next(&mut self) -> Result<Job> {
        self.jobs.recv().map_err(|_| end_of(&mut self.thread))
    }
}

/// Why the desk's thread has ended.
fn end_of(thread: &mut Option<JoinHandle<Result<()>>>) -> anyhow::Error {
    match thread.take().map(JoinHandle::join) {
        Some(Ok(Err(error))) => error,
        _ => anyhow!("the listener's thread has ended"),
    }
}

/// The desk's thread.
async fn attend(
    address: &str,
    bound: &SyncSender<Address>,
    turn: &Arc<Turn>,
    jobs: &SyncSender<Job>,
) -> Result<()> {
    let node = session::desk_node()?;
    let listener = node.listen(address).await.with_context(|| format!("listening at {address}"))?;
    let _ = bound.send(listener.address().clone());
    loop {
        let asker = listener.accept().await.context("accepting")?;
        let heard = Arc::strong_count(turn);
        let (turn, jobs) = (turn.clone(), jobs.clone());
        tokio::spawn(async move {
            let refused = match heard < HEARD_MAX {
                true => hear_out(asker, &turn, &jobs).await,
                false => Some((asker, "too many are waiting".to_owned())),
            };
            if let Some((asker, why)) = refused {
                // It may be gone; then it needs no explanation.
                let _ = session::say(&asker, &Reply::Refused(why.clone())).await;
                let _ = asker.close(CloseReason::new(1, why)).await;
            }
        });
    }
}

/// Hears what a connector wants, and passes it on when it is its turn; or says why not.
async fn hear_out(
    asker: Endpoint,
    turn: &Turn,
    jobs: &SyncSender<Job>,
) -> Option<(Endpoint, String)> {
    let ask: Ask = match session::hear_within(&asker, SILENCE).await {
        Ok(ask) => ask,
        Err(error) => return Some((asker, format!("{error:#}"))),
    };
    let patience = Instant::now() + QUEUE;
    while let Err(before) = turn.take(ask.run, &asker.peer().address) {
        if Instant::now() > patience {
            return Some((asker, format!("busy measuring for {before}")));
        }
        tokio::time::sleep(LOOK).await;
    }
    match jobs.try_send(Job { ask, asker }) {
        Ok(()) => None,
        Err(mpsc::TrySendError::Full(job) | mpsc::TrySendError::Disconnected(job)) => {
            Some((job.asker, "its last sessions have not begun yet".to_owned()))
        }
    }
}

/// Which program is being served.
#[derive(Default)]
struct Turn(Mutex<Option<Holder>>);

struct Holder {
    run: u64,
    who: String,
    /// Until when its next session is waited for; none while one is on.
    until: Option<Instant>,
}

impl Turn {
    fn holder(&self) -> MutexGuard<'_, Option<Holder>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a program in that has the turn already, or nobody has; else says who has it.
    fn take(&self, run: u64, who: &str) -> Result<(), String> {
        let mut holder = self.holder();
        match &*holder {
            Some(now) if now.run != run && now.until.is_none_or(|until| Instant::now() < until) => {
                Err(now.who.clone())
            }
            _ => {
                *holder = Some(Holder { run, who: who.to_owned(), until: None });
                Ok(())
            }
        }
    }

    fn session_ended(&self, run: u64, last: bool) {
        let mut holder = self.holder();
        if let Some(now) = holder.as_mut().filter(|now| now.run == run) {
            now.until = Some(Instant::now() + RETURN);
            if last {
                *holder = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_program_has_the_turn_until_its_last_session() {
        let turn = Turn::default();
        assert_eq!(turn.take(1, "a"), Ok(()));
        assert_eq!(turn.take(2, "b"), Err("a".to_owned()));
        turn.session_ended(1, false);
        assert_eq!(turn.take(2, "b"), Err("a".to_owned()), "it comes back");
        assert_eq!(turn.take(1, "a"), Ok(()));
        turn.session_ended(1, true);
        assert_eq!(turn.take(2, "b"), Ok(()));
    }

    #[test]
    fn a_program_that_stays_away_loses_the_turn() {
        let turn = Turn::default();
        assert_eq!(turn.take(1, "a"), Ok(()));
        turn.session_ended(1, false);
        turn.holder().as_mut().unwrap().until = Some(Instant::now());
        assert_eq!(turn.take(2, "b"), Ok(()));
    }
}
