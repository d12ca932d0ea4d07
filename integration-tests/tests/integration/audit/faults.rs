//! Invalid arguments: the audit reports them as such, and does not change the results of the calls.

use std::process::{Command, Output};

use sockpolicy_integration_tests::{
    agent,
    policy::PolicyFile,
    process::{self, Running, read_report, workload},
    report::Event,
};

use super::backends;
use crate::{stderr, stdout};

#[test]
fn calls_with_bad_arguments_have_the_same_results_and_are_reported() {
    let (alone, seen) = (alone("sockets"), PolicyFile::new(""));
    let report = seen.dir().join("report").display().to_string();
    for backend in backends() {
        assert_eq!(audited(backend, "sockets", &report), alone, "{backend}");
        let report = read_report(&report);
        assert_eq!(report.events.iter().map(reported).collect::<Vec<_>>(), alone, "{backend}");
        let unreadable = report.events.iter().filter(|event| event.missing.contains_key("requested")).count();
        assert!(unreadable > 100, "{unreadable}");
        assert_eq!(report.summary.losses["unreadable"], unreadable as u64);
        let others: u64 = report.summary.losses.values().sum::<u64>() - unreadable as u64;
        assert_eq!(others, 0, "{:?}", report.summary.losses);
        for event in &report.events {
            let is_unknown = event.requested.is_null() && event.optval.is_none();
            assert!(is_unknown || !event.missing.contains_key("requested"), "{event:#?}");
        }
    }
}

#[test]
fn calls_on_other_descriptors_have_the_same_results_and_are_reported() {
    let (alone, seen) = (alone("descriptors"), PolicyFile::new(""));
    let report = seen.dir().join("report").display().to_string();
    for backend in backends() {
        assert_eq!(audited(backend, "descriptors", &report), alone, "{backend}");
        let events = read_report(&report).events;
        assert_eq!(events.iter().map(reported).collect::<Vec<_>>(), alone, "{backend}");
        assert!(events.iter().all(|event| event.socket.is_none()), "{backend}");
    }
}

fn lines(output: &Output) -> Vec<String> {
    assert!(output.status.success(), "{}", stderr(output));
    stdout(output).lines().map(str::to_owned).collect()
}

/// Returns the results of the calls without an audit.
fn alone(kind: &str) -> Vec<String> {
    let mut command = Command::new(workload());
    command.args(["faults", kind]);
    lines(&process::output(command))
}

fn audited(backend: &str, kind: &str, report: &str) -> Vec<String> {
    let arguments = ["audit", "-o", "json", "--report", report, "--audit-backend", backend, "--"];
    let mut command = agent::command(&arguments);
    command.args([&workload(), "faults", kind]);
    lines(&Running::start(command).finish())
}

/// Returns an event in the output format of the program.
fn reported(event: &Event) -> String {
    let Event { call, level, optname, result, .. } = event;
    format!("{} {level} {optname} {}", call.as_deref().unwrap(), result.unwrap())
}
