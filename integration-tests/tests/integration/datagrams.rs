//! Datagram sockets that are neither bound nor connected: reached with their first datagram, once.

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
fn options_are_set_with_the_first_datagram_and_not_again() {
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
        assert_eq!(before == 8192, is_set, "{family:?}: when it was made");
        for _ in 0..3 {
            probe.send(sender, Some(address));
            probe.receive(receiver);
        }
        assert_eq!((probe.int(sender, SO_SNDBUF), probe.int(sender, SO_RCVLOWAT)), (8192, 3), "{family:?}");
        // The application wins where the policy lets it, also if it asks before it sends.
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
    // The receiver, which is bound, and the two senders.
    let sockets = &report.setting("SO_RCVLOWAT").sockets;
    assert_eq!((sockets.set, sockets.unchanged, sockets.failed), (6, 0, 0));
    report.assert_nothing_lost();
}

/// What was decided when it connected is not decided anew, without its peer, when it sends to an address all the same.
#[test]
fn connected_socket_that_sends_to_an_address_keeps_what_it_has() {
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
fn socket_that_was_there_before_is_left_as_it_is() {
    require!("cgroup/sendmsg4");
    let target = Cgroup::new();
    let mut probe = Probe::start(&target);
    let (_, address) = receiver(&mut probe, Family::Inet);
    let before = probe.open(Family::Inet, Kind::Udp);
    let policy = PolicyFile::new("[[rule]]\nmatch = { protocol = \"udp\" }\nset = { SO_RCVLOWAT = 3 }\n");
    let run = Run::start(&policy, &target);
    let after = probe.open(Family::Inet, Kind::Udp);
    let told = [before, after].map(|fd| {
        probe.send(fd, Some(address));
        probe.int(fd, SO_RCVLOWAT)
    });
    assert_eq!(told, [1, 3]);
    drop(probe);
    drop(run.finish());
}

/// It has many peers, or may have.
#[test]
fn rule_about_the_peer_is_not_for_a_socket_without_one() {
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
    assert_eq!(probe.int(sender, SO_RCVBUF), 8192, "now it has one");
    drop(exec.finish());
}

/// An IPv6 socket without an address of its own may carry both.
#[test]
fn socket_that_may_carry_both_has_the_code_points_of_both() {
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
