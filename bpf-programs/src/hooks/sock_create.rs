//! cgroup/sock_create: options that must be set when a socket is created, UDP and raw sockets included.
//!
//! No helper can set options here. Instead, the kernel lets a program write three fields of the new socket
//! (`sock_filter_is_valid_access` of `cg_sock_filter`, net/core/filter.c).

use abi::{
    SOCK_CREATE_MAX, apply_point,
    setting::{DEVICE_BY_INDEX, OptionRow, Setting},
    socket::{Notes, State},
};
use aya_ebpf::{cty::c_void, helpers::generated::bpf_get_socket_cookie, macros::cgroup_sock, programs::SockContext};

use crate::{
    apply::{apply, apply_option, outcome},
    ctx::{ENODEV, SockCreate, SockCreateFields, has_device},
    storage,
};

const SO_PRIORITY: i32 = 12;
const SO_MARK: i32 = 36;

/// Returns 1 always: creating the socket succeeds.
#[cgroup_sock(sock_create)]
pub(crate) fn sp_sock_create(ctx: SockContext) -> i32 {
    apply_at_creation(&SockCreate(ctx.sock));
    1
}

#[inline(always)]
fn apply_at_creation(sock: &SockCreate) {
    // SAFETY: the context of cgroup/sock_create.
    let cookie = unsafe { bpf_get_socket_cookie(sock.sk()) };
    let is_new = |state: &mut State| {
        storage::reset_for_new_socket(state, cookie);
        true
    };
    // SAFETY: as above.
    let Some((state, scope)) = (unsafe { storage::enter_scope(sock.sk(), is_new) }) else { return };
    state.notes.cookie = cookie;
    state.is_fresh = 1;
    let state = storage::update_facts(state, sock.facts());
    let mut fields = sock.fields();
    // This apply point has no option that only one family has.
    apply::<SOCK_CREATE_MAX>(scope, apply_point::SOCK_CREATE, state, false, |index, rules, missing, state| {
        apply_option(index, rules, missing, &mut state.notes, |option, setting, notes| {
            set_field(sock.sk(), &mut fields, option, setting, notes)
        });
    });
    sock.set_fields(&fields);
}

#[inline(always)]
fn set_field(
    sk: *mut c_void,
    fields: &mut SockCreateFields,
    option: &OptionRow,
    setting: &Setting,
    notes: &mut Notes,
) -> u32 {
    let field = match option.key.name {
        SO_MARK => &mut fields.mark,
        SO_PRIORITY => &mut fields.priority,
        _ => {
            // SO_BINDTOIFINDEX: this apply point has three options.
            (notes.device, notes.device_wanted) = (setting.value, setting.device());
            &mut fields.device
        }
    };
    let wanted = setting.apply_to(*field);
    if wanted == *field {
        return outcome::UNCHANGED;
    }
    if (option.key == DEVICE_BY_INDEX) && !has_device(sk, wanted) {
        return outcome::FAILED + ENODEV as u32;
    }
    if !setting.is_dry_run() {
        *field = wanted;
    }
    outcome::SET
}
