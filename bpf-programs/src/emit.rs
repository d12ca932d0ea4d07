//! The only writer of the ring buffer: builds events, limits the rate of repeated events, counts losses.

use abi::{
    event::{Budget, COMM_LEN, Call, Event, Executable, ExecutableFile, Limit, LimitKey, Rate, flags, kind, source},
    judge::verdict,
    setting::OptionKey,
};
use aya_ebpf::{
    bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP, BPF_RB_RING_SIZE},
    helpers::{
        bpf_get_current_comm, bpf_get_current_pid_tgid,
        generated::{bpf_get_current_cgroup_id, bpf_ktime_get_ns},
    },
};

use crate::{
    maps::{self, count, count_loss},
    record::{BudgetRef, CountersRef, LossesRef},
};

/// The task that an event is about.
#[derive(Clone, Copy)]
pub(crate) struct Task {
    pub(crate) pid: u32,
    pub(crate) tid: u32,
    pub(crate) cgroup: u64,
    pub(crate) comm: [u8; COMM_LEN],
}

impl Task {
    /// An unknown task: the kernel runs sock_ops in whatever task it interrupted.
    pub(crate) const UNKNOWN: Self = Self { pid: 0, tid: 0, cgroup: 0, comm: [0; COMM_LEN] };

    /// Returns the task that makes the call.
    #[inline(always)]
    pub(crate) fn current() -> Self {
        let id = bpf_get_current_pid_tgid();
        Self {
            pid: (id >> 32) as u32,
            tid: id as u32,
            // SAFETY: has no arguments.
            cgroup: unsafe { bpf_get_current_cgroup_id() },
            comm: bpf_get_current_comm().unwrap_or_default(),
        }
    }
}

/// The fields that every event has.
#[derive(Clone, Copy)]
pub(crate) struct Head {
    pub(crate) key: OptionKey,
    /// See [`abi::event::call`].
    pub(crate) call: u32,
    /// See [`source`].
    pub(crate) source: u32,
    pub(crate) result: i64,
    /// How long the call took, in nanoseconds; 0 if not measured.
    pub(crate) duration_ns: u64,
}

/// Reports a call that conflicts with the policy, unless a similar call was reported within the interval. `executable`
/// returns the executable of the task; `fill` writes the record.
#[inline(always)]
pub(crate) fn conflict(
    head: Head,
    setting: u32,
    verdict: u32,
    place: u32,
    task: Task,
    executable: impl FnOnce() -> Executable,
    fill: impl FnOnce(&mut Call),
) {
    let Some(config) = maps::config() else { return };
    let key = LimitKey {
        key: head.key,
        pid: if task.pid != 0 { task.pid } else { place },
        verdict,
        what: (u64::from(kind::CONFLICT) << 32) | u64::from(head.call),
    };
    let suppressed = if config.event_interval_ns == 0 {
        // Every call is requested.
        if !has_room(|| place) {
            count_loss(LossesRef::ring_full);
            return;
        }
        0
    } else {
        let Some(suppressed) = admit(&key, config.event_interval_ns, task.cgroup, place) else {
            count(setting, CountersRef::suppressed);
            return;
        };
        suppressed
    };
    if send(head, kind::CONFLICT, task, executable(), suppressed, fill) {
        count(setting, CountersRef::reported);
    }
}

/// Reports a call without a conflict. There is no rate limit while the ring buffer has room: a user who requests all calls
/// gets them.
#[inline(always)]
pub(crate) fn call(
    head: Head,
    place: impl FnOnce() -> u32,
    task: Task,
    executable: impl FnOnce() -> Executable,
    fill: impl FnOnce(&mut Call),
) {
    if !has_room(place) {
        count_loss(LossesRef::ring_full);
        return;
    }
    let executable = executable();
    send(head, kind::CALL, task, executable, 0, fill);
}

/// Reports a setting that the kernel refused with `errno` on a socket of the target in slot `place`.
#[inline(always)]
pub(crate) fn outcome(key: OptionKey, errno: i32, place: u32, fill: impl FnOnce(&mut Call)) {
    let Some(config) = maps::config() else { return };
    let limit = LimitKey { key, pid: place, verdict: errno as u32, what: u64::from(kind::OUTCOME) << 32 };
    if let Some(suppressed) = admit(&limit, config.event_interval_ns, 0, place) {
        let head = Head { key, call: 0, source: source::HOOK, result: -i64::from(errno), duration_ns: 0 };
        send(head, kind::OUTCOME, Task::UNKNOWN, Executable::default(), suppressed, fill);
    }
}

/// Returns whether an event of a task in `cgroup` (0: unknown) and of the target in slot `place` may be sent now. If so,
/// returns how many similar events were suppressed before it. Events over the budget are counted in
/// [`abi::Losses::over_budget`].
///
/// Two CPUs may both find that the interval is over and both send. One CPU may also lose what the other has just counted.
/// This number is informational; [`abi::Counters::suppressed`] is exact.
#[inline(always)]
fn admit(key: &LimitKey, interval_ns: u64, cgroup: u64, place: u32) -> Option<u64> {
    // SAFETY: has no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let Some(limit) = maps::limit(key) else {
        // An event over the budget creates no entry, which would evict another.
        if spend_budgets(cgroup, place) == 0 {
            return None;
        }
        maps::insert_limit(key, &Limit { sent_ns: now, suppressed: 0 });
        return Some(0);
    };
    if now.wrapping_sub(limit.sent_ns().get()) < interval_ns || spend_budgets(cgroup, place) == 0 {
        limit.suppressed().increment();
        return None;
    }
    limit.sent_ns().set(now);
    let suppressed = limit.suppressed().get();
    limit.suppressed().set(0);
    Some(suppressed)
}

/// Takes one event from the budgets of a cgroup, a target and all targets. Returns 1, or 0 if one of the budgets is used up.
///
/// The processes and cgroups of one tenant can use up the budget of the tenant's target, and of no other target. A target
/// below its own rate shares the last budget only with other targets below their rate.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn spend_budgets(cgroup: u64, place: u32) -> u32 {
    // SAFETY: has no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    if spend_all(cgroup, place, now) {
        return 1;
    }
    count_loss(LossesRef::over_budget);
    0
}

#[inline(always)]
fn spend_all(cgroup: u64, place: u32, now: u64) -> bool {
    // If the cgroup has no entry, the budget of the target is enough.
    if cgroup != 0
        && let Some(budget) = maps::cgroup_budget(cgroup)
        && !spend(budget, Rate::CGROUP, now)
    {
        return false;
    }
    let Some(target) = maps::target_budget(place) else { return false };
    let is_quiet = used(target).is_full(now);
    if !spend(target, Rate::TARGET, now) {
        return false;
    }
    let rate = if is_quiet { Rate::QUIET } else { Rate::BUSY };
    maps::shared_budget(is_quiet).is_some_and(|shared| spend(shared, rate, now))
}

#[inline(always)]
fn spend(budget: BudgetRef, rate: Rate, now: u64) -> bool {
    let used = used(budget);
    if !used.has_room(rate, now) {
        return false;
    }
    if used.is_full(now) {
        budget.until_ns().set(now);
    }
    budget.until_ns().add(rate.interval_ns);
    true
}

#[inline(always)]
fn used(budget: BudgetRef) -> Budget {
    Budget { until_ns: budget.until_ns().get() }
}

/// Returns whether there is room for an event of a target for which every call is requested. Each target may use a small
/// share of the last quarter of the ring buffer: one that makes many calls leaves room for the others.
#[inline(always)]
fn has_room(place: impl FnOnce() -> u32) -> bool {
    if !is_under_pressure() {
        return true;
    }
    // SAFETY: has no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    maps::target_budget(place()).is_some_and(|target| spend(target, Rate::PRESSURE, now))
}

/// Returns whether the last quarter of the ring buffer is in use.
#[inline(always)]
fn is_under_pressure() -> bool {
    let size = maps::EVENTS.query(BPF_RB_RING_SIZE.into());
    maps::EVENTS.query(BPF_RB_AVAIL_DATA.into()) > size - size / 4
}

/// Builds the event in the ring buffer: the stack has no room for it, and an event that is not sent is not built. `fill`
/// writes the whole record, except what `head` contains.
#[inline(always)]
fn send(
    head: Head,
    kind: u32,
    task: Task,
    executable: Executable,
    suppressed: u64,
    fill: impl FnOnce(&mut Call),
) -> bool {
    let Some(mut entry) = maps::EVENTS.reserve::<Event>(0) else {
        count_loss(LossesRef::ring_full);
        return false;
    };
    let event = entry.as_mut_ptr();
    // SAFETY: until it is submitted, the entry belongs to this program, and it has room for an event. All fields are valid
    // for all bytes, and are overwritten below.
    let event = unsafe { &mut *event };
    // SAFETY: has no arguments.
    event.time_ns = unsafe { bpf_ktime_get_ns() };
    event.cgroup = task.cgroup;
    event.result = head.result;
    event.suppressed = suppressed;
    event.duration_ns = head.duration_ns;
    event.kind = kind;
    event.source = head.source;
    event.pid = task.pid;
    event.tid = task.tid;
    event.comm = task.comm;
    event.executable = executable;
    fill(&mut event.call);
    event.call.key = head.key;
    event.call.kind = head.call;
    entry.submit(if kind == kind::CALL { wakeup_flags() } else { 0 });
    true
}

/// Returns flags that decide whether to wake the agent for a call. A wake-up takes longer than everything else, and the agent
/// polls for calls. So it is woken only if calls come so fast that the buffer would fill up before the next poll.
#[inline(always)]
fn wakeup_flags() -> u64 {
    if maps::EVENTS.query(BPF_RB_AVAIL_DATA.into()) > maps::EVENTS.query(BPF_RB_RING_SIZE.into()) / 8 {
        BPF_RB_FORCE_WAKEUP.into()
    } else {
        BPF_RB_NO_WAKEUP.into()
    }
}

/// Sends the path of an executable to the agent. Events of the executable come after it.
#[inline(always)]
pub(crate) fn executable_file(executable: &Executable, fill: impl FnOnce(&mut ExecutableFile)) {
    // Not counted if the ring buffer is full: the event shows that the path is missing, and the next event tries again.
    if is_under_pressure() {
        return;
    }
    let Some(mut entry) = maps::EVENTS.reserve::<ExecutableFile>(0) else { return };
    let file = entry.as_mut_ptr();
    // SAFETY: until it is submitted, the entry belongs to this program, and it has room for a file. All fields are valid for
    // all bytes. `len` limits how many bytes of the names are read.
    let file = unsafe { &mut *file };
    file.executable = *executable;
    file.len = 0;
    fill(file);
    entry.submit(0);
    maps::mark_exe_sent(executable);
}

/// Returns whether a call was found in conflict.
#[inline(always)]
pub(crate) fn is_conflict(call: &Call) -> bool {
    call.flags & flags::DECIDED != 0 && call.verdict != u32::from(verdict::NONE)
}
