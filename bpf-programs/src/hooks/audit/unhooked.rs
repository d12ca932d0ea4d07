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
    Config, Place,
    event::{Call, call, flags},
    index,
    judge::{Asked, judge_argument, verdict},
    select::select,
    setting::Value,
};

use super::{followed_at, is_of_no_socket};
use crate::{
    hooks::calls::compared,
    kernel,
    maps::{self, PrefixMap, count, lose},
};

/// Judges the call that a thread is in, whose record the audit has completed, and counts it.
#[unsafe(no_mangle)]
#[inline(never)]
pub(super) extern "C" fn judge_unhooked(thread: u64, result: i64) -> u32 {
    if let Some(call) = maps::call(thread) {
        judge_call(call, result);
    }
    0
}

#[inline(always)]
fn judge_call(call: &mut Call, result: i64) -> Option<()> {
    let config = maps::config()?;
    let generation = config.generation;
    let is_compat = call.flags & flags::COMPAT != 0;
    let (place, &Place { scope, options, .. }) =
        if is_compat { followed_at(config)? } else { of_socket(config, call, result)? };
    let scope = index::of(generation, scope);
    let (_, option) = maps::option_named(config, generation, index::of(generation, options), call.key)?;
    // Of a family that policies are not about.
    let is_other = call.flags & flags::SOCKET == 0 && call.sk_family != 0;
    if is_other || call.flags & flags::UNREADABLE != 0 || (!is_compat && is_refused_before_hooks(call, result)) {
        return None;
    }
    if call.flags & flags::SOCKET == 0 {
        lose(|losses| &mut losses.unjudged);
        return None;
    }
    let winner = option.winner(select(&call.facts, maps::selectors(scope)?, &PrefixMap { scope }))?;
    let setting = maps::setting(winner)?;
    let (len, words) = (call.asked.len as i32, call.asked.words);
    let is_set = call.kind == call::SETSOCKOPT;
    if !is_set && result != 0 {
        return None;
    }
    let verdict = if is_set {
        judge_argument(option, setting, len, &words)?.verdict
    } else if setting.is_text() == option.is_text() {
        compared(option, setting, len, &words)?
    } else {
        return None;
    };
    if verdict == verdict::NONE {
        if is_set {
            count(winner, |counters| &mut counters.agreed);
        }
        return None;
    }
    let verdict = if is_compat || !is_set { verdict::ALLOWED } else { verdict };
    // Else the compiler compares one register and adds another, of which the verifier knows no bound.
    let index = black_box(usize::from(verdict - verdict::ALLOWED));
    count(winner, |counters| match counters.verdicts.get_mut(index) {
        Some(counter) if is_set => counter,
        _ => &mut counters.reads,
    });
    call.setting = winner;
    call.place = place;
    call.verdict = verdict.into();
    if let Some(asked) = Asked::read(option, len, &words) {
        call.wanted = Value::wanted(option, setting, &asked);
    }
    call.flags |= flags::DECIDED;
    Some(())
}

/// What holds for a call's socket.
#[inline(always)]
fn of_socket(config: &Config, call: &Call, result: i64) -> Option<(u32, &'static Place)> {
    let generation = config.generation;
    let place = if call.sk != 0 { kernel::place_of_sock(generation, call.sk) } else { 0 };
    // A socket that another thread has closed since, or put another descriptor in the place of, may have been governed.
    let is_lost = call.sk == 0 && !is_of_no_socket(result) && followed_at(config).is_some();
    if place == kernel::TOO_DEEP || is_lost {
        lose(|losses| &mut losses.unjudged);
        return None;
    }
    let place = place.checked_sub(1)?;
    maps::at_place(generation, place).map(|holds| (place, holds))
}

/// Whether the kernel refuses a call before it would run a hook: for its length or address (`do_sock_setsockopt`, net/socket.c;
/// `__cgroup_bpf_run_filter_setsockopt`, kernel/bpf/cgroup.c).
#[inline(always)]
fn is_refused_before_hooks(call: &Call, result: i64) -> bool {
    const EFAULT: i64 = 14;
    call.kind == call::SETSOCKOPT && ((call.optlen as i32) < 0 || result == -EFAULT)
}
