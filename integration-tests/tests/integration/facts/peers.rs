//! If the peer changes and no rule sets an option any more, the option gets its former value again.

use std::net::SocketAddr;

use nix::errno::Errno;
use sockpolicy_integration_tests::{
    agent::Exec,
    options::{
        IP_TOS, IPV6_TCLASS, SO_BINDTODEVICE, SO_KEEPALIVE, SO_MARK, SO_PRIORITY, SO_RCVLOWAT, SO_SNDBUF, SocketOption,
        TCP_CONGESTION, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_MAXSEG, TCP_NODELAY, TCP_NOTSENT_LOWAT, TCP_SYNCNT,
        TCP_USER_TIMEOUT,
    },
    policy::PolicyFile,
    probe::Probe,
    require,
    script::{Family, Fd, Kind},
};

const A: &str = "127.1.0.1:9";
const B: &str = "127.2.0.1:9";

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn values(probe: &mut Probe, fd: Fd, options: &[SocketOption]) -> Vec<i32> {
    options.iter().map(|option| probe.int(fd, *option)).collect()
}

#[test]
fn datagram_socket_has_the_values_for_its_current_peer() {
    require!("TCP_NODELAY");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { remote = [\"127.1.0.0/16\"] }\n\
         set = { SO_MARK = 0x20, IP_TOS = \"EF\", SO_RCVLOWAT = 9, SO_SNDBUF = 4096 }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let options = [SO_MARK, IP_TOS, SO_PRIORITY, SO_RCVLOWAT, SO_SNDBUF];
    let fd = probe.open(Family::Inet, Kind::Udp);
    // The application's values are the former values.
    probe.set(fd, SO_PRIORITY, 3).unwrap();
    probe.set(fd, SO_MARK, 7).unwrap();
    let before = values(probe, fd, &options);
    for _ in 0..2 {
        probe.connect(fd, address(A));
        assert_eq!(values(probe, fd, &options), [0x20, 0xb8, 4, 9, 8192]);
        probe.connect(fd, address(B));
        assert_eq!(values(probe, fd, &options), before);
    }
    // A value that the application sets between peers becomes the former value.
    probe.set(fd, SO_MARK, 8).unwrap();
    probe.connect(fd, address(A));
    probe.connect(fd, address(B));
    assert_eq!(probe.int(fd, SO_MARK), 8);
    let report = exec.finish();
    assert_eq!(report.setting("SO_MARK").sockets.set, 1, "one socket");
    report.assert_nothing_lost();
}

#[test]
fn disconnected_datagram_socket_has_no_values_for_its_former_peer() {
    require!("TCP_NODELAY");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { remote_port = 9 }\nset = { SO_MARK = 0x20, IPV6_TCLASS = \"EF\", SO_RCVLOWAT = 9 }\n\
         [[rule]]\nset = { SO_RCVLOWAT = 3 }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let receiver = probe.open(Family::Inet6, Kind::Udp);
    let there = probe.bind(receiver, address("[::1]:0"));
    let options = [SO_MARK, IPV6_TCLASS, SO_RCVLOWAT];
    let fd = probe.open(Family::Inet6, Kind::Udp);
    // Calls also run programs for the socket, which then see it without a peer.
    for (next, call) in [("connect", ""), ("send", ""), ("send", "read"), ("send", "set")] {
        probe.connect(fd, address("[::1]:9"));
        assert_eq!(values(probe, fd, &options), [0x20, 0xb8, 9]);
        probe.disconnect(fd);
        match call {
            "read" => drop(probe.int(fd, SO_RCVLOWAT)),
            "set" => drop(probe.set(fd, SO_RCVLOWAT, 3)),
            _ => {}
        }
        if next == "connect" {
            probe.connect(fd, there);
        } else {
            probe.send(fd, Some(there));
        }
        assert_eq!(values(probe, fd, &options), [0, 0, 3], "after AF_UNSPEC, {call:?} and {next}");
    }
    drop(exec.finish());
}

/// A connection is refused, and the application connects the same socket to another peer.
#[test]
fn tcp_socket_has_no_values_for_a_peer_that_refused_it() {
    require!("TCP_NODELAY");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { remote = [\"127.1.0.0/16\"] }\n\
         set = { SO_MARK = 0x20, IP_TOS = \"EF\", TCP_KEEPIDLE = \"77s\", TCP_KEEPCNT = 7, TCP_USER_TIMEOUT = \"7s\", \
         SO_KEEPALIVE = true, TCP_SYNCNT = 2, TCP_NODELAY = true, TCP_NOTSENT_LOWAT = \"8KiB\", \
         TCP_CONGESTION = \"reno\", SO_PRIORITY = 5, TCP_MAXSEG = 600 }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let options = [
        SO_MARK,
        IP_TOS,
        TCP_KEEPIDLE,
        TCP_KEEPCNT,
        TCP_USER_TIMEOUT,
        SO_KEEPALIVE,
        TCP_SYNCNT,
        TCP_NODELAY,
        TCP_NOTSENT_LOWAT,
        SO_PRIORITY,
    ];
    let listener = probe.open(Family::Inet, Kind::Tcp);
    let port = probe.bind(listener, address("127.2.0.1:0")).port();
    probe.listen(listener);
    let there = address(&format!("127.2.0.1:{port}"));
    let plain = probe.open(Family::Inet, Kind::Tcp);
    probe.connect(plain, there);
    probe.accept(listener);
    let (wanted, segment) = (values(probe, plain, &options), probe.int(plain, TCP_MAXSEG));
    let congestion = probe.text(plain, TCP_CONGESTION);
    for unspec in [false, true] {
        let fd = probe.open(Family::Inet, Kind::Tcp);
        assert_eq!(probe.try_connect(fd, address(A)), Err(Errno::ECONNREFUSED));
        assert_eq!(probe.int(fd, TCP_KEEPIDLE), 77);
        if unspec {
            probe.disconnect(fd);
        }
        probe.connect(fd, there);
        probe.accept(listener);
        assert_eq!(values(probe, fd, &options), wanted);
        assert_eq!(probe.text(fd, TCP_CONGESTION), congestion);
        assert_eq!(probe.int(fd, TCP_MAXSEG), segment);
    }
    exec.finish().assert_nothing_lost();
}

/// A dual-stack socket has one family at a time.
#[test]
fn datagram_socket_that_changes_its_family_has_no_values_for_the_former_family() {
    require!("TCP_NODELAY");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { family = \"ipv4\" }\nset = { SO_MARK = 4 }\n\
         [[rule]]\nmatch = { family = \"ipv6\" }\nset = { SO_PRIORITY = 6 }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let fd = probe.open(Family::Inet6, Kind::Udp);
    for (peer, wanted) in [("[::ffff:127.0.0.1]:9", [4, 0]), ("[::1]:9", [0, 6]), ("[::ffff:127.0.0.1]:9", [4, 0])] {
        probe.disconnect(fd);
        probe.connect(fd, address(peer));
        assert_eq!(values(probe, fd, &[SO_MARK, SO_PRIORITY]), wanted, "{peer}");
    }
    drop(exec.finish());
}

#[test]
fn device_of_a_peer_is_not_kept_for_another() {
    require!("TCP_NODELAY");
    let policy = PolicyFile::new("[[rule]]\nmatch = { remote = \"127.1.0.1\" }\nset = { SO_BINDTODEVICE = \"lo\" }\n");
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let fd = probe.open(Family::Inet, Kind::Udp);
    for (peer, device) in [(A, "lo"), (B, ""), (A, "lo")] {
        probe.connect(fd, address(peer));
        assert_eq!(probe.text(fd, SO_BINDTODEVICE), device, "{peer}");
    }
    // connect(2) with AF_UNSPEC removes the device from the socket.
    probe.disconnect(fd);
    assert_eq!(probe.text(fd, SO_BINDTODEVICE), "");
    probe.connect(fd, address(A));
    assert_eq!(probe.text(fd, SO_BINDTODEVICE), "lo");
    drop(exec.finish());
}

/// The rule permits the application's value, so the rule does not restore the former value.
#[test]
fn allowed_value_of_the_application_stays_when_the_peer_changes() {
    require!("TCP_NODELAY");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { remote = \"127.1.0.1\" }\nset = { SO_MARK = { value = 5, on_conflict = \"allow\" } }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let fd = probe.open(Family::Inet, Kind::Udp);
    probe.connect(fd, address(A));
    assert_eq!(probe.int(fd, SO_MARK), 5);
    probe.set(fd, SO_MARK, 9).unwrap();
    for peer in [B, A] {
        probe.connect(fd, address(peer));
        assert_eq!(probe.int(fd, SO_MARK), 9, "{peer}");
    }
    drop(exec.finish());
}

/// A dry run sets no values, so it restores none.
#[test]
fn dry_run_changes_no_value_for_any_peer() {
    let policy = PolicyFile::new(
        "mode = \"dry-run\"\n[[rule]]\nmatch = { remote = \"127.1.0.1\" }\nset = { SO_MARK = 5 }\n\
         limit = { SO_SNDBUF = { max = \"4KiB\" } }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let fd = probe.open(Family::Inet, Kind::Udp);
    probe.set(fd, SO_MARK, 7).unwrap();
    probe.set(fd, SO_SNDBUF, 10_000).unwrap();
    for peer in [A, B] {
        probe.connect(fd, address(peer));
        assert_eq!(values(probe, fd, &[SO_MARK, SO_SNDBUF]), [7, 20_000], "{peer}");
    }
    drop(exec.finish());
}
