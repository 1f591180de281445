//! `raw-tcp`: two tokio `TcpStream`s on current-thread runtimes, nodelay, `write_all` and
//! `read_exact` into memory made beforehand, no framing, the socket buffers that thalweg uses.
//!
//! A message of several frames is one write of the same bytes. The peer's consumption comes back
//! over the stream itself, so that the same two functions serve two processes of one machine and
//! two machines.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::buffer;
use crate::case::{Case, Program};
use crate::pattern::{self, Way};
use crate::peer::{Duty, Peer};
use crate::pin::Pins;
use crate::stats::{Lap, Recorder, Sample, Usage};

/// The send and receive buffers of every socket: thalweg's own default, so that both are tuned
/// alike.
pub const SOCKET_BUFFER_BYTES: usize = 256 * 1024;

/// How long connecting may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// The word that ends a warm-up and a stream.
const ACKNOWLEDGEMENT: u8 = 0xA5;

/// A runtime like the one that the thalweg rows use.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

fn socket(domain: Domain) -> std::io::Result<TcpSocket> {
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    // Before connect and listen: the window scale is agreed in the handshake.
    socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_nonblocking(true)?;
    Ok(TcpSocket::from_std_stream(socket.into()))
}

/// Listens on exactly this address. Must be called inside a runtime.
pub fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = socket(Domain::for_address(address))?;
    socket.bind(address)?;
    socket.listen(1)
}

pub(super) fn measure(case: &Case, pins: Option<Pins>) -> Result<Sample> {
    let mut peer = Peer::spawn(case, pins.map(|pins| pins.peer), &[])?;
    let address: SocketAddr = peer.control().recv()?;
    let sample = runtime()?.block_on(measure_at(case, address))?;
    peer.finish()?;
    Ok(sample)
}

pub(super) fn serve_parent(mut duty: Duty) -> Result<()> {
    runtime()?.block_on(async {
        let listener = listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        duty.control.send(&listener.local_addr()?)?;
        serve_one(&duty.case, listener).await
    })
}

/// Measures against a peer that listens at `address`.
pub async fn measure_at(case: &Case, address: SocketAddr) -> Result<Sample> {
    let connecting = socket(Domain::for_address(address))?.connect(address);
    let mut stream = tokio::time::timeout(PATIENCE, connecting)
        .await
        .context("connecting takes too long")?
        .with_context(|| format!("connecting to {address}"))?;
    stream.set_nodelay(true)?;
    match case.program {
        Program::Pingpong => ping(case, &mut stream).await,
        Program::Bandwidth => pour(case, &mut stream).await,
    }
}

/// Serves one measuring process.
pub async fn serve_one(case: &Case, listener: TcpListener) -> Result<()> {
    let (mut stream, _) = tokio::time::timeout(PATIENCE, listener.accept())
        .await
        .context("nobody has connected")??;
    stream.set_nodelay(true)?;
    let usage = match case.program {
        Program::Pingpong => pong(case, &mut stream).await?,
        Program::Bandwidth => drain(case, &mut stream).await?,
    };
    stream.write_all(&usage.cpu_us.to_le_bytes()).await?;
    stream.write_all(&usage.waited_us.to_le_bytes()).await?;
    Ok(())
}

async fn peer_usage(stream: &mut TcpStream) -> Result<Usage> {
    Ok(Usage { cpu_us: stream.read_f64_le().await?, waited_us: stream.read_f64_le().await? })
}

async fn ping(case: &Case, stream: &mut TcpStream) -> Result<Sample> {
    let (mut out, mut back) =
        (buffer::filled(case.size_bytes, 0u8)?, buffer::filled(case.size_bytes, 1u8)?);
    for index in 0..case.warmup as u64 {
        pattern::fill(&mut out, 0, index, Way::Out);
        stream.write_all(&out).await?;
        stream.read_exact(&mut back).await?;
        pattern::verify(&back, 0, index, Way::Back)?;
    }
    let mut recorder = Recorder::new(case.iters, Lap::RoundTrip)?;
    let before = Usage::now();
    let start = Instant::now();
    recorder.start();
    for _ in 0..case.iters {
        stream.write_all(&out).await?;
        stream.read_exact(&mut back).await?;
        recorder.lap();
    }
    let wall = start.elapsed();
    let here = before.since();
    let there = peer_usage(stream).await?;
    Ok(Sample::latency(recorder, case.messages(), &[here, there], wall))
}

async fn pong(case: &Case, stream: &mut TcpStream) -> Result<Usage> {
    let (mut out, mut back) =
        (buffer::filled(case.size_bytes, 1u8)?, buffer::filled(case.size_bytes, 0u8)?);
    for index in 0..case.warmup as u64 {
        stream.read_exact(&mut out).await?;
        pattern::verify(&out, 0, index, Way::Out)?;
        pattern::fill(&mut back, 0, index, Way::Back);
        stream.write_all(&back).await?;
    }
    let before = Usage::now();
    for _ in 0..case.iters {
        stream.read_exact(&mut out).await?;
        stream.write_all(&back).await?;
    }
    Ok(before.since())
}

async fn pour(case: &Case, stream: &mut TcpStream) -> Result<Sample> {
    let mut out = buffer::filled(case.size_bytes, 0u8)?;
    for index in 0..case.warmup as u64 {
        pattern::fill(&mut out, 0, index, Way::Out);
        stream.write_all(&out).await?;
    }
    acknowledged(stream).await?;
    let before = Usage::now();
    let start = Instant::now();
    for _ in 0..case.iters {
        stream.write_all(&out).await?;
    }
    acknowledged(stream).await?;
    let wall = start.elapsed();
    let here = before.since();
    let there = peer_usage(stream).await?;
    Ok(Sample::stream(&[here, there], wall))
}

async fn drain(case: &Case, stream: &mut TcpStream) -> Result<Usage> {
    let mut out = buffer::filled(case.size_bytes, 1u8)?;
    for index in 0..case.warmup as u64 {
        stream.read_exact(&mut out).await?;
        pattern::verify(&out, 0, index, Way::Out)?;
    }
    stream.write_u8(ACKNOWLEDGEMENT).await?;
    let before = Usage::now();
    for _ in 0..case.iters {
        stream.read_exact(&mut out).await?;
    }
    stream.write_u8(ACKNOWLEDGEMENT).await?;
    Ok(before.since())
}

async fn acknowledged(stream: &mut TcpStream) -> Result<()> {
    let word = stream.read_u8().await?;
    ensure!(word == ACKNOWLEDGEMENT, "the acknowledgement arrived as {word:#04x}");
    Ok(())
}
