//! The test's own facts about options: other names of a value, values that a policy sets, bounds, and the meaning of
//! numbers.
//!
//! They are written from the kernel's handlers (`sk_setsockopt` in net/core/sock.c, `do_tcp_setsockopt` in
//! net/ipv4/tcp.c, `do_ip_setsockopt` in net/ipv4/ip_sockglue.c, `do_ipv6_setsockopt` in net/ipv6/ipv6_sockglue.c;
//! 5.10 to 7.2), not from the agent's table.

use sockpolicy_integration_tests::differential::{Key, Observation};

pub(super) const SOCKET: i32 = 1;
pub(super) const IP: i32 = 0;
pub(super) const TCP: i32 = 6;
pub(super) const UDP: i32 = 17;
pub(super) const IPV6: i32 = 41;
pub(super) const UDP_LITE: i32 = 136;
pub(super) const RAW: i32 = 255;

/// Levels and numbers that `sockpolicy options` does not list: other numbers of listed options, and options without a
/// name.
pub(super) const UNLISTED: &[Key] = &[
    (UDP_LITE, 1),
    (UDP_LITE, 10),
    (UDP_LITE, 11),
    (UDP_LITE, 100),
    (UDP_LITE, 101),
    (UDP_LITE, 102),
    (UDP_LITE, 103),
    (UDP_LITE, 104),
    (RAW, 1),
    (RAW, 7),
    (RAW, 36),
    (58, 1),
    (IP, 42),
    (IP, 43),
    (IP, 44),
    (IP, 45),
    (IP, 46),
    (IP, 47),
    (IP, 48),
    (IPV6, 42),
    (IPV6, 43),
    (IPV6, 44),
    (IPV6, 45),
    (IPV6, 46),
    (IPV6, 47),
    (IPV6, 48),
    (IP, 60),
    (SOCKET, 200),
    (SOCKET, -1),
    (TCP, 60),
    (TCP, 1500),
    (UDP, 60),
    (UDP, 10),
    (IPV6, 60000),
    (284, 99),
    (-1, -1),
    (i32::MAX, i32::MIN),
];

/// Entries of [`UNLISTED`] that no name in a policy covers.
pub(super) const WITHOUT_NAME: &[Key] = &[
    (UDP_LITE, 10),
    (UDP_LITE, 11),
    (RAW, 1),
    (58, 1),
    (IPV6, 43),
    (IPV6, 44),
    (IPV6, 46),
    (IPV6, 47),
    (IPV6, 48),
    (IP, 60),
    (SOCKET, 200),
    (SOCKET, -1),
    (TCP, 60),
    (TCP, 1500),
    (UDP, 60),
    (UDP, 10),
    (IPV6, 60000),
    (284, 99),
    (-1, -1),
    (i32::MAX, i32::MIN),
];

/// Returns the options whose values show the effect of a call on `key`: by default, only `key` itself.
pub(super) fn observers(key: Key) -> Vec<Key> {
    const BUFFERS: &[i32] = &[7, 8, 32, 33, 72];
    const TIMESTAMPS: &[i32] = &[29, 35, 63, 64];
    match key {
        (SOCKET, name) if BUFFERS.contains(&name) => [7, 8, 72].map(|name| (SOCKET, name)).to_vec(),
        (SOCKET, 18) => vec![key, (SOCKET, 7), (SOCKET, 8), (SOCKET, 72)],
        (SOCKET, name) if TIMESTAMPS.contains(&name) => TIMESTAMPS.iter().map(|name| (SOCKET, *name)).collect(),
        (SOCKET, 37 | 65) => vec![(SOCKET, 37), (SOCKET, 65)],
        (SOCKET, 20 | 66) => vec![(SOCKET, 20)],
        (SOCKET, 21 | 67) => vec![(SOCKET, 21)],
        (SOCKET, 25 | 62) => vec![(SOCKET, 62), (SOCKET, 25)],
        (TCP, 10) => vec![key, (SOCKET, 8)],
        // Reading returns a new descriptor, or maps memory.
        (SOCKET, 77) | (TCP, 35) => Vec::new(),
        (TCP, 19) => vec![key, (SOCKET, 2)],
        (TCP, 45 | 1004) => vec![(TCP, 45)],
        (TCP, 46 | 1003) => vec![(TCP, 46)],
        (IP, 1) => vec![key, (SOCKET, 12)],
        (IP, 19) | (IPV6, 75) => vec![(IP, 19), (IPV6, 75)],
        (IP, 15) | (IPV6, 78) => vec![(IP, 15), (IPV6, 78)],
        (IP, 35..=48) => vec![(IP, 32), (IP, 49)],
        (IPV6, 6 | 54 | 55 | 57 | 59) => [54, 55, 57, 59].map(|name| (IPV6, name)).to_vec(),
        (UDP_LITE, name) => vec![(UDP, name), (UDP_LITE, name)],
        (RAW, 7 | 36) => vec![(IPV6, key.1)],
        _ => vec![key],
    }
}

/// A setting of a policy, and the value that getsockopt then shows.
pub(super) struct Set {
    pub(super) name: &'static str,
    pub(super) toml: &'static str,
    /// The option that shows the value, and the value; `None` if no option shows it.
    pub(super) shown: Option<(Key, i64)>,
    /// The bits of the value that the policy decides.
    pub(super) mask: i64,
}

const fn set(name: &'static str, toml: &'static str, key: Key, value: i64) -> Set {
    Set { name, toml, shown: Some((key, value)), mask: -1 }
}

/// The two lowest bits of these bytes are ECN, which the application decides.
const fn dscp(name: &'static str, key: Key) -> Set {
    Set { name, toml: "\"AF21\"", shown: Some((key, 0x48)), mask: 0xfc }
}

const fn unseen(name: &'static str, toml: &'static str) -> Set {
    Set { name, toml, shown: None, mask: -1 }
}

/// `reno`, as a 64-bit number.
pub(super) const RENO: i64 = 0x6f6e_6572;

pub(super) const SETS: &[Set] = &[
    dscp("IP_TOS", (IP, 1)),
    dscp("IPV6_TCLASS", (IPV6, 67)),
    set("IPV6_AUTOFLOWLABEL", "false", (IPV6, 70), 0),
    set("SO_MARK", "0x21", (SOCKET, 36), 0x21),
    set("SO_PRIORITY", "3", (SOCKET, 12), 3),
    set("SO_BINDTOIFINDEX", "1", (SOCKET, 62), 1),
    set("SO_BINDTODEVICE", "\"lo\"", (SOCKET, 62), 1),
    set("SO_REUSEADDR", "true", (SOCKET, 2), 1),
    set("SO_REUSEPORT", "true", (SOCKET, 15), 1),
    set("SO_SNDBUF", "\"64KiB\"", (SOCKET, 7), 131_072),
    set("SO_RCVBUF", "\"64KiB\"", (SOCKET, 8), 131_072),
    set("SO_KEEPALIVE", "true", (SOCKET, 9), 1),
    set("SO_RCVLOWAT", "64", (SOCKET, 18), 64),
    set("SO_MAX_PACING_RATE", "\"80mbit\"", (SOCKET, 47), 10_000_000),
    set("SO_TXREHASH", "0", (SOCKET, 74), 0),
    unseen("SK_BPF_CB_FLAGS", "0"),
    set("TCP_CONGESTION", "\"reno\"", (TCP, 13), RENO),
    set("TCP_NODELAY", "true", (TCP, 1), 1),
    set("TCP_MAXSEG", "700", (TCP, 2), 700),
    set("TCP_KEEPIDLE", "\"60s\"", (TCP, 4), 60),
    set("TCP_KEEPINTVL", "\"10s\"", (TCP, 5), 10),
    set("TCP_KEEPCNT", "5", (TCP, 6), 5),
    set("TCP_SYNCNT", "3", (TCP, 7), 3),
    set("TCP_WINDOW_CLAMP", "\"64KiB\"", (TCP, 10), 65_536),
    set("TCP_THIN_LINEAR_TIMEOUTS", "true", (TCP, 16), 1),
    set("TCP_USER_TIMEOUT", "\"30s\"", (TCP, 18), 30_000),
    set("TCP_NOTSENT_LOWAT", "\"128KiB\"", (TCP, 25), 131_072),
    set("TCP_SAVE_SYN", "1", (TCP, 27), 1),
    set("TCP_RTO_MAX_MS", "\"60s\"", (TCP, 44), 60_000),
    unseen("TCP_BPF_IW", "10"),
    unseen("TCP_BPF_SNDCWND_CLAMP", "10000"),
    set("TCP_BPF_DELACK_MAX", "\"40ms\"", (TCP, 46), 40_000),
    set("TCP_BPF_RTO_MIN", "\"100ms\"", (TCP, 45), 100_000),
    unseen("TCP_BPF_SOCK_OPS_CB_FLAGS", "0"),
];

/// How a value that getsockopt shows is compared with bounds.
#[derive(Clone, Copy)]
pub(super) enum Scale {
    /// The value itself.
    Number,
    /// An unsigned 32-bit number.
    Unsigned,
    /// Half of the value.
    Half,
    /// The value itself, but 0 is above every bound.
    ZeroIsMost,
    /// `{on, seconds}`
    Linger,
    /// `{seconds, microseconds}`, in microseconds; no timeout if both are 0.
    Time,
    /// Bytes per second, 64 bits; all ones is above every bound.
    Rate,
}

impl Scale {
    /// Returns `None` if the value could not be read.
    pub(super) fn of(self, seen: &Observation) -> Option<i64> {
        let number = seen.number()?;
        Some(match self {
            Self::Half => number / 2,
            Self::ZeroIsMost if number as u32 == 0 => i64::MAX,
            Self::ZeroIsMost | Self::Unsigned => i64::from(number as u32),
            Self::Linger => match (number as i32, (number >> 32) as i32) {
                (0, _) => 0,
                (_, ..0) => i64::MAX,
                (_, seconds) => seconds.into(),
            },
            Self::Time => match seen.pair()? {
                [0, 0] => i64::MAX,
                [seconds, micros] => seconds.saturating_mul(1_000_000).saturating_add(micros),
            },
            Self::Rate if number == -1 => i64::MAX,
            Self::Rate | Self::Number => number,
        })
    }
}

/// A limit of a policy, and the range that getsockopt may then show.
pub(super) struct Limit {
    pub(super) name: &'static str,
    pub(super) toml: &'static str,
    pub(super) shown: Key,
    pub(super) scale: Scale,
    pub(super) range: (i64, i64),
    /// A value within the limit, as the application passes it.
    pub(super) within: i64,
}

const fn limit(
    name: &'static str,
    toml: &'static str,
    shown: Key,
    scale: Scale,
    range: (i64, i64),
    within: i64,
) -> Limit {
    Limit { name, toml, shown, scale, range, within }
}

pub(super) const LIMITS: &[Limit] = &[
    limit("SO_PRIORITY", "{ min = 2, max = 5 }", (SOCKET, 12), Scale::Unsigned, (2, 5), 4),
    limit("SO_SNDBUF", "{ min = \"8KiB\", max = \"64KiB\" }", (SOCKET, 7), Scale::Half, (8192, 65_536), 16_384),
    limit("SO_RCVBUF", "{ min = \"8KiB\", max = \"64KiB\" }", (SOCKET, 8), Scale::Half, (8192, 65_536), 16_384),
    limit("SO_RCVLOWAT", "{ min = 16, max = 4096 }", (SOCKET, 18), Scale::Number, (16, 4096), 100),
    limit(
        "SO_MAX_PACING_RATE",
        "{ min = \"8mbit\", max = \"80mbit\" }",
        (SOCKET, 47),
        Scale::Rate,
        (1_000_000, 10_000_000),
        2_000_000,
    ),
    limit("SO_TXREHASH", "{ min = 0, max = 0 }", (SOCKET, 74), Scale::Number, (0, 0), 0),
    // An unconnected socket without its own limit shows 536.
    limit("TCP_MAXSEG", "{ min = 600, max = 1000 }", (TCP, 2), Scale::Number, (600, 1000), 800),
    limit("TCP_KEEPIDLE", "{ min = \"10s\", max = \"100s\" }", (TCP, 4), Scale::Number, (10, 100), 20),
    limit("TCP_KEEPINTVL", "{ min = \"10s\", max = \"100s\" }", (TCP, 5), Scale::Number, (10, 100), 20),
    limit("TCP_KEEPCNT", "{ min = 3, max = 10 }", (TCP, 6), Scale::Number, (3, 10), 4),
    limit("TCP_SYNCNT", "{ min = 2, max = 5 }", (TCP, 7), Scale::Number, (2, 5), 3),
    limit(
        "TCP_WINDOW_CLAMP",
        "{ min = \"8KiB\", max = \"64KiB\" }",
        (TCP, 10),
        Scale::ZeroIsMost,
        (8192, 65_536),
        16_384,
    ),
    // 0 stands for net.ipv4.tcp_retries2: some 15 minutes.
    limit(
        "TCP_USER_TIMEOUT",
        "{ min = \"10s\", max = \"60s\" }",
        (TCP, 18),
        Scale::ZeroIsMost,
        (10_000, 60_000),
        20_000,
    ),
    limit(
        "TCP_NOTSENT_LOWAT",
        "{ min = \"16KiB\", max = \"128KiB\" }",
        (TCP, 25),
        Scale::ZeroIsMost,
        (16_384, 131_072),
        20_000,
    ),
    limit("TCP_SAVE_SYN", "{ min = 1, max = 1 }", (TCP, 27), Scale::Number, (1, 1), 1),
    limit("TCP_RTO_MAX_MS", "{ min = \"2s\", max = \"60s\" }", (TCP, 44), Scale::Number, (2000, 60_000), 4000),
    limit(
        "TCP_BPF_RTO_MIN",
        "{ min = \"20ms\", max = \"100ms\" }",
        (TCP, 45),
        Scale::Number,
        (20_000, 100_000),
        40_000,
    ),
    limit(
        "TCP_BPF_DELACK_MAX",
        "{ min = \"20ms\", max = \"100ms\" }",
        (TCP, 46),
        Scale::Number,
        (20_000, 100_000),
        40_000,
    ),
    limit("SO_LINGER", "{ min = \"2s\", max = \"10s\" }", (SOCKET, 13), Scale::Linger, (2, 10), 5 << 32 | 1),
    limit("SO_RCVTIMEO", "{ min = \"1s\", max = \"30s\" }", (SOCKET, 20), Scale::Time, (1_000_000, 30_000_000), 5),
    limit("SO_SNDTIMEO", "{ min = \"1s\", max = \"30s\" }", (SOCKET, 21), Scale::Time, (1_000_000, 30_000_000), 5),
    limit("SO_PEEK_OFF", "{ min = 1, max = 100 }", (SOCKET, 42), Scale::Number, (1, 100), 50),
    limit("SO_BUSY_POLL", "{ min = \"10us\", max = \"1000us\" }", (SOCKET, 46), Scale::Number, (10, 1000), 50),
    limit("SO_INCOMING_CPU", "{ min = 0, max = 0 }", (SOCKET, 49), Scale::Number, (0, 0), 0),
    // Whole pages.
    limit("SO_RESERVE_MEM", "{ min = \"8KiB\", max = \"64KiB\" }", (SOCKET, 73), Scale::Number, (8192, 65_536), 16_384),
    // 0 shows net.ipv4.tcp_fin_timeout: 60.
    limit("TCP_LINGER2", "{ min = \"5s\", max = \"30s\" }", (TCP, 8), Scale::Number, (5, 30), 10),
    // The kernel rounds up to 1, 3, 7, 15 … seconds.
    limit("TCP_DEFER_ACCEPT", "{ min = \"3s\", max = \"15s\" }", (TCP, 9), Scale::Number, (3, 15), 7),
    limit("TCP_FASTOPEN", "{ min = 1, max = 100 }", (TCP, 23), Scale::Number, (1, 100), 50),
    limit("TCP_TX_DELAY", "{ min = \"10us\", max = \"1000us\" }", (TCP, 37), Scale::Unsigned, (10, 1000), 100),
    limit("TCP_REPAIR", "{ min = 0, max = 0 }", (TCP, 19), Scale::Number, (0, 0), 0),
    limit("UDP_ENCAP", "{ min = 0, max = 0 }", (UDP, 100), Scale::Number, (0, 0), 0),
    limit("UDP_SEGMENT", "{ min = 100, max = 1000 }", (UDP, 103), Scale::Number, (100, 1000), 500),
    // -1 shows the system default: 64.
    limit("IP_TTL", "{ min = 10, max = 50 }", (IP, 2), Scale::Number, (10, 50), 20),
    limit("IP_MTU_DISCOVER", "{ min = 1, max = 3 }", (IP, 10), Scale::Number, (1, 3), 2),
    limit("IP_MINTTL", "{ min = 5, max = 100 }", (IP, 21), Scale::Number, (5, 100), 50),
    limit("IP_MULTICAST_TTL", "{ min = 2, max = 50 }", (IP, 33), Scale::Number, (2, 50), 20),
    limit("IPV6_UNICAST_HOPS", "{ min = 10, max = 50 }", (IPV6, 16), Scale::Number, (10, 50), 20),
    limit("IPV6_MULTICAST_HOPS", "{ min = 2, max = 50 }", (IPV6, 18), Scale::Number, (2, 50), 20),
    limit("IPV6_MTU_DISCOVER", "{ min = 1, max = 3 }", (IPV6, 23), Scale::Number, (1, 3), 2),
    limit("IPV6_MINHOPCOUNT", "{ min = 5, max = 100 }", (IPV6, 73), Scale::Number, (5, 100), 50),
    limit("IPV6_CHECKSUM", "{ min = 0, max = 10 }", (IPV6, 7), Scale::Number, (0, 10), 4),
];

/// Options that can be limited but are not in the table: other names of options above, or options whose value no
/// option shows.
pub(super) const NOT_LIMITED: &[&str] = &[
    // Other names.
    "SO_SNDBUFFORCE",
    "SO_RCVBUFFORCE",
    "SO_RCVTIMEO_NEW",
    "SO_SNDTIMEO_NEW",
    "TCP_RTO_MIN_US",
    "TCP_DELACK_MAX_US",
    // Only programs can set these.
    "SK_BPF_CB_FLAGS",
    "TCP_BPF_IW",
    "TCP_BPF_SNDCWND_CLAMP",
    "TCP_BPF_SOCK_OPS_CB_FLAGS",
    // getsockopt shows another value, or a value only during repair.
    "SO_CNX_ADVICE",
    "SO_BUSY_POLL_BUDGET",
    "TCP_QUICKACK",
    "TCP_REPAIR_QUEUE",
    "TCP_QUEUE_SEQ",
    "TCP_TIMESTAMP",
    "IPV6_ADDRFORM",
    "IPV6_MTU",
    "IPV6_ROUTER_ALERT",
    // A set of bits, or the number of a device, which have no order.
    "SO_BUF_LOCK",
    "IPV6_ADDR_PREFERENCES",
    "IPV6_MULTICAST_IF",
];

/// IP_MULTICAST_IF, IP_UNICAST_IF, IPV6_MULTICAST_IF, IPV6_PKTINFO and IPV6_UNICAST_IF.
pub(super) const DEVICES: &[Key] = &[(IP, 32), (IP, 50), (IPV6, 17), (IPV6, 50), (IPV6, 76)];

/// Options whose value differs each time.
pub(super) const VOLATILE: &[Key] = &[
    // SO_MEMINFO: policies keep their notes of a socket in its option memory. SO_COOKIE, SO_NETNS_COOKIE: unique
    // numbers.
    (SOCKET, 55),
    (SOCKET, 57),
    (SOCKET, 71),
    // SO_INCOMING_CPU and SO_INCOMING_NAPI_ID: where packets arrived.
    (SOCKET, 49),
    (SOCKET, 56),
    // SO_PEERNAME, IP_PROTOCOL (the port, once there is one) and SO_ORIGINAL_DST: ports.
    (SOCKET, 28),
    (IP, 52),
    (IP, 80),
    (IPV6, 80),
    // TCP_INFO, TCP_QUEUE_SEQ, TCP_TIMESTAMP, TCP_CC_INFO: clocks and sequence numbers.
    (TCP, 11),
    (TCP, 21),
    (TCP, 24),
    (TCP, 26),
    // MPTCP_INFO, MPTCP_TCPINFO, MPTCP_SUBFLOW_ADDRS, MPTCP_FULL_INFO: tokens, ports and clocks.
    (284, 1),
    (284, 2),
    (284, 3),
    (284, 4),
];
