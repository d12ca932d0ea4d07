//! The agent: a process of the built `sockpolicy`, in a new cgroup.

use std::{
    env,
    ffi::OsStr,
    fs,
    io::{self, BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Arc, Mutex, Once, PoisonError},
    thread::{self, JoinHandle},
};

use nix::{
    sys::signal::{SigHandler, Signal, kill},
    unistd::Pid,
};

use serde_json::Value;

use crate::{
    bpf_objects::BpfObjects,
    built_binary,
    cgroup::Cgroup,
    must,
    policy::{PolicyFile, TempDir},
    probe::{self, Probe},
    process::PipeReader,
    report::Report,
    wait,
};

/// Some kernels of the matrix do not support all settings of the tests' policies. Tests that need a setting check it
/// with `require!`.
pub const ALLOW_UNSUPPORTED: &str = "--allow-unsupported";

/// The text that `run` logs when its policy is in force.
const IN_FORCE: &str = "in force";

/// Returns the path of the agent's binary: SOCKPOLICY_BIN, or the one that cargo has built.
#[must_use]
pub fn program() -> PathBuf {
    reset_signals();
    match env::var_os("SOCKPOLICY_BIN") {
        Some(path) => {
            let path = PathBuf::from(path);
            assert!(path.is_file(), "SOCKPOLICY_BIN is {}, which does not exist", path.display());
            path
        }
        None => built_binary("sockpolicy"),
    }
}

/// Resets the signals that nohup or a shell's `&` makes the tests ignore. Child processes would inherit these
/// dispositions.
fn reset_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM] {
            // SAFETY: sets no handler.
            must(unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) }, "reset a signal");
        }
    });
}

/// Returns the agent's command with these arguments, not yet started.
pub fn command<A: AsRef<OsStr>>(arguments: &[A]) -> Command {
    Build::under_test().command(arguments)
}

/// A binary of the agent.
#[derive(Debug)]
pub struct Build {
    program: PathBuf,
    /// The directory of `program`, if the tests have created it.
    _dir: Option<TempDir>,
}

impl Build {
    /// Returns the binary under test.
    #[must_use]
    pub fn under_test() -> Self {
        Self { program: program(), _dir: None }
    }

    /// Returns a copy of the binary under test, like a package that is reinstalled without a change of the map
    /// layout.
    #[must_use]
    #[track_caller]
    pub fn copy() -> Self {
        Self::with(&must(fs::read(program()), "read the agent's program"))
    }

    /// Returns a copy for which the pinned maps of `layout` have a foreign layout. The layout is a word in the
    /// binary. A copy with another word behaves like a build from other sources.
    #[must_use]
    #[track_caller]
    pub fn with_other_layout(layout: &str) -> Self {
        let mut bytes = must(fs::read(program()), "read the agent's program");
        let other: Vec<u8> = layout.bytes().map(|digit| if digit == b'0' { b'1' } else { b'0' }).collect();
        let mut is_there = false;
        while let Some(place) = find(&bytes, layout.as_bytes()) {
            bytes[place..place + other.len()].copy_from_slice(&other);
            is_there = true;
        }
        assert!(is_there, "the agent's binary does not contain the layout {layout}");
        Self::with(&bytes)
    }

    #[track_caller]
    fn with(program: &[u8]) -> Self {
        let dir = TempDir::new();
        let path = dir.write("sockpolicy", program);
        must(fs::set_permissions(&path, fs::Permissions::from_mode(0o755)), "make a program of a file");
        // Until it calls execve, a child that another test has just forked has this file open for writing.
        let can_be_run = || {
            let output = Command::new(&path).arg("--version").output();
            !output.is_err_and(|error| error.kind() == io::ErrorKind::ExecutableFileBusy)
        };
        assert!(wait::until(wait::TIMEOUT, can_be_run), "{} stays open for writing", path.display());
        Self { program: path, _dir: Some(dir) }
    }

    /// Returns a command of this binary with these arguments, not yet started.
    pub fn command<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).stdin(Stdio::null());
        command
    }
}

/// Runs the agent to its end in a new cgroup. Panics if it leaves a child cgroup behind.
#[track_caller]
pub fn output<A: AsRef<OsStr>>(arguments: &[A]) -> Output {
    crate::require_root();
    let home = Cgroup::new();
    let mut command = command(arguments);
    home.run_inside(&mut command);
    let output = must(command.output(), "run the agent");
    assert_no_children(&home);
    output
}

/// Returns the position of `wanted` in `among`.
fn find(among: &[u8], wanted: &[u8]) -> Option<usize> {
    // SAFETY: both lengths are those of the slices.
    let found = unsafe { libc::memmem(among.as_ptr().cast(), among.len(), wanted.as_ptr().cast(), wanted.len()) };
    (!found.is_null()).then(|| found.addr() - among.as_ptr().addr())
}

/// `sockpolicy exec` of a probe.
///
/// Dropping it without [`Exec::finish`] ends it without checks.
#[derive(Debug)]
pub struct Exec {
    pub probe: Probe,
    process: Process,
    /// The cgroup of the agent itself, which is the parent of the target.
    pub home: Cgroup,
    report: PathBuf,
    /// The directory of `report`.
    _dir: TempDir,
    held: BpfObjects,
}

impl Exec {
    /// Starts the agent and the probe. The policy is in force when this returns.
    #[must_use]
    #[track_caller]
    pub fn start(policy: &PolicyFile) -> Self {
        Self::with(policy, &[])
    }

    /// Like [`Self::start`], with more arguments for `exec`.
    #[must_use]
    #[track_caller]
    pub fn with(policy: &PolicyFile, arguments: &[&str]) -> Self {
        crate::require_root();
        let home = Cgroup::new();
        let dir = TempDir::new();
        let report = dir.path.join("report.jsonl");
        let mut command = Command::new(program());
        command.args(["exec", ALLOW_UNSUPPORTED]).args(arguments).args(["--output", "json", "--report"]).arg(&report);
        command.arg(policy.path()).arg("--").arg(probe::program()).stdin(Stdio::piped()).stdout(Stdio::piped());
        home.run_inside(&mut command);
        let mut process = Process::start(command);
        let (input, output) = (process.child.stdin.take(), process.child.stdout.take());
        let probe = match Probe::from_pipes(input, output) {
            Ok(probe) => probe,
            Err(reason) => {
                let status = process.wait();
                panic!("no probe under the agent: {reason}\n{status}: {}", process.stderr());
            }
        };
        let held = BpfObjects::of(process.child.id());
        Self { probe, process, home, report, _dir: dir, held }
    }

    /// Returns the process id of the agent.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// Returns the cgroup of the probe, which is the target.
    #[must_use]
    #[track_caller]
    pub fn target(&self) -> PathBuf {
        match self.home.children().as_slice() {
            [only] => self.home.path().join(only),
            others => panic!("the agent has created {others:?}, not one cgroup"),
        }
    }

    /// Waits until the report contains `text`. Some facts about a process are reported only while it runs.
    #[track_caller]
    pub fn wait_for_report_of(&self, text: &str) {
        let mut lines = String::new();
        let is_there = wait::until(wait::TIMEOUT, || {
            lines = fs::read_to_string(&self.report).unwrap_or_default();
            lines.contains(text)
        });
        assert!(is_there, "no report of {text}:\n{lines}\n{}", self.process.stderr());
    }

    /// Closes the probe's input, waits for the agent to end, and returns the report. Panics if the exit status is not
    /// 0, or if programs, links or cgroups remain.
    #[track_caller]
    pub fn finish(self) -> Report {
        let (status, report) = self.finish_with_status();
        assert!(status.success(), "{status}: {}", String::from_utf8_lossy(&report.output.stderr));
        report
    }

    /// Like [`Self::finish`], for any exit status of the agent.
    #[track_caller]
    pub fn finish_with_status(mut self) -> (ExitStatus, Report) {
        self.probe.end();
        let status = self.process.wait();
        let output = Output { status, stdout: Vec::new(), stderr: self.process.stderr().into_bytes() };
        let lines = fs::read_to_string(&self.report)
            .unwrap_or_else(|error| panic!("no report: {error}\n{status}: {}", self.process.stderr()));
        let report = Report::read(&lines, output);
        self.held.assert_gone();
        assert_no_children(&self.home);
        (status, report)
    }
}

impl Drop for Exec {
    fn drop(&mut self) {
        self.probe.end();
    }
}

/// `sockpolicy run` on a cgroup, or `sockpolicy audit`.
///
/// Dropping it without [`Run::finish`] ends it without checks.
#[derive(Debug)]
pub struct Run {
    process: Process,
    home: Cgroup,
    lines: PipeReader,
    held: BpfObjects,
}

impl Run {
    /// Starts the agent on a target. The policy is in force when this returns.
    #[must_use]
    #[track_caller]
    pub fn start(policy: &PolicyFile, target: &Cgroup) -> Self {
        Self::with(policy, target, &[])
    }

    /// Like [`Self::start`], with more arguments for `run`.
    #[must_use]
    #[track_caller]
    pub fn with(policy: &PolicyFile, target: &Cgroup, arguments: &[&str]) -> Self {
        let target = target.path().display().to_string();
        Self::start_with(policy, &[&["--cgroup", &target], arguments].concat())
    }

    /// Starts `run` with only these arguments. The policy or the arguments name the target.
    #[must_use]
    #[track_caller]
    pub fn start_with(policy: &PolicyFile, arguments: &[&str]) -> Self {
        Self::on_path(policy.path(), arguments)
    }

    /// Like [`Self::start_with`], for a file or a directory of policies.
    #[must_use]
    #[track_caller]
    pub fn on_path(policies: &Path, arguments: &[&str]) -> Self {
        Self::with_build(&Build::under_test(), policies, arguments)
    }

    /// Like [`Self::on_path`], with another binary.
    #[must_use]
    #[track_caller]
    pub fn with_build(build: &Build, policies: &Path, arguments: &[&str]) -> Self {
        let mut command = build.command(&["run", ALLOW_UNSUPPORTED]);
        command.args(arguments).args(["--output", "json"]).arg(policies);
        Self::launch(command)
    }

    /// Starts `sockpolicy audit` with these arguments. It sees calls when this returns.
    #[must_use]
    #[track_caller]
    pub fn audit<A: AsRef<OsStr>>(arguments: &[A]) -> Self {
        let mut command = command(&["audit", "--output", "json"]);
        command.args(arguments);
        Self::launch(command)
    }

    /// Starts `run` through the wrapper command `wrapper`.
    #[must_use]
    #[track_caller]
    pub fn wrapped(wrapper: &[&str], policy: &PolicyFile, arguments: &[&str]) -> Self {
        let mut command = Command::new(wrapper[0]);
        command.args(&wrapper[1..]).arg(program()).args(["run", ALLOW_UNSUPPORTED]).args(arguments);
        command.args(["--output", "json"]).arg(policy.path()).stdin(Stdio::null());
        Self::launch(command)
    }

    #[track_caller]
    fn launch(mut command: Command) -> Self {
        crate::require_root();
        let home = Cgroup::new();
        command.stdout(Stdio::piped()).env("SOCKPOLICY_LOG", "info");
        home.run_inside(&mut command);
        let mut process = Process::start(command);
        let lines = PipeReader::from(process.child.stdout.take());
        let is_in_force = wait::until(wait::TIMEOUT, || process.stderr().contains(IN_FORCE) || process.has_ended());
        assert!(is_in_force && !process.has_ended(), "the policy did not come in force: {}", process.stderr());
        let held = BpfObjects::of(process.child.id());
        Self { home, process, lines, held }
    }

    /// Returns the standard output up to now.
    #[must_use]
    pub fn lines(&self) -> String {
        self.lines.text()
    }

    /// Returns the events of this kind up to now, such as `reload` or `targets`.
    #[must_use]
    pub fn notices(&self, kind: &str) -> Vec<Value> {
        let text = self.lines();
        let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let values = whole.map(|line| must(serde_json::from_str::<Value>(line), line));
        values.filter(|value| value["event"] == kind).collect()
    }

    /// Waits until there are `count` events of this kind, and returns the last of these.
    #[track_caller]
    pub fn notice(&self, kind: &str, count: usize) -> Value {
        let is_there = wait::until(wait::TIMEOUT, || self.notices(kind).len() >= count);
        assert!(is_there, "fewer than {count} events {kind}: {}{}", self.lines(), self.process.stderr());
        self.notices(kind).swap_remove(count - 1)
    }

    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Returns the standard error up to now.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.process.stderr()
    }

    /// Returns the process id of the agent.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// Returns the BPF programs and links that the agent held when its policy came in force.
    #[must_use]
    pub fn bpf_objects(&self) -> &BpfObjects {
        &self.held
    }

    /// Sends SIGTERM, and returns the report. Panics if the exit status is not 0, or if anything remains in the
    /// kernel.
    #[track_caller]
    pub fn finish(self) -> Report {
        self.process.signal(Signal::SIGTERM);
        let (status, report) = self.finish_with_status();
        assert!(status.success(), "{status}: {}", String::from_utf8_lossy(&report.output.stderr));
        report
    }

    /// Waits for the end of an agent whose policies are persistent, and returns its output.
    #[track_caller]
    pub fn wait_for_end(mut self) -> Output {
        let status = self.process.wait();
        let stdout = self.lines.end().into_bytes();
        assert_no_children(&self.home);
        Output { status, stdout, stderr: self.process.stderr().into_bytes() }
    }

    /// Sends SIGTERM to an agent whose policies are persistent, and returns its report.
    #[track_caller]
    pub fn finish_persistent(self) -> Report {
        self.signal(Signal::SIGTERM);
        let output = self.wait_for_end();
        let lines = String::from_utf8_lossy(&output.stdout).into_owned();
        Report::read(&lines, output)
    }

    /// Waits for the end of an agent that something else ends, and returns its status and report.
    #[track_caller]
    pub fn finish_with_status(mut self) -> (ExitStatus, Report) {
        let status = self.process.wait();
        let lines = self.lines.end();
        let output = Output { status, stdout: Vec::new(), stderr: self.process.stderr().into_bytes() };
        let report = Report::read(&lines, output);
        self.held.assert_gone();
        assert_no_children(&self.home);
        (status, report)
    }
}

#[track_caller]
fn assert_no_children(home: &Cgroup) {
    let left = home.children();
    assert!(left.is_empty(), "the agent left cgroups behind: {left:?}");
}

/// A child process with its standard error. Ended when dropped.
#[derive(Debug)]
struct Process {
    child: Child,
    stderr: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Process {
    #[track_caller]
    fn start(mut command: Command) -> Self {
        let mut child = must(command.stderr(Stdio::piped()).spawn(), "start the agent");
        let stderr = Arc::new(Mutex::new(String::new()));
        let reader = child.stderr.take().map(|pipe| {
            let stderr = Arc::clone(&stderr);
            thread::spawn(move || {
                for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                    let mut text = stderr.lock().unwrap_or_else(PoisonError::into_inner);
                    text.push_str(&line);
                    text.push('\n');
                }
            })
        });
        Self { child, stderr, reader }
    }

    fn stderr(&self) -> String {
        self.stderr.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    fn signal(&self, signal: Signal) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            // Fails only if the process has ended.
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    /// Waits for the process to end, and for the end of its standard error.
    #[track_caller]
    fn wait(&mut self) -> ExitStatus {
        let has_ended = wait::until(wait::TIMEOUT, || self.has_ended());
        assert!(has_ended, "the agent did not end: {}", self.stderr());
        let status = must(self.child.wait(), "wait for the agent");
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        status
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.has_ended() {
            self.signal(Signal::SIGTERM);
            wait::until(std::time::Duration::from_secs(5), || self.has_ended());
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}
