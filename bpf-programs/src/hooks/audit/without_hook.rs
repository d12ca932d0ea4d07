//! Judges the calls that no cgroup hook judges.
//!
//! - Calls of 32-bit programs: the kernel runs no cgroup hook for them. `__sys_setsockopt` and `__sys_getsockopt`
//!   (net/socket.c) check `in_compat_syscall`; since 6.7 they pass the answer to `do_sock_*` as `compat`. These calls cannot
//!   be changed: conflicts are reported as allowed. The policies are those of the target that contains the task.
//! - All calls in a dry run without attached hooks ([`abi::Config::audit_judges`]). Hooks would have side effects: the kernel
//!   copies the argument for a hook, and fails a call whose argument is shorter than its length
//!   (`__cgroup_bpf_run_filter_setsockopt`, kernel/bpf/cgroup.c). The policies are those of the target to which the socket
//!   belongs, as for the hooks.

use core::hint::black_box;

use abi::{
    Config, TargetSlot,
    event::{Call, call, flags},
    index,
    judge::{Argument, judge_argument, verdict},
    select::select,
    setting::{OptionRow, Value},
};

use super::{is_readable, means_no_socket, means_unreadable, slot_of_task};
use crate::{
    hooks::sockopt::{read_verdict, shown_argument},
    kernel,
    maps::{self, PrefixMap, count, count_loss},
    record::{CountersRef, LossesRef},
};

/// Rows that can govern one call, as in `sockopt`.
const ROWS_MAX: usize = 5;

/// In place of the number of a row: the row of the call's own option.
const FIRST_ROW: u32 = 0;

/// Judges and counts the call of a thread by each row that governs the call. The audit has completed the record.
#[inline(always)]
pub(super) fn judge_by_rows(thread: u64, result: i64) {
    let mut row = FIRST_ROW;
    for _ in 0..ROWS_MAX {
        row = judge_unhooked(thread, result, row);
        if row == FIRST_ROW {
            break;
        }
    }
}

/// Judges by one row. Returns the next row that governs the call, or [`FIRST_ROW`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(super) extern "C" fn judge_unhooked(thread: u64, result: i64, row: u32) -> u32 {
    maps::call(thread).and_then(|call| judge_call(call, result, row)).unwrap_or(FIRST_ROW)
}

#[inline(always)]
fn judge_call(call: &mut Call, result: i64, row: u32) -> Option<u32> {
    let config = maps::config()?;
    let generation = config.generation;
    let is_compat = call.flags & flags::COMPAT != 0;
    if is_refused_before_hooks(call, result) {
        return None;
    }
    let (place, &TargetSlot { scope, options, .. }) =
        if is_compat { slot_of_task(config)? } else { slot_of_socket(config, call, result)? };
    let (scope, options) = (index::of(generation, scope), index::of(generation, options));
    let option = if row == FIRST_ROW {
        maps::option_named(config, generation, options, call.key)?.1
    } else {
        // Policies may have changed since the previous row.
        maps::option(options + row - 1).filter(|option| option.key == call.key)?
    };
    // The socket is of an address family that policies do not cover.
    let is_other = call.flags & flags::SOCKET == 0 && call.sk_family != 0;
    if is_other || call.flags & flags::UNREADABLE != 0 {
        return None;
    }
    if call.flags & flags::SOCKET == 0 {
        count_loss(LossesRef::unjudged);
        return None;
    }
    let rules = select(&call.facts, maps::selectors(scope)?, &PrefixMap { scope });
    if call.kind != call::SETSOCKOPT {
        if result == 0 {
            judge_read(call, place, option, option.winner(rules)?);
        }
        return None;
    }
    if let Some(winner) = option.winner(rules) {
        judge_set(call, place, option, winner, is_compat);
    }
    Some(option.next)
}

/// Judges a setsockopt call by the setting that governs it.
#[inline(always)]
fn judge_set(call: &mut Call, place: u32, option: &OptionRow, winner: u32, is_compat: bool) -> Option<()> {
    let setting = maps::setting(winner)?;
    // Nothing is read from a NULL address. If the kernel accepts NULL as an argument, NULL stands for zeroes.
    let (len, words) = (call.optlen as i32, call.requested.words);
    let verdict = judge_argument(option, setting, len, &words)?.verdict;
    let verdict = if verdict != verdict::NONE && is_compat { verdict::ALLOWED } else { verdict };
    // Otherwise the compiler compares one register and adds another, for which the verifier knows no bound.
    let index = black_box(usize::from(verdict.wrapping_sub(verdict::ALLOWED)));
    count(winner, |counters| match counters.verdict(index) {
        Some(counter) => counter,
        None => counters.agreed(),
    });
    if verdict != verdict::NONE {
        record_verdict(call, place, winner, verdict);
        if let Some(requested) = Argument::read(option, len, &words) {
            call.wanted = Value::wanted(option, setting, &requested);
        }
    }
    Some(())
}

/// Judges a getsockopt call.
#[inline(always)]
fn judge_read(call: &mut Call, place: u32, option: &OptionRow, winner: u32) -> Option<()> {
    let setting = maps::setting(winner)?;
    let (len, words) = (call.requested.len as i32, call.requested.words);
    if setting.is_text() != option.is_text() || read_verdict(option, setting, len, &words)? == verdict::NONE {
        return None;
    }
    count(winner, CountersRef::reads);
    record_verdict(call, place, winner, verdict::ALLOWED);
    if let Some(shown) = shown_argument(option, setting, len, &words) {
        call.wanted = Value::wanted(option, setting, &shown);
    }
    Some(())
}

#[inline(always)]
fn record_verdict(call: &mut Call, place: u32, winner: u32, verdict: u8) {
    call.setting = winner;
    call.place = place;
    call.verdict = verdict.into();
    call.flags |= flags::DECIDED;
}

/// Returns the slot of the target to which a call's socket belongs, and its index.
#[inline(always)]
fn slot_of_socket(config: &Config, call: &Call, result: i64) -> Option<(u32, &'static TargetSlot)> {
    // If the policies have changed since the call started, a hook has judged the call.
    if config.audit_judges == 0 {
        return None;
    }
    let generation = config.generation;
    let place = if call.sk != 0 { kernel::slot_of_sock(generation, call.sk) } else { 0 };
    // Another thread has closed or replaced the descriptor since.
    let is_lost = call.sk == 0 && !means_no_socket(result);
    if place == kernel::TOO_DEEP || is_lost {
        count_loss(LossesRef::unjudged);
        return None;
    }
    let place = place.checked_sub(1)?;
    maps::slot_at(generation, place).map(|slot| (place, slot))
}

/// Returns whether the kernel refuses a call before it would run a hook. It refuses a negative length (`do_sock_setsockopt`,
/// net/socket.c), and an argument that it cannot copy (`__cgroup_bpf_run_filter_setsockopt`, kernel/bpf/cgroup.c). A handler
/// that follows an address in the argument may fail with the same errno.
#[inline(always)]
fn is_refused_before_hooks(call: &Call, result: i64) -> bool {
    call.kind == call::SETSOCKOPT && ((call.optlen as i32) < 0 || (means_unreadable(result) && !is_readable(call)))
}
