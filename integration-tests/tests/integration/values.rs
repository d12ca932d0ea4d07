//! Options that share bits or reset each other.

use nix::errno::Errno;
use serde_json::json;
use sockpolicy_integration_tests::{
    agent::Exec,
    kernels::Kernel,
    options::{
        IP_TOS, IPV6_TCLASS, SO_BINDTODEVICE, SO_MARK, SO_MAX_PACING_RATE, SO_PRIORITY, SO_RCVBUF, SO_RCVLOWAT,
        SO_SNDBUF, TCP_CONGESTION, TCP_KEEPCNT, TCP_WINDOW_CLAMP,
    },
    policy::PolicyFile,
    report::Sockets,
    require,
    script::{Family, Kind},
};

#[test]
fn priority_is_kept_although_type_of_service_resets_it() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new("[[rule]]\nset = { SO_PRIORITY = 5, IP_TOS = \"AF21\" }\n");
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    let udp = probe.open(Family::Inet, Kind::Udp);
    probe.bind(udp, Family::Inet.loopback());
    let peer = probe.local_address(udp);
    let connected = probe.open(Family::Inet, Kind::Udp);
    probe.connect(connected, peer);
    for fd in [pair.listener, pair.client, pair.server, udp, connected] {
        assert_eq!(probe.int(fd, IP_TOS), 0x48);
        assert_eq!(probe.int(fd, SO_PRIORITY), 5);
    }
    // The application's own call on IP_TOS has the same side effect.
    probe.set(pair.client, IP_TOS, 0xe0).unwrap();
    assert_eq!(probe.int(pair.client, IP_TOS), 0x48);
    assert_eq!(probe.int(pair.client, SO_PRIORITY), 5);
    drop(exec.finish());
}

/// For SO_RCVLOWAT, the kernel enlarges a buffer that is not locked, and the window clamp with it.
#[test]
fn low_water_mark_enlarges_no_buffer_or_window_beyond_the_policy() {
    require!("TCP_NODELAY");
    for (policy, errno, mark) in [
        ("limit = { SO_RCVBUF = { max = \"64KiB\" } }", None, 65536),
        ("limit = { SO_RCVBUF = { max = \"64KiB\", on_conflict = \"deny\" } }", Some(Errno::EPERM), 500),
        ("deny = [\"SO_RCVBUF\"]", Some(Errno::EPERM), 500),
    ] {
        let mut exec = Exec::start(&PolicyFile::new(format!("[[rule]]\n{policy}\n")));
        let probe = &mut exec.probe;
        let pair = probe.pair(Family::Inet6, Kind::Tcp);
        let fresh = probe.open(Family::Inet, Kind::Tcp);
        for fd in [fresh, pair.listener, pair.client, pair.server] {
            let before = probe.int(fd, SO_RCVBUF);
            for large in [1 << 20, -1] {
                probe.set(fd, SO_RCVLOWAT, 500).unwrap();
                assert_eq!(probe.set(fd, SO_RCVLOWAT, large).err(), errno, "{policy}");
                assert_eq!(probe.int(fd, SO_RCVLOWAT), mark, "{policy}");
                assert!(probe.int(fd, SO_RCVBUF) <= before.max(131_072), "{policy}");
            }
        }
        // The buffer of other sockets does not change.
        let udp = probe.open(Family::Inet, Kind::Udp);
        probe.set(udp, SO_RCVLOWAT, 1 << 20).unwrap();
        assert_eq!(probe.int(udp, SO_RCVLOWAT), 1 << 20, "{policy}");
        exec.finish().assert_nothing_lost();
    }
    let mut exec = Exec::start(&PolicyFile::new("[[rule]]\nset = { TCP_WINDOW_CLAMP = \"64KiB\" }\n"));
    let probe = &mut exec.probe;
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    for fd in [pair.client, pair.server] {
        let before = probe.int(fd, TCP_WINDOW_CLAMP);
        probe.set(fd, SO_RCVLOWAT, 1 << 20).unwrap();
        assert_eq!([SO_RCVLOWAT, TCP_WINDOW_CLAMP].map(|option| probe.int(fd, option)), [1 << 20, before]);
    }
    exec.finish().assert_nothing_lost();
}

#[test]
fn priority_is_set_at_connect_if_the_application_has_set_the_type_of_service() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new("[[rule]]\nset = { SO_PRIORITY = 5 }\n");
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let (_, address) = probe.listener(Family::Inet, Kind::Tcp);
    let client = probe.open(Family::Inet, Kind::Tcp);
    probe.set(client, IP_TOS, 0x10).unwrap();
    probe.connect(client, address);
    assert_eq!(probe.int(client, IP_TOS), 0x10);
    assert_eq!(probe.int(client, SO_PRIORITY), 5, "since connect");
    drop(exec.finish());
}

#[test]
fn masked_mark_leaves_the_other_bits_to_the_application() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new("[[rule]]\nset = { SO_MARK = \"0x20/0xff\" }\n");
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let (_, address) = probe.listener(Family::Inet, Kind::Tcp);
    let fd = probe.open(Family::Inet, Kind::Tcp);
    assert_eq!(probe.int(fd, SO_MARK), 0x20, "set at creation");
    probe.set(fd, SO_MARK, 0x1133).unwrap();
    assert_eq!(probe.int(fd, SO_MARK), 0x1120);
    probe.set(fd, SO_MARK, 0x2220).unwrap();
    assert_eq!(probe.int(fd, SO_MARK), 0x2220, "this call agrees");
    probe.connect(fd, address);
    assert_eq!(probe.int(fd, SO_MARK), 0x2220, "connect leaves these bits too");
    let report = exec.finish();
    let event = report.conflict("SO_MARK");
    assert_eq!((&event.wanted, &event.requested, &event.current), (&json!(0x20), &json!(0x1133), &json!(0x1120)));
    assert_eq!(event.mask, Some(0xff));
    let setting = report.setting("SO_MARK");
    assert_eq!((setting.calls.agreed, setting.calls.verdicts()["rewritten"]), (1, 1));
}

#[test]
fn code_point_leaves_the_congestion_bits_to_the_kernel() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new("[[rule]]\nset = { IP_TOS = \"AF21\", IPV6_TCLASS = \"AF21\" }\n");
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    for (family, option) in [(Family::Inet, IP_TOS), (Family::Inet6, IPV6_TCLASS)] {
        // The kernel does not let applications change the ECN bits of TCP sockets; it does for UDP sockets.
        let (_, address) = probe.listener(family, Kind::Tcp);
        let tcp = probe.open(family, Kind::Tcp);
        probe.connect(tcp, address);
        let before = probe.int(tcp, option);
        assert_eq!(before & 0xfc, 0x48, "{family:?}");
        probe.set(tcp, option, 0xb8 | 0x3).unwrap();
        assert_eq!(probe.int(tcp, option), before, "{family:?}");
        let udp = probe.open(family, Kind::Udp);
        probe.set(udp, option, 0xb8 | 0x2).unwrap();
        assert_eq!(probe.int(udp, option), 0x48 | 0x2, "{family:?}: code point the policy's, ECN the application's");
        probe.set(udp, option, 0x48 | 0x1).unwrap();
        assert_eq!(probe.int(udp, option), 0x48 | 0x1, "{family:?}: this call agrees");
        let address = probe.bind(udp, family.loopback());
        probe.connect(udp, address);
        assert_eq!(probe.int(udp, option), 0x48 | 0x1, "{family:?}: connect leaves these bits too");
    }
    let report = exec.finish();
    for option in ["IP_TOS", "IPV6_TCLASS"] {
        let calls = &report.setting(option).calls;
        assert_eq!((calls.agreed, calls.verdicts()["rewritten"], calls.reads), (1, 2, 0), "{option}");
    }
}

#[test]
fn code_point_applies_to_ipv4_traffic_of_ipv6_sockets_if_the_kernel_supports_that() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new("[[rule]]\nset = { IP_TOS = \"AF21\" }\n");
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let listener = probe.open(Family::Inet6, Kind::Tcp);
    let port = probe.bind(listener, "[::]:0".parse().unwrap()).port();
    probe.listen(listener);
    let client = probe.open(Family::Inet6, Kind::Tcp);
    probe.connect(client, format!("[::ffff:127.0.0.1]:{port}").parse().unwrap());
    let server = probe.accept(listener);
    // Sockets that may carry either family have it from the start.
    let seen = [listener, client, server].map(|fd| probe.int(fd, IP_TOS));
    // Over IPv6, the option has no effect.
    let other = probe.open(Family::Inet6, Kind::Tcp);
    probe.connect(other, format!("[::1]:{port}").parse().unwrap());
    let report = exec.finish();
    let Sockets { set, failed, failed_errno, .. } = report.setting("IP_TOS").sockets;
    if Kernel::current().has("IP_TOS on AF_INET6") {
        assert_eq!((seen, set, failed), ([0x48; 3], 2, 0), "the accepted socket inherits it");
    } else {
        // A failure on the listener is not reported, since the listener may never carry IPv4.
        assert_eq!((seen, set, failed, failed_errno), ([0; 3], 0, 2, Errno::EINVAL as u64), "the failures are counted");
    }
}

#[test]
fn congestion_control_is_kept_whatever_the_application_requests() {
    let policy = PolicyFile::new("[[rule]]\nset = { TCP_CONGESTION = \"reno\" }\n");
    let mut exec = Exec::start(&policy);
    for family in Family::BOTH {
        let pair = exec.probe.pair(family, Kind::Tcp);
        for fd in [pair.listener, pair.client, pair.server] {
            assert_eq!(exec.probe.text(fd, TCP_CONGESTION), "reno");
            // Names that are longer and shorter than the policy's, and one that does not exist.
            for asked in ["cubic", "bbr", "none-such"] {
                assert_eq!(exec.probe.set(fd, TCP_CONGESTION, asked), Ok(()), "{asked}");
                assert_eq!(exec.probe.text(fd, TCP_CONGESTION), "reno", "{asked}");
            }
            assert_eq!(exec.probe.set(fd, TCP_CONGESTION, "reno"), Ok(()));
            assert_eq!(exec.probe.set(fd, TCP_CONGESTION, "reno\0"), Ok(()), "with its NUL");
        }
        exec.probe.exchange_bytes(pair.client, pair.server);
    }
    let report = exec.finish();
    let calls = &report.setting("TCP_CONGESTION").calls;
    assert_eq!((calls.verdicts()["rewritten"], calls.agreed), (18, 12));
    let event = report.of("conflict", "TCP_CONGESTION")[0];
    assert_eq!((&event.wanted, &event.requested, &event.current), (&json!("reno"), &json!("cubic"), &json!("reno")));
}

#[test]
fn reading_a_buffer_of_the_policys_size_is_no_conflict() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new("[[rule]]\nset = { SO_SNDBUF = \"50KiB\", SO_RCVBUF = \"60KiB\" }\n");
    let mut exec = Exec::start(&policy);
    let pair = exec.probe.pair(Family::Inet, Kind::Tcp);
    exec.probe.set(pair.client, SO_SNDBUF, 9999).unwrap();
    assert_eq!(exec.probe.int(pair.client, SO_SNDBUF), 2 * 50 * 1024, "the kernel doubles it");
    assert_eq!(exec.probe.int(pair.server, SO_RCVBUF), 2 * 60 * 1024);
    let report = exec.finish();
    assert_eq!(report.summary.conflicts, 1, "{:?}", report.events);
}

#[test]
fn pacing_rate_can_be_passed_as_eight_bytes() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new("[[rule]]\nset = { SO_MAX_PACING_RATE = \"80mbit\" }\n");
    let mut exec = Exec::start(&policy);
    let fd = exec.probe.open(Family::Inet, Kind::Tcp);
    for asked in [1u64 << 40, 10_000_001, u64::MAX] {
        assert_eq!(exec.probe.set(fd, SO_MAX_PACING_RATE, asked), Ok(()));
        assert_eq!(exec.probe.get(fd, SO_MAX_PACING_RATE, 8), Ok(10_000_000u64.to_ne_bytes().to_vec()), "{asked}");
    }
    assert_eq!(exec.probe.set(fd, SO_MAX_PACING_RATE, 10_000_000u64), Ok(()), "this call agrees");
    let report = exec.finish();
    let calls = &report.setting("SO_MAX_PACING_RATE").calls;
    assert_eq!((calls.agreed, calls.verdicts()["rewritten"], calls.reads), (1, 3, 0));
    assert_eq!(report.of("conflict", "SO_MAX_PACING_RATE")[0].requested, json!(1u64 << 40));
}

/// connect(2) with AF_UNSPEC resets much of a socket (`tcp_disconnect`).
#[test]
fn values_are_set_after_the_socket_is_connected_again() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new(
        "[[rule]]\n\
         set = { TCP_CONGESTION = \"reno\", TCP_WINDOW_CLAMP = 50000, SO_MARK = 32, TCP_KEEPCNT = 5, \
                 SO_PRIORITY = { value = 4, on_conflict = \"allow\" } }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let (listener, address) = probe.listener(Family::Inet, Kind::Tcp);
    let client = probe.open(Family::Inet, Kind::Tcp);
    for priority in [4, 6] {
        probe.connect(client, address);
        probe.accept(listener);
        assert_eq!(probe.text(client, TCP_CONGESTION), "reno");
        assert_eq!(probe.int(client, TCP_WINDOW_CLAMP), 50_000);
        assert_eq!(probe.int(client, SO_MARK), 32);
        assert_eq!(probe.int(client, TCP_KEEPCNT), 5);
        assert_eq!(probe.int(client, SO_PRIORITY), priority);
        probe.disconnect(client);
        // From here on, the application's value of this option stays.
        probe.set(client, SO_PRIORITY, 6).unwrap();
    }
    let report = exec.finish();
    // One listener, one client, two accepted sockets.
    let Sockets { set, unchanged, failed, .. } = report.setting("TCP_KEEPCNT").sockets;
    assert_eq!((set + unchanged, failed), (4, 0));
}

#[test]
fn refused_setting_is_counted_and_breaks_no_connection() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new("[[rule]]\nname = \"vpn\"\nset = { SO_BINDTODEVICE = \"none-such0\", SO_MARK = 5 }\n");
    let mut exec = Exec::start(&policy);
    let pair = exec.probe.pair(Family::Inet, Kind::Tcp);
    exec.probe.exchange_bytes(pair.client, pair.server);
    assert_eq!(exec.probe.int(pair.client, SO_MARK), 5, "the other setting is applied");
    assert_eq!(exec.probe.text(pair.client, SO_BINDTODEVICE), "");
    let report = exec.finish();
    let Sockets { set, unchanged, failed, failed_errno, .. } = report.setting("SO_BINDTODEVICE").sockets;
    assert_eq!((set, unchanged, failed_errno), (0, 0, Errno::ENODEV as u64));
    // The listener and the client; accepted sockets have the device of their listener.
    assert_eq!(failed, 2);
    let [event] = report.of("outcome", "SO_BINDTODEVICE")[..] else { panic!("{:?}", report.events) };
    assert_eq!(event.outcome.as_deref(), Some("failed(ENODEV)"));
    assert_eq!(event.result, Some(-(Errno::ENODEV as i64)));
    assert_eq!(event.wanted, json!("none-such0"));
    assert_eq!(event.rule.as_deref(), Some("vpn"));
}
