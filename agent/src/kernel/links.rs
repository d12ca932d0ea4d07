//! Links: what holds a program at a hook of a cgroup.
//!
//! aya has links for each type of program, of which some cannot be kept, found again or given another program. This is one
//! for all of them, by bpf(2) itself. They always stand beside each other on a cgroup, and beside those of others.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use aya::programs::Program;

use super::{
    KernelError,
    error::{chain, load_reason},
    memlock::Memlock,
    syscall,
};
use crate::{compile::Hook, host::cgroup::Cgroup};

/// Holds a program at a hook, until the last descriptor of it is closed.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

impl Link {
    /// Attaches a program that is loaded.
    pub(super) fn attach(program: &Program, hook: Hook, cgroup: &Cgroup) -> Result<Self, KernelError> {
        // The entry of map `TARGETS`, which the kernel makes now, is charged too.
        let _memlock = Memlock::raise();
        let program = program.fd().map_err(|error| KernelError::Load { hook, reason: load_reason(&error) })?;
        let link = syscall::create_link(program.as_fd(), hook, &cgroup.folder);
        link.map(Self).map_err(|error| KernelError::Attach { hook, cgroup: cgroup.path.clone(), reason: chain(&error) })
    }

    /// Whether its cgroup is gone, and all sockets of it.
    pub(super) fn is_defunct(&self) -> io::Result<bool> {
        Ok(syscall::cgroup_of_link(&self.0)? == 0)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
