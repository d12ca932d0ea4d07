//! Beside others: other agents, and other people's programs on the same cgroup.

use std::fs;

use nix::errno::Errno;
use sockpolicy_integration_tests::{
    agent::{self, Exec, Run},
    cgroup::Cgroup,
    foreign::{At, Foreign, Manner, NAME, attached},
    options::{SO_KEEPALIVE, SO_RCVLOWAT, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_KEEPINTVL},
    policy::PolicyFile,
    probe::Probe,
    process::{self, Running},
    require,
    script::{Family, Kind},
    wait,
};

use super::some_policy;
use crate::{stderr, stdout};

#[test]
fn two_at_once_do_not_disturb_each_other() {
    let keepalive = some_policy();
    let keepcnt = PolicyFile::new("name = \"other\"\n[[rule]]\nset = { TCP_KEEPCNT = 3 }\n");
    let (mut one, mut other) = (Exec::start(&keepalive), Exec::start(&keepcnt));
    let sockets = [&mut one, &mut other].map(|exec| {
        let socket = exec.probe.open(Family::Inet, Kind::Tcp);
        exec.probe.set(socket, SO_KEEPALIVE, 0).unwrap();
        exec.probe.set(socket, TCP_KEEPCNT, 5).unwrap();
        socket
    });
    assert_eq!((one.probe.int(sockets[0], SO_KEEPALIVE), one.probe.int(sockets[0], TCP_KEEPCNT)), (1, 5));
    assert_eq!((other.probe.int(sockets[1], SO_KEEPALIVE), other.probe.int(sockets[1], TCP_KEEPCNT)), (0, 3));
    let report = one.finish();
    assert_eq!((report.conflict("SO_KEEPALIVE").pid, report.events.len()), (report.events[0].pid, 1));
    // The end of one is not the end of the other.
    other.probe.set(sockets[1], TCP_KEEPCNT, 6).unwrap();
    assert_eq!(other.probe.int(sockets[1], TCP_KEEPCNT), 3);
    let report = other.finish();
    assert_eq!(report.setting("TCP_KEEPCNT").calls.verdicts()["rewritten"], 2);
    assert!(report.events.iter().all(|event| event.option == "TCP_KEEPCNT"), "{:#?}", report.events);
}

#[test]
fn exec_within_exec_works_and_both_report() {
    require!("cgroup/bind4");
    let outer = PolicyFile::new(
        "name = \"outer\"\n[[rule]]\nset = { TCP_NODELAY = { value = true, on_conflict = \"allow\" } }\n",
    );
    let inner = PolicyFile::new(
        "name = \"inner\"\n[[rule]]\nset = { SO_KEEPALIVE = { value = true, on_conflict = \"allow\" } }\n",
    );
    let agent = agent::program().display().to_string();
    let (inner_path, workload) = (inner.path().display().to_string(), process::workload());
    let reports = ["outer", "inner"].map(|name| outer.folder().join(name).display().to_string());
    let within =
        [&agent, "exec", "-o", "json", "--report", &reports[1], &inner_path, "--", &workload, "storm", "2", "3"];
    let output = Running::exec(&["-o", "json", "--report", &reports[0]], &outer, &within).finish();
    assert!(output.status.success(), "{}", stderr(&output));
    for (report, option) in reports.iter().zip(["TCP_NODELAY", "SO_KEEPALIVE"]) {
        let report = process::read_report(report);
        assert_eq!(report.setting(option).calls.verdicts()["allowed"], 6, "{option}");
    }
    // The status comes through both.
    let within = [&agent, "exec", "--quiet", &inner_path, "--", "sh", "-c", "exit 7"];
    let output = Running::exec(&["--quiet"], &outer, &within).finish();
    assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
}

#[test]
fn programs_of_others_stay_attached_and_working() {
    let policy = some_policy();
    for manner in [Manner::Link, Manner::Multi] {
        let target = Cgroup::new();
        let mut probe = Probe::start(&target);
        let foreign = Foreign::attach(&target, SO_RCVLOWAT, manner);
        let socket = probe.open(Family::Inet, Kind::Tcp);
        let mut refuses = |when| assert_eq!(probe.set(socket, SO_RCVLOWAT, 1), Err(Errno::EPERM), "{when}, {manner:?}");
        refuses("before");
        let run = Run::start(&policy, &target);
        assert!(attached(&target) > 1);
        refuses("during");
        let later = Foreign::attach(&target, TCP_KEEPCNT, manner);
        probe.set(socket, SO_KEEPALIVE, 0).unwrap();
        assert_eq!(probe.int(socket, SO_KEEPALIVE), 1, "ours works as well");
        let report = run.finish();
        assert_eq!(report.setting("SO_KEEPALIVE").calls.verdicts()["rewritten"], 1);
        assert_eq!(attached(&target), 2, "{manner:?}");
        let refused = [SO_RCVLOWAT, TCP_KEEPCNT].map(|option| probe.set(socket, option, 1));
        assert_eq!(refused, [Err(Errno::EPERM); 2], "after, {manner:?}");
        drop((foreign, later));
        // What another test is just starting may hold a link for a moment, until its exec.
        assert!(wait::until(wait::PATIENCE, || probe.set(socket, SO_RCVLOWAT, 1) == Ok(())), "{manner:?}");
    }
}

#[test]
fn program_that_allows_no_other_is_left_in_peace() {
    let policy = some_policy();
    let target = Cgroup::new();
    let _foreign = Foreign::attach(&target, SO_RCVLOWAT, Manner::Exclusive);
    let path = target.path().display().to_string();
    let output = agent::output(&["run", "--cgroup", &path, policy.path().to_str().unwrap()]);
    let expected = format!("error: cannot attach to cgroup/setsockopt of cgroup {path}: program ");
    let reason = format!(
        " ({NAME}) on {path} is attached without flags, and the kernel permits no other program there or below\n  help: "
    );
    let said = stderr(&output);
    assert!(said.starts_with(&expected) && said.contains(&reason), "{said}");
    assert_eq!(stdout(&output), "");
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(attached(&target), 1);
    let mut probe = Probe::start(&target);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    assert_eq!(probe.set(socket, SO_RCVLOWAT, 1), Err(Errno::EPERM));
}

/// A policy for which programs are attached to every hook.
fn policy_at_all_hooks() -> PolicyFile {
    PolicyFile::new("[[rule]]\nset = { SO_MARK = 32, IP_TOS = 8, TCP_KEEPIDLE = \"60s\" }\n")
}

/// Whether what a hook sees fails with EPERM in the probe.
fn refuses(probe: &mut Probe, at: At) -> bool {
    let [v4, v6] = Family::BOTH.map(Family::loopback);
    let any = |address: std::net::SocketAddr| std::net::SocketAddr::new(address.ip(), 9);
    let mut socket = |family, kind| probe.try_open(family, kind);
    let opened = match at {
        At::SockCreate => return socket(Family::Inet, Kind::Tcp) == Err(Errno::EPERM),
        At::Bind6 | At::Connect6 => socket(Family::Inet6, Kind::Tcp),
        At::Sendmsg4 => socket(Family::Inet, Kind::Udp),
        At::Sendmsg6 => socket(Family::Inet6, Kind::Udp),
        _ => socket(Family::Inet, Kind::Tcp),
    };
    let fd = opened.unwrap();
    let result = match at {
        At::Bind4 => probe.try_bind(fd, v4),
        At::Bind6 => probe.try_bind(fd, v6),
        At::Connect4 => probe.try_connect(fd, any(v4)),
        At::Connect6 => probe.try_connect(fd, any(v6)),
        At::Sendmsg4 => probe.try_send(fd, any(v4)),
        At::Sendmsg6 => probe.try_send(fd, any(v6)),
        At::Setsockopt => probe.set(fd, SO_RCVLOWAT, 1),
        At::Getsockopt => probe.get(fd, SO_RCVLOWAT, 4).map(drop),
        At::SockCreate | At::SockOps => Ok(()),
    };
    probe.close(fd);
    result == Err(Errno::EPERM)
}

#[test]
fn no_program_of_others_goes_out_of_effect_at_any_hook() {
    let policy = policy_at_all_hooks();
    let policy_path = policy.path().to_str().unwrap();
    for at in At::ALL {
        let parent = Cgroup::new();
        let target = parent.child("target");
        let mut probe = Probe::start(&target);
        let path = target.path().display().to_string();
        for manner in [Manner::Override, Manner::Exclusive] {
            let foreign = Foreign::refuse_all(&parent, at, manner);
            let commands: &[&str] = if at == At::Connect4 { &["run", "attach"] } else { &["run"] };
            for command in commands {
                let output = agent::output(&[*command, "--cgroup", &path, policy_path]);
                let said = stderr(&output);
                assert_eq!(output.status.code(), Some(2), "{at:?}, {manner:?}: {said}");
                let named = format!(" ({NAME}) on {} ", parent.path().display());
                assert!(said.contains(&named) && said.contains("\n  help: "), "{at:?}, {manner:?}: {said}");
                assert_eq!(attached(&target), 0, "{at:?}, {manner:?}");
            }
            assert!(foreign.is_effective(&target), "{at:?}, {manner:?}");
            assert_eq!(refuses(&mut probe, at), at != At::SockOps, "{at:?}, {manner:?}");
            let plan = stdout(&agent::output(&["plan", "--cgroup", &path, policy_path]));
            assert!(plan.contains("`run` would fail now:\n  cannot attach to "), "{at:?}, {manner:?}: {plan}");
        }
        let foreign = Foreign::refuse_all(&parent, at, Manner::Multi);
        let run = Run::start(&policy, &target);
        assert!(foreign.is_effective(&target), "{at:?}");
        assert_eq!(refuses(&mut probe, at), at != At::SockOps, "{at:?}");
        drop(run.finish());
    }
}

/// Attaches from the bottom up: so programs come to be where the kernel would not let them be from the top down.
fn attach_at_levels(levels: [(&Cgroup, Option<Manner>); 3]) -> Vec<Foreign> {
    let options = [SO_RCVLOWAT, TCP_KEEPCNT, TCP_KEEPINTVL];
    let held = levels.into_iter().zip(options).rev();
    held.filter_map(|((cgroup, manner), option)| Some(Foreign::attach(cgroup, option, manner?))).collect()
}

#[test]
fn run_refuses_exactly_where_a_link_is_forbidden_or_displaces_a_program() {
    let policy = policy_at_all_hooks();
    let manners = [None, Some(Manner::Exclusive), Some(Manner::Override), Some(Manner::Multi)];
    let top = Cgroup::new();
    let parent = top.child("parent");
    let target = parent.child("target");
    let mut probe = Probe::start(&target);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    let mut refused = || [SO_RCVLOWAT, TCP_KEEPCNT, TCP_KEEPINTVL].map(|option| probe.set(socket, option, 1));
    let path = target.path().display().to_string();
    let of_two = manners.iter().flat_map(|top| manners.map(|parent| (*top, parent, None)));
    let with_own = manners.map(|own| (Some(Manner::Override), Some(Manner::Multi), own));
    for (of_top, of_parent, own) in of_two.chain(with_own) {
        let held = attach_at_levels([(&top, of_top), (&parent, of_parent), (&target, own)]);
        let before = refused();
        let link = Foreign::try_attach(&target, TCP_KEEPIDLE, Manner::Link);
        let is_harmless = link.is_ok() && refused() == before;
        drop(link);
        let count = attached(&target);
        // The kernel may take a moment to drop a link.
        assert!(wait::until(wait::PATIENCE, || refused() == before), "{of_top:?}, {of_parent:?}, {own:?}");
        if is_harmless {
            let run = Run::start(&policy, &target);
            assert_eq!(refused(), before, "{of_top:?}, {of_parent:?}, {own:?}");
            drop(run.finish());
        } else {
            let output = agent::output(&["run", "--cgroup", &path, policy.path().to_str().unwrap()]);
            assert_eq!(output.status.code(), Some(2), "{of_top:?}, {of_parent:?}, {own:?}: {}", stderr(&output));
            assert!(attached(&target) <= count);
        }
        assert_eq!(refused(), before, "{of_top:?}, {of_parent:?}, {own:?}");
        drop(held);
        assert!(wait::until(wait::PATIENCE, || refused() == [Ok(()); 3]));
    }
}

#[test]
fn target_below_an_override_is_skipped_among_others() {
    let top = Cgroup::new();
    let (guarded, free) = (top.child("guarded"), top.child("free"));
    let below = guarded.child("target");
    let other = free.child("target");
    let foreign = Foreign::attach(&guarded, SO_RCVLOWAT, Manner::Override);
    let policy = PolicyFile::new(format!(
        "[target]\ncgroup = \"{}/*/target\"\n[[rule]]\nset = {{ SO_KEEPALIVE = true }}\n",
        top.name()
    ));
    let run = Run::started(&policy, &[]);
    assert!(attached(&other) > 0);
    assert_eq!(attached(&below), 0);
    assert!(foreign.is_effective(&below));
    let said = run.stderr();
    assert_eq!(said.matches("target skipped").count(), 1, "{said}");
    assert!(said.contains(&format!("{} would no longer take effect there", guarded.path().display())), "{said}");
    // It becomes a target when it can be attached to, and something has changed.
    drop(foreign);
    let _new = top.child("new");
    assert!(wait::until(wait::PATIENCE, || attached(&below) > 0), "{}", run.stderr());
    drop(run.finish());
}

#[test]
fn exec_below_an_override_does_not_start_the_command() {
    let parent = Cgroup::new();
    let foreign = Foreign::attach(&parent, SO_RCVLOWAT, Manner::Override);
    let policy = some_policy();
    let mut command = agent::command(&["exec", policy.path().to_str().unwrap(), "--", "echo", "started"]);
    parent.enclose(&mut command);
    let output = command.output().unwrap();
    assert_eq!((output.status.code(), stdout(&output)), (Some(125), String::new()), "{}", stderr(&output));
    assert!(stderr(&output).contains(&format!("({NAME}) on {}", parent.path().display())), "{}", stderr(&output));
    assert!(foreign.is_effective(&parent));
    let doctor = agent::command(&["doctor"]);
    let mut doctor = doctor;
    parent.enclose(&mut doctor);
    let output = doctor.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).contains("with BPF_F_ALLOW_OVERRIDE"), "{}", stdout(&output));
}

#[test]
fn program_that_is_attached_above_later_and_takes_no_effect_is_said_by_status() {
    let parent = Cgroup::new();
    let target = parent.child("target");
    let run = Run::start(&some_policy(), &target);
    let foreign = Foreign::attach(&parent, SO_RCVLOWAT, Manner::Override);
    assert!(!foreign.is_effective(&target));
    let said = stdout(&agent::output(&["status", &format!("run-{}", run.pid())]));
    assert!(said.contains(&format!("on {}: takes no effect on targets below", parent.name())), "{said}");
    drop(run.finish());
    assert!(foreign.is_effective(&target));
}

#[test]
fn programs_below_a_target_do_not_put_ours_out_of_effect() {
    let policy = some_policy();
    for manner in [Manner::Exclusive, Manner::Override] {
        for is_first in [true, false] {
            let target = Cgroup::new();
            let below = target.child("below");
            let attach = || Foreign::attach(&below, SO_RCVLOWAT, manner);
            let mut foreign = is_first.then(attach);
            let run = Run::start(&policy, &target);
            foreign.get_or_insert_with(attach);
            let deeper = below.child("deeper");
            let mut probe = Probe::start(&deeper);
            let socket = probe.open(Family::Inet, Kind::Tcp);
            assert_eq!(probe.set(socket, SO_RCVLOWAT, 1), Err(Errno::EPERM), "{manner:?}, {is_first}");
            probe.set(socket, SO_KEEPALIVE, 0).unwrap();
            assert_eq!(probe.int(socket, SO_KEEPALIVE), 1, "{manner:?}, {is_first}");
            let report = run.finish();
            assert_eq!(report.setting("SO_KEEPALIVE").calls.verdicts()["rewritten"], 1, "{manner:?}, {is_first}");
        }
    }
}

#[test]
fn reload_that_would_put_a_program_of_others_out_of_effect_is_refused() {
    let parent = Cgroup::new();
    let target = parent.child("target");
    let policy = PolicyFile::new("[audit]\nreads = false\n[[rule]]\nset = { TCP_KEEPCNT = 3 }\n");
    let run = Run::start(&policy, &target);
    let foreign = Foreign::refuse_all(&parent, At::Connect4, Manner::Override);
    let mut probe = Probe::start(&target);
    assert!(refuses(&mut probe, At::Connect4));
    // This one would need a program at connect.
    fs::write(policy.path(), "[audit]\nreads = false\n[[rule]]\nset = { TCP_KEEPCNT = 3, SO_MARK = 5 }\n").unwrap();
    assert_eq!(run.notice("reload", 1)["in_force"], false);
    assert!(wait::until(wait::PATIENCE, || run.stderr().contains(&format!("({NAME}) on {}", parent.path().display()))));
    assert!(foreign.is_effective(&target) && refuses(&mut probe, At::Connect4));
    let socket = probe.open(Family::Inet, Kind::Tcp);
    probe.set(socket, TCP_KEEPCNT, 5).unwrap();
    assert_eq!(probe.int(socket, TCP_KEEPCNT), 3, "what was in force still is");
    drop(run.finish());
}
