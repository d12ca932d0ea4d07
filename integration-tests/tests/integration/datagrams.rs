//! Datagram sockets that are neither bound nor connected: their options are set once, with the first datagram.

use std::net::SocketAddr;

use sockpolicy_integration_tests::{
    agent::{Exec, Run},
    cgroup::Cgroup,
    kernels::Kernel,
    options::{IP_TOS, IPV6_TCLASS, SO_RCVBUF, SO_RCVLOWAT, SO_SNDBUF},
    policy::PolicyFile,
    probe::Probe,
    require,
    script::{Family, Fd, Kind},
};

fn receiver(probe: &mut Probe, family: Family) -> (Fd, SocketAddr) {
    let receiver = probe.open(family, Kind::Udp);
    let address = probe.bind(receiver, family.loopback());
    (receiver, address)
}

#[test]
fn options_are_set_only_with_the_first_datagram() {
    require!("cgroup/sendmsg4");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { protocol = \"udp\" }\n\
         set = { SO_SNDBUF = { value = 4096, on_conflict = \"allow\" }, SO_RCVLOWAT = 3 }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    for family in Family::BOTH {
        let (receiver, address) = receiver(probe, family);
        let sender = probe.open(family, Kind::Udp);
        let before = probe.int(sender, SO_SNDBUF);
        let is_set = Kernel::current().has("lsm_cgroup/socket_post_create");
        assert_eq!(before == 8192, is_set, "{family:?}: set at creation");
        for _ in 0..3 {
            probe.send(sender, Some(address));
            probe.receive(receiver);
        }
        assert_eq!((probe.int(sender, SO_SNDBUF), probe.int(sender, SO_RCVLOWAT)), (8192, 3), "{family:?}");
        // With `on_conflict = "allow"`, the application's value is kept, also if it was set before the first
        // datagram.
        probe.set(sender, SO_SNDBUF, 10_000).unwrap();
        let other = probe.open(family, Kind::Udp);
        probe.set(other, SO_SNDBUF, 10_000).unwrap();
        for fd in [sender, other] {
            probe.send(fd, Some(address));
            probe.receive(receiver);
            assert_eq!(probe.int(fd, SO_SNDBUF), 20_000, "{family:?}");
        }
    }
    let report = exec.finish();
    // The bound receiver and the two senders.
    let sockets = &report.setting("SO_RCVLOWAT").sockets;
    assert_eq!((sockets.set, sockets.unchanged, sockets.failed), (6, 0, 0));
    report.assert_nothing_lost();
}

/// The decision at connect is not repeated without the peer when the socket also sends to an address.
#[test]
fn connected_socket_that_sends_to_an_address_keeps_its_values() {
    require!("cgroup/sendmsg4");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { protocol = \"udp\", remote = \"127.0.0.0/8\" }\nset = { SO_RCVBUF = 4096 }\n\
         [[rule]]\nmatch = { protocol = \"udp\" }\nset = { SO_RCVBUF = 8192 }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let (_, address) = receiver(probe, Family::Inet);
    let sender = probe.open(Family::Inet, Kind::Udp);
    probe.connect(sender, address);
    probe.send(sender, Some(address));
    assert_eq!(probe.int(sender, SO_RCVBUF), 8192, "by the first rule, doubled by the kernel");
    drop(exec.finish());
}

#[test]
fn socket_older_than_the_policy_is_not_changed() {
    require!("cgroup/sendmsg4");
    let target = Cgroup::new();
    let mut probe = Probe::start(&target);
    let (_, address) = receiver(&mut probe, Family::Inet);
    let before = probe.open(Family::Inet, Kind::Udp);
    let policy = PolicyFile::new("[[rule]]\nmatch = { protocol = \"udp\" }\nset = { SO_RCVLOWAT = 3 }\n");
    let run = Run::start(&policy, &target);
    let after = probe.open(Family::Inet, Kind::Udp);
    let reported = [before, after].map(|fd| {
        probe.send(fd, Some(address));
        probe.int(fd, SO_RCVLOWAT)
    });
    assert_eq!(reported, [1, 3]);
    drop(probe);
    drop(run.finish());
}

/// Such a socket can have many peers.
#[test]
fn rule_about_the_peer_does_not_match_a_socket_without_a_peer() {
    require!("cgroup/sendmsg4");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { protocol = \"udp\", remote = \"127.0.0.0/8\" }\nset = { SO_RCVBUF = 4096 }\n\
         [[rule]]\nmatch = { protocol = \"udp\" }\nset = { SO_RCVLOWAT = 3 }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let (_, address) = receiver(probe, Family::Inet);
    let sender = probe.open(Family::Inet, Kind::Udp);
    let before = probe.int(sender, SO_RCVBUF);
    probe.send(sender, Some(address));
    assert_eq!((probe.int(sender, SO_RCVBUF), probe.int(sender, SO_RCVLOWAT)), (before, 3));
    probe.connect(sender, address);
    assert_eq!(probe.int(sender, SO_RCVBUF), 8192, "now it has a peer");
    drop(exec.finish());
}

/// An IPv6 socket without a local address can carry both families.
#[test]
fn socket_that_can_carry_both_families_has_both_code_points() {
    require!("cgroup/sendmsg6");
    let policy = PolicyFile::new("[[rule]]\nset = { IP_TOS = \"AF21\", IPV6_TCLASS = \"AF22\" }\n");
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let (receiver, address) = receiver(probe, Family::Inet);
    let sender = probe.open(Family::Inet6, Kind::Udp);
    let mapped = format!("[::ffff:127.0.0.1]:{}", address.port()).parse().unwrap();
    probe.send(sender, Some(mapped));
    probe.receive(receiver);
    let tos = if Kernel::current().has("IP_TOS on AF_INET6") { 0x48 } else { 0 };
    assert_eq!((probe.int(sender, IP_TOS), probe.int(sender, IPV6_TCLASS)), (tos, 0x50));
    let report = exec.finish();
    assert_eq!(report.setting("IP_TOS").sockets.failed, 0);
    assert!(report.of("outcome", "IP_TOS").is_empty(), "{:?}", report.events);
}
