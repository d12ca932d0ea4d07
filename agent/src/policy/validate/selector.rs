//! `match`: words, networks and ports → [`Selector`].
//!
//! Checks each key, and warns of keys that together match nothing.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
};

use ipnet::{IpNet, Ipv4Net};
use toml::de::DeValue;

use super::values::integer_in;
use crate::policy::{
    diagnostic::{Findings, Problem, quote},
    file::{List, SelectorFile, Text, Value, type_of},
    model::{Direction, Family, Protocol, Selector},
    words,
};

pub(super) fn selector(file: &SelectorFile<'_>, findings: &mut Findings) -> Selector {
    let SelectorFile { protocol, family, direction, local, remote, not_remote, local_port, remote_port } = file;
    let selector = Selector {
        protocols: all(protocol.as_ref(), findings, |word| words::pick("protocol", word, Protocol::WORDS)),
        family: family.as_ref().and_then(|word| findings.ok(words::pick("family", word, Family::WORDS))),
        direction: direction.as_ref().and_then(|word| findings.ok(words::pick("direction", word, Direction::WORDS))),
        local: all(local.as_ref(), findings, network),
        remote: all(remote.as_ref(), findings, network),
        not_remote: all(not_remote.as_ref(), findings, network),
        local_ports: all(local_port.as_ref(), findings, ports),
        remote_ports: all(remote_port.as_ref(), findings, ports),
    };
    for (key, list, networks) in [("local", local, &selector.local), ("remote", remote, &selector.remote)] {
        if let (Some(list), Some(family)) = (list, selector.family) {
            warn_of_other_family(key, list, networks, family, findings);
        }
    }
    selector
}

fn all<T, U>(list: Option<&List<T>>, findings: &mut Findings, check: impl Fn(&T) -> Result<U, Problem>) -> Vec<U> {
    let items = list.map(|list| list.get_ref().iter()).into_iter().flatten();
    items.filter_map(|item| findings.ok(check(item))).collect()
}

fn warn_of_other_family(key: &str, list: &List<Text<'_>>, networks: &[IpNet], family: Family, findings: &mut Findings) {
    let of_family = |network: &IpNet| matches!(network, IpNet::V4(_)) == (family == Family::Ipv4);
    if networks.is_empty() || networks.iter().any(of_family) {
        return;
    }
    let (name, other) = match family {
        Family::Ipv4 => ("ipv4", "IPv6"),
        Family::Ipv6 => ("ipv6", "IPv4"),
    };
    findings.warning(
        Problem::new(format!("this rule matches no socket: `family` is \"{name}\" and `{key}` is {other}"))
            .help(format!("remove `family`: `{key}` implies it"))
            .at(list.span()),
    );
}

/// Parses a network, or an address as a network with only that address.
fn network(text: &Text<'_>) -> Result<IpNet, Problem> {
    parse_network(text.get_ref()).map_err(|problem| problem.at(text.span()))
}

fn parse_network(text: &str) -> Result<IpNet, Problem> {
    let address = || text.parse::<IpAddr>().ok().map(IpNet::from);
    let Some(network) = text.parse::<IpNet>().ok().or_else(address) else {
        let problem = Problem::new(format!("{} is not an address or a network", quote(text)));
        return Err(match text.split_once('/') {
            Some((address, _)) if address.parse::<Ipv4Addr>().is_ok() => {
                problem.help(format!("write a prefix length from 0 to 32, such as \"{address}/24\""))
            }
            Some((address, _)) if address.parse::<Ipv6Addr>().is_ok() => {
                problem.help(format!("write a prefix length from 0 to 128, such as \"{address}/64\""))
            }
            _ => problem.help("write it such as \"10.0.0.0/8\", \"192.0.2.1\" or \"2001:db8::/32\""),
        });
    };
    if network.addr() != network.network() {
        return Err(Problem::new(format!("{} has bits beyond its prefix length", quote(text))).help(format!(
            "write \"{}\" for the network, or \"{}\" for the address",
            network.trunc(),
            network.addr()
        )));
    }
    match mapped(&network) {
        Some(ipv4) => Err(Problem::new(format!("{} is an IPv4-mapped network: sockets show it as IPv4", quote(text)))
            .help(format!("write \"{ipv4}\""))),
        None => Ok(network),
    }
}

/// Returns the IPv4 network of an IPv4-mapped network.
fn mapped(network: &IpNet) -> Option<Ipv4Net> {
    let IpNet::V6(network) = network else { return None };
    let address = network.addr().to_ipv4_mapped()?;
    Ipv4Net::new(address, network.prefix_len().checked_sub(96)?).ok()
}

/// Parses one port or a range of ports.
fn ports(value: &Value<'_>) -> Result<RangeInclusive<u16>, Problem> {
    parse_ports(value).map_err(|problem| problem.at(value.span()))
}

fn parse_ports(value: &Value<'_>) -> Result<RangeInclusive<u16>, Problem> {
    const HELP: &str = "write a port from 1 to 65535, such as 443, or a range such as \"8000-8999\"";
    match value.get_ref() {
        DeValue::Integer(number) => {
            let port = integer_in(number, 1..=65535).and_then(|port| u16::try_from(port).ok());
            let port =
                port.ok_or_else(|| Problem::new(format!("{} is not a port", quote(&number.to_string()))).help(HELP))?;
            Ok(port..=port)
        }
        DeValue::String(text) => {
            port_range(text).map_err(|problem| if problem.help.is_some() { problem } else { problem.help(HELP) })
        }
        other => Err(Problem::new(format!("a port is a number or a range, not {}", type_of(other))).help(HELP)),
    }
}

fn port_range(text: &str) -> Result<RangeInclusive<u16>, Problem> {
    let port = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port > 0);
    if let Some(port) = port(text) {
        return Err(Problem::new(format!("{} is not a range of ports", quote(text)))
            .help(format!("write {port} without quotes")));
    }
    match text.split_once('-').map(|(from, to)| (port(from), port(to))) {
        Some((Some(from), Some(to))) if from <= to => Ok(from..=to),
        Some((Some(from), Some(to))) => Err(Problem::new(format!("the range {} ends before it begins", quote(text)))
            .help(format!("write \"{to}-{from}\""))),
        _ => Err(Problem::new(format!("{} is not a range of ports", quote(text)))),
    }
}
