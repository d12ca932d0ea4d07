//! Which sockets a policy covers, and when: those of the target and its descendants, and no others.

use std::process::Command;

use sockpolicy_integration_tests::{
    agent::{Exec, Run},
    cgroup::Cgroup,
    options::{SO_MARK, SO_PRIORITY, TCP_KEEPCNT, TCP_NODELAY, TCP_SYNCNT},
    policy::PolicyFile,
    probe::Probe,
    process,
    report::Sockets,
    require,
    script::{Family, Kind},
};

use crate::stdout;

const POLICY: &str = "[[rule]]\nset = { TCP_NODELAY = true, SO_MARK = 32, TCP_KEEPCNT = 5 }\n";

#[test]
fn sockets_outside_the_target_are_untouched_and_their_calls_unreported() {
    require!("cgroup/bind4");
    let (target, outside) = (Cgroup::new(), Cgroup::new());
    let policy = PolicyFile::new(format!("{POLICY}[audit]\ncalls = \"all\"\n"));
    let run = Run::start(&policy, &target);
    let mut probe = Probe::start(&outside);
    for family in Family::BOTH {
        let pair = probe.pair(family, Kind::Tcp);
        for fd in [pair.listener, pair.client, pair.server] {
            assert_eq!(probe.int(fd, TCP_NODELAY), 0);
            assert_eq!(probe.int(fd, SO_MARK), 0);
            assert_eq!(probe.set(fd, TCP_KEEPCNT, 99), Ok(()));
            assert_eq!(probe.int(fd, TCP_KEEPCNT), 99);
        }
    }
    drop(probe);
    let report = run.finish();
    assert!(report.events.is_empty(), "{:?}", report.events);
    for setting in &report.summary.settings {
        assert_eq!((setting.sockets, setting.calls.agreed), (Sockets::default(), 0), "{}", setting.option);
    }
    assert_eq!(report.summary.conflicts, 0);
}

#[test]
fn cgroups_below_the_target_are_covered() {
    require!("cgroup/bind4");
    let target = Cgroup::new();
    let child = target.child("child");
    let grandchild = child.child("grandchild");
    let policy = PolicyFile::new(POLICY);
    let run = Run::start(&policy, &target);
    let mut probe = Probe::start(&grandchild);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    assert_eq!(probe.int(pair.client, SO_MARK), 32);
    assert_eq!(probe.int(pair.server, TCP_KEEPCNT), 5);
    probe.set(pair.client, TCP_NODELAY, 0).unwrap();
    assert_eq!(probe.int(pair.client, TCP_NODELAY), 1);
    drop(probe);
    let report = run.finish();
    let event = report.conflict("TCP_NODELAY");
    assert_eq!(event.verdict.as_deref(), Some("rewritten"));
    assert_eq!(event.cgroup, Some(grandchild.name()));
    assert_eq!(report.summary.targets, [target.name()]);
}

/// A socket belongs to the cgroup in which it was created, even if its process moves.
#[test]
fn socket_created_outside_the_target_is_not_covered() {
    require!("cgroup/bind4");
    let (target, outside) = (Cgroup::new(), Cgroup::new());
    let policy = PolicyFile::new(POLICY);
    let run = Run::start(&policy, &target);
    let mut probe = Probe::start(&outside);
    let before = probe.pair(Family::Inet, Kind::Tcp);
    probe.enter(&target);
    assert_eq!(probe.set(before.client, TCP_NODELAY, 0), Ok(()));
    assert_eq!(probe.int(before.client, TCP_NODELAY), 0);
    let after = probe.open(Family::Inet, Kind::Tcp);
    assert_eq!(probe.int(after, SO_MARK), 32);
    probe.connect(after, before.address);
    let accepted = probe.accept(before.listener);
    assert_eq!(probe.int(after, TCP_KEEPCNT), 5);
    assert_eq!(probe.int(accepted, SO_MARK), 0, "it belongs to the cgroup of its listener");
    drop(probe);
    let report = run.finish();
    assert_eq!(report.summary.conflicts, 0);
}

#[test]
fn read_of_another_value_is_reported_and_unchanged() {
    require!("cgroup/bind4");
    let target = Cgroup::new();
    let mut probe = Probe::start(&target);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    let policy = PolicyFile::new(POLICY);
    let run = Run::start(&policy, &target);
    assert_eq!(probe.int(pair.client, TCP_NODELAY), 0, "the socket is older than the policy");
    assert_eq!(probe.int(pair.client, TCP_NODELAY), 0);
    let fresh = probe.pair(Family::Inet, Kind::Tcp);
    assert_eq!(probe.int(fresh.client, TCP_NODELAY), 1, "this socket is newer");
    // A call on an old socket is judged like any other.
    probe.set(pair.client, TCP_KEEPCNT, 7).unwrap();
    assert_eq!(probe.int(pair.client, TCP_KEEPCNT), 5);
    // A connection to an old listener gets the policy too.
    let client = probe.open(Family::Inet, Kind::Tcp);
    probe.connect(client, pair.address);
    let server = probe.accept(pair.listener);
    assert_eq!(probe.int(server, TCP_KEEPCNT), 5);
    let pid = probe.pid;
    drop(probe);
    let report = run.finish();

    let event = report.read_conflict("TCP_NODELAY");
    assert_eq!((&event.wanted, &event.requested, &event.current), (&1.into(), &0.into(), &0.into()));
    assert_eq!((event.event.as_str(), &event.verdict), ("mismatch", &None));
    assert_eq!((event.pid, event.result), (Some(pid), Some(0)));
    let calls = &report.setting("TCP_NODELAY").calls;
    assert_eq!((calls.reads, calls.verdicts().len()), (2, 0));
    assert_eq!((report.summary.conflicts, report.summary.mismatches), (1, 2));
}

#[test]
fn reads_are_not_judged_if_the_policy_says_so() {
    require!("cgroup/bind4");
    let target = Cgroup::new();
    let mut probe = Probe::start(&target);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    let policy = PolicyFile::new(format!("{POLICY}[audit]\nreads = false\n"));
    let run = Run::start(&policy, &target);
    assert_eq!(probe.int(pair.client, TCP_NODELAY), 0);
    drop(probe);
    let report = run.finish();
    assert_eq!(report.summary.conflicts, 0, "{:?}", report.events);
}

#[test]
fn policy_ends_with_the_agent() {
    require!("cgroup/bind4");
    let target = Cgroup::new();
    let policy = PolicyFile::new(POLICY);
    let run = Run::start(&policy, &target);
    let mut probe = Probe::start(&target);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    drop(run.finish());
    assert_eq!(probe.int(pair.client, TCP_KEEPCNT), 5, "values that were set remain");
    probe.set(pair.client, TCP_NODELAY, 0).unwrap();
    assert_eq!(probe.int(pair.client, TCP_NODELAY), 0);
    let fresh = probe.open(Family::Inet, Kind::Tcp);
    assert_eq!(probe.int(fresh, SO_MARK), 0);
}

#[test]
fn multipath_sockets_work_and_their_calls_are_judged() {
    require!("mptcp");
    let policy = PolicyFile::new(
        "[[rule]]\n\
         match = { protocol = \"tcp\" }\n\
         set = { TCP_NODELAY = true, SO_MARK = 32, SO_PRIORITY = 4, TCP_KEEPCNT = 5 }\n\
         limit = { TCP_SYNCNT = { max = 3 } }\n",
    );
    let mut exec = Exec::start(&policy);
    for family in Family::BOTH {
        let probe = &mut exec.probe;
        let pair = probe.pair(family, Kind::Mptcp);
        probe.exchange_bytes(pair.client, pair.server);
        assert_eq!(probe.int(pair.client, SO_MARK), 32, "{family:?}: set at creation");
        assert_eq!(probe.int(pair.client, SO_PRIORITY), 4, "{family:?}: set at creation");
        probe.set(pair.client, SO_MARK, 33).unwrap();
        assert_eq!(probe.int(pair.client, SO_MARK), 32, "{family:?}");
        probe.set(pair.client, TCP_NODELAY, 0).unwrap();
        assert_eq!(probe.int(pair.client, TCP_NODELAY), 1, "{family:?}");
        // Some kernels do not let applications set this option on such a socket; the call is judged nevertheless.
        let _ = probe.set(pair.client, TCP_SYNCNT, 9);
        probe.exchange_bytes(pair.client, pair.server);
    }
    let report = exec.finish();
    for (option, verdict) in [("SO_MARK", "rewritten"), ("TCP_NODELAY", "rewritten"), ("TCP_SYNCNT", "clamped")] {
        assert_eq!(report.setting(option).calls.verdicts().get(verdict), Some(&2), "{option}");
    }
    let event = report.of("conflict", "SO_MARK")[0];
    assert_eq!(event.socket.as_ref().and_then(|socket| socket.protocol.as_deref()), Some("tcp"));
}

/// The subflows of an MPTCP socket have no descriptor, so `ss` shows their options.
#[test]
fn subflows_have_the_policys_values_for_tcp() {
    require!("mptcp");
    let policy = PolicyFile::new(
        "[[rule]]\nmatch = { protocol = \"tcp\" }\nset = { TCP_CONGESTION = \"reno\", SO_SNDBUF = 30000, SO_MARK = 7 }\n",
    );
    let mut exec = Exec::start(&policy);
    let pair = exec.probe.pair(Family::Inet, Kind::Mptcp);
    exec.probe.exchange_bytes(pair.client, pair.server);
    let port = pair.address.port();
    // The probe has its own network namespace.
    let mut ss = Command::new("nsenter");
    ss.arg(format!("--net=/proc/{}/ns/net", exec.probe.pid));
    ss.args(["ss", "--tcp", "--info", "--memory", "--extended", "--no-header", "--oneline", "--numeric"]);
    ss.arg(format!("( sport = :{port} or dport = :{port} )"));
    let shown = stdout(&process::output(ss));
    let subflows: Vec<&str> = shown.lines().filter(|line| line.contains("tcp-ulp-mptcp")).collect();
    assert_eq!(subflows.len(), 2, "one at each end: {shown}");
    for subflow in subflows {
        for part in [" reno ", "tb60000", "fwmark:0x7"] {
            assert!(subflow.contains(part), "{part} in {subflow}");
        }
    }
    drop(exec.finish());
}
