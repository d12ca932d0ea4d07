//! The offsets of members of the kernel's structures, which the programs get as constants.

use abi::{
    layout::{Layout, Member, known, of},
    setting::OptionKey,
};

use crate::{
    host::btf::{Structure, Types},
    options::{Kept, OPTIONS},
};

/// The structures from which others are found. Structures that are not here are looked up by name.
pub(super) struct Roots<'a> {
    types: &'a Types,
    task: Option<Structure<'a>>,
    /// The structures of a TCP socket, from the innermost to the outermost.
    sock: Option<Structure<'a>>,
    inet_sock: Option<Structure<'a>>,
    tcp_sock: Option<Structure<'a>>,
}

impl<'a> Roots<'a> {
    pub(super) fn find(types: &'a Types) -> Self {
        let tcp_sock = types.structure("tcp_sock");
        let inet_sock = tcp_sock.as_ref().and_then(|tcp| tcp.structure("inet_conn.icsk_inet"));
        let sock = inet_sock.as_ref().and_then(|inet| inet.structure("sk"));
        Self { types, task: types.structure("task_struct"), sock, inet_sock, tcp_sock }
    }
}

/// Returns the offsets that the programs read. If this kernel lacks a member, the whole part that contains it is left out.
pub(super) fn layout(roots: &Roots<'_>) -> Layout {
    let mut layout = Layout::default();
    let parts = [
        (known::SOCKET, socket(roots, &mut layout)),
        (known::DESCRIPTOR, descriptor(roots, &mut layout)),
        (known::ANCESTORS, ancestors(roots, &mut layout)),
        (known::SYSCALL, system_call(roots, &mut layout)),
        (known::EXECUTABLE, executable(roots, &mut layout)),
        (known::DEVICES, devices(roots, &mut layout)),
    ];
    for (part, found) in parts {
        match found {
            Some(()) => layout.known |= part,
            None => log::debug!("the kernel's BTF lacks members of part {part:#x}, which the audit reads"),
        }
    }
    layout
}

fn offset(structure: &Structure<'_>, path: &str) -> Option<u32> {
    structure.place(path).map(|place| place.offset)
}

fn socket(roots: &Roots<'_>, layout: &mut Layout) -> Option<()> {
    let sock = roots.sock.as_ref()?;
    layout.socket_sk = offset(&sock.structure("sk_socket")?, "sk")?;
    let common = |name: &str| offset(sock, &format!("__sk_common.{name}"));
    layout.sock_family = common("skc_family")?;
    layout.sock_state = common("skc_state")?;
    layout.sock_num = common("skc_num")?;
    layout.sock_dport = common("skc_dport")?;
    layout.sock_rcv_saddr = common("skc_rcv_saddr")?;
    layout.sock_daddr = common("skc_daddr")?;
    layout.sock_v6_rcv_saddr = common("skc_v6_rcv_saddr")?;
    layout.sock_v6_daddr = common("skc_v6_daddr")?;
    layout.sock_cookie = common("skc_cookie")?;
    // `sk_protocol` and `sk_type` were bit fields before 5.6.
    layout.sock_protocol = offset(sock, "sk_protocol")?;
    layout.sock_type = offset(sock, "sk_type")?;
    layout.sock_cgroup = offset(sock, "sk_cgrp_data.cgroup")?;
    let cgroup = sock.structure("sk_cgrp_data.cgroup")?;
    layout.cgroup_kn = offset(&cgroup, "kn")?;
    layout.cgroup_parent = offset(&cgroup, "self.parent")?;
    layout.kernfs_node_id = offset(&cgroup.structure("kn")?, "id")?;
    Some(())
}

fn descriptor(roots: &Roots<'_>, layout: &mut Layout) -> Option<()> {
    let task = roots.task.as_ref()?;
    layout.task_files = offset(task, "files")?;
    let files = task.structure("files")?;
    layout.files_fdt = offset(&files, "fdt")?;
    let table = files.structure("fdt")?;
    layout.fdtable_max_fds = offset(&table, "max_fds")?;
    layout.fdtable_fd = offset(&table, "fd")?;
    let file = table.structure("fd")?;
    layout.file_inode = offset(&file, "f_inode")?;
    layout.file_private_data = offset(&file, "private_data")?;
    let inode = file.structure("f_inode")?;
    layout.inode_mode = offset(&inode, "i_mode")?;
    layout.inode_number = offset(&inode, "i_ino")?;
    Some(())
}

/// The lists that `dev_get_by_index_rcu` searches (net/core/dev.c).
fn devices(roots: &Roots<'_>, layout: &mut Layout) -> Option<()> {
    let sock = roots.sock.as_ref()?;
    layout.sock_net = offset(sock, "__sk_common.skc_net.net")?;
    layout.net_devices = offset(&sock.structure("__sk_common.skc_net.net")?, "dev_index_head")?;
    let device = roots.types.structure("net_device")?;
    layout.device_node = offset(&device, "index_hlist")?;
    layout.device_index = offset(&device, "ifindex")?;
    Some(())
}

/// Finds the ids of a cgroup's ancestors. Until 6.0 a cgroup had these ids; since then it has pointers to its ancestors, but
/// since 5.15 there is a helper.
fn ancestors(roots: &Roots<'_>, layout: &mut Layout) -> Option<()> {
    let task = roots.task.as_ref()?;
    layout.task_cgroups = offset(task, "cgroups")?;
    let set = task.structure("cgroups")?;
    layout.css_set_cgroup = offset(&set, "dfl_cgrp")?;
    let cgroup = set.structure("dfl_cgrp")?;
    layout.cgroup_level = offset(&cgroup, "level")?;
    layout.cgroup_ancestor_ids = offset(&cgroup, "ancestor_ids")?;
    Some(())
}

/// Finds the registers of a system call. Only x86 is supported.
fn system_call(roots: &Roots<'_>, layout: &mut Layout) -> Option<()> {
    layout.task_status = offset(roots.task.as_ref()?, "thread_info.status")?;
    let registers = roots.types.structure("pt_regs")?;
    layout.regs_syscall = offset(&registers, "orig_ax")?;
    layout.regs_result = offset(&registers, "ax")?;
    for (place, register) in layout.regs_arguments.iter_mut().zip(["di", "si", "dx", "r10", "r8"]) {
        *place = offset(&registers, register)?;
    }
    Some(())
}

fn executable(roots: &Roots<'_>, layout: &mut Layout) -> Option<()> {
    let task = roots.task.as_ref()?;
    layout.task_pid = offset(task, "pid")?;
    layout.task_tgid = offset(task, "tgid")?;
    layout.task_leader = offset(task, "group_leader")?;
    layout.task_start = offset(task, "start_boottime")?;
    layout.task_exec_id = offset(task, "self_exec_id")?;
    layout.task_mm = offset(task, "mm")?;
    let memory = task.structure("mm")?;
    layout.mm_exe_file = offset(&memory, "exe_file")?;
    let file = memory.structure("exe_file")?;
    layout.file_mount = offset(&file, "f_path.mnt")?;
    layout.file_dentry = offset(&file, "f_path.dentry")?;
    let dentry = file.structure("f_path.dentry")?;
    layout.dentry_parent = offset(&dentry, "d_parent")?;
    layout.dentry_name = offset(&dentry, "d_name.name")?;
    layout.vfsmount_root = offset(&file.structure("f_path.mnt")?, "mnt_root")?;
    let mount = roots.types.structure("mount")?;
    layout.mount_vfsmount = offset(&mount, "mnt")?;
    layout.mount_parent = offset(&mount, "mnt_parent")?;
    layout.mount_point = offset(&mount, "mnt_mountpoint")?;
    Some(())
}

/// Returns the members in which sockets of this kernel keep the values of options, for options that have such a member.
pub(super) fn members(roots: &Roots<'_>) -> Vec<(OptionKey, Member)> {
    let Roots { sock, inet_sock, tcp_sock, .. } = roots;
    let structures = [("sock", sock, of::SOCK), ("inet_sock", inet_sock, of::INET), ("tcp_sock", tcp_sock, of::TCP)];
    let mut members = Vec::new();
    for (name, structure, of) in structures {
        let Some(structure) = structure else { continue };
        for option in OPTIONS {
            let Kept::Member { of: owner, name: member } = option.kept else { continue };
            if owner != name {
                continue;
            }
            match structure.place(member) {
                Some(place) if matches!(place.size, 1 | 2 | 4 | 8) => {
                    members.push((option.key(), Member { of, offset: place.offset, size: place.size }));
                }
                _ => log::debug!("the kernel's BTF has no member {member} of 1, 2, 4 or 8 bytes in {name}"),
            }
        }
    }
    members
}
