//! The contract between the agent and its BPF programs.
//!
//! Contains every layout that crosses the boundary and, in [`select`] and [`judge`], the *meaning* of a policy. The kernel
//! runs this code, and so do the tests on the host, `check`, and the property test that compares it with a naive evaluation.
//!
//! It does no I/O, and knows neither TOML nor aya, except for the `Pod` implementations behind the feature `user`.
//!
//! Invariants:
//! - Every shared type is `#[repr(C)]`, has no hidden padding (asserted below each type), and is valid for all bytes.
//! - **Zero is inert**: a zeroed map decides nothing, changes nothing and reports nothing.

#![no_std]

pub mod event;
pub mod judge;
pub mod layout;
pub mod live;
pub mod select;
pub mod setting;
pub mod socket;

/// Rules that one scope can have: rules are the bits of a `u64`.
pub const RULES_MAX: usize = 64;

/// The length of an [`ApplyList`], and the number of bits of [`socket::State`] that stand for options. Greater than the
/// number of options that can be set.
pub const SETTABLE_MAX: usize = 48;

/// Generations of policies that exist at a time: the one in force, those before it, and the one that is being written. A
/// power of two.
pub const GENERATIONS: u32 = 4;

/// Sockets whose notes fit in map `FALLBACK_STATES`.
pub const FALLBACK_MAX: u32 = 1024;

/// Options that can be set at [`apply_point::SOCK_CREATE`].
pub const SOCK_CREATE_MAX: usize = 3;

/// The maximum number of options that can be set at [`apply_point::POST_CREATE`].
pub const POST_CREATE_MAX: usize = 16;

/// The deepest level of a cgroup that can be a target, counted from the root of the hierarchy (level 0).
///
/// Kubernetes nests its containers five levels deep. Each level costs the audit one comparison.
pub const CGROUP_LEVELS_MAX: u32 = 32;

/// Declares that a type may be read from and written to maps byte by byte.
///
/// Fails to compile if the fields leave padding: the verifier rejects uninitialised bytes, and padding would leak the kernel
/// stack to user space.
macro_rules! shared {
    ($type:ty, size $size:expr) => {
        const _: () = assert!(size_of::<$type>() == $size, "layout changed or has padding");

        // SAFETY: `repr(C)`, `Copy`, no padding (the assertion above sums the fields), no pointers, and valid for all bytes.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $type {}
    };
}
pub(crate) use shared;

/// Values of [`Config::audit`].
pub mod audit {
    /// There is no audit.
    pub const NONE: u32 = 0;
    /// The audit sees entries and exits of calls.
    pub const CALLS: u32 = 1;
    /// The audit sees exits of setsockopt calls. The cgroup hooks create the records of calls in conflict.
    pub const ENDS: u32 = 2;
    /// In addition, the audit sees exits of getsockopt calls.
    pub const READ_ENDS: u32 = 4;
}

/// What is in force. Map `CONFIG`, index 0. The agent writes it last, after every other map and after attaching the programs.
/// A reload takes effect with the one number in `generation`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// 0: the programs do nothing. 1: the policies are in force.
    pub in_force: u32,
    /// Which calls the audit reports besides conflicts. See [`calls`].
    pub calls: u32,
    /// Bit n is set if a target is n levels below the root of the cgroup hierarchy.
    pub target_levels: u64,
    /// The minimum interval between two events of one process, option and verdict, after the first event. Nanoseconds.
    pub event_interval_ns: u64,
    /// Whether the audit follows only the processes of map `PROCESSES` that are in a target (0 or 1).
    pub by_process: u32,
    /// Number of the generation in force, counted from 1.
    pub generation: u32,
    /// The first generation whose tables still exist.
    pub oldest: u32,
    /// The last [`Target::id`] that was assigned, for the next agent.
    pub last_target: u32,
    /// What the audit sees of calls. See [`audit`].
    pub audit: u32,
    /// Whether a target may be below another (0 or 1), so that a socket can belong to both.
    pub are_nested: u32,
    /// Whether the audit judges all calls (0 or 1) and the cgroup hooks none: in a dry run.
    pub audit_judges: u32,
    pub _pad: u32,
    /// By slot of a generation ([`index::slot_of`]): the options that rules of any scope name. Written before its generation
    /// comes into force, because the write is not atomic.
    pub numbers: [setting::OptionFilter; GENERATIONS as usize],
}
shared!(Config, size 4 + 4 + 8 + 8 + 4 * 4 + 4 * 4 + GENERATIONS as usize * size_of::<setting::OptionFilter>());

impl Config {
    /// Returns whether a rule of the generation in force may name an option. `false` is certain.
    #[inline(always)]
    #[must_use]
    pub fn may_name(&self, key: setting::OptionKey) -> bool {
        self.number(self.generation, key) != setting::Lookup::Absent
    }

    /// Returns the number that an option may have in a generation.
    #[inline(always)]
    #[must_use]
    pub fn number(&self, generation: u32, key: setting::OptionKey) -> setting::Lookup {
        self.numbers[index::slot_of(generation) as usize].get(key)
    }
}

/// How many processes can be exempt at a time.
pub const EXEMPT_MAX: usize = 4;

/// A process of sockpolicy that inspects sockets: its calls are not an application's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exempt {
    /// The process id in the initial namespace; 0: none.
    pub process: u32,
    /// Whether only reads are exempt (0 or 1): a policy in force decides what the process sets.
    pub reads_only: u32,
    /// The start time, which distinguishes the process from others with the same id. CLOCK_BOOTTIME, in units of [`TICK_NS`].
    pub start: u64,
}

/// The processes that are exempt. Map `sp_exempt`, which any process of sockpolicy writes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exemptions {
    /// Whether an entry is used (0 or 1).
    pub is_used: u32,
    pub _pad: u32,
    pub entries: [Exempt; EXEMPT_MAX],
}
shared!(Exemptions, size 4 + 4 + EXEMPT_MAX * (4 + 4 + 8));

/// Nanoseconds in a tick, the unit in which the kernel shows the start times of processes (`nsec_to_clock_t`, USER_HZ:
/// kernel/time/time.c).
pub const TICK_NS: u64 = 10_000_000;

/// Indices in the tables of a generation. The tables are inner maps, each in the generation's slot of an outer map. One
/// number combines the slot and the index in the inner map.
pub mod index {
    use super::GENERATIONS;

    const SLOT_SHIFT: u32 = u32::BITS - GENERATIONS.trailing_zeros();
    const WITHIN: u32 = (1 << SLOT_SHIFT) - 1;

    /// Returns the slot of a generation. A generation reuses the slot of the one that came [`GENERATIONS`] before it.
    #[inline(always)]
    #[must_use]
    pub fn slot_of(generation: u32) -> u32 {
        generation % GENERATIONS
    }

    /// Returns the number of the entry at `within` in the tables of a generation.
    #[inline(always)]
    #[must_use]
    pub fn of(generation: u32, within: u32) -> u32 {
        (generation << SLOT_SHIFT) | within
    }

    #[inline(always)]
    #[must_use]
    pub fn slot(index: u32) -> u32 {
        index >> SLOT_SHIFT
    }

    #[inline(always)]
    #[must_use]
    pub fn within(index: u32) -> u32 {
        index & WITHIN
    }
}

/// Values of [`Config::calls`].
pub mod calls {
    /// Only calls that conflict with the policy.
    pub const CONFLICTS: u32 = 0;
    /// Every call on an option that a rule names.
    pub const GOVERNED: u32 = 1;
    /// Every call.
    pub const ALL: u32 = 2;
}

/// A cgroup to which programs are attached. Map `TARGETS`, by cgroup and hook: the kernel passes a program the entry of the
/// cgroup for which it runs. The entry does not change while a program is attached; [`TargetSlot`] has the rules.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// Index in map `TARGET_SLOTS` of every generation.
    pub place: u32,
    /// Unique; 0: the programs do nothing here.
    pub id: u32,
}
shared!(Target, size 4 + 4);

/// The policies of a target. Map `TARGET_SLOTS` of a generation, by [`Target::place`].
///
/// For nested targets, the kernel runs the programs of the inner target first and then those of the outer one. The scope of
/// the inner target contains the policies of both. The programs of the outer target then skip the socket
/// ([`socket::State::target`]).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TargetSlot {
    /// [`Target::id`] of the target in this slot; 0: there is none.
    pub id: u32,
    /// The depth of the cgroup; greater than that of each cgroup that contains it.
    pub level: u32,
    /// Number of the scope whose rules apply.
    pub scope: u32,
    /// Index into map `OPTIONS` of the scope's first option.
    pub options: u32,
}
shared!(TargetSlot, size 4 * 4);

/// The points at which a setting can be applied. With the number of a scope times [`COUNT`](apply_point::COUNT), an index
/// into map `APPLY_LISTS`.
///
/// Stream and datagram sockets pass the same cgroup hooks. A stream socket has later and better points for most options, so
/// these hooks have a list for each kind of socket.
pub mod apply_point {
    /// cgroup/sock_create
    pub const SOCK_CREATE: u32 = 0;
    /// cgroup/bind4, bind6 of a TCP socket
    pub const BIND_STREAM: u32 = 1;
    /// cgroup/bind4, bind6 of any other socket
    pub const BIND_DATAGRAM: u32 = 2;
    /// cgroup/connect4, connect6 of a TCP socket: before the route is looked up
    pub const CONNECT_STREAM: u32 = 3;
    /// cgroup/connect4, connect6 of any other socket
    pub const CONNECT_DATAGRAM: u32 = 4;
    /// sock_ops TCP_CONNECT: before the SYN is built
    pub const SYN: u32 = 5;
    /// sock_ops ACTIVE_ESTABLISHED
    pub const ACTIVE: u32 = 6;
    /// sock_ops PASSIVE_ESTABLISHED
    pub const PASSIVE: u32 = 7;
    /// sock_ops TCP_LISTEN
    pub const LISTEN: u32 = 8;
    /// cgroup/sendmsg4, sendmsg6: the first datagram of a UDP socket that is not connected
    pub const SEND: u32 = 9;
    /// lsm_cgroup/socket_post_create of any socket except TCP: options can be set, but no address is known
    pub const POST_CREATE: u32 = 10;
    /// The number of apply points.
    pub const COUNT: usize = 11;
}

/// The options to apply at one apply point, in order.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ApplyList {
    pub len: u32,
    /// Numbers of options, with the bits of [`entry`]. Each scope has its own entry for a number in map `OPTIONS`.
    pub options: [u32; SETTABLE_MAX],
}

/// Bits of an entry of an [`ApplyList`].
pub mod entry {
    /// The option is not set at this apply point. Its value is restored if no rule sets it any more, and checked against
    /// limits.
    pub const CHECK: u32 = 1 << 31;
    /// The value from before a rule set the option is saved: rules about facts that may change name the option.
    pub const KEEP: u32 = 1 << 30;
    /// No later hook knows more of the socket: a limit or a deny of a rule that may match applies.
    pub const LAST: u32 = 1 << 29;
    /// The number of the option.
    pub const NUMBER: u32 = LAST - 1;
}
shared!(ApplyList, size 4 + 4 * SETTABLE_MAX);

impl Default for ApplyList {
    fn default() -> Self {
        Self { len: 0, options: [0; SETTABLE_MAX] }
    }
}

/// What happened to one setting, summed over all sockets and calls. Map `COUNTERS` of a generation: for each setting, one
/// entry for each CPU, consecutively. The programs only add.
///
/// As long as two cache lines, so that CPUs share none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Sockets on which the setting changed the value (in a dry run: would have changed it).
    pub set: u64,
    /// Sockets that had the value already.
    pub unchanged: u64,
    /// Sockets on which the kernel refused the value.
    pub failed: u64,
    /// The last errno with which the kernel refused the value; 0 if none.
    pub failed_errno: u64,
    /// Application calls that requested the policy's value.
    pub agreed: u64,
    /// Application calls in conflict, by [`judge::verdict`] minus one.
    pub verdicts: [u64; judge::verdict::COUNT],
    /// Application reads that returned another value than the policy's.
    pub reads: u64,
    /// Conflict events that were sent.
    pub reported: u64,
    /// Conflict events that were suppressed by the rate limit.
    pub suppressed: u64,
    /// Sockets that were counted as set or unchanged, then lost the value, and on which the kernel refused it the second
    /// time. These sockets are counted as failed too. [`Counters::without_undone`] subtracts them from the other two
    /// counters.
    pub undone: u64,
    pub _pad: [u64; 2],
}
shared!(Counters, size 128);

impl Counters {
    /// Returns the sum of two sets of counters.
    #[must_use]
    pub fn plus(self, other: &Self) -> Self {
        // Destructured in full, so that a new counter cannot be forgotten here.
        let Self { set, unchanged, failed, failed_errno, agreed, verdicts, reads, reported, suppressed, undone, _pad } =
            *other;
        let mut all = self.verdicts;
        for (sum, count) in all.iter_mut().zip(verdicts) {
            *sum += count;
        }
        Self {
            set: self.set + set,
            unchanged: self.unchanged + unchanged,
            failed: self.failed + failed,
            // Not a count: either errno is right.
            failed_errno: self.failed_errno.max(failed_errno),
            agreed: self.agreed + agreed,
            verdicts: all,
            reads: self.reads + reads,
            reported: self.reported + reported,
            suppressed: self.suppressed + suppressed,
            undone: self.undone + undone,
            _pad,
        }
    }

    /// Returns the counters, with the sockets that lost the value removed from `set` and `unchanged`.
    #[must_use]
    pub fn without_undone(self) -> Self {
        let set = self.set.saturating_sub(self.undone);
        let rest = self.undone.saturating_sub(self.set);
        Self { set, unchanged: self.unchanged.saturating_sub(rest), undone: 0, ..self }
    }
}

/// What could not be reported or decided, by reason. Map `LOSSES`: one entry for all CPUs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// Events that found the ring buffer full.
    pub ring_full: u64,
    /// Calls that the audit follows and that found no room in map `CALLS`: their result and process are not reported.
    pub calls_full: u64,
    /// Arguments of calls that could not be read from the caller's memory.
    pub unreadable: u64,
    /// Sockets for whose notes the kernel had no memory. These notes are in map `FALLBACK_STATES`, from which they may be
    /// evicted.
    pub no_storage: u64,
    /// Rewritten values that did not fit the kernel's buffer: the call continued unchanged.
    pub no_room: u64,
    /// Calls whose exit was missed: the kernel could not follow so many calls at a time, skipped a program, or the task has
    /// exited.
    pub exit_missed: u64,
    /// Calls that found no entry in map `TALLIES`, not even [`event::TallyKey::OTHER`].
    pub tallies_full: u64,
    /// Calls that no hook judges and that the audit could not judge, because their socket is unknown.
    pub unjudged: u64,
    /// Options that no rule sets any more, and whose value from before could not be restored.
    pub not_restored: u64,
    /// Events over the budget of their cgroup, of their target or of all targets ([`event::Budget`]). The conflicts among
    /// them are counted in [`Counters::suppressed`] too.
    pub over_budget: u64,
}
shared!(Losses, size 10 * 8);

impl Losses {
    /// Returns what was lost since `before`.
    #[must_use]
    pub fn since(self, before: &Self) -> Self {
        // Destructured in full, so that a new count cannot be forgotten here.
        let Self {
            ring_full,
            calls_full,
            unreadable,
            no_storage,
            no_room,
            exit_missed,
            tallies_full,
            unjudged,
            not_restored,
            over_budget,
        } = *before;
        Self {
            ring_full: self.ring_full - ring_full,
            calls_full: self.calls_full - calls_full,
            unreadable: self.unreadable - unreadable,
            no_storage: self.no_storage - no_storage,
            no_room: self.no_room - no_room,
            exit_missed: self.exit_missed - exit_missed,
            tallies_full: self.tallies_full - tallies_full,
            unjudged: self.unjudged - unjudged,
            not_restored: self.not_restored - not_restored,
            over_budget: self.over_budget - over_budget,
        }
    }
}
