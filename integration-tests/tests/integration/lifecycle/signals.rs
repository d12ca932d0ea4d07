//! Signals: which ones reach the command, and how often.

use std::{os::unix::process::CommandExt, process::Command};

use nix::sys::signal::{SigSet, Signal};
use sockpolicy_integration_tests::{
    agent,
    bpf_objects::BpfObjects,
    cgroup::Cgroup,
    foreign_program::count_attached,
    policy::PolicyFile,
    process::{Running, exec, workload},
    terminal::Terminal,
    wait,
};

use super::some_policy;
use crate::{stderr, stdout};

#[test]
fn signals_from_processes_are_forwarded() {
    let policy = some_policy();
    let mut running = Running::exec(&["--quiet"], &policy, &[&workload(), "signals", "SIGUSR2"]);
    running.lines(1);
    let signals = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];
    for (signal, count) in signals.into_iter().zip(2..) {
        running.signal(signal);
        assert_eq!(running.lines(count).pop(), Some(format!("{signal} from process")));
    }
    let output = running.finish();
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn command_killed_by_a_forwarded_signal_has_that_status() {
    let policy = some_policy();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut running = Running::exec(&["--quiet"], &policy, &["sh", "-c", "echo ready; exec sleep 300"]);
        running.lines(1);
        running.signal(signal);
        assert_eq!(running.finish().status.code(), Some(128 + signal as i32));
    }
}

#[test]
fn interrupt_key_reaches_the_command_once() {
    let policy = some_policy();
    let report = policy.dir().join("report").display().to_string();
    let command = exec(&["--report", &report], &policy, &[&workload(), "signals", "SIGUSR2"]);
    let mut terminal = Terminal::start(command);
    terminal.wait_for("ready");
    terminal.press(b"\x03");
    terminal.wait_for("SIGINT");
    // A second SIGINT would come before these signals.
    for signal in [Signal::SIGUSR1, Signal::SIGUSR2] {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(terminal.pid() as i32), signal).unwrap();
        terminal.wait_for(signal.as_str());
    }
    assert!(terminal.wait().success());
    let expected = ["^CSIGINT from kernel", "SIGUSR1 from process", "SIGUSR2 from process"];
    let is_all = || expected.iter().all(|line| terminal.screen().contains(line));
    assert!(wait::until(wait::TIMEOUT, is_all), "{}", terminal.screen());
    assert_eq!(terminal.screen().matches("SIGINT").count(), 1, "{}", terminal.screen());
}

/// The signal mask and dispositions with which a process starts.
#[derive(Clone, Copy, Debug)]
struct SignalState {
    blocked: &'static [Signal],
    ignored: &'static [Signal],
}

/// Returns the signals that a command finds blocked and ignored.
#[track_caller]
fn found(mut command: Command, state: SignalState) -> Vec<String> {
    // SAFETY: only makes system calls.
    unsafe {
        command.pre_exec(move || {
            state.blocked.iter().copied().collect::<SigSet>().thread_set_mask()?;
            for signal in state.ignored {
                nix::sys::signal::signal(*signal, nix::sys::signal::SigHandler::SigIgn)?;
            }
            Ok(())
        });
    }
    let output = Running::start(command).finish();
    assert!(output.status.success(), "{state:?}: {}", stderr(&output));
    stdout(&output)
        .lines()
        .filter(|line| ["SigBlk", "SigIgn", "SigCgt"].iter().any(|key| line.starts_with(key)))
        .map(str::to_owned)
        .collect()
}

#[test]
fn command_has_the_signal_mask_and_dispositions_of_sockpolicy() {
    let policy = some_policy();
    let cat = ["cat", "/proc/self/status"];
    for state in [
        SignalState { blocked: &[], ignored: &[] },
        SignalState { blocked: &[], ignored: &[Signal::SIGPIPE, Signal::SIGHUP, Signal::SIGINT, Signal::SIGCHLD] },
        SignalState { blocked: &[Signal::SIGUSR1, Signal::SIGTERM, Signal::SIGCHLD, Signal::SIGPIPE], ignored: &[] },
    ] {
        let mut plain = Command::new(cat[0]);
        plain.args(&cat[1..]);
        let under_us = found(exec(&["--quiet"], &policy, &cat), state);
        assert_eq!(found(plain, state), under_us, "without sockpolicy on the left, {state:?}");
    }
}

/// Starts `run` in a new cgroup, and waits until its policy is in force.
fn run(policy: &PolicyFile, ignored: &'static [Signal]) -> Running {
    let home = Cgroup::new();
    let path = home.path().display().to_string();
    let mut command = agent::command(&["run", "--cgroup", &path]);
    command.arg(policy.path());
    // SAFETY: only makes system calls.
    unsafe {
        command.pre_exec(move || {
            for signal in ignored {
                nix::sys::signal::signal(*signal, nix::sys::signal::SigHandler::SigIgn)?;
            }
            Ok(())
        });
    }
    let mut running = Running::start_in(command, home);
    running.lines(1);
    running
}

#[test]
fn run_ends_with_a_summary_on_termination_signals() {
    let policy = some_policy();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT] {
        let running = run(&policy, &[]);
        let held = running.bpf_objects();
        running.signal(signal);
        let output = running.finish();
        assert_eq!(output.status.code(), Some(0), "{signal}: {}", stderr(&output));
        assert!(stdout(&output).contains("no call conflicted"), "{}", stdout(&output));
        held.assert_gone();
    }
}

#[test]
fn run_ends_on_a_signal_of_a_process_although_it_was_ignored() {
    // As in the background commands of a shell without job control.
    let policy = some_policy();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT] {
        let running = run(&policy, &[Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT]);
        running.signal(signal);
        assert_eq!(running.finish().status.code(), Some(0), "{signal}");
    }
}

#[test]
fn run_in_the_background_survives_the_interrupt_key() {
    let policy = some_policy();
    let target = Cgroup::new();
    // The shell ignores SIGINT in the background command, and ends when the terminal sends it.
    let script = "\"$@\" & trap 'echo interrupted; wait' INT; wait";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(agent::program());
    command.arg("run").arg(policy.path()).args(["--cgroup", &target.path().display().to_string()]);
    let mut terminal = Terminal::start(command);
    terminal.wait_for("enforcing");
    terminal.press(b"\x03");
    terminal.wait_for("interrupted");
    assert!(count_attached(&target) > 0, "{}", terminal.screen());
    terminal.hang_up();
    assert!(wait::until(wait::TIMEOUT, || count_attached(&target) == 0), "{}", terminal.screen());
}

#[test]
fn run_ends_with_its_terminal() {
    let policy = some_policy();
    let target = Cgroup::new();
    let path = target.path().display().to_string();
    let mut terminal = Terminal::start(agent::command(&["run", "--cgroup", &path, policy.path().to_str().unwrap()]));
    terminal.wait_for("enforcing");
    let held = BpfObjects::of(terminal.pid());
    terminal.hang_up();
    terminal.wait();
    held.assert_gone();
}

#[test]
fn run_under_nohup_survives_its_terminal() {
    let policy = some_policy();
    let mut running = run(&policy, &[Signal::SIGHUP]);
    // A process that ends on the first signal does not receive the second one.
    for signal in [Signal::SIGHUP, Signal::SIGUSR1] {
        running.signal(signal);
        let status = || std::fs::read_to_string(format!("/proc/{}/status", running.pid())).unwrap();
        let is_taken = || status().lines().any(|line| line == "ShdPnd:\t0000000000000000");
        assert!(wait::until(wait::TIMEOUT, is_taken), "{signal}: {}", status());
    }
    assert!(!running.has_ended(), "{}", running.stdout());
    running.signal(Signal::SIGTERM);
    assert_eq!(running.finish().status.code(), Some(0));
}
