//! What the programs reported, in words: [`abi::event::Event`] → [`Event`].
//!
//! Pure: what has to be looked up on the host (who the process is, what the cgroup is called) is
//! handed in as [`Surroundings`].

mod json;
mod text;

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use abi::{
    event::{self as raw, flags, source},
    judge::verdict,
    setting::{OptionKey, Value, read_back},
    socket::{Address, Facts, family, known, protocol},
};

pub use self::json::SCHEMA;
use crate::{
    compile::Desired,
    options::{self, ValueKind},
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
    pub asked: Value,
    /// What the socket has after the call, where that is known.
    pub now: Value,
    /// `None` where nobody saw the call return.
    pub result: Option<i64>,
    pub task: Option<Task>,
    pub socket: Option<Socket>,
    pub source: Source,
    /// Like events held back since the last one.
    pub suppressed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A call that disagrees with the policy.
    Conflict { call: Call, verdict: Verdict },
    /// A call that disagrees with nothing.
    Call(Call),
    /// A setting that the kernel refused.
    Outcome { errno: i32 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Set,
    Get,
}

/// What was done about a conflict, or in a dry run would have been.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Verdict {
    pub what: Deed,
    pub dry_run: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Deed {
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
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    pub pid: u32,
    pub tid: u32,
    pub comm: String,
    pub exe: Option<String>,
    pub cgroup: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    pub protocol: Option<&'static str>,
    pub family: Option<&'static str>,
    pub local: Option<SocketAddr>,
    pub remote: Option<SocketAddr>,
    /// As `ss -e` shows it.
    pub cookie: Option<u64>,
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
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Of the process, if it is still there.
    pub exe: Option<String>,
    /// Name of the task's cgroup.
    pub cgroup: Option<String>,
    /// CLOCK_REALTIME less CLOCK_MONOTONIC.
    pub monotonic_epoch_ns: i128,
}

/// Why a record is not an event: one that this build does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown record from the programs")]
pub struct UnknownRecord;

/// Decodes a record.
///
/// # Errors
///
/// Where it holds a code that is not of this build.
pub fn decode(event: &raw::Event, desired: &Desired, surroundings: Surroundings) -> Result<Event, UnknownRecord> {
    let dry_run = desired.mode == crate::policy::model::Mode::DryRun;
    let raw::Event { call, .. } = event;
    let kind = decode_kind(event, dry_run)?;
    let source = decode_source(event.source)?;
    let nanoseconds = i128::from(event.time_ns) + surroundings.monotonic_epoch_ns;
    let decided = call.flags & flags::DECIDED != 0;
    Ok(Event {
        time: jiff::Timestamp::from_nanosecond(nanoseconds).ok().ok_or(UnknownRecord)?,
        kind,
        key: call.key,
        cause: if decided { cause(desired, call.setting) } else { None },
        wanted: call.wanted,
        asked: call.asked,
        now: now(event, kind, source),
        result: (source != Source::Hook).then_some(event.result),
        task: task(event, surroundings),
        socket: socket(call),
        source,
        suppressed: event.suppressed,
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
        raw::kind::OUTCOME => Ok(Kind::Outcome { errno: i32::try_from(-event.result).ok().ok_or(UnknownRecord)? }),
        _ => Err(UnknownRecord),
    }
}

fn decode_verdict(code: u32, dry_run: bool) -> Result<Verdict, UnknownRecord> {
    let what = u8::try_from(code).ok().and_then(Deed::from_code).ok_or(UnknownRecord)?;
    Ok(Verdict { what, dry_run })
}

impl Deed {
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

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.what, self.dry_run) {
            (Deed::Allowed, _) => "allowed",
            (Deed::Rewritten, false) => "rewritten",
            (Deed::Clamped, false) => "clamped",
            (Deed::Ignored, false) => "ignored",
            (Deed::Denied, false) => "denied",
            (Deed::Rewritten, true) => "would-rewrite",
            (Deed::Clamped, true) => "would-clamp",
            (Deed::Ignored, true) => "would-ignore",
            (Deed::Denied, true) => "would-deny",
        })
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

/// What the socket has after the call: what the kernel accepted, or what it had before a call that
/// changed nothing. Unknown where that cannot be told without asking the socket.
fn now(event: &raw::Event, kind: Kind, source: Source) -> Value {
    let raw::Event { call, .. } = event;
    let before = if call.flags & flags::BEFORE != 0 { call.before } else { Value::UNKNOWN };
    // The kernel doubles and bounds some values on the way in.
    let is_kept = options::by_key(call.key)
        .is_none_or(|option| option.settable().is_none_or(|settable| settable.read_back == read_back::SAME));
    let accepted = |value: Value| {
        if source == Source::Hook || !is_kept {
            Value::UNKNOWN
        } else if event.result == 0 {
            kept(call.key, value)
        } else {
            before
        }
    };
    match kind {
        Kind::Outcome { .. } => Value::UNKNOWN,
        Kind::Conflict { call: Call::Get, .. } | Kind::Call(Call::Get) => call.asked,
        Kind::Call(Call::Set) => accepted(call.asked),
        Kind::Conflict { call: Call::Set, verdict } => match (verdict.what, verdict.dry_run) {
            (Deed::Allowed, _) | (_, true) => accepted(call.asked),
            (Deed::Rewritten | Deed::Clamped, false) => accepted(call.given),
            (Deed::Ignored | Deed::Denied, false) => before,
        },
    }
}

/// What the kernel makes of a value that it accepts: all that is not 0 switches an option on.
fn kept(key: OptionKey, value: Value) -> Value {
    let is_switch = options::by_key(key).is_some_and(|option| option.value == ValueKind::Bool);
    let is_on = value.bytes().iter().take(4).any(|byte| *byte != 0);
    if is_switch && value.len > 0 { Value::int(is_on.into()) } else { value }
}

fn cause(desired: &Desired, setting: u32) -> Option<Cause> {
    let (source, rule) = desired.source(setting)?;
    Some(Cause {
        setting,
        policy: rule.policy.clone(),
        rule: rule.rule.clone(),
        place: format!("{}:{}", rule.path.display(), source.line),
    })
}

fn task(event: &raw::Event, surroundings: Surroundings) -> Option<Task> {
    if event.pid == 0 {
        return None;
    }
    let end = event.comm.iter().position(|byte| *byte == 0).unwrap_or(event.comm.len());
    let comm = String::from_utf8_lossy(&event.comm[..end]).into_owned();
    let Surroundings { exe, cgroup, .. } = surroundings;
    Some(Task { pid: event.pid, tid: event.tid, comm, exe, cgroup })
}

fn socket(call: &raw::Call) -> Option<Socket> {
    let cookie = (call.cookie != 0).then_some(call.cookie);
    if call.flags & flags::SOCKET == 0 {
        return cookie.map(|cookie| Socket {
            protocol: None,
            family: None,
            local: None,
            remote: None,
            cookie: Some(cookie),
        });
    }
    let facts = &call.facts;
    let local_known = facts.known & (known::LOCAL_ADDRESS | known::LOCAL_PORT) != 0;
    let remote_known = facts.known & known::REMOTE != 0;
    Some(Socket {
        protocol: match facts.protocol {
            protocol::TCP => Some("tcp"),
            protocol::UDP => Some("udp"),
            protocol::ICMP => Some("icmp"),
            protocol::SCTP => Some("sctp"),
            protocol::OTHER => Some("other"),
            _ => None,
        },
        family: match facts.family {
            family::IPV4 => Some("ipv4"),
            family::IPV6 => Some("ipv6"),
            _ => None,
        },
        local: local_known.then(|| address(facts, facts.local, facts.local_port)),
        remote: remote_known.then(|| address(facts, facts.remote, facts.remote_port)),
        cookie,
    })
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
