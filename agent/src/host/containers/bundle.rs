//! Reads an OCI bundle, a directory with a `config.json` that describes a container (opencontainers/runtime-spec).

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    rc::Rc,
};

use serde::{Deserialize, Deserializer, de::DeserializeOwned};

use super::view::View;
use crate::escape::Escape;

#[derive(Clone, Debug)]
pub(super) struct Bundle {
    pub(super) view: Rc<View>,
    pub(super) path: PathBuf,
}

/// The parts of a `config.json` that identify the container and its engine.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Config {
    #[serde(default, deserialize_with = "or_empty")]
    annotations: HashMap<String, String>,
    #[serde(default, deserialize_with = "or_empty")]
    pub(super) mounts: Vec<Mount>,
    #[serde(default, deserialize_with = "or_empty")]
    linux: Linux,
}

#[derive(Debug, Default, Deserialize)]
struct Linux {
    #[serde(default, rename = "cgroupsPath", deserialize_with = "or_empty")]
    cgroup: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Mount {
    #[serde(default)]
    pub(super) source: PathBuf,
}

impl Config {
    pub(super) fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Returns the last components of the path of the cgroup that the engine requested for the container. `cgroupsPath` is a
    /// path, or `SLICE:PREFIX:NAME` for systemd. Returns `None` if the runtime chose the cgroup.
    pub(super) fn cgroup(&self) -> Option<PathBuf> {
        let path = &self.linux.cgroup;
        let path = match path.split(':').collect::<Vec<_>>()[..] {
            [_, "", name] => format!("{name}.scope"),
            [_, prefix, name] => format!("{prefix}-{name}.scope"),
            _ => path.trim_start_matches('/').to_owned(),
        };
        Some(PathBuf::from(path)).filter(|path| !path.as_os_str().is_empty())
    }
}

impl Bundle {
    /// Reads the `config.json`. Returns an empty configuration if it cannot be read.
    pub(super) fn config(&self) -> Config {
        self.json(&self.path.join("config.json")).unwrap_or_default()
    }

    /// Reads a JSON file in the same view as the bundle. Returns `None` if it cannot be read or parsed.
    pub(super) fn json<T: DeserializeOwned>(&self, path: &Path) -> Option<T> {
        let content = self.view.read(path).and_then(|bytes| Ok(serde_json::from_slice(&bytes)?));
        content.inspect_err(|error| log::debug!("cannot read {}: {error}", path.escaped())).ok()
    }
}

/// Deserializes null as the default value: Go writes null for empty maps and lists.
fn or_empty<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(value: D) -> Result<T, D::Error> {
    Option::deserialize(value).map(Option::unwrap_or_default)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_is_the_one_that_the_engine_requested() {
        let cgroup = |path: &str| {
            let config: Config = serde_json::from_str(&format!(r#"{{"linux":{{"cgroupsPath":{path}}}}}"#)).unwrap();
            config.cgroup().map(|path| path.to_string_lossy().into_owned())
        };
        for (path, expected) in [
            (r#""/docker/web""#, Some("docker/web")),
            (r#""kubepods/podx/web""#, Some("kubepods/podx/web")),
            (r#""machine.slice:libpod:web""#, Some("libpod-web.scope")),
            (r#""user.slice::web""#, Some("web.scope")),
            (r#""""#, None),
            (r#""/""#, None),
            ("null", None),
        ] {
            assert_eq!(cgroup(path).as_deref(), expected, "{path}");
        }
        assert_eq!(Config::default().cgroup(), None);
    }
}
