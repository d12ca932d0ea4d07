//! Sockets of other processes, as they would see them themselves.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::sys::socket::{SockaddrStorage, getpeername, getsockname, getsockopt, sockopt};

use super::process;
use crate::policy::{
    End, Socket,
    model::{Direction, Family, Protocol},
};

/// The IPv4 and IPv6 sockets of a process, each with its descriptor there.
///
/// # Errors
///
/// Where there is no such process, or it must not be looked into.
pub fn of_process(process: u32) -> io::Result<Vec<(i32, Socket)>> {
    let handle = process::open(process)?;
    let mut descriptors = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        let entry = entry?;
        let leads_to = fs::read_link(entry.path()).unwrap_or_default();
        if leads_to.to_string_lossy().starts_with("socket:") {
            descriptors.extend(entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
        }
    }
    descriptors.sort_unstable();
    let mut sockets = Vec::new();
    for descriptor in descriptors {
        match process::take_descriptor(&handle, descriptor) {
            Ok(socket) => sockets.extend(describe(&socket).map(|socket| (descriptor, socket))),
            // It was closed meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sockets)
}

/// What a socket says of itself; `None` where policies are not about it. Of a connected one it does not say which end began.
fn describe(socket: &OwnedFd) -> Option<Socket> {
    let own = getsockname::<SockaddrStorage>(socket.as_raw_fd()).ok().and_then(|address| to_std(&address))?;
    let peer = getpeername::<SockaddrStorage>(socket.as_raw_fd()).ok().and_then(|address| to_std(&address));
    let protocol = match number(socket, libc::SO_PROTOCOL)? {
        libc::IPPROTO_TCP | libc::IPPROTO_MPTCP => Protocol::Tcp,
        libc::IPPROTO_UDP => Protocol::Udp,
        libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6 => Protocol::Icmp,
        libc::IPPROTO_SCTP => Protocol::Sctp,
        _ => Protocol::Other,
    };
    let is_listener = getsockopt(&socket.as_fd(), sockopt::AcceptConn).unwrap_or(false);
    let local = End {
        address: Some(own.ip()).filter(|address| !address.is_unspecified()),
        port: Some(own.port()).filter(|port| *port != 0),
    };
    // One without any address may carry either.
    let family = own.is_ipv4().then_some(Family::Ipv4);
    let direction = is_listener.then_some(Direction::Inbound);
    Socket::new(protocol, family, direction, local, peer).ok()
}

fn number(socket: &OwnedFd, option: i32) -> Option<i32> {
    let mut value = 0i32;
    let mut len = size_of_val(&value) as libc::socklen_t;
    // SAFETY: both point to what they are said to.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw mut value).cast(), &raw mut len)
    };
    (result == 0).then_some(value)
}

fn to_std(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddr::new(IpAddr::V4(v4.ip()), v4.port()));
    }
    address.as_sockaddr_in6().map(|v6| SocketAddr::new(IpAddr::V6(v6.ip()), v6.port()))
}
