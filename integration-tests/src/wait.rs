//! Waiting for something to become true.

use std::{
    thread,
    time::{Duration, Instant},
};

/// Longer than anything that works takes, also on an emulated processor.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How often to look.
const PAUSE: Duration = Duration::from_millis(5);

/// Waits until `is_true`. Whether it became so before the deadline.
pub fn until(deadline: Duration, mut is_true: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + deadline;
    loop {
        if is_true() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        thread::sleep(PAUSE);
    }
}
