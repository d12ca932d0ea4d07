//! The processes that work under policies, each in a cgroup of its own.

use std::{
    collections::BTreeMap,
    env,
    io::{self, Read},
    process::{Child, Command, Stdio},
    thread::{self, JoinHandle},
};

use sockpolicy_integration_tests::{cgroup::Cgroup, wait};

use crate::work::WORK;

/// What a worker has counted, and what it has said beside that.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) counts: BTreeMap<String, u64>,
    pub(crate) lines: String,
}

/// A `soak work KIND`. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) kind: &'static str,
    /// The policy that governs its cgroup.
    pub(crate) policy: &'static str,
    child: Child,
    reader: Option<JoinHandle<String>>,
    _cgroup: Cgroup,
}

impl Worker {
    /// Starts one. A script may prepare it, which becomes the worker by `exec "$@"`.
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
        cgroup.enclose(&mut command);
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

    /// This one, if it has ended.
    pub(crate) fn ended(&mut self) -> Option<&Self> {
        self.has_ended().then_some(self)
    }

    /// Has it end, and gives its counts.
    pub(crate) fn end(mut self) -> io::Result<Outcome> {
        drop(self.child.stdin.take());
        if !wait::until(wait::PATIENCE, || self.has_ended()) {
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
