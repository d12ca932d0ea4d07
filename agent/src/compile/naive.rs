//! Evaluates policies rule by rule, for comparison with the compiled tables.
//!
//! Written from the documented semantics, without bits or prefixes. Only tests and fuzz targets use this module.

use std::net::IpAddr;

use abi::{setting::OptionKey, socket::Facts};
use ipnet::IpNet;

use super::Desired;
use crate::{
    options::{GUARDS, by_name, by_spelling},
    policy::{
        Socket,
        model::{Form, Named, Rule, Selector},
    },
};

/// Whether a rule matches, as far as is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Matches {
    No,
    Perhaps,
    Yes,
}

/// Returns whether one condition holds. `has_condition` says whether the rule has the condition.
fn holds<T>(has_condition: bool, fact: Option<T>, test: impl Fn(T) -> bool) -> Matches {
    match fact.map(test) {
        _ if !has_condition => Matches::Yes,
        None => Matches::Perhaps,
        Some(true) => Matches::Yes,
        Some(false) => Matches::No,
    }
}

fn any_contains(networks: &[IpNet], address: IpAddr) -> bool {
    networks.iter().any(|network| network.contains(&address))
}

pub(crate) fn rule_matches(selector: &Selector, socket: &Socket) -> Matches {
    let Selector { protocols, family, direction, local, remote, not_remote, local_ports, remote_ports } = selector;
    let within = |networks: &[IpNet], address| networks.is_empty() || any_contains(networks, address);
    [
        holds(!protocols.is_empty(), socket.protocol, |protocol| protocols.contains(&protocol)),
        holds(family.is_some(), socket.family(), |known| Some(known) == *family),
        holds(direction.is_some(), socket.direction, |known| Some(known) == *direction),
        holds(!local.is_empty(), socket.local, |address| any_contains(local, address)),
        holds(!(remote.is_empty() && not_remote.is_empty()), socket.remote, |to| {
            within(remote, to.ip()) && !any_contains(not_remote, to.ip())
        }),
        holds(!local_ports.is_empty(), socket.local_port, |port| local_ports.iter().any(|range| range.contains(&port))),
        holds(!remote_ports.is_empty(), socket.remote, |to| {
            remote_ports.iter().any(|range| range.contains(&to.port()))
        }),
    ]
    .into_iter()
    .min()
    .unwrap_or(Matches::Yes)
}

/// Returns the number of the rule whose clause decides an option; `None` if no rule does, or if a rule leaves the option free.
pub(crate) fn naive_winner(rules: &[Rule], named: Named, socket: &Socket) -> Option<usize> {
    for (number, rule) in rules.iter().enumerate() {
        let Some(clause) = rule.clauses.iter().find(|clause| clause.option.value_key() == named.value_key()) else {
            continue;
        };
        match rule_matches(&rule.selector, socket) {
            Matches::Yes => return (clause.form != Form::Free).then_some(number),
            // The rule may later forbid what a later rule would set now.
            Matches::Perhaps if !matches!(clause.form, Form::Set(_)) => return None,
            Matches::Perhaps | Matches::No => {}
        }
    }
    None
}

/// Returns the number of the rule that decides an option in a scope, by the compiled tables; `None` as for [`naive_winner`].
pub(crate) fn winner_in(desired: &Desired, scope: usize, named: Named, facts: &Facts) -> Option<usize> {
    let scope = &desired.scopes[scope];
    let option = scope.options.iter().find(|option| option.key == named.key())?;
    let winner = option.winner(desired.candidates(scope, facts));
    assert!(!option.is_certain() || winner == Some(option.first_setting), "`certain` disagrees with the winner");
    let winner = winner?;
    let source = &desired.sources[winner as usize];
    assert_eq!(source.option.value_key(), named.value_key(), "a setting of another value");
    (source.form != Form::Free).then_some(source.rule)
}

/// The values that a call on an option affects, by [`Named::value_key`], each with the rule that decides it.
pub(crate) type Governing = Vec<(OptionKey, Option<usize>)>;

/// Returns the values that a call on an option affects, by the rules: the value that the option sets, if a rule names
/// it under any name, and the values that a guard protects.
pub(crate) fn naive_governing(rules: &[Rule], key: OptionKey, socket: &Socket) -> Governing {
    let option = by_spelling(key);
    let own = option.map_or(Named::Numeric(key), Named::Known);
    let guards = GUARDS.iter().filter(|guard| by_name(guard.option).is_some_and(|option| option.key() == key));
    let kept = guards.filter_map(|guard| by_name(guard.keeps).map(Named::Known));
    let is_governed = |value: OptionKey| {
        let clauses =
            || rules.iter().flat_map(|rule| &rule.clauses).filter(|clause| clause.option.value_key() == value);
        clauses().any(|clause| clause.form != Form::Free)
    };
    let governing = [own].into_iter().chain(kept).filter(|named| is_governed(named.value_key()));
    governing.map(|named| (named.value_key(), naive_winner(rules, named, socket))).collect()
}

/// Returns the values that a call on an option affects in a scope, by the compiled tables.
pub(crate) fn governing_in(desired: &Desired, scope: usize, key: OptionKey, facts: &Facts) -> Governing {
    let scope = &desired.scopes[scope];
    let candidates = desired.candidates(scope, facts);
    let mut governing = Vec::new();
    let mut next = scope.options.iter().position(|option| option.key == key);
    while let Some(option) = next.map(|row| &scope.options[row]) {
        assert!(option.key == key && governing.len() <= scope.options.len(), "a row of another option");
        if option.names != 0 {
            let value = desired.sources[option.first_setting as usize].option.value_key();
            let winner = option.winner(candidates).map(|setting| &desired.sources[setting as usize]);
            assert!(winner.is_none_or(|source| source.option.value_key() == value), "a setting of another value");
            let deciding = winner.filter(|source| source.form != Form::Free);
            governing.push((value, deciding.map(|source| source.rule)));
        }
        next = option.next.checked_sub(1).map(|row| row as usize);
    }
    governing
}
