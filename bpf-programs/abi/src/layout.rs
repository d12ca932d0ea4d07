//! Byte offsets in the kernel's structures that the programs read.
//!
//! They differ between kernels and between builds. The agent reads them from the kernel's description of its types (BTF)
//! before it loads the programs. For the programs they are constants.

use crate::shared;

/// Bits of [`Layout::known`]: what can be read. Zero: nothing.
pub mod known {
    /// A `struct sock`: family, protocol, addresses, cookie, cgroup.
    pub const SOCKET: u32 = 1;
    /// The socket of a descriptor.
    pub const DESCRIPTOR: u32 = 2;
    /// The ancestors of a task's cgroup, for kernels that have no helper for them.
    pub const ANCESTORS: u32 = 4;
    /// The system call that a task is in: its number, its arguments, and whether it is a 32-bit one.
    pub const SYSCALL: u32 = 8;
    /// What identifies a task's process, and the file that it runs.
    pub const EXECUTABLE: u32 = 16;
    /// The devices of a socket's network namespace, by index.
    pub const DEVICES: u32 = 32;
}

/// The number of arguments of setsockopt and getsockopt.
pub const ARGUMENTS: usize = 5;

/// Offsets in bytes, each from the beginning of the structure with which its name starts.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// See [`known`].
    pub known: u32,
    /// `struct socket`
    pub socket_sk: u32,
    /// `struct sock`, including its `__sk_common`
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
    /// Ids of the cgroups from the root to this one, if the kernel keeps them in this form.
    pub cgroup_ancestor_ids: u32,
    /// `struct kernfs_node`
    pub kernfs_node_id: u32,
    /// `struct task_struct`
    pub task_files: u32,
    pub task_cgroups: u32,
    /// thread_info.status, which distinguishes 32-bit system calls on x86.
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
    /// `struct pt_regs`: the number of the system call, its result, and its arguments.
    pub regs_syscall: u32,
    pub regs_result: u32,
    pub regs_arguments: [u32; ARGUMENTS],
    /// `struct task_struct`: its thread id; its process id; the process's first thread; when a thread was created; how often
    /// the process called exec; its memory.
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
    /// `struct net`: its hash table of device lists, by the lowest eight bits of the device index.
    pub net_devices: u32,
    /// `struct net_device`: its node in such a list, and its index.
    pub device_node: u32,
    pub device_index: u32,
}
shared!(Layout, size 51 * 4 + ARGUMENTS * 4);

impl Layout {
    /// Returns whether the layout has all offsets for `what`: bits of [`known`].
    #[must_use]
    pub fn knows(&self, what: u32) -> bool {
        self.known & what == what
    }
}

/// Values of [`Member::of`]: which sockets have the structure.
pub mod of {
    /// All sockets: `struct sock`.
    pub const SOCK: u32 = 0;
    /// IPv4 and IPv6 sockets: `struct inet_sock`.
    pub const INET: u32 = 1;
    /// TCP sockets: `struct tcp_sock`.
    pub const TCP: u32 = 2;
}

/// Where a socket keeps the value of an option. Map `MEMBERS`, by option.
///
/// All three structures begin at the address of the socket.
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
