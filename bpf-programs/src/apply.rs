//! Applies the settings of one site to one socket.
//!
//! What concerns a single option stands in functions of their own ([`apply_turn`],
//! [`apply_addressed`]) that the verifier checks once, however many options a loop may meet: they
//! are global functions to it, for which they must be exported and take nothing but the context and
//! numbers.

use abi::{
    event::{Call, flags},
    select::{Candidates, select},
    setting::{Governed, Setting, TEXT_LEN, Value, form, kind, on_conflict, read_back, traits, word_in, words_of},
    socket::{State, family, protocol},
};
use aya_ebpf::{
    bindings::{bpf_sock_addr, bpf_sock_ops},
    cty::c_void,
};

use crate::{
    ctx::{Addressed, Socket, Turn},
    emit,
    maps::{self, PrefixMap, count},
    storage::{self, Scope},
};

/// What became of a setting on a socket: a number, because it crosses from one function to another.
pub(crate) mod outcome {
    /// Nothing that is to be counted.
    pub(crate) const NONE: u32 = 0;
    pub(crate) const SET: u32 = 1;
    pub(crate) const UNCHANGED: u32 = 2;
    /// Plus the kernel's errno.
    pub(crate) const FAILED: u32 = 0x1000;
}

/// Applies what the policies of a scope say at `site`, which has `MAX` options at the most, to a socket whose
/// notes are `state`. `apply` gets the index of an option, the rules that match, the traits of options that the socket does
/// not have, and the notes.
///
/// `is_inet6` is the socket's own family, which decides what options it has; `state.facts.family` is
/// that of its traffic.
#[inline(always)]
pub(crate) fn apply<const MAX: usize>(
    scope: Scope,
    site: u32,
    state: &mut State,
    is_inet6: bool,
    mut apply: impl FnMut(u32, Candidates, u32, &mut State),
) {
    let Some(list) = maps::site(scope.number, site) else { return };
    if list.len == 0 {
        return;
    }
    let Some(selectors) = maps::selectors(scope.number) else { return };
    let rules = select(&state.facts, selectors, &PrefixMap { scope: scope.number });
    if rules.sure == 0 {
        return;
    }
    let missing = missing_traits(state, is_inet6);
    for position in 0..MAX {
        if position as u32 >= list.len {
            break;
        }
        apply(scope.options + list.options[position], rules, missing, state);
    }
}

/// Beside the traits of options that a socket does not have: it may yet carry IPv4 or IPv6.
const DUAL_STACK: u32 = 0x100;

/// The traits of options that a socket does not have, and [`DUAL_STACK`] if it is that.
#[inline(always)]
fn missing_traits(state: &State, is_inet6: bool) -> u32 {
    let tcp = if state.facts.protocol == protocol::TCP { 0 } else { traits::TCP };
    let (family, dual_stack) = match (is_inet6, state.facts.family) {
        (false, _) => (traits::INET6, 0),
        // Not all kernels let programs set IPv4's options on such a socket: then it counts as failed.
        (true, family::IPV4) => (0, 0),
        (true, family::IPV6) => (traits::INET, 0),
        (true, _) => (0, DUAL_STACK),
    };
    u32::from(tcp | family) | dual_stack
}

/// Applies an option: `set` is told the option and the setting, and gives an
/// [`outcome`], which is noted and counted.
#[inline(always)]
pub(crate) fn apply_option(
    index: u32,
    rules: Candidates,
    missing_traits: u32,
    state: &mut State,
    set: impl FnOnce(&Governed, &Setting, u32) -> u32,
) {
    let Some(option) = maps::option(index) else { return };
    let bit = 1u64 << (option.bit & 63);
    let done = if option.traits & traits::ONCE != 0 { state.settled & bit } else { 0 };
    if u32::from(option.traits) & missing_traits != 0 || done != 0 {
        return;
    }
    let Some(winner) = option.winner(rules) else { return };
    let Some(setting) = maps::setting(winner) else { return };
    let has_yielded = state.yielded & bit != 0 && setting.on_conflict == on_conflict::ALLOW;
    // A device has two options, and each takes the settings of its own kind.
    let is_own = setting.is_text() == option.is_text();
    if setting.form == form::SET && is_own && !has_yielded {
        note(state, bit, winner, set(option, setting, winner));
    }
}

/// Notes and counts an outcome, once for each socket.
#[inline(always)]
fn note(state: &mut State, bit: u64, winner: u32, outcome: u32) {
    if outcome == outcome::NONE {
        return;
    }
    if outcome >= outcome::FAILED {
        if state.failed & bit == 0 {
            state.failed |= bit;
            count(winner, |counters| {
                counters.failed_errno = u64::from(outcome - outcome::FAILED);
                &mut counters.failed
            });
        }
    } else if state.settled & bit == 0 {
        state.settled |= bit;
        if outcome == outcome::SET {
            count(winner, |counters| &mut counters.set);
        } else {
            count(winner, |counters| &mut counters.unchanged);
        }
    }
}

/// Applies one option in sock_ops.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn apply_turn(ctx: *mut bpf_sock_ops, index: u32, sure: u64, possible: u64, missing: u32) -> u32 {
    if let Some(turn) = Turn::new(ctx) {
        apply_by_helper(&turn, turn.sk(), index, Candidates { sure, possible }, missing);
    }
    0
}

/// Applies one option at bind or connect.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn apply_addressed(
    ctx: *mut bpf_sock_addr,
    index: u32,
    sure: u64,
    possible: u64,
    missing: u32,
) -> u32 {
    if let Some(socket) = Addressed::new(ctx) {
        apply_by_helper(&socket, socket.sk(), index, Candidates { sure, possible }, missing);
    }
    0
}

#[inline(always)]
fn apply_by_helper(socket: &impl Socket, sk: *mut c_void, index: u32, rules: Candidates, missing: u32) {
    // SAFETY: the context's socket, checked for NULL.
    let Some(state) = (unsafe { storage::state(sk) }) else { return };
    let cookie = state.cookie;
    apply_option(index, rules, missing, state, |option, setting, winner| {
        // The kernel may not take it, and the socket may never carry IPv4.
        let is_for_both = option.traits & traits::INET != 0 && missing & DUAL_STACK != 0;
        set_option(socket, option, setting, winner, cookie, is_for_both)
    });
}

/// Sets an option through the helpers; gives the outcome, of which a failure that was to be expected is none.
#[inline(always)]
fn set_option(
    socket: &impl Socket,
    option: &Governed,
    setting: &Setting,
    winner: u32,
    cookie: u64,
    may_fail: bool,
) -> u32 {
    let result = if option.kind == kind::TEXT {
        set_text(socket, option, setting)
    } else {
        set_int(socket, option, setting, may_fail)
    };
    match result {
        Ok(outcome) => outcome,
        Err(_) if may_fail => outcome::NONE,
        Err(errno) => {
            report_failure(option, winner, setting, errno, cookie);
            outcome::FAILED + errno as u32
        }
    }
}

/// Sets a text unless it is there already. `Err` is the kernel's errno.
#[inline(always)]
fn set_text(socket: &impl Socket, option: &Governed, setting: &Setting) -> Result<u32, i32> {
    let (level, name) = (option.key.level, option.key.name);
    let mut current = [0; 2];
    if option.read_back != read_back::NONE
        && socket.get(level, name, &mut current, TEXT_LEN as i32).is_ok()
        && current == setting.text
    {
        return Ok(outcome::UNCHANGED);
    }
    if !setting.is_dry_run() {
        socket.set(level, name, &setting.text, TEXT_LEN as i32)?;
    }
    Ok(outcome::SET)
}

/// Sets a number unless it is there already. `Err` is the kernel's errno.
#[inline(always)]
fn set_int(socket: &impl Socket, option: &Governed, setting: &Setting, may_fail: bool) -> Result<u32, i32> {
    let (level, name) = (option.key.level, option.key.name);
    let mut wanted = setting.value;
    if option.read_back != read_back::NONE || setting.is_partial() {
        let mut current = [0; 2];
        match socket.get(level, name, &mut current, 4) {
            Ok(()) => {
                let current = word_in(&current);
                wanted = setting.apply_to(current);
                // A buffer of the same size may be one that the kernel tunes: setting it turns that off.
                if option.read_back == read_back::SAME && current == wanted {
                    return Ok(outcome::UNCHANGED);
                }
            }
            // Without the current value the application's bits would be lost; and where nothing is tried, it is all there is to
            // tell whether the socket has the option.
            Err(errno) if setting.is_partial() || (may_fail && setting.is_dry_run()) => return Err(errno),
            // This kernel cannot read the option from here: set it without comparing.
            Err(_) => {}
        }
    }
    if !setting.is_dry_run() {
        socket.set(level, name, &words_of(wanted), 4)?;
    }
    Ok(outcome::SET)
}

/// Reports a setting that the kernel refused.
#[inline(always)]
fn report_failure(option: &Governed, winner: u32, setting: &Setting, errno: i32, cookie: u64) {
    emit::outcome(option.key, errno, |call| {
        let wanted = setting.whole_value();
        *call = Call { flags: flags::DECIDED, setting: winner, wanted, cookie, ..Call::default() };
    });
}
