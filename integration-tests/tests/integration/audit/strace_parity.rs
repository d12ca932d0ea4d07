//! The audit compared with strace on the same run, call by call and thread by thread.

mod programs;
mod strace;

use std::{collections::BTreeMap, path::Path, process::Command, time::Duration};

use nix::errno::Errno;
use sockpolicy_integration_tests::{
    agent,
    process::{self, Running, read_report, workload},
    report::{Event, Report},
    wait,
};

use super::backends;

use super::auditing;
use crate::{stderr, stdout};

/// A call, as both tools report it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    call: String,
    level: i32,
    optname: i32,
    /// The name of the errno, or empty.
    error: String,
    /// The argument; `None` if it could not be read.
    value: Option<Value>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Value {
    /// The length of the whole argument.
    len: u32,
    /// Its first bytes, up to [`SHOWN`].
    bytes: Vec<u8>,
}

/// Calls by thread, in order.
type Calls = BTreeMap<u32, Vec<Seen>>;

/// The number of argument bytes in an event.
const SHOWN: usize = 16;

/// Longer than a JVM takes on a shared emulated processor.
const PATIENCE: Duration = Duration::from_secs(300);

/// How the agent is asked to report every call.
#[derive(Clone, Copy)]
enum By {
    Audit,
    /// `exec`, with a policy that requests it.
    Policy,
}

/// Converts an event to the form of strace's output.
fn seen(event: &Event) -> Seen {
    let value = event.optval.as_deref().map(|hex| {
        let digits = hex.strip_prefix("0x").unwrap().as_bytes().chunks(2);
        let byte = |pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap();
        Value { len: u32::try_from(event.optlen.unwrap()).unwrap(), bytes: digits.map(byte).collect() }
    });
    let error = match event.result.unwrap() {
        0 => String::new(),
        result => format!("{:?}", Errno::from_raw(i32::try_from(-result).unwrap())),
    };
    Seen { call: event.call.clone().unwrap(), level: event.level, optname: event.optname, error, value }
}

fn audited(report: &Report) -> Calls {
    let mut calls = Calls::new();
    for event in &report.events {
        assert_eq!(event.event, "call");
        calls.entry(event.tid.unwrap()).or_default().push(seen(event));
    }
    calls
}

/// Runs a command under strace under the agent, and compares the two. Returns the agent's report.
#[track_caller]
fn compare(by: By, backend: &str, command: &[&str]) -> Report {
    let policy = auditing("calls = \"all\"");
    let path = |name| policy.dir().join(name).display().to_string();
    let (report, trace) = (path("report"), path("strace"));
    let arguments = ["-o", "json", "--report", &report, "--audit-backend", backend];
    let command = [&strace::command(&trace)[..], command].concat();
    let command = match by {
        By::Audit => agent::command(&[&["audit"], &arguments[..], &["--"], &command].concat()),
        By::Policy => process::exec(&arguments, &policy, &command),
    };
    succeed(command, backend);
    let report = read_report(&report);
    assert_same(backend, &strace::read(Path::new(&trace)), &report);
    report
}

/// Runs a command with a long time limit, which must succeed.
#[track_caller]
fn succeed(command: Command, what: &str) {
    let mut running = Running::start(command);
    let has_ended = wait::until(PATIENCE, || running.has_ended());
    assert!(has_ended, "{what}: did not end: {}{}", running.stdout(), running.stderr());
    let output = running.finish();
    assert!(output.status.success(), "{what}: {}: {}{}", output.status, stdout(&output), stderr(&output));
}

/// Returns the losses that the agent reports, by reason, except those of programs that the kernel skipped.
fn lost(report: &Report) -> Vec<(&str, u64)> {
    let losses = &report.summary.losses;
    let is_left_out = |reason: &str| losses["prog_missed"] > 0 && ["prog_missed", "exit_missed"].contains(&reason);
    let losses = losses.iter().filter(|(reason, count)| **count > 0 && !is_left_out(reason));
    losses.map(|(reason, count)| (reason.as_str(), *count)).collect()
}

#[track_caller]
fn assert_same(backend: &str, traced: &Calls, report: &Report) {
    let audited = audited(report);
    let lost = &report.summary.losses;
    // If the kernel skipped programs and the agent reports that, calls may be missing, but no call may differ.
    let mut may_miss = report.summary.losses["prog_missed"];
    for (thread, traced) in traced {
        let mut audited = audited.get(thread).map_or(&[][..], Vec::as_slice).iter().peekable();
        for (number, traced) in traced.iter().enumerate() {
            if audited.next_if_eq(&traced).is_some() {
                continue;
            }
            assert!(
                may_miss > 0,
                "call {number} of thread {thread}: strace saw {traced:?}, {backend} {:?}, and lost {lost:?}",
                audited.peek()
            );
            may_miss -= 1;
        }
        assert_eq!(audited.next(), None, "calls of thread {thread} that only {backend} saw, and lost {lost:?}");
    }
    let others: Vec<_> = audited.keys().filter(|thread| !traced.contains_key(thread)).collect();
    assert!(others.is_empty(), "threads that only {backend} saw: {others:?}");
}

#[test]
fn every_call_of_processes_threads_and_children_is_reported_with_its_result() {
    for (backend, by) in backends().flat_map(|backend| [(backend, By::Audit), (backend, By::Policy)]) {
        let report = compare(by, backend, &[&workload(), "calls"]);
        assert_eq!(lost(&report), [("unreadable", 3)], "each task passes one unreadable pointer");
        let calls = audited(&report);
        assert_eq!(calls.len(), 3, "the process, its thread, its child");
        for calls in calls.values() {
            let errors: Vec<&str> = calls.iter().map(|call| &*call.error).filter(|error| !error.is_empty()).collect();
            for error in ["ENOPROTOOPT", "EINVAL", "EFAULT", "ENOENT", "EBADF", "ENOTSOCK"] {
                assert!(errors.contains(&error), "no call failed with {error}: {errors:?}");
            }
        }
    }
}
