//! Applies the settings of one site to one socket.
//!
//! What concerns a single option stands in functions of their own ([`apply_sock_ops`],
//! [`apply_sock_addr`]) that the verifier checks once, however many options a loop may meet: they
//! are global functions to it, for which they must be exported and take nothing but the context and
//! numbers.

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
    ctx::{Bound, PostCreate, SockAddr, SockOps, Socket},
    emit,
    maps::{self, PrefixMap, count, count_loss},
    storage::{self, Scope},
};

const TOS: OptionKey = OptionKey { level: 0, name: 1 };
const PRIORITY: OptionKey = OptionKey { level: 1, name: 12 };
const MAXSEG: OptionKey = OptionKey { level: 6, name: 2 };

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
/// not have with the bits of [`entry`], and the notes.
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
    let Some(list) = maps::apply_list(scope.number, site) else { return };
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
        apply(scope.options + (entry & entry::NUMBER), rules, missing | (entry & !entry::NUMBER), state);
    }
}

/// Beside the traits of options that a socket does not have: it may yet carry IPv4 or IPv6.
const DUAL_STACK: u32 = 0x100;

/// Beside the same: the kernel may bind the socket to another device after this hook. A device that is set now counts when the
/// socket still has it at a later hook.
pub(crate) const POSTPONED: u32 = 0x200;

/// The traits of options that a socket does not have, and [`DUAL_STACK`] if it is that.
#[inline(always)]
pub(crate) fn missing_traits(facts: &Facts, is_inet6: bool) -> u32 {
    let tcp = if facts.protocol == protocol::TCP { 0 } else { traits::TCP };
    let (family, dual_stack) = match (is_inet6, facts.family) {
        (false, _) => (traits::INET6, 0),
        // Not all kernels let programs set IPv4's options on such a socket: then it counts as failed.
        (true, family::IPV4) => (0, 0),
        (true, family::IPV6) => (traits::INET, 0),
        (true, _) => (0, DUAL_STACK),
    };
    u32::from(tcp | family) | dual_stack
}

/// Applies an option to a new socket: `set` is told the option, the setting and the notes, and gives an [`outcome`], which is
/// noted and counted.
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
    if setting.form == form::SET && is_own(option, setting) && !is_overridden_by_app(notes, bit, setting) {
        let outcome = set(option, setting, notes);
        note(notes, bit, winner, outcome);
    }
}

/// A device has two options, and each takes the settings of its own kind.
#[inline(always)]
fn is_own(option: &OptionRow, setting: &Setting) -> bool {
    setting.is_text() == option.is_text()
}

/// Whether the application asked for another value where the policy lets the application win.
#[inline(always)]
fn is_overridden_by_app(notes: &Notes, bit: u64, setting: &Setting) -> bool {
    notes.app_override & bit != 0 && setting.on_conflict == on_conflict::ALLOW
}

/// Notes and counts an outcome, once for each socket; tells whether it is new.
#[inline(always)]
fn note(notes: &mut Notes, bit: u64, winner: u32, outcome: u32) -> bool {
    let seen = if outcome >= outcome::FAILED { notes.failed } else { notes.applied };
    if outcome == outcome::NONE || (seen & bit != 0 && (outcome < outcome::FAILED || notes.applied & bit == 0)) {
        return false;
    }
    if outcome < outcome::FAILED {
        notes.applied |= bit;
        if outcome == outcome::SET {
            count(winner, |counters| &mut counters.set);
        } else {
            count(winner, |counters| &mut counters.unchanged);
        }
        return true;
    }
    if notes.applied & bit != 0 {
        notes.applied &= !bit;
        count(winner, |counters| &mut counters.undone);
    }
    if notes.failed & bit == 0 {
        notes.failed |= bit;
        count(winner, |counters| {
            counters.failed_errno = u64::from(outcome - outcome::FAILED);
            &mut counters.failed
        });
    }
    true
}

/// Applies one option in sock_ops; tells whether [`check_sock_ops`] has more to look at.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn apply_sock_ops(
    ctx: *mut bpf_sock_ops,
    index: u32,
    sure: u64,
    possible: u64,
    missing: u32,
) -> u32 {
    let is_more = SockOps::new(ctx)
        .is_some_and(|turn| apply_by_helper(&turn, turn.sk(), index, Candidates { sure, possible }, missing));
    is_more.into()
}

/// Applies one option at bind or connect; tells whether [`check_sock_addr`] has more to look at.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn apply_sock_addr(
    ctx: *mut bpf_sock_addr,
    index: u32,
    sure: u64,
    possible: u64,
    missing: u32,
) -> u32 {
    let is_more = SockAddr::new(ctx)
        .is_some_and(|socket| apply_by_helper(&socket, socket.sk(), index, Candidates { sure, possible }, missing));
    is_more.into()
}

/// Applies one option to a socket that has just been made.
#[inline(always)]
pub(crate) fn apply_to_new(socket: &PostCreate, index: u32, rules: Candidates, missing: u32) {
    apply_by_helper(socket, socket.sk(), index, rules, missing);
}

/// An option of a socket at a hook.
struct Task<'a, S> {
    socket: &'a S,
    sk: *mut c_void,
    option: &'static OptionRow,
    bit: u64,
    notes: Notes,
    /// Whether `notes` are to be put back.
    is_noted: bool,
}

/// Looks at one option in sock_ops that no rule sets now.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn check_sock_ops(
    ctx: *mut bpf_sock_ops,
    index: u32,
    sure: u64,
    possible: u64,
    missing: u32,
) -> u32 {
    if let Some(turn) = SockOps::new(ctx) {
        check_by_helper(&turn, turn.sk(), index, Candidates { sure, possible }, missing);
    }
    0
}

/// Looks at one option at bind or connect that no rule sets now.
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

/// The setting that governs an option of a socket, and its number.
#[inline(always)]
fn governing(option: &OptionRow, rules: Candidates, missing: u32) -> Option<(u32, &'static Setting)> {
    let winner = if u32::from(option.traits) & missing == 0 { option.winner(rules) } else { None }?;
    Some((winner, maps::setting(winner)?))
}

/// Writes an element. Before 6.4 the verifier knows the bound of a number in the register that was compared and not where that was
/// copied from: the compiler is kept from comparing earlier.
#[inline(always)]
fn put(values: &mut [u32; SETTABLE_MAX], place: usize, value: u32) {
    let mut at = place;
    // SAFETY: moves a register to itself.
    unsafe { asm!("{at} = {at}", at = inout(reg) at, options(nostack, preserves_flags)) };
    if let Some(element) = values.get_mut(at) {
        *element = value;
    }
}

/// The setting that what the application asked for is held against, and its number.
#[inline(always)]
fn holding(option: &OptionRow, rules: Candidates, missing: u32) -> Option<(u32, &'static Setting)> {
    if missing & entry::LAST == 0 || u32::from(option.traits) & missing != 0 {
        return governing(option, rules, missing);
    }
    let winner = option.cautious_winner(rules)?;
    Some((winner, maps::setting(winner)?))
}

impl<'a, S: Bound> Task<'a, S> {
    #[inline(always)]
    fn new(socket: &'a S, sk: *mut c_void, option: &'static OptionRow) -> Option<Self> {
        // SAFETY: the context's socket, checked for NULL.
        let notes = unsafe { storage::notes(sk) }?;
        Some(Self { socket, sk, option, bit: 1u64 << (option.bit & 63), notes, is_noted: false })
    }

    #[inline(always)]
    fn end(self) {
        if self.is_noted {
            // SAFETY: as in `new`.
            unsafe { storage::put_notes(self.sk, &self.notes) };
        }
    }

    #[inline(always)]
    fn note(&mut self, winner: u32, outcome: u32) {
        self.is_noted |= note(&mut self.notes, self.bit, winner, outcome);
    }

    #[inline(always)]
    fn note_device(&mut self, device: u32, wanted: u32) {
        (self.notes.device, self.notes.device_wanted) = (device, wanted);
        self.is_noted = true;
    }
}

/// Sets an option if a rule says so; tells whether there is more to look at.
#[inline(always)]
fn apply_by_helper(socket: &impl Bound, sk: *mut c_void, index: u32, rules: Candidates, missing: u32) -> bool {
    let Some(option) = maps::option(index) else { return false };
    let Some(mut task) = Task::new(socket, sk, option) else { return false };
    let Some((winner, setting)) = governing(option, rules, missing).filter(|(_, setting)| setting.form == form::SET)
    else {
        return (task.notes.changed | task.notes.requested) & task.bit != 0;
    };
    if missing & entry::CHECK == 0 && is_own(option, setting) && !is_overridden_by_app(&task.notes, task.bit, setting) {
        task.set(setting, winner, missing);
        task.end();
    }
    false
}

/// Gives an option back that no rule sets any more, and holds what the application asked for against a limit or a deny.
#[inline(always)]
fn check_by_helper(socket: &impl Bound, sk: *mut c_void, index: u32, rules: Candidates, missing: u32) {
    let Some(option) = maps::option(index) else { return };
    let Some(mut task) = Task::new(socket, sk, option) else { return };
    if task.notes.changed & task.bit != 0 {
        task.restore_value();
    }
    if task.notes.requested & task.bit != 0
        && let Some((winner, setting)) = holding(option, rules, missing)
    {
        task.enforce_bound(setting, winner);
    }
    task.end();
}

impl<S: Bound> Task<'_, S> {
    #[inline(always)]
    fn is_device(&self) -> bool {
        self.option.traits & traits::DEVICE != 0
    }

    /// The option's place in [`Kept`], which the verifier wants to see within its bounds.
    #[inline(always)]
    fn place(&self) -> Option<usize> {
        Some(usize::from(self.option.bit)).filter(|place| *place < SETTABLE_MAX)
    }

    /// Sets the option, and keeps what it had before if rules may come not to set it any more.
    #[inline(always)]
    fn set(&mut self, setting: &Setting, winner: u32, missing: u32) {
        let is_kept = missing & entry::KEEP != 0 && self.notes.changed & self.bit == 0 && !setting.is_dry_run();
        let mut before = [0; 2];
        let has_before = is_kept && self.read_now(&mut before);
        let priority = if is_kept { self.priority() } else { None };
        let outcome = if self.is_device() {
            self.set_device(setting, winner)
        } else {
            // The kernel may not take it, and the socket may never carry IPv4.
            let is_for_both = self.option.traits & traits::INET != 0 && missing & DUAL_STACK != 0;
            set_option(self.socket, self.option, setting, winner, self.notes.cookie, is_for_both)
        };
        if outcome == outcome::SET && has_before {
            self.save_value(&before, priority);
        }
        if missing & POSTPONED == 0 || !self.is_device() || outcome >= outcome::FAILED {
            self.note(winner, outcome);
        }
    }

    /// Reads what the option has now, as getsockopt shows it; of a device, the interface index. Returns whether that is known.
    ///
    /// Into memory of the caller: of an `Option` the compiler spills the value also where there is none, which the verifier
    /// refuses.
    #[inline(always)]
    fn read_now(&self, now: &mut Words) -> bool {
        if self.is_device() {
            *now = words_of(self.socket.device());
            return true;
        }
        let OptionKey { level, name } = self.option.key;
        if self.option.read_back == read_back::NONE {
            // It shows the segment size of the route where none was set. 0 is what a new socket has.
            return self.option.key == MAXSEG;
        }
        let len = if self.option.kind == kind::TEXT { TEXT_LEN as i32 } else { 4 };
        self.socket.get(level, name, now, len).is_ok()
    }

    /// SO_PRIORITY, if setting this option changes it.
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
        let Some(place) = self.place() else { return };
        // SAFETY: the context's socket, checked for NULL.
        let Some(kept) = (unsafe { storage::saved_values(self.sk, true) }) else {
            count_loss(|losses| &mut losses.no_storage);
            return;
        };
        self.notes.changed |= self.bit;
        self.is_noted = true;
        kept.has_before |= self.bit;
        if let Some(priority) = priority {
            (kept.priority, kept.has_priority) = (priority, 1);
        }
        if self.option.kind == kind::TEXT && !self.is_device() {
            kept.before_text = *before;
        } else if self.option.key == PRIORITY && kept.has_priority != 0 {
            // What it has now is IP_TOS's doing.
            let priority = kept.priority;
            put(&mut kept.before, place, priority);
        } else {
            put(&mut kept.before, place, word_in(before));
        }
    }

    /// Gives the option back what it had before a rule set it.
    #[inline(always)]
    fn restore_value(&mut self) {
        self.notes.changed &= !self.bit;
        self.is_noted = true;
        if self.try_restore_value().is_none_or(|result| result.is_err()) {
            count_loss(|losses| &mut losses.not_restored);
        }
    }

    #[inline(always)]
    fn try_restore_value(&mut self) -> Option<Result<(), i32>> {
        let place = self.place()?;
        // SAFETY: as in `keep`.
        let kept = unsafe { storage::saved_values(self.sk, false) }?;
        kept.has_before &= !self.bit;
        if self.is_device() {
            // Where it has another one, that is not a rule's.
            let is_ours = self.socket.device() == self.notes.device;
            self.note_device(0, 0);
            let before = kept.before[place];
            return Some(if is_ours { self.socket.set_device(before) } else { Ok(()) });
        }
        if self.option.kind == kind::TEXT {
            let before = kept.before_text;
            return Some(self.put(&before));
        }
        let result = self.put_number(kept.before[place]);
        if self.option.key == TOS && kept.has_priority != 0 {
            kept.has_priority = 0;
            let _ = self.socket.set(PRIORITY.level, PRIORITY.name, &words_of(kept.priority), 4);
        }
        Some(result)
    }

    /// Sets a number as getsockopt showed it.
    #[inline(always)]
    fn put_number(&self, shown: u32) -> Result<(), i32> {
        let value = if self.option.read_back == read_back::DOUBLED { shown / 2 } else { shown };
        self.socket.set(self.option.key.level, self.option.key.name, &words_of(value), 4)
    }

    #[inline(always)]
    fn put(&self, text: &Words) -> Result<(), i32> {
        self.socket.set(self.option.key.level, self.option.key.name, text, TEXT_LEN as i32)
    }

    /// Holds what the application asked for, before all was known of the socket, against a limit or a deny.
    #[inline(always)]
    fn enforce_bound(&mut self, setting: &Setting, winner: u32) {
        let Some(judgement) = self.judge(setting) else { return };
        if judgement.verdict == verdict::NONE {
            return;
        }
        self.notes.requested &= !self.bit;
        self.is_noted = true;
        count(winner, |counters| match judgement.verdict {
            verdict::ALLOWED => &mut counters.verdicts[0],
            verdict::CLAMPED => &mut counters.verdicts[2],
            verdict::IGNORED => &mut counters.verdicts[3],
            _ => &mut counters.verdicts[4],
        });
        if setting.is_dry_run() || judgement.verdict == verdict::ALLOWED {
            return;
        }
        let result = if judgement.verdict == verdict::CLAMPED {
            let OptionKey { level, name } = self.option.key;
            Some(self.socket.set(level, name, &judgement.given.words, 4))
        } else {
            self.restore_requested()
        };
        if !matches!(result, Some(Ok(()))) {
            let errno = if let Some(Err(errno)) = result { errno } else { 0 };
            report_failure(self.option, winner, setting, errno, self.notes.cookie);
            self.note(winner, outcome::FAILED + errno as u32);
        }
    }

    #[inline(always)]
    fn judge(&self, setting: &Setting) -> Option<Judgement> {
        let mut asked = Argument::default();
        if setting.form != form::DENY {
            let mut now = [0; 2];
            if !self.read_now(&mut now) {
                return None;
            }
            asked = Argument::read(self.option, 4, &now)?;
            if self.option.read_back == read_back::DOUBLED {
                asked.number /= 2;
            }
        }
        Some(judge(self.option, setting, &asked))
    }

    /// Gives the option back what it had before the application asked for another value.
    #[inline(always)]
    fn restore_requested(&mut self) -> Option<Result<(), i32>> {
        let place = self.place()?;
        // SAFETY: as in `keep`.
        let kept = unsafe { storage::saved_values(self.sk, false) }?;
        kept.has_asked &= !self.bit;
        if self.option.kind == kind::TEXT {
            let before = kept.asked_text;
            return Some(self.put(&before));
        }
        Some(self.put_number(kept.asked[place]))
    }

    /// Binds the socket to a device, unless it is bound to this one already.
    #[inline(always)]
    fn set_device(&mut self, setting: &Setting, winner: u32) -> u32 {
        let (now, wanted) = (self.socket.device(), setting.device());
        if self.notes.device_wanted == wanted && self.notes.device == now {
            // It counts once, also where that was put off.
            return if self.notes.applied & self.bit == 0 { outcome::SET } else { outcome::NONE };
        }
        if self.option.kind != kind::TEXT && now == setting.value {
            self.note_device(now, wanted);
            return outcome::UNCHANGED;
        }
        if !setting.is_dry_run() {
            let result = if self.option.kind == kind::TEXT {
                self.put(&setting.text)
            } else {
                self.socket.set_device(setting.value)
            };
            if let Err(errno) = result {
                report_failure(self.option, winner, setting, errno, self.notes.cookie);
                return outcome::FAILED + errno as u32;
            }
        }
        self.note_device(self.socket.device(), wanted);
        outcome::SET
    }
}

/// Sets an option through the helpers; gives the outcome, of which a failure that was to be expected is none.
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

/// Sets a text unless it is there already. `Err` is the kernel's errno.
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

/// Sets a number unless it is there already. `Err` is the kernel's errno.
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
fn report_failure(option: &OptionRow, winner: u32, setting: &Setting, errno: i32, cookie: u64) {
    emit::outcome(option.key, errno, maps::target().place, |call| {
        let wanted = setting.whole_value();
        *call = Call { flags: flags::DECIDED, setting: winner, wanted, cookie, ..Call::default() };
    });
}
