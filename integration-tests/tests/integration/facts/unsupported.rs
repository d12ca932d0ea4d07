//! Sockets that the kernel's hooks do not reach: which options are set, and where that is reported.

use serde_json::Value;
use sockpolicy_integration_tests::{
    agent::{self, Exec},
    kernels::Kernel,
    options::{IP_TOS, SO_MARK, SO_PRIORITY, SO_RCVLOWAT},
    policy::PolicyFile,
    require,
    script::{Family, Kind},
};

use crate::{stderr, stdout};

/// Returns whether the BPF LSM is active. Then a program can set all options when a socket is created.
fn has_lsm() -> bool {
    Kernel::current().has("lsm_cgroup/socket_post_create")
}

#[test]
fn raw_ping_and_udp_lite_sockets_have_the_options_that_this_kernel_sets_at_creation() {
    require!("cgroup/sendmsg4");
    let policy = PolicyFile::new(
        "[[rule]]\nname = \"icmp\"\nmatch = { protocol = [\"icmp\", \"other\"] }\n\
         set = { SO_MARK = 5, SO_RCVLOWAT = 3, SO_PRIORITY = 4, IP_TOS = \"AF21\" }\n",
    );
    let mut exec = Exec::start(&policy);
    let probe = &mut exec.probe;
    probe.write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
    let (mut made, mut bound) = (0, 0);
    for family in Family::BOTH {
        for kind in [Kind::Raw, Kind::Ping, Kind::UdpLite] {
            // Some kernels have no UDP-Lite.
            let Ok(fd) = probe.try_open(family, kind) else { continue };
            let what = format!("{family:?} {kind:?}");
            assert_eq!(probe.int(fd, SO_MARK), 5, "{what}");
            assert_eq!(probe.int(fd, SO_PRIORITY), 4, "{what}: IP_TOS does not change it");
            assert_eq!(probe.int(fd, SO_RCVLOWAT), if has_lsm() { 3 } else { 1 }, "{what}");
            if family == Family::Inet {
                assert_eq!(probe.int(fd, IP_TOS), if has_lsm() { 0x48 } else { 0 }, "{what}");
            }
            made += 1;
            probe.bind(fd, family.loopback());
            let is_reached = has_lsm() || kind == Kind::UdpLite;
            bound += u64::from(is_reached);
            assert_eq!(probe.int(fd, SO_RCVLOWAT), if is_reached { 3 } else { 1 }, "{what}");
        }
    }
    let report = exec.finish();
    let setting = report.setting_of("icmp", "SO_RCVLOWAT");
    assert_eq!((setting.sockets.set, setting.sockets.failed), (bound, 0), "of {made}");
    let names = ["raw", "ping", "udp-lite"];
    let reported = |name: &&str| setting.limitations.iter().any(|reported| reported == *name);
    assert_eq!(
        names.iter().filter(|name| reported(name)).count(),
        if has_lsm() { 0 } else { 3 },
        "{:?}",
        setting.limitations
    );
    assert!(!report.setting_of("icmp", "SO_MARK").limitations.iter().any(|reported| reported == "raw"));
}

#[test]
fn new_udp_socket_has_the_policys_values_if_the_kernel_can_set_them_at_creation() {
    require!("cgroup/sendmsg4");
    let policy = PolicyFile::new("[[rule]]\nmatch = { protocol = \"udp\" }\nset = { SO_RCVLOWAT = 3 }\n");
    for arguments in [&[][..], &["--dry-run"]] {
        let mut exec = Exec::with(&policy, arguments);
        let probe = &mut exec.probe;
        for family in Family::BOTH {
            let fd = probe.open(family, Kind::Udp);
            let is_set = has_lsm() && arguments.is_empty();
            assert_eq!(probe.int(fd, SO_RCVLOWAT), if is_set { 3 } else { 1 }, "{family:?} {arguments:?}");
            let tcp = probe.open(family, Kind::Tcp);
            assert_eq!(probe.int(tcp, SO_RCVLOWAT), 1, "no rule matches it");
        }
        let report = exec.finish();
        assert_eq!(report.setting("SO_RCVLOWAT").sockets.set, if has_lsm() { 2 } else { 0 }, "{arguments:?}");
    }
}

#[test]
fn check_and_explain_report_unsupported_sockets() {
    let policy = PolicyFile::new("[[rule]]\nmatch = { protocol = \"icmp\" }\nset = { SO_RCVLOWAT = 3 }\n");
    let path = policy.path().to_str().unwrap();
    let words = "ICMP datagram sockets";
    let check = stderr(&agent::output(&["check", path]));
    assert!(check.contains(words), "{check}");
    let explained = stdout(&agent::output(&["explain", "--protocol", "icmp", path]));
    assert!(explained.contains(&format!("unsupported: {words}")), "{explained}");
    let line: Value =
        serde_json::from_str(&stdout(&agent::output(&["explain", "-o", "json", "--protocol", "icmp", path]))).unwrap();
    assert_eq!(line["limitations"][0], "ping");
}
