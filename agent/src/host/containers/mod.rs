//! The containers that run on this host: who runs them, what people call them, and the cgroup that their processes are in.
//!
//! A container is found by the process that watches over it, which tells where it left the rest: conmon (podman, CRI-O) on its
//! command line, containerd's shims (containerd, Docker, nerdctl, Kubernetes) by the folder they work in. So it does not matter
//! where a runtime was told to keep its files, nor whose it is. Those that runc and crun run without any such process are found
//! by what these leave below /run. No runtime is asked, none has to run.
//!
//! Does not tell of containers that do not run, that have no cgroup of their own (`--cgroups=disabled`), and of the sandboxes
//! that hold the namespaces of a pod. The image of what `ctr` or nerdctl has started is known to containerd alone, and not here.
//!
//! Invariant: what others write decides only what a container is called. Which cgroup it is in is what the kernel says of a
//! process that is a child of the one that watches over it, and in another cgroup than that: nobody can pass off other
//! people's processes as their container.

mod bundle;
mod engines;
mod processes;
mod view;
mod watchers;

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use self::{engines::Engines, processes::Processes, watchers::Started};
use super::{
    cgroup,
    container::{self, Container},
};
use crate::escape::Escape;

/// A container that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    pub container: Container,
    /// Below the mount. All its processes are in it or below.
    pub cgroup: PathBuf,
}

/// The containers of this host, as far as this process may look.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// In the order of their cgroups.
    pub running: Vec<Running>,
    /// How many processes watch over containers and may not be looked into.
    pub hidden: usize,
}

/// Lists them.
///
/// # Errors
///
/// Where /proc cannot be read.
pub fn running() -> io::Result<Listing> {
    let processes = Processes::read()?;
    let (started, hidden) = watchers::started(&processes);
    let mut engines = Engines::default();
    let mut running: Vec<_> = started.iter().filter_map(|started| described(started, &mut engines)).collect();
    running.sort_by(|one, other| one.cgroup.cmp(&other.cgroup));
    Ok(Listing { running, hidden })
}

fn described(started: &Started, engines: &mut Engines) -> Option<Running> {
    let process = cgroup::of_process(started.first)?;
    let watcher = started.watcher.and_then(cgroup::of_process);
    let Some(cgroup) = own_cgroup(&started.id, &process, watcher.as_deref()) else {
        log::debug!("container {} has no cgroup of its own: it is in /{}", started.id.escaped(), process.escaped());
        return None;
    };
    let mut container = engines.describe(started)?;
    // Who made it chose these words, and people's terminals show them.
    for word in [&mut container.name, &mut container.image] {
        *word = word.take().filter(|word| !word.contains(char::is_control));
    }
    container.pod = process.to_str().and_then(container::of_cgroup).and_then(|named| named.pod);
    Some(Running { container, cgroup })
}

/// The cgroup of a container, by that of its first process, which may have gone deeper (systemd does, into init.scope).
///
/// `None` where it shares that of the process that watches over it, is in the root, or in one that is not to be seen from here.
fn own_cgroup(id: &str, process: &Path, watcher: Option<&Path>) -> Option<PathBuf> {
    if process.as_os_str().is_empty() || process.starts_with("..") || watcher == Some(process) {
        return None;
    }
    let is_named = |path: &&Path| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| names(name, id));
    let own = process.ancestors().find(is_named).unwrap_or_else(|| match process.parent() {
        Some(parent) if process.ends_with("init.scope") && !parent.as_os_str().is_empty() => parent,
        _ => process,
    });
    Some(own.to_owned())
}

/// Whether a cgroup is named after this container. What is not as unmistakable as the ids of engines must be the whole name.
fn names(name: &str, id: &str) -> bool {
    let unit = name.strip_suffix(".scope").unwrap_or(name);
    unit == id || (container::is_id(id) && unit.strip_suffix(id).is_some_and(|before| before.ends_with(['-', ':'])))
}

/// Containers by the names of cgroups, learnt as they are asked for.
#[derive(Debug, Default)]
pub struct Known {
    of_cgroups: HashMap<String, Option<Container>>,
    running: Vec<Running>,
    listed: Option<Instant>,
}

impl Known {
    /// How old the list may be for a cgroup whose name is not that of a container's: there may be many.
    const AGE_MAX: Duration = Duration::from_secs(5);

    /// The container of a cgroup: of those that run, else as far as the cgroup's name tells.
    pub fn of_cgroup(&mut self, cgroup: &str) -> Option<Container> {
        if let Some(known) = self.of_cgroups.get(cgroup) {
            return known.clone();
        }
        let named = container::of_cgroup(cgroup);
        let is_fresh = self.listed.is_some_and(|listed| listed.elapsed() < Self::AGE_MAX);
        if named.is_some() || !is_fresh {
            self.list();
        }
        let found = innermost(&self.running, Path::new(cgroup.trim_start_matches('/')));
        let container = match (named, found) {
            // One that runs in another, and of which nothing else is known.
            (Some(named), Some(found)) if named.id != found.id && container::is_id(&found.id) => Some(named),
            (named, found) => found.cloned().or(named),
        };
        // One that was made since the list was may be a container's all the same.
        if container.is_some() || !is_fresh {
            self.of_cgroups.insert(cgroup.to_owned(), container.clone());
        }
        container
    }

    fn list(&mut self) {
        let listing = running().inspect_err(|error| log::debug!("cannot tell which containers there are: {error}"));
        self.running = listing.unwrap_or_default().running;
        self.listed = Some(Instant::now());
    }
}

fn innermost<'a>(running: &'a [Running], cgroup: &Path) -> Option<&'a Container> {
    let around = running.iter().filter(|running| cgroup.starts_with(&running.cgroup));
    around.max_by_key(|running| running.cgroup.components().count()).map(|running| &running.container)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "4f7c2a9b01de53c86ae09b7d41f2c6580d3e9a17b4c85f6203ed91ab7c4f2e68";

    fn own(id: &str, process: &str, watcher: &str) -> Option<String> {
        let own = own_cgroup(id, Path::new(&process.replace("ID", ID)), Some(Path::new(watcher)));
        own.map(|path| path.to_string_lossy().replace(ID, "ID"))
    }

    #[test]
    fn cgroup_of_a_container_is_the_one_named_after_it() {
        for (process, expected) in [
            ("libpod_parent/libpod-ID", "libpod_parent/libpod-ID"),
            ("machine.slice/libpod-ID.scope/container", "machine.slice/libpod-ID.scope"),
            ("docker/ID/init.scope", "docker/ID"),
            ("docker/ID/system.slice/docker-ID.scope/init.scope", "docker/ID/system.slice/docker-ID.scope"),
            ("kubepods/besteffort/podx/ID", "kubepods/besteffort/podx/ID"),
            ("mine/own", "mine/own"),
            ("mine/own/init.scope", "mine/own"),
            ("init.scope", "init.scope"),
        ] {
            assert_eq!(own(ID, process, "other").as_deref(), Some(expected), "{process}");
        }
    }

    #[test]
    fn short_id_must_be_the_whole_name() {
        assert_eq!(own("2", "user.slice/session-2.scope/a", "b").as_deref(), Some("user.slice/session-2.scope/a"));
        assert_eq!(own("web", "default/web/below", "b").as_deref(), Some("default/web"));
    }

    #[test]
    fn cgroup_that_others_share_is_nobodys() {
        assert_eq!(own(ID, "user.slice/session-2.scope", "user.slice/session-2.scope"), None);
        assert_eq!(own(ID, "", "system.slice/podman.service"), None);
        assert_eq!(own(ID, "../outside", "x"), None);
    }

    #[test]
    fn innermost_container_counts() {
        let container =
            |id: &str| Container { runtime: container::DOCKER, id: id.to_owned(), pod: None, name: None, image: None };
        let running = [("docker/a", "a"), ("docker/a/docker/b", "b")]
            .map(|(cgroup, id)| Running { container: container(id), cgroup: cgroup.into() });
        let id = |cgroup: &str| innermost(&running, Path::new(cgroup)).map(|container| container.id.as_str());
        assert_eq!(id("docker/a/docker/b/x"), Some("b"));
        assert_eq!(id("docker/a/x"), Some("a"));
        assert_eq!(id("docker/ab"), None);
    }
}
