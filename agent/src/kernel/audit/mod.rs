//! The audit's backends: how setsockopt and getsockopt calls are seen.
//!
//! A backend is a file of its own, which says in which ways it can be had ([`AttachVariant`]), whether this kernel has what it
//! takes, and how one program is attached. Which way works is found by trying, the best one first.

mod fentry;
mod functions;
mod kprobe;
mod tracepoint;

use std::{error::Error, fmt, thread};

use aya::{
    Btf, Ebpf,
    programs::{FEntry, FExit, KProbe, Program, ProgramError, TracePoint},
};

use super::{KernelError, error::chain, syscall};
use crate::{
    host::system,
    policy::model::{self, Calls},
};

/// A kind of hook to see calls with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// fentry and fexit.
    Fentry,
    /// kprobe and kretprobe.
    Kprobe,
    /// The tracepoints of the two system calls.
    Tracepoint,
}

/// Which backend to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum BackendChoice {
    /// The cheapest that this kernel has, but kprobes where it is preemptible: they miss no calls for that.
    #[default]
    Auto,
    Fentry,
    Kprobe,
    Tracepoint,
    /// None: conflicts are reported without the call's result.
    None,
}

/// Whether a backend works here: how, or why not.
pub type ProbeResult = Result<Audit, String>;

/// An audit that is attached, or was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Audit {
    pub backend: Backend,
    way: &'static AttachVariant,
}

/// What holds the programs of an audit at their points, unless they do so themselves.
#[derive(Default)]
pub(super) struct PerfLinks(Vec<tracepoint::Event>);

impl PerfLinks {
    /// Takes the programs from their points, and is done when they are not there any more.
    pub(super) fn take(self) {
        tracepoint::take(self.0);
    }

    /// Leaves that to the kernel, which needs a moment for it. The programs should be inert.
    pub(super) fn leave(self) {
        tracepoint::leave(self.0);
    }
}

/// What an audit is to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AuditRequest {
    /// getsockopt too.
    pub(super) reads: bool,
    pub(super) span: Visibility,
}

/// What of calls is to be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Visibility {
    /// The ends of those that conflict, which the cgroup's hooks have found to do so.
    Ends,
    /// Those that conflict.
    Conflicts,
    /// Those that conflict with nothing too, and with them those on descriptors that are no sockets.
    All,
}

impl AuditRequest {
    /// `can_begin_calls`: whether hooks can begin the records of calls.
    pub(super) fn of(wanted: model::Audit, can_begin_calls: bool) -> Self {
        let span = match wanted.calls {
            Calls::Conflicts if can_begin_calls && !wanted.timing => Visibility::Ends,
            Calls::Conflicts => Visibility::Conflicts,
            Calls::Governed | Calls::All => Visibility::All,
        };
        Self { reads: wanted.reads, span }
    }
}

/// One way of seeing calls: the programs, and where they go.
#[derive(Debug, PartialEq, Eq)]
struct AttachVariant {
    /// Where setsockopt calls are seen, in the order in which to attach.
    set: Hooks,
    get: Hooks,
    /// What it is good for.
    spans: &'static [Visibility],
    /// Calls that are not seen so.
    not_covered: &'static [&'static str],
}

/// What is begun is to be seen to its end: so exits stand before entries.
type Hooks = [Option<Hook>; 4];

/// A program at a point of the kernel: a function, or for tracepoints the name of a system call.
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
    /// From the cheapest to the dearest.
    pub const ALL: [Self; 3] = [Self::Fentry, Self::Kprobe, Self::Tracepoint];

    /// The order in which to try them.
    ///
    /// kprobe programs run with preemption off. fentry programs do not, and while a task is preempted in one, the kernel
    /// leaves it out for every other task on that CPU (`__bpf_prog_enter_recur`, kernel/bpf/trampoline.c, 5.12). With 64
    /// threads on one CPU under 7.2, fentry left out two calls of three, tracepoints four of five (under 6.18 none), kprobes
    /// none.
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

    /// The calls that it does not see on any kernel.
    #[must_use]
    pub fn never_sees(self) -> &'static [&'static str] {
        let ways = self.variants();
        let is_always = ways.iter().all(|way| way.not_covered == ways[0].not_covered);
        if is_always { ways[0].not_covered } else { &[] }
    }

    fn variants(self) -> &'static [AttachVariant] {
        match self {
            Self::Fentry => &fentry::VARIANTS,
            Self::Kprobe => &kprobe::VARIANTS,
            Self::Tracepoint => &tracepoint::VARIANTS,
        }
    }

    /// Runs `attach` where the backend finds what it needs of the system; `Err` says what is missing. Only fentry needs
    /// the kernel's types, which take long to read and much room.
    fn with_system<T: Send>(self, attach: impl FnOnce(Option<&Btf>) -> Result<T, String> + Send) -> Result<T, String> {
        match self {
            Self::Fentry => fentry::types().and_then(|types| attach(Some(&types))),
            Self::Kprobe => kprobe::is_there().and_then(|()| attach(None)),
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
    /// The calls that are not seen.
    #[must_use]
    pub fn not_covered(self) -> &'static [&'static str] {
        self.way.not_covered
    }

    /// The points of the kernel at which setsockopt calls are seen.
    pub fn points(self) -> impl Iterator<Item = &'static str> {
        let hooks = || self.way.set.iter().flatten();
        // Both ends of a point are one.
        let is_last = move |(n, hook): &(usize, &Hook)| !hooks().skip(n + 1).any(|other| other.point == hook.point);
        hooks().enumerate().filter(is_last).map(|(_, hook)| hook.point)
    }

    /// Whether the ends of calls are all that is seen, so that hooks have to begin their records.
    pub(super) fn sees_only_exits(self) -> bool {
        self.way.set.iter().flatten().all(|hook| hook.end == End::Exit)
    }

    /// The programs that may be attached.
    pub(super) fn programs(self) -> impl Iterator<Item = &'static str> {
        self.way.programs()
    }

    /// Takes the programs out of the kernel.
    pub(super) fn unload(self, ebpf: &mut Ebpf) {
        self.way.unload(ebpf);
    }
}

impl AttachVariant {
    fn programs(&self) -> impl Iterator<Item = &'static str> {
        [&self.set, &self.get].into_iter().flatten().flatten().map(|hook| hook.program)
    }

    /// Where what it is to see is seen, in the order in which to attach.
    fn hooks(&self, aim: AuditRequest) -> impl Iterator<Item = &Hook> {
        [&self.set, &self.get].into_iter().take(if aim.reads { 2 } else { 1 }).flatten().flatten()
    }

    /// All at once: for each the kernel waits until all CPUs have left it.
    fn unload(&self, ebpf: &mut Ebpf) {
        let is_ours = |name: &str| self.programs().any(|ours| ours == name);
        thread::scope(|scope| {
            for (name, program) in ebpf.programs_mut().filter(|(name, program)| is_ours(name) && program.fd().is_ok()) {
                scope.spawn(move || unload(name, program));
            }
        });
    }
}

/// Attaches the backend of choice; gives the one that was taken.
pub(super) fn attach(
    ebpf: &mut Ebpf,
    choice: BackendChoice,
    aim: AuditRequest,
) -> Result<Option<(Audit, PerfLinks)>, KernelError> {
    match candidates(choice)[..] {
        [] => Ok(None),
        [backend] => {
            attach_backend(ebpf, backend, aim).map(Some).map_err(|reason| KernelError::Backend { backend, reason })
        }
        ref several => attach_best(ebpf, several, aim).map(Some),
    }
}

/// The programs that will most likely be attached, as far as they can be loaded before that is known: those of fentry are made
/// for the function that they go to.
pub(super) fn likely(choice: BackendChoice, aim: AuditRequest) -> Vec<&'static str> {
    let is_likely = |backend: &Backend| match backend {
        Backend::Fentry => syscall::check_tracing().is_ok(),
        Backend::Kprobe => kprobe::is_there().is_ok(),
        Backend::Tracepoint => true,
    };
    let backend = candidates(choice).into_iter().find(is_likely).filter(|backend| *backend != Backend::Fentry);
    let way = backend.and_then(|backend| backend.variants().iter().find(|way| way.spans.contains(&aim.span)));
    way.map_or(Vec::new(), |way| way.hooks(aim).map(|hook| hook.program).collect())
}

/// The backends that are tried, in that order.
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

fn attach_best(ebpf: &mut Ebpf, backends: &[Backend], aim: AuditRequest) -> Result<(Audit, PerfLinks), KernelError> {
    let mut reasons = Vec::new();
    for backend in backends.iter().copied() {
        match attach_backend(ebpf, backend, aim) {
            Ok(attached) => return Ok(attached),
            Err(reason) => {
                log::debug!("the audit cannot use {backend}: {reason}");
                reasons.push(format!("{backend}: {reason}"));
            }
        }
    }
    Err(KernelError::NoBackend { reasons: reasons.join("; ") })
}

/// Attaches all programs of a backend, or none.
pub(super) fn attach_backend(
    ebpf: &mut Ebpf,
    backend: Backend,
    aim: AuditRequest,
) -> Result<(Audit, PerfLinks), String> {
    let (way, events) = backend.with_system(|types| {
        let mut reasons = Vec::new();
        for way in backend.variants().iter().filter(|way| way.spans.contains(&aim.span)) {
            match attach_variant(ebpf, backend, way, aim, types) {
                Ok(events) => return Ok((way, events)),
                // Several ways may fail at the same function.
                Err(reason) if reasons.contains(&reason) => {}
                Err(reason) => reasons.push(reason),
            }
        }
        Err(reasons.join("; "))
    })?;
    Ok((Audit { backend, way }, events))
}

fn attach_variant(
    ebpf: &mut Ebpf,
    backend: Backend,
    way: &AttachVariant,
    aim: AuditRequest,
    types: Option<&Btf>,
) -> Result<PerfLinks, String> {
    let attached: Result<Vec<_>, _> = way.hooks(aim).map(|hook| attach_program(ebpf, backend, hook, types)).collect();
    if attached.is_err() {
        way.unload(ebpf);
    }
    Ok(PerfLinks(attached?.into_iter().flatten().collect()))
}

fn attach_program(
    ebpf: &mut Ebpf,
    backend: Backend,
    hook: &Hook,
    types: Option<&Btf>,
) -> Result<Option<tracepoint::Event>, String> {
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

/// Why the kernel does not attach a program.
fn attach_reason(error: &(dyn Error + 'static)) -> String {
    /// Debian and Ubuntu ask for more than CAP_PERFMON where kernel.perf_event_paranoid is above what other kernels know.
    const PARANOID: &str = " (this takes CAP_SYS_ADMIN here unless sysctl kernel.perf_event_paranoid is 2 or less)";
    let reason = chain(error);
    let why = if reason.contains("perf_event_open") && reason.contains("os error 13)") { PARANOID } else { "" };
    format!("{reason}{why}")
}

/// Takes a program out of the kernel again, with its links.
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
    fn fentry_comes_first_where_nothing_is_preempted_in_it() {
        assert_eq!(Backend::by_preference(false).map(Backend::name), ["fentry", "kprobe", "tracepoint"]);
        assert_eq!(Backend::by_preference(true).map(Backend::name), ["kprobe", "fentry", "tracepoint"]);
    }
}
