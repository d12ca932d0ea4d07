//! What sockpolicy does not support because no kernel offers a way: one list for `check`, `plan`, `explain`, reports,
//! `verify` and docs/reference.md.
//!
//! Pure: the list is the same for every kernel. What only the running kernel lacks is a
//! [`crate::unsupported::Unsupported`].

use abi::{apply_point, setting::traits};

use crate::{
    options::{Reading, SocketOption},
    policy::{
        Socket,
        model::{Form, Named, Protocol, Selector},
    },
};

/// Something that is not supported.
#[derive(Debug, PartialEq, Eq)]
pub struct Limitation {
    /// The name in JSON.
    pub name: &'static str,
    /// The sockets or packets that it applies to.
    pub of: &'static str,
    /// What is not done.
    pub what: &'static str,
    /// The reason: what the kernel does, or does not offer.
    pub why: &'static str,
}

/// How a rule is affected by a limitation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Concern {
    /// The rule may match such sockets.
    May,
    /// The rule explicitly matches such sockets.
    Asked,
}

pub const RAW: Limitation = Limitation {
    name: "raw",
    of: "raw, SCTP and other sockets without a name under `protocol`",
    what: "without BPF LSM, only SO_MARK, SO_PRIORITY and SO_BINDTOIFINDEX are set; `limit` and `deny` apply",
    why: "the kernel runs no other program that can set options of such a socket at creation, bind, connect or send",
};

pub const PING: Limitation = Limitation {
    name: "ping",
    of: "ICMP datagram sockets",
    what: "without BPF LSM, SO_MARK, SO_PRIORITY and SO_BINDTOIFINDEX are set at creation, other options only if the socket \
           connects",
    why: "the kernel runs no program when these sockets bind or send, and before 6.1 none when they connect",
};

pub const UDP_LITE: Limitation = Limitation {
    name: "udp-lite",
    of: "UDP-Lite sockets, which have the protocol `other`",
    what: "without BPF LSM, SO_MARK, SO_PRIORITY and SO_BINDTOIFINDEX are set at creation, other options at bind or \
           with the first datagram, but none at connect",
    why: "the kernel runs no program when these sockets connect",
};

pub const MULTIPATH: Limitation = Limitation {
    name: "mptcp",
    of: "MPTCP sockets",
    what: "options are set on the subflows; getsockopt on the application's socket may return other values",
    why: "programs cannot set options of the MPTCP socket itself",
};

pub const UNCONNECTED: Limitation = Limitation {
    name: "unconnected",
    of: "UDP sockets that send without connect",
    what: "rules about the peer do not match them; such a rule's `limit` or `deny` of an option that cannot be corrected later applies to \
           all calls on these sockets",
    why: "the kernel reads the options of a datagram before it runs a program that can read the peer",
};

pub const UNBOUND: Limitation = Limitation {
    name: "unbound",
    of: "UDP sockets that connect before they have a local address or port",
    what: "rules about the local address or port set nothing on them; `limit` and `deny` of such rules apply to all of them",
    why: "the kernel chooses the local address and port after it has run the last program",
};

pub const FIRST_DATAGRAM: Limitation = Limitation {
    name: "first-datagram",
    of: "the first datagram after connect(AF_UNSPEC); without BPF LSM, also the first datagram of a UDP socket that is neither bound nor \
         connected",
    what: "it is sent with the previous values of the options",
    why: "the kernel reads mark, priority, DSCP and device before it runs a program",
};

pub const DEVICE: Limitation = Limitation {
    name: "link-local-device",
    of: "sockets that bind to a link-local IPv6 address with a scope",
    what: "if the socket's owner lacks CAP_NET_RAW, the socket keeps the device of the address, and counts as failed",
    why: "the kernel binds the socket to that device after the program has run, and then requires CAP_NET_RAW to change it",
};

pub const CONTROL_MESSAGES: Limitation = Limitation {
    name: "control-messages",
    of: "datagrams sent with control messages (sendmsg)",
    what: "values in control messages are neither judged nor replaced",
    why: "the kernel runs no program for control messages",
};

pub const BUFFERS: Limitation = Limitation {
    name: "buffer-tuning",
    of: "sockets whose buffer a rule no longer sets because the peer has changed",
    what: "the size is restored, but the kernel no longer tunes the buffer",
    why: "programs cannot unlock a buffer",
};

pub const DIRECTION: Limitation = Limitation {
    name: "direction",
    of: "TCP sockets that connect, or try to, and later listen, or the other way round",
    what: "an option that no rule sets any longer keeps its value",
    why: "the previous values would have to be stored for every connection",
};

pub const FAMILIES: Limitation = Limitation {
    name: "families",
    of: "AF_UNIX, netlink, packet, vsock and all other sockets that are neither AF_INET nor AF_INET6",
    what: "policies do not apply to them",
    why: "policies are about IP sockets",
};

/// All limitations, in the order in which they are shown.
pub const ALL: &[&Limitation] = &[
    &RAW,
    &PING,
    &UDP_LITE,
    &MULTIPATH,
    &UNCONNECTED,
    &UNBOUND,
    &FIRST_DATAGRAM,
    &DEVICE,
    &CONTROL_MESSAGES,
    &BUFFERS,
    &DIRECTION,
    &FAMILIES,
];

/// Options that a control message can set for one datagram (`__sock_cmsg_send`, net/core/sock.c; `ip_cmsg_send`,
/// net/ipv4/ip_sockglue.c; `ip6_datagram_send_ctl`, net/ipv6/datagram.c).
const IN_CONTROL_MESSAGES: &[&str] = &[
    "SO_MARK",
    "SO_PRIORITY",
    "SO_BINDTODEVICE",
    "SO_BINDTOIFINDEX",
    "IP_TOS",
    "IP_TTL",
    "IPV6_TCLASS",
    "IPV6_UNICAST_HOPS",
    "IPV6_DONTFRAG",
    "UDP_SEGMENT",
];

/// Limitations that apply only if the BPF LSM is not active.
pub const WITHOUT_LSM: [&Limitation; 3] = [&RAW, &PING, &UDP_LITE];

/// Returns the limitations that affect a rule's setting for an option, and how they affect the rule.
#[must_use]
pub fn of_rule(selector: &Selector, option: Named, form: &Form) -> Vec<(&'static Limitation, Concern)> {
    ALL.iter().filter_map(|entry| Some((*entry, concern(entry, selector, option, form)?))).collect()
}

fn concern(entry: &Limitation, selector: &Selector, option: Named, form: &Form) -> Option<Concern> {
    let Named::Known(option) = option else { return None };
    if *form == Form::Free {
        return None;
    }
    let sets = matches!(form, Form::Set(_));
    let by_protocol = |protocols: &[Protocol]| {
        if selector.protocols.is_empty() {
            return (option.traits & traits::TCP == 0 || protocols.contains(&Protocol::Tcp)).then_some(Concern::May);
        }
        protocols.iter().any(|protocol| selector.protocols.contains(protocol)).then_some(Concern::Asked)
    };
    let may = |holds: bool| holds.then_some(Concern::May);
    let sends = || may(by_protocol(&[Protocol::Udp, Protocol::Icmp, Protocol::Other]).is_some());
    match entry.name {
        "raw" if sets && !is_set_at_creation(option) => by_protocol(&[Protocol::Other, Protocol::Sctp]),
        "ping" if sets && !is_set_at_creation(option) => by_protocol(&[Protocol::Icmp]),
        "udp-lite" if sets && !is_set_at_creation(option) => may(by_protocol(&[Protocol::Other]).is_some()),
        "mptcp" if sets => may(by_protocol(&[Protocol::Tcp]).is_some()),
        "unconnected" if needs_peer(selector) => by_protocol(&[Protocol::Udp]),
        "unbound" if needs_local_end(selector) => by_protocol(&[Protocol::Udp]),
        "first-datagram" if sets && !is_set_at_creation(option) => may(by_protocol(&[Protocol::Udp]).is_some()),
        "link-local-device" => may(sets && option.traits & traits::DEVICE != 0),
        "control-messages" if IN_CONTROL_MESSAGES.contains(&option.name) => sends(),
        "buffer-tuning" => may(sets && needs_peer(selector) && matches!(option.reading, Reading::Tuned { .. })),
        "direction" => may(sets && selector.direction.is_some()),
        _ => None,
    }
}

/// Returns the limitations for an option that a rule sets on a described socket. The rule must match the socket.
#[must_use]
pub fn of_socket(socket: &Socket, selector: &Selector, option: Named, form: &Form) -> Vec<&'static Limitation> {
    let Named::Known(option) = option else { return Vec::new() };
    if !matches!(form, Form::Set(_)) {
        return Vec::new();
    }
    if socket.protocol == Some(Protocol::Udp) && socket.remote.is_some() {
        let may = [(&UNCONNECTED, needs_peer(selector)), (&UNBOUND, needs_local_end(selector))];
        return may.into_iter().filter_map(|(entry, holds)| holds.then_some(entry)).collect();
    }
    if is_set_at_creation(option) {
        return Vec::new();
    }
    match socket.protocol {
        Some(Protocol::Other) => vec![&RAW, &UDP_LITE],
        Some(Protocol::Sctp) => vec![&RAW],
        Some(Protocol::Icmp) => vec![&PING],
        _ => Vec::new(),
    }
}

/// Returns whether sockets of a protocol other than TCP and UDP may pass an apply point after their creation.
#[must_use]
pub fn may_come_by(protocol: Option<Protocol>, at: u32) -> bool {
    match protocol {
        Some(Protocol::Icmp) => at == apply_point::CONNECT_DATAGRAM,
        // UDP-Lite sockets.
        Some(Protocol::Other) => at == apply_point::BIND_DATAGRAM || at == apply_point::SEND,
        _ => false,
    }
}

fn is_set_at_creation(option: &SocketOption) -> bool {
    option.settable().is_some_and(|settable| settable.sites.contains(apply_point::SOCK_CREATE))
}

fn needs_peer(selector: &Selector) -> bool {
    !(selector.remote.is_empty() && selector.not_remote.is_empty() && selector.remote_ports.is_empty())
}

fn needs_local_end(selector: &Selector) -> bool {
    !(selector.local.is_empty() && selector.local_ports.is_empty())
}

impl std::fmt::Display for Limitation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}, because {}", self.of, self.what, self.why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options;

    fn named(name: &str) -> Named {
        Named::Known(options::by_name(name).unwrap())
    }

    fn names(selector: &Selector, option: &str, form: &Form) -> Vec<(&'static str, Concern)> {
        of_rule(selector, named(option), form).into_iter().map(|(entry, concern)| (entry.name, concern)).collect()
    }

    #[test]
    fn names_are_unique() {
        let names: std::collections::BTreeSet<_> = ALL.iter().map(|entry| entry.name).collect();
        assert_eq!(names.len(), ALL.len());
        for name in IN_CONTROL_MESSAGES {
            assert!(options::by_name(name).is_some(), "{name}");
        }
    }

    #[test]
    fn explicit_match_is_distinguished_from_possible_match() {
        use crate::policy::model::Wanted;
        let set = Form::Set(Wanted::Number { value: 3, mask: u32::MAX });
        let all = Selector::default();
        let raw = Selector { protocols: vec![Protocol::Other], ..Selector::default() };
        assert!(names(&all, "SO_RCVLOWAT", &set).contains(&("raw", Concern::May)));
        assert!(names(&raw, "SO_RCVLOWAT", &set).contains(&("raw", Concern::Asked)));
        assert!(!names(&raw, "SO_MARK", &set).iter().any(|(name, _)| *name == "raw"));
        assert!(!names(&all, "TCP_KEEPIDLE", &set).iter().any(|(name, _)| *name == "raw"));
        assert_eq!(names(&raw, "SO_KEEPALIVE", &Form::Deny), []);
    }

    #[test]
    fn limitations_of_described_sockets_are_found() {
        let form = Form::Set(crate::policy::model::Wanted::Number { value: 3, mask: u32::MAX });
        let socket = |protocol| Socket::new(protocol, None, None, Default::default(), None).unwrap();
        let of = |protocol, option| of_socket(&socket(protocol), &Selector::default(), named(option), &form);
        assert_eq!(of(Protocol::Icmp, "IP_TOS"), [&PING]);
        assert!(of(Protocol::Udp, "IP_TOS").is_empty());
        assert!(of(Protocol::Other, "SO_MARK").is_empty());
    }

    #[test]
    fn limitations_of_rules_about_addresses_are_found() {
        let form = Form::Set(crate::policy::model::Wanted::Number { value: 3, mask: u32::MAX });
        let local = Selector { local_ports: vec![1..=2], ..Selector::default() };
        let peer = Selector { remote_ports: vec![9..=10], ..Selector::default() };
        assert!(names(&local, "SO_MARK", &form).contains(&("unbound", Concern::May)));
        assert!(!names(&peer, "SO_MARK", &form).iter().any(|(name, _)| *name == "unbound"));
        assert_eq!(names(&local, "TCP_KEEPIDLE", &Form::Deny), []);
        let end = |text: &str| text.parse().ok();
        let of = |remote, selector: &Selector| {
            let socket = Socket { remote, ..Socket::new(Protocol::Udp, None, None, Default::default(), None).unwrap() };
            of_socket(&socket, selector, named("SO_MARK"), &form)
        };
        assert_eq!(of(end("127.0.0.1:9"), &local), [&UNBOUND]);
        assert_eq!(of(end("127.0.0.1:9"), &peer), [&UNCONNECTED]);
        assert!(of(None, &local).is_empty());
    }
}
