//! Applies the settings of one apply point to one socket.
//!
//! The code for a single option is in functions that the verifier checks once, however many options a loop visits
//! ([`apply_sock_ops`], [`apply_sock_addr`]). For the verifier they are global functions: they must be exported, and take
//! only the context and numbers.

use core::arch::asm;

use abi::{
    SETTABLE_MAX, entry,
    event::{Call, flags},
    judge::{Argument, Judgement, judge, verdict},
    select::{Candidates, select},
    setting::{
        OptionKey, OptionRow, Setting, TEXT_LEN, Words, form, kind, on_conflict, read_back, traits, word_in, words_of,
    },
    socket::{Facts, Notes, State, family, protocol},
};
use aya_ebpf::{
    bindings::{bpf_sock_addr, bpf_sock_ops},
    cty::c_void,
};

use crate::{
    ctx::{HasDevice, PostCreate, SockAddr, SockOps, Socket},
    emit,
    maps::{self, PrefixMap, count, count_loss},
    record::{CountersRef, LossesRef},
    storage::{self, Scope},
};

const TOS: OptionKey = OptionKey { level: 0, name: 1 };
const PRIORITY: OptionKey = OptionKey { level: 1, name: 12 };
const MAXSEG: OptionKey = OptionKey { level: 6, name: 2 };

/// The result of applying a setting to a socket: a number, because it is passed between global functions.
pub(crate) mod outcome {
    /// Nothing to count.
    pub(crate) const NONE: u32 = 0;
    pub(crate) const SET: u32 = 1;
    pub(crate) const UNCHANGED: u32 = 2;
    /// Plus the kernel's errno.
    pub(crate) const FAILED: u32 = 0x1000;
}

/// Applies the policies of a scope at an apply point, which has at most `MAX` options, to a socket with the notes `state`.
/// `apply_one` gets the index of an option, the matching rules, the missing traits with the bits of [`entry`], and the notes.
///
/// `is_inet6` is the socket's own family, which decides what options the socket has; `state.facts.family` is that of its
/// traffic.
#[inline(always)]
pub(crate) fn apply<const MAX: usize>(
    scope: Scope,
    point: u32,
    state: &mut State,
    is_inet6: bool,
    mut apply_one: impl FnMut(u32, Candidates, u32, &mut State),
) {
    let Some(list) = maps::apply_list(scope.number, point) else { return };
    if list.len == 0 {
        return;
    }
    let Some(selectors) = maps::selectors(scope.number) else { return };
    let rules = select(&state.facts, selectors, &PrefixMap { scope: scope.number });
    if rules.sure | state.notes.changed | state.notes.requested == 0 {
        return;
    }
    let missing = missing_traits(&state.facts, is_inet6);
    for position in 0..MAX {
        if position as u32 >= list.len {
            break;
        }
        let entry = list.options[position];
        apply_one(scope.options + (entry & entry::NUMBER), rules, missing | (entry & !entry::NUMBER), state);
    }
}

/// A bit beside the missing traits: the socket may still carry IPv4 or IPv6.
const DUAL_STACK: u32 = 0x100;

/// A bit beside the missing traits: the kernel may bind the socket to another device after this hook. A device that is set
/// now is counted if the socket still has it at a later hook.
pub(crate) const POSTPONED: u32 = 0x200;

/// Returns the traits of options that a socket does not have, and [`DUAL_STACK`] if the socket may carry both families.
#[inline(always)]
pub(crate) fn missing_traits(facts: &Facts, is_inet6: bool) -> u32 {
    let tcp = if facts.protocol == protocol::TCP { 0 } else { traits::TCP };
    let (family, dual_stack) = match (is_inet6, facts.family) {
        (false, _) => (traits::INET6, 0),
        // Some kernels do not let programs set IPv4's options on such a socket: the setting then counts as failed.
        (true, family::IPV4) => (0, 0),
        (true, family::IPV6) => (traits::INET, 0),
        (true, _) => (0, DUAL_STACK),
    };
    u32::from(tcp | family) | dual_stack
}

/// Applies an option to a new socket. `set` gets the option, the setting and the notes, and returns an [`outcome`], which is
/// recorded and counted.
#[inline(always)]
pub(crate) fn apply_option(
    index: u32,
    rules: Candidates,
    missing_traits: u32,
    notes: &mut Notes,
    set: impl FnOnce(&OptionRow, &Setting, &mut Notes) -> u32,
) {
    let Some(option) = maps::option(index) else { return };
    let bit = 1u64 << (option.bit & 63);
    if u32::from(option.traits) & missing_traits != 0 {
        return;
    }
    let Some(winner) = option.winner(rules) else { return };
    let Some(setting) = maps::setting(winner) else { return };
    if setting.form == form::SET && is_same_kind(option, setting) && !is_overridden_by_app(notes, bit, setting) {
        let outcome = set(option, setting, notes);
        record_outcome(notes, bit, winner, outcome);
    }
}

/// Returns whether a setting is for this option: a device has two options, and each takes the settings of its own kind.
#[inline(always)]
fn is_same_kind(option: &OptionRow, setting: &Setting) -> bool {
    setting.is_text() == option.is_text()
}

/// Returns whether the application requested another value and the policy lets the application win.
#[inline(always)]
fn is_overridden_by_app(notes: &Notes, bit: u64, setting: &Setting) -> bool {
    notes.app_override & bit != 0 && setting.on_conflict == on_conflict::ALLOW
}

/// Records and counts an outcome, once for each socket. Returns whether the outcome is new.
#[inline(always)]
fn record_outcome(notes: &mut Notes, bit: u64, winner: u32, outcome: u32) -> bool {
    let recorded = if outcome >= outcome::FAILED { notes.failed } else { notes.applied };
    if outcome == outcome::NONE || (recorded & bit != 0 && (outcome < outcome::FAILED || notes.applied & bit == 0)) {
        return false;
    }
    if outcome < outcome::FAILED {
        notes.applied |= bit;
        if outcome == outcome::SET {
            count(winner, CountersRef::set);
        } else {
            count(winner, CountersRef::unchanged);
        }
        return true;
    }
    if notes.applied & bit != 0 {
        notes.applied &= !bit;
        count(winner, CountersRef::undone);
    }
    if notes.failed & bit == 0 {
        notes.failed |= bit;
        count(winner, |counters| {
            counters.failed_errno().set(u64::from(outcome - outcome::FAILED));
            counters.failed()
        });
    }
    true
}

/// Applies one option in sock_ops. Returns whether [`check_sock_ops`] must check the option.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn apply_sock_ops(
    ctx: *mut bpf_sock_ops,
    index: u32,
    sure: u64,
    possible: u64,
    missing: u32,
) -> u32 {
    let must_check = SockOps::new(ctx)
        .is_some_and(|socket| apply_by_helper(&socket, socket.sk(), index, Candidates { sure, possible }, missing));
    must_check.into()
}

/// Applies one option at bind or connect. Returns whether [`check_sock_addr`] must check the option.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn apply_sock_addr(
    ctx: *mut bpf_sock_addr,
    index: u32,
    sure: u64,
    possible: u64,
    missing: u32,
) -> u32 {
    let must_check = SockAddr::new(ctx)
        .is_some_and(|socket| apply_by_helper(&socket, socket.sk(), index, Candidates { sure, possible }, missing));
    must_check.into()
}

/// Applies one option to a new socket.
#[inline(always)]
pub(crate) fn apply_to_new(socket: &PostCreate, index: u32, rules: Candidates, missing: u32) {
    apply_by_helper(socket, socket.sk(), index, rules, missing);
}

/// An option of a socket at a hook.
struct OptionTask<'a, S> {
    socket: &'a S,
    sk: *mut c_void,
    option: &'static OptionRow,
    bit: u64,
    notes: Notes,
    /// Whether `notes` must be stored.
    is_changed: bool,
}

/// Checks one option in sock_ops that no rule sets now.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn check_sock_ops(
    ctx: *mut bpf_sock_ops,
    index: u32,
    sure: u64,
    possible: u64,
    missing: u32,
) -> u32 {
    if let Some(socket) = SockOps::new(ctx) {
        check_by_helper(&socket, socket.sk(), index, Candidates { sure, possible }, missing);
    }
    0
}

/// Checks one option at bind or connect that no rule sets now.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn check_sock_addr(
    ctx: *mut bpf_sock_addr,
    index: u32,
    sure: u64,
    possible: u64,
    missing: u32,
) -> u32 {
    if let Some(socket) = SockAddr::new(ctx) {
        check_by_helper(&socket, socket.sk(), index, Candidates { sure, possible }, missing);
    }
    0
}

/// Returns the setting that governs an option of a socket, and its index.
#[inline(always)]
fn governing_setting(option: &OptionRow, rules: Candidates, missing: u32) -> Option<(u32, &'static Setting)> {
    let winner = if u32::from(option.traits) & missing == 0 { option.winner(rules) } else { None }?;
    Some((winner, maps::setting(winner)?))
}

/// Writes an element. Before 6.4 the verifier knows the bound of a number only in the register that was compared, and not in
/// its source. The `asm!` prevents the compiler from comparing earlier.
#[inline(always)]
fn store_at(values: &mut [u32; SETTABLE_MAX], index: usize, value: u32) {
    let mut opaque = index;
    // SAFETY: moves a register to itself.
    unsafe { asm!("{index} = {index}", index = inout(reg) opaque, options(nostack, preserves_flags)) };
    if let Some(element) = values.get_mut(opaque) {
        *element = value;
    }
}

/// Returns the setting against which the application's value is checked, and its index.
#[inline(always)]
fn checked_setting(option: &OptionRow, rules: Candidates, missing: u32) -> Option<(u32, &'static Setting)> {
    if missing & entry::LAST == 0 || u32::from(option.traits) & missing != 0 {
        return governing_setting(option, rules, missing);
    }
    let winner = option.cautious_winner(rules)?;
    Some((winner, maps::setting(winner)?))
}

impl<'a, S: HasDevice> OptionTask<'a, S> {
    #[inline(always)]
    fn new(socket: &'a S, sk: *mut c_void, option: &'static OptionRow) -> Option<Self> {
        // SAFETY: the context's socket, checked for NULL.
        let notes = unsafe { storage::notes(sk) }?;
        Some(Self { socket, sk, option, bit: 1u64 << (option.bit & 63), notes, is_changed: false })
    }

    #[inline(always)]
    fn finish(self) {
        if self.is_changed {
            // SAFETY: as in `new`.
            unsafe { storage::store_notes(self.sk, &self.notes) };
        }
    }

    #[inline(always)]
    fn record(&mut self, winner: u32, outcome: u32) {
        self.is_changed |= record_outcome(&mut self.notes, self.bit, winner, outcome);
    }

    #[inline(always)]
    fn record_device(&mut self, device: u32, wanted: u32) {
        (self.notes.device, self.notes.device_wanted) = (device, wanted);
        self.is_changed = true;
    }
}

/// Sets an option if a rule sets it. Returns whether the option must be checked.
#[inline(always)]
fn apply_by_helper(socket: &impl HasDevice, sk: *mut c_void, index: u32, rules: Candidates, missing: u32) -> bool {
    let Some(option) = maps::option(index) else { return false };
    let Some(mut task) = OptionTask::new(socket, sk, option) else { return false };
    let Some((winner, setting)) =
        governing_setting(option, rules, missing).filter(|(_, setting)| setting.form == form::SET)
    else {
        return (task.notes.changed | task.notes.requested) & task.bit != 0;
    };
    if missing & entry::CHECK == 0
        && is_same_kind(option, setting)
        && !is_overridden_by_app(&task.notes, task.bit, setting)
    {
        task.set(setting, winner, missing);
        task.finish();
    }
    false
}

/// Restores an option that no rule sets any more, and checks the application's value against a limit or a deny.
#[inline(always)]
fn check_by_helper(socket: &impl HasDevice, sk: *mut c_void, index: u32, rules: Candidates, missing: u32) {
    let Some(option) = maps::option(index) else { return };
    let Some(mut task) = OptionTask::new(socket, sk, option) else { return };
    if task.notes.changed & task.bit != 0 {
        task.restore_value();
    }
    if task.notes.requested & task.bit != 0
        && let Some((winner, setting)) = checked_setting(option, rules, missing)
    {
        task.enforce_bound(setting, winner);
    }
    task.finish();
}

impl<S: HasDevice> OptionTask<'_, S> {
    #[inline(always)]
    fn is_device(&self) -> bool {
        self.option.traits & traits::DEVICE != 0
    }

    /// Returns the option's index in [`SavedValues`](abi::socket::SavedValues), with a bound for the verifier.
    #[inline(always)]
    fn saved_index(&self) -> Option<usize> {
        Some(usize::from(self.option.bit)).filter(|index| *index < SETTABLE_MAX)
    }

    /// Sets the option. Saves the value from before if rules may stop setting the option.
    #[inline(always)]
    fn set(&mut self, setting: &Setting, winner: u32, missing: u32) {
        let must_save = missing & entry::KEEP != 0 && self.notes.changed & self.bit == 0 && !setting.is_dry_run();
        let mut before = [0; 2];
        let is_known = must_save && self.read_current(&mut before);
        let priority = if must_save { self.priority() } else { None };
        let outcome = if self.is_device() {
            self.set_device(setting, winner)
        } else {
            // The kernel may refuse the value, and the socket may never carry IPv4.
            let may_fail = self.option.traits & traits::INET != 0 && missing & DUAL_STACK != 0;
            set_option(self.socket, self.option, setting, winner, self.notes.cookie, may_fail)
        };
        if outcome == outcome::SET && is_known {
            self.save_value(&before, priority);
        }
        if missing & POSTPONED == 0 || !self.is_device() || outcome >= outcome::FAILED {
            self.record(winner, outcome);
        }
    }

    /// Reads the current value, as getsockopt shows it; for a device, the interface index. Returns whether the value is
    /// known.
    ///
    /// Writes to memory of the caller. If this returned an `Option`, the compiler would spill the value also where there is
    /// none, which the verifier rejects.
    #[inline(always)]
    fn read_current(&self, current: &mut Words) -> bool {
        if self.is_device() {
            *current = words_of(self.socket.device());
            return true;
        }
        let OptionKey { level, name } = self.option.key;
        if self.option.read_back == read_back::NONE {
            // The kernel shows the segment size of the route if none was set. A new socket has 0.
            return self.option.key == MAXSEG;
        }
        let len = if self.option.kind == kind::TEXT { TEXT_LEN as i32 } else { 4 };
        self.socket.get(level, name, current, len).is_ok()
    }

    /// Returns SO_PRIORITY, if setting this option changes it.
    #[inline(always)]
    fn priority(&self) -> Option<u32> {
        let mut priority = [0; 2];
        if self.option.key != TOS {
            return None;
        }
        self.socket.get(PRIORITY.level, PRIORITY.name, &mut priority, 4).ok()?;
        Some(word_in(&priority))
    }

    #[inline(always)]
    fn save_value(&mut self, before: &Words, priority: Option<u32>) {
        let Some(index) = self.saved_index() else { return };
        // SAFETY: the context's socket, checked for NULL.
        let Some(saved) = (unsafe { storage::saved_values(self.sk, true) }) else {
            count_loss(LossesRef::no_storage);
            return;
        };
        self.notes.changed |= self.bit;
        self.is_changed = true;
        saved.has_before_rule |= self.bit;
        if let Some(priority) = priority {
            (saved.priority, saved.has_priority) = (priority, 1);
        }
        if self.option.kind == kind::TEXT && !self.is_device() {
            saved.before_rule_text = *before;
        } else if self.option.key == PRIORITY && saved.has_priority != 0 {
            // Setting IP_TOS gave the current priority.
            let priority = saved.priority;
            store_at(&mut saved.before_rule, index, priority);
        } else {
            store_at(&mut saved.before_rule, index, word_in(before));
        }
    }

    /// Restores the value that the option had before a rule set it.
    #[inline(always)]
    fn restore_value(&mut self) {
        self.notes.changed &= !self.bit;
        self.is_changed = true;
        if self.try_restore_value().is_none_or(|result| result.is_err()) {
            count_loss(LossesRef::not_restored);
        }
    }

    #[inline(always)]
    fn try_restore_value(&mut self) -> Option<Result<(), i32>> {
        let index = self.saved_index()?;
        // SAFETY: as in `save_value`.
        let saved = unsafe { storage::saved_values(self.sk, false) }?;
        saved.has_before_rule &= !self.bit;
        if self.is_device() {
            // If the socket has another device, no rule set that device.
            let is_unchanged = self.socket.device() == self.notes.device;
            self.record_device(0, 0);
            let before = saved.before_rule[index];
            return Some(if is_unchanged { self.socket.set_device(before) } else { Ok(()) });
        }
        if self.option.kind == kind::TEXT {
            let before = saved.before_rule_text;
            return Some(self.write_text(&before));
        }
        let result = self.write_number(saved.before_rule[index]);
        if self.option.key == TOS && saved.has_priority != 0 {
            saved.has_priority = 0;
            let _ = self.socket.set(PRIORITY.level, PRIORITY.name, &words_of(saved.priority), 4);
        }
        Some(result)
    }

    /// Sets a number that getsockopt showed.
    #[inline(always)]
    fn write_number(&self, shown: u32) -> Result<(), i32> {
        let value = if self.option.read_back == read_back::DOUBLED { shown / 2 } else { shown };
        self.socket.set(self.option.key.level, self.option.key.name, &words_of(value), 4)
    }

    #[inline(always)]
    fn write_text(&self, text: &Words) -> Result<(), i32> {
        self.socket.set(self.option.key.level, self.option.key.name, text, TEXT_LEN as i32)
    }

    /// Checks what the application requested, before all facts were known, against a limit or a deny.
    #[inline(always)]
    fn enforce_bound(&mut self, setting: &Setting, winner: u32) {
        let Some(judgement) = self.judge(setting) else { return };
        if judgement.verdict == verdict::NONE {
            return;
        }
        self.notes.requested &= !self.bit;
        self.is_changed = true;
        count(winner, |counters| match judgement.verdict {
            verdict::ALLOWED => counters.verdict_at::<0>(),
            verdict::CLAMPED => counters.verdict_at::<2>(),
            verdict::IGNORED => counters.verdict_at::<3>(),
            _ => counters.verdict_at::<4>(),
        });
        if setting.is_dry_run() || judgement.verdict == verdict::ALLOWED {
            return;
        }
        let result = if judgement.verdict == verdict::CLAMPED {
            let OptionKey { level, name } = self.option.key;
            Some(self.socket.set(level, name, &judgement.applied.words, 4))
        } else {
            self.restore_requested()
        };
        if !matches!(result, Some(Ok(()))) {
            let errno = if let Some(Err(errno)) = result { errno } else { 0 };
            report_failure(self.option, winner, setting, errno, self.notes.cookie);
            self.record(winner, outcome::FAILED + errno as u32);
        }
    }

    #[inline(always)]
    fn judge(&self, setting: &Setting) -> Option<Judgement> {
        let mut requested = Argument::default();
        if setting.form != form::DENY {
            let mut current = [0; 2];
            if !self.read_current(&mut current) {
                return None;
            }
            requested = Argument::read(self.option, 4, &current)?;
            if self.option.read_back == read_back::DOUBLED {
                requested.number /= 2;
            }
        }
        Some(judge(self.option, setting, &requested))
    }

    /// Restores the value that the option had before the application requested another one.
    #[inline(always)]
    fn restore_requested(&mut self) -> Option<Result<(), i32>> {
        let index = self.saved_index()?;
        // SAFETY: as in `save_value`.
        let saved = unsafe { storage::saved_values(self.sk, false) }?;
        saved.has_before_request &= !self.bit;
        if self.option.kind == kind::TEXT {
            let before = saved.before_request_text;
            return Some(self.write_text(&before));
        }
        Some(self.write_number(saved.before_request[index]))
    }

    /// Binds the socket to a device, unless it is bound to this device already.
    #[inline(always)]
    fn set_device(&mut self, setting: &Setting, winner: u32) -> u32 {
        let (current, wanted) = (self.socket.device(), setting.device());
        if self.notes.device_wanted == wanted && self.notes.device == current {
            // Counted once, also if the count was postponed.
            return if self.notes.applied & self.bit == 0 { outcome::SET } else { outcome::NONE };
        }
        if self.option.kind != kind::TEXT && current == setting.value {
            self.record_device(current, wanted);
            return outcome::UNCHANGED;
        }
        if !setting.is_dry_run() {
            let result = if self.option.kind == kind::TEXT {
                self.write_text(&setting.text)
            } else {
                self.socket.set_device(setting.value)
            };
            if let Err(errno) = result {
                report_failure(self.option, winner, setting, errno, self.notes.cookie);
                return outcome::FAILED + errno as u32;
            }
        }
        self.record_device(self.socket.device(), wanted);
        outcome::SET
    }
}

/// Sets an option by the helpers. Returns the outcome; a failure with `may_fail` counts as none.
#[inline(always)]
fn set_option(
    socket: &impl Socket,
    option: &OptionRow,
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

/// Sets a text unless the option has it already. `Err` is the kernel's errno.
#[inline(always)]
fn set_text(socket: &impl Socket, option: &OptionRow, setting: &Setting) -> Result<u32, i32> {
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

/// Sets a number unless the option has it already. `Err` is the kernel's errno.
#[inline(always)]
fn set_int(socket: &impl Socket, option: &OptionRow, setting: &Setting, may_fail: bool) -> Result<u32, i32> {
    let (level, name) = (option.key.level, option.key.name);
    let mut wanted = setting.value;
    if option.read_back != read_back::NONE || setting.is_partial() {
        let mut current = [0; 2];
        match socket.get(level, name, &mut current, 4) {
            Ok(()) => {
                let current = word_in(&current);
                wanted = setting.apply_to(current);
                // The kernel may tune a buffer of the same size: setting the size turns that off.
                if option.read_back == read_back::SAME && current == wanted {
                    return Ok(outcome::UNCHANGED);
                }
            }
            // Without the current value, the application's bits would be lost. In a dry run, only the read shows whether the
            // socket has the option.
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
fn report_failure(option: &OptionRow, winner: u32, setting: &Setting, errno: i32, cookie: u64) {
    emit::outcome(option.key, errno, maps::target().place, |call| {
        let wanted = setting.whole_value();
        *call = Call { flags: flags::DECIDED, setting: winner, wanted, cookie, ..Call::default() };
    });
}
