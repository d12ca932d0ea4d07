//! Which rules match a socket, as a set of bits.
//!
//! Each dimension of a `match` (family, protocol, direction, ports, addresses) was turned by the
//! agent into a table that gives, for a value, the set of rules that can live with it. The socket's
//! rules are the intersection, so the work does not grow with the number of rules.
//!
//! A fact that is not known yet leaves two answers: the rules that match *surely* (they do not ask
//! about it) and those that match *possibly*.

use crate::{
    shared,
    socket::{Address, Facts, direction, family, known, protocol},
};

/// Which end of a connection. An index of the arrays in [`Selectors`].
pub mod side {
    pub const LOCAL: usize = 0;
    pub const REMOTE: usize = 1;
    pub const COUNT: usize = 2;
}

/// The small dimensions of the rules of a scope, and what the tables give where they have no entry.
/// Map `SELECTORS`, by scope.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Selectors {
    /// Every rule.
    pub all: u64,
    /// The rules that match a value of [`crate::socket::family`]. The entry of UNKNOWN holds the rules
    /// that do not ask; the same goes for the next two. Their lengths are powers of two, so that a
    /// masked index shows the verifier that it is in range.
    pub family: [u64; 4],
    /// The rules that match a value of [`crate::socket::protocol`].
    pub protocol: [u64; 8],
    /// The rules that match a value of [`crate::socket::direction`].
    pub direction: [u64; 4],
    /// By side: the rules that do not ask about the port.
    pub any_port: [u64; side::COUNT],
    /// By side: the rules that do not ask about the address.
    pub any_address: [u64; side::COUNT],
    /// By side: whether any rule asks about the port (0 or 1).
    pub asks_port: [u32; side::COUNT],
    /// By side: whether any rule asks about the address (0 or 1).
    pub asks_address: [u32; side::COUNT],
    /// Number of the scope, which is part of the keys of map `PREFIXES`.
    pub scope: u32,
    pub _pad: u32,
}
shared!(Selectors, size 8 * (1 + 4 + 8 + 4 + 2 + 2) + 4 * 6);

/// Which dimension a key of map `PREFIXES` belongs to.
pub mod dimension {
    /// Plus the side; data is the port, in the first 16 bits.
    pub const PORT: u32 = 0;
    /// Plus the side; data is an IPv4 address.
    pub const IPV4: u32 = 2;
    /// Plus the side; data is an IPv6 address. A dimension of its own, so that `::/0` does not match
    /// IPv4.
    pub const IPV6: u32 = 4;
    /// More than there are.
    pub const COUNT: u32 = 8;
}

/// Data of a key of map `PREFIXES`, one longest-prefix trie for all scopes and dimensions: these two, then what is
/// looked up, in network byte order.
pub type PrefixData = [u32; 5];

/// Bits of a key that scope and dimension take.
pub const DIMENSION_BITS: u32 = 32;

/// The key data of a port.
#[inline(always)]
#[must_use]
pub fn port_data(scope: u32, side: usize, port: u16) -> PrefixData {
    [scope * dimension::COUNT + dimension::PORT + side as u32, (u32::from(port) << 16).to_be(), 0, 0, 0]
}

/// The key data of an address.
#[inline(always)]
#[must_use]
pub fn address_data(scope: u32, side: usize, family: u8, address: &Address) -> PrefixData {
    let dimension = if family == family::IPV4 { dimension::IPV4 } else { dimension::IPV6 };
    [scope * dimension::COUNT + dimension + side as u32, address[0], address[1], address[2], address[3]]
}

/// The table that is too large for [`Selectors`]: a map in the kernel, a vector in tests.
pub trait Prefixes {
    /// The rules at the longest prefix that covers `data`, if any does.
    fn longest(&self, data: &PrefixData) -> Option<u64>;
}

/// The rules that match a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Candidates {
    /// Match, whatever else comes to be known.
    pub sure: u64,
    /// Match, or may yet. A superset of `sure`.
    pub possible: u64,
}

/// Finds the rules that match a socket.
#[inline(always)]
pub fn select(facts: &Facts, selectors: &Selectors, prefixes: &impl Prefixes) -> Candidates {
    let mut rules = Candidates { sure: selectors.all, possible: selectors.all };

    rules.keep(facts.family != family::UNKNOWN, selectors.family[(facts.family & 3) as usize]);
    rules.keep(facts.protocol != protocol::UNKNOWN, selectors.protocol[(facts.protocol & 7) as usize]);
    rules.keep(facts.direction != direction::UNKNOWN, selectors.direction[(facts.direction & 3) as usize]);

    let remote = facts.known & known::REMOTE != 0;
    let local_port = facts.known & known::LOCAL_PORT != 0;
    let local_address = facts.known & known::LOCAL_ADDRESS != 0;
    if selectors.asks_port[side::LOCAL] != 0 {
        let data = port_data(selectors.scope, side::LOCAL, facts.local_port);
        rules.keep_found(local_port, &data, selectors.any_port[side::LOCAL], prefixes);
    }
    if selectors.asks_port[side::REMOTE] != 0 {
        let data = port_data(selectors.scope, side::REMOTE, facts.remote_port);
        rules.keep_found(remote, &data, selectors.any_port[side::REMOTE], prefixes);
    }
    if selectors.asks_address[side::LOCAL] != 0 {
        let data = address_data(selectors.scope, side::LOCAL, facts.family, &facts.local);
        rules.keep_found(local_address, &data, selectors.any_address[side::LOCAL], prefixes);
    }
    if selectors.asks_address[side::REMOTE] != 0 {
        let data = address_data(selectors.scope, side::REMOTE, facts.family, &facts.remote);
        rules.keep_found(remote, &data, selectors.any_address[side::REMOTE], prefixes);
    }
    rules
}

impl Candidates {
    /// Keeps the rules that can live with a fact: those that match it where it is known, those that
    /// do not ask about it (which match surely) where it is not.
    #[inline(always)]
    fn keep(&mut self, is_known: bool, rules: u64) {
        self.sure &= rules;
        if is_known {
            self.possible &= rules;
        }
    }

    /// The same for a fact that is looked up. `unasked` are the rules that do not ask about it.
    #[inline(always)]
    fn keep_found(&mut self, is_known: bool, data: &PrefixData, unasked: u64, prefixes: &impl Prefixes) {
        let rules = if is_known { prefixes.longest(data).unwrap_or(unasked) } else { unasked };
        self.keep(is_known, rules);
    }
}
