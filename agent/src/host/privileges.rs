//! The capabilities of this process.

use std::fs;

/// The capabilities that sockpolicy needs, by their bits in `/proc/self/status` (include/uapi/linux/capability.h).
const NEEDED: [(u32, &str); 3] = [(12, "CAP_NET_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];

/// Includes CAP_BPF and CAP_PERFMON (capabilities(7)).
const CAP_SYS_ADMIN: u32 = 21;

/// Returns the capabilities that this process lacks to load and attach its programs, or `None` if `/proc` cannot be read.
#[must_use]
pub fn missing_capabilities() -> Option<Vec<&'static str>> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    Some(missing_in(effective(&status)?))
}

fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

fn missing_in(effective: u64) -> Vec<&'static str> {
    let has = |bit: u32| effective & (1 << bit) != 0;
    NEEDED
        .into_iter()
        .filter(|(bit, _)| !has(*bit) && (*bit == 12 || !has(CAP_SYS_ADMIN)))
        .map(|(_, name)| name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_lacks_nothing() {
        assert_eq!(effective("Name:\tx\nCapEff:\t000001ffffffffff\n").map(missing_in), Some(vec![]));
    }

    #[test]
    fn unprivileged_process_lacks_all_three() {
        assert_eq!(missing_in(0), ["CAP_NET_ADMIN", "CAP_PERFMON", "CAP_BPF"]);
    }

    #[test]
    fn sys_admin_includes_the_newer_capabilities() {
        assert_eq!(missing_in(1 << CAP_SYS_ADMIN), ["CAP_NET_ADMIN"]);
    }
}
