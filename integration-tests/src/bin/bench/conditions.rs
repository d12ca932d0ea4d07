//! The conditions to compare: sockpolicy, alternative tools, an empty program, and no tool.

use crate::{
    bpf::Hook,
    scene::{Condition, POLICY, SOCKPOLICY},
};

/// The text that `sockpolicy run` logs when its policy is in force.
pub(crate) const IN_FORCE: &str = "in force";

pub(crate) const LIBKEEPALIVE: &str = "/usr/lib/libkeepalive.so";

/// The calls that tracers trace.
const CALLS: &str = "setsockopt,getsockopt";

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// No tool.
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

/// A policy in force without an audit: the agent sees calls only at the cgroup's hooks.
pub(crate) fn policy(rules: &str) -> Condition {
    Condition {
        rules: Some(rules.to_owned()),
        background: words(&format!("{SOCKPOLICY} run --audit-backend none -q -o json {POLICY}")),
        ready: IN_FORCE,
        ..Condition::default()
    }
}

/// A policy in force with the kernel's best audit backend, as `sockpolicy run` does by default.
pub(crate) fn audited(rules: &str) -> Condition {
    Condition {
        background: words(&format!("{SOCKPOLICY} run -q -o json {POLICY}")),
        is_everywhere: true,
        ..policy(rules)
    }
}

/// The audit without a policy in force.
pub(crate) fn audit(rules: &str) -> Condition {
    Condition {
        background: words(&format!("{SOCKPOLICY} audit -o json {POLICY}")),
        is_everywhere: true,
        ..policy(rules)
    }
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
    // bpftrace starts the worker when its probes are attached.
    wrap.extend([script.to_owned(), "-c".to_owned()]);
    Condition { needs: vec!["bpftrace"], wrap, is_one_word: true, is_everywhere: true, ..Condition::default() }
}

/// A library that sets SO_KEEPALIVE on every new socket.
pub(crate) fn libkeepalive() -> Condition {
    Condition {
        needs: vec![LIBKEEPALIVE],
        variables: vec![("LD_PRELOAD".to_owned(), LIBKEEPALIVE.to_owned())],
        ..Condition::default()
    }
}
