//! lsm_cgroup/socket_post_create (6.0, if the BPF LSM is active): options that must be set at creation on sockets that may
//! reach no later hook. Raw, ping and UDP-Lite sockets are among these.
//!
//! Unlike cgroup/sock_create, this hook can call bpf_setsockopt (`bpf_lsm_func_proto`, kernel/bpf/bpf_lsm.c). The kernel runs
//! it after cgroup/sock_create, when the socket has its `struct socket` (`__sock_create`, net/socket.c). The hooks of
//! connections handle TCP sockets.

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

/// Returns 1 always: creating the socket succeeds.
#[lsm_cgroup(hook = "socket_post_create")]
pub(crate) fn sp_post_create(ctx: LsmContext) -> i32 {
    if let Some(socket) = PostCreate::new(&ctx) {
        let mut context = LoopContext { socket, scope: Scope::default(), rules: Candidates::default(), missing: 0 };
        let count = prepare(&mut context);
        if count != 0 {
            // The verifier would check each option again in a loop of the program: more than a million instructions on 6.1.
            // SAFETY: the callback takes a number and a pointer to the value that is passed here.
            unsafe { bpf_loop(count, apply_next as *mut c_void, (&raw mut context).cast(), 0) };
        }
    }
    1
}

/// What the callback of the loop gets for each option.
struct LoopContext {
    socket: PostCreate,
    scope: Scope,
    rules: Candidates,
    missing: u32,
}

/// Finds the rules that match a new socket. Returns the number of options to apply.
///
/// Not inlined, so that its stack is not in use at the same time as the stack of [`apply_next`].
#[inline(never)]
fn prepare(context: &mut LoopContext) -> u32 {
    try_prepare(context).unwrap_or(0)
}

#[inline(always)]
fn try_prepare(context: &mut LoopContext) -> Option<u32> {
    let facts = context.socket.facts();
    if facts.protocol == protocol::TCP {
        return None;
    }
    // cgroup/sock_create has created the notes.
    // SAFETY: the hook's socket, checked for NULL.
    let (state, scope) = unsafe { storage::enter_scope(context.socket.sk(), |_: &mut State| false) }?;
    let state = storage::update_facts(state, facts);
    let list = maps::apply_list(scope.number, apply_point::POST_CREATE)?;
    context.scope = scope;
    context.rules = select(&state.facts, maps::selectors(scope.number)?, &PrefixMap { scope: scope.number });
    context.missing = missing_traits(&state.facts, context.socket.is_inet6());
    Some(list.len)
}

/// Applies the option at a position of the list. Returns 1 to end the loop.
#[inline(never)]
unsafe extern "C" fn apply_next(position: u32, context: *mut LoopContext) -> i64 {
    // SAFETY: the pointer that was passed to `bpf_loop`.
    let LoopContext { socket, scope, rules, missing } = unsafe { &*context };
    let Some(list) = maps::apply_list(scope.number, apply_point::POST_CREATE) else { return 1 };
    let Some(entry) = list.options[..POST_CREATE_MAX].get(position as usize) else { return 1 };
    apply_to_new(socket, scope.options + (entry & entry::NUMBER), *rules, missing | (entry & !entry::NUMBER));
    0
}
