//! The preemption model of the kernel, from uname(2).

use nix::sys::utsname::uname;

/// Returns whether the kernel can preempt a task that runs kernel code, now or after a change of its preemption model. Returns
/// `true` if uname(2) fails.
#[must_use]
pub fn is_preemptible() -> bool {
    // The version contains the model that the kernel was built with (init/Makefile): PREEMPT, PREEMPT_DYNAMIC, PREEMPT_RT, or
    // none if the kernel is not preemptible. With PREEMPT_DYNAMIC, the current model is only in debugfs and can change.
    uname().map_or(true, |names| names_preemption(&names.version().to_string_lossy()))
}

fn names_preemption(version: &str) -> bool {
    version.split_whitespace().any(|word| word.starts_with("PREEMPT"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preemption_model_is_found_in_the_version() {
        for (version, expected) in [
            ("#1 SMP PREEMPT_DYNAMIC Debian 6.12.57-1 (2025-11-05)", true),
            ("#1 SMP PREEMPT Tue May 13", true),
            ("#1 SMP PREEMPT_RT Debian", true),
            ("#1 SMP Debian 5.10.46-4 (2021-08-03)", false),
        ] {
            assert_eq!(names_preemption(version), expected, "{version}");
        }
    }
}
