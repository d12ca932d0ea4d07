//! The tracepoints of the two system calls: where there is nothing better.

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
        object::load_once,
        syscall,
    },
};

pub(super) static VARIANTS: [AttachVariant; 2] = [
    AttachVariant {
        set: [exit("setsockopt", "sp_sys_exit"), None, None, None],
        get: [exit("getsockopt", "sp_sys_exit"), None, None, None],
        spans: &[Visibility::Ends],
        not_covered: NOT_COVERED,
    },
    AttachVariant {
        set: [exit("setsockopt", "sp_sys_exit"), entry("setsockopt", "sp_sys_enter"), None, None],
        get: [exit("getsockopt", "sp_sys_exit"), entry("getsockopt", "sp_sys_enter"), None, None],
        spans: &[Visibility::Conflicts, Visibility::All],
        not_covered: NOT_COVERED,
    },
];

const NOT_COVERED: &[&str] = &["io_uring", "32-bit programs"];

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

/// A program at a tracepoint, for as long as this is there. Not a link, as aya makes them where the kernel has such: of those
/// nothing can be left to the kernel.
pub(in crate::kernel) struct Event {
    tracepoint: u64,
    descriptor: OwnedFd,
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Attaches to one end of a system call.
pub(super) fn attach(program: &mut Program, system_call: &str, end: End) -> Result<Event, String> {
    load_once(program).map_err(|error| load_reason(&error))?;
    let program = program.fd().map_err(|error| chain(&error))?;
    let tracepoint = tracefs::tracepoint_id(CATEGORY, &name(system_call, end)).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => "tracefs cannot be read without root or CAP_DAC_READ_SEARCH".to_owned(),
        _ => error.to_string(),
    })?;
    let attach = || {
        let descriptor = syscall::open_tracepoint(tracepoint)?;
        syscall::run_at(&descriptor, program)?;
        Ok(Event { tracepoint, descriptor })
    };
    attach().map_err(|error: io::Error| attach_reason(&error))
}

/// Leaves programs to the kernel to take from their tracepoints, which it does within some milliseconds.
///
/// Whoever closes an event waits until no CPU is in its program any more (`perf_event_detach_bpf_prog`,
/// kernel/trace/bpf_trace.c), and for the last event of a tracepoint until none is in that either, some 35 ms, one after the
/// other (`perf_trace_event_unreg`, kernel/trace/trace_event_perf.c). Events in a map are closed by a worker of the kernel
/// (`__bpf_event_entry_free`, kernel/bpf/arraymap.c, and `fput`).
pub(super) fn leave(events: Vec<impl AsFd>) {
    if events.is_empty() {
        return;
    }
    let map = syscall::hold_events(&events);
    // As long as they are in the map.
    drop(events);
    if let Err(error) = map {
        log::debug!("it will take longer to end the audit: {error}");
    }
}

/// Takes programs from their tracepoints, and is done when they are not there any more. The tracepoints themselves are left to
/// the kernel.
pub(super) fn take(events: Vec<Event>) {
    // Beside each, one that counts nothing: so that ours is not the last one there.
    let others: Vec<OwnedFd> =
        events.iter().filter_map(|event| syscall::open_tracepoint(event.tracepoint).ok()).collect();
    // All at once: for each the kernel waits. Where there can be no thread, here.
    thread::scope(|scope| {
        for event in events {
            drop(thread::Builder::new().spawn_scoped(scope, || drop(event)));
        }
    });
    leave(others);
}
