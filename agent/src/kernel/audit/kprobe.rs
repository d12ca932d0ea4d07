//! kprobe and kretprobe, on the same functions as [`super::fentry`].

use std::path::Path;

use aya::programs::{Program, ProgramError};

use super::{BLIND_TO_BAD_DESCRIPTORS, BLIND_TO_RINGS, Ends, Way, attach_reason};
use crate::kernel::{error::load_reason, object::load_once};

pub(super) const WAYS: &[Way] = &[
    Way {
        set: Ends { point: "do_sock_setsockopt", entry: "kprobe_set", exit: "kretprobe_end" },
        get: Ends { point: "do_sock_getsockopt", entry: "kprobe_get", exit: "kretprobe_end" },
        blind_to: BLIND_TO_BAD_DESCRIPTORS,
    },
    Way {
        set: Ends { point: "__sys_setsockopt", entry: "kprobe_set_fd", exit: "kretprobe_end" },
        get: Ends { point: "__sys_getsockopt", entry: "kprobe_get_fd", exit: "kretprobe_end" },
        blind_to: BLIND_TO_RINGS,
    },
];

/// Where the kernel says how to ask for a kprobe, if it has them.
const PLACE: &str = "/sys/bus/event_source/devices/kprobe/type";

pub(super) fn is_there() -> Result<(), String> {
    if Path::new(PLACE).exists() { Ok(()) } else { Err("this kernel is built without kprobes".to_owned()) }
}

/// Attaches to a function.
pub(super) fn attach(program: &mut Program, function: &str) -> Result<(), String> {
    load_once(program).map_err(|error| load_reason(&error))?;
    match program {
        Program::KProbe(program) => program.attach(function, 0).map(drop),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
    .map_err(|error| attach_reason(&error))
}
