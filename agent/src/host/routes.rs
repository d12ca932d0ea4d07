//! Routes, as the kernel tells them (rtnetlink(7)).

use std::{io, net::IpAddr};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::policy::lint::LockedRoute;

/// The routes of this network namespace that lock their congestion control.
///
/// # Errors
///
/// Where the kernel does not answer.
pub fn with_locked_congestion_control() -> io::Result<Vec<LockedRoute>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        each_route(&socket, family, |route| {
            if locks_congestion_control(route) {
                let congestion_control = metrics(route).find_map(|metric| match metric {
                    RouteMetric::CcAlgo(name) => Some(name.clone()),
                    _ => None,
                });
                found.push(LockedRoute { destination: destination(route), congestion_control });
            }
        })?;
    }
    Ok(found)
}

fn each_route(socket: &Socket, family: AddressFamily, mut see: impl FnMut(&RouteMessage)) -> io::Result<()> {
    let mut route = RouteMessage::default();
    route.header.address_family = family;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut request = NetlinkMessage::new(header, RouteNetlinkMessage::GetRoute(route).into());
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        let mut left = bytes.as_slice();
        while !left.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(left).map_err(io::Error::other)?;
            // Messages begin at multiples of four bytes.
            let len = (message.header.length as usize).next_multiple_of(4);
            match message.payload {
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) => see(&route),
                _ => {}
            }
            left = left.get(len.max(1)..).unwrap_or_default();
        }
    }
}

fn locks_congestion_control(route: &RouteMessage) -> bool {
    /// RTAX_CC_ALGO (include/uapi/linux/rtnetlink.h).
    const CONGESTION_CONTROL: u32 = 16;
    metrics(route).any(|metric| matches!(metric, RouteMetric::Lock(locked) if locked & (1 << CONGESTION_CONTROL) != 0))
}

fn metrics(route: &RouteMessage) -> impl Iterator<Item = &RouteMetric> {
    let metrics = route.attributes.iter().filter_map(|attribute| match attribute {
        RouteAttribute::Metrics(metrics) => Some(metrics),
        _ => None,
    });
    metrics.flatten()
}

fn destination(route: &RouteMessage) -> String {
    let address = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::from(*address)),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::from(*address)),
        _ => None,
    });
    match address {
        Some(address) => format!("{address}/{}", route.header.destination_prefix_length),
        None => "default".to_owned(),
    }
}
