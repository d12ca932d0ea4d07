//! cgroup/bind4, bind6, connect4, connect6, sendmsg4, sendmsg6: options that must be set before an address is bound or a
//! route is looked up. Datagram sockets have no later hook, so all their options are set here.

use abi::{
    SETTABLE_MAX, apply_point,
    socket::{Facts, State, known, protocol},
};
use aya_ebpf::{helpers::generated::bpf_get_socket_cookie, macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    apply::{POSTPONED, apply, apply_sock_addr, check_sock_addr},
    ctx::{HasDevice as _, SockAddr, Socket as _},
    storage::{self, Scope},
};

/// Lets the call continue.
const GO_ON: i32 = 1;

#[cgroup_sock_addr(bind4)]
pub(crate) fn sp_bind4(ctx: SockAddrContext) -> i32 {
    bind(&ctx, false);
    GO_ON
}

#[cgroup_sock_addr(bind6)]
pub(crate) fn sp_bind6(ctx: SockAddrContext) -> i32 {
    bind(&ctx, true);
    GO_ON
}

#[cgroup_sock_addr(connect4)]
pub(crate) fn sp_connect4(ctx: SockAddrContext) -> i32 {
    connect(&ctx, false);
    GO_ON
}

#[cgroup_sock_addr(connect6)]
pub(crate) fn sp_connect6(ctx: SockAddrContext) -> i32 {
    connect(&ctx, true);
    GO_ON
}

#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn sp_sendmsg4(ctx: SockAddrContext) -> i32 {
    send(&ctx);
    GO_ON
}

#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn sp_sendmsg6(ctx: SockAddrContext) -> i32 {
    send(&ctx);
    GO_ON
}

#[inline(always)]
fn bind(ctx: &SockAddrContext, inet6: bool) {
    let Some(socket) = SockAddr::new(ctx.sock_addr) else { return };
    let facts = socket.bind_facts(inet6);
    let point = if facts.protocol == protocol::TCP { apply_point::BIND_STREAM } else { apply_point::BIND_DATAGRAM };
    apply_at(point, &socket, facts, if inet6 && socket.is_link_local() { POSTPONED } else { 0 });
}

#[inline(always)]
fn connect(ctx: &SockAddrContext, inet6: bool) {
    let Some(socket) = SockAddr::new(ctx.sock_addr) else { return };
    let facts = socket.connect_facts(inet6);
    let point =
        if facts.protocol == protocol::TCP { apply_point::CONNECT_STREAM } else { apply_point::CONNECT_DATAGRAM };
    apply_at(point, &socket, facts, 0);
}

/// Runs for every datagram that is sent to an address, and returns early for most. Applies the options with the first
/// datagram of a socket that was created under the policies and was not bound or connected.
///
/// Applies the options again if the kernel has removed the socket's peer or device. No hook sees this (`connect` with
/// AF_UNSPEC, `__udp_disconnect` in net/ipv4/udp.c).
#[inline(always)]
fn send(ctx: &SockAddrContext) {
    let Some(socket) = SockAddr::new(ctx.sock_addr) else { return };
    // SAFETY: the context's socket, checked for NULL.
    let Some((state, scope)) = (unsafe { storage::enter_scope(socket.sk(), |_| false) }) else { return };
    let lost_device = state.notes.device_wanted != 0 && state.notes.device != socket.device();
    let lost_peer = state.has_peer != 0 && !socket.is_connected();
    if state.is_fresh != 0 || lost_device || lost_peer {
        apply_to(socket.send_facts(), apply_point::SEND, &socket, state, scope, 0);
    }
}

#[inline(always)]
fn apply_at(point: u32, socket: &SockAddr, facts: Facts, extra: u32) {
    // SAFETY: the context's socket, checked for NULL.
    let Some((state, scope)) = (unsafe { storage::enter_scope(socket.sk(), |_| false) }) else { return };
    apply_to(facts, point, socket, state, scope, extra);
}

#[inline(always)]
fn apply_to(facts: Facts, point: u32, socket: &SockAddr, state: &'static mut State, scope: Scope, extra: u32) {
    state.is_fresh = 0;
    state.has_peer = u32::from(facts.known & known::REMOTE != 0);
    if state.notes.cookie == 0 {
        // SAFETY: the helper takes this context.
        state.notes.cookie = unsafe { bpf_get_socket_cookie(socket.as_ptr()) };
    }
    let state = storage::update_facts(state, facts);
    apply::<SETTABLE_MAX>(scope, point, state, socket.is_inet6(), |index, rules, missing, _| {
        let missing = missing | extra;
        if apply_sock_addr(socket.ctx(), index, rules.sure, rules.possible, missing) != 0 {
            check_sock_addr(socket.ctx(), index, rules.sure, rules.possible, missing);
        }
    });
}
