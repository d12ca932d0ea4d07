//! lsm_cgroup/socket_post_create (6.0, where the BPF LSM is active): what holds from creation for sockets that may pass no later
//! hook, raw, ping and UDP-Lite sockets among them.
//!
//! Unlike cgroup/sock_create, this hook may call bpf_setsockopt (`bpf_lsm_func_proto`, kernel/bpf/bpf_lsm.c). The kernel runs it
//! later than cgroup/sock_create, when the socket has its `struct socket` (`__sock_create`, net/socket.c). TCP sockets are left
//! to the hooks of connections.

use abi::{
    POST_CREATE_MAX, apply_point, entry,
    select::{Candidates, select},
    socket::{State, protocol},
};
use aya_ebpf::{cty::c_void, helpers::generated::bpf_loop, macros::lsm_cgroup, programs::LsmContext};

use crate::{
    apply::{apply_to_new, missing_traits},
    ctx::PostCreate,
    maps::{self, PrefixMap},
    storage::{self, Scope},
};

/// Lets every socket be made: 1 means "go on".
#[lsm_cgroup(hook = "socket_post_create")]
pub(crate) fn sp_post_create(ctx: LsmContext) -> i32 {
    if let Some(socket) = PostCreate::new(&ctx) {
        let mut round = Round { socket, scope: Scope::default(), rules: Candidates::default(), missing: 0 };
        let count = begin(&mut round);
        if count != 0 {
            // In a loop of the program the verifier would go through each option anew, which takes 6.1 more than a million steps.
            // SAFETY: a function that takes a number and a pointer to what it is given here.
            unsafe { bpf_loop(count, apply_next as *mut c_void, (&raw mut round).cast(), 0) };
        }
    }
    1
}

/// What one option after the other is applied by.
struct Round {
    socket: PostCreate,
    scope: Scope,
    rules: Candidates,
    missing: u32,
}

/// Looks up which rules match a new socket. Returns how many options there are to apply.
///
/// A function of its own: what it has on the stack is not there beside what [`apply_next`] has.
#[inline(never)]
fn begin(round: &mut Round) -> u32 {
    try_begin(round).unwrap_or(0)
}

#[inline(always)]
fn try_begin(round: &mut Round) -> Option<u32> {
    let facts = round.socket.facts();
    if facts.protocol == protocol::TCP {
        return None;
    }
    // cgroup/sock_create has made the notes.
    // SAFETY: the hook's socket, checked for NULL.
    let (state, scope) = unsafe { storage::enter_scope(round.socket.sk(), |_: &mut State| false) }?;
    let state = storage::update_facts(state, facts);
    let list = maps::apply_list(scope.number, apply_point::POST_CREATE)?;
    round.scope = scope;
    round.rules = select(&state.facts, maps::selectors(scope.number)?, &PrefixMap { scope: scope.number });
    round.missing = missing_traits(&state.facts, round.socket.is_inet6());
    Some(list.len)
}

/// Applies the option at a position of the list; 1 ends the loop.
#[inline(never)]
unsafe extern "C" fn apply_next(position: u32, round: *mut Round) -> i64 {
    // SAFETY: what `bpf_loop` was given.
    let Round { socket, scope, rules, missing } = unsafe { &*round };
    let Some(list) = maps::apply_list(scope.number, apply_point::POST_CREATE) else { return 1 };
    let Some(entry) = list.options[..POST_CREATE_MAX].get(position as usize) else { return 1 };
    apply_to_new(socket, scope.options + (entry & entry::NUMBER), *rules, missing | (entry & !entry::NUMBER));
    0
}
