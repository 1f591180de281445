//! Addresses: `thalweg://host:port`.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Phase};

/// Where a node listens: `thalweg://host:port`, with an IPv4 address, an IPv6 address in brackets,
/// or a host name. The scheme may be left out.
///
/// ```
/// use thalweg::Address;
/// let address: Address = "thalweg://[::1]:8786".parse()?;
/// assert_eq!((address.host(), address.port()), ("::1", 8786));
/// assert_eq!(address.to_string(), "thalweg://[::1]:8786");
/// # Ok::<(), thalweg::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    host: String,
    port: u16,
}

const SCHEME: &str = "thalweg://";

impl Address {
    /// The host: an address without brackets, or a name.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port. 0 in an address to listen on lets the system choose.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Address { host: address.ip().to_string(), port: address.port() }
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let invalid = |why: &str| {
            Error::new(
                ErrorKind::InvalidInput,
                Phase::Setup,
                format!("{text:?} is not an address: {why}"),
            )
            .with_hint("write thalweg://host:port, with an IPv6 host in brackets")
        };
        let rest = match text.split_once("://") {
            Some(("thalweg", rest)) => rest,
            Some(_) => return Err(invalid("the scheme is not thalweg")),
            None => text,
        };
        let (host, port) = rest.rsplit_once(':').ok_or_else(|| invalid("no port"))?;
        let port = port.parse().map_err(|_| invalid("the port is not a number up to 65535"))?;
        let host = match host.strip_prefix('[') {
            Some(inner) => {
                let inner = inner.strip_suffix(']').ok_or_else(|| invalid("unclosed bracket"))?;
                let bare = inner.split('%').next().unwrap_or(inner);
                bare.parse::<Ipv6Addr>().map_err(|_| invalid("not an IPv6 address"))?;
                inner
            }
            None if host.contains(':') => return Err(invalid("an IPv6 host needs brackets")),
            None => host,
        };
        if host.is_empty() {
            return Err(invalid("no host"));
        }
        if host.bytes().any(|b| b.is_ascii_whitespace() || b == b'/' || b == 0) {
            return Err(invalid("the host holds a blank or a slash"));
        }
        Ok(Address { host: host.to_owned(), port })
    }
}

impl TryFrom<&str> for Address {
    type Error = Error;

    fn try_from(text: &str) -> Result<Self, Error> {
        text.parse()
    }
}

impl TryFrom<String> for Address {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl TryFrom<&Address> for Address {
    type Error = Error;

    fn try_from(address: &Address) -> Result<Self, Error> {
        Ok(address.clone())
    }
}

impl From<std::convert::Infallible> for Error {
    fn from(never: std::convert::Infallible) -> Error {
        match never {}
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.parse::<IpAddr>() {
            Ok(IpAddr::V6(_)) => write!(f, "{SCHEME}[{}]:{}", self.host, self.port),
            _ => write!(f, "{SCHEME}{}:{}", self.host, self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_parses_back() {
        for text in ["thalweg://10.0.0.1:80", "thalweg://[fe80::1]:0", "thalweg://node-7:65535"] {
            let address: Address = text.parse().expect(text);
            assert_eq!(address.to_string(), text);
        }
        assert_eq!("a:1".parse::<Address>().expect("bare").to_string(), "thalweg://a:1");
    }

    #[test]
    fn nonsense_is_refused_with_a_reason() {
        for text in [
            "",
            "a",
            "a:",
            "a:x",
            "a:65536",
            ":1",
            "tcp://a:1",
            "::1:5",
            "[::1:5",
            "[a]:1",
            "a b:1",
        ] {
            let error = text.parse::<Address>().expect_err(text);
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{text}");
        }
    }
}
