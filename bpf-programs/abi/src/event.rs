//! What the programs tell the agent: one record for all reports, sent through the ring buffer.

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
    /// The socket was seen by a cgroup hook, so `facts` and `cookie` are filled in.
    pub const SOCKET: u32 = 1;
    /// The call was decided by setting number [`super::Call::setting`].
    pub const DECIDED: u32 = 2;
    /// `before` was read from the socket.
    pub const BEFORE: u32 = 4;
    /// `asked` could not be read from the caller's memory.
    pub const UNREADABLE: u32 = 8;
}

/// One setsockopt or getsockopt call on its way through the kernel. Map `CALLS`, by task: made by
/// the audit at the call's entry, completed by the cgroup hook, reported at its exit.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Call {
    /// Address of the argument in the caller's memory.
    pub optval: u64,
    /// getsockopt: address of the argument's length in the caller's memory.
    pub optlen: u64,
    /// The socket's cookie; 0 if not known.
    pub cookie: u64,
    pub key: OptionKey,
    /// See [`call`].
    pub kind: u32,
    /// See [`flags`].
    pub flags: u32,
    pub fd: i32,
    /// Index of map `SETTINGS`.
    pub setting: u32,
    /// See [`crate::judge::verdict`].
    pub verdict: u32,
    pub _pad: u32,
    /// What the application asked for; for getsockopt, what it was shown.
    pub asked: Value,
    /// What the policy wants.
    pub wanted: Value,
    /// What the kernel was given in place of `asked`, if anything.
    pub given: Value,
    /// What the socket had before the call, if that could be read.
    pub before: Value,
    pub facts: Facts,
}
shared!(Call, size 3 * 8 + 8 + 5 * 4 + 4 + 4 * 24 + 40);

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
    /// See [`kind`].
    pub kind: u32,
    /// See [`source`].
    pub source: u32,
    /// Process (thread group); 0 if not known.
    pub pid: u32,
    /// Thread; 0 if not known.
    pub tid: u32,
    pub comm: [u8; COMM_LEN],
    pub call: Call,
}
shared!(Event, size 4 * 8 + 4 * 4 + 16 + size_of::<Call>());

/// What the rate limit tells apart. Key of map `LIMITS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitKey {
    pub key: OptionKey,
    pub pid: u32,
    pub verdict: u32,
    /// See [`kind`] and [`call`].
    pub what: u64,
}
shared!(LimitKey, size 8 + 4 + 4 + 8);

/// Value of map `LIMITS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Limit {
    /// When the last event was sent. CLOCK_MONOTONIC, nanoseconds.
    pub sent_ns: u64,
    /// Events held back since.
    pub suppressed: u64,
}
shared!(Limit, size 8 + 8);
