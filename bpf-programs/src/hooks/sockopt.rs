//! cgroup/setsockopt and cgroup/getsockopt: the application's own calls.
//!
//! These hooks see the socket and so decide; the audit ([`super::audit`]) sees the task and the
//! result. A decision is left in the audit's record of the call ([`hooked`]). Only where there is none (the
//! audit is off, or does not see this call) is it reported from here.

use abi::{
    SETTABLE_MAX,
    event::{Call, Executable, call, flags, source},
    judge::{Argument, Judgement, judge, judge_argument, verdict},
    select::select,
    setting::{
        DEVICE_BY_INDEX, OptionKey, OptionRow, ROOM_ALWAYS, Setting, TEXT_LEN, TYPE_OF_SERVICE, Value, Words, form,
        kind, on_conflict, priority_of_tos, read_back, traits, word_in, words_of,
    },
    socket::{Facts, State, protocol},
};
use aya_ebpf::{
    Global,
    bindings::bpf_sockopt,
    helpers::{bpf_get_current_pid_tgid, generated::bpf_set_retval},
    macros::cgroup_sockopt,
    programs::SockoptContext,
};

use super::audit::cgroup_hook;
use crate::{
    ctx::{Socket as _, Sockopt},
    emit::{self, Head, Task},
    kernel,
    maps::{self, PrefixMap, count},
    storage::{self, Scope},
};

// What cgroup/setsockopt programs may call on this kernel. The agent finds out and gives the value
// at load; to the verifier these are constants, so that what a kernel lacks is dead code to it.

/// `bpf_set_retval`: 5.18 and later. Without it a denied call fails with EPERM.
#[unsafe(no_mangle)]
static CAN_SET_RETVAL: Global<u8> = Global::new(0);
/// `bpf_get_current_pid_tgid` and `bpf_get_current_comm`: 6.1 and later.
#[unsafe(no_mangle)]
static CAN_SEE_TASK: Global<u8> = Global::new(0);
/// `bpf_getsockopt`: 5.15 and later.
#[unsafe(no_mangle)]
static CAN_GET: Global<u8> = Global::new(0);

/// Lets the call go on.
const GO_ON: i32 = 1;
/// Fails it, with EPERM unless another errno was set.
const FAIL: i32 = 0;

const EINVAL: i32 = 22;

/// Rows that can govern one call: the option's own, and those of the four options that IPV6_2292PKTOPTIONS writes.
const ROWS_MAX: usize = 5;

#[cgroup_sockopt(setsockopt)]
pub(crate) fn sp_setsockopt(ctx: SockoptContext) -> i32 {
    let call = Sockopt::new(ctx.sockopt);
    if is_named(&call) {
        let mut row = FIRST_ROW;
        for _ in 0..ROWS_MAX {
            let judged = Judged(judge_call(ctx.sockopt, row));
            if let Some(end) = carry_out(ctx.sockopt, &call, judged) {
                return end;
            }
            row = judged.next_row();
            if row == FIRST_ROW {
                break;
            }
        }
    }
    call.pass();
    GO_ON
}

/// Reports a call that was judged, and does what was decided. `None`: the call goes on.
#[inline(always)]
fn carry_out(ctx: *mut bpf_sockopt, call: &Sockopt, judged: Judged) -> Option<i32> {
    let verdict = judged.verdict();
    if verdict != u32::from(verdict::NONE) {
        report_call(ctx, judged.0);
    }
    if judged.is_done() {
        call.skip();
        return Some(GO_ON);
    }
    enact(call, judged.governance()?, verdict)
}

/// Whether policies in force may say something about a call. Mostly they do not, and this is all that it then takes.
#[inline(always)]
fn is_named(call: &Sockopt) -> bool {
    maps::config().is_some_and(|config| config.may_name(call.key()))
}

/// Which option a call is about, and which setting governs it.
#[derive(Clone, Copy)]
struct Governance {
    /// Of the option.
    index: u32,
    /// Which of the option's settings.
    rank: u32,
}

impl Governance {
    #[inline(always)]
    fn rows(self) -> Option<Rows> {
        Rows::of(maps::option(self.index)?, self.rank)
    }
}

/// What the tables say of a call that is governed.
struct Rows {
    option: &'static OptionRow,
    setting: &'static Setting,
    /// Index of the setting.
    winner: u32,
}

impl Rows {
    #[inline(always)]
    fn of(option: &'static OptionRow, rank: u32) -> Option<Self> {
        let winner = option.first_setting + rank;
        Some(Self { option, setting: maps::setting(winner)?, winner })
    }
}

/// In place of the number of a row: that by which the call is found.
const FIRST_ROW: u32 = 0;

/// What governs a call, if anything does, and what came of it: a number, for it crosses from one function to another.
#[derive(Clone, Copy)]
struct Judged(u64);

impl Judged {
    const UNGOVERNED: u64 = 0;
    const IS_GOVERNED: u64 = 1 << 63;
    /// The socket has its value already, so that the kernel's own handler need not see the call.
    const IS_DONE: u64 = 1 << 62;
    const NEXT_SHIFT: u32 = 48;
    const NEXT_MASK: u64 = 0x3fff;
    const VERDICT_SHIFT: u32 = 40;
    const RANK_SHIFT: u32 = 32;
    const BYTE: u64 = 0xff;

    #[inline(always)]
    fn new(governed: Governance, verdict: u8, is_done: bool) -> Self {
        let done = if is_done { Self::IS_DONE } else { 0 };
        let (verdict, rank) = (u64::from(verdict) << Self::VERDICT_SHIFT, u64::from(governed.rank) << Self::RANK_SHIFT);
        Self(Self::IS_GOVERNED | done | verdict | rank | u64::from(governed.index))
    }

    #[inline(always)]
    fn governance(self) -> Option<Governance> {
        let governed = Governance { index: self.0 as u32, rank: (self.0 >> Self::RANK_SHIFT & Self::BYTE) as u32 };
        (self.0 & Self::IS_GOVERNED != 0).then_some(governed)
    }

    /// The row that also governs the call, or [`FIRST_ROW`].
    #[inline(always)]
    fn next_row(self) -> u32 {
        (self.0 >> Self::NEXT_SHIFT & Self::NEXT_MASK) as u32
    }

    #[inline(always)]
    fn with_next(self, row: u32) -> Self {
        Self(self.0 | (u64::from(row) & Self::NEXT_MASK) << Self::NEXT_SHIFT)
    }

    #[inline(always)]
    fn done(self) -> Self {
        Self(self.0 | Self::IS_DONE)
    }

    #[inline(always)]
    fn verdict(self) -> u32 {
        (self.0 >> Self::VERDICT_SHIFT & Self::BYTE) as u32
    }

    #[inline(always)]
    fn is_done(self) -> bool {
        self.0 & Self::IS_DONE != 0
    }
}

/// A row that governs a call, whether or not one of its settings does.
struct Found {
    scope: Scope,
    /// Index of the option.
    index: u32,
    option: &'static OptionRow,
}

/// Finds a row that governs a call. What the audit still has of an earlier call is dropped.
#[inline(always)]
fn find(call: &Sockopt, row: u32) -> Option<Found> {
    let config = maps::config()?;
    if kernel::is_agent(config) {
        return None;
    }
    // SAFETY: the context's socket, which is never NULL.
    let scope = if call.is_inet() { Some(unsafe { storage::scope_now(call.sk(), config) }?) } else { None };
    if row == FIRST_ROW {
        let thread = caller_thread();
        // Not before it is this program's turn to decide: another's may have, about this very call.
        cgroup_hook::drop_unended(thread);
        if config.audit_judges != 0 && cgroup_hook::is_judged_at_its_end(thread, call.key()) {
            return None;
        }
    }
    let scope = scope?;
    let (index, option) = if row == FIRST_ROW {
        maps::option_named(config, config.generation, scope.options, call.key())?
    } else {
        let index = scope.options + row - 1;
        // Policies may have changed since the row before this one.
        (index, maps::option(index).filter(|option| option.key == call.key())?)
    };
    Some(Found { scope, index, option })
}

/// Which of an option's settings governs a call. `sets` must be a constant: whether the call is setsockopt.
#[inline(always)]
fn rank(call: &Sockopt, scope: Scope, index: u32, option: &OptionRow, sets: bool) -> Option<u32> {
    if option.is_certain() {
        return Some(0);
    }
    let winner = if sets {
        winner_of_set(call.as_context(), index, scope.number)
    } else {
        winner_of_read(call.as_context(), index, scope.number)
    };
    (winner != NO_WINNER).then(|| winner as u32 - option.first_setting)
}

/// No setting: more than any index.
const NO_WINNER: u64 = u64::MAX;

/// The setting that governs a call of setsockopt on an option of a scope, or [`NO_WINNER`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn winner_of_set(ctx: *mut bpf_sockopt, index: u32, scope: u32) -> u64 {
    winner(&Sockopt::new(ctx), index, scope, true).map_or(NO_WINNER, u64::from)
}

/// The same of a call of getsockopt, whose program may not read options.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn winner_of_read(ctx: *mut bpf_sockopt, index: u32, scope: u32) -> u64 {
    winner(&Sockopt::new(ctx), index, scope, false).map_or(NO_WINNER, u64::from)
}

#[inline(always)]
fn winner(call: &Sockopt, index: u32, scope: u32, sets: bool) -> Option<u32> {
    let option = maps::option(index)?;
    let state = storage::update_facts(state(call)?, call.facts());
    let is_unstored = state.is_unstored != 0;
    let facts = storage::facts_in(state);
    let rules = select(&facts, maps::selectors(scope)?, &PrefixMap { scope });
    if sets && option.names & !option.sets != 0 && !is_corrected_later(call, option, &facts, is_unstored) {
        option.cautious_winner(rules)
    } else {
        option.winner(rules)
    }
}

/// Whether what a call sets is held against limits again when more is known of the socket ([`crate::apply`]): the programs can
/// read and set the option, and the socket comes by their hooks.
#[inline(always)]
fn is_corrected_later(call: &Sockopt, option: &OptionRow, facts: &Facts, is_unstored: bool) -> bool {
    let comes_by = facts.protocol == protocol::TCP || facts.protocol == protocol::UDP;
    comes_by
        && option.traits & traits::CORRECTED != 0
        && !is_unstored
        && !call.is_multipath()
        && read_now(call, option).is_some()
}

/// Notes that the application asks for a value that a rule may forbid later, and what the option has before.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn record_requested(ctx: *mut bpf_sockopt, index: u32) -> u32 {
    let Some(option) = maps::option(index) else { return 0 };
    if option.names & !option.sets != 0 && !option.is_certain() && option.traits & traits::CORRECTED != 0 {
        save_requested(&Sockopt::new(ctx), option);
    }
    0
}

#[inline(always)]
fn save_requested(call: &Sockopt, option: &OptionRow) {
    let (bit, place) = (1u64 << (option.bit & 63), usize::from(option.bit));
    let Some(state) = state(call).filter(|state| state.notes.requested & bit == 0) else { return };
    let Some(now) = read_now(call, option) else { return };
    // SAFETY: the context's socket, which is never NULL.
    let Some(kept) = (unsafe { storage::saved_values(call.sk(), true) }) else {
        maps::count_loss(|losses| &mut losses.no_storage);
        return;
    };
    if place < SETTABLE_MAX {
        state.notes.requested |= bit;
        kept.has_asked |= bit;
        if option.kind == kind::TEXT {
            kept.asked_text = now;
        } else {
            kept.asked[place] = word_in(&now);
        }
    }
}

/// What the option has now, as getsockopt shows it.
#[inline(always)]
fn read_now(call: &Sockopt, option: &OptionRow) -> Option<Words> {
    if CAN_GET.load() == 0 || option.read_back == read_back::NONE {
        return None;
    }
    let mut words = [0; 2];
    if option.kind == kind::TEXT {
        call.get(option.key.level, option.key.name, &mut words, TEXT_LEN as i32).ok()?;
    } else {
        call.get(option.key.level, option.key.name, &mut words, 4).ok()?;
    }
    Some(words)
}

#[inline(always)]
fn state(call: &Sockopt) -> Option<&'static mut State> {
    // SAFETY: the context's socket, which is never NULL.
    unsafe { storage::state(call.sk()) }
}

// As in `apply`, the verifier checks each of the functions below once and on its own.

/// Finds what governs a call in one row, judges and counts it; gives a [`Judged`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn judge_call(ctx: *mut bpf_sockopt, row: u32) -> u64 {
    judge_row(&Sockopt::new(ctx), row).map_or(Judged::UNGOVERNED, |judged| judged.0)
}

#[inline(always)]
fn judge_row(call: &Sockopt, row: u32) -> Option<Judged> {
    let Found { scope, index, option } = find(call, row)?;
    let kept = kept_value(call, scope, option);
    let judged = match rank(call, scope, index, option, true) {
        Some(rank) => judge_governed(call, Governance { index, rank }, option),
        None => {
            record_requested(call.as_context(), index);
            None
        }
    };
    let judged = judged.unwrap_or(Judged(Judged::UNGOVERNED)).with_next(option.next);
    Some(match kept {
        Some(kept) => keep(call, option, judged, &kept).with_next(option.next),
        None => judged,
    })
}

/// Whether a call on SO_RCVLOWAT is within a setting of SO_RCVBUF: the kernel makes no room for it, or no more than the setting
/// lets it. A buffer that a policy sets is locked by then.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn has_room(ctx: *mut bpf_sockopt, winner: u32) -> u32 {
    let call = Sockopt::new(ctx);
    let Some(setting) = maps::setting(winner) else { return 1 };
    // A negative number stands for the largest.
    let room = word_in(&call.argument());
    let is_within = setting.form == form::LIMIT && i64::from(room) <= setting.max;
    u32::from(!call.is_tcp() || room <= ROOM_ALWAYS || setting.form == form::SET || is_within)
}

#[inline(always)]
fn judge_governed(call: &Sockopt, governed: Governance, option: &'static OptionRow) -> Option<Judged> {
    if option.fast_match(call.len(), &call.argument()) {
        count(option.first_setting, |counters| &mut counters.agreed);
        return Some(Judged::new(governed, verdict::NONE, false));
    }
    let Rows { setting, winner, .. } = Rows::of(option, governed.rank)?;
    if option.kind == kind::ROOM && has_room(call.as_context(), winner) != 0 {
        return None;
    }
    // The kernel refuses the argument by itself.
    let judgement = judgement(call, option, setting)?;
    let (verdict, is_done) = match judgement.verdict {
        verdict::REWRITTEN if !setting.is_dry_run() => rewrite(call, option, setting, winner, &judgement),
        verdict => (verdict, false),
    };
    if setting.form == form::SET && setting.on_conflict == on_conflict::ALLOW {
        record_app_override(call.as_context(), governed.index, verdict.into());
    }
    // What was refused or ignored changes nothing.
    if verdict != verdict::DENIED && verdict != verdict::IGNORED {
        record_requested(call.as_context(), governed.index);
    }
    count(winner, |counters| match verdict {
        verdict::NONE => &mut counters.agreed,
        verdict::ALLOWED => &mut counters.verdicts[0],
        verdict::REWRITTEN => &mut counters.verdicts[1],
        verdict::CLAMPED => &mut counters.verdicts[2],
        verdict::IGNORED => &mut counters.verdicts[3],
        _ => &mut counters.verdicts[4],
    });
    Some(Judged::new(governed, verdict, is_done))
}

/// Gives the socket the policy's value where programs can. The kernel's own handler would ask the
/// application's rights, and refuse a value that the application would never have asked for.
///
/// Where the kernel refuses the value itself, the application's call goes through as it is.
#[inline(always)]
fn rewrite(call: &Sockopt, option: &OptionRow, setting: &Setting, winner: u32, judgement: &Judgement) -> (u8, bool) {
    let is_other_kind = setting.is_text() != option.is_text();
    if is_other_kind && is_bound_to_requested(call, option) {
        return (verdict::NONE, false);
    }
    let key @ OptionKey { level, name } = option.helper_key(setting);
    // Once bound, an application without CAP_NET_RAW cannot bind again; nor can a program bind a subflow of an MPTCP socket.
    if is_other_kind && is_bound_to_wanted(call, setting) {
        return (verdict::REWRITTEN, true);
    }
    // What this kernel's programs cannot set from here is rewritten in the call's argument; a device has no argument that says the
    // same in the other way.
    let by_argument = (if is_other_kind { verdict::DENIED } else { verdict::REWRITTEN }, false);
    // The kernel's handler gives a value to the subflows of an MPTCP socket too, the helper does not. Bits that stay the
    // application's are not ours to grant: the handler asks whether the application may set them.
    // Before 6.18 an option of programs alone has no other name: the handler refuses the call, and the helper would not.
    let is_of_programs = option.set_as.is_for_programs();
    let is_handlers = call.is_multipath() || call.is_of_refused_level() || setting.is_partial() || is_of_programs;
    if CAN_GET.load() == 0 || is_handlers || option.kind == kind::LOCK {
        return by_argument;
    }
    let result = if setting.is_text() {
        call.set(level, name, &judgement.given.words, TEXT_LEN as i32)
    } else if key == DEVICE_BY_INDEX {
        call.set_device(word_in(&judgement.given.words))
    } else {
        call.set(level, name, &judgement.given.words, 4)
    };
    match result {
        Ok(()) => (verdict::REWRITTEN, true),
        // What the helper does not know on this socket the kernel's handler may.
        Err(EINVAL) => by_argument,
        Err(errno) => {
            count(winner, |counters| {
                counters.failed_errno = errno as u64;
                &mut counters.failed
            });
            (verdict::ALLOWED, false)
        }
    }
}

/// Whether a call asks by its index for the device that the socket is bound to.
#[inline(always)]
fn is_bound_to_requested(call: &Sockopt, option: &OptionRow) -> bool {
    let mut bound = [0; 2];
    CAN_GET.load() != 0
        && option.key == DEVICE_BY_INDEX
        && call.get(DEVICE_BY_INDEX.level, DEVICE_BY_INDEX.name, &mut bound, 4).is_ok()
        && Argument::read(option, call.len(), &call.argument())
            .is_some_and(|asked| asked.number == i64::from(word_in(&bound)))
}

/// Whether the socket is bound to the device that a setting names by its index.
#[inline(always)]
fn is_bound_to_wanted(call: &Sockopt, setting: &Setting) -> bool {
    let mut bound = [0; 2];
    CAN_GET.load() != 0
        && !setting.is_text()
        && call.get(DEVICE_BY_INDEX.level, DEVICE_BY_INDEX.name, &mut bound, 4).is_ok()
        && word_in(&bound) == setting.value
}

/// `None` where the kernel will refuse the argument.
#[inline(always)]
fn judgement(call: &Sockopt, option: &OptionRow, setting: &Setting) -> Option<Judgement> {
    judge_argument(option, setting, call.len(), &call.argument())
}

/// The value of an option that the kernel resets when it sets another one, and that a rule governs.
struct SavedValue {
    /// What governs it.
    governed: Governance,
    rows: Rows,
    /// `None` where this kernel does not let programs put it back.
    value: Option<Words>,
}

/// What the call would reset, where a setting in force governs that.
#[inline(always)]
fn kept_value(call: &Sockopt, scope: Scope, option: &OptionRow) -> Option<SavedValue> {
    if option.resets == 0 || call.is_of_refused_level() {
        return None;
    }
    let index = scope.options + option.resets - 1;
    let reset = maps::option(index)?;
    let governed = Governance { index, rank: rank(call, scope, index, reset, true)? };
    let rows = Rows::of(reset, governed.rank)?;
    if rows.setting.is_dry_run() || rows.setting.on_conflict == on_conflict::ALLOW {
        return None;
    }
    Some(SavedValue { governed, rows, value: value_to_put_back(call, reset.key) })
}

/// The helper does not set options of the subflows of an MPTCP socket.
#[inline(always)]
fn value_to_put_back(call: &Sockopt, key: OptionKey) -> Option<Words> {
    if CAN_GET.load() == 0 || call.is_multipath() {
        return None;
    }
    let mut value = [0; 2];
    call.get(key.level, key.name, &mut value, 4).ok()?;
    Some(value)
}

/// Sets what a call asks for, or what the policy makes of it, and puts back what the kernel resets with it. A call that the
/// helper refuses is left to the kernel's handler, unless that would reset what is governed.
#[inline(always)]
fn keep(call: &Sockopt, option: &OptionRow, judged: Judged, kept: &SavedValue) -> Judged {
    let word = word_to_set(call, option, judged);
    let Some(value) = kept.value else { return restore_after_call(option, judged, kept, word) };
    let is_set = judged.is_done()
        || word.is_some_and(|word| call.set(option.key.level, option.key.name, &words_of(word), 4).is_ok());
    if !is_set {
        return restore_after_call(option, judged, kept, word);
    }
    // It was read a moment ago: the helper knows the option.
    let OptionKey { level, name } = kept.rows.option.key;
    let _ = call.set(level, name, &value, 4);
    judged.done()
}

/// Judges a call by what the kernel's handler would reset, where a program can neither make the call in its place nor put the
/// value back: IP_TOS on a socket for IPv6 alone, on an MPTCP socket, and on kernels without the helpers.
#[inline(always)]
fn restore_after_call(option: &OptionRow, judged: Judged, kept: &SavedValue, word: Option<u32>) -> Judged {
    let SavedValue { governed, rows: Rows { option: reset, setting, winner }, .. } = *kept;
    let Some(tos) = word.filter(|_| option.key == TYPE_OF_SERVICE) else { return judged };
    let asked = Argument { number: priority_of_tos(tos), ..Argument::default() };
    if judge(reset, setting, &asked).verdict == verdict::NONE {
        return judged;
    }
    if setting.form == form::DENY || setting.on_conflict == on_conflict::DENY {
        count(winner, |counters| &mut counters.verdicts[4]);
        return Judged::new(governed, verdict::DENIED, false);
    }
    count(winner, |counters| &mut counters.verdicts[3]);
    Judged::new(governed, verdict::IGNORED, false)
}

/// The number that the kernel's handler would be given; `None` where it would get none, or would refuse it.
#[inline(always)]
fn word_to_set(call: &Sockopt, option: &OptionRow, judged: Judged) -> Option<u32> {
    let asked = Argument::read(option, call.len(), &call.argument())?.number as u32;
    let verdict = judged.verdict() as u8;
    if verdict == verdict::NONE || verdict == verdict::ALLOWED {
        return Some(asked);
    }
    let Rows { setting, .. } = judged.governance()?.rows()?;
    if setting.is_dry_run() {
        return Some(asked);
    }
    let is_replaced = verdict == verdict::REWRITTEN || verdict == verdict::CLAMPED;
    is_replaced.then(|| judgement(call, option, setting).map(|judgement| word_in(&judgement.given.words)))?
}

/// Where the policy lets the application win, it is not to be overruled at a later hook.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn record_app_override(ctx: *mut bpf_sockopt, index: u32, verdict: u32) -> u32 {
    if let Some(option) = maps::option(index) {
        note_winner(&Sockopt::new(ctx), option, verdict);
    }
    0
}

#[inline(always)]
fn note_winner(call: &Sockopt, option: &OptionRow, verdict: u32) {
    let Some(state) = state(call) else { return };
    let bit = 1u64 << (option.bit & 63);
    if verdict == u32::from(verdict::NONE) {
        state.notes.app_override &= !bit;
    } else {
        state.notes.app_override |= bit;
        // What the socket has from now on is not the policy's.
        state.notes.changed &= !bit;
    }
    // For the sockets that this one may accept.
    // SAFETY: the context's socket, which is never NULL.
    if let Some(kept) = unsafe { storage::saved_values(call.sk(), state.notes.app_override != 0) } {
        kept.yielded = state.notes.app_override;
        kept.has_before &= !bit;
    }
}

/// Does what was decided. `None`: the call goes on.
#[inline(always)]
fn enact(call: &Sockopt, governed: Governance, verdict: u32) -> Option<i32> {
    // What agrees needs no look at the tables, but where the caller's memory would be read again.
    if verdict == verdict::NONE.into() && !call.is_long() {
        return None;
    }
    let Rows { option, setting, .. } = governed.rows().filter(|rows| !rows.setting.is_dry_run())?;
    match verdict as u8 {
        verdict::REWRITTEN | verdict::CLAMPED => {
            let judgement = judgement(call, option, setting)?;
            call.replace(judgement.given.words, judgement.given.len);
            None
        }
        verdict::IGNORED => {
            call.skip();
            Some(GO_ON)
        }
        verdict::DENIED => {
            call.pass();
            if CAN_SET_RETVAL.load() != 0 {
                // From 7.2 on the verifier wants to see that this is an error number: no less than -4095.
                let errno = i32::from(setting.errno) & 0xfff;
                // SAFETY: takes a number.
                unsafe { bpf_set_retval(-errno) };
            }
            Some(FAIL)
        }
        _ => {
            // An argument that the kernel refuses for its length must keep it.
            if judgement(call, option, setting).is_some() {
                call.pass_as_read(option.needed_len());
            }
            None
        }
    }
}

/// Leaves a verdict for the audit to report, or reports it.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn report_call(ctx: *mut bpf_sockopt, judged: u64) -> u32 {
    let (call, judged) = (Sockopt::new(ctx), Judged(judged));
    let Some(rows) = judged.governance().and_then(Governance::rows) else { return 0 };
    let (key, verdict) = (call.key(), judged.verdict());
    if let Some(record) = record(call::SETSOCKOPT, key) {
        fill(record, &call, &rows, verdict);
        return 0;
    }
    let head = Head { key, call: call::SETSOCKOPT, source: source::HOOK, result: 0, duration_ns: 0 };
    let place = maps::target().place;
    emit::conflict(head, rows.winner, verdict, place, caller(), Executable::default, |record| {
        *record = Call { fd: -1, ..Call::default() };
        fill(record, &call, &rows, verdict);
    });
    0
}

/// The audit's record of a call, if it has one or has it begun here.
#[inline(always)]
fn record(kind: u32, key: OptionKey) -> Option<&'static mut Call> {
    let thread = caller_thread();
    if thread == 0 { None } else { cgroup_hook::record(thread, kind, key) }
}

/// The thread that makes the call as `bpf_get_current_pid_tgid` has it; 0 where it is not known.
#[inline(always)]
fn caller_thread() -> u64 {
    if CAN_SEE_TASK.load() != 0 { bpf_get_current_pid_tgid() } else { kernel::current_thread() }
}

/// The task that makes the call, where this kernel tells.
#[inline(always)]
fn caller() -> Task {
    if CAN_SEE_TASK.load() != 0 { Task::current() } else { Task::UNKNOWN }
}

/// Completes the record of a call that an application made to set an option.
#[inline(always)]
fn fill(record: &mut Call, call: &Sockopt, rows: &Rows, verdict: u32) {
    let Rows { option, setting, winner } = *rows;
    let argument = call.argument();
    // The very bytes that were judged: the caller's memory may have changed since the audit looked.
    record.requested = Value::new(argument, call.len() as u32);
    fill_socket(record, call, winner, verdict);
    // What the call would reset is another option's.
    if option.key != call.key() {
        return;
    }
    if let Some(asked) = Argument::read(option, call.len(), &argument) {
        record.applied = judge(option, setting, &asked).given;
        record.wanted = Value::wanted(option, setting, &asked);
    }
    if let Some(before) = read_before(call, option) {
        record.before = before;
        record.flags |= flags::VALUE_BEFORE;
    }
}

#[inline(always)]
fn fill_socket(record: &mut Call, call: &Sockopt, winner: u32, verdict: u32) {
    record.flags = (record.flags | flags::SOCKET | flags::DECIDED) & !flags::UNREADABLE;
    record.setting = winner;
    record.verdict = verdict;
    record.place = maps::target().place;
    record.sk = call.sk() as u64;
    if let Some(state) = state(call) {
        // What governs the call may not have asked for them.
        let state = storage::update_facts(state, call.facts());
        record.facts = state.facts;
        record.cookie = state.notes.cookie;
    }
}

/// The option's value before the call, where this kernel lets us read it.
#[inline(always)]
fn read_before(call: &Sockopt, option: &OptionRow) -> Option<Value> {
    let now = read_now(call, option)?;
    Some(if option.kind == kind::TEXT { Value::text(now) } else { Value::new(now, 4) })
}

/// Reports a read that shows another value than the policy wants. Never changes what is read.
#[cgroup_sockopt(getsockopt)]
pub(crate) fn sp_getsockopt(ctx: SockoptContext) -> i32 {
    let call = Sockopt::new(ctx.sockopt);
    if is_named(&call) && call.retval() == 0 {
        let judged = compare_read(ctx.sockopt);
        if judged != Judged::UNGOVERNED {
            report_read(ctx.sockopt, judged);
        }
    }
    call.pass_read();
    GO_ON
}

/// What a read of `len` bytes showed, in the terms of the policy. `None` where that says nothing about the setting.
#[inline(always)]
pub(super) fn shown(option: &OptionRow, setting: &Setting, len: i32, words: &Words) -> Option<Argument> {
    if setting.form != form::SET || option.read_back == read_back::NONE {
        return None;
    }
    if option.kind == kind::TEXT && len < TEXT_LEN as i32 {
        // A caller without room for the whole name was shown a part of it.
        return None;
    }
    let shown = Argument::read(option, len, words)?;
    Some(match option.read_back {
        read_back::DOUBLED => Argument { number: shown.number / 2, ..shown },
        _ => shown,
    })
}

/// What a read is to the policy: a verdict. `None` where it says nothing about the setting.
#[inline(always)]
pub(super) fn compared(option: &OptionRow, setting: &Setting, len: i32, words: &Words) -> Option<u8> {
    Some(judge(option, setting, &shown(option, setting, len, words)?).verdict)
}

/// Counts a read that shows another value than the policy wants, and gives a [`Judged`] for it.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn compare_read(ctx: *mut bpf_sockopt) -> u64 {
    compare(&Sockopt::new(ctx)).map_or(Judged::UNGOVERNED, |judged| judged.0)
}

#[inline(always)]
fn compare(call: &Sockopt) -> Option<Judged> {
    let Found { scope, index, option } = find(call, FIRST_ROW)?;
    let governed = Governance { index, rank: rank(call, scope, index, option, false)? };
    let Rows { setting, winner, .. } = Rows::of(option, governed.rank)?;
    if setting.is_text() != option.is_text()
        || compared(option, setting, call.len(), &call.argument())? == verdict::NONE
    {
        return None;
    }
    count(winner, |counters| &mut counters.reads);
    Some(Judged::new(governed, verdict::ALLOWED, false))
}

/// Leaves what a read showed for the audit to report, or reports it.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn report_read(ctx: *mut bpf_sockopt, judged: u64) -> u32 {
    let (call, judged) = (Sockopt::new(ctx), Judged(judged));
    let Some(rows) = judged.governance().and_then(Governance::rows) else { return 0 };
    let (key, verdict) = (rows.option.key, judged.verdict());
    if let Some(record) = record(call::GETSOCKOPT, key) {
        fill_read(record, &call, &rows, verdict);
        return 0;
    }
    let head = Head { key, call: call::GETSOCKOPT, source: source::HOOK, result: 0, duration_ns: 0 };
    let place = maps::target().place;
    emit::conflict(head, rows.winner, verdict, place, caller(), Executable::default, |record| {
        *record = Call { fd: -1, ..Call::default() };
        fill_read(record, &call, &rows, verdict);
    });
    0
}

#[inline(always)]
fn fill_read(record: &mut Call, call: &Sockopt, rows: &Rows, verdict: u32) {
    let Rows { option, setting, winner } = *rows;
    let argument = call.argument();
    record.requested = Value::new(argument, call.len() as u32);
    if let Some(shown) = shown(option, setting, call.len(), &argument) {
        record.wanted = Value::wanted(option, setting, &shown);
    }
    fill_socket(record, call, winner, verdict);
}
