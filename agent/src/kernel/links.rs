//! Links, which attach a program to a hook of a cgroup.
//!
//! aya has a type of link for each type of program. Some of these cannot be pinned, opened again or updated with another
//! program. This module has one type for all of them, which uses bpf(2). Links never exclude other programs of the same cgroup.

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

/// Attaches a program to a hook, until the last descriptor of the link is closed and its pin, if any, is removed.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

impl Link {
    /// Attaches a loaded program.
    pub(super) fn attach(program: &Program, hook: Hook, cgroup: &Cgroup) -> Result<Self, KernelError> {
        // The kernel makes the entry of map `sp_targets` now and charges it to locked memory.
        let _memlock = Memlock::raise();
        let link = syscall::create_link(fd(program, hook)?.as_fd(), hook, &cgroup.folder);
        let link = link.and_then(process::spare_descriptors);
        link.map(Self).map_err(|error| KernelError::Attach { hook, cgroup: cgroup.path.clone(), reason: chain(&error) })
    }

    /// Replaces the program of a link; `None` if the cgroup of the link has been removed and all its sockets are closed.
    pub(super) fn take_over(link: OwnedFd, program: &Program, hook: Hook) -> Result<Option<Self>, KernelError> {
        match syscall::update_link(&link, fd(program, hook)?.as_fd()) {
            Ok(()) => Ok(Some(Self(link))),
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(None),
            Err(error) => Err(KernelError::TakeOver { hook, reason: chain(&error) }),
        }
    }

    /// Returns whether the cgroup has been removed and all its sockets are closed.
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
