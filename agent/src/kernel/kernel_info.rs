//! What is found out about this kernel before the programs are loaded, and told to them as constants.

use std::{panic::resume_unwind, thread};

use abi::{
    layout::{Layout, Member, known},
    setting::OptionKey,
};
use aya::{
    EbpfLoader,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};
use aya_obj::generated::{bpf_attach_type::BPF_CGROUP_SETSOCKOPT, bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCKOPT};
use nix::{
    sched::{CloneFlags, unshare},
    unistd::chroot,
};

use super::{
    KernelError,
    layout::{self, Roots},
    syscall, tables,
};
use crate::host::btf::Types;

/// What programs at cgroup/setsockopt may call on this kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HelperSupport {
    /// Read options (5.15).
    pub get: bool,
    /// Choose the errno of a denied call (5.18).
    pub set_retval: bool,
    /// See who calls (6.1).
    pub see_task: bool,
    /// See which system call that is (5.15).
    pub see_call: bool,
}

impl HelperSupport {
    /// Where that cannot be told, the program that is loaded next will say why.
    fn find() -> Self {
        let has = |helper| syscall::has_helper(BPF_PROG_TYPE_CGROUP_SOCKOPT, BPF_CGROUP_SETSOCKOPT, helper);
        Self {
            get: has(BpfHelper::BPF_FUNC_getsockopt).unwrap_or(true),
            set_retval: has(BpfHelper::BPF_FUNC_set_retval).unwrap_or(true),
            see_task: has(BpfHelper::BPF_FUNC_get_current_pid_tgid).unwrap_or(true)
                && has(BpfHelper::BPF_FUNC_get_current_comm).unwrap_or(true),
            see_call: has(BpfHelper::BPF_FUNC_task_pt_regs).unwrap_or(true)
                && has(BpfHelper::BPF_FUNC_get_current_task_btf).unwrap_or(true),
        }
    }
}

/// What the programs are told of the kernel that they are to run in.
pub(super) struct KernelInfo {
    layout: Layout,
    pub(super) members: Vec<(OptionKey, Member)>,
    pub(super) abilities: HelperSupport,
    /// Whether tracing programs have the helper for the cgroups above a task's.
    can_see_ancestors: bool,
    /// Why `layout` says nothing, if it does not.
    pub(super) blindness: Option<String>,
    cpus: u32,
}

impl KernelInfo {
    pub(super) fn gather() -> Result<Self, KernelError> {
        let types = Types::of_kernel();
        let (layout, members) = match &types {
            Ok(types) => {
                let roots = Roots::find(types);
                (layout::layout(&roots), layout::members(&roots))
            }
            Err(_) => (Layout::default(), Vec::new()),
        };
        let sees = is_helper_supported(ProgramType::KProbe, BpfHelper::BPF_FUNC_get_current_ancestor_cgroup_id);
        Ok(Self {
            layout,
            members,
            abilities: HelperSupport::find(),
            // Where that cannot be told, the program that is loaded next will say why.
            can_see_ancestors: sees.unwrap_or(true),
            blindness: types.err().map(|error| error.to_string()),
            cpus: tables::cpus()? as u32,
        })
    }

    /// Whether programs of the audit can tell which cgroups a task is in, and those at cgroup/setsockopt which call of the audit's
    /// they see; `Err` says why not.
    pub(super) fn can_follow(&self) -> Result<(), String> {
        let (what, place) = if !self.can_see_ancestors && !self.layout.knows(known::ANCESTORS) {
            ("which cgroups a task is in", "where a task's cgroups are")
        } else if !self.abilities.see_task && !self.layout.knows(known::EXECUTABLE) {
            ("at cgroup/setsockopt who calls", "where a task's number is")
        } else {
            return Ok(());
        };
        let why = self.blindness.clone().unwrap_or_else(|| format!("its BTF does not say {place}"));
        Err(format!("this kernel does not tell programs {what}, and {why}"))
    }

    /// Whether programs at cgroup/setsockopt can begin the audit's records of calls.
    pub(super) fn can_begin_calls(&self) -> bool {
        self.abilities.see_call && self.layout.knows(known::SOCKET | known::DESCRIPTOR | known::SYSCALL)
    }

    /// Returns whether programs of the audit can find the socket of a call and the cgroup of that socket.
    pub(super) fn can_judge(&self) -> bool {
        self.layout.knows(known::SOCKET | known::DESCRIPTOR)
    }

    /// What every load of the object starts from, with all that is constant to the programs.
    pub(super) fn loader(&self, timing: bool) -> EbpfLoader<'_> {
        let mut loader = loader_without_types();
        loader.override_global("LAYOUT", &self.layout, true);
        loader.override_global("CPUS", &self.cpus, true);
        for (name, is_so) in [
            ("CAN_SEE_ANCESTORS", self.can_see_ancestors),
            ("CAN_GET", self.abilities.get),
            ("CAN_SET_RETVAL", self.abilities.set_retval),
            ("CAN_SEE_TASK", self.abilities.see_task),
            ("CAN_BEGIN_CALLS", self.can_begin_calls()),
            ("TIMING", timing),
        ] {
            loader.override_global(name, if is_so { &1_u8 } else { &0_u8 }, true);
        }
        loader
    }
}

/// The programs have no relocations against the kernel's types, and digesting those takes aya as long as the programs take the
/// kernel, and twice the memory that is used otherwise. It does so when a loader is made, before it can be told not to. So that
/// it finds none, this is done by a thread with another root, for which nothing lies there.
pub(super) fn loader_without_types<'a>() -> EbpfLoader<'a> {
    const ROOT_WITHOUT_TYPES: &str = "/sys";
    let made = thread::scope(|scope| {
        let make = || {
            // Where this is not allowed, it takes its time.
            if let Err(errno) = unshare(CloneFlags::CLONE_FS).and_then(|()| chroot(ROOT_WITHOUT_TYPES)) {
                log::debug!("aya reads the kernel's types in vain: {errno}");
            }
            EbpfLoader::new()
        };
        scope.spawn(make).join()
    });
    let mut loader = made.unwrap_or_else(|panic| resume_unwind(panic));
    loader.btf(None);
    loader
}
