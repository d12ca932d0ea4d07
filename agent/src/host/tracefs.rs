//! tracefs, where the kernel lists its tracepoints.
//!
//! Hosts without systemd often do not have it mounted. It is then mounted where only one thread of
//! ours sees it, for as long as that thread runs, so that nothing is left behind.

use std::{fs, io, path::Path, thread};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// Where tracefs is mounted, by convention of the kernel's documentation.
const PLACE: &str = "/sys/kernel/tracing";
/// Where it is mounted by itself, with debugfs.
const OTHER_PLACE: &str = "/sys/kernel/debug/tracing";

/// Returns whether tracefs is there, also where this process may not read it: it is root's, with mode 0700.
#[must_use]
pub fn is_mounted() -> bool {
    [PLACE, OTHER_PLACE].iter().any(|place| match Path::new(place).join("events").metadata() {
        Ok(metadata) => metadata.is_dir(),
        Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
    })
}

/// The number by which perf_event_open(2) knows a tracepoint.
///
/// # Errors
///
/// Where tracefs is not mounted, or there is no such tracepoint.
pub fn tracepoint_id(category: &str, name: &str) -> io::Result<u64> {
    let read = |place| fs::read_to_string(Path::new(place).join("events").join(category).join(name).join("id"));
    let text = match read(PLACE) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => read(OTHER_PLACE),
        read => read,
    };
    text?.trim().parse().map_err(io::Error::other)
}

/// Runs `work` where tracefs is mounted.
///
/// # Errors
///
/// Where it is not mounted, and cannot be mounted for this either.
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
    // What is mounted from here on must not spread to the host.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    mount(Some("tracefs"), PLACE, Some("tracefs"), MsFlags::empty(), None::<&str>)?;
    Ok(())
}
