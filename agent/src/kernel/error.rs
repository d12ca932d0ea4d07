//! Errors of the kernel side.

use std::{error::Error, io, path::PathBuf};

use aya::{programs::ProgramError, sys::SyscallError};

use super::{Backend, ForeignConflict};
use crate::{compile::Hook, escape::Escape, host::private::PrivateError};

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error(
        "cannot load BPF programs: this process lacks {missing}\n  help: run sockpolicy as root, or give it these \
         capabilities"
    )]
    Privileges { missing: String },
    #[error("cannot prepare the BPF programs: {}{}", chain(.0), memory_help(.0))]
    Object(#[from] aya::EbpfError),
    #[error("cannot use map {map} of the BPF object: {}\n  help: the build is faulty: build sockpolicy again", chain(.source))]
    Map { map: &'static str, source: aya::maps::MapError },
    #[error("cannot map {map} of the BPF object into memory: {source}")]
    View { map: &'static str, source: io::Error },
    #[error("cannot read the number of possible CPUs: {path}: {source}")]
    Cpus { path: &'static str, source: io::Error },
    #[error(
        "cannot open map {map} of the policies in force: operation not permitted\n  help: run sockpolicy as root, or give it CAP_SYS_ADMIN"
    )]
    MapRights { map: &'static str },
    #[error("the BPF object has no {what}\n  help: the build is faulty: build sockpolicy again")]
    Incomplete { what: &'static str },
    #[error(
        "cannot load the program for {hook}: {reason}\n  help: `sockpolicy doctor` shows what this kernel supports; {hook} is \
         known to work from {} on",
        hook.since()
    )]
    Load { hook: Hook, reason: String },
    #[error("cannot attach to {hook} of cgroup {}: {reason}", cgroup.escaped())]
    Attach { hook: Hook, cgroup: PathBuf, reason: String },
    #[error(transparent)]
    Foreign(Box<ForeignConflict>),
    #[error("cannot iterate over TCP sockets: {reason}")]
    Iterator { reason: String },
    #[error("cannot take over the link at {hook}: {reason}")]
    TakeOver { hook: Hook, reason: String },
    #[error(
        "cannot pin policies: there is no BPF file system at /sys/fs/bpf{reason}\n  help: mount -t bpf -o mode=0700 bpf /sys/fs/bpf"
    )]
    NoBpffs { reason: String },
    #[error(transparent)]
    Private(#[from] PrivateError),
    #[error("{}: {source}", path.escaped())]
    Pin { path: PathBuf, source: io::Error },
    #[error(
        "cannot attach the audit by {backend}: {reason}\n  help: leave out --audit-backend to use the best backend that this \
         kernel supports; `sockpolicy doctor` lists them"
    )]
    Backend { backend: Backend, reason: String },
    #[error(
        "cannot attach the audit: {reasons}\n  help: if tracefs is missing, mount -t tracefs tracefs /sys/kernel/tracing; or \
         give --audit-backend none to report conflicts without the results of calls"
    )]
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
fn os_error(error: &(dyn Error + 'static)) -> Option<i32> {
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

/// Returns the help for EPERM. Capabilities have been checked before, so the cause is the limit of locked memory.
fn memory_help(error: &(dyn Error + 'static)) -> &'static str {
    if os_error(error) == Some(libc::EPERM) {
        "\n  help: kernels before 5.11 count this as locked memory: give it CAP_SYS_RESOURCE, or raise the limit (ulimit -l \
         unlimited; LimitMEMLOCK=infinity in a unit)"
    } else {
        ""
    }
}
