//! Other names and levels under which the kernel sets the value of an option.
//!
//! A policy that names an option covers all its names: a setting for one name holds for every other.

use abi::setting::{OptionKey, kind};

use super::{Level, OPTIONS, SocketOption, by_key, by_name};

/// A level and number that set an option and have no name in the table.
struct Unnamed {
    level: Level,
    number: i32,
    option: &'static str,
}

const fn unnamed(level: Level, number: i32, option: &'static str) -> Unnamed {
    Unnamed { level, number, option }
}

/// SOL_UDPLITE: the handler of SOL_UDP, also on UDP sockets (`udp_setsockopt`, net/ipv4/udp.c; up to 6.18).
const UDP_LITE: Level = Level(136);
/// SOL_RAW: on raw AF_INET6 sockets, the handler of SOL_IPV6 (`rawv6_setsockopt`, net/ipv6/raw.c).
const RAW: Level = Level(255);

const UNNAMED: &[Unnamed] = &[
    unnamed(UDP_LITE, 1, "UDP_CORK"),
    unnamed(UDP_LITE, 100, "UDP_ENCAP"),
    unnamed(UDP_LITE, 101, "UDP_NO_CHECK6_TX"),
    unnamed(UDP_LITE, 102, "UDP_NO_CHECK6_RX"),
    unnamed(UDP_LITE, 103, "UDP_SEGMENT"),
    unnamed(UDP_LITE, 104, "UDP_GRO"),
    unnamed(RAW, 7, "IPV6_CHECKSUM"),
    unnamed(RAW, 36, "IPV6_HDRINCL"),
    // MCAST_JOIN_GROUP and related options change the lists of the older options, with addresses of either family
    // (`do_ip_setsockopt`, net/ipv4/ip_sockglue.c; `do_ipv6_setsockopt`, net/ipv6/ipv6_sockglue.c).
    unnamed(Level::IP, 42, "IP_ADD_MEMBERSHIP"),
    unnamed(Level::IP, 43, "IP_BLOCK_SOURCE"),
    unnamed(Level::IP, 44, "IP_UNBLOCK_SOURCE"),
    unnamed(Level::IP, 45, "IP_DROP_MEMBERSHIP"),
    unnamed(Level::IP, 46, "IP_ADD_SOURCE_MEMBERSHIP"),
    unnamed(Level::IP, 47, "IP_DROP_SOURCE_MEMBERSHIP"),
    unnamed(Level::IP, 48, "IP_MSFILTER"),
    unnamed(Level::IPV6, 42, "IPV6_ADD_MEMBERSHIP"),
    unnamed(Level::IPV6, 45, "IPV6_DROP_MEMBERSHIP"),
];

/// An option that changes the effect of a setting of another option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guard {
    /// The option of the call.
    pub option: &'static str,
    /// The option whose settings also apply to the call.
    pub keeps: &'static str,
    /// How the call is compared with these settings: [`kind::LOCK`], [`kind::ROOM`], or [`kind::OPAQUE`] (can only be
    /// denied as a whole).
    pub kind: u8,
    /// The bit of SO_BUF_LOCK that must stay set; 0 for none.
    pub lock: u8,
}

const fn guard(option: &'static str, keeps: &'static str) -> Guard {
    Guard { option, keeps, kind: kind::OPAQUE, lock: 0 }
}

/// The guards, by option, in the order of evaluation.
pub const GUARDS: &[Guard] = &[
    // SOCK_SNDBUF_LOCK and SOCK_RCVBUF_LOCK (include/uapi/linux/socket.h): without the bit, the kernel tunes the buffer
    // (`sk_setsockopt`, net/core/sock.c).
    Guard { kind: kind::LOCK, lock: 1, ..guard("SO_BUF_LOCK", "SO_SNDBUF") },
    Guard { kind: kind::LOCK, lock: 2, ..guard("SO_BUF_LOCK", "SO_RCVBUF") },
    // Enlarges an unlocked receive buffer, as SO_RCVBUF with the same number would (`tcp_set_rcvlowat`,
    // net/ipv4/tcp.c).
    Guard { kind: kind::ROOM, ..guard("SO_RCVLOWAT", "SO_RCVBUF") },
    // Writes all of these options at once (`do_ipv6_setsockopt`, net/ipv6/ipv6_sockglue.c).
    guard("IPV6_2292PKTOPTIONS", "IPV6_HOPOPTS"),
    guard("IPV6_2292PKTOPTIONS", "IPV6_RTHDRDSTOPTS"),
    guard("IPV6_2292PKTOPTIONS", "IPV6_RTHDR"),
    guard("IPV6_2292PKTOPTIONS", "IPV6_DSTOPTS"),
    // Overwrites the negotiated segment size (`tcp_repair_options_est`, net/ipv4/tcp.c).
    guard("TCP_REPAIR_OPTIONS", "TCP_MAXSEG"),
    // Sets SO_REUSEADDR to SK_FORCE_REUSE, and to 0 when the repair ends (`tcp_setsockopt`, net/ipv4/tcp.c).
    guard("TCP_REPAIR", "SO_REUSEADDR"),
];

impl SocketOption {
    /// Returns the option under whose name the documentation describes the value.
    #[must_use]
    pub fn canonical(&'static self) -> &'static Self {
        self.same_as.and_then(by_name).unwrap_or(self)
    }

    /// Returns whether both options are names of one value.
    #[must_use]
    pub fn is_same_as(&'static self, other: &'static Self) -> bool {
        self.canonical() == other.canonical()
    }

    /// Returns the other options of the table that set the same value.
    pub fn other_names(&'static self) -> impl Iterator<Item = &'static Self> {
        OPTIONS.iter().filter(move |other| *other != self && other.is_same_as(self))
    }

    /// Returns every level and number that sets the value of this option, each with the option whose handler reads the
    /// argument.
    pub fn spellings(&'static self) -> impl Iterator<Item = (OptionKey, &'static Self)> {
        let named = OPTIONS.iter().filter(move |option| option.is_same_as(self));
        named.flat_map(|option| {
            let unnamed = UNNAMED.iter().filter(|unnamed| unnamed.option == option.name);
            let unnamed = unnamed.map(|unnamed| OptionKey { level: unnamed.level.0, name: unnamed.number });
            std::iter::once(option.key()).chain(unnamed).map(move |key| (key, option))
        })
    }
}

/// Returns the option that a level and number set, under its own name or another.
#[must_use]
pub fn by_spelling(key: OptionKey) -> Option<&'static SocketOption> {
    let unnamed = || UNNAMED.iter().find(|unnamed| unnamed.level.0 == key.level && unnamed.number == key.name);
    by_key(key).or_else(|| by_name(unnamed()?.option))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::options::{Class, ValueKind};

    #[test]
    fn every_name_in_the_lists_is_in_the_table() {
        for unnamed in UNNAMED {
            assert!(by_name(unnamed.option).is_some(), "{}", unnamed.option);
            assert_eq!(by_key(OptionKey { level: unnamed.level.0, name: unnamed.number }), None, "{}", unnamed.option);
        }
        for Guard { option, keeps, .. } in GUARDS {
            assert!(by_name(option).is_some() && by_name(keeps).is_some(), "{option} {keeps}");
        }
        for option in OPTIONS.iter().filter(|option| option.same_as.is_some()) {
            let canonical = option.canonical();
            assert!(canonical != option && canonical.same_as.is_none(), "{}", option.name);
        }
    }

    #[test]
    fn no_two_options_share_a_spelling() {
        let canonical = OPTIONS.iter().filter(|option| option.same_as.is_none());
        let all: Vec<OptionKey> = canonical.flat_map(|option| option.spellings().map(|(key, _)| key)).collect();
        assert_eq!(all.len(), all.iter().collect::<BTreeSet<_>>().len());
        assert_eq!(all.len(), OPTIONS.len() + UNNAMED.len());
    }

    #[test]
    fn names_of_one_value_have_one_kind_except_for_devices() {
        for option in OPTIONS.iter().filter(|option| option.class != Class::ReadOnly) {
            for other in option.other_names() {
                let device = |option: &SocketOption| matches!(option.value, ValueKind::Device | ValueKind::Interface);
                assert!(
                    option.value == other.value || (device(option) && device(other)),
                    "{} {}",
                    option.name,
                    other.name
                );
            }
        }
    }

    #[test]
    fn udp_options_also_have_the_udp_lite_level() {
        for option in OPTIONS.iter().filter(|option| option.level == Level::UDP) {
            let levels: Vec<i32> = option.spellings().map(|(key, _)| key.level).collect();
            assert_eq!(levels, [Level::UDP.0, UDP_LITE.0], "{}", option.name);
        }
    }
}
