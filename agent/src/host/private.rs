//! Directories that only root and the user of this process can change. They contain pins, records and journals.
//!
//! Below a system directory, each component is opened relative to the descriptor of its parent, without following symbolic
//! links (openat(2) with O_NOFOLLOW). Therefore no other user can replace a file between its check and its use.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, renameat},
    sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat, mkdirat},
    unistd::{Uid, UnlinkatFlags, unlinkat},
};

use crate::escape::Escape;

/// Mode of a directory that no other user may enter.
const PRIVATE: Mode = Mode::S_IRWXU;

#[derive(Debug, thiserror::Error)]
pub enum PrivateError {
    #[error("cannot use {}: {why}\n  help: {help}", path.escaped())]
    Unsafe { path: PathBuf, why: String, help: String },
    #[error("cannot use {}: {source}", path.escaped())]
    Io { path: PathBuf, source: io::Error },
}

/// An open directory.
#[derive(Debug)]
pub struct PrivateDir {
    fd: OwnedFd,
    path: PathBuf,
}

impl PrivateDir {
    /// Opens a system directory, such as `/run`. Follows symbolic links.
    ///
    /// # Errors
    ///
    /// Fails if users other than root and the user of this process can replace its entries.
    pub fn system(path: &Path) -> Result<Self, PrivateError> {
        let failed = |errno: Errno| PrivateError::Io { path: path.to_owned(), source: errno.into() };
        let fd = nix::fcntl::open(path, directory_flags() & !OFlag::O_NOFOLLOW, Mode::empty()).map_err(failed)?;
        let stat = fstat(&fd).map_err(failed)?;
        let is_sticky = mode_of(&stat).contains(Mode::S_ISVTX);
        check_owner(path, &stat)?;
        if !is_sticky {
            check_mode(path, &stat)?;
        }
        Ok(Self { fd, path: path.to_owned() })
    }

    /// Opens a directory in this one. Returns `None` if the entry does not exist.
    ///
    /// # Errors
    ///
    /// Fails if the entry is not a directory, or if a user other than root and the user of this process owns it or can write to
    /// it.
    pub fn open(&self, name: &str) -> Result<Option<Self>, PrivateError> {
        let path = self.path.join(name);
        let fd = match openat(&self.fd, name, directory_flags(), Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => return Ok(None),
            // O_NOFOLLOW with O_DIRECTORY gives ENOTDIR for a symbolic link (open(2)).
            Err(Errno::ENOTDIR | Errno::ELOOP) => return Err(self.not_a_directory(name)),
            Err(errno) => return Err(PrivateError::Io { path, source: errno.into() }),
        };
        let stat = fstat(&fd).map_err(|errno| PrivateError::Io { path: path.clone(), source: errno.into() })?;
        check_owner(&path, &stat)?;
        check_mode(&path, &stat)?;
        Ok(Some(Self { fd, path }))
    }

    /// Opens a directory in this one, and makes it if it does not exist. Sets its mode to 0700, independent of the umask.
    ///
    /// # Errors
    ///
    /// Fails as [`Self::open`] does, and if the directory cannot be made.
    pub fn create(&self, name: &str) -> Result<Self, PrivateError> {
        let failed = |errno: Errno| PrivateError::Io { path: self.path.join(name), source: errno.into() };
        match mkdirat(&self.fd, name, PRIVATE) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(failed(errno)),
        }
        let directory = self.open(name)?.ok_or_else(|| failed(Errno::ENOENT))?;
        let stat = fstat(&directory.fd).map_err(failed)?;
        if mode_of(&stat) != PRIVATE && Uid::from_raw(stat.st_uid) == Uid::effective() {
            fchmod(&directory.fd, PRIVATE).map_err(failed)?;
        }
        Ok(directory)
    }

    fn not_a_directory(&self, name: &str) -> PrivateError {
        let path = self.path.join(name);
        let what = match self.stat(name) {
            Ok(Some(stat)) => kind_of(&stat),
            _ => "not a directory",
        };
        PrivateError::Unsafe { why: format!("it is {what}"), help: remove_it(&path), path }
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns a path to an entry that leads through the descriptor of this directory, for system calls that accept only paths.
    #[must_use]
    pub fn through(&self, name: &str) -> PathBuf {
        Path::new("/proc/self/fd").join(self.fd.as_raw_fd().to_string()).join(name)
    }

    /// Returns the names of all entries, sorted.
    ///
    /// # Errors
    ///
    /// Fails if the directory cannot be read.
    pub fn names(&self) -> Result<Vec<OsString>, PrivateError> {
        let failed = |errno: Errno| PrivateError::Io { path: self.path.clone(), source: errno.into() };
        let mut dir = Dir::openat(&self.fd, ".", directory_flags(), Mode::empty()).map_err(failed)?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(OsStr::from_bytes(name).to_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    fn stat(&self, name: &str) -> Result<Option<FileStat>, PrivateError> {
        match fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(PrivateError::Io { path: self.path.join(name), source: errno.into() }),
        }
    }

    /// Returns whether a regular file with this name exists that only root and the user of this process can change.
    #[must_use]
    pub fn has_file(&self, name: &str) -> bool {
        self.find_file(name).unwrap_or(false)
    }

    /// Returns whether an entry with this name exists.
    ///
    /// # Errors
    ///
    /// Fails as [`Self::open_file`] does.
    pub fn find_file(&self, name: &str) -> Result<bool, PrivateError> {
        let stat = self.stat(name)?;
        stat.map(|stat| check_file(&self.path.join(name), &stat)).transpose().map(|found| found.is_some())
    }

    /// Opens a regular file. Returns `None` if the entry does not exist and `flags` do not contain O_CREAT. A new file has mode
    /// 0600.
    ///
    /// # Errors
    ///
    /// Fails if the entry is not a regular file or has another hard link. Fails if a user other than root and the user of this
    /// process owns it or can write to it.
    pub fn open_file(&self, name: &str, flags: OFlag) -> Result<Option<File>, PrivateError> {
        let path = self.path.join(name);
        // O_NONBLOCK: opening a FIFO must not wait for a writer.
        let safe = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let opened = openat(&self.fd, name, flags | safe, Mode::S_IRUSR | Mode::S_IWUSR);
        let file = match opened {
            Ok(fd) => File::from(fd),
            Err(Errno::ENOENT) if !flags.contains(OFlag::O_CREAT) => return Ok(None),
            Err(errno) => return Err(self.unusable(name, errno)),
        };
        let stat = fstat(&file).map_err(|errno| PrivateError::Io { path: path.clone(), source: errno.into() })?;
        check_file(&path, &stat)?;
        Ok(Some(file))
    }

    /// Returns the error for an entry that cannot be opened: a failed check of the entry, else `errno`.
    fn unusable(&self, name: &str, errno: Errno) -> PrivateError {
        let path = self.path.join(name);
        match self.stat(name) {
            Ok(Some(stat)) => match check_file(&path, &stat) {
                Err(error) => error,
                Ok(()) => PrivateError::Io { path, source: errno.into() },
            },
            _ => PrivateError::Io { path, source: errno.into() },
        }
    }

    /// Removes a file. A file that does not exist is not an error.
    ///
    /// # Errors
    ///
    /// Fails as unlinkat(2) does.
    pub fn remove_file(&self, name: &str) -> Result<(), PrivateError> {
        self.unlink(name, UnlinkatFlags::NoRemoveDir)
    }

    /// Removes an empty directory. A directory that does not exist is not an error.
    ///
    /// # Errors
    ///
    /// Fails as unlinkat(2) does.
    pub fn remove_dir(&self, name: &str) -> Result<(), PrivateError> {
        self.unlink(name, UnlinkatFlags::RemoveDir)
    }

    fn unlink(&self, name: &str, flags: UnlinkatFlags) -> Result<(), PrivateError> {
        match unlinkat(&self.fd, name, flags) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(PrivateError::Io { path: self.path.join(name), source: errno.into() }),
        }
    }

    /// Renames an entry. Replaces an existing entry with the new name.
    ///
    /// # Errors
    ///
    /// Fails as renameat(2) does.
    pub fn rename(&self, name: &str, new: &str) -> Result<(), PrivateError> {
        let renamed = renameat(&self.fd, name, &self.fd, new);
        renamed.map_err(|errno| PrivateError::Io { path: self.path.join(new), source: errno.into() })
    }

    /// Returns whether an open file is the entry with this name.
    #[must_use]
    pub fn is_entry(&self, file: &File, name: &str) -> bool {
        let (Ok(one), Ok(Some(other))) = (fstat(file), self.stat(name)) else { return false };
        (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
    }

    /// Opens the directory again, so that flock(2) on the result is independent of other descriptors.
    ///
    /// # Errors
    ///
    /// Fails if no descriptors are left.
    pub fn reopen(&self) -> Result<File, PrivateError> {
        let opened = openat(&self.fd, ".", directory_flags(), Mode::empty());
        opened.map(File::from).map_err(|errno| PrivateError::Io { path: self.path.clone(), source: errno.into() })
    }
}

impl AsFd for PrivateDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn directory_flags() -> OFlag {
    OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC
}

fn mode_of(stat: &FileStat) -> Mode {
    Mode::from_bits_truncate(stat.st_mode)
}

fn kind_of(stat: &FileStat) -> &'static str {
    match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFLNK => "a symbolic link",
        SFlag::S_IFDIR => "a directory",
        SFlag::S_IFIFO => "a pipe",
        SFlag::S_IFSOCK => "a socket",
        SFlag::S_IFREG => "a regular file",
        _ => "a device",
    }
}

fn check_owner(path: &Path, stat: &FileStat) -> Result<(), PrivateError> {
    let owner = Uid::from_raw(stat.st_uid);
    if owner.is_root() || owner == Uid::effective() {
        return Ok(());
    }
    let parent = path.parent().unwrap_or(path).escaped();
    Err(PrivateError::Unsafe {
        path: path.to_owned(),
        why: format!("it belongs to user {owner}"),
        help: format!("{}; to keep other users out of {parent}: chmod go-w {parent}", remove_it(path)),
    })
}

fn check_mode(path: &Path, stat: &FileStat) -> Result<(), PrivateError> {
    let mode = mode_of(stat);
    if !mode.intersects(Mode::S_IWGRP | Mode::S_IWOTH) {
        return Ok(());
    }
    let shown = path.escaped();
    Err(PrivateError::Unsafe {
        path: path.to_owned(),
        why: format!("users other than its owner may write to it (mode {:04o})", mode.bits()),
        help: format!("check what it contains (ls -la {shown}), then: chmod go-w {shown}"),
    })
}

fn check_file(path: &Path, stat: &FileStat) -> Result<(), PrivateError> {
    let unsafe_for = |why: String| PrivateError::Unsafe { path: path.to_owned(), why, help: remove_it(path) };
    if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
        return Err(unsafe_for(format!("it is {}", kind_of(stat))));
    }
    // 0 means that the file was removed after it was opened.
    if stat.st_nlink > 1 {
        return Err(unsafe_for(format!("it has {} hard links", stat.st_nlink)));
    }
    check_owner(path, stat)?;
    check_mode(path, stat)
}

fn remove_it(path: &Path) -> String {
    let shown = path.escaped();
    format!("check what it is (ls -lad {shown}), then remove it: rm -r {shown}")
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, Permissions},
        os::unix::fs::{PermissionsExt as _, symlink},
    };

    use super::*;

    /// A temporary directory, removed when this is dropped.
    struct Top(PathBuf);

    impl Drop for Top {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// Makes a directory, which the first value removes when it is dropped, and opens it.
    fn top(name: &str) -> (Top, PrivateDir) {
        let path = std::env::temp_dir().join(format!("sockpolicy-private-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        let dir = PrivateDir::system(&path).unwrap();
        (Top(path), dir)
    }

    fn why(error: PrivateError) -> String {
        match error {
            PrivateError::Unsafe { why, .. } => why,
            PrivateError::Io { source, .. } => source.to_string(),
        }
    }

    #[test]
    fn create_makes_an_existing_directory_private() {
        let (top, dir) = top("made");
        for mode in [0o755, 0o500, 0o700] {
            fs::create_dir(top.0.join("d")).unwrap();
            fs::set_permissions(top.0.join("d"), Permissions::from_mode(mode)).unwrap();
            dir.create("d").unwrap();
            assert_eq!(fs::metadata(top.0.join("d")).unwrap().permissions().mode() & 0o7777, 0o700);
            fs::remove_dir(top.0.join("d")).unwrap();
        }
    }

    #[test]
    fn directory_that_others_can_write_to_is_refused() {
        let (top, dir) = top("writable");
        for mode in [0o770, 0o702, 0o1777] {
            let path = top.0.join("d");
            dir.create("d").unwrap();
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert!(why(dir.open("d").unwrap_err()).contains(&format!("(mode {mode:04o})")));
            assert!(dir.create("d").is_err());
            fs::remove_dir(&path).unwrap();
        }
        fs::set_permissions(&top.0, Permissions::from_mode(0o777)).unwrap();
        assert!(PrivateDir::system(&top.0).is_err());
        fs::set_permissions(&top.0, Permissions::from_mode(0o1777)).unwrap();
        assert!(PrivateDir::system(&top.0).is_ok());
    }

    #[test]
    fn symbolic_link_is_not_followed() {
        let (top, dir) = top("links");
        fs::create_dir(top.0.join("there")).unwrap();
        fs::write(top.0.join("there/file"), "kept").unwrap();
        symlink("there", top.0.join("d")).unwrap();
        symlink("there/file", top.0.join("f")).unwrap();
        symlink("nowhere", top.0.join("n")).unwrap();
        assert_eq!(why(dir.open("d").unwrap_err()), "it is a symbolic link");
        assert_eq!(why(dir.create("d").unwrap_err()), "it is a symbolic link");
        assert_eq!(why(dir.create("n").unwrap_err()), "it is a symbolic link");
        for (name, flags) in [("f", OFlag::O_RDWR), ("f", OFlag::O_RDWR | OFlag::O_CREAT), ("n", OFlag::O_CREAT)] {
            assert_eq!(why(dir.open_file(name, flags).unwrap_err()), "it is a symbolic link");
        }
        assert!(!dir.has_file("f"));
        dir.remove_file("f").unwrap();
        assert_eq!(fs::read(top.0.join("there/file")).unwrap(), b"kept");
        assert!(!top.0.join("nowhere").exists());
    }

    #[test]
    fn files_that_are_not_regular_are_refused_without_blocking() {
        let (top, dir) = top("kinds");
        nix::unistd::mkfifo(&top.0.join("fifo"), Mode::S_IRWXU).unwrap();
        fs::create_dir(top.0.join("dir")).unwrap();
        fs::write(top.0.join("one"), "").unwrap();
        fs::hard_link(top.0.join("one"), top.0.join("two")).unwrap();
        for (name, what) in [("fifo", "it is a pipe"), ("dir", "it is a directory"), ("two", "it has 2 hard links")] {
            for flags in [OFlag::O_RDONLY, OFlag::O_WRONLY, OFlag::O_RDWR | OFlag::O_CREAT] {
                assert_eq!(why(dir.open_file(name, flags).unwrap_err()), what);
            }
            assert!(!dir.has_file(name));
        }
        fs::remove_file(top.0.join("two")).unwrap();
        assert!(dir.has_file("one") && dir.open_file("one", OFlag::O_RDONLY).unwrap().is_some());
        assert!(dir.open_file("none", OFlag::O_RDONLY).unwrap().is_none());
    }
}
