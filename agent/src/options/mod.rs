//! The table of socket options: every fact about an option is written down here, once.
//!
//! The validator takes names, value kinds and ranges from it, the compiler where and how an option
//! is set, the audit how a value is shown, `sockpolicy options` and `doctor` all of it.
//!
//! It does not say what a given kernel can do: that is found by trying. `since` is there to tell
//! people which kernel to look for.
//!
//! Sources, where no other is named: `sk_setsockopt` (net/core/sock.c), `do_tcp_setsockopt`
//! (net/ipv4/tcp.c), `do_ip_setsockopt` (net/ipv4/ip_sockglue.c), `do_ipv6_setsockopt`
//! (net/ipv6/ipv6_sockglue.c) and, for what programs may set, `sol_socket_sockopt` and its sisters
//! in net/core/filter.c, all of 6.18. Numbers are those of asm-generic: x86, arm64, riscv.

mod aliases;
mod names;
mod table;

use abi::setting::{OptionKey, effective, kind};

pub use self::{
    aliases::{GUARDS, Guard, by_spelling},
    names::{DSCP_NAMES, Names},
    table::OPTIONS,
};

/// The level of an option: the second argument of setsockopt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(pub i32);

impl Level {
    pub const IP: Self = Self(0);
    pub const SOCKET: Self = Self(1);
    pub const TCP: Self = Self(6);
    pub const UDP: Self = Self(17);
    pub const IPV6: Self = Self(41);
    pub const MPTCP: Self = Self(284);

    /// The name of the level as in the socket API, if it has one here.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::IP => Some("SOL_IP"),
            Self::SOCKET => Some("SOL_SOCKET"),
            Self::TCP => Some("SOL_TCP"),
            Self::UDP => Some("SOL_UDP"),
            Self::IPV6 => Some("SOL_IPV6"),
            Self::MPTCP => Some("SOL_MPTCP"),
            _ => None,
        }
    }
}

/// What the value of an option is, and with it how people write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueKind {
    /// `true`, `false`
    Bool,
    /// A signed number without a unit.
    Int,
    /// An unsigned number without a unit.
    Unsigned,
    /// An `int` whose values have names; policies write the number.
    Choice(Names),
    /// Whole seconds.
    Seconds,
    Milliseconds,
    Microseconds,
    Bytes,
    /// Bytes a second; people write bits a second.
    Rate,
    /// The six bits of a differentiated services code point, at their place in the byte: the two
    /// below them are the kernel's (ECN).
    Dscp,
    /// A firewall mark: 32 bits, of which a policy may take some.
    Mark,
    /// The name of a congestion control.
    CongestionControl,
    /// The name of a network interface.
    Device,
    /// The index of a network interface.
    Interface,
    /// `struct linger`: whether close waits, and for how long; what policies bound is the time, in whole seconds.
    Linger,
    /// `struct timeval`: seconds and microseconds, two `__s64`, or two `__s32` from a 32-bit program (`sock_copy_user_timeval`
    /// in net/core/sock.c); to policies microseconds. 0 waits for ever.
    Timeval,
    /// What policies do not look into; reports show it as far as they know its shape.
    Opaque(Shape),
}

/// What the bytes of an opaque value are. Numbers are in the order of the host where nothing else is
/// said; structures are those of include/uapi/linux, of which events hold the first 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Nothing that is known here: shown as hex.
    Bytes,
    /// `int`: an errno, or 0.
    Errno,
    /// `int`: a file descriptor.
    Descriptor,
    /// `__be32`: the index of a network interface, 0 for none (`do_ip_setsockopt`).
    InterfaceIndex,
    /// `__u64`
    Wide,
    /// Characters, ended by NUL or by the length.
    Text,
    /// `struct ucred`: a process and its user and group.
    Credentials,
    /// `struct sockaddr`, of which only that of IPv4 is in events as a whole.
    SocketAddress,
    /// `struct in_addr`, or one of those of [`Self::Membership`].
    MulticastInterface,
    /// `struct ip_mreq`, or `struct ip_mreqn` with the index of the interface.
    Membership,
    /// `struct ip_mreq_source`
    SourceMembership,
    /// `struct ipv6_mreq`, of which events hold the group.
    Ipv6Membership,
    /// `struct in6_pktinfo`, of which events hold the address.
    Ipv6PacketInfo,
}

impl ValueKind {
    /// How programs read the value: one of [`abi::setting::kind`].
    #[must_use]
    pub fn abi_kind(self) -> u8 {
        match self {
            Self::Bool => kind::BOOL,
            Self::Int
            | Self::Choice(_)
            | Self::Seconds
            | Self::Milliseconds
            | Self::Microseconds
            | Self::Bytes
            | Self::Interface
            | Self::Dscp => kind::INT,
            Self::Unsigned | Self::Rate | Self::Mark => kind::UNSIGNED,
            Self::CongestionControl | Self::Device => kind::TEXT,
            Self::Linger => kind::LINGER,
            Self::Timeval => kind::TIMEVAL,
            Self::Opaque(_) => kind::OPAQUE,
        }
    }

    /// Whether the value is a number that can be bounded.
    #[must_use]
    pub fn has_bounds(self) -> bool {
        match self {
            Self::Int
            | Self::Unsigned
            | Self::Choice(_)
            | Self::Seconds
            | Self::Milliseconds
            | Self::Microseconds
            | Self::Bytes
            | Self::Linger
            | Self::Timeval
            | Self::Rate => true,
            Self::Bool
            | Self::Dscp
            | Self::Mark
            | Self::CongestionControl
            | Self::Device
            | Self::Interface
            | Self::Opaque(_) => false,
        }
    }

    /// What the value is, for people.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::Bool => "true or false",
            Self::Int | Self::Unsigned | Self::Choice(_) => "a number",
            Self::Seconds => "a time in whole seconds, such as \"60s\" or \"2min\"",
            Self::Milliseconds => "a time in whole milliseconds, such as \"30s\" or \"1500ms\"",
            Self::Microseconds => "a time in whole microseconds, such as \"40ms\" or \"8000us\"",
            Self::Bytes => "a size, such as \"128KiB\" or 4096",
            Self::Rate => "a rate, such as \"200mbit\", or \"unlimited\"",
            Self::Dscp => "a DSCP name such as \"AF21\", or a number whose two lowest bits are 0",
            Self::Mark => "a number, or \"value/mask\" such as \"0x20/0xff\"",
            Self::CongestionControl => "the name of a congestion control, such as \"bbr\"",
            Self::Device => "the name of a network interface, such as \"eth0\"",
            Self::Interface => "the index of a network interface",
            Self::Linger => "how long close waits, in whole seconds, such as \"5s\"",
            Self::Timeval => "a time, such as \"30s\" or \"500ms\"; 0, for ever, is more than any",
            Self::Opaque(shape) => shape.describe(),
        }
    }
}

impl Shape {
    fn describe(self) -> &'static str {
        match self {
            Self::Bytes => "a structure",
            Self::Errno => "an errno",
            Self::Descriptor => "a file descriptor",
            Self::InterfaceIndex => "the index of a network interface",
            Self::Wide => "a number of 64 bits",
            Self::Text => "a text",
            Self::Credentials => "a struct ucred",
            Self::SocketAddress => "a socket address",
            Self::MulticastInterface => "an address or a struct ip_mreqn",
            Self::Membership => "a struct ip_mreqn",
            Self::SourceMembership => "a struct ip_mreq_source",
            Self::Ipv6Membership => "a struct ipv6_mreq",
            Self::Ipv6PacketInfo => "a struct in6_pktinfo",
        }
    }
}

/// A set of places where an option is applied: bit n is number n of [`abi::apply_point`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sites(u16);

impl Sites {
    const fn of(sites: &[u32]) -> Self {
        let mut bits = 0;
        let mut at = 0;
        while at < sites.len() {
            bits |= 1 << sites[at];
            at += 1;
        }
        Self(bits)
    }

    #[must_use]
    pub const fn contains(self, site: u32) -> bool {
        self.0 & (1 << site) != 0
    }
}

/// How programs set an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settable {
    pub sites: Sites,
    /// One of [`abi::setting::read_back`].
    pub read_back: u8,
    /// The first kernel on which programs can set it, as far as is known; 5.10 is the oldest that
    /// sockpolicy is made for.
    pub since: &'static str,
}

/// What one option has to do with another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    /// Setting the one gives the other another value.
    Resets(&'static str),
}

/// What a policy can do with an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// `set`, `limit`, `deny`.
    Settable(Settable),
    /// `limit` and `deny`: the kernel does not let programs set it, but the application's own calls
    /// can be seen to.
    Guardable,
    /// `deny`: nobody can set it. The kernel refuses whoever tries (`ENOPROTOOPT` mostly).
    ReadOnly,
}

/// What the kernel makes of a value that it accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Keeps it as it is; a switch as 0 or 1.
    AsGiven,
    /// What getsockopt would show is in this member of a structure that begins where the socket does
    /// (`sock`, `inet_sock`, `tcp_sock`): a number of 1, 2, 4 or 8 bytes, unsigned or signed as the
    /// option is, and unsigned where it is narrower than an `int`. It has this name in every kernel
    /// from 5.10 to 7.2.
    ///
    /// Not in MPTCP sockets, but for the members of `sock`: the others may be a subflow's
    /// (`mptcp_setsockopt` in net/mptcp/sockopt.c), and no `tcp_sock` begins there.
    Member { of: &'static str, name: &'static str },
    /// Something that only the socket itself can tell.
    Otherwise,
}

/// Whose doing it is what getsockopt shows of a socket that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// That of whoever set the option; else it is what a new socket shows.
    Chosen,
    /// The same where this bit of SO_BUF_LOCK says that it was set; else the kernel tunes it.
    Tuned { lock: u32 },
    /// The same until a TCP socket is connected. From then on the kernel changes it by itself.
    UntilConnected,
    /// The same until a TCP socket is connected. From then on it is what came of it there: at the most what was set.
    AtMost,
    /// The same until the socket is bound to an address.
    UntilBound,
    /// The kernel's: it is about how the socket fares.
    State,
    /// Not to be read: that takes something from the socket (a pending error, a saved SYN, data) or hands over a descriptor, or
    /// takes an argument.
    Never,
}

/// One socket option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketOption {
    /// As in the socket API.
    pub name: &'static str,
    pub level: Level,
    pub number: i32,
    pub value: ValueKind,
    /// The smallest and the largest value that the kernel takes, in the unit of `value`. Means
    /// nothing for kinds that are not numbers.
    pub range: (i64, i64),
    pub class: Class,
    pub kept: Kept,
    pub reading: Reading,
    /// Bits of [`abi::setting::traits`].
    pub traits: u8,
    /// Which lengths of an argument the kernel accepts: one of [`abi::setting::argument`].
    pub argument: u8,
    /// Whether the kernel reads the number as unsigned, whatever the range that a policy can give.
    pub is_unsigned: bool,
    /// What a limit compares in place of 0: a number, or one of [`abi::setting::effective`]. A default is that of the
    /// system, as Linux ships it.
    pub zero: i64,
    /// The same in place of a negative number.
    pub negative: i64,
    /// The option of which this is another name.
    pub same_as: Option<&'static str>,
    /// What it has to do with another option, if anything.
    pub relation: Option<Relation>,
    /// What has happened by the time that a connection is accepted and in which this option has a say; for people.
    pub negotiated: Option<&'static str>,
    /// A value as it may stand in a policy (TOML), harmless on any socket; empty if there is none.
    pub example: &'static str,
    /// What the option does, in a few words.
    pub about: &'static str,
}

impl SocketOption {
    #[must_use]
    pub fn key(&self) -> OptionKey {
        OptionKey { level: self.level.0, name: self.number }
    }

    /// Whether only programs know it: those have numbers from 1000 on (include/uapi/linux/bpf.h), which setsockopt and getsockopt
    /// refuse.
    #[must_use]
    pub fn is_for_programs(&self) -> bool {
        self.key().is_for_programs()
    }

    #[must_use]
    pub fn settable(&self) -> Option<&Settable> {
        match &self.class {
            Class::Settable(settable) => Some(settable),
            Class::Guardable | Class::ReadOnly => None,
        }
    }

    /// The function of the kernel that reads the argument, and its file.
    #[must_use]
    pub fn handler(&self) -> &'static str {
        match self.level {
            Level::TCP if self.is_for_programs() => "bpf_sol_tcp_setsockopt, net/core/filter.c",
            Level::SOCKET => "sk_setsockopt, net/core/sock.c",
            Level::TCP => "do_tcp_setsockopt, net/ipv4/tcp.c",
            Level::UDP => "udp_lib_setsockopt, net/ipv4/udp.c",
            Level::IP => "do_ip_setsockopt, net/ipv4/ip_sockglue.c",
            Level::IPV6 => "do_ipv6_setsockopt, net/ipv6/ipv6_sockglue.c",
            _ => "mptcp_setsockopt, net/mptcp/sockopt.c",
        }
    }

    /// What a limit compares in place of a number.
    #[must_use]
    pub fn stands_for(&self, number: i64) -> i64 {
        match number {
            0 => self.zero,
            ..0 => self.negative,
            _ => effective::SAME,
        }
    }

    /// Whether a policy can bound the value with `limit`.
    #[must_use]
    pub fn can_be_limited(&self) -> bool {
        self.class != Class::ReadOnly && self.value.has_bounds()
    }
}

/// The option of this name.
#[must_use]
pub fn by_name(name: &str) -> Option<&'static SocketOption> {
    OPTIONS.iter().find(|option| option.name == name)
}

/// TCP_CONGESTION, whose values depend on what the kernel has loaded.
pub const CONGESTION: &SocketOption = match by_number(Level::TCP, 13) {
    Some(option) => option,
    None => panic!("TCP_CONGESTION is in the table"),
};

const fn by_number(level: Level, number: i32) -> Option<&'static SocketOption> {
    let mut at = 0;
    while at < OPTIONS.len() {
        if OPTIONS[at].level.0 == level.0 && OPTIONS[at].number == number {
            return Some(&OPTIONS[at]);
        }
        at += 1;
    }
    None
}

/// The option with this level and number.
#[must_use]
pub fn by_key(key: OptionKey) -> Option<&'static SocketOption> {
    OPTIONS.iter().find(|option| option.key() == key)
}

/// What to call an option that may have no name here: `TCP_NODELAY`, or `6:99`.
#[must_use]
pub fn display_name(key: OptionKey) -> String {
    by_key(key).map_or_else(|| format!("{}:{}", key.level, key.name), |option| option.name.to_owned())
}

/// The bits of the traffic class byte that are a code point's.
pub const DSCP_MASK: u32 = 0xfc;

/// The largest SO_MAX_PACING_RATE: no limit. Programs can pass 32 bits only.
pub const UNLIMITED: u32 = u32::MAX;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use abi::{
        apply_point::{POST_CREATE, SOCK_CREATE},
        setting::{Lookup, OptionFilter, read_back},
    };

    use super::*;

    #[test]
    fn names_and_keys_are_unique() {
        let names: BTreeSet<_> = OPTIONS.iter().map(|option| option.name).collect();
        let keys: BTreeSet<_> = OPTIONS.iter().map(SocketOption::key).collect();
        assert_eq!(names.len(), OPTIONS.len());
        assert_eq!(keys.len(), OPTIONS.len());
    }

    #[test]
    fn numbers_of_all_options_are_found_without_a_search() {
        let mut numbers = OptionFilter::default();
        for (option, number) in OPTIONS.iter().zip(0..) {
            numbers.add(option.key(), number);
        }
        for (option, number) in OPTIONS.iter().zip(0..) {
            assert_eq!(numbers.get(option.key()), Lookup::Maybe(number), "{}", option.name);
        }
    }

    #[test]
    fn settable_options_come_first_and_fit_the_programs() {
        let settable = OPTIONS.iter().take_while(|option| option.settable().is_some()).count();
        assert!(OPTIONS[settable..].iter().all(|option| option.settable().is_none()));
        assert!(settable <= abi::SETTABLE_MAX);
        let at_birth =
            |option: &&SocketOption| option.settable().is_some_and(|settable| settable.sites.contains(SOCK_CREATE));
        assert!(OPTIONS.iter().filter(at_birth).count() <= abi::SOCK_CREATE_MAX);
        // An option that another one resets is set there again.
        let at_creation =
            |option: &&SocketOption| option.settable().is_some_and(|settable| settable.sites.contains(POST_CREATE));
        let is_tcp = |option: &&SocketOption| option.traits & abi::setting::traits::TCP != 0;
        assert!(OPTIONS.iter().filter(at_creation).filter(|option| !is_tcp(option)).count() < abi::POST_CREATE_MAX);
    }

    #[test]
    fn option_is_applied_before_the_one_that_it_resets() {
        let place = |name: &str| OPTIONS.iter().position(|option| option.name == name);
        let resets = |option: &'static SocketOption| match option.relation {
            Some(Relation::Resets(other)) => Some((option.name, other)),
            _ => None,
        };
        let resetting: Vec<_> = OPTIONS.iter().filter_map(resets).collect();
        assert!(resetting.contains(&("IP_TOS", "SO_PRIORITY")));
        for (one, other) in resetting {
            assert!(place(one) < place(other), "{one}, {other}");
        }
    }

    #[test]
    fn members_are_of_structures_that_begin_where_the_socket_does() {
        for option in OPTIONS {
            let Kept::Member { of, name } = option.kept else { continue };
            assert!(["sock", "inet_sock", "tcp_sock"].contains(&of), "{}: {of}", option.name);
            assert_eq!(name.starts_with("sk_"), of == "sock", "{}: {of}.{name}", option.name);
            assert!(of != "tcp_sock" || option.level == Level::TCP, "{}: {of}.{name}", option.name);
        }
    }

    #[test]
    fn what_is_doubled_or_read_only_is_not_kept_as_it_is_given() {
        for option in OPTIONS {
            let doubled = option.settable().is_some_and(|settable| settable.read_back == read_back::DOUBLED);
            if doubled || option.class == Class::ReadOnly {
                assert_ne!(option.kept, Kept::AsGiven, "{}", option.name);
            }
        }
    }

    #[test]
    fn numbers_are_those_of_the_c_library() {
        for (name, number) in [
            ("SO_ACCEPTCONN", libc::SO_ACCEPTCONN),
            ("SO_BPF_EXTENSIONS", libc::SO_BPF_EXTENSIONS),
            ("SO_BSDCOMPAT", libc::SO_BSDCOMPAT),
            ("SO_COOKIE", libc::SO_COOKIE),
            ("SO_DOMAIN", libc::SO_DOMAIN),
            ("SO_ERROR", libc::SO_ERROR),
            ("SO_INCOMING_NAPI_ID", libc::SO_INCOMING_NAPI_ID),
            ("SO_MARK", libc::SO_MARK),
            ("SO_MEMINFO", libc::SO_MEMINFO),
            ("SO_NETNS_COOKIE", libc::SO_NETNS_COOKIE),
            ("SO_PEERCRED", libc::SO_PEERCRED),
            ("SO_PEERGROUPS", libc::SO_PEERGROUPS),
            ("SO_PEERNAME", libc::SO_PEERNAME),
            ("SO_PEERPIDFD", libc::SO_PEERPIDFD),
            ("SO_PEERSEC", libc::SO_PEERSEC),
            ("SO_PROTOCOL", libc::SO_PROTOCOL),
            ("SO_RCVMARK", libc::SO_RCVMARK),
            ("SO_SNDLOWAT", libc::SO_SNDLOWAT),
            ("SO_TYPE", libc::SO_TYPE),
            ("SO_BINDTODEVICE", libc::SO_BINDTODEVICE),
            ("SO_LINGER", libc::SO_LINGER),
            ("SO_INCOMING_CPU", libc::SO_INCOMING_CPU),
            ("TCP_CC_INFO", libc::TCP_CC_INFO),
            ("TCP_INFO", libc::TCP_INFO),
            ("TCP_SAVED_SYN", libc::TCP_SAVED_SYN),
            ("TCP_ZEROCOPY_RECEIVE", libc::TCP_ZEROCOPY_RECEIVE),
            ("TCP_NODELAY", libc::TCP_NODELAY),
            ("TCP_KEEPIDLE", libc::TCP_KEEPIDLE),
            ("TCP_USER_TIMEOUT", libc::TCP_USER_TIMEOUT),
            ("TCP_NOTSENT_LOWAT", libc::TCP_NOTSENT_LOWAT),
            ("TCP_QUICKACK", libc::TCP_QUICKACK),
            ("TCP_REPAIR", libc::TCP_REPAIR),
            ("TCP_FASTOPEN_CONNECT", libc::TCP_FASTOPEN_CONNECT),
            ("IP_MTU", libc::IP_MTU),
            ("IP_PKTOPTIONS", libc::IP_PKTOPTIONS),
            ("SO_ORIGINAL_DST", libc::SO_ORIGINAL_DST),
            ("IP_TOS", libc::IP_TOS),
            ("IP_TTL", libc::IP_TTL),
            ("IP_MTU_DISCOVER", libc::IP_MTU_DISCOVER),
            ("IP_BIND_ADDRESS_NO_PORT", libc::IP_BIND_ADDRESS_NO_PORT),
            ("IPV6_FLOWINFO", libc::IPV6_FLOWINFO),
            ("IPV6_PATHMTU", libc::IPV6_PATHMTU),
            ("IPV6_RECVDSTOPTS", libc::IPV6_RECVDSTOPTS),
            ("IPV6_RECVFRAGSIZE", libc::IPV6_RECVFRAGSIZE),
            ("IPV6_RECVHOPOPTS", libc::IPV6_RECVHOPOPTS),
            ("IPV6_RECVORIGDSTADDR", libc::IPV6_RECVORIGDSTADDR),
            ("IPV6_RECVRTHDR", libc::IPV6_RECVRTHDR),
            ("IPV6_ROUTER_ALERT_ISOLATE", libc::IPV6_ROUTER_ALERT_ISOLATE),
            ("IPV6_RTHDRDSTOPTS", libc::IPV6_RTHDRDSTOPTS),
            ("IP6T_SO_ORIGINAL_DST", libc::IP6T_SO_ORIGINAL_DST),
            ("IPV6_TCLASS", libc::IPV6_TCLASS),
            ("IPV6_V6ONLY", libc::IPV6_V6ONLY),
            ("IPV6_UNICAST_HOPS", libc::IPV6_UNICAST_HOPS),
            ("IPV6_AUTOFLOWLABEL", libc::IPV6_AUTOFLOWLABEL),
            ("UDP_SEGMENT", libc::UDP_SEGMENT),
            ("UDP_GRO", libc::UDP_GRO),
        ] {
            assert_eq!(by_name(name).map(|option| option.number), Some(number), "{name}");
        }
    }
}
