//! bpf(2) without a library, for programs that are not the agent's. A test oracle must not use the agent's library.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd},
};

/// A command that several modules use (include/uapi/linux/bpf.h).
pub const LINK_CREATE: libc::c_int = 28;
const PROG_LOAD: libc::c_int = 5;

/// Calls bpf(2). The attributes are 32-bit words. Afterwards they contain what the kernel has written.
///
/// # Errors
///
/// The error of the kernel.
pub fn bpf(command: libc::c_int, attributes: &mut [u32]) -> io::Result<i32> {
    #[repr(C, align(8))]
    struct Aligned([u32; 32]);
    let mut aligned = Aligned([0; 32]);
    aligned.0[..attributes.len()].copy_from_slice(attributes);
    let len = size_of_val(attributes);
    // SAFETY: the attributes have the length that is passed. These commands read them, and write at most to them.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut aligned, len) };
    attributes.copy_from_slice(&aligned.0[..attributes.len()]);
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(i32::try_from(result).unwrap_or(-1)) }
}

/// Takes ownership of a new descriptor.
#[must_use]
pub fn descriptor(number: i32) -> OwnedFd {
    // SAFETY: the descriptor is new and has no other owner.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Loads a program under a name, of which the kernel keeps 15 characters.
///
/// # Errors
///
/// The error of the kernel.
pub fn load(program_type: u32, attach_type: u32, name: &str, program: &[u64]) -> io::Result<OwnedFd> {
    let halves = |address: usize| [address as u32, (address as u64 >> 32) as u32];
    let [code_low, code_high] = halves(program.as_ptr().expose_provenance());
    let licence = c"GPL";
    let [licence_low, licence_high] = halves(licence.as_ptr().expose_provenance());
    // prog_type, insn_cnt, insns, license, then zeroes up to prog_name (16 bytes) and expected_attach_type
    let mut attributes = [0; 18];
    attributes[..6].copy_from_slice(&[
        program_type,
        program.len() as u32,
        code_low,
        code_high,
        licence_low,
        licence_high,
    ]);
    for (word, bytes) in attributes[12..16].iter_mut().zip(name.as_bytes().chunks(4)) {
        let mut padded = [0; 4];
        padded[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_ne_bytes(padded);
    }
    attributes[17] = attach_type;
    bpf(PROG_LOAD, &mut attributes).map(descriptor)
}
