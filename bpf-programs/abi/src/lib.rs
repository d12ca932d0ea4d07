//! The contract between the agent and its BPF programs.
//!
//! Holds every layout that crosses the boundary and, in [`select`] and [`judge`], the *meaning* of a
//! policy: the kernel runs this code and so do the host's tests, `check` and the property test that
//! compares it with a naive evaluation.
//!
//! It does no I/O, knows no TOML and no aya (but for the `Pod` marks behind the feature `user`).
//!
//! Invariants:
//! - Every shared type is `#[repr(C)]`, has no hidden padding (asserted below each) and is valid
//!   for any bytes.
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

/// The length of a [`ApplyList`], and bits of [`socket::State`] that stand for an option. More than there are options to set.
pub const SETTABLE_MAX: usize = 48;

/// Generations of policies that are kept at a time: the one in force, those before it, and the one that is being written.
/// A power of two.
pub const GENERATIONS: u32 = 4;

/// Sockets whose notes find room in map `FALLBACK_STATES`.
pub const FALLBACK_MAX: u32 = 1024;

/// Options that can be set at [`apply_point::SOCK_CREATE`].
pub const SOCK_CREATE_MAX: usize = 3;

/// Options that can be set at [`apply_point::POST_CREATE`], at the most.
pub const POST_CREATE_MAX: usize = 16;

/// Deepest cgroup at which a target can be, counted from the root of the hierarchy (level 0).
///
/// Kubernetes nests its containers five levels deep; each level costs the audit one comparison.
pub const CGROUP_LEVELS_MAX: u32 = 32;

/// Declares that a type may be read from and written to maps byte by byte.
///
/// Fails to compile where the fields leave padding, because the verifier refuses uninitialised
/// bytes and because padding would leak kernel stack to user space.
macro_rules! shared {
    ($type:ty, size $size:expr) => {
        const _: () = assert!(size_of::<$type>() == $size, "layout changed or has padding");

        // SAFETY: `repr(C)`, `Copy`, no padding (the assertion above sums the fields), no pointers,
        // and every bit pattern is a valid value.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $type {}
    };
}
pub(crate) use shared;

/// Values of [`Config::audit`].
pub mod audit {
    /// There is none.
    pub const NONE: u32 = 0;
    /// It sees how they begin and how they end.
    pub const CALLS: u32 = 1;
    /// It sees how setsockopt calls end. The cgroup's hooks begin the records of those that they find in conflict.
    pub const ENDS: u32 = 2;
    /// Beside that: the same of getsockopt calls.
    pub const READ_ENDS: u32 = 4;
}

/// What is in force. Map `CONFIG`, index 0; written by the agent last, after every other map and when the programs are
/// attached. A change takes effect with the one number in `generation`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// 0: the programs do nothing. 1: the policies are in force.
    pub in_force: u32,
    /// Which calls the audit reports beside the conflicts. See [`calls`].
    pub calls: u32,
    /// Bit n is set where a target is n levels below the root of the cgroup hierarchy.
    pub target_levels: u64,
    /// At the least this long between two events of one process, option and verdict, after the
    /// first one. Nanoseconds.
    pub event_interval_ns: u64,
    /// Whether the audit follows only the processes of map `PROCESSES`, as far as they are in a target (0 or 1).
    pub by_process: u32,
    /// Number of the generation in force, counted from 1.
    pub generation: u32,
    /// The first generation whose tables are still there.
    pub oldest: u32,
    /// The last [`Target::id`] that was given, for an agent that comes after this one.
    pub last_target: u32,
    /// The agent, while it looks at the sockets of targets itself: what it calls then is no application's call. 0: nobody. By
    /// the number that the process has in the initial namespace.
    pub agent: u32,
    /// What the audit sees of calls. See [`audit`].
    pub audit: u32,
    /// Whether a target may stand within another (0 or 1), so that sockets are within both.
    pub are_nested: u32,
    /// Whether the audit judges all calls (0 or 1), and the cgroup hooks none: in a dry run.
    pub audit_judges: u32,
    /// When that process was made, which tells it from others of its number. CLOCK_BOOTTIME, in units of [`TICK_NS`].
    pub agent_start: u64,
    /// By slot of a generation ([`index::slot_of`]): the options that rules of any scope name. Written before the generation
    /// that it is of is in force, for it is not written at once.
    pub numbers: [setting::OptionFilter; GENERATIONS as usize],
}
shared!(Config, size 4 + 4 + 8 + 8 + 4 * 4 + 4 * 4 + 8 + GENERATIONS as usize * size_of::<setting::OptionFilter>());

impl Config {
    /// Whether a rule of the generation in force may name an option; that none does is certain.
    #[inline(always)]
    #[must_use]
    pub fn may_name(&self, key: setting::OptionKey) -> bool {
        self.number(self.generation, key) != setting::Lookup::Absent
    }

    /// The number that an option may have in a generation.
    #[inline(always)]
    #[must_use]
    pub fn number(&self, generation: u32, key: setting::OptionKey) -> setting::Lookup {
        self.numbers[index::slot_of(generation) as usize].get(key)
    }
}

/// Nanoseconds of a tick, in which the kernel tells when processes were made (`nsec_to_clock_t`, USER_HZ: kernel/time/time.c).
pub const TICK_NS: u64 = 10_000_000;

/// The tables of a generation are inner maps, each at the generation's slot of an outer map of its kind. What stands in them
/// goes by one number, of the slot and of the index in the inner map.
pub mod index {
    use super::GENERATIONS;

    const SLOT_SHIFT: u32 = u32::BITS - GENERATIONS.trailing_zeros();
    const WITHIN: u32 = (1 << SLOT_SHIFT) - 1;

    /// The slot of a generation: it takes that of the one that came [`GENERATIONS`] before it.
    #[inline(always)]
    #[must_use]
    pub fn slot_of(generation: u32) -> u32 {
        generation % GENERATIONS
    }

    /// The number of what is at `within` in the tables of a generation.
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
    /// Calls that conflict with the policy, nothing else.
    pub const CONFLICTS: u32 = 0;
    /// Every call on an option that a rule names.
    pub const GOVERNED: u32 = 1;
    /// Every call.
    pub const ALL: u32 = 2;
}

/// A cgroup that programs are attached to. Map `TARGETS`, by cgroup and hook: the kernel hands a program the entry of the
/// one that it runs for. It stays the same for as long as a program is attached; what holds there, [`TargetSlot`] says.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// Index in map `TARGET_SLOTS` of every generation.
    pub place: u32,
    /// Not given twice; 0: the programs do nothing here.
    pub id: u32,
}
shared!(Target, size 4 + 4);

/// What holds on a target. Map `TARGET_SLOTS` of a generation, by [`Target::place`].
///
/// Where targets lie in one another, the kernel runs the programs of the inner one first and then those of the outer one.
/// What the policies of both say of a socket stands in the scope of the inner one; the programs of the outer one leave the
/// socket alone ([`socket::State::target`]).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TargetSlot {
    /// [`Target::id`] of the target that this is about; 0: of none, and nothing holds.
    pub id: u32,
    /// How deep the cgroup is; more than any that it lies in.
    pub level: u32,
    /// Number of the scope whose rules hold.
    pub scope: u32,
    /// Index in map `OPTIONS` of the scope's first option.
    pub options: u32,
}
shared!(TargetSlot, size 4 * 4);

/// The places where a setting can be applied. With the number of a scope times [`COUNT`](apply_point::COUNT), an index of map
/// `APPLY_LISTS`.
///
/// Stream and datagram sockets pass the same cgroup hooks, but a stream socket has later and better
/// places for most options, so these hooks have a list for each.
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
    /// lsm_cgroup/socket_post_create of any socket but a TCP one: options can be set, but no address is known
    pub const POST_CREATE: u32 = 10;
    /// How many there are.
    pub const COUNT: usize = 11;
}

/// The options to apply at one site, in the order in which to apply them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ApplyList {
    pub len: u32,
    /// Numbers of options, of which each scope has its own entry in map `OPTIONS`, with the bits of [`entry`].
    pub options: [u32; SETTABLE_MAX],
}

/// Bits of an entry of a [`ApplyList`].
pub mod entry {
    /// The option is not set at this site: its value is given back if no rule sets it any more, and held against limits.
    pub const CHECK: u32 = 1 << 31;
    /// What the option had before a rule set it is kept: rules about facts that may change name the option.
    pub const KEEP: u32 = 1 << 30;
    /// No later hook knows more of the socket: a limit or a deny of a rule that may match holds.
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

/// What happened to one setting, summed over all sockets and calls. Map `COUNTERS` of a generation: for each setting one for
/// each CPU, in a row; the programs add, nobody subtracts.
///
/// As long as cache lines are, of which CPUs would else share some.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Sockets on which the setting changed the value (in dry-run: would have).
    pub set: u64,
    /// Sockets that had the value already.
    pub unchanged: u64,
    /// Sockets on which the kernel refused the value.
    pub failed: u64,
    /// The last errno that the kernel refused it with; 0 if none.
    pub failed_errno: u64,
    /// Application calls that asked for what the policy wants.
    pub agreed: u64,
    /// Application calls in conflict, by [`judge::verdict`] less one.
    pub verdicts: [u64; judge::verdict::COUNT],
    /// Application reads that returned another value than the policy wants.
    pub reads: u64,
    /// Conflict events that were sent.
    pub reported: u64,
    /// Conflict events that were held back by the rate limit.
    pub suppressed: u64,
    /// Sockets that were counted as set or unchanged, whose value something else then changed, and on which the kernel refused
    /// the value again: counted as failed too. [`Counters::without_undone`] takes them from the other two.
    pub undone: u64,
    pub _pad: [u64; 2],
}
shared!(Counters, size 128);

impl Counters {
    /// What two of them counted together.
    #[must_use]
    pub fn plus(self, other: &Self) -> Self {
        // Taken apart in full: a new counter has to be thought of here.
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
            // Not a count: either will do.
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

    /// The same without those sockets among `set` and `unchanged` that lost the value.
    #[must_use]
    pub fn without_undone(self) -> Self {
        let set = self.set.saturating_sub(self.undone);
        let rest = self.undone.saturating_sub(self.set);
        Self { set, unchanged: self.unchanged.saturating_sub(rest), undone: 0, ..self }
    }
}

/// What could not be reported or decided, by reason. Map `LOSSES`, one per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// Events that found the ring buffer full.
    pub ring_full: u64,
    /// Calls of those whom the audit follows that found no room in map `CALLS`: their result and process are not reported.
    pub calls_full: u64,
    /// Arguments of a call that could not be read from the caller's memory.
    pub unreadable: u64,
    /// Sockets for whose notes the kernel had no memory: these notes are in map `FALLBACK_STATES`, from which they may be pushed out.
    pub no_storage: u64,
    /// Rewritten values that did not fit the buffer the kernel gave us: the call went through
    /// as the application made it.
    pub no_room: u64,
    /// Calls whose end was not seen: the kernel had no room to follow so many at a time, left a program out, or the task is
    /// gone.
    pub exit_missed: u64,
    /// Calls that found no entry in map `TALLIES`, not even that of other options.
    pub tallies_full: u64,
    /// Calls that no hook judges and the audit could not, for their socket could not be found out.
    pub unjudged: u64,
    /// Options that no rule sets any more, and that could not be given back the value from before.
    pub not_restored: u64,
    /// Events that were more than the budget of their cgroup, of their target or of all targets allows ([`event::Budget`]).
    /// [`Counters::suppressed`] has the conflicts among them too.
    pub over_budget: u64,
}
shared!(Losses, size 10 * 8);

impl Losses {
    /// What was lost after it was so much.
    #[must_use]
    pub fn since(self, before: &Self) -> Self {
        // Taken apart in full: a new count has to be thought of here.
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
