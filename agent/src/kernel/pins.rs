//! What stays in the kernel when the agent is gone: maps and links with a path in the BPF file system.
//!
//! An instance has a folder of its own, and in that one for each layout of maps: `INSTANCE/LAYOUT/maps/NAME` and
//! `INSTANCE/LAYOUT/links/CGROUP-PLACE-ID-PROGRAM`, where the first three are the id of the cgroup and the target's numbers
//! ([`abi::Target`]). Another build with the same layout can go on with them; what has another layout is replaced.
//!
//! Invariant: a link is pinned last and unpinned first, so that what is pinned is complete.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use abi::Target;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::{KernelError, links::Link, maps, syscall};
use crate::compile::Hook;

/// Where the BPF file system belongs.
const BPFFS: &str = "/sys/fs/bpf";
/// The folder of all instances.
const OURS: &str = "/sys/fs/bpf/sockpolicy";
/// Of the sources that decide what lies in maps (build.rs).
const LAYOUT: &str = env!("SOCKPOLICY_LAYOUT");

/// Maps whose contents outlive the agent. Each has others of its own.
pub(super) const MAPS: [&str; 16] = [
    "CONFIG",
    "PLACES",
    "FOLLOWED",
    "SELECTORS",
    "PREFIXES",
    "OPTIONS",
    "OPTION_INDEX",
    "SETTINGS",
    "SITES",
    "COUNTERS",
    "TARGETS",
    "SOCKETS",
    "KEPT",
    "UNSTORED",
    "LOSSES",
    "EVENTS",
];

/// The folder of an instance's pins.
#[derive(Clone, Debug)]
pub struct Pins {
    instance: PathBuf,
}

/// A link that was found pinned.
pub(super) struct Pinned {
    pub(super) cgroup: u64,
    pub(super) target: Target,
    pub(super) hook: Hook,
    pub(super) link: OwnedFd,
    pub(super) path: PathBuf,
}

impl Pins {
    /// Of an instance, whether it has any or not.
    ///
    /// # Errors
    ///
    /// Where there is no BPF file system.
    pub fn of(instance: &str) -> Result<Self, KernelError> {
        match statfs(BPFFS) {
            Ok(stat) if stat.filesystem_type() == BPF_FS_MAGIC => Ok(Self { instance: Path::new(OURS).join(instance) }),
            _ => Err(KernelError::NoBpffs),
        }
    }

    /// Names of instances that have pins.
    #[must_use]
    pub fn instances() -> Vec<String> {
        let names = fs::read_dir(OURS).into_iter().flatten().flatten();
        let mut names: Vec<_> = names.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    fn ours(&self) -> PathBuf {
        self.instance.join(LAYOUT)
    }

    /// Makes the folders for maps and links.
    pub(super) fn make_folders(&self) -> Result<(), KernelError> {
        for folder in ["maps", "links"] {
            let path = self.ours().join(folder);
            fs::create_dir_all(&path).map_err(|source| KernelError::Pin { path, source })?;
        }
        Ok(())
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.ours().join("maps").join(name)
    }

    pub(super) fn link(&self, cgroup: u64, target: Target, hook: Hook) -> PathBuf {
        let Target { place, id } = target;
        self.ours().join("links").join(format!("{cgroup}-{place}-{id}-{}", hook.program()))
    }

    pub(super) fn pin_link(&self, link: &Link, cgroup: u64, target: Target, hook: Hook) -> Result<(), KernelError> {
        let path = self.link(cgroup, target, hook);
        syscall::pin(link, &path).map_err(|source| KernelError::Pin { path, source })
    }

    /// The links that are pinned.
    pub(super) fn links(&self) -> Result<Vec<Pinned>, KernelError> {
        let folder = self.ours().join("links");
        let mut found = Vec::new();
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let Some((cgroup, target, hook)) = entry.file_name().to_str().and_then(parse_link) else {
                continue;
            };
            let link = syscall::open_pinned(&path).map_err(|source| KernelError::Pin { path: path.clone(), source })?;
            found.push(Pinned { cgroup, target, hook, link, path });
        }
        Ok(found)
    }

    /// The hooks that links are pinned at, each once.
    pub(super) fn hooks(&self) -> Result<Vec<Hook>, KernelError> {
        let mut hooks: Vec<Hook> = self.links()?.into_iter().map(|pinned| pinned.hook).collect();
        hooks.sort_unstable();
        hooks.dedup();
        Ok(hooks)
    }

    /// Removes what this instance has of other layouts.
    ///
    /// # Errors
    ///
    /// Where it cannot be removed.
    pub fn remove_others(&self) -> Result<(), KernelError> {
        for entry in fs::read_dir(&self.instance).into_iter().flatten().flatten() {
            if entry.file_name() != LAYOUT {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Removes what is pinned of this layout.
    pub(super) fn remove_ours(&self) -> Result<(), KernelError> {
        remove(&self.ours())?;
        // If that was all. Where it was not, neither is empty.
        let _ = fs::remove_dir(&self.instance).and_then(|()| fs::remove_dir(OURS));
        Ok(())
    }

    /// Takes what is pinned out of force, at once.
    ///
    /// # Errors
    ///
    /// Where the configuration cannot be written.
    pub fn end(&self) -> Result<(), KernelError> {
        for entry in fs::read_dir(&self.instance).into_iter().flatten().flatten() {
            maps::end(&entry.path().join("maps/CONFIG"))?;
        }
        Ok(())
    }

    /// Removes all that is pinned, and with it all that is in force.
    ///
    /// # Errors
    ///
    /// Where it cannot be removed.
    pub fn remove(&self) -> Result<(), KernelError> {
        for entry in fs::read_dir(&self.instance).into_iter().flatten().flatten() {
            remove(&entry.path())?;
        }
        let removed = match fs::remove_dir(&self.instance) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        // The last one takes the folder of all with it.
        let _ = fs::remove_dir(OURS);
        removed.map_err(|source| KernelError::Pin { path: self.instance.clone(), source })
    }
}

/// Removes the pins of a layout, the links first.
fn remove(layout: &Path) -> Result<(), KernelError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| KernelError::Pin { path, source }
    };
    for folder in ["links", "maps"] {
        for entry in fs::read_dir(layout.join(folder)).into_iter().flatten().flatten() {
            let path = entry.path();
            if folder == "links" {
                let link = syscall::open_pinned(&path).map_err(failed(&path))?;
                match syscall::detach_link(&link) {
                    // Its cgroup is gone.
                    Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
                    detached => detached.map_err(failed(&path))?,
                }
            }
            fs::remove_file(&path).map_err(failed(&path))?;
        }
    }
    match fs::remove_dir_all(layout) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(layout)(error)),
        _ => Ok(()),
    }
}

/// Reads the name of a pinned link.
fn parse_link(name: &str) -> Option<(u64, Target, Hook)> {
    let mut parts = name.splitn(4, '-');
    let mut number = || parts.next();
    let cgroup = number()?.parse().ok()?;
    let place = number()?.parse().ok()?;
    let id = number()?.parse().ok()?;
    let program = number()?;
    let hook = Hook::ALL.into_iter().find(|hook| hook.program() == program)?;
    Some((cgroup, Target { place, id }, hook))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_of_a_link_tells_where_it_is() {
        let pins = Pins { instance: "/x".into() };
        let target = Target { place: 3, id: 4 };
        let path = pins.link(77, target, Hook::Connect4);
        assert_eq!(parse_link(path.file_name().unwrap().to_str().unwrap()), Some((77, target, Hook::Connect4)));
        assert_eq!(parse_link("77-3-connect4_apply"), None);
        assert_eq!(parse_link("77-3-4-other"), None);
    }
}
