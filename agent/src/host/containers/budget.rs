//! How much one look for containers can read: all that a tenant can make large has a limit.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// What is left to read. A look that runs out of it gives what it has found, and says that it is incomplete.
#[derive(Debug)]
pub(super) struct Budget {
    bytes: Cell<u64>,
    files: Cell<u32>,
    until: Instant,
    is_exceeded: Cell<bool>,
}

impl Budget {
    /// For what the host's root wrote. A thousand containers take a tenth of it.
    pub(super) fn of_root() -> Self {
        Self::new(256 << 20, 100_000, Duration::from_secs(20))
    }

    /// For what one user wrote.
    pub(super) fn of_tenant() -> Self {
        Self::new(16 << 20, 2_000, Duration::from_secs(2))
    }

    pub(super) fn new(bytes: u64, files: u32, time: Duration) -> Self {
        let (bytes, files, until) = (Cell::new(bytes), Cell::new(files), Instant::now() + time);
        Self { bytes, files, until, is_exceeded: Cell::new(false) }
    }

    /// Takes one file off. `false`: there is none left, or no time.
    pub(super) fn take_file(&self) -> bool {
        let left = self.files.get().checked_sub(1).filter(|_| Instant::now() < self.until);
        self.files.set(left.unwrap_or_default());
        self.is_exceeded.set(self.is_exceeded.get() || left.is_none());
        left.is_some()
    }

    /// Takes bytes off. `false`: there are not so many left.
    pub(super) fn take_bytes(&self, bytes: u64) -> bool {
        let left = self.bytes.get().checked_sub(bytes);
        self.bytes.set(left.unwrap_or_default());
        self.is_exceeded.set(self.is_exceeded.get() || left.is_none());
        left.is_some()
    }

    pub(super) fn is_exceeded(&self) -> bool {
        self.is_exceeded.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_once_it_is_exceeded() {
        let budget = Budget::new(10, 2, Duration::from_secs(60));
        assert!(budget.take_file() && budget.take_bytes(10) && budget.take_file() && !budget.is_exceeded());
        assert!(!budget.take_file() && budget.is_exceeded());
        assert!(!Budget::new(10, 2, Duration::ZERO).take_file());
        let budget = Budget::new(10, 2, Duration::from_secs(60));
        assert!(!budget.take_bytes(11) && !budget.take_bytes(1) && budget.is_exceeded());
    }
}
