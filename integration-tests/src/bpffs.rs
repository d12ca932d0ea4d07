//! The BPF file system, and what instances of sockpolicy leave in it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Once,
};

use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::{
    agent::{self, Build},
    must,
    policy::unique_name,
    process,
};

const PATH: &str = "/sys/fs/bpf";

/// An instance of sockpolicy with persistent policies. Its remains are removed when this value is dropped.
#[derive(Debug)]
pub struct Instance {
    pub name: String,
}

impl Instance {
    /// Returns an instance with a unique name. Mounts the BPF file system at /sys/fs/bpf if it is not mounted; it
    /// stays mounted.
    #[must_use]
    pub fn new() -> Self {
        static MOUNT: Once = Once::new();
        MOUNT.call_once(|| {
            let is_mounted = || statfs(PATH).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC);
            if !is_mounted() {
                must(
                    Command::new("mount").args(["-t", "bpf", "-o", "mode=0700", "bpf", PATH]).status(),
                    "mount a BPF file system",
                );
            }
            assert!(is_mounted(), "no BPF file system is mounted at {PATH}");
        });
        Self { name: unique_name() }
    }

    /// Returns the directory of its pins.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        Path::new(PATH).join("sockpolicy").join(&self.name)
    }

    /// Returns the files that remain of it: pins, a record, a lock.
    #[must_use]
    pub fn left(&self) -> Vec<PathBuf> {
        let run = |kind: &str| Path::new("/run/sockpolicy").join(format!("{}.{kind}", self.name));
        [self.dir(), run("json"), run("lock"), run("new"), run("before")]
            .into_iter()
            .filter(|path| path.exists())
            .collect()
    }

    /// Runs `sockpolicy COMMAND --instance NAME …` to its end.
    #[track_caller]
    pub fn run(&self, command: &str, arguments: &[&str]) -> std::process::Output {
        agent::output(&[&[command, "--instance", &self.name], arguments].concat())
    }

    /// Runs `sockpolicy attach`, which must succeed.
    #[track_caller]
    pub fn attach(&self, policy: &Path) {
        self.attach_by(&Build::under_test(), policy);
    }

    /// Like [`Self::attach`], with another binary.
    #[track_caller]
    pub fn attach_by(&self, build: &Build, policy: &Path) {
        let mut command = build.command(&["attach", "--instance", &self.name, agent::ALLOW_UNSUPPORTED]);
        command.arg(policy);
        let output = process::output(command);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Runs `sockpolicy detach`, which must succeed and leave nothing behind.
    #[track_caller]
    pub fn detach(&self) {
        let output = agent::output(&["detach", "--instance", &self.name]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(self.left().is_empty(), "{:?}", self.left());
    }

    /// Returns the map layouts of its pins.
    #[must_use]
    pub fn layouts(&self) -> Vec<String> {
        let entries = must(fs::read_dir(self.dir()), "list pins");
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }
}

impl Default for Instance {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if !self.left().is_empty() {
            let _ = agent::command(&["detach", "--instance", &self.name]).output();
            for path in self.left() {
                let _ = fs::remove_file(path);
            }
        }
    }
}
