//! The kernel as a whole, as uname(2) shows it.

use nix::sys::utsname::uname;

/// Whether the kernel may take the CPU from a task while it runs kernel code, or can be told to.
#[must_use]
pub fn is_preemptible() -> bool {
    // The kernel names the model that it was built with: PREEMPT, PREEMPT_DYNAMIC, PREEMPT_RT; none where it is not
    // preemptible (init/Makefile). This is its own word of it, and not a version: which of its models a dynamic one follows is
    // in debugfs alone, and may change. Where it does not tell, it is taken for a preemptible one.
    uname().map_or(true, |names| names_preemption(&names.version().to_string_lossy()))
}

fn names_preemption(version: &str) -> bool {
    version.split_whitespace().any(|word| word.starts_with("PREEMPT"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_of_preemption_is_found_in_the_version() {
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
