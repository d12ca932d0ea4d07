//! Several instances on nested targets: the deepest target decides an option, whichever instance has it.

use sockpolicy_integration_tests::{
    agent::{self, Run},
    cgroup::Cgroup,
    options::{SO_MARK, SO_PRIORITY, TCP_KEEPCNT, TCP_NODELAY},
    policy::PolicyFile,
    probe::Probe,
    script::{Family, Kind},
    wait,
};

use crate::stderr;

const OUTER: &str =
    "[[rule]]\nset = { SO_MARK = 1, SO_PRIORITY = 1, TCP_KEEPCNT = 3 }\nlimit = { TCP_MAXSEG = { max = 1000 } }\n";
const INNER: &str =
    "[[rule]]\nset = { SO_MARK = 2, TCP_KEEPCNT = { value = 4, on_conflict = \"deny\" } }\ndeny = [\"TCP_MAXSEG\"]\n";

fn on(target: &Cgroup, rules: &str) -> PolicyFile {
    PolicyFile::new(format!("[target]\ncgroup = {:?}\n{rules}", target.name()))
}

/// Returns SO_MARK, SO_PRIORITY and TCP_KEEPCNT of each socket of a new connection, from its owner's getsockopt.
fn values(cgroup: &Cgroup) -> Vec<[i32; 3]> {
    let mut probe = Probe::start(cgroup);
    let pair = probe.pair(Family::Inet, Kind::Tcp);
    let sockets = [pair.listener, pair.client, pair.server];
    sockets.map(|fd| [SO_MARK, SO_PRIORITY, TCP_KEEPCNT].map(|option| probe.int(fd, option))).to_vec()
}

const DECIDED_INSIDE: [[i32; 3]; 3] = [[2, 1, 4]; 3];
const DECIDED_OUTSIDE: [[i32; 3]; 3] = [[1, 1, 3]; 3];

#[test]
fn inner_instance_decides_whichever_started_first() {
    let outer = Cgroup::new();
    let inner = outer.child("inner");
    let below = inner.child("below");
    let (outer_policy, inner_policy) = (on(&outer, OUTER), on(&inner, INNER));
    for inner_first in [true, false] {
        let start = |is_inner: bool| Run::start_with(if is_inner { &inner_policy } else { &outer_policy }, &[]);
        let first = start(inner_first);
        let second = start(!inner_first);
        let (inner_run, outer_run) = if inner_first { (first, second) } else { (second, first) };
        for cgroup in [&inner, &below] {
            // The outer agent learns of an inner one that starts later from its record.
            let is_decided = wait::until(wait::TIMEOUT, || values(cgroup) == DECIDED_INSIDE);
            assert!(is_decided, "inner first: {inner_first}, {:?}", values(cgroup));
        }
        assert_eq!(values(&outer), DECIDED_OUTSIDE);
        let mut probe = Probe::start(&inner);
        let socket = probe.open(Family::Inet, Kind::Tcp);
        assert!(probe.set(socket, TCP_KEEPCNT, 9).is_err(), "denied by the inner policy");
        probe.set(socket, SO_PRIORITY, 5).unwrap();
        probe.set(socket, TCP_NODELAY, 1).unwrap();
        assert_eq!([SO_PRIORITY, TCP_NODELAY].map(|option| probe.int(socket, option)), [1, 1]);
        drop(probe);
        let (inner_report, outer_stderr) = (inner_run.finish(), outer_run.stderr());
        assert_eq!(inner_report.summary.targets, [inner.name()]);
        assert_eq!(inner_report.conflict("TCP_KEEPCNT").verdict.as_deref(), Some("denied"));
        // After the inner instance has ended, the outer one decides everything.
        let is_decided = wait::until(wait::TIMEOUT, || values(&inner) == DECIDED_OUTSIDE);
        assert!(is_decided, "{:?}, {outer_stderr}", values(&inner));
        let report = outer_run.finish();
        assert_eq!(report.summary.targets, [outer.name()]);
        assert_eq!(report.summary.policies, ["policy"]);
        let conflicts: Vec<_> = report.events.iter().map(|event| event.option.as_str()).collect();
        assert_eq!(conflicts, ["SO_PRIORITY"]);
    }
}

#[test]
fn instances_without_agents_keep_the_order_of_their_targets() {
    let outer = Cgroup::new();
    let inner = outer.child("inner");
    let (outer_policy, inner_policy) = (on(&outer, OUTER), on(&inner, INNER));
    let name = |which: &str| format!("{}-{which}", outer.name().trim_matches('/'));
    let attach = |which: &str, policy: &PolicyFile| {
        let output = agent::output(&["attach", "--instance", &name(which), &policy.path().display().to_string()]);
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output)
    };
    attach("in", &inner_policy);
    attach("out", &outer_policy);
    assert_eq!((values(&inner), values(&outer)), (DECIDED_INSIDE.to_vec(), DECIDED_OUTSIDE.to_vec()));
    // Without an agent, the outer instance cannot follow the inner one, and the inner one says so.
    assert!(agent::output(&["detach", "--instance", &name("in")]).status.success());
    let warned = attach("in", &inner_policy);
    assert!(!warned.contains("overrides"), "the outer instance has a boundary there: {warned}");
    assert!(agent::output(&["detach", "--instance", &name("in")]).status.success());
    attach("out", &outer_policy);
    assert_eq!(values(&inner), DECIDED_OUTSIDE);
    let warned = attach("in", &inner_policy);
    assert!(warned.contains("overrides") && warned.contains(&outer.name()), "{warned}");
    // Attaching the outer one again makes it follow.
    attach("out", &outer_policy);
    assert_eq!(values(&inner), DECIDED_INSIDE);
    for which in ["in", "out"] {
        assert!(agent::output(&["detach", "--instance", &name(which)]).status.success());
    }
}

#[test]
fn dry_run_of_an_inner_instance_decides_nothing() {
    let outer = Cgroup::new();
    let inner = outer.child("inner");
    let (outer_policy, inner_policy) = (on(&outer, OUTER), on(&inner, INNER));
    let inner_run = Run::start_with(&inner_policy, &["--dry-run"]);
    let outer_run = Run::start_with(&outer_policy, &[]);
    assert_eq!(values(&inner), DECIDED_OUTSIDE);
    inner_run.finish();
    outer_run.finish();
}

/// Each replacement of policies takes a slot of the tables, and sockets that are being set up are decided anew.
#[test]
fn instance_elsewhere_does_not_replace_the_policies() {
    let (top, elsewhere) = (Cgroup::new(), Cgroup::new());
    let policy = PolicyFile::new(format!("[target]\ncgroup = \"{}/*\"\n{OUTER}", top.name()));
    let name = format!("{}-alone", top.name().trim_matches('/'));
    let run = Run::start_with(&policy, &["--instance", &name]);
    let first = top.child("first");
    run.notice("targets", 1);
    let generation = || {
        let status = agent::output(&["status", "-o", "json", "--instance", &name]);
        serde_json::from_slice::<serde_json::Value>(&status.stdout).unwrap()["generation"].clone()
    };
    let before = generation();
    Run::start_with(&on(&elsewhere, INNER), &[]).finish();
    // The agent looks at its targets again.
    let _second = top.child("second");
    run.notice("targets", 2);
    assert_eq!(generation(), before);
    let inner = first.child("inner");
    let inner_policy = on(&inner, INNER);
    let inner_run = Run::start_with(&inner_policy, &[]);
    assert!(wait::until(wait::TIMEOUT, || generation() != before), "an instance below a target does");
    inner_run.finish();
    run.finish();
}
