//! The limit of locked memory, which kernels before 5.11 hold against BPF.

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, rlim_t, setrlimit};

/// RLIMIT_MEMLOCK, out of the way for as long as this lives: before 5.11 maps, their entries and programs are charged to it,
/// when they are made. Where it cannot be raised, loading says so. Commands inherit limits, so it does not stay.
pub(super) struct Memlock {
    before: Option<(rlim_t, rlim_t)>,
}

impl Memlock {
    pub(super) fn raise() -> Self {
        let raised = getrlimit(Resource::RLIMIT_MEMLOCK).and_then(|before| {
            setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)?;
            Ok(before)
        });
        Self { before: raised.inspect_err(|errno| log::debug!("cannot raise RLIMIT_MEMLOCK: {errno}")).ok() }
    }
}

impl Drop for Memlock {
    fn drop(&mut self) {
        let Some((soft, hard)) = self.before else { return };
        if let Err(errno) = setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard) {
            log::debug!("cannot restore RLIMIT_MEMLOCK: {errno}");
        }
    }
}
