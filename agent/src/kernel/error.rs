//! What can go wrong between us and the kernel.

use std::{error::Error, io, path::PathBuf};

use aya::programs::ProgramError;

use super::{Backend, ForeignConflict};
use crate::{compile::Hook, escape::Escape, host::private::PrivateError};

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error(
        "not permitted to load BPF programs: this process lacks {missing}\n  help: run it as root, or give it these \
         capabilities"
    )]
    Privileges { missing: String },
    #[error("cannot prepare the BPF programs: {}{}", chain(.0), memory_help(&chain(.0)))]
    Object(#[from] aya::EbpfError),
    #[error("map {map} of the BPF object: {}\n  help: this is a fault of the build: build it anew", chain(.source))]
    Map { map: &'static str, source: aya::maps::MapError },
    #[error("map {map} of the BPF object cannot be mapped into memory: {source}")]
    View { map: &'static str, source: io::Error },
    #[error("cannot tell how many CPUs there can be: {path}: {source}")]
    Cpus { path: &'static str, source: io::Error },
    #[error(
        "cannot open map {map} of the policies in force: operation not permitted\n  help: run it as root, or give it CAP_SYS_ADMIN"
    )]
    MapRights { map: &'static str },
    #[error("the BPF object has no {what}\n  help: this is a fault of the build: build it anew")]
    Incomplete { what: &'static str },
    #[error(
        "this kernel cannot load the program for {hook}: {reason}\n  help: `sockpolicy doctor` shows what this kernel \
         can do; {hook} is known to work from {} on",
        hook.since()
    )]
    Load { hook: Hook, reason: String },
    #[error("cannot attach to {hook} of cgroup {}: {reason}", cgroup.escaped())]
    Attach { hook: Hook, cgroup: PathBuf, reason: String },
    #[error(transparent)]
    Foreign(Box<ForeignConflict>),
    #[error("the iterator over TCP sockets: {reason}")]
    Iterator { reason: String },
    #[error("cannot give the program at {hook} to this agent: {reason}")]
    TakeOver { hook: Hook, reason: String },
    #[error(
        "there is no BPF file system at /sys/fs/bpf, where policies stay that outlive the agent{reason}\n  help: mount -t bpf -o \
         mode=0700 bpf /sys/fs/bpf"
    )]
    NoBpffs { reason: String },
    #[error(transparent)]
    Private(#[from] PrivateError),
    #[error("{}: {source}", path.escaped())]
    Pin { path: PathBuf, source: io::Error },
    #[error(
        "the audit cannot use {backend}: {reason}\n  help: leave out --audit-backend and the best one that this kernel \
         has is taken; `sockpolicy doctor` shows which these are"
    )]
    Backend { backend: Backend, reason: String },
    #[error(
        "the audit found no way to see calls: {reasons}\n  help: mount -t tracefs tracefs /sys/kernel/tracing where that \
         is what is missing; or give --audit-backend none to go without the results of calls"
    )]
    NoBackend { reasons: String },
}

/// An error and its causes, on one line.
pub(super) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        cause = error.source();
    }
    text
}

/// Why a program was not taken: the verifier's last word before its statistics, or the errno.
pub(super) fn load_reason(error: &ProgramError) -> String {
    if let ProgramError::LoadError { io_error, verifier_log } = error {
        let log = verifier_log.to_string();
        let statistics = ["processed ", "verification time", "stack depth"];
        let last = log
            .lines()
            .rfind(|line| !line.trim().is_empty() && !statistics.iter().any(|start| line.starts_with(start)));
        return last.map_or_else(|| io_error.to_string(), |line| format!("{io_error}: {line}"));
    }
    chain(error)
}

/// Capabilities were looked at before: what is left is the memory that a process may have locked.
fn memory_help(reason: &str) -> &'static str {
    if reason.contains("os error 1)") {
        "\n  help: kernels before 5.11 count this as locked memory: give it CAP_SYS_RESOURCE, or raise the limit (ulimit -l \
         unlimited; LimitMEMLOCK=infinity in a unit)"
    } else {
        ""
    }
}
