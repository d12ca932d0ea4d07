//! The audit by kprobe and kretprobe, on the same functions as [`super::fentry`].
//!
//! What the kernel passes in registers is read from there, the rest from the stack.

use abi::{
    event::{call, source},
    setting::OptionKey,
};
use aya_ebpf::{
    cty::c_void,
    macros::{kprobe, kretprobe},
    programs::{ProbeContext, RetProbeContext},
};

use super::{CallEntry, CallExit, Pointer, Subject, begin, end, end_with_socket, is_set, record_socket, via};

// match-proto: 6.7: int do_sock_setsockopt(struct socket *sock, bool compat, int level, int optname,
//                                           sockptr_t optval, int optlen)
#[kprobe]
pub(crate) fn sp_kprobe_set(ctx: ProbeContext) -> u32 {
    if let Some(begun) = socket_call(call::SETSOCKOPT, &ctx) {
        begin(begun);
    }
    0
}

// match-proto: 6.7: int do_sock_getsockopt(struct socket *sock, bool compat, int level, int optname,
//                                           sockptr_t optval, sockptr_t optlen)
#[kprobe]
pub(crate) fn sp_kprobe_get(ctx: ProbeContext) -> u32 {
    if let Some(begun) = socket_call(call::GETSOCKOPT, &ctx) {
        begin(begun);
    }
    0
}

// match-proto: 5.10: int __sys_setsockopt(int fd, int level, int optname, char __user *optval, int optlen)
#[kprobe]
pub(crate) fn sp_kprobe_set_fd(ctx: ProbeContext) -> u32 {
    if let Some(begun) = descriptor_call(call::SETSOCKOPT, &ctx) {
        begin(begun);
    }
    0
}

// match-proto: 5.10: int __sys_getsockopt(int fd, int level, int optname, char __user *optval, int __user *optlen)
#[kprobe]
pub(crate) fn sp_kprobe_get_fd(ctx: ProbeContext) -> u32 {
    if let Some(begun) = descriptor_call(call::GETSOCKOPT, &ctx) {
        begin(begun);
    }
    0
}

// match-proto: 5.10: int security_socket_setsockopt(struct socket *sock, int level, int optname)
#[kprobe]
pub(crate) fn sp_kprobe_set_found(ctx: ProbeContext) -> u32 {
    found(call::SETSOCKOPT, &ctx);
    0
}

// match-proto: 5.10: int security_socket_getsockopt(struct socket *sock, int level, int optname)
#[kprobe]
pub(crate) fn sp_kprobe_get_found(ctx: ProbeContext) -> u32 {
    found(call::GETSOCKOPT, &ctx);
    0
}

/// The end of the first two.
#[kretprobe]
pub(crate) fn sp_kretprobe(ctx: RetProbeContext) -> u32 {
    end_with_socket(ended(&ctx));
    0
}

/// The end of the system calls.
#[kretprobe]
pub(crate) fn sp_kretprobe_fd(ctx: RetProbeContext) -> u32 {
    end(ended(&ctx));
    0
}

/// A return does not say of which call it is.
#[inline(always)]
fn ended(ctx: &RetProbeContext) -> CallExit {
    CallExit { source: source::KPROBE, result: ctx.ret::<i32>().into(), kind: 0, key: None }
}

#[inline(always)]
fn found(kind: u32, ctx: &ProbeContext) {
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

/// An argument after the sixth: by the System V ABI it is on the stack, above the return address.
#[cfg(bpf_target_arch = "x86_64")]
#[inline(always)]
fn late_argument(ctx: &ProbeContext, n: u64) -> Option<u64> {
    // SAFETY: the kernel's registers, for as long as the program runs.
    let stack = unsafe { (*ctx.regs).rsp };
    crate::kernel::read(stack + 8 + 8 * n)
}

/// An argument after the sixth: where eight go in registers, that is still one of these.
#[cfg(not(bpf_target_arch = "x86_64"))]
#[inline(always)]
fn late_argument(ctx: &ProbeContext, n: u64) -> Option<u64> {
    ctx.arg(6 + n as usize)
}
