//! Every map: its writer, its readers, its size, and what happens when it is full.
//!
//! The contents of policies are in tables. Each generation of policies has its own set of tables: inner maps that the agent
//! creates and fills, with the size that the policies need. The agent puts the inner maps into the slot of the generation
//! ([`abi::index`]) and writes the number of the generation to [`CONFIG`] last. While a generation is in force, only its
//! target slots and counters are written. An outer map is empty at first, so lookups find nothing. The sizes of inner maps in
//! this file are placeholders.

use abi::{
    ApplyList, Config, Counters, Exemptions, FALLBACK_MAX, GENERATIONS, Losses, Target, TargetSlot,
    event::{
        BUDGETS_MAX, Budget, CALLS_MAX, Call, EXES_SENT_MAX, Executable, Limit, LimitKey, Slot, Tally, TallyKey,
        UNKNOWN_TALLIES_MAX, bucket,
    },
    index,
    layout::Member,
    live::{self, Assignment, AssignmentList, IterControl, Outcome, SocketJob},
    select::{PrefixData, Prefixes, Selectors},
    setting::{Lookup, OptionKey, OptionRow, Setting},
    socket::FallbackState,
};
use aya_ebpf::{
    Global,
    bindings::{BPF_F_INNER_MAP, BPF_F_MMAPABLE, BPF_NOEXIST},
    btf_maps::{self, ArrayOfMaps},
    helpers::generated::bpf_get_smp_processor_id,
    macros::{btf_map, map},
    maps::{self, Array, HashMap, LruHashMap, PerCpuHashMap, RingBuf, lpm_trie::Key},
};

use crate::record::{BudgetRef, Cell, CountersRef, LimitRef, LossesRef, SlotRef, TallyRef};

/// A table of each generation, by index, with rows of `BYTES` bytes. Inner arrays can differ in length.
///
/// The value type is bytes because of `timer_off` in `bpf_map_meta_equal` (kernel/bpf/map_in_map.c, 5.15 to 6.1). The kernel
/// compares what the inner map declared here can hold with what the agent's inner maps can hold. A structure with BTF, as
/// declared here, could hold a timer; one without BTF, as the agent creates, could not.
type Table<const BYTES: usize> =
    ArrayOfMaps<btf_maps::Array<[u8; BYTES], 1, { BPF_F_INNER_MAP as usize }>, { GENERATIONS as usize }>;

/// A table of each generation, by key.
type Dictionary<K, V> = ArrayOfMaps<btf_maps::HashMap<K, V, 1>, { GENERATIONS as usize }>;

/// Index 0: the configuration. Written last: until then nothing is in force.
#[map(name = "sp_config")]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

/// Index 0: the processes of sockpolicy that inspect sockets. Not pinned: every process of sockpolicy finds the map by its name.
#[map(name = "sp_exempt")]
static EXEMPT: Array<Exemptions> = Array::with_max_entries(1, 0);

/// By target: which policies apply there. The agent also writes to the table that is in force, when a cgroup appears or
/// disappears.
#[btf_map(name = "sp_target_slots")]
static TARGET_SLOTS: Table<{ size_of::<TargetSlot>() }> = Table::new();

/// For the audit: the slots of targets, by cgroup id. The agent writes it as it writes `TARGET_SLOTS`.
#[btf_map(name = "sp_cgroup_slots")]
static CGROUP_SLOTS: Dictionary<u64, u32> = Dictionary::new();

/// By scope: the small dimensions of the rules' matches.
#[btf_map(name = "sp_selectors")]
static SELECTORS: Table<{ size_of::<Selectors>() }> = Table::new();

/// Rules by scope and by prefix of a port or an address. The value is two `u32`, because the kernel aligns a value behind a
/// key of this length to four bytes only.
#[btf_map(name = "sp_prefixes")]
static PREFIXES: ArrayOfMaps<btf_maps::LpmTrie<PrefixData, [u32; 2], 1>, { GENERATIONS as usize }> = ArrayOfMaps::new();

/// By scope, and in each scope by option number: the options that rules name. Options that can be set come first.
#[btf_map(name = "sp_options")]
static OPTIONS: Table<{ size_of::<OptionRow>() }> = Table::new();

/// The number of an option in each scope, by level and name. [`Config::numbers`] has most of these numbers too.
#[btf_map(name = "sp_option_index")]
static OPTION_INDEX: Dictionary<OptionKey, u32> = Dictionary::new();

/// The setting of each rule for each option that the rule names.
#[btf_map(name = "sp_settings")]
static SETTINGS: Table<{ size_of::<Setting>() }> = Table::new();

/// The options to apply: by scope, and in each scope by [`abi::apply_point`].
#[btf_map(name = "sp_apply_lists")]
static APPLY_LISTS: Table<{ size_of::<ApplyList>() }> = Table::new();

/// By setting, and for each setting by CPU. Written by the programs, read by the agent. Not a per-CPU array, because inner
/// maps of that type must all have the same length.
#[btf_map(name = "sp_counters")]
static COUNTERS: Table<{ size_of::<Counters>() }> = Table::new();

/// The number of possible CPUs: how many [`COUNTERS`] a setting has. Set by the agent at load.
#[unsafe(no_mangle)]
static CPUS: Global<u32> = Global::new(1);

/// By target and hook: written by the agent after it has attached the programs there. The kernel creates a zeroed entry when
/// a program is attached, and passes the entry to the program that it runs for that cgroup. The replacement,
/// BPF_MAP_TYPE_CGRP_STORAGE (6.2), cannot be used: a program would get the entry of the current task's cgroup.
#[map(name = "sp_targets")]
#[expect(deprecated, reason = "nothing else tells a program where it is attached")]
static TARGETS: maps::CgroupStorage<Target> = maps::CgroupStorage::new();

/// Ids of the processes that the audit follows, if [`Config::by_process`] is set. The value is unused. The agent sets the
/// size at load.
#[map(name = "sp_processes")]
static PROCESSES: HashMap<u32, u32> = HashMap::with_max_entries(1, 0);

/// Where sockets keep the values of options. The agent sets the size at load.
#[map(name = "sp_members")]
static MEMBERS: HashMap<OptionKey, Member> = HashMap::with_max_entries(1, 0);

/// Index 0: written by the programs, read by the agent through mmap. The agent reads it often. While a task is in bpf(2) to
/// read a map, the kernel runs no kprobes and tracepoints on that CPU (`bpf_disable_instrumentation`). All CPUs share the
/// entry, because losses are rare.
#[map(name = "sp_losses")]
static LOSSES: Array<Losses> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Calls in progress, by thread ([`Slot::index`]). A record is created at entry, or by a hook that finds a conflict, and
/// removed at exit. If another thread has the slot, the call is judged, but reported without its result and counted in
/// [`Losses::calls_full`].
///
/// An array, because programs access it without a helper call: most callers have no record.
#[map(name = "sp_calls")]
static CALLS: Array<Slot> = Array::with_max_entries(CALLS_MAX, 0);

/// Calls seen by the audit, by option: options that have a name or that a rule names, and [`TallyKey::OTHER`]. The agent
/// creates the entries and sets the size at load. The programs add no entry, so applications cannot fill the map.
#[map(name = "sp_tallies")]
static TALLIES: PerCpuHashMap<TallyKey, Tally> = PerCpuHashMap::with_max_entries(1, 0);

/// Calls seen by the audit on other options, whose numbers applications choose. When the map is full, calls on further
/// options are counted under [`TallyKey::OTHER`].
#[map(name = "sp_unk_tallies")]
static UNKNOWN_TALLIES: PerCpuHashMap<TallyKey, Tally> = PerCpuHashMap::with_max_entries(UNKNOWN_TALLIES_MAX, 0);

/// When each kind of conflict was last reported. When the map is full, the least recently used entry is evicted: the next
/// event of that kind is then sent as if it were the first.
#[map(name = "sp_rate_limits")]
static RATE_LIMITS: LruHashMap<LimitKey, Limit> = LruHashMap::with_max_entries(8192, 0);

/// By cgroup id: the budget of the events that the cgroup's tasks cause. When the map is full, the least recently used entry
/// is evicted: its cgroup then has a full budget, within the budget of its target.
#[map(name = "sp_cg_budgets")]
static CGROUP_BUDGETS: LruHashMap<u64, Budget> = LruHashMap::with_max_entries(4096, 0);

/// By slot of a target: the budget of the events of the target. The last two entries are the budgets of all targets.
#[map(name = "sp_budgets")]
static BUDGETS: Array<Budget> = Array::with_max_entries(BUDGETS_MAX + 2, 0);

/// Executables whose path was sent to the agent. The agent removes the executables that it has forgotten. When the map is
/// full, the least recently used entry is evicted: the path is sent again.
#[map(name = "sp_exes_sent")]
static EXES_SENT: LruHashMap<Executable, u32> = LruHashMap::with_max_entries(EXES_SENT_MAX, 0);

/// The notes of sockets for whose storage the kernel has no memory, by the socket's address in the kernel. Written and read
/// by the programs only. When the map is full, the least recently used notes are evicted. New notes are counted in
/// [`Losses::no_storage`].
#[map(name = "sp_fallback")]
static FALLBACK_STATES: LruHashMap<u64, FallbackState> = LruHashMap::with_max_entries(FALLBACK_MAX, 0);

/// Index 0: what the iterator does with sockets that have a job. The agent writes this map and the four below before each
/// step. The agent sets their sizes at load if it reconciles existing sockets.
#[map(name = "sp_iter_control")]
static ITER_CONTROL: Array<IterControl> = Array::with_max_entries(1, 0);

/// The jobs of sockets, at their [`live::places`]. Written by the agent through mmap.
#[map(name = "sp_jobs")]
static JOBS: Array<SocketJob> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map(name = "sp_assign_lists")]
static ASSIGNMENT_LISTS: Array<AssignmentList> = Array::with_max_entries(1, 0);

#[map(name = "sp_assignments")]
static ASSIGNMENTS: Array<Assignment> = Array::with_max_entries(1, 0);

/// The results of the jobs. Written by the program, read by the agent through mmap.
#[map(name = "sp_outcomes")]
static OUTCOMES: Array<Outcome> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Events and paths of executables, for the agent. When the ring buffer is full, the event is dropped and counted in
/// [`Losses::ring_full`].
#[map(name = "sp_events")]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// Returns the configuration if the policies are in force.
#[inline(always)]
pub(crate) fn config() -> Option<&'static Config> {
    CONFIG.get(0).filter(|config| config.in_force != 0)
}

/// Returns the processes that are exempt; `None` if there are none.
#[inline(always)]
pub(crate) fn exemptions() -> Option<&'static Exemptions> {
    EXEMPT.get(0).filter(|exemptions| exemptions.is_used != 0)
}

/// Returns the target of the cgroup for which the kernel runs the program.
#[inline(always)]
pub(crate) fn target() -> &'static Target {
    // SAFETY: never NULL (`bpf_get_local_storage`, kernel/bpf/cgroup.c), and valid while the program runs. The agent replaces
    // the entry and never writes to it.
    unsafe { &*TARGETS.get_ptr_mut() }
}

/// Returns the row at an index ([`abi::index`]) of a table.
#[inline(always)]
fn row<T, const BYTES: usize>(tables: &'static Table<BYTES>, index: u32) -> Option<&'static T> {
    // SAFETY: an inner map remains valid while a program uses it, and all shared types are valid for all bytes. No reference
    // of this kind exists to the counters, which change.
    row_ptr(tables, index).map(|row| unsafe { &*row })
}

#[inline(always)]
fn row_ptr<T, const BYTES: usize>(tables: &'static Table<BYTES>, index: u32) -> Option<*mut T> {
    // The kernel aligns values to eight bytes.
    const { assert!(BYTES == size_of::<T>() && align_of::<T>() <= 8) };
    tables.get_value_ptr_mut(index::slot(index), &index::within(index)).map(<*mut [u8; BYTES]>::cast)
}

/// Returns the slot of a target in a generation, if the generation covers the target.
#[inline(always)]
pub(crate) fn target_slot(generation: u32, target: &Target) -> Option<&'static TargetSlot> {
    slot_at(generation, target.place).filter(|slot| slot.id == target.id)
}

/// Returns the index of the slot of a cgroup, if the cgroup is a target: for programs that are not attached to the cgroup.
#[inline(always)]
pub(crate) fn cgroup_slot(generation: u32, cgroup: u64) -> Option<u32> {
    // SAFETY: when the agent removes an entry, another entry can reuse its memory at once: then the index is that of another
    // target.
    unsafe { CGROUP_SLOTS.get(index::slot_of(generation))?.get(cgroup) }.copied()
}

/// Returns a slot in a generation, if a target is there.
#[inline(always)]
pub(crate) fn slot_at(generation: u32, place: u32) -> Option<&'static TargetSlot> {
    row(&TARGET_SLOTS, index::of(generation, place)).filter(|slot: &&TargetSlot| slot.id != 0)
}

#[inline(always)]
pub(crate) fn selectors(scope: u32) -> Option<&'static Selectors> {
    row(&SELECTORS, scope)
}

#[inline(always)]
pub(crate) fn option(index: u32) -> Option<&'static OptionRow> {
    row(&OPTIONS, index)
}

/// Returns the option of a call in a scope and the option's index, if a rule of the generation names the option. `first` is
/// the index of the scope's first option.
#[inline(always)]
pub(crate) fn option_named(
    config: &Config,
    generation: u32,
    first: u32,
    key: OptionKey,
) -> Option<(u32, &'static OptionRow)> {
    let number = match config.number(generation, key) {
        Lookup::Absent => return None,
        Lookup::Maybe(number) => number,
        Lookup::Fallback => option_number(generation, key)?,
    };
    let index = first + number;
    option(index).filter(|option| option.key == key).map(|option| (index, option))
}

/// Returns the number of an option that a rule of any scope names.
#[inline(always)]
pub(crate) fn option_number(generation: u32, key: OptionKey) -> Option<u32> {
    // SAFETY: the agent does not write this map while it is in force.
    unsafe { OPTION_INDEX.get(index::slot_of(generation))?.get(key) }.copied()
}

#[inline(always)]
pub(crate) fn setting(index: u32) -> Option<&'static Setting> {
    row(&SETTINGS, index)
}

#[inline(always)]
pub(crate) fn apply_list(scope: u32, point: u32) -> Option<&'static ApplyList> {
    let list = index::within(scope) * abi::apply_point::COUNT as u32 + point;
    row(&APPLY_LISTS, index::of(index::slot(scope), list))
}

#[inline(always)]
pub(crate) fn is_followed_process(id: u32) -> bool {
    // SAFETY: only the existence of the entry is tested.
    unsafe { PROCESSES.get(id) }.is_some()
}

#[inline(always)]
pub(crate) fn member(key: OptionKey) -> Option<&'static Member> {
    // SAFETY: the agent does not write this map while programs are attached.
    unsafe { MEMBERS.get(key) }
}

/// Counts a call, and its duration unless that is 0.
#[inline(always)]
pub(crate) fn tally(key: &TallyKey, failed: bool, duration_ns: u64) {
    let Some(tally) = TALLIES.get_ptr_mut(key).or_else(|| unknown_tally(key)).or_else(|| other_tally(key)) else {
        count_loss(LossesRef::tallies_full);
        return;
    };
    // SAFETY: the entry is valid while the program runs.
    let tally = unsafe { TallyRef::new(tally) };
    tally.calls().increment();
    if failed {
        tally.failed().increment();
    }
    if duration_ns != 0 {
        tally.total_ns().add(duration_ns);
        tally.bucket(bucket(duration_ns)).increment();
    }
}

#[inline(always)]
fn unknown_tally(key: &TallyKey) -> Option<*mut Tally> {
    UNKNOWN_TALLIES.get_ptr_mut(key).or_else(|| {
        // Fails if another CPU was first, which is fine, or if the map is full.
        let _ = UNKNOWN_TALLIES.insert(key, EMPTY_TALLY, BPF_NOEXIST.into());
        UNKNOWN_TALLIES.get_ptr_mut(key)
    })
}

#[inline(always)]
fn other_tally(key: &TallyKey) -> Option<*mut Tally> {
    TALLIES.get_ptr_mut(TallyKey { key: TallyKey::OTHER, ..*key })
}

/// The initial value of a tally. Static, because the stack has no room for it.
static EMPTY_TALLY: &Tally = &Tally { calls: 0, failed: 0, total_ns: 0, buckets: [0; abi::event::BUCKETS] };

/// Adds one to a counter of a setting.
#[inline(always)]
pub(crate) fn count(setting: u32, field: impl FnOnce(CountersRef) -> Cell) {
    // SAFETY: has no arguments.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let counters = index::of(index::slot(setting), index::within(setting) * CPUS.load() + cpu);
    if let Some(counters) = row_ptr(&COUNTERS, counters) {
        // SAFETY: the entry is valid while the program runs.
        field(unsafe { CountersRef::new(counters) }).increment();
    }
}

/// Adds one to a count of losses.
#[inline(always)]
pub(crate) fn count_loss(field: impl FnOnce(LossesRef) -> Cell) {
    if let Some(losses) = LOSSES.get_ptr_mut(0) {
        // SAFETY: as in `count`.
        field(unsafe { LossesRef::new(losses) }).increment();
    }
}

#[inline(always)]
fn call_slot(thread: u64) -> Option<SlotRef> {
    // SAFETY: the entry is valid while the program runs.
    CALLS.get_ptr_mut(Slot::index(thread)).map(|slot| unsafe { SlotRef::new(slot) })
}

/// Returns the record of the call that a thread is in. `thread` is the value of `bpf_get_current_pid_tgid`.
#[inline(always)]
pub(crate) fn call(thread: u64) -> Option<&'static mut Call> {
    let slot = call_slot(thread).filter(|slot| slot.thread().get() == thread)?;
    // SAFETY: the thread holds the slot, so no other thread accesses the record, and a thread is in one call at a time.
    Some(unsafe { &mut *slot.call() })
}

/// Returns the record of a thread's call, if its kind and option match. The exit of an earlier call may have been missed.
#[inline(always)]
pub(crate) fn call_matching(thread: u64, kind: u32, key: OptionKey) -> Option<&'static mut Call> {
    call(thread).filter(|call| call.kind == kind && call.key == key)
}

/// Reserves the slot of a thread that is in no call, if the slot is free. The caller sets [`Call::thread`].
#[inline(always)]
pub(crate) fn reserve_call(thread: u64) -> Option<&'static mut Call> {
    let slot = call_slot(thread)?;
    // If another thread holds the slot, `holders` does not change: the agent clears the slot of a thread that has exited.
    if slot.thread().get() == 0 {
        slot.holders().increment();
        if slot.holders().get() == 1 {
            // SAFETY: the thread now holds the slot, so no other thread accesses the record.
            return Some(unsafe { &mut *slot.call() });
        }
        slot.holders().add(1u64.wrapping_neg());
    }
    None
}

/// Removes the record of a thread's call.
#[inline(always)]
pub(crate) fn release_call(thread: u64) {
    let Some(slot) = call_slot(thread) else { return };
    slot.thread().set(0);
    slot.holders().add(1u64.wrapping_neg());
}

#[inline(always)]
pub(crate) fn limit(key: &LimitKey) -> Option<LimitRef> {
    // SAFETY: the entry is valid while the program runs. Evicted entries are not freed, but reused.
    RATE_LIMITS.get_ptr_mut(key).map(|limit| unsafe { LimitRef::new(limit) })
}

#[inline(always)]
pub(crate) fn insert_limit(key: &LimitKey, limit: &Limit) {
    // Fails only if another CPU holds the last free entries: the next event then counts as the first.
    let _ = RATE_LIMITS.insert(key, limit, 0);
}

/// Returns the notes of a socket without storage. Creates them if there are none.
#[inline(always)]
pub(crate) fn fallback_state(sk: u64) -> Option<*mut FallbackState> {
    existing_fallback_state(sk).or_else(|| {
        count_loss(LossesRef::no_storage);
        // Fails only if another CPU holds the last free entries.
        let _ = FALLBACK_STATES.insert(sk, NEW_FALLBACK_STATE, 0);
        existing_fallback_state(sk)
    })
}

/// Returns the notes of a socket without storage, if there are any.
#[inline(always)]
pub(crate) fn existing_fallback_state(sk: u64) -> Option<*mut FallbackState> {
    FALLBACK_STATES.get_ptr_mut(sk)
}

/// The initial notes of a socket without storage. Static, because the stack has no room for them.
static NEW_FALLBACK_STATE: &FallbackState = &FallbackState::NEW;

/// Returns the budget of a cgroup; `None` if another CPU holds the last free entries.
#[inline(always)]
pub(crate) fn cgroup_budget(cgroup: u64) -> Option<BudgetRef> {
    let budget = CGROUP_BUDGETS.get_ptr_mut(cgroup).or_else(|| {
        // Fails if another CPU was first, which is fine.
        let _ = CGROUP_BUDGETS.insert(cgroup, Budget { until_ns: 0 }, BPF_NOEXIST.into());
        CGROUP_BUDGETS.get_ptr_mut(cgroup)
    });
    // SAFETY: the entry is valid while the program runs. Evicted entries are not freed, but reused.
    budget.map(|budget| unsafe { BudgetRef::new(budget) })
}

/// Returns the budget of a target.
#[inline(always)]
pub(crate) fn target_budget(place: u32) -> Option<BudgetRef> {
    budget(place & (BUDGETS_MAX - 1))
}

/// Returns the budget of all targets that use less than their own rate (`is_quiet`), or that of all other targets.
#[inline(always)]
pub(crate) fn shared_budget(is_quiet: bool) -> Option<BudgetRef> {
    budget(if is_quiet { BUDGETS_MAX } else { BUDGETS_MAX + 1 })
}

#[inline(always)]
fn budget(index: u32) -> Option<BudgetRef> {
    // SAFETY: as in `cgroup_budget`.
    BUDGETS.get_ptr_mut(index).map(|budget| unsafe { BudgetRef::new(budget) })
}

#[inline(always)]
pub(crate) fn is_exe_sent(executable: &Executable) -> bool {
    // SAFETY: only the existence of the entry is tested.
    unsafe { EXES_SENT.get(executable) }.is_some()
}

#[inline(always)]
pub(crate) fn mark_exe_sent(executable: &Executable) {
    // Fails only if another CPU holds the last free entries: the path is then sent again.
    let _ = EXES_SENT.insert(executable, 1, 0);
}

/// Returns what the iterator does with sockets that have a job.
#[inline(always)]
pub(crate) fn iter_control() -> IterControl {
    ITER_CONTROL.get(0).copied().unwrap_or_default()
}

/// Returns the job of a socket, if it has one.
#[inline(always)]
pub(crate) fn job(cookie: u64, control: &IterControl) -> Option<&'static SocketJob> {
    for place in live::places(cookie, control.shift) {
        let job = JOBS.get(place)?;
        if job.cookie == cookie {
            return Some(job);
        }
        // A job is at the first place that was free.
        if job.cookie == 0 {
            return None;
        }
    }
    None
}

#[inline(always)]
pub(crate) fn list(index: u32) -> Option<&'static AssignmentList> {
    ASSIGNMENT_LISTS.get(index)
}

#[inline(always)]
pub(crate) fn assignment(index: u32) -> Option<&'static Assignment> {
    ASSIGNMENTS.get(index)
}

#[inline(always)]
pub(crate) fn outcome(index: u32) -> Option<*mut Outcome> {
    OUTCOMES.get_ptr_mut(index)
}

/// The prefix table of `abi::select`: the map of the generation to which the scope belongs.
pub(crate) struct PrefixMap {
    pub(crate) scope: u32,
}

impl Prefixes for PrefixMap {
    #[inline(always)]
    fn longest(&self, data: &PrefixData) -> Option<u64> {
        let prefixes = PREFIXES.get(index::slot(self.scope))?;
        let [low, high] = *prefixes.get(&Key::new(8 * size_of::<PrefixData>() as u32, *data))?;
        Some(u64::from(low) | u64::from(high) << 32)
    }
}
