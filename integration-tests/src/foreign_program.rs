//! A BPF program of another owner on a cgroup, made with bpf(2) alone.
//!
//! The program makes setsockopt of one option, or all calls of a hook, fail with EPERM. Its effect is therefore
//! visible to a process.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
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
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const PROG_QUERY: libc::c_int = 16;

const PROG_TYPE_CGROUP_SOCK: u32 = 9;
const PROG_TYPE_SOCK_OPS: u32 = 13;
const PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
const PROG_TYPE_CGROUP_SOCKOPT: u32 = 25;
const CGROUP_SETSOCKOPT: u32 = 22;
/// At least the attach types of every tested kernel. The kernel rejects the others, which is harmless.
const ATTACH_TYPES: std::ops::Range<u32> = 0..64;

/// The name of the program. The kernel keeps 15 characters.
pub const NAME: &str = "refuse_option";

/// How the program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    Link,
    /// BPF_F_ALLOW_MULTI, which predates links.
    Multi,
    /// BPF_F_ALLOW_OVERRIDE: a program on a descendant cgroup replaces this one there.
    Override,
    /// No flag: no other program can be attached to this cgroup or its descendants.
    Exclusive,
}

/// A hook that sockpolicy also uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    SockCreate,
    Bind4,
    Bind6,
    Connect4,
    Connect6,
    Sendmsg4,
    Sendmsg6,
    SockOps,
    Setsockopt,
    Getsockopt,
}

impl Hook {
    pub const ALL: [Self; 10] = [
        Self::SockCreate,
        Self::Bind4,
        Self::Bind6,
        Self::Connect4,
        Self::Connect6,
        Self::Sendmsg4,
        Self::Sendmsg6,
        Self::SockOps,
        Self::Setsockopt,
        Self::Getsockopt,
    ];

    /// Returns the program type and the attach type (include/uapi/linux/bpf.h).
    fn types(self) -> (u32, u32) {
        match self {
            Self::SockCreate => (PROG_TYPE_CGROUP_SOCK, 2),
            Self::Bind4 => (PROG_TYPE_CGROUP_SOCK_ADDR, 8),
            Self::Bind6 => (PROG_TYPE_CGROUP_SOCK_ADDR, 9),
            Self::Connect4 => (PROG_TYPE_CGROUP_SOCK_ADDR, 10),
            Self::Connect6 => (PROG_TYPE_CGROUP_SOCK_ADDR, 11),
            Self::Sendmsg4 => (PROG_TYPE_CGROUP_SOCK_ADDR, 14),
            Self::Sendmsg6 => (PROG_TYPE_CGROUP_SOCK_ADDR, 15),
            Self::SockOps => (PROG_TYPE_SOCK_OPS, 3),
            Self::Getsockopt => (PROG_TYPE_CGROUP_SOCKOPT, 21),
            Self::Setsockopt => (PROG_TYPE_CGROUP_SOCKOPT, CGROUP_SETSOCKOPT),
        }
    }
}

/// An attached program, which is detached when this value is dropped.
#[derive(Debug)]
pub struct ForeignProgram {
    program: OwnedFd,
    dir: File,
    attach_type: u32,
    link: Option<OwnedFd>,
}

impl ForeignProgram {
    /// Attaches a program that makes setsockopt of `option` fail on `cgroup`.
    #[must_use]
    #[track_caller]
    pub fn attach(cgroup: &Cgroup, option: SocketOption, mode: AttachMode) -> Self {
        must(Self::try_attach(cgroup, option, mode), "attach a foreign program")
    }

    /// Attaches a program that makes setsockopt of `option` fail on `cgroup`.
    ///
    /// # Errors
    ///
    /// The error of the kernel: EPERM if the attached programs forbid it.
    #[track_caller]
    pub fn try_attach(cgroup: &Cgroup, option: SocketOption, mode: AttachMode) -> io::Result<Self> {
        let program = must(load(option), "load a foreign program");
        Self::hold(cgroup, program, CGROUP_SETSOCKOPT, mode)
    }

    /// Attaches a program that makes all calls of a hook fail on `cgroup`; at `sock_ops`, nothing fails.
    #[must_use]
    #[track_caller]
    pub fn refuse_all(cgroup: &Cgroup, at: Hook, mode: AttachMode) -> Self {
        let (program_type, attach_type) = at.types();
        let result = i32::from(at == Hook::SockOps);
        let program = [instruction(0xb7, 0x00, 0, result), instruction(0x95, 0x00, 0, 0)]; // r0 = result; exit
        let program = must(loaded(program_type, attach_type, &program), "load a foreign program");
        must(Self::hold(cgroup, program, attach_type, mode), "attach a foreign program")
    }

    fn hold(cgroup: &Cgroup, program: OwnedFd, attach_type: u32, mode: AttachMode) -> io::Result<Self> {
        let dir = must(File::open(cgroup.path()), "open a cgroup");
        let (program_fd, dir_fd) = (program.as_raw_fd() as u32, dir.as_raw_fd() as u32);
        let attach = |flags| bpf(PROG_ATTACH, &mut [dir_fd, program_fd, attach_type, flags, 0]).map(|_| None);
        let link = match mode {
            AttachMode::Link => Some(descriptor(bpf(LINK_CREATE, &mut [program_fd, dir_fd, attach_type, 0])?)),
            AttachMode::Exclusive => attach(0)?,
            AttachMode::Override => attach(1)?,
            AttachMode::Multi => attach(2)?,
        };
        Ok(Self { program, dir, attach_type, link })
    }

    /// Returns whether the program is in effect on a cgroup, from the kernel's list of effective programs.
    #[must_use]
    #[track_caller]
    pub fn is_effective(&self, cgroup: &Cgroup) -> bool {
        const QUERY_EFFECTIVE: u32 = 1;
        let dir = must(File::open(cgroup.path()), "open a cgroup");
        let mut info = [0u32; 64];
        let [low, high] = halves(info.as_mut_ptr().expose_provenance());
        // bpf_fd, info_len, info; the second word of the result is the id
        let mut attributes = [self.program.as_raw_fd() as u32, size_of_val(&info) as u32, low, high];
        must(bpf(OBJ_GET_INFO_BY_FD, &mut attributes), "get the id of a program");
        let mut ids = [0u32; 256];
        let [low, high] = halves(ids.as_mut_ptr().expose_provenance());
        let mut attributes =
            [dir.as_raw_fd() as u32, self.attach_type, QUERY_EFFECTIVE, 0, low, high, ids.len() as u32, 0];
        must(bpf(PROG_QUERY, &mut attributes), "query the programs of a cgroup");
        ids[..attributes[6] as usize].contains(&info[1])
    }
}

impl Drop for ForeignProgram {
    fn drop(&mut self) {
        if self.link.is_none() {
            let mut attributes = [self.dir.as_raw_fd() as u32, self.program.as_raw_fd() as u32, self.attach_type];
            let _ = bpf(PROG_DETACH, &mut attributes);
        }
    }
}

/// Returns the number of programs that are attached to a cgroup itself, of all attach types.
#[must_use]
#[track_caller]
pub fn count_attached(cgroup: &Cgroup) -> u32 {
    count_attached_fd(&must(File::open(cgroup.path()), "open a cgroup"))
}

/// Like [`count_attached`], for an open cgroup.
#[must_use]
pub fn count_attached_fd(dir: &File) -> u32 {
    ATTACH_TYPES.map(|attach_type| count(dir, attach_type)).sum()
}

/// Returns the number of programs that are attached to a hook of the cgroup at this path itself.
#[must_use]
#[track_caller]
pub fn count_attached_to_hook(cgroup: &Path, at: Hook) -> u32 {
    let (_, attach_type) = at.types();
    count(&must(File::open(cgroup), "open a cgroup"), attach_type)
}

fn count(dir: &File, attach_type: u32) -> u32 {
    // target_fd, attach_type, query_flags, attach_flags, prog_ids (64 bits), prog_cnt
    let mut attributes = [dir.as_raw_fd() as u32, attach_type, 0, 0, 0, 0, 0, 0];
    if bpf(PROG_QUERY, &mut attributes).is_ok() { attributes[6] } else { 0 }
}

fn load(option: SocketOption) -> io::Result<OwnedFd> {
    const OPTNAME: i16 = 28; // of struct bpf_sockopt
    let program = [
        instruction(0x61, 0x12, OPTNAME, 0),       // r2 = *(u32 *)(r1 + 28)
        instruction(0xb7, 0x00, 0, 1),             // r0 = 1
        instruction(0x55, 0x02, 1, option.number), // if r2 != number goto +1
        instruction(0xb7, 0x00, 0, 0),             // r0 = 0
        instruction(0x95, 0x00, 0, 0),             // exit
    ];
    loaded(PROG_TYPE_CGROUP_SOCKOPT, CGROUP_SETSOCKOPT, &program)
}

fn instruction(code: u8, registers: u8, offset: i16, value: i32) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = value.to_le_bytes();
    u64::from_le_bytes([code, registers, low, high, a, b, c, d])
}

fn halves(address: usize) -> [u32; 2] {
    [address as u32, (address as u64 >> 32) as u32]
}

fn loaded(program_type: u32, attach_type: u32, program: &[u64]) -> io::Result<OwnedFd> {
    let load = || bpf::load(program_type, attach_type, NAME, program);
    match load() {
        // Before 5.11, BPF memory counts against RLIMIT_MEMLOCK.
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
