//! The agent: a process of the built `sockpolicy`, in a cgroup of its own.

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
    built,
    cgroup::Cgroup,
    must,
    policy::{Folder, PolicyFile},
    probe::{self, Probe},
    process::Spoken,
    report::Report,
    residue::Residue,
    wait,
};

/// Kernels of the matrix lack some of what policies of tests say; what a test cannot do without it requires (`require!`).
pub const ALLOW_UNSUPPORTED: &str = "--allow-unsupported";

/// What `run` logs when its policy is in force.
const IN_FORCE: &str = "in force";

/// The agent's program: SOCKPOLICY_BIN, or what cargo has built.
#[must_use]
pub fn program() -> PathBuf {
    heed_signals();
    match env::var_os("SOCKPOLICY_BIN") {
        Some(path) => {
            let path = PathBuf::from(path);
            assert!(path.is_file(), "SOCKPOLICY_BIN is {}, which is not there", path.display());
            path
        }
        None => built("sockpolicy"),
    }
}

/// Has what the tests start heed every signal, whatever nohup or a shell's `&` has had the tests ignore.
fn heed_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM] {
            // SAFETY: sets no handler.
            must(unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) }, "heed a signal");
        }
    });
}

/// The agent with these arguments, not started yet.
pub fn command<A: AsRef<OsStr>>(arguments: &[A]) -> Command {
    Build::ours().command(arguments)
}

/// A build of the agent.
#[derive(Debug)]
pub struct Build {
    program: PathBuf,
    /// Where `program` is, if it is one of the tests' own.
    _folder: Option<Folder>,
}

impl Build {
    /// The one that is tested.
    #[must_use]
    pub fn ours() -> Self {
        Self { program: program(), _folder: None }
    }

    /// The same in another file, as a package that is installed anew without a change of layout.
    #[must_use]
    #[track_caller]
    pub fn copy() -> Self {
        Self::with(&must(fs::read(program()), "read the agent's program"))
    }

    /// One for which all that is pinned of `layout`, which is ours, is another's. The layout is a word in the program, from
    /// sources of which nothing else can be told: with another one it is what a build from other sources is.
    #[must_use]
    #[track_caller]
    pub fn of_another_layout(layout: &str) -> Self {
        let mut bytes = must(fs::read(program()), "read the agent's program");
        let other: Vec<u8> = layout.bytes().map(|digit| if digit == b'0' { b'1' } else { b'0' }).collect();
        let mut is_there = false;
        while let Some(place) = find(&bytes, layout.as_bytes()) {
            bytes[place..place + other.len()].copy_from_slice(&other);
            is_there = true;
        }
        assert!(is_there, "layout {layout} does not stand in the agent's program");
        Self::with(&bytes)
    }

    #[track_caller]
    fn with(program: &[u8]) -> Self {
        let folder = Folder::new();
        let path = folder.write("sockpolicy", program);
        must(fs::set_permissions(&path, fs::Permissions::from_mode(0o755)), "make a program of a file");
        // A child that another test has just forked has it open to be written until it becomes another program.
        let can_be_run = || {
            let output = Command::new(&path).arg("--version").output();
            !output.is_err_and(|error| error.kind() == io::ErrorKind::ExecutableFileBusy)
        };
        assert!(wait::until(wait::PATIENCE, can_be_run), "{} stays open to be written", path.display());
        Self { program: path, _folder: Some(folder) }
    }

    /// It with these arguments, not started yet.
    pub fn command<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).stdin(Stdio::null());
        command
    }
}

/// Runs the agent to its end, in a cgroup of its own that must be empty afterwards.
#[track_caller]
pub fn output<A: AsRef<OsStr>>(arguments: &[A]) -> Output {
    crate::require_root();
    let home = Cgroup::new();
    let mut command = command(arguments);
    home.enclose(&mut command);
    let output = must(command.output(), "run the agent");
    assert_no_children(&home);
    output
}

/// Where bytes stand among others.
fn find(among: &[u8], wanted: &[u8]) -> Option<usize> {
    // SAFETY: as many bytes as there are of each.
    let found = unsafe { libc::memmem(among.as_ptr().cast(), among.len(), wanted.as_ptr().cast(), wanted.len()) };
    (!found.is_null()).then(|| found.addr() - among.as_ptr().addr())
}

/// `sockpolicy exec` of a probe.
///
/// Dropped without [`Exec::finish`], it is ended and nothing is checked.
#[derive(Debug)]
pub struct Exec {
    pub probe: Probe,
    process: Process,
    /// The cgroup that the agent itself is in: the parent of the target's.
    pub home: Cgroup,
    report: PathBuf,
    /// Where `report` is.
    _folder: Folder,
    held: Residue,
}

impl Exec {
    /// Starts the agent and the probe under a policy, which is in force when this returns.
    #[must_use]
    #[track_caller]
    pub fn start(policy: &PolicyFile) -> Self {
        Self::with(policy, &[])
    }

    /// The same with more arguments for `exec`.
    #[must_use]
    #[track_caller]
    pub fn with(policy: &PolicyFile, arguments: &[&str]) -> Self {
        crate::require_root();
        let home = Cgroup::new();
        let folder = Folder::new();
        let report = folder.path.join("report.jsonl");
        let mut command = Command::new(program());
        command.args(["exec", ALLOW_UNSUPPORTED]).args(arguments).args(["--output", "json", "--report"]).arg(&report);
        command.arg(policy.path()).arg("--").arg(probe::program()).stdin(Stdio::piped()).stdout(Stdio::piped());
        home.enclose(&mut command);
        let mut process = Process::start(command);
        let (input, output) = (process.child.stdin.take(), process.child.stdout.take());
        let probe = match Probe::of(input, output) {
            Ok(probe) => probe,
            Err(reason) => {
                let status = process.wait();
                panic!("no probe under the agent: {reason}\n{status}: {}", process.stderr());
            }
        };
        let held = Residue::of(process.child.id());
        Self { probe, process, home, report, _folder: folder, held }
    }

    /// The agent's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// The cgroup of the probe, which is the target.
    #[must_use]
    #[track_caller]
    pub fn target(&self) -> PathBuf {
        match self.home.children().as_slice() {
            [only] => self.home.path().join(only),
            others => panic!("the agent has made {others:?}, not one cgroup"),
        }
    }

    /// Waits until the agent has reported a line that contains `text`. What the agent says of a
    /// process is only complete while that runs.
    #[track_caller]
    pub fn wait_for_report_of(&self, text: &str) {
        let mut lines = String::new();
        let is_there = wait::until(wait::PATIENCE, || {
            lines = fs::read_to_string(&self.report).unwrap_or_default();
            lines.contains(text)
        });
        assert!(is_there, "no report of {text}:\n{lines}\n{}", self.process.stderr());
    }

    /// Lets the probe end, and gives the report once the agent has ended too: with the probe's
    /// status, and leaving nothing behind.
    #[track_caller]
    pub fn finish(self) -> Report {
        let (status, report) = self.finish_with_status();
        assert!(status.success(), "{status}: {}", String::from_utf8_lossy(&report.output.stderr));
        report
    }

    /// The same, whatever the agent's exit status.
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
/// Dropped without [`Run::finish`], it is ended and nothing is checked.
#[derive(Debug)]
pub struct Run {
    process: Process,
    home: Cgroup,
    lines: Spoken,
    held: Residue,
}

impl Run {
    /// Starts the agent with a policy on a target, where it is in force when this returns.
    #[must_use]
    #[track_caller]
    pub fn start(policy: &PolicyFile, target: &Cgroup) -> Self {
        Self::with(policy, target, &[])
    }

    /// The same with more arguments for `run`.
    #[must_use]
    #[track_caller]
    pub fn with(policy: &PolicyFile, target: &Cgroup, arguments: &[&str]) -> Self {
        let target = target.path().display().to_string();
        Self::started(policy, &[&["--cgroup", &target], arguments].concat())
    }

    /// With these arguments only: the policy names its target, or they do.
    #[must_use]
    #[track_caller]
    pub fn started(policy: &PolicyFile, arguments: &[&str]) -> Self {
        Self::of(policy.path(), arguments)
    }

    /// The same of a file or a folder of policies.
    #[must_use]
    #[track_caller]
    pub fn of(policies: &Path, arguments: &[&str]) -> Self {
        Self::by(&Build::ours(), policies, arguments)
    }

    /// The same by another build.
    #[must_use]
    #[track_caller]
    pub fn by(build: &Build, policies: &Path, arguments: &[&str]) -> Self {
        let mut command = build.command(&["run", ALLOW_UNSUPPORTED]);
        command.args(arguments).args(["--output", "json"]).arg(policies);
        Self::launch(command)
    }

    /// `sockpolicy audit` with these arguments, which sees calls when this returns.
    #[must_use]
    #[track_caller]
    pub fn audit<A: AsRef<OsStr>>(arguments: &[A]) -> Self {
        let mut command = command(&["audit", "--output", "json"]);
        command.args(arguments);
        Self::launch(command)
    }

    /// `run` of a policy, started by a program with these arguments, which runs what follows them.
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
        home.enclose(&mut command);
        let mut process = Process::start(command);
        let lines = Spoken::from(process.child.stdout.take());
        let is_in_force = wait::until(wait::PATIENCE, || process.stderr().contains(IN_FORCE) || process.has_ended());
        assert!(is_in_force && !process.has_ended(), "the policy did not come in force: {}", process.stderr());
        let held = Residue::of(process.child.id());
        Self { home, process, lines, held }
    }

    /// What it has reported by now.
    #[must_use]
    pub fn lines(&self) -> String {
        self.lines.text()
    }

    /// What it has said of this kind beside events by now: `reload` or `targets`.
    #[must_use]
    pub fn notices(&self, kind: &str) -> Vec<Value> {
        let text = self.lines();
        let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let values = whole.map(|line| must(serde_json::from_str::<Value>(line), line));
        values.filter(|value| value["event"] == kind).collect()
    }

    /// Waits until it has said so many, and gives the last of these.
    #[track_caller]
    pub fn notice(&self, kind: &str, count: usize) -> Value {
        let is_there = wait::until(wait::PATIENCE, || self.notices(kind).len() >= count);
        assert!(is_there, "not {count} of {kind}: {}{}", self.lines(), self.process.stderr());
        self.notices(kind).swap_remove(count - 1)
    }

    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// What it has complained of by now.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.process.stderr()
    }

    /// The agent's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// What the agent holds in the kernel.
    #[must_use]
    pub fn held(&self) -> &Residue {
        &self.held
    }

    /// Ends the agent with SIGTERM, and gives its report: status 0, and nothing left behind.
    #[track_caller]
    pub fn finish(self) -> Report {
        self.process.signal(Signal::SIGTERM);
        let (status, report) = self.finish_with_status();
        assert!(status.success(), "{status}: {}", String::from_utf8_lossy(&report.output.stderr));
        report
    }

    /// Waits for the end of an agent whose policies stay in force. Gives its output.
    #[track_caller]
    pub fn wait_for_end(mut self) -> Output {
        let status = self.process.wait();
        let stdout = self.lines.end().into_bytes();
        assert_no_children(&self.home);
        Output { status, stdout, stderr: self.process.stderr().into_bytes() }
    }

    /// Ends an agent whose policies stay in force with SIGTERM, and gives its report.
    #[track_caller]
    pub fn finish_and_stay(self) -> Report {
        self.signal(Signal::SIGTERM);
        let output = self.wait_for_end();
        let lines = String::from_utf8_lossy(&output.stdout).into_owned();
        Report::read(&lines, output)
    }

    /// Waits for the agent's end, which somebody else has brought about.
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

/// A child and what it says on standard error. Ended when dropped.
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
            // Fails only where it has ended.
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    /// Waits for the end, of the process and of what it says.
    #[track_caller]
    fn wait(&mut self) -> ExitStatus {
        let has_ended = wait::until(wait::PATIENCE, || self.has_ended());
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
