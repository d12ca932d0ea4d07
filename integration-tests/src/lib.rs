//! Fixtures of the integration tests. Each fixture owns the objects that it creates, and removes them when it is
//! dropped.
//!
//! | fixture | what it is |
//! | --- | --- |
//! | [`cgroup::Cgroup`] | a new cgroup below the cgroup2 mount |
//! | [`policy::PolicyFile`] | a policy in a new directory |
//! | [`agent::Exec`] | `sockpolicy exec POLICY -- sockprobe`, with a [`probe::Probe`] that controls sockprobe |
//! | [`agent::Run`] | `sockpolicy run POLICY --cgroup TARGET` |
//! | [`agent::output`] | any other command of sockpolicy, run to its end |
//! | [`agent::Build`] | a binary of the agent |
//! | [`probe::Probe`] | a process that opens sockets and calls setsockopt and getsockopt on request |
//! | [`report::Report`] | the events and the summary that the agent reported |
//! | [`bpf_objects::BpfObjects`] | the BPF programs and links of an agent, and whether the kernel still has them |
//! | [`kernels::Kernel`] | what kernels.toml expects of the running kernel; [`require!`] skips tests by it |
//! | [`differential::CaseSet`] | many combinations of calls, and the outcome of each |
//! | [`process::Running`] | a running command line, with its output and its exit status |
//! | [`terminal::Terminal`] | a process in the foreground of a pseudoterminal |
//! | [`container::Podman`], `Docker`, `BareRuntime` | separate container engines, whose containers each run a probe |
//! | [`bpffs::Instance`] | the name of an instance whose policies stay without an agent |
//! | [`foreign_program::ForeignProgram`] | a BPF program of another owner on a cgroup |
//! | [`impostor::Impostor`] | a user's process that poses as the monitor of a container |
//! | [`wait::until`] | waits until a condition holds |
//!
//! An example of a test:
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
//! Invariants: tests take the value of a socket option from getsockopt in the process that owns the socket, never
//! from the agent's reports. The fixtures share no code with the agent. Tests can run in parallel: each agent works
//! in its own cgroup, and each probe has its own network namespace.

#![expect(clippy::panic, reason = "a failure in a fixture fails the test")]

pub mod agent;
pub mod bpf;
pub mod bpf_objects;
pub mod bpffs;
pub mod cgroup;
pub mod container;
pub mod differential;
pub mod foreign_program;
pub mod impostor;
pub mod kernels;
pub mod options;
pub mod pidfd_sockets;
pub mod policy;
pub mod probe;
pub mod process;
pub mod report;
pub mod script;
pub mod terminal;
pub mod wait;

use std::{fmt::Display, path::PathBuf};

/// Returns the value of `result`. Panics with `cannot WHAT: ERROR` if it is an error.
#[track_caller]
pub(crate) fn must<T, E: Display>(result: Result<T, E>, what: impl Display) -> T {
    result.unwrap_or_else(|error| panic!("cannot {what}: {error}"))
}

/// Panics unless the process runs as root.
#[track_caller]
pub fn require_root() {
    // SAFETY: has no arguments and cannot fail.
    let user = unsafe { libc::geteuid() };
    assert!(user == 0, "these tests attach BPF programs and make cgroups\n  help: run them as root: make integration");
}

/// Returns the path of a binary that cargo has built next to the test binary. Panics if there is none.
#[track_caller]
#[must_use]
pub fn built_binary(name: &str) -> PathBuf {
    let tests = must(std::env::current_exe(), "find the test binary's own path");
    // target/debug/deps/integration-0123456789abcdef, or target/debug/soak
    let dirs = tests.ancestors().skip(1).take(2);
    let path = dirs.map(|dir| dir.join(name)).find(|path| path.is_file()).unwrap_or_else(|| name.into());
    assert!(path.is_file(), "{} is not there\n  help: cargo build --workspace", path.display());
    path
}
