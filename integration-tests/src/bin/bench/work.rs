//! The work that is measured, and the process that does it.
//!
//! A worker is this program as `bench work`: a process that other programs can wrap (strace, perf) or get into (LD_PRELOAD),
//! in a network namespace of its own. It goes to the cgroups that it is told, does what it is told for so long, and says how
//! long each time took: the median over pieces of a quarter of a millisecond, so that losing the CPU in one of them does not
//! count. Lines of JSON go in and out.
//!
//! The loops do what a C program would: the system calls and nothing else.

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
    guard::{self, Ground},
    scene::Condition,
    trouble::{Attempt, Result, Trouble},
};

/// The subcommand that is a worker.
pub(crate) const WORK: &str = "work";

/// Longer than any piece of work takes.
const PATIENCE_MS: u16 = 60_000;

/// A call of setsockopt with a number.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Call {
    pub(crate) level: i32,
    pub(crate) name: i32,
    pub(crate) value: i32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Work {
    /// setsockopt on a TCP socket, which fails with this errno, or else with 0.
    Set { call: Call, errno: i32 },
    /// getsockopt of the same.
    Get { call: Call },
    /// socket, these calls, connect, accept, close, close.
    Connect { own: Vec<Call> },
    /// sendto a UDP socket of its own, and recv there: `connected`, or not.
    Send { connected: bool },
    /// Has so many connections to itself, from then on.
    Hold { connections: usize },
    /// Has a server from then on, which is there when it takes connections on this port of 127.0.0.1.
    Serve { command: Vec<String>, port: u16 },
    /// Runs a client to its end, which says how many requests it made a second.
    Load { command: Vec<String>, says: Says },
    /// Runs a command to its end.
    Run { command: Vec<String> },
}

/// Where a client says how many requests it made a second.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Says {
    /// redis-benchmark: the second column of the last line.
    SecondColumn,
    /// wrk: behind `Requests/sec:`.
    RequestsPerSecond,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Task {
    /// The cgroup of the process, and so of its sockets.
    at: PathBuf,
    /// That of its listener.
    listen_at: PathBuf,
    millis: u64,
    work: Work,
}

/// How long the work took each time, and how often it was done.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Took {
    pub(crate) ns: f64,
    pub(crate) times: u64,
}

type Answer = std::result::Result<Took, String>;

/// The other end of a worker's pipes. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Worker {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    log: PathBuf,
}

impl Worker {
    /// Starts one as a condition says: run by something else, with variables.
    pub(crate) fn start(ground: &Ground, home: &Path, condition: &Condition) -> Result<Self> {
        let Condition { wrap, is_one_word, variables, .. } = condition;
        let own = vec![ground.bench.display().to_string(), WORK.to_owned()];
        let own = if *is_one_word { vec![own.join(" ")] } else { own };
        let words: Vec<&String> = wrap.iter().chain(&own).collect();
        let log = ground.scratch.join("worker.log");
        let said = fs::File::create(&log).or_cannot(format_args!("write {}", log.display()))?;
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).envs(variables.iter().cloned());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(said);
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
        let output = child.stdout.take().ok_or_else(|| Trouble::new("a worker has no output"))?;
        Ok(Self { child, input, output: BufReader::new(output), log })
    }

    /// Has it do something for so long, in a cgroup and with its listener in another.
    pub(crate) fn perform(&mut self, at: &Path, listen_at: &Path, millis: u64, work: &Work) -> Result<Took> {
        let task = Task { at: at.to_owned(), listen_at: listen_at.to_owned(), millis, work: work.clone() };
        let answer = self.ask(&task).or_cannot("talk to a worker").map_err(|trouble| self.explained(&trouble))?;
        answer.or_cannot(format_args!("{work:?}"))
    }

    /// What it said before it ended, if that is why.
    fn explained(&self, trouble: &Trouble) -> Trouble {
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        let error = said.lines().rfind(|line| line.contains("rror"));
        let why = error.or_else(|| said.lines().rfind(|line| !line.trim().is_empty())).unwrap_or("it said nothing");
        Trouble::new(format_args!("{}: {why}", trouble.in_short()))
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
    /// Of what wraps it, if anything does.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.input.take());
        // What wraps it ends with it.
        let _ = self.child.wait();
    }
}

/// The worker's own side: to the end of its input.
pub(crate) fn serve() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).or_cannot("make a network namespace")?;
    bring_loopback_up().or_cannot("bring the loopback interface up")?;
    let mut held = loops::Held::default();
    let mut place = PathBuf::new();
    for line in io::stdin().lock().lines() {
        let line = line.or_cannot("read a task")?;
        let task: Task = serde_json::from_str(&line).or_cannot(format_args!("understand {line}"))?;
        let answer: Answer = perform(&task, &mut held, &mut place).map_err(|error| error.to_string());
        let text = serde_json::to_string(&answer).or_cannot("write an answer")?;
        writeln!(io::stdout(), "{text}").or_cannot("write an answer")?;
    }
    Ok(())
}

/// `place` is the cgroup that this process is in: going to one waits for the kernel.
fn perform(task: &Task, held: &mut loops::Held, place: &mut PathBuf) -> io::Result<Took> {
    let Task { at, listen_at, millis, work } = task;
    let mut go_to = |cgroup: &Path| {
        if place != cgroup {
            fs::write(cgroup.join("cgroup.procs"), "0")?;
            cgroup.clone_into(place);
        }
        io::Result::Ok(())
    };
    if matches!(work, Work::Connect { .. }) && !held.has_listener(listen_at) {
        go_to(listen_at)?;
        held.listen(listen_at)?;
    }
    go_to(at)?;
    match work {
        Work::Set { call, errno } => loops::set(*call, *errno, *millis),
        Work::Get { call } => loops::get(*call, *millis),
        Work::Connect { own } => held.listener(listen_at)?.connect(own, *millis),
        Work::Send { connected } => loops::send(*connected, *millis),
        Work::Hold { connections } => timed(|| held.connect(*connections)),
        Work::Serve { command, port } => timed(|| held.serve(command, *port)),
        Work::Load { command, says } => load(command, *says),
        Work::Run { command } => timed(|| output(command).map(drop)),
    }
}

fn timed(act: impl FnOnce() -> io::Result<()>) -> io::Result<Took> {
    let begin = Instant::now();
    act()?;
    Ok(Took { ns: begin.elapsed().as_nanos() as f64, times: 1 })
}

fn load(command: &[String], says: Says) -> io::Result<Took> {
    let said = output(command)?;
    let rate = rate(&said, says).ok_or_else(|| io::Error::other(format!("no rate in {said}")))?;
    Ok(Took { ns: 1e9 / rate, times: 1 })
}

fn rate(said: &str, says: Says) -> Option<f64> {
    let word = match says {
        Says::SecondColumn => said.lines().last()?.split(',').nth(1)?.trim_matches('"'),
        Says::RequestsPerSecond => said.lines().find_map(|line| line.strip_prefix("Requests/sec:"))?,
    };
    word.trim().parse().ok().filter(|rate| *rate > 0.0)
}

fn output(command: &[String]) -> io::Result<String> {
    let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(said);
    }
    let error = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{program}: {}: {}", output.status, error.trim())))
}

fn bring_loopback_up() -> io::Result<()> {
    // Any kind will do: one that policies are not about.
    // SAFETY: takes numbers.
    let socket = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    // SAFETY: zero is valid for each field.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the request is of the kind that this ioctl takes, and nobody else has the socket.
    let result = unsafe {
        let result = libc::ioctl(socket, libc::SIOCSIFFLAGS, &raw const request);
        libc::close(socket);
        result
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::{Says, rate};

    #[test]
    fn rates_are_found_where_clients_say_them() {
        let redis = "\"test\",\"rps\",\"avg_latency_ms\"\n\"GET\",\"50000.50\",\"0.1\"\n";
        assert_eq!(rate(redis, Says::SecondColumn), Some(50000.5));
        let wrk = "Running 1s test\n  123 requests in 1.00s\nRequests/sec:  48312.07\nTransfer/sec: 7MB\n";
        assert_eq!(rate(wrk, Says::RequestsPerSecond), Some(48312.07));
        assert_eq!(rate("", Says::SecondColumn), None);
        assert_eq!(rate("Requests/sec: 0.00", Says::RequestsPerSecond), None);
    }
}
