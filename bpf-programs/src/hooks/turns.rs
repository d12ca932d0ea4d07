//! sock_ops: a TCP socket calls, listens, or is connected.

use abi::{
    SETTABLE_MAX, site,
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
    apply::{apply, apply_turn},
    ctx::{Socket as _, Turn},
    storage,
};

/// Returns 1 always: 0 would make `tcp_call_bpf` discard other programs' replies.
#[sock_ops]
pub(crate) fn turn_apply(ctx: SockOpsContext) -> u32 {
    try_turn_apply(&ctx);
    1
}

#[inline(always)]
fn try_turn_apply(ctx: &SockOpsContext) {
    let (site, direction, peer) = match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => (site::SYN, direction::OUTBOUND, true),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => (site::ACTIVE, direction::OUTBOUND, true),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => (site::PASSIVE, direction::INBOUND, true),
        BPF_SOCK_OPS_TCP_LISTEN_CB => (site::LISTEN, direction::INBOUND, false),
        _ => return,
    };
    let Some(turn) = Turn::new(ctx.ops) else { return };
    // SAFETY: the context's socket, checked for NULL.
    let Some((state, scope)) = (unsafe { storage::claim(turn.sk(), site == site::PASSIVE) }) else { return };
    if site == site::PASSIVE {
        // The kernel copied the listener's notes: of these only what the application asked for on
        // the listener goes for this socket too.
        let State { yielded, target, generation, .. } = *state;
        *state = State { yielded, target, generation, ..State::default() };
    }
    if state.cookie == 0 {
        // SAFETY: the helper takes this context.
        state.cookie = unsafe { bpf_get_socket_cookie(turn.as_ptr()) };
    }
    let state = storage::learn(state, turn.facts(direction, peer));
    apply::<SETTABLE_MAX>(scope, site, state, turn.is_inet6(), |index, rules, missing, _| {
        apply_turn(ctx.ops, index, rules.sure, rules.possible, missing);
    });
}
