//! Evaluates the `match` of a rule for a socket, condition by condition, so that messages can name the conditions.
//!
//! The kernel decides by tables of bits. The tests of [`crate::compile`] check that both agree.

use std::{fmt, net::IpAddr, ops::RangeInclusive};

use ipnet::IpNet;

use crate::policy::{Socket, model::Selector};

/// A condition of a rule that a socket does not meet, or may not meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmet {
    /// The key in `match`.
    pub key: &'static str,
    pub wanted: String,
    /// The socket's value; `None` if the value is unknown.
    pub has: Option<String>,
}

impl fmt::Display for Unmet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, wanted, has } = self;
        let (what, must) = key.strip_prefix("not_").map_or((*key, ""), |what| (what, "not "));
        match has {
            Some(has) => write!(f, "{what} is {has}, but must {must}be {wanted}"),
            None => write!(f, "{what} is unknown, but must {must}be {wanted}"),
        }
    }
}

/// Returns the conditions of a rule that a socket does not meet, and those for which the socket's value is unknown.
#[must_use]
pub fn unmet(selector: &Selector, socket: &Socket) -> Vec<Unmet> {
    let Selector { protocols, family, direction, local, remote, not_remote, local_ports, remote_ports } = selector;
    let remote_address = socket.remote.map(|remote| remote.ip());
    let remote_port = socket.remote.map(|remote| remote.port());
    let conditions = [
        check("protocol", &texts(protocols), socket.protocol, |has| protocols.contains(has)),
        check("family", &texts(family), socket.family(), |has| *family == Some(*has)),
        check("direction", &texts(direction), socket.direction, |has| *direction == Some(*has)),
        check("local", &texts(local), socket.local, |has| in_any(local, has)),
        check("remote", &texts(remote), remote_address, |has| in_any(remote, has)),
        check("not_remote", &texts(not_remote), remote_address, |has| !in_any(not_remote, has)),
        check("local_port", &range_texts(local_ports), socket.local_port, |has| in_range(local_ports, has)),
        check("remote_port", &range_texts(remote_ports), remote_port, |has| in_range(remote_ports, has)),
    ];
    conditions.into_iter().flatten().collect()
}

fn in_any(networks: &[IpNet], address: &IpAddr) -> bool {
    networks.iter().any(|network| network.contains(address))
}

fn in_range(ranges: &[RangeInclusive<u16>], port: &u16) -> bool {
    ranges.iter().any(|range| range.contains(port))
}

/// Returns a condition if the rule has it and the socket does not meet it.
fn check<T: fmt::Display>(
    key: &'static str,
    wanted: &[String],
    fact: Option<T>,
    holds: impl Fn(&T) -> bool,
) -> Option<Unmet> {
    if wanted.is_empty() || fact.as_ref().is_some_and(holds) {
        return None;
    }
    Some(Unmet { key, wanted: wanted.join(" or "), has: fact.map(|fact| fact.to_string()) })
}

fn texts<'a, T: fmt::Display + 'a>(values: impl IntoIterator<Item = &'a T>) -> Vec<String> {
    values.into_iter().map(ToString::to_string).collect()
}

fn range_texts(ranges: &[RangeInclusive<u16>]) -> Vec<String> {
    let text = |range: &RangeInclusive<u16>| match (range.start(), range.end()) {
        (start, end) if start == end => start.to_string(),
        (start, end) => format!("{start}-{end}"),
    };
    ranges.iter().map(text).collect()
}
