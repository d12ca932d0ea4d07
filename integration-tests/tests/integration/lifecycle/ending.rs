//! Killed agents: their policies end with them, and the command does not.

use std::time::Duration;

use nix::sys::signal::Signal;
use sockpolicy_integration_tests::{
    agent,
    cgroup::Cgroup,
    foreign_program::count_attached,
    options::SO_KEEPALIVE,
    probe::Probe,
    process::{Running, cgroup_of, is_alive},
    script::{Family, Kind},
    wait,
};

use super::some_policy;

#[test]
fn killed_exec_leaves_only_the_command() {
    let policy = some_policy();
    let script = "echo $$; exec sleep 300 >/dev/null 2>&1";
    let mut running = Running::exec(&[], &policy, &["sh", "-c", script]);
    let command = running.lines(1)[0].parse().unwrap();
    let held = running.bpf_objects();
    assert_eq!(cgroup_of(command), Some(format!("{}/sockpolicy-{}", running.home.name(), running.pid())));
    running.signal(Signal::SIGKILL);
    running.wait();
    held.assert_gone();
    let is_gone = || running.home.children().is_empty();
    assert!(wait::until(wait::TIMEOUT, is_gone), "{:?}", running.home.children());
    assert!(is_alive(command), "the command ended with the agent");
    assert_eq!(cgroup_of(command), Some(running.home.name()));
    // The guard process is gone too.
    let members = || std::fs::read_to_string(running.home.path().join("cgroup.procs")).unwrap();
    assert!(wait::until(wait::TIMEOUT, || members() == format!("{command}\n")), "{}", members());
}

#[test]
fn exec_killed_at_any_time_leaves_nothing() {
    let policy = some_policy();
    // From the start of the agent until after the start of its command. This takes 40 ms here, and a second or two on
    // an emulated processor.
    for after in [0, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 512, 1024].map(Duration::from_millis) {
        let mut running = Running::exec(&[], &policy, &["sleep", "300"]);
        wait::until(after, || false);
        running.signal(Signal::SIGKILL);
        running.wait();
        let is_gone = || running.home.children().is_empty();
        assert!(wait::until(wait::TIMEOUT, is_gone), "killed after {after:?}: {:?}", running.home.children());
    }
}

#[test]
fn killed_run_leaves_nothing() {
    let policy = some_policy();
    let target = Cgroup::new();
    let path = target.path().display().to_string();
    let mut command = agent::command(&["run", "--cgroup", &path]);
    command.arg(policy.path());
    let mut running = Running::start(command);
    running.lines(1);
    let mut probe = Probe::start(&target);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    probe.set(socket, SO_KEEPALIVE, 0).unwrap();
    assert_eq!(probe.int(socket, SO_KEEPALIVE), 1, "the policy is in force");
    let held = running.bpf_objects();
    assert!(count_attached(&target) > 0);
    running.signal(Signal::SIGKILL);
    running.wait();
    held.assert_gone();
    assert_eq!(count_attached(&target), 0);
    probe.set(socket, SO_KEEPALIVE, 0).unwrap();
    assert_eq!(probe.int(socket, SO_KEEPALIVE), 0, "the policy is no longer in force");
}
