//! Typed handles on the maps: writes them before the programs run, and reads them while the programs run.

use std::{collections::BTreeMap, ffi::c_void, marker::PhantomData, num::NonZeroUsize, ops::Deref, ptr::NonNull};

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

/// BPF_NOEXIST: an existing entry is not replaced.
const NO_EXIST: u64 = 1;

pub(super) const EVENTS: &str = "sp_events";
const CALLS: &str = "sp_calls";
const TALLIES: &str = "sp_tallies";
const UNKNOWN_TALLIES: &str = "sp_unk_tallies";

/// Entries of map `TALLIES` for options that rules name by number.
const NUMBERED_TALLIES: u32 = 256;

/// Size of the ring buffer in bytes. Events of conflicts are rate-limited, events of calls are not: a busy program makes some
/// thousands of calls while the agent is delayed.
const EVENT_BYTES: u32 = 1 << 20;
const CALL_BYTES: u32 = 8 << 20;

/// Sets the number of entries of each map that is sized at load time. A map has at least one entry.
pub(super) fn set_sizes(loader: &mut EbpfLoader<'_>, calls: Calls, processes: &[u32], members: &[(OptionKey, Member)]) {
    for (map, entries) in [("sp_processes", processes.len()), ("sp_members", members.len())] {
        loader.map_max_entries(map, entries.max(1) as u32);
    }
    loader.map_max_entries(TALLIES, 2 * (OPTIONS.len() + 1) as u32 + NUMBERED_TALLIES);
    loader.map_max_entries(EVENTS, if calls == Calls::Conflicts { EVENT_BYTES } else { CALL_BYTES });
}

/// Pins the maps that outlive the agent, or opens those that are pinned.
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

/// Disables the policies of a pinned configuration. The layout of the configuration does not matter: zero is inert in every
/// layout.
pub(super) fn disable(maps: &PrivateDir, name: &'static str) -> Result<(), KernelError> {
    let map = MapData::from_pin(maps.through(name)).map_err(map_error(name))?;
    syscall::write_zeroes(map.fd(), map.info().map_err(map_error(name))?.value_size())
        .map_err(|source| KernelError::Pin { path: maps.path().join(name), source })
}

/// Returns whether the pinned policies are in force.
pub(super) fn is_in_force(pins: &Pins) -> Result<bool, KernelError> {
    let Some((maps, name)) = pins.config()? else { return Ok(false) };
    let map = MapData::from_pin(maps.through(name)).map_err(map_error(name))?;
    let map = Array::<_, Config>::try_from(Map::Array(map)).map_err(map_error(name))?;
    Ok(map.get(&0, 0).map_err(map_error(name))?.in_force != 0)
}

/// Reads the configuration.
fn config(ebpf: &Ebpf) -> Result<Config, KernelError> {
    let map = ebpf.map("sp_config").ok_or(KernelError::Incomplete { what: "sp_config" })?;
    let map = Array::<_, Config>::try_from(map).map_err(map_error("sp_config"))?;
    map.get(&0, 0).map_err(map_error("sp_config"))
}

/// Writes the maps that do not depend on policies.
pub(super) fn fill(ebpf: &mut Ebpf, processes: &[u32], members: &[(OptionKey, Member)]) -> Result<(), KernelError> {
    with_map::<HashMap<_, u32, u32>>(ebpf, "sp_processes", |map| {
        processes.iter().try_for_each(|process| map.insert(process, 1, 0))
    })?;
    with_map::<HashMap<_, OptionKey, Member>>(ebpf, "sp_members", |map| {
        members.iter().try_for_each(|(option, member)| map.insert(option, member, 0))
    })
}

/// Writes the numbers of a target to the cgroup storage of a program that is attached to it.
#[expect(deprecated, reason = "nothing else tells a program where it is attached")]
pub(super) fn write_target(ebpf: &mut Ebpf, hook: Hook, cgroup: u64, target: abi::Target) -> Result<(), KernelError> {
    let key = CgroupStorageKey::new(cgroup, attach_type(hook) as u32);
    with_map::<maps::CgroupStorage<_, abi::Target>>(ebpf, "sp_targets", |map| map.insert(key, target, 0))
}

/// The configuration of the programs: the copy of this process, and the map.
pub(super) struct ConfigCell(Config);

impl ConfigCell {
    /// Reads the configuration from the map.
    pub(super) fn read(ebpf: &Ebpf) -> Result<Self, KernelError> {
        config(ebpf).map(Self)
    }

    /// Changes the configuration by one write of the map. If the write fails, the configuration is unchanged.
    pub(super) fn update(&mut self, ebpf: &mut Ebpf, change: impl FnOnce(&mut Config)) -> Result<(), KernelError> {
        let mut config = self.0;
        change(&mut config);
        with_map::<Array<_, Config>>(ebpf, "sp_config", |map| map.set(0, config, 0))?;
        self.0 = config;
        Ok(())
    }
}

impl Deref for ConfigCell {
    type Target = Config;

    fn deref(&self) -> &Config {
        &self.0
    }
}

/// How an array is mapped into the memory of this process.
pub(super) trait Access {
    const PROTECTION: ProtFlags;
}

pub(super) struct ReadOnly;
pub(super) struct Writable;

impl Access for ReadOnly {
    const PROTECTION: ProtFlags = ProtFlags::PROT_READ;
}

impl Access for Writable {
    const PROTECTION: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);
}

/// The values of a BPF array that is mapped into the memory of this process.
pub(super) struct MappedArray<T, A: Access> {
    memory: NonNull<c_void>,
    bytes: NonZeroUsize,
    values: PhantomData<(T, A)>,
}

// SAFETY: the mapping is only read and written value by value.
unsafe impl<T, A: Access> Send for MappedArray<T, A> {}

impl<T: Pod, A: Access> MappedArray<T, A> {
    /// Maps an array into the memory of this process. The map must have BPF_F_MMAPABLE.
    pub(super) fn new(ebpf: &Ebpf, name: &'static str) -> Result<Self, KernelError> {
        let Some(Map::Array(map)) = ebpf.map(name) else { return Err(KernelError::Incomplete { what: name }) };
        let entries = map.info().map_err(map_error(name))?.max_entries() as usize;
        let bytes = NonZeroUsize::new(entries * size_of::<T>()).ok_or(KernelError::Incomplete { what: name })?;
        // SAFETY: a new mapping of a map that has this length: the kernel aligns values to eight bytes.
        let memory = unsafe { mmap(None, bytes, A::PROTECTION, MapFlags::MAP_SHARED, map.fd(), 0) };
        let memory = memory.map_err(|errno| KernelError::View { map: name, source: errno.into() })?;
        const { assert!(size_of::<T>().is_multiple_of(8)) };
        Ok(Self { memory, bytes, values: PhantomData })
    }

    fn pointer(&self, index: usize) -> Option<NonNull<T>> {
        let is_in_range = index < self.bytes.get() / size_of::<T>();
        // SAFETY: the index is within the mapping.
        is_in_range.then(|| unsafe { self.memory.cast::<T>().add(index) })
    }

    /// Returns a value; `None` if `index` is out of range.
    pub(super) fn get(&self, index: usize) -> Option<T> {
        // SAFETY: the value is mapped until `self` is dropped, it is aligned by the kernel, and every bit pattern is valid. The
        // programs may write to it at the same time, one number at a time.
        self.pointer(index).map(|pointer| unsafe { pointer.read_volatile() })
    }
}

impl<T: Pod> MappedArray<T, Writable> {
    /// Writes a value. Does nothing if `index` is out of range.
    pub(super) fn set(&self, index: usize, value: T) {
        if let Some(pointer) = self.pointer(index) {
            // SAFETY: as for `get`.
            unsafe { pointer.write_volatile(value) };
        }
    }
}

impl<T, A: Access> Drop for MappedArray<T, A> {
    fn drop(&mut self) {
        // SAFETY: there is no reference into the mapping.
        if let Err(errno) = unsafe { munmap(self.memory, self.bytes.get()) } {
            log::debug!("cannot unmap an array: {errno}");
        }
    }
}

/// The counters of losses that the programs write.
pub(super) struct MappedLosses {
    array: MappedArray<Losses, ReadOnly>,
    /// What was lost before this agent started. An earlier agent has reported it.
    baseline: Losses,
}

impl MappedLosses {
    /// Maps the counters into the memory of this process.
    pub(super) fn new(ebpf: &Ebpf) -> Result<Self, KernelError> {
        let array = MappedArray::new(ebpf, "sp_losses")?;
        let mut losses = Self { array, baseline: Losses::default() };
        losses.baseline = losses.all();
        Ok(losses)
    }

    /// Returns what was lost since this agent started.
    pub(super) fn get(&self) -> Losses {
        self.all().since(&self.baseline)
    }

    /// Returns what was lost since the map was made, also under earlier agents.
    pub(super) fn all(&self) -> Losses {
        self.array.get(0).unwrap_or_default()
    }
}

/// Reserves counters for the calls on each option of the table, on each option in `options`, and on all others together.
/// Existing counters are kept. Returns whether there was room for all of them.
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

/// Returns the calls that the audit saw, by option, summed over CPUs.
pub(super) fn tallies(ebpf: &Ebpf) -> Result<Vec<(TallyKey, Tally)>, KernelError> {
    // A map, because the iteration may restart while programs add keys.
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

/// Returns the number of calls whose entry the audit has seen but not their exit, and that it would report if `calls`
/// ([`abi::calls`]) are requested.
pub(super) fn open_calls(ebpf: &Ebpf, calls: u32) -> Result<u64, KernelError> {
    let map = ebpf.map(CALLS).ok_or(KernelError::Incomplete { what: CALLS })?;
    let map = Array::<_, Slot>::try_from(map).map_err(map_error(CALLS))?;
    let is_open = |Slot { call, .. }: &Slot| call.thread != 0 && call.should_report(calls);
    Ok(map.iter().flatten().filter(is_open).count() as u64)
}

/// Removes the records of calls whose threads have exited. Returns how many of these calls would have been reported.
pub(super) fn drop_dead_calls(ebpf: &mut Ebpf, calls: u32) -> Result<u64, KernelError> {
    // In another PID namespace, threads have other numbers.
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
            // Read again: the thread may have ended the call before it exited.
            let Slot { call, .. } = map.get(&index, 0)?;
            if call.thread == thread {
                map.set(index, Slot::default(), 0)?;
                missed += u64::from(call.should_report(calls));
            }
        }
        Ok(())
    })?;
    Ok(missed)
}

/// Removes an executable from the map of those whose path has been sent.
pub(super) fn request_exe_path(ebpf: &mut Ebpf, executable: &Executable) {
    let map = ebpf.map_mut("sp_exes_sent").and_then(|map| HashMap::<_, Executable, u32>::try_from(map).ok());
    // The entry is absent if the ring buffer had no room for the path.
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

/// Returns a function that adds the name of a map to an error.
pub(super) fn map_error(map: &'static str) -> impl Fn(MapError) -> KernelError {
    move |source| KernelError::Map { map, source }
}

/// Calls `write` with a typed handle on a map.
pub(super) fn with_map<'a, M: TryFrom<&'a mut Map, Error = MapError>>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
    write: impl FnOnce(&mut M) -> Result<(), MapError>,
) -> Result<(), KernelError> {
    let map = ebpf.map_mut(name).ok_or(KernelError::Incomplete { what: name })?;
    let mut map = M::try_from(map).map_err(map_error(name))?;
    write(&mut map).map_err(map_error(name))
}
