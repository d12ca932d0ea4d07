//! sock_ops: a TCP socket connects, listens, or has a connection.

use abi::{
    SETTABLE_MAX, apply_point,
    socket::{State, direction},
};
use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_TCP_CONNECT_CB,
        BPF_SOCK_OPS_TCP_LISTEN_CB,
    },
    helpers::generated::bpf_get_socket_cookie,
    macros::sock_ops,
    programs::SockOpsContext,
};

use crate::{
    apply::{apply, apply_sock_ops, check_sock_ops},
    ctx::{SockOps, Socket as _},
    storage,
};

/// Returns 1 always: 0 would make `tcp_call_bpf` discard the replies of other programs.
#[sock_ops]
pub(crate) fn sp_sock_ops(ctx: SockOpsContext) -> u32 {
    apply_to_event(&ctx);
    1
}

#[inline(always)]
fn apply_to_event(ctx: &SockOpsContext) {
    let (point, direction, peer) = match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => (apply_point::SYN, direction::OUTBOUND, true),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => (apply_point::ACTIVE, direction::OUTBOUND, true),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => (apply_point::PASSIVE, direction::INBOUND, true),
        BPF_SOCK_OPS_TCP_LISTEN_CB => (apply_point::LISTEN, direction::INBOUND, false),
        _ => return,
    };
    let Some(socket) = SockOps::new(ctx.ops) else { return };
    let mut is_accepted = false;
    let is_new = |state: &mut State| {
        is_accepted = point == apply_point::PASSIVE && was_accepted(&socket, state);
        is_accepted
    };
    // SAFETY: the context's socket, checked for NULL.
    let Some((state, scope)) = (unsafe { storage::enter_scope(socket.sk(), is_new) }) else { return };
    let (point, direction) = match (point, is_accepted) {
        (apply_point::PASSIVE, false) => (apply_point::ACTIVE, direction::OUTBOUND),
        _ => (point, direction),
    };
    if state.notes.cookie == 0 {
        // SAFETY: the helper takes this context.
        state.notes.cookie = unsafe { bpf_get_socket_cookie(socket.as_ptr()) };
    }
    let state = storage::update_facts(state, socket.facts(direction, peer));
    apply::<SETTABLE_MAX>(scope, point, state, socket.is_inet6(), |index, rules, missing, _| {
        if apply_sock_ops(ctx.ops, index, rules.sure, rules.possible, missing) != 0 {
            check_sock_ops(ctx.ops, index, rules.sure, rules.possible, missing);
        }
    });
}

/// Returns whether a connected socket was accepted from a listener, and not connected by a simultaneous open, which is
/// preceded by a connect call. Initialises the notes of an accepted socket.
///
/// The kernel runs the same callback for both (`tcp_rcv_state_process`, TCP_SYN_RECV, net/ipv4/tcp_input.c).
#[inline(always)]
fn was_accepted(socket: &SockOps, state: &mut State) -> bool {
    if state.is_fallback != 0 {
        // SAFETY: the helper takes this context.
        let cookie = unsafe { bpf_get_socket_cookie(socket.as_ptr()) };
        if storage::reset_for_new_socket(state, cookie) && socket.has_sent() {
            state.facts.direction = direction::OUTBOUND;
        }
    }
    if state.facts.direction == direction::OUTBOUND {
        return false;
    }
    // Of the listener's notes, only what the application requested on the listener applies to this socket too.
    // SAFETY: the context's socket, checked for NULL.
    if let Some(saved) = unsafe { storage::saved_values(socket.sk(), false) } {
        state.notes.app_override = saved.app_override;
        state.notes.requested = saved.has_before_request;
        state.notes.changed = saved.has_before_rule;
    }
    true
}
