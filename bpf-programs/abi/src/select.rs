//! Finds the rules that match a socket, as a set of bits.
//!
//! Each dimension of a `match` (family, protocol, direction, ports, addresses) is a table that the agent made. For a value,
//! the table has the set of rules that accept the value. The socket's rules are the intersection, so the cost does not depend
//! on the number of rules.
//!
//! If a fact is unknown, there are two sets: the rules that match *surely*, because they have no condition on the fact, and
//! those that match *possibly*.

use crate::{
    shared,
    socket::{Address, Facts, direction, family, known, protocol},
};

/// An end of a connection: an index into the arrays in [`Selectors`].
pub mod side {
    pub const LOCAL: usize = 0;
    pub const REMOTE: usize = 1;
    pub const COUNT: usize = 2;
}

/// The small dimensions of the rules of a scope, and the sets for values that the prefix table does not contain. Map
/// `SELECTORS`, by scope.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Selectors {
    /// Every rule.
    pub all: u64,
    /// The rules that match a value of [`crate::socket::family`]. The entry of UNKNOWN has the rules without a condition on
    /// the family. `protocol` and `direction` are the same. The lengths are powers of two, so that a masked index proves to
    /// the verifier that it is in range.
    pub family: [u64; 4],
    /// The rules that match a value of [`crate::socket::protocol`].
    pub protocol: [u64; 8],
    /// The rules that match a value of [`crate::socket::direction`].
    pub direction: [u64; 4],
    /// By side: the rules without a condition on the port.
    pub any_port: [u64; side::COUNT],
    /// By side: the rules without a condition on the address.
    pub any_address: [u64; side::COUNT],
    /// By side: whether any rule has a condition on the port (0 or 1).
    pub asks_port: [u32; side::COUNT],
    /// By side: whether any rule has a condition on the address (0 or 1).
    pub asks_address: [u32; side::COUNT],
    /// Number of the scope, which is part of the keys of map `PREFIXES`.
    pub scope: u32,
    pub _pad: u32,
}
shared!(Selectors, size 8 * (1 + 4 + 8 + 4 + 2 + 2) + 4 * 6);

/// The dimension to which a key of map `PREFIXES` belongs.
pub mod dimension {
    /// Plus the side; the data is the port, in the first 16 bits.
    pub const PORT: u32 = 0;
    /// Plus the side; the data is an IPv4 address.
    pub const IPV4: u32 = 2;
    /// Plus the side; the data is an IPv6 address. A separate dimension, so that `::/0` does not match IPv4.
    pub const IPV6: u32 = 4;
    /// Greater than every dimension.
    pub const COUNT: u32 = 8;
}

/// Data of a key of map `PREFIXES`, one longest-prefix trie for all scopes and dimensions: scope and dimension, then the
/// value that is looked up, in network byte order.
pub type PrefixData = [u32; 5];

/// Bits of a key that contain scope and dimension.
pub const DIMENSION_BITS: u32 = 32;

/// Returns the key data of a port.
#[inline(always)]
#[must_use]
pub fn port_data(scope: u32, side: usize, port: u16) -> PrefixData {
    [scope * dimension::COUNT + dimension::PORT + side as u32, (u32::from(port) << 16).to_be(), 0, 0, 0]
}

/// Returns the key data of an address.
#[inline(always)]
#[must_use]
pub fn address_data(scope: u32, side: usize, family: u8, address: &Address) -> PrefixData {
    let dimension = if family == family::IPV4 { dimension::IPV4 } else { dimension::IPV6 };
    [scope * dimension::COUNT + dimension + side as u32, address[0], address[1], address[2], address[3]]
}

/// The table that is too large for [`Selectors`]: a map in the kernel, a vector in tests.
pub trait Prefixes {
    /// Returns the rules at the longest prefix that covers `data`, if there is one.
    fn longest(&self, data: &PrefixData) -> Option<u64>;
}

/// The rules that match a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Candidates {
    /// Rules that match, whatever becomes known.
    pub sure: u64,
    /// Rules that match or may match when more is known. A superset of `sure`.
    pub possible: u64,
}

/// Finds the rules that match a socket.
#[inline(always)]
pub fn select(facts: &Facts, selectors: &Selectors, prefixes: &impl Prefixes) -> Candidates {
    let mut rules = Candidates { sure: selectors.all, possible: selectors.all };

    rules.narrow(facts.family != family::UNKNOWN, selectors.family[(facts.family & 3) as usize]);
    rules.narrow(facts.protocol != protocol::UNKNOWN, selectors.protocol[(facts.protocol & 7) as usize]);
    rules.narrow(facts.direction != direction::UNKNOWN, selectors.direction[(facts.direction & 3) as usize]);

    let remote = facts.known & known::REMOTE != 0;
    let local_port = facts.known & known::LOCAL_PORT != 0;
    let local_address = facts.known & known::LOCAL_ADDRESS != 0;
    if selectors.asks_port[side::LOCAL] != 0 {
        let data = port_data(selectors.scope, side::LOCAL, facts.local_port);
        rules.narrow_by_prefix(local_port, &data, selectors.any_port[side::LOCAL], prefixes);
    }
    if selectors.asks_port[side::REMOTE] != 0 {
        let data = port_data(selectors.scope, side::REMOTE, facts.remote_port);
        rules.narrow_by_prefix(remote, &data, selectors.any_port[side::REMOTE], prefixes);
    }
    if selectors.asks_address[side::LOCAL] != 0 {
        let data = address_data(selectors.scope, side::LOCAL, facts.family, &facts.local);
        rules.narrow_by_prefix(local_address, &data, selectors.any_address[side::LOCAL], prefixes);
    }
    if selectors.asks_address[side::REMOTE] != 0 {
        let data = address_data(selectors.scope, side::REMOTE, facts.family, &facts.remote);
        rules.narrow_by_prefix(remote, &data, selectors.any_address[side::REMOTE], prefixes);
    }
    rules
}

impl Candidates {
    /// Keeps the rules that accept a fact. If the fact is unknown, `rules` are those without a condition on it: only these
    /// match surely.
    #[inline(always)]
    fn narrow(&mut self, is_known: bool, rules: u64) {
        self.sure &= rules;
        if is_known {
            self.possible &= rules;
        }
    }

    /// Keeps the rules that accept a fact of the prefix table. `unconditional` are the rules without a condition on it.
    #[inline(always)]
    fn narrow_by_prefix(&mut self, is_known: bool, data: &PrefixData, unconditional: u64, prefixes: &impl Prefixes) {
        let rules = if is_known { prefixes.longest(data).unwrap_or(unconditional) } else { unconditional };
        self.narrow(is_known, rules);
    }
}
