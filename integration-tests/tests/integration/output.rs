//! Output that cannot be written, and readers that do not read: enforcement, commands and exit statuses are
//! unaffected.

mod columns;
mod escape;
mod rates;

use std::{
    fs::{self, File},
    io::Read,
    os::fd::OwnedFd,
    process::{Child, Command, ExitStatus, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, pipe},
};
use serde_json::Value;
use sockpolicy_integration_tests::{
    agent,
    bpffs::Instance,
    cgroup::Cgroup,
    options::SO_KEEPALIVE,
    policy::PolicyFile,
    probe::Probe,
    process::{Running, in_mount_namespace, workload},
    script::{Family, Kind},
    wait,
};

use crate::{stderr, stdout};

const POLICY: &str = "[[rule]]\nset = { SO_KEEPALIVE = true }\n";
/// The same policy, with an event for each call.
const CHATTY: &str = "[audit]\ncalls = \"all\"\n[[rule]]\nset = { SO_KEEPALIVE = true }\n";

/// An agent with any kind of output. Killed when dropped.
struct Agent {
    child: Child,
    home: Cgroup,
}

impl Agent {
    fn start(mut command: Command) -> Self {
        let home = Cgroup::new();
        home.run_inside(&mut command);
        Self { child: command.spawn().unwrap(), home }
    }

    fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Ends the agent with SIGTERM, and returns its status.
    #[track_caller]
    fn end(mut self) -> ExitStatus {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
        assert!(wait::until(wait::TIMEOUT, || !self.is_running()), "SIGTERM does not end the agent");
        assert_eq!(self.home.children(), [""; 0]);
        self.child.wait().unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ways in which standard output and standard error can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BadOutput {
    Full,
    Closed,
    /// A pipe whose reader has closed it.
    Gone,
    /// A pipe whose reader does not read.
    Stuck,
}

const ALL: [BadOutput; 4] = [BadOutput::Full, BadOutput::Closed, BadOutput::Gone, BadOutput::Stuck];

/// Returns the command with such outputs. The second value keeps a stuck pipe open.
fn with_output(words: &[&str], output: BadOutput, error: BadOutput) -> (Command, Vec<OwnedFd>) {
    let redirection = |bad| match bad {
        BadOutput::Full => "/dev/full",
        BadOutput::Closed => "&-",
        BadOutput::Gone | BadOutput::Stuck => "",
    };
    let mut script = "exec \"$0\" \"$@\"".to_owned();
    for (number, bad) in [(1, output), (2, error)] {
        if !redirection(bad).is_empty() {
            script.push_str(&format!(" {number}>{}", redirection(bad)));
        }
    }
    let mut command = Command::new("sh");
    command.args(["-c", &script]).arg(agent::program()).args(words).stdin(Stdio::null());
    let mut readers = Vec::new();
    let mut stdio = |bad| match bad {
        BadOutput::Full | BadOutput::Closed => Stdio::null(),
        BadOutput::Gone | BadOutput::Stuck => {
            let (reader, writer) = pipe().unwrap();
            if bad == BadOutput::Stuck {
                readers.push(reader);
            }
            writer.into()
        }
    };
    command.stdout(stdio(output)).stderr(stdio(error));
    (command, readers)
}

/// Returns whether the policy is in force: whether a conflicting call in the cgroup is rewritten.
fn is_enforced(probe: &mut Probe) -> bool {
    let socket = probe.open(Family::Inet, Kind::Tcp);
    probe.set(socket, SO_KEEPALIVE, 0).unwrap();
    let is_on = probe.int(socket, SO_KEEPALIVE) == 1;
    probe.close(socket);
    is_on
}

/// Makes two processes of the cgroup each make `calls` conflicting calls.
fn storm(target: &Cgroup, calls: u64) {
    let mut command = Command::new(workload());
    command.args(["storm", "2", &calls.to_string()]).stdout(Stdio::null());
    target.run_inside(&mut command);
    assert!(command.status().unwrap().success());
}

/// Waits until a process has used no CPU time for a second.
fn wait_until_idle(pid: u32) {
    let used = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<String> = stat.rsplit(')').next().unwrap().split_whitespace().map(str::to_owned).collect();
        // utime and stime (proc_pid_stat(5)), counted from the state.
        (fields[11].clone(), fields[12].clone())
    };
    let mut last = (used(), std::time::Instant::now());
    let is_idle = wait::until(wait::TIMEOUT, || {
        let now = used();
        if now != last.0 {
            last = (now, std::time::Instant::now());
        }
        last.1.elapsed().as_secs() >= 1
    });
    assert!(is_idle, "process {pid} does not become idle");
}

#[test]
fn run_continues_whatever_happens_to_its_output() {
    for bad in ALL {
        let policy = PolicyFile::new(CHATTY);
        let target = Cgroup::new();
        let path = target.path().display().to_string();
        let words = ["run", "-o", "json", "--cgroup", &path, policy.path().to_str().unwrap()];
        let (command, readers) = with_output(&words, bad, bad);
        let mut agent = Agent::start(command);
        let mut probe = Probe::start(&target);
        assert!(wait::until(wait::TIMEOUT, || is_enforced(&mut probe)), "{bad:?}: not in force");
        // More events than the pipe and the queue can hold.
        storm(&target, 3000);
        assert!(is_enforced(&mut probe), "{bad:?}: after a storm");
        // An invalid file causes error messages.
        fs::write(policy.path(), "no policy").unwrap();
        storm(&target, 100);
        // A reload takes effect, so the main loop is not blocked.
        fs::write(policy.path(), format!("{POLICY}deny = [\"SO_DEBUG\"]\n")).unwrap();
        let debug = crate::number(libc::SOL_SOCKET, libc::SO_DEBUG);
        let socket = probe.open(Family::Inet, Kind::Tcp);
        let is_denied = wait::until(wait::TIMEOUT, || probe.set(socket, debug, 0).is_err());
        assert!(is_denied && agent.is_running(), "{bad:?}: the changed policy is not in force");
        let status = agent.end();
        let expected = if bad == BadOutput::Gone { 0 } else { 2 };
        assert_eq!(status.code(), Some(expected), "{bad:?}");
        drop(readers);
    }
}

#[test]
fn reader_that_resumes_gets_the_number_of_missing_lines() {
    let policy = PolicyFile::new(CHATTY);
    let target = Cgroup::new();
    let path = target.path().display().to_string();
    let mut command = agent::command(&["run", "-o", "json", "--cgroup", &path]);
    command.arg(policy.path()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut agent = Agent::start(command);
    let mut out = agent.child.stdout.take().unwrap();
    let mut probe = Probe::start(&target);
    assert!(wait::until(wait::TIMEOUT, || is_enforced(&mut probe)));
    // Some 600 bytes per event.
    storm(&target, 4000);
    wait_until_idle(agent.child.id());
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        out.read_to_string(&mut text).unwrap();
        text
    });
    assert!(agent.end().success(), "the end of the report was written");
    let text = reader.join().unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let losses = lines.iter().filter(|line| line["event"] == "loss" && line["reason"] == "output_blocked");
    let reported: u64 = losses.map(|line| line["count"].as_u64().unwrap()).sum();
    let summary = lines.iter().find(|line| line["event"] == "summary").unwrap();
    assert!(reported > 0, "{} lines, {summary}", lines.len());
    assert_eq!(summary["losses"]["output_blocked"], reported);
}

#[test]
fn report_has_the_number_of_missing_lines_once_the_disk_has_space() {
    let policy = PolicyFile::new(CHATTY);
    let target = Cgroup::new();
    // A file system of a few pages, in a new mount namespace.
    let script = "mount -t tmpfs -o size=64k none /mnt && exec \"$0\" run -o json --cgroup \"$1\" \"$2\" >>/mnt/out";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).arg(agent::program()).arg(target.path()).arg(policy.path());
    let agent = Agent::start(command);
    let mut probe = Probe::start(&target);
    assert!(wait::until(wait::TIMEOUT, || is_enforced(&mut probe)));
    storm(&target, 500);
    assert!(is_enforced(&mut probe));
    let out = format!("/proc/{}/root/mnt/out", agent.child.id());
    let read = || fs::read_to_string(&out).unwrap();
    // Events are in order: no event of the storm comes after this one.
    let debug = crate::number(libc::SOL_SOCKET, libc::SO_DEBUG);
    let socket = probe.open(Family::Inet, Kind::Tcp);
    let mut before = String::new();
    let is_marked = wait::until(wait::TIMEOUT, || {
        probe.set(socket, debug, 0).unwrap();
        let text = read();
        let is_marked = text.contains("SO_DEBUG");
        if is_marked || text.len() > 40_000 {
            fs::write(&out, "").unwrap();
            before.push_str(&text);
        }
        is_marked
    });
    assert!(is_marked, "{}", read());
    let file = File::open(&out).unwrap();
    assert!(agent.end().success(), "the end of the report was written");
    let report = before + &std::io::read_to_string(file).unwrap();
    let lines: Vec<Value> = report.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let reported = lines.iter().rfind(|line| line["event"] == "loss" && line["reason"] == "output_no_space");
    let reported = reported.unwrap_or_else(|| panic!("{report}"));
    let summary = lines.last().unwrap();
    assert_eq!((&summary["event"], &summary["losses"]["output_no_space"]), (&"summary".into(), &reported["total"]));
}

#[test]
fn full_disk_does_not_stop_enforcement_on_new_cgroups() {
    let parent = Cgroup::new();
    let instance = Instance::new();
    let policy = PolicyFile::new(format!("[target]\ncgroup = \"{}/**\"\n{POLICY}", parent.name()));
    let first = parent.child("first");
    let words = ["run", "--persist", "--instance", &instance.name, policy.path().to_str().unwrap()];
    let prepare = "mkdir -p /run/sockpolicy && mount -t tmpfs -o size=64k,mode=700 none /run/sockpolicy";
    let mut command = in_mount_namespace(prepare, &agent::command(&words));
    command.stdout(Stdio::null());
    let agent = Agent::start(command);
    let mut probe = Probe::start(&first);
    assert!(wait::until(wait::TIMEOUT, || is_enforced(&mut probe)));
    let dir = format!("/proc/{}/root/run/sockpolicy", agent.child.id());
    let record = format!("{dir}/{}.json", instance.name);
    let full = format!("{dir}/full");
    assert!(fs::write(&full, vec![0; 1 << 20]).is_err(), "there is no space left");
    let second = parent.child("second");
    let mut probe = Probe::start(&second);
    assert!(wait::until(wait::TIMEOUT, || is_enforced(&mut probe)), "the policy is not enforced on the new cgroup");
    // The record is written once there is space.
    let names_it = || fs::read_to_string(&record).is_ok_and(|record| record.contains(&second.name()));
    assert!(!names_it());
    fs::remove_file(&full).unwrap();
    assert!(wait::until(wait::TIMEOUT, names_it));
    assert!(agent.end().success());
}

#[test]
fn exec_and_audit_return_the_commands_status_whatever_happens_to_their_output() {
    let policy = PolicyFile::new(POLICY);
    let file = policy.path().to_str().unwrap();
    let script = format!("{} storm 1 50 >/dev/null; exit 7", workload());
    let command = ["--", "sh", "-c", &script];
    for bad in ALL {
        for start in [&["exec", file][..], &["audit"]] {
            let (command, readers) = with_output(&[start, &command].concat(), bad, bad);
            let mut agent = Agent::start(command);
            assert!(wait::until(wait::TIMEOUT, || !agent.is_running()), "{bad:?} {start:?}: does not end");
            assert_eq!(agent.child.wait().unwrap().code(), Some(7), "{bad:?} {start:?}");
            drop(readers);
        }
    }
    let output = Running::exec(&["--report", "/dev/full"], &policy, &command[1..]).finish();
    assert_eq!(output.status.code(), Some(7));
    assert!(stderr(&output).contains("cannot write the report to /dev/full: No space left"), "{}", stderr(&output));
}

/// Returns commands that write to standard output and end.
fn one_shots<'a>(policy: &'a str, cgroup: &'a str) -> Vec<Vec<&'a str>> {
    let commands: [&[&str]; 18] = [
        &["--help"],
        &["--version"],
        &["run", "--help"],
        &["options"],
        &["options", "-o", "json"],
        &["options", "-o", "markdown"],
        &["check", "-o", "json", "/no/such/policy"],
        &["explain", "--protocol", "tcp", policy],
        &["explain", "-o", "json", "--protocol", "tcp", policy],
        &["test", policy],
        &["plan", "--cgroup", cgroup, policy],
        &["plan", "-o", "json", "--cgroup", cgroup, policy],
        &["status"],
        &["ls"],
        &["ls", "-o", "json"],
        &["verify", "--cgroup", cgroup, policy],
        &["apply", "--dry-run", "--cgroup", cgroup, policy],
        &["doctor"],
    ];
    commands.map(<[&str]>::to_vec).to_vec()
}

#[test]
fn one_shot_commands_fail_with_a_reason_if_their_output_cannot_be_written() {
    let policy = PolicyFile::new(POLICY);
    let target = Cgroup::new();
    for words in one_shots(policy.path().to_str().unwrap(), target.path().to_str().unwrap()) {
        for (bad, reason) in [(BadOutput::Full, "No space left"), (BadOutput::Closed, "Bad file descriptor")] {
            let (mut command, _) = with_output(&words, bad, BadOutput::Full);
            command.stderr(Stdio::null());
            assert_eq!(command.status().unwrap().code(), Some(2), "{bad:?} {words:?}, without standard error");
            let redirection = if bad == BadOutput::Full { "/dev/full" } else { "&-" };
            let mut command = Command::new("sh");
            command.args(["-c", &format!("exec \"$0\" \"$@\" >{redirection}")]).arg(agent::program()).args(&words);
            let output = command.output().unwrap();
            assert_eq!(output.status.code(), Some(2), "{bad:?} {words:?}: {}", stderr(&output));
            assert!(stderr(&output).contains(reason), "{bad:?} {words:?}: {}", stderr(&output));
        }
        let (mut command, _) = with_output(&words, BadOutput::Gone, BadOutput::Gone);
        let status = command.status().unwrap();
        assert!(matches!(status.code(), Some(0..=2)), "{words:?} without a reader: {status}");
    }
}

#[test]
fn unwritable_messages_do_not_change_the_exit_status() {
    for words in [
        &["check", "/no/such/policy"][..],
        &["run", "/no/such/policy"],
        &["exec", "/no/such/policy", "--", "true"],
        &["no-such-command"],
        &["exec"],
        &["status", "--instance", "no-such-instance"],
        &["detach", "--instance", "no-such-instance"],
        &["attach", "/no/such/policy"],
    ] {
        let expected = agent::command(words).output().unwrap().status.code();
        for bad in [BadOutput::Full, BadOutput::Closed, BadOutput::Gone] {
            let (mut command, _) = with_output(words, bad, bad);
            assert_eq!(command.status().unwrap().code(), expected, "{bad:?} {words:?}");
        }
    }
}

#[test]
fn nonblocking_standard_output_is_written_completely() {
    let (reader, writer) = pipe().unwrap();
    let flags = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
    nix::fcntl::fcntl(&writer, flags).unwrap();
    let mut command = agent::command(&["options", "-o", "markdown"]);
    let mut child = command.stdout(writer).spawn().unwrap();
    drop(command);
    // The pipe fills up before this test reads from it.
    wait::until(std::time::Duration::from_millis(200), || false);
    let mut text = String::new();
    File::from(reader).read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(text, stdout(&agent::command(&["options", "-o", "markdown"]).output().unwrap()));
}
