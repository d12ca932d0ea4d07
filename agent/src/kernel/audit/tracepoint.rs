//! The tracepoints of the two system calls: where there is nothing better.

use std::{io, os::fd::OwnedFd};

use aya::programs::{Program, ProgramError};

use super::{End, Hook, Way, attach_reason, entry, exit};
use crate::{
    host::tracefs,
    kernel::{error::load_reason, object::load_once, syscall},
};

pub(super) static WAYS: [Way; 1] = [Way {
    set: [exit("setsockopt", "trace_end"), entry("setsockopt", "trace_begin"), None, None],
    get: [exit("getsockopt", "trace_end"), entry("getsockopt", "trace_begin"), None, None],
    calls: &[false, true],
    blind_to: &["io_uring", "32-bit programs"],
}];

/// Runs `attach` where tracepoints can be looked up.
pub(super) fn with_tracefs<T: Send>(attach: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    tracefs::with_tracefs(attach)
        .unwrap_or_else(|error| Err(format!("tracefs is not mounted, and cannot be for this alone: {error}")))
}

const CATEGORY: &str = "syscalls";

fn name(system_call: &str, end: End) -> String {
    match end {
        End::Entry => format!("sys_enter_{system_call}"),
        End::Exit => format!("sys_exit_{system_call}"),
    }
}

/// Has the kernel go on looking after these tracepoints until the map that is given is gone, and a moment longer.
///
/// Who closes the last event of a tracepoint waits until no CPU is in it any more, some 35 ms, and for one tracepoint after the
/// other (`perf_trace_event_unreg`, kernel/trace/trace_event_perf.c). So that our programs' events are not the last ones,
/// there is one beside each that counts nothing. The kernel closes those in a worker of its own, for they are in a map
/// (`__bpf_event_entry_free`, kernel/bpf/arraymap.c, and `fput`). Our programs are gone by then.
pub(super) fn linger<'a>(hooks: impl Iterator<Item = &'a Hook> + Send) -> Result<OwnedFd, String> {
    let open = |hook: &Hook| syscall::open_tracepoint(tracefs::tracepoint_id(CATEGORY, &name(hook.point, hook.end))?);
    with_tracefs(|| {
        let events = hooks.map(open).collect::<io::Result<Vec<_>>>();
        events.and_then(|events| syscall::hold_events(&events)).map_err(|error| error.to_string())
    })
}

/// Attaches to one end of a system call.
pub(super) fn attach(program: &mut Program, system_call: &str, end: End) -> Result<(), String> {
    load_once(program).map_err(|error| load_reason(&error))?;
    match program {
        Program::TracePoint(program) => program.attach(CATEGORY, &name(system_call, end)).map(drop),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
    .map_err(|error| attach_reason(&error))
}
