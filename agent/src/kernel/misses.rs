//! How often the kernel skipped a program because it, or a similar program, was already running on that CPU.

use aya::Ebpf;

use super::syscall::info;

/// Returns the sum of the misses of the loaded programs with these names. Kernels count the misses of fentry from 5.12 on
/// (`__bpf_prog_enter`), and those of kprobes and tracepoints from 6.7 on (`trace_call_bpf`). The sum is 0 on older kernels.
pub(super) fn misses(ebpf: &Ebpf, programs: impl Iterator<Item = &'static str>) -> u64 {
    let mut names: Vec<_> = programs.collect();
    // One program may be attached to several points.
    names.sort_unstable();
    names.dedup();
    let loaded = names.into_iter().filter_map(|name| ebpf.program(name)?.fd().ok());
    loaded.filter_map(|fd| info(fd).ok()).map(|info| info.recursion_misses).sum()
}
