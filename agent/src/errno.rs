//! Names of errnos.

use nix::errno::Errno;

/// The kernel's own "not supported" (include/linux/errno.h). User space has no name for it.
const ENOTSUPP: i32 = 524;

/// Returns the name of an errno, or `errno N` if it has none.
#[must_use]
pub fn name(errno: i32) -> String {
    if errno == ENOTSUPP {
        return "ENOTSUPP".to_owned();
    }
    match Errno::from_raw(errno) {
        Errno::UnknownErrno => format!("errno {errno}"),
        known => format!("{known:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_without_a_name_is_a_number() {
        assert_eq!(name(1), "EPERM");
        assert_eq!(name(524), "ENOTSUPP");
        assert_eq!(name(4000), "errno 4000");
    }
}
