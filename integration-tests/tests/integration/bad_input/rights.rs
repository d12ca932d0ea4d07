//! Without the rights that it takes.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output},
};

use sockpolicy_integration_tests::{
    agent,
    cgroup::Cgroup,
    foreign::attached,
    kernels::Kernel,
    process::{self, exec},
};

use super::{MARK, fails, policy, run_on};
use crate::{stderr, stdout};

/// Runs a command with fewer capabilities, as setpriv writes them: `-bpf`, or `-all,+bpf`.
pub(crate) fn with_capabilities(change: &str, command: &Command) -> Command {
    let mut setpriv = Command::new("setpriv");
    setpriv.args(["--bounding-set", change, "--inh-caps=-all", "--"]);
    setpriv.arg(command.get_program()).args(command.get_args()).stdin(std::process::Stdio::null());
    setpriv
}

#[test]
fn capabilities_that_are_missing_are_named() {
    let policy = policy();
    let target = Cgroup::new();
    let path = target.path().display().to_string();
    for (change, missing) in [
        ("-net_admin", "CAP_NET_ADMIN"),
        ("-bpf,-sys_admin", "CAP_BPF"),
        ("-perfmon,-sys_admin", "CAP_PERFMON"),
        ("-bpf,-perfmon,-sys_admin", "CAP_PERFMON, CAP_BPF"),
        ("-all", "CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF"),
    ] {
        let error = format!(
            "error: not permitted to load BPF programs: this process lacks {missing}\n  help: run it as root, or give \
             it these capabilities\n"
        );
        fails(with_capabilities(change, &exec(&[], &policy, &["echo", MARK])), 125, &error);
        fails(with_capabilities(change, &run_on(&path, &policy)), 2, &error);
        fails(with_capabilities(change, &agent::command(&["doctor"])), 2, &error);
    }
    assert_eq!(attached(&target), 0);
}

/// That the memory for the programs was not to be had, and what to do about it.
fn assert_out_of_memory(output: &Output) {
    let said = stderr(output);
    assert!(said.contains("error: cannot prepare the BPF programs: map error: failed to create map"), "{said}");
    assert!(said.contains("help: kernels before 5.11 count this as locked memory"), "{said}");
    assert_eq!((stdout(output).as_str(), output.status.code()), ("", Some(125)));
}

#[test]
fn capabilities_that_others_stand_in_for_may_be_missing() {
    let policy = policy();
    for change in ["-bpf,-perfmon", "-sys_resource,-sys_ptrace,-dac_override"] {
        let output = process::output(with_capabilities(change, &exec(&["--quiet"], &policy, &["echo", MARK])));
        if change.contains("sys_resource") && !Kernel::current().has("memcg") {
            assert_out_of_memory(&output);
            continue;
        }
        assert_eq!((stdout(&output), output.status.code()), (format!("{MARK}\n"), Some(0)), "{}", stderr(&output));
    }
}

#[test]
fn three_capabilities_are_enough_where_calls_can_be_seen() {
    let policy = policy();
    let three = "-all,+bpf,+net_admin,+perfmon";
    let output = process::output(with_capabilities(three, &exec(&["--quiet"], &policy, &["echo", MARK])));
    if !Kernel::current().has("memcg") {
        return assert_out_of_memory(&output);
    }
    let paranoid: i32 = fs::read_to_string("/proc/sys/kernel/perf_event_paranoid").unwrap().trim().parse().unwrap();
    let help = if Kernel::current().has("fentry") {
        // That asks for no more.
        None
    } else if paranoid > 2 {
        Some("unless sysctl kernel.perf_event_paranoid is 2 or less")
    } else if !Path::new("/sys/kernel/tracing/events").exists() {
        // tracefs would have to be mounted, which takes a fourth.
        Some("mount -t tracefs tracefs /sys/kernel/tracing")
    } else {
        None
    };
    let said = stderr(&output);
    if let Some(help) = help {
        assert!(said.starts_with("error: the audit found no way to see calls: "), "{said}");
        assert!(said.contains(help), "{said}");
        assert_eq!((stdout(&output).as_str(), output.status.code()), ("", Some(125)));
    } else {
        assert_eq!((stdout(&output), output.status.code()), (format!("{MARK}\n"), Some(0)), "{said}");
    }
    let arguments = ["--quiet", "--audit-backend", "none"];
    let output = process::output(with_capabilities(three, &exec(&arguments, &policy, &["echo", MARK])));
    assert_eq!((stdout(&output), output.status.code()), (format!("{MARK}\n"), Some(0)), "{}", stderr(&output));
}

#[test]
fn nobody_may_check_and_nothing_else() {
    let policy = policy();
    // Where everybody can reach it.
    let copy = policy.folder().join("sockpolicy");
    fs::copy(agent::program(), &copy).unwrap();
    let path = policy.path().to_str().unwrap();
    let as_nobody = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]);
        command.arg(&copy).args(arguments);
        command
    };
    let error = "error: not permitted to load BPF programs: this process lacks CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF\n  \
                 help: run it as root, or give it these capabilities\n";
    fails(as_nobody(&["exec", path, "--", "echo", MARK]), 125, error);
    fails(as_nobody(&["doctor"]), 2, error);
    assert!(process::output(as_nobody(&["check", path])).status.success());

    fs::set_permissions(policy.path(), fs::Permissions::from_mode(0o600)).unwrap();
    let output = process::output(as_nobody(&["exec", path, "--", "echo", MARK]));
    let said = stderr(&output);
    assert!(said.starts_with(&format!("error: cannot read {path}: permission denied\n")), "{said}");
    assert!(said.contains("= help: "), "{said}");
    assert_eq!((stdout(&output).as_str(), output.status.code()), ("", Some(125)));
}
