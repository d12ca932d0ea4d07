//! The audit by fentry and fexit: the fastest, because the kernel calls these programs as it calls functions.
//!
//! System calls and io_uring share functions that get the socket as an argument. The functions of the system calls are around
//! them, and find the socket by its descriptor. Before 6.7 the shared functions do not exist: then the socket is read where
//! the system calls ask the security modules. The agent decides to which functions to attach
//! (agent/src/kernel/audit/fentry.rs).
//!
//! The arguments are in consecutive 64-bit slots, structures in as many slots as they fill, and the result follows
//! (`btf_ctx_access`, kernel/bpf/btf.c). The helper that returns the result exists since 5.17; the slot is older.

use abi::{
    event::{call, source},
    setting::OptionKey,
};
use aya_ebpf::{
    EbpfContext as _,
    macros::{fentry, fexit},
    programs::{FEntryContext, FExitContext},
};

use super::{
    CallEntry, CallExit, Pointer, Subject, handle_entry, handle_exit, handle_socket_exit, is_set, record_socket, via,
};
use crate::kernel;

// match-proto: 6.7: int do_sock_setsockopt(struct socket *sock, bool compat, int level, int optname,
//                                           sockptr_t optval, int optlen)
#[fentry(function = "do_sock_setsockopt")]
pub(crate) fn sp_fentry_set(ctx: FEntryContext) -> i32 {
    handle_entry(CallEntry {
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
    handle_socket_exit(call_exit(call::SETSOCKOPT, ctx.arg(2), ctx.arg(3), ctx.arg(7)));
    0
}

// match-proto: 6.7: int do_sock_getsockopt(struct socket *sock, bool compat, int level, int optname,
//                                           sockptr_t optval, sockptr_t optlen)
#[fentry(function = "do_sock_getsockopt")]
pub(crate) fn sp_fentry_get(ctx: FEntryContext) -> i32 {
    handle_entry(CallEntry {
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
    handle_socket_exit(call_exit(call::GETSOCKOPT, ctx.arg(2), ctx.arg(3), ctx.arg(8)));
    0
}

// match-proto: 5.10: int __sys_setsockopt(int fd, int level, int optname, char __user *optval, int optlen)
#[fentry(function = "__sys_setsockopt")]
pub(crate) fn sp_fentry_set_fd(ctx: FEntryContext) -> i32 {
    handle_descriptor_entry(call::SETSOCKOPT, &ctx);
    0
}

#[fexit(function = "__sys_setsockopt")]
pub(crate) fn sp_fexit_set_fd(ctx: FExitContext) -> i32 {
    handle_exit(call_exit(call::SETSOCKOPT, ctx.arg(1), ctx.arg(2), ctx.arg(5)));
    0
}

// match-proto: 5.10: int __sys_getsockopt(int fd, int level, int optname, char __user *optval, int __user *optlen)
#[fentry(function = "__sys_getsockopt")]
pub(crate) fn sp_fentry_get_fd(ctx: FEntryContext) -> i32 {
    handle_descriptor_entry(call::GETSOCKOPT, &ctx);
    0
}

#[fexit(function = "__sys_getsockopt")]
pub(crate) fn sp_fexit_get_fd(ctx: FExitContext) -> i32 {
    handle_exit(call_exit(call::GETSOCKOPT, ctx.arg(1), ctx.arg(2), ctx.arg(5)));
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
fn call_exit(kind: u32, level: i32, name: i32, result: i32) -> CallExit {
    CallExit { source: source::FENTRY, result: result.into(), kind, key: Some(OptionKey { level, name }) }
}

#[inline(always)]
fn handle_descriptor_entry(kind: u32, ctx: &FEntryContext) {
    // Before 5.17 a program cannot read a pointer to a plain number, such as the last argument of getsockopt. It can read the
    // argument as kernel memory.
    let Some(optlen) = kernel::read(ctx.as_ptr() as u64 + 4 * 8) else { return };
    handle_entry(CallEntry {
        kind,
        via: 0,
        subject: Subject::Descriptor(ctx.arg(0)),
        key: OptionKey { level: ctx.arg(1), name: ctx.arg(2) },
        optval: Pointer::user(ctx.arg(3)),
        optlen: Pointer::user(optlen),
    });
}
