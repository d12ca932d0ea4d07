//! The table of socket options: the only place for facts about an option.
//!
//! The validator uses its names, value kinds and ranges. The compiler uses where and how an option is set, and the
//! audit how a value is shown. `sockpolicy options` and `doctor` show the whole table.
//!
//! The table does not decide what a kernel supports; `doctor`, `exec` and `run` probe that. `since` only tells users
//! which kernel they need.
//!
//! Sources, unless another is named: `sk_setsockopt` (net/core/sock.c), `do_tcp_setsockopt` (net/ipv4/tcp.c),
//! `do_ip_setsockopt` (net/ipv4/ip_sockglue.c), `do_ipv6_setsockopt` (net/ipv6/ipv6_sockglue.c), all of 6.18. What
//! programs can set comes from `sol_socket_sockopt` and related functions in net/core/filter.c, also of 6.18. Numbers
//! are those of asm-generic: x86, arm64, riscv.

mod aliases;
mod names;
mod table;

use abi::setting::{OptionKey, Value, effective, kind, read_back, word_in};

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

    /// Returns the name of the level in the socket API; `None` for levels without a name here.
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

/// The kind of an option's value, which also decides how policies write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueKind {
    /// `true`, `false`
    Bool,
    /// A signed number without a unit.
    Int,
    /// An unsigned number without a unit.
    Unsigned,
    /// An `int` whose values have names. Policies write the number.
    Choice(Names),
    /// Whole seconds.
    Seconds,
    Milliseconds,
    Microseconds,
    Bytes,
    /// Bytes per second. Policies write bits per second.
    Rate,
    /// The six bits of a differentiated services code point, at their position in the byte. The two bits below are ECN,
    /// which the kernel sets.
    Dscp,
    /// A firewall mark: 32 bits, of which a policy may set some.
    Mark,
    /// The name of a congestion control.
    CongestionControl,
    /// The name of a network interface.
    Device,
    /// The index of a network interface.
    Interface,
    /// `struct linger`: whether and how long close waits. Policies limit the time, in whole seconds.
    Linger,
    /// `struct timeval`: seconds and microseconds, two `__s64`, or two `__s32` from a 32-bit program
    /// (`sock_copy_user_timeval`, net/core/sock.c). Policies count microseconds; 0 waits forever.
    Timeval,
    /// A value that policies do not interpret. Reports show it as far as its shape is known.
    Opaque(Shape),
}

/// The layout of an opaque value. Numbers are in host byte order unless noted. Structures are those of
/// include/uapi/linux; events contain their first 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Unknown bytes, shown as hexadecimal digits.
    Bytes,
    /// `int`: an errno, or 0.
    Errno,
    /// `int`: a file descriptor.
    Descriptor,
    /// `__be32`: the index of a network interface, or 0 for none (`do_ip_setsockopt`).
    InterfaceIndex,
    /// `__u64`
    Wide,
    /// Characters, terminated by NUL or by the length.
    Text,
    /// `struct ucred`: the pid, uid and gid of a process.
    Credentials,
    /// `struct sockaddr`. Only that of IPv4 fits into an event completely.
    SocketAddress,
    /// `struct in_addr`, or one of the structures of [`Self::Membership`].
    MulticastInterface,
    /// `struct ip_mreq`, or `struct ip_mreqn` with the index of the interface.
    Membership,
    /// `struct ip_mreq_source`
    SourceMembership,
    /// `struct ipv6_mreq`. Events contain its group.
    Ipv6Membership,
    /// `struct in6_pktinfo`. Events contain its address.
    Ipv6PacketInfo,
}

impl ValueKind {
    /// Returns how programs read the value: one of [`abi::setting::kind`].
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

    /// Returns whether the value is a number that `limit` can bound.
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

    /// Returns a description of the value, for messages.
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
            Self::Timeval => "a time, such as \"30s\" or \"500ms\"; 0 waits forever and is the largest",
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
            Self::Wide => "a 64-bit number",
            Self::Text => "a string",
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

/// A set of apply points. Bit n stands for number n of [`abi::apply_point`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sites(u16);

impl Sites {
    const fn new(sites: &[u32]) -> Self {
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
    /// The first kernel known to let programs set the option; "5.10" for all that are older, since sockpolicy supports
    /// no older kernel.
    pub since: &'static str,
}

/// How one option affects another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    /// Setting the option changes the value of the other option.
    Resets(&'static str),
}

/// What a policy can do with an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// `set`, `limit`, `deny`.
    Settable(Settable),
    /// `limit` and `deny`: the kernel does not let programs set the option, but programs can judge calls of
    /// applications.
    Guardable,
    /// `deny`: the kernel refuses every call that sets the option, mostly with `ENOPROTOOPT`.
    ReadOnly,
}

/// What the kernel stores when it accepts a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// The value unchanged; a boolean as 0 or 1.
    AsGiven,
    /// The value that getsockopt would return is in this member of a structure that begins at the address of the socket
    /// (`sock`, `inet_sock`, `tcp_sock`). The member is a number of 1, 2, 4 or 8 bytes, with the signedness of the
    /// option; members narrower than an `int` are unsigned. Its name is the same in every kernel from 5.10 to 7.2.
    ///
    /// Does not apply to MPTCP sockets, except for the members of `sock`: the other values may be those of a subflow
    /// (`mptcp_setsockopt`, net/mptcp/sockopt.c), and no `tcp_sock` begins there.
    Member { of: &'static str, name: &'static str },
    /// A value that only getsockopt on the socket can show.
    Otherwise,
}

/// What determines the value that getsockopt returns for a socket in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// The last call that set the option; the default of a new socket if there was none.
    Chosen,
    /// As [`Self::Chosen`] if this bit of SO_BUF_LOCK is set; otherwise the kernel tunes the value.
    Tuned { lock: u32 },
    /// As [`Self::Chosen`] until a TCP socket is connected. From then on, the kernel changes the value by itself.
    UntilConnected,
    /// As [`Self::Chosen`] until a TCP socket is connected. From then on, the negotiated value: at most the value that
    /// was set.
    AtMost,
    /// As [`Self::Chosen`] until the socket is bound to an address.
    UntilBound,
    /// The state of the socket, which the kernel maintains.
    State,
    /// Must not be read: a read removes something from the socket (a pending error, a saved SYN, data), creates a file
    /// descriptor, or needs an argument.
    Never,
}

/// One socket option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketOption {
    /// The name in the socket API.
    pub name: &'static str,
    pub level: Level,
    pub number: i32,
    pub value: ValueKind,
    /// The smallest and the largest value that the kernel accepts, in the unit of `value`. Unused for kinds that are
    /// not numbers.
    pub range: (i64, i64),
    pub class: Class,
    pub kept: Kept,
    pub reading: Reading,
    /// Bits of [`abi::setting::traits`].
    pub traits: u8,
    /// Which argument lengths the kernel accepts: one of [`abi::setting::argument`].
    pub argument: u8,
    /// Whether the kernel reads the number as unsigned, whatever range policies can give.
    pub is_unsigned: bool,
    /// What a limit compares in place of 0: a number, or one of [`abi::setting::effective`]. A default is the one that
    /// Linux ships.
    pub zero: i64,
    /// What a limit compares in place of a negative number; values as for `zero`.
    pub negative: i64,
    /// The option that this is another name of.
    pub same_as: Option<&'static str>,
    /// How this option affects another.
    pub relation: Option<Relation>,
    /// What has been negotiated with this option before a connection is accepted; part of a message.
    pub negotiated: Option<&'static str>,
    /// A value in TOML that is harmless on any socket; empty if there is none.
    pub example: &'static str,
    /// A short description of the option.
    pub about: &'static str,
}

impl SocketOption {
    #[must_use]
    pub fn key(&self) -> OptionKey {
        OptionKey { level: self.level.0, name: self.number }
    }

    /// Returns whether only programs can set the option. Such options have numbers from 1000
    /// (include/uapi/linux/bpf.h), which setsockopt and getsockopt refuse.
    #[must_use]
    pub fn is_for_programs(&self) -> bool {
        self.key().is_for_programs()
    }

    /// Returns whether getsockopt shows twice the value that was set: the kernel doubles the sizes of buffers (socket(7)).
    #[must_use]
    pub fn is_doubled(&'static self) -> bool {
        self.canonical().settable().is_some_and(|settable| settable.read_back == read_back::DOUBLED)
    }

    #[must_use]
    pub fn settable(&self) -> Option<&Settable> {
        match &self.class {
            Class::Settable(settable) => Some(settable),
            Class::Guardable | Class::ReadOnly => None,
        }
    }

    /// Returns the kernel function that reads the argument, and its file.
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

    /// Returns what a limit compares in place of a number; [`effective::SAME`] for the number itself.
    #[must_use]
    pub fn stands_for(&self, number: i64) -> i64 {
        match number {
            0 => self.zero,
            ..0 => self.negative,
            _ => effective::SAME,
        }
    }

    /// Returns whether a policy can bound the value with `limit`.
    #[must_use]
    pub fn can_be_limited(&self) -> bool {
        self.class != Class::ReadOnly && self.value.has_bounds()
    }
}

/// Returns the option with this name.
#[must_use]
pub fn by_name(name: &str) -> Option<&'static SocketOption> {
    OPTIONS.iter().find(|option| option.name == name)
}

/// TCP_CONGESTION, whose values depend on the congestion controls that the kernel has loaded.
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

/// Returns the option with this level and number.
#[must_use]
pub fn by_key(key: OptionKey) -> Option<&'static SocketOption> {
    OPTIONS.iter().find(|option| option.key() == key)
}

/// Returns the name of an option, or `LEVEL:NUMBER` such as `6:99` if it has none.
#[must_use]
pub fn display_name(key: OptionKey) -> String {
    by_key(key).map_or_else(|| format!("{}:{}", key.level, key.name), |option| option.name.to_owned())
}

/// The bits of the traffic class byte that belong to the code point.
pub const DSCP_MASK: u32 = 0xfc;

/// The largest SO_MAX_PACING_RATE, which means no limit. Programs can pass only 32 bits.
pub const UNLIMITED: u32 = u32::MAX;

/// Returns a value from getsockopt as the value that setsockopt takes for it: the kernel shows twice the size of a buffer
/// (socket(7)).
#[must_use]
pub fn as_passed(key: OptionKey, shown: &Value) -> Value {
    let is_doubled = by_key(key).is_some_and(SocketOption::is_doubled);
    if is_doubled && shown.len == 4 { Value::int(word_in(&shown.words) / 2) } else { *shown }
}

/// Returns whether the kernel took less than the wanted size of a buffer (net.core.wmem_max and rmem_max, socket(7)). `shown`
/// is the value that getsockopt returns.
#[must_use]
pub fn is_capped(key: OptionKey, wanted: &Value, shown: &Value) -> bool {
    let size = |value: &Value| (value.len == 4).then(|| word_in(&value.words));
    let taken = as_passed(key, shown);
    by_key(key).is_some_and(SocketOption::is_doubled)
        && size(&taken).zip(size(wanted)).is_some_and(|(taken, wanted)| taken < wanted)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use abi::{
        apply_point::{POST_CREATE, SOCK_CREATE},
        setting::{Lookup, OptionFilter},
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
    fn option_filter_finds_every_option_without_fallback() {
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
        let at_sock_create =
            |option: &&SocketOption| option.settable().is_some_and(|settable| settable.sites.contains(SOCK_CREATE));
        assert!(OPTIONS.iter().filter(at_sock_create).count() <= abi::SOCK_CREATE_MAX);
        // An option that another option resets is set again at this apply point.
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
    fn members_belong_to_structures_at_the_address_of_the_socket() {
        for option in OPTIONS {
            let Kept::Member { of, name } = option.kept else { continue };
            assert!(["sock", "inet_sock", "tcp_sock"].contains(&of), "{}: {of}", option.name);
            assert_eq!(name.starts_with("sk_"), of == "sock", "{}: {of}.{name}", option.name);
            assert!(of != "tcp_sock" || option.level == Level::TCP, "{}: {of}.{name}", option.name);
        }
    }

    #[test]
    fn doubled_and_read_only_values_are_not_kept_as_given() {
        for option in OPTIONS {
            if option.is_doubled() || option.class == Class::ReadOnly {
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
