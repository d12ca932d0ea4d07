//! `exec` and `run` as processes: the environment and results of a command, and what remains after an agent.

mod ending;
mod foreign_programs;
mod signals;
mod storm;

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

use sockpolicy_integration_tests::{
    policy::PolicyFile,
    process::{self, Running, cgroup_of, descriptors, exec},
};

use crate::{stderr, stdout};

/// Returns a policy that the shells of these tests do not trigger, and that every kernel of the matrix supports.
fn some_policy() -> PolicyFile {
    PolicyFile::new("name = \"some\"\n[[rule]]\nmatch = { protocol = \"tcp\" }\nset = { SO_KEEPALIVE = true }\n")
}

#[test]
fn exit_status_is_that_of_the_command() {
    let policy = some_policy();
    for (script, status) in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("exit 255", 255),
        ("kill -KILL $$", 128 + libc::SIGKILL),
        ("kill -SEGV $$", 128 + libc::SIGSEGV),
        ("kill -TERM $$", 128 + libc::SIGTERM),
    ] {
        let output = Running::exec(&["--quiet"], &policy, &["sh", "-c", script]).finish();
        assert_eq!(output.status.code(), Some(status), "{script}: {}", stderr(&output));
    }
}

#[test]
fn command_that_cannot_be_run_gives_the_status_of_env() {
    let policy = some_policy();
    let dir = policy.dir().display().to_string();
    let file = policy.path().display().to_string();
    let not_found = "No such file or directory (os error 2)\n  help: check the name, and that its folder is in PATH\n";
    let denied = "Permission denied (os error 13)\n  help: is it a program, and may it be executed?\n";
    for (command, status, shown, reason) in [
        ("no-such-command", 127, "no-such-command", not_found),
        ("/no/such/command", 127, "/no/such/command", not_found),
        ("", 127, "``", not_found),
        (&dir, 126, &dir, denied),
        (&file, 126, &file, denied),
    ] {
        let output = Running::exec(&["--quiet"], &policy, &[command]).finish();
        assert_eq!(stderr(&output), format!("error: cannot run {shown}: {reason}"));
        assert_eq!(output.status.code(), Some(status), "{command}");
    }
}

#[test]
fn command_has_the_same_descriptors_environment_and_limits_as_without_sockpolicy() {
    let policy = some_policy();
    let (script, given, taken) = (policy.dir().join("script"), policy.dir().join("given"), policy.dir().join("taken"));
    // Descriptor 9 is one that the parent of sockpolicy has left open.
    let show = "cat; pwd; umask; env | grep -v ^_=; cat /proc/self/limits /proc/self/oom_score_adj; \
                find /proc/self/fd /proc/self/ns -printf '%f %l\\n'\n";
    fs::write(&script, show).unwrap();
    fs::write(&given, "what is given\n").unwrap();
    let report = policy.dir().join("report").display().to_string();
    let plain = Command::new("sh");
    let under_us = exec(&["--report", &report], &policy, &["sh"]);
    let answers = [plain, under_us].map(|mut command| {
        let left_open = File::open(&script).unwrap();
        command
            .arg(&script)
            .current_dir("/proc")
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("A", "1\n2");
        command.stdin(File::open(&given).unwrap()).stdout(File::create(&taken).unwrap()).stderr(Stdio::null());
        // SAFETY: only makes system calls.
        unsafe {
            command.pre_exec(move || {
                libc::umask(0o027);
                nix::unistd::dup2_raw(&left_open, 9).map(std::mem::forget).map_err(std::io::Error::from)
            });
        }
        assert!(command.status().unwrap().success());
        // The directory that `find` reads is its own.
        let answer = fs::read_to_string(&taken).unwrap();
        answer.lines().filter(|line| !line.contains("/fd")).map(str::to_owned).collect::<BTreeSet<_>>()
    });
    assert!(answers[0].iter().any(|line| line.starts_with("9 ")), "{answers:#?}");
    assert_eq!(answers[0], answers[1], "without sockpolicy on the left");
}

#[test]
fn standard_output_has_only_the_commands_output() {
    let policy = some_policy();
    let output = Running::exec(&[], &policy, &["sh", "-c", "echo out; echo err >&2"]).finish();
    assert_eq!(stdout(&output), "out\n");
    let stderr = stderr(&output);
    assert!(stderr.starts_with("sockpolicy: enforcing some on cgroup "), "{stderr}");
    assert!(stderr.contains("\nerr\n") && stderr.contains("no call conflicted"), "{stderr}");

    let report = policy.dir().join("report");
    let arguments = ["--report", report.to_str().unwrap()];
    let output = Running::exec(&arguments, &policy, &["sh", "-c", "echo out; echo err >&2"]).finish();
    assert_eq!((stdout(&output), self::stderr(&output)), ("out\n".into(), "err\n".into()));
    assert!(fs::read_to_string(report).unwrap().contains("no call conflicted"));
}

#[test]
fn guard_process_holds_only_its_own_descriptors() {
    let policy = some_policy();
    let mut command = exec(&["--quiet"], &policy, &["sh", "-c", "echo started; read line"]);
    command.stdin(Stdio::piped());
    let extra = File::open(policy.path()).unwrap();
    // SAFETY: only makes system calls.
    unsafe {
        command.pre_exec(move || nix::unistd::dup2_raw(&extra, 9).map(std::mem::forget).map_err(std::io::Error::from))
    };
    let mut running = Running::start(command);
    running.lines(1);
    let ours: Vec<_> = descriptors(running.pid()).into_iter().filter(|(number, _)| number.len() == 1).collect();
    let guard = running.children().into_iter().find(|(_, line)| line.contains("guard-cgroup")).unwrap();
    let guards = descriptors(guard.0);
    for (number, target) in &guards {
        let is_ours =
            ours.iter().any(|(number, our)| our == target && matches!(number.as_str(), "0" | "1" | "2" | "9"));
        assert!(!is_ours, "the guard holds {number}, {}", target.display());
    }
    assert_eq!(guards.len(), 3, "{guards:?}");
    running.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(running.finish().status.code(), Some(128 + libc::SIGTERM));
}

#[test]
fn pipeline_ends_with_the_command() {
    let policy = some_policy();
    let mut shell = Command::new("sh");
    // The process that outlives the command has closed the pipe, as daemons do.
    shell.args(["-c", "\"$0\" exec --quiet \"$1\" -- sh -c 'sleep 300 >/dev/null 2>&1 & echo x' 2>&1 | cat"]);
    shell.arg(sockpolicy_integration_tests::agent::program()).arg(policy.path()).stdin(Stdio::null());
    let output = process::output(shell);
    assert!(stdout(&output).starts_with("x\n"), "{}", stdout(&output));
}

#[test]
fn command_is_in_its_own_cgroup_from_its_first_instruction() {
    let policy = some_policy();
    let running = Running::exec(&["--quiet"], &policy, &["sh", "-c", "cat /proc/self/cgroup; (cat /proc/self/cgroup)"]);
    let expected = format!("0::{}/sockpolicy-{}", running.home.name(), running.pid());
    let output = running.finish();
    let cgroups = stdout(&output);
    let found: Vec<_> = cgroups.lines().filter(|line| line.starts_with("0::")).collect();
    assert_eq!(found, [&expected, &expected]);
}

#[test]
fn unwritable_report_file_is_refused_before_the_command_starts() {
    let policy = some_policy();
    let mark = policy.dir().join("mark").display().to_string();
    let dir = policy.dir().display().to_string();
    for (report, reason) in
        [("/no/such/folder/report", "No such file or directory (os error 2)"), (&dir, "Is a directory (os error 21)")]
    {
        let output = Running::exec(&["--report", report], &policy, &["touch", &mark]).finish();
        assert_eq!(stderr(&output), format!("error: cannot write the report to {report}: {reason}\n"));
        assert_eq!(output.status.code(), Some(125));
        assert!(!fs::exists(&mark).unwrap(), "the command was run");
    }
}

#[test]
fn incomplete_report_is_warned_of_and_does_not_change_the_status() {
    let policy = some_policy();
    let arguments = ["--report", "/dev/full", "--output", "json"];
    let output = Running::exec(&arguments, &policy, &["sh", "-c", "echo done; exit 7"]).finish();
    let reason = "No space left on device (os error 28)";
    // The first and the last line.
    let warning = format!("warning: cannot write the report to /dev/full: {reason}; 2 lines missing\n");
    assert_eq!(stderr(&output), warning);
    assert_eq!((stdout(&output).as_str(), output.status.code()), ("done\n", Some(7)));
}

#[test]
fn processes_that_outlive_the_command_return_to_the_parent_cgroup() {
    let policy = some_policy();
    let script = "sleep 300 >/dev/null 2>&1 & echo $!; sh -c 'sleep 300 >/dev/null 2>&1 & echo $!'";
    let mut running = Running::exec(&[], &policy, &["sh", "-c", script]);
    let pids = running.lines(2).into_iter().map(|line| line.parse().unwrap());
    let status = running.wait();
    assert!(status.success(), "{}", running.stderr());
    assert!(running.stderr().contains("2 processes outlived the command"), "{}", running.stderr());
    for pid in pids {
        assert!(process::is_alive(pid));
        assert_eq!(cgroup_of(pid), Some(running.home.name()));
    }
    assert_eq!(running.home.children(), [""; 0]);
}

#[test]
fn cgroups_that_the_command_creates_are_removed() {
    let policy = some_policy();
    // Nested cgroups, one with a process, and threaded ones, whose cgroup.procs cannot be read.
    let script = "set -e; cd \"$0$(sed -n s/^0:://p /proc/self/cgroup)\"; mkdir -p a/b/c d t/u; \
                  sleep 300 >/dev/null 2>&1 & echo $! >a/b/cgroup.procs; \
                  sleep 300 >/dev/null 2>&1 & pid=$!; echo $pid >t/cgroup.procs; \
                  echo threaded >t/u/cgroup.type; echo $pid >t/u/cgroup.threads; \
                  cat t/u/cgroup.threads; find . -type d | wc -l";
    let mount = sockpolicy_integration_tests::cgroup::mount().display().to_string();
    let mut running = Running::exec(&["--quiet"], &policy, &["sh", "-c", script, &mount]);
    let lines = running.lines(2);
    assert_eq!(lines[1], "7", "as many cgroups: {}", running.stderr());
    let status = running.wait();
    assert!(status.success(), "{}", running.stderr());
    assert_eq!(running.home.children(), [""; 0], "{}", running.stderr());
    assert_eq!(cgroup_of(lines[0].parse().unwrap()), Some(running.home.name()));
}
