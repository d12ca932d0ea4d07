//! Values that are structures or times: opaque values by their [`Shape`], and `struct linger` and `struct timeval`.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4};

use serde_json::{Map, Value as Json, json};

use super::{Captured, Shown, chars};
use crate::{
    errno,
    options::{Shape, ValueKind},
    policy::units::show,
};

/// Returns `None` if the value is shorter than its type, or has another type.
pub(super) fn decode(shape: Shape, captured: &Captured<'_>) -> Option<Shown> {
    let &Captured { bytes, len } = captured;
    match shape {
        Shape::Errno => errno(bytes),
        Shape::Descriptor => Some(Shown::plain(json!(int(bytes, 0)?))),
        Shape::InterfaceIndex => Some(Shown::plain(json!(i32::from_be(int(bytes, 0)?)))),
        Shape::Wide => Some(Shown::plain(json!(u64::from_ne_bytes(at(bytes, 0)?)))),
        Shape::Text => Some(chars(captured)),
        Shape::Credentials => Some(object([
            ("pid", json!(int(bytes, 0)?)),
            ("uid", json!(unsigned(bytes, 4)?)),
            ("gid", json!(unsigned(bytes, 8)?)),
        ])),
        Shape::SocketAddress => socket_address(bytes),
        Shape::MulticastInterface if bytes.len() < MREQ_LEN => Some(Shown::plain(json!(ipv4(bytes, 0)?))),
        Shape::MulticastInterface | Shape::Membership => membership(bytes),
        Shape::SourceMembership => Some(object([
            ("group", json!(ipv4(bytes, 0)?)),
            ("address", json!(ipv4(bytes, 4)?)),
            ("source", json!(ipv4(bytes, 8)?)),
        ])),
        // The index of the interface follows the address, beyond the available bytes.
        Shape::Ipv6Membership if len >= IPV6_MREQ_LEN => Some(object([("group", json!(ipv6(bytes)?))])),
        Shape::Ipv6PacketInfo if len >= IPV6_MREQ_LEN => Some(object([("address", json!(ipv6(bytes)?))])),
        Shape::Bytes | Shape::Ipv6Membership | Shape::Ipv6PacketInfo => None,
    }
}

/// The size of `struct ip_mreq`.
const MREQ_LEN: usize = 4 + 4;
/// The size of `struct ipv6_mreq` and `struct in6_pktinfo`.
const IPV6_MREQ_LEN: usize = 16 + 4;

fn errno(bytes: &[u8]) -> Option<Shown> {
    let errno = int(bytes, 0)?;
    let text = if errno == 0 { "0".to_owned() } else { errno::name(errno) };
    Some(Shown { json: json!(errno), text })
}

pub(super) fn linger(bytes: &[u8]) -> Option<Shown> {
    let (on, seconds) = (int(bytes, 0)?, int(bytes, 4)?);
    let text = if on == 0 { "off".to_owned() } else { format!("on, {seconds}s") };
    Some(Shown { text, ..object([("onoff", json!(on)), ("linger", json!(seconds))]) })
}

pub(super) fn timeval(bytes: &[u8]) -> Option<Shown> {
    let (seconds, microseconds) = if bytes.len() == 8 {
        (int(bytes, 0)?.into(), int(bytes, 4)?.into())
    } else {
        (i64::from_ne_bytes(at(bytes, 0)?), i64::from_ne_bytes(at(bytes, 8)?))
    };
    // Such values fail with EDOM (sock_set_timeout, net/core/sock.c).
    if !(0..1_000_000).contains(&microseconds) {
        return None;
    }
    let time = seconds.checked_mul(1_000_000)?.checked_add(microseconds)?;
    Some(Shown::plain(json!(show(ValueKind::Microseconds, time))))
}

fn socket_address(bytes: &[u8]) -> Option<Shown> {
    /// The size of `struct sockaddr_in`.
    const LEN: usize = 16;
    let family = i32::from(u16::from_ne_bytes(at(bytes, 0)?));
    if family != libc::AF_INET || bytes.len() < LEN {
        return None;
    }
    let address = SocketAddrV4::new(ipv4(bytes, 4)?, u16::from_be_bytes(at(bytes, 2)?));
    Some(Shown::plain(json!(address.to_string())))
}

fn membership(bytes: &[u8]) -> Option<Shown> {
    let (group, address) = (json!(ipv4(bytes, 0)?), json!(ipv4(bytes, 4)?));
    Some(match int(bytes, 8) {
        Some(interface) => object([("group", group), ("address", address), ("interface", json!(interface))]),
        None => object([("group", group), ("address", address)]),
    })
}

/// Returns the fields of a structure: an object, and as text `name value` for each.
fn object<const N: usize>(fields: [(&str, Json); N]) -> Shown {
    let words = fields.iter().map(|(name, value)| format!("{name} {}", Shown::plain(value.clone()).text));
    let text = words.collect::<Vec<_>>().join(", ");
    let json = Map::from_iter(fields.map(|(name, value)| (name.to_owned(), value)));
    Shown { json: json.into(), text }
}

fn at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

fn int(bytes: &[u8], offset: usize) -> Option<i32> {
    at(bytes, offset).map(i32::from_ne_bytes)
}

fn unsigned(bytes: &[u8], offset: usize) -> Option<u32> {
    at(bytes, offset).map(u32::from_ne_bytes)
}

fn ipv4(bytes: &[u8], offset: usize) -> Option<Ipv4Addr> {
    at(bytes, offset).map(|octets: [u8; 4]| octets.into())
}

fn ipv6(bytes: &[u8]) -> Option<Ipv6Addr> {
    at(bytes, 0).map(|octets: [u8; 16]| octets.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns both forms of the first bytes of a value of `len`.
    fn shown(shape: Shape, bytes: &[u8], len: usize) -> Option<(Json, String)> {
        let captured = Captured { bytes: &bytes[..bytes.len().min(abi::setting::TEXT_LEN)], len };
        decode(shape, &captured).map(|Shown { json, text }| (json, text))
    }

    fn whole(shape: Shape, bytes: &[u8]) -> Option<(Json, String)> {
        shown(shape, bytes, bytes.len())
    }

    fn ints(ints: &[i32]) -> Vec<u8> {
        ints.iter().flat_map(|int| int.to_ne_bytes()).collect()
    }

    fn longs(longs: &[i64]) -> Vec<u8> {
        longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
    }

    fn both(json: Json, text: &str) -> Option<(Json, String)> {
        Some((json, text.to_owned()))
    }

    #[test]
    fn linger_is_on_for_some_seconds_or_off() {
        let shown = |bytes: &[u8]| linger(bytes).map(|shown| (shown.json, shown.text));
        assert_eq!(shown(&ints(&[1, 5])), both(json!({ "onoff": 1, "linger": 5 }), "on, 5s"));
        assert_eq!(shown(&ints(&[0, 5])), both(json!({ "onoff": 0, "linger": 5 }), "off"));
    }

    #[test]
    fn times_of_64_bit_and_32_bit_programs_are_decoded() {
        let shown = |bytes: &[u8]| timeval(bytes).map(|shown| (shown.json, shown.text));
        assert_eq!(shown(&longs(&[1, 500_000])), both(json!("1500ms"), "1500ms"));
        assert_eq!(shown(&ints(&[60, 0])), both(json!("60s"), "60s"));
        assert_eq!(shown(&longs(&[0, 0])), both(json!("0"), "0"));
        assert_eq!(shown(&longs(&[-1, 0])), both(json!("-1s"), "-1s"));
        assert_eq!(shown(&longs(&[0, 1_000_000])), None, "the kernel refuses it");
        assert_eq!(shown(&longs(&[i64::MAX, 0])), None);
        assert_eq!(shown(&longs(&[1, 0])[..12]), None);
    }

    #[test]
    fn numbers_have_their_width_and_order() {
        assert_eq!(whole(Shape::Wide, &[0xff; 8]), both(json!(u64::MAX), "18446744073709551615"));
        assert_eq!(whole(Shape::InterfaceIndex, &[0, 0, 0, 3]), both(json!(3), "3"));
    }

    #[test]
    fn credentials_have_the_signedness_of_their_types() {
        let bytes = ints(&[812, -1, 0]);
        let json = json!({ "pid": 812, "uid": u32::MAX, "gid": 0 });
        assert_eq!(whole(Shape::Credentials, &bytes), both(json, "pid 812, uid 4294967295, gid 0"));
    }

    #[test]
    fn ipv4_addresses_are_decoded_and_truncated_ones_are_not_guessed() {
        let mut address = libc::AF_INET.to_ne_bytes()[..2].to_vec();
        address.extend([0x01, 0xbb, 192, 0, 2, 7, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(whole(Shape::SocketAddress, &address), both(json!("192.0.2.7:443"), "192.0.2.7:443"));
        address[0] = libc::AF_INET6 as u8;
        assert_eq!(shown(Shape::SocketAddress, &address, 28), None);
    }

    #[test]
    fn memberships_show_the_given_interface() {
        let bytes = [&[224, 0, 0, 251, 10, 0, 0, 1][..], &ints(&[2])].concat();
        let short = (json!({ "group": "224.0.0.251", "address": "10.0.0.1" }), "group 224.0.0.251, address 10.0.0.1");
        assert_eq!(whole(Shape::Membership, &bytes[..8]), both(short.0.clone(), short.1));
        assert_eq!(whole(Shape::MulticastInterface, &bytes[..8]), both(short.0, short.1));
        let long = json!({ "group": "224.0.0.251", "address": "10.0.0.1", "interface": 2 });
        let text = "group 224.0.0.251, address 10.0.0.1, interface 2";
        assert_eq!(whole(Shape::Membership, &bytes), both(long, text));
        assert_eq!(whole(Shape::MulticastInterface, &bytes[4..8]), both(json!("10.0.0.1"), "10.0.0.1"));
    }

    #[test]
    fn source_follows_the_interface() {
        let bytes = [232, 1, 1, 1, 10, 0, 0, 1, 192, 0, 2, 7];
        let json = json!({ "group": "232.1.1.1", "address": "10.0.0.1", "source": "192.0.2.7" });
        let text = "group 232.1.1.1, address 10.0.0.1, source 192.0.2.7";
        assert_eq!(whole(Shape::SourceMembership, &bytes), both(json, text));
    }

    #[test]
    fn ipv6_structures_show_the_address_without_the_interface() {
        let mut bytes = "ff02::fb".parse::<Ipv6Addr>().unwrap().octets().to_vec();
        bytes.extend(ints(&[2]));
        assert_eq!(whole(Shape::Ipv6Membership, &bytes), both(json!({ "group": "ff02::fb" }), "group ff02::fb"));
        assert_eq!(whole(Shape::Ipv6PacketInfo, &bytes), both(json!({ "address": "ff02::fb" }), "address ff02::fb"));
        assert_eq!(whole(Shape::Ipv6Membership, &bytes[..16]), None);
    }
}
