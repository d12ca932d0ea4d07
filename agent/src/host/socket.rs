//! Reads and sets options of a socket by its descriptor.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use abi::setting::{OptionKey, TEXT_LEN, Value, kind};
use nix::sys::{
    socket::{SockaddrStorage, getpeername, getsockname},
    stat::fstat,
};

use crate::{
    options::{self, Level, Reading, SocketOption},
    policy::{
        End, Socket,
        model::{Direction, Family, Protocol},
    },
};

/// The facts about a socket, from the kernel's list or from the socket itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// AF_INET or AF_INET6.
    pub family: i32,
    /// One of IPPROTO_*. For every raw socket, IPPROTO_RAW.
    pub protocol: i32,
    pub state: State,
    pub local: SocketAddr,
    pub remote: Option<SocketAddr>,
    /// The inode number that `/proc/PID/fd` shows; 0 if no process has a descriptor.
    pub inode: u32,
    /// SO_COOKIE: unique among all sockets since boot.
    pub cookie: u64,
    /// The id of the cgroup in which the socket was created. `None`: unknown.
    pub cgroup: Option<u64>,
}

/// The TCP state of a socket. Sockets of other protocols are `Established` or `Unconnected`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Established,
    SynSent,
    SynReceived,
    FinWait1,
    FinWait2,
    TimeWait,
    Unconnected,
    CloseWait,
    LastAck,
    Listening,
    Closing,
}

/// The arguments of socket(2) that create this kind of socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kind {
    pub family: i32,
    /// The type, such as SOCK_STREAM.
    pub form: i32,
    pub protocol: i32,
}

/// Describes a socket, without its inode number and cgroup. Returns `None` if the socket is not an IPv4 or IPv6 socket.
#[must_use]
pub fn describe(socket: &OwnedFd) -> Option<Entry> {
    let local = getsockname::<SockaddrStorage>(socket.as_raw_fd()).ok().and_then(|address| to_std(&address))?;
    let remote = getpeername::<SockaddrStorage>(socket.as_raw_fd()).ok().and_then(|address| to_std(&address));
    let state = match (remote, number(socket, libc::SO_ACCEPTCONN)) {
        (_, Some(1)) => State::Listening,
        (Some(_), _) => State::Established,
        (None, _) => State::Unconnected,
    };
    let Kind { family, form, protocol } = Kind::of(socket)?;
    Some(Entry {
        family,
        protocol: if form == libc::SOCK_RAW { libc::IPPROTO_RAW } else { protocol },
        state,
        local,
        remote,
        inode: 0,
        cookie: cookie(socket)?,
        cgroup: None,
    })
}

impl Entry {
    /// Returns the facts that policies match. The direction of a connection is unknown.
    #[must_use]
    pub fn facts(&self) -> Option<Socket> {
        let local = End {
            address: Some(self.local.ip()).filter(|address| !address.is_unspecified()),
            port: Some(self.local.port()).filter(|port| *port != 0),
        };
        // An AF_INET6 socket without an address can use IPv4 too.
        let family = (self.family == libc::AF_INET).then_some(Family::Ipv4);
        let direction = (self.state == State::Listening).then_some(Direction::Inbound);
        Socket::new(self.protocol(), family, direction, local, self.remote).ok()
    }

    /// Returns the protocol, as policies match it.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        match self.protocol {
            libc::IPPROTO_TCP | libc::IPPROTO_MPTCP => Protocol::Tcp,
            libc::IPPROTO_UDP => Protocol::Udp,
            libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6 => Protocol::Icmp,
            libc::IPPROTO_SCTP => Protocol::Sctp,
            _ => Protocol::Other,
        }
    }
}

impl State {
    /// Returns the state with this number (include/net/tcp_states.h), or `Unconnected` for an unknown number.
    pub(super) fn from_number(number: u8) -> Self {
        match number {
            1 => Self::Established,
            2 => Self::SynSent,
            // 12 is TCP_NEW_SYN_RECV: a connection request, for which no full socket exists yet.
            3 | 12 => Self::SynReceived,
            4 => Self::FinWait1,
            5 => Self::FinWait2,
            6 => Self::TimeWait,
            8 => Self::CloseWait,
            9 => Self::LastAck,
            10 => Self::Listening,
            11 => Self::Closing,
            _ => Self::Unconnected,
        }
    }

    /// Returns the number of the state (include/net/tcp_states.h).
    pub(super) fn number(self) -> u8 {
        match self {
            Self::Established => 1,
            Self::SynSent => 2,
            Self::SynReceived => 3,
            Self::FinWait1 => 4,
            Self::FinWait2 => 5,
            Self::TimeWait => 6,
            Self::Unconnected => 7,
            Self::CloseWait => 8,
            Self::LastAck => 9,
            Self::Listening => 10,
            Self::Closing => 11,
        }
    }

    /// Returns the name that ss(8) uses.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Established => "ESTAB",
            Self::SynSent => "SYN-SENT",
            Self::SynReceived => "SYN-RECV",
            Self::FinWait1 => "FIN-WAIT-1",
            Self::FinWait2 => "FIN-WAIT-2",
            Self::TimeWait => "TIME-WAIT",
            Self::Unconnected => "UNCONN",
            Self::CloseWait => "CLOSE-WAIT",
            Self::LastAck => "LAST-ACK",
            Self::Listening => "LISTEN",
            Self::Closing => "CLOSING",
        }
    }
}

impl Kind {
    /// Returns the kind of a socket, or `None` if its options cannot be read.
    #[must_use]
    pub fn of(socket: &OwnedFd) -> Option<Self> {
        let family = number(socket, libc::SO_DOMAIN)?;
        Some(Self { family, form: number(socket, libc::SO_TYPE)?, protocol: number(socket, libc::SO_PROTOCOL)? })
    }

    /// Creates a socket of this kind in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// Fails as socket(2) does.
    pub fn open(self) -> io::Result<OwnedFd> {
        // SAFETY: socket(2) takes no pointers.
        let socket = unsafe { libc::socket(self.family, self.form | libc::SOCK_CLOEXEC, self.protocol) };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just opened this descriptor, and nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(socket) })
    }
}

/// Options and their values, in the order of the request.
pub type Values = Vec<(&'static SocketOption, Value)>;

/// Returns the values of these options. Leaves out options that cannot be read, and options whose reading has an effect.
#[must_use]
pub fn values(socket: &OwnedFd, wanted: &[&'static SocketOption]) -> Values {
    let readable = wanted.iter().filter(|option| option.reading != Reading::Never);
    readable.filter_map(|option| Some((*option, value(socket, option.key())?))).collect()
}

/// The size of the buffer for a value in bytes: enough for any value that is not a list.
const BUFFER_SIZE: usize = 256;

/// Returns the value of an option, or `None` if getsockopt(2) fails.
#[must_use]
pub fn value(socket: &OwnedFd, key: OptionKey) -> Option<Value> {
    let mut bytes = [0; BUFFER_SIZE];
    let len = read(socket, key, &mut bytes)?;
    let mut captured = [0; TEXT_LEN];
    let captured_len = len.min(TEXT_LEN);
    captured[..captured_len].copy_from_slice(&bytes[..captured_len]);
    let ([first, second], _) = captured.as_chunks() else { return None };
    let words = [u64::from_ne_bytes(*first), u64::from_ne_bytes(*second)];
    // The kernel returns the length 0 for an empty name. In `Value`, the length 0 means that the value is unknown.
    let is_text = options::by_key(key).is_some_and(|option| option.value.abi_kind() == kind::TEXT);
    Some(Value::new(words, if is_text { len.max(1) } else { len } as u32))
}

/// Sets an option.
///
/// # Errors
///
/// Fails as setsockopt(2) does.
pub fn set(socket: &OwnedFd, key: OptionKey, value: &Value) -> io::Result<()> {
    let bytes = value.bytes();
    let len = (value.len as usize).min(bytes.len());
    // SAFETY: `bytes` has at least `len` bytes.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), key.level, key.name, bytes.as_ptr().cast(), len as libc::socklen_t)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Returns the direction of a TCP connection, from the socket's byte counters. Returns `None` if the counters do not show it.
///
/// For an outbound connection, the kernel counts the SYN among the acknowledged bytes (`tcp_snd_una_update`, called by
/// `tcp_rcv_synsent_state_process`), but not among the sent bytes. For an inbound connection, it counts the SYN in neither
/// (`tcp_create_openreq_child`).
#[must_use]
pub fn direction(socket: &OwnedFd) -> Option<Direction> {
    let before = Counts::of(socket)?;
    let mut queued: libc::c_int = 0;
    // SAFETY: TIOCOUTQ writes an int.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut queued) } != 0 {
        return None;
    }
    let unacknowledged = u64::try_from(queued).ok()?.checked_sub(before.unsent)?;
    // If the counters have changed in between, they are not consistent with `queued`.
    if Counts::of(socket)? != before {
        return None;
    }
    match (before.acknowledged + unacknowledged).checked_sub(before.sent) {
        Some(0) => Some(Direction::Inbound),
        Some(1) => Some(Direction::Outbound),
        _ => None,
    }
}

/// The byte counters of a connection that this end has not closed. A FIN would count as a byte too.
#[derive(PartialEq, Eq)]
struct Counts {
    acknowledged: u64,
    /// Sent bytes without retransmissions.
    sent: u64,
    /// Bytes that are queued and not sent yet.
    unsent: u64,
}

impl Counts {
    /// Reads the counters at their offsets in `struct tcp_info` (include/uapi/linux/tcp.h, Linux 4.19).
    fn of(socket: &OwnedFd) -> Option<Self> {
        const STATE: usize = 0;
        const BYTES_ACKED: usize = 120;
        const NOTSENT_BYTES: usize = 144;
        const BYTES_SENT: usize = 200;
        const BYTES_RETRANS: usize = 208;
        let mut info = [0; BUFFER_SIZE];
        let len = read(socket, OptionKey { level: Level::TCP.0, name: libc::TCP_INFO }, &mut info)?;
        let info = &info[..len];
        let wide = |offset: usize| Some(u64::from_ne_bytes(info.get(offset..offset + 8)?.try_into().ok()?));
        let unsent = u32::from_ne_bytes(info.get(NOTSENT_BYTES..NOTSENT_BYTES + 4)?.try_into().ok()?);
        if !matches!(State::from_number(*info.get(STATE)?), State::Established | State::CloseWait) {
            return None;
        }
        let sent = wide(BYTES_SENT)?.checked_sub(wide(BYTES_RETRANS)?)?;
        Some(Self { acknowledged: wide(BYTES_ACKED)?, sent, unsent: unsent.into() })
    }
}

/// Returns SO_COOKIE, which is unique among all sockets since boot.
#[must_use]
pub fn cookie(socket: &OwnedFd) -> Option<u64> {
    let mut cookie = [0; 8];
    let len = read(socket, OptionKey { level: Level::SOCKET.0, name: libc::SO_COOKIE }, &mut cookie)?;
    (len == cookie.len()).then(|| u64::from_ne_bytes(cookie))
}

/// Returns the inode number, which `/proc/PID/fd` shows.
#[must_use]
pub fn inode(socket: &OwnedFd) -> Option<u32> {
    fstat(socket).ok().and_then(|socket| u32::try_from(socket.st_ino).ok())
}

/// Returns the value of an option of SOL_SOCKET that is an `int`.
fn number(socket: &OwnedFd, name: i32) -> Option<i32> {
    let mut value = [0; 4];
    let len = read(socket, OptionKey { level: Level::SOCKET.0, name }, &mut value)?;
    (len == value.len()).then(|| i32::from_ne_bytes(value))
}

/// Calls getsockopt(2). Returns the length of the value in bytes.
fn read(socket: &OwnedFd, key: OptionKey, buffer: &mut [u8]) -> Option<usize> {
    let mut len = buffer.len() as libc::socklen_t;
    // SAFETY: `buffer` has `len` bytes.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), key.level, key.name, buffer.as_mut_ptr().cast(), &raw mut len) };
    (result == 0).then_some((len as usize).min(buffer.len()))
}

fn to_std(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddr::new(IpAddr::V4(v4.ip()), v4.port()));
    }
    address.as_sockaddr_in6().map(|v6| SocketAddr::new(IpAddr::V6(v6.ip()), v6.port()))
}
