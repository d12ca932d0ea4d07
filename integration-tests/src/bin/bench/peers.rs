//! What is compared: sockpolicy, what people would use instead, and the least and the most that there could be.

use crate::{
    bpf::Hook,
    scene::{Condition, POLICY, SOCKPOLICY},
};

/// What `sockpolicy run` logs when its policy is in force.
pub(crate) const IN_FORCE: &str = "in force";

pub(crate) const LIBKEEPALIVE: &str = "/usr/lib/libkeepalive.so";

/// The calls that tracers are asked for.
const CALLS: &str = "setsockopt,getsockopt";

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Nothing at all.
pub(crate) fn nothing() -> Condition {
    Condition::default()
}

/// An empty program on each of these hooks of the cgroup.
pub(crate) fn empty(hooks: &[Hook]) -> Condition {
    Condition { empty: hooks.to_vec(), ..Condition::default() }
}

/// An empty program on each of these tracepoints.
pub(crate) fn traced(tracepoints: &[&'static str]) -> Condition {
    Condition { traced: tracepoints.to_vec(), is_everywhere: true, ..Condition::default() }
}

/// A policy in force, whose agent sees calls only at the cgroup's hooks.
pub(crate) fn policy(rules: &str) -> Condition {
    Condition {
        rules: Some(rules.to_owned()),
        beside: words(&format!("{SOCKPOLICY} run --audit-backend none -q -o json {POLICY}")),
        ready: IN_FORCE,
        ..Condition::default()
    }
}

/// A policy in force, as `sockpolicy run` has it: with the audit that this kernel offers.
pub(crate) fn audited(rules: &str) -> Condition {
    Condition { beside: words(&format!("{SOCKPOLICY} run -q -o json {POLICY}")), is_everywhere: true, ..policy(rules) }
}

/// The audit alone.
pub(crate) fn audit(rules: &str) -> Condition {
    Condition { beside: words(&format!("{SOCKPOLICY} audit -o json {POLICY}")), is_everywhere: true, ..policy(rules) }
}

pub(crate) fn strace() -> Condition {
    Condition {
        needs: vec!["strace"],
        wrap: words(&format!("strace -f -e trace={CALLS} -o /dev/null")),
        ..Condition::default()
    }
}

pub(crate) fn perf_trace() -> Condition {
    Condition {
        needs: vec!["perf"],
        wrap: words(&format!("perf trace -e {CALLS} -o /run/bench/perf.out --")),
        is_everywhere: true,
        ..Condition::default()
    }
}

pub(crate) fn bpftrace(script: &str) -> Condition {
    let mut wrap = words("bpftrace -o /run/bench/bpftrace.out -e");
    // It starts the worker when its probes are attached.
    wrap.extend([script.to_owned(), "-c".to_owned()]);
    Condition { needs: vec!["bpftrace"], wrap, is_one_word: true, is_everywhere: true, ..Condition::default() }
}

/// A library that sets SO_KEEPALIVE on every socket that is made.
pub(crate) fn libkeepalive() -> Condition {
    Condition {
        needs: vec![LIBKEEPALIVE],
        variables: vec![("LD_PRELOAD".to_owned(), LIBKEEPALIVE.to_owned())],
        ..Condition::default()
    }
}
