//! Facts about processes, from `/proc`, and limits of this process.

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

use nix::{
    errno::Errno,
    sys::resource::{Resource, getrlimit, setrlimit},
};

use crate::escape;

/// Opens a pidfd, which becomes readable when the process ends (pidfd_open(2), Linux 5.3).
///
/// # Errors
///
/// Fails if the process does not exist.
pub fn open(process: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes no pointers.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) })
}

/// Duplicates a descriptor of another process (pidfd_getfd(2), Linux 5.6). `process` is a pidfd.
///
/// # Errors
///
/// Fails with EBADF if the process has no such descriptor, and with EPERM if permission is denied.
pub fn take_descriptor(process: &OwnedFd, descriptor: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd(2) takes no pointers.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), descriptor, 0) })
}

/// Converts the result of a system call that opens a descriptor.
fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

/// Returns the path of the executable of a process, or `None` if the process does not exist or permission is denied.
#[must_use]
pub fn executable(process: u32) -> Option<String> {
    if process == 0 {
        return None;
    }
    fs::read_link(format!("/proc/{process}/exe")).ok().map(|path| escape::plain(&path))
}

/// Returns the ids of all processes, sorted.
///
/// # Errors
///
/// Fails if `/proc` cannot be read.
pub fn all() -> io::Result<Vec<u32>> {
    let entries = fs::read_dir("/proc")?;
    let mut processes: Vec<u32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    processes.sort_unstable();
    Ok(processes)
}

/// Returns the descriptors of a process that refer to sockets, sorted, each with the socket's inode number.
///
/// # Errors
///
/// Fails if the process does not exist, or if permission is denied.
pub fn sockets(process: u32) -> io::Result<Vec<(i32, u32)>> {
    let mut sockets = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        let entry = entry?;
        let target = match fs::read_link(entry.path()) {
            Ok(target) => target,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(error),
            // The descriptor was closed after it was listed.
            Err(_) => continue,
        };
        let inode = target.to_str().and_then(|path| path.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        let descriptor = entry.file_name().to_str().and_then(|name| name.parse().ok());
        sockets.extend(descriptor.zip(inode));
    }
    sockets.sort_unstable();
    Ok(sockets)
}

/// Returns the command name of a process (proc_pid_comm(5)).
#[must_use]
pub fn name(process: u32) -> Option<String> {
    let name = fs::read(format!("/proc/{process}/comm")).ok()?;
    Some(String::from_utf8_lossy(&name).trim_end_matches('\n').to_owned())
}

/// Returns whether a thread with this id exists. Returns `true` if `/proc` cannot be read.
#[must_use]
pub fn has_thread(thread: u32) -> bool {
    fs::exists(format!("/proc/{thread}")).unwrap_or(true)
}

/// Returns whether this process is in the initial PID namespace, so that the process ids in `/proc` equal those that BPF
/// programs see.
#[must_use]
pub fn is_initial_namespace() -> bool {
    /// `PROC_PID_INIT_INO` (include/linux/proc_ns.h).
    const INITIAL: u64 = 0xeffffffc;
    fs::metadata("/proc/self/ns/pid").is_ok_and(|namespace| namespace.ino() == INITIAL)
}

/// Returns the start time of a process, in clock ticks since boot (`starttime` in proc_pid_stat(5)). Returns `None` if the
/// process does not exist.
#[must_use]
pub fn start(process: u32) -> Option<u64> {
    /// The index of the field after the command name. The command name can contain any characters.
    const STARTTIME: usize = 19;
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(") ")?;
    after_name.split(' ').nth(STARTTIME)?.parse().ok()
}

/// Returns the number of open files on this host (`/proc/sys/fs/file-nr`), or `None` if it cannot be read.
#[must_use]
pub fn open_files() -> Option<u64> {
    fs::read_to_string("/proc/sys/fs/file-nr").ok()?.split_whitespace().next()?.parse().ok()
}

/// Returns the soft limit of open descriptors of this process, or `None` if getrlimit(2) fails.
#[must_use]
pub fn descriptor_limit() -> Option<u64> {
    getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(soft, _)| soft)
}

/// Raises the soft limit of open descriptors to the hard limit, since each target needs about a dozen descriptors. Child
/// processes inherit the limit. Returns the limits from before.
pub fn raise_descriptor_limit() -> Option<DescriptorLimits> {
    let raise = || {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        Ok(DescriptorLimits { soft, hard })
    };
    raise().inspect_err(|errno: &Errno| log::debug!("cannot raise RLIMIT_NOFILE: {errno}")).ok()
}

/// Limits of open descriptors.
#[derive(Clone, Copy, Debug)]
pub struct DescriptorLimits {
    soft: u64,
    hard: u64,
}

impl DescriptorLimits {
    /// Gives these limits to this process. Only makes a system call, so that a child can call this before it executes a program.
    ///
    /// # Errors
    ///
    /// Fails as setrlimit(2) does.
    pub fn restore(self) -> io::Result<()> {
        Ok(setrlimit(Resource::RLIMIT_NOFILE, self.soft, self.hard)?)
    }
}

/// The number of descriptors that stay free for other work, however many targets there are.
const SPARE_DESCRIPTORS: u64 = 128;

/// Returns a new descriptor, unless too few free descriptors are left for this process. The kernel assigns the lowest free
/// number, so the number of the new descriptor shows how many are in use.
///
/// # Errors
///
/// Closes the descriptor and fails with EMFILE if fewer than 128 descriptors are left.
pub fn spare_descriptors<T: AsFd>(new: T) -> io::Result<T> {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    // If the limit is small, half of it is usable.
    let usable = limit.saturating_sub(SPARE_DESCRIPTORS).max(limit / 2);
    if new.as_fd().as_raw_fd() as u64 >= usable {
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    Ok(new)
}
