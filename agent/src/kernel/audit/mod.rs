//! The backends of the audit, which see setsockopt and getsockopt calls.
//!
//! Each backend has a file, which lists its variants ([`AttachVariant`]), checks what the kernel must have for them, and
//! attaches one program. The variants are tried in order, the best one first.

mod fentry;
mod functions;
mod kprobe;
mod tracepoint;

use std::{error::Error, fmt, thread};

use aya::{
    Btf, Ebpf,
    programs::{FEntry, FExit, KProbe, Program, ProgramError, TracePoint},
    sys::SyscallError,
};

use super::{
    KernelError,
    error::{chain, failed_call},
    syscall,
};
use crate::{
    host::system,
    policy::model::{self, Calls},
};

/// A kind of hook that sees calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// fentry and fexit.
    Fentry,
    /// kprobe and kretprobe.
    Kprobe,
    /// The tracepoints of the two system calls.
    Tracepoint,
}

/// The backend to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendChoice {
    /// The cheapest backend that this kernel supports. On preemptible kernels kprobes, which miss no calls because of
    /// preemption.
    #[default]
    Auto,
    Fentry,
    Kprobe,
    Tracepoint,
    /// No backend: conflicts are reported without the result of the call.
    None,
}

/// The audit that a backend attached, or the reason why it cannot.
pub type ProbeResult = Result<Audit, String>;

/// An audit that is or was attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Audit {
    pub backend: Backend,
    variant: &'static AttachVariant,
}

/// The perf events that attach the programs of an audit. Empty for backends that aya attaches.
#[derive(Default)]
pub(super) struct PerfLinks(Vec<tracepoint::PerfEvent>);

impl PerfLinks {
    /// Detaches the programs, and waits until they are detached.
    pub(super) fn detach(self) {
        tracepoint::detach(self.0);
    }

    /// Lets the kernel detach the programs, within some milliseconds. The programs should be inert.
    pub(super) fn detach_in_background(self) {
        tracepoint::detach_in_background(self.0);
    }
}

/// What an audit must see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AuditRequest {
    /// Whether getsockopt calls must be seen too.
    pub(super) reads: bool,
    pub(super) visibility: Visibility,
}

/// Which calls must be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Visibility {
    /// The exits of conflicting calls. The cgroup's hooks have found these calls to conflict.
    Exits,
    /// The conflicting calls.
    Conflicts,
    /// All calls, also those on descriptors that are not sockets.
    All,
}

impl AuditRequest {
    /// Returns what an audit of this configuration must see. `can_begin_calls` is whether hooks can begin the records of calls.
    pub(super) fn of(wanted: model::Audit, can_begin_calls: bool) -> Self {
        let visibility = match wanted.calls {
            Calls::Conflicts if can_begin_calls && !wanted.timing => Visibility::Exits,
            Calls::Conflicts => Visibility::Conflicts,
            Calls::Governed | Calls::All => Visibility::All,
        };
        Self { reads: wanted.reads, visibility }
    }
}

/// A way to see calls: programs, and the points to attach them to.
#[derive(Debug, PartialEq, Eq)]
struct AttachVariant {
    /// The hooks for setsockopt calls, in the order in which to attach.
    set: Hooks,
    get: Hooks,
    /// What the variant can see.
    visibilities: &'static [Visibility],
    /// The calls that the variant does not see.
    not_covered: &'static [&'static str],
}

/// Exits come before entries, so that the exit of each recorded call is seen.
type Hooks = [Option<Hook>; 4];

/// A program at a point of the kernel. The point is a function, or for tracepoints the name of a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hook {
    end: End,
    point: &'static str,
    program: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Entry,
    Exit,
}

const fn entry(point: &'static str, program: &'static str) -> Option<Hook> {
    Some(Hook { end: End::Entry, point, program })
}

const fn exit(point: &'static str, program: &'static str) -> Option<Hook> {
    Some(Hook { end: End::Exit, point, program })
}

impl Backend {
    /// From the cheapest to the most expensive.
    pub const ALL: [Self; 3] = [Self::Fentry, Self::Kprobe, Self::Tracepoint];

    /// Returns the order in which to try the backends.
    ///
    /// kprobe programs run with preemption disabled, fentry programs do not. While a task is preempted in a fentry program, the
    /// kernel skips that program for every other task on that CPU (`__bpf_prog_enter_recur`, kernel/bpf/trampoline.c, 5.12).
    /// Measured with 64 threads on one CPU under 7.2: fentry missed two calls of three, tracepoints four of five, kprobes none.
    /// Under 6.18, tracepoints missed none.
    fn by_preference(is_preemptible: bool) -> [Self; 3] {
        if is_preemptible { [Self::Kprobe, Self::Fentry, Self::Tracepoint] } else { Self::ALL }
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fentry => "fentry",
            Self::Kprobe => "kprobe",
            Self::Tracepoint => "tracepoint",
        }
    }

    /// Returns the calls that the backend does not see on any kernel.
    #[must_use]
    pub fn never_sees(self) -> &'static [&'static str] {
        let variants = self.variants();
        let is_always = variants.iter().all(|variant| variant.not_covered == variants[0].not_covered);
        if is_always { variants[0].not_covered } else { &[] }
    }

    fn variants(self) -> &'static [AttachVariant] {
        match self {
            Self::Fentry => &fentry::VARIANTS,
            Self::Kprobe => &kprobe::VARIANTS,
            Self::Tracepoint => &tracepoint::VARIANTS,
        }
    }

    /// Runs `attach` if the system has what the backend needs; `Err` names what is missing. Only fentry needs the kernel's BTF,
    /// which takes long to read and much memory.
    fn with_system<T: Send>(self, attach: impl FnOnce(Option<&Btf>) -> Result<T, String> + Send) -> Result<T, String> {
        match self {
            Self::Fentry => fentry::read_btf().and_then(|types| attach(Some(&types))),
            Self::Kprobe => kprobe::check().and_then(|()| attach(None)),
            Self::Tracepoint => tracepoint::with_tracefs(|| attach(None)),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Audit {
    /// Returns the calls that are not seen.
    #[must_use]
    pub fn not_covered(self) -> &'static [&'static str] {
        self.variant.not_covered
    }

    /// Returns the points of the kernel at which setsockopt calls are seen, each once.
    pub fn points(self) -> impl Iterator<Item = &'static str> {
        let hooks = || self.variant.set.iter().flatten();
        // Entry and exit of a point count once.
        let is_last = move |(n, hook): &(usize, &Hook)| !hooks().skip(n + 1).any(|other| other.point == hook.point);
        hooks().enumerate().filter(is_last).map(|(_, hook)| hook.point)
    }

    /// Returns whether only exits are seen, so that hooks must begin the records of calls.
    pub(super) fn sees_only_exits(self) -> bool {
        self.variant.set.iter().flatten().all(|hook| hook.end == End::Exit)
    }

    /// Returns the programs that may be attached.
    pub(super) fn programs(self) -> impl Iterator<Item = &'static str> {
        self.variant.programs()
    }

    /// Unloads the programs.
    pub(super) fn unload(self, ebpf: &mut Ebpf) {
        self.variant.unload(ebpf);
    }
}

impl AttachVariant {
    fn programs(&self) -> impl Iterator<Item = &'static str> {
        [&self.set, &self.get].into_iter().flatten().flatten().map(|hook| hook.program)
    }

    /// Returns the hooks for a request, in the order in which to attach.
    fn hooks(&self, request: AuditRequest) -> impl Iterator<Item = &Hook> {
        [&self.set, &self.get].into_iter().take(if request.reads { 2 } else { 1 }).flatten().flatten()
    }

    /// Unloads the programs in parallel: for each the kernel waits until no CPU runs it.
    fn unload(&self, ebpf: &mut Ebpf) {
        let is_ours = |name: &str| self.programs().any(|ours| ours == name);
        thread::scope(|scope| {
            for (name, program) in ebpf.programs_mut().filter(|(name, program)| is_ours(name) && program.fd().is_ok()) {
                scope.spawn(move || unload(name, program));
            }
        });
    }
}

/// Attaches the chosen backend. Returns the audit that was attached; `None` for [`BackendChoice::None`].
pub(super) fn attach(
    ebpf: &mut Ebpf,
    choice: BackendChoice,
    request: AuditRequest,
) -> Result<Option<(Audit, PerfLinks)>, KernelError> {
    match candidates(choice)[..] {
        [] => Ok(None),
        [backend] => {
            attach_backend(ebpf, backend, request).map(Some).map_err(|reason| KernelError::Backend { backend, reason })
        }
        ref several => attach_best(ebpf, several, request).map(Some),
    }
}

/// Returns the programs that will most likely be attached. None for fentry: its programs can only be loaded for a known
/// function.
pub(super) fn likely(choice: BackendChoice, request: AuditRequest) -> Vec<&'static str> {
    let is_likely = |backend: &Backend| match backend {
        Backend::Fentry => syscall::check_tracing().is_ok(),
        Backend::Kprobe => kprobe::check().is_ok(),
        Backend::Tracepoint => true,
    };
    let backend = candidates(choice).into_iter().find(is_likely).filter(|backend| *backend != Backend::Fentry);
    let variant = backend.and_then(|backend| {
        backend.variants().iter().find(|variant| variant.visibilities.contains(&request.visibility))
    });
    variant.map_or(Vec::new(), |variant| variant.hooks(request).map(|hook| hook.program).collect())
}

/// Returns the backends to try, in that order.
#[must_use]
pub fn candidates(choice: BackendChoice) -> Vec<Backend> {
    match choice {
        BackendChoice::Auto => Backend::by_preference(system::is_preemptible()).into(),
        BackendChoice::None => Vec::new(),
        BackendChoice::Fentry => vec![Backend::Fentry],
        BackendChoice::Kprobe => vec![Backend::Kprobe],
        BackendChoice::Tracepoint => vec![Backend::Tracepoint],
    }
}

fn attach_best(
    ebpf: &mut Ebpf,
    backends: &[Backend],
    request: AuditRequest,
) -> Result<(Audit, PerfLinks), KernelError> {
    let mut reasons = Vec::new();
    for backend in backends.iter().copied() {
        match attach_backend(ebpf, backend, request) {
            Ok(attached) => return Ok(attached),
            Err(reason) => {
                log::debug!("cannot attach the audit by {backend}: {reason}");
                reasons.push(format!("{backend}: {reason}"));
            }
        }
    }
    Err(KernelError::NoBackend { reasons: reasons.join("; ") })
}

/// Attaches all programs of a backend or, on an error, none.
pub(super) fn attach_backend(
    ebpf: &mut Ebpf,
    backend: Backend,
    request: AuditRequest,
) -> Result<(Audit, PerfLinks), String> {
    let (variant, perf_links) = backend.with_system(|types| {
        let mut reasons = Vec::new();
        for variant in backend.variants().iter().filter(|variant| variant.visibilities.contains(&request.visibility)) {
            match attach_variant(ebpf, backend, variant, request, types) {
                Ok(perf_links) => return Ok((variant, perf_links)),
                // Several variants may fail at the same function.
                Err(reason) if reasons.contains(&reason) => {}
                Err(reason) => reasons.push(reason),
            }
        }
        Err(reasons.join("; "))
    })?;
    Ok((Audit { backend, variant }, perf_links))
}

fn attach_variant(
    ebpf: &mut Ebpf,
    backend: Backend,
    variant: &AttachVariant,
    request: AuditRequest,
    types: Option<&Btf>,
) -> Result<PerfLinks, String> {
    let attached: Result<Vec<_>, _> =
        variant.hooks(request).map(|hook| attach_program(ebpf, backend, hook, types)).collect();
    if attached.is_err() {
        variant.unload(ebpf);
    }
    Ok(PerfLinks(attached?.into_iter().flatten().collect()))
}

fn attach_program(
    ebpf: &mut Ebpf,
    backend: Backend,
    hook: &Hook,
    types: Option<&Btf>,
) -> Result<Option<tracepoint::PerfEvent>, String> {
    let Hook { end, point, program } = *hook;
    let program = ebpf.program_mut(program).ok_or_else(|| format!("no program {program}"))?;
    let attached = match (backend, types) {
        (Backend::Fentry, Some(types)) => fentry::attach(program, point, types).map(|()| None),
        (Backend::Fentry, None) => Err("the kernel's BTF was not read".to_owned()),
        (Backend::Kprobe, _) => kprobe::attach(program, point).map(|()| None),
        (Backend::Tracepoint, _) => tracepoint::attach(program, point, end).map(Some),
    };
    attached.map_err(|reason| format!("{point}: {reason}"))
}

/// Returns why the kernel refused to attach a program.
fn attach_reason(error: &(dyn Error + 'static)) -> String {
    /// Debian and Ubuntu require more than CAP_PERFMON if kernel.perf_event_paranoid is above 2, the highest level of other
    /// kernels.
    const PARANOID_HELP: &str =
        " (this takes CAP_SYS_ADMIN here unless sysctl kernel.perf_event_paranoid is 2 or less)";
    let reason = chain(error);
    let is_refused = |failed: &SyscallError| {
        failed.call == "perf_event_open" && failed.io_error.raw_os_error() == Some(libc::EACCES)
    };
    let why = if failed_call(error).is_some_and(is_refused) { PARANOID_HELP } else { "" };
    format!("{reason}{why}")
}

/// Unloads a program and detaches its links.
fn unload(name: &str, program: &mut Program) {
    let result = match program {
        Program::FEntry(program) => FEntry::unload(program),
        Program::FExit(program) => FExit::unload(program),
        Program::KProbe(program) => KProbe::unload(program),
        Program::TracePoint(program) => TracePoint::unload(program),
        _ => Ok(()),
    };
    match result {
        Ok(()) | Err(ProgramError::NotLoaded) => {}
        Err(error) => log::debug!("cannot unload {name}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fentry_is_preferred_unless_the_kernel_is_preemptible() {
        assert_eq!(Backend::by_preference(false).map(Backend::name), ["fentry", "kprobe", "tracepoint"]);
        assert_eq!(Backend::by_preference(true).map(Backend::name), ["kprobe", "fentry", "tracepoint"]);
    }
}
