//! Changes on the host between two steps of a command, which is stopped during the change.

use std::fs;

use serde_json::Value;
use sockpolicy_integration_tests::{
    agent,
    bpffs::Instance,
    cgroup::Cgroup,
    options::SO_MARK,
    policy::{PolicyFile, sets_mark},
    probe::Probe,
    process::Running,
    script::{Family, Fd, Kind},
};

use crate::{stderr, stdout};

/// Opens a socket that the kernel lists, or one that is only found through its process.
fn socket(probe: &mut Probe, is_listed: bool) -> Fd {
    let socket = probe.open(Family::Inet, Kind::Tcp);
    if is_listed {
        probe.bind(socket, Family::Inet.loopback());
        probe.listen(socket);
    }
    socket
}

/// Ends a probe, and starts another one in another cgroup with the same process id and the same descriptor number.
fn succeed(probe: Probe, socket: Fd, elsewhere: &Cgroup) -> Probe {
    let pid = probe.pid;
    drop(probe);
    let mut successor = Probe::start_with_pid(pid, elsewhere);
    assert_eq!(successor.open(Family::Inet, Kind::Tcp), socket);
    successor
}

/// Steps between listing sockets and duplicating a descriptor, and whether the kernel lists the socket.
const BEFORE_TAKING: [(&str, bool); 4] =
    [("sockets-listed", true), ("sockets-listed", false), ("holders-listed", false), ("home-read", false)];

#[test]
fn process_with_a_reused_pid_is_not_changed() {
    for (step, is_listed) in BEFORE_TAKING {
        let (target, elsewhere, instance) = (Cgroup::new(), Cgroup::new(), Instance::new());
        let policy = PolicyFile::new(sets_mark(&target, 7));
        let (mut stays, mut ends) = (Probe::start(&target), Probe::start(&target));
        let open = stays.listener(Family::Inet, Kind::Tcp).0;
        let closed = socket(&mut ends, is_listed);
        let mut apply = agent::command(&["apply", "--instance", &instance.name]);
        apply.arg(policy.path());
        let held = Running::start_stopped_at(apply, step);
        let mut successor = succeed(ends, closed, &elsewhere);
        held.resume();
        let output = held.finish();
        assert_eq!(successor.int(closed, SO_MARK), 0, "{step}: {}", stdout(&output));
        assert_eq!(stays.int(open, SO_MARK), 7, "{step}: {}", stderr(&output));
        let printed = stdout(&output);
        assert!(
            output.status.success() && printed.contains("changed 1 option on 1 of 1 socket\n"),
            "{step}: {printed}"
        );
    }
}

#[test]
fn socket_with_a_reused_descriptor_is_not_changed() {
    for (step, is_listed) in BEFORE_TAKING {
        let (target, instance) = (Cgroup::new(), Instance::new());
        let policy = PolicyFile::new(sets_mark(&target, 7));
        let mut probe = Probe::start(&target);
        let open = socket(&mut probe, true);
        let closed = socket(&mut probe, is_listed);
        let mut apply = agent::command(&["apply", "--instance", &instance.name]);
        apply.arg(policy.path());
        let held = Running::start_stopped_at(apply, step);
        probe.close(closed);
        assert_eq!(socket(&mut probe, is_listed), closed);
        held.resume();
        let output = held.finish();
        assert_eq!((probe.int(open, SO_MARK), probe.int(closed, SO_MARK)), (7, 0), "{step}: {}", stdout(&output));
        assert!(output.status.success(), "{step}: {}", stderr(&output));
    }
}

/// Returns the owners of sockets in the output of a command.
fn owners(output: &std::process::Output) -> Vec<(Option<u64>, Option<String>)> {
    let lines = stdout(output);
    let lines = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let sockets = lines.filter(|line| !line["event"].as_str().is_some_and(|event| event.ends_with("summary")));
    sockets.map(|line| (line["pid"].as_u64(), line["cgroup"].as_str().map(str::to_owned))).collect()
}

#[test]
fn socket_is_not_attributed_to_a_process_with_a_reused_pid() {
    for command in ["ls", "verify"] {
        for step in ["sockets-listed", "socket-taken"] {
            let (target, elsewhere) = (Cgroup::new(), Cgroup::new());
            let policy = PolicyFile::new(sets_mark(&target, 7));
            let mut probe = Probe::start(&target);
            let closed = socket(&mut probe, true);
            let pid = probe.pid;
            let mut agent = agent::command(&[command, "-o", "json"]);
            agent.arg(policy.path());
            let held = Running::start_stopped_at(agent, step);
            let successor = succeed(probe, closed, &elsewhere);
            held.resume();
            let output = held.finish();
            let owners = owners(&output);
            match (command, step) {
                // The process owned the socket when the descriptor was duplicated.
                (_, "socket-taken") => assert_eq!(owners, [(Some(pid.into()), Some(target.name()))], "{command}"),
                ("ls", _) => assert_eq!(owners, [(None, None)]),
                _ => assert!(output.status.success() && owners.is_empty(), "{owners:?}{}", stderr(&output)),
            }
            drop(successor);
        }
    }
}

#[test]
fn network_namespace_that_disappears_during_a_visit_affects_no_other() {
    for step in ["processes-listed", "namespace-found", "namespace-opened", "sockets-listed"] {
        let (target, instance) = (Cgroup::new(), Instance::new());
        let policy = PolicyFile::new(sets_mark(&target, 7));
        let (mut ends, mut stays) = (Probe::start(&target), Probe::start(&target));
        let open = [true, false].map(|is_listed| socket(&mut stays, is_listed));
        for is_listed in [true, false] {
            socket(&mut ends, is_listed);
        }
        let namespace = fs::read_link(format!("/proc/{}/ns/net", ends.pid)).unwrap();
        let namespace = namespace.to_str().unwrap().trim_matches(|letter: char| !letter.is_ascii_digit());
        let step = if step.starts_with("namespace") { format!("{step}={namespace}") } else { step.to_owned() };
        let mut apply = agent::command(&["apply", "--instance", &instance.name]);
        apply.arg(policy.path());
        let held = Running::start_stopped_at(apply, &step);
        drop(ends);
        held.resume();
        let output = held.finish();
        assert!(output.status.success(), "{step}: {}", stderr(&output));
        assert_eq!(stderr(&output), "", "{step}");
        assert_eq!(open.map(|socket| stays.int(socket, SO_MARK)), [7, 7], "{step}");
        assert!(stdout(&output).contains("changed 2 options on 2 of 2 sockets\n"), "{step}: {}", stdout(&output));
    }
}
