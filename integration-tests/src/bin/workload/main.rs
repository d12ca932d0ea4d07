//! Programs that the tests run under the agent, where no shell script suffices:
//!
//! - `workload signals LAST`: waits for signals and prints `NAME from kernel|process` for each, until LAST arrives;
//! - `workload storm PROCESSES CALLS`: each process makes CALLS conflicting calls for TCP_NODELAY and as many for
//!   SO_KEEPALIVE, then prints `PID CALLS`;
//! - `workload forks CHILDREN`: starts CHILDREN processes, one after the other, each of which makes one conflicting
//!   call for SO_KEEPALIVE;
//! - `workload calls`: makes valid and invalid calls of every kind, in the process, in a thread and in a child;
//! - `workload ring plain|polled|fixed|async|deferred`: makes calls through an io_uring, see [`ring`];
//! - `workload connections`: see [`connections`];
//! - `workload differential SPEC OUT root|nobody`: see [`differential`];
//! - `workload as PID PROGRAM`: runs a program with this process id;
//! - `workload threads|pairs|vfork|mark|race|faults …`: see [`bad_arguments`].

mod bad_arguments;
mod connections;
mod differential;
mod ring;

use std::{
    env, fs,
    io::{self, Write},
    mem,
    process::ExitCode,
    ptr,
    str::FromStr,
    thread,
};

use nix::sys::{
    signal::{SigSet, Signal},
    wait::{WaitStatus, wait},
};

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match *words.as_slice() {
        ["signals", last] => signals(last),
        ["storm", processes, calls] => {
            two_numbers(processes, calls).and_then(|(processes, calls)| storm(processes, calls))
        }
        ["forks", children] => number(children).and_then(forks),
        ["calls"] => calls(),
        ["connections"] => connections::connections(),
        ["as", pid, program] => number(pid).and_then(|pid| bad_arguments::run_as(pid, program)),
        ["differential", spec, out, user] => differential::differential(spec, out, user),
        ["ring", mode] => ring::ring(mode),
        ["threads", threads, calls] => {
            two_numbers(threads, calls).and_then(|(threads, calls)| bad_arguments::threads(threads, calls))
        }
        ["pairs", processes, calls, refused] => {
            let refused = number(refused);
            two_numbers(processes, calls)
                .and_then(|(processes, calls)| bad_arguments::pairs(processes, calls, refused?))
        }
        ["vfork", program, children] => number(children).and_then(|children| bad_arguments::vfork(program, children)),
        ["mark", value] => number(value).and_then(bad_arguments::mark_once),
        ["race", calls] => number(calls).and_then(bad_arguments::race),
        ["faults", kind] => bad_arguments::faults(kind),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "workload {}: {error}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn number<T: FromStr>(word: &str) -> io::Result<T> {
    word.parse().ok().ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn two_numbers<T: FromStr, U: FromStr>(one: &str, other: &str) -> io::Result<(T, U)> {
    Ok((number(one)?, number(other)?))
}

fn print_line(line: &str) -> io::Result<()> {
    // A single write, so that the lines of several processes do not mix.
    io::stdout().lock().write_all(format!("{line}\n").as_bytes())
}

fn signals(last: &str) -> io::Result<()> {
    let last: Signal = last.parse()?;
    let all = SigSet::all();
    all.thread_block()?;
    print_line("ready")?;
    loop {
        // SAFETY: zero is valid for each field, and the kernel fills it.
        let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
        // SAFETY: two_numbers outlive the call.
        let number = unsafe { libc::sigwaitinfo(all.as_ref(), &raw mut info) };
        let Ok(signal) = Signal::try_from(number) else { return Err(io::Error::last_os_error()) };
        print_line(&format!("{signal} from {}", if info.si_code > 0 { "kernel" } else { "process" }))?;
        if signal == last {
            return Ok(());
        }
    }
}

fn storm(processes: u32, calls: u64) -> io::Result<()> {
    for _ in 0..processes {
        in_child(|| {
            let socket = socket()?;
            for _ in 0..calls {
                set(socket, libc::SOL_TCP, libc::TCP_NODELAY, &0i32.to_ne_bytes())?;
                set(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, &0i32.to_ne_bytes())?;
            }
            print_line(&format!("{} {calls}", std::process::id()))
        })?;
    }
    for _ in 0..processes {
        reap()?;
    }
    Ok(())
}

fn forks(children: u64) -> io::Result<()> {
    for _ in 0..children {
        in_child(|| set(socket()?, libc::SOL_SOCKET, libc::SO_KEEPALIVE, &0i32.to_ne_bytes()))?;
        reap()?;
    }
    Ok(())
}

fn calls() -> io::Result<()> {
    make_calls()?;
    thread::scope(|scope| scope.spawn(make_calls).join().unwrap_or_else(|_| Err(io::Error::other("panicked"))))?;
    in_child(make_calls)?;
    reap()
}

/// Makes calls whose results only an observer of the process sees.
fn make_calls() -> io::Result<()> {
    let socket = socket()?;
    for value in [1, 0, 7] {
        set(socket, libc::SOL_TCP, libc::TCP_NODELAY, &int(value))?;
        get(socket, libc::SOL_TCP, libc::TCP_NODELAY, 4);
    }
    set(socket, libc::SOL_SOCKET, libc::SO_SNDBUF, &int(65536))?;
    get(socket, libc::SOL_SOCKET, libc::SO_SNDBUF, 4);
    set(socket, libc::SOL_TCP, libc::TCP_CONGESTION, b"reno")?;
    get(socket, libc::SOL_TCP, libc::TCP_CONGESTION, 16);
    set(socket, libc::SOL_SOCKET, libc::SO_LINGER, &[int(1), int(5)].concat())?;
    // None of these calls succeeds. The kernel does not read the argument of some; it is on the stack, so that its
    // page is present.
    let refused = [
        set(socket, libc::SOL_TCP, libc::TCP_KEEPIDLE, &int(0)),
        set(socket, libc::SOL_TCP, 9999, &int(1)),
        set(socket, 9999, 1, &int(1)),
        set(socket, libc::SOL_TCP, libc::TCP_NODELAY, &int(1)[..1]),
        set(socket, libc::SOL_TCP, libc::TCP_CONGESTION, b"no-such-thing"),
        set(-1, libc::SOL_TCP, libc::TCP_NODELAY, &int(1)),
        set(12345, libc::SOL_SOCKET, libc::SO_KEEPALIVE, &int(1)),
        set_at(socket, libc::SOL_TCP, libc::TCP_NODELAY, 8, 4),
        set_at(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 0, 4),
        set_at(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 8, u32::MAX),
    ];
    if let Some(call) = refused.iter().position(Result::is_ok) {
        return Err(io::Error::other(format!("call {call} succeeded, but must fail")));
    }
    get(socket, libc::SOL_TCP, 9999, 4);
    get(-1, libc::SOL_TCP, libc::TCP_NODELAY, 4);
    get(socket, libc::SOL_TCP, libc::TCP_INFO, 104);
    // A file is not a socket.
    let file = fs::File::open("/proc/self/exe")?;
    let _ = set(std::os::fd::AsRawFd::as_raw_fd(&file), libc::SOL_SOCKET, libc::SO_KEEPALIVE, &int(1));
    Ok(())
}

fn int(value: i32) -> [u8; 4] {
    value.to_ne_bytes()
}

fn socket() -> io::Result<i32> {
    // SAFETY: takes numbers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(fd) }
}

fn set(fd: i32, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    set_at(fd, level, name, value.as_ptr().addr(), value.len() as u32)
}

/// Calls setsockopt with an argument at any address.
fn set_at(fd: i32, level: i32, name: i32, address: usize, len: u32) -> io::Result<()> {
    // SAFETY: the kernel checks the pointer, and writes nothing.
    let result = unsafe { libc::setsockopt(fd, level, name, ptr::with_exposed_provenance(address), len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn get(fd: i32, level: i32, name: i32, len: u32) {
    let mut value = vec![0u8; len as usize];
    let mut left = len;
    // SAFETY: the buffer has `left` bytes.
    unsafe { libc::getsockopt(fd, level, name, value.as_mut_ptr().cast(), &raw mut left) };
}

fn get_int(fd: i32, level: i32, name: i32, value: &mut i32) -> io::Result<()> {
    let mut len = 4;
    // SAFETY: room for an int.
    let result = unsafe { libc::getsockopt(fd, level, name, ptr::from_mut(value).cast(), &raw mut len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Starts a child that performs `work` and ends.
fn in_child(work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    // SAFETY: this process has no other thread at this time.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { .. } => Ok(()),
        nix::unistd::ForkResult::Child => {
            let status = i32::from(work().is_err());
            // SAFETY: ends the child without the parent's exit handlers.
            unsafe { libc::_exit(status) }
        }
    }
}

fn reap() -> io::Result<()> {
    match wait()? {
        WaitStatus::Exited(_, 0) => Ok(()),
        other => Err(io::Error::other(format!("{other:?}"))),
    }
}
