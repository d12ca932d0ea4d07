//! A described socket, as the programs represent it.

use abi::socket::{Facts, direction, family, known, protocol};

use super::prefixes::address_words;
use crate::policy::{
    Socket,
    model::{Direction, Family, Protocol},
};

/// Returns the facts about a socket, as the programs represent them.
#[must_use]
pub fn facts(socket: &Socket) -> Facts {
    let mut facts = Facts {
        protocol: socket.protocol.map_or(protocol::UNKNOWN, Protocol::code),
        family: socket.family().map_or(family::UNKNOWN, Family::code),
        direction: socket.direction.map_or(direction::UNKNOWN, Direction::code),
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
