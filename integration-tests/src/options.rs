//! Options with their numbers from the C library and the kernel's headers, not from the agent's table.

/// A socket option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketOption {
    pub name: &'static str,
    pub level: i32,
    pub number: i32,
}

/// Declares options with their levels and numbers.
macro_rules! options {
    ($($name:ident = $level:ident, $number:expr;)*) => {
        $(pub const $name: SocketOption = SocketOption { name: stringify!($name), level: libc::$level, number: $number };)*
        /// All options.
        pub const ALL: &[SocketOption] = &[$($name),*];
    };
}

options! {
    IP_TOS = SOL_IP, libc::IP_TOS;
    IP_TTL = SOL_IP, libc::IP_TTL;
    IPV6_TCLASS = SOL_IPV6, libc::IPV6_TCLASS;
    IPV6_AUTOFLOWLABEL = SOL_IPV6, 70;
    IPV6_V6ONLY = SOL_IPV6, libc::IPV6_V6ONLY;
    SO_REUSEADDR = SOL_SOCKET, libc::SO_REUSEADDR;
    SO_SNDBUF = SOL_SOCKET, libc::SO_SNDBUF;
    SO_RCVBUF = SOL_SOCKET, libc::SO_RCVBUF;
    SO_KEEPALIVE = SOL_SOCKET, libc::SO_KEEPALIVE;
    SO_PRIORITY = SOL_SOCKET, libc::SO_PRIORITY;
    SO_LINGER = SOL_SOCKET, libc::SO_LINGER;
    SO_REUSEPORT = SOL_SOCKET, libc::SO_REUSEPORT;
    SO_RCVLOWAT = SOL_SOCKET, libc::SO_RCVLOWAT;
    SO_BINDTODEVICE = SOL_SOCKET, libc::SO_BINDTODEVICE;
    SO_MARK = SOL_SOCKET, libc::SO_MARK;
    SO_RCVTIMEO = SOL_SOCKET, libc::SO_RCVTIMEO;
    SO_MAX_PACING_RATE = SOL_SOCKET, 47;
    SO_COOKIE = SOL_SOCKET, 57;
    SO_BINDTOIFINDEX = SOL_SOCKET, 62;
    SO_BUF_LOCK = SOL_SOCKET, 72;
    SO_TXREHASH = SOL_SOCKET, 74;
    SK_BPF_CB_FLAGS = SOL_SOCKET, 1009;
    TCP_NODELAY = SOL_TCP, libc::TCP_NODELAY;
    TCP_MAXSEG = SOL_TCP, libc::TCP_MAXSEG;
    TCP_CORK = SOL_TCP, libc::TCP_CORK;
    TCP_KEEPIDLE = SOL_TCP, libc::TCP_KEEPIDLE;
    TCP_KEEPINTVL = SOL_TCP, libc::TCP_KEEPINTVL;
    TCP_KEEPCNT = SOL_TCP, libc::TCP_KEEPCNT;
    TCP_SYNCNT = SOL_TCP, libc::TCP_SYNCNT;
    TCP_WINDOW_CLAMP = SOL_TCP, libc::TCP_WINDOW_CLAMP;
    TCP_INFO = SOL_TCP, libc::TCP_INFO;
    TCP_QUICKACK = SOL_TCP, libc::TCP_QUICKACK;
    TCP_CONGESTION = SOL_TCP, libc::TCP_CONGESTION;
    TCP_THIN_LINEAR_TIMEOUTS = SOL_TCP, libc::TCP_THIN_LINEAR_TIMEOUTS;
    TCP_USER_TIMEOUT = SOL_TCP, libc::TCP_USER_TIMEOUT;
    TCP_NOTSENT_LOWAT = SOL_TCP, libc::TCP_NOTSENT_LOWAT;
    TCP_SAVE_SYN = SOL_TCP, libc::TCP_SAVE_SYN;
    TCP_SAVED_SYN = SOL_TCP, libc::TCP_SAVED_SYN;
    TCP_RTO_MAX_MS = SOL_TCP, 44;
    TCP_BPF_IW = SOL_TCP, 1001;
    TCP_BPF_SNDCWND_CLAMP = SOL_TCP, 1002;
    TCP_BPF_DELACK_MAX = SOL_TCP, 1003;
    TCP_BPF_RTO_MIN = SOL_TCP, 1004;
    TCP_BPF_SOCK_OPS_CB_FLAGS = SOL_TCP, 1008;
}
