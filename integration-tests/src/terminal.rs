//! A pseudoterminal of 80 columns with a process in its foreground.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{cgroup::Cgroup, must, wait};

/// vhangup(2) for any terminal (include/uapi/asm-generic/ioctls.h).
const TIOCVHANGUP: libc::c_ulong = 0x5437;

/// A process that leads a session with its own controlling terminal. Killed when dropped.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    keyboard: File,
    screen: Arc<Mutex<Vec<u8>>>,
    pub home: Cgroup,
}

impl Terminal {
    #[must_use]
    #[track_caller]
    pub fn start(command: Command) -> Self {
        Self::start_with(command, &|_| ())
    }

    /// Like [`Self::start`], with a change to the command after its environment is set.
    #[must_use]
    #[track_caller]
    pub fn start_with(mut command: Command, change: &dyn Fn(&mut Command)) -> Self {
        let (master, slave) = must(open(), "open a terminal");
        let home = Cgroup::new();
        home.run_inside(&mut command);
        let stdio = || Stdio::from(must(slave.try_clone(), "share a terminal"));
        command.stdin(stdio()).stdout(stdio()).stderr(stdio()).env("TERM", "xterm");
        change(&mut command);
        // SAFETY: only makes system calls.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                if libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
            });
        }
        let child = must(command.spawn(), "start a command on a terminal");
        let screen = Arc::new(Mutex::new(Vec::new()));
        let (shown, mut output) = (Arc::clone(&screen), must(master.try_clone(), "share a terminal"));
        thread::spawn(move || {
            let mut part = [0; 4096];
            // Fails once no process has the terminal open.
            while let Ok(len @ 1..) = output.read(&mut part) {
                shown.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&part[..len]);
            }
        });
        Self { child, keyboard: master, screen, home }
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        let pid = must(i32::try_from(self.child.id()), "name a process");
        must(kill(Pid::from_raw(pid), signal), "send a signal");
    }

    /// Types these bytes.
    #[track_caller]
    pub fn press(&mut self, keys: &[u8]) {
        must(self.keyboard.write_all(keys), "type");
    }

    /// Hangs up the terminal, like a closed window or a broken line.
    #[track_caller]
    pub fn hang_up(&self) {
        // SAFETY: takes numbers.
        let slave = unsafe { libc::ioctl(self.keyboard.as_raw_fd(), libc::TIOCGPTPEER, libc::O_RDWR | libc::O_NOCTTY) };
        assert!(slave >= 0, "open the terminal: {}", io::Error::last_os_error());
        // SAFETY: the descriptor is new and has no other owner.
        let slave = unsafe { OwnedFd::from_raw_fd(slave) };
        // SAFETY: takes a number.
        let result = unsafe { libc::ioctl(slave.as_raw_fd(), TIOCVHANGUP) };
        assert!(result == 0, "hang up the terminal: {}", io::Error::last_os_error());
    }

    /// Returns everything that the terminal has shown.
    #[must_use]
    pub fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Waits until the terminal has shown this text.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        let is_shown = wait::until(wait::TIMEOUT, || self.screen().contains(text));
        assert!(is_shown, "the terminal does not show {text:?}: {}", self.screen());
    }

    /// Waits for the process to end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let has_ended = wait::until(wait::TIMEOUT, || matches!(self.child.try_wait(), Ok(Some(_))));
        assert!(has_ended, "the process did not end: {}", self.screen());
        must(self.child.wait(), "wait for a child")
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn open() -> io::Result<(File, OwnedFd)> {
    let (mut master, mut slave) = (-1, -1);
    let none = std::ptr::null_mut();
    let mut size = libc::winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: there is room for two descriptors; the other pointers are null, or point to a size.
    if unsafe { libc::openpty(&raw mut master, &raw mut slave, none, none.cast(), &raw mut size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptors are new and have no other owner.
    let (master, slave) = unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
    for fd in [master.as_raw_fd(), slave.as_raw_fd()] {
        // SAFETY: takes numbers.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok((master, slave))
}
