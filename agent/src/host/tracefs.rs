//! Finds tracepoints in tracefs.
//!
//! On hosts without systemd, tracefs is often not mounted. It is then mounted in a mount namespace of one thread. The mount
//! ends with this thread.

use std::{fs, io, path::Path, thread};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// The mount point of tracefs in the kernel's documentation.
const MOUNT_POINT: &str = "/sys/kernel/tracing";
/// The path at which the kernel mounts tracefs automatically if debugfs is mounted.
const DEBUGFS_MOUNT_POINT: &str = "/sys/kernel/debug/tracing";

/// Returns whether tracefs is mounted. Only root can read tracefs (mode 0700), but any user gets the right result.
#[must_use]
pub fn is_mounted() -> bool {
    [MOUNT_POINT, DEBUGFS_MOUNT_POINT].iter().any(|place| match Path::new(place).join("events").metadata() {
        Ok(metadata) => metadata.is_dir(),
        Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
    })
}

/// Returns the id of a tracepoint for perf_event_open(2).
///
/// # Errors
///
/// Fails if tracefs is not mounted, or if the tracepoint does not exist.
pub fn tracepoint_id(category: &str, name: &str) -> io::Result<u64> {
    let read = |place| fs::read_to_string(Path::new(place).join("events").join(category).join(name).join("id"));
    let text = match read(MOUNT_POINT) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => read(DEBUGFS_MOUNT_POINT),
        read => read,
    };
    text?.trim().parse().map_err(io::Error::other)
}

/// Calls `work` with tracefs mounted. If tracefs is not mounted, mounts it and calls `work` on a new thread.
///
/// # Errors
///
/// Fails if tracefs is not mounted and cannot be mounted.
pub fn with_tracefs<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    if is_mounted() {
        return Ok(work());
    }
    thread::scope(|scope| {
        let thread = scope.spawn(|| mount_for_this_thread().map(|()| work()));
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that mounts tracefs panicked")))
    })
}

fn mount_for_this_thread() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    // The mount must not propagate to the host's mount namespace.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    mount(Some("tracefs"), MOUNT_POINT, Some("tracefs"), MsFlags::empty(), None::<&str>)?;
    Ok(())
}
