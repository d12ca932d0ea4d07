//! System calls on sockets.

use std::{
    io, mem,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
};

/// An option: level, number, and its name in the report.
pub(crate) type Option = (i32, i32, &'static str);

pub(crate) const TCP_NODELAY: Option = (libc::SOL_TCP, libc::TCP_NODELAY, "TCP_NODELAY");
pub(crate) const SO_KEEPALIVE: Option = (libc::SOL_SOCKET, libc::SO_KEEPALIVE, "SO_KEEPALIVE");
pub(crate) const TCP_KEEPIDLE: Option = (libc::SOL_TCP, libc::TCP_KEEPIDLE, "TCP_KEEPIDLE");
pub(crate) const TCP_KEEPCNT: Option = (libc::SOL_TCP, libc::TCP_KEEPCNT, "TCP_KEEPCNT");
pub(crate) const SO_MARK: Option = (libc::SOL_SOCKET, libc::SO_MARK, "SO_MARK");
pub(crate) const SO_PRIORITY: Option = (libc::SOL_SOCKET, libc::SO_PRIORITY, "SO_PRIORITY");
pub(crate) const IP_TOS: Option = (libc::SOL_IP, libc::IP_TOS, "IP_TOS");
pub(crate) const SO_SNDBUF: Option = (libc::SOL_SOCKET, libc::SO_SNDBUF, "SO_SNDBUF");
/// Sets the same value as SO_SNDBUF.
pub(crate) const SO_SNDBUFFORCE: Option = (libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, "SO_SNDBUF");
/// Another way to change SO_SNDBUF: without the buffer lock, the kernel sizes the buffer.
pub(crate) const SO_BUF_LOCK: Option = (libc::SOL_SOCKET, 72, "SO_SNDBUF");
pub(crate) const IP_TTL: Option = (libc::SOL_IP, libc::IP_TTL, "IP_TTL");
pub(crate) const TCP_QUICKACK: Option = (libc::SOL_TCP, libc::TCP_QUICKACK, "TCP_QUICKACK");

fn checked(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

pub(crate) fn open(family: i32, kind: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers; the descriptor is new.
    checked(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, 0) }).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(crate) fn set(fd: &impl AsRawFd, (level, name, _): Option, value: i32) -> io::Result<()> {
    // SAFETY: the value has the length that is passed.
    let result = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), 4) };
    checked(result).map(drop)
}

pub(crate) fn get(fd: &impl AsRawFd, (level, name, _): Option) -> io::Result<i32> {
    let (mut value, mut len) = (0, 4);
    // SAFETY: the buffer has the length that is passed.
    let result =
        unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, ptr::from_mut::<i32>(&mut value).cast(), &raw mut len) };
    checked(result).map(|_| value)
}

/// Makes the socket send a reset when it is closed, so that no port stays in use.
pub(crate) fn reset_on_close(fd: &impl AsRawFd) -> io::Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let (value, len) = (&raw const linger, size_of_val(&linger) as u32);
    // SAFETY: the value has the length that is passed.
    checked(unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, value.cast(), len) }).map(drop)
}

pub(crate) fn connect(fd: &impl AsRawFd, to: SocketAddr) -> io::Result<()> {
    let (address, len) = raw(to);
    // SAFETY: the address has the length that is passed.
    checked(unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), len) }).map(drop)
}

pub(crate) fn bind(fd: &impl AsRawFd, to: SocketAddr) -> io::Result<()> {
    let (address, len) = raw(to);
    // SAFETY: the address has the length that is passed.
    checked(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) }).map(drop)
}

/// Returns the address in the kernel's format, and its length.
fn raw(address: SocketAddr) -> (libc::sockaddr_storage, u32) {
    // SAFETY: zero is valid for each field.
    let mut storage: libc::sockaddr_storage = unsafe { mem::zeroed() };
    let at = &raw mut storage;
    match address {
        SocketAddr::V4(v4) => {
            let sin_addr = libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) };
            let sin_family = libc::AF_INET as u16;
            let value = libc::sockaddr_in { sin_family, sin_port: v4.port().to_be(), sin_addr, sin_zero: [0; 8] };
            // SAFETY: sockaddr_storage has room for every address.
            unsafe { at.cast::<libc::sockaddr_in>().write(value) };
            (storage, size_of_val(&value) as u32)
        }
        SocketAddr::V6(v6) => {
            let value = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as u16,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: 0,
            };
            // SAFETY: as above.
            unsafe { at.cast::<libc::sockaddr_in6>().write(value) };
            (storage, size_of_val(&value) as u32)
        }
    }
}

/// Returns the unspecified address of the same family with the same port, which connects to this host.
pub(crate) fn any(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) => (Ipv4Addr::UNSPECIFIED, v4.port()).into(),
        SocketAddr::V6(v6) => (Ipv6Addr::UNSPECIFIED, v6.port()).into(),
    }
}
