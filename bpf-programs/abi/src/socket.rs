//! What a program knows about a socket when it decides.
//!
//! Each hook knows a part: at creation there is no address, at listen no peer. A fact that is not known is *unknown*, and has
//! no default: for [`crate::select`], it can still become anything.

use crate::{Target, shared};

/// An IPv6 address, or an IPv4 address in the first word: 32-bit words in network byte order, as in the kernel's contexts.
pub type Address = [u32; 4];

/// Values of [`Facts::family`]. A socket of AF_INET6 with an IPv4-mapped peer is [`IPV4`](family::IPV4); one that can use
/// either is [`UNKNOWN`](family::UNKNOWN).
pub mod family {
    pub const UNKNOWN: u8 = 0;
    pub const IPV4: u8 = 1;
    pub const IPV6: u8 = 2;
}

/// Values of [`Facts::protocol`]. MPTCP counts as TCP.
pub mod protocol {
    pub const UNKNOWN: u8 = 0;
    pub const TCP: u8 = 1;
    pub const UDP: u8 = 2;
    pub const ICMP: u8 = 3;
    pub const SCTP: u8 = 4;
    /// Raw sockets and every protocol without a value of its own here.
    pub const OTHER: u8 = 5;
}

/// Values of [`Facts::direction`].
pub mod direction {
    pub const UNKNOWN: u8 = 0;
    /// The socket connects.
    pub const OUTBOUND: u8 = 1;
    /// The socket listens or was accepted.
    pub const INBOUND: u8 = 2;
}

/// Bits of [`Facts::known`].
pub mod known {
    pub const LOCAL_ADDRESS: u8 = 1;
    pub const LOCAL_PORT: u8 = 2;
    /// Remote address and remote port become known together.
    pub const REMOTE: u8 = 4;
}

/// What is known of one socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    pub local: Address,
    pub remote: Address,
    /// Host byte order.
    pub local_port: u16,
    /// Host byte order.
    pub remote_port: u16,
    /// See [`family`]: the family of both addresses.
    pub family: u8,
    /// See [`protocol`].
    pub protocol: u8,
    /// See [`direction`].
    pub direction: u8,
    /// See [`known`].
    pub known: u8,
}
shared!(Facts, size 16 + 16 + 2 + 2 + 4);

/// AF_INET and AF_INET6, as in `sk_family`.
pub mod sk_family {
    pub const INET: u32 = 2;
    pub const INET6: u32 = 10;
}

impl Facts {
    /// Sets the family from the socket's own (`sk_family`) and the addresses in the facts, and turns IPv4-mapped addresses
    /// into IPv4 addresses. Callers call it last.
    ///
    /// An AF_INET6 socket without a peer and without a specific address of its own may still carry IPv4: its family stays
    /// unknown. Programs cannot see IPV6_V6ONLY.
    #[inline(always)]
    pub fn set_family(&mut self, sk_family: u32) {
        if sk_family == sk_family::INET {
            self.family = family::IPV4;
            return;
        }
        let remote = self.known & known::REMOTE != 0;
        let local = self.known & known::LOCAL_ADDRESS != 0;
        if (remote && is_mapped(&self.remote)) || (local && is_mapped(&self.local)) {
            self.family = family::IPV4;
            unmap(&mut self.remote);
            unmap(&mut self.local);
        } else if remote || local {
            self.family = family::IPV6;
        }
    }
}

/// Returns whether an IPv6 address is `::ffff:a.b.c.d`.
#[inline(always)]
fn is_mapped(address: &Address) -> bool {
    address[0] == 0 && address[1] == 0 && address[2] == MAPPED
}

/// Moves the IPv4 part of a mapped address to the front and clears the rest.
#[inline(always)]
fn unmap(address: &mut Address) {
    *address = [address[3], 0, 0, 0];
}

impl Facts {
    /// Replaces a remote address of zeros by the address to which the kernel connects instead. `local` is the socket's own
    /// address: zeros if the socket has none. Callers call it before [`Self::set_family`].
    ///
    /// - IPv4: the socket's own address, or 127.0.0.1 if it has none (`ip_route_output_key_hash_rcu`, net/ipv4/route.c,
    ///   6.18).
    /// - IPv6: `::` is ::1, or ::ffff:127.0.0.1 if the socket is bound to an IPv4-mapped address (`tcp_v6_connect`,
    ///   net/ipv6/tcp_ipv6.c; `__ip6_datagram_connect`, net/ipv6/datagram.c). ::ffff:0.0.0.0 is as 0.0.0.0.
    ///
    /// For an IPv4 socket with a device and without an address, the kernel takes the first address of the device. Programs
    /// cannot read that address: then the remote address is unknown.
    #[inline(always)]
    pub fn set_remote(&mut self, inet6: bool, local: &Address, has_device: bool) {
        let is_mapped_any = inet6 && is_mapped(&self.remote) && self.remote[3] == 0;
        let is_any = self.remote[0] | self.remote[1] | self.remote[2] | self.remote[3] == 0;
        if inet6 && is_any {
            self.remote = if is_mapped(local) { MAPPED_LOOPBACK } else { LOOPBACK6 };
            return;
        }
        if !(is_any || is_mapped_any) {
            return;
        }
        let own = if !inet6 {
            local[0]
        } else if is_mapped(local) {
            local[3]
        } else {
            0
        };
        if own == 0 && has_device {
            self.known &= !known::REMOTE;
            return;
        }
        // A multicast address cannot be a source: the kernel then treats the socket as one without an address (`__inet_bind`,
        // net/ipv4/af_inet.c).
        let is_source = own != 0 && own != u32::MAX && u32::from_be(own) >> 28 != 0xe;
        let peer = if is_source { own } else { LOOPBACK4 };
        self.remote = if inet6 { [0, 0, MAPPED, peer] } else { [peer, 0, 0, 0] };
    }
}

/// 127.0.0.1, in network byte order.
const LOOPBACK4: u32 = 0x7f00_0001_u32.to_be();
/// The third word of an IPv4-mapped address.
const MAPPED: u32 = 0xffff_u32.to_be();
const MAPPED_LOOPBACK: Address = [0, 0, MAPPED, LOOPBACK4];
const LOOPBACK6: Address = [0, 0, 0, 1_u32.to_be()];

/// What was done to the options of a socket, and by whom. A part of [`State`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// Bit n: the application requested another value of option n, and the policy lets the application win (`on_conflict =
    /// "allow"`). The policy no longer sets the option on this socket.
    pub app_override: u64,
    /// Bit n: option n was counted as set or unchanged on this socket.
    pub applied: u64,
    /// Bit n: option n was counted as failed on this socket.
    pub failed: u64,
    /// Bit n: the application requested a value of option n that a rule may forbid later: a rule that may still match, or one
    /// that matches if the peer changes. [`SavedValues::before_request`] has the value from before.
    pub requested: u64,
    /// Bit n: [`SavedValues::before_rule`] has the value that option n had before a rule set it.
    pub changed: u64,
    /// The socket's cookie, as in `ss -e` (SO_COOKIE); 0 until known.
    pub cookie: u64,
    /// The interface index of the socket after a program bound it to a device.
    pub device: u32,
    /// The device that the policy names, as a number ([`crate::setting::Setting::device`]); 0: no program bound the socket.
    pub device_wanted: u32,
}
shared!(Notes, size 8 * 6 + 4 * 2);

impl Notes {
    /// Empty notes.
    pub const NONE: Self = Self {
        app_override: 0,
        applied: 0,
        failed: 0,
        requested: 0,
        changed: 0,
        cookie: 0,
        device: 0,
        device_wanted: 0,
    };
}

/// Notes on each governed socket, in the socket's own storage (map `SOCKETS`). If the kernel has no memory for this storage,
/// the notes are in map `FALLBACK_STATES` until they are evicted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct State {
    pub notes: Notes,
    /// The deepest target of the socket, of those whose programs have run for the socket.
    pub target: Target,
    /// The generation of policies that sets up the socket, from the first hook to the last; 0 until the first hook.
    pub generation: u32,
    /// Whether the socket was created under the policies and was neither bound nor connected since, nor sent anything (0 or
    /// 1): the options of [`crate::apply_point::SEND`] are set on such sockets.
    pub is_fresh: u32,
    /// Whether the notes are in map `FALLBACK_STATES` (0 or 1).
    pub is_fallback: u32,
    /// Whether the socket had a peer when its options were last set (0 or 1). [`Self::facts`] do not show this: setsockopt
    /// and getsockopt calls update them too.
    pub has_peer: u32,
    /// What was last known of the socket. In memory whose contents the verifier does not track: it then follows one path for
    /// the many ways in which facts become known.
    pub facts: Facts,
}
shared!(State, size size_of::<Notes>() + size_of::<Target>() + 4 * 4 + size_of::<Facts>());

/// Values of a socket that may be restored. In separate storage (map `SAVED_VALUES`), because few sockets need it. The kernel
/// copies a listener's values to each accepted socket (`BPF_F_CLONE`).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SavedValues {
    /// [`Notes::app_override`] for the sockets that a listener accepts.
    pub app_override: u64,
    /// [`Notes::requested`] for the sockets that a listener accepts.
    pub has_before_request: u64,
    /// [`Notes::changed`] for the sockets that a listener accepts.
    pub has_before_rule: u64,
    /// By bit of an option that is a number: the value before the application requested another one, as getsockopt shows it.
    pub before_request: [u32; crate::SETTABLE_MAX],
    /// By bit of an option that is a number: the value before a rule set the option, as getsockopt shows it. For a device,
    /// the interface index.
    pub before_rule: [u32; crate::SETTABLE_MAX],
    /// `before_request` for TCP_CONGESTION.
    pub before_request_text: crate::setting::Words,
    /// `before_rule` for TCP_CONGESTION.
    pub before_rule_text: crate::setting::Words,
    /// SO_PRIORITY before a rule set IP_TOS, which also sets the priority (`__ip_sock_set_tos`, net/ipv4/ip_sockglue.c).
    pub priority: u32,
    /// Whether `priority` is set (0 or 1).
    pub has_priority: u32,
}
shared!(SavedValues, size 8 * 3 + 2 * 4 * crate::SETTABLE_MAX + 2 * 16 + 4 * 2);

impl SavedValues {
    /// No values.
    pub const NONE: Self = Self {
        app_override: 0,
        has_before_request: 0,
        has_before_rule: 0,
        before_request: [0; crate::SETTABLE_MAX],
        before_rule: [0; crate::SETTABLE_MAX],
        before_request_text: [0; 2],
        before_rule_text: [0; 2],
        priority: 0,
        has_priority: 0,
    };
}

/// The notes of a socket for whose storage the kernel has no memory. Map `FALLBACK_STATES`, by the socket's address in the
/// kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FallbackState {
    pub state: State,
    pub saved: SavedValues,
}
shared!(FallbackState, size size_of::<State>() + size_of::<SavedValues>());

impl FallbackState {
    /// The notes of a socket of which nothing is known.
    pub const NEW: Self = Self {
        state: State {
            notes: Notes::NONE,
            target: Target { place: 0, id: 0 },
            generation: 0,
            is_fresh: 0,
            is_fallback: 1,
            has_peer: 0,
            facts: Facts {
                local: [0; 4],
                remote: [0; 4],
                local_port: 0,
                remote_port: 0,
                family: family::UNKNOWN,
                protocol: protocol::UNKNOWN,
                direction: direction::UNKNOWN,
                known: 0,
            },
        },
        saved: SavedValues::NONE,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped(address: [u8; 4]) -> Address {
        [0, 0, 0xffff_u32.to_be(), u32::from_ne_bytes(address)]
    }

    #[test]
    fn mapped_peer_makes_an_ipv6_socket_ipv4() {
        let mut facts = Facts {
            remote: mapped([10, 1, 2, 3]),
            local: mapped([127, 0, 0, 1]),
            known: known::REMOTE | known::LOCAL_ADDRESS,
            ..Facts::default()
        };
        facts.set_family(sk_family::INET6);
        assert_eq!(facts.family, family::IPV4);
        assert_eq!(facts.remote, [u32::from_ne_bytes([10, 1, 2, 3]), 0, 0, 0]);
        assert_eq!(facts.local, [u32::from_ne_bytes([127, 0, 0, 1]), 0, 0, 0]);
    }

    fn remote(inet6: bool, remote: Address, local: Address, has_device: bool) -> Option<Address> {
        let mut facts = Facts { remote, known: known::REMOTE, ..Facts::default() };
        facts.set_remote(inet6, &local, has_device);
        (facts.known & known::REMOTE != 0).then_some(facts.remote)
    }

    #[test]
    fn any_address_becomes_the_address_that_the_kernel_connects_to() {
        let v4 = |address: [u8; 4]| [u32::from_ne_bytes(address), 0, 0, 0];
        let (any, bound, loopback) = (v4([0; 4]), v4([10, 1, 2, 3]), v4([127, 0, 0, 1]));
        assert_eq!(remote(false, any, any, false), Some(loopback));
        assert_eq!(remote(false, any, bound, false), Some(bound));
        assert_eq!(remote(false, any, bound, true), Some(bound));
        assert_eq!(remote(false, any, any, true), None, "the first address of the device");
        assert_eq!(remote(false, any, v4([224, 0, 0, 1]), false), Some(loopback));
        assert_eq!(remote(false, bound, any, true), Some(bound));
        assert_eq!(remote(true, [0; 4], [0; 4], true), Some(LOOPBACK6));
        assert_eq!(remote(true, [0; 4], [1, 2, 3, 4], false), Some(LOOPBACK6));
        assert_eq!(remote(true, [0; 4], mapped([10, 1, 2, 3]), false), Some(MAPPED_LOOPBACK));
        assert_eq!(remote(true, mapped([0; 4]), mapped([10, 1, 2, 3]), false), Some(mapped([10, 1, 2, 3])));
        assert_eq!(remote(true, mapped([0; 4]), [0; 4], false), Some(MAPPED_LOOPBACK));
        assert_eq!(remote(true, mapped([0; 4]), [0; 4], true), None);
        assert_eq!(remote(true, [1, 2, 3, 4], [0; 4], false), Some([1, 2, 3, 4]));
    }

    #[test]
    fn ipv6_socket_without_addresses_may_be_either() {
        let mut facts = Facts::default();
        facts.set_family(sk_family::INET6);
        assert_eq!(facts.family, family::UNKNOWN);
    }

    #[test]
    fn ipv6_peer_is_ipv6() {
        let remote = [0, 0, 0, 1_u32.to_be()];
        let mut facts = Facts { known: known::REMOTE, remote, ..Facts::default() };
        facts.set_family(sk_family::INET6);
        assert_eq!(facts.family, family::IPV6);
        assert_eq!(facts.remote, remote);
    }
}
