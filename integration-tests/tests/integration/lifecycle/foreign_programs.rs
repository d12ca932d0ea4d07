//! Other agents, and programs of other owners on the same cgroups.

use std::fs;

use nix::errno::Errno;
use sockpolicy_integration_tests::{
    agent::{self, Exec, Run},
    cgroup::Cgroup,
    foreign_program::{AttachMode, ForeignProgram, Hook, NAME, count_attached},
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
fn two_agents_at_once_do_not_affect_each_other() {
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
    // The end of one agent does not affect the other.
    other.probe.set(sockets[1], TCP_KEEPCNT, 6).unwrap();
    assert_eq!(other.probe.int(sockets[1], TCP_KEEPCNT), 3);
    let report = other.finish();
    assert_eq!(report.setting("TCP_KEEPCNT").calls.verdicts()["rewritten"], 2);
    assert!(report.events.iter().all(|event| event.option == "TCP_KEEPCNT"), "{:#?}", report.events);
}

#[test]
fn exec_within_exec_works_and_both_agents_report() {
    require!("cgroup/bind4");
    let outer = PolicyFile::new(
        "name = \"outer\"\n[[rule]]\nset = { TCP_NODELAY = { value = true, on_conflict = \"allow\" } }\n",
    );
    let inner = PolicyFile::new(
        "name = \"inner\"\n[[rule]]\nset = { SO_KEEPALIVE = { value = true, on_conflict = \"allow\" } }\n",
    );
    let agent = agent::program().display().to_string();
    let (inner_path, workload) = (inner.path().display().to_string(), process::workload());
    let reports = ["outer", "inner"].map(|name| outer.dir().join(name).display().to_string());
    let within =
        [&agent, "exec", "-o", "json", "--report", &reports[1], &inner_path, "--", &workload, "storm", "2", "3"];
    let output = Running::exec(&["-o", "json", "--report", &reports[0]], &outer, &within).finish();
    assert!(output.status.success(), "{}", stderr(&output));
    for (report, option) in reports.iter().zip(["TCP_NODELAY", "SO_KEEPALIVE"]) {
        let report = process::read_report(report);
        assert_eq!(report.setting(option).calls.verdicts()["allowed"], 6, "{option}");
    }
    // Both agents pass on the status.
    let within = [&agent, "exec", "--quiet", &inner_path, "--", "sh", "-c", "exit 7"];
    let output = Running::exec(&["--quiet"], &outer, &within).finish();
    assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
}

#[test]
fn foreign_programs_stay_attached_and_effective() {
    let policy = some_policy();
    for mode in [AttachMode::Link, AttachMode::Multi] {
        let target = Cgroup::new();
        let mut probe = Probe::start(&target);
        let foreign = ForeignProgram::attach(&target, SO_RCVLOWAT, mode);
        let socket = probe.open(Family::Inet, Kind::Tcp);
        let mut refuses = |when| assert_eq!(probe.set(socket, SO_RCVLOWAT, 1), Err(Errno::EPERM), "{when}, {mode:?}");
        refuses("before");
        let run = Run::start(&policy, &target);
        assert!(count_attached(&target) > 1);
        refuses("during");
        let later = ForeignProgram::attach(&target, TCP_KEEPCNT, mode);
        probe.set(socket, SO_KEEPALIVE, 0).unwrap();
        assert_eq!(probe.int(socket, SO_KEEPALIVE), 1, "sockpolicy's program is effective as well");
        let report = run.finish();
        assert_eq!(report.setting("SO_KEEPALIVE").calls.verdicts()["rewritten"], 1);
        assert_eq!(count_attached(&target), 2, "{mode:?}");
        let refused = [SO_RCVLOWAT, TCP_KEEPCNT].map(|option| probe.set(socket, option, 1));
        assert_eq!(refused, [Err(Errno::EPERM); 2], "after, {mode:?}");
        drop((foreign, later));
        // Until it calls execve, a child that another test has just forked may hold the link.
        assert!(wait::until(wait::TIMEOUT, || probe.set(socket, SO_RCVLOWAT, 1) == Ok(())), "{mode:?}");
    }
}

#[test]
fn exclusive_program_stays_and_run_is_refused() {
    let policy = some_policy();
    let target = Cgroup::new();
    let _foreign = ForeignProgram::attach(&target, SO_RCVLOWAT, AttachMode::Exclusive);
    let path = target.path().display().to_string();
    let output = agent::output(&["run", "--cgroup", &path, policy.path().to_str().unwrap()]);
    let expected = format!("error: cannot attach to cgroup/setsockopt of cgroup {path}: program ");
    let reason = format!(
        " ({NAME}) on {path} is attached without flags, and the kernel permits no other program there or below\n  help: "
    );
    let printed = stderr(&output);
    assert!(printed.starts_with(&expected) && printed.contains(&reason), "{printed}");
    assert_eq!(stdout(&output), "");
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(count_attached(&target), 1);
    let mut probe = Probe::start(&target);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    assert_eq!(probe.set(socket, SO_RCVLOWAT, 1), Err(Errno::EPERM));
}

/// Returns a policy for which programs are attached to every hook.
fn policy_at_all_hooks() -> PolicyFile {
    PolicyFile::new("[[rule]]\nset = { SO_MARK = 32, IP_TOS = 8, TCP_KEEPIDLE = \"60s\" }\n")
}

/// Returns whether a call that reaches a hook fails with EPERM in the probe.
fn refuses(probe: &mut Probe, at: Hook) -> bool {
    let [v4, v6] = Family::BOTH.map(Family::loopback);
    let any = |address: std::net::SocketAddr| std::net::SocketAddr::new(address.ip(), 9);
    let mut socket = |family, kind| probe.try_open(family, kind);
    let opened = match at {
        Hook::SockCreate => return socket(Family::Inet, Kind::Tcp) == Err(Errno::EPERM),
        Hook::Bind6 | Hook::Connect6 => socket(Family::Inet6, Kind::Tcp),
        Hook::Sendmsg4 => socket(Family::Inet, Kind::Udp),
        Hook::Sendmsg6 => socket(Family::Inet6, Kind::Udp),
        _ => socket(Family::Inet, Kind::Tcp),
    };
    let fd = opened.unwrap();
    let result = match at {
        Hook::Bind4 => probe.try_bind(fd, v4),
        Hook::Bind6 => probe.try_bind(fd, v6),
        Hook::Connect4 => probe.try_connect(fd, any(v4)),
        Hook::Connect6 => probe.try_connect(fd, any(v6)),
        Hook::Sendmsg4 => probe.try_send(fd, any(v4)),
        Hook::Sendmsg6 => probe.try_send(fd, any(v6)),
        Hook::Setsockopt => probe.set(fd, SO_RCVLOWAT, 1),
        Hook::Getsockopt => probe.get(fd, SO_RCVLOWAT, 4).map(drop),
        Hook::SockCreate | Hook::SockOps => Ok(()),
    };
    probe.close(fd);
    result == Err(Errno::EPERM)
}

#[test]
fn foreign_program_stays_effective_at_every_hook() {
    let policy = policy_at_all_hooks();
    let policy_path = policy.path().to_str().unwrap();
    for at in Hook::ALL {
        let parent = Cgroup::new();
        let target = parent.child("target");
        let mut probe = Probe::start(&target);
        let path = target.path().display().to_string();
        for mode in [AttachMode::Override, AttachMode::Exclusive] {
            let foreign = ForeignProgram::refuse_all(&parent, at, mode);
            let commands: &[&str] = if at == Hook::Connect4 { &["run", "attach"] } else { &["run"] };
            for command in commands {
                let output = agent::output(&[*command, "--cgroup", &path, policy_path]);
                let printed = stderr(&output);
                assert_eq!(output.status.code(), Some(2), "{at:?}, {mode:?}: {printed}");
                let named = format!(" ({NAME}) on {} ", parent.path().display());
                assert!(printed.contains(&named) && printed.contains("\n  help: "), "{at:?}, {mode:?}: {printed}");
                assert_eq!(count_attached(&target), 0, "{at:?}, {mode:?}");
            }
            assert!(foreign.is_effective(&target), "{at:?}, {mode:?}");
            assert_eq!(refuses(&mut probe, at), at != Hook::SockOps, "{at:?}, {mode:?}");
            let plan = stdout(&agent::output(&["plan", "--cgroup", &path, policy_path]));
            assert!(plan.contains("`run` would fail now:\n  cannot attach to "), "{at:?}, {mode:?}: {plan}");
        }
        let foreign = ForeignProgram::refuse_all(&parent, at, AttachMode::Multi);
        let run = Run::start(&policy, &target);
        assert!(foreign.is_effective(&target), "{at:?}");
        assert_eq!(refuses(&mut probe, at), at != Hook::SockOps, "{at:?}");
        drop(run.finish());
    }
}

/// Attaches programs from the bottom up. From the top down, the kernel would reject some of these combinations.
fn attach_at_levels(levels: [(&Cgroup, Option<AttachMode>); 3]) -> Vec<ForeignProgram> {
    let options = [SO_RCVLOWAT, TCP_KEEPCNT, TCP_KEEPINTVL];
    let held = levels.into_iter().zip(options).rev();
    held.filter_map(|((cgroup, mode), option)| Some(ForeignProgram::attach(cgroup, option, mode?))).collect()
}

#[test]
fn run_fails_exactly_if_a_link_is_forbidden_or_displaces_a_program() {
    let policy = policy_at_all_hooks();
    let modes = [None, Some(AttachMode::Exclusive), Some(AttachMode::Override), Some(AttachMode::Multi)];
    let top = Cgroup::new();
    let parent = top.child("parent");
    let target = parent.child("target");
    let mut probe = Probe::start(&target);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    let mut refused = || [SO_RCVLOWAT, TCP_KEEPCNT, TCP_KEEPINTVL].map(|option| probe.set(socket, option, 1));
    let path = target.path().display().to_string();
    let of_two = modes.iter().flat_map(|top| modes.map(|parent| (*top, parent, None)));
    let with_own = modes.map(|own| (Some(AttachMode::Override), Some(AttachMode::Multi), own));
    for (of_top, of_parent, own) in of_two.chain(with_own) {
        let held = attach_at_levels([(&top, of_top), (&parent, of_parent), (&target, own)]);
        let before = refused();
        let link = ForeignProgram::try_attach(&target, TCP_KEEPIDLE, AttachMode::Link);
        let is_harmless = link.is_ok() && refused() == before;
        drop(link);
        let count = count_attached(&target);
        // The kernel can take a moment to detach a link.
        assert!(wait::until(wait::TIMEOUT, || refused() == before), "{of_top:?}, {of_parent:?}, {own:?}");
        if is_harmless {
            let run = Run::start(&policy, &target);
            assert_eq!(refused(), before, "{of_top:?}, {of_parent:?}, {own:?}");
            drop(run.finish());
        } else {
            let output = agent::output(&["run", "--cgroup", &path, policy.path().to_str().unwrap()]);
            assert_eq!(output.status.code(), Some(2), "{of_top:?}, {of_parent:?}, {own:?}: {}", stderr(&output));
            assert!(count_attached(&target) <= count);
        }
        assert_eq!(refused(), before, "{of_top:?}, {of_parent:?}, {own:?}");
        drop(held);
        assert!(wait::until(wait::TIMEOUT, || refused() == [Ok(()); 3]));
    }
}

#[test]
fn target_below_an_overridable_program_is_skipped() {
    let top = Cgroup::new();
    let (guarded, free) = (top.child("guarded"), top.child("free"));
    let below = guarded.child("target");
    let other = free.child("target");
    let foreign = ForeignProgram::attach(&guarded, SO_RCVLOWAT, AttachMode::Override);
    let policy = PolicyFile::new(format!(
        "[target]\ncgroup = \"{}/*/target\"\n[[rule]]\nset = {{ SO_KEEPALIVE = true }}\n",
        top.name()
    ));
    let run = Run::start_with(&policy, &[]);
    assert!(count_attached(&other) > 0);
    assert_eq!(count_attached(&below), 0);
    assert!(foreign.is_effective(&below));
    let printed = run.stderr();
    assert_eq!(printed.matches("target skipped").count(), 1, "{printed}");
    assert!(printed.contains(&format!("{} would no longer take effect there", guarded.path().display())), "{printed}");
    // It becomes a target once programs can be attached and a cgroup has changed.
    drop(foreign);
    let _new = top.child("new");
    assert!(wait::until(wait::TIMEOUT, || count_attached(&below) > 0), "{}", run.stderr());
    drop(run.finish());
}

#[test]
fn exec_below_an_overridable_program_does_not_start_the_command() {
    let parent = Cgroup::new();
    let foreign = ForeignProgram::attach(&parent, SO_RCVLOWAT, AttachMode::Override);
    let policy = some_policy();
    let mut command = agent::command(&["exec", policy.path().to_str().unwrap(), "--", "echo", "started"]);
    parent.run_inside(&mut command);
    let output = command.output().unwrap();
    assert_eq!((output.status.code(), stdout(&output)), (Some(125), String::new()), "{}", stderr(&output));
    assert!(stderr(&output).contains(&format!("({NAME}) on {}", parent.path().display())), "{}", stderr(&output));
    assert!(foreign.is_effective(&parent));
    let doctor = agent::command(&["doctor"]);
    let mut doctor = doctor;
    parent.run_inside(&mut doctor);
    let output = doctor.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).contains("with BPF_F_ALLOW_OVERRIDE"), "{}", stdout(&output));
}

#[test]
fn status_shows_an_ineffective_program_attached_above_later() {
    let parent = Cgroup::new();
    let target = parent.child("target");
    let run = Run::start(&some_policy(), &target);
    let foreign = ForeignProgram::attach(&parent, SO_RCVLOWAT, AttachMode::Override);
    assert!(!foreign.is_effective(&target));
    let printed = stdout(&agent::output(&["status", "--instance", &format!("run-{}", run.pid())]));
    assert!(printed.contains(&format!("on {}: takes no effect on targets below", parent.name())), "{printed}");
    drop(run.finish());
    assert!(foreign.is_effective(&target));
}

#[test]
fn programs_below_a_target_do_not_displace_sockpolicys() {
    let policy = some_policy();
    for mode in [AttachMode::Exclusive, AttachMode::Override] {
        for is_first in [true, false] {
            let target = Cgroup::new();
            let below = target.child("below");
            let attach = || ForeignProgram::attach(&below, SO_RCVLOWAT, mode);
            let mut foreign = is_first.then(attach);
            let run = Run::start(&policy, &target);
            foreign.get_or_insert_with(attach);
            let deeper = below.child("deeper");
            let mut probe = Probe::start(&deeper);
            let socket = probe.open(Family::Inet, Kind::Tcp);
            assert_eq!(probe.set(socket, SO_RCVLOWAT, 1), Err(Errno::EPERM), "{mode:?}, {is_first}");
            probe.set(socket, SO_KEEPALIVE, 0).unwrap();
            assert_eq!(probe.int(socket, SO_KEEPALIVE), 1, "{mode:?}, {is_first}");
            let report = run.finish();
            assert_eq!(report.setting("SO_KEEPALIVE").calls.verdicts()["rewritten"], 1, "{mode:?}, {is_first}");
        }
    }
}

#[test]
fn reload_that_would_displace_a_foreign_program_is_refused() {
    let parent = Cgroup::new();
    let target = parent.child("target");
    let policy = PolicyFile::new("[audit]\nreads = false\n[[rule]]\nset = { TCP_KEEPCNT = 3 }\n");
    let run = Run::start(&policy, &target);
    let foreign = ForeignProgram::refuse_all(&parent, Hook::Connect4, AttachMode::Override);
    let mut probe = Probe::start(&target);
    assert!(refuses(&mut probe, Hook::Connect4));
    // This policy would need a program at connect.
    fs::write(policy.path(), "[audit]\nreads = false\n[[rule]]\nset = { TCP_KEEPCNT = 3, SO_MARK = 5 }\n").unwrap();
    assert_eq!(run.notice("reload", 1)["in_force"], false);
    assert!(wait::until(wait::TIMEOUT, || run.stderr().contains(&format!("({NAME}) on {}", parent.path().display()))));
    assert!(foreign.is_effective(&target) && refuses(&mut probe, Hook::Connect4));
    let socket = probe.open(Family::Inet, Kind::Tcp);
    probe.set(socket, TCP_KEEPCNT, 5).unwrap();
    assert_eq!(probe.int(socket, TCP_KEEPCNT), 3, "the previous policy is still in force");
    drop(run.finish());
}
