//! The audit: which calls are reported, and with which facts.

mod command;
mod facts;
mod faults;
mod io_uring_compat32;
mod pressure;
mod strace_parity;

use std::{fs, process::Command};

use nix::errno::Errno;
use sockpolicy_integration_tests::{
    agent::{Exec, Run},
    cgroup::Cgroup,
    kernels::Kernel,
    options::{SO_KEEPALIVE, TCP_NODELAY, TCP_SYNCNT},
    policy::PolicyFile,
    probe::{self, Probe},
    process::{Running, read_report, workload},
    report::Event,
    script::{Family, Kind},
};

use crate::stderr;

/// Returns a policy with which no call of this file conflicts, except values above 100.
fn auditing(settings: &str) -> PolicyFile {
    PolicyFile::new(format!("[audit]\n{settings}\n[[rule]]\nlimit = {{ TCP_SYNCNT = {{ max = 100 }} }}\n"))
}

/// Returns the audit backends of this kernel.
fn backends() -> impl Iterator<Item = &'static str> {
    let kernel = Kernel::current();
    kernel.known.audit.iter().map(String::as_str).filter(|backend| kernel.has(backend))
}

/// Returns event, call, option and result of each event.
fn summed(events: &[Event]) -> Vec<String> {
    let sum = |event: &Event| {
        let Event { event, call, option, result, .. } = event;
        let result = result.map_or("unknown".to_owned(), |result| result.to_string());
        format!("{event} {} {option} {result}", call.as_deref().unwrap_or_default())
    };
    events.iter().map(sum).collect()
}

/// Returns the current time in the format of events.
fn now() -> String {
    let output = Command::new("date").args(["-u", "+%FT%T.%6NZ"]).output().unwrap();
    crate::stdout(&output).trim().to_owned()
}

/// Makes a fixed sequence of calls.
fn make_calls(probe: &mut Probe) {
    let socket = probe.open(Family::Inet, Kind::Tcp);
    probe.set(socket, TCP_SYNCNT, 3).unwrap();
    assert_eq!(probe.set(socket, TCP_SYNCNT, 1000), Ok(()), "the call is clamped");
    probe.set(socket, TCP_NODELAY, 1).unwrap();
    assert_eq!(probe.set(-1, TCP_SYNCNT, 1), Err(Errno::EBADF));
    probe.get(socket, TCP_SYNCNT, 4).unwrap();
    probe.get(socket, TCP_NODELAY, 4).unwrap();
}

#[test]
fn policy_selects_the_reported_calls() {
    let conflict = "conflict setsockopt TCP_SYNCNT 0";
    let governed = ["call setsockopt TCP_SYNCNT 0", conflict, "call setsockopt TCP_SYNCNT -9"];
    let reads = ["call getsockopt TCP_SYNCNT 0", "call getsockopt TCP_NODELAY 0"];
    for (settings, expected) in [
        ("calls = \"conflicts\"", vec![conflict]),
        ("calls = \"governed\"", [&governed[..], &reads[..1]].concat()),
        ("calls = \"governed\"\nreads = false", governed.to_vec()),
        ("calls = \"all\"\nreads = false", vec![governed[0], conflict, "call setsockopt TCP_NODELAY 0", governed[2]]),
        (
            "calls = \"all\"",
            vec![governed[0], conflict, "call setsockopt TCP_NODELAY 0", governed[2], reads[0], reads[1]],
        ),
    ] {
        let mut exec = Exec::start(&auditing(settings));
        make_calls(&mut exec.probe);
        let report = exec.finish();
        let events: Vec<_> =
            report.events.into_iter().filter(|event| event.comm.as_deref() == Some("sockprobe")).collect();
        assert_eq!(summed(&events), expected, "{settings}");
        assert_eq!(report.summary.losses.values().sum::<u64>(), 0);
    }
}

#[test]
fn event_has_time_caller_and_cgroup() {
    let mut exec = Exec::start(&auditing("calls = \"all\""));
    let before = now();
    let socket = exec.probe.open(Family::Inet, Kind::Tcp);
    exec.probe.set(socket, TCP_NODELAY, 1).unwrap();
    let after = now();
    let target = format!("{}/sockpolicy-{}", exec.home.name(), exec.pid());
    let pid = exec.probe.pid;
    let report = exec.finish();
    let [event] = report.of("call", "TCP_NODELAY")[..] else { panic!("{:#?}", report.events) };
    assert!((&before..=&after).contains(&&event.time), "{} is not between {before} and {after}", event.time);
    assert_eq!((event.pid, event.tid), (Some(pid), Some(pid)));
    assert_eq!(event.comm.as_deref(), Some("sockprobe"));
    assert_eq!(event.exe, Some(probe::program().display().to_string()));
    assert_eq!(event.cgroup, Some(target));
    assert_eq!(event.via.as_deref(), Some("syscall"));
    assert!(event.backend.is_some() && event.backend == report.summary.backend);
    assert_eq!((event.suppressed, &event.policy, &event.rule, &event.verdict), (0, &None, &None, &None));
    assert_eq!((&event.requested, &event.current), (&1.into(), &1.into()));
}

#[test]
fn event_shows_the_value_of_the_socket_and_not_the_requested_one() {
    let mut exec = Exec::start(&auditing("calls = \"all\""));
    let socket = exec.probe.open(Family::Inet, Kind::Tcp);
    exec.probe.set(socket, TCP_NODELAY, 7).unwrap();
    assert_eq!(exec.probe.int(socket, TCP_NODELAY), 1);
    let report = exec.finish();
    let event = report.of("call", "TCP_NODELAY")[0];
    assert_eq!((&event.requested, &event.current), (&7.into(), &1.into()));
}

#[test]
fn task_is_audited_only_while_it_is_in_the_target() {
    let (target, sibling) = (Cgroup::new(), Cgroup::new());
    let below = target.child("below");
    let mut probe = Probe::start(&sibling);
    let mut bystander = Probe::start(&sibling);
    let bystanders = bystander.open(Family::Inet, Kind::Tcp);
    let run = Run::start(&auditing("calls = \"all\""), &target);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    let mut call = |cgroup: &Cgroup, value: i32| {
        probe.enter(cgroup);
        probe.set(socket, TCP_SYNCNT, value).unwrap();
        bystander.set(bystanders, TCP_SYNCNT, value).unwrap();
    };
    call(&sibling, 1);
    call(&target, 2);
    call(&sibling, 3);
    call(&below, 4);
    call(&sibling, 5);
    let pid = probe.pid;
    let report = run.finish();
    let calls: Vec<_> =
        report.events.iter().map(|event| (event.pid, event.requested.clone(), event.cgroup.clone())).collect();
    let expected = [(2, target.name()), (4, below.name())];
    assert_eq!(calls, expected.map(|(value, cgroup)| (Some(pid), value.into(), Some(cgroup))));
    drop(probe);
}

#[test]
fn socket_is_judged_by_the_cgroup_in_which_it_was_created() {
    let (target, elsewhere) = (Cgroup::new(), Cgroup::new());
    let mut probe = Probe::start(&target);
    let policy = PolicyFile::new("[[rule]]\nset = { TCP_NODELAY = true }\n");
    let run = Run::start(&policy, &target);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    probe.enter(&elsewhere);
    let other = probe.open(Family::Inet, Kind::Tcp);
    for fd in [socket, other] {
        probe.set(fd, TCP_NODELAY, 0).unwrap();
    }
    assert_eq!((probe.int(socket, TCP_NODELAY), probe.int(other, TCP_NODELAY)), (1, 0));
    probe.enter(&target);
    probe.set(other, TCP_NODELAY, 0).unwrap();
    assert_eq!(probe.int(other, TCP_NODELAY), 0);
    let report = run.finish();
    assert_eq!(report.setting("TCP_NODELAY").calls.verdicts()["rewritten"], 1);
    // The calling task is not in the target, but its return was seen nevertheless.
    let event = report.conflict("TCP_NODELAY");
    assert_eq!((event.pid, event.result, &event.backend), (Some(probe.pid), Some(0), &report.summary.backend));
}

#[test]
fn conflicts_without_an_audit_are_reported_without_results() {
    let policy = PolicyFile::new("[[rule]]\nset = { TCP_NODELAY = true }\ndeny = [\"SO_KEEPALIVE\"]\n");
    let mut exec = Exec::with(&policy, &["--audit-backend", "none"]);
    let pid = exec.probe.pid;
    let socket = exec.probe.open(Family::Inet6, Kind::Tcp);
    exec.probe.set(socket, TCP_NODELAY, 0).unwrap();
    assert_eq!(exec.probe.int(socket, TCP_NODELAY), 1);
    assert_eq!(exec.probe.set(socket, SO_KEEPALIVE, 1), Err(Errno::EPERM));
    let report = exec.finish();
    assert_eq!(report.summary.backend, None);
    assert_eq!(
        summed(&report.events),
        ["conflict setsockopt TCP_NODELAY unknown", "conflict setsockopt SO_KEEPALIVE unknown"]
    );
    let sees_callers = Kernel::current().has("callers");
    for event in &report.events {
        let caller = sees_callers.then_some(pid);
        assert_eq!((event.pid, event.tid), (caller, caller));
        assert_eq!(event.comm.as_deref(), sees_callers.then_some("sockprobe"));
        assert_eq!((&event.via, &event.backend), (&None, &None));
    }
    assert_eq!(report.conflict("TCP_NODELAY").requested, 0);
    assert_eq!(stderr(&report.output), "");
}

#[test]
fn disabled_audit_warns_of_unreported_calls() {
    let policy = auditing("calls = \"governed\"");
    let mut exec = Exec::with(&policy, &["--audit-backend", "none"]);
    make_calls(&mut exec.probe);
    let report = exec.finish();
    assert_eq!(summed(&report.events), ["conflict setsockopt TCP_SYNCNT unknown"]);
    let printed = stderr(&report.output);
    assert!(printed.contains("without an audit, only conflicts are reported"), "{printed}");
}

#[test]
fn requested_backend_is_used_or_refused() {
    let kernel = Kernel::current();
    for backend in &kernel.known.audit {
        let policy = auditing("calls = \"all\"");
        let report = policy.dir().join("report").display().to_string();
        let arguments = ["-o", "json", "--report", &report, "--audit-backend", backend];
        let output = Running::exec(&arguments, &policy, &[&workload(), "calls"]).finish();
        if kernel.has(backend) {
            assert!(output.status.success(), "{}", stderr(&output));
            let report = read_report(&report);
            assert_eq!(report.summary.backend.as_deref(), Some(&**backend));
            assert!(!report.events.is_empty());
            assert!(report.events.iter().all(|event| event.backend.as_deref() == Some(backend)));
            continue;
        }
        // Another test may be auditing the whole host.
        let printed = stderr(&output);
        let printed: String =
            printed.split_inclusive('\n').filter(|line| !line.starts_with("warning: another sockpolicy")).collect();
        let start = format!("error: cannot attach the audit by {backend}: ");
        let end = "\n  help: leave out --audit-backend to use the best backend that this kernel supports; `sockpolicy doctor` \
                   lists them\n";
        assert!(printed.starts_with(&start) && printed.ends_with(end), "{printed}");
        assert_eq!(printed.lines().count(), 2, "{printed}");
        assert_eq!(output.status.code(), Some(125));
    }
}

#[test]
fn audit_does_not_leave_tracefs_mounted() {
    let mounts = || {
        let all = fs::read_to_string("/proc/self/mountinfo").unwrap();
        all.lines().filter(|line| line.contains(" - tracefs ")).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = mounts();
    let mut exec = Exec::with(&auditing("calls = \"all\""), &["--audit-backend", "tracepoint"]);
    make_calls(&mut exec.probe);
    assert_eq!(mounts(), before);
    // Nor in the mount namespace of the command.
    let seen = fs::read_to_string(format!("/proc/{}/mountinfo", exec.probe.pid)).unwrap();
    assert_eq!(seen.lines().filter(|line| line.contains(" - tracefs ")).count(), before.len());
    let report = exec.finish();
    assert!(!report.events.is_empty());
    assert_eq!(mounts(), before);
}
