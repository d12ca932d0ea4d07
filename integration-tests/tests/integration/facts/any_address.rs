//! For a connect to an unspecified address, rules match the address that the kernel connects to.

use std::net::SocketAddr;

use sockpolicy_integration_tests::{
    agent::Exec,
    options::{SO_BINDTODEVICE, SO_KEEPALIVE, SO_MARK},
    policy::PolicyFile,
    probe::Probe,
    require,
    script::{Family, Fd, Kind},
};

/// A mark for each address that a peer can have here.
const MARKS: [(&str, i32); 4] = [("127.0.0.1", 1), ("127.0.0.5", 5), ("127.0.0.6", 6), ("::1", 61)];

fn policy() -> PolicyFile {
    let rule = |(address, mark): (&str, i32)| {
        format!(
            "[[rule]]\nmatch = {{ direction = \"outbound\", remote = \"{address}\" }}\nset = {{ SO_MARK = {mark} }}\n"
        )
    };
    PolicyFile::new(MARKS.map(rule).concat())
}

/// Returns the mark for the peer of a socket, which the kernel reports.
fn wanted(probe: &mut Probe, fd: Fd) -> i32 {
    let peer = probe.peer_address(fd).ip().to_canonical().to_string();
    MARKS.iter().find(|(address, _)| *address == peer).map_or(0, |(_, mark)| *mark)
}

/// The family of the socket, the address to bind to, and the address to connect to.
const CONNECTS: [(Family, &str, &str); 13] = [
    (Family::Inet, "", "0.0.0.0"),
    (Family::Inet, "0.0.0.0", "0.0.0.0"),
    (Family::Inet, "127.0.0.5", "0.0.0.0"),
    (Family::Inet, "127.0.0.1", "127.0.0.6"),
    (Family::Inet6, "", "::"),
    (Family::Inet6, "::", "::"),
    (Family::Inet6, "::1", "::"),
    (Family::Inet6, "", "::ffff:0.0.0.0"),
    (Family::Inet6, "::", "::ffff:0.0.0.0"),
    (Family::Inet6, "::ffff:127.0.0.5", "::ffff:0.0.0.0"),
    (Family::Inet6, "::ffff:127.0.0.5", "::"),
    (Family::Inet6, "::ffff:127.0.0.5", "::ffff:127.0.0.6"),
    (Family::Inet6, "::1", "::1"),
];

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

#[test]
fn unspecified_address_matches_as_the_address_that_the_kernel_connects_to() {
    require!("cgroup/bind4");
    let mut exec = Exec::start(&policy());
    let probe = &mut exec.probe;
    for kind in [Kind::Tcp, Kind::Udp] {
        let receiver = probe.open(Family::Inet6, kind);
        let port = probe.bind(receiver, at("::", 0)).port();
        if kind == Kind::Tcp {
            probe.listen(receiver);
        }
        for (family, own, peer) in CONNECTS {
            let fd = probe.open(family, kind);
            if !own.is_empty() {
                probe.bind(fd, at(own, 0));
            }
            probe.connect(fd, at(peer, port));
            let wanted = wanted(probe, fd);
            assert_ne!(wanted, 0, "{kind:?} {own} {peer}");
            assert_eq!(probe.int(fd, SO_MARK), wanted, "{kind:?} bound to {own:?}, connected to {peer}");
        }
    }
    exec.finish().assert_nothing_lost();
}

/// The kernel uses an address of the device. Programs learn it with the SYN, but never for a datagram socket.
#[test]
fn unspecified_address_on_a_bound_device_is_not_guessed() {
    require!("cgroup/bind4");
    let mut exec = Exec::start(&policy());
    let probe = &mut exec.probe;
    let (_, address) = {
        let fd = probe.open(Family::Inet, Kind::Tcp);
        let address = probe.bind(fd, at("0.0.0.0", 0));
        probe.listen(fd);
        (fd, address)
    };
    let fd = probe.open(Family::Inet, Kind::Tcp);
    probe.set(fd, SO_BINDTODEVICE, "lo").unwrap();
    probe.connect(fd, at("0.0.0.0", address.port()));
    let wanted = wanted(probe, fd);
    assert_eq!(probe.int(fd, SO_MARK), wanted, "{}", probe.peer_address(fd));
    let fd = probe.open(Family::Inet, Kind::Udp);
    probe.set(fd, SO_BINDTODEVICE, "lo").unwrap();
    probe.connect(fd, at("0.0.0.0", 9));
    assert_eq!(probe.int(fd, SO_MARK), 0, "{}", probe.peer_address(fd));
    drop(exec.finish());
}

/// A second connect of a datagram socket to an unspecified address connects to its own address, which the first
/// connect chose.
#[test]
fn unspecified_address_of_a_connected_datagram_socket_is_its_own() {
    require!("cgroup/bind4");
    let mut exec = Exec::start(&policy());
    let probe = &mut exec.probe;
    for (family, first, any) in [
        (Family::Inet, "127.0.0.6", "0.0.0.0"),
        (Family::Inet6, "::ffff:127.0.0.6", "::ffff:0.0.0.0"),
        (Family::Inet6, "::1", "::"),
    ] {
        let fd = probe.open(family, Kind::Udp);
        for peer in [first, any, first] {
            probe.connect(fd, at(peer, 9));
            let wanted = wanted(probe, fd);
            assert_eq!(probe.int(fd, SO_MARK), wanted, "{first}, then {any}");
        }
    }
    drop(exec.finish());
}

/// An unspecified address leads to this host, so a rule for traffic that leaves the host does not match.
#[test]
fn rule_with_an_exception_for_loopback_does_not_match_unspecified_addresses() {
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { direction = \"outbound\", not_remote = [\"127.0.0.0/8\", \"::1/128\"] }\n\
         set = { SO_KEEPALIVE = true }\nlimit = { SO_SNDBUF = { max = \"32KiB\" } }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let listener = probe.open(Family::Inet6, Kind::Tcp);
    let port = probe.bind(listener, at("::", 0)).port();
    probe.listen(listener);
    for (family, peer) in [(Family::Inet, "0.0.0.0"), (Family::Inet6, "::"), (Family::Inet6, "::ffff:0.0.0.0")] {
        let fd = probe.open(family, Kind::Tcp);
        probe.connect(fd, at(peer, port));
        assert_eq!(probe.int(fd, SO_KEEPALIVE), 0, "{peer}");
        probe.accept(listener);
    }
    assert_eq!(exec.finish().summary.conflicts, 0);
}
