//! What cannot be done: one clear error, the right exit status, and nothing left behind.

pub(crate) mod rights;

use std::{
    fs,
    process::{Command, Output},
};

use serde_json::Value;
use sockpolicy_integration_tests::{
    agent,
    cgroup::{Cgroup, mount},
    foreign::attached,
    kernels::Kernel,
    policy::PolicyFile,
    process::{self, exec, with_mounts},
};

use crate::{stderr, stdout};

/// `exec` of a command that must not be run.
const MARK: &str = "the command was run";

/// A valid policy.
fn policy() -> PolicyFile {
    PolicyFile::new("[[rule]]\nset = { TCP_NODELAY = true }\n")
}

/// Runs it to its end: it fails with this status, says this, and has attached and made nothing.
#[track_caller]
fn fails(command: Command, status: i32, error: &str) {
    let shown = format!("{command:?}");
    let output = process::output(command);
    assert_eq!((stdout(&output), stderr(&output)), (String::new(), error.to_owned()), "{shown}");
    assert_eq!(output.status.code(), Some(status), "{shown}");
}

/// `exec` and `run` of this policy both fail, each with its own status; `run` on a target where
/// nothing is attached afterwards.
#[track_caller]
fn both_fail(path: &str, error: &str) {
    let target = Cgroup::new();
    let cgroup = target.path().display().to_string();
    fails(agent::command(&["exec", path, "--", "echo", MARK]), 125, error);
    fails(agent::command(&["run", "--cgroup", &cgroup, path]), 2, error);
    assert_eq!(attached(&target), 0);
}

fn run_on(cgroup: &str, policy: &PolicyFile) -> Command {
    let mut command = agent::command(&["run", "--cgroup", cgroup]);
    command.arg(policy.path());
    command
}

#[test]
fn cgroup_that_is_not_there_is_named() {
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
fn cgroup_that_is_something_else_is_refused() {
    let policy = policy();
    let target = Cgroup::new();
    let folder = target.path().display();
    let error = format!("error: {folder}/cgroup.procs is a file, not a cgroup directory\n  help: use {folder}\n");
    fails(run_on(&format!("{folder}/cgroup.procs"), &policy), 2, &error);
    let not_cgroup2 = |path: &str| {
        format!(
            "error: {path} is not in the cgroup2 hierarchy: it is a cgroup of version 1, or not a cgroup\n  help: \
             use a directory below {}\n",
            mount().display()
        )
    };
    fails(run_on("/tmp", &policy), 2, &not_cgroup2("/tmp"));
    // Version 1, by a hierarchy without controllers, which any host can mount and which ends with its mount.
    let v1 = policy.folder().join("v1").display().to_string();
    let prepare = format!("mkdir {v1} && mount -t cgroup -o none,name=test-{} none {v1}", std::process::id());
    fails(with_mounts(&prepare, &run_on(&v1, &policy)), 2, &not_cgroup2(&v1));
}

#[test]
fn target_that_the_policy_names_and_the_host_lacks_is_named() {
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
fn host_without_cgroup2_is_told_how_to_mount_it() {
    let policy = policy();
    let unmount = format!("umount {}", mount().display());
    let output = process::output(with_mounts(&unmount, &exec(&["--quiet"], &policy, &["echo", MARK])));
    let said = stderr(&output);
    let (error, help) = said.split_once("\n  help: mount it and repeat the command: ").unwrap();
    assert_eq!(error, "error: cgroup2 is not mounted on this host");
    assert_eq!((stdout(&output).as_str(), output.status.code()), ("", Some(125)));
    fails(with_mounts(&unmount, &run_on("some", &policy)), 2, &said);
    // The help helps.
    let prepare = format!("{unmount} && {}", help.trim_end());
    let output = process::output(with_mounts(&prepare, &exec(&["--quiet"], &policy, &["echo", MARK])));
    assert_eq!((stdout(&output), output.status.code()), (format!("{MARK}\n"), Some(0)), "{}", stderr(&output));
}

#[test]
fn cgroup2_that_cannot_be_written_is_said() {
    let policy = policy();
    let prepare = format!("mount -o remount,bind,ro {}", mount().display());
    let output = process::output(with_mounts(&prepare, &exec(&[], &policy, &["echo", MARK])));
    let said = stderr(&output);
    assert!(said.starts_with("error: cannot make cgroup "), "{said}");
    let end = ": Read-only file system (os error 30)\n  help: run as root, with a writable cgroup2 mount\n";
    assert!(said.ends_with(end), "{said}");
    assert_eq!((stdout(&output).as_str(), output.status.code()), ("", Some(125)));
}

#[test]
fn congestion_control_that_is_not_loaded_is_refused() {
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
fn more_rules_than_a_policy_can_hold_are_refused() {
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
    // Two files that are too large together only.
    let (one, other) = (PolicyFile::named("a.toml", rules(60)), PolicyFile::named("b.toml", rules_from(100, 5)));
    let [one, other] = [&one, &other].map(|policy| policy.path().to_str().unwrap());
    let error = "error: policies a, b have 65 rules together: policies that cover the same cgroup can have at most 64\n  \
                 help: put them on different targets, or merge rules that match the same sockets\n";
    fails(agent::command(&["exec", one, other, "--", "echo", MARK]), 125, error);
    // As many as there can be.
    let policy = PolicyFile::new(rules(64));
    let output = process::output(exec(&["--quiet"], &policy, &["echo", MARK]));
    assert_eq!(stdout(&output), format!("{MARK}\n"), "{}", stderr(&output));
}

#[test]
fn file_that_is_no_policy_is_refused() {
    let policy = policy();
    let folder = policy.folder().join("empty");
    fs::create_dir(&folder).unwrap();
    let folder = folder.to_str().unwrap();
    both_fail(
        folder,
        &format!("error: no policy in {folder}: it has no *.toml\n |\n = help: add one, or list the file itself\n\n"),
    );
    let missing = format!("{folder}/missing.toml");
    both_fail(
        &missing,
        &format!(
            "error: cannot read {missing}: no such file or directory\n |\n = help: list the files: ls {folder}\n\n"
        ),
    );
    both_fail("/dev/null", "error: /dev/null is a device\n |\n = help: write the policy to a regular file\n\n");
    let not_text = PolicyFile::new([0xff, 0xfe, b'\n']);
    let output = process::output(exec(&[], &not_text, &["echo", MARK]));
    assert!(stderr(&output).contains("UTF-8"), "{}", stderr(&output));
    assert_eq!((stdout(&output).as_str(), output.status.code()), ("", Some(125)));
}

#[test]
fn wrong_usage_has_the_status_of_each_command() {
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
fn kernel_without_btf_is_good_enough() {
    let hide = "mount -t tmpfs none /sys/kernel/btf";
    let policy = policy();
    let kernel = Kernel::current();
    let output = process::output(with_mounts(hide, &exec(&["--quiet"], &policy, &["echo", MARK])));
    if kernel.has("ancestors") {
        assert_eq!((stdout(&output), output.status.code()), (format!("{MARK}\n"), Some(0)), "{}", stderr(&output));
    } else {
        // It would not know whose calls it sees.
        let error = "error: cannot attach the audit: programs cannot find the cgroups of a task on this kernel: this kernel \
                     provides no BTF";
        assert!(stderr(&output).starts_with(error), "{}", stderr(&output));
        assert_eq!((stdout(&output).as_str(), output.status.code()), ("", Some(125)));
    }
    let output = process::output(with_mounts(hide, &agent::command(&["doctor", "--output", "json"])));
    let doctor: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(doctor["btf"], false);
    for part in ["hook_support", "backend_support", "option_support"] {
        for line in doctor[part].as_array().unwrap() {
            let name = line["name"].as_str().unwrap();
            // These cannot do without.
            let needs_types =
                ["fentry", "iter/tcp", "lsm_cgroup/socket_post_create", "SO_BINDTOIFINDEX"].contains(&name);
            let works = kernel.has(name) && !needs_types && (part != "backend_support" || kernel.has("ancestors"));
            assert_eq!(line["works"] == "yes", works, "{line}");
        }
    }
}
