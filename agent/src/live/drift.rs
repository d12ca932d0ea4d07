//! What of a live socket disagrees with the policies that govern it: [`Desired`] and [`SocketSnapshot`] → [`Finding`]s.
//!
//! Which rule decides is found by the compiled tables and the code that the kernel runs, and so is whether a value agrees. A
//! setting counts from when a policy that was in force would have applied it: what a socket has not come to yet, and what it
//! could never come by, is no drift. A limit is about what somebody chose, and not about what the kernel gave the socket.
//!
//! Invariant: what cannot be told is said to be so, and neither taken for drift nor for agreement.

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

/// What there is to say of an option on a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// It has another value than the setting wants, or one beyond the limit.
    Drift {
        /// Index of [`Desired::settings`].
        setting: u32,
        option: &'static SocketOption,
        /// Unknown for a limit.
        wanted: Value,
        limit: Option<Limit>,
        current: Value,
    },
    /// Whether it agrees cannot be told.
    Unknown { option: &'static SocketOption, why: &'static str },
}

/// What the kernel says of new sockets of the same kind.
pub trait Baseline {
    /// What one has; `None` where none can be made.
    fn values(&mut self) -> Option<&Values>;
    /// What one shows of an option after it was set to a value.
    fn after(&mut self, option: &SocketOption, value: Value) -> Option<Value>;
}

/// The options to be read of a socket for that.
#[must_use]
pub fn needed(scope: &Scope) -> Vec<&'static SocketOption> {
    let named = scope.options.iter().filter(|option| option.names != 0).map(|option| option.key);
    named.chain([super::BUFFER_LOCKS]).filter_map(options::by_key).collect()
}

/// Holds a socket against the policies of a scope.
pub fn find(desired: &Desired, scope: &Scope, live: &SocketSnapshot, fresh: &mut impl Baseline) -> Vec<Finding> {
    let cases = cases(desired, scope, live);
    let named = scope.options.iter().filter(|option| option.names != 0 && !option.is_alias());
    named.filter_map(|governed| find_in(desired, &cases, governed, live, fresh)).collect()
}

const NO_DIRECTION: &str = "which end began the connection is not known, and rules ask for it";
const NOT_READABLE: &str = "getsockopt does not show it";
const NOT_KEPT: &str = "the kernel changes it by itself on a connection";
const WHO_CHOSE: &str = "this kernel does not tell a buffer that was set from one that it tunes";
const MULTIPATH: &str = "the connections of an MPTCP socket cannot be looked into";
const UNREACHED: &str = "hooks do not reach such sockets everywhere";
const WHETHER_BOUND: &str = "whether it was bound, or only sends, is not known";

fn find_in(
    desired: &Desired,
    cases: &[Case],
    governed: &OptionRow,
    live: &SocketSnapshot,
    fresh: &mut impl Baseline,
) -> Option<Finding> {
    let Decision { setting, option, row, due } = match decide(desired, cases, governed, live)? {
        Ok(decision) => decision,
        Err(finding) => return Some(finding),
    };
    match row.form {
        form::SET => {
            let now = live.value(governed.key);
            match (due, now) {
                (Due::No, _) => None,
                (_, None) => Some(Finding::Unknown { option, why: NOT_READABLE }),
                (_, Some(now)) if agrees(governed, option, row, now, live, fresh) => None,
                (Due::Yes, _) if option.reading == Reading::UntilConnected && live.is_connection() => {
                    Some(Finding::Unknown { option, why: NOT_KEPT })
                }
                (Due::Unknown(why), _) => Some(Finding::Unknown { option, why }),
                (Due::Yes, Some(now)) => {
                    let wanted = wanted(governed, row, now);
                    Some(Finding::Drift { setting, option, wanted, limit: None, current: *now })
                }
            }
        }
        form::LIMIT => {
            let Some(now) = live.value(governed.key) else {
                return Some(Finding::Unknown { option, why: NOT_READABLE });
            };
            if agrees_as_it_is(governed, row, now) {
                return None;
            }
            if live.may_be_tuned(option) {
                return Some(Finding::Unknown { option, why: WHO_CHOSE });
            }
            let limit = desired.sources.get(setting as usize).and_then(|source| match source.form {
                Form::Limit { min, max } => Some(Limit { min, max }),
                _ => None,
            });
            let drift = Finding::Drift { setting, option, wanted: Value::UNKNOWN, limit, current: *now };
            live.is_chosen(option, now, fresh.values()).then_some(drift)
        }
        // Only calls can be denied.
        _ => None,
    }
}

/// What policies say of an option on a socket, whatever it has.
struct Decision<'a> {
    setting: u32,
    option: &'static SocketOption,
    row: &'a Setting,
    /// Of a limit, which is always: that it is.
    due: Due,
}

/// `None` where nothing decides on the option, or the socket has none such; a finding where it cannot be told.
fn decide<'a>(
    desired: &'a Desired,
    cases: &[Case],
    governed: &OptionRow,
    live: &SocketSnapshot,
) -> Option<Result<Decision<'a>, Finding>> {
    let option = options::by_key(governed.key)?;
    if !exists(governed, live) {
        return None;
    }
    let mut winners = cases.iter().map(|case| governed.winner(case.rules));
    let setting = winners.next()?;
    if winners.any(|winner| winner != setting) {
        return Some(Err(Finding::Unknown { option, why: NO_DIRECTION }));
    }
    let setting = setting?;
    // The other name of a device has a row of its own.
    let row = desired
        .settings
        .get(setting as usize)
        .filter(|row| row.form != form::SET || row.is_text() == governed.is_text())?;
    let due = if row.form == form::SET {
        let settable = option.settable()?;
        let due = cases.iter().map(|case| due(settable, live, case, |rules| governed.winner(rules) == Some(setting)));
        due.reduce(|one, other| if one == other { one } else { Due::Unknown(NO_DIRECTION) })?
    } else {
        Due::Yes
    };
    Some(Ok(Decision { setting, option, row, due }))
}

/// What a socket is to be given, told without looking into it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Assigned {
    /// In the order in which to set them.
    pub assignments: Vec<Assignment>,
    /// By assignment: the setting that says so.
    pub settings: Vec<u32>,
    /// Whether there is more to find: something of which the socket itself has to be asked.
    pub is_part: bool,
}

/// What a socket of a scope is to be given, whatever it has.
#[must_use]
pub fn assign(desired: &Desired, scope: &Scope, live: &SocketSnapshot) -> Assigned {
    let mut assigned = Assigned::default();
    let cases = cases(desired, scope, live);
    for governed in scope.options.iter().filter(|option| option.names != 0 && !option.is_alias()) {
        match decide(desired, &cases, governed, live) {
            None => {}
            Some(Ok(Decision { row, due, .. })) if row.form == form::DENY || due == Due::No => {}
            Some(Ok(Decision { setting, option, row, due: Due::Yes }))
                if row.form == form::SET && is_kept(option, live) && !is_wide(governed) =>
            {
                assigned.assignments.push(Assignment::new(governed, row));
                assigned.settings.push(setting);
            }
            Some(_) => assigned.is_part = true,
        }
    }
    assigned
}

/// Whether a socket goes on to show what it was given.
fn is_kept(option: &SocketOption, live: &SocketSnapshot) -> bool {
    match option.reading {
        Reading::Chosen | Reading::Tuned { .. } => true,
        Reading::UntilConnected | Reading::AtMost => !live.is_connection(),
        Reading::UntilBound | Reading::State | Reading::Never => false,
    }
}

/// Whether getsockopt shows an option in another width than programs see it in: then neither tells what came of the other.
fn is_wide(governed: &OptionRow) -> bool {
    governed.argument == argument::RATE
}

/// Whether a socket has an option that matters to its traffic.
fn exists(option: &OptionRow, live: &SocketSnapshot) -> bool {
    let has = |bit| option.traits & bit != 0;
    let is_inet6 = live.entry.family == libc::AF_INET6;
    (!has(traits::TCP) || live.facts.protocol == Some(Protocol::Tcp))
        && (!has(traits::INET6) || is_inet6)
        // What may carry either may never carry IPv4.
        && (!has(traits::INET) || live.facts.family() == Some(Family::Ipv4))
}

/// Whether a policy in force would have applied a setting by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    Yes,
    No,
    Unknown(&'static str),
}

/// What a socket may be, by the rules that match it: found once for all options.
struct Case {
    /// As it is.
    rules: Candidates,
    /// By places at which options are set that it has come by, or may have: those that matched what was known of it there.
    surely: Vec<(u32, Candidates)>,
    perhaps: Vec<(u32, Candidates)>,
}

/// One at the least: a connection of which it is not known which end began it is one of two.
fn cases(desired: &Desired, scope: &Scope, live: &SocketSnapshot) -> Vec<Case> {
    let rules = |socket: &Socket| desired.candidates(scope, &facts(socket));
    let at = |places: Vec<(u32, Socket)>| places.iter().map(|(site, socket)| (*site, rules(socket))).collect();
    let case = |whole: &Socket| {
        let ApplyPointsPassed { mut surely, perhaps } = passed(live, whole);
        // With the facts of its birth: both hooks run when the socket is made.
        if scope.hooks.contains(&Hook::PostCreate)
            && live.facts.protocol != Some(Protocol::Tcp)
            && let Some((_, born)) = surely.iter().find(|(site, _)| *site == apply_point::SOCK_CREATE)
        {
            surely.push((apply_point::POST_CREATE, born.clone()));
        }
        Case { rules: rules(whole), surely: at(surely), perhaps: at(perhaps) }
    };
    if live.is_connection() && live.facts.direction.is_none() {
        let towards = |direction| case(&Socket { direction: Some(direction), ..live.facts.clone() });
        return vec![towards(Direction::Outbound), towards(Direction::Inbound)];
    }
    vec![case(&live.facts)]
}

/// `decides`: whether the setting decides on a socket that these rules match.
fn due(settable: &Settable, live: &SocketSnapshot, case: &Case, decides: impl Fn(Candidates) -> bool) -> Due {
    let applies = |places: &[(u32, Candidates)]| {
        places.iter().any(|(site, rules)| settable.sites.contains(*site) && decides(*rules))
    };
    if applies(&case.surely) {
        Due::Yes
    } else if applies(&case.perhaps) {
        let is_udp = live.facts.protocol == Some(Protocol::Udp);
        Due::Unknown(if live.is_multipath() {
            MULTIPATH
        } else if is_udp {
            WHETHER_BOUND
        } else {
            UNREACHED
        })
    } else {
        Due::No
    }
}

/// The places at which options are set that a socket has come by, with what was known of it there.
struct ApplyPointsPassed {
    surely: Vec<(u32, Socket)>,
    perhaps: Vec<(u32, Socket)>,
}

fn passed(live: &SocketSnapshot, whole: &Socket) -> ApplyPointsPassed {
    let bound = Socket { direction: None, remote: None, ..whole.clone() };
    let unbound = Socket { local: None, local_port: None, ..bound.clone() };
    let connecting = Socket { direction: Some(Direction::Outbound), remote: whole.remote, ..unbound.clone() };
    let is_bound = whole.local.is_some() || (whole.local_port.is_some() && has_ports(whole));
    let born = (apply_point::SOCK_CREATE, unbound);
    let surely = |surely| ApplyPointsPassed { surely, perhaps: Vec::new() };
    if live.is_multipath() {
        let perhaps =
            (apply_point::SOCK_CREATE + 1..apply_point::COUNT as u32).map(|site| (site, whole.clone())).collect();
        return ApplyPointsPassed { surely: vec![born], perhaps };
    }
    if whole.protocol != Some(Protocol::Tcp) {
        return match (whole.remote, is_bound, whole.protocol) {
            (Some(_), _, Some(Protocol::Udp)) => surely(vec![born, (apply_point::CONNECT_DATAGRAM, connecting)]),
            // It has had its port since it was bound, or since it first sent.
            (None, true, Some(Protocol::Udp)) => ApplyPointsPassed {
                surely: vec![born, (apply_point::SEND, bound.clone())],
                perhaps: vec![(apply_point::BIND_DATAGRAM, bound)],
            },
            (None, false, Some(Protocol::Udp)) => surely(vec![born]),
            (_, _, protocol) => {
                let others = apply_point::SOCK_CREATE + 1..apply_point::COUNT as u32;
                let perhaps = others.filter(|site| limitations::may_come_by(protocol, *site));
                ApplyPointsPassed { surely: vec![born], perhaps: perhaps.map(|site| (site, whole.clone())).collect() }
            }
        };
    }
    match (live.entry.state, whole.direction) {
        (State::Listening, _) => {
            surely(vec![born, (apply_point::BIND_STREAM, bound), (apply_point::LISTEN, whole.clone())])
        }
        (State::Unconnected, _) if is_bound => surely(vec![born, (apply_point::BIND_STREAM, bound)]),
        (State::Unconnected, _) => surely(vec![born]),
        // What its listener was given at bind it has inherited, if that did not depend on the peer, nor on an address that the
        // listener may not have had.
        (_, Some(Direction::Inbound)) => surely(vec![
            (apply_point::BIND_STREAM, Socket { local: None, ..bound }),
            (apply_point::PASSIVE, whole.clone()),
        ]),
        (State::SynSent, _) => {
            surely(vec![born, (apply_point::CONNECT_STREAM, connecting), (apply_point::SYN, whole.clone())])
        }
        _ => surely(vec![
            born,
            (apply_point::CONNECT_STREAM, connecting),
            (apply_point::SYN, whole.clone()),
            (apply_point::ACTIVE, whole.clone()),
        ]),
    }
}

/// What raw sockets have in place of a port is their protocol.
fn has_ports(socket: &Socket) -> bool {
    matches!(socket.protocol, Some(Protocol::Tcp | Protocol::Udp | Protocol::Sctp))
}

fn agrees(
    governed: &OptionRow,
    option: &SocketOption,
    setting: &Setting,
    now: &Value,
    live: &SocketSnapshot,
    fresh: &mut impl Baseline,
) -> bool {
    if agrees_as_it_is(governed, setting, now) {
        return true;
    }
    if option.reading == Reading::AtMost && live.is_connection() {
        return read(governed, now).is_some_and(|shown| shown.number <= i64::from(setting.value));
    }
    // The kernel brings some values within bounds of its own: of buffers, those of the system.
    fresh.after(option, wanted(governed, setting, now)) == Some(*now)
}

/// Whether a value is what a setting wants, or within a limit.
fn agrees_as_it_is(governed: &OptionRow, setting: &Setting, now: &Value) -> bool {
    // A value that says nothing, such as a time that is off, disagrees with nothing.
    read(governed, now).is_none_or(|shown| judge(governed, setting, &shown).verdict == verdict::NONE)
}

/// The value that was set, if it was set to what is shown.
fn read(governed: &OptionRow, now: &Value) -> Option<Argument> {
    let shown = Argument::read(governed, now.len as i32, &now.words)?;
    Some(if governed.read_back == read_back::DOUBLED { Argument { number: shown.number / 2, ..shown } } else { shown })
}

fn wanted(governed: &OptionRow, setting: &Setting, now: &Value) -> Value {
    read(governed, now).map_or(Value::UNKNOWN, |shown| Value::wanted(governed, setting, &shown))
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
