//! Facts about this kernel that are found before the programs are loaded, and passed to the programs as constants.

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

/// The helpers that programs at cgroup/setsockopt may call on this kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HelperSupport {
    /// To read options (5.15).
    pub get: bool,
    /// To choose the errno of a denied call (5.18).
    pub set_retval: bool,
    /// To identify the calling task (6.1).
    pub see_task: bool,
    /// To identify the system call (5.15).
    pub see_call: bool,
}

impl HelperSupport {
    /// If this is unknown, loading the next program reports why.
    fn probe() -> Self {
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

/// The facts that the programs get as constants.
pub(super) struct KernelInfo {
    layout: Layout,
    pub(super) members: Vec<(OptionKey, Member)>,
    pub(super) helper_support: HelperSupport,
    /// Whether tracing programs have the helper that returns the ancestors of a task's cgroup.
    can_see_ancestors: bool,
    /// Why the kernel's BTF cannot be read, so that `layout` is empty; `None` if it can.
    pub(super) btf_error: Option<String>,
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
        let has_helper = is_helper_supported(ProgramType::KProbe, BpfHelper::BPF_FUNC_get_current_ancestor_cgroup_id);
        Ok(Self {
            layout,
            members,
            helper_support: HelperSupport::probe(),
            // If this is unknown, loading the next program reports why.
            can_see_ancestors: has_helper.unwrap_or(true),
            btf_error: types.err().map(|error| error.to_string()),
            cpus: tables::cpus()? as u32,
        })
    }

    /// Returns whether the audit can identify callers. Its programs must find the cgroups of a task, and programs at
    /// cgroup/setsockopt must find the audit's record of a call. `Err` gives the reason why not.
    pub(super) fn can_follow(&self) -> Result<(), String> {
        let (what, member) = if !self.can_see_ancestors && !self.layout.knows(known::ANCESTORS) {
            ("the cgroups of a task", "the cgroups of a task")
        } else if !self.helper_support.see_task && !self.layout.knows(known::EXECUTABLE) {
            ("the caller at cgroup/setsockopt", "the number of a task")
        } else {
            return Ok(());
        };
        let why = self.btf_error.clone().unwrap_or_else(|| format!("its BTF lacks {member}"));
        Err(format!("programs cannot find {what} on this kernel: {why}"))
    }

    /// Returns whether programs at cgroup/setsockopt can begin the audit's records of calls.
    pub(super) fn can_begin_calls(&self) -> bool {
        self.helper_support.see_call && self.layout.knows(known::SOCKET | known::DESCRIPTOR | known::SYSCALL)
    }

    /// Returns whether programs of the audit can find the socket of a call and the cgroup of that socket.
    pub(super) fn can_judge(&self) -> bool {
        self.layout.knows(known::SOCKET | known::DESCRIPTOR)
    }

    /// Returns a loader with all constants of the programs.
    pub(super) fn loader(&self, timing: bool) -> EbpfLoader<'_> {
        let mut loader = loader_without_types();
        loader.override_global("LAYOUT", &self.layout, true);
        loader.override_global("CPUS", &self.cpus, true);
        for (name, is_enabled) in [
            ("CAN_SEE_ANCESTORS", self.can_see_ancestors),
            ("CAN_GET", self.helper_support.get),
            ("CAN_SET_RETVAL", self.helper_support.set_retval),
            ("CAN_SEE_TASK", self.helper_support.see_task),
            ("CAN_BEGIN_CALLS", self.can_begin_calls()),
            ("TIMING", timing),
        ] {
            loader.override_global(name, if is_enabled { &1_u8 } else { &0_u8 }, true);
        }
        loader
    }
}

/// Returns a loader that does not read the kernel's BTF.
///
/// The programs have no relocations against the kernel's types. Parsing these takes aya as long as the kernel takes to verify
/// the programs, and twice the memory that the agent uses otherwise. aya reads them when a loader is made, before a caller can
/// disable that. Therefore a thread whose root is a directory without BTF makes the loader.
pub(super) fn loader_without_types<'a>() -> EbpfLoader<'a> {
    const DIR_WITHOUT_BTF: &str = "/sys";
    let made = thread::scope(|scope| {
        let make = || {
            // Without the permission for this, the loader reads the BTF, which only takes longer.
            if let Err(errno) = unshare(CloneFlags::CLONE_FS).and_then(|()| chroot(DIR_WITHOUT_BTF)) {
                log::debug!("cannot prevent aya from reading the kernel's BTF: {errno}");
            }
            EbpfLoader::new()
        };
        scope.spawn(make).join()
    });
    let mut loader = made.unwrap_or_else(|panic| resume_unwind(panic));
    loader.btf(None);
    loader
}
