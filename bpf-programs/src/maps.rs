//! Every map: who writes it, who reads it, how large it is, and what happens when it is full.
//!
//! What policies say stands in tables of which there is a set for each generation of policies: inner maps that the agent makes
//! and fills, as large as it takes, before it puts them at the slot of the generation ([`abi::index`]) and, last, has
//! [`CONFIG`] name it. Nothing is written to them while they are in force, but for places and counters. An outer map has no
//! inner one at first, so that nothing is found. The sizes of inner maps here are placeholders.

use core::arch::asm;

use abi::{
    ApplyList, Config, Counters, FALLBACK_MAX, GENERATIONS, Losses, Target, TargetSlot,
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

/// A table of a generation, by index: rows of so many bytes. Inner arrays differ in length.
///
/// Bytes, because the kernel takes an inner map only if it may hold what the one declared here may: in 5.15 to 6.1 a
/// structure that it has a description of, as it has here, may hold what one without, as the agent's are, may not
/// (`timer_off` in `bpf_map_meta_equal`, kernel/bpf/map_in_map.c).
type Table<const BYTES: usize> =
    ArrayOfMaps<btf_maps::Array<[u8; BYTES], 1, { BPF_F_INNER_MAP as usize }>, { GENERATIONS as usize }>;

/// A table of a generation, by key.
type Dictionary<K, V> = ArrayOfMaps<btf_maps::HashMap<K, V, 1>, { GENERATIONS as usize }>;

/// Index 0. Written last: until then nothing is in force.
#[map(name = "sp_config")]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

/// By target: what holds there. The agent also writes to that in force, where a cgroup comes or goes.
#[btf_map(name = "sp_target_slots")]
static TARGET_SLOTS: Table<{ size_of::<TargetSlot>() }> = Table::new();

/// For the audit: the places of targets, by id of the cgroup. As `TARGET_SLOTS` in all else.
#[btf_map(name = "sp_cgroup_slots")]
static CGROUP_SLOTS: Dictionary<u64, u32> = Dictionary::new();

/// By scope: the small dimensions of the rules' matches.
#[btf_map(name = "sp_selectors")]
static SELECTORS: Table<{ size_of::<Selectors>() }> = Table::new();

/// Rules by scope and prefix of a port or an address. In halves: behind a key of this length the kernel does not align to more.
#[btf_map(name = "sp_prefixes")]
static PREFIXES: ArrayOfMaps<btf_maps::LpmTrie<PrefixData, [u32; 2], 1>, { GENERATIONS as usize }> = ArrayOfMaps::new();

/// By scope, and in each by number: the options that rules name; those that can be set come first.
#[btf_map(name = "sp_options")]
static OPTIONS: Table<{ size_of::<OptionRow>() }> = Table::new();

/// From an option's level and name to the number that it has in each scope. [`Config::numbers`] has most of them too.
#[btf_map(name = "sp_option_index")]
static OPTION_INDEX: Dictionary<OptionKey, u32> = Dictionary::new();

/// What each rule says about each option it names.
#[btf_map(name = "sp_settings")]
static SETTINGS: Table<{ size_of::<Setting>() }> = Table::new();

/// What to apply where: by scope, and in each by [`abi::site`].
#[btf_map(name = "sp_apply_lists")]
static APPLY_LISTS: Table<{ size_of::<ApplyList>() }> = Table::new();

/// By setting, and for each by CPU: written by the programs, read by the agent. No per-CPU array, for inner maps of that kind
/// must all have the same length.
#[btf_map(name = "sp_counters")]
static COUNTERS: Table<{ size_of::<Counters>() }> = Table::new();

/// Possible CPUs: how many [`COUNTERS`] a setting has. Given by the agent at load.
#[unsafe(no_mangle)]
static CPUS: Global<u32> = Global::new(1);

/// By target and hook: written by the agent when it has attached the programs there. The kernel makes an entry, full of
/// zeroes, when a program is attached, and hands it to the program that it runs for that cgroup. What is said to have come
/// in its place (BPF_MAP_TYPE_CGRP_STORAGE, 6.2) goes by the cgroup of the current task.
#[map(name = "sp_targets")]
#[expect(deprecated, reason = "nothing else tells a program where it is attached")]
static TARGETS: maps::CgroupStorage<Target> = maps::CgroupStorage::new();

/// Ids of the processes that the audit follows, if [`Config::by_process`] says so; the value means nothing. The agent gives it
/// its size at load.
#[map(name = "sp_processes")]
static PROCESSES: HashMap<u32, u32> = HashMap::with_max_entries(1, 0);

/// Where sockets keep the values of options. As `PROCESSES`.
#[map(name = "sp_members")]
static MEMBERS: HashMap<OptionKey, Member> = HashMap::with_max_entries(1, 0);

/// Index 0: written by the programs, read by the agent in its own memory. It asks often, and while a task is in bpf(2) for the
/// contents of a map, the kernel runs no kprobes and tracepoints on that CPU (`bpf_disable_instrumentation`). All CPUs share
/// it, for little is ever lost.
#[map(name = "sp_losses")]
static LOSSES: Array<Losses> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Calls under way, by thread ([`Slot::index`]). Begun at entry, or by a hook that finds a conflict; ended at exit. Where another
/// thread is in the same place, the call is decided all the same, but reported without its result; counted in
/// [`Losses::calls_full`].
///
/// An array, which programs look into without a call: most callers have nothing there.
#[map(name = "sp_calls")]
static CALLS: Array<Slot> = Array::with_max_entries(CALLS_MAX, 0);

/// Calls seen by the audit, by option: those that have a name or that a rule names, and [`TallyKey::OTHER`]. The agent makes the
/// entries and gives the map its size at load; the programs add no entry, so applications cannot fill it.
#[map(name = "sp_tallies")]
static TALLIES: PerCpuHashMap<TallyKey, Tally> = PerCpuHashMap::with_max_entries(1, 0);

/// Calls seen by the audit on other options, whose numbers applications choose. When it is full, calls on further options are
/// counted under [`TallyKey::OTHER`].
#[map(name = "sp_unk_tallies")]
static UNKNOWN_TALLIES: PerCpuHashMap<TallyKey, Tally> = PerCpuHashMap::with_max_entries(UNKNOWN_TALLIES_MAX, 0);

/// When each kind of conflict was last reported. The least recently used entry makes room: its
/// next event is then sent as if it were the first.
#[map(name = "sp_rate_limits")]
static RATE_LIMITS: LruHashMap<LimitKey, Limit> = LruHashMap::with_max_entries(8192, 0);

/// By the id of a cgroup: the events that its tasks caused. The least recently used entry makes room: its cgroup then has a full
/// budget, within that of its target.
#[map(name = "sp_cg_budgets")]
static CGROUP_BUDGETS: LruHashMap<u64, Budget> = LruHashMap::with_max_entries(4096, 0);

/// By place of a target: the events that it caused. Behind them, those of all.
#[map(name = "sp_budgets")]
static BUDGETS: Array<Budget> = Array::with_max_entries(BUDGETS_MAX + 2, 0);

/// Executables whose files the agent has been told. The agent removes those that it has forgotten. The least recently used entry makes room: it is told again.
#[map(name = "sp_exes_sent")]
static EXES_SENT: LruHashMap<Executable, u32> = LruHashMap::with_max_entries(EXES_SENT_MAX, 0);

/// The notes of sockets for whose storage the kernel has no memory, by the socket's address in the kernel: written and read by
/// the programs only. The least recently used notes make room. New notes are counted in [`Losses::no_storage`].
#[map(name = "sp_fallback")]
static FALLBACK_STATES: LruHashMap<u64, FallbackState> = LruHashMap::with_max_entries(FALLBACK_MAX, 0);

/// Index 0: what is done with live sockets that have a job. This map and the four after it are the agent's, which gives them their
/// sizes at load where it is to bring live sockets in line, and writes them before each step.
#[map(name = "sp_iter_control")]
static ITER_CONTROL: Array<IterControl> = Array::with_max_entries(1, 0);

/// What is to be done with sockets, at their [`live::places`]: written by the agent in its own memory.
#[map(name = "sp_jobs")]
static JOBS: Array<SocketJob> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map(name = "sp_assign_lists")]
static ASSIGNMENT_LISTS: Array<AssignmentList> = Array::with_max_entries(1, 0);

#[map(name = "sp_assignments")]
static ASSIGNMENTS: Array<Assignment> = Array::with_max_entries(1, 0);

/// What came of the jobs: written by the program, read by the agent in its own memory.
#[map(name = "sp_outcomes")]
static OUTCOMES: Array<Outcome> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Events for the agent, and the files of executables. When it is full the event is dropped and counted in
/// [`Losses::ring_full`].
#[map(name = "sp_events")]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// The configuration, if the policies are in force.
#[inline(always)]
pub(crate) fn config() -> Option<&'static Config> {
    CONFIG.get(0).filter(|config| config.in_force != 0)
}

/// The cgroup that the program is attached to.
#[inline(always)]
pub(crate) fn target() -> &'static Target {
    // SAFETY: never NULL (`bpf_get_local_storage`, kernel/bpf/cgroup.c), and there for as long as the program runs. The agent
    // puts another in its place rather than write to it.
    unsafe { &*TARGETS.get_ptr_mut() }
}

/// What stands at a number ([`abi::index`]) in tables of this kind.
#[inline(always)]
fn row<T, const BYTES: usize>(tables: &'static Table<BYTES>, index: u32) -> Option<&'static T> {
    // SAFETY: an inner map stays as it is while a program uses it, and values of all types that are shared are valid whatever
    // their bytes. To the counters, which change, there is no reference of this kind.
    row_ptr(tables, index).map(|row| unsafe { &*row })
}

#[inline(always)]
fn row_ptr<T, const BYTES: usize>(tables: &'static Table<BYTES>, index: u32) -> Option<*mut T> {
    // The kernel aligns values to eight bytes.
    const { assert!(BYTES == size_of::<T>() && align_of::<T>() <= 8) };
    tables.get_value_ptr_mut(index::slot(index), &index::within(index)).map(|bytes| bytes.cast())
}

/// What holds in a generation on a target, if it is one there.
#[inline(always)]
pub(crate) fn target_slot(generation: u32, target: &Target) -> Option<&'static TargetSlot> {
    slot_at(generation, target.place).filter(|place| place.id == target.id)
}

/// The place of a cgroup, if it is a target: for those who do not run for it.
#[inline(always)]
pub(crate) fn cgroup_slot(generation: u32, cgroup: u64) -> Option<u32> {
    // SAFETY: where the agent removes an entry another may take its room at once: then it is another target's place.
    unsafe { CGROUP_SLOTS.get(index::slot_of(generation))?.get(&cgroup) }.copied()
}

/// What holds in a generation at a place.
#[inline(always)]
pub(crate) fn slot_at(generation: u32, place: u32) -> Option<&'static TargetSlot> {
    row(&TARGET_SLOTS, index::of(generation, place)).filter(|place: &&TargetSlot| place.id != 0)
}

#[inline(always)]
pub(crate) fn selectors(scope: u32) -> Option<&'static Selectors> {
    row(&SELECTORS, scope)
}

#[inline(always)]
pub(crate) fn option(index: u32) -> Option<&'static OptionRow> {
    row(&OPTIONS, index)
}

/// The option of a scope that a call is about, if rules of the generation name it, and its index. `first` is that of the scope's
/// first option.
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

/// The number of an option that a rule of any scope names.
#[inline(always)]
pub(crate) fn option_number(generation: u32, key: OptionKey) -> Option<u32> {
    // SAFETY: the agent does not write this map while it is in force.
    unsafe { OPTION_INDEX.get(index::slot_of(generation))?.get(&key) }.copied()
}

#[inline(always)]
pub(crate) fn setting(index: u32) -> Option<&'static Setting> {
    row(&SETTINGS, index)
}

#[inline(always)]
pub(crate) fn apply_list(scope: u32, site: u32) -> Option<&'static ApplyList> {
    let list = index::within(scope) * abi::apply_point::COUNT as u32 + site;
    row(&APPLY_LISTS, index::of(index::slot(scope), list))
}

#[inline(always)]
pub(crate) fn is_process(id: u32) -> bool {
    // SAFETY: only whether there is an entry is looked at.
    unsafe { PROCESSES.get(id) }.is_some()
}

#[inline(always)]
pub(crate) fn member(key: OptionKey) -> Option<&'static Member> {
    // SAFETY: the agent does not write this map while programs are attached.
    unsafe { MEMBERS.get(key) }
}

/// Counts a call, and how long it took unless that is 0.
#[inline(always)]
pub(crate) fn tally(key: &TallyKey, failed: bool, duration_ns: u64) {
    let Some(tally) = TALLIES.get_ptr_mut(key).or_else(|| unknown_tally(key)).or_else(|| other_tally(key)) else {
        count_loss(|losses| &mut losses.tallies_full);
        return;
    };
    // SAFETY: as in `count`.
    let tally = unsafe { &mut *tally };
    increment(&mut tally.calls);
    if failed {
        increment(&mut tally.failed);
    }
    if duration_ns != 0 {
        add(&mut tally.total_ns, duration_ns);
        // The verifier wants to see that this is within the bounds.
        increment(&mut tally.buckets[bucket(duration_ns) & (abi::event::BUCKETS - 1)]);
    }
}

#[inline(always)]
fn unknown_tally(key: &TallyKey) -> Option<*mut Tally> {
    UNKNOWN_TALLIES.get_ptr_mut(key).or_else(|| {
        // Fails where another CPU was first, and that is as good; or where it is full.
        let _ = UNKNOWN_TALLIES.insert(key, NO_CALLS, BPF_NOEXIST.into());
        UNKNOWN_TALLIES.get_ptr_mut(key)
    })
}

#[inline(always)]
fn other_tally(key: &TallyKey) -> Option<*mut Tally> {
    TALLIES.get_ptr_mut(TallyKey { key: TallyKey::OTHER, ..*key })
}

/// What a tally begins with. Not on the stack, which has no room for it.
static NO_CALLS: &Tally = &Tally { calls: 0, failed: 0, total_ns: 0, buckets: [0; abi::event::BUCKETS] };

/// Adds one to a counter of a setting.
#[inline(always)]
pub(crate) fn count(setting: u32, field: impl FnOnce(&mut Counters) -> &mut u64) {
    // SAFETY: has no arguments.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let counters = index::of(index::slot(setting), index::within(setting) * CPUS.load() + cpu);
    if let Some(counters) = row_ptr(&COUNTERS, counters) {
        // SAFETY: the slot is valid for as long as the program runs.
        increment(field(unsafe { &mut *counters }));
    }
}

/// Adds one to a count of losses.
#[inline(always)]
pub(crate) fn count_loss(field: impl FnOnce(&mut Losses) -> &mut u64) {
    if let Some(losses) = LOSSES.get_ptr_mut(0) {
        // SAFETY: as in `count`.
        increment(field(unsafe { &mut *losses }));
    }
}

/// Adds one atomically. Per-CPU slots need it too: a program that runs for a task can be preempted
/// by another task's, and interrupted by sock_ops in softirq, on the same CPU.
///
/// In assembly because the target declares no compare-and-swap (its first instruction set had
/// none), for which `core` withholds `fetch_add` as well; the kernel has always had this one.
#[inline(always)]
pub(crate) fn increment(counter: &mut u64) {
    add(counter, 1);
}

/// Adds to a counter atomically.
#[inline(always)]
pub(crate) fn add(counter: &mut u64, amount: u64) {
    // SAFETY: valid and aligned, being a reference; all who write it do so with this instruction.
    unsafe {
        asm!(
            "lock *(u64 *)({counter} + 0) += {amount}",
            counter = in(reg) counter,
            amount = in(reg) amount,
        );
    }
}

#[inline(always)]
fn slot(thread: u64) -> Option<&'static mut Slot> {
    // SAFETY: what it holds is written by the one thread that is its holder, and that is in one call at a time.
    CALLS.get_ptr_mut(Slot::index(thread)).map(|slot| unsafe { &mut *slot })
}

/// The call that a thread is in, by what `bpf_get_current_pid_tgid` says of it.
#[inline(always)]
pub(crate) fn call(thread: u64) -> Option<&'static mut Call> {
    slot(thread).map(|slot| &mut slot.call).filter(|call| call.thread == thread)
}

/// The same, if it is the call of this kind on this option: the end of another may not have been seen.
#[inline(always)]
pub(crate) fn call_of(thread: u64, kind: u32, key: OptionKey) -> Option<&'static mut Call> {
    call(thread).filter(|call| call.kind == kind && call.key == key)
}

/// Room for the call of a thread that is in none, if there is any. Whoever is given it sets [`Call::thread`].
#[inline(always)]
pub(crate) fn begin_call(thread: u64) -> Option<&'static mut Call> {
    let slot = slot(thread)?;
    // Where another is, nobody comes and goes: the agent clears the slot of one that is gone.
    if slot.call.thread == 0 {
        increment(&mut slot.holders);
        // SAFETY: a reference, read anew.
        if unsafe { (&raw const slot.holders).read_volatile() } == 1 {
            return Some(&mut slot.call);
        }
        add(&mut slot.holders, 1u64.wrapping_neg());
    }
    None
}

/// Ends the call that a thread is in.
#[inline(always)]
pub(crate) fn end_call(thread: u64) {
    let Some(slot) = slot(thread) else { return };
    slot.call.thread = 0;
    add(&mut slot.holders, 1u64.wrapping_neg());
}

#[inline(always)]
pub(crate) fn limit(key: &LimitKey) -> Option<&'static mut Limit> {
    // SAFETY: a race between CPUs can at worst send an event too many; see `emit`.
    RATE_LIMITS.get_ptr_mut(key).map(|limit| unsafe { &mut *limit })
}

#[inline(always)]
pub(crate) fn begin_limit(key: &LimitKey, limit: &Limit) {
    // Fails only where another CPU holds the last free entries: the next event counts as a first.
    let _ = RATE_LIMITS.insert(key, limit, 0);
}

/// The notes of a socket without storage, made if there are none.
#[inline(always)]
pub(crate) fn fallback_state(sk: u64) -> Option<&'static mut FallbackState> {
    existing_fallback_state(sk).or_else(|| {
        count_loss(|losses| &mut losses.no_storage);
        // Fails only where another CPU holds the last free entries.
        let _ = FALLBACK_STATES.insert(sk, NO_NOTES, 0);
        existing_fallback_state(sk)
    })
}

/// The notes of a socket without storage, if there are any.
#[inline(always)]
pub(crate) fn existing_fallback_state(sk: u64) -> Option<&'static mut FallbackState> {
    // SAFETY: two CPUs that write it at once can at worst lose a note.
    FALLBACK_STATES.get_ptr_mut(sk).map(|unstored| unsafe { &mut *unstored })
}

/// What the notes of a socket without storage begin with. Not on the stack, which has no room for it.
static NO_NOTES: &FallbackState = &FallbackState::NEW;

/// The budget of a cgroup; `None` where another CPU holds the last free entries.
#[inline(always)]
pub(crate) fn cgroup_budget(cgroup: u64) -> Option<&'static mut Budget> {
    let budget = CGROUP_BUDGETS.get_ptr_mut(cgroup).or_else(|| {
        // Fails where another CPU was first, and that is as good.
        let _ = CGROUP_BUDGETS.insert(cgroup, Budget { until_ns: 0 }, BPF_NOEXIST.into());
        CGROUP_BUDGETS.get_ptr_mut(cgroup)
    });
    // SAFETY: a race between CPUs can at worst send an event too many; see `emit`.
    budget.map(|budget| unsafe { &mut *budget })
}

/// The budget of a target.
#[inline(always)]
pub(crate) fn target_budget(place: u32) -> Option<&'static mut Budget> {
    budget(place & (BUDGETS_MAX - 1))
}

/// The budget of all targets that use less than their own rate, or that of the others.
#[inline(always)]
pub(crate) fn shared_budget(is_quiet: bool) -> Option<&'static mut Budget> {
    budget(if is_quiet { BUDGETS_MAX } else { BUDGETS_MAX + 1 })
}

#[inline(always)]
fn budget(index: u32) -> Option<&'static mut Budget> {
    // SAFETY: as in `cgroup_budget`.
    BUDGETS.get_ptr_mut(index).map(|budget| unsafe { &mut *budget })
}

#[inline(always)]
pub(crate) fn is_exe_sent(executable: &Executable) -> bool {
    // SAFETY: only whether there is an entry is looked at.
    unsafe { EXES_SENT.get(executable) }.is_some()
}

#[inline(always)]
pub(crate) fn mark_exe_sent(executable: &Executable) {
    // Fails only where another CPU holds the last free entries: it will be told again.
    let _ = EXES_SENT.insert(executable, 1, 0);
}

/// What is to be done with live sockets.
#[inline(always)]
pub(crate) fn iter_control() -> IterControl {
    ITER_CONTROL.get(0).copied().unwrap_or_default()
}

/// What is to be done with a socket.
#[inline(always)]
pub(crate) fn job(cookie: u64, turn: &IterControl) -> Option<&'static SocketJob> {
    for place in live::places(cookie, turn.shift) {
        let job = JOBS.get(place)?;
        if job.cookie == cookie {
            return Some(job);
        }
        // A job stands at the first free one.
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
pub(crate) fn outcome(index: u32) -> Option<&'static mut Outcome> {
    // SAFETY: each outcome is one socket's, which is visited by one CPU at a time.
    OUTCOMES.get_ptr_mut(index).map(|outcome| unsafe { &mut *outcome })
}

/// The table of `abi::select`, as a map, of the generation that a scope is of.
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
