//! Signals, as something to wait on.

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

/// Those that ask for an end, and those that commands give a meaning of their own.
const WATCHED: [Signal; 6] =
    [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGUSR2];

/// The signals of this process, from when it is made. Make it before any thread.
pub(super) struct Signals {
    descriptor: SignalFd,
    /// What was blocked before: for commands, which inherit what is blocked.
    before: SigSet,
    /// Of those watched, what this process was started with as ignored.
    ignored: SigSet,
    /// Whether it was started from a terminal.
    had_terminal: bool,
}

/// Whether this process was started with SIGPIPE ignored. Rust's runtime ignores it always.
static PIPE_WAS_IGNORED: AtomicBool = AtomicBool::new(false);

/// Runs before Rust's runtime does.
#[used]
// SAFETY: the section holds functions that the C library calls, with arguments that this one leaves alone.
#[unsafe(link_section = ".init_array")]
static NOTE_PIPE: extern "C" fn() = {
    extern "C" fn note() {
        PIPE_WAS_IGNORED.store(is_ignored(Signal::SIGPIPE), Ordering::Relaxed);
    }
    note
};

fn is_ignored(signal: Signal) -> bool {
    // SAFETY: zero is valid for each field.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: asks only, and has room for the answer.
    let asked = unsafe { libc::sigaction(signal as i32, ptr::null(), &raw mut action) };
    asked == 0 && action.sa_sigaction == libc::SIG_IGN
}

impl Signals {
    pub(super) fn watch() -> io::Result<Self> {
        let mut set: SigSet = WATCHED.into_iter().collect();
        set.add(Signal::SIGCHLD);
        let ignored = set.iter().filter(|signal| is_ignored(*signal)).collect();
        // Where it is ignored, the kernel keeps no exit status for us.
        // SAFETY: sets no handler.
        unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }?;
        let before = set.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        let descriptor = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { descriptor, before, ignored, had_terminal: has_terminal() })
    }

    /// Has a command begin with the signals blocked and ignored that this process began with.
    pub(super) fn restore_in_child(&self, command: &mut Command) {
        let before = self.before;
        let child_was_ignored = self.ignored.contains(Signal::SIGCHLD);
        // SAFETY: only makes system calls.
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

    /// The next one that has come, if any.
    pub(super) fn next(&mut self) -> io::Result<Option<Received>> {
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

/// A signal that came.
pub(super) struct Received {
    pub(super) signal: Signal,
    /// Sent by kill and the like, rather than by the terminal, which sends it to a running command
    /// as well.
    pub(super) is_from_process: bool,
    /// Who started this process had it ignore the signal, as nohup does.
    pub(super) was_ignored: bool,
    /// The terminal that this process was started from is gone.
    is_cut_off: bool,
}

impl Received {
    /// Whether this process is to end.
    pub(super) fn asks_for_end(&self) -> bool {
        let ends = matches!(self.signal, Signal::SIGINT | Signal::SIGTERM | Signal::SIGHUP | Signal::SIGQUIT);
        ends && !self.was_ignored
    }

    /// Whether this is SIGHUP in its other meaning: that files are to be read anew. A terminal sends it when it goes.
    pub(super) fn asks_for_reload(&self) -> bool {
        self.signal == Signal::SIGHUP && !self.is_cut_off
    }
}

/// Whether this process has a controlling terminal (tty(4)).
fn has_terminal() -> bool {
    File::open("/dev/tty").is_ok()
}

fn is_from_process(info: &siginfo) -> bool {
    // SI_USER is 0 and those below are other ways to send; the kernel's own are above
    // (include/uapi/asm-generic/siginfo.h).
    info.ssi_code <= 0
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}
