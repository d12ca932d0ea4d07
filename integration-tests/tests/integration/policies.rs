//! The example policies, each applied to a real program.

mod library;

use std::path::{Path, PathBuf};

use sockpolicy_integration_tests::{agent, policy::PolicyFile, process::read_report, report::Report};

use super::{stderr, stdout};

/// Returns the root directory of the repository.
fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// Parses the seconds until the next keepalive probe from the output of ss: `timer:(keepalive,59sec,0)` or
/// `timer:(keepalive,4min59sec,0)`.
fn keepalive_seconds(ss: &str) -> u32 {
    let timer = ss.split("timer:(keepalive,").nth(1).and_then(|rest| rest.split(',').next());
    let timer = timer.unwrap_or_else(|| panic!("no keepalive timer in:\n{ss}"));
    let (minutes, seconds) = timer.split_once("min").unwrap_or(("0", timer));
    let seconds = seconds.trim_end_matches("sec");
    60 * minutes.parse::<u32>().unwrap() + if seconds.is_empty() { 0 } else { seconds.parse::<u32>().unwrap() }
}

/// Runs the demo's Redis under a policy. Returns its output, and the report.
fn redis_under(policy: &str, arguments: &[&str]) -> (String, Report) {
    // Only its directory is used.
    let scratch = PolicyFile::new("");
    let report = scratch.dir().join("report.json");
    let report = report.to_str().unwrap();
    let policy = repository().join("policies").join(policy);
    let workload = repository().join("examples/redis-demo/workload");
    let mut words = vec!["exec", policy.to_str().unwrap(), "-o", "json", "--report", report];
    words.extend(arguments);
    words.extend(["--", workload.to_str().unwrap()]);
    let output = agent::output(&words);
    assert!(output.status.success(), "{}: {}", output.status, stderr(&output));
    (stdout(&output), read_report(report))
}

#[test]
fn keepalive_below_nat_is_enforced_on_a_redis_that_requests_five_minutes() {
    let (printed, report) = redis_under("keepalive-below-nat.toml", &[]);
    assert!(keepalive_seconds(&printed) <= 60, "{printed}");
    let conflict = report.of("conflict", "TCP_KEEPIDLE").into_iter().find(|event| event.requested == 300).unwrap();
    assert_eq!(conflict.verdict.as_deref(), Some("rewritten"));
    assert_eq!(conflict.comm.as_deref(), Some("redis-server"));
    let setting = report.setting("TCP_KEEPIDLE");
    assert!(setting.sockets.set > 20, "sockets of twenty clients and of their server: {setting:?}");
    assert_eq!(setting.sockets.failed, 0);
    report.assert_nothing_lost();
}

#[test]
fn keepalive_below_nat_in_a_dry_run_does_not_change_redis() {
    let (printed, report) = redis_under("keepalive-below-nat.toml", &["--dry-run"]);
    assert!(keepalive_seconds(&printed) > 240, "{printed}");
    assert!(report.verdicts("TCP_KEEPIDLE").contains(&"would-rewrite"));
}
