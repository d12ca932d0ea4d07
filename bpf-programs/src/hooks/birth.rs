//! cgroup/sock_create: what holds from a socket's first moment, UDP and raw sockets included.
//!
//! No helper can set options here; the kernel lets a program write three fields of the new socket
//! instead (`cg_sock_filter`'s `sock_filter_is_valid_access`, net/core/filter.c).

use abi::{
    BIRTH_MAX,
    setting::{DEVICE_BY_INDEX, Governed, Setting},
    site,
    socket::{Notes, State},
};
use aya_ebpf::{cty::c_void, helpers::generated::bpf_get_socket_cookie, macros::cgroup_sock, programs::SockContext};

use crate::{
    apply::{apply, apply_option, outcome},
    ctx::{Birth, BirthFields, ENODEV, has_device},
    storage,
};

const SO_PRIORITY: i32 = 12;
const SO_MARK: i32 = 36;

/// Lets every socket be made: 1 means "go on".
#[cgroup_sock(sock_create)]
pub(crate) fn birth_apply(ctx: SockContext) -> i32 {
    try_birth_apply(&Birth(ctx.sock));
    1
}

#[inline(always)]
fn try_birth_apply(birth: &Birth) {
    // SAFETY: the context of cgroup/sock_create.
    let cookie = unsafe { bpf_get_socket_cookie(birth.sk()) };
    let begins = |state: &mut State| {
        storage::forget_another(state, cookie);
        true
    };
    // SAFETY: as above.
    let Some((state, scope)) = (unsafe { storage::claim(birth.sk(), begins) }) else { return };
    state.notes.cookie = cookie;
    state.is_fresh = 1;
    let state = storage::learn(state, birth.facts());
    let mut fields = birth.fields();
    // The options that only one family has are not among those of this site.
    apply::<BIRTH_MAX>(scope, site::BIRTH, state, false, |index, rules, missing, state| {
        apply_option(index, rules, missing, &mut state.notes, |option, setting, notes| {
            set_field(birth.sk(), &mut fields, option, setting, notes)
        });
    });
    birth.set_fields(&fields);
}

#[inline(always)]
fn set_field(
    sk: *mut c_void,
    fields: &mut BirthFields,
    option: &Governed,
    setting: &Setting,
    notes: &mut Notes,
) -> u32 {
    let field = match option.key.name {
        SO_MARK => &mut fields.mark,
        SO_PRIORITY => &mut fields.priority,
        _ => {
            // SO_BINDTOIFINDEX: the site has these three.
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
