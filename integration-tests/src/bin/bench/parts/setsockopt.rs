//! Application calls: what each of them takes, under policies, tracers and nothing.
//!
//! Budgets are about what is added to a call, in times of what an empty program on the same hook adds: no tool on that hook
//! can be below 1.

use super::call;
use crate::{
    bpf,
    guard::Ground,
    peers,
    row::{Budget, Findings, Kind, Line, Plot, added},
    scene::{Arm, Comparison, Condition, Place, Samples, Scene},
    trouble::Result,
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

pub(crate) fn measure(ground: &Ground, findings: &mut Findings) -> Result<()> {
    let comparison = Comparison { rounds: 9, millis: 60, turns: 5, scenes: scenes() };
    let samples = comparison.run(ground)?;
    findings.add(PART, &samples, &lines());
    findings.plots.push(plot(&samples));
    Ok(())
}

fn set(call: Call, errno: i32) -> Arm {
    Arm { name: "set", place: Place::Inside, work: Work::Set { call, errno } }
}

fn get() -> Arm {
    Arm { name: "get", place: Place::Inside, work: Work::Get { call: ON } }
}

fn scene(name: &str, condition: Condition, arms: Vec<Arm>) -> Scene {
    Scene { name: name.to_owned(), condition, setup: Vec::new(), arms }
}

fn scenes() -> Vec<Scene> {
    let both = || vec![set(ON, 0), get()];
    let outside = || {
        let outside = |arm: Arm, name| Arm { name, place: Place::Outside, ..arm };
        vec![outside(set(ON, 0), "set-outside"), outside(get(), "get-outside")]
    };
    vec![
        scene("none", peers::nothing(), both()),
        scene("empty", peers::empty(&[bpf::SETSOCKOPT]), vec![set(ON, 0)]),
        scene("empty-get", peers::empty(&[bpf::GETSOCKOPT]), vec![get()]),
        scene("not-named", peers::policy(ANOTHER), both()),
        scene("agreeing", peers::policy(THIS), both()),
        scene("rewrite", peers::policy(REWRITE), vec![set(OFF, 0)]),
        scene("ignore", peers::policy(IGNORE), vec![set(OFF, 0)]),
        scene("deny", peers::policy(DENY), vec![set(OFF, libc::EPERM)]),
        scene("allow", peers::policy(ALLOW), vec![set(OFF, 0)]),
        scene("traced", peers::traced(&SET_TRACEPOINTS), vec![set(ON, 0)]),
        scene("audit", peers::audit(THIS), [both(), outside()].concat()),
        scene("audited", peers::audited(THIS), [both(), outside()].concat()),
        scene("audited-other", peers::audited(ANOTHER), both()),
        scene("audited-rewrite", peers::audited(REWRITE), vec![set(OFF, 0)]),
        scene("strace", peers::strace(), both()),
        scene("perf", peers::perf_trace(), both()),
        scene("counting", peers::bpftrace(COUNTING), vec![set(ON, 0)]),
        scene("kprobe", peers::bpftrace(COUNTING_BY_KPROBE), vec![set(ON, 0)]),
        scene("printing", peers::bpftrace(PRINTING), vec![set(ON, 0)]),
    ]
}

/// What an arm adds to a call, in times of what another adds.
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
            "audit beside a policy, inside, agreeing",
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
