//! Judges the calls that the cgroup hooks do not see: those of 32-bit programs (`__sys_setsockopt` and `__sys_getsockopt`,
//! net/socket.c, ask `in_compat_syscall`; since 6.7 they hand the answer to `do_sock_*` as `compat`).
//!
//! What holds is taken to be what holds for the sockets of the task's own cgroup.
//!
//! Nothing can be done about them here. What disagrees with the policy is reported as allowed, for that is
//! what became of it.

use abi::{
    Place,
    event::{Call, call, flags},
    index,
    judge::{Asked, judge_argument, verdict},
    select::select,
    setting::Value,
};

use super::followed_at;
use crate::{
    hooks::calls::compared,
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
    let (place, &Place { scope, options, .. }) = followed_at(config)?;
    let scope = index::of(generation, scope);
    let (_, option) = maps::option_named(config, generation, index::of(generation, options), call.key)?;
    // Of a family that policies are not about.
    let is_other = call.flags & flags::SOCKET == 0 && call.sk_family != 0;
    if is_other || call.flags & flags::UNREADABLE != 0 {
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
    } else {
        compared(option, setting, len, &words)?
    };
    if verdict == verdict::NONE {
        if is_set {
            count(winner, |counters| &mut counters.agreed);
        }
        return None;
    }
    count(winner, |counters| if is_set { &mut counters.verdicts[0] } else { &mut counters.reads });
    call.setting = winner;
    call.place = place;
    call.verdict = verdict::ALLOWED.into();
    if let Some(asked) = Asked::read(option, len, &words) {
        call.wanted = Value::wanted(option, setting, &asked);
    }
    call.flags |= flags::DECIDED;
    Some(())
}
