//! What this kernel can do, found by doing it and undoing it.
//!
//! Three answers, never two: that something could not be found out is not the same as that it is
//! not there.

use aya::programs::ProgramError;

use super::{
    Backend, KernelError, ProbeResult, attach_conflict,
    audit::{self, AuditRequest, Visibility},
    error::{chain, load_reason},
    links::Link,
    live,
    object::{self, ProbeObject, ProgramSize},
};
use crate::{
    compile::Hook,
    host::{cgroup::Cgroup, lsm},
};

/// Whether this kernel has an ability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Yes,
    /// The kernel said no, and why.
    No(String),
    /// Something else stood in the way.
    Unknown(String),
}

/// What was tried, and what came of it.
#[derive(Debug)]
pub struct Probed<T, A> {
    pub answers: Vec<(T, A)>,
    /// The programs that were loaded for that.
    pub programs: Vec<ProgramSize>,
}

/// Whether each hook can be loaded and attached, tried on `cgroup`, which must be one's own.
///
/// # Errors
///
/// Where the object cannot be prepared at all.
pub fn hooks(cgroup: &Cgroup) -> Result<Probed<Hook, Answer>, KernelError> {
    let ProbeObject { mut ebpf, .. } = object::load_for_probe()?;
    let mut answers = Vec::new();
    for hook in Hook::ALL {
        let program = ebpf.program_mut(hook.program()).ok_or(KernelError::Incomplete { what: hook.program() })?;
        let answer = match object::load_program(program) {
            Ok(()) if hook == Hook::PostCreate && !lsm::is_bpf_active() => {
                Answer::No("the BPF LSM is not active: `bpf` is not in the boot parameter lsm=".to_owned())
            }
            Err(error) => answer_of(&error),
            Ok(()) => match attach_conflict::check(hook, cgroup, None) {
                // Says nothing about the kernel.
                Err(conflict) => Answer::Unknown(conflict.reason()),
                Ok(()) => {
                    Link::attach(program, hook, cgroup).map_or_else(|error| Answer::No(chain(&error)), |_| Answer::Yes)
                }
            },
        };
        answers.push((hook, answer));
    }
    Ok(Probed { answers, programs: object::sizes(&ebpf) })
}

/// Whether live TCP sockets can be set by a program that the kernel runs for each of them.
///
/// # Errors
///
/// Where the object cannot be prepared at all.
pub fn iterator() -> Result<Probed<&'static str, Answer>, KernelError> {
    live::probe()
}

/// Whether each backend of the audit can be attached. Its programs are inert while this runs.
///
/// # Errors
///
/// Where the object cannot be prepared at all.
pub fn audit_backends() -> Result<Probed<Backend, ProbeResult>, KernelError> {
    const EVERYTHING: AuditRequest = AuditRequest { reads: true, span: Visibility::All };
    let ProbeObject { mut ebpf, can_follow } = object::load_for_probe()?;
    let answer = |backend| {
        let attached = can_follow.clone().and_then(|()| audit::attach_backend(&mut ebpf, backend, EVERYTHING));
        let tried = attached.map(|(audit, events)| {
            events.leave();
            audit
        });
        (backend, tried)
    };
    let answers = Backend::ALL.map(answer).into();
    Ok(Probed { answers, programs: object::sizes(&ebpf) })
}

/// A program that was not loaded for want of rights or memory says nothing about the kernel.
fn answer_of(error: &ProgramError) -> Answer {
    let reason = load_reason(error);
    match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let errno = io_error.raw_os_error();
            let is_ours =
                errno == Some(libc::ENOMEM) || (errno == Some(libc::EPERM) && verifier_log.to_string().is_empty());
            if is_ours { Answer::Unknown(reason) } else { Answer::No(reason) }
        }
        _ => Answer::Unknown(reason),
    }
}
