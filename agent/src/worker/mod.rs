//! Runs a job that a tenant can make block in the kernel, in a process of its own.
//!
//! To read a tenant's memory (`/proc/PID/cmdline`) or files (FUSE) can leave a thread in state D, in which SIGKILL has no
//! effect. A process with such a thread keeps all its file descriptors, and a BPF link stays attached while a descriptor of it
//! is open. Therefore the job runs in a process that has executed this binary again and has no descriptors of the agent. It has
//! only a pipe for the response and a file with the input.
//!
//! [`Job::poll`] does not wait. After the deadline, the agent kills the process and continues, whether the process ends or not
//! ([`Job::abandon`]).
//!
//! A response consists of its length in bytes (`u32`, little endian) and the bytes. A truncated response is an error.

mod service;

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::process::{CommandExt, parent_id},
    },
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        memfd::{MFdFlags, memfd_create},
        prctl,
        resource::{Resource, setrlimit},
        signal::Signal,
    },
};

pub use self::service::{Service, left_behind, serve};

/// The maximum size of a response in bytes.
pub const RESPONSE_MAX: usize = 16 << 20;

/// The maximum address space of a worker in bytes (RLIMIT_AS).
const MEMORY_MAX: u64 = 1 << 30;

/// The time that the agent waits for the end of a killed process.
const KILL_TIME: Duration = Duration::from_millis(100);

const LENGTH_SIZE: usize = size_of::<u32>();

#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error("the worker process did not respond within {} ms", .0.as_millis())]
    TimedOut(Duration),
    #[error("the worker process ended without a response")]
    Ended,
    #[error("the response of the worker process has more than {RESPONSE_MAX} bytes")]
    TooLong,
    #[error("cannot read the response of the worker process: {0}")]
    Read(#[source] io::Error),
}

/// A job in a worker process.
#[derive(Debug)]
pub struct Job {
    process: Child,
    output: ChildStdout,
    received: Vec<u8>,
    started: Instant,
    time: Duration,
}

impl Job {
    /// Starts this binary as a worker, with these arguments and with `input` as its standard input. The worker must respond
    /// within `time`.
    ///
    /// The calling thread must live as long as the agent: the kernel kills the worker when this thread ends (PR_SET_PDEATHSIG).
    ///
    /// # Errors
    ///
    /// Fails if the process cannot be started.
    pub fn start(arguments: &[&str], input: &[u8], time: Duration) -> io::Result<Self> {
        Self::of(worker(arguments).stdin(in_memory(input)?).spawn()?, time)
    }

    fn of(mut process: Child, time: Duration) -> io::Result<Self> {
        let output = process.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        fcntl(output.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self { process, output, received: Vec::new(), started: Instant::now(), time })
    }

    /// Returns the response, or `None` if it has not arrived yet. Does not wait.
    ///
    /// # Errors
    ///
    /// Fails if the deadline has passed, if the worker has ended, or if the response cannot be read or is too long.
    pub fn poll(&mut self) -> Option<Result<Vec<u8>, JobError>> {
        let mut chunk = [0; 1 << 16];
        loop {
            match self.output.read(&mut chunk) {
                Ok(0) => return Some(Err(JobError::Ended)),
                Ok(len) => self.received.extend_from_slice(chunk.get(..len)?),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return self.overdue().map(Err),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Some(Err(JobError::Read(error))),
            }
            match response(&self.received) {
                Response::Partial => {}
                Response::Whole(bytes) => return Some(Ok(bytes.to_vec())),
                Response::TooLong => return Some(Err(JobError::TooLong)),
            }
        }
    }

    /// Returns an error if the deadline has passed.
    fn overdue(&self) -> Option<JobError> {
        (self.left() == Duration::ZERO).then_some(JobError::TimedOut(self.time))
    }

    /// Returns the time until the deadline.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.time.saturating_sub(self.started.elapsed())
    }

    /// Waits for the response, until the deadline.
    ///
    /// # Errors
    ///
    /// Fails as [`Self::poll`] does.
    pub fn wait(&mut self) -> Result<Vec<u8>, JobError> {
        loop {
            if let Some(polled) = self.poll() {
                return polled;
            }
            await_readable(self.as_fd(), self.left());
        }
    }

    /// Kills the process, and waits up to 100 ms for its end. Returns the process if it has not ended
    /// ([`Abandoned::has_ended`]).
    #[must_use]
    pub fn abandon(mut self) -> Option<Abandoned> {
        let mut abandoned = Abandoned(self.process);
        if let Err(error) = abandoned.0.kill() {
            log::debug!("cannot kill worker process {}: {error}", abandoned.0.id());
        }
        // The end of the process closes the pipe.
        let deadline = Instant::now() + KILL_TIME;
        loop {
            match self.output.read(&mut [0; 4096]) {
                Ok(0) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left == Duration::ZERO {
                        return Some(abandoned);
                    }
                    await_readable(self.output.as_fd(), left);
                }
                _ => {}
            }
        }
        while !abandoned.has_ended() {
            if Instant::now() >= deadline {
                return Some(abandoned);
            }
            std::thread::yield_now();
        }
        None
    }
}

/// Returns the command that runs this binary as a worker.
fn worker(arguments: &[&str]) -> Command {
    let mut command = Command::new("/proc/self/exe");
    // A worker that does not end must not keep a pipeline open or a mount busy, and must not get signals of the terminal. Fault
    // points of tests are only for the agent.
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::null()).env_remove(crate::fault::VARIABLE);
    command.current_dir("/").process_group(0);
    command
}

/// Becomes readable when a part of the response arrives.
impl AsFd for Job {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.output.as_fd()
    }
}

/// A worker process that was killed and has not ended.
#[derive(Debug)]
pub struct Abandoned(Child);

impl Abandoned {
    /// Returns whether the process has ended. Does not wait.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.0.try_wait(), Ok(None))
    }

    /// Returns the process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.0.id()
    }
}

/// Waits until a descriptor is readable, or `time` has passed.
fn await_readable(file: BorrowedFd<'_>, time: Duration) {
    await_any([file].into_iter(), time);
}

/// Waits until one of the descriptors is readable, or `time` has passed. Can return early: after a signal or an error, and
/// after 65 s.
pub fn await_any<'a>(files: impl Iterator<Item = BorrowedFd<'a>>, time: Duration) {
    let time = u16::try_from(time.as_millis().saturating_add(1)).unwrap_or(u16::MAX);
    let mut polled: Vec<_> = files.map(|file| PollFd::new(file, PollFlags::POLLIN)).collect();
    // The next read reports an error other than EINTR.
    let _ = poll(&mut polled, PollTimeout::from(time));
}

/// Returns a file in memory with this content, positioned at its start.
fn in_memory(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"sockpolicy-job", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file)
}

/// The state of a response that is being received.
pub(crate) enum Response<'a> {
    Partial,
    Whole(&'a [u8]),
    TooLong,
}

/// Parses the received part of a response.
pub(crate) fn response(received: &[u8]) -> Response<'_> {
    let Some((length, rest)) = received.split_first_chunk::<LENGTH_SIZE>() else { return Response::Partial };
    let length = u32::from_le_bytes(*length) as usize;
    if length > RESPONSE_MAX {
        return Response::TooLong;
    }
    rest.get(..length).map_or(Response::Partial, Response::Whole)
}

/// Returns a response with its length in front, in the form that a worker writes to its standard output.
#[must_use]
pub fn framed(response: &[u8]) -> Vec<u8> {
    [&(response.len() as u32).to_le_bytes(), response].concat()
}

/// Prepares this process, which the process `agent` has started, to be a worker. Closes all descriptors except the standard
/// ones, limits the memory, and makes the kernel kill this process when the agent ends.
///
/// # Errors
///
/// Fails if a system call fails, or if the agent has ended.
pub fn begin(agent: u32) -> io::Result<()> {
    const FIRST: libc::c_uint = libc::STDERR_FILENO as libc::c_uint + 1;
    // SAFETY: no code of this process has opened a descriptor yet. The C library's function is not used, since older C
    // libraries do not have it.
    unsafe { libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, 0) };
    setrlimit(Resource::RLIMIT_AS, MEMORY_MAX, MEMORY_MAX)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    if parent_id() != agent {
        return Err(io::Error::other("the agent has ended"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncated_response_is_partial() {
        let framed = framed(b"abc");
        assert!(matches!(response(&framed), Response::Whole(b"abc")));
        assert!((0..framed.len()).all(|len| matches!(response(&framed[..len]), Response::Partial)));
        assert!(matches!(response(&u32::MAX.to_le_bytes()), Response::TooLong));
        assert!(matches!(response(&super::framed(b"")), Response::Whole(b"")));
    }
}
