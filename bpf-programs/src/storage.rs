//! Notes on each socket ([`State`]), in storage that the kernel frees with the socket. The notes also show which of the
//! programs that the kernel runs for a socket decides about it.
//!
//! A socket may have no room for storage. `net.core.optmem_max` of the network namespace limits it, and root of a user
//! namespace can set that to 0 (`omem_charge`, net/core/bpf_sk_storage.c). Then the notes are in map `FALLBACK_STATES`, which
//! has room for [`abi::FALLBACK_MAX`] sockets. The least recently used notes are evicted, and a socket that lost its notes
//! starts again.
//!
//! The maps are defined here, because aya-ebpf's `SkStorage` accepts only connect and sendmsg contexts, and cannot request
//! that notes are copied to accepted sockets.
//!
//! Invariant: of all targets that contain a socket, only the programs of the deepest one decide about it.

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

/// A map definition as loaders read it from BTF: only the types of the fields matter.
#[repr(C)]
struct SocketStorage<T: 'static, const FLAGS: usize> {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; FLAGS],
}

// SAFETY: no code dereferences these pointers.
unsafe impl<T, const FLAGS: usize> Sync for SocketStorage<T, FLAGS> {}

impl<T, const FLAGS: usize> SocketStorage<T, FLAGS> {
    const NEW: Self = Self {
        r#type: core::ptr::null(),
        key: core::ptr::null(),
        value: core::ptr::null(),
        max_entries: core::ptr::null(),
        map_flags: core::ptr::null(),
    };

    /// Returns the value of a socket, created if `flags` request it. NULL if there is none, or no memory for one.
    ///
    /// # Safety
    ///
    /// See [`state`].
    #[inline(always)]
    unsafe fn get(&'static self, sk: *mut c_void, flags: u32) -> *mut T {
        // SAFETY: the caller guarantees that `sk` is valid. The kernel zeroes a new value.
        unsafe {
            bpf_sk_storage_get((&raw const *self).cast_mut().cast(), sk, core::ptr::null_mut(), flags.into()).cast()
        }
    }
}

/// Written and read by the programs only. Not copied to accepted sockets: the kernel drops a connection if there is no memory
/// for the copy (`sk_clone_lock`, net/core/sock.c).
#[unsafe(link_section = ".maps")]
#[unsafe(export_name = "sp_sockets")]
static SOCKETS: SocketStorage<State, { BPF_F_NO_PREALLOC as usize }> = SocketStorage::NEW;

/// Written and read by the programs only. Few sockets have an entry: see [`SavedValues`].
#[unsafe(link_section = ".maps")]
#[unsafe(export_name = "sp_saved_values")]
static SAVED_VALUES: SocketStorage<SavedValues, { (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize }> = SocketStorage::NEW;

/// The scope of a socket: its indices in a generation ([`abi::index`]).
#[derive(Clone, Copy, Default)]
pub(crate) struct Scope {
    pub(crate) number: u32,
    /// Index of the scope's first option.
    pub(crate) options: u32,
}

impl Scope {
    #[inline(always)]
    fn new(generation: u32, slot: &TargetSlot) -> Self {
        let in_generation = |within| index::of(generation, within);
        Self { number: in_generation(slot.scope), options: in_generation(slot.options) }
    }
}

/// Returns the notes of a socket that is being set up, and its scope. `None` if a deeper target than this program's has the
/// socket.
///
/// When policies change, a socket that is being set up keeps the generation with which it started. `is_new` gets the notes
/// and returns whether the socket starts now.
///
/// # Safety
///
/// See [`state`].
#[inline(always)]
pub(crate) unsafe fn enter_scope(
    sk: *mut c_void,
    is_new: impl FnOnce(&mut State) -> bool,
) -> Option<(&'static mut State, Scope)> {
    let target = maps::target();
    let config = maps::config().filter(|_| target.id != 0)?;
    // SAFETY: the caller fulfils the contract of `state`.
    let state = unsafe { state(sk) }?;
    if is_new(state) || state.generation < config.oldest {
        state.generation = config.generation;
    }
    enter_scope_in(state.generation, target, state)
}

/// Returns the scope of a socket whose owner makes a call: the policies in force judge calls. `None` as for [`enter_scope`].
///
/// Reads the notes only if targets are nested: reading them took a quarter of the 90 ns that judging a call takes (6.18).
///
/// # Safety
///
/// See [`state`].
#[inline(always)]
pub(crate) unsafe fn scope_of_call(sk: *mut c_void, config: &Config) -> Option<Scope> {
    let target = maps::target();
    if target.id == 0 {
        return None;
    }
    if config.are_nested == 0 {
        return maps::target_slot(config.generation, target).map(|slot| Scope::new(config.generation, slot));
    }
    // SAFETY: the caller fulfils the contract of `state`.
    enter_scope_in(config.generation, target, unsafe { state(sk) }?).map(|(_, scope)| scope)
}

#[inline(always)]
fn enter_scope_in(generation: u32, target: &Target, state: &'static mut State) -> Option<(&'static mut State, Scope)> {
    let slot = maps::target_slot(generation, target)?;
    let is_deeper = |other: &TargetSlot| other.level > slot.level;
    if state.target.id != target.id {
        if maps::target_slot(generation, &state.target).is_some_and(is_deeper) {
            return None;
        }
        state.target = *target;
    }
    Some((state, Scope::new(generation, slot)))
}

/// Returns the notes of a socket. Creates them if there are none.
///
/// # Safety
///
/// `sk` must be a socket for the verifier: a `bpf_sock` pointer from a context, checked for NULL, or the context of
/// cgroup/sock_create.
#[inline(always)]
pub(crate) unsafe fn state(sk: *mut c_void) -> Option<&'static mut State> {
    // SAFETY: the caller fulfils the contract of this function.
    let state = unsafe { SOCKETS.get(sk, BPF_SK_STORAGE_GET_F_CREATE) };
    if state.is_null() {
        // SAFETY: the entry is valid while the program runs. Two CPUs that write at once can at worst lose a note.
        return maps::fallback_state(sk as u64).map(|fallback| unsafe { &mut (*fallback).state });
    }
    // SAFETY: not NULL, so this is the value of the socket. Two CPUs that write at once can at worst lose a note, and count a
    // socket twice.
    Some(unsafe { &mut *state })
}

/// Resets notes in map `FALLBACK_STATES` that belong to an earlier socket at the same address. Returns whether the notes were
/// reset. `cookie` is the cookie of the socket.
#[inline(always)]
pub(crate) fn reset_for_new_socket(state: &mut State, cookie: u64) -> bool {
    let is_other = state.is_fallback != 0 && state.notes.cookie != cookie;
    if is_other {
        *state = State { notes: Notes { cookie, ..Notes::NONE }, is_fallback: 1, ..State::default() };
    }
    is_other
}

/// Returns the saved values of a socket, created if `create`. `None` if there are none, or no memory for them.
///
/// # Safety
///
/// See [`state`].
#[inline(always)]
pub(crate) unsafe fn saved_values(sk: *mut c_void, create: bool) -> Option<&'static mut SavedValues> {
    // SAFETY: the caller fulfils the contract of `state`.
    let saved = unsafe { SAVED_VALUES.get(sk, if create { BPF_SK_STORAGE_GET_F_CREATE } else { 0 }) };
    if saved.is_null() {
        // SAFETY: as in `state`.
        return maps::existing_fallback_state(sk as u64).map(|fallback| unsafe { &mut (*fallback).saved });
    }
    // SAFETY: as in `state`.
    Some(unsafe { &mut *saved })
}

/// Stores in the notes what a hook knows of the socket. A known direction is kept.
///
/// Callers then read the facts from the notes. The `asm!` prevents the compiler from reusing the stored values: the verifier
/// does not track the contents of the notes, and so follows one path for the many ways in which facts become known.
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
    // SAFETY: the pointer is unchanged, and the reference from which it was made is not used again.
    unsafe { &mut *notes }
}

/// Returns a copy of the facts in a socket's notes. For the verifier, the copy is the same wherever the notes are.
#[inline(always)]
pub(crate) fn facts_in(state: &State) -> Facts {
    let mut facts = state.facts;
    hide_origin(&mut facts);
    facts
}

/// Returns a copy of what was done to the options of a socket. `None` if there is no room for notes.
///
/// # Safety
///
/// See [`state`].
#[inline(always)]
pub(crate) unsafe fn notes(sk: *mut c_void) -> Option<Notes> {
    // SAFETY: the caller fulfils the contract of `state`.
    let mut notes = unsafe { state(sk) }?.notes;
    hide_origin(&mut notes);
    Some(notes)
}

/// Stores notes that were copied.
///
/// # Safety
///
/// See [`state`].
#[inline(always)]
pub(crate) unsafe fn store_notes(sk: *mut c_void, notes: &Notes) {
    // SAFETY: the caller fulfils the contract of `state`.
    if let Some(state) = unsafe { state(sk) } {
        state.notes = *notes;
    }
}

/// Hides from the compiler what a value was copied from, so that the compiler makes the copy.
#[inline(always)]
fn hide_origin<T>(copy: &mut T) {
    let at: *mut T = copy;
    // SAFETY: only declares that the value may be read and written.
    unsafe { asm!("{at} = {at}", at = inout(reg) at => _, options(nostack, preserves_flags)) };
}
