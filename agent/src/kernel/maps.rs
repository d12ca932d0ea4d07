//! Typed handles on the maps: what is written before the programs run, and what is read while they do.

use abi::{Config, Counters, Losses, select::PrefixData, setting::OptionKey};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, LpmTrie, MapData, MapError, PerCpuArray, lpm_trie::Key},
};

use super::KernelError;
use crate::{compile::Desired, host::cgroup::Cgroup};

pub(super) const EVENTS: &str = "EVENTS";

/// Gives each map that is sized at load the entries that `desired` takes. No map can be empty.
pub(super) fn size(loader: &mut EbpfLoader<'_>, desired: &Desired, targets: &[Cgroup]) {
    for (map, entries) in [
        ("PREFIXES", desired.prefixes.len()),
        ("OPTIONS", desired.options.len()),
        ("OPTION_INDEX", desired.options.len()),
        ("SETTINGS", desired.settings.len()),
        ("COUNTERS", desired.settings.len()),
        ("TARGETS", targets.len()),
    ] {
        loader.map_max_entries(map, entries.max(1) as u32);
    }
}

/// Writes everything that the programs read, but for the configuration.
pub(super) fn fill(ebpf: &mut Ebpf, desired: &Desired, targets: &[Cgroup]) -> Result<(), KernelError> {
    fill_array(ebpf, "SELECTORS", &[desired.selectors])?;
    fill_array(ebpf, "OPTIONS", &desired.options)?;
    fill_array(ebpf, "SETTINGS", &desired.settings)?;
    fill_array(ebpf, "SITES", &desired.sites)?;
    with_map::<HashMap<_, OptionKey, u32>>(ebpf, "OPTION_INDEX", |map| {
        desired.options.iter().zip(0..).try_for_each(|(option, index)| map.insert(option.key, index, 0))
    })?;
    with_map::<HashMap<_, u64, u32>>(ebpf, "TARGETS", |map| {
        targets.iter().try_for_each(|target| map.insert(target.id, 1, 0))
    })?;
    with_map::<LpmTrie<_, PrefixData, u64>>(ebpf, "PREFIXES", |map| {
        desired.prefixes.iter().try_for_each(|prefix| map.insert(&Key::new(prefix.bits, prefix.data), prefix.rules, 0))
    })
}

/// Writes the configuration, which puts the programs in force.
pub(super) fn enable(ebpf: &mut Ebpf, config: Config) -> Result<(), KernelError> {
    fill_array(ebpf, "CONFIG", &[config])
}

/// The counters of each setting, summed over CPUs.
pub(super) fn counters(ebpf: &Ebpf) -> Result<Vec<Counters>, KernelError> {
    let map = per_cpu::<Counters>(ebpf, "COUNTERS")?;
    map.iter()
        .map(|slots| slots.map(|slots| slots.iter().fold(Counters::default(), |sum, slot| add_counters(sum, *slot))))
        .collect::<Result<_, _>>()
        .map_err(|source| KernelError::Map { map: "COUNTERS", source })
}

/// The losses, summed over CPUs.
pub(super) fn losses(ebpf: &Ebpf) -> Result<Losses, KernelError> {
    let map = per_cpu::<Losses>(ebpf, "LOSSES")?;
    let slots = map.get(&0, 0).map_err(|source| KernelError::Map { map: "LOSSES", source })?;
    Ok(slots.iter().fold(Losses::default(), |sum, slot| add_losses(sum, *slot)))
}

fn add_counters(sum: Counters, slot: Counters) -> Counters {
    // Taken apart in full: a new counter has to be thought of here.
    let Counters { set, unchanged, failed, failed_errno, agreed, verdicts, reads, reported, suppressed } = slot;
    let mut all = sum.verdicts;
    for (sum, count) in all.iter_mut().zip(verdicts) {
        *sum += count;
    }
    Counters {
        set: sum.set + set,
        unchanged: sum.unchanged + unchanged,
        failed: sum.failed + failed,
        // Not a count: any CPU's will do.
        failed_errno: sum.failed_errno.max(failed_errno),
        agreed: sum.agreed + agreed,
        verdicts: all,
        reads: sum.reads + reads,
        reported: sum.reported + reported,
        suppressed: sum.suppressed + suppressed,
    }
}

fn add_losses(sum: Losses, slot: Losses) -> Losses {
    let Losses { ring_full, calls_full, unreadable, no_storage, no_room } = slot;
    Losses {
        ring_full: sum.ring_full + ring_full,
        calls_full: sum.calls_full + calls_full,
        unreadable: sum.unreadable + unreadable,
        no_storage: sum.no_storage + no_storage,
        no_room: sum.no_room + no_room,
    }
}

fn fill_array<T: Pod>(ebpf: &mut Ebpf, name: &'static str, values: &[T]) -> Result<(), KernelError> {
    with_map::<Array<_, T>>(ebpf, name, |map| {
        values.iter().zip(0..).try_for_each(|(value, index)| map.set(index, value, 0))
    })
}

fn per_cpu<'a, T: Pod>(ebpf: &'a Ebpf, name: &'static str) -> Result<PerCpuArray<&'a MapData, T>, KernelError> {
    let map = ebpf.map(name).ok_or(KernelError::Incomplete { what: name })?;
    PerCpuArray::try_from(map).map_err(|source| KernelError::Map { map: name, source })
}

/// A map as a typed handle, for as long as `write` runs.
fn with_map<'a, M: TryFrom<&'a mut aya::maps::Map, Error = MapError>>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
    write: impl FnOnce(&mut M) -> Result<(), MapError>,
) -> Result<(), KernelError> {
    let map = ebpf.map_mut(name).ok_or(KernelError::Incomplete { what: name })?;
    let map_error = |source| KernelError::Map { map: name, source };
    let mut map = M::try_from(map).map_err(map_error)?;
    write(&mut map).map_err(map_error)
}
