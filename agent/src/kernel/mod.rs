//! The kernel side, from user space: loads the programs, fills their maps, attaches them, and reads their records. The only
//! module that uses aya.
//!
//! It does not know policies: its input is a [`crate::compile::Desired`].
//!
//! Invariant: policies are in force as a whole or not at all. Programs are attached while their configuration is inert, and the
//! last step of [`Object::enable`] activates all of them at once. File descriptors of this process hold all objects, so
//! policies end with the process, unless they are pinned ([`Pins`]).

mod attach_conflict;
mod attached;
mod audit;
mod error;
mod exempt;
mod foreign_programs;
mod kernel_info;
mod layout;
mod links;
mod live;
mod loader;
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
    error::{KernelError, os_error},
    exempt::{governed_inspector, inspector},
    foreign_programs::{ForeignProgram, RunOrder, foreign_programs, overriding_programs},
    live::{ITERATOR_SINCE, Job, Outcomes, SocketIter},
    loader::ProgramSize,
    object::{AuditConfig, FilledTables, Object, Record, Staged},
    observe::{MapIds, Observed},
    pins::{Pins, is_instance_name},
    probe::{Answer, Probed, audit_backends, hooks, iterator},
};

use std::sync::LazyLock;

use crate::host::{cgroup::Cgroup, lsm, privileges, process};

/// A cgroup to whose subtree policies apply.
#[derive(Debug)]
pub struct Target {
    pub cgroup: Cgroup,
    /// The scope that is in force there: an index of [`crate::compile::Desired::scopes`].
    pub scope: usize,
    /// Whether the cgroup is a target only because it is one of another instance, below an own target.
    pub is_boundary: bool,
}

/// Returns the names of the targets' cgroups, without boundaries.
#[must_use]
pub fn names(targets: &[Target]) -> Vec<&str> {
    own(targets).map(|target| target.cgroup.name.as_str()).collect()
}

fn own(targets: &[Target]) -> impl Iterator<Item = &Target> {
    targets.iter().filter(|target| !target.is_boundary)
}

/// Returns the names of the targets' cgroups, each with the index of its scope, without boundaries.
#[must_use]
pub fn names_and_scopes(targets: &[Target]) -> Vec<(String, usize)> {
    own(targets).map(|target| (target.cgroup.name.clone(), target.scope)).collect()
}

/// Returns the names of the cgroups of boundaries, each with the index of its scope.
#[must_use]
pub fn boundaries(targets: &[Target]) -> Vec<(String, usize)> {
    let boundaries = targets.iter().filter(|target| target.is_boundary);
    boundaries.map(|target| (target.cgroup.name.clone(), target.scope)).collect()
}

/// Returns whether a program at an LSM hook would run here: the BPF LSM is active, and the kernel lets this process load
/// programs of this kind. Without the capabilities to load programs, only checks the former.
#[must_use]
pub fn takes_lsm_programs() -> bool {
    static TAKES: LazyLock<bool> = LazyLock::new(|| {
        let lacks_rights = check_privileges().is_err();
        lsm::is_bpf_active() && (lacks_rights || syscall::check_tracing().is_ok())
    });
    *TAKES
}

/// Checks the capabilities of this process.
///
/// # Errors
///
/// Names the capabilities that are missing.
pub fn check_privileges() -> Result<(), KernelError> {
    match privileges::missing_capabilities() {
        Some(missing) if !missing.is_empty() => Err(KernelError::Privileges { missing: missing.join(", ") }),
        // If the capabilities are unknown, the kernel will report missing ones.
        _ => Ok(()),
    }
}

/// The fewest open files with which one target can have all hooks: about 170 are used.
const DESCRIPTORS_NEEDED: u64 = 256;

/// Checks the limit of open files of this process.
fn check_descriptor_limit() -> Result<(), KernelError> {
    match process::descriptor_limit() {
        Some(limit) if limit < DESCRIPTORS_NEEDED => {
            Err(KernelError::DescriptorLimit { limit, needed: DESCRIPTORS_NEEDED })
        }
        // If the limit is unknown, the kernel will report that it is too low.
        _ => Ok(()),
    }
}

/// Removes the optional hooks that this host does not have.
pub fn leave_out_absent_hooks(desired: &mut crate::compile::Desired) {
    if !takes_lsm_programs() {
        desired.keep_hooks(|hook| hook != crate::compile::Hook::PostCreate);
    }
}
