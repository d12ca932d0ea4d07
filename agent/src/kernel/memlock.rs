//! RLIMIT_MEMLOCK, to which kernels before 5.11 charge BPF objects.

use std::sync::{Mutex, PoisonError};

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, rlim_t, setrlimit};

/// Raises RLIMIT_MEMLOCK to infinity while a value of this type exists. Before 5.11, maps, their entries and programs are
/// charged to it when they are made. If the limit cannot be raised, loading reports that. The limit is restored afterwards,
/// because commands inherit it.
pub(super) struct Memlock;

/// The number of values, because threads load programs in parallel, and the limits before the first of them.
static RAISED: Mutex<(usize, Option<(rlim_t, rlim_t)>)> = Mutex::new((0, None));

impl Memlock {
    pub(super) fn raise() -> Self {
        let mut raised = RAISED.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, before) = &mut *raised;
        if *count == 0 {
            let limits = getrlimit(Resource::RLIMIT_MEMLOCK)
                .and_then(|limits| setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).map(|()| limits));
            *before = limits.inspect_err(|errno| log::debug!("cannot raise RLIMIT_MEMLOCK: {errno}")).ok();
        }
        *count += 1;
        Self
    }
}

impl Drop for Memlock {
    fn drop(&mut self) {
        let mut raised = RAISED.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, before) = &mut *raised;
        *count -= 1;
        if *count == 0
            && let Some((soft, hard)) = before.take()
            && let Err(errno) = setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard)
        {
            log::debug!("cannot restore RLIMIT_MEMLOCK: {errno}");
        }
    }
}
