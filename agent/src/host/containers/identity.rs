//! Who a process is to the kernel. Its name and its arguments are its own choice; these facts are not.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _},
        unix::fs::MetadataExt as _,
    },
};

use super::processes::{CONMON, Kind, SHIM};

/// Who a watcher is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Identity {
    /// Root of the initial user namespace, with all that root can do: what it says of containers is believed.
    Root,
    /// A user. What he says counts for cgroups that belong to him.
    Tenant {
        uid: u32,
        gid: u32,
        /// The user of the initial user namespace who is behind it: a user can have thousands of subordinate uids.
        account: u32,
    },
    /// Nobody whose word counts: root in a container, or a process that changes its user.
    Nobody,
    /// Must not be looked into by this process.
    Hidden,
}

impl Identity {
    pub(super) fn of(pid: u32, kind: Kind) -> Self {
        let Some(status) = Status::read(pid) else { return Self::Nobody };
        match (status.uids, outermost_owner(pid)) {
            (_, Err(error)) if error.kind() == io::ErrorKind::PermissionDenied => Self::Hidden,
            ([0, 0, 0, 0], Ok(None)) if status.is_privileged() && runs(pid, kind) => Self::Root,
            // Root of a container can be uid 0 of the initial user namespace too. Root owns most cgroups, and not for him.
            (_, Err(_)) | ([0, ..], _) => Self::Nobody,
            ([uid, ..], Ok(account)) => match status.only_ids() {
                Some((uid, gid)) => Self::Tenant { uid, gid, account: account.unwrap_or(uid) },
                None => {
                    log::debug!("process {pid} of user {uid} runs with the rights of another user or group");
                    Self::Nobody
                }
            },
        }
    }
}

/// What `/proc/PID/status` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Real, effective, saved and of the file system, as the reader's user namespace has them.
    pub uids: [u32; 4],
    pub gids: [u32; 4],
    /// Effective capabilities.
    pub capabilities: u64,
    /// In each PID namespace, from the reader's inwards: at least one.
    pub numbers: Vec<u32>,
}

impl Status {
    /// A process can be in 65,536 groups, which stand before the capabilities.
    const SIZE_MAX: u64 = 1 << 20;

    pub(super) fn read(pid: u32) -> Option<Self> {
        let mut bytes = Vec::new();
        File::open(format!("/proc/{pid}/status")).ok()?.take(Self::SIZE_MAX).read_to_end(&mut bytes).ok()?;
        Self::parse(&bytes)
    }

    /// Parses proc_pid_status(5). The kernel escapes line ends in the name (`proc_task_name`, fs/proc/array.c).
    #[must_use]
    pub fn parse(status: &[u8]) -> Option<Self> {
        let status = String::from_utf8_lossy(status);
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let numbers = |text: &str| text.split_whitespace().map(str::parse).collect::<Result<Vec<u32>, _>>().ok();
        Some(Self {
            uids: numbers(field("Uid:")?)?.try_into().ok()?,
            gids: numbers(field("Gid:")?)?.try_into().ok()?,
            capabilities: u64::from_str_radix(field("CapEff:")?.trim(), 16).ok()?,
            numbers: numbers(field("NSpid:")?).filter(|numbers| !numbers.is_empty())?,
        })
    }

    /// Returns the uid and the gid, if the process has one of each in all four roles.
    fn only_ids(&self) -> Option<(u32, u32)> {
        let only = |ids: [u32; 4]| Some(ids[0]).filter(|first| ids == [*first; 4]);
        Some((only(self.uids)?, only(self.gids)?))
    }

    /// Whether the process can do what a container runtime must. Root in a container cannot, unless the container is
    /// privileged: root there is root of the host.
    fn is_privileged(&self) -> bool {
        /// include/uapi/linux/capability.h
        const CAP_SYS_ADMIN: u32 = 21;
        self.capabilities & 1 << CAP_SYS_ADMIN != 0
    }
}

/// Whether the program of a process is called like a watcher of this kind. A user can start a set-user-ID program by another
/// name, with arguments of his choice; the kernel's link leads to the program itself.
fn runs(pid: u32, kind: Kind) -> bool {
    let program = fs::read_link(format!("/proc/{pid}/exe")).ok();
    let name = program.as_deref().and_then(|path| path.file_name()?.to_str());
    // Of a program that has been replaced since.
    let name = name.map(|name| name.strip_suffix(" (deleted)").unwrap_or(name));
    name.is_some_and(|name| match kind {
        Kind::Conmon => name == CONMON,
        Kind::Shim => name.starts_with(SHIM),
    })
}

/// Returns the user who made the outermost user namespace that a process is in: `None` for the initial one, which nobody made
/// (ioctl_nsfs(2), Linux 4.11).
fn outermost_owner(pid: u32) -> io::Result<Option<u32>> {
    /// `PROC_USER_INIT_INO` (include/linux/proc_ns.h).
    const INITIAL: u64 = 0xefff_fffd;
    /// `MAX_USER_NS_LEVEL` of the kernel is 32 (kernel/user_namespace.c).
    const DEPTH_MAX: usize = 34;
    const NS_GET_PARENT: libc::c_ulong = 0xb702;
    const NS_GET_OWNER_UID: libc::c_ulong = 0xb704;
    let mut namespace = File::open(format!("/proc/{pid}/ns/user"))?;
    let mut inner = None;
    for _ in 0..DEPTH_MAX {
        if namespace.metadata()?.ino() == INITIAL {
            let Some(inner): Option<File> = inner else { return Ok(None) };
            let mut owner: libc::uid_t = 0;
            // SAFETY: writes a uid to the place that it is given.
            let answer = unsafe { libc::ioctl(inner.as_raw_fd(), NS_GET_OWNER_UID as _, &raw mut owner) };
            return if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(Some(owner)) };
        }
        // SAFETY: takes no more than a descriptor.
        let parent = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_PARENT as _) };
        if parent < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it, for us alone.
        inner = Some(std::mem::replace(&mut namespace, unsafe { File::from_raw_fd(parent) }));
    }
    Err(io::Error::other("too deep"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_says_who_a_process_is() {
        let text = "Name:\tconmon\\nUid:\t0\t0\t0\t0\nState:\tS (sleeping)\nUid:\t1000\t1001\t1002\t1003\nGid:\t5\t5\t5\t5\n\
                    NSpid:\t812\t7\nCapEff:\t000001ffffffffff\n";
        let expected = Status {
            uids: [1000, 1001, 1002, 1003],
            gids: [5; 4],
            capabilities: 0x1ff_ffff_ffff,
            numbers: vec![812, 7],
        };
        assert_eq!(expected.only_ids(), None);
        assert_eq!(Status { uids: [1000; 4], ..expected.clone() }.only_ids(), Some((1000, 5)));
        assert_eq!(Status::parse(text.as_bytes()), Some(expected));
        // What the kernel writes of a process that the reader's PID namespace does not contain.
        assert_eq!(Status::parse(text.replace("\t812\t7", "").as_bytes()), None);
        assert_eq!(Status::parse(b"Uid:\t0\t0\t0\n"), None);
        assert_eq!(Status::parse(b""), None);
    }

    #[test]
    fn capabilities_tell_root_of_the_host_from_root_of_a_container() {
        let status = |capabilities| Status { uids: [0; 4], gids: [0; 4], capabilities, numbers: vec![1] };
        assert!(status(0x1ff_ffff_ffff).is_privileged());
        // What Docker gives.
        assert!(!status(0xa804_25fb).is_privileged());
    }

    #[test]
    fn process_is_no_watcher_by_its_name() {
        let own = std::process::id();
        assert!(!runs(own, Kind::Conmon) && !runs(own, Kind::Shim));
        assert_ne!(Identity::of(own, Kind::Conmon), Identity::Root);
    }
}
