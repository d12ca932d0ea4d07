//! A socket in the terms of the programs.

use abi::socket::{Facts, direction, family, known, protocol};

use super::prefixes::address_words;
use crate::policy::{
    Socket,
    model::{Direction, Family, Protocol},
};

/// A socket as the programs have it.
#[must_use]
pub fn facts(socket: &Socket) -> Facts {
    let mut facts = Facts {
        protocol: match socket.protocol {
            None => protocol::UNKNOWN,
            Some(Protocol::Tcp) => protocol::TCP,
            Some(Protocol::Udp) => protocol::UDP,
            Some(Protocol::Icmp) => protocol::ICMP,
            Some(Protocol::Sctp) => protocol::SCTP,
            Some(Protocol::Other) => protocol::OTHER,
        },
        family: match socket.family() {
            None => family::UNKNOWN,
            Some(Family::Ipv4) => family::IPV4,
            Some(Family::Ipv6) => family::IPV6,
        },
        direction: match socket.direction {
            None => direction::UNKNOWN,
            Some(Direction::Outbound) => direction::OUTBOUND,
            Some(Direction::Inbound) => direction::INBOUND,
        },
        ..Facts::default()
    };
    if let Some(address) = socket.local {
        facts.local = address_words(address).1;
        facts.known |= known::LOCAL_ADDRESS;
    }
    if let Some(port) = socket.local_port {
        facts.local_port = port;
        facts.known |= known::LOCAL_PORT;
    }
    if let Some(remote) = socket.remote {
        facts.remote = address_words(remote.ip()).1;
        facts.remote_port = remote.port();
        facts.known |= known::REMOTE;
    }
    facts
}
