//! kprobe and kretprobe, on the same functions as [`super::fentry`].

use std::path::Path;

use aya::programs::{Program, ProgramError};

use super::{
    AttachVariant, attach_reason,
    functions::{Programs, variants},
};
use crate::kernel::{error::load_reason, loader::load_once};

pub(super) static VARIANTS: [AttachVariant; 4] = variants(&SET, &GET);

const SET: Programs = Programs {
    entry: "sp_kprobe_set",
    exit: "sp_kretprobe",
    outer_entry: "sp_kprobe_set_fd",
    outer_exit: "sp_kretprobe_fd",
    security: "sp_kprobe_set_found",
};

const GET: Programs = Programs {
    entry: "sp_kprobe_get",
    exit: "sp_kretprobe",
    outer_entry: "sp_kprobe_get_fd",
    outer_exit: "sp_kretprobe_fd",
    security: "sp_kprobe_get_found",
};

/// The file with the perf event type of kprobes, which exists if the kernel has kprobes.
const TYPE_FILE: &str = "/sys/bus/event_source/devices/kprobe/type";

pub(super) fn check() -> Result<(), String> {
    if Path::new(TYPE_FILE).exists() { Ok(()) } else { Err("this kernel is built without kprobes".to_owned()) }
}

/// Attaches a program to a function.
pub(super) fn attach(program: &mut Program, function: &str) -> Result<(), String> {
    load_once(program).map_err(|error| load_reason(&error))?;
    match program {
        Program::KProbe(program) => program.attach(function, 0).map(drop),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
    .map_err(|error| attach_reason(&error))
}
