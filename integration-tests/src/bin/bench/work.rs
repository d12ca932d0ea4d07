//! The measured work, and the worker process that performs it.
//!
//! A worker is this program as `bench work`. Other programs can wrap it (strace, perf) or load into it (LD_PRELOAD),
//! and it has its own network namespace. It joins the cgroup of each task, works for the given time, and reports the
//! time per operation. That time is the median over pieces of 250 µs, so that preemption during a piece does not
//! count. Tasks and answers are lines of JSON.
//!
//! The loops make the system calls of a C program and nothing else.

mod loops;

use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Instant,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, unshare},
};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Attempt, BenchError, Result},
    guard::{self, Workspace},
    scene::Condition,
};

/// The subcommand that makes this program a worker.
pub(crate) const WORK: &str = "work";

/// A time limit that is longer than any task.
const PATIENCE_MS: u16 = 60_000;

/// A call of setsockopt with an int.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Call {
    pub(crate) level: i32,
    pub(crate) name: i32,
    pub(crate) value: i32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Work {
    /// setsockopt on a TCP socket; fails with `errno`, or succeeds if it is 0.
    Set { call: Call, errno: i32 },
    /// getsockopt of the same option.
    Get { call: Call },
    /// socket, these calls, connect, accept, and two closes.
    Connect { own: Vec<Call> },
    /// sendto a UDP socket of the same process and recv there; or send on a connected socket.
    Send { connected: bool },
    /// Keeps this number of connections to itself open.
    Hold { connections: usize },
    /// Starts a server, which is ready when it accepts connections on this port of 127.0.0.1.
    Serve { command: Vec<String>, port: u16 },
    /// Runs a client to its end, which prints its requests per second.
    Load { command: Vec<String>, format: RateFormat },
    /// Runs a command to its end.
    Run { command: Vec<String> },
}

/// Where a client prints its requests per second.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum RateFormat {
    /// redis-benchmark: the second column of the last line.
    SecondColumn,
    /// wrk: after `Requests/sec:`.
    RequestsPerSecond,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Task {
    /// The cgroup of the process, and of its sockets.
    at: PathBuf,
    /// The cgroup of the listener.
    listen_at: PathBuf,
    millis: u64,
    work: Work,
}

/// The time per operation, and the number of operations.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Timing {
    pub(crate) ns: f64,
    pub(crate) times: u64,
}

type Answer = std::result::Result<Timing, String>;

/// A worker with its pipes. It ends when this value is dropped.
#[derive(Debug)]
pub(crate) struct Worker {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    log: PathBuf,
}

impl Worker {
    /// Starts a worker with the wrapper and the environment of a condition.
    pub(crate) fn start(ground: &Workspace, home: &Path, condition: &Condition) -> Result<Self> {
        let Condition { wrap, is_one_word, variables, .. } = condition;
        let own = vec![ground.bench.display().to_string(), WORK.to_owned()];
        let own = if *is_one_word { vec![own.join(" ")] } else { own };
        let words: Vec<&String> = wrap.iter().chain(&own).collect();
        let log = ground.scratch.join("worker.log");
        let printed = fs::File::create(&log).or_cannot(format_args!("write {}", log.display()))?;
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).envs(variables.iter().cloned());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(printed);
        let mut enter = guard::enter(home)?;
        // SAFETY: only makes system calls.
        unsafe {
            command.pre_exec(move || {
                guard::die_with_parent()?;
                enter()
            });
        }
        let mut child = command.spawn().or_cannot(format_args!("run {}", words[0]))?;
        let input = child.stdin.take();
        let output = child.stdout.take().ok_or_else(|| BenchError::new("a worker has no output"))?;
        Ok(Self { child, input, output: BufReader::new(output), log })
    }

    /// Makes the worker perform a task for a time, in a cgroup, with its listener in another.
    pub(crate) fn perform(&mut self, at: &Path, listen_at: &Path, millis: u64, work: &Work) -> Result<Timing> {
        let task = Task { at: at.to_owned(), listen_at: listen_at.to_owned(), millis, work: work.clone() };
        let answer = self.ask(&task).or_cannot("talk to a worker").map_err(|error| self.explained(&error))?;
        answer.or_cannot(format_args!("{work:?}"))
    }

    /// Adds the last output of the worker to an error.
    fn explained(&self, error: &BenchError) -> BenchError {
        let printed = fs::read_to_string(&self.log).unwrap_or_default();
        let with_error = printed.lines().rfind(|line| line.contains("rror"));
        let why = with_error.or_else(|| printed.lines().rfind(|line| !line.trim().is_empty())).unwrap_or("no output");
        BenchError::new(format_args!("{}: {why}", error.in_short()))
    }

    fn ask(&mut self, task: &Task) -> io::Result<Answer> {
        let input = self.input.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        writeln!(input, "{}", serde_json::to_string(task)?)?;
        let mut ready = [PollFd::new(self.output.get_ref().as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, PollTimeout::from(PATIENCE_MS))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}

impl Worker {
    /// Returns the process id of the wrapper, if there is one, or of the worker.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.input.take());
        // The wrapper ends with the worker.
        let _ = self.child.wait();
    }
}

/// Runs the worker until its input ends.
pub(crate) fn serve() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).or_cannot("make a network namespace")?;
    bring_loopback_up().or_cannot("bring the loopback interface up")?;
    let mut state = loops::WorkerState::default();
    let mut place = PathBuf::new();
    for line in io::stdin().lock().lines() {
        let line = line.or_cannot("read a task")?;
        let task: Task = serde_json::from_str(&line).or_cannot(format_args!("parse {line}"))?;
        let answer: Answer = perform(&task, &mut state, &mut place).map_err(|error| error.to_string());
        let text = serde_json::to_string(&answer).or_cannot("write an answer")?;
        writeln!(io::stdout(), "{text}").or_cannot("write an answer")?;
    }
    Ok(())
}

/// `place` is the current cgroup of this process. Joining a cgroup waits for the kernel, so it is done only on a
/// change.
fn perform(task: &Task, state: &mut loops::WorkerState, place: &mut PathBuf) -> io::Result<Timing> {
    let Task { at, listen_at, millis, work } = task;
    let mut go_to = |cgroup: &Path| {
        if place != cgroup {
            fs::write(cgroup.join("cgroup.procs"), "0")?;
            cgroup.clone_into(place);
        }
        io::Result::Ok(())
    };
    if matches!(work, Work::Connect { .. }) && !state.has_listener(listen_at) {
        go_to(listen_at)?;
        state.listen(listen_at)?;
    }
    go_to(at)?;
    match work {
        Work::Set { call, errno } => loops::set(*call, *errno, *millis),
        Work::Get { call } => loops::get(*call, *millis),
        Work::Connect { own } => state.listener(listen_at)?.connect(own, *millis),
        Work::Send { connected } => loops::send(*connected, *millis),
        Work::Hold { connections } => timed(|| state.connect(*connections)),
        Work::Serve { command, port } => timed(|| state.serve(command, *port)),
        Work::Load { command, format } => load(command, *format),
        Work::Run { command } => timed(|| output(command).map(drop)),
    }
}

fn timed(act: impl FnOnce() -> io::Result<()>) -> io::Result<Timing> {
    let begin = Instant::now();
    act()?;
    Ok(Timing { ns: begin.elapsed().as_nanos() as f64, times: 1 })
}

fn load(command: &[String], format: RateFormat) -> io::Result<Timing> {
    let printed = output(command)?;
    let rate = rate(&printed, format).ok_or_else(|| io::Error::other(format!("no rate in {printed}")))?;
    Ok(Timing { ns: 1e9 / rate, times: 1 })
}

fn rate(printed: &str, format: RateFormat) -> Option<f64> {
    let word = match format {
        RateFormat::SecondColumn => printed.lines().last()?.split(',').nth(1)?.trim_matches('"'),
        RateFormat::RequestsPerSecond => printed.lines().find_map(|line| line.strip_prefix("Requests/sec:"))?,
    };
    word.trim().parse().ok().filter(|rate| *rate > 0.0)
}

fn output(command: &[String]) -> io::Result<String> {
    let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output()?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(printed);
    }
    let error = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{program}: {}: {}", output.status, error.trim())))
}

fn bring_loopback_up() -> io::Result<()> {
    // Any kind of socket works; policies do not cover AF_UNIX.
    // SAFETY: takes numbers.
    let socket = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    // SAFETY: zero is valid for each field.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the request has the type that this ioctl takes, and the socket has no other owner.
    let result = unsafe {
        let result = libc::ioctl(socket, libc::SIOCSIFFLAGS, &raw const request);
        libc::close(socket);
        result
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::{RateFormat, rate};

    #[test]
    fn rates_are_parsed_from_the_output_of_clients() {
        let redis = "\"test\",\"rps\",\"avg_latency_ms\"\n\"GET\",\"50000.50\",\"0.1\"\n";
        assert_eq!(rate(redis, RateFormat::SecondColumn), Some(50000.5));
        let wrk = "Running 1s test\n  123 requests in 1.00s\nRequests/sec:  48312.07\nTransfer/sec: 7MB\n";
        assert_eq!(rate(wrk, RateFormat::RequestsPerSecond), Some(48312.07));
        assert_eq!(rate("", RateFormat::SecondColumn), None);
        assert_eq!(rate("Requests/sec: 0.00", RateFormat::RequestsPerSecond), None);
    }
}
