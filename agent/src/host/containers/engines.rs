//! What those who run containers call them: from what each keeps on disk.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{
    super::container::{self, CONTAINERD, CRI_O, Container, DOCKER, PODMAN},
    bundle::{Bundle, Config},
    watchers::{By, Started},
};

/// containerd's namespace for what Docker runs (`ContainersNamespace` of moby, daemon/config).
const NAMESPACE_OF_DOCKER: &str = "moby";

/// What was read once, for all containers that it tells of.
#[derive(Debug, Default)]
pub(super) struct Engines {
    /// Containers by id, of each folder of containers/storage.
    storages: HashMap<(u64, u64), HashMap<String, Stored>>,
}

/// What people know a container by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) name: Option<String>,
    pub(super) image: Option<String>,
}

impl Engines {
    /// `None` for the sandbox of a pod.
    pub(super) fn describe(&mut self, started: &Started, config: &Config) -> Option<Container> {
        let Started { id, bundle, by, .. } = started;
        let is_of_crio = config.annotation("io.container.manager") == Some("cri-o");
        let (runtime, known) = match by {
            _ if is_of_crio => (CRI_O, of_crio(config)?),
            By::Conmon { name } => (PODMAN, self.of_podman(id, bundle, name.clone())),
            By::Shim { namespace } if namespace == NAMESPACE_OF_DOCKER => (DOCKER, of_docker(id, bundle, config)),
            By::Shim { .. } => (CONTAINERD, of_containerd(id, config)?),
            // Its conmon is gone.
            By::Runtime(_) if config.annotation("io.container.manager") == Some("libpod") => {
                (PODMAN, self.of_podman(id, bundle, None))
            }
            By::Runtime(word) => (*word, Known { name: Some(id.clone()), image: None }),
        };
        let Known { name, image } = known;
        Some(Container { runtime, id: id.clone(), pod: None, name, image })
    }

    /// `first_name` is what it was called when it was started: it can be given another.
    fn of_podman(&mut self, id: &str, bundle: &Bundle, first_name: Option<String>) -> Known {
        // STORAGE/DRIVER-containers/ID/userdata
        let stored = bundle.path.ancestors().nth(2).and_then(|folder| {
            let identity = bundle.view.identity(folder)?;
            let storage = self.storages.entry(identity).or_insert_with(|| read_storage(bundle, folder));
            storage.get(id).map(Stored::known)
        });
        let Known { name, image } = stored.unwrap_or_default();
        Known { name: name.or(first_name), image }
    }
}

/// A container as containers/storage knows it (`Container` of its containers.go).
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Stored {
    id: String,
    #[serde(default)]
    names: Option<Vec<String>>,
    #[serde(default)]
    metadata: String,
}

/// What podman has it keep (`RuntimeContainerMetadata` of podman, libpod/storage.go).
#[derive(Debug, Default, Deserialize)]
struct Metadata {
    #[serde(default, rename = "image-name")]
    image: String,
}

fn read_storage(bundle: &Bundle, folder: &Path) -> HashMap<String, Stored> {
    // Those that are gone after a reboot have a file of their own.
    let files = ["containers.json", "volatile-containers.json"].map(|file| folder.join(file));
    let lists = files.iter().filter_map(|file| bundle.json::<Vec<Stored>>(file));
    lists.flatten().map(|stored| (stored.id.clone(), stored)).collect()
}

impl Stored {
    pub(super) fn known(&self) -> Known {
        let metadata: Metadata = serde_json::from_str(&self.metadata).unwrap_or_default();
        let name = self.names.as_ref().and_then(|names| names.first().cloned());
        Known { name, image: Some(metadata.image).filter(|image| !image.is_empty()) }
    }
}

/// Part of `Container` of moby, daemon/container.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Docked {
    #[serde(default)]
    name: String,
    config: DockedConfig,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockedConfig {
    #[serde(default)]
    image: String,
}

fn of_docker(id: &str, bundle: &Bundle, config: &Config) -> Known {
    let file = folder_of_docker(config).join(id).join("config.v2.json");
    bundle.json(&file).map(|docked: Docked| docked.known()).unwrap_or_default()
}

/// Where Docker keeps its containers: it mounts files from there into each, be they another container's.
pub(super) fn folder_of_docker(config: &Config) -> PathBuf {
    let is_containers = |folder: &Path| {
        let id = folder.file_name().and_then(|name| name.to_str());
        id.is_some_and(container::is_id) && folder.parent().is_some_and(|parent| parent.ends_with("containers"))
    };
    let mounted = config.mounts.iter().find_map(|mount| mount.source.parent().filter(|folder| is_containers(folder)));
    mounted.and_then(Path::parent).unwrap_or(Path::new("/var/lib/docker/containers")).to_owned()
}

impl Docked {
    pub(super) fn known(self) -> Known {
        let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        Known { name: some(self.name.trim_start_matches('/')), image: some(&self.config.image) }
    }
}

/// By the annotations of the CRI plugin (containerd, internal/cri/annotations), of nerdctl (pkg/labels), or just by its id.
pub(super) fn of_containerd(id: &str, config: &Config) -> Option<Known> {
    let cri = |key: &str| config.annotation(&format!("io.kubernetes.cri.{key}"));
    if cri("container-type") == Some("sandbox") {
        return None;
    }
    let of_pod = name_in_pod(cri("sandbox-namespace"), cri("sandbox-name"), cri("container-name"));
    let name = of_pod.or_else(|| config.annotation("nerdctl/name").map(str::to_owned));
    Some(Known { name: Some(name.unwrap_or_else(|| id.to_owned())), image: cri("image-name").map(str::to_owned) })
}

/// By the annotations of CRI-O (pkg/annotations, internal/factory/container) and of the kubelet.
pub(super) fn of_crio(config: &Config) -> Option<Known> {
    let get = |key: &str| config.annotation(&format!("io.kubernetes.{key}"));
    if get("cri-o.ContainerType") == Some("sandbox") {
        return None;
    }
    let name = name_in_pod(get("pod.namespace"), get("pod.name"), get("container.name"));
    let image = get("cri-o.ImageName").or_else(|| get("cri-o.Image"));
    Some(Known { name: name.or_else(|| get("cri-o.Name").map(str::to_owned)), image: image.map(str::to_owned) })
}

/// `NAMESPACE/POD/CONTAINER`
fn name_in_pod(namespace: Option<&str>, pod: Option<&str>, container: Option<&str>) -> Option<String> {
    Some(format!("{}/{}/{}", namespace?, pod?, container?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ID: &str = "4f7c2a9b01de53c86ae09b7d41f2c6580d3e9a17b4c85f6203ed91ab7c4f2e68";

    fn config(json: serde_json::Value) -> Config {
        serde_json::from_value(json).unwrap()
    }

    fn known(name: &str, image: Option<&str>) -> Known {
        Known { name: Some(name.to_owned()), image: image.map(str::to_owned) }
    }

    #[test]
    fn storage_tells_the_name_and_the_image() {
        let stored = |json| serde_json::from_value::<Stored>(json).unwrap().known();
        let metadata =
            json!({ "image-name": "docker.io/library/nginx:1.27", "image-id": "ab", "name": "old" }).to_string();
        let container = json!({ "id": ID, "names": ["web-1"], "image": "ab", "metadata": metadata });
        assert_eq!(stored(container), known("web-1", Some("docker.io/library/nginx:1.27")));
        // With --rootfs there is none.
        let container = json!({ "id": ID, "names": ["web-1"], "metadata": "{\"image-name\":\"\"}" });
        assert_eq!(stored(container), known("web-1", None));
    }

    #[test]
    fn docker_tells_the_name_and_the_image() {
        let docked: Docked =
            serde_json::from_value(json!({ "ID": ID, "Name": "/web-1", "Config": { "Image": "nginx" } })).unwrap();
        assert_eq!(docked.known(), known("web-1", Some("nginx")));
    }

    #[test]
    fn folder_of_docker_shows_in_what_it_mounts() {
        let mounts = |source: String| config(json!({ "mounts": [{ "source": "proc" }, { "source": source }] }));
        let folder = |source: &str| folder_of_docker(&mounts(source.replace("ID", ID)));
        assert_eq!(folder("/data/containers/ID/hosts"), Path::new("/data/containers"));
        assert_eq!(folder("/home/containers/web/hosts"), Path::new("/var/lib/docker/containers"));
        assert_eq!(folder_of_docker(&config(json!({ "mounts": null }))), Path::new("/var/lib/docker/containers"));
    }

    #[test]
    fn container_of_a_pod_is_called_by_namespace_pod_and_its_own_name() {
        let containerd = config(json!({ "annotations": {
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.container-name": "nginx",
            "io.kubernetes.cri.image-name": "docker.io/library/nginx:1.27",
            "io.kubernetes.cri.sandbox-name": "web-7d4b9",
            "io.kubernetes.cri.sandbox-namespace": "shop",
        }}));
        let crio = config(json!({ "annotations": {
            "io.kubernetes.cri-o.ContainerType": "container",
            "io.kubernetes.container.name": "nginx",
            "io.kubernetes.cri-o.ImageName": "docker.io/library/nginx:1.27",
            "io.kubernetes.pod.name": "web-7d4b9",
            "io.kubernetes.pod.namespace": "shop",
        }}));
        let expected = Some(known("shop/web-7d4b9/nginx", Some("docker.io/library/nginx:1.27")));
        assert_eq!(of_containerd(ID, &containerd), expected);
        assert_eq!(of_crio(&crio), expected);
    }

    #[test]
    fn sandbox_of_a_pod_is_no_container() {
        let sandbox = config(json!({ "annotations": {
            "io.kubernetes.cri.container-type": "sandbox",
            "io.kubernetes.cri-o.ContainerType": "sandbox",
        }}));
        assert_eq!(of_containerd(ID, &sandbox), None);
        assert_eq!(of_crio(&sandbox), None);
    }

    #[test]
    fn container_of_containerd_is_called_by_its_id_unless_it_has_a_name() {
        assert_eq!(of_containerd("web-1", &config(json!({ "annotations": null }))), Some(known("web-1", None)));
        let nerdctl = config(json!({ "annotations": { "nerdctl/name": "web-1" } }));
        assert_eq!(of_containerd(ID, &nerdctl), Some(known("web-1", None)));
    }
}
