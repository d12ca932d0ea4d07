//! What an OCI bundle tells of its container: a folder with a `config.json` (opencontainers/runtime-spec).

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

/// The part of a `config.json` that tells who made it, and for whom.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Config {
    #[serde(default, deserialize_with = "or_empty")]
    annotations: HashMap<String, String>,
    #[serde(default, deserialize_with = "or_empty")]
    pub(super) mounts: Vec<Mount>,
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
}

impl Bundle {
    /// Its `config.json`; an empty one where it cannot be read.
    pub(super) fn config(&self) -> Config {
        self.json(&self.path.join("config.json")).unwrap_or_default()
    }

    /// What a file beside the bundle holds. `None` where it cannot be read.
    pub(super) fn json<T: DeserializeOwned>(&self, path: &Path) -> Option<T> {
        let read = self.view.read(path).and_then(|bytes| Ok(serde_json::from_slice(&bytes)?));
        read.inspect_err(|error| log::debug!("cannot read {}: {error}", path.escaped())).ok()
    }
}

/// Go writes null for what is empty.
fn or_empty<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(value: D) -> Result<T, D::Error> {
    Option::deserialize(value).map(Option::unwrap_or_default)
}
