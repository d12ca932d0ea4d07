//! Services that restart while policies are in force: systemd and container engines remove the cgroup and create it again.

use std::time::Duration;

use nix::sys::signal::Signal;
use sockpolicy_integration_tests::{
    agent::{self, Run},
    cgroup::Cgroup,
    options::{SO_KEEPALIVE, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_NODELAY},
    policy::PolicyFile,
    probe::Probe,
    script::{Family, Fd, Kind},
    wait,
};

const RESTARTS: usize = 72;

fn policy_on(target: &str) -> PolicyFile {
    PolicyFile::new(format!(
        "[target]\ncgroup = {target:?}\n[[rule]]\nset = {{ SO_KEEPALIVE = true, TCP_KEEPIDLE = \"77s\" }}\n"
    ))
}

/// Waits until the probe's own getsockopt shows the values of the policy.
fn is_governed(probe: &mut Probe, fd: Fd, time: Duration) -> bool {
    wait::until(time, || (probe.int(fd, SO_KEEPALIVE), probe.int(fd, TCP_KEEPIDLE)) == (1, 77))
}

#[test]
fn every_listener_and_connection_of_a_restarted_server_is_governed() {
    let slice = Cgroup::new();
    let policy = policy_on(&format!("{}/server", slice.name()));
    let run = Run::start_with(&policy, &[]);
    let mut late: u64 = 0;
    for restart in 0..RESTARTS {
        let mut probe = Probe::start(&slice);
        let service = slice.child("server");
        probe.enter(&service);
        // A server that listens at once, and has a connection at once.
        let pair = probe.pair(Family::Inet, Kind::Tcp);
        late += u64::from(!is_governed(&mut probe, pair.listener, Duration::ZERO));

        for fd in [pair.listener, pair.server, pair.client] {
            assert!(is_governed(&mut probe, fd, wait::TIMEOUT), "restart {restart}: {pair:?}");
        }
        let later = probe.pair(Family::Inet, Kind::Tcp);
        for fd in [later.listener, later.server, later.client] {
            assert!(is_governed(&mut probe, fd, Duration::ZERO), "restart {restart}: {later:?}");
        }
    }
    let report = run.finish();
    let repaired = report.summary.repaired;
    assert!(repaired.listeners >= late, "{late} listeners were late, {repaired:?}");
    assert!(repaired.sockets >= repaired.listeners, "{repaired:?}");
    // Each repair is reported when it happens, with each option of each socket.
    let by_repairs = |key: &str| -> u64 {
        let repairs = report.notices.iter().filter(|notice| notice["event"] == "repair-summary");
        repairs.filter_map(|repair| repair[key].as_u64()).sum()
    };
    assert_eq!((by_repairs("changed"), by_repairs("listeners")), (repaired.sockets, repaired.listeners));
    let applied = report.events.iter().filter(|event| event.event == "applied").count() as u64;
    assert_eq!(by_repairs("set"), applied);
}

#[test]
fn cgroup_of_the_command_line_is_followed_too() {
    let slice = Cgroup::new();
    // A name with characters that mean something in a glob.
    let first = slice.child("server[1]\\x2d*");
    let policy = policy_on("/no/such/target");
    let run = Run::start_with(&policy, &["--cgroup", &first.name()]);
    assert_eq!(Probe::start(&first).value_on_listener(TCP_KEEPIDLE), 77);
    drop(first);
    run.notice("targets", 1);
    let mut server = Probe::start(&slice);
    let (second, other) = (slice.child("server[1]\\x2d*"), slice.child("server1-other"));
    server.enter(&second);
    let listener = server.listener(Family::Inet, Kind::Tcp).0;
    assert!(is_governed(&mut server, listener, wait::TIMEOUT));
    assert_eq!(Probe::start(&other).value_on_listener(TCP_KEEPIDLE), 7200);
    run.finish();
}

/// The policies stay without the agent, but a new cgroup is not covered until the next agent starts.
#[test]
fn service_that_restarted_without_an_agent_is_repaired_by_the_next_agent() {
    let slice = Cgroup::new();
    let service = slice.child("server");
    let policy = policy_on(&service.name());
    let instance = format!("{}-restart", slice.name().trim_matches('/'));
    let arguments = ["--persist", "--instance", &instance];
    let run = Run::start_with(&policy, &arguments);
    drop(run.finish_persistent());
    drop(service);
    let mut server = Probe::start(&slice);
    let service = slice.child("server");
    server.enter(&service);
    let listener = server.listener(Family::Inet, Kind::Tcp).0;
    assert_eq!(server.int(listener, TCP_KEEPIDLE), 7200);
    let run = Run::start_with(&policy, &arguments);
    assert!(is_governed(&mut server, listener, wait::TIMEOUT));
    let repair = run.notice("repair-summary", 1);
    assert_eq!(&repair["listeners"], &1, "{repair}");
    // Nothing was removed before the next agent.
    drop(run.finish_persistent());
    let run = Run::start_with(&policy, &arguments);
    assert_eq!(run.finish_persistent().summary.repaired.listeners, 0);
    assert!(agent::output(&["detach", "--instance", &instance]).status.success());
}

/// A connection that nobody has accepted has no descriptor.
#[test]
fn connection_that_waits_in_the_queue_of_an_early_listener_is_repaired() {
    let slice = Cgroup::new();
    let policy = policy_on(&format!("{}/server", slice.name()));
    let run = Run::start_with(&policy, &[]);
    let mut server = Probe::start(&slice);
    let client = server.open(Family::Inet, Kind::Tcp);
    run.signal(Signal::SIGSTOP);
    let service = slice.child("server");
    server.enter(&service);
    let (listener, address) = server.listener(Family::Inet, Kind::Tcp);
    server.connect(client, address);
    run.signal(Signal::SIGCONT);
    assert!(is_governed(&mut server, listener, wait::TIMEOUT));
    run.notice("repair-summary", 1);
    let accepted = server.accept(listener);
    assert!(is_governed(&mut server, accepted, Duration::ZERO));
    assert_eq!(server.int(client, TCP_KEEPIDLE), 7200, "the client belongs to no target");
    run.finish();
}

#[test]
fn repair_leaves_other_targets_and_allowed_values_alone() {
    let slice = Cgroup::new();
    let mut before = Probe::start(&slice);
    let (old, new) = (slice.child("old"), format!("{}/new", slice.name()));
    before.enter(&old);
    let old_listener = before.listener(Family::Inet, Kind::Tcp).0;
    let policy = PolicyFile::new(format!(
        "[target]\ncgroup = [{:?}, {new:?}]\n[[rule]]\nset = {{ TCP_KEEPIDLE = \"77s\", \
         TCP_KEEPCNT = {{ value = 5, on_conflict = \"allow\" }}, \
         TCP_NODELAY = {{ value = true, on_conflict = \"allow\" }} }}\n",
        old.name()
    ));
    let run = Run::start_with(&policy, &[]);
    let mut after = Probe::start(&slice);
    run.signal(Signal::SIGSTOP);
    let new = slice.child("new");
    after.enter(&new);
    let listener = after.listener(Family::Inet, Kind::Tcp).0;
    after.set(listener, TCP_KEEPCNT, 3).unwrap();
    run.signal(Signal::SIGCONT);
    assert!(wait::until(wait::TIMEOUT, || after.int(listener, TCP_KEEPIDLE) == 77));
    let repair = run.notice("repair-summary", 1);
    assert_eq!((&repair["changed"], &repair["listeners"]), (&1.into(), &1.into()), "{repair}");
    assert_eq!((after.int(listener, TCP_KEEPCNT), after.int(listener, TCP_NODELAY)), (3, 1), "{}", run.lines());
    assert_eq!(before.int(old_listener, TCP_KEEPIDLE), 7200, "a socket from before the start is left alone");
    run.finish();
}

#[test]
fn dry_run_reports_what_a_repair_would_change() {
    let slice = Cgroup::new();
    let policy = policy_on(&format!("{}/server", slice.name()));
    let run = Run::start_with(&policy, &["--dry-run"]);
    let mut server = Probe::start(&slice);
    run.signal(Signal::SIGSTOP);
    let service = slice.child("server");
    server.enter(&service);
    let listener = server.listener(Family::Inet, Kind::Tcp).0;
    run.signal(Signal::SIGCONT);
    let repair = run.notice("repair-summary", 1);
    assert_eq!((&repair["would_change"], &repair["would_set"], &repair["changed"]), (&1.into(), &2.into(), &0.into()));
    assert_eq!(server.int(listener, TCP_KEEPIDLE), 7200);
    assert_eq!(run.finish().summary.repaired.sockets, 0);
}
