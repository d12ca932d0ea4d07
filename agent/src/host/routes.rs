//! Reads routes from the kernel (rtnetlink(7)).

use std::{io, net::IpAddr};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric},
};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};

use super::netlink;

/// A route whose congestion control connections cannot change (`congctl lock`, ip-route(8)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// As `ip route` shows it.
    pub destination: String,
    /// `None` if the route does not name one.
    pub congestion_control: Option<String>,
}

/// Returns the routes of this network namespace that lock the congestion control (`congctl lock`).
///
/// # Errors
///
/// Fails if the routes cannot be read.
pub fn with_locked_congestion_control() -> io::Result<Vec<Route>> {
    let socket = netlink::open(NETLINK_ROUTE)?;
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        each_route(&socket, family, |route| found.extend(locked(route)))?;
    }
    Ok(found)
}

/// Returns the destination and the congestion control of a route, if the route locks it.
fn locked(route: &RouteMessage) -> Option<Route> {
    if !locks_congestion_control(route) {
        return None;
    }
    let congestion_control = metrics(route).find_map(|metric| match metric {
        RouteMetric::CcAlgo(name) => Some(name.clone()),
        _ => None,
    });
    Some(Route { destination: destination(route), congestion_control })
}

/// Parses a datagram with routes.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn in_datagram(datagram: &[u8]) -> io::Result<Vec<Route>> {
    let mut found = Vec::new();
    netlink::each_message(datagram, &mut |message| {
        if let RouteNetlinkMessage::NewRoute(route) = message {
            found.extend(locked(&route));
        }
    })?;
    Ok(found)
}

/// Calls `visit` with each route of an address family.
fn each_route(socket: &Socket, family: AddressFamily, mut visit: impl FnMut(&RouteMessage)) -> io::Result<()> {
    let mut route = RouteMessage::default();
    route.header.address_family = family;
    netlink::dump(socket, RouteNetlinkMessage::GetRoute(route), |message| {
        if let RouteNetlinkMessage::NewRoute(route) = message {
            visit(&route);
        }
    })
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
