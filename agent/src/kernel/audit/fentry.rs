//! fentry and fexit: the cheapest, for the kernel calls these programs as it calls functions. Takes the kernel's BTF.

use aya::{
    Btf,
    programs::{Program, ProgramError},
};

use super::{BLIND_TO_BAD_DESCRIPTORS, BLIND_TO_RINGS, Ends, Way, attach_reason};
use crate::kernel::error::{chain, load_reason};

pub(super) const WAYS: &[Way] = &[
    Way {
        set: Ends { point: "do_sock_setsockopt", entry: "fentry_set", exit: "fexit_set" },
        get: Ends { point: "do_sock_getsockopt", entry: "fentry_get", exit: "fexit_get" },
        blind_to: BLIND_TO_BAD_DESCRIPTORS,
    },
    Way {
        set: Ends { point: "__sys_setsockopt", entry: "fentry_set_fd", exit: "fexit_set_fd" },
        get: Ends { point: "__sys_getsockopt", entry: "fentry_get_fd", exit: "fexit_get_fd" },
        blind_to: BLIND_TO_RINGS,
    },
];

/// The kernel's types, among which the functions are looked up.
pub(super) fn types() -> Result<Btf, String> {
    Btf::from_sys_fs().map_err(|error| format!("the kernel's BTF: {}", chain(&error)))
}

/// Attaches to a function. These programs are loaded for the one function that they are attached to.
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
