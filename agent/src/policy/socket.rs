//! A socket that a user describes: in a `[[test]]`, or on the command line.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use super::model::{Direction, Family, Protocol};
use crate::escape::Escape;

/// A described socket. Unknown fields can have any value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    pub protocol: Option<Protocol>,
    pub family: Option<Family>,
    pub direction: Option<Direction>,
    pub local: Option<IpAddr>,
    pub local_port: Option<u16>,
    pub remote: Option<SocketAddr>,
    /// The cgroup in which the socket was created: a path below the mount.
    pub cgroup: Option<PathBuf>,
}

/// One end of a connection. Unknown fields are `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct End {
    pub address: Option<IpAddr>,
    pub port: Option<u16>,
}

/// The error for addresses of different families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a socket cannot be {one} and {other} at once")]
pub struct TwoFamilies {
    one: Family,
    other: Family,
}

impl Socket {
    /// Returns a socket with these ends. IPv4-mapped addresses become IPv4.
    ///
    /// # Errors
    ///
    /// Fails if the ends are not of one family.
    pub fn new(
        protocol: Protocol,
        family: Option<Family>,
        direction: Option<Direction>,
        local: End,
        remote: Option<SocketAddr>,
    ) -> Result<Self, TwoFamilies> {
        let local_address = local.address.map(|address| address.to_canonical());
        let remote = remote.map(|remote| SocketAddr::new(remote.ip().to_canonical(), remote.port()));
        let socket = Self {
            protocol: Some(protocol),
            family,
            direction,
            local: local_address,
            local_port: local.port,
            remote,
            cgroup: None,
        };
        let families = [family, local_address.map(family_of), remote.map(|remote| family_of(remote.ip()))];
        let mut families = families.into_iter().flatten();
        let Some(one) = families.next() else { return Ok(socket) };
        match families.find(|other| *other != one) {
            Some(other) => Err(TwoFamilies { one, other }),
            None => Ok(socket),
        }
    }

    /// Returns the family of the addresses, or the given family if there are no addresses.
    #[must_use]
    pub fn family(&self) -> Option<Family> {
        let address = self.remote.map(|remote| remote.ip()).or(self.local);
        address.map_or(self.family, |address| Some(family_of(address)))
    }
}

/// Parses one end of a connection: `10.0.0.1`, `:443`, `10.0.0.1:443`, `[::1]:443`.
#[must_use]
pub fn parse_end(text: &str) -> Option<End> {
    if let Some(port) = text.strip_prefix(':').and_then(|port| port.parse().ok()) {
        return Some(End { address: None, port: Some(port) });
    }
    if let Ok(both) = text.parse::<SocketAddr>() {
        return Some(End { address: Some(both.ip()), port: Some(both.port()) });
    }
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    Some(End { address: Some(bare.parse().ok()?), port: None })
}

fn family_of(address: IpAddr) -> Family {
    if address.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 }
}

impl fmt::Display for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.protocol.map_or("any protocol", Protocol::name))?;
        if let Some(family) = self.family() {
            write!(f, ", {}", family.name())?;
        }
        if let Some(direction) = self.direction {
            write!(f, ", {}", direction.name())?;
        }
        match (self.local, self.local_port) {
            (Some(address), Some(port)) => write!(f, ", local {}", SocketAddr::new(address, port))?,
            (Some(address), None) => write!(f, ", local {address}")?,
            (None, Some(port)) => write!(f, ", local port {port}")?,
            (None, None) => {}
        }
        if let Some(remote) = self.remote {
            write!(f, ", remote {remote}")?;
        }
        match &self.cgroup {
            Some(cgroup) => write!(f, ", in cgroup /{}", cgroup.escaped()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_addresses_ports_or_both() {
        let end = |address: Option<&str>, port| End { address: address.map(|address| address.parse().unwrap()), port };
        for (text, expected) in [
            ("10.0.0.1", end(Some("10.0.0.1"), None)),
            ("10.0.0.1:80", end(Some("10.0.0.1"), Some(80))),
            (":80", end(None, Some(80))),
            ("::1", end(Some("::1"), None)),
            ("[::1]", end(Some("::1"), None)),
            ("[::1]:80", end(Some("::1"), Some(80))),
        ] {
            assert_eq!(parse_end(text), Some(expected), "{text}");
        }
        for text in ["", ":", "80", ":65536", "10.0.0.1:", "10.0.0", "[::1", "localhost:80"] {
            assert_eq!(parse_end(text), None, "{text}");
        }
    }

    #[test]
    fn mapped_addresses_are_ipv4_and_families_do_not_mix() {
        let socket = |family, local: &str, remote: &str| {
            Socket::new(Protocol::Tcp, family, None, parse_end(local).unwrap(), Some(remote.parse().unwrap()))
        };
        let mapped = socket(None, "[::ffff:10.0.0.1]", "10.0.0.2:1").unwrap();
        assert_eq!((mapped.family(), mapped.local), (Some(Family::Ipv4), Some([10, 0, 0, 1].into())));
        assert!(socket(None, "::1", "10.0.0.2:1").is_err());
        assert!(socket(Some(Family::Ipv6), ":1", "10.0.0.2:1").is_err());
    }
}
