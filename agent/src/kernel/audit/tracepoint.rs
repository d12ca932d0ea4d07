//! The tracepoints of the two system calls: where there is nothing better.

use aya::programs::{Program, ProgramError};

use super::{End, Way, attach_reason, entry, exit};
use crate::{
    host::tracefs,
    kernel::{error::load_reason, object::load_once},
};

pub(super) static WAYS: [Way; 1] = [Way {
    set: [exit("setsockopt", "trace_set_end"), entry("setsockopt", "trace_set"), None, None],
    get: [exit("getsockopt", "trace_get_end"), entry("getsockopt", "trace_get"), None, None],
    calls: &[false, true],
    blind_to: &["io_uring", "32-bit programs"],
}];

/// Runs `attach` where tracepoints can be looked up.
pub(super) fn with_tracefs<T: Send>(attach: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    tracefs::with_tracefs(attach)
        .unwrap_or_else(|error| Err(format!("tracefs is not mounted, and cannot be for this alone: {error}")))
}

/// Attaches to one end of a system call.
pub(super) fn attach(program: &mut Program, system_call: &str, end: End) -> Result<(), String> {
    load_once(program).map_err(|error| load_reason(&error))?;
    let name = match end {
        End::Entry => format!("sys_enter_{system_call}"),
        End::Exit => format!("sys_exit_{system_call}"),
    };
    match program {
        Program::TracePoint(program) => program.attach("syscalls", &name).map(drop),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
    .map_err(|error| attach_reason(&error))
}
