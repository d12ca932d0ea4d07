//! The tables of one generation of policies. They are inner maps, which are made and filled here and then installed in the
//! outer maps.
//!
//! The tables are written before they are in force. Afterwards only the slots of targets change, as cgroups come and go. The
//! kernel keeps the tables while they are installed or this value exists.
//!
//! The installation waits for an RCU grace period. It needs no programs, so it can run while the programs are verified.

use std::{os::fd::AsFd as _, panic::resume_unwind, thread};

use abi::{
    ApplyList, Counters, TargetSlot, index,
    select::{PrefixData, Selectors},
    setting::{OptionFilter, OptionKey, OptionRow, Setting},
};
use aya::{
    Ebpf, Pod,
    maps::{Array, ArrayOfMaps, HashMap, InnerMap, LpmTrie, Map, MapData, MapError, lpm_trie::Key},
    util::nr_cpus,
};

use super::{KernelError, maps::map_error};
use crate::compile::Desired;

/// Flags of inner maps. They must be those that the programs declare.
mod flags {
    /// Allows arrays of different lengths in one outer map (BPF_F_INNER_MAP, 5.10).
    pub(super) const ARRAY: u32 = 1 << 12;
    pub(super) const HASH: u32 = 0;
    /// The kernel requires it for tries (BPF_F_NO_PREALLOC).
    pub(super) const TRIE: u32 = 1;
}

/// Minimum capacity in targets. The tables have room for twice as many targets as there are, but at least for this number.
const MIN_CAPACITY: usize = 64;

/// The slot of a target.
#[derive(Clone, Copy, Debug)]
pub(super) struct SlotAssignment {
    pub(super) target: abi::Target,
    /// The id of the target's cgroup.
    pub(super) cgroup: u64,
    pub(super) level: u32,
    pub(super) scope: usize,
}

pub(super) struct Tables {
    pub(super) generation: u32,
    /// A filter for the keys of `option_index`.
    pub(super) option_filter: OptionFilter,
    /// Number of options of each scope.
    options_per_scope: u32,
    /// Entries of `target_slots`.
    capacity: u32,
    target_slots: Array<MapData, TargetSlot>,
    cgroup_slots: HashMap<MapData, u64, u32>,
    selectors: Array<MapData, Selectors>,
    prefixes: LpmTrie<MapData, PrefixData, u64>,
    options: Array<MapData, OptionRow>,
    option_index: HashMap<MapData, OptionKey, u32>,
    /// Of settings.
    settings: Array<MapData, Setting>,
    apply_lists: Array<MapData, ApplyList>,
    counters: Array<MapData, Counters>,
}

impl Tables {
    /// Makes and fills the tables, with room for targets at `slots` slots. They are not installed yet, and no target has a
    /// slot.
    pub(super) fn make(generation: u32, desired: &Desired, slots: usize) -> Result<Self, KernelError> {
        let capacity = (2 * slots).max(MIN_CAPACITY) as u32;
        let scopes = || desired.scopes.iter();
        let with_slot =
            |option: &OptionRow| OptionRow { first_setting: index::of(generation, option.first_setting), ..*option };
        let cpus = cpus()?;
        let mut tables = Self {
            generation,
            option_filter: OptionFilter::default(),
            options_per_scope: desired.options.len() as u32,
            capacity,
            target_slots: Array::create(capacity, flags::ARRAY).map_err(map_error("sp_target_slots"))?,
            cgroup_slots: HashMap::create(capacity, flags::HASH).map_err(map_error("sp_cgroup_slots"))?,
            selectors: array("sp_selectors", scopes().map(|scope| scope.selectors))?,
            prefixes: LpmTrie::create(desired.prefixes.len().max(1) as u32, flags::TRIE)
                .map_err(map_error("sp_prefixes"))?,
            options: array("sp_options", scopes().flat_map(|scope| &scope.options).map(with_slot))?,
            option_index: HashMap::create(desired.options.len().max(1) as u32, flags::HASH)
                .map_err(map_error("sp_option_index"))?,
            settings: array("sp_settings", desired.settings.iter().copied())?,
            apply_lists: array("sp_apply_lists", scopes().flat_map(|scope| scope.sites))?,
            counters: Array::create((desired.settings.len() * cpus).max(1) as u32, flags::ARRAY)
                .map_err(map_error("sp_counters"))?,
        };
        for (option, number) in desired.numbered() {
            tables.option_filter.add(option, number);
            tables.option_index.insert(option, number, 0).map_err(map_error("sp_option_index"))?;
        }
        for prefix in &desired.prefixes {
            let key = Key::new(prefix.bits, prefix.data);
            tables.prefixes.insert(&key, prefix.rules, 0).map_err(map_error("sp_prefixes"))?;
        }
        Ok(tables)
    }

    /// Returns whether the tables have this slot.
    pub(super) fn has_slot(&self, slot: u32) -> bool {
        slot < self.capacity
    }

    /// Writes the slot of a target, which puts its scope in force there.
    pub(super) fn assign(&mut self, assignment: &SlotAssignment) -> Result<(), KernelError> {
        let SlotAssignment { target, cgroup, level, scope } = *assignment;
        let options = scope as u32 * self.options_per_scope;
        let slot = TargetSlot { id: target.id, level, scope: scope as u32, options };
        self.target_slots.set(target.place, slot, 0).map_err(map_error("sp_target_slots"))?;
        self.cgroup_slots.insert(cgroup, target.place, 0).map_err(map_error("sp_cgroup_slots"))
    }

    /// Clears the slot of a target.
    pub(super) fn clear(&mut self, target: abi::Target, cgroup: u64) -> Result<(), KernelError> {
        match self.cgroup_slots.remove(&cgroup) {
            // The cgroup may belong to an earlier generation.
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => {}
            removed => removed.map_err(map_error("sp_cgroup_slots"))?,
        }
        match self.target_slots.get(&target.place, 0) {
            Ok(slot) if slot.id == target.id => {
                self.target_slots.set(target.place, TargetSlot::default(), 0).map_err(map_error("sp_target_slots"))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn counters(&self) -> Result<Vec<Counters>, KernelError> {
        sums(&self.counters)
    }

    /// Returns what is kept of the tables when others are in force.
    pub(super) fn into_previous(self) -> PreviousTables {
        PreviousTables { generation: self.generation, counters: self.counters }
    }
}

/// The outer maps, in which programs find the tables of each generation at its slot.
pub(super) struct GenerationMaps {
    target_slots: OuterMap<Array<MapData, TargetSlot>>,
    cgroup_slots: OuterMap<HashMap<MapData, u64, u32>>,
    selectors: OuterMap<Array<MapData, Selectors>>,
    prefixes: OuterMap<LpmTrie<MapData, PrefixData, u64>>,
    options: OuterMap<Array<MapData, OptionRow>>,
    option_index: OuterMap<HashMap<MapData, OptionKey, u32>>,
    settings: OuterMap<Array<MapData, Setting>>,
    apply_lists: OuterMap<Array<MapData, ApplyList>>,
    counters: OuterMap<Array<MapData, Counters>>,
}

impl GenerationMaps {
    pub(super) fn open(ebpf: &Ebpf) -> Result<Self, KernelError> {
        Ok(Self {
            target_slots: OuterMap::open(ebpf, "sp_target_slots")?,
            cgroup_slots: OuterMap::open(ebpf, "sp_cgroup_slots")?,
            selectors: OuterMap::open(ebpf, "sp_selectors")?,
            prefixes: OuterMap::open(ebpf, "sp_prefixes")?,
            options: OuterMap::open(ebpf, "sp_options")?,
            option_index: OuterMap::open(ebpf, "sp_option_index")?,
            settings: OuterMap::open(ebpf, "sp_settings")?,
            apply_lists: OuterMap::open(ebpf, "sp_apply_lists")?,
            counters: OuterMap::open(ebpf, "sp_counters")?,
        })
    }

    /// Installs tables at the slots of their generations. For each map the kernel waits until no program uses the old entry;
    /// all maps are written in parallel.
    pub(super) fn install(&mut self, tables: &[Tables]) -> Result<(), KernelError> {
        let Self {
            target_slots,
            cgroup_slots,
            selectors,
            prefixes,
            options,
            option_index,
            settings,
            apply_lists,
            counters,
        } = self;
        thread::scope(|scope| {
            let threads = [
                scope.spawn(|| target_slots.install(tables, |tables| &tables.target_slots)),
                scope.spawn(|| cgroup_slots.install(tables, |tables| &tables.cgroup_slots)),
                scope.spawn(|| selectors.install(tables, |tables| &tables.selectors)),
                scope.spawn(|| prefixes.install(tables, |tables| &tables.prefixes)),
                scope.spawn(|| options.install(tables, |tables| &tables.options)),
                scope.spawn(|| option_index.install(tables, |tables| &tables.option_index)),
                scope.spawn(|| settings.install(tables, |tables| &tables.settings)),
                scope.spawn(|| apply_lists.install(tables, |tables| &tables.apply_lists)),
                scope.spawn(|| counters.install(tables, |tables| &tables.counters)),
            ];
            let results = threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
            results.collect()
        })
    }
}

/// The outer map of one kind of tables.
struct OuterMap<T> {
    name: &'static str,
    map: ArrayOfMaps<MapData, T>,
}

impl<T: InnerMap> OuterMap<T> {
    /// Opens a separate handle on an outer map, because the object is borrowed while its programs are loaded.
    fn open(ebpf: &Ebpf, name: &'static str) -> Result<Self, KernelError> {
        let Some(Map::ArrayOfMaps(map)) = ebpf.map(name) else { return Err(KernelError::Incomplete { what: name }) };
        let copy = map.fd().as_fd().try_clone_to_owned();
        let copy = copy.map_err(|source| KernelError::Duplicate { map: name, source })?;
        let map = MapData::from_fd(copy).and_then(|map| Map::ArrayOfMaps(map).try_into());
        Ok(Self { name, map: map.map_err(map_error(name))? })
    }

    fn install(&mut self, tables: &[Tables], inner: impl Fn(&Tables) -> &T) -> Result<(), KernelError> {
        let install = |tables: &Tables| self.map.set(index::slot_of(tables.generation), inner(tables), 0);
        tables.iter().try_for_each(install).map_err(map_error(self.name))
    }
}

/// The counters of a generation that only sockets still use that it set up.
pub(super) struct PreviousTables {
    pub(super) generation: u32,
    counters: Array<MapData, Counters>,
}

impl PreviousTables {
    /// Opens the counters of a generation that another agent enabled.
    pub(super) fn open(ebpf: &Ebpf, generation: u32) -> Result<Self, KernelError> {
        let outer = ebpf.map("sp_counters").ok_or(KernelError::Incomplete { what: "sp_counters" })?;
        Self::open_in(outer, generation)
    }

    /// Opens the counters of a generation in the outer map of counters.
    pub(super) fn open_in(outer: &Map, generation: u32) -> Result<Self, KernelError> {
        let outer = ArrayOfMaps::<_, Array<MapData, Counters>>::try_from(outer).map_err(map_error("sp_counters"))?;
        let counters = outer.get(&index::slot_of(generation), 0).map_err(map_error("sp_counters"))?;
        Ok(Self { generation, counters })
    }

    pub(super) fn counters(&self) -> Result<Vec<Counters>, KernelError> {
        sums(&self.counters)
    }
}

/// Returns the counters of each setting, summed over CPUs.
fn sums(counters: &Array<MapData, Counters>) -> Result<Vec<Counters>, KernelError> {
    let cpus = cpus()? as u32;
    let of_setting = |setting: u32| {
        let slots = setting * cpus..(setting + 1) * cpus;
        let mut slots = slots.map(|slot| counters.get(&slot, 0).map_err(map_error("sp_counters")));
        slots.try_fold(Counters::default(), |sum, slot| Ok(sum.plus(&slot?))).map(Counters::without_undone)
    };
    (0..counters.len() / cpus).map(of_setting).collect()
}

/// Returns the number of possible CPUs, which is the number of counters of each setting.
pub(super) fn cpus() -> Result<usize, KernelError> {
    nr_cpus().map_err(|(path, source)| KernelError::Cpus { path, source })
}

/// Makes an array of these values. It has at least one entry.
fn array<T: Pod>(name: &'static str, values: impl Iterator<Item = T>) -> Result<Array<MapData, T>, KernelError> {
    let values: Vec<T> = values.collect();
    let mut array = Array::create(values.len().max(1) as u32, flags::ARRAY).map_err(map_error(name))?;
    for (value, index) in values.iter().zip(0..) {
        array.set(index, value, 0).map_err(map_error(name))?;
    }
    Ok(array)
}
