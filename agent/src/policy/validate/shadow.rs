//! Warnings about rules that are valid and do nothing.
//!
//! A rule can never win an option where an earlier one that matches every one of its sockets names
//! the option too. Judges each earlier rule by itself: that two of them together match everything is
//! not found out.

use std::ops::RangeInclusive;

use abi::setting::traits;
use ipnet::IpNet;

use super::clauses::Placed;
use crate::policy::{
    diagnostic::{Findings, Problem, Span, quote},
    model::{Family, Form, Named, Protocol, Selector},
};

/// A valid rule, with what a warning wants to know.
pub(super) struct Candidate {
    pub(super) name: String,
    pub(super) line: usize,
    pub(super) header: Span,
    pub(super) selector: Selector,
    pub(super) clauses: Vec<Placed>,
}

pub(super) fn warn(rules: &[Candidate], findings: &mut Findings) {
    for (at, rule) in rules.iter().enumerate() {
        warn_of_shadow(rule, &rules[..at], findings);
        for placed in &rule.clauses {
            warn_of_absence(placed, &rule.selector, findings);
        }
    }
}

fn warn_of_shadow(rule: &Candidate, earlier: &[Candidate], findings: &mut Findings) {
    let winner = |placed: &Placed| {
        let key = placed.clause.option.key();
        let names = |rule: &&Candidate| rule.clauses.iter().any(|other| other.clause.option.key() == key);
        earlier.iter().filter(names).find(|other| covers(&other.selector, &rule.selector))
    };
    let shadowed: Vec<_> = rule.clauses.iter().filter_map(|placed| Some((placed, winner(placed)?))).collect();
    let Some((_, first)) = shadowed.first() else { return };
    if shadowed.len() == rule.clauses.len() {
        let by = match shadowed.iter().all(|(_, winner)| winner.line == first.line) {
            true => format!("rule {} on line {} decides", quote(&first.name), first.line),
            false => "earlier rules decide".to_owned(),
        };
        findings.warning(
            Problem::new(format!("rule {} can never win: {by} all of its options", quote(&rule.name)))
                .help(format!("the first rule that matches wins: move this one above line {}", first.line))
                .at(rule.header.clone()),
        );
        return;
    }
    for (placed, winner) in shadowed {
        let option = placed.clause.option;
        findings.warning(
            Problem::new(format!(
                "rule {} can never win {option}: rule {} on line {} decides it",
                quote(&rule.name),
                quote(&winner.name),
                winner.line
            ))
            .help(format!("the first rule that matches wins: move this one above line {}", winner.line))
            .at(placed.span.clone()),
        );
    }
}

/// An option to set that none of the rule's sockets has. (To limit or deny it may still make sense:
/// applications call what they like.)
fn warn_of_absence(placed: &Placed, selector: &Selector, findings: &mut Findings) {
    let (Named::Known(option), Form::Set(_)) = (placed.clause.option, &placed.clause.form) else { return };
    let has = |bit| option.traits & bit != 0;
    let Selector { protocols, family, .. } = selector;
    let (sockets, key) = if has(traits::TCP) && !protocols.is_empty() && !protocols.contains(&Protocol::Tcp) {
        ("TCP", "protocol")
    } else if has(traits::INET6) && *family == Some(Family::Ipv4) {
        ("IPv6", "family")
    } else if has(traits::INET) && *family == Some(Family::Ipv6) {
        ("IPv4", "family")
    } else {
        return;
    };
    findings.warning(
        Problem::new(format!("{} is for {sockets} sockets, and this rule matches none", option.name))
            .help(format!("change `{key}`, or leave {} out", option.name))
            .at(placed.span.clone()),
    );
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
