//! Policy files.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use crate::{cgroup::Cgroup, must};

/// Returns a policy that sets a mark on each socket of a cgroup, and nothing else. It shows whether a policy is in
/// force, and which one.
#[must_use]
pub fn sets_mark(target: &Cgroup, mark: i32) -> String {
    format!("[target]\ncgroup = {:?}\n[[rule]]\nset = {{ SO_MARK = {mark} }}\n", target.name())
}

/// A policy in a new directory, which is removed with this value.
#[derive(Debug)]
pub struct PolicyFile {
    dir: TempDir,
    path: PathBuf,
}

impl PolicyFile {
    /// Creates `policy.toml` with this text.
    #[must_use]
    pub fn new(text: impl AsRef<[u8]>) -> Self {
        Self::named("policy.toml", text)
    }

    #[must_use]
    pub fn named(name: &str, text: impl AsRef<[u8]>) -> Self {
        let dir = TempDir::new();
        let path = dir.write(name, text);
        Self { dir, path }
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Creates another file in the same directory, and returns its path.
    pub fn add(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        self.dir.write(name, text)
    }

    /// Returns the directory. Files in it are removed with this value.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir.path
    }
}

/// A new directory, which is removed with this value.
#[derive(Debug)]
pub(crate) struct TempDir {
    pub(crate) path: PathBuf,
}

impl TempDir {
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

/// Sets the mode of a file, regardless of the umask.
pub fn set_mode(path: &Path, mode: u32) {
    must(
        fs::set_permissions(path, Permissions::from_mode(mode)),
        format_args!("change the mode of {}", path.display()),
    );
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Returns a name that is unique on this machine.
pub(crate) fn unique_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("sockpolicy-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}
