//! Fault points: steps at which tests kill or stop this process.
//!
//! Only debug builds check them. In other builds, a fault point does nothing.

/// The environment variable that names a step.
pub(crate) const VARIABLE: &str = "SOCKPOLICY_FAULT";

/// Marks a step. `SOCKPOLICY_FAULT` names the step and how many times it must be passed first: `enabled:1` kills this
/// process, and `enabled:1:stop` stops it until SIGCONT.
pub(crate) fn point(step: &'static str) {
    #[cfg(debug_assertions)]
    trigger(step);
    #[cfg(not(debug_assertions))]
    let _ = step;
}

/// Marks a step for one of many objects, which `SOCKPOLICY_FAULT` then names too: `namespace-opened=4026531840:0`.
pub(crate) fn point_for(step: &'static str, which: u64) {
    #[cfg(debug_assertions)]
    trigger(&format!("{step}={which}"));
    #[cfg(not(debug_assertions))]
    let _ = (step, which);
}

#[cfg(debug_assertions)]
fn trigger(step: &str) {
    use std::sync::atomic::{AtomicU32, Ordering};

    use nix::sys::signal::{Signal, raise};

    static PASSED: AtomicU32 = AtomicU32::new(0);
    let Ok(wanted) = std::env::var(VARIABLE) else { return };
    let mut words = wanted.split(':');
    let (Some(name), Some(times)) = (words.next(), words.next()) else { return };
    if name == step && Ok(PASSED.fetch_add(1, Ordering::Relaxed)) == times.parse() {
        let _ = raise(if words.next() == Some("stop") { Signal::SIGSTOP } else { Signal::SIGKILL });
    }
}
