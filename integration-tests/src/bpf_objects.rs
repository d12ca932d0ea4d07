//! The BPF programs and links of an agent, and whether the kernel still has them.
//!
//! The ids come from the agent's descriptors while it runs; the ids that still exist come from the kernel's lists.
//! Tests can therefore run in parallel. The kernel does not reuse ids soon (`idr_alloc_cyclic`).

use std::{collections::BTreeSet, fs, io, time::Duration};

use crate::{must, wait};

/// The kernel frees programs and links shortly after the last descriptor is closed.
const DEADLINE: Duration = Duration::from_secs(20);

/// The programs and links of one agent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BpfObjects {
    pub programs: BTreeSet<u32>,
    pub links: BTreeSet<u32>,
}

impl BpfObjects {
    /// Returns the programs and links that the process holds now.
    #[must_use]
    pub fn of(pid: u32) -> Self {
        let ids = |key| numbers(pid, key).into_iter().filter_map(|id| u32::try_from(id).ok()).collect();
        Self { programs: ids("prog_id"), links: ids("link_id") }
    }

    /// Returns the programs and links of these that still exist.
    #[must_use]
    pub fn left(&self) -> Self {
        let programs = ids(libc_bpf::PROG_GET_NEXT_ID);
        let links = ids(libc_bpf::LINK_GET_NEXT_ID);
        Self { programs: &self.programs & &programs, links: &self.links & &links }
    }

    /// Waits until none of them exists.
    #[track_caller]
    pub fn assert_gone(&self) {
        assert!(!self.programs.is_empty(), "the agent held no BPF program: were its policies in force?");
        let is_gone = wait::until(DEADLINE, || self.left() == Self::default());
        assert!(is_gone, "they still exist after the agent ended: {:?}", self.left());
    }
}

/// Returns the ids of the cgroups of the links that a process holds. 0 stands for a removed cgroup.
#[must_use]
pub fn cgroups_of_links(pid: u32) -> BTreeSet<u64> {
    numbers(pid, "cgroup_id")
}

/// Returns the attach types (`enum bpf_attach_type`, include/uapi/linux/bpf.h) of the links that a process holds.
#[must_use]
pub fn attach_types_of_links(pid: u32) -> BTreeSet<u64> {
    numbers(pid, "attach_type")
}

/// Returns the values of a field of /proc/PID/fdinfo, over all descriptors of a process.
fn numbers(pid: u32, key: &str) -> BTreeSet<u64> {
    let entries = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let infos = entries.filter_map(|entry| fs::read_to_string(entry.path()).ok());
    let mut found = BTreeSet::new();
    for info in infos {
        let lines = info.lines().filter_map(|line| line.split_once(':'));
        found.extend(lines.filter(|(name, _)| *name == key).filter_map(|(_, value)| value.trim().parse::<u64>().ok()));
    }
    found
}

/// Commands of bpf(2), which libc does not define (include/uapi/linux/bpf.h).
mod libc_bpf {
    pub(super) const PROG_GET_NEXT_ID: libc::c_int = 11;
    pub(super) const LINK_GET_NEXT_ID: libc::c_int = 31;
}

/// Returns the ids of all programs, or of all links.
fn ids(command: libc::c_int) -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    let mut start = 0;
    while let Some(id) = next_id(command, start) {
        found.insert(id);
        start = id;
    }
    found
}

fn next_id(command: libc::c_int, start: u32) -> Option<u32> {
    // start_id, next_id, open_flags of `union bpf_attr`.
    let mut attributes = [start, 0, 0];
    let len = size_of_val(&attributes);
    // SAFETY: the attributes have the length that is passed, as these commands require.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), len) };
    if result == 0 {
        return Some(attributes[1]);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENOENT) {
        return None;
    }
    must(Err(error), "list BPF programs and links")
}
