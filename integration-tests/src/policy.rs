//! Policy files.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use crate::{cgroup::Cgroup, must};

/// The text of a policy that gives each socket of a cgroup a mark, and says nothing else: where it matters only whether one is in
/// force, and which.
#[must_use]
pub fn sets_mark(target: &Cgroup, mark: i32) -> String {
    format!("[target]\ncgroup = {:?}\n[[rule]]\nset = {{ SO_MARK = {mark} }}\n", target.name())
}

/// A policy in a folder of its own, which goes with it.
#[derive(Debug)]
pub struct PolicyFile {
    folder: Folder,
    path: PathBuf,
}

impl PolicyFile {
    /// A policy of this text, as `policy.toml`.
    #[must_use]
    pub fn new(text: impl AsRef<[u8]>) -> Self {
        Self::named("policy.toml", text)
    }

    #[must_use]
    pub fn named(name: &str, text: impl AsRef<[u8]>) -> Self {
        let folder = Folder::new();
        let path = folder.write(name, text);
        Self { folder, path }
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts another file beside it, which goes with this one, and gives its path.
    pub fn add(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        self.folder.write(name, text)
    }

    /// Where there is room for more files, which go with this one.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder.path
    }
}

/// A new folder, which goes with this value.
#[derive(Debug)]
pub(crate) struct Folder {
    pub(crate) path: PathBuf,
}

impl Folder {
    pub(crate) fn new() -> Self {
        let path = std::env::temp_dir().join(unique_name());
        must(fs::create_dir(&path), format_args!("make {}", path.display()));
        set_mode(&path, 0o755);
        Self { path }
    }

    pub(crate) fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path.join(name);
        must(fs::write(&path, text), format_args!("write {}", path.display()));
        set_mode(&path, 0o644);
        path
    }
}

/// Sets the mode of a file, whatever the umask has made of it.
pub fn set_mode(path: &Path, mode: u32) {
    must(
        fs::set_permissions(path, Permissions::from_mode(mode)),
        format_args!("change the mode of {}", path.display()),
    );
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// A name that nothing else of this machine has.
pub(crate) fn unique_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("sockpolicy-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}
