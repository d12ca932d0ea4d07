//! What sockpolicy does not do, because the kernel offers no way: written down once, for `check`, `plan`, `explain`, reports,
//! `verify` and docs/reference.md.
//!
//! Pure: what is here holds on every kernel that sockpolicy knows. What only this kernel cannot do is a [`crate::unsupported::Unsupported`].

use abi::{apply_point, setting::traits};

use crate::{
    options::{Reading, SocketOption},
    policy::{
        Socket,
        model::{Form, Named, Protocol, Selector},
    },
};

/// Something that is not done.
#[derive(Debug, PartialEq, Eq)]
pub struct Limitation {
    /// In JSON.
    pub name: &'static str,
    /// Of which sockets or packets.
    pub of: &'static str,
    /// What is not done.
    pub what: &'static str,
    /// Why: what the kernel does, or does not offer.
    pub why: &'static str,
}

/// How far a rule is about what is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Concern {
    /// The rule may match such sockets.
    May,
    /// The rule asks for such sockets.
    Asked,
}

pub const RAW: Limitation = Limitation {
    name: "raw",
    of: "raw, SCTP and other sockets without a name under `protocol`",
    what: "without BPF LSM only SO_MARK, SO_PRIORITY and SO_BINDTOIFINDEX are set; limits and denials of calls hold",
    why: "the kernel runs no other program that may set options of such a socket when it is made, binds, connects or sends",
};

pub const PING: Limitation = Limitation {
    name: "ping",
    of: "ICMP datagram sockets",
    what: "without BPF LSM, SO_MARK, SO_PRIORITY and SO_BINDTOIFINDEX are set when the socket is made, other options only if it \
           connects",
    why: "the kernel runs no program when they bind or send, and before 6.1 none when they connect",
};

pub const UDP_LITE: Limitation = Limitation {
    name: "udp-lite",
    of: "UDP-Lite sockets, which count as other",
    what: "without BPF LSM, SO_MARK, SO_PRIORITY and SO_BINDTOIFINDEX are set when the socket is made, other options at bind or \
           with the first datagram, and none at connect",
    why: "the kernel runs no program when they connect",
};

pub const MULTIPATH: Limitation = Limitation {
    name: "mptcp",
    of: "MPTCP sockets",
    what: "options are set on the subflows; the socket that the application has may read other values",
    why: "programs cannot set options of an MPTCP socket itself",
};

pub const UNCONNECTED: Limitation = Limitation {
    name: "unconnected",
    of: "UDP sockets that send without being connected",
    what: "rules about the peer do not match them; of options that cannot be corrected later, their limits and denials hold for \
           calls on such sockets",
    why: "the kernel reads the options of a datagram before it runs a program that knows the peer",
};

pub const UNBOUND: Limitation = Limitation {
    name: "unbound",
    of: "UDP sockets that connect before they have a local address or port",
    what: "rules about the local address or port set nothing on them; limits and denials of such rules hold on each of them",
    why: "the kernel chooses the local end after it has run the last program",
};

pub const FIRST_DATAGRAM: Limitation = Limitation {
    name: "first-datagram",
    of: "the first datagram after connect(AF_UNSPEC), and without BPF LSM also the first of a UDP socket that is neither bound nor \
         connected",
    what: "it is sent with the options from before",
    why: "the kernel reads mark, priority, code point and device before it runs a program",
};

pub const DEVICE: Limitation = Limitation {
    name: "link-local-device",
    of: "sockets that bind to a link-local IPv6 address with a scope",
    what: "the socket keeps the device of the address, and counts as failed, if its owner has no CAP_NET_RAW",
    why: "the kernel binds the socket to that device after the program has run, and takes another device from nobody else",
};

pub const CONTROL_MESSAGES: Limitation = Limitation {
    name: "control-messages",
    of: "datagrams that are sent with control messages (sendmsg)",
    what: "values in control messages are neither judged nor replaced",
    why: "the kernel runs no program for them",
};

pub const BUFFERS: Limitation = Limitation {
    name: "buffer-tuning",
    of: "sockets whose buffer a rule no longer sets, because the peer is another one",
    what: "the size is given back, but the kernel does not tune the buffer any more",
    why: "programs cannot unlock a buffer",
};

pub const DIRECTION: Limitation = Limitation {
    name: "direction",
    of: "TCP sockets that connected, or tried to, and listen later, or the other way round",
    what: "an option that no rule sets any more keeps its value",
    why: "the old values would have to be kept of every connection",
};

pub const FAMILIES: Limitation = Limitation {
    name: "families",
    of: "AF_UNIX, netlink, packet, vsock and all other sockets that are neither AF_INET nor AF_INET6",
    what: "they are not governed",
    why: "policies are about IP sockets",
};

/// All of them, in the order in which they are shown.
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

/// Options that a control message sets for one datagram (`__sock_cmsg_send`, net/core/sock.c; `ip_cmsg_send`,
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

/// What is not done only where the BPF LSM is not active.
pub const WITHOUT_LSM: [&Limitation; 3] = [&RAW, &PING, &UDP_LITE];

/// What is not done of a rule's word on an option, and how far the rule is about it.
#[must_use]
pub fn of_rule(selector: &Selector, option: Named, form: &Form) -> Vec<(&'static Limitation, Concern)> {
    ALL.iter().filter_map(|entry| Some((*entry, concern(entry, selector, option, form)?))).collect()
}

fn concern(entry: &Limitation, selector: &Selector, option: Named, form: &Form) -> Option<Concern> {
    let Named::Known(option) = option else { return None };
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
        "raw" if sets && !is_from_birth(option) => by_protocol(&[Protocol::Other, Protocol::Sctp]),
        "ping" if sets && !is_from_birth(option) => by_protocol(&[Protocol::Icmp]),
        "udp-lite" if sets && !is_from_birth(option) => may(by_protocol(&[Protocol::Other]).is_some()),
        "mptcp" if sets => may(by_protocol(&[Protocol::Tcp]).is_some()),
        "unconnected" if asks_peer(selector) => by_protocol(&[Protocol::Udp]),
        "unbound" if asks_local(selector) => by_protocol(&[Protocol::Udp]),
        "first-datagram" if sets && !is_from_birth(option) => may(by_protocol(&[Protocol::Udp]).is_some()),
        "link-local-device" => may(sets && option.traits & traits::DEVICE != 0),
        "control-messages" if IN_CONTROL_MESSAGES.contains(&option.name) => sends(),
        "buffer-tuning" => may(sets && asks_peer(selector) && matches!(option.reading, Reading::Tuned { .. })),
        "direction" => may(sets && selector.direction.is_some()),
        _ => None,
    }
}

/// What is not done of an option that a rule sets on a socket that is described, and that the rule matches.
#[must_use]
pub fn of_socket(socket: &Socket, selector: &Selector, option: Named, form: &Form) -> Vec<&'static Limitation> {
    let Named::Known(option) = option else { return Vec::new() };
    if !matches!(form, Form::Set(_)) {
        return Vec::new();
    }
    if socket.protocol == Some(Protocol::Udp) && socket.remote.is_some() {
        let may = [(&UNCONNECTED, asks_peer(selector)), (&UNBOUND, asks_local(selector))];
        return may.into_iter().filter_map(|(entry, holds)| holds.then_some(entry)).collect();
    }
    if is_from_birth(option) {
        return Vec::new();
    }
    match socket.protocol {
        Some(Protocol::Other) => vec![&RAW, &UDP_LITE],
        Some(Protocol::Sctp) => vec![&RAW],
        Some(Protocol::Icmp) => vec![&PING],
        _ => Vec::new(),
    }
}

/// Whether sockets of a protocol, which are neither TCP nor UDP ones, may come by a site after their birth.
#[must_use]
pub fn may_come_by(protocol: Option<Protocol>, at: u32) -> bool {
    match protocol {
        Some(Protocol::Icmp) => at == apply_point::CONNECT_DATAGRAM,
        // UDP-Lite.
        Some(Protocol::Other) => at == apply_point::BIND_DATAGRAM || at == apply_point::SEND,
        _ => false,
    }
}

fn is_from_birth(option: &SocketOption) -> bool {
    option.settable().is_some_and(|settable| settable.sites.contains(apply_point::SOCK_CREATE))
}

fn asks_peer(selector: &Selector) -> bool {
    !(selector.remote.is_empty() && selector.not_remote.is_empty() && selector.remote_ports.is_empty())
}

fn asks_local(selector: &Selector) -> bool {
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
    fn rule_that_asks_for_such_sockets_is_told_from_one_that_may_match_them() {
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
    fn socket_that_no_hook_reaches_is_told() {
        let form = Form::Set(crate::policy::model::Wanted::Number { value: 3, mask: u32::MAX });
        let socket = |protocol| Socket::new(protocol, None, None, Default::default(), None).unwrap();
        let of = |protocol, option| of_socket(&socket(protocol), &Selector::default(), named(option), &form);
        assert_eq!(of(Protocol::Icmp, "IP_TOS"), [&PING]);
        assert!(of(Protocol::Udp, "IP_TOS").is_empty());
        assert!(of(Protocol::Other, "SO_MARK").is_empty());
    }

    #[test]
    fn rule_about_an_end_that_no_hook_is_told_is_told() {
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
