//! How far work is that takes its time: a bar on a terminal, where there is so much to do that somebody waits for it.
//!
//! It is drawn to standard error, some twenty times a second at the most, and gone when the work is done or given up. Where
//! standard error is no terminal, or one that cannot erase (TERM=dumb), there is no progress bar. What is written meanwhile may go to
//! the same terminal: it is written [`Progress::above`] the bar.

use std::io::{self, IsTerminal};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// So many sockets take long enough to be waited for.
const MANY: usize = 500;

/// The bar, until this is dropped.
pub(super) struct Progress(ProgressBar);

impl Progress {
    /// Of so many sockets.
    pub(super) fn of(total: usize) -> Self {
        let is_shown = total >= MANY && io::stderr().is_terminal();
        let target = if is_shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total as u64), target);
        let style = ProgressStyle::with_template("[{wide_bar}] {pos} of {len} sockets");
        Self(bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("#>-")))
    }

    /// So many more are done, or begun with.
    pub(super) fn step(&self, sockets: usize) {
        self.0.inc(sockets as u64);
    }

    /// Writes what may go to the terminal: the bar makes way for it.
    pub(super) fn above<T>(&self, write: impl FnOnce() -> T) -> T {
        self.0.suspend(write)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
