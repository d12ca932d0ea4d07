//! The audit by the tracepoints of the two system calls: used if nothing better is available.
//!
//! Tracepoints see neither calls of 32-bit programs nor calls by io_uring.
//!
//! The format of a system call's tracepoint is fixed: 8 bytes of header, then 8 bytes with the call's number. At entry, each
//! argument follows in 8 bytes (`struct syscall_trace_enter`, kernel/trace/trace.h). At exit, the result follows (`struct
//! syscall_trace_exit`).

use abi::{
    event::{call, flags, source},
    setting::OptionKey,
};
use aya_ebpf::{EbpfContext as _, macros::tracepoint, programs::TracePointContext};

use super::{CallEntry, CallExit, Pointer, SYSTEM_CALLS, Subject, handle_entry, handle_exit};

/// At the entry of both system calls.
#[tracepoint]
pub(crate) fn sp_sys_enter(ctx: TracePointContext) -> u32 {
    handle_entry(CallEntry {
        kind: kind(&ctx),
        via: flags::SYSCALL,
        subject: Subject::DescriptorAlone(slot(&ctx, 1) as i32),
        key: OptionKey { level: slot(&ctx, 2) as i32, name: slot(&ctx, 3) as i32 },
        optval: Pointer::user(slot(&ctx, 4)),
        optlen: Pointer::user(slot(&ctx, 5)),
    });
    0
}

/// At the exit of both system calls.
#[tracepoint]
pub(crate) fn sp_sys_exit(ctx: TracePointContext) -> u32 {
    handle_exit(CallExit { source: source::TRACEPOINT, result: slot(&ctx, 1) as i64, kind: kind(&ctx), key: None });
    0
}

/// Returns which of the two system calls this is.
#[inline(always)]
fn kind(ctx: &TracePointContext) -> u32 {
    // SAFETY: as in `slot`. The number has four bytes, and the next four are undefined.
    let number = unsafe { ctx.as_ptr().cast::<u32>().add(2).read_volatile() };
    if i64::from(number) == SYSTEM_CALLS[0] { call::SETSOCKOPT } else { call::GETSOCKOPT }
}

/// Returns the n-th 8 bytes after the header. Read through the context, which takes one instruction instead of a helper call.
#[inline(always)]
fn slot(ctx: &TracePointContext, n: usize) -> u64 {
    // SAFETY: within the record (see above). The verifier checks the access, and that its size matches.
    unsafe { ctx.as_ptr().cast::<u64>().add(1 + n).read_volatile() }
}
