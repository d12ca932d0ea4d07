//! Unusual environments and spellings: either they work, or the error says what to do.

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::symlink,
    },
    path::Path,
    process::{Command, Stdio},
};

use nix::sys::signal::Signal;
use serde_json::Value;
use sockpolicy_integration_tests::{
    agent::{self, Run},
    cgroup::{Cgroup, mount},
    options::SO_MARK,
    policy::PolicyFile,
    probe::Probe,
    process::{self, Running, exec, in_mount_namespace},
};

use super::{MARK, fails, policy, wrapped};
use crate::{stderr, stdout};

/// Returns a command that runs another command after a shell script. The script can have these arguments as `$1` and so on.
fn after(script: &str, arguments: &[&Path], command: &Command) -> Command {
    let mut outer = Command::new("sh");
    outer.arg("-c").arg(format!("{script}; shift {}; exec \"$@\"", arguments.len())).arg("sh").args(arguments);
    outer.arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
    outer
}

/// Returns the cgroups on which `plan` would enforce with these arguments.
#[track_caller]
fn planned(dir: &Path, cgroup: &OsStr) -> Vec<String> {
    let policy = policy();
    let mut command = agent::command(&["plan", "--output", "json"]);
    command.arg(policy.path()).arg("--cgroup").arg(cgroup).current_dir(dir);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let lines = stdout(&output).lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).collect::<Vec<_>>();
    let mut cgroups: Vec<String> = lines
        .iter()
        .filter(|line| line["step"] == "attach")
        .filter_map(|line| line["cgroup"].as_str().map(str::to_owned))
        .collect();
    cgroups.dedup();
    cgroups
}

#[test]
fn cgroup_has_each_usual_spelling() {
    let target = Cgroup::new();
    let name = target.name();
    let below = name.trim_start_matches('/');
    let path = target.path().display().to_string();
    let other = policy();
    let link = other.dir().join("link");
    symlink(target.path(), &link).unwrap();
    let root = Path::new("/");
    for spelling in [below, &name, &format!("{below}/"), &format!("/{name}"), &path, &format!("{path}/")] {
        assert_eq!(planned(root, spelling.as_ref()), [name.as_str()], "{spelling}");
    }
    assert_eq!(planned(root, link.as_os_str()), [name.as_str()]);
    assert_eq!(planned(mount(), format!("./{below}").as_ref()), [name.as_str()]);
    assert_eq!(planned(target.path(), ".".as_ref()), [name.as_str()]);
    assert_eq!(planned(target.path(), format!("../{below}").as_ref()), [name.as_str()]);
    assert_eq!(planned(target.path(), "/".as_ref()), ["/"]);
    assert_eq!(planned(root, mount().as_os_str()), ["/"]);
}

#[test]
fn empty_cgroup_is_refused() {
    let policy = policy();
    let output = agent::output(&["run", policy.path().to_str().unwrap(), "--cgroup", ""]);
    assert_eq!((stdout(&output).as_str(), output.status.code()), ("", Some(2)));
    assert!(stderr(&output).starts_with("error: a value is required for '--cgroup <PATH>'"), "{}", stderr(&output));
}

#[test]
fn cgroup_name_that_is_not_utf8_is_a_target() {
    let parent = Cgroup::new();
    let path = parent.path().join(OsString::from_vec(vec![b'a', 0xff]));
    fs::create_dir(&path).unwrap();
    let target = Cgroup::adopt(&path);
    let shown = [format!("{}/a\u{fffd}", parent.name())];
    assert_eq!(planned(Path::new("/"), target.path().as_os_str()), shown);
    assert_eq!(planned(parent.path(), OsStr::from_bytes(b"./a\xff")), shown);
}

#[test]
fn name_with_a_backslash_is_a_target_as_the_kernel_shows_it() {
    // As systemd names `system-serial-getty.slice`.
    let parent = Cgroup::new();
    let target = parent.child(r"system-serial\x2dgetty.slice");
    let policy =
        PolicyFile::new(format!("[target]\ncgroup = '{}'\n[[rule]]\nset = {{ SO_MARK = 7 }}\n", target.name()));
    let run = Run::start_with(&policy, &[]);
    assert_eq!(Probe::start(&target).value_on_new_socket(SO_MARK), 7);
    assert_eq!(Probe::start(&parent).value_on_new_socket(SO_MARK), 0);
    drop(run.finish());
}

#[test]
fn command_runs_below_a_threaded_cgroup() {
    let domain = Cgroup::new();
    let threaded = domain.child("threads");
    fs::write(threaded.path().join("cgroup.type"), "threaded").unwrap();
    let policy = PolicyFile::new("[[rule]]\nset = { SO_MARK = 7 }\n");
    let show = "import socket; print(socket.socket().getsockopt(1, 36))";
    let sleeper = "sleep 1000 >/dev/null 2>&1 & echo $!; exec python3 -c \"$0\"";
    let agent = exec(&["--quiet"], &policy, &["sh", "-c", sleeper, show]);
    let join = "echo 0 >$1/cgroup.procs; echo 0 >$2/cgroup.threads";
    let output = Running::start(after(join, &[domain.path(), threaded.path()], &agent)).finish();
    let printed = stdout(&output);
    let lines: Vec<&str> = printed.lines().collect();
    assert_eq!((lines[1], output.status.code()), ("7", Some(0)), "{printed}{}", stderr(&output));
    // The process that outlived the command is in the cgroup of the agent again, and the command's cgroup is gone.
    let outlived = lines[0].parse().unwrap();
    assert_eq!(process::cgroup_of(outlived).as_deref(), Some(threaded.name().as_str()));
    assert_eq!(threaded.children(), Vec::<OsString>::new());
    assert!(stderr(&output).contains("1 processes outlived"), "{}", stderr(&output));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(outlived as i32), Signal::SIGKILL).unwrap();
}

#[test]
fn low_limit_of_open_files_is_named() {
    let policy = policy();
    let target = Cgroup::new();
    let path = policy.path().to_str().unwrap();
    let cgroup = target.path().to_str().unwrap();
    for (words, status) in [
        (&["exec", path, "--", "echo", MARK][..], 125),
        (&["run", path, "--cgroup", cgroup], 2),
        (&["attach", path, "--cgroup", cgroup, "--instance", "limit"], 2),
        (&["doctor"], 2),
    ] {
        let error = "error: cannot load BPF programs: this process can have 64 open files, and needs 256\n  help: raise the limit \
                     of open files: ulimit -n 4096 (in a unit: LimitNOFILE=4096)\n";
        fails(after("ulimit -n 64", &[], &agent::command(words)), status, error);
    }
}

#[test]
fn command_gets_the_soft_limit_of_open_files_that_exec_has_raised() {
    let policy = policy();
    let agent = exec(&["--quiet"], &policy, &["sh", "-c", "ulimit -Sn; ulimit -Hn"]);
    let output = process::output(after("ulimit -n 5000; ulimit -Sn 64", &[], &agent));
    assert_eq!((stdout(&output).as_str(), output.status.code()), ("64\n5000\n", Some(0)), "{}", stderr(&output));
}

#[test]
fn cgroup2_hidden_by_ip_netns_is_reported_with_the_command_that_works() {
    let policy = policy();
    // Unique, since the cgroup exists.
    let home = Cgroup::new();
    let name = home.name().trim_start_matches('/').to_owned();
    let ip = |verb: &str| assert!(Command::new("ip").args(["netns", verb, &name]).status().unwrap().success());
    ip("add");
    let agent = exec(&["--quiet"], &policy, &["echo", MARK]);
    let output = process::output(wrapped(&["ip", "netns", "exec", &name], &agent));
    let nsenter = process::output(wrapped(&["nsenter", &format!("--net=/run/netns/{name}")], &agent));
    ip("delete");
    let error = format!(
        "error: cgroup2 is not mounted in the mount namespace of this process, but in that of process 1 (`ip netns exec` hides \
         it)\n  help: enter only the network namespace: nsenter --net=/run/netns/{name} sockpolicy ..., or mount it and repeat \
         the command: mkdir -p /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup\n"
    );
    assert_eq!((stderr(&output), output.status.code()), (error, Some(125)));
    assert_eq!((stdout(&nsenter), nsenter.status.code()), (format!("{MARK}\n"), Some(0)), "{}", stderr(&nsenter));
}

#[test]
fn command_stays_below_the_cgroup_of_exec_in_a_cgroup_namespace() {
    let policy = policy();
    let outer = Cgroup::new();
    let inner = outer.child("inner");
    let agent = exec(&["--quiet"], &policy, &["cat", "/proc/self/cgroup"]);
    // The mount of the host shows more of the hierarchy than the namespace has.
    let mut command = wrapped(&["unshare", "--cgroup"], &agent);
    inner.run_inside(&mut command);
    let output = command.output().unwrap();
    let printed = stdout(&output);
    let own = printed.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
    assert!(own.starts_with("/sockpolicy-"), "{printed}{}", stderr(&output));
}

#[test]
fn mount_without_the_own_cgroup_is_reported() {
    let policy = policy();
    let (home, other) = (Cgroup::new(), Cgroup::new());
    let mount = mount().display();
    let prepare = format!("mount --bind {} /mnt && umount -l {mount}", other.path().display());
    let mut command = in_mount_namespace(&prepare, &exec(&["--quiet"], &policy, &["echo", MARK]));
    home.run_inside(&mut command);
    let output = command.output().unwrap();
    let error = "error: the cgroup of this process is not below /mnt: the mount shows another part of the hierarchy\n  help: mount \
                 the whole hierarchy: mount -t cgroup2 none /mnt\n";
    assert_eq!((stderr(&output).as_str(), output.status.code()), (error, Some(125)));
}

#[test]
fn refused_bpf_call_is_reported_with_what_can_refuse_it() {
    let policy = policy();
    let agent = exec(&["--quiet"], &policy, &["echo", MARK]);
    for (errno, help) in [
        ("EPERM", "\n  help: this process has the capabilities for bpf(2). A seccomp filter can refuse the call, "),
        ("ENOSYS", "\n  help: run a kernel with CONFIG_BPF_SYSCALL, without a seccomp filter that refuses bpf(2)\n"),
    ] {
        // strace changes the result of the call as a seccomp filter would.
        let inject = format!("inject=bpf:error={errno}");
        let output = process::output(wrapped(&["strace", "-f", "-qq", "-o", "/dev/null", "-e", &inject], &agent));
        let printed = stderr(&output);
        assert!(printed.starts_with("error: cannot prepare the BPF programs: ") && printed.contains(help), "{printed}");
        assert_eq!((stdout(&output).as_str(), output.status.code()), ("", Some(125)));
    }
}

#[test]
fn missing_proc_is_reported() {
    let policy = policy();
    let path = policy.path().to_str().unwrap();
    for (words, status) in [(&["exec", path, "--", "echo", MARK][..], 125), (&["run", path, "--cgroup", "/"], 2)] {
        let error = "error: cannot read /proc/self/mountinfo: No such file or directory (os error 2)\n  help: mount it and repeat \
                     the command: mount -t proc proc /proc\n";
        fails(in_mount_namespace("umount -l /proc", &agent::command(words)), status, error);
    }
}

#[test]
fn read_only_run_prevents_only_instances_that_persist() {
    let policy = policy();
    let target = Cgroup::new();
    let path = policy.path().to_str().unwrap();
    let prepare = "mount -t tmpfs none /run && mount -o remount,ro /run";
    let attach = agent::command(&["attach", path, "--cgroup", target.path().to_str().unwrap()]);
    let error = "error: cannot use /run/sockpolicy: Read-only file system (os error 30)\n  help: sockpolicy keeps its records \
                 there: mkdir -p /run && mount -t tmpfs -o mode=0755 tmpfs /run, or make it writable\n";
    fails(in_mount_namespace(prepare, &attach), 2, error);
    let output = process::output(in_mount_namespace(prepare, &exec(&["--quiet"], &policy, &["echo", MARK])));
    assert_eq!((stdout(&output), output.status.code()), (format!("{MARK}\n"), Some(0)), "{}", stderr(&output));
}

#[test]
fn forgotten_separator_is_corrected() {
    let policy = policy();
    let path = policy.path().to_str().unwrap();
    let error = format!(
        "error: there is no `--` before the command nginx\n  help: type: sockpolicy exec {path} -- nginx -g 'daemon off;'\n"
    );
    fails(agent::command(&["exec", path, "nginx", "-g", "daemon off;"]), 125, &error);
}

#[test]
fn task_name_that_no_task_can_have_is_refused() {
    let output = agent::output(&["audit", "--comm", "a-very-long-daemon-name"]);
    let error = "error: invalid value 'a-very-long-daemon-name' for '--comm <NAME>': the kernel keeps only the first 15 bytes of the \
                 name of a task: write a-very-long-dae\n";
    assert!(stderr(&output).starts_with(error), "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(2));
}
