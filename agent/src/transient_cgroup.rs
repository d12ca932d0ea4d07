//! Makes and removes a cgroup for one command.
//!
//! The cgroup is a child of the cgroup of sockpolicy, so that the limits of this cgroup hold for the command too. A *guard*
//! removes the cgroup. The guard is a separate process that waits for the end of file on its standard input. Therefore the
//! cgroup is removed in the same way however sockpolicy ends, SIGKILL included.
//!
//! Processes that outlive the command are moved to the cgroup of sockpolicy, to which the policy does not apply.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
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
    unistd::pipe2,
};

use crate::{
    escape::Escape,
    host::cgroup::{Cgroup, CgroupError, Mount},
};

/// The time after which the guard gives up emptying and removing a cgroup.
const REMOVAL_TIME: Duration = Duration::from_secs(10);

/// The maximum time that the guard waits for a notification of `cgroup.events` before it tries again, in milliseconds.
const RETRY_MS: u16 = 50;

#[derive(Debug, thiserror::Error)]
pub enum TransientCgroupError {
    #[error("{0}")]
    Cgroup(#[from] CgroupError),
    #[error("cannot make cgroup {}: {source}", path.escaped())]
    Make { path: PathBuf, source: io::Error },
    /// The parent of the cgroup is threaded, so that only a threaded cgroup can have processes.
    #[error("cannot make cgroup {} threaded, as its parent is: {source}", path.escaped())]
    Threaded { path: PathBuf, source: io::Error },
    #[error("cannot start the guard of cgroup {}: {source}", path.escaped())]
    Guard { path: PathBuf, source: io::Error },
    #[error("cannot remove cgroup {}: {}", path.escaped(), reason.escaped())]
    Remove { path: PathBuf, reason: String },
}

/// A cgroup that is removed when this is dropped.
#[derive(Debug)]
pub struct TransientCgroup {
    pub cgroup: Cgroup,
    guard: Child,
}

impl TransientCgroup {
    /// Makes a cgroup below the cgroup of this process. `suffix` distinguishes the cgroups that one process makes.
    ///
    /// # Errors
    ///
    /// Fails if the cgroup cannot be made or its guard cannot be started. After a failure, this call leaves no cgroup.
    pub fn make(mount: &Mount, suffix: &str) -> Result<Self, TransientCgroupError> {
        let parent = mount.own()?;
        let path = parent.path.join(format!("sockpolicy-{}{suffix}", std::process::id()));
        // The guard starts before the cgroup is made, so that the cgroup is removed even if this process is killed right after.
        let mut guard = start_guard(&path, &parent.path)
            .map_err(|source| TransientCgroupError::Guard { path: path.clone(), source })?;
        let made = fs::create_dir(&path).map_err(|source| TransientCgroupError::Make { path: path.clone(), source });
        if made.is_err() {
            // If the cgroup exists already, another process has made it. The guard must not remove it.
            let _ = guard.kill();
        }
        let made = made.and_then(|()| {
            accept_processes(&path).map_err(|source| TransientCgroupError::Threaded { path: path.clone(), source })
        });
        match made.and_then(|()| Ok(mount.open(&path)?)) {
            Ok(cgroup) => Ok(Self { cgroup, guard }),
            Err(error) => {
                // `wait` closes the standard input of the guard first.
                let _ = guard.wait();
                Err(error)
            }
        }
    }

    /// Makes a command run in the cgroup from its start.
    ///
    /// # Errors
    ///
    /// Fails if `cgroup.procs` cannot be opened, or if there can be no pipe.
    pub fn place_in(&self, command: &mut Command) -> io::Result<Entry> {
        let procs = File::options().write(true).open(self.cgroup.path.join("cgroup.procs"))?;
        let (failed, report) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // SAFETY: the closure only makes system calls on descriptors that it owns.
        unsafe {
            command.pre_exec(move || {
                // 0 means the writing process (cgroups(7)).
                let entered = nix::unistd::write(&procs, b"0");
                if entered.is_err() {
                    let _ = nix::unistd::write(&report, b"0");
                }
                entered.map_err(io::Error::from).map(drop)
            });
        }
        Ok(Entry(failed))
    }

    /// Returns the number of processes in the cgroup and below.
    #[must_use]
    pub fn population(&self) -> usize {
        tree(&self.cgroup.path).iter().map(|path| processes(path).len()).sum()
    }

    /// Removes the cgroup.
    ///
    /// # Errors
    ///
    /// Fails if the cgroup cannot be emptied and removed within 10 s.
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
        // The guard has failed or was killed.
        let parent = self.cgroup.path.parent().unwrap_or(Path::new("/"));
        remove_tree(&self.cgroup.path, parent).map_err(|source| {
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

/// Distinguishes the two reasons why a command in a cgroup cannot be started.
#[derive(Debug)]
pub struct Entry(OwnedFd);

impl Entry {
    /// Returns whether the process of the command could not enter the cgroup, so that the command was not executed.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        nix::unistd::read(&self.0, &mut [0]).is_ok_and(|count| count > 0)
    }
}

/// Makes a new cgroup accept processes. Below a threaded cgroup, it does so only once it is threaded itself (cgroups(7), "Thread
/// mode").
fn accept_processes(cgroup: &Path) -> io::Result<()> {
    let kind = cgroup.join("cgroup.type");
    // Only this type accepts no processes.
    if fs::read_to_string(&kind).is_ok_and(|kind| kind.trim_end() == "domain invalid") {
        fs::write(&kind, "threaded")?;
    }
    Ok(())
}

/// The hidden command that runs this binary as a guard.
pub const GUARD: &str = "guard-cgroup";

fn start_guard(cgroup: &Path, parent: &Path) -> io::Result<Child> {
    Command::new("/proc/self/exe")
        .arg(GUARD)
        .args([cgroup, parent])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        // The guard must not keep open a pipeline that the command is part of.
        .stderr(Stdio::null())
        .current_dir("/")
        // The guard must not get signals of the terminal.
        .process_group(0)
        .spawn()
}

/// Runs the guard: waits for the end of file on standard input, then moves the processes of `cgroup` to `parent` and removes
/// `cgroup`.
///
/// # Errors
///
/// Returns the reason if the cgroup cannot be removed within 10 s.
pub fn guard(cgroup: &Path, parent: &Path) -> Result<(), String> {
    close_inherited();
    let mut blocked = SigSet::all();
    blocked.remove(Signal::SIGKILL);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&blocked), None).map_err(|error| error.to_string())?;
    let mut input = Vec::new();
    io::stdin().read_to_end(&mut input).map_err(|error| error.to_string())?;
    let deadline = Instant::now() + REMOVAL_TIME;
    loop {
        let result = remove_tree(cgroup, parent);
        match result {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() >= deadline => return Err(error.to_string()),
            Err(_) => wait_for_change(cgroup),
        }
    }
}

/// Closes the descriptors that this process has inherited, except the standard ones. The parent of sockpolicy can have passed
/// some for the command.
fn close_inherited() {
    const FIRST: libc::c_uint = libc::STDERR_FILENO as libc::c_uint + 1;
    // SAFETY: no code of this process has opened a descriptor yet. The C library's function is not used, since older C
    // libraries do not have it.
    unsafe { libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, 0) };
}

/// Moves all processes of a cgroup and its descendants to `parent`, and removes these cgroups.
fn remove_tree(cgroup: &Path, parent: &Path) -> io::Result<()> {
    let tree = tree(cgroup);
    // All processes are moved before any cgroup is removed.
    for process in tree.iter().flat_map(|path| processes(path)) {
        // This fails if the process has just ended.
        let _ = fs::write(parent.join("cgroup.procs"), &process);
    }
    // In `tree`, children come after their parents.
    for path in tree.iter().rev() {
        match fs::remove_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Returns a cgroup and all its descendants.
fn tree(cgroup: &Path) -> Vec<PathBuf> {
    let mut cgroups = vec![cgroup.to_owned()];
    let mut next = 0;
    while let Some(path) = cgroups.get(next) {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        let children: Vec<PathBuf> = entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path())
            .collect();
        cgroups.extend(children);
        next += 1;
    }
    cgroups
}

/// Returns the ids of the processes in a cgroup.
fn processes(cgroup: &Path) -> BTreeSet<String> {
    let list = |file| fs::read_to_string(cgroup.join(file));
    match list("cgroup.procs") {
        Ok(list) => list.lines().map(str::to_owned).collect(),
        // A threaded cgroup lists only threads (EOPNOTSUPP).
        Err(_) => list("cgroup.threads").unwrap_or_default().lines().map(process_of).collect(),
    }
}

/// Returns the id of the process of a thread; the id of the thread if it has ended.
fn process_of(thread: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let process = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
    process.map_or(thread, str::trim).to_owned()
}

/// Waits until `cgroup.events` changes, or [`RETRY_MS`] has passed.
fn wait_for_change(cgroup: &Path) {
    let events = cgroup.join("cgroup.events");
    let Ok(file) = open(events.as_os_str().as_bytes(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()) else {
        return;
    };
    // poll(2) reports changes after the last read.
    let mut content = [0; 256];
    let _ = nix::unistd::read(&file, &mut content);
    let mut polled = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
    match poll(&mut polled, PollTimeout::from(RETRY_MS)) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => log::debug!("cannot wait on {}: {error}", events.escaped()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_entry_is_distinguished_from_a_missing_program() {
        let path = std::env::temp_dir().join(format!("sockpolicy-entry-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        let start = |procs: &str, program: &str| {
            // Writes to /dev/full fail, as writes to `cgroup.procs` can.
            std::os::unix::fs::symlink(procs, path.join("cgroup.procs")).unwrap();
            let cgroup = Cgroup {
                path: path.clone(),
                name: "/x".to_owned(),
                id: 1,
                level: 1,
                folder: File::open(&path).unwrap(),
            };
            let cgroup = TransientCgroup { cgroup, guard: Command::new("true").spawn().unwrap() };
            let mut command = Command::new(program);
            let entry = cgroup.place_in(&mut command).unwrap();
            let started = command.spawn().map(|mut child| child.wait());
            fs::remove_file(path.join("cgroup.procs")).unwrap();
            (started.is_ok(), entry.has_failed())
        };
        let found = [("/dev/full", "true"), ("/dev/null", "/no/such/program"), ("/dev/null", "true")];
        let found = found.map(|(procs, program)| start(procs, program));
        fs::remove_dir(&path).unwrap();
        assert_eq!(found, [(false, true), (false, false), (true, false)]);
    }
}
