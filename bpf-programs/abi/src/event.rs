//! What the programs tell the agent through the ring buffer: [`Event`], and before the first one of an executable its
//! [`ExecutableFile`].

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
    /// The call was decided by setting number [`super::Call::setting`].
    pub const DECIDED: u32 = 2;
    /// `before` was read from the socket.
    pub const VALUE_BEFORE: u32 = 4;
    /// `requested` could not be read from the caller's memory.
    pub const UNREADABLE: u32 = 8;
    /// `now` was read from the socket.
    pub const VALUE_CURRENT: u32 = 16;
    /// `optval` is an address of the kernel's, not of the caller's.
    pub const OPTVAL_IN_KERNEL: u32 = 32;
    /// `optlen` is an address of the kernel's.
    pub const OPTLEN_IN_KERNEL: u32 = 64;
    /// The kernel holds the socket `sk` at this moment.
    pub const HELD: u32 = 128;
    /// Made by a 32-bit program, which the cgroup hooks do not see.
    pub const COMPAT: u32 = 256;
    /// Made through an io_uring.
    pub const RING: u32 = 512;
    /// Neither of these two: it is known that the call was made by the system call of its name.
    pub const SYSCALL: u32 = 1024;
    /// What the socket says of itself was read.
    pub const VALUES_READ: u32 = 2048;
    /// The record was begun before the kernel looked for the socket, and ends after it let go of it.
    pub const OUTER: u32 = 4096;
    /// All that there is to read has been.
    pub const COMPLETE: u32 = 8192;
    /// The record was begun by the cgroup's hook ([`crate::audit::ENDS`]).
    pub const HOOKED: u32 = 16384;
    /// The audit judges the call: no cgroup hook does.
    pub const UNHOOKED: u32 = 32768;
}

/// One setsockopt or getsockopt call on its way through the kernel: begun by the audit at the call's entry or by the cgroup's
/// hook, completed by that hook, reported at the call's exit.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Call {
    /// Address of the argument.
    pub optval: u64,
    /// getsockopt: address of the argument's length. setsockopt: the length itself.
    pub optlen: u64,
    /// Address of the kernel's `struct sock`; 0 if not known.
    pub sk: u64,
    /// Address of the `struct file` that the descriptor stood for when the call began, where nothing else leads to the
    /// socket; else 0.
    pub file: u64,
    /// When the call began, if calls are timed. CLOCK_MONOTONIC, nanoseconds.
    pub start_ns: u64,
    /// The thread that makes the call: process and thread as `bpf_get_current_pid_tgid` has them.
    pub thread: u64,
    /// The socket's cookie; 0 if not known, or if the socket has none yet.
    pub cookie: u64,
    /// Id of the socket's cgroup; 0 if not known.
    pub socket_cgroup: u64,
    pub key: OptionKey,
    /// See [`call`].
    pub kind: u32,
    /// See [`flags`].
    pub flags: u32,
    /// -1 where the call came with the socket itself.
    pub fd: i32,
    /// Index of map `SETTINGS`.
    pub setting: u32,
    /// See [`crate::judge::verdict`].
    pub verdict: u32,
    /// The socket's family as it calls it itself (AF_UNIX, AF_INET …); 0 if not known.
    pub sk_family: u32,
    /// [`crate::Target::place`] of the target whose policies decided; means nothing without [`flags::DECIDED`].
    pub place: u32,
    pub _pad: u32,
    /// What the application asked for; for getsockopt, what it was shown.
    pub requested: Value,
    /// What the policy wants.
    pub wanted: Value,
    /// What the kernel was given in place of `requested`, if anything.
    pub applied: Value,
    /// What the socket had before the call, if that could be read.
    pub before: Value,
    /// What the socket has after the call, if that could be read.
    pub current: Value,
    pub facts: Facts,
}
shared!(Call, size 8 * 8 + 8 + 8 * 4 + 5 * 24 + 40);

impl Call {
    /// Whether there is something to tell of the call when it has ended, where `wanted` are reported ([`crate::calls`]).
    #[inline(always)]
    #[must_use]
    pub fn should_report(&self, wanted: u32) -> bool {
        wanted != crate::calls::CONFLICTS || self.flags & (flags::DECIDED | flags::UNHOOKED) != 0
    }
}

/// Entries of map `CALLS`: threads whose numbers are the same but for multiples of it cannot both be followed at a time. A power
/// of two.
pub const CALLS_MAX: u32 = 1 << CALLS_BITS;
const CALLS_BITS: u32 = 13;

/// The room for the call that a thread is in. Map `CALLS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Slot {
    /// How many threads are here: 1 where `call` is that of the one which [`Call::thread`] names. Of two that come at once both
    /// may leave.
    pub holders: u64,
    pub call: Call,
}
shared!(Slot, size 8 + size_of::<Call>());

impl Slot {
    /// Where the call of a thread stands. Numbers that follow on one another, which threads that run at the same time often have,
    /// are far apart, so that CPUs share no cache line.
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
    /// A call that conflicts with nothing, wanted by [`crate::Config::calls`].
    pub const CALL: u32 = 2;
    /// A setting that the kernel refused on a socket: `result` is the negative errno, `call` names
    /// the option, the setting and the socket. No task: the kernel may have been in any.
    pub const OUTCOME: u32 = 3;
}

/// Values of [`Event::source`].
pub mod source {
    /// A cgroup hook, without the audit: the call's result is not known.
    pub const HOOK: u32 = 1;
    pub const TRACEPOINT: u32 = 2;
    pub const KPROBE: u32 = 3;
    pub const FENTRY: u32 = 4;
}

/// One report.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// CLOCK_MONOTONIC, nanoseconds.
    pub time_ns: u64,
    /// Id of the task's cgroup; 0 if not known.
    pub cgroup: u64,
    /// The call's return value: 0, or -errno. Not known where `source` is [`source::HOOK`].
    pub result: i64,
    /// Like events held back by the rate limit since the last one that was sent.
    pub suppressed: u64,
    /// How long the call took, if calls are timed; otherwise 0. Nanoseconds.
    pub duration_ns: u64,
    /// See [`kind`].
    pub kind: u32,
    /// See [`source`].
    pub source: u32,
    /// Process (thread group); 0 if not known.
    pub pid: u32,
    /// Thread; 0 if not known.
    pub tid: u32,
    pub comm: [u8; COMM_LEN],
    /// Zero if not known.
    pub executable: Executable,
    pub call: Call,
}
shared!(Event, size 5 * 8 + 4 * 4 + 16 + size_of::<Executable>() + size_of::<Call>());

/// An executable as a process runs it: no two processes have the same, nor one before and after exec.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Executable {
    /// When the process was made. CLOCK_BOOTTIME, nanoseconds.
    pub start_ns: u64,
    pub pid: u32,
    /// How many times there was an exec on the way to it, in the processes before it too.
    pub exec_id: u32,
}
shared!(Executable, size 8 + 4 + 4);

/// Entries of map `EXES_SENT`: executables of which the agent has to keep in mind what it was told.
pub const EXES_SENT_MAX: u32 = 4096;

/// The longest path that is told, with its NULs.
pub const PATH_MAX: usize = 1024;
/// The longest name in a path, with its NUL (`NAME_MAX` and 1).
pub const NAME_MAX: usize = 256;

/// The file of an executable. In the ring buffer before the first event of it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ExecutableFile {
    pub executable: Executable,
    /// Bytes of `names`; 0 if the path is too long, or not known.
    pub len: u64,
    /// The names in its path, the last one first, each ended by a NUL.
    pub names: [u8; PATH_MAX + NAME_MAX],
}
shared!(ExecutableFile, size size_of::<Executable>() + 8 + PATH_MAX + NAME_MAX);

/// What the rate limit tells apart. Key of map `RATE_LIMITS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitKey {
    pub key: OptionKey,
    /// The process; where it is not known, [`crate::Target::place`].
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
    /// Events held back since.
    pub suppressed: u64,
}
shared!(Limit, size 8 + 8);

/// Until when the events that a cgroup, a target or all targets caused use up their [`Rate`]. Maps `CGROUP_BUDGETS` and
/// `BUDGETS`.
///
/// A bucket that fills at a steady rate, as one number (the generic cell rate algorithm, ITU-T I.371): each event moves it on by
/// an interval, and an event is over the budget where it is further ahead of the time than a burst.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Budget {
    /// CLOCK_MONOTONIC, nanoseconds.
    pub until_ns: u64,
}
shared!(Budget, size 8);

impl Budget {
    /// Whether one more event is within the budget.
    #[inline(always)]
    #[must_use]
    pub fn has_room(&self, rate: Rate, now_ns: u64) -> bool {
        self.until_ns <= now_ns + rate.burst * rate.interval_ns
    }

    /// Whether all that was used has been filled up again.
    #[inline(always)]
    #[must_use]
    pub fn is_full(&self, now_ns: u64) -> bool {
        self.until_ns <= now_ns
    }
}

/// How many events one may cause.
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

    /// Of the tasks of one cgroup.
    pub const CGROUP: Self = Self::new(50, 500);
    /// Of one target.
    pub const TARGET: Self = Self::new(100, 1000);
    /// Of one target that wants each call reported, where the ring buffer has little room.
    pub const PRESSURE: Self = Self::new(100, 16);
    /// Of all targets that use less than their own rate.
    pub const QUIET: Self = Self::new(1000, 2000);
    /// Of all others together.
    pub const BUSY: Self = Self::new(500, 2000);
}

/// Entries of map `BUDGETS`: targets whose places are the same but for multiples of it share one. A power of two. Two more are
/// those of [`Rate::QUIET`] and [`Rate::BUSY`].
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
    /// Stands for all options that have no entry of their own. The kernel has no option of this level.
    pub const OTHER: OptionKey = OptionKey { level: i32::MIN, name: i32::MIN };
}

/// Entries of map `UNKNOWN_TALLIES`.
pub const UNKNOWN_TALLIES_MAX: u32 = 256;

/// How many durations a [`Tally`] tells apart.
pub const BUCKETS: usize = 32;

/// The calls of one kind on one option, seen by the audit. Maps `TALLIES` and `UNKNOWN_TALLIES`, one
/// per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    pub calls: u64,
    /// Those of them that returned an error.
    pub failed: u64,
    /// How long they took in all, if calls are timed. Nanoseconds.
    pub total_ns: u64,
    /// By duration, if calls are timed: bucket n counts those of 2^n up to 2^(n+1) nanoseconds; the first
    /// also those below, the last those above.
    pub buckets: [u64; BUCKETS],
}
shared!(Tally, size 3 * 8 + 8 * BUCKETS);

impl Default for Tally {
    fn default() -> Self {
        Self { calls: 0, failed: 0, total_ns: 0, buckets: [0; BUCKETS] }
    }
}

/// The bucket of [`Tally::buckets`] that counts calls of this duration.
#[inline(always)]
#[must_use]
pub fn bucket(duration_ns: u64) -> usize {
    // By halves, for want of an instruction that counts leading zeros.
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
    fn threads_made_in_a_row_have_slots_of_their_own() {
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
