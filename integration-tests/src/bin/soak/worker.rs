//! The processes that work under policies, each in its own cgroup.

use std::{
    collections::BTreeMap,
    env,
    io::{self, Read},
    process::{Child, Command, Stdio},
    thread::{self, JoinHandle},
};

use sockpolicy_integration_tests::{cgroup::Cgroup, wait};

use crate::work::WORK;

/// The counters of a worker, and the rest of its output.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) counts: BTreeMap<String, u64>,
    pub(crate) lines: String,
}

/// A process `soak work KIND`. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) kind: &'static str,
    /// The policy that covers its cgroup.
    pub(crate) policy: &'static str,
    child: Child,
    reader: Option<JoinHandle<String>>,
    _cgroup: Cgroup,
}

impl Worker {
    /// Starts a worker. A shell script can prepare it; the script becomes the worker with `exec "$@"`.
    pub(crate) fn start(
        kind: &'static str,
        policy: &'static str,
        cgroup: Cgroup,
        script: Option<&str>,
    ) -> io::Result<Self> {
        let program = env::current_exe()?;
        let mut command = match script {
            None => Command::new(&program),
            Some(script) => {
                let mut command = Command::new("unshare");
                command.args(["--net", "sh", "-c", script, "sh"]).arg(&program);
                command
            }
        };
        command.args([WORK, kind]).stdin(Stdio::piped()).stdout(Stdio::piped());
        cgroup.run_inside(&mut command);
        let mut child = command.spawn()?;
        let reader = child.stdout.take().map(|mut pipe| {
            thread::spawn(move || {
                let mut text = String::new();
                let _ = pipe.read_to_string(&mut text);
                text
            })
        });
        Ok(Self { kind, policy, child, reader, _cgroup: cgroup })
    }

    fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Returns `self` if the worker has ended.
    pub(crate) fn ended(&mut self) -> Option<&Self> {
        self.has_ended().then_some(self)
    }

    /// Ends the worker, and returns its counters.
    pub(crate) fn end(mut self) -> io::Result<Outcome> {
        drop(self.child.stdin.take());
        if !wait::until(wait::TIMEOUT, || self.has_ended()) {
            return Err(io::Error::other(format!("{} under {} did not end", self.kind, self.policy)));
        }
        let status = self.child.wait()?;
        let text = self.reader.take().and_then(|reader| reader.join().ok()).unwrap_or_default();
        let (lines, last) = text.trim_end().rsplit_once('\n').unwrap_or(("", text.trim_end()));
        match serde_json::from_str(last) {
            Ok(counts) if status.success() => Ok(Outcome { counts, lines: lines.to_owned() }),
            _ => Err(io::Error::other(format!("{} under {} failed, {status}: {text}", self.kind, self.policy))),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
