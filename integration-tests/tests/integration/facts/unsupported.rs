//! Sockets that the kernel's hooks do not reach: what is set on them, and that everything says so.

use serde_json::Value;
use sockpolicy_integration_tests::{
    agent::{self, Exec},
    options::{SO_MARK, SO_RCVLOWAT},
    policy::PolicyFile,
    require,
    script::{Family, Kind},
};

use crate::{stderr, stdout};

#[test]
fn sockets_that_hooks_do_not_reach_have_what_can_be_set_at_birth() {
    require!("cgroup/sendmsg4");
    let policy = PolicyFile::new(
        "[[rule]]\nname = \"icmp\"\nmatch = { protocol = [\"icmp\", \"other\"] }\nset = { SO_MARK = 5, SO_RCVLOWAT = 3 }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    probe.write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
    for family in Family::BOTH {
        for kind in [Kind::Raw, Kind::Ping, Kind::UdpLite] {
            // Some kernels have no UDP-Lite.
            let Ok(fd) = probe.try_open(family, kind) else { continue };
            assert_eq!(probe.int(fd, SO_MARK), 5, "{family:?} {kind:?}");
            let bound = probe.open(family, kind);
            probe.bind(bound, family.loopback());
            let wanted = if kind == Kind::UdpLite { 3 } else { 1 };
            assert_eq!(probe.int(bound, SO_RCVLOWAT), wanted, "{family:?} {kind:?}");
        }
    }
    let report = exec.finish();
    let unsupported = &report.setting_of("icmp", "SO_RCVLOWAT").unsupported;
    assert!(
        ["raw", "ping", "udp-lite"].iter().all(|name| unsupported.iter().any(|told| told == name)),
        "{unsupported:?}"
    );
    assert!(!report.setting_of("icmp", "SO_MARK").unsupported.iter().any(|told| told == "raw"));
}

#[test]
fn check_plan_and_explain_say_the_same() {
    let policy = PolicyFile::new("[[rule]]\nmatch = { protocol = \"icmp\" }\nset = { SO_RCVLOWAT = 3 }\n");
    let path = policy.path().to_str().unwrap();
    let words = "ICMP datagram sockets";
    let check = stderr(&agent::output(&["check", path]));
    assert!(check.contains(words), "{check}");
    let explained = stdout(&agent::output(&["explain", "--protocol", "icmp", path]));
    assert!(explained.contains(&format!("unsupported: {words}")), "{explained}");
    let line: Value =
        serde_json::from_str(&stdout(&agent::output(&["explain", "-o", "json", "--protocol", "icmp", path]))).unwrap();
    assert_eq!(line["unsupported"][0], "ping");
}
