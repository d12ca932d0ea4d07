//! cgroup/setsockopt and cgroup/getsockopt: the application's own calls.
//!
//! These hooks know the socket, so they decide. The audit ([`super::audit`]) knows the task and the result. The hook stores
//! its decision in the audit's record of the call ([`cgroup_hook`]). If there is no record, because the audit is off or does
//! not see the call, the hook reports the call itself.

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
    record::{CountersRef, LossesRef},
    storage::{self, Scope},
};

// What cgroup/setsockopt programs can call on this kernel. The agent probes this and sets the value at load. For the verifier
// these are constants, so calls that a kernel does not support are dead code.

/// `bpf_set_retval`: 5.18 and later. Without it, a denied call fails with EPERM.
#[unsafe(no_mangle)]
static CAN_SET_RETVAL: Global<u8> = Global::new(0);
/// `bpf_get_current_pid_tgid` and `bpf_get_current_comm`: 6.1 and later.
#[unsafe(no_mangle)]
static CAN_SEE_TASK: Global<u8> = Global::new(0);
/// `bpf_getsockopt`: 5.15 and later.
#[unsafe(no_mangle)]
static CAN_GET: Global<u8> = Global::new(0);

/// Lets the call continue.
const GO_ON: i32 = 1;
/// Fails the call, with EPERM unless another errno was set.
const FAIL: i32 = 0;

const EINVAL: i32 = 22;

/// Rows that can govern one call: the option's own, and those of the four options that IPV6_2292PKTOPTIONS writes.
const ROWS_MAX: usize = 5;

#[cgroup_sockopt(setsockopt)]
pub(crate) fn sp_setsockopt(ctx: SockoptContext) -> i32 {
    let call = Sockopt::new(ctx.sockopt);
    if is_option_named(&call) {
        let mut row = FIRST_ROW;
        for _ in 0..ROWS_MAX {
            let judged = CallVerdict(judge_call(ctx.sockopt, row));
            if let Some(end) = report_and_enact(ctx.sockopt, &call, judged) {
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

/// Reports a call that was judged, and carries out the decision. Returns `None` if the call continues.
#[inline(always)]
fn report_and_enact(ctx: *mut bpf_sockopt, call: &Sockopt, judged: CallVerdict) -> Option<i32> {
    let verdict = judged.verdict();
    if verdict != u32::from(verdict::NONE) {
        report_call(ctx, judged.0);
    }
    if judged.is_done() {
        call.skip();
        return Some(GO_ON);
    }
    apply_verdict(call, judged.setting_ref()?, verdict)
}

/// Returns whether a policy in force may name the option of a call. For most calls this is false, and nothing else runs.
#[inline(always)]
fn is_option_named(call: &Sockopt) -> bool {
    maps::config().is_some_and(|config| config.may_name(call.key()))
}

/// The setting that governs a call.
#[derive(Clone, Copy)]
struct SettingRef {
    /// Index of the option.
    index: u32,
    /// Position among the option's settings.
    rank: u32,
}

impl SettingRef {
    #[inline(always)]
    fn rows(self) -> Option<GoverningRows> {
        GoverningRows::new(maps::option(self.index)?, self.rank)
    }
}

/// The rows of the tables that govern a call.
struct GoverningRows {
    option: &'static OptionRow,
    setting: &'static Setting,
    /// Index of the setting.
    winner: u32,
}

impl GoverningRows {
    #[inline(always)]
    fn new(option: &'static OptionRow, rank: u32) -> Option<Self> {
        let winner = option.first_setting + rank;
        Some(Self { option, setting: maps::setting(winner)?, winner })
    }
}

/// In place of the number of a row: the row of the call's own option.
const FIRST_ROW: u32 = 0;

/// What governs a call, if anything, and the verdict: a number, because it is passed between global functions.
#[derive(Clone, Copy)]
struct CallVerdict(u64);

impl CallVerdict {
    const UNGOVERNED: u64 = 0;
    const IS_GOVERNED: u64 = 1 << 63;
    /// The socket has its value already, so that the kernel's own handler must not run.
    const IS_DONE: u64 = 1 << 62;
    const NEXT_SHIFT: u32 = 48;
    const NEXT_MASK: u64 = 0x3fff;
    const VERDICT_SHIFT: u32 = 40;
    const RANK_SHIFT: u32 = 32;
    const BYTE: u64 = 0xff;

    #[inline(always)]
    fn new(governed: SettingRef, verdict: u8, is_done: bool) -> Self {
        let done = if is_done { Self::IS_DONE } else { 0 };
        let (verdict, rank) = (u64::from(verdict) << Self::VERDICT_SHIFT, u64::from(governed.rank) << Self::RANK_SHIFT);
        Self(Self::IS_GOVERNED | done | verdict | rank | u64::from(governed.index))
    }

    #[inline(always)]
    fn setting_ref(self) -> Option<SettingRef> {
        let governed = SettingRef { index: self.0 as u32, rank: (self.0 >> Self::RANK_SHIFT & Self::BYTE) as u32 };
        (self.0 & Self::IS_GOVERNED != 0).then_some(governed)
    }

    /// Returns the next row that governs the call, or [`FIRST_ROW`].
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
struct FoundRow {
    scope: Scope,
    /// Index of the option.
    index: u32,
    option: &'static OptionRow,
}

/// Finds a row that governs a call. Drops the audit's record of an earlier call of the thread.
#[inline(always)]
fn find_row(call: &Sockopt, row: u32, is_read: bool) -> Option<FoundRow> {
    let config = maps::config()?;
    if kernel::is_exempt(is_read) {
        return None;
    }
    // SAFETY: the context's socket, which is never NULL.
    let scope = if call.is_inet() { Some(unsafe { storage::scope_of_call(call.sk(), config) }?) } else { None };
    if row == FIRST_ROW {
        let thread = caller_thread();
        // Only after `scope_of_call`: another target's program may have decided about this very call.
        cgroup_hook::discard_unfinished(thread);
        if config.audit_judges != 0 && cgroup_hook::is_judged_at_exit(thread, call.key()) {
            return None;
        }
    }
    let scope = scope?;
    let (index, option) = if row == FIRST_ROW {
        maps::option_named(config, config.generation, scope.options, call.key())?
    } else {
        let index = scope.options + row - 1;
        // Policies may have changed since the previous row.
        (index, maps::option(index).filter(|option| option.key == call.key())?)
    };
    Some(FoundRow { scope, index, option })
}

/// Returns the position of the setting that governs a call among the option's settings. `is_set` must be a constant: whether
/// the call is setsockopt.
#[inline(always)]
fn rank(call: &Sockopt, scope: Scope, index: u32, option: &OptionRow, is_set: bool) -> Option<u32> {
    if option.is_certain() {
        return Some(0);
    }
    let winner = if is_set {
        winner_of_set(call.as_context(), index, scope.number)
    } else {
        winner_of_read(call.as_context(), index, scope.number)
    };
    (winner != NO_WINNER).then(|| winner as u32 - option.first_setting)
}

/// No setting: greater than any index.
const NO_WINNER: u64 = u64::MAX;

/// Returns the setting that governs a setsockopt call on an option of a scope, or [`NO_WINNER`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn winner_of_set(ctx: *mut bpf_sockopt, index: u32, scope: u32) -> u64 {
    winner(&Sockopt::new(ctx), index, scope, true).map_or(NO_WINNER, u64::from)
}

/// Returns the setting that governs a getsockopt call, or [`NO_WINNER`]. Its program cannot read options.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn winner_of_read(ctx: *mut bpf_sockopt, index: u32, scope: u32) -> u64 {
    winner(&Sockopt::new(ctx), index, scope, false).map_or(NO_WINNER, u64::from)
}

#[inline(always)]
fn winner(call: &Sockopt, index: u32, scope: u32, is_set: bool) -> Option<u32> {
    let option = maps::option(index)?;
    let state = storage::update_facts(state(call)?, call.facts());
    let is_fallback = state.is_fallback != 0;
    let facts = storage::facts_in(state);
    let rules = select(&facts, maps::selectors(scope)?, &PrefixMap { scope });
    if is_set && option.names & !option.sets != 0 && !is_corrected_later(call, option, &facts, is_fallback) {
        option.cautious_winner(rules)
    } else {
        option.winner(rules)
    }
}

/// Returns whether the value that a call sets is checked against limits again when more is known of the socket
/// ([`crate::apply`]). The programs must be able to read and set the option, and the socket must reach their hooks.
#[inline(always)]
fn is_corrected_later(call: &Sockopt, option: &OptionRow, facts: &Facts, is_fallback: bool) -> bool {
    let comes_by = facts.protocol == protocol::TCP || facts.protocol == protocol::UDP;
    comes_by
        && option.traits & traits::CORRECTED != 0
        && !is_fallback
        && !call.is_multipath()
        && read_current(call, option).is_some()
}

/// Records that the application requests a value that a rule may forbid later, and saves the value from before.
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
    let (bit, index) = (1u64 << (option.bit & 63), usize::from(option.bit));
    let Some(state) = state(call).filter(|state| state.notes.requested & bit == 0) else { return };
    let Some(current) = read_current(call, option) else { return };
    // SAFETY: the context's socket, which is never NULL.
    let Some(saved) = (unsafe { storage::saved_values(call.sk(), true) }) else {
        maps::count_loss(LossesRef::no_storage);
        return;
    };
    if index < SETTABLE_MAX {
        state.notes.requested |= bit;
        saved.has_before_request |= bit;
        if option.kind == kind::TEXT {
            saved.before_request_text = current;
        } else {
            saved.before_request[index] = word_in(&current);
        }
    }
}

/// Reads the current value of an option, as getsockopt shows it.
#[inline(always)]
fn read_current(call: &Sockopt, option: &OptionRow) -> Option<Words> {
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

// As in `apply`, the verifier checks each of the functions below once.

/// Finds what governs a call in one row, judges the call and counts it. Returns a [`CallVerdict`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn judge_call(ctx: *mut bpf_sockopt, row: u32) -> u64 {
    judge_row(&Sockopt::new(ctx), row).map_or(CallVerdict::UNGOVERNED, |judged| judged.0)
}

#[inline(always)]
fn judge_row(call: &Sockopt, row: u32) -> Option<CallVerdict> {
    let FoundRow { scope, index, option } = find_row(call, row, false)?;
    let saved = saved_value(call, scope, option);
    let judged = match rank(call, scope, index, option, true) {
        Some(rank) => judge_governed(call, SettingRef { index, rank }, option),
        None => {
            record_requested(call.as_context(), index);
            None
        }
    };
    let judged = judged.unwrap_or(CallVerdict(CallVerdict::UNGOVERNED)).with_next(option.next);
    Some(match saved {
        Some(saved) => preserve_reset(call, option, judged, &saved).with_next(option.next),
        None => judged,
    })
}

/// Returns whether a call on SO_RCVLOWAT is within a setting of SO_RCVBUF (0 or 1): the kernel does not enlarge the buffer,
/// or not beyond the setting. A buffer that a policy sets is locked at that time.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn has_room(ctx: *mut bpf_sockopt, winner: u32) -> u32 {
    let call = Sockopt::new(ctx);
    let Some(setting) = maps::setting(winner) else { return 1 };
    // A negative number stands for the largest one.
    let room = word_in(&call.argument());
    let is_within = setting.form == form::LIMIT && i64::from(room) <= setting.max;
    u32::from(!call.is_tcp() || room <= ROOM_ALWAYS || setting.form == form::SET || is_within)
}

#[inline(always)]
fn judge_governed(call: &Sockopt, governed: SettingRef, option: &'static OptionRow) -> Option<CallVerdict> {
    if option.fast_match(call.len(), &call.argument()) {
        count(option.first_setting, CountersRef::agreed);
        return Some(CallVerdict::new(governed, verdict::NONE, false));
    }
    let GoverningRows { setting, winner, .. } = GoverningRows::new(option, governed.rank)?;
    if option.kind == kind::ROOM && has_room(call.as_context(), winner) != 0 {
        return None;
    }
    // The kernel itself refuses the argument.
    let judgement = judgement(call, option, setting)?;
    let (verdict, is_done) = match judgement.verdict {
        verdict::REWRITTEN if !setting.is_dry_run() => rewrite(call, option, setting, winner, &judgement),
        verdict => (verdict, false),
    };
    if setting.form == form::SET && setting.on_conflict == on_conflict::ALLOW {
        record_app_override(call.as_context(), governed.index, verdict.into());
    }
    // A call that is denied or ignored changes nothing.
    if verdict != verdict::DENIED && verdict != verdict::IGNORED {
        record_requested(call.as_context(), governed.index);
    }
    count(winner, |counters| match verdict {
        verdict::NONE => counters.agreed(),
        verdict::ALLOWED => counters.verdict_at::<0>(),
        verdict::REWRITTEN => counters.verdict_at::<1>(),
        verdict::CLAMPED => counters.verdict_at::<2>(),
        verdict::IGNORED => counters.verdict_at::<3>(),
        _ => counters.verdict_at::<4>(),
    });
    Some(CallVerdict::new(governed, verdict, is_done))
}

/// Sets the policy's value by the helpers where they can. The kernel's own handler would check the application's rights, and
/// refuse a value that the application itself could not have set.
///
/// If the kernel refuses the value itself, the application's call continues unchanged.
#[inline(always)]
fn rewrite(call: &Sockopt, option: &OptionRow, setting: &Setting, winner: u32, judgement: &Judgement) -> (u8, bool) {
    let is_other_kind = setting.is_text() != option.is_text();
    if is_other_kind && is_bound_to_requested(call, option) {
        return (verdict::NONE, false);
    }
    let key @ OptionKey { level, name } = option.helper_key(setting);
    // An application without CAP_NET_RAW cannot bind a bound socket again, and a program cannot bind a subflow of an MPTCP
    // socket.
    if is_other_kind && is_bound_to_wanted(call, setting) {
        return (verdict::REWRITTEN, true);
    }
    // If the programs of this kernel cannot set the value here, the argument of the call is rewritten. A call by a device's
    // name has no argument that means its index, and the reverse.
    let by_argument = (if is_other_kind { verdict::DENIED } else { verdict::REWRITTEN }, false);
    // The kernel's handler also sets the value on the subflows of an MPTCP socket; the helper does not. Bits that stay the
    // application's are not for us to permit: the handler checks whether the application may set them. Before 6.18 an option
    // for programs alone has no other name: the handler refuses the call, and the helper would not.
    let is_of_programs = option.set_as.is_for_programs();
    let is_handlers = call.is_multipath() || call.is_of_refused_level() || setting.is_partial() || is_of_programs;
    if CAN_GET.load() == 0 || is_handlers || option.kind == kind::LOCK {
        return by_argument;
    }
    let result = if setting.is_text() {
        call.set(level, name, &judgement.applied.words, TEXT_LEN as i32)
    } else if key == DEVICE_BY_INDEX {
        call.set_device(word_in(&judgement.applied.words))
    } else {
        call.set(level, name, &judgement.applied.words, 4)
    };
    match result {
        Ok(()) => (verdict::REWRITTEN, true),
        // The kernel's handler may know an option that the helper does not know on this socket.
        Err(EINVAL) => by_argument,
        Err(errno) => {
            count(winner, |counters| {
                counters.failed_errno().set(errno as u64);
                counters.failed()
            });
            (verdict::ALLOWED, false)
        }
    }
}

/// Returns whether a call requests, by its index, the device that the socket is bound to.
#[inline(always)]
fn is_bound_to_requested(call: &Sockopt, option: &OptionRow) -> bool {
    let mut bound = [0; 2];
    CAN_GET.load() != 0
        && option.key == DEVICE_BY_INDEX
        && call.get(DEVICE_BY_INDEX.level, DEVICE_BY_INDEX.name, &mut bound, 4).is_ok()
        && Argument::read(option, call.len(), &call.argument())
            .is_some_and(|requested| requested.number == i64::from(word_in(&bound)))
}

/// Returns whether the socket is bound to the device that a setting names by its index.
#[inline(always)]
fn is_bound_to_wanted(call: &Sockopt, setting: &Setting) -> bool {
    let mut bound = [0; 2];
    CAN_GET.load() != 0
        && !setting.is_text()
        && call.get(DEVICE_BY_INDEX.level, DEVICE_BY_INDEX.name, &mut bound, 4).is_ok()
        && word_in(&bound) == setting.value
}

/// Judges a call. Returns `None` if the kernel will refuse the argument.
#[inline(always)]
fn judgement(call: &Sockopt, option: &OptionRow, setting: &Setting) -> Option<Judgement> {
    judge_argument(option, setting, call.len(), &call.argument())
}

/// The value of a governed option that the kernel resets when it sets another option.
struct SavedValue {
    /// What governs the option.
    governed: SettingRef,
    rows: GoverningRows,
    /// `None` if this kernel does not let programs restore the value.
    value: Option<Words>,
}

/// Returns the value that the call would reset, if a setting in force governs it.
#[inline(always)]
fn saved_value(call: &Sockopt, scope: Scope, option: &OptionRow) -> Option<SavedValue> {
    if option.resets == 0 || call.is_of_refused_level() {
        return None;
    }
    let index = scope.options + option.resets - 1;
    let reset = maps::option(index)?;
    let governed = SettingRef { index, rank: rank(call, scope, index, reset, true)? };
    let rows = GoverningRows::new(reset, governed.rank)?;
    if rows.setting.is_dry_run() || rows.setting.on_conflict == on_conflict::ALLOW {
        return None;
    }
    Some(SavedValue { governed, rows, value: read_value_to_restore(call, reset.key) })
}

/// Returns `None` for an MPTCP socket: the helper does not set options of its subflows.
#[inline(always)]
fn read_value_to_restore(call: &Sockopt, key: OptionKey) -> Option<Words> {
    if CAN_GET.load() == 0 || call.is_multipath() {
        return None;
    }
    let mut value = [0; 2];
    call.get(key.level, key.name, &mut value, 4).ok()?;
    Some(value)
}

/// Sets what a call requests, or what the policy replaces it with, and restores what the kernel resets. A call that the
/// helper refuses is left to the kernel's handler, unless the handler would reset a governed value.
#[inline(always)]
fn preserve_reset(call: &Sockopt, option: &OptionRow, judged: CallVerdict, saved: &SavedValue) -> CallVerdict {
    let int = int_to_set(call, option, judged);
    let Some(value) = saved.value else { return judge_reset(option, judged, saved, int) };
    let is_set = judged.is_done()
        || int.is_some_and(|int| call.set(option.key.level, option.key.name, &words_of(int), 4).is_ok());
    if !is_set {
        return judge_reset(option, judged, saved, int);
    }
    // The read before succeeded: the helper knows the option.
    let OptionKey { level, name } = saved.rows.option.key;
    let _ = call.set(level, name, &value, 4);
    judged.done()
}

/// Judges a call by the value that the kernel's handler would reset. For sockets on which a program can neither make the call
/// itself nor restore the value: IP_TOS on an IPv6-only socket, on an MPTCP socket, and on kernels without the helpers.
#[inline(always)]
fn judge_reset(option: &OptionRow, judged: CallVerdict, saved: &SavedValue, int: Option<u32>) -> CallVerdict {
    let SavedValue { governed, rows: GoverningRows { option: reset, setting, winner }, .. } = *saved;
    let Some(tos) = int.filter(|_| option.key == TYPE_OF_SERVICE) else { return judged };
    let requested = Argument { number: priority_of_tos(tos), ..Argument::default() };
    if judge(reset, setting, &requested).verdict == verdict::NONE {
        return judged;
    }
    if setting.form == form::DENY || setting.on_conflict == on_conflict::DENY {
        count(winner, CountersRef::verdict_at::<4>);
        return CallVerdict::new(governed, verdict::DENIED, false);
    }
    count(winner, CountersRef::verdict_at::<3>);
    CallVerdict::new(governed, verdict::IGNORED, false)
}

/// Returns the number that the kernel's handler would get; `None` if the handler would not run or would refuse the number.
#[inline(always)]
fn int_to_set(call: &Sockopt, option: &OptionRow, judged: CallVerdict) -> Option<u32> {
    let requested = Argument::read(option, call.len(), &call.argument())?.number as u32;
    let verdict = judged.verdict() as u8;
    if verdict == verdict::NONE || verdict == verdict::ALLOWED {
        return Some(requested);
    }
    let GoverningRows { setting, .. } = judged.setting_ref()?.rows()?;
    if setting.is_dry_run() {
        return Some(requested);
    }
    let is_replaced = verdict == verdict::REWRITTEN || verdict == verdict::CLAMPED;
    is_replaced.then(|| judgement(call, option, setting).map(|judgement| word_in(&judgement.applied.words)))?
}

/// Records whether the application overrides the policy, if the policy lets the application win. Later hooks then leave the
/// option alone.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn record_app_override(ctx: *mut bpf_sockopt, index: u32, verdict: u32) -> u32 {
    if let Some(option) = maps::option(index) {
        set_app_override(&Sockopt::new(ctx), option, verdict);
    }
    0
}

#[inline(always)]
fn set_app_override(call: &Sockopt, option: &OptionRow, verdict: u32) {
    let Some(state) = state(call) else { return };
    let bit = 1u64 << (option.bit & 63);
    if verdict == u32::from(verdict::NONE) {
        state.notes.app_override &= !bit;
    } else {
        state.notes.app_override |= bit;
        // The socket's value is no longer the policy's.
        state.notes.changed &= !bit;
    }
    // For the sockets that this one may accept.
    // SAFETY: the context's socket, which is never NULL.
    if let Some(saved) = unsafe { storage::saved_values(call.sk(), state.notes.app_override != 0) } {
        saved.app_override = state.notes.app_override;
        saved.has_before_rule &= !bit;
    }
}

/// Carries out a verdict. Returns `None` if the call continues.
#[inline(always)]
fn apply_verdict(call: &Sockopt, governed: SettingRef, verdict: u32) -> Option<i32> {
    // A call that agrees needs no tables, unless the kernel would read the caller's memory again.
    if verdict == verdict::NONE.into() && !call.is_long() {
        return None;
    }
    let GoverningRows { option, setting, .. } = governed.rows().filter(|rows| !rows.setting.is_dry_run())?;
    match verdict as u8 {
        verdict::REWRITTEN | verdict::CLAMPED => {
            let judgement = judgement(call, option, setting)?;
            call.replace(judgement.applied.words, judgement.applied.len);
            None
        }
        verdict::IGNORED => {
            call.skip();
            Some(GO_ON)
        }
        verdict::DENIED => {
            call.pass();
            if CAN_SET_RETVAL.load() != 0 {
                // From 7.2 on, the verifier requires an error number of at least -4095.
                let errno = i32::from(setting.errno) & 0xfff;
                // SAFETY: the helper takes a number.
                unsafe { bpf_set_retval(-errno) };
            }
            Some(FAIL)
        }
        _ => {
            // An argument whose length the kernel refuses must keep its length.
            if judgement(call, option, setting).is_some() {
                call.pass_as_read(option.needed_len());
            }
            None
        }
    }
}

/// Stores a verdict in the audit's record, or reports it.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn report_call(ctx: *mut bpf_sockopt, judged: u64) -> u32 {
    let (call, judged) = (Sockopt::new(ctx), CallVerdict(judged));
    let Some(rows) = judged.setting_ref().and_then(SettingRef::rows) else { return 0 };
    let (key, verdict) = (call.key(), judged.verdict());
    if let Some(record) = audit_record(call::SETSOCKOPT, key) {
        fill_record(record, &call, &rows, verdict);
        return 0;
    }
    let head = Head { key, call: call::SETSOCKOPT, source: source::HOOK, result: 0, duration_ns: 0 };
    let place = maps::target().place;
    emit::conflict(head, rows.winner, verdict, place, caller(), Executable::default, |record| {
        *record = Call { fd: -1, ..Call::default() };
        fill_record(record, &call, &rows, verdict);
    });
    0
}

/// Returns the audit's record of a call, created here if the audit sees only exits.
#[inline(always)]
fn audit_record(kind: u32, key: OptionKey) -> Option<&'static mut Call> {
    let thread = caller_thread();
    if thread == 0 { None } else { cgroup_hook::record_of_conflict(thread, kind, key) }
}

/// Returns the thread that makes the call in the format of `bpf_get_current_pid_tgid`; 0 if unknown.
#[inline(always)]
fn caller_thread() -> u64 {
    if CAN_SEE_TASK.load() != 0 { bpf_get_current_pid_tgid() } else { kernel::current_thread() }
}

/// Returns the task that makes the call, if this kernel shows it.
#[inline(always)]
fn caller() -> Task {
    if CAN_SEE_TASK.load() != 0 { Task::current() } else { Task::UNKNOWN }
}

/// Completes the record of a setsockopt call.
#[inline(always)]
fn fill_record(record: &mut Call, call: &Sockopt, rows: &GoverningRows, verdict: u32) {
    let GoverningRows { option, setting, winner } = *rows;
    let argument = call.argument();
    // The bytes that were judged: the caller's memory may have changed since the audit read it.
    record.requested = Value::new(argument, call.len() as u32);
    fill_socket(record, call, winner, verdict);
    // The value that the call would reset belongs to another option.
    if option.key != call.key() {
        return;
    }
    if let Some(requested) = Argument::read(option, call.len(), &argument) {
        record.applied = judge(option, setting, &requested).applied;
        record.wanted = Value::wanted(option, setting, &requested);
    }
    if let Some(before) = value_before(call, option) {
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
        // The decision may not have needed the facts.
        let state = storage::update_facts(state, call.facts());
        record.facts = state.facts;
        record.cookie = state.notes.cookie;
    }
}

/// Returns the option's value before the call, if this kernel lets programs read it.
#[inline(always)]
fn value_before(call: &Sockopt, option: &OptionRow) -> Option<Value> {
    let current = read_current(call, option)?;
    Some(if option.kind == kind::TEXT { Value::text(current) } else { Value::new(current, 4) })
}

/// Reports a read that shows another value than the policy's. Never changes the result of the read.
#[cgroup_sockopt(getsockopt)]
pub(crate) fn sp_getsockopt(ctx: SockoptContext) -> i32 {
    let call = Sockopt::new(ctx.sockopt);
    if is_option_named(&call) && call.retval() == 0 {
        let judged = compare_read(ctx.sockopt);
        if judged != CallVerdict::UNGOVERNED {
            report_read(ctx.sockopt, judged);
        }
    }
    call.pass_read();
    GO_ON
}

/// Returns what a read of `len` bytes showed, converted to the value that was set. `None` if it reveals nothing about the
/// setting.
#[inline(always)]
pub(super) fn shown_argument(option: &OptionRow, setting: &Setting, len: i32, words: &Words) -> Option<Argument> {
    if setting.form != form::SET || option.read_back == read_back::NONE {
        return None;
    }
    if option.kind == kind::TEXT && len < TEXT_LEN as i32 {
        // The caller's buffer was too small for the whole name.
        return None;
    }
    let shown = Argument::read(option, len, words)?;
    Some(match option.read_back {
        read_back::DOUBLED => Argument { number: shown.number / 2, ..shown },
        _ => shown,
    })
}

/// Returns the verdict on a read. `None` if it reveals nothing about the setting.
#[inline(always)]
pub(super) fn read_verdict(option: &OptionRow, setting: &Setting, len: i32, words: &Words) -> Option<u8> {
    Some(judge(option, setting, &shown_argument(option, setting, len, words)?).verdict)
}

/// Counts a read that shows another value than the policy's, and returns a [`CallVerdict`] for it.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn compare_read(ctx: *mut bpf_sockopt) -> u64 {
    compare_row(&Sockopt::new(ctx)).map_or(CallVerdict::UNGOVERNED, |judged| judged.0)
}

#[inline(always)]
fn compare_row(call: &Sockopt) -> Option<CallVerdict> {
    let FoundRow { scope, index, option } = find_row(call, FIRST_ROW, true)?;
    let governed = SettingRef { index, rank: rank(call, scope, index, option, false)? };
    let GoverningRows { setting, winner, .. } = GoverningRows::new(option, governed.rank)?;
    if setting.is_text() != option.is_text()
        || read_verdict(option, setting, call.len(), &call.argument())? == verdict::NONE
    {
        return None;
    }
    count(winner, CountersRef::reads);
    Some(CallVerdict::new(governed, verdict::ALLOWED, false))
}

/// Stores the verdict on a read in the audit's record, or reports it.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn report_read(ctx: *mut bpf_sockopt, judged: u64) -> u32 {
    let (call, judged) = (Sockopt::new(ctx), CallVerdict(judged));
    let Some(rows) = judged.setting_ref().and_then(SettingRef::rows) else { return 0 };
    let (key, verdict) = (rows.option.key, judged.verdict());
    if let Some(record) = audit_record(call::GETSOCKOPT, key) {
        fill_read_record(record, &call, &rows, verdict);
        return 0;
    }
    let head = Head { key, call: call::GETSOCKOPT, source: source::HOOK, result: 0, duration_ns: 0 };
    let place = maps::target().place;
    emit::conflict(head, rows.winner, verdict, place, caller(), Executable::default, |record| {
        *record = Call { fd: -1, ..Call::default() };
        fill_read_record(record, &call, &rows, verdict);
    });
    0
}

#[inline(always)]
fn fill_read_record(record: &mut Call, call: &Sockopt, rows: &GoverningRows, verdict: u32) {
    let GoverningRows { option, setting, winner } = *rows;
    let argument = call.argument();
    record.requested = Value::new(argument, call.len() as u32);
    if let Some(shown) = shown_argument(option, setting, call.len(), &argument) {
        record.wanted = Value::wanted(option, setting, &shown);
    }
    fill_socket(record, call, winner, verdict);
}
