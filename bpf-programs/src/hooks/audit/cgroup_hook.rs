//! The audit's records of calls, as the cgroup hooks use or create them.
//!
//! If only conflicts are reported, the audit need not see the entries of calls: a hook finds the conflict, and knows
//! everything that a record needs. Then the audit sees only exits ([`audit::ENDS`]), and most calls have no record there.
//!
//! Invariant: as in the audit. A hook decides about a call once, within the function that gets the socket. So a record
//! belongs to an earlier call in each of these cases:
//! - it is already decided;
//! - a hook created it;
//! - that function has exited;
//! - the current system call of its thread has other arguments.

use abi::{
    audit,
    event::{Call, call, flags},
    setting::OptionKey,
};
use aya_ebpf::Global;

use super::system_call;
use crate::{
    kernel,
    maps::{self, count_loss},
    record::LossesRef,
};

/// Whether programs at cgroup/setsockopt can read the system call of a task and its arguments, and other programs then the
/// socket of that call. Needs `bpf_task_pt_regs` and [`LAYOUT`](abi::layout). As in `sockopt`, a constant for the verifier.
#[unsafe(no_mangle)]
pub(super) static CAN_BEGIN_CALLS: Global<u8> = Global::new(0);

/// Returns what the audit sees of calls.
#[inline(always)]
fn sees() -> u32 {
    maps::config().map_or(audit::NONE, |config| config.audit)
}

/// Drops the record that an earlier call of a thread left because its exit was missed. The thread is in a call about which no
/// hook has decided yet.
#[inline(always)]
pub(in crate::hooks) fn discard_unfinished(thread: u64) {
    let sees = sees();
    if sees != audit::NONE
        && thread != 0
        && let Some(call) = maps::call(thread)
        && (sees & audit::ENDS != 0 || call.flags & (flags::DECIDED | flags::COMPLETE) != 0)
    {
        super::discard_stale(thread, call);
    }
}

/// Returns whether the audit judges the call that a thread is in. A hook stays attached for a while after the policies that
/// need it, and judges the calls that started under them.
#[inline(always)]
pub(in crate::hooks) fn is_judged_at_exit(thread: u64, key: OptionKey) -> bool {
    thread != 0 && maps::call(thread).is_some_and(|call| call.flags & flags::UNHOOKED != 0 && call.key == key)
}

/// Returns the record of a call that a hook has found in conflict. `None` if the audit does not see the call, or if there is
/// no room.
#[inline(always)]
pub(in crate::hooks) fn record_of_conflict(thread: u64, kind: u32, key: OptionKey) -> Option<&'static mut Call> {
    let sees = sees();
    if CAN_BEGIN_CALLS.load() != 0 && sees & audit::ENDS != 0 {
        let sees_exit = kind == call::SETSOCKOPT || sees & audit::READ_ENDS != 0;
        return if sees_exit { create_record(thread, kind, key) } else { None };
    }
    let call = maps::call_matching(thread, kind, key)?;
    if CAN_BEGIN_CALLS.load() != 0 && call.flags & flags::SYSCALL != 0 && !super::args_match(call) {
        super::discard_stale(thread, call);
        return None;
    }
    Some(call)
}

#[inline(always)]
fn create_record(thread: u64, kind: u32, key: OptionKey) -> Option<&'static mut Call> {
    if kernel::via(system_call(kind)) != flags::SYSCALL {
        return None;
    }
    let Some(call) = maps::reserve_call(thread) else {
        count_loss(LossesRef::calls_full);
        return None;
    };
    let [fd, _, _, optval, optlen] = kernel::arguments();
    let flags = flags::SYSCALL | flags::HOOKED;
    *call = Call { key, kind, flags, fd: fd as i32, optval, optlen, thread, ..Call::default() };
    Some(call)
}
