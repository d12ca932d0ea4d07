//! Names of numeric values.

/// The differentiated services code points that have names (RFC 2474, 2597, 3246, 5865, 8622), at their position in the
/// byte.
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

/// Numbers of one kind, with their names in the socket API.
pub type Names = &'static [(&'static str, i64)];

/// Values of SO_TYPE (include/linux/net.h).
pub(super) const TYPES: Names = &[
    ("SOCK_STREAM", 1),
    ("SOCK_DGRAM", 2),
    ("SOCK_RAW", 3),
    ("SOCK_RDM", 4),
    ("SOCK_SEQPACKET", 5),
    ("SOCK_DCCP", 6),
    ("SOCK_PACKET", 10),
];

/// Values of SO_DOMAIN (include/linux/socket.h) that applications use today.
pub(super) const DOMAINS: Names = &[
    ("AF_UNIX", 1),
    ("AF_INET", 2),
    ("AF_INET6", 10),
    ("AF_KEY", 15),
    ("AF_NETLINK", 16),
    ("AF_PACKET", 17),
    ("AF_RDS", 21),
    ("AF_CAN", 29),
    ("AF_TIPC", 30),
    ("AF_BLUETOOTH", 31),
    ("AF_ALG", 38),
    ("AF_VSOCK", 40),
    ("AF_SMC", 43),
    ("AF_XDP", 44),
];

/// Values of SO_PROTOCOL and IP_PROTOCOL (include/uapi/linux/in.h, in6.h) for sockets of the internet families. 0 has
/// no name here: sockets of most other families have that value.
pub(super) const PROTOCOLS: Names = &[
    ("IPPROTO_ICMP", 1),
    ("IPPROTO_IGMP", 2),
    ("IPPROTO_TCP", 6),
    ("IPPROTO_UDP", 17),
    ("IPPROTO_DCCP", 33),
    ("IPPROTO_GRE", 47),
    ("IPPROTO_ESP", 50),
    ("IPPROTO_AH", 51),
    ("IPPROTO_ICMPV6", 58),
    ("IPPROTO_L2TP", 115),
    ("IPPROTO_SCTP", 132),
    ("IPPROTO_UDPLITE", 136),
    ("IPPROTO_RAW", 255),
    ("IPPROTO_SMC", 256),
    ("IPPROTO_MPTCP", 262),
];

/// Values of IP_MTU_DISCOVER (include/uapi/linux/in.h).
pub(super) const MTU_DISCOVERY: Names = &[
    ("IP_PMTUDISC_DONT", 0),
    ("IP_PMTUDISC_WANT", 1),
    ("IP_PMTUDISC_DO", 2),
    ("IP_PMTUDISC_PROBE", 3),
    ("IP_PMTUDISC_INTERFACE", 4),
    ("IP_PMTUDISC_OMIT", 5),
];

/// Values of IPV6_MTU_DISCOVER (include/uapi/linux/in6.h).
pub(super) const IPV6_MTU_DISCOVERY: Names = &[
    ("IPV6_PMTUDISC_DONT", 0),
    ("IPV6_PMTUDISC_WANT", 1),
    ("IPV6_PMTUDISC_DO", 2),
    ("IPV6_PMTUDISC_PROBE", 3),
    ("IPV6_PMTUDISC_INTERFACE", 4),
    ("IPV6_PMTUDISC_OMIT", 5),
];
