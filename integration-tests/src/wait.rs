//! Waits until a condition holds.

use std::{
    thread,
    time::{Duration, Instant},
};

/// Longer than any operation of these tests takes, also on an emulated processor.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// The time between two checks of a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Waits until `is_true` returns true. Returns whether it did so before the deadline.
pub fn until(deadline: Duration, mut is_true: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + deadline;
    loop {
        if is_true() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        thread::sleep(POLL_INTERVAL);
    }
}
