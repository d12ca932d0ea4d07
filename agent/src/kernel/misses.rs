//! How often the kernel did not run a program because it, or one like it, was already running on that CPU.

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd},
};

use aya::Ebpf;
use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_prog_info};

/// The sum over the programs of these names that are loaded. A kernel that does not count gives 0 (5.12 is the first
/// that does, `bpf_prog_inc_misses_counter`).
pub(super) fn misses(ebpf: &Ebpf, programs: &[&str]) -> u64 {
    let mut names = programs.to_vec();
    // One program may be at both ends of both calls.
    names.sort_unstable();
    names.dedup();
    let loaded = names.into_iter().filter_map(|name| ebpf.program(name)?.fd().ok());
    loaded.filter_map(|fd| info(fd).ok()).map(|info| info.recursion_misses).sum()
}

/// What the kernel says of a program (BPF_OBJ_GET_INFO_BY_FD). aya asks for the same and does not pass this on.
fn info(program: &impl AsFd) -> io::Result<bpf_prog_info> {
    // SAFETY: zero is valid for each field of the one and each form of the other.
    let (mut info, mut attributes): (bpf_prog_info, bpf_attr) = unsafe { (mem::zeroed(), mem::zeroed()) };
    attributes.info.bpf_fd = program.as_fd().as_raw_fd() as u32;
    attributes.info.info_len = size_of_val(&info) as u32;
    attributes.info.info = (&raw mut info) as u64;
    // SAFETY: the kernel reads the attributes, and writes to `info` no more than its length.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &raw mut attributes, size_of_val(&attributes))
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(info) }
}
