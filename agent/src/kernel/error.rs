//! Errors of the kernel side.

use std::{error::Error, io, path::PathBuf};

use aya::{programs::ProgramError, sys::SyscallError};

use super::{Backend, ForeignConflict};
use crate::{compile::Hook, escape::Escape, host::private::PrivateError};

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("cannot load BPF programs: this process lacks {missing}")]
    Privileges { missing: String },
    #[error("cannot load BPF programs: this process can have {limit} open files, and needs {needed}")]
    DescriptorLimit { limit: u64, needed: u64 },
    #[error("cannot prepare the BPF programs: {}", chain(.0))]
    Object(#[from] aya::EbpfError),
    #[error("cannot use BPF map {map}: {}", chain(.source))]
    Map { map: &'static str, source: aya::maps::MapError },
    #[error("cannot duplicate the file descriptor of BPF map {map}: {source}")]
    Duplicate { map: &'static str, source: io::Error },
    #[error("cannot map BPF map {map} into memory: {source}")]
    View { map: &'static str, source: io::Error },
    #[error("cannot read the number of possible CPUs: {path}: {source}")]
    Cpus { path: &'static str, source: io::Error },
    #[error("cannot open BPF map {map} of the policies in force: operation not permitted")]
    MapRights { map: &'static str },
    /// An assumption of the code does not hold: for example, the BPF object lacks a map.
    #[error("internal error: missing {what}")]
    Incomplete { what: &'static str },
    #[error("cannot load the program for {hook}: {reason}")]
    Load { hook: Hook, reason: String },
    #[error("cannot attach to {hook} of cgroup {}: {reason}", cgroup.escaped())]
    Attach { hook: Hook, cgroup: PathBuf, reason: String },
    #[error(transparent)]
    Foreign(Box<ForeignConflict>),
    #[error("cannot iterate over TCP sockets: {reason}")]
    Iterator { reason: String },
    #[error("cannot take over the link at {hook}: {reason}")]
    TakeOver { hook: Hook, reason: String },
    #[error("cannot pin policies: there is no BPF file system at /sys/fs/bpf{reason}")]
    NoBpffs { reason: String },
    #[error("{0}")]
    Private(#[from] PrivateError),
    #[error("cannot use pin {}: {source}", path.escaped())]
    Pin { path: PathBuf, source: io::Error },
    #[error("cannot attach the audit by {backend}: {reason}")]
    Backend { backend: Backend, reason: String },
    #[error("cannot attach the audit: {reasons}")]
    NoBackend { reasons: String },
}

/// Returns an error and its causes, on one line.
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

/// Returns the errno of the first system call that failed, among an error and its causes.
#[must_use]
pub fn os_error(error: &(dyn Error + 'static)) -> Option<i32> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(errno) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(errno);
        }
        cause = error.source();
    }
    None
}

/// Returns the system call that failed, if it is an error of aya or one of its causes.
pub(super) fn failed_call<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a SyscallError> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(failed) = error.downcast_ref() {
            return Some(failed);
        }
        cause = error.source();
    }
    None
}

/// Returns why a program could not be loaded: the errno, and the last line of the verifier's log before its statistics.
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
