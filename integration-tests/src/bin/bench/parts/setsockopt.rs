//! The cost of application calls, under policies, under tracers, and without any tool.
//!
//! Budgets limit the cost added to a call, as a multiple of what an empty program on the same hook adds. No tool on
//! that hook can be below 1.

use super::call;
use crate::{
    bpf, conditions,
    error::Result,
    guard::Workspace,
    row::{Budget, Findings, Kind, Line, Plot, added},
    scene::{Arm, Comparison, Condition, Placement, Samples, Scene},
    work::{Call, Work},
};

const PART: &str = "setsockopt";

pub(crate) const ON: Call = call(libc::SOL_TCP, libc::TCP_NODELAY, 1);
pub(crate) const OFF: Call = call(libc::SOL_TCP, libc::TCP_NODELAY, 0);

pub(crate) const ANOTHER: &str = "[[rule]]\nset = { TCP_KEEPCNT = 5 }";
pub(crate) const THIS: &str = "[[rule]]\nset = { TCP_NODELAY = true }";
const REWRITE: &str = "[[rule]]\nset = { TCP_NODELAY = true }\non_conflict = \"rewrite\"";
const IGNORE: &str = "[[rule]]\nset = { TCP_NODELAY = true }\non_conflict = \"ignore\"";
const DENY: &str = "[[rule]]\nset = { TCP_NODELAY = true }\non_conflict = \"deny\"";
const ALLOW: &str = "[[rule]]\nset = { TCP_NODELAY = true }\non_conflict = \"allow\"";

const SET_TRACEPOINTS: [&str; 2] = ["syscalls/sys_enter_setsockopt", "syscalls/sys_exit_setsockopt"];

const COUNTING: &str = "tracepoint:syscalls:sys_enter_setsockopt { @[pid, args->level, args->optname] = count(); }";
const COUNTING_BY_KPROBE: &str = "kprobe:__sys_setsockopt { @[pid, arg1, arg2] = count(); }";
const PRINTING: &str = "tracepoint:syscalls:sys_enter_setsockopt \
    { printf(\"%d %d %d\\n\", pid, args->level, args->optname); }";

pub(crate) fn measure(ground: &Workspace, findings: &mut Findings) -> Result<()> {
    let comparison = Comparison { rounds: 9, millis: 60, turns: 5, scenes: scenes() };
    let samples = comparison.run(ground)?;
    findings.add(PART, &samples, &lines());
    findings.plots.push(plot(&samples));
    Ok(())
}

fn set(call: Call, errno: i32) -> Arm {
    Arm { name: "set", placement: Placement::Inside, work: Work::Set { call, errno } }
}

fn get() -> Arm {
    Arm { name: "get", placement: Placement::Inside, work: Work::Get { call: ON } }
}

fn scene(name: &str, condition: Condition, arms: Vec<Arm>) -> Scene {
    Scene { name: name.to_owned(), condition, setup: Vec::new(), arms }
}

fn scenes() -> Vec<Scene> {
    let both = || vec![set(ON, 0), get()];
    let outside = || {
        let outside = |arm: Arm, name| Arm { name, placement: Placement::Outside, ..arm };
        vec![outside(set(ON, 0), "set-outside"), outside(get(), "get-outside")]
    };
    vec![
        scene("none", conditions::nothing(), both()),
        scene("empty", conditions::empty(&[bpf::SETSOCKOPT]), vec![set(ON, 0)]),
        scene("empty-get", conditions::empty(&[bpf::GETSOCKOPT]), vec![get()]),
        scene("not-named", conditions::policy(ANOTHER), both()),
        scene("agreeing", conditions::policy(THIS), both()),
        scene("rewrite", conditions::policy(REWRITE), vec![set(OFF, 0)]),
        scene("ignore", conditions::policy(IGNORE), vec![set(OFF, 0)]),
        scene("deny", conditions::policy(DENY), vec![set(OFF, libc::EPERM)]),
        scene("allow", conditions::policy(ALLOW), vec![set(OFF, 0)]),
        scene("traced", conditions::traced(&SET_TRACEPOINTS), vec![set(ON, 0)]),
        scene("audit", conditions::audit(THIS), [both(), outside()].concat()),
        scene("audited", conditions::audited(THIS), [both(), outside()].concat()),
        scene("audited-other", conditions::audited(ANOTHER), both()),
        scene("audited-rewrite", conditions::audited(REWRITE), vec![set(OFF, 0)]),
        scene("strace", conditions::strace(), both()),
        scene("perf", conditions::perf_trace(), both()),
        scene("counting", conditions::bpftrace(COUNTING), vec![set(ON, 0)]),
        scene("kprobe", conditions::bpftrace(COUNTING_BY_KPROBE), vec![set(ON, 0)]),
        scene("printing", conditions::bpftrace(PRINTING), vec![set(ON, 0)]),
    ]
}

/// Compares what one arm adds to a call with what another adds.
fn line(what: &str, arm: &str, versus: &str, limit: &str) -> Line {
    let none = |arm: &str| if arm.contains("/get") { "none/get" } else { "none/set" };
    Line::new(what, added(arm, none(arm)), versus, added(limit, none(limit)))
}

fn lines() -> Vec<Line> {
    let limit = "empty program on cgroup/setsockopt";
    let limit_get = "empty program on cgroup/getsockopt";
    let tracepoints = "empty programs on both tracepoints";
    vec![
        line("policy, option not named", "not-named/set", limit, "empty/set").budget(Budget::AtMost(1.3)),
        line("policy, option named and agreeing", "agreeing/set", limit, "empty/set").budget(Budget::AtMost(2.0)),
        line("policy, conflict: rewrite", "rewrite/set", limit, "empty/set"),
        line("policy, conflict: ignore", "ignore/set", limit, "empty/set"),
        line("policy, conflict: deny", "deny/set", limit, "empty/set"),
        line("policy, conflict: allow", "allow/set", limit, "empty/set"),
        line("getsockopt, option not named", "not-named/get", limit_get, "empty-get/get"),
        line("getsockopt, option named and agreeing", "agreeing/get", limit_get, "empty-get/get"),
        line("audit alone, caller outside", "audit/set-outside", tracepoints, "traced/set").budget(Budget::AtMost(1.5)),
        line("policy with audit, caller outside", "audited/set-outside", tracepoints, "traced/set")
            .budget(Budget::AtMost(1.5)),
        line("audit alone, caller inside, agreeing", "audit/set", "bpftrace counting", "counting/set")
            .budget(Budget::AtMost(1.0)),
        Line::new(
            "audit next to a policy, inside, agreeing",
            added("audited/set", "agreeing/set"),
            "bpftrace counting",
            added("counting/set", "none/set"),
        )
        .budget(Budget::AtMost(1.0)),
        line("policy with audit, agreeing", "audited/set", "bpftrace counting", "counting/set"),
        line("policy with audit, option not named", "audited-other/set", "bpftrace counting", "counting/set"),
        line("policy with audit, conflict: rewrite", "audited-rewrite/set", "bpftrace counting", "counting/set"),
        line("strace", "strace/set", "audit alone, caller inside, agreeing", "audit/set").budget(Budget::AtLeast(50.0)),
        line("strace", "strace/set", "policy with audit, agreeing", "audited/set"),
        line("bpftrace counting by kprobe", "kprobe/set", "bpftrace counting", "counting/set"),
        line("perf trace to a file", "perf/set", "audit alone, caller inside, agreeing", "audit/set"),
        line("bpftrace printing to a file", "printing/set", "audit alone, caller inside, agreeing", "audit/set"),
        line("getsockopt, strace", "strace/get", "audit alone, caller inside, agreeing", "audit/get"),
    ]
}

fn plot(samples: &Samples) -> Plot {
    let bars = [
        ("no tool", "none/set"),
        ("empty program on cgroup/setsockopt", "empty/set"),
        ("policy, option not named", "not-named/set"),
        ("policy, agreeing", "agreeing/set"),
        ("policy, conflict: rewrite", "rewrite/set"),
        ("empty programs on tracepoints", "traced/set"),
        ("audit, caller outside", "audit/set-outside"),
        ("audit, caller inside", "audit/set"),
        ("policy with audit, agreeing", "audited/set"),
        ("policy with audit, conflict", "audited-rewrite/set"),
        ("bpftrace counting", "counting/set"),
        ("bpftrace printing", "printing/set"),
        ("strace", "strace/set"),
        ("perf trace", "perf/set"),
    ];
    let spread = |arm| samples.of(arm).ok().and_then(crate::measure::Spread::of);
    let bars = bars.into_iter().filter_map(|(name, arm)| Some((name.to_owned(), spread(arm)?))).collect();
    let kind = Kind::Bars { figure: "nanoseconds a call", bars };
    Plot { name: "setsockopt", title: "One setsockopt(TCP_NODELAY), by tool", kind }
}
