//! Reads from the maps of an instance what is in force, in a process that is not its agent.

use std::{collections::BTreeSet, io, path::PathBuf};

use abi::{Config, Counters, Losses};
use aya::{
    Ebpf, Pod,
    maps::{Array, Map, MapData, MapError},
    programs::loaded_programs,
};
use serde::{Deserialize, Serialize};

use super::{KernelError, foreign_programs::attached_to, maps::map_error, tables::PreviousTables};
use crate::{compile::Hook, host::cgroup::Mount};

/// The kernel's ids of the maps that contain the configuration and the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapIds {
    config: u32,
    counters: u32,
    losses: u32,
}

/// What is in force, and its counters.
#[derive(Debug)]
pub struct Observed {
    /// Number of the generation in force; `None` if no policies are in force.
    pub generation: Option<u32>,
    pub losses: Losses,
    counters: Map,
}

impl MapIds {
    pub(super) fn new(ebpf: &Ebpf) -> Result<Self, KernelError> {
        let id = |name: &'static str| {
            let map = match ebpf.map(name) {
                Some(Map::Array(map) | Map::ArrayOfMaps(map)) => map,
                _ => return Err(KernelError::Incomplete { what: name }),
            };
            Ok(map.info().map_err(map_error(name))?.id())
        };
        Ok(Self { config: id("sp_config")?, counters: id("sp_counters")?, losses: id("sp_losses")? })
    }

    /// Reads the current contents of the maps.
    ///
    /// # Errors
    ///
    /// Fails if a map does not exist any more or must not be read.
    pub fn observe(self) -> Result<Observed, KernelError> {
        let Config { in_force, generation, .. } = first(self.config, "sp_config")?;
        Ok(Observed {
            generation: (in_force != 0).then_some(generation),
            losses: first(self.losses, "sp_losses")?,
            counters: open(self.counters, "sp_counters")?,
        })
    }

    /// Returns the hooks of each of these cgroups that a program of the instance is attached to. The cgroups are paths relative to
    /// the mount; one that does not exist has no hooks. The kernel does not list attachments to the LSM hook
    /// (`cgroup_bpf_prog_query`, kernel/bpf/cgroup.c: the query needs the id of a BTF type).
    ///
    /// # Errors
    ///
    /// Fails if this process may not query the programs.
    pub fn attached_hooks(self, mount: &Mount, cgroups: &[PathBuf]) -> io::Result<Vec<BTreeSet<Hook>>> {
        let uses_config =
            |maps: Option<Option<Vec<u32>>>| maps.flatten().is_some_and(|maps| maps.contains(&self.config));
        let programs = loaded_programs().filter_map(Result::ok);
        let own: BTreeSet<u32> =
            programs.filter(|program| uses_config(program.map_ids().ok())).map(|program| program.id()).collect();
        let hooks = |cgroup: &PathBuf| {
            let attached = attached_to(mount, cgroup)?.into_iter();
            Ok(attached.filter(|program| own.contains(&program.id)).map(|program| program.hook).collect())
        };
        cgroups.iter().map(hooks).collect()
    }
}

impl Observed {
    /// Returns the counters of each setting of a generation.
    ///
    /// # Errors
    ///
    /// Fails if the tables of the generation do not exist any more.
    pub fn counters(&self, generation: u32) -> Result<Vec<Counters>, KernelError> {
        PreviousTables::open_in(&self.counters, generation)?.counters()
    }
}

fn open(map: u32, name: &'static str) -> Result<Map, KernelError> {
    let opened = MapData::from_id(map).and_then(Map::from_map_data);
    opened
        .map_err(|error| if is_refused(&error) { KernelError::MapRights { map: name } } else { map_error(name)(error) })
}

/// Returns whether the error is a missing capability: to open a map by its id takes CAP_SYS_ADMIN (bpf_map_get_fd_by_id,
/// kernel/bpf/syscall.c).
fn is_refused(error: &MapError) -> bool {
    matches!(error, MapError::SyscallError(call) if call.io_error.kind() == io::ErrorKind::PermissionDenied)
}

fn first<T: Pod>(map: u32, name: &'static str) -> Result<T, KernelError> {
    let map = Array::<_, T>::try_from(open(map, name)?).map_err(map_error(name))?;
    map.get(&0, 0).map_err(map_error(name))
}
