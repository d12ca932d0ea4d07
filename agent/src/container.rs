//! The description of a container, and the container that the path of a cgroup names.
//!
//! Runtimes put the id of a container into the name of its cgroup. The form depends on the runtime, and on whether it uses
//! systemd (`docker-ID.scope`) or not (`docker/ID`). This module only parses paths. [`crate::host::containers`] finds out whether
//! such a container runs, and its name.
//!
//! Invariant: an id is 64 hexadecimal digits at a position where a runtime writes them. A container in a cgroup that the user
//! chose (`--cgroup-parent`), without systemd, is therefore not found; it is never guessed.
//!
//! Sources: `withCgroups` of moby (daemon/oci_linux.go), `ContainerCgroupPath` of cri-o
//! (internal/config/cgmgr), `getCgroupsPath` of containerd (internal/cri/server),
//! `generateCgroupPath` of nerdctl (pkg/cmd/container), `getOCICgroupPath` of podman
//! (libpod/container_internal_linux.go), and the cgroup manager of the kubelet (pkg/kubelet/cm).

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, de};

use crate::escape::Escape;

pub const CONTAINERD: &str = "containerd";
pub const CRI_O: &str = "cri-o";
pub const CRUN: &str = "crun";
pub const DOCKER: &str = "docker";
/// The runtime of a container of a pod, if the path of its cgroup does not name the runtime.
const KUBERNETES: &str = "kubernetes";
pub const PODMAN: &str = "podman";
pub const RUNC: &str = "runc";

/// A container. Unknown facts are `None`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Container {
    /// One of `RUNTIMES`. `kubernetes` is a container of a pod of which only the path of the cgroup is known. runc and crun are
    /// named only if no engine is known for the container.
    pub runtime: &'static str,
    /// 64 hexadecimal digits. For containerd, runc and crun, any id that the caller chose.
    pub id: String,
    /// The uid of its Kubernetes pod, with hyphens if the uid has any, or the id of its podman pod.
    pub pod: Option<String>,
    /// The name; in Kubernetes, `NAMESPACE/POD/CONTAINER`.
    pub name: Option<String>,
    /// The image, as it was passed to the runtime.
    pub image: Option<String>,
}

/// The names of container engines and runtimes.
const RUNTIMES: [&str; 7] = [CONTAINERD, CRI_O, CRUN, DOCKER, KUBERNETES, PODMAN, RUNC];

/// A container in the JSON that a worker process writes.
#[derive(Deserialize)]
struct ContainerJson {
    runtime: String,
    id: String,
    pod: Option<String>,
    name: Option<String>,
    image: Option<String>,
}

impl<'de> Deserialize<'de> for Container {
    fn deserialize<D: Deserializer<'de>>(value: D) -> Result<Self, D::Error> {
        let ContainerJson { runtime, id, pod, name, image } = ContainerJson::deserialize(value)?;
        let known = RUNTIMES.into_iter().find(|known| *known == runtime);
        let runtime = known.ok_or_else(|| de::Error::custom(format_args!("unknown container runtime {runtime}")))?;
        Ok(Self { runtime, id, pod, name, image })
    }
}

/// The prefixes of the id in the name of a cgroup, each with the runtime that writes it. Cgroups such as `crio-conmon-ID` are
/// not listed: they contain only the process that watches a container.
const PREFIXES: [(&str, &str); 6] = [
    ("docker", DOCKER),
    ("cri-containerd", CONTAINERD),
    ("nerdctl", CONTAINERD),
    ("crio", CRI_O),
    ("libpod", PODMAN),
    // `--cgroups=split`, which quadlets use
    ("libpod-payload", PODMAN),
];

/// The cgroups whose children are named by an id, each with the runtime that makes them. containerd uses the names of its
/// namespaces.
const PARENTS: [(&str, &str); 3] = [("docker", DOCKER), ("default", CONTAINERD), ("k8s.io", CONTAINERD)];

/// Returns the container that the path of a cgroup names, also for cgroups that the container made below its own. If containers
/// are nested, returns the innermost. Returns `None` if the path names no container.
#[must_use]
pub fn of_cgroup(path: &str) -> Option<Container> {
    let mut found = None;
    let mut pod = None;
    let mut parent = "";
    for name in path.split('/').filter(|name| !name.is_empty()) {
        pod = pod_of(name).or(pod);
        if let Some((runtime, id)) = runtime_and_id(name, parent) {
            let pod = pod.map(|pod: &str| pod.replace('_', "-"));
            found = Some(Container { runtime, id: id.to_owned(), pod, name: None, image: None });
        }
        parent = name;
    }
    found
}

/// Returns the runtime and the id in the name of a container's own cgroup. The name is `ID` in one of [`PARENTS`], `PREFIX-ID`,
/// or `SLICE:PREFIX:ID` if a path for systemd was passed to a runtime that does not use systemd.
fn runtime_and_id<'a>(name: &'a str, parent: &str) -> Option<(&'static str, &'a str)> {
    let runtime_of = |known: &[(&str, &'static str)], word: &str| {
        known.iter().find(|(known, _)| *known == word).map(|(_, runtime)| *runtime)
    };
    let unit = name.strip_suffix(".scope").unwrap_or(name);
    if is_id(unit) {
        let runtime = runtime_of(&PARENTS, parent).or(pod_of(parent).map(|_| KUBERNETES))?;
        return Some((runtime, unit));
    }
    let (before, id) = unit.rsplit_once(['-', ':']).filter(|(_, id)| is_id(id))?;
    let prefix = before.rsplit_once(':').map_or(before, |(_, prefix)| prefix);
    Some((runtime_of(&PREFIXES, prefix)?, id))
}

/// Returns the pod in the name of a cgroup: `podUID`, `kubepods-burstable-podUID.slice` (with underscores for hyphens), or
/// `machine-libpod_pod_ID.slice`.
fn pod_of(name: &str) -> Option<&str> {
    let unit = name.split_once(':').map_or(name, |(slice, _)| slice);
    let Some(slice) = unit.strip_suffix(".slice") else {
        return unit.strip_prefix("pod").filter(|uid| is_uid(uid));
    };
    let podman = slice.rsplit_once("-libpod_pod_").map(|(_, id)| id).filter(|id| is_id(id));
    podman.or_else(|| slice.rsplit_once("-pod").map(|(_, uid)| uid).filter(|uid| is_uid(uid)))
}

/// Returns whether a word is 64 hexadecimal digits, the form of id that most runtimes use.
#[must_use]
pub fn is_id(word: &str) -> bool {
    word.len() == 64 && word.bytes().all(is_digit)
}

/// Returns whether a word is the uid of a pod. It is a UUID, or a hash of 32 digits for static pods, which a node reads from a
/// file.
fn is_uid(word: &str) -> bool {
    let digits = word.bytes().filter(|byte| is_digit(*byte)).count();
    let separators = word.bytes().filter(|byte| matches!(byte, b'-' | b'_')).count();
    digits == 32 && matches!(separators, 0 | 4) && digits + separators == word.len()
}

fn is_digit(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

/// Writes the form for people: `podman:web-1`, or `docker:4f7c2a9b01de` if the name is unknown.
impl fmt::Display for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{}:{}", self.runtime, name.escaped()),
            None => {
                let short = self.id.char_indices().nth(12).map_or(&*self.id, |(end, _)| &self.id[..end]);
                write!(f, "{}:{}", self.runtime, short.escaped())
            }
        }
    }
}

/// A running container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    pub container: Container,
    /// The path of its cgroup below the mount. All its processes are in this cgroup or below.
    pub cgroup: PathBuf,
    /// The kernel's id of the cgroup.
    pub cgroup_id: u64,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ID: &str = "4f7c2a9b01de53c86ae09b7d41f2c6580d3e9a17b4c85f6203ed91ab7c4f2e68";
    const OTHER: &str = "c0ffee00d15ea5e0badc0de0feedface0123456789abcdef0123456789abcdef";
    const UID: &str = "72f7f152-440c-66ac-9084-e0fc1d8a910c";
    const HASH: &str = "3d6beaa3004913efb68ce073d73494b0";

    /// Replaces `ID`, `OTHER`, `UID`, `U_I_D` (the UID with underscores, as in unit names) and `HASH` in a path, and parses it.
    fn container(path: &str) -> Option<Container> {
        let path = path.replace("OTHER", OTHER).replace("U_I_D", &UID.replace('-', "_"));
        of_cgroup(&path.replace("UID", UID).replace("ID", ID).replace("HASH", HASH))
    }

    fn named(runtime: &'static str, pod: Option<&str>) -> Container {
        Container { runtime, id: ID.to_owned(), pod: pod.map(str::to_owned), name: None, image: None }
    }

    #[test]
    fn runtime_is_found_from_the_name_of_the_cgroup() {
        for (path, runtime) in [
            ("/system.slice/docker-ID.scope", "docker"),
            ("/docker/ID", "docker"),
            ("/system.slice:docker:ID", "docker"),
            ("/user.slice/user-1000.slice/user@1000.service/user.slice/docker-ID.scope", "docker"),
            ("/system.slice/nerdctl-ID.scope", "containerd"),
            ("/default/ID", "containerd"),
            ("/k8s.io/ID", "containerd"),
            ("/machine.slice/crio-ID.scope", "cri-o"),
            ("/crio/crio-ID", "cri-o"),
            ("/machine.slice/libpod-ID.scope", "podman"),
            ("/machine.slice/libpod-ID.scope/container", "podman"),
            ("/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-ID.scope/container", "podman"),
            ("/system.slice/web.service/libpod-payload-ID", "podman"),
            ("/libpod_parent/libpod-ID", "podman"),
            ("/libpod_parent/libpod-ID/ctr", "podman"),
        ] {
            let expected = named(runtime, None);
            assert_eq!(container(path), Some(expected), "{path}");
        }
    }

    #[test]
    fn pod_is_found_from_the_path() {
        for (path, runtime, pod) in [
            (
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_I_D.slice/cri-containerd-ID.scope",
                "containerd",
                UID,
            ),
            ("/kubepods.slice/kubepods-podU_I_D.slice/crio-ID.scope", "cri-o", UID),
            ("/kubepods.slice/kubepods-podU_I_D.slice/crio-ID.scope/container", "cri-o", UID),
            (
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podHASH.slice/docker-ID.scope",
                "docker",
                HASH,
            ),
            ("/kubepods/besteffort/podUID/ID", "kubernetes", UID),
            ("/kubepods/podHASH/ID", "kubernetes", HASH),
            ("/kubepods/burstable/podUID/crio-ID", "cri-o", UID),
            (
                "/system.slice/containerd.service/kubepods-besteffort-podU_I_D.slice:cri-containerd:ID",
                "containerd",
                UID,
            ),
            ("/kubepods-besteffort-podU_I_D.slice:cri-containerd:ID", "containerd", UID),
            (
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/\
                 kubelet-kubepods-besteffort-podU_I_D.slice/cri-containerd-ID.scope",
                "containerd",
                UID,
            ),
            ("/machine.slice/machine-libpod_pod_OTHER.slice/libpod-ID.scope", "podman", OTHER),
        ] {
            let expected = named(runtime, Some(pod));
            assert_eq!(container(path), Some(expected), "{path}");
        }
    }

    #[test]
    fn innermost_container_is_returned() {
        for (path, runtime, pod) in [
            ("/docker/OTHER/docker/ID", "docker", None),
            ("/docker/ID/system.slice/nginx.service", "docker", None),
            (
                "/docker/OTHER/kubelet.slice/kubelet-kubepods-podU_I_D.slice/cri-containerd-ID.scope",
                "containerd",
                Some(UID),
            ),
            ("/kubepods/besteffort/podUID/OTHER/docker/ID", "docker", Some(UID)),
            ("/kubepods/besteffort/podUID/ID/init.scope", "kubernetes", Some(UID)),
            // The pod has no container yet: the innermost container is the node.
            ("/docker/ID/kubelet.slice/kubelet-kubepods-podU_I_D.slice", "docker", None),
        ] {
            let expected = named(runtime, pod);
            assert_eq!(container(path), Some(expected), "{path}");
        }
    }

    #[test]
    fn paths_that_name_no_container_return_none() {
        for path in [
            "",
            "/",
            "/init.scope",
            "/system.slice/nginx.service",
            "/system.slice/docker.service",
            "/system.slice/containerd.service",
            "/system.slice/docker-4f7c2a9b01de.scope",
            "/docker",
            "/docker/buildkit/k3v9w2m1xq8zt7y6u5r4e3w2q",
            "/system.slice:docker:k3v9w2m1xq8zt7y6u5r4e3w2q",
            "/buildkit/ID",
            "/ID",
            "/machine.slice/crio-conmon-ID.scope",
            "/machine.slice/libpod-conmon-ID.scope",
            "/machine.slice/machine-libpod_pod_ID.slice",
            "/libpod_parent/ID",
            "/system.slice/var-lib-docker-containers-ID-mounts-shm.mount",
            "/system.slice/docker-ID.mount",
            "/user.slice/user-1000.slice/session-2.scope",
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_I_D.slice",
            "/kubepods/besteffort/podUID",
            "/kubepods/besteffort/poddle/ID",
            "/kubepods/besteffort/podUID/ID0",
        ] {
            assert_eq!(container(path), None, "{path}");
        }
        assert_eq!(of_cgroup(&format!("/docker/{}", ID.to_uppercase())), None);
        assert_eq!(of_cgroup(&format!("/docker/{}", ID.replace('4', "é"))), None);
    }

    #[test]
    fn display_shortens_the_id_and_json_does_not() {
        let mut container = container("/kubepods/podHASH/ID").unwrap();
        assert_eq!(container.to_string(), "kubernetes:4f7c2a9b01de");
        let line = json!({ "runtime": "kubernetes", "id": ID, "pod": HASH, "name": null, "image": null });
        assert_eq!(json!(container), line);
        container.name = Some("shop/web/nginx".to_owned());
        assert_eq!(container.to_string(), "kubernetes:shop/web/nginx");
    }
}
