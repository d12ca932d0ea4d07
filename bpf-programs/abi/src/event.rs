//! The records that the programs send to the agent through the ring buffer: [`Event`], and before the first event of an
//! executable its [`ExecutableFile`].

use crate::{
    setting::{OptionKey, Value},
    shared,
    socket::Facts,
};

/// Length of a task's name with its NUL (`TASK_COMM_LEN`).
pub const COMM_LEN: usize = 16;

/// Values of [`Call::kind`].
pub mod call {
    pub const SETSOCKOPT: u32 = 1;
    pub const GETSOCKOPT: u32 = 2;
}

/// Bits of [`Call::flags`].
pub mod flags {
    /// `facts` are filled in.
    pub const SOCKET: u32 = 1;
    /// Setting number [`super::Call::setting`] decided the call.
    pub const DECIDED: u32 = 2;
    /// `before` was read from the socket.
    pub const VALUE_BEFORE: u32 = 4;
    /// `requested` could not be read from the caller's memory.
    pub const UNREADABLE: u32 = 8;
    /// `current` was read from the socket.
    pub const VALUE_CURRENT: u32 = 16;
    /// `optval` is an address in kernel memory.
    pub const OPTVAL_IN_KERNEL: u32 = 32;
    /// `optlen` is an address in kernel memory.
    pub const OPTLEN_IN_KERNEL: u32 = 64;
    /// The kernel holds the socket `sk` at this moment.
    pub const HELD: u32 = 128;
    /// Made by a 32-bit program, whose calls the cgroup hooks do not see.
    pub const COMPAT: u32 = 256;
    /// Made by io_uring.
    pub const RING: u32 = 512;
    /// Made by the system call of that name: known not to be COMPAT or RING.
    pub const SYSCALL: u32 = 1024;
    /// The socket's own fields were read.
    pub const VALUES_READ: u32 = 2048;
    /// The record was created before the kernel looked up the socket, and is removed after the kernel releases it.
    pub const OUTER: u32 = 4096;
    /// Everything that can be read was read.
    pub const COMPLETE: u32 = 8192;
    /// A cgroup hook created the record ([`crate::audit::ENDS`]).
    pub const HOOKED: u32 = 16384;
    /// The audit judges the call: no cgroup hook does.
    pub const UNHOOKED: u32 = 32768;
}

/// One setsockopt or getsockopt call. The audit creates the record at the entry, or the cgroup hook does. The hook completes
/// it, and the audit reports it at the exit.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Call {
    /// Address of the argument.
    pub optval: u64,
    /// getsockopt: address of the argument's length. setsockopt: the length.
    pub optlen: u64,
    /// Address of the kernel's `struct sock`; 0 if unknown.
    pub sk: u64,
    /// Address of the `struct file` of the descriptor at the entry, if nothing else leads to the socket; otherwise 0.
    pub file: u64,
    /// When the call started, if calls are timed. CLOCK_MONOTONIC, nanoseconds.
    pub start_ns: u64,
    /// The thread that makes the call: process and thread, in the format of `bpf_get_current_pid_tgid`.
    pub thread: u64,
    /// The socket's cookie; 0 if unknown, or if the socket has none yet.
    pub cookie: u64,
    /// Id of the socket's cgroup; 0 if unknown.
    pub socket_cgroup: u64,
    pub key: OptionKey,
    /// See [`call`].
    pub kind: u32,
    /// See [`flags`].
    pub flags: u32,
    /// -1 if the call started with the socket.
    pub fd: i32,
    /// Index into map `SETTINGS`.
    pub setting: u32,
    /// See [`crate::judge::verdict`].
    pub verdict: u32,
    /// The socket's `sk_family` (AF_UNIX, AF_INET …); 0 if unknown.
    pub sk_family: u32,
    /// [`crate::Target::place`] of the target whose policies decided; undefined without [`flags::DECIDED`].
    pub place: u32,
    pub _pad: u32,
    /// The value that the application requested; for getsockopt, the value that it got.
    pub requested: Value,
    /// The value that the policy wants.
    pub wanted: Value,
    /// The value that the kernel got in place of `requested`, if any.
    pub applied: Value,
    /// The value before the call, if it could be read.
    pub before: Value,
    /// The value after the call, if it could be read.
    pub current: Value,
    pub facts: Facts,
}
shared!(Call, size 8 * 8 + 8 + 8 * 4 + 5 * 24 + 40);

impl Call {
    /// Returns whether the call is reported at its exit, if `calls` are requested ([`crate::calls`]).
    #[inline(always)]
    #[must_use]
    pub fn should_report(&self, calls: u32) -> bool {
        calls != crate::calls::CONFLICTS || self.flags & (flags::DECIDED | flags::UNHOOKED) != 0
    }
}

/// Entries of map `CALLS`. Two threads whose numbers are equal modulo this cannot both be followed at a time. A power of two.
pub const CALLS_MAX: u32 = 1 << CALLS_BITS;
const CALLS_BITS: u32 = 13;

/// The slot for the call that a thread is in. Map `CALLS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Slot {
    /// How many threads have reserved the slot. If 1, `call` belongs to the thread in [`Call::thread`]. If two threads
    /// reserve a slot at the same time, both may withdraw.
    pub holders: u64,
    pub call: Call,
}
shared!(Slot, size 8 + size_of::<Call>());

impl Slot {
    /// Returns the slot of a thread's call. Threads that run at the same time often have consecutive numbers. Their slots are
    /// far apart, so that CPUs share no cache line.
    #[inline(always)]
    #[must_use]
    pub fn index(thread: u64) -> u32 {
        let number = thread as u32 & (CALLS_MAX - 1);
        (number << (CALLS_BITS - 3) | number >> 3) & (CALLS_MAX - 1)
    }
}

/// Values of [`Event::kind`].
pub mod kind {
    /// A call that conflicts with the policy.
    pub const CONFLICT: u32 = 1;
    /// A call without a conflict, requested by [`crate::Config::calls`].
    pub const CALL: u32 = 2;
    /// A setting that the kernel refused on a socket: `result` is the negative errno; `call` has the option, the setting and
    /// the socket. No task: the kernel may have run in any task.
    pub const OUTCOME: u32 = 3;
}

/// Values of [`Event::source`].
pub mod source {
    /// A cgroup hook, without the audit: the call's result is unknown.
    pub const HOOK: u32 = 1;
    pub const TRACEPOINT: u32 = 2;
    pub const KPROBE: u32 = 3;
    pub const FENTRY: u32 = 4;
}

/// A report of one call or one outcome.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// CLOCK_MONOTONIC, nanoseconds.
    pub time_ns: u64,
    /// Id of the task's cgroup; 0 if unknown.
    pub cgroup: u64,
    /// The call's return value: 0, or -errno. Unknown if `source` is [`source::HOOK`].
    pub result: i64,
    /// Similar events that the rate limit suppressed since the last one that was sent.
    pub suppressed: u64,
    /// How long the call took, if calls are timed; otherwise 0. Nanoseconds.
    pub duration_ns: u64,
    /// See [`kind`].
    pub kind: u32,
    /// See [`source`].
    pub source: u32,
    /// Process (thread group); 0 if unknown.
    pub pid: u32,
    /// Thread; 0 if unknown.
    pub tid: u32,
    pub comm: [u8; COMM_LEN],
    /// Zero if unknown.
    pub executable: Executable,
    pub call: Call,
}
shared!(Event, size 5 * 8 + 4 * 4 + 16 + size_of::<Executable>() + size_of::<Call>());

/// An executable that a process runs: different for each process, and before and after exec.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Executable {
    /// When the process was created. CLOCK_BOOTTIME, nanoseconds.
    pub start_ns: u64,
    pub pid: u32,
    /// How many calls of exec led to the executable, including those of parent processes.
    pub exec_id: u32,
}
shared!(Executable, size 8 + 4 + 4);

/// Entries of map `EXES_SENT`: executables whose path the agent must remember.
pub const EXES_SENT_MAX: u32 = 4096;

/// The longest path that is sent, with its NULs.
pub const PATH_MAX: usize = 1024;
/// The longest name in a path, with its NUL (`NAME_MAX` and 1).
pub const NAME_MAX: usize = 256;

/// The file of an executable. In the ring buffer before the first event of the executable.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ExecutableFile {
    pub executable: Executable,
    /// Bytes of `names`; 0 if the path is too long or unknown.
    pub len: u64,
    /// The names in the path, the last one first, each followed by a NUL.
    pub names: [u8; PATH_MAX + NAME_MAX],
}
shared!(ExecutableFile, size size_of::<Executable>() + 8 + PATH_MAX + NAME_MAX);

/// Events with the same key share a rate limit. Key of map `RATE_LIMITS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitKey {
    pub key: OptionKey,
    /// The process; if it is unknown, [`crate::Target::place`].
    pub pid: u32,
    pub verdict: u32,
    /// See [`kind`] and [`call`].
    pub what: u64,
}
shared!(LimitKey, size 8 + 4 + 4 + 8);

/// Value of map `RATE_LIMITS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Limit {
    /// When the last event was sent. CLOCK_MONOTONIC, nanoseconds.
    pub sent_ns: u64,
    /// Events suppressed since.
    pub suppressed: u64,
}
shared!(Limit, size 8 + 8);

/// The time until which the events of a cgroup, a target or all targets use up their [`Rate`]. Maps `CGROUP_BUDGETS` and
/// `BUDGETS`.
///
/// A bucket that fills at a steady rate, as one number (the generic cell rate algorithm, ITU-T I.371). Each event adds an
/// interval. An event is over the budget if the number is further ahead of the current time than a burst.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Budget {
    /// CLOCK_MONOTONIC, nanoseconds.
    pub until_ns: u64,
}
shared!(Budget, size 8);

impl Budget {
    /// Returns whether one more event is within the budget.
    #[inline(always)]
    #[must_use]
    pub fn has_room(&self, rate: Rate, now_ns: u64) -> bool {
        self.until_ns <= now_ns + rate.burst * rate.interval_ns
    }

    /// Returns whether the whole budget is available again.
    #[inline(always)]
    #[must_use]
    pub fn is_full(&self, now_ns: u64) -> bool {
        self.until_ns <= now_ns
    }
}

/// The rate of events of a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Time for one event in the long run. Nanoseconds.
    pub interval_ns: u64,
    /// Events at once.
    pub burst: u64,
}

impl Rate {
    const fn new(per_second: u64, burst: u64) -> Self {
        Self { interval_ns: 1_000_000_000 / per_second, burst }
    }

    /// For the tasks of one cgroup.
    pub const CGROUP: Self = Self::new(50, 500);
    /// For one target.
    pub const TARGET: Self = Self::new(100, 1000);
    /// For one target with every call requested, while the ring buffer has little room.
    pub const PRESSURE: Self = Self::new(100, 16);
    /// For all targets together that use less than their own rate.
    pub const QUIET: Self = Self::new(1000, 2000);
    /// For all other targets together.
    pub const BUSY: Self = Self::new(500, 2000);
}

/// Entries of map `BUDGETS`: targets whose slots are equal modulo this share one. A power of two. Two more entries are for
/// [`Rate::QUIET`] and [`Rate::BUSY`].
pub const BUDGETS_MAX: u32 = 4096;

/// Which calls a [`Tally`] counts. Key of maps `TALLIES` and `UNKNOWN_TALLIES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TallyKey {
    pub key: OptionKey,
    /// See [`call`].
    pub kind: u32,
    pub _pad: u32,
}
shared!(TallyKey, size 8 + 4 + 4);

impl TallyKey {
    /// Stands for all options without an entry of their own. The kernel has no option of this level.
    pub const OTHER: OptionKey = OptionKey { level: i32::MIN, name: i32::MIN };
}

/// Entries of map `UNKNOWN_TALLIES`.
pub const UNKNOWN_TALLIES_MAX: u32 = 256;

/// The number of durations that a [`Tally`] distinguishes.
pub const BUCKETS: usize = 32;

/// The calls of one kind on one option, seen by the audit. Maps `TALLIES` and `UNKNOWN_TALLIES`, one for each CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    pub calls: u64,
    /// Calls that returned an error.
    pub failed: u64,
    /// The sum of durations, if calls are timed. Nanoseconds.
    pub total_ns: u64,
    /// By duration, if calls are timed: bucket n counts calls of at least 2^n and less than 2^(n+1) nanoseconds. The first
    /// bucket also counts shorter calls, the last one longer calls.
    pub buckets: [u64; BUCKETS],
}
shared!(Tally, size 3 * 8 + 8 * BUCKETS);

impl Default for Tally {
    fn default() -> Self {
        Self { calls: 0, failed: 0, total_ns: 0, buckets: [0; BUCKETS] }
    }
}

/// Returns the bucket of [`Tally::buckets`] that counts calls of this duration.
#[inline(always)]
#[must_use]
pub fn bucket(duration_ns: u64) -> usize {
    // A binary search, because there is no instruction that counts leading zeros.
    let mut left = duration_ns;
    let mut bucket = 0;
    let mut half = 32;
    while half > 0 {
        if left >> half != 0 {
            left >>= half;
            bucket += half;
        }
        half /= 2;
    }
    if bucket < BUCKETS { bucket } else { BUCKETS - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_with_consecutive_numbers_have_separate_slots() {
        let mut is_taken = [false; CALLS_MAX as usize];
        for thread in 70_000..70_000 + u64::from(CALLS_MAX) {
            assert!(!core::mem::replace(&mut is_taken[Slot::index(thread) as usize], true), "{thread}");
        }
        assert!(Slot::index(70_000).abs_diff(Slot::index(70_001)) > 1);
    }

    #[test]
    fn bucket_is_the_power_of_two_below() {
        for (duration, expected) in
            [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (1023, 9), (1024, 10), (u64::from(u32::MAX), 31), (u64::MAX, 31)]
        {
            assert_eq!(bucket(duration), expected, "{duration}");
        }
    }
}
