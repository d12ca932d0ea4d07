//! Loads the BPF programs.

use std::{
    iter,
    num::NonZeroUsize,
    panic::resume_unwind,
    sync::{Mutex, PoisonError},
    thread,
};

use abi::layout::Layout;
use aya::{
    Btf, Ebpf, VerifierLogLevel, include_bytes_aligned,
    programs::{Program, ProgramError},
};

use super::{
    KernelError,
    error::load_reason,
    kernel_info::{KernelInfo, loader_without_types},
    memlock::Memlock,
    syscall,
};
use crate::compile::Hook;

/// The programs, as build.rs compiled them.
pub(super) static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sockpolicy-bpf"));

/// Loads programs, as many in parallel as there are CPUs: verification takes most of the start-up time. Returns the hooks whose
/// program the kernel refused. Errors of `others` show when these are attached.
pub(super) fn load_programs(
    ebpf: &mut Ebpf,
    hooks: &[Hook],
    others: &[&str],
) -> Result<Vec<(Hook, String)>, KernelError> {
    // The longest programs first, so that no CPU still verifies one at the end: those of the audit, then those of the hooks at
    // calls.
    let of_hooks = hooks.iter().rev().map(|hook| (hook.program(), Some(*hook)));
    let order: Vec<_> = others.iter().map(|name| (*name, None)).chain(of_hooks).collect();
    let position = |name| order.iter().position(|(wanted, _)| *wanted == name);
    let mut programs: Vec<_> =
        ebpf.programs_mut().filter_map(|(name, program)| Some((position(name)?, program))).collect();
    programs.sort_by_key(|(position, _)| *position);
    let programs: Vec<_> = programs.into_iter().map(|(position, program)| (order[position].1, program)).collect();
    if programs.iter().filter(|(hook, _)| hook.is_some()).count() != hooks.len() {
        return Err(KernelError::Incomplete { what: "program for one of the hooks" });
    }
    let queue = Mutex::new(programs.into_iter());
    let load = || {
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        iter::from_fn(next).filter_map(|(hook, program)| Some((load_program(program), hook?))).collect::<Vec<_>>()
    };
    let workers = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let mut results = thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(load)).collect();
        let results = threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
        results.flatten().collect::<Vec<_>>()
    });
    // Sorted, so that the same error is returned each time.
    results.sort_by_key(|(_, hook)| *hook);
    let mut refused = Vec::new();
    for (result, hook) in results {
        let Err(error) = result else { continue };
        let reason = load_reason(&error);
        if !is_refusal(&error) && !hook.is_optional() {
            return Err(KernelError::Load { hook, reason });
        }
        refused.push((hook, reason));
    }
    Ok(refused)
}

/// Returns whether the verifier refused a program, as opposed to missing capabilities or memory.
fn is_refusal(error: &ProgramError) -> bool {
    let ProgramError::LoadError { io_error, .. } = error else { return false };
    !matches!(io_error.raw_os_error(), None | Some(libc::EPERM | libc::ENOMEM | libc::EAGAIN))
}

/// Loads a program unless it is loaded: some programs are attached to several points.
pub(super) fn load_once(program: &mut Program) -> Result<(), ProgramError> {
    match load_program(program) {
        Err(ProgramError::AlreadyLoaded) => Ok(()),
        other => other,
    }
}

pub(super) fn load_program(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSock(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSockopt(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::KProbe(program) => program.load(),
        Program::TracePoint(program) => program.load(),
        Program::LsmCgroup(program) => program.load(LSM_HOOK, &Btf::from_sys_fs()?),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// The LSM hook that lsm_cgroup programs attach to.
const LSM_HOOK: &str = "socket_post_create";

/// The size of a loaded program, as the kernel reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramSize {
    pub name: String,
    /// Instructions that the verifier processed, some of them several times; `None` before 5.16, which does not report them.
    pub verified: Option<u32>,
}

/// Returns the sizes of the loaded programs of an object, by name.
pub(super) fn sizes(ebpf: &Ebpf) -> Vec<ProgramSize> {
    let mut sizes: Vec<_> = ebpf
        .programs()
        .filter_map(|(name, program)| {
            let info = syscall::info(program.fd().ok()?).ok()?;
            let verified = Some(info.verified_insns).filter(|count| *count != 0);
            Some(ProgramSize { name: name.to_owned(), verified })
        })
        .collect();
    sizes.sort_by(|one, other| one.name.cmp(&other.name));
    sizes
}

/// The object without a policy, for probing, with all features of its programs enabled.
pub(super) struct ProbeObject {
    pub(super) ebpf: Ebpf,
    /// Whether the audit can identify the caller of a call; `Err` gives the reason why not.
    pub(super) can_follow: Result<(), String>,
}

pub(super) fn load_for_probe() -> Result<ProbeObject, KernelError> {
    let _memlock = Memlock::raise();
    let info = KernelInfo::gather()?;
    let ebpf = info.loader(true).load(OBJECT)?;
    Ok(ProbeObject { ebpf, can_follow: info.can_follow() })
}

/// Loads the object for programs that make no decisions and record no calls, with maps of these sizes.
pub(super) fn sized(entries: &[(&'static str, u32)], layout: &Layout) -> Result<Ebpf, KernelError> {
    let _memlock = Memlock::raise();
    let mut loader = loader_without_types();
    loader.override_global("LAYOUT", layout, true);
    loader.verifier_log_level(VerifierLogLevel::DEBUG);
    for (map, entries) in entries {
        loader.map_max_entries(map, *entries);
    }
    Ok(loader.load(OBJECT)?)
}
