//! What the programs reported, in words: [`abi::event::Event`] → [`Event`].
//!
//! Pure: what has to be looked up on the host (who the process is, what the cgroup is called) is
//! handed in as [`HostContext`].

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
    setting::{OptionKey, Value},
    socket::{Address, Facts, family, known},
};

use serde::Serialize;

pub use self::{executables::Executables, filter::Filter};
use crate::{
    compile::Desired,
    escape,
    host::container::Container,
    options::{self, Kept, ValueKind},
    policy::model::{Family, Form, Mode, Protocol},
    values,
};

/// One report.
#[derive(Clone, Debug)]
pub struct Event {
    /// Since the epoch.
    pub time: jiff::Timestamp,
    pub kind: Kind,
    pub key: OptionKey,
    /// `None` for a call that no setting decided.
    pub cause: Option<Cause>,
    /// What the policy wants of the option.
    pub wanted: Value,
    /// What the application passed or, when it read, was shown.
    pub requested: Value,
    /// What the kernel was given in place of `requested`, if anything.
    pub applied: Value,
    /// What the socket has after the call, where that is known.
    pub current: Value,
    /// `None` where nobody saw the call return.
    pub result: Option<i64>,
    pub task: Option<Task>,
    pub socket: Option<Socket>,
    pub source: Source,
    /// How the call was made, where that is known.
    pub via: Option<Via>,
    /// How long the call took, if calls are timed. Nanoseconds.
    pub duration_ns: Option<u64>,
    /// Like events held back since the last one.
    pub suppressed: u64,
    /// What of the above should be known and is not, and why.
    pub missing: Vec<Missing>,
}

/// A part of an event that is not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The name of the part, as in JSON.
    pub what: &'static str,
    pub why: String,
}

/// How a call was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// By the system call of its name.
    Syscall,
    /// The same by a 32-bit program: the kernel does not show these calls to the cgroup hooks.
    CompatSyscall,
    /// `SOCKET_URING_OP_SETSOCKOPT` or `…_GETSOCKOPT`.
    IoUring,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A call that disagrees with the policy.
    Conflict { call: Call, verdict: Verdict },
    /// A call that disagrees with nothing.
    Call(Call),
    /// A setting that the kernel refused.
    Outcome { errno: i32 },
    /// A live socket that has another value than the policy says, or one beyond its limit.
    Drift,
    /// A live socket that was brought in line.
    Applied { before: Value, after: Value },
    /// The same in a dry run: it has what it had.
    WouldApply,
    /// A live socket of which it cannot be told whether it has what the policy says, and so is left alone.
    Unknown { why: &'static str },
}

/// Both ends are within.
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

/// What was done about a conflict, or in a dry run would have been.
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
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    pub pid: u32,
    pub tid: u32,
    pub comm: String,
    pub exe: Option<String>,
    pub cgroup: Option<String>,
    /// The container that the cgroup is one of.
    pub container: Option<Container>,
}

/// In JSON as it is here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Socket {
    pub protocol: Option<&'static str>,
    pub family: Option<&'static str>,
    pub local: Option<SocketAddr>,
    pub remote: Option<SocketAddr>,
    /// As `ss -e` shows it; a socket has none before somebody asks for it.
    pub cookie: Option<u64>,
    /// Name of the cgroup that the socket belongs to: that of the task that made it.
    pub cgroup: Option<String>,
}

/// Who saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A hook of the cgroup alone.
    Hook,
    Tracepoint,
    Kprobe,
    Fentry,
}

/// What is known of the host.
#[derive(Clone, Debug)]
pub struct HostContext {
    /// The path of the executable that makes the call, or why it is not known.
    pub exe: Result<String, &'static str>,
    /// Name of the task's cgroup.
    pub cgroup: Option<String>,
    /// The container that this is one of.
    pub container: Option<Container>,
    /// Name of the socket's cgroup.
    pub socket_cgroup: Option<String>,
    /// CLOCK_REALTIME less CLOCK_MONOTONIC.
    pub monotonic_epoch_ns: i128,
    /// Why the programs cannot look at sockets, if they cannot.
    pub blindness: Option<String>,
}

/// Why a record is not an event: one that this build does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown record from the programs")]
pub struct UnknownRecord;

/// Decodes a record. `desired` are the policies that its setting is of.
///
/// # Errors
///
/// Where it holds a code that is not of this build.
pub fn decode(event: &raw::Event, desired: &Desired, surroundings: HostContext) -> Result<Event, UnknownRecord> {
    let raw::Event { call, .. } = event;
    let setting = index::within(call.setting);
    let dry_run = desired.source(setting).is_some_and(|(_, rule)| rule.mode == Mode::DryRun);
    let kind = decode_kind(event, dry_run)?;
    let source = decode_source(event.source)?;
    let nanoseconds = i128::from(event.time_ns) + surroundings.monotonic_epoch_ns;
    let decided = call.flags & flags::DECIDED != 0;
    let result = (source != Source::Hook).then_some(event.result);
    let socket = socket(call, surroundings.socket_cgroup.as_deref());
    let mut missing = missing(event, source, socket.as_ref(), surroundings.blindness.as_deref());
    if let Err(why) = surroundings.exe
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
        applied: applied_value(call, kind),
        current: current_value(call, kind, result),
        result,
        task: task(event, surroundings),
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
            Ok(Kind::Conflict { call: call()?, verdict: decode_verdict(event.call.verdict, dry_run)? })
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

/// What nobody could tell, and why.
fn missing(event: &raw::Event, source: Source, socket: Option<&Socket>, blindness: Option<&str>) -> Vec<Missing> {
    let raw::Event { call, result, .. } = event;
    let mut missing = Vec::new();
    if call.flags & flags::UNREADABLE != 0 {
        missing.push(Missing { what: "requested", why: "the argument was not in memory".to_owned() });
    }
    let is_no_socket = [-libc::EBADF, -libc::ENOTSOCK].map(i64::from).contains(result);
    if socket.is_none() && source != Source::Hook {
        let why = match blindness {
            _ if is_no_socket => "the descriptor is not a socket's",
            Some(blindness) => blindness,
            None if source == Source::Tracepoint => "the descriptor stood for something else when the call returned",
            None => "the kernel did not show where it found it",
        };
        missing.push(Missing { what: "socket", why: why.to_owned() });
    }
    missing
}

fn decode_verdict(code: u32, dry_run: bool) -> Result<Verdict, UnknownRecord> {
    let what = u8::try_from(code).ok().and_then(Action::from_code).ok_or(UnknownRecord)?;
    Ok(Verdict { what, dry_run })
}

impl Action {
    pub const ALL: [Self; verdict::COUNT] =
        [Self::Allowed, Self::Rewritten, Self::Clamped, Self::Ignored, Self::Denied];

    /// The deed with a code of [`abi::judge::verdict`].
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
    /// What it is called where it is done.
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

    /// What it is called where it would be done.
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

/// What the kernel was given in place of what the application asked for.
fn applied_value(call: &raw::Call, kind: Kind) -> Value {
    match kind {
        Kind::Conflict {
            call: Call::Set,
            verdict: Verdict { what: Action::Rewritten | Action::Clamped, dry_run: false },
        } => call.applied,
        _ => Value::UNKNOWN,
    }
}

/// What the socket has after the call: what the kernel made of the value that it accepted, or what the
/// socket had before a call that changed nothing. Unknown where only the socket could tell.
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
        Kind::Outcome { .. } | Kind::Drift { .. } | Kind::Applied { .. } | Kind::WouldApply | Kind::Unknown { .. } => {
            Value::UNKNOWN
        }
        Kind::Conflict { call: Call::Get, .. } | Kind::Call(Call::Get) => call.requested,
        Kind::Call(Call::Set) => passed(call.requested),
        Kind::Conflict { call: Call::Set, verdict } => match (verdict.what, verdict.dry_run) {
            (Action::Allowed, _) | (_, true) => passed(call.requested),
            (Action::Rewritten | Action::Clamped, false) => passed(call.applied),
            (Action::Ignored | Action::Denied, false) => before,
        },
    }
}

/// What the kernel makes of a value that it accepts, as far as that follows from the value.
fn kept(key: OptionKey, value: Value) -> Value {
    match options::by_key(key).filter(|option| option.kept == Kept::AsGiven) {
        Some(option) if option.value == ValueKind::Bool => {
            values::is_on(option, &value).map_or(Value::UNKNOWN, |is_on| Value::int(is_on.into()))
        }
        Some(_) => value,
        None => Value::UNKNOWN,
    }
}

/// Where a setting came from.
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
            Form::Set(_) | Form::Deny => None,
        },
    })
}

fn task(event: &raw::Event, surroundings: HostContext) -> Option<Task> {
    if event.pid == 0 {
        return None;
    }
    let end = event.comm.iter().position(|byte| *byte == 0).unwrap_or(event.comm.len());
    let comm = String::from_utf8_lossy(&event.comm[..end]).into_owned();
    let HostContext { exe, cgroup, container, .. } = surroundings;
    Some(Task { pid: event.pid, tid: event.tid, comm, exe: exe.ok(), cgroup, container })
}

/// `None` where nothing is known of the socket.
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

/// The families of sockets that policies are not about.
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

    fn call(option: &str, asked: Value) -> raw::Call {
        let key = options::by_name(option).unwrap().key();
        raw::Call { key, requested: asked, before: Value::int(77), flags: flags::VALUE_BEFORE, ..raw::Call::default() }
    }

    #[test]
    fn what_the_kernel_keeps_as_it_is_given_is_known() {
        for (option, asked, kept) in [
            ("SO_MARK", 0x20, 0x20),
            ("TCP_NODELAY", 7, 1),
            ("TCP_NODELAY", 0, 0),
            ("TCP_KEEPIDLE", 60, 60),
            ("IP_MTU_DISCOVER", 2, 2),
        ] {
            assert_eq!(current_value(&call(option, Value::int(asked)), SET, Some(0)), Value::int(kept), "{option}");
        }
        let byte = Value::new([2, 0], 1);
        assert_eq!(current_value(&call("IP_RECVTTL", byte), SET, Some(0)), Value::int(1));
    }

    #[test]
    fn what_the_kernel_makes_something_of_is_not_known() {
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
    fn call_that_failed_changed_nothing() {
        for option in ["TCP_NODELAY", "SO_SNDBUF"] {
            let result = Some(-i64::from(libc::EINVAL));
            assert_eq!(current_value(&call(option, Value::int(1)), SET, result), Value::int(77), "{option}");
        }
    }

    #[test]
    fn call_that_nobody_saw_return_tells_nothing() {
        assert_eq!(current_value(&call("TCP_NODELAY", Value::int(1)), SET, None), Value::UNKNOWN);
    }
}
