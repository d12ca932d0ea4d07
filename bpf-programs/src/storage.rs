//! Notes kept with each socket ([`State`]), in storage that the kernel frees with the socket; and by them, which of the
//! programs that the kernel runs for a socket is to decide about it.
//!
//! aya-ebpf's `SkStorage` takes only connect and sendmsg contexts and cannot ask for notes to be
//! copied to accepted sockets, so the map is defined here.
//!
//! Invariant: of all targets that a socket is in, the programs of the deepest decide about it, and no others.

use core::arch::asm;

use abi::{
    Config, Place, Target, index,
    socket::{Facts, State, direction},
};
use aya_ebpf::{
    bindings::{BPF_F_CLONE, BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, bpf_map_type::BPF_MAP_TYPE_SK_STORAGE},
    cty::c_void,
    helpers::generated::bpf_sk_storage_get,
};

use crate::maps::{self, lose};

/// A map definition as loaders read it from BTF: only the types of the fields say something.
#[repr(C)]
struct SocketStorage {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const State,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

// SAFETY: nobody follows these pointers.
unsafe impl Sync for SocketStorage {}

/// Written and read by the programs only. Where the kernel has no memory for an entry, the socket
/// is left alone; counted in [`abi::Losses::no_storage`].
#[unsafe(link_section = ".maps")]
#[unsafe(no_mangle)]
static SOCKETS: SocketStorage = SocketStorage {
    r#type: core::ptr::null(),
    key: core::ptr::null(),
    value: core::ptr::null(),
    max_entries: core::ptr::null(),
    map_flags: core::ptr::null(),
};

/// What holds on a socket: numbers of a generation ([`abi::index`]).
#[derive(Clone, Copy)]
pub(crate) struct Scope {
    pub(crate) number: u32,
    /// Of its first option.
    pub(crate) options: u32,
}

impl Scope {
    #[inline(always)]
    fn of(generation: u32, place: &Place) -> Self {
        let of = |within| index::of(generation, within);
        Self { number: of(place.scope), options: of(place.options) }
    }
}

/// The notes of a socket that is being set up, and what holds on it; `None` where that is not this program's turn to say:
/// another target's, deeper than this one, has.
///
/// A socket that is being set up when policies change is set up by those that it began with. It `begins` at birth or, with the
/// notes of its listener, when it is accepted.
///
/// # Safety
///
/// As for [`state`].
#[inline(always)]
pub(crate) unsafe fn claim(sk: *mut c_void, begins: bool) -> Option<(&'static mut State, Scope)> {
    let target = maps::target();
    let config = maps::config().filter(|_| target.id != 0)?;
    // SAFETY: as the caller says.
    let state = unsafe { state(sk) }?;
    if begins || state.generation < config.oldest {
        state.generation = config.generation;
    }
    claim_in(state.generation, target, state)
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
        return maps::place(config.generation, target).map(|place| Scope::of(config.generation, place));
    }
    // SAFETY: as the caller says.
    claim_in(config.generation, target, unsafe { state(sk) }?).map(|(_, scope)| scope)
}

#[inline(always)]
fn claim_in(generation: u32, target: &Target, state: &'static mut State) -> Option<(&'static mut State, Scope)> {
    let place = maps::place(generation, target)?;
    let is_deeper = |other: &Place| other.level > place.level;
    if state.target.id != target.id {
        if maps::place(generation, &state.target).is_some_and(is_deeper) {
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
    // SAFETY: the caller vouches for `sk`; the kernel zeroes a new value.
    let state = unsafe {
        bpf_sk_storage_get(
            (&raw const SOCKETS).cast_mut().cast(),
            sk,
            core::ptr::null_mut(),
            BPF_SK_STORAGE_GET_F_CREATE.into(),
        )
    };
    if state.is_null() {
        lose(|losses| &mut losses.no_storage);
        return None;
    }
    // SAFETY: not NULL, so it is this socket's value; two CPUs that write it at once can at worst
    // lose a note, and with it count a socket twice.
    Some(unsafe { &mut *state.cast::<State>() })
}

/// Notes what a hook knows of the socket. A direction once known stays.
///
/// The facts are then read from the notes, and so that they really are, the compiler is made to
/// forget what it wrote there: the verifier does not look into the notes, and takes the many
/// ways in which facts come to be known for one.
#[inline(always)]
pub(crate) fn learn(state: &'static mut State, facts: Facts) -> &'static mut State {
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
