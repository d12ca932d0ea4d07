//! Fixtures of the integration tests: each owns what it makes and removes it when dropped.
//!
//! | fixture | is |
//! | --- | --- |
//! | [`cgroup::Cgroup`] | a cgroup of our own below the cgroup2 mount |
//! | [`policy::PolicyFile`] | a policy in a folder of its own |
//! | [`agent::Exec`] | `sockpolicy exec POLICY -- sockprobe`, with the [`probe::Probe`] to talk to |
//! | [`agent::Run`] | `sockpolicy run POLICY --cgroup TARGET` |
//! | [`agent::output`] | any other command, to its end |
//! | [`agent::Build`] | another build of the agent |
//! | [`probe::Probe`] | a process that opens sockets and calls setsockopt and getsockopt as it is told |
//! | [`report::Report`] | what the agent reported: events and the summary |
//! | [`residue::Residue`] | the BPF programs and links of an agent, and whether they are gone |
//! | [`kernels::Kernel`] | what kernels.toml expects of this kernel; [`require!`] skips by it |
//! | [`product::Product`] | calls of many kinds, and what came of each |
//! | [`process::Running`] | any command line, what it says and how it ends |
//! | [`terminal::Terminal`] | the same in the foreground of a terminal |
//! | [`container::Podman`], `Docker`, `Alone` | engines of our own, and their containers, each with a probe in it |
//! | [`bpffs::Instance`] | a name under which policies stay in force without an agent |
//! | [`foreign::Foreign`] | somebody else's program on a cgroup |
//! | [`impostor::Impostor`] | a user's process that poses as one that watches a container |
//! | [`wait::until`] | waiting for something to become true |
//!
//! A test is then:
//!
//! ```no_run
//! use sockpolicy_integration_tests::{agent::Exec, options::TCP_NODELAY, policy::PolicyFile, script::{Family, Kind}};
//!
//! let policy = PolicyFile::new("[[rule]]\nset = { TCP_NODELAY = true }\n");
//! let mut exec = Exec::start(&policy);
//! let socket = exec.probe.open(Family::Inet, Kind::Tcp);
//! exec.probe.set(socket, TCP_NODELAY, 0).unwrap();
//! assert_eq!(exec.probe.int(socket, TCP_NODELAY), 1);
//! let report = exec.finish(); // also: exit status 0, no program, link or cgroup left
//! assert_eq!(report.conflict("TCP_NODELAY").verdict.as_deref(), Some("rewritten"));
//! ```
//!
//! Invariants: what a socket has is what its owning process is told by getsockopt, never what the
//! agent says; the fixtures share no code with the agent. Tests may run at the same time: every
//! agent has a cgroup of its own to work in, and every probe a network namespace.

#![expect(clippy::panic, reason = "what fails in a fixture fails the test")]

pub mod agent;
pub mod bpf;
pub mod bpffs;
pub mod cgroup;
pub mod container;
pub mod foreign;
pub mod impostor;
pub mod kernels;
pub mod options;
pub mod policy;
pub mod probe;
pub mod process;
pub mod product;
pub mod report;
pub mod residue;
pub mod script;
pub mod taken;
pub mod terminal;
pub mod wait;

use std::{fmt::Display, path::PathBuf};

/// The value, or the end of the test.
#[track_caller]
pub(crate) fn must<T, E: Display>(result: Result<T, E>, what: impl Display) -> T {
    result.unwrap_or_else(|error| panic!("cannot {what}: {error}"))
}

/// Ends the test unless it may do as it likes.
#[track_caller]
pub fn require_root() {
    // SAFETY: has no arguments and cannot fail.
    let user = unsafe { libc::geteuid() };
    assert!(user == 0, "these tests attach BPF programs and make cgroups\n  help: run them as root: make integration");
}

/// A binary that cargo has built beside the tests'.
#[track_caller]
#[must_use]
pub fn built(name: &str) -> PathBuf {
    let tests = must(std::env::current_exe(), "find the test binary's own path");
    // target/debug/deps/integration-0123456789abcdef, or target/debug/soak
    let folders = tests.ancestors().skip(1).take(2);
    let path = folders.map(|folder| folder.join(name)).find(|path| path.is_file()).unwrap_or_else(|| name.into());
    assert!(path.is_file(), "{} is not there\n  help: cargo build --workspace", path.display());
    path
}
