//! How often the kernel did not run a program because it, or one like it, was already running on that CPU.

use aya::Ebpf;

use super::syscall::info;

/// The sum over the programs of these names that are loaded. A kernel that does not count gives 0: 5.12 is the first that
/// counts for fentry (`__bpf_prog_enter`), 6.7 for kprobes and tracepoints (`trace_call_bpf`).
pub(super) fn misses(ebpf: &Ebpf, programs: impl Iterator<Item = &'static str>) -> u64 {
    let mut names: Vec<_> = programs.collect();
    // One program may be at both ends of both calls.
    names.sort_unstable();
    names.dedup();
    let loaded = names.into_iter().filter_map(|name| ebpf.program(name)?.fd().ok());
    loaded.filter_map(|fd| info(fd).ok()).map(|info| info.recursion_misses).sum()
}
