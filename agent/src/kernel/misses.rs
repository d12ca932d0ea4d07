//! How often the kernel skipped a program because it, or a similar program, was already running on that CPU.

use aya::Ebpf;

use super::syscall::info;

/// Returns the sum of the misses of the loaded programs with these names. The sum is 0 on kernels that do not count misses:
/// 5.12 is the first that counts those of fentry (`__bpf_prog_enter`), 6.7 is the first that counts those of kprobes and
/// tracepoints (`trace_call_bpf`).
pub(super) fn misses(ebpf: &Ebpf, programs: impl Iterator<Item = &'static str>) -> u64 {
    let mut names: Vec<_> = programs.collect();
    // One program may be attached to several points.
    names.sort_unstable();
    names.dedup();
    let loaded = names.into_iter().filter_map(|name| ebpf.program(name)?.fd().ok());
    loaded.filter_map(|fd| info(fd).ok()).map(|info| info.recursion_misses).sum()
}
