//! The audit's backends: how setsockopt and getsockopt calls are seen.
//!
//! A backend is a file of its own, which says in which ways it can be had ([`Way`]), whether this kernel has what it
//! takes, and how one program is attached. Which way works is found by trying, the best one first.

mod fentry;
mod kprobe;
mod tracepoint;

use std::fmt;

use aya::{
    Btf, Ebpf,
    programs::{FEntry, FExit, KProbe, Program, ProgramError, TracePoint},
};

use super::{KernelError, error::chain};

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
    /// The cheapest that this kernel has.
    #[default]
    Auto,
    Fentry,
    Kprobe,
    Tracepoint,
    /// None: conflicts are reported without the call's result.
    None,
}

/// Whether a backend works here: how, or why not.
pub type Tried = Result<Audit, String>;

/// An audit that is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Audit {
    pub backend: Backend,
    way: &'static Way,
}

/// One way of seeing calls: the programs, and where they go.
#[derive(Debug, PartialEq, Eq)]
struct Way {
    set: Ends,
    get: Ends,
    /// Calls that are not seen so.
    blind_to: &'static [&'static str],
}

/// Both ends of a call, at one point of the kernel: a function, or for tracepoints the name of a system call.
#[derive(Debug, PartialEq, Eq)]
struct Ends {
    point: &'static str,
    entry: &'static str,
    exit: &'static str,
}

/// What the system calls and io_uring have in common, since 6.7, is reached only once the socket is found: calls that fail
/// with EBADF or ENOTSOCK are over by then.
const BLIND_TO_BAD_DESCRIPTORS: &[&str] = &["descriptors that are no sockets"];
/// Before 6.7 io_uring has no such calls. A kernel that has them but not the common functions is not known; if there is
/// one, this is true of it.
const BLIND_TO_RINGS: &[&str] = &["io_uring"];

impl Backend {
    /// From the cheapest to the dearest, which is the order in which they are tried.
    pub const ALL: [Self; 3] = [Self::Fentry, Self::Kprobe, Self::Tracepoint];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fentry => "fentry",
            Self::Kprobe => "kprobe",
            Self::Tracepoint => "tracepoint",
        }
    }

    fn ways(self) -> &'static [Way] {
        match self {
            Self::Fentry => fentry::WAYS,
            Self::Kprobe => kprobe::WAYS,
            Self::Tracepoint => tracepoint::WAYS,
        }
    }

    /// Runs `attach` where the backend finds what it needs of the system; `Err` says what is missing. Only fentry needs
    /// the kernel's types, which take long to read and much room.
    fn with_system(
        self,
        attach: impl FnOnce(Option<&Btf>) -> Result<&'static Way, String> + Send,
    ) -> Result<&'static Way, String> {
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
    pub fn blind_to(self) -> &'static [&'static str] {
        self.way.blind_to
    }

    /// The point of the kernel at which setsockopt calls are seen.
    #[must_use]
    pub fn point(self) -> &'static str {
        self.way.set.point
    }

    /// The programs that may be attached.
    pub(super) fn programs(self) -> [&'static str; 4] {
        let Way { set, get, .. } = self.way;
        [set.entry, set.exit, get.entry, get.exit]
    }
}

/// Attaches the backend of choice, for getsockopt too if `reads`; gives the one that was taken.
pub(super) fn attach(ebpf: &mut Ebpf, choice: BackendChoice, reads: bool) -> Result<Option<Audit>, KernelError> {
    let backend = match choice {
        BackendChoice::None => return Ok(None),
        BackendChoice::Auto => return attach_best(ebpf, reads).map(Some),
        BackendChoice::Fentry => Backend::Fentry,
        BackendChoice::Kprobe => Backend::Kprobe,
        BackendChoice::Tracepoint => Backend::Tracepoint,
    };
    attach_backend(ebpf, backend, reads).map(Some).map_err(|reason| KernelError::Backend { backend, reason })
}

fn attach_best(ebpf: &mut Ebpf, reads: bool) -> Result<Audit, KernelError> {
    let mut reasons = Vec::new();
    for backend in Backend::ALL {
        match attach_backend(ebpf, backend, reads) {
            Ok(audit) => return Ok(audit),
            Err(reason) => {
                log::debug!("the audit cannot use {backend}: {reason}");
                reasons.push(format!("{backend}: {reason}"));
            }
        }
    }
    Err(KernelError::NoBackend { reasons: reasons.join("; ") })
}

/// Attaches all programs of a backend, or none.
pub(super) fn attach_backend(ebpf: &mut Ebpf, backend: Backend, reads: bool) -> Tried {
    let way = backend.with_system(|types| {
        let mut reasons = Vec::new();
        for way in backend.ways() {
            match attach_way(ebpf, backend, way, reads, types) {
                Ok(()) => return Ok(way),
                Err(reason) => reasons.push(reason),
            }
        }
        Err(reasons.join("; "))
    })?;
    Ok(Audit { backend, way })
}

fn attach_way(ebpf: &mut Ebpf, backend: Backend, way: &Way, reads: bool, types: Option<&Btf>) -> Result<(), String> {
    let calls = [&way.set, &way.get];
    let wanted = &calls[..if reads { 2 } else { 1 }];
    // Exits first: an entry without its exit would be noted and never reported.
    let attached = wanted.iter().try_for_each(|ends| {
        attach_program(ebpf, backend, ends, End::Exit, types)?;
        attach_program(ebpf, backend, ends, End::Entry, types)
    });
    if attached.is_err() {
        for ends in calls {
            unload(ebpf, ends.entry);
            unload(ebpf, ends.exit);
        }
    }
    attached
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Entry,
    Exit,
}

fn attach_program(ebpf: &mut Ebpf, backend: Backend, ends: &Ends, end: End, types: Option<&Btf>) -> Result<(), String> {
    let (name, point) = (if end == End::Entry { ends.entry } else { ends.exit }, ends.point);
    let program = ebpf.program_mut(name).ok_or_else(|| format!("no program {name}"))?;
    let attached = match (backend, types) {
        (Backend::Fentry, Some(types)) => fentry::attach(program, point, types),
        (Backend::Fentry, None) => Err("the kernel's BTF was not read".to_owned()),
        (Backend::Kprobe, _) => kprobe::attach(program, point),
        (Backend::Tracepoint, _) => tracepoint::attach(program, point, end),
    };
    attached.map_err(|reason| format!("{point}: {reason}"))
}

/// Why the kernel does not attach a program.
fn attach_reason(error: &ProgramError) -> String {
    /// Debian and Ubuntu ask for more than CAP_PERFMON where kernel.perf_event_paranoid is above what other kernels know.
    const PARANOID: &str = " (this takes CAP_SYS_ADMIN here unless sysctl kernel.perf_event_paranoid is 2 or less)";
    let reason = chain(error);
    let why = if reason.contains("perf_event_open") && reason.contains("os error 13)") { PARANOID } else { "" };
    format!("{reason}{why}")
}

/// Takes a program out of the kernel again, with its links.
fn unload(ebpf: &mut Ebpf, program: &str) {
    let result = match ebpf.program_mut(program) {
        Some(Program::FEntry(program)) => FEntry::unload(program),
        Some(Program::FExit(program)) => FExit::unload(program),
        Some(Program::KProbe(program)) => KProbe::unload(program),
        Some(Program::TracePoint(program)) => TracePoint::unload(program),
        _ => Ok(()),
    };
    match result {
        Ok(()) | Err(ProgramError::NotLoaded) => {}
        Err(error) => log::debug!("cannot unload {program}: {error}"),
    }
}
