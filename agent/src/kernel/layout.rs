//! What the programs are told about the kernel's structures.

use abi::{
    layout::{Layout, Member, known, of},
    setting::OptionKey,
};

use crate::{
    host::btf::{Structure, Types},
    options::{Kept, OPTIONS},
};

/// The places that the programs look at. What this kernel does not have is left out, and with it the whole of what it is
/// a part of.
pub(super) fn layout(types: &Types) -> Layout {
    let mut layout = Layout::default();
    let parts = [
        (known::SOCKET, socket(types, &mut layout)),
        (known::DESCRIPTOR, descriptor(types, &mut layout)),
        (known::ANCESTORS, ancestors(types, &mut layout)),
        (known::SYSCALL, system_call(types, &mut layout)),
        (known::EXECUTABLE, executable(types, &mut layout)),
    ];
    for (part, found) in parts {
        match found {
            Some(()) => layout.known |= part,
            None => log::debug!("the kernel's BTF lacks a part of what the audit looks for: {part:#x}"),
        }
    }
    layout
}

fn offset(structure: &Structure<'_>, path: &str) -> Option<u32> {
    structure.place(path).map(|place| place.offset)
}

fn socket(types: &Types, layout: &mut Layout) -> Option<()> {
    layout.socket_sk = offset(&types.structure("socket")?, "sk")?;
    let sock = types.structure("sock")?;
    let common = |name: &str| offset(&sock, &format!("__sk_common.{name}"));
    layout.sock_family = common("skc_family")?;
    layout.sock_state = common("skc_state")?;
    layout.sock_num = common("skc_num")?;
    layout.sock_dport = common("skc_dport")?;
    layout.sock_rcv_saddr = common("skc_rcv_saddr")?;
    layout.sock_daddr = common("skc_daddr")?;
    layout.sock_v6_rcv_saddr = common("skc_v6_rcv_saddr")?;
    layout.sock_v6_daddr = common("skc_v6_daddr")?;
    layout.sock_cookie = common("skc_cookie")?;
    // Both were bit fields before 5.6.
    layout.sock_protocol = offset(&sock, "sk_protocol")?;
    layout.sock_type = offset(&sock, "sk_type")?;
    layout.sock_cgroup = offset(&sock, "sk_cgrp_data.cgroup")?;
    layout.cgroup_kn = offset(&types.structure("cgroup")?, "kn")?;
    layout.kernfs_node_id = offset(&types.structure("kernfs_node")?, "id")?;
    Some(())
}

fn descriptor(types: &Types, layout: &mut Layout) -> Option<()> {
    layout.task_files = offset(&types.structure("task_struct")?, "files")?;
    layout.files_fdt = offset(&types.structure("files_struct")?, "fdt")?;
    let table = types.structure("fdtable")?;
    layout.fdtable_max_fds = offset(&table, "max_fds")?;
    layout.fdtable_fd = offset(&table, "fd")?;
    let file = types.structure("file")?;
    layout.file_inode = offset(&file, "f_inode")?;
    layout.file_private_data = offset(&file, "private_data")?;
    layout.inode_mode = offset(&types.structure("inode")?, "i_mode")?;
    Some(())
}

/// Until 6.0 a cgroup had the ids of those above it, since then it has pointers to them; but since 5.15 there is a helper.
fn ancestors(types: &Types, layout: &mut Layout) -> Option<()> {
    layout.task_cgroups = offset(&types.structure("task_struct")?, "cgroups")?;
    layout.css_set_cgroup = offset(&types.structure("css_set")?, "dfl_cgrp")?;
    let cgroup = types.structure("cgroup")?;
    layout.cgroup_level = offset(&cgroup, "level")?;
    layout.cgroup_ancestor_ids = offset(&cgroup, "ancestor_ids")?;
    Some(())
}

/// x86 keeps all in these places; other machines are not looked at so closely.
fn system_call(types: &Types, layout: &mut Layout) -> Option<()> {
    layout.task_status = offset(&types.structure("task_struct")?, "thread_info.status")?;
    let registers = types.structure("pt_regs")?;
    layout.regs_syscall = offset(&registers, "orig_ax")?;
    layout.regs_result = offset(&registers, "ax")?;
    Some(())
}

fn executable(types: &Types, layout: &mut Layout) -> Option<()> {
    let task = types.structure("task_struct")?;
    layout.task_pid = offset(&task, "pid")?;
    layout.task_tgid = offset(&task, "tgid")?;
    layout.task_leader = offset(&task, "group_leader")?;
    layout.task_start = offset(&task, "start_boottime")?;
    layout.task_exec_id = offset(&task, "self_exec_id")?;
    layout.task_mm = offset(&task, "mm")?;
    layout.mm_exe_file = offset(&types.structure("mm_struct")?, "exe_file")?;
    let file = types.structure("file")?;
    layout.file_mount = offset(&file, "f_path.mnt")?;
    layout.file_dentry = offset(&file, "f_path.dentry")?;
    let dentry = types.structure("dentry")?;
    layout.dentry_parent = offset(&dentry, "d_parent")?;
    layout.dentry_name = offset(&dentry, "d_name.name")?;
    layout.vfsmount_root = offset(&types.structure("vfsmount")?, "mnt_root")?;
    let mount = types.structure("mount")?;
    layout.mount_vfsmount = offset(&mount, "mnt")?;
    layout.mount_parent = offset(&mount, "mnt_parent")?;
    layout.mount_point = offset(&mount, "mnt_mountpoint")?;
    Some(())
}

/// Where sockets of this kernel keep the values of options, for those options that have such a place.
pub(super) fn members(types: &Types) -> Vec<(OptionKey, Member)> {
    let structures = [("sock", of::SOCK), ("inet_sock", of::INET), ("tcp_sock", of::TCP)];
    let mut members = Vec::new();
    for (name, of) in structures {
        let Some(structure) = types.structure(name) else { continue };
        for option in OPTIONS {
            let Kept::Member { of: owner, name: member } = option.kept else { continue };
            if owner != name {
                continue;
            }
            match structure.place(member) {
                Some(place) if matches!(place.size, 1 | 2 | 4 | 8) => {
                    members.push((option.key(), Member { of, offset: place.offset, size: place.size }));
                }
                _ => log::debug!("the kernel's BTF has no plain member {member} in {name}"),
            }
        }
    }
    members
}
