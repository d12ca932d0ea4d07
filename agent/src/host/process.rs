//! Processes, as `/proc` shows them.

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::escape;

/// A descriptor that becomes readable when a process ends (pidfd_open(2), Linux 5.3).
///
/// # Errors
///
/// Where there is no such process.
pub fn open(process: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) })
}

/// A descriptor for what is behind one of another process's, of which `process` is a handle (pidfd_getfd(2), Linux 5.6).
///
/// # Errors
///
/// EBADF where it has no such descriptor, EPERM where it must not be looked into.
pub fn take_descriptor(process: &OwnedFd, descriptor: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), descriptor, 0) })
}

/// What a system call answered that makes a descriptor.
fn owned(answer: libc::c_long) -> io::Result<OwnedFd> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(answer as i32) })
}

/// The program that a process runs, if it is still there.
#[must_use]
pub fn executable(process: u32) -> Option<String> {
    if process == 0 {
        return None;
    }
    fs::read_link(format!("/proc/{process}/exe")).ok().map(|path| escape::plain(&path))
}

/// The processes that there are.
///
/// # Errors
///
/// Where `/proc` cannot be read.
pub fn all() -> io::Result<Vec<u32>> {
    let entries = fs::read_dir("/proc")?;
    let mut processes: Vec<u32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    processes.sort_unstable();
    Ok(processes)
}

/// The descriptors of a process that are sockets, in order, each with the socket's inode number. Its threads share them.
///
/// # Errors
///
/// Where there is no such process, or it must not be looked into.
pub fn sockets(process: u32) -> io::Result<Vec<(i32, u32)>> {
    let mut sockets = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        let entry = entry?;
        let leads_to = match fs::read_link(entry.path()) {
            Ok(leads_to) => leads_to,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(error),
            // It was closed meanwhile.
            Err(_) => continue,
        };
        let inode = leads_to.to_str().and_then(|path| path.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        let descriptor = entry.file_name().to_str().and_then(|name| name.parse().ok());
        sockets.extend(descriptor.zip(inode));
    }
    sockets.sort_unstable();
    Ok(sockets)
}

/// What a process calls itself.
#[must_use]
pub fn name(process: u32) -> Option<String> {
    let name = fs::read(format!("/proc/{process}/comm")).ok()?;
    Some(String::from_utf8_lossy(&name).trim_end_matches('\n').to_owned())
}

/// Whether there is a thread of this number.
#[must_use]
pub fn has_thread(thread: u32) -> bool {
    fs::exists(format!("/proc/{thread}")).unwrap_or(true)
}

/// Whether the numbers of processes are here what they are to the kernel, outside any namespace of them.
#[must_use]
pub fn is_initial_namespace() -> bool {
    /// `PROC_PID_INIT_INO` (include/linux/proc_ns.h).
    const INITIAL: u64 = 0xeffffffc;
    fs::metadata("/proc/self/ns/pid").is_ok_and(|namespace| namespace.ino() == INITIAL)
}

/// When a process was made, in ticks since the system booted (`starttime` in proc_pid_stat(5)); `None` where it is gone.
#[must_use]
pub fn start(process: u32) -> Option<u64> {
    /// Its place behind the name, which may have anything in it.
    const START: usize = 19;
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (_, behind_name) = stat.rsplit_once(") ")?;
    behind_name.split(' ').nth(START)?.parse().ok()
}

/// How many files are open on this host, by whomsoever; `None` where that is not told.
#[must_use]
pub fn open_files() -> Option<u64> {
    fs::read_to_string("/proc/sys/fs/file-nr").ok()?.split_whitespace().next()?.parse().ok()
}

/// Lets this process have as many descriptors as it may: each target takes a dozen. What it starts inherits that.
pub fn raise_descriptor_limit() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(errno) = raised {
        log::debug!("cannot raise RLIMIT_NOFILE: {errno}");
    }
}

/// Descriptors that what grows with the number of targets leaves free, for everything else that the agent does.
const SPARE_DESCRIPTORS: u64 = 128;

/// Passes a new descriptor on, unless too few are left of those that this process may have. The kernel gives out the lowest
/// number that is free, so the number tells how many are in use.
///
/// # Errors
///
/// EMFILE if fewer than [`SPARE_DESCRIPTORS`] are left. The descriptor is closed then.
pub fn spare_descriptors<T: AsFd>(new: T) -> io::Result<T> {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    // Of a small limit, half.
    let usable = limit.saturating_sub(SPARE_DESCRIPTORS).max(limit / 2);
    if new.as_fd().as_raw_fd() as u64 >= usable {
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    Ok(new)
}
