//! The audit against strace, on the same run: call by call, thread by thread.

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

/// A call, as both see it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    call: String,
    level: i32,
    optname: i32,
    /// The name of the errno, or empty.
    error: String,
    /// The argument, where it could be read.
    value: Option<Value>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Value {
    /// Of all of it.
    len: u32,
    /// The first, up to [`SHOWN`].
    bytes: Vec<u8>,
}

/// By thread, in their order.
type Calls = BTreeMap<u32, Vec<Seen>>;

/// How many bytes of an argument events hold.
const SHOWN: usize = 16;

/// Longer than a JVM takes on an emulated processor that it shares.
const PATIENCE: Duration = Duration::from_secs(300);

/// How the agent is told to report every call.
#[derive(Clone, Copy)]
enum By {
    Audit,
    /// `exec`, with a policy that asks for it.
    Policy,
}

/// What the events say, in strace's words.
fn seen(event: &Event) -> Seen {
    let value = event.optval.as_deref().map(|hex| {
        let digits = hex.strip_prefix("0x").unwrap().as_bytes().chunks(2);
        let byte = |pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap();
        Value { len: event.optlen.unwrap(), bytes: digits.map(byte).collect() }
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

/// Runs a command under strace under the agent, and compares. Gives the agent's report.
#[track_caller]
fn compare(by: By, backend: &str, command: &[&str]) -> Report {
    let policy = auditing("calls = \"all\"");
    let path = |name| policy.folder().join(name).display().to_string();
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

/// Runs a command that takes its time.
#[track_caller]
fn succeed(command: Command, what: &str) {
    let mut running = Running::start(command);
    let has_ended = wait::until(PATIENCE, || running.has_ended());
    assert!(has_ended, "{what}: no end: {}{}", running.stdout(), running.stderr());
    let output = running.finish();
    assert!(output.status.success(), "{what}: {}: {}{}", output.status, stdout(&output), stderr(&output));
}

/// What the agent says that it missed, by reason; without what comes of programs that the kernel left out.
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
    // Where the kernel left programs out, and says so, calls may be missing; none may be other than it was.
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
fn every_call_of_processes_threads_and_children_is_seen_with_its_result() {
    for (backend, by) in backends().flat_map(|backend| [(backend, By::Audit), (backend, By::Policy)]) {
        let report = compare(by, backend, &[&workload(), "calls"]);
        assert_eq!(lost(&report), [("unreadable", 3)], "each has an argument at a bad address");
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
