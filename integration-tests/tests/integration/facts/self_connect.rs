//! A socket that called connect is outbound, even if a simultaneous open connects it.

use nix::errno::Errno;
use sockpolicy_integration_tests::{
    agent::Exec,
    options::{IP_TTL, SO_SNDBUF, TCP_CORK, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_USER_TIMEOUT},
    policy::PolicyFile,
    script::{Family, Kind},
};

const POLICY: &str = "
[[rule]]
name = \"servers\"
match = { protocol = \"tcp\", direction = \"inbound\" }
set = { TCP_KEEPIDLE = \"300s\", TCP_USER_TIMEOUT = \"5min\" }

[[rule]]
name = \"clients\"
match = { protocol = \"tcp\", direction = \"outbound\" }
set = { TCP_KEEPIDLE = \"60s\", TCP_KEEPCNT = 3 }
limit = { SO_SNDBUF = { max = \"32KiB\" } }
deny = [\"TCP_CORK\"]
";

#[test]
fn self_connected_socket_is_outbound_and_counted_once() {
    let mut exec = Exec::start(&PolicyFile::new(POLICY));
    let probe = &mut exec.probe;
    for family in Family::BOTH {
        let fd = probe.open(family, Kind::Tcp);
        let own = probe.bind(fd, family.loopback());
        probe.connect(fd, own);
        assert_eq!(probe.peer_address(fd), own);
        let got = [TCP_KEEPIDLE, TCP_KEEPCNT, TCP_USER_TIMEOUT].map(|option| probe.int(fd, option));
        assert_eq!(got, [60, 3, 0], "{family:?}");
        probe.set(fd, SO_SNDBUF, 100_000).unwrap();
        assert_eq!(probe.int(fd, SO_SNDBUF), 65536, "{family:?}");
        assert_eq!(probe.set(fd, TCP_CORK, 1), Err(Errno::EPERM), "{family:?}");
        probe.set(fd, TCP_KEEPIDLE, 999).unwrap();
        assert_eq!(probe.int(fd, TCP_KEEPIDLE), 60, "{family:?}");
    }
    let report = exec.finish();
    assert_eq!(report.setting_of("clients", "TCP_KEEPIDLE").sockets.set, 2);
    assert_eq!(report.setting_of("servers", "TCP_KEEPIDLE").sockets.set, 0);
    report.assert_nothing_lost();
}

/// With `on_conflict = "allow"`, the application's value stays, before and after the connection.
#[test]
fn self_connected_socket_keeps_its_notes() {
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { direction = \"outbound\" }\n\
         set = { TCP_KEEPCNT = { value = 3, on_conflict = \"allow\" } }\nlimit = { IP_TTL = { max = 9 } }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let fd = probe.open(Family::Inet, Kind::Tcp);
    assert_eq!(probe.try_connect(fd, "127.0.0.9:1".parse().unwrap()), Err(Errno::ECONNREFUSED));
    probe.set(fd, TCP_KEEPCNT, 8).unwrap();
    probe.disconnect(fd);
    let own = probe.bind(fd, Family::Inet.loopback());
    probe.connect(fd, own);
    assert_eq!(probe.int(fd, TCP_KEEPCNT), 8);
    probe.set(fd, IP_TTL, 99).unwrap();
    assert_eq!(probe.int(fd, IP_TTL), 9);
    drop(exec.finish());
}

/// A listener that was a client before has sent a segment, but the sockets that it accepts have not.
#[test]
fn accepted_socket_of_a_former_client_is_inbound() {
    let mut exec = Exec::start(&PolicyFile::new(POLICY));
    let probe = &mut exec.probe;
    for memory in ["131072", "0"] {
        // Only some kernels have this limit in network namespaces.
        let is_limited = probe.try_write("/proc/sys/net/core/optmem_max", memory).is_ok();
        let listener = probe.open(Family::Inet, Kind::Tcp);
        assert_eq!(probe.try_connect(listener, "127.0.0.9:1".parse().unwrap()), Err(Errno::ECONNREFUSED));
        let address = probe.bind(listener, Family::Inet.loopback());
        probe.listen(listener);
        let client = probe.open(Family::Inet, Kind::Tcp);
        probe.connect(client, address);
        let server = probe.accept(listener);
        assert_eq!(
            [client, server].map(|fd| probe.int(fd, TCP_KEEPIDLE)),
            [60, 300],
            "optmem_max {memory}, {is_limited}"
        );
        assert_eq!(probe.set(server, TCP_CORK, 1), Ok(()), "optmem_max {memory}, {is_limited}");
        assert_eq!(probe.set(client, TCP_CORK, 1), Err(Errno::EPERM), "optmem_max {memory}, {is_limited}");
    }
    drop(exec.finish());
}
