//! Cgroups that the tests create.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::{
        signal::{Signal, kill},
        stat::{Mode, mkdirat},
    },
    unistd::{Pid, UnlinkatFlags, unlinkat},
};

use crate::{must, policy::unique_name, wait};

/// Returns the mount point of cgroup2, from /proc/self/mounts.
pub fn mount() -> &'static Path {
    static MOUNT: LazyLock<PathBuf> = LazyLock::new(|| {
        let mounts = must(fs::read_to_string("/proc/self/mounts"), "read /proc/self/mounts");
        let mut words = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let found = words.find(|words| words.get(2) == Some(&"cgroup2"));
        let Some(path) = found.and_then(|words| words.get(1).copied()) else {
            panic!("no cgroup2 is mounted\n  help: mount -t cgroup2 cgroup2 /sys/fs/cgroup");
        };
        path.into()
    });
    &MOUNT
}

/// Returns the directories of this name directly below the mount points of cgroup v1 hierarchies.
pub(crate) fn in_v1_hierarchies(name: &str) -> Vec<PathBuf> {
    let mounts = must(fs::read_to_string("/proc/self/mounts"), "read /proc/self/mounts");
    let words = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mounted = words.filter(|words| words.get(2) == Some(&"cgroup")).filter_map(|words| words.get(1).copied());
    mounted.map(|mount| Path::new(mount).join(name)).filter(|path| path.is_dir()).collect()
}

/// A cgroup. Dropping it kills its processes, and removes it with its descendants.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Creates a cgroup directly below the mount point.
    #[must_use]
    pub fn new() -> Self {
        Self::at(mount().join(unique_name()))
    }

    /// Creates a child cgroup.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        Self::at(self.path.join(name))
    }

    /// Takes ownership of an existing cgroup, which is removed when this value is dropped.
    #[must_use]
    pub fn adopt(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    fn at(path: PathBuf) -> Self {
        crate::require_root();
        must(fs::create_dir(&path), format_args!("make cgroup {}", path.display()));
        Self { path }
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the name that events have for it: the path below the mount point, with a leading `/`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("/{}", self.path.strip_prefix(mount()).unwrap_or(&self.path).display())
    }

    /// Returns the names of the child cgroups.
    #[must_use]
    pub fn children(&self) -> Vec<OsString> {
        let entries = must(fs::read_dir(&self.path), format_args!("list cgroup {}", self.path.display()));
        let dirs = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        dirs.map(|entry| entry.file_name()).collect()
    }

    /// Makes a command start in this cgroup.
    pub fn run_inside(&self, command: &mut Command) {
        let procs = self.path.join("cgroup.procs");
        let mut file = must(File::options().write(true).open(&procs), format_args!("open {}", procs.display()));
        // SAFETY: only makes a system call on a descriptor that the closure owns.
        unsafe {
            // 0 stands for the writing process.
            command.pre_exec(move || file.write_all(b"0"));
        }
    }
}

/// Nested cgroups below another one. Their path can have any length. They are removed when this value is dropped.
#[derive(Debug)]
pub struct NestedCgroups {
    top: File,
    names: Vec<OsString>,
}

impl NestedCgroups {
    /// Creates a chain of cgroups with these names, each inside the previous one.
    #[must_use]
    pub fn below(cgroup: &Cgroup, names: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        let top = must(File::open(cgroup.path()), "open a cgroup");
        let mut chain = Self { top, names: Vec::new() };
        let mut at = must(chain.top.try_clone(), "open a cgroup again");
        for name in names.into_iter().map(Into::into) {
            must(mkdirat(&at, name.as_os_str(), Mode::S_IRWXU), "make a cgroup");
            at = open_in(&at, &name);
            chain.names.push(name);
        }
        chain
    }

    /// Opens the deepest cgroup.
    #[must_use]
    pub fn deepest(&self) -> File {
        let top = must(self.top.try_clone(), "open a cgroup again");
        self.names.iter().fold(top, |at, name| open_in(&at, name))
    }
}

fn open_in(dir: &File, name: &OsStr) -> File {
    must(openat(dir, name, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()), "open a cgroup").into()
}

impl Drop for NestedCgroups {
    fn drop(&mut self) {
        let mut dirs = vec![must(self.top.try_clone(), "open a cgroup again")];
        for name in self.names.iter().rev().skip(1).rev() {
            dirs.push(open_in(&dirs[dirs.len() - 1], name));
        }
        for (dir, name) in dirs.iter().zip(&self.names).rev() {
            let is_gone = wait::until(wait::TIMEOUT, || {
                matches!(unlinkat(dir, name.as_os_str(), UnlinkatFlags::RemoveDir), Ok(()) | Err(Errno::ENOENT))
            });
            assert!(is_gone || std::thread::panicking(), "cannot remove cgroup {name:?}");
        }
    }
}

impl Default for Cgroup {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let mut last = Ok(());
        // A worker process of an agent can hang in the kernel as long as a test keeps a socket locked.
        let is_gone = wait::until(wait::TIMEOUT, || {
            last = remove(&self.path);
            last.is_ok()
        });
        if !is_gone && !std::thread::panicking() {
            panic!("cannot remove cgroup {}: {last:?}", self.path.display());
        }
    }
}

/// Kills the processes of a cgroup, and removes it with its descendants.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries.flatten() {
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    // cgroup.procs of a threaded cgroup cannot be read. The domain cgroup above it lists the processes.
    let members = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    for pid in members.lines().filter_map(|line| line.parse().ok()) {
        // Fails if the process has ended, which is fine.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    fs::remove_dir(path)
}
