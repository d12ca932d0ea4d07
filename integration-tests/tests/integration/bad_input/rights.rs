//! Commands without the required capabilities.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output},
};

use nix::sys::signal::Signal;
use sockpolicy_integration_tests::{
    agent,
    bpffs::Instance,
    cgroup::Cgroup,
    foreign_program::count_attached,
    kernels::Kernel,
    options::SO_MARK,
    policy::{PolicyFile, sets_mark},
    probe::Probe,
    process::{self, Running, exec, in_mount_namespace},
    script::{Family, Kind},
    wait,
};

use super::{MARK, fails, policy, run_on};
use crate::{stderr, stdout};

/// Runs a command with fewer capabilities, in the format of setpriv: `-bpf`, or `-all,+bpf`.
pub(crate) fn with_capabilities(change: &str, command: &Command) -> Command {
    let mut setpriv = Command::new("setpriv");
    setpriv.args(["--bounding-set", change, "--inh-caps=-all", "--"]);
    setpriv.arg(command.get_program()).args(command.get_args()).stdin(std::process::Stdio::null());
    setpriv
}

#[test]
fn missing_capabilities_are_named() {
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
            "error: cannot load BPF programs: this process lacks {missing}\n  help: run sockpolicy as root, or give it \
             these capabilities\n"
        );
        fails(with_capabilities(change, &exec(&[], &policy, &["echo", MARK])), 125, &error);
        fails(with_capabilities(change, &run_on(&path, &policy)), 2, &error);
        fails(with_capabilities(change, &agent::command(&["doctor"])), 2, &error);
    }
    assert_eq!(count_attached(&target), 0);
}

/// Asserts the error for memory that programs could not get, with its help.
fn assert_out_of_memory(output: &Output) {
    let printed = stderr(output);
    assert!(printed.contains("error: cannot prepare the BPF programs: map error: failed to create map"), "{printed}");
    assert!(printed.contains("Kernels before 5.11 count locked memory"), "{printed}");
    assert_eq!((stdout(output).as_str(), output.status.code()), ("", Some(125)));
}

#[test]
fn capabilities_that_others_imply_may_be_missing() {
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
fn three_capabilities_are_enough_if_the_audit_can_see_calls() {
    let policy = policy();
    let three = "-all,+bpf,+net_admin,+perfmon";
    let output = process::output(with_capabilities(three, &exec(&["--quiet"], &policy, &["echo", MARK])));
    if !Kernel::current().has("memcg") {
        return assert_out_of_memory(&output);
    }
    let paranoid: i32 = fs::read_to_string("/proc/sys/kernel/perf_event_paranoid").unwrap().trim().parse().unwrap();
    let help = if Kernel::current().has("fentry") {
        // fentry needs no other capability.
        None
    } else if paranoid > 2 {
        Some("unless sysctl kernel.perf_event_paranoid is 2 or less")
    } else if !Path::new("/sys/kernel/tracing/events").exists() {
        // tracefs would have to be mounted, which needs CAP_SYS_ADMIN.
        Some("mount -t tracefs tracefs /sys/kernel/tracing")
    } else {
        None
    };
    let printed = stderr(&output);
    if let Some(help) = help {
        assert!(printed.starts_with("error: cannot attach the audit: "), "{printed}");
        assert!(printed.contains(help), "{printed}");
        assert_eq!((stdout(&output).as_str(), output.status.code()), ("", Some(125)));
    } else {
        assert_eq!((stdout(&output), output.status.code()), (format!("{MARK}\n"), Some(0)), "{printed}");
    }
    let arguments = ["--quiet", "--audit-backend", "none"];
    let output = process::output(with_capabilities(three, &exec(&arguments, &policy, &["echo", MARK])));
    assert_eq!((stdout(&output), output.status.code()), (format!("{MARK}\n"), Some(0)), "{}", stderr(&output));
}

/// The capabilities that the README lists for `run`, `attach`, `exec` and `audit`, as root without any other.
const DOCUMENTED: &str = "-all,+bpf,+net_admin,+perfmon,+dac_override";
/// Mounts tracefs if the kernel has it and it is not mounted, since mounting needs another capability.
const WITH_TRACEFS: &str = "{ test -d /sys/kernel/tracing/events || mount -t tracefs none /sys/kernel/tracing; }";

#[test]
fn documented_capabilities_are_enough_for_each_command() {
    if !Kernel::current().has("memcg") {
        // Kernels before 5.11 also need CAP_SYS_RESOURCE, as the README says.
        return documented_capabilities_with(&format!("{DOCUMENTED},+sys_resource"));
    }
    documented_capabilities_with(DOCUMENTED);
}

fn documented_capabilities_with(rights: &str) {
    let (target, instance) = (Cgroup::new(), Instance::new());
    let policy = PolicyFile::new(sets_mark(&target, 1));
    let path = policy.path().to_str().unwrap();
    let as_documented = |more: &str, arguments: &[&str]| {
        process::output(in_mount_namespace(
            WITH_TRACEFS,
            &with_capabilities(&format!("{rights}{more}"), &agent::command(arguments)),
        ))
    };
    let succeeds = |output: &Output| {
        assert!(output.status.success(), "{}{}", stdout(output), stderr(output));
    };
    let exec = as_documented("", &["exec", "--quiet", agent::ALLOW_UNSUPPORTED, path, "--", "echo", MARK]);
    assert_eq!((stdout(&exec), exec.status.code()), (format!("{MARK}\n"), Some(0)), "{}", stderr(&exec));
    succeeds(&as_documented("", &["audit", "--quiet", "--", "true"]));
    let attach = as_documented("", &["attach", agent::ALLOW_UNSUPPORTED, "--instance", &instance.name, path]);
    succeeds(&attach);
    assert_eq!(Probe::start(&target).value_on_new_socket(SO_MARK), 1);
    let status = as_documented("", &["status", "--instance", &instance.name]);
    let printed = stdout(&status);
    assert!(
        printed.contains(
            "policies unknown: cannot open BPF map sp_config of the policies in force: operation not permitted"
        ),
        "{printed}"
    );
    assert!(printed.contains("  help: run sockpolicy as root, or give it CAP_SYS_ADMIN\n"), "{printed}");
    assert_eq!(status.status.code(), Some(2), "{printed}");
    let status = as_documented(",+sys_admin", &["status", "--instance", &instance.name]);
    succeeds(&status);
    assert!(stdout(&status).contains("(enforced)"), "{}", stdout(&status));
    succeeds(&as_documented("", &["detach", "--instance", &instance.name]));
    assert_eq!(count_attached(&target), 0);
    let mut probe = Probe::start(&target);
    probe.drop_privileges();
    let socket = probe.open(Family::Inet, Kind::Udp);
    for (command, shown) in [("verify", "drift of "), ("apply", " on 1 of "), ("verify", "no drift")] {
        let output = as_documented(",+sys_ptrace,+sys_admin", &[command, path]);
        assert!(stdout(&output).contains(shown), "{command}: {}{}", stdout(&output), stderr(&output));
    }
    assert_eq!(probe.int(socket, SO_MARK), 1);
    let mut run = with_capabilities(rights, &agent::command(&["run", agent::ALLOW_UNSUPPORTED, path]));
    run.env("SOCKPOLICY_LOG", "info");
    let run = Running::start(in_mount_namespace(&format!("export SOCKPOLICY_LOG=info; {WITH_TRACEFS}"), &run));
    let is_in_force = wait::until(wait::TIMEOUT, || run.stderr().contains("in force on"));
    assert!(is_in_force && !run.stderr().contains("warning"), "{}", run.stderr());
    assert_eq!(Probe::start(&target).value_on_new_socket(SO_MARK), 1);
    run.signal(Signal::SIGTERM);
    assert!(run.finish().status.success());
}

#[test]
fn other_user_with_capabilities_gets_an_error_for_unreadable_files() {
    let policy = policy();
    let copy = policy.dir().join("sockpolicy");
    process::copy_program(agent::program(), &copy);
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    let as_nobody = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
        command.args([
            "--inh-caps=-all,+bpf,+net_admin,+perfmon",
            "--ambient-caps=-all,+bpf,+net_admin,+perfmon",
            "--",
        ]);
        command.arg(&copy).args(arguments);
        process::output(in_mount_namespace(&format!("mkdir -pm 700 /run/sockpolicy; {WITH_TRACEFS}"), &command))
    };
    let output = as_nobody(&["status"]);
    let printed = stderr(&output);
    assert!(
        printed.starts_with(
            "error: cannot read what is in force on this host: cannot use /run/sockpolicy: Permission denied"
        ),
        "{printed}"
    );
    assert_eq!((stdout(&output).as_str(), output.status.code()), ("", Some(2)), "{printed}");
    assert!(printed.contains("\n  help: run it as root"), "{printed}");
    if !Kernel::current().has("fentry") && !Kernel::current().has("kprobe") && Kernel::current().has("memcg") {
        let output = as_nobody(&["run", "--cgroup", &Cgroup::new().name(), policy.path().to_str().unwrap()]);
        let printed = stderr(&output);
        assert!(printed.contains("tracefs cannot be read without root or CAP_DAC_READ_SEARCH"), "{printed}");
        assert_eq!(output.status.code(), Some(2), "{printed}");
    }
}

#[test]
fn unprivileged_user_can_only_check() {
    let policy = policy();
    // A directory that every user can reach.
    let copy = policy.dir().join("sockpolicy");
    process::copy_program(agent::program(), &copy);
    let path = policy.path().to_str().unwrap();
    let as_nobody = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]);
        command.arg(&copy).args(arguments);
        command
    };
    let error = "error: cannot load BPF programs: this process lacks CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF\n  \
                 help: run sockpolicy as root, or give it these capabilities\n";
    fails(as_nobody(&["exec", path, "--", "echo", MARK]), 125, error);
    fails(as_nobody(&["doctor"]), 2, error);
    assert!(process::output(as_nobody(&["check", path])).status.success());

    fs::set_permissions(policy.path(), fs::Permissions::from_mode(0o600)).unwrap();
    let output = process::output(as_nobody(&["exec", path, "--", "echo", MARK]));
    let printed = stderr(&output);
    assert!(printed.starts_with(&format!("error: cannot read {path}: permission denied\n")), "{printed}");
    assert!(printed.contains("= help: "), "{printed}");
    assert_eq!((stdout(&output).as_str(), output.status.code()), ("", Some(125)));
}
