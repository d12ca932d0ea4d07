//! Which rule decides for which socket.

use sockpolicy_integration_tests::{
    agent::Exec,
    options::{
        IPV6_V6ONLY, SO_KEEPALIVE, SO_MARK, SO_PRIORITY, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_SYNCNT,
        TCP_USER_TIMEOUT,
    },
    policy::PolicyFile,
    require,
    script::{Family, Kind},
};

#[test]
fn protocol_distinguishes_tcp_udp_and_raw() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { protocol = \"tcp\" }\nset = { SO_MARK = 6 }\n\
         [[rule]]\nmatch = { protocol = \"udp\" }\nset = { SO_MARK = 17 }\n\
         [[rule]]\nset = { SO_MARK = 99 }\n",
    );
    let mut exec = Exec::start(&policy);
    for (kind, mark) in [(Kind::Tcp, 6), (Kind::Udp, 17), (Kind::Raw, 99)] {
        for family in Family::BOTH {
            let fd = exec.probe.open(family, kind);
            assert_eq!(exec.probe.int(fd, SO_MARK), mark, "{family:?} {kind:?}");
        }
    }
    let unix = exec.probe.open(Family::Inet, Kind::Unix);
    assert_eq!(exec.probe.int(unix, SO_MARK), 0, "policies cover IP sockets only");
    assert_eq!(exec.probe.set(unix, SO_MARK, 5), Ok(()));
    assert_eq!(exec.probe.int(unix, SO_MARK), 5);
    let report = exec.finish();
    assert_eq!(report.summary.conflicts, 0);
    assert_eq!(report.summary.settings.iter().map(|setting| setting.sockets.set).collect::<Vec<_>>(), [2, 2, 2]);
}

#[test]
fn direction_distinguishes_connecting_from_accepting_sockets() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { direction = \"outbound\" }\nset = { TCP_KEEPCNT = 11, SO_PRIORITY = 1 }\n\
         [[rule]]\nmatch = { direction = \"inbound\" }\nset = { TCP_KEEPCNT = 22, SO_PRIORITY = 2 }\n",
    );
    let mut exec = Exec::start(&policy);
    for family in Family::BOTH {
        let pair = exec.probe.pair(family, Kind::Tcp);
        for (fd, count, priority) in [(pair.client, 11, 1), (pair.server, 22, 2), (pair.listener, 22, 2)] {
            assert_eq!(exec.probe.int(fd, TCP_KEEPCNT), count, "{family:?} {fd} of {pair:?}");
            assert_eq!(exec.probe.int(fd, SO_PRIORITY), priority, "{family:?} {fd} of {pair:?}");
        }
        exec.probe.set(pair.client, TCP_KEEPCNT, 33).unwrap();
        assert_eq!(exec.probe.int(pair.client, TCP_KEEPCNT), 11, "{family:?}: calls are judged by the same rule");
        exec.probe.set(pair.server, TCP_KEEPCNT, 33).unwrap();
        assert_eq!(exec.probe.int(pair.server, TCP_KEEPCNT), 22, "{family:?}: calls are judged by the same rule");
    }
    drop(exec.finish());
}

#[test]
fn family_is_that_of_the_traffic() {
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { family = \"ipv4\" }\nset = { TCP_KEEPCNT = 44 }\n\
         [[rule]]\nmatch = { family = \"ipv6\" }\nset = { TCP_KEEPCNT = 66 }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    for (family, count) in [(Family::Inet, 44), (Family::Inet6, 66)] {
        let pair = probe.pair(family, Kind::Tcp);
        assert_eq!(probe.int(pair.client, TCP_KEEPCNT), count, "{family:?}");
        assert_eq!(probe.int(pair.server, TCP_KEEPCNT), count, "{family:?}");
    }
    // A dual-stack listener, and an AF_INET6 socket that connects to an IPv4-mapped address.
    let both = probe.open(Family::Inet6, Kind::Tcp);
    assert_eq!(probe.int(both, IPV6_V6ONLY), 0);
    let port = probe.bind(both, "[::]:0".parse().unwrap()).port();
    probe.listen(both);
    let client = probe.open(Family::Inet6, Kind::Tcp);
    probe.connect(client, format!("[::ffff:127.0.0.1]:{port}").parse().unwrap());
    let server = probe.accept(both);
    assert_eq!(probe.int(client, TCP_KEEPCNT), 44, "IPv4-mapped, outbound");
    assert_eq!(probe.int(server, TCP_KEEPCNT), 44, "IPv4-mapped, inbound");
    let client = probe.open(Family::Inet6, Kind::Tcp);
    probe.connect(client, format!("[::1]:{port}").parse().unwrap());
    let server = probe.accept(both);
    assert_eq!(probe.int(client, TCP_KEEPCNT), 66);
    assert_eq!(probe.int(server, TCP_KEEPCNT), 66);
    drop(exec.finish());
}

#[test]
fn remote_addresses_match_by_prefix_with_exceptions() {
    let policy = PolicyFile::new(
        "[[rule]]\nname = \"near\"\nmatch = { remote = [\"127.0.0.0/8\", \"::1\"], not_remote = [\"127.9.0.0/16\"] }\n\
         set = { TCP_KEEPCNT = 10 }\n\
         [[rule]]\nname = \"one\"\nmatch = { remote = \"127.9.9.9\" }\nset = { TCP_KEEPCNT = 20 }\n\
         [[rule]]\nname = \"rest\"\nset = { TCP_KEEPCNT = 30 }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let listener = probe.open(Family::Inet6, Kind::Tcp);
    let port = probe.bind(listener, "[::]:0".parse().unwrap()).port();
    probe.listen(listener);
    for (family, remote, count) in [
        (Family::Inet, "127.0.0.1", 10),
        (Family::Inet6, "[::1]", 10),
        (Family::Inet6, "[::ffff:127.0.0.1]", 10),
        (Family::Inet, "127.9.9.9", 20),
        (Family::Inet6, "[::ffff:127.9.9.9]", 20),
        (Family::Inet, "127.9.9.8", 30),
    ] {
        let client = probe.open(family, Kind::Tcp);
        probe.connect(client, format!("{remote}:{port}").parse().unwrap());
        assert_eq!(probe.int(client, TCP_KEEPCNT), count, "{remote}");
        probe.accept(listener);
    }
    drop(exec.finish());
}

#[test]
fn remote_address_of_an_accepted_socket_is_that_of_its_peer() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { direction = \"inbound\", remote = \"127.1.0.0/16\" }\nset = { TCP_KEEPCNT = 10, SO_PRIORITY = 4 }\n\
         [[rule]]\nmatch = { direction = \"inbound\" }\nset = { TCP_KEEPCNT = 20 }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let (listener, address) = probe.listener(Family::Inet, Kind::Tcp);
    for (local, count, priority) in [("127.1.2.3:0", 10, 4), ("127.2.2.3:0", 20, 0)] {
        let client = probe.open(Family::Inet, Kind::Tcp);
        probe.bind(client, local.parse().unwrap());
        probe.connect(client, address);
        let server = probe.accept(listener);
        assert_eq!(probe.int(server, TCP_KEEPCNT), count, "from {local}");
        assert_eq!(probe.int(server, SO_PRIORITY), priority, "from {local}");
    }
    drop(exec.finish());
}

#[test]
fn local_addresses_match_by_prefix() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { local = \"127.5.0.0/16\" }\nset = { SO_MARK = 5 }\n\
         [[rule]]\nmatch = { local = \"::1/128\" }\nset = { SO_MARK = 6 }\n\
         [[rule]]\nset = { SO_MARK = 9 }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    for (family, local, mark) in
        [(Family::Inet, "127.5.1.1:0", 5), (Family::Inet6, "[::1]:0", 6), (Family::Inet, "127.0.0.1:0", 9)]
    {
        for kind in [Kind::Udp, Kind::Tcp] {
            let fd = probe.open(family, kind);
            let address = probe.bind(fd, local.parse().unwrap());
            if kind == Kind::Tcp {
                probe.listen(fd);
                let client = probe.open(family, Kind::Tcp);
                probe.connect(client, address);
                let server = probe.accept(fd);
                assert_eq!(probe.int(server, SO_MARK), mark, "accepted at {local}");
            }
            assert_eq!(probe.int(fd, SO_MARK), mark, "{kind:?} at {local}");
        }
    }
    drop(exec.finish());
}

#[test]
fn ports_match_by_number_and_range() {
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { remote_port = [7001, \"7010-7019\"] }\nset = { TCP_KEEPCNT = 10 }\n\
         [[rule]]\nmatch = { local_port = \"7000-7099\" }\nset = { TCP_KEEPCNT = 20 }\n\
         [[rule]]\nset = { TCP_KEEPCNT = 30 }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    for (port, client_count, server_count) in
        [(7001, 10, 20), (7002, 30, 20), (7010, 10, 20), (7019, 10, 20), (7020, 30, 20), (7100, 30, 30)]
    {
        let listener = probe.open(Family::Inet, Kind::Tcp);
        let address = probe.bind(listener, ([127, 0, 0, 1], port).into());
        probe.listen(listener);
        let client = probe.open(Family::Inet, Kind::Tcp);
        // A local port that no rule matches.
        probe.bind(client, ([127, 0, 0, 1], port + 20_000).into());
        probe.connect(client, address);
        let server = probe.accept(listener);
        assert_eq!(probe.int(client, TCP_KEEPCNT), client_count, "to port {port}");
        assert_eq!(probe.int(server, TCP_KEEPCNT), server_count, "at port {port}");
    }
    drop(exec.finish());
}

#[test]
fn first_rule_that_names_an_option_wins_for_that_option() {
    let policy = PolicyFile::new(
        "[[rule]]\nname = \"first\"\nmatch = { protocol = \"tcp\" }\nset = { TCP_KEEPCNT = 11, SO_MARK = 1 }\n\
         [[rule]]\nname = \"second\"\nset = { TCP_KEEPCNT = 22, TCP_KEEPIDLE = \"22s\" }\nlimit = { TCP_SYNCNT = { max = 4 } }\n\
         [[rule]]\nname = \"third\"\nset = { TCP_KEEPIDLE = \"33s\", TCP_KEEPINTVL = \"33s\", TCP_SYNCNT = 9 }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let before = {
        let fd = probe.open(Family::Inet, Kind::Tcp);
        probe.int(fd, TCP_SYNCNT)
    };
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    for fd in [pair.listener, pair.client, pair.server] {
        assert_eq!(probe.int(fd, TCP_KEEPCNT), 11);
        assert_eq!(probe.int(fd, TCP_KEEPIDLE), 22);
        assert_eq!(probe.int(fd, TCP_KEEPINTVL), 33);
        assert_eq!(probe.int(fd, TCP_SYNCNT), before, "a limit, which sets nothing, wins over the later setting");
    }
    probe.set(pair.client, TCP_SYNCNT, 9).unwrap();
    assert_eq!(probe.int(pair.client, TCP_SYNCNT), 4);
    let report = exec.finish();
    assert_eq!(report.setting_of("second", "TCP_SYNCNT").calls.verdicts().get("clamped"), Some(&1));
    assert_eq!(report.setting_of("third", "TCP_SYNCNT").sockets.set, 0);
    assert_eq!(report.setting_of("second", "TCP_KEEPCNT").sockets.set, 0);
}

#[test]
fn rule_for_a_peer_overrides_the_value_that_a_later_rule_set_on_the_listener() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { remote = \"127.1.0.0/16\" }\nset = { TCP_USER_TIMEOUT = \"1s\", SO_KEEPALIVE = false }\n\
         [[rule]]\nset = { TCP_USER_TIMEOUT = \"9s\", SO_KEEPALIVE = true }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let (listener, address) = probe.listener(Family::Inet, Kind::Tcp);
    assert_eq!(probe.int(listener, TCP_USER_TIMEOUT), 9000);
    let client = probe.open(Family::Inet, Kind::Tcp);
    probe.bind(client, "127.1.1.1:0".parse().unwrap());
    probe.connect(client, address);
    let server = probe.accept(listener);
    assert_eq!(probe.int(server, TCP_USER_TIMEOUT), 1000);
    assert_eq!(probe.int(server, SO_KEEPALIVE), 0);
    assert_eq!(probe.int(client, TCP_USER_TIMEOUT), 9000);
    drop(exec.finish());
}

#[test]
fn rule_for_a_peer_applies_to_connected_udp() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { protocol = \"udp\", remote = \"127.7.0.0/16\", remote_port = 7777 }\nset = { SO_PRIORITY = 4 }\n\
         [[rule]]\nmatch = { direction = \"outbound\" }\nset = { SO_PRIORITY = 2 }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    for (remote, priority) in [("127.7.0.1:7777", 4), ("127.7.0.1:7778", 2), ("127.8.0.1:7777", 2)] {
        for (family, remote) in [(Family::Inet, remote.to_owned()), (Family::Inet6, mapped(remote))] {
            let fd = probe.open(family, Kind::Udp);
            assert_eq!(probe.int(fd, SO_PRIORITY), 0, "its peer is unknown");
            probe.connect(fd, remote.parse().unwrap());
            assert_eq!(probe.int(fd, SO_PRIORITY), priority, "to {remote}");
            probe.set(fd, SO_PRIORITY, 6).unwrap();
            assert_eq!(probe.int(fd, SO_PRIORITY), priority, "calls are judged by the same rule, to {remote}");
        }
    }
    drop(exec.finish());
}

/// Returns an IPv4 address and port as an AF_INET6 socket uses them.
fn mapped(address: &str) -> String {
    let (address, port) = address.split_once(':').unwrap();
    format!("[::ffff:{address}]:{port}")
}

#[test]
fn connect_overrides_a_call_made_before_the_peer_was_known() {
    require!("cgroup/bind4");
    let policy =
        PolicyFile::new("[[rule]]\nmatch = { remote = \"127.0.0.0/8\" }\nset = { TCP_KEEPCNT = 5, SO_MARK = 32 }\n");
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let (_, address) = probe.listener(Family::Inet, Kind::Tcp);
    let client = probe.open(Family::Inet, Kind::Tcp);
    for (option, asked) in [(TCP_KEEPCNT, 9), (SO_MARK, 7)] {
        probe.set(client, option, asked).unwrap();
        assert_eq!(probe.int(client, option), asked, "{}: no rule surely matches", option.name);
    }
    probe.connect(client, address);
    for (option, wanted) in [(TCP_KEEPCNT, 5), (SO_MARK, 32)] {
        assert_eq!(probe.int(client, option), wanted, "{}", option.name);
    }
    let report = exec.finish();
    assert_eq!(report.summary.conflicts, 0, "{:?}", report.events);
}
