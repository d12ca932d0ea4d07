//! Watches directories for changes (inotify(7)).
//!
//! Reports that something has changed, but not what. The caller reads the directories again, so that a lost or late event loses
//! nothing.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor},
};

use super::cgroup;
use crate::escape::Escape;

#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    #[error("cannot watch for changes: {0}")]
    Init(#[source] io::Error),
    #[error(
        "cannot watch {} and the remaining directories: {source}\n  help: show the limit of watched directories per user: \
         sysctl fs.inotify.max_user_watches",
        folder.escaped()
    )]
    Add { folder: PathBuf, source: io::Error },
}

/// The changes to report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changes {
    /// A file is created, written, replaced or deleted, or its owner or mode changes.
    Files,
    /// A directory is created, renamed or deleted.
    Folders,
}

/// A set of watched directories.
#[derive(Debug)]
pub struct Watch {
    inotify: Inotify,
    changes: AddWatchFlags,
    watched: BTreeMap<PathBuf, WatchDescriptor>,
}

impl Watch {
    /// Creates an inotify instance that watches no directory.
    ///
    /// # Errors
    ///
    /// Fails if the user has too many inotify instances, or the process has too many descriptors.
    pub fn new(changes: Changes) -> Result<Self, WatchError> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC);
        let inotify = inotify.map_err(|errno| WatchError::Init(errno.into()))?;
        let entries = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVE;
        let changes = match changes {
            Changes::Files => {
                entries | AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_ATTRIB
            }
            Changes::Folders => entries,
        };
        Ok(Self { inotify, changes: changes | AddWatchFlags::IN_ONLYDIR, watched: BTreeMap::new() })
    }

    /// Watches these directories and no others. Ignores directories that do not exist or cannot be read. Returns whether any of
    /// them was not watched before: such a directory may have changed since the caller read it.
    ///
    /// # Errors
    ///
    /// Fails if the limit of watches is reached. Directories that are watched already stay watched.
    pub fn follow(&mut self, folders: &BTreeSet<PathBuf>) -> Result<bool, WatchError> {
        let mut watched = BTreeMap::new();
        let mut failed = Ok(());
        for folder in folders {
            match self.add(folder) {
                Ok(descriptor) => drop(watched.insert(folder.clone(), descriptor)),
                Err(Errno::ENOENT | Errno::ENODEV | Errno::ENOTDIR | Errno::ELOOP | Errno::EACCES) => {}
                Err(errno) => failed = Err(WatchError::Add { folder: folder.clone(), source: errno.into() }),
            }
            if failed.is_err() {
                break;
            }
        }
        if failed.is_err() {
            let still_wanted = self.watched.iter().filter(|(folder, _)| folders.contains(*folder));
            watched.extend(still_wanted.map(|(folder, descriptor)| (folder.clone(), *descriptor)));
        }
        // Several paths can lead to one directory, which has one watch.
        let kept: HashSet<WatchDescriptor> = watched.values().copied().collect();
        for unwanted in self.watched.values().filter(|descriptor| !kept.contains(descriptor)) {
            // Fails if the directory was deleted: the kernel has removed the watch.
            let _ = self.inotify.rm_watch(*unwanted);
        }
        let has_new = watched.iter().any(|(folder, descriptor)| self.watched.get(folder) != Some(descriptor));
        self.watched = watched;
        failed.map(|()| has_new)
    }

    /// Watches a directory at a path of any length.
    fn add(&self, folder: &Path) -> Result<WatchDescriptor, Errno> {
        if folder.as_os_str().len() < libc::PATH_MAX as usize {
            return self.inotify.add_watch(folder, self.changes);
        }
        let opened = cgroup::open_directory(folder);
        let opened = opened.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
        self.inotify.add_watch(format!("/proc/self/fd/{}", opened.as_raw_fd()).as_str(), self.changes)
    }

    /// Returns whether anything has changed since the last call. Does not wait.
    ///
    /// # Errors
    ///
    /// Fails if the events cannot be read.
    pub fn has_changed(&mut self) -> io::Result<bool> {
        let mut has_changed = false;
        loop {
            match self.inotify.read_events() {
                Ok(events) => has_changed |= !events.is_empty(),
                Err(Errno::EAGAIN) => return Ok(has_changed),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Readable when something has changed.
impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}
