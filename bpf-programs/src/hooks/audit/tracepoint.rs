//! The audit by the tracepoints of the two system calls: where there is nothing better.
//!
//! They see neither the calls of 32-bit programs nor io_uring.
//!
//! The format of a system call's tracepoint is fixed: 8 bytes of header, 8 with the call's number, then at entry
//! each argument in 8 bytes (`struct syscall_trace_enter`, kernel/trace/trace.h), at exit the result
//! (`struct syscall_trace_exit`).

use abi::{
    event::{call, flags, source},
    setting::OptionKey,
};
use aya_ebpf::{EbpfContext as _, macros::tracepoint, programs::TracePointContext};

use super::{Begun, Ended, Pointer, Subject, begin, end};

#[tracepoint(category = "syscalls", name = "sys_enter_setsockopt")]
pub(crate) fn trace_set(ctx: TracePointContext) -> u32 {
    begin(system_call(call::SETSOCKOPT, &ctx));
    0
}

#[tracepoint(category = "syscalls", name = "sys_enter_getsockopt")]
pub(crate) fn trace_get(ctx: TracePointContext) -> u32 {
    begin(system_call(call::GETSOCKOPT, &ctx));
    0
}

#[tracepoint(category = "syscalls", name = "sys_exit_setsockopt")]
pub(crate) fn trace_set_end(ctx: TracePointContext) -> u32 {
    system_call_end(call::SETSOCKOPT, &ctx);
    0
}

#[tracepoint(category = "syscalls", name = "sys_exit_getsockopt")]
pub(crate) fn trace_get_end(ctx: TracePointContext) -> u32 {
    system_call_end(call::GETSOCKOPT, &ctx);
    0
}

#[inline(always)]
fn system_call_end(kind: u32, ctx: &TracePointContext) {
    end(Ended { source: source::TRACEPOINT, result: slot(ctx, 1) as i64, kind, key: None });
}

#[inline(always)]
fn system_call(kind: u32, ctx: &TracePointContext) -> Begun {
    Begun {
        kind,
        via: flags::SYSCALL,
        subject: Subject::DescriptorAlone(slot(ctx, 1) as i32),
        key: OptionKey { level: slot(ctx, 2) as i32, name: slot(ctx, 3) as i32 },
        optval: Pointer::user(slot(ctx, 4)),
        optlen: Pointer::user(slot(ctx, 5)),
    }
}

/// The n-th 8 bytes after the header. Read as the context, which takes one instruction; by a helper it would take a call.
#[inline(always)]
fn slot(ctx: &TracePointContext, n: usize) -> u64 {
    // SAFETY: within the record, see above; the verifier checks it, and that each is read as it stands there.
    unsafe { ctx.as_ptr().cast::<u64>().add(1 + n).read_volatile() }
}
