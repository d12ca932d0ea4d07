//! Reads files in the root directory of another process. Runtimes of users, and runtimes in containers, keep their files in
//! mounts of their own.
//!
//! Only regular files of one user are read, within a [`Budget`]. Paths cannot lead out of the root of that process. A file of a
//! tenant can still block its reader (FUSE); only worker processes read such files.

use std::{
    ffi::OsString,
    fs::{self, File, Metadata},
    io::{self, Read as _},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    rc::Rc,
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::stat::Mode,
};

use super::budget::Budget;

/// The maximum size of a file in bytes. The file of a runtime about one container has a hundredth of this size; podman has one
/// file for all its containers.
const SIZE_MAX: u64 = 16 << 20;

/// The mode bits for write permission of the group and of others.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// The files of one user below the root directory of a process.
#[derive(Debug)]
pub(super) struct View {
    root: OwnedFd,
    /// The required owner of each file.
    owner: u32,
    budget: Rc<Budget>,
}

impl View {
    /// Opens the root directory of a process.
    pub(super) fn of(process: u32, owner: u32, budget: &Rc<Budget>) -> io::Result<Self> {
        Self::at(&format!("/proc/{process}/root"), owner, budget)
    }

    /// Opens the root directory of this process, for files of root.
    pub(super) fn own(budget: &Rc<Budget>) -> io::Result<Self> {
        Self::at("/", 0, budget)
    }

    fn at(root: &str, owner: u32, budget: &Rc<Budget>) -> io::Result<Self> {
        let root = open(root, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        Ok(Self { root, owner, budget: Rc::clone(budget) })
    }

    /// Reads a whole file.
    ///
    /// # Errors
    ///
    /// Fails if the path is not a regular file of the owner, or if the file exceeds the limits.
    pub(super) fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let (file, metadata) = self.open(path, OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_NOFOLLOW)?;
        if !metadata.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        if metadata.len() > SIZE_MAX || !self.budget.take_bytes(metadata.len()) {
            return Err(io::Error::other("too large"));
        }
        let mut bytes = Vec::with_capacity(metadata.len() as usize);
        // The file can grow while it is read. Files in procfs have the length 0, so they are read as empty.
        file.take(metadata.len()).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads a pid file.
    pub(super) fn pid(&self, path: &Path) -> Option<u32> {
        parse_pid(&self.read(path).ok()?)
    }

    /// Lists a directory in which only the owner can create files.
    ///
    /// # Errors
    ///
    /// Fails if the path is not a directory of the owner, or if other users can write to it.
    pub(super) fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        let (directory, metadata) = self.open(path, OFlag::O_DIRECTORY | OFlag::O_NONBLOCK)?;
        if metadata.mode() & WRITABLE_BY_OTHERS != 0 {
            return Err(io::Error::other("users other than its owner may write to it"));
        }
        let entries = fs::read_dir(PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())))?;
        let names = entries.flatten().map(|entry| entry.file_name());
        Ok(names.take_while(|_| self.budget.take_file()).collect())
    }

    /// Returns the device and the inode number of a file or directory, which identify it.
    pub(super) fn identity(&self, path: &Path) -> Option<(u64, u64)> {
        let (_, metadata) = self.open(path, OFlag::O_PATH).ok()?;
        Some((metadata.dev(), metadata.ino()))
    }

    fn open(&self, path: &Path, flags: OFlag) -> io::Result<(File, Metadata)> {
        if !self.budget.take_file() {
            return Err(io::Error::other("too many files"));
        }
        let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve);
        let file = File::from(openat2(self.root.as_fd(), path, how)?);
        let metadata = file.metadata()?;
        if metadata.uid() != self.owner {
            return Err(io::Error::other(format!("it belongs to user {}, not to user {}", metadata.uid(), self.owner)));
        }
        Ok((file, metadata))
    }
}

/// Parses a pid file.
#[must_use]
pub fn parse_pid(bytes: &[u8]) -> Option<u32> {
    str::from_utf8(bytes).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, time::Duration};

    use nix::unistd::{geteuid, mkfifo};

    use super::*;

    #[test]
    fn only_regular_files_of_the_owner_are_read() {
        let folder = std::env::temp_dir().join(format!("sockpolicy-view-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("pid"), "812\n").unwrap();
        symlink(folder.join("pid"), folder.join("link")).unwrap();
        mkfifo(&folder.join("fifo"), Mode::S_IRUSR).unwrap();
        let own = geteuid().as_raw();
        let budget = || Rc::new(Budget::new(1 << 20, 100, Duration::from_secs(60)));
        let view = View::of(std::process::id(), own, &budget()).unwrap();
        assert_eq!(view.pid(&folder.join("pid")), Some(812));
        // The path of a bundle often contains a symbolic link to a directory.
        symlink(&folder, folder.join("itself")).unwrap();
        assert_eq!(view.pid(&folder.join("itself/pid")), Some(812));
        for other in ["link", "fifo", "", "itself"] {
            assert!(view.read(&folder.join(other)).is_err(), "{other}");
        }
        assert_eq!(view.pid(Path::new("/proc/sys/kernel/pid_max")), None);
        let mut names = view.list(&folder).unwrap();
        names.sort();
        assert_eq!(names, ["fifo", "itself", "link", "pid"]);

        let of_another = View::of(std::process::id(), own + 1, &budget()).unwrap();
        assert!(of_another.read(&folder.join("pid")).is_err() && of_another.list(&folder).is_err());
        fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        assert!(view.list(&folder).is_err());

        let few = Rc::new(Budget::new(3, 100, Duration::from_secs(60)));
        assert!(View::of(std::process::id(), own, &few).unwrap().read(&folder.join("pid")).is_err());
        assert!(few.is_exceeded());
        fs::remove_dir_all(&folder).unwrap();
    }
}
