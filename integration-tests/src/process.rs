//! Child processes with their output and exit status, for tests of the command line.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{agent, bpf_objects::BpfObjects, cgroup::Cgroup, must, policy::PolicyFile, report::Report, wait};

/// A process in a new cgroup. Threads read its output while it runs. The process is killed when this value is
/// dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdout: PipeReader,
    stderr: PipeReader,
    /// The cgroup that the process starts in. sockpolicy creates the cgroups of its commands below it.
    pub home: Cgroup,
}

impl Running {
    /// Starts the command. Its standard input is inherited unless the command sets it.
    #[must_use]
    #[track_caller]
    pub fn start(command: Command) -> Self {
        Self::start_in(command, Cgroup::new())
    }

    /// Starts the command in this cgroup.
    #[must_use]
    #[track_caller]
    pub fn start_in(mut command: Command, home: Cgroup) -> Self {
        home.run_inside(&mut command);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = must(command.spawn(), format_args!("start {command:?}"));
        let (stdout, stderr) = (PipeReader::from(child.stdout.take()), PipeReader::from(child.stderr.take()));
        Self { child, stdout, stderr, home }
    }

    /// Starts an agent that stops at a step (`fault::point` in the agent's sources) until [`Self::resume`].
    #[must_use]
    #[track_caller]
    pub fn start_stopped_at(mut command: Command, step: &str) -> Self {
        stop_at(&mut command, step, 0);
        let held = Self::start(command);
        wait_for_stop(held.pid(), step);
        held
    }

    /// Resumes an agent that has stopped at a step.
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Starts `sockpolicy exec ARGUMENTS POLICY -- COMMAND`.
    #[must_use]
    #[track_caller]
    pub fn exec(arguments: &[&str], policy: &PolicyFile, command: &[&str]) -> Self {
        Self::start(exec(arguments, policy, command))
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the standard output up to now.
    #[must_use]
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Waits until the standard output has `count` complete lines, and returns these.
    #[track_caller]
    pub fn lines(&mut self, count: usize) -> Vec<String> {
        let lines = |text: &str| text.split_inclusive('\n').filter(|line| line.ends_with('\n')).count();
        let is_there = wait::until(wait::TIMEOUT, || lines(&self.stdout()) >= count);
        assert!(is_there, "fewer than {count} lines: {:?}; standard error: {}", self.stdout(), self.stderr());
        self.stdout().lines().take(count).map(str::to_owned).collect()
    }

    pub fn signal(&self, signal: Signal) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            // Fails only if the process has ended.
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    #[must_use]
    pub fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Closes the standard input of the process if it is a pipe.
    pub fn close_stdin(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Returns the BPF programs and links that the process holds.
    #[must_use]
    pub fn bpf_objects(&self) -> BpfObjects {
        BpfObjects::of(self.pid())
    }

    /// Returns the child processes, with their command lines.
    #[must_use]
    pub fn children(&self) -> Vec<(u32, String)> {
        let pid = self.pid();
        let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let children = list.split_whitespace().filter_map(|pid| pid.parse().ok());
        children.map(|pid| (pid, command_line(pid))).collect()
    }

    /// Returns the only child of [`Self::home`]. Panics if there is not exactly one.
    #[must_use]
    #[track_caller]
    pub fn target(&self) -> PathBuf {
        match self.home.children().as_slice() {
            [only] => self.home.path().join(only),
            others => panic!("expected one cgroup, found {others:?}"),
        }
    }

    /// Waits for the process to end. Panics if it has left a cgroup behind.
    #[track_caller]
    pub fn finish(mut self) -> Output {
        let status = self.wait();
        let left = self.home.children();
        assert!(left.is_empty(), "cgroups left behind: {left:?}; standard error: {}", self.stderr());
        Output { status, stdout: self.stdout.end().into_bytes(), stderr: self.stderr.end().into_bytes() }
    }

    /// Waits for the process to end, even if other processes keep its output open.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let has_ended = wait::until(wait::TIMEOUT, || self.has_ended());
        assert!(has_ended, "the process did not end: {}{}", self.stdout(), self.stderr());
        must(self.child.wait(), "wait for a child")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes an agent stop at a step once it has passed the step `times` times.
pub fn stop_at(agent: &mut Command, step: &str, times: u32) {
    agent.env("SOCKPOLICY_FAULT", format!("{step}:{times}:stop"));
}

/// Waits until the agent has stopped at a step.
#[track_caller]
pub fn wait_for_stop(pid: u32, step: &str) {
    let is_held = wait::until(wait::TIMEOUT, || state(pid) == Some('T') || !is_alive(pid));
    assert!(is_held && is_alive(pid), "the agent did not stop at {step}");
}

/// Returns the command `sockpolicy exec ARGUMENTS POLICY -- COMMAND`, not yet started.
#[must_use]
pub fn exec(arguments: &[&str], policy: &PolicyFile, command: &[&str]) -> Command {
    let mut agent = agent::command(&["exec", agent::ALLOW_UNSUPPORTED]);
    agent.args(arguments).arg(policy.path()).arg("--").args(command);
    agent
}

/// Runs a command to its end.
#[track_caller]
pub fn output(command: Command) -> Output {
    Running::start(command).finish()
}

/// Copies a program. Another process writes the copy: a child that this process forks meanwhile in another thread would inherit
/// a descriptor of a file that this process writes, and executing that file would fail with ETXTBSY (execve(2)).
#[track_caller]
pub fn copy_program(from: impl AsRef<Path>, to: impl AsRef<Path>) {
    let copied = must(Command::new("cp").args([from.as_ref(), to.as_ref()]).status(), "run cp");
    assert!(copied.success(), "cp: {copied}");
}

/// Returns the path of `workload`, a test program for calls and signals that shells cannot make.
#[must_use]
pub fn workload() -> String {
    crate::built_binary("workload").display().to_string()
}

/// Returns the arguments of a process, separated by spaces; empty if the process is gone.
#[must_use]
pub fn command_line(pid: u32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').replace('\0', " ")
}

/// Returns the cgroup of a process from /proc/PID/cgroup; `None` if the process is gone.
#[must_use]
pub fn cgroup_of(pid: u32) -> Option<String> {
    let list = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    list.lines().find_map(|line| line.strip_prefix("0::")).map(str::to_owned)
}

/// Returns whether a process exists and is not a zombie.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    state(pid).is_some_and(|state| !['Z', 'X'].contains(&state))
}

/// Returns whether a process waits for a file lock that another process holds.
#[must_use]
pub fn waits_for_lock(pid: u32) -> bool {
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    // In /proc/locks, a line with an arrow names a waiting process, below the line of the lock.
    let waits = |line: &str| line.contains("->") && line.split_whitespace().any(|word| word == pid.to_string());
    locks.lines().any(waits)
}

/// Returns whether a signal is pending for a process.
#[must_use]
pub fn has_pending(pid: u32, signal: Signal) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let pending = status.lines().find_map(|line| line.strip_prefix("ShdPnd:"));
    let pending = pending.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    pending.is_some_and(|bits| bits & 1 << (signal as u32 - 1) != 0)
}

/// Returns the state letter of a process (proc(5)); `None` if the process is gone.
fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name is in parentheses and can contain any character.
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Reads the report that `--output json --report FILE` has written.
#[must_use]
#[track_caller]
pub fn read_report(path: &str) -> Report {
    let lines = must(fs::read_to_string(path), format_args!("read the report {path}"));
    let output = Output { status: ExitStatus::default(), stdout: Vec::new(), stderr: Vec::new() };
    Report::read(&lines, output)
}

/// Returns a command that runs `command` in a new mount namespace, after the shell script `prepare`.
#[must_use]
pub fn in_mount_namespace(prepare: &str, command: &Command) -> Command {
    let mut outer = Command::new("unshare");
    outer.args(["--mount", "--propagation", "private", "sh", "-c"]);
    outer.arg(format!("{prepare} && exec \"$0\" \"$@\""));
    outer.arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
    outer
}

/// Returns the descriptors of a process, with the targets of their links in /proc/PID/fd.
#[must_use]
pub fn descriptors(pid: u32) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let links = entries.map(|entry| {
        let target = fs::read_link(entry.path()).unwrap_or_else(|_| Path::new("closed").to_owned());
        (entry.file_name().to_string_lossy().into_owned(), target)
    });
    links.collect()
}

/// The output of a process, which a thread reads from a pipe.
#[derive(Debug)]
pub(crate) struct PipeReader {
    text: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl<P: Read + Send + 'static> From<Option<P>> for PipeReader {
    fn from(pipe: Option<P>) -> Self {
        let text = Arc::new(Mutex::new(Vec::new()));
        let reader = pipe.map(|mut pipe| {
            let text = Arc::clone(&text);
            thread::spawn(move || {
                let mut part = [0; 4096];
                while let Ok(len @ 1..) = pipe.read(&mut part) {
                    text.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&part[..len]);
                }
            })
        });
        Self { text, reader }
    }
}

impl PipeReader {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Waits until all processes have closed the pipe.
    #[track_caller]
    pub(crate) fn end(&mut self) -> String {
        let has_ended = wait::until(wait::TIMEOUT, || self.reader.as_ref().is_none_or(JoinHandle::is_finished));
        assert!(has_ended, "a process keeps the output open; output so far: {}", self.text());
        self.text()
    }
}
