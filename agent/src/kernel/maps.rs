//! Typed handles on the maps: what is written before the programs run, and what is read while they do.

use std::{collections::BTreeMap, ffi::c_void, marker::PhantomData, num::NonZeroUsize, ptr::NonNull};

use abi::{
    Config, Losses,
    event::{Executable, Slot, Tally, TallyKey, call},
    layout::Member,
    setting::OptionKey,
};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{self, Array, CgroupStorageKey, HashMap, Map, MapData, MapError, PerCpuHashMap, PerCpuValues},
};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::{
    KernelError,
    pins::{self, Pins},
    syscall::{self, attach_type},
    tables::cpus,
};
use crate::{
    compile::Hook,
    host::{private::PrivateDir, process},
    options::{OPTIONS, SocketOption},
    policy::model::Calls,
};

/// BPF_NOEXIST: an entry that is there stays.
const NO_EXIST: u64 = 1;

pub(super) const EVENTS: &str = "sp_events";
const CALLS: &str = "sp_calls";
const TALLIES: &str = "sp_tallies";
const UNKNOWN_TALLIES: &str = "sp_unk_tallies";

/// Entries of map `TALLIES` beside those of options that have a name: for options that rules give by number.
const LATER_TALLIES: u32 = 256;

/// Room for events. Conflicts are held back where they come too fast, calls are not: a busy program makes some
/// thousands in the time that the agent may be kept waiting.
const EVENT_BYTES: u32 = 1 << 20;
const CALL_BYTES: u32 = 8 << 20;

/// Gives each map that is sized at load the entries that it takes. No map can be empty.
pub(super) fn size(loader: &mut EbpfLoader<'_>, calls: Calls, processes: &[u32], members: &[(OptionKey, Member)]) {
    for (map, entries) in [("sp_processes", processes.len()), ("sp_members", members.len())] {
        loader.map_max_entries(map, entries.max(1) as u32);
    }
    loader.map_max_entries(TALLIES, 2 * (OPTIONS.len() + 1) as u32 + LATER_TALLIES);
    loader.map_max_entries(EVENTS, if calls == Calls::Conflicts { EVENT_BYTES } else { CALL_BYTES });
}

/// Has maps stay that outlive the agent, or taken over where they have.
pub(super) fn pin_maps(loader: &mut EbpfLoader<'_>, pins: &Pins) -> Result<(), KernelError> {
    for map in pins::MAPS {
        let path = pins.map(map)?;
        if map == EVENTS && pins.has_map(map) {
            let bytes = MapData::from_pin(&path).and_then(|map| map.info()).map_err(map_error(EVENTS))?.max_entries();
            loader.map_max_entries(EVENTS, bytes);
        }
        loader.map_pin_path(map, path);
    }
    Ok(())
}

/// Takes out of force what the configuration that is pinned there says to be. What it means does not matter: zero is inert in
/// every layout.
pub(super) fn end(maps: &PrivateDir, name: &'static str) -> Result<(), KernelError> {
    let map = MapData::from_pin(maps.through(name)).map_err(map_error(name))?;
    syscall::write_zeroes(map.fd(), map.info().map_err(map_error(name))?.value_size())
        .map_err(|source| KernelError::Pin { path: maps.path().join(name), source })
}

/// Whether what is pinned is in force.
pub(super) fn is_in_force(pins: &Pins) -> Result<bool, KernelError> {
    let Some((maps, name)) = pins.config()? else { return Ok(false) };
    let map = MapData::from_pin(maps.through(name)).map_err(map_error(name))?;
    let map = Array::<_, Config>::try_from(Map::Array(map)).map_err(map_error(name))?;
    Ok(map.get(&0, 0).map_err(map_error(name))?.in_force != 0)
}

/// What is in force.
pub(super) fn config(ebpf: &Ebpf) -> Result<Config, KernelError> {
    let map = ebpf.map("sp_config").ok_or(KernelError::Incomplete { what: "sp_config" })?;
    let map = Array::<_, Config>::try_from(map).map_err(map_error("sp_config"))?;
    map.get(&0, 0).map_err(map_error("sp_config"))
}

/// Writes what does not change with the policies.
pub(super) fn fill(ebpf: &mut Ebpf, processes: &[u32], members: &[(OptionKey, Member)]) -> Result<(), KernelError> {
    with_map::<HashMap<_, u32, u32>>(ebpf, "sp_processes", |map| {
        processes.iter().try_for_each(|process| map.insert(process, 1, 0))
    })?;
    with_map::<HashMap<_, OptionKey, Member>>(ebpf, "sp_members", |map| {
        members.iter().try_for_each(|(option, member)| map.insert(option, member, 0))
    })
}

/// Tells the program that is attached to a cgroup which target that is.
#[expect(deprecated, reason = "nothing else tells a program where it is attached")]
pub(super) fn write_target(ebpf: &mut Ebpf, hook: Hook, cgroup: u64, target: abi::Target) -> Result<(), KernelError> {
    let key = CgroupStorageKey::new(cgroup, attach_type(hook) as u32);
    with_map::<maps::CgroupStorage<_, abi::Target>>(ebpf, "sp_targets", |map| map.insert(key, target, 0))
}

/// Writes the configuration, which says what is in force.
pub(super) fn configure(ebpf: &mut Ebpf, config: Config) -> Result<(), KernelError> {
    with_map::<Array<_, Config>>(ebpf, "sp_config", |map| map.set(0, config, 0))
}

/// The values of an array that this process has in its own memory, as the programs write them.
pub(super) struct MappedArray<T> {
    memory: NonNull<c_void>,
    bytes: NonZeroUsize,
    values: PhantomData<T>,
}

// SAFETY: it is memory that is read and written value by value.
unsafe impl<T> Send for MappedArray<T> {}

impl<T: Pod> MappedArray<T> {
    /// Takes an array into this process's memory. Its programs' map has BPF_F_MMAPABLE.
    pub(super) fn of(ebpf: &Ebpf, name: &'static str, protection: ProtFlags) -> Result<Self, KernelError> {
        let Some(Map::Array(map)) = ebpf.map(name) else { return Err(KernelError::Incomplete { what: name }) };
        let entries = map.info().map_err(map_error(name))?.max_entries() as usize;
        let bytes = NonZeroUsize::new(entries * size_of::<T>()).ok_or(KernelError::Incomplete { what: name })?;
        // SAFETY: a new mapping, of a map that is as long: the kernel lays values out in steps of eight bytes.
        let memory = unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, map.fd(), 0) };
        let memory = memory.map_err(|errno| KernelError::View { map: name, source: errno.into() })?;
        const { assert!(size_of::<T>().is_multiple_of(8)) };
        Ok(Self { memory, bytes, values: PhantomData })
    }

    fn place(&self, index: usize) -> Option<NonNull<T>> {
        let is_there = index < self.bytes.get() / size_of::<T>();
        // SAFETY: within the mapping.
        is_there.then(|| unsafe { self.memory.cast::<T>().add(index) })
    }

    /// A value; `None` where there is no such.
    pub(super) fn get(&self, index: usize) -> Option<T> {
        // SAFETY: mapped until this is dropped, aligned as the kernel has it, and valid whatever the bytes. The programs may
        // write to it meanwhile, each number at once.
        self.place(index).map(|place| unsafe { place.read_volatile() })
    }

    /// Writes a value of an array that was mapped to be written; where there is no such, nothing.
    pub(super) fn set(&self, index: usize, value: T) {
        if let Some(place) = self.place(index) {
            // SAFETY: as above.
            unsafe { place.write_volatile(value) };
        }
    }
}

impl<T> Drop for MappedArray<T> {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference into it.
        if let Err(errno) = unsafe { munmap(self.memory, self.bytes.get()) } {
            log::debug!("cannot unmap an array: {errno}");
        }
    }
}

/// What was lost, as the programs write it.
pub(super) struct MappedLosses {
    view: MappedArray<Losses>,
    /// What was lost before this agent: another one has told of it.
    before: Losses,
}

impl MappedLosses {
    /// Takes the map into this process's memory.
    pub(super) fn of(ebpf: &Ebpf) -> Result<Self, KernelError> {
        let view = MappedArray::of(ebpf, "sp_losses", ProtFlags::PROT_READ)?;
        let mut view = Self { view, before: Losses::default() };
        view.before = view.all();
        Ok(view)
    }

    /// What has been lost by now.
    pub(super) fn get(&self) -> Losses {
        self.all().since(&self.before)
    }

    /// The same with what was lost before this agent.
    pub(super) fn all(&self) -> Losses {
        self.view.get(0).unwrap_or_default()
    }
}

/// Reserves counters for the calls on options that have a name, on these, and on all others together. Existing counters stay.
/// Returns whether there was room for all of them.
pub(super) fn reserve_tallies(ebpf: &mut Ebpf, options: &[OptionKey]) -> Result<bool, KernelError> {
    let cpus = cpus()?;
    let named = OPTIONS.iter().map(SocketOption::key);
    let keys = [TallyKey::OTHER].into_iter().chain(named).chain(options.iter().copied());
    let kinds = [call::SETSOCKOPT, call::GETSOCKOPT];
    let keys = keys.flat_map(|key| kinds.map(|kind| TallyKey { key, kind, _pad: 0 }));
    let mut is_full = false;
    with_map::<PerCpuHashMap<_, TallyKey, Tally>>(ebpf, TALLIES, |map| {
        for key in keys {
            match map.insert(key, PerCpuValues::try_from(vec![Tally::default(); cpus])?, NO_EXIST) {
                Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EEXIST) => {}
                Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::E2BIG) => {
                    is_full = true;
                    return Ok(());
                }
                other => other?,
            }
        }
        Ok(())
    })?;
    Ok(!is_full)
}

/// The calls that the audit saw, by option, summed over CPUs.
pub(super) fn tallies(ebpf: &Ebpf) -> Result<Vec<(TallyKey, Tally)>, KernelError> {
    // Other keys that come in meanwhile can have the iteration begin anew.
    let mut tallies: BTreeMap<TallyKey, Tally> = BTreeMap::new();
    for name in [TALLIES, UNKNOWN_TALLIES] {
        let map = ebpf.map(name).ok_or(KernelError::Incomplete { what: name })?;
        let map = PerCpuHashMap::<_, TallyKey, Tally>::try_from(map).map_err(map_error(name))?;
        for entry in &map {
            let (key, slots) = entry.map_err(map_error(name))?;
            tallies.insert(key, slots.iter().fold(Tally::default(), add_tallies));
        }
    }
    tallies.retain(|_, tally| tally.calls > 0);
    Ok(tallies.into_iter().collect())
}

/// How many calls the audit has seen begin and not end, of which it would tell when these are `wanted` ([`abi::calls`]).
pub(super) fn open_calls(ebpf: &Ebpf, wanted: u32) -> Result<u64, KernelError> {
    let map = ebpf.map(CALLS).ok_or(KernelError::Incomplete { what: CALLS })?;
    let map = Array::<_, Slot>::try_from(map).map_err(map_error(CALLS))?;
    let is_missed = |Slot { call, .. }: &Slot| call.thread != 0 && call.should_report(wanted);
    Ok(map.iter().flatten().filter(is_missed).count() as u64)
}

/// Removes the records of calls whose threads are gone; gives of how many it would have told.
pub(super) fn drop_dead_calls(ebpf: &mut Ebpf, wanted: u32) -> Result<u64, KernelError> {
    // In another namespace threads have other numbers.
    if !process::is_initial_namespace() {
        return Ok(0);
    }
    let mut missed = 0;
    with_map::<Array<_, Slot>>(ebpf, CALLS, |map| {
        for index in 0..map.len() {
            let thread = map.get(&index, 0)?.call.thread;
            if thread == 0 || process::has_thread(thread as u32) {
                continue;
            }
            // Only what is there now is left there: it may have ended its call before it went.
            let Slot { call, .. } = map.get(&index, 0)?;
            if call.thread == thread {
                map.set(index, Slot::default(), 0)?;
                missed += u64::from(call.should_report(wanted));
            }
        }
        Ok(())
    })?;
    Ok(missed)
}

/// Removes an executable from those whose files were told.
pub(super) fn request_exe_path(ebpf: &mut Ebpf, executable: &Executable) {
    let map = ebpf.map_mut("sp_exes_sent").and_then(|map| HashMap::<_, Executable, u32>::try_from(map).ok());
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

/// What went wrong with a map.
pub(super) fn map_error(map: &'static str) -> impl Fn(MapError) -> KernelError {
    move |source| KernelError::Map { map, source }
}

/// A map as a typed handle, for as long as `write` runs.
pub(super) fn with_map<'a, M: TryFrom<&'a mut Map, Error = MapError>>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
    write: impl FnOnce(&mut M) -> Result<(), MapError>,
) -> Result<(), KernelError> {
    let map = ebpf.map_mut(name).ok_or(KernelError::Incomplete { what: name })?;
    let mut map = M::try_from(map).map_err(map_error(name))?;
    write(&mut map).map_err(map_error(name))
}
