//! The audit's records of calls, as the cgroup's hooks come upon them, or begin them.
//!
//! Where only conflicts are reported, the audit need not see calls begin: a conflict is found by a hook, which knows all that
//! there is to note. Then the audit sees their ends alone ([`audit::ENDS`]), and of most calls there is nothing to be found at
//! the end.
//!
//! Invariant: as the audit's. A hook decides once about a call, within the function that is handed the socket: so a record that is
//! decided already or begun by a hook, or in which that function has ended, is of an earlier one. So is one that was given
//! something else than the call has that its thread is in.

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
};

/// Whether programs at cgroup/setsockopt can tell which system call a task is in and what it was given, and others then which
/// socket is meant by that: `bpf_task_pt_regs`, and [`LAYOUT`](abi::layout). As in `calls`, a constant to the verifier.
#[unsafe(no_mangle)]
pub(super) static CAN_BEGIN_CALLS: Global<u8> = Global::new(0);

/// What the audit sees of calls.
#[inline(always)]
fn seen() -> u32 {
    maps::config().map_or(audit::NONE, |config| config.audit)
}

/// Drops what a thread, which is in a call that a hook has not decided about yet, has left of an earlier one, whose end was then
/// not seen.
#[inline(always)]
pub(in crate::hooks) fn drop_unended(thread: u64) {
    let seen = seen();
    if seen != audit::NONE
        && thread != 0
        && let Some(call) = maps::call(thread)
        && (seen & audit::ENDS != 0 || call.flags & (flags::DECIDED | flags::COMPLETE) != 0)
    {
        super::discard_stale(thread, call);
    }
}

/// Whether the audit judges the call that a thread is in. A hook is there for a while yet when policies that it was for are in
/// force no more, and judges the calls that began under them.
#[inline(always)]
pub(in crate::hooks) fn is_judged_at_its_end(thread: u64, key: OptionKey) -> bool {
    thread != 0 && maps::call(thread).is_some_and(|call| call.flags & flags::UNHOOKED != 0 && call.key == key)
}

/// The record of a call that a hook has found in conflict. `None` where the audit does not see it, or there is no room.
#[inline(always)]
pub(in crate::hooks) fn record(thread: u64, kind: u32, key: OptionKey) -> Option<&'static mut Call> {
    let seen = seen();
    if CAN_BEGIN_CALLS.load() != 0 && seen & audit::ENDS != 0 {
        let is_seen_to_its_end = kind == call::SETSOCKOPT || seen & audit::READ_ENDS != 0;
        return if is_seen_to_its_end { begin(thread, kind, key) } else { None };
    }
    let call = maps::call_of(thread, kind, key)?;
    if CAN_BEGIN_CALLS.load() != 0 && call.flags & flags::SYSCALL != 0 && !super::args_match(call) {
        super::discard_stale(thread, call);
        return None;
    }
    Some(call)
}

#[inline(always)]
fn begin(thread: u64, kind: u32, key: OptionKey) -> Option<&'static mut Call> {
    if kernel::via(system_call(kind)) != flags::SYSCALL {
        return None;
    }
    let Some(call) = maps::begin_call(thread) else {
        count_loss(|losses| &mut losses.calls_full);
        return None;
    };
    let [fd, _, _, optval, optlen] = kernel::arguments();
    let flags = flags::SYSCALL | flags::HOOKED;
    *call = Call { key, kind, flags, fd: fd as i32, optval, optlen, thread, ..Call::default() };
    Some(call)
}
