//! Probes what this kernel supports, by doing it and undoing it.
//!
//! There are three answers: a probe that failed for another reason does not mean that the kernel lacks the feature.

use aya::programs::ProgramError;

use super::{
    Backend, KernelError, ProbeResult, attach_conflict,
    audit::{self, AuditRequest, Visibility},
    error::{chain, load_reason},
    links::Link,
    live,
    loader::{self, ProbeObject, ProgramSize},
};
use crate::{
    compile::Hook,
    host::{cgroup::Cgroup, lsm},
};

/// Whether this kernel supports a feature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Yes,
    /// The kernel refused, for this reason.
    No(String),
    /// The probe failed for another reason.
    Unknown(String),
}

/// The results of probes.
#[derive(Debug)]
pub struct Probed<T, A> {
    pub answers: Vec<(T, A)>,
    /// The programs that were loaded for the probes.
    pub programs: Vec<ProgramSize>,
}

/// Probes whether each hook's program can be loaded, and attached to `cgroup`, which must belong to this process alone.
///
/// # Errors
///
/// Fails if the object cannot be loaded.
pub fn hooks(cgroup: &Cgroup) -> Result<Probed<Hook, Answer>, KernelError> {
    let ProbeObject { mut ebpf, .. } = loader::load_for_probe()?;
    let mut answers = Vec::new();
    for hook in Hook::ALL {
        let program = ebpf.program_mut(hook.program()).ok_or(KernelError::Incomplete { what: hook.program() })?;
        let answer = match loader::load_program(program) {
            Ok(()) if hook == Hook::PostCreate && !lsm::is_bpf_active() => {
                Answer::No("the BPF LSM is not active: `bpf` is not in the boot parameter lsm=".to_owned())
            }
            Err(error) => answer_of(&error),
            Ok(()) => match attach_conflict::check(hook, cgroup, None) {
                // A conflict says nothing about the kernel.
                Err(conflict) => Answer::Unknown(conflict.reason()),
                Ok(()) => {
                    Link::attach(program, hook, cgroup).map_or_else(|error| Answer::No(chain(&error)), |_| Answer::Yes)
                }
            },
        };
        answers.push((hook, answer));
    }
    Ok(Probed { answers, programs: loader::sizes(&ebpf) })
}

/// Probes whether a program that the kernel runs for each existing TCP socket can set options.
///
/// # Errors
///
/// Fails if the object cannot be loaded.
pub fn iterator() -> Result<Probed<&'static str, Answer>, KernelError> {
    live::probe()
}

/// Probes whether each backend of the audit can be attached. The programs are inert meanwhile.
///
/// # Errors
///
/// Fails if the object cannot be loaded.
pub fn audit_backends() -> Result<Probed<Backend, ProbeResult>, KernelError> {
    const ALL_CALLS: AuditRequest = AuditRequest { reads: true, visibility: Visibility::All };
    let ProbeObject { mut ebpf, can_follow } = loader::load_for_probe()?;
    let probe = |backend| {
        let attached = can_follow.clone().and_then(|()| audit::attach_backend(&mut ebpf, backend, ALL_CALLS));
        let answer = attached.map(|(audit, perf_links)| {
            perf_links.detach_in_background();
            audit
        });
        (backend, answer)
    };
    let answers = Backend::ALL.map(probe).into();
    Ok(Probed { answers, programs: loader::sizes(&ebpf) })
}

/// Returns the answer for a program that could not be loaded. Missing capabilities or memory say nothing about the kernel.
fn answer_of(error: &ProgramError) -> Answer {
    let reason = load_reason(error);
    match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let errno = io_error.raw_os_error();
            let is_environment =
                errno == Some(libc::ENOMEM) || (errno == Some(libc::EPERM) && verifier_log.to_string().is_empty());
            if is_environment { Answer::Unknown(reason) } else { Answer::No(reason) }
        }
        _ => Answer::Unknown(reason),
    }
}
