//! A policy that is valid: every name known, every value in range and in the kernel's unit.
//!
//! Made by [`super::validate`], which is the only place that checks; whoever holds one of these
//! types need not look again.

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
    /// Empty: the policy is a template.
    pub target: Target,
    pub audit: Audit,
    /// In order: the first that matches and names an option decides it.
    pub rules: Vec<Rule>,
    /// What the file itself says that must come of sockets.
    pub tests: Vec<Test>,
}

/// Whom a policy is about: all that any of these match.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// Globs of cgroup paths below the cgroup2 mount, without a leading slash.
    pub cgroups: Vec<String>,
    pub containers: Vec<ContainerSelector>,
}

/// Which containers are meant: those of which all holds that is said here, never nothing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ContainerSelector {
    /// A glob.
    pub name: Option<String>,
    /// A glob.
    pub image: Option<String>,
    /// How it begins.
    pub id: Option<String>,
    pub runtime: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Do what the policy says.
    #[default]
    Enforce,
    /// Say what would be done.
    DryRun,
}

impl Mode {
    /// As policy files and reports have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::DryRun => "dry-run",
        }
    }
}

/// What the audit reports, beside the conflicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Audit {
    pub calls: Calls,
    /// Whether getsockopt calls are looked at too.
    pub reads: bool,
    /// Whether each call is measured.
    pub timing: bool,
}

impl Default for Audit {
    fn default() -> Self {
        Self { calls: Calls::Conflicts, reads: true, timing: false }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Calls {
    /// Nothing beside the conflicts.
    #[default]
    Conflicts,
    /// Every call on an option that a rule names.
    Governed,
    /// Every call.
    All,
}

#[derive(Clone, Debug)]
pub struct Rule {
    /// Unique in its file; `rule-N` (counted from 1) where the file gives none.
    pub name: String,
    /// Line of `[[rule]]` in the file, counted from 1.
    pub line: usize,
    /// Where that stands.
    pub header: Span,
    pub selector: Selector,
    /// One for each option that the rule names, in the order of the file.
    pub clauses: Vec<Clause>,
}

/// Which of the target's sockets a rule is about. An empty list, or `None`, asks nothing.
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

/// Gives each word of a policy file its spelling, and the number that the programs know it by.
macro_rules! spelled {
    ($type:ident: $($variant:ident $name:literal $code:expr),+) => {
        impl $type {
            /// Every word, as policy files spell it.
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

            /// The word for a number; `None` also for that of what is not known.
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

/// A socket, and what must come of it.
#[derive(Clone, Debug)]
pub struct Test {
    /// Unique among the file's tests; `test-N` (counted from 1) where the file gives none.
    pub name: String,
    /// Line of `[[test]]` in the file, counted from 1.
    pub line: usize,
    pub socket: Socket,
    /// In the order of the file.
    pub expected: Vec<Expected>,
}

/// What must come of one option.
#[derive(Clone, Debug)]
pub struct Expected {
    pub option: Named,
    /// Line in the file, counted from 1.
    pub line: usize,
    /// What is to decide it; `None`: nothing.
    pub form: Option<Form>,
}

/// What a rule says about one option.
#[derive(Clone, Debug)]
pub struct Clause {
    pub option: Named,
    /// Line in the file, counted from 1.
    pub line: usize,
    /// Where the option's name stands.
    pub span: Span,
    pub form: Form,
    /// What becomes of an application's call that disagrees. Always `Deny` for [`Form::Deny`].
    pub on_conflict: OnConflict,
    /// What a denied call fails with.
    pub errno: Errno,
}

/// An option as a policy names it.
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

    /// What all names of one value have in common.
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
    /// Both in the option's unit; the option's own bound where the file gives none.
    Limit {
        min: i64,
        max: i64,
    },
    Deny,
}

/// A value that a policy wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The bits of `mask` have this value; bits outside it are 0 here.
    Number { value: u32, mask: u32 },
    /// At most 15 bytes.
    Text(String),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnConflict {
    /// The application wins; it is reported.
    Allow,
    /// The application's value is replaced, or brought within the limit.
    #[default]
    Rewrite,
    /// The call succeeds and does nothing.
    Ignore,
    /// The call fails.
    Deny,
}

/// An errno that denied calls fail with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub u16);

impl Target {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let Self { cgroups, containers } = self;
        cgroups.is_empty() && containers.is_empty()
    }
}

/// As a policy file has it: `container = { name = "web-*" }`.
impl fmt::Display for ContainerSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, image, id, runtime } = self;
        let keys =
            [("name", name.as_deref()), ("image", image.as_deref()), ("id", id.as_deref()), ("runtime", *runtime)];
        let said = keys.iter().filter_map(|(key, value)| Some(format!("{key} = \"{}\"", (*value)?)));
        write!(f, "container = {{ {} }}", said.collect::<Vec<_>>().join(", "))
    }
}

impl Policy {
    /// The file, as it was named.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.source.path()
    }
}

impl Errno {
    pub const EPERM: Self = Self(libc::EPERM as u16);
    /// The first kernel on which programs choose it: `bpf_set_retval` for cgroup/setsockopt (b44123b4a3dc). Before it is
    /// [`Self::EPERM`].
    pub const SINCE: &'static str = "5.18";
}

impl Default for Errno {
    fn default() -> Self {
        Self::EPERM
    }
}

impl Selector {
    /// Whether a rule with this selector asks about nothing at all.
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
