//! The system calls that aya does not wrap: bpf(2) commands, and perf_event_open(2).

use std::{
    ffi::CString,
    io, mem,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya::sys::BpfHelper;
use aya_obj::generated::{
    BPF_ALU64, BPF_CALL, BPF_EXIT, BPF_JMP, BPF_K, BPF_MOV, PERF_EVENT_IOC_SET_BPF, PERF_FLAG_FD_CLOEXEC,
    bpf_attach_type, bpf_attr, bpf_cmd, bpf_insn, bpf_link_info, bpf_link_type, bpf_map_type, bpf_prog_info,
    bpf_prog_type, perf_event_attr, perf_type_id,
};

use super::attach_conflict::AttachMode;
use crate::compile::Hook;

/// Returns what the kernel reports of a program (BPF_OBJ_GET_INFO_BY_FD). aya exposes only a part of it.
pub(super) fn info(program: &impl AsFd) -> io::Result<bpf_prog_info> {
    // SAFETY: zero is valid for each field.
    unsafe { object_info(program) }
}

/// Returns the id of the cgroup that a link attaches a program to. The id is 0 if the cgroup has been removed and all its
/// sockets are closed. `None` if the link is of another kind.
pub(super) fn cgroup_of_link(link: &impl AsFd) -> io::Result<Option<u64>> {
    // SAFETY: zero is valid for each field.
    let info: bpf_link_info = unsafe { object_info(link) }?;
    let is_of_cgroup = info.type_ == bpf_link_type::BPF_LINK_TYPE_CGROUP as u32;
    // SAFETY: every bit pattern is valid for a number, also that of a link of another kind.
    let cgroup = unsafe { info.__bindgen_anon_1.cgroup.cgroup_id };
    Ok(is_of_cgroup.then_some(cgroup))
}

/// # Safety
///
/// Zero must be valid for each field.
unsafe fn object_info<T>(object: &impl AsFd) -> io::Result<T> {
    // SAFETY: the caller guarantees it.
    let mut info: T = unsafe { mem::zeroed() };
    let mut attributes = zeroed_attributes();
    attributes.info.bpf_fd = object.as_fd().as_raw_fd() as u32;
    attributes.info.info_len = size_of_val(&info) as u32;
    attributes.info.info = (&raw mut info) as u64;
    // The kernel writes at most `info_len` bytes to `info`.
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
    Ok(info)
}

/// Replaces the program of a link atomically (BPF_LINK_UPDATE, 5.7).
pub(super) fn update_link(link: &impl AsFd, program: impl AsFd) -> io::Result<()> {
    let mut attributes = zeroed_attributes();
    // SAFETY: the part of the union that BPF_LINK_UPDATE takes.
    let update = unsafe { &mut attributes.link_update };
    update.link_fd = link.as_fd().as_raw_fd() as u32;
    update.__bindgen_anon_1.new_prog_fd = program.as_fd().as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attributes).map(drop)
}

/// Detaches the program of a link immediately (BPF_LINK_DETACH, 5.9). If a link is only closed, the kernel detaches it later,
/// in the background.
pub(super) fn detach_link(link: &impl AsFd) -> io::Result<()> {
    let mut attributes = zeroed_attributes();
    // SAFETY: the part of the union that BPF_LINK_DETACH takes.
    let detach = unsafe { &mut attributes.link_detach };
    detach.link_fd = link.as_fd().as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_LINK_DETACH, &mut attributes).map(drop)
}

/// Pins an object in a BPF file system, which keeps the object until the path is removed (BPF_OBJ_PIN).
pub(super) fn pin(object: &impl AsFd, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = zeroed_attributes();
    // SAFETY: the part of the union that BPF_OBJ_PIN takes.
    let pin = unsafe { &mut attributes.__bindgen_anon_4 };
    pin.pathname = path.as_ptr() as u64;
    pin.bpf_fd = object.as_fd().as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_OBJ_PIN, &mut attributes).map(drop)
}

/// Opens a pinned object (BPF_OBJ_GET).
pub(super) fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = zeroed_attributes();
    // SAFETY: the part of the union that BPF_OBJ_GET takes.
    let get = unsafe { &mut attributes.__bindgen_anon_4 };
    get.pathname = path.as_ptr() as u64;
    let object = bpf(bpf_cmd::BPF_OBJ_GET, &mut attributes)?;
    // SAFETY: a new descriptor that has no owner yet.
    Ok(unsafe { OwnedFd::from_raw_fd(object) })
}

/// Writes zeroes to the first entry of an array whose values have this size in bytes.
pub(super) fn write_zeroes(map: &impl AsFd, bytes: u32) -> io::Result<()> {
    let (key, value) = (0_u32, vec![0_u8; bytes as usize]);
    let mut attributes = zeroed_attributes();
    // SAFETY: the part of the union that BPF_MAP_UPDATE_ELEM takes.
    let update = unsafe { &mut attributes.__bindgen_anon_2 };
    update.map_fd = map.as_fd().as_raw_fd() as u32;
    update.key = (&raw const key) as u64;
    update.__bindgen_anon_1.value = value.as_ptr() as u64;
    bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attributes).map(drop)
}

/// Attaches a program to a hook of a cgroup by a link (BPF_LINK_CREATE, 5.7). The kernel requires the flags to be 0: links
/// never exclude other programs.
pub(super) fn create_link(program: impl AsFd, hook: Hook, cgroup: &impl AsFd) -> io::Result<OwnedFd> {
    let mut attributes = zeroed_attributes();
    // SAFETY: the part of the union that BPF_LINK_CREATE takes.
    let link = unsafe { &mut attributes.link_create };
    link.__bindgen_anon_1.prog_fd = program.as_fd().as_raw_fd() as u32;
    link.__bindgen_anon_2.target_fd = cgroup.as_fd().as_raw_fd() as u32;
    link.attach_type = attach_type(hook) as u32;
    let link = bpf(bpf_cmd::BPF_LINK_CREATE, &mut attributes)?;
    // SAFETY: a new descriptor that has no owner yet.
    Ok(unsafe { OwnedFd::from_raw_fd(link) })
}

/// Returns the kernel's number of a hook (`enum bpf_attach_type`, include/uapi/linux/bpf.h).
pub(super) fn attach_type(hook: Hook) -> bpf_attach_type {
    match hook {
        Hook::SockCreate => bpf_attach_type::BPF_CGROUP_INET_SOCK_CREATE,
        Hook::PostCreate => bpf_attach_type::BPF_LSM_CGROUP,
        Hook::Bind4 => bpf_attach_type::BPF_CGROUP_INET4_BIND,
        Hook::Bind6 => bpf_attach_type::BPF_CGROUP_INET6_BIND,
        Hook::Connect4 => bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
        Hook::Connect6 => bpf_attach_type::BPF_CGROUP_INET6_CONNECT,
        Hook::Sendmsg4 => bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG,
        Hook::Sendmsg6 => bpf_attach_type::BPF_CGROUP_UDP6_SENDMSG,
        Hook::SockOps => bpf_attach_type::BPF_CGROUP_SOCK_OPS,
        Hook::Setsockopt => bpf_attach_type::BPF_CGROUP_SETSOCKOPT,
        Hook::Getsockopt => bpf_attach_type::BPF_CGROUP_GETSOCKOPT,
    }
}

/// The programs of one hook of a cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Attachment {
    /// How the programs of the cgroup itself are attached. Meaningless if there are none.
    pub(super) mode: AttachMode,
    /// The ids of the programs, in the order in which they run.
    pub(super) programs: Vec<u32>,
}

/// Which programs to query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Query {
    /// The programs that are attached to the cgroup itself.
    Own,
    /// The programs that take effect on the cgroup, also those of its ancestors.
    Effective,
}

/// Queries the programs of a hook of a cgroup (BPF_PROG_QUERY).
///
/// # Errors
///
/// EINVAL if the kernel does not have the hook, EPERM without CAP_NET_ADMIN.
pub(super) fn query(cgroup: &impl AsFd, hook: Hook, which: Query) -> io::Result<Attachment> {
    /// The maximum number of programs of a cgroup (`BPF_CGROUP_MAX_PROGS`, kernel/bpf/cgroup.c).
    const PROGRAMS_MAX: usize = 64;
    const QUERY_EFFECTIVE: u32 = 1;
    let (count, flags) = match which {
        Query::Own => (PROGRAMS_MAX, 0),
        Query::Effective => (PROGRAMS_MAX * (abi::CGROUP_LEVELS_MAX as usize + 1), QUERY_EFFECTIVE),
    };
    let mut programs = vec![0u32; count];
    // For this command, all LSM hooks of a cgroup are one hook, and each program has its own flags (`__cgroup_bpf_query`,
    // kernel/bpf/cgroup.c).
    let mut program_flags = vec![0u32; if hook == Hook::PostCreate && which == Query::Own { count } else { 0 }];
    let mut attributes = zeroed_attributes();
    // SAFETY: the part of the union that BPF_PROG_QUERY takes.
    let query = unsafe { &mut attributes.query };
    query.__bindgen_anon_1.target_fd = cgroup.as_fd().as_raw_fd() as u32;
    query.attach_type = attach_type(hook) as u32;
    query.query_flags = flags;
    query.prog_ids = programs.as_mut_ptr() as u64;
    query.__bindgen_anon_2.prog_cnt = programs.len() as u32;
    if !program_flags.is_empty() {
        query.prog_attach_flags = program_flags.as_mut_ptr() as u64;
    }
    bpf(bpf_cmd::BPF_PROG_QUERY, &mut attributes)?;
    // SAFETY: as for `query` above.
    let query = unsafe { &attributes.query };
    // SAFETY: as for `query` above.
    programs.truncate(unsafe { query.__bindgen_anon_2.prog_cnt } as usize);
    program_flags.truncate(programs.len());
    let modes = program_flags.into_iter().map(AttachMode::from_flags);
    let mode = modes.reduce(|all, one| if one == AttachMode::Multi { all } else { one });
    Ok(Attachment { mode: mode.unwrap_or_else(|| AttachMode::from_flags(query.attach_flags)), programs })
}

/// Returns whether programs of this type and attach type may call a helper.
///
/// Loads a program that calls the helper with 0 as the first argument. The verifier first checks whether the helper exists, and
/// otherwise fails with EINVAL (`check_helper_call`, kernel/bpf/verifier.c). Then it checks the argument, and fails with EACCES
/// because 0 is not a pointer to a socket.
///
/// # Errors
///
/// Fails if the kernel returns another error, which most likely means that capabilities are missing.
pub(super) fn has_helper(
    program_type: bpf_prog_type,
    attach_type: bpf_attach_type,
    helper: BpfHelper,
) -> io::Result<bool> {
    let assign = |register, number| instruction(BPF_ALU64 | BPF_MOV | BPF_K, register, number);
    let call = instruction(BPF_JMP | BPF_CALL, 0, helper as i32);
    let program = [assign(1, 0), call, assign(0, 1), instruction(BPF_JMP | BPF_EXIT, 0, 0)];
    let mut attributes = zeroed_attributes();
    // SAFETY: the part of the union that BPF_PROG_LOAD takes.
    let load = unsafe { &mut attributes.__bindgen_anon_3 };
    load.prog_type = program_type as u32;
    load.expected_attach_type = attach_type as u32;
    load.insns = program.as_ptr() as u64;
    load.insn_cnt = program.len() as u32;
    load.license = c"GPL".as_ptr() as u64;
    match bpf(bpf_cmd::BPF_PROG_LOAD, &mut attributes) {
        // SAFETY: a new descriptor that has no owner yet.
        Ok(program) => drop(unsafe { OwnedFd::from_raw_fd(program) }),
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(false),
        Err(error) => return Err(error),
    }
    Ok(true)
}

/// Checks whether this kernel lets this process load tracing programs, such as those of fentry and fexit.
///
/// Loads a program for a BTF type that is not a function. A kernel that has such programs checks the capabilities first (EPERM)
/// and then refuses the type (EINVAL).
///
/// # Errors
///
/// EPERM if capabilities are missing.
pub(super) fn check_tracing() -> io::Result<()> {
    const NOT_A_FUNCTION: u32 = 1;
    let program = [instruction(BPF_ALU64 | BPF_MOV | BPF_K, 0, 0), instruction(BPF_JMP | BPF_EXIT, 0, 0)];
    let mut attributes = zeroed_attributes();
    // SAFETY: the part of the union that BPF_PROG_LOAD takes.
    let load = unsafe { &mut attributes.__bindgen_anon_3 };
    load.prog_type = bpf_prog_type::BPF_PROG_TYPE_TRACING as u32;
    load.expected_attach_type = bpf_attach_type::BPF_TRACE_FENTRY as u32;
    load.attach_btf_id = NOT_A_FUNCTION;
    load.insns = program.as_ptr() as u64;
    load.insn_cnt = program.len() as u32;
    load.license = c"GPL".as_ptr() as u64;
    match bpf(bpf_cmd::BPF_PROG_LOAD, &mut attributes) {
        // SAFETY: a new descriptor that has no owner yet.
        Ok(program) => drop(unsafe { OwnedFd::from_raw_fd(program) }),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => return Err(error),
        Err(_) => {}
    }
    Ok(())
}

/// Opens a disabled perf event of a tracepoint.
pub(super) fn open_tracepoint(id: u64) -> io::Result<OwnedFd> {
    const EVERY_TASK: libc::pid_t = -1;
    const CPU: libc::c_int = 0;
    const NO_GROUP: libc::c_int = -1;
    // SAFETY: zero is valid for each field.
    let mut attributes: perf_event_attr = unsafe { mem::zeroed() };
    attributes.size = size_of_val(&attributes) as u32;
    attributes.type_ = perf_type_id::PERF_TYPE_TRACEPOINT as u32;
    attributes.config = id;
    attributes.set_disabled(1);
    // SAFETY: the kernel reads at most `size` bytes of the attributes.
    let event = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            EVERY_TASK,
            CPU,
            NO_GROUP,
            libc::c_ulong::from(PERF_FLAG_FD_CLOEXEC),
        )
    };
    if event < 0 {
        let error = io::Error::last_os_error();
        return Err(io::Error::new(error.kind(), format!("perf_event_open: {error}")));
    }
    // SAFETY: a new descriptor that has no owner yet.
    Ok(unsafe { OwnedFd::from_raw_fd(event as i32) })
}

/// Attaches a program to the tracepoint of an event, for all tasks and CPUs, until the event is closed.
pub(super) fn attach_to_event(event: &OwnedFd, program: impl AsFd) -> io::Result<()> {
    // SAFETY: the request takes two descriptors.
    let set =
        unsafe { libc::ioctl(event.as_raw_fd(), PERF_EVENT_IOC_SET_BPF as libc::Ioctl, program.as_fd().as_raw_fd()) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes a map (BPF_MAP_TYPE_PERF_EVENT_ARRAY) that contains these events.
pub(super) fn store_events(events: &[impl AsFd]) -> io::Result<OwnedFd> {
    let mut attributes = zeroed_attributes();
    // SAFETY: the part of the union that BPF_MAP_CREATE takes.
    let create = unsafe { &mut attributes.__bindgen_anon_1 };
    create.map_type = bpf_map_type::BPF_MAP_TYPE_PERF_EVENT_ARRAY as u32;
    create.key_size = size_of::<u32>() as u32;
    create.value_size = size_of::<u32>() as u32;
    create.max_entries = events.len() as u32;
    let map = bpf(bpf_cmd::BPF_MAP_CREATE, &mut attributes)?;
    // SAFETY: a new descriptor that has no owner yet.
    let map = unsafe { OwnedFd::from_raw_fd(map) };
    for (event, key) in events.iter().zip(0_u32..) {
        let value = event.as_fd().as_raw_fd();
        let mut attributes = zeroed_attributes();
        // SAFETY: the part of the union that BPF_MAP_UPDATE_ELEM takes.
        let update = unsafe { &mut attributes.__bindgen_anon_2 };
        update.map_fd = map.as_raw_fd() as u32;
        update.key = (&raw const key) as u64;
        update.__bindgen_anon_1.value = (&raw const value) as u64;
        bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attributes)?;
    }
    Ok(map)
}

fn instruction(code: u32, register: u8, number: i32) -> bpf_insn {
    let mut registers =
        bpf_insn { code: code as u8, _bitfield_align_1: [], _bitfield_1: Default::default(), off: 0, imm: number };
    registers.set_dst_reg(register);
    registers
}

fn zeroed_attributes() -> bpf_attr {
    // SAFETY: zero is valid for each member of the union.
    unsafe { mem::zeroed() }
}

fn bpf(command: bpf_cmd, attributes: &mut bpf_attr) -> io::Result<i32> {
    // SAFETY: the kernel accesses at most `size_of_val(attributes)` bytes of the attributes, and the memory that they point to.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size_of_val(attributes)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}
