//! What a program knows about a socket when it has to decide.
//!
//! Each hook knows a part: at birth there is no address, at listen no peer. What is not known is
//! *unknown*, never a default; [`crate::select`] treats it as "may yet be anything".

use crate::{Target, shared};

/// An IPv6 address, or an IPv4 address in the first word: 32-bit words in network byte order, as the
/// kernel's contexts have them.
pub type Address = [u32; 4];

/// Values of [`Facts::family`]. A socket of AF_INET6 that talks to an IPv4-mapped peer is
/// [`IPV4`](family::IPV4); one that may do either is [`UNKNOWN`](family::UNKNOWN).
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
    /// Raw sockets and every protocol without a name of its own here.
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
    /// Remote address and remote port come together.
    pub const REMOTE: u8 = 4;
}

/// One socket, as far as it is known.
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
    /// Settles the family from the socket's own (`sk_family`) and the addresses noted so far, and
    /// turns IPv4-mapped addresses into IPv4 ones. Call it last.
    ///
    /// An AF_INET6 socket without a peer and without a specific address of its own may still
    /// carry IPv4 (unless it is IPV6_V6ONLY, which programs cannot see): its family stays unknown.
    #[inline(always)]
    pub fn settle_family(&mut self, sk_family: u32) {
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

/// Whether an IPv6 address is `::ffff:a.b.c.d`.
#[inline(always)]
fn is_mapped(address: &Address) -> bool {
    address[0] == 0 && address[1] == 0 && address[2] == 0xffff_u32.to_be()
}

/// Moves the IPv4 part of a mapped address to the front and clears the rest.
#[inline(always)]
fn unmap(address: &mut Address) {
    *address = [address[3], 0, 0, 0];
}

/// Notes kept with each governed socket, in the socket's own storage (map `SOCKETS`).
///
/// The kernel copies a listener's notes to each socket accepted from it (`BPF_F_CLONE`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct State {
    /// Bit n: the application asked for another value of option n where the policy lets it win
    /// (`on_conflict = "allow"`), so that the policy no longer sets it on this socket.
    pub yielded: u64,
    /// Bit n: option n was counted as set or unchanged on this socket.
    pub settled: u64,
    /// Bit n: option n was counted as failed on this socket.
    pub failed: u64,
    /// The socket's cookie, as in `ss -e` (SO_COOKIE); 0 until known.
    pub cookie: u64,
    /// Of the deepest target that the socket is in, as far as a program of that target has met the socket.
    pub target: Target,
    /// The generation of policies by which the socket is set up, from the first hook to the last; 0 until it comes by one.
    pub generation: u32,
    /// Whether the socket was made under the policies and has not been bound or connected since, nor sent anything (0 or 1):
    /// what is set at [`crate::site::SEND`] is for such.
    pub is_fresh: u32,
    /// What was last known of the socket. In memory that the verifier does not look into, so that
    /// the many ways to come to know it are one to it afterwards.
    pub facts: Facts,
}
shared!(State, size 8 * 4 + size_of::<Target>() + 4 * 2 + size_of::<Facts>());

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
        facts.settle_family(sk_family::INET6);
        assert_eq!(facts.family, family::IPV4);
        assert_eq!(facts.remote, [u32::from_ne_bytes([10, 1, 2, 3]), 0, 0, 0]);
        assert_eq!(facts.local, [u32::from_ne_bytes([127, 0, 0, 1]), 0, 0, 0]);
    }

    #[test]
    fn ipv6_socket_without_addresses_may_be_either() {
        let mut facts = Facts::default();
        facts.settle_family(sk_family::INET6);
        assert_eq!(facts.family, family::UNKNOWN);
    }

    #[test]
    fn ipv6_peer_is_ipv6() {
        let remote = [0, 0, 0, 1_u32.to_be()];
        let mut facts = Facts { known: known::REMOTE, remote, ..Facts::default() };
        facts.settle_family(sk_family::INET6);
        assert_eq!(facts.family, family::IPV6);
        assert_eq!(facts.remote, remote);
    }
}
