//! An agent with its output, and samples of its memory, descriptors and BPF objects.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, BufRead, BufReader, Read},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use sockpolicy_integration_tests::{bpf_objects::BpfObjects, cgroup::Cgroup, process::descriptors, wait};

/// Counts of an agent's output. The output itself is not kept, because a run takes an hour.
#[derive(Debug, Default)]
pub(crate) struct OutputStats {
    pub(crate) bytes: u64,
    /// Lines by event.
    pub(crate) events: BTreeMap<String, u64>,
    /// Reloads that took effect, and reloads that did not.
    pub(crate) reloads: [u64; 2],
    pub(crate) summary: Value,
    /// The first lines that are not JSON, and the first messages with a panic or control characters.
    pub(crate) wrong: Vec<String>,
    pub(crate) messages: u64,
    is_in_force: bool,
    last_messages: Vec<String>,
}

impl OutputStats {
    fn line(&mut self, line: &str) {
        self.bytes += line.len() as u64 + 1;
        let Ok(value) = serde_json::from_str::<Value>(line) else { return self.record_wrong(line) };
        let event = value["event"].as_str().unwrap_or("none").to_owned();
        if event == "reload" {
            self.reloads[usize::from(value["in_force"] != true)] += 1;
        }
        if event == "summary" {
            self.summary = value;
        }
        *self.events.entry(event).or_insert(0) += 1;
    }

    fn message(&mut self, line: &str) {
        self.bytes += line.len() as u64 + 1;
        self.messages += 1;
        self.is_in_force |= line.contains("in force");
        if line.contains("panicked") || line.chars().any(char::is_control) {
            self.record_wrong(line);
        }
        self.last_messages.push(line.to_owned());
        if self.last_messages.len() > 40 {
            self.last_messages.remove(0);
        }
    }

    fn record_wrong(&mut self, line: &str) {
        if self.wrong.len() < 10 {
            self.wrong.push(line.to_owned());
        }
    }

    pub(crate) fn last_messages(&self) -> String {
        self.last_messages.join("\n")
    }
}

/// A sample of an agent's resources.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) memory_kib: u64,
    pub(crate) descriptors: u64,
    pub(crate) links_and_programs: u64,
}

/// A running agent. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Agent {
    child: Child,
    stats: Arc<Mutex<OutputStats>>,
    readers: Vec<JoinHandle<()>>,
    _home: Cgroup,
}

impl Agent {
    /// Starts `sockpolicy run` with these arguments.
    pub(crate) fn start(arguments: &[&str]) -> io::Result<Self> {
        let home = Cgroup::new();
        let words = [&["run", "--output", "json", "--allow-unsupported"], arguments].concat();
        let mut command: Command = sockpolicy_integration_tests::agent::command(&words);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).env("SOCKPOLICY_LOG", "info");
        home.run_inside(&mut command);
        let mut child = command.spawn()?;
        let stats = Arc::new(Mutex::new(OutputStats::default()));
        let readers = vec![
            read(child.stdout.take(), Arc::clone(&stats), OutputStats::line),
            read(child.stderr.take(), Arc::clone(&stats), OutputStats::message),
        ];
        Ok(Self { child, stats, readers, _home: home })
    }

    pub(crate) fn with_stats<T>(&self, look: impl FnOnce(&OutputStats) -> T) -> T {
        look(&self.stats.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Returns whether its policies have come in force.
    pub(crate) fn is_in_force(&self) -> bool {
        self.with_stats(|stats| stats.is_in_force)
    }

    /// Waits until its policies are in force.
    pub(crate) fn wait_in_force(&mut self) -> io::Result<()> {
        if wait::until(wait::TIMEOUT, || self.is_in_force()) {
            Ok(())
        } else {
            Err(self.failure("did not put policies in force"))
        }
    }

    pub(crate) fn failure(&self, what: &str) -> io::Error {
        io::Error::other(format!("the agent {what}:\n{}", self.with_stats(OutputStats::last_messages)))
    }

    pub(crate) fn signal(&self, signal: Signal) {
        // Fails only if the process has ended.
        let _ = kill(Pid::from_raw(self.child.id() as i32), signal);
    }

    pub(crate) fn sample(&self) -> Sample {
        let pid = self.child.id();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let memory_kib = memory.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0);
        let held = BpfObjects::of(pid);
        let links_and_programs = (held.programs.len() + held.links.len()) as u64;
        Sample { memory_kib, descriptors: descriptors(pid).len() as u64, links_and_programs }
    }

    /// Returns the BPF programs and links that it holds.
    pub(crate) fn bpf_objects(&self) -> BpfObjects {
        BpfObjects::of(self.child.id())
    }

    /// Sends a signal, and waits for the end of the process and of its output.
    pub(crate) fn end(&mut self, signal: Signal) -> io::Result<ExitStatus> {
        self.signal(signal);
        if !wait::until(Duration::from_secs(60), || self.has_ended()) {
            return Err(self.failure("did not end"));
        }
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        self.child.wait()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read<P: Read + Send + 'static>(
    pipe: Option<P>,
    stats: Arc<Mutex<OutputStats>>,
    take: fn(&mut OutputStats, &str),
) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut pipe =
            BufReader::new(pipe.into_iter().fold(Box::new(io::empty()) as Box<dyn Read>, |_, pipe| Box::new(pipe)));
        let mut line = Vec::new();
        while pipe.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
            let text = String::from_utf8_lossy(&line);
            take(&mut stats.lock().unwrap_or_else(PoisonError::into_inner), text.trim_end_matches('\n'));
            line.clear();
        }
    })
}
