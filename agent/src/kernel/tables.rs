//! The tables of one generation of policies: the inner maps that say what holds, made and filled here, and put where the
//! programs find them.
//!
//! They are written before they are in force, and then no more, but for places: a cgroup may come or go. The kernel keeps them
//! for as long as they are at their slot, or this value is there.

use std::thread;

use abi::{
    Counters, Place, SiteList, index,
    select::{PrefixData, Selectors},
    setting::{Governed, Numbers, OptionKey, Setting},
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
pub(super) struct Placed {
    pub(super) target: abi::Target,
    /// Of its cgroup.
    pub(super) cgroup: u64,
    pub(super) level: u32,
    pub(super) scope: usize,
}

pub(super) struct Tables {
    pub(super) generation: u32,
    /// What `option_index` has, as far as they can say it.
    pub(super) numbers: Numbers,
    /// Options that each scope has.
    options_per_scope: u32,
    /// Entries of `places`.
    room: u32,
    places: Array<MapData, Place>,
    followed: HashMap<MapData, u64, u32>,
    selectors: Array<MapData, Selectors>,
    prefixes: LpmTrie<MapData, PrefixData, u64>,
    options: Array<MapData, Governed>,
    option_index: HashMap<MapData, OptionKey, u32>,
    /// Of settings.
    contents: Array<MapData, Setting>,
    sites: Array<MapData, SiteList>,
    counters: Array<MapData, Counters>,
}

impl Tables {
    /// Makes and fills them. Nobody sees them yet.
    pub(super) fn make(generation: u32, desired: &Desired, placed: &[Placed]) -> Result<Self, KernelError> {
        let highest = placed.iter().map(|placed| placed.target.place as usize + 1).max().unwrap_or(0);
        let room = (2 * highest).max(ROOM) as u32;
        let scopes = || desired.scopes.iter();
        let with_slot =
            |option: &Governed| Governed { first_setting: index::of(generation, option.first_setting), ..*option };
        let cpus = cpus()?;
        let mut tables = Self {
            generation,
            numbers: Numbers::default(),
            options_per_scope: desired.options.len() as u32,
            room,
            places: Array::create(room, flags::ARRAY).map_err(map_error("PLACES"))?,
            followed: HashMap::create(room, flags::HASH).map_err(map_error("FOLLOWED"))?,
            selectors: array("SELECTORS", scopes().map(|scope| scope.selectors))?,
            prefixes: LpmTrie::create(desired.prefixes.len().max(1) as u32, flags::TRIE)
                .map_err(map_error("PREFIXES"))?,
            options: array("OPTIONS", scopes().flat_map(|scope| &scope.options).map(with_slot))?,
            option_index: HashMap::create(desired.options.len().max(1) as u32, flags::HASH)
                .map_err(map_error("OPTION_INDEX"))?,
            contents: array("SETTINGS", desired.settings.iter().copied())?,
            sites: array("SITES", scopes().flat_map(|scope| scope.sites))?,
            counters: Array::create((desired.settings.len() * cpus).max(1) as u32, flags::ARRAY)
                .map_err(map_error("COUNTERS"))?,
        };
        for (option, number) in desired.options.iter().zip(0..) {
            tables.numbers.add(*option, number);
            tables.option_index.insert(option, number, 0).map_err(map_error("OPTION_INDEX"))?;
        }
        for prefix in &desired.prefixes {
            let key = Key::new(prefix.bits, prefix.data);
            tables.prefixes.insert(&key, prefix.rules, 0).map_err(map_error("PREFIXES"))?;
        }
        for placed in placed {
            tables.place(placed)?;
        }
        Ok(tables)
    }

    /// Whether there is room for one more target, at this place.
    pub(super) fn has_room(&self, place: u32) -> bool {
        place < self.room
    }

    /// Has a scope hold on a target.
    pub(super) fn place(&mut self, placed: &Placed) -> Result<(), KernelError> {
        let Placed { target, cgroup, level, scope } = *placed;
        let options = scope as u32 * self.options_per_scope;
        let place = Place { id: target.id, level, scope: scope as u32, options };
        self.places.set(target.place, place, 0).map_err(map_error("PLACES"))?;
        self.followed.insert(cgroup, target.place, 0).map_err(map_error("FOLLOWED"))
    }

    /// Has nothing hold on a target any more.
    pub(super) fn clear(&mut self, target: abi::Target, cgroup: u64) -> Result<(), KernelError> {
        match self.followed.remove(&cgroup) {
            // It may be of tables before these.
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => {}
            removed => removed.map_err(map_error("FOLLOWED"))?,
        }
        match self.places.get(&target.place, 0) {
            Ok(place) if place.id == target.id => {
                self.places.set(target.place, Place::default(), 0).map_err(map_error("PLACES"))
            }
            _ => Ok(()),
        }
    }

    /// Puts them at their slot. The kernel waits until no program uses what was there; for all at once.
    pub(super) fn install(&self, ebpf: &mut Ebpf) -> Result<(), KernelError> {
        let slot = index::slot_of(self.generation);
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for (name, map) in ebpf.maps_mut() {
                let install: Box<dyn FnOnce() -> Result<(), KernelError> + Send> = match name {
                    "PLACES" => Box::new(|| set("PLACES", map, slot, &self.places)),
                    "FOLLOWED" => Box::new(|| set("FOLLOWED", map, slot, &self.followed)),
                    "SELECTORS" => Box::new(|| set("SELECTORS", map, slot, &self.selectors)),
                    "PREFIXES" => Box::new(|| set("PREFIXES", map, slot, &self.prefixes)),
                    "OPTIONS" => Box::new(|| set("OPTIONS", map, slot, &self.options)),
                    "OPTION_INDEX" => Box::new(|| set("OPTION_INDEX", map, slot, &self.option_index)),
                    "SETTINGS" => Box::new(|| set("SETTINGS", map, slot, &self.contents)),
                    "SITES" => Box::new(|| set("SITES", map, slot, &self.sites)),
                    "COUNTERS" => Box::new(|| set("COUNTERS", map, slot, &self.counters)),
                    _ => continue,
                };
                threads.push(scope.spawn(install));
            }
            let results = threads.into_iter().map(|thread| {
                thread.join().unwrap_or(Err(KernelError::Incomplete { what: "map for one of the tables" }))
            });
            results.collect()
        })
    }

    pub(super) fn counters(&self) -> Result<Vec<Counters>, KernelError> {
        sums(&self.counters)
    }

    /// What is left to look at when others are in force.
    pub(super) fn into_former(self) -> Former {
        Former { generation: self.generation, counters: self.counters }
    }
}

/// Tables by which only sockets go on that are still being set up.
pub(super) struct Former {
    pub(super) generation: u32,
    counters: Array<MapData, Counters>,
}

impl Former {
    /// Those of a generation that another agent put in force.
    pub(super) fn of_another(ebpf: &Ebpf, generation: u32) -> Result<Self, KernelError> {
        let outer = ebpf.map("COUNTERS").ok_or(KernelError::Incomplete { what: "COUNTERS" })?;
        Self::within(outer, generation)
    }

    /// The same, in the map of all counters.
    pub(super) fn within(outer: &Map, generation: u32) -> Result<Self, KernelError> {
        let outer = ArrayOfMaps::<_, Array<MapData, Counters>>::try_from(outer).map_err(map_error("COUNTERS"))?;
        let counters = outer.get(&index::slot_of(generation), 0).map_err(map_error("COUNTERS"))?;
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
        let mut slots = slots.map(|slot| counters.get(&slot, 0).map_err(map_error("COUNTERS")));
        slots.try_fold(Counters::default(), |sum, slot| Ok(sum.plus(&slot?)))
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

fn set<T: InnerMap>(name: &'static str, outer: &mut Map, slot: u32, table: &T) -> Result<(), KernelError> {
    let mut outer = ArrayOfMaps::<_, T>::try_from(outer).map_err(map_error(name))?;
    outer.set(slot, table, 0).map_err(map_error(name))
}
