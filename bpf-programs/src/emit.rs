//! The only writer of the ring buffer: builds events, holds back repeated ones, counts losses.

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

use crate::maps::{self, count, count_loss};

/// The task an event is about.
#[derive(Clone, Copy)]
pub(crate) struct Task {
    pub(crate) pid: u32,
    pub(crate) tid: u32,
    pub(crate) cgroup: u64,
    pub(crate) comm: [u8; COMM_LEN],
}

impl Task {
    /// Where nothing is known: the kernel runs sock_ops in whatever task it interrupted.
    pub(crate) const UNKNOWN: Self = Self { pid: 0, tid: 0, cgroup: 0, comm: [0; COMM_LEN] };

    /// The task that makes the call.
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

/// What every event says first.
#[derive(Clone, Copy)]
pub(crate) struct Head {
    pub(crate) key: OptionKey,
    /// See [`abi::event::call`].
    pub(crate) call: u32,
    /// See [`source`].
    pub(crate) source: u32,
    pub(crate) result: i64,
    /// How long the call took; 0 where that was not measured.
    pub(crate) duration_ns: u64,
}

/// Reports a call in conflict with the policy, unless one like it was reported just now. `executable` tells which the task
/// runs; `fill` writes the record.
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
        // Each call is wanted.
        if !has_room(|| place) {
            count_loss(|losses| &mut losses.ring_full);
            return;
        }
        0
    } else {
        let Some(suppressed) = admit(&key, config.event_interval_ns, task.cgroup, place) else {
            count(setting, |counters| &mut counters.suppressed);
            return;
        };
        suppressed
    };
    if send(head, kind::CONFLICT, task, executable(), suppressed, fill) {
        count(setting, |counters| &mut counters.reported);
    }
}

/// Reports a call that conflicts with nothing. There is no rate while the ring buffer has room: who asks for all calls gets them.
#[inline(always)]
pub(crate) fn call(
    head: Head,
    place: impl FnOnce() -> u32,
    task: Task,
    executable: impl FnOnce() -> Executable,
    fill: impl FnOnce(&mut Call),
) {
    if !has_room(place) {
        count_loss(|losses| &mut losses.ring_full);
        return;
    }
    let executable = executable();
    send(head, kind::CALL, task, executable, 0, fill);
}

/// Reports a setting that the kernel refused with `errno` on a socket of the target at a place.
#[inline(always)]
pub(crate) fn outcome(key: OptionKey, errno: i32, place: u32, fill: impl FnOnce(&mut Call)) {
    let Some(config) = maps::config() else { return };
    let limit = LimitKey { key, pid: place, verdict: errno as u32, what: u64::from(kind::OUTCOME) << 32 };
    if let Some(suppressed) = admit(&limit, config.event_interval_ns, 0, place) {
        let head = Head { key, call: 0, source: source::HOOK, result: -i64::from(errno), duration_ns: 0 };
        send(head, kind::OUTCOME, Task::UNKNOWN, Executable::default(), suppressed, fill);
    }
}

/// Whether an event of a task in `cgroup` (0: not known) and of the target at `place` may be sent now, and if so how many like it
/// were held back before it. What is over the budget is counted in [`abi::Losses::over_budget`].
///
/// Two CPUs may both find the interval over and both send, or one forget what the other has just
/// held back: this number is for people. [`abi::Counters::suppressed`] is exact.
#[inline(always)]
fn admit(key: &LimitKey, interval_ns: u64, cgroup: u64, place: u32) -> Option<u64> {
    // SAFETY: has no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let Some(limit) = maps::limit(key) else {
        // An event that is not sent takes no room from others.
        if spend_budgets(cgroup, place) == 0 {
            return None;
        }
        maps::begin_limit(key, &Limit { sent_ns: now, suppressed: 0 });
        return Some(0);
    };
    if now.wrapping_sub(limit.sent_ns) < interval_ns || spend_budgets(cgroup, place) == 0 {
        maps::increment(&mut limit.suppressed);
        return None;
    }
    limit.sent_ns = now;
    let suppressed = limit.suppressed;
    limit.suppressed = 0;
    Some(suppressed)
}

/// Takes an event from the budgets of a cgroup, a target and all; gives 0 where one of them has no room.
///
/// Many processes, and many cgroups, of one tenant use up the budget of its target, and no other's. A target that uses less than
/// its own rate shares the last budget with others that do, and not with those that use more.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn spend_budgets(cgroup: u64, place: u32) -> u32 {
    // SAFETY: has no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    if is_spent(cgroup, place, now) {
        return 1;
    }
    count_loss(|losses| &mut losses.over_budget);
    0
}

#[inline(always)]
fn is_spent(cgroup: u64, place: u32, now: u64) -> bool {
    // Where it has no entry, the budget of the target is enough.
    if cgroup != 0
        && let Some(budget) = maps::cgroup_budget(cgroup)
        && !spend(budget, Rate::CGROUP, now)
    {
        return false;
    }
    let Some(target) = maps::target_budget(place) else { return false };
    let is_quiet = target.is_full(now);
    if !spend(target, Rate::TARGET, now) {
        return false;
    }
    let rate = if is_quiet { Rate::QUIET } else { Rate::BUSY };
    maps::shared_budget(is_quiet).is_some_and(|shared| spend(shared, rate, now))
}

#[inline(always)]
fn spend(budget: &mut Budget, rate: Rate, now: u64) -> bool {
    if !budget.has_room(rate, now) {
        return false;
    }
    if budget.is_full(now) {
        budget.until_ns = now;
    }
    maps::add(&mut budget.until_ns, rate.interval_ns);
    true
}

/// Whether there is room for an event of a target that wants each. Of the last quarter of the ring buffer each target has a small
/// share, so that one that makes many calls leaves room for the others.
#[inline(always)]
fn has_room(place: impl FnOnce() -> u32) -> bool {
    if !is_under_pressure() {
        return true;
    }
    // SAFETY: has no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    maps::target_budget(place()).is_some_and(|target| spend(target, Rate::PRESSURE, now))
}

/// Whether the last quarter of the ring buffer is in use.
#[inline(always)]
fn is_under_pressure() -> bool {
    let size = maps::EVENTS.query(BPF_RB_RING_SIZE.into());
    maps::EVENTS.query(BPF_RB_AVAIL_DATA.into()) > size - size / 4
}

/// Builds the event where it will be read: the stack has no room for it, and nothing is built that is not sent. `fill`
/// writes all of the record, but for what `head` says.
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
        count_loss(|losses| &mut losses.ring_full);
        return false;
    };
    let event = entry.as_mut_ptr();
    // SAFETY: the entry is ours until it is submitted, and has room for an event; whatever lies there is valid for each of
    // its fields, and is written over below.
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
    entry.submit(if kind == kind::CALL { wakeup() } else { 0 });
    true
}

/// Whether the agent is to be woken for a call. That takes longer than all the rest; so it looks for calls by itself from time
/// to time, and is woken only where they come so fast that they would not all have room until then.
#[inline(always)]
fn wakeup() -> u64 {
    if maps::EVENTS.query(BPF_RB_AVAIL_DATA.into()) > maps::EVENTS.query(BPF_RB_RING_SIZE.into()) / 8 {
        BPF_RB_FORCE_WAKEUP.into()
    } else {
        BPF_RB_NO_WAKEUP.into()
    }
}

/// Tells the agent which file an executable is. Events of it are to come after this.
#[inline(always)]
pub(crate) fn executable_file(executable: &Executable, fill: impl FnOnce(&mut ExecutableFile)) {
    // Not counted where the ring buffer is full: the event says that it is missing, and the next one tries again.
    if is_under_pressure() {
        return;
    }
    let Some(mut entry) = maps::EVENTS.reserve::<ExecutableFile>(0) else { return };
    let file = entry.as_mut_ptr();
    // SAFETY: the entry is ours until it is submitted, has room for a file, and whatever lies there is valid for each of its
    // fields; of the names no more counts than is written.
    let file = unsafe { &mut *file };
    file.executable = *executable;
    file.len = 0;
    fill(file);
    entry.submit(0);
    maps::mark_exe_sent(executable);
}

/// Whether a call was found in conflict.
#[inline(always)]
pub(crate) fn is_conflict(call: &Call) -> bool {
    call.flags & flags::DECIDED != 0 && call.verdict != u32::from(verdict::NONE)
}
