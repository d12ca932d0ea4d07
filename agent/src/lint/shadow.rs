//! Warnings about rules that are valid and have no effect.
//!
//! A rule can never win an option if an earlier rule names the option too and matches every socket of the rule. Each
//! earlier rule is compared by itself: two earlier rules that together match everything are not found.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ops::{Range, RangeInclusive},
};

use abi::setting::{OptionKey, traits};
use ipnet::IpNet;

use super::warning;
use crate::{
    compile::merged,
    coverage::stacks_by_target,
    escape::Escape,
    policy::{
        diagnostic::{Diagnostic, Problem, quote},
        model::{Clause, Family, Form, Named, Policy, Protocol, Rule, Selector},
    },
};

/// A rule, its policy, and its lists.
type Placed<'a> = (&'a Policy, &'a Rule, &'a Lists);

/// Policies with the same target are in force together, in the order of their file names.
pub(super) fn lint(policies: &[Policy]) -> Vec<Diagnostic> {
    let lists: Vec<Vec<Lists>> =
        policies.iter().map(|policy| policy.rules.iter().map(|rule| Lists::new(&rule.selector)).collect()).collect();
    let placed = |policy: usize| {
        let rules = policies[policy].rules.iter().zip(&lists[policy]);
        rules.map(move |(rule, lists)| (&policies[policy], rule, lists))
    };
    let stacks = stacks_by_target(policies);
    let mut found = Vec::new();
    for number in 0..policies.len() {
        let together = &stacks[&policies[number].target];
        let rules: Vec<Placed<'_>> =
            together.iter().copied().take_while(|other| *other <= number).flat_map(placed).collect();
        let own = rules.len() - policies[number].rules.len();
        for (at, placed) in rules.iter().enumerate().skip(own) {
            found.extend(shadows(*placed, &rules[..at]));
            found.extend(placed.1.clauses.iter().filter_map(|clause| absence(placed.0, clause, &placed.1.selector)));
        }
    }
    found
}

fn shadows(placed: Placed<'_>, earlier: &[Placed<'_>]) -> Vec<Diagnostic> {
    let (policy, rule, _) = placed;
    let winners = winners(placed, earlier);
    let winner = |clause: &Clause| winners.get(&clause.option.value_key()).copied();
    let shadowed: Vec<_> = rule.clauses.iter().filter_map(|clause| Some((clause, winner(clause)?))).collect();
    let Some((_, first)) = shadowed.first() else { return Vec::new() };
    if shadowed.len() == rule.clauses.len() {
        let by = match shadowed.iter().all(|(_, winner)| std::ptr::eq(winner.1, first.1)) {
            true => format!("rule {} decides", location(**first, policy)),
            false => "earlier rules decide".to_owned(),
        };
        let problem = Problem::new(format!("rule {} can never win: {by} all of its options", quote(&rule.name)))
            .help(remedy(**first, policy))
            .at(rule.header.clone());
        return vec![warning(policy, problem)];
    }
    let problem = |(clause, winner): (&Clause, &Placed<'_>)| {
        let option = clause.option;
        let by = location(*winner, policy);
        Problem::new(format!("rule {} can never win {option}: rule {by} decides it", quote(&rule.name)))
            .help(remedy(*winner, policy))
            .at(clause.span.clone())
    };
    shadowed.into_iter().map(|shadowed| warning(policy, problem(shadowed))).collect()
}

/// Returns the earlier rule that decides each option of a rule, if one does.
fn winners<'a, 'b>(placed: Placed<'_>, earlier: &'b [Placed<'a>]) -> BTreeMap<OptionKey, &'b Placed<'a>> {
    let mut open: BTreeSet<OptionKey> = placed.1.clauses.iter().map(|clause| clause.option.value_key()).collect();
    let mut winners = BTreeMap::new();
    for other in earlier {
        let mut keys = other.1.clauses.iter().map(|clause| clause.option.value_key()).filter(|key| open.contains(key));
        let Some(first) = keys.next() else { continue };
        let keys: Vec<_> = [first].into_iter().chain(keys).collect();
        if covers(*other, placed) {
            for key in keys {
                open.remove(&key);
                winners.insert(key, other);
            }
        }
    }
    winners
}

fn location((policy, rule, _): Placed<'_>, seen_from: &Policy) -> String {
    if std::ptr::eq(policy, seen_from) {
        format!("{} on line {}", quote(&rule.name), rule.line)
    } else {
        format!("{} of {}:{}", quote(&rule.name), policy.path().escaped(), rule.line)
    }
}

fn remedy((policy, rule, _): Placed<'_>, seen_from: &Policy) -> String {
    if std::ptr::eq(policy, seen_from) {
        format!("the first rule that matches wins: move this one above line {}", rule.line)
    } else {
        "rename this file so that it sorts before that file, or give it a deeper target".to_owned()
    }
}

/// Returns a warning about an option to set that no socket of the rule has. `limit` and `deny` may still be useful,
/// since applications can make any call.
fn absence(policy: &Policy, clause: &Clause, selector: &Selector) -> Option<Diagnostic> {
    let (Named::Known(option), Form::Set(_)) = (clause.option, &clause.form) else { return None };
    let has = |bit| option.traits & bit != 0;
    let Selector { protocols, family, .. } = selector;
    let (sockets, key) = if has(traits::TCP) && !protocols.is_empty() && !protocols.contains(&Protocol::Tcp) {
        ("TCP", "protocol")
    } else if has(traits::INET6) && *family == Some(Family::Ipv4) {
        ("IPv6", "family")
    } else if has(traits::INET) && *family == Some(Family::Ipv6) {
        ("IPv4", "family")
    } else {
        return None;
    };
    let problem = Problem::new(format!("{} is for {sockets} sockets, and this rule matches none", option.name))
        .help(format!("change `{key}`, or leave {} out", option.name))
        .at(clause.span.clone());
    Some(warning(policy, problem))
}

/// The lists of a selector, in a form that is fast to search.
#[derive(Debug)]
struct Lists {
    local: HashSet<IpNet>,
    remote: HashSet<IpNet>,
    not_remote: HashSet<IpNet>,
    local_ports: Vec<Range<u32>>,
    remote_ports: Vec<Range<u32>>,
}

impl Lists {
    fn new(selector: &Selector) -> Self {
        let Selector { local, remote, not_remote, local_ports, remote_ports, .. } = selector;
        Self {
            local: local.iter().copied().collect(),
            remote: remote.iter().copied().collect(),
            not_remote: not_remote.iter().copied().collect(),
            local_ports: merged(local_ports),
            remote_ports: merged(remote_ports),
        }
    }
}

/// Returns whether one of these networks contains this network, with one lookup for each prefix length.
fn has_around(networks: &HashSet<IpNet>, inner: &IpNet) -> bool {
    let around = |len| IpNet::new(inner.addr(), len).is_ok_and(|network| networks.contains(&network.trunc()));
    (0..=inner.prefix_len()).rev().any(around)
}

/// Returns whether one of these sorted, disjoint spans contains this range.
fn has_span_around(spans: &[Range<u32>], inner: &RangeInclusive<u16>) -> bool {
    let (start, end) = (u32::from(*inner.start()), u32::from(*inner.end()));
    let after = spans.partition_point(|span| span.start <= start);
    after.checked_sub(1).is_some_and(|at| end < spans[at].end)
}

/// Returns whether `wide` matches every socket that `narrow` matches.
fn covers((_, wide, lists): Placed<'_>, (_, narrow, narrow_lists): Placed<'_>) -> bool {
    let (wide, narrow) = (&wide.selector, &narrow.selector);
    let Selector { protocols, family, direction, local, remote, not_remote, local_ports, remote_ports } = wide;
    let is_subset = |is_all: bool, narrow: &[IpNet], wide: &HashSet<IpNet>| {
        is_all || (!narrow.is_empty() && narrow.iter().all(|network| has_around(wide, network)))
    };
    let spans = |is_all: bool, narrow: &[RangeInclusive<u16>], wide: &[Range<u32>]| {
        is_all || (!narrow.is_empty() && narrow.iter().all(|range| has_span_around(wide, range)))
    };
    (protocols.is_empty()
        || (!narrow.protocols.is_empty() && narrow.protocols.iter().all(|protocol| protocols.contains(protocol))))
        && (family.is_none() || *family == narrow.family)
        && (direction.is_none() || *direction == narrow.direction)
        && is_subset(local.is_empty(), &narrow.local, &lists.local)
        && is_subset(remote.is_empty(), &narrow.remote, &lists.remote)
        && not_remote.iter().all(|out| has_around(&narrow_lists.not_remote, out))
        && spans(local_ports.is_empty(), &narrow.local_ports, &lists.local_ports)
        && spans(remote_ports.is_empty(), &narrow.remote_ports, &lists.remote_ports)
}
