//! Who can change a file, or exchange it for another.
//!
//! Each directory on the way from `/` counts, and each that a symbolic link on the way leads through, as for keys of sshd
//! (`safe_path`, misc.c of OpenSSH). Unlike there, a sticky directory is accepted, since only the owner of an entry can
//! exchange it, and so is whatever lies on a file system that is mounted read-only.

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

/// How many symbolic links are followed on the way, as by the kernel (MAXSYMLINKS, include/linux/namei.h).
const LINKS_MAX: usize = 40;

/// The users who may own a file and the directories on the way to it.
#[derive(Clone, Debug)]
pub struct Owners(Vec<Uid>);

impl Owners {
    /// Returns root, the user of this process and, where root was given the rights of another user by sudo, that user.
    #[must_use]
    pub fn of_this_process() -> Self {
        Self::of(Uid::current(), Uid::effective(), env::var_os("SUDO_UID").as_deref())
    }

    fn of(real: Uid, effective: Uid, sudo: Option<&OsStr>) -> Self {
        let mut owners = vec![Uid::from_raw(0), effective];
        // Any other user can write whatever he likes there.
        if real.is_root() {
            owners.extend(sudo.and_then(parse_uid));
        }
        Self(owners)
    }
}

/// Reads a number as sudo writes it: digits and nothing else.
fn parse_uid(text: &OsStr) -> Option<Uid> {
    let text = text.to_str().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?;
    text.parse().ok().map(Uid::from_raw)
}

/// Something that lets other users change a file, or keeps this process from seeing whether they can.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weakness {
    /// The file itself, or what leads to it.
    pub path: PathBuf,
    what: What,
    pub reason: Reason,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
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
    /// It is in a directory in which all users may make links to files of others, and has several.
    HardLinks,
    Unknown(String),
}

/// In words that go on after "cannot use FILE: ".
impl fmt::Display for Weakness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.escaped();
        let thing = match self.what {
            What::File => "it".to_owned(),
            What::Directory => format!("directory {path}"),
            What::Link => format!("symbolic link {path}"),
        };
        match &self.reason {
            Reason::Owner(owner) => write!(f, "{thing} belongs to user {owner}"),
            Reason::Writable(mode) => {
                write!(f, "users other than its owner may write to {thing} (mode {:04o})", mode.bits())
            }
            Reason::HardLinks => write!(f, "{thing} has hard links, and every user may make links in its directory"),
            Reason::Unknown(why) => write!(f, "who can change {path} is unknown: {why}"),
        }
    }
}

/// Returns all that lets users other than `owners` change what is in an open file, or what is found at its path.
#[must_use]
pub fn weaknesses(path: &Path, file: &File, owners: &Owners) -> Vec<Weakness> {
    let mut walk = Walk { owners, found: Vec::new(), at: Vec::new(), links: 0 };
    let unknown =
        |reason: String| Weakness { path: path.to_owned(), what: What::File, reason: Reason::Unknown(reason) };
    match walk.go(path) {
        Ok(stat) if !is_same(&stat, file) => {
            walk.found.push(unknown("its path leads to another file by now".to_owned()));
        }
        Ok(_) => {}
        Err(error) => walk.found.push(unknown(error.to_string())),
    }
    walk.found
}

fn is_same(stat: &FileStat, file: &File) -> bool {
    fstat(file).is_ok_and(|other| (stat.st_dev, stat.st_ino) == (other.st_dev, other.st_ino))
}

/// A way from `/` to a file.
struct Walk<'a> {
    owners: &'a Owners,
    found: Vec<Weakness>,
    /// The directories in one another that lead to where this is.
    at: Vec<Place>,
    links: usize,
}

struct Place {
    fd: OwnedFd,
    path: PathBuf,
    /// Whether users other than its owner can make entries in it, although they cannot exchange those of others.
    is_open: bool,
}

impl Walk<'_> {
    /// Goes the whole way and notes each weakness on it. Returns what is at its end.
    fn go(&mut self, path: &Path) -> io::Result<FileStat> {
        let path = if path.is_absolute() { path.to_owned() } else { env::current_dir()?.join(path) };
        let mut left = parts(path.as_os_str());
        self.begin()?;
        let mut last = None;
        while let Some(name) = left.pop_front() {
            match name.as_bytes() {
                b"" | b"." => {}
                b".." => self.leave(),
                _ => last = self.step(&name, &mut left)?,
            }
        }
        last.ok_or_else(|| Errno::EISDIR.into())
    }

    fn begin(&mut self) -> io::Result<()> {
        self.at.clear();
        let fd = nix::fcntl::open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        let stat = fstat(&fd)?;
        self.enter(fd, PathBuf::from("/"), &stat);
        Ok(())
    }

    /// Goes to the directory above; above `/` there is `/`.
    fn leave(&mut self) {
        if self.at.len() > 1 {
            self.at.pop();
        }
    }

    /// Takes one step: into a directory, or to where a symbolic link points, or to the file, of which it returns the facts.
    fn step(&mut self, name: &OsStr, left: &mut VecDeque<OsString>) -> io::Result<Option<FileStat>> {
        let Some(place) = self.at.last() else { return Err(Errno::ENOENT.into()) };
        let (path, is_open) = (place.path.join(name), place.is_open);
        let fd = openat(&place.fd, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
        let stat = fstat(&fd)?;
        match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
            SFlag::S_IFDIR => self.enter(fd, path, &stat),
            SFlag::S_IFLNK => {
                self.check_owner(What::Link, &path, &stat);
                self.follow(&fd, left)?;
            }
            _ => {
                self.check_file(&fd, &path, &stat, is_open);
                return Ok(Some(stat));
            }
        }
        Ok(None)
    }

    /// Puts the target of a symbolic link before what is left to go.
    fn follow(&mut self, link: &OwnedFd, left: &mut VecDeque<OsString>) -> io::Result<()> {
        self.links += 1;
        if self.links > LINKS_MAX {
            return Err(Errno::ELOOP.into());
        }
        let target = readlinkat(link, "")?;
        if target.as_bytes().starts_with(b"/") {
            self.begin()?;
        }
        for part in parts(&target).into_iter().rev() {
            left.push_front(part);
        }
        Ok(())
    }

    fn check_file(&mut self, fd: &OwnedFd, path: &Path, stat: &FileStat, is_open: bool) {
        self.check_owner(What::File, path, stat);
        if is_writable(stat) && !is_read_only(fd) {
            self.note(What::File, path, Reason::Writable(mode_of(stat)));
        }
        if is_open && stat.st_nlink > 1 {
            self.note(What::File, path, Reason::HardLinks);
        }
    }

    fn enter(&mut self, fd: OwnedFd, path: PathBuf, stat: &FileStat) {
        self.check_owner(What::Directory, &path, stat);
        let is_open = is_writable(stat) && !is_read_only(&fd);
        if is_open && !mode_of(stat).contains(Mode::S_ISVTX) {
            self.note(What::Directory, &path, Reason::Writable(mode_of(stat)));
        }
        self.at.push(Place { fd, path, is_open });
    }

    fn check_owner(&mut self, what: What, path: &Path, stat: &FileStat) {
        let owner = Uid::from_raw(stat.st_uid);
        if !self.owners.0.contains(&owner) {
            self.note(what, path, Reason::Owner(owner));
        }
    }

    fn note(&mut self, what: What, path: &Path, reason: Reason) {
        let weakness = Weakness { path: path.to_owned(), what, reason };
        // Several links may lead through one directory.
        if !self.found.contains(&weakness) {
            self.found.push(weakness);
        }
    }
}

fn parts(path: &OsStr) -> VecDeque<OsString> {
    path.as_bytes().split(|byte| *byte == b'/').map(|part| OsStr::from_bytes(part).to_owned()).collect()
}

fn mode_of(stat: &FileStat) -> Mode {
    Mode::from_bits_truncate(stat.st_mode)
}

/// Returns whether users other than the owner may write; an ACL's entries show as the group's bits (acl(5)).
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

    struct Top(PathBuf);

    impl Top {
        /// A new directory with a file in it.
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

        /// What is weak about one of its files, in words, each with the name of what it is about.
        fn weak(&self, name: &str) -> Vec<String> {
            let path = self.0.join(name);
            let file = File::open(&path).unwrap();
            let found = weaknesses(&path, &file, &Owners::of_this_process());
            let below = |weakness: &Weakness| weakness.path.strip_prefix(&self.0).map(Path::to_owned);
            let about = found.iter().filter_map(|weakness| Some((below(weakness).ok()?, weakness)));
            about.map(|(path, weakness)| format!("{}: {:?}", path.escaped(), weakness.reason)).collect()
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
    fn each_directory_that_a_link_leads_through_counts() {
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
    fn link_of_a_file_in_a_directory_open_to_all_may_be_anybody_s() {
        let top = Top::new("hard");
        fs::hard_link(top.0.join("file"), top.0.join("second")).unwrap();
        assert_eq!(top.weak("file"), Vec::<String>::new());
        top.mode("", 0o1777);
        assert_eq!(top.weak("file"), ["file: HardLinks"]);
        fs::remove_file(top.0.join("second")).unwrap();
        assert_eq!(top.weak("file"), Vec::<String>::new());
    }

    #[test]
    fn path_that_leads_elsewhere_by_now_is_unknown() {
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
    fn user_of_sudo_counts_where_root_is_who_started_this() {
        let (root, user) = (Uid::from_raw(0), Uid::from_raw(1000));
        let owners = |real, effective, sudo: &str| Owners::of(real, effective, Some(OsStr::new(sudo))).0;
        assert_eq!(owners(root, root, "1000"), [root, root, user]);
        assert_eq!(owners(user, root, "1000"), [root, root]);
        for text in ["", " 1000", "+1000", "-1", "1000 ", "99999999999", "root", "0x10"] {
            assert_eq!(owners(root, root, text), [root, root], "{text:?}");
        }
    }
}
