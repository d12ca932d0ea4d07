//! The tracepoints of the two system calls, the fallback of the other backends.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    thread,
};

use aya::programs::Program;

use super::{AttachVariant, End, Visibility, attach_reason, entry, exit};
use crate::{
    host::tracefs,
    kernel::{
        error::{chain, load_reason},
        loader::load_once,
        syscall,
    },
};

pub(super) static VARIANTS: [AttachVariant; 2] = [
    AttachVariant {
        set: [exit("setsockopt", "sp_sys_exit"), None, None, None],
        get: [exit("getsockopt", "sp_sys_exit"), None, None, None],
        visibilities: &[Visibility::Exits],
        not_covered: NOT_COVERED,
    },
    AttachVariant {
        set: [exit("setsockopt", "sp_sys_exit"), entry("setsockopt", "sp_sys_enter"), None, None],
        get: [exit("getsockopt", "sp_sys_exit"), entry("getsockopt", "sp_sys_enter"), None, None],
        visibilities: &[Visibility::Conflicts, Visibility::All],
        not_covered: NOT_COVERED,
    },
];

const NOT_COVERED: &[&str] = &["io_uring", "32-bit programs"];

/// Runs `attach` with tracefs mounted, so that it can look up tracepoints.
pub(super) fn with_tracefs<T: Send>(attach: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    tracefs::with_tracefs(attach)
        .unwrap_or_else(|error| Err(format!("tracefs is not mounted, and a private mount failed: {error}")))
}

const CATEGORY: &str = "syscalls";

fn name(system_call: &str, end: End) -> String {
    match end {
        End::Entry => format!("sys_enter_{system_call}"),
        End::Exit => format!("sys_exit_{system_call}"),
    }
}

/// Attaches a program to a tracepoint until it is closed. aya would make a link on kernels that have such links, and the kernel
/// cannot close these in the background.
pub(in crate::kernel) struct PerfEvent {
    tracepoint: u64,
    descriptor: OwnedFd,
}

impl AsFd for PerfEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Attaches a program to the entry or the exit of a system call.
pub(super) fn attach(program: &mut Program, system_call: &str, end: End) -> Result<PerfEvent, String> {
    load_once(program).map_err(|error| load_reason(&error))?;
    let program = program.fd().map_err(|error| chain(&error))?;
    let tracepoint = tracefs::tracepoint_id(CATEGORY, &name(system_call, end)).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => "tracefs cannot be read without root or CAP_DAC_READ_SEARCH".to_owned(),
        _ => error.to_string(),
    })?;
    let attach = || {
        let descriptor = syscall::open_tracepoint(tracepoint)?;
        syscall::attach_to_event(&descriptor, program)?;
        Ok(PerfEvent { tracepoint, descriptor })
    };
    attach().map_err(|error: io::Error| attach_reason(&error))
}

/// Lets the kernel detach programs from their tracepoints, within some milliseconds.
///
/// A process that closes an event waits until no CPU runs its program (`perf_event_detach_bpf_prog`, kernel/trace/bpf_trace.c).
/// For the last event of a tracepoint it also waits until no CPU is in the tracepoint (`perf_trace_event_unreg`,
/// kernel/trace/trace_event_perf.c). This takes some 35 ms for each event. A kernel worker closes events that are in a map
/// (`__bpf_event_entry_free`, kernel/bpf/arraymap.c, and `fput`).
pub(super) fn detach_in_background(events: Vec<impl AsFd>) {
    if events.is_empty() {
        return;
    }
    let map = syscall::store_events(&events);
    // Closed while the map still holds the events.
    drop(events);
    if let Err(error) = map {
        log::debug!("cannot detach the audit in the background: {error}");
    }
}

/// Detaches programs from their tracepoints, and waits until they are detached. The kernel releases the tracepoints in the
/// background.
pub(super) fn detach(events: Vec<PerfEvent>) {
    // A second, disabled event for each tracepoint, so that ours is not the last one.
    let others: Vec<OwnedFd> =
        events.iter().filter_map(|event| syscall::open_tracepoint(event.tracepoint).ok()).collect();
    // In parallel, because the kernel waits for each. If a thread cannot be started, the event is closed here.
    thread::scope(|scope| {
        for event in events {
            drop(thread::Builder::new().spawn_scoped(scope, || drop(event)));
        }
    });
    detach_in_background(others);
}
