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

use super::{CallEntry, CallExit, Pointer, SYSTEM_CALLS, Subject, begin, end};

/// At the entry of both.
#[tracepoint]
pub(crate) fn sp_sys_enter(ctx: TracePointContext) -> u32 {
    begin(CallEntry {
        kind: kind(&ctx),
        via: flags::SYSCALL,
        subject: Subject::DescriptorAlone(slot(&ctx, 1) as i32),
        key: OptionKey { level: slot(&ctx, 2) as i32, name: slot(&ctx, 3) as i32 },
        optval: Pointer::user(slot(&ctx, 4)),
        optlen: Pointer::user(slot(&ctx, 5)),
    });
    0
}

/// At the exit of both.
#[tracepoint]
pub(crate) fn sp_sys_exit(ctx: TracePointContext) -> u32 {
    end(CallExit { source: source::TRACEPOINT, result: slot(&ctx, 1) as i64, kind: kind(&ctx), key: None });
    0
}

/// Which of the two system calls it is.
#[inline(always)]
fn kind(ctx: &TracePointContext) -> u32 {
    // SAFETY: as in `slot`. The number has four bytes, and what is behind it means nothing.
    let number = unsafe { ctx.as_ptr().cast::<u32>().add(2).read_volatile() };
    if i64::from(number) == SYSTEM_CALLS[0] { call::SETSOCKOPT } else { call::GETSOCKOPT }
}

/// The n-th 8 bytes after the header. Read as the context, which takes one instruction; by a helper it would take a call.
#[inline(always)]
fn slot(ctx: &TracePointContext, n: usize) -> u64 {
    // SAFETY: within the record, see above; the verifier checks it, and that each is read as it stands there.
    unsafe { ctx.as_ptr().cast::<u64>().add(1 + n).read_volatile() }
}
