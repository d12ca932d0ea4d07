//! The audit: setsockopt and getsockopt calls of the targets' tasks, from entry to exit.
//!
//! Three kinds of hook run the same code. They differ in what they cannot see: a tracepoint misses
//! calls of 32-bit programs, and both it and a probe on `__sys_*` miss io_uring.

use abi::{
    calls,
    event::{Call, call, flags, source},
    setting::{OptionKey, TEXT_LEN, Value, Words, word_in},
};
use aya_ebpf::{
    cty::c_void,
    helpers::generated::{bpf_get_current_ancestor_cgroup_id, bpf_get_current_task, bpf_probe_read_user},
    macros::{kprobe, kretprobe, tracepoint},
    programs::{ProbeContext, RetProbeContext, TracePointContext},
};

use crate::{
    emit::{self, Head, Task},
    maps::{self, lose},
};

/// The arguments of either call.
struct Arguments {
    fd: i32,
    level: i32,
    name: i32,
    /// Address of the argument.
    optval: u64,
    /// setsockopt: its length; getsockopt: the address of its length.
    optlen: u64,
}

// match-proto: 5.10: int __sys_setsockopt(int fd, int level, int optname, char __user *optval, int optlen)
#[kprobe]
pub(crate) fn kprobe_set(ctx: ProbeContext) -> u32 {
    enter(call::SETSOCKOPT, probe_arguments(&ctx));
    0
}

// match-proto: 5.10: int __sys_getsockopt(int fd, int level, int optname, char __user *optval, int __user *optlen)
#[kprobe]
pub(crate) fn kprobe_get(ctx: ProbeContext) -> u32 {
    enter(call::GETSOCKOPT, probe_arguments(&ctx));
    0
}

#[kretprobe]
pub(crate) fn kretprobe_set(ctx: RetProbeContext) -> u32 {
    exit(source::KPROBE, ctx.ret::<i32>().into());
    0
}

#[kretprobe]
pub(crate) fn kretprobe_get(ctx: RetProbeContext) -> u32 {
    exit(source::KPROBE, ctx.ret::<i32>().into());
    0
}

#[tracepoint(category = "syscalls", name = "sys_enter_setsockopt")]
pub(crate) fn trace_set(ctx: TracePointContext) -> u32 {
    enter(call::SETSOCKOPT, trace_arguments(&ctx));
    0
}

#[tracepoint(category = "syscalls", name = "sys_enter_getsockopt")]
pub(crate) fn trace_get(ctx: TracePointContext) -> u32 {
    enter(call::GETSOCKOPT, trace_arguments(&ctx));
    0
}

#[tracepoint(category = "syscalls", name = "sys_exit_setsockopt")]
pub(crate) fn trace_set_exit(ctx: TracePointContext) -> u32 {
    exit_traced(&ctx);
    0
}

#[tracepoint(category = "syscalls", name = "sys_exit_getsockopt")]
pub(crate) fn trace_get_exit(ctx: TracePointContext) -> u32 {
    exit_traced(&ctx);
    0
}

#[inline(always)]
fn probe_arguments(ctx: &ProbeContext) -> Option<Arguments> {
    Some(Arguments { fd: ctx.arg(0)?, level: ctx.arg(1)?, name: ctx.arg(2)?, optval: ctx.arg(3)?, optlen: ctx.arg(4)? })
}

/// The format of a syscall's tracepoint is fixed: 8 bytes of header, 8 of syscall number, then each
/// argument in 8 bytes (`struct syscall_trace_enter`, kernel/trace/trace.h).
#[inline(always)]
fn trace_arguments(ctx: &TracePointContext) -> Option<Arguments> {
    const FIRST: usize = 16;
    let argument = |n: usize| {
        // SAFETY: within the record, see above.
        unsafe { ctx.read_at::<u64>(FIRST + 8 * n) }.ok()
    };
    Some(Arguments {
        fd: argument(0)? as i32,
        level: argument(1)? as i32,
        name: argument(2)? as i32,
        optval: argument(3)?,
        optlen: argument(4)?,
    })
}

#[inline(always)]
fn exit_traced(ctx: &TracePointContext) {
    // SAFETY: the return value follows the syscall number (`struct syscall_trace_exit`).
    if let Ok(result) = unsafe { ctx.read_at::<i64>(16) } {
        exit(source::TRACEPOINT, result);
    }
}

/// Notes a call that the audit is to follow.
#[inline(always)]
fn enter(kind: u32, arguments: Option<Arguments>) {
    let Some(config) = maps::config() else { return };
    let Some(arguments) = arguments else { return };
    let key = OptionKey { level: arguments.level, name: arguments.name };
    if config.calls != calls::ALL && maps::option_index(key).is_none() {
        return;
    }
    if !in_target(config.target_levels) {
        return;
    }
    let mut call = Call { key, kind, fd: arguments.fd, optval: arguments.optval, ..Call::default() };
    if kind == call::SETSOCKOPT {
        match read_value(arguments.optval, arguments.optlen as i32) {
            Ok(asked) => call.asked = asked,
            // The page may not be there yet; the cgroup hook gets a copy of the argument.
            Err(_) => call.flags = flags::UNREADABLE,
        }
    } else {
        call.optlen = arguments.optlen;
    }
    // SAFETY: has no arguments.
    maps::begin_call(unsafe { bpf_get_current_task() }, &call);
}

/// Reports a call that `enter` noted, now that its result is known.
#[inline(always)]
fn exit(source: u32, result: i64) {
    // SAFETY: has no arguments.
    let task = unsafe { bpf_get_current_task() };
    let Some(call) = maps::call(task) else { return };
    let head = Head { key: call.key, call: call.kind, source, result };
    if emit::is_conflict(call) {
        emit::conflict(head, call.setting, call.verdict, Task::current(), |record| *record = *call);
    } else if maps::config().is_some_and(|config| config.calls != calls::CONFLICTS) {
        if call.kind == call::GETSOCKOPT && result == 0 {
            match read_result(call.optval, call.optlen) {
                Ok(shown) => call.asked = shown,
                Err(_) => call.flags |= flags::UNREADABLE,
            }
        }
        if call.flags & flags::UNREADABLE != 0 {
            lose(|losses| &mut losses.unreadable);
        }
        emit::call(head, Task::current(), |record| *record = *call);
    }
    maps::end_call(task);
}

/// Whether the current task is in the subtree of a target.
#[inline(always)]
fn in_target(levels: u64) -> bool {
    for level in 0..=abi::CGROUP_LEVELS_MAX {
        let left = levels >> level;
        if left == 0 {
            return false;
        }
        if left & 1 == 0 {
            continue;
        }
        // SAFETY: takes a number; 0 where the task's cgroup is not that deep.
        let cgroup = unsafe { bpf_get_current_ancestor_cgroup_id(level as i32) };
        if cgroup != 0 && maps::is_target(cgroup) {
            return true;
        }
    }
    false
}

/// The first bytes of an argument in the caller's memory. `Err` is the errno.
#[inline(always)]
fn read_value(address: u64, len: i32) -> Result<Value, i32> {
    if len <= 0 || address == 0 {
        return Ok(Value::UNKNOWN);
    }
    let mut words: Words = [0; 2];
    let read = if len < TEXT_LEN as i32 { len as u32 } else { TEXT_LEN as u32 };
    // SAFETY: `words` has room for 16 bytes, and the helper checks the address.
    let ret = unsafe { bpf_probe_read_user((&raw mut words).cast(), read, address as *const c_void) };
    if ret != 0 {
        return Err(-(ret as i32));
    }
    Ok(Value::new(words, len as u32))
}

/// What a getsockopt call left in the caller's memory.
#[inline(always)]
fn read_result(optval: u64, optlen: u64) -> Result<Value, i32> {
    let len = read_value(optlen, 4)?;
    read_value(optval, word_in(&len.words) as i32)
}
