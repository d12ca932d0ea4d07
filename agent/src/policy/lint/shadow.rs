//! Warnings about rules that are valid and do nothing.
//!
//! A rule can never win an option where an earlier one that matches every one of its sockets names
//! the option too. Judges each earlier rule by itself: that two of them together match everything is
//! not found out.

use std::ops::RangeInclusive;

use abi::setting::traits;
use ipnet::IpNet;

use super::warning;
use crate::{
    coverage::stack_with,
    escape::Escape,
    policy::{
        diagnostic::{Diagnostic, Problem, quote},
        model::{Clause, Family, Form, Named, Policy, Protocol, Rule, Selector},
    },
};

/// A rule, and the policy that it stands in.
type Placed<'a> = (&'a Policy, &'a Rule);

/// Files with the same target are in force together, in the order of their names.
pub(super) fn lint(policies: &[Policy]) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    for number in 0..policies.len() {
        let together = stack_with(policies, number);
        let rules: Vec<Placed<'_>> = together
            .into_iter()
            .take_while(|other| *other <= number)
            .flat_map(|other| policies[other].rules.iter().map(move |rule| (&policies[other], rule)))
            .collect();
        let own = rules.len() - policies[number].rules.len();
        for (at, placed) in rules.iter().enumerate().skip(own) {
            found.extend(shadows(*placed, &rules[..at]));
            found.extend(placed.1.clauses.iter().filter_map(|clause| absence(placed.0, clause, &placed.1.selector)));
        }
    }
    found
}

fn shadows((policy, rule): Placed<'_>, earlier: &[Placed<'_>]) -> Vec<Diagnostic> {
    let winner = |clause: &Clause| {
        let key = clause.option.value_key();
        let names = |other: &&Placed<'_>| other.1.clauses.iter().any(|other| other.option.value_key() == key);
        earlier.iter().filter(names).find(|other| covers(&other.1.selector, &rule.selector))
    };
    let shadowed: Vec<_> = rule.clauses.iter().filter_map(|clause| Some((clause, winner(clause)?))).collect();
    let Some((_, first)) = shadowed.first() else { return Vec::new() };
    if shadowed.len() == rule.clauses.len() {
        let by = match shadowed.iter().all(|(_, winner)| std::ptr::eq(winner.1, first.1)) {
            true => format!("rule {} decides", place(**first, policy)),
            false => "earlier rules decide".to_owned(),
        };
        let problem = Problem::new(format!("rule {} can never win: {by} all of its options", quote(&rule.name)))
            .help(remedy(**first, policy))
            .at(rule.header.clone());
        return vec![warning(policy, problem)];
    }
    let problem = |(clause, winner): (&Clause, &Placed<'_>)| {
        let option = clause.option;
        let by = place(*winner, policy);
        Problem::new(format!("rule {} can never win {option}: rule {by} decides it", quote(&rule.name)))
            .help(remedy(*winner, policy))
            .at(clause.span.clone())
    };
    shadowed.into_iter().map(|shadowed| warning(policy, problem(shadowed))).collect()
}

fn place((policy, rule): Placed<'_>, seen_from: &Policy) -> String {
    if std::ptr::eq(policy, seen_from) {
        format!("{} on line {}", quote(&rule.name), rule.line)
    } else {
        format!("{} of {}:{}", quote(&rule.name), policy.path().escaped(), rule.line)
    }
}

fn remedy((policy, rule): Placed<'_>, seen_from: &Policy) -> String {
    if std::ptr::eq(policy, seen_from) {
        format!("the first rule that matches wins: move this one above line {}", rule.line)
    } else {
        "files with the same target decide in the order of their names: rename this one, or give it a deeper target"
            .to_owned()
    }
}

/// An option to set that none of the rule's sockets has. (To limit or deny it may still make sense:
/// applications call what they like.)
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

/// Whether every socket that `narrow` matches is matched by `wide`.
fn covers(wide: &Selector, narrow: &Selector) -> bool {
    let Selector { protocols, family, direction, local, remote, not_remote, local_ports, remote_ports } = wide;
    let holds = |wide: &[IpNet], narrow: &[IpNet]| subset(wide, narrow, |wide, narrow| wide.contains(narrow));
    let spans = |wide: &[RangeInclusive<u16>], narrow: &[RangeInclusive<u16>]| {
        subset(wide, narrow, |wide, narrow| wide.contains(narrow.start()) && wide.contains(narrow.end()))
    };
    subset(protocols, &narrow.protocols, PartialEq::eq)
        && (family.is_none() || *family == narrow.family)
        && (direction.is_none() || *direction == narrow.direction)
        && holds(local, &narrow.local)
        && holds(remote, &narrow.remote)
        && not_remote.iter().all(|out| narrow.not_remote.iter().any(|other| other.contains(out)))
        && spans(local_ports, &narrow.local_ports)
        && spans(remote_ports, &narrow.remote_ports)
}

/// Whether each item of `narrow` lies in one of `wide`, where an empty list is everything.
fn subset<T>(wide: &[T], narrow: &[T], holds: impl Fn(&T, &T) -> bool) -> bool {
    wide.is_empty() || (!narrow.is_empty() && narrow.iter().all(|item| wide.iter().any(|other| holds(other, item))))
}
