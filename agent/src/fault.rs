//! Steps between which this process may be killed: a test has it killed at each of them.
//!
//! Only debug builds look; to others a point is nothing.

/// A step is done. Kills this process if `SOCKPOLICY_FAULT` names the step and how many times it is to be passed first, as in
/// `enabled:1`.
pub(crate) fn point(step: &'static str) {
    #[cfg(debug_assertions)]
    die_at(step);
    #[cfg(not(debug_assertions))]
    let _ = step;
}

#[cfg(debug_assertions)]
fn die_at(step: &str) {
    use std::sync::atomic::{AtomicU32, Ordering};

    static PASSED: AtomicU32 = AtomicU32::new(0);
    let Ok(wanted) = std::env::var("SOCKPOLICY_FAULT") else { return };
    let Some((name, times)) = wanted.split_once(':') else { return };
    if name == step && Ok(PASSED.fetch_add(1, Ordering::Relaxed)) == times.parse() {
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    }
}
