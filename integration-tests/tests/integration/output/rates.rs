//! Tenants with many processes and cgroups: their lines are limited, and the lines of others are still reported.

use std::process::{Command, Stdio};

use sockpolicy_integration_tests::{
    agent,
    cgroup::Cgroup,
    policy::PolicyFile,
    process::{Running, workload},
    require, wait,
};

const OPTION: &str = "SO_KEEPALIVE";
const CHILDREN: u64 = 3000;

fn policy_on(targets: &[&Cgroup]) -> PolicyFile {
    let names: Vec<String> = targets.iter().map(|target| target.name()).collect();
    PolicyFile::new(format!("[target]\ncgroup = {names:?}\n[[rule]]\nset = {{ {OPTION} = true }}\n"))
}

fn forks(children: u64) -> Command {
    let mut command = Command::new(workload());
    command.args(["forks", &children.to_string()]).stdin(Stdio::null());
    command
}

#[test]
fn forking_tenant_causes_limited_lines_and_exact_counts() {
    require!("cgroup/bind4");
    let target = Cgroup::new();
    let policy = policy_on(&[&target]);
    let run = agent::Run::start_with(&policy, &[]);
    let begin = std::time::Instant::now();
    assert!(Running::start_in(forks(CHILDREN), target.child("a")).finish().status.success());
    let seconds = begin.elapsed().as_secs() + 2;
    let report = run.finish();
    let setting = report.setting(OPTION);
    let calls: u64 = setting.calls.verdicts().values().sum();
    let lines = report.of("conflict", OPTION).len() as u64;
    assert_eq!(calls, CHILDREN);
    assert_eq!((setting.events.reported, setting.events.reported + setting.events.suppressed), (lines, CHILDREN));
    // abi::event::Rate::CGROUP
    assert!(lines <= 500 + 50 * seconds + 8, "{lines} lines in {seconds} s");
    assert!(lines >= 400, "{lines} lines");
    assert_eq!(report.summary.losses["over_budget"], CHILDREN - lines);
}

#[test]
fn many_cgroups_of_a_target_share_its_budget() {
    require!("cgroup/bind4");
    let target = Cgroup::new();
    let policy = policy_on(&[&target]);
    let run = agent::Run::start_with(&policy, &[]);
    let begin = std::time::Instant::now();
    for number in 0..12 {
        assert!(Running::start_in(forks(250), target.child(&number.to_string())).finish().status.success());
    }
    let seconds = begin.elapsed().as_secs() + 2;
    let report = run.finish();
    let lines = report.of("conflict", OPTION).len() as u64;
    // abi::event::Rate::TARGET
    assert!(lines <= 1000 + 100 * seconds + 8, "{lines} lines in {seconds} s");
    let events = &report.setting(OPTION).events;
    assert_eq!((events.reported, events.reported + events.suppressed), (lines, 12 * 250));
}

#[test]
fn flood_of_one_target_does_not_suppress_events_of_others() {
    require!("cgroup/bind4");
    let (loud, quiet) = (Cgroup::new(), Cgroup::new());
    let policy = policy_on(&[&loud, &quiet]);
    let run = agent::Run::start_with(&policy, &[]);
    let mut command = forks(u64::MAX);
    command.stdout(Stdio::null());
    let flood = Running::start_in(command, loud.child("a"));
    // The flood is over its budget by now.
    let is_over = || run.lines().contains("\"over_budget\"");
    assert!(wait::until(wait::TIMEOUT, is_over), "{}", run.lines());
    let name = quiet.name();
    assert!(Running::start_in(forks(3), quiet).finish().status.success());
    let events = || run.lines().lines().filter(|line| line.contains("\"conflict\"") && line.contains(&name)).count();
    assert!(wait::until(wait::TIMEOUT, || events() == 3), "{} events", events());
    drop(flood);
}
