//! Typed handles on the maps: what is written before the programs run, and what is read while they do.

use std::{collections::BTreeMap, ffi::c_void, num::NonZeroUsize, ptr::NonNull};

use abi::{
    Config, Counters, Losses,
    event::{Call, Executable, Tally, TallyKey},
    layout::Member,
    select::PrefixData,
    setting::OptionKey,
    site,
};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{
        self, Array, CgroupStorageKey, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, PerCpuHashMap,
        lpm_trie::Key,
    },
};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::{KernelError, Subjects, Target, syscall::attach_type};
use crate::{
    compile::{Desired, Hook},
    host::process,
    policy::model::Calls,
};

pub(super) const EVENTS: &str = "EVENTS";

/// Room for events. Conflicts are held back where they come too fast, calls are not: a busy program makes some
/// thousands in the time that the agent may be kept waiting.
const EVENT_BYTES: u32 = 1 << 20;
const CALL_BYTES: u32 = 8 << 20;

/// Gives each map that is sized at load the entries that `desired` takes. No map can be empty.
pub(super) fn size(
    loader: &mut EbpfLoader<'_>,
    desired: &Desired,
    subjects: Subjects<'_>,
    members: &[(OptionKey, Member)],
) {
    for (map, entries) in [
        ("PREFIXES", desired.prefixes.len()),
        ("SELECTORS", desired.scopes.len()),
        ("SITES", desired.scopes.len() * site::COUNT),
        ("OPTIONS", desired.scopes.len() * desired.options.len()),
        ("OPTION_INDEX", desired.options.len()),
        ("SETTINGS", desired.settings.len()),
        ("COUNTERS", desired.settings.len()),
        ("FOLLOWED", subjects.targets.len()),
        ("PROCESSES", subjects.processes.len()),
        ("MEMBERS", members.len()),
    ] {
        loader.map_max_entries(map, entries.max(1) as u32);
    }
    loader.map_max_entries(EVENTS, if desired.audit.calls == Calls::Conflicts { EVENT_BYTES } else { CALL_BYTES });
}

/// Writes everything that the programs read, but for the configuration.
pub(super) fn fill(
    ebpf: &mut Ebpf,
    desired: &Desired,
    subjects: Subjects<'_>,
    members: &[(OptionKey, Member)],
) -> Result<(), KernelError> {
    let scopes = || desired.scopes.iter();
    fill_array(ebpf, "SELECTORS", scopes().map(|scope| &scope.selectors))?;
    fill_array(ebpf, "OPTIONS", scopes().flat_map(|scope| &scope.options))?;
    fill_array(ebpf, "SETTINGS", &desired.settings)?;
    fill_array(ebpf, "SITES", scopes().flat_map(|scope| &scope.sites))?;
    with_map::<HashMap<_, OptionKey, u32>>(ebpf, "OPTION_INDEX", |map| {
        desired.options.iter().zip(0..).try_for_each(|(option, number)| map.insert(option, number, 0))
    })?;
    with_map::<HashMap<_, u64, u32>>(ebpf, "FOLLOWED", |map| {
        subjects.targets.iter().try_for_each(|target| map.insert(target.cgroup.id, target.scope as u32, 0))
    })?;
    with_map::<HashMap<_, u32, u32>>(ebpf, "PROCESSES", |map| {
        subjects.processes.iter().try_for_each(|process| map.insert(process, 1, 0))
    })?;
    with_map::<HashMap<_, OptionKey, Member>>(ebpf, "MEMBERS", |map| {
        members.iter().try_for_each(|(option, member)| map.insert(option, member, 0))
    })?;
    with_map::<LpmTrie<_, PrefixData, u64>>(ebpf, "PREFIXES", |map| {
        desired.prefixes.iter().try_for_each(|prefix| map.insert(&Key::new(prefix.bits, prefix.data), prefix.rules, 0))
    })
}

/// Tells the program that is attached to a target what holds there.
#[expect(deprecated, reason = "nothing else tells a program where it is attached")]
pub(super) fn place(ebpf: &mut Ebpf, hook: Hook, target: &Target) -> Result<(), KernelError> {
    let key = CgroupStorageKey::new(target.cgroup.id, attach_type(hook) as u32);
    let value = abi::Target { scope: target.scope as u32 + 1, level: target.cgroup.level };
    with_map::<maps::CgroupStorage<_, abi::Target>>(ebpf, "TARGETS", |map| map.insert(key, value, 0))
}

/// Writes the configuration, which puts the programs in force.
pub(super) fn enable(ebpf: &mut Ebpf, config: Config) -> Result<(), KernelError> {
    fill_array(ebpf, "CONFIG", &[config])
}

/// The counters of each setting, summed over CPUs.
pub(super) fn counters(ebpf: &Ebpf) -> Result<Vec<Counters>, KernelError> {
    let map = per_cpu::<Counters>(ebpf, "COUNTERS")?;
    map.iter()
        .map(|slots| slots.map(|slots| slots.iter().fold(Counters::default(), Counters::plus)))
        .collect::<Result<_, _>>()
        .map_err(|source| KernelError::Map { map: "COUNTERS", source })
}

/// What was lost, as the programs write it.
pub(super) struct LossesView {
    memory: NonNull<c_void>,
}

// SAFETY: it is memory that is only read.
unsafe impl Send for LossesView {}

impl LossesView {
    const LEN: NonZeroUsize = NonZeroUsize::new(size_of::<Losses>()).unwrap();

    /// Takes the map into this process's memory.
    pub(super) fn of(ebpf: &mut Ebpf) -> Result<Self, KernelError> {
        const MAP: &str = "LOSSES";
        let Some(Map::Array(map)) = ebpf.map(MAP) else { return Err(KernelError::Incomplete { what: MAP }) };
        // SAFETY: a new mapping, of a map that is as long.
        let memory = unsafe { mmap(None, Self::LEN, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, map.fd(), 0) };
        memory.map(|memory| Self { memory }).map_err(|errno| KernelError::View { map: MAP, source: errno.into() })
    }

    /// What has been lost by now.
    pub(super) fn get(&self) -> Losses {
        // SAFETY: mapped until this is dropped, aligned to a page, and valid whatever the bytes. The programs may write to it
        // meanwhile, each number at once.
        unsafe { self.memory.cast::<Losses>().read_volatile() }
    }
}

impl Drop for LossesView {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference into it.
        if let Err(errno) = unsafe { munmap(self.memory, Self::LEN.get()) } {
            log::debug!("cannot unmap the losses: {errno}");
        }
    }
}

/// The calls that the audit saw, by option, summed over CPUs.
pub(super) fn tallies(ebpf: &Ebpf) -> Result<Vec<(TallyKey, Tally)>, KernelError> {
    const MAP: &str = "TALLIES";
    let map_error = |source| KernelError::Map { map: MAP, source };
    let map = ebpf.map(MAP).ok_or(KernelError::Incomplete { what: MAP })?;
    let map = PerCpuHashMap::<_, TallyKey, Tally>::try_from(map).map_err(map_error)?;
    // Other keys that come in meanwhile can have the iteration begin anew.
    let tallies: Result<BTreeMap<_, _>, _> = map
        .iter()
        .map(|entry| entry.map(|(key, slots)| (key, slots.iter().fold(Tally::default(), add_tallies))))
        .collect();
    Ok(tallies.map_err(map_error)?.into_iter().collect())
}

/// How many calls the audit has seen begin and not end.
pub(super) fn calls_under_way(ebpf: &Ebpf) -> Result<u64, KernelError> {
    const MAP: &str = "CALLS";
    let map_error = |source| KernelError::Map { map: MAP, source };
    let map = ebpf.map(MAP).ok_or(KernelError::Incomplete { what: MAP })?;
    let map = HashMap::<_, u64, Call>::try_from(map).map_err(map_error)?;
    Ok(map.keys().filter(Result::is_ok).count() as u64)
}

/// Removes the records of calls whose threads are gone; gives how many.
pub(super) fn drop_dead_calls(ebpf: &mut Ebpf) -> Result<u64, KernelError> {
    // In another namespace threads have other numbers.
    if !process::is_initial_namespace() {
        return Ok(0);
    }
    let mut dropped = 0;
    with_map::<HashMap<_, u64, Call>>(ebpf, "CALLS", |map| {
        let is_dead = |call: &Call| !process::has_thread(call.thread as u32);
        // Others come and go meanwhile.
        let dead: Vec<u64> =
            map.iter().filter_map(Result::ok).filter(|(_, call)| is_dead(call)).map(|(task, _)| task).collect();
        dropped = dead.iter().filter(|task| map.remove(task).is_ok()).count() as u64;
        Ok(())
    })?;
    Ok(dropped)
}

/// Removes an executable from those whose files were told.
pub(super) fn ask_for_file_of(ebpf: &mut Ebpf, executable: &Executable) {
    let map = ebpf.map_mut("TOLD").and_then(|map| HashMap::<_, Executable, u32>::try_from(map).ok());
    // It is not there where the ring buffer had no room for it.
    if let Some(mut map) = map {
        let _ = map.remove(executable);
    }
}

fn add_tallies(sum: Tally, slot: &Tally) -> Tally {
    let Tally { calls, failed, total_ns, buckets } = slot;
    let mut all = sum.buckets;
    for (sum, count) in all.iter_mut().zip(buckets) {
        *sum += count;
    }
    Tally { calls: sum.calls + calls, failed: sum.failed + failed, total_ns: sum.total_ns + total_ns, buckets: all }
}

fn fill_array<'a, T: Pod + 'a>(
    ebpf: &mut Ebpf,
    name: &'static str,
    values: impl IntoIterator<Item = &'a T>,
) -> Result<(), KernelError> {
    with_map::<Array<_, T>>(ebpf, name, |map| {
        values.into_iter().zip(0..).try_for_each(|(value, index)| map.set(index, value, 0))
    })
}

fn per_cpu<'a, T: Pod>(ebpf: &'a Ebpf, name: &'static str) -> Result<PerCpuArray<&'a MapData, T>, KernelError> {
    let map = ebpf.map(name).ok_or(KernelError::Incomplete { what: name })?;
    PerCpuArray::try_from(map).map_err(|source| KernelError::Map { map: name, source })
}

/// A map as a typed handle, for as long as `write` runs.
fn with_map<'a, M: TryFrom<&'a mut Map, Error = MapError>>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
    write: impl FnOnce(&mut M) -> Result<(), MapError>,
) -> Result<(), KernelError> {
    let map = ebpf.map_mut(name).ok_or(KernelError::Incomplete { what: name })?;
    let map_error = |source| KernelError::Map { map: name, source };
    let mut map = M::try_from(map).map_err(map_error)?;
    write(&mut map).map_err(map_error)
}
