//! Finds out which users can change a file or replace it by another one.
//!
//! Each directory on the path from `/` is checked, and each directory that a symbolic link on the path leads through. A similar
//! check in OpenSSH protects keys (`safe_path`, misc.c). Unlike OpenSSH, this module accepts sticky directories, since only the
//! owner of an entry can replace the entry. It also accepts all files on a file system that is mounted read-only.

use std::{
    collections::VecDeque,
    env,
    ffi::{OsStr, OsString},
    fmt,
    fs::File,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat, readlinkat},
    sys::{
        stat::{FileStat, Mode, SFlag, fstat},
        statvfs::{FsFlags, fstatvfs},
    },
    unistd::Uid,
};

use crate::escape::Escape;

/// The maximum number of symbolic links to follow, as in the kernel (MAXSYMLINKS, include/linux/namei.h).
const LINKS_MAX: usize = 40;

/// The users who may own a file and the directories on its path.
#[derive(Clone, Debug)]
pub struct Owners(Vec<Uid>);

impl Owners {
    /// Returns root, the effective user of this process and, if root runs this process by sudo, the user who called sudo.
    #[must_use]
    pub fn of_this_process() -> Self {
        Self::of(Uid::current(), Uid::effective(), env::var_os("SUDO_UID").as_deref())
    }

    fn of(real: Uid, effective: Uid, sudo: Option<&OsStr>) -> Self {
        let mut owners = vec![Uid::from_raw(0), effective];
        // A user other than root can set this variable to any value.
        if real.is_root() {
            owners.extend(sudo.and_then(parse_uid));
        }
        Self(owners)
    }
}

/// Parses a uid in the form that sudo writes: only digits.
fn parse_uid(text: &OsStr) -> Option<Uid> {
    let text = text.to_str().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?;
    text.parse().ok().map(Uid::from_raw)
}

/// A file, directory or link through which other users can change a file, or which prevents the check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weakness {
    /// The file itself, or a directory or link on its path.
    pub path: PathBuf,
    kind: FileKind,
    pub reason: Reason,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileKind {
    File,
    Directory,
    Link,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It belongs to this user.
    Owner(Uid),
    /// Its group or all users may write to it.
    Writable(Mode),
    /// The file has several hard links, and all users may make links to files of others in its directory.
    HardLinks,
    /// The check failed for this reason.
    Unknown(String),
}

/// Writes the reason, in words that follow "cannot use FILE: ".
impl fmt::Display for Weakness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.escaped();
        let subject = match self.kind {
            FileKind::File => "it".to_owned(),
            FileKind::Directory => format!("directory {path}"),
            FileKind::Link => format!("symbolic link {path}"),
        };
        match &self.reason {
            Reason::Owner(owner) => write!(f, "{subject} belongs to user {owner}"),
            Reason::Writable(mode) => {
                write!(f, "users other than its owner may write to {subject} (mode {:04o})", mode.bits())
            }
            Reason::HardLinks => {
                write!(f, "{subject} has several hard links, and all users may make links in its directory")
            }
            Reason::Unknown(why) => write!(f, "cannot find out who can change {path}: {why}"),
        }
    }
}

/// Returns all weaknesses that let users other than `owners` change an open file or replace the file at its path.
#[must_use]
pub fn weaknesses(path: &Path, file: &File, owners: &Owners) -> Vec<Weakness> {
    let mut walk = Walk { owners, found: Vec::new(), directories: Vec::new(), links: 0 };
    let unknown =
        |reason: String| Weakness { path: path.to_owned(), kind: FileKind::File, reason: Reason::Unknown(reason) };
    match walk.walk(path) {
        Ok(stat) if !is_same(&stat, file) => {
            walk.found.push(unknown("the path leads to another file now".to_owned()));
        }
        Ok(_) => {}
        Err(error) => walk.found.push(unknown(error.to_string())),
    }
    walk.found
}

fn is_same(stat: &FileStat, file: &File) -> bool {
    fstat(file).is_ok_and(|other| (stat.st_dev, stat.st_ino) == (other.st_dev, other.st_ino))
}

/// The resolution of a path from `/` to a file, one component at a time.
struct Walk<'a> {
    owners: &'a Owners,
    found: Vec<Weakness>,
    /// The current directory of the walk, last, and its ancestors.
    directories: Vec<Directory>,
    /// The number of symbolic links that were followed.
    links: usize,
}

struct Directory {
    fd: OwnedFd,
    path: PathBuf,
    /// Whether users other than its owner can make entries in it.
    is_open_to_others: bool,
}

impl Walk<'_> {
    /// Resolves the whole path and records each weakness on it. Returns the status of the file.
    fn walk(&mut self, path: &Path) -> io::Result<FileStat> {
        let path = if path.is_absolute() { path.to_owned() } else { env::current_dir()?.join(path) };
        let mut names = components(path.as_os_str());
        self.enter_root()?;
        let mut file = None;
        while let Some(name) = names.pop_front() {
            match name.as_bytes() {
                b"" | b"." => {}
                b".." => self.leave(),
                _ => file = self.step(&name, &mut names)?,
            }
        }
        file.ok_or_else(|| Errno::EISDIR.into())
    }

    fn enter_root(&mut self) -> io::Result<()> {
        self.directories.clear();
        let fd = nix::fcntl::open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        let stat = fstat(&fd)?;
        self.enter(fd, PathBuf::from("/"), &stat);
        Ok(())
    }

    /// Goes to the parent directory. The parent of `/` is `/`.
    fn leave(&mut self) {
        if self.directories.len() > 1 {
            self.directories.pop();
        }
    }

    /// Resolves one component: enters a directory, follows a symbolic link, or returns the status of a file.
    fn step(&mut self, name: &OsStr, names: &mut VecDeque<OsString>) -> io::Result<Option<FileStat>> {
        let Some(directory) = self.directories.last() else { return Err(Errno::ENOENT.into()) };
        let (path, is_open_to_others) = (directory.path.join(name), directory.is_open_to_others);
        let fd = openat(&directory.fd, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
        let stat = fstat(&fd)?;
        match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
            SFlag::S_IFDIR => self.enter(fd, path, &stat),
            SFlag::S_IFLNK => {
                self.check_owner(FileKind::Link, &path, &stat);
                self.follow(&fd, names)?;
            }
            _ => {
                self.check_file(&fd, &path, &stat, is_open_to_others);
                return Ok(Some(stat));
            }
        }
        Ok(None)
    }

    /// Puts the target of a symbolic link before the remaining components.
    fn follow(&mut self, link: &OwnedFd, names: &mut VecDeque<OsString>) -> io::Result<()> {
        self.links += 1;
        if self.links > LINKS_MAX {
            return Err(Errno::ELOOP.into());
        }
        let target = readlinkat(link, "")?;
        if target.as_bytes().starts_with(b"/") {
            self.enter_root()?;
        }
        for name in components(&target).into_iter().rev() {
            names.push_front(name);
        }
        Ok(())
    }

    fn check_file(&mut self, fd: &OwnedFd, path: &Path, stat: &FileStat, is_open_to_others: bool) {
        self.check_owner(FileKind::File, path, stat);
        if is_writable(stat) && !is_read_only(fd) {
            self.record(FileKind::File, path, Reason::Writable(mode_of(stat)));
        }
        if is_open_to_others && stat.st_nlink > 1 {
            self.record(FileKind::File, path, Reason::HardLinks);
        }
    }

    fn enter(&mut self, fd: OwnedFd, path: PathBuf, stat: &FileStat) {
        self.check_owner(FileKind::Directory, &path, stat);
        let is_open_to_others = is_writable(stat) && !is_read_only(&fd);
        if is_open_to_others && !mode_of(stat).contains(Mode::S_ISVTX) {
            self.record(FileKind::Directory, &path, Reason::Writable(mode_of(stat)));
        }
        self.directories.push(Directory { fd, path, is_open_to_others });
    }

    fn check_owner(&mut self, kind: FileKind, path: &Path, stat: &FileStat) {
        let owner = Uid::from_raw(stat.st_uid);
        if !self.owners.0.contains(&owner) {
            self.record(kind, path, Reason::Owner(owner));
        }
    }

    fn record(&mut self, kind: FileKind, path: &Path, reason: Reason) {
        let weakness = Weakness { path: path.to_owned(), kind, reason };
        // A path can lead through one directory several times.
        if !self.found.contains(&weakness) {
            self.found.push(weakness);
        }
    }
}

fn components(path: &OsStr) -> VecDeque<OsString> {
    path.as_bytes().split(|byte| *byte == b'/').map(|name| OsStr::from_bytes(name).to_owned()).collect()
}

fn mode_of(stat: &FileStat) -> Mode {
    Mode::from_bits_truncate(stat.st_mode)
}

/// Returns whether users other than the owner may write. The group bits include the entries of an ACL (acl(5)).
fn is_writable(stat: &FileStat) -> bool {
    mode_of(stat).intersects(Mode::S_IWGRP | Mode::S_IWOTH)
}

fn is_read_only(fd: &OwnedFd) -> bool {
    fstatvfs(fd).is_ok_and(|stat| stat.flags().contains(FsFlags::ST_RDONLY))
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

    impl Top {
        /// Makes a directory that contains a file.
        fn new(name: &str) -> Self {
            let path = env::temp_dir().join(format!("sockpolicy-ownership-{name}-{}", std::process::id()));
            fs::create_dir(&path).unwrap();
            let top = Self(path);
            top.mode("", 0o755);
            fs::write(top.0.join("file"), "").unwrap();
            top.mode("file", 0o644);
            top
        }

        fn mode(&self, name: &str, mode: u32) {
            fs::set_permissions(self.0.join(name), Permissions::from_mode(mode)).unwrap();
        }

        /// Returns the weaknesses of a file that are below this directory, each as a path and a reason.
        fn weak(&self, name: &str) -> Vec<String> {
            let path = self.0.join(name);
            let file = File::open(&path).unwrap();
            let found = weaknesses(&path, &file, &Owners::of_this_process());
            let relative = |weakness: &Weakness| weakness.path.strip_prefix(&self.0).map(Path::to_owned);
            let own = found.iter().filter_map(|weakness| Some((relative(weakness).ok()?, weakness)));
            own.map(|(path, weakness)| format!("{}: {:?}", path.escaped(), weakness.reason)).collect()
        }
    }

    impl Drop for Top {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn modes_that_let_others_write_are_found_on_the_file_and_on_each_directory() {
        let top = Top::new("modes");
        fs::create_dir_all(top.0.join("a/b")).unwrap();
        fs::rename(top.0.join("file"), top.0.join("a/b/file")).unwrap();
        let all = ["a/b/file", "a/b", "a"];
        for name in all {
            for (mode, is_weak) in
                [(0o700, false), (0o755, false), (0o775, true), (0o757, true), (0o1777, name == "a/b/file")]
            {
                all.iter().for_each(|name| top.mode(name, 0o755));
                top.mode(name, mode);
                let wanted = is_weak.then(|| format!("{name}: {:?}", Reason::Writable(Mode::from_bits_truncate(mode))));
                assert_eq!(top.weak("a/b/file"), Vec::from_iter(wanted), "{name} {mode:o}");
            }
        }
    }

    #[test]
    fn each_directory_that_a_link_leads_through_is_checked() {
        let top = Top::new("links");
        for directory in ["real", "through", "named"] {
            fs::create_dir(top.0.join(directory)).unwrap();
        }
        fs::rename(top.0.join("file"), top.0.join("real/file")).unwrap();
        symlink("../real/file", top.0.join("through/link")).unwrap();
        symlink(top.0.join("through/./link"), top.0.join("named/link")).unwrap();
        symlink("named", top.0.join("other")).unwrap();
        assert_eq!(top.weak("other/link"), Vec::<String>::new());
        for directory in ["real", "through", "named"] {
            top.mode(directory, 0o777);
            assert_eq!(top.weak("other/link").len(), 1, "{directory}");
            assert_eq!(top.weak("real/file").len(), usize::from(directory == "real"));
            top.mode(directory, 0o755);
        }
    }

    #[test]
    fn hard_link_in_a_world_writable_directory_is_a_weakness() {
        let top = Top::new("hard");
        fs::hard_link(top.0.join("file"), top.0.join("second")).unwrap();
        assert_eq!(top.weak("file"), Vec::<String>::new());
        top.mode("", 0o1777);
        assert_eq!(top.weak("file"), ["file: HardLinks"]);
        fs::remove_file(top.0.join("second")).unwrap();
        assert_eq!(top.weak("file"), Vec::<String>::new());
    }

    #[test]
    fn path_that_leads_to_another_file_is_unknown() {
        let top = Top::new("elsewhere");
        let file = File::open(top.0.join("file")).unwrap();
        fs::write(top.0.join("new"), "").unwrap();
        fs::rename(top.0.join("new"), top.0.join("file")).unwrap();
        let found = weaknesses(&top.0.join("file"), &file, &Owners::of_this_process());
        assert!(matches!(&found[..], [Weakness { reason: Reason::Unknown(_), .. }]), "{found:?}");
        fs::remove_file(top.0.join("file")).unwrap();
        assert_eq!(weaknesses(&top.0.join("file"), &file, &Owners::of_this_process()).len(), 1);
    }

    #[test]
    fn sudo_uid_is_trusted_only_if_the_real_user_is_root() {
        let (root, user) = (Uid::from_raw(0), Uid::from_raw(1000));
        let owners = |real, effective, sudo: &str| Owners::of(real, effective, Some(OsStr::new(sudo))).0;
        assert_eq!(owners(root, root, "1000"), [root, root, user]);
        assert_eq!(owners(user, root, "1000"), [root, root]);
        for text in ["", " 1000", "+1000", "-1", "1000 ", "99999999999", "root", "0x10"] {
            assert_eq!(owners(root, root, text), [root, root], "{text:?}");
        }
    }
}
