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

use abi::{
    setting::{OptionKey, kind, read_back, traits},
    site,
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

    /// The name of the level as in the socket API, if it has one here.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::IP => Some("SOL_IP"),
            Self::SOCKET => Some("SOL_SOCKET"),
            Self::TCP => Some("SOL_TCP"),
            Self::UDP => Some("SOL_UDP"),
            Self::IPV6 => Some("SOL_IPV6"),
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
    /// A structure, or something else that is not compared.
    Opaque,
}

impl ValueKind {
    /// How programs read the value: one of [`abi::setting::kind`].
    #[must_use]
    pub fn abi_kind(self) -> u8 {
        match self {
            Self::Bool => kind::BOOL,
            Self::Int | Self::Seconds | Self::Milliseconds | Self::Microseconds | Self::Bytes | Self::Dscp => kind::INT,
            Self::Unsigned | Self::Rate | Self::Mark => kind::UNSIGNED,
            Self::CongestionControl | Self::Device => kind::TEXT,
            Self::Opaque => kind::OPAQUE,
        }
    }

    /// Whether a policy can bound the value with `limit`.
    #[must_use]
    pub fn can_be_limited(self) -> bool {
        match self {
            Self::Int
            | Self::Unsigned
            | Self::Seconds
            | Self::Milliseconds
            | Self::Microseconds
            | Self::Bytes
            | Self::Rate => true,
            Self::Bool | Self::Dscp | Self::Mark | Self::CongestionControl | Self::Device | Self::Opaque => false,
        }
    }

    /// What the value is, for people.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::Bool => "true or false",
            Self::Int | Self::Unsigned => "a number",
            Self::Seconds => "a time in whole seconds, such as \"60s\" or \"2min\"",
            Self::Milliseconds => "a time in whole milliseconds, such as \"30s\" or \"1500ms\"",
            Self::Microseconds => "a time in whole microseconds, such as \"40ms\" or \"8000us\"",
            Self::Bytes => "a size, such as \"128KiB\" or 4096",
            Self::Rate => "a rate, such as \"200mbit\", or \"unlimited\"",
            Self::Dscp => "a DSCP name such as \"AF21\", or a number whose two lowest bits are 0",
            Self::Mark => "a number, or \"value/mask\" such as \"0x20/0xff\"",
            Self::CongestionControl => "the name of a congestion control, such as \"bbr\"",
            Self::Device => "the name of a network interface, such as \"eth0\"",
            Self::Opaque => "a structure, which policies do not look into",
        }
    }
}

/// A set of places where an option is applied: bit n is number n of [`abi::site`].
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

use site::{ACTIVE, BIND_DATAGRAM, BIND_STREAM, BIRTH, CONNECT_DATAGRAM, CONNECT_STREAM, LISTEN, PASSIVE, SYN};

/// TCP: before the SYN, on the listener for what its children inherit and the SYN-ACK carries, and
/// on the accepted socket for rules about its peer and for listeners older than the policy.
const STREAM: Sites = Sites::of(&[SYN, LISTEN, PASSIVE]);
/// Any socket. A datagram socket is reached when it binds or connects.
const ANY: Sites = Sites::of(&[BIND_DATAGRAM, CONNECT_DATAGRAM, SYN, LISTEN, PASSIVE]);
/// Bears on the choice of a route, and so must hold before connect looks it up. (SYN is for
/// connections made by sendto with MSG_FASTOPEN, which pass no connect hook.)
const ROUTE: Sites = Sites::of(&[BIND_DATAGRAM, CONNECT_STREAM, CONNECT_DATAGRAM, SYN, LISTEN, PASSIVE]);
/// The same for what can be given to a socket at birth already.
const ROUTE_FROM_BIRTH: Sites =
    Sites::of(&[BIRTH, BIND_DATAGRAM, CONNECT_STREAM, CONNECT_DATAGRAM, SYN, LISTEN, PASSIVE]);
/// Devices: accepted sockets have their listener's, and may not change it without CAP_NET_RAW
/// (`sock_bindtoindex_locked`, which asks the current task even from a program).
const DEVICE: Sites = Sites::of(&[BIND_STREAM, BIND_DATAGRAM, CONNECT_STREAM, CONNECT_DATAGRAM, LISTEN]);
const DEVICE_FROM_BIRTH: Sites =
    Sites::of(&[BIRTH, BIND_STREAM, BIND_DATAGRAM, CONNECT_STREAM, CONNECT_DATAGRAM, LISTEN]);
/// Only matters to bind.
const BIND: Sites = Sites::of(&[BIND_STREAM, BIND_DATAGRAM, CONNECT_DATAGRAM, SYN]);
/// Overwritten by `tcp_init_transfer` when set any earlier.
const ESTABLISHED: Sites = Sites::of(&[ACTIVE, PASSIVE]);
/// Only matters to listeners.
const LISTENER: Sites = Sites::of(&[LISTEN]);

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

/// What a policy can do with an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// `set`, `limit`, `deny`.
    Settable(Settable),
    /// `limit` and `deny`: the kernel does not let programs set it, but the application's own calls
    /// can be seen to.
    Guardable,
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
    /// Bits of [`abi::setting::traits`].
    pub traits: u8,
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

    #[must_use]
    pub fn settable(&self) -> Option<&Settable> {
        match &self.class {
            Class::Settable(settable) => Some(settable),
            Class::Guardable => None,
        }
    }

    const fn since(mut self, kernel: &'static str) -> Self {
        if let Class::Settable(ref mut settable) = self.class {
            settable.since = kernel;
        }
        self
    }

    const fn at(mut self, sites: Sites) -> Self {
        if let Class::Settable(ref mut settable) = self.class {
            settable.sites = sites;
        }
        self
    }

    const fn reads(mut self, read_back: u8) -> Self {
        if let Class::Settable(ref mut settable) = self.class {
            settable.read_back = read_back;
        }
        self
    }

    const fn range(mut self, min: i64, max: i64) -> Self {
        self.range = (min, max);
        self
    }

    const fn traits(mut self, traits: u8) -> Self {
        self.traits |= traits;
        self
    }
}

use Level as L;
use ValueKind::{
    Bool, Bytes, CongestionControl, Device, Dscp, Int, Mark, Microseconds, Milliseconds, Opaque, Rate, Seconds,
    Unsigned,
};

/// The range of a value that nothing more is known about.
const fn full_range(value: ValueKind) -> (i64, i64) {
    match value {
        Bool => (0, 1),
        Unsigned | Mark => (0, u32::MAX as i64),
        Dscp => (0, 0xff),
        // The last value means "unlimited".
        Rate => (1, u32::MAX as i64),
        Int => (i32::MIN as i64, i32::MAX as i64),
        _ => (0, i32::MAX as i64),
    }
}

/// An option that programs can set, from 5.10 on, and read back as it was set.
const fn settable(
    level: Level,
    name: &'static str,
    number: i32,
    value: ValueKind,
    example: &'static str,
    about: &'static str,
) -> SocketOption {
    let sites = if level.0 == Level::TCP.0 { STREAM } else { ANY };
    SocketOption {
        name,
        level,
        number,
        value,
        range: full_range(value),
        class: Class::Settable(Settable { sites, read_back: read_back::SAME, since: "5.10" }),
        traits: if level.0 == Level::TCP.0 { traits::TCP } else { 0 },
        example,
        about,
    }
}

/// An option that the kernel keeps to the application.
const fn guardable(
    level: Level,
    name: &'static str,
    number: i32,
    value: ValueKind,
    about: &'static str,
) -> SocketOption {
    SocketOption {
        name,
        level,
        number,
        value,
        range: full_range(value),
        class: Class::Guardable,
        traits: if level.0 == Level::IP.0 { traits::BYTE } else { 0 },
        example: "",
        about,
    }
}

/// Every option that has a name here. Those that can be set come first, in the order in which they
/// are applied: IP_TOS and IPV6_TCLASS before SO_PRIORITY, which IP_TOS resets
/// (`__ip_sock_set_tos`).
pub const OPTIONS: &[SocketOption] = &[
    settable(L::IP, "IP_TOS", 1, Dscp, "\"CS0\"", "type of service: DSCP of sent packets")
        .at(ROUTE)
        .traits(traits::INET | traits::BYTE),
    settable(L::IPV6, "IPV6_TCLASS", 67, Dscp, "\"CS0\"", "traffic class: DSCP of sent IPv6 packets")
        .at(ROUTE)
        .traits(traits::INET6),
    settable(L::IPV6, "IPV6_AUTOFLOWLABEL", 70, Bool, "true", "flow label from a hash of the connection")
        .since("6.1")
        .traits(traits::INET6),
    settable(L::SOCKET, "SO_MARK", 36, Mark, "0x1", "firewall mark, for policy routing and filters")
        .at(ROUTE_FROM_BIRTH),
    settable(L::SOCKET, "SO_PRIORITY", 12, Int, "1", "queueing priority of sent packets")
        .at(ROUTE_FROM_BIRTH)
        .range(0, i32::MAX as i64),
    settable(L::SOCKET, "SO_BINDTODEVICE", 25, Device, "\"lo\"", "interface to send and receive through, by name")
        .at(DEVICE)
        .reads(read_back::NONE)
        .traits(traits::ONCE),
    settable(L::SOCKET, "SO_BINDTOIFINDEX", 62, Int, "1", "interface to send and receive through, by index")
        .at(DEVICE_FROM_BIRTH)
        .since("5.15")
        .range(0, i32::MAX as i64),
    settable(L::SOCKET, "SO_REUSEADDR", 2, Bool, "true", "bind although old connections linger").at(BIND).since("6.1"),
    settable(L::SOCKET, "SO_REUSEPORT", 15, Bool, "true", "let several sockets bind one port").at(BIND).since("5.15"),
    settable(L::SOCKET, "SO_SNDBUF", 7, Bytes, "\"64KiB\"", "send buffer; turns off its tuning")
        .reads(read_back::DOUBLED)
        .range(0, (i32::MAX / 2) as i64),
    settable(L::SOCKET, "SO_RCVBUF", 8, Bytes, "\"64KiB\"", "receive buffer; turns off its tuning")
        .reads(read_back::DOUBLED)
        .range(0, (i32::MAX / 2) as i64),
    settable(L::SOCKET, "SO_KEEPALIVE", 9, Bool, "true", "probe idle connections"),
    settable(L::SOCKET, "SO_RCVLOWAT", 18, Bytes, "1", "bytes that make a socket readable").range(1, i32::MAX as i64),
    settable(L::SOCKET, "SO_MAX_PACING_RATE", 47, Rate, "\"unlimited\"", "rate at which to send at the most")
        .traits(traits::WIDE),
    settable(L::SOCKET, "SO_TXREHASH", 74, Int, "1", "choose another path after a timeout (-1: as the sysctl says)")
        .since("6.1")
        .range(-1, 1)
        .at(STREAM)
        .traits(traits::TCP),
    settable(L::SOCKET, "SK_BPF_CB_FLAGS", 1009, Unsigned, "0", "events for timestamping BPF programs (1: transmit)")
        .since("6.15")
        .range(0, 1),
    settable(L::TCP, "TCP_CONGESTION", 13, CongestionControl, "\"reno\"", "congestion control"),
    settable(L::TCP, "TCP_NODELAY", 1, Bool, "true", "send at once, without gathering (no Nagle)").since("6.1"),
    settable(L::TCP, "TCP_MAXSEG", 2, Bytes, "536", "maximum segment size")
        .since("6.1")
        .reads(read_back::NONE)
        .range(88, 32767),
    settable(L::TCP, "TCP_KEEPIDLE", 4, Seconds, "\"60s\"", "idle time before the first keepalive probe")
        .range(1, 32767),
    settable(L::TCP, "TCP_KEEPINTVL", 5, Seconds, "\"10s\"", "time between keepalive probes").range(1, 32767),
    settable(L::TCP, "TCP_KEEPCNT", 6, Int, "5", "unanswered keepalive probes that end a connection").range(1, 127),
    settable(L::TCP, "TCP_SYNCNT", 7, Int, "3", "how often a SYN is sent again").range(1, 127),
    settable(L::TCP, "TCP_WINDOW_CLAMP", 10, Bytes, "\"64KiB\"", "largest receive window to offer")
        .since("5.15")
        .range(1, i32::MAX as i64),
    settable(L::TCP, "TCP_THIN_LINEAR_TIMEOUTS", 16, Bool, "true", "no exponential back-off on thin streams")
        .since("6.1"),
    settable(L::TCP, "TCP_USER_TIMEOUT", 18, Milliseconds, "\"30s\"", "how long sent data may go unacknowledged"),
    settable(L::TCP, "TCP_NOTSENT_LOWAT", 25, Bytes, "\"128KiB\"", "unsent data that makes a socket unwritable")
        .range(0, u32::MAX as i64),
    settable(L::TCP, "TCP_SAVE_SYN", 27, Int, "1", "keep the SYN for the application (2: with the MAC header)")
        .at(LISTENER)
        .range(0, 2),
    settable(L::TCP, "TCP_RTO_MAX_MS", 44, Milliseconds, "\"60s\"", "longest retransmission timeout")
        .since("6.15")
        .range(1000, 120_000),
    settable(L::TCP, "TCP_BPF_IW", 1001, Int, "10", "initial congestion window, in packets")
        .at(ESTABLISHED)
        .reads(read_back::NONE)
        .range(1, i32::MAX as i64),
    settable(L::TCP, "TCP_BPF_SNDCWND_CLAMP", 1002, Int, "10000", "largest congestion window, in packets")
        .at(ESTABLISHED)
        .reads(read_back::NONE)
        .range(1, i32::MAX as i64),
    settable(L::TCP, "TCP_BPF_DELACK_MAX", 1003, Microseconds, "\"40ms\"", "longest delay of an acknowledgement")
        .range(1, 200_000),
    settable(L::TCP, "TCP_BPF_RTO_MIN", 1004, Microseconds, "\"100ms\"", "shortest retransmission timeout")
        .range(1, 200_000),
    settable(L::TCP, "TCP_BPF_SOCK_OPS_CB_FLAGS", 1008, Unsigned, "0", "events for sock_ops BPF programs")
        .since("6.12")
        .range(0, 0x7f),
    // What follows can only be guarded.
    guardable(L::SOCKET, "SO_DEBUG", 1, Bool, "debugging of protocols"),
    guardable(L::SOCKET, "SO_DONTROUTE", 5, Bool, "send to direct neighbours only"),
    guardable(L::SOCKET, "SO_BROADCAST", 6, Bool, "send to broadcast addresses"),
    guardable(L::SOCKET, "SO_OOBINLINE", 10, Bool, "leave urgent data in the stream"),
    guardable(L::SOCKET, "SO_NO_CHECK", 11, Bool, "no UDP checksum"),
    guardable(L::SOCKET, "SO_LINGER", 13, Opaque, "what close does with unsent data"),
    guardable(L::SOCKET, "SO_PASSCRED", 16, Bool, "receive the sender's credentials"),
    guardable(L::SOCKET, "SO_RCVTIMEO", 20, Opaque, "receive timeout"),
    guardable(L::SOCKET, "SO_SNDTIMEO", 21, Opaque, "send timeout"),
    guardable(L::SOCKET, "SO_ATTACH_FILTER", 26, Opaque, "filter of received packets"),
    guardable(L::SOCKET, "SO_DETACH_FILTER", 27, Opaque, "end of a filter"),
    guardable(L::SOCKET, "SO_TIMESTAMP", 29, Bool, "timestamps in microseconds"),
    guardable(L::SOCKET, "SO_SNDBUFFORCE", 32, Bytes, "send buffer beyond the system's limit"),
    guardable(L::SOCKET, "SO_RCVBUFFORCE", 33, Bytes, "receive buffer beyond the system's limit"),
    guardable(L::SOCKET, "SO_PASSSEC", 34, Bool, "receive the sender's security label"),
    guardable(L::SOCKET, "SO_TIMESTAMPNS", 35, Bool, "timestamps in nanoseconds"),
    guardable(L::SOCKET, "SO_TIMESTAMPING", 37, Opaque, "timestamps of hardware and software"),
    guardable(L::SOCKET, "SO_RXQ_OVFL", 40, Bool, "count of dropped packets"),
    guardable(L::SOCKET, "SO_WIFI_STATUS", 41, Bool, "status of packets sent by wifi"),
    guardable(L::SOCKET, "SO_PEEK_OFF", 42, Int, "where peeking begins"),
    guardable(L::SOCKET, "SO_NOFCS", 43, Bool, "no frame checksum"),
    guardable(L::SOCKET, "SO_LOCK_FILTER", 44, Bool, "keep the filter as it is"),
    guardable(L::SOCKET, "SO_SELECT_ERR_QUEUE", 45, Bool, "wake on errors"),
    guardable(L::SOCKET, "SO_BUSY_POLL", 46, Microseconds, "time to poll the device"),
    guardable(L::SOCKET, "SO_INCOMING_CPU", 49, Int, "CPU that handles the socket"),
    guardable(L::SOCKET, "SO_ATTACH_BPF", 50, Opaque, "BPF filter of received packets"),
    guardable(L::SOCKET, "SO_ATTACH_REUSEPORT_CBPF", 51, Opaque, "classic BPF that chooses among sockets of a port"),
    guardable(L::SOCKET, "SO_ATTACH_REUSEPORT_EBPF", 52, Opaque, "BPF that chooses among sockets of a port"),
    guardable(L::SOCKET, "SO_CNX_ADVICE", 53, Int, "ask for another path"),
    guardable(L::SOCKET, "SO_ZEROCOPY", 60, Bool, "send without copying"),
    guardable(L::SOCKET, "SO_TXTIME", 61, Opaque, "time at which to send"),
    guardable(L::SOCKET, "SO_TIMESTAMP_NEW", 63, Bool, "timestamps in microseconds, 64-bit"),
    guardable(L::SOCKET, "SO_TIMESTAMPNS_NEW", 64, Bool, "timestamps in nanoseconds, 64-bit"),
    guardable(L::SOCKET, "SO_TIMESTAMPING_NEW", 65, Opaque, "timestamps of hardware and software, 64-bit"),
    guardable(L::SOCKET, "SO_RCVTIMEO_NEW", 66, Opaque, "receive timeout, 64-bit"),
    guardable(L::SOCKET, "SO_SNDTIMEO_NEW", 67, Opaque, "send timeout, 64-bit"),
    guardable(L::SOCKET, "SO_DETACH_REUSEPORT_BPF", 68, Opaque, "end of the choice among sockets of a port"),
    guardable(L::SOCKET, "SO_PREFER_BUSY_POLL", 69, Bool, "poll rather than interrupt"),
    guardable(L::SOCKET, "SO_BUSY_POLL_BUDGET", 70, Int, "packets to poll at once"),
    guardable(L::SOCKET, "SO_BUF_LOCK", 72, Int, "which buffers are not tuned"),
    guardable(L::SOCKET, "SO_RESERVE_MEM", 73, Bytes, "memory set aside for the socket"),
    guardable(L::SOCKET, "SO_PASSPIDFD", 76, Bool, "receive a descriptor of the sender"),
    guardable(L::SOCKET, "SO_DEVMEM_DONTNEED", 80, Opaque, "device memory given back"),
    guardable(L::SOCKET, "SO_RCVPRIORITY", 82, Bool, "receive the priority of packets"),
    guardable(L::SOCKET, "SO_PASSRIGHTS", 83, Bool, "receive descriptors"),
    guardable(L::TCP, "TCP_CORK", 3, Bool, "hold back partial segments"),
    guardable(L::TCP, "TCP_LINGER2", 8, Seconds, "life of orphaned FIN-WAIT-2 sockets")
        .range(i32::MIN as i64, i32::MAX as i64),
    guardable(L::TCP, "TCP_DEFER_ACCEPT", 9, Seconds, "accept only when data has come"),
    guardable(L::TCP, "TCP_QUICKACK", 12, Int, "acknowledge at once"),
    guardable(L::TCP, "TCP_MD5SIG", 14, Opaque, "MD5 signatures (BGP)"),
    guardable(L::TCP, "TCP_THIN_DUPACK", 17, Bool, "retransmit on the first duplicate (without effect since 4.11)"),
    guardable(L::TCP, "TCP_REPAIR", 19, Int, "checkpoint and restore of connections"),
    guardable(L::TCP, "TCP_REPAIR_QUEUE", 20, Int, "queue under repair"),
    guardable(L::TCP, "TCP_QUEUE_SEQ", 21, Unsigned, "sequence number of the queue under repair"),
    guardable(L::TCP, "TCP_REPAIR_OPTIONS", 22, Opaque, "negotiated options under repair"),
    guardable(L::TCP, "TCP_FASTOPEN", 23, Int, "queue of fast-open connections"),
    guardable(L::TCP, "TCP_TIMESTAMP", 24, Unsigned, "timestamp under repair"),
    guardable(L::TCP, "TCP_REPAIR_WINDOW", 29, Opaque, "window under repair"),
    guardable(L::TCP, "TCP_FASTOPEN_CONNECT", 30, Bool, "fast open by connect"),
    guardable(L::TCP, "TCP_ULP", 31, Opaque, "protocol above TCP, such as tls"),
    guardable(L::TCP, "TCP_MD5SIG_EXT", 32, Opaque, "MD5 signatures by prefix"),
    guardable(L::TCP, "TCP_FASTOPEN_KEY", 33, Opaque, "key of fast-open cookies"),
    guardable(L::TCP, "TCP_FASTOPEN_NO_COOKIE", 34, Bool, "fast open without a cookie"),
    guardable(L::TCP, "TCP_INQ", 36, Bool, "receive the length of the queue"),
    guardable(L::TCP, "TCP_TX_DELAY", 37, Microseconds, "delay of sent packets"),
    guardable(L::TCP, "TCP_AO_ADD_KEY", 38, Opaque, "key of the authentication option"),
    guardable(L::TCP, "TCP_AO_DEL_KEY", 39, Opaque, "end of a key of the authentication option"),
    guardable(L::TCP, "TCP_AO_INFO", 40, Opaque, "state of the authentication option"),
    guardable(L::TCP, "TCP_AO_REPAIR", 42, Opaque, "authentication option under repair"),
    guardable(L::TCP, "TCP_RTO_MIN_US", 45, Microseconds, "shortest retransmission timeout"),
    guardable(L::TCP, "TCP_DELACK_MAX_US", 46, Microseconds, "longest delay of an acknowledgement"),
    guardable(L::UDP, "UDP_CORK", 1, Bool, "gather sends into one datagram"),
    guardable(L::UDP, "UDP_ENCAP", 100, Int, "encapsulation, such as IPsec's"),
    guardable(L::UDP, "UDP_NO_CHECK6_TX", 101, Bool, "send IPv6 without checksum"),
    guardable(L::UDP, "UDP_NO_CHECK6_RX", 102, Bool, "receive IPv6 without checksum"),
    guardable(L::UDP, "UDP_SEGMENT", 103, Bytes, "segment size of large sends"),
    guardable(L::UDP, "UDP_GRO", 104, Bool, "receive several datagrams as one"),
    guardable(L::IP, "IP_TTL", 2, Int, "time to live of sent packets").range(-1, 255),
    guardable(L::IP, "IP_HDRINCL", 3, Bool, "the application writes the IP header"),
    guardable(L::IP, "IP_OPTIONS", 4, Opaque, "options of the IP header"),
    guardable(L::IP, "IP_ROUTER_ALERT", 5, Bool, "receive packets that ask for a router"),
    guardable(L::IP, "IP_RECVOPTS", 6, Bool, "receive options of the IP header"),
    guardable(L::IP, "IP_RETOPTS", 7, Bool, "receive options as for an answer"),
    guardable(L::IP, "IP_PKTINFO", 8, Bool, "receive the addressed interface"),
    guardable(L::IP, "IP_MTU_DISCOVER", 10, Int, "path MTU discovery").range(0, 5),
    guardable(L::IP, "IP_RECVERR", 11, Bool, "receive ICMP errors"),
    guardable(L::IP, "IP_RECVTTL", 12, Bool, "receive the time to live"),
    guardable(L::IP, "IP_RECVTOS", 13, Bool, "receive the type of service"),
    guardable(L::IP, "IP_FREEBIND", 15, Bool, "bind addresses that are not there"),
    guardable(L::IP, "IP_IPSEC_POLICY", 16, Opaque, "IPsec policy of the socket"),
    guardable(L::IP, "IP_XFRM_POLICY", 17, Opaque, "transformation policy of the socket"),
    guardable(L::IP, "IP_PASSSEC", 18, Bool, "receive the peer's security label"),
    guardable(L::IP, "IP_TRANSPARENT", 19, Bool, "use foreign addresses"),
    guardable(L::IP, "IP_ORIGDSTADDR", 20, Bool, "receive the original destination"),
    guardable(L::IP, "IP_MINTTL", 21, Int, "drop packets from further away").range(0, 255),
    guardable(L::IP, "IP_NODEFRAG", 22, Bool, "leave fragments alone"),
    guardable(L::IP, "IP_CHECKSUM", 23, Bool, "receive checksums"),
    guardable(L::IP, "IP_BIND_ADDRESS_NO_PORT", 24, Bool, "choose the port at connect"),
    guardable(L::IP, "IP_RECVFRAGSIZE", 25, Bool, "receive the size of fragments"),
    guardable(L::IP, "IP_RECVERR_RFC4884", 26, Bool, "receive extended ICMP errors"),
    guardable(L::IP, "IP_MULTICAST_IF", 32, Opaque, "interface of multicasts"),
    guardable(L::IP, "IP_MULTICAST_TTL", 33, Int, "time to live of multicasts").range(-1, 255),
    guardable(L::IP, "IP_MULTICAST_LOOP", 34, Bool, "hear one's own multicasts"),
    guardable(L::IP, "IP_ADD_MEMBERSHIP", 35, Opaque, "join a group"),
    guardable(L::IP, "IP_DROP_MEMBERSHIP", 36, Opaque, "leave a group"),
    guardable(L::IP, "IP_UNBLOCK_SOURCE", 37, Opaque, "hear a source of a group again"),
    guardable(L::IP, "IP_BLOCK_SOURCE", 38, Opaque, "no longer hear a source of a group"),
    guardable(L::IP, "IP_ADD_SOURCE_MEMBERSHIP", 39, Opaque, "join a group for one source"),
    guardable(L::IP, "IP_DROP_SOURCE_MEMBERSHIP", 40, Opaque, "leave a group for one source"),
    guardable(L::IP, "IP_MSFILTER", 41, Opaque, "sources of a group"),
    guardable(L::IP, "IP_MULTICAST_ALL", 49, Bool, "hear every group of the host"),
    guardable(L::IP, "IP_UNICAST_IF", 50, Opaque, "interface of unicasts"),
    guardable(L::IP, "IP_LOCAL_PORT_RANGE", 51, Opaque, "range of ports to choose from"),
    guardable(L::IPV6, "IPV6_ADDRFORM", 1, Int, "turn an IPv6 socket into an IPv4 one"),
    guardable(L::IPV6, "IPV6_CHECKSUM", 7, Int, "place of the checksum in raw packets"),
    guardable(L::IPV6, "IPV6_UNICAST_HOPS", 16, Int, "hop limit of unicasts").range(-1, 255),
    guardable(L::IPV6, "IPV6_MULTICAST_IF", 17, Int, "interface of multicasts"),
    guardable(L::IPV6, "IPV6_MULTICAST_HOPS", 18, Int, "hop limit of multicasts").range(-1, 255),
    guardable(L::IPV6, "IPV6_MULTICAST_LOOP", 19, Bool, "hear one's own multicasts"),
    guardable(L::IPV6, "IPV6_ADD_MEMBERSHIP", 20, Opaque, "join a group"),
    guardable(L::IPV6, "IPV6_DROP_MEMBERSHIP", 21, Opaque, "leave a group"),
    guardable(L::IPV6, "IPV6_ROUTER_ALERT", 22, Int, "receive packets that ask for a router"),
    guardable(L::IPV6, "IPV6_MTU_DISCOVER", 23, Int, "path MTU discovery").range(0, 5),
    guardable(L::IPV6, "IPV6_MTU", 24, Bytes, "MTU of the path"),
    guardable(L::IPV6, "IPV6_RECVERR", 25, Bool, "receive ICMP errors"),
    guardable(L::IPV6, "IPV6_V6ONLY", 26, Bool, "no IPv4 on this socket"),
    guardable(L::IPV6, "IPV6_JOIN_ANYCAST", 27, Opaque, "take an anycast address"),
    guardable(L::IPV6, "IPV6_LEAVE_ANYCAST", 28, Opaque, "give an anycast address back"),
    guardable(L::IPV6, "IPV6_MULTICAST_ALL", 29, Bool, "hear every group of the host"),
    guardable(L::IPV6, "IPV6_FLOWLABEL_MGR", 32, Opaque, "flow labels"),
    guardable(L::IPV6, "IPV6_FLOWINFO_SEND", 33, Bool, "send the flow label given with the address"),
    guardable(L::IPV6, "IPV6_IPSEC_POLICY", 34, Opaque, "IPsec policy of the socket"),
    guardable(L::IPV6, "IPV6_XFRM_POLICY", 35, Opaque, "transformation policy of the socket"),
    guardable(L::IPV6, "IPV6_HDRINCL", 36, Bool, "the application writes the IP header"),
    guardable(L::IPV6, "IPV6_RECVPKTINFO", 49, Bool, "receive the addressed interface"),
    guardable(L::IPV6, "IPV6_PKTINFO", 50, Opaque, "source address and interface"),
    guardable(L::IPV6, "IPV6_RECVHOPLIMIT", 51, Bool, "receive the hop limit"),
    guardable(L::IPV6, "IPV6_HOPOPTS", 54, Opaque, "hop-by-hop options"),
    guardable(L::IPV6, "IPV6_RTHDR", 57, Opaque, "routing header"),
    guardable(L::IPV6, "IPV6_DSTOPTS", 59, Opaque, "destination options"),
    guardable(L::IPV6, "IPV6_RECVPATHMTU", 60, Bool, "receive changes of the path MTU"),
    guardable(L::IPV6, "IPV6_DONTFRAG", 62, Bool, "never fragment"),
    guardable(L::IPV6, "IPV6_RECVTCLASS", 66, Bool, "receive the traffic class"),
    guardable(L::IPV6, "IPV6_ADDR_PREFERENCES", 72, Int, "preferred source addresses"),
    guardable(L::IPV6, "IPV6_MINHOPCOUNT", 73, Int, "drop packets from further away").range(0, 255),
    guardable(L::IPV6, "IPV6_TRANSPARENT", 75, Bool, "use foreign addresses"),
    guardable(L::IPV6, "IPV6_UNICAST_IF", 76, Opaque, "interface of unicasts"),
    guardable(L::IPV6, "IPV6_FREEBIND", 78, Bool, "bind addresses that are not there"),
];

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

/// The differentiated services code points that have names (RFC 2474, 2597, 3246, 5865, 8622), at
/// their place in the byte.
pub const DSCP_NAMES: &[(&str, u8)] = &[
    ("CS0", 0x00),
    ("LE", 0x04),
    ("CS1", 0x20),
    ("AF11", 0x28),
    ("AF12", 0x30),
    ("AF13", 0x38),
    ("CS2", 0x40),
    ("AF21", 0x48),
    ("AF22", 0x50),
    ("AF23", 0x58),
    ("CS3", 0x60),
    ("AF31", 0x68),
    ("AF32", 0x70),
    ("AF33", 0x78),
    ("CS4", 0x80),
    ("AF41", 0x88),
    ("AF42", 0x90),
    ("AF43", 0x98),
    ("CS5", 0xa0),
    ("VA", 0xb0),
    ("EF", 0xb8),
    ("CS6", 0xc0),
    ("CS7", 0xe0),
];

/// The bits of the traffic class byte that are a code point's.
pub const DSCP_MASK: u32 = 0xfc;

/// The largest SO_MAX_PACING_RATE: no limit. Programs can pass 32 bits only.
pub const UNLIMITED: u32 = u32::MAX;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_and_keys_are_unique() {
        let names: BTreeSet<_> = OPTIONS.iter().map(|option| option.name).collect();
        let keys: BTreeSet<_> = OPTIONS.iter().map(SocketOption::key).collect();
        assert_eq!(names.len(), OPTIONS.len());
        assert_eq!(keys.len(), OPTIONS.len());
    }

    #[test]
    fn settable_options_come_first_and_fit_the_programs() {
        let settable = OPTIONS.iter().take_while(|option| option.settable().is_some()).count();
        assert!(OPTIONS[settable..].iter().all(|option| option.settable().is_none()));
        assert!(settable <= abi::SETTABLE_MAX);
        let at_birth =
            |option: &&SocketOption| option.settable().is_some_and(|settable| settable.sites.contains(BIRTH));
        assert!(OPTIONS.iter().filter(at_birth).count() <= abi::BIRTH_MAX);
    }

    #[test]
    fn type_of_service_is_applied_before_the_priority_that_it_resets() {
        let place = |name| OPTIONS.iter().position(|option| option.name == name);
        assert!(place("IP_TOS") < place("SO_PRIORITY"));
        assert!(place("IPV6_TCLASS") < place("SO_PRIORITY"));
    }

    #[test]
    fn numbers_are_those_of_the_c_library() {
        for (name, number) in [
            ("SO_MARK", libc::SO_MARK),
            ("SO_BINDTODEVICE", libc::SO_BINDTODEVICE),
            ("SO_LINGER", libc::SO_LINGER),
            ("SO_INCOMING_CPU", libc::SO_INCOMING_CPU),
            ("TCP_NODELAY", libc::TCP_NODELAY),
            ("TCP_KEEPIDLE", libc::TCP_KEEPIDLE),
            ("TCP_USER_TIMEOUT", libc::TCP_USER_TIMEOUT),
            ("TCP_NOTSENT_LOWAT", libc::TCP_NOTSENT_LOWAT),
            ("TCP_QUICKACK", libc::TCP_QUICKACK),
            ("TCP_REPAIR", libc::TCP_REPAIR),
            ("TCP_FASTOPEN_CONNECT", libc::TCP_FASTOPEN_CONNECT),
            ("IP_TOS", libc::IP_TOS),
            ("IP_TTL", libc::IP_TTL),
            ("IP_MTU_DISCOVER", libc::IP_MTU_DISCOVER),
            ("IP_BIND_ADDRESS_NO_PORT", libc::IP_BIND_ADDRESS_NO_PORT),
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
