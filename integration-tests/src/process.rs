//! A child, what it says, and its end: for tests of the command line itself.

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

use crate::{agent, cgroup::Cgroup, must, policy::PolicyFile, report::Report, residue::Residue, wait};

/// A process in a cgroup of its own, its output read as it comes. Killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdout: Spoken,
    stderr: Spoken,
    /// What it is in: sockpolicy makes the cgroups of its commands below it.
    pub home: Cgroup,
}

impl Running {
    /// Starts it, with no standard input unless the command says otherwise.
    #[must_use]
    #[track_caller]
    pub fn start(command: Command) -> Self {
        Self::start_in(command, Cgroup::new())
    }

    /// Starts it in this cgroup.
    #[must_use]
    #[track_caller]
    pub fn start_in(mut command: Command, home: Cgroup) -> Self {
        home.enclose(&mut command);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = must(command.spawn(), format_args!("start {command:?}"));
        let (stdout, stderr) = (Spoken::from(child.stdout.take()), Spoken::from(child.stderr.take()));
        Self { child, stdout, stderr, home }
    }

    /// Starts an agent that stops at a step (`fault::point` in its sources), until it is told to go on.
    #[must_use]
    #[track_caller]
    pub fn start_held(mut command: Command, step: &str) -> Self {
        hold(&mut command, step, 0);
        let held = Self::start(command);
        wait_for_stop(held.pid(), step);
        held
    }

    /// Lets it go on that was held.
    pub fn go_on(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// `sockpolicy exec POLICY -- COMMAND`, with arguments before the policy.
    #[must_use]
    #[track_caller]
    pub fn exec(arguments: &[&str], policy: &PolicyFile, command: &[&str]) -> Self {
        Self::start(exec(arguments, policy, command))
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has said by now.
    #[must_use]
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Waits until it has written this many whole lines to its standard output, and gives these.
    #[track_caller]
    pub fn lines(&mut self, count: usize) -> Vec<String> {
        let lines = |text: &str| text.split_inclusive('\n').filter(|line| line.ends_with('\n')).count();
        let is_there = wait::until(wait::PATIENCE, || lines(&self.stdout()) >= count);
        assert!(is_there, "not {count} lines: {:?}; it complains: {}", self.stdout(), self.stderr());
        self.stdout().lines().take(count).map(str::to_owned).collect()
    }

    pub fn signal(&self, signal: Signal) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            // Fails only where it has ended.
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    #[must_use]
    pub fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Lets its standard input end, if that is a pipe.
    pub fn close_stdin(&mut self) {
        drop(self.child.stdin.take());
    }

    /// What it holds in the kernel.
    #[must_use]
    pub fn held(&self) -> Residue {
        Residue::of(self.pid())
    }

    /// Its children, by their command lines.
    #[must_use]
    pub fn children(&self) -> Vec<(u32, String)> {
        let pid = self.pid();
        let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let children = list.split_whitespace().filter_map(|pid| pid.parse().ok());
        children.map(|pid| (pid, command_line(pid))).collect()
    }

    /// The cgroup below [`Self::home`], where there is exactly one.
    #[must_use]
    #[track_caller]
    pub fn target(&self) -> PathBuf {
        match self.home.children().as_slice() {
            [only] => self.home.path().join(only),
            others => panic!("there are cgroups {others:?}, not one"),
        }
    }

    /// Waits for its end. It must not have left a cgroup behind.
    #[track_caller]
    pub fn finish(mut self) -> Output {
        let status = self.wait();
        let left = self.home.children();
        assert!(left.is_empty(), "cgroups left behind: {left:?}; it said: {}", self.stderr());
        Output { status, stdout: self.stdout.end().into_bytes(), stderr: self.stderr.end().into_bytes() }
    }

    /// Waits for the process to end, however long others keep its output open.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let has_ended = wait::until(wait::PATIENCE, || self.has_ended());
        assert!(has_ended, "it did not end: {}{}", self.stdout(), self.stderr());
        must(self.child.wait(), "wait for a child")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Has an agent stop at a step when it has passed that so many times.
pub fn hold(agent: &mut Command, step: &str, times: u32) {
    agent.env("SOCKPOLICY_FAULT", format!("{step}:{times}:stop"));
}

/// Waits until it has.
#[track_caller]
pub fn wait_for_stop(pid: u32, step: &str) {
    let is_held = wait::until(wait::PATIENCE, || state(pid) == Some('T') || !is_alive(pid));
    assert!(is_held && is_alive(pid), "the agent does not stop at {step}");
}

/// `sockpolicy exec POLICY -- COMMAND`, with arguments before the policy, not started yet.
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

/// The tests' own program with the calls and signals that shells cannot make.
#[must_use]
pub fn workload() -> String {
    crate::built("workload").display().to_string()
}

/// The arguments of a process, with spaces between them; empty if it is gone.
#[must_use]
pub fn command_line(pid: u32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').replace('\0', " ")
}

/// The cgroup of a process, as the kernel names it; `None` if the process is gone.
#[must_use]
pub fn cgroup_of(pid: u32) -> Option<String> {
    let list = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    list.lines().find_map(|line| line.strip_prefix("0::")).map(str::to_owned)
}

/// Whether a process is there and not a zombie.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    state(pid).is_some_and(|state| !['Z', 'X'].contains(&state))
}

/// Whether a process waits for a lock that another has.
#[must_use]
pub fn waits_for_lock(pid: u32) -> bool {
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    // Those who wait stand below who has it, with an arrow.
    let waits = |line: &str| line.contains("->") && line.split_whitespace().any(|word| word == pid.to_string());
    locks.lines().any(waits)
}

/// Whether a signal waits for a process to heed it.
#[must_use]
pub fn has_pending(pid: u32, signal: Signal) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let pending = status.lines().find_map(|line| line.strip_prefix("ShdPnd:"));
    let pending = pending.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    pending.is_some_and(|bits| bits & 1 << (signal as u32 - 1) != 0)
}

/// What a process does, in the letters of proc(5); `None` if it is gone.
fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may contain anything.
    stat.rsplit_once(") ")?.1.chars().next()
}

/// What `--output json --report FILE` left there.
#[must_use]
#[track_caller]
pub fn read_report(path: &str) -> Report {
    let lines = must(fs::read_to_string(path), format_args!("read the report {path}"));
    let output = Output { status: ExitStatus::default(), stdout: Vec::new(), stderr: Vec::new() };
    Report::read(&lines, output)
}

/// Runs in a mount namespace of its own, which a shell script prepares first.
#[must_use]
pub fn with_mounts(prepare: &str, command: &Command) -> Command {
    let mut outer = Command::new("unshare");
    outer.args(["--mount", "--propagation", "private", "sh", "-c"]);
    outer.arg(format!("{prepare} && exec \"$0\" \"$@\""));
    outer.arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
    outer
}

/// What each descriptor of a process is, by number.
#[must_use]
pub fn descriptors(pid: u32) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let links = entries.map(|entry| {
        let target = fs::read_link(entry.path()).unwrap_or_else(|_| Path::new("closed").to_owned());
        (entry.file_name().to_string_lossy().into_owned(), target)
    });
    links.collect()
}

/// What comes out of a pipe, read by a thread.
#[derive(Debug)]
pub(crate) struct Spoken {
    text: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl<P: Read + Send + 'static> From<Option<P>> for Spoken {
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

impl Spoken {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Waits until nobody holds the pipe open.
    #[track_caller]
    pub(crate) fn end(&mut self) -> String {
        let has_ended = wait::until(wait::PATIENCE, || self.reader.as_ref().is_none_or(JoinHandle::is_finished));
        assert!(has_ended, "somebody holds the output open; so far: {}", self.text());
        self.text()
    }
}
