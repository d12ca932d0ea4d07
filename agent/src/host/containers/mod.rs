//! The containers that run on this host: who runs them, what people call them, and the cgroup that their processes are in.
//!
//! A container is found by the process that watches it, which says where it left the rest: conmon (podman, CRI-O) on its
//! command line, containerd's shims (containerd, Docker, nerdctl, Kubernetes) by the folder they work in. So it does not matter
//! where a runtime keeps its files, nor whose runtime it is. Containers that runc and crun run without any such process are found
//! by what these leave below /run. No runtime is asked, none has to run.
//!
//! Does not find containers that do not run, that have no cgroup of their own (`--cgroups=disabled`), the sandboxes
//! that hold the namespaces of a pod, and containers in a tenant's container. The image of what `ctr` or nerdctl has started is
//! known to containerd alone, and not here.
//!
//! Invariant: a claim counts for a cgroup only if who makes it controls that cgroup anyway. These are root of the initial
//! user namespace, and the user that owns the cgroup's folder; and that user only where root has no container. The kernel says
//! who makes the claim ([`identity`]), and which cgroup it is about: that of a child of the claiming process. What others wrote
//! decides only what a container is called.
//!
//! Invariant: only a worker process reads what a tenant can make block or grow ([`Search`]), with the rights of that tenant and
//! within a [`budget`].

mod budget;
mod bundle;
mod engines;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
mod identity;
mod processes;
mod search;
mod view;
mod watchers;

use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    rc::Rc,
};

use serde::{Deserialize, Serialize};

use self::{
    budget::Budget,
    engines::Engines,
    processes::Processes,
    watchers::{Started, watched},
};
pub use self::{
    identity::Status,
    search::{LIST, Search},
    view::parse_number,
    watchers::{Arguments, Scope, State},
};
use super::{
    cgroup::{self, CgroupError, Mount},
    container::{self, Container},
};
use crate::escape::Escape;

/// A container that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    pub container: Container,
    /// Below the mount. All its processes are in it or below.
    pub cgroup: PathBuf,
    /// The kernel's id of the cgroup.
    pub cgroup_id: u64,
}

/// The containers of a [`Scope`], as far as this process may look.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    /// In the order of their cgroups.
    pub running: Vec<Running>,
    /// How many watchers this process must not look into.
    pub hidden: usize,
    /// Users who have watchers too.
    accounts: BTreeSet<u32>,
    /// How many watchers were left out, for there are too many.
    skipped: usize,
    /// Whether there was more to read than the limits allow.
    is_incomplete: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum ListError {
    #[error("cannot read /proc: {0}")]
    Processes(#[source] io::Error),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// Lists the containers of a scope. Can block for ever if the scope is a tenant's: for [`Search`]'s worker processes.
///
/// # Errors
///
/// If /proc or the cgroup2 mount cannot be read.
pub fn list(scope: Scope) -> Result<Listing, ListError> {
    let mount = Mount::find()?;
    let budget = Rc::new(if scope == Scope::Root { Budget::of_root() } else { Budget::of_tenant() });
    let processes = Processes::read().map_err(ListError::Processes)?;
    let mut engines = Engines::default();
    let mut describe = |started: &Started| described(started, &processes, &mount, &mut engines);
    let mut watched = watched(&processes, scope, &budget, &mut describe);
    watched.running.sort_by(|one, other| one.cgroup.cmp(&other.cgroup));
    let watchers::Watched { running, hidden, accounts, skipped } = watched;
    Ok(Listing { running, hidden, accounts, skipped, is_incomplete: budget.is_exceeded() })
}

fn described(started: &Started, processes: &Processes, mount: &Mount, engines: &mut Engines) -> Option<Running> {
    let Started { id, first, watcher, bundle, uid, .. } = started;
    let process = cgroup::of_process(*first)?;
    let watcher = watcher.and_then(cgroup::of_process);
    let config = bundle.config();
    let asked = (*uid == 0).then(|| config.cgroup()).flatten();
    let Some(cgroup) = own_cgroup(id, asked.as_deref(), &process, watcher.as_deref()) else {
        log::debug!("container {} has no cgroup of its own: it is in /{}", id.escaped(), process.escaped());
        return None;
    };
    let folder = fs::metadata(mount.path.join(&cgroup)).ok()?;
    if *uid != 0 && folder.uid() != *uid {
        log::debug!("user {uid} claims that container {} is in /{}, which is not his", id.escaped(), cgroup.escaped());
        return None;
    }
    let container = named(engines.describe(started, &config)?, &process);
    // What was read may be of another process, which has its number by now.
    let running = Running { container, cgroup, cgroup_id: folder.ino() };
    processes.is_current(*first).then_some(running)
}

/// What people see of a container comes from who made it.
fn named(mut container: Container, process: &Path) -> Container {
    /// In bytes.
    const WORD_MAX: usize = 1024;
    for word in [&mut container.name, &mut container.image] {
        *word = word.take().filter(|word| word.len() <= WORD_MAX && !word.contains(char::is_control));
    }
    container.pod = process.to_str().and_then(container::of_cgroup).and_then(|named| named.pod);
    container
}

/// Returns the cgroup of a container, by that of its first process, which may have gone deeper. `requested`: the last components of
/// the cgroup that its engine asked for, if root wrote that.
///
/// An ancestor is the container's if its name has the container's id, of 64 digits, or if it is the one that was asked for. Of
/// several, the outermost is: root in the container can create others below.
///
/// `None` if the container shares the cgroup of the process that watches it, is in the root, or in a cgroup that is not visible
/// from here.
fn own_cgroup(id: &str, asked: Option<&Path>, process: &Path, watcher: Option<&Path>) -> Option<PathBuf> {
    if process.as_os_str().is_empty() || process.starts_with("..") || watcher == Some(process) {
        return None;
    }
    let is_named = |path: &Path| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| names(name, id));
    let is_own = |path: &&Path| is_named(path) || asked.is_some_and(|asked| path.ends_with(asked));
    let outermost = process.ancestors().filter(is_own).last();
    Some(outermost.unwrap_or(process).to_owned())
}

/// Whether a cgroup is named after the container with this id.
fn names(name: &str, id: &str) -> bool {
    let unit = name.strip_suffix(".scope").unwrap_or(name);
    let before = unit.strip_suffix(id).filter(|_| container::is_id(id));
    before.is_some_and(|before| before.is_empty() || before.ends_with(['-', ':']))
}

/// Containers by their cgroups. Does no I/O.
#[derive(Clone, Debug, Default)]
pub struct Known {
    running: HashMap<PathBuf, Container>,
}

impl Known {
    #[must_use]
    pub fn new(running: &[Running]) -> Self {
        let of_cgroups = running.iter().map(|running| (running.cgroup.clone(), running.container.clone()));
        Self { running: of_cgroups.collect() }
    }

    /// Returns the container of a cgroup: of those that run, else as far as the cgroup's name says.
    #[must_use]
    pub fn of_cgroup(&self, cgroup: &str) -> Option<Container> {
        let named = container::of_cgroup(cgroup);
        let around = Path::new(cgroup.trim_start_matches('/')).ancestors();
        let found = around.filter(|_| !self.running.is_empty()).find_map(|cgroup| self.running.get(cgroup));
        match (named, found) {
            // One that runs in another, and of which nothing else is known.
            (Some(named), Some(found)) if named.id != found.id && container::is_id(&found.id) => Some(named),
            (named, found) => found.cloned().or(named),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "4f7c2a9b01de53c86ae09b7d41f2c6580d3e9a17b4c85f6203ed91ab7c4f2e68";

    fn own(id: &str, asked: Option<&str>, process: &str, watcher: &str) -> Option<String> {
        let process = process.replace("ID", ID);
        let own = own_cgroup(id, asked.map(Path::new), Path::new(&process), Some(Path::new(watcher)));
        own.map(|path| path.to_string_lossy().replace(ID, "ID"))
    }

    #[test]
    fn cgroup_of_a_container_is_the_one_named_after_it() {
        for (process, expected) in [
            ("libpod_parent/libpod-ID", "libpod_parent/libpod-ID"),
            ("machine.slice/libpod-ID.scope/container", "machine.slice/libpod-ID.scope"),
            ("docker/ID/init.scope", "docker/ID"),
            ("kubepods/besteffort/podx/ID", "kubepods/besteffort/podx/ID"),
            // Made by root in the container.
            ("docker/ID/x-ID/y/ID.scope", "docker/ID"),
            ("mine/own", "mine/own"),
            ("init.scope", "init.scope"),
        ] {
            assert_eq!(own(ID, None, process, "other").as_deref(), Some(expected), "{process}");
        }
    }

    #[test]
    fn ancestor_is_a_containers_only_by_a_whole_id() {
        for (id, process) in [
            ("web", "default/web/below"),
            ("user.slice", "user.slice/mine"),
            ("user-1000", "user.slice/user-1000/mine"),
            ("2", "user.slice/session-2.scope/a"),
            (&ID[..12], "docker/ID/below"),
            (&ID[1..], "docker/ID/below"),
        ] {
            assert_eq!(own(id, None, process, "b").as_deref(), Some(process), "{id}");
        }
    }

    #[test]
    fn ancestor_that_roots_engine_asked_for_is_the_containers() {
        assert_eq!(own("web", Some("default/web"), "default/web/below", "b").as_deref(), Some("default/web"));
        assert_eq!(own("web", Some("web"), "a/web/b/web/c", "b").as_deref(), Some("a/web"));
        assert_eq!(own("web", Some("elsewhere/web"), "default/web/c", "b").as_deref(), Some("default/web/c"));
    }

    #[test]
    fn cgroup_that_others_share_is_nobodys() {
        assert_eq!(own(ID, None, "user.slice/session-2.scope", "user.slice/session-2.scope"), None);
        assert_eq!(own(ID, None, "", "system.slice/podman.service"), None);
        assert_eq!(own(ID, None, "../outside", "x"), None);
    }

    #[test]
    fn innermost_container_counts() {
        let container =
            |id: &str| Container { runtime: container::DOCKER, id: id.to_owned(), pod: None, name: None, image: None };
        let running = [("docker/a", "a"), ("docker/a/docker/b", "b")].map(|(cgroup, id)| Running {
            container: container(id),
            cgroup: cgroup.into(),
            cgroup_id: 0,
        });
        let known = Known::new(&running);
        let id = |cgroup: &str| known.of_cgroup(cgroup).map(|container| container.id);
        assert_eq!(id("/docker/a/docker/b/x").as_deref(), Some("b"));
        assert_eq!(id("/docker/a/x").as_deref(), Some("a"));
        assert_eq!(id("/docker/ab"), None);
        let named = format!("/docker/a/docker/{ID}");
        assert_eq!(id(&named).as_deref(), Some("a"));
        assert_eq!(Known::default().of_cgroup(&named).map(|container| container.id).as_deref(), Some(ID));
    }
}
