//! Cgroups of our own.

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

/// Where cgroup2 is mounted, found in the kernel's own list.
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

/// The folders of this name right below the mounts of the hierarchies of version 1, where there are any.
pub(crate) fn of_version_1(name: &str) -> Vec<PathBuf> {
    let mounts = must(fs::read_to_string("/proc/self/mounts"), "read /proc/self/mounts");
    let words = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mounted = words.filter(|words| words.get(2) == Some(&"cgroup")).filter_map(|words| words.get(1).copied());
    mounted.map(|mount| Path::new(mount).join(name)).filter(|path| path.is_dir()).collect()
}

/// A cgroup. Dropping it kills who is in it and removes it and those below it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes one right below the mount.
    #[must_use]
    pub fn new() -> Self {
        Self::at(mount().join(unique_name()))
    }

    /// Makes one below this one.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        Self::at(self.path.join(name))
    }

    /// One that is there. It goes with this value.
    #[must_use]
    pub fn of(path: &Path) -> Self {
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

    /// As events name it: the path below the mount, with a leading `/`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("/{}", self.path.strip_prefix(mount()).unwrap_or(&self.path).display())
    }

    /// The names of the cgroups right below it.
    #[must_use]
    pub fn children(&self) -> Vec<OsString> {
        let entries = must(fs::read_dir(&self.path), format_args!("list cgroup {}", self.path.display()));
        let folders = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        folders.map(|entry| entry.file_name()).collect()
    }

    /// Has a command run in it from its first moment.
    pub fn enclose(&self, command: &mut Command) {
        let procs = self.path.join("cgroup.procs");
        let mut file = must(File::options().write(true).open(&procs), format_args!("open {}", procs.display()));
        // SAFETY: only makes a system call on a descriptor that the closure owns.
        unsafe {
            // 0 is the process that writes.
            command.pre_exec(move || file.write_all(b"0"));
        }
    }
}

/// Cgroups one in the other below another one, however long their path is. Removed when this is dropped.
#[derive(Debug)]
pub struct Chain {
    top: File,
    names: Vec<OsString>,
}

impl Chain {
    /// Makes a cgroup of each of these names in the one before.
    #[must_use]
    pub fn below(cgroup: &Cgroup, names: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        let top = must(File::open(cgroup.path()), "open a cgroup");
        let mut chain = Self { top, names: Vec::new() };
        let mut at = must(chain.top.try_clone(), "open a cgroup anew");
        for name in names.into_iter().map(Into::into) {
            must(mkdirat(&at, name.as_os_str(), Mode::S_IRWXU), "make a cgroup");
            at = open_in(&at, &name);
            chain.names.push(name);
        }
        chain
    }

    /// The deepest one.
    #[must_use]
    pub fn deepest(&self) -> File {
        let top = must(self.top.try_clone(), "open a cgroup anew");
        self.names.iter().fold(top, |at, name| open_in(&at, name))
    }
}

fn open_in(folder: &File, name: &OsStr) -> File {
    must(openat(folder, name, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()), "open a cgroup").into()
}

impl Drop for Chain {
    fn drop(&mut self) {
        let mut folders = vec![must(self.top.try_clone(), "open a cgroup anew")];
        for name in self.names.iter().rev().skip(1).rev() {
            folders.push(open_in(&folders[folders.len() - 1], name));
        }
        for (folder, name) in folders.iter().zip(&self.names).rev() {
            let is_gone = wait::until(wait::PATIENCE, || {
                matches!(unlinkat(folder, name.as_os_str(), UnlinkatFlags::RemoveDir), Ok(()) | Err(Errno::ENOENT))
            });
            assert!(is_gone || std::thread::panicking(), "cannot remove a cgroup called {name:?}");
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
        // A worker of an agent's can hang in the kernel for as long as a test lets it.
        let is_gone = wait::until(wait::PATIENCE, || {
            last = remove(&self.path);
            last.is_ok()
        });
        if !is_gone && !std::thread::panicking() {
            panic!("cannot remove cgroup {}: {last:?}", self.path.display());
        }
    }
}

/// Kills who is in a cgroup and removes it and those below it.
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
    // Threaded cgroups do not tell; then the one that they are threads of does.
    let members = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    for pid in members.lines().filter_map(|line| line.parse().ok()) {
        // One that has just ended needs no killing.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    fs::remove_dir(path)
}
