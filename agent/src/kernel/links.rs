//! Links: what holds a program at a hook of a cgroup.
//!
//! aya has links for each type of program, of which some cannot be kept, found again or given another program. This is one
//! for all of them, by bpf(2) itself. They always stand beside each other on a cgroup, and beside those of others.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use aya::programs::{Program, ProgramFd};

use super::{
    KernelError,
    error::{chain, load_reason},
    memlock::Memlock,
    syscall,
};
use crate::{
    compile::Hook,
    host::{cgroup::Cgroup, process},
};

/// Holds a program at a hook, until the last descriptor of it is closed and its path, if it has one, removed.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

impl Link {
    /// Attaches a program that is loaded.
    pub(super) fn attach(program: &Program, hook: Hook, cgroup: &Cgroup) -> Result<Self, KernelError> {
        // The entry of map `TARGETS`, which the kernel makes now, is charged too.
        let _memlock = Memlock::raise();
        let link = syscall::create_link(fd(program, hook)?.as_fd(), hook, &cgroup.folder);
        let link = link.and_then(process::spare_descriptors);
        link.map(Self).map_err(|error| KernelError::Attach { hook, cgroup: cgroup.path.clone(), reason: chain(&error) })
    }

    /// Has a link hold this program, in place of another; `None` where its cgroup is gone, and all sockets of it.
    pub(super) fn take_over(link: OwnedFd, program: &Program, hook: Hook) -> Result<Option<Self>, KernelError> {
        match syscall::update_link(&link, fd(program, hook)?.as_fd()) {
            Ok(()) => Ok(Some(Self(link))),
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(None),
            Err(error) => Err(KernelError::TakeOver { hook, reason: chain(&error) }),
        }
    }

    /// Whether its cgroup is gone, and all sockets of it.
    pub(super) fn is_defunct(&self) -> io::Result<bool> {
        is_defunct(&self.0)
    }
}

pub(super) fn is_defunct(link: &OwnedFd) -> io::Result<bool> {
    Ok(syscall::cgroup_of_link(link)? == Some(0))
}

fn fd(program: &Program, hook: Hook) -> Result<&ProgramFd, KernelError> {
    program.fd().map_err(|error| KernelError::Load { hook, reason: load_reason(&error) })
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
