//! Finds the running containers of this host: their runtime, name, image and cgroup.
//!
//! A container is found through its *watcher*, the process that waits for the end of the container. The command line of a
//! conmon (podman, CRI-O) leads to the files of the container. The working directory of a shim (containerd, Docker, nerdctl,
//! Kubernetes) does so too. Therefore containers are found wherever a runtime stores its files, and for runtimes of any user.
//! Containers that runc or crun run without a watcher are found in their state files below /run. The agent does not call any
//! runtime.
//!
//! These containers are not found: stopped containers, containers without a cgroup of their own (`--cgroups=disabled`),
//! sandboxes that hold the namespaces of a pod, and containers in a tenant's container. The image of a container that `ctr` or
//! nerdctl has started is unknown, since only containerd has it.
//!
//! Invariant: a watcher's claim that a container has a cgroup is accepted only if the watcher's user controls this cgroup
//! anyway. This user is root of the initial user namespace, or the owner of the cgroup's directory. Root's claims take
//! precedence. The user (`identity`) and the cgroup, that of a child of the watcher, are facts from the kernel. Data that
//! other users wrote only determines the name of a container.
//!
//! Invariant: only a worker process ([`Search`]) reads data that a tenant can make block or grow. It reads with the rights of
//! that tenant and within a `budget`.

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
    view::parse_pid,
    watchers::{Arguments, Scope, State},
};
use super::cgroup::{self, CgroupError, Mount};
use crate::{
    container::{self, Container, Running},
    escape::Escape,
};

/// The containers of a [`Scope`] that this process is permitted to see.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    /// Sorted by cgroup.
    pub running: Vec<Running>,
    /// The number of watchers that this process cannot inspect (permission denied).
    pub hidden: usize,
    /// In the scope of root, the users other than root that have watchers.
    accounts: BTreeSet<u32>,
    /// The number of watchers that exceeded the limits.
    skipped: usize,
    /// Whether the search exceeded its budget.
    is_incomplete: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum ListError {
    #[error("cannot read /proc: {0}")]
    Processes(#[source] io::Error),
    #[error("{0}")]
    Cgroup(#[from] CgroupError),
}

/// Lists the containers of a scope. A tenant can make this call block forever; only the worker processes of [`Search`] may call
/// it for a tenant.
///
/// # Errors
///
/// Fails if /proc or the cgroup2 mount cannot be read.
pub fn list(scope: Scope) -> Result<Listing, ListError> {
    let mount = Mount::find()?;
    let budget = Rc::new(if scope == Scope::Root { Budget::of_root() } else { Budget::of_tenant() });
    let processes = Processes::read().map_err(ListError::Processes)?;
    let mut engines = Engines::default();
    let mut describe = |started: &Started| running(started, &processes, &mount, &mut engines);
    let mut watched = watched(&processes, scope, &budget, &mut describe);
    watched.running.sort_by(|one, other| one.cgroup.cmp(&other.cgroup));
    let watchers::Watched { running, hidden, accounts, skipped } = watched;
    Ok(Listing { running, hidden, accounts, skipped, is_incomplete: budget.is_exceeded() })
}

/// Finds the cgroup, the name and the image of a container. Returns `None` if the container has no cgroup of its own, if the
/// watcher's user does not own the cgroup, or if the init process has ended.
fn running(started: &Started, processes: &Processes, mount: &Mount, engines: &mut Engines) -> Option<Running> {
    let Started { id, init, watcher, bundle, uid, .. } = started;
    let process = cgroup::of_process(*init)?;
    let watcher = watcher.and_then(cgroup::of_process);
    let config = bundle.config();
    let requested = (*uid == 0).then(|| config.cgroup()).flatten();
    let Some(cgroup) = own_cgroup(id, requested.as_deref(), &process, watcher.as_deref()) else {
        log::debug!("ignoring container {} in /{}: it has no cgroup of its own", id.escaped(), process.escaped());
        return None;
    };
    let directory = fs::metadata(mount.path.join(&cgroup)).ok()?;
    if *uid != 0 && directory.uid() != *uid {
        log::debug!(
            "ignoring container {} of user {uid}: the user does not own cgroup /{}",
            id.escaped(),
            cgroup.escaped()
        );
        return None;
    }
    let container = sanitized(engines.describe(started, &config)?, &process);
    // If the process id was reused, the facts above may be of another process.
    let running = Running { container, cgroup, cgroup_id: directory.ino() };
    processes.is_current(*init).then_some(running)
}

/// Drops a name or an image that is too long or contains control characters, since the owner of the container controls both.
/// Adds the pod from the path of the cgroup.
fn sanitized(mut container: Container, process: &Path) -> Container {
    /// The maximum length of a label in bytes.
    const LABEL_MAX: usize = 1024;
    for label in [&mut container.name, &mut container.image] {
        *label = label.take().filter(|label| label.len() <= LABEL_MAX && !label.contains(char::is_control));
    }
    container.pod = process.to_str().and_then(container::of_cgroup).and_then(|named| named.pod);
    container
}

/// Returns the cgroup of a container. It is the cgroup of its init process or an ancestor, since the process can have moved
/// into a child cgroup. `requested` is the last components of the cgroup that the engine requested, if root wrote the file.
///
/// An ancestor is the container's cgroup if its name contains the container's id of 64 digits, or if the engine requested it.
/// If several ancestors match, the outermost one is the container's cgroup: root in the container can create cgroups below it.
///
/// Returns `None` if the process is in the watcher's cgroup, in the root cgroup, or in a cgroup that is not visible in this
/// cgroup namespace.
fn own_cgroup(id: &str, requested: Option<&Path>, process: &Path, watcher: Option<&Path>) -> Option<PathBuf> {
    if process.as_os_str().is_empty() || process.starts_with("..") || watcher == Some(process) {
        return None;
    }
    let is_named =
        |path: &Path| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| is_named_after(name, id));
    let is_own = |path: &&Path| is_named(path) || requested.is_some_and(|requested| path.ends_with(requested));
    let outermost = process.ancestors().filter(is_own).last();
    Some(outermost.unwrap_or(process).to_owned())
}

/// Returns whether the name of a cgroup consists of the id of a container and a prefix that a runtime uses.
fn is_named_after(name: &str, id: &str) -> bool {
    let unit = name.strip_suffix(".scope").unwrap_or(name);
    let before = unit.strip_suffix(id).filter(|_| container::is_id(id));
    before.is_some_and(|before| before.is_empty() || before.ends_with(['-', ':']))
}

/// The known containers, by cgroup. Does no I/O.
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

    /// Returns the container of a cgroup: a running container, else the container that the path names.
    #[must_use]
    pub fn of_cgroup(&self, cgroup: &str) -> Option<Container> {
        let named = container::of_cgroup(cgroup);
        let ancestors = Path::new(cgroup.trim_start_matches('/')).ancestors();
        let running = ancestors.filter(|_| !self.running.is_empty()).find_map(|cgroup| self.running.get(cgroup));
        match (named, running) {
            // A nested container of which only the path is known.
            (Some(named), Some(running)) if named.id != running.id && container::is_id(&running.id) => Some(named),
            (named, running) => running.cloned().or(named),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "4f7c2a9b01de53c86ae09b7d41f2c6580d3e9a17b4c85f6203ed91ab7c4f2e68";

    fn own(id: &str, requested: Option<&str>, process: &str, watcher: &str) -> Option<String> {
        let process = process.replace("ID", ID);
        let own = own_cgroup(id, requested.map(Path::new), Path::new(&process), Some(Path::new(watcher)));
        own.map(|path| path.to_string_lossy().replace(ID, "ID"))
    }

    #[test]
    fn cgroup_of_a_container_is_the_one_named_after_it() {
        for (process, expected) in [
            ("libpod_parent/libpod-ID", "libpod_parent/libpod-ID"),
            ("machine.slice/libpod-ID.scope/container", "machine.slice/libpod-ID.scope"),
            ("docker/ID/init.scope", "docker/ID"),
            ("kubepods/besteffort/podx/ID", "kubepods/besteffort/podx/ID"),
            // Root in the container has made cgroups.
            ("docker/ID/x-ID/y/ID.scope", "docker/ID"),
            ("mine/own", "mine/own"),
            ("init.scope", "init.scope"),
        ] {
            assert_eq!(own(ID, None, process, "other").as_deref(), Some(expected), "{process}");
        }
    }

    #[test]
    fn ancestor_is_the_containers_cgroup_only_by_a_whole_id() {
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
    fn ancestor_that_roots_engine_requested_is_the_containers_cgroup() {
        assert_eq!(own("web", Some("default/web"), "default/web/below", "b").as_deref(), Some("default/web"));
        assert_eq!(own("web", Some("web"), "a/web/b/web/c", "b").as_deref(), Some("a/web"));
        assert_eq!(own("web", Some("elsewhere/web"), "default/web/c", "b").as_deref(), Some("default/web/c"));
    }

    #[test]
    fn shared_root_and_invisible_cgroups_are_not_the_containers() {
        assert_eq!(own(ID, None, "user.slice/session-2.scope", "user.slice/session-2.scope"), None);
        assert_eq!(own(ID, None, "", "system.slice/podman.service"), None);
        assert_eq!(own(ID, None, "../outside", "x"), None);
    }

    #[test]
    fn innermost_container_is_returned() {
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
