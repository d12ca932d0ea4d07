//! A valid policy: every name is known, and every value is in range and in the kernel's unit.
//!
//! [`super::validate`] makes these types and is the only place that checks. Other code need not check them again.

use std::{fmt, ops::RangeInclusive, path::Path, sync::Arc};

use abi::socket::{direction, family, protocol};
use ipnet::IpNet;

use super::{
    diagnostic::{Source, Span},
    socket::Socket,
};
use crate::options::SocketOption;

/// One policy file.
#[derive(Clone, Debug)]
pub struct Policy {
    pub source: Arc<Source>,
    pub name: String,
    pub description: Option<String>,
    pub mode: Mode,
    /// An empty target makes the policy a template.
    pub target: Target,
    pub audit: Audit,
    /// In the order of the file: the first rule that matches and names an option decides it.
    pub rules: Vec<Rule>,
    /// The tests in the file: which settings sockets must get.
    pub tests: Vec<Test>,
    /// The other instance that has the policy in force, if the rules only leave options free here: see [`Self::freed`].
    pub instance: Option<String>,
}

impl Policy {
    /// Returns the policy of another instance as rules that leave its options free.
    #[must_use]
    pub fn freed(&self, instance: &str) -> Self {
        let clause = |clause: &Clause| Clause { form: Form::Free, on_conflict: OnConflict::Allow, ..clause.clone() };
        let freed = |rule: &Rule| Rule { clauses: rule.clauses.iter().map(clause).collect(), ..rule.clone() };
        Self {
            audit: Audit { calls: Calls::Conflicts, reads: false, timing: false },
            rules: self.rules.iter().map(freed).collect(),
            tests: Vec::new(),
            instance: Some(instance.to_owned()),
            ..self.clone()
        }
    }
}

/// The cgroups and containers that a policy covers: all that any entry matches.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// Globs of cgroup paths below the cgroup2 mount, without a leading slash.
    pub cgroups: Vec<String>,
    pub containers: Vec<ContainerSelector>,
}

/// Selects the containers that match all of its fields. At least one field is set.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ContainerSelector {
    /// A glob.
    pub name: Option<String>,
    /// A glob.
    pub image: Option<String>,
    /// The first characters of the id.
    pub id: Option<String>,
    pub runtime: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Apply the policy.
    #[default]
    Enforce,
    /// Report what would be done, and change nothing.
    DryRun,
}

impl Mode {
    /// Returns the word that policy files and reports use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::DryRun => "dry-run",
        }
    }
}

/// What the audit reports in addition to conflicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Audit {
    pub calls: Calls,
    /// Whether getsockopt calls are reported too.
    pub reads: bool,
    /// Whether the duration of each call is measured.
    pub timing: bool,
}

impl Default for Audit {
    fn default() -> Self {
        Self { calls: Calls::Conflicts, reads: true, timing: false }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Calls {
    /// Only conflicts.
    #[default]
    Conflicts,
    /// Every call that concerns an option named by a rule.
    Governed,
    /// Every call.
    All,
}

#[derive(Clone, Debug)]
pub struct Rule {
    /// Unique in its file; `rule-N` (counted from 1) if the file gives no name.
    pub name: String,
    /// Line of `[[rule]]` in the file, counted from 1.
    pub line: usize,
    /// The position of `[[rule]]`.
    pub header: Span,
    pub selector: Selector,
    /// One for each option that the rule names, in the order of the file.
    pub clauses: Vec<Clause>,
}

/// Which of the target's sockets a rule matches. An empty list or `None` matches every socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    pub protocols: Vec<Protocol>,
    pub family: Option<Family>,
    pub direction: Option<Direction>,
    pub local: Vec<IpNet>,
    pub remote: Vec<IpNet>,
    pub not_remote: Vec<IpNet>,
    pub local_ports: Vec<RangeInclusive<u16>>,
    pub remote_ports: Vec<RangeInclusive<u16>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
    Icmp,
    Sctp,
    /// Raw sockets and every other protocol.
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Ipv4,
    Ipv6,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Outbound,
    Inbound,
}

/// Defines the spelling of each word in policy files and the number that the programs use.
macro_rules! spelled {
    ($type:ident: $($variant:ident $name:literal $code:expr),+) => {
        impl $type {
            /// Every word, as spelled in policy files.
            pub const WORDS: &[(&str, Self)] = &[$(($name, Self::$variant)),+];

            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name),+
                }
            }

            #[must_use]
            pub fn code(self) -> u8 {
                match self {
                    $(Self::$variant => $code),+
                }
            }

            /// Returns the word for a number; `None` for numbers without a word, such as those for unknown facts.
            #[must_use]
            pub fn from_code(code: u8) -> Option<Self> {
                Self::WORDS.iter().map(|(_, word)| *word).find(|word| word.code() == code)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

spelled!(Protocol:
    Tcp "tcp" protocol::TCP,
    Udp "udp" protocol::UDP,
    Icmp "icmp" protocol::ICMP,
    Sctp "sctp" protocol::SCTP,
    Other "other" protocol::OTHER
);
spelled!(Family: Ipv4 "ipv4" family::IPV4, Ipv6 "ipv6" family::IPV6);
spelled!(Direction: Outbound "outbound" direction::OUTBOUND, Inbound "inbound" direction::INBOUND);

/// A socket, and the settings that it must get.
#[derive(Clone, Debug)]
pub struct Test {
    /// Unique among the tests of its file; `test-N` (counted from 1) if the file gives no name.
    pub name: String,
    /// Line of `[[test]]` in the file, counted from 1.
    pub line: usize,
    pub socket: Socket,
    /// In the order of the file.
    pub expected: Vec<Expected>,
}

/// The setting that an option must get.
#[derive(Clone, Debug)]
pub struct Expected {
    pub option: Named,
    /// Line in the file, counted from 1.
    pub line: usize,
    /// The setting that must decide the option; `None` if none must.
    pub form: Option<Form>,
}

/// What a rule requires for one option.
#[derive(Clone, Debug)]
pub struct Clause {
    pub option: Named,
    /// Line in the file, counted from 1.
    pub line: usize,
    /// The position of the option's name.
    pub span: Span,
    pub form: Form,
    /// What happens to a conflicting call of an application. Always `Deny` for [`Form::Deny`].
    pub on_conflict: OnConflict,
    /// The errno with which a denied call fails.
    pub errno: Errno,
}

/// An option as named in a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Named {
    Known(&'static SocketOption),
    /// `"LEVEL:NUMBER"`, which can only be denied.
    Numeric(abi::setting::OptionKey),
}

impl Named {
    #[must_use]
    pub fn key(self) -> abi::setting::OptionKey {
        match self {
            Self::Known(option) => option.key(),
            Self::Numeric(key) => key,
        }
    }

    /// Returns a key that all names of one value share.
    #[must_use]
    pub fn value_key(self) -> abi::setting::OptionKey {
        match self {
            Self::Known(option) => option.canonical().key(),
            Self::Numeric(key) => key,
        }
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(option) => f.write_str(option.name),
            Self::Numeric(key) => write!(f, "{}:{}", key.level, key.name),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    Set(Wanted),
    /// Both bounds in the option's unit. A bound that the file leaves out is the bound of the option's range.
    Limit {
        min: i64,
        max: i64,
    },
    Deny,
    /// No rule decides the option: the application's value is used, and calls are no conflicts.
    Free,
}

/// A value that a policy wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The bits in `mask` must have this value. Bits outside the mask are 0 here.
    Number { value: u32, mask: u32 },
    /// At most 15 bytes.
    Text(String),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnConflict {
    /// The application's value is set, and the conflict is reported.
    Allow,
    /// The application's value is replaced, or moved into the limit.
    #[default]
    Rewrite,
    /// The call succeeds and has no effect.
    Ignore,
    /// The call fails.
    Deny,
}

/// The errno with which denied calls fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub u16);

impl Target {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let Self { cgroups, containers } = self;
        cgroups.is_empty() && containers.is_empty()
    }
}

/// Writes the selector as in a policy file: `container = { name = "web-*" }`.
impl fmt::Display for ContainerSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, image, id, runtime } = self;
        let keys =
            [("name", name.as_deref()), ("image", image.as_deref()), ("id", id.as_deref()), ("runtime", *runtime)];
        let fields = keys.iter().filter_map(|(key, value)| Some(format!("{key} = \"{}\"", (*value)?)));
        write!(f, "container = {{ {} }}", fields.collect::<Vec<_>>().join(", "))
    }
}

impl Policy {
    /// Returns the path of the file, as given by the user.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.source.path()
    }
}

impl Errno {
    pub const EPERM: Self = Self(libc::EPERM as u16);
    /// The first kernel on which programs choose the errno: `bpf_set_retval` for cgroup/setsockopt (b44123b4a3dc).
    /// Earlier kernels always return [`Self::EPERM`].
    pub const SINCE: &'static str = "5.18";
}

impl Default for Errno {
    fn default() -> Self {
        Self::EPERM
    }
}

impl Selector {
    /// Returns whether the selector matches every socket.
    #[must_use]
    pub fn matches_everything(&self) -> bool {
        let Self { protocols, family, direction, local, remote, not_remote, local_ports, remote_ports } = self;
        protocols.is_empty()
            && family.is_none()
            && direction.is_none()
            && local.is_empty()
            && remote.is_empty()
            && not_remote.is_empty()
            && local_ports.is_empty()
            && remote_ports.is_empty()
    }
}
