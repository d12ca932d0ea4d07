//! Decodes the records of the programs: [`abi::event::Event`] → [`Event`].
//!
//! Pure: callers look up facts about the host (the executable, the name of the cgroup) and pass them as
//! [`HostContext`].

mod executables;
mod filter;
mod json;
mod text;

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use abi::{
    event::{self as raw, flags, source},
    index,
    judge::verdict,
    setting::{OptionKey, Value, word_in},
    socket::{Address, Facts, family, known},
};

use serde::Serialize;

pub use self::{executables::Executables, filter::Filter};
use crate::{
    compile::Desired,
    container::Container,
    escape,
    options::{self, Kept, ValueKind},
    policy::model::{Family, Form, Mode, Protocol},
    values,
};

/// A decoded record.
#[derive(Clone, Debug)]
pub struct Event {
    /// Since the epoch.
    pub time: jiff::Timestamp,
    pub kind: Kind,
    pub key: OptionKey,
    /// `None` for a call that no setting decided.
    pub cause: Option<Cause>,
    /// The value that the policy wants.
    pub wanted: Value,
    /// The value that the application passed to setsockopt, or received from getsockopt.
    pub requested: Value,
    /// The length of the argument that the application passed to setsockopt, or received from getsockopt. Bytes; negative if
    /// the application passed a negative length.
    pub optlen: Option<i32>,
    /// The value that the kernel received instead, if any.
    pub applied: Value,
    /// The value that the socket has after the call, if known.
    pub current: Value,
    /// `None` if the return of the call was not seen.
    pub result: Option<i64>,
    pub task: Option<Task>,
    pub socket: Option<Socket>,
    pub source: Source,
    /// How the call was made, if known.
    pub via: Option<Via>,
    /// The duration of the call in nanoseconds, if calls are timed.
    pub duration_ns: Option<u64>,
    /// The number of similar events suppressed since the last one.
    pub suppressed: u64,
    /// Parts that should be known but are not, and why.
    pub missing: Vec<Missing>,
}

/// An unknown part of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The name of the part in JSON.
    pub what: &'static str,
    pub why: String,
}

/// How a call was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// By the system call of the same name.
    Syscall,
    /// By the system call, from a 32-bit program. The kernel does not run cgroup hooks for these calls.
    CompatSyscall,
    /// `SOCKET_URING_OP_SETSOCKOPT` or `…_GETSOCKOPT`.
    IoUring,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A setsockopt call that conflicts with the policy.
    Conflict { verdict: Verdict },
    /// A getsockopt call that shows another value than the policy's.
    Mismatch,
    /// A call without a conflict.
    Call(Call),
    /// A setting that the kernel refused.
    Outcome { errno: i32 },
    /// A live socket whose value differs from the policy, or exceeds its limit.
    Drift,
    /// A live socket on which an option was set to the policy's value.
    Applied { before: Value, after: Value },
    /// A live socket on which a dry run would set an option. Nothing was changed.
    WouldApply,
    /// A live socket for which it is unknown whether it differs from the policy. Nothing was changed.
    Unknown { why: &'static str },
}

/// Both bounds are inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Limit {
    pub min: i64,
    pub max: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Set,
    Get,
}

/// What was done about a conflict, or what a dry run would have done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Verdict {
    pub what: Action,
    pub dry_run: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    Allowed,
    Rewritten,
    Clamped,
    Ignored,
    Denied,
}

/// The setting that decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// Index of [`Desired::settings`].
    pub setting: u32,
    pub policy: String,
    pub rule: String,
    /// `FILE:LINE`
    pub place: String,
    /// The limit, if the setting is one.
    pub limit: Option<Limit>,
    /// The bits that the setting sets, if it sets only some.
    pub mask: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    pub pid: u32,
    pub tid: u32,
    pub comm: String,
    pub exe: Option<String>,
    pub cgroup: Option<String>,
    /// The container that the cgroup belongs to.
    pub container: Option<Container>,
}

/// Serialized to JSON with these field names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Socket {
    pub protocol: Option<&'static str>,
    pub family: Option<&'static str>,
    pub local: Option<SocketAddr>,
    pub remote: Option<SocketAddr>,
    /// The cookie that `ss -e` shows; a socket gets one when it is first read.
    pub cookie: Option<u64>,
    /// The name of the socket's cgroup: that of the task that created the socket.
    pub cgroup: Option<String>,
}

/// What recorded the event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Only the cgroup hook.
    Hook,
    Tracepoint,
    Kprobe,
    Fentry,
}

/// Facts about the host.
#[derive(Clone, Debug)]
pub struct HostContext {
    /// The path of the executable that makes the call, or why it is unknown.
    pub exe: Result<String, &'static str>,
    /// The name of the task's cgroup.
    pub cgroup: Option<String>,
    /// The container that this cgroup belongs to.
    pub container: Option<Container>,
    /// The name of the socket's cgroup.
    pub socket_cgroup: Option<String>,
    /// CLOCK_REALTIME minus CLOCK_MONOTONIC, in nanoseconds.
    pub monotonic_epoch_ns: i128,
    /// Why the programs cannot read sockets, if they cannot.
    pub btf_error: Option<String>,
}

/// The error for a record of a type that this build does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown record from the programs")]
pub struct UnknownRecord;

/// Decodes a record. `desired` must be the policies that its setting belongs to.
///
/// # Errors
///
/// Fails if the record contains a code that this build does not know.
pub fn decode(event: &raw::Event, desired: &Desired, context: HostContext) -> Result<Event, UnknownRecord> {
    let raw::Event { call, .. } = event;
    let setting = index::within(call.setting);
    let dry_run = desired.source(setting).is_some_and(|(_, rule)| rule.mode == Mode::DryRun);
    let kind = decode_kind(event, dry_run)?;
    let source = decode_source(event.source)?;
    let nanoseconds = i128::from(event.time_ns) + context.monotonic_epoch_ns;
    let decided = call.flags & flags::DECIDED != 0;
    let result = (source != Source::Hook).then_some(event.result);
    let socket = socket(call, context.socket_cgroup.as_deref());
    let mut missing = missing(event, source, socket.as_ref(), context.btf_error.as_deref());
    let optlen = argument_len(event, kind, source);
    if let Err(Some(why)) = optlen {
        missing.push(Missing { what: "optlen", why: why.to_owned() });
    }
    if let Err(why) = context.exe
        && event.pid != 0
    {
        missing.push(Missing { what: "exe", why: why.to_owned() });
    }
    Ok(Event {
        time: jiff::Timestamp::from_nanosecond(nanoseconds).ok().ok_or(UnknownRecord)?,
        kind,
        key: call.key,
        cause: if decided { cause(desired, setting) } else { None },
        wanted: call.wanted,
        requested: call.requested,
        optlen: optlen.ok(),
        applied: applied_value(call, kind),
        current: current_value(call, kind, result),
        result,
        task: task(event, context),
        socket,
        source,
        via: via(call.flags),
        duration_ns: (event.duration_ns != 0).then_some(event.duration_ns),
        suppressed: event.suppressed,
        missing,
    })
}

fn decode_kind(event: &raw::Event, dry_run: bool) -> Result<Kind, UnknownRecord> {
    let call = || match event.call.kind {
        raw::call::SETSOCKOPT => Ok(Call::Set),
        raw::call::GETSOCKOPT => Ok(Call::Get),
        _ => Err(UnknownRecord),
    };
    match event.kind {
        raw::kind::CONFLICT => {
            let verdict = decode_verdict(event.call.verdict, dry_run)?;
            Ok(match call()? {
                Call::Set => Kind::Conflict { verdict },
                Call::Get => Kind::Mismatch,
            })
        }
        raw::kind::CALL => Ok(Kind::Call(call()?)),
        raw::kind::OUTCOME => {
            let errno = event.result.checked_neg().and_then(|errno| i32::try_from(errno).ok());
            Ok(Kind::Outcome { errno: errno.ok_or(UnknownRecord)? })
        }
        _ => Err(UnknownRecord),
    }
}

fn via(call_flags: u32) -> Option<Via> {
    let ways = [(flags::SYSCALL, Via::Syscall), (flags::COMPAT, Via::CompatSyscall), (flags::RING, Via::IoUring)];
    ways.into_iter().find(|(flag, _)| call_flags & flag != 0).map(|(_, way)| way)
}

/// Returns the length of a call's argument, or why it is unknown; `Err(None)` if the event is not about a call.
fn argument_len(event: &raw::Event, kind: Kind, source: Source) -> Result<i32, Option<&'static str>> {
    let raw::Event { call, result, .. } = event;
    match kind {
        Kind::Conflict { .. } | Kind::Call(Call::Set) => {
            // A record of the hook has the length only with the value.
            let len = if source == Source::Hook { call.requested.len } else { call.optlen as u32 };
            Ok(len as i32)
        }
        Kind::Mismatch | Kind::Call(Call::Get) => match *result {
            _ if call.flags & flags::UNREADABLE != 0 => Err(Some("the argument was not in memory")),
            result if result < 0 => Err(Some("the call failed: no value was read")),
            _ => Ok(call.requested.len as i32),
        },
        Kind::Outcome { .. } | Kind::Drift | Kind::Applied { .. } | Kind::WouldApply | Kind::Unknown { .. } => {
            Err(None)
        }
    }
}

/// Returns the unknown parts of an event, and why they are unknown.
fn missing(event: &raw::Event, source: Source, socket: Option<&Socket>, btf_error: Option<&str>) -> Vec<Missing> {
    let raw::Event { call, result, .. } = event;
    let mut missing = Vec::new();
    if call.flags & flags::UNREADABLE != 0 {
        missing.push(Missing { what: "requested", why: "the argument was not in memory".to_owned() });
    }
    let is_no_socket = [-libc::EBADF, -libc::ENOTSOCK].map(i64::from).contains(result);
    if socket.is_none() && source != Source::Hook {
        let why = match btf_error {
            _ if is_no_socket => "the descriptor is not a socket",
            Some(btf_error) => btf_error,
            None if source == Source::Tracepoint => "the descriptor had changed when the call returned",
            None => "the kernel did not show the socket of the call",
        };
        missing.push(Missing { what: "socket", why: why.to_owned() });
    }
    missing
}

fn decode_verdict(code: u32, dry_run: bool) -> Result<Verdict, UnknownRecord> {
    let what = u8::try_from(code).ok().and_then(Action::from_code).ok_or(UnknownRecord)?;
    Ok(Verdict { what, dry_run })
}

impl Event {
    /// Returns the requested value; a value from getsockopt as the one that setsockopt takes.
    pub(crate) fn requested(&self) -> Value {
        match self.kind {
            Kind::Mismatch | Kind::Call(Call::Get) => options::as_passed(self.key, &self.requested),
            _ => self.requested,
        }
    }

    /// Returns the value that the policy wants, without the bits that it leaves to the application.
    fn wanted_bits(&self) -> Value {
        match self.cause {
            Some(Cause { mask: Some(mask), .. }) if self.wanted.len == 4 => {
                Value::int(word_in(&self.wanted.words) & mask)
            }
            _ => self.wanted,
        }
    }

    /// Returns whether the kernel took less than the value that was set on an existing socket.
    fn is_capped(&self) -> bool {
        matches!(self.kind, Kind::Applied { after, .. } if options::is_capped(self.key, &self.wanted, &after))
    }
}

impl Action {
    pub const ALL: [Self; verdict::COUNT] =
        [Self::Allowed, Self::Rewritten, Self::Clamped, Self::Ignored, Self::Denied];

    /// Returns the action with a code of [`abi::judge::verdict`].
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        match code {
            verdict::ALLOWED => Some(Self::Allowed),
            verdict::REWRITTEN => Some(Self::Rewritten),
            verdict::CLAMPED => Some(Self::Clamped),
            verdict::IGNORED => Some(Self::Ignored),
            verdict::DENIED => Some(Self::Denied),
            _ => None,
        }
    }
}

impl Action {
    /// Returns the name of the action when it was done.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Rewritten => "rewritten",
            Self::Clamped => "clamped",
            Self::Ignored => "ignored",
            Self::Denied => "denied",
        }
    }

    /// Returns the name of the action in a dry run.
    #[must_use]
    pub fn name_in_dry_run(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Rewritten => "would-rewrite",
            Self::Clamped => "would-clamp",
            Self::Ignored => "would-ignore",
            Self::Denied => "would-deny",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.dry_run { self.what.name_in_dry_run() } else { self.what.name() })
    }
}

impl Call {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Set => "setsockopt",
            Self::Get => "getsockopt",
        }
    }
}

impl Via {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Syscall => "syscall",
            Self::CompatSyscall => "compat-syscall",
            Self::IoUring => "io_uring",
        }
    }
}

impl Source {
    #[must_use]
    pub fn backend(self) -> Option<&'static str> {
        match self {
            Self::Hook => None,
            Self::Tracepoint => Some("tracepoint"),
            Self::Kprobe => Some("kprobe"),
            Self::Fentry => Some("fentry"),
        }
    }
}

fn decode_source(code: u32) -> Result<Source, UnknownRecord> {
    match code {
        source::HOOK => Ok(Source::Hook),
        source::TRACEPOINT => Ok(Source::Tracepoint),
        source::KPROBE => Ok(Source::Kprobe),
        source::FENTRY => Ok(Source::Fentry),
        _ => Err(UnknownRecord),
    }
}

/// Returns the value that the kernel received in place of the application's.
fn applied_value(call: &raw::Call, kind: Kind) -> Value {
    match kind {
        Kind::Conflict { verdict: Verdict { what: Action::Rewritten | Action::Clamped, dry_run: false } } => {
            call.applied
        }
        _ => Value::UNKNOWN,
    }
}

/// Returns the value that the socket has after the call: what the kernel stored for an accepted value, or the previous
/// value if the call changed nothing. Unknown if only getsockopt could show it.
fn current_value(call: &raw::Call, kind: Kind, result: Option<i64>) -> Value {
    if call.flags & flags::VALUE_CURRENT != 0 {
        return call.current;
    }
    let before = if call.flags & flags::VALUE_BEFORE != 0 { call.before } else { Value::UNKNOWN };
    let passed = |value: Value| match result {
        None => Value::UNKNOWN,
        Some(0) => kept(call.key, value),
        Some(_) => before,
    };
    match kind {
        Kind::Outcome { .. } | Kind::Drift | Kind::Applied { .. } | Kind::WouldApply | Kind::Unknown { .. } => {
            Value::UNKNOWN
        }
        Kind::Mismatch | Kind::Call(Call::Get) => call.requested,
        Kind::Call(Call::Set) => passed(call.requested),
        Kind::Conflict { verdict } => match (verdict.what, verdict.dry_run) {
            (Action::Allowed, _) | (_, true) => passed(call.requested),
            (Action::Rewritten | Action::Clamped, false) => passed(call.applied),
            (Action::Ignored | Action::Denied, false) => before,
        },
    }
}

/// Returns what the kernel stores for an accepted value, if that follows from the value.
fn kept(key: OptionKey, value: Value) -> Value {
    match options::by_key(key).filter(|option| option.kept == Kept::AsGiven) {
        Some(option) if option.value == ValueKind::Bool => {
            values::is_on(option, &value).map_or(Value::UNKNOWN, |is_on| Value::int(is_on.into()))
        }
        Some(_) => value,
        None => Value::UNKNOWN,
    }
}

/// Returns the source of a setting.
#[must_use]
pub fn cause(desired: &Desired, setting: u32) -> Option<Cause> {
    let (source, rule) = desired.source(setting)?;
    Some(Cause {
        setting,
        policy: rule.policy.clone(),
        rule: rule.rule.clone(),
        place: format!("{}:{}", escape::plain(&rule.path), source.line),
        limit: match source.form {
            Form::Limit { min, max } => Some(Limit { min, max }),
            Form::Set(_) | Form::Deny | Form::Free => None,
        },
        mask: values::mask(source.option.key(), &source.form),
    })
}

fn task(event: &raw::Event, context: HostContext) -> Option<Task> {
    if event.pid == 0 {
        return None;
    }
    let end = event.comm.iter().position(|byte| *byte == 0).unwrap_or(event.comm.len());
    let comm = String::from_utf8_lossy(&event.comm[..end]).into_owned();
    let HostContext { exe, cgroup, container, .. } = context;
    Some(Task { pid: event.pid, tid: event.tid, comm, exe: exe.ok(), cgroup, container })
}

/// Returns `None` if nothing is known about the socket.
fn socket(call: &raw::Call, cgroup: Option<&str>) -> Option<Socket> {
    let cookie = (call.cookie != 0).then_some(call.cookie);
    let cgroup = cgroup.map(str::to_owned);
    if call.flags & flags::SOCKET == 0 {
        let family = (call.sk_family != 0).then(|| family_name(call.sk_family));
        return (cookie.is_some() || family.is_some()).then_some(Socket {
            protocol: None,
            family,
            local: None,
            remote: None,
            cookie,
            cgroup,
        });
    }
    let facts = &call.facts;
    let local_known = facts.known & (known::LOCAL_ADDRESS | known::LOCAL_PORT) != 0;
    let remote_known = facts.known & known::REMOTE != 0;
    Some(Socket {
        protocol: Protocol::from_code(facts.protocol).map(Protocol::name),
        family: Family::from_code(facts.family).map(Family::name),
        local: local_known.then(|| address(facts, facts.local, facts.local_port)),
        remote: remote_known.then(|| address(facts, facts.remote, facts.remote_port)),
        cookie,
        cgroup,
    })
}

/// Returns the name of a family that policies do not cover.
fn family_name(family: u32) -> &'static str {
    match i32::try_from(family) {
        Ok(libc::AF_UNIX) => "unix",
        Ok(libc::AF_NETLINK) => "netlink",
        Ok(libc::AF_PACKET) => "packet",
        Ok(libc::AF_VSOCK) => "vsock",
        Ok(libc::AF_ALG) => "alg",
        Ok(libc::AF_XDP) => "xdp",
        _ => "other",
    }
}

fn address(facts: &Facts, words: Address, port: u16) -> SocketAddr {
    let ip = if facts.family == family::IPV4 {
        IpAddr::V4(Ipv4Addr::from(u32::from_be(words[0])))
    } else {
        let bits = words.iter().fold(0, |bits: u128, word| bits << 32 | u128::from(u32::from_be(*word)));
        IpAddr::V6(Ipv6Addr::from(bits))
    };
    SocketAddr::new(ip, port)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SET: Kind = Kind::Call(Call::Set);

    fn call(option: &str, requested: Value) -> raw::Call {
        let key = options::by_name(option).unwrap().key();
        raw::Call { key, requested, before: Value::int(77), flags: flags::VALUE_BEFORE, ..raw::Call::default() }
    }

    #[test]
    fn values_that_the_kernel_keeps_unchanged_are_known() {
        for (option, requested, kept) in [
            ("SO_MARK", 0x20, 0x20),
            ("TCP_NODELAY", 7, 1),
            ("TCP_NODELAY", 0, 0),
            ("TCP_KEEPIDLE", 60, 60),
            ("IP_MTU_DISCOVER", 2, 2),
        ] {
            assert_eq!(current_value(&call(option, Value::int(requested)), SET, Some(0)), Value::int(kept), "{option}");
        }
        let byte = Value::new([2, 0], 1);
        assert_eq!(current_value(&call("IP_RECVTTL", byte), SET, Some(0)), Value::int(1));
    }

    #[test]
    fn values_that_the_kernel_may_change_are_unknown() {
        for option in
            ["SO_SNDBUF", "SO_SNDBUFFORCE", "SO_RCVLOWAT", "TCP_WINDOW_CLAMP", "IP_TOS", "IP_TTL", "TCP_QUICKACK"]
        {
            assert_eq!(current_value(&call(option, Value::int(1)), SET, Some(0)), Value::UNKNOWN, "{option}");
        }
        let mut unnamed = call("TCP_NODELAY", Value::int(1));
        unnamed.key.name = 99;
        assert_eq!(current_value(&unnamed, SET, Some(0)), Value::UNKNOWN);
    }

    #[test]
    fn failed_call_leaves_the_previous_value() {
        for option in ["TCP_NODELAY", "SO_SNDBUF"] {
            let result = Some(-i64::from(libc::EINVAL));
            assert_eq!(current_value(&call(option, Value::int(1)), SET, result), Value::int(77), "{option}");
        }
    }

    #[test]
    fn value_is_unknown_if_the_return_was_not_seen() {
        assert_eq!(current_value(&call("TCP_NODELAY", Value::int(1)), SET, None), Value::UNKNOWN);
    }
}
