//! Somebody else's BPF program on a cgroup, by bpf(2) alone.
//!
//! It makes setsockopt of one option fail with EPERM, so whether it works is seen from outside.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

use crate::{
    bpf::{self, LINK_CREATE, bpf, descriptor},
    cgroup::Cgroup,
    must,
    options::SocketOption,
};

/// Commands of bpf(2) (include/uapi/linux/bpf.h).
const PROG_ATTACH: libc::c_int = 8;
const PROG_DETACH: libc::c_int = 9;
const PROG_QUERY: libc::c_int = 16;

const PROG_TYPE_CGROUP_SOCKOPT: u32 = 25;
const CGROUP_SETSOCKOPT: u32 = 22;
/// As many kinds of attaching to cgroups as any kernel here has; others are refused, which is fine.
const ATTACH_TYPES: std::ops::Range<u32> = 0..64;

/// What it is called. The kernel keeps 15 characters.
pub const NAME: &str = "refuse_option";

/// How it is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    Link,
    /// BPF_F_ALLOW_MULTI: the way before there were links.
    Multi,
    /// No flag: nothing else may be attached, there or below.
    Exclusive,
}

/// The program, until this is dropped.
#[derive(Debug)]
pub struct Foreign {
    program: OwnedFd,
    folder: File,
    link: Option<OwnedFd>,
}

impl Foreign {
    /// Makes `option` fail on `cgroup`.
    #[must_use]
    #[track_caller]
    pub fn attach(cgroup: &Cgroup, option: SocketOption, manner: Manner) -> Self {
        let program = must(load(option), "load a program of our own");
        let folder = must(File::open(cgroup.path()), "open a cgroup");
        let (program_fd, folder_fd) = (program.as_raw_fd() as u32, folder.as_raw_fd() as u32);
        let link = match manner {
            Manner::Link => {
                let link = must(bpf(LINK_CREATE, &mut [program_fd, folder_fd, CGROUP_SETSOCKOPT, 0]), "make a link");
                Some(descriptor(link))
            }
            Manner::Multi | Manner::Exclusive => {
                let flags = if manner == Manner::Multi { 2 } else { 0 };
                let mut attributes = [folder_fd, program_fd, CGROUP_SETSOCKOPT, flags, 0];
                must(bpf(PROG_ATTACH, &mut attributes), "attach a program");
                None
            }
        };
        Self { program, folder, link }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if self.link.is_none() {
            let mut attributes = [self.folder.as_raw_fd() as u32, self.program.as_raw_fd() as u32, CGROUP_SETSOCKOPT];
            let _ = bpf(PROG_DETACH, &mut attributes);
        }
    }
}

/// How many programs are attached to a cgroup itself, of all kinds.
#[must_use]
#[track_caller]
pub fn attached(cgroup: &Cgroup) -> u32 {
    let folder = must(File::open(cgroup.path()), "open a cgroup");
    let count = |attach_type| {
        // target_fd, attach_type, query_flags, attach_flags, prog_ids (64 bits), prog_cnt
        let mut attributes = [folder.as_raw_fd() as u32, attach_type, 0, 0, 0, 0, 0, 0];
        if bpf(PROG_QUERY, &mut attributes).is_ok() { attributes[6] } else { 0 }
    };
    ATTACH_TYPES.map(count).sum()
}

fn load(option: SocketOption) -> io::Result<OwnedFd> {
    const OPTNAME: i16 = 28; // of struct bpf_sockopt
    let instruction = |code: u8, registers: u8, offset: i16, value: i32| {
        let [low, high] = offset.to_le_bytes();
        let [a, b, c, d] = value.to_le_bytes();
        u64::from_le_bytes([code, registers, low, high, a, b, c, d])
    };
    let program = [
        instruction(0x61, 0x12, OPTNAME, 0),       // r2 = *(u32 *)(r1 + 28)
        instruction(0xb7, 0x00, 0, 1),             // r0 = 1
        instruction(0x55, 0x02, 1, option.number), // if r2 != number goto +1
        instruction(0xb7, 0x00, 0, 0),             // r0 = 0
        instruction(0x95, 0x00, 0, 0),             // exit
    ];
    let load = || bpf::load(PROG_TYPE_CGROUP_SOCKOPT, CGROUP_SETSOCKOPT, NAME, &program);
    match load() {
        // Before 5.11 it is charged to what a process may lock.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
            setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)?;
            let program = load();
            setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard)?;
            program
        }
        program => program,
    }
}
