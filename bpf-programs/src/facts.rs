//! Interprets the numbers of a socket, regardless of the hook that read them.

use abi::socket::{Address, Facts, direction, known, protocol, sk_family};

/// `tcp_states` of include/net/tcp_states.h, part of the uapi as BPF_TCP_*.
const TCP_ESTABLISHED: u32 = 1;
const TCP_CLOSE: u32 = 7;
const TCP_LISTEN: u32 = 10;

const IPPROTO_ICMP: u32 = 1;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_UDP: u32 = 17;
const IPPROTO_ICMPV6: u32 = 58;
const IPPROTO_SCTP: u32 = 132;
pub(crate) const IPPROTO_MPTCP: u32 = 262;
const SOCK_RAW: u32 = 3;

#[inline(always)]
fn is_specific(address: &Address) -> bool {
    *address != [0; 4]
}

/// Returns whether this is an address family that policies cover.
#[inline(always)]
pub(crate) fn is_inet(family: u32) -> bool {
    family == sk_family::INET || family == sk_family::INET6
}

/// Returns the class of a socket's protocol.
#[inline(always)]
pub(crate) fn protocol(kind: u32, number: u32) -> u8 {
    if kind == SOCK_RAW {
        return protocol::OTHER;
    }
    match number {
        IPPROTO_TCP | IPPROTO_MPTCP => protocol::TCP,
        IPPROTO_UDP => protocol::UDP,
        IPPROTO_ICMP | IPPROTO_ICMPV6 => protocol::ICMP,
        IPPROTO_SCTP => protocol::SCTP,
        _ => protocol::OTHER,
    }
}

/// Marks which parts of the local end are known: an address or a port of 0 can still become any.
#[inline(always)]
pub(crate) fn mark_local(facts: &mut Facts) {
    if is_specific(&facts.local) {
        facts.known |= known::LOCAL_ADDRESS;
    }
    if facts.local_port != 0 {
        facts.known |= known::LOCAL_PORT;
    }
}

/// Returns whether a datagram socket in this state has a peer.
#[inline(always)]
pub(crate) fn is_connected(state: u32) -> bool {
    state == TCP_ESTABLISHED
}

/// Adds what the state of a socket shows: whether it listens, or else its peer.
#[inline(always)]
pub(crate) fn apply_state(facts: &mut Facts, state: u32, remote: impl FnOnce() -> (Address, u16)) {
    if state == TCP_LISTEN {
        facts.direction = direction::INBOUND;
    } else if state != TCP_CLOSE {
        (facts.remote, facts.remote_port) = remote();
        facts.known |= known::REMOTE;
        // A connected datagram socket has the state of an established connection, and only the application can have connected
        // it.
        if state == TCP_ESTABLISHED && facts.protocol != protocol::TCP {
            facts.direction = direction::OUTBOUND;
        }
    }
}
