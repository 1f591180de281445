//! Settings: a builder, and the same settings from `THALWEG_*` environment variables.

use std::ffi::OsString;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::link::LinkKind;
use crate::link::hardware::Hardware;
use crate::link::verbs::RAILS_MAX;
use crate::memory::Allocator;
use crate::route::auto;

/// The kernel counts in seconds, and needs one for each of silence, probe and answer.
/// No window and no limit of a message is smaller, in bytes.
const SIZE_MIN: u64 = 4096;
const KEEPALIVE_MIN: Duration = Duration::from_secs(3);

/// Points in time beyond this may not be representable.
const TIME_MAX: Duration = Duration::from_secs(10 * 366 * 24 * 60 * 60);

/// How an operation waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Wake {
    /// Polls for up to [`Config::spin_limit`], then sleeps. Lowest latency; holds a core while it
    /// waits.
    Spin,
    /// Sleeps at once. Costs a system call to wake.
    Park,
    /// Polls for up to [`Config::adaptive_spin`] where that has paid lately, then sleeps.
    Adaptive,
}

impl Wake {
    /// `spin`, `park` or `adaptive`.
    pub const fn name(self) -> &'static str {
        match self {
            Wake::Spin => "spin",
            Wake::Park => "park",
            Wake::Adaptive => "adaptive",
        }
    }
}

impl FromStr for Wake {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Wake::Spin, Wake::Park, Wake::Adaptive]
            .into_iter()
            .find(|wake| wake.name() == text)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidInput,
                    Phase::Setup,
                    format!("{text:?} is no way to wait"),
                )
                .with_hint("spin, park or adaptive")
            })
    }
}

/// The name that stands for the library's own choice of links.
const AUTO: &str = "auto";

/// The links that may be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Transports {
    /// Those that are worth it on this machine.
    Auto,
    /// These, best first.
    Named(Vec<LinkKind>),
}

impl Transports {
    /// Best first.
    pub fn order(&self) -> &[LinkKind] {
        match self {
            Transports::Auto => &auto::ORDER,
            Transports::Named(links) => links,
        }
    }

    /// Whether somebody named this link.
    pub fn names(&self, link: LinkKind) -> bool {
        matches!(self, Transports::Named(links) if links.contains(&link))
    }
}

/// The settings of a [`crate::Node`]. Every setting has a default that suits a scheduler.
///
/// ```
/// use std::time::Duration;
/// use thalweg::{Config, LinkKind, Wake};
/// let config = Config::new()
///     .transports([LinkKind::Shm, LinkKind::Tcp])
///     .wake(Wake::Park)
///     .connect_timeout(Duration::from_secs(5));
/// # let _ = config;
/// ```
#[derive(Clone)]
pub struct Config {
    pub(crate) transports: Transports,
    /// Looks for hardware where the choice of links depends on it.
    pub(crate) hardware: fn() -> Hardware,
    /// The transports of UCX's that are left out where nobody has named it.
    pub(crate) ucx_without: &'static [&'static str],
    pub(crate) wake: Wake,
    pub(crate) spin_limit: Duration,
    pub(crate) adaptive_spin: Duration,
    pub(crate) hello: Bytes,
    pub(crate) connect_timeout: Duration,
    pub(crate) handshake_timeout: Duration,
    pub(crate) close_timeout: Duration,
    pub(crate) keepalive: Duration,
    pub(crate) backlog: u32,
    pub(crate) max_handshakes: usize,
    pub(crate) message_window_bytes: u64,
    pub(crate) tag_window_bytes: u64,
    pub(crate) node_budget_bytes: u64,
    pub(crate) max_message_bytes: u64,
    pub(crate) max_frames: u32,
    pub(crate) eager_max_bytes: usize,
    pub(crate) tcp_buffer_bytes: usize,
    pub(crate) single_copy: bool,
    pub(crate) peer_write: bool,
    pub(crate) loans: bool,
    pub(crate) ptracer_any: bool,
    pub(crate) loan_pool_bytes: usize,
    pub(crate) host_pool_bytes: usize,
    pub(crate) require_encryption: bool,
    pub(crate) verbs_devices: Vec<String>,
    pub(crate) verbs_rails: usize,
    pub(crate) allocator: Option<Arc<dyn Allocator>>,
    #[cfg(feature = "mock")]
    pub(crate) mock: crate::link::mock::MockPlan,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            transports: Transports::Auto,
            hardware: Hardware::look,
            ucx_without: crate::link::ucx::UNASKED_WITHOUT,
            wake: Wake::Adaptive,
            spin_limit: Duration::from_millis(100),
            adaptive_spin: Duration::from_micros(50),
            hello: Bytes::new(),
            connect_timeout: Duration::from_secs(30),
            handshake_timeout: Duration::from_secs(10),
            close_timeout: Duration::from_secs(5),
            keepalive: Duration::from_secs(30),
            backlog: 4096,
            max_handshakes: 1024,
            message_window_bytes: 64 << 20,
            tag_window_bytes: 16 << 20,
            node_budget_bytes: 2 << 30,
            max_message_bytes: 16 << 30,
            max_frames: 1 << 20,
            eager_max_bytes: 64 << 10,
            tcp_buffer_bytes: 256 << 10,
            single_copy: true,
            peer_write: true,
            loans: true,
            ptracer_any: false,
            loan_pool_bytes: 1 << 30,
            host_pool_bytes: 256 << 20,
            require_encryption: false,
            verbs_devices: Vec::new(),
            verbs_rails: RAILS_MAX,
            allocator: None,
            #[cfg(feature = "mock")]
            mock: crate::link::mock::MockPlan::default(),
        }
    }
}

macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $type:ty;)*) => {
        $(
            $(#[$doc])*
            pub fn $name(mut self, $name: $type) -> Self {
                self.$name = $name;
                self
            }
        )*
    };
}

impl Config {
    /// The defaults.
    pub fn new() -> Self {
        Config::default()
    }

    /// The links that may be used, best first. `THALWEG_TRANSPORTS`, for instance `shm,tcp`.
    /// Default: as [`Config::auto_transports`] says.
    pub fn transports(mut self, transports: impl IntoIterator<Item = LinkKind>) -> Self {
        let mut links = Vec::new();
        for kind in transports {
            if !links.contains(&kind) {
                links.push(kind);
            }
        }
        self.transports = Transports::Named(links);
        self
    }

    /// Leaves the choice of links to the library, which is the default: `shm` on one host; `verbs`
    /// where the kernel shows RDMA hardware with a port that is up, or where
    /// [`Config::verbs_devices`] names devices; `ucx` where there is hardware that `verbs` does not
    /// reach, and both sides have it; and `tcp`. Devices made of software (soft-RoCE, SoftiWARP) do
    /// not count. [`crate::Node::capabilities`] says what was found, and what was not looked for.
    /// `THALWEG_TRANSPORTS=auto`.
    pub fn auto_transports(mut self) -> Self {
        self.transports = Transports::Auto;
        self
    }

    /// As [`Config::transports`], by the names of the links; `auto` alone is
    /// [`Config::auto_transports`].
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`] for a name of no link, and for `auto` beside others.
    pub fn transports_by_name<S: AsRef<str>>(
        self,
        names: impl IntoIterator<Item = S>,
    ) -> Result<Self> {
        match links_named(names) {
            Ok(Some(links)) => Ok(self.transports(links)),
            Ok(None) => Ok(self.auto_transports()),
            Err(what) => Err(Error::new(ErrorKind::InvalidInput, Phase::Setup, what)),
        }
    }

    /// What the peer is told at connect, both ways: identity, version, whatever the application
    /// likes. At most 16 KiB; longer ones are refused when the node is made. Default: empty.
    pub fn hello(mut self, hello: impl Into<Bytes>) -> Self {
        self.hello = hello.into();
        self
    }

    /// The RDMA devices that the link `verbs` may use, by name; none named: all.
    /// `THALWEG_VERBS_DEVICES`, for instance `mlx5_0,mlx5_1`. Default: all.
    pub fn verbs_devices(mut self, names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.verbs_devices = names.into_iter().map(Into::into).collect();
        self
    }

    /// Where received frames of 4 KiB and more land. Default: a pool of the node's own.
    pub fn allocator(mut self, allocator: Arc<dyn Allocator>) -> Self {
        self.allocator = Some(allocator);
        self
    }

    /// How the mock link misbehaves.
    #[cfg(feature = "mock")]
    pub fn mock(mut self, plan: crate::link::mock::MockPlan) -> Self {
        self.mock = plan;
        self
    }

    setters! {
        /// How operations wait. `THALWEG_WAKE`. Default: adaptive.
        wake: Wake;
        /// The longest time that [`Wake::Spin`] polls without success. `THALWEG_SPIN_LIMIT_US`.
        /// Default: 100 ms.
        spin_limit: Duration;
        /// The longest time that [`Wake::Adaptive`] polls without success.
        /// `THALWEG_ADAPTIVE_SPIN_US`. Default: 50 µs.
        adaptive_spin: Duration;
        /// The time a whole connect may take, name resolution and link set-up included.
        /// `THALWEG_CONNECT_TIMEOUT_MS`. Default: 30 s.
        connect_timeout: Duration;
        /// The time that a stranger who connected to a listener has to complete the handshake.
        /// `THALWEG_HANDSHAKE_TIMEOUT_MS`. Default: 10 s.
        handshake_timeout: Duration;
        /// The longest time that closing waits for what is in flight and for the peer's answer.
        /// `THALWEG_CLOSE_TIMEOUT_MS`. Default: 5 s.
        close_timeout: Duration;
        /// How long the network may be silent before a peer on another host counts as lost.
        /// `THALWEG_KEEPALIVE_MS`. Default: 30 s, at least 3 s.
        keepalive: Duration;
        /// The listen backlog (the kernel's `somaxconn` caps it). `THALWEG_BACKLOG`. Default: 4096.
        backlog: u32;
        /// How many strangers may be in the handshake at once; more wait in the backlog.
        /// `THALWEG_MAX_HANDSHAKES`. Default: 1024.
        max_handshakes: usize;
        /// Credit of one endpoint for messages that were received and not yet taken, in bytes. A
        /// larger message is still admitted, alone. `THALWEG_MESSAGE_WINDOW`. Default: 64 MiB.
        message_window_bytes: u64;
        /// The same for tagged payloads without a matching receive. `THALWEG_TAG_WINDOW`.
        /// Default: 16 MiB.
        tag_window_bytes: u64;
        /// What the windows of all endpoints may add up to; later endpoints get smaller windows,
        /// down to 64 KiB. `THALWEG_NODE_BUDGET`. Default: 2 GiB.
        node_budget_bytes: u64;
        /// The largest message that is accepted, in bytes, at least 4 KiB. `THALWEG_MAX_MESSAGE`.
        /// Default: 16 GiB.
        max_message_bytes: u64;
        /// The largest number of frames in a message. `THALWEG_MAX_FRAMES`. Default: 1,048,576.
        max_frames: u32;
        /// Tagged payloads up to this size may travel before a receive matches them.
        /// `THALWEG_EAGER_MAX`. Default: 64 KiB.
        eager_max_bytes: usize;
        /// Send and receive buffer of TCP sockets, in bytes; 0 leaves it to the kernel.
        /// `THALWEG_TCP_BUFFER`. Default: 256 KiB (on loopback 1.3 times the kernel's choice).
        tcp_buffer_bytes: usize;
        /// Whether payloads may be copied straight out of the peer's memory
        /// (`process_vm_readv`). `THALWEG_SINGLE_COPY`, 0 or 1. Default: yes, where it works.
        single_copy: bool;
        /// Whether both sides may copy a long message at once: while the receiver reads it out of
        /// the sender's memory, the sender writes a part of it into the receiver's
        /// (`process_vm_writev`). Both sides must allow it, and single copy.
        /// `THALWEG_PEER_WRITE`, 0 or 1. Default: yes, where it works.
        peer_write: bool;
        /// Whether loans are handed over by reference. `THALWEG_LOANS`, 0 or 1. Default: yes.
        loans: bool;
        /// Whether any process of this user may read and write this one's memory
        /// (`PR_SET_PTRACER_ANY`), which single copy needs where Yama restricts ptrace.
        /// `THALWEG_PTRACER_ANY`, 0 or 1. Default: no.
        ptracer_any: bool;
        /// Limit of the node's shared memory (loans and staging), in bytes. `THALWEG_LOAN_POOL`.
        /// Default: 1 GiB.
        loan_pool_bytes: usize;
        /// How much unused memory the node keeps for what is received next, in bytes.
        /// `THALWEG_HOST_POOL`. Default: 256 MiB.
        host_pool_bytes: usize;
        /// By how many pairs of ports, of one device or several, a connection over `verbs` may read
        /// long payloads at a time: 1 to 4. What both sides allow counts. Ports that are much slower
        /// than the best one are left out, and those that fail are done without.
        /// `THALWEG_VERBS_RAILS`. Default: 4.
        verbs_rails: usize;
        /// Refuse every link that would let others read along. Only memory of the same host is
        /// eligible then: encryption of TCP is not built in. `THALWEG_REQUIRE_ENCRYPTION`, 0 or 1.
        /// Default: no.
        require_encryption: bool;
    }

    /// The defaults, changed by the `THALWEG_*` variables that are set. Sizes take a number of
    /// bytes or one with KiB, MiB or GiB.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`] for a value that cannot be understood, or for a variable that
    /// begins with `THALWEG_` and is none of them.
    pub fn from_env() -> Result<Self> {
        // What is not text is not ours to understand, and `std::env::vars` would panic over it.
        let text = |(name, value): (OsString, OsString)| {
            let name = name.into_string().ok()?;
            Some((name, value.to_string_lossy().into_owned()))
        };
        Self::from_vars(std::env::vars_os().filter_map(text))
    }

    fn from_vars(vars: impl IntoIterator<Item = (String, String)>) -> Result<Self> {
        let mut config = Config::new();
        for (name, value) in vars {
            let Some(setting) = name.strip_prefix("THALWEG_") else { continue };
            let bad = |what: &str| {
                Error::new(
                    ErrorKind::InvalidInput,
                    Phase::Setup,
                    format!("{name}={value:?}: {what}"),
                )
            };
            let size = || parse_size(&value).ok_or_else(|| bad("not a size"));
            let number = || value.parse::<u64>().map_err(|_| bad("not a number"));
            let flag = || match value.as_str() {
                "1" | "true" | "yes" => Ok(true),
                "0" | "false" | "no" => Ok(false),
                _ => Err(bad("neither 0 nor 1")),
            };
            let usize_of = |n: u64| usize::try_from(n).map_err(|_| bad("too large"));
            match setting {
                "TRANSPORTS" => {
                    config = match links_named(value.split(',')).map_err(|what| bad(&what))? {
                        Some(links) => config.transports(links),
                        None => config.auto_transports(),
                    };
                }
                "WAKE" => config.wake = value.parse()?,
                "SPIN_LIMIT_US" => config.spin_limit = Duration::from_micros(number()?),
                "ADAPTIVE_SPIN_US" => config.adaptive_spin = Duration::from_micros(number()?),
                "CONNECT_TIMEOUT_MS" => config.connect_timeout = Duration::from_millis(number()?),
                "HANDSHAKE_TIMEOUT_MS" => {
                    config.handshake_timeout = Duration::from_millis(number()?);
                }
                "CLOSE_TIMEOUT_MS" => config.close_timeout = Duration::from_millis(number()?),
                "KEEPALIVE_MS" => config.keepalive = Duration::from_millis(number()?),
                "BACKLOG" => {
                    config.backlog = u32::try_from(number()?).map_err(|_| bad("too large"))?;
                }
                "MAX_HANDSHAKES" => config.max_handshakes = usize_of(number()?)?,
                "MESSAGE_WINDOW" => config.message_window_bytes = size()?,
                "TAG_WINDOW" => config.tag_window_bytes = size()?,
                "NODE_BUDGET" => config.node_budget_bytes = size()?,
                "MAX_MESSAGE" => config.max_message_bytes = size()?,
                "MAX_FRAMES" => {
                    config.max_frames = u32::try_from(number()?).map_err(|_| bad("too large"))?;
                }
                "EAGER_MAX" => config.eager_max_bytes = usize_of(size()?)?,
                "TCP_BUFFER" => config.tcp_buffer_bytes = usize_of(size()?)?,
                "SINGLE_COPY" => config.single_copy = flag()?,
                "PEER_WRITE" => config.peer_write = flag()?,
                "LOANS" => config.loans = flag()?,
                "PTRACER_ANY" => config.ptracer_any = flag()?,
                "LOAN_POOL" => config.loan_pool_bytes = usize_of(size()?)?,
                "HOST_POOL" => config.host_pool_bytes = usize_of(size()?)?,
                "REQUIRE_ENCRYPTION" => config.require_encryption = flag()?,
                "VERBS_DEVICES" => {
                    let names = value.split(',').map(str::trim).filter(|name| !name.is_empty());
                    config.verbs_devices = names.map(str::to_owned).collect();
                    if config.verbs_devices.is_empty() && !value.is_empty() {
                        return Err(bad("names no device"));
                    }
                }
                "VERBS_RAILS" => config.verbs_rails = usize_of(number()?)?,
                // Read when these libraries are first looked for: there is one of each a process.
                "UCX_LIBRARY" | "VERBS_LIBRARY" => {}
                // The project's own tests and programs.
                other if other.starts_with("TEST_") || other.starts_with("FUZZ_") => {}
                _ => return Err(bad("no such setting")),
            }
        }
        Ok(config)
    }

    /// The largest message that is accepted, in bytes, as [`Config::max_message_bytes`] was set.
    pub fn message_limit_bytes(&self) -> u64 {
        self.max_message_bytes
    }

    /// The links that may be used, best first, as [`Config::transports`] was set; where the library
    /// chooses, those that it chooses from.
    pub fn allowed_transports(&self) -> &[LinkKind] {
        self.transports.order()
    }

    /// How operations wait, as [`Config::wake`] was set.
    pub fn wake_mode(&self) -> Wake {
        self.wake
    }

    /// Whether payloads may be copied straight out of the peer's memory, as
    /// [`Config::single_copy`] was set.
    pub fn single_copy_allowed(&self) -> bool {
        self.single_copy
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let bad = |what: String| Err(Error::new(ErrorKind::InvalidInput, Phase::Setup, what));
        if self.hello.len() > crate::proto::hello::APP_BYTES_MAX {
            return bad(format!(
                "the hello has {} bytes, more than {}",
                self.hello.len(),
                crate::proto::hello::APP_BYTES_MAX
            ));
        }
        if self.transports.order().is_empty() {
            return bad("no transport is allowed".into());
        }
        for (bytes, name) in [
            (self.message_window_bytes, "MESSAGE_WINDOW"),
            (self.tag_window_bytes, "TAG_WINDOW"),
            (self.max_message_bytes, "MAX_MESSAGE"),
        ] {
            if bytes < SIZE_MIN {
                return bad(format!(
                    "{bytes} bytes are too few, at least {SIZE_MIN} (THALWEG_{name})"
                ));
            }
        }
        if self.max_handshakes == 0 {
            return bad("no handshake at all is allowed (THALWEG_MAX_HANDSHAKES)".into());
        }
        if self.max_frames == 0 {
            return bad("no frame at all is allowed (THALWEG_MAX_FRAMES)".into());
        }
        let times = [self.connect_timeout, self.handshake_timeout, self.close_timeout];
        if times.into_iter().chain([self.keepalive, self.spin_limit]).any(|time| time > TIME_MAX) {
            return bad("a time of more than 10 years".into());
        }
        if self.connect_timeout.is_zero() {
            return bad("no time to connect in (THALWEG_CONNECT_TIMEOUT_MS)".into());
        }
        if self.handshake_timeout.is_zero() {
            return bad("no time for the handshake (THALWEG_HANDSHAKE_TIMEOUT_MS)".into());
        }
        if !(1..=RAILS_MAX).contains(&self.verbs_rails) {
            return bad(format!(
                "{} pairs of ports, not 1 to {RAILS_MAX} (THALWEG_VERBS_RAILS)",
                self.verbs_rails
            ));
        }
        if self.keepalive < KEEPALIVE_MIN {
            return bad(format!(
                "a keepalive below {} ms (THALWEG_KEEPALIVE_MS)",
                KEEPALIVE_MIN.as_millis()
            ));
        }
        Ok(())
    }

    pub(crate) fn tcp_buffer(&self) -> Option<usize> {
        (self.tcp_buffer_bytes > 0).then_some(self.tcp_buffer_bytes)
    }
}

/// The links of these names; `None`: the library is to choose. `Err`: what is wrong.
fn links_named<S: AsRef<str>>(
    names: impl IntoIterator<Item = S>,
) -> std::result::Result<Option<Vec<LinkKind>>, String> {
    let (mut links, mut count, mut auto) = (Vec::new(), 0, false);
    for name in names {
        let name = name.as_ref().trim();
        count += 1;
        match LinkKind::from_name(name) {
            Some(link) => links.push(link),
            None if name == AUTO => auto = true,
            None => return Err(format!("no such transport: {name:?}")),
        }
    }
    match auto {
        true if count > 1 => {
            Err(format!("{AUTO} stands alone: it chooses among all links, in an order of its own"))
        }
        true => Ok(None),
        false => Ok(Some(links)),
    }
}

/// A number of bytes: digits, with KiB, MiB or GiB behind if wanted.
fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "B" => 1,
        "KiB" | "K" | "k" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        _ => return None,
    };
    digits.trim().parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(vars: &[(&str, &str)]) -> Result<Config> {
        Config::from_vars(vars.iter().map(|(k, v)| (k.to_string(), v.to_string())))
    }

    #[test]
    fn variables_are_understood() {
        let config = parse(&[
            ("THALWEG_TRANSPORTS", "tcp"),
            ("THALWEG_WAKE", "park"),
            ("THALWEG_MESSAGE_WINDOW", "8MiB"),
            ("PATH", "ignored"),
        ])
        .expect("valid");
        assert_eq!(config.transports, Transports::Named(vec![LinkKind::Tcp]));
        assert_eq!(config.wake, Wake::Park);
        assert_eq!(config.message_window_bytes, 8 << 20);
    }

    #[test]
    fn the_choice_of_links_is_the_default_and_stands_alone() {
        let chosen =
            |value| parse(&[("THALWEG_TRANSPORTS", value)]).map(|config| config.transports);
        assert_eq!(Config::new().transports, Transports::Auto);
        assert_eq!(parse(&[]).expect("valid").transports, Transports::Auto);
        assert_eq!(chosen("auto").expect("valid"), Transports::Auto);
        assert_eq!(chosen(" auto ").expect("valid"), Transports::Auto);
        let both = Transports::Named(vec![LinkKind::Tcp, LinkKind::Shm]);
        assert_eq!(chosen("tcp,shm,tcp").expect("valid"), both);
        for value in ["auto,tcp", "tcp, auto", "auto,auto"] {
            let error = chosen(value).expect_err(value).to_string();
            assert!(error.contains("auto stands alone") && error.contains(value), "{error}");
        }
        let error = chosen("tcp,pigeon").expect_err("no link").to_string();
        assert!(error.contains("pigeon"), "{error}");
        let config = Config::new().transports([LinkKind::Tcp]);
        assert!(config.transports.names(LinkKind::Tcp) && !config.transports.names(LinkKind::Shm));
        let config = config.auto_transports();
        assert_eq!(config.allowed_transports(), auto::ORDER);
        assert!(!config.transports.names(LinkKind::Tcp));
    }

    #[test]
    fn settings_with_which_nothing_could_work_are_refused_at_set_up() {
        for (name, value) in [
            ("THALWEG_MAX_HANDSHAKES", "0"),
            ("THALWEG_MAX_FRAMES", "0"),
            ("THALWEG_CONNECT_TIMEOUT_MS", "0"),
            ("THALWEG_HANDSHAKE_TIMEOUT_MS", "0"),
            ("THALWEG_KEEPALIVE_MS", "2999"),
            ("THALWEG_MESSAGE_WINDOW", "4095"),
            ("THALWEG_TAG_WINDOW", "4095"),
            ("THALWEG_MAX_MESSAGE", "4095"),
            ("THALWEG_VERBS_RAILS", "0"),
            ("THALWEG_VERBS_RAILS", "5"),
        ] {
            let error = parse(&[(name, value)]).expect(name).validate().expect_err(name);
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains(name), "{error}");
        }
        assert!(parse(&[("THALWEG_KEEPALIVE_MS", "3000")]).expect("valid").validate().is_ok());
    }

    #[test]
    fn nonsense_is_named() {
        for (name, value) in [
            ("THALWEG_WAKE", "maybe"),
            ("THALWEG_TRANSPORTS", "pigeon"),
            ("THALWEG_TCP_BUFFER", "12 furlongs"),
            ("THALWEG_TYPO", "1"),
            ("THALWEG_NODE_BUDGET", "99999999999999999999"),
            ("THALWEG_VERBS_DEVICES", ","),
            ("THALWEG_VERBS_DEVICES", " "),
        ] {
            let error = parse(&[(name, value)]).err().expect(name);
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
        }
    }
}
