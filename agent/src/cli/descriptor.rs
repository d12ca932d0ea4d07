//! Standard output and standard error as file descriptors.
//!
//! The standard library treats a write to a closed descriptor as a success, and its print macros panic where a write fails.
//! This module does neither: each write returns the error of write(2).

use std::{
    env,
    io::{self, IsTerminal, Write},
    mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    sync::atomic::{AtomicBool, Ordering},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::fstat,
    unistd::write,
};

use super::output::Format;
use crate::{escape::visible, wrap};

/// One of the two standard descriptors for output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standard {
    Output,
    Error,
}

/// Whether each descriptor was closed when this process started. Rust's runtime opens /dev/null in its place
/// (`sanitize_standard_fds`, library/std/src/sys/pal/unix/mod.rs).
static WAS_CLOSED: [AtomicBool; 2] = [AtomicBool::new(false), AtomicBool::new(false)];

/// Runs before Rust's runtime.
#[used]
// SAFETY: the C library calls each function in this section. This one ignores the arguments.
#[unsafe(link_section = ".init_array")]
static NOTE_CLOSED: extern "C" fn() = {
    extern "C" fn note() {
        for standard in [Standard::Output, Standard::Error] {
            // SAFETY: only queries the flags of the descriptor. The call fails if the descriptor is closed.
            let is_closed = unsafe { libc::fcntl(standard.as_raw_fd(), libc::F_GETFD) } < 0;
            WAS_CLOSED[standard as usize].store(is_closed, Ordering::Relaxed);
        }
    }
    note
};

impl Standard {
    fn is_terminal(self) -> bool {
        !self.was_closed() && self.as_fd().is_terminal()
    }

    /// Returns whether colours may be written: to a terminal that has them, unless NO_COLOR (no-color.org) forbids it.
    pub(super) fn takes_colours(self) -> bool {
        let is_set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = env::var_os("TERM").is_none_or(|term| term == "dumb");
        self.is_terminal() && !is_dumb && !is_set("NO_COLOR")
    }

    /// Returns the width to which text is wrapped, in columns: COLUMNS, or that of the terminal. Returns `None` for text that goes
    /// elsewhere: programs read such text by lines.
    pub(super) fn width(self) -> Option<usize> {
        let given = env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
        given.or_else(|| terminal_width(self)).filter(|width| *width > 0)
    }

    /// Wraps text to [`Self::width`].
    pub(super) fn wrapped(self, text: &str) -> String {
        wrap::lines(text, self.width().unwrap_or(usize::MAX))
    }

    fn was_closed(self) -> bool {
        WAS_CLOSED[self as usize].load(Ordering::Relaxed)
    }

    /// Returns whether both are the same open file, as after `2>&1`.
    pub(super) fn are_one() -> bool {
        let of = |standard: Self| fstat(standard).map(|stat| (stat.st_dev, stat.st_ino));
        let any_closed = [Self::Output, Self::Error].into_iter().any(Self::was_closed);
        !any_closed && of(Self::Output).is_ok_and(|output| of(Self::Error) == Ok(output))
    }
}

impl AsRawFd for Standard {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Output => libc::STDOUT_FILENO,
            Self::Error => libc::STDERR_FILENO,
        }
    }
}

impl AsFd for Standard {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: Rust's runtime opens these descriptors if they are closed, and no code closes them.
        unsafe { BorrowedFd::borrow_raw(self.as_raw_fd()) }
    }
}

/// Returns the number of columns of a terminal (tty_ioctl(4)).
fn terminal_width(standard: Standard) -> Option<usize> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: there is room for the answer.
    let result = unsafe { libc::ioctl(standard.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (result == 0).then(|| size.ws_col.into())
}

/// Writes without a buffer.
///
/// # Errors
///
/// Fails as write(2) does, and with EBADF if the descriptor was closed when this process started. Does not fail with EAGAIN: waits
/// until a descriptor with O_NONBLOCK can be written to.
impl Write for Standard {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.was_closed() {
            return Err(Errno::EBADF.into());
        }
        write_some(self.as_fd(), bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes at least one of these bytes, and returns how many. Waits while the descriptor is full.
pub(super) fn write_some(descriptor: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match write(descriptor, bytes) {
            Ok(0) if !bytes.is_empty() => return Err(io::ErrorKind::WriteZero.into()),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait_for_room(descriptor)?,
            written => return Ok(written?),
        }
    }
}

fn wait_for_room(descriptor: BorrowedFd<'_>) -> io::Result<()> {
    match poll(&mut [PollFd::new(descriptor, PollFlags::POLLOUT)], PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Standard output, a line at a time.
///
/// In text, control characters other than line ends are escaped, and lines are wrapped. `flush` writes an incomplete last line.
pub(super) struct Lines {
    format: Format,
    /// The incomplete last line.
    rest: Vec<u8>,
}

/// Returns standard output, for a report in this format.
pub(super) fn stdout(format: Format) -> Lines {
    Lines { format, rest: Vec::new() }
}

impl Lines {
    fn write_all_of(&self, bytes: &[u8]) -> io::Result<()> {
        match self.format {
            Format::Text => {
                let text = visible(&String::from_utf8_lossy(bytes), true);
                Standard::Output.write_all(Standard::Output.wrapped(&text).as_bytes())
            }
            Format::Json => Standard::Output.write_all(bytes),
        }
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.rest.extend_from_slice(bytes);
        if let Some(end) = self.rest.iter().rposition(|byte| *byte == b'\n') {
            let after = self.rest.split_off(end + 1);
            let lines = mem::replace(&mut self.rest, after);
            self.write_all_of(&lines)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let rest = mem::take(&mut self.rest);
        self.write_all_of(&rest)
    }
}
