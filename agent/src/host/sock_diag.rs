//! Which sockets there are in a network namespace, as the kernel lists them (sock_diag(7)).
//!
//! It lists what is bound or connected, of TCP, UDP, MPTCP and, where it was built with that, raw sockets; also what no process
//! has any more, or yet. It takes no rights, but sockets' cgroups are told since 5.7 only.
//!
//! A list is not of one moment: a socket that comes or goes meanwhile is in it or is not, and one may be in it twice.

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
/// TCPDIAG_GETSOCK (include/uapi/linux/inet_diag.h): sockets of TCP whatever their family, in one walk over a table that may be
/// large however few there are. For other protocols there is no such request.
const OF_TCP: u16 = 18;
/// INET_DIAG_REQ_PROTOCOL (include/uapi/linux/inet_diag.h): for protocols whose number does not fit a byte.
const REQUESTED_PROTOCOL: u16 = 3;
/// INET_DIAG_CGROUP_ID
const CGROUP_ID: u16 = 21;
/// Of `struct inet_diag_req`.
const TCP_REQUEST_LEN: usize = 60;
/// Of `struct inet_diag_req_v2`, and of `struct inet_diag_msg`, which attributes follow.
const REQUEST_LEN: usize = 56;
const ENTRY_LEN: usize = 72;
/// The attribute of a request: its header and a number.
const ATTRIBUTE_LEN: u16 = 8;

/// The sockets of this thread's network namespace, by what the kernel calls them: protocols that it does not list have none.
///
/// # Errors
///
/// Where the kernel does not answer.
pub fn list() -> io::Result<Vec<Entry>> {
    let socket = netlink::open(NETLINK_SOCK_DIAG)?;
    let mut found = Vec::new();
    // Gives whether the kernel knows the request.
    let mut ask = |protocol, request| {
        let listed = netlink::dump(&socket, request, |message| {
            if let Message::Entry(entry) = message {
                found.push(Entry { protocol, ..entry });
            }
        });
        match listed {
            // Of a protocol that it does not list, and of a kind that it does not answer (`sock_diag_rcv_msg`,
            // net/core/sock_diag.c).
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EOPNOTSUPP)) => Ok(false),
            listed => listed.map(|()| true),
        }
    };
    let is_told = ask(libc::IPPROTO_TCP, Message::RequestTcp)?;
    let others = [libc::IPPROTO_UDP, libc::IPPROTO_RAW, libc::IPPROTO_MPTCP];
    for protocol in others.into_iter().chain((!is_told).then_some(libc::IPPROTO_TCP)) {
        for family in [libc::AF_INET, libc::AF_INET6] {
            if !ask(protocol, Message::Request { family, protocol })? {
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
            // In every state.
            buffer[52..56].fill(0xff);
            return;
        };
        buffer[0] = *family as u8;
        // MPTCP's number does not fit: what is left of it is that of TCP.
        buffer[1] = *protocol as u8;
        // In every state.
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
        let entry = parse(payload).ok_or_else(|| DecodeError::from("a socket that is cut short"))?;
        Ok(Self::Entry(entry))
    }
}

/// Reads the sockets in a datagram of the kernel's.
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

/// An entry of a list, whose protocol is known from the request. `None` where it is cut short.
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
        // Two words, the lower one first.
        cookie: u64::from(word(head, 44)?) | u64::from(word(head, 48)?) << 32,
        cgroup,
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The address and the port at these places.
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

    /// What Linux 6.18 said of a TCP listener on 127.0.0.1:8080.
    const LISTENER: &str = "\
        020a00001f9000007f00000100000000000000000000000000000000000000000000000000000000\
        00000000d74102000000000000000000000000008000000000000000782817000500080000000000\
        08000f00000000000c00150001000000000000000600160052000000";
    /// And of a UDP socket connected to [::1]:8081.
    const DATAGRAM: &str = "\
        0a010000b1581f9100000000000000000000000000000001000000000000000000000000000000010\
        0000000d941020000000000000000000000000000000000000000007d2817000500080000000000080\
        00f00000000000c00150001000000000000000600160010000000";

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len() / 2).map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn entries_are_what_the_kernel_says_of_sockets() {
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
    fn what_is_cut_short_is_no_entry_and_attributes_that_are_tell_nothing() {
        let whole = bytes(LISTENER);
        for len in 0..whole.len() {
            let entry = parse(&whole[..len]);
            assert_eq!(entry.is_some(), len >= ENTRY_LEN, "{len}");
            // That attribute is the third.
            let has_cgroup = len >= ENTRY_LEN + 5 + 3 + 8 + 12;
            assert_eq!(entry.and_then(|entry| entry.cgroup).is_some(), has_cgroup, "{len}");
        }
    }
}
