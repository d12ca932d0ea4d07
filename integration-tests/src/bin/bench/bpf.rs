//! The lower bound of a hook's cost: a BPF program that does nothing, loaded with bpf(2) alone.
//!
//! Any program on the hook costs at least as much. The program is detached when its value is dropped.

use std::{
    fs::{self, File},
    io,
    iter::successors,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use sockpolicy_integration_tests::bpf::{self, LINK_CREATE, bpf, descriptor};

use crate::error::{Attempt, Result};

/// Commands of bpf(2) (include/uapi/linux/bpf.h).
const PROG_GET_NEXT_ID: libc::c_int = 11;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const ENABLE_STATS: libc::c_int = 32;

const PROG_TYPE_TRACEPOINT: u32 = 5;

/// A hook of a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hook {
    pub(crate) name: &'static str,
    program_type: u32,
    attach_type: u32,
}

pub(crate) const SETSOCKOPT: Hook = Hook { name: "cgroup/setsockopt", program_type: 25, attach_type: 22 };
pub(crate) const GETSOCKOPT: Hook = Hook { name: "cgroup/getsockopt", program_type: 25, attach_type: 21 };
pub(crate) const SOCK_CREATE: Hook = Hook { name: "cgroup/sock_create", program_type: 9, attach_type: 2 };
pub(crate) const CONNECT4: Hook = Hook { name: "cgroup/connect4", program_type: 18, attach_type: 10 };
pub(crate) const SENDMSG4: Hook = Hook { name: "cgroup/sendmsg4", program_type: 18, attach_type: 14 };
pub(crate) const SOCK_OPS: Hook = Hook { name: "sock_ops", program_type: 13, attach_type: 3 };

/// An attached program, until this value is dropped.
#[derive(Debug)]
pub(crate) struct EmptyProgram {
    /// The link to a cgroup, or the perf event of a tracepoint.
    _attached: OwnedFd,
    _program: OwnedFd,
}

impl EmptyProgram {
    pub(crate) fn on_cgroup(hook: Hook, cgroup: &Path) -> Result<Self> {
        let what = format!("attach an empty program to {} of {}", hook.name, cgroup.display());
        let attach = || {
            let dir = File::open(cgroup)?;
            let program = load(hook.program_type, hook.attach_type, 1)?;
            let mut attributes = [program.as_raw_fd() as u32, dir.as_raw_fd() as u32, hook.attach_type, 0];
            let link = descriptor(bpf(LINK_CREATE, &mut attributes)?);
            io::Result::Ok(Self { _attached: link, _program: program })
        };
        attach().or_cannot(what)
    }

    /// Attaches an empty program to a tracepoint, such as `syscalls/sys_enter_setsockopt`.
    pub(crate) fn on_tracepoint(name: &str) -> Result<Self> {
        let attach = || {
            let id = fs::read_to_string(format!("/sys/kernel/tracing/events/{name}/id"))?;
            let id = id.trim().parse().map_err(io::Error::other)?;
            let program = load(PROG_TYPE_TRACEPOINT, 0, 0)?;
            let event = tracepoint_event(id, &program)?;
            io::Result::Ok(Self { _attached: event, _program: program })
        };
        attach().or_cannot(format_args!("attach an empty program to tracepoint {name}"))
    }
}

/// Loads `r0 = result; exit`.
fn load(program_type: u32, attach_type: u32, result: u32) -> io::Result<OwnedFd> {
    bpf::load(program_type, attach_type, "empty", &[0xb7 | u64::from(result) << 32, 0x95])
}

fn tracepoint_event(id: u64, program: &OwnedFd) -> io::Result<OwnedFd> {
    const TYPE_TRACEPOINT: u32 = 2;
    /// PERF_ATTR_SIZE_VER5
    const SIZE: usize = 112;
    const IOC_ENABLE: libc::c_ulong = 0x2400;
    const IOC_SET_BPF: libc::c_ulong = 0x4004_2408;
    let mut attributes = [0u64; SIZE / 8];
    attributes[0] = u64::from(TYPE_TRACEPOINT) | (SIZE as u64) << 32;
    attributes[1] = id;
    // SAFETY: the attributes have the size that they state. Any process, on CPU 0: the program runs on every CPU.
    let event = unsafe { libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), -1, 0, -1, 8) };
    if event < 0 {
        return Err(io::Error::last_os_error());
    }
    let event = descriptor(event as i32);
    for (request, argument) in [(IOC_SET_BPF, program.as_raw_fd()), (IOC_ENABLE, 0)] {
        // SAFETY: these requests take a number.
        if unsafe { libc::ioctl(event.as_raw_fd(), request, argument) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(event)
}

/// Makes the kernel measure the run time of each program until this value is dropped; each run then takes some 20 ns
/// longer.
#[derive(Debug)]
pub(crate) struct RunTimes {
    _descriptor: OwnedFd,
}

impl RunTimes {
    pub(crate) fn measure() -> Result<Self> {
        // BPF_STATS_RUN_TIME
        let number = bpf(ENABLE_STATS, &mut [0]).or_cannot("have the kernel time BPF programs")?;
        Ok(Self { _descriptor: descriptor(number) })
    }
}

/// Returns the ids of the programs that are newer than `id`. The kernel does not reuse ids soon (`idr_alloc_cyclic`).
pub(crate) fn ids_after(id: u32) -> Vec<u32> {
    let next = |id: &u32| {
        let mut attributes = [*id, 0, 0];
        bpf(PROG_GET_NEXT_ID, &mut attributes).ok().map(|_| attributes[1])
    };
    successors(next(&id), next).collect()
}

pub(crate) fn programs_after(id: u32) -> usize {
    ids_after(id).len()
}

pub(crate) fn newest_program() -> u32 {
    ids_after(0).last().copied().unwrap_or_default()
}

/// Returns the name of a program, its total run time in nanoseconds, and its number of runs.
pub(crate) fn run_time(id: u32) -> io::Result<(String, u64, u64)> {
    // struct bpf_prog_info, in 32-bit words, up to recursion_misses.
    const WORDS: usize = 54;
    const NAME: usize = 16;
    const RUN_TIME: usize = 48;
    const RUNS: usize = 50;
    #[repr(align(8))]
    struct Info([u32; WORDS]);
    let program = descriptor(bpf(PROG_GET_FD_BY_ID, &mut [id, 0, 0])?);
    let mut info = Info([0; WORDS]);
    let address = (&raw mut info).expose_provenance() as u64;
    let len = size_of::<Info>() as u32;
    bpf(OBJ_GET_INFO_BY_FD, &mut [program.as_raw_fd() as u32, len, address as u32, (address >> 32) as u32])?;
    let words = info.0;
    let long = |at: usize| u64::from(words[at]) | u64::from(words[at + 1]) << 32;
    let name: Vec<u8> = words[NAME..NAME + 4].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let name = String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned();
    Ok((name, long(RUN_TIME), long(RUNS)))
}
