//! Finds the names and images of containers in the files of container engines.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{
    bundle::{Bundle, Config},
    watchers::{Started, StartedBy},
};
use crate::container::{self, CONTAINERD, CRI_O, Container, DOCKER, PODMAN};

/// containerd's namespace for the containers of Docker (`ContainersNamespace` of moby, daemon/config).
const DOCKER_NAMESPACE: &str = "moby";

/// A cache of files that describe several containers.
#[derive(Debug, Default)]
pub(super) struct Engines {
    /// Containers by id, for each directory of containers/storage. The key is the device and the inode number of the directory.
    storages: HashMap<(u64, u64), HashMap<String, StorageContainer>>,
}

/// The name and the image of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Labels {
    pub(super) name: Option<String>,
    pub(super) image: Option<String>,
}

impl Engines {
    /// Describes a container. Returns `None` for the sandbox of a pod.
    pub(super) fn describe(&mut self, started: &Started, config: &Config) -> Option<Container> {
        let Started { id, bundle, by, .. } = started;
        let is_crio = config.annotation("io.container.manager") == Some("cri-o");
        let (runtime, labels) = match by {
            _ if is_crio => (CRI_O, of_crio(config)?),
            StartedBy::Conmon { name } => (PODMAN, self.of_podman(id, bundle, name.clone())),
            StartedBy::Shim { namespace } if namespace == DOCKER_NAMESPACE => (DOCKER, of_docker(id, bundle, config)),
            StartedBy::Shim { .. } => (CONTAINERD, of_containerd(id, config)?),
            // A container of podman whose conmon has ended.
            StartedBy::Runtime(_) if config.annotation("io.container.manager") == Some("libpod") => {
                (PODMAN, self.of_podman(id, bundle, None))
            }
            StartedBy::Runtime(runtime) => (*runtime, Labels { name: Some(id.clone()), image: None }),
        };
        let Labels { name, image } = labels;
        Some(Container { runtime, id: id.clone(), pod: None, name, image })
    }

    /// Returns the labels of a container of podman. `initial_name` is the name at the start of the container, which
    /// `podman rename` can change.
    fn of_podman(&mut self, id: &str, bundle: &Bundle, initial_name: Option<String>) -> Labels {
        // The bundle is STORAGE/DRIVER-containers/ID/userdata.
        let stored = bundle.path.ancestors().nth(2).and_then(|directory| {
            let identity = bundle.view.identity(directory)?;
            let storage = self.storages.entry(identity).or_insert_with(|| read_storage(bundle, directory));
            storage.get(id).map(StorageContainer::labels)
        });
        let Labels { name, image } = stored.unwrap_or_default();
        Labels { name: name.or(initial_name), image }
    }
}

/// A container in the files of containers/storage (`Container` in its containers.go).
#[derive(Clone, Debug, Deserialize)]
pub(super) struct StorageContainer {
    id: String,
    #[serde(default)]
    names: Option<Vec<String>>,
    #[serde(default)]
    metadata: String,
}

/// The metadata that podman stores there (`RuntimeContainerMetadata` of podman, libpod/storage.go).
#[derive(Debug, Default, Deserialize)]
struct Metadata {
    #[serde(default, rename = "image-name")]
    image: String,
}

/// Reads the containers in a directory of containers/storage, by id.
fn read_storage(bundle: &Bundle, directory: &Path) -> HashMap<String, StorageContainer> {
    // Containers that do not survive a reboot are in the second file.
    let files = ["containers.json", "volatile-containers.json"].map(|file| directory.join(file));
    let lists = files.iter().filter_map(|file| bundle.json::<Vec<StorageContainer>>(file));
    lists.flatten().map(|stored| (stored.id.clone(), stored)).collect()
}

impl StorageContainer {
    pub(super) fn labels(&self) -> Labels {
        let metadata: Metadata = serde_json::from_str(&self.metadata).unwrap_or_default();
        let name = self.names.as_ref().and_then(|names| names.first().cloned());
        Labels { name, image: Some(metadata.image).filter(|image| !image.is_empty()) }
    }
}

/// The used part of `Container` (moby, daemon/container).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct DockerContainer {
    #[serde(default)]
    name: String,
    config: DockerConfig,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerConfig {
    #[serde(default)]
    image: String,
}

fn of_docker(id: &str, bundle: &Bundle, config: &Config) -> Labels {
    let file = docker_directory(config).join(id).join("config.v2.json");
    bundle.json(&file).map(|container: DockerContainer| container.labels()).unwrap_or_default()
}

/// Returns the directory of Docker's containers, from the sources of the mounts: Docker mounts files from this directory into
/// each container. These files can belong to another container (`--network container:`).
pub(super) fn docker_directory(config: &Config) -> PathBuf {
    let is_in_containers = |directory: &Path| {
        let id = directory.file_name().and_then(|name| name.to_str());
        id.is_some_and(container::is_id) && directory.parent().is_some_and(|parent| parent.ends_with("containers"))
    };
    let mut directories = config.mounts.iter().filter_map(|mount| mount.source.parent());
    let mounted = directories.find(|directory| is_in_containers(directory));
    mounted.and_then(Path::parent).unwrap_or(Path::new("/var/lib/docker/containers")).to_owned()
}

impl DockerContainer {
    pub(super) fn labels(self) -> Labels {
        let non_empty = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        Labels { name: non_empty(self.name.trim_start_matches('/')), image: non_empty(&self.config.image) }
    }
}

/// Returns the labels of a container of containerd, from the annotations of the CRI plugin (containerd,
/// internal/cri/annotations) or of nerdctl (pkg/labels). Without either, the name is the id. Returns `None` for the sandbox of
/// a pod.
pub(super) fn of_containerd(id: &str, config: &Config) -> Option<Labels> {
    let cri = |key: &str| config.annotation(&format!("io.kubernetes.cri.{key}"));
    if cri("container-type") == Some("sandbox") {
        return None;
    }
    let pod_name = name_in_pod(cri("sandbox-namespace"), cri("sandbox-name"), cri("container-name"));
    let name = pod_name.or_else(|| config.annotation("nerdctl/name").map(str::to_owned));
    Some(Labels { name: Some(name.unwrap_or_else(|| id.to_owned())), image: cri("image-name").map(str::to_owned) })
}

/// Returns the labels of a container of CRI-O, from the annotations of CRI-O (pkg/annotations, internal/factory/container) and
/// of the kubelet. Returns `None` for the sandbox of a pod.
pub(super) fn of_crio(config: &Config) -> Option<Labels> {
    let get = |key: &str| config.annotation(&format!("io.kubernetes.{key}"));
    if get("cri-o.ContainerType") == Some("sandbox") {
        return None;
    }
    let name = name_in_pod(get("pod.namespace"), get("pod.name"), get("container.name"));
    let image = get("cri-o.ImageName").or_else(|| get("cri-o.Image"));
    Some(Labels { name: name.or_else(|| get("cri-o.Name").map(str::to_owned)), image: image.map(str::to_owned) })
}

/// Returns `NAMESPACE/POD/CONTAINER` if all three are known.
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

    fn labels(name: &str, image: Option<&str>) -> Labels {
        Labels { name: Some(name.to_owned()), image: image.map(str::to_owned) }
    }

    #[test]
    fn name_and_image_are_read_from_storage() {
        let stored = |json| serde_json::from_value::<StorageContainer>(json).unwrap().labels();
        let metadata =
            json!({ "image-name": "docker.io/library/nginx:1.27", "image-id": "ab", "name": "old" }).to_string();
        let container = json!({ "id": ID, "names": ["web-1"], "image": "ab", "metadata": metadata });
        assert_eq!(stored(container), labels("web-1", Some("docker.io/library/nginx:1.27")));
        // A container that was started with --rootfs has no image.
        let container = json!({ "id": ID, "names": ["web-1"], "metadata": "{\"image-name\":\"\"}" });
        assert_eq!(stored(container), labels("web-1", None));
    }

    #[test]
    fn name_and_image_are_read_from_docker() {
        let container: DockerContainer =
            serde_json::from_value(json!({ "ID": ID, "Name": "/web-1", "Config": { "Image": "nginx" } })).unwrap();
        assert_eq!(container.labels(), labels("web-1", Some("nginx")));
    }

    #[test]
    fn docker_directory_is_found_from_the_mounts() {
        let mounts = |source: String| config(json!({ "mounts": [{ "source": "proc" }, { "source": source }] }));
        let directory = |source: &str| docker_directory(&mounts(source.replace("ID", ID)));
        assert_eq!(directory("/data/containers/ID/hosts"), Path::new("/data/containers"));
        assert_eq!(directory("/home/containers/web/hosts"), Path::new("/var/lib/docker/containers"));
        assert_eq!(docker_directory(&config(json!({ "mounts": null }))), Path::new("/var/lib/docker/containers"));
    }

    #[test]
    fn container_of_a_pod_is_named_by_namespace_pod_and_container() {
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
        let expected = Some(labels("shop/web-7d4b9/nginx", Some("docker.io/library/nginx:1.27")));
        assert_eq!(of_containerd(ID, &containerd), expected);
        assert_eq!(of_crio(&crio), expected);
    }

    #[test]
    fn sandbox_of_a_pod_is_ignored() {
        let sandbox = config(json!({ "annotations": {
            "io.kubernetes.cri.container-type": "sandbox",
            "io.kubernetes.cri-o.ContainerType": "sandbox",
        }}));
        assert_eq!(of_containerd(ID, &sandbox), None);
        assert_eq!(of_crio(&sandbox), None);
    }

    #[test]
    fn container_of_containerd_without_a_name_is_named_by_its_id() {
        assert_eq!(of_containerd("web-1", &config(json!({ "annotations": null }))), Some(labels("web-1", None)));
        let nerdctl = config(json!({ "annotations": { "nerdctl/name": "web-1" } }));
        assert_eq!(of_containerd(ID, &nerdctl), Some(labels("web-1", None)));
    }
}
