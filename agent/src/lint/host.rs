//! Warnings about settings that a host cannot apply: values above its limits, congestion controls that it does not
//! have.

use super::{clauses, warning};
use crate::{
    options::{CONGESTION, ValueKind},
    policy::{
        diagnostic::{Diagnostic, Problem, nearest},
        model::{Clause, Form, Named, Policy, Wanted},
        units,
    },
};

/// Facts about a host.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// The loaded congestion controls; `None` if unknown.
    pub congestion_controls: Option<Vec<String>>,
    pub locked_routes: Vec<LockedRoute>,
    /// The largest send buffer that setsockopt accepts (net.core.wmem_max), in bytes; `None` if unknown.
    pub wmem_max: Option<i64>,
    /// The largest receive buffer that setsockopt accepts (net.core.rmem_max), in bytes; `None` if unknown.
    pub rmem_max: Option<i64>,
}

/// A route whose congestion control connections cannot change (`congctl lock`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockedRoute {
    /// As `ip route` shows it.
    pub destination: String,
    /// `None` if the route does not name one.
    pub congestion_control: Option<String>,
}

/// Returns whether the routes of a host matter to the policies. Reading them can be expensive: there may be many.
#[must_use]
pub fn asks_for_routes(policies: &[Policy]) -> bool {
    policies.iter().flat_map(clauses).any(|(_, clause)| wanted_control(clause).is_some())
}

/// Returns the settings that a host cannot apply.
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
            "connections over routes that lock another congestion control do not get `{name}`: {route}{more}"
        ))
        .help("remove `lock` from the route: ip route change … congctl NAME"),
    )
}

/// Returns a problem with a size that `sk_setsockopt` (net/core/sock.c) would silently clamp.
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
        Problem::new(format!("{sysctl} limits {} to {most} on this host: {wanted} is more", option.name))
            .help(format!("write a smaller value, or raise the limit: sysctl -w {sysctl}=…"))
    })
}
