//! A value for every option that can be set, which differs from the value without a policy.

use sockpolicy_integration_tests::{
    options::{
        IP_TOS, IPV6_AUTOFLOWLABEL, IPV6_TCLASS, SK_BPF_CB_FLAGS, SO_BINDTODEVICE, SO_BINDTOIFINDEX, SO_KEEPALIVE,
        SO_MARK, SO_MAX_PACING_RATE, SO_PRIORITY, SO_RCVBUF, SO_RCVLOWAT, SO_REUSEADDR, SO_REUSEPORT, SO_SNDBUF,
        SO_TXREHASH, SocketOption, TCP_BPF_DELACK_MAX, TCP_BPF_IW, TCP_BPF_RTO_MIN, TCP_BPF_SNDCWND_CLAMP,
        TCP_BPF_SOCK_OPS_CB_FLAGS, TCP_CONGESTION, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_MAXSEG, TCP_NODELAY,
        TCP_NOTSENT_LOWAT, TCP_RTO_MAX_MS, TCP_SAVE_SYN, TCP_SYNCNT, TCP_THIN_LINEAR_TIMEOUTS, TCP_USER_TIMEOUT,
        TCP_WINDOW_CLAMP,
    },
    script::Family,
};

/// A kind of socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    /// TCP, outbound, connected.
    Client,
    /// TCP, accepted.
    Server,
    Listener,
    UdpBound,
    UdpConnected,
    /// Neither bound nor connected, with a datagram sent.
    UdpSent,
}

/// How the owner of the socket reads the value.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Seen {
    /// With getsockopt.
    Int(i32),
    /// With getsockopt, within these bounds.
    Between(i32, i32),
    Text(&'static str),
    /// Within these bounds, at an offset in TCP_INFO (struct tcp_info, include/uapi/linux/tcp.h), which `ss -ti`
    /// shows.
    Info {
        at: usize,
        min: u32,
        max: u32,
    },
    /// No system call shows the value. Only the agent's counters show that the kernel accepted it.
    Nowhere,
}

#[derive(Debug)]
pub(crate) struct Setting {
    pub(crate) option: SocketOption,
    /// The value in TOML.
    pub(crate) policy: &'static str,
    pub(crate) seen: Seen,
    pub(crate) families: &'static [Family],
    pub(crate) places: &'static [Place],
}

use Place::{Client, Listener, Server, UdpBound, UdpConnected, UdpSent};
use Seen::{Between, Info, Int, Nowhere, Text};

const ALL: &[Place] = &[Client, Server, Listener, UdpBound, UdpConnected, UdpSent];
/// Options that affect bind or connect.
const ADDRESSED: &[Place] = &[Client, Server, Listener, UdpBound, UdpConnected];
const TCP: &[Place] = &[Client, Server, Listener];
const CONNECTED_TCP: &[Place] = &[Client, Server];

/// Offsets in TCP_INFO.
const RTO_US: usize = 8;
const SND_SSTHRESH: usize = 76;
const SND_CWND: usize = 80;

/// An option of every socket of either family.
const fn any(option: SocketOption, policy: &'static str, seen: Seen) -> Setting {
    Setting { option, policy, seen, families: &Family::BOTH, places: ALL }
}

const fn tcp(option: SocketOption, policy: &'static str, seen: Seen) -> Setting {
    Setting { option, policy, seen, families: &Family::BOTH, places: TCP }
}

impl Setting {
    const fn of(mut self, families: &'static [Family]) -> Self {
        self.families = families;
        self
    }

    const fn at(mut self, places: &'static [Place]) -> Self {
        self.places = places;
        self
    }
}

pub(crate) const SETTINGS: &[Setting] = &[
    any(IP_TOS, "\"AF21\"", Int(0x48)).of(&[Family::Inet]),
    any(IPV6_TCLASS, "\"AF22\"", Int(0x50)).of(&[Family::Inet6]),
    any(IPV6_AUTOFLOWLABEL, "false", Int(0)).of(&[Family::Inet6]),
    any(SO_MARK, "0x1234", Int(0x1234)),
    any(SO_PRIORITY, "5", Int(5)),
    any(SO_BINDTODEVICE, "\"lo\"", Text("lo")),
    any(SO_BINDTOIFINDEX, "1", Int(1)),
    any(SO_REUSEADDR, "true", Int(1)).at(ADDRESSED),
    any(SO_REUSEPORT, "true", Int(1)).at(ADDRESSED),
    any(SO_SNDBUF, "\"100KiB\"", Int(2 * 100 * 1024)),
    any(SO_RCVBUF, "\"200KiB\"", Int(2 * 200 * 1024)),
    any(SO_KEEPALIVE, "true", Int(1)),
    any(SO_RCVLOWAT, "2000", Int(2000)),
    any(SO_MAX_PACING_RATE, "\"80mbit\"", Int(10_000_000)),
    tcp(SO_TXREHASH, "0", Int(0)),
    any(SK_BPF_CB_FLAGS, "1", Nowhere),
    tcp(TCP_CONGESTION, "\"reno\"", Text("reno")),
    tcp(TCP_NODELAY, "true", Int(1)),
    // Connected sockets show the size without the TCP options of each segment.
    tcp(TCP_MAXSEG, "1000", Between(960, 1000)),
    tcp(TCP_KEEPIDLE, "\"123s\"", Int(123)),
    tcp(TCP_KEEPINTVL, "\"45s\"", Int(45)),
    tcp(TCP_KEEPCNT, "7", Int(7)),
    tcp(TCP_SYNCNT, "4", Int(4)),
    // Less than the space in the receive buffer, since the kernel would lower it otherwise.
    tcp(TCP_WINDOW_CLAMP, "100000", Int(100_000)),
    tcp(TCP_THIN_LINEAR_TIMEOUTS, "true", Int(1)),
    tcp(TCP_USER_TIMEOUT, "\"21s\"", Int(21_000)),
    tcp(TCP_NOTSENT_LOWAT, "77777", Int(77_777)),
    tcp(TCP_SAVE_SYN, "1", Int(1)).at(&[Listener]),
    tcp(TCP_RTO_MAX_MS, "\"30s\"", Int(30_000)),
    tcp(TCP_BPF_IW, "33", Info { at: SND_CWND, min: 33, max: 33 }).at(CONNECTED_TCP),
    tcp(TCP_BPF_SNDCWND_CLAMP, "50", Info { at: SND_SSTHRESH, min: 50, max: 50 }).at(CONNECTED_TCP),
    tcp(TCP_BPF_DELACK_MAX, "\"50ms\"", Nowhere),
    // The timeout is this value plus the round trip; without a policy, 200 ms plus the round trip.
    tcp(TCP_BPF_RTO_MIN, "\"40ms\"", Info { at: RTO_US, min: 40_000, max: 199_999 }).at(CONNECTED_TCP),
    tcp(TCP_BPF_SOCK_OPS_CB_FLAGS, "1", Nowhere),
];
