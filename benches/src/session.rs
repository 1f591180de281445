//! Measuring thalweg itself: one session is one endpoint between two nodes made for the occasion.
//!
//! A session at a `--listen`er begins at its desk: the connector says what will be measured, and
//! is told the port at which a node made for that waits for it. In the session its first message
//! says so once more, so that nobody else is taken for it. The last message brings the consumption
//! of the serving side.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::LazyLock;
use std::task::Poll;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thalweg::{
    Address, CloseReason, Config, Endpoint, Failed, Frame, INLINE_MAX, LinkKind, Message, Node,
};

use crate::baseline::raw_tcp;
use crate::buffer;
use crate::case::{Case, Memory, Program, Subject, Transport, Wake};
use crate::pattern::{self, Way};
use crate::stats::{Lap, Recorder, Sample, Usage};

/// How long connecting and each exchange of words may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a node has to be configured with before it can serve a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setup {
    transport: Transport,
    wake: Wake,
    single_copy: bool,
}

impl Setup {
    /// What a case asks for; `None` if it is a baseline.
    pub fn of(case: &Case) -> Option<Setup> {
        match &case.subject {
            Subject::Thalweg { transport, wake, single_copy, .. } => {
                Some(Setup { transport: transport.clone(), wake: *wake, single_copy: *single_copy })
            }
            Subject::Baseline(_) => None,
        }
    }

    fn config(&self) -> thalweg::Result<Config> {
        let wake = match self.wake {
            Wake::Spin => thalweg::Wake::Spin,
            Wake::Park => thalweg::Wake::Park,
            Wake::Adaptive => thalweg::Wake::Adaptive,
        };
        let config = Config::from_env()?.wake(wake).single_copy(self.single_copy);
        Ok(match self.transport.link() {
            Some(link) => config.transports([link]),
            None => config,
        })
    }

    /// A node so configured. Must be called inside a runtime.
    pub fn node(&self) -> Result<Node> {
        self.config().and_then(Node::new).context("making a node")
    }
}

/// What a connector says at the desk of a listener.
#[derive(Serialize, Deserialize)]
pub struct Ask {
    /// What will be measured.
    pub case: Case,
    /// Tells the sessions of one program from those of others.
    pub run: u64,
    /// Whether the connector will not come back after this session.
    pub last: bool,
}

/// The answer to it, and to the case that opens a session.
#[derive(Serialize, Deserialize)]
pub enum Reply {
    /// Begin.
    Go,
    /// The session is at this port: a node that suits it, or a bare socket for `raw-tcp`.
    At(u16),
    /// Cannot be done here, or not now, and why.
    Refused(String),
}

/// What a session gave.
pub struct Outcome {
    /// The figures.
    pub sample: Sample,
    /// The route that the endpoint chose, in words; none for a baseline.
    pub route: Option<String>,
    /// The link that carries messages; none for a baseline.
    pub link: Option<String>,
}

/// A node for words at a desk, whatever is measured; sleeps at once, beside a measurement.
pub fn desk_node() -> Result<Node> {
    let config = Config::from_env()?.transports([LinkKind::Shm, LinkKind::Tcp]);
    Node::new(config.wake(thalweg::Wake::Park)).context("making a node")
}

/// Asks the listener at `address` for a session: host and port of the place where it is ready.
/// `last`: this process will not ask again.
pub async fn arrange(case: &Case, address: &str, last: bool) -> Result<(String, u16)> {
    let node = desk_node()?;
    let desk = connect(&node, address).await?;
    say(&desk, &Ask { case: case.clone(), run: own_run(), last }).await?;
    let reply = hear(&desk).await?;
    // The listener need not hear the goodbye.
    let _ = desk.close(CloseReason::default()).await;
    node.close(CloseReason::default()).await;
    match reply {
        Reply::At(port) => Ok((address.parse::<Address>()?.host().to_owned(), port)),
        Reply::Refused(why) => bail!("the listener refuses: {why}"),
        Reply::Go => bail!("the listener answers something else than was asked"),
    }
}

/// A number that no other program has.
fn own_run() -> u64 {
    static RUN: LazyLock<u64> = LazyLock::new(|| RandomState::new().build_hasher().finish());
    *RUN
}

/// Measures `case` against the session at `address`.
pub async fn measure(case: &Case, address: &str) -> Result<Outcome> {
    let setup = Setup::of(case).context("only a node can be measured so")?;
    let limit = time_limit(case);
    let node = setup.node()?;
    let outcome = tokio::time::timeout(limit, measure_on(&node, case, address))
        .await
        .with_context(|| format!("no end after {} s", limit.as_secs()))?;
    node.close(CloseReason::default()).await;
    outcome
}

async fn measure_on(node: &Node, case: &Case, address: &str) -> Result<Outcome> {
    let endpoint = agree(node, case, address).await?;
    let sample = match &case.subject {
        Subject::Thalweg { memory, .. } => {
            let mut side = Side::new(node, &endpoint, case, *memory)?;
            match case.program {
                Program::Pingpong => side.ping().await?,
                Program::Bandwidth => side.pour().await?,
            }
        }
        Subject::Baseline(_) => bail!("only the raw-tcp baseline can be measured between machines"),
    };
    let route = endpoint.route();
    let link = Some(route.link().name().to_owned());
    endpoint.close(CloseReason::default()).await.context("closing")?;
    Ok(Outcome { sample, route: Some(route.to_string()), link })
}

/// Measures `raw-tcp` against the machine where a listener of ours runs.
pub async fn measure_raw_tcp(case: &Case, host: &str, port: u16) -> Result<Outcome> {
    let sample = raw_tcp::measure_at(case, resolve(host, port).await?).await?;
    Ok(Outcome { sample, route: None, link: None })
}

/// An address as people write it.
pub fn spell(host: &str, port: u16) -> String {
    match host.contains(':') {
        true => format!("thalweg://[{host}]:{port}"),
        false => format!("thalweg://{host}:{port}"),
    }
}

/// The first address of a host.
pub async fn resolve(host: &str, port: u16) -> Result<SocketAddr> {
    if let Ok(ip) = host.trim_matches(['[', ']']).parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, port));
    }
    let found = tokio::net::lookup_host((host, port)).await?.next();
    found.with_context(|| format!("{host} has no address"))
}

/// Connects to a session and says what will be measured.
async fn agree(node: &Node, case: &Case, address: &str) -> Result<Endpoint> {
    let endpoint = connect(node, address).await?;
    say(&endpoint, case).await?;
    match hear(&endpoint).await? {
        Reply::Go => Ok(endpoint),
        Reply::Refused(why) => bail!("the peer refuses: {why}"),
        Reply::At(_) => bail!("the peer answers something else than was asked"),
    }
}

async fn connect(node: &Node, address: &str) -> Result<Endpoint> {
    node.connect(address).await.with_context(|| format!("connecting to {address}"))
}

/// Serves the connector at the other end of `endpoint`, which must have come for `case`.
pub async fn serve(node: &Node, endpoint: Endpoint, case: &Case) -> Result<()> {
    let wanted: Case = hear(&endpoint).await.context("hearing what is to be measured")?;
    let Subject::Thalweg { memory, .. } = &case.subject else { bail!("no session of ours") };
    if wanted != *case {
        say(&endpoint, &Reply::Refused("somebody else is expected here".to_owned())).await?;
        endpoint.close(CloseReason::default()).await?;
        bail!("somebody else came");
    }
    let mut side = match Side::new(node, &endpoint, case, *memory) {
        Ok(side) => side,
        Err(error) => {
            say(&endpoint, &Reply::Refused(format!("{error:#}"))).await?;
            endpoint.close(CloseReason::default()).await?;
            return Err(error);
        }
    };
    say(&endpoint, &Reply::Go).await?;
    let mut served = pin!(async {
        match case.program {
            Program::Pingpong => side.pong().await,
            Program::Bandwidth => side.drain().await,
        }
    });
    let mut stalled = pin!(stall(&endpoint, case));
    poll_fn(|cx| match served.as_mut().poll(cx) {
        Poll::Pending => stalled.as_mut().poll(cx).map(Err),
        served => served,
    })
    .await?;
    // The connector closes after it has read the last message.
    let _ = tokio::time::timeout(PATIENCE, endpoint.closed()).await;
    Ok(())
}

/// Ends when no message has come or gone for so long that the connector must have been stopped
/// (twenty seconds, and the bytes of a message at 5 MB/s), or when all of it takes too long.
async fn stall(endpoint: &Endpoint, case: &Case) -> anyhow::Error {
    let limit = PATIENCE + Duration::from_secs_f64(case.size_bytes as f64 / 5e6);
    let moved = || {
        let stats = endpoint.stats();
        (stats.messages_sent, stats.messages_received)
    };
    let end = Instant::now() + time_limit(case);
    let mut before = moved();
    loop {
        tokio::time::sleep(limit).await;
        let now = moved();
        if Instant::now() > end {
            return anyhow!("no end of it");
        }
        if now == before {
            return anyhow!("the connector has been silent for {} s", limit.as_secs());
        }
        before = now;
    }
}

/// A generous bound, so that a fault ends the program instead of hanging it: two minutes, and for
/// each message a millisecond and its bytes at 20 MB/s.
pub fn time_limit(case: &Case) -> Duration {
    let messages = (case.messages() + 2 * case.warmup) as f64;
    Duration::from_secs_f64(120.0 + messages * (1e-3 + case.size_bytes as f64 / 20e6))
}

/// Sends one word of the agreement.
pub async fn say<T: Serialize>(endpoint: &Endpoint, word: &T) -> Result<()> {
    let message = Message::from(serde_json::to_vec(word)?);
    tokio::time::timeout(PATIENCE, endpoint.send(message))
        .await
        .context("the peer is silent")??;
    Ok(())
}

/// Receives one word of the agreement.
async fn hear<T: DeserializeOwned>(endpoint: &Endpoint) -> Result<T> {
    hear_within(endpoint, PATIENCE).await
}

/// Receives one word of the agreement, which must come within `patience`.
pub async fn hear_within<T: DeserializeOwned>(
    endpoint: &Endpoint,
    patience: Duration,
) -> Result<T> {
    let message =
        tokio::time::timeout(patience, endpoint.recv()).await.context("the peer is silent")??;
    serde_json::from_slice(&message.to_vec()?).context("the peer is not this program")
}

/// One side of a session, with what it sends.
struct Side<'a> {
    node: &'a Node,
    endpoint: &'a Endpoint,
    case: &'a Case,
    memory: Memory,
    /// The frames of a measured message in host memory, shared by all of them.
    frames: Vec<Bytes>,
}

impl<'a> Side<'a> {
    fn new(node: &'a Node, endpoint: &'a Endpoint, case: &'a Case, memory: Memory) -> Result<Self> {
        // Loans are made when they are sent.
        let lens = if memory == Memory::Host { case.frames.as_slice() } else { &[] };
        let frames = lens.iter().map(|&len| Ok(Bytes::from(buffer::filled(len, 0x5A)?)));
        let frames = frames.collect::<Result<_>>()?;
        Ok(Side { node, endpoint, case, memory, frames })
    }

    async fn ping(&mut self) -> Result<Sample> {
        for index in 0..self.case.warmup as u64 {
            let out = self.patterned(index, Way::Out)?;
            let back = exchange(self.endpoint, out).await?;
            verify(&back, self.case, index, Way::Back)?;
        }
        let mut recorder = Recorder::new(self.case.iters, Lap::RoundTrip)?;
        let before = Usage::now();
        let start = Instant::now();
        recorder.start();
        if self.sends_end_at_once() {
            // As other programs of this kind do: one message serves for all, and what came is looked
            // at while the next one is on its way.
            let mut message = self.message()?;
            let mut back = None;
            for _ in 0..self.case.iters {
                message = self.endpoint.send(message).await?;
                self.consume_last(&mut back)?;
                back = Some(self.endpoint.recv().await?);
                recorder.lap();
            }
            self.consume_last(&mut back)?;
        } else {
            for _ in 0..self.case.iters {
                let out = self.message()?;
                let back = exchange(self.endpoint, out).await?;
                self.consume(back)?;
                recorder.lap();
            }
        }
        let wall = start.elapsed();
        let here = before.since();
        let there: Usage = hear(self.endpoint).await?;
        Ok(Sample::latency(recorder, self.case.messages(), &[here, there], wall))
    }

    /// Whether every link lets go of a message before the peer has answered it: then a plain send
    /// followed by a plain receive is all there is to do.
    fn sends_end_at_once(&self) -> bool {
        self.memory == Memory::Host && self.case.size_bytes <= INLINE_MAX
    }

    async fn pong(&mut self) -> Result<()> {
        let mut sent = None;
        for index in 0..self.case.warmup as u64 {
            let out = received(self.endpoint, &mut sent).await?;
            verify(&out, self.case, index, Way::Out)?;
            drop(out);
            finish(&mut sent).await?;
            let back = self.patterned(index, Way::Back)?;
            sent = begin(self.endpoint, back).await?;
        }
        finish(&mut sent).await?;
        let before = Usage::now();
        if self.sends_end_at_once() {
            let mut message = self.message()?;
            for _ in 0..self.case.iters {
                let out = self.endpoint.recv().await?;
                message = self.endpoint.send(message).await?;
                self.consume(out)?;
            }
        } else {
            for _ in 0..self.case.iters {
                let out = received(self.endpoint, &mut sent).await?;
                self.consume(out)?;
                finish(&mut sent).await?;
                let back = self.message()?;
                sent = begin(self.endpoint, back).await?;
            }
            finish(&mut sent).await?;
        }
        say(self.endpoint, &before.since()).await
    }

    async fn pour(&mut self) -> Result<Sample> {
        for index in 0..self.case.warmup as u64 {
            let out = self.patterned(index, Way::Out)?;
            self.endpoint.send(out).await?;
        }
        let () = hear(self.endpoint).await?;
        let before = Usage::now();
        let start = Instant::now();
        self.stream().await?;
        let () = hear(self.endpoint).await?;
        let wall = start.elapsed();
        let here = before.since();
        let there: Usage = hear(self.endpoint).await?;
        Ok(Sample::stream(&[here, there], wall))
    }

    /// Sends every message, at most `window` of them unfinished.
    async fn stream(&mut self) -> Result<()> {
        if self.sends_end_at_once() {
            for _ in 0..self.case.iters {
                self.endpoint.send(self.message()?).await?;
            }
            return Ok(());
        }
        let mut unfinished = VecDeque::with_capacity(self.case.window);
        for _ in 0..self.case.iters {
            let out = self.message()?;
            if let Some(sending) = begin(self.endpoint, out).await? {
                unfinished.push_back(sending);
                if unfinished.len() >= self.case.window
                    && let Some(oldest) = unfinished.pop_front()
                {
                    oldest.await?;
                }
            }
        }
        for sending in unfinished {
            sending.await?;
        }
        Ok(())
    }

    async fn drain(&mut self) -> Result<()> {
        for index in 0..self.case.warmup as u64 {
            let out = self.endpoint.recv().await?;
            verify(&out, self.case, index, Way::Out)?;
        }
        say(self.endpoint, &()).await?;
        let before = Usage::now();
        for _ in 0..self.case.iters {
            let out = self.endpoint.recv().await?;
            self.consume(out)?;
        }
        say(self.endpoint, &()).await?;
        say(self.endpoint, &before.since()).await
    }

    /// The next measured message. In loaned memory its first and last byte are written.
    #[inline]
    fn message(&self) -> Result<Message> {
        match (self.memory, self.frames.as_slice()) {
            (Memory::Host, [one]) if one.len() <= INLINE_MAX => Ok(Message::copy_from_slice(one)),
            (Memory::Host, [one]) => Ok(Message::from(one.clone())),
            (Memory::Host, frames) => Ok(frames.iter().cloned().map(Frame::from).collect()),
            (Memory::Loaned, _) => self.loaned(|loan, _| {
                if let Some(first) = loan.first_mut() {
                    *first = 1;
                }
                if let Some(last) = loan.last_mut() {
                    *last = 2;
                }
            }),
        }
    }

    /// A warm-up message, every byte of which depends on its place.
    fn patterned(&self, index: u64, way: Way) -> Result<Message> {
        match self.memory {
            Memory::Host => {
                let mut offset = 0;
                let frames = self.case.frames.iter().map(|&len| {
                    let mut frame = buffer::filled(len, 0)?;
                    pattern::fill(&mut frame, offset, index, way);
                    offset += len;
                    Ok(Frame::from(Bytes::from(frame)))
                });
                frames.collect()
            }
            Memory::Loaned => self.loaned(|loan, offset| pattern::fill(loan, offset, index, way)),
        }
    }

    /// A message whose frames are loans, filled in by `fill`, which is given each frame and its
    /// place in the message.
    #[inline]
    fn loaned(&self, mut fill: impl FnMut(&mut [u8], usize)) -> Result<Message> {
        if let [len] = *self.case.frames {
            let mut loan = self.node.loan(len)?;
            fill(&mut loan, 0);
            return Ok(Message::from(loan));
        }
        let mut message = Message::new();
        let mut offset = 0;
        for &len in &self.case.frames {
            let mut loan = self.node.loan(len)?;
            fill(&mut loan, offset);
            offset += len;
            message.push(loan);
        }
        Ok(message)
    }

    /// As `consume`, if there is one.
    #[inline]
    fn consume_last(&self, message: &mut Option<Message>) -> Result<()> {
        message.take().map_or(Ok(()), |message| self.consume(message))
    }

    /// Does with a measured message what the row says: a loan's first and last byte are read, then
    /// it is given back.
    #[inline]
    fn consume(&self, message: Message) -> Result<()> {
        ensure!(message.len_bytes() == self.case.size_bytes, "a message of another length");
        if self.memory == Memory::Loaned {
            let mut byte = [0];
            for frame in message.frames().iter().filter(|frame| !frame.is_empty()) {
                frame.copy_range(0, &mut byte)?;
                frame.copy_range(frame.len() - 1, &mut byte)?;
                std::hint::black_box(byte);
            }
        }
        Ok(())
    }
}

/// A send in progress.
trait Sending: Future<Output = Result<Message, Failed<Message>>> + Unpin {}

impl<F: Future<Output = Result<Message, Failed<Message>>> + Unpin> Sending for F {}

/// Starts sending: `None` if that was all.
#[inline]
async fn begin(endpoint: &Endpoint, message: Message) -> Result<Option<impl Sending>> {
    let mut sending = endpoint.send(message);
    let first = poll_fn(|cx| Poll::Ready(Pin::new(&mut sending).poll(cx))).await;
    match first {
        Poll::Ready(Ok(_)) => Ok(None),
        Poll::Ready(Err(failed)) => Err(failed.error.into()),
        Poll::Pending => Ok(Some(sending)),
    }
}

/// Receives, and meanwhile goes on with what is still being sent.
#[inline]
async fn received(endpoint: &Endpoint, sent: &mut Option<impl Sending>) -> Result<Message> {
    let mut receiving = endpoint.recv();
    poll_fn(|cx| {
        if let Some(sending) = sent
            && let Poll::Ready(result) = Pin::new(sending).poll(cx)
        {
            *sent = None;
            if let Err(failed) = result {
                return Poll::Ready(Err(failed.error.into()));
            }
        }
        Pin::new(&mut receiving).poll(cx).map(|result| result.map_err(anyhow::Error::from))
    })
    .await
}

/// Sends a message and receives the answer. A send that ends only when the peer lets go of the
/// message (a loan) goes on beside the receive.
#[inline]
async fn exchange(endpoint: &Endpoint, message: Message) -> Result<Message> {
    let mut sent = begin(endpoint, message).await?;
    let answer = received(endpoint, &mut sent).await?;
    finish(&mut sent).await?;
    Ok(answer)
}

/// Waits for a send to end. After an answer this returns at once: the peer answers when it has let
/// go of what it got.
#[inline]
async fn finish(sent: &mut Option<impl Sending>) -> Result<()> {
    if let Some(sending) = sent.take() {
        sending.await?;
    }
    Ok(())
}

/// Compares a warm-up message with what was sent, byte for byte.
fn verify(message: &Message, case: &Case, index: u64, way: Way) -> Result<()> {
    let lens: Vec<usize> = message.frames().iter().map(Frame::len).collect();
    if lens != case.frames {
        let text = format!("warm-up message {index} has frames of {lens:?} bytes");
        return Err(pattern::Mismatch::new(text).into());
    }
    let mut offset = 0;
    for frame in message.frames() {
        match frame.as_slice() {
            Some(bytes) => pattern::verify(bytes, offset, index, way)?,
            None => pattern::verify(&frame.to_vec()?, offset, index, way)?,
        }
        offset += frame.len();
    }
    Ok(())
}
