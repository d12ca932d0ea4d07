//! Which side overrides which: policies override applications, whatever their rights, and rules override other rules.

use sockpolicy_integration_tests::{
    agent::Exec,
    options::{SO_BINDTODEVICE, SO_MARK, SO_MAX_PACING_RATE, SO_PRIORITY, TCP_KEEPCNT},
    policy::PolicyFile,
    require,
    script::{Family, Kind},
};

#[test]
fn rewritten_call_succeeds_if_the_caller_may_not_set_the_policys_value() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new("[[rule]]\nset = { SO_PRIORITY = 10, SO_MARK = 7 }\n");
    let mut exec = Exec::start(&policy);
    exec.probe.drop_privileges();
    let socket = exec.probe.open(Family::Inet, Kind::Tcp);
    // Without the policy, the first call would succeed and the second fail.
    exec.probe.set(socket, SO_PRIORITY, 3).unwrap();
    exec.probe.set(socket, SO_MARK, 1).unwrap();
    assert_eq!(exec.probe.int(socket, SO_PRIORITY), 10);
    assert_eq!(exec.probe.int(socket, SO_MARK), 7);
    let report = exec.finish();
    assert_eq!(report.verdicts("SO_PRIORITY"), ["rewritten"]);
    assert_eq!(report.conflict("SO_PRIORITY").result, Some(0));
}

#[test]
fn application_can_set_a_value_if_the_kernel_refuses_the_policys() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new("[[rule]]\nset = { SO_BINDTODEVICE = \"nosuch0\" }\n");
    let mut exec = Exec::start(&policy);
    let socket = exec.probe.open(Family::Inet, Kind::Udp);
    exec.probe.set(socket, SO_BINDTODEVICE, b"lo\0".to_vec()).unwrap();
    assert_eq!(exec.probe.text(socket, SO_BINDTODEVICE), "lo");
    let report = exec.finish();
    assert_eq!(report.verdicts("SO_BINDTODEVICE"), ["allowed"]);
    assert!(report.setting("SO_BINDTODEVICE").sockets.failed > 0);
}

#[test]
fn allow_in_a_later_rule_does_not_weaken_an_earlier_rule() {
    let policy = PolicyFile::new(
        "[[rule]]\nname = \"peer\"\nmatch = { remote = \"127.0.0.0/8\" }\nset = { TCP_KEEPCNT = 5 }\n\
         [[rule]]\nname = \"all\"\nset = { TCP_KEEPCNT = { value = 4, on_conflict = \"allow\" } }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let (_, address) = probe.listener(Family::Inet, Kind::Tcp);
    let client = probe.open(Family::Inet, Kind::Tcp);
    probe.set(client, TCP_KEEPCNT, 9).unwrap();
    assert_eq!(probe.int(client, TCP_KEEPCNT), 9, "the peer is not yet known");
    probe.connect(client, address);
    assert_eq!(probe.int(client, TCP_KEEPCNT), 5);
    drop(exec.finish());
}

#[test]
fn ipv6_datagram_socket_connected_to_an_ipv4_address_has_family_ipv4() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { family = \"ipv4\" }\nset = { SO_MARK = 4 }\n\
         [[rule]]\nmatch = { family = \"ipv6\" }\nset = { SO_MARK = 6 }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    let receiver = probe.open(Family::Inet, Kind::Udp);
    let address = probe.bind(receiver, Family::Inet.loopback());
    let sender = probe.open(Family::Inet6, Kind::Udp);
    probe.connect(sender, address);
    assert_eq!(probe.int(sender, SO_MARK), 4);
    drop(exec.finish());
}

#[test]
fn unlimited_rate_agrees_as_four_and_as_eight_bytes() {
    require!("cgroup/bind4");
    let policy = PolicyFile::new("[[rule]]\nset = { SO_MAX_PACING_RATE = \"unlimited\" }\n");
    let mut exec = Exec::start(&policy);
    let socket = exec.probe.open(Family::Inet, Kind::Tcp);
    exec.probe.set(socket, SO_MAX_PACING_RATE, u64::MAX.to_ne_bytes().to_vec()).unwrap();
    exec.probe.set(socket, SO_MAX_PACING_RATE, u32::MAX.to_ne_bytes().to_vec()).unwrap();
    let report = exec.finish();
    assert!(report.conflicts("setsockopt", "SO_MAX_PACING_RATE").is_empty());
    assert_eq!(report.setting("SO_MAX_PACING_RATE").calls.agreed, 2);
}
