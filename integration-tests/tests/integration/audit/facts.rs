//! Facts about sockets and options in events, compared with what the owner of the socket reads.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde_json::{Value, json};
use sockpolicy_integration_tests::{
    agent::{Exec, Run},
    cgroup::Cgroup,
    options::{
        IP_TOS, SO_COOKIE, SO_LINGER, SO_PRIORITY, SO_RCVBUF, SO_RCVLOWAT, SO_SNDBUF, SocketOption, TCP_CONGESTION,
        TCP_WINDOW_CLAMP,
    },
    policy::PolicyFile,
    probe::Probe,
    process::Running,
    report::{Event, Socket},
    require,
    script::{Argument, Family, Fd, Kind},
};

use super::backends;
use crate::{number, stderr};

/// Performs `work` with a probe in a cgroup. Returns its result, and the events.
fn audited<T>(backend: &str, target: &Cgroup, work: impl FnOnce(&mut Probe) -> T) -> (T, Vec<Event>) {
    let path = target.path().display().to_string();
    let run = Run::audit(&["--cgroup", &path, "--audit-backend", backend]);
    let mut probe = Probe::start(target);
    let made = work(&mut probe);
    let report = run.finish();
    report.assert_nothing_lost();
    (made, report.events)
}

#[test]
fn event_shows_the_value_that_the_owner_reads_if_the_kernel_changes_it() {
    const ASKED: [(SocketOption, i32); 10] = [
        (SO_SNDBUF, 100_001),
        (SO_SNDBUF, 1),
        (SO_RCVBUF, 70_001),
        (SO_RCVBUF, i32::MAX),
        (SO_RCVLOWAT, 0),
        (SO_RCVLOWAT, 777),
        (IP_TOS, 0x2f),
        (TCP_WINDOW_CLAMP, 1),
        (TCP_WINDOW_CLAMP, 12_345),
        // Rejected: the former value remains.
        (SO_RCVLOWAT, -5),
    ];
    for backend in backends() {
        let (reported, events) = audited(backend, &Cgroup::new(), |probe| {
            let socket = probe.open(Family::Inet, Kind::Tcp);
            ASKED.map(|(option, value)| {
                probe.set(socket, option, value).unwrap();
                let shown = probe.int(socket, option);
                // Reports have the unit of setsockopt, and getsockopt returns twice the size of a buffer.
                let is_buffer = [SO_SNDBUF, SO_RCVBUF].contains(&option);
                (option.name, Value::from(if is_buffer { shown / 2 } else { shown }))
            })
        });
        let sets = events.iter().filter(|event| event.call.as_deref() == Some("setsockopt"));
        let now: Vec<_> = sets.map(|event| (&*event.option, event.current.clone())).collect();
        assert_eq!(now, reported, "{backend}");
        for (event, (_, value)) in events.chunks(2).zip(ASKED) {
            assert_eq!((&event[0].requested, &event[1].requested), (&value.into(), &event[0].current));
        }
    }
}

/// Returns a socket as events describe it, with the cookie that its owner reads.
fn described(
    probe: &mut Probe,
    fd: Fd,
    protocol: Option<&str>,
    family: Option<&str>,
    ends: [Option<SocketAddr>; 2],
    cgroup: &Cgroup,
) -> Socket {
    probe.set(fd, SO_PRIORITY, fd).unwrap();
    let cookie = probe.get(fd, SO_COOKIE, 8).unwrap();
    let [local, remote] = ends.map(|end| end.map(|address| address.to_string()));
    Socket {
        protocol: protocol.map(str::to_owned),
        family: family.map(str::to_owned),
        local,
        remote,
        cookie: Some(u64::from_ne_bytes(cookie.try_into().unwrap())),
        cgroup: Some(cgroup.name()),
    }
}

#[test]
fn events_describe_sockets_correctly() {
    let mapped = |address: SocketAddr| {
        let IpAddr::V4(ip) = address.ip() else { panic!("{address} is not an IPv4 address") };
        SocketAddr::new(ip.to_ipv6_mapped().into(), address.port())
    };
    for backend in backends() {
        let target = Cgroup::new();
        let (expected, events) = audited(backend, &target, |probe| {
            let mut all = Vec::new();
            for (family, name) in [(Family::Inet, Some("ipv4")), (Family::Inet6, Some("ipv6"))] {
                let pair = probe.pair(family, Kind::Tcp);
                // An accepted socket has no cookie until a process reads it.
                probe.get(pair.server, SO_COOKIE, 8).unwrap();
                let (client, server) = (probe.local_address(pair.client), pair.address);
                for (fd, ends) in [
                    (pair.client, [Some(client), Some(server)]),
                    (pair.server, [Some(server), Some(client)]),
                    (pair.listener, [Some(server), None]),
                ] {
                    all.push(described(probe, fd, Some("tcp"), name, ends, &target));
                }
                let (one, other) = (probe.open(family, Kind::Udp), probe.open(family, Kind::Udp));
                let peer = probe.bind(other, family.loopback());
                probe.connect(one, peer);
                let own = probe.local_address(one);
                all.push(described(probe, one, Some("udp"), name, [Some(own), Some(peer)], &target));
                all.push(described(probe, other, Some("udp"), name, [Some(peer), None], &target));
                let fresh = probe.open(family, Kind::Tcp);
                // It may still carry IPv4.
                let name = name.filter(|_| family == Family::Inet);
                all.push(described(probe, fresh, Some("tcp"), name, [None, None], &target));
            }
            // IPv4 on an IPv6 socket.
            let (listener, address) = probe.listener(Family::Inet, Kind::Tcp);
            let client = probe.open(Family::Inet6, Kind::Tcp);
            probe.connect(client, mapped(address));
            let port = probe.local_address(client).port();
            let own = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
            all.push(described(probe, client, Some("tcp"), Some("ipv4"), [Some(own), Some(address)], &target));
            probe.accept(listener);
            let unix = probe.open(Family::Inet, Kind::Unix);
            probe.get(unix, SO_COOKIE, 8).unwrap();
            all.push(described(probe, unix, None, Some("unix"), [None, None], &target));
            all
        });
        let sets = events.into_iter().filter(|event| event.call.as_deref() == Some("setsockopt"));
        let seen: Vec<Socket> = sets.map(|event| event.socket.unwrap()).collect();
        for (seen, expected) in seen.iter().zip(&expected) {
            assert_eq!(seen, expected, "{backend}");
        }
        assert_eq!(seen.len(), expected.len());
    }
}

#[test]
fn container_is_found_by_the_name_of_its_cgroup() {
    let id = format!("{:064x}", std::process::id());
    for backend in backends() {
        let target = Cgroup::new();
        let container = target.child(&format!("docker-{id}.scope"));
        let inside = container.child("inside");
        let ((), events) = audited(backend, &target, |probe| {
            let socket = probe.open(Family::Inet, Kind::Tcp);
            for cgroup in [&target, &container, &inside] {
                probe.enter(cgroup);
                probe.set(socket, SO_PRIORITY, 1).unwrap();
            }
        });
        let named = json!({ "runtime": "docker", "id": id, "pod": null, "name": null, "image": null });
        let seen: Vec<_> = events.into_iter().map(|event| (event.cgroup.unwrap(), event.container)).collect();
        let expected = [(&target, None), (&container, Some(&named)), (&inside, Some(&named))];
        assert_eq!(seen, expected.map(|(cgroup, named)| (cgroup.name(), named.cloned())), "{backend}");
    }
}

#[test]
fn values_are_shown_by_their_meaning() {
    let ints = |numbers: &[i32]| Argument::from(numbers.iter().flat_map(|n| n.to_ne_bytes()).collect::<Vec<_>>());
    let longs = |numbers: &[i64]| Argument::from(numbers.iter().flat_map(|n| n.to_ne_bytes()).collect::<Vec<_>>());
    let (timeout, error) = (number(libc::SOL_SOCKET, libc::SO_RCVTIMEO), number(libc::SOL_SOCKET, libc::SO_ERROR));
    let sets = [
        (SO_LINGER, ints(&[1, 5]), json!({ "onoff": 1, "linger": 5 })),
        (timeout, longs(&[1, 500_000]), json!("1500ms")),
        (TCP_CONGESTION, "reno".into(), json!("reno")),
        (IP_TOS, 0x48.into(), json!(0x48)),
        (IP_TOS, 0x20u8.into(), json!(0x20)),
    ];
    for backend in backends() {
        let (_, events) = audited(backend, &Cgroup::new(), |probe| {
            let socket = probe.open(Family::Inet, Kind::Tcp);
            for (option, argument, _) in &sets {
                probe.set(socket, *option, argument.clone()).unwrap();
            }
            // An address where no socket listens.
            let (listener, address) = probe.listener(Family::Inet, Kind::Tcp);
            probe.close(listener);
            assert!(probe.try_connect(socket, address).is_err());
            probe.get(socket, error, 4).unwrap();
            probe.get(socket, SO_LINGER, 8).unwrap();
            probe.get(socket, TCP_CONGESTION, 16).unwrap();
        });
        let shown: Vec<_> = events.iter().map(|event| event.requested.clone()).collect();
        let reads = [json!(0), sets[0].2.clone(), sets[2].2.clone()];
        assert_eq!(shown, [&sets.clone().map(|(_, _, value)| value)[..], &reads].concat(), "{backend}");
    }
}

#[test]
fn buffers_that_the_kernel_caps_are_reported_as_capped() {
    require!("cgroup/bind4");
    const WANTED: i32 = 512 << 20;
    let policy = PolicyFile::new("[[rule]]\nset = { SO_SNDBUF = \"512MiB\", SO_RCVBUF = \"16KiB\" }\n");
    let mut exec = Exec::start(&policy);
    let pair = exec.probe.pair(Family::Inet, Kind::Tcp);
    let taken = exec.probe.int(pair.client, SO_SNDBUF) / 2;
    assert!(taken < WANTED, "this test needs net.core.wmem_max below {WANTED}, and it is {taken}");
    let report = exec.finish();
    let [capped, set] = ["SO_SNDBUF", "SO_RCVBUF"].map(|option| report.setting(option).sockets);
    assert!((capped.set, set.capped) == (0, 0) && capped.capped > 0 && set.set > 0, "{capped:?} {set:?}");
    let [read] = report.of("mismatch", "SO_SNDBUF")[..] else { panic!("{:?}", report.events) };
    assert_eq!((&read.wanted, &read.requested, &read.current), (&json!(WANTED), &json!(taken), &json!(taken)));

    let printed = Running::exec(&[], &policy, &["/usr/bin/python3", "-c", "import socket; socket.socket().listen()"]);
    let printed = stderr(&printed.finish());
    let row = printed.lines().find(|line| line.contains("SO_SNDBUF") && line.contains("512MiB"));
    assert!(row.is_some() && printed.contains("(capped)"), "{printed}");
    let note = printed.lines().find(|line| line.starts_with("capped: the kernel takes at most "));
    assert!(note.is_some_and(|note| note.contains("SO_SNDBUF (net.core.wmem_max)")), "{printed}");
}

#[test]
fn calls_on_sockets_of_other_cgroups_are_listed_and_not_judged() {
    require!("cgroup/bind4");
    let (target, other) = (Cgroup::new(), Cgroup::new());
    let policy = PolicyFile::new("[audit]\ncalls = \"governed\"\n[[rule]]\nset = { SO_PRIORITY = 3 }\n");
    let run = Run::start(&policy, &target);
    let mut probe = Probe::start(&other);
    let foreign = probe.open(Family::Inet, Kind::Tcp);
    probe.enter(&target);
    let own = probe.open(Family::Inet, Kind::Tcp);
    for socket in [foreign, foreign, own] {
        probe.set(socket, SO_PRIORITY, 5).unwrap();
    }
    assert_eq!([foreign, own].map(|socket| probe.int(socket, SO_PRIORITY)), [5, 3]);
    drop(probe);
    let report = run.finish();
    // Two calls of setsockopt and one of getsockopt.
    assert_eq!(report.summary.other_cgroups.into_iter().collect::<Vec<_>>(), [(other.name(), 3)]);
    assert_eq!(report.summary.conflicts, 1);
}
