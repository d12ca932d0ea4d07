//! Calls that are not system calls of 64-bit programs: calls through io_uring, and calls of 32-bit programs.

use std::{collections::BTreeMap, fs, process::Command};

use sockpolicy_integration_tests::{
    kernels::Kernel,
    policy::PolicyFile,
    process::{self, Running, read_report, workload},
    report::{Event, Report},
    require,
};

use super::backends;
use crate::{stderr, stdout};

/// Returns whether a backend sees calls by their socket, as needed for calls through io_uring. Since 6.7, the kernel
/// has the function to attach to, and also the first of these calls.
fn sees_rings(backend: &str) -> bool {
    backend != "tracepoint" && Kernel::current().has("io_uring")
}

fn policy() -> PolicyFile {
    PolicyFile::new(
        "[audit]\ncalls = \"all\"\n[[rule]]\nset = { TCP_NODELAY = true }\nlimit = { TCP_SYNCNT = { max = 9 } }\n\
         deny = [\"SO_KEEPALIVE\"]\n",
    )
}

/// Runs a command under a policy. Returns the lines of its output, and the report.
fn audited(backend: &str, arguments: &[&str], command: &[&str]) -> (Vec<String>, Report) {
    let policy = policy();
    let report = policy.dir().join("report").display().to_string();
    let arguments = [&["-o", "json", "--report", &report, "--audit-backend", backend], arguments].concat();
    let output = Running::exec(&arguments, &policy, command).finish();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stderr(&output), "");
    (stdout(&output).lines().map(str::to_owned).collect(), read_report(&report))
}

/// Returns an event in the output format of these programs.
fn reported(event: &Event) -> String {
    let Event { call, level, optname, result, optval, .. } = event;
    let call = call.as_deref().unwrap();
    format!("{call} {level} {optname} {} {}", result.unwrap(), optval.as_deref().unwrap_or("-"))
}

#[test]
fn audit_reports_calls_through_io_uring() {
    require!("io_uring");
    for backend in backends() {
        for mode in ["plain", "fixed", "polled", "async", "deferred"] {
            let (printed, report) = audited(backend, &["--dry-run"], &[&workload(), "ring", mode]);
            let (pid, calls) = printed.split_first().unwrap();
            let (_, calls) = calls.split_last().unwrap();
            let events = report.events.iter().filter(|event| event.via.as_deref() == Some("io_uring"));
            let events: Vec<_> = events.collect();
            let blind = report.does_not_cover("io_uring");
            assert_eq!(blind, !sees_rings(backend), "{backend}");
            if blind {
                assert!(events.is_empty(), "{events:#?}");
                continue;
            }
            assert_eq!(events.iter().map(|event| reported(event)).collect::<Vec<_>>(), calls, "{backend} {mode}");
            for event in events {
                assert_eq!(event.pid.unwrap().to_string(), *pid);
                // Kernel threads that belong to the process make these calls.
                let (own, comm) = match mode {
                    "polled" => (false, format!("iou-sqp-{pid}")),
                    "async" => (false, format!("iou-wrk-{pid}")),
                    _ => (true, "workload".to_owned()),
                };
                assert_eq!((event.tid == event.pid, event.comm.as_deref()), (own, Some(&*comm)), "{mode}");
                assert_eq!(event.exe, Some(workload()), "{event:#?}");
                let socket = event.socket.as_ref().unwrap();
                assert_eq!((socket.protocol.as_deref(), socket.family.as_deref()), (Some("tcp"), Some("ipv4")));
                assert_eq!(socket.cgroup, event.cgroup);
                assert_eq!(event.cgroup.as_ref(), report.summary.targets.first());
            }
        }
    }
}

#[test]
fn policy_is_enforced_on_calls_through_io_uring() {
    require!("io_uring");
    for backend in backends() {
        for mode in ["plain", "fixed", "polled", "async", "deferred"] {
            let (printed, report) = audited(backend, &[], &[&workload(), "ring", mode]);
            assert_eq!(printed[1], "setsockopt 6 1 0 0x00000000", "{backend} {mode}");
            assert_eq!(printed[2], "setsockopt 1 9 -1 0x01000000", "{backend} {mode}");
            assert_eq!(printed.last().unwrap(), "TCP_NODELAY 1", "{backend} {mode}");
            for (option, verdict, asked, result) in
                [("TCP_NODELAY", "rewritten", 0, 0), ("SO_KEEPALIVE", "denied", 1, -1)]
            {
                assert_eq!(report.setting(option).calls.verdicts(), BTreeMap::from([(verdict, 1)]));
                let event = report.conflict(option);
                assert_eq!((event.verdict.as_deref(), &event.requested), (Some(verdict), &asked.into()));
                let seen = sees_rings(backend).then_some(("io_uring", result));
                assert_eq!(event.via.as_deref().zip(event.result), seen, "{backend} {mode}");
            }
        }
    }
}

/// Compiles a 32-bit program in the directory of the policy.
fn compiled(policy: &PolicyFile) -> String {
    let (source, program) = (policy.dir().join("compat.c"), policy.dir().join("compat"));
    fs::write(&source, include_str!("compat.c")).unwrap();
    let mut compiler = Command::new("gcc");
    compiler.args(["-m32", "-O1", "-static", "-nostdlib", "-no-pie", "-fno-pic", "-fno-stack-protector", "-o"]);
    let output = process::output({
        compiler.arg(&program).arg(&source);
        compiler
    });
    assert!(output.status.success(), "{}", stderr(&output));
    program.display().to_string()
}

#[test]
fn calls_of_32_bit_programs_are_reported_and_judged() {
    let dir = policy();
    let program = compiled(&dir);
    for backend in backends() {
        // All backends see the calls of the 64-bit program.
        let script = "\"$0\"; \"$1\" storm 1 1 >/dev/null 2>&1 || true";
        let (printed, report) = audited(backend, &[], &["sh", "-c", script, &program, &workload()]);
        let (pid, calls) = printed.split_first().unwrap();
        assert_eq!(calls.len(), 9, "{printed:?}");
        let is_its = |event: &&Event| event.pid.unwrap().to_string() == *pid;
        let (its, others): (Vec<_>, Vec<_>) = report.events.iter().partition(is_its);
        assert!(others.iter().all(|event| event.via.as_deref() == Some("syscall")), "{others:#?}");
        assert!(!others.is_empty());
        let blind = report.does_not_cover("32-bit programs");
        assert_eq!(blind, backend == "tracepoint");
        let verdicts = |option| report.setting(option).calls.verdicts();
        let storms = ("rewritten", 1);
        if blind {
            assert!(its.is_empty(), "{its:#?}");
            assert_eq!(verdicts("TCP_NODELAY"), BTreeMap::from([storms]));
            continue;
        }
        assert_eq!(its.iter().map(|event| reported(event)).collect::<Vec<_>>(), calls, "{backend}");
        assert_eq!(verdicts("TCP_NODELAY"), BTreeMap::from([("allowed", 1), storms]));
        assert_eq!(verdicts("TCP_SYNCNT"), BTreeMap::from([("allowed", 1)]));
        assert_eq!(verdicts("SO_KEEPALIVE"), BTreeMap::from([("allowed", 1), ("denied", 1)]));
        let counted = &report.setting("TCP_NODELAY").calls;
        assert_eq!((counted.agreed, counted.reads), (1, 1));
        let conflicts = its.iter().filter(|event| ["conflict", "mismatch"].contains(&&*event.event));
        let conflicts =
            conflicts.map(|event| (&*event.option, event.call.as_deref().unwrap(), event.verdict.as_deref()));
        let allowed = Some("allowed");
        assert_eq!(
            conflicts.collect::<Vec<_>>(),
            [
                ("TCP_NODELAY", "setsockopt", allowed),
                ("TCP_NODELAY", "getsockopt", None),
                ("TCP_SYNCNT", "setsockopt", allowed),
                ("SO_KEEPALIVE", "setsockopt", allowed)
            ]
        );
        for event in &its {
            assert_eq!((event.via.as_deref(), event.comm.as_deref()), (Some("compat-syscall"), Some("compat")));
            let protocol = event.socket.as_ref().and_then(|socket| socket.protocol.as_deref());
            assert_eq!(protocol, Some("tcp"), "{event:#?}");
        }
    }
}
