//! cgroup/bind4, bind6, connect4, connect6, sendmsg4, sendmsg6: what must hold before an address is taken or a route
//! looked up, and everything for datagram sockets, which have no later turn.

use abi::{
    SETTABLE_MAX, apply_point,
    socket::{Facts, State, known, protocol},
};
use aya_ebpf::{helpers::generated::bpf_get_socket_cookie, macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    apply::{POSTPONED, apply, apply_sock_addr, check_sock_addr},
    ctx::{Bound as _, SockAddr, Socket as _},
    storage::{self, Scope},
};

/// Lets every call go on.
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
    let site = if facts.protocol == protocol::TCP { apply_point::BIND_STREAM } else { apply_point::BIND_DATAGRAM };
    apply_at(site, &socket, facts, if inet6 && socket.is_link_local() { POSTPONED } else { 0 });
}

#[inline(always)]
fn connect(ctx: &SockAddrContext, inet6: bool) {
    let Some(socket) = SockAddr::new(ctx.sock_addr) else { return };
    let facts = socket.connect_facts(inet6);
    let site =
        if facts.protocol == protocol::TCP { apply_point::CONNECT_STREAM } else { apply_point::CONNECT_DATAGRAM };
    apply_at(site, &socket, facts, 0);
}

/// Comes by with every datagram that is sent to an address: most are let through at once. What a socket is to have is looked at
/// with its first datagram, unless it was bound or connected or was there before the policies; and again when the kernel has
/// taken its peer or its device from it (`connect` with AF_UNSPEC, `__udp_disconnect` in net/ipv4/udp.c, which no hook sees).
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
fn apply_at(site: u32, socket: &SockAddr, facts: Facts, how: u32) {
    // SAFETY: the context's socket, checked for NULL.
    let Some((state, scope)) = (unsafe { storage::enter_scope(socket.sk(), |_| false) }) else { return };
    apply_to(facts, site, socket, state, scope, how);
}

#[inline(always)]
fn apply_to(facts: Facts, site: u32, socket: &SockAddr, state: &'static mut State, scope: Scope, how: u32) {
    state.is_fresh = 0;
    state.has_peer = u32::from(facts.known & known::REMOTE != 0);
    if state.notes.cookie == 0 {
        // SAFETY: the helper takes this context.
        state.notes.cookie = unsafe { bpf_get_socket_cookie(socket.as_ptr()) };
    }
    let state = storage::update_facts(state, facts);
    apply::<SETTABLE_MAX>(scope, site, state, socket.is_inet6(), |index, rules, missing, _| {
        let missing = missing | how;
        if apply_sock_addr(socket.ctx(), index, rules.sure, rules.possible, missing) != 0 {
            check_sock_addr(socket.ctx(), index, rules.sure, rules.possible, missing);
        }
    });
}
