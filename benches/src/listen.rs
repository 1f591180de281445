//! The far side of a measurement between two machines: `--listen`.

use anyhow::{Context, Result};
use thalweg::CloseReason;

use crate::pattern::Mismatch;
use crate::session::{self, Served, Setup};

/// Serves one connecting program after the other at `address`; with `once`, the first only.
pub async fn run(address: &str, once: bool) -> Result<()> {
    let mut address = address.to_owned();
    let mut setup = Setup::any();
    let mut announced = false;
    loop {
        let node = setup.node()?;
        let listener = node
            .listen(address.as_str())
            .await
            .with_context(|| format!("listening at {address}"))?;
        // Keeps a port that the system chose for the nodes that follow.
        address = listener.address().to_string();
        if !announced {
            eprintln!("listening at {address}; end with Ctrl-C");
            announced = true;
        }
        let served = session::serve(&node, &listener, &setup).await;
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
