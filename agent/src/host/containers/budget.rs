//! Limits the files and bytes that one search for containers reads, since tenants control the size of what is read.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// The remaining budget of a search. A search that exceeds its budget returns the containers found so far and is marked as
/// incomplete.
#[derive(Debug)]
pub(super) struct Budget {
    bytes: Cell<u64>,
    files: Cell<u32>,
    until: Instant,
    is_exceeded: Cell<bool>,
}

impl Budget {
    /// Returns the budget for files of the host's root. A thousand containers use a tenth of it.
    pub(super) fn of_root() -> Self {
        Self::new(256 << 20, 100_000, Duration::from_secs(20))
    }

    /// Returns the budget for files of one user.
    pub(super) fn of_tenant() -> Self {
        Self::new(16 << 20, 2_000, Duration::from_secs(2))
    }

    pub(super) fn new(bytes: u64, files: u32, time: Duration) -> Self {
        let (bytes, files, until) = (Cell::new(bytes), Cell::new(files), Instant::now() + time);
        Self { bytes, files, until, is_exceeded: Cell::new(false) }
    }

    /// Subtracts one file. Returns `false` if no file or no time is left.
    pub(super) fn take_file(&self) -> bool {
        let left = self.files.get().checked_sub(1).filter(|_| Instant::now() < self.until);
        self.files.set(left.unwrap_or_default());
        self.is_exceeded.set(self.is_exceeded.get() || left.is_none());
        left.is_some()
    }

    /// Subtracts bytes. Returns `false` if fewer are left.
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
    fn exceeded_budget_stays_exceeded() {
        let budget = Budget::new(10, 2, Duration::from_secs(60));
        assert!(budget.take_file() && budget.take_bytes(10) && budget.take_file() && !budget.is_exceeded());
        assert!(!budget.take_file() && budget.is_exceeded());
        assert!(!Budget::new(10, 2, Duration::ZERO).take_file());
        let budget = Budget::new(10, 2, Duration::from_secs(60));
        assert!(!budget.take_bytes(11) && !budget.take_bytes(1) && budget.is_exceeded());
    }
}
