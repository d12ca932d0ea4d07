//! Notes kept with each socket ([`State`]), in storage that the kernel frees with the socket; and by them, which of the
//! programs that the kernel runs for a socket is to decide about it.
//!
//! A socket may have no room for storage: `net.core.optmem_max` of its network namespace limits it, and root of a user namespace
//! can set it to 0 (`omem_charge`, net/core/bpf_sk_storage.c). Then the notes stand in map `FALLBACK_STATES`, which has room for
//! [`abi::FALLBACK_MAX`] sockets: the least recently used notes make room, and a socket without its notes begins anew.
//!
//! aya-ebpf's `SkStorage` takes only connect and sendmsg contexts and cannot ask for notes to be
//! copied to accepted sockets, so the maps are defined here.
//!
//! Invariant: of all targets that a socket is in, the programs of the deepest decide about it, and no others.

use core::arch::asm;

use abi::{
    Config, Target, TargetSlot, index,
    socket::{Facts, Notes, SavedValues, State, direction},
};
use aya_ebpf::{
    bindings::{BPF_F_CLONE, BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, bpf_map_type::BPF_MAP_TYPE_SK_STORAGE},
    cty::c_void,
    helpers::generated::bpf_sk_storage_get,
};

use crate::maps;

/// A map definition as loaders read it from BTF: only the types of the fields say something.
#[repr(C)]
struct SocketStorage<T: 'static, const FLAGS: usize> {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; FLAGS],
}

// SAFETY: nobody follows these pointers.
unsafe impl<T, const FLAGS: usize> Sync for SocketStorage<T, FLAGS> {}

impl<T, const FLAGS: usize> SocketStorage<T, FLAGS> {
    const NEW: Self = Self {
        r#type: core::ptr::null(),
        key: core::ptr::null(),
        value: core::ptr::null(),
        max_entries: core::ptr::null(),
        map_flags: core::ptr::null(),
    };

    /// The value of a socket, made if `flags` say so. NULL if there is none, or no memory for one.
    ///
    /// # Safety
    ///
    /// As for [`state`].
    #[inline(always)]
    unsafe fn get(&'static self, sk: *mut c_void, flags: u32) -> *mut T {
        // SAFETY: the caller vouches for `sk`; the kernel zeroes a new value.
        unsafe {
            bpf_sk_storage_get((&raw const *self).cast_mut().cast(), sk, core::ptr::null_mut(), flags.into()).cast()
        }
    }
}

/// Written and read by the programs only. Not copied to accepted sockets: the kernel drops a connection whose copy finds no
/// memory (`sk_clone_lock`, net/core/sock.c).
#[unsafe(link_section = ".maps")]
#[unsafe(export_name = "sp_sockets")]
static SOCKETS: SocketStorage<State, { BPF_F_NO_PREALLOC as usize }> = SocketStorage::NEW;

/// Written and read by the programs only. Made for few sockets: see [`Kept`].
#[unsafe(link_section = ".maps")]
#[unsafe(export_name = "sp_saved_values")]
static SAVED_VALUES: SocketStorage<SavedValues, { (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize }> = SocketStorage::NEW;

/// What holds on a socket: numbers of a generation ([`abi::index`]).
#[derive(Clone, Copy, Default)]
pub(crate) struct Scope {
    pub(crate) number: u32,
    /// Of its first option.
    pub(crate) options: u32,
}

impl Scope {
    #[inline(always)]
    fn of(generation: u32, place: &TargetSlot) -> Self {
        let of = |within| index::of(generation, within);
        Self { number: of(place.scope), options: of(place.options) }
    }
}

/// The notes of a socket that is being set up, and what holds on it; `None` where that is not this program's turn to say:
/// another target's, deeper than this one, has.
///
/// A socket that is being set up when policies change is set up by those that it began with. `begins` is given the notes, and
/// tells whether the socket begins now.
///
/// # Safety
///
/// As for [`state`].
#[inline(always)]
pub(crate) unsafe fn enter_scope(
    sk: *mut c_void,
    begins: impl FnOnce(&mut State) -> bool,
) -> Option<(&'static mut State, Scope)> {
    let target = maps::target();
    let config = maps::config().filter(|_| target.id != 0)?;
    // SAFETY: as the caller says.
    let state = unsafe { state(sk) }?;
    if begins(state) || state.generation < config.oldest {
        state.generation = config.generation;
    }
    enter_scope_in(state.generation, target, state)
}

/// What holds on a socket whose owner makes a call: that is judged by the policies of now. `None` as of [`claim`].
///
/// The notes are looked at only where they say something: of the 90 ns that judging a call took, that was a quarter (6.18).
///
/// # Safety
///
/// As for [`state`].
#[inline(always)]
pub(crate) unsafe fn scope_now(sk: *mut c_void, config: &Config) -> Option<Scope> {
    let target = maps::target();
    if target.id == 0 {
        return None;
    }
    if config.are_nested == 0 {
        return maps::target_slot(config.generation, target).map(|place| Scope::of(config.generation, place));
    }
    // SAFETY: as the caller says.
    enter_scope_in(config.generation, target, unsafe { state(sk) }?).map(|(_, scope)| scope)
}

#[inline(always)]
fn enter_scope_in(generation: u32, target: &Target, state: &'static mut State) -> Option<(&'static mut State, Scope)> {
    let place = maps::target_slot(generation, target)?;
    let is_deeper = |other: &TargetSlot| other.level > place.level;
    if state.target.id != target.id {
        if maps::target_slot(generation, &state.target).is_some_and(is_deeper) {
            return None;
        }
        state.target = *target;
    }
    Some((state, Scope::of(generation, place)))
}

/// The notes of a socket, made if there are none.
///
/// # Safety
///
/// `sk` must be what the verifier takes as a socket: a `bpf_sock` pointer from a context, checked
/// for NULL, or the context of cgroup/sock_create.
#[inline(always)]
pub(crate) unsafe fn state(sk: *mut c_void) -> Option<&'static mut State> {
    // SAFETY: as the caller says.
    let state = unsafe { SOCKETS.get(sk, BPF_SK_STORAGE_GET_F_CREATE) };
    if state.is_null() {
        return maps::fallback_state(sk as u64).map(|unstored| &mut unstored.state);
    }
    // SAFETY: not NULL, so it is this socket's value; two CPUs that write it at once can at worst
    // lose a note, and with it count a socket twice.
    Some(unsafe { &mut *state })
}

/// Forgets the notes that another socket, which was at the same address in the kernel, left in map `FALLBACK_STATES`; tells whether
/// the notes are new now. `cookie` is the socket's.
#[inline(always)]
pub(crate) fn reset_for_new_socket(state: &mut State, cookie: u64) -> bool {
    let is_another = state.is_unstored != 0 && state.notes.cookie != cookie;
    if is_another {
        *state = State { notes: Notes { cookie, ..Notes::NONE }, is_unstored: 1, ..State::default() };
    }
    is_another
}

/// The values that are kept of a socket, made if `create`. `None` if there are none, or no memory for them.
///
/// # Safety
///
/// As for [`state`].
#[inline(always)]
pub(crate) unsafe fn saved_values(sk: *mut c_void, create: bool) -> Option<&'static mut SavedValues> {
    // SAFETY: as the caller says.
    let kept = unsafe { SAVED_VALUES.get(sk, if create { BPF_SK_STORAGE_GET_F_CREATE } else { 0 }) };
    if kept.is_null() {
        return maps::existing_fallback_state(sk as u64).map(|unstored| &mut unstored.kept);
    }
    // SAFETY: as in `state`.
    Some(unsafe { &mut *kept })
}

/// Notes what a hook knows of the socket. A direction once known stays.
///
/// The facts are then read from the notes, and so that they really are, the compiler is made to
/// forget what it wrote there: the verifier does not look into the notes, and takes the many
/// ways in which facts come to be known for one.
#[inline(always)]
pub(crate) fn update_facts(state: &'static mut State, facts: Facts) -> &'static mut State {
    let direction = state.facts.direction;
    state.facts = facts;
    if facts.direction == direction::UNKNOWN {
        state.facts.direction = direction;
    }
    let mut notes: *mut State = state;
    // SAFETY: moves a register to itself.
    unsafe { asm!("{notes} = {notes}", notes = inout(reg) notes, options(nostack, preserves_flags)) };
    // SAFETY: it is still the same pointer, and the reference it was made of is not used again.
    unsafe { &mut *notes }
}

/// What is known of the socket, copied from its notes: to the verifier it is then the same wherever the notes are.
#[inline(always)]
pub(crate) fn facts_in(state: &State) -> Facts {
    let mut facts = state.facts;
    forget_origin(&mut facts);
    facts
}

/// What was done to the options of a socket, copied from its notes. `None` if there are none.
///
/// # Safety
///
/// As for [`state`].
#[inline(always)]
pub(crate) unsafe fn notes(sk: *mut c_void) -> Option<Notes> {
    // SAFETY: as the caller says.
    let mut notes = unsafe { state(sk) }?.notes;
    forget_origin(&mut notes);
    Some(notes)
}

/// Puts notes back that were copied.
///
/// # Safety
///
/// As for [`state`].
#[inline(always)]
pub(crate) unsafe fn put_notes(sk: *mut c_void, notes: &Notes) {
    // SAFETY: as the caller says.
    if let Some(state) = unsafe { state(sk) } {
        state.notes = *notes;
    }
}

/// Makes the compiler forget what a copy was made of, so that the copy is really made.
#[inline(always)]
fn forget_origin<T>(copy: &mut T) {
    let at: *mut T = copy;
    // SAFETY: says only that the value may have been read and written.
    unsafe { asm!("{at} = {at}", at = inout(reg) at => _, options(nostack, preserves_flags)) };
}
