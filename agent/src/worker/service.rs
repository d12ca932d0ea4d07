//! A worker process that handles requests one after the other, each with its own deadline.

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

/// A worker process and its standard input. Requests have the same framing as responses.
#[derive(Debug)]
pub struct Service {
    job: Job,
    input: ChildStdin,
}

impl Service {
    /// Starts this binary as a worker, with these arguments. [`Job::start`] says how long the calling thread must live.
    ///
    /// # Errors
    ///
    /// Fails if the process cannot be started.
    pub fn start(arguments: &[&str]) -> io::Result<Self> {
        let mut process = worker(arguments).stdin(Stdio::piped()).spawn()?;
        let input = process.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
        fcntl(input.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self { job: Job::of(process, Duration::ZERO)?, input })
    }

    /// Returns the process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.job.process.id()
    }

    /// Sends a request, and waits for the response for at most `time`. After an error, the caller must abandon the worker.
    ///
    /// # Errors
    ///
    /// Fails if the deadline passes, if the worker ends, or if the response cannot be read or is too long.
    pub fn request(&mut self, request: &[u8], time: Duration) -> Result<Vec<u8>, JobError> {
        self.begin(request, time)?;
        self.finish()
    }

    /// Sends a request. [`Self::finish`] returns the response.
    ///
    /// # Errors
    ///
    /// Fails as [`Self::request`] does.
    pub fn begin(&mut self, request: &[u8], time: Duration) -> Result<(), JobError> {
        self.job.received.clear();
        (self.job.started, self.job.time) = (Instant::now(), time);
        self.send(&framed(request))
    }

    /// Waits for the response to the request that [`Self::begin`] has sent.
    ///
    /// # Errors
    ///
    /// Fails as [`Self::request`] does.
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
                    // The next write reports an error.
                    let _ = poll(&mut [PollFd::new(self.input.as_fd(), PollFlags::POLLOUT)], PollTimeout::from(left));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The worker has ended, which closed the pipe.
                Err(_) => return Err(JobError::Ended),
            }
        }
        Ok(())
    }

    /// Kills the process. If it does not end at once ([`Job::abandon`]), [`left_behind`] counts it.
    pub fn abandon(self) {
        if let Some(abandoned) = self.job.abandon() {
            LEFT_BEHIND.lock().unwrap_or_else(PoisonError::into_inner).push(abandoned);
        }
    }
}

/// The processes of services that were killed and may not have ended.
static LEFT_BEHIND: Mutex<Vec<Abandoned>> = Mutex::new(Vec::new());

/// Returns the number of processes of services that were killed and have not ended. Does not wait.
pub fn left_behind() -> usize {
    let mut abandoned = LEFT_BEHIND.lock().unwrap_or_else(PoisonError::into_inner);
    abandoned.retain_mut(|process| !process.has_ended());
    abandoned.len()
}

/// Runs the loop of a worker: reads requests from standard input until its end, and writes responses to `output`.
///
/// # Errors
///
/// Fails if a request cannot be read, or a response cannot be written.
pub fn serve(mut output: impl io::Write, mut respond: impl FnMut(&[u8]) -> Vec<u8>) -> io::Result<()> {
    let mut input = io::stdin().lock();
    loop {
        let mut length = [0; size_of::<u32>()];
        match input.read_exact(&mut length) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        let mut request = vec![0; u32::from_le_bytes(length) as usize];
        input.read_exact(&mut request)?;
        output.write_all(&framed(&respond(&request)))?;
        output.flush()?;
    }
}
