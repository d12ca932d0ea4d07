//! The active Linux security modules.

use std::{fs, io, sync::OnceLock};

use nix::errno::Errno;

/// `LSM_ID_BPF` (include/uapi/linux/lsm.h).
const BPF: u64 = 109;

/// lsm_list_modules(2) (Linux 6.8), which libc does not define. The number is the same on all architectures.
const LIST_MODULES: libc::c_long = 461;

/// The names of the active modules, separated by commas.
const NAMES: &str = "/sys/kernel/security/lsm";

/// Returns whether the kernel runs BPF programs at LSM hooks: whether `bpf` is among the modules that were selected at boot
/// (`lsm=`, CONFIG_LSM). Without it, programs can be attached but do not run. Returns `false` if the list of modules cannot be
/// read.
#[must_use]
pub fn is_bpf_active() -> bool {
    static IS_ACTIVE: OnceLock<bool> = OnceLock::new();
    *IS_ACTIVE.get_or_init(|| match list() {
        Ok(modules) => modules.contains(&BPF),
        // The system call does not exist before 6.8.
        Err(_) => fs::read_to_string(NAMES).is_ok_and(|names| names.trim().split(',').any(|name| name == "bpf")),
    })
}

/// Returns the numbers of the active modules.
fn list() -> io::Result<Vec<u64>> {
    let mut modules = [0u64; 64];
    let mut size = size_of_val(&modules) as u32;
    // SAFETY: the kernel writes at most `size` bytes to `modules`, and the length to `size`.
    let count = unsafe { libc::syscall(LIST_MODULES, modules.as_mut_ptr(), &raw mut size, 0u32) };
    let count = Errno::result(count)?;
    Ok(modules.into_iter().take(usize::try_from(count).unwrap_or(0)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_call_and_file_agree() {
        if let (Ok(modules), Ok(names)) = (list(), fs::read_to_string(NAMES)) {
            assert_eq!(modules.contains(&BPF), names.split(',').any(|name| name.trim() == "bpf"));
        }
    }
}
