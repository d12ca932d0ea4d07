//! The ports and addresses of all rules' matches, as one table of prefixes.

use std::{collections::BTreeSet, net::IpAddr, ops::RangeInclusive};

use abi::{
    select::{DIMENSION_BITS, PrefixData, Prefixes, address_data, port_data, side},
    socket::{Address, family},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::rules_where;
use crate::policy::model::{Rule, Selector};

/// An entry of map `PREFIXES`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// How many bits of `data` count.
    pub bits: u32,
    pub data: PrefixData,
    /// The rules that match what this prefix covers and no longer one does.
    pub rules: u64,
}

/// Map `PREFIXES`, looked through from end to end.
pub(super) struct Table<'a>(pub(super) &'a [Prefix]);

impl Prefixes for Table<'_> {
    fn longest(&self, data: &PrefixData) -> Option<u64> {
        let bit = |data: &PrefixData, at: u32| data[at as usize / 32].to_be() >> (31 - at % 32) & 1;
        let covers = |prefix: &&Prefix| (0..prefix.bits).all(|at| bit(&prefix.data, at) == bit(data, at));
        self.0.iter().filter(covers).max_by_key(|prefix| prefix.bits).map(|prefix| prefix.rules)
    }
}

/// All entries of a scope. A dimension that no rule asks about has none; one that a rule does ask about covers
/// every value, so that a lookup there always finds something.
pub(super) fn prefixes(scope: u32, rules: &[&Rule]) -> Vec<Prefix> {
    let mut prefixes = Vec::new();
    prefixes.extend(port_prefixes(scope, side::LOCAL, rules, |selector| &selector.local_ports));
    prefixes.extend(port_prefixes(scope, side::REMOTE, rules, |selector| &selector.remote_ports));
    prefixes.extend(address_prefixes(scope, side::LOCAL, rules, |selector| &selector.local, |_| &[]));
    prefixes.extend(address_prefixes(
        scope,
        side::REMOTE,
        rules,
        |selector| &selector.remote,
        |selector| &selector.not_remote,
    ));
    prefixes
}

fn port_prefixes(
    scope: u32,
    side: usize,
    rules: &[&Rule],
    ports: impl Fn(&Selector) -> &Vec<RangeInclusive<u16>>,
) -> Vec<Prefix> {
    // The first port of each span within which the same rules match.
    let mut starts = BTreeSet::new();
    for range in rules.iter().flat_map(|rule| ports(&rule.selector)) {
        starts.insert(u32::from(*range.start()));
        starts.insert(u32::from(*range.end()) + 1);
    }
    if starts.is_empty() {
        return Vec::new();
    }
    starts.insert(0);
    starts.remove(&(1 << 16));
    let ends = starts.iter().skip(1).copied().chain([1 << 16]);
    let mut prefixes = Vec::new();
    for (start, end) in starts.iter().copied().zip(ends) {
        let port = start as u16;
        let matching = rules_where(rules, |rule| {
            let ports = ports(&rule.selector);
            ports.is_empty() || ports.iter().any(|range| range.contains(&port))
        });
        for (port, len) in aligned_blocks(start, end) {
            prefixes.push(Prefix { bits: DIMENSION_BITS + len, data: port_data(scope, side, port), rules: matching });
        }
    }
    prefixes
}

/// The fewest prefixes of 16-bit numbers that cover `start..end`.
fn aligned_blocks(mut start: u32, end: u32) -> Vec<(u16, u32)> {
    let mut blocks = Vec::new();
    while start < end {
        // The largest block that begins here and does not go beyond the end.
        let aligned = start.trailing_zeros().min(16);
        let fits = (end - start).ilog2();
        let size = aligned.min(fits);
        blocks.push((start as u16, 16 - size));
        start += 1 << size;
    }
    blocks
}

fn address_prefixes<'a>(
    scope: u32,
    side: usize,
    rules: &[&'a Rule],
    within: impl Fn(&'a Selector) -> &'a [IpNet],
    without: impl Fn(&'a Selector) -> &'a [IpNet],
) -> Vec<Prefix> {
    let mut networks: BTreeSet<IpNet> = rules
        .iter()
        .flat_map(|rule| within(&rule.selector).iter().chain(without(&rule.selector)))
        .map(IpNet::trunc)
        .collect();
    if networks.is_empty() {
        return Vec::new();
    }
    networks.insert(Ipv4Net::default().into());
    networks.insert(Ipv6Net::default().into());
    let prefix = |network: &IpNet| {
        let covers = |networks: &[IpNet]| networks.iter().any(|other| other.contains(network));
        let matching = rules.iter().enumerate().filter(|(_, rule)| {
            let within = within(&rule.selector);
            (within.is_empty() || covers(within)) && !covers(without(&rule.selector))
        });
        let (family, address) = address_words(network.addr());
        Prefix {
            bits: DIMENSION_BITS + u32::from(network.prefix_len()),
            data: address_data(scope, side, family, &address),
            rules: matching.fold(0, |set, (number, _)| set | 1 << number),
        }
    };
    networks.iter().map(prefix).collect()
}

/// An address as programs hold it, with its [`family`].
#[must_use]
pub(crate) fn address_words(address: IpAddr) -> (u8, Address) {
    match address {
        IpAddr::V4(address) => (family::IPV4, [u32::from(address).to_be(), 0, 0, 0]),
        IpAddr::V6(address) => {
            let bits = u128::from(address);
            let word = |shift: u32| ((bits >> shift) as u32).to_be();
            (family::IPV6, [word(96), word(64), word(32), word(0)])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_a_range_and_nothing_else() {
        assert_eq!(aligned_blocks(0, 1 << 16), [(0, 0)]);
        assert_eq!(aligned_blocks(443, 444), [(443, 16)]);
        assert_eq!(aligned_blocks(8000, 8008), [(8000, 13)]);
        for (start, end) in [(1, 65536), (1024, 5000), (65535, 65536), (3, 17)] {
            let mut next = start;
            for (first, len) in aligned_blocks(start, end) {
                assert_eq!(u32::from(first), next, "{start}..{end}");
                next += 1 << (16 - len);
            }
            assert_eq!(next, end, "{start}..{end}");
        }
    }
}
