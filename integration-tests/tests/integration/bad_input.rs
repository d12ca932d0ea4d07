//! Invalid input: one clear error, the right exit status, and nothing left behind.

mod environment;
pub(crate) mod rights;

use std::{
    fs,
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use sockpolicy_integration_tests::{
    agent,
    cgroup::{Cgroup, mount},
    foreign_program::count_attached,
    kernels::Kernel,
    policy::PolicyFile,
    process::{self, exec, in_mount_namespace},
};

use crate::{stderr, stdout};

/// The output of a command that `exec` must not run.
const MARK: &str = "the command was run";

/// Returns a valid policy.
fn policy() -> PolicyFile {
    PolicyFile::new("[[rule]]\nset = { TCP_NODELAY = true }\n")
}

/// Runs a command that fails with this status and this error message. It must attach no program and create no cgroup.
#[track_caller]
fn fails(command: Command, status: i32, error: &str) {
    let shown = format!("{command:?}");
    let output = process::output(command);
    assert_eq!((stdout(&output), stderr(&output)), (String::new(), error.to_owned()), "{shown}");
    assert_eq!(output.status.code(), Some(status), "{shown}");
}

/// Returns a command that runs another command through a wrapper command.
fn wrapped(wrapper: &[&str], command: &Command) -> Command {
    let mut outer = Command::new(wrapper[0]);
    outer.args(&wrapper[1..]).arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
    outer
}

/// Asserts that `exec` and `run` of this policy both fail, each with its own status. `run` must leave no program on
/// its target.
#[track_caller]
fn both_fail(path: &str, error: &str) {
    let target = Cgroup::new();
    let cgroup = target.path().display().to_string();
    fails(agent::command(&["exec", path, "--", "echo", MARK]), 125, error);
    fails(agent::command(&["run", "--cgroup", &cgroup, path]), 2, error);
    assert_eq!(count_attached(&target), 0);
}

fn run_on(cgroup: &str, policy: &PolicyFile) -> Command {
    let mut command = agent::command(&["run", "--cgroup", cgroup]);
    command.arg(policy.path());
    command
}

#[test]
fn missing_cgroup_is_named() {
    let policy = policy();
    let mount = mount().display();
    let help = format!("cgroups are the directories below {mount}: find {mount} -type d");
    for (given, full) in [
        ("/no/such/cgroup", "/no/such/cgroup".to_owned()),
        ("no/such/cgroup", format!("{mount}/no/such/cgroup")),
        ("no-such.slice", format!("{mount}/no-such.slice")),
    ] {
        let error =
            format!("error: cannot find cgroup {full}: No such file or directory (os error 2)\n  help: {help}\n");
        fails(run_on(given, &policy), 2, &error);
    }
}

#[test]
fn path_that_is_no_cgroup2_directory_is_refused() {
    let policy = policy();
    let target = Cgroup::new();
    let dir = target.path().display();
    let error = format!("error: {dir}/cgroup.procs is a file, not a cgroup directory\n  help: use {dir}\n");
    fails(run_on(&format!("{dir}/cgroup.procs"), &policy), 2, &error);
    let not_cgroup2 = |path: &str| {
        format!(
            "error: {path} is not in the cgroup2 hierarchy: it is a cgroup of version 1, or not a cgroup\n  help: \
             use a directory below {}\n",
            mount().display()
        )
    };
    fails(run_on("/tmp", &policy), 2, &not_cgroup2("/tmp"));
    // A v1 hierarchy without controllers, which any host can mount. It ends with its mount.
    let v1 = policy.dir().join("v1").display().to_string();
    let prepare = format!("mkdir {v1} && mount -t cgroup -o none,name=test-{} none {v1}", std::process::id());
    fails(in_mount_namespace(&prepare, &run_on(&v1, &policy)), 2, &not_cgroup2(&v1));
}

#[test]
fn missing_target_of_a_policy_is_named() {
    let mount = mount().display();
    let policy = PolicyFile::new(
        "name = \"web\"\n[target]\ncgroup = [\"no-such.slice/*\", \"nor-this\"]\n[[rule]]\nset = { TCP_NODELAY = true }\n",
    );
    let path = policy.path().to_str().unwrap();
    let none = format!(
        "no cgroup matches no-such.slice/*, nor-this\n  help: cgroups are the directories below {mount}: find {mount} -type d\n"
    );
    fails(agent::command(&["attach", path]), 2, &format!("error: {none}"));
    let planned = agent::output(&["plan", path]);
    assert_eq!(
        (stderr(&planned), planned.status.code()),
        (format!("warning: `run` would wait for a target: {none}"), Some(0))
    );
    let policy = PolicyFile::new("name = \"web\"\n[[rule]]\nset = { TCP_NODELAY = true }\n");
    let error = "error: policy `web` names no target\n  help: name a cgroup: --cgroup PATH\n";
    fails(agent::command(&["run", policy.path().to_str().unwrap()]), 2, error);
}

#[test]
fn missing_cgroup2_mount_is_reported_with_help() {
    let policy = policy();
    let elsewhere = "error: cgroup2 is not mounted in the mount namespace of this process, but in that of process 1 (`ip netns exec` hides it)";
    // With a PID namespace of its own, no process in another mount namespace is visible.
    let alone = "mount -t proc proc /proc && ";
    for (unmount, expected) in [
        (format!("umount {}", mount().display()), elsewhere),
        (format!("{alone}umount {}", mount().display()), "error: cgroup2 is not mounted on this host"),
    ] {
        let prepared = |prepare: &str, agent: &Command| {
            let mut command = in_mount_namespace(prepare, agent);
            if prepare.starts_with(alone) {
                command = wrapped(&["unshare", "--pid", "--fork", "--kill-child"], &command);
            }
            command
        };
        let agent = exec(&["--quiet"], &policy, &["echo", MARK]);
        let output = process::output(prepared(&unmount, &agent));
        let printed = stderr(&output);
        let (error, help) = printed.split_once("\n  help: mount it and repeat the command: ").unwrap();
        assert_eq!(error, expected);
        assert_eq!((stdout(&output).as_str(), output.status.code()), ("", Some(125)));
        fails(prepared(&unmount, &run_on("some", &policy)), 2, &printed);
        // The suggested command works.
        let output = process::output(prepared(&format!("{unmount} && {}", help.trim_end()), &agent));
        assert_eq!((stdout(&output), output.status.code()), (format!("{MARK}\n"), Some(0)), "{}", stderr(&output));
    }
}

#[test]
fn read_only_cgroup2_is_reported() {
    let policy = policy();
    let prepare = format!("mount -o remount,bind,ro {}", mount().display());
    let output = process::output(in_mount_namespace(&prepare, &exec(&[], &policy, &["echo", MARK])));
    let printed = stderr(&output);
    assert!(printed.starts_with("error: cannot make cgroup "), "{printed}");
    let end = ": Read-only file system (os error 30)\n  help: run as root, with a writable cgroup2 mount\n";
    assert!(printed.ends_with(end), "{printed}");
    assert_eq!((stdout(&output).as_str(), output.status.code()), ("", Some(125)));
}

#[test]
fn missing_congestion_control_is_refused() {
    let policy =
        PolicyFile::new("[[rule]]\nmatch = { protocol = \"tcp\" }\nset = { TCP_CONGESTION = \"no-such-cc\" }\n");
    let available = fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").unwrap();
    let available = available.split_whitespace().collect::<Vec<_>>().join(", ");
    let error = format!(
        "error: cannot enforce the policies on this kernel:
  TCP_CONGESTION = \"no-such-cc\": not loaded; loaded: \
         {available} (load it: modprobe tcp_no-such-cc)
  help: remove these settings, or give --allow-unsupported to \
         enforce the rest
"
    );
    both_fail(policy.path().to_str().unwrap(), &error);
}

#[test]
fn too_many_rules_are_refused() {
    let rules_from = |first: usize, count: usize| -> String {
        let rule = |port| format!("[[rule]]\nmatch = {{ local_port = {port} }}\nset = {{ TCP_NODELAY = true }}\n");
        (first..first + count).map(rule).collect()
    };
    let rules = |count| rules_from(1, count);
    let policy = PolicyFile::new(rules(65));
    let path = policy.path().to_str().unwrap();
    let error = format!(
        "error: this policy has 65 rules; it can have at most 64\n   --> {path}:193:1\n    |\n193 | [[rule]]\n    \
         | ^^^^^^^^\n    |\n    = help: join rules that differ only in an address or a port: `match` takes lists\n\n"
    );
    both_fail(path, &error);
    // Two files that have too many rules only together.
    let (one, other) = (PolicyFile::named("a.toml", rules(60)), PolicyFile::named("b.toml", rules_from(100, 5)));
    let [one, other] = [&one, &other].map(|policy| policy.path().to_str().unwrap());
    let error = "error: policies a, b have 65 rules together: policies that cover the same cgroup can have at most 64\n  \
                 help: put them on different targets, or merge rules that match the same sockets\n";
    fails(agent::command(&["exec", one, other, "--", "echo", MARK]), 125, error);
    // The largest permitted number.
    let policy = PolicyFile::new(rules(64));
    let output = process::output(exec(&["--quiet"], &policy, &["echo", MARK]));
    assert_eq!(stdout(&output), format!("{MARK}\n"), "{}", stderr(&output));
}

#[test]
fn invalid_policy_file_is_refused() {
    let policy = policy();
    let dir = policy.dir().join("empty");
    fs::create_dir(&dir).unwrap();
    let dir = dir.to_str().unwrap();
    // `run` waits there for a policy.
    let error =
        format!("error: no policy in {dir}: it has no *.toml\n |\n = help: add one, or list the file itself\n\n");
    fails(agent::command(&["exec", dir, "--", "echo", MARK]), 125, &error);
    let missing = format!("{dir}/missing.toml");
    both_fail(
        &missing,
        &format!("error: cannot read {missing}: no such file or directory\n |\n = help: list the files: ls {dir}\n\n"),
    );
    both_fail("/dev/null", "error: /dev/null is a device\n |\n = help: write the policy to a regular file\n\n");
    let not_text = PolicyFile::new([0xff, 0xfe, b'\n']);
    let output = process::output(exec(&[], &not_text, &["echo", MARK]));
    assert!(stderr(&output).contains("UTF-8"), "{}", stderr(&output));
    assert_eq!((stdout(&output).as_str(), output.status.code()), ("", Some(125)));
}

#[test]
fn wrong_usage_gives_the_status_of_each_command() {
    let policy = policy();
    let path = policy.path().to_str().unwrap();
    let usage = |arguments: &[&str]| -> Output { process::output(agent::command(arguments)) };
    for (arguments, status) in [
        (&["exec", path][..], 125),
        (&["exec", path, "--"], 125),
        (&["exec", "--no-such-option", path, "--", "true"], 125),
        (&["exec", "--audit-backend", "no-such", path, "--", "true"], 125),
        (&["run"], 2),
        (&["no-such-command"], 2),
        (&["exec", "--help"], 0),
        (&["--version"], 0),
    ] {
        let output = usage(arguments);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {}", stderr(&output));
        assert_eq!(stderr(&output).starts_with("error: "), status != 0, "{arguments:?}");
    }
}

#[test]
fn kernel_without_btf_is_sufficient() {
    let hide = "mount -t tmpfs none /sys/kernel/btf";
    let policy = policy();
    let kernel = Kernel::current();
    let output = process::output(in_mount_namespace(hide, &exec(&["--quiet"], &policy, &["echo", MARK])));
    if kernel.has("ancestors") {
        assert_eq!((stdout(&output), output.status.code()), (format!("{MARK}\n"), Some(0)), "{}", stderr(&output));
    } else {
        // Without both, the audit cannot know the cgroups of the callers.
        let error = "error: cannot attach the audit: programs cannot find the cgroups of a task on this kernel: this kernel \
                     provides no BTF";
        assert!(stderr(&output).starts_with(error), "{}", stderr(&output));
        assert_eq!((stdout(&output).as_str(), output.status.code()), ("", Some(125)));
    }
    let output = process::output(in_mount_namespace(hide, &agent::command(&["doctor", "--output", "json"])));
    let doctor: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(doctor["btf"], false);
    for part in ["hook_support", "backend_support", "option_support"] {
        for line in doctor[part].as_array().unwrap() {
            let name = line["name"].as_str().unwrap();
            // These features need BTF.
            let needs_types =
                ["fentry", "iter/tcp", "lsm_cgroup/socket_post_create", "SO_BINDTOIFINDEX"].contains(&name);
            let works = kernel.has(name) && !needs_types && (part != "backend_support" || kernel.has("ancestors"));
            assert_eq!(line["works"] == "yes", works, "{line}");
        }
    }
}
