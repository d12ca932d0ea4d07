//! cgroup/sock_create: what holds from a socket's first moment, UDP and raw sockets included.
//!
//! No helper can set options here; the kernel lets a program write three fields of the new socket
//! instead (`cg_sock_filter`'s `sock_filter_is_valid_access`, net/core/filter.c).

use abi::{BIRTH_MAX, setting::form, site};
use aya_ebpf::{helpers::generated::bpf_get_socket_cookie, macros::cgroup_sock, programs::SockContext};

use crate::{
    apply::{Subject, apply, outcome},
    ctx::{Birth, BirthFields},
    maps, storage,
};

const SO_PRIORITY: i32 = 12;
const SO_MARK: i32 = 36;
const SO_BINDTOIFINDEX: i32 = 62;

/// Lets every socket be made: 1 means "go on".
#[cgroup_sock(sock_create)]
pub(crate) fn birth_apply(ctx: SockContext) -> i32 {
    try_birth_apply(&Birth(ctx.sock));
    1
}

#[inline(always)]
fn try_birth_apply(birth: &Birth) {
    let facts = birth.facts();
    // SAFETY: the context of cgroup/sock_create.
    let Some(state) = (unsafe { storage::state(birth.sk()) }) else { return };
    // SAFETY: as above.
    state.cookie = unsafe { bpf_get_socket_cookie(birth.sk()) };
    // The options that only one family has are not among those of this site.
    let mut subject = Subject { facts: &facts, is_inet6: false, state };
    let mut fields = birth.fields();
    apply::<BIRTH_MAX>(site::BIRTH, &mut subject, |index, winner, dry_run| {
        set_field(&mut fields, index, winner, dry_run)
    });
    birth.set_fields(&fields);
}

#[inline(always)]
fn set_field(fields: &mut BirthFields, index: u32, winner: u32, dry_run: bool) -> u32 {
    let Some(option) = maps::option(index) else { return outcome::NONE };
    let Some(setting) = maps::setting(winner) else { return outcome::NONE };
    if setting.form != form::SET {
        return outcome::NONE;
    }
    let field = match option.key.name {
        SO_MARK => &mut fields.mark,
        SO_PRIORITY => &mut fields.priority,
        SO_BINDTOIFINDEX => &mut fields.device,
        _ => return outcome::NONE,
    };
    let wanted = setting.apply_to(*field);
    if wanted == *field {
        return outcome::UNCHANGED;
    }
    if !dry_run {
        *field = wanted;
    }
    outcome::SET
}
