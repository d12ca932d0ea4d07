//! Policies are enforced on sockets for which the kernel grants no storage memory (`net.core.optmem_max` of a network
//! namespace).

use nix::errno::Errno;
use sockpolicy_integration_tests::{
    agent::{Exec, Run},
    cgroup::Cgroup,
    kernels::skip,
    options::{IP_TTL, SO_MARK, SO_RCVLOWAT, SO_SNDBUF, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_QUICKACK},
    policy::PolicyFile,
    probe::Probe,
    require,
    script::{Family, Kind},
};

const OPTMEM: &str = "/proc/sys/net/core/optmem_max";

/// Returns whether a network namespace has its own limit (6.8 and later), which a test can set. If it has none, a
/// tenant cannot set one either.
fn has_limit(probe: &mut Probe) -> bool {
    let has = probe.try_write(OPTMEM, "131072").is_ok();
    if !has {
        skip(std::thread::current().name().unwrap_or("a test"), "net.core.optmem_max of a network namespace");
    }
    has
}

#[test]
fn rules_are_enforced_on_sockets_without_storage() {
    require!("TCP_NODELAY");
    let policy = PolicyFile::new(
        "[[rule]]\nname = \"out\"\nmatch = { direction = \"outbound\" }\nset = { TCP_KEEPIDLE = \"60s\" }\n\
         limit = { SO_SNDBUF = { max = \"32KiB\" }, IP_TTL = { max = 9 } }\ndeny = [\"TCP_QUICKACK\"]\n\
         [[rule]]\nname = \"in\"\nmatch = { direction = \"inbound\" }\nset = { TCP_KEEPIDLE = \"90s\" }\n\
         [[rule]]\nname = \"all\"\nset = { SO_MARK = 0x20, SO_RCVLOWAT = 3 }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    if !has_limit(probe) {
        return;
    }
    probe.write(OPTMEM, "0");
    for family in Family::BOTH {
        let pair = probe.pair(family, Kind::Tcp);
        for (fd, idle) in [(pair.client, 60), (pair.server, 90), (pair.listener, 90)] {
            let got = [TCP_KEEPIDLE, SO_MARK, SO_RCVLOWAT].map(|option| probe.int(fd, option));
            assert_eq!(got, [idle, 0x20, 3], "{family:?}");
            probe.set(fd, TCP_KEEPIDLE, 999).unwrap();
            assert_eq!(probe.int(fd, TCP_KEEPIDLE), idle, "{family:?}");
        }
        probe.set(pair.client, SO_SNDBUF, 1 << 20).unwrap();
        assert_eq!(probe.int(pair.client, SO_SNDBUF), 65536, "{family:?}");
        assert_eq!(probe.set(pair.client, TCP_QUICKACK, 1), Err(Errno::EPERM), "{family:?}");
        assert_eq!(probe.set(pair.server, TCP_QUICKACK, 1), Ok(()), "{family:?}");
        let own = probe.open(family, Kind::Tcp);
        let address = probe.bind(own, family.loopback());
        probe.connect(own, address);
        assert_eq!(probe.int(own, TCP_KEEPIDLE), 60, "{family:?}, connected to itself");
        let receiver = probe.open(family, Kind::Udp);
        let there = probe.bind(receiver, family.loopback());
        let sender = probe.open(family, Kind::Udp);
        probe.send(sender, Some(there));
        assert_eq!([SO_MARK, SO_RCVLOWAT].map(|option| probe.int(sender, option)), [0x20, 3], "{family:?}");
    }
    let raw = probe.open(Family::Inet, Kind::Raw);
    assert_eq!(probe.int(raw, SO_MARK), 0x20);
    // Calls made before the direction is known cannot be corrected without storage.
    let client = probe.open(Family::Inet, Kind::Tcp);
    probe.set(client, SO_SNDBUF, 1 << 20).unwrap();
    assert_eq!(probe.int(client, SO_SNDBUF), 65536);
    probe.set(client, IP_TTL, 99).unwrap();
    assert_eq!(probe.int(client, IP_TTL), 9);
    let report = exec.finish();
    let lost = report.summary.losses.get("no_storage").copied().unwrap_or(0);
    assert!(lost > 0, "the report counts sockets without storage");
    let (out, all) = (report.setting_of("out", "TCP_KEEPIDLE"), report.setting_of("all", "SO_MARK"));
    assert_eq!((out.sockets.set, all.sockets.failed), (4, 0));
}

#[test]
fn peers_are_distinguished_without_storage() {
    require!("TCP_NODELAY");
    let policy = PolicyFile::new("[[rule]]\nmatch = { remote = \"127.1.0.1\" }\nset = { SO_MARK = 5 }\n");
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    if !has_limit(probe) {
        return;
    }
    probe.write(OPTMEM, "0");
    let fd = probe.open(Family::Inet, Kind::Udp);
    probe.set(fd, SO_MARK, 7).unwrap();
    for (peer, mark) in [("127.1.0.1:9", 5), ("127.2.0.1:9", 7), ("127.1.0.1:9", 5)] {
        probe.connect(fd, peer.parse().unwrap());
        assert_eq!(probe.int(fd, SO_MARK), mark, "{peer}");
    }
    drop(exec.finish());
}

/// The notes of the listener are in its storage, and there is no memory for the notes of accepted sockets.
#[test]
fn connection_is_accepted_without_memory_for_its_notes() {
    let policy = PolicyFile::new("[[rule]]\nset = { TCP_KEEPCNT = 4, TCP_KEEPIDLE = \"60s\" }\n");
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    if !has_limit(probe) {
        return;
    }
    let (listener, address) = probe.listener(Family::Inet, Kind::Tcp);
    probe.write(OPTMEM, "0");
    for _ in 0..3 {
        let client = probe.open(Family::Inet, Kind::Tcp);
        probe.connect(client, address);
        let server = probe.accept(listener);
        probe.exchange_bytes(client, server);
        assert_eq!([client, server].map(|fd| probe.int(fd, TCP_KEEPCNT)), [4, 4]);
    }
    drop(exec.finish());
}

#[test]
fn innermost_target_decides_without_storage() {
    let target = Cgroup::new();
    let inner = target.child("inner");
    let text = |name: &str, cgroup: &Cgroup, rule: &str| {
        format!("name = \"{name}\"\n[target]\ncgroup = {:?}\n[[rule]]\n{rule}\n", cgroup.name())
    };
    let policies = PolicyFile::new(text("outer", &target, "set = { SO_MARK = 1, TCP_KEEPCNT = 11 }"));
    policies.add("inner.toml", text("inner", &inner, "set = { SO_MARK = 2 }\ndeny = [\"TCP_QUICKACK\"]"));
    let run = Run::on_path(policies.dir(), &[]);
    let mut probe = Probe::start(&inner);
    if !has_limit(&mut probe) {
        return;
    }
    probe.write(OPTMEM, "0");
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    for fd in [pair.client, pair.server, pair.listener] {
        assert_eq!([SO_MARK, TCP_KEEPCNT].map(|option| probe.int(fd, option)), [2, 11]);
        assert_eq!(probe.set(fd, TCP_QUICKACK, 1), Err(Errno::EPERM));
        probe.set(fd, SO_MARK, 9).unwrap();
        assert_eq!(probe.int(fd, SO_MARK), 2);
    }
    drop(probe);
    drop(run.finish());
}
