//! The apply points of each option, and the hooks that a policy needs.

use std::fmt;

use abi::{
    ApplyList, apply_point, entry,
    setting::{OptionRow, read_back},
};

use crate::{
    options::{self, Relation},
    policy::model::{Protocol, Rule, Selector},
};

/// A kernel attach point of a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// cgroup/sock_create
    SockCreate,
    /// lsm_cgroup/socket_post_create
    PostCreate,
    Bind4,
    Bind6,
    Connect4,
    Connect6,
    /// cgroup/sendmsg4
    Sendmsg4,
    Sendmsg6,
    /// sock_ops
    SockOps,
    /// cgroup/setsockopt
    Setsockopt,
    /// cgroup/getsockopt
    Getsockopt,
}

impl Hook {
    pub const ALL: [Self; 11] = [
        Self::SockCreate,
        Self::PostCreate,
        Self::Bind4,
        Self::Bind6,
        Self::Connect4,
        Self::Connect6,
        Self::Sendmsg4,
        Self::Sendmsg6,
        Self::SockOps,
        Self::Setsockopt,
        Self::Getsockopt,
    ];

    /// Returns the name that the kernel's documentation uses.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SockCreate => "cgroup/sock_create",
            Self::PostCreate => "lsm_cgroup/socket_post_create",
            Self::Bind4 => "cgroup/bind4",
            Self::Bind6 => "cgroup/bind6",
            Self::Connect4 => "cgroup/connect4",
            Self::Connect6 => "cgroup/connect6",
            Self::Sendmsg4 => "cgroup/sendmsg4",
            Self::Sendmsg6 => "cgroup/sendmsg6",
            Self::SockOps => "sock_ops",
            Self::Setsockopt => "cgroup/setsockopt",
            Self::Getsockopt => "cgroup/getsockopt",
        }
    }

    /// Returns the name of the program for the hook.
    #[must_use]
    pub fn program(self) -> &'static str {
        match self {
            Self::SockCreate => "sp_sock_create",
            Self::PostCreate => "sp_post_create",
            Self::Bind4 => "sp_bind4",
            Self::Bind6 => "sp_bind6",
            Self::Connect4 => "sp_connect4",
            Self::Connect6 => "sp_connect6",
            Self::Sendmsg4 => "sp_sendmsg4",
            Self::Sendmsg6 => "sp_sendmsg6",
            Self::SockOps => "sp_sock_ops",
            Self::Setsockopt => "sp_setsockopt",
            Self::Getsockopt => "sp_getsockopt",
        }
    }

    /// Returns the apply points that sockets pass in the hook.
    #[must_use]
    pub fn sites(self) -> &'static [u32] {
        match self {
            Self::SockCreate => &[apply_point::SOCK_CREATE],
            Self::PostCreate => &[apply_point::POST_CREATE],
            Self::Bind4 | Self::Bind6 => &[apply_point::BIND_STREAM, apply_point::BIND_DATAGRAM],
            Self::Connect4 | Self::Connect6 => &[apply_point::CONNECT_STREAM, apply_point::CONNECT_DATAGRAM],
            Self::Sendmsg4 | Self::Sendmsg6 => &[apply_point::SEND],
            Self::SockOps => &[apply_point::SYN, apply_point::ACTIVE, apply_point::PASSIVE, apply_point::LISTEN],
            Self::Setsockopt | Self::Getsockopt => &[],
        }
    }

    /// Returns the first kernel known to run sockpolicy's program for the hook.
    #[must_use]
    pub fn since(self) -> &'static str {
        match self {
            // These programs need bpf_setsockopt, which came with 5.15.
            Self::Bind4 | Self::Bind6 | Self::Sendmsg4 | Self::Sendmsg6 => "5.15",
            Self::PostCreate => "6.0",
            _ => "5.10",
        }
    }

    /// Returns whether policies also work without the hook, for fewer sockets. The hook needs an active BPF LSM.
    #[must_use]
    pub fn is_optional(self) -> bool {
        self == Self::PostCreate
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Apply points that only TCP sockets, or only other sockets, pass. Both may pass the others.
const STREAM: [u32; 6] = [
    apply_point::BIND_STREAM,
    apply_point::CONNECT_STREAM,
    apply_point::SYN,
    apply_point::ACTIVE,
    apply_point::PASSIVE,
    apply_point::LISTEN,
];
const DATAGRAM: [u32; 4] =
    [apply_point::BIND_DATAGRAM, apply_point::CONNECT_DATAGRAM, apply_point::SEND, apply_point::POST_CREATE];

/// Apply points at which facts become known or change.
const CHECKS: [u32; 6] = [
    apply_point::BIND_DATAGRAM,
    apply_point::CONNECT_DATAGRAM,
    apply_point::SEND,
    apply_point::SYN,
    apply_point::LISTEN,
    apply_point::PASSIVE,
];

/// Returns what to apply at each point. An option is left out if no rule that names it can match there.
pub(super) fn sites(options: &[OptionRow], rules: &[&Rule]) -> [ApplyList; apply_point::COUNT] {
    let mut sites = [ApplyList::default(); apply_point::COUNT];
    for (index, option) in options.iter().enumerate().filter(|(_, option)| !option.is_alias()) {
        let Some(settable) = options::by_key(option.key).and_then(|known| known.settable()) else { continue };
        let of = |bits: u64| {
            rules.iter().enumerate().filter(move |(number, _)| bits & (1 << number) != 0).map(|(_, rule)| *rule)
        };
        let is_tcp_only = option.traits & abi::setting::traits::TCP != 0;
        let is_kept = option.sets != 0 && of(option.names).any(|rule| needs_mutable_facts(&rule.selector));
        let is_checked = is_kept
            || (!option.is_certain()
                && of(option.names & !option.sets).any(|rule| needs_initially_unknown_facts(&rule.selector)));
        for (number, list) in sites.iter_mut().enumerate() {
            let number = number as u32;
            // An option that another option resets here is set again.
            let is_reset = list.options[..list.len as usize]
                .iter()
                .any(|earlier| resets(&options[(*earlier & entry::NUMBER) as usize], option));
            // If a datagram socket loses its peer, the values that apply without a peer are set.
            let is_without_peer =
                is_kept && number == apply_point::SEND && settable.sites.contains(apply_point::CONNECT_DATAGRAM);
            let is_set = (settable.sites.contains(number) || is_reset || is_without_peer)
                && of(option.sets).any(|rule| rule_may_pass(rule, number));
            let is_checked =
                is_checked && CHECKS.contains(&number) && of(option.names).any(|rule| rule_may_pass(rule, number));
            if (is_tcp_only && DATAGRAM.contains(&number)) || !(is_set || is_checked) {
                continue;
            }
            // After this hook, the kernel chooses the local address of a datagram socket that connects without one
            // (`ip4_datagram_connect`, net/ipv4/datagram.c; `inet_autobind`, net/ipv4/af_inet.c).
            let is_last = number == apply_point::CONNECT_DATAGRAM;
            let flag = |holds: bool, flag: u32| if holds { flag } else { 0 };
            let how = flag(!is_set, entry::CHECK) | flag(is_kept, entry::KEEP) | flag(is_last, entry::LAST);
            list.options[list.len as usize] = index as u32 | how;
            list.len += 1;
        }
    }
    sites
}

/// Returns whether a selector depends on facts that may change later in the life of a socket: the peer, and with it the
/// family and the local address. A connected socket that listens later, or the other way round, keeps its values.
fn needs_mutable_facts(selector: &Selector) -> bool {
    let Selector { family, local, remote, not_remote, local_ports, remote_ports, .. } = selector;
    let is_used = [!local.is_empty(), !remote.is_empty(), !not_remote.is_empty()];
    family.is_some() || is_used.contains(&true) || !local_ports.is_empty() || !remote_ports.is_empty()
}

/// Returns whether a selector depends on facts that are not known about a new socket.
pub(super) fn needs_initially_unknown_facts(selector: &Selector) -> bool {
    selector.direction.is_some() || needs_mutable_facts(selector)
}

/// Returns whether setting `one` changes the value of `other`.
fn resets(one: &OptionRow, other: &OptionRow) -> bool {
    let Some(Relation::Resets(name)) = options::by_key(one.key).and_then(|one| one.relation) else { return false };
    options::by_key(other.key).is_some_and(|other| other.name == name)
}

/// Returns whether sockets that a rule matches can pass an apply point.
fn rule_may_pass(rule: &Rule, site: u32) -> bool {
    may_pass(&rule.selector.protocols, site)
}

/// Returns whether sockets of these protocols, or of any protocol if the list is empty, can pass an apply point.
#[must_use]
pub fn may_pass(protocols: &[Protocol], site: u32) -> bool {
    if protocols.is_empty() {
        return true;
    }
    if STREAM.contains(&site) {
        return protocols.contains(&Protocol::Tcp);
    }
    if site == apply_point::SEND {
        return protocols.contains(&Protocol::Udp);
    }
    if DATAGRAM.contains(&site) {
        return protocols.iter().any(|protocol| *protocol != Protocol::Tcp);
    }
    true
}

/// Returns the hooks that a policy needs.
pub(super) fn needed(
    options: &[OptionRow],
    sites: &[ApplyList; apply_point::COUNT],
    rules: &[&Rule],
    reads: bool,
) -> Vec<Hook> {
    let any = |numbers: &[u32]| numbers.iter().any(|number| sites[*number as usize].len > 0);
    let tcp = rules.iter().any(|rule| rule_may_pass(rule, apply_point::SYN));
    let compares = options.iter().any(is_compared);
    Hook::ALL
        .into_iter()
        .filter(|hook| match hook {
            // SOCK_CREATE also without anything to apply: a socket's notes are allocated when the socket is created,
            // before the socket can use up its option memory.
            Hook::SockCreate | Hook::Setsockopt => !options.is_empty(),
            Hook::PostCreate
            | Hook::Bind4
            | Hook::Bind6
            | Hook::Connect4
            | Hook::Connect6
            | Hook::Sendmsg4
            | Hook::Sendmsg6 => any(hook.sites()),
            // Also records the direction of a socket, and separates the notes of an accepted socket from those of its
            // listener.
            Hook::SockOps => tcp && !options.is_empty(),
            Hook::Getsockopt => reads && compares,
        })
        .collect()
}

/// Returns whether reads of an option are compared with the value that the policy sets.
fn is_compared(option: &OptionRow) -> bool {
    option.sets != 0 && option.read_back != read_back::NONE
}

/// Returns the options that the program at a hook sets, judges or compares, as indices of `options`.
pub(super) fn options_at(hook: Hook, options: &[OptionRow], sites: &[ApplyList; apply_point::COUNT]) -> Vec<usize> {
    let is_there = |index: usize, option: &OptionRow| match hook {
        Hook::Setsockopt => !option.is_alias(),
        Hook::Getsockopt => is_compared(option),
        _ => hook.sites().iter().any(|site| {
            let ApplyList { len, options } = &sites[*site as usize];
            options.iter().take(*len as usize).any(|at| (*at & entry::NUMBER) as usize == index)
        }),
    };
    options.iter().enumerate().filter(|(index, option)| is_there(*index, option)).map(|(index, _)| index).collect()
}
