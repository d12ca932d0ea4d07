//! Beside others: other agents, and other people's programs on the same cgroup.

use nix::errno::Errno;
use sockpolicy_integration_tests::{
    agent::{self, Exec, Run},
    cgroup::Cgroup,
    foreign::{Foreign, Manner, attached},
    options::{SO_KEEPALIVE, SO_RCVLOWAT, TCP_KEEPCNT},
    policy::PolicyFile,
    probe::Probe,
    process::{self, Running},
    require,
    script::{Family, Kind},
    wait,
};

use super::some_policy;
use crate::{stderr, stdout};

#[test]
fn two_at_once_do_not_disturb_each_other() {
    let keepalive = some_policy();
    let keepcnt = PolicyFile::new("name = \"other\"\n[[rule]]\nset = { TCP_KEEPCNT = 3 }\n");
    let (mut one, mut other) = (Exec::start(&keepalive), Exec::start(&keepcnt));
    let sockets = [&mut one, &mut other].map(|exec| {
        let socket = exec.probe.open(Family::Inet, Kind::Tcp);
        exec.probe.set(socket, SO_KEEPALIVE, 0).unwrap();
        exec.probe.set(socket, TCP_KEEPCNT, 5).unwrap();
        socket
    });
    assert_eq!((one.probe.int(sockets[0], SO_KEEPALIVE), one.probe.int(sockets[0], TCP_KEEPCNT)), (1, 5));
    assert_eq!((other.probe.int(sockets[1], SO_KEEPALIVE), other.probe.int(sockets[1], TCP_KEEPCNT)), (0, 3));
    let report = one.finish();
    assert_eq!((report.conflict("SO_KEEPALIVE").pid, report.events.len()), (report.events[0].pid, 1));
    // The end of one is not the end of the other.
    other.probe.set(sockets[1], TCP_KEEPCNT, 6).unwrap();
    assert_eq!(other.probe.int(sockets[1], TCP_KEEPCNT), 3);
    let report = other.finish();
    assert_eq!(report.setting("TCP_KEEPCNT").calls.verdicts()["rewritten"], 2);
    assert!(report.events.iter().all(|event| event.option == "TCP_KEEPCNT"), "{:#?}", report.events);
}

#[test]
fn exec_within_exec_works_and_both_report() {
    require!("cgroup/bind4");
    let outer = PolicyFile::new(
        "name = \"outer\"\n[[rule]]\nset = { TCP_NODELAY = { value = true, on_conflict = \"allow\" } }\n",
    );
    let inner = PolicyFile::new(
        "name = \"inner\"\n[[rule]]\nset = { SO_KEEPALIVE = { value = true, on_conflict = \"allow\" } }\n",
    );
    let agent = agent::program().display().to_string();
    let (inner_path, workload) = (inner.path().display().to_string(), process::workload());
    let reports = ["outer", "inner"].map(|name| outer.folder().join(name).display().to_string());
    let within =
        [&agent, "exec", "-o", "json", "--report", &reports[1], &inner_path, "--", &workload, "storm", "2", "3"];
    let output = Running::exec(&["-o", "json", "--report", &reports[0]], &outer, &within).finish();
    assert!(output.status.success(), "{}", stderr(&output));
    for (report, option) in reports.iter().zip(["TCP_NODELAY", "SO_KEEPALIVE"]) {
        let report = process::read_report(report);
        assert_eq!(report.setting(option).calls.verdicts()["allowed"], 6, "{option}");
    }
    // The status comes through both.
    let within = [&agent, "exec", "--quiet", &inner_path, "--", "sh", "-c", "exit 7"];
    let output = Running::exec(&["--quiet"], &outer, &within).finish();
    assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
}

#[test]
fn programs_of_others_stay_attached_and_working() {
    let policy = some_policy();
    for manner in [Manner::Link, Manner::Multi] {
        let target = Cgroup::new();
        let mut probe = Probe::start(&target);
        let foreign = Foreign::attach(&target, SO_RCVLOWAT, manner);
        let socket = probe.open(Family::Inet, Kind::Tcp);
        let mut refuses = |when| assert_eq!(probe.set(socket, SO_RCVLOWAT, 1), Err(Errno::EPERM), "{when}, {manner:?}");
        refuses("before");
        let run = Run::start(&policy, &target);
        assert!(attached(&target) > 1);
        refuses("during");
        let later = Foreign::attach(&target, TCP_KEEPCNT, manner);
        probe.set(socket, SO_KEEPALIVE, 0).unwrap();
        assert_eq!(probe.int(socket, SO_KEEPALIVE), 1, "ours works as well");
        let report = run.finish();
        assert_eq!(report.setting("SO_KEEPALIVE").calls.verdicts()["rewritten"], 1);
        assert_eq!(attached(&target), 2, "{manner:?}");
        let refused = [SO_RCVLOWAT, TCP_KEEPCNT].map(|option| probe.set(socket, option, 1));
        assert_eq!(refused, [Err(Errno::EPERM); 2], "after, {manner:?}");
        drop((foreign, later));
        // What another test is just starting may hold a link for a moment, until its exec.
        assert!(wait::until(wait::PATIENCE, || probe.set(socket, SO_RCVLOWAT, 1) == Ok(())), "{manner:?}");
    }
}

#[test]
fn program_that_allows_no_other_is_left_in_peace() {
    let policy = some_policy();
    let target = Cgroup::new();
    let _foreign = Foreign::attach(&target, SO_RCVLOWAT, Manner::Exclusive);
    let path = target.path().display().to_string();
    let output = agent::output(&["run", "--cgroup", &path, policy.path().to_str().unwrap()]);
    let expected = format!(
        "error: cannot attach to cgroup/setsockopt of cgroup {path}: Operation not permitted \
         (os error 1)\n  help: another tool attached a program there that allows no other beside it; `bpftool cgroup \
         tree` shows it\n"
    );
    assert_eq!((stderr(&output), stdout(&output)), (expected, String::new()));
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(attached(&target), 1);
    let mut probe = Probe::start(&target);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    assert_eq!(probe.set(socket, SO_RCVLOWAT, 1), Err(Errno::EPERM));
}
