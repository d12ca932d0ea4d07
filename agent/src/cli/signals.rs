//! Signals, as something to wait on.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::process::CommandExt,
    },
    process::Command,
};

use nix::sys::{
    signal::{SigSet, SigmaskHow, Signal},
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
}

impl Signals {
    pub(super) fn watch() -> io::Result<Self> {
        let mut set: SigSet = WATCHED.into_iter().collect();
        set.add(Signal::SIGCHLD);
        let before = set.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        let descriptor = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { descriptor, before })
    }

    /// Has a command begin with the signals blocked that this process began with.
    pub(super) fn spare(&self, command: &mut Command) {
        let before = self.before;
        // SAFETY: only makes a system call.
        unsafe { command.pre_exec(move || before.thread_set_mask().map_err(io::Error::from)) };
    }

    /// The next one that has come, if any.
    pub(super) fn next(&mut self) -> io::Result<Option<Received>> {
        let Some(info) = self.descriptor.read_signal()? else { return Ok(None) };
        let signal = Signal::try_from(info.ssi_signo as i32)?;
        Ok(Some(Received { signal, is_from_process: is_from_process(&info) }))
    }
}

/// A signal that came.
pub(super) struct Received {
    pub(super) signal: Signal,
    /// Sent by kill and the like, rather than by the terminal, which sends it to a running command
    /// as well.
    pub(super) is_from_process: bool,
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
