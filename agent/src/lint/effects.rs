//! Warnings about settings that are set too late to have an effect.
//!
//! The option table says when each option is set, and which options affect each other.

use abi::apply_point;

use super::{clauses, warning};
use crate::{
    compile::may_pass,
    limitations::{self, Concern},
    options::SocketOption,
    policy::{
        diagnostic::{Diagnostic, Problem},
        model::{Clause, Direction, Form, Named, Policy, Protocol, Rule, Selector},
    },
};

pub(super) fn lint(policy: &Policy) -> Vec<Diagnostic> {
    settings(policy)
        .filter_map(|(rule, clause, option)| {
            too_late(rule, option).map(|problem| warning(policy, problem.at(clause.span.clone())))
        })
        .collect()
}

pub(super) fn caveats(policy: &Policy) -> Vec<Diagnostic> {
    let unsupported = clauses(policy).flat_map(|(rule, clause)| {
        let entries = limitations::of_rule(&rule.selector, clause.option, &clause.form).into_iter();
        entries.filter(|(_, concern)| *concern == Concern::Asked).map(|(entry, _)| {
            let problem = Problem::new(format!("{} is not supported on all sockets of this rule", clause.option));
            warning(policy, problem.help(entry.to_string()).at(clause.span.clone()))
        })
    });
    unsupported.collect()
}

/// Returns each option that a rule sets.
fn settings(policy: &Policy) -> impl Iterator<Item = (&Rule, &Clause, &'static SocketOption)> {
    clauses(policy).filter_map(|(rule, clause)| match (clause.option, &clause.form) {
        (Named::Known(option), Form::Set(_)) => Some((rule, clause, option)),
        _ => None,
    })
}

/// Returns a problem if the rule never sets the option in time: no socket of the rule passes an apply point of the
/// option, or too little is known about the socket there.
fn too_late(rule: &Rule, option: &SocketOption) -> Option<Problem> {
    let sites = option.settable()?.sites;
    let selector = &rule.selector;
    let sites: Vec<u32> = (0..apply_point::COUNT as u32)
        .filter(|site| sites.contains(*site) && may_pass(&selector.protocols, *site))
        .collect();
    let passed: Vec<u32> = sites.iter().copied().filter(|site| can_pass(selector.direction, *site)).collect();
    let needs_peer = needs_peer(selector);
    if let (Some(direction), true) = (selector.direction, passed.is_empty() && !sites.is_empty()) {
        return Some(
            Problem::new(format!(
                "{} has no effect on {direction} sockets, and this rule matches no others",
                option.name
            ))
            .help(format!("change `direction`, or leave {} out", option.name)),
        );
    }
    if !passed.is_empty() && !passed.iter().any(|site| is_decided(selector, *site)) {
        let (what, key) = if needs_peer { ("the peer", "remote") } else { ("the direction", "direction") };
        return Some(
            Problem::new(format!(
                "{} is never set by this rule: it takes effect before {what} of a socket is known",
                option.name
            ))
            .help(format!("set it in a rule without `{key}`")),
        );
    }
    let negotiated = option.negotiated?;
    let accepts = rule.selector.direction != Some(Direction::Outbound);
    let is_tcp = rule.selector.protocols.is_empty() || rule.selector.protocols.contains(&Protocol::Tcp);
    (needs_peer && accepts && is_tcp).then(|| {
        Problem::new(format!(
            "{} is set too late for accepted connections: when their peer is known, {negotiated}",
            option.name
        ))
        .help("set it in a rule that does not match the peer, so that it applies to the listener; or add direction = \"outbound\"")
    })
}

fn needs_peer(selector: &Selector) -> bool {
    !(selector.remote.is_empty() && selector.not_remote.is_empty() && selector.remote_ports.is_empty())
}

/// Returns whether sockets of this direction, or of either, can pass an apply point.
fn can_pass(direction: Option<Direction>, site: u32) -> bool {
    let only = match site {
        apply_point::CONNECT_STREAM | apply_point::CONNECT_DATAGRAM | apply_point::SYN | apply_point::ACTIVE => {
            Direction::Outbound
        }
        apply_point::PASSIVE | apply_point::LISTEN => Direction::Inbound,
        _ => return true,
    };
    direction.is_none_or(|direction| direction == only)
}

/// Returns whether the facts known at an apply point decide if the rule matches: direction and peer are not known
/// everywhere.
fn is_decided(selector: &Selector, site: u32) -> bool {
    let knows_direction = !matches!(
        site,
        apply_point::SOCK_CREATE
            | apply_point::POST_CREATE
            | apply_point::BIND_STREAM
            | apply_point::BIND_DATAGRAM
            | apply_point::SEND
    );
    let knows_peer = knows_direction && site != apply_point::LISTEN;
    (knows_direction || selector.direction.is_none()) && (knows_peer || !needs_peer(selector))
}
