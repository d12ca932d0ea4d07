//! The least that can be on a hook: a program that does nothing, by bpf(2) alone.
//!
//! What it costs is what any program on that hook costs before it has done anything. It is detached when it is dropped.

use std::{
    fs::{self, File},
    io,
    iter::successors,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use crate::trouble::{Attempt, Result};

/// Commands of bpf(2) (include/uapi/linux/bpf.h).
const PROG_LOAD: libc::c_int = 5;
const PROG_GET_NEXT_ID: libc::c_int = 11;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const LINK_CREATE: libc::c_int = 28;
const ENABLE_STATS: libc::c_int = 32;

const PROG_TYPE_TRACEPOINT: u32 = 5;

/// A hook on a cgroup.
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

/// A program on a hook, until this is dropped.
#[derive(Debug)]
pub(crate) struct Empty {
    /// The link to a cgroup, or the event of a tracepoint.
    _attached: OwnedFd,
    _program: OwnedFd,
}

impl Empty {
    pub(crate) fn on_cgroup(hook: Hook, cgroup: &Path) -> Result<Self> {
        let what = format!("attach an empty program to {} of {}", hook.name, cgroup.display());
        let attach = || {
            let folder = File::open(cgroup)?;
            let program = load(hook.program_type, hook.attach_type, 1)?;
            let mut attributes = [program.as_raw_fd() as u32, folder.as_raw_fd() as u32, hook.attach_type, 0];
            let link = descriptor(bpf(LINK_CREATE, &mut attributes)?);
            io::Result::Ok(Self { _attached: link, _program: program })
        };
        attach().or_cannot(what)
    }

    /// On a tracepoint, as `syscalls/sys_enter_setsockopt`.
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

/// What the kernel calls such a program: `empty`.
const EMPTY: [[u8; 4]; 2] = [*b"empt", *b"y\0\0\0"];

/// `r0 = result; exit`
fn load(program_type: u32, attach_type: u32, result: u32) -> io::Result<OwnedFd> {
    let program = [0xb7 | u64::from(result) << 32, 0x95];
    let halves = |address: usize| [address as u32, (address as u64 >> 32) as u32];
    let [code_low, code_high] = halves(program.as_ptr().expose_provenance());
    let licence = c"GPL";
    let [licence_low, licence_high] = halves(licence.as_ptr().expose_provenance());
    // prog_type, insn_cnt, insns, license, then zeroes up to expected_attach_type
    let mut attributes = [0; 18];
    attributes[..6].copy_from_slice(&[
        program_type,
        program.len() as u32,
        code_low,
        code_high,
        licence_low,
        licence_high,
    ]);
    attributes[12..14].copy_from_slice(&EMPTY.map(u32::from_ne_bytes));
    attributes[17] = attach_type;
    Ok(descriptor(bpf(PROG_LOAD, &mut attributes)?))
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
    // SAFETY: attributes of the size that they say. Any process, on CPU 0: the program runs on each.
    let event = unsafe { libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), -1, 0, -1, 8) };
    if event < 0 {
        return Err(io::Error::last_os_error());
    }
    let event = descriptor(event as i32);
    for (request, argument) in [(IOC_SET_BPF, program.as_raw_fd()), (IOC_ENABLE, 0)] {
        // SAFETY: these take a number.
        if unsafe { libc::ioctl(event.as_raw_fd(), request, argument) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(event)
}

/// While this is there the kernel measures how long each program runs; that costs each run some 20 ns.
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

/// The programs that are newer than this one: numbers are not given out again soon (`idr_alloc_cyclic`).
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

/// The name of a program, for how many nanoseconds it has run, and how often.
pub(crate) fn run_time(id: u32) -> io::Result<(String, u64, u64)> {
    // struct bpf_prog_info, in words of 32 bits: up to recursion_misses.
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

fn descriptor(number: i32) -> OwnedFd {
    // SAFETY: just made, and nobody else's.
    unsafe { OwnedFd::from_raw_fd(number) }
}

fn bpf(command: libc::c_int, attributes: &mut [u32]) -> io::Result<i32> {
    #[repr(C, align(8))]
    struct Aligned([u32; 32]);
    let mut aligned = Aligned([0; 32]);
    aligned.0[..attributes.len()].copy_from_slice(attributes);
    let len = size_of_val(attributes);
    // SAFETY: attributes of the length that is given, which these commands read and, at the most, write.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut aligned, len) };
    attributes.copy_from_slice(&aligned.0[..attributes.len()]);
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(i32::try_from(result).unwrap_or(-1)) }
}
