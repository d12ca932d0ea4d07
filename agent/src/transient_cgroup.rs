//! A cgroup made for one command, and its end.
//!
//! The cgroup is a child of the one that sockpolicy itself runs in, so the limits that hold there
//! hold for the command too. It is removed by a guard: a process of its own that waits until nobody
//! holds the other end of its standard input. So the cgroup goes the same way however sockpolicy
//! ends, SIGKILL included, and there is one piece of code that removes it.
//!
//! Processes that outlive the command are moved to the cgroup that it would have run in, where
//! the policy does not reach.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::AsFd,
        unix::{ffi::OsStrExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, SigmaskHow, Signal, sigprocmask},
        stat::Mode,
    },
};

use crate::{
    escape::Escape,
    host::cgroup::{Cgroup, CgroupError, Mount},
};

/// How long the guard keeps trying to empty and remove a cgroup.
const REMOVAL_TIME: Duration = Duration::from_secs(10);

/// How long the guard waits for the kernel to say that a cgroup has become empty before it looks
/// again.
const LOOK_AGAIN_MS: u16 = 50;

#[derive(Debug, thiserror::Error)]
pub enum TransientCgroupError {
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("cannot make cgroup {}: {source}\n  help: run as root, where the cgroup2 mount is writable", path.escaped())]
    Make { path: PathBuf, source: io::Error },
    #[error("cannot start the guard of cgroup {}: {source}", path.escaped())]
    Guard { path: PathBuf, source: io::Error },
    #[error(
        "cannot remove cgroup {path}: {}\n  help: when its processes have ended: rmdir {path}",
        reason.escaped(), path = path.escaped()
    )]
    Remove { path: PathBuf, reason: String },
}

/// The cgroup. Removed when this is dropped.
#[derive(Debug)]
pub struct TransientCgroup {
    pub cgroup: Cgroup,
    guard: Child,
}

impl TransientCgroup {
    /// Makes the cgroup below the one that this process is in. `suffix` tells it from others that this process makes.
    ///
    /// # Errors
    ///
    /// Where it cannot be made or guarded; then it is not there.
    pub fn make(mount: &Mount, suffix: &str) -> Result<Self, TransientCgroupError> {
        let home = mount.own()?;
        let path = home.path.join(format!("sockpolicy-{}{suffix}", std::process::id()));
        // Before there is anything to guard: from its first moment on, the cgroup has somebody to remove it.
        let mut guard = start_guard(&path, &home.path)
            .map_err(|source| TransientCgroupError::Guard { path: path.clone(), source })?;
        let made = fs::create_dir(&path).map_err(|source| TransientCgroupError::Make { path: path.clone(), source });
        if made.is_err() {
            // One that is there already is somebody else's, and not to be removed.
            let _ = guard.kill();
        }
        match made.and_then(|()| Ok(mount.open(&path)?)) {
            Ok(cgroup) => Ok(Self { cgroup, guard }),
            Err(error) => {
                // Closes its standard input first.
                let _ = guard.wait();
                Err(error)
            }
        }
    }

    /// Has a command run in the cgroup from its first moment.
    ///
    /// # Errors
    ///
    /// Where the cgroup cannot be opened.
    pub fn enclose(&self, command: &mut Command) -> io::Result<()> {
        let procs = File::options().write(true).open(self.cgroup.path.join("cgroup.procs"))?;
        // SAFETY: only makes a system call on a descriptor that the closure owns.
        unsafe {
            command.pre_exec(move || {
                // 0 is the process that writes.
                nix::unistd::write(&procs, b"0").map_err(io::Error::from).map(drop)
            });
        }
        Ok(())
    }

    /// How many processes are in it, and below it.
    #[must_use]
    pub fn population(&self) -> usize {
        tree(&self.cgroup.path).iter().map(|path| processes(path).len()).sum()
    }

    /// Removes the cgroup.
    ///
    /// # Errors
    ///
    /// Where that could not be done in a few seconds.
    pub fn remove(mut self) -> Result<(), TransientCgroupError> {
        self.end_guard()
    }

    fn end_guard(&mut self) -> Result<(), TransientCgroupError> {
        drop(self.guard.stdin.take());
        let error = |reason| TransientCgroupError::Remove { path: self.cgroup.path.clone(), reason };
        let mut reason = String::new();
        if let Some(mut stdout) = self.guard.stdout.take() {
            stdout.read_to_string(&mut reason).map_err(|source| error(source.to_string()))?;
        }
        let status = self.guard.wait().map_err(|source| error(source.to_string()))?;
        if status.success() {
            return Ok(());
        }
        // Where somebody has killed the guard, what it would have done is still to be done.
        let home = self.cgroup.path.parent().unwrap_or(Path::new("/"));
        remove_tree(&self.cgroup.path, home).map_err(|source| {
            let reason = reason.trim();
            error(if reason.is_empty() { source.to_string() } else { reason.to_owned() })
        })
    }
}

impl Drop for TransientCgroup {
    fn drop(&mut self) {
        if self.guard.stdin.is_some()
            && let Err(error) = self.end_guard()
        {
            log::warn!("{error}");
        }
    }
}

/// The name by which this binary runs as a guard.
pub const GUARD: &str = "guard-cgroup";

fn start_guard(cgroup: &Path, home: &Path) -> io::Result<Child> {
    Command::new("/proc/self/exe")
        .arg(GUARD)
        .args([cgroup, home])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        // Nothing of ours may keep a pipeline open that the command is part of.
        .stderr(Stdio::null())
        .current_dir("/")
        // Out of the reach of the terminal's signals.
        .process_group(0)
        .spawn()
}

/// Waits until nobody holds our standard input open, then empties and removes the cgroup. Gives
/// the reason where that cannot be done.
///
/// # Errors
///
/// The reason, in words.
pub fn guard(cgroup: &Path, home: &Path) -> Result<(), String> {
    close_inherited();
    let mut ignored = SigSet::all();
    ignored.remove(Signal::SIGKILL);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&ignored), None).map_err(|error| error.to_string())?;
    let mut nothing = Vec::new();
    io::stdin().read_to_end(&mut nothing).map_err(|error| error.to_string())?;
    let until = Instant::now() + REMOVAL_TIME;
    loop {
        let result = remove_tree(cgroup, home);
        match result {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() >= until => return Err(error.to_string()),
            Err(_) => wait_for_change(cgroup),
        }
    }
}

/// Lets go of what whoever started sockpolicy left open for the command.
fn close_inherited() {
    const FIRST: libc::c_uint = libc::STDERR_FILENO as libc::c_uint + 1;
    // SAFETY: nothing of this process has opened anything yet. Not by the C library's function, which older ones
    // do not have.
    unsafe { libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, 0) };
}

/// Moves everybody out of a cgroup and those below it, and removes them.
fn remove_tree(cgroup: &Path, home: &Path) -> io::Result<()> {
    let tree = tree(cgroup);
    // All of them first: the members of threaded cgroups are listed further up only.
    for process in tree.iter().flat_map(|path| processes(path)) {
        // One that has just ended cannot be moved, and need not be.
        let _ = fs::write(home.join("cgroup.procs"), &process);
    }
    // Children come after their parents.
    for path in tree.iter().rev() {
        match fs::remove_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// A cgroup and all below it.
fn tree(cgroup: &Path) -> Vec<PathBuf> {
    let mut found = vec![cgroup.to_owned()];
    let mut next = 0;
    while let Some(path) = found.get(next) {
        let children = fs::read_dir(path).into_iter().flatten().flatten();
        let folders: Vec<PathBuf> = children
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path())
            .collect();
        found.extend(folders);
        next += 1;
    }
    found
}

fn processes(cgroup: &Path) -> Vec<String> {
    let list = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    list.lines().map(str::to_owned).collect()
}

/// Waits until the kernel says that the cgroup has changed, or a moment.
fn wait_for_change(cgroup: &Path) {
    let events = cgroup.join("cgroup.events");
    let Ok(file) = open(events.as_os_str().as_bytes(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()) else {
        return;
    };
    let mut content = [0; 256];
    let _ = nix::unistd::read(&file, &mut content);
    let mut polled = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
    match poll(&mut polled, PollTimeout::from(LOOK_AGAIN_MS)) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => log::debug!("cannot wait on {}: {error}", events.escaped()),
    }
}
