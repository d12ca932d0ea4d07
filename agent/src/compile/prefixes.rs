//! The ports and addresses in the `match` of all rules, as one table of prefixes.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    ops::{Range, RangeInclusive},
};

use abi::{
    select::{DIMENSION_BITS, PrefixData, Prefixes, address_data, port_data, side},
    socket::{Address, family},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::rules_where;
use crate::policy::model::{Rule, Selector};

/// An entry of the map `PREFIXES`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// How many bits of `data` are significant.
    pub bits: u32,
    pub data: PrefixData,
    /// The rules that match values whose longest matching prefix is this one.
    pub rules: u64,
}

/// The map `PREFIXES`, in the order of [`key`]. A lookup searches each possible prefix length.
pub(super) struct Table<'a>(pub(super) &'a [Prefix]);

/// Returns the sort key of an entry.
pub(super) fn key(prefix: &Prefix) -> (u32, PrefixData) {
    (prefix.bits, prefix.data)
}

impl Prefixes for Table<'_> {
    fn longest(&self, data: &PrefixData) -> Option<u64> {
        (DIMENSION_BITS..=DIMENSION_BITS + u128::BITS).rev().find_map(|bits| {
            let wanted = (bits, first_bits(data, bits));
            self.0.binary_search_by_key(&wanted, key).ok().map(|at| self.0[at].rules)
        })
    }
}

/// Returns the data with all bits after the first `bits` cleared. Each word is in network byte order.
fn first_bits(data: &PrefixData, bits: u32) -> PrefixData {
    let mut first = *data;
    for (word, at) in first.iter_mut().zip((0..).step_by(32)) {
        let kept = bits.saturating_sub(at).min(32);
        *word &= u32::MAX.checked_shl(32 - kept).unwrap_or(0).to_be();
    }
    first
}

/// Returns all entries of a scope. A dimension that no rule uses has no entries. The entries of a used dimension cover
/// every value, so that each lookup succeeds.
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
    let mut used = 0;
    // The rules that start or stop matching at a port.
    let mut changes: BTreeMap<u32, u64> = BTreeMap::new();
    for (number, rule) in rules.iter().enumerate() {
        for range in merged(ports(&rule.selector)) {
            used |= 1 << number;
            for at in [range.start, range.end] {
                *changes.entry(at).or_default() ^= 1 << number;
            }
        }
    }
    if used == 0 {
        return Vec::new();
    }
    changes.entry(0).or_default();
    changes.remove(&PORTS);
    let mut matching = rules_where(rules, |_| true) & !used;
    let ends = changes.keys().skip(1).copied().chain([PORTS]).collect::<Vec<_>>();
    let mut prefixes = Vec::new();
    for ((start, change), end) in changes.into_iter().zip(ends) {
        matching ^= change;
        for (port, len) in aligned_blocks(start, end) {
            prefixes.push(Prefix { bits: DIMENSION_BITS + len, data: port_data(scope, side, port), rules: matching });
        }
    }
    prefixes
}

/// The number of ports.
const PORTS: u32 = 1 << 16;

/// Returns the ports of these ranges as sorted spans, with at least one port between two spans.
pub(crate) fn merged(ranges: &[RangeInclusive<u16>]) -> Vec<Range<u32>> {
    let mut spans: Vec<_> = ranges.iter().map(|range| u32::from(*range.start())..u32::from(*range.end()) + 1).collect();
    spans.sort_unstable_by_key(|span| span.start);
    let mut merged: Vec<Range<u32>> = Vec::new();
    for span in spans {
        match merged.last_mut() {
            Some(last) if span.start <= last.end => last.end = last.end.max(span.end),
            _ => merged.push(span),
        }
    }
    merged
}

/// Returns the smallest set of prefixes of 16-bit numbers that covers `start..end`.
fn aligned_blocks(mut start: u32, end: u32) -> Vec<(u16, u32)> {
    let mut blocks = Vec::new();
    while start < end {
        // The largest aligned block that begins here and does not exceed the end.
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
    // The rules that list a network in `within`, and the rules that list it in `without`.
    let mut named: BTreeMap<IpNet, (u64, u64)> = BTreeMap::new();
    let mut used_within = 0;
    for (number, rule) in rules.iter().enumerate() {
        for network in within(&rule.selector) {
            used_within |= 1 << number;
            named.entry(network.trunc()).or_default().0 |= 1 << number;
        }
        for network in without(&rule.selector) {
            named.entry(network.trunc()).or_default().1 |= 1 << number;
        }
    }
    if named.is_empty() {
        return Vec::new();
    }
    named.entry(Ipv4Net::default().into()).or_default();
    named.entry(Ipv6Net::default().into()).or_default();
    let all = rules_where(rules, |_| true);
    // The networks that contain the next one, which sort before it, each with its accumulated `within` and `without` rules.
    let mut around: Vec<(IpNet, u64, u64)> = Vec::new();
    let mut prefixes = Vec::new();
    for (network, (own_within, own_without)) in named {
        while around.last().is_some_and(|(outer, ..)| !outer.contains(&network)) {
            around.pop();
        }
        let (outer_within, outer_without) =
            around.last().map_or((all & !used_within, 0), |(_, within, without)| (*within, *without));
        let (within, without) = (outer_within | own_within, outer_without | own_without);
        around.push((network, within, without));
        let (family, address) = address_words(network.addr());
        prefixes.push(Prefix {
            bits: DIMENSION_BITS + u32::from(network.prefix_len()),
            data: address_data(scope, side, family, &address),
            rules: within & !without,
        });
    }
    prefixes
}

/// Returns an address as the programs represent it, with its [`family`].
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

    fn rule(selector: Selector) -> Rule {
        Rule { name: String::new(), line: 1, header: 0..0, selector, clauses: Vec::new() }
    }

    fn sorted(mut prefixes: Vec<Prefix>) -> Vec<Prefix> {
        prefixes.sort_unstable_by_key(key);
        prefixes
    }

    fn networks(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|network| network.parse().unwrap()).collect()
    }

    #[test]
    fn address_matches_the_rules_of_all_networks_that_contain_it() {
        let rules = [
            rule(Selector { remote: networks(&["10.0.0.0/8", "2001:db8::/32", "10.1.0.0/16"]), ..Selector::default() }),
            rule(Selector { not_remote: networks(&["10.1.0.0/16", "::/0"]), ..Selector::default() }),
            rule(Selector {
                remote: networks(&["10.0.0.0/8"]),
                not_remote: networks(&["10.1.2.0/24", "10.0.0.0/8"]),
                ..Selector::default()
            }),
            rule(Selector { remote: networks(&["10.1.2.3/32", "0.0.0.0/0"]), ..Selector::default() }),
            rule(Selector::default()),
        ];
        let rules: Vec<&Rule> = rules.iter().collect();
        let prefixes = sorted(prefixes(7, &rules));
        let table = Table(&prefixes);
        let addresses = ["9.0.0.1", "10.0.0.1", "10.1.0.1", "10.1.2.4", "10.1.2.3", "11.0.0.1", "2001:db8::1", "::1"];
        for address in addresses {
            let address: IpAddr = address.parse().unwrap();
            let covers = |networks: &[IpNet]| networks.iter().any(|network| network.contains(&address));
            let expected = rules_where(&rules, |rule| {
                let Selector { remote, not_remote, .. } = &rule.selector;
                (remote.is_empty() || covers(remote)) && !covers(not_remote)
            });
            let (family, words) = address_words(address);
            assert_eq!(table.longest(&address_data(7, side::REMOTE, family, &words)), Some(expected), "{address}");
            assert_eq!(table.longest(&address_data(7, side::LOCAL, family, &words)), None);
        }
    }

    #[test]
    fn port_matches_the_rules_of_all_ranges_that_contain_it() {
        let ranges: [&[RangeInclusive<u16>]; 4] =
            [&[80..=80, 443..=443, 80..=90, 85..=100, 101..=101], &[1..=65535], &[65535..=65535, 1..=1], &[]];
        let rules = ranges.map(|ports| rule(Selector { local_ports: ports.to_vec(), ..Selector::default() }));
        let rules: Vec<&Rule> = rules.iter().collect();
        let prefixes = sorted(prefixes(0, &rules));
        let table = Table(&prefixes);
        for port in [0, 1, 2, 79, 80, 84, 90, 91, 100, 101, 102, 443, 444, 65534, 65535] {
            let expected = rules_where(&rules, |rule| {
                let ports = &rule.selector.local_ports;
                ports.is_empty() || ports.iter().any(|range| range.contains(&port))
            });
            assert_eq!(table.longest(&port_data(0, side::LOCAL, port)), Some(expected), "{port}");
        }
    }

    #[test]
    fn nested_networks_take_one_entry_each() {
        let nested = (0..=128).map(|len| IpNet::from(Ipv6Net::new([0; 8].into(), len).unwrap()));
        let many = (0..2000u32).map(|at| IpNet::from(Ipv4Net::new((at << 12).into(), 20).unwrap()));
        let remote: Vec<IpNet> = nested.chain(many).collect();
        // Each network twice, and in two rules.
        let remote = [remote.clone(), remote].concat();
        let both =
            [Selector { remote: remote.clone(), ..Selector::default() }, Selector { remote, ..Selector::default() }];
        let rules = both.map(rule);
        let rules: Vec<&Rule> = rules.iter().collect();
        // One more entry, for IPv4 addresses outside all networks.
        assert_eq!(prefixes(0, &rules).len(), 129 + 2000 + 1);
    }

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
