//! The audit by fentry and fexit: the cheapest, for the kernel calls these programs as it calls functions.
//!
//! The functions that system calls and io_uring have in common are handed the socket. Around them are those of the system
//! calls, which find it by its descriptor. Before 6.7 the former are not there, and what the system calls find is seen where
//! they ask the security modules. The agent knows which to attach to (agent/src/kernel/audit/fentry.rs).
//!
//! The arguments lie in a row of 64-bit slots, structures in as many as they fill, and the result behind them
//! (`btf_ctx_access`, kernel/bpf/btf.c). The helper that gives the result is 5.17 and later, the slot is older.

use abi::{
    event::{call, source},
    setting::OptionKey,
};
use aya_ebpf::{
    EbpfContext as _,
    macros::{fentry, fexit},
    programs::{FEntryContext, FExitContext},
};

use super::{CallEntry, CallExit, Pointer, Subject, begin, end, end_with_socket, is_set, record_socket, via};
use crate::kernel;

// match-proto: 6.7: int do_sock_setsockopt(struct socket *sock, bool compat, int level, int optname,
//                                           sockptr_t optval, int optlen)
#[fentry(function = "do_sock_setsockopt")]
pub(crate) fn sp_fentry_set(ctx: FEntryContext) -> i32 {
    begin(CallEntry {
        kind: call::SETSOCKOPT,
        via: via(ctx.arg(1)),
        subject: Subject::Socket(ctx.arg(0)),
        key: OptionKey { level: ctx.arg(2), name: ctx.arg(3) },
        optval: Pointer { address: ctx.arg(4), in_kernel: is_set(ctx.arg(5)) },
        optlen: Pointer::user(ctx.arg(6)),
    });
    0
}

#[fexit(function = "do_sock_setsockopt")]
pub(crate) fn sp_fexit_set(ctx: FExitContext) -> i32 {
    end_with_socket(ended(call::SETSOCKOPT, ctx.arg(2), ctx.arg(3), ctx.arg(7)));
    0
}

// match-proto: 6.7: int do_sock_getsockopt(struct socket *sock, bool compat, int level, int optname,
//                                           sockptr_t optval, sockptr_t optlen)
#[fentry(function = "do_sock_getsockopt")]
pub(crate) fn sp_fentry_get(ctx: FEntryContext) -> i32 {
    begin(CallEntry {
        kind: call::GETSOCKOPT,
        via: via(ctx.arg(1)),
        subject: Subject::Socket(ctx.arg(0)),
        key: OptionKey { level: ctx.arg(2), name: ctx.arg(3) },
        optval: Pointer { address: ctx.arg(4), in_kernel: is_set(ctx.arg(5)) },
        optlen: Pointer { address: ctx.arg(6), in_kernel: is_set(ctx.arg(7)) },
    });
    0
}

#[fexit(function = "do_sock_getsockopt")]
pub(crate) fn sp_fexit_get(ctx: FExitContext) -> i32 {
    end_with_socket(ended(call::GETSOCKOPT, ctx.arg(2), ctx.arg(3), ctx.arg(8)));
    0
}

// match-proto: 5.10: int __sys_setsockopt(int fd, int level, int optname, char __user *optval, int optlen)
#[fentry(function = "__sys_setsockopt")]
pub(crate) fn sp_fentry_set_fd(ctx: FEntryContext) -> i32 {
    begin_by_descriptor(call::SETSOCKOPT, &ctx);
    0
}

#[fexit(function = "__sys_setsockopt")]
pub(crate) fn sp_fexit_set_fd(ctx: FExitContext) -> i32 {
    end(ended(call::SETSOCKOPT, ctx.arg(1), ctx.arg(2), ctx.arg(5)));
    0
}

// match-proto: 5.10: int __sys_getsockopt(int fd, int level, int optname, char __user *optval, int __user *optlen)
#[fentry(function = "__sys_getsockopt")]
pub(crate) fn sp_fentry_get_fd(ctx: FEntryContext) -> i32 {
    begin_by_descriptor(call::GETSOCKOPT, &ctx);
    0
}

#[fexit(function = "__sys_getsockopt")]
pub(crate) fn sp_fexit_get_fd(ctx: FExitContext) -> i32 {
    end(ended(call::GETSOCKOPT, ctx.arg(1), ctx.arg(2), ctx.arg(5)));
    0
}

// match-proto: 5.10: int security_socket_setsockopt(struct socket *sock, int level, int optname)
#[fentry(function = "security_socket_setsockopt")]
pub(crate) fn sp_fentry_set_found(ctx: FEntryContext) -> i32 {
    record_socket(ctx.arg(0), call::SETSOCKOPT, OptionKey { level: ctx.arg(1), name: ctx.arg(2) });
    0
}

// match-proto: 5.10: int security_socket_getsockopt(struct socket *sock, int level, int optname)
#[fentry(function = "security_socket_getsockopt")]
pub(crate) fn sp_fentry_get_found(ctx: FEntryContext) -> i32 {
    record_socket(ctx.arg(0), call::GETSOCKOPT, OptionKey { level: ctx.arg(1), name: ctx.arg(2) });
    0
}

#[inline(always)]
fn ended(kind: u32, level: i32, name: i32, result: i32) -> CallExit {
    CallExit { source: source::FENTRY, result: result.into(), kind, key: Some(OptionKey { level, name }) }
}

#[inline(always)]
fn begin_by_descriptor(kind: u32, ctx: &FEntryContext) {
    // Before 5.17 a program may not look at a pointer to a plain number, as the last argument of getsockopt is. As
    // memory of the kernel's it may.
    let Some(optlen) = kernel::read(ctx.as_ptr() as u64 + 4 * 8) else { return };
    begin(CallEntry {
        kind,
        via: 0,
        subject: Subject::Descriptor(ctx.arg(0)),
        key: OptionKey { level: ctx.arg(1), name: ctx.arg(2) },
        optval: Pointer::user(ctx.arg(3)),
        optlen: Pointer::user(optlen),
    });
}
