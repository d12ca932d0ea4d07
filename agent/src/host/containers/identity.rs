//! Identifies the user of a process from facts that the kernel guarantees. A process can choose its name and its arguments.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _},
        unix::fs::MetadataExt as _,
    },
};

use super::processes::{CONMON, Kind, SHIM};

/// The identity of a watcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Identity {
    /// Root of the initial user namespace with root's capabilities. Its statements about containers are trusted.
    Root,
    /// A user. Its statements are trusted for cgroups that this user owns.
    Tenant {
        uid: u32,
        gid: u32,
        /// The user of the initial user namespace that this user belongs to. An account can have thousands of subordinate uids.
        account: u32,
    },
    /// Not trusted: root in a container, or a process that changes its user.
    Untrusted,
    /// Unknown: permission denied.
    Hidden,
}

impl Identity {
    pub(super) fn of(pid: u32, kind: Kind) -> Self {
        let Some(status) = Status::read(pid) else { return Self::Untrusted };
        match (status.uids, outermost_owner(pid)) {
            (_, Err(error)) if error.kind() == io::ErrorKind::PermissionDenied => Self::Hidden,
            ([0, 0, 0, 0], Ok(None)) if status.is_privileged() && runs(pid, kind) => Self::Root,
            // Root of a container can be uid 0 of the initial user namespace too. As a tenant, it would own most cgroups.
            (_, Err(_)) | ([0, ..], _) => Self::Untrusted,
            ([uid, ..], Ok(account)) => match status.single_ids() {
                Some((uid, gid)) => Self::Tenant { uid, gid, account: account.unwrap_or(uid) },
                None => {
                    log::debug!("ignoring process {pid} of user {uid}: its uids or gids differ");
                    Self::Untrusted
                }
            },
        }
    }
}

/// The content of `/proc/PID/status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The real, effective, saved set and file system uids, in the reader's user namespace.
    pub uids: [u32; 4],
    /// The gids, in the same order.
    pub gids: [u32; 4],
    /// The effective capabilities.
    pub capabilities: u64,
    /// The process ids in each PID namespace, from the reader's namespace inwards. At least one.
    pub pids: Vec<u32>,
}

impl Status {
    /// The maximum number of bytes to read. A process can have 65,536 supplementary groups, which precede the capabilities.
    const SIZE_MAX: u64 = 1 << 20;

    pub(super) fn read(pid: u32) -> Option<Self> {
        let mut bytes = Vec::new();
        File::open(format!("/proc/{pid}/status")).ok()?.take(Self::SIZE_MAX).read_to_end(&mut bytes).ok()?;
        Self::parse(&bytes)
    }

    /// Parses proc_pid_status(5). The kernel escapes newlines in the name (`proc_task_name`, fs/proc/array.c).
    #[must_use]
    pub fn parse(status: &[u8]) -> Option<Self> {
        let status = String::from_utf8_lossy(status);
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let numbers = |text: &str| text.split_whitespace().map(str::parse).collect::<Result<Vec<u32>, _>>().ok();
        Some(Self {
            uids: numbers(field("Uid:")?)?.try_into().ok()?,
            gids: numbers(field("Gid:")?)?.try_into().ok()?,
            capabilities: u64::from_str_radix(field("CapEff:")?.trim(), 16).ok()?,
            pids: numbers(field("NSpid:")?).filter(|pids| !pids.is_empty())?,
        })
    }

    /// Returns the uid and the gid if all four uids are equal and all four gids are equal.
    fn single_ids(&self) -> Option<(u32, u32)> {
        let single = |ids: [u32; 4]| Some(ids[0]).filter(|first| ids == [*first; 4]);
        Some((single(self.uids)?, single(self.gids)?))
    }

    /// Returns whether the process has CAP_SYS_ADMIN, which a container runtime needs. Root in a container has it only if the
    /// container is privileged. Root in a privileged container is equivalent to root of the host.
    fn is_privileged(&self) -> bool {
        /// include/uapi/linux/capability.h
        const CAP_SYS_ADMIN: u32 = 21;
        self.capabilities & 1 << CAP_SYS_ADMIN != 0
    }
}

/// Returns whether the executable of a process has the name of a watcher of this kind. A user can start a set-user-ID program
/// under any command name and with any arguments; `/proc/PID/exe` leads to the executable itself.
fn runs(pid: u32, kind: Kind) -> bool {
    let executable = fs::read_link(format!("/proc/{pid}/exe")).ok();
    let name = executable.as_deref().and_then(|path| path.file_name()?.to_str());
    // The kernel appends this if the file was deleted or replaced.
    let name = name.map(|name| name.strip_suffix(" (deleted)").unwrap_or(name));
    name.is_some_and(|name| match kind {
        Kind::Conmon => name == CONMON,
        Kind::Shim => name.starts_with(SHIM),
    })
}

/// Returns the owner of the user namespace that contains a process and is a child of the initial one (ioctl_nsfs(2), Linux
/// 4.11). Returns `None` if the process is in the initial user namespace.
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
            // SAFETY: the kernel writes a uid to `owner`.
            let result = unsafe { libc::ioctl(inner.as_raw_fd(), NS_GET_OWNER_UID as _, &raw mut owner) };
            return if result < 0 { Err(io::Error::last_os_error()) } else { Ok(Some(owner)) };
        }
        // SAFETY: this ioctl takes no argument.
        let parent = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_PARENT as _) };
        if parent < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just opened this descriptor, and nothing else owns it.
        inner = Some(std::mem::replace(&mut namespace, unsafe { File::from_raw_fd(parent) }));
    }
    Err(io::Error::other("cannot find the initial user namespace: too many levels"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_parsed() {
        let text = "Name:\tconmon\\nUid:\t0\t0\t0\t0\nState:\tS (sleeping)\nUid:\t1000\t1001\t1002\t1003\nGid:\t5\t5\t5\t5\n\
                    NSpid:\t812\t7\nCapEff:\t000001ffffffffff\n";
        let expected =
            Status { uids: [1000, 1001, 1002, 1003], gids: [5; 4], capabilities: 0x1ff_ffff_ffff, pids: vec![812, 7] };
        assert_eq!(expected.single_ids(), None);
        assert_eq!(Status { uids: [1000; 4], ..expected.clone() }.single_ids(), Some((1000, 5)));
        assert_eq!(Status::parse(text.as_bytes()), Some(expected));
        // The kernel writes an empty list for a process outside the reader's PID namespace.
        assert_eq!(Status::parse(text.replace("\t812\t7", "").as_bytes()), None);
        assert_eq!(Status::parse(b"Uid:\t0\t0\t0\n"), None);
        assert_eq!(Status::parse(b""), None);
    }

    #[test]
    fn root_in_an_unprivileged_container_is_not_privileged() {
        let status = |capabilities| Status { uids: [0; 4], gids: [0; 4], capabilities, pids: vec![1] };
        assert!(status(0x1ff_ffff_ffff).is_privileged());
        // The default capabilities in Docker.
        assert!(!status(0xa804_25fb).is_privileged());
    }

    #[test]
    fn process_with_another_executable_is_not_a_watcher() {
        let own = std::process::id();
        assert!(!runs(own, Kind::Conmon) && !runs(own, Kind::Shim));
        assert_ne!(Identity::of(own, Kind::Conmon), Identity::Root);
    }
}
