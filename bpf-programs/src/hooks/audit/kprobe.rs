//! The audit by kprobe and kretprobe, on the same functions as [`super::fentry`].
//!
//! Arguments in registers are read from there, the others from the stack.

use abi::{
    event::{call, source},
    setting::OptionKey,
};
use aya_ebpf::{
    cty::c_void,
    macros::{kprobe, kretprobe},
    programs::{ProbeContext, RetProbeContext},
};

use super::{
    CallEntry, CallExit, Pointer, Subject, handle_entry, handle_exit, handle_socket_exit, is_set, record_socket, via,
};

// match-proto: 6.7: int do_sock_setsockopt(struct socket *sock, bool compat, int level, int optname,
//                                           sockptr_t optval, int optlen)
#[kprobe]
pub(crate) fn sp_kprobe_set(ctx: ProbeContext) -> u32 {
    if let Some(entry) = socket_call(call::SETSOCKOPT, &ctx) {
        handle_entry(entry);
    }
    0
}

// match-proto: 6.7: int do_sock_getsockopt(struct socket *sock, bool compat, int level, int optname,
//                                           sockptr_t optval, sockptr_t optlen)
#[kprobe]
pub(crate) fn sp_kprobe_get(ctx: ProbeContext) -> u32 {
    if let Some(entry) = socket_call(call::GETSOCKOPT, &ctx) {
        handle_entry(entry);
    }
    0
}

// match-proto: 5.10: int __sys_setsockopt(int fd, int level, int optname, char __user *optval, int optlen)
#[kprobe]
pub(crate) fn sp_kprobe_set_fd(ctx: ProbeContext) -> u32 {
    if let Some(entry) = descriptor_call(call::SETSOCKOPT, &ctx) {
        handle_entry(entry);
    }
    0
}

// match-proto: 5.10: int __sys_getsockopt(int fd, int level, int optname, char __user *optval, int __user *optlen)
#[kprobe]
pub(crate) fn sp_kprobe_get_fd(ctx: ProbeContext) -> u32 {
    if let Some(entry) = descriptor_call(call::GETSOCKOPT, &ctx) {
        handle_entry(entry);
    }
    0
}

// match-proto: 5.10: int security_socket_setsockopt(struct socket *sock, int level, int optname)
#[kprobe]
pub(crate) fn sp_kprobe_set_found(ctx: ProbeContext) -> u32 {
    handle_found(call::SETSOCKOPT, &ctx);
    0
}

// match-proto: 5.10: int security_socket_getsockopt(struct socket *sock, int level, int optname)
#[kprobe]
pub(crate) fn sp_kprobe_get_found(ctx: ProbeContext) -> u32 {
    handle_found(call::GETSOCKOPT, &ctx);
    0
}

/// The exit of the first two functions.
#[kretprobe]
pub(crate) fn sp_kretprobe(ctx: RetProbeContext) -> u32 {
    handle_socket_exit(call_exit(&ctx));
    0
}

/// The exit of the system calls.
#[kretprobe]
pub(crate) fn sp_kretprobe_fd(ctx: RetProbeContext) -> u32 {
    handle_exit(call_exit(&ctx));
    0
}

/// Returns a result without the kind and option of the call, which a return probe does not know.
#[inline(always)]
fn call_exit(ctx: &RetProbeContext) -> CallExit {
    CallExit { source: source::KPROBE, result: ctx.ret::<i32>().into(), kind: 0, key: None }
}

#[inline(always)]
fn handle_found(kind: u32, ctx: &ProbeContext) {
    if let (Some(socket), Some(level), Some(name)) = (ctx.arg(0), ctx.arg(1), ctx.arg(2)) {
        record_socket(socket, kind, OptionKey { level, name });
    }
}

#[inline(always)]
fn descriptor_call(kind: u32, ctx: &ProbeContext) -> Option<CallEntry> {
    Some(CallEntry {
        kind,
        via: 0,
        subject: Subject::Descriptor(ctx.arg(0)?),
        key: OptionKey { level: ctx.arg(1)?, name: ctx.arg(2)? },
        optval: Pointer::user(ctx.arg(3)?),
        optlen: Pointer::user(ctx.arg(4)?),
    })
}

#[inline(always)]
fn socket_call(kind: u32, ctx: &ProbeContext) -> Option<CallEntry> {
    let optlen = Pointer {
        address: late_argument(ctx, 0)?,
        in_kernel: kind == call::GETSOCKOPT && is_set(late_argument(ctx, 1)?),
    };
    Some(CallEntry {
        kind,
        via: via(ctx.arg(1)?),
        subject: Subject::Socket(ctx.arg::<*const c_void>(0)?),
        key: OptionKey { level: ctx.arg(2)?, name: ctx.arg(3)? },
        optval: Pointer { address: ctx.arg(4)?, in_kernel: is_set(ctx.arg(5)?) },
        optlen,
    })
}

/// Reads an argument after the sixth: by the System V ABI it is on the stack, above the return address.
#[cfg(bpf_target_arch = "x86_64")]
#[inline(always)]
fn late_argument(ctx: &ProbeContext, n: u64) -> Option<u64> {
    // SAFETY: the kernel's registers, valid while the program runs.
    let stack = unsafe { (*ctx.regs).rsp };
    crate::kernel::read(stack + 8 + 8 * n)
}

/// Reads an argument after the sixth: on architectures that pass eight arguments in registers, it is in one of these.
#[cfg(not(bpf_target_arch = "x86_64"))]
#[inline(always)]
fn late_argument(ctx: &ProbeContext, n: u64) -> Option<u64> {
    ctx.arg(6 + n as usize)
}
