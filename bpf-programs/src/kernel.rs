//! Reads the kernel's own structures at the offsets of [`LAYOUT`]. The audit does this. Other hooks get what they need from
//! their contexts, except who makes a call ([`is_exempt`]) and its arguments ([`arguments`]).
//!
//! Nothing here can fault: reading an invalid address returns `None`.

use abi::{
    TICK_NS,
    event::{Call, Executable, ExecutableFile, NAME_MAX, PATH_MAX, flags},
    layout::{ARGUMENTS, Layout, Member, known, of},
    setting::{Value, Words},
    socket::{Facts, protocol},
};
use aya_ebpf::{
    cty::c_void,
    helpers::{
        bpf_get_current_pid_tgid,
        generated::{
            bpf_get_current_task, bpf_get_current_task_btf, bpf_probe_read_kernel, bpf_probe_read_kernel_str,
            bpf_task_pt_regs,
        },
    },
};

use crate::{facts, maps};

/// Set by the agent at load; constants for the verifier. Zero: nothing is known.
#[unsafe(no_mangle)]
static LAYOUT: Layout = Layout {
    known: 0,
    socket_sk: 0,
    sock_family: 0,
    sock_state: 0,
    sock_num: 0,
    sock_dport: 0,
    sock_rcv_saddr: 0,
    sock_daddr: 0,
    sock_v6_rcv_saddr: 0,
    sock_v6_daddr: 0,
    sock_cookie: 0,
    sock_protocol: 0,
    sock_type: 0,
    sock_cgroup: 0,
    cgroup_kn: 0,
    cgroup_parent: 0,
    cgroup_ancestor_ids: 0,
    kernfs_node_id: 0,
    task_files: 0,
    task_cgroups: 0,
    task_status: 0,
    files_fdt: 0,
    fdtable_max_fds: 0,
    fdtable_fd: 0,
    file_inode: 0,
    file_private_data: 0,
    inode_mode: 0,
    inode_number: 0,
    css_set_cgroup: 0,
    cgroup_level: 0,
    regs_syscall: 0,
    regs_result: 0,
    regs_arguments: [0; ARGUMENTS],
    task_pid: 0,
    task_tgid: 0,
    task_leader: 0,
    task_start: 0,
    task_exec_id: 0,
    task_mm: 0,
    mm_exe_file: 0,
    file_mount: 0,
    file_dentry: 0,
    dentry_parent: 0,
    dentry_name: 0,
    vfsmount_root: 0,
    mount_vfsmount: 0,
    mount_parent: 0,
    mount_point: 0,
    sock_net: 0,
    net_devices: 0,
    device_node: 0,
    device_index: 0,
};

/// Reads a field of [`LAYOUT`]. Volatile, because the agent replaces the initial value.
macro_rules! layout {
    ($field:ident) => {
        // SAFETY: reads a static.
        unsafe { core::ptr::read_volatile(&raw const LAYOUT.$field) }
    };
}

/// Returns the address of a member of the structure at `base`.
macro_rules! member {
    ($base:expr, $field:ident) => {
        ($base).wrapping_add(u64::from(layout!($field)))
    };
}

/// Returns whether the agent has set the offsets for `what`: bits of [`known`].
#[inline(always)]
pub(crate) fn has_offsets(what: u32) -> bool {
    layout!(known) & what == what
}

/// Types without padding that are valid for all bytes, so that they can be read from kernel memory. Sealed, because `bool` and
/// enums must not implement it.
pub(crate) trait Plain: plain::Sealed + Copy + Default {}

mod plain {
    /// See [`super::Plain`].
    pub(crate) trait Sealed {}

    macro_rules! plain {
        ($($type:ty),+) => {
            $(
                impl Sealed for $type {}
                impl super::Plain for $type {}
            )+
        };
    }

    plain!(u8, u16, u32, u64, i64, [u32; 4]);
}

/// Reads a value from kernel memory.
#[inline(always)]
pub(crate) fn read<T: Plain>(address: u64) -> Option<T> {
    let mut value = T::default();
    // SAFETY: writes as many bytes as the value has, and `Plain` types are valid for all bytes.
    let ret =
        unsafe { bpf_probe_read_kernel((&raw mut value).cast(), size_of::<T>() as u32, address as *const c_void) };
    (ret == 0).then_some(value)
}

/// Reads a value from kernel memory; 0 if it cannot be read. For code that reads many values: the verifier follows both
/// results of each [`read`], and the paths multiply.
#[inline(always)]
fn read_or_zero<T: Plain>(address: u64) -> T {
    let mut value = T::default();
    // SAFETY: as in `read`.
    unsafe { bpf_probe_read_kernel((&raw mut value).cast(), size_of::<T>() as u32, address as *const c_void) };
    value
}

/// Reads a pointer from kernel memory; `None` also if it is NULL.
#[inline(always)]
fn read_pointer(address: u64) -> Option<u64> {
    read::<u64>(address).filter(|pointer| *pointer != 0)
}

/// Returns the address in a pointer as a number: the verifier allows no arithmetic on some pointers.
#[inline(always)]
pub(crate) fn address_of(pointer: *const c_void) -> u64 {
    read_or_zero((&raw const pointer) as u64)
}

/// Devices of one list that are searched. The kernel has 256 lists for each network namespace.
const DEVICES_SEARCHED: usize = 16;

/// Returns whether the network namespace of the socket at `sk` has a device with this index (0 or 1), as
/// `dev_get_by_index_rcu` finds it (net/core/dev.c, 5.10 to 6.18). 0 also if this is unknown.
///
/// SO_BINDTOIFINDEX does not check this (`sock_bindtoindex_locked`, net/core/sock.c): the socket could then no longer
/// connect.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn has_device(sk: u64, index: u32) -> u32 {
    find_device(sk, index).is_some().into()
}

#[inline(always)]
fn find_device(sk: u64, index: u32) -> Option<()> {
    if !has_offsets(known::DEVICES) {
        return None;
    }
    let lists = read_pointer(member!(read_pointer(member!(sk, sock_net))?, net_devices))?;
    let mut node = read_pointer(lists.wrapping_add(u64::from(index & 0xff) * size_of::<u64>() as u64))?;
    for _ in 0..DEVICES_SEARCHED {
        let device = node.wrapping_sub(u64::from(layout!(device_node)));
        if read_or_zero::<u32>(member!(device, device_index)) == index {
            return Some(());
        }
        node = read_pointer(node)?;
    }
    None
}

#[inline(always)]
pub(crate) fn current_task() -> u64 {
    // SAFETY: has no arguments.
    unsafe { bpf_get_current_task() }
}

/// Returns the current thread in the format of `bpf_get_current_pid_tgid`, for programs that cannot call that helper; 0 if
/// unknown.
#[inline(always)]
pub(crate) fn current_thread() -> u64 {
    if !has_offsets(known::EXECUTABLE) {
        return 0;
    }
    let task = current_task();
    let thread: u32 = read_or_zero(member!(task, task_pid));
    u64::from(read_or_zero::<u32>(member!(task, task_tgid))) << 32 | u64::from(thread)
}

/// Returns the `struct sock` of a `struct socket`.
#[inline(always)]
pub(crate) fn sock_of(socket: *const c_void) -> u64 {
    if !has_offsets(known::SOCKET) {
        return 0;
    }
    // The verifier accepts a pointer from the kernel only with a constant offset: so this does not convert it to a number.
    let field = socket.wrapping_byte_add(layout!(socket_sk) as usize);
    let mut sk = 0u64;
    // SAFETY: writes the 8 bytes of `sk`.
    let ret = unsafe { bpf_probe_read_kernel((&raw mut sk).cast(), 8, field) };
    if ret == 0 { sk } else { 0 }
}

/// Returns the `struct file` of a descriptor of the current task; 0 if there is none.
#[inline(always)]
pub(crate) fn file_of_descriptor(fd: i32) -> u64 {
    if fd < 0 || !has_offsets(known::SOCKET | known::DESCRIPTOR) {
        return 0;
    }
    find_file(fd as u32).unwrap_or(0)
}

/// Returns the `struct sock` of a `struct file`; 0 if the file is no socket.
#[inline(always)]
pub(crate) fn sock_of_file(file: u64) -> u64 {
    find_sock(file).unwrap_or(0)
}

#[inline(always)]
fn find_file(fd: u32) -> Option<u64> {
    let files = read_pointer(member!(current_task(), task_files))?;
    let table = read_pointer(member!(files, files_fdt))?;
    if fd >= read::<u32>(member!(table, fdtable_max_fds))? {
        return None;
    }
    let descriptors = read_pointer(member!(table, fdtable_fd))?;
    read_pointer(descriptors.wrapping_add(8 * u64::from(fd)))
}

/// Returns the `struct inode` and the `struct socket` of a `struct file` that is a socket. A file that was opened with O_PATH
/// has no `struct socket`, even if a Unix socket is bound to the file.
#[inline(always)]
fn find_socket(file: u64) -> Option<(u64, u64)> {
    /// The bits of a mode that hold the file type, and the value for a socket (include/uapi/linux/stat.h).
    const S_IFMT: u16 = 0o170_000;
    const S_IFSOCK: u16 = 0o140_000;
    let inode = read_pointer(member!(file, file_inode))?;
    if read::<u16>(member!(inode, inode_mode))? & S_IFMT != S_IFSOCK {
        return None;
    }
    Some((inode, read_pointer(member!(file, file_private_data))?))
}

/// Returns the inode number of a `struct file`, if it is a socket.
#[inline(always)]
pub(crate) fn socket_inode(file: u64) -> Option<u64> {
    if !has_offsets(known::DESCRIPTOR) {
        return None;
    }
    let (inode, _) = find_socket(file)?;
    read(member!(inode, inode_number))
}

/// Returns the process id of a task, if the task is the first thread of its process.
#[inline(always)]
pub(crate) fn process_of(task: u64) -> Option<u32> {
    if !has_offsets(known::EXECUTABLE) || read_or_zero::<u64>(member!(task, task_leader)) != task {
        return None;
    }
    read(member!(task, task_tgid))
}

#[inline(always)]
fn find_sock(file: u64) -> Option<u64> {
    let (_, socket) = find_socket(file)?;
    read_pointer(member!(socket, socket_sk))
}

/// The beginning of a `struct sock`, which has most of the members that are read: one read instead of many.
struct SockHead([u64; Self::LEN / 8]);

impl SockHead {
    const LEN: usize = 128;

    #[inline(always)]
    fn of(sk: u64) -> Option<Self> {
        let mut head = Self([0; Self::LEN / 8]);
        // SAFETY: writes as many bytes as the array has, and the array is valid for all bytes.
        let ret = unsafe { bpf_probe_read_kernel((&raw mut head.0).cast(), Self::LEN as u32, sk as *const c_void) };
        (ret == 0).then_some(head)
    }

    /// Returns a member; a member beyond this beginning is read from the kernel.
    #[inline(always)]
    fn member<T: Plain>(&self, sk: u64, offset: u32) -> T {
        let offset = offset as usize;
        if offset > Self::LEN - size_of::<T>() {
            return read_or_zero(sk.wrapping_add(offset as u64));
        }
        // SAFETY: within the array, aligned as in the kernel, and `Plain` types are valid for all bytes.
        unsafe { self.0.as_ptr().byte_add(offset).cast::<T>().read() }
    }
}

/// Fills in what a socket's own fields show, unless a hook that knows more has done so.
#[inline(always)]
pub(crate) fn fill_socket(record: &mut Call, sk: u64) {
    record.socket_cgroup = cgroup_of(sk).unwrap_or(0);
    let Some(head) = SockHead::of(sk) else { return };
    if record.cookie == 0 {
        record.cookie = head.member(sk, layout!(sock_cookie));
    }
    let family: u16 = head.member(sk, layout!(sock_family));
    record.sk_family = family.into();
    if record.flags & flags::SOCKET == 0 && facts::is_inet(family.into()) {
        record.facts = facts_of(sk, &head, family.into());
        record.flags |= flags::SOCKET;
    }
}

/// Returns the cookie of a socket; 0 if it has none yet.
#[inline(always)]
pub(crate) fn cookie_of(sk: u64) -> u64 {
    read_or_zero(member!(sk, sock_cookie))
}

/// Returns the id of the cgroup to which a socket belongs.
#[inline(always)]
fn cgroup_of(sk: u64) -> Option<u64> {
    id_of_cgroup(read_pointer(member!(sk, sock_cgroup))?)
}

#[inline(always)]
fn id_of_cgroup(cgroup: u64) -> Option<u64> {
    read(member!(read_pointer(member!(cgroup, cgroup_kn))?, kernfs_node_id))
}

/// Returns the `struct sock` of a `struct socket` that is a program's argument. Both are pointers that the verifier tracks.
#[inline(always)]
pub(crate) fn sk_of(socket: *const c_void) -> *mut c_void {
    if socket.is_null() || !has_offsets(known::SOCKET) {
        return core::ptr::null_mut();
    }
    let field = socket.wrapping_byte_add(layout!(socket_sk) as usize).cast::<*mut c_void>();
    // SAFETY: the verifier checks that a pointer to a socket is there.
    unsafe { field.read_volatile() }
}

/// Returns the slot of the deepest target to which a socket belongs, plus one; 0 if there is none; [`TOO_DEEP`] if the cgroup
/// is too deep to search.
///
/// A global function, so that the verifier checks the loop once.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn slot_of_sock(generation: u32, sk: u64) -> u32 {
    let mut cgroup = if has_offsets(known::SOCKET) { read_pointer(member!(sk, sock_cgroup)) } else { None };
    for _ in 0..=abi::CGROUP_LEVELS_MAX {
        let Some(current) = cgroup else { break };
        if let Some(slot) = id_of_cgroup(current).and_then(|id| maps::cgroup_slot(generation, id)) {
            return slot + 1;
        }
        // `css.parent`; a cgroup begins with its css.
        cgroup = read_pointer(member!(current, cgroup_parent));
    }
    if cgroup.is_some() { TOO_DEEP } else { 0 }
}

/// Returns as [`slot_of_sock`] does, for the socket of a descriptor of the current task.
#[inline(always)]
pub(crate) fn slot_of_descriptor(generation: u32, fd: i32) -> u32 {
    match sock_of_file(file_of_descriptor(fd)) {
        0 => 0,
        sk => slot_of_sock(generation, sk),
    }
}

/// See [`slot_of_sock`].
pub(crate) const TOO_DEEP: u32 = u32::MAX;

/// Returns the protocol of an IPv4 or IPv6 socket, also if the application left the choice to the kernel.
#[inline(always)]
pub(crate) fn protocol_of(sk: u64) -> u8 {
    let kind = read_or_zero::<u16>(member!(sk, sock_type));
    let number = read_or_zero::<u16>(member!(sk, sock_protocol));
    facts::protocol(kind.into(), number.into())
}

/// Returns what an IPv4 or IPv6 socket's own fields show, except the direction of its connection.
#[inline(always)]
fn facts_of(sk: u64, head: &SockHead, family: u32) -> Facts {
    let inet6 = family == abi::socket::sk_family::INET6;
    let mut facts = Facts { protocol: protocol_of(sk), ..Facts::default() };
    let address = |v6: u32, v4: u32| if inet6 { head.member(sk, v6) } else { [head.member(sk, v4), 0, 0, 0] };
    facts.local = address(layout!(sock_v6_rcv_saddr), layout!(sock_rcv_saddr));
    facts.local_port = head.member(sk, layout!(sock_num)); // host byte order
    facts::mark_local(&mut facts);
    facts::apply_state(&mut facts, head.member::<u8>(sk, layout!(sock_state)).into(), || {
        let remote = address(layout!(sock_v6_daddr), layout!(sock_daddr));
        (remote, u16::from_be(head.member(sk, layout!(sock_dport))))
    });
    facts.set_family(family);
    facts
}

/// Returns the value of an option that is kept in one member of the socket.
#[inline(always)]
pub(crate) fn value_of(sk: u64, record: &Call, member: &Member) -> Option<Value> {
    // An MPTCP socket keeps such values in its subflows, and is no `tcp_sock`.
    let has_it = match member.of {
        of::SOCK => true,
        of::INET => record.flags & flags::SOCKET != 0 && !is_multipath(sk),
        _ => record.facts.protocol == protocol::TCP && !is_multipath(sk),
    };
    if !has_it {
        return None;
    }
    let address = sk.wrapping_add(u64::from(member.offset));
    let number = match member.size {
        1 => u64::from(read::<u8>(address)?),
        2 => u64::from(read::<u16>(address)?),
        4 => u64::from(read::<u32>(address)?),
        _ => read::<u64>(address)?,
    };
    // Options are at least as wide as an int, whatever the width of the member.
    let words: Words = [number.to_le(), 0];
    Some(Value::new(words, if member.size < 4 { 4 } else { member.size }))
}

#[inline(always)]
fn is_multipath(sk: u64) -> bool {
    read::<u16>(member!(sk, sock_protocol)).unwrap_or(0) as u32 == facts::IPPROTO_MPTCP
}

/// Returns the id of the ancestor at `level` of the current task's cgroup, or of the cgroup itself; 0 if the cgroup is not
/// that deep. For kernels without `bpf_get_current_ancestor_cgroup_id`.
#[inline(always)]
pub(crate) fn ancestor_cgroup(level: u32) -> u64 {
    find_ancestor(level).unwrap_or(0)
}

#[inline(always)]
fn find_ancestor(level: u32) -> Option<u64> {
    if !has_offsets(known::ANCESTORS) {
        return None;
    }
    let set = read_pointer(member!(current_task(), task_cgroups))?;
    let cgroup = read_pointer(member!(set, css_set_cgroup))?;
    if level > read::<u32>(member!(cgroup, cgroup_level))? {
        return None;
    }
    read(member!(cgroup, cgroup_ancestor_ids).wrapping_add(8 * u64::from(level)))
}

/// Returns how the current task made a call by descriptor: bits of [`flags`].
#[inline(always)]
pub(crate) fn via_by_descriptor() -> u32 {
    match has_offsets(known::SYSCALL) {
        true if is_compat() => flags::COMPAT,
        true => flags::SYSCALL,
        false => 0,
    }
}

/// Returns how the current task made a call, for functions that several kinds of calls reach: bits of [`flags`].
/// `system_call` is the number of the system call that reaches the function.
#[inline(always)]
pub(crate) fn via(system_call: i64) -> u32 {
    /// The result register while a system call runs (`PUSH_AND_CLEAR_REGS` in arch/x86/entry/entry_64.S). Work that a task
    /// does on its return to user space runs later. Threads that the kernel creates for a ring have 0 (`copy_thread`).
    const IN_PROGRESS: i64 = -38; // ENOSYS
    if !has_offsets(known::SYSCALL) {
        return 0;
    }
    let regs = registers();
    if read_or_zero::<i64>(member!(regs, regs_result)) != IN_PROGRESS {
        return flags::RING;
    }
    if is_compat() {
        return flags::COMPAT;
    }
    if read_or_zero::<i64>(member!(regs, regs_syscall)) == system_call { flags::SYSCALL } else { flags::RING }
}

/// Returns the arguments of the system call that the current task is in.
#[inline(always)]
pub(crate) fn arguments() -> [u64; ARGUMENTS] {
    let regs = registers();
    layout!(regs_arguments).map(|register| read_or_zero(regs.wrapping_add(u64::from(register))))
}

/// Returns the address of the registers with which the current task entered the kernel.
#[inline(always)]
fn registers() -> u64 {
    // SAFETY: the first helper takes no arguments; the second takes the result of the first.
    unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) as u64 }
}

/// Returns whether the current task is in a system call of a 32-bit program.
#[inline(always)]
fn is_compat() -> bool {
    /// `TS_COMPAT` (arch/x86/include/asm/thread_info.h).
    const TS_COMPAT: u32 = 2;
    read_or_zero::<u32>(member!(current_task(), task_status)) & TS_COMPAT != 0
}

/// Returns whether the current task belongs to a process of sockpolicy that inspects sockets. Its call is not an application's.
#[inline(always)]
pub(crate) fn is_exempt(is_read: bool) -> bool {
    is_exempt_process(is_read.into()) != 0
}

/// See [`is_exempt`] (0 or 1). The verifier checks the function once, and not for each of its calls.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn is_exempt_process(is_read: u32) -> u32 {
    let Some(exemptions) = maps::exemptions().filter(|_| has_offsets(known::EXECUTABLE)) else { return 0 };
    let task = current_task();
    let process: u32 = read_or_zero(member!(task, task_tgid));
    let leader: u64 = read_or_zero(member!(task, task_leader));
    let start = read_or_zero::<u64>(member!(leader, task_start)) / TICK_NS;
    let mut found = 0;
    for entry in &exemptions.entries {
        if entry.process == process && entry.start == start && is_read >= entry.reads_only {
            found = 1;
        }
    }
    found
}

/// Returns the executable that the current task runs; zero if unknown.
#[inline(always)]
pub(crate) fn current_executable() -> Executable {
    if !has_offsets(known::EXECUTABLE) {
        return Executable::default();
    }
    let task = current_task();
    let leader: u64 = read_or_zero(member!(task, task_leader));
    Executable {
        start_ns: read_or_zero(member!(leader, task_start)),
        pid: (bpf_get_current_pid_tgid() >> 32) as u32,
        exec_id: read_or_zero::<u64>(member!(task, task_exec_id)) as u32,
    }
}

/// Writes the path of the file that the current task runs, from the root of its mount namespace.
#[inline(always)]
pub(crate) fn write_exe_path(file: &mut ExecutableFile) {
    let mm: u64 = read_or_zero(member!(current_task(), task_mm));
    let exe: u64 = read_or_zero(member!(mm, mm_exe_file));
    let node =
        PathNode { mount: read_or_zero(member!(exe, file_mount)), dentry: read_or_zero(member!(exe, file_dentry)) };
    if !write_path(file, node) {
        file.len = 0;
    }
}

/// A node of the tree of all files: a `struct vfsmount`, and a `struct dentry` in it.
struct PathNode {
    mount: u64,
    dentry: u64,
}

/// Writes the path of a node. Returns whether the path is known and fits.
#[inline(always)]
fn write_path(file: &mut ExecutableFile, mut node: PathNode) -> bool {
    /// Directories and mounts up to the root.
    const STEPS: usize = 48;
    for _ in 0..STEPS {
        if node.dentry == 0 {
            return false;
        }
        if node.dentry == read_or_zero(member!(node.mount, vfsmount_root)) {
            // A vfsmount is embedded in its mount.
            let mount = node.mount.wrapping_sub(u64::from(layout!(mount_vfsmount)));
            let parent: u64 = read_or_zero(member!(mount, mount_parent));
            if parent == mount {
                return true;
            }
            node.dentry = read_or_zero(member!(mount, mount_point));
            node.mount = member!(parent, mount_vfsmount);
            continue;
        }
        if !write_name(file, read_or_zero(member!(node.dentry, dentry_name))) {
            return false;
        }
        let parent: u64 = read_or_zero(member!(node.dentry, dentry_parent));
        // A dentry without a parent is in no tree: the file has only a name.
        if parent == node.dentry {
            return true;
        }
        node.dentry = parent;
    }
    false
}

#[inline(always)]
fn write_name(file: &mut ExecutableFile, name: u64) -> bool {
    // The length is kept in memory whose contents the verifier does not track. In a register, it would differ on each path that
    // leads here, and the verifier would follow all paths to the end.
    // SAFETY: reads through a valid reference.
    let len = unsafe { core::ptr::read_volatile(&raw const file.len) } as usize;
    if len >= PATH_MAX {
        return false;
    }
    // SAFETY: `names` has room for a name after PATH_MAX bytes.
    let read = unsafe {
        bpf_probe_read_kernel_str(file.names.as_mut_ptr().add(len).cast(), NAME_MAX as u32, name as *const c_void)
    };
    if read <= 0 {
        return false;
    }
    // SAFETY: as above.
    unsafe { core::ptr::write_volatile(&raw mut file.len, (len + read as usize) as u64) };
    true
}
