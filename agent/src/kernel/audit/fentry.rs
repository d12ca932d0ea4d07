//! fentry and fexit, the cheapest backend: the kernel calls these programs as it calls functions. It needs the kernel's BTF.

use aya::{
    Btf,
    programs::{Program, ProgramError},
};

use super::{
    AttachVariant, attach_reason,
    functions::{Programs, variants},
};
use crate::kernel::{
    error::{chain, load_reason},
    syscall,
};

pub(super) static VARIANTS: [AttachVariant; 4] = variants(&SET, &GET);

const SET: Programs = Programs {
    entry: "sp_fentry_set",
    exit: "sp_fexit_set",
    outer_entry: "sp_fentry_set_fd",
    outer_exit: "sp_fexit_set_fd",
    security: "sp_fentry_set_found",
};

const GET: Programs = Programs {
    entry: "sp_fentry_get",
    exit: "sp_fexit_get",
    outer_entry: "sp_fentry_get_fd",
    outer_exit: "sp_fexit_get_fd",
    security: "sp_fentry_get_found",
};

/// Reads the kernel's BTF, in which the functions are looked up.
pub(super) fn read_btf() -> Result<Btf, String> {
    // Checked first, because reading the BTF takes longer.
    syscall::check_tracing().map_err(|error| format!("cannot load fentry programs: {error}"))?;
    Btf::from_sys_fs().map_err(|error| format!("cannot read the kernel's BTF: {}", chain(&error)))
}

/// Attaches a program to a function. fentry programs are loaded for one function.
pub(super) fn attach(program: &mut Program, function: &str, types: &Btf) -> Result<(), String> {
    match program {
        Program::FEntry(program) => {
            program.load(function, types).map_err(|error| load_reason(&error))?;
            program.attach().map(drop)
        }
        Program::FExit(program) => {
            program.load(function, types).map_err(|error| load_reason(&error))?;
            program.attach().map(drop)
        }
        _ => Err(ProgramError::UnexpectedProgramType),
    }
    .map_err(|error| attach_reason(&error))
}
