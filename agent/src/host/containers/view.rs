//! Files as another process sees them: what runtimes of users, and those in containers, keep lies in mounts of their own.
//!
//! Nothing that is found there can lead out of that process's root, or keep the reader waiting.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read as _},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::stat::Mode,
};

/// What runtimes write of a container is a hundredth of that.
const SIZE_MAX: u64 = 16 << 20;

#[derive(Debug)]
pub(super) struct View {
    root: OwnedFd,
}

impl View {
    /// That of a process, or our own where we may not look into it.
    pub(super) fn of(process: u32) -> io::Result<Self> {
        let root = |path: &str| open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
        let root = root(&format!("/proc/{process}/root")).or_else(|_| root("/"))?;
        Ok(Self { root })
    }

    /// A whole file.
    pub(super) fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let file = File::from(self.open(path, OFlag::O_NONBLOCK | OFlag::O_NOCTTY)?);
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        let mut bytes = Vec::with_capacity(metadata.len().min(SIZE_MAX) as usize);
        file.take(SIZE_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// The number in a file.
    pub(super) fn number(&self, path: &Path) -> Option<u32> {
        str::from_utf8(&self.read(path).ok()?).ok()?.trim().parse().ok()
    }

    /// What is in a folder.
    pub(super) fn list(&self, path: &Path) -> Vec<OsString> {
        let Ok(folder) = self.open(path, OFlag::O_DIRECTORY) else { return Vec::new() };
        let entries = fs::read_dir(PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())));
        entries.into_iter().flatten().flatten().map(|entry| entry.file_name()).collect()
    }

    /// What tells a file or a folder from all others.
    pub(super) fn identity(&self, path: &Path) -> Option<(u64, u64)> {
        let metadata = File::from(self.open(path, OFlag::O_PATH).ok()?).metadata().ok()?;
        Some((metadata.dev(), metadata.ino()))
    }

    fn open(&self, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
        let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
        Ok(openat2(self.root.as_fd(), path, how)?)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::unistd::mkfifo;

    use super::*;

    #[test]
    fn files_are_read_and_what_is_none_keeps_nobody_waiting() {
        let folder = std::env::temp_dir().join(format!("sockpolicy-view-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("pid"), "812\n").unwrap();
        symlink(folder.join("pid"), folder.join("link")).unwrap();
        mkfifo(&folder.join("fifo"), Mode::S_IRUSR).unwrap();
        let view = View::of(std::process::id()).unwrap();
        assert_eq!(view.number(&folder.join("pid")), Some(812));
        assert_eq!(view.number(&folder.join("link")), Some(812));
        assert!(view.read(&folder.join("fifo")).is_err());
        assert!(view.read(&folder).is_err());
        let mut names = view.list(&folder);
        names.sort();
        assert_eq!(names, ["fifo", "link", "pid"]);
        fs::remove_dir_all(&folder).unwrap();
    }
}
