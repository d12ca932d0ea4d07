//! Lists the sockets of a network namespace (sock_diag(7)).
//!
//! The kernel lists the bound and connected sockets of TCP, UDP and MPTCP. It lists raw sockets if it was built with
//! CONFIG_INET_RAW_DIAG. The list also contains sockets for which no process has a descriptor. Listing requires no
//! capabilities. The cgroup of a socket is listed since Linux 5.7.
//!
//! A list is not atomic: a socket that is created or closed at the same time can be missing, and a socket can be listed twice.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use netlink_packet_core::{
    DecodeError, NetlinkDeserializable, NetlinkHeader, NetlinkPayload, NetlinkSerializable, NlasIterator,
};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use super::{
    netlink,
    socket::{Entry, State},
};

/// SOCK_DIAG_BY_FAMILY (include/uapi/linux/sock_diag.h)
const BY_FAMILY: u16 = 20;
/// TCPDIAG_GETSOCK (include/uapi/linux/inet_diag.h). Lists the TCP sockets of all families in one pass over the kernel's table,
/// which can be large even if it contains few sockets. Other protocols have no such request.
const OF_TCP: u16 = 18;
/// INET_DIAG_REQ_PROTOCOL (include/uapi/linux/inet_diag.h): for protocol numbers that do not fit into a byte.
const REQUESTED_PROTOCOL: u16 = 3;
/// INET_DIAG_CGROUP_ID
const CGROUP_ID: u16 = 21;
/// The size of `struct inet_diag_req` in bytes.
const TCP_REQUEST_LEN: usize = 60;
/// The size of `struct inet_diag_req_v2` in bytes.
const REQUEST_LEN: usize = 56;
/// The size of `struct inet_diag_msg`, which attributes follow, in bytes.
const ENTRY_LEN: usize = 72;
/// The size of the attribute of a request, a header and a number, in bytes.
const ATTRIBUTE_LEN: u16 = 8;

/// Returns the sockets of the network namespace of the calling thread. Sockets of protocols that the kernel does not list are
/// missing.
///
/// # Errors
///
/// Fails if the list cannot be read.
pub fn list() -> io::Result<Vec<Entry>> {
    let socket = netlink::open(NETLINK_SOCK_DIAG)?;
    let mut found = Vec::new();
    // Returns whether the kernel supports the request.
    let mut request_list = |protocol, request| {
        let listed = netlink::dump(&socket, request, |message| {
            if let Message::Entry(entry) = message {
                found.push(Entry { protocol, ..entry });
            }
        });
        match listed {
            // The kernel does not list this protocol, or does not support this type of request (`sock_diag_rcv_msg`,
            // net/core/sock_diag.c).
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EOPNOTSUPP)) => Ok(false),
            listed => listed.map(|()| true),
        }
    };
    let has_tcp = request_list(libc::IPPROTO_TCP, Message::RequestTcp)?;
    let others = [libc::IPPROTO_UDP, libc::IPPROTO_RAW, libc::IPPROTO_MPTCP];
    for protocol in others.into_iter().chain((!has_tcp).then_some(libc::IPPROTO_TCP)) {
        for family in [libc::AF_INET, libc::AF_INET6] {
            if !request_list(protocol, Message::Request { family, protocol })? {
                log::debug!("this kernel does not list sockets of protocol {protocol}");
            }
        }
    }
    Ok(found)
}

#[derive(Debug)]
enum Message {
    RequestTcp,
    Request { family: i32, protocol: i32 },
    Entry(Entry),
}

impl From<Message> for NetlinkPayload<Message> {
    fn from(message: Message) -> Self {
        Self::InnerMessage(message)
    }
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        if matches!(self, Self::RequestTcp) { OF_TCP } else { BY_FAMILY }
    }

    fn buffer_len(&self) -> usize {
        if matches!(self, Self::RequestTcp) { TCP_REQUEST_LEN } else { REQUEST_LEN + usize::from(ATTRIBUTE_LEN) }
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.fill(0);
        let Self::Request { family, protocol } = self else {
            // All states.
            buffer[52..56].fill(0xff);
            return;
        };
        buffer[0] = *family as u8;
        // The number of MPTCP does not fit into a byte; its low byte is the number of TCP. The attribute has the whole number.
        buffer[1] = *protocol as u8;
        // All states.
        buffer[4..8].fill(0xff);
        let attribute = &mut buffer[REQUEST_LEN..];
        attribute[..2].copy_from_slice(&ATTRIBUTE_LEN.to_ne_bytes());
        attribute[2..4].copy_from_slice(&REQUESTED_PROTOCOL.to_ne_bytes());
        attribute[4..].copy_from_slice(&protocol.to_ne_bytes());
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let entry = parse(payload).ok_or_else(|| DecodeError::from("cannot parse a listed socket: truncated"))?;
        Ok(Self::Entry(entry))
    }
}

/// Parses a datagram with sockets.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn in_datagram(datagram: &[u8]) -> io::Result<Vec<Entry>> {
    let mut found = Vec::new();
    netlink::each_message(datagram, &mut |message| {
        if let Message::Entry(entry) = message {
            found.push(entry);
        }
    })?;
    Ok(found)
}

/// Parses an entry of a list. The protocol is left 0, since only the request names it. Returns `None` if the entry is
/// truncated.
fn parse(payload: &[u8]) -> Option<Entry> {
    let (head, attributes) = payload.split_at_checked(ENTRY_LEN)?;
    let family = i32::from(head[0]);
    let local = address(family, head, 8, 4)?;
    let remote = address(family, head, 24, 6)?;
    let cgroup = NlasIterator::new(attributes)
        .map_while(Result::ok)
        .find(|attribute| attribute.kind() == CGROUP_ID)
        .and_then(|attribute| Some(u64::from_ne_bytes(attribute.value().try_into().ok()?)));
    Some(Entry {
        family,
        protocol: 0,
        state: State::from_number(head[1]),
        local,
        remote: Some(remote).filter(|remote| !remote.ip().is_unspecified() || remote.port() != 0),
        inode: word(head, 68)?,
        // Two words, the low word first.
        cookie: u64::from(word(head, 44)?) | u64::from(word(head, 48)?) << 32,
        cgroup,
    })
}

fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(offset..offset + 4)?.try_into().ok()?))
}

/// Parses an address and a port at these offsets.
fn address(family: i32, bytes: &[u8], address: usize, port: usize) -> Option<SocketAddr> {
    let octets: [u8; 16] = bytes.get(address..address + 16)?.try_into().ok()?;
    let [a, b, c, d, ..] = octets;
    let ip = match family {
        libc::AF_INET => IpAddr::from(Ipv4Addr::new(a, b, c, d)),
        _ => IpAddr::from(Ipv6Addr::from(octets)),
    };
    Some(SocketAddr::new(ip, u16::from_be_bytes(bytes.get(port..port + 2)?.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The entry of Linux 6.18 for a TCP listener on 127.0.0.1:8080.
    const LISTENER: &str = "\
        020a00001f9000007f00000100000000000000000000000000000000000000000000000000000000\
        00000000d74102000000000000000000000000008000000000000000782817000500080000000000\
        08000f00000000000c00150001000000000000000600160052000000";
    /// The entry of Linux 6.18 for a UDP socket connected to [::1]:8081.
    const DATAGRAM: &str = "\
        0a010000b1581f9100000000000000000000000000000001000000000000000000000000000000010\
        0000000d941020000000000000000000000000000000000000000007d2817000500080000000000080\
        00f00000000000c00150001000000000000000600160010000000";

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len() / 2).map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn entries_of_the_kernel_are_parsed() {
        let listener = Entry {
            family: libc::AF_INET,
            protocol: 0,
            state: State::Listening,
            local: "127.0.0.1:8080".parse().unwrap(),
            remote: None,
            inode: 0x0017_2878,
            cookie: 0x241d7,
            cgroup: Some(1),
        };
        assert_eq!(parse(&bytes(LISTENER)), Some(listener));
        let datagram = Entry {
            family: libc::AF_INET6,
            protocol: 0,
            state: State::Established,
            local: "[::1]:45400".parse().unwrap(),
            remote: Some("[::1]:8081".parse().unwrap()),
            inode: 0x0017_287d,
            cookie: 0x241d9,
            cgroup: Some(1),
        };
        assert_eq!(parse(&bytes(DATAGRAM)), Some(datagram));
    }

    #[test]
    fn truncated_entry_is_rejected_and_truncated_attribute_ignored() {
        let whole = bytes(LISTENER);
        for len in 0..whole.len() {
            let entry = parse(&whole[..len]);
            assert_eq!(entry.is_some(), len >= ENTRY_LEN, "{len}");
            // The cgroup is the third attribute.
            let has_cgroup = len >= ENTRY_LEN + 5 + 3 + 8 + 12;
            assert_eq!(entry.and_then(|entry| entry.cgroup).is_some(), has_cgroup, "{len}");
        }
    }
}
