//! What a container is, and which one a cgroup belongs to, from nothing but its path.
//!
//! Runtimes put the id of a container into the name of its cgroup, each in its own way, and
//! differently under systemd (`docker-ID.scope`) and without (`docker/ID`). Does not ask any runtime
//! whether there is such a container, nor what people call it: that is for [`super::containers`].
//!
//! Invariant: only 64 hexadecimal digits in a place where a runtime has them are taken for an id.
//! Containers in a cgroup of somebody's own choice (`--cgroup-parent`) without systemd are missed
//! rather than guessed.
//!
//! Sources: `withCgroups` of moby (daemon/oci_linux.go), `ContainerCgroupPath` of cri-o
//! (internal/config/cgmgr), `getCgroupsPath` of containerd (internal/cri/server),
//! `generateCgroupPath` of nerdctl (pkg/cmd/container), `getOCICgroupPath` of podman
//! (libpod/container_internal_linux.go), and the cgroup manager of the kubelet (pkg/kubelet/cm).

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, de};

use crate::escape::Escape;

pub const CONTAINERD: &str = "containerd";
pub const CRI_O: &str = "cri-o";
pub const CRUN: &str = "crun";
pub const DOCKER: &str = "docker";
/// Of a container of a pod, if the path of its cgroup does not say more.
const KUBERNETES: &str = "kubernetes";
pub const PODMAN: &str = "podman";
pub const RUNC: &str = "runc";

/// A container, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Container {
    /// Who runs it: one of the above; `kubernetes` where it is one of a pod, and nothing but the path of its cgroup is known,
    /// which does not tell. runc and crun are what others run containers with; it is theirs where there is nobody else.
    pub runtime: &'static str,
    /// 64 hexadecimal digits, but for containers of containerd, runc or crun, which whoever makes one may call what they like.
    pub id: String,
    /// The uid of its Kubernetes pod, with hyphens where it has any, or the id of its podman pod.
    pub pod: Option<String>,
    /// `NAMESPACE/POD/CONTAINER` in Kubernetes. `None`: not known.
    pub name: Option<String>,
    /// As the runtime was told. `None`: not known.
    pub image: Option<String>,
}

/// Who runs containers, by the words for them.
const RUNTIMES: [&str; 7] = [CONTAINERD, CRI_O, CRUN, DOCKER, KUBERNETES, PODMAN, RUNC];

/// A container, as a worker process writes it.
#[derive(Deserialize)]
struct Written {
    runtime: String,
    id: String,
    pod: Option<String>,
    name: Option<String>,
    image: Option<String>,
}

impl<'de> Deserialize<'de> for Container {
    fn deserialize<D: Deserializer<'de>>(value: D) -> Result<Self, D::Error> {
        let Written { runtime, id, pod, name, image } = Written::deserialize(value)?;
        let known = RUNTIMES.into_iter().find(|known| *known == runtime);
        let runtime = known.ok_or_else(|| de::Error::custom(format_args!("{runtime} is no runtime")))?;
        Ok(Self { runtime, id, pod, name, image })
    }
}

/// What stands before the id in the name of a cgroup, and who writes it. Processes that merely watch
/// a container are in a cgroup like `crio-conmon-ID`, which is not here.
const PREFIXES: [(&str, &str); 6] = [
    ("docker", DOCKER),
    ("cri-containerd", CONTAINERD),
    ("nerdctl", CONTAINERD),
    ("crio", CRI_O),
    ("libpod", PODMAN),
    // `--cgroups=split`, as quadlets have it
    ("libpod-payload", PODMAN),
];

/// Cgroups whose children have an id for their name, and who makes them: of containerd, its
/// namespaces.
const PARENTS: [(&str, &str); 3] = [("docker", DOCKER), ("default", CONTAINERD), ("k8s.io", CONTAINERD)];

/// The container of a cgroup: the innermost where one runs in another, also for what a container
/// made below its own cgroup. `None` where the path names none.
#[must_use]
pub fn of_cgroup(path: &str) -> Option<Container> {
    let mut found = None;
    let mut pod = None;
    let mut parent = "";
    for name in path.split('/').filter(|name| !name.is_empty()) {
        pod = pod_of(name).or(pod);
        if let Some((runtime, id)) = named_by(name, parent) {
            let pod = pod.map(|pod: &str| pod.replace('_', "-"));
            found = Some(Container { runtime, id: id.to_owned(), pod, name: None, image: None });
        }
        parent = name;
    }
    found
}

/// The runtime and the id in the name of a container's own cgroup: `ID` in a known parent,
/// `PREFIX-ID`, or `SLICE:PREFIX:ID` where a path for systemd met a runtime without it.
fn named_by<'a>(name: &'a str, parent: &str) -> Option<(&'static str, &'a str)> {
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

/// The pod in the name of a cgroup: `podUID`, `kubepods-burstable-podUID.slice` with underscores, or
/// `machine-libpod_pod_ID.slice`.
fn pod_of(name: &str) -> Option<&str> {
    let unit = name.split_once(':').map_or(name, |(slice, _)| slice);
    let Some(slice) = unit.strip_suffix(".slice") else {
        return unit.strip_prefix("pod").filter(|uid| is_uid(uid));
    };
    let podman = slice.rsplit_once("-libpod_pod_").map(|(_, id)| id).filter(|id| is_id(id));
    podman.or_else(|| slice.rsplit_once("-pod").map(|(_, uid)| uid).filter(|uid| is_uid(uid)))
}

/// Whether a word is an id of the kind that most runtimes give.
#[must_use]
pub fn is_id(word: &str) -> bool {
    word.len() == 64 && word.bytes().all(is_digit)
}

/// A UUID or, of pods that a node has from a file, a hash of 32 digits.
fn is_uid(word: &str) -> bool {
    let digits = word.bytes().filter(|byte| is_digit(*byte)).count();
    let separators = word.bytes().filter(|byte| matches!(byte, b'-' | b'_')).count();
    digits == 32 && matches!(separators, 0 | 4) && digits + separators == word.len()
}

fn is_digit(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

/// As people know containers: `podman:web-1`, or `docker:4f7c2a9b01de`.
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ID: &str = "4f7c2a9b01de53c86ae09b7d41f2c6580d3e9a17b4c85f6203ed91ab7c4f2e68";
    const OTHER: &str = "c0ffee00d15ea5e0badc0de0feedface0123456789abcdef0123456789abcdef";
    const UID: &str = "72f7f152-440c-66ac-9084-e0fc1d8a910c";
    const HASH: &str = "3d6beaa3004913efb68ce073d73494b0";

    /// Fills in a path: `ID`, `OTHER`, `UID`, `U_I_D` (as systemd has it) and `HASH`.
    fn container(path: &str) -> Option<Container> {
        let path = path.replace("OTHER", OTHER).replace("U_I_D", &UID.replace('-', "_"));
        of_cgroup(&path.replace("UID", UID).replace("ID", ID).replace("HASH", HASH))
    }

    fn named(runtime: &'static str, pod: Option<&str>) -> Container {
        Container { runtime, id: ID.to_owned(), pod: pod.map(str::to_owned), name: None, image: None }
    }

    #[test]
    fn runtimes_are_known_by_how_they_name_cgroups() {
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
    fn containers_of_pods_are_known_with_their_pod() {
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
    fn innermost_container_counts() {
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
            // Of a pod that has no container yet the node is the innermost.
            ("/docker/ID/kubelet.slice/kubelet-kubepods-podU_I_D.slice", "docker", None),
        ] {
            let expected = named(runtime, pod);
            assert_eq!(container(path), Some(expected), "{path}");
        }
    }

    #[test]
    fn what_is_no_container_is_none() {
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
    fn people_see_the_name_or_the_first_twelve_digits_and_programs_all() {
        let mut container = container("/kubepods/podHASH/ID").unwrap();
        assert_eq!(container.to_string(), "kubernetes:4f7c2a9b01de");
        let line = json!({ "runtime": "kubernetes", "id": ID, "pod": HASH, "name": null, "image": null });
        assert_eq!(json!(container), line);
        container.name = Some("shop/web/nginx".to_owned());
        assert_eq!(container.to_string(), "kubernetes:shop/web/nginx");
    }
}
