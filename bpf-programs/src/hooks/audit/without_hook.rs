//! Judges the calls that no cgroup hook judges.
//!
//! - Calls of 32-bit programs: the kernel runs no cgroup hook for them (`__sys_setsockopt` and `__sys_getsockopt`, net/socket.c,
//!   ask `in_compat_syscall`; since 6.7 they hand the answer to `do_sock_*` as `compat`). Nothing can be done about them: what
//!   disagrees with the policy is reported as allowed. The policies are those of the target that the task is in.
//! - All calls in a dry run, where the hooks are not attached ([`abi::Config::audit_judges`]): the kernel copies the argument
//!   for a hook, and fails a call whose argument is shorter than its length (`__cgroup_bpf_run_filter_setsockopt`,
//!   kernel/bpf/cgroup.c). The policies are those of the target that the socket belongs to, as for the hooks.

use core::hint::black_box;

use abi::{
    Config, TargetSlot,
    event::{Call, call, flags},
    index,
    judge::{Argument, judge_argument, verdict},
    select::select,
    setting::{OptionRow, Value},
};

use super::{is_of_no_argument, is_of_no_socket, is_whole, slot_of_task};
use crate::{
    hooks::sockopt::{compared, shown},
    kernel,
    maps::{self, PrefixMap, count, count_loss},
};

/// Rows that can govern one call, as in `calls`.
const ROWS_MAX: usize = 5;

/// In place of the number of a row: that by which the call is found.
const FIRST_ROW: u32 = 0;

/// Judges the call that a thread is in, whose record the audit has completed, by each row that governs it, and counts it.
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

/// Judges by one row. Returns the row that also governs the call, or [`FIRST_ROW`].
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
        if is_compat { slot_of_task(config)? } else { of_socket(config, call, result)? };
    let (scope, options) = (index::of(generation, scope), index::of(generation, options));
    let option = if row == FIRST_ROW {
        maps::option_named(config, generation, options, call.key)?.1
    } else {
        // Policies may have changed since the row before this one.
        maps::option(options + row - 1).filter(|option| option.key == call.key)?
    };
    // Of a family that policies are not about.
    let is_other = call.flags & flags::SOCKET == 0 && call.sk_family != 0;
    if is_other || call.flags & flags::UNREADABLE != 0 {
        return None;
    }
    if call.flags & flags::SOCKET == 0 {
        count_loss(|losses| &mut losses.unjudged);
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

/// Judges a call of setsockopt by the setting that governs it.
#[inline(always)]
fn judge_set(call: &mut Call, place: u32, option: &OptionRow, winner: u32, is_compat: bool) -> Option<()> {
    let setting = maps::setting(winner)?;
    // Of an address that is NULL nothing was read; where the kernel takes that for an argument, it stands for zeroes.
    let (len, words) = (call.optlen as i32, call.requested.words);
    let verdict = judge_argument(option, setting, len, &words)?.verdict;
    let verdict = if verdict != verdict::NONE && is_compat { verdict::ALLOWED } else { verdict };
    // Else the compiler compares one register and adds another, of which the verifier knows no bound.
    let index = black_box(usize::from(verdict.wrapping_sub(verdict::ALLOWED)));
    count(winner, |counters| match counters.verdicts.get_mut(index) {
        Some(counter) => counter,
        None => &mut counters.agreed,
    });
    if verdict != verdict::NONE {
        decide(call, place, winner, verdict);
        if let Some(asked) = Argument::read(option, len, &words) {
            call.wanted = Value::wanted(option, setting, &asked);
        }
    }
    Some(())
}

/// Judges a call of getsockopt.
#[inline(always)]
fn judge_read(call: &mut Call, place: u32, option: &OptionRow, winner: u32) -> Option<()> {
    let setting = maps::setting(winner)?;
    let (len, words) = (call.requested.len as i32, call.requested.words);
    if setting.is_text() != option.is_text() || compared(option, setting, len, &words)? == verdict::NONE {
        return None;
    }
    count(winner, |counters| &mut counters.reads);
    decide(call, place, winner, verdict::ALLOWED);
    if let Some(shown) = shown(option, setting, len, &words) {
        call.wanted = Value::wanted(option, setting, &shown);
    }
    Some(())
}

#[inline(always)]
fn decide(call: &mut Call, place: u32, winner: u32, verdict: u8) {
    call.setting = winner;
    call.place = place;
    call.verdict = verdict.into();
    call.flags |= flags::DECIDED;
}

/// What holds for a call's socket.
#[inline(always)]
fn of_socket(config: &Config, call: &Call, result: i64) -> Option<(u32, &'static TargetSlot)> {
    // The policies may not be those any more by which the call began: then a hook has judged it.
    if config.audit_judges == 0 {
        return None;
    }
    let generation = config.generation;
    let place = if call.sk != 0 { kernel::place_of_sock(generation, call.sk) } else { 0 };
    // Another thread has closed the descriptor since, or put something else in its place.
    let is_lost = call.sk == 0 && !is_of_no_socket(result);
    if place == kernel::TOO_DEEP || is_lost {
        count_loss(|losses| &mut losses.unjudged);
        return None;
    }
    let place = place.checked_sub(1)?;
    maps::slot_at(generation, place).map(|holds| (place, holds))
}

/// Whether the kernel refuses a call before it would run a hook: for its length (`do_sock_setsockopt`, net/socket.c), or because
/// it cannot copy the argument (`__cgroup_bpf_run_filter_setsockopt`, kernel/bpf/cgroup.c). A handler that follows an address in
/// the argument may fail with the same errno.
#[inline(always)]
fn is_refused_before_hooks(call: &Call, result: i64) -> bool {
    call.kind == call::SETSOCKOPT && ((call.optlen as i32) < 0 || (is_of_no_argument(result) && !is_whole(call)))
}
