//! Drift: which options of a live socket differ from the policies that apply to it. [`Desired`] and [`SocketSnapshot`] →
//! [`Finding`]s.
//!
//! The compiled tables, and the code that the kernel runs, decide which rule applies and whether a value agrees. A setting is
//! due once a policy in force would have applied it. A setting that no hook has applied yet, or never could, is no drift. A
//! limit is about values that something set, not about the kernel's defaults.
//!
//! Invariant: what is unknown is reported as unknown, neither as drift nor as agreement.

use abi::{
    apply_point,
    judge::{Argument, judge, verdict},
    live::Assignment,
    select::Candidates,
    setting::{OptionRow, Setting, Value, argument, form, read_back, traits},
};

use super::{SocketSnapshot, Values};
use crate::{
    compile::{Desired, Hook, Scope, facts},
    events::{Event, Kind, Limit, Source, Task, cause},
    host::socket::State,
    limitations,
    options::{self, Reading, Settable, SocketOption},
    policy::{
        Socket,
        model::{Direction, Family, Form, Protocol},
    },
};

/// A finding about an option of a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The option differs from the setting, or exceeds the limit.
    Drift {
        /// Index of [`Desired::settings`].
        setting: u32,
        option: &'static SocketOption,
        /// Unknown for a limit.
        wanted: Value,
        limit: Option<Limit>,
        current: Value,
    },
    /// It is unknown whether the option agrees, for this reason.
    Unknown { option: &'static SocketOption, why: &'static str },
}

/// The options of new sockets of the same kind.
pub trait Baseline {
    /// Returns the values of a new socket; `None` if none can be made.
    fn values(&mut self) -> Option<&Values>;
    /// Returns the value that a new socket has after an option was set to `value`.
    fn after(&mut self, option: &SocketOption, value: Value) -> Option<Value>;
}

/// Returns the options to read from a socket in order to find drift.
#[must_use]
pub fn needed(scope: &Scope) -> Vec<&'static SocketOption> {
    let named = scope.options.iter().filter(|option| option.names != 0).map(|option| option.key);
    named.chain([super::BUFFER_LOCKS]).filter_map(options::by_key).collect()
}

/// Compares a socket with the policies of a scope.
pub fn find(desired: &Desired, scope: &Scope, socket: &SocketSnapshot, baseline: &mut impl Baseline) -> Vec<Finding> {
    let cases = cases(desired, scope, socket);
    let named = scope.options.iter().filter(|option| option.names != 0 && !option.is_alias());
    named.filter_map(|option_row| check_option(desired, &cases, option_row, socket, baseline)).collect()
}

const NO_DIRECTION: &str = "the direction of the connection is unknown, and rules match it";
const NOT_READABLE: &str = "getsockopt does not show it";
const NOT_KEPT: &str = "the kernel changes it on a connection";
const SET_OR_TUNED: &str = "this kernel does not show whether a buffer was set or tuned";
const MULTIPATH: &str = "the connections of an MPTCP socket cannot be inspected";
const NOT_ALL_HOOKED: &str = "some hooks do not run for such sockets";
const WHETHER_BOUND: &str = "whether it was bound, or only sends, is unknown";

fn check_option(
    desired: &Desired,
    cases: &[Case],
    option_row: &OptionRow,
    socket: &SocketSnapshot,
    baseline: &mut impl Baseline,
) -> Option<Finding> {
    let Decision { setting, option, row, due } = match decide(desired, cases, option_row, socket)? {
        Ok(decision) => decision,
        Err(finding) => return Some(finding),
    };
    match row.form {
        form::SET => {
            let current = socket.value(option_row.key);
            match (due, current) {
                (Due::No, _) => None,
                (_, None) => Some(Finding::Unknown { option, why: NOT_READABLE }),
                (_, Some(current)) if agrees(option_row, option, row, current, socket, baseline) => None,
                (Due::Yes, _) if option.reading == Reading::UntilConnected && socket.is_connection() => {
                    Some(Finding::Unknown { option, why: NOT_KEPT })
                }
                (Due::Unknown(why), _) => Some(Finding::Unknown { option, why }),
                (Due::Yes, Some(current)) => {
                    let wanted = wanted(option_row, row, current);
                    Some(Finding::Drift { setting, option, wanted, limit: None, current: *current })
                }
            }
        }
        form::LIMIT => {
            let Some(current) = socket.value(option_row.key) else {
                return Some(Finding::Unknown { option, why: NOT_READABLE });
            };
            if agrees_exactly(option_row, row, current) {
                return None;
            }
            if socket.may_be_tuned(option) {
                return Some(Finding::Unknown { option, why: SET_OR_TUNED });
            }
            let limit = desired.sources.get(setting as usize).and_then(|source| match source.form {
                Form::Limit { min, max } => Some(Limit { min, max }),
                _ => None,
            });
            let drift = Finding::Drift { setting, option, wanted: Value::UNKNOWN, limit, current: *current };
            socket.is_chosen(option, current, baseline.values()).then_some(drift)
        }
        // `deny` is about calls only.
        _ => None,
    }
}

/// What policies decide about an option of a socket, independent of its value.
struct Decision<'a> {
    setting: u32,
    option: &'static SocketOption,
    row: &'a Setting,
    /// Always [`Due::Yes`] for a limit.
    due: Due,
}

/// Returns the decision about an option; `None` if no rule decides it or the socket does not have it; a finding if it is
/// unknown.
fn decide<'a>(
    desired: &'a Desired,
    cases: &[Case],
    option_row: &OptionRow,
    socket: &SocketSnapshot,
) -> Option<Result<Decision<'a>, Finding>> {
    let option = options::by_key(option_row.key)?;
    if !exists(option_row, socket) {
        return None;
    }
    let mut winners = cases.iter().map(|case| option_row.winner(case.rules));
    let setting = winners.next()?;
    if winners.any(|winner| winner != setting) {
        return Some(Err(Finding::Unknown { option, why: NO_DIRECTION }));
    }
    let setting = setting?;
    // The other name of the option for a device has its own setting.
    let row = desired
        .settings
        .get(setting as usize)
        .filter(|row| row.form != form::SET || row.is_text() == option_row.is_text())?;
    let due = if row.form == form::SET {
        let settable = option.settable()?;
        let due =
            cases.iter().map(|case| due(settable, socket, case, |rules| option_row.winner(rules) == Some(setting)));
        due.reduce(|one, other| if one == other { one } else { Due::Unknown(NO_DIRECTION) })?
    } else {
        Due::Yes
    };
    Some(Ok(Decision { setting, option, row, due }))
}

/// The values to set on a socket, found without reading its options.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Assigned {
    /// In the order in which to set them.
    pub assignments: Vec<Assignment>,
    /// For each assignment, the setting that requires it.
    pub settings: Vec<u32>,
    /// Whether this is incomplete, because other options of the socket must be read first.
    pub is_part: bool,
}

/// Returns the values to set on a socket of a scope, independent of its current values.
#[must_use]
pub fn assign(desired: &Desired, scope: &Scope, socket: &SocketSnapshot) -> Assigned {
    let mut assigned = Assigned::default();
    let cases = cases(desired, scope, socket);
    for option_row in scope.options.iter().filter(|option| option.names != 0 && !option.is_alias()) {
        match decide(desired, &cases, option_row, socket) {
            None => {}
            Some(Ok(Decision { row, due, .. }))
                if row.form == form::DENY || row.form == form::NONE || due == Due::No => {}
            Some(Ok(Decision { setting, option, row, due: Due::Yes }))
                if row.form == form::SET && keeps_value(option, socket) && !has_other_width(option_row) =>
            {
                assigned.assignments.push(Assignment::new(option_row, row));
                assigned.settings.push(setting);
            }
            Some(_) => assigned.is_part = true,
        }
    }
    assigned
}

/// Returns whether a socket keeps showing the value that was set.
fn keeps_value(option: &SocketOption, socket: &SocketSnapshot) -> bool {
    match option.reading {
        Reading::Chosen | Reading::Tuned { .. } => true,
        Reading::UntilConnected | Reading::AtMost => !socket.is_connection(),
        Reading::UntilBound | Reading::State | Reading::Never => false,
    }
}

/// Returns whether getsockopt shows an option in another width than BPF programs do, so that the values cannot be compared.
fn has_other_width(option_row: &OptionRow) -> bool {
    option_row.argument == argument::RATE
}

/// Returns whether a socket has an option that affects its traffic.
fn exists(option: &OptionRow, socket: &SocketSnapshot) -> bool {
    let has = |bit| option.traits & bit != 0;
    let is_inet6 = socket.entry.family == libc::AF_INET6;
    (!has(traits::TCP) || socket.facts.protocol == Some(Protocol::Tcp))
        && (!has(traits::INET6) || is_inet6)
        // A dual-stack socket may never carry IPv4.
        && (!has(traits::INET) || socket.facts.family() == Some(Family::Ipv4))
}

/// Whether a policy in force would have applied a setting by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    Yes,
    No,
    Unknown(&'static str),
}

/// The rules that match a socket, under one assumption about its direction. Computed once for all options.
struct Case {
    /// The rules that match the socket as it is now.
    rules: Candidates,
    /// For each apply point that the socket has passed (`surely`) or may have passed (`perhaps`), the rules that matched the
    /// facts known there.
    surely: Vec<(u32, Candidates)>,
    perhaps: Vec<(u32, Candidates)>,
}

/// Returns one case, or one for each direction if the direction of a connection is unknown.
fn cases(desired: &Desired, scope: &Scope, socket: &SocketSnapshot) -> Vec<Case> {
    let rules = |described: &Socket| desired.candidates(scope, &facts(described));
    let at = |places: Vec<(u32, Socket)>| places.iter().map(|(site, facts)| (*site, rules(facts))).collect();
    let case = |whole: &Socket| {
        let ApplyPointsPassed { mut surely, perhaps } = passed(socket, whole);
        // With the same facts as SOCK_CREATE: both hooks run when the socket is created.
        if scope.hooks.contains(&Hook::PostCreate)
            && socket.facts.protocol != Some(Protocol::Tcp)
            && let Some((_, created)) = surely.iter().find(|(site, _)| *site == apply_point::SOCK_CREATE)
        {
            surely.push((apply_point::POST_CREATE, created.clone()));
        }
        Case { rules: rules(whole), surely: at(surely), perhaps: at(perhaps) }
    };
    if socket.is_connection() && socket.facts.direction.is_none() {
        let towards = |direction| case(&Socket { direction: Some(direction), ..socket.facts.clone() });
        return vec![towards(Direction::Outbound), towards(Direction::Inbound)];
    }
    vec![case(&socket.facts)]
}

/// Returns whether a setting is due. `decides` returns whether the setting decides the option if these rules match.
fn due(settable: &Settable, socket: &SocketSnapshot, case: &Case, decides: impl Fn(Candidates) -> bool) -> Due {
    let applies = |places: &[(u32, Candidates)]| {
        places.iter().any(|(site, rules)| settable.sites.contains(*site) && decides(*rules))
    };
    if applies(&case.surely) {
        Due::Yes
    } else if applies(&case.perhaps) {
        let is_udp = socket.facts.protocol == Some(Protocol::Udp);
        Due::Unknown(if socket.is_multipath() {
            MULTIPATH
        } else if is_udp {
            WHETHER_BOUND
        } else {
            NOT_ALL_HOOKED
        })
    } else {
        Due::No
    }
}

/// The apply points that a socket has passed, each with the facts known there.
struct ApplyPointsPassed {
    surely: Vec<(u32, Socket)>,
    perhaps: Vec<(u32, Socket)>,
}

fn passed(socket: &SocketSnapshot, whole: &Socket) -> ApplyPointsPassed {
    let bound = Socket { direction: None, remote: None, ..whole.clone() };
    let unbound = Socket { local: None, local_port: None, ..bound.clone() };
    let connecting = Socket { direction: Some(Direction::Outbound), remote: whole.remote, ..unbound.clone() };
    let is_bound = whole.local.is_some() || (whole.local_port.is_some() && has_ports(whole));
    let created = (apply_point::SOCK_CREATE, unbound);
    let surely = |surely| ApplyPointsPassed { surely, perhaps: Vec::new() };
    if socket.is_multipath() {
        let perhaps =
            (apply_point::SOCK_CREATE + 1..apply_point::COUNT as u32).map(|site| (site, whole.clone())).collect();
        return ApplyPointsPassed { surely: vec![created], perhaps };
    }
    if whole.protocol != Some(Protocol::Tcp) {
        return match (whole.remote, is_bound, whole.protocol) {
            (Some(_), _, Some(Protocol::Udp)) => surely(vec![created, (apply_point::CONNECT_DATAGRAM, connecting)]),
            // The socket got its port when it was bound, or when it first sent.
            (None, true, Some(Protocol::Udp)) => ApplyPointsPassed {
                surely: vec![created, (apply_point::SEND, bound.clone())],
                perhaps: vec![(apply_point::BIND_DATAGRAM, bound)],
            },
            (None, false, Some(Protocol::Udp)) => surely(vec![created]),
            (_, _, protocol) => {
                let others = apply_point::SOCK_CREATE + 1..apply_point::COUNT as u32;
                let perhaps = others.filter(|site| limitations::may_come_by(protocol, *site));
                ApplyPointsPassed {
                    surely: vec![created],
                    perhaps: perhaps.map(|site| (site, whole.clone())).collect(),
                }
            }
        };
    }
    match (socket.entry.state, whole.direction) {
        (State::Listening, _) => {
            surely(vec![created, (apply_point::BIND_STREAM, bound), (apply_point::LISTEN, whole.clone())])
        }
        (State::Unconnected, _) if is_bound => surely(vec![created, (apply_point::BIND_STREAM, bound)]),
        (State::Unconnected, _) => surely(vec![created]),
        // An accepted socket inherits what its listener got at bind by rules that match neither the peer nor a local address.
        // The listener may not have had the local address.
        (_, Some(Direction::Inbound)) => surely(vec![
            (apply_point::BIND_STREAM, Socket { local: None, ..bound }),
            (apply_point::PASSIVE, whole.clone()),
        ]),
        (State::SynSent, _) => {
            surely(vec![created, (apply_point::CONNECT_STREAM, connecting), (apply_point::SYN, whole.clone())])
        }
        _ => surely(vec![
            created,
            (apply_point::CONNECT_STREAM, connecting),
            (apply_point::SYN, whole.clone()),
            (apply_point::ACTIVE, whole.clone()),
        ]),
    }
}

/// Returns whether a socket has ports. Raw sockets have their protocol number in place of a port.
fn has_ports(socket: &Socket) -> bool {
    matches!(socket.protocol, Some(Protocol::Tcp | Protocol::Udp | Protocol::Sctp))
}

fn agrees(
    option_row: &OptionRow,
    option: &SocketOption,
    setting: &Setting,
    current: &Value,
    socket: &SocketSnapshot,
    baseline: &mut impl Baseline,
) -> bool {
    if agrees_exactly(option_row, setting, current) {
        return true;
    }
    if option.reading == Reading::AtMost && socket.is_connection() {
        return read(option_row, current).is_some_and(|shown| shown.number <= i64::from(setting.value));
    }
    // The kernel limits some values, such as buffer sizes to those of the system.
    baseline.after(option, wanted(option_row, setting, current)) == Some(*current)
}

/// Returns whether a value is the one that the setting wants, or is within its limit.
fn agrees_exactly(option_row: &OptionRow, setting: &Setting, current: &Value) -> bool {
    // A value that cannot be read, such as a disabled time-out, is no disagreement.
    read(option_row, current).is_none_or(|shown| judge(option_row, setting, &shown).verdict == verdict::NONE)
}

/// Returns the value as an argument of setsockopt that would have this result.
fn read(option_row: &OptionRow, current: &Value) -> Option<Argument> {
    let shown = Argument::read(option_row, current.len as i32, &current.words)?;
    Some(if option_row.read_back == read_back::DOUBLED {
        Argument { number: shown.number / 2, ..shown }
    } else {
        shown
    })
}

fn wanted(option_row: &OptionRow, setting: &Setting, current: &Value) -> Value {
    read(option_row, current).map_or(Value::UNKNOWN, |shown| Value::wanted(option_row, setting, &shown))
}

/// Returns a finding as an event.
#[must_use]
pub fn event(desired: &Desired, live: &SocketSnapshot, finding: &Finding) -> Event {
    let (key, cause, kind, wanted, current) = match *finding {
        Finding::Drift { setting, option, wanted, current, .. } => {
            (option.key(), cause(desired, setting), Kind::Drift, wanted, current)
        }
        Finding::Unknown { option, why } => (
            option.key(),
            None,
            Kind::Unknown { why },
            Value::UNKNOWN,
            live.value(option.key()).copied().unwrap_or_default(),
        ),
    };
    Event {
        time: jiff::Timestamp::now(),
        kind,
        key,
        cause,
        wanted,
        requested: Value::UNKNOWN,
        optlen: None,
        applied: Value::UNKNOWN,
        current,
        result: None,
        task: live.owner.as_ref().map(|owner| Task::clone(&owner.task)),
        socket: Some(live.socket()),
        source: Source::Hook,
        via: None,
        duration_ns: None,
        suppressed: 0,
        missing: Vec::new(),
    }
}

#[cfg(test)]
mod tests;
