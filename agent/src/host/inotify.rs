//! Folders, watched for what comes and goes in them (inotify(7)).
//!
//! Says that something has changed, never what: who asks looks for himself, so that nothing that the kernel leaves out, or tells
//! too late, can be missed.

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
        "cannot watch {}, nor any more after it: {source}\n  help: sysctl fs.inotify.max_user_watches says how many \
         folders a user may watch",
        folder.escaped()
    )]
    Add { folder: PathBuf, source: io::Error },
}

/// What is to be told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changes {
    /// Files that are written, come, go or are replaced, or get another owner or mode.
    Files,
    /// Folders that come or go.
    Folders,
}

#[derive(Debug)]
pub struct Watch {
    inotify: Inotify,
    changes: AddWatchFlags,
    watched: BTreeMap<PathBuf, WatchDescriptor>,
}

impl Watch {
    /// # Errors
    ///
    /// Where this user watches too much already.
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

    /// Watches these folders and no others; those that are not there are left out. Gives whether any was not watched before:
    /// what is in it may have changed since somebody looked.
    ///
    /// # Errors
    ///
    /// Where there are more than may be watched.
    pub fn follow(&mut self, folders: &BTreeSet<PathBuf>) -> Result<bool, WatchError> {
        let mut watched = BTreeMap::new();
        let mut failed = Ok(());
        for folder in folders {
            match self.add(folder) {
                Ok(descriptor) => drop(watched.insert(folder.clone(), descriptor)),
                Err(Errno::ENOENT | Errno::ENODEV | Errno::ENOTDIR | Errno::ELOOP | Errno::EACCES) => {}
                // What is watched already stays so.
                Err(errno) => failed = Err(WatchError::Add { folder: folder.clone(), source: errno.into() }),
            }
            if failed.is_err() {
                break;
            }
        }
        if failed.is_err() {
            let before = self.watched.iter().filter(|(folder, _)| folders.contains(*folder));
            watched.extend(before.map(|(folder, descriptor)| (folder.clone(), *descriptor)));
        }
        // The same folder may have several paths.
        let kept: HashSet<WatchDescriptor> = watched.values().copied().collect();
        for gone in self.watched.values().filter(|descriptor| !kept.contains(descriptor)) {
            // Fails where the folder is gone, and its watch with it.
            let _ = self.inotify.rm_watch(*gone);
        }
        let has_new = watched.iter().any(|(folder, descriptor)| self.watched.get(folder) != Some(descriptor));
        self.watched = watched;
        failed.map(|()| has_new)
    }

    /// Watches a folder at a path of any length.
    fn add(&self, folder: &Path) -> Result<WatchDescriptor, Errno> {
        if folder.as_os_str().len() < libc::PATH_MAX as usize {
            return self.inotify.add_watch(folder, self.changes);
        }
        let opened = cgroup::open_directory(folder);
        let opened = opened.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
        self.inotify.add_watch(format!("/proc/self/fd/{}", opened.as_raw_fd()).as_str(), self.changes)
    }

    /// Whether anything has changed since this was last asked.
    ///
    /// # Errors
    ///
    /// Where the kernel does not tell.
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
