//! The signals of this process, as a file descriptor.

use std::{
    fs::File,
    io, mem,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::process::CommandExt,
    },
    process::Command,
    ptr,
    sync::atomic::{AtomicBool, Ordering},
};

use nix::sys::{
    signal::{SigHandler, SigSet, SigmaskHow, Signal, signal},
    signalfd::{SfdFlags, SignalFd, siginfo},
};

/// Signals that end the agent or reload policies, and signals that are passed on to a command.
const WATCHED: [Signal; 6] =
    [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGUSR2];

/// The pending signals of this process. Construct this before the first thread.
pub struct Signals {
    descriptor: SignalFd,
    /// The signal mask from before, which commands inherit.
    before: SigSet,
    /// The signals that were ignored when this process started.
    ignored: SigSet,
    /// Whether this process was started from a terminal.
    had_terminal: bool,
}

/// Whether SIGPIPE was ignored when this process started. Rust's runtime always ignores it.
static PIPE_WAS_IGNORED: AtomicBool = AtomicBool::new(false);

/// Runs before Rust's runtime.
#[used]
// SAFETY: the C library calls each function in this section. This one ignores the arguments.
#[unsafe(link_section = ".init_array")]
static NOTE_PIPE: extern "C" fn() = {
    extern "C" fn note() {
        PIPE_WAS_IGNORED.store(is_ignored(Signal::SIGPIPE), Ordering::Relaxed);
    }
    note
};

fn is_ignored(signal: Signal) -> bool {
    // SAFETY: all fields are valid as zeros.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: only queries the action, and `action` has room for it.
    let result = unsafe { libc::sigaction(signal as i32, ptr::null(), &raw mut action) };
    result == 0 && action.sa_sigaction == libc::SIG_IGN
}

impl Signals {
    /// Blocks the signals and opens the file descriptor.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses signalfd(2).
    pub fn watch() -> io::Result<Self> {
        let mut set: SigSet = WATCHED.into_iter().collect();
        set.add(Signal::SIGCHLD);
        let ignored = set.iter().filter(|signal| is_ignored(*signal)).collect();
        // While SIGCHLD is ignored, the kernel keeps no exit status.
        // SAFETY: installs no handler.
        unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }?;
        let before = set.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        let descriptor = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { descriptor, before, ignored, had_terminal: has_terminal() })
    }

    /// Restores the signal mask and the ignored signals of this process in a command.
    pub fn restore_in_child(&self, command: &mut Command) {
        let before = self.before;
        let child_was_ignored = self.ignored.contains(Signal::SIGCHLD);
        // SAFETY: the closure only makes system calls.
        unsafe {
            command.pre_exec(move || {
                if child_was_ignored {
                    signal(Signal::SIGCHLD, SigHandler::SigIgn)?;
                }
                if PIPE_WAS_IGNORED.load(Ordering::Relaxed) {
                    signal(Signal::SIGPIPE, SigHandler::SigIgn)?;
                }
                before.thread_set_mask().map_err(io::Error::from)
            })
        };
    }

    /// Returns the next pending signal, if there is one.
    ///
    /// # Errors
    ///
    /// Fails if the file descriptor cannot be read.
    pub fn receive(&mut self) -> io::Result<Option<Received>> {
        let Some(info) = self.descriptor.read_signal()? else { return Ok(None) };
        let signal = Signal::try_from(info.ssi_signo as i32)?;
        Ok(Some(Received {
            signal,
            is_from_process: is_from_process(&info),
            was_ignored: self.ignored.contains(signal),
            is_cut_off: self.had_terminal && !has_terminal(),
        }))
    }
}

/// A signal that was received.
pub struct Received {
    pub signal: Signal,
    /// Whether a process sent it (kill(2)). A terminal sends its signals to a running command too.
    pub is_from_process: bool,
    /// Whether the signal was ignored when this process started.
    was_ignored: bool,
    /// Whether the terminal that this process was started from is gone.
    is_cut_off: bool,
}

impl Received {
    /// Returns whether the signal ends this process.
    ///
    /// A shell without job control starts background commands with SIGINT and SIGQUIT ignored, so that the keys of the terminal
    /// do not end them. Such a signal ends this process only if a process sends it. nohup(1) ignores SIGHUP, which a shell sends
    /// to its commands when the terminal closes: an ignored SIGHUP never ends this process.
    #[must_use]
    pub fn asks_for_end(&self) -> bool {
        match self.signal {
            Signal::SIGINT | Signal::SIGQUIT | Signal::SIGTERM => !self.was_ignored || self.is_from_process,
            Signal::SIGHUP => !self.was_ignored,
            _ => false,
        }
    }

    /// Returns whether the signal is a SIGHUP that reloads the policies. A terminal sends SIGHUP when it closes.
    #[must_use]
    pub fn asks_for_reload(&self) -> bool {
        self.signal == Signal::SIGHUP && !self.is_cut_off
    }
}

/// Returns whether this process has a controlling terminal (tty(4)).
fn has_terminal() -> bool {
    File::open("/dev/tty").is_ok()
}

fn is_from_process(info: &siginfo) -> bool {
    // The codes of signals that processes send are 0 (SI_USER) and less. The kernel's own codes are greater
    // (include/uapi/asm-generic/siginfo.h).
    info.ssi_code <= 0
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}
