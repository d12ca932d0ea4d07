//! Sockets of other processes, as they would see them themselves.

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

/// A socket, as the kernel lists it, or as it says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// AF_INET or AF_INET6
    pub family: i32,
    /// One of IPPROTO_; of a raw socket IPPROTO_RAW, whatever it is for.
    pub protocol: i32,
    pub state: State,
    pub local: SocketAddr,
    pub remote: Option<SocketAddr>,
    /// What `/proc/PID/fd` calls it; 0 where no process has it.
    pub inode: u32,
    pub cookie: u64,
    /// The id of the cgroup that it was made in, where the kernel told it.
    pub cgroup: Option<u64>,
}

/// The state of a socket, by the names that `ss` has for them. Those of TCP; others are connected or not.
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

/// What a socket was made as: the arguments of socket(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kind {
    pub family: i32,
    pub form: i32,
    pub protocol: i32,
}

/// What a socket says of itself; `None` where policies are not about it.
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
    /// What policies go by. Of a connected one it does not say which end began.
    #[must_use]
    pub fn facts(&self) -> Option<Socket> {
        let local = End {
            address: Some(self.local.ip()).filter(|address| !address.is_unspecified()),
            port: Some(self.local.port()).filter(|port| *port != 0),
        };
        // One of AF_INET6 without any address may carry either.
        let family = (self.family == libc::AF_INET).then_some(Family::Ipv4);
        let direction = (self.state == State::Listening).then_some(Direction::Inbound);
        Socket::new(self.protocol(), family, direction, local, self.remote).ok()
    }

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
    /// The state of a number (include/net/tcp_states.h); one that is bound and does nothing yet, and what is not known here, is
    /// not connected.
    pub(super) fn from_number(number: u8) -> Self {
        match number {
            1 => Self::Established,
            2 => Self::SynSent,
            // Also TCP_NEW_SYN_RECV: a connection that is not a socket of its own yet.
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

    /// The number of a state.
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
    /// What a socket was made as.
    #[must_use]
    pub fn of(socket: &OwnedFd) -> Option<Self> {
        let family = number(socket, libc::SO_DOMAIN)?;
        Some(Self { family, form: number(socket, libc::SO_TYPE)?, protocol: number(socket, libc::SO_PROTOCOL)? })
    }

    /// A new socket of the kind, in the network namespace of this thread.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn open(self) -> io::Result<OwnedFd> {
        // SAFETY: takes numbers.
        let socket = unsafe { libc::socket(self.family, self.form | libc::SOCK_CLOEXEC, self.protocol) };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it, for us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(socket) })
    }
}

/// Options with their values, in the order in which they were asked for.
pub type Values = Vec<(&'static SocketOption, Value)>;

/// The values of these options, as far as the socket has them and they can be read; none that reading would do something to.
#[must_use]
pub fn values(socket: &OwnedFd, wanted: &[&'static SocketOption]) -> Values {
    let readable = wanted.iter().filter(|option| option.reading != Reading::Never);
    readable.filter_map(|option| Some((*option, value(socket, option.key())?))).collect()
}

/// Room for any value that is not a list.
const ROOM: usize = 256;

/// What getsockopt shows of an option; `None` where it fails.
#[must_use]
pub fn value(socket: &OwnedFd, key: OptionKey) -> Option<Value> {
    let mut bytes = [0; ROOM];
    let len = read(socket, key, &mut bytes)?;
    let mut captured = [0; TEXT_LEN];
    let known = len.min(TEXT_LEN);
    captured[..known].copy_from_slice(&bytes[..known]);
    let ([first, second], _) = captured.as_chunks() else { return None };
    let words = [u64::from_ne_bytes(*first), u64::from_ne_bytes(*second)];
    // A name that is not there has no length, and no length means that a value is not known.
    let is_text = options::by_key(key).is_some_and(|option| option.value.abi_kind() == kind::TEXT);
    Some(Value::new(words, if is_text { len.max(1) } else { len } as u32))
}

/// Sets an option.
///
/// # Errors
///
/// The kernel's.
pub fn set(socket: &OwnedFd, key: OptionKey, value: &Value) -> io::Result<()> {
    let bytes = value.bytes();
    let len = (value.len as usize).min(bytes.len());
    // SAFETY: `len` bytes of the value.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), key.level, key.name, bytes.as_ptr().cast(), len as libc::socklen_t)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Which end began a TCP connection, told from what it has counted; `None` where that does not tell.
///
/// The kernel counts the SYN of who connects among the bytes that were acknowledged (`tcp_snd_una_update`, from
/// `tcp_rcv_synsent_state_process`), but never among those sent, and of who accepts neither (`tcp_create_openreq_child`).
#[must_use]
pub fn direction(socket: &OwnedFd) -> Option<Direction> {
    let before = Counts::of(socket)?;
    let mut queued: libc::c_int = 0;
    // SAFETY: writes an int.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut queued) } != 0 {
        return None;
    }
    let on_the_way = u64::try_from(queued).ok()?.checked_sub(before.unsent)?;
    // What counts up meanwhile tells nothing.
    if Counts::of(socket)? != before {
        return None;
    }
    match (before.acknowledged + on_the_way).checked_sub(before.sent) {
        Some(0) => Some(Direction::Inbound),
        Some(1) => Some(Direction::Outbound),
        _ => None,
    }
}

/// Bytes of a connection that has not begun to end from here: that counts as one, too.
#[derive(PartialEq, Eq)]
struct Counts {
    acknowledged: u64,
    /// Each once.
    sent: u64,
    /// Still waiting.
    unsent: u64,
}

impl Counts {
    /// By their places in `struct tcp_info` (include/uapi/linux/tcp.h; 4.19).
    fn of(socket: &OwnedFd) -> Option<Self> {
        const STATE: usize = 0;
        const BYTES_ACKED: usize = 120;
        const NOTSENT_BYTES: usize = 144;
        const BYTES_SENT: usize = 200;
        const BYTES_RETRANS: usize = 208;
        let mut info = [0; ROOM];
        let len = read(socket, OptionKey { level: Level::TCP.0, name: libc::TCP_INFO }, &mut info)?;
        let info = &info[..len];
        let wide = |at: usize| Some(u64::from_ne_bytes(info.get(at..at + 8)?.try_into().ok()?));
        let unsent = u32::from_ne_bytes(info.get(NOTSENT_BYTES..NOTSENT_BYTES + 4)?.try_into().ok()?);
        if !matches!(State::from_number(*info.get(STATE)?), State::Established | State::CloseWait) {
            return None;
        }
        let sent = wide(BYTES_SENT)?.checked_sub(wide(BYTES_RETRANS)?)?;
        Some(Self { acknowledged: wide(BYTES_ACKED)?, sent, unsent: unsent.into() })
    }
}

/// What tells a socket from all others as long as this kernel runs.
#[must_use]
pub fn cookie(socket: &OwnedFd) -> Option<u64> {
    let mut cookie = [0; 8];
    let len = read(socket, OptionKey { level: Level::SOCKET.0, name: libc::SO_COOKIE }, &mut cookie)?;
    (len == cookie.len()).then(|| u64::from_ne_bytes(cookie))
}

/// What `/proc/PID/fd` calls it.
#[must_use]
pub fn inode(socket: &OwnedFd) -> Option<u32> {
    fstat(socket).ok().and_then(|socket| u32::try_from(socket.st_ino).ok())
}

/// An option of SOL_SOCKET that is an `int`.
fn number(socket: &OwnedFd, name: i32) -> Option<i32> {
    let mut value = [0; 4];
    let len = read(socket, OptionKey { level: Level::SOCKET.0, name }, &mut value)?;
    (len == value.len()).then(|| i32::from_ne_bytes(value))
}

/// Calls getsockopt; gives the length of the value.
fn read(socket: &OwnedFd, key: OptionKey, room: &mut [u8]) -> Option<usize> {
    let mut len = room.len() as libc::socklen_t;
    // SAFETY: `len` bytes of room.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), key.level, key.name, room.as_mut_ptr().cast(), &raw mut len) };
    (result == 0).then_some((len as usize).min(room.len()))
}

fn to_std(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddr::new(IpAddr::V4(v4.ip()), v4.port()));
    }
    address.as_sockaddr_in6().map(|v6| SocketAddr::new(IpAddr::V6(v6.ip()), v6.port()))
}
