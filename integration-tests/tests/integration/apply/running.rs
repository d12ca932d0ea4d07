//! `run --apply`: existing sockets follow the policies in force, and the agent's own calls are not reported.

use std::fs;

use serde_json::{Value, json};
use sockpolicy_integration_tests::{
    agent::{self, Run},
    bpffs::Instance,
    cgroup::Cgroup,
    options::{SO_MARK, SO_PRIORITY, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_NODELAY},
    policy::PolicyFile,
    probe::Probe,
    script::{Family, Fd, Kind},
};

use crate::stderr;

fn text(target: &Cgroup, mark: i32) -> String {
    format!(
        "[target]\ncgroup = {:?}\n[[rule]]\nset = {{ SO_MARK = {mark}, SO_PRIORITY = 5 }}\n[[rule]]\nmatch = {{ protocol = \
         \"tcp\" }}\nset = {{ TCP_KEEPIDLE = \"61s\" }}\nlimit = {{ TCP_KEEPCNT = {{ max = 4 }} }}\n",
        target.name()
    )
}

/// Opens a connection with a keepalive count beyond the limit, and a datagram socket.
fn sockets(probe: &mut Probe) -> [Fd; 3] {
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    probe.set(pair.client, TCP_KEEPCNT, 8).unwrap();
    let [one, other] = [(); 2].map(|()| probe.open(Family::Inet, Kind::Udp));
    let address = probe.bind(other, "127.0.0.1:0".parse().unwrap());
    probe.connect(one, address);
    [pair.client, pair.server, one]
}

fn assert_in_line(probe: &mut Probe, [client, server, datagram]: [Fd; 3], mark: i32) {
    for socket in [client, server, datagram] {
        assert_eq!((probe.int(socket, SO_MARK), probe.int(socket, SO_PRIORITY)), (mark, 5));
    }
    for socket in [client, server] {
        assert_eq!(probe.int(socket, TCP_KEEPIDLE), 61);
    }
    assert_eq!(probe.int(client, TCP_KEEPCNT), 4);
}

/// Returns the files of the instance with this name.
fn files_of(name: &str) -> Vec<String> {
    let entries = fs::read_dir("/run/sockpolicy").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|file| file.contains(name)).collect()
}

#[test]
fn existing_sockets_follow_the_policies_without_reported_calls() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(text(&target, 7));
    let mut probe = Probe::start(&target);
    let sockets = sockets(&mut probe);
    let run = Run::start_with(&policy, &["--apply"]);
    let name = format!("run-{}", run.pid());
    let printed = run.notice("apply-summary", 1);
    assert_eq!((&printed["changed"], &printed["failed"]), (&json!(5), &json!(0)), "{}", run.lines());
    assert_in_line(&mut probe, sockets, 7);
    assert!(!files_of(&name).is_empty());

    fs::write(policy.path(), text(&target, 8)).unwrap();
    let printed = run.notice("apply-summary", 2);
    assert_eq!(printed["set"], json!(5), "{}", run.lines());
    assert_in_line(&mut probe, sockets, 8);
    // The owner reads the policy's values without a conflict; a call with another value is a conflict.
    probe.set(sockets[0], TCP_KEEPIDLE, 99).unwrap();

    let report = run.finish();
    let conflicts: Vec<_> = report.events.iter().filter(|event| event.event == "conflict").collect();
    let [conflict] = conflicts[..] else { panic!("{conflicts:#?}") };
    assert_eq!((conflict.option.as_str(), conflict.pid), ("TCP_KEEPIDLE", Some(probe.pid)));
    for setting in &report.summary.settings {
        assert_eq!((setting.calls.agreed, setting.calls.reads), (0, 0), "{setting:?}");
    }
    assert_eq!(files_of(&name), Vec::<String>::new());
}

#[test]
fn dry_run_reports_what_it_would_set_and_changes_no_socket() {
    let target = Cgroup::new();
    let policy = PolicyFile::new(text(&target, 7));
    let mut probe = Probe::start(&target);
    let sockets = sockets(&mut probe);
    let run = Run::start_with(&policy, &["--apply", "--dry-run"]);
    let printed = run.notice("apply-summary", 1);
    assert_eq!((&printed["changed"], &printed["set"]), (&json!(0), &json!(0)));
    let would: Vec<Value> = run.notices("would-apply");
    assert_eq!(Value::from(would.len()), printed["would_set"]);
    assert!(would.iter().any(|event| event["option"] == "SO_MARK" && event["pid"] == probe.pid), "{would:?}");
    assert_eq!(sockets.map(|socket| probe.int(socket, SO_MARK)), [0; 3]);
    run.finish();
}

#[test]
fn detach_restores_values_that_run_has_applied() {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(text(&target, 7));
    let mut probe = Probe::start(&target);
    let sockets = sockets(&mut probe);
    let all = |probe: &mut Probe| {
        let of_all = sockets.map(|socket| [SO_MARK, SO_PRIORITY].map(|option| probe.int(socket, option)));
        (of_all, [TCP_KEEPCNT, TCP_KEEPIDLE].map(|option| probe.int(sockets[0], option)))
    };
    let before = all(&mut probe);
    let run = Run::start_with(&policy, &["--apply", "--persist", "--instance", &instance.name]);
    run.notice("apply-summary", 1);
    assert_in_line(&mut probe, sockets, 7);
    run.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(run.wait_for_end().status.success());
    assert_in_line(&mut probe, sockets, 7);
    let output = agent::output(&["detach", "--restore", "--instance", &instance.name]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(all(&mut probe), before);
    assert!(instance.left().is_empty(), "{:?}", instance.left());
}

#[test]
fn run_without_apply_changes_no_existing_socket() {
    let target = Cgroup::new();
    let mut probe = Probe::start(&target);
    let [client, ..] = sockets(&mut probe);
    let run = Run::start_with(&PolicyFile::new(text(&target, 7)), &[]);
    let later = probe.open(Family::Inet, Kind::Tcp);
    assert_eq!([client, later].map(|socket| probe.int(socket, SO_MARK)), [0, 7]);
    assert_eq!(probe.int(client, TCP_NODELAY), 0);
    run.finish();
}
