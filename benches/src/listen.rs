//! The far side of a measurement between two machines: `--listen`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use thalweg::{CloseReason, Endpoint, ErrorKind, Listener, Node};

use crate::pattern::Mismatch;
use crate::session::{self, Served, Setup};

/// How long the address of the last node may remain taken.
const REBIND: Duration = Duration::from_secs(5);

/// How long a node that one connector asked for waits for it to come back.
const EXPECTED: Duration = Duration::from_secs(10);

/// Serves one connecting program after the other at `address`; with `once`, the first only.
pub async fn run(address: &str, once: bool) -> Result<()> {
    let mut address = address.to_owned();
    let mut setup = Setup::any();
    let mut patience = Duration::ZERO;
    loop {
        let node = setup.node()?;
        let listener = listen(&node, &address, patience).await?;
        // Keeps a port that the system chose for the nodes that follow.
        address = listener.address().to_string();
        if patience.is_zero() {
            eprintln!("listening at {address}; end with Ctrl-C");
            patience = REBIND;
        }
        let Some(endpoint) = accept(&listener, &setup).await? else {
            setup = Setup::any();
            continue;
        };
        let served = session::serve(&node, endpoint, listener.address(), &setup).await;
        drop(listener);
        setup = Setup::any();
        match served {
            Ok(Served::Needs(wanted, endpoint)) => {
                setup = wanted;
                if let Err(error) = session::ask_again(&endpoint).await {
                    eprintln!("a session ended early: {error:#}");
                }
            }
            Ok(Served::Done(last)) if once && last => {
                node.close(CloseReason::default()).await;
                return Ok(());
            }
            Ok(Served::Done(_)) => {}
            Err(error) if once || error.downcast_ref::<Mismatch>().is_some() => return Err(error),
            Err(error) => eprintln!("a session failed: {error:#}"),
        }
        node.close(CloseReason::default()).await;
    }
}

/// Waits for the next connector; a node made for one particular connector waits for a while only,
/// and then gives `None`.
async fn accept(listener: &Listener, setup: &Setup) -> Result<Option<Endpoint>> {
    let accepting = listener.accept();
    if *setup == Setup::any() {
        return accepting.await.map(Some).context("accepting");
    }
    match tokio::time::timeout(EXPECTED, accepting).await {
        Ok(accepted) => accepted.map(Some).context("accepting"),
        Err(_) => Ok(None),
    }
}

/// Listens; an address that is taken is tried again for as long as `patience`.
async fn listen(node: &Node, address: &str, patience: Duration) -> Result<Listener> {
    let start = Instant::now();
    loop {
        match node.listen(address).await {
            Err(error) if error.kind() == ErrorKind::AddressInUse && start.elapsed() < patience => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            answer => return answer.with_context(|| format!("listening at {address}")),
        }
    }
}
