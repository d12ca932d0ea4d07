//! Warnings about what a host does not let policies have: values beyond its limits, congestion controls that it has not.

use super::{clauses, warning};
use crate::{
    options::{CONGESTION, ValueKind},
    policy::{
        diagnostic::{Diagnostic, Problem, nearest},
        model::{Clause, Form, Named, Policy, Wanted},
        units,
    },
};

/// What is known of a host.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// The congestion controls that are loaded; `None`: not known.
    pub congestion_controls: Option<Vec<String>>,
    pub locked_routes: Vec<LockedRoute>,
    /// The largest send buffer that can be asked for (net.core.wmem_max), in bytes; `None`: not known.
    pub wmem_max: Option<i64>,
    /// The same for receive buffers (net.core.rmem_max).
    pub rmem_max: Option<i64>,
}

/// A route that keeps connections from having another congestion control than its own (`congctl lock`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockedRoute {
    /// As `ip route` shows it.
    pub destination: String,
    /// `None`: it does not say.
    pub congestion_control: Option<String>,
}

/// Whether the routes of a host matter to policies: there may be many.
#[must_use]
pub fn asks_for_routes(policies: &[Policy]) -> bool {
    policies.iter().flat_map(clauses).any(|(_, clause)| wanted_control(clause).is_some())
}

/// What a host will not let policies have.
#[must_use]
pub fn on_host(policies: &[Policy], host: &Host) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    for policy in policies {
        for (_, clause) in clauses(policy) {
            let problems = [missing_control(clause, host), locked_control(clause, host), clamped_buffer(clause, host)];
            let problems = problems.into_iter().flatten();
            found.extend(problems.map(|problem| warning(policy, problem.at(clause.span.clone()))));
        }
    }
    found
}

fn wanted_control(clause: &Clause) -> Option<&str> {
    match (clause.option, &clause.form) {
        (Named::Known(option), Form::Set(Wanted::Text(name))) if option == CONGESTION => Some(name),
        _ => None,
    }
}

fn missing_control(clause: &Clause, host: &Host) -> Option<Problem> {
    let name = wanted_control(clause)?;
    let available = host.congestion_controls.as_ref()?;
    if available.iter().any(|known| known == name) {
        return None;
    }
    let list = available.join(", ");
    let help = match nearest(name, available.iter().map(String::as_str)) {
        Some(near) => format!("did you mean \"{near}\"? If not, load it: modprobe tcp_{name}"),
        None => format!("load it: modprobe tcp_{name}"),
    };
    Some(Problem::new(format!("congestion control `{name}` is not loaded on this host, which has {list}")).help(help))
}

fn locked_control(clause: &Clause, host: &Host) -> Option<Problem> {
    let name = wanted_control(clause)?;
    let mut others = host.locked_routes.iter().filter(|route| route.congestion_control.as_deref() != Some(name));
    let route = &others.next()?.destination;
    let more = match others.count() {
        0 => String::new(),
        more => format!(", and {more} more"),
    };
    Some(
        Problem::new(format!(
            "connections over a route that locks its congestion control do not get `{name}`: {route}{more}"
        ))
        .help("leave `lock` out of the route: ip route change … congctl NAME"),
    )
}

/// `sk_setsockopt` (net/core/sock.c) takes no more than that, and says nothing.
fn clamped_buffer(clause: &Clause, host: &Host) -> Option<Problem> {
    let Named::Known(option) = clause.option else { return None };
    let (most, sysctl) = match option.name {
        "SO_SNDBUF" => (host.wmem_max?, "net.core.wmem_max"),
        "SO_RCVBUF" => (host.rmem_max?, "net.core.rmem_max"),
        _ => return None,
    };
    let wanted = match clause.form {
        Form::Set(Wanted::Number { value, .. }) => i64::from(value),
        Form::Limit { min, .. } => min,
        _ => return None,
    };
    (wanted > most).then(|| {
        let [wanted, most] = [wanted, most].map(|bytes| units::show_literal(ValueKind::Bytes, bytes));
        Problem::new(format!("this host gives {} no more than {most}, by {sysctl}, and not {wanted}", option.name))
            .help(format!("write no more than that, or raise it: sysctl -w {sysctl}=…"))
    })
}
