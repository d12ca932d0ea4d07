//! The tables of one generation of policies: the inner maps that say what holds, made and filled here, and put where the
//! programs find them.
//!
//! They are written before they are in force, and then no more, but for places: a cgroup may come or go. The kernel keeps them
//! for as long as they are at their slot, or this value is there.
//!
//! Putting them there waits for a grace period. It takes no programs: tables can be put there while these are still checked.

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

/// Flags of inner maps, as the programs declare them.
mod flags {
    /// Arrays of other lengths may take the place of one (BPF_F_INNER_MAP, 5.10).
    pub(super) const ARRAY: u32 = 1 << 12;
    pub(super) const HASH: u32 = 0;
    /// The kernel wants it so (BPF_F_NO_PREALLOC).
    pub(super) const TRIE: u32 = 1;
}

/// There is room for as many targets more as there are, and for some at any rate.
const ROOM: usize = 64;

/// A target as the tables have it.
#[derive(Clone, Copy, Debug)]
pub(super) struct SlotAssignment {
    pub(super) target: abi::Target,
    /// Of its cgroup.
    pub(super) cgroup: u64,
    pub(super) level: u32,
    pub(super) scope: usize,
}

pub(super) struct Tables {
    pub(super) generation: u32,
    /// What `option_index` has, as far as they can say it.
    pub(super) numbers: OptionFilter,
    /// Options that each scope has.
    options_per_scope: u32,
    /// Entries of `places`.
    room: u32,
    places: Array<MapData, TargetSlot>,
    followed: HashMap<MapData, u64, u32>,
    selectors: Array<MapData, Selectors>,
    prefixes: LpmTrie<MapData, PrefixData, u64>,
    options: Array<MapData, OptionRow>,
    option_index: HashMap<MapData, OptionKey, u32>,
    /// Of settings.
    contents: Array<MapData, Setting>,
    sites: Array<MapData, ApplyList>,
    counters: Array<MapData, Counters>,
}

impl Tables {
    /// Makes and fills them, for targets at so many places. Nobody sees them yet, and no target has its place.
    pub(super) fn make(generation: u32, desired: &Desired, places: usize) -> Result<Self, KernelError> {
        let room = (2 * places).max(ROOM) as u32;
        let scopes = || desired.scopes.iter();
        let with_slot =
            |option: &OptionRow| OptionRow { first_setting: index::of(generation, option.first_setting), ..*option };
        let cpus = cpus()?;
        let mut tables = Self {
            generation,
            numbers: OptionFilter::default(),
            options_per_scope: desired.options.len() as u32,
            room,
            places: Array::create(room, flags::ARRAY).map_err(map_error("sp_target_slots"))?,
            followed: HashMap::create(room, flags::HASH).map_err(map_error("sp_cgroup_slots"))?,
            selectors: array("sp_selectors", scopes().map(|scope| scope.selectors))?,
            prefixes: LpmTrie::create(desired.prefixes.len().max(1) as u32, flags::TRIE)
                .map_err(map_error("sp_prefixes"))?,
            options: array("sp_options", scopes().flat_map(|scope| &scope.options).map(with_slot))?,
            option_index: HashMap::create(desired.options.len().max(1) as u32, flags::HASH)
                .map_err(map_error("sp_option_index"))?,
            contents: array("sp_settings", desired.settings.iter().copied())?,
            sites: array("sp_apply_lists", scopes().flat_map(|scope| scope.sites))?,
            counters: Array::create((desired.settings.len() * cpus).max(1) as u32, flags::ARRAY)
                .map_err(map_error("sp_counters"))?,
        };
        for (option, number) in desired.numbered() {
            tables.numbers.add(option, number);
            tables.option_index.insert(option, number, 0).map_err(map_error("sp_option_index"))?;
        }
        for prefix in &desired.prefixes {
            let key = Key::new(prefix.bits, prefix.data);
            tables.prefixes.insert(&key, prefix.rules, 0).map_err(map_error("sp_prefixes"))?;
        }
        Ok(tables)
    }

    /// Whether there is room for one more target, at this place.
    pub(super) fn has_room(&self, place: u32) -> bool {
        place < self.room
    }

    /// Has a scope hold on a target.
    pub(super) fn place(&mut self, placed: &SlotAssignment) -> Result<(), KernelError> {
        let SlotAssignment { target, cgroup, level, scope } = *placed;
        let options = scope as u32 * self.options_per_scope;
        let place = TargetSlot { id: target.id, level, scope: scope as u32, options };
        self.places.set(target.place, place, 0).map_err(map_error("sp_target_slots"))?;
        self.followed.insert(cgroup, target.place, 0).map_err(map_error("sp_cgroup_slots"))
    }

    /// Has nothing hold on a target any more.
    pub(super) fn clear(&mut self, target: abi::Target, cgroup: u64) -> Result<(), KernelError> {
        match self.followed.remove(&cgroup) {
            // It may be of tables before these.
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => {}
            removed => removed.map_err(map_error("sp_cgroup_slots"))?,
        }
        match self.places.get(&target.place, 0) {
            Ok(place) if place.id == target.id => {
                self.places.set(target.place, TargetSlot::default(), 0).map_err(map_error("sp_target_slots"))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn counters(&self) -> Result<Vec<Counters>, KernelError> {
        sums(&self.counters)
    }

    /// What is left to look at when others are in force.
    pub(super) fn into_previous(self) -> PreviousTables {
        PreviousTables { generation: self.generation, counters: self.counters }
    }
}

/// The maps in which programs find the tables of each generation, at its slot.
pub(super) struct GenerationMaps {
    places: OuterMap<Array<MapData, TargetSlot>>,
    followed: OuterMap<HashMap<MapData, u64, u32>>,
    selectors: OuterMap<Array<MapData, Selectors>>,
    prefixes: OuterMap<LpmTrie<MapData, PrefixData, u64>>,
    options: OuterMap<Array<MapData, OptionRow>>,
    option_index: OuterMap<HashMap<MapData, OptionKey, u32>>,
    contents: OuterMap<Array<MapData, Setting>>,
    sites: OuterMap<Array<MapData, ApplyList>>,
    counters: OuterMap<Array<MapData, Counters>>,
}

impl GenerationMaps {
    pub(super) fn of(ebpf: &Ebpf) -> Result<Self, KernelError> {
        Ok(Self {
            places: OuterMap::of(ebpf, "sp_target_slots")?,
            followed: OuterMap::of(ebpf, "sp_cgroup_slots")?,
            selectors: OuterMap::of(ebpf, "sp_selectors")?,
            prefixes: OuterMap::of(ebpf, "sp_prefixes")?,
            options: OuterMap::of(ebpf, "sp_options")?,
            option_index: OuterMap::of(ebpf, "sp_option_index")?,
            contents: OuterMap::of(ebpf, "sp_settings")?,
            sites: OuterMap::of(ebpf, "sp_apply_lists")?,
            counters: OuterMap::of(ebpf, "sp_counters")?,
        })
    }

    /// Puts tables at their slots. For each map the kernel waits until no program uses what was there; for all at once.
    pub(super) fn put(&mut self, tables: &[Tables]) -> Result<(), KernelError> {
        let Self { places, followed, selectors, prefixes, options, option_index, contents, sites, counters } = self;
        thread::scope(|scope| {
            let threads = [
                scope.spawn(|| places.put(tables, |tables| &tables.places)),
                scope.spawn(|| followed.put(tables, |tables| &tables.followed)),
                scope.spawn(|| selectors.put(tables, |tables| &tables.selectors)),
                scope.spawn(|| prefixes.put(tables, |tables| &tables.prefixes)),
                scope.spawn(|| options.put(tables, |tables| &tables.options)),
                scope.spawn(|| option_index.put(tables, |tables| &tables.option_index)),
                scope.spawn(|| contents.put(tables, |tables| &tables.contents)),
                scope.spawn(|| sites.put(tables, |tables| &tables.sites)),
                scope.spawn(|| counters.put(tables, |tables| &tables.counters)),
            ];
            let results = threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
            results.collect()
        })
    }
}

/// A map of tables of one kind.
struct OuterMap<T> {
    name: &'static str,
    map: ArrayOfMaps<MapData, T>,
}

impl<T: InnerMap> OuterMap<T> {
    /// A handle of its own on it, apart from the object's, whose programs may be busy.
    fn of(ebpf: &Ebpf, name: &'static str) -> Result<Self, KernelError> {
        let Some(Map::ArrayOfMaps(map)) = ebpf.map(name) else { return Err(KernelError::Incomplete { what: name }) };
        let copy = map.fd().as_fd().try_clone_to_owned();
        let copy = copy.map_err(|source| KernelError::View { map: name, source })?;
        let map = MapData::from_fd(copy).and_then(|map| Map::ArrayOfMaps(map).try_into());
        Ok(Self { name, map: map.map_err(map_error(name))? })
    }

    fn put(&mut self, tables: &[Tables], inner: impl Fn(&Tables) -> &T) -> Result<(), KernelError> {
        let put = |tables: &Tables| self.map.set(index::slot_of(tables.generation), inner(tables), 0);
        tables.iter().try_for_each(put).map_err(map_error(self.name))
    }
}

/// Tables by which only sockets go on that are still being set up.
pub(super) struct PreviousTables {
    pub(super) generation: u32,
    counters: Array<MapData, Counters>,
}

impl PreviousTables {
    /// Those of a generation that another agent put in force.
    pub(super) fn taken_over(ebpf: &Ebpf, generation: u32) -> Result<Self, KernelError> {
        let outer = ebpf.map("sp_counters").ok_or(KernelError::Incomplete { what: "sp_counters" })?;
        Self::within(outer, generation)
    }

    /// The same, in the map of all counters.
    pub(super) fn within(outer: &Map, generation: u32) -> Result<Self, KernelError> {
        let outer = ArrayOfMaps::<_, Array<MapData, Counters>>::try_from(outer).map_err(map_error("sp_counters"))?;
        let counters = outer.get(&index::slot_of(generation), 0).map_err(map_error("sp_counters"))?;
        Ok(Self { generation, counters })
    }

    pub(super) fn counters(&self) -> Result<Vec<Counters>, KernelError> {
        sums(&self.counters)
    }
}

/// The counters of each setting, summed over CPUs.
fn sums(counters: &Array<MapData, Counters>) -> Result<Vec<Counters>, KernelError> {
    let cpus = cpus()? as u32;
    let of_setting = |setting: u32| {
        let slots = setting * cpus..(setting + 1) * cpus;
        let mut slots = slots.map(|slot| counters.get(&slot, 0).map_err(map_error("sp_counters")));
        slots.try_fold(Counters::default(), |sum, slot| Ok(sum.plus(&slot?))).map(Counters::without_undone)
    };
    (0..counters.len() / cpus).map(of_setting).collect()
}

/// As many counters as each setting has: one for each CPU that there can be.
pub(super) fn cpus() -> Result<usize, KernelError> {
    nr_cpus().map_err(|(path, source)| KernelError::Cpus { path, source })
}

/// An array of these values. None can be empty.
fn array<T: Pod>(name: &'static str, values: impl Iterator<Item = T>) -> Result<Array<MapData, T>, KernelError> {
    let values: Vec<T> = values.collect();
    let mut array = Array::create(values.len().max(1) as u32, flags::ARRAY).map_err(map_error(name))?;
    for (value, index) in values.iter().zip(0..) {
        array.set(index, value, 0).map_err(map_error(name))?;
    }
    Ok(array)
}
