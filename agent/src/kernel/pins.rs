//! What stays in the kernel after the agent has exited: maps and links that are pinned in the BPF file system.
//!
//! An instance has a directory, which contains one directory for each layout of maps: `INSTANCE/LAYOUT/maps/NAME` and
//! `INSTANCE/LAYOUT/links/CGROUP-PLACE-ID-PROGRAM`. CGROUP is the id of the cgroup; PLACE and ID are the target's numbers
//! ([`abi::Target`]). Another build with the same layout can take over these pins. Pins of another layout are replaced.
//!
//! Invariants: a link is pinned last and unpinned first, so that a pinned policy is complete. Only entries with such names, and
//! of such kinds, are opened or removed. All other entries were not made by sockpolicy and are left in place.

use std::{
    ffi::OsStr,
    fs,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use abi::Target;
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, fstatfs},
};

use super::{KernelError, links::Link, maps, syscall};
use crate::{
    compile::Hook,
    escape::Escape,
    host::private::{PrivateDir, PrivateError},
};

/// The mount point of the BPF file system.
const BPFFS: &str = "/sys/fs/bpf";
/// The directory of all instances, below [`BPFFS`].
const ROOT_DIR: &str = "sockpolicy";
/// The subdirectories of a layout.
const LINKS: &str = "links";
const MAPS_DIR: &str = "maps";
/// Hash of the sources that define the contents of maps (build.rs).
const LAYOUT: &str = env!("SOCKPOLICY_LAYOUT");
/// The map whose first entry is the configuration.
const CONFIG: &str = "sp_config";

/// The maps whose contents outlive the agent. Each instance has its own.
pub(super) const MAPS: [&str; 16] = [
    CONFIG,
    "sp_target_slots",
    "sp_cgroup_slots",
    "sp_selectors",
    "sp_prefixes",
    "sp_options",
    "sp_option_index",
    "sp_settings",
    "sp_apply_lists",
    "sp_counters",
    "sp_targets",
    "sp_sockets",
    "sp_saved_values",
    "sp_fallback",
    "sp_losses",
    "sp_events",
];

/// The pins of an instance.
#[derive(Clone, Debug)]
pub struct Pins {
    instance: String,
    /// The directories of the current layout; `None` until they have been made.
    layout: Option<Arc<Layout>>,
}

#[derive(Debug)]
struct Layout {
    maps: PrivateDir,
    links: PrivateDir,
}

/// A pinned link that was found.
pub(super) struct Pinned {
    pub(super) cgroup: u64,
    pub(super) target: Target,
    pub(super) hook: Hook,
    pub(super) link: OwnedFd,
    pub(super) path: PathBuf,
}

impl Pins {
    /// Returns a handle on the pins of an instance. The instance need not have any.
    ///
    /// # Errors
    ///
    /// Fails if no BPF file system is mounted.
    pub fn of(instance: &str) -> Result<Self, KernelError> {
        match bpffs()? {
            Some(_) => Ok(Self { instance: instance.to_owned(), layout: None }),
            None => Err(KernelError::NoBpffs { reason: String::new() }),
        }
    }

    /// Returns a handle on the pins of an instance. Mounts a BPF file system with mode 0700 if none is mounted.
    ///
    /// # Errors
    ///
    /// Fails if no BPF file system is mounted and none can be mounted.
    pub fn make(instance: &str) -> Result<Self, KernelError> {
        if bpffs()?.is_none() {
            mount_bpffs()?;
        }
        Self::of(instance)
    }

    /// Returns the names of the instances that have pins.
    ///
    /// # Errors
    ///
    /// Fails if other users could have changed the directory.
    pub fn instances() -> Result<Vec<String>, KernelError> {
        let Some(root_dir) = root_dir()? else { return Ok(Vec::new()) };
        let names = root_dir.names()?.into_iter().filter_map(|name| name.into_string().ok());
        let has_pins = |name: &String| matches!(root_dir.open(name), Ok(Some(instance)) if has_pins(&instance));
        Ok(names.filter(|name| is_instance_name(name)).filter(has_pins).collect())
    }

    fn instance(&self) -> Result<Option<PrivateDir>, KernelError> {
        Ok(match root_dir()? {
            Some(root_dir) => root_dir.open(&self.instance)?,
            None => None,
        })
    }

    /// Makes the directories for the maps and links of the current layout.
    pub(super) fn make_dirs(&mut self) -> Result<(), KernelError> {
        let bpffs = bpffs()?.ok_or(KernelError::NoBpffs { reason: String::new() })?;
        let layout = bpffs.create(ROOT_DIR)?.create(&self.instance)?.create(LAYOUT)?;
        self.layout = Some(Arc::new(Layout { maps: layout.create(MAPS_DIR)?, links: layout.create(LINKS)? }));
        Ok(())
    }

    fn layout(&self) -> Result<&Layout, KernelError> {
        self.layout.as_deref().ok_or(KernelError::Incomplete { what: "directory for pins" })
    }

    /// Returns the path at which a map of the current layout is or will be pinned. Fails if an entry of another kind has this
    /// name.
    pub(super) fn map(&self, name: &str) -> Result<PathBuf, KernelError> {
        let maps = &self.layout()?.maps;
        maps.find_file(name)?;
        Ok(maps.through(name))
    }

    pub(super) fn has_map(&self, name: &str) -> bool {
        self.layout().is_ok_and(|layout| layout.maps.has_file(name))
    }

    /// Returns the directory and the name of the pinned configuration of the current layout; `None` if it is not pinned.
    pub(super) fn config(&self) -> Result<Option<(PrivateDir, &'static str)>, KernelError> {
        let Some(instance) = self.instance()? else { return Ok(None) };
        let Some(layout) = instance.open(LAYOUT)? else { return Ok(None) };
        Ok(layout.open(MAPS_DIR)?.filter(|maps| maps.has_file(CONFIG)).map(|maps| (maps, CONFIG)))
    }

    /// Returns the path at which a link is or will be pinned.
    pub(super) fn link(&self, cgroup: u64, target: Target, hook: Hook) -> Result<PathBuf, KernelError> {
        Ok(self.layout()?.links.through(&link_name(cgroup, target, hook)))
    }

    pub(super) fn pin_link(&self, link: &Link, cgroup: u64, target: Target, hook: Hook) -> Result<(), KernelError> {
        let name = link_name(cgroup, target, hook);
        let links = &self.layout()?.links;
        syscall::pin(link, &links.through(&name))
            .map_err(|source| KernelError::Pin { path: links.path().join(name), source })
    }

    /// Opens the links that are pinned.
    pub(super) fn links(&self) -> Result<Vec<Pinned>, KernelError> {
        let links = &self.layout()?.links;
        let mut found = Vec::new();
        for name in links.names()? {
            let Some((name, (cgroup, target, hook))) = name.to_str().and_then(|name| Some((name, parse_link(name)?)))
            else {
                continue;
            };
            if let Some(link) = open_link(links, name, cgroup)? {
                found.push(Pinned { cgroup, target, hook, link, path: links.through(name) });
            }
        }
        Ok(found)
    }

    /// Returns the hooks of the pinned links, each once.
    pub(super) fn hooks(&self) -> Result<Vec<Hook>, KernelError> {
        let mut hooks: Vec<Hook> = self.links()?.into_iter().map(|pinned| pinned.hook).collect();
        hooks.sort_unstable();
        hooks.dedup();
        Ok(hooks)
    }

    /// Removes the pins that this instance has of other layouts.
    ///
    /// # Errors
    ///
    /// Fails if a pin cannot be removed.
    pub fn remove_other_layouts(&self) -> Result<(), KernelError> {
        self.remove_layouts(|layout| layout != LAYOUT).map(warn_of_foreign)
    }

    /// Removes the pins of the current layout.
    pub(super) fn remove_current_layout(&self) -> Result<(), KernelError> {
        self.remove_layouts(|layout| layout == LAYOUT).map(warn_of_foreign)
    }

    /// Disables the pinned policies of all layouts, each by one write.
    ///
    /// # Errors
    ///
    /// Fails if the configuration cannot be written.
    pub fn disable(&self) -> Result<(), KernelError> {
        let Some(instance) = self.instance()? else { return Ok(()) };
        for layout in layouts(&instance)? {
            let Some(layout) = instance.open(&layout)? else { continue };
            if let Some(maps) = layout.open(MAPS_DIR)?.filter(|maps| maps.has_file(CONFIG)) {
                maps::disable(&maps, CONFIG)?;
            }
        }
        Ok(())
    }

    /// Removes all pins of this instance, and with them its policies.
    ///
    /// # Errors
    ///
    /// Fails if a pin cannot be removed.
    pub fn remove(&self) -> Result<(), KernelError> {
        self.remove_layouts(|_| true).map(warn_of_foreign)
    }

    /// Removes the pins of the layouts that `matches` accepts, and then the directories that are empty. Returns the paths of
    /// the entries that are left because sockpolicy did not make them.
    fn remove_layouts(&self, matches: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>, KernelError> {
        let Some(root_dir) = root_dir()? else { return Ok(Vec::new()) };
        let Some(instance) = root_dir.open(&self.instance)? else { return Ok(Vec::new()) };
        let mut foreign = Vec::new();
        for name in instance.names()? {
            match name.to_str().filter(|name| is_layout(name) && is_directory(&instance, name)) {
                Some(name) if matches(name) => remove_layout(&instance, name, &mut foreign)?,
                Some(_) => {}
                None => foreign.push(instance.path().join(name)),
            }
        }
        // Fails if the directory is not empty.
        let _ = root_dir.remove_dir(&self.instance);
        if let Some(bpffs) = bpffs()? {
            let _ = bpffs.remove_dir(ROOT_DIR);
        }
        Ok(foreign)
    }
}

/// Opens the BPF file system; `None` if it is not mounted.
fn bpffs() -> Result<Option<PrivateDir>, KernelError> {
    let is_bpffs = |dir: &PrivateDir| fstatfs(dir).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC);
    match PrivateDir::system(Path::new(BPFFS)) {
        Ok(dir) => Ok(Some(dir).filter(is_bpffs)),
        Err(PrivateError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Opens the directory of all instances; `None` if there is none.
fn root_dir() -> Result<Option<PrivateDir>, KernelError> {
    Ok(match bpffs()? {
        Some(bpffs) => bpffs.open(ROOT_DIR)?,
        None => None,
    })
}

fn mount_bpffs() -> Result<(), KernelError> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), BPFFS, Some("bpf"), flags, Some("mode=0700"))
        .map_err(|errno| KernelError::NoBpffs { reason: format!(", and it cannot be mounted: {}", errno.desc()) })?;
    let namespace = |process: &str| fs::metadata(format!("/proc/{process}/ns/mnt")).map(|file| file.ino());
    let is_hosts = matches!((namespace("self"), namespace("1")), (Ok(own), Ok(first)) if own == first);
    if is_hosts {
        log::info!("mounted a BPF file system at {BPFFS}");
    } else {
        log::warn!("mounted a BPF file system at {BPFFS}: persistent policies end with this mount namespace");
    }
    Ok(())
}

fn warn_of_foreign(foreign: Vec<PathBuf>) {
    for path in foreign {
        log::warn!("left {} in place: sockpolicy did not make it", path.escaped());
    }
}

/// Returns the names of the layouts of which an instance has a directory.
fn layouts(instance: &PrivateDir) -> Result<Vec<String>, PrivateError> {
    let names = instance.names()?.into_iter().filter_map(|name| name.into_string().ok());
    Ok(names.filter(|name| is_layout(name) && is_directory(instance, name)).collect())
}

fn is_directory(parent: &PrivateDir, name: &str) -> bool {
    matches!(parent.open(name), Ok(Some(_)))
}

/// Returns whether build.rs could give a layout this name.
fn is_layout(name: &str) -> bool {
    name.len() == LAYOUT.len() && name.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
}

/// Returns whether an instance has pins, or incomplete directories that a killed agent left.
fn has_pins(instance: &PrivateDir) -> bool {
    let directory = |parent: &PrivateDir, name: &str| parent.open(name).ok().flatten();
    let has = |layout: &PrivateDir| {
        let names = layout.names().unwrap_or_default();
        names.is_empty()
            || [MAPS_DIR, LINKS].into_iter().filter_map(|name| directory(layout, name)).any(|dir| {
                let names = dir.names().unwrap_or_default();
                names.is_empty() || names.iter().any(|name| name.to_str().is_some_and(|name| is_pin(&dir, name)))
            })
    };
    layouts(instance).unwrap_or_default().iter().filter_map(|name| directory(instance, name)).any(|layout| has(&layout))
}

/// Returns whether an entry is a pin, by its name and kind: of a link in a directory of links, otherwise of a map.
fn is_pin(dir: &PrivateDir, name: &str) -> bool {
    let is_link = dir.path().file_name() == Some(OsStr::new(LINKS));
    let is_name = if is_link { cgroup_of(name).is_some() } else { is_map(name) };
    is_name && dir.has_file(name)
}

/// Returns whether a map of any layout can have this name.
fn is_map(name: &str) -> bool {
    name.strip_prefix("sp_").is_some_and(|rest| {
        !rest.is_empty() && rest.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'))
    })
}

/// Returns the id of the cgroup from the name of a link of any layout; `None` if no link has such a name.
fn cgroup_of(name: &str) -> Option<u64> {
    let mut parts = name.splitn(4, '-');
    let cgroup = parts.next()?.parse().ok()?;
    let (_, _): (u32, u32) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let is_program = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_');
    parts.next().filter(|program| !program.is_empty() && program.bytes().all(is_program)).map(|_| cgroup)
}

/// Opens a pinned link; `None` if it is not a link of a program to this cgroup.
fn open_link(links: &PrivateDir, name: &str, cgroup: u64) -> Result<Option<OwnedFd>, KernelError> {
    if !links.has_file(name) {
        return Ok(None);
    }
    let opened = syscall::open_pinned(&links.through(name));
    let link = opened.map_err(|source| KernelError::Pin { path: links.path().join(name), source })?;
    // The fdinfo of a link to a cgroup has this line (bpf_link_show_fdinfo, kernel/bpf/syscall.c, from 5.8 on). That of maps
    // and programs does not.
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", link.as_raw_fd()));
    if !info.is_ok_and(|info| info.lines().any(|line| line == "link_type:\tcgroup")) {
        return Ok(None);
    }
    // The id is 0 if the cgroup has been removed.
    let is_same_cgroup =
        syscall::cgroup_of_link(&link).is_ok_and(|found| found.is_some_and(|found| found == cgroup || found == 0));
    Ok(is_same_cgroup.then_some(link))
}

/// Removes the pins of a layout, the links first.
fn remove_layout(instance: &PrivateDir, name: &str, foreign: &mut Vec<PathBuf>) -> Result<(), KernelError> {
    let Some(layout) = instance.open(name)? else { return Ok(()) };
    for kind in [LINKS, MAPS_DIR] {
        if let Ok(Some(dir)) = layout.open(kind) {
            remove_pins(&dir, foreign)?;
            // Fails if the directory is not empty.
            let _ = layout.remove_dir(kind);
        }
    }
    let unknown = layout.names()?.into_iter().filter(|name| !(name == LINKS || name == MAPS_DIR));
    foreign.extend(unknown.map(|name| layout.path().join(name)));
    let _ = instance.remove_dir(name);
    Ok(())
}

fn remove_pins(dir: &PrivateDir, foreign: &mut Vec<PathBuf>) -> Result<(), KernelError> {
    for name in dir.names()? {
        let pin = name.to_str().filter(|name| is_pin(dir, name));
        let is_removed = match (pin, pin.and_then(cgroup_of)) {
            (None, _) => false,
            (Some(map), None) => dir.remove_file(map).map(|()| true)?,
            (Some(link), Some(cgroup)) => remove_link(dir, link, cgroup)?,
        };
        if !is_removed {
            foreign.push(dir.path().join(name));
        }
    }
    Ok(())
}

/// Detaches a link and removes its pin. Returns whether the entry was such a link.
fn remove_link(links: &PrivateDir, name: &str, cgroup: u64) -> Result<bool, KernelError> {
    let Some(link) = open_link(links, name, cgroup)? else { return Ok(false) };
    match syscall::detach_link(&link) {
        // The cgroup has been removed.
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
        detached => detached.map_err(|source| KernelError::Pin { path: links.path().join(name), source })?,
    }
    links.remove_file(name)?;
    Ok(true)
}

fn link_name(cgroup: u64, target: Target, hook: Hook) -> String {
    let Target { place, id } = target;
    format!("{cgroup}-{place}-{id}-{}", hook.program())
}

/// Reads the name of a pinned link.
fn parse_link(name: &str) -> Option<(u64, Target, Hook)> {
    let mut parts = name.splitn(4, '-');
    let mut part = || parts.next();
    let cgroup = part()?.parse().ok()?;
    let place = part()?.parse().ok()?;
    let id = part()?.parse().ok()?;
    let program = part()?;
    let hook = Hook::ALL.into_iter().find(|hook| hook.program() == program)?;
    Some((cgroup, Target { place, id }, hook))
}

/// The longest name of an instance, in bytes.
const NAME_MAX: usize = 64;

/// Returns whether an instance can have this name. The name is also that of a directory in the BPF file system, in which names
/// have no dots.
#[must_use]
pub fn is_instance_name(name: &str) -> bool {
    let is_allowed = |character: char| character.is_ascii_alphanumeric() || "-_".contains(character);
    !name.is_empty() && name.len() <= NAME_MAX && name.chars().all(is_allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_name_is_parsed_back() {
        let target = Target { place: 3, id: 4 };
        assert_eq!(parse_link(&link_name(77, target, Hook::Connect4)), Some((77, target, Hook::Connect4)));
        assert_eq!(parse_link("77-3-sp_connect4"), None);
        assert_eq!(parse_link("77-3-4-other"), None);
    }

    #[test]
    fn only_names_of_sockpolicy_are_accepted() {
        assert_eq!(cgroup_of("77-3-4-hook_of_another_build2"), Some(77));
        for name in ["77-3-4", "77-3-4-", "77-3-x-hook", "77-3-4-Hook", "77-3-4-../x", "-1-3-4-hook", "", "foreign"] {
            assert_eq!(cgroup_of(name), None, "{name}");
        }
        assert!(MAPS.iter().all(|map| is_map(map)));
        assert!(!["", "config", "sp_", "CONFIG", "sp_a/b", "sp_a.b", ".."].into_iter().any(is_map));
        assert!(
            is_layout(LAYOUT)
                && !is_layout("links")
                && !is_layout(&LAYOUT.to_uppercase().replace(char::is_numeric, "G"))
        );
    }
}
