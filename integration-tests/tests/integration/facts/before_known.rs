//! Calls that an application makes before it is known which rules match its socket.

use nix::errno::Errno;
use sockpolicy_integration_tests::{
    agent::Exec,
    options::{
        IP_TTL, SO_KEEPALIVE, SO_PRIORITY, SO_RCVBUF, SO_SNDBUF, TCP_CONGESTION, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_MAXSEG,
        TCP_NODELAY, TCP_USER_TIMEOUT,
    },
    policy::PolicyFile,
    require,
    script::{Family, Kind},
};

#[test]
fn limit_applies_to_values_set_before_listen() {
    require!("TCP_NODELAY");
    let policy = PolicyFile::new(
        "[[rule]]\nname = \"in\"\nmatch = { direction = \"inbound\" }\n\
         limit = { SO_SNDBUF = { max = \"32KiB\" }, SO_RCVBUF = { max = \"32KiB\" }, TCP_KEEPIDLE = { min = \"10s\", max = \"100s\" } }\n\
         deny = [\"TCP_NODELAY\", \"TCP_CONGESTION\"]\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let fresh = probe.open(Family::Inet, Kind::Tcp);
    let congestion = probe.text(fresh, TCP_CONGESTION);
    for family in Family::BOTH {
        let listener = probe.open(family, Kind::Tcp);
        let client = probe.open(family, Kind::Tcp);
        for fd in [listener, client] {
            probe.set(fd, SO_SNDBUF, 100_000).unwrap();
            probe.set(fd, SO_RCVBUF, 100_000).unwrap();
            probe.set(fd, TCP_KEEPIDLE, 5).unwrap();
            probe.set(fd, TCP_NODELAY, 1).unwrap();
            probe.set(fd, TCP_CONGESTION, "reno").unwrap();
        }
        let address = probe.bind(listener, family.loopback());
        probe.listen(listener);
        probe.connect(client, address);
        let server = probe.accept(listener);
        for fd in [listener, server] {
            let got = [SO_SNDBUF, SO_RCVBUF, TCP_KEEPIDLE, TCP_NODELAY].map(|option| probe.int(fd, option));
            assert_eq!(got, [65536, 65536, 10, 0], "{family:?}");
            assert_eq!(probe.text(fd, TCP_CONGESTION), congestion, "{family:?}");
            assert_eq!(probe.set(fd, TCP_NODELAY, 1), Err(Errno::EPERM));
        }
        // The rule does not match the client.
        let got = [SO_SNDBUF, SO_RCVBUF, TCP_KEEPIDLE, TCP_NODELAY].map(|option| probe.int(client, option));
        assert_eq!(got, [200_000, 200_000, 5, 1], "{family:?}");
        assert_eq!(probe.text(client, TCP_CONGESTION), "reno");
    }
    let report = exec.finish();
    assert_eq!(report.setting_of("in", "SO_SNDBUF").calls.verdicts().get("clamped"), Some(&2), "one for each listener");
    report.assert_nothing_lost();
}

#[test]
fn limit_applies_to_values_set_before_connect() {
    require!("TCP_NODELAY");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { remote = [\"127.1.0.0/16\"] }\n\
         limit = { SO_SNDBUF = { max = \"8KiB\" }, SO_PRIORITY = { max = 2 }, TCP_USER_TIMEOUT = { max = \"3s\", on_conflict = \"deny\" } }\n\
         deny = [\"SO_KEEPALIVE\"]\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let options = [SO_SNDBUF, SO_PRIORITY, SO_KEEPALIVE];
    let fd = probe.open(Family::Inet, Kind::Udp);
    probe.set(fd, SO_SNDBUF, 100_000).unwrap();
    probe.set(fd, SO_PRIORITY, 5).unwrap();
    probe.set(fd, SO_KEEPALIVE, 1).unwrap();
    probe.connect(fd, "127.2.0.1:9".parse().unwrap());
    assert_eq!(options.map(|option| probe.int(fd, option)), [200_000, 5, 1]);
    probe.connect(fd, "127.1.0.1:9".parse().unwrap());
    assert_eq!(options.map(|option| probe.int(fd, option)), [16384, 2, 0]);
    let listener = probe.open(Family::Inet, Kind::Tcp);
    let address = probe.bind(listener, "127.1.0.1:0".parse().unwrap());
    probe.listen(listener);
    let client = probe.open(Family::Inet, Kind::Tcp);
    probe.set(client, SO_SNDBUF, 100_000).unwrap();
    probe.set(client, TCP_USER_TIMEOUT, 9000).unwrap();
    probe.connect(client, address);
    assert_eq!([SO_SNDBUF, TCP_USER_TIMEOUT].map(|option| probe.int(client, option)), [16384, 0]);
    drop(exec.finish());
}

/// For an unbound datagram socket, the kernel chooses the local address after the last hook of connect. A rule that
/// may match this address applies at connect, and not before.
#[test]
fn limit_for_a_local_address_that_no_hook_sees_applies_at_connect() {
    require!("TCP_NODELAY");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { local_port = \"1024-65535\" }\nlimit = { SO_SNDBUF = { max = \"8KiB\" } }\n\
         [[rule]]\nmatch = { local = [\"127.0.0.0/8\", \"::1\"] }\nlimit = { SO_PRIORITY = { max = 2 } }\n\
         deny = [\"SO_KEEPALIVE\"]\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let options = [SO_SNDBUF, SO_PRIORITY, SO_KEEPALIVE];
    for family in Family::BOTH {
        let receiver = probe.open(family, Kind::Udp);
        let there = probe.bind(receiver, family.loopback());
        let fd = probe.open(family, Kind::Udp);
        probe.set(fd, SO_SNDBUF, 100_000).unwrap();
        probe.set(fd, SO_PRIORITY, 5).unwrap();
        probe.set(fd, SO_KEEPALIVE, 1).unwrap();
        assert_eq!(options.map(|option| probe.int(fd, option)), [200_000, 5, 1], "it may still get another address");
        probe.connect(fd, there);
        assert_eq!(options.map(|option| probe.int(fd, option)), [16384, 2, 0], "{family:?}");
    }
    // If the local address is known, it is also known that the rule does not match.
    let fd = probe.open(Family::Inet, Kind::Udp);
    probe.set(fd, SO_SNDBUF, 100_000).unwrap();
    probe.bind(fd, "0.0.0.0:999".parse().unwrap());
    probe.connect(fd, "127.0.0.1:9".parse().unwrap());
    assert_eq!(probe.int(fd, SO_SNDBUF), 200_000);
    exec.finish().assert_nothing_lost();
}

/// The application has not set the defaults, so a limit does not apply to them.
#[test]
fn limit_does_not_change_defaults() {
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { direction = \"inbound\" }\nlimit = { SO_RCVBUF = { max = \"4KiB\" }, TCP_KEEPCNT = { max = 2 } }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let fresh = probe.open(Family::Inet, Kind::Tcp);
    let wanted = [SO_RCVBUF, TCP_KEEPCNT].map(|option| probe.int(fresh, option));
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    assert_eq!([SO_RCVBUF, TCP_KEEPCNT].map(|option| probe.int(pair.listener, option)), wanted);
    assert_eq!(probe.int(pair.server, TCP_KEEPCNT), wanted[1]);
    assert_eq!(exec.finish().summary.conflicts, 0);
}

/// Programs cannot correct an option that they cannot set or read. A rule that may still match therefore applies to
/// the call.
#[test]
fn rules_that_may_match_apply_to_calls_that_cannot_be_corrected_later() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { direction = \"outbound\" }\nlimit = { IP_TTL = { max = 8 } }\ndeny = [\"TCP_MAXSEG\"]\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    for kind in [Kind::Tcp, Kind::Udp, Kind::Raw] {
        let fd = probe.open(Family::Inet, kind);
        probe.set(fd, IP_TTL, 200).unwrap();
        assert_eq!(probe.int(fd, IP_TTL), 8, "{kind:?}");
    }
    let (listener, _) = probe.listener(Family::Inet, Kind::Tcp);
    probe.set(listener, IP_TTL, 200).unwrap();
    assert_eq!(probe.int(listener, IP_TTL), 200, "the listener is known not to be outbound");
    assert_eq!(probe.set(listener, TCP_MAXSEG, 600), Ok(()));
    let client = probe.open(Family::Inet, Kind::Tcp);
    assert_eq!(probe.set(client, TCP_MAXSEG, 600), Err(Errno::EPERM));
    drop(exec.finish());
}
