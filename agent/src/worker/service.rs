//! A worker process that answers one request after the other, each within a deadline of its own.

use std::{
    io::{self, Read as _, Write as _},
    os::fd::AsFd as _,
    process::{ChildStdin, Stdio},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::{Abandoned, Job, JobError, framed, worker};

/// The process, and its standard input. A request is framed as a response is.
#[derive(Debug)]
pub struct Service {
    job: Job,
    input: ChildStdin,
}

impl Service {
    /// Starts this binary as a worker, with these arguments. See [`Job::start`] about the calling thread.
    ///
    /// # Errors
    ///
    /// If the process cannot be started.
    pub fn start(arguments: &[&str]) -> io::Result<Self> {
        let mut process = worker(arguments).stdin(Stdio::piped()).spawn()?;
        let input = process.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
        fcntl(input.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self { job: Job::of(process, Duration::ZERO)?, input })
    }

    /// Returns the process's number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.job.process.id()
    }

    /// Sends a request, and waits for the response for at most `time`. After an error the worker must be abandoned.
    ///
    /// # Errors
    ///
    /// If no response came.
    pub fn request(&mut self, request: &[u8], time: Duration) -> Result<Vec<u8>, JobError> {
        self.begin(request, time)?;
        self.finish()
    }

    /// Sends a request whose response [`Self::finish`] gives.
    ///
    /// # Errors
    ///
    /// As of [`Self::request`].
    pub fn begin(&mut self, request: &[u8], time: Duration) -> Result<(), JobError> {
        self.job.received.clear();
        (self.job.started, self.job.time) = (Instant::now(), time);
        self.send(&framed(request))
    }

    /// Waits for the response of what was begun.
    ///
    /// # Errors
    ///
    /// As of [`Self::request`].
    pub fn finish(&mut self) -> Result<Vec<u8>, JobError> {
        self.job.wait()
    }

    fn send(&mut self, mut bytes: &[u8]) -> Result<(), JobError> {
        while !bytes.is_empty() {
            match self.input.write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let left = self.job.left();
                    if left == Duration::ZERO {
                        return Err(JobError::TimedOut(self.job.time));
                    }
                    let left = u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX);
                    // An error shows at the next write.
                    let _ = poll(&mut [PollFd::new(self.input.as_fd(), PollFlags::POLLOUT)], PollTimeout::from(left));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Its end has closed the pipe.
                Err(_) => return Err(JobError::Ended),
            }
        }
        Ok(())
    }

    /// Kills the process, and leaves it behind if it does not end at once: see [`Job::abandon`] and [`left_behind`].
    pub fn abandon(self) {
        if let Some(abandoned) = self.job.abandon() {
            LEFT_BEHIND.lock().unwrap_or_else(PoisonError::into_inner).push(abandoned);
        }
    }
}

/// Processes of services that were killed and may not have ended.
static LEFT_BEHIND: Mutex<Vec<Abandoned>> = Mutex::new(Vec::new());

/// Returns how many processes of services were killed and have not ended. Does not wait.
pub fn left_behind() -> usize {
    let mut left = LEFT_BEHIND.lock().unwrap_or_else(PoisonError::into_inner);
    left.retain_mut(|process| !process.has_ended());
    left.len()
}

/// Answers requests from standard input on `output`, until the input ends: what a worker does.
///
/// # Errors
///
/// If a request cannot be read, or a response not be written.
pub fn serve(mut output: impl io::Write, mut answer: impl FnMut(&[u8]) -> Vec<u8>) -> io::Result<()> {
    let mut input = io::stdin().lock();
    loop {
        let mut length = [0; size_of::<u32>()];
        match input.read_exact(&mut length) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        let mut request = vec![0; u32::from_le_bytes(length) as usize];
        input.read_exact(&mut request)?;
        output.write_all(&framed(&answer(&request)))?;
        output.flush()?;
    }
}
