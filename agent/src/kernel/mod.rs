//! The kernel side, from user space: loads the programs, fills their maps, attaches them, reads
//! what they say. The only module that uses aya.
//!
//! It knows no policies: it is handed a [`crate::compile::Desired`].
//!
//! Invariant: nothing is half in force. Programs are attached while their configuration is inert,
//! and the last step of [`Object::enable`] is what makes all of them act at once. Everything is held
//! by file descriptors of this process, so whatever ends it ends the policy, unless it is pinned ([`Pins`]).

mod attach_conflict;
mod attached;
mod audit;
mod error;
mod foreign_programs;
mod kernel_info;
mod layout;
mod links;
mod live;
mod maps;
mod memlock;
mod misses;
mod object;
mod observe;
mod pins;
mod probe;
mod syscall;
mod tables;

pub use self::{
    attach_conflict::{AttachMode, ForeignConflict, conflicts},
    attached::Failed,
    audit::{Audit, Backend, BackendChoice, ProbeResult, candidates},
    error::KernelError,
    foreign_programs::{ForeignProgram, RunOrder, foreign_programs, overriding_programs},
    live::{ITERATOR_SINCE, Job, Outcomes, SocketIter},
    object::{AuditConfig, FilledTables, Object, ProgramSize, Record, Staged},
    observe::{MapIds, Observed},
    pins::Pins,
    probe::{Answer, Probed, audit_backends, hooks, iterator},
};

use std::sync::LazyLock;

use crate::host::{cgroup::Cgroup, lsm, privileges};

/// A cgroup whose subtree is governed and audited.
#[derive(Debug)]
pub struct Target {
    pub cgroup: Cgroup,
    /// What holds there: an index of [`crate::compile::Desired::scopes`].
    pub scope: usize,
}

/// The names of the targets' cgroups.
#[must_use]
pub fn names(targets: &[Target]) -> Vec<&str> {
    targets.iter().map(|target| target.cgroup.name.as_str()).collect()
}

/// The same, each with the number of its scope.
#[must_use]
pub fn names_and_scopes(targets: &[Target]) -> Vec<(String, usize)> {
    targets.iter().map(|target| (target.cgroup.name.clone(), target.scope)).collect()
}

/// Returns whether a program at an LSM hook would run here: the BPF LSM is active, and the kernel lets this process load programs of
/// this kind. Without the capabilities for that only the first is asked.
#[must_use]
pub fn takes_lsm_programs() -> bool {
    static TAKES: LazyLock<bool> = LazyLock::new(|| {
        let lacks_rights = check_privileges().is_err();
        lsm::is_bpf_active() && (lacks_rights || syscall::check_tracing().is_ok())
    });
    *TAKES
}

/// Whether this process may do what it is about to do, as far as its capabilities say.
///
/// # Errors
///
/// Names the capabilities that are missing.
pub fn check_privileges() -> Result<(), KernelError> {
    match privileges::missing_capabilities() {
        Some(missing) if !missing.is_empty() => Err(KernelError::Privileges { missing: missing.join(", ") }),
        // Where they cannot be told, the kernel will say.
        _ => Ok(()),
    }
}
