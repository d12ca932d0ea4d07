//! The cgroup2 mount and the cgroups in it.
//!
//! Only the unified hierarchy is used: a socket belongs to a cgroup of version 2, also on hosts whose controllers are in
//! hierarchies of version 1.

mod walk;

use std::{
    cmp::Reverse,
    ffi::{OsStr, OsString},
    fs::{self, File, OpenOptions},
    io, mem,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{MetadataExt, OpenOptionsExt},
        },
    },
    path::{Component, Path, PathBuf},
    rc::Rc,
};

use nix::{
    fcntl::{OFlag, openat},
    sys::{
        stat::Mode,
        statfs::{CGROUP2_SUPER_MAGIC, TMPFS_MAGIC, fstatfs, statfs},
    },
};

pub use self::walk::{Budget, Tree, Wanted};
use super::{netns, process};

use crate::{
    escape::{self, Escape},
    recent::Recent,
};

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// `place` is where to mount it.
    #[error("cgroup2 is not mounted on this host")]
    NotMounted { place: &'static str },
    /// `place` is where to mount it; `network` is the path of the network namespace of this process, if /run/netns names it.
    #[error(
        "cgroup2 is not mounted in the mount namespace of this process, but in that of process 1 (`ip netns exec` hides it)"
    )]
    Hidden { place: &'static str, network: Option<PathBuf> },
    #[error("cannot read {path}: {source}")]
    Proc { path: &'static str, source: io::Error },
    #[error("cannot find cgroup {}: {source}", path.escaped())]
    Missing { path: PathBuf, mount: PathBuf, source: io::Error },
    #[error("{} is a file, not a cgroup directory", path.escaped())]
    NotAFolder { path: PathBuf, folder: PathBuf },
    #[error("{} is not in the cgroup2 hierarchy: it is a cgroup of version 1, or not a cgroup", path.escaped())]
    NotCgroup2 { path: PathBuf, mount: PathBuf },
    #[error("cgroup {} is {level} levels deep, and targets can be at most {max} levels deep", path.escaped())]
    TooDeep { path: PathBuf, level: u32, max: u32 },
    #[error("cannot open cgroup {}: {source}", path.escaped())]
    Open { path: PathBuf, source: io::Error },
    #[error("the cgroup of this process is not below {}: the mount shows another part of the hierarchy", mount.escaped())]
    Outside { mount: PathBuf },
}

impl CgroupError {
    /// Returns whether the cgroup does not exist any more and therefore cannot be a target.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Missing { .. })
    }

    /// Returns whether a later attempt can succeed although the cgroup does not change.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Open { source, .. } if is_transient(source))
    }
}

/// Returns whether an error means that a limit of this process or of the host is reached at the moment.
#[must_use]
pub fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN | libc::EINTR))
}

/// Returns whether an error means that a cgroup was removed (`kernfs_iop_lookup`, fs/kernfs/dir.c).
fn is_removed(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

/// Opens a directory at a path of any length. The kernel accepts paths of less than PATH_MAX bytes; a longer path is opened in
/// several steps.
///
/// # Errors
///
/// Fails as openat(2) does.
pub fn open_directory(path: &Path) -> io::Result<File> {
    let mut pieces = pieces(path).into_iter();
    let first = pieces.next().unwrap_or_default();
    let first = if first.as_os_str().is_empty() { Path::new(".") } else { &first };
    let mut folder = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(first)?;
    for piece in pieces {
        folder = open_below(&folder, piece.as_os_str())?;
    }
    Ok(folder)
}

/// Opens a directory at a path relative to another one. Does not follow a symbolic link in the last component.
fn open_below(folder: &File, path: &OsStr) -> io::Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(openat(folder, path, flags, Mode::empty())?.into())
}

/// Splits a path between components, into pieces of less than PATH_MAX bytes.
fn pieces(path: &Path) -> Vec<PathBuf> {
    const MAX: usize = libc::PATH_MAX as usize - 1;
    if path.as_os_str().len() <= MAX {
        return vec![path.to_owned()];
    }
    let mut pieces = Vec::new();
    let mut piece = PathBuf::new();
    for component in path.components() {
        if piece.as_os_str().len() + 1 + component.as_os_str().len() > MAX {
            pieces.push(mem::take(&mut piece));
        }
        piece.push(component);
    }
    pieces.push(piece);
    pieces
}

/// Returns the id of the cgroup at an absolute path of any length, or `None` if it does not exist.
#[must_use]
pub fn id_at(path: &Path) -> Option<u64> {
    if path.as_os_str().len() < libc::PATH_MAX as usize {
        return fs::metadata(path).ok().map(|metadata| metadata.ino());
    }
    open_directory(path).and_then(|folder| folder.metadata()).ok().map(|metadata| metadata.ino())
}

/// The mount of the unified hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub path: PathBuf,
    /// The cgroup at the top of the mount, relative to the root of the cgroup namespace of this process. Starts with `..` if it
    /// is above that root.
    root: PathBuf,
}

/// A cgroup. Its directory is kept open, so that it cannot be confused with a later cgroup of the same name.
#[derive(Debug)]
pub struct Cgroup {
    /// The path in the file system.
    pub path: PathBuf,
    /// The name as the kernel writes it: the path from the top of the mount, with a leading slash.
    pub name: String,
    /// The kernel's id of the cgroup: the inode number of its directory.
    pub id: u64,
    /// The number of levels below the root of the hierarchy.
    pub level: u32,
    /// The open directory.
    pub folder: File,
}

impl Mount {
    /// Finds the cgroup2 mount in `/proc/self/mountinfo`.
    ///
    /// # Errors
    ///
    /// Fails if cgroup2 is not mounted, or `/proc` cannot be read.
    pub fn find() -> Result<Self, CgroupError> {
        const PATH: &str = "/proc/self/mountinfo";
        let mountinfo = fs::read(PATH).map_err(|source| CgroupError::Proc { path: PATH, source })?;
        // Another file system can be mounted over a mount. Of several mounts, the one that shows most of the hierarchy is used.
        let mounts = mounts(&mountinfo).filter(|mount| is_cgroup2(&mount.path));
        mounts.min_by_key(Self::depth).ok_or_else(not_mounted)
    }

    /// Returns the number of levels from the root of the hierarchy to the top of the mount. More than 0 if only a part of the
    /// hierarchy is mounted.
    fn depth(&self) -> u32 {
        self.root.components().filter(|part| matches!(part, Component::Normal(_))).count() as u32
    }

    /// Opens the cgroup at a path. Accepts these forms:
    ///
    /// - a path below the mount, also with a leading slash, as the kernel writes the names of cgroups
    /// - an absolute path in the file system
    /// - a path that starts with `.` or `..`, relative to the working directory
    ///
    /// Symbolic links are followed.
    ///
    /// # Errors
    ///
    /// Fails if the path does not exist, is not a directory, is not in cgroup2, or is too deep.
    pub fn open(&self, path: &Path) -> Result<Cgroup, CgroupError> {
        let full = self.path_of(path);
        if full.as_os_str().len() >= libc::PATH_MAX as usize
            && let Ok(below) = full.strip_prefix(&self.path)
        {
            return self.open_below(below);
        }
        let missing = |source| CgroupError::Missing { path: full.clone(), mount: self.path.clone(), source };
        let full = full.canonicalize().map_err(missing)?;
        let folder = File::open(&full).map_err(missing)?;
        let metadata = folder.metadata().map_err(missing)?;
        if !metadata.is_dir() {
            let folder = full.parent().unwrap_or(&self.path).to_owned();
            return Err(CgroupError::NotAFolder { path: full, folder });
        }
        let is_cgroup2 = fstatfs(folder.as_fd()).is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC);
        let below = full.strip_prefix(&self.path).ok().filter(|_| is_cgroup2);
        let Some(below) = below else {
            return Err(CgroupError::NotCgroup2 { path: full, mount: self.path.clone() });
        };
        self.cgroup(below, folder, metadata.ino())
    }

    /// Opens the cgroup at a path of any length below the mount. Leaves some file descriptors of this process free
    /// ([`process::spare_descriptors`]).
    ///
    /// # Errors
    ///
    /// Fails with [`CgroupError::Missing`] if the cgroup does not exist, with [`CgroupError::TooDeep`], or with
    /// [`CgroupError::Open`] for any other reason.
    pub fn open_below(&self, below: &Path) -> Result<Cgroup, CgroupError> {
        let path = self.path.join(below);
        let failed = |source: io::Error| match is_removed(&source) {
            true => CgroupError::Missing { path: path.clone(), mount: self.path.clone(), source },
            false => CgroupError::Open { path: path.clone(), source },
        };
        let folder = open_directory(&path).and_then(process::spare_descriptors).map_err(failed)?;
        let id = folder.metadata().map_err(failed)?.ino();
        self.cgroup(below, folder, id)
    }

    fn cgroup(&self, below: &Path, folder: File, id: u64) -> Result<Cgroup, CgroupError> {
        let path = self.path.join(below);
        let level = self.level_of(below);
        if level > abi::CGROUP_LEVELS_MAX {
            return Err(CgroupError::TooDeep { path, level, max: abi::CGROUP_LEVELS_MAX });
        }
        let name = format!("/{}", escape::plain(below));
        Ok(Cgroup { name, id, level, folder, path })
    }

    /// Returns the number of levels from the root of the hierarchy to a path below the mount.
    fn level_of(&self, below: &Path) -> u32 {
        self.depth() + below.components().count() as u32
    }

    /// Returns whether there is a cgroup at a path below the mount.
    #[must_use]
    pub fn has(&self, below: &Path) -> bool {
        id_at(&self.path.join(below)).is_some()
    }

    /// Returns the path of a cgroup, relative to the mount.
    #[must_use]
    pub fn below(&self, cgroup: &Cgroup) -> PathBuf {
        cgroup.path.strip_prefix(&self.path).unwrap_or(&cgroup.path).to_owned()
    }

    /// Returns the path of a cgroup in the file system, from one of the forms that [`Self::open`] accepts.
    fn path_of(&self, path: &Path) -> PathBuf {
        match (path.components().next(), path.strip_prefix("/")) {
            (Some(Component::CurDir | Component::ParentDir), _) => path.to_owned(),
            (_, Ok(below)) if !is_cgroup2(path) && self.path.join(below).exists() => self.path.join(below),
            _ => self.path.join(path),
        }
    }

    /// Opens the cgroup that this process is in.
    ///
    /// # Errors
    ///
    /// Fails if `/proc` cannot be read, or if the cgroup is outside the mounted part of the hierarchy.
    pub fn own(&self) -> Result<Cgroup, CgroupError> {
        const PATH: &str = "/proc/self/cgroup";
        let cgroups = fs::read(PATH).map_err(|source| CgroupError::Proc { path: PATH, source })?;
        let own = unified(&cgroups).unwrap_or_default();
        let outside = || CgroupError::Outside { mount: self.path.clone() };
        match own.strip_prefix(&self.root) {
            Ok(below) => self.open(&self.path.join(below)),
            // Only the names above the root of the cgroup namespace are missing (`unshare -C` without a mount of its own).
            Err(_) if self.root.starts_with("..") => self.open(&self.path.join(self.search_own().ok_or_else(outside)?)),
            Err(_) => Err(outside()),
        }
    }

    /// Returns the path of the cgroup that lists this process.
    fn search_own(&self) -> Option<PathBuf> {
        let own = std::process::id().to_string();
        let lists_own = |below: &PathBuf| {
            // A threaded cgroup lists only threads. The id of a process is that of its first thread.
            let files = ["cgroup.procs", "cgroup.threads"].into_iter();
            let lists = files.map(|file| fs::read_to_string(self.path.join(below).join(file)).unwrap_or_default());
            lists.into_iter().any(|list| list.lines().any(|process| process == own))
        };
        let mut found = self.walk(|_| Wanted::WithChildren, &Budget::default()).found;
        // The processes of threaded cgroups are also listed by the cgroup above these.
        found.sort_by_key(|below| Reverse(below.components().count()));
        found.into_iter().find(lists_own)
    }
}

/// Returns the cgroup of a process, as a path from the root of the hierarchy that the calling process sees. Returns `None` if
/// the process does not exist.
#[must_use]
pub fn of_process(process: u32) -> Option<PathBuf> {
    let cgroups = fs::read(format!("/proc/{process}/cgroup")).ok()?;
    unified(&cgroups)
}

/// Returns the path in the unified hierarchy, without its leading slash, from the content of `/proc/PID/cgroup` (cgroups(7)). A
/// name can contain any bytes except `/` and a newline.
fn unified(cgroups: &[u8]) -> Option<PathBuf> {
    let lines = cgroups.split(|byte| *byte == b'\n');
    lines.into_iter().find_map(|line| line.strip_prefix(b"0::/")).map(|path| OsStr::from_bytes(path).into())
}

/// Returns the error for a process that has no cgroup2 mount. The suggested mount point is beside the hierarchies of version 1 if
/// there are any.
fn not_mounted() -> CgroupError {
    let has_v1 = statfs("/sys/fs/cgroup").is_ok_and(|stat| stat.filesystem_type() == TMPFS_MAGIC);
    let place = if has_v1 { "/sys/fs/cgroup/unified" } else { "/sys/fs/cgroup" };
    if fs::read("/proc/1/mountinfo").is_ok_and(|mountinfo| mounts(&mountinfo).next().is_some()) {
        CgroupError::Hidden { place, network: netns::name_of_own() }
    } else {
        CgroupError::NotMounted { place }
    }
}

/// Returns whether there is a directory of cgroup2 at a path.
fn is_cgroup2(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// Returns the cgroup2 mounts in the content of `/proc/PID/mountinfo`.
fn mounts(mountinfo: &[u8]) -> impl Iterator<Item = Mount> {
    mountinfo.split(|byte| *byte == b'\n').filter_map(parse_mount)
}

/// Parses a line of `/proc/self/mountinfo` (proc_pid_mountinfo(5)). Returns `None` if the line is not a cgroup2 mount.
fn parse_mount(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let root = unescape(fields.nth(3)?);
    let path = unescape(fields.next()?);
    let mut after_optional = fields.skip_while(|field| *field != b"-");
    if after_optional.nth(1)? != b"cgroup2" {
        return None;
    }
    let root = root.strip_prefix("/").unwrap_or(&root).to_owned();
    Some(Mount { path, root })
}

/// Decodes the octal escapes of space, tab, newline and backslash.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut at = 0;
    while let Some(byte) = field.get(at) {
        let code = field.get(at + 1..at + 4).filter(|_| *byte == b'\\');
        let code = code.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(code.unwrap_or(*byte));
        at += if code.is_some() { 4 } else { 1 };
    }
    OsString::from_vec(bytes).into()
}

/// Returns whether this process is in the initial cgroup namespace, and therefore sees the whole hierarchy.
#[must_use]
pub fn is_initial_namespace() -> bool {
    /// `PROC_CGROUP_INIT_INO` (include/linux/proc_ns.h).
    const INITIAL: u64 = 0xeffffffb;
    fs::metadata("/proc/self/ns/cgroup").is_ok_and(|namespace| namespace.ino() == INITIAL)
}

/// The number of names in a generation of the cache of [`Names`]. It is limited, since a tenant can make many cgroups.
const NAMES: usize = 2048;

/// A cache of the names of cgroups by id. It drops the names that were least recently used.
#[derive(Debug)]
pub struct Names {
    mount: Mount,
    /// The top of the mount, which open_by_handle_at(2) needs.
    top: Option<File>,
    /// `None` for a cgroup that did not exist when it was looked up. The kernel does not reuse ids.
    known: Recent<u64, Option<Rc<str>>>,
}

impl Names {
    #[must_use]
    pub fn new(mount: Mount) -> Self {
        let top = File::open(&mount.path).inspect_err(|error| log::debug!("{}: {error}", mount.path.escaped())).ok();
        Self { mount, top, known: Recent::new(NAMES) }
    }

    /// Returns the name of a cgroup. Returns `None` for the id 0, and for a removed cgroup whose name is not in the cache.
    pub fn name(&mut self, id: u64) -> Option<Rc<str>> {
        if let Some(known) = self.known.get(&id) {
            return known;
        }
        let top = self.top.as_ref().filter(|_| id != 0);
        let name: Option<Rc<str>> = top.and_then(|top| self.mount.name_of(top, id)).map(Rc::from);
        self.known.insert(id, name.clone());
        name
    }
}

impl Mount {
    /// Returns the name of the cgroup with this id. The file handle of a cgroup's directory consists of the id. To open the
    /// handle requires CAP_DAC_READ_SEARCH (open_by_handle_at(2)); without this capability, the whole tree is searched.
    fn name_of(&self, top: &File, id: u64) -> Option<String> {
        match open_by_id(top, id) {
            Ok(folder) => self.name_below(&fs::read_link(format!("/proc/self/fd/{}", folder.as_raw_fd())).ok()?),
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => self.search(id),
            // The cgroup was removed.
            Err(_) => None,
        }
    }

    fn name_below(&self, path: &Path) -> Option<String> {
        path.strip_prefix(&self.path).ok().map(|below| format!("/{}", escape::plain(below)))
    }

    fn search(&self, id: u64) -> Option<String> {
        let cgroups = self.walk(|_| Wanted::WithChildren, &Budget::default()).found.into_iter();
        let mut matching = cgroups.filter(|below| id_at(&self.path.join(below)) == Some(id));
        matching.next().map(|below| format!("/{}", escape::plain(&below)))
    }
}

/// Opens a directory by its id, in the file system that contains `top`.
fn open_by_id(top: &File, id: u64) -> io::Result<OwnedFd> {
    /// `FILEID_KERNFS` (include/linux/exportfs.h): the handle is the id.
    const KERNFS: libc::c_int = 0xfe;
    #[repr(C)]
    struct Handle {
        bytes: libc::c_uint,
        kind: libc::c_int,
        id: [u8; 8],
    }
    let mut handle = Handle { bytes: 8, kind: KERNFS, id: id.to_ne_bytes() };
    // SAFETY: `handle` has the layout of a `file_handle`, followed by its 8 bytes.
    let opened =
        unsafe { libc::open_by_handle_at(top.as_raw_fd(), (&raw mut handle).cast(), libc::O_PATH | libc::O_CLOEXEC) };
    // SAFETY: the kernel has just opened this descriptor, and nothing else owns it.
    if opened < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(opened) }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_mount_is_found_at_any_path() {
        let line = b"31 24 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw";
        assert_eq!(parse_mount(line), Some(Mount { path: "/sys/fs/cgroup/unified".into(), root: "".into() }));
        let line = b"31 24 0:27 /a/b /my\\040cgroups rw - cgroup2 none rw";
        assert_eq!(parse_mount(line), Some(Mount { path: "/my cgroups".into(), root: "a/b".into() }));
        assert_eq!(parse_mount(line).map(|mount| mount.depth()), Some(2));
        // In a cgroup namespace, the mount of the host has its root above that of the namespace.
        let line = b"31 24 0:27 /../.. /sys/fs/cgroup rw - cgroup2 none rw";
        assert_eq!(parse_mount(line).map(|mount| mount.depth()), Some(0));
    }

    #[test]
    fn long_path_is_split_between_components() {
        let name = "n".repeat(250);
        let path = Path::new("/").join(vec![name; 40].join("/"));
        let pieces = pieces(&path);
        assert!(pieces.iter().all(|piece| piece.as_os_str().len() < libc::PATH_MAX as usize));
        assert!(pieces.iter().skip(1).all(|piece| piece.is_relative()));
        assert_eq!(pieces.iter().collect::<PathBuf>(), path);
        assert_eq!(super::pieces(Path::new("/a/b")), [PathBuf::from("/a/b")]);
    }

    #[test]
    fn cgroup_path_can_contain_any_bytes() {
        let path = unified(b"4:cpu:/x\n0::/a/\xff b\n");
        assert_eq!(path, Some(OsString::from_vec(b"a/\xff b".to_vec()).into()));
        assert_eq!(unified(b"4:cpu:/x\n"), None);
    }

    #[test]
    fn other_mounts_are_ignored() {
        assert_eq!(parse_mount(b"30 24 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"), None);
        assert_eq!(parse_mount(b""), None);
        assert_eq!(parse_mount(b"31 24 0:27 / /sys/fs/cgroup"), None);
    }
}
