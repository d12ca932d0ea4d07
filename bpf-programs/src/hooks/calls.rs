//! cgroup/setsockopt and cgroup/getsockopt: the application's own calls.
//!
//! These hooks see the socket and so decide; the audit ([`super::audit`]) sees the task and the
//! result. A decision is left in the audit's record of the call, and only where there is none (the
//! audit is off, or the call came by io_uring) is it reported from here.

use abi::{
    event::{Call, call, flags, source},
    judge::{Asked, Judgement, judge, verdict},
    mode,
    select::select,
    setting::{Governed, OptionKey, Setting, TEXT_LEN, Value, form, kind, on_conflict, read_back},
    socket::{Facts, State},
};
use aya_ebpf::{
    Global,
    helpers::generated::{bpf_get_current_task, bpf_set_retval},
    macros::cgroup_sockopt,
    programs::SockoptContext,
};

use crate::{
    ctx::{OptionCall, Socket as _},
    emit::{self, Head, Task},
    maps::{self, PrefixMap, count},
    storage,
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

#[cgroup_sockopt(setsockopt)]
pub(crate) fn set_judge(ctx: SockoptContext) -> i32 {
    let call = OptionCall::new(ctx.sockopt);
    let Some(decision) = decide(&call) else {
        call.pass();
        return GO_ON;
    };
    enact(&call, &decision)
}

/// A call that a setting governs, and what is to become of it.
struct Decision<'a> {
    setting: &'a Setting,
    judgement: Judgement,
    /// False in dry-run.
    enforce: bool,
}

/// Decides a call. `None` where it goes on as it is: nothing governs it, or it agrees.
#[inline(always)]
fn decide(call: &OptionCall) -> Option<Decision<'static>> {
    let config = maps::config()?;
    let mut governed = govern(call)?;
    let Governed { kind, traits, .. } = *governed.option;
    let asked = Asked::read(kind, traits, call.len(), &call.argument())?;
    let judgement = judge(kind, governed.setting, &asked);
    let lets_application_win = governed.setting.form == form::SET && governed.setting.on_conflict == on_conflict::ALLOW;
    if lets_application_win && let Some(state) = &mut governed.state {
        let bit = 1u64 << (governed.index & 63);
        if judgement.verdict == verdict::NONE {
            state.yielded &= !bit;
        } else {
            state.yielded |= bit;
        }
    }
    if judgement.verdict == verdict::NONE {
        count(governed.winner, |counters| &mut counters.agreed);
        return None;
    }
    let verdict = judgement.verdict;
    count(governed.winner, |counters| match verdict {
        verdict::ALLOWED => &mut counters.verdicts[0],
        verdict::REWRITTEN => &mut counters.verdicts[1],
        verdict::CLAMPED => &mut counters.verdicts[2],
        verdict::IGNORED => &mut counters.verdicts[3],
        _ => &mut counters.verdicts[4],
    });
    report(call, &governed, &asked, &judgement);
    Some(Decision { setting: governed.setting, judgement, enforce: config.mode == mode::ENFORCE })
}

/// Does what was decided.
#[inline(always)]
fn enact(call: &OptionCall, decision: &Decision<'_>) -> i32 {
    if !decision.enforce {
        call.pass();
        return GO_ON;
    }
    match decision.judgement.verdict {
        verdict::REWRITTEN | verdict::CLAMPED => {
            let given = &decision.judgement.given;
            if !call.replace(given.words, given.len) {
                call.pass();
            }
            GO_ON
        }
        verdict::IGNORED => {
            call.skip();
            GO_ON
        }
        verdict::DENIED => {
            call.pass();
            if CAN_SET_RETVAL.load() != 0 {
                // SAFETY: takes a number.
                unsafe { bpf_set_retval(-i32::from(decision.setting.errno)) };
            }
            FAIL
        }
        _ => {
            call.pass();
            GO_ON
        }
    }
}

/// The setting that governs a call, and the socket.
struct GovernedCall {
    option: &'static Governed,
    /// Of `option`.
    index: u32,
    setting: &'static Setting,
    /// Index of `setting`.
    winner: u32,
    facts: Facts,
    state: Option<&'static mut State>,
}

#[inline(always)]
fn govern(call: &OptionCall) -> Option<GovernedCall> {
    let index = maps::option_index(OptionKey { level: call.level(), name: call.name() })?;
    let option = maps::option(index)?;
    let mut facts = call.facts()?;
    // SAFETY: the context's socket, which is never NULL.
    let state = unsafe { storage::state(call.sk()) };
    if facts.direction == 0
        && let Some(state) = &state
    {
        facts.direction = state.direction as u8;
    }
    let rules = select(&facts, maps::selectors()?, &PrefixMap);
    let winner = option.winner(rules)?;
    Some(GovernedCall { option, index, setting: maps::setting(winner)?, winner, facts, state })
}

/// Leaves the decision for the audit to report, or reports it.
#[inline(always)]
fn report(ctx: &OptionCall, governed: &GovernedCall, asked: &Asked, judgement: &Judgement) {
    // SAFETY: has no arguments.
    let task = unsafe { bpf_get_current_task() };
    if let Some(record) = maps::call(task) {
        note(record, ctx, governed, asked, judgement);
        return;
    }
    let head = Head { key: governed.option.key, call: call::SETSOCKOPT, source: source::HOOK, result: 0 };
    emit::conflict(head, governed.winner, judgement.verdict.into(), caller(), |record| {
        record.fd = -1;
        record.asked = Value::new(ctx.argument(), ctx.len() as u32);
        note(record, ctx, governed, asked, judgement);
    });
}

/// The task that makes the call, where this kernel tells.
#[inline(always)]
fn caller() -> Task {
    if CAN_SEE_TASK.load() != 0 { Task::current() } else { Task::UNKNOWN }
}

#[inline(always)]
fn note(record: &mut Call, ctx: &OptionCall, governed: &GovernedCall, asked: &Asked, judgement: &Judgement) {
    record.flags |= flags::SOCKET | flags::DECIDED;
    record.setting = governed.winner;
    record.verdict = judgement.verdict.into();
    record.given = judgement.given;
    record.wanted = Value::wanted(governed.option.kind, governed.setting, asked);
    record.facts = governed.facts;
    record.cookie = governed.state.as_ref().map_or(0, |state| state.cookie);
    if let Some(before) = read_before(ctx, governed) {
        record.before = before;
        record.flags |= flags::BEFORE;
    }
}

/// The option's value before the call, where this kernel lets us read it.
#[inline(always)]
fn read_before(ctx: &OptionCall, governed: &GovernedCall) -> Option<Value> {
    let option = governed.option;
    if CAN_GET.load() == 0 || option.read_back == read_back::NONE {
        return None;
    }
    let mut words = [0; 2];
    if option.kind == kind::TEXT {
        ctx.get(option.key.level, option.key.name, &mut words, TEXT_LEN as i32).ok()?;
        return Some(Value::text(words));
    }
    ctx.get(option.key.level, option.key.name, &mut words, 4).ok()?;
    Some(Value::new(words, 4))
}

/// Reports a read that shows another value than the policy wants. Never changes what is read.
#[cgroup_sockopt(getsockopt)]
pub(crate) fn get_compare(ctx: SockoptContext) -> i32 {
    let call = OptionCall::new(ctx.sockopt);
    if call.retval() == 0 {
        compare(&call);
    }
    call.pass();
    GO_ON
}

#[inline(always)]
fn compare(ctx: &OptionCall) -> Option<()> {
    maps::config()?;
    let governed = govern(ctx)?;
    let option = governed.option;
    if governed.setting.form != form::SET || option.read_back == read_back::NONE {
        return None;
    }
    let shown = Value::new(ctx.argument(), ctx.len() as u32);
    let asked = Asked::read(option.kind, option.traits, ctx.len(), &shown.words)?;
    let expected = match option.read_back {
        read_back::DOUBLED => Asked { number: asked.number / 2, ..asked },
        _ => asked,
    };
    if judge(option.kind, governed.setting, &expected).verdict == verdict::NONE {
        return None;
    }
    count(governed.winner, |counters| &mut counters.reads);
    let fill = |record: &mut Call| {
        record.flags |= flags::SOCKET | flags::DECIDED;
        record.setting = governed.winner;
        record.verdict = verdict::ALLOWED.into();
        record.asked = shown;
        record.wanted = Value::wanted(option.kind, governed.setting, &expected);
        record.facts = governed.facts;
        record.cookie = governed.state.as_ref().map_or(0, |state| state.cookie);
    };
    // SAFETY: has no arguments.
    let task = unsafe { bpf_get_current_task() };
    if let Some(record) = maps::call(task) {
        fill(record);
        return Some(());
    }
    let head = Head { key: option.key, call: call::GETSOCKOPT, source: source::HOOK, result: 0 };
    emit::conflict(head, governed.winner, verdict::ALLOWED.into(), caller(), |record| {
        record.fd = -1;
        fill(record);
    });
    Some(())
}
