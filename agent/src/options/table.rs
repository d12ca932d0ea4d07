//! The rows of the table, and the builders that write them.

use abi::{
    apply_point::{
        ACTIVE, BIND_DATAGRAM, BIND_STREAM, CONNECT_DATAGRAM, CONNECT_STREAM, LISTEN, PASSIVE, POST_CREATE, SEND,
        SOCK_CREATE, SYN,
    },
    setting::{
        argument,
        effective::{SAME, UNCERTAIN},
        read_back, traits,
    },
};

use super::{
    Class, Kept,
    Kept::{AsGiven, Otherwise},
    Level as L, Reading, Relation, Settable, Shape, Sites, SocketOption, ValueKind,
    ValueKind::{
        Bool, Bytes, Choice, CongestionControl, Device, Dscp, Int, Interface, Linger, Mark, Microseconds, Milliseconds,
        Opaque, Rate, Seconds, Timeval, Unsigned,
    },
    names::{DOMAINS, IPV6_MTU_DISCOVERY, MTU_DISCOVERY, PROTOCOLS, TYPES},
};

/// A structure whose layout is not known here.
const BYTES: ValueKind = Opaque(Shape::Bytes);

/// TCP: before the SYN; on the listener, for the values that accepted sockets inherit and that the SYN-ACK carries; and
/// on the accepted socket, for rules about the peer and for listeners older than the policy.
const STREAM: Sites = Sites::new(&[SYN, LISTEN, PASSIVE]);
/// Any socket. A datagram socket is set at creation if the BPF LSM is active, and when it binds or connects. If the
/// application does neither, it is set with the first datagram.
const ANY: Sites = Sites::new(&[POST_CREATE, BIND_DATAGRAM, CONNECT_DATAGRAM, SEND, SYN, LISTEN, PASSIVE]);
/// Affects the choice of a route, so it must be set before connect looks up the route. Set again with the SYN, for
/// rules about the local address, which the route may choose.
const ROUTE: Sites =
    Sites::new(&[POST_CREATE, BIND_DATAGRAM, CONNECT_STREAM, CONNECT_DATAGRAM, SEND, SYN, LISTEN, PASSIVE]);
/// As [`ROUTE`], for options that can be set at socket creation. Not set with the first datagram, which would cost time
/// for every datagram socket.
const ROUTE_FROM_CREATION: Sites =
    Sites::new(&[SOCK_CREATE, BIND_DATAGRAM, CONNECT_STREAM, CONNECT_DATAGRAM, SYN, LISTEN, PASSIVE]);
/// Devices: accepted sockets inherit the listener's, and cannot change it without CAP_NET_RAW
/// (`sock_bindtoindex_locked` checks the current task, even for a program).
const DEVICE: Sites =
    Sites::new(&[POST_CREATE, BIND_STREAM, BIND_DATAGRAM, CONNECT_STREAM, CONNECT_DATAGRAM, SEND, LISTEN]);
const DEVICE_FROM_CREATION: Sites =
    Sites::new(&[SOCK_CREATE, BIND_STREAM, BIND_DATAGRAM, CONNECT_STREAM, CONNECT_DATAGRAM, SEND, LISTEN]);
/// Affects only bind.
const BIND: Sites = Sites::new(&[POST_CREATE, BIND_STREAM, BIND_DATAGRAM, CONNECT_DATAGRAM, SYN]);
/// `tcp_init_transfer` overwrites earlier values.
const ESTABLISHED: Sites = Sites::new(&[ACTIVE, PASSIVE]);
/// Affects only listeners.
const LISTENER: Sites = Sites::new(&[LISTEN]);

impl SocketOption {
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

    const fn kept(mut self, kept: Kept) -> Self {
        self.kept = kept;
        self
    }

    const fn reading(mut self, reading: Reading) -> Self {
        self.reading = reading;
        self
    }

    const fn related(mut self, relation: Relation) -> Self {
        self.relation = Some(relation);
        self
    }

    const fn negotiated(mut self, what: &'static str) -> Self {
        self.negotiated = Some(what);
        self
    }

    const fn traits(mut self, traits: u8) -> Self {
        self.traits |= traits;
        self
    }

    const fn argument(mut self, argument: u8) -> Self {
        self.argument = argument;
        self
    }

    const fn unsigned(mut self) -> Self {
        self.is_unsigned = true;
        self
    }

    /// Sets what a limit compares in place of 0.
    const fn zero(mut self, effective: i64) -> Self {
        self.zero = effective;
        self
    }

    /// Sets what a limit compares in place of a negative number.
    const fn negative(mut self, effective: i64) -> Self {
        self.negative = effective;
        self
    }

    const fn same_as(mut self, option: &'static str) -> Self {
        self.same_as = Some(option);
        self
    }
}

/// Returns the range of a value about which nothing more is known.
const fn full_range(value: ValueKind) -> (i64, i64) {
    match value {
        Bool => (0, 1),
        Unsigned | Mark => (0, u32::MAX as i64),
        Dscp => (0, 0xff),
        // The largest value means "unlimited".
        Rate => (1, u32::MAX as i64),
        Timeval => (0, i64::MAX),
        Int => (i32::MIN as i64, i32::MAX as i64),
        _ => (0, i32::MAX as i64),
    }
}

/// Returns what the kernel probably stores of a value. Most booleans are a flag; other values may be clamped, rounded
/// or replaced.
const fn most_likely_kept(value: ValueKind) -> Kept {
    if matches!(value, Bool) { AsGiven } else { Otherwise }
}

/// Returns a member of a structure that begins at the address of the socket.
const fn member(of: &'static str, name: &'static str) -> Kept {
    Kept::Member { of, name }
}

/// SOCK_SNDBUF_LOCK and SOCK_RCVBUF_LOCK, bits of SO_BUF_LOCK (include/uapi/linux/socket.h).
const SNDBUF_LOCK: u32 = 1;
const RCVBUF_LOCK: u32 = 2;

/// A flag that an MPTCP socket accepts and discards (`mptcp_setsockopt_sol_socket`, net/mptcp/sockopt.c).
const FORGOTTEN_BY_MPTCP: Kept = Otherwise;

/// Returns an option that programs can set from 5.10 on, and that getsockopt returns unchanged.
const fn settable(
    level: L,
    name: &'static str,
    number: i32,
    value: ValueKind,
    example: &'static str,
    about: &'static str,
) -> SocketOption {
    let sites = if level.0 == L::TCP.0 { STREAM } else { ANY };
    SocketOption {
        name,
        level,
        number,
        value,
        range: full_range(value),
        class: Class::Settable(Settable { sites, read_back: read_back::SAME, since: "5.10" }),
        kept: most_likely_kept(value),
        reading: Reading::Chosen,
        traits: if level.0 == L::TCP.0 { traits::TCP } else { 0 },
        argument: argument::INT,
        is_unsigned: false,
        zero: SAME,
        negative: SAME,
        same_as: None,
        relation: None,
        negotiated: None,
        example,
        about,
    }
}

/// Returns an option that programs cannot set.
const fn guardable(level: L, name: &'static str, number: i32, value: ValueKind, about: &'static str) -> SocketOption {
    SocketOption {
        name,
        level,
        number,
        value,
        range: full_range(value),
        class: Class::Guardable,
        kept: most_likely_kept(value),
        reading: Reading::Chosen,
        traits: 0,
        argument: if level.0 == L::IP.0 { argument::BYTE } else { argument::INT },
        is_unsigned: false,
        zero: SAME,
        negative: SAME,
        same_as: None,
        relation: None,
        negotiated: None,
        example: "",
        about,
    }
}

/// Returns an option that getsockopt supports and setsockopt does not.
const fn read_only(level: L, name: &'static str, number: i32, value: ValueKind, about: &'static str) -> SocketOption {
    SocketOption {
        class: Class::ReadOnly,
        kept: Otherwise,
        reading: Reading::State,
        traits: 0,
        ..guardable(level, name, number, value, about)
    }
}

/// Every option that has a name. Settable options come first, in the order in which they are applied: an option that
/// resets another comes before it.
pub const OPTIONS: &[SocketOption] = &[
    settable(L::IP, "IP_TOS", 1, Dscp, "\"CS0\"", "type of service: DSCP of sent packets")
        .at(ROUTE)
        .traits(traits::INET | traits::LOW_BYTE)
        .argument(argument::BYTE)
        // `__ip_sock_set_tos`, if the value changes.
        .related(Relation::Resets("SO_PRIORITY"))
        .kept(member("inet_sock", "tos")),
    settable(L::IPV6, "IPV6_TCLASS", 67, Dscp, "\"CS0\"", "traffic class: DSCP of sent IPv6 packets")
        .at(ROUTE)
        .traits(traits::INET6 | traits::MINUS_ONE_IS_ZERO),
    settable(L::IPV6, "IPV6_AUTOFLOWLABEL", 70, Bool, "true", "flow label from a hash of the connection")
        .since("6.1")
        .argument(argument::INT_OR_ZERO)
        .traits(traits::INET6),
    settable(L::SOCKET, "SO_MARK", 36, Mark, "0x1", "firewall mark, for policy routing and filters")
        .at(ROUTE_FROM_CREATION)
        .kept(AsGiven),
    settable(L::SOCKET, "SO_PRIORITY", 12, Int, "1", "queueing priority of sent packets")
        .unsigned()
        .at(ROUTE_FROM_CREATION)
        .range(0, i32::MAX as i64)
        .kept(AsGiven),
    settable(L::SOCKET, "SO_BINDTODEVICE", 25, Device, "\"lo\"", "interface to send and receive through, by name")
        .at(DEVICE)
        .reads(read_back::NONE)
        .traits(traits::DEVICE),
    // At socket creation, 5.10 suffices; later in the socket's life, bpf_setsockopt supports it from 5.15.
    settable(L::SOCKET, "SO_BINDTOIFINDEX", 62, Interface, "1", "interface to send and receive through, by index")
        .at(DEVICE_FROM_CREATION)
        .same_as("SO_BINDTODEVICE")
        .traits(traits::DEVICE)
        .range(0, i32::MAX as i64)
        .kept(AsGiven),
    settable(L::SOCKET, "SO_REUSEADDR", 2, Bool, "true", "allow bind while old connections are in TIME_WAIT")
        .at(BIND)
        .since("6.1"),
    settable(L::SOCKET, "SO_REUSEPORT", 15, Bool, "true", "let several sockets bind one port").at(BIND).since("5.15"),
    settable(L::SOCKET, "SO_SNDBUF", 7, Bytes, "\"64KiB\"", "send buffer; turns off its tuning")
        .reads(read_back::DOUBLED)
        .range(0, (i32::MAX / 2) as i64)
        .unsigned()
        .kept(member("sock", "sk_sndbuf"))
        .reading(Reading::Tuned { lock: SNDBUF_LOCK }),
    settable(L::SOCKET, "SO_RCVBUF", 8, Bytes, "\"64KiB\"", "receive buffer; turns off its tuning")
        .reads(read_back::DOUBLED)
        .range(0, (i32::MAX / 2) as i64)
        .unsigned()
        // `sk_setsockopt` of 7.2 and later, for TCP sockets.
        .related(Relation::Resets("TCP_WINDOW_CLAMP"))
        .negotiated("the window scale has been negotiated")
        .kept(member("sock", "sk_rcvbuf"))
        .reading(Reading::Tuned { lock: RCVBUF_LOCK }),
    settable(L::SOCKET, "SO_KEEPALIVE", 9, Bool, "true", "probe idle connections"),
    settable(L::SOCKET, "SO_RCVLOWAT", 18, Bytes, "1", "bytes that make a socket readable")
        .range(1, i32::MAX as i64)
        .zero(1)
        .negative(i32::MAX as i64)
        // `tcp_set_rcvlowat`, if the buffer is unlocked and too small.
        .related(Relation::Resets("TCP_WINDOW_CLAMP"))
        .kept(member("sock", "sk_rcvlowat")),
    settable(L::SOCKET, "SO_MAX_PACING_RATE", 47, Rate, "\"unlimited\"", "maximum sending rate")
        .argument(argument::RATE)
        // TCP stops pacing; the fq queueing discipline sends one packet per second (net/sched/sch_fq.c).
        .zero(UNCERTAIN)
        .kept(AsGiven),
    settable(L::SOCKET, "SO_TXREHASH", 74, Int, "1", "choose another path after a timeout (-1: use the sysctl)")
        .since("6.1")
        .range(-1, 1)
        // net.core.txrehash
        .negative(1)
        .at(STREAM)
        .traits(traits::TCP),
    settable(L::SOCKET, "SK_BPF_CB_FLAGS", 1009, Unsigned, "0", "events for timestamping BPF programs (1: transmit)")
        .since("6.15")
        .range(0, 1)
        .kept(AsGiven),
    // Congestion controls that need ECN (dctcp) must be set before the SYN, while the socket is in TCP_CLOSE. Otherwise
    // they fall back to Reno, because ECN was not negotiated (dctcp_init, net/ipv4/tcp_dctcp.c).
    settable(L::TCP, "TCP_CONGESTION", 13, CongestionControl, "\"reno\"", "congestion control").at(ROUTE).kept(AsGiven),
    settable(L::TCP, "TCP_NODELAY", 1, Bool, "true", "send small segments at once (no Nagle algorithm)").since("6.1"),
    settable(L::TCP, "TCP_MAXSEG", 2, Bytes, "536", "maximum segment size")
        .since("6.1")
        .reads(read_back::NONE)
        .negotiated("the peer has received the segment size")
        .range(88, 32767)
        .zero(i64::MAX)
        .reading(Reading::AtMost),
    settable(L::TCP, "TCP_KEEPIDLE", 4, Seconds, "\"60s\"", "idle time before the first keepalive probe")
        .range(1, 32767)
        .kept(AsGiven),
    settable(L::TCP, "TCP_KEEPINTVL", 5, Seconds, "\"10s\"", "time between keepalive probes")
        .range(1, 32767)
        .kept(AsGiven),
    settable(L::TCP, "TCP_KEEPCNT", 6, Int, "5", "unanswered keepalive probes that end a connection")
        .range(1, 127)
        .kept(AsGiven),
    settable(L::TCP, "TCP_SYNCNT", 7, Int, "3", "how often a SYN is sent again").range(1, 127).kept(AsGiven),
    settable(L::TCP, "TCP_WINDOW_CLAMP", 10, Bytes, "\"64KiB\"", "largest receive window to offer")
        .since("5.15")
        .range(1, i32::MAX as i64)
        .zero(i64::MAX)
        // No clamp up to 6.12; the smallest clamp from 6.18.
        .negative(UNCERTAIN)
        .kept(member("tcp_sock", "window_clamp"))
        .reading(Reading::UntilConnected),
    settable(L::TCP, "TCP_THIN_LINEAR_TIMEOUTS", 16, Bool, "true", "no exponential back-off on thin streams")
        .since("6.1"),
    settable(L::TCP, "TCP_USER_TIMEOUT", 18, Milliseconds, "\"30s\"", "how long sent data may go unacknowledged")
        // The smallest timeout that net.ipv4.tcp_retries2 = 15 gives (Documentation/networking/ip-sysctl.rst).
        .zero(924_600)
        .kept(AsGiven),
    settable(L::TCP, "TCP_NOTSENT_LOWAT", 25, Bytes, "\"128KiB\"", "unsent data that makes a socket unwritable")
        .range(0, u32::MAX as i64)
        // net.ipv4.tcp_notsent_lowat
        .zero(u32::MAX as i64)
        .kept(AsGiven),
    settable(L::TCP, "TCP_SAVE_SYN", 27, Int, "1", "keep the SYN for the application (2: with the MAC header)")
        .at(LISTENER)
        .range(0, 2)
        .kept(AsGiven),
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
        .range(0, 0x7f)
        .kept(AsGiven),
    // Options that programs cannot set.
    guardable(L::SOCKET, "SO_DEBUG", 1, Bool, "debugging of protocols"),
    guardable(L::SOCKET, "SO_DONTROUTE", 5, Bool, "send to direct neighbours only").kept(FORGOTTEN_BY_MPTCP),
    guardable(L::SOCKET, "SO_BROADCAST", 6, Bool, "send to broadcast addresses").kept(FORGOTTEN_BY_MPTCP),
    guardable(L::SOCKET, "SO_OOBINLINE", 10, Bool, "receive out-of-band data in the data stream"),
    guardable(L::SOCKET, "SO_NO_CHECK", 11, Bool, "no UDP checksum").kept(FORGOTTEN_BY_MPTCP),
    guardable(L::SOCKET, "SO_LINGER", 13, Linger, "what close does with unsent data"),
    guardable(L::SOCKET, "SO_BSDCOMPAT", 14, Bool, "nothing (without effect since 2.6)").kept(Otherwise),
    guardable(L::SOCKET, "SO_PASSCRED", 16, Bool, "receive the sender's credentials").kept(FORGOTTEN_BY_MPTCP),
    guardable(L::SOCKET, "SO_RCVTIMEO", 20, Timeval, "receive timeout"),
    guardable(L::SOCKET, "SO_SNDTIMEO", 21, Timeval, "send timeout"),
    guardable(L::SOCKET, "SO_ATTACH_FILTER", 26, BYTES, "filter of received packets (read: SO_GET_FILTER)")
        .reading(Reading::Never),
    guardable(L::SOCKET, "SO_DETACH_FILTER", 27, BYTES, "remove the filter"),
    guardable(L::SOCKET, "SO_TIMESTAMP", 29, Bool, "timestamps in microseconds"),
    guardable(L::SOCKET, "SO_SNDBUFFORCE", 32, Bytes, "send buffer beyond the system's limit")
        .kept(member("sock", "sk_sndbuf"))
        .negative(0)
        .same_as("SO_SNDBUF"),
    guardable(L::SOCKET, "SO_RCVBUFFORCE", 33, Bytes, "receive buffer beyond the system's limit")
        .kept(member("sock", "sk_rcvbuf"))
        .negative(0)
        .same_as("SO_RCVBUF"),
    guardable(L::SOCKET, "SO_PASSSEC", 34, Bool, "receive the sender's security label").kept(FORGOTTEN_BY_MPTCP),
    guardable(L::SOCKET, "SO_TIMESTAMPNS", 35, Bool, "timestamps in nanoseconds").same_as("SO_TIMESTAMP"),
    guardable(L::SOCKET, "SO_TIMESTAMPING", 37, BYTES, "timestamps of hardware and software"),
    guardable(L::SOCKET, "SO_RXQ_OVFL", 40, Bool, "count of dropped packets").kept(FORGOTTEN_BY_MPTCP),
    guardable(L::SOCKET, "SO_WIFI_STATUS", 41, Bool, "status of packets sent by wifi").kept(FORGOTTEN_BY_MPTCP),
    guardable(L::SOCKET, "SO_PEEK_OFF", 42, Int, "offset of MSG_PEEK").kept(member("sock", "sk_peek_off")),
    guardable(L::SOCKET, "SO_NOFCS", 43, Bool, "no frame checksum").kept(FORGOTTEN_BY_MPTCP),
    guardable(L::SOCKET, "SO_LOCK_FILTER", 44, Bool, "lock the filter against changes"),
    guardable(L::SOCKET, "SO_SELECT_ERR_QUEUE", 45, Bool, "wake on errors").kept(FORGOTTEN_BY_MPTCP),
    guardable(L::SOCKET, "SO_BUSY_POLL", 46, Microseconds, "time to poll the device").kept(AsGiven),
    guardable(L::SOCKET, "SO_INCOMING_CPU", 49, Int, "CPU that handles the socket").reading(Reading::State),
    guardable(L::SOCKET, "SO_ATTACH_BPF", 50, Opaque(Shape::Descriptor), "BPF filter of received packets"),
    guardable(L::SOCKET, "SO_ATTACH_REUSEPORT_CBPF", 51, BYTES, "classic BPF that chooses among sockets of a port"),
    guardable(
        L::SOCKET,
        "SO_ATTACH_REUSEPORT_EBPF",
        52,
        Opaque(Shape::Descriptor),
        "BPF that chooses among sockets of a port",
    ),
    guardable(L::SOCKET, "SO_CNX_ADVICE", 53, Int, "choose another path"),
    guardable(L::SOCKET, "SO_ZEROCOPY", 60, Bool, "send without copying"),
    guardable(L::SOCKET, "SO_TXTIME", 61, BYTES, "time at which to send"),
    guardable(L::SOCKET, "SO_TIMESTAMP_NEW", 63, Bool, "timestamps in microseconds, 64-bit").same_as("SO_TIMESTAMP"),
    guardable(L::SOCKET, "SO_TIMESTAMPNS_NEW", 64, Bool, "timestamps in nanoseconds, 64-bit").same_as("SO_TIMESTAMP"),
    guardable(L::SOCKET, "SO_TIMESTAMPING_NEW", 65, BYTES, "timestamps of hardware and software, 64-bit")
        .same_as("SO_TIMESTAMPING"),
    guardable(L::SOCKET, "SO_RCVTIMEO_NEW", 66, Timeval, "receive timeout, 64-bit").same_as("SO_RCVTIMEO"),
    guardable(L::SOCKET, "SO_SNDTIMEO_NEW", 67, Timeval, "send timeout, 64-bit").same_as("SO_SNDTIMEO"),
    guardable(L::SOCKET, "SO_DETACH_REUSEPORT_BPF", 68, BYTES, "remove the BPF that chooses among sockets of a port"),
    guardable(L::SOCKET, "SO_PREFER_BUSY_POLL", 69, Bool, "poll rather than interrupt"),
    guardable(L::SOCKET, "SO_BUSY_POLL_BUDGET", 70, Int, "packets to poll at once").kept(AsGiven).zero(8),
    guardable(L::SOCKET, "SO_BUF_LOCK", 72, Int, "which buffers are not tuned").kept(AsGiven),
    guardable(L::SOCKET, "SO_RESERVE_MEM", 73, Bytes, "memory set aside for the socket"),
    guardable(L::SOCKET, "SO_RCVMARK", 75, Bool, "receive the mark of packets"),
    guardable(L::SOCKET, "SO_PASSPIDFD", 76, Bool, "receive a descriptor of the sender"),
    guardable(L::SOCKET, "SO_DEVMEM_DONTNEED", 80, BYTES, "release device memory"),
    guardable(L::SOCKET, "SO_RCVPRIORITY", 82, Bool, "receive the priority of packets"),
    guardable(L::SOCKET, "SO_PASSRIGHTS", 83, Bool, "receive descriptors"),
    guardable(L::SOCKET, "SO_INQ", 84, Bool, "receive the length of the queue"),
    guardable(L::TCP, "TCP_CORK", 3, Bool, "do not send partial segments"),
    guardable(L::TCP, "TCP_LINGER2", 8, Seconds, "lifetime of orphaned FIN-WAIT-2 sockets")
        .range(i32::MIN as i64, i32::MAX as i64)
        // net.ipv4.tcp_fin_timeout; a negative number skips FIN-WAIT-2.
        .zero(60)
        .negative(0),
    guardable(L::TCP, "TCP_DEFER_ACCEPT", 9, Seconds, "accept only after data has arrived").negative(0),
    guardable(L::TCP, "TCP_QUICKACK", 12, Int, "acknowledge at once").reading(Reading::State),
    guardable(L::TCP, "TCP_MD5SIG", 14, BYTES, "MD5 signatures (BGP)"),
    guardable(L::TCP, "TCP_THIN_DUPACK", 17, Bool, "retransmit on the first duplicate (without effect since 4.11)")
        .kept(Otherwise),
    guardable(L::TCP, "TCP_REPAIR", 19, Int, "checkpoint and restore of connections"),
    guardable(L::TCP, "TCP_REPAIR_QUEUE", 20, Int, "queue under repair").kept(AsGiven),
    guardable(L::TCP, "TCP_QUEUE_SEQ", 21, Unsigned, "sequence number of the queue under repair").kept(AsGiven),
    guardable(L::TCP, "TCP_REPAIR_OPTIONS", 22, BYTES, "negotiated options under repair"),
    guardable(L::TCP, "TCP_FASTOPEN", 23, Int, "queue of fast-open connections"),
    guardable(L::TCP, "TCP_TIMESTAMP", 24, Unsigned, "timestamp under repair").reading(Reading::State),
    guardable(L::TCP, "TCP_REPAIR_WINDOW", 29, BYTES, "window under repair"),
    guardable(L::TCP, "TCP_FASTOPEN_CONNECT", 30, Bool, "fast open by connect"),
    guardable(L::TCP, "TCP_ULP", 31, Opaque(Shape::Text), "protocol above TCP, such as tls").kept(AsGiven),
    guardable(L::TCP, "TCP_MD5SIG_EXT", 32, BYTES, "MD5 signatures by prefix").same_as("TCP_MD5SIG"),
    guardable(L::TCP, "TCP_FASTOPEN_KEY", 33, BYTES, "key of fast-open cookies"),
    guardable(L::TCP, "TCP_FASTOPEN_NO_COOKIE", 34, Bool, "fast open without a cookie"),
    guardable(L::TCP, "TCP_INQ", 36, Bool, "receive the length of the queue"),
    guardable(L::TCP, "TCP_TX_DELAY", 37, Microseconds, "delay of sent packets").kept(AsGiven).unsigned(),
    guardable(L::TCP, "TCP_AO_ADD_KEY", 38, BYTES, "key of the authentication option"),
    guardable(L::TCP, "TCP_AO_DEL_KEY", 39, BYTES, "remove a key of the authentication option"),
    guardable(L::TCP, "TCP_AO_INFO", 40, BYTES, "state of the authentication option").reading(Reading::Never),
    guardable(L::TCP, "TCP_AO_REPAIR", 42, BYTES, "authentication option under repair").reading(Reading::Never),
    guardable(L::TCP, "TCP_RTO_MIN_US", 45, Microseconds, "shortest retransmission timeout").same_as("TCP_BPF_RTO_MIN"),
    guardable(L::TCP, "TCP_DELACK_MAX_US", 46, Microseconds, "longest delay of an acknowledgement")
        .same_as("TCP_BPF_DELACK_MAX"),
    guardable(L::UDP, "UDP_CORK", 1, Bool, "gather sends into one datagram"),
    guardable(L::UDP, "UDP_ENCAP", 100, Int, "encapsulation, such as IPsec's").kept(AsGiven),
    guardable(L::UDP, "UDP_NO_CHECK6_TX", 101, Bool, "send IPv6 without checksum"),
    guardable(L::UDP, "UDP_NO_CHECK6_RX", 102, Bool, "receive IPv6 without checksum"),
    guardable(L::UDP, "UDP_SEGMENT", 103, Bytes, "segment size of large sends").kept(AsGiven),
    guardable(L::UDP, "UDP_GRO", 104, Bool, "receive several datagrams as one"),
    guardable(L::IP, "IP_TTL", 2, Int, "time to live of sent packets")
        .range(-1, 255)
        .argument(argument::BYTE_REQUIRED)
        // net.ipv4.ip_default_ttl
        .negative(64),
    guardable(L::IP, "IP_HDRINCL", 3, Bool, "the application writes the IP header"),
    guardable(L::IP, "IP_OPTIONS", 4, BYTES, "options of the IP header"),
    guardable(L::IP, "IP_ROUTER_ALERT", 5, Bool, "receive packets with the Router Alert option"),
    guardable(L::IP, "IP_RECVOPTS", 6, Bool, "receive options of the IP header"),
    guardable(L::IP, "IP_RETOPTS", 7, Bool, "receive unprocessed options of the IP header"),
    guardable(L::IP, "IP_PKTINFO", 8, Bool, "receive the destination address and interface"),
    guardable(L::IP, "IP_MTU_DISCOVER", 10, Choice(MTU_DISCOVERY), "path MTU discovery").range(0, 5).kept(AsGiven),
    guardable(L::IP, "IP_RECVERR", 11, Bool, "receive ICMP errors"),
    guardable(L::IP, "IP_RECVTTL", 12, Bool, "receive the time to live"),
    guardable(L::IP, "IP_RECVTOS", 13, Bool, "receive the type of service"),
    guardable(L::IP, "IP_FREEBIND", 15, Bool, "bind to addresses that are nonlocal or do not exist yet")
        .argument(argument::BYTE_REQUIRED),
    guardable(L::IP, "IP_IPSEC_POLICY", 16, BYTES, "IPsec policy of the socket").same_as("IP_XFRM_POLICY"),
    guardable(L::IP, "IP_XFRM_POLICY", 17, BYTES, "transformation policy of the socket"),
    guardable(L::IP, "IP_PASSSEC", 18, Bool, "receive the peer's security label"),
    guardable(L::IP, "IP_TRANSPARENT", 19, Bool, "bind to nonlocal addresses (transparent proxy)")
        .argument(argument::BYTE_REQUIRED),
    guardable(L::IP, "IP_ORIGDSTADDR", 20, Bool, "receive the original destination"),
    guardable(L::IP, "IP_MINTTL", 21, Int, "drop packets with a smaller time to live")
        .range(0, 255)
        .kept(AsGiven)
        .argument(argument::BYTE_REQUIRED),
    guardable(L::IP, "IP_NODEFRAG", 22, Bool, "do not reassemble fragments"),
    guardable(L::IP, "IP_CHECKSUM", 23, Bool, "receive checksums"),
    guardable(L::IP, "IP_BIND_ADDRESS_NO_PORT", 24, Bool, "choose the port at connect"),
    guardable(L::IP, "IP_RECVFRAGSIZE", 25, Bool, "receive the size of fragments"),
    guardable(L::IP, "IP_RECVERR_RFC4884", 26, Bool, "receive extended ICMP errors"),
    guardable(L::IP, "IP_MULTICAST_IF", 32, Opaque(Shape::MulticastInterface), "interface of multicasts"),
    guardable(L::IP, "IP_MULTICAST_TTL", 33, Int, "time to live of multicasts")
        .argument(argument::BYTE_REQUIRED)
        .range(-1, 255)
        .negative(1)
        .kept(member("inet_sock", "mc_ttl"))
        // `tcp_v4_syn_recv_sock`, and `tcp_v6_syn_recv_sock` for IPv6.
        .reading(Reading::UntilConnected),
    guardable(L::IP, "IP_MULTICAST_LOOP", 34, Bool, "loop sent multicasts back to local sockets")
        .argument(argument::BYTE_REQUIRED),
    guardable(L::IP, "IP_ADD_MEMBERSHIP", 35, Opaque(Shape::Membership), "join a group"),
    guardable(L::IP, "IP_DROP_MEMBERSHIP", 36, Opaque(Shape::Membership), "leave a group"),
    guardable(L::IP, "IP_UNBLOCK_SOURCE", 37, Opaque(Shape::SourceMembership), "unblock a source of a group"),
    guardable(L::IP, "IP_BLOCK_SOURCE", 38, Opaque(Shape::SourceMembership), "block a source of a group"),
    guardable(L::IP, "IP_ADD_SOURCE_MEMBERSHIP", 39, Opaque(Shape::SourceMembership), "join a group for one source"),
    guardable(L::IP, "IP_DROP_SOURCE_MEMBERSHIP", 40, Opaque(Shape::SourceMembership), "leave a group for one source"),
    guardable(L::IP, "IP_MSFILTER", 41, BYTES, "sources of a group").reading(Reading::Never),
    guardable(L::IP, "IP_MULTICAST_ALL", 49, Bool, "receive from every group that the host has joined")
        .argument(argument::BYTE_REQUIRED),
    guardable(L::IP, "IP_UNICAST_IF", 50, Opaque(Shape::InterfaceIndex), "interface of unicasts")
        .kept(AsGiven)
        .argument(argument::INT_EXACT),
    guardable(L::IP, "IP_LOCAL_PORT_RANGE", 51, BYTES, "range of ports to choose from")
        .kept(AsGiven)
        .argument(argument::INT_EXACT),
    guardable(L::IPV6, "IPV6_ADDRFORM", 1, Int, "turn an IPv6 socket into an IPv4 one").reading(Reading::State),
    guardable(L::IPV6, "IPV6_2292PKTINFO", 2, Bool, "receive the destination address and interface (RFC 2292)"),
    guardable(L::IPV6, "IPV6_2292HOPOPTS", 3, Bool, "receive hop-by-hop options (RFC 2292)"),
    guardable(L::IPV6, "IPV6_2292DSTOPTS", 4, Bool, "receive destination options (RFC 2292)"),
    guardable(L::IPV6, "IPV6_2292RTHDR", 5, Bool, "receive the routing header (RFC 2292)"),
    guardable(L::IPV6, "IPV6_2292PKTOPTIONS", 6, BYTES, "options of sent packets (RFC 2292)").reading(Reading::State),
    guardable(L::IPV6, "IPV6_CHECKSUM", 7, Int, "place of the checksum in raw packets"),
    guardable(L::IPV6, "IPV6_2292HOPLIMIT", 8, Bool, "receive the hop limit (RFC 2292)"),
    guardable(L::IPV6, "IPV6_FLOWINFO", 11, Bool, "receive the flow label"),
    guardable(L::IPV6, "IPV6_UNICAST_HOPS", 16, Int, "hop limit of unicasts").range(-1, 255).negative(64),
    guardable(L::IPV6, "IPV6_MULTICAST_IF", 17, Int, "interface of multicasts")
        .kept(AsGiven)
        .reading(Reading::UntilConnected),
    guardable(L::IPV6, "IPV6_MULTICAST_HOPS", 18, Int, "hop limit of multicasts")
        .range(-1, 255)
        .negative(1)
        .reading(Reading::UntilConnected),
    guardable(L::IPV6, "IPV6_MULTICAST_LOOP", 19, Bool, "loop sent multicasts back to local sockets"),
    guardable(L::IPV6, "IPV6_ADD_MEMBERSHIP", 20, Opaque(Shape::Ipv6Membership), "join a group"),
    guardable(L::IPV6, "IPV6_DROP_MEMBERSHIP", 21, Opaque(Shape::Ipv6Membership), "leave a group"),
    guardable(L::IPV6, "IPV6_ROUTER_ALERT", 22, Int, "receive packets with the Router Alert option"),
    guardable(L::IPV6, "IPV6_MTU_DISCOVER", 23, Choice(IPV6_MTU_DISCOVERY), "path MTU discovery")
        .range(0, 5)
        .kept(AsGiven),
    guardable(L::IPV6, "IPV6_MTU", 24, Bytes, "MTU of the path").reading(Reading::State).zero(i64::MAX),
    guardable(L::IPV6, "IPV6_RECVERR", 25, Bool, "receive ICMP errors"),
    // `__inet6_bind`
    guardable(L::IPV6, "IPV6_V6ONLY", 26, Bool, "no IPv4 on this socket").reading(Reading::UntilBound),
    guardable(L::IPV6, "IPV6_JOIN_ANYCAST", 27, Opaque(Shape::Ipv6Membership), "join an anycast group"),
    guardable(L::IPV6, "IPV6_LEAVE_ANYCAST", 28, Opaque(Shape::Ipv6Membership), "leave an anycast group"),
    guardable(L::IPV6, "IPV6_MULTICAST_ALL", 29, Bool, "receive from every group that the host has joined"),
    guardable(L::IPV6, "IPV6_ROUTER_ALERT_ISOLATE", 30, Bool, "receive router alerts of the own namespace only"),
    guardable(L::IPV6, "IPV6_RECVERR_RFC4884", 31, Bool, "receive extended ICMP errors"),
    guardable(L::IPV6, "IPV6_FLOWLABEL_MGR", 32, BYTES, "flow labels").reading(Reading::Never),
    guardable(L::IPV6, "IPV6_FLOWINFO_SEND", 33, Bool, "send the flow label given with the address"),
    guardable(L::IPV6, "IPV6_IPSEC_POLICY", 34, BYTES, "IPsec policy of the socket").same_as("IPV6_XFRM_POLICY"),
    guardable(L::IPV6, "IPV6_XFRM_POLICY", 35, BYTES, "transformation policy of the socket"),
    guardable(L::IPV6, "IPV6_HDRINCL", 36, Bool, "the application writes the IP header"),
    guardable(L::IPV6, "IPV6_RECVPKTINFO", 49, Bool, "receive the destination address and interface"),
    guardable(L::IPV6, "IPV6_PKTINFO", 50, Opaque(Shape::Ipv6PacketInfo), "source address and interface"),
    guardable(L::IPV6, "IPV6_RECVHOPLIMIT", 51, Bool, "receive the hop limit"),
    guardable(L::IPV6, "IPV6_RECVHOPOPTS", 53, Bool, "receive hop-by-hop options"),
    guardable(L::IPV6, "IPV6_HOPOPTS", 54, BYTES, "hop-by-hop options"),
    guardable(L::IPV6, "IPV6_RTHDRDSTOPTS", 55, BYTES, "destination options before the routing header"),
    guardable(L::IPV6, "IPV6_RECVRTHDR", 56, Bool, "receive the routing header"),
    guardable(L::IPV6, "IPV6_RTHDR", 57, BYTES, "routing header"),
    guardable(L::IPV6, "IPV6_RECVDSTOPTS", 58, Bool, "receive destination options"),
    guardable(L::IPV6, "IPV6_DSTOPTS", 59, BYTES, "destination options"),
    guardable(L::IPV6, "IPV6_RECVPATHMTU", 60, Bool, "receive changes of the path MTU"),
    guardable(L::IPV6, "IPV6_DONTFRAG", 62, Bool, "never fragment").argument(argument::INT_OR_ZERO),
    guardable(L::IPV6, "IPV6_RECVTCLASS", 66, Bool, "receive the traffic class"),
    guardable(L::IPV6, "IPV6_ADDR_PREFERENCES", 72, Int, "preferred source addresses"),
    guardable(L::IPV6, "IPV6_MINHOPCOUNT", 73, Int, "drop packets with a smaller hop limit")
        .range(0, 255)
        .kept(AsGiven),
    guardable(L::IPV6, "IPV6_RECVORIGDSTADDR", 74, Bool, "receive the original destination"),
    guardable(L::IPV6, "IPV6_TRANSPARENT", 75, Bool, "bind to nonlocal addresses (transparent proxy)")
        .same_as("IP_TRANSPARENT"),
    guardable(L::IPV6, "IPV6_UNICAST_IF", 76, Opaque(Shape::InterfaceIndex), "interface of unicasts")
        .kept(AsGiven)
        .argument(argument::INT_EXACT),
    guardable(L::IPV6, "IPV6_RECVFRAGSIZE", 77, Bool, "receive the size of fragments").argument(argument::INT_OR_ZERO),
    guardable(L::IPV6, "IPV6_FREEBIND", 78, Bool, "bind to addresses that are nonlocal or do not exist yet")
        .same_as("IP_FREEBIND"),
    // Options that can only be read.
    read_only(L::SOCKET, "SO_TYPE", 3, Choice(TYPES), "type of the socket"),
    read_only(L::SOCKET, "SO_ERROR", 4, Opaque(Shape::Errno), "pending error, which reading clears")
        .reading(Reading::Never),
    read_only(L::SOCKET, "SO_PEERCRED", 17, Opaque(Shape::Credentials), "credentials of the peer (unix)"),
    read_only(L::SOCKET, "SO_SNDLOWAT", 19, Bytes, "bytes that make a socket writable: always 1"),
    read_only(L::SOCKET, "SO_PEERNAME", 28, Opaque(Shape::SocketAddress), "address of the peer"),
    read_only(L::SOCKET, "SO_ACCEPTCONN", 30, Bool, "whether the socket listens"),
    read_only(L::SOCKET, "SO_PEERSEC", 31, Opaque(Shape::Text), "the peer's security label"),
    read_only(L::SOCKET, "SO_PROTOCOL", 38, Choice(PROTOCOLS), "protocol of the socket"),
    read_only(L::SOCKET, "SO_DOMAIN", 39, Choice(DOMAINS), "family of the socket"),
    read_only(L::SOCKET, "SO_BPF_EXTENSIONS", 48, Int, "extensions that classic BPF filters can use"),
    read_only(L::SOCKET, "SO_MEMINFO", 55, BYTES, "memory in use by the socket"),
    read_only(L::SOCKET, "SO_INCOMING_NAPI_ID", 56, Unsigned, "queue of the device that packets came from"),
    read_only(L::SOCKET, "SO_COOKIE", 57, Opaque(Shape::Wide), "number of the socket, as ss -e shows it"),
    read_only(L::SOCKET, "SO_PEERGROUPS", 59, BYTES, "groups of the peer (unix)"),
    read_only(L::SOCKET, "SO_NETNS_COOKIE", 71, Opaque(Shape::Wide), "number of the network namespace"),
    read_only(L::SOCKET, "SO_PEERPIDFD", 77, Opaque(Shape::Descriptor), "pidfd of the peer process")
        .reading(Reading::Never),
    read_only(L::TCP, "TCP_INFO", 11, BYTES, "state of the connection"),
    read_only(L::TCP, "TCP_CC_INFO", 26, BYTES, "state of the congestion control"),
    read_only(L::TCP, "TCP_SAVED_SYN", 28, BYTES, "headers of the SYN that TCP_SAVE_SYN kept").reading(Reading::Never),
    read_only(L::TCP, "TCP_ZEROCOPY_RECEIVE", 35, BYTES, "receive by mapping pages").reading(Reading::Never),
    read_only(L::TCP, "TCP_AO_GET_KEYS", 41, BYTES, "keys of the authentication option").reading(Reading::Never),
    read_only(L::TCP, "TCP_IS_MPTCP", 43, Bool, "whether MPTCP is in use"),
    read_only(L::IP, "IP_PKTOPTIONS", 9, BYTES, "control messages of the last segment"),
    read_only(L::IP, "IP_MTU", 14, Bytes, "MTU of the path"),
    read_only(L::IP, "IP_PROTOCOL", 52, Choice(PROTOCOLS), "protocol of a raw socket"),
    read_only(L::IP, "SO_ORIGINAL_DST", 80, Opaque(Shape::SocketAddress), "destination before netfilter changed it"),
    read_only(L::IPV6, "IPV6_PATHMTU", 61, BYTES, "MTU of the path"),
    read_only(
        L::IPV6,
        "IP6T_SO_ORIGINAL_DST",
        80,
        Opaque(Shape::SocketAddress),
        "destination before netfilter changed it",
    ),
    read_only(L::MPTCP, "MPTCP_INFO", 1, BYTES, "state of the connection"),
    read_only(L::MPTCP, "MPTCP_TCPINFO", 2, BYTES, "state of each subflow").reading(Reading::Never),
    read_only(L::MPTCP, "MPTCP_SUBFLOW_ADDRS", 3, BYTES, "addresses of each subflow").reading(Reading::Never),
    read_only(L::MPTCP, "MPTCP_FULL_INFO", 4, BYTES, "state of the connection and its subflows")
        .reading(Reading::Never),
];
