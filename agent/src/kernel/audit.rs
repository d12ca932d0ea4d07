//! The audit's backends: how setsockopt and getsockopt calls are seen.

use std::{fmt, path::Path};

use aya::{
    Ebpf,
    programs::{KProbe, Program, ProgramError, TracePoint},
};

use super::{
    KernelError,
    error::{chain, load_reason},
};
use crate::host::tracefs;

/// A kind of hook to see calls with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// kprobe and kretprobe on `__sys_setsockopt` and `__sys_getsockopt`.
    Kprobe,
    /// The tracepoints of the two syscalls.
    Tracepoint,
}

/// Which backend to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum BackendChoice {
    /// The best that this kernel has.
    #[default]
    Auto,
    Kprobe,
    Tracepoint,
    /// None: conflicts are reported without the call's result.
    None,
}

/// Where one program of a backend goes.
struct Probe {
    program: &'static str,
    /// A function of the kernel, or a tracepoint of the category `syscalls`.
    point: &'static str,
}

impl Backend {
    /// In the order in which they are tried.
    pub const ALL: [Self; 2] = [Self::Kprobe, Self::Tracepoint];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kprobe => "kprobe",
            Self::Tracepoint => "tracepoint",
        }
    }

    /// The calls that this backend does not see.
    #[must_use]
    pub fn blind_to(self) -> &'static str {
        match self {
            Self::Kprobe => "io_uring",
            Self::Tracepoint => "io_uring, 32-bit programs",
        }
    }

    /// Those for getsockopt only if `reads`. Exits first: an entry without its exit would be noted and never reported.
    fn probes(self, reads: bool) -> Vec<Probe> {
        let probe = |program, point| Probe { program, point };
        let [sets, gets] = match self {
            Self::Kprobe => [
                [probe("kretprobe_set", "__sys_setsockopt"), probe("kprobe_set", "__sys_setsockopt")],
                [probe("kretprobe_get", "__sys_getsockopt"), probe("kprobe_get", "__sys_getsockopt")],
            ],
            Self::Tracepoint => [
                [probe("trace_set_exit", "sys_exit_setsockopt"), probe("trace_set", "sys_enter_setsockopt")],
                [probe("trace_get_exit", "sys_exit_getsockopt"), probe("trace_get", "sys_enter_getsockopt")],
            ],
        };
        sets.into_iter().chain(gets.into_iter().filter(|_| reads)).collect()
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Attaches the backend of choice, for getsockopt too if `reads`; gives the one that was taken.
pub(super) fn attach(ebpf: &mut Ebpf, choice: BackendChoice, reads: bool) -> Result<Option<Backend>, KernelError> {
    let backend = match choice {
        BackendChoice::None => return Ok(None),
        BackendChoice::Auto => return attach_best(ebpf, reads),
        BackendChoice::Kprobe => Backend::Kprobe,
        BackendChoice::Tracepoint => Backend::Tracepoint,
    };
    attach_backend(ebpf, backend, reads).map_err(|reason| KernelError::Backend { backend, reason })?;
    Ok(Some(backend))
}

fn attach_best(ebpf: &mut Ebpf, reads: bool) -> Result<Option<Backend>, KernelError> {
    let mut reasons = Vec::new();
    for backend in Backend::ALL {
        match attach_backend(ebpf, backend, reads) {
            Ok(()) => return Ok(Some(backend)),
            Err(reason) => {
                log::debug!("the audit cannot use {backend}: {reason}");
                reasons.push(format!("{backend}: {reason}"));
            }
        }
    }
    Err(KernelError::NoBackend { reasons: reasons.join("; ") })
}

/// Where the kernel says how to ask for a kprobe, if it has them.
const KPROBES: &str = "/sys/bus/event_source/devices/kprobe/type";

/// Attaches all programs of a backend, or none.
pub(super) fn attach_backend(ebpf: &mut Ebpf, backend: Backend, reads: bool) -> Result<(), String> {
    let probes = backend.probes(reads);
    let mut attach = || probes.iter().try_for_each(|probe| attach_probe(ebpf, probe));
    let result = match backend {
        Backend::Kprobe if !Path::new(KPROBES).exists() => Err("this kernel is built without kprobes".to_owned()),
        Backend::Kprobe => attach(),
        Backend::Tracepoint => tracefs::with_tracefs(&mut attach)
            .unwrap_or_else(|error| Err(format!("tracefs is not mounted, and cannot be for this alone: {error}"))),
    };
    if result.is_err() {
        for probe in &probes {
            unload(ebpf, probe.program);
        }
    }
    result
}

fn attach_probe(ebpf: &mut Ebpf, probe: &Probe) -> Result<(), String> {
    let program = ebpf.program_mut(probe.program).ok_or_else(|| format!("no program {}", probe.program))?;
    super::object::load_program(program).map_err(|error| load_reason(&error))?;
    let attached = match program {
        Program::KProbe(program) => program.attach(probe.point, 0).map(drop),
        Program::TracePoint(program) => program.attach("syscalls", probe.point).map(drop),
        _ => Err(ProgramError::UnexpectedProgramType),
    };
    attached.map_err(|error| {
        let reason = chain(&error);
        let why = if reason.contains("perf_event_open") && reason.contains("os error 13)") { PARANOID } else { "" };
        format!("{}: {reason}{why}", probe.point)
    })
}

/// Debian and Ubuntu ask for more than CAP_PERFMON where kernel.perf_event_paranoid is above what other kernels know.
const PARANOID: &str = " (this takes CAP_SYS_ADMIN here unless sysctl kernel.perf_event_paranoid is 2 or less)";

/// Takes a program out of the kernel again, with its links.
fn unload(ebpf: &mut Ebpf, program: &str) {
    let result = match ebpf.program_mut(program) {
        Some(Program::KProbe(program)) => unload_unless_never_loaded(KProbe::unload(program)),
        Some(Program::TracePoint(program)) => unload_unless_never_loaded(TracePoint::unload(program)),
        _ => Ok(()),
    };
    if let Err(error) = result {
        log::debug!("cannot unload {program}: {error}");
    }
}

fn unload_unless_never_loaded(result: Result<(), ProgramError>) -> Result<(), ProgramError> {
    match result {
        Err(ProgramError::NotLoaded) => Ok(()),
        other => other,
    }
}
