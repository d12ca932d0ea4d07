//! Where the kernel keeps what the audit looks at: byte offsets in its structures.
//!
//! They differ from kernel to kernel and from build to build. The agent takes them from the kernel's own
//! description of its types (BTF) before it loads the programs, to which they are constants.

use crate::shared;

/// Bits of [`Layout::known`]: what can be looked at. Zero: nothing.
pub mod known {
    /// A `struct sock`: family, protocol, addresses, cookie, cgroup.
    pub const SOCKET: u32 = 1;
    /// The socket behind a descriptor.
    pub const DESCRIPTOR: u32 = 2;
    /// The cgroups above a task's, for kernels that have no helper for it.
    pub const ANCESTORS: u32 = 4;
    /// The system call that a task is in: its number, what it was given, and whether it is a 32-bit one.
    pub const SYSCALL: u32 = 8;
    /// What tells a task's process from others before and after it, and the file that it runs.
    pub const EXECUTABLE: u32 = 16;
    /// The devices of a socket's network namespace, by index.
    pub const DEVICES: u32 = 32;
}

/// The arguments of setsockopt and getsockopt.
pub const ARGUMENTS: usize = 5;

/// Offsets in bytes, each from the beginning of the structure that its name starts with.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// See [`known`].
    pub known: u32,
    /// `struct socket`
    pub socket_sk: u32,
    /// `struct sock`, its `__sk_common` included
    pub sock_family: u32,
    pub sock_state: u32,
    pub sock_num: u32,
    pub sock_dport: u32,
    pub sock_rcv_saddr: u32,
    pub sock_daddr: u32,
    pub sock_v6_rcv_saddr: u32,
    pub sock_v6_daddr: u32,
    pub sock_cookie: u32,
    pub sock_protocol: u32,
    pub sock_type: u32,
    pub sock_cgroup: u32,
    /// `struct cgroup`
    pub cgroup_kn: u32,
    pub cgroup_parent: u32,
    /// Ids of the cgroups from the root to this one, where the kernel keeps them so.
    pub cgroup_ancestor_ids: u32,
    /// `struct kernfs_node`
    pub kernfs_node_id: u32,
    /// `struct task_struct`
    pub task_files: u32,
    pub task_cgroups: u32,
    /// thread_info.status, which tells 32-bit system calls from others on x86.
    pub task_status: u32,
    /// `struct files_struct`
    pub files_fdt: u32,
    /// `struct fdtable`
    pub fdtable_max_fds: u32,
    pub fdtable_fd: u32,
    /// `struct file`
    pub file_inode: u32,
    pub file_private_data: u32,
    /// `struct inode`
    pub inode_mode: u32,
    pub inode_number: u32,
    /// `struct css_set`
    pub css_set_cgroup: u32,
    /// `struct cgroup`: its level, counted from the root.
    pub cgroup_level: u32,
    /// `struct pt_regs`: the number of the system call, what it returns, and what it was given.
    pub regs_syscall: u32,
    pub regs_result: u32,
    pub regs_arguments: [u32; ARGUMENTS],
    /// `struct task_struct`: its number; its process's number; the process's first thread; when a thread was made; how many
    /// programs it has been; its memory.
    pub task_pid: u32,
    pub task_tgid: u32,
    pub task_leader: u32,
    pub task_start: u32,
    pub task_exec_id: u32,
    pub task_mm: u32,
    /// `struct mm_struct`
    pub mm_exe_file: u32,
    /// `struct file`
    pub file_mount: u32,
    pub file_dentry: u32,
    /// `struct dentry`
    pub dentry_parent: u32,
    pub dentry_name: u32,
    /// `struct vfsmount`
    pub vfsmount_root: u32,
    /// `struct mount`
    pub mount_vfsmount: u32,
    pub mount_parent: u32,
    pub mount_point: u32,
    /// `struct sock`
    pub sock_net: u32,
    /// `struct net`: its table of lists of devices, by the lowest eight bits of their index.
    pub net_devices: u32,
    /// `struct net_device`: its place in such a list, and its index.
    pub device_node: u32,
    pub device_index: u32,
}
shared!(Layout, size 51 * 4 + ARGUMENTS * 4);

impl Layout {
    /// Whether it has all offsets for `what`: bits of [`known`].
    #[must_use]
    pub fn knows(&self, what: u32) -> bool {
        self.known & what == what
    }
}

/// Values of [`Member::of`]: which sockets have the structure.
pub mod of {
    /// All: `struct sock`.
    pub const SOCK: u32 = 0;
    /// Those of IPv4 and IPv6: `struct inet_sock`.
    pub const INET: u32 = 1;
    /// Those of TCP: `struct tcp_sock`.
    pub const TCP: u32 = 2;
}

/// Where a socket keeps the value of an option. Map `MEMBERS`, by option.
///
/// All three structures begin where the socket does.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// See [`of`].
    pub of: u32,
    /// Bytes from the beginning of the socket.
    pub offset: u32,
    /// Bytes: 1, 2, 4 or 8.
    pub size: u32,
}
shared!(Member, size 3 * 4);
