//! Applies the settings of one site to one socket. The only caller of bpf_setsockopt.
//!
//! The part that deals with a single option stands in functions of their own ([`set_turn`],
//! [`set_addressed`]) that the verifier checks once, however many options a loop may meet: they are
//! global functions to it, for which they must be exported and take nothing but the context and
//! numbers.

use abi::{
    event::flags,
    mode,
    select::select,
    setting::{Governed, Setting, TEXT_LEN, Value, form, kind, read_back, traits, word_in, words_of},
    socket::{Facts, State, protocol},
};
use aya_ebpf::bindings::{bpf_sock_addr, bpf_sock_ops};

use crate::{
    ctx::{Addressed, Socket, Turn},
    emit,
    maps::{self, PrefixMap, count},
};

/// What became of a setting on a socket: a number, because it crosses from one function to another.
pub(crate) mod outcome {
    /// No setting applies.
    pub(crate) const NONE: u32 = 0;
    pub(crate) const SET: u32 = 1;
    pub(crate) const UNCHANGED: u32 = 2;
    /// Plus the kernel's errno.
    pub(crate) const FAILED: u32 = 0x1000;
}

/// One socket, at one site.
pub(crate) struct Subject<'a> {
    pub(crate) facts: &'a Facts,
    /// The socket's own family, which decides what options it has (`facts.family` is the
    /// family of its traffic).
    pub(crate) is_inet6: bool,
    pub(crate) state: &'a mut State,
}

/// Applies what the policy says at `site`, which has `MAX` options at the most. `set` gets the
/// indices of the option and of its setting, and whether this is a dry run; it returns an
/// [`outcome`].
#[inline(always)]
pub(crate) fn apply<const MAX: usize>(
    site: u32,
    subject: &mut Subject<'_>,
    mut set: impl FnMut(u32, u32, bool) -> u32,
) {
    let Some(config) = maps::config() else { return };
    let Some(list) = maps::site(site) else { return };
    if list.len == 0 {
        return;
    }
    let Some(selectors) = maps::selectors() else { return };
    let rules = select(subject.facts, selectors, &PrefixMap);
    if rules.sure == 0 {
        return;
    }
    let dry_run = config.mode != mode::ENFORCE;
    let missing = missing_traits(subject);
    for position in 0..MAX {
        if position as u32 >= list.len {
            break;
        }
        let index = list.options[position];
        let Some(option) = maps::option(index) else { break };
        let bit = 1u64 << (index & 63);
        let done = if option.traits & traits::ONCE != 0 { subject.state.settled & bit } else { 0 };
        if option.traits & missing != 0 || (subject.state.yielded & bit) | done != 0 {
            continue;
        }
        let Some(winner) = option.winner(rules) else { continue };
        note(subject.state, bit, winner, set(index, winner, dry_run));
    }
}

/// The traits of options that this socket does not have.
#[inline(always)]
fn missing_traits(subject: &Subject<'_>) -> u8 {
    let tcp = if subject.facts.protocol == protocol::TCP { 0 } else { traits::TCP };
    tcp | if subject.is_inet6 { traits::INET } else { traits::INET6 }
}

/// Counts an outcome, once for each socket.
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
        count(winner, |counters| if outcome == outcome::SET { &mut counters.set } else { &mut counters.unchanged });
    }
}

/// Sets one option in sock_ops.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn set_turn(ctx: *mut bpf_sock_ops, index: u32, winner: u32, dry_run: u32, cookie: u64) -> u32 {
    let Some(turn) = Turn::new(ctx) else { return outcome::NONE };
    set_option(&turn, index, winner, dry_run != 0, cookie)
}

/// Sets one option at bind or connect.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn set_addressed(
    ctx: *mut bpf_sock_addr,
    index: u32,
    winner: u32,
    dry_run: u32,
    cookie: u64,
) -> u32 {
    let Some(socket) = Addressed::new(ctx) else { return outcome::NONE };
    set_option(&socket, index, winner, dry_run != 0, cookie)
}

#[inline(always)]
fn set_option(socket: &impl Socket, index: u32, winner: u32, dry_run: bool, cookie: u64) -> u32 {
    let Some(option) = maps::option(index) else { return outcome::NONE };
    let Some(setting) = maps::setting(winner) else { return outcome::NONE };
    if setting.form != form::SET {
        return outcome::NONE;
    }
    let result = if option.kind == kind::TEXT {
        set_text(socket, option, setting, dry_run)
    } else {
        set_int(socket, option, setting, dry_run)
    };
    match result {
        Ok(outcome) => outcome,
        Err(errno) => {
            report_failure(option, winner, setting, errno, cookie);
            outcome::FAILED + errno as u32
        }
    }
}

/// Sets a text unless it is there already. `Err` is the kernel's errno.
#[inline(always)]
fn set_text(socket: &impl Socket, option: &Governed, setting: &Setting, dry_run: bool) -> Result<u32, i32> {
    let (level, name) = (option.key.level, option.key.name);
    let mut current = [0; 2];
    if option.read_back != read_back::NONE
        && socket.get(level, name, &mut current, TEXT_LEN as i32).is_ok()
        && current == setting.text
    {
        return Ok(outcome::UNCHANGED);
    }
    if !dry_run {
        socket.set(level, name, &setting.text, TEXT_LEN as i32)?;
    }
    Ok(outcome::SET)
}

/// Sets a number unless it is there already. `Err` is the kernel's errno.
#[inline(always)]
fn set_int(socket: &impl Socket, option: &Governed, setting: &Setting, dry_run: bool) -> Result<u32, i32> {
    let (level, name) = (option.key.level, option.key.name);
    let mut wanted = setting.value;
    if option.read_back != read_back::NONE || setting.is_partial() {
        let mut current = [0; 2];
        match socket.get(level, name, &mut current, 4) {
            Ok(()) => {
                let current = word_in(&current);
                wanted = setting.apply_to(current);
                let shown = if option.read_back == read_back::DOUBLED { wanted.wrapping_mul(2) } else { wanted };
                if option.read_back != read_back::NONE && current == shown {
                    return Ok(outcome::UNCHANGED);
                }
            }
            // Without the current value the application's bits would be lost.
            Err(errno) if setting.is_partial() => return Err(errno),
            // This kernel cannot read the option from here: set it without comparing.
            Err(_) => {}
        }
    }
    if !dry_run {
        socket.set(level, name, &words_of(wanted), 4)?;
    }
    Ok(outcome::SET)
}

/// Reports a setting that the kernel refused.
#[inline(always)]
fn report_failure(option: &Governed, winner: u32, setting: &Setting, errno: i32, cookie: u64) {
    emit::outcome(option.key, errno, |call| {
        call.flags = flags::DECIDED;
        call.setting = winner;
        call.wanted = if option.kind == kind::TEXT { Value::text(setting.text) } else { Value::int(setting.value) };
        call.cookie = cookie;
    });
}
