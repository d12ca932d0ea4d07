//! sock_ops: a TCP socket calls, listens, or is connected.

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

/// Returns 1 always: 0 would make `tcp_call_bpf` discard other programs' replies.
#[sock_ops]
pub(crate) fn sp_sock_ops(ctx: SockOpsContext) -> u32 {
    apply_to_event(&ctx);
    1
}

#[inline(always)]
fn apply_to_event(ctx: &SockOpsContext) {
    let (site, direction, peer) = match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => (apply_point::SYN, direction::OUTBOUND, true),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => (apply_point::ACTIVE, direction::OUTBOUND, true),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => (apply_point::PASSIVE, direction::INBOUND, true),
        BPF_SOCK_OPS_TCP_LISTEN_CB => (apply_point::LISTEN, direction::INBOUND, false),
        _ => return,
    };
    let Some(turn) = SockOps::new(ctx.ops) else { return };
    let mut is_accepted = false;
    let begins = |state: &mut State| {
        is_accepted = site == apply_point::PASSIVE && is_accepted_now(&turn, state);
        is_accepted
    };
    // SAFETY: the context's socket, checked for NULL.
    let Some((state, scope)) = (unsafe { storage::enter_scope(turn.sk(), begins) }) else { return };
    let (site, direction) = match (site, is_accepted) {
        (apply_point::PASSIVE, false) => (apply_point::ACTIVE, direction::OUTBOUND),
        _ => (site, direction),
    };
    if state.notes.cookie == 0 {
        // SAFETY: the helper takes this context.
        state.notes.cookie = unsafe { bpf_get_socket_cookie(turn.as_ptr()) };
    }
    let state = storage::update_facts(state, turn.facts(direction, peer));
    apply::<SETTABLE_MAX>(scope, site, state, turn.is_inet6(), |index, rules, missing, _| {
        if apply_sock_ops(ctx.ops, index, rules.sure, rules.possible, missing) != 0 {
            check_sock_ops(ctx.ops, index, rules.sure, rules.possible, missing);
        }
    });
}

/// Whether a socket that is connected without having been answered is accepted from a listener, and not connected by a
/// simultaneous open: then the socket has called connect. Begins the notes of an accepted socket.
///
/// The kernel has the same callback for both (`tcp_rcv_state_process`, TCP_SYN_RECV, net/ipv4/tcp_input.c).
#[inline(always)]
fn is_accepted_now(turn: &SockOps, state: &mut State) -> bool {
    if state.is_unstored != 0 {
        // SAFETY: the helper takes this context.
        let cookie = unsafe { bpf_get_socket_cookie(turn.as_ptr()) };
        if storage::reset_for_new_socket(state, cookie) && turn.has_sent() {
            state.facts.direction = direction::OUTBOUND;
        }
    }
    if state.facts.direction == direction::OUTBOUND {
        return false;
    }
    // Of the listener's notes only what the application asked for on the listener goes for this socket too.
    // SAFETY: the context's socket, checked for NULL.
    if let Some(kept) = unsafe { storage::saved_values(turn.sk(), false) } {
        state.notes.app_override = kept.yielded;
        state.notes.requested = kept.has_asked;
        state.notes.changed = kept.has_before;
    }
    true
}
